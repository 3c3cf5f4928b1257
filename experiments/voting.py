"""Votes, and the temperature of the voters.

C27  A majority vote amplifies. Of n answers, each right with probability p and otherwise wrong in one way, with ties drawn,

         P_n = sum_{k > n/2} C(n,k) p^k (1-p)^(n-k) + 1/2 C(n,n/2) (p (1-p))^(n/2),       P_n = P_(n-1) for even n

     are right. This goes to 1 for p > 1/2 and to 0 for p < 1/2. With more ways to be wrong, the likeliest answer wins.

C34  The best temperature for a vote is not the best one for a single answer. Take calibrated policies: the right answer is
     drawn from p_1, their distribution at temperature 1. Answers at temperature tau are then right with probability

         sum_a p_1(a) p_tau(a),       and a vote of them with       sum_a p_1(a) P(a wins)

The equations are exact sums. The tiny models are asked held-out sums: the fine-tuned one in both claims, the GRPO model in C34.
Half of the policies, or of the problems, chooses the temperatures of C34, and the other half measures what they are worth.

Change `VOTES = 32` to `VOTES = 2`: C27 is refuted.
"""

import functools
import math
import sys
from itertools import combinations_with_replacement

import torch

from experiments.findings import Finding, load, main, mean_and_interval, panels, save, stage
from nanorl.evaluate import vote
from nanorl.heldout import heldout_problems
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.sample import Sampling
from nanorl.search import doublings, majority_vote, pass_at_k, sample_answers, vote_value
from nanorl.tabular import num_prefixes, randn, sequence_probs
from nanorl.tasks import default_max_new_tokens, make_task

VOTES = 32
TEMPERATURES = (0.1, 0.25, 0.5, 0.7, 1.0, 1.2, 1.5, 2.0)


@functools.cache
def elections(n, k):
    """All that n votes for k answers can come to: the counts, and the chance of each answer to be given.       [M, k] each"""
    names = "abcd"[:k]
    ballots = list(combinations_with_replacement(names, n))
    winners = [majority_vote(each) for each in ballots]
    return (torch.tensor([[each.count(a) for a in names] for each in ballots]).double(),
            torch.tensor([[(a in first) / len(first) for a in names] for first in winners]).double())


def vote_law(p, n):
    """The chance of each answer to win a vote of n draws from p, by summing over all outcomes.       [..., k] -> [..., k]"""
    counts, wins = elections(n, p.shape[-1])
    ways = math.lgamma(n + 1) - torch.lgamma(counts + 1).sum(-1)                            # [M], in nats
    return (ways + torch.xlogy(counts, p[..., None, :]).sum(-1)).exp() @ wins


def binomial(p, n):
    """P_n of C27, as it stands there."""
    tie = 0 if n % 2 else math.comb(n, n // 2) * (p * (1 - p)) ** (n // 2) / 2
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1)) + tie


def lead(ballots, rewards):
    """By how many standard errors the right answer is ahead of the most frequent wrong one."""
    wrong = [ballot for ballot, reward in zip(ballots, rewards, strict=True) if ballot is not None and not reward]
    right, first = sum(rewards), max(map(wrong.count, wrong), default=0)
    return (right - first) / max(right + first, 1) ** 0.5


def asked(name, temperature, problems, samples, purpose, smoke):
    """Answers of a tiny model to held-out sums, all of them different."""
    model, tokenizer = load(stage(name, smoke))
    task = make_task("addition")
    sums = list(dict.fromkeys(heldout_problems(task, problems, 0)))
    sampling = Sampling(4 if smoke else default_max_new_tokens(task.name), temperature)
    return sample_answers(model, tokenizer, task, sums, sampling, samples=samples, seed=0, purpose=purpose)


# ---------------------------------------------------------------------------------------------------------------------
# More votes
# ---------------------------------------------------------------------------------------------------------------------


def c27(smoke):
    n = 4 if smoke else VOTES
    sizes, rows, held = doublings(n), [], {}
    curves = {"votes": sizes}

    def record(name, likeliest, one, many, found):
        rows.append({"answers": name, "likeliest is right": likeliest, "one": one, f"vote of {n}": many, f"pass@{n}": found})

    gap, grows = 0.0, {True: [], False: []}
    for p in ((0.7, 0.3), (0.6, 0.4), (0.4, 0.6), (0.4, 0.2, 0.2, 0.2), (0.3, 0.4, 0.3)):
        law = {size: float(vote_law(torch.tensor(p, dtype=torch.float64), size)[0]) for size in {*sizes, n - 1}}
        if len(p) == 2:
            gap = max(gap, abs(law[n] - law[n - 1]), *(abs(value - binomial(p[0], size)) for size, value in law.items()))
        grows[p[0] == max(p)].append(law[n] > p[0] + 1e-9)
        name = f"{p[0]} right, {', '.join(map(str, p[1:]))} wrong"
        record(name, float(p[0] == max(p)), p[0], law[n], 1 - (1 - p[0]) ** n)
        curves[name] = [law[size] for size in sizes]
    held["the right answer is the likeliest"], held["a wrong answer is the likeliest"] = (
        gap < 1e-12 and all(grows[right]) for right in (True, False))

    p = ((torch.arange(2000).double() + 0.5) / 2000) ** (1 / 1.2)                           # quantiles of Beta(1.2, 1)
    mixture = {size: float(vote_law(torch.stack((p, 1 - p), -1), size)[:, 0].mean()) for size in sizes}
    held["prompts differ, p from Beta(1.2, 1)"] = mixture[n] > mixture[1] + 1e-9
    record("p from Beta(1.2, 1)", float((p > 0.5).double().mean()), mixture[1], mixture[n], float((1 - (1 - p) ** n).mean()))
    curves |= {"mixture": list(mixture.values()), "mixture, pass": [float((1 - (1 - p) ** size).mean()) for size in sizes]}

    samples, groups, gains = 4 if smoke else 64, {"right": [], "wrong": []}, {}
    for temperature in (1.0, 0.25, 0.1):
        poll, found = (asked("sft", temperature, 4 if smoke else 100, samples, purpose, smoke) for purpose in ("poll", "vote"))
        polled = list(zip(poll.ballots, poll.rewards.tolist(), strict=True))
        leads = torch.tensor([lead(*each) for each in polled])                              # [P]
        votes = torch.stack([vote(found, size, False) for size in sizes], -1)               # [P, sizes]
        groups["right"].append(votes[leads > 2])
        groups["wrong"].append(votes[leads < -2])
        record(f"a GPT's, temperature {temperature:g}", sum(vote_value(*each) for each in polled) / len(polled),
               float(votes[:, 0].mean()), float(votes[:, -1].mean()), float(pass_at_k(found.rewards, n).mean()))
    for name, votes in ((name, torch.cat(each)) for name, each in groups.items()):
        if len(votes):
            gains[name] = mean_and_interval(votes[:, -1] - votes[:, 0])
            held[f"a GPT's likeliest answer is {name}"] = gains[name][1] > 0
            curves[f"GPT, {name}"] = votes.mean(0)
    _, six, four, split, _, beta, *_ = (row[f"vote of {n}"] for row in rows)
    gained = " and ".join(f"{mean:+.3f} ({low:+.3f} to {high:+.3f}) where it is {name}"
                          for name, (mean, low, high) in gains.items())
    return Finding("C27", "A majority vote amplifies.", held,
                   f"{n} votes turn .6 into {six:.2f} and .4 into {four:.2f}, or into {split:.2f} with three ways to be "
                   f"wrong. With p from Beta(1.2, 1), {mixture[1]:.3f} becomes {beta:.3f}, and pass@{n} "
                   f"is {curves['mixture, pass'][-1]:.2f}. Where a poll of {samples} other answers makes the tiny "
                   f"model's likeliest answer clear by two standard errors, a vote gains {gained}", rows, curves)


# ---------------------------------------------------------------------------------------------------------------------
# Other temperatures
# ---------------------------------------------------------------------------------------------------------------------


def random_policies(T, seeds, n):
    """How often one answer is right, and a vote of n, of policies that answer in their T-th token, at each temperature.
    -> [seeds, temperatures] each"""
    tables = [2 * randn(generator(seed, "C34", T), num_prefixes(3, T), 3) for seed in range(seeds)]
    p = torch.stack([torch.stack([sequence_probs(z / tau).view(-1, 3).sum(0) for tau in TEMPERATURES]) for z in tables])
    truth = p[:, TEMPERATURES.index(1.0), None]                                             # [seeds, 1, 3]
    return (truth * p).sum(-1), (truth * vote_law(p, n)).sum(-1)


def tiny_model(name, n, smoke):
    """The same of a tiny model, measured.       -> [problems, temperatures] each"""
    found = [asked(name, tau, 4 if smoke else 120, 2 * n, f"temperature {tau:g}", smoke) for tau in TEMPERATURES]
    return (torch.stack([each.rewards.double().mean(-1) for each in found], -1),
            torch.stack([vote(each, n, False) for each in found], -1))


def c34(smoke):
    n, seeds, rows, held, curves = 2 if smoke else 16, 8 if smoke else 2000, [], {}, {"temperatures": TEMPERATURES}
    for name, (one, many) in (("random policies that answer at once", random_policies(1, seeds, n)),
                              ("random policies that answer in their third token", random_policies(3, seeds, n)),
                              ("the fine-tuned model", tiny_model("sft", n, smoke)),
                              ("the GRPO model", tiny_model("grpo", n, smoke))):
        alone, voting = (int(x[::2].mean(0).argmax()) for x in (one, many))
        gains = [mean_and_interval(x[1::2, best] - x[1::2, other])
                 for x, best, other in ((one, alone, voting), (many, voting, alone))]
        held[f"asking {name}"] = all(low > 0 for _, low, _ in gains)
        rows.append({"": name, "best for one": TEMPERATURES[alone], "is right": float(one[1::2, alone].mean()),
                     f"best for {n}": TEMPERATURES[voting], "vote is right": float(many[1::2, voting].mean()),
                     "the vote gains by its own": gains[1][0], "low": gains[1][1], "high": gains[1][2]})
        curves[name] = {"one": one.mean(0), "vote": many.mean(0)}
    at_once, third, tuned, _ = rows
    lasts = {way: max(tau for tau, x in zip(TEMPERATURES, values.tolist(), strict=True) if x == values.max())
             for way, values in curves["the GRPO model"].items()}
    hot = {way: float(values[TEMPERATURES.index(1.5)]) for way, values in curves["the GRPO model"].items()}
    return Finding("C34", "The best temperature for a vote is not the best one for a single answer.", held,
                   f"policies that answer in their third token do best at temperature {third['best for one']:g} alone and at "
                   f"{third[f'best for {n}']:g} in a vote of {n}, which gains {third['the vote gains by its own']:.3f} by it "
                   f"({third['low']:.3f} to {third['high']:.3f}); those that answer at once, at {at_once['best for one']:g} "
                   f"and {at_once[f'best for {n}']:g}. The fine-tuned model does best at {tuned['best for one']:g} and "
                   f"{tuned[f'best for {n}']:g}, right in {tuned['is right']:.2f} and {tuned['vote is right']:.2f} of cases; "
                   f"the GRPO model does equally well at all temperatures up to {lasts['one']:g} and {lasts['vote']:g}. A "
                   f"vote tolerates more: at 1.5, one answer of the GRPO model is right in {hot['one']:.2f} of cases, and a "
                   f"vote in {hot['vote']:.2f}",
                   rows, curves)


def draw(findings, path):
    figure, axes = panels(3)

    rows, curves = findings["C27"].rows, findings["C27"].curves
    for row, colour in zip(rows[:5], PALETTE, strict=False):
        axes[0].plot(curves["votes"], curves[row["answers"]], color=colour, marker="o", markersize=3, label=row["answers"],
                     linestyle="-" if row["likeliest is right"] else "--")
    axes[0].set(title="a vote finds the likeliest answer", ylabel="share of votes that are right")
    lines = {"mixture, pass": "p ~ Beta(1.2, 1): at least one is right", "mixture": "p ~ Beta(1.2, 1): vote",
             "GPT, right": "GPT, likeliest answer right: vote", "GPT, wrong": "GPT, likeliest answer wrong: vote"}
    for (name, label), colour in zip(lines.items(), PALETTE, strict=False):
        if name in curves:
            axes[1].plot(curves["votes"], curves[name], color=colour, marker="o", markersize=3, label=label)
    axes[1].set(title="where prompts differ", ylabel="share that is right")
    for axis in axes[:2]:
        axis.set(xscale="log", xlabel="votes", xticks=curves["votes"], xticklabels=curves["votes"])
        axis.minorticks_off()

    curves = findings["C34"].curves
    for name, colour in zip(("random policies that answer in their third token", "the fine-tuned model", "the GRPO model"),
                            PALETTE, strict=False):
        axes[2].plot(curves["temperatures"], curves[name]["one"], color=colour, linestyle="--", marker="o", markersize=3)
        axes[2].plot(curves["temperatures"], curves[name]["vote"], color=colour, marker="o", markersize=3,
                     label=name.removesuffix(" that answer in their third token").removeprefix("the "))
    axes[2].plot([], [], color="0.4", linestyle="--", label="one answer")
    axes[2].plot([], [], color="0.4", label="a vote of 16")
    axes[2].set(title="the temperature of the voters", xlabel="temperature", ylabel="share that is right")
    for axis, columns in zip(axes, (1, 1, 2), strict=True):
        axis.set(ylim=(-0.02, 1.5), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])                      # room for the legend
        axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=columns)
    save(figure, path)


CLAIMS = (c27, c34)

if __name__ == "__main__":
    main(sys.modules[__name__])
