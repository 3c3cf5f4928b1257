"""Text files, JSONL records, padding, batches, and the shift of tokens against their predictions.

Sequences are left-aligned: row b is tokens[b, :length[b]], position 0 is its first token, padding fills the right.
Bad files raise UserError with one sentence that names the file, the line and what was expected.
"""

import json
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanorl.errors import UserError
from nanorl.tasks import Task, is_heldout
from nanorl.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file."""
    try:
        if not Path(path).is_file():
            raise UserError(f"{path}: {'not a' if Path(path).exists() else 'no such'} file; expected a UTF-8 text file")
        with open(path, "rb") as f:
            content = f.read(1 << 20)
            if b"\0" not in content:    # else a binary file, or a hole of a gigabyte: no need to read it all
                content += f.read()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if b"\0" in content:
        raise UserError(f"{path}: not text (byte {content.index(0)} is 0x00); expected a UTF-8 text file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start} is 0x{e.object[e.start]:02x})") from None
    if not text.strip():
        raise UserError(f"{path}: empty; expected text")
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise UserError("the same key twice in one object")
    return record


def parse_object(text: str | bytes, where: str, expected: str) -> dict[str, Any]:
    """The JSON object in `text`, in which no key stands twice. UserError names `where` the text is and what was `expected`."""
    try:
        record = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not readable as JSON ({e}); expected {expected}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: {type(record).__name__}; expected {expected}")
    return record


def read_records(path: str | Path, keys: tuple[str, ...]) -> list[dict[str, str]]:
    """JSON objects, one a line, each with a non-empty string under every key of `keys` and no key twice. Blank lines are
    skipped.

    Lines end at "\\n" only: a string may well contain other separators, such as U+2028.
    """
    records, expected = [], f"an object with {', '.join(keys)}"
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = parse_object(line, where, expected)
        for key in keys:
            if key not in record:
                raise UserError(f"{where}: no {key!r}; expected {expected}")
            if not isinstance(record[key], str) or not record[key]:
                raise UserError(f"{where}: {key!r} is {str(record[key])[:40]!r}; expected a non-empty string")
            if re.search("[\ud800-\udfff]", record[key]):
                raise UserError(f"{where}: {key!r} holds half of a surrogate pair; expected characters")
        records.append(record)
    return records


# ---------------------------------------------------------------------------------------------------------------------
# What to train on, and what is held out
# ---------------------------------------------------------------------------------------------------------------------

PAIRS = str(DATA / "preferences.jsonl")


def split_text(text: str) -> tuple[str, str]:
    """What to train on, and the last 5 %, which is held out."""
    cut = int(0.95 * len(text))
    return text[:cut], text[cut:]


def split_records(records: list[dict], source: str) -> tuple[list[int], list[int]]:
    """Which records to train on, and which are held out by the hash of their prompt."""
    training, heldout = [], []
    for i, record in enumerate(records):
        (heldout if is_heldout(record["prompt"]) else training).append(i)
    if not training:
        raise UserError(f"{source}: no record to train on; one prompt in ten is held out, here all of them")
    return training, heldout


def training_records(path: str, task: Task, count: int = 20_000) -> list[dict[str, str]]:
    """Demonstrations to learn from: those of a JSONL file that are not held out, or `count` of the task's own."""
    if not path:
        return task.demonstrations(count)
    records = read_records(path, ("prompt", "response"))
    training, _ = split_records(records, path)
    return [records[i] for i in training]


def read_pairs(path: str) -> tuple[list[dict[str, str]], list[int], list[int], int]:
    """The records {"prompt", "chosen", "rejected"} of a file, by default the stories; which of them to train on and which are
    held out; and how many are neither, because both responses are the same: there is nothing to prefer."""
    path = path or PAIRS
    records = read_records(path, ("prompt", "chosen", "rejected"))
    training, heldout = ([i for i in part if records[i]["chosen"] != records[i]["rejected"]]
                         for part in split_records(records, path))
    if not training:
        raise UserError(f"{path}: no record to train on whose chosen and rejected responses differ")
    return records, training, heldout, len(records) - len(training) - len(heldout)


# ---------------------------------------------------------------------------------------------------------------------
# From records to token ids
# ---------------------------------------------------------------------------------------------------------------------


def render_records(records: list[dict], tokenizer: Tokenizer, context: int, source: str,
                   key: str = "response") -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each record's prompt and of its response, the value of `key`.

    UserError names a record that does not fit the model's context.
    """
    prompts = [tokenizer.render(record["prompt"]) for record in records]
    responses = [tokenizer.render_response(record[key]) for record in records]
    for number, (x, y) in enumerate(zip(prompts, responses, strict=True), start=1):
        if len(x) + len(y) > context:
            raise UserError(f"{source}, record {number}: {len(x) + len(y)} tokens do not fit the model's context of {context}")
    return prompts, responses


def render_pairs(records: list[dict], tokenizer: Tokenizer, context: int,
                 path: str) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Token ids of each record's prompt, chosen and rejected response."""
    prompts, chosen = render_records(records, tokenizer, context, path or PAIRS, "chosen")
    _, rejected = render_records(records, tokenizer, context, path or PAIRS, "rejected")
    return prompts, chosen, rejected


# ---------------------------------------------------------------------------------------------------------------------
# From sequences to tensors
# ---------------------------------------------------------------------------------------------------------------------


def pad(sequences: list[list[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Ragged sequences, left-aligned.       -> tokens [B, T], lengths [B], T the longest"""
    lengths = torch.tensor([len(s) for s in sequences])
    rows = [torch.tensor(s, dtype=torch.long) for s in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=pad_id), lengths


def shift(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the model reads, and what each position should predict: the token after it.

    tokens [B, T] -> inputs = tokens[:, :-1], targets = tokens[:, 1:], both [B, T-1]. So logp[:, t] scores tokens[:, t+1].
    """
    return tokens[:, :-1], tokens[:, 1:]


def response_mask(prompt_lengths: Tensor, lengths: Tensor, width: int) -> Tensor:
    """True where a target of `shift` is a response token, its stop token included.       [B], [B] -> [B, width - 1]

    tokens[b, prompt_lengths[b] : lengths[b]] are the response; the mask comes from lengths, never from token ids. The stop
    token is in `lengths` because `Tokenizer.render_response` and `generate` end with it; the first-step check notices if not.
    """
    target = torch.arange(1, width, device=lengths.device)
    return (prompt_lengths[:, None] <= target) & (target < lengths[:, None])


def response_batch(prompts: list[list[int]], responses: list[list[int]], picks: list[int],
                   pad_id: int) -> tuple[Tensor, Tensor]:
    """The picked records as tokens [B, T] and the mask of their responses [B, T-1]."""
    tokens, lengths = pad([prompts[i] + responses[i] for i in picks], pad_id)
    return tokens, response_mask(torch.tensor([len(prompts[i]) for i in picks]), lengths, tokens.shape[1])


def pair_batch(prompts: list[list[int]], chosen: list[list[int]], rejected: list[list[int]], picks: list[int],
               pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """The picked pairs as rows: first all chosen ones, then all rejected ones.

    Token ids of B pairs -> tokens [2B, T], prompt_lengths [2B], lengths [2B]
    """
    tokens, lengths = pad([prompts[i] + responses[i] for responses in (chosen, rejected) for i in picks], pad_id)
    return tokens, torch.tensor([len(prompts[i]) for i in picks]).repeat(2), lengths


# ---------------------------------------------------------------------------------------------------------------------
# Batches. Each is a function of (seed, step), so a resumed run needs no cursor but its step.
# ---------------------------------------------------------------------------------------------------------------------


def random_windows(ids: Tensor, bos: int, batch: int, width: int, generator: torch.Generator) -> Tensor:
    """`batch` random stretches of a long text, each after a BOS.       ids [N] -> [batch, width]"""
    starts = torch.randint(len(ids) - width + 2, (batch, 1), generator=generator)
    windows = ids[starts + torch.arange(width - 1)]
    return torch.cat((torch.full((batch, 1), bos), windows), dim=1)


def consecutive_windows(ids: Tensor, bos: int, width: int) -> tuple[Tensor, Tensor]:
    """A text cut into stretches, each after a BOS, so that every token is predicted once.       ids [N] -> [B, width], [B]"""
    return pad([[bos, *chunk.tolist()] for chunk in ids.split(width - 1)])


@lru_cache(maxsize=2)       # a batch may touch two epochs
def _epoch(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/epoch/{epoch}").sample(range(count), count)


def shuffled_batch(count: int, batch: int, step: int, seed: int) -> list[int]:
    """The records of step 0, 1, 2, ...: every epoch is a fresh shuffle of all `count`, cut into batches end to end."""
    return [_epoch(count, seed, i // count)[i % count] for i in range(step * batch, (step + 1) * batch)]
