"""Invariants that any policy-gradient objective can be held against, also your own.

    report = check_objective(my_objective, advantage=my_advantage, clip=(0.2, 0.2))       in a test
    python -m nanorl.checks my_script.py:my_objective --clip 0.2 0.2                       on a command line

An objective is a function of one contract, that of train_grpo.py,

    objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None) -> (loss, metrics)

logp, old_logp, ref_logp, entropy, mask, weights [B, T]; adv [B, 1]; loss a scalar to be minimised; metrics detached scalars
that add up over micro-batches, except names that end in _max or _min. Each invariant is a plain function of the objective
and one batch, which hypothesis draws. Where it breaks, answers and positions are left out as long as it still does: the
counterexample that is reported needs every token it has.
"""

import argparse
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from nanorl.ops import AGGREGATES, importance_ratio, selective_log_softmax, sequence_ratio, token_weights
from nanorl.run import user_errors
from nanorl.tabular import (
    expectation,
    fixed_prefix_kl,
    log_probs,
    num_prefixes,
    reward_gradient,
    sequence_probs,
    sequences,
)

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:
    sentence = 'nanorl.checks needs hypothesis; install it with: pip install -e ".[test]"'
    raise (SystemExit(sentence) if __name__ == "__main__" else ImportError(sentence)) from None

# ---------------------------------------------------------------------------------------------------------------------
# What the invariants quantify over. Hypothesis draws shapes, scales and a seed; torch makes the tensors, in float64.
# ---------------------------------------------------------------------------------------------------------------------

generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
aggregates = st.sampled_from(AGGREGATES)
poisons = st.sampled_from([torch.nan, torch.inf, -torch.inf])


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@st.composite
def policies(draw, count=1, V=(2, 4), T=(1, 3)):
    """Tables of nanorl/tabular.py of one shape [prefixes, V]; V and T are ranges."""
    V, T, g = draw(st.integers(*V)), draw(st.integers(*T)), draw(generators)
    scale = draw(st.sampled_from([0.01, 0.3, 1.0, 3.0]))
    tables = [scale * randn(g, num_prefixes(V, T), V) for _ in range(count)]
    return tables[0] if count == 1 else tables


@st.composite
def rewards(draw, min_group=1):
    """[P, G], each row of its own kind: 0/1 verdicts, a few levels, real numbers, or all alike."""
    P, G, g = draw(st.integers(1, 4)), draw(st.integers(min_group, 8)), draw(generators)
    kinds = (torch.randint(2, (P, G), generator=g), torch.randint(-2, 3, (P, G), generator=g) / 10,
             randn(g, P, G), randn(g, P, 1).expand(P, G))
    return torch.stack([kinds[k][p].double() for p, k in enumerate(torch.randint(len(kinds), (P,), generator=g))])


@st.composite
def masks(draw, kinds=("empty", "full", "run", "scattered")):
    """[B, T] bool, each row of its own kind."""
    B, T, g = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(generators)
    t, edges = torch.arange(T), torch.randint(T, (B, 2), generator=g).sort().values
    rows = {"empty": torch.zeros(B, T, dtype=torch.bool),
            "full": torch.ones(B, T, dtype=torch.bool),
            "run": (edges[:, :1] <= t) & (t <= edges[:, 1:]),
            "scattered": torch.rand(B, T, generator=g) < 0.5}
    return torch.stack([rows[kinds[k]][b] for b, k in enumerate(torch.randint(len(kinds), (B,), generator=g))])


@st.composite
def masked_prompts(draw):
    """mask [B, T] and prompt_index [B]: three labels with gaps, in no order, with any number of rows each."""
    mask, g = draw(masks()), draw(generators)
    return mask, torch.randint(-100, 100, (3,), generator=g)[torch.randint(3, (len(mask),), generator=g)]


@dataclass
class Batch:
    """Everything an objective takes: [B, T], but adv is [B, 1] and prompt_index [B]."""

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    entropy: Tensor
    adv: Tensor
    mask: Tensor
    weights: Tensor
    prompt_index: Tensor

    def rows(self, index) -> "Batch":
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def on_policy(self) -> "Batch":
        """The same batch before the policy has moved away from its sampler and its reference."""
        return replace(self, old_logp=self.logp, ref_logp=self.logp)


NOISY = ("logp", "old_logp", "ref_logp", "entropy")       # what may hold anything where the mask is False


@st.composite
def batches(draw, moves=(0.0, 0.1, 0.5, 2.0)):
    """The rows of one optimizer step, whose log-probs have moved away from the sampling policy's by one of `moves`."""
    (mask, prompt_index), g = draw(masked_prompts()), draw(generators)
    B, T = mask.shape
    logp, adv = -randn(g, B, T).abs(), randn(g, B, 1)
    adv[torch.rand(B, generator=g) < 0.2] = 0.0                 # groups without contrast
    return Batch(logp=logp, old_logp=logp + draw(st.sampled_from(moves)) * randn(g, B, T),
                 ref_logp=logp + draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])) * randn(g, B, T),
                 entropy=randn(g, B, T).abs(), adv=adv, mask=mask, prompt_index=prompt_index,
                 weights=token_weights(mask, prompt_index, draw(aggregates), T).double())


def partition(generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
    """The rows 0 .. count-1 in some order, cut into parts anywhere."""
    cuts = torch.rand(count - 1, generator=generator) < 0.5
    return torch.randperm(count, generator=generator).tensor_split((cuts.nonzero().squeeze(-1) + 1).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Looking at an objective
# ---------------------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """An invariant does not hold; the message is the counterexample in plain words."""


@dataclass
class Result:
    loss: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor            # dL/dlogp [B, T]
    entropy: Tensor         # dL/dentropy [B, T]


def call(f: Callable, batch: Batch) -> Result:
    """The objective's loss and metrics, and its gradients."""
    logp, entropy = leaf(batch.logp), leaf(batch.entropy)
    loss, metrics = f(logp, batch.old_logp, batch.adv, batch.mask, batch.weights, ref_logp=batch.ref_logp, entropy=entropy)
    gradients = torch.autograd.grad(loss, (logp, entropy), materialize_grads=True)
    return Result(loss.detach(), metrics, *gradients)


def close(a: Tensor, b: Tensor, tol: float = 1e-9) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol, equal_nan=True)


def words(batch: Batch) -> str:
    """A batch in a sentence."""
    B, T = batch.mask.shape
    return (f"{B} answer{'s' * (B > 1)} with {T} position{'s' * (T > 1)}, of which {int(batch.mask.sum())} count"
            f"{'s' * (int(batch.mask.sum()) == 1)}, A = {numbers(batch.adv)}")


def numbers(x: Tensor) -> str:
    return ", ".join(f"{v:.3g}" for v in x.flatten().tolist()[:6]) + (", ..." if x.numel() > 6 else "")


def expect_gradient(batch: Batch, found: Tensor, expected: Tensor, rho: Tensor, tol: float = 1e-9) -> None:
    """dL/dlogp is what it should be, or the first token where it is not."""
    wrong = ((found - expected).abs() > tol * (1 + expected.abs())) | found.isnan()
    for b, t in wrong.nonzero().tolist():
        raise Broken(f"a token with A = {batch.adv[b, 0]:.3g}, ratio {rho.expand_as(found)[b, t]:.3g} and weight "
                     f"{batch.weights[b, t]:.3g} has dL/dlogp = {found[b, t]:.3g}, expected {expected[b, t]:.3g}")


def ratio_of(batch: Batch, ratio: str) -> Tensor:
    logp, old = (x.masked_fill(~batch.mask, 0.0) for x in (batch.logp, batch.old_logp))
    return importance_ratio(logp, old) if ratio == "token" else sequence_ratio(logp, old, batch.mask).expand_as(logp)


# ---------------------------------------------------------------------------------------------------------------------
# The invariants of every objective: (objective, batch, generator), Broken or nothing.
# ---------------------------------------------------------------------------------------------------------------------


def contract(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """returns (scalar loss, detached scalar metrics)"""
    out = f(leaf(batch.logp), batch.old_logp, batch.adv, batch.mask, batch.weights, ref_logp=batch.ref_logp,
            entropy=batch.entropy)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
        raise Broken(f"it returned {type(out).__name__}, expected a pair (loss, metrics)")
    loss, metrics = out
    if not (isinstance(loss, Tensor) and loss.shape == ()):
        raise Broken(f"the loss has shape {list(getattr(loss, 'shape', '?'))}, expected a scalar")
    if not loss.requires_grad:
        raise Broken("the loss has no gradient: something detaches it from logp")
    if loss.dtype != torch.float64:
        raise Broken(f"float64 goes in and {loss.dtype} comes out: something casts")
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.shape != () or value.requires_grad:
            raise Broken(f"the metric {name!r} is not a detached scalar tensor")


def poison(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """what is masked reaches neither loss nor metrics nor gradients, even nan and inf"""
    clean = call(f, batch)
    for value in (torch.nan, torch.inf, -torch.inf):
        dirty = replace(batch, **{name: getattr(batch, name).masked_fill(~batch.mask, value) for name in NOISY})
        found = call(f, dirty)
        where = f"{value} in log-probs and entropies where the mask is False ({words(batch)})"
        if not torch.equal(found.loss, clean.loss):
            raise Broken(f"{where} turns the loss from {clean.loss:.3g} into {found.loss:.3g}")
        for name in clean.metrics:
            if not torch.equal(found.metrics[name], clean.metrics[name]):
                raise Broken(f"{where} turns {name} from {clean.metrics[name]:.3g} into {found.metrics[name]:.3g}")
        for name in ("logp", "entropy"):
            g = getattr(found, name)
            if not torch.equal(g, getattr(clean, name)) or (g[~batch.mask] != 0).any():
                raise Broken(f"{where} changes the gradient in {name}: {numbers(g)}, expected "
                             f"{numbers(getattr(clean, name).masked_fill(~batch.mask, 0.0))}")


def padding(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """columns of padding change nothing"""
    def widen(x: Tensor, fill: float) -> Tensor:
        return torch.cat((x, x.new_full((len(x), 2), fill)), dim=1)

    wider = replace(batch, **{name: widen(getattr(batch, name), 1.0) for name in NOISY},
                    mask=widen(batch.mask, False), weights=widen(batch.weights, 0.0))
    narrow, wide = call(f, batch), call(f, wider)
    if not close(wide.loss, narrow.loss):
        raise Broken(f"two columns of padding turn the loss from {narrow.loss:.3g} into {wide.loss:.3g} ({words(batch)})")
    if not close(wide.logp[:, :-2], narrow.logp):
        raise Broken(f"two columns of padding change the gradient from {numbers(narrow.logp)} into "
                     f"{numbers(wide.logp[:, :-2])} ({words(batch)})")
    for name, value in narrow.metrics.items():
        if not close(wide.metrics[name], value):
            raise Broken(f"two columns of padding turn {name} from {value:.3g} into {wide.metrics[name]:.3g} ({words(batch)})")


def purity(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """it writes into no argument, and gives the same answer twice"""
    inputs = {name: leaf(getattr(batch, name)) if name in ("logp", "entropy") else getattr(batch, name).clone()
              for name in ("logp", "old_logp", "adv", "mask", "weights", "ref_logp", "entropy")}
    before = {name: (x.detach().clone(), x._version) for name, x in inputs.items()}
    losses = []
    for _ in range(2):
        try:
            loss, _ = f(*(inputs[name] for name in ("logp", "old_logp", "adv", "mask", "weights")),
                        ref_logp=inputs["ref_logp"], entropy=inputs["entropy"])
        except RuntimeError as e:
            raise Broken(f"called as a script calls it, it fails: {str(e).splitlines()[0]}") from None
        losses.append(loss.detach())
        for name, (value, version) in before.items():
            if inputs[name]._version != version or not torch.equal(inputs[name].detach(), value):
                raise Broken(f"it writes into {name}")
    if not torch.equal(*losses):
        raise Broken(f"the same batch has the loss {losses[0]:.6g} and then {losses[1]:.6g}")


def micro_batches(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """losses, gradients and metrics of any micro-batches add up to the whole step's"""
    whole, parts = call(f, batch), partition(generator, len(batch.mask))
    results = [call(f, batch.rows(rows)) for rows in parts]
    cut = f"cut into micro-batches of {', '.join(str(len(rows)) for rows in parts)} ({words(batch)})"
    total = sum(part.loss for part in results)
    if not close(total, whole.loss):
        raise Broken(f"{cut}, the losses add up to {total:.3g} and the step's is {whole.loss:.3g}")
    for name in ("logp", "entropy"):
        for rows, part in zip(parts, results, strict=True):
            if not close(getattr(part, name), getattr(whole, name)[rows]):
                raise Broken(f"{cut}, the gradient in {name} is {numbers(getattr(part, name))} where the step's is "
                             f"{numbers(getattr(whole, name)[rows])}")
    for name, value in whole.metrics.items():
        values = torch.stack([torch.as_tensor(part.metrics[name]) for part in results])
        merged = values.max() if name.endswith("_max") else values.min() if name.endswith("_min") else values.sum()
        if not close(merged, value):
            raise Broken(f"{cut}, {name} comes to {merged:.3g} and the step's is {value:.3g}")


def permutation(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """the order of the answers does not matter"""
    order = torch.randperm(len(batch.mask), generator=generator)
    straight, shuffled = call(f, batch), call(f, batch.rows(order))
    if not close(shuffled.loss, straight.loss) or not close(shuffled.logp, straight.logp[order]):
        raise Broken(f"answers in the order {order.tolist()} have the loss {shuffled.loss:.3g}, in their own order "
                     f"{straight.loss:.3g}; gradients {numbers(shuffled.logp)} and {numbers(straight.logp[order])}")


def reinforce(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """at ratio 1 the gradient is REINFORCE's, -weight A at each token"""
    batch = batch.on_policy()
    expect_gradient(batch, call(f, batch).logp, -batch.weights * batch.adv, torch.ones_like(batch.logp))


def direction(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """a small step makes good answers likelier: sum weight A logp rises"""
    z = leaf(randn(generator, *batch.mask.shape, 3))
    ids = torch.randint(3, batch.mask.shape, generator=generator)
    scale = (batch.weights * batch.adv).abs().sum()
    if scale == 0:
        return
    logp = selective_log_softmax(z, ids)
    at = replace(batch, old_logp=logp.detach(), ref_logp=logp.detach())
    loss, _ = f(logp, at.old_logp, at.adv, at.mask, at.weights, ref_logp=at.ref_logp, entropy=at.entropy)
    (g,) = torch.autograd.grad(loss, z)
    before, after = ((batch.weights * batch.adv * selective_log_softmax(x, ids)).sum() for x in (z, z - 1e-3 / scale * g))
    if not after > before:
        raise Broken(f"a small step down the loss moves sum weight A logp by {float((after - before).detach()):.3g}, expected "
                     f"a rise ({words(batch)})")


def no_advantage(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """answers with A = 0 have no gradient, exactly"""
    g = call(f, replace(batch, adv=torch.zeros_like(batch.adv), ref_logp=batch.logp)).logp
    if (g != 0).any():
        raise Broken(f"with A = 0 everywhere dL/dlogp is {numbers(g[g != 0])} ({words(batch)})")


def slope(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """the gradient is the loss's slope (gradcheck in float64)"""
    def loss(logp: Tensor) -> Tensor:
        return f(logp, batch.old_logp, batch.adv, batch.mask, batch.weights, ref_logp=batch.ref_logp, entropy=batch.entropy)[0]

    if not torch.autograd.gradcheck(loss, leaf(batch.logp), eps=1e-7, atol=1e-4, rtol=1e-3, raise_exception=False):
        raise Broken(f"dL/dlogp is not the slope of the loss ({words(batch)}); a weight with a stop-gradient? Then say "
                     "detached_weight=True")


def weighted_score(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """with a detached weight, L = -sum w c A logp with 0 <= c <= ratio, and nothing flows through c"""
    batch = replace(batch, ref_logp=batch.logp)
    found, rho = call(f, batch), importance_ratio(batch.logp, batch.old_logp)
    if not close(found.loss, (found.logp * batch.logp).sum(), 1e-7):
        raise Broken(f"the loss is {found.loss:.3g}, but sum dL/dlogp logp is {(found.logp * batch.logp).sum():.3g}: something "
                     f"else than the log-probs has a gradient ({words(batch)})")
    there = batch.mask & (batch.weights * batch.adv != 0)
    c = (-found.logp / (batch.weights * batch.adv))[there]
    if ((c < 0) | (c > rho[there] * (1 + 1e-9))).any():
        raise Broken(f"the weights are {numbers(c)} at ratios {numbers(rho[there])}, expected each between 0 and its ratio")


def flat_region(f: Callable, batch: Batch, generator: torch.Generator, clip: tuple[float, float], ratio: str) -> None:
    """the gradient is 0 exactly where the ratio has left the band in A's favour, elsewhere -weight ratio A"""
    rho, (low, high) = ratio_of(batch, ratio), clip
    flat = ((batch.adv > 0) & (rho > 1 + high)) | ((batch.adv < 0) & (rho < 1 - low))
    expected = (-batch.weights * rho * batch.adv).masked_fill(flat, 0.0)
    expect_gradient(batch, call(f, replace(batch, ref_logp=batch.logp)).logp, expected, rho)


def pessimism(f: Callable, batch: Batch, generator: torch.Generator, clip: tuple[float, float], ratio: str) -> None:
    """the loss is never below the unclipped one, -sum weight ratio A"""
    unclipped = -(batch.weights * ratio_of(batch, ratio) * batch.adv).sum()
    loss = call(f, replace(batch, ref_logp=batch.logp)).loss
    if loss < unclipped - 1e-9 * (1 + unclipped.abs()):
        raise Broken(f"the loss is {loss:.3g} and without clipping it would be {unclipped:.3g} ({words(batch)})")


def entropy_term(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """the entropy bonus weighs tokens as the rest of the loss does: dL/dentropy = -c weight, c > 0"""
    g, w = call(f, batch).entropy, batch.weights
    if not w.any():
        return
    c = float(-(g * w).sum() / w.square().sum())
    if c <= 0 or not close(g, -c * w):
        raise Broken(f"dL/dentropy is {numbers(g[batch.mask])} at weights {numbers(w[batch.mask])}, expected -c of them")


# ---------------------------------------------------------------------------------------------------------------------
# The invariants of an advantage: (advantage, rewards [P, G], generator)
# ---------------------------------------------------------------------------------------------------------------------


def same_rewards(advantage: Callable, r: Tensor, generator: torch.Generator) -> None:
    """groups without contrast get 0"""
    a = advantage(r[:, :1].expand(r.shape).clone())
    if (a.abs() > 1e-6).any():
        raise Broken(f"{r.shape[1]} rewards of {r[0, 0]:.3g} each get {numbers(a[0])}")


def shifted_rewards(advantage: Callable, r: Tensor, generator: torch.Generator) -> None:
    """adding a constant to a group's rewards changes nothing"""
    a, shifted = advantage(r), advantage(r + 3.0)
    if not close(shifted, a, 1e-4):
        raise Broken(f"rewards {numbers(r[0])} get {numbers(a[0])}, and with 3 added {numbers(shifted[0])}")


def scaled_rewards(advantage: Callable, r: Tensor, generator: torch.Generator) -> None:
    """doubling large rewards doubles the advantages, or leaves them"""
    r = 1000.0 * r                      # large, so that a z-score's eps does not count
    a, doubled = advantage(r), advantage(2.0 * r)
    if not (close(doubled, 2 * a, 1e-4) or close(doubled, a, 1e-4)):
        raise Broken(f"rewards {numbers(r[0])} get {numbers(a[0])}, and doubled {numbers(doubled[0])}")


def reordered_rewards(advantage: Callable, r: Tensor, generator: torch.Generator) -> None:
    """reordering a group reorders its advantages"""
    order = torch.randperm(r.shape[1], generator=generator)
    if not close(advantage(r[:, order]), advantage(r)[:, order], 1e-5):
        raise Broken(f"rewards {numbers(r[0])} get {numbers(advantage(r)[0])}, in the order {order.tolist()} "
                     f"{numbers(advantage(r[:, order])[0])}")


OBJECTIVE = (contract, poison, padding, purity, micro_batches, permutation, reinforce, direction, no_advantage, slope,
             weighted_score, flat_region, pessimism, entropy_term)
ADVANTAGE = (same_rewards, shifted_rewards, scaled_rewards, reordered_rewards)


# ---------------------------------------------------------------------------------------------------------------------
# What an algorithm is free to do, measured exactly instead of judged
# ---------------------------------------------------------------------------------------------------------------------


def advantage_bias(advantage: Callable, G: int = 3) -> str:
    """How E[1/G sum_i A_i grad log pi(y_i)], one group at a time, relates to grad E[r], on a bandit with three arms."""
    pi, r = torch.tensor([[0.0, 0.5, 1.0]]).double().requires_grad_(), torch.tensor([0.0, 0.1, 1.0]).double()
    groups = sequences(3, G)                                                                # [3^G, G]
    logp, adv = log_probs(pi).squeeze(-1)[groups], torch.cat([advantage(r[group][None]) for group in groups])
    ours = torch.autograd.grad((logp.sum(-1).exp().detach() * (adv * logp).mean(-1)).sum(), pi)[0]
    factors = (ours / reward_gradient(pi, r)).flatten()
    if close(factors, factors.mean().expand_as(factors), 1e-6):
        c = float(factors.mean())
        why = ", unbiased" if abs(c - 1) < 1e-6 else f" = (G-1)/G at G = {G}" if abs(c - (G - 1) / G) < 1e-6 else ""
        return f"advantage: the expected gradient is {c:.4f} of the true one{why}"
    return (f"advantage: the expected gradient is not proportional to the true one; on a bandit with three arms its components "
            f"are {numbers(factors)} of it (G = {G})")


def length_bias(f: Callable, how: str) -> str:
    """How the expected gradient under these weights relates to the true one, where answers end after one token or two."""
    pi, r = torch.zeros(3, 2).double(), torch.tensor([0.0, 0.0, 1.0, 0.5]).double()
    mask = torch.tensor([[True, False], [True, False], [True, True], [True, True]])         # token 0 ends an answer
    table, total = leaf(pi), 0.0
    logp = log_probs(table)
    pairs = sequences(4, 2)
    for pair in pairs:
        w = token_weights(mask[pair], torch.zeros(2, dtype=torch.int64), how, max_new_tokens=2).double()
        adv = (r[pair] - r[pair].flip(0))[:, None]                                          # each against the other
        loss, _ = f(logp[pair], logp[pair].detach(), adv, mask[pair], w, ref_logp=logp[pair].detach(),
                    entropy=torch.zeros_like(logp[pair]).detach())
        total = total + loss / len(pairs)
    factors = (-torch.autograd.grad(total, table)[0] / reward_gradient(pi, r))[[0, 2], 0]
    return (f"aggregate {how}: where answers end after one token or two, the expected gradient is {factors[0]:.3f} of the true "
            f"one at the first token and {factors[1]:.3f} at the second" + (
            "" if close(*factors, 1e-6) else ": answers' lengths change its direction"))


def divergence(f: Callable) -> str:
    """Which divergence the KL term's gradient follows, by enumeration; Broken when it is none."""
    g = torch.Generator().manual_seed(0)
    pi, ref = leaf(randn(g, num_prefixes(3, 2), 3)), randn(g, num_prefixes(3, 2), 3)
    logp, ref_logp = log_probs(pi), log_probs(ref)
    mask, adv = torch.ones(logp.shape, dtype=torch.bool), torch.zeros(len(logp), 1).double()
    prob = sequence_probs(pi.detach())[:, None].expand(logp.shape)
    loss, _ = f(logp, logp.detach(), adv, mask, prob, ref_logp=ref_logp, entropy=torch.zeros_like(ref_logp))
    found = torch.autograd.grad(loss, pi, retain_graph=True)[0]
    size = found.norm()
    x = leaf(pi)
    candidates = {"KL(pi || ref), each prefix held fixed": fixed_prefix_kl(x, x, ref),
                  "KL(ref || pi), each prefix held fixed": fixed_prefix_kl(x, ref, x),
                  "KL(pi || ref) of whole answers": expectation(x, (log_probs(x) - ref_logp).sum(-1))}
    for name, value in candidates.items():
        exact = torch.autograd.grad(value, x, retain_graph=True)[0]
        c = float((found * exact).sum() / exact.square().sum())
        if c > 0 and close(found / size, c * exact / size, 1e-6):
            return f"KL term: its expected gradient is {c:.4g} times that of {name}"
    raise Broken("the expected gradient of the term with ref_logp is that of no KL divergence: it pulls towards something else "
                 "than the reference")


# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    held: dict[str, str] = field(default_factory=dict)      # invariant -> what it says
    broken: dict[str, str] = field(default_factory=dict)    # invariant -> the smallest counterexample
    skipped: dict[str, str] = field(default_factory=dict)   # invariant -> why
    notes: list[str] = field(default_factory=list)          # what the algorithm is free to do, measured

    def __str__(self) -> str:
        says = {i.__name__: i.__doc__ for i in OBJECTIVE + ADVANTAGE} | {"divergence": "the KL term follows a divergence"}
        return "\n".join([*(f"holds    {name}: {what}" for name, what in self.held.items()),
                          *(f"skipped  {name}: {why}" for name, why in self.skipped.items()),
                          *(f"note     {note}" for note in self.notes),
                          *(f"BROKEN   {name}: {says[name]}\n         {what}" for name, what in self.broken.items())])


class BrokenObjective(AssertionError):
    """The report of an objective of which not every invariant holds."""

    def __init__(self, report: Report):
        super().__init__(f"{len(report.broken)} invariant{'s' * (len(report.broken) > 1)} broken\n{report}")
        self.report = report


def smaller(case: Batch | Tensor) -> Iterator[Batch | Tensor]:
    """The case without one of its answers, and without one of its positions; rewards without a group, or a sample."""
    rows, columns = case.mask.shape if isinstance(case, Batch) else case.shape
    for b in range(rows if rows > 1 else 0):
        keep = torch.arange(rows) != b
        yield case.rows(keep) if isinstance(case, Batch) else case[keep]
    for t in range(columns if columns > (1 if isinstance(case, Batch) else 2) else 0):
        keep = torch.arange(columns) != t
        wide = (*NOISY, "mask", "weights")
        yield (replace(case, **{name: getattr(case, name)[:, keep] for name in wide}) if isinstance(case, Batch)
               else case[:, keep])


def counterexample(invariant: Callable, cases: st.SearchStrategy, examples: int) -> str | None:
    """None when the invariant holds for all drawn cases; else the words for the smallest case found that breaks it."""
    def breaks(case, seed: int) -> str | None:
        try:
            invariant(case, torch.Generator().manual_seed(seed))
        except Broken as e:
            return str(e)
        except Exception as e:
            return f"{type(e).__name__}: {(str(e) or 'no message').splitlines()[0]}"
        return None

    broken = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(cases, st.integers(0, 2**32 - 1))
    def run(case, seed):
        if breaks(case, seed) is not None:
            broken.append((case, seed))

    run()
    if not broken:
        return None
    case, seed = broken[0]
    while (less := next((c for c in smaller(case) if breaks(c, seed) is not None), None)) is not None:
        case = less
    return breaks(case, seed)


def check_objective(f: Callable, advantage: Callable | None = None, clip: tuple[float, float] | None = None,
                    detached_weight: bool = False, *, ratio: str = "token", aggregate: str | None = None,
                    examples: int = 50) -> Report:
    """Hold an objective against every invariant that its arguments make meaningful.

    advantage         rewards [P, G] -> [P, G], to be checked too
    clip              (low, high) when the ratio is clipped to 1 - low .. 1 + high
    detached_weight   True when the ratio is a weight without a gradient of its own
    ratio             "token" or, with clip, "sequence" where an answer has one ratio
    aggregate         how its weights are made (token_weights): what that does to the expected gradient is noted

    Returns the report when everything holds; raises BrokenObjective, an AssertionError with the report, when not.
    """
    if detached_weight and ratio == "sequence":
        raise ValueError("check_objective: detached_weight with ratio='sequence'; a detached weight is checked token by token")
    report = Report()

    def hold(invariant: Callable, case: st.SearchStrategy, subject: Callable, **options) -> None:
        found = counterexample(functools.partial(invariant, subject, **options), case, examples)
        if found is None:
            report.held[invariant.__name__] = invariant.__doc__
        else:
            report.broken[invariant.__name__] = found

    hold(contract, batches(), f)
    if report.broken:
        raise BrokenObjective(report)
    uses_reference, uses_entropy = (depends_on(f, name) for name in ("ref_logp", "entropy"))
    why = {slope.__name__: "a detached weight has no slope; see weighted_score" if detached_weight else "",
           weighted_score.__name__: "" if detached_weight else "no detached_weight",
           **dict.fromkeys(("flat_region", "pessimism"), "a detached weight leaves every token its gradient" if detached_weight
                           else "" if clip else "no clip"),
           entropy_term.__name__: "" if uses_entropy else "the loss does not look at entropy"}
    if uses_reference:
        kl_off = "the loss has a KL term; hold it against this without one"
        why |= dict.fromkeys(("reinforce", "direction", "no_advantage", "flat_region", "pessimism", "weighted_score"), kl_off)
    if uses_entropy:
        why |= dict.fromkeys(("pessimism", "weighted_score"), "the loss has an entropy term; hold it against this without one")
    for invariant in OBJECTIVE[1:]:
        if why.get(invariant.__name__):
            report.skipped[invariant.__name__] = why[invariant.__name__]
        else:
            clipped = {"clip": clip, "ratio": ratio} if invariant in (flat_region, pessimism) else {}
            hold(invariant, batches(), f, **clipped)

    for invariant in ADVANTAGE:
        if advantage is None:
            report.skipped[invariant.__name__] = "no advantage"
        else:
            hold(invariant, rewards(min_group=2), advantage)
    if advantage is not None and not report.broken:
        report.notes.append(advantage_bias(advantage))
    if aggregate is not None and not uses_reference and not report.broken:
        report.notes.append(length_bias(f, aggregate))
    if uses_reference:
        try:
            report.notes.append(divergence(f))
        except Broken as e:
            report.broken["divergence"] = str(e)
    if report.broken:
        raise BrokenObjective(report)
    return report


def depends_on(f: Callable, name: str) -> bool:
    """Does the loss look at this argument?"""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    logp = -randn(g, 2, 3).abs()
    batch = Batch(logp, logp, logp - 0.5, logp.abs(), randn(g, 2, 1), mask, mask / 6.0, torch.arange(2))
    return not torch.equal(call(f, batch).loss, call(f, replace(batch, **{name: getattr(batch, name) - 0.25})).loss)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def load(where: str) -> Callable:
    """The function NAME of FILE.py, from "FILE.py:NAME"."""
    path, colon, name = where.rpartition(":")
    if not colon or not Path(path).is_file():
        raise ValueError(f"{where}: expected FILE.py:NAME, with a file that exists")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module             # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{where}: {path} has no function {name}")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanorl.checks", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", help="FILE.py:NAME of an objective")
    parser.add_argument("--advantage", help="FILE.py:NAME of an advantage, rewards [P, G] -> [P, G]")
    parser.add_argument("--clip", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the ratio is clipped to 1-LOW .. 1+HIGH")
    parser.add_argument("--ratio", choices=("token", "sequence"), default="token", help="of a token (default), or of an answer")
    parser.add_argument("--detached-weight", action="store_true", help="the ratio is a weight without a gradient of its own")
    parser.add_argument("--aggregate", choices=AGGREGATES, help="how its weights are made")
    parser.add_argument("--examples", type=int, default=50, help="batches per invariant (default: 50)")
    args = parser.parse_args(argv)
    with user_errors():
        f, advantage = load(args.objective), args.advantage and load(args.advantage)
        missing = [name for name in ("ref_logp", "entropy") if name not in inspect.signature(f).parameters]
        if missing:
            raise ValueError(f"{args.objective}: takes no {' and no '.join(missing)}; expected "
                             "objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None)")
    try:
        report = check_objective(f, advantage, args.clip and tuple(args.clip), args.detached_weight, ratio=args.ratio,
                                 aggregate=args.aggregate, examples=args.examples)
    except BrokenObjective as e:
        print(e.report)
        raise SystemExit(1) from None
    print(report)


if __name__ == "__main__":
    main()
