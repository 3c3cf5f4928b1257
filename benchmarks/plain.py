"""What nanorl is compared with: a GPT-2, a Llama and the loops around them as they are usually written, in plain PyTorch.

GPT-2: LayerNorm, learned positions, one matrix for queries, keys and values, GELU, a tied head. Llama: nanorl's architecture,
RMSNorm, rotary positions by halves, SwiGLU. Logits at every position, `log_softmax` and `gather`, a cache that grows by
`torch.cat`, `torch.multinomial`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(C, dim=2))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln2(x)))), (k, v)


class GPT2(nn.Module):
    def __init__(self, vocab_size: int, context: int, layers: int, width: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 0.02)

    def forward(self, tokens: Tensor, past: list | None = None):
        """Logits [B, T, V] and the cache, a pair of keys and values for each block."""
        start = 0 if past is None else past[0][0].shape[2]
        x = self.tokens(tokens) + self.positions(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        now = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, None if past is None else past[i])
            now.append(kv)
        return self.head(self.norm(x)), now


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, mlp_width, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None):
        B, T, C = x.shape
        h = self.norm1(x)
        q, k, v = (part(h).view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (y * cos + rotate_half(y) * sin for y in (q, k))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), (k, v)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class Llama(nn.Module):
    def __init__(self, vocab_size: int, layers: int, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.head_dim = width // heads
        self.tokens = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, mlp_width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor, past: list | None = None):
        """Logits [B, T, V] and the cache, a pair of keys and values for each block."""
        start = 0 if past is None else past[0][0].shape[2]
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        frequencies = 10_000.0 ** (-torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim)
        angles = (positions[:, None] * frequencies).repeat(1, 2)
        x, cos, sin, now = self.tokens(tokens), angles.cos(), angles.sin(), []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, cos, sin, None if past is None else past[i])
            now.append(kv)
        return self.head(self.norm(x)), now


@torch.no_grad()
def generate(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """Every row reads its prompt, and goes on to the end.       [B, T] -> [B, T + new_tokens]"""
    tokens, past, step = prompts, None, prompts
    for _ in range(new_tokens):
        logits, past = model(step, past)
        step = torch.multinomial(torch.softmax(logits[:, -1], dim=-1), 1)
        tokens = torch.cat((tokens, step), dim=1)
    return tokens


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """[..., V], [...] -> [...]"""
    return F.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None]).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """[..., V] -> [...]"""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    """Next-token cross-entropy at every position."""
    logits, _ = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def grpo_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, prompt: int, advantages: Tensor,
              micro_batch: int) -> None:
    """GRPO's loss on whole sequences, a share of the rows at a time.       tokens [B, T], advantages [B]"""
    for t, a in zip(tokens.split(micro_batch), advantages.split(micro_batch), strict=True):
        logp = token_log_probs(model(t[:, :-1])[0], t[:, 1:])[:, prompt - 1 :]
        ratio = (logp - logp.detach()).exp()
        surrogate = torch.minimum(ratio * a[:, None], ratio.clamp(0.8, 1.2) * a[:, None])
        (-surrogate.mean(-1).sum() / len(tokens)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
