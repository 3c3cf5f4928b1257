"""Test-time compute: what a policy can do when it may answer more than once. Nothing here trains anything."""

import math

import torch
from torch import Tensor

from nanorl.gpt import GPT, ScalarGPT
from nanorl.rollout import answer, heldout_problems, learned_rewards
from nanorl.run import derive
from nanorl.tasks import Task
from nanorl.tokenizer import Tokenizer


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


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: how far best-of-n is from the policy it samples, in nats, at most.     (Beirami et al. 2024)"""
    return math.log(n) - (n - 1) / n


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
    counts = [2**k for k in range(samples.bit_length()) if 2**k < samples] + [samples]
    return {n: float(best_of_n(scores, values, n).mean()) for n in counts}
