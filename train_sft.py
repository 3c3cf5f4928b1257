"""Supervised fine-tuning: pretraining's loss, on response tokens only.

    L = -1/N sum_bt m_bt log pi(y_bt | x_b, y_b,<t)     m is True on the response and its stop token, N = sum m

    python train_sft.py                                 demonstrations of the default task, from runs/pretrain
    python train_sft.py --task sorting
    python train_sft.py --data mine.jsonl --out runs/mine        records {"prompt": ..., "response": ...}
"""

from dataclasses import dataclass

import torch

import train_pretrain
from nanorl import run
from nanorl.data import pad, read_records, response_mask, shuffled_batch
from nanorl.ops import token_weights
from nanorl.rollout import check_room, evaluate, show_answers
from nanorl.sample import token_log_probs
from nanorl.tasks import make_task
from train_pretrain import objective


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = ""               # directory of this run (default: runs/sft, or runs/sft-TASK)
    steps: run.Count = 200
    lr: run.Positive = 1e-3
    eval_every: run.Count = 200

    task: str = "addition"      # addition, sums, sorting, reversal or countdown: what is demonstrated and evaluated
    difficulty: run.Natural = 0  # of the task, 0 is its own default
    data: str = ""              # JSONL records {"prompt", "response"} to learn from instead of the task's demonstrations
    batch: run.Count = 64       # records per step
    micro_batch: run.Count = 64  # records in memory at a time
    warmup: run.Share = 0.1     # of the steps: the learning rate rises
    decay: run.Share = 0.5      # of the steps: the learning rate falls to 0
    weight_decay: run.NonNegative = 0.0    # decoupled; gains are left alone
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm
    max_new_tokens: run.Count = 64    # of an answer in the evaluation
    eval_problems: run.Count = 500    # held-out problems

    def __post_init__(self):
        object.__setattr__(self, "out", self.out or run.stage_dir("sft", self.task, self.difficulty))


def main(cfg: Config) -> None:
    # 1. Everything that can be wrong with flags and files comes to light here, before any work.
    with run.user_errors():
        device = run.pick_device(cfg.device)
        checkpoint = run.Run.check(cfg)
        task = make_task(cfg.task, cfg.difficulty or None)
        records = read_records(cfg.data, ("prompt", "response")) if cfg.data else task.demonstrations()
        init = cfg.init or run.ensure_stage(train_pretrain, out="runs/pretrain", **run.same(cfg))
        start = checkpoint or run.load_checkpoint(init)
        tokenizer, model = run.tokenizer_from(start), run.model_from(start, device)
        check_room(model, tokenizer, task, cfg.max_new_tokens)
        prompts = [tokenizer.render(record["prompt"]) for record in records]
        responses = [tokenizer.render_response(record["response"]) for record in records]
        for number, (x, y) in enumerate(zip(prompts, responses, strict=True), start=1):
            if len(x) + len(y) > model.config.context:
                raise ValueError(f"{cfg.data or task.name}, record {number}: {len(x) + len(y)} tokens do not fit the "
                                 f"model's context of {model.config.context}")

    optimizer = run.Optimizers(model, "adamw", cfg.lr, cfg.weight_decay)
    out = run.Run(cfg, checkpoint, model, optimizer, tokenizer)
    if out.finished:
        return print(f"{cfg.out} is finished: {cfg.steps} steps.")
    compiled = run.wants_compile(cfg, device)
    if compiled:
        run.compile_blocks(model)
    print(f"Fine-tuning on {len(records):,} demonstrations of {cfg.data or task.name}, {cfg.batch} a step, on "
          f"{device.type}.")

    def look() -> dict[str, float]:
        with run.autocast(device, cfg.dtype):
            metrics, experience = evaluate(model, tokenizer, task, problems=cfg.eval_problems,
                                           max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, compile=compiled)
        show_answers(out, experience)
        return metrics

    for step in out.steps():
        # 2. Look: held-out problems, answered by sampling and greedily.
        if step and step % cfg.eval_every == 0:
            out.log(look())

        # 3. One step: the mask, and so the loss, covers the response and its stop token.
        picks = shuffled_batch(len(records), cfg.batch, step, cfg.seed)
        tokens, lengths = pad([prompts[i] + responses[i] for i in picks], tokenizer.pad)
        mask = response_mask(torch.tensor([len(prompts[i]) for i in picks]), lengths, tokens.shape[1])
        weights = token_weights(mask, torch.arange(len(picks)), "token_mean")
        tokens, mask, weights = (x.to(device) for x in (tokens, mask, weights))
        loss = 0.0
        for rows in torch.arange(len(picks)).split(cfg.micro_batch):
            with run.autocast(device, cfg.dtype):
                logp, _ = token_log_probs(model, tokens[rows], mask[rows])
            micro_loss, metrics = objective(logp, mask[rows], weights[rows])
            micro_loss.backward()
            loss += metrics["train/loss"].item()
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup, cfg.decay)
        grad_norm = optimizer.step(lr, cfg.grad_clip)

        # 4. Log.
        out.log({"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}, show={"loss": f"{loss:.3f}"})

    final = look()
    out.finish(final)
    print(f"Held-out {task.name}: {final['eval/accuracy_sampled']:.3f} sampled, {final['eval/accuracy_greedy']:.3f} "
          f"greedy; {final['eval/worked']:.2f} of the answers worked out. Saved in {cfg.out}.")


if __name__ == "__main__":
    main(run.parse(Config))
