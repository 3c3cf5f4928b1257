"""Sampling from a power of the model.

C24  Power sampling beats low temperature at pivotal tokens, because it looks ahead: of whole answers y,

         p(y)^alpha / Z  begins with a with probability ~ p(a)^alpha S(a),      S(a) = sum_future p(future | a)^alpha,

     and temperature 1/alpha with p(a)^alpha alone. If a goes on in n equally likely ways, S(a) = n^(1-alpha).

C25  Metropolis-Hastings over the ends of answers samples p^alpha. An end from position m on is drawn from q, and accepted with

         A = min(1, (p(y') / p(y))^alpha q(y) / q(y'))

     so ends from the model itself, q = p, are accepted by the power alpha - 1 of their ratio. If q is left out, the chain
     converges to p^alpha q / Z, which is p^(alpha+1) / Z for q = p; if m is drawn from the current length, to p^alpha |y| / Z.

C26  Power sampling brings out a skill that the model has, for fewer tokens than other methods.

C24 and C25 are exact sums over all answers; chains are drawn for the figure. C26 asks the fine-tuned tiny model held-out sums.

Change `knows * dq` to `0 * dq`: C25 is refuted.
"""

import math
import sys

import torch
from torch import Tensor

from experiments.findings import Finding, main, mean_and_interval, panels, save, stage
from nanorl.evaluate import Config, load_runs
from nanorl.ops import log_softmax, logsumexp
from nanorl.plot import PALETTE
from nanorl.run import generator
from nanorl.search import position_weights, power_log_accept
from nanorl.tabular import horizon, log_probs, num_prefixes, randn, sequence_probs, sequences

V, T, STOP = 3, 4, 2    # of a random policy: tokens, the most in an answer, and, in C25, the one that ends it

# ---------------------------------------------------------------------------------------------------------------------
# Looking ahead
# ---------------------------------------------------------------------------------------------------------------------


def power_distribution(logits: Tensor, alpha: float) -> Tensor:
    """pi(y)^alpha / Z over whole sequences, which tempering token by token is not.       [N, V] -> [V^T]"""
    return log_softmax(alpha * log_probs(logits).sum(-1)).exp()


def power_conditional(logits: Tensor, alpha: float) -> Tensor:
    """Log-probs of the next token under `power_distribution`.       [N, V] -> [N, V], a table like `logits`

        pi_alpha(a | y_<t) = pi(a | y_<t)^alpha S(y_<t a) / S(y_<t),        S(prefix) = sum_future pi(future | prefix)^alpha

    The factor S looks ahead: a token is worth what can follow it. Tempering, pi^alpha alone, does not.
    """
    V, T = logits.shape[1], horizon(logits)
    table, log_S = torch.empty_like(logits), torch.zeros(V**T, dtype=logits.dtype)          # S = 1: nothing follows
    for t in reversed(range(T)):
        rows = slice(num_prefixes(V, t), num_prefixes(V, t + 1))
        table[rows] = alpha * log_softmax(logits[rows]) + log_S.view(-1, V)
        log_S = logsumexp(table[rows])
    return log_softmax(table)


def fork(branches):
    """A table of answers of two tokens: branch i has probability p and goes on in n equally likely ways.       -> [1 + W, W]"""
    width = max(len(branches), *(n for _, n in branches))
    logits = torch.zeros(1 + width, width, dtype=torch.float64)
    logits[0] = -torch.inf
    for i, (p, n) in enumerate(branches):
        logits[0, i] = torch.tensor(p, dtype=torch.float64).log()
        logits[i + 1, n:] = -torch.inf
    return logits


def c24(smoke):
    alphas, shown, rows, held, curves = [1 + k / 8 for k in range(57)], (2, 4, 8), [], {}, {}
    for name, branches in (("the right branch has one continuation (the other ten)", [(0.4, 1), (0.6, 10)]),
                           ("the right branch has ten (the other one)", [(0.6, 10), (0.4, 1)]),
                           ("both branches have ten", [(0.4, 10), (0.6, 10)])):
        logits = fork(branches)
        power = [float(power_conditional(logits, alpha)[0, 0].exp()) for alpha in alphas]
        low = [float(log_softmax(alpha * logits[0])[0].exp()) for alpha in alphas]
        weights = [[p**alpha * n ** (1 - alpha) for p, n in branches] for alpha in alphas]
        law = max(abs(p - w[0] / sum(w)) for p, w in zip(power, weights, strict=True)) < 1e-12
        held[name] = law and all(p > q + 1e-9 for p, q in zip(power[1:], low[1:], strict=True))
        rows += [{"": name, "alpha": alpha, "base": branches[0][0], "power": p, "temperature 1/alpha": q}
                 for alpha, p, q in zip(alphas, power, low, strict=True) if alpha in shown]
        curves[name] = {"power": power, "low": low}

    tables = [2 * randn(generator(seed, "C24"), num_prefixes(V, T), V) for seed in range(3 if smoke else 300)]
    base = torch.stack([sequence_probs(z) for z in tables])                                 # [seeds, V^T]
    best, apart, above_zero = base.argmax(-1, keepdim=True), {}, []
    for alpha in shown:
        power = torch.stack([power_distribution(z, alpha) for z in tables])
        low = torch.stack([sequence_probs(alpha * z) for z in tables])
        apart[alpha] = mean_and_interval((power - low).abs().sum(-1) / 2)[0]
        above_zero.append(mean_and_interval((power - low).gather(-1, best).squeeze(-1))[1] > 0)
        rows.append({"": "the likeliest answer of a random policy is right", "alpha": alpha}
                    | {name: float(x.gather(-1, best).mean())
                       for name, x in (("base", base), ("power", power), ("temperature 1/alpha", low))})
    held["the likeliest answer of a random policy is right"] = all(above_zero)
    sure, unsure, _, random = ((row["power"], row["temperature 1/alpha"]) for row in rows if row["alpha"] == 4)
    return Finding("C24", "Power sampling beats low temperature at pivotal tokens.", held,
                   "alpha = 4 takes a branch of probability .4 with one continuation, rather than one with ten, in "
                   f"{sure[0]:.1%} of cases, temperature 1/4 in {sure[1]:.1%}. If the other branch is right, these are "
                   f"{unsure[0]:.1%} and {unsure[1]:.1%}: power prefers the certain continuation, right or not. On random "
                   f"policies the two are a total variation of {apart[4]:.2f} apart, and give the likeliest answer "
                   f"{random[0]:.2f} and {random[1]:.2f}", rows, {"alphas": alphas} | curves)


# ---------------------------------------------------------------------------------------------------------------------
# The chain, exactly
# ---------------------------------------------------------------------------------------------------------------------


def answers(logits, temperature):
    """Every answer once, filled up with zeros behind its end: its tokens, where they are its own, log p and log q.
    [N, V] -> [S, T] each"""
    tokens = sequences(V, T)
    stops = (tokens == STOP).long()
    inside = stops.cumsum(-1) == stops                                                      # no stop before
    once = ((tokens == 0) | inside).all(-1)
    return tokens[once], inside[once], *((log_probs(z) * inside)[once] for z in (logits, logits / temperature))


def from_here_on(x):
    """sum_{t >= m} x_t for each m.       [S, T] -> [S, T]"""
    return x.flip(-1).cumsum(-1).flip(-1)


def kernel(tokens, inside, logp, logq, alpha, knows, at):
    """A step of the chain, whose positions are drawn from `at` [S, T] and whose acceptance leaves q out if it `knows` 0 of it.

        K(y, y') = sum_m at(m | y) q(y'_>=m | y_<m) A_m(y, y')       over the m where y has a token and y' is the same before

    Returns the proposals at(m | y) q and the acceptances A, [S, S, T] each, and K [S, S], which stays where it does not move.
    """
    agree = (tokens == tokens[:, None]).cumprod(-1).roll(1, -1)
    agree[..., 0] = 1
    proposals = (at * inside)[:, None] * agree * from_here_on(logq).exp()
    dp, dq = (from_here_on(x) - from_here_on(x)[:, None] for x in (logp, logq))
    acceptances = power_log_accept(alpha, dp, knows * dq).exp()
    K = (proposals * acceptances).sum(-1)
    return proposals, acceptances, K + torch.diag(1 - K.sum(-1))


def stationary(K):
    """pi with pi K = pi and sum pi = 1.       [S, S] -> [S]"""
    S = len(K)
    equations = torch.cat((K.T - torch.eye(S), torch.ones(1, S)))
    return torch.linalg.lstsq(equations, torch.eye(S + 1, dtype=K.dtype)[:, -1:]).solution.squeeze(-1)


def spectral_gap(K, pi):
    """1 - the second largest |eigenvalue|. In detailed balance, pi^1/2 K pi^-1/2 is symmetric and has the same ones."""
    root = pi.sqrt()
    return float(1 - torch.linalg.eigvalsh(root[:, None] * K / root).abs().sort().values[-2])


def walk(proposals, acceptances, start, steps, g):
    """One chain: where it stands after each step."""
    path = [start]
    for _ in range(steps):
        chances, accept = (x[path[-1]].flatten() for x in (proposals, acceptances))         # [S T]
        nothing = (1 - chances.sum()).clamp(min=0)[None]
        drawn = int(torch.multinomial(torch.cat((chances, nothing)), 1, generator=g))
        moves = drawn < len(chances) and torch.rand(1, generator=g) < accept[drawn]
        path.append(drawn // T if moves else path[-1])
    return path


def c25(smoke):
    ways = {"ends are drawn from the model": (False, 1, "p^alpha"),         # tempered; knows q; what the chain comes to
            "ends are drawn at temperature 1/alpha": (True, 1, "p^alpha"),
            "the exponent is alpha instead of alpha - 1": (False, 0, "p^(alpha+1)"),
            "the position is drawn from the current length": (False, 1, "p^alpha |y|")}
    rows, held, curves = [], dict.fromkeys(ways, True), {}
    for (name, (tempered, knows, law)), alpha in ((way, alpha) for way in ways.items() for alpha in (2, 4)):
        measured = []
        for seed in range(2 if smoke else 50):
            logits = randn(generator(seed, "C25"), num_prefixes(V, T), V)
            tokens, inside, logp, logq = answers(logits, 1 / alpha if tempered else 1)
            length, log_p = inside.double().sum(-1), logp.sum(-1)
            at = inside / length[:, None] if "|y|" in law else position_weights(T).expand(len(length), T)
            proposals, acceptances, K = kernel(tokens, inside, logp, logq, alpha, knows, at)
            laws = {"p^alpha": alpha * log_p, "p^(alpha+1)": (alpha + 1) * log_p, "p^alpha |y|": alpha * log_p + length.log()}
            laws, pi = {key: log_softmax(x).exp() for key, x in laws.items()}, stationary(K)
            flow = pi[:, None, None] * proposals
            measured.append([float((pi - laws["p^alpha"]).abs().sum() / 2), float((pi - laws[law]).abs().max()),
                             float((flow * acceptances).sum() / flow.sum()), spectral_gap(K, laws[law])])
            if seed == 0 and alpha == 2 and not tempered and "|y|" not in law:
                means, state = [], log_p.exp()                                              # it begins with p
                for _ in range(81):
                    means.append(float(state @ log_p))
                    state = state @ K
                typical = int((log_p - means[0]).abs().argmin())
                chain = walk(proposals, acceptances, typical, 80, generator(0, "C25", "walk"))
                curves[law] = {"mean": means, "limit": float(laws[law] @ log_p), "chain": log_p[chain],
                               "accepted": measured[0][2]}
        apart, off, accepted, gap = torch.tensor(measured, dtype=torch.float64).T
        held[name] &= bool(apart.max() < 1e-9)
        rows.append({"": name, "alpha": alpha, "total variation to p^alpha": round(float(apart.mean()), 12), "law": law,
                     "largest error of the law": round(float(off.max()), 12), "accepted": float(accepted.mean()),
                     "spectral gap": float(gap.mean()), "smallest gap": float(gap.min())})
    apart, off = [row["total variation to p^alpha"] for row in rows], max(row["largest error of the law"] for row in rows)
    return Finding("C25", "Metropolis-Hastings over the ends of answers samples p^alpha.", held,
                   f"the chain converges to the distribution in the table, to {max(off, 1e-12):.0e}: p^alpha with either kind "
                   f"of ends; p^(alpha+1) with the exponent alpha, at alpha = 2 a total variation of {apart[4]:.2f} from "
                   f"p^alpha; p^alpha |y| with positions from the current length, {apart[6]:.2f} from it. At alpha = 2 and 4, "
                   f"{rows[0]['accepted']:.0%} and {rows[1]['accepted']:.0%} of the ends from the model are accepted, "
                   f"{rows[2]['accepted']:.0%} and {rows[3]['accepted']:.0%} of the tempered ones", rows, curves)


# ---------------------------------------------------------------------------------------------------------------------
# The tiny model
# ---------------------------------------------------------------------------------------------------------------------


def c26(smoke):
    shared = dict(runs=(stage("sft", smoke),), problems=2 if smoke else 100, device="cpu",
                  max_new_tokens=4 if smoke else None)
    n, chain, rows = 2 if smoke else 128, dict(alpha=(4.0,), steps=2 if smoke else 128), []
    for digits, settings in ((3, dict(method=("greedy", "sample", "low_temperature", "majority", "power"), n=n) | chain),
                             (3, dict(method=("majority",), n=2 * n, temperature=0.25)),
                             (4, dict(method=("sample", "power"), n=n) | chain)):
        evaluation = load_runs(Config(**shared, **settings, task=f"addition-{digits}"))[0]
        evaluation.measure()
        cold = " at temperature 1/4" if "temperature" in settings else ""
        rows += [{"digits": digits, "method": row.method.removesuffix(", base") + cold, "n": row.n, "tokens": row.tokens,
                  "accuracy": row.value, "low": row.low, "high": row.high} for row in evaluation.rows]

    def last(method, digits=3):
        return [row for row in rows if (row["method"], row["digits"]) == (method, digits)][-1]

    def needed(method, digits=3):
        """Tokens per problem until more than nine in ten are right, with the whole interval."""
        return min((row["tokens"] for row in rows if (row["method"], row["digits"]) == (method, digits) and row["low"] > 0.9),
                   default=math.inf)

    names = ("power 4", "majority", "temperature 1/4", "majority at temperature 1/4")
    (power, vote, low, cold), tokens = map(last, names), {name: needed(name) for name in names}
    return Finding("C26", "Power sampling brings out a skill that the model has, for fewer tokens than other methods.",
                   {"it is compared with temperature 1/4, one answer or a vote":
                    tokens["power 4"] < min(tokens["temperature 1/4"], tokens["majority at temperature 1/4"]),
                    "it is compared with a vote at temperature 1": tokens["power 4"] < tokens["majority"],
                    "the skill is missing (sums of four digits)": needed("power 4", 4) < needed("sample", 4)},
                   f"on sums of three digits, one answer is right in {last('sample')['accuracy']:.2f} of cases, greedy in "
                   f"{last('greedy')['accuracy']:.2f}: {power['n']} steps of alpha = 4 raise it to {power['accuracy']:.2f} "
                   f"for {power['tokens']:,.0f} tokens; temperature 1/4 gives {low['accuracy']:.2f}, a vote of {cold['n']} "
                   f"such answers {cold['accuracy']:.2f} for {cold['tokens']:,.0f} tokens, one of {vote['n']} at temperature "
                   f"1 {vote['accuracy']:.2f} for {vote['tokens']:,.0f}. To be right nine times in ten, power needs "
                   f"{tokens['power 4']:,.0f} tokens and that vote {tokens['majority']:,.0f}. Four digits: "
                   f"{last('sample', 4)['accuracy']:.2f} before, {last('power 4', 4)['accuracy']:.2f} after", rows)


def draw(findings, path):
    figure, axes = panels(3)

    curves = findings["C24"].curves
    one, ten = curves["the right branch has one continuation (the other ten)"], curves["both branches have ten"]
    axes[0].plot(curves["alphas"], one["power"], color=PALETTE[0], label="power; one way on against ten")
    axes[0].plot(curves["alphas"], ten["power"], color=PALETTE[2], linestyle=":", linewidth=2.5, label="power; ten against ten")
    axes[0].plot(curves["alphas"], one["low"], color=PALETTE[1], linewidth=1, label="temperature 1/alpha; either")
    axes[0].set(title="a pivotal token of probability .4", xlabel="alpha", ylabel="probability to take it", ylim=(0, 1.02))
    axes[0].legend(frameon=False, fontsize=8, loc="center right")

    curves = findings["C25"].curves
    axes[1].plot(curves["p^alpha"]["chain"], color="0.7", linewidth=0.8, drawstyle="steps-post",
                 label="one chain, exponent alpha - 1")
    for law, exponent, colour in (("p^alpha", "alpha - 1", PALETTE[0]), ("p^(alpha+1)", "alpha", PALETTE[1])):
        axes[1].plot(curves[law]["mean"], color=colour,
                     label=f"mean, exponent {exponent}: {curves[law]['accepted']:.0%} accepted")
        axes[1].axhline(curves[law]["limit"], color=colour, linestyle="--", linewidth=0.8, label=f"mean under {law}")
    axes[1].set(title="log p along a chain, alpha = 2", xlabel="step", ylabel="log p, nats", ylim=(-5.5, None))
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")

    rows = [row for row in findings["C26"].rows if row["digits"] == 3]
    for (method, label), colour in zip((("power 4", "power, alpha = 4"), ("majority", "vote, temperature 1"),
                                        ("majority at temperature 1/4", "vote, temperature 1/4")), PALETTE, strict=False):
        line = [row for row in rows if row["method"] == method]
        y = [row["accuracy"] for row in line]
        error = [[row["accuracy"] - row["low"] for row in line], [row["high"] - row["accuracy"] for row in line]]
        axes[2].errorbar([row["tokens"] for row in line], y, error, color=colour, marker="o", markersize=3, elinewidth=0.6,
                         label=label)
    axes[2].set(title="the tiny model, sums of three digits", xlabel="tokens per problem", ylabel="accuracy, held out",
                xscale="log", ylim=(-0.02, 1.02))
    axes[2].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


CLAIMS = (c24, c25, c26)

if __name__ == "__main__":
    main(sys.modules[__name__])
