"""Objectives of other people's contracts, which make the weights of their tokens themselves.

The weights are read off the gradient, so that everything else can be checked with them, and held to account: which aggregate
is it, what do they depend on, and how must a trainer scale the loss of a micro-batch?
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nanorl.checks import invariants
from nanorl.checks.cases import Batch, OwnBatch, Rows, numbers, partition
from nanorl.checks.invariants import Broken, change_gradients, differentiate, expect, expect_same
from nanorl.ops import AGGREGATES, token_weights

close = functools.partial(invariants.close, tol=1e-6)       # their weights may be float32, as those of int / int are
ADV_SHAPES = ("B1", "B", "BT")


def with_accepted(f: Callable, **offered) -> dict:
    """Those of the keywords that the signature of f names."""
    try:
        parameters = inspect.signature(f).parameters
    except ValueError:                          # written in C
        return {}
    return {name: x for name, x in offered.items() if name in parameters}


def loss_and_metrics(out: object) -> tuple[object, dict[str, Tensor]]:
    """The loss, alone or first of a tuple, and what else there is of scalar tensors: a dict, or the rest of the tuple."""
    loss, *more = out if isinstance(out, tuple | list) and out else (out,)
    metrics = more[0] if more and isinstance(more[0], dict) else {f"number {n}": x for n, x in enumerate(more, 2)}
    return loss, {name: x for name, x in metrics.items() if isinstance(x, Tensor) and x.dim() == 0}


def adapted(f: Callable, adv_shape: str = "B1", maximise: bool = False) -> Callable:
    """An objective of nanorl's contract that ignores its weights, from f(logp, old_logp, adv, mask), which makes its own.

    f also gets ref_logp, entropy and prompt_index, if its signature names them.
    """
    def objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None, prompt_index=None):
        adv = adv.squeeze(-1) if adv_shape == "B" else adv.expand(logp.shape) if adv_shape == "BT" else adv
        prompt_index = torch.zeros(len(mask), dtype=torch.int64) if prompt_index is None else prompt_index
        loss, metrics = loss_and_metrics(f(logp, old_logp, adv, mask, **with_accepted(
            f, weights=None, ref_logp=ref_logp, entropy=entropy, prompt_index=prompt_index)))
        return (-loss if maximise else loss), metrics

    return objective


def own_weights(f: Callable, batch: Batch) -> Tensor:
    """How much each token counts: at ratio 1, half of dL/dlogp at A = -1 less that at A = 1.       -> [B, T]

    Terms that do not depend on A, such as KL and entropy, drop out. The size alone: that the sign is right, `reinforce` checks.
    """
    on_policy = batch.on_policy()
    down, up = (differentiate(f, replace(on_policy, adv=torch.full_like(batch.adv, a)))["dL/dlogp"] for a in (-1.0, 1.0))
    return ((down - up) / 2).abs().masked_fill(~batch.mask, 0.0)


def with_own_weights(invariant: Callable, empty: bool = True) -> Callable:
    """The invariant, with the weights of each batch read off; without its empty answers, if the loss cannot have them."""
    @functools.wraps(invariant)
    def checked(f: Callable, batch: Batch, generator: torch.Generator, **options) -> None:
        batch = batch if empty else batch.rows(batch.mask.any(-1))
        if len(batch):
            weights = own_weights(f, batch)
            expect(invariant is not invariants.reinforce or bool(weights.any() or not batch.mask.any()),
                   f"at ratio 1 no token has a gradient ({batch})")
            invariant(f, replace(batch, weights=weights), generator, **options)

    return checked


def each_answer(f: Callable) -> Callable:
    """An objective that takes weights, the same for all tokens of an answer: f of each answer alone, times its weight."""
    def objective(logp, old_logp, adv, mask, weights, **more):
        losses = [f(logp[b], old_logp[b], adv[b], mask[b], weights[b], **{name: x[b] for name, x in more.items()})[0]
                  for b in torch.arange(len(mask)).split(1)]
        return (weights[:, 0] * torch.stack(losses)).sum(), {}

    return objective


# ---- The invariants that are different, or added ----


def contract(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """it returns a scalar loss that depends on logp, alone or before its metrics, which are detached"""
    invariants.contract(f, batch, generator)


def poison(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """masked positions affect neither loss nor metrics nor gradients, whatever finite numbers they hold"""
    invariants.poison(f, batch, generator, values=(1.0, -3.0))


def entropy_term(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """the entropy bonus raises the entropy of tokens that count and of no others: dL/dentropy is never above 0"""
    g = differentiate(f, batch)["dL/dentropy"]
    expect(not (g > 0).any() and not g[~batch.mask].any() and bool(g.any() or not batch.mask.any()),
           f"dL/dentropy is {numbers(g)}, expected less than 0 where the mask is True, else 0 ({batch})")


INSTEAD = {invariants.poison: poison, invariants.entropy_term: entropy_term}
# What to say where the invariant itself does not hold.
STRICTER = {invariants.poison: "padding is multiplied by 0, not blanked, and so nan and inf spread. It matters where the "
                               "log-prob of padding can be -inf or nan, or its ratio can overflow",
            invariants.entropy_term: "the entropy bonus weighs tokens otherwise than the rest of the loss does"}


def empty_answers(f: Callable, batch: Batch, generator: torch.Generator) -> None:
    """an answer without a token that counts leaves the loss and its gradient finite"""
    for name, x in differentiate(f, batch).items():
        expect(bool(x.isfinite().all()), f"{name} is {numbers(x[~x.isfinite()])} ({batch})")


# What a trainer may have to scale the loss of a micro-batch by: its share of the step's ...
SHARES = {"": lambda batch: 1,
          "answers": len, "pairs": len,
          "answers with a token that counts": lambda batch: int(batch.mask.any(-1).sum()),
          "tokens that count": lambda batch: int(batch.mask.sum()),
          "prompts": lambda batch: len(batch.prompt_index[batch.mask.any(-1)].unique())}


def micro_batches(f: Callable, batch: Rows, generator: torch.Generator, share: str) -> None:
    """losses and gradients of micro-batches, each scaled by its share of the step, add up to those of the whole step"""
    count, parts = SHARES[share], partition(generator, len(batch))
    if share == "prompts":              # whose answers stay together
        prompts, index = batch.prompt_index.unique(return_inverse=True)
        parts = [torch.isin(index, some).nonzero().squeeze(-1) for some in partition(generator, len(prompts))]
    whole, names = differentiate(f, batch), ("the loss", *(f"dL/d{name}" for name in batch.leaves))
    results = []
    for rows in parts:
        part = batch.rows(rows)
        found, scale = differentiate(f, part), count(part) / max(count(batch), 1)
        results.append({name: scale * found[name] for name in names})
    together = {name: (torch.cat if name.startswith("dL/") else sum)([result[name] for result in results]) for name in names}
    whole = change_gradients({name: whole[name] for name in names}, lambda g: g[torch.cat(list(parts))])
    scaled = f"each scaled by its share of the {share}" if share else "added up as they are"
    expect_same(together, whole, f"splitting into micro-batches of {', '.join(str(len(rows)) for rows in parts)}, {scaled} "
                                 f"({batch})", close)


def share_of(f: Callable, cases: list[Rows], shares: tuple[str, ...] = tuple(SHARES)) -> str | None:
    """The share that makes micro-batches add up in all cases, None if none does."""
    def adds_up(share: str) -> bool:
        try:
            for seed, batch in enumerate(cases):
                micro_batches(f, batch, torch.Generator().manual_seed(seed), share)
        except Exception:
            return False
        return True

    return next(filter(adds_up, shares), None)


def advice(share: str) -> str:
    """What a trainer does with the losses of micro-batches."""
    return "micro-batches: " + (f"scale the loss of each by its share of all {share}" if share else "their losses add up")


def aggregation(f: Callable, batch: OwnBatch, generator: torch.Generator, how: str, scale: float) -> None:
    """the weights are those of the aggregate that was named"""
    expected = scale * token_weights(batch.mask, batch.prompt_index, how, max_new_tokens=1)
    for b, t in ((batch.weights - expected).abs() > 1e-5 * expected).nonzero().tolist():
        raise Broken(f"a token of an answer with {int(batch.mask[b].sum())} weighs {batch.weights[b, t]:.4g}, and by {how} "
                     f"{expected[b, t]:.4g} ({batch})")


# ---- What a loss is free to choose ----


def known_weights(batch: OwnBatch) -> dict[str, Tensor]:
    """What each known aggregate gives, by the words of a report."""
    by_name = {how: token_weights(batch.mask, batch.prompt_index, how, max_new_tokens=1).double() for how in AGGREGATES}
    of_answers, counted = by_name["sequence_mean"], max(int(batch.mask.any(-1).sum()), 1)
    too = "R counts answers without a token, too"
    return {"token_mean, 1 / N": by_name["token_mean"], "sequence_mean, 1 / (R |y|)": of_answers,
            "prompt_mean, 1 / (P N_p)": by_name["prompt_mean"], "sequence_sum, 1 / R": by_name["sequence_sum"],
            f"sequence_mean, 1 / (R |y|), where {too}": of_answers * counted / len(batch),
            f"sequence_sum, 1 / R, where {too}": batch.mask.double() / len(batch),
            "1, a sum over tokens": batch.mask.double(), "1 / |y|, a sum of the answers' means": of_answers * counted}


def fitted(found: list[Tensor], expected: list[Tensor]) -> tuple[float, bool]:
    """The number that `expected` is to be multiplied by, and whether it is then `found`."""
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (found, expected))
    scale = float((a * b).sum() / b.square().sum())
    return scale, scale > 0 and close(a / scale, b)


def constant_scale(cases: list[tuple[OwnBatch, Tensor]]) -> float:
    """1 / L_max, if the aggregate is `constant`."""
    return fitted([w for _, w in cases], [known_weights(batch)["sequence_sum, 1 / R"] for batch, _ in cases])[0]


def describe_weights(f: Callable, cases: list[tuple[OwnBatch, Tensor]]) -> list[str]:
    """Which aggregate it is, or what else, and what the weights depend on."""
    known = [known_weights(batch) for batch, _ in cases]
    fits = {name: fitted([w for _, w in cases], [weights[name] for weights in known]) for name in known[0]}
    name, scale = next(((name, scale) for name, (scale, fits_all) in fits.items() if fits_all), (None, 1.0))
    if name is None:
        which = "those of no aggregate that is known here"
    elif abs(scale - 1) < 1e-5:
        which = name
    elif name.startswith("sequence_sum"):
        which = f"{name.replace('sequence_sum, 1 / R', 'constant, 1 / (R L_max)')}, L_max = {1 / scale:.4g}"
    else:
        which = f"{scale:.4g} times {name}"
    found = set()
    for batch, weights in cases:
        rows = [w[kept] for w, kept in zip(weights, batch.mask, strict=True) if kept.any()]
        spread = [(float(w.min()), float(w.max()), len(w)) for w in rows]
        if any(high > low + 1e-9 for low, high, _ in spread):
            found.add("the token")
        elif any(abs(a[0] - b[0]) > 1e-9 for a in spread for b in spread if a[2] != b[2]):
            found.add("the answer's length")
        for prompt in batch.prompt_index.unique():
            rows = (batch.prompt_index == prompt).nonzero().squeeze(-1)
            if not close(own_weights(f, batch.rows(rows)), weights[rows]):
                found.add("other prompts' answers")
    return [f"weights: {which}", f"weights depend on {' and '.join(sorted(found)) or 'nothing else in the batch'}"]
