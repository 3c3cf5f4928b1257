"""What is trained on and what is held out; padding, batches, and the shift of tokens against their predictions.

Sequences are left-aligned: row b is tokens[b, :length[b]], position 0 is its first token, padding fills the right.
"""

import random
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanorl.errors import UserError, refuse
from nanorl.files import Prompt, first_question, read_records
from nanorl.tasks import Task, is_heldout
from nanorl.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"


# ---------------------------------------------------------------------------------------------------------------------
# What to train on, and what is held out
# ---------------------------------------------------------------------------------------------------------------------


def split_text(text: str) -> tuple[str, str]:
    """What to train on, and the last 5 %, which is held out."""
    cut = int(0.95 * len(text))
    return text[:cut], text[cut:]


def split_records(records: list[dict], source: str) -> tuple[list[int], list[int]]:
    """Which records to train on, and which are held out by the hash of their first question."""
    training, heldout = [], []
    for i, record in enumerate(records):
        (heldout if is_heldout(first_question(record["prompt"])) else training).append(i)
    if not training:
        raise UserError(f"{source}: no record to train on; one prompt in ten is held out, here all of them")
    return training, heldout


def training_records(path: str, task: Task) -> list[dict[str, str]]:
    """Demonstrations to learn from: those of a JSONL file that are not held out, or 20,000 of the task's own."""
    if not path:
        return task.demonstrations(20_000)
    records = read_records(path, "demonstrations")
    training, _ = split_records(records, path)
    return [records[i] for i in training]


# ---------------------------------------------------------------------------------------------------------------------
# From records to token ids
# ---------------------------------------------------------------------------------------------------------------------


def which_fit(rendered: list[list[list[int]]], places: list[str], source: str, context: int, reserve: int = 0,
              reserved_by: str = "--max-new-tokens", skip_long: bool = False) -> list[int]:
    """Which records fit the model's context: the prompt with its longest response, and with `reserve` tokens to sample.

    rendered: token ids of the prompts, of their responses, of other responses. With `skip_long` a line says how many do not
    fit; else a UserError names them.
    """
    kept, long = [], []
    for i, (prompt, *responses) in enumerate(zip(*rendered, strict=True)):
        response = max(reserve, *map(len, responses)) if responses else reserve
        if len(prompt) + response <= context:
            kept.append(i)
        else:
            more = f" + {f'{reserved_by} ' if response == reserve else ''}{response}" if len(prompt) < context else ""
            long.append(f"{places[i]}: {len(prompt)} tokens{more}")
    if long and not (skip_long and kept):
        refuse(source, long, f"prompt and response within the model's context of {context}; --skip-long leaves out the others")
    if long:
        print(f"Left out {len(long):,} of {len(places):,} records of {source}: too long for the model's context of {context}.")
    return kept


def render_prompts(tokenizer: Tokenizer, prompts: list[Prompt], places: list[str], source: str) -> list[list[int]]:
    """Token ids of the prompts; UserError names the first that this tokenizer or its chat template cannot write."""
    rendered = []
    for prompt, place in zip(prompts, places, strict=True):
        try:
            rendered.append(tokenizer.render(prompt))
        except UserError as e:
            raise UserError(f"{source}, {place}: {e}") from None
    return rendered


def render_records(records: list[dict], tokenizer: Tokenizer, context: int, source: str, *keys: str, reserve: int = 0,
                   skip_long: bool = False) -> tuple[list, ...]:
    """The records that fit the model's context (`which_fit`), and token ids of their prompts and of their responses, the values
    of `keys`."""
    places = [getattr(record, "place", f"record {number}") for number, record in enumerate(records, start=1)]
    prompts = render_prompts(tokenizer, [record["prompt"] for record in records], places, source)
    rendered = [prompts, *([tokenizer.render_response(record[key]) for record in records] for key in keys)]
    kept = which_fit(rendered, places, source, context, reserve, skip_long=skip_long)
    return tuple([part[i] for i in kept] for part in (records, *rendered))


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
    token is in `lengths` because `Tokenizer.render_response` and `generate` end with it; where `generate` did not, GRPO's
    first-step check notices.
    """
    target = torch.arange(1, width, device=lengths.device)
    return (prompt_lengths[:, None] <= target) & (target < lengths[:, None])


def response_batch(prompts: list[list[int]], responses: list[list[int]], picks: list[int],
                   pad_id: int) -> tuple[Tensor, Tensor]:
    """The picked records as tokens [B, T] and the mask of their responses [B, T-1]."""
    tokens, lengths = pad([prompts[i] + responses[i] for i in picks], pad_id)
    return tokens, response_mask(torch.tensor([len(prompts[i]) for i in picks]), lengths, tokens.shape[1])


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
