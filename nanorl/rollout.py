"""Experience: draw prompts, generate, verify, keep or resample groups. Shared by every script that samples.

P prompts with G samples each make B = P * G rows, prompt-major: the samples of a prompt stand side by side.
"""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from nanorl.gpt import GPT
from nanorl.run import Run, derive
from nanorl.sample import Rollout, generate
from nanorl.tasks import MARKER, Problem, Task, is_worked
from nanorl.tokenizer import Tokenizer


def check_room(model: GPT, prompts: list[list[int]], max_new_tokens: int) -> None:
    """ValueError when these prompts and `max_new_tokens` do not fit the model's context."""
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.config.context:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: with prompts of up to {longest} tokens, the model's context of "
                         f"{model.config.context} has room for {max(0, model.config.context - longest)}")


class NoContrast(RuntimeError):
    """Hardly any group has answers of different reward."""


@dataclass
class Experience:
    rollout: Rollout
    problems: list[Problem]     # [P]
    texts: list[str]            # [B] the responses, decoded for the verifier and the reader; training uses the ids
    rewards: Tensor             # [P, G]
    resampled: int = 0          # further groups that were sampled and not used ...
    resampled_tokens: int = 0   # ... and the tokens of their answers


def contrast(rewards: Tensor) -> Tensor:
    """True where the rewards of a group differ: only there a comparison within the group can teach.       [P, G] -> [P]"""
    return rewards.amax(-1) > rewards.amin(-1)


def answer(model: GPT, tokenizer: Tokenizer, task: Task, problems: list[Problem], *, samples: int = 1, **how) -> Experience:
    """Sample responses to these problems and verify them; `how` goes to `generate`.

    An answer that was cut off scores 0: whoever has not stopped has not answered.
    """
    prompts = [tokenizer.render(problem.prompt) for problem in problems]
    rollout = generate(model, prompts, stop_ids={tokenizer.end}, samples_per_prompt=samples, **how)
    texts = [tokenizer.decode(ids) for ids in rollout.responses()]
    rewards = [task.verify(problems[row // samples], text) if finished else 0.0
               for row, (text, finished) in enumerate(zip(texts, rollout.finished.tolist(), strict=True))]
    return Experience(rollout, problems, texts, torch.tensor(rewards).view(len(problems), samples))


def collect(model: GPT, tokenizer: Tokenizer, task: Task, *, prompts: int, samples: int, seed: int,
            resample: bool = False, **how) -> Experience:
    """One step of experience on freshly drawn training problems.

    With `resample`, groups without contrast are replaced by new draws until all `prompts` have it (DAPO's dynamic
    sampling, Yu et al. 2025, section 3.2).
    """
    rng = Random(seed)
    problems = [task.problem(rng, "train") for _ in range(prompts)]
    experience = answer(model, tokenizer, task, problems, samples=samples, seed=seed, **how)
    if not resample:
        return experience
    kept, seen, tokens, attempts, most = [], 0, 0, 0, 20
    while True:
        index = contrast(experience.rewards).nonzero().squeeze(-1).tolist()
        kept += [(experience, p) for p in index]
        seen, tokens, attempts = seen + prompts, tokens + int(experience.rollout.mask.sum()), attempts + 1
        if len(kept) >= prompts:
            joined = _join(kept[:prompts])
            joined.resampled, joined.resampled_tokens = seen - prompts, tokens - int(joined.rollout.mask.sum())
            return joined
        if attempts == most:
            raise NoContrast(f"only {len(kept)} of {seen} groups had contrast, {prompts} are wanted: the task is too easy or "
                             "too hard for this policy by now; go on with --groups all in a new run, --init this one")
        problems = [task.problem(rng, "train") for _ in range(prompts)]
        experience = answer(model, tokenizer, task, problems, samples=samples, seed=derive(seed, attempts), **how)


def _join(groups: list[tuple[Experience, int]]) -> Experience:
    """One experience from chosen groups (experience, its p-th prompt) of several."""
    G = groups[0][0].rewards.shape[1]
    T = max(e.rollout.tokens.shape[1] for e, _ in groups)
    part = [(e.rollout, slice(p * G, (p + 1) * G)) for e, p in groups]

    def rows(name: str, width: int | None = None) -> Tensor:
        pieces = [getattr(rollout, name)[index] for rollout, index in part]
        if width is not None:
            pieces = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in pieces]
        return torch.cat(pieces)

    prompt_index = torch.arange(len(groups), device=groups[0][0].rollout.tokens.device).repeat_interleave(G)
    rollout = Rollout(rows("tokens", T), rows("prompt_lengths"), rows("lengths"), rows("logp", T - 1), rows("finished"),
                      prompt_index)
    return Experience(rollout, [e.problems[p] for e, p in groups], [t for e, p in groups for t in e.texts[p * G : (p + 1) * G]],
                      torch.stack([e.rewards[p] for e, p in groups]))


def describe(experience: Experience) -> dict[str, float]:
    """What the samples are like: reward, length, and the ways of answering apart. A share of nothing is left out."""
    reward = experience.rewards.flatten().double()
    length = (experience.rollout.lengths - experience.rollout.prompt_lengths).cpu().double()
    worked = torch.tensor([is_worked(text) for text in experience.texts])
    direct = torch.tensor([MARKER in text for text in experience.texts]) & ~worked
    means = {"reward": reward.mean(), "length": length.mean(), "worked": worked.double().mean(),
             "truncated": 1 - experience.rollout.finished.cpu().double().mean()}
    P, G = experience.rewards.shape
    if G > 1:
        means["distinct"] = sum(len(set(experience.texts[p * G : (p + 1) * G])) for p in range(P)) / P
        means["no_contrast"] = 1 - contrast(experience.rewards).double().mean()
    for name, x, where in (("length_correct", length, reward == 1), ("length_wrong", length, reward < 1),
                           ("reward_worked", reward, worked), ("reward_direct", reward, direct)):
        if where.any():
            means[name] = x[where].mean()
    return {name: float(x) for name, x in means.items()}


def evaluate(model: GPT, tokenizer: Tokenizer, task: Task, *, problems: int, max_new_tokens: int, seed: int,
             temperature: float = 1.0, compile: bool = False) -> tuple[dict[str, float], Experience]:
    """Held-out accuracy, one sampled and one greedy answer to each of `problems` draws. They depend on the seed alone."""
    rng = Random(derive(seed, "evaluate"))
    heldout = [task.problem(rng, "heldout") for _ in range(problems)]
    how = dict(max_new_tokens=max_new_tokens, seed=derive(seed, "evaluate"), compile=compile)
    sampled = answer(model, tokenizer, task, heldout, temperature=temperature, **how)
    greedy = answer(model, tokenizer, task, heldout, temperature=0.0, **how)
    metrics = {f"eval/{name}": value for name, value in describe(sampled).items()}
    metrics["eval/accuracy_sampled"] = metrics.pop("eval/reward")
    metrics["eval/accuracy_greedy"] = float(greedy.rewards.mean())
    return metrics, sampled


def before_and_after(before: dict[str, float], after: dict[str, float]) -> str:
    """The lines of metrics.jsonl of a first and a last evaluation, as a table."""
    lines = []
    for name, label in (("accuracy_sampled", "accuracy, sampled"), ("accuracy_greedy", "accuracy, greedy"),
                        ("worked", "share worked out"), ("reward_worked", "accuracy when worked out"),
                        ("reward_direct", "accuracy when blurted"), ("length", "tokens per answer"),
                        ("story_loss", "story loss, nats per token")):
        values = (f"{line[f'eval/{name}']:8.3f}" if f"eval/{name}" in line else "       -" for line in (before, after))
        lines.append(f"  {label:28s} {' '.join(values)}")
    return "\n".join(lines)


def show_answers(out: Run, experience: Experience, count: int = 4) -> None:
    """Print a few answers with their rewards, and keep them in samples.jsonl."""
    rewards = experience.rewards.flatten().tolist()
    G = experience.rewards.shape[1]
    records = [{"prompt": experience.problems[row // G].prompt, "response": experience.texts[row], "reward": rewards[row],
                "finished": bool(experience.rollout.finished[row])} for row in range(0, len(rewards), G)[:count]]
    out.samples(records)
    lines = (f"  {'+' if r['reward'] else '-'} {r['prompt']} {r['response']!s:.160}{'' if r['finished'] else ' ...'}"
             for r in records)
    out.say(f"\nAfter {out.step} steps (+ right, - wrong):\n" + "\n".join(lines) + "\n")
