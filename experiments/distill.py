"""What a student becomes by each way of learning from a teacher.

    python train_distill.py                     teacher and student, seed 0
    python -m experiments.distill               three seeds of each way, two runs at a time; finished runs are kept
    python -m experiments.distill --draw        only the tables, from the runs that are there

Claim: forward KL covers and reverse KL seeks. The first table is exact: a teacher with two modes, an answer of three tokens
all of one kind or all of the other, and a student that cannot hold both, because its tokens do not see each other. With p the
teacher and q the student,

    coverage = sum_y p(y) 1[q(y) >= p(y)/10]            precision = sum_y q(y) 1[p(y) >= q(y)/10]

are the shares of what each says that the other would say as well. The second table is the real thing: the GRPO model,
distilled into a model of a quarter of its size.
"""

import argparse
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from experiments.runs import cell, directory, train_all
from nanorl.read_log import read_metrics
from nanorl.run import generator
from nanorl.tabular import horizon, leaf, prefix_rows, randn, sequence_kl, sequence_probs, sequences
from train_distill import objective

WAYS = {
    "forward, data": {"on": "data", "divergence": "forward"},
    "forward, the teacher's answers": {"on": "teacher", "divergence": "forward"},
    "jsd, the student's answers": {"on": "student", "divergence": "jsd", "beta": 0.5},
    "reverse, the student's answers, token": {"on": "student", "divergence": "reverse", "gradient": "token"},
    "reverse, the student's answers, sequence": {"on": "student", "divergence": "reverse", "gradient": "sequence"},
}
T, NOISE = 3, 0.02      # tokens of an answer; the chance that a token of a mode is of the other kind


# ---------------------------------------------------------------------------------------------------------------------
# Two modes, exactly
# ---------------------------------------------------------------------------------------------------------------------


def two_modes() -> Tensor:
    """The table of a teacher that says 000 or 111, each with half of its heart, and then and now slips."""
    prefixes = [prefix for t in range(T) for prefix in product(range(2), repeat=t)]
    rows = [[0.5, 0.5] if not prefix else [NOISE, 1 - NOISE] if prefix[0] else [1 - NOISE, NOISE] for prefix in prefixes]
    return torch.tensor(rows, dtype=torch.float64).log()


def blind(z: Tensor) -> Tensor:
    """The table of a student that has the same opinion of token t after every prefix.       z [T, 2] -> [N, 2]"""
    return torch.cat([z[t].expand(2**t, 2) for t in range(T)])


def pairs_of_answers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Every two sequences that two draws from a prompt can give, side by side, and the chance of each such pair, for both of
    its rows.       [N, V] -> tokens [2 V^2T, T], [2 V^2T]"""
    answers, p = sequences(logits.shape[1], horizon(logits)), sequence_probs(logits)
    pairs = torch.cartesian_prod(torch.arange(len(p)), torch.arange(len(p)))                # [V^2T, 2]
    return answers[pairs.flatten()], p[pairs].prod(-1).repeat_interleave(2)


def exact_loss(student: Tensor, teacher: Tensor, *, on: str, **how) -> Tensor:
    """The objective of train_distill.py, in expectation over two answers to a prompt, by summing over all pairs of them."""
    tokens, chance = pairs_of_answers((student if on == "student" else teacher).detach())
    mask, rows = torch.ones_like(tokens, dtype=torch.bool), prefix_rows(tokens, 2).flatten()
    weights = (chance / 2)[:, None].expand(mask.shape)
    return objective(student[rows], teacher[rows], tokens.flatten(), mask, weights, group=2, **how)[0]


def shared(p: Tensor, q: Tensor) -> float:
    """The share of what p says that q would say, too, with at least a tenth of the probability.       [V^T], [V^T]"""
    return float(p[q >= p / 10].sum())


def learn(way: dict, teacher: Tensor, seed: int, steps: int = 400) -> Tensor:
    """The table of a blind student after `steps` steps of gradient descent, of size 1, from a random start."""
    z = randn(generator(seed, "student"), T, 2)
    for _ in range(steps):
        z = leaf(z)
        z = z - torch.autograd.grad(exact_loss(blind(z), teacher, **way), z)[0]
    return blind(z.detach())


def modes_table(seeds: int) -> str:
    teacher = two_modes()
    p = sequence_probs(teacher)
    lines = ["| two modes | coverage | precision | KL(teacher ‖ student) | KL(student ‖ teacher) |", "|---|---|---|---|---|"]
    for label, way in WAYS.items():
        if way["on"] == "data":
            continue            # nobody has demonstrated anything here
        students = [learn(way, teacher, seed) for seed in range(seeds)]
        answers = [sequence_probs(student) for student in students]
        columns = ([shared(p, q) for q in answers], [shared(q, p) for q in answers],
                   [float(sequence_kl(teacher, student)) for student in students],
                   [float(sequence_kl(student, teacher)) for student in students])
        lines.append(f"| {label} | {' | '.join(cell(column, 2) for column in columns)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The real thing
# ---------------------------------------------------------------------------------------------------------------------


def students_table(logs: dict[str, list[list[dict]]]) -> str:
    """The student as it begins, and what each way has made of it after ten steps and in the end."""
    lines = ["| | accuracy, sampled, after 10 steps | at the end | greedy | worked out | KL(teacher ‖ student) | "
             "KL(student ‖ teacher) |", "|---|---|---|---|---|---|---|"]
    names = ("accuracy_greedy", "worked", "forward_kl", "reverse_kl")
    start = [log[0] for runs in logs.values() for log in runs]
    cells = [cell([line[f"eval/{name}"] for line in start], 3) for name in ("accuracy_sampled", *names)]
    lines.append(f"| the student at the start | – | {' | '.join(cells)} |")
    for label, runs in logs.items():
        early = [next(line["eval/accuracy_sampled"] for line in log if line["step"] == 10) for log in runs]
        cells = [cell(early, 3)] + [cell([log[-1][f"eval/{name}"] for log in runs], 3) for name in ("accuracy_sampled", *names)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="runs/grpo", help="the model to learn from")
    parser.add_argument("--student", default="runs/sft-pico", help="the model that learns")
    parser.add_argument("--out", type=Path, default=Path("runs/distill-ways"), help="directory of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    common = f"--teacher {args.teacher} --init {args.student} --eval-every 10"
    if not args.draw:
        flags = {label: " ".join(f"--{name} {value}" for name, value in way.items()) for label, way in WAYS.items()}
        train_all([(directory(args.out, label, seed), "train_distill.py", f"{flags[label]} --seed {seed} {common}")
                   for seed in range(args.seeds) for label in WAYS], args.jobs)
    print(modes_table(10))
    print()
    print(students_table({label: [read_metrics(directory(args.out, label, seed)) for seed in range(args.seeds)]
                          for label in WAYS}))


if __name__ == "__main__":
    main()
