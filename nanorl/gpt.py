"""A GPT in one file: embeddings, rotary positions, attention, gated MLP, key-value cache, scalar head.

The block is Llama's and Qwen's: RMSNorm before each sublayer, rotary positions, grouped-query attention, SwiGLU, no
biases, no dropout. Reading order: GPTConfig, GPT.hidden, Block, Attention. There is no loss and no optimizer in here.
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


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    context: int = 256          # longest sequence, in tokens
    layers: int = 4
    width: int = 128            # of the residual stream
    heads: int = 4
    kv_heads: int | None = None  # fewer than heads is grouped-query attention; None is as many
    mlp_width: int | None = None  # None is 8/3 of width, rounded up to a multiple of 32
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_base: float = 10_000.0
    qk_norm: bool = False       # RMSNorm on queries and keys, per head
    tie_embeddings: bool = False  # the output head is the embedding matrix

    def __post_init__(self):
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.mlp_width is None:
            object.__setattr__(self, "mlp_width", -(-self.width * 8 // (3 * 32)) * 32)
        for name in ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width} and be a multiple of "
                             f"kv_heads={self.kv_heads}")
        if self.positions not in ("rope", "learned", "none"):
            raise ValueError(f"positions={self.positions!r} is none of rope, learned, none")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of coordinates: width/heads={self.head_dim} must be even")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


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


def rope_angles(positions: Tensor, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles m theta_i, theta_i = base^(-2i / D).       [...] -> two of [..., D/2]"""
    theta = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[..., None] * theta
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turn each pair (x_i, x_{i+D/2}) by the angle m theta_i.       (Su et al. 2021, eq. 34)

        R_m x = (x_1 cos - x_2 sin,  x_2 cos + x_1 sin)

    x [B, H, T, D]; cos, sin [..., T, D/2]. Norms stay; <R_m q, R_n k> depends on m - n only; position 0 turns nothing.
    The paper pairs neighbours (x_2i, x_2i+1). Pairing halves, as GPT-NeoX does, is the same but for the order of the
    coordinates, and needs no interleaving.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, written out.                                   (Vaswani et al. 2017, eq. 1)

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
    """The same function as `attention`, by PyTorch's kernels, which never hold the [T, S] scores. The model uses it.

    mask may also be what is added to the scores, 0 or -inf: the kernels make that of a bool mask at every call.
    """
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


class KVCache:
    """Keys and values of the tokens seen so far, so that the next token costs one position instead of all of them.

    keys, values: for each layer [B, Hkv, capacity, D]; length [B] is each row's write position, the position of its next
    token. Rows are left-aligned and may differ in length: what is stored at or beyond a row's length is never attended to.
    """

    def __init__(self, config: GPTConfig, rows: int, capacity: int, device=None, dtype=None):
        shape = (rows, config.kv_heads, capacity, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
                                  for _ in range(2))
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.visible = 0        # attention reads so many positions, whatever the rows' lengths

    def addresses(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """These positions of all rows and heads, as indices of a layer's memory.

        [B, T] -> [B, 1, 1], [Hkv, 1], [B, 1, T]
        """
        rows, heads = (torch.arange(n, device=positions.device) for n in self.keys[0].shape[:2])
        return rows[:, None, None], heads[:, None], positions[:, None]

    def write(self, layer: int, addresses: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v [B, Hkv, T, D] there; return all that `layer` has, [B, Hkv, visible, D] each."""
        keys, values = self.keys[layer], self.values[layer]
        for memory, x in ((keys, k), (values, v)):
            memory[addresses] = x.to(memory.dtype)      # of a view of it, torch.compile in PyTorch 2.11 would copy everything
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def put(self, rows: Tensor, other: "KVCache") -> None:
        """Start these rows over with what `other` has seen: its first row goes to the first of them, as many to each."""
        times, seen = len(rows) // len(other.length), other.visible
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for x, y in zip(mine, theirs, strict=True):
                x[rows, :, :seen] = y[:, :, :seen].repeat_interleave(times, dim=0)
                x[rows, :, seen:] = 0.0     # what stood there may be nan, which even a weight of 0 would let through
        self.length[rows] = other.length.repeat_interleave(times)
        self.visible = max(self.visible, seen)

    def keep(self, rows: Tensor) -> None:
        """Only these rows: they move to the front of the same memory."""
        seen, count = slice(0, self.visible), len(rows)
        for part in (self.keys, self.values):
            for layer, x in enumerate(part):
                x[:count, :, seen] = x[rows, :, seen]
                part[layer] = x[:count]
        self.length = self.length[rows]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.layer = config.heads, config.kv_heads, layer
        self.q = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: KVCache | None, addresses: tuple | None) -> Tensor:
        q = self.q_norm(rearrange(self.q(x), "b t (h d) -> b h t d", h=self.heads))
        k = self.k_norm(rearrange(self.k(x), "b t (h d) -> b h t d", h=self.kv_heads))
        v = rearrange(self.v(x), "b t (h d) -> b h t d", h=self.kv_heads)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.write(self.layer, addresses, k, v)
        decoding = cache is not None and q.shape[2] == 1 and torch.compiler.is_compiling()
        attend = decoding_attention if decoding else fused_attention
        return self.out(rearrange(attend(q, k, v, mask), "b h t d -> b t (h d)"))


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
        self.attention_norm, self.attention = nn.RMSNorm(config.width, eps=1e-6), Attention(config, layer)
        self.mlp_norm, self.mlp = nn.RMSNorm(config.width, eps=1e-6), MLP(config)

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: KVCache | None, addresses: tuple | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, addresses)
        return x + self.mlp(self.mlp_norm(x))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """tokens -> embeddings -> blocks -> norm -> logits. Logits at position t score token t + 1."""

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.recompute = False      # keep the activations of a block, or compute them again in the backward pass
        self.compiled = False       # by run.compile_for_training: the blocks, and the log-probs that the head gives
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator | None) -> None:
        """Normal weights of variance 1 / fan-in: what goes in with variance 1 comes out so. What writes into the residual
        stream is scaled by 1/sqrt(2 layers), so that its variance does not grow with depth. The head starts small: a
        fresh model has hardly an opinion, and its loss is close to log V."""
        std = {"embedding.weight": 0.02 if self.config.tie_embeddings else 1.0, "head.weight": 0.02}
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                fan_in = weight.shape[1] * (2 * self.config.layers if residual else 1)
                nn.init.normal_(weight, std=std.get(name, fan_in**-0.5), generator=generator)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm.       tokens [B, T] int64 -> [B, T, width]

        Without a cache: the whole sequences, causally. With one: `tokens` continue each row at its own cache.length,
        see everything before them and are written into the cache.
        """
        T = tokens.shape[1]
        x = self.embedding(tokens)                                                          # [B, T, width]
        positions, mask, addresses, longest = torch.arange(T, device=tokens.device)[None], None, None, T     # [1, T]
        if cache is not None:
            positions = cache.length[:, None] + positions                                   # [B, T]
            addresses = cache.addresses(positions)
            cache.length += T
            cache.visible += T
            longest = cache.visible
            unseen = torch.arange(longest, device=tokens.device) > positions[:, None, :, None]   # [B, 1, T, visible]
            mask = x.new_zeros(unseen.shape).masked_fill(unseen, -torch.inf)                # added to the scores
        if longest > self.config.context:
            raise ValueError(f"a sequence of {longest} tokens does not fit the model's context of {self.config.context}")

        rope = None
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        elif self.config.positions == "rope":
            rope = rope_angles(positions[:, None], self.config.head_dim, self.config.rope_base)  # two of [B, 1, T, D/2]
        for block in self.blocks:
            # A block may have been compiled for training; with a cache, the engine compiles the whole step instead.
            run = block if cache is None else block.forward
            if self.recompute and torch.is_grad_enabled():
                run = functools.partial(checkpoint, run, use_reentrant=False)
            x = run(x, rope, mask, cache, addresses)
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Next-token logits.       tokens [B, T] -> [B, T, V]"""
        return self.head(self.hidden(tokens, cache))

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def training_flops_per_token(self, T: int) -> int:
        """Forward and backward, per token of a sequence of T: 6 per weight of a matrix product, and 12 T width a layer
        for the two products of attention (halved: causal).       (Chowdhery et al. 2022, appendix B)"""
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and "embedding" not in name)
        if self.config.tie_embeddings:
            matrices += self.head.weight.numel()
        return 6 * matrices + 6 * self.config.layers * self.config.width * T


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

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.trunk.hidden(tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.scalar(hidden).squeeze(-1)

    def at_end(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The number at each row's last token, whatever comes after it.       tokens [B, T], lengths [B] -> [B]"""
        return self(tokens).gather(-1, lengths[:, None] - 1).squeeze(-1)
