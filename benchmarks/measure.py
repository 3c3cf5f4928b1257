"""Time, memory and the machine's ceilings. Candidates run in turn, round after round, so that a machine whose speed drifts
treats them alike; the median round counts, and ratios are medians of the rounds' ratios."""

import gc
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def race(candidates: dict[str, Callable[[], object]], device: torch.device, seconds: float,
         clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each candidate in every round, after a round that is not counted: three, and on until `seconds` are over or
    there are fifty."""
    rounds, started = {name: [] for name in candidates}, None
    while started is None or len(next(iter(rounds.values()))) < 3 or time.perf_counter() - started < seconds:
        for name, run in candidates.items():
            synchronize(device)
            begun = clock()
            run()
            synchronize(device)
            if started is not None:
                rounds[name].append(clock() - begun)
        started = started or time.perf_counter()
        if len(next(iter(rounds.values()))) >= 50:
            break
    return rounds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """How many times as long `slow` takes, round by round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


class Stopwatch:
    """The seconds of named parts of some work, each part from when the device is idle until it is idle again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        synchronize(self.device)
        begun = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[part].append(time.perf_counter() - begun)


# What operators on a CPU and kernels on a GPU are called; the first pattern that fits.
PARTS = {"attention": r"^(?!triton).*(attention|fmha|flash)",
         "matrix products": r"^aten::(mm|addmm|bmm)$|gem[mv]|nvjet|cutlass",
         "other operators": ""}


def inside(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The shares of matrix products, of attention and of all other operators in the time of `work`, by the profiler.

    What is left is Python's; on a GPU, the GPU waits for it. The profiler itself makes small operators look dearer.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        begun = time.perf_counter()
        work()
        synchronize(device)
        whole = time.perf_counter() - begun
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        if cuda:        # kernels, by their names; the operators that called them are events on the CPU
            counts, spent = event.device_type != torch.autograd.DeviceType.CPU, event.self_device_time_total
            counts = counts and not event.is_user_annotation
        else:
            counts, spent = event.key.startswith(("aten::", "## Call CompiledFxGraph")), event.self_cpu_time_total
        if counts:
            seconds[next(part for part, names in PARTS.items() if re.search(names, event.key))] += 1e-6 * spent
    return {part: spent / whole for part, spent in seconds.items()}


def _resident(what: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `run` needs at most beyond what is there before it; None where nobody counts.

    On a CPU, freed memory must go back to the system for that: start Python with MALLOC_MMAP_THRESHOLD_=65536.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")           # the peak is now what is resident now
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def ceilings(device: torch.device, seconds: float, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """What this machine reaches: FLOP/s of a float32 and a bfloat16 matrix product, and bytes/s of a copy."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device) for _ in "ab")
    x = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    y = torch.empty_like(x)
    a16, b16 = a.bfloat16(), b.bfloat16()
    rounds = race({"float32": lambda: a @ b, "bfloat16": lambda: a16 @ b16, "copy": lambda: y.copy_(x)}, device, seconds, clock)
    best = {name: min(times) for name, times in rounds.items()}
    return {"float32 FLOP/s": 2 * n**3 / best["float32"], "bfloat16 FLOP/s": 2 * n**3 / best["bfloat16"],
            "bytes/s": 2 * x.numel() * 4 / best["copy"]}


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        name = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), "CPU")
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count() or 1, "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d")}
