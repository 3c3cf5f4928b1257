"""Supervised fine-tuning: pretraining's loss, on response tokens only.

    L = -1/N sum_bt m_bt log pi(y_bt | x_b, y_b,<t)     m is True on the response and its stop token, N = sum m

    python train_sft.py                                 demonstrations of the default task, from runs/pretrain
    python train_sft.py --task sorting
    python train_sft.py --data mine.jsonl --out runs/mine        records {"prompt": ..., "response": ...}
"""

from dataclasses import dataclass

import torch

from nanorl import run
from nanorl.batches import add_metrics, sum_over_ranks
from nanorl.data import render_records, response_batch, shuffled_batch, split_records
from nanorl.files import read_records
from nanorl.heldout import evaluate_and_show, show_responses, total_loss
from nanorl.ops import masked_sum, token_weights
from nanorl.sample import Sampling, token_log_probs
from nanorl.tasks import default_max_new_tokens, make_task


def objective(logp, mask, weights):
    """Cross-entropy of the response tokens.       L = -sum_bt w_bt log pi(y_bt | x_b, y_b,<t)

    logp [B, T-1] nats; mask [B, T-1]; weights [B, T-1] from token_weights -> (loss, metrics that add up).
    """
    loss = -masked_sum(weights * logp, mask)
    return loss, {"train/loss": loss.detach()}


@dataclass(frozen=True, kw_only=True)
class Config(run.PolicyConfig):
    out: str = ""               # directory of this run (default: runs/sft, or runs/sft-TASK)
    steps: run.Count = 250
    lr: run.Positive = 1e-3
    eval_every: run.Count = 100

    # demonstrations
    task: str = "addition"      # addition, sums, sorting, reversal, countdown, code, calculator, guess or stories
    data: str = ""              # JSONL records {"prompt", "response"} to learn from instead of the task's demonstrations
    skip_long: bool = False     # leave out records that do not fit the model's context
    demonstrations: run.Count = 20_000    # of the task; data/TASK.jsonl shows the first 4,000
    batch: run.Count = 64       # records per step
    micro_batch: run.Count = 64  # records in memory at a time
    max_new_tokens: run.Count | None = None    # of an answer in the evaluation (default: the task's own; addition 80)
    eval_problems: run.Count = 500    # held-out problems in an evaluation

    def __post_init__(self):
        super().__post_init__()
        make_task(self.task, needs_verifier=False)          # fails on an unknown task even where --data makes it unused
        self.default("out", run.stage_dir("sft", self.task))
        self.default("max_new_tokens", default_max_new_tokens(self.task))


@run.script
def main(cfg: Config) -> None:
    # 1. Start: check flags and files, then load the models.
    if cfg.data:
        task, records = None, read_records(cfg.data, "demonstrations")
    else:
        task = run.choose_task(cfg.task, needs_verifier=False)
        records = task.demonstrations(cfg.demonstrations)
    source = cfg.data or str(task)
    if cfg.data:
        split_records(records, source)          # fails before minutes are spent on another stage
    device, checkpoint, tokenizer, model, _, _ = run.begin(cfg, "pretrain", task=task)
    records, prompts, responses = render_records(records, tokenizer, model.config.context, source, "response",
                                                 reserve=cfg.max_new_tokens, skip_long=cfg.skip_long)
    training, heldout = split_records(records, source) if cfg.data else (list(range(len(records))), [])

    optimizer = run.Optimizers(model, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, model, optimizer, tokenizer, data=records)
    del checkpoint
    sampling = Sampling(cfg.max_new_tokens, compile=run.compile_models(cfg, device, model))
    held_out = f" ({len(heldout):,} more are held out)" if heldout else ""
    print(f"Fine-tuning on {len(training):,} demonstrations of {source}{held_out}, {cfg.batch} a step, on {device.type}.")

    def evaluate_now() -> dict[str, float]:
        """Answers to held-out problems; with --data, responses to held-out records and the loss on them."""
        if task:
            return evaluate_and_show(out, task, sampling)
        show_responses(out, [records[i]["prompt"] for i in (heldout or training)[:4]])
        if not heldout:
            return {}
        tokens, mask = response_batch(prompts, responses, heldout, tokenizer.pad)
        with run.autocast(device, cfg.dtype):
            return {"eval/response_loss": total_loss(model, tokens, mask, cfg.micro_batch) / int(mask.sum())}

    for step in out.steps():
        # 2. Evaluate: what can it do by now?
        if step and step % cfg.eval_every == 0:
            out.log(evaluate_now())

        # 3. One step: the mask, and so the loss, covers the response and its stop token.
        picks = [training[i] for i in shuffled_batch(len(training), cfg.batch, step, cfg.seed)]
        tokens, mask = (x.to(device) for x in response_batch(prompts, responses, picks, tokenizer.pad))
        weights = token_weights(mask, torch.arange(len(picks), device=device), "token_mean")
        totals = {}
        mine = (run.ranks.parts(x, cfg.micro_batch) for x in (tokens, mask, weights))
        for t, m, w in zip(*mine, strict=True):
            with run.autocast(device, cfg.dtype):
                logp, _ = token_log_probs(model, t, m)
            micro_loss, metrics = objective(logp, m, w)
            micro_loss.backward()
            add_metrics(totals, metrics)
        lr = cfg.lr * out.schedule(warmup=0.1, decay=0.5)
        grad_norm = optimizer.step(lr, grad_clip=1.0)

        # 4. Log.
        out.log(sum_over_ranks(totals) | {"train/grad_norm": grad_norm, "train/lr": lr}, show=("train/loss",))

    final = evaluate_now()
    out.finish(final)
    if not task:
        result = f"Held-out responses: {final['eval/response_loss']:.3f} nats per token." if final else "No record is held out."
    elif task.right_reward is None:
        result = f"Held-out {task}: a {task.measured} of {final.get('eval/reward', final.get('eval/hidden_reward')):.2f}."
    else:
        result = (f"Held-out {task}: {final['eval/accuracy_sampled']:.3f} sampled, {final['eval/accuracy_greedy']:.3f} "
                  f"greedy; {final['eval/worked']:.2f} of the answers worked out.")
    print(f"{result} Saved in {cfg.out}.")


if __name__ == "__main__":
    main(run.parse(Config))
