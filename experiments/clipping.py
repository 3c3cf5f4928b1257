"""What the clip of PPO and GRPO does, and what it does not do.

C4   With several updates on each batch, clipping stabilises: fewer runs end on a wrong answer, and no iteration goes far.

         J = min(rho A, clip(rho, 1 - eps, 1 + eps) A),        rho = pi(a) / pi_old(a)

C5   With eps = .2, one iteration can raise a probability of 10 % to at most 12 %. But no clip limits the first update, where
     all rho are 1: with ten answers alike and a batch of this one alone, with A = 1, it leads to

         p' = p e^lr / (1 - p + p e^lr),        beyond 12 % if lr > log(.12 (1 - p) / (.88 p)) = .205

C6   Outside the band the gradient is zero. The derivative says otherwise:

         dJ / dlog pi(a) = 0 if A > 0 and rho > 1 + eps_high, or A < 0 and rho < 1 - eps_low;        else rho A

C4 and C5 are bandits of ten arms that pay 1 with probability .8, .7 and eight times .5, with 16 answers per batch, z-scores as
advantages and plain gradient steps. C6 is autograd on a grid of ratios.

Change `UPDATES = 8` to `UPDATES = 1`: C4 is refuted. Change `high - 1, bound=bound` to `high - 1, bound="none"`: C6 is refuted.
"""

import math
import sys

import torch

import train_grpo
from experiments.findings import Finding, main, mean_and_interval, panels, save
from nanorl.ops import entropy_from_logits, kl_divergence, log_softmax, zscore
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.tabular import leaf

CHANCES = torch.tensor([0.8, 0.7, *8 * [0.5]]).double()     # to be paid, for each arm
SAMPLES = 16                                                # answers in a batch
UPDATES = 8                                                 # of the policy by each batch
EPS = 0.2
BOUNDS = {"clipped": "clip", "not clipped": "none"}


def improve(z, a, adv, updates, lr, **flags):
    """Some updates by one batch of answers, with the objective of train_grpo.py.       logits [R, V], a, adv [R, N] -> [R, V]

    The R rows are separate policies. The batch and pi_old stay as they are. lr is one for all rows, or [R, 1].
    """
    old, mask = log_softmax(z).gather(-1, a), torch.ones_like(a, dtype=torch.bool)
    for _ in range(updates):
        z = leaf(z)
        entropy = entropy_from_logits(z)[:, None].expand(a.shape)
        loss, _ = train_grpo.objective(log_softmax(z).gather(-1, a), old, adv, mask, mask.double() / a.shape[1],
                                       entropy=entropy, **flags)
        z = (z - lr * torch.autograd.grad(loss, z)[0]).detach()
    return z


def bandit(lr, updates, iterations, bound):
    """Learn from nothing. Returns the last pi, and of each iteration KL(before || after) and the largest ratio of any arm.

    lr [R, 1] -> [R, V], [iterations, R], [iterations, R]
    """
    g, z, kl, ratio = generator(0, "bandit"), torch.zeros(len(lr), len(CHANCES)).double(), [], []
    for _ in range(iterations):
        a = torch.multinomial(log_softmax(z).exp(), SAMPLES, replacement=True, generator=g)            # [R, N]
        before, z = z, improve(z, a, zscore(torch.bernoulli(CHANCES[a], generator=g)), updates, lr,
                               bound=bound, clip_low=EPS, clip_high=EPS)
        kl.append(kl_divergence(before, z))
        ratio.append((log_softmax(z) - log_softmax(before)).amax(-1).exp())
    return log_softmax(z).exp(), torch.stack(kl), torch.stack(ratio)


def c4(smoke):
    seeds, iterations = (4, 5) if smoke else (500, 300)
    rates, stuck, rows = [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0], {}, {}
    for name, bound in BOUNDS.items():
        pi, kl, _ = bandit(torch.tensor(rates).double().repeat_interleave(seeds)[:, None], UPDATES, iterations, bound)
        stuck[name] = [mean_and_interval(wrong, shares=True) for wrong in (pi[:, 0] < 0.5).view(-1, seeds)]
        for lr, (share, low, high), farthest in zip(rates, stuck[name], kl.amax(0).view(-1, seeds), strict=True):
            rows[lr, name] = {"learning rate": lr, "": name, "end with a wrong arm": share, "low": low, "high": high,
                              "largest KL of an iteration": float(farthest.mean())}
    held, shares = {}, []
    for lr in (0.125, 0.5, 2.0, 8.0):
        clip, none = (rows[lr, name] for name in BOUNDS)
        held[f"the learning rate is {lr:g}"] = (clip["high"] < none["low"]
                                                and clip["largest KL of an iteration"] < none["largest KL of an iteration"])
        shares.append(f"{clip['end with a wrong arm']:.1%} and {none['end with a wrong arm']:.1%} at {lr:g}")
    return Finding("C4", "Clipping stabilises.", held,
                   f"{UPDATES} updates per batch, {seeds} seeds: with the clip and without it, {', '.join(shares)} of the "
                   f"runs end on a wrong arm. The largest KL of an iteration is {clip['largest KL of an iteration']:.2g} and "
                   f"{none['largest KL of an iteration']:.2g} nats at {lr:g}",
                   [rows[lr, name] for lr in rates for name in BOUNDS], {"rates": rates, "stuck": stuck})


def alone(lr, updates, bound):
    """What 10 % comes to where the batch is this answer alone, with A = 1.       lr [R, 1] -> [R]"""
    z, a = torch.zeros(len(lr), 10).double(), torch.zeros(len(lr), 1, dtype=torch.long)
    z = improve(z, a, torch.ones(len(lr), 1).double(), updates, lr, bound=bound, clip_low=EPS, clip_high=EPS)
    return log_softmax(z)[:, 0].exp()


def c5(smoke):
    seeds, iterations = (4, 3) if smoke else (100, 30)
    edge, rows, held = 0.1 * (1 + EPS), [], {}
    for lr, updates in ((0.02, 8), (0.02, 40 if smoke else 400), (0.5, 8), (2.0, 8), (8.0, 8)):
        lone = torch.tensor([[lr]]).double()
        clip, none = (bandit(lone.expand(seeds, 1), updates, iterations, bound)[2] for bound in BOUNDS.values())
        rows.append({"learning rate": lr, "updates": updates, "10 % becomes": float(alone(lone, updates, "clip")),
                     "10 % without the clip": float(alone(lone, updates, "none")), "largest ratio": float(clip.max()),
                     "without the clip": float(none.max()),
                     "iterations beyond 1.2": float((clip > 1 + EPS).double().mean())})
        held[f"lr is {lr:g} with {updates} updates"] = rows[-1]["10 % becomes"] <= edge and rows[-1]["largest ratio"] <= 1 + EPS

    rates = torch.logspace(-2.5, 1, 8 if smoke else 121, dtype=torch.float64)[:, None]
    closed = 0.1 * rates.exp() / (0.9 + 0.1 * rates.exp())
    first, limit = alone(rates, 1, "clip"), math.log(edge * 0.9 / ((1 - edge) * 0.1))
    gap = float((first - closed[:, 0]).abs().max())
    short, long, large = rows[:3]
    return Finding("C5", "With a clip of .2, one iteration can raise a probability of 10 % to at most 12 %.",
                   {name: holds and gap < 1e-12 for name, holds in held.items()},
                   f"{short['updates']} updates of {short['learning rate']:g} do not reach the edge even without a clip: "
                   f"their largest ratio is {short['without the clip']:.2f}. With {long['updates']} of them, "
                   f"{long['iterations beyond 1.2']:.0%} of the iterations end with a ratio beyond 1.2, up to "
                   f"{long['largest ratio']:.2f}: the probability that answers with A < 0 lose goes to others. If the batch "
                   f"is this answer alone, one update is enough from lr = {limit:.3f} on (closed form, to {gap:.0e}); at "
                   f"{large['learning rate']:g} it raises 10% to {large['10 % becomes']:.0%}", rows,
                   {"rates": rates[:, 0], "one": first,
                    "eight": {name: alone(rates, 8, bound) for name, bound in BOUNDS.items()}})


# The bound, and the edges of its band
CASES = {"clip .2/.2": ("clip", 0.8, 1.2), "clip .2/.28": ("clip", 0.8, 1.28), "mask 1/8, 8": ("mask", 1 / 8, 8.0)}


def slope(rho, A, bound, low, high):
    """dJ / dlog pi(a), by autograd, with a band from `low` to `high`.       ratios [n], A a number -> [n]"""
    logp, one = leaf(rho.log()[:, None]), torch.ones(len(rho), 1).double()
    loss, _ = train_grpo.objective(logp, torch.zeros_like(one), A * one, one.bool(), one, clip_low=1 - low,
                                   clip_high=high - 1, bound=bound)
    return 0 - torch.autograd.grad(loss, logp)[0].squeeze(-1)


def c6(smoke):
    grid = torch.logspace(-1.2, 1.2, 21 if smoke else 481, dtype=torch.float64)
    near = torch.linspace(0.02, 3, 21 if smoke else 150, dtype=torch.float64)
    zero, gap, curves = {}, 0.0, {"ratios": near}
    for name, case in CASES.items():
        bound, low, high = case
        for A in (1.0, -1.0):
            found, below, above = slope(grid, A, *case), grid < low, grid > high
            dead = above | below if bound == "mask" else above if A > 0 else below
            gap = max(gap, float((found - (A * grid).masked_fill(dead, 0.0)).abs().max()))
            zero[name, A, "above"], zero[name, A, "below"] = (bool((found[side] == 0).all()) for side in (above, below))
            curves[f"{name}, A = {A:+g}"] = slope(near, A, *case)
    clips = [name for name, (bound, *_) in CASES.items() if bound == "clip"]
    held = {f"A {sign} 0 and the ratio is {side} the band": gap < 1e-12 and all(zero[name, A, side] for name in clips)
            for A, sign in ((1.0, ">"), (-1.0, "<")) for side in ("above", "below")}
    held["ratios are masked instead of clipped"] = all(zero[key] for key in zero if key[0] not in clips)
    told = torch.tensor([0.1, 0.5, 1.25, 1.5, 10.0]).double()
    rows = [{"A": A, "ratio": float(told[i]), **{name: float(slope(told, A, *case)[i]) for name, case in CASES.items()}}
            for A in (1.0, -1.0) for i in range(len(told))]
    return Finding("C6", "Outside the band the gradient is zero.", held,
                   f"the gradient is 0 above the band for A > 0, 0 below it for A < 0 and rho A elsewhere, to {gap:.0e}: "
                   f"{rows[1]['clip .2/.2']:g} for A = 1 and a ratio of .5, {rows[-1]['clip .2/.2']:g} for A = -1 and a ratio "
                   "of 10. With a mask it is 0 on both sides", rows, curves)


def draw(findings, path):
    figure, axes = panels(3)

    curves = findings["C4"].curves
    for (name, shares), colour in zip(curves["stuck"].items(), PALETTE, strict=False):
        mean, low, high = zip(*shares, strict=True)
        axes[0].plot(curves["rates"], mean, color=colour, marker="o", markersize=3, label=name)
        axes[0].fill_between(curves["rates"], low, high, color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xscale="log", title="runs that end with a wrong arm", xlabel="learning rate", ylabel="share of the runs",
                ylim=(0, 1))
    axes[0].set_xticks(curves["rates"], [f"{lr:g}" for lr in curves["rates"]])
    axes[0].minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)

    curves = findings["C5"].curves
    axes[1].axhspan(0.08, 0.12, color="0.88", linewidth=0, label="8 to 12 %")
    for (name, p), colour in zip(curves["eight"].items(), PALETTE, strict=False):
        axes[1].plot(curves["rates"], p, color=colour, label=f"8 updates, {name}")
    axes[1].plot(curves["rates"], curves["one"], ":", color="black", label="1 update")
    axes[1].set(xscale="log", title="what 10 % becomes in one iteration", xlabel="learning rate", ylabel="probability",
                ylim=(0, 1.02))
    axes[1].legend(frameon=False, fontsize=8, loc="upper left")

    curves = findings["C6"].curves
    for A, colour in (("+1", PALETTE[0]), ("-1", PALETTE[1])):
        for name, style in (("mask 1/8, 8", ":"), ("clip .2/.2", "-")):
            axes[2].plot(curves["ratios"], curves[f"{name}, A = {A}"], style, color=colour, label=f"A = {A}, {name}")
    axes[2].set(title="gradient of a token", xlabel="ratio", ylabel="dJ / dlog pi", xlim=(0, 3), ylim=(-3, 3))
    axes[2].legend(frameon=False, fontsize=8, loc="lower left")
    save(figure, path)


CLAIMS = (c4, c5, c6)

if __name__ == "__main__":
    main(sys.modules[__name__])
