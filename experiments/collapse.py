"""Why a KL term can ruin a policy that trains well without it.

C39  k1 = log(pi/ref) as a term of the loss is noise: its expected gradient is 0, for E_{a ~ pi}[grad log pi(a)] = 0. Where a is
     sampled from the nucleus S of pi, of mass M, it is not, and the reference has no part in it:

         E_{a ~ pi/M on S}[grad log pi(a)] = grad M / M = grad log M,      so that the loss beta k1 lowers M

     Take an answer of T tokens that is right if every one of them is. Reward 1, its mean taken off, pushes the right token's
     logit by q^T (1 - q), where q is its share of the nucleus; k1 pulls it down by beta q (1 - M), and M is about p. So a
     policy that top-p samples keeps its answers only if beta (1 - p) is less than the largest q^(T-1) (1 - q), which is
     1/T (1 - 1/T)^(T-1), about 1/(e T). Above it, every token drifts to the uniform distribution.

C40  Three faults of a script whose accuracy fell to 0 once its KL term was on: k1 in the loss, tokens from top-p .9 scored with
     the full softmax, and max instead of min in the clip where A < 0. Each alone and together, in train_grpo.py.

C39 is exact: sums over all answers. C40 is a small model that sorts six digits, in answers of 13 tokens, whose threshold is .3
by C39 and about .6 with GRPO's z-scores: at beta = 1 and .04. A policy has collapsed where the interval of its accuracy over
seeds ends below half of that without a fault. What would have warned: the first-step check, before the first update, or the
doctor, after the first step at which it finds something broken or a warning.

Change `TOP_P = 0.9` to `TOP_P = 1.0`: C39 is confirmed.
"""

import contextlib
import functools
import io
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import train_grpo
from experiments.findings import Finding, main, mean_and_interval, panels, save, stage
from experiments.runs import sorter
from nanorl import family, heldout, rollout
from nanorl.doctor import diagnose
from nanorl.read_log import Log, read_log
from nanorl.ops import importance_ratio, log_softmax, logsumexp
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.decode import top_p_filter
from nanorl.sample import generate
from nanorl.tabular import expectation, leaf, log_probs, num_prefixes, prefix_rows, randn, sequence_probs, sequences

TOP_P = 0.9
V = 4                   # tokens of the tables
LENGTHS, BETAS = (1, 8, 32, 128, 512), (0.04, 0.2, 1.0)
FAULTS = {"none": (), "k1": ("k1",), "top-p": ("top-p",), "max": ("max",), "k1 and top-p": ("k1", "top-p"),
          "all three": ("k1", "top-p", "max")}


# ---- C39: exact ----


def gradient(z, ref, rewards, beta, top_p):
    """The expected gradient of train_grpo.py's objective with k1 in the loss, by summing over all answers.       -> [N, V]

    z, ref [N, V]; rewards [V^T], whose mean is taken off. Tokens come from the nucleus. No ratio: the policy has just sampled.
    """
    sampler, z = top_p_filter(z, top_p), leaf(z)
    logp, p = log_probs(z), sequence_probs(sampler)[:, None]
    adv = (rewards - expectation(sampler, rewards))[:, None]
    loss, _ = train_grpo.objective(logp, logp.detach(), adv, torch.ones_like(logp, dtype=torch.bool), p.expand_as(logp),
                                   ref_logp=log_probs(ref), ratio="none", bound="none", kl_coef=beta, kl="k1")
    return -torch.autograd.grad(loss, z)[0]


def log_mass_gradient(z):
    """The gradient of E_{y ~ nucleus}[sum_t log M(y_<t)], the sampler a constant.       [N, V] -> [N, V]"""
    kept, z = top_p_filter(z, TOP_P), leaf(z)
    log_mass = logsumexp(z.masked_fill(kept == -torch.inf, -torch.inf)) - logsumexp(z)      # [N]
    rows = prefix_rows(sequences(V, 3), V)
    return torch.autograd.grad(expectation(kept, log_mass[rows].sum(-1)), z)[0]


def push(z, T, beta, V=64):
    """What the right token's logit gets at each of T places alike, and how likely the token is.       z [...] -> [...], [...]

    The logit of all others is 0.
    """
    logits = torch.cat((z[..., None], z.new_zeros(*z.shape, V - 1)), dim=-1)
    p, q = log_softmax(logits)[..., 0].exp(), log_softmax(top_p_filter(logits, TOP_P))[..., 0].exp()
    return q**T * (1 - q) - beta * (q - p), p


def flow(T, beta, steps=6000):
    """The probability of the right token along gradient ascent that starts at .98: [steps, ...]."""
    z, path = torch.full(torch.broadcast_shapes(T.shape, beta.shape), 8.0, dtype=torch.float64), []
    for _ in range(steps):
        step, p = push(z, T, beta)
        z, path = z + 2 * step, [*path, p]
    return torch.stack(path)


def c39(smoke):
    pulls, off = {1.0: 0.0, TOP_P: 0.0}, 0.0            # the longest expected gradient
    nothing, right = torch.zeros(V**3).double(), (sequences(V, 3) == 0).all(-1).double()
    for seed in range(2 if smoke else 50):
        g = generator(seed, "C39")
        z, ref, other = (randn(g, num_prefixes(V, 3), V) for _ in range(3))
        for top_p in pulls:
            pulls[top_p] = max(pulls[top_p], float(gradient(z, ref, nothing, 1.0, top_p).norm()))
        found = gradient(z, ref, nothing, 1.0, TOP_P)
        expected = -log_mass_gradient(z), gradient(z, other, nothing, 1.0, TOP_P)
        off = max(off, *(float((found - x).abs().max()) for x in expected))
    for logit in torch.tensor([0.7, 2.5, 5.0]).double():        # `push`: three places alike, where token 0 is right
        table = torch.zeros(num_prefixes(V, 3), V).double()
        table[:, 0] = logit
        summed = gradient(table, table, right, 0.3, TOP_P)[:, 0].sum()
        off = max(off, abs(float(summed / 3 - push(logit, 3, 0.3, V)[0])))

    T, beta = torch.tensor(LENGTHS).double(), torch.tensor(BETAS).double()[:, None]
    path = flow(T, beta, 20 if smoke else 6000)                                             # [steps, betas, lengths]
    threshold = (1 - 1 / T) ** (T - 1) / T / (1 - TOP_P) if TOP_P < 1 else torch.full_like(T, torch.inf)
    rows = [{"tokens": int(T[j]), "beta": float(beta[i]), "threshold of beta": float(threshold[j]),
             "the right token's probability": float(path[-1, i, j]), "all of them right": float(path[-1, i, j] ** T[j])}
            for j in range(len(T)) for i in range(len(beta))]
    kept = [row["the right token's probability"] > 0.5 for row in rows]
    foreseen = sum(k == (row["beta"] < row["threshold of beta"]) for k, row in zip(kept, rows, strict=True))
    return Finding("C39", "k1 as a term of the loss is noise: its expected gradient is 0.",
                   {"every token can be sampled": pulls[1.0] < 1e-12 and off < 1e-12,
                    f"tokens come from a nucleus of {TOP_P:g}": pulls[TOP_P] < 1e-12},
                   f"from a nucleus, descent follows the gradient of -beta log M, to {off:.0e}, whatever the reference. In "
                   "answers of T tokens that must all be right, it flattens every token once beta is above the threshold, "
                   f"1/T (1 - 1/T)^(T-1) / (1 - p): so it is in {foreseen} of {len(rows)} cases", rows,
                   {"path": {str(t): path[:: max(1, len(path) // 300), 0, j] for j, t in enumerate(LENGTHS)}})


# ---- C40: in training ----


def max_for_min(logp, old_logp, adv, clip_low, clip_high):
    """The clipped surrogate, with the larger of the two where A < 0."""
    ratio = importance_ratio(logp, old_logp)
    plain, clipped = ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv
    return torch.where(adv < 0, torch.maximum(plain, clipped), torch.minimum(plain, clipped))


def collect_from_nucleus(*args, **how):
    with mock.patch.object(rollout, "generate", functools.partial(generate, top_p=TOP_P)):
        return rollout.collect(*args, **how)


def practise(init, faults, beta, seed, selfcheck, **flags):
    """The log of a run with these faults; None where the first-step check stops it."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(stream(io.StringIO()))
        stack.enter_context(mock.patch.object(heldout, "read_text", return_value="No story."))
        if "k1" in faults:
            stack.enter_context(mock.patch.dict(family.KL_TERMS, {"k3": family.KLTerm("k1", "loss", "nothing")}))
        if "top-p" in faults:
            stack.enter_context(mock.patch.object(train_grpo, "collect", collect_from_nucleus))
        if "max" in faults:
            stack.enter_context(mock.patch.object(train_grpo, "clipped_surrogate", max_for_min))
        cfg = train_grpo.Config(out=f"{folder}/run", init=init, seed=seed, minibatches=4, selfcheck=selfcheck, quiet=True,
                                kl_coef=beta if "k1" in faults else 0.0, device="cpu", **flags)
        try:
            train_grpo.main(cfg)
        except SystemExit:
            return None
        return read_log(Path(cfg.out))


def first_finding(log):
    """What the doctor finds first, broken or a warning, and after how many steps."""
    for n in range(1, len(log.lines) + 1):
        names = [name for level, name, _ in diagnose(Log(log.lines[:n], log.flags)) if level != "note"]
        if names:
            return f"{names[0].replace('-', ' ')}, step {n}"
    return "nothing"


def c40(smoke):
    init = stage("sft", smoke) if smoke else sorter()
    flags = (dict(prompts=2, group=2, steps=2, eval_every=1, eval_problems=2, max_new_tokens=8) if smoke else
             dict(task="sorting-6", prompts=8, lr=3e-4, steps=24, eval_every=6, eval_problems=100, max_new_tokens=48))
    cases = {f"{name}, beta 1" if "k1" in faults else name: (faults, 1.0) for name, faults in FAULTS.items()}
    cases |= {f"{name}, beta .04": (faults, 0.04) for name, faults in FAULTS.items() if "k1" in faults}
    rows, curves, held, healthy = [], {}, {}, None
    for name, (faults, beta) in cases.items():
        refused = practise(init, faults, beta, 0, True, **flags | {"steps": 1}) is None
        logs = [practise(init, faults, beta, seed, False, **flags) for seed in range(2 if smoke else 3)]
        accuracy, entropy = (torch.tensor([log.values(metric) for log in logs])             # [seeds, points]
                             for metric in ("eval/accuracy_sampled", "train/entropy"))
        mean, low, high = mean_and_interval(accuracy[:, -1])
        rows.append({"faults": name, "accuracy": mean, "low": low, "high": high,
                     "greedy": float(torch.tensor([log.values("eval/accuracy_greedy")[-1] for log in logs]).mean()),
                     "entropy": float(entropy[:, -1].mean()), "first-step check": "stops" if refused else "passes",
                     "doctor": first_finding(logs[0])})
        healthy = mean if healthy is None else healthy
        if faults:
            held[name] = high < healthy / 2
        curves[name] = {"accuracy": accuracy, "entropy": entropy.mean(0)}
    sentences = ", ".join(f"{row['faults']} {row['accuracy']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in rows)
    return Finding("C40", "k1 in the loss, sampling from a nucleus and max for min where A < 0 collapse a policy.", held,
                   f"sampled held-out accuracy after {flags['steps']} steps, mean and interval of {2 if smoke else 3} seeds: "
                   + sentences, rows, curves)


def draw(findings, path):
    figure, axes = panels(3)
    colours = dict(zip(LENGTHS, PALETTE, strict=False))
    for T, p in findings["C39"].curves["path"].items():
        axes[0].plot([2 * 6000 / len(p) * i for i in range(len(p))], p, color=colours[int(T)], label=f"{T} tokens")
    axes[0].axhline(TOP_P, color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    axes[0].set(title="exact: k1 and top-p, beta = .04", xlabel="time of gradient flow",
                ylabel="probability of a right token", ylim=(0, 1.02))
    curves = findings["C40"].curves
    steps = len(next(iter(curves.values()))["entropy"])
    colours = dict(zip(FAULTS, ("0.5", *PALETTE), strict=False))
    for name, curve in curves.items():
        colour, style = colours[name.split(",")[0]], ":" if ".04" in name else "-"
        seeds = torch.tensor(curve["accuracy"])
        x = torch.linspace(0, steps, seeds.shape[1])
        axes[1].plot(x, seeds.mean(0), style, color=colour, label=name)
        axes[1].fill_between(x, seeds.amin(0), seeds.amax(0), color=colour, alpha=0.12, linewidth=0)
        axes[2].plot(range(steps), curve["entropy"], style, color=colour, label=name)
    axes[1].set(title="sorting six digits", xlabel="steps", ylabel="sampled held-out accuracy", ylim=(0, 0.7))
    axes[2].set(title="the same runs", xlabel="steps", ylabel="entropy, nats per token", yscale="log")
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)


CLAIMS = (c39, c40)

if __name__ == "__main__":
    main(sys.modules[__name__])
