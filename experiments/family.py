"""The rows of train_grpo.py's table, side by side: what each reaches from the same fine-tuned model, and at what price.

    python -m experiments.family                three seeds of each, two runs at a time; finished runs are kept
    python -m experiments.family --draw         only the table and the figure, from the runs that are there

A small model sorts six digits: hard enough that no row comes near 1. Four updates per rollout at a high learning rate, so that
ratios leave 1 and bounds have something to do; reinforce, rloo and raft have no ratio and take the last three as if on-policy.
GSPO's bound, meant for large models, binds on most tokens here: it appears twice, as printed and wider.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import train_grpo
from experiments.runs import ROOT, cell, directory, sorter, train_all
from nanorl import run
from nanorl.read_log import read_metrics
from nanorl.plot import PALETTE, pyplot

COMMON = "--task sorting-6 --prompts 16 --minibatches 4 --lr 2e-4 --steps 20 --eval-every 5 --eval-problems 250"
TARGET = 0.3            # of the accuracy, which starts at .22
# Label: the flags. Rows of one block are the same algorithm where all ratios are 1 (and no group is left out).
BLOCKS = [
    {"reinforce": "--algo reinforce", "reinforce, running mean off": "--algo reinforce --advantage running_mean"},
    {"rloo": "--algo rloo"},
    {"grpo": "--algo grpo", "gspo": "--algo gspo", "gspo, clip .01/.01": "--algo gspo --clip-low 0.01 --clip-high 0.01",
     "sapo": "--algo sapo"},
    {"dr_grpo": "--algo dr_grpo"},
    {"masked_is": "--algo masked_is"},
    {"dapo": "--algo dapo", "cispo": "--algo cispo"},
    {"scale_rl": "--algo scale_rl"},
    {"raft": "--algo raft"},
]
BOUNDED = ("train/clipped_low", "train/clipped_high", "train/capped", "train/masked")
COLOURS = (*PALETTE, "#8C564B")
STYLES = ("-", "--", ":", "-.")


def curve(folder: Path) -> dict[str, list[float]]:
    """Accuracy before each step and at the end, and entropy in it, each against the thousands of answer tokens sampled by
    then. A run that ended early has fewer points."""
    tokens, points = 0.0, {"tokens": [], "accuracy": [], "entropy": [], "entropy_tokens": [], "bounded": []}
    for line in read_metrics(folder):
        if "eval/accuracy_sampled" in line:
            points["tokens"].append(tokens / 1000)
            points["accuracy"].append(line["eval/accuracy_sampled"])
        tokens += line.get("rollout/tokens", 0.0)
        if "train/entropy" in line:
            points["entropy"].append(line["train/entropy"])
            points["entropy_tokens"].append(tokens / 1000)
            points["bounded"].append(sum(line.get(name, 0.0) for name in BOUNDED))
    return points


def tokens_to(curve: dict[str, list[float]], accuracy: float) -> float:
    """Thousands of answer tokens sampled before this accuracy was reached, on straight lines between evaluations."""
    points = list(zip(curve["tokens"], curve["accuracy"], strict=True))
    if points[0][1] >= accuracy:
        return 0.0
    for (t, a), (u, b) in pairwise(points):
        if b >= accuracy:
            return t + (u - t) * (accuracy - a) / (b - a)
    return float("inf")


def bound_of(flags: str) -> str:
    """The bound of a row: a clip with its flags, others with the edges of their band."""
    cfg = run.parse(train_grpo.Config, flags.split())
    numbers = [x if cfg.bound == "clip" else 1 + sign * x for sign, x in ((-1, cfg.clip_low), (1, cfg.clip_high))
               if x is not None]
    return " ".join([cfg.bound, *(f"{x:g}" for x in numbers)])


def table(curves: dict[str, list[dict]]) -> str:
    """One row per label: the mean over seeds, and the range where seeds differ visibly."""
    columns = ("row", "bound", "final accuracy, sampled", f"thousand tokens to {TARGET}", "entropy at the end",
               "most tokens bounded")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    flags = {label: flags for block in BLOCKS for label, flags in block.items()}
    for label, seeds in curves.items():
        cells = (cell([c["accuracy"][-1] for c in seeds], 3), cell([tokens_to(c, TARGET) for c in seeds], 0),
                 cell([c["entropy"][-1] for c in seeds], 4), cell([100 * max(c["bounded"]) for c in seeds], 1) + " %")
        lines.append(f"| {' | '.join((label, bound_of(flags[label]), *cells))} |")
    return "\n".join(lines)


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for block, colour in zip(BLOCKS, COLOURS, strict=True):
        for label, style in zip(block, STYLES, strict=False):
            seeds = curves[label]
            for axis, x, y in ((axes[0], "tokens", "accuracy"), (axes[1], "entropy_tokens", "entropy")):
                steps = min(len(c[y]) for c in seeds)           # as far as all seeds got
                mean = [[sum(c[key][i] for c in seeds) / len(seeds) for i in range(steps)] for key in (x, y)]
                axis.plot(*mean, style, color=colour, label=label, linewidth=1.4)
    axes[0].axhline(TARGET, color="0.8", linewidth=0.8, zorder=0)
    axes[0].set(title="held-out accuracy, sampled", xlabel="thousand answer tokens sampled", ylim=(0, None))
    axes[1].set(title="entropy of the policy, nats per token", xlabel="thousand answer tokens sampled", ylim=(0, None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", help="the model to start from (default: runs/sorter, made if it is missing)")
    parser.add_argument("--out", type=Path, default=Path("runs/family"), help="directory of the runs")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/family.png", help="the PNG to write")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    rows = [(label, flags) for block in BLOCKS for label, flags in block.items()]
    if not args.draw:
        # A resampling run that has learned its task ends for want of contrast: that is a result.
        init = args.init or sorter()
        train_all([(directory(args.out, label, seed), "train_grpo.py", f"--init {init} --seed {seed} {COMMON} {flags}")
                   for seed in range(args.seeds) for label, flags in rows], args.jobs, may_end_with="had contrast")
    curves = {label: [curve(directory(args.out, label, seed)) for seed in range(args.seeds)] for label, _ in rows}
    print(table(curves))
    draw(curves, args.figure)
    print(f"\nDrew {args.figure}.")


if __name__ == "__main__":
    main()
