"""Experience: draw prompts, generate, verify, keep or resample groups. Shared by every script that samples.

P prompts with G samples each make B = P * G rows, prompt-major: the samples of a prompt stand side by side.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanorl import ranks
from nanorl.data import read_records, shift
from nanorl.gpt import GPT, ScalarGPT
from nanorl.ops import kl_divergence
from nanorl.run import Run, derive, generator, load_checkpoint, scalar_model_from
from nanorl.sample import Rollout, generate, token_log_probs
from nanorl.tasks import FileTask, Problem, Task, make_task
from nanorl.tokenizer import Tokenizer


def check_room(model: GPT | ScalarGPT, prompts: list[list[int]], max_new_tokens: int) -> None:
    """ValueError when these prompts and `max_new_tokens` do not fit the model's context."""
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.config.context:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: with prompts of up to {longest} tokens, the model's context of "
                         f"{model.config.context} has room for {max(0, model.config.context - longest)}")


def check_tokenizer(checkpoint: dict[str, Any], tokenizer: Tokenizer, path: str) -> None:
    """ValueError when this checkpoint reads other token ids than the policy that `tokenizer` belongs to."""
    if checkpoint["tokenizer"] != tokenizer.state_dict():
        raise ValueError(f"{path}: made with another tokenizer than the policy's; expected one that was pretrained on the same "
                         "text")


def load_reward_model(path: str, tokenizer: Tokenizer, device: torch.device) -> ScalarGPT:
    """The reward model of a run, which must read the same token ids as the policy. Its weights are constants."""
    checkpoint = load_checkpoint(path, "reward model")
    check_tokenizer(checkpoint, tokenizer, path)
    return scalar_model_from(checkpoint, device).requires_grad_(False)


def choose_task(name: str, data: str, needs_verifier: bool = True) -> Task:
    """The task of this name, ready to grade, or the questions of a JSONL file {"prompt", "answer"}."""
    if not data:
        task = make_task(name, needs_verifier)
        task.start_verifier()
        return task
    return FileTask([(record["prompt"], record["answer"]) for record in read_records(data, ("prompt", "answer"))], data)


class NoContrast(RuntimeError):
    """Hardly any group has answers of different reward."""


@dataclass
class Experience:
    task: Task
    rollout: Rollout
    problems: list[Problem]     # [P]
    texts: list[str]            # [B] the responses, decoded for the verifier and the reader; training uses the ids
    rewards: Tensor             # [P, G]
    resampled: int = 0          # further groups that were sampled and not used ...
    resampled_tokens: int = 0   # ... and the tokens of their answers


def contrast(rewards: Tensor) -> Tensor:
    """True where the rewards of a group differ: only there a comparison within the group can teach.       [P, G] -> [P]"""
    return rewards.amax(-1) > rewards.amin(-1)


def answer(model: GPT, tokenizer: Tokenizer, task: Task, problems: list[Problem], *, samples: int = 1,
           openings: list[list[int]] | None = None, **how) -> Experience:
    """Sample responses to these problems and grade them; `how` goes to `generate`.

    With `openings`, the responses to a problem begin with these token ids, whatever the model thinks of them. The rollout
    counts them as part of the prompt. Each process answers its part of the problems, and all of them get all responses, the
    same as those of one process.
    """
    openings = openings or [[] for _ in problems]
    if ranks.count() == 1:
        return _answer(model, tokenizer, task, problems, openings, samples, how)
    mine, found = torch.arange(len(problems)).tensor_split(ranks.count())[ranks.rank()].tolist(), None
    if mine:
        found = _answer(model, tokenizer, task, [problems[p] for p in mine], [openings[p] for p in mine], samples,
                        how | {"first_row": samples * mine[0]})
        found = replace(found, task=None, rollout=found.rollout.to("cpu"))
    parts = [replace(e, task=task, rollout=e.rollout.to(model.head.weight.device)) for e in ranks.gathered(found) if e]
    return _join([(e, p) for e in parts for p in range(len(e.problems))])


def _answer(model: GPT, tokenizer: Tokenizer, task: Task, problems: list[Problem], openings: list[list[int]], samples: int,
            how: dict[str, Any]) -> Experience:
    prompts = [tokenizer.render(problem.prompt) + begun for problem, begun in zip(problems, openings, strict=True)]
    rollout = generate(model, prompts, stop_ids={tokenizer.end}, samples_per_prompt=samples, **how)
    texts = [tokenizer.decode(openings[row // samples] + ids) for row, ids in enumerate(rollout.responses())]
    rewards = task.rewards([problem for problem in problems for _ in range(samples)], texts, rollout.finished.tolist())
    return Experience(task, rollout, problems, texts, torch.tensor(rewards).view(len(problems), samples))


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
    return Experience(groups[0][0].task, rollout, [e.problems[p] for e, p in groups],
                      [t for e, p in groups for t in e.texts[p * G : (p + 1) * G]],
                      torch.stack([e.rewards[p] for e, p in groups]))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring and updating: optimizer steps are minibatches, micro-batches only bound memory
# ---------------------------------------------------------------------------------------------------------------------


def minibatches(seed: int, step: int, count: int, epochs: int, parts: int) -> Iterator[Tensor]:
    """The rows of each optimizer step on one rollout: every epoch a fresh shuffle, cut into equal parts."""
    for epoch in range(epochs):
        shuffle = torch.randperm(count, generator=generator(seed, "minibatch", step, epoch))
        yield from shuffle.tensor_split(parts)


class Room(NamedTuple):
    """How much goes through a model at a time: at most so many rows, and so many tokens, padding included."""

    rows: int = 64
    tokens: int = 2**14


def micro_batches(rows: Tensor, lengths: Tensor, room: Room) -> Iterator[tuple[Tensor, int]]:
    """As many rows at a time as fit, but at least one; those of similar length together. Yields (rows, longest length)."""
    rows = rows[lengths[rows].argsort()]
    length, start = lengths[rows].tolist(), 0
    while start < len(rows):
        end = start + 1
        while end < min(len(rows), start + room.rows) and (end + 1 - start) * length[end] <= room.tokens:
            end += 1
        yield rows[start:end], length[end - 1]
        start = end


def add_up(totals: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Metrics of micro-batches: sums, and extremes of those named _max and _min."""
    for name, value in metrics.items():
        join = {"_max": max, "_min": min}.get(name[-4:], operator.add)
        totals[name] = join(totals[name], value) if name in totals else value


def means(totals: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """What was added up, per token or pair or whatever was counted; extremes stay what they are."""
    return {name: x if name.endswith(("_max", "_min")) else x / max(count, 1) for name, x in totals.items()}


def of_all_ranks(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the micro-batches of all processes have added up to. One that had no rows has no totals."""
    if ranks.count() == 1:
        return totals
    whole: dict[str, Tensor] = {}
    for part in ranks.gathered({name: x.cpu() for name, x in totals.items()}):
        add_up(whole, part)
    return whole


@torch.no_grad()
def score_rollout(model: GPT, rollout: Rollout, temperature: float, room: Room) -> Tensor:
    """log-probs of a rollout's sampled tokens under `model`, 0 elsewhere.       -> [B, T-1]"""
    logp, mask = torch.zeros_like(rollout.logp), rollout.mask
    for rows, T in micro_batches(ranks.share(torch.arange(len(logp), device=logp.device)), rollout.lengths, room):
        part, _ = token_log_probs(model, rollout.tokens[rows, :T], mask[rows, : T - 1], temperature=temperature)
        logp[rows, : T - 1] = part.to(logp.dtype)
    return ranks.summed(logp)


@torch.no_grad()
def learned_rewards(reward_model: ScalarGPT, rollout: Rollout, room: Room) -> Tensor:
    """What a reward model says of each answer, read at its last token.       -> [B]"""
    rewards = torch.zeros(len(rollout.tokens), device=rollout.tokens.device)
    for rows, T in micro_batches(ranks.share(torch.arange(len(rewards), device=rewards.device)), rollout.lengths, room):
        rewards[rows] = reward_model.at_end(rollout.tokens[rows, :T], rollout.lengths[rows]).float()
    return ranks.summed(rewards)


@torch.no_grad()
def answer_kl(model: GPT, other: GPT, rollout: Rollout, temperature: float, room: Room) -> float:
    """KL(model || other) in nats per answer, on answers that `model` sampled.

        1/B sum_b sum_t KL( model(.|y_<t) || other(.|y_<t) )

    Exact at every token; only the prefixes are sampled. By the chain rule that is unbiased. Estimates from the sampled tokens
    alone are unbiased, too, but a policy that has given something up hardly ever samples what would show it.
    """
    total, mask = 0.0, rollout.mask
    for rows, T in micro_batches(ranks.share(torch.arange(len(mask), device=mask.device)), rollout.lengths, room):
        inputs, _ = shift(rollout.tokens[rows, :T])
        m = mask[rows, : T - 1]
        for h, g in zip(model.hidden(inputs)[m].split(1024), other.hidden(inputs)[m].split(1024), strict=True):
            p, q = (net.head(x).float() / temperature for net, x in ((model, h), (other, g)))
            total += float(kl_divergence(p, q).sum())
    return sum(ranks.gathered(total)) / len(mask)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def describe(experience: Experience) -> dict[str, float]:
    """What the samples are like: reward, length, and the ways of answering apart. A share of nothing is left out.

    Of a task without a verifier, the reward is the hidden one, and its features stand beside it.
    """
    reward = experience.rewards.flatten().double()
    length = (experience.rollout.lengths - experience.rollout.prompt_lengths).cpu().double()
    facts = {"reward": reward.mean(), "length": length.mean(),
             "truncated": 1 - experience.rollout.finished.cpu().double().mean()}
    P, G = experience.rewards.shape
    if G > 1:
        facts["distinct"] = sum(len(set(experience.texts[p * G : (p + 1) * G])) for p in range(P)) / P
    if experience.task.verifiable:
        styles = [experience.task.style(text) for text in experience.texts]
        worked, direct = (torch.tensor([style == name for style in styles]) for name in ("worked", "direct"))
        facts["worked"] = worked.double().mean()
        if G > 1:
            facts["no_contrast"] = 1 - contrast(experience.rewards).double().mean()
        for name, x, where in (("length_correct", length, reward == 1), ("length_wrong", length, reward < 1),
                               ("reward_worked", reward, worked), ("reward_direct", reward, direct)):
            if where.any():
                facts[name] = x[where].mean()
    else:
        facts["hidden_reward"] = facts.pop("reward")
        features = [experience.task.features(experience.problems[row // G].prompt, text)
                    for row, text in enumerate(experience.texts)]
        facts |= {f"hidden_{name}": sum(f[name] for f in features) / len(features) for name in features[0]}
    return {name: float(x) for name, x in facts.items()}


def heldout_problems(task: Task, count: int, seed: int) -> list[Problem]:
    """The problems of an evaluation: the same for every policy and step of a seed."""
    rng = Random(derive(seed, "evaluate"))
    return [task.problem(rng, "heldout") for _ in range(count)]


def evaluate(model: GPT, tokenizer: Tokenizer, task: Task, *, problems: int, seed: int, temperature: float = 1.0,
             reference: GPT | None = None, reward_model: ScalarGPT | None = None, room: Room | None = None,
             **how) -> tuple[dict[str, float], Experience]:
    """Held-out accuracy, one sampled and one greedy answer to each of `problems` draws. They depend on the seed alone; `how`
    goes to `answer`.

    A task without a verifier has no accuracy: its metrics are those of the sampled answers. With a reference, also the KL
    of the policy to it; with a reward model, also what that says of the answers.
    """
    heldout = heldout_problems(task, problems, seed)
    how["seed"] = derive(seed, "evaluate")
    sampled = answer(model, tokenizer, task, heldout, temperature=temperature, **how)
    metrics = {f"eval/{name}": value for name, value in describe(sampled).items()}
    if task.verifiable:
        greedy = answer(model, tokenizer, task, heldout, temperature=0.0, **how)
        metrics["eval/accuracy_sampled"] = metrics.pop("eval/reward")
        metrics["eval/accuracy_greedy"] = float(greedy.rewards.mean())
    room = room or Room()
    if reference:
        metrics["eval/answer_kl"] = answer_kl(model, reference, sampled.rollout, temperature, room)
    if reward_model:
        metrics["eval/learned_reward"] = float(learned_rewards(reward_model, sampled.rollout, room).mean())
    return metrics, sampled


def before_and_after(title: str, before: dict[str, float], after: dict[str, float]) -> str:
    """The lines of metrics.jsonl of a first and a last evaluation, as a table."""
    lines = [f"\n{title:30s}   before    after"]
    for name, label in (("accuracy_sampled", "accuracy, sampled"), ("accuracy_greedy", "accuracy, greedy"),
                        ("worked", "share worked out"), ("reward_worked", "accuracy when worked out"),
                        ("reward_direct", "accuracy when blurted"), ("hidden_reward", "hidden reward"),
                        ("hidden_praise", "  of it, for praise"), ("hidden_short", "  of it, for being short"),
                        ("learned_reward", "learned reward"), ("length", "tokens per answer"),
                        ("truncated", "share cut at the limit"),
                        ("answer_kl", "KL to the start, nats"),
                        ("reverse_kl", "KL to the teacher, nats"), ("forward_kl", "KL from the teacher, nats"),
                        ("story_loss", "story loss, nats per token"), ("pair_accuracy", "held-out pairs ranked right")):
        values = [f"{line[f'eval/{name}']:8.3f}" if f"eval/{name}" in line else "       -" for line in (before, after)]
        if set(values) != {"       -"}:
            lines.append(f"  {label:28s} {' '.join(values)}")
    if "eval/best_of_n" in before:
        lines.append(f"  {'best of n before':28s} {before['eval/best_of_n']:8.3f}")
    return "\n".join(lines)


def show_answers(out: Run, experience: Experience, count: int = 4) -> None:
    """Print a few answers with their rewards, and keep them in samples.jsonl."""
    rewards = experience.rewards.flatten().tolist()
    G = experience.rewards.shape[1]
    records = [{"prompt": experience.problems[row // G].prompt, "response": experience.texts[row], "reward": rewards[row],
                "finished": bool(experience.rollout.finished[row])} for row in range(0, len(rewards), G)[:count]]
    out.samples(records)
    if experience.task.verifiable:
        legend, mark, width = "+ right, - wrong", lambda reward: "+" if reward else "-", 160
    else:
        legend, mark, width = "with their hidden rewards", "{:+.0f}".format, 600
    lines = (f"  {mark(r['reward'])} {r['prompt']} {r['response']!s:.{width}}{'' if r['finished'] else ' ...'}"
             for r in records)
    out.say(f"\nAfter {out.step} steps ({legend}):\n" + "\n".join(lines) + "\n")
