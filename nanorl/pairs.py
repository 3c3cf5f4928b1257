"""Preference pairs: the records {"prompt", "chosen", "rejected"} of a file, and their responses as rows of a rollout."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanorl.data import DATA, pad, response_mask, split_records
from nanorl.errors import UserError
from nanorl.files import Record, read_records
from nanorl.sample import Rollout

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
