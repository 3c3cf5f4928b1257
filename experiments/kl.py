"""Where to put a KL penalty, how good an estimator k3 is, and whether sampler and scorer agree.

C11  A KL penalty, in the reward or in the loss, pulls the policy along the gradient of KL(pi || ref) of whole answers. In the
     reward k1 does, and in the loss k2 of the summed log-ratio. Per token, k2 in the loss and k1 or k3 times the ratio follow

         E_{y ~ pi}[ sum_t grad KL(pi(.|y_<t) || ref(.|y_<t)) ],  each prefix held fixed,

     which is the same for a single token; k3 in the loss follows that of KL(ref || pi), and k1 in the loss follows nothing.

C12  k3 = e^r - 1 - r, r = log(ref/pi) of a token from pi, is a cheap stand-in for the full KL(pi || ref): E_pi[k3] = KL.
     With log-normal ratios, Var(k1) = 2 KL and Var(k3) = e^{2 KL} - 1 - 2 KL, so k3 is the less noisy one below 0.63 nats.
     In a real run, the full KL of every sampled prefix is known as well.

C33  The log-probs of the sampler and those of the scorer agree: every ratio is 1, to 1e-4, the self-check's in float32. What is
     sampled from a nucleus of mass M has log-probs that are too high by -log M: ratio M, and KL(sampler || scorer) = -log M,
     of which k3 sees M - 1 - log M.

C11 and the first half of C12 are exact sums; the second half is a GRPO run of the small model, and C33 the fine-tuned one.

Change `sequence_kl(z, ref)` to `fixed_prefix_kl(z, ref, z)`: C11 holds only when it is k3 in the loss.
"""

import contextlib
import copy
import io
import math
import sys
import tempfile

import torch

import train_grpo
from experiments.findings import Finding, load, main, mean_and_interval, panels, save, stage
from nanorl.data import shift
from nanorl.family import BANDS
from nanorl.first_step import tolerance
from nanorl.heldout import heldout_problems
from nanorl.ops import importance_ratio, kl_divergence, kl_k1, kl_k2, kl_k3, logsumexp, selective_log_softmax
from nanorl.plot import PALETTE
from nanorl.rollout import collect, score_rollout
from nanorl.run import derive, generator
from nanorl.decode import top_p_filter
from nanorl.sample import Sampling, generate
from nanorl.tabular import expectation, fixed_prefix_kl, leaf, log_probs, num_prefixes, randn, sequence_kl, sequence_probs
from nanorl.tasks import make_task

V = 3           # tokens of the tables
PLACES = {"reward": "in the reward", "loss": "in the loss", "weighted": "times the ratio",
          "summed": "of the summed log-ratio"}
PAIRS = [*((kl, place) for place in ("reward", "loss", "weighted") for kl in train_grpo.KL), ("k2", "summed")]


def two_tables(T, drift, *seed):
    """A policy over T tokens, and a reference that is `drift` away from it in every logit.       -> [N, V] each"""
    g = generator(*seed)
    z = randn(g, num_prefixes(V, T), V)
    return z, z + drift * randn(g, num_prefixes(V, T), V)


def pull(z, ref, kl, place):
    """The expected gradient of a KL term of weight 1, by summing over all answers.       [N, V], [N, V] -> [N, V]"""
    z, p = leaf(z), sequence_probs(z)[:, None]                                              # [V^T, 1]
    logp, ref_logp = log_probs(z), log_probs(ref)                                           # [V^T, T]
    if place == "summed":
        logp, ref_logp = logp.sum(-1, keepdim=True), ref_logp.sum(-1, keepdim=True)
    old, mask = logp.detach(), torch.ones_like(logp, dtype=torch.bool)
    adv = -train_grpo.KL[kl](old, ref_logp).sum(-1, keepdim=True) if place == "reward" else torch.zeros_like(p)
    loss, _ = train_grpo.objective(logp, old, adv, mask, p.expand_as(logp), ref_logp=ref_logp, ratio="none", bound="none",
                                   kl_coef=1.0, kl=kl, kl_in="loss" if place == "summed" else place)
    return torch.autograd.grad(loss, z)[0]


def misses(T, drift, pairs, seeds):
    """|g - grad KL| / |grad KL| of each KL term's g, for the KL of whole answers, with fixed prefixes, and from ref to pi."""
    found = {pair: [] for pair in pairs}
    for seed in seeds:
        z, ref = two_tables(T, drift, seed, "C11", T)
        z = leaf(z)
        values = sequence_kl(z, ref), fixed_prefix_kl(z, z, ref), fixed_prefix_kl(z, ref, z)
        true = [torch.autograd.grad(value, z)[0] for value in values]
        for pair in pairs:
            g = pull(z.detach(), ref, *pair)
            found[pair].append([float((g - t).norm() / t.norm()) for t in true])
    return {pair: torch.tensor(each) for pair, each in found.items()}                       # [seeds, 3]


def c11(smoke):
    seeds, tokens = range(2 if smoke else 50), {1: "one token", 3: "three tokens"}
    found = {T: misses(T, 1.0, PAIRS, seeds) for T in tokens}
    rows = [{"KL term": f"{kl} {PLACES[place]}", "tokens": T, "misses grad KL(pi || ref)": float(miss[:, 0].mean()),
             "with fixed prefixes": float(miss[:, 1].mean()), "of KL(ref || pi)": float(miss[:, 2].mean())}
            for kl, place in PAIRS for T, miss in ((T, found[T][kl, place]) for T in tokens)]

    held, alike = {}, {}            # KL terms that fare alike are named together
    for pair in PAIRS:
        alike.setdefault(tuple(bool(found[T][pair][:, 0].max() < 1e-10) for T in tokens), []).append(pair)
    for outcomes, pairs in alike.items():
        it_is = "it is " + ", ".join(f"{kl} {PLACES[place]}" for kl, place in pairs)
        where = [""] if len(set(outcomes)) == 1 else [f"for {name}, " for name in tokens.values()]
        held |= {name + it_is: outcome for name, outcome in zip(where, outcomes, strict=False)}

    drifts = [0.03, 0.1, 0.3, 1.0, 3.0]
    lines = {"k3, one token": (1, ("k3", "loss")), "k3, three tokens": (3, ("k3", "loss")),
             "k2, three tokens": (3, ("k2", "loss"))}
    curves = {name: [float(misses(T, drift, [pair], seeds)[pair][:, 0].mean()) for drift in drifts]
              for name, (T, pair) in lines.items()}
    k2, k3 = (found[3][kl, "loss"][:, 0] for kl in ("k2", "k3"))
    return Finding("C11", "A KL penalty pulls along the gradient of KL(policy || reference), wherever it is placed.", held,
                   f"answers of three tokens, logits that differ by 1: per token in the loss, k2 misses the gradient by "
                   f"{k2.mean():.0%} of its length, k3 by {k3.mean():.0%}, k1 by "
                   f"{found[3]['k1', 'loss'][:, 0].mean():.0%}; k1 in the reward misses by no more than "
                   f"{found[3]['k1', 'reward'][:, 0].max():.0e} of it", rows, {"drift": drifts, "miss": curves})


@torch.no_grad()
def exact_and_sampled(policy, reference, rollout):
    """At each sampled token: KL(policy || reference) over the vocabulary, and both log-probs of the token.       -> [n] each"""
    (inputs, ids), mask = shift(rollout.tokens), rollout.mask
    p, q = (net.head(net.hidden(inputs)[mask]) for net in (policy, reference))              # [n, V]
    return kl_divergence(p, q), selective_log_softmax(p, ids[mask]), selective_log_softmax(q, ids[mask])


def grpo_run(steps, smoke):
    """The policy after so many steps of GRPO from the fine-tuned model, for each number of `steps`."""
    tiny = dict(prompts=2, group=2, max_new_tokens=20, entropy_coef=1.0) if smoke else {}
    with tempfile.TemporaryDirectory() as folder:
        for upto in steps:
            cfg = train_grpo.Config(out=f"{folder}/grpo", init=stage("sft", smoke), steps=upto, resume=upto > steps[0],
                                    eval_every=1000, eval_problems=1, selfcheck=False, quiet=True, device="cpu", **tiny)
            with contextlib.redirect_stdout(io.StringIO()):
                train_grpo.main(cfg)
            yield upto, load(cfg.out)[0]


def correlation(x, y):
    return float(torch.corrcoef(torch.stack((x, y)).double())[0, 1])


def along_a_run(smoke):
    """k3 against the full KL to the fine-tuned model: rows for steps of GRPO, and both means of every rollout."""
    reference, tokenizer = load(stage("sft", smoke))
    task, rows, means = make_task("addition"), [], []
    rollouts, size, sampling = (2, dict(prompts=2, samples=2), Sampling(20)) if smoke else (
        8, dict(prompts=32, samples=8), Sampling(80))
    for step, policy in grpo_run((1, 2) if smoke else (2, 5, 10, 15, 20, 30, 40), smoke):
        drawn = [collect(policy, tokenizer, task, sampling, seed=derive(step, "C12", i), **size).rollout
                 for i in range(rollouts)]
        found = [exact_and_sampled(policy, reference, rollout) for rollout in drawn]
        means += [(float(exact.mean()), float(kl_k3(*logp).mean())) for exact, *logp in found]
        exact, logp, ref_logp = map(torch.cat, zip(*found, strict=True))
        k1, k3 = kl_k1(logp, ref_logp), kl_k3(logp, ref_logp)
        here = torch.tensor(means[-rollouts:], dtype=torch.float64)
        mean, low, high = mean_and_interval(here[:, 1])
        rows.append({"GRPO steps": step, "full KL": float(exact.mean()), "mean k3": mean, "low": low, "high": high,
                     "median rollout": float(here[:, 1].median()), "mean k1": float(k1.mean()),
                     "tokens: correlation with k1": correlation(exact, k1), "with k3": correlation(exact, k3)})
    return rows, *torch.tensor(means).T


def lognormal(s, V=100_001):
    """Log-probs of V equally likely tokens, and of a policy whose ratio to them is e^{s x}/Z, x normal.       -> [V], [V]"""
    x = torch.special.ndtri((torch.arange(V, dtype=torch.float64) + 0.5) / V)
    return torch.full_like(x, -torch.tensor(V).double().log()), s * x - logsumexp(s * x)


def c12(smoke):
    # Whose tokens: every answer of three tokens, by the first policy's probabilities and by the second's
    worst = {"first": 0.0, "second": 0.0}
    for seed in range(2 if smoke else 100):
        first, second = two_tables(3, 1.0, seed, "C12")
        k3, true = kl_k3(log_probs(first), log_probs(second)).sum(-1), float(sequence_kl(first, second))
        for name, sampler in (("first", first), ("second", second)):
            worst[name] = max(worst[name], abs(float(expectation(sampler, k3)) / true - 1))

    # How noisy: tokens for a standard error of 10 %
    curves, law = {"KL": [], "k1": [], "k2": [], "k3": []}, 0.0
    for s in torch.logspace(-1.5, 0.25, 12 if smoke else 120, dtype=torch.float64):
        logp, other = lognormal(s)
        p, kl = logp.exp(), float(kl_divergence(logp, other))
        curves["KL"].append(kl)
        for name, estimator in (("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)):
            k = estimator(logp, other)
            variance = float(p @ (k - p @ k).square())
            curves[name].append(100 * variance / kl**2)
            if name != "k2" and kl < 0.5:         # beyond, V tokens do not hold the tail
                law = max(law, abs(variance / (2 * kl if name == "k1" else math.expm1(2 * kl) - 2 * kl) - 1))
    quieter = {kl: k3 < k1 for kl, k1, k3 in zip(curves["KL"], curves["k1"], curves["k3"], strict=True)}
    i = list(quieter.values()).index(False)
    (a, b), (fewer, more) = curves["KL"][i - 1 : i + 1], (curves["k1"][j] - curves["k3"][j] for j in (i - 1, i))
    crossing = a + (b - a) * fewer / (fewer - more)

    rows, exact, k3 = along_a_run(smoke)
    ten = 3 * len(exact) // len(rows)       # rollouts up to step 10
    off = (k3 / exact - 1).abs()
    early, late, across, last = float(off[:ten].median()), float(off[ten:].median()), correlation(exact, k3), rows[-1]
    token, token_k1 = ([row[name] for row in rows] for name in ("with k3", "tokens: correlation with k1"))
    return Finding("C12", "k3 is a cheap stand-in for the full KL.",
                   {"the tokens are sampled from the first policy": worst["first"] < 1e-10,
                    "the tokens are sampled from the second": worst["second"] < 1e-10,
                    "the policies are close": law < 0.05 and quieter[min(quieter)],
                    "the policies are more than a nat apart": quieter[max(quieter)],
                    "it is averaged over a rollout, early in a GRPO run": early < 0.1,
                    "it is averaged over a rollout, late in the run": late < 0.1,
                    "it is used for a single token": min(token) >= 0.9},
                   f"E[k3] = KL to {worst['first']:.0e} over the first policy's answers, up to {worst['second']:.0%} off over "
                   f"the second's. With log-normal ratios, k3 needs fewer tokens than k1 below {crossing:.2f} nats. In the "
                   f"GRPO run, a rollout's mean k3 is off by {early:.0%} (median) up to step 10, by {late:.0%} after, and its "
                   f"correlation with the full KL is {across:.2f}; for single tokens the correlation is {max(token):.2f} at "
                   f"best and {token[-1]:.2f} at the end (k1: {token_k1[-1]:.2f}), where the median rollout's k3 is "
                   f"{last['median rollout'] / last['full KL']:.0%} of the KL", rows, curves)


def c33(smoke):
    policy, tokenizer = load(stage("sft", smoke))
    task, count, cool = make_task("addition"), 4 if smoke else 256, 0.7
    prompts = [tokenizer.render(problem.prompt) for problem in heldout_problems(task, count, 0)]
    rounded, (clip_low, clip_high) = copy.deepcopy(policy).bfloat16(), BANDS["mask"]
    bands = (0.8, 1.2), (1 - clip_low, 1 + clip_high)

    def sampled(model=policy, half=False, **how):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return generate(model, prompts, max_new_tokens=20 if smoke else 80, stop_ids=tokenizer.stop_ids, seed=0, **how)

    def scored(rollout, half=False, temperature=1.0):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return score_rollout(policy, rollout, temperature, 64)

    same, cold, nucleus, halves = sampled(), sampled(temperature=cool), sampled(top_p=0.9), sampled(half=True)
    coarse = sampled(rounded)
    cases = {"all is the same": (same, scored(same)),
             f"both are at temperature {cool}": (cold, scored(cold, temperature=cool)),
             f"it was sampled at temperature {cool} and scored at 1": (cold, scored(cold)),
             f"log-probs are divided by {cool} instead of logits": (cold, scored(cold) / cool),
             "sampler and scorer are in bfloat16": (halves, scored(halves, half=True)),
             "only the sampler is in bfloat16": (halves, scored(halves)),
             "only the sampler's weights are in bfloat16": (coarse, scored(coarse)),
             "it was sampled with top-p 0.9": (nucleus, scored(nucleus))}
    rows, logs = [], {}
    for name, (rollout, logp) in cases.items():
        old, new = rollout.logp[rollout.mask].double(), logp[rollout.mask].double()
        rho = importance_ratio(new, old)
        logs[name] = float((new - old).abs().max())
        rows.append({"when": name, "mean ratio": float(rho.mean()), "smallest": float(rho.min()), "largest": float(rho.max()),
                     "mismatch, k3": float(kl_k3(old, new).mean())})
        rows[-1] |= {f"outside {low:g} to {high:g}": float(((rho < low) | (rho > high)).double().mean()) for low, high in bands}

    # The mass M of each nucleus is what the ratio must be
    inputs, _ = shift(nucleus.tokens)
    with torch.no_grad():
        logits = policy.head(policy.hidden(inputs)[nucleus.mask])
    log_M = logsumexp(top_p_filter(logits, 0.9)) - logsumexp(logits)
    _, logp = cases["it was sampled with top-p 0.9"]
    law = float((logp[nucleus.mask] - nucleus.logp[nucleus.mask] - log_M).abs().max())
    bound = tolerance(torch.device("cpu"), "float32")
    _, outside, masked = list(rows[2].values())[-3:]
    return Finding("C33", "The sampler's log-probs and the scorer's agree: every ratio is 1.",
                   {name: largest < bound and law < bound for name, largest in logs.items()},
                   f"of {len(log_M):,} log-probs, none differ by more than {logs['all is the same']:.0e} where all is the "
                   f"same, and by up to {logs['sampler and scorer are in bfloat16']:.2f} in bfloat16. Sampled at {cool} and "
                   f"scored at 1, {outside:.0%} of the ratios are outside 0.8 to 1.2, {masked:.2%} outside the mask. With "
                   f"top-p the ratio is M to {law:.0e}: KL is {float(-log_M.mean()):.4f} nats per token, but k3 says "
                   f"{rows[-1]['mismatch, k3']:.4f}", rows)


def draw(findings, path):
    figure, axes = panels(3)

    curves = findings["C11"].curves
    for (name, miss), style in zip(curves["miss"].items(), ("o:", "o-", "s-"), strict=True):
        axes[0].plot(curves["drift"], miss, style, color=PALETTE[int(name[1]) - 1], markersize=4, label=name)
    axes[0].set(xscale="log", yscale="log", title="KL in the loss: off the gradient by",
                xlabel="difference of the logits, nats", ylabel="share of the gradient's length")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")

    curves = findings["C12"].curves
    for name, colour in zip(("k1", "k2", "k3"), PALETTE, strict=False):
        axes[1].plot(curves["KL"], curves[name], color=colour, label=name)
    axes[1].set(xscale="log", yscale="log", title="how many tokens a mean needs", xlabel="KL, nats (log-normal ratios)",
                ylabel="tokens for a standard error of 10 %")
    axes[1].legend(frameon=False, fontsize=8)

    rows = findings["C12"].rows
    steps = [row["GRPO steps"] for row in rows]
    axes[2].plot(steps, [row["mean k1"] for row in rows], color=PALETTE[0], marker="o", markersize=3, label="k1, mean")
    axes[2].plot(steps, [row["full KL"] for row in rows], color="0.2", linestyle="--", label="full KL")
    low, mean, high = (torch.tensor([row[name] for row in rows]) for name in ("low", "mean k3", "high"))
    axes[2].errorbar(steps, mean, yerr=torch.stack((mean - low, high - mean)), color=PALETTE[2], marker="s", markersize=4,
                     linestyle="", label="k3, mean of eight rollouts")
    axes[2].plot(steps, [row["median rollout"] for row in rows], color=PALETTE[3], marker="o", markersize=3,
                 label="k3, median rollout")
    axes[2].set(title="KL to the start of a GRPO run", xlabel="steps", ylabel="nats per token", ylim=(0, None))
    axes[2].legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)


CLAIMS = (c11, c12, c33)

if __name__ == "__main__":
    main(sys.modules[__name__])
