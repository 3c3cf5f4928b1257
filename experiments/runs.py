"""What experiments share: many runs of the scripts, a few at a time, and tables of them."""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import train_sft
from nanorl import run

ROOT = Path(__file__).resolve().parent.parent


def sorter() -> str:
    """runs/sorter, made if it is missing: a pico model that sorts six digits, and gets one in four right."""
    cfg = train_sft.Config(quiet=True)
    base = run.ensure_stage(cfg, "pretrain", out="runs/sorter-base", preset="pico", steps=300)
    return run.ensure_stage(cfg, "sft", out="runs/sorter", init=base, task="sorting-6", steps=80, lr=2e-3)


def parser_of_runs(description: str, out: str) -> argparse.ArgumentParser:
    """The flags of an experiment whose runs have names: which of them to make, where, or only to draw them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[""], help="runs, or how their names begin (default: all)")
    parser.add_argument("--out", type=Path, default=Path(out), help="directory of the runs")
    parser.add_argument("--draw", action="store_true", help="only the results and the figure, from what is there")
    return parser


def directory(out: Path, label: str, seed: int) -> Path:
    """Where the run of this label and seed lives."""
    return out / f"{''.join(c if c.isalnum() else '_' for c in label)}-{seed}"


def train(folder: Path, script: str, flags: list[str], threads: int, may_end_with: str | None = None) -> None:
    """One run, from its beginning, unless it is done already with these flags. RuntimeError says why it failed.

    A failure whose message contains `may_end_with` is a result, too.
    """
    command = [sys.executable, str(ROOT / script), "--out", str(folder), *flags, "--save-every", "1000", "--quiet"]
    done, line = folder / "done", " ".join([script, *flags])
    if done.exists() and done.read_text() == line:
        return
    shutil.rmtree(folder, ignore_errors=True)
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if result.returncode and not (may_end_with and may_end_with in result.stderr):
        raise RuntimeError(f"{folder}: {result.stderr.strip()}")
    done.write_text(line)


def train_all(runs: list[tuple[Path, str, str]], jobs: int, may_end_with: str | None = None) -> None:
    """Every (folder, script, flags), `jobs` at a time, each on its share of the CPU. The first failure ends the program."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(train, folder, script, flags.split(), threads, may_end_with) for folder, script, flags in runs]
        try:
            for finished in tqdm(running, desc="runs"):
                finished.result()
        except RuntimeError as e:
            pool.shutdown(cancel_futures=True)
            raise SystemExit(str(e)) from None


def cell(values: list[float | None], digits: int) -> str:
    """The mean over seeds, with the range where they differ visibly; a dash where there is nothing to average."""
    if None in values:
        return "–"
    low, high, mean = (f"{x:.{digits}f}" for x in (min(values), max(values), sum(values) / len(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
