"""Preference pairs: the records {"prompt", "chosen", "rejected"} of a file, their responses as rows of a rollout, and how well
a model ranks them."""

import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanorl.data import DATA, pad, response_mask, split_records
from nanorl.errors import UserError
from nanorl.files import Record, read_records
from nanorl.ops import bradley_terry, ranked_right
from nanorl.run import ranks
from nanorl.sample import Rollout
from nanorl.tasks import Stories

PAIRS = str(DATA / "preferences.jsonl")


def read_pairs(path: str) -> list[Record]:
    """The records {"prompt", "chosen", "rejected"} of a file, by default the stories, of which some can be trained on."""
    records = read_records(path or PAIRS, "pairs")
    split_pairs(records, path)
    return records


def split_pairs(records: list[dict], path: str) -> tuple[list[int], list[int], int]:
    """Which pairs to train on and which are held out; and how many are neither, because both responses are the same: there is
    nothing to prefer."""
    path = path or PAIRS
    training, heldout = ([i for i in part if records[i]["chosen"] != records[i]["rejected"]]
                         for part in split_records(records, path))
    if not training:
        raise UserError(f"{path}: no record to train on whose chosen and rejected responses differ")
    return training, heldout, len(records) - len(training) - len(heldout)


def _rollout(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor, prompt_index: Tensor) -> Rollout:
    """Responses that nobody sampled: their log-probs are nan."""
    return Rollout(tokens, prompt_lengths, lengths, response_mask(prompt_lengths, lengths, tokens.shape[1]),
                   torch.full(tokens[:, 1:].shape, torch.nan), torch.ones_like(lengths, dtype=torch.bool), prompt_index)


def pair_rollout(prompts: list[list[int]], chosen: list[list[int]], rejected: list[list[int]], picks: list[int],
                 pad_id: int) -> tuple[Rollout, Tensor]:
    """The picked pairs as rows, first all chosen responses, then all rejected ones; and which two rows each pair is.

    Token ids of N pairs -> a rollout of 2N rows, [N, 2]
    """
    tokens, lengths = pad([prompts[i] + responses[i] for responses in (chosen, rejected) for i in picks], pad_id)
    prompt_lengths, rows = torch.tensor([len(prompts[i]) for i in picks]).repeat(2), torch.arange(len(tokens)).view(2, -1).T
    return _rollout(tokens, prompt_lengths, lengths, torch.arange(len(picks)).repeat(2)), rows


def exchange(rollout: Rollout, prompt_rows: Tensor, response_rows: Tensor, limit: int) -> Rollout:
    """The prompts of `prompt_rows` [n], each followed by the response of one of `response_rows` [n], cut at `limit` tokens."""
    starts = rollout.prompt_lengths
    rows = [torch.cat((rollout.tokens[i, : starts[i]], rollout.tokens[j, starts[j] : rollout.lengths[j]]))[:limit]
            for i, j in zip(prompt_rows.tolist(), response_rows.tolist(), strict=True)]
    lengths = rollout.lengths.new_tensor([len(row) for row in rows])
    return _rollout(pad_sequence(rows, batch_first=True), starts[prompt_rows], lengths, rollout.prompt_index[prompt_rows])


@torch.no_grad()
def reference_point(log_ratio: Callable[[Rollout], Tensor], rollout: Rollout, pairs: Tensor, limit: int,
                    micro_batch: int) -> float:
    """KTO's z: the mean of log(pi/ref) over all responses, each after the prompt of the next pair; never negative.

        z = max(0, 1/2N sum log(pi/ref))        log_ratio(rollout) is log(pi/ref) of each row's response [n], in nats

    pairs [N, 2]: rows of the chosen and rejected responses. What is exchanged is cut at `limit` tokens. A single pair has no
    other prompt: 0.
    """
    if len(pairs) < 2:
        return 0.0
    total = torch.zeros((), device=rollout.tokens.device)
    rows = torch.stack((pairs.roll(-1, 0), pairs), dim=-1).flatten(0, 1)        # [2N, 2] the prompt's, the response's
    for part in ranks.parts(rows, micro_batch):
        total += log_ratio(exchange(rollout, *part.T, limit)).sum()
    return max(0.0, float(ranks.summed(total)) / pairs.numel())


# ---------------------------------------------------------------------------------------------------------------------
# How well margins r(chosen) - r(rejected) rank held-out pairs
# ---------------------------------------------------------------------------------------------------------------------


def agreement(name: str, margin: Tensor, hidden: Tensor | None = None) -> dict[str, float]:
    """Share of pairs that margins [N] rank like the labels; where hidden margins [N] are known, also like those, and like those
    that exceed one label temperature."""
    def share(right: Tensor) -> float:
        return float(right.mean()) if len(right) else 0.5

    metrics = {f"eval/agreement_{name}_labels": share(ranked_right(margin))}
    if hidden is not None:
        right = ranked_right(margin * hidden)
        metrics[f"eval/agreement_{name}_hidden"] = share(right[hidden != 0])
        metrics[f"eval/agreement_{name}_clear"] = share(right[hidden.abs() > Stories.label_temperature])
    return metrics


def calibration_error(margin: Tensor, bins: int = 10) -> float:
    """How far predicted and actual preference are apart: |mean confidence - accuracy| in bins of confidence, weighted by
    size. Confidence is sigma(|margin|), the probability of the response that the model prefers.       [N] -> float"""
    confidence, right = margin.abs().sigmoid(), ranked_right(margin)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    parts = [index == b for b in range(bins) if (index == b).any()]
    return sum(abs(float(confidence[part].mean() - right[part].mean())) * int(part.sum()) for part in parts) / len(margin)


def hidden_margins(records: list[dict]) -> Tensor:
    """By how much the hidden reward prefers what was chosen.       -> [N]"""
    reward = Stories().hidden_reward
    return torch.tensor([reward(r["prompt"], r["chosen"]) - reward(r["prompt"], r["rejected"]) for r in records])


def length_margins(training: list[dict], heldout: list[dict]) -> Tensor:
    """Longer is better, or shorter, whichever the training pairs say. In characters.       -> [N]"""
    def margins(records: list[dict]) -> Tensor:
        return torch.tensor([float(len(record["chosen"]) - len(record["rejected"])) for record in records])

    return margins(heldout) * (1 if ranked_right(margins(training)).mean() >= 0.5 else -1)


def word_margins(training: list[dict], heldout: list[dict]) -> Tensor:
    """A weight for every word, fitted by logistic regression to the differences in word counts.       -> [N]

    The penalty on weights is the one, of five, that does best on the last fifth of the training pairs.
    """
    def words(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    frequent = Counter(word for r in training for key in ("chosen", "rejected") for word in words(r[key])).most_common(5000)
    vocabulary = {word: i for i, (word, _) in enumerate(frequent)}

    def counts(text: str) -> Tensor:
        known = [vocabulary[word] for word in words(text) if word in vocabulary]
        return torch.bincount(torch.tensor(known, dtype=torch.long), minlength=len(vocabulary))

    def differences(records: list[dict]) -> Tensor:
        return torch.stack([counts(r["chosen"]) - counts(r["rejected"]) for r in records]).double()

    def fit(x: Tensor, penalty: float) -> Tensor:
        w = torch.zeros(len(vocabulary), dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            loss = bradley_terry(x @ w).mean() + penalty * w.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        return w.detach()

    x, cut = differences(training), len(training) * 4 // 5
    best = max((10.0**-k for k in range(1, 6)), key=lambda penalty: ranked_right(x[cut:] @ fit(x[:cut], penalty)).mean())
    return differences(heldout) @ fit(x, best)


RANKERS = {"model": "the reward model", "words": "word counts", "length": "length", "ceiling": "the hidden reward itself"}


def ranking_table(metrics: dict[str, float], count: int) -> str:
    """How often each of RANKERS ranks held-out pairs like the labels, and like the hidden reward."""
    lines = [f"{f'{count} held-out pairs ranked like ...':38s} the labels  hidden reward  clear pairs"]
    for name, label in RANKERS.items():
        cells = (metrics.get(f"eval/agreement_{name}_{column}") for column in ("labels", "hidden", "clear"))
        lines.append(f"  {label:35s}" + "".join("            -" if x is None else f"{x:13.3f}" for x in cells))
    return "\n".join(lines) if count else "No pair is held out."
