"""Test-time compute: what a policy can do if it may answer more than once. Nothing here trains anything."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from nanorl.errors import UserError
from nanorl.gpt import GPT, ScalarGPT
from nanorl.rollout import learned_rewards, lenient_values, right_or_reward, sample_and_grade, score_rollout
from nanorl.run import derive, generator, in_float32
from nanorl.sample import Rollout, Sampling, generate
from nanorl.tasks import Problem, Task
from nanorl.tokenizer import Tokenizer

ROWS, MICRO_BATCH = 1024, 64    # answers sampled, and scored, at a time: caches and hidden states take memory

# ---------------------------------------------------------------------------------------------------------------------
# Many answers, from which a scorer or a vote picks one
# ---------------------------------------------------------------------------------------------------------------------


def best_of_n(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """The expected value of the best-scored of n answers, from N >= n sampled ones.       [P, N], [P, N] -> [P]

        sum_i  C(i-1, n-1) / C(N, n)  v_(i)        v_(i) the value of the answer with the i-th lowest score

    This is the exact mean over all choices of n of the N answers, and so unbiased for n fresh ones; ties between scores are
    broken at random. Only the order of the scores matters. With values = scores it never falls with n; with 0/1 values and
    scores it is pass@n.       (Nakano et al. 2021, appendix I; Chen et al. 2021, eq. 1)
    """
    (scores, values), N = (x.cpu() for x in (scores, values)), scores.shape[-1]
    ties = ((s[:, None] == s).double() for s in scores)                                     # [N, N] of each problem
    values = torch.stack([tied @ v / tied.sum(-1) for tied, v in zip(ties, values.double(), strict=True)])
    weight = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.float64)
    return values.gather(-1, scores.argsort(-1)) @ weight


def pass_at_k(right: Tensor, k: int) -> Tensor:
    """The chance that at least one of k answers is right, from N >= k, of which c are right.       [P, N] of 0 and 1 -> [P]

        pass@k = 1 - C(N - c, k) / C(N, k)                                                (Chen et al. 2021, eq. 1)

    Unbiased, unlike 1 - (1 - c/N)^k. It is best-of-k with the verifier as the scorer. ValueError for rewards of another kind.
    """
    if not ((right == 0) | (right == 1)).all():
        raise ValueError("pass@k counts right answers: expected 1 for a right one and 0 for a wrong one")
    return best_of_n(right, right, k)


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: an upper bound, in nats, on the KL of best-of-n from the policy.     (Beirami et al. 2024)"""
    return math.log(n) - (n - 1) / n


def majority_vote(ballots: Sequence[str | None], weights: Sequence[float] | None = None) -> list[str]:
    """The answers with the most votes, in alphabetical order: several if they tie, none if there are no votes.

        argmax_a sum_i w_i 1[ballot_i = a]          w_i = 1 without weights                 (Wang et al. 2022)

    A ballot of None does not vote. The order of the ballots does not matter, not even in rounding.
    """
    weights = [1.0] * len(ballots) if weights is None else weights
    votes: dict[str, list[float]] = {}
    for ballot, weight in zip(ballots, weights, strict=True):
        if ballot is not None:
            votes.setdefault(ballot, []).append(weight)
    totals = {ballot: math.fsum(each) for ballot, each in votes.items()}
    return sorted(ballot for ballot, total in totals.items() if total == max(totals.values()))


def vote_value(ballots: Sequence[str | None], values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The expected value of the winner of a vote: the mean over its ballots, which differ only where an episode earns more than
    its last action. Tied answers are equally likely to win; 0 without a winner."""
    winners = majority_vote(ballots, weights)
    return fmean([fmean([v for b, v in zip(ballots, values, strict=True) if b == winner]) for winner in winners] or [0.0])


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return [2**k for k in range(most.bit_length()) if 2**k < most] + [most]


# ---------------------------------------------------------------------------------------------------------------------
# Asking a model for any number of answers, in a given style
# ---------------------------------------------------------------------------------------------------------------------


Style = Literal["direct", "worked"]


def opening(task: Task, tokenizer: Tokenizer, problem: Problem, style: Style) -> list[int]:
    """The first token ids of a response in this style, up to the first at which a direct and a worked demonstration differ.
    A model that continues from there answers in that style, and learns nothing about the solution beyond that token.

    UserError if there are no demonstrations, or if they do not differ.
    """
    direct, worked = (tokenizer.encode(respond(problem, Random(problem.prompt))) for respond in (task.direct, task.work))
    for i, (a, b) in enumerate(zip(direct, worked, strict=False)):
        if a != b:
            return (direct if style == "direct" else worked)[: i + 1]
    raise UserError(f"{task}: the worked and the direct answer to {problem.prompt!r} do not differ")


@dataclass
class Answers:
    """N answers to each of P problems."""

    values: Tensor              # [P, N] 1 if right, 0 if wrong; the reward where the task calls no answer right
    tokens: Tensor              # [P, N] tokens of each, including forced ones
    logp: Tensor                # [P, N] log-prob of the sampled tokens under the sampling distribution, in nats
    ballots: list[list[str | None]]    # P lists of N: what each votes for, None if it was cut or has no answer
    learned: Tensor | None      # [P, N] their learned rewards
    lenient: Tensor | None = None    # [P, N] 1 if right but perhaps for the format, else 0


def sample_answers(model: GPT, tokenizer: Tokenizer, task: Task, problems: list[Problem], sampling: Sampling, *, samples: int,
                   seed: int, purpose: str, style: Style | None = None, reward_model: ScalarGPT | None = None,
                   quiet: bool = True) -> Answers:
    """Sample N = `samples` answers to each problem, as many problems at a time as fit into ROWS answers.

    With a `style`, the answers are forced to begin in it. `purpose` selects the random stream and names the progress bar.
    """
    size, shape = max(1, ROWS // samples), (len(problems), samples)
    values, tokens, logp, ballots, learned, lenient = [], [], [], [], [], []
    for i in tqdm(range(0, len(problems), size), desc=purpose, disable=quiet, leave=False):
        asked = problems[i : i + size]
        begun = [opening(task, tokenizer, problem, style) if style else [] for problem in asked]
        found = sample_and_grade(model, tokenizer, task, asked, sampling, samples=samples, openings=begun,
                                 seed=derive(seed, purpose, i))
        said, forced = found.rollout, torch.tensor([len(ids) for ids in begun]).repeat_interleave(samples)
        values.append(right_or_reward(task, found.rewards))
        lenient.append(lenient_values(found))
        tokens.append(said.mask.sum(-1).cpu() + forced)
        logp.append(said.logp.sum(-1).cpu())
        ballots += [task.ballot(answer) if done else None
                    for answer, done in zip(found.answers, said.finished.tolist(), strict=True)]
        if reward_model:
            learned.append(learned_rewards(reward_model, said, MICRO_BATCH).cpu())
    return Answers(torch.cat(values), torch.cat(tokens).view(shape), torch.cat(logp).view(shape),
                   [ballots[row : row + samples] for row in range(0, len(ballots), samples)],
                   torch.cat(learned).view(shape) if reward_model else None,
                   None if lenient[0] is None else torch.cat(lenient))


def best_of_n_curve(model: GPT, tokenizer: Tokenizer, task: Task, problems: list[Problem], sampling: Sampling, *, samples: int,
                    seed: int, reward_model: ScalarGPT | None = None) -> dict[int, float]:
    """The accuracy, or else the mean reward, of the best of 1, 2, 4, ... `samples` answers to each problem.

    The reward model chooses the best if there is one, otherwise the task itself: its verifier, or the hidden reward. Problems
    of which an answer could not be scored are left out; where none is left, there is no curve.
    """
    found = sample_answers(model, tokenizer, task, problems, sampling, samples=samples, seed=seed, purpose="best_of_n",
                           reward_model=reward_model)
    scored = ~found.values.isnan().any(-1)
    values, scores = found.values[scored], (found.values if found.learned is None else found.learned)[scored]
    return {n: float(best_of_n(scores, values, n).mean()) for n in doublings(samples) if scored.any()}


# ---------------------------------------------------------------------------------------------------------------------
# Power sampling
# ---------------------------------------------------------------------------------------------------------------------


def power_log_accept(alpha: float, delta_p: Tensor, delta_q: Tensor) -> Tensor:
    """The log of the probability of accepting a move from y to y'.       [B], [B] -> [B]

        log A = min(0, alpha delta_p - delta_q)             delta_p = log p(y') - log p(y),  delta_q = log q(y') - log q(y)

    for the target p^alpha / Z and proposals that redraw the tokens from position m on, from q; the tokens before m are common
    to both, so their terms cancel. For q = p it is min(0, (alpha - 1) delta_p), so with alpha = 1 every move is accepted; for
    q = p^alpha / Z_t token by token, the powers cancel and the sum of log Z_t(y') - log Z_t(y) is left.
    (Metropolis et al. 1953; Hastings 1970)
    """
    return (alpha * delta_p - delta_q).clamp(max=0.0)


def position_weights(T: int) -> Tensor:
    """P(m) ~ 1 / (m + 1): the first tokens, which decide the most, are redrawn most often.       -> [T]"""
    weights = 1 / torch.arange(1, T + 1, dtype=torch.float64)
    return weights / weights.sum()


@dataclass
class Chains:
    """Markov chains side by side; the state of each is a whole response to its prompt."""

    rollout: Rollout    # the states of the chains; its logp are those of the distribution that proposed the tokens
    logp: Tensor        # [B] log p(y) of the responses, in nats
    proposed: Tensor    # [B] bool: this step made a proposal ...
    accepted: Tensor    # [B] bool: ... and accepted it
    sampled: Tensor     # [B] tokens that each chain has sampled so far


def power_sample(model: GPT, prompts: list[list[int]], *, alpha: float, steps: int, temperature: float = 1.0, chains: int = 1,
                 max_new_tokens: int, stop_ids: set[int], seed: int = 0) -> Iterator[Chains]:
    """Metropolis-Hastings chains whose stationary distribution is p(y)^alpha / Z over whole responses.

    y is a response that ends with a stop token, or is cut at `max_new_tokens`; p is the model at temperature 1. A step draws
    a position m, keeps y_<m and proposes another end, sampled at `temperature`: 1 proposes from p, 1/alpha from the tempered
    model. m is drawn from all `max_new_tokens` positions, whatever y is, so that its probability cancels even if lengths
    differ; if y has ended before m, there is nothing to redraw and the chain stays where it is.

    Yields `chains` chains for each prompt, side by side, first as they start and then after each step.
    (Karan and Du 2025, "Reasoning with Sampling"; they draw m from the current length, which is only nearly exact)
    """
    starts = [prompt for prompt in prompts for _ in range(chains)]
    B, T = len(starts), max(map(len, starts)) + max_new_tokens
    rng, weights = generator(seed, "power"), position_weights(max_new_tokens)

    def finish(starts: list[list[int]], limits: list[int], step: int) -> tuple[Rollout, Tensor]:
        """Ends for these starts, as rows of T tokens, and log p of the sampled tokens, 0 elsewhere.       -> [R, T-1]

        In float32: acceptance compares p with q, and in half precision rounding would decide.
        """
        with in_float32(model.head.weight.device):
            y = generate(model, starts, max_new_tokens=limits, temperature=temperature, stop_ids=stop_ids,
                         seed=derive(seed, "power", step))
            logp = y.logp if temperature == 1 else score_rollout(model, y, 1.0, MICRO_BATCH)
        missing = T - y.tokens.shape[1]
        y = replace(y, **{name: pad(getattr(y, name), (0, missing)) for name in ("tokens", "mask", "logp")})
        return y, pad(logp, (0, missing))

    y, logp = finish(starts, [max_new_tokens] * B, 0)
    y.prompt_index = y.prompt_index // chains
    sampled, nowhere = y.lengths - y.prompt_lengths, torch.zeros_like(y.finished)
    yield Chains(y, logp.sum(-1), nowhere, nowhere, sampled)
    for step in range(1, steps + 1):
        m = torch.multinomial(weights, B, replacement=True, generator=rng).to(logp.device)             # [B]
        u = torch.rand(B, dtype=torch.float64, generator=rng)
        proposed, accepted, sampled = y.prompt_lengths + m < y.lengths, nowhere.clone(), sampled.clone()
        rows = proposed.nonzero().squeeze(-1)                                                          # [R]
        if len(rows):
            ends = (y.prompt_lengths + m)[rows]
            starts = [row[:end] for row, end in zip(y.tokens[rows].tolist(), ends.tolist(), strict=True)]
            new, new_logp = finish(starts, (max_new_tokens - m[rows]).tolist(), step)
            sampled[rows] += new.lengths - new.prompt_lengths

            kept = torch.arange(T - 1, device=logp.device) < ends[:, None] - 1                         # [R, T-1]
            new_logp, new.logp = torch.where(kept, logp[rows], new_logp), torch.where(kept, y.logp[rows], new.logp)
            new.mask = torch.where(kept, y.mask[rows], new.mask)
            delta_p, delta_q = ((after - before[rows]).cpu().double().sum(-1)
                                for before, after in ((logp, new_logp), (y.logp, new.logp)))
            moves = (u[rows.cpu()].log() < power_log_accept(alpha, delta_p, delta_q)).to(rows.device)
            to = rows[moves]
            accepted[to] = True
            y = replace(y, **{name: getattr(y, name).index_copy(0, to, getattr(new, name)[moves])
                              for name in ("tokens", "lengths", "mask", "finished", "logp")})
            logp = logp.index_copy(0, to, new_logp[moves])
        yield Chains(y, logp.sum(-1), proposed, accepted, sampled)


def autocorrelation(x: Tensor) -> Tensor:
    """The autocorrelation of chains after k steps.       x [S, P, C], C chains for each of P prompts over S steps -> [S]

        rho_k = mean (x_s - mu)(x_{s+k} - mu) / mean (x_s - mu)^2         mu: the mean of a prompt over its chains and steps

    1 at k = 0. Prompts count in proportion to their variance; nan if nothing varies.
    """
    d = x.double() - x.double().mean((0, 2), keepdim=True)
    S = len(d)
    return torch.stack([(d[: S - k] * d[k:]).mean() for k in range(S)]) / d.square().mean()
