"""The figures of docs/walk.md that no experiment draws: the ideas themselves, from the functions that implement them.

    python -m experiments --draw        these and all others

Each function draws one figure. Those about the tiny model read runs/sft and runs/grpo, made by python train_grpo.py.
"""

import math

import torch
from torch import Tensor, nn

from experiments.findings import FIGURES, load, panels, save, stage
from nanorl import gpt
from nanorl.data import DATA
from nanorl.files import read_text
from nanorl.ops import (
    clipped_surrogate,
    entropy_from_logits,
    kl_divergence,
    kl_k1,
    kl_k2,
    kl_k3,
    log_sigmoid,
    log_softmax,
    logsumexp,
    masked_surrogate,
    selective_log_softmax,
)
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.decode import sampling_logits, top_k_filter, top_p_filter
from nanorl.sample import token_log_probs
from nanorl.tabular import leaf

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = PALETTE
LOGITS = torch.tensor([3.0, 1.75, -2.0, 0.5], dtype=torch.float64)
WORDS = ["mat", "sofa", "moon", "roof"]


def softmax(path):
    """Logits, their exponentials, and the shares of those; then the same at three temperatures."""
    figure, axes = panels(4, width=3.2)
    stages = ((LOGITS, "logits z", "nats"), (LOGITS.exp(), "exponentials e^z", "weight"),
              (log_softmax(LOGITS).exp(), "probabilities: their shares", "probability"))
    for axis, (values, name, unit) in zip(axes, stages, strict=False):
        bars = axis.bar(WORDS, values, color=BLUE)
        axis.bar_label(bars, [f"{x:.3g}" for x in values], fontsize=8)
        axis.set(title=name, ylabel=unit)
        axis.axhline(0, color="0.6", linewidth=0.8)
    for T, colour, shift in ((0.5, RED, -0.27), (1.0, BLUE, 0.0), (2.0, GREEN, 0.27)):
        p = log_softmax(sampling_logits(LOGITS[None], T)).exp()[0]
        axes[3].bar([i + shift for i in range(4)], p, width=0.25, color=colour, label=f"T = {T:g}")
    axes[3].set(title="divided by a temperature first", ylabel="probability", xticks=range(4), xticklabels=WORDS, ylim=(0, 1))
    axes[3].legend(frameon=False, fontsize=8)
    save(figure, path)


def one_logit(path):
    """One logit swept: its token's probability is a sigmoid, steepest at one half; and entropy against temperature."""
    figure, axes = panels(2)
    z = torch.linspace(-6, 8, 141, dtype=torch.float64)
    others = logsumexp(LOGITS[1:])
    p = log_sigmoid(z - others).exp()
    axes[0].plot(z, p, color=BLUE, label="p = σ(z - LSE of the others)")
    axes[0].plot(z, p * (1 - p), color=RED, label="slope p (1 - p)")
    axes[0].axvline(float(others), color="0.6", linewidth=0.8, linestyle=":")
    axes[0].set(title="one logit, all others held", xlabel="logit z, nats", ylabel="probability", ylim=(0, 1.02))
    T = torch.logspace(-1, 1.5, 121, dtype=torch.float64)
    axes[1].plot(T, entropy_from_logits(LOGITS / T[:, None]), color=BLUE, label="entropy")
    axes[1].axhline(math.log(4), color="0.6", linewidth=0.8, linestyle=":", label="log 4: all alike")
    axes[1].set(title="temperature and entropy", xlabel="temperature", ylabel="nats", xscale="log", ylim=(0, 1.55))
    axes[1].xaxis.set_major_formatter("{x:g}")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8, loc="upper left" if axis is axes[0] else "lower right")
    save(figure, path)


def truncation(path):
    """Which tokens top-k and top-p keep, of a distribution that is sure and of one that is not."""
    figure, axes = panels(2)
    for axis, z, name in ((axes[0], torch.linspace(4, -4, 12).double(), "a sure model"),
                          (axes[1], torch.linspace(1, -1, 12).double(), "an unsure one")):
        p = log_softmax(z).exp()
        kept = {name: f(z[None], x)[0] > -torch.inf for name, f, x in (("k", top_k_filter, 4), ("p", top_p_filter, 0.9))}
        axis.bar(range(1, 13), p, color=[BLUE if k else "0.8" for k in kept["p"]])
        axis.axvline(4.5, color=RED, linewidth=1.2, linestyle="--", label="top-k, k = 4")
        axis.plot([], [], color=BLUE, linewidth=6, label=f"top-p, p = .9: {int(kept['p'].sum())} tokens")
        axis.set(title=name, xlabel="rank of the token", ylabel="probability", xticks=range(1, 13, 2))
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def surprise(path):
    """-log p, its slope in p, which has no bound, and its slope in the logit, which has; and entropy, the mean of it."""
    figure, axes = panels(3)
    p = torch.linspace(0.005, 1, 200, dtype=torch.float64)
    axes[0].plot(p, -p.log(), color=BLUE, label="surprise -log p")
    for at in (0.1, 0.5, 0.9):
        x = torch.tensor([max(0.005, at - 0.12), min(1.0, at + 0.12)])
        axes[0].plot(x, -math.log(at) - (x - at) / at, color=RED, linewidth=1.2)
        axes[0].annotate(f"slope {-1 / at:.3g}", (at, -math.log(at)), (6, 6), textcoords="offset points", fontsize=8)
    axes[0].set(title="cross-entropy of one token", xlabel="probability p of the right token", ylabel="nats", ylim=(-0.2, 5.4))
    z = leaf(torch.stack((p.logit().clamp(max=8), torch.zeros_like(p)), dim=-1))
    slopes = torch.autograd.grad(-selective_log_softmax(z, torch.zeros(len(p), dtype=torch.int64)).sum(), z)[0][:, 0]
    axes[1].plot(p, -1 / p, color=RED, label="in p: -1 / p")
    axes[1].plot(p, slopes, color=BLUE, label="in its logit: p - 1")
    axes[1].set(title="its slope: what training sees", xlabel="probability p of the right token", ylabel="slope",
                ylim=(-6, 0.3))
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    kinds = {"sure": [6.0, 1, 0, 0, 0, 0], "two ways": [3.0, 3, -1, -1, -1, -1], "no idea": [0.0] * 6}
    H = [float(entropy_from_logits(torch.tensor(z))) for z in kinds.values()]
    bars = axes[2].bar(list(kinds), H, color=BLUE)
    axes[2].bar_label(bars, [f"{h:.2f} nats\n{h / math.log(2):.2f} bits\n{math.exp(h):.1f} choices" for h in H], fontsize=8)
    axes[2].set(title="entropy: the mean surprise", ylabel="nats", ylim=(0, 2.3))
    save(figure, path)


def underflow(path):
    """The probability of one real text, token by token: the product leaves the numbers there are, the sum of logs does not."""
    model, tokenizer = load(stage("sft", smoke=False))
    ids = torch.tensor(tokenizer.encode(read_text(DATA / "stories_heldout.txt"))[:20 * 63]).view(20, 63)
    windows = torch.cat((torch.full((20, 1), tokenizer.bos), ids), dim=1)       # as long as what it was trained on
    logp = token_log_probs(model, windows)[0].detach().flatten().double()
    figure, axes = panels(2)
    n = torch.arange(1, len(logp) + 1)
    for dtype, colour, name in ((torch.float32, RED, "float32"), (torch.float64, BLUE, "float64")):
        product = logp.to(dtype).exp().cumprod(0).double()
        alive = product > 0
        axes[0].plot(n[alive], product[alive].log10(), color=colour, linewidth=4 if dtype == torch.float32 else 1.5,
                     label=f"product in {name}: 0 after {int(alive.sum())} tokens")
    axes[0].set(title="probability of some stories", xlabel="tokens", ylabel="log10 of the product")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].plot(n, logp.float().cumsum(0), color=GREEN, label="sum of log-probs in float32")
    axes[1].set(title="the same as a sum of logs", xlabel="tokens", ylabel="nats")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, path)


def coin(path):
    """The mean of n coin tosses, and where 95 % of all such means are."""
    figure, axes = panels(1, width=6.0)
    n = torch.arange(1, 10_001)
    for seed in range(5):
        tosses = torch.rand(10_000, generator=generator(seed, "coin")) < 0.5
        axes[0].plot(n, tosses.double().cumsum(0) / n, color=SKY, linewidth=0.9)
    half = 1.96 * 0.5 / n.sqrt()
    axes[0].plot(n, 0.5 + half, color=BLACK, linewidth=1, linestyle="--", label="1/2 ± 1.96 × (1/2) / √n")
    axes[0].plot(n, 0.5 - half, color=BLACK, linewidth=1, linestyle="--")
    axes[0].set(title="the mean settles like 1/√n", xlabel="tosses", ylabel="share of heads", xscale="log", ylim=(0, 1))
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def descent(path):
    """Gradient descent on (w - 2)^2 + 1 with steps that are too short, right and too long; weights under three decays."""
    figure, axes = panels(2)
    w = torch.linspace(-2.5, 6.5, 91)
    axes[0].plot(w, (w - 2) ** 2 + 1, color="0.7")
    for lr, colour in ((0.05, GREEN), (0.3, BLUE), (0.95, RED)):
        weight = nn.Parameter(torch.tensor(-2.0))
        optimizer, visited = torch.optim.SGD([weight], lr), []
        for _ in range(8):
            loss = (weight - 2) ** 2 + 1
            visited.append((weight.item(), loss.item()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        axes[0].plot(*zip(*visited, strict=True), "o-", color=colour, markersize=4, linewidth=0.9, label=f"step size {lr:g}")
    axes[0].set(title="eight steps downhill", xlabel="weight", ylabel="loss")
    axes[0].legend(frameon=False, fontsize=8, loc="upper center")
    for decay, colour in ((0.0, RED), (0.1, ORANGE), (1.0, BLUE)):
        weights = nn.Parameter(torch.tensor([3.0, -1.0, 0.5]))
        optimizer, visited = torch.optim.AdamW([weights], 0.05, weight_decay=decay), []
        for _ in range(200):
            visited.append(weights.tolist())
            optimizer.zero_grad()
            ((weights[0] - 3) ** 2 / 8).backward()      # only the first weight is of use
            optimizer.step()
        for i, line in enumerate(zip(*visited, strict=True)):
            axes[1].plot(line, color=colour, linestyle="-" if i == 0 else "--", label=None if i else f"weight decay {decay:g}")
    axes[1].set(title="decay: what is of no use fades (dashed)", xlabel="step", ylabel="weight")
    axes[1].legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.93))
    save(figure, path)


def divergence(path):
    """p log(p / q) where a policy has drifted a little and far, and the two directions between the same two."""
    figure, axes = panels(3)
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    reference = -x.square() / 2
    for axis, drift in ((axes[0], 0.5), (axes[1], 2.0)):
        policy = -(x - drift).square() / 2
        p, q = log_softmax(policy).exp(), log_softmax(reference).exp()
        step = float(x[1] - x[0])
        axis.plot(x, q / step, color="0.6", label="reference")
        axis.plot(x, p / step, color=BLUE, label="policy")
        axis.fill_between(x, p * (p / q).log() / step, color=ORANGE, alpha=0.4, linewidth=0, label="p log (p / q)")
        axis.set(title=f"KL = {float(kl_divergence(policy, reference)):.3g} nats: the shaded area", xlabel="answer",
                 ylabel="density", ylim=(-0.35, 1.3))
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    r = torch.linspace(-2.5, 2.5, 201, dtype=torch.float64)
    zero = torch.zeros_like(r)
    for f, name, colour in ((kl_k1, "k1 = -r", RED), (kl_k2, "k2 = r²/2", GREEN), (kl_k3, "k3 = e^r - 1 - r", BLUE)):
        axes[2].plot(r, f(zero, r), color=colour, label=name)
    axes[2].axvspan(-math.log(8), math.log(8), color="0.93", zorder=0, label="ratio within [1/8, 8]")
    axes[2].set(title="three estimates from one sample", xlabel="r = log (second / first), nats", ylabel="nats", ylim=(-2.6, 6))
    axes[2].legend(frameon=False, fontsize=8, loc="upper center")
    save(figure, path)


def clip(path):
    """The clipped surrogate and its gradient against the ratio, for both signs of the advantage, beside two relatives."""
    figure, axes = panels(4, width=3.4)
    rho = torch.linspace(0.02, 2.2, 437, dtype=torch.float64)
    bounds = {"clip .2 / .2": (BLUE, "-", lambda x, o, a: clipped_surrogate(x, o, a, 0.2, 0.2)),
              "clip .2 / .28": (ORANGE, "--", lambda x, o, a: clipped_surrogate(x, o, a, 0.2, 0.28)),
              "mask .5 to 1.5": (GREEN, ":", lambda x, o, a: masked_surrogate(x, o, a, 0.5, 1.5))}
    for i, A in enumerate((1.0, -1.0)):
        for name, (colour, style, f) in bounds.items():
            logp = leaf(rho.log()[:, None])
            J = f(logp, torch.zeros_like(rho)[:, None], torch.full_like(rho, A)[:, None])
            gradient = torch.autograd.grad(J.sum(), logp)[0]
            axes[2 * i].plot(rho, J.detach(), style, color=colour, label=name)
            axes[2 * i + 1].plot(rho, gradient, style, color=colour, label=name)
        axes[2 * i].set(title=f"objective, A = {A:+.0f}", xlabel="importance ratio ρ", ylabel="J")
        axes[2 * i + 1].set(title=f"its gradient, A = {A:+.0f}", xlabel="importance ratio ρ", ylabel="dJ / d log π")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


def attention_weights(model, ids: Tensor) -> list[Tensor]:
    """What every head of every layer looks at while reading one sequence.       ids [T] -> layers of [H, T, T]

    `gpt.attention` with the identity for values returns its weights.
    """
    seen, fused = [], gpt.fused_attention

    def look(q, k, v, mask):
        values = torch.eye(q.shape[2]).expand(1, k.shape[1], -1, -1)
        seen.append(gpt.attention(q, k, values, mask)[0])
        return fused(q, k, v, mask)

    gpt.fused_attention = look
    try:
        with torch.no_grad():
            model(ids[None])
    finally:
        gpt.fused_attention = fused
    return seen


def attention(path):
    """Where the trained model looks while it adds: in its last two layers, the head that looks most sharply."""
    model, tokenizer = load(stage("grpo", smoke=False))
    ids = torch.tensor([*tokenizer.render("What is 347+585?"), *tokenizer.encode("7+5=12, 4+8+1=13")])
    pieces = [tokenizer.decode([i]).replace("<|", "").replace("|>", "") for i in ids.tolist()]
    figure, axes = panels(2, width=5.6, height=5.4)
    for layer, axis in zip((-2, -1), axes, strict=True):
        weights = attention_weights(model, ids)[layer]
        head = int(entropy_from_logits(weights.log()).mean(-1).argmin())
        axis.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
        axis.set(title=f"layer {model.config.layers + layer + 1}, head {head + 1}", xlabel="looks at", ylabel="from",
                 xticks=range(len(ids)), yticks=range(len(ids)))
        axis.set_xticklabels(pieces, fontsize=8, rotation=90)
        axis.set_yticklabels(pieces, fontsize=8)
    save(figure, path)


def digits(path):
    """What the model knows of digits: its output vectors of 0 to 9, in their two main directions, and their distances."""
    model, tokenizer = load(stage("grpo", smoke=False))
    vectors = model.head.weight.detach()[[tokenizer.encode(str(d))[0] for d in range(10)]].double()
    vectors = vectors - vectors.mean(0)
    plane = vectors @ torch.linalg.svd(vectors).Vh[:2].T                                    # [10, 2]
    i, j = torch.triu_indices(10, 10, 1)
    distance, gap = torch.cdist(vectors, vectors)[i, j], (i - j).abs().double()
    correlation, g = float(torch.corrcoef(torch.stack((gap, distance)))[0, 1]), generator(0, "digits")
    shuffled = [torch.corrcoef(torch.stack(((o[i] - o[j]).abs().double(), distance)))[0, 1]
                for o in (torch.randperm(10, generator=g) for _ in range(2000))]
    by_chance = float((torch.stack(shuffled) >= correlation).double().mean())
    figure, axes = panels(2)
    axes[0].plot(*plane.T, color="0.8", linewidth=0.8)
    for d, (x, y) in enumerate(plane.tolist()):
        axes[0].annotate(str(d), (x, y), ha="center", va="center", fontsize=12, color=BLUE)
    axes[0].set(title="output vectors of the digits", xlabel="first main direction", ylabel="second")
    axes[1].plot(gap, distance, "o", color=BLUE, markersize=4)
    chance = f"= {by_chance:.3f}" if by_chance else "< 0.0005"
    axes[1].set(title=f"correlation {correlation:.2f}, p {chance}", xlabel="difference of the digits", ylabel="distance",
                ylim=(0, None))
    save(figure, path)


DRAWN = (softmax, one_logit, truncation, surprise, underflow, coin, descent, divergence, clip, attention, digits)


def draw_all() -> None:
    for draw in DRAWN:
        draw(FIGURES / f"{draw.__name__}.png")
