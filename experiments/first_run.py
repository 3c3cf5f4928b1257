"""The README's picture: the same four questions before and after twenty steps of GRPO, and the learning curves of three seeds.

    python train_grpo.py --seed 1 --out runs/grpo-1         (each seed in a directory of its own, from its own stages)
    python -m experiments.first_run runs/grpo SEED1/runs/grpo SEED2/runs/grpo

The answers are those of the first run. Writes docs/first-run-light.svg and docs/first-run-dark.svg.
"""

import argparse
from pathlib import Path

from experiments.runs import ROOT
from nanorl.read_log import read_metrics
from nanorl.plot import pyplot
from nanorl.run import read_lines

THEMES = {"light": {"ink": "#1F2328", "faint": "#8C959F", "right": "#1A7F37", "wrong": "#CF222E", "reward": "#0072B2",
                    "worked": "#D55E00"},
          "dark": {"ink": "#E6EDF3", "faint": "#7D8590", "right": "#3FB950", "wrong": "#F85149", "reward": "#58A6FF",
                   "worked": "#F0883E"}}
SHOWN = (0, 20)     # steps of GRPO done


def answers(axis, samples: list[dict], theme: dict[str, str]) -> None:
    """One block of lines for each step in SHOWN: a mark, the question, the response."""
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.axis("off")
    lines = []
    for step in SHOWN:
        lines.append(("Before RL" if step == 0 else f"After {step} steps of GRPO", None))
        lines += [(f"{s['prompt'].removeprefix('What is ')}  {s['response']}", s["reward"] == 1)
                  for s in samples if s["step"] == step]
        lines.append(("", None))
    for number, (text, right) in enumerate(lines[:-1]):
        y = 1 - (number + 0.5) / (len(lines) - 1)
        if right is None:
            axis.text(0, y, text, color=theme["ink"], fontsize=11, fontweight="bold", va="center")
        else:
            axis.text(0, y, "✓" if right else "✗", color=theme["right" if right else "wrong"], fontsize=11, va="center")
            axis.text(0.04, y, text, color=theme["ink"], fontsize=9.5, family="monospace", va="center")


def curves(axis, runs: list[list[dict]], theme: dict[str, str]) -> None:
    """Reward and share of worked answers in training, a thin line for each seed."""
    for name, colour, label in (("rollout/reward", "reward", "answers that are right"),
                                ("rollout/worked", "worked", "answers that are worked out")):
        for lines in runs:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), color=theme[colour], linewidth=1.3, label=label)
            label = None
    axis.set(xlabel="step of GRPO", ylim=(0, 1.03), xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(theme["faint"])
    axis.tick_params(colors=theme["faint"], labelcolor=theme["ink"])
    axis.xaxis.label.set_color(theme["ink"])
    axis.legend(frameon=False, fontsize=9, loc="lower right", labelcolor=theme["ink"],
                title=f"share in training, {len(runs)} seeds" if len(runs) > 1 else "share in training")
    axis.get_legend().get_title().set_color(theme["ink"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="runs of train_grpo.py, one for each seed")
    args = parser.parse_args()
    plt = pyplot()
    for name, theme in THEMES.items():
        with plt.rc_context({"svg.hashsalt": name}):
            figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.3), width_ratios=(1.35, 1), layout="constrained")
            answers(left, read_lines(args.runs[0] / "samples.jsonl"), theme)
            curves(right, [read_metrics(folder) for folder in args.runs], theme)
            figure.savefig(ROOT / f"docs/first-run-{name}.svg", transparent=True, metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
