"""One step of experience: draw problems, sample answers, grade them, score them. Shared by every script that samples.

P prompts with G samples each make B = P * G rows, prompt-major: the samples of a prompt stand side by side.
"""

from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanorl.batches import micro_batches
from nanorl.errors import UserError
from nanorl.gpt import GPT, ScalarGPT
from nanorl.run import derive, ranks
from nanorl.sample import Rollout, Sampling, generate, token_log_probs
from nanorl.tasks import Problem, Task
from nanorl.tokenizer import Tokenizer
from nanorl.turns import Episodes


@dataclass
class Experience:
    task: Task
    rollout: Rollout
    problems: list[Problem]     # [P]
    texts: list[str]            # [B] the responses, decoded for the reader, observations included; training uses the ids
    rewards: Tensor             # [P, G], nan where a response could not be scored
    action_rewards: list[list[float]]       # [B] the rewards of its actions, whose sum is its reward: a response is one action
    ends: list[str]             # [B] why no action follows: one of turns.ENDS
    answers: list[str]          # [B] the last action of each episode: of one action, the whole text
    parts: dict[str, Tensor] = field(default_factory=dict)      # [P, G] each: named terms of the rewards, if any
    resampled: int = 0          # further groups that were sampled and not used ...
    resampled_tokens: int = 0   # ... and the tokens of their answers

    def token_rewards(self) -> Tensor:
        """The reward of each action at its last token, 0 elsewhere.       -> [B, T-1]"""
        zeros = torch.zeros_like(self.rollout.logp)
        each = [reward for row in self.action_rewards for reward in row]
        return zeros.masked_scatter(self.rollout.action_ends(), zeros.new_tensor(each))


def right_or_reward(task: Task, rewards: Tensor) -> Tensor:
    """What answers are worth in an evaluation: 1 if right and 0 if wrong; their rewards where the task calls none right. One
    that could not be scored stays nan."""
    if task.right_reward is None:
        return rewards
    return (rewards >= task.right_reward).to(rewards.dtype).masked_fill(rewards.isnan(), torch.nan)


def lenient_values(experience: Experience) -> Tensor | None:
    """1 for an answer that is right in any format, else 0; None where the task reads one format only.       -> [P, G]"""
    P, G = experience.rewards.shape
    values = [experience.task.lenient(experience.problems[row // G], text) for row, text in enumerate(experience.answers)]
    return None if None in values else torch.tensor(values).view(P, G)


ATTEMPTS = 20       # with `resample`: how often to draw `prompts` problems before giving up


class NoContrast(UserError):
    """Hardly any group has answers of different reward."""


def has_contrast(rewards: Tensor) -> Tensor:
    """True where the rewards of a group differ: only there a comparison within the group can teach.       [P, G] -> [P]"""
    return rewards.nan_to_num(nan=-torch.inf).amax(-1) > rewards.nan_to_num(nan=torch.inf).amin(-1)


def sample_and_grade(model: GPT, tokenizer: Tokenizer, task: Task, problems: list[Problem], sampling: Sampling, *,
                     samples: int = 1, seed: int = 0, openings: list[list[int]] | None = None) -> Experience:
    """Sample responses to these problems and grade them.

    Where the task's environment answers to a response, it goes on (nanorl/turns.py). With `openings`, the responses to a
    problem begin with these given token ids, which the rollout counts as part of the prompt. Each process answers its part of
    the problems, and all of them get all responses, the same as those of one process.
    """
    openings = openings or [[] for _ in problems]
    mine, found = torch.arange(len(problems)).tensor_split(ranks.count())[ranks.rank()].tolist(), None
    if mine:                            # else there are more processes than problems
        rows = [p for p in mine for _ in range(samples)]
        episodes = Episodes(task, tokenizer, [problems[p] for p in rows], [openings[p] for p in rows])
        prompts = [tokenizer.render(problems[p].conversation) + openings[p] for p in mine]
        rollout = generate(model, prompts, **vars(sampling), stop_ids=tokenizer.stop_ids, samples_per_prompt=samples, seed=seed,
                           first_row=samples * mine[0], max_episode_tokens=task.max_episode_tokens,
                           observe=episodes.observe if task.max_actions > 1 else None)
        texts = [tokenizer.decode(openings[p] + ids) for p, ids in zip(rows, rollout.responses(), strict=True)]
        each, parts, ends, answers = episodes.grade(rollout)
        rewards = torch.tensor([sum(row) for row in each]).view(len(mine), samples)
        found = Experience(task, rollout, [problems[p] for p in mine], texts, rewards, each, ends, answers,
                           {name: torch.tensor(part).view(len(mine), samples) for name, part in parts.items()})
    if ranks.count() == 1:
        return found
    sent = found and replace(found, task=None, rollout=found.rollout.to("cpu"))
    gathered = [replace(e, task=task, rollout=e.rollout.to(model.head.weight.device)) for e in ranks.gathered(sent) if e]
    return _join([(e, p) for e in gathered for p in range(len(e.problems))])


def collect(policy: GPT, tokenizer: Tokenizer, task: Task, sampling: Sampling, *, prompts: int, samples: int, seed: int,
            resample: bool = False, state: dict[str, Any] | None = None) -> Experience:
    """One step of experience on freshly drawn training problems. `state` counts those drawn: a file goes on where it stopped.

    With `resample`, groups without contrast are replaced by new draws until all `prompts` have it (DAPO's dynamic
    sampling, Yu et al. 2025, section 3.2).
    """
    state, kept, tokens = {} if state is None else state, [], 0
    drawn = state.get("drawn", 0)
    draws = task.training_problems(Random(seed), drawn)
    for attempt in range(ATTEMPTS):
        problems = list(islice(draws, prompts))
        experience = sample_and_grade(policy, tokenizer, task, problems, sampling, samples=samples,
                                      seed=derive(seed, attempt) if attempt else seed)
        if resample:
            kept += [(experience, p) for p in has_contrast(experience.rewards).nonzero().squeeze(-1).tolist()]
            tokens += int(experience.rollout.mask.sum())
            if len(kept) < prompts:
                continue
            experience = _join(kept[:prompts])
            experience.resampled, experience.resampled_tokens = attempt * prompts, tokens - int(experience.rollout.mask.sum())
        state["drawn"] = drawn + (attempt + 1) * prompts
        return experience
    raise NoContrast(f"only {len(kept)} of {ATTEMPTS * prompts} groups had contrast, {prompts} are wanted: the task is too "
                     "easy or too hard for this policy by now; go on with --groups all in a new run, --init this one")


def _join(groups: list[tuple[Experience, int]]) -> Experience:
    """One experience from chosen groups (experience, its p-th prompt) of several."""
    first = groups[0][0]
    G = first.rewards.shape[1]

    def rows(name: str) -> list[Tensor]:
        return [row for e, p in groups for row in getattr(e.rollout, name)[p * G : (p + 1) * G]]

    tokens, mask, logp = (pad_sequence(rows(name), batch_first=True) for name in ("tokens", "mask", "logp"))
    prompt_lengths, lengths, finished = (torch.stack(rows(name)) for name in ("prompt_lengths", "lengths", "finished"))
    prompt_index = torch.arange(len(groups), device=tokens.device).repeat_interleave(G)
    texts, action_rewards, ends, answers = ([x for e, p in groups for x in getattr(e, name)[p * G : (p + 1) * G]]
                                            for name in ("texts", "action_rewards", "ends", "answers"))
    return Experience(first.task, Rollout(tokens, prompt_lengths, lengths, mask, logp, finished, prompt_index),
                      [e.problems[p] for e, p in groups], texts, torch.stack([e.rewards[p] for e, p in groups]),
                      action_rewards, ends, answers,
                      {name: torch.stack([e.parts.get(name, torch.full_like(e.rewards, torch.nan))[p] for e, p in groups])
                       for name in sorted({name for e, _ in groups for name in e.parts})})


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_rollout(model: GPT, rollout: Rollout, temperature: float, micro_batch: int) -> Tensor:
    """log-probs of a rollout's sampled tokens under `model`, 0 elsewhere.       -> [B, T-1]"""
    logp, mask = torch.zeros_like(rollout.logp), rollout.mask
    for rows, T in micro_batches(rollout, micro_batch):
        scores, _ = token_log_probs(model, rollout.tokens[rows, :T], mask[rows, : T - 1], temperature=temperature)
        logp[rows, : T - 1] = scores.to(logp.dtype)
    return ranks.summed(logp)


@torch.no_grad()
def learned_rewards(reward_model: ScalarGPT, rollout: Rollout, micro_batch: int) -> Tensor:
    """The learned reward of each answer, read at its last token.       -> [B]"""
    rewards = torch.zeros(len(rollout.tokens), device=rollout.tokens.device)
    for rows, T in micro_batches(rollout, micro_batch):
        rewards[rows] = reward_model.at_end(rollout.tokens[rows, :T], rollout.lengths[rows]).float()
    return ranks.summed(rewards)


@torch.no_grad()
def state_values(critic: ScalarGPT, rollout: Rollout, micro_batch: int) -> tuple[Tensor, Tensor]:
    """The critic's value of the state that each token was chosen in, and of the state after the last token.

    -> values [B, T-1], of which [:, t] belongs to tokens[:, t+1], 0 where nothing was sampled; last_value [B]
    """
    values, last_value = torch.zeros_like(rollout.logp), torch.zeros_like(rollout.logp[:, 0])
    for rows, T in micro_batches(rollout, micro_batch):
        mask, end = rollout.mask[rows, : T - 1], rollout.lengths[rows, None] - 1
        v = critic(rollout.tokens[rows, :T], F.pad(mask, (0, 1)).scatter(-1, end, True)).float()        # [rows, T]
        values[rows, : T - 1] = v[:, :-1].masked_fill(~mask, 0.0)
        last_value[rows] = v.gather(-1, end).squeeze(-1)
    return ranks.summed(values), ranks.summed(last_value)


def describe(experience: Experience, kind: Literal["rollout", "eval"]) -> dict[str, float]:
    """What the samples are like: reward and its parts, length, and reward by style of answering; of a rollout, also how many
    tokens were sampled. A mean over no answers is omitted; answers that could not be scored are left out of the means of
    rewards.

    For a task without a verifier, the reward is the hidden one, and its features come with it.
    """
    reward = experience.rewards.flatten().double()
    right = right_or_reward(experience.task, experience.rewards).flatten().double()
    length = experience.rollout.mask.sum(-1).cpu().double()
    scored = ~reward.isnan()
    facts = {"reward": reward.nanmean(), "length": length.mean(),
             "truncated": 1 - experience.rollout.finished.cpu().double().mean()}
    if kind == "rollout":
        facts["tokens"] = length.sum() + experience.resampled_tokens
    P, G = experience.rewards.shape
    if G > 1:
        facts["distinct"] = sum(len(set(experience.texts[p * G : (p + 1) * G])) for p in range(P)) / P
    if experience.task.verifiable:
        styles = [experience.task.style(text) for text in experience.texts]
        worked, direct = (torch.tensor([style == name for style in styles]) for name in ("worked", "direct"))
        facts["worked"] = worked.double().mean()
        if G > 1:
            facts["no_contrast"] = 1 - has_contrast(experience.rewards).double().mean()
        means = [("reward_worked", right, worked & scored), ("reward_direct", right, direct & scored)]
        if experience.task.right_reward is not None:
            means += [("length_correct", length, right == 1), ("length_wrong", length, right == 0)]
        for name, x, where in means:
            if where.any():
                facts[name] = x[where].mean()
    else:
        facts["hidden_reward"] = facts.pop("reward")
        features = [experience.task.features(experience.problems[row // G].prompt, text)
                    for row, text in enumerate(experience.texts)]
        facts |= {f"hidden_{name}": sum(f[name] for f in features) / len(features) for name in features[0]}
    if experience.task.max_actions > 1:
        facts["turns"] = sum(map(len, experience.action_rewards)) / len(experience.action_rewards)
        facts |= {end: experience.ends.count(end) / len(experience.ends) for end in ("out_of_turns", "out_of_room")}
    facts |= {f"part_{name}": part.double().nanmean() for name, part in experience.parts.items()}
    if experience.task.reward or not scored.all():
        facts["unscored"] = 1 - scored.double().mean()
    return {f"{kind}/{name}": float(x) for name, x in facts.items() if name != "reward" or scored.any()}
