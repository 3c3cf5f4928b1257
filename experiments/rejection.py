"""Rejection sampling: fine-tune on the best of n answers, beside as many answers chosen at random.

    python -m experiments.rejection             three seeds, from runs/sorter, which is made if it is missing

192 problems get eight answers each, 60 % of the answers of a run of experiments/family.py. The best of eight is a right one,
drawn among the right; a problem without any is left out. The control takes one of the eight answers to the same problems, right
or wrong. What the two differ by is what the verifier says: fine-tuning itself, on more text of the policy's own, is in both.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from random import Random

import train_sft
from experiments.findings import load
from experiments.runs import cell, sorter
from nanorl.heldout import evaluate_policy
from nanorl.rollout import Experience, collect
from nanorl.run import derive
from nanorl.sample import Sampling
from nanorl.tasks import make_task

TASK, PROBLEMS, ANSWERS, SEEDS = "sorting-6", 192, 8, 3
SAMPLING = Sampling(80, slots=1024)


def chosen(experience: Experience, rng: Random) -> dict[str, list[dict[str, str]]]:
    """Records to fine-tune on: a right answer to each problem that has one, and any answer to each of the same problems."""
    records = {"best of 8": [], "random": []}
    for p, (problem, rewards) in enumerate(zip(experience.problems, experience.rewards.tolist(), strict=True)):
        right = [i for i, reward in enumerate(rewards) if reward == 1]
        if right:
            for name, i in (("best of 8", rng.choice(right)), ("random", rng.randrange(len(rewards)))):
                records[name].append({"prompt": problem.prompt, "response": experience.texts[p * len(rewards) + i]})
    return records


def evaluated(init: str, seed: int) -> tuple[float, float]:
    """Held-out accuracy, sampled and greedy."""
    metrics, _ = evaluate_policy(*load(init), make_task(TASK), SAMPLING, problems=500, seed=seed)
    return metrics["eval/accuracy_sampled"], metrics["eval/accuracy_greedy"]


def fine_tuned(init: str, records: list[dict[str, str]], seed: int) -> tuple[float, float]:
    """The accuracies after 48 updates of 32 answers each, 60 % of the updates of a run of experiments/family.py."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data = Path(folder) / "answers.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        train_sft.main(train_sft.Config(out=f"{folder}/run", init=init, data=str(data), seed=seed, steps=48, batch=32, lr=3e-4,
                                        eval_every=1000, quiet=True, device="cpu"))
        return evaluated(f"{folder}/run", seed)


def main() -> None:
    init, task = sorter(), make_task(TASK)
    rows, tokens, count = {"before": []}, [], []
    for seed in range(SEEDS):
        experience = collect(*load(init), task, SAMPLING, prompts=PROBLEMS, samples=ANSWERS, seed=derive(seed, "rejection"))
        tokens.append(int(experience.rollout.mask.sum()) / 1000)
        rows["before"].append(evaluated(init, seed))
        for name, records in chosen(experience, Random(f"rejection {seed}")).items():
            rows.setdefault(name, []).append(fine_tuned(init, records, seed))
            count.append(len(records))
    print("| fine-tuned on | accuracy, sampled | greedy |\n|---|---|---|")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(cell(list(each), 3) for each in zip(*found, strict=True))} |")
    print(f"\n{cell(tokens, 0)} thousand answer tokens sampled; {cell(count, 0)} answers kept.")


if __name__ == "__main__":
    main()
