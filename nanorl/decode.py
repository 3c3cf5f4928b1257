"""One step of sampling, for many rows at a time: from logits to tokens, and the slots that hold the rows.

`generate` in nanorl/sample.py has the loop around it.
"""

import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanorl.gpt import GPT, GPTConfig, KVCache
from nanorl.lora import is_merged, linear_layers, merged, merged_weight
from nanorl.ops import cumulative_sum, log_softmax, rows_of_logits

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
# Slots
# ---------------------------------------------------------------------------------------------------------------------

READ_AT_ONCE = 2**24    # activations of an MLP while prompts are read
SHARED_AT_LEAST = 64    # tokens that prompts must have in common to be read once
GROWTH = 64             # columns after the prompts that the cache of eager decoding has at first, and grows by as they fill up


def read_prompts(model: GPT, prompts: Tensor, dtype: torch.dtype) -> KVCache:
    """A cache that has read these prompts [P, T]. A long beginning of all of them, such as few-shot examples, is read once."""
    (P, T), prefix = prompts.shape, 0
    if P > 1 and T > SHARED_AT_LEAST:
        prefix = min(T - 1, int((prompts == prompts[0]).all(0).cumprod(0).sum()))
    cache = KVCache(model.config, P, T, prompts.device, dtype)
    if prefix >= SHARED_AT_LEAST:
        shared = read_prompts(model, prompts[:1, :prefix], dtype)
        shared.length += prefix
        cache.put(torch.arange(P, device=prompts.device), shared)
        cache.column, cache.visible = slice(prefix, T), T
        model.hidden(prompts[:, prefix:], cache)
    elif T:
        model.hidden(prompts, cache)
    return cache


class Slots:
    """All that a decoding step reads and writes: a row of the rollout in each slot. Only `keep` moves it in memory.

    A place is an index into the flattened rollout [B, T + 1]. A row that is done goes on writing at the place after its last
    token, where everything is discarded, until its slot is taken.
    """

    def __init__(self, config: GPTConfig, slots: int, capacity: int, rows: int, columns: int, device: torch.device,
                 dtype: torch.dtype, first: int | None = None):
        """`first`: how many columns the cache has at first, if fewer than `capacity`."""
        self.cache, self.capacity = KVCache(config, slots, min(capacity, first or capacity), device, dtype), capacity
        self.tokens = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self.logp, self.u = (torch.zeros(rows, columns, device=device) for _ in range(2))       # u draws the token that is here
        self.given = torch.full_like(self.tokens, -1)       # ids that stand here, of an observation; -1: the token is drawn
        self.ids, self.place, self.last = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(3))
        self.alive = torch.zeros(slots, dtype=torch.bool, device=device)        # has neither stopped nor filled its last place
        self.goes_on = torch.ones(config.vocab_size, dtype=torch.bool, device=device)           # False for stop tokens
        self.temperature = torch.ones((), dtype=torch.promote_types(dtype, torch.float32), device=device)

    def begin(self, prompts: Tensor, begins: Tensor, u: Tensor, temperature: float, stop_ids: set[int]) -> None:
        """A new rollout of prompts [B, W], whose answers begin at begins [B] and are drawn by u [B, steps]; all on the CPU."""
        at = (begins[:, None] + torch.arange(u.shape[1])).clamp(max=self.u.shape[1] - 1)
        self.u.copy_(u.new_zeros(self.u.shape).scatter(1, at, u))
        self.tokens[:, : prompts.shape[1]] = prompts.to(self.tokens.device)
        self.given.fill_(-1)
        # Greedy is the limit of a low temperature, and with u = 0 the first of the most likely tokens.
        self.temperature.fill_(temperature or 1e-30)
        self.goes_on.fill_(True)
        self.goes_on[sorted(stop_ids)] = False

    def fill(self, free: Tensor, model: GPT, rows: Tensor, begins: Tensor, ends: Tensor, samples: int) -> None:
        """Put these rows into the free slots. Each `samples` of them have one prompt, which is read once.

        rows, begins and ends of their answers [len(free)] are on the CPU. The last token of a prompt is not read yet: it is the
        first to be fed.
        """
        prompts = self.tokens[rows[::samples].to(free.device), : begins.max()]              # [P, W]
        lengths = begins[::samples].to(free.device)
        size = max(1, READ_AT_ONCE // (prompts.shape[1] * model.config.mlp_width))          # prompts to read at a time
        for part, n, slots in zip(prompts.split(size), lengths.split(size), free.split(size * samples), strict=True):
            read = read_prompts(model, part[:, :-1], self.cache.mask.dtype)
            read.length = n - 1
            self.cache.put(slots, read)
        self.ids[free] = prompts.gather(1, lengths[:, None] - 1).squeeze(-1).repeat_interleave(samples)
        first = rows * self.tokens.shape[1]
        self.place[free], self.last[free] = (first + begins).to(free.device), (first + ends - 1).to(free.device)
        self.alive[free] = True

    def open_column(self, column: int, seen: int) -> None:
        """The next step writes this column of the cache, and attends to the first `seen`."""
        cache = self.cache
        if isinstance(cache.column, Tensor):        # of a compiled step, whose tensors stay in place and have few shapes
            cache.column.fill_(column)
            cache.visible = min(self.capacity, max(64, 1 << (seen - 1).bit_length()))
            return
        if column == cache.mask.shape[-1]:
            cache.grow(min(GROWTH, self.capacity - column))
        cache.column, cache.visible = slice(column, column + 1), seen

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


# ---------------------------------------------------------------------------------------------------------------------
# Compiled
# ---------------------------------------------------------------------------------------------------------------------

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


def engine(model: GPT, slots: int, prompt: int, steps: int, rows: int, columns: int,
           compile: bool) -> tuple[Callable, Slots, GPT]:
    """A decoding step; the slots that it works on, for so many columns of prompts and steps, and a rollout [rows, columns]; and
    the model that it runs, with merged matrices, in autocast's dtype."""
    device, capacity = model.head.weight.device, prompt + steps
    on = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if on else model.head.weight.dtype
    if not compile:
        state = Slots(model.config, slots, capacity, rows, columns, device, dtype, first=prompt + GROWTH)
        return Slots.step, state, merged(model, dtype)      # autocast would cast matrices again for every token
    kept = _compiled.setdefault(model, _Compiled())
    capacity, columns = (-(-n // 64) * 64 for n in (capacity, columns))         # so that few shapes are compiled
    return *kept.slots(model.config, slots, capacity, rows, columns, device, dtype), kept.weights(model, dtype)
