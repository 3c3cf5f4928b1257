"""How fast is it, and against what?

    python -m benchmarks                        all groups, on this machine's CPU or GPU: some minutes
    python -m benchmarks --only generate grpo   some of them
    python -m benchmarks --smoke                every line once, tiny: a minute, and the numbers mean nothing
    python -m benchmarks --out FILE.json        kept, with the machine, the versions and the date

group        what is timed
pretrain     a training step on next tokens
generate     sampling answers to prompts, none of which stops early
grpo         a step of GRPO on answers of full length, and its parts
atoms        the log-prob and the entropy of a token, forward and backward, with their memory
memory       the memory that a training step of each preset needs
learn        python train_grpo.py from nothing, and what it took until the reward in training was 0.9

`plain` is the same work as it is usually written (benchmarks/plain.py), in the same run: a ratio of 2 is half its time. The
roofline is the least time that the FLOPs or the bytes of the work need at this machine's ceilings, which are measured first.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain
from benchmarks.measure import ceilings, machine, median_ratio, peak_memory, race
from nanorl import run
from nanorl.gpt import GPT, PRESETS, GPTConfig
from nanorl.ops import entropy_from_logits, linear_log_probs, selective_log_softmax, token_weights
from nanorl.plot import read_metrics, reward_by_tokens
from nanorl.sample import Rollout, generate, token_log_probs
from train_grpo import objective as grpo_objective
from train_pretrain import objective as pretrain_objective

ROOT = Path(__file__).resolve().parent.parent
Group = Literal["pretrain", "generate", "grpo", "atoms", "memory", "learn"]


@dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[Group, ...] = ("pretrain", "generate", "grpo", "atoms", "memory", "learn")    # see the table above
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"    # auto takes cuda, then mps, then cpu
    seconds: run.Positive = 6.0  # for each line, after a round to warm up
    compile: bool = True        # also what torch.compile makes of it
    smoke: bool = False         # tiny sizes and one round: does it run?
    out: str = ""               # JSON file for the results
    memory_of: str = ""         # for itself: print the memory of one candidate of `atoms` or `memory`


@dataclass
class Row:
    """A line of the table: one candidate at one piece of work."""

    group: str
    work: str
    who: str
    seconds: float | None = None
    rate: float | None = None           # tokens per second
    ratio: float | None = None          # how many times as long `plain` takes
    share: float | None = None          # of the time that the roofline allows at least
    memory: float | None = None         # bytes beyond what is there before
    tokens: float | None = None         # answer tokens that were sampled for it


def model_of(vocab_size: int, device: torch.device, **shape) -> GPT:
    return GPT(GPTConfig(vocab_size, **PRESETS["nano"] | shape), run.generator(0, "benchmark")).to(device)


def plain_of(vocab_size: int, device: torch.device, **shape) -> plain.GPT2:
    shape = PRESETS["nano"] | shape
    return plain.GPT2(vocab_size, *(shape[name] for name in ("context", "layers", "width", "heads"))).to(device)


@dataclass
class Benchmark:
    cfg: Config
    device: torch.device
    ceiling: dict[str, float]
    rows: list[Row]

    @property
    def dtype(self) -> str:
        return "bfloat16" if run.uses_bfloat16(self.device, "auto") else "float32"

    def run(self, group: str, work: str, candidates: dict[str, Callable], tokens: int = 0, flops: float = 0.0,
            moved: float = 0.0, reference: str = "plain") -> dict[str, list[float]]:
        """Time the candidates, which need so many FLOPs and move at least so many bytes, and add and print their rows."""
        floor = max(flops / self.ceiling[f"{self.dtype} FLOP/s"], moved / self.ceiling["bytes/s"])
        with run.autocast(self.device, "auto"):
            rounds = race(candidates, self.device, 0.0 if self.cfg.smoke else self.cfg.seconds)
        for who, times in rounds.items():
            seconds, ours = statistics.median(times), who.startswith("nanorl")
            self.add(Row(group, work, who, seconds, tokens / seconds if tokens else None,
                         median_ratio(rounds[reference], times) if reference in rounds else None,
                         floor / seconds if floor and ours else None))
        return rounds

    def add(self, row: Row) -> None:
        self.rows.append(row)
        cells = [f"{row.group:9s}", f"{row.work:38s}", f"{row.who:16s}",
                 f"{1e3 * row.seconds:9.1f} ms" if row.seconds else " " * 12,
                 f"{row.rate:9,.0f} tok/s" if row.rate else " " * 15,
                 f"{row.ratio:5.2f}x" if row.ratio else " " * 6,
                 f"{row.share:5.1%} of roofline" if row.share else " " * 18,
                 f"{row.memory / 2**20:8,.0f} MB" if row.memory is not None else "",
                 f"{row.tokens:9,.0f} tokens" if row.tokens is not None else ""]
        print(" ".join(cells).rstrip(), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Whole steps
# ---------------------------------------------------------------------------------------------------------------------


def train_step(model: GPT, optimizer: run.Optimizers, tokens: Tensor) -> None:
    """A step of train_pretrain.py."""
    mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    weights = token_weights(mask, torch.arange(len(tokens), device=tokens.device), "token_mean")
    logp, _ = token_log_probs(model, tokens)
    pretrain_objective(logp, mask, weights)[0].backward()
    optimizer.step(1e-4, 1.0)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=fused)


def pretrain(bench: Benchmark) -> None:
    """Our block and GPT-2's have the same number of weights but for their embeddings: twelve times the width squared."""
    shapes = [("gpt2", 32, 1024, 50304)] if bench.device.type == "cuda" else [("nano", 12, 64, 256), ("nano", 64, 128, 256)]
    for shape in [("nano", 2, 16, 256)] if bench.cfg.smoke else shapes:
        pretrain_at(bench, *shape)


def pretrain_at(bench: Benchmark, preset: str, batch: int, length: int, V: int) -> None:
    tokens = torch.randint(V, (batch, length), generator=run.generator(0, "tokens")).to(bench.device)
    model, compiled = (model_of(V, bench.device, **PRESETS[preset]) for _ in range(2))
    other = plain_of(V, bench.device, **PRESETS[preset])
    optimizers = [run.Optimizers(model, "adamw", 1e-4), run.Optimizers(compiled, "adamw", 1e-4), adamw(other)]
    candidates = {"plain": lambda: plain.train_step(other, optimizers[2], tokens),
                  "nanorl": lambda: train_step(model, optimizers[0], tokens)}
    if bench.cfg.compile:
        run.compile_blocks(compiled)
        candidates["nanorl, compiled"] = lambda: train_step(compiled, optimizers[1], tokens)
    bench.run("pretrain", f"{preset}, {batch} x {length} tokens, V={V}", candidates, batch * length,
              model.training_flops_per_token(length) * batch * length)


def sampling(bench: Benchmark) -> None:
    shapes = [(256, 64, 32), (256, 256, 32), (256, 1, 128), (256, 64, 128), (256, 256, 128), (4096, 64, 32), (4096, 256, 32)]
    if bench.device.type == "cuda":
        shapes = [(256, 1, 512), (256, 64, 512), (256, 256, 512), (256, 1024, 512), (4096, 256, 512)]
    for shape in [(256, 4, 4)] if bench.cfg.smoke else shapes:
        sampling_at(bench, *shape)


def sampling_at(bench: Benchmark, V: int, batch: int, new: int) -> None:
    """Prompts of 12 tokens, all different; nothing stops before the end."""
    context = {"context": max(256, 12 + new)}
    model, other = model_of(V, bench.device, **context), plain_of(V, bench.device, **context)
    prompts = torch.randint(V, (batch, 12), generator=run.generator(0, "prompts"))
    how = dict(max_new_tokens=new, stop_ids=set())
    candidates = {"plain": lambda: plain.generate(other, prompts.to(bench.device), new),
                  "nanorl": lambda: generate(model, prompts.tolist(), **how)}
    if bench.cfg.compile:
        candidates["nanorl, compiled"] = lambda: generate(model, prompts.tolist(), compile=True, **how)
    # Each step reads every weight once, and every key and value that there is.
    size = 2 if bench.dtype == "bfloat16" else 4
    seen = batch * sum(range(12, 12 + new)) * 2 * model.config.layers * model.config.width
    bench.run("generate", f"batch {batch}, {new} new tokens, V={V}", candidates, batch * new,
              batch * (12 + new) * model.training_flops_per_token(12 + new) / 3, size * (new * model.num_parameters() + seen))


def grpo(bench: Benchmark) -> None:
    for V in (256,) if bench.cfg.smoke else (256, 4096):
        grpo_at(bench, V, *((2, 2, 4, 4, 2) if bench.cfg.smoke else (32, 8, 12, 32, 64)))


def grpo_at(bench: Benchmark, V: int, P: int, G: int, prompt: int, new: int, size: int) -> None:
    """One update in micro-batches of `size` rows, none left out, on answers that do not stop; then the parts of the step."""
    model, other, B = model_of(V, bench.device), plain_of(V, bench.device), P * G
    optimizer, other_optimizer = run.Optimizers(model, "adamw", 1e-4), adamw(other)
    prompts = torch.randint(V, (P, prompt), generator=run.generator(0, "prompts"))
    adv = torch.randn(B, 1, generator=run.generator(0, "advantages")).to(bench.device)

    def collect() -> Rollout:
        return generate(model, prompts.tolist(), max_new_tokens=new, stop_ids=set(), samples_per_prompt=G)

    rollout = collect()
    mask = rollout.mask
    weights = token_weights(mask, rollout.prompt_index, "sequence_mean")

    def score(rows: slice) -> Tensor:
        return token_log_probs(model, rollout.tokens[rows], mask[rows])[0]

    parts = [slice(i, min(i + size, B)) for i in range(0, B, size)]

    @torch.no_grad()
    def forward() -> None:
        for rows in parts:
            score(rows)

    def update(parts: list[slice] = parts) -> None:
        for rows in parts:
            logp = score(rows)
            grpo_objective(logp, logp.detach(), adv[rows], mask[rows], weights[rows])[0].backward()
        optimizer.step(1e-4, 1.0)

    def step() -> None:
        collect()
        update()

    def skipping() -> None:
        """Half of the rows have no advantage, and --skip leaves them out."""
        collect()
        update(parts[: len(parts) // 2])

    def plain_step() -> None:
        tokens = plain.generate(other, prompts.repeat_interleave(G, dim=0).to(bench.device), new)
        plain.grpo_step(other, other_optimizer, tokens, prompt, adv.squeeze(-1), size)

    # The sampler reads each token once and the update three times (forward, and backward twice that).
    flops = B * (prompt + new) * model.training_flops_per_token(prompt + new) * 4 / 3
    work = f"{P} x {G} answers, {prompt} + {new} tokens, V={V}"
    bench.run("grpo", work, {"plain": plain_step, "nanorl": step, "half skipped": skipping}, B * new, flops)
    bench.run("grpo", f"its parts, V={V}", {"generate": collect, "forward alone": forward, "update": update})


# ---------------------------------------------------------------------------------------------------------------------
# Atoms and memory
# ---------------------------------------------------------------------------------------------------------------------


def atoms_of(name: str, N: int, d: int, V: int, device: torch.device) -> dict[str, Callable]:
    """The candidates at one atom, forward and backward."""
    g = run.generator(0, "atoms")
    ids = torch.randint(V, (N,), generator=g).to(device)
    if name != "head":
        logits = torch.randn(N, V, generator=g).to(device).requires_grad_()
        atoms = {"log-prob": {"plain": lambda: plain.token_log_probs(logits, ids),
                              "nanorl": lambda: selective_log_softmax(logits, ids)},
                 "entropy": {"plain": lambda: plain.entropy(logits), "nanorl": lambda: entropy_from_logits(logits),
                             "nanorl, chunks": lambda: entropy_from_logits(logits, chunk_size=64)}}[name]
        return {who: (lambda f=f: f().sum().backward()) for who, f in atoms.items()}

    hidden, weight = (torch.randn(n, d, generator=g).to(device) for n in (N, V))
    weight = weight.mul_(d**-0.5).requires_grad_()
    hidden.requires_grad_()

    def both() -> None:
        logits = hidden @ weight.T
        (plain.token_log_probs(logits, ids).sum() + plain.entropy(logits).sum()).backward()

    return {"plain": both,
            "cross-entropy": lambda: F.cross_entropy(hidden @ weight.T, ids, reduction="sum").backward(),
            "nanorl": lambda: sum(x.sum() for x in linear_log_probs(hidden, weight, ids)).backward()}


def atom_shapes(smoke: bool) -> list[tuple[str, int, int, int]]:
    """name, N, d, V: the log-prob and the entropy of given logits, and both of them from hidden states, head included."""
    shapes = [("log-prob", 2048, 0, 4096), ("entropy", 2048, 0, 4096), ("head", 2048, 128, 512), ("head", 2048, 128, 4096),
              ("head", 2048, 256, 50257), ("head", 512, 256, 151936)]
    return [(name, 8, 4, 16) for name, *_ in shapes[:3]] if smoke else shapes


def memory_shapes(cfg: Config, device: torch.device) -> list[tuple[str, int, int, int]]:
    """preset, rows, tokens, vocabulary of a training step in one micro-batch."""
    if cfg.smoke:
        return [("nano", 2, 8, 256)]
    return [("nano", 64, 64, 512), ("micro", 64, 64, 512), ("mini", 64, 64, 512),
            *([("gpt2", 32, 1024, 50304)] if device.type == "cuda" else [("gpt2", 4, 256, 50304)])]


def training(preset: str, rows: int, length: int, V: int, device: torch.device) -> Callable:
    """A training step that makes its model first: weights, gradients, optimizer state and activations."""
    def whole() -> None:
        model = model_of(V, device, **PRESETS[preset])
        tokens = torch.randint(V, (rows, length), generator=run.generator(0, "tokens")).to(device)
        train_step(model, run.Optimizers(model, "adamw", 1e-4), tokens)
    return whole


def memory_in_a_process(cfg: Config, key: str) -> int | None:
    """The memory of one candidate, in a process of its own, whose allocator gives back what is freed."""
    command = [sys.executable, "-m", "benchmarks", "--memory-of", key, "--device", cfg.device] + ["--smoke"] * cfg.smoke
    result = subprocess.run(command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def print_memory(cfg: Config, device: torch.device) -> None:
    """What --memory-of asks for: "atoms/INDEX/WHO" or "memory/INDEX"."""
    kind, index, *who = cfg.memory_of.split("/")
    if kind == "atoms":
        candidate = atoms_of(*atom_shapes(cfg.smoke)[int(index)], device)[who[0]]
    else:
        candidate = training(*memory_shapes(cfg, device)[int(index)], device)
    with run.autocast(device, "auto"):
        print(json.dumps(peak_memory(candidate, device)))


def atoms(bench: Benchmark) -> None:
    for index, (name, N, d, V) in enumerate(atom_shapes(bench.cfg.smoke)):
        candidates = atoms_of(name, N, d, V, bench.device)
        before = len(bench.rows)
        bench.run("atoms", f"{name}, N={N}" + (f", d={d}" if d else "") + f", V={V}", candidates)
        for row in bench.rows[before:]:
            row.memory = memory_in_a_process(bench.cfg, f"atoms/{index}/{row.who}")
            if row.memory is not None:
                print(f"{'':50s}{row.who:16s} {row.memory / 2**20:8,.0f} MB")


def memory(bench: Benchmark) -> None:
    for index, (preset, rows, length, V) in enumerate(memory_shapes(bench.cfg, bench.device)):
        found = memory_in_a_process(bench.cfg, f"memory/{index}")
        bench.add(Row("memory", f"{preset}, {rows} x {length} tokens, V={V}", "nanorl", memory=found))


# ---------------------------------------------------------------------------------------------------------------------
# The whole chain
# ---------------------------------------------------------------------------------------------------------------------


def learn(bench: Benchmark) -> None:
    """The three stages with their defaults, one after the other, in an empty directory."""
    flags = {"train_pretrain.py": "", "train_sft.py": "", "train_grpo.py": ""}
    if bench.cfg.smoke:
        flags = {"train_pretrain.py": "--steps 2 --batch 2 --preset pico",
                 "train_sft.py": "--steps 2 --batch 2 --eval-problems 2",
                 "train_grpo.py": "--steps 2 --prompts 2 --group 2 --eval-problems 2"}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        for script, more in flags.items():
            command = [sys.executable, str(ROOT / script), "--quiet", "--device", bench.device.type, *more.split()]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - begun
        lines = read_metrics(Path(folder) / "runs/grpo")
    tokens, reward = reward_by_tokens(lines)
    everything = sum(line.get("rollout/tokens", 0) for line in lines)
    bench.add(Row("learn", "train_grpo.py, from nothing", "nanorl", seconds, tokens=everything))
    step = next((i for i, r in enumerate(reward.tolist()) if r >= 0.9), None)
    if step is not None:
        rest = sum(line.get("time/step_s", 0.0) for line in lines if line["step"] >= step)
        bench.add(Row("learn", "... until a step's reward is 0.9", "nanorl", seconds - rest, tokens=float(tokens[step])))


def main(cfg: Config) -> None:
    with run.user_errors():
        device = run.find_device(cfg.device)
        if cfg.out and not Path(cfg.out).absolute().parent.is_dir():
            raise ValueError(f"--out {cfg.out}: expected a file in a directory that exists")
    if cfg.memory_of:
        print_memory(cfg, device)
        return
    ceiling = ceilings(device, 0.0 if cfg.smoke else 2.0)
    facts = machine(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(", ".join(f"{name} {value:.3g}" for name, value in ceiling.items()) + "\n")
    bench = Benchmark(cfg, device, ceiling, [])
    groups = {"pretrain": pretrain, "generate": sampling, "grpo": grpo, "atoms": atoms, "memory": memory, "learn": learn}
    for name in cfg.only:
        groups[name](bench)
    if cfg.out:
        kept = {"machine": facts, "ceilings": ceiling, "rows": [asdict(row) for row in bench.rows]}
        run.write_atomically(Path(cfg.out), lambda f: f.write((json.dumps(kept, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main(run.parse(Config))
