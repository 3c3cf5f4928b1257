"""What a KL penalty prevents, and what it does not.

C10  A KL penalty prevents reward hacking. Answers have gold rewards ~ N(0, 1) and proxies = gold + N(0, 1/4), except for a
     share h of hacks, with proxy 6 and gold -2. The optimum of E[proxy] - beta KL(pi || ref) is pi ~ ref e^{proxy / beta}; for
     many answers

         E[gold] = ((1-h) e^{5 / 8 beta^2} / beta - 2 h e^{6 / beta}) / ((1-h) e^{5 / 8 beta^2} + h e^{6 / beta})

     It prevents hacking if E[gold] is highest between the smallest and the largest beta.

C28  The more answers best-of-N chooses from, the better its answer. With distinct scores, the winner's is distributed as
     F(s)^N - F(s^-)^N, a hack wins with probability 1 - (1-h)^N, and KL(best-of-N || ref) <= log N - (N-1)/N.

C36  Weight decay towards the start acts like a KL penalty: moves d of the weights of equal length have equal KL, to a tenth.
     KL = d' F d / 2 + O(d^3), F = diag(ref) - ref ref': that is |d|^2 / 2V for a uniform ref and a d of mean 0.

Exact sums, except for the PPO runs of C10 and a check of C28 with sampled answers.

Change `HACKS = 0.01` to `HACKS = 0.0`: C10 is refuted.
"""

import math
import sys

import torch

from experiments.findings import Finding, main, mean_and_interval, panels, save
from nanorl.ops import center, clipped_surrogate, kl_divergence, kl_k1, log_softmax
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.search import best_of_n, best_of_n_kl
from nanorl.tabular import leaf, num_prefixes, randn, regularised_optimum

HACKS = 0.01    # share of the answers that the proxy loves and nobody else
TOKENS, T = 8, 4                # an answer: V = 8^4 of them


def bandits(seeds, V, hacks=HACKS, noise=0.5):
    """Gold and proxy rewards of V answers, for each seed.       -> [seeds, V] each"""
    draws = [randn(generator(seed, "bandit"), 2, V) for seed in range(seeds)]
    gold, error = torch.stack(draws, dim=1)
    proxy, n = gold + noise * error, round(hacks * V)
    gold[:, :n], proxy[:, :n] = -2.0, 6.0
    return gold, proxy


def law(h, beta):
    """E[gold] of the closed form, for infinitely many answers."""
    good, hacked = (1 - h) * math.exp(0.625 / beta**2), h * math.exp(6 / beta)
    return (good / beta - 2 * hacked) / (good + hacked)


def interior(gold):
    """Which leash has the highest mean gold, and whether it beats both ends.       [seeds, betas] -> int, bool"""
    best = int(gold.mean(0).argmax())
    return best, all(mean_and_interval(gold[:, best] - gold[:, end])[1] > 0 for end in (0, -1))


def optima(gold, proxy, betas):
    """E[gold], E[proxy], KL to the uniform reference and mass on hacks of each bandit's optima.       -> [seeds, betas] each"""
    reference = torch.zeros(num_prefixes(TOKENS, T), TOKENS, dtype=torch.float64)
    pi = torch.stack([torch.stack([regularised_optimum(reference, p, beta) for beta in betas]) for p in proxy])     # [S, B, V]
    return ((pi * gold[:, None]).sum(-1), (pi * proxy[:, None]).sum(-1), kl_divergence(pi.log(), torch.zeros_like(pi)),
            (pi * (gold == -2.0)[:, None]).sum(-1))


def ppo(gold, proxy, betas, steps, samples=512, epochs=4, lr=15.0):
    """E[gold] and KL after each step of PPO, with k1 in the reward, on every bandit with every beta.       -> [steps, S, B]"""
    S, V, g = *gold.shape, generator(0, "PPO")
    ref_logp, beta = -math.log(V), torch.tensor(betas, dtype=torch.float64)[:, None]        # [B, 1]
    z, path = torch.zeros(S, len(betas), V, dtype=torch.float64), []
    for _ in range(steps):
        pi = log_softmax(z).exp()
        a = torch.multinomial(pi.view(-1, V), samples, replacement=True, generator=g).view(S, -1, samples)
        old = pi.log().gather(-1, a)
        reward = proxy[:, None].expand_as(z).gather(-1, a) - beta * kl_k1(old, torch.full_like(old, ref_logp))
        for _ in range(epochs):
            z = leaf(z)
            surrogate = clipped_surrogate(log_softmax(z).gather(-1, a), old, center(reward), 0.2, 0.2)
            z = (z + lr * torch.autograd.grad(surrogate.mean(-1).sum(), z)[0]).detach()
        path.append(torch.stack(((log_softmax(z).exp() * gold[:, None]).sum(-1), kl_divergence(z, torch.zeros_like(z)))))
    return torch.stack(path, dim=1)


def c10(smoke):
    (seeds, steps), V = (2, 3) if smoke else (20, 300), TOKENS**T
    betas = torch.logspace(-1, 1.5, 6 if smoke else 41).tolist()
    exact = {name: optima(*bandits(seeds, V, hacks), betas) for name, hacks in (("hacks", HACKS), ("noise", 0.0))}
    found = {name: interior(values[0]) for name, values in exact.items()}
    gold, proxy, kl, mass = exact["hacks"]
    best = found["hacks"][0]
    mean, low, high = mean_and_interval(gold[:, best])
    checked = abs(mean - law(HACKS, betas[best])) < high - low

    few = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0]
    ppo_gold, ppo_kl = ppo(*bandits(2 if smoke else 8, V), few, steps)
    ppo_best, ppo_held = interior(ppo_gold[-1])
    columns, rows = ("beta", "optimum: gold", "proxy", "KL", "mass on hacks", "PPO: gold", "low", "high", "PPO: KL"), []
    for i, beta in enumerate(few):
        optimum = [float(x.mean()) for x in optima(*bandits(seeds, V), [beta])] if beta else [None] * 4
        values = beta, *optimum, *mean_and_interval(ppo_gold[-1, :, i]), float(ppo_kl[-1, :, i].mean())
        rows.append(dict(zip(columns, values, strict=True)))
    early = ppo_gold[:, :, 0].mean(1)
    noise = exact["noise"][0].mean(0)
    return Finding("C10", "A KL penalty prevents reward hacking.",
                   {"a few answers are hacks, at the optimum": found["hacks"][1] and checked,
                    "a few answers are hacks, after PPO": ppo_held,
                    "the proxy is only noisy": found["noise"][1]},
                   f"gold reward peaks at beta {betas[best]:.2g}, with {mean:.2f} ({low:.2f} to {high:.2f}; closed form "
                   f"{law(HACKS, betas[best]):.2f}) and {mass[:, best].mean():.0%} hacks, and is {gold[:, 0].mean():.2f} at "
                   f"beta {betas[0]:g}; PPO does best at beta {few[ppo_best]:g}, with {ppo_gold[-1, :, ppo_best].mean():.2f}, "
                   f"against {ppo_gold[-1, :, 0].mean():.2f} without a penalty, or {early.max():.2f} if that run is stopped "
                   f"after {int(early.argmax()) + 1} of {steps} steps. With noise alone there is nothing to prevent, and the "
                   f"penalty only costs: gold peaks at beta {betas[int(noise.argmax())]:g}, with {noise.max():.2f}",
                   rows,
                   {"beta": betas, "gold": gold.mean(0), "proxy": proxy.mean(0), "noise": noise, "KL": kl.mean(0),
                    "PPO": {"gold": early[:60], "KL": ppo_kl[:60, :, 0].mean(1)}})


def winner(proxy, gold, N):
    """Of N draws the one with the highest proxy: its E[gold], and its KL to one draw.       [V], [V] -> two floats

        P(s) = F(s)^N - F(s^-)^N of each score s, shared by the answers that have it
    """
    V = len(proxy)
    _, at, count = proxy.unique(return_inverse=True, return_counts=True)
    F = count.cumsum(0).double() / V
    mass = F**N - (F - count / V).clamp(min=0)**N
    each = (mass / count)[at]                                                               # [V]
    return float(each @ gold), float((each * (V * each).log().masked_fill(each == 0, 0.0)).sum())


def c28(smoke):
    (seeds, checked, V, pool), worst = (3, 2, 512, 64) if smoke else (100, 40, TOKENS**T, 512), 0.0
    numbers = (1, 4, 16, 64, 256, 1024, 4096)
    models = {"the proxy is the gold reward": bandits(seeds, V, 0.0, 0.0), "the proxy is only noisy": bandits(seeds, V, 0.0),
              "a few answers are hacks": bandits(seeds, V)}
    rows, held, means, bounded = [], {}, {}, True
    for name, (gold, proxy) in models.items():
        found = torch.tensor([[winner(proxy[s], gold[s], N) for N in numbers] for s in range(seeds)])       # [S, N, 2]
        means[name] = found.mean(0)
        held[name] = all(mean_and_interval(found[:, i + 1, 0] - found[:, i, 0])[1] > 0 for i in range(len(numbers) - 1))
        drawn = [torch.randint(V, (pool,), generator=generator(s, "C28")) for s in range(checked)]
        for i, N in enumerate(numbers):
            mean, low, high = mean_and_interval(found[:, i, 0])
            rows.append({"when": name, "N": N, "gold of the best": mean, "low": low, "high": high,
                         "KL": float(found[:, i, 1].mean()), "log N - (N-1)/N": best_of_n_kl(N)})
            bounded = bounded and bool((found[:, i, 1] <= best_of_n_kl(N) + 1e-12).all())
            if pool > N:
                sampled = torch.cat([best_of_n(proxy[s, a][None], gold[s, a][None], N) for s, a in enumerate(drawn)])
                gaps = sampled - found[:checked, i, 0]
                worst = max(worst, float(gaps.mean().abs() / (gaps.std() / checked**0.5)))
    (noisy, _), (hacked, kl) = (means[name].T for name in list(models)[1:])
    top = int(hacked.argmax())
    return Finding("C28", "The more answers best-of-N chooses from, the better its answer.",
                   {name: rises and bounded and worst < 4 for name, rises in held.items()},
                   f"with {HACKS:.0%} hacks the best of {numbers[top]:,} is worth {hacked[top]:.2f} at a KL of {kl[top]:.1f} "
                   f"nats, the best of {numbers[-1]:,} {hacked[-1]:.2f}; with noise alone, these are worth {noisy[top]:.2f} "
                   f"and {noisy[-1]:.2f}. KL is {'never' if bounded else 'sometimes'} above log N - (N-1)/N, and {pool} "
                   f"sampled answers agree with the exact distribution to {worst:.1f} standard errors", rows,
                   {"gold": hacked, "KL": kl})


def spread(z, length, g, count=1000):
    """KL(softmax(z + d) || softmax(z)) of random moves d of one length, without a mean.       [V] -> [count]"""
    d = center(randn(g, count, len(z)))
    d = length * d / d.norm(dim=-1, keepdim=True)
    return kl_divergence(z + d, z.expand_as(d))


def decay(z, r, strength, steps):
    """The maximum of E_pi[r] - strength / 2 |z' - z|^2 by gradient ascent.       [S, 1, V] twice, [L, 1] -> [S, L, V]"""
    new = z.expand(-1, len(strength), -1)
    for _ in range(steps):
        pi = log_softmax(new).exp()
        new = new + pi * (r - (pi * r).sum(-1, keepdim=True)) - strength * (new - z)
    return new


def c36(smoke):
    V, seeds, g = 20, 2 if smoke else 50, generator(0, "C36")
    uniform, peaked = torch.zeros(V, dtype=torch.float64), 2 * randn(g, V)
    cases = {"moves are short and the reference is uniform": (uniform, 0.01),
             "moves are short and the reference is peaked": (peaked, 0.01),
             "moves are long and the reference is uniform": (uniform, 3.0)}
    rows = []
    for name, (z, length) in cases.items():
        kl = spread(z, length, g, 10 if smoke else 1000)
        rows.append({"moves of equal length, when": name, "length": length, "smallest KL": float(kl.min()),
                     "largest KL": float(kl.max())})
    law = max(abs(rows[0][name] / (0.01**2 / (2 * V)) - 1) for name in ("smallest KL", "largest KL"))

    # Other weights of the same function, W2 W1 x = (2 W2) (W1 / 2) x, against random moves of the same length
    x, W1, W2 = randn(g, 8), randn(g, 8, 8), randn(g, V, 8)
    length, kl = math.hypot((W1 / 2).norm(), W2.norm()), []
    for _ in range(10):
        d1, d2 = randn(g, 8, 8), randn(g, V, 8)
        scale = length / math.hypot(d1.norm(), d2.norm())
        kl.append(float(kl_divergence((W2 + scale * d2) @ (W1 + scale * d1) @ x, W2 @ W1 @ x)))
    rescaled = max(0.0, float(kl_divergence((2 * W2) @ (W1 / 2) @ x, W2 @ W1 @ x)))
    rows.append({"moves of equal length, when": "one layer is doubled and one is halved", "length": length,
                 "smallest KL": rescaled, "largest KL": max(kl)})
    equal = {row["moves of equal length, when"]: row["smallest KL"] / row["largest KL"] > 0.9 for row in rows}

    # Trained to the same distance: the optimum of the KL leash is z + r / beta, at |r - mean r| / beta from z
    z, r = (torch.stack([scale * randn(generator(s, "C36", name), V) for s in range(seeds)])[:, None]
            for name, scale in (("z", 2.0), ("r", 1.0)))                                    # [S, 1, V]
    strength = torch.logspace(-2.5, 0, 4 if smoke else 12, dtype=torch.float64)[:, None]
    new = decay(z, r, strength, 50 if smoke else 8000)
    distance = (new - z).norm(dim=-1)                                                       # [S, L]
    beta = center(r[:, 0]).norm(dim=-1, keepdim=True) / distance
    leashed = torch.stack([torch.stack([regularised_optimum(table, rewards, b) for b in each])
                           for table, rewards, each in zip(z, r[:, 0], beta.tolist(), strict=True)])
    by_decay, by_kl = (kl_divergence(p, z.expand_as(new)) for p in (new, leashed.log()))
    ratio = by_decay / by_kl
    equal["both are trained to the same distance"] = float(torch.minimum(ratio, 1 / ratio).min()) > 0.9
    return Finding("C36", "Weight decay towards the start acts like a KL penalty: equal distance, equal KL.",
                   {name: same and law < 0.1 for name, same in equal.items()},
                   f"KL of short moves from a uniform reference is |d|^2/2V to {law:.1%}, but differs by a factor of "
                   f"{rows[1]['largest KL'] / rows[1]['smallest KL']:.0f} where the reference is peaked, and is "
                   f"{rescaled:.1g} where one layer is doubled and one is halved. Trained to the same distance, weight decay "
                   f"leaves {ratio.mean(0).min():.0f} to {ratio.mean(0).max():.0f} times the KL of the KL penalty", rows,
                   {"distance": distance.mean(0), "decay": by_decay.mean(0), "leash": by_kl.mean(0)})


def draw(findings, path):
    figure, axes = panels(3)

    found, curves = findings["C10"], findings["C10"].curves
    for name, label, colour, style in (("proxy", "proxy", PALETTE[1], "-"), ("gold", "gold", PALETTE[0], "-"),
                                       ("noise", "gold, noise but no hacks", PALETTE[0], ":")):
        axes[0].plot(curves["beta"], curves[name], color=colour, linestyle=style, label=label)
    rows = [row for row in found.rows if row["beta"]]
    axes[0].plot([row["beta"] for row in rows], [row["PPO: gold"] for row in rows], "o", color=PALETTE[6], markersize=4,
                 label="gold, PPO")
    axes[0].set(xscale="log", title="a KL leash against a hacked proxy", ylabel="expected reward",
                xlabel="beta, from loose to tight")
    axes[0].legend(frameon=False, fontsize=8)

    axes[1].plot(curves["KL"], curves["gold"], color=PALETTE[0], label="KL leash, its optima")
    axes[1].plot(curves["PPO"]["KL"], curves["PPO"]["gold"], color=PALETTE[1], label="PPO without a leash, its steps")
    best = findings["C28"].curves
    axes[1].plot(best["KL"][1:], best["gold"][1:], color=PALETTE[2], marker="o", markersize=4, label="best of 4, 16, ..., 4096")
    axes[1].set(xscale="log", title="gold reward on the way to the hacks", xlabel="KL to the reference, nats",
                ylabel="expected gold reward", xlim=(1e-2, None))
    axes[1].legend(frameon=False, fontsize=8, loc="lower left")

    curves = findings["C36"].curves
    for name, label, colour in (("decay", "weight decay", PALETTE[1]), ("leash", "KL leash", PALETTE[0])):
        axes[2].plot(curves["distance"], curves[name], color=colour, marker="o", markersize=3, label=label)
    axes[2].set(xscale="log", yscale="log", title="two leashes of equal length", ylabel="KL to the reference, nats",
                xlabel="distance of the logits from the start", xticks=(0.5, 1, 2, 5), xticklabels=("0.5", "1", "2", "5"))
    axes[2].xaxis.minorticks_off()
    axes[2].legend(frameon=False, fontsize=8)
    save(figure, path)


CLAIMS = (c10, c28, c36)

if __name__ == "__main__":
    main(sys.modules[__name__])
