"""Preference losses over a group: winners against losers.

C20  Scaled pairs or means balance one winner against ten losers, each of which is pulled a tenth as hard as the winner. But in
     any loss of differences the gradients of winners and losers add up to zero, so on average over either side

         |dL/dr_w| / |dL/dr_l| = N_l / N_w

C21  Scaled pairs or means pull equally hard whatever a group consists of. If all margins are h, its winners are pulled in total
     by

         pairs   N_w N_l sigma(-h)       scaled   sqrt(N_w N_l) sigma(-h / sqrt(N_w N_l))       mean   sigma(-h)       hinge   1

C22  The loss of the pairs is never below that of the means: by Jensen's inequality, with equality where all margins are equal,

         1/(N_w N_l) pairs >= mean,        and        scaled >= mean,        as (1 + u)^(k^2) >= 1 + u^k for k >= 1, u >= 0

C23  A hinge is an implicit curriculum: prompts that have reached the margin m drop out for good, the easy ones first. Of a
     prompt with its own parameters, r = s theta, the margin after n steps and the step at which it drops out are

         D = n lr s^2 (1/N_w + 1/N_l),        n = m / (lr s^2 (1/N_w + 1/N_l))

Exact gradients; for C20 and C22 of random rewards, in groups of every size from 1 + 1 to 10 + 10.

Change `way == DIVIDED` to `DIVIDED`: C20 is confirmed.
"""

import sys

import torch

from experiments.findings import Finding, main, mean_and_interval, panels, save
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.tabular import leaf, randn
from train_group_dpo import objective

SIZES = [(winners, losers) for winners in range(1, 11) for losers in range(1, 11)]
DIVIDED = "each is divided by the other side's size"
# What is done to a group, by which of train_group_dpo.py's losses, and C21's law of all its winners' pull.
WAYS = {"pairs are summed": ("pairs", lambda h, N_w, N_l: N_w * N_l * (-h).sigmoid()),
        "pairs are scaled": ("scaled", lambda h, N_w, N_l: (N_w * N_l) ** 0.5 * (-h / (N_w * N_l) ** 0.5).sigmoid()),
        "pairs are averaged": ("pairs", lambda h, N_w, N_l: (-h).sigmoid()),
        "means are compared": ("mean", lambda h, N_w, N_l: (-h).sigmoid()),
        "means meet a hinge": ("hinge", lambda h, N_w, N_l: torch.ones_like(h)),
        DIVIDED: ("pairs", lambda h, N_w, N_l: N_w * (-h).sigmoid())}
CLAIMED = list(WAYS)[1:-1]


def groups(winners, losers, count):
    """`count` groups of one size, the winners first.       -> won [count, winners + losers]"""
    return (torch.arange(winners + losers) < winners).expand(count, -1)


def pull(way, r, won):
    """-dL/dr of every group, with the hinge's margin out of reach.       r, won [P, G] -> [P, G]"""
    winners, losers = (side.sum(-1, keepdim=True).double() for side in (won, ~won))         # [P, 1]
    weights, factor = torch.ones(len(r)).double(), torch.ones_like(r)
    if way == "pairs are averaged":
        weights = 1 / (winners * losers).squeeze(-1)
    if way == DIVIDED:
        factor = torch.where(won, 1 / losers, 1 / winners)
    r = leaf(r)
    loss, _ = objective(factor * r + ((1 - factor) * r).detach(), won, weights, loss=WAYS[way][0], margin=1000.0)
    return -torch.autograd.grad(loss, r)[0]


def c20(smoke):
    rows, balanced, count = [], {}, 2 if smoke else 100
    for way in WAYS:
        off_one, off_law = [], []
        for winners, losers in SIZES:
            r = 2 * randn(generator(winners, "C20", losers), count, winners + losers)
            found = pull(way, r, groups(winners, losers, count))
            ratio = found[:, :winners].mean(-1) / -found[:, winners:].mean(-1)              # [count]
            off_one.append(float((ratio - 1).abs().max()))
            off_law.append(float((ratio * winners / losers - 1).abs().max()))
        equal = pull(way, torch.zeros(1, 11).double(), groups(1, 10, 1))[0]
        balanced[way] = max(off_one) < 1e-12
        rows.append({"at equal rewards": way, "winner": float(equal[0]), "each of 10 losers": float(equal[1]),
                     "ratio": float(-equal[0] / equal[1]), "all losers": float(equal[1:].sum()),
                     "off N_l / N_w, at any": max(off_law)})
    summed, scaled, _, means, _, divided = rows
    off = max(row["off N_l / N_w, at any"] for row in rows[:-1])
    return Finding("C20", "Scaled pairs or means balance one winner against ten losers.",
                   {way: balanced[way] for way in CLAIMED},
                   f"the winner is pulled by {summed['winner']:.3g} with summed pairs, {scaled['winner']:.3g} with scaled "
                   f"ones, {means['winner']:.3g} with means, each loser by a tenth of that; at any rewards the ratio is N_l / "
                   f"N_w, to {off:.0e}. What does balance them is to divide each gradient by the size of the other side: "
                   f"{divided['winner']:.3g} and {-divided['each of 10 losers']:.3g}", rows)


def c21(smoke):
    margins, sizes = torch.linspace(-8, 8, 3 if smoke else 33).double(), ((1, 10), (2, 8), (5, 5))
    rows, spread, off, curves = [], {}, 0.0, {}
    for way, (_, law) in WAYS.items():
        pulls = []
        for winners, losers in sizes:
            won = groups(winners, losers, len(margins))
            pulls.append(pull(way, margins[:, None] * won, won)[:, :winners].sum(-1))       # [margins]
            off = max(off, float((pulls[-1] / law(margins, winners, losers) - 1).abs().max()))
        pulls = torch.stack(pulls)                                                          # [sizes, margins]
        spread[way] = float((pulls.amax(0) / pulls.amin(0)).max())
        tie = pulls[:, len(margins) // 2]
        rows.append({"at h = 0": way} | {f"{w} : {l}": float(x) for (w, l), x in zip(sizes, tie, strict=True)}
                    | {"largest / smallest": float(tie.max() / tie.min()), "at the worst h": spread[way]})
        curves[way] = [float(pull(way, torch.zeros(1, 11).double(), groups(n, 11 - n, 1))[0, :n].sum()) for n in range(1, 11)]
    summed, scaled = rows[:2]
    return Finding("C21", "Scaled pairs or means pull equally hard whatever a group consists of.",
                   {way: spread[way] < 1 + 1e-9 and off < 1e-9 for way in CLAIMED},
                   f"from one winner of eleven to five of ten, at a tie: summed pairs pull by {summed['1 : 10']:.3g} to "
                   f"{summed['5 : 5']:.3g}, scaled ones by {scaled['1 : 10']:.3g} to {scaled['5 : 5']:.3g}, means always by "
                   f"{rows[3]['1 : 10']:.2g}. At large margins scaled pairs differ by up to {scaled['at the worst h']:.2g}, "
                   f"summed ones by {summed['at the worst h']:.2g}; all match the closed forms, to {off:.0e}", rows, curves)


def values(loss, r, won):
    """The loss of every group. L is linear in the weights: its gradient in them.       r, won [P, G] -> [P]"""
    weights = leaf(torch.ones(len(r)).double())
    return torch.autograd.grad(objective(r, won, weights, loss=loss)[0], weights)[0]


def c22(smoke):
    count, ways = 5 if smoke else 1000, ("pairs are averaged", "pairs are scaled", "pairs are scaled and averaged")
    gaps, apart = {way: [] for way in ways}, 0.0
    for winners, losers in SIZES:
        g, won, N = generator(winners, "C22", losers), groups(winners, losers, count), winners * losers
        scale = 10 ** torch.empty(count, 1).double().uniform_(-2, 1, generator=g)
        shift = 3 * randn(g, count, 1) * won
        r = scale * randn(g, count, winners + losers) + shift
        mean = values("mean", r, won)
        for way, bound in zip(ways, (values("pairs", r, won) / N, values("scaled", r, won), values("scaled", r, won) / N),
                              strict=True):
            gaps[way].append((bound - mean) / (1 + mean))                                   # relative: values go up to hundreds
        apart = max(apart, float((values("pairs", shift, won) / N - values("mean", shift, won)).abs().max()))
    gaps = {way: torch.cat(found) for way, found in gaps.items()}
    rows = [{"": way, "groups": len(gap), "below the means": int((gap < -1e-12).sum()), "smallest gap": float(gap.min()),
             "median": float(gap.median()), "largest": float(gap.max())} for way, gap in gaps.items()]
    return Finding("C22", "The loss of the pairs is never below that of the means.",
                   {way: bool((gap >= -1e-12).all()) and apart < 1e-12 for way, gap in gaps.items()},
                   f"of {rows[0]['groups']:,} groups, {rows[0]['below the means']} are below with averaged pairs, "
                   f"{rows[1]['below the means']} with scaled ones, and {rows[2]['below the means']:,} with pairs that are "
                   "scaled and averaged: where the losers lead. Where all margins are equal, averaged pairs and means differ "
                   f"by {apart:.0e}", rows)


def learn(loss, theta, rewards, won, steps, lr):
    """Gradient descent on S seeds' prompts: how hard each is pulled, and its D, before every step.   -> [steps, S, P] twice"""
    pulls, D = [], []
    for _ in range(steps):
        theta = leaf(theta)
        r = rewards(theta)                                                                  # [S, P, G], two winners first
        total, _ = objective(r.flatten(0, 1), won, torch.ones(len(won)).double(), loss=loss, margin=1.0)
        by_reward, by_theta = torch.autograd.grad(total, (r, theta))
        pulls.append(by_reward.abs().sum(-1))
        D.append((r[..., :2].mean(-1) - r[..., 2:].mean(-1)).detach())
        theta = theta - lr * by_theta
    return torch.stack(pulls), torch.stack(D)


def c23(smoke):
    S, P, G, d, lr, steps = 2 if smoke else 20, 40, 4, 64, 0.05, 200 if smoke else 3000
    speed = torch.logspace(-1, 0, P).double()[:, None]                                      # [P, 1]
    phi, won = randn(generator(0, "C23"), S, P, G, d) / d**0.5, groups(2, 2, S * P)
    own = torch.zeros(S, P, G).double(), lambda theta: speed * theta
    shared = torch.zeros(S, d).double(), lambda theta: speed * (phi @ theta[:, None, :, None]).squeeze(-1)
    cases = {"every prompt has its own parameters": ("hinge", *own), "prompts share parameters": ("hinge", *shared),
             "-log sigma(D) takes the hinge's place": ("mean", *own)}
    rows, held, curves, off = [], {}, {}, None
    for name, (loss, theta, rewards) in cases.items():
        pulls, D = learn(loss, theta, rewards, won, steps, lr)
        active = pulls > 0
        out = (~active).cummax(0).values[:-1]                                               # has been out before this step
        came_back = (out & active[1:]).any(0).double().mean(-1)                             # [S], the share of the prompts
        fell = float(D[1:][out].min()) if out.any() else None
        steps_taken = active.sum(0)                                                         # [S, P]
        off = float((steps_taken - 1 / (lr * speed[:, 0]**2)).abs().max()) if off is None else off
        held[name] = fell is not None and fell > 0.9
        mean, low, high = mean_and_interval(came_back)
        rows.append({"": name, "active at the end": float(active[-1].double().mean()), "came back": mean, "low": low,
                     "high": high, "lowest D of those": fell, "smallest D": float(D[-1].min()), "largest D": float(D[-1].max()),
                     "pull on D ≥ 1": float((pulls * (D >= 1))[-1].sum() / pulls[-1].sum().clamp(min=1e-300))})
        curves[name] = active.double().mean((1, 2))[:: steps // 100]
    alone, together, smooth = rows
    held["every prompt has its own parameters"] &= off <= 1 and alone["came back"] == 0
    return Finding("C23", "A hinge is an implicit curriculum: easy prompts reach the margin and drop out for good.", held,
                   f"with parameters of their own, prompts drop out in order, within {off:.2f} steps of the closed form, and "
                   f"end with D at {alone['smallest D']:.2f} to {alone['largest D']:.2f}; with shared parameters "
                   f"{together['came back']:.0%} ({together['low']:.0%} to {together['high']:.0%}) come back, but only for a "
                   f"step now and then: none falls below {together['lowest D of those']:.2f} again. Under -log sigma none "
                   f"drops out: D ends at {smooth['smallest D']:.2f} to {smooth['largest D']:.2f}, and "
                   f"{smooth['pull on D ≥ 1']:.0%} of the pull is on prompts past 1",
                   rows, {"thin": steps // 100, "active": curves})


def draw(findings, path):
    figure, axes = panels(3)

    rows = findings["C20"].rows[::-1]
    winner, loser = ([abs(row[column]) for row in rows] for column in ("winner", "each of 10 losers"))
    labels = ("divided", "hinge", "means", "averaged", "scaled", "pairs")
    axes[0].hlines(labels, loser, winner, color="0.7", linewidth=1)
    axes[0].plot(winner, labels, color=PALETTE[0], marker="o", linestyle="", label="the winner")
    axes[0].plot(loser, labels, color=PALETTE[1], marker="s", markersize=10, fillstyle="none", linestyle="",
                 label="each of ten losers")
    axes[0].set(xscale="log", title="how hard each is pulled", xlabel="|dL / dr|, at equal rewards", ylabel="loss",
                ylim=(-0.6, 6.6))
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")

    curves = findings["C21"].curves
    shown = (("pairs are summed", "pairs"), ("pairs are scaled", "scaled"), ("means meet a hinge", "hinge"),
             ("means are compared", "means, or averaged pairs"))
    for (way, label), colour in zip(shown, PALETTE, strict=False):
        axes[1].plot(range(1, 11), curves[way], color=colour, marker="o", markersize=3, label=label)
    axes[1].set(yscale="log", title="the pull on all winners", xlabel="winners, of a group of eleven",
                ylabel="|dL / dr| in all, at equal rewards", ylim=(0.3, 100))
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", ncols=2)

    curves = findings["C23"].curves
    labels = ("hinge, own parameters", "hinge, shared parameters", "-log σ(D)")
    for active, label, colour in zip(curves["active"].values(), labels, PALETTE, strict=False):
        axes[2].plot([curves["thin"] * i for i in range(len(active))], active, color=colour, label=label)
    axes[2].set(title="prompts that still have a gradient", xlabel="step", ylabel="share of 40 prompts", ylim=(0, 1.05))
    axes[2].legend(frameon=False, fontsize=8, loc="center right")
    save(figure, path)


CLAIMS = (c20, c21, c22, c23)

if __name__ == "__main__":
    main(sys.modules[__name__])
