"""Pretraining: next-token prediction on a text.

    L = -1/N sum_bt log pi(x_bt+1 | x_b,<=t)            the mean over all N tokens of a step, in nats

    python train_pretrain.py                            the toy text, on a CPU in about a minute
    python train_pretrain.py --text book.txt --out runs/book
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanorl import ranks, run
from nanorl.data import DATA, consecutive_windows, random_windows, read_text, response_mask
from nanorl.gpt import GPT, PRESETS, GPTConfig
from nanorl.ops import masked_sum, token_weights
from nanorl.sample import generate, token_log_probs
from nanorl.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = "runs/pretrain"
    steps: run.Count = 900
    save_every: run.Count = 100
    lr: run.Positive = 1e-2
    eval_every: run.Count = 200

    text: str = str(DATA / "text.txt")    # any UTF-8 text file
    tokenizer: str = ""         # a rank file or a tiktoken name (gpt2, cl100k_base); by default one is trained on the text
    vocab_size: run.Count = 512  # of a trained tokenizer, special tokens included
    preset: Literal[*PRESETS] = "nano"    # size of the model
    positions: Literal["rope", "learned", "none"] = "rope"    # how the model knows the order of tokens
    batch: run.Count = 32       # sequences per micro-batch
    length: run.Count = 64      # tokens per sequence
    accumulate: run.Count = 1   # micro-batches per step
    optimizer: Literal["adamw", "muon"] = "muon"    # muon for the blocks' matrices with adamw for the rest, or all adamw
    warmup: run.Share = 0.1     # of the steps: the learning rate rises
    decay: run.Share = 0.5      # of the steps: the learning rate falls to 0
    weight_decay: run.NonNegative = 0.1    # decoupled; gains are left alone
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm


def objective(logp, mask, weights):
    """Cross-entropy of the tokens that count.       L = -sum_bt w_bt log pi(x_bt+1 | x_b,<=t)

    logp [B, T-1] nats; mask [B, T-1]; weights [B, T-1] from token_weights -> (loss, metrics that add up).
    """
    loss = -masked_sum(weights * logp, mask)
    return loss, {"train/loss": loss.detach()}


def split(text):
    """What to train on, and the last 5 %, which is held out."""
    cut = int(0.95 * len(text))
    return text[:cut], text[cut:]


@torch.no_grad()
def total_loss(model, tokens, mask, batch=64):
    """-sum of m_bt log pi(x_bt+1 | x_b,<=t), in nats, `batch` rows at a time.       tokens [B, T], mask [B, T-1]"""
    nats, device = 0.0, model.head.weight.device
    for t, m in zip(tokens.split(batch), mask.split(batch), strict=True):
        t, m = t.to(device), m.to(device)
        nats -= masked_sum(token_log_probs(model, t, m)[0], m).item()
    return nats


def text_loss(model, ids, bos, num_bytes, width):
    """Mean loss on a text, every token predicted once: nats per token, bits per byte, perplexity."""
    tokens, lengths = consecutive_windows(ids, bos, width)
    mask = response_mask(torch.ones_like(lengths), lengths, tokens.shape[1])
    nats, count = total_loss(model, tokens, mask), int(mask.sum())
    return {"eval/text_loss": nats / count, "eval/bits_per_byte": nats / math.log(2) / num_bytes,
            "eval/perplexity": math.exp(min(nats / count, 700.0))}


@run.says_why_it_stopped
def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work.
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        start = checkpoint or (run.load_checkpoint(cfg.init) if cfg.init else None)
        for flag in ("tokenizer", "vocab_size", "preset", "positions"):
            if cfg.init and getattr(cfg, flag) != getattr(Config, flag):
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: with --init, model and tokenizer are the "
                                 "checkpoint's; leave the flag out")
        if cfg.length < 2:
            raise ValueError("--length 1: expected at least 2, a BOS and a token to predict")
        text = read_text(cfg.text)
        training, heldout = split(text)
        if start:
            tokenizer = run.tokenizer_from(start)
        elif cfg.tokenizer:
            tokenizer = Tokenizer.load(cfg.tokenizer) if Path(cfg.tokenizer).exists() else Tokenizer.named(cfg.tokenizer)
        else:
            tokenizer = Tokenizer.train(training, cfg.vocab_size)
        train_ids, heldout_ids = (torch.tensor(tokenizer.encode(part)) for part in (training, heldout))
        if len(train_ids) < cfg.length or len(heldout_ids) < 2:
            raise ValueError(f"{cfg.text}: {len(train_ids)} tokens to train on and {len(heldout_ids)} held out; expected "
                             f"at least --length {cfg.length} and 2")
        if start:
            model = run.model_from(start, device)
        else:
            config = GPTConfig(tokenizer.vocab_size, **PRESETS[cfg.preset] | {"positions": cfg.positions})
            model = GPT(config, run.generator(cfg.seed, "init")).to(device)
        if cfg.length > model.config.context:
            raise ValueError(f"--length {cfg.length}: the model has a context of {model.config.context}")
        heldout_bytes = tokenizer.num_bytes(heldout_ids.tolist())

    optimizer = run.Optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    out = run.Run(cfg, checkpoint, model, optimizer, tokenizer)
    del start, checkpoint
    run.prepare(cfg, device, model)
    step_tokens = cfg.accumulate * cfg.batch * (cfg.length - 1)
    flops = model.training_flops_per_token(cfg.length) * step_tokens
    print(f"Pretraining {model.num_parameters():,} parameters on {cfg.text}: {len(train_ids):,} tokens of a vocabulary of "
          f"{tokenizer.vocab_size}, {step_tokens:,} a step, on {device.type}.")

    for step in out.steps():
        # 2. Look: the loss on text that is never trained on, and what the model would write.
        if step % cfg.eval_every == 0:
            with run.autocast(device, cfg.dtype):
                metrics = text_loss(model, heldout_ids, tokenizer.bos, heldout_bytes, cfg.length)
                write_a_sample(out, model, tokenizer, cfg)
            out.log(metrics)

        # 3. One step: micro-batches only bound memory, their gradients add up to the step's.
        started = time.perf_counter()
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup, cfg.decay)
        tokens = random_windows(train_ids, tokenizer.bos, cfg.accumulate * cfg.batch, cfg.length,
                                run.generator(cfg.seed, "batch", step)).to(device)
        mask = torch.ones(len(tokens), cfg.length - 1, dtype=torch.bool, device=device)
        weights = token_weights(mask, torch.arange(len(tokens), device=device), "token_mean")
        loss = 0.0
        mine = (ranks.parts(x, cfg.batch) for x in (tokens, mask, weights))
        for t, m, w in zip(*mine, strict=True):
            with run.autocast(device, cfg.dtype):
                logp, _ = token_log_probs(model, t)
            micro_loss, metrics = objective(logp, m, w)
            micro_loss.backward()
            loss += metrics["train/loss"].item()
        loss = sum(ranks.gathered(loss))
        grad_norm = optimizer.step(lr, cfg.grad_clip)
        seconds = time.perf_counter() - started

        # 4. Log.
        speed = {"time/tokens_per_s": step_tokens / seconds}
        if peak := run.peak_flops(device):
            speed["time/mfu"] = flops / seconds / peak
        out.log({"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr, **speed},
                show={"loss": f"{loss:.3f}", "tokens/s": f"{step_tokens / seconds:,.0f}"})

    with run.autocast(device, cfg.dtype):
        final = text_loss(model, heldout_ids, tokenizer.bos, heldout_bytes, cfg.length)
        write_a_sample(out, model, tokenizer, cfg)
    out.finish(final)
    print(f"Held-out text: {final['eval/text_loss']:.3f} nats per token (perplexity {final['eval/perplexity']:.1f}), "
          f"{final['eval/bits_per_byte']:.3f} bits per byte. Saved in {cfg.out}.")


def write_a_sample(out, model, tokenizer, cfg) -> None:
    rollout = generate(model, [[tokenizer.bos]], max_new_tokens=min(80, cfg.length), stop_ids={tokenizer.end},
                       seed=run.derive(cfg.seed, "sample"))
    text = tokenizer.decode(rollout.responses()[0])
    out.samples([{"text": text}])
    out.say(f"\nA sample after {out.step} steps: {text}\n")


if __name__ == "__main__":
    main(run.parse(Config))
