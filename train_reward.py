"""Reward model: which of two responses would a reader choose?

    P(w > l | x) = sigma(r(x, w) - r(x, l))             Bradley and Terry 1952
    L = -1/N sum_n log P(w_n > l_n | x_n)               the likelihood of the choices, N pairs

r is one number, read at a response's last token by a scalar head on the fine-tuned model's trunk. Only differences are
learned: r means nothing between prompts, and its zero means nothing at all.

    python train_reward.py                              pairs of stories, from nothing: makes the stages before it first
    python train_reward.py --data mine.jsonl --out runs/mine        records {"prompt", "chosen", "rejected"}

How good can it be? Readers do not always choose what they like better, so no model agrees with all of them: the ceiling
is what the hidden reward itself would reach. Has it learned more than habits? Two baselines ignore the order of words: one
prefers the longer (or shorter) response, one has a weight for every word.
"""

from dataclasses import dataclass

import torch

from nanorl import run
from nanorl.batches import add_metrics, sum_over_ranks
from nanorl.data import render_records, shuffled_batch
from nanorl.gpt import ScalarGPT
from nanorl.ops import bradley_terry, ranked_right
from nanorl.pairs import (PAIRS, agreement, calibration_error, hidden_margins, length_margins, pair_rollout, ranking_table,
                          read_pairs, split_pairs, word_margins)
from nanorl.tasks import Stories


def objective(chosen, rejected, weights):
    """Negative log-likelihood of the choices.       L = -sum_n w_n log sigma(r(w_n) - r(l_n))

    chosen, rejected: rewards [N]; weights [N], which add up to 1 over the whole step -> (loss, metrics that add up).
    """
    margin = chosen - rejected
    loss = (weights * bradley_terry(margin)).sum()
    return loss, {"train/loss": loss.detach(), "train/accuracy": (weights * ranked_right(margin)).sum(),
                  "train/margin": (weights * margin.detach()).sum()}


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = "runs/reward"
    steps: run.Count = 200
    lr: run.Positive = 2e-3
    eval_every: run.Count = 50

    # pairs
    data: str = ""              # JSONL records {"prompt", "chosen", "rejected"} (default: data/preferences.jsonl)
    skip_long: bool = False     # leave out records that do not fit the model's context
    batch: run.Count = 32       # pairs per step
    micro_batch: run.Count = 32  # pairs in memory at a time


@run.script
def main(cfg: Config) -> None:
    # 1. Start: check flags and files, then load the models.
    device, checkpoint = run.pick_device(cfg), run.Run.check(cfg)
    records = read_pairs(cfg.data)
    start = checkpoint or run.load_checkpoint(cfg.init or run.ensure_stage(cfg, "sft", task="stories"), "policy")
    tokenizer = run.tokenizer_from(start)
    model = run.model_from(start, device) if checkpoint else ScalarGPT(run.model_from(start, device)).to(device)
    records, prompts, chosen, rejected = render_records(records, tokenizer, model.config.context, cfg.data or PAIRS, "chosen",
                                                        "rejected", skip_long=cfg.skip_long)
    training, heldout, identical = split_pairs(records, cfg.data)

    # Muon needs fewer passes over a few thousand pairs than AdamW.
    optimizer = run.Optimizers(model, "muon", cfg.lr, weight_decay=0.1)
    out = run.Run(cfg, checkpoint, model, optimizer, tokenizer, data=records)
    del start, checkpoint
    run.compile_models(cfg, device, model.trunk)
    pairs = [[records[i] for i in part] for part in (training, heldout)]
    hidden = hidden_margins(pairs[1]) if not cfg.data else None
    print(f"A reward model from {len(training):,} pairs of {cfg.data or 'stories'}, {cfg.batch} a step, on {device.type}. "
          f"{len(heldout):,} are held out; {identical} more have equal responses and are left out.")

    def rewards(picks):
        """Of the chosen and of the rejected responses of these pairs."""
        rollout = pair_rollout(prompts, chosen, rejected, picks, tokenizer.pad)[0].to(device)
        with run.autocast(device, cfg.dtype):
            return model.at_end(rollout.tokens, rollout.lengths).float().chunk(2)

    @torch.no_grad()
    def margins(picks):
        parts = [rewards(picks[i : i + cfg.micro_batch]) for i in range(0, len(picks), cfg.micro_batch)]
        return torch.cat([better - worse for better, worse in parts]).cpu()

    def judge(margin):
        return {"eval/pair_loss": float(bradley_terry(margin).mean()), "eval/margin": float(margin.mean()),
                "eval/calibration_error": calibration_error(margin), **agreement("model", margin, hidden)}

    for step in out.steps():
        # 2. Evaluate: what would it choose by now?
        if heldout and step % cfg.eval_every == 0:
            out.log(judge(margins(heldout)))

        # 3. One step. Both responses of a pair stay together; the weights are the whole step's.
        picks, totals = [training[i] for i in shuffled_batch(len(training), cfg.batch, step, cfg.seed)], {}
        for part in run.ranks.parts(picks, cfg.micro_batch):
            better, worse = rewards(part)
            loss, metrics = objective(better, worse, torch.full_like(better, 1 / cfg.batch))
            loss.backward()
            add_metrics(totals, metrics)
        totals = sum_over_ranks(totals)
        lr = cfg.lr * out.schedule(warmup=0.1, decay=0.5)
        grad_norm = optimizer.step(lr, grad_clip=1.0)

        # 4. Log.
        out.log(totals | {"train/grad_norm": grad_norm, "train/lr": lr}, show=("train/loss", "train/accuracy"))

    # 5. Held-out pairs, with the baselines and the ceiling. The pairs with their margins go to samples.jsonl.
    final = {}
    if heldout:
        margin = margins(heldout)
        final = judge(margin) | agreement("words", word_margins(*pairs), hidden)
        final |= agreement("length", length_margins(*pairs), hidden)
        if hidden is not None:
            final["eval/agreement_ceiling_labels"] = float((hidden.abs() / Stories.label_temperature).sigmoid().mean())
        out.samples([{**record, "margin": m} for record, m in zip(pairs[1], margin.tolist(), strict=True)])
    out.finish(final)
    print(ranking_table(final, len(heldout)) + f"\nSaved in {cfg.out}.")


if __name__ == "__main__":
    main(run.parse(Config))
