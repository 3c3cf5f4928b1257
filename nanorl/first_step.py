"""The check of the first rollout: what must be true before anything is learned, tested on the live model, task, sampler and
objective, in a second or two. train_grpo.py runs it once per start; what changes later shows in train/mismatch_kl.

A broken rollout still trains: the reward just does not rise, or rises for the wrong reason. Each failure here is one
sentence that says what was found and what was expected.
"""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from nanorl.data import response_mask
from nanorl.errors import UserError
from nanorl.ops import token_weights
from nanorl.rollout import Experience
from nanorl.run import uses_bfloat16
from nanorl.tasks import Task


class FirstStepCheckFailed(UserError):
    """Something that must be true before training is not."""


def expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise FirstStepCheckFailed(f"first-step check: {sentence} (--no-selfcheck trains regardless)")


def tolerance(device: torch.device, dtype: str, temperature: float = 1.0) -> float:
    """How far a gradient may be off, relative to its norm. A token's log-prob may be off by four times as many nats, and those
    of all tokens by a quarter as many in the mean: rounding hits few tokens hard, a wrong temperature all of them.

    bfloat16 keeps 8 bits of a product's factors, TF32, which CUDA takes for float32, keeps 11. A temperature below 1 enlarges
    the rounding of logits.
    """
    rounding = 0.25 if uses_bfloat16(device, dtype) else 0.03 if device.type == "cuda" else 1e-4
    return rounding / min(1.0, temperature)


def difference(a: Tensor, b: Tensor, mask: Tensor, tol: float) -> tuple[float, bool]:
    """The largest difference between two views of the tokens' log-probs, and whether it is rounding (see `tolerance`)."""
    apart = (a - b).detach()[mask].abs()
    if not len(apart):
        return 0.0, True
    return apart.max().item(), apart.max().item() <= 4 * tol and apart.mean().item() <= tol / 4


def check_verifier(task: Task) -> str:
    """Gold answers are right and adversarial ones wrong, unless the task says that no answer is; a sentence that says which."""
    if task.reward:
        return f"answers are judged by {task.reward.name}, and none is right or wrong"
    if type(task).right_reward is None or (task.max_actions > 1 and task.right_reward is None):
        return f"no answer to {task} is right or wrong by itself"
    graded = list(task.graded_examples())
    if not graded:
        return f"{task} has no gold responses to try its verifier on"
    right = max(gold for _, _, (gold, *_) in graded) if task.right_reward is None else task.right_reward
    for problem, responses, rewards in graded:
        for i, (text, reward) in enumerate(zip(responses, rewards, strict=True)):
            expect((reward >= right) == (i == 0), f"the verifier gives {reward:g} to {'an adversarial' if i else 'its own'} "
                   f"{text[:60]!r} to {problem.prompt[:60]!r}, but {right:g} is right; `right_reward` in its class may differ")
    return "the verifier pays for gold answers only"


def first_step_check(experience: Experience, task: Task, stop_ids: set[int], score: Callable, objective: Callable,
                     parameters: list[Tensor], aggregate: str, max_new_tokens: int, tol: float) -> str:
    """Check the first rows of a rollout by the policy as it is now; a sentence with what was measured, or FirstStepCheckFailed.

    score(tokens, mask) -> (logp, entropy) is the trainer's view of the policy, objective(logp, old_logp, adv, mask, weights,
    ref_logp=, entropy=) -> (loss, metrics) what it minimises.

    1. By the verifier, gold answers are right and adversarial ones are not.
    2. The stop token is inside the mask, and nothing after it.
    3. The sampler's log-probs are the scorer's.
    4. A step down the loss makes tokens with A > 0 likelier and those with A < 0 less likely.
    5. At equal weights every ratio is 1, whatever rows share the batch.
    6. The gradient of a batch is the sum of its parts' gradients.
    """
    verified = check_verifier(task)
    parameters = [p for p in parameters if p.requires_grad]
    rollout = experience.rollout
    rows = torch.arange(min(16, len(rollout.tokens)), device=rollout.tokens.device)
    T = int(rollout.lengths[rows].max())
    tokens, mask, finished = rollout.tokens[rows, :T], rollout.mask[rows, : T - 1], rollout.finished[rows]

    last = rollout.lengths[rows] - 1
    stops = torch.tensor(sorted(stop_ids), device=rows.device)
    expect(bool(torch.isin(tokens[rows[finished], last[finished]], stops).all()),
           "an answer is called finished without a stop token")
    expect(bool(mask[rows, last - 1].all()), "an answer's last token, its stop token if it has one, is outside the mask")
    within = response_mask(rollout.prompt_lengths[rows], rollout.lengths[rows], T)
    several = torch.tensor([len(each) > 1 for each in experience.action_rewards[: len(rows)]], device=rows.device)
    expect(not (mask & ~within).any() and torch.equal((within & ~mask).any(-1), several),
           "the mask has more or fewer tokens than were sampled")
    ends = rollout.action_ends()[rows, : T - 1].scatter(1, last[:, None] - 1, False)
    expect(bool(torch.isin(tokens[:, 1:][ends], stops).all()), "an action before an observation does not end with a stop token")

    logp, entropy = score(tokens, mask)
    parity, rounding = difference(rollout.logp[rows, : T - 1], logp, mask, tol)
    expect(rounding, f"sampler and scorer differ by up to {parity:.2g} nats at a token, expected at most {4 * tol:.2g}, and "
                     f"{tol / 4:.2g} in the mean: is the same temperature, and are the same weights, used in both?")

    adv = torch.linspace(1.0, 2.0, len(rows), device=rows.device)[:, None]      # of one sign: like answers must not cancel
    weights = token_weights(mask, rollout.prompt_index[rows], aggregate, max_new_tokens)

    def slope(adv: Tensor) -> Tensor:
        loss, _ = objective(logp, logp.detach(), adv, mask, weights, ref_logp=logp.detach(), entropy=entropy)
        return torch.autograd.grad(loss, logp, retain_graph=True, materialize_grads=True)[0]

    signed = torch.where(rows[:, None] % 2 == 0, adv, -adv)
    uphill = mask & ((slope(signed) - slope(0 * signed)) * signed > 0)      # the difference is free of KL and entropy terms
    expect(not uphill.any(), "a step down the loss makes tokens with A > 0 less likely, or those with A < 0 likelier: is the "
                             "loss minus what is to be maximised, and does it keep the sign of A?")

    def gradients(logp: Tensor, entropy: Tensor, part: Tensor, width: int) -> list[Tensor]:
        old = logp.detach()
        loss, _ = objective(logp, old, adv[part], mask[part, :width], weights[part, :width], ref_logp=old, entropy=entropy)
        return torch.autograd.grad(loss, parameters, materialize_grads=True)

    whole, alone = gradients(logp, entropy, rows, T - 1), torch.zeros_like(logp)
    total = [torch.zeros_like(g) for g in whole]
    for part in rows.split(-(-len(rows) // 3)):
        width = int(rollout.lengths[part].max()) - 1
        part_logp, part_entropy = score(tokens[part, : width + 1], mask[part, :width])
        alone[part, :width] = part_logp.detach()
        total = [t + g for t, g in zip(total, gradients(part_logp, part_entropy, part, width), strict=True)]
    drift, rounding = difference(alone, logp, mask, tol)
    expect(rounding, f"the same weights give ratios as far from 1 as e^{drift:.2g} in a batch of other rows, expected at most "
                     f"e^{4 * tol:.2g}, and e^{tol / 4:.2g} in the mean: does it depend on padding, or is there dropout?")
    norm = torch.stack([g.norm() for g in whole]).norm()
    # A policy that is sure of itself has hardly any gradient: below 0.01, what is left is rounding.
    off = (torch.stack([(t - g).norm() for t, g in zip(total, whole, strict=True)]).norm() / norm.clamp(min=0.01)).item()
    expect(off <= tol, f"the gradient of a batch and the sum of its parts' differ by {off:.2g} of the norm, expected at "
                             f"most {tol:.2g}: is something averaged inside the objective?")
    unread = "" if task.reward or any(task.ballot(text) for text in experience.answers) else (
        " But no response of this rollout has an answer that the verifier reads, so nothing can be learned from it: fine-tune "
        f"on responses like {task.direct(experience.problems[0], Random(0))[:60]!r} first.")
    return (f"First-step check: sampler and scorer agree to {parity:.1g} nats, ratios are 1 to {drift:.1g}, micro-batches add "
            f"up to {off:.1g}; {verified}.{unread}")
