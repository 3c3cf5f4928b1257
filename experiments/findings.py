"""What the files of claims share: a finding, its verdict, where it is kept, and the table of all of them.

A file of claims is a module with

    CLAIMS      functions (smoke) -> Finding; with smoke, everything once and tiny: does it run?
    draw        (findings by claim, path) -> None: its figure, from nothing but what the findings hold

whose docstring says what is claimed, the equation that it is about, and a line to change: "Change `a` to `b`: C1 is refuted."
"""

import argparse
import functools
import inspect
import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from tqdm import tqdm

import train_sft
from experiments.runs import ROOT
from nanorl import run
from nanorl.data import DATA
from nanorl.errors import UserError, user_errors_as_sentences
from nanorl.evaluate import interval
from nanorl.files import read_text
from nanorl.gpt import GPT
from nanorl.ops import log_softmax
from nanorl.plot import pyplot
from nanorl.scaling import quantile_of_t
from nanorl.tokenizer import Tokenizer

RESULTS, FIGURES = ROOT / "experiments/results", ROOT / "docs/figures"


# ---------------------------------------------------------------------------------------------------------------------
# A finding
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What became of a claim."""

    claim: str                  # its number: C1
    says: str                   # the claim, in one sentence
    held: dict[str, bool]       # whether it held, under each condition that was measured
    because: str                # the number that says so
    rows: list[dict]            # the small table that is printed: column -> value
    curves: dict = field(default_factory=dict)      # what the figure needs besides

    @property
    def verdict(self) -> str:
        """confirmed where it held under every condition, refuted where it held under none, else when it holds and when not."""
        if all(self.held.values()):
            return "confirmed"
        if not any(self.held.values()):
            return "refuted"
        yes, no = (" or ".join(name for name, held in self.held.items() if held == wanted) for wanted in (True, False))
        return f"holds when {yes}; not when {no}"


def mean_and_interval(values: Tensor | list[float], shares: bool = False) -> tuple[float, float, float]:
    """The mean of one value per seed, and its 95 % confidence interval: Student's; of shares Wilson's (nanorl/evaluate.py)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    mean = float(values.mean())
    if shares:
        return mean, *interval(values)
    half = quantile_of_t(len(values) - 1) * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def plain(x):
    """As JSON holds it: builtins only, floats to six digits."""
    if isinstance(x, Tensor):
        return plain(x.tolist())
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def scores(z: Tensor) -> Tensor:
    """d log pi(a) / dz = onehot(a) - pi, for every action a of a softmax policy.       logits [V] -> [V, V], a row for each"""
    return torch.eye(len(z), dtype=z.dtype) - log_softmax(z).exp()


# ---------------------------------------------------------------------------------------------------------------------
# The tiny models that some claims are about
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    """A directory that is gone when the program ends."""
    return tempfile.TemporaryDirectory()


@functools.cache
def stage(name: str, smoke: bool) -> str:
    """The directory of a finished run with the default flags, `sft` or `grpo`; in a smoke test, fine-tuned for two steps."""
    if not smoke:
        return run.ensure_stage(train_sft.Config(quiet=True), name)
    folder = Path(scratch().name)
    (folder / "text.txt").write_text(read_text(DATA / "text.txt")[:20_000])
    cfg = train_sft.Config(device="cpu", quiet=True)
    base = run.ensure_stage(cfg, "pretrain", out=str(folder / "pretrain"), preset="pico", steps=2, batch=2, length=32,
                            text=str(folder / "text.txt"))
    return run.ensure_stage(cfg, "sft", out=str(folder / "sft"), init=base, steps=2, batch=4, eval_problems=2)


def load(folder: str) -> tuple[GPT, Tokenizer]:
    """The policy of a run, on the CPU."""
    checkpoint = run.load_checkpoint(folder, "policy")
    return run.model_from(checkpoint, torch.device("cpu")), run.tokenizer_from(checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Running, keeping, showing
# ---------------------------------------------------------------------------------------------------------------------


def panels(columns: int, rows: int = 1, width: float = 4.0, height: float = 3.8):
    """A figure and its axes, row by row, all in one look."""
    size = (width * columns, height * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def name_of(module: ModuleType) -> str:
    return Path(module.__file__).stem


def shown(value) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def printed(finding: Finding) -> str:
    """The claim, its table in columns, and the verdict."""
    lines = [f"{finding.claim}. {finding.says}"]
    if finding.rows:
        columns = list(finding.rows[0])
        cells = [columns, *([shown(row[column]) for column in columns] for row in finding.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        lines += ["    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                  for row in cells]
    return "\n".join([*lines, f"-> {finding.verdict}: {finding.because}\n"])


def measure(module: ModuleType, smoke: bool) -> dict[str, Finding]:
    """Every claim of a file, measured and printed."""
    findings = {}
    for claim in tqdm(module.CLAIMS, desc=name_of(module), leave=False, disable=None):
        finding = claim(smoke)
        findings[finding.claim] = Finding(**plain(asdict(finding)))
        tqdm.write(printed(finding))
    return findings


def keep(module: ModuleType, findings: dict[str, Finding]) -> None:
    kept = {"torch": torch.__version__, "findings": [asdict(x) | {"verdict": x.verdict} for x in findings.values()]}
    path = RESULTS / f"{name_of(module)}.json"
    run.write_atomically(path, lambda f: f.write((json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode()))


def kept(module: ModuleType) -> dict[str, Finding]:
    """The findings of the last run."""
    path = RESULTS / f"{name_of(module)}.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run python -m experiments.{name_of(module)} first")
    findings = [Finding(**{k: v for k, v in x.items() if k != "verdict"}) for x in json.loads(path.read_text())["findings"]]
    return {finding.claim: finding for finding in findings}


@user_errors_as_sentences
def main(module: ModuleType, argv: list[str] | None = None) -> None:
    """One file of claims: `--smoke` keeps nothing, `--draw` measures nothing."""
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="everything once and tiny, to see that it runs; nothing is kept")
    parser.add_argument("--draw", action="store_true", help="only the figure, from the findings that are kept")
    args = parser.parse_args(argv)
    conclude(module, args.smoke, args.draw)


def conclude(module: ModuleType, smoke: bool, draw: bool) -> None:
    """Measure the claims of a file, or read what was measured; keep and draw it, but for a smoke test's, which goes nowhere."""
    findings = kept(module) if draw else measure(module, smoke)
    if not smoke and not draw:
        keep(module, findings)
    with tempfile.TemporaryDirectory() as folder:
        module.draw(findings, Path(folder) / "figure.png" if smoke else FIGURES / f"{name_of(module)}.png")


def title(module: ModuleType) -> str:
    return inspect.getdoc(module).split("\n")[0].removesuffix(".")
