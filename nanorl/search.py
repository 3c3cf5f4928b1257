"""Test-time compute: what a policy can do when it may answer more than once. Nothing here trains anything."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import torch
from torch import Tensor

from nanorl.gpt import GPT, ScalarGPT
from nanorl.rollout import answer, heldout_problems, learned_rewards, score_rollout
from nanorl.run import derive, generator
from nanorl.sample import Rollout, generate
from nanorl.tasks import Problem, Task
from nanorl.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Many answers, of which a scorer picks one, or a vote
# ---------------------------------------------------------------------------------------------------------------------


def best_of_n(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """What the best-scored of n answers is worth on average, from N >= n sampled ones.       [P, N], [P, N] -> [P]

        sum_i  C(i-1, n-1) / C(N, n)  v_(i)        v_(i) the value of the answer with the i-th lowest score

    That is the exact mean over all choices of n of the N answers, and so unbiased for n fresh ones; among equal scores any
    may win. Only the order of the scores matters. With values = scores it never falls with n; with 0/1 values and scores it
    is pass@n.       (Nakano et al. 2021, appendix I; Chen et al. 2021, eq. 1)
    """
    N = scores.shape[-1]
    if not 1 <= n <= N:
        raise ValueError(f"best_of_n: n={n}; expected 1 to {N}, the number of answers")
    tied = (scores[..., :, None] == scores[..., None, :]).double()                          # [P, N, N]
    values = (tied @ values.double()[..., None]).squeeze(-1) / tied.sum(-1)
    weight = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.float64, device=values.device)
    return values.gather(-1, scores.argsort(-1)) @ weight


def pass_at_k(right: Tensor, k: int) -> Tensor:
    """The chance that one of k answers is right, from N >= k answers of which c are right.       [P, N] of 0 and 1 -> [P]

        pass@k = 1 - C(N - c, k) / C(N, k)                                                (Chen et al. 2021, eq. 1)

    Unbiased, unlike 1 - (1 - c/N)^k. It is best-of-k for those who have the verifier at hand.
    """
    return best_of_n(right, right, k)


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: how far best-of-n is from the policy it samples, in nats, at most.     (Beirami et al. 2024)"""
    return math.log(n) - (n - 1) / n


def majority_vote(ballots: Sequence[str | None], weights: Sequence[float] | None = None) -> list[str]:
    """The answers with the most votes, in alphabetical order: several where they tie, none where nobody has voted.

        argmax_a sum_i w_i 1[ballot_i = a]          w_i = 1 without weights                 (Wang et al. 2022)

    None is no vote. The order of the ballots does not matter, not even to rounding.
    """
    weights = [1.0] * len(ballots) if weights is None else weights
    votes: dict[str, list[float]] = {}
    for ballot, weight in zip(ballots, weights, strict=True):
        if ballot is not None:
            votes.setdefault(ballot, []).append(weight)
    totals = {ballot: math.fsum(each) for ballot, each in votes.items()}
    return sorted(ballot for ballot, total in totals.items() if total == max(totals.values()))


def vote_value(ballots: Sequence[str | None], values: Sequence[float], weights: Sequence[float] | None = None,
               ties: Literal["draw", "lost"] = "draw") -> float:
    """What the winner of a vote is worth on average; equal ballots have equal values. Without a winner, 0.

    ties: "draw", one of the tied answers is given, each with the same chance; "lost", a tie gives no answer at all.
    """
    winners = majority_vote(ballots, weights)
    if not winners or (ties == "lost" and len(winners) > 1):
        return 0.0
    return sum(values[ballots.index(winner)] for winner in winners) / len(winners)


def best_of_n_curve(model: GPT, tokenizer: Tokenizer, task: Task, *, samples: int, problems: int, seed: int, size: int = 64,
                    reward_model: ScalarGPT | None = None, **how) -> dict[int, float]:
    """The mean reward of the best of 1, 2, 4, ... `samples` answers to held-out problems, as the task grades them.

    Chosen by the reward model where there is one, by the task itself otherwise: a verifier, or the hidden reward.
    """
    asked, values, scores = heldout_problems(task, problems, seed), [], []
    for i in range(0, problems, size):          # few at a time: their caches take memory
        experience = answer(model, tokenizer, task, asked[i : i + size], samples=samples,
                            seed=derive(seed, "best_of_n", i), **how)
        values.append(experience.rewards)
        if reward_model:
            scores.append(learned_rewards(reward_model, experience.rollout, size).cpu().view_as(experience.rewards))
    values = torch.cat(values)
    scores = torch.cat(scores) if reward_model else values
    return {n: float(best_of_n(scores, values, n).mean()) for n in doublings(samples)}


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return [2**k for k in range(most.bit_length()) if 2**k < most] + [most]


# ---------------------------------------------------------------------------------------------------------------------
# A way of answering, elicited
# ---------------------------------------------------------------------------------------------------------------------


def opening(task: Task, tokenizer: Tokenizer, problem: Problem, way: Literal["direct", "worked"]) -> list[int]:
    """The first token ids of a response that answers in this way: up to the token at which the two ways part.

    Whoever begins to work must go on working. No more of the solution is given away than that one token.
    """
    rng = Random(problem.prompt)
    direct, worked = (tokenizer.encode(respond(problem, rng)) for respond in (task.direct, task.work))
    part = next(i for i, (a, b) in enumerate(zip(direct, worked, strict=False)) if a != b)
    return (direct if way == "direct" else worked)[: part + 1]


# ---------------------------------------------------------------------------------------------------------------------
# Power sampling
# ---------------------------------------------------------------------------------------------------------------------


def power_log_accept(alpha: float, delta_p: Tensor, delta_q: Tensor) -> Tensor:
    """log of the probability to move from y to y'.       [B], [B] -> [B]

        log A = min(0, alpha delta_p - delta_q)             delta_p = log p(y') - log p(y),  delta_q = log q(y') - log q(y)

    for the target p^alpha / Z and proposals that draw the tokens from position m on anew, from q: what stands before m is
    the same in both, and cancels. For q = p that is min(0, (alpha - 1) delta_p), so that alpha = 1 always moves; for
    q = p^alpha / Z_t token by token, the powers cancel and the sum of log Z_t(y') - log Z_t(y) is left.
    (Metropolis et al. 1953; Hastings 1970, eq. 6)
    """
    return (alpha * delta_p - delta_q).clamp(max=0.0)


def position_weights(T: int) -> Tensor:
    """P(m) ~ 1 / (m + 1): the first tokens, which decide the most, are drawn anew most often.       -> [T]"""
    weights = 1 / torch.arange(1, T + 1, dtype=torch.float64)
    return weights / weights.sum()


@dataclass
class Chains:
    """Markov chains side by side, each of them at a whole response to its prompt."""

    rollout: Rollout    # where the chains stand; its logp are those of the distribution that proposed the tokens
    logp: Tensor        # [B] log p(y) of the responses, in nats
    proposed: Tensor    # [B] bool: this step proposed something ...
    accepted: Tensor    # [B] bool: ... and moved there
    sampled: Tensor     # [B] tokens that each chain has sampled so far


@torch.no_grad()
def power_sample(model: GPT, prompts: list[list[int]], *, alpha: float, steps: int, temperature: float = 1.0, chains: int = 1,
                 max_new_tokens: int, stop_ids: set[int], seed: int = 0, size: int = 64,
                 compile: bool = False) -> Iterator[Chains]:
    """Metropolis-Hastings chains whose stationary distribution is p(y)^alpha / Z over whole responses.

    y is a response that ends with a stop token, or is cut at `max_new_tokens`; p is the model at temperature 1. A step draws
    a position m, keeps y_<m and proposes another end, sampled at `temperature`: 1 proposes from p, 1/alpha from the tempered
    model. m is drawn from all `max_new_tokens` positions, whatever y is, so that its probability cancels also where lengths
    differ; where y has ended before m there is nothing to draw anew, and the chain stays.

    Yields `chains` chains for each prompt, side by side, as they begin and after each step. `size` rows are scored at a time.
    (Karan and Du 2025, "Reasoning with Sampling"; they draw m from the current length, which is only nearly exact)
    """
    if not (0 < alpha < math.inf and 0 < temperature < math.inf):
        raise ValueError(f"power_sample: alpha={alpha}, temperature={temperature}; expected finite numbers above 0")
    prompts = [prompt for prompt in prompts for _ in range(chains)]
    B, T = len(prompts), max(map(len, prompts)) + max_new_tokens

    def extend(starts: list[list[int]], limits: list[int], step: int) -> tuple[Rollout, Tensor]:
        """Ends for these starts, as rows of T tokens, and log p of their tokens, 0 elsewhere."""
        y = generate(model, starts, max_new_tokens=limits, temperature=temperature, stop_ids=stop_ids,
                     seed=derive(seed, "power", step), compile=compile)
        p = y.logp if temperature == 1 else score_rollout(model, y, 1.0, size)
        missing = T - y.tokens.shape[1]
        tokens, q, p = (torch.nn.functional.pad(x, (0, missing)) for x in (y.tokens, y.logp, p))
        return replace(y, tokens=tokens, logp=q), p

    y, p = extend(prompts, [max_new_tokens] * B, 0)
    y.prompt_index = y.prompt_index // chains
    sampled = y.lengths - y.prompt_lengths
    yield Chains(y, p.sum(-1), torch.zeros_like(y.finished), torch.zeros_like(y.finished), sampled)

    device, rng, weights = y.tokens.device, generator(seed, "power"), position_weights(max_new_tokens)
    for step in range(1, steps + 1):
        positions = torch.multinomial(weights, B, replacement=True, generator=rng).to(device)          # [B] m
        u = torch.rand(B, dtype=torch.float64, generator=rng).to(device)
        starts = y.prompt_lengths + positions
        proposed = starts < y.lengths
        accepted = torch.zeros_like(proposed)
        if proposed.any():
            kept = [row[:start] for row, start in zip(y.tokens[proposed].tolist(), starts[proposed].tolist(), strict=True)]
            new, new_p = extend(kept, (max_new_tokens - positions[proposed]).tolist(), step)
            redrawn = torch.arange(T - 1, device=device) >= starts[proposed, None] - 1                 # [R, T-1]
            old_q, old_p = y.logp[proposed], p[proposed]
            delta_p, delta_q = ((after - before * redrawn).double().sum(-1)
                                for after, before in ((new_p, old_p), (new.logp, old_q)))
            moves = u[proposed].log() < power_log_accept(alpha, delta_p, delta_q)
            accepted[proposed] = moves

            def move(old: Tensor, new: Tensor, to: Tensor = accepted, moves: Tensor = moves) -> Tensor:
                return old.masked_scatter(to.view(-1, *[1] * (old.ndim - 1)), new[moves])

            y = replace(y, tokens=move(y.tokens, new.tokens), lengths=move(y.lengths, new.lengths),
                        finished=move(y.finished, new.finished), logp=move(y.logp, torch.where(redrawn, new.logp, old_q)))
            p = move(p, torch.where(redrawn, new_p, old_p))
            sampled = sampled.clone()
            sampled[proposed] += new.lengths - new.prompt_lengths
        yield Chains(y, p.sum(-1), proposed, accepted, sampled)


def autocorrelation(x: Tensor) -> Tensor:
    """How much a chain remembers after k steps.       x [S, P, C], C chains for each of P prompts over S steps -> [S]

        rho_k = mean (x_s - mu)(x_{s+k} - mu) / mean (x_s - mu)^2         mu: the mean of a prompt over its chains and steps

    1 at k = 0. Prompts count by their variance; nan where nothing varies.
    """
    d = x.double() - x.double().mean((0, 2), keepdim=True)
    S = len(d)
    return torch.stack([(d[: S - k] * d[k:]).mean() for k in range(S)]) / d.square().mean()
