"""How fast is it, and against what?

    python -m benchmarks                        all groups but checks, on this machine's CPU: some minutes
    python -m benchmarks --device cuda          on a GPU: first the checks, then the rest, in eight minutes at most
    python -m benchmarks --only generate grpo   some of them
    python -m benchmarks --peers                beside transformers and TRL (benchmarks/peers.py), and nothing else: ten minutes
    python -m benchmarks --smoke                every line once, tiny: a minute, and the numbers mean nothing
    python -m benchmarks --out FILE.json        kept, with the machine, the versions and the date

group        what is timed
checks       nothing: what must hold on the device before its speed means anything (benchmarks/checks.py); exit code 1 if
             something does not
pretrain     a training step on next tokens
generate     sampling answers to prompts, none of which stops early
grpo         a step of GRPO on answers of full length, and its parts
atoms        the log-prob and the entropy of a token, forward and backward, with their memory
memory       the memory that each script needs at each preset, with its defaults
learn        python train_grpo.py from nothing, and without the steps after the first whose reward is 0.9

On a GPU, results are kept in benchmarks/results/cuda.json where --out names no other file. The file is written again after
every row, so that a run that is cut short leaves what it has measured. Work that no longer fits into the eight minutes is
left out, and so is what takes long to compile: `generate` is compiled for two batches, and `learn` runs eagerly.

`plain` is the same work as it is usually written (benchmarks/plain.py), in the same run: a ratio of 2 is half its time. Whole
steps are done by two plain models: a GPT-2, to which the first ratio belongs, and a Llama, which is nanorl's architecture.
The roofline is the least time that the FLOPs or the bytes of the work need at this machine's ceilings, which are measured
first. Below a line stands what the profiler saw inside: the shares of matrix products, of attention and of other operators.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers, plain
from benchmarks.checks import Finding, run_checks
from benchmarks.measure import Stopwatch, ceilings, inside, machine, median_ratio, peak_memory, race
from nanorl import run
from nanorl.batches import micro_batches, minibatches
from nanorl.data import DATA
from nanorl.decode import read_prompts
from nanorl.gpt import GPT, PRESETS, GPTConfig
from nanorl.ops import entropy_from_logits, linear_log_probs, selective_log_softmax, token_weights
from nanorl.plot import read_metrics, reward_by_tokens
from nanorl.sample import Rollout, generate, token_log_probs
from train_grpo import objective as grpo_objective
from train_pretrain import objective as pretrain_objective

ROOT = Path(__file__).resolve().parent.parent
Group = Literal["checks", "pretrain", "generate", "grpo", "atoms", "memory", "learn"]
MINUTES_ON_A_GPU, MINUTES_BESIDE_PEERS = 8, 12
INSIDE = "  inside: "     # what the profiler saw in the row above


@dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[Group, ...] | None = None    # see the table above (default: all, without checks where there is no cuda)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"    # auto takes cuda, then mps, then cpu
    seconds: run.Positive | None = None    # for the candidates at each work, after a round to warm up (default: 6; cuda 1)
    compile: bool = True        # also what torch.compile makes of it
    peers: bool = False         # beside transformers and TRL instead, on the CPU in float32; needs both
    smoke: bool = False         # tiny sizes and one round: does it run?
    out: str = ""               # JSON file for the results (default: none; cuda benchmarks/results/cuda.json)
    memory_of: str = ""         # (for its own use) print the memory of one candidate of `atoms`, or of all scripts at a preset


def settled(cfg: Config, device: torch.device) -> Config:
    """With the defaults that depend on the device."""
    cuda, groups = device.type == "cuda", get_args(Group)
    return replace(cfg, only=cfg.only or (groups if cuda else tuple(g for g in groups if g != "checks")),
                   seconds=cfg.seconds or (1.0 if cuda else 6.0),
                   out=cfg.out or (str(ROOT / f"benchmarks/results/{'peers' if cfg.peers else 'cuda'}.json")
                                   if (cuda or cfg.peers) and not cfg.smoke else ""))


@dataclass
class Row:
    """A line of the table: one candidate at one piece of work."""

    group: str
    work: str
    who: str
    seconds: float | None = None
    rate: float | None = None           # tokens per second
    ratio: float | None = None          # how many times as long `plain` takes, of whole steps a GPT-2 ...
    llama: float | None = None          # ... and a Llama
    share: float | None = None          # the least time that the roofline allows, in the time; inside, that part's
    memory: float | None = None         # bytes beyond what is there before
    tokens: float | None = None         # answer tokens that were sampled for it


def model_of(vocab_size: int, device: torch.device, **shape) -> GPT:
    return GPT(GPTConfig(vocab_size, **PRESETS["nano"] | shape), run.generator(0, "benchmark")).to(device)


def plain_of(vocab_size: int, device: torch.device, **shape) -> dict[str, torch.nn.Module]:
    """A GPT-2 and a Llama of the same width and depth."""
    config = GPTConfig(vocab_size, **PRESETS["nano"] | shape)
    gpt2 = plain.GPT2(vocab_size, config.context, config.layers, config.width, config.heads)
    llama = plain.Llama(vocab_size, config.layers, config.width, config.heads, config.mlp_width)
    return {"plain": gpt2.to(device), "plain Llama": llama.to(device)}


def forward_flops(model: GPT, tokens: int, scored: int, length: int) -> float:
    """Of so many tokens in sequences of this length, when only the scored ones go through the head."""
    head = 2 * model.head.weight.numel()
    return tokens * (model.training_flops_per_token(length) / 3 - head) + scored * head


@dataclass
class Benchmark:
    cfg: Config
    device: torch.device
    ceiling: dict[str, float]
    rows: list[Row]
    findings: list[Finding] = field(default_factory=list)
    end: float = math.inf       # on the clock of time.perf_counter()

    @property
    def dtype(self) -> str:
        return "bfloat16" if run.uses_bfloat16(self.device, "auto") else "float32"

    def run(self, group: str, work: str, candidates: dict[str, Callable], tokens: int = 0, flops: float = 0.0,
            moved: float = 0.0) -> None:
        """Time the candidates, which need so many FLOPs and move at least so many bytes, and add and print their rows. Where a
        roofline is known, also look inside ours."""
        floor = max(flops / self.ceiling[f"{self.dtype} FLOP/s"], moved / self.ceiling["bytes/s"])
        # Each call by itself: until it ends, autocast keeps what it has cast, weights of before an update included.
        candidates = {who: run.autocast(self.device, "auto")(work) for who, work in candidates.items()}
        rounds = race(candidates, self.device, 0.0 if self.cfg.smoke else self.cfg.seconds)
        for who, times in rounds.items():
            seconds, ours = statistics.median(times), who.startswith("nanorl")
            ratios = (median_ratio(rounds[x], times) if x in rounds else None for x in ("plain", "plain Llama"))
            self.add(Row(group, work, who, seconds, tokens / seconds if tokens else None, *ratios,
                         floor / seconds if floor and ours else None))
            if floor and ours:
                for part, share in inside(candidates[who], self.device).items():
                    self.add(Row(group, INSIDE + part, who, share=share))

    def in_time(self, group: str, works: list) -> Iterator:
        """These pieces of work, but none that begins in the last 90 seconds."""
        for number, work in enumerate(works):
            if time.perf_counter() > self.end - 90:
                print(f"{group:9s} {len(works) - number} of {len(works)} left out: no time")
                return
            yield work

    def left(self) -> float | None:
        """Seconds until the end, if there is one."""
        return None if self.end == math.inf else max(1.0, self.end - time.perf_counter())

    def save(self) -> None:
        if self.cfg.out:
            kept = {"machine": machine(self.device), "ceilings": self.ceiling, "checks": [asdict(x) for x in self.findings],
                    "rows": [asdict(row) for row in self.rows]}
            run.write_atomically(Path(self.cfg.out), lambda f: f.write((json.dumps(kept, indent=1) + "\n").encode()))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save()
        cells = [f"{row.group:9s}", f"{row.work:38s}", f"{row.who:16s}",
                 f"{1e3 * row.seconds:9.1f} ms" if row.seconds else " " * 12,
                 f"{row.rate:9,.0f} tok/s" if row.rate else " " * 15,
                 f"{row.ratio:5.2f}x" if row.ratio else " " * 6,
                 f"{row.llama:5.2f}x" if row.llama else " " * 6,
                 f"{row.share:5.1%} of {'it' if row.work.startswith(INSIDE) else 'roofline'}" if row.share else " " * 18,
                 f"{row.memory / 2**20:8,.0f} MB" if row.memory is not None else "",
                 f"{row.tokens:9,.0f} tokens" if row.tokens is not None else ""]
        print(" ".join(cells).rstrip(), flush=True)


def checks(bench: Benchmark) -> None:
    for finding in run_checks(bench.device, bench.cfg.compile):
        bench.findings.append(finding)
        print(finding, flush=True)
        bench.save()


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
    shapes = [("nano", 12, 64, 256), ("nano", 64, 128, 256)]
    if bench.device.type == "cuda":
        large = torch.cuda.get_device_properties(bench.device).total_memory > 2**36
        shapes = [("gpt2", 32 if large else 8, 1024, 50304)]
    for shape in bench.in_time("pretrain", [("nano", 2, 16, 256)] if bench.cfg.smoke else shapes):
        pretrain_at(bench, *shape)


def pretrain_at(bench: Benchmark, preset: str, batch: int, length: int, V: int) -> None:
    tokens = torch.randint(V, (batch, length), generator=run.generator(0, "tokens")).to(bench.device)
    model, compiled = (model_of(V, bench.device, **PRESETS[preset]) for _ in range(2))
    optimizers = [run.Optimizers(model, "adamw", 1e-4), run.Optimizers(compiled, "adamw", 1e-4)]
    candidates = {who: partial(plain.train_step, other, adamw(other), tokens)
                  for who, other in plain_of(V, bench.device, **PRESETS[preset]).items()}
    candidates["nanorl"] = lambda: train_step(model, optimizers[0], tokens)
    if bench.cfg.compile:
        run.compile_for_training(compiled)
        candidates["nanorl, compiled"] = lambda: train_step(compiled, optimizers[1], tokens)
    bench.run("pretrain", f"{preset}, {batch} x {length} tokens, V={V}", candidates, batch * length,
              model.training_flops_per_token(length) * batch * length)


def sampling(bench: Benchmark) -> None:
    shapes = [(256, 64, 32), (256, 256, 32), (256, 1, 128), (256, 64, 128), (256, 256, 128), (4096, 64, 32), (4096, 256, 32)]
    if bench.device.type == "cuda":
        shapes = [(256, 1, 100), (256, 256, 100), (256, 1024, 100), (4096, 256, 100)]
    for shape in bench.in_time("generate", [(256, 4, 4)] if bench.cfg.smoke else shapes):
        sampling_at(bench, *shape)


def sampling_at(bench: Benchmark, V: int, batch: int, new: int) -> None:
    """Prompts of 12 tokens, all different; nothing stops before the end."""
    context = {"context": max(256, 12 + new)}
    model = model_of(V, bench.device, **context)
    prompts = torch.randint(V, (batch, 12), generator=run.generator(0, "prompts"))
    how = dict(max_new_tokens=new, stop_ids=set())
    candidates = {who: partial(plain.generate, other, prompts.to(bench.device), new)
                  for who, other in plain_of(V, bench.device, **context).items()}
    candidates["nanorl"] = lambda: generate(model, prompts.tolist(), **how)
    if bench.cfg.compile and (bench.device.type != "cuda" or (V == 256 and batch <= 256)):
        candidates["nanorl, compiled"] = lambda: generate(model, prompts.tolist(), compile=True, **how)
    # Each step reads every weight once, of the embedding only some rows, and every key and value that there is.
    size, weights = 2 if bench.dtype == "bfloat16" else 4, model.num_parameters() - model.embedding.weight.numel()
    seen = batch * sum(range(12, 12 + new)) * 2 * model.config.layers * model.config.width
    bench.run("generate", f"batch {batch}, {new} new tokens, V={V}", candidates, batch * new,
              forward_flops(model, batch * (11 + new), batch * new, 12 + new), size * (new * weights + seen))


def grpo(bench: Benchmark) -> None:
    shapes = [(256, 12, 32, 1), (4096, 12, 32, 1), (256, 64, 32, 1), (256, 64, 32, 4)]
    for shape in bench.in_time("grpo", [(256, 4, 4, 2)] if bench.cfg.smoke else shapes):
        grpo_at(bench, *shape, *((2, 2, 2) if bench.cfg.smoke else (32, 8, 64)))


def grpo_at(bench: Benchmark, V: int, prompt: int, new: int, updates: int, P: int, G: int, size: int) -> None:
    """As many updates in micro-batches of `size` rows, none left out, on answers that do not stop; and the parts of one."""
    model, B = model_of(V, bench.device), P * G
    optimizer = run.Optimizers(model, "adamw", 1e-4)
    prompts = torch.randint(V, (P, prompt), generator=run.generator(0, "prompts"))
    adv = torch.randn(B, 1, generator=run.generator(0, "advantages")).to(bench.device)

    def collect() -> Rollout:
        return generate(model, prompts.tolist(), max_new_tokens=new, stop_ids=set(), samples_per_prompt=G)

    rollout = collect()
    mask = rollout.mask
    weights = token_weights(mask, rollout.prompt_index, "sequence_mean")
    shuffles = [rows.to(bench.device) for rows in minibatches(0, 0, B, 1, updates)]

    def loss(rows: Tensor) -> Tensor:
        logp, _ = token_log_probs(model, rollout.tokens[rows], mask[rows])
        return grpo_objective(logp, logp.detach(), adv[rows], mask[rows], weights[rows])[0]

    def step(share: int = 1) -> None:
        collect()
        for minibatch in shuffles:
            for rows, _ in micro_batches(rollout, size, minibatch[: len(minibatch) // share]):
                loss(rows).backward()
            optimizer.step(1e-4, 1.0)

    def skipping() -> None:
        """Half of the rows are left out, as --skip does with those that have no advantage."""
        step(share=2)

    def timed_step() -> Stopwatch:
        """The parts of a step, and the score that a reference or an old policy would ask for."""
        watch = Stopwatch(bench.device)
        with watch("prefill"), torch.no_grad():     # once more: it is a part of what follows
            read_prompts(model, rollout.tokens[::G, :prompt], getattr(torch, bench.dtype))
        with watch("prefill and decode"):
            collect()
        parts = [rows for rows, _ in micro_batches(rollout, size)]
        with watch("score, if asked for"), torch.no_grad():
            for rows in parts:
                token_log_probs(model, rollout.tokens[rows], mask[rows])
        for rows in parts:
            with watch("forward"):
                found = loss(rows)
            with watch("backward"):
                found.backward()
        with watch("optimizer"):
            optimizer.step(1e-4, 1.0)
        return watch

    def plain_step(other: torch.nn.Module, other_optimizer: torch.optim.Optimizer) -> None:
        tokens = plain.generate(other, prompts.repeat_interleave(G, dim=0).to(bench.device), new)
        for rows in shuffles:
            plain.grpo_step(other, other_optimizer, tokens[rows], prompt, adv.squeeze(-1)[rows], size)

    # A prompt is read once for its group, by the sampler and, of one update, by the update: forward, and backward, which is
    # twice that.
    length = prompt + new
    flops = 4 * forward_flops(model, P * (prompt - 1) + B * new, B * new, length)
    work = f"{P} x {G} answers, {prompt} + {new} tokens, V={V}" + (f", {updates} updates" if updates > 1 else "")
    candidates = {who: partial(plain_step, other, adamw(other)) for who, other in plain_of(V, bench.device).items()}
    bench.run("grpo", work, candidates | {"nanorl": step, "half skipped": skipping}, B * new, flops)
    if updates > 1:
        return
    timed = run.autocast(bench.device, "auto")(timed_step)
    rounds = [timed().seconds for _ in range(1 if bench.cfg.smoke else 7)]
    for part in rounds[0]:
        bench.add(Row("grpo", f"  part: {part}", "nanorl", statistics.median(sum(spent[part]) for spent in rounds)))


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
            "nanorl": lambda: sum(x.sum() for x in linear_log_probs(hidden, weight, ids)).backward(),
            "nanorl, compiled": lambda: sum(x.sum() for x in linear_log_probs(hidden, weight, ids, compile=True)).backward()}


def atom_shapes(smoke: bool) -> list[tuple[str, int, int, int]]:
    """name, N, d, V: the log-prob and the entropy of given logits, and both of them from hidden states, head included."""
    shapes = [("log-prob", 2048, 0, 4096), ("entropy", 2048, 0, 4096), ("head", 2048, 128, 512), ("head", 2048, 128, 4096),
              ("head", 2048, 256, 50257), ("head", 512, 256, 151936)]
    return [(name, 8, 4, 16) for name, *_ in shapes[:3]] if smoke else shapes


def memory_in_a_process(cfg: Config, key: str, limit: float | None = None) -> Any:
    """What --memory-of prints, in a process of its own; for an atom, one whose allocator gives back what is freed."""
    command = [sys.executable, "-m", "benchmarks", "--memory-of", key, "--device", cfg.device] + ["--smoke"] * cfg.smoke
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536"} if key.startswith(("atoms", "peers")) else {}
    result = subprocess.run(command, env=os.environ | gives_back, capture_output=True, text=True, timeout=limit)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def print_memory(cfg: Config, device: torch.device) -> None:
    """What --memory-of asks for: "atoms/INDEX/WHO", "memory/PRESET" or "peers/WHO"."""
    kind, which, *who = cfg.memory_of.split("/")
    if kind == "peers":
        print(json.dumps(peers.memory_of_steps(which, cfg.smoke)))
        return
    if kind == "memory":
        print(json.dumps(memory_of_scripts(which, device, cfg.smoke)))
        return
    candidate = atoms_of(*atom_shapes(cfg.smoke)[int(which)], device)[who[0]]
    with run.autocast(device, "auto"):
        candidate()
        print(json.dumps(peak_memory(candidate, device)))


def memory_of_scripts(preset: str, device: torch.device, smoke: bool) -> dict[str, int | None]:
    """Bytes that a step of each script takes with its defaults, and its evaluations on a few problems; one after the other, in
    an empty directory. What PyTorch loads for its first step, some 90 MB on a CPU, is among them."""
    few = "--eval-problems 2 --max-new-tokens 4" if smoke else "--eval-problems 16"
    batch, groups = ("--batch 2", f"{few} --prompts 2 --group 2") if smoke else ("", few)
    pairs = f"--init runs/sft --data pairs.jsonl {batch}"
    flags = {"train_pretrain": f"--preset {preset} {batch}", "train_sft": f"{few} {batch}", "train_reward": pairs,
             "train_dpo": f"{pairs} {few}", "train_group_dpo": groups, "train_grpo": groups, "train_ppo": groups,
             "train_distill": f"--teacher runs/grpo --init runs/sft {groups}"}
    jobs = [(name, f"--steps 1 --quiet --no-compile --device {device.type} {more}", device) for name, more in flags.items()]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        records = (DATA / "preferences.jsonl").read_text().splitlines(keepends=True)
        Path("pairs.jsonl").write_text("".join(records[:200]))
        if device.type == "cuda":
            return dict(map(memory_of_script, jobs))
        with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as fresh:      # Python, too, keeps what it frees
            return dict(fresh.map(memory_of_script, jobs, chunksize=1))


def memory_of_script(job: tuple[str, str, torch.device]) -> tuple[str, int | None]:
    name, flags, device = job
    script = importlib.import_module(name)
    cfg = run.parse(script.Config, flags.split())
    return f"{name}.py", peak_memory(lambda: script.main(cfg), device)


def atoms(bench: Benchmark) -> None:
    for index, (name, N, d, V) in bench.in_time("atoms", list(enumerate(atom_shapes(bench.cfg.smoke)))):
        candidates = atoms_of(name, N, d, V, bench.device)
        if not bench.cfg.compile:
            candidates.pop("nanorl, compiled", None)
        before = len(bench.rows)
        bench.run("atoms", f"{name}, N={N}" + (f", d={d}" if d else "") + f", V={V}", candidates)
        for row in bench.rows[before:]:
            if bench.device.type == "cuda":     # its allocator counts
                row.memory = peak_memory(run.autocast(bench.device, "auto")(candidates[row.who]), bench.device)
            else:
                row.memory = memory_in_a_process(bench.cfg, f"atoms/{index}/{row.who}")
            if row.memory is not None:
                print(f"{'':50s}{row.who:16s} {row.memory / 2**20:8,.0f} MB")
        bench.save()


def memory(bench: Benchmark) -> None:
    """On a GPU, whose allocator counts for each process, all presets at once."""
    cuda = bench.device.type == "cuda"
    presets = ["nano", "mini", "gpt2"] if cuda else ["pico", "nano", "micro", "mini"]
    presets = list(bench.in_time("memory", presets[:1] if bench.cfg.smoke else presets))

    def measure(preset: str) -> dict[str, int | None]:
        return memory_in_a_process(bench.cfg, f"memory/{preset}", bench.left())

    with ThreadPoolExecutor(len(presets) if cuda and presets else 1) as pool:
        for preset, scripts in zip(presets, pool.map(measure, presets), strict=True):
            for script, found in scripts.items():
                bench.add(Row("memory", f"{script}, {preset}", "nanorl", memory=found))


def beside_peers(bench: Benchmark) -> None:
    """The other library is the first candidate at each work: the ratio says how many times as long it takes."""
    for work, tokens, rounds in peers.race_all(bench.cfg.smoke, bench.cfg.seconds, bench.cfg.compile):
        first = next(iter(rounds))
        for who, times in rounds.items():
            seconds = statistics.median(times)
            bench.add(Row("peers", work, who, seconds, tokens / seconds,
                          None if who == first else median_ratio(rounds[first], times)))
    for who in rounds:
        memory = memory_in_a_process(bench.cfg, f"peers/{who}", bench.left())
        bench.add(Row("peers", "memory of a GRPO step, 2 x 8 answers", who, memory=memory))


# ---------------------------------------------------------------------------------------------------------------------
# The whole chain
# ---------------------------------------------------------------------------------------------------------------------


def learn(bench: Benchmark) -> None:
    """The three stages with their defaults, one after the other, in an empty directory; on a GPU without compiling."""
    flags = {"train_pretrain.py": "", "train_sft.py": "", "train_grpo.py": ""}
    if bench.cfg.smoke:
        flags = {"train_pretrain.py": "--steps 2 --batch 2 --preset pico",
                 "train_sft.py": "--steps 2 --batch 2 --eval-problems 2",
                 "train_grpo.py": "--steps 2 --prompts 2 --group 2 --eval-problems 2"}
    eager = ["--no-compile"] if bench.device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        for script, more in flags.items():
            command = [sys.executable, str(ROOT / script), "--quiet", "--device", bench.device.type, *eager, *more.split()]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=bench.left())
        seconds = time.perf_counter() - begun
        lines = read_metrics(Path(folder) / "runs/grpo")
    tokens, reward = reward_by_tokens(lines)
    everything = sum(line.get("rollout/tokens", 0) for line in lines)
    bench.add(Row("learn", "train_grpo.py, from nothing", "nanorl", seconds, tokens=everything))
    step = next((i for i, r in enumerate(reward.tolist()) if r >= 0.9), None)
    if step is not None:
        rest = sum(line.get("time/step_s", 0.0) for line in lines if line["step"] >= step)
        bench.add(Row("learn", "... less the steps after a reward of 0.9", "nanorl", seconds - rest,
                      tokens=float(tokens[step])))


@run.user_errors_as_sentences
def main(cfg: Config) -> None:
    begun = time.perf_counter()
    device = run.find_device("cpu" if cfg.peers else cfg.device)
    cfg = settled(cfg, device)
    if cfg.out and not Path(cfg.out).absolute().parent.is_dir():
        raise run.UserError(f"--out {cfg.out}: expected a file in a directory that exists")
    if cfg.peers:
        peers.check_installed()
    if cfg.memory_of:
        print_memory(cfg, device)
        return
    print(", ".join(f"{name} {value}" for name, value in machine(device).items()), flush=True)
    minutes = MINUTES_BESIDE_PEERS if cfg.peers else MINUTES_ON_A_GPU if device.type == "cuda" else math.inf
    bench = Benchmark(cfg, device, {}, [], end=begun + 60 * minutes)
    if "checks" in cfg.only:
        checks(bench)
    failed = [finding.what for finding in bench.findings if not finding.ok]
    groups = {"pretrain": pretrain, "generate": sampling, "grpo": grpo, "atoms": atoms, "memory": memory, "learn": learn,
              "peers": beside_peers}
    timed = ["peers"] if cfg.peers else [name for name in cfg.only if name != "checks"]
    if timed:
        bench.ceiling = ceilings(device, 0.0 if cfg.smoke else 2.0)
        print(", ".join(f"{name} {value:.3g}" for name, value in bench.ceiling.items()) + "\n", flush=True)
    for name in timed:
        try:
            groups[name](bench)
        except subprocess.TimeoutExpired:
            print(f"{name:9s} stopped: no time")
        except Exception:               # the other groups can still be measured
            traceback.print_exc()
            failed.append(name)
    bench.save()
    print(f"\n{time.perf_counter() - begun:.0f} seconds" + (f", FAILED: {'; '.join(failed)}" if failed else ""))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(run.parse(Config))
