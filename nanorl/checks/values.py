"""check_advantage: what must hold for every estimator of advantages from a critic's values, such as GAE.

An invariant is a function of (estimator, trajectories, generator), as in invariants.py.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nanorl.checks.cases import Trajectories, numbers, trajectories
from nanorl.checks.invariants import close, expect
from nanorl.checks.report import Report, check_all, random_cases
from nanorl.tabular import leaf, log_probs, num_prefixes, prefix_rows, randn, reward_gradient, sequence_probs, sequences

GAMMA, LAM = 0.9, 0.7       # where an invariant is of no particular ones


def estimate(f: Callable, t: Trajectories, gamma: float = GAMMA, lam: float = LAM) -> tuple[Tensor, Tensor | None]:
    """(advantages, returns or None), where the mask is False 0."""
    out = f(t.rewards.clone(), t.values.clone(), t.mask.clone(), gamma, lam)
    return tuple(None if x is None else x.masked_fill(~t.mask, 0.0) for x in (out if isinstance(out, tuple) else (out, None)))


def advantages(f: Callable, t: Trajectories, gamma: float = GAMMA, lam: float = LAM) -> Tensor:
    return estimate(f, t, gamma, lam)[0]


def deltas(t: Trajectories, gamma: float) -> Tensor:
    """r_t + gamma V_{t+1} - V_t, with V = 0 after the run."""
    values = t.values.masked_fill(~t.mask, 0.0)
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return (t.rewards + gamma * after - values).masked_fill(~t.mask, 0.0)


def discounted(x: Tensor, rate: float) -> Tensor:
    """sum_k rate^k x_{t+k}, by its definition.       [B, T] -> [B, T]"""
    t = torch.arange(x.shape[1])
    k = t[None, :] - t[:, None]                                                             # [T, T]: from t to t + k
    return x @ torch.where(k >= 0, rate ** k.clamp(min=0).double(), 0.0).T


def expect_advantages(found: Tensor, expected: Tensor, what: str, t: Trajectories) -> None:
    expect(close(found, expected, 1e-6), f"{what}: {numbers(found[t.mask])}, expected {numbers(expected[t.mask])} ({t})")


def contract(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """it returns advantages [B, T], or (advantages, returns), finite"""
    out = f(t.rewards.clone(), t.values.clone(), t.mask.clone(), GAMMA, LAM)
    for x in out if isinstance(out, tuple) else (out,):
        expect(isinstance(x, Tensor) and x.shape == t.mask.shape,
               f"it returned a {type(x).__name__} of shape {[*getattr(x, 'shape', [])]}, expected {[*t.mask.shape]}")
        expect(bool(x[t.mask].isfinite().all()), f"it returned {numbers(x[t.mask])} ({t})")


def constants(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """no gradient flows through advantages or returns into the critic: it is detached, or refused"""
    try:
        out = f(t.rewards.clone(), leaf(t.values), t.mask.clone(), GAMMA, LAM)
    except Exception:
        return
    for name, x in zip(("advantages", "returns"), out if isinstance(out, tuple) else (out,), strict=False):
        expect(not x.requires_grad, f"the {name} carry a gradient")


def writes(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """it does not write into its arguments"""
    given = replace(t, **{name: x.clone() for name, x in vars(t).items()})
    f(*vars(given).values(), GAMMA, LAM)
    for name, x in vars(given).items():
        expect(torch.equal(x, getattr(t, name)), f"it writes into {name}")


def poison(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """rewards and values of padding matter nowhere else, whatever they hold"""
    for value in (1.0, torch.inf, torch.nan):
        dirty = replace(t, rewards=t.rewards.masked_fill(~t.mask, value), values=t.values.masked_fill(~t.mask, value))
        expect_advantages(advantages(f, dirty), advantages(f, replace(t, rewards=t.rewards * t.mask, values=t.values * t.mask)),
                          f"{value} in padding", t)


def padding(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """extra columns of padding change nothing"""
    wide = replace(t, **{name: torch.nn.functional.pad(x, (0, 2)) for name, x in vars(t).items()})
    expect_advantages(advantages(f, wide)[:, :-2], advantages(f, t), "padded by two columns", t)


def rows(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """each answer has its own advantages, whatever else is in the batch"""
    alone = torch.cat([advantages(f, t.rows(slice(b, b + 1))) for b in range(len(t))])
    expect_advantages(advantages(f, t), alone, "together", t)


def causality(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """an advantage does not depend on rewards and values before its token"""
    cut = int(torch.randint(t.width, (), generator=generator))
    before = torch.arange(t.width) < cut
    other = replace(t, rewards=t.rewards + before * 1.0, values=t.values - before * 1.0)
    expect_advantages(advantages(f, other)[:, cut:], advantages(f, t)[:, cut:], f"other rewards and values before {cut}",
                      t.positions(~before))


def terminal(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """nothing follows the last token: its advantage is r - V"""
    last = t.mask & (t.mask.flip(-1).cumsum(-1).flip(-1) == 1)
    found, expected = (x.masked_fill(~last, 0.0) for x in (advantages(f, t), t.rewards - t.values))
    expect_advantages(found, expected, "last tokens", t)


def one_step(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """at lambda = 0 an advantage is r_t + gamma V_{t+1} - V_t"""
    expect_advantages(advantages(f, t, lam=0.0), deltas(t, GAMMA), "lambda = 0", t)


def rewards_to_go(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """at lambda = 1 an advantage is the discounted rewards to go, less V"""
    to_go = discounted(t.rewards.masked_fill(~t.mask, 0.0), GAMMA) - t.values
    expect_advantages(advantages(f, t, lam=1.0), to_go.masked_fill(~t.mask, 0.0), "lambda = 1", t)


def definition(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """an advantage is sum_k (gamma lambda)^k delta_{t+k}"""
    expected = discounted(deltas(t, GAMMA), GAMMA * LAM).masked_fill(~t.mask, 0.0)
    expect_advantages(advantages(f, t), expected, f"gamma = {GAMMA}, lambda = {LAM}", t)


def returns(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """the returns, if it has any, are advantages + values"""
    found, second = estimate(f, t)
    if second is not None:
        expect_advantages(second, (found + t.values).masked_fill(~t.mask, 0.0), "returns", t)


def unbiased(f: Callable, t: Trajectories, generator: torch.Generator) -> None:
    """with the exact values of a policy, E[sum_t A_t grad log pi] is grad E[r] for every lambda (by enumeration)"""
    V, T = 2, 3
    pi, r = leaf(randn(generator, num_prefixes(V, T), V)), randn(generator, V**T)
    state, prob, logp = prefix_rows(sequences(V, T), V), sequence_probs(pi.detach()), log_probs(pi)
    values = torch.zeros(len(pi)).double().index_put((state,), (prob * r)[:, None].expand(state.shape), accumulate=True)
    values /= torch.zeros(len(pi)).double().index_put((state,), prob[:, None].expand(state.shape), accumulate=True)
    whole = Trajectories(torch.cat((torch.zeros(V**T, T - 1), r[:, None]), dim=-1), values[state], torch.ones(V**T, T) > 0)
    for lam in (0.0, 0.5, 1.0):
        ours = torch.autograd.grad((prob[:, None] * advantages(f, whole, 1.0, lam) * logp).sum(), pi, retain_graph=True)[0]
        exact = reward_gradient(pi, r)
        expect(close(ours, exact, 1e-6), f"at lambda = {lam} it is {numbers(ours)}, expected {numbers(exact)}")


INVARIANTS = (constants, writes, poison, padding, rows, causality, terminal, one_step, rewards_to_go, definition, returns,
              unbiased)


def check_advantage(f: Callable, *, examples: int = 50) -> Report:
    """Check an estimator such as GAE, f(rewards, values, mask, gamma, lam) -> advantages, or (advantages, returns), all [B, T].

    values[:, t] belongs to the state that chooses token t; the mask of a row is one run, after which the answer has ended.
    Returns the report if nothing is broken; raises BrokenObjective, an AssertionError with the report, if something is.
    """
    return check_all(f, contract, INVARIANTS, random_cases(trajectories(), examples), {}, {}).conclude()
