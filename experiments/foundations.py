"""What attention and the loss are built on: the scale, the logarithm, positions.

C32  Dividing attention's scores by sqrt(d) preserves gradients. For q and k of independent coordinates of variance 1, Var(q.k)
     = d; with scores s = c q.k, c = 1 / sqrt(d) or 1, and weights w = softmax(s),

         dw_i/ds_i = w_i (1 - w_i),        dL/dq = c sum_i dL/ds_i k_i

     Without the division, a large d makes the slope small. But dL/dq also has the factor c, which is then larger.

C37  A log-probability teaches where a probability stalls. With one logit z and p = sigma(z), the gradients of -log p and 1 - p
     are -(1 - p) and -p (1 - p), and dz/dt = 1 - p or p (1 - p) gets from z0 to z1 in the time T(z1) - T(z0),

         T(z) = z + e^z  or  2z + e^z - e^-z:        it grows like log 1/p0 or like 1/p0 for a small p0

C38  Without positions there is no word order. Attention that sees everything commutes with any permutation P of the tokens,
     f(Px) = P f(x). Causal attention does not, because each token sees a prefix. A model that cannot tell "A bites B."
     from "B bites A." is right about who bites in at most half of them.

C32 is about random vectors, a random dL/dw, and a GPT that learns to write text byte by byte; C37 about one logit, against its
closed form, and a linear classifier; C38 about small GPTs, fresh ones and those that are trained to say who bites.

Change `q * math.sqrt(q.shape[-1])` to `q * 1.0`: C32 is refuted.
"""

import functools
import math
import sys
from itertools import permutations
from unittest import mock

import torch

from experiments.findings import Finding, main, mean_and_interval, panels, save
from nanorl import gpt
from nanorl.data import DATA, random_windows, split_text
from nanorl.files import read_text
from nanorl.gpt import GPT, GPTConfig, attention
from nanorl.heldout import total_loss
from nanorl.ops import entropy_from_logits, log_softmax, selective_log_softmax, token_weights
from nanorl.plot import PALETTE
from nanorl.run import Optimizers, generator, schedule
from nanorl.sample import token_log_probs
from nanorl.tabular import leaf, randn
from train_pretrain import objective

KEYS = 32                       # keys that a query looks at
TARGET = 0.9                    # the probability of the right answer at which it counts as learned
NOUNS, BITES, STOP = 8, 8, 9    # tokens 0 to 7 are nouns
SIGNALS = {"-log p": lambda logp: -logp, "1 - p": lambda logp: 1 - logp.exp()}
TIMES = {"-log p": lambda z: z + math.exp(z), "1 - p": lambda z: 2 * z + math.exp(z) - math.exp(-z)}


def unscaled(q, k, v, mask=None):
    """softmax(Q K^T) V: what `attention` divides by is multiplied back.       q [B, H, T, D] -> [B, H, T, D]"""
    return attention(q * math.sqrt(q.shape[-1]), k, v, mask)


def everything(q, k, v, mask=None):
    """Attention that sees what comes later, too."""
    return attention(q, k, v, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool))


def look(attend, q, k):
    """Of each query: the entropy of its weights, their mean slope, and its gradient's size for a random dL/dw.

    q [N, 1, 1, d], k [N, 1, KEYS, d] -> [N] each
    """
    q, values = leaf(q), torch.eye(KEYS, dtype=q.dtype).expand(len(q), 1, KEYS, KEYS)      # with V = I, the output is w
    w = attend(q, k, values, torch.ones(1, KEYS, dtype=torch.bool))                         # [N, 1, 1, KEYS]
    push = randn(generator(0, "C32", "push"), *w.shape)
    grad, w = torch.autograd.grad((w * push).sum(), q)[0], w.detach().flatten(1)
    return {"entropy": entropy_from_logits(w.log()), "slope": (w * (1 - w)).mean(-1), "gradient": grad.norm(dim=-1).flatten()}


@functools.cache
def text_bytes():
    """What to train on, and what is held out, a token for each byte."""
    parts = split_text(read_text(DATA / "text.txt"))
    return [torch.frombuffer(bytearray(part, "utf-8"), dtype=torch.uint8).long() for part in parts]


def text_loss(attend, heads, seed, steps, rows=16, width=64, lr=1e-2):
    """Nats per byte of held-out text after `steps` steps of pretraining, and |dL/dW_q| of both layers at the first one."""
    train, heldout = text_bytes()
    model = GPT(GPTConfig(256, context=width, layers=2, width=64, heads=heads), generator(seed, "init"))
    optimizer, mask = Optimizers(model, "adamw", lr), torch.ones(rows, width - 1, dtype=torch.bool)
    weights, first = token_weights(mask, torch.arange(rows), "token_mean"), 0.0
    with mock.patch.object(gpt, "fused_attention", attend):
        for step in range(steps):
            logp, _ = token_log_probs(model, random_windows(train, 0, rows, width, generator(seed, "batch", step)))
            objective(logp, mask, weights)[0].backward()
            first = first or math.hypot(*(float(block.attention.q.weight.grad.norm()) for block in model.blocks))
            optimizer.step(lr * schedule(step, steps, 0.1, 0.5), 1.0)
        tokens = random_windows(heldout, 0, 16 * rows, width, generator(0, "held out"))
        return total_loss(model, tokens, mask.repeat(16, 1)) / (16 * mask.sum().item()), first


def c32(smoke):
    count, seeds, steps = (20, 2, 2) if smoke else (1000, 4, 200)
    scales = {"1/sqrt(d)": attention, "1": unscaled}
    rows, less, behind, drift = [], {}, {}, 0.0
    for d in (4, 16, 64, 256, 768):
        g = generator(d, "C32")
        q, k = randn(g, count, 1, 1, d), randn(g, count, 1, KEYS, d)
        variance = float((q @ k.transpose(-1, -2)).var())
        drift = max(drift, abs(variance / d - 1))
        divided, plain = (look(attend, q, k) for attend in scales.values())
        less[d] = {"slope": mean_and_interval(plain["slope"] - divided["slope"])[2] < 0,
                   "mean": mean_and_interval(plain["gradient"] - divided["gradient"])[2] < 0,
                   "most": mean_and_interval(plain["gradient"] < divided["gradient"], shares=True)[1] > 0.5}
        runs = {}
        if d in (16, 64):
            runs = {name: torch.tensor([text_loss(attend, 64 // d, seed, steps) for seed in range(seeds)]).T
                    for name, attend in scales.items()}                                     # [2, seeds] each
            behind[d] = mean_and_interval(runs["1"][0] - runs["1/sqrt(d)"][0])
        for name, found in zip(scales, (divided, plain), strict=True):
            loss, first = runs[name].mean(-1).tolist() if runs else (None, None)
            rows.append({"d": d, "scale": name, "Var(q.k)": variance, "entropy, nats": float(found["entropy"].mean()),
                         "w (1 - w)": float(found["slope"].mean()), "|dL/dq|, mean": float(found["gradient"].mean()),
                         "|dL/dq|, median": float(found["gradient"].median()), "GPT: |dL/dW_q|": first,
                         "GPT: nats per byte": loss})
    narrow, wide = rows[-2:]
    begins = rows[5]["GPT: |dL/dW_q|"] / rows[4]["GPT: |dL/dW_q|"]
    return Finding("C32", "Dividing attention's scores by sqrt(d) preserves gradients.",
                   {"it is judged by the slope of the weights": drift < 0.1 and all(x["slope"] for x in less.values()),
                    "it is judged by the mean gradient of the queries": all(x["mean"] for x in less.values()),
                    "it is judged by the gradients of most queries at d = 768": less[768]["most"],
                    "it is judged by the gradients of most queries at d up to 64": all(less[d]["most"] for d in (4, 16, 64)),
                    "it is judged by a GPT's loss": all(low > 0 for _, low, _ in behind.values())},
                   f"without it, at d = 768, the mean slope of the weights falls from {narrow['w (1 - w)']:.2g} to "
                   f"{wide['w (1 - w)']:.2g}, and the median gradient of a query from {narrow['|dL/dq|, median']:.2g} to "
                   f"{wide['|dL/dq|, median']:.2g}, but the mean goes from {narrow['|dL/dq|, mean']:.2g} to "
                   f"{wide['|dL/dq|, mean']:.2g}: a few queries have large ones. A GPT with heads of 64 starts with gradients "
                   f"of W_q {begins:.1f} times as large, and ends {behind[64][0]:.2f} nats per byte worse ("
                   f"{behind[64][1]:.2f} to {behind[64][2]:.2f}, {seeds} seeds)", rows)


def steps_to_target(parameters, logp_of, signal, optimizer, most):
    """Steps until the mean p of each row has reached TARGET, but `most`.       logp_of: [rows, ..] -> [rows, examples]"""
    taken = torch.full((len(parameters),), float(most))
    for step in range(most):
        logp = logp_of(parameters)
        taken[(logp.detach().exp().mean(-1) >= TARGET) & (taken == most)] = step
        if (taken < most).all():
            break
        optimizer.zero_grad()
        SIGNALS[signal](logp).mean(-1).sum().backward()
        optimizer.step()
    return taken


def of_one_logit(z):
    """log sigma(z): the first of two actions, the other with logit 0.       [rows] -> [rows, 1]"""
    return log_softmax(torch.stack((z, torch.zeros_like(z)), -1))[:, :1]


def classes(seed, count=60, K=3):
    """Points around K centres on a circle, a 1 for the bias behind them.       -> points [count, 3], labels, centres [K, 3]"""
    angles = torch.arange(K).double() * 2 * math.pi / K
    centres, labels = 2 * torch.stack((angles.cos(), angles.sin(), torch.zeros(K)), -1), torch.arange(count) % K
    points = centres[labels] + 0.7 * randn(generator(seed, "C37"), count, 3)
    points[:, 2] = 1
    return points, labels, centres


def c37(smoke):
    # One logit: its gradients, and the times against their closed form
    starts, rate = (0.5, 0.2, 0.05) if smoke else (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001), 0.1
    z0, times, off, wrong = torch.tensor(starts).double().logit(), {}, 0.0, 0.0
    for signal, T in TIMES.items():
        z, p = leaf(z0), z0.sigmoid()
        grad = torch.autograd.grad(SIGNALS[signal](of_one_logit(z)).sum(), z)[0]
        wrong = max(wrong, float((grad + (1 - p) * (p if signal == "1 - p" else 1)).abs().max()))
        taken = rate * steps_to_target(z, of_one_logit, signal, torch.optim.SGD([z], rate), 20_000)
        law = [T(math.log(TARGET / (1 - TARGET))) - T(float(start)) for start in z0]
        off = max(off, *(abs(t / t_law - 1) for t, t_law in zip(taken.tolist(), law, strict=True)))
        times[signal] = {"measured": taken, "law": law}

    # A classifier that takes each class for the next one, or none for any
    seeds, most, rows, held = (2, 20, [], {}) if smoke else (20, 5000, [], {})
    points, labels, centres = (torch.stack(x) for x in zip(*map(classes, range(seeds)), strict=True))
    begins = {"bad": 2 * centres.roll(1, 1), "fair": torch.zeros_like(centres)}
    for start, steps in (("bad", "plain"), ("fair", "plain"), ("bad", "Adam's")):
        taken = {}
        for signal in SIGNALS:
            W = leaf(begins[start])                                                         # [seeds, K, 3]
            optimizer = torch.optim.Adam([W], 0.02) if steps == "Adam's" else torch.optim.SGD([W], 0.1)
            taken[signal] = steps_to_target(
                W, lambda W: selective_log_softmax(points @ W.transpose(1, 2), labels), signal, optimizer, most)
        ratio, low, high = (math.exp(x) for x in mean_and_interval((taken["1 - p"] / taken["-log p"]).log()))
        rows.append({"start": start, "steps are": steps, **{f"steps, {name}": float(x.median()) for name, x in taken.items()},
                     "1 - p not done": float((taken["1 - p"] == most).double().mean()),
                     "ratio, geometric mean": ratio, "low": low, "high": high})
        held[f"the start is {start} and the steps are {steps}"] = wrong < 1e-12 and off < 0.05 and low > 10
    bad, fair, adam = (row["ratio, geometric mean"] for row in rows)
    slow, fast = (float(times[signal]["measured"][-1]) for signal in ("1 - p", "-log p"))
    return Finding("C37", "A log-probability teaches where a probability stalls.", held,
                   f"from p = {starts[-1]} to {TARGET}, one logit takes {fast:.0f} units of time with -log p and {slow:.0f} "
                   f"with 1 - p, within {off:.1%} of the closed form. A classifier takes {bad:.0f} times as many steps with 1 "
                   f"- p from a bad start (or more: in {most:,} steps, {rows[0]['1 - p not done']:.0%} of {seeds} seeds do "
                   f"not get there), {fair:.1f} times from a fair one, and {adam:.1f} times ({rows[2]['low']:.1f} to "
                   f"{rows[2]['high']:.1f}) from the bad one with Adam, which divides out the size of the gradients",
                   rows, {"starts": starts, "times": times})


def who_bites(attend, positions, layers, seed, steps, lr=1e-2):
    """How far "A bites B." and "B bites A." are apart at the full stop in a fresh GPT, and the share of all such sentences
    in which it names the one who bites there, when it has been trained to."""
    sentences = torch.tensor([[a, BITES, b, STOP] for a, b in permutations(range(NOUNS), 2)])       # [56, 4]
    config = GPTConfig(NOUNS + 2, context=4, layers=layers, width=32, heads=2, positions=positions)
    model = GPT(config, generator(seed, "init")).double()
    optimizer = Optimizers(model, "adamw", lr)
    with mock.patch.object(gpt, "fused_attention", attend):
        with torch.no_grad():
            apart = float((model(sentences) - model(sentences[:, [2, 1, 0, 3]]))[:, -1].abs().max())
        for step in range(steps):
            (-selective_log_softmax(model(sentences)[:, -1], sentences[:, 0]).mean()).backward()
            optimizer.step(lr * schedule(step, steps, 0.1, 0.5), 1.0)
        with torch.no_grad():
            named = model(sentences)[:, -1].argmax(-1)
    return apart, float((named == sentences[:, 0]).double().mean())


def c38(smoke):
    seeds, steps, rows, held = (2, 2, [], {}) if smoke else (4, 150, [], {})
    for sees, attend in (("everything", everything), ("the past", attention)):
        for layers, positions in ((1, "none"), (2, "none"), (3, "none"), (1, "rope")):
            found = torch.tensor([who_bites(attend, positions, layers, seed, steps) for seed in range(seeds)])
            rows.append({"a token sees": sees, "layers": layers, "positions": positions,
                         "logits apart": float(found[:, 0].max()), "who bites, right": float(found[:, 1].mean()),
                         "best seed": float(found[:, 1].max())})
    for label, sees, deep in (("attention sees everything", "everything", (1, 2, 3)),
                              ("it is causal in one layer, read at the end", "the past", (1,)),
                              ("it is causal in two layers or more", "the past", (2, 3))):
        chosen = [row for row in rows if (row["a token sees"], row["positions"]) == (sees, "none") and row["layers"] in deep]
        held[label] = all(row["logits apart"] < 1e-9 and row["best seed"] <= 0.5 for row in chosen)
    blind, causal = rows[2], rows[5]        # three layers that see everything, two that see the past
    return Finding("C38", "Without positions there is no word order.", held,
                   f"in three layers that see everything, the logits of the two sentences are {blind['logits apart']:.0e} "
                   f"apart, and {blind['who bites, right']:.0%} of the answers are right after {steps} steps. In two causal "
                   f"layers, they are {causal['logits apart']:.2f} apart, and {causal['who bites, right']:.0%} are right ("
                   f"{seeds} seeds)",
                   rows)


def draw(findings, path):
    figure, axes = panels(3)

    rows = findings["C32"].rows
    for column, label, colour in (("w (1 - w)", "slope of the weights, mean", PALETTE[0]),
                                  ("|dL/dq|, mean", "gradient of a query, mean", PALETTE[1]),
                                  ("|dL/dq|, median", "gradient of a query, median", PALETTE[2])):
        axes[0].plot([row["d"] for row in rows[::2]],
                     [off[column] / on[column] for on, off in zip(rows[::2], rows[1::2], strict=True)],
                     color=colour, marker="o", markersize=4, label=label)
    axes[0].axhline(1, color="0.6", linewidth=0.8, linestyle="--")
    axes[0].set(xscale="log", yscale="log", title="attention without 1/sqrt(d)", xlabel="d, coordinates of a head",
                ylabel="relative to attention with it")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")

    curves = findings["C37"].curves
    for (signal, times), colour in zip(curves["times"].items(), PALETTE, strict=False):
        axes[1].plot(curves["starts"], times["law"], color=colour, label=f"{signal}, closed form")
        axes[1].plot(curves["starts"], times["measured"], color=colour, linestyle="", marker="o", markersize=4,
                     label=f"{signal}, measured")
    axes[1].set(xscale="log", yscale="log", title=f"time to p = {TARGET}, one logit", ylabel="learning rate × steps",
                xlabel="p of the right answer at the start")
    axes[1].legend(frameon=False, fontsize=8)

    rows = findings["C38"].rows[::-1]
    names = [f"{row['a token sees']}, {row['layers']} layer{'s' * (row['layers'] > 1)}{', rope' * (row['positions'] == 'rope')}"
             for row in rows]
    axes[2].barh(names, [row["who bites, right"] for row in rows],
                 color=[PALETTE[4] if row["positions"] == "rope" else PALETTE[0] for row in rows])
    axes[2].axvline(0.5, color="0.6", linewidth=0.8, linestyle="--")
    axes[2].set(title="who bites whom?", xlabel="share named right; dashed: a coin", ylabel="a token sees",
                xlim=(0, 1))
    save(figure, path)


CLAIMS = (c32, c37, c38)

if __name__ == "__main__":
    main(sys.modules[__name__])
