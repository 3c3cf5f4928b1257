"""The memory of a step of GRPO on real models, computed from their shapes:

    python -m benchmarks.memory                 the table of docs/real-models.md: 8 prompts x 8 answers, 64 + 48 tokens
    python -m benchmarks.memory --answer 1024 --micro-batch 1

What PyTorch allocates and this leaves out: 0.3 GB of the interpreter and its libraries, what the allocator keeps, and the
float32 that attention keeps for its backward pass in bfloat16 on a CPU.
"""

from dataclasses import dataclass

import torch

from nanorl import run
from nanorl.gpt import GPT, GPTConfig
from nanorl.ops import rows_of_logits

MODELS = {
    "SmolLM2-135M": GPTConfig(49_152, layers=30, width=576, heads=9, kv_heads=3, mlp_width=1536, tie_embeddings=True),
    "Qwen2.5-0.5B": GPTConfig(151_936, layers=24, width=896, heads=14, kv_heads=2, mlp_width=4864, qkv_bias=True,
                              tie_embeddings=True),
    "Qwen3-0.6B": GPTConfig(151_936, layers=28, width=1024, heads=16, kv_heads=8, head_dim=128, mlp_width=3072, qk_norm=True,
                            tie_embeddings=True),
    "Llama-3.2-1B": GPTConfig(128_256, layers=16, width=2048, heads=32, kv_heads=8, mlp_width=8192, tie_embeddings=True),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    prompts: run.Count = 8      # in a step
    group: run.Count = 8        # answers to each
    prompt: run.Count = 64      # tokens of a prompt
    answer: run.Count = 48      # tokens of an answer
    micro_batch: run.Count = 8  # answers, to as few prompts as possible, in memory at a time
    rank: run.Count = 16        # of adapters


def saved_per_token(config: GPTConfig, rank: int, bfloat16: bool) -> int:
    """Bytes that one block keeps of a token for the backward pass.

    In float32: what goes into and comes out of both norms, queries, keys, values, the answer of attention, and of the MLP both
    products, the SiLU of one and the product of the two. A norm whose gain is trained keeps its input once more, normalised;
    adapters keep A x. Under autocast the residual stream stays in float32, and queries and keys are kept in both.
    """
    d, q, kv = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    wide = 2 * d + (0 if rank else 2 * d) + (q + kv) * (bool(bfloat16 or config.qk_norm) + bool(config.qk_norm and not rank))
    narrow = 2 * d + 2 * q + 2 * kv + 4 * config.mlp_width + 7 * rank + (kv if bfloat16 else 0)
    return 4 * wide + (2 if bfloat16 else 4) * narrow


def step_memory(config: GPTConfig, cfg: Config, adapters: bool, kl: bool, bfloat16: bool) -> dict[str, float]:
    """Bytes of the parts of a step, and its peaks while it samples and while it updates."""
    with torch.device("meta"):
        model = GPT(config)
    matrices = [p for name, p in model.blocks.named_parameters() if p.ndim == 2]
    rank = cfg.rank if adapters else 0
    everything, size = model.num_parameters(), 2 if bfloat16 else 4
    trained = rank * sum(sum(p.shape) for p in matrices) if adapters else everything
    V, d, rows = config.vocab_size, config.width, min(cfg.prompts * cfg.group, 16 * cfg.micro_batch)     # rows: at a time
    parts = {"weights": size * everything + 4 * trained if adapters else 4 * everything,
             "reference": size * everything if kl and not adapters else 0,
             "gradients": 4 * trained, "moments": 8 * trained}
    held = parts["weights"] + parts["reference"] + parts["moments"]

    tokens = -(-cfg.micro_batch // cfg.group) * (cfg.prompt - 1) + cfg.micro_batch * cfg.answer     # a prompt is read once
    parts["activations"] = tokens * config.layers * saved_per_token(config, rank, bfloat16)
    scored = min(cfg.micro_batch * cfg.answer, rows_of_logits(V))
    parts["logits"] = 3 * 4 * scored * V + (0 if adapters else 2 * 4 * V * d)       # and the gradients of embedding and head
    columns = cfg.prompt - 1 + cfg.answer
    parts["cache"] = rows * columns * 2 * config.layers * config.kv_heads * config.head_dim * size
    copied = sum(p.numel() for p in matrices) * (adapters or bfloat16) + V * d * (bfloat16 and not adapters)
    parts["merged"] = size * copied
    return parts | {"sampling": held + parts["cache"] + parts["merged"] + 5 * 4 * min(rows, rows_of_logits(V)) * V,
                    "update": held + parts["gradients"] + parts["activations"] + parts["logits"]}


def table(cfg: Config) -> str:
    lines = ["| model | trained | KL | products in | weights and reference | gradients and moments | sampling | update |",
             "|---|---|---|---|--:|--:|--:|--:|"]
    for name, config in MODELS.items():
        for bfloat16 in (False, True):
            for adapters, kl in ((False, False), (False, True), (True, True)):
                m = step_memory(config, cfg, adapters, kl, bfloat16)
                sums = m["weights"] + m["reference"], m["gradients"] + m["moments"], m["sampling"], m["update"]
                lines.append(f"| {name} | {f'LoRA {cfg.rank}' if adapters else 'all'} | "
                             f"{'either' if adapters else 'yes' if kl else 'no'} | {'bfloat16' if bfloat16 else 'float32'} | "
                             + " | ".join(f"{x / 1e9:.2f}" for x in sums) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run.parse(Config)))
