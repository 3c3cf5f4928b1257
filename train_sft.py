"""Supervised fine-tuning: pretraining's loss, on response tokens only.

    L = -1/N sum_bt m_bt log pi(y_bt | x_b, y_b,<t)     m is True on the response and its stop token, N = sum m

    python train_sft.py                                 demonstrations of the default task, from runs/pretrain
    python train_sft.py --task sorting
    python train_sft.py --data mine.jsonl --out runs/mine        records {"prompt": ..., "response": ...}
"""

from dataclasses import dataclass

import torch

import train_pretrain
from nanorl import ranks, run
from nanorl.data import pad, read_records, response_mask, shuffled_batch
from nanorl.ops import token_weights
from nanorl.rollout import check_room, evaluate, show_answers
from nanorl.sample import generate, token_log_probs
from nanorl.tasks import default_max_new_tokens, is_heldout, make_task
from train_pretrain import objective, total_loss


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = ""               # directory of this run (default: runs/sft, or runs/sft-TASK)
    steps: run.Count = 300
    lr: run.Positive = 2e-3
    eval_every: run.Count = 100

    task: str = "addition"      # addition, sums, sorting, reversal, countdown, code or stories: demonstrated and evaluated
    data: str = ""              # JSONL records {"prompt", "response"} to learn from instead of the task's demonstrations
    demonstrations: run.Count = 20_000    # of the task; data/TASK.jsonl shows the first 4,000
    batch: run.Count = 64       # records per step
    micro_batch: run.Count = 64  # records in memory at a time
    warmup: run.Share = 0.1     # of the steps: the learning rate rises
    decay: run.Share = 0.5      # of the steps: the learning rate falls to 0
    weight_decay: run.NonNegative = 0.0    # decoupled; gains are left alone
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm
    max_new_tokens: run.Count | None = None    # of an answer in the evaluation (default: 80; code 120; stories 140)
    eval_problems: run.Count = 500    # held-out problems

    def __post_init__(self):
        self.default("out", run.stage_dir("sft", self.task))
        self.default("max_new_tokens", default_max_new_tokens(self.task))


def split(records, source):
    """Which records to train on, and which are held out by the hash of their prompt."""
    training, heldout = [], []
    for i, record in enumerate(records):
        (heldout if is_heldout(record["prompt"]) else training).append(i)
    if not training:
        raise ValueError(f"{source}: no record to train on; one prompt in ten is held out, here all of them")
    return training, heldout


def training_records(path, task, count=Config.demonstrations):
    """Demonstrations to learn from: those of a JSONL file that are not held out, or `count` of the task's own."""
    if not path:
        return task.demonstrations(count)
    records = read_records(path, ("prompt", "response"))
    training, _ = split(records, path)
    return [records[i] for i in training]


def render(records, tokenizer, context, source, key="response"):
    """Token ids of each record's prompt and of its response, which stands under `key`.

    ValueError names a record that does not fit the model's context.
    """
    prompts = [tokenizer.render(record["prompt"]) for record in records]
    responses = [tokenizer.render_response(record[key]) for record in records]
    for number, (x, y) in enumerate(zip(prompts, responses, strict=True), start=1):
        if len(x) + len(y) > context:
            raise ValueError(f"{source}, record {number}: {len(x) + len(y)} tokens do not fit the model's context of {context}")
    return prompts, responses


def batch_of(prompts, responses, picks, pad_id):
    """The picked records as tokens [B, T] and the mask of their responses [B, T-1]."""
    tokens, lengths = pad([prompts[i] + responses[i] for i in picks], pad_id)
    return tokens, response_mask(torch.tensor([len(prompts[i]) for i in picks]), lengths, tokens.shape[1])


def show_responses(out, model, tokenizer, picks, records, prompts, cfg) -> None:
    """Print what the model says to a few prompts, and keep it in samples.jsonl."""
    rollout = generate(model, [prompts[i] for i in picks], max_new_tokens=cfg.max_new_tokens, stop_ids={tokenizer.end},
                       seed=run.derive(cfg.seed, "sample"))
    said = [{"prompt": records[i]["prompt"], "response": tokenizer.decode(ids)}
            for i, ids in zip(picks, rollout.responses(), strict=True)]
    out.samples(said)
    out.say(f"\nAfter {out.step} steps:\n" + "\n".join(f"  {s['prompt']} -> {s['response']:.160}" for s in said) + "\n")


@run.says_why_it_stopped
def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work; then what depends on the model.
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        task = make_task(cfg.task, needs_verifier=False)
        if not cfg.data:
            task.start_verifier()   # for the evaluations
        records = read_records(cfg.data, ("prompt", "response")) if cfg.data else task.demonstrations(cfg.demonstrations)
        training, heldout = split(records, cfg.data)
    init = "" if checkpoint else cfg.init or run.ensure_stage(train_pretrain, out="runs/pretrain", **run.same(cfg))
    with run.user_errors():
        start = checkpoint or run.load_checkpoint(init, "policy")
        tokenizer, model = run.tokenizer_from(start), run.model_from(start, device)
        prompts, responses = render(records, tokenizer, model.config.context, cfg.data or task.name)
        check_room(model, prompts, cfg.max_new_tokens)

    optimizer = run.Optimizers(model, "adamw", cfg.lr, cfg.weight_decay)
    out = run.Run(cfg, checkpoint, model, optimizer, tokenizer)
    del start, checkpoint
    compiled = run.prepare(cfg, device, model)
    print(f"Fine-tuning on {len(training):,} demonstrations of {cfg.data or task.name}, {cfg.batch} a step, on "
          f"{device.type}.")

    def look() -> dict[str, float]:
        """Answers to held-out problems; with --data, responses to held-out records and the loss on them."""
        with run.autocast(device, cfg.dtype):
            if not cfg.data:
                metrics, experience = evaluate(model, tokenizer, task, problems=cfg.eval_problems,
                                               max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, compile=compiled)
                show_answers(out, experience)
                return metrics
            show_responses(out, model, tokenizer, (heldout or training)[:4], records, prompts, cfg)
            if not heldout:
                return {}
            tokens, mask = batch_of(prompts, responses, heldout, tokenizer.pad)
            return {"eval/response_loss": total_loss(model, tokens, mask, cfg.micro_batch) / int(mask.sum())}

    for step in out.steps():
        # 2. Look at what it can do by now.
        if step and step % cfg.eval_every == 0:
            out.log(look())

        # 3. One step: the mask, and so the loss, covers the response and its stop token.
        picks = [training[i] for i in shuffled_batch(len(training), cfg.batch, step, cfg.seed)]
        tokens, mask = (x.to(device) for x in batch_of(prompts, responses, picks, tokenizer.pad))
        weights = token_weights(mask, torch.arange(len(picks), device=device), "token_mean")
        loss = 0.0
        mine = (ranks.parts(x, cfg.micro_batch) for x in (tokens, mask, weights))
        for t, m, w in zip(*mine, strict=True):
            with run.autocast(device, cfg.dtype):
                logp, _ = token_log_probs(model, t, m)
            micro_loss, metrics = objective(logp, m, w)
            micro_loss.backward()
            loss += metrics["train/loss"].item()
        loss = sum(ranks.gathered(loss))
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup, cfg.decay)
        grad_norm = optimizer.step(lr, cfg.grad_clip)

        # 4. Log.
        out.log({"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}, show={"loss": f"{loss:.3f}"})

    final = look()
    out.finish(final)
    if cfg.data:
        result = f"Held-out responses: {final['eval/response_loss']:.3f} nats per token." if final else "No record is held out."
    elif not task.verifiable:
        result = f"Held-out {task.name}: a hidden reward of {final['eval/hidden_reward']:.2f}."
    else:
        result = (f"Held-out {task.name}: {final['eval/accuracy_sampled']:.3f} sampled, {final['eval/accuracy_greedy']:.3f} "
                  f"greedy; {final['eval/worked']:.2f} of the answers worked out.")
    print(f"{result} Saved in {cfg.out}.")


if __name__ == "__main__":
    main(run.parse(Config))
