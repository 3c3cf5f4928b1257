"""Exploration: an asymmetric clip, the collapse of entropy, and learning after it.

C7   An asymmetric clip, 1 - .2 to 1 + .28, keeps a policy exploring: rare good answers may grow faster.

         J = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)

C8   Optimising reward collapses the entropy: of ten equally right answers, one is left (fewer than two by the effective number,
     e^H of the policy among them). With an entropy bonus, the optimal policy gives all of them the same probability:

         argmax_pi E[r] + c H(pi) = e^{r / c} / Z

C9   A policy that has collapsed can no longer learn. With two answers and steps along the gradient of E[r], the right one rises
     from probability p to one half in as many steps as it took to fall to p:

         steps = f(L) / lr,      f(L) = L + sinh L,      L = log((1 - p) / p);      and to .9 in (f(L) + f(log 9)) / lr

     For small p that is 1 / (2 p lr). The claim counts as true where the steps grow like a power of 1/p (a tenth of p costs
     more than sqrt(10) times as many), and not where they grow like log(1/p).

C7 and C8 are bandits of 30 answers, C9 one of two, with rewards that are certain and plain gradient steps unless it says Adam.

Change `HIGH = 0.28` to `HIGH = 0.2`: C7 is refuted.
"""

import functools
import math
import sys

import torch

import train_grpo
from experiments.clipping import improve
from experiments.findings import Finding, main, mean_and_interval, panels, save
from nanorl.ops import center, entropy_from_logits, leave_one_out, log_softmax, zscore
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.tabular import leaf, randn

V = 30                  # answers
HIGH = 0.28             # DAPO's eps_high, beside an eps_low of .2
BONUS = 0.1             # c, the weight of the entropy
N = 16                  # answers to a batch in C8 and C9, and of distinct@N and pass@N
PLAIN = 0.5             # learning rate of the plain steps of C9


def draw_answers(z, count, g):
    return torch.multinomial(log_softmax(z).exp(), count, replacement=True, generator=g)    # [S, V] -> [S, count]


def effective(z):
    """e^H of the policy among some of the answers, here the right ones.       [..., answers] -> [...]"""
    return entropy_from_logits(z).exp()


def explore(pi, r, advantage, updates, high, iterations, seeds):
    """The logits after each iteration on 64 answers.       [V], [V] -> [iterations, S, V]"""
    g, z, path = generator(0, "C7"), pi.log().repeat(seeds, 1), []
    for _ in range(iterations):
        a = draw_answers(z, 64, g)                                                          # [S, 64]
        z = improve(z, a, advantage(r[a]), updates, 3.0, bound="clip", clip_low=0.2, clip_high=high)
        path.append(z)
    return torch.stack(path)


def c7(smoke):
    seeds, iterations = (4, 5) if smoke else (400, 100)
    rare, many = torch.full((V,), 0.1 / (V - 1)).double(), torch.full((V,), 1 / V).double()
    few_right, many_right = torch.zeros(2, V).double()
    rare[0], few_right[0], few_right[1:6], many_right[:10] = 0.9, 0.5, 1.0, 1.0
    cases = {"rare": (rare, few_right, center, 16), "rare, one update": (rare, few_right, center, 1),
             "rare, z-scores": (rare, few_right, zscore, 16), "many": (many, many_right, center, 16)}
    rows, found, entropy, curves = [], {}, {}, {case: {} for case in cases}
    for case, (pi, r, advantage, updates) in cases.items():
        for high in (0.2, HIGH, 0.5):
            path = explore(pi, r, advantage, updates, high, iterations, seeds)
            learned = (log_softmax(path).exp() @ r > 0.9).double()                          # [iterations, S]
            left = effective(path[..., r == 1])
            found[case, high] = share, lowest, highest = mean_and_interval(learned[-1], shares=True)
            entropy[case, high] = mean_and_interval(entropy_from_logits(path).mean(0))
            rows.append({"right answers": case, "eps_high": high, "runs with reward > .9": share, "low": lowest,
                         "high": highest, "entropy on the way": entropy[case, high][0],
                         "effective right answers": float(left[-1].mean())})
            curves[case][f"{high:g}"] = (left / 10 if case == "many" else learned).mean(1)

    def gains(measured, case):
        return measured[case, HIGH][1] > measured[case, 0.2][2]

    shares = {case: f"{found[case, 0.2][0]:.0%} and {found[case, HIGH][0]:.0%}" for case in cases}
    return Finding("C7", "An asymmetric clip keeps a policy exploring.",
                   {"right answers are rare, judged by the runs that find them": gains(found, "rare"),
                    "right answers are rare, judged by entropy": gains(entropy, "rare"),
                    "advantages are z-scores, judged by the runs that find them": gains(found, "rare, z-scores"),
                    "there is one update per batch": gains(found, "rare, one update") or gains(entropy, "rare, one update"),
                    "many answers are right, judged by entropy": gains(entropy, "many")},
                   f"with eps_high .2 and {HIGH:g}, {shares['rare']} of {seeds} runs find five rare answers that pay more "
                   "than the usual one. Where ten answers are right and none is rare, the entropy during training is "
                   f"{entropy['many', 0.2][0]:.2f} and {entropy['many', HIGH][0]:.2f} nats: the higher clip lets the answers "
                   "drawn first grow faster. With z-scores, which make longer steps, the clip matters less: "
                   f"{shares['rare, z-scores']}", rows,
                   {"found": curves["rare"], "left": curves["many"]})


def slope(z, r, c):
    """d/dz of E[r] + c H, of every policy.       [S, V], [V] -> [S, V]"""
    z = leaf(z)
    return torch.autograd.grad((log_softmax(z).exp() @ r + c * entropy_from_logits(z)).sum(), z)[0]


def c8(smoke):
    seeds, steps = (4, 20) if smoke else (100, 2000)
    r, every = (torch.arange(V) < 10).double(), max(1, steps // 100)
    even, uneven = torch.zeros(seeds, V).double(), randn(generator(0, "C8", "start"), seeds, V)
    rows, held, curves, gap = [], {}, {}, float(slope(r[None] / BONUS, r, BONUS).abs().max())
    for case, short, z, c, sampled in (
            ("the policy learns from samples", "samples", even, 0.0, True),
            ("some answers are likelier at first", "exact, uneven start", uneven, 0.0, False),
            ("the gradient is exact and all answers are alike at first", "exact, even start", even, 0.0, False),
            (f"there is an entropy bonus of {BONUS:g}", f"samples, bonus {BONUS:g}", even, BONUS, True)):
        g, curves[short] = generator(0, "C8", "samples"), []
        for step in range(steps):
            if step % every == 0:
                curves[short].append(float(effective(z[:, r == 1]).mean()))
            if sampled:
                a = draw_answers(z, N, g)
                z = improve(z, a, center(r[a]), 1, 1.0, entropy_coef=c)
            else:
                z = z + slope(z, r, c)
        pi, (mean, low, high) = log_softmax(z).exp(), mean_and_interval(effective(z[:, r == 1]))
        rows.append({"": short, "reward": float((pi @ r).mean()), "entropy": float(entropy_from_logits(z).mean()),
                     "effective right answers": mean, "low": low, "high": high,
                     f"distinct@{N}": float((1 - (1 - pi)**N)[:, r == 1].sum(-1).mean()),
                     f"pass@{N}": float((1 - (1 - pi @ r)**N).mean())})
        held[case] = high < 2 and gap < 1e-12

    def left(row):
        return f"{row['effective right answers']:.2f}"

    sampled, uneven, exact, bonus = rows
    return Finding("C8", "Optimising reward collapses the entropy: of ten right answers, one is left.", held,
                   f"{seeds} seeds, {steps:,} steps: the effective number of right answers left is {left(sampled)} when "
                   f"learning from samples and {left(bonus)} with the bonus, whose optimum is the closed form (gradient "
                   f"{gap:.0e} there). With the exact gradient it is {left(exact)} from a uniform start, with a reward of "
                   f"{exact['reward']:.3f} and an entropy of {exact['entropy']:.2f} nats, and {left(uneven)} from a "
                   f"non-uniform one. distinct@{N} shows the collapse, {sampled[f'distinct@{N}']:.1f} from samples instead of "
                   f"{exact[f'distinct@{N}']:.1f}; pass@{N} does not, with {sampled[f'pass@{N}']:.2f} throughout", rows,
                   {"every": every, "effective": curves})


STEPS = {"plain steps follow": functools.partial(torch.optim.SGD, lr=PLAIN),
         "Adam follows": functools.partial(torch.optim.Adam, lr=0.1)}


def recover(p, optimizer, sampled, seeds):
    """Steps until the second of two answers, which alone is right, has probability .9.       p [n] -> [n, seeds]"""
    r, g = torch.tensor([0.0, 1.0]).double(), generator(0, "C9")
    z = leaf(torch.stack(((1 - p).log(), p.log()), -1).repeat_interleave(seeds, 0))         # [n seeds, 2]
    descend, steps, arrived = optimizer([z]), torch.zeros(len(z)).double(), torch.zeros(len(z), dtype=torch.bool)
    while True:
        log_pi = log_softmax(z)
        arrived |= log_pi[:, 1].detach().exp() >= 0.9
        if arrived.all():
            return steps.view(len(p), seeds)
        steps += ~arrived
        if sampled:
            a = draw_answers(z.detach(), N, g)
            logp, mask = log_pi.gather(-1, a), torch.ones_like(a, dtype=torch.bool)
            loss, _ = train_grpo.objective(logp, logp.detach(), leave_one_out(r[a]), mask, mask.double() / N)
        else:
            loss = -(log_pi.exp() @ r).sum()
        descend.zero_grad()
        loss.backward()
        descend.step()


def c9(smoke):
    seeds, p = (3, [0.5, 0.1, 0.01]) if smoke else (50, [0.5, 0.1, 0.01, 1e-3, 1e-4])
    p = torch.tensor(p).double()
    entropy, L = entropy_from_logits(torch.stack(((1 - p).log(), p.log()), -1)), ((1 - p) / p).log()
    closed = (L + L.sinh() + math.log(9) + math.sinh(math.log(9))) / PLAIN
    rows, steps, factors = [], {}, {}
    for name, optimizer in STEPS.items():
        for source in ("the exact gradient", "samples"):
            case, sampled = f"{name} {source}", source == "samples"
            found = recover(p, optimizer, sampled, seeds if sampled else 1)
            steps[case] = found.mean(1)
            factors[case] = float(steps[case][-1] / steps[case][-2])
            for i, (mean, low, high) in enumerate(map(mean_and_interval, found)):
                rows.append({"": case, "p": float(p[i]), "entropy": float(entropy[i]), "steps to .9": mean, "low": low,
                             "high": high, "closed form": float(closed[i]) if len(steps) == 1 else None})
    plain, _, adam, drawn = factors
    gap = float((steps[plain] / closed - 1).abs().max())
    return Finding("C9", "A policy that has collapsed can no longer learn.",
                   {case: factor > 10**0.5 and gap < 0.03 for case, factor in factors.items()},
                   f"when p falls to a tenth, from an entropy of {entropy[-2]:.2g} to {entropy[-1]:.2g} nats, plain steps "
                   f"along the exact gradient become {factors[plain]:.1f} times as many, {steps[plain][-2]:,.0f} to "
                   f"{steps[plain][-1]:,.0f} (closed form, to {gap:.1%}), and Adam's go from {steps[adam][-2]:.0f} to "
                   f"{steps[adam][-1]:.0f}. From samples, Adam has to draw the right answer first: {factors[drawn]:.1f} times "
                   "as many", rows,
                   {"entropy": entropy, "steps": steps, "closed": closed})


def draw(findings, path):
    figure, axes = panels(3)

    curves = findings["C7"].curves
    for (high, found), colour in zip(curves["found"].items(), PALETTE, strict=False):
        axes[0].plot(found, color=colour, label=f"eps_high = {high}")
        axes[0].plot(curves["left"][high], "--", color=colour)
    axes[0].plot([], "-", color="0.4", label="rare: runs that find them")
    axes[0].plot([], "--", color="0.4", label="many: right answers left, of ten")
    axes[0].set(title="rare or many right answers", xlabel="iteration", ylabel="share", ylim=(0, 1.5),
                yticks=[0, 0.25, 0.5, 0.75, 1])
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")

    curves = findings["C8"].curves
    for (case, left), colour in zip(curves["effective"].items(), PALETTE, strict=False):
        axes[1].plot([curves["every"] * i for i in range(len(left))], left, color=colour, label=case)
    axes[1].set(title="ten equally right answers", xlabel="step", ylabel="effective number that is left", ylim=(0, 10.5))
    axes[1].legend(frameon=False, fontsize=8)

    curves = findings["C9"].curves
    for (case, steps), colour in zip(curves["steps"].items(), PALETTE, strict=False):
        axes[2].plot(curves["entropy"], steps, color=colour, marker="o", markersize=3, label=case)
    axes[2].plot(curves["entropy"], curves["closed"], ":", color="black", label="closed form")
    axes[2].set(xscale="log", yscale="log", title="learning after a collapse", xlabel="entropy at the switch, nats",
                ylabel="steps until the right answer has .9")
    axes[2].legend(frameon=False, fontsize=8)
    save(figure, path)


CLAIMS = (c7, c8, c9)

if __name__ == "__main__":
    main(sys.modules[__name__])
