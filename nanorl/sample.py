"""The generation engine and the scorer: from a model's logits to sampled tokens, and to the log-probs of given ones.

`generate` samples; `token_log_probs` says how likely given tokens are. Both divide the logits by the temperature before
the softmax, in at least float32, so for equal weights the ratio of their probabilities is 1.
"""

import itertools
import math
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanorl.data import pad, response_mask, shift
from nanorl.gpt import GPT, KVCache
from nanorl.ops import cumulative_sum, linear_log_probs, log_softmax

# ---------------------------------------------------------------------------------------------------------------------
# From logits to a token
# ---------------------------------------------------------------------------------------------------------------------


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest logits; ties with the k-th stay. k = 0 is off.       [B, V] -> [B, V]"""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], -torch.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """-inf outside the nucleus: the fewest most likely tokens whose probabilities reach p.       (Holtzman et al. 2019)

    A token stays when the tokens before it, sorted by probability, have not reached p: at least one always does.
    p = 1 is off.       [B, V] -> [B, V]
    """
    if p == 1.0:
        return logits
    sorted_logp, order = log_softmax(logits).sort(dim=-1, descending=True, stable=True)
    probability = sorted_logp.exp()
    outside = (cumulative_sum(probability) - probability) >= p
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def sampling_logits(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits of the distribution that is really sampled: temperature, then top-k, then top-p.       [B, V] -> [B, V]"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return top_p_filter(top_k_filter(logits, top_k), top_p)


def draw(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u.

    logits [B, V], u [B] in [0, 1) -> ids [B], logp [B]. A token of probability p owns a stretch of length p of u's
    interval; a token of probability zero owns none.
    """
    logp = log_softmax(logits)
    cdf = cumulative_sum(logp.exp())                                                        # [B, V]
    # Rounding may leave the last entry off 1, and u may round up to 1: stay strictly below the last entry.
    u = u.to(cdf.dtype).clamp(max=1 - 2 * torch.finfo(cdf.dtype).eps)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, u, right=True).clamp(max=logits.shape[-1] - 1)    # [B, 1], valid ids even of nans
    return ids.squeeze(-1), logp.gather(-1, ids).squeeze(-1)


def uniforms(seed: int, rows: int, count: int, first: int = 0) -> Tensor:
    """One number in [0, 1) for each (seed, row, position), whichever others are drawn with it; rows are counted from `first`.
    -> [rows, count]"""
    streams = (np.random.Generator(np.random.Philox(key=[seed, row])) for row in range(first, first + rows))
    return torch.from_numpy(np.stack([stream.random(count, dtype=np.float32) for stream in streams]))


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


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
    prompt, side by side."""

    tokens: Tensor           # [B, T] int64, left-aligned; beyond a row's length it is arbitrary
    prompt_lengths: Tensor   # [B]
    lengths: Tensor          # [B] prompt and response, the stop token included
    logp: Tensor             # [B, T-1] log-prob of tokens[:, t+1] under the distribution it was drawn from; else 0
    finished: Tensor         # [B] bool: a stop token came; else the answer was cut at max_new_tokens
    prompt_index: Tensor     # [B] which prompt the row answers

    @property
    def mask(self) -> Tensor:
        """[B, T-1] True where tokens[:, t+1] was sampled."""
        return response_mask(self.prompt_lengths, self.lengths, self.tokens.shape[1])

    def to(self, device: str | torch.device) -> "Rollout":
        return Rollout(**{name: x.to(device) for name, x in vars(self).items()})

    def responses(self) -> list[list[int]]:
        """The sampled ids of each row, without the stop token."""
        starts, ends = self.prompt_lengths.tolist(), (self.lengths - self.finished.long()).tolist()
        return [row[start:end] for row, start, end in zip(self.tokens.tolist(), starts, ends, strict=True)]


def _next_logits(model: GPT, ids: Tensor, cache: KVCache) -> Tensor:
    """One decoding step.       ids [B] -> [B, V]"""
    return model(ids[:, None], cache)[:, -1]


# To ask the device whether rows have finished, the host must wait for it: not after every token where that is expensive.
CHECK_EVERY = {"cuda": 8}

# A compiled step is tied to the memory of its cache, so that memory is kept between calls. Its contents are not: every row
# starts over, with `put`.
_compiled: weakref.WeakKeyDictionary[GPT, dict] = weakref.WeakKeyDictionary()
KEPT = 4                                    # shapes for each model: of a rollout, an evaluation, and two more


def _compiled_step(model: GPT, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
    """The decoding step compiled for a cache of this shape, and the cache, whose address never moves."""
    steps = _compiled.setdefault(model, {})
    kind = (rows, capacity, device, dtype)
    if kind in steps:
        steps[kind] = steps.pop(kind)       # the last one used is the last to go
    else:
        if len(steps) == KEPT:
            del steps[next(iter(steps))]
        static = KVCache(model.config, *kind)
        for x in (*static.keys, *static.values, static.length):
            torch._dynamo.mark_static_address(x)
        # Each kind of cache is compiled for each stretch that attention reads of it. Beyond its limit, 8 in all, the compiler
        # would give up without a word.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        mode = "reduce-overhead" if device.type == "cuda" else "default"          # CUDA graphs, where there is CUDA
        steps[kind] = torch.compile(_next_logits, mode=mode, dynamic=False), static
    return steps[kind]


def read_prompts(model: GPT, prompts: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[KVCache, Tensor]:
    """A cache that has seen these prompts, and the logits of what comes after each.       [P, T], [P] -> [P, V]"""
    cache = KVCache(model.config, *prompts.shape, prompts.device, dtype)
    hidden = model.hidden(prompts, cache)                                                   # [P, T, width]
    cache.length = lengths
    return cache, model.head(hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1])


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


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], *, max_new_tokens: int | list[int], temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, stop_ids: set[int], samples_per_prompt: int = 1, seed: int = 0,
             first_row: int = 0, slots: int | None = None, compile: bool = False) -> Rollout:
    """Sample `samples_per_prompt` responses to each prompt, each until a stop token or `max_new_tokens`.

    `max_new_tokens` is one limit for all prompts, or a list with one for each. temperature 0 is greedy (and logp 0: a
    point mass); top_k = 0 and top_p = 1 are off. Each prompt is read once for all its samples. Randomness is one uniform
    per (seed, row, position): a row does not depend on the other rows; rows are counted from `first_row`.

    `slots` bounds the memory: so many rows are sampled at a time, but at least all of one prompt, and the others wait for
    slots to become free. When none wait, eager decoding drops finished rows as it goes; `compile` keeps a fixed shape, as
    CUDA graphs need it. FloatingPointError when a logit was nan or +inf.
    """
    P, G = len(prompts), samples_per_prompt
    limits = [max_new_tokens] * P if isinstance(max_new_tokens, int) else max_new_tokens
    _check_request(model, prompts, limits, temperature, top_k, top_p, G, slots)
    device = model.head.weight.device
    on = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if on else model.head.weight.dtype

    # The rollout, which so far holds only the prompts.
    tokens, prompt_lengths, ends = (x.to(device).repeat_interleave(G, dim=0) for x in (
        *pad(prompts), torch.tensor([len(x) + n for x, n in zip(prompts, limits, strict=True)])))
    (B, width), longest = tokens.shape, int(ends.max())
    tokens = torch.cat((tokens, tokens.new_zeros(B, longest - width)), dim=1)               # [B, T]
    logp = torch.zeros(B, longest - 1, device=device)
    lengths, finished = prompt_lengths.clone(), torch.zeros(B, dtype=torch.bool, device=device)
    u = uniforms(seed, B, max(limits), first_row).to(device)
    stops = torch.tensor(sorted(stop_ids), device=device)

    # A compiled step is made for one capacity, and for the stretch of it that it reads: few different ones, then.
    capacity = min(-(-longest // 64) * 64, model.config.context) if compile else longest
    S = max(1, min(slots or B, B) // G) * G
    shape = (S, capacity, device, dtype)
    step, cache = _compiled_step(model, *shape) if compile else (_next_logits, KVCache(model.config, *shape))
    check_every = CHECK_EVERY.get(device.type, 1)
    rows = free = torch.arange(S, device=device)        # the row of the rollout in each slot; slots that wait for a row
    next_row = 0                                        # the first row that has had no slot
    logits = torch.zeros(S, model.config.vocab_size, device=device, dtype=dtype)

    for turn in itertools.count(1):
        if len(free):
            first, next_row = next_row, next_row + len(free)
            rows = rows.index_copy(0, free, torch.arange(first, next_row, device=device))
            part = slice(first, next_row, G)            # one row of each prompt
            read, next_logits = read_prompts(model, tokens[part, : prompt_lengths[part].max()], prompt_lengths[part], dtype)
            cache.put(free, read)
            logits = logits.index_copy(0, free, next_logits.repeat_interleave(G, dim=0))
            seen = int(lengths[rows].max())             # the most tokens that a slot's row has in the cache

        at = lengths[rows].clamp(max=longest - 1)       # a row that is done keeps what stands there
        if temperature == 0:
            largest, ids = logits.max(-1)
            ids_logp = 0.0 * largest                    # 0, unless a logit is nan or inf
        else:
            drawn = (at - prompt_lengths[rows]).clamp(max=u.shape[1] - 1)
            ids, ids_logp = draw(sampling_logits(logits, temperature, top_k, top_p), u[rows, drawn])
        running = (~finished & (lengths < ends))[rows]
        tokens[rows, at] = torch.where(running, ids, tokens[rows, at])
        logp[rows, at - 1] = torch.where(running, ids_logp.to(logp.dtype), logp[rows, at - 1])
        lengths[rows] += running
        finished[rows] |= running & torch.isin(ids, stops)

        free = rows[:0]
        if turn % check_every == 0:
            running = (~finished & (lengths < ends))[rows]
            left = int(running.sum())
            if left == 0 and next_row == B:
                break
            # Reading prompts and moving the cache cost about as much as a few steps: wait until a quarter of the slots is free.
            if left <= 0.75 * len(rows):
                if next_row < B:
                    free = (~running).nonzero().squeeze(-1)[: min((S - left) // G * G, B - next_row)]
                elif not compile:
                    cache.keep(running.nonzero().squeeze(-1))
                    rows, ids = rows[running], ids[running]
        cache.length.clamp_(max=capacity - 1)           # finished rows still run, and overwrite their last position
        # A step reads one position more than these; compiled, few different numbers of them.
        cache.visible = (min(capacity, max(64, 1 << seen.bit_length())) if compile else min(seen + 1, capacity)) - 1
        logits = step(model, ids, cache)
        seen += 1

    if not logp.isfinite().all():
        raise FloatingPointError("a logit of the policy is nan or inf")
    T = int(lengths.max())
    return Rollout(tokens[:, :T], prompt_lengths, lengths, logp[:, : T - 1], finished,
                   torch.arange(P, device=device).repeat_interleave(G))


# ---------------------------------------------------------------------------------------------------------------------
# The scorer
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
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    logp, entropy = linear_log_probs(model.hidden(inputs)[mask], model.head.weight, targets[mask], temperature,
                                     compile=model.compiled)
    zeros = torch.zeros(mask.shape, dtype=logp.dtype, device=logp.device)
    return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, entropy)
