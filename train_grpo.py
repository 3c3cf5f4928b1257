"""GRPO: sample a group of answers to each prompt, and make those that beat their group's average more likely.

    A_i = (r_i - mean(r)) / (std(r) + eps)                          (Shao et al. 2024, section 4.1.2)
    J   = sum_bt w_bt [ min(rho A, clip(rho, 1 - low, 1 + high) A) - kl_coef k3(pi || ref) + entropy_coef H ]

    python train_grpo.py                    from nothing: pretrains and fine-tunes first where those runs are missing
    python train_grpo.py --task sorting
    python train_grpo.py --minibatches 4 --kl-coef 0.04 --out runs/grpo-kl

With one update per rollout and kl_coef 0, the default, the ratio rho is 1 and clipping has nothing to clip: GRPO is then
REINFORCE with a group baseline. Where every answer weighs the same, the loss is then zero, because the advantages of a
group sum to zero. It says nothing about progress and is not logged. Watch the reward.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch

import train_pretrain
import train_sft
from nanorl import run
from nanorl.data import DATA, read_records, read_text
from nanorl.ops import (
    AGGREGATES,
    center,
    clipped_surrogate,
    importance_ratio,
    kl_k3,
    leave_one_out,
    masked_sum,
    token_weights,
    zscore,
)
from nanorl.rollout import NoContrast, check_room, collect, describe, evaluate, show_answers
from nanorl.sample import token_log_probs
from nanorl.tasks import FileTask, make_task

STORY_WINDOW = 64       # tokens: no longer than what pretraining has seen, so that only forgetting is measured
ADVANTAGES = {"zscore": zscore, "center": center, "leave_one_out": leave_one_out}


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = ""               # directory of this run (default: runs/grpo, or runs/grpo-TASK)
    steps: run.Count = 40
    lr: run.Positive = 1e-4
    eval_every: run.Count = 10

    task: str = "addition"      # addition, sums, sorting, reversal or countdown
    difficulty: run.Natural = 0  # of the task, 0 is its own default
    data: str = ""              # JSONL records {"prompt", "answer"} to practise on instead of the task's problems
    prompts: run.Count = 32     # P, prompts per step
    group: run.Count = 8        # G, answers sampled per prompt
    max_new_tokens: run.Count = 80    # an answer longer than this is cut, and scores 0
    temperature: run.Positive = 1.0    # of the policy: sampled with it, scored with it
    advantage: Literal[*ADVANTAGES] = "zscore"    # how an answer is compared with its group
    aggregate: Literal[*AGGREGATES] = "sequence_mean"    # how much each token counts, see nanorl/ops.py
    groups: Literal["all", "drop", "resample"] = "all"    # those without contrast: keep, leave out, or draw anew
    truncated: Literal["train", "mask"] = "train"    # answers cut at the limit: train on them, or only count them in the mean
    epochs: run.Count = 1       # passes over a rollout
    minibatches: run.Count = 1  # optimizer steps per pass
    micro_batch: run.Count = 64  # rows in memory at a time
    clip_low: run.Share = 0.2   # the ratio's band is 1 - clip_low ...
    clip_high: run.Positive = 0.2    # ... to 1 + clip_high
    kl_coef: run.NonNegative = 0.0    # weight of k3 against the initial policy; as a loss, k3 follows KL(ref || pi)
    entropy_coef: run.NonNegative = 0.0    # weight of the entropy bonus
    warmup: run.Share = 0.05    # of the steps: the learning rate rises
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm
    eval_problems: run.Count = 500    # held-out problems

    def __post_init__(self):
        object.__setattr__(self, "out", self.out or run.stage_dir("grpo", self.task, self.difficulty))


def objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None, clip_low=0.2, clip_high=0.2,
              kl_coef=0.0, entropy_coef=0.0):
    """The loss of one micro-batch, and its metrics as sums over the tokens that count.

        L = -sum_bt w_bt [ min(rho A, clip(rho) A) - kl_coef k3(pi || ref) + entropy_coef H ]

    logp, old_logp, ref_logp, entropy [B, T] nats; adv [B, 1]; mask, weights [B, T], the weights made once for the whole
    optimizer step. Losses and metrics of micro-batches add up to the step's; those named _max take the maximum.
    """
    # Padding may hold anything, even inf. Blank it before exp(): afterwards its gradient would be 0 * inf = nan.
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    surrogate = clipped_surrogate(logp, old_logp, adv, clip_low, clip_high)                 # [B, T]
    metrics = {}
    if kl_coef:
        kl = kl_k3(logp, ref_logp.masked_fill(~mask, 0.0))
        surrogate = surrogate - kl_coef * kl
        metrics["train/kl"] = masked_sum(kl.detach(), mask)
    if entropy_coef:
        surrogate = surrogate + entropy_coef * entropy.masked_fill(~mask, 0.0)
    loss = -(weights * surrogate).sum()

    ratio = importance_ratio(logp.detach(), old_logp)
    metrics |= {"train/clipped_low": masked_sum(((ratio < 1 - clip_low) & (adv < 0)).float(), mask),
                "train/clipped_high": masked_sum(((ratio > 1 + clip_high) & (adv > 0)).float(), mask),
                "train/ratio_max": ratio.masked_fill(~mask, 0.0).max()}
    return loss, metrics


def micro_batches(rows, lengths, size):
    """`rows` in batches of `size`, rows of similar length together. Yields (rows, length of the longest)."""
    for part in rows[lengths[rows].argsort()].split(size):
        yield part, int(lengths[part].max())


def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work; then what depends on the model.
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        if cfg.data:
            records = read_records(cfg.data, ("prompt", "answer"))
            task = FileTask([(record["prompt"], record["answer"]) for record in records], cfg.data)
        else:
            task = make_task(cfg.task, cfg.difficulty or None)
        if cfg.group == 1:
            raise ValueError(f"--group 1: --advantage {cfg.advantage} compares answers within a group, expected at least 2")
        if cfg.minibatches > cfg.prompts * cfg.group:
            raise ValueError(f"--minibatches {cfg.minibatches}: a rollout has only {cfg.prompts * cfg.group} answers")
        stories = read_text(DATA / "stories_heldout.txt")
    init = cfg.init
    if not init and (not checkpoint or cfg.kl_coef):
        init = run.ensure_stage(train_sft, out=run.stage_dir("sft", cfg.task, cfg.difficulty),
                                **run.same(cfg, "task", "difficulty"))
    with run.user_errors():
        start = checkpoint or run.load_checkpoint(init)
        policy, tokenizer = run.model_from(start, device), run.tokenizer_from(start)
        reference = run.model_from(run.load_checkpoint(init), device).requires_grad_(False) if cfg.kl_coef else None
        check_room(policy, [tokenizer.render(problem.prompt) for problem in task.examples()], cfg.max_new_tokens)

    optimizer = run.Optimizers(policy, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer)
    del start, checkpoint
    compiled = run.wants_compile(cfg, device)
    if compiled:
        for model in filter(None, (policy, reference)):
            run.compile_blocks(model)
    story_ids = torch.tensor(tokenizer.encode(stories))
    sampling = dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, compile=compiled)
    updates = cfg.epochs * cfg.minibatches
    print(f"GRPO on {task.name}: {cfg.prompts} prompts x {cfg.group} answers a step, on {device.type}. " + (
          "One update per rollout: ratios are 1 and clipping is inert." if updates == 1 else f"{updates} updates per rollout."))

    def look() -> dict[str, float]:
        with run.autocast(device, cfg.dtype):
            metrics, experience = evaluate(policy, tokenizer, task, problems=cfg.eval_problems, seed=cfg.seed, **sampling)
            text = train_pretrain.text_loss(policy, story_ids, tokenizer.bos, len(stories.encode()), STORY_WINDOW)
        show_answers(out, experience)
        return metrics | {"eval/story_loss": text["eval/text_loss"]}

    def score(model, tokens, mask):
        with run.autocast(device, cfg.dtype):
            return token_log_probs(model, tokens, mask, temperature=cfg.temperature)

    for step in out.steps():
        # 2. Look: held-out problems, answered by sampling and greedily.
        if step % cfg.eval_every == 0:
            out.log(look())

        # 3. Collect: G answers to each of P prompts, by the policy as it is now.
        started = time.perf_counter()
        with run.user_errors(NoContrast), run.autocast(device, cfg.dtype):
            experience = collect(policy, tokenizer, task, prompts=cfg.prompts, samples=cfg.group,
                                 seed=run.derive(cfg.seed, "rollout", step), resample=cfg.groups == "resample", **sampling)
        rollout, contrast = experience.rollout, experience.contrast
        collected = time.perf_counter()

        # 4. Compare: how much better is each answer than its group's average?
        adv = ADVANTAGES[cfg.advantage](experience.rewards).view(-1, 1).to(device)          # [B, 1]
        mask = rollout.mask                                                                 # [B, T-1]
        if cfg.groups == "drop":
            mask = mask & contrast.to(device)[rollout.prompt_index, None]
        if cfg.truncated == "mask":
            mask = mask & rollout.finished[:, None]

        # 5. Update. Micro-batches only bound memory: the weights are the whole optimizer step's, so they add up exactly.
        old_logp = torch.zeros(mask.shape, device=device)
        if updates > 1:                     # else they are the log-probs of the one update itself
            with torch.no_grad():
                for rows, T in micro_batches(torch.arange(len(mask), device=device), rollout.lengths, cfg.micro_batch):
                    old_logp[rows, : T - 1] = score(policy, rollout.tokens[rows, :T], mask[rows, : T - 1])[0]

        totals, tokens = defaultdict(float), 0
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup)
        for epoch in range(cfg.epochs):
            shuffle = torch.randperm(len(mask), generator=run.generator(cfg.seed, "minibatch", step, epoch)).to(device)
            for minibatch in shuffle.tensor_split(cfg.minibatches):
                weights = torch.zeros(mask.shape, device=device)
                weights[minibatch] = token_weights(mask[minibatch], rollout.prompt_index[minibatch], cfg.aggregate,
                                                   cfg.max_new_tokens)
                for rows, T in micro_batches(minibatch, rollout.lengths, cfg.micro_batch):
                    t, m, w = rollout.tokens[rows, :T], mask[rows, : T - 1], weights[rows, : T - 1]
                    logp, entropy = score(policy, t, m)
                    old = old_logp[rows, : T - 1] if updates > 1 else logp.detach()
                    with torch.no_grad():
                        ref_logp = score(reference, t, m)[0] if reference else None
                    loss, metrics = objective(logp, old, adv[rows], m, w, ref_logp=ref_logp, entropy=entropy,
                                              clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_coef=cfg.kl_coef,
                                              entropy_coef=cfg.entropy_coef)
                    loss.backward()
                    metrics["train/entropy"] = masked_sum(entropy.detach(), m)
                    metrics["train/mismatch_kl"] = masked_sum(kl_k3(rollout.logp[rows, : T - 1], old), m)
                    for name, value in metrics.items():
                        totals[name] = max(totals[name], value) if name.endswith("_max") else totals[name] + value
                    tokens += int(m.sum())
                totals["train/grad_norm_max"] = max(totals["train/grad_norm_max"], optimizer.step(lr, cfg.grad_clip))
        finished = time.perf_counter()

        # 6. Log: sums over tokens become means over tokens.
        facts = describe(experience)
        out.log({name: value if name.endswith("_max") else value / max(tokens, 1) for name, value in totals.items()})
        out.log({f"rollout/{name}": value for name, value in facts.items()})
        out.log({"rollout/tokens": int(rollout.mask.sum()), "rollout/no_contrast": 1 - contrast.float().mean(),
                 "rollout/resampled": experience.resampled, "train/lr": lr, "time/rollout_s": collected - started,
                 "time/update_s": finished - collected},
                show={"reward": f"{facts['reward']:.2f}", "worked": f"{facts['worked']:.2f}",
                      "length": f"{facts['length']:.1f}", "entropy": f"{totals['train/entropy'] / max(tokens, 1):.3f}"})

    # 7. What it was good for: held-out problems before and after.
    final = look()
    out.finish(final)
    before = out.metrics()[0]
    print(f"\n{cfg.eval_problems} held-out problems      before    after")
    for name, label in (("accuracy_sampled", "accuracy, sampled"), ("accuracy_greedy", "accuracy, greedy"),
                        ("worked", "share worked out"), ("reward_worked", "accuracy when worked out"),
                        ("reward_direct", "accuracy when blurted"), ("length", "tokens per answer"),
                        ("story_loss", "story loss, nats per token")):
        values = (f"{line[f'eval/{name}']:8.3f}" if f"eval/{name}" in line else "       -" for line in (before, final))
        print(f"  {label:28s}", *values)


if __name__ == "__main__":
    main(run.parse(Config))
