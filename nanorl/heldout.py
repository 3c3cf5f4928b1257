"""What held-out problems, texts and pairs say about a model: evaluations, their tables, and answers to read."""

import math
import re
from collections import Counter
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from nanorl.data import DATA, consecutive_windows, response_mask, shift
from nanorl.files import Prompt, read_text
from nanorl.gpt import GPT, ScalarGPT
from nanorl.ops import bradley_terry, kl_divergence, masked_sum, ranked_right, rows_of_logits
from nanorl.rollout import (Experience, describe, learned_rewards, lenient_values, own_micro_batches, right_or_reward,
                            sample_and_grade)
from nanorl.run import Run, autocast, derive, ranks
from nanorl.sample import Rollout, Sampling, generate, token_log_probs
from nanorl.search import best_of_n_curve
from nanorl.tasks import Problem, Stories, Task
from nanorl.tokenizer import Tokenizer

STORY_WINDOW = 64       # tokens: no longer than what pretraining has seen, so that only forgetting is measured

# ---------------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------------


def heldout_problems(task: Task, count: int, seed: int, split: str = "heldout") -> list[Problem]:
    """The problems of an evaluation: the same for every policy and step of a seed. Of a file, `count` rows at most."""
    return task.choose(Random(derive(seed, "evaluate")), split, count)


def evaluate_policy(model: GPT, tokenizer: Tokenizer, task: Task, sampling: Sampling, *, problems: int, seed: int,
                    reference: GPT | None = None, reward_model: ScalarGPT | None = None, micro_batch: int = 64,
                    best_of: int = 0) -> tuple[dict[str, float], Experience]:
    """Held-out accuracy, one sampled and one greedy answer to each of `problems`, which depend on the seed alone.

    A task that calls no answer right has no accuracy: its metrics are those of the sampled answers. With a reference, also the
    KL of the policy to it; with a reward model, also its mean reward; with best_of = n > 0, the value of the best of n answers.
    Returns the eval/ metrics and the sampled answers.
    """
    heldout, draw = heldout_problems(task, problems, seed), derive(seed, "evaluate")
    sampled = sample_and_grade(model, tokenizer, task, heldout, sampling, seed=draw)
    metrics = describe(sampled, "eval")
    if task.right_reward is not None:
        greedy = sample_and_grade(model, tokenizer, task, heldout, replace(sampling, temperature=0.0), seed=draw)
        metrics.pop("eval/reward", None)        # of answers that could not be scored, there is none
        metrics["eval/accuracy_sampled"] = float(right_or_reward(task, sampled.rewards).double().nanmean())
        metrics["eval/accuracy_greedy"] = float(right_or_reward(task, greedy.rewards).nanmean())
        for name, answers in (("sampled", sampled), ("greedy", greedy)):
            if (lenient := lenient_values(answers)) is not None:
                metrics[f"eval/lenient_{name}"] = float(lenient.double().mean())
    if reference:
        metrics["eval/answer_kl"] = answer_kl(model, reference, sampled.rollout, sampling.temperature, micro_batch)
    if reward_model:
        metrics["eval/learned_reward"] = float(learned_rewards(reward_model, sampled.rollout, micro_batch).mean())
    if best_of:
        curve = best_of_n_curve(model, tokenizer, task, heldout, sampling, samples=best_of, seed=seed,
                                reward_model=reward_model)
        metrics |= {"eval/best_of_n": curve[best_of]} if curve else {}
    return metrics, sampled


def evaluate_and_show(out: Run, model: GPT, tokenizer: Tokenizer, task: Task, sampling: Sampling, *,
                      reference: GPT | None = None, reward_model: ScalarGPT | None = None,
                      stories: bool = False) -> dict[str, float]:
    """`evaluate_policy` with the flags of a run, and some of its answers shown; with `stories`, also the loss on held-out ones.
    Best-of-n only before the first step."""
    cfg, best_of = out.cfg, getattr(out.cfg, "best_of", 0) if out.step == 0 else 0
    with autocast(model.head.weight.device, cfg.dtype):
        metrics, answers = evaluate_policy(model, tokenizer, task, sampling, problems=cfg.eval_problems, seed=cfg.seed,
                                           reference=reference, reward_model=reward_model, micro_batch=cfg.micro_batch,
                                           best_of=best_of)
        if stories:
            ids = tokenizer.encode(read_text(DATA / "stories_heldout.txt"))
            metrics["eval/story_loss"] = text_loss(model, tokenizer, ids, STORY_WINDOW)["eval/text_loss"]
    show_answers(out, answers)
    return metrics


@torch.no_grad()
def answer_kl(model: GPT, other: GPT, rollout: Rollout, temperature: float, micro_batch: int) -> float:
    """KL(model || other) in nats per answer, on answers that `model` sampled.

        1/B sum_b sum_t KL( model(.|y_<t) || other(.|y_<t) )

    Exact at every token; only the prefixes are sampled. By the chain rule that is unbiased. Estimates from the sampled tokens
    alone are unbiased, too, but a policy that no longer gives some answers hardly ever samples what would show it.
    """
    total, mask = 0.0, rollout.mask
    for rows, T in own_micro_batches(rollout, micro_batch):
        inputs, _ = shift(rollout.tokens[rows, :T])
        m = mask[rows, : T - 1]
        size = rows_of_logits(model.config.vocab_size)
        for h, g in zip(*(net.hidden_at(inputs, m)[0].split(size) for net in (model, other)), strict=True):
            p, q = (net.head(x).float() / temperature for net, x in ((model, h), (other, g)))
            total += float(kl_divergence(p, q).sum())
    return sum(ranks.gathered(total)) / len(mask)


def before_and_after(title: str, lines: list[dict[str, float | None]]) -> str:
    """The evaluations in the first and the last of these lines of metrics.jsonl, as a table."""
    table, worth = [f"\n{title:30s}   before    after"], "accuracy" if "eval/accuracy_sampled" in lines[-1] else "reward"
    for name, label in (("accuracy_sampled", "accuracy, sampled"), ("accuracy_greedy", "accuracy, greedy"),
                        ("lenient_sampled", "lenient accuracy, sampled"), ("lenient_greedy", "lenient accuracy, greedy"),
                        ("worked", "share worked out"), ("reward_worked", f"{worth} when worked out"),
                        ("reward_direct", f"{worth} when direct"), ("reward", "reward"), ("hidden_reward", "hidden reward"),
                        ("hidden_praise", "  of it, for praise"), ("hidden_short", "  of it, for being short"),
                        ("learned_reward", "learned reward"), ("length", "tokens per answer"),
                        ("truncated", "share cut at the limit"), ("answer_kl", "KL to the start, nats"),
                        ("reverse_kl", "KL to the teacher, nats"), ("forward_kl", "KL from the teacher, nats"),
                        ("story_loss", "story loss, nats per token"), ("pair_accuracy", "held-out pairs ranked right"),
                        ("best_of_n", "best of n")):
        pair = (line.get(f"eval/{name}") for line in (lines[0], lines[-1]))         # None, too, where it was not finite
        values = ["       -" if x is None else f"{x:8.3f}" for x in pair]
        if set(values) != {"       -"}:
            table.append(f"  {label:28s} {' '.join(values)}")
    return "\n".join(table)


def show_answers(out: Run, experience: Experience, count: int = 4) -> None:
    """Print a few answers with their rewards, and keep them in samples.jsonl."""
    G, task = experience.rewards.shape[1], experience.task
    rewards = [None if math.isnan(reward) else reward for reward in experience.rewards[:, 0].tolist()]
    records = [{"prompt": problem.prompt, "response": experience.texts[p * G], "reward": rewards[p],
                "finished": experience.rollout.finished[p * G].item()} for p, problem in enumerate(experience.problems[:count])]
    out.samples(records)
    values, width = right_or_reward(task, experience.rewards)[:, 0].tolist(), 160 if task.verifiable else 600
    if task.right_reward is not None:
        legend, marks = "+ right, - wrong", ["?" if math.isnan(value) else "+" if value else "-" for value in values]
    else:
        legend, marks = f"with their {task.measured}s", [f"{value:+.3g}" for value in values]
    lines = (f"  {mark} {r['prompt']} {r['response']!s:.{width}}{'' if r['finished'] else ' ...'}"
             for mark, r in zip(marks, records, strict=False))
    out.say(f"\nAfter {out.step} steps ({legend}):\n" + "\n".join(lines) + "\n")


def show_responses(out: Run, model: GPT, tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    """Print what the model says to these prompts, and keep it in samples.jsonl."""
    with autocast(model.head.weight.device, out.cfg.dtype):
        rollout = generate(model, [tokenizer.render(prompt) for prompt in prompts], max_new_tokens=out.cfg.max_new_tokens,
                           stop_ids=tokenizer.stop_ids, seed=derive(out.cfg.seed, "sample"))
    said = [{"prompt": prompt, "response": tokenizer.decode(ids)}
            for prompt, ids in zip(prompts, rollout.responses(), strict=True)]
    out.samples(said)
    out.say(f"\nAfter {out.step} steps:\n" + "\n".join(f"  {s['prompt']} -> {s['response']:.160}" for s in said) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def total_loss(model: GPT, tokens: Tensor, mask: Tensor, batch: int = 64) -> float:
    """-sum of m_bt log pi(x_bt+1 | x_b,<=t), in nats, `batch` rows at a time.       tokens [B, T], mask [B, T-1]"""
    nats, device = 0.0, model.head.weight.device
    for t, m in zip(tokens.split(batch), mask.split(batch), strict=True):
        t, m = t.to(device), m.to(device)
        nats -= masked_sum(token_log_probs(model, t, m)[0], m).item()
    return nats


def text_loss(model: GPT, tokenizer: Tokenizer, ids: list[int], width: int) -> dict[str, float]:
    """Mean loss on a text, every token predicted once: nats per token, bits per byte, perplexity."""
    tokens, lengths = consecutive_windows(torch.tensor(ids), tokenizer.bos, width)
    mask = response_mask(torch.ones_like(lengths), lengths, tokens.shape[1])
    nats, count = total_loss(model, tokens, mask), int(mask.sum())
    return {"eval/text_loss": nats / count, "eval/bits_per_byte": nats / math.log(2) / tokenizer.num_bytes(ids),
            "eval/perplexity": math.exp(min(nats / count, 700.0))}


# ---------------------------------------------------------------------------------------------------------------------
# Pairs: what margins r(chosen) - r(rejected) say
# ---------------------------------------------------------------------------------------------------------------------


def agreement(name: str, margin: Tensor, hidden: Tensor | None = None) -> dict[str, float]:
    """Share of pairs that margins [N] rank like the labels; where hidden margins [N] are known, also like those, and like those
    that exceed one label temperature."""
    def share(right: Tensor) -> float:
        return float(right.mean()) if len(right) else 0.5

    metrics = {f"eval/agreement_{name}_labels": share(ranked_right(margin))}
    if hidden is not None:
        right = ranked_right(margin * hidden)
        metrics[f"eval/agreement_{name}_hidden"] = share(right[hidden != 0])
        metrics[f"eval/agreement_{name}_clear"] = share(right[hidden.abs() > Stories.label_temperature])
    return metrics


def calibration_error(margin: Tensor, bins: int = 10) -> float:
    """How far predicted and actual preference are apart: |mean confidence - accuracy| in bins of confidence, weighted by
    size. Confidence is sigma(|margin|), the probability of the response that the model prefers.       [N] -> float"""
    confidence, right = margin.abs().sigmoid(), ranked_right(margin)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    parts = [index == b for b in range(bins) if (index == b).any()]
    return sum(abs(float(confidence[part].mean() - right[part].mean())) * int(part.sum()) for part in parts) / len(margin)


def hidden_margins(records: list[dict]) -> Tensor:
    """By how much the hidden reward prefers what was chosen.       -> [N]"""
    reward = Stories().hidden_reward
    return torch.tensor([reward(r["prompt"], r["chosen"]) - reward(r["prompt"], r["rejected"]) for r in records])


def length_margins(training: list[dict], heldout: list[dict]) -> Tensor:
    """Longer is better, or shorter, whichever the training pairs say. In characters.       -> [N]"""
    def margins(records: list[dict]) -> Tensor:
        return torch.tensor([float(len(record["chosen"]) - len(record["rejected"])) for record in records])

    return margins(heldout) * (1 if ranked_right(margins(training)).mean() >= 0.5 else -1)


def word_margins(training: list[dict], heldout: list[dict]) -> Tensor:
    """A weight for every word, fitted by logistic regression to the differences in word counts.       -> [N]

    The penalty on weights is the one, of five, that does best on the last fifth of the training pairs.
    """
    def words(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    frequent = Counter(word for r in training for key in ("chosen", "rejected") for word in words(r[key])).most_common(5000)
    vocabulary = {word: i for i, (word, _) in enumerate(frequent)}

    def counts(text: str) -> Tensor:
        known = [vocabulary[word] for word in words(text) if word in vocabulary]
        return torch.bincount(torch.tensor(known, dtype=torch.long), minlength=len(vocabulary))

    def differences(records: list[dict]) -> Tensor:
        return torch.stack([counts(r["chosen"]) - counts(r["rejected"]) for r in records]).double()

    def fit(x: Tensor, penalty: float) -> Tensor:
        w = torch.zeros(len(vocabulary), dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            loss = bradley_terry(x @ w).mean() + penalty * w.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        return w.detach()

    x, cut = differences(training), len(training) * 4 // 5
    best = max((10.0**-k for k in range(1, 6)), key=lambda penalty: ranked_right(x[cut:] @ fit(x[:cut], penalty)).mean())
    return differences(heldout) @ fit(x, best)


RANKERS = {"model": "the reward model", "words": "word counts", "length": "length", "ceiling": "the hidden reward itself"}


def ranking_table(metrics: dict[str, float], count: int) -> str:
    """How often each of RANKERS ranks held-out pairs like the labels, and like the hidden reward."""
    lines = [f"{f'{count} held-out pairs ranked like ...':38s} the labels  hidden reward  clear pairs"]
    for name, label in RANKERS.items():
        cells = (metrics.get(f"eval/agreement_{name}_{column}") for column in ("labels", "hidden", "clear"))
        lines.append(f"  {label:35s}" + "".join("            -" if x is None else f"{x:13.3f}" for x in cells))
    return "\n".join(lines) if count else "No pair is held out."
