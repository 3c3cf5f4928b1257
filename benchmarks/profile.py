"""Where a step of GRPO spends its time at the shape of SmolLM2-135M, and the least that it could take:

    python -m benchmarks.profile        the table of docs/speed.md: 8 prompts x 8 answers, 64 + 48 tokens; five minutes

Seconds are one processor's, the least of two rounds: what else the machine does takes wall-clock time, and few of these. The
least that a part could take are its FLOPs at the speed of a large matrix product, or its bytes at that of a large copy.
"""

import time
from collections.abc import Iterator
from itertools import pairwise, product

import torch

from benchmarks.__main__ import forward_flops
from benchmarks.measure import ceilings, inside, machine
from benchmarks.memory import MODELS, Config
from nanorl import run
from nanorl.decode import read_prompts
from nanorl.gpt import GPT, GPTConfig
from nanorl.lora import adapt, merged
from nanorl.run.device import round_frozen
from nanorl.sample import generate, token_log_probs

CPU = torch.device("cpu")
PARTS = ("reading the prompts", "decoding", "scoring, if asked for", "forward and backward", "optimizer",
         "inside forward and backward: attention", "... matrix products", "... other operators")


def parts(config: GPTConfig, cfg: Config, dtype: str, adapters: bool, ceiling: dict[str, float]) -> Iterator[str]:
    """Of each part of a step its seconds, and what share of them the least is; then the shares inside the update."""
    model = GPT(config, run.generator(0, "benchmark"))
    if adapters:
        model = adapt(model, cfg.rank, 2 * cfg.rank, run.generator(0, "adapters"))
        round_frozen(model, dtype)
    optimizer, decoder = run.Optimizers(model, "adamw", 1e-4), merged(model, getattr(torch, dtype))
    prompts = torch.randint(config.vocab_size, (cfg.prompts, cfg.prompt), generator=run.generator(0, "prompts"))
    answers = torch.randint(config.vocab_size, (cfg.micro_batch, cfg.answer), generator=run.generator(0, "answers"))
    tokens = torch.cat((prompts.repeat_interleave(cfg.group, dim=0)[: cfg.micro_batch], answers), dim=1)
    mask = (torch.arange(tokens.shape[1] - 1) >= cfg.prompt - 1).expand(len(tokens), -1)

    def score() -> torch.Tensor:
        with run.autocast(CPU, dtype):
            return token_log_probs(model, tokens, mask)[0]

    def read() -> None:
        with run.autocast(CPU, dtype), torch.no_grad():
            read_prompts(decoder, prompts[:, :-1], getattr(torch, dtype))

    def sample() -> None:
        with run.autocast(CPU, dtype):
            generate(model, prompts.tolist(), max_new_tokens=cfg.answer, stop_ids=set(), samples_per_prompt=cfg.group)

    def update() -> None:
        score().sum().backward()

    works = read, sample, torch.no_grad()(score), update, lambda: optimizer.step(1e-4, 1.0)
    rounds = []
    for _ in range(2):
        clock = [time.process_time()]
        for work in works:
            work()
            clock.append(time.process_time())
        rounds.append([end - begun for begun, end in pairwise(clock)])
    first, both, *micro, step = map(min, zip(*rounds, strict=True))

    B, length, size = cfg.prompts * cfg.group, cfg.prompt + cfg.answer, 2 if dtype == "bfloat16" else 4
    reading, scored, times = cfg.prompts * (cfg.prompt - 1), B * cfg.answer, B / cfg.micro_batch
    cached = B * sum(range(cfg.prompt, length)) * 2 * config.layers * config.kv_heads * config.head_dim
    forward = forward_flops(model, reading + scored, scored, length)
    # With adapters, the gradients of the weights are left out; an optimizer reads four numbers of a weight and writes three.
    flops = (forward_flops(model, reading, 0, cfg.prompt), forward_flops(model, scored, scored, length), forward,
             (2 if adapters else 3) * forward, 0)
    moved = 0, size * (cfg.answer * model.num_parameters() + cached), 0, 0, 28 * sum(p.numel() for _, p in optimizer.named)
    for spent, f, b in zip((first, both - first, *(times * x for x in micro), step), flops, moved, strict=True):
        yield f"{spent:.2f} s, {max(f / ceiling[f'{dtype} FLOP/s'], b / ceiling['bytes/s']) / spent:.0%}"
    shares = inside(update, CPU)
    yield from (f"{share / sum(shares.values()):.0%}" for share in shares.values())


def table(config: GPTConfig, cfg: Config) -> str:
    ceiling = ceilings(CPU, 2.0, time.process_time)
    columns = [list(parts(config, cfg, *kind, ceiling)) for kind in product(("float32", "bfloat16"), (False, True))]
    lines = [f"| {' | '.join(cells)} |" for cells in zip(PARTS, *columns, strict=True)]
    said = ", ".join(f"{name} {value:.3g}" for name, value in ceiling.items())
    return "\n".join([said, "", "| | float32 | ... adapters | bfloat16 | ... adapters |", "|---|--:|--:|--:|--:|", *lines])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in machine(CPU).items()))
    print(table(MODELS["SmolLM2-135M"], run.parse(Config)))
