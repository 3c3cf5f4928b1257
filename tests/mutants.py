"""A mutation run: faults are put into the code one at a time, and the tests must notice each.

    python -m tests.mutants                     every fault, as many at a time as there are CPUs
    python -m tests.mutants --only clip         those whose name contains "clip"
    python -m tests.mutants --table docs/mutants.md         write the table to a file, too

That tests pass says little as long as nobody has seen them fail. Each fault of tests/faults.py, of a kind that people really
make, is put into a copy of the working tree, and the tests run there until one fails: the math tests for a fault in an
equation, the tests of steps, rollouts, sampling and runs for a fault in a loop. A fault is killed when a test fails; one that
survives is behaviour that no test pins down. Every fault has a process of its own, forked from this one, which has imported
torch already.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from faults import LOOPS, MATH, Mutant  # noqa: E402

MUTANTS = MATH + LOOPS
TITLE = ["# Faults that the tests notice", "",
         "Each line is a fault that was put into the code, where it went, the first test that failed, and after how many",
         "seconds. Made by `python -m tests.mutants --table docs/mutants.md`.", ""]
# The likeliest killer of a fault runs first. Of one in an equation, that is a file ...
MATH_FIRST = {"nanorl/ops.py": "test_ops.py", "experiments/power.py": "test_ops.py", "nanorl/search.py": "test_search.py",
              "nanorl/evaluate.py": "test_evaluate.py", "train_ppo.py": "test_ppo.py", "train_distill.py": "test_distill.py",
              **dict.fromkeys(("train_reward.py", "train_dpo.py", "train_group_dpo.py", "nanorl/heldout.py"),
                              "test_preferences.py"),
              **dict.fromkeys(("train_pretrain.py", "train_sft.py", "train_grpo.py", "nanorl/family.py", "nanorl/data.py"),
                              "test_objectives.py")}
# ... and of one in a loop, the tests of that script's steps, or a file.
STEPS = {"train_pretrain.py": "pretraining", "train_sft.py": "fine_tuning", "train_reward.py": "reward_model",
         "train_dpo.py": "test_dpo or online", "train_group_dpo.py": "group_dpo", "train_grpo.py": "grpo",
         "nanorl/family.py": "grpo", "train_ppo.py": "ppo", "train_distill.py": "distillation"}
LOOP_FILES = ("test_gpt.py", "test_rollout.py", "test_heldout.py", "test_data.py", "test_tasks.py", "test_run.py",
              "test_sample.py", "test_ppo.py", "test_lora.py", "test_steps.py", "test_scripts.py", "test_crashes.py")
LOOP_FIRST = {**dict.fromkeys(("nanorl/rollout.py", "nanorl/batches.py", "nanorl/pairs.py"), "test_steps.py"),
              **dict.fromkeys(("nanorl/gpt.py", "nanorl/prefixes.py"), "test_gpt.py"),
              **dict.fromkeys(("nanorl/sample.py", "nanorl/decode.py"), "test_sample.py"),
              "nanorl/heldout.py": "test_heldout.py", "nanorl/data.py": "test_data.py",
              "nanorl/tasks/base.py": "test_tasks.py", "nanorl/lora.py": "test_lora.py"}
PYTEST = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]


def line_of(mutant: Mutant) -> int:
    """Where the fault goes; a sentence and an end if the source has moved on."""
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    if (times := source.count(mutant.old)) != 1:
        sys.exit(f"{mutant.fault!r}: {mutant.old!r} occurs {times} times in {mutant.file}; expected exactly once")
    return source[: source.index(mutant.old)].count("\n") + 1


def selections(mutant: Mutant | None, tests: Path) -> list[list[str]]:
    """What to give to pytest, one after the other until a test fails. Without a fault: all of it."""
    math = [file.name for file in tests.glob("test_*.py") if "mark.math" in file.read_text(encoding="utf-8")]
    loops = list(LOOP_FILES)
    if mutant is None:
        return [["-m", "math", *sorted(math)], ["-m", "not slow", *loops]]
    if mutant in MATH:
        return [["-m", "math", *sorted(math, key=lambda name: (name != MATH_FIRST.get(mutant.file), name))]]
    loops.sort(key=lambda name: name != LOOP_FIRST.get(mutant.file))
    focused = [["-k", STEPS[mutant.file], "test_steps.py"]] if mutant.file in STEPS else []
    return [*focused, ["-m", "not slow", *loops]]


def run_tests(mutant: Mutant | None, limit: float | None = None) -> tuple[str, float]:
    """Run the tests on a copy of the tree, with the fault: the first test that failed ("" for none) and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("nanorl", "tests", "data", "docs", "experiments"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("train_*.py")):
            shutil.copy(file, tree)
        if mutant:
            file = tree / mutant.file
            file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")

        os.chdir(tree / "tests")
        sys.path[:] = [str(tree), str(tree / "tests"), *(path for path in sys.path if not Path(path).is_relative_to(ROOT))]
        signal.alarm(int(limit or 0))               # in a process of its own: it interrupts a test, which then fails
        start = time.perf_counter()
        with open(tree / "output", "w+b") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            for selection in selections(mutant, tree / "tests"):
                code = pytest.main([*PYTEST, "--basetemp", str(tree / "temporary"), *selection])
                if code:
                    break
        said, seconds = (tree / "output").read_text(encoding="utf-8", errors="replace"), time.perf_counter() - start
        os.chdir(ROOT)
    if not code:
        return "", seconds
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", said, re.M)
    return (failed[1] if failed else "(collection)" if mutant else said[-3000:]), seconds


def forked(jobs: list[Callable[[], tuple[str, float]]], at_a_time: int, bar: tqdm) -> list[tuple[str, float]]:
    """What these jobs return, each in a fork of this process. The bar counts those that are done, and the faults killed."""
    waiting, running, results = list(enumerate(jobs)), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                number, job = waiting.pop(0)
                if (child := os.fork()) == 0:
                    try:
                        Path(folder, str(number)).write_text(json.dumps(job()))
                    finally:
                        os._exit(0)
                running[child] = number
            child, _ = os.wait()
            number = running.pop(child)
            result = Path(folder, str(number))
            results[number] = json.loads(result.read_text()) if result.exists() else ("(the process died)", 0.0)
            bar.update()
            bar.set_postfix(killed=sum(bool(killer) for killer, _ in results.values()))
    return [results[number] for number in range(len(jobs))]


def interrupted(*_: object) -> None:
    raise TimeoutError("the tests take far longer than they usually do")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="the faults whose name contains it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="faults at a time (default: the CPUs)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="where to write the table, too")
    args = parser.parse_args(argv)
    mutants = [mutant for mutant in MUTANTS if args.only in mutant.fault]
    if not mutants:
        parser.error(f"argument --only: no fault's name contains {args.only!r}")
    if args.jobs < 1:
        parser.error(f"argument --jobs: {args.jobs} is not a number of at least 1")
    if args.table and not args.table.parent.is_dir():
        parser.error(f"argument --table: {args.table.parent} is no directory")

    lines = [line_of(mutant) for mutant in mutants]
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "ci"}
    torch.set_num_threads(1)
    for package in ("einops", "hypothesis", "numpy", "tiktoken", "torch._dynamo"):
        importlib.import_module(package)
    signal.signal(signal.SIGALRM, interrupted)
    (failed, usual), = forked([partial(run_tests, None)], 1, tqdm(disable=True))
    if failed:
        sys.exit(f"Without any fault, {failed} fails; expected tests that pass.")

    # Slow beyond measure is noticed as well.
    with tqdm(total=len(mutants), unit="fault") as bar:
        verdicts = forked([partial(run_tests, mutant, 60 + 2 * usual) for mutant in mutants], args.jobs, bar)
    table, killed = ["| fault | where | killed by | seconds |", "|---|---|---|--:|"], 0
    for mutant, line, (killer, seconds) in zip(mutants, lines, verdicts, strict=True):
        killed += bool(killer)
        table.append(f"| {mutant.fault} | {mutant.file}:{line} | {killer or '**survived**'} | {seconds:.0f} |")
    table += ["", f"{killed} of {len(mutants)} killed"]
    print(*table, sep="\n")
    if args.table:
        args.table.write_text("\n".join([*TITLE, *table]) + "\n", encoding="utf-8")
    sys.exit(killed < len(mutants))


if __name__ == "__main__":
    main()
