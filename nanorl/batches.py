"""From the rows of a rollout to optimizer steps: minibatches, micro-batches, and the sums of what micro-batches measured.

An optimizer step is a minibatch. Its rows go through the model a micro-batch at a time, which only limits memory: losses are
sums whose weights were made for the whole step, so the gradients of its micro-batches add up to its gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanorl.run import generator, ranks
from nanorl.sample import Rollout

LONG = 256      # tokens: `micro_batch` rows of this length fit into memory


def minibatches(seed: int, step: int, count: int, epochs: int, parts: int) -> Iterator[Tensor]:
    """The rows of each optimizer step on one rollout: every epoch a fresh shuffle, cut into parts as equal as possible."""
    for epoch in range(epochs):
        shuffle = torch.randperm(count, generator=generator(seed, "minibatch", step, epoch))
        yield from shuffle.tensor_split(parts)


def micro_batches(rollout: Rollout, micro_batch: int, rows: Tensor | None = None) -> Iterator[tuple[Tensor, int]]:
    """At most `micro_batch` of these rows at a time (default: of all), fewer where they are longer than LONG, but at least
    one; of several processes, each gets its share of the prompts. Yields (rows, longest length).

    The rows of one prompt stay together, for the model reads their prompt once (GPT.hidden_at), and prompts whose longest
    answers are alike.
    """
    if rows is None:
        rows = torch.arange(len(rollout.lengths), device=rollout.lengths.device)
    prompt, length = rollout.prompt_index[rows].tolist(), rollout.lengths[rows].tolist()
    longest: dict[int, int] = {}
    for p, n in zip(prompt, length, strict=True):
        longest[p] = max(n, longest.get(p, 0))
    mine = set(ranks.share(sorted(longest)))
    order = sorted((longest[p], p, i) for i, p in enumerate(prompt) if p in mine)
    start = 0
    while start < len(order):
        end = start + 1
        while end < min(len(order), start + micro_batch) and (end + 1 - start) * order[end][0] <= micro_batch * LONG:
            end += 1
        part = [i for _, _, i in order[start:end]]
        yield rows[part], max(length[i] for i in part)
        start = end


def add_metrics(totals: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Add the metrics of a micro-batch to `totals`: sums, and extremes of those named _max and _min."""
    for name, value in metrics.items():
        join = {"_max": torch.maximum, "_min": torch.minimum}.get(name[-4:], torch.add)
        totals[name] = join(totals[name], value) if name in totals else value


def sum_over_ranks(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The totals of all processes together. A process that had no rows has none."""
    whole: dict[str, Tensor] = {}
    values = torch.stack(list(totals.values())).cpu() if totals else []                     # the host waits for the device once
    for part in ranks.gathered(dict(zip(totals, values, strict=True))):
        add_metrics(whole, part)
    return whole


def per_token(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The totals of all processes as means over their "tokens"; extremes stay what they are."""
    whole = sum_over_ranks(totals)
    tokens = max(int(whole.pop("tokens", 0)), 1)
    return {name: x if name.endswith(("_max", "_min")) else x / tokens for name, x in whole.items()}
