"""Check an objective: which invariants apply to it, which hold, and the smallest counterexample to each that does not."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanorl.checks import foreign, invariants
from nanorl.checks.cases import Batch, OwnBatch, Rows, batches, rewards, smaller_cases
from nanorl.checks.exact import advantage_bias, divergence, length_bias
from nanorl.checks.invariants import ADVANTAGE_INVARIANTS, OBJECTIVE_INVARIANTS, Broken, differentiate, policy_term
from nanorl.errors import UserError
from nanorl.tabular import randn


@dataclass
class Report:
    held: dict[str, str] = field(default_factory=dict)      # invariant -> what it says
    broken: dict[str, str] = field(default_factory=dict)    # invariant -> the smallest counterexample
    skipped: dict[str, str] = field(default_factory=dict)   # invariant -> why, most often that it does not apply
    unchecked: set[str] = field(default_factory=set)        # those of the skipped that may apply, but could not be checked
    notes: list[str] = field(default_factory=list)          # what the algorithm is free to choose, measured
    says: dict[str, str] = field(default_factory=dict)      # invariant -> what it says, whatever became of it

    def record(self, invariant: Callable, found: str | None) -> None:
        """That an invariant holds, or what breaks it."""
        name = invariant.__name__
        self.says[name] = invariant.__doc__
        if found is None:
            self.held[name] = invariant.__doc__
        else:
            self.broken[name] = found

    def conclude(self) -> "Report":
        """Itself, if nothing is broken; else BrokenObjective is raised."""
        if self.broken:
            raise BrokenObjective(self)
        return self

    def __str__(self) -> str:
        counts = {"broken": len(self.broken), "could not be checked": len(self.unchecked),
                  "do not apply": len(self.skipped) - len(self.unchecked)}
        return "\n".join([*(f"holds    {name}: {what}" for name, what in self.held.items()),
                          *(f"{'UNCHECKED' if name in self.unchecked else 'skipped '} {name}: {why}"
                            for name, why in self.skipped.items()),
                          *(f"note     {note}" for note in self.notes),
                          *(f"BROKEN   {name}: {self.says[name]}\n         {what}" for name, what in self.broken.items()),
                          ", ".join([f"{len(self.held)} hold", *(f"{n} {what}" for what, n in counts.items() if n)])])


class BrokenObjective(AssertionError):
    """At least one invariant does not hold; carries the report."""

    def __init__(self, report: Report):
        super().__init__(f"{len(report.broken)} invariant{'s' * (len(report.broken) > 1)} broken\n{report}")
        self.report = report


def random_cases(strategy: st.SearchStrategy, examples: int) -> list[tuple[Rows | Tensor, int]]:
    """This many cases, each with a seed; the same at every call."""
    found = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy, st.integers(0, 2**32 - 1))
    def draw(case, seed):
        found.append((case, seed))

    draw()
    return found


def counterexample(invariant: Callable, cases: list[tuple[Rows | Tensor, int]]) -> str | None:
    """None if the invariant holds in all cases, else what breaks it in the smallest case found."""
    def breaks(case, seed: int) -> str | None:
        try:
            invariant(deepcopy(case), torch.Generator().manual_seed(seed))      # a copy: the objective may write into it
        except Broken as e:
            return str(e)
        except Exception as e:
            return f"{type(e).__name__}: {(str(e) or 'no message').splitlines()[0]}"
        return None

    first = next(((case, seed) for case, seed in cases if breaks(case, seed) is not None), None)
    if first is None:
        return None
    case, seed = first
    while (smaller := next((c for c in smaller_cases(case) if breaks(c, seed) is not None), None)) is not None:
        case = smaller
    return breaks(case, seed)


def depends_on(f: Callable, name: str) -> bool:
    """Whether the loss or its gradient depends on this argument."""
    g = torch.Generator().manual_seed(0)
    mask, logp = torch.ones(2, 3, dtype=torch.bool), -randn(g, 2, 3).abs()
    batch = Batch(logp=logp, old_logp=logp, adv=randn(g, 2, 1), mask=mask, weights=mask / 6.0, ref_logp=logp - 0.5,
                  entropy=logp.abs())
    before, after = (differentiate(f, b) for b in (batch, replace(batch, **{name: getattr(batch, name) - 0.25})))
    return not all(torch.equal(before[what], after[what]) for what in ("the loss", "dL/dlogp", "dL/dentropy"))


def check_all(f: Callable, contract: Callable, table: tuple[Callable, ...], cases: list, options: dict[Callable, dict],
              skipped: dict[Callable, str]) -> Report:
    """What a table of invariants says of f, except those that are skipped; nothing can be said if it breaks the contract."""
    report = Report(skipped={invariant.__name__: why for invariant, why in skipped.items()})
    for invariant in (contract, *table):
        if contract.__name__ not in report.broken and invariant not in skipped:
            report.record(invariant, counterexample(partial(invariant, f, **options.get(invariant, {})), cases))
    if contract.__name__ in report.broken:
        report.notes.append("nothing else can be checked")
    return report


def reasons_to_skip(clip: tuple[float, float] | None, bounded: bool, detached_weight: bool, uses_entropy: bool,
                    advantage: Callable | None) -> dict[Callable, str]:
    """The invariants that are not checked for such an objective, and why; of several reasons the last."""
    i = invariants
    reasons = ((clip is None, "no clip range was given", (i.flat_region, i.pessimism)),
               (bounded, "some ratios take a token's gradient away, but no clip range was given; if it is a clip, say "
                         "clip=(low, high) (--clip LOW HIGH)", (i.flat_region, i.pessimism)),
               (detached_weight, "a detached weight leaves every token its gradient; its cap is not checked",
                (i.flat_region, i.pessimism)),
               (detached_weight, "the loss has no slope in a detached weight; see weighted_score", (i.slope,)),
               (not detached_weight, "only for a detached weight", (i.weighted_score,)),
               (not uses_entropy, "the loss does not use entropy", (i.entropy_term,)),
               (advantage is None, "no advantage was given", ADVANTAGE_INVARIANTS))
    return {invariant: why for applies, why, skipped in reasons if applies for invariant in skipped}


def account_for_weights(report: Report, f: Callable, find: Callable, cases: list[OwnBatch], aggregate: str | None) -> None:
    """What is to be said of an objective that makes its weights itself; `find` finds counterexamples."""
    share = whole = foreign.share_of(f, cases)
    if whole is None:
        share = foreign.share_of(policy_term(f), cases)
    report.record(foreign.micro_batches, find(foreign.micro_batches, share=share or "") if whole is None else None)
    weights = [(batch, foreign.own_weights(f, batch)) for batch in cases]
    report.notes += foreign.describe_weights(f, weights)
    if share is not None:
        report.notes.append(foreign.advice(share) + (", apart from terms such as KL and entropy" if whole is None else ""))
    for invariant, why in foreign.STRICTER.items():
        if invariant.__name__ in report.held and find(invariant) is not None:
            report.notes.append(f"{invariant.__name__}: {why}")
    if aggregate is not None:
        scale = foreign.constant_scale(weights) if aggregate == "constant" else 1.0
        report.record(foreign.aggregation, find(foreign.aggregation, how=aggregate, scale=scale))


def check_objective(f: Callable, advantage: Callable | None = None, clip: tuple[float, float] | None = None,
                    detached_weight: bool = False, *, ratio: str = "token", aggregate: str | None = None,
                    aggregates: str = "given", adv_shape: str | None = None, maximise: bool = False,
                    examples: int = 50) -> Report:
    """Check an objective with every invariant that applies to it.

    advantage         rewards [P, G] -> [P, G], to be checked too
    clip              (low, high) if the ratio is clipped to 1 - low .. 1 + high
    detached_weight   True if the ratio is a weight without a gradient of its own
    ratio             what is clipped or detached: "token" or, if each answer has one ratio or weight, "sequence"
    aggregate         how its token weights are made (ops.token_weights); the report notes how they change the expected gradient
    aggregates        "own" if f(logp, old_logp, adv, mask) makes its token weights itself; that they are those of `aggregate`
                      is then checked. It also gets ref_logp, entropy and prompt_index [B], if its signature names them
    adv_shape         "B1" if adv is [B, 1] (the default), "BT" if it is [B, T], a number for each token; own: also "B", [B]
    maximise          own: True if f returns what is to be maximised
    examples          random cases for each invariant

    Returns the report if nothing is broken, its `unchecked` empty if all that applies holds; raises BrokenObjective, an
    AssertionError with the report, if something is.
    """
    own = aggregates == "own"
    if aggregates not in ("given", "own") or adv_shape not in (None, *foreign.ADV_SHAPES):
        raise UserError(f"aggregates={aggregates!r}, adv_shape={adv_shape!r}: expected 'given' or 'own', and 'B1', 'B' or 'BT'")
    if not own and (adv_shape == "B" or maximise):
        raise UserError(f"{'maximise' if maximise else 'adv_shape B'}: requires aggregates='own' (--aggregates own)")
    f, empty = (foreign.adapted(f, adv_shape or "B1", maximise) if own else f), True
    report = Report()
    batch_cases = random_cases(batches(own=own, adv_of_tokens=adv_shape == "BT" and ratio == "token"), examples)
    reward_cases = [] if advantage is None else random_cases(rewards(min_group=2), examples)

    def find(invariant: Callable, **options) -> str | None:
        subject, cases = (advantage, reward_cases) if invariant in ADVANTAGE_INVARIANTS else (f, batch_cases)
        if invariant in (invariants.flat_region, invariants.pessimism):
            options = {"clip": clip, "ratio": ratio}
        if invariant is invariants.weighted_score:
            options = {"ratio": ratio}
        if own and invariant in (invariants.padding, invariants.permutation):
            options = {"same": foreign.close}
        if own and subject is f:
            invariant = foreign.with_own_weights(invariant, empty)
        return counterexample(partial(invariant, subject, **options), cases)

    report.record(*((foreign.contract, counterexample(partial(foreign.contract, f), batch_cases)) if own
                    else (invariants.contract, find(invariants.contract))))
    if report.broken:
        report.notes.append("nothing else can be checked")
        raise BrokenObjective(report)
    if own:
        report.record(foreign.empty_answers, counterexample(partial(foreign.empty_answers, f), batch_cases))
        empty = not report.broken
    bounded = clip is None and find(invariants.unbounded) is not None
    skip = reasons_to_skip(clip, bounded, detached_weight, depends_on(f, "entropy"), advantage)
    report.skipped = {invariant.__name__: why for invariant, why in skip.items()}
    if (bounded and not detached_weight) or (detached_weight and clip is not None):
        report.unchecked = {"flat_region", "pessimism"}
    for invariant in (*OBJECTIVE_INVARIANTS[1:], *ADVANTAGE_INVARIANTS):
        if invariant not in skip and not (own and invariant is invariants.micro_batches):
            invariant = foreign.INSTEAD.get(invariant, invariant) if own else invariant
            report.record(invariant, find(invariant))
    if own and "reinforce" in report.broken and not maximise:
        report.notes.append("if it returns what is to be maximised, say maximise=True (--maximise)")
    if own:
        cases = [deepcopy(x) if empty else x.rows(x.mask.any(-1)) for x, _ in batch_cases if x.mask.any()]
        account_for_weights(report, f, find, cases, aggregate)
    if advantage is not None and not report.broken:
        report.notes.append(advantage_bias(advantage))
    if (own or aggregate is not None) and not report.broken:
        report.notes.append(length_bias(f, None if own else aggregate))
    if depends_on(f, "ref_logp"):
        try:
            report.notes.append(divergence(foreign.each_answer(f) if own else f))
        except Broken as e:
            report.record(divergence, str(e))
    return report.conclude()
