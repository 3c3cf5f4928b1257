"""A real model learns: SmolLM2-135M-Instruct by GRPO on a CPU, all weights and adapters, three seeds each.

    python -m experiments.real_model                    all runs and evaluations; what is finished is kept
    python -m experiments.real_model sums-lora          those whose name begins like this
    python -m experiments.real_model --draw             only results, table and figure, from what is there

A gain can be format alone. So an evaluation says both, on 500 held-out problems, answered greedily: *strict*, the right number
in the format that is asked for, and *lenient*, the right number as the last one of an answer. The baseline is the best prompt
without examples and with them. The runs need the packages of smollm2 (docs/real-models.md), those on GSM8K its files
(real_tasks.py).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from experiments.findings import mean_and_interval, panels, save
from experiments.runs import ROOT, parser_of_runs
from nanorl.read_log import read_metrics
from nanorl.plot import PALETTE
from nanorl.run import read_lines

SEEDS = (0, 1, 2)
TASKS = "experiments/real_tasks.py"
GRPO = ("train_grpo.py --init smollm2 --dtype bfloat16 --prompts 8 --group 8 --skip --eval-problems 16 "
        "--eval-every 1000 --save-every 1000 --quiet")
SFT = ("train_sft.py --init smollm2 --dtype bfloat16 --batch 16 --micro-batch 4 "
       "--eval-problems 16 --eval-every 1000 --save-every 1000 --quiet")
SUMS = f"{GRPO} --task {TASKS}:two_digit_sums --max-new-tokens 32 --steps 30"
GSM8K = f"--task {TASKS}:gsm8k_easy --max-new-tokens 128"
GSM8K_GRPO = f"{GRPO} {GSM8K} --prompts 16 --temperature 0.7 --steps 30"
# Name: what is trained, and the command. Each is run with each seed.
RUNS = {"sums-all": ("all weights", f"{SUMS} --lr 2e-5"),
        "sums-lora": ("LoRA 16", f"{SUMS} --lr 3e-4 --lora-rank 16"),
        "gsm8k-all": ("all weights", f"{GSM8K_GRPO} --lr 2e-5"),
        "gsm8k-lora": ("LoRA 16", f"{GSM8K_GRPO} --lr 3e-4 --lora-rank 16"),
        "gsm8k-sft": ("SFT, all weights", f"{SFT} {GSM8K} --steps 60 --lr 2e-5")}
# Prompting, before anything is trained: the task, and the longest answer. The first of each is what is trained on.
PROMPTS = {"sums": {"2 examples": ("two_digit_sums", 32), "4 examples": ("two_digit_sums_four_shot", 32),
                    "4 examples, told how to end": ("two_digit_sums_four_shot_told", 32),
                    "zero-shot": ("two_digit_sums_zero_shot", 96),
                    "zero-shot, told how to end": ("two_digit_sums_zero_shot_told", 96)},
           "gsm8k": {"2 examples": ("gsm8k_easy", 128), "zero-shot": ("gsm8k_easy_zero_shot", 256)}}
RESULTS, FIGURE = ROOT / "experiments/results/real_model.json", ROOT / "docs/figures/real_model.png"


def measured(command: str, folder: Path, name: str) -> None:
    """Run this, unless it is done already, and keep what it took: minutes, of CPU too, and gigabytes at the peak."""
    done = folder / f"{name}.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (folder / f"{name}.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: failed; see {log.name}")
    done.write_text(json.dumps({"minutes": (time.monotonic() - started) / 60, "gigabytes": usage.ru_maxrss / 2**20,
                                "cpu_minutes": (usage.ru_utime + usage.ru_stime) / 60}))


def evaluation(model: str, task: str, longest: int, folder: Path) -> None:
    measured(f"-m nanorl.evaluate {model} --task {TASKS}:{task} --method greedy --problems 500 --dtype bfloat16 "
             f"--max-new-tokens {longest} --out {folder / 'evaluation.json'}", folder, "evaluating")


def make(out: Path, names: list[str]) -> None:
    """The runs and evaluations whose names begin with one of these."""
    for family, prompts in PROMPTS.items():
        for label, (task, longest) in prompts.items():
            if f"{family}-before-{label}".startswith(tuple(names)):
                evaluation("smollm2", task, longest, out / f"{family}-before-{label.replace(' ', '-')}")
    for seed in SEEDS:
        for name, (_, command) in RUNS.items():
            folder = out / f"{name}-{seed}"
            if folder.name.startswith(tuple(names)):
                measured(f"{command} --seed {seed} --out {folder / 'run'}", folder, "training")
                evaluation(str(folder / "run"), *next(iter(PROMPTS[name.split("-")[0]].values())), folder)


def row(folder: Path) -> dict | None:
    """What an evaluation found."""
    if not (folder / "evaluation.json").exists():
        return None
    found = json.loads((folder / "evaluation.json").read_text())["rows"][0]
    return {"strict": found["value"], "lenient": found["lenient"], "tokens_per_answer": found["tokens"]}


def collect(out: Path) -> dict:
    """All that is finished, as the repository keeps it."""
    results = {"before": {}, "runs": {}}
    for family, prompts in PROMPTS.items():
        rows = {label: row(out / f"{family}-before-{label.replace(' ', '-')}") for label in prompts}
        results["before"][family] = {label: found for label, found in rows.items() if found}
    for name in RUNS:
        results["runs"][name] = []
        for seed in SEEDS:
            folder = out / f"{name}-{seed}"
            if not (after := row(folder)):
                continue
            lines = read_metrics(folder / "run")
            samples = [{key: s.get(key) for key in ("step", "prompt", "response", "reward")}
                       for s in read_lines(folder / "run/samples.jsonl")]
            results["runs"][name].append(
                {"seed": seed, "after": after, **json.loads((folder / "training.json").read_text()),
                 "tokens": sum(line.get("rollout/tokens", 0) for line in lines),
                 "reward": [line["rollout/reward"] for line in lines if "rollout/reward" in line],
                 "samples": samples if not name.startswith("gsm8k") else [s | {"prompt": ""} for s in samples]})
    return results


def shared(values: list[float], digits: int = 3) -> str:
    """The mean over seeds, with its 95 % confidence interval where there are several."""
    mean, low, high = mean_and_interval(values)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else "")


def standard_errors(before: float, after: float, problems: int = 500) -> float:
    """By how many standard errors of a difference of two shares this one exceeds 0."""
    return (after - before) / ((before * (1 - before) + after * (1 - after)) / problems) ** 0.5


def table(results: dict) -> str:
    lines = ["| task | trained | strict | lenient | standard errors beyond the best prompt, each seed | tokens | CPU minutes "
             "| GB |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for family, prompts in results["before"].items():
        for label, found in prompts.items():
            lines.append(f"| {family} | nothing, {label} | {found['strict']:.3f} | {found['lenient']:.3f} | | | | |")
        best = max(found["lenient"] for found in prompts.values()) if prompts else 0.0
        for name, (trained, _) in RUNS.items():
            if name.startswith(family) and (runs := results["runs"][name]):
                lines.append("| {} | {} | {} | {} | {} | {:,.0f} | {} | {} |".format(
                    family, trained, *(shared([run["after"][key] for run in runs]) for key in ("strict", "lenient")),
                    ", ".join(f"{standard_errors(best, run['after']['lenient']):.1f}" for run in runs),
                    sum(run["tokens"] for run in runs) / len(runs),
                    *(shared([run[key] for run in runs], 1) for key in ("cpu_minutes", "gigabytes"))))
    return "\n".join(lines)


def draw(results: dict) -> None:
    """The reward of sampled answers, averaged over five steps, a line for each seed; its end: lenient accuracy, greedy, and
    dashed, that of the best prompt."""
    titles = {"sums": "two-digit sums in words", "gsm8k": "GSM8K, two steps at most"}
    families = [family for family in titles if any(run["reward"] for name in RUNS if name.startswith(family)
                                                   for run in results["runs"][name])]
    figure, axes = panels(len(families), width=5)
    for axis, family in zip(axes, families, strict=True):
        for name, colour in zip((name for name in RUNS if name.startswith(family)), PALETTE, strict=False):
            for seed, run in enumerate(results["runs"][name]):
                rewards = [run["reward"][max(0, i - 4) : i + 1] for i in range(len(run["reward"]))]
                axis.plot([sum(part) / len(part) for part in rewards], color=colour, linewidth=1.2,
                          label=None if seed else RUNS[name][0])
                axis.plot(len(rewards), run["after"]["lenient"], "o", color=colour, markersize=5)
        best = max(found["lenient"] for found in results["before"][family].values())
        axis.axhline(best, color="grey", linestyle="--", linewidth=1, label="the best prompt, greedy")
        axis.set(title=titles[family], xlabel="step of GRPO", ylabel="right answers: sampled, and greedy at the end",
                 ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    save(figure, FIGURE)


def main() -> None:
    args = parser_of_runs(__doc__, "runs/real-model").parse_args()
    if not args.draw:
        return make(args.out.resolve(), args.names)
    results = collect(args.out.resolve())
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    print(table(results))


if __name__ == "__main__":
    main()
