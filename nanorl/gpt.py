"""A GPT in one file: embeddings, rotary positions, attention, gated MLP, key-value cache, scalar head.

The block is Llama's and Qwen's: RMSNorm before each sublayer, rotary positions, grouped-query attention, SwiGLU, no
dropout. Reading order: GPTConfig, GPT.hidden, Block, Attention. There is no loss and no optimizer in here.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanorl.ops import log_softmax
from nanorl.prefixes import share_prefixes


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    context: int = 256          # longest sequence, in tokens
    layers: int = 4
    width: int = 128            # of the residual stream
    heads: int = 4
    kv_heads: int | None = None  # fewer than heads is grouped-query attention; None is as many
    head_dim: int | None = None  # None is width / heads
    mlp_width: int | None = None  # None is 8/3 of width, rounded up to a multiple of 32
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_base: float = 10_000.0
    rope_scaling: tuple[float, float, float, float] | None = None    # of Llama 3.1: see llama3_frequencies
    qk_norm: bool = False       # RMSNorm on queries and keys, per head: Qwen3's
    qkv_bias: bool = False      # biases of queries, keys and values: Qwen2's
    norm_eps: float = 1e-6      # of every RMSNorm
    tie_embeddings: bool = False  # the output head is the embedding matrix

    def __post_init__(self):
        uneven = self.head_dim is None and self.width % max(1, self.heads)
        derived = {"kv_heads": self.heads, "head_dim": self.width // max(1, self.heads),
                   "mlp_width": -(-self.width * 8 // (3 * 32)) * 32}
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("vocab_size", "context", "layers", "width", "heads", *derived):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if uneven or self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width} and be a multiple of "
                             f"kv_heads={self.kv_heads}")
        if self.positions not in ("rope", "learned", "none"):
            raise ValueError(f"positions={self.positions!r} is none of rope, learned, none")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of coordinates: head_dim={self.head_dim} must be even")


PRESETS = {
    "pico": dict(context=256, layers=3, width=64, heads=4),                                   # a quarter of nano: a student
    "nano": dict(context=256, layers=4, width=128, heads=4),                                  # under 1 M parameters
    "micro": dict(context=256, layers=6, width=256, heads=8),                                 # 5 M
    "mini": dict(context=512, layers=8, width=512, heads=8),                                  # 26 M
    "gpt2": dict(context=1024, layers=12, width=768, heads=12, tie_embeddings=True),          # 124 M with gpt2's tokens
}


# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


def llama3_frequencies(theta: Tensor, factor: float, low: float, high: float, trained: float) -> Tensor:
    """Rotary frequencies for `factor` times the context that a model was trained on first.       (Llama 3.1)

        s theta + (1 - s) theta / factor,       s = clamp( (trained theta / 2 pi - low) / (high - low), 0, 1 )

    What turns at least `high` times within that context stays, what turns less than `low` times slows down by the factor.
    """
    return torch.lerp(theta / factor, theta, ((trained * theta / (2 * math.pi) - low) / (high - low)).clamp(0, 1))


def rope_angles(positions: Tensor, head_dim: int, base: float = 1e4, scaling: tuple | None = None) -> tuple[Tensor, Tensor]:
    """cos and signed sin of the angles m theta_i, theta_i = base^(-2i / D), of both coordinates of each pair.

        cos = (cos m theta, cos m theta)          sin = (-sin m theta, sin m theta)          [...] -> two of [..., D]
    """
    theta = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    theta = theta if scaling is None else llama3_frequencies(theta, *scaling)
    cos, sin = (f(positions[..., None] * theta) for f in (torch.cos, torch.sin))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turn each pair (x_i, x_{i+D/2}) by the angle m theta_i.       (Su et al. 2021, eq. 34)

        R_m x = (x_1 cos - x_2 sin,  x_2 cos + x_1 sin) = (x_1, x_2) * (cos, cos) + (x_2, x_1) * (-sin, sin)

    x [..., D]; cos, sin [..., D] from rope_angles. Norms stay; <R_m q, R_n k> depends on m - n only; position 0 turns nothing.
    The paper pairs neighbours (x_2i, x_2i+1). Pairing halves, as GPT-NeoX does, is the same but for the order of the
    coordinates, and needs no interleaving.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, written out. The model uses the three below.    (Vaswani et al. 2017, eq. 1)

    q [B, H, T, D]; k, v [B, Hkv, S, D]: each key head serves H / Hkv query heads. mask, broadcastable to [B, H, T, S],
    is True where a query may attend; None is causal: query t attends to keys 0..t. Returns [B, H, T, D].
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                     # [B, H, T, S]
    weights = log_softmax(scores.masked_fill(~mask, -torch.inf)).exp()            # rows sum to 1
    return weights.to(v.dtype) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same function as `attention`, by PyTorch's kernels, most of which never hold the [T, S] scores.

    mask may also be what is added to the scores, 0 or -inf: the kernels make that of a bool mask at every call.
    """
    if v.is_cpu and v.requires_grad and v.dtype == torch.bfloat16:      # PyTorch takes four times as long backward
        with torch.autocast("cpu", enabled=False):
            return fused_attention(q.float(), k.float(), v.float(), mask if mask is None else mask.float()).to(v.dtype)
    if mask is not None and q.is_cuda:      # there, no kernel knows a mask and shared key heads: PyTorch would hold the scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])


def decoding_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same function for the one query of a decoding step, as weighted sums.

    torch.compile makes a few loops of them, without a product's call for each row and head: on a CPU, a compiled step takes
    0.6 to 0.75 of its time with `fused_attention`. q [B, H, 1, D]; mask [B, 1, 1, S] is what is added to the scores.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q * k).sum(-1) / math.sqrt(q.shape[-1]) + mask[:, :, 0]             # [B, H, S]
    weights = log_softmax(scores).exp()[..., None]
    return (weights * v).sum(2, keepdim=True).to(v.dtype)


def shared_attention(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, mask: Tensor) -> Tensor:
    """Causal attention within a `Shared` sequence: a prefix attends to itself, a row to its prefix and to itself.

    q, k, v [1, N, H or Hkv, D], N = P Tp + B Ta -> [1, N, H, D]
    """
    B, Ta, Tp = len(prefix), mask.shape[2], mask.shape[3] - mask.shape[2]
    prefixes, rows = zip(*(x[0].split((len(x[0]) - B * Ta, B * Ta)) for x in (q, k, v)), strict=True)
    q_prefix, k_prefix, v_prefix = (rearrange(x, "(p t) h d -> p h t d", t=Tp) for x in prefixes)
    q, k, v = (rearrange(x, "(b t) h d -> b h t d", t=Ta) for x in rows)
    k, v = (torch.cat((shared.index_select(0, prefix), own), dim=2) for shared, own in ((k_prefix, k), (v_prefix, v)))
    parts = fused_attention(q_prefix, k_prefix, v_prefix), fused_attention(q, k, v, mask)
    return torch.cat([rearrange(y, "b h t d -> (b t) h d") for y in parts])[None]


class KVCache:
    """Keys and values of the tokens seen so far, so that the next token costs one position instead of all of them.

    keys, values: for each layer [B, Hkv, capacity, D]. A column holds one token of every row: prompts begin in column 0, and
    each decoding step writes one column after them, of all rows, wherever their prompts ended. Where a row has no token, `mask`
    [B, 1, 1, capacity], which is added to the scores, is -inf. length [B] is the position of each row's next token. The caller
    chooses the columns and counts the lengths.
    """

    def __init__(self, config: GPTConfig, rows: int, capacity: int, device=None, dtype=None):
        shape = (rows, config.kv_heads, capacity, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
                                  for _ in range(2))
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.mask = torch.full((rows, 1, 1, capacity), -torch.inf, device=device, dtype=dtype)
        self.column: slice | Tensor = slice(0, 1)       # where the next step writes; compiled, in a tensor [1] of fixed address
        self.visible = 0        # a step attends to so many columns; 0 is an empty cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v [B, Hkv, T, D], and attend: causally within these, and to all that the row had before."""
        keys, values, visible = self.keys[layer], self.values[layer], self.visible
        for memory, x in ((keys, k), (values, v)):
            memory[:, :, self.column if visible else slice(k.shape[2])] = x.to(memory.dtype)
        if not visible:
            return fused_attention(q, k, v)
        keys, values, mask, T = keys[:, :, :visible], values[:, :, :visible], self.mask[..., :visible], q.shape[2]
        if T > 1:       # the last columns are theirs, and none attends to those after it
            later = torch.ones(T, visible, dtype=torch.bool, device=q.device).triu(visible - T + 1)
            return fused_attention(q, keys, values, mask.masked_fill(later, -torch.inf))
        return (decoding_attention if torch.compiler.is_compiling() else fused_attention)(q, keys, values, mask)

    def put(self, rows: Tensor, other: "KVCache") -> None:
        """Start these rows over with the prompts that `other` has read, each repeated for as many of the rows."""
        times, width = len(rows) // len(other.length), other.mask.shape[-1]
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for x, y in zip(mine, theirs, strict=True):
                x[:, :, :width].index_copy_(0, rows, y.repeat_interleave(times, dim=0))
                x[:, :, width:].index_fill_(0, rows, 0.0)       # there may be nan, which even a weight of 0 would let through
        length = other.length.repeat_interleave(times)
        empty = torch.arange(self.mask.shape[-1], device=rows.device) >= length[:, None, None, None]
        self.length.index_copy_(0, rows, length)
        self.mask.index_copy_(0, rows, self.mask.new_zeros(empty.shape).masked_fill(empty, -torch.inf))
        self.visible = max(self.visible, width)

    def grow(self, columns: int) -> None:
        """By so many columns, which are empty."""
        for part in (self.keys, self.values):
            for layer, x in enumerate(part):
                part[layer] = F.pad(x, (0, 0, 0, columns))
        self.mask = F.pad(self.mask, (0, columns), value=-torch.inf)

    def keep(self, rows: Tensor) -> None:
        """Only these rows: their keys and values move to the front of the same memory."""
        seen, count = slice(0, self.visible), len(rows)
        for part in (self.keys, self.values):
            for layer, x in enumerate(part):
                x[:count, :, seen] = x[rows, :, seen]
                part[layer] = x[:count]
        self.length, self.mask = self.length[rows], self.mask[rows]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.layer = config.heads, config.kv_heads, config.head_dim, layer
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.width, n, bias=config.qkv_bias) for n in (queries, keys, keys))
        self.out = nn.Linear(queries, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope, cache: KVCache | None, shared: tuple | None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v))     # [B, T, H or Hkv, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(torch.cat((q, k), dim=2), *rope).split((self.heads, self.kv_heads), dim=2)
        if shared is not None:
            y = shared_attention(q, k, v, *shared)
        else:
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))                                # [B, H, T, D]
            y = (fused_attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)).transpose(1, 2)
        return self.out(y.flatten(2))


class MLP(nn.Module):
    """SwiGLU: down( silu(gate x) * up x ).                                            (Shazeer 2020, eq. 6)"""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + Attention(norm x), then x + MLP(norm x)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(config.width, config.norm_eps), Attention(config, layer)
        self.mlp_norm, self.mlp = nn.RMSNorm(config.width, config.norm_eps), MLP(config)

    def forward(self, x: Tensor, rope, cache: KVCache | None = None, shared: tuple | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache, shared)
        return x + self.mlp(self.mlp_norm(x))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """tokens -> embeddings -> blocks -> norm -> logits. Logits at position t score token t + 1.

    A parameter that you add with one dimension keeps its initial values, and is neither decayed nor updated by Muon. One with
    two is a matrix: `_initialise` draws it, and Muon, where it is chosen, makes its updates orthogonal.
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.recompute = False      # keep the activations of a block, or compute them again in the backward pass
        self.compiled = False       # by run.compile_for_training: the blocks, and the log-probs that the head gives
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.complete()
        self._initialise(generator)

    def complete(self) -> None:
        """What is neither learned nor saved: the table of rotary angles, and that a tied head is the embedding matrix."""
        config = self.config
        if config.positions == "rope":
            angles = rope_angles(torch.arange(config.context), config.head_dim, config.rope_base, config.rope_scaling)
            self.register_buffer("rope", torch.stack(angles, dim=1)[:, :, None], persistent=False)  # [context, 2, 1, D]
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialise(self, generator: torch.Generator | None) -> None:
        """Embeddings of variance 1, and matrices of variance 1 / fan-in: what goes in with variance 1 comes out so. What writes
        into the residual stream is scaled by 1/sqrt(2 layers), so that its variance does not grow with depth. The head, and
        embeddings that are tied to it, start small: a fresh model predicts almost uniformly, and its loss is close to log V."""
        std = {"embedding.weight": 0.02 if self.config.tie_embeddings else 1.0, "head.weight": 0.02}
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                fan_in = weight.shape[1] * (2 * self.config.layers if residual else 1)
                nn.init.normal_(weight, std=std.get(name, fan_in**-0.5), generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm.       tokens [B, T] int64 -> [B, T, width]

        Without a cache, whole sequences, causally; an empty cache keeps their keys and values. With a filled one, `tokens` are
        the next of each row, from position cache.length on.
        """
        if cache is not None and cache.visible:
            cache.mask[..., cache.column] = 0.0
            return self._blocks(tokens, cache.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device), cache)
        length, limit = tokens.shape[1], self.config.context
        if length > limit:
            raise ValueError(f"a sequence of {length} tokens does not fit the model's context of {limit}")
        return self._blocks(tokens, slice(length), cache)

    def hidden_at(self, tokens: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden(tokens)[where] [N, width], and the places of these N in a flattened [B, T].       tokens, where [B, T]

        Rows may be alike up to their first True. Where it pays, such a prefix is read once: samples of one prompt share it.
        Without `where`, all positions.
        """
        if where is None:
            return self.hidden(tokens).flatten(0, 1), torch.arange(tokens.numel(), device=tokens.device)
        host, chosen = torch.stack((tokens, where)).cpu().numpy()                           # the one wait for the device
        places = torch.from_numpy(chosen.ravel().nonzero()[0]).to(tokens.device)            # [N]
        if (found := share_prefixes(host, chosen.astype(bool), self.embedding.weight)) is None:
            return self.hidden(tokens).flatten(0, 1).index_select(0, places), places
        hidden = self._blocks(found.tokens, found.positions, shared=(found.prefix, found.mask))
        return hidden[0].index_select(0, found.wanted), places

    def _blocks(self, tokens: Tensor, positions: Tensor | slice, cache: KVCache | None = None,
                shared: tuple | None = None) -> Tensor:
        """tokens [B, T], and where in their sequences they are -> [B, T, width]"""
        x, rope = self.embedding(tokens).to(self.norm.weight.dtype), None
        if self.config.positions == "learned":
            x = x + self.position_embedding.weight[positions]
        elif self.config.positions == "rope":
            rope = self.rope[positions].unbind(-3)                                          # two of [..., T, 1, D]
        for block in self.blocks:
            # A block may have been compiled for training; with a cache, the engine compiles the whole step instead.
            run = block if cache is None else block.forward
            if self.recompute and torch.is_grad_enabled():
                run = functools.partial(checkpoint, run, use_reentrant=False)
            x = run(x, rope, cache, shared)
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Next-token logits.       tokens [B, T] -> [B, T, V]"""
        return self.head(self.hidden(tokens, cache))

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def training_flops_per_token(self, T: int) -> int:
        """Forward and backward, per token of a sequence of T: 6 per weight of a matrix product, and 12 T heads head_dim a
        layer for the two products of attention (halved: causal).       (Chowdhery et al. 2022, appendix B)"""
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and "embedding" not in name)
        if self.config.tie_embeddings:
            matrices += self.head.weight.numel()
        return 6 * matrices + 6 * self.config.layers * self.config.heads * self.config.head_dim * T


def scatter(x: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """x [N] at these places of a flattened tensor of this shape, and 0 elsewhere."""
    return x.new_zeros(shape.numel()).index_copy(0, places, x).view(shape)


class ScalarGPT(nn.Module):
    """A GPT trunk with one number per position in place of logits: a reward or a value.       tokens [B, T] -> [B, T]

    The head starts at zero, so that a fresh one says nothing. It computes in float32 under autocast, too: in bfloat16, with 8
    bits, many different rewards would be equal.
    """

    def __init__(self, trunk: GPT):
        super().__init__()
        self.config = trunk.config
        self.trunk = trunk
        self.scalar = nn.Linear(trunk.config.width, 1)
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(self, tokens: Tensor, where: Tensor | None = None) -> Tensor:
        """`where` [B, T] bool: at these positions only, and 0 at the others."""
        hidden, places = self.trunk.hidden_at(tokens, where)
        with torch.autocast(hidden.device.type, enabled=False):
            return scatter(self.scalar(hidden).squeeze(-1), places, tokens.shape)

    def at_end(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The number at each row's last token, whatever comes after it.       tokens [B, T], lengths [B] -> [B]"""
        return self(tokens).gather(-1, lengths[:, None] - 1).squeeze(-1)
