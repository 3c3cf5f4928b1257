"""What old data costs.

C30  On-policy data are better than stale data. Take samples a of an older policy, A = r - E_old[r] and rho = pi(a) / pi_old(a):

         E_old[rho A grad log pi] = grad E_pi[r]               the ratio makes up for age, if nothing bounds it
         E_old[A grad log pi] = grad E_old[r] at pi_old        without it, this is the gradient of some updates ago

     A bound gives some of that up for less variance: `clip` has no gradient where rho has left [.8, 1.2] in A's favour, `mask`
     none outside [1/8, 8], and `truncate` takes rho for 5 where it is larger.

First a softmax over ten answers, one of which is worth 1 and the others up to .6: how many updates until the expected reward is
.95, if each is made with samples that are some updates old? Those before the first one are not counted. Then the default model,
with train_grpo.py --stale 8: how often is it right after 15 to 20 updates? Stale data count as worse where that is by more than
5 %, with the whole confidence interval.

Change `queue.pop(0)` to `queue.pop()`: C30 holds only when a GPT of 8 updates behind learns.
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
from nanorl.checks import leaf, randn
from nanorl.ops import center, log_softmax
from nanorl.plot import PALETTE, read_metrics
from nanorl.run import generator
from nanorl.tabular import reward_gradient

V, SAMPLES, TARGET, MARGIN = 10, 64, 0.95, 0.05
BOUNDS = {"no ratio": {"ratio": "none", "bound": "none"}, "ratio": {"bound": "none"}, "truncate": {"bound": "truncate"},
          "mask": {"bound": "mask"}, "clip": {"bound": "clip"}}
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
          mock.patch.object(train_grpo, "read_text", return_value="No story.")):            # that it is evaluated on, too
        cfg = train_grpo.Config(out=f"{folder}/run", init=init, seed=seed, lr=lr, stale=lag, steps=updates + lag, prompts=8,
                                eval_every=1000, eval_problems=1, selfcheck=False, quiet=True, device="cpu", **flags, **tiny)
        train_grpo.main(cfg)
        lines = read_metrics(Path(cfg.out))
    rewards = [line["rollout/reward"] for line in lines if "rollout/reward" in line]
    held = [sum(line.get(name, 0.0) for name in HELD) for line in lines if "train/ratio_max" in line]
    return rewards[lag:], sum(held) / len(held)


def grouped(says, worse):
    """One condition for all bounds of the same outcome.       worse: bound -> bool"""
    return {says.format(", ".join(name for name in worse if worse[name] == outcome)): outcome
            for outcome in (True, False) if outcome in worse.values()}


def c30(smoke):
    seeds, most, gpt_seeds, updates, last, age = (4, 5, 2, 2, 1, 1) if smoke else (200, 2000, 6, 20, 5, 8)
    rows, held, gap = [], {}, exact_gap()
    fresh = updates_to_target(0, BOUNDS["ratio"], seeds, most)[0].mean()
    for lag in (0, 2, 8, 32):
        worse = {}
        for name, flags in BOUNDS.items():
            taken, share = updates_to_target(lag, flags, seeds, most)
            mean, low, high = mean_and_interval(taken)
            rows.append({"learner": "table", "bound": name, "lag": lag, "updates to .95": mean, "reward at the end": None,
                         "low": low, "high": high, "held back": share})
            worse[name] = gap < 1e-12 and low > (1 + MARGIN) * fresh
        if lag > 2:
            held |= grouped(f"a table learns {lag} updates behind with {{}}", worse)

    init, curves = stage("sft", smoke), {}
    tiny = {"max_new_tokens": 8, "group": 2} if smoke else {}
    for lr in (1e-3,) if smoke else (3e-4, 1e-3):
        worse, paths = {}, {}
        for name, lag in (("on-policy", 0), ("no ratio", age), ("ratio", age), ("clip", age)):
            runs = [practise(init, lr, BOUNDS.get(name, {}), lag, seed, updates, **tiny) for seed in range(gpt_seeds)]
            paths[name] = torch.tensor([rewards for rewards, _ in runs])                    # [seeds, updates]
            mean, low, high = mean_and_interval(paths[name][:, -last:].mean(-1))
            rows.append({"learner": f"GPT, {lr:g}", "bound": name, "lag": lag, "updates to .95": None,
                         "reward at the end": mean, "low": low, "high": high,
                         "held back": sum(share for _, share in runs) / gpt_seeds})
            if lag:
                worse[name] = high < (1 - MARGIN) * float(paths["on-policy"][:, -last:].mean())
        held |= grouped(f"a GPT learns {age} behind at a rate of {lr:g} with {{}}", worse)
        curves[f"{lr:g}"] = {name: path.mean(0) for name, path in paths.items()}
    table = {(row["bound"], row["lag"]): row["updates to .95"] for row in rows if row["learner"] == "table"}
    ends = "; at ".join(f"{lr} " + ", ".join(f"{float(path[-last:].mean()):.2f} {name}" for name, path in paths.items())
                        for lr, paths in curves.items())
    return Finding("C30", "On-policy data are better than stale data.", held,
                   f"a table takes {fresh:.0f} updates with fresh samples; with some that are 32 updates old, "
                   f"{table['ratio', 32]:.0f} with the ratio, {table['no ratio', 32]:.0f} without it, {table['mask', 32]:.0f} "
                   f"with a mask and {table['clip', 32]:.0f} with a clip, and with 8 updates old ones {table['ratio', 8]:.0f}, "
                   f"{table['no ratio', 8]:.0f}, {table['mask', 8]:.0f} and {table['clip', 8]:.0f} ({seeds} seeds). The reward "
                   f"of a GPT ends, at a rate of {ends} ({gpt_seeds} seeds)", rows, curves)


def draw(findings, path):
    figure, axes = panels(4, width=3.8)
    rows, curves = findings["C30"].rows, findings["C30"].curves

    for (name, style), colour in zip(zip(BOUNDS, ("-", "--", "-", "--", "-"), strict=True), PALETTE, strict=False):
        mine = [row for row in rows if row["learner"] == "table" and row["bound"] == name]
        lags = [row["lag"] for row in mine]
        axes[0].plot(lags, [row["updates to .95"] for row in mine], style, color=colour, marker="o", markersize=4, label=name)
        if name in ("truncate", "mask", "clip"):
            axes[1].plot(lags, [row["held back"] for row in mine], style, color=colour, marker="o", markersize=4, label=name)
    axes[0].set(yscale="log", title=f"a table learns, to reward {TARGET}", ylabel="updates")
    axes[1].set(title="held back by the bound", ylabel="share of the samples", ylim=(0, None))
    for axis in axes[:2]:
        axis.set_xscale("symlog", linthresh=2)
        axis.set_xticks([0, 2, 8, 32], ["0", "2", "8", "32"])
        axis.set_xlabel("age of the samples, updates")
        axis.legend(frameon=False, fontsize=8)

    colours = {"on-policy": "0.5", **dict(zip(BOUNDS, PALETTE, strict=False))}
    for axis, (lr, paths) in zip(axes[2:], curves.items(), strict=False):
        for name, mean in paths.items():
            axis.plot(mean, color=colours[name], label=name if name == "on-policy" else f"8 updates old, {name}")
        axis.set(title=f"a GPT, learning rate {lr}", xlabel="updates", ylabel="reward", ylim=(0, 1.02))
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)


CLAIMS = (c30,)

if __name__ == "__main__":
    main(sys.modules[__name__])
