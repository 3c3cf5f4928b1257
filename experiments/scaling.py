"""How reward grows with compute, and what the start of a run says about its end.

C29  RL follows an S-curve, a sigmoid in the logarithm of compute, slow, then fast, then saturated,

         R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B),

     and a fit to the first part of the compute predicts the ceiling A.

Exact: prompts with pass rates p = sigma(z), a tenth of which can never be solved, each moved by its policy gradient dz = lr p
(1 - p). The ceiling is the share that can be solved; the reward that is fitted is measured on 500 answers at a time. Then the
run of `python train_grpo.py`: its reward in training, against the answer tokens sampled before. The fit and its intervals are
those of nanorl/scaling.py.

Change `STEPS = 4000` to `STEPS = 60`: C29 holds only when 40% of the GRPO run predict it.
"""

import sys
from pathlib import Path

import torch

from experiments.findings import Finding, main, mean_and_interval, panels, save, stage
from nanorl.ops import log_sigmoid
from nanorl.plot import PALETTE, read_metrics, reward_by_tokens
from nanorl.run import generator
from nanorl.scaling import fit
from nanorl.tabular import randn

STEPS = 4000                    # of the exact run: until it has saturated
SOLVABLE = 0.9                  # share of prompts that can be solved
EARLY = (0.1, 0.2, 0.4, 1.0)    # shares of the compute


def exact_run(seed, steps, prompts=400, points=80, answers=500):
    """Steps done, the exact reward then, the same as so many answers measure it, [points] each; and the ceiling."""
    g = generator(seed, "C29")
    z, rewards = -3 + 2 * randn(g, prompts), []
    solvable = torch.rand(prompts, generator=g) < SOLVABLE
    for _ in range(steps):
        p = log_sigmoid(z).exp() * solvable
        rewards.append(p.mean())
        z = z + p * (1 - p)
    compute = torch.arange(0, steps, max(1, steps // points))
    reward = torch.stack(rewards)[compute]
    measured = torch.binomial(torch.full_like(reward, answers), reward, generator=g) / answers
    return compute.double(), reward, measured, float(solvable.double().mean())


def first(share, compute, reward):
    """The points of the first part of the compute."""
    early = compute <= share * compute.max()
    return compute[early], reward[early]


def predictions(compute, reward, ceiling):
    """For each share of the compute: how far the predicted ceiling is off, and how far the mean of the last three rewards;
    whether the interval holds the true ceiling, and whether the data reach the bend."""
    found = []
    for share in EARLY:
        early = first(share, compute, reward)
        fitted = fit(*early)
        predicted, low, high = fitted.predict(torch.inf)
        found.append((abs(predicted - ceiling), abs(float(early[1][-3:].mean()) - ceiling), low <= ceiling <= high,
                      fitted.reaches_the_bend))
    return found


def misfit(compute, reward):
    """The largest distance of the points from the sigmoid that fits them best, relative to their rise."""
    fitted = fit(compute, reward)
    return max(abs(fitted.predict(float(c))[0] - float(r)) for c, r in zip(compute, reward, strict=True)) / float(
        reward.max() - reward.min())


def table(run, found):
    """A row for each share of the compute, over the runs whose predictions these are."""
    rows = []
    for i, share in enumerate(EARLY):
        errors, last, holds, bends = torch.tensor([each[i] for each in found], dtype=torch.float64).T
        rows.append({"run": run, "compute": share, "error of the ceiling, median": float(errors.median()),
                     "of the last rewards": float(last.median()), "fit is nearer": float((errors < last).double().mean()),
                     "off by less than .05": float((errors < 0.05).double().mean()), "interval holds it": float(holds.mean()),
                     "bend reached": float(bends.mean())})
    return rows


def predicts(row, runs):
    """Off by less than .05 in nine of ten runs, and surely nearer than the last rewards in more than half of them."""
    nearer = torch.arange(runs) < round(runs * row["fit is nearer"])
    return row["off by less than .05"] >= 0.9 and (runs == 1 or mean_and_interval(nearer, shares=True)[1] > 0.5)


def c29(smoke):
    seeds = 2 if smoke else 40
    runs = [exact_run(seed, STEPS // 10 if smoke else STEPS) for seed in range(seeds)]
    rows = table(f"exact, {seeds} seeds", [predictions(compute, measured, ceiling) for compute, _, measured, ceiling in runs])
    distance = max(misfit(compute, reward) for compute, reward, _, _ in runs)
    tokens, trained = runs[0][::2] if smoke else reward_by_tokens(read_metrics(Path(stage("grpo", smoke))))
    final = float(trained[-10:].mean())
    rows += table("train_grpo.py", [predictions(tokens, trained, final)])
    exact, real = ({row["compute"]: row for row in part} for part in (rows[:len(EARLY)], rows[len(EARLY):]))
    compute, reward, measured, ceiling = runs[0]

    def each(column, digits=2):
        *most, last = (f"{exact[share][column]:.{digits}g}" for share in EARLY[:-1])
        return f"{', '.join(most)} and {last}"

    return Finding("C29", "RL follows an S-curve, and its early part predicts its ceiling.",
                   {"the whole curve is fitted": distance < 0.05 and exact[1.0]["bend reached"] == 1} | {
                    f"{share:.0%} of {name} predict it": predicts(row[share], count) for name, row, count in
                    (("the exact run", exact, seeds), ("the GRPO run", real, 1)) for share in EARLY[:-1]},
                   f"no exact curve deviates from its sigmoid by more than {distance:.1%} of its rise. The ceiling predicted "
                   f"from 10, 20 and 40 % of the compute is off by {each('error of the ceiling, median')}, the last rewards "
                   f"seen by {each('of the last rewards')} (medians); in the GRPO run, whose bend comes later, by "
                   f"{real[0.1]['error of the ceiling, median']:.0f}, {real[0.2]['error of the ceiling, median']:.0f} and "
                   f"{real[0.4]['error of the ceiling, median']:.2g}. The exact curves are not sigmoids: even with all the "
                   f"data, the interval contains the ceiling in only {exact[1.0]['interval holds it']:.0%} of the runs",
                   rows, {"compute": compute, "reward": reward, "measured": measured, "ceiling": ceiling, "tokens": tokens,
                          "trained": trained})


def draw(findings, path):
    figure, axes = panels(3)
    curves = {name: torch.tensor(x, dtype=torch.float64) for name, x in findings["C29"].curves.items()}
    for axis, x, y, ceiling, unit, name in (
            (axes[0], curves["compute"], curves["measured"], curves["ceiling"], 1, "steps"),
            (axes[1], curves["tokens"], curves["trained"], curves["trained"][-10:].mean(), 1000, "thousand answer tokens")):
        axis.plot(x / unit, y, "o", color="0.6", markersize=3)
        axis.axhline(float(ceiling), color="0.6", linewidth=0.8, linestyle=":")
        for share, colour in zip(EARLY, (PALETTE[1], PALETTE[4], PALETTE[2], PALETTE[0]), strict=True):
            fitted = fit(*first(share, x, y))
            at = torch.logspace(*torch.tensor([float(x[1]), float(x.max())]).log10().tolist(), 100)
            axis.plot(at / unit, [fitted.predict(float(c))[0] for c in at], color=colour, label=f"fit to {share:.0%} of it")
        axis.set(xscale="log", xlabel=name, ylabel="reward", ylim=(0, 1.2))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    axes[0].set_title("exact policy gradient")
    axes[1].set_title("train_grpo.py")
    rows = [row for row in findings["C29"].rows if row["run"] != "train_grpo.py"]
    shares = [f"{row['compute']:.0%}" for row in rows]
    for name, colour, marker in (("off by less than .05", PALETTE[0], "o"), ("interval holds it", PALETTE[2], "s"),
                                 ("bend reached", PALETTE[1], "^")):
        axes[2].plot(shares, [row[name] for row in rows], color=colour, marker=marker, label=name)
    axes[2].set(title="predicting the ceiling early", xlabel="share of the compute", ylabel="share of runs", ylim=(-0.02, 1.3))
    axes[2].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


CLAIMS = (c29,)

if __name__ == "__main__":
    main(sys.modules[__name__])
