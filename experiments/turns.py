"""Turns: a policy learns to use a calculator, and to guess by bisection; and what three classical faults do.

    python -m experiments.turns                         all runs, three seeds each; what is finished is kept
    python -m experiments.turns grpo-guess              those whose name begins like this
    python -m nanorl.evaluate runs/turns/{sft-guess,grpo-guess-?,ppo-guess-?} --method greedy sample --n 1 \\
        --problems 1000 --seed 7 --out runs/turns/evaluate.json
    python -m experiments.turns --draw                  results and figure, from the runs that are there

The faults are made on purpose: training on what the environment said, encoding the decoded actions again, and counting
observations in the lengths that weigh an episode.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, product
from operator import itemgetter, ne
from pathlib import Path
from random import Random
from statistics import fmean
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import train_grpo
from experiments.findings import load, panels, plain, save
from experiments.runs import ROOT, parser_of_runs, train_all
from nanorl import run
from nanorl.data import pad
from nanorl.doctor import diagnose
from nanorl.first_step import FirstStepCheckFailed
from nanorl.gpt import GPT
from nanorl.ops import token_weights
from nanorl.plot import PALETTE
from nanorl.read_log import read_log, read_metrics
from nanorl.rollout import sample_and_grade
from nanorl.sample import Rollout, Sampling, token_log_probs
from nanorl.tasks import make_task
from nanorl.tokenizer import Tokenizer

SEEDS = (0, 1, 2)
EVALUATED = "--eval-problems 200 --eval-every"
RUNS = {"grpo-calculator": f"train_grpo.py --task calculator --steps 15 --lr 3e-4 {EVALUATED} 5",
        "ppo-calculator": f"train_ppo.py --task calculator --steps 15 --lr 3e-4 --best-of 0 {EVALUATED} 5",
        "grpo-guess": f"train_grpo.py --task guess --algo dr_grpo --steps 100 --prompts 16 --lr 5e-4 {EVALUATED} 50",
        "ppo-guess": "train_ppo.py --task guess --steps 40 --lr 5e-4 --lam 0.95 --epochs 1 --minibatches 4 --best-of 0 "
                     f"{EVALUATED} 20"}
# Runs with faults, by a name that ends with the fault, and sound ones beside them where RUNS has none
CALCULATOR = f"--task calculator --steps 15 --lr 3e-4 {EVALUATED} 15"
GUESS = f"--task guess --algo dr_grpo --aggregate sequence_mean --steps 60 --prompts 16 --lr 5e-4 {EVALUATED} 60"
FAULTY = {"calculator-observations-trained-on": CALCULATOR, "calculator-actions-encoded-again": CALCULATOR,
          "calculator-observations-in-lengths": CALCULATOR, "guess-sound": GUESS, "guess-observations-in-lengths": GUESS,
          "hot-calculator-sound": CALCULATOR + " --temperature 1.5",
          "hot-calculator-actions-encoded-again": CALCULATOR + " --temperature 1.5"}
RESULTS, FIGURE = ROOT / "experiments/results/turns.json", ROOT / "docs/figures/turns.png"
METRICS = ("rollout/reward", "train/entropy", "eval/accuracy_sampled", "eval/accuracy_greedy", "eval/reward", "eval/worked")
OPTIMUM = 135 / 32      # guesses by bisection


def make(out: Path, names: list[str]) -> None:
    """The runs whose names begin with one of these, from a fine-tuned model of their task."""
    for task in ("guess", "calculator"):
        train_all([(out / f"sft-{task}", "train_sft.py", f"--task {task} --eval-problems 200 --eval-every 1000")], 1)
    train_all([(out / f"{name}-{seed}", command.split()[0],
                f"{command.partition(' ')[2]} --init {out}/sft-{name.partition('-')[2]} --seed {seed}")
               for seed in SEEDS for name, command in RUNS.items() if name.startswith(tuple(names))], 1)
    for seed, (name, flags) in product(SEEDS, FAULTY.items()):
        if name.startswith(tuple(names)) and not (out / f"{name}-{seed}/check.txt").exists():
            run_with_fault(name, out / f"{name}-{seed}", f"{flags} --init {out}/sft-{flags.split()[1]} --seed {seed}")


def collect(out: Path) -> dict[str, list[dict]]:
    """Of all runs that are there, the curves; with a fault, also what the first-step check said, and what the doctor finds."""
    results = {}
    for name, seed in product([*RUNS, *FAULTY], SEEDS):
        folder = out / f"{name}-{seed}"
        if not (folder / ("check.txt" if name in FAULTY else "metrics.jsonl")).exists():
            continue
        lines, found = read_metrics(folder), {"seed": seed}
        for key in METRICS:
            found[key] = [[line["step"], line[key]] for line in lines if line.get(key) is not None]
        if name in FAULTY:
            found["first-step check"] = (folder / "check.txt").read_text()
            found["doctor"] = [finding for _, finding, _ in diagnose(read_log(folder))]
        results.setdefault(name, []).append({key: x for key, x in found.items() if x != []})
    return results


def whole(mask: Tensor) -> Tensor:
    """True from the first sampled token of a row to the last: at actions, and at the observations between them."""
    return (mask.cumsum(-1) > 0) & (mask.flip(-1).cumsum(-1).flip(-1) > 0)


def encoded_again(rollout: Rollout, tokenizer: Tokenizer) -> Rollout:
    """The rollout that one gets whose actions are decoded, and encoded again. An action keeps its log-probs, token by token."""
    rows, masks, logps = [], [], []
    for ids, mask, logp, n in zip(rollout.tokens.tolist(), rollout.mask.tolist(), rollout.logp.tolist(),
                                  rollout.lengths.tolist(), strict=True):
        row, flags, scores = ids[:1], [], []
        for sampled, part in groupby(zip(mask, ids[1:n], logp, strict=False), itemgetter(0)):
            _, said, found = map(list, zip(*part, strict=True))
            if sampled:
                stop = [said.pop()] if said[-1] in tokenizer.stop_ids else []
                said = tokenizer.encode(tokenizer.decode(said)) + stop
            row, flags = row + said, flags + [sampled] * len(said)
            scores += (found + [0.0] * len(said))[: len(said)]
        rows.append(row)
        masks.append(flags)
        logps.append(scores)
    tokens, lengths = pad(rows)
    return replace(rollout, tokens=tokens, lengths=lengths, mask=pad(masks)[0].bool(),
                   logp=pad_sequence(list(map(torch.tensor, logps)), batch_first=True))


def weights_by_whole_length(mask: Tensor, prompt_index: Tensor, how: str, max_new_tokens: int | None = None) -> Tensor:
    return token_weights(whole(mask), prompt_index, how, max_new_tokens) * mask


# What becomes of a graded rollout, and how its tokens are weighed
FAULTS = {"sound": (lambda rollout, _: rollout, token_weights),
          "observations-trained-on": (lambda rollout, _: replace(rollout, mask=whole(rollout.mask)), token_weights),
          "actions-encoded-again": (encoded_again, token_weights),
          "observations-in-lengths": (lambda rollout, _: rollout, weights_by_whole_length)}


def gradient(policy: GPT, rollout: Rollout, adv: Tensor, weigh: Callable, temperature: float) -> Tensor:
    """One step of GRPO's gradient, flat."""
    weights = weigh(rollout.mask, rollout.prompt_index, "sequence_mean")
    logp, _ = token_log_probs(policy, rollout.tokens, rollout.mask, temperature=temperature)
    loss, _ = train_grpo.objective(logp, logp.detach(), adv, rollout.mask, weights)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()), materialize_grads=True)])


def faults_of_a_step(out: Path, task_name: str, temperature: float = 1.0) -> dict[str, float]:
    """Of 32 x 8 episodes of the fine-tuned model: the share whose ids change when they are encoded again, and how far each
    fault moves the gradient of the step, relative to its norm."""
    policy, tokenizer = load(str(out / f"sft-{task_name}"))
    task, cfg = make_task(task_name), train_grpo.Config(init="x", task=task_name)
    problems = [task.problem(Random(i), "train") for i in range(32)]
    found = sample_and_grade(policy, tokenizer, task, problems, Sampling(task.max_answer_tokens, temperature), samples=8)
    rollout, mask = found.rollout, found.rollout.mask
    adv, _ = train_grpo.advantages(cfg, rollout, found.rewards, rollout.logp, None, {})
    gradients = {fault: gradient(policy, change(rollout, tokenizer), adv, weigh, temperature)
                 for fault, (change, weigh) in FAULTS.items()}
    right, observed = gradients.pop("sound"), whole(mask) & ~mask
    changed = torch.tensor([*map(ne, rollout.actions(), encoded_again(rollout, tokenizer).actions())])
    surprise = -token_log_probs(policy, rollout.tokens, observed, temperature=temperature)[0].sum() / observed.sum()
    return {"tokens of observations, of all after the prompt": float(observed.sum() / whole(mask).sum()),
            "nats per token of an observation": surprise.item(),
            "episodes whose ids change when encoded again": float(changed.float().mean()),
            "highest reward of such an episode": float((found.rewards.flatten() * changed).max()),
            **{f"moved by {fault}": float((other - right).norm() / right.norm()) for fault, other in gradients.items()}}


def run_with_fault(name: str, folder: Path, flags: str) -> None:
    """A run of train_grpo.py with the fault that its name ends with. The first-step check has its say, and the run goes on."""
    change, weigh = next(made for fault, made in FAULTS.items() if name.endswith(fault))
    sound, check, said = train_grpo.collect, train_grpo.first_step_check, []

    def collect(policy, tokenizer, *args, **kwargs):
        found = sound(policy, tokenizer, *args, **kwargs)
        return replace(found, rollout=change(found.rollout, tokenizer))

    def first_step_check(*args):
        try:
            said.append(check(*args))
        except FirstStepCheckFailed as e:
            said.append(str(e))
        return said[0]

    shutil.rmtree(folder, ignore_errors=True)
    with mock.patch.multiple(train_grpo, collect=collect, token_weights=weigh, first_step_check=first_step_check):
        train_grpo.main(run.parse(train_grpo.Config, [*flags.split(), "--out", str(folder), "--quiet"]))
    (folder / "check.txt").write_text(said[0])


def draw(results: dict) -> None:
    """Held-out accuracy and tool use, and guesses, over the steps; a line for each run."""
    figure, (tools, guesses) = panels(2, width=5)
    for name, colour in zip(RUNS, 2 * PALETTE[:2], strict=True):
        label = {"grpo-guess": "Dr. GRPO"}.get(name, name[: name.index("-")].upper())
        for found in results.get(name, []):
            if name.endswith("calculator"):
                tools.plot(*zip(*found["eval/accuracy_sampled"], strict=True), color=colour, linewidth=1.4, label=label)
                tools.plot(*zip(*found["eval/worked"], strict=True), "--", color=colour, linewidth=1.4)
            else:
                mean = [11 - 10 * fmean(reward for _, reward in found["rollout/reward"][max(0, i - 4) : i + 1])
                        for i in range(len(found["rollout/reward"]))]
                guesses.plot(mean, color=colour, linewidth=1.4, label=label)
            label = None
    guesses.axhline(OPTIMUM, color="grey", linestyle=":", linewidth=1, label="bisection, 4.22")
    tools.set(title="calculator: right, and tool used (dashed)", xlabel="step")
    guesses.set(title="guess: guesses a game, mean of five steps", xlabel="step")
    for axis in (tools, guesses):
        axis.legend(frameon=False, fontsize=8)
    save(figure, FIGURE)


def main() -> None:
    args = parser_of_runs(__doc__, "runs/turns").parse_args()
    out = args.out.resolve()
    if not args.draw:
        return make(out, args.names)
    if not (out / "evaluate.json").exists():
        raise SystemExit(f"{out}/evaluate.json: no such file; make it first: python -m experiments.turns -h says how")
    steps = {task: faults_of_a_step(out, task) for task in ("calculator", "guess")}
    steps["hot-calculator"] = faults_of_a_step(out, "calculator", temperature=1.5)
    games = [{key: row[key] for key in ("run", "method", "value", "low", "high")}
             for row in json.loads((out / "evaluate.json").read_text())["rows"]]
    results = {"runs": collect(out), "held-out games": games, "faults of a step": steps}
    RESULTS.write_text(json.dumps(plain(results)) + "\n")
    draw(results["runs"])


if __name__ == "__main__":
    main()
