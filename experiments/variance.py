"""What a baseline does to a policy gradient.

C1   A baseline lowers the variance of the policy gradient and keeps its mean: for an action a from pi and any constant b,

         g_b = (r(a) - b) grad log pi(a),        E[g_b] = grad E[r],        b* = E[|grad log pi|^2 r] / E[|grad log pi|^2]

C2   In a group of G answers, r_i - mean(r) gives (G-1)/G of the true gradient, leaving r_i out of the mean gives the true one,
     and dividing by the standard deviation reweights prompts by their difficulty:

         E[1/G sum_i A_i grad log pi(y_i)] = c grad E[r],        c = (G-1)/G,  1,  and a function of the pass rate

C3   A group whose answers are all right or all wrong teaches nothing; that happens with probability p^G + (1-p)^G.

C35  If every reward is positive, everything is reinforced. It still learns, just noisily: the expected gradient is the same.

Exact sums over every action or every group, except for the sampled groups of C3 and the sampled runs of C35.

Change `BAD = -20.0` to `BAD = 9.5`: C1 is confirmed.
"""

import sys

import torch

from experiments.findings import Finding, main, mean_and_interval, panels, save, scores
from nanorl.family import ADVANTAGES
from nanorl.ops import center, leave_one_out, log_softmax, zscore
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.tabular import log_probs, randn, reward_gradient, sequences

V = 6           # actions
BAD = -20.0     # a baseline far below every reward


def moments(z, r, b):
    """E[g_b], and the trace of the variance, E|g_b|^2 - |E[g_b]|^2, by summing over all actions.       logits, rewards [V]"""
    pi, score = log_softmax(z).exp(), scores(z)
    g = (r - b)[:, None] * score                                                            # [V, V], one for each action
    mean = pi @ g
    return mean, float(pi @ g.square().sum(-1) - mean.square().sum())


def c1(smoke):
    seeds, worst = range(3 if smoke else 200), 0.0
    baselines = {"zero": lambda pi, r, n: 0.0, "the mean reward": lambda pi, r, n: float(pi @ r),
                 "the optimum b*": lambda pi, r, n: float((pi * n) @ r / (pi @ n)), f"{BAD:g}": lambda pi, r, n: BAD}
    variances = {name: [] for name in baselines}
    for seed in seeds:
        g = generator(seed, "C1")
        z, r = randn(g, V), 10 + 0.3 * randn(g, V)
        pi, n = log_softmax(z).exp(), scores(z).square().sum(-1)
        for name, b in baselines.items():
            mean, variance = moments(z, r, b(pi, r, n))
            worst = max(worst, float((mean - reward_gradient(z[None], r)[0]).abs().max()))
            variances[name].append(variance)
    relative = {name: [v / v0 for v, v0 in zip(values, variances["zero"], strict=True)] for name, values in variances.items()}
    rows = [{"b": name, "variance, relative to b = 0": mean_and_interval(values)[0], "smallest": min(values),
             "largest": max(values)} for name, values in relative.items()]
    held = {f"b is {name}": worst < 1e-12 and max(values) < 1 for name, values in relative.items() if name != "zero"}
    mean = rows[1]["variance, relative to b = 0"]
    return Finding("C1", "A baseline lowers the variance of the policy gradient and keeps its mean.", held,
                   f"with rewards of 10 ± 0.3, the mean reward as baseline reduces the variance to {mean:.2g} times what it "
                   f"is without one, and b = {BAD:g} raises it to {rows[3]['variance, relative to b = 0']:.2g} times; no mean "
                   f"is off by more than {worst:.0e}", rows)


def expected_gradient(z, r, advantage, G):
    """E[1/G sum_i A_i grad log pi(y_i)] over every group of G answers.       logits [V], rewards [V] -> [V]"""
    groups, score = sequences(len(z), G), scores(z)
    logp = log_probs(z[None]).squeeze(-1)[groups]                                           # [V^G, G]
    return torch.einsum("n, ng, ngv -> v", logp.sum(-1).exp(), advantage(r[groups]) / G, score[groups])


def c2(smoke):
    advantages, rows, scale = {"r - mean": center, "leave one out": leave_one_out, "z-score": zscore}, [], {}
    g = generator(0, "C2")
    z, graded = randn(g, 4), torch.rand(4, generator=g, dtype=torch.float64)
    for label, r in (("0 or 1", torch.tensor([1.0, 0, 0, 0]).double()), ("graded", graded)):
        true = reward_gradient(z[None], r)[0]
        for name, advantage in advantages.items():
            for G in (2, 3, 4):
                found = expected_gradient(z, r, advantage, G)
                size = float(found @ true / true.square().sum())
                cosine = float(found @ true / (found.norm() * true.norm()))
                rows.append({"advantage": name, "rewards": label, "G": G, "scale": size, "1 - cosine": max(0.0, 1 - cosine)})
                scale[name, label, G] = (size, 1 - cosine)

    # Two actions, one of them right: by what z-scoring multiplies the gradient of a prompt with this pass rate
    rates = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]
    r, factors = torch.tensor([1.0, 0.0]).double(), {}
    for G in (2, 4, 8, 16):
        factors[G] = []
        for p in rates:
            z = torch.tensor([p, 1 - p]).double().log()
            factors[G].append(float((expected_gradient(z, r, zscore, G) / reward_gradient(z[None], r)[0])[0]))
    close = {name: all(abs(scale[name, label, G][0] - c(G)) < 1e-12 and scale[name, label, G][1] < 1e-12
                       for label in ("0 or 1", "graded") for G in (2, 3, 4))
             for name, c in (("r - mean", lambda G: (G - 1) / G), ("leave one out", lambda G: 1.0))}
    weighs = {G: max(values) > 1.01 * min(values) for G, values in factors.items()}
    easy, hard = (factors[16][rates.index(p)] for p in (0.5, 0.05))
    return Finding("C2", "Subtracting the group mean scales the true gradient, leave-one-out gives it exactly, and z-scores "
                   "reweight prompts.",
                   {"the group mean is subtracted": close["r - mean"], "one is left out": close["leave one out"],
                    "z-scores are over four answers or more": weighs[4] and weighs[8] and weighs[16],
                    "z-scores are over two answers and rewards are 0 or 1": weighs[2]},
                   "the scales are (G-1)/G and 1, to 1e-12. z-scores in groups of 16 multiply the gradient of a prompt with "
                   f"pass rate .5 by {easy:.2f} and with .05 by {hard:.2f}; in groups of two they multiply all by "
                   f"{factors[2][0]:.0f}. With graded rewards they also lose the scale (a factor of "
                   f"{scale['z-score', 'graded', 2][0]:.2g} at G = 2), and rotate the gradient a little (1 - cosine "
                   f"{scale['z-score', 'graded', 2][1]:.1g})", rows,
                   {"rates": rates, "factors": factors})


def c3(smoke):
    count, rows, gaps = 200 if smoke else 20_000, [], []
    for G in (2, 4, 8, 16):
        for p in (0.02, 0.1, 0.3, 0.5, 0.9):
            groups = torch.bernoulli(torch.full((count, G), p), generator=generator(G, "C3", str(p)))
            found, low, high = mean_and_interval((zscore(groups) == 0).all(-1), shares=True)
            law = p**G + (1 - p)**G
            gaps.append(abs(found - law) / (law * (1 - law) / count) ** 0.5)
            rows.append({"G": G, "pass rate": p, "groups without signal": found, "low": low, "high": high,
                         "p^G + (1-p)^G": law})
    all_right, all_wrong = torch.ones(1, 8), torch.zeros(1, 8)
    silent = {name: all(bool((advantage(group) == 0).all()) for group in (all_right, all_wrong))
              for name, advantage in ADVANTAGES.items()}
    return Finding("C3", "Groups that are all right or all wrong carry no signal.",
                   {f"the advantage is {' or '.join(names)}": max(gaps) < 4 and all(silent[name] for name in names)
                    for names in (("center", "leave_one_out", "zscore", "zscore_batch"), ("reward", "positive"))},
                   f"with {count:,} groups each, the share without a signal is within {max(gaps):.1f} standard errors of p^G "
                   f"+ (1-p)^G everywhere. At p = .1, {0.1**8 + 0.9**8:.0%} of the groups of eight answers teach nothing", rows)


def learn(seed, baseline, steps, samples=4, lr=0.1):
    """pi(best action) after each step of REINFORCE on a bandit whose rewards are all positive."""
    g = generator(seed, "C35")
    r = 0.5 + 0.5 * torch.linspace(0, 1, V, dtype=torch.float64)
    z, path = torch.zeros(V).double(), []
    for _ in range(steps):
        pi = log_softmax(z).exp()
        a = torch.multinomial(pi, samples, replacement=True, generator=g)
        adv = r[a] - (pi @ r if baseline else 0.0)
        z = z + lr * (adv[:, None] * scores(z)[a]).mean(0)
        path.append(float(log_softmax(z)[-1].exp()))
    return path


def c35(smoke):
    seeds, steps = (2, 20) if smoke else (60, 1500)
    paths = {name: torch.tensor([learn(seed, baseline, steps)[::10] for seed in range(seeds)])
             for name, baseline in (("plain rewards", False), ("minus the expected reward", True))}
    rows = []
    for name, path in paths.items():
        mean, low, high = mean_and_interval(path[:, -1])
        rows.append({"": name, "pi(best) at the end": mean, "low": low, "high": high, "std": float(path[:, -1].std()),
                     "seeds that choose it": float((path[:, -1] > 0.5).double().mean())})
    start, plain, centred = 1 / V, rows[0]["pi(best) at the end"], rows[1]["pi(best) at the end"]
    return Finding("C35", "Plain positive rewards still teach, just noisily.",
                   {"it learns": rows[0]["low"] > 2 * start, "it is noisier": rows[0]["std"] > rows[1]["std"]},
                   f"after {steps:,} steps of four samples, {seeds} seeds: pi(best) from {start:.2f} to {plain:.2f} ("
                   f"{rows[0]['low']:.2f} to {rows[0]['high']:.2f}) with plain rewards, {centred:.2f} ({rows[1]['low']:.2f} "
                   f"to {rows[1]['high']:.2f}) with the expected reward subtracted; the standard deviation over seeds is "
                   f"{rows[0]['std']:.2g} and {rows[1]['std']:.2g}",
                   rows, {"mean": {name: path.mean(0) for name, path in paths.items()},
                          "spread": {name: path.quantile(torch.tensor([0.1, 0.9]), 0) for name, path in paths.items()}})


def draw(findings, path):
    figure, axes = panels(3)

    rows = findings["C1"].rows[::-1]
    axes[0].barh([row["b"] for row in rows], [row["variance, relative to b = 0"] for row in rows], color=PALETTE[0])
    axes[0].set(xscale="log", title="variance of the gradient", xlabel="relative to b = 0", ylabel="baseline b")

    curves = findings["C2"].curves
    for (G, values), colour in zip(curves["factors"].items(), PALETTE, strict=False):
        axes[1].plot(curves["rates"], values, color=colour, marker="o", markersize=3, label=f"z-scores, G = {G}")
    axes[1].axhline(1, color="0.6", linewidth=0.8, linestyle="--", label="leave one out")
    axes[1].set(title="what a prompt's gradient is multiplied by", xlabel="pass rate of the prompt", ylabel="factor",
                ylim=(0, None))
    axes[1].legend(frameon=False, fontsize=8)

    curves = findings["C35"].curves
    for (name, mean), colour in zip(curves["mean"].items(), (PALETTE[1], PALETTE[0]), strict=True):
        steps = [10 * i for i in range(len(mean))]
        axes[2].plot(steps, mean, color=colour, label=name)
        axes[2].fill_between(steps, *curves["spread"][name], color=colour, alpha=0.15, linewidth=0)
    axes[2].set(title="all rewards positive: it learns, noisily", xlabel="step", ylabel="probability of the best action",
                ylim=(0, 1))
    axes[2].legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)


CLAIMS = (c1, c2, c3, c35)

if __name__ == "__main__":
    main(sys.modules[__name__])
