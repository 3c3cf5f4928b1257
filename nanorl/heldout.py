"""What held-out problems and texts say about a model: evaluations, their table, and answers to read."""

import math
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from nanorl.batches import micro_batches
from nanorl.data import DATA, consecutive_windows, response_mask, shift
from nanorl.files import Prompt, read_text
from nanorl.gpt import GPT, ScalarGPT
from nanorl.ops import kl_divergence, masked_sum, rows_of_logits
from nanorl.rollout import Experience, describe, learned_rewards, lenient_values, right_or_reward, sample_and_grade
from nanorl.run import Run, autocast, derive, ranks
from nanorl.sample import Rollout, Sampling, generate, token_log_probs
from nanorl.search import best_of_n_curve
from nanorl.tasks import Problem, Task
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
        metrics.pop("eval/reward", None)        # its place is taken by accuracies; absent where nothing was scored
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


def evaluate_and_show(out: Run, task: Task, sampling: Sampling, *, reference: GPT | None = None,
                      reward_model: ScalarGPT | None = None, stories: bool = False) -> dict[str, float]:
    """`evaluate_policy` with the model and the flags of a run, and some of its answers shown; with `stories`, also the loss on
    held-out ones. Best-of-n only before the first step."""
    cfg, model, tokenizer = out.cfg, out.model, out.tokenizer
    best_of = getattr(cfg, "best_of", 0) if out.step == 0 else 0
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
    for rows, T in micro_batches(rollout, micro_batch):
        inputs, _ = shift(rollout.tokens[rows, :T])
        m = mask[rows, : T - 1]
        size = rows_of_logits(model.config.vocab_size)
        for h, g in zip(*(net.hidden_at(inputs, m)[0].split(size) for net in (model, other)), strict=True):
            p, q = (net.head(x).float() / temperature for net, x in ((model, h), (other, g)))
            total += float(kl_divergence(p, q).sum())
    return sum(ranks.gathered(total)) / len(mask)


def before_and_after(out: Run, task: Task | None = None) -> str:
    """The first and the last evaluation of a run, as a table."""
    lines = out.metrics()
    title = f"{len(heldout_problems(task, out.cfg.eval_problems, out.cfg.seed))} held-out problems" if task else "held out"
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


def show_responses(out: Run, prompts: list[Prompt]) -> None:
    """Print what the run's model says to these prompts, and keep it in samples.jsonl."""
    model, tokenizer = out.model, out.tokenizer
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
