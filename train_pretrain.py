"""Pretraining: next-token prediction on a text.

    L = -1/N sum_bt log pi(x_bt+1 | x_b,<=t)            the mean over all N tokens of a step, in nats

    python train_pretrain.py                            the toy text, on a CPU in about a minute
    python train_pretrain.py --text book.txt --out runs/book
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanorl import run
from nanorl.batches import add_metrics, sum_over_ranks
from nanorl.data import DATA, random_windows, split_text
from nanorl.files import read_text
from nanorl.gpt import GPT, PRESETS, GPTConfig
from nanorl.heldout import text_loss
from nanorl.ops import masked_sum, token_weights
from nanorl.sample import generate, token_log_probs
from nanorl.tokenizer import Tokenizer


def objective(logp, mask, weights):
    """Cross-entropy of the tokens that count.       L = -sum_bt w_bt log pi(x_bt+1 | x_b,<=t)

    logp [B, T-1] nats; mask [B, T-1]; weights [B, T-1] from token_weights -> (loss, metrics that add up).
    """
    loss = -masked_sum(weights * logp, mask)
    return loss, {"train/loss": loss.detach()}


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = "runs/pretrain"
    steps: run.Count = 400
    save_every: run.Count = 100
    lr: run.Positive = 1e-2
    eval_every: run.Count = 200

    # text and model
    text: str = ""              # any UTF-8 text file (default: the toy text, data/text.txt)
    tokenizer: str = ""         # a rank file or a tiktoken name (gpt2, cl100k_base); by default one is trained on the text
    vocab_size: run.Count = 512  # of a trained tokenizer, special tokens included
    preset: Literal[*PRESETS] = "nano"    # size of the model
    positions: Literal["rope", "learned", "none"] = "rope"    # how the model knows the order of tokens
    batch: run.Count = 32       # sequences per micro-batch
    length: run.Count = 64      # tokens per sequence
    accumulate: run.Count = 1   # micro-batches per step
    optimizer: Literal["adamw", "muon"] = "muon"    # muon for the blocks' matrices with adamw for the rest, or all adamw


@run.script
def main(cfg: Config) -> None:
    # 1. Start: check flags and files, then load the models.
    device, checkpoint = run.pick_device(cfg), run.Run.check(cfg)
    start = checkpoint or (run.load_checkpoint(cfg.init) if cfg.init else None)
    for flag in ("tokenizer", "vocab_size", "preset", "positions"):
        cfg.require(not cfg.init or getattr(cfg, flag) == getattr(Config, flag), flag,
                    "with --init, model and tokenizer are the checkpoint's; leave the flag out")
    cfg.require(cfg.length >= 2, "length", "expected at least 2, a BOS and a token to predict")
    text = read_text(cfg.text or DATA / "text.txt")
    training, heldout = split_text(text)
    if start:
        tokenizer, model = run.tokenizer_from(start), run.model_from(start, device)
    else:
        if cfg.tokenizer:
            tokenizer = Tokenizer.load(cfg.tokenizer) if Path(cfg.tokenizer).exists() else Tokenizer.named(cfg.tokenizer)
        else:
            tokenizer = Tokenizer.train(training, cfg.vocab_size, cfg.quiet)
        config = GPTConfig(tokenizer.vocab_size, **PRESETS[cfg.preset] | {"positions": cfg.positions})
        model = GPT(config, run.generator(cfg.seed, "init")).to(device)
    cfg.require(cfg.length <= model.config.context, "length", f"the model has a context of {model.config.context}")
    train_ids, heldout_ids = torch.tensor(tokenizer.encode(training)), tokenizer.encode(heldout)
    cfg.require(len(train_ids) >= cfg.length and len(heldout_ids) >= 2, "text", f"{len(train_ids)} tokens to train on, "
                f"{len(heldout_ids)} held out; expected at least --length {cfg.length} and 2")

    optimizer = run.Optimizers(model, cfg.optimizer, cfg.lr, weight_decay=0.1)
    out = run.Run(cfg, checkpoint, model, optimizer, tokenizer, data=text)
    del start, checkpoint
    run.compile_models(cfg, device, model)
    step_tokens = cfg.accumulate * cfg.batch * (cfg.length - 1)
    flops = model.training_flops_per_token(cfg.length) * step_tokens
    print(f"Pretraining {model.num_parameters():,} parameters on {cfg.text or 'the toy text'}: {len(train_ids):,} tokens of a "
          f"vocabulary of {tokenizer.vocab_size}, {step_tokens:,} a step, on {device.type}.")

    def evaluate_now() -> dict[str, float]:
        """The loss on text that is never trained on. Also shows what the model would write."""
        with run.autocast(device, cfg.dtype):
            rollout = generate(model, [[tokenizer.bos]], max_new_tokens=min(80, cfg.length), stop_ids=tokenizer.stop_ids,
                               seed=run.derive(cfg.seed, "sample"))
            metrics = text_loss(model, tokenizer, heldout_ids, cfg.length)
        text = tokenizer.decode(rollout.responses()[0])
        out.samples([{"text": text}])
        out.say(f"\nA sample after {out.step} steps: {text}\n")
        return metrics

    for step in out.steps():
        # 2. Evaluate.
        if step % cfg.eval_every == 0:
            out.log(evaluate_now())

        # 3. One step: micro-batches only bound memory, their gradients add up to the step's.
        started = time.perf_counter()
        lr = cfg.lr * out.schedule(warmup=0.1, decay=0.5)
        tokens = random_windows(train_ids, tokenizer.bos, cfg.accumulate * cfg.batch, cfg.length,
                                run.generator(cfg.seed, "batch", step)).to(device)
        mask = torch.ones(len(tokens), cfg.length - 1, dtype=torch.bool, device=device)
        weights = token_weights(mask, torch.arange(len(tokens), device=device), "token_mean")
        totals = {}
        mine = (run.ranks.parts(x, cfg.batch) for x in (tokens, mask, weights))
        for t, m, w in zip(*mine, strict=True):
            with run.autocast(device, cfg.dtype):
                logp, _ = token_log_probs(model, t)
            micro_loss, metrics = objective(logp, m, w)
            micro_loss.backward()
            add_metrics(totals, metrics)
        grad_norm = optimizer.step(lr, grad_clip=1.0)
        seconds = time.perf_counter() - started

        # 4. Log.
        speed = {"time/tokens_per_s": step_tokens / seconds}
        if peak := run.peak_flops(device):
            speed["time/mfu"] = flops / seconds / peak
        out.log(sum_over_ranks(totals) | {"train/grad_norm": grad_norm, "train/lr": lr, **speed},
                show=("train/loss", "time/tokens_per_s"))

    final = evaluate_now()
    out.finish(final)
    print(f"Held-out text: {final['eval/text_loss']:.3f} nats per token (perplexity {final['eval/perplexity']:.1f}), "
          f"{final['eval/bits_per_byte']:.3f} bits per byte. Saved in {cfg.out}.")


if __name__ == "__main__":
    main(run.parse(Config))
