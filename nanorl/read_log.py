"""The log of a run, read back: its metrics as numbers, and what can be said of them in spite of their noise."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from nanorl.errors import UserError
from nanorl.files import parse_object
from nanorl.run import read_lines

SURE = 3.0      # standard errors. Two dozen findings read every run: at 2, one in twenty by chance, every run would have one
TREND = 15      # values that a trend needs: with five in each third, noise alone passes SURE in 2 % of cases; fewer with more
SOLVED = 0.9    # pass rate. At .92, half of the groups of 8 are all right


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """The lines of metrics.jsonl, whatever has written them: what is not a finite number is None."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; expected the directory of a run")
    return [{name: x if is_number(x) else None for name, x in line.items()} for line in read_lines(path)]


def read_log(run: Path) -> "Log":
    """The metrics of a run, and its flags if it has a config.json."""
    config = run / "config.json"
    flags = parse_object(config.read_bytes(), str(config), "an object with the flags of a run") if config.exists() else {}
    return Log(read_metrics(run), flags)


def is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 1e30        # nor nan


def thirds(values: list[float]) -> tuple[list[float], list[float], list[float]]:
    n = len(values) // 3
    return values[:n], values[n : len(values) - n], values[len(values) - n :]


class Trend(NamedTuple):
    """Two means, and their difference in units of its standard error, which is that of the noise within either."""

    first: float
    last: float
    z: float

    def rises(self, by: float = 0.0) -> bool:
        return self.z >= SURE and self.last - self.first >= by


def noise(values: list[float]) -> float:
    """The variance of what is not trend: half the mean square of the jumps from one value to the next (von Neumann 1941)."""
    return fmean((b - a) ** 2 for a, b in pairwise(values)) / 2


def compare(before: list[float], after: list[float]) -> Trend:
    change = fmean(after) - fmean(before)
    error = math.sqrt(noise(before) / len(before) + noise(after) / len(after))
    return Trend(fmean(before), fmean(after), change / error if error else math.copysign(math.inf, change) if change else 0.0)


def standard_error(p: float, n: int) -> float:
    """Of an accuracy p on n problems: the root of p (1 - p) / n, with one right and one wrong answer more, for 0 and 1 are not
    certain either."""
    p = (p * n + 1) / (n + 2)
    return math.sqrt(p * (1 - p) / n)


class Accuracy(NamedTuple):
    """Held out, at the first and the last evaluation; the standard error of the difference, as if the problems were others."""

    before: float
    after: float
    error: float
    problems: int

    def __str__(self) -> str:
        return (f"held-out accuracy went from {self.before:.3f} to {self.after:.3f} on {self.problems} problems (standard "
                f"error of the change {self.error:.3f})")

    def rises_less_than(self, by: float) -> bool:
        """As far as so many problems can tell."""
        return self.after - self.before + 2 * self.error < by


@dataclass(frozen=True)
class Log:
    """The metrics and flags of a run."""

    lines: list[dict[str, Any]]
    flags: dict[str, Any]

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever this metric was logged."""
        return [(line["step"], float(line[name])) for line in self.lines if is_number(line.get(name))]

    def values(self, name: str) -> list[float]:
        return [x for _, x in self.points(name)]

    def ends(self, name: str) -> tuple[float, float] | None:
        """The means over the first and over the last third of the steps, of one step at least."""
        values = self.values(name)
        n = max(len(values) // 3, 1)
        return (fmean(values[:n]), fmean(values[-n:])) if values else None

    def start(self, name: str, default: float = 0.0) -> float:
        return (self.ends(name) or (default, default))[0]

    def end(self, name: str, default: float = 0.0) -> float:
        return (self.ends(name) or (default, default))[1]

    def trend(self, name: str) -> Trend | None:
        """From the first third of the steps to the last."""
        values = self.values(name)
        return compare(*thirds(values)[::2]) if len(values) >= TREND else None

    def flag(self, name: str) -> float:
        """A number among the flags, 0 if it was not given."""
        value = self.flags.get(name)
        return float(value) if is_number(value) else 0.0

    def steps(self) -> int:
        """How many were trained."""
        return sum(any(name.startswith(("train/", "rollout/")) for name in line) for line in self.lines)

    def one_update(self) -> bool:
        """One update on each rollout, a fresh one."""
        return self.flag("epochs") == self.flag("minibatches") == 1 and not self.flag("stale")

    def pass_rates(self) -> tuple[float, float] | None:
        """The share of right answers in the first and the last third; None where rewards do not look like shares."""
        shares = all(0 <= x <= 1 for x in self.values("rollout/reward"))
        return self.ends("rollout/reward") if shares else None

    def solved(self) -> bool:
        rates = self.pass_rates()
        return bool(rates and rates[1] >= SOLVED)

    def no_contrast(self) -> tuple[float, float] | None:
        """The share of groups that teach nothing in the first and the last third, with those that were resampled; None where
        answers are not compared within their group."""
        if self.flags.get("advantage") in ("reward", "running_mean", "positive") or {"critic", "teacher"} & self.flags.keys():
            return None
        seen, thrown, kept = self.ends("rollout/no_contrast"), self.ends("rollout/resampled"), self.flag("prompts")
        if seen and thrown and kept:
            return tuple((more + share * kept) / (more + kept) for share, more in zip(seen, thrown, strict=True))
        return seen

    def goal(self) -> tuple[str, int]:
        """What this run improves: the metric, and the sign of an improvement."""
        goals = {"train/divergence": -1, "rollout/learned_reward": 1, "rollout/reward": 1, "rollout/hidden_reward": 1}
        return next(((name, sign) for name, sign in goals.items() if self.values(name)), ("train/loss", -1))

    def progress(self) -> Trend | None:
        """The trend of the goal, with a positive z where it improves."""
        name, sign = self.goal()
        trend = self.trend(name)
        return trend and trend._replace(z=sign * trend.z)

    def accuracy(self) -> Accuracy | None:
        values, n = self.values("eval/accuracy_sampled"), int(self.flag("eval_problems"))
        if len(values) < 2 or n < 1 or not all(0 <= x <= 1 and abs(x * n - round(x * n)) < 0.01 for x in values):
            return None         # of a file with fewer problems, or with answers that could not be scored, n is not known
        return Accuracy(values[0], values[-1], math.hypot(*(standard_error(x, n) for x in (values[0], values[-1]))), n)

    def answer_kl(self) -> float | None:
        """KL to the reference at the end, nats per answer."""
        if whole := self.values("eval/answer_kl") or self.values("train/answer_kl"):
            return whole[-1]
        return self.end("train/kl") * self.end("rollout/length") if self.values("train/kl") else None

    def answer_entropy(self) -> list[tuple[int, float]]:
        """(step, nats per answer)."""
        lengths = dict(self.points("rollout/length"))
        return [(step, x * lengths[step]) for step, x in self.points("train/entropy") if step in lengths]

    def bounded(self) -> float:
        """The share of tokens that the bound holds back at the end."""
        return sum(self.end(f"train/{name}") for name in ("clipped_low", "clipped_high", "capped", "masked"))
