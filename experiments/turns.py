"""Turns: a policy learns to use a calculator, and to guess by bisection; and what three classical faults do to a step.

    python -m experiments.turns                         all runs, three seeds each; what is finished is kept
    python -m experiments.turns grpo-guess              those whose name begins like this
    python -m experiments.turns --faults                what the faults do to the first step
    python -m experiments.turns --draw                  only results and figure, from what is there

The faults are made on purpose, in one step of GRPO from the fine-tuned model: training on what the environment said, encoding
the decoded actions again, and counting observations in the lengths that weigh an episode.
"""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

import train_grpo
from experiments.findings import load, panels, save
from experiments.runs import ROOT, parser_of_runs, train_all
from nanorl import run
from nanorl.data import pad, response_mask
from nanorl.read_log import read_metrics
from nanorl.ops import token_weights
from nanorl.plot import PALETTE
from nanorl.rollout import sample_and_grade
from nanorl.sample import Sampling, token_log_probs
from nanorl.tasks import make_task

SEEDS = (0, 1, 2)
EVALUATED = "--eval-problems 200 --eval-every"
RUNS = {"grpo-calculator": f"train_grpo.py --task calculator --steps 15 --lr 3e-4 {EVALUATED} 5",
        "ppo-calculator": f"train_ppo.py --task calculator --steps 15 --lr 3e-4 --best-of 0 {EVALUATED} 5",
        "grpo-guess": f"train_grpo.py --task guess --steps 40 --prompts 64 --lr 5e-4 --minibatches 2 {EVALUATED} 20",
        "ppo-guess": "train_ppo.py --task guess --steps 40 --lr 5e-4 --lam 0.95 --epochs 1 --minibatches 4 --best-of 0 "
                     f"{EVALUATED} 20"}
RESULTS, FIGURE = ROOT / "experiments/results/turns.json", ROOT / "docs/figures/turns.png"
OPTIMUM = 135 / 32      # guesses by bisection
KEYS = {"calculator": (("eval/accuracy_sampled", "-"), ("eval/worked", "--")), "guess": (("rollout/reward", "-"),)}    # drawn


def make(out: Path, names: list[str]) -> None:
    """The runs whose names begin with one of these, from a fine-tuned model of their task."""
    for task in ("guess", "calculator"):
        train_all([(out / f"sft-{task}", "train_sft.py", f"--task {task} --eval-problems 200 --eval-every 1000")], 1)
    train_all([(out / f"{name}-{seed}", command.split()[0],
                f"{command.partition(' ')[2]} --init {out}/sft-{name.partition('-')[2]} --seed {seed}")
               for seed in SEEDS for name, command in RUNS.items() if name.startswith(tuple(names))], 1)


def collect(out: Path) -> dict:
    """The curves of all runs that are there."""
    results = {}
    for name in RUNS:
        for seed in SEEDS:
            if (out / f"{name}-{seed}/metrics.jsonl").exists():
                lines = read_metrics(out / f"{name}-{seed}")
                curves = {key: [[line["step"], line[key]] for line in lines if line.get(key) is not None]
                          for key in ("rollout/reward", "rollout/worked", "rollout/turns", "eval/accuracy_sampled",
                                      "eval/accuracy_greedy", "eval/reward", "eval/turns", "eval/worked")}
                results.setdefault(name, []).append({"seed": seed} | {k: v for k, v in curves.items() if v})
    return results


def encoded_again(rollout, tokenizer):
    """The rollout that one gets whose actions are decoded, and encoded again."""
    rows, masks = [], []
    for ids, mask, n in zip(rollout.tokens.tolist(), rollout.mask.tolist(), rollout.lengths.tolist(), strict=True):
        row, flags, action = ids[:1], [], []
        for id, sampled in [*zip(ids[1:n], mask[: n - 1], strict=True), (None, False)]:
            if sampled:
                action.append(id)
                continue
            if action:
                stop = [action.pop()] if action[-1] in tokenizer.stop_ids else []
                again = tokenizer.encode(tokenizer.decode(action)) + stop
                row, flags, action = row + again, flags + [True] * len(again), []
            if id is not None:
                row, flags = [*row, id], [*flags, False]
        rows.append(row)
        masks.append(flags)
    tokens, lengths = pad(rows)
    return replace(rollout, tokens=tokens, lengths=lengths, mask=pad(masks)[0].bool())


def gradient(policy, rollout, adv, mask, lengths=None):
    """One step of GRPO's gradient, flat. With `lengths`, these weigh the rows in place of the tokens that count."""
    weights = token_weights(mask, rollout.prompt_index, "sequence_mean")
    if lengths is not None:
        weights = weights * (mask.sum(-1) / lengths)[:, None]
    logp, _ = token_log_probs(policy, rollout.tokens, mask)
    loss, _ = train_grpo.objective(logp, logp.detach(), adv, mask, weights)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()), materialize_grads=True)])


def faults(out: Path, task_name: str) -> dict[str, float]:
    """Of 32 x 8 episodes of the fine-tuned model: the share whose ids change when they are encoded again, and how far each
    fault moves the gradient of the step, relative to its norm."""
    policy, tokenizer = load(str(out / f"sft-{task_name}"))
    task, cfg = make_task(task_name), train_grpo.Config(init="x", task=task_name)
    problems = [task.problem(Random(i), "train") for i in range(32)]
    found = sample_and_grade(policy, tokenizer, task, problems, Sampling(task.max_answer_tokens), samples=8)
    rollout = found.rollout
    adv, mask = train_grpo.advantages(cfg, rollout, found.rewards, rollout.logp, None, {})
    whole = response_mask(rollout.prompt_lengths, rollout.lengths, rollout.tokens.shape[1])
    again = encoded_again(rollout, tokenizer)
    right = gradient(policy, rollout, adv, mask)

    def moved(other):
        return float((other - right).norm() / right.norm())

    changed = [a[:n] != b[:m] for a, b, n, m in zip(rollout.tokens.tolist(), again.tokens.tolist(), rollout.lengths.tolist(),
                                                   again.lengths.tolist(), strict=True)]
    observed = token_log_probs(policy, rollout.tokens, whole & ~mask)[0].detach()
    return {"tokens of observations, of all after the prompt": 1 - float(mask.sum() / whole.sum()),
            "nats per token of an observation": -float(observed.sum() / (whole & ~mask).sum()),
            "moved by training on observations": moved(gradient(policy, rollout, adv, whole)),
            "episodes whose ids change when encoded again": sum(changed) / len(changed),
            "moved by encoding again": moved(gradient(policy, again, adv, again.mask)),
            "moved by counting observations in lengths": moved(gradient(policy, rollout, adv, mask, whole.sum(-1)))}


def trained_on_observations(out: Path, steps: int = 8) -> list[float]:
    """The rewards of the first steps of grpo-calculator, seed 0, whose mask has all that follows the prompt."""
    sound, folder = train_grpo.collect, out / "trained-on-observations"

    def collect(*args, **kwargs):
        found = sound(*args, **kwargs)
        mask = response_mask(found.rollout.prompt_lengths, found.rollout.lengths, found.rollout.tokens.shape[1])
        return replace(found, rollout=replace(found.rollout, mask=mask))

    train_grpo.collect = collect
    try:
        flags = f"--task calculator --steps {steps} --lr 3e-4 --eval-problems 20 --eval-every 100 --no-selfcheck --quiet"
        train_grpo.main(run.parse(train_grpo.Config, [*flags.split(), "--init", f"{out}/sft-calculator", "--out", str(folder)]))
    finally:
        train_grpo.collect = sound
    return [line["rollout/reward"] for line in read_metrics(folder) if "rollout/reward" in line]


def draw(results: dict) -> None:
    """Held-out accuracy and tool use, and guesses, over the steps; a line for each run."""
    figure, axes = panels(2, width=5)
    for (title, axis), task in zip((("calculator: right, and tool used (dashed)", axes[0]), ("guess: guesses a game", axes[1])),
                                   ("calculator", "guess"), strict=True):
        for algorithm, colour in zip(("grpo", "ppo"), PALETTE, strict=False):
            for found in results.get(f"{algorithm}-{task}", []):
                for key, style in KEYS[task]:
                    points = [(step, y if task == "calculator" else 11 - 10 * y) for step, y in found[key]]
                    label = algorithm.upper() if style == "-" and found is results[f"{algorithm}-{task}"][0] else None
                    axis.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.4, label=label)
        if task == "guess":
            axis.axhline(OPTIMUM, color="grey", linestyle=":", linewidth=1, label="bisection, 4.22")
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False, fontsize=8)
    save(figure, FIGURE)


def main() -> None:
    parser = parser_of_runs(__doc__, "runs/turns")
    parser.add_argument("--faults", action="store_true", help="only what the faults do to a step")
    args = parser.parse_args()
    out = args.out.resolve()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}, "faults": {}}
    if args.faults:
        kept["faults"] = {task: faults(out, task) for task in ("calculator", "guess")}
        kept["trained on observations"] = trained_on_observations(out)
    elif args.draw:
        kept["runs"] = collect(out)
        draw(kept["runs"])
    else:
        return make(out, args.names)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
