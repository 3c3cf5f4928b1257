"""Learning from preferences, end to end: what a reward model knows, what each method makes of it, and where it breaks.

    python train_sft.py --task stories          the models that everything starts from, seed 0
    python train_sft.py
    python -m experiments.preferences           three seeds of each run, two runs at a time; finished runs are kept
    python -m experiments.preferences --draw    only the tables and the figure, from the runs that are there

Every seed has its own reward model, which its PPO runs and its best-of-n follow. The hidden reward is measured throughout;
no run is trained on it.
"""

import argparse
import json
from pathlib import Path

import torch

from experiments.runs import ROOT, cell, directory, train_all
from nanorl import run
from nanorl.heldout import heldout_problems
from nanorl.pairs import RANKERS
from nanorl.read_log import read_metrics
from nanorl.plot import PALETTE, pyplot
from nanorl.sample import Sampling
from nanorl.search import best_of_n_curve, best_of_n_kl
from nanorl.tasks import Stories

# Label: the script and its flags. {reward} is the reward model of the same seed, {stories} and {addition} the initial models.
REWARD = {"reward model": "train_reward.py --init {stories}"}
RLHF = "train_ppo.py --reward model --reward-model {reward} --init {stories} --steps 100 --eval-every 10"
STORIES = {
    "DPO": "train_dpo.py --init {stories}",
    "iterative DPO": "train_dpo.py --init {stories} --refresh-reference 25",
    "PPO": RLHF + " --kl-coef 0.1",
    "PPO without a leash": RLHF + " --kl-coef 0",
}
ADDITION = {
    "PPO, verifier": "train_ppo.py --init {addition} --steps 30 --eval-every 5",
    **{f"group loss: {loss}": f"train_group_dpo.py --init {{addition}} --loss {loss}"
       for loss in ("pairs", "scaled", "mean", "hinge", "hinge --margin 0.2")},
}
COMMON = {"train_reward.py": "",
          "train_dpo.py": "--eval-every 20 --best-of 0",
          "train_ppo.py": "--best-of 0",
          "train_group_dpo.py": "--steps 20 --eval-every 4 --best-of 0"}
N = 16


def train(args: argparse.Namespace, rows: dict[str, str]) -> None:
    runs = []
    for seed in range(args.seeds):
        for label, line in rows.items():
            script, flags = line.split(" ", 1)
            flags = flags.format(stories=args.stories, addition=args.addition, reward=directory(args.out, "reward model", seed))
            runs.append((directory(args.out, label, seed), script, f"{flags} --seed {seed} {COMMON[script]}"))
    train_all(runs, args.jobs)


def search(args: argparse.Namespace, seed: int) -> dict[int, float]:
    """The hidden reward of the best of 1, 2, ... N stories by the initial model, as this seed's reward model chooses."""
    path = args.out / f"best_of_n-{seed}.json"
    if not path.exists():
        device, start = torch.device("cpu"), run.load_checkpoint(args.stories, "policy")
        tokenizer = run.tokenizer_from(start)
        reward_model = run.load_frozen(str(directory(args.out, "reward model", seed)), "reward model", tokenizer, device)
        best = best_of_n_curve(run.model_from(start, device), tokenizer, Stories(), heldout_problems(Stories(), 200, seed),
                               Sampling(Stories.max_answer_tokens), samples=N, seed=seed, reward_model=reward_model)
        path.write_text(json.dumps(best))
    return {int(n): value for n, value in json.loads(path.read_text()).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def reward_table(logs: list[list[dict]]) -> str:
    lines = ["| | like the labels | like the hidden reward | the same, clear pairs |", "|---|---|---|---|"]
    for name, label in RANKERS.items():
        cells = (cell([log[-1].get(f"eval/agreement_{name}_{column}") for log in logs], 3)
                 for column in ("labels", "hidden", "clear"))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stories_table(logs: dict[str, list[list[dict]]], best: list[dict[int, float]]) -> str:
    """The end of each run; its highest hidden reward is above that where a run has gone too far."""
    lines = ["| | hidden reward | highest during training | for praise | learned reward, change | KL to the start, nats | "
             "cut at the limit |", "|---|---|---|---|---|---|---|"]
    start = [log[0] for log in logs["PPO"]]
    lines.append(f"| the start | {cell([line['eval/hidden_reward'] for line in start], 2)} | – | "
                 f"{cell([line['eval/hidden_praise'] for line in start], 2)} | 0 | 0 | "
                 f"{cell([line['eval/truncated'] for line in start], 2)} |")
    lines.append(f"| best of {N} | {cell([rewards[N] for rewards in best], 2)} | – | – | – | at most {best_of_n_kl(N):.2f} "
                 "| – |")
    for label, runs in logs.items():
        last, first = [log[-1] for log in runs], [log[0] for log in runs]
        learned = [a["eval/learned_reward"] - b["eval/learned_reward"] if "eval/learned_reward" in a else None
                   for a, b in zip(last, first, strict=True)]
        highest = [max(curve(log, "eval/hidden_reward")[0]) for log in runs]
        cells = (cell([line["eval/hidden_reward"] for line in last], 2), cell(highest, 2),
                 cell([line["eval/hidden_praise"] for line in last], 2), cell(learned, 2),
                 cell([line["eval/answer_kl"] for line in last], 1), cell([line["eval/truncated"] for line in last], 2))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def addition_table(logs: dict[str, list[list[dict]]]) -> str:
    lines = ["| | accuracy, sampled: before | after | steps | KL to the start, nats |", "|---|---|---|---|---|"]
    for label, runs in logs.items():
        before, after = ([log[k]["eval/accuracy_sampled"] for log in runs] for k in (0, -1))
        kl = [log[-1]["eval/answer_kl"] for log in runs]
        lines.append(f"| {label} | {cell(before, 3)} | {cell(after, 3)} | {runs[0][-1]['step']} | {cell(kl, 1)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------------------------


def curve(log: list[dict], *names: str) -> list[list[float]]:
    """The values of some metrics at each evaluation."""
    lines = [line for line in log if "eval/answer_kl" in line]
    return [[line[name] for line in lines] for name in names]


def calibration(folders: list[Path], bins: int = 8) -> tuple[list[float], list[float], list[float]]:
    """Predicted and actual preference in bins of the prediction, and the standard error of the latter. Each held-out pair
    is seen from both sides, so the curve is symmetric about one half."""
    margins = torch.tensor([record["margin"] for folder in folders for record in run.read_lines(folder / "samples.jsonl")])
    predicted = torch.cat((margins, -margins)).sigmoid()
    actual = torch.cat((torch.ones_like(margins), torch.zeros_like(margins)))
    points = []
    for part in ((predicted * bins).long().clamp(max=bins - 1) == b for b in range(bins)):
        if n := int(part.sum()):
            p = float(actual[part].mean())
            n /= len(folders)           # every seed has the same held-out pairs
            points.append((float(predicted[part].mean()), p, (max(p * (1 - p), 1 / n) / n) ** 0.5))
    return tuple(map(list, zip(*points, strict=True)))


def draw(args: argparse.Namespace, stories: dict, addition: dict, best: list[dict[int, float]]) -> None:
    plt = pyplot()
    figure, ((knows, plane), (hacked, groups)) = plt.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
    knows.plot([0, 1], [0, 1], color="0.8", linewidth=0.8, zorder=0)
    predicted, actual, error = calibration([directory(args.out, "reward model", seed) for seed in range(args.seeds)])
    knows.errorbar(predicted, actual, error, color=PALETTE[0], marker="o", markersize=4, linewidth=1.4)
    knows.set(title="predicted and actual preference", xlabel="predicted probability that a is preferred to b",
              ylabel="share of readers who do", xlim=(0, 1), ylim=(0, 1))

    colours = dict(zip(stories, PALETTE, strict=False))
    for label, logs in stories.items():
        for k, log in enumerate(logs):
            kl, reward = curve(log, "eval/answer_kl", "eval/hidden_reward")
            plane.plot(kl, reward, color=colours[label], linewidth=1.2, marker="o", markersize=2.5,
                       label=label if k == 0 else None)
    counts = sorted(best[0])
    plane.plot([best_of_n_kl(n) for n in counts], [sum(c[n] for c in best) / len(best) for n in counts], color="black",
               marker="s", markersize=3.5, linewidth=1.2, label=f"best of 1 to {N}")
    plane.set(title="what a nat of KL buys", xlabel="KL to the start, nats per story", ylabel="hidden reward")

    for label in ("PPO", "PPO without a leash"):
        for k, log in enumerate(stories[label]):
            step, hidden, learned = curve(log, "step", "eval/hidden_reward", "eval/learned_reward")
            for values, style, name in ((learned, "--", "learned"), (hidden, "-", "hidden")):
                hacked.plot(step, [v - values[0] for v in values], style, color=colours[label], linewidth=1.2,
                            label=f"{label}: {name}" if k == 0 else None)
    hacked.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    hacked.set(title="learned and hidden reward during PPO", xlabel="step", ylabel="reward, change since the start")

    for (label, logs), colour in zip(addition.items(), PALETTE, strict=False):
        for k, log in enumerate(logs):
            step, accuracy = curve(log, "step", "eval/accuracy_sampled")
            groups.plot(step, accuracy, color=colour, linewidth=1.2, label=label if k == 0 else None)
    groups.set(title="addition, by a verifier", xlabel="step", ylabel="held-out accuracy, sampled", ylim=(0, 1.02))

    for axis in (knows, plane, hacked, groups):
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not knows:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(args.figure, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", default="runs/sft-stories", help="the model of stories to start from")
    parser.add_argument("--addition", default="runs/sft", help="the model of addition to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"), help="directory of the runs")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/preferences.png", help="the PNG to write")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.draw:
        train(args, REWARD)
        train(args, STORIES | ADDITION)
    logs = {label: [read_metrics(directory(args.out, label, seed)) for seed in range(args.seeds)]
            for label in REWARD | STORIES | ADDITION}
    best = [search(args, seed) for seed in range(args.seeds)]
    stories, addition = ({label: logs[label] for label in rows} for rows in (STORIES, ADDITION))
    print("\n\n".join((reward_table(logs["reward model"]), stories_table(stories, best), addition_table(addition))))
    draw(args, stories, addition, best)
    print(f"\nDrew {args.figure}.")


if __name__ == "__main__":
    main()
