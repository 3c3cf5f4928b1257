"""check_preference_objective: what must hold for every loss of pairs of responses, and what the papers say of theirs.

An invariant is a function of (objective, pairs, generator, ...), as in invariants.py. A loss is the function of a margin,

    f(m),   m = h(chosen, its reference, its length) - h(rejected, its reference, its length)

and what it does to a pair is dL/dchosen < 0 < dL/drejected, a push up and a push down. Most invariants are of one pair alone.
KTO has no margin: what is said of margins is not asked of it.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nanorl.checks import foreign, invariants
from nanorl.checks.cases import Pairs, numbers, pairs
from nanorl.checks.foreign import loss_and_metrics, with_accepted
from nanorl.checks.invariants import close, differentiate, expect
from nanorl.checks.report import Report, check_all, counterexample, random_cases
from nanorl.errors import UserError
from nanorl.ops import bradley_terry

# What each loss of a paper needs to be written down.
NUMBERS = {"dpo": ("beta",), "cdpo": ("beta", "label_noise"), "ipo": ("beta",), "slic": ("delta",), "simpo": ("beta", "gamma"),
           "kto": ("beta",)}


def adapted(f: Callable) -> Callable:
    """An objective of nanorl's contract, from f(chosen, rejected, ref_chosen, ref_rejected).

    f also gets chosen_length, rejected_length and weights, if its signature names them. It returns the loss of all pairs, or of
    each, or a tuple that begins with it.
    """
    def objective(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, weights):
        loss, metrics = loss_and_metrics(f(chosen, rejected, ref_chosen, ref_rejected, **with_accepted(
            f, chosen_length=chosen_length, rejected_length=rejected_length, weights=weights)))
        return ((weights * loss).sum() if isinstance(loss, Tensor) and loss.shape == weights.shape else loss), metrics

    return objective


def paper_loss(pair: Pairs, loss: str, beta: float | None = None, label_noise: float = 0.0, gamma: float = 0.0,
               delta: float = 0.0, nll_coef: float = 0.0) -> Tensor:
    """The loss of each pair, as in the table of train_dpo.py.       -> [N]"""
    c, r, length = pair.chosen, pair.rejected, pair.chosen_length
    if loss == "slic":
        pushed = torch.relu(delta - (c - r))
    elif loss == "simpo":
        pushed = bradley_terry(beta * (c / length - r / pair.rejected_length) - gamma)
    elif loss == "ipo":
        pushed = ((c - pair.ref_chosen) / length - (r - pair.ref_rejected) / pair.rejected_length - 1 / (2 * beta)).square()
    elif loss == "kto":         # at reference point 0
        pushed = 1 - (torch.sigmoid(beta * (c - pair.ref_chosen)) + torch.sigmoid(-beta * (r - pair.ref_rejected))) / 2
    else:
        m = beta * ((c - pair.ref_chosen) - (r - pair.ref_rejected))
        pushed = (1 - label_noise) * bradley_terry(m) + label_noise * bradley_terry(-m)
    return pushed - nll_coef * c / length


def pushes(f: Callable, pair: Pairs) -> tuple[Tensor, Tensor]:
    """(dL/dchosen, dL/drejected)."""
    found = differentiate(f, pair)
    return found["dL/dchosen"], found["dL/drejected"]


def equal_lengths(given: Pairs) -> Pairs:
    """The first pair, as if the rejected response were as long as the chosen one."""
    return given.first(rejected_length=given.chosen_length[:1])


def unchanged(f: Callable, pair: Pairs, change: str, **changed: Tensor) -> None:
    """The pushes are the same after a change, which `change` names."""
    for name, before, after in zip(("chosen", "rejected"), pushes(f, pair), pushes(f, replace(pair, **changed)), strict=True):
        expect(close(before, after, 1e-7), f"{change} turns dL/d{name} from {numbers(before)} into {numbers(after)} ({pair})")


def contract(f: Callable, given: Pairs, generator: torch.Generator) -> None:
    """it returns a loss that depends on the log-probs, of all pairs or of each, alone or before its metrics, detached"""
    invariants.contract(f, given, generator)


def weighted(f: Callable, given: Pairs, generator: torch.Generator) -> None:
    """the loss of a pair is proportional to its weight"""
    pair = given.first()
    whole, less = (differentiate(f, x)["the loss"] for x in (pair, replace(pair, weights=0.25 * pair.weights)))
    expect(close(less, 0.25 * whole), f"a pair with weight 1 costs {whole:.4g}, and with weight 0.25 {less:.4g}")


def upwards(f: Callable, given: Pairs, generator: torch.Generator, absolute: bool = False) -> None:
    """at a tie and below, the chosen response is pushed up and the rejected one down"""
    tie = given.first(rejected=given.chosen[:1], ref_rejected=given.ref_chosen[:1], rejected_length=given.chosen_length[:1])
    if absolute:        # a loss may have a target for each response: at the start of training it is not yet reached
        tie = replace(tie, ref_chosen=tie.chosen, ref_rejected=tie.rejected)
    for pair, where in ((tie, "at a tie"), (replace(tie, chosen=tie.chosen - 40 * tie.chosen_length), "far below a tie")):
        up, down = pushes(f, pair)
        expect(bool(up < 0 < down), f"{where} dL/dchosen is {numbers(up)} and dL/drejected {numbers(down)} ({pair})")


def balance(f: Callable, given: Pairs, generator: torch.Generator) -> None:
    """at equal lengths both are pushed alike, but for a constant push up on the chosen one"""
    pair = equal_lengths(given)
    other = replace(pair, chosen=pair.chosen - 1.0, rejected=pair.rejected + 0.5)
    one, two = (sum(pushes(f, x)) for x in (pair, other))
    expect(close(one, two, 1e-7) and not (one > 1e-7).any(),
           f"dL/dchosen + dL/drejected is {numbers(one)} ({pair}), and {numbers(two)} where the chosen log-prob is 1 lower and "
           "the rejected one 0.5 higher, expected the same, at most 0")


def shift(f: Callable, given: Pairs, generator: torch.Generator) -> None:
    """at equal lengths, adding a constant to both log-probs, or to both references, changes no push"""
    pair = equal_lengths(given)
    unchanged(f, pair, "adding 2 to both references", ref_chosen=pair.ref_chosen + 2, ref_rejected=pair.ref_rejected + 2)
    unchanged(f, pair, "adding 2 to both log-probs", chosen=pair.chosen + 2, rejected=pair.rejected + 2)


def reference(f: Callable, given: Pairs, generator: torch.Generator) -> None:
    """adding a constant to a response's log-prob and to its reference changes no push"""
    pair = given.first()
    for name in ("chosen", "rejected"):
        unchanged(f, pair, f"adding 2 to the {name} log-prob and its reference",
                  **{x: getattr(pair, x) + 2 for x in (name, f"ref_{name}")})


def ignores(f: Callable, given: Pairs, generator: torch.Generator, name: str) -> None:
    """the loss does not depend on an argument (no invariant: it tells whether there is a reference to check)"""
    pair = given.first()
    before, after = (differentiate(f, x)["the loss"] for x in (pair, replace(pair, **{name: getattr(pair, name) + 3})))
    expect(torch.equal(before, after), f"{name} + 3 turns the loss from {before:.4g} into {after:.4g} ({pair})")


def averages(f: Callable, given: Pairs, generator: torch.Generator) -> None:
    """log-probs are divided by the length of their own response (no invariant: an alternative in `lengths`)"""
    pair = given.first()
    up, down = pushes(f, pair)
    for name in ("chosen", "rejected"):
        twice = {x: 2 * getattr(pair, x) for x in (name, f"ref_{name}", f"{name}_length")}
        up2, down2 = pushes(f, replace(pair, **twice))
        expected = (up / 2, down) if name == "chosen" else (up, down / 2)
        expect(close(up2, expected[0], 1e-7) and close(down2, expected[1], 1e-7),
               f"twice the {name} log-prob, reference and length turn dL/dchosen from {numbers(up)} into {numbers(up2)} and "
               f"dL/drejected from {numbers(down)} into {numbers(down2)} ({pair})")


def lengths(f: Callable, given: Pairs, generator: torch.Generator) -> None:
    """either no length matters to the margin, or each log-prob is divided by the length of its own response"""
    pair = given.first()
    down, more, less = (pushes(f, x)[1] for x in (pair, replace(pair, chosen_length=pair.chosen_length + 3),
                                                  replace(pair, rejected_length=pair.rejected_length + 3)))
    if not (close(down, more, 1e-7) and close(down, less, 1e-7)):
        averages(f, given, generator)


def swap(f: Callable, given: Pairs, generator: torch.Generator, uses_reference: bool, symmetric: bool) -> None:
    """exchanging the responses negates the margin: at equal lengths, m = 0 stays, and sigma(m) turns into sigma(-m)"""
    pair = equal_lengths(given)
    level = replace(pair, rejected=pair.chosen + (pair.ref_rejected - pair.ref_chosen if uses_reference else 0.0))
    down = pushes(f, level)[1]
    if symmetric:
        both = pushes(f, pair)[1] + pushes(f, pair.exchanged())[1]
        expect(close(both, 2 * down, 1e-7), f"dL/drejected of a pair and of its exchange add up to {numbers(both)}, expected "
                                            f"twice that of a tie, {numbers(2 * down)} ({pair})")
    back = pushes(f, level.exchanged())[1]
    expect(close(down, back, 1e-7), f"exchanging responses with m = 0 turns dL/drejected from {numbers(down)} into "
                                    f"{numbers(back)} ({level})")


def closed_form(f: Callable, given: Pairs, generator: torch.Generator, **paper) -> None:
    """the loss of a pair and its gradient are the paper's"""
    pair = given.first()
    found, expected = differentiate(f, pair), differentiate(lambda **x: (paper_loss(Pairs(**x), **paper).sum(), {}), pair)
    for name, value in expected.items():
        expect(close(found[name], value, 1e-6), f"{name} is {numbers(found[name])}, expected {numbers(value)} ({pair})")


def optimum(f: Callable, given: Pairs, generator: torch.Generator, **paper) -> None:
    """where a response wins with probability p, the expected loss is least at the paper's margin: DPO's is log p/(1-p)"""
    pair = equal_lengths(given)
    beta, e, p = paper["beta"], paper.get("label_noise", 0.0), 0.1 + 0.8 * torch.rand(1, generator=generator).double()
    log_ratio = ((2 * p - 1) / (2 * beta) * pair.chosen_length if paper["loss"] == "ipo" else
                 torch.logit(p * (1 - e) + (1 - p) * e) / beta)
    pair = replace(pair, chosen=pair.rejected - pair.ref_rejected + pair.ref_chosen + log_ratio)
    up, down = pushes(f, pair)[0], pushes(f, pair.exchanged())[1]
    expect(close(p * up, -(1 - p) * down, 1e-6),
           f"for p = {float(p):.3g} the expected gradient is {numbers(p * up + (1 - p) * down)} there, expected 0")


INVARIANTS = (invariants.purity, foreign.micro_batches, invariants.permutation, weighted, upwards, balance, shift, reference,
              lengths, swap, closed_form, optimum)


def check_preference_objective(f: Callable, loss: str | None = None, *, absolute: bool = False, examples: int = 50,
                               **paper: float) -> Report:
    """Check a loss f(chosen, rejected, ref_chosen, ref_rejected) of pairs of responses, log-probs [N] each.

    It also gets chosen_length, rejected_length and weights, [N], if its signature names them. It returns one loss, or [N].

    loss        "dpo", "cdpo", "ipo", "slic", "simpo" or "kto", if it is meant to be the paper's (the table of train_dpo.py)
    absolute    True if the loss is no function of a margin, but judges each response by itself, as KTO's and BCO's do
    paper       the numbers in it: beta, label_noise, delta, gamma; and nll_coef, if there is such a term
    examples    random cases for each invariant

    Returns the report if nothing is broken; raises BrokenObjective, an AssertionError with the report, if something is.
    """
    if {*paper} - {"nll_coef"} != {*NUMBERS.get(loss, ())} or loss not in (None, *NUMBERS):
        expected = "; ".join(f"{name} with {' and '.join(needs)}" for name, needs in NUMBERS.items())
        raise UserError(f"loss {loss} with {' and '.join(paper) or 'no number'}: expected {expected}; nll_coef with any")
    f, takes_weights, cases = adapted(f), "weights" in with_accepted(f, weights=None), random_cases(pairs(), examples)
    symmetric, absolute = loss in ("dpo", "cdpo", "ipo"), absolute or loss == "kto"

    def holds(invariant: Callable) -> bool:
        return counterexample(partial(invariant, f), cases) is None

    uses_reference = not (holds(partial(ignores, name="ref_chosen")) and holds(partial(ignores, name="ref_rejected")))
    shares = ("",) if takes_weights else ("", "pairs")
    share = foreign.share_of(f, [deepcopy(case) for case, _ in cases], shares)
    reasons = ((not takes_weights, "it makes its weights itself", weighted),
               (not uses_reference, "the loss does not use the reference", reference),
               (loss is None, "no loss of a paper was named", closed_form),
               *((absolute, "it judges each response by itself", x) for x in (balance, shift, swap)),
               (not symmetric or "nll_coef" in paper, "only for dpo, cdpo and ipo, without nll_coef", optimum))
    report = check_all(f, contract, INVARIANTS, cases,
                       {foreign.micro_batches: {"share": shares[-1] if share is None else share},
                        upwards: {"absolute": absolute}, closed_form: paper | {"loss": loss},
                        optimum: paper | {"loss": loss}, swap: {"uses_reference": uses_reference, "symmetric": symmetric}},
                       {invariant: why for applies, why, invariant in reasons if applies})
    if not report.broken:
        report.notes += ["log-probs are " + ("divided by their response's length" if holds(averages) else "of whole responses"),
                         foreign.advice(share)]
    return report.conclude()
