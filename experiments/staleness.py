"""What stale data cost.

C30  On-policy data are better than stale data. Take samples a of an older policy, A = r - E_old[r] and rho = pi(a) / pi_old(a):

         E_old[rho A grad log pi] = grad E_pi[r]               the ratio corrects for age, if nothing bounds it
         E_old[A grad log pi] = grad E_old[r] at pi_old        without it, this is the gradient at the older policy

     A bound gives some of that up for less variance: `clip` has no gradient where rho has left [.8, 1.2] in A's favour, `mask`
     none outside [1/8, 8], and `truncate` replaces a larger rho by 5.

First a softmax over ten answers, one of which is worth 1 and the others up to .6: how many updates does it take until the
expected reward is .95, if each uses samples that are some updates old? The steps before the first update are not counted. Then
the default model, with train_grpo.py --stale 8: how often is it right after 15 to 20 updates? Fresh data are better if the
whole confidence interval over seeds of what stale data cost is above 5 % of the updates, or of the answers, and not better if
all of it is below. If it contains 5 %, the case is left out.

Change `AGES = (8, 32)` to `AGES = (0, 0)`: C30 is refuted.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import train_grpo
from experiments.findings import Finding, main, mean_and_interval, panels, save, stage
from nanorl import heldout
from nanorl.family import BANDS
from nanorl.ops import center, log_softmax
from nanorl.read_log import read_metrics
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.tabular import leaf, randn, reward_gradient

AGES = (8, 32)          # of the samples, in updates; those of the GPT have the first
V, SAMPLES, TARGET, MARGIN = 10, 64, 0.95, 0.05
BOUNDS = {"no ratio": {"ratio": "none", "bound": "none"}, "ratio": {"bound": "none"},
          **{bound: {"bound": bound} | {flag: edge for flag, edge in zip(("clip_low", "clip_high"), BANDS[bound], strict=True)
                                        if edge is not None} for bound in ("truncate", "mask", "clip")}}
HELD = ("train/clipped_low", "train/clipped_high", "train/capped", "train/masked")


def gradient(z, actions, old_logp, adv, weights, flags):
    """Of train_grpo.py's objective, which is maximised, in the logits of all tables; and what its bound held back.

    z [S, V]; actions, old_logp, adv, weights [S, N] -> [S, V], the share of the samples
    """
    z, mask = leaf(z), torch.ones(actions.numel(), 1, dtype=torch.bool)
    logp = log_softmax(z).gather(-1, actions)
    logp, old_logp, adv, weights = (x.reshape(-1, 1) for x in (logp, old_logp, adv, weights))
    loss, metrics = train_grpo.objective(logp, old_logp, adv, mask, weights, **flags)
    return -torch.autograd.grad(loss, z)[0], sum(float(metrics.get(name, 0.0)) for name in HELD) / actions.numel()


def updates_to_target(lag, flags, seeds, most, lr=1.0):
    """How many updates each table takes, and the share of the samples that the bound holds back.       -> [seeds], float"""
    g = generator(0, "C30")
    r = 0.6 * torch.rand(seeds, V, generator=g, dtype=torch.float64)
    r[:, -1] = 1
    z, taken, queue, held = torch.zeros_like(r), torch.full((seeds,), float(most)), [], []
    weights = torch.full((seeds, SAMPLES), 1 / SAMPLES, dtype=torch.float64)
    while len(held) < most and (taken == most).any():
        logp = log_softmax(z)
        actions = torch.multinomial(logp.exp(), SAMPLES, replacement=True, generator=g)
        queue.append((actions, logp.gather(-1, actions), center(r.gather(-1, actions))))
        if len(queue) > lag:
            step, share = gradient(z, *queue.pop(0), weights, flags)
            z = z + lr * step
            held.append(share)
            taken[((log_softmax(z).exp() * r).sum(-1) >= TARGET) & (taken == most)] = len(held)
    return taken, sum(held) / len(held)


def exact_gap():
    """How far the two expected gradients are from what the docstring says they are, summing over all answers."""
    worst, actions = 0.0, torch.arange(V)[None]
    for seed in range(20):
        g = generator(seed, "C30", "exact")
        z, old, r = randn(g, 1, V), randn(g, 1, V), torch.rand(V, generator=g, dtype=torch.float64)
        old_logp = log_softmax(old)
        adv = r[None] - old_logp.exp() @ r
        for name, policy in (("ratio", z), ("no ratio", old)):
            found, _ = gradient(z, actions, old_logp, adv, old_logp.exp(), BOUNDS[name])
            worst = max(worst, float((found - reward_gradient(policy, r)).abs().max()))
    return worst


def practise(init, lr, flags, lag, seed, updates, **tiny):
    """The share of right answers before each update of a GPT, and the mean share of tokens that the bound holds back."""
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
          mock.patch.object(heldout, "read_text", return_value="No story.")):            # that it is evaluated on, too
        cfg = train_grpo.Config(out=f"{folder}/run", init=init, seed=seed, lr=lr, stale=lag, steps=updates + lag, prompts=8,
                                eval_every=1000, eval_problems=1, selfcheck=False, quiet=True, device="cpu", **flags, **tiny)
        train_grpo.main(cfg)
        lines = read_metrics(Path(cfg.out))
    rewards = [line["rollout/reward"] for line in lines if "rollout/reward" in line]
    held = [sum(line.get(name, 0.0) for name in HELD) for line in lines if "train/ratio_max" in line]
    return rewards[lag:], sum(held) / len(held)


def decided(says, costs):
    """A condition for all bounds that surely cost more than MARGIN, and one for those that surely do not.

    costs: bound -> the share of the updates, or of the answers, for each seed.       [seeds]
    """
    intervals = {name: mean_and_interval(cost)[1:] for name, cost in costs.items()}
    groups = {True: [name for name, (low, _) in intervals.items() if low > MARGIN],
              False: [name for name, (_, high) in intervals.items() if high <= MARGIN]}
    return {says.format(", ".join(names)): outcome for outcome, names in groups.items() if names}


def c30(smoke):
    seeds, most, gpt_seeds, updates, last = (4, 5, 2, 2, 1) if smoke else (200, 2000, 6, 20, 5)
    rows, held, gap = [], {}, exact_gap()

    def measured(learner, bound, lag, value, cost, share):
        mean, low, high = mean_and_interval(cost)
        rows.append({"learner": learner, "bound": bound, "lag": lag, "updates to .95": value if learner == "table" else None,
                     "reward at the end": None if learner == "table" else value, "cost of age": mean, "low": low, "high": high,
                     "held back": share})

    fresh, _ = updates_to_target(0, BOUNDS["ratio"], seeds, most)
    for lag in (0, 2, *AGES):
        costs = {}
        for name, flags in BOUNDS.items():
            taken, share = updates_to_target(lag, flags, seeds, most)
            costs[name] = taken / fresh - 1
            measured("table", name, lag, float(taken.mean()), costs[name], share)
        if lag in AGES:
            held |= decided(f"a table learns from samples {lag} updates old with {{}}", costs)
    held = {name: outcome and gap < 1e-12 for name, outcome in held.items()}

    init, curves, age = stage("sft", smoke), {}, 1 if smoke else AGES[0]
    tiny = {"max_new_tokens": 8, "group": 2} if smoke else {}
    for lr in (3e-4, 1e-3):
        paths, costs = {}, {}
        for name, lag in (("on-policy", 0), ("no ratio", age), ("ratio", age), ("clip", age)):
            runs = [practise(init, lr, BOUNDS.get(name, {}), lag, seed, updates, **tiny) for seed in range(gpt_seeds)]
            paths[name] = torch.tensor([rewards for rewards, _ in runs])                    # [seeds, updates]
            ends = paths[name][:, -last:].mean(-1)
            costs[name] = paths["on-policy"][:, -last:].mean(-1) - ends
            measured(f"GPT, {lr:g}", name, lag, float(ends.mean()), costs[name], sum(share for _, share in runs) / gpt_seeds)
        del costs["on-policy"]
        held |= decided(f"a GPT learns from samples {age} updates old at a learning rate of {lr:g} with {{}}", costs)
        curves[f"{lr:g}"] = {name: path.mean(0) for name, path in paths.items()}

    table = {lag: ", ".join(f"{row['updates to .95']:.0f} with {row['bound']}" for row in rows
                            if (row["learner"], row["lag"]) == ("table", lag)) for lag in AGES}
    gpt = {lr: ", ".join(f"{float(path[-last:].mean()):.2f} {'' if name == 'on-policy' else 'with '}{name}"
                         for name, path in paths.items()) for lr, paths in curves.items()}
    return Finding("C30", "On-policy data are better than stale data.", held,
                   f"a table takes {float(fresh.mean()):.0f} updates with fresh samples; "
                   + "; ".join(f"with samples {lag} updates old, {numbers}" for lag, numbers in table.items())
                   + f" ({seeds} seeds). A GPT that learns from samples {age} updates old ends at a reward of "
                   + "; ".join(f"{numbers} at a learning rate of {lr}" for lr, numbers in gpt.items())
                   + f" ({gpt_seeds} seeds)", rows, curves)


def draw(findings, path):
    figure, axes = panels(3)
    rows, curves = findings["C30"].rows, findings["C30"].curves

    colours = {"on-policy": "0.5", **dict(zip(BOUNDS, PALETTE, strict=False))}
    for name, style in zip(BOUNDS, ("-", "--", "-", "--", "-"), strict=True):
        mine = [row for row in rows if (row["learner"], row["bound"]) == ("table", name)]
        axes[0].plot([row["lag"] for row in mine], [row["updates to .95"] for row in mine], style, color=colours[name],
                     marker="o", markersize=4, label=name)
    axes[0].set_xscale("symlog", linthresh=2)
    axes[0].set_xticks([0, 2, *AGES], ["0", "2", *map(str, AGES)])
    axes[0].set(yscale="log", title="a table learns", xlabel="age of the samples, updates",
                ylabel=f"updates to a reward of {TARGET}")
    axes[0].set_yticks([50, 100, 200, 300], ["50", "100", "200", "300"])
    axes[0].minorticks_off()

    for axis, (lr, paths) in zip(axes[1:], curves.items(), strict=True):
        for name, mean in paths.items():
            axis.plot(mean, color=colours[name], label=name if name == "on-policy" else f"{AGES[0]} updates old, {name}")
        axis.set(title=f"a GPT learns, learning rate {lr}", xlabel="updates", ylabel="share of right answers", ylim=(0, 1.02))
    for axis, place in zip(axes, ("upper left", "lower right"), strict=False):
        axis.legend(frameon=False, fontsize=8, loc=place)
    save(figure, path)


CLAIMS = (c30,)

if __name__ == "__main__":
    main(sys.modules[__name__])
