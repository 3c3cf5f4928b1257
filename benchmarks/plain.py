"""What nanorl is held against: a GPT-2 and the loops around it as they are usually written, in plain PyTorch.

LayerNorm, learned positions, one matrix for queries, keys and values, GELU, a tied head; logits at every position,
`log_softmax` and `gather`, a cache that grows by `torch.cat`, `torch.multinomial`.
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


@torch.no_grad()
def generate(model: GPT2, prompts: Tensor, new_tokens: int) -> Tensor:
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


def train_step(model: GPT2, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    """Next-token cross-entropy at every position."""
    logits, _ = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def grpo_step(model: GPT2, optimizer: torch.optim.Optimizer, tokens: Tensor, prompt: int, advantages: Tensor,
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
