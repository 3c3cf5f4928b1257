"""From the rows of a rollout to optimizer steps: minibatches, micro-batches, and the sums of what micro-batches measured.

An optimizer step is a minibatch. Its rows go through the model a micro-batch at a time, which only limits memory: losses are
sums whose weights were made for the whole step, so the gradients of its micro-batches add up to its gradient.
"""

import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from nanorl.run import generator, ranks

LONG = 256      # tokens: `micro_batch` rows of this length fit into memory


def minibatches(seed: int, step: int, count: int, epochs: int, parts: int) -> Iterator[Tensor]:
    """The rows of each optimizer step on one rollout: every epoch a fresh shuffle, cut into parts as equal as possible."""
    for epoch in range(epochs):
        shuffle = torch.randperm(count, generator=generator(seed, "minibatch", step, epoch))
        yield from shuffle.tensor_split(parts)


def micro_batches(rows: Tensor, lengths: Tensor, micro_batch: int) -> Iterator[tuple[Tensor, int]]:
    """At most `micro_batch` rows at a time, fewer where they are longer than LONG, but at least one; those of similar length
    together. Yields (rows, longest length)."""
    rows = rows[lengths[rows].argsort()]
    length, start = lengths[rows].tolist(), 0
    while start < len(rows):
        end = start + 1
        while end < min(len(rows), start + micro_batch) and (end + 1 - start) * length[end] <= micro_batch * LONG:
            end += 1
        yield rows[start:end], length[end - 1]
        start = end


def add_metrics(totals: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Add the metrics of a micro-batch to `totals`: sums, and extremes of those named _max and _min."""
    for name, value in metrics.items():
        join = {"_max": max, "_min": min}.get(name[-4:], operator.add)
        totals[name] = join(totals[name], value) if name in totals else value


def sum_over_ranks(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The totals of all processes together. A process that had no rows has none."""
    whole: dict[str, Tensor] = {}
    for part in ranks.gathered({name: x.cpu() for name, x in totals.items()}):
        add_metrics(whole, part)
    return whole


def per_token(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The totals of all processes as means over their "tokens"; extremes stay what they are."""
    whole = sum_over_ranks(totals)
    tokens = max(int(whole.pop("tokens", 0)), 1)
    return {name: x if name.endswith(("_max", "_min")) else x / tokens for name, x in whole.items()}
