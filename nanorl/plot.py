"""Learning curves of one or more runs, as a PNG.        Needs the extra `plot`:  pip install -e ".[plot]"

    python -m nanorl.plot runs/grpo [runs/other ...] [--out FILE]
    python -m nanorl.plot --seeds runs/0/grpo runs/1/grpo runs/2/grpo
    python -m nanorl.plot --fit runs/grpo       reward against tokens, with a fitted sigmoid and its extrapolation
"""

import io
import itertools
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorl.errors import UserError, printable, user_errors_as_sentences
from nanorl.read_log import read_metrics
from nanorl.run import parse
from nanorl.scaling import Fit, fit

PANELS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))    # {title: {metric: label}}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")    # Okabe and Ito: safe for all eyes


@dataclass(frozen=True, kw_only=True)
class Config:
    runs: tuple[str, ...]    # directories of runs
    seeds: bool = False      # the runs differ only in their seed: curves of one metric share a colour and a label
    fit: bool = False        # draw only reward against tokens, and the sigmoid that fits it
    out: str = ""            # the PNG to write (default: curves.png, or fit.png, in the directory of the first run)


def pyplot():
    """matplotlib.pyplot, set up to draw into files. UserError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('plotting needs matplotlib; install it with: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(figure, out: Path) -> None:
    """Write the PNG, without the frame above and to the right of each panel."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    pyplot().close(figure)


def legend(run: Path | str) -> str:
    """A run's name for a legend: as it is, where matplotlib would see formulas, or hide what begins with "_"."""
    text = printable(str(run)).encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def draw(runs: list[Path], out: Path, seeds: bool = False) -> None:
    """Draw all curves of these runs, with a panel for each section of plot.toml that has something to show."""
    logs = {str(run): read_metrics(run) for run in runs}
    nonzero = {name for lines in logs.values() for line in lines for name, value in line.items() if value}
    panels = [(title, metrics) for title, metrics in PANELS.items() if not nonzero.isdisjoint(metrics)]
    if not panels:
        raise UserError(f"{', '.join(map(str, runs))}: nothing has been logged yet")

    rows = -(-len(panels) // 4)
    sizes = [len(panels) // rows + (row < len(panels) % rows) for row in range(rows)]       # panels of each row
    figure = pyplot().figure(figsize=(3.6 * sizes[0], 3.0 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, math.lcm(*sizes))
    places = [grid[row, i * grid.ncols // size : (i + 1) * grid.ncols // size] for row, size in enumerate(sizes)
              for i in range(size)]
    for place, (title, metrics) in zip(places, panels, strict=True):
        axis, colours = figure.add_subplot(place), iter(PALETTE * len(logs))
        for number, (run, lines) in enumerate(logs.items()):
            colours = iter(PALETTE) if seeds else colours
            for name, label in metrics.items():
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                if not points:
                    continue
                sparse = name.startswith("eval/")
                if seeds:
                    label = label if number == 0 else None
                elif len(logs) > 1:
                    label = f"{legend(run)}: {label}"
                axis.plot(*zip(*points, strict=True), color=next(colours), label=label, linewidth=1.8 if sparse else 1.0,
                          marker="o" if sparse else None, markersize=4)
        axis.set(title=title, xlabel="step")
        low, high = min(axis.dataLim.y0, 0), max(axis.dataLim.y1, 0)
        axis.set_ylim(1.05 * low, 1.05 * high if low < high else 1)
        if (len(logs) > 1 and not seeds) or len(metrics) > 1:
            axis.legend(frameon=False, fontsize=8)
    save(figure, out)


def draw_search(rows: list[dict], measured: str, out: Path) -> None:
    """Draw what test-time compute buys: `measured` against tokens per problem, one line for each method."""
    figure, axis = pyplot().subplots(figsize=(7.2, 4.6), layout="constrained")
    runs, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("run", "method"))
    styles = dict(zip(runs, itertools.cycle(("-", "--", ":", "-.")), strict=False))
    looks = dict(zip(methods, itertools.product("os^Dv", PALETTE), strict=False))
    for name, method in itertools.product(runs, methods):
        points = [row for row in rows if (row["run"], row["method"]) == (name, method)]
        if points:
            x, y, low, high = torch.tensor([[row[key] for row in points] for key in ("tokens", "value", "low", "high")])
            marker, colour = looks[method]
            axis.errorbar(x, y, torch.stack((y - low, high - y)).clamp(min=0), color=colour, marker=marker,
                          label=method if len(runs) == 1 else f"{legend(name)}: {method}", linestyle=styles[name], markersize=4,
                          linewidth=1.2, elinewidth=0.6)
    axis.set(xscale="log", xlabel="tokens sampled per problem", ylabel=measured)
    axis.xaxis.set_major_formatter("{x:g}")
    if measured == "accuracy":
        axis.set_ylim(-0.02, 1.02)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, out)


def reward_by_tokens(lines: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reward of each step of RL, and the number of answer tokens sampled before it.       -> [n], [n]"""
    steps = [line for line in lines if "rollout/reward" in line]
    tokens = torch.tensor([0.0, *(line.get("rollout/tokens") or 0.0 for line in steps)], dtype=torch.float64).cumsum(0)[:-1]
    known = [i for i, line in enumerate(steps) if line["rollout/reward"] is not None]
    return tokens[known], torch.tensor([steps[i]["rollout/reward"] for i in known], dtype=torch.float64)


def describe_fit(fitted: Fit) -> str:
    """The parameters of the sigmoid with their intervals; only bounds, where the data end before the bend."""
    def words(value: float, low: float, high: float) -> str:
        return f"{value:.3g} ({low:.3g} to {high:.3g})"
    floor, ceiling, thousands = fitted.predict(0.0), fitted.predict(torch.inf), fitted.midpoint / 1000
    if fitted.reaches_the_bend:
        return (f"reward starts at {words(*floor)}, the midpoint is at {words(*fitted.interval(thousands))} "
                f"thousand tokens, and the ceiling is {words(*ceiling)}; B = {words(*fitted.interval(fitted.steepness))}.")
    known = f"anything above {ceiling[1]:.3g}" if fitted.open_above else f"from {ceiling[1]:.3g} to {ceiling[2]:.3g}"
    return (f"reward starts at {words(*floor)}. The data do not reach the bend: the midpoint may be anywhere from "
            f"{float(thousands.min()):.3g} thousand tokens on, and the ceiling is {known}.")


def draw_fit(runs: list[Path], out: Path) -> None:
    """Draw reward against tokens, and the sigmoid with its 95 % interval, extrapolated (dashed) to ten times the tokens."""
    figure, axis = pyplot().subplots(figsize=(7.2, 4.6), layout="constrained")
    rewards, sentences = {run: reward_by_tokens(read_metrics(run)) for run in runs}, []
    for (run, (tokens, reward)), colour in zip(rewards.items(), itertools.cycle(PALETTE), strict=False):
        try:
            fitted = fit(tokens, reward)
        except ValueError as e:
            raise UserError(f"{run}: {e}") from None
        sentences.append(f"{run}: {describe_fit(fitted)}")
        first, last = (float(x) / 1000 for x in (tokens[tokens > 0].min(), tokens.max()))
        axis.plot(tokens / 1000, reward, "o", color=colour, markersize=3, label=legend(run))
        for start, end, style in ((first, last, "-"), (last, 10 * last, "--")):
            x = torch.logspace(*torch.tensor([start, end]).log10().tolist(), 100, dtype=torch.float64)
            value, low, high = zip(*(fitted.predict(1000 * float(c)) for c in x), strict=True)
            axis.plot(x, value, style, color=colour, linewidth=1.4)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    low, high = (1.25 * float(x) for x in torch.cat([torch.zeros(1), *(reward for _, reward in rewards.values())]).aminmax())
    axis.set(xscale="log", xlabel="thousand answer tokens sampled", ylabel="reward in training", ylim=(low, high))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, out)
    print("\n".join(sentences))


def check_can_draw(path: Path) -> None:
    """UserError if matplotlib is not installed or cannot write files of this kind here: a small one is tried."""
    figure = pyplot().Figure()
    figure.text(0, 0, "text")
    try:
        figure.savefig(io.BytesIO(), format=path.suffix[1:] or "without an ending")
    except Exception as e:          # of many kinds: pgf, for one, needs TeX
        raise UserError(f"{path}: cannot draw such a file ({' '.join(str(e).split()):.200}); expected a .png") from None


@user_errors_as_sentences
def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, argv)
    runs = [Path(run) for run in cfg.runs]
    out = Path(cfg.out) if cfg.out else runs[0] / ("fit.png" if cfg.fit else "curves.png")
    check_can_draw(out)
    try:
        draw_fit(runs, out) if cfg.fit else draw(runs, out, cfg.seeds)
    except OSError as e:
        raise UserError(str(e)) from None
    print(f"Drew {out}.")


if __name__ == "__main__":
    main()
