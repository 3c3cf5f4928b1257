"""What direct preference optimisation does to a policy.

C16  The partition function cancels: a term of the prompt alone, such as beta log Z(x), changes neither loss nor gradient:

         r(x, y) + c(x):        m = r(x, w) + c(x) - r(x, l) - c(x)

C17  DPO recovers the policy that RL with a KL penalty would find, if the labels follow Bradley and Terry:

         pi*(y) = ref(y) e^{r(y) / beta} / Z,        P(i beats j) = sigma(r_i - r_j)

C18  The gradient of DPO is scaled by the derivative of the sigmoid, sigma'(h) = sigma(h) sigma(-h), h the margin. By the chain
     rule the factor is a different one:

         grad L = -beta sigma(-h) (grad log pi(w) - grad log pi(l))

C19  DPO raises the probability of the chosen response. With one pair, from a uniform softmax of features phi:

         log pi = log_softmax(s Phi (phi_w - phi_l)),        s = h / (beta |phi_w - phi_l|^2)

C31  Iterative DPO drifts further from where it started: after k solutions, each the reference of the next,

         pi_k(y) = ref(y) e^{k r(y) / beta} / Z,        the optimum for beta / k

Exact pairs with their exact shares, except for the drawn labels of C17 and the drawn pairs of C31.

Change `h.sigmoid() * (-h).sigmoid()` to `(-h).sigmoid()`: C18 is confirmed.
"""

import math
import sys

import torch

from experiments.findings import Finding, main, mean_and_interval, panels, save
from nanorl.ops import bradley_terry, kl_divergence, log_softmax
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.tabular import leaf, randn, regularised_optimum
from train_dpo import objective

V = 6           # responses to a prompt
BETA = 0.5      # weight of the KL penalty
PHI = torch.tensor([[1, 0.2], [1.6, 0], [0.2, 1.5]]).double()     # features of the chosen, the rejected and a third response


def descend(log_ref, wins, beta, steps, features=None, refresh=None, nll_coef=0.0, lr=10.0):
    """log pi before the first and after every step of gradient descent on DPO's loss, for S policies at once.

        log pi = log_softmax(log ref + features theta),        L = sum_{w, l} wins(w, l) f(m(w, l))

    log ref [S, V]; wins: step -> [S, V, V], how often w beats l; features [V, d], else one logit each -> [steps + 1, S, V]
    Steps of lr / beta^2: then beta decides where the margins lead, and not how fast they grow.
    """
    w, l = torch.cartesian_prod(*[torch.arange(log_ref.shape[1])] * 2).T
    features = torch.eye(log_ref.shape[1]).double() if features is None else features
    theta, reference, path = torch.zeros(len(log_ref), features.shape[-1]).double(), log_ref, []
    for step in range(steps + 1):
        theta = leaf(theta)
        log_pi = log_softmax(log_ref + (features @ theta[:, :, None]).squeeze(-1))
        path.append(log_pi.detach())
        if refresh and step % refresh == 0:
            reference = log_pi.detach()
        weights = wins(step).flatten(1)                                                     # [S, V^2]
        loss, _ = objective(log_pi[:, w], log_pi[:, l], reference[:, w], reference[:, l], *[torch.ones_like(weights)] * 2,
                            weights, beta=beta, nll_coef=nll_coef)
        theta = theta - lr / beta**2 * torch.autograd.grad(loss, theta)[0]
    return torch.stack(path)


def shares(r, certain=False):
    """How often w beats l, all pairs alike: by Bradley and Terry, or always the better one.       [S, V] -> [S, V, V]"""
    gap = r[:, :, None] - r[:, None, :]
    chance = (gap > 0).double() if certain else (-bradley_terry(gap)).exp() * (gap != 0)
    return chance / chance.sum((-1, -2), keepdim=True)


def drawn(wins, count, g):
    """The same from `count` labelled pairs that were drawn with these probabilities.       [S, V, V] -> [S, V, V]"""
    picks = torch.multinomial(wins.flatten(1), count, replacement=True, generator=g)        # [S, count]
    each = torch.full(picks.shape, 1 / count, dtype=torch.float64)
    return torch.zeros_like(wins).flatten(1).scatter_add(1, picks, each).view_as(wins)


def optimum(log_ref, r, beta):
    """log pi*, a row for each seed.       [S, V], [S, V] -> [S, V]"""
    return torch.stack([regularised_optimum(*row, beta).log() for row in zip(log_ref[:, None], r, strict=True)])


def pair_loss(loss, r, w, l, log_ref, lengths):
    """The mean loss of N pairs; r [P, V] is log pi or the reward, w and l are prompts and responses ([N], [N]).       -> []"""
    if loss == "reward model":
        return bradley_terry(r[w] - r[l]).mean()
    weights = torch.full_like(log_ref[w], 1 / len(lengths[0]))
    return objective(r[w], r[l], log_ref[w], log_ref[l], *lengths, weights, loss=loss, beta=BETA)[0]


def c16(smoke):
    P, N = 8, 64            # prompts, pairs
    cases = {"both responses answer one prompt": ("reward model", "dpo", "cdpo", "slic"),
             "each reward is divided by its length": ("ipo", "simpo"),
             "they answer two prompts": ("reward model", "dpo", "cdpo", "slic")}
    changes, inverse = {(case, loss): [] for case, losses in cases.items() for loss in losses}, 0.0
    for seed in range(2 if smoke else 50):
        g = generator(seed, "C16")
        z, log_ref, rewards, c = randn(g, P, V), log_softmax(randn(g, P, V)), randn(g, P, V), 10 * randn(g, P, 1)
        x, other = torch.randint(P, (2, N), generator=g)
        better, worse = torch.rand(N, V, generator=g).topk(2).indices.T
        rest = log_ref, torch.randint(1, 9, (2, N), generator=g).double()
        for case, loss in changes:
            z = leaf(z)
            log_pi, w, l = log_softmax(z), (x, better), (other if case == "they answer two prompts" else x, worse)
            change = pair_loss(loss, log_pi + c, w, l, *rest) - pair_loss(loss, log_pi, w, l, *rest)
            changes[case, loss].append((abs(change.item()), float(torch.autograd.grad(change, z)[0].abs().max())))
        w, l = (x, better), (x, worse)
        gap = pair_loss("dpo", optimum(log_ref, rewards, BETA), w, l, *rest) - pair_loss("reward model", rewards, w, l, *rest)
        inverse = max(inverse, abs(float(gap)))
    rows = [{"": case, "loss": loss, "change of the loss, at most": max(a for a, _ in found),
             "of its gradient, at most": max(b for _, b in found)} for (case, loss), found in changes.items()]
    worst = {case: max(max(map(max, changes[case, loss])) for loss in losses) for case, losses in cases.items()}
    one, by_length, two = worst.values()
    return Finding("C16", "The partition function cancels: a term of the prompt alone changes neither loss nor gradient.",
                   {case: change < 1e-12 and inverse < 1e-12 for case, change in worst.items()},
                   f"a c(x) of ± 10 changes losses and gradients by {one:.0e} at most, and pi* without its Z has the loss of "
                   "the true rewards. Between two prompts c(x) does not cancel, nor does it in ipo and simpo, where c/|w| - "
                   f"c/|l| remains: losses change by up to {two:.2g} and {by_length:.2g}", rows)


def expected_kl(log_pi, r, beta, count):
    """What `count` drawn labels cost: KL(pi || pi*) to second order, of the maximum-likelihood pi.       [S, V], [S, V] -> [S]

        E[KL] = tr(F C) / 2,        F = diag(pi*) - pi* pi*^T,        C = I^+ / (count beta^2)

    I is what one label tells about the margins: the Laplacian of P(i beats j) P(j beats i), over the number of pairs.
    """
    pi, wins, pairs = log_pi.exp(), shares(r), V * (V - 1) / 2
    edges = wins * (1 - pairs * wins)                                                       # [S, V, V]
    F = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
    I = torch.diag_embed(edges.sum(-1)) - edges
    return torch.einsum("sij, sji -> s", F, torch.linalg.pinv(I)) / (2 * count * beta**2)


def c17(smoke):
    seeds, steps = (4, 200) if smoke else (50, 3000)
    g = generator(0, "C17")
    log_ref, r = log_softmax(randn(g, seeds, V)), randn(g, seeds, V)
    wins = shares(r)
    without = wins.clone()
    without[:, -1], without[:, :, -1] = 0, 0
    kinds = {"exact shares": wins, "100,000 drawn": drawn(wins, 100_000, g), "1,000 drawn": drawn(wins, 1000, g),
             "one response is in no pair": without / without.sum((-1, -2), keepdim=True),
             "the better one always wins": shares(r, certain=True)}
    together, rows, found, ratios = torch.cat(list(kinds.values())), [], {}, []
    for beta in (BETA, 4 * BETA):
        best = optimum(log_ref, r, beta)
        paths = descend(log_ref.repeat(len(kinds), 1), lambda step: together, beta, steps).chunk(len(kinds), dim=1)
        for name, path in zip(kinds, paths, strict=True):                                   # [steps + 1, S, V]
            kl = found[name, beta] = kl_divergence(path[-1], best).clamp(min=0)
            mean, low, high = mean_and_interval(kl)
            rows.append({"labels": name, "beta": beta, "KL(pi || pi*)": mean, "low": low, "high": high,
                         "KL(pi || ref)": float(kl_divergence(path[-1], log_ref).mean()),
                         "KL(pi* || ref)": float(kl_divergence(best, log_ref).mean())})
        ratios.append(mean_and_interval(found["100,000 drawn", beta] / expected_kl(best, r, beta, 100_000)))
    # Where labels are certain: the margins of neighbours, from the worst response to the best.                 [steps + 1]
    h = (beta * (path - log_ref)).gather(-1, r.argsort(-1).expand_as(path)).diff(dim=-1).mean((-1, -2))
    slope = float(h[-1] - h[steps // 10]) / math.log(10)
    recovered = {name: max(float(found[name, beta].max()) for beta in (BETA, 4 * BETA)) < 1e-9 for name in kinds}
    lawful = all(abs(mean - 1) < high - low for mean, low, high in ratios)                  # within four standard errors
    exact, many, few, _, certain, *_, tight = rows
    return Finding("C17", "DPO recovers the policy that RL with a KL penalty would find.",
                   {"labels have exactly the Bradley-Terry shares": recovered["exact shares"],
                    "labels are many draws from those": lawful,
                    "a response is in no pair": recovered["one response is in no pair"],
                    "the better one always wins": recovered["the better one always wins"]},
                   f"KL(pi || pi*) is {exact['KL(pi || pi*)']:.0e} with exact shares, {few['KL(pi || pi*)']:.2g} with 1,000 "
                   f"drawn pairs and {many['KL(pi || pi*)']:.2g} with 100,000, {ratios[0][0]:.2f} of what theory predicts. If "
                   f"the better one always wins, margins grow like {slope:.2f} log t: KL(pi || ref) reaches "
                   f"{certain['KL(pi || ref)']:.2g} at beta {BETA:g} and {tight['KL(pi || ref)']:.2g} at {4 * BETA:g}, while "
                   f"that of pi* is {certain['KL(pi* || ref)']:.2g} and {tight['KL(pi* || ref)']:.2g}", rows)


def c18(smoke):
    h = torch.linspace(-10, 10, 81).double()
    z, one = leaf(randn(generator(0, "C18"), len(h), V)), torch.ones_like(h)
    w, l = log_softmax(z)[:, :2].T
    loss, _ = objective(w, l, (w - h / BETA).detach(), l.detach(), one, one, one, beta=BETA)
    found, along = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss, (w - l).sum()))         # [h, V] each
    measured = -(found * along).sum(-1) / (BETA * along.square().sum(-1))
    law, derivative = (-h).sigmoid(), h.sigmoid() * (-h).sigmoid()
    off = float((found + BETA * law[:, None] * along).abs().max())
    regions = {"a pair is ranked right by far (h ≥ 5, and to 1 %)": h >= 5, "it is near a tie (|h| < 5)": h.abs() < 5,
               "it is ranked wrong by far (h ≤ -5)": h <= -5}
    rows = [{"h": float(h[i]), "measured": float(measured[i]), "sigma(-h)": float(law[i]), "sigma'(h)": float(derivative[i])}
            for i in range(0, len(h), 10)]
    return Finding("C18", "The gradient of DPO is scaled by the derivative of the sigmoid.",
                   {name: off < 1e-12 and float((measured / derivative - 1)[where].abs().max()) < 0.01
                    for name, where in regions.items()},
                   f"the factor is sigma(-h), to {off:.0e}: {measured[0]:.4f} at h = -10, where the derivative is "
                   f"{derivative[0]:.0e}. A pair that is ranked wrong keeps its full gradient", rows,
                   {"h": h, "measured": measured, "sigma(-h)": law, "sigma'(h)": derivative})


def along_the_pair(phi, h):
    """log pi at the margins h by C19's closed form: response 0 is chosen, 1 rejected.       [.., K, d], [h] -> [.., h, K]"""
    apart = phi[..., 0, :] - phi[..., 1, :]                                                 # [.., d]
    direction = (phi @ apart[..., None]).squeeze(-1) / (BETA * apart.square().sum(-1, keepdim=True))
    return log_softmax(h[:, None] * direction[..., None, :])


def c19(smoke):
    start, one_pair = torch.full((1, 3), 1 / 3).double().log(), torch.zeros(1, 3, 3).double()
    one_pair[:, 0, 1] = 1
    cases = {"every response has its own logit": (torch.eye(3).double(), 0.0),
             "features are shared and --nll-coef is 0": (PHI, 0.0), "features are shared and --nll-coef is 0.1": (PHI, 0.1)}
    rows, held, paths = [], {}, {}
    for name, (phi, nll_coef) in cases.items():
        p = descend(start, lambda step: one_pair, BETA, 20 if smoke else 1200, phi, nll_coef=nll_coef, lr=0.1)[:, 0].exp()
        h = BETA * (p[:, 0].log() - p[:, 1].log())
        # With a pull on the chosen response besides, there is no closed form.
        off = None if nll_coef else float((p - along_the_pair(phi, h).exp()).abs().max())
        held[name] = bool(p[-1, 0] > p[0, 0]) and (off is None or off < 1e-12)
        rows.append({"": name, "margin h": float(h[-1]), "p(chosen)": float(p[-1, 0]), "its lowest": float(p[:, 0].min()),
                     "p(rejected)": float(p[-1, 1]), "p(third)": float(p[-1, 2]), "off the closed form": off})
        paths[name] = p[:301:3].T
    dims, falls, five = (2, 8, 32, 128), [], torch.tensor([5.0]).double()
    for d in dims:
        phi = randn(generator(d, "C19"), 20 if smoke else 2000, 10, d)
        mean, low, high = mean_and_interval(along_the_pair(phi, five)[:, 0, 0] < math.log(1 / 10), shares=True)
        falls.append(f"{mean:.1%} ({low:.1%} to {high:.1%})")
    _, shared, nll = rows
    return Finding("C19", "DPO raises the probability of the chosen response.", held,
                   f"with features shared, p(chosen) goes from 0.33 to {shared['p(chosen)']:.1g} while its margin grows to "
                   f"{shared['margin h']:.2g}; with --nll-coef 0.1 it dips to {nll['its lowest']:.2f} and ends at "
                   f"{nll['p(chosen)']:.2f}. Of ten responses with random features in {', '.join(map(str, dims))} dimensions, "
                   f"the chosen one becomes less likely in {', '.join(falls)}", rows, {"paths": paths})


def c31(smoke):
    seeds, rounds, solve, every = (4, 3, 100, 10) if smoke else (50, 8, 800, 100)
    beta, g = 4 * BETA, generator(0, "C31")
    log_ref, r = log_softmax(randn(g, seeds, V)), randn(g, seeds, V)
    labels = {"Bradley and Terry": shares(r), "the better one wins": shares(r, certain=True)}
    exact = labels["Bradley and Terry"]
    solved = descend(log_ref, lambda step: exact, beta, rounds * solve, refresh=solve)[::solve]             # [rounds + 1, S, V]
    optima = torch.stack([log_ref, *(optimum(log_ref, r, beta / k) for k in range(1, rounds + 1))])
    off, drifts = float(kl_divergence(solved, optima).max()), kl_divergence(solved, log_ref)
    rows, paths, column = [], {}, "KL to the first"
    for label, wins in labels.items():
        for name, refresh in (("no refresh", None), (f"refresh every {every}", every)):
            path = descend(log_ref, lambda step, wins=wins: drawn(wins, 32, g), beta, rounds * every, refresh=refresh, lr=2.0)
            drift = kl_divergence(path, log_ref)                                            # [rounds every + 1, S]
            mean, low, high = mean_and_interval(drift[-1])
            rows.append({"labels": label, "reference": name, column: mean, "low": low, "high": high,
                         "E[r]": float((path[-1].exp() * r).sum(-1).mean())})
            paths[f"{label}, {name}"] = drift[:: every // 10].mean(1)
    fixed, refreshed, certain, certain_refreshed = rows
    return Finding("C31", "Iterative DPO drifts further from where it started.",
                   {"every round is solved": off < 1e-9 and bool((drifts.diff(dim=0) > 0).all()),
                    "pairs are drawn, at equal steps": refreshed["low"] > fixed["high"],
                    "the better one always wins": certain_refreshed["low"] > certain["high"]},
                   f"{rounds} rounds, each solved exactly, end at the optimum for beta / {rounds}, to {off:.0e}: "
                   f"{drifts[-1].mean():.2f} nats from the first reference, {drifts[1].mean():.2f} after one round. "
                   f"{rounds * every} steps on drawn pairs reach {refreshed[column]:.2f} ({refreshed['low']:.2f} to "
                   f"{refreshed['high']:.2f}) with refreshes and {fixed[column]:.2f} ({fixed['low']:.2f} to "
                   f"{fixed['high']:.2f}) without", rows,
                   {"every": every, "exact": drifts.mean(1), "paths": paths})


def draw(findings, path):
    figure, axes = panels(3)

    curves = findings["C18"].curves
    axes[0].plot(curves["h"], curves["sigma(-h)"], color=PALETTE[0], label="σ(-h)")
    axes[0].plot(curves["h"], curves["sigma'(h)"], color=PALETTE[1], linestyle="--", label="σ'(h)")
    axes[0].plot(curves["h"][::4], curves["measured"][::4], color="0.2", marker="o", markersize=4, linestyle="",
                 label="measured")
    axes[0].set(title="what scales a pair's gradient", xlabel="margin h", ylabel="factor", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8)

    own, shared, nll = findings["C19"].curves["paths"].values()
    steps = [3 * i for i in range(len(shared[0]))]
    for p, colour, label in zip(shared, PALETTE, ("chosen", "rejected", "third"), strict=False):
        axes[1].plot(steps, p, color=colour, label=label)
    axes[1].plot(steps, nll[0], color=PALETTE[0], linestyle="--", label="chosen, --nll-coef 0.1")
    axes[1].plot(steps, own[0], color=PALETTE[0], linestyle=":", label="chosen, its own logit")
    axes[1].set(title="responses that share features", xlabel="step", ylabel="probability", ylim=(0, 1))
    axes[1].legend(frameon=False, fontsize=8)

    curves = findings["C31"].curves
    looks = ((PALETTE[0], "-"), (PALETTE[1], "-"), (PALETTE[0], "--"), (PALETTE[1], "--"))
    for (name, drift), (colour, style) in zip(curves["paths"].items(), looks, strict=True):
        steps = [curves["every"] / 10 * i for i in range(len(drift))]
        axes[2].plot(steps, drift, color=colour, linestyle=style, label=name)
    steps = [curves["every"] * k for k in range(len(curves["exact"]))]
    axes[2].plot(steps, curves["exact"], color="0.2", marker="o", markersize=4, linestyle="", label="optimum for beta / k")
    axes[2].set(title="how far from the first reference", xlabel="step", ylabel="KL to it, nats", ylim=(0, 4.4))
    axes[2].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


CLAIMS = (c16, c17, c18, c19, c31)

if __name__ == "__main__":
    main(sys.modules[__name__])
