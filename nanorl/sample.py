"""The generation engine and the scorer: from a model's logits to sampled tokens, and to the log-probs of given ones.

`generate` samples; `token_log_probs` says how likely given tokens are. Both divide the logits by the temperature before
the softmax, in at least float32, so for equal weights the ratio of their probabilities is 1, to rounding (without top-k and
top-p, which the scorer knows nothing of).
"""

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanorl.data import pad, response_mask, shift
from nanorl.gpt import GPT, GPTConfig, KVCache, scatter
from nanorl.lora import is_merged, linear_layers, merged, merged_weight
from nanorl.ops import cumulative_sum, linear_log_probs, log_softmax, rows_of_logits

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


def sampling_logits(logits: Tensor, temperature: float | Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits of the distribution that is really sampled: temperature, then top-k, then top-p.       [B, V] -> [B, V]

    The maximum is subtracted before the division, so that a temperature near 0 cannot make it overflow.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return top_p_filter(top_k_filter((logits - logits.amax(-1, keepdim=True)) / temperature, top_k), top_p)


def draw(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u.

    logits [B, V], u [B] in [0, 1) -> ids [B], logp [B]. A token of probability p owns a stretch of length p of u's
    interval; a token of probability zero owns none.
    """
    top, best = logits.max(-1, keepdim=True)
    p = (logits - top).exp()                                                                # [B, V], times the constant `total`
    cdf = cumulative_sum(p)
    total = cdf[:, -1:]
    # Rounding may leave u at 1: stay strictly below the last entry.
    target = u.to(cdf.dtype).clamp(max=1 - 2 * torch.finfo(cdf.dtype).eps)[:, None] * total
    ids = torch.searchsorted(cdf, target, right=True).clamp(max=logits.shape[-1] - 1)      # [B, 1], valid ids even of nans
    # On a GPU a cumulative sum is added up in pieces, and may rise where p is 0.
    ids = torch.where(p.gather(-1, ids) > 0, ids, best)
    return ids.squeeze(-1), (p.gather(-1, ids) / total).log().squeeze(-1)


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
    prompt, side by side. Where an environment answers, a response is an action, an observation, the next action, ..."""

    tokens: Tensor           # [B, T] int64, left-aligned; 0 beyond a row's length, which is an ordinary id
    prompt_lengths: Tensor   # [B]
    lengths: Tensor          # [B] prompt and response, the stop token included
    mask: Tensor             # [B, T-1] True where tokens[:, t+1] was sampled: not in the prompt, nor in an observation
    logp: Tensor             # [B, T-1] log-prob of tokens[:, t+1] under the distribution it was drawn from; else 0
    finished: Tensor         # [B] bool: the (last) answer has its stop token; else it was cut at max_new_tokens
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


class Slots:
    """All that a decoding step reads and writes: a row of the rollout in each slot. Only `keep` moves it in memory.

    A place is an index into the flattened rollout [B, T + 1]. A row that is done goes on writing at the place after its last
    token, where everything is discarded, until its slot is taken.
    """

    def __init__(self, config: GPTConfig, slots: int, capacity: int, rows: int, columns: int, device: torch.device,
                 dtype: torch.dtype):
        self.cache = KVCache(config, slots, capacity, device, dtype)
        self.tokens = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self.logp, self.u = (torch.zeros(rows, columns, device=device) for _ in range(2))       # u draws the token that is here
        self.given = torch.full_like(self.tokens, -1)       # ids that stand here, of an observation; -1: the token is drawn
        self.ids, self.place, self.last = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(3))
        self.alive = torch.zeros(slots, dtype=torch.bool, device=device)        # has neither stopped nor filled its last place
        self.goes_on = torch.ones(config.vocab_size, dtype=torch.bool, device=device)           # False for stop tokens
        self.temperature = torch.ones((), dtype=torch.promote_types(dtype, torch.float32), device=device)

    def fill(self, free: Tensor, model: GPT, prompts: Tensor, lengths: Tensor, place: Tensor, last: Tensor) -> None:
        """Put prompts [P, T] into the free slots, as many slots for each; answers begin at `place`, and end at `last` at most.

        The last token of a prompt is not read yet: it is the first to be fed. All arguments are on the model's device.
        """
        times, columns = len(free) // len(prompts), prompts.shape[1] - 1
        size = max(1, READ_AT_ONCE // (max(columns, 1) * model.config.mlp_width))          # prompts to read at a time
        for part, n, slots in zip(prompts.split(size), lengths.split(size), free.split(size * times), strict=True):
            read = KVCache(model.config, len(part), columns, prompts.device, self.cache.mask.dtype)
            if columns:
                model.hidden(part[:, :-1], read)
            read.length = n - 1
            self.cache.put(slots, read)
        newest = prompts.gather(1, lengths[:, None] - 1).squeeze(-1)
        self.ids[free], self.place[free], self.last[free] = newest.repeat_interleave(times), place, last
        self.alive[free] = True

    def step(self, model: GPT, top_k: int, top_p: float) -> None:
        """Feed the newest token of every slot, draw the next, and write it down."""
        hidden, size = model.hidden(self.ids[:, None], self.cache), rows_of_logits(model.config.vocab_size)
        u = self.u.view(-1).index_select(0, self.place)
        drawn = [draw(sampling_logits(model.head(h)[:, 0], self.temperature, top_k, top_p), part)      # of logits [size, V]
                 for h, part in zip(hidden.split(size), u.split(size), strict=True)]
        ids, logp = map(torch.cat, zip(*drawn, strict=True))                                    # [S]
        given = self.given.view(-1).index_select(0, self.place)
        is_drawn = given < 0
        ids = torch.where(is_drawn, ids, given)
        self.ids.copy_(ids)
        self.tokens.view(-1).index_copy_(0, self.place, ids)
        self.logp.view(-1).index_copy_(0, self.place, logp.to(self.logp.dtype))
        more = self.goes_on.index_select(0, ids).logical_or_(~is_drawn).logical_and_(self.place < self.last)
        self.place += self.alive
        self.cache.length += self.alive
        self.alive &= more

    def tensors(self) -> list[Tensor]:
        parts = [*vars(self).values(), *vars(self.cache).values(), *self.cache.keys, *self.cache.values]
        return [x for x in parts if isinstance(x, Tensor)]

    def keep(self, slots: Tensor) -> None:
        """Drop all slots but these."""
        self.cache.keep(slots)
        self.ids, self.place, self.last, self.alive = (x[slots] for x in (self.ids, self.place, self.last, self.alive))


# Asking the device whether rows have finished makes the host wait: where that is expensive, not after every token.
CHECK_EVERY = {"cuda": 8}

READ_AT_ONCE = 2**24    # activations of an MLP while prompts are read
GROWTH = 64             # columns after the prompts that the cache of eager decoding begins with, and grows by as they fill up

KEPT, KEPT_BYTES = 4, 2**31     # how many compiled shapes (a rollout's, an evaluation's, two more) and bytes to keep per model


class _Compiled:
    """What compiled sampling keeps of a model from call to call: a compiled step is tied to the memory of its slots."""

    def __init__(self):
        self.steps: dict[tuple, tuple[Callable, Slots]] = {}
        self.cast: GPT | None = None

    def slots(self, config: GPTConfig, *shape) -> tuple[Callable, Slots]:
        """The step compiled for slots of this shape, and the slots. Only the most recently used shapes are kept."""
        if shape in self.steps:
            self.steps[shape] = self.steps.pop(shape)
        else:
            slots = Slots(config, *shape)
            slots.cache.column = slots.cache.length.new_zeros(1)
            for x in slots.tensors():
                torch._dynamo.mark_static_address(x)
            # The step is compiled for each stretch of the cache that attention reads. Beyond its limit, 8 in all, the
            # compiler would give up without a word.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            mode = "reduce-overhead" if slots.ids.is_cuda else "default"        # CUDA graphs, where there is CUDA
            self.steps[shape] = torch.compile(Slots.step, mode=mode, dynamic=False), slots
        found = self.steps[shape]
        while len(self.steps) > KEPT or sum(x.nbytes for _, kept in self.steps.values() for x in kept.tensors()) > KEPT_BYTES:
            del self.steps[next(iter(self.steps))]
        return found

    def weights(self, model: GPT, dtype: torch.dtype) -> GPT:
        """`merged`, in the same memory at every call."""
        if is_merged(model, dtype):
            return model
        if self.cast is None or self.cast.head.weight.dtype != dtype:
            self.cast = merged(model, dtype)
        for mine, theirs in zip(linear_layers(self.cast), linear_layers(model), strict=True):
            if mine.weight is not theirs.weight:
                mine.weight.copy_(merged_weight(theirs))
        return self.cast


_compiled: weakref.WeakKeyDictionary[GPT, _Compiled] = weakref.WeakKeyDictionary()

# Rows, and the ids of what each has answered, without the stop token -> the ids of what it is told, or None
Observe = Callable[[list[int], list[list[int]]], list[list[int] | None]]


def _go_on(state: Slots, stopped: Tensor, observe: Observe, begins: Tensor, ends: Tensor, last_ends: Tensor,
           limits: Tensor) -> None:
    """Ask what is said to the answers that have just ended in the slots `stopped`, and let those rows go on.

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
    on = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if on else model.head.weight.dtype

    # The rollout, which so far holds the prompts, and the numbers that will draw its answers.
    prompt_ids, lengths = pad(prompts)                                                          # [P, W], [P]
    begins, limits, most = (x.repeat_interleave(G) for x in (lengths, torch.tensor(limits), torch.tensor(most)))        # [B]
    last_ends = begins + most
    ends = begins + limits.minimum(most)
    B, W, longest = P * G, prompt_ids.shape[1], int(last_ends.max())
    S = max(1, min(slots or B, B) // G) * G
    steps = int(most.max())                             # decoding steps of the longest row
    capacity, columns = W - 1 + steps, longest + 1
    if compile:         # rounded up, so that few shapes are compiled
        capacity, columns = (-(-n // 64) * 64 for n in (capacity, columns))
        kept = _compiled.setdefault(model, _Compiled())
        step, state = kept.slots(model.config, S, capacity, B, columns, device, dtype)
        decoder = kept.weights(model, dtype)
    else:
        step, state = Slots.step, Slots(model.config, S, W - 1 + min(steps, GROWTH), B, columns, device, dtype)
        decoder = merged(model, dtype)      # autocast would cast matrices again for every token
    u = uniforms(seed, B, steps, first_row) if temperature else torch.zeros(B, steps)
    at = (begins[:, None] + torch.arange(steps)).clamp(max=columns - 1)
    state.u.copy_(u.new_zeros(B, columns).scatter(1, at, u))
    prompt_ids = prompt_ids.to(device)
    state.tokens[:, :W] = prompt_ids.repeat_interleave(G, dim=0)
    # Greedy is the limit of a low temperature, and with u = 0 the first of the most likely tokens.
    state.temperature.fill_(temperature or 1e-30)
    state.goes_on.fill_(True)
    state.goes_on[sorted(stop_ids)] = False
    state.given.fill_(-1)

    prompt_lengths = lengths.repeat_interleave(G).to(device)
    # A row that waits for an observation would fill its cache with what it never says.
    check_every = 1 if observe else CHECK_EVERY.get(device.type, 1)
    free, next_row = torch.arange(S, device=device), 0      # slots without a row, and the first row that has had no slot
    for now in itertools.count():
        if len(free):
            rows = torch.arange(next_row, next_row + len(free))
            part, first = slice(next_row // G, (next_row + len(free)) // G), rows * columns
            answers = (first + lengths[rows // G]).to(device), (first + ends[rows] - 1).to(device)
            state.fill(free, decoder, prompt_ids[part, : lengths[part].max()], lengths[part].to(device), *answers)
            next_row += len(free)

        # The columns after the prompts are reused every `steps` steps: by then, the rows that wrote them are done.
        seen = W + min(now, steps - 1)
        column = W - 1 + now % steps
        if compile:
            state.cache.column.fill_(column)
        else:
            if column == state.cache.mask.shape[-1]:
                state.cache.grow(min(GROWTH, capacity - column))
            state.cache.column = slice(column, column + 1)
        state.cache.visible = min(capacity, max(64, 1 << (seen - 1).bit_length())) if compile else seen
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

    tokens, logp = state.tokens[:, :longest], state.logp[:, 1:longest]
    begins, ends = begins.to(device), ends.to(device)
    stops = ~state.goes_on[tokens] & F.pad(response_mask(begins, ends, longest), (1, 0))                # [B, T]
    finished = stops.any(-1)
    lengths = torch.where(finished, stops.int().argmax(-1) + 1, ends)
    T = int(lengths.max())
    tokens = tokens[:, :T].masked_fill(torch.arange(T, device=device) >= lengths[:, None], 0)
    mask = response_mask(prompt_lengths, lengths, T) & (state.given[:, 1:T] < 0)
    logp = logp[:, : T - 1].masked_fill(~mask, 0.0)
    if not logp.isfinite().all():
        raise FloatingPointError("a logit of the policy is nan or inf")
    return Rollout(tokens, prompt_lengths, lengths, mask, logp if temperature else torch.zeros_like(logp), finished,
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
    hidden, places = model.hidden_at(inputs, mask)                                              # [N, width]
    logp, entropy = linear_log_probs(hidden, model.head.weight, targets.flatten()[places], temperature,
                                     compile=model.compiled)
    return scatter(logp, places, targets.shape), scatter(entropy, places, targets.shape)
