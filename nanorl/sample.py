"""Sampling answers, and scoring them: from a model to sampled tokens, and to the log-probs of given ones.

`generate` samples, a step of nanorl/decode.py at a time; `token_log_probs` says how likely given tokens are. Both divide the
logits by the temperature before the softmax, in at least float32, so for equal weights the ratio of their probabilities is 1,
to rounding (without top-k and top-p, which the scorer knows nothing of).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from nanorl.data import pad, response_mask, shift
from nanorl.decode import Slots, engine, uniforms
from nanorl.gpt import GPT, scatter
from nanorl.ops import linear_log_probs


@dataclass(frozen=True)
class Sampling:
    """How the answers of a run are sampled: the arguments of `generate` that stay the same from step to step."""

    max_new_tokens: int
    temperature: float = 1.0
    slots: int | None = None
    compile: bool = False


@dataclass
class Rollout:
    """Prompts with their sampled responses: row b is tokens[b, :lengths[b]], and `samples_per_prompt` rows share one
    prompt, side by side. Where an environment answers, a response is an action, an observation, the next action, ..."""

    tokens: Tensor           # [B, T] int64, left-aligned; 0 beyond a row's length, which is an ordinary id
    prompt_lengths: Tensor   # [B]
    lengths: Tensor          # [B] prompt and response, the stop token included
    mask: Tensor             # [B, T-1] True where tokens[:, t+1] was sampled, stop tokens included (data.response_mask)
    logp: Tensor             # [B, T-1] log-prob of tokens[:, t+1] under the distribution it was drawn from; else 0
    finished: Tensor         # [B] bool: the (last) answer has its stop token; else it was cut at a limit
    prompt_index: Tensor     # [B] which prompt the row answers

    def to(self, device: str | torch.device) -> "Rollout":
        return Rollout(**{name: x.to(device) for name, x in vars(self).items()})

    def responses(self) -> list[list[int]]:
        """The ids of each row after its prompt, observations included, without the last stop token."""
        starts, ends = self.prompt_lengths.tolist(), (self.lengths - self.finished.long()).tolist()
        return [row[start:end] for row, start, end in zip(self.tokens.tolist(), starts, ends, strict=True)]

    def actions(self) -> list[list[list[int]]]:
        """The sampled ids of each row, an answer at a time, without stop tokens. All but the last have one."""
        found = []
        for ids, sampled, finished in zip(self.tokens[:, 1:].tolist(), self.mask.tolist(), self.finished.tolist(), strict=True):
            runs = itertools.groupby(zip(sampled, ids, strict=True), itemgetter(0))
            said = [[i for _, i in run] for drawn, run in runs if drawn]
            found.append([*(action[:-1] for action in said[:-1]), said[-1][:-1] if finished else said[-1]])
        return found

    def action_ends(self) -> Tensor:
        """True at the last token of each answer.       -> [B, T-1]"""
        return self.mask & ~F.pad(self.mask[:, 1:], (0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------

# Asking the device whether rows have finished makes the host wait: where that is expensive, not after every token.
CHECK_EVERY = {"cuda": 8}

# Rows, and the ids of what each has answered, without the stop token -> the ids of what it is told, or None
Observe = Callable[[list[int], list[list[int]]], list[list[int] | None]]


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int | list[int], temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, stop_ids: set[int], samples_per_prompt: int = 1, seed: int = 0,
             first_row: int = 0, slots: int | None = None, compile: bool = False, observe: Observe | None = None,
             max_episode_tokens: int | None = None) -> Rollout:
    """Sample `samples_per_prompt` responses to each prompt, each until a stop token or `max_new_tokens`.

    `max_new_tokens` is one limit for all prompts, or a list with one for each. temperature 0 is greedy (and logp 0: a
    point mass); top_k = 0 and top_p = 1 are off. Each prompt is read once for all its samples. Randomness is one uniform
    per (seed, row, position): up to rounding, a row does not depend on the others. Row numbers start at `first_row`.

    `slots` bounds the memory: at most this many rows are sampled at a time, but at least all of one prompt; the others wait
    for slots to become free. When none wait, eager decoding drops finished rows as it goes; `compile` keeps a fixed shape, as
    CUDA graphs need it. FloatingPointError when a logit was nan or +inf.

    With `observe`, rows have turns. When answers have stopped, it is given their rows and the ids of each, without the stop
    token, and returns the ids of what is said to each, or None where nothing is. The row goes on after them: they are fed
    as they are, without being drawn, and `max_new_tokens` limits the next answer. `max_episode_tokens` limits all that follows
    a prompt; an observation after which nothing could be sampled ends the row instead, and does not enter it.
    """
    P, G = len(prompts), samples_per_prompt
    limits = [max_new_tokens] * P if isinstance(max_new_tokens, int) else max_new_tokens
    most = [max_episode_tokens or n for n in limits]        # all that may follow a prompt
    _check_request(model, prompts, most, temperature, top_k, top_p, G, slots)
    device = model.head.weight.device

    # Where the first answer of each row begins, and where it and the row end at the latest.
    prompt_ids, prompt_lengths = (x.repeat_interleave(G, dim=0) for x in pad(prompts))         # [B, W], [B]
    limits, most = (torch.tensor(x).repeat_interleave(G) for x in (limits, most))
    begins, ends, last_ends = prompt_lengths.clone(), prompt_lengths + limits.minimum(most), prompt_lengths + most

    (B, W), longest, steps = prompt_ids.shape, int(last_ends.max()), int(most.max())        # decoding steps of the longest row
    S = max(1, min(slots or B, B) // G) * G
    step, state, decoder = engine(model, S, W - 1, steps, B, longest + 1, compile)
    u = uniforms(seed, B, steps, first_row) if temperature else torch.zeros(B, steps)
    state.begin(prompt_ids, begins, u, temperature, stop_ids)

    # A row that waits for an observation would fill its cache with what it never says.
    check_every = 1 if observe else CHECK_EVERY.get(device.type, 1)
    free, next_row = torch.arange(S, device=device), 0      # slots without a row, and the first row that has had no slot
    for now in itertools.count():
        if len(free):
            rows = torch.arange(next_row, next_row + len(free))
            state.fill(free, decoder, rows, begins[rows], ends[rows], G)
            next_row += len(free)

        # The columns after the prompts are reused every `steps` steps: by then, the rows that wrote them are done.
        state.open_column(W - 1 + now % steps, seen=W + min(now, steps - 1))
        alive = state.alive.clone() if observe else None
        step(state, decoder, top_k, top_p)
        if observe:
            _go_on(state, (alive & ~state.alive).nonzero().squeeze(-1), observe, begins, ends, last_ends, limits)

        free = free[:0]
        if (now + 1) % check_every == 0:
            left = int(state.alive.sum())
            if left == 0 and next_row == B:
                break
            # Reading prompts and moving the cache cost about as much as a few steps: wait until a quarter of the slots is free.
            if left <= 0.75 * len(state.alive):
                if next_row < B:
                    free = (~state.alive).nonzero().squeeze(-1)[: min((S - left) // G * G, B - next_row)]
                elif not compile:
                    state.keep(state.alive.nonzero().squeeze(-1))
    index = torch.arange(P, device=device).repeat_interleave(G)
    return _written(state, prompt_lengths.to(device), begins.to(device), ends.to(device), index, longest, not temperature)


def _check_request(model: GPT, prompts: list[list[int]], limits: list[int], temperature: float, top_k: int, top_p: float,
                   samples_per_prompt: int, slots: int | None) -> None:
    if not prompts or not all(prompts):
        raise ValueError("generate: every prompt needs at least one token")
    if len(limits) != len(prompts):
        raise ValueError(f"generate: {len(limits)} limits for {len(prompts)} prompts; expected one for each")
    counts = (*limits, samples_per_prompt, 1 if slots is None else slots)
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1 or min(counts) < 1:
        raise ValueError(f"generate: temperature={temperature}, top_k={top_k}, top_p={top_p}, max_new_tokens={min(limits)}, "
                         f"samples_per_prompt={samples_per_prompt}, slots={slots}; expected a finite temperature >= 0, "
                         "top_k >= 0, 0 < top_p <= 1 and positive counts")
    prompt, limit = max(((len(x), n) for x, n in zip(prompts, limits, strict=True)), key=sum)
    if prompt + limit > model.config.context:
        raise ValueError(f"a prompt of {prompt} tokens and max_new_tokens={limit} do not fit the model's context of "
                         f"{model.config.context}")


def _go_on(state: Slots, stopped: Tensor, observe: Observe, begins: Tensor, ends: Tensor, last_ends: Tensor,
           limits: Tensor) -> None:
    """Ask the environment what it says to the answers that have just ended in the slots `stopped`; those rows go on.

    begins, ends [B]: where the newest answer of a row begins, and ends at the latest: set anew. last_ends, limits [B]: where a
    row ends at the latest, and how long an answer may be.
    """
    columns, asked = state.tokens.shape[1], []
    for slot, place in zip(stopped.tolist(), state.place[stopped].tolist(), strict=True):
        row, end = divmod(place, columns)
        *ids, newest = state.tokens[row, begins[row] : end].tolist()
        if not state.goes_on[newest]:                                       # else it was cut
            asked.append((slot, row, end, ids))
    said = observe([row for _, row, *_ in asked], [ids for *_, ids in asked]) if asked else []
    for (slot, row, end, _), ids in zip(asked, said, strict=True):
        if ids and end + len(ids) < last_ends[row]:
            state.given[row, end : end + len(ids)] = torch.tensor(ids, device=state.given.device)
            begins[row] = end + len(ids)
            ends[row] = min(begins[row] + limits[row], last_ends[row])
            state.last[slot], state.alive[slot] = row * columns + ends[row] - 1, True


def _written(state: Slots, prompt_lengths: Tensor, begins: Tensor, ends: Tensor, prompt_index: Tensor, longest: int,
             greedy: bool) -> Rollout:
    """The rollout that the slots have written: its last answers end at their stop token, else at `ends`."""
    tokens, logp = state.tokens[:, :longest], state.logp[:, 1:longest]
    stops = ~state.goes_on[tokens] & F.pad(response_mask(begins, ends, longest), (1, 0))                # [B, T]
    finished = stops.any(-1)
    lengths = torch.where(finished, stops.int().argmax(-1) + 1, ends)
    T = int(lengths.max())
    tokens = tokens[:, :T].masked_fill(torch.arange(T, device=tokens.device) >= lengths[:, None], 0)
    mask = response_mask(prompt_lengths, lengths, T) & (state.given[:, 1:T] < 0)
    logp = logp[:, : T - 1].masked_fill(~mask, 0.0)
    if not logp.isfinite().all():
        raise FloatingPointError("a logit of the policy is nan or inf")
    return Rollout(tokens, prompt_lengths, lengths, mask, torch.zeros_like(logp) if greedy else logp, finished, prompt_index)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


def token_log_probs(model: GPT, tokens: Tensor, mask: Tensor | None = None, *,
                    temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi(tokens[:, t+1] | tokens[:, :t+1]) and the entropy of that distribution.

    tokens [B, T]; mask [B, T-1] -> (logp, entropy), both [B, T-1] in nats. Only True positions of the mask go through
    the output head; the others are 0. The policy is the softmax of logits / temperature, as in `generate`.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"token_log_probs: temperature={temperature}; a greedy policy is a point mass, expected > 0")
    inputs, targets = shift(tokens)
    hidden, places = model.hidden_at(inputs, mask)                                              # [N, width]
    logp, entropy = linear_log_probs(hidden, model.head.weight, targets.flatten()[places], temperature,
                                     compile=model.compiled)
    return scatter(logp, places, targets.shape), scatter(entropy, places, targets.shape)
