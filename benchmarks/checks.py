"""What must hold on a device before its speed means anything.

    python -m benchmarks --only checks --device cuda

decoding    compiled and eager decoding agree, before and after the weights change: no CUDA graph keeps old ones
head        linear_log_probs against the dense product in float64, and its memory against the logits'
scripts     every script takes two steps; one of GRPO is compiled
rollout     sampler and scorer agree in bfloat16, and micro-batches add up: the check that training begins with
resume      with --deterministic, a run that was stopped continues bit for bit

Each check and each script is a process of its own with a time limit, and several run at once: one that crashes or hangs is
one failure. Tolerances are printed with what was found.
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import train_grpo
from benchmarks.measure import peak_memory
from nanorl import run
from nanorl.data import DATA
from nanorl.first_step import FirstStepCheckFailed, first_step_check, tolerance
from nanorl.gpt import GPT, GPTConfig
from nanorl.ops import linear_log_probs, log_softmax
from nanorl.rollout import collect
from nanorl.sample import Rollout, Sampling, generate, token_log_probs

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Finding:
    """A line of the report."""

    what: str
    found: str
    wanted: str
    ok: bool
    seconds: float = 0.0

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        return f"checks    {self.what:58s} {verdict:6s} {self.seconds:5.1f} s   {self.found}   (wanted: {self.wanted})"


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------

# How many tokens must be equal, and how far a log-prob may be off, in nats. In bfloat16, rounding often decides between two
# tokens: a model that still uses its old weights has less than half of its tokens in common with the new one.
DECODING = {"float32": (0.999, 1e-4), "bfloat16": (0.9, 0.25)}
DECODED = {"all heads": {}, "grouped heads, qk_norm": {"kv_heads": 2, "qk_norm": True}}


def precision(device: torch.device, dtype: str):
    """Autocast to bfloat16, or float32 without TF32."""
    return run.in_float32(device) if dtype == "float32" else run.autocast(device, dtype)


def sharp_model(device: torch.device, **shape) -> GPT:
    """Two layers that are as sure of a token as a trained model is."""
    model = GPT(GPTConfig(97, context=128, layers=2, width=64, heads=4, **shape), run.generator(0, "decoding")).to(device)
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


def equal_tokens(a: Rollout, b: Rollout) -> float:
    """The share of equal tokens, up to the first one of a row that is not: the tokens after it continue something else."""
    equal = unequal = 0
    for x, y in zip(a.responses(), b.responses(), strict=True):
        equal += next((i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), min(len(x), len(y)))
        unequal += x != y
    return equal / (equal + unequal)


def decoding(device: torch.device, dtype: str, name: str) -> Iterator[Finding]:
    """Rows of different lengths that end at different times and wait for slots, at two lengths of attention."""
    model = sharp_model(device, **DECODED[name])
    prompts = torch.randint(1, 97, (16, 12), generator=run.generator(0, "prompts")).tolist()
    prompts = [prompt[: 5 + i % 8] for i, prompt in enumerate(prompts)]

    def sample(compile: bool, temperature: float = 1.0) -> Rollout:
        with precision(device, dtype):
            return generate(model, prompts, max_new_tokens=70, temperature=temperature, stop_ids={0}, samples_per_prompt=4,
                            slots=32, compile=compile)

    def compare(what: str, before: Rollout | None = None) -> Finding:
        eager, compiled = sample(False), sample(True)
        greedy, drawn = equal_tokens(sample(False, 0.0), sample(True, 0.0)), equal_tokens(eager, compiled)
        with precision(device, dtype), torch.no_grad():
            scored, _ = token_log_probs(model, compiled.tokens, compiled.mask)
        off = (scored - compiled.logp).abs().max().item()
        share, tol = DECODING[dtype]
        found = f"{greedy:.2%} of greedy, {drawn:.2%} of sampled tokens equal, log-probs to {off:.1g} nats"
        wanted = f"{share:.1%} of both, {tol:g}"
        ok = min(greedy, drawn) >= share and off <= tol
        if before:
            moved = equal_tokens(before, compiled)
            found, wanted, ok = f"{found}; {moved:.0%} as before", f"{wanted}; below 90%", ok and moved < 0.9
        return Finding(f"compiled as eager, {what}", found, wanted, ok)

    yield compare(f"{dtype}, {name}")
    kept, before = copy.deepcopy(model.state_dict()), sample(True)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=run.generator(0, "update")).to(device)
            weight.add_(noise, alpha=0.2 * float(weight.std()))
    yield compare(f"{dtype}, weights changed in place", before)
    before = sample(True)
    model.load_state_dict(kept)
    yield compare(f"{dtype}, weights loaded", before)


# ---------------------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------------------


def head(device: torch.device, compile: bool) -> Iterator[Finding]:
    """Values and gradients of log-probs and entropies, against those of all logits in float64."""
    N, d, V = 2048, 64, 32768
    g = run.generator(0, "head")
    hidden, weight = (torch.randn(n, d, generator=g).to(device) for n in (N, V))
    ids, grads = torch.randint(V, (N,), generator=g).to(device), [torch.randn(N, generator=g).to(device) for _ in range(2)]
    for dtype, tol in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight * d**-0.5)]
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        log_p = log_softmax(exact_inputs[0] @ exact_inputs[1].T)
        exact = [log_p.gather(-1, ids[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)]
        exact_grads = torch.autograd.grad(exact, exact_inputs, [x.double() for x in grads])
        exact = [x.detach() for x in exact]
        del log_p

        def ours(inputs: list[Tensor] = inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            with run.in_float32(device):
                values = linear_log_probs(*inputs, ids, compile=compile)
                return values, torch.autograd.grad(values, inputs, grads)

        values, found = ours()
        off = max((x - y).abs().max().item() for x, y in zip(values, exact, strict=True))
        grad_off = max(((x - y).norm() / y.norm()).item() for x, y in zip(found, exact_grads, strict=True))
        del values, found, exact, exact_grads
        peak, logits = peak_memory(ours, device) or 0, 4 * N * V
        yield Finding(f"linear_log_probs, {str(dtype)[6:]}{', compiled' * compile}",
                      f"values to {off:.1g} nats, gradients to {grad_off:.1g}, peak {peak / 2**20:.0f} MB",
                      f"{tol:g}, {tol:g}, below the logits' {logits / 2**20:.0f} MB",
                      off <= tol and grad_off <= tol and peak < logits)


# ---------------------------------------------------------------------------------------------------------------------
# What starts from a trained model
# ---------------------------------------------------------------------------------------------------------------------


def rollout(device: torch.device, folder: Path) -> Iterator[Finding]:
    """The check of GRPO's first step, on answers of a model of the nano preset, in bfloat16."""
    checkpoint, task, limit = run.load_checkpoint(folder / "sft", "policy"), run.choose_task("addition"), 80
    model, tokenizer = run.model_from(checkpoint, device), run.tokenizer_from(checkpoint)

    def score(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with run.autocast(device, "bfloat16"):
            return token_log_probs(model, tokens, mask)

    with run.autocast(device, "bfloat16"):
        experience = collect(model, tokenizer, task, Sampling(limit), prompts=16, samples=4, seed=0)
    tol = tolerance(device, "bfloat16")
    try:
        found, ok = first_step_check(experience, task, tokenizer.stop_ids, score, train_grpo.objective,
                                     list(model.parameters()), "sequence_mean", limit, tol), True
    except FirstStepCheckFailed as e:
        found, ok = str(e), False
    yield Finding("sampler as scorer, bfloat16, nano", found, f"{tol:g} nats, ratios and gradients", ok)


def resume(device: torch.device, folder: Path, compile: bool) -> Iterator[Finding]:
    """Four steps at once, and two, then two more."""
    flags = (f"--init sft {FEW} --prompts 4 --group 4 --steps 4 --eval-every 2 --save-every 2 --deterministic "
             f"--{'' if compile else 'no-'}compile --device {device.type} --quiet").split()
    whole, parts = (f"{name}{'-compiled' * compile}" for name in ("whole", "stopped"))
    save = run.Run.save

    def save_and_stop(self: run.Run) -> None:
        save(self)
        raise SystemExit

    def grpo(*more: str) -> None:
        with contextlib.redirect_stdout(None):
            train_grpo.main(run.parse(train_grpo.Config, [*flags, *more]))

    with contextlib.chdir(folder):
        grpo("--out", whole)
        with mock.patch.object(run.Run, "save", save_and_stop), contextlib.suppress(SystemExit):
            grpo("--out", parts)
        grpo("--out", parts, "--resume")
        lines = [[{name: x for name, x in line.items() if not name.startswith("time/")}
                  for line in run.read_lines(Path(out) / "metrics.jsonl")] for out in (whole, parts)]
        weights = [run.load_checkpoint(out)["model"] for out in (whole, parts)]
    differ = [f"{name} at step {a['step']}" for a, b in zip(*lines, strict=True) for name in a if a[name] != b.get(name)]
    differ += [name for name, x in weights[0].items() if not torch.equal(x, weights[1][name])]
    yield Finding(f"--deterministic and --resume{', compiled' * compile}",
                  f"{len(differ)} numbers and weights differ" + (f", the first is {differ[0]}" if differ else ""),
                  "2 steps and 2 more are 4, bit for bit", not differ)


class Script(NamedTuple):
    needs: tuple[str, ...]      # what must have run before
    command: str                # file and flags
    limit: float                # seconds, on a GPU


FEW = "--eval-problems 4 --max-new-tokens 40"
GROUPS = f"--init sft {FEW} --prompts 4 --group 4"
PAIRS = "--init sft --data pairs.jsonl --batch 8"
SCRIPTS = {
    "pretrain": Script((), "train_pretrain.py --steps 20 --batch 16 --text text.txt --vocab-size 400", 90),
    "sft": Script(("pretrain",), "train_sft.py --init pretrain --steps 60 --batch 32 --demonstrations 2000 --eval-problems 4",
                  90),
    "grpo, compiled": Script(("sft",), f"train_grpo.py --steps 2 {GROUPS}", 200),
    "grpo": Script(("sft",), f"train_grpo.py --steps 2 {GROUPS} --kl-coef 0.1 --entropy-coef 0.01 --minibatches 2", 60),
    "reward": Script(("sft",), f"train_reward.py --steps 2 {PAIRS}", 60),
    "dpo": Script(("sft",), f"train_dpo.py --steps 2 {PAIRS} --max-new-tokens 40", 60),
    "group_dpo": Script(("sft",), f"train_group_dpo.py --steps 2 {GROUPS} --best-of 2", 60),
    "ppo": Script(("sft",), f"train_ppo.py --steps 2 {GROUPS} --best-of 2", 60),
    "ppo, learned reward": Script(("sft", "reward"), f"train_ppo.py --steps 2 {GROUPS} --best-of 2 --reward model "
                                                     "--reward-model reward --critic shared", 60),
    "distill": Script(("sft", "grpo"), f"train_distill.py --steps 2 {GROUPS} --teacher grpo --on student --divergence reverse "
                                       "--gradient sequence", 60),
}

# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    needs: tuple[str, ...]      # scripts that must have run before
    run: Callable[[torch.device, Path], Iterator[Finding]]
    limit: float                # seconds, on a GPU
    compiles: bool = False


CHECKS = {
    "head": Check((), lambda device, folder: head(device, compile=False), 60),
    "head, compiled": Check((), lambda device, folder: head(device, compile=True), 90, compiles=True),
    **{f"decoding, {dtype}, {name}": Check((), lambda device, folder, dtype=dtype, name=name: decoding(device, dtype, name),
                                           120, compiles=True) for dtype in DECODING for name in DECODED},
    "rollout": Check(("sft",), rollout, 60),
    "resume": Check(("sft",), lambda device, folder: resume(device, folder, compile=False), 90),
    "resume, compiled": Check(("sft",), lambda device, folder: resume(device, folder, compile=True), 200, compiles=True),
}


def limit_on(device: torch.device, seconds: float) -> float:
    """A CPU gets eight times as long."""
    return 8 * seconds if device.type == "cpu" else seconds


def write_data(folder: Path) -> None:
    """What the scripts read: little text, and pairs of short answers."""
    (folder / "text.txt").write_text((DATA / "text.txt").read_text()[:200_000])
    pairs = ({"prompt": f"Say {i}.", "chosen": "Answer: x", "rejected": "Answer: y"} for i in range(99))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def finish(command: list[str], log: Path, limit: float, threads: int, cwd: Path) -> str:
    """Run a process, which prints to `log`. Returns "" if it went well, else what went wrong."""
    with open(log, "w") as f:       # no pipe, which a compiler's processes would hold open when this one is killed
        try:
            code = subprocess.run([sys.executable, *command], cwd=cwd, stdout=f, stderr=subprocess.STDOUT, timeout=limit,
                                  env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode
        except subprocess.TimeoutExpired:
            return f"still at work after {limit:.0f} s"
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return f"exit code {code}: {' '.join(last)[:300]}" if code else ""


def check_script(name: str, device: torch.device, folder: Path, threads: int) -> list[Finding]:
    script, begun = SCRIPTS[name], time.perf_counter()
    file, *flags = script.command.split()
    wanted = flags[flags.index("--steps") + 1]
    flags += ["--out", name, "--quiet", "--device", device.type, "--compile" if "compiled" in name else "--no-compile"]
    wrong = finish([str(ROOT / file), *flags], folder / f"{name}.log", limit_on(device, script.limit), threads, folder)
    done = "0" if wrong else str(run.read_lines(folder / name / "metrics.jsonl")[-1]["step"])
    return [Finding(f"{file}{''.join(name.partition(', ')[1:])}", wrong or f"{done} steps", f"{wanted} steps", done == wanted,
                    time.perf_counter() - begun)]


def check_in_a_process(name: str, device: torch.device, folder: Path, threads: int) -> list[Finding]:
    """What the process of a check has found; one more failure when it did not come to its end, or found nothing."""
    log, begun = folder / f"{name}.log", time.perf_counter()
    wrong = finish(["-m", "benchmarks.checks", name, device.type, str(folder)], log, limit_on(device, CHECKS[name].limit),
                   threads, ROOT)
    lines = log.read_text(errors="replace").splitlines()
    findings = [Finding(**json.loads(line)) for line in lines if line.startswith('{"what": ')]
    wrong = wrong or ("" if findings else "nothing")
    return findings + ([Finding(name, wrong, "an end", False, time.perf_counter() - begun)] if wrong else [])


def run_checks(device: torch.device, compile: bool) -> Iterator[Finding]:
    """The findings of all checks, as they come; without what compiles if `compile` is False."""
    cores = os.cpu_count() or 1
    at_once = max(1, cores // 2)
    free = threading.Semaphore(at_once)
    jobs = {name: (check_script, script.needs) for name, script in SCRIPTS.items() if compile or "compiled" not in name}
    jobs |= {name: (check_in_a_process, check.needs) for name, check in CHECKS.items() if compile or not check.compiles}
    running: dict[str, Future] = {}

    def job(work: Callable, name: str, needs: tuple[str, ...]) -> list[Finding]:
        for other in needs:
            running[other].result()
        with free:
            return work(name, device, folder, max(1, cores // at_once))

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(len(jobs)) as pool:
        folder = Path(place)
        write_data(folder)
        for name, (work, needs) in jobs.items():
            running[name] = pool.submit(job, work, name, needs)
        for done in as_completed(running.values()):
            yield from done.result()


def main(name: str, device: str, folder: str) -> None:
    """One check, in this process: its findings as lines of JSON."""
    begun = time.perf_counter()
    for finding in CHECKS[name].run(run.find_device(device), Path(folder)):
        finding.seconds, begun = time.perf_counter() - begun, time.perf_counter()
        print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
