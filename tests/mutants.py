"""A mutation run: faults are put into the equations one at a time, and the math tests must notice each.

    python -m tests.mutants                     every fault, as many at a time as there are CPUs
    python -m tests.mutants --only clip         those whose name contains "clip"
    python -m tests.mutants --table docs/mutants.md         write the table to a file, too

That tests pass says little as long as nobody has seen them fail. Each fault below, of a kind that people really make,
is put into a copy of the working tree, and `pytest -m math -x` runs there. A fault is killed when a test fails; one that
survives is behaviour that no theorem pins down.

To add a fault, append a Mutant to its group: what is wrong in plain words, the file, a piece of source that stands in it
exactly once, best part of one line, and what to put in its place. The faulty code should run: whatever stops at once
proves nothing. What changes no behaviour, such as blanking a value that is never looked at, is no fault.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
OPS, GRPO, PRETRAIN, DATA = "nanorl/ops.py", "train_grpo.py", "train_pretrain.py", "nanorl/data.py"
REWARD, DPO, GROUPS, PPO, DISTILL = ("train_reward.py", "train_dpo.py", "train_group_dpo.py", "train_ppo.py",
                                     "train_distill.py")
SEARCH, EVALUATE, TABULAR = "nanorl/search.py", "nanorl/evaluate.py", "nanorl/tabular.py"
FAMILY, HELDOUT, SFT = "nanorl/family.py", "nanorl/heldout.py", "train_sft.py"
DETACHED = 'assert not adv.requires_grad, "advantages are constants: detach them"\n    '
OLD_DETACHED = 'assert not old_logp.requires_grad, "old log-probs are constants: detach them"\n    '


class Mutant(NamedTuple):
    fault: str
    file: str
    old: str
    new: str


MUTANTS = [
    # ---- Signs ----
    Mutant("GRPO's loss is maximised", GRPO, "return -(weights * surrogate)", "return (weights * surrogate)"),
    Mutant("the KL divergence is a bonus", GRPO, "surrogate - kl_coef *", "surrogate + kl_coef *"),
    Mutant("cross-entropy is maximised", PRETRAIN, "loss = -masked_sum", "loss = masked_sum"),
    Mutant("advantage's sign flipped in the clipped surrogate", OPS,
           "return torch.minimum(ratio * adv, ", "adv = -adv\n    return torch.minimum(ratio * adv, "),
    Mutant("advantage's sign flipped in the truncated surrogate", OPS, ".clamp(max=cap) * adv", ".clamp(max=cap) * -adv"),
    Mutant("advantage's sign flipped in the masked surrogate", OPS,
           ".masked_fill(outside, 0.0) * adv", ".masked_fill(outside, 0.0) * -adv"),
    Mutant("advantage's sign flipped where there is no bound", GRPO, "surrogate = adv * (", "surrogate = -adv * ("),
    Mutant("advantages compare the mean with the reward", OPS, "return (r - mean).masked", "return (mean - r).masked"),
    Mutant("the importance ratio is upside down", OPS, "return (_at_least_float32(logp) - _at_least_float32(old_logp))",
           "return (_at_least_float32(old_logp) - _at_least_float32(logp))"),
    Mutant("log-softmax adds the normaliser", OPS,
           "return z - z.exp().sum(dim, keepdim=True).log()", "return z + z.exp().sum(dim, keepdim=True).log()"),
    Mutant("the log-prob of a token adds the normaliser", OPS, ".squeeze(-1) - z.exp().sum(-1).log()",
           ".squeeze(-1) + z.exp().sum(-1).log()"),
    Mutant("the scorer's backward pass climbs down", OPS,
           "torch.exp(log_p, out=p).neg_()", "torch.exp(log_p, out=p)"),
    Mutant("overlong answers are paid for their length", OPS,
           "((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)", "((lengths - limit + buffer) / buffer).clamp(0.0, 1.0)"),

    # ---- Min and max ----
    Mutant("the clipped surrogate is optimistic", OPS, "torch.minimum(ratio * adv", "torch.maximum(ratio * adv"),
    Mutant("the truncated weight is at least the cap", OPS, ".clamp(max=cap)", ".clamp(min=cap)"),
    Mutant("the smallest logit is subtracted instead of the largest", OPS,
           "x.detach().amax(dim, keepdim=True)", "x.detach().amin(dim, keepdim=True)"),
    Mutant("short answers are paid for what they leave unused", OPS, ".clamp(-1.0, 0.0)", ".clamp(-1.0, 1.0)"),
    Mutant("the overlong penalty has no floor", OPS, ".clamp(-1.0, 0.0)", ".clamp(max=0.0)"),
    Mutant("ratio_max is the smallest ratio", GRPO, ".max().clamp(min=1)", ".min().clamp(min=1)"),
    Mutant("ratio_min is the largest ratio", GRPO, ".min().clamp(max=1)", ".max().clamp(max=1)"),
    Mutant("ratio_max depends on whether there is padding", GRPO, ".max().clamp(min=1)", ".max()"),

    # ---- Shifts: off by one ----
    Mutant("stop token dropped from the mask", DATA, "(target < lengths[:, None])", "(target < lengths[:, None] - 1)"),
    Mutant("first token of the response dropped from the mask", DATA,
           "(prompt_lengths[:, None] <= target)", "(prompt_lengths[:, None] < target)"),
    Mutant("the mask belongs to inputs instead of targets", DATA, "torch.arange(1, width,", "torch.arange(width - 1,"),
    Mutant("the scorer skips the last row of a chunk, forward", OPS,
           "slice(start, start + chunk_size)", "slice(start, start + chunk_size - 1)"),
    Mutant("the scorer skips the last row of a chunk, backward", OPS,
           "slice(start, start + ctx.chunk_size)", "slice(start, start + ctx.chunk_size - 1)"),
    Mutant("leave-one-out divides by all samples", OPS, "* count / (count - 1).clamp(min=1)", "* count / count.clamp(min=1)"),
    Mutant("z-scores divide by the sample std", OPS, "keepdim=True) / count).sqrt()", "keepdim=True) / (count - 1)).sqrt()"),
    Mutant("the overlong penalty starts at the limit", OPS, "(limit - buffer - lengths)", "(limit - lengths)"),

    # ---- Masks ----
    Mutant("masked sums multiply by the mask", OPS, "return x.masked_fill(~mask, 0.0).sum()", "return (x * mask).sum()"),
    Mutant("masked sums sum what is masked", OPS,
           "return x.masked_fill(~mask, 0.0).sum()", "return x.masked_fill(mask, 0.0).sum()"),
    Mutant("masked means divide by all elements", OPS, "/ mask.sum().clamp(min=1)", "/ mask.numel()"),
    Mutant("log-probs of padding reach GRPO's ratio", GRPO,
           "logp, old_logp = logp.masked_fill(~mask, 0.0),", "logp, old_logp = logp,"),
    Mutant("old log-probs of padding reach GRPO's ratio", GRPO, "0.0), old_logp.masked_fill(~mask, 0.0)", "0.0), old_logp"),
    Mutant("reference log-probs of padding reach GRPO's loss", GRPO,
           "ref_logp = ref_logp.masked_fill(~mask, 0.0)", "ref_logp = ref_logp"),
    Mutant("entropies of padding reach GRPO's loss", GRPO,
           "entropy_coef * entropy.masked_fill(~mask, 0.0)", "entropy_coef * entropy"),
    Mutant("cross-entropy does not look at the mask", PRETRAIN, "-masked_sum(weights * logp, mask)", "-(weights * logp).sum()"),
    Mutant("a weight for masked tokens", OPS, "return mask / count", "return torch.ones_like(mask) / count"),
    Mutant("samples without a score enter the mean", OPS,
           "r = rewards.double().masked_fill(~valid, 0.0)", "r = rewards.double()"),
    Mutant("samples without a score count in the mean", OPS,
           "r.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)", "r.sum(-1, keepdim=True) / valid.numel() * len(valid)"),
    Mutant("samples without a score have an advantage", OPS,
           ".masked_fill(~valid | (highest <= lowest), 0.0)", ".masked_fill(highest <= lowest, 0.0)"),
    Mutant("samples without a score count in the z-score's std", OPS,
           "count = rewards.shape[-1] if valid is None else valid.sum(-1, keepdim=True).clamp(min=1)",
           "count = rewards.shape[-1]"),
    Mutant("dropped answers enter the step's std", OPS,
           "torch.ones_like(a, dtype=torch.bool) if kept is None else kept", "torch.ones_like(a, dtype=torch.bool)"),
    Mutant("the masked surrogate masks after exp()", OPS,
           "importance_ratio(logp.masked_fill(outside, 0.0), old_logp.masked_fill(outside, 0.0))",
           "importance_ratio(logp, old_logp)"),
    Mutant("nothing is left out of the mask", GRPO, "mask & kept.view(-1, 1)", "mask | kept.view(-1, 1)"),

    # ---- Weights and aggregation ----
    Mutant("GRPO forgets the weights", GRPO, "return -(weights * surrogate).sum()", "return -(mask * surrogate).sum()"),
    Mutant("GRPO divides by the weights of its micro-batch", GRPO,
           "-(weights * surrogate).sum()", "-(weights * surrogate).sum() / weights.sum().clamp(min=1e-9)"),
    Mutant("cross-entropy forgets the weights", PRETRAIN, "masked_sum(weights * logp, mask)", "masked_sum(logp, mask)"),
    Mutant("fine-tuning's cross-entropy forgets the weights", SFT,
           "masked_sum(weights * logp, mask)", "masked_sum(logp, mask)"),
    Mutant("token_mean counts padding", OPS, "count = length.sum()", "count = length.new_tensor(mask.numel())"),
    Mutant("sequence_mean counts empty rows", OPS, "count = rows * length", "count = len(mask) * length"),
    Mutant("sequence_mean forgets the length", OPS, "count = rows * length", "count = rows * torch.ones_like(length)"),
    Mutant("prompt_mean counts prompts without a token", OPS, "count = (tokens > 0).sum() *", "count = len(prompts) *"),
    Mutant("sequence_sum does not divide by the rows", OPS,
           '"sequence_sum":\n        count = rows', '"sequence_sum":\n        count = torch.ones_like(rows)'),
    Mutant("constant divides by the longest row at hand", OPS, "count = rows * max_new_tokens", "count = rows * mask.shape[1]"),

    # ---- Means of means ----
    Mutant("GRPO's loss is a mean over its micro-batch", GRPO, "-(weights * surrogate).sum()", "-(weights * surrogate).mean()"),
    Mutant("cross-entropy is a mean over its micro-batch", PRETRAIN,
           "masked_sum(weights * logp, mask)", "masked_sum(weights * logp, mask) / mask.sum().clamp(min=1)"),
    Mutant("the KL metric is a mean over its micro-batch", GRPO,
           "logp.detach(), ref_logp), mask)", "logp.detach(), ref_logp), mask) / mask.sum().clamp(min=1)"),
    Mutant("the count of clipped tokens is a share", GRPO,
           "masked_sum(held.float(), mask)", "masked_sum(held.float(), mask) / mask.numel()"),
    Mutant("prompt_mean averages answers, not tokens", OPS, "tokens[index, None]", "length"),
    Mutant("token_mean averages within a row", OPS, "count = length.sum()", "count = len(mask) * length"),
    Mutant("the std of the step is one of each group", OPS,
           "masked_mean(a.square(), torch.ones_like(a, dtype=torch.bool) if kept is None else kept)",
           "a.square().mean(-1, keepdim=True)"),
    Mutant("the std of the step is about the step's mean", OPS,
           "masked_mean(a.square()", "masked_mean((rewards - rewards.mean()).double().square()"),
    Mutant("z-scores take the std of all groups", OPS,
           "(a.square().sum(-1, keepdim=True) / count).sqrt()", "(a.square().sum() / (count * len(a))).sqrt()"),

    # ---- Detach: what may carry a gradient ----
    Mutant("a gradient flows through the truncated weight", OPS,
           "importance_ratio(logp.detach(), old_logp).clamp", "importance_ratio(logp, old_logp).clamp"),
    Mutant("no gradient flows through a truncated token", OPS,
           "* adv * _at_least_float32(logp)", "* adv * _at_least_float32(logp).detach()"),
    Mutant("importance_ratio takes old log-probs with a gradient", OPS,
           OLD_DETACHED + "return (_at_least", "return (_at_least"),
    Mutant("sequence_ratio takes old log-probs with a gradient", OPS, OLD_DETACHED + "log_ratio", "log_ratio"),
    Mutant("clipped_surrogate takes advantages with a gradient", OPS,
           DETACHED + "ratio = importance_ratio(logp, old_logp)", "ratio = importance_ratio(logp, old_logp)"),
    Mutant("truncated_surrogate takes advantages with a gradient", OPS, DETACHED + "return importance", "return importance"),
    Mutant("masked_surrogate takes advantages with a gradient", OPS,
           DETACHED + "ratio = importance_ratio(logp.detach()", "ratio = importance_ratio(logp.detach()"),
    Mutant("gae takes a bootstrap with a gradient", OPS, "for x in inputs), ", "for x in inputs[:2]), "),
    Mutant("gae takes values with a gradient", OPS, "for x in inputs), ", "for x in inputs[::2]), "),
    Mutant("GRPO's ratio metrics carry a graph", GRPO,
           "importance_ratio(new.detach(), old)", "importance_ratio(new, old)"),
    Mutant("GRPO's KL metric carries a graph", GRPO, "masked_sum(kl_k3(logp.detach(),", "masked_sum(kl_k3(logp,"),
    Mutant("the cross-entropy metric carries a graph", PRETRAIN, '{"train/loss": loss.detach()}', '{"train/loss": loss}'),
    Mutant("the ratio that weighs a KL is a constant", GRPO,
           "weight = importance_ratio(logp, old_logp)", "weight = importance_ratio(logp.detach(), old_logp)"),

    # ---- Kullback-Leibler divergence ----
    Mutant("kl_divergence measures the wrong direction", OPS,
           "log_softmax(p_logits), log_softmax(q_logits)", "log_softmax(q_logits), log_softmax(p_logits)"),
    Mutant("k1 measures the wrong direction", OPS, "return _at_least_float32(logp) - _at_least_float32(other)",
           "return _at_least_float32(other) - _at_least_float32(logp)"),
    Mutant("k2 without its half", OPS, "return kl_k1(logp, other).square() / 2", "return kl_k1(logp, other).square()"),
    Mutant("k2 takes the size of r for its square", OPS, "kl_k1(logp, other).square() / 2", "kl_k1(logp, other).abs() / 2"),
    Mutant("k3 measures the wrong direction", OPS, "r = -kl_k1(logp, other)", "r = kl_k1(logp, other)"),
    Mutant("k3 adds its control variate", OPS, "return torch.expm1(r) - r", "return torch.expm1(r) + r"),
    Mutant("k3 without its control variate", OPS, "return torch.expm1(r) - r", "return torch.expm1(r)"),
    Mutant("GRPO's penalty measures the wrong direction", GRPO, "KL[kl](logp, ref_logp)", "KL[kl](ref_logp, logp)"),
    Mutant("GRPO's KL metric measures the wrong direction", GRPO,
           "kl_k3(logp.detach(), ref_logp)", "kl_k3(ref_logp, logp.detach())"),
    Mutant("GRPO's KL is measured from the sampling policy", GRPO, "KL[kl](logp, ref_logp)", "KL[kl](logp, old_logp)"),
    Mutant("--kl k3 is k2", GRPO, '"k3": kl_k3}', '"k3": kl_k2}'),
    Mutant("--kl k2 is k3", GRPO, '"k2": kl_k2,', '"k2": kl_k3,'),
    Mutant("--kl k1 is k3", GRPO, 'KL = {"k1": kl_k1', 'KL = {"k1": kl_k3'),
    Mutant("a KL in the reward is in the loss, too", GRPO, 'if kl_in != "reward":', "if True:"),
    Mutant("a weighted KL forgets the ratio", GRPO, 'if kl_in == "weighted" else 1.0', "if False else 1.0"),
    Mutant("every KL in the loss is weighted by the ratio", GRPO, 'if kl_in == "weighted" else 1.0', "if True else 1.0"),
    Mutant("a KL is weighted by the ratio that is bounded", GRPO,
           "weight = importance_ratio(logp, old_logp)", "weight = importance_ratio(new, old)"),
    Mutant("the KL metric is that of the estimator in the loss", GRPO,
           "masked_sum(kl_k3(logp.detach(),", "masked_sum(KL[kl](logp.detach(),"),

    # ---- Ratios and their bounds ----
    Mutant("clip inverted for A < 0", OPS, "torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)",
           "torch.minimum(ratio, ratio.clamp(1 - clip_low, 1 + clip_high)) * adv"),
    Mutant("the clip has no minimum around it", OPS,
           "torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)",
           "ratio.clamp(1 - clip_low, 1 + clip_high) * adv"),
    Mutant("the ends of the clip are exchanged", OPS,
           "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
    Mutant("the clip has no lower end", OPS, "clamp(1 - clip_low, 1 + clip_high)", "clamp(max=1 + clip_high)"),
    Mutant("the clip's lower end is that of the log-ratio", OPS, "clamp(1 - clip_low,", "clamp(1 / (1 + clip_low),"),
    Mutant("GRPO exchanges the ends of the clip", GRPO,
           "surrogate = clipped_surrogate(new, old, adv, clip_low, clip_high)",
           "surrogate = clipped_surrogate(new, old, adv, clip_high, clip_low)"),
    Mutant("GRPO's ratio is always 1", GRPO, "clipped_surrogate(new, old,", "clipped_surrogate(new, new.detach(),"),
    Mutant("the mask keeps what is outside the band", OPS,
           "outside = (ratio < low) | (ratio > high)", "outside = (ratio >= low) & (ratio <= high)"),
    Mutant("the mask has no upper end", OPS, "outside = (ratio < low) | (ratio > high)", "outside = ratio < low"),
    Mutant("the mask leaves A < 0 alone", OPS,
           "(ratio < low) | (ratio > high)", "((ratio < low) | (ratio > high)) & (adv > 0)"),
    Mutant("--bound truncate clips at its cap", GRPO,
           "truncated_surrogate(new, old, adv, cap=1 + clip_high)", "clipped_surrogate(new, old, adv, 1.0, clip_high)"),
    Mutant("--bound truncate ignores --clip-high", GRPO,
           "truncated_surrogate(new, old, adv, cap=1 + clip_high)", "truncated_surrogate(new, old, adv, cap=5.0)"),
    Mutant("--bound truncate takes --clip-high for the cap", GRPO,
           "truncated_surrogate(new, old, adv, cap=1 + clip_high)", "truncated_surrogate(new, old, adv, cap=clip_high)"),
    Mutant("--bound mask clips at the ends of its band", GRPO,
           "masked_surrogate(new, old, adv, 1 - clip_low, 1 + clip_high)",
           "clipped_surrogate(new, old, adv, clip_low, clip_high)"),
    Mutant("--bound mask exchanges the ends of its band", GRPO,
           "masked_surrogate(new, old, adv, 1 - clip_low, 1 + clip_high)",
           "masked_surrogate(new, old, adv, 1 - clip_high, 1 + clip_low)"),
    Mutant("--ratio none has a ratio", GRPO,
           'logp if ratio == "none" else importance_ratio(new, old)', "importance_ratio(new, old)"),
    Mutant("--ratio token without a bound has no ratio", GRPO,
           'logp if ratio == "none" else importance_ratio(new, old)',
           'importance_ratio(new, old) if ratio == "sequence" else logp'),
    Mutant("--ratio sequence without a bound is that of tokens", GRPO,
           "else importance_ratio(new, old)", "else importance_ratio(logp, old_logp)"),

    # ---- The ratio of whole answers ----
    Mutant("the sequence ratio is a product", OPS,
           "(log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()",
           "log_ratio.sum(-1, keepdim=True).exp()"),
    Mutant("the sequence ratio is an arithmetic mean", OPS,
           "(log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()",
           "1 + (log_ratio.expm1().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1))"),
    Mutant("the sequence ratio counts padding", OPS,
           "log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)",
           "log_ratio.sum(-1, keepdim=True) / (mask | True).sum(-1, keepdim=True)"),
    Mutant("log-ratios of padding enter the sequence ratio", OPS,
           "- _at_least_float32(old_logp)).masked_fill(~mask, 0.0)", "- _at_least_float32(old_logp))"),
    Mutant("the sequence ratio multiplies by the mask", OPS,
           "- _at_least_float32(old_logp)).masked_fill(~mask, 0.0)", "- _at_least_float32(old_logp)) * mask"),
    Mutant("--ratio sequence is --ratio token", GRPO, 'if ratio == "sequence":', "if False:"),
    Mutant("--ratio token is --ratio sequence", GRPO, 'if ratio == "sequence":', "if True:"),
    Mutant("--ratio sequence forgets the log", GRPO,
           "sequence_ratio(logp, old_logp, mask).log()", "sequence_ratio(logp, old_logp, mask)"),
    Mutant("--ratio sequence counts padding", GRPO,
           "sequence_ratio(logp, old_logp, mask)", "sequence_ratio(logp, old_logp, mask | True)"),
    Mutant("--ratio sequence has no gradient", GRPO,
           "sequence_ratio(logp, old_logp, mask)", "sequence_ratio(logp.detach(), old_logp, mask)"),

    # ---- What answers are compared by, and which are left out ----
    Mutant("--groups drop keeps groups without contrast", GRPO, "kept & has_contrast(rewards)[:, None]", "kept"),
    Mutant("--groups drop leaves out groups with contrast", GRPO,
           "kept & has_contrast(rewards)", "kept & ~has_contrast(rewards)"),
    Mutant("finished answers are left out instead of truncated ones", GRPO,
           "kept & rollout.finished.cpu()", "kept & ~rollout.finished.cpu()"),
    Mutant("answers without a reward count as accepted", GRPO, "kept & (rewards > 0)", "kept & (rewards >= 0)"),
    Mutant("what is left out keeps its tokens", GRPO, "mask & kept.view(-1, 1).to(mask.device)", "mask"),
    Mutant("dropped answers enter the std of --advantage zscore_batch", GRPO, "zscore_batch(R, kept=kept)", "zscore_batch(R)"),
    Mutant("the prompt counts for the overlong penalty", GRPO,
           "lengths = (rollout.lengths - rollout.prompt_lengths)", "lengths = rollout.lengths"),
    Mutant("the overlong buffer is in tokens, not a share", GRPO, "cfg.overlong * cfg.max_new_tokens)", "cfg.overlong)"),
    Mutant("the overlong penalty is subtracted", GRPO, "R + overlong_penalty(", "R - overlong_penalty("),
    Mutant("the KL in the reward is a bonus", GRPO, "R - cfg.kl_coef * kl_k1(", "R + cfg.kl_coef * kl_k1("),
    Mutant("the KL in the reward counts padding", GRPO,
           "kl_k1(old_logp, ref_logp).masked_fill(~mask, 0.0)", "kl_k1(old_logp, ref_logp)"),
    Mutant("the KL in the reward is a mean over tokens", GRPO, "masked_fill(~mask, 0.0).sum(-1).cpu()",
           "masked_fill(~mask, 0.0).mean(-1).cpu()"),
    Mutant("the running mean is added to the reward", FAMILY, "rewards - (total / weight if", "rewards + (total / weight if"),
    Mutant("the running mean is of what the task pays", GRPO,
           "less_running_mean(R, state)", "less_running_mean(rewards, state) + R - rewards"),
    Mutant("the running mean begins at zero", FAMILY, "(total / weight if weight else 0.0)", "total"),
    Mutant("this step's rewards enter the mean that is taken off", FAMILY,
           "(total / weight if weight else 0.0)", "state[\"running_mean\"][0] / state[\"running_mean\"][1]"),
    Mutant("the running mean keeps only the last step", FAMILY, "(decay * total + (1 - decay)", "((1 - decay)"),

    # ---- Temperature ----
    Mutant("temperature forgotten in the scorer's forward pass", OPS, "scores(hidden[rows], weight, ids[rows], temperature,",
           "scores(hidden[rows], weight, ids[rows], 1.0,"),
    Mutant("logits multiplied by the temperature", OPS, ".to(dtype).div_(temperature)", ".to(dtype).mul_(temperature)"),
    Mutant("temperature forgotten in the scorer's backward pass", OPS, "weight, temperature, entropy.dtype)",
           "weight, 1.0, entropy.dtype)"),
    Mutant("temperature forgotten in the scorer's chain rule", OPS, "grad_z.div_(temperature)", "grad_z"),

    # ---- Entropy and the scorer ----
    Mutant("entropy is negative", OPS, "return -(p * log_p.masked_fill", "return (p * log_p.masked_fill"),
    Mutant("entropy is a mean over tokens", OPS,
           "log_p.masked_fill(p == 0, 0.0)).sum(-1)", "log_p.masked_fill(p == 0, 0.0)).mean(-1)"),
    Mutant("entropy is in bits", OPS,
           "log_p.masked_fill(p == 0, 0.0)).sum(-1)", "log_p.masked_fill(p == 0, 0.0)).sum(-1) * 1.4427"),
    Mutant("the scorer's entropy is negative", OPS, "entropy = -torch.exp(", "entropy = torch.exp("),
    Mutant("the scorer's entropy has no gradient", OPS,
           ".mul_(g_entropy[:, None])", ".mul_(0.0)"),
    Mutant("the gradient of entropy forgets H", OPS, "log_p.add_(entropy[:, None])", "log_p"),
    Mutant("the gradient of entropy subtracts H", OPS,
           "log_p.add_(entropy[:, None])", "log_p.sub_(entropy[:, None])"),
    Mutant("the gradient of a log-prob forgets the token itself", OPS,
           "grad_z.scatter_add_(-1, ids[:, None], g_logp)", "pass"),
    Mutant("the head's gradient is that of the last chunk", OPS, "grad_weight += grad_z.T @", "grad_weight = grad_z.T @"),
    Mutant("the scorer does not cut into chunks", OPS,
           "weight.to(hidden.dtype), ids, temperature, chunk_size, compile)",
           "weight.to(hidden.dtype), ids, temperature, max(len(ids), 1), compile)"),
    Mutant("entropy does not cut into chunks", OPS, ".split(chunk_size)", ".split(max(1, logits.shape[:-1].numel()))"),
    Mutant("entropy is punished", GRPO, "surrogate + entropy_coef * entropy", "surrogate - entropy_coef * entropy"),
    Mutant("GRPO forgets the entropy bonus", GRPO, "if entropy_coef:", "if False:"),

    # ---- Numerics ----
    Mutant("k3 without expm1", OPS, "torch.expm1(r) - r", "r.exp() - 1 - r"),
    Mutant("softmax without subtracting the maximum", OPS,
           "m = x.detach().amax(dim, keepdim=True)", "m = torch.zeros_like(x.detach().amax(dim, keepdim=True))"),
    Mutant("the maximum of a row of only -inf is subtracted", OPS, "m = m.masked_fill(m == -torch.inf, 0.0)", "m = m + 0.0"),
    Mutant("logsumexp forgets to add the maximum again", OPS, "return (m + x.exp()", "return (x.exp()"),
    Mutant("log-softmax adds the maximum and takes it off again", OPS,
           "return z - z.exp().sum(dim, keepdim=True).log()", "return logits - logsumexp(logits, dim).unsqueeze(dim)"),
    Mutant("the log-prob of a token adds the maximum and takes it off again", OPS,
           "return z.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - z.exp().sum(-1).log()",
           "return _at_least_float32(logits).gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logsumexp(logits)"),
    Mutant("0 log 0 is nan in the entropy", OPS, "(p * log_p.masked_fill(p == 0, 0.0))", "(p * log_p)"),
    Mutant("0 log 0 is nan in kl_divergence", OPS, "(log_p - log_q).masked_fill(p == 0, 0.0)", "(log_p - log_q)"),
    Mutant("kl_divergence is finite where the second has no probability", OPS,
           "(log_p - log_q).masked_fill(p == 0, 0.0)", "(log_p - log_q).masked_fill((p == 0) | log_q.isinf(), 0.0)"),
    Mutant("half precision is not widened", OPS,
           "return x if x.dtype in (torch.float32, torch.float64) else x.float()", "return x"),
    Mutant("float64 is rounded to float32", OPS,
           "return x if x.dtype in (torch.float32, torch.float64) else x.float()", "return x.float()"),
    Mutant("log-ratios are taken in half precision", OPS,
           "return _at_least_float32(logp) - _at_least_float32(other)", "return _at_least_float32(logp - other)"),
    Mutant("half-precision logits are divided before they are widened", OPS,
           "(hidden @ weight.T).to(dtype).div_(temperature)", "(hidden @ weight.T).div_(temperature).to(dtype)"),
    Mutant("log-softmax divides by the largest term alone, in the scorer", OPS,
           "scratch.sum(-1, keepdim=True).log_()", "scratch.amax(-1, keepdim=True).log_()"),
    Mutant("the head's gradient is summed in half precision", OPS,
           "torch.zeros_like(weight, dtype=entropy.dtype)", "torch.zeros_like(weight)"),
    Mutant("the scorer ignores autocast", OPS, "if torch.is_autocast_enabled(device):", "if False:"),
    Mutant("rewards are averaged in float32", OPS,
           "r = rewards.double().masked_fill", "r = _at_least_float32(rewards).masked_fill"),
    Mutant("the z-score's std is taken in float32", OPS, "a = center(rewards.double(), valid)", "a = center(rewards, valid)"),
    Mutant("leave-one-out rounds twice", OPS, "(center(rewards.double(), valid) * count", "(center(rewards, valid) * count"),
    Mutant("the step's std is taken in float32", OPS,
           "a = center(rewards.double())\n", "a = center(_at_least_float32(rewards))\n"),
    Mutant("the z-score's eps stands inside the root", OPS,
           "(a.square().sum(-1, keepdim=True) / count).sqrt()", "(a.square().sum(-1, keepdim=True) / count + eps**2).sqrt()"),
    Mutant("log_sigmoid overflows", OPS, "log_softmax(torch.stack((x, torch.zeros_like(x)), dim=-1))[..., 0]",
           "-torch.log1p((-_at_least_float32(x)).exp())"),

    # ---- Boundaries ----
    Mutant("the lower end of a mask's band is outside", OPS, "outside = (ratio < low)", "outside = (ratio <= low)"),
    Mutant("the upper end of a mask's band is outside", OPS, "| (ratio > high)", "| (ratio >= high)"),
    Mutant("equal rewards have advantages of a rounding error", OPS, "(highest <= lowest), 0.0)", "(highest < lowest), 0.0)"),
    Mutant("a lone sample is divided by zero", OPS, "(count - 1).clamp(min=1)", "(count - 1)"),
    Mutant("z-scores of nothing valid are nan", OPS,
           "else valid.sum(-1, keepdim=True).clamp(min=1)", "else valid.sum(-1, keepdim=True)"),
    Mutant("masked means of nothing are nan", OPS, "/ mask.sum().clamp(min=1)", "/ mask.sum()"),
    Mutant("the sequence ratio of an empty row is nan", OPS,
           "mask.sum(-1, keepdim=True).clamp(min=1)).exp()", "mask.sum(-1, keepdim=True)).exp()"),
    Mutant("weights of an empty step are nan", OPS, "return mask / count.clamp(min=1)", "return mask / count"),
    Mutant("a row of one token counts as empty", OPS, "rows = (length > 0).sum()", "rows = (length > 1).sum()"),
    Mutant("an empty row counts as a row", OPS, "rows = (length > 0).sum()", "rows = (length >= 0).sum()"),
    Mutant("A = 0 counts as clipped below", OPS, "(ratio < 1 - clip_low) & (adv < 0)", "(ratio < 1 - clip_low) & (adv <= 0)"),
    Mutant("A = 0 counts as clipped above", OPS, "(ratio > 1 + clip_high) & (adv > 0)", "(ratio > 1 + clip_high) & (adv >= 0)"),
    Mutant("what clipping lets through counts as clipped", OPS,
           "(ratio < 1 - clip_low) & (adv < 0)", "(ratio < 1 - clip_low)"),
    Mutant("clipped_high counts at clip_low", OPS, "(ratio > 1 + clip_high) & (adv > 0)", "(ratio > 1 + clip_low) & (adv > 0)"),
    Mutant("tokens below the cap count as capped", GRPO,
           "masked_sum((rho > 1 + clip_high)", "masked_sum((rho < 1 + clip_high)"),
    Mutant("tokens above the band do not count as masked", GRPO,
           "((rho < 1 - clip_low) | (rho > 1 + clip_high)).float()", "(rho < 1 - clip_low).float()"),

    # ---- Generalised advantage estimation ----
    Mutant("gae runs forward in time", OPS, "for t in reversed(range(values.shape[1])):", "for t in range(values.shape[1]):"),
    Mutant("gae adds the value of the state it leaves", OPS,
           "gamma * next_value - values[:, t]", "gamma * next_value + values[:, t]"),
    Mutant("gae takes the reward of the token before", OPS, "delta = rewards[:, t] +", "delta = rewards[:, t - 1] +"),
    Mutant("gae does not discount the next value", OPS, "+ gamma * next_value", "+ next_value"),
    Mutant("gae forgets lambda", OPS, "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
    Mutant("gae forgets gamma in the recursion", OPS, "delta + gamma * lam * next_advantage", "delta + lam * next_advantage"),
    Mutant("gae takes what follows the run for its next value", OPS,
           "next_value = torch.where(mask[:, t], values[:, t], next_value)", "next_value = values[:, t]"),
    Mutant("gae takes advantages of padding along", OPS,
           "next_advantage = torch.where(mask[:, t], advantage, next_advantage)", "next_advantage = advantage"),
    Mutant("gae gives padding an advantage", OPS, "advantage.masked_fill(~mask[:, t], 0.0)", "advantage"),
    Mutant("values of padding reach gae's returns", OPS, "0.0), values.masked_fill(~mask, 0.0)", "0.0), values"),
    Mutant("an answer that has ended is bootstrapped", OPS,
           "bootstrap = values.new_zeros(len(values)) if", "bootstrap = values[:, -1] if"),
    Mutant("gae's returns are advantages less values", OPS,
           "return advantages, advantages + values", "return advantages, advantages - values"),

    # ---- Preferences ----
    Mutant("the loss of a preference is its log-probability", OPS, "return -log_sigmoid(margin)", "return log_sigmoid(margin)"),
    Mutant("the loser is preferred", OPS, "return -log_sigmoid(margin)", "return -log_sigmoid(-margin)"),
    Mutant("log_sigmoid is of -x", OPS, "dim=-1))[..., 0]", "dim=-1))[..., 1]"),
    Mutant("log_sigmoid has the wrong slope at 0", OPS, "log_softmax(torch.stack((x, torch.zeros_like(x)), dim=-1))[..., 0]",
           "(lambda x: x.clamp(max=0.0) - torch.log1p((-x.abs()).exp()))(_at_least_float32(x))"),
    Mutant("the loss of a preference is a hinge", OPS,
           "return -log_sigmoid(margin)", "return (1 - _at_least_float32(margin)).clamp(min=0.0)"),

    Mutant("a tie counts as right", OPS,
           "return ((margin > 0).float() + (margin >= 0)", "return ((margin >= 0).float() + (margin >= 0)"),
    Mutant("the reward model prefers what was rejected", REWARD,
           "margin = chosen - rejected\n", "margin = rejected - chosen\n"),
    Mutant("the reward model's loss forgets its weights", REWARD,
           "loss = (weights * bradley_terry(margin)).sum()", "loss = bradley_terry(margin).mean()"),
    Mutant("confidence is the probability of the chosen response", HELDOUT,
           "confidence, right = margin.abs().sigmoid()", "confidence, right = margin.sigmoid()"),
    Mutant("agreement with the hidden reward is judged by the label", HELDOUT,
           "right = ranked_right(margin * hidden)", "right = ranked_right(margin)"),
    Mutant("clear cases include ties with the temperature", HELDOUT, "hidden.abs() > Stories", "hidden.abs() >= Stories"),
    Mutant("dpo forgets its reference", DPO, "return beta * (logp - ref_logp)", "return beta * logp"),
    Mutant("dpo adds its reference", DPO, "return beta * (logp - ref_logp)", "return beta * (logp + ref_logp)"),
    Mutant("dpo's beta is missing", DPO, "return beta * (logp - ref_logp)", "return logp - ref_logp"),
    Mutant("ipo sums where it should average", DPO,
           "return (logp - ref_logp) / length", "return logp - ref_logp"),
    Mutant("simpo sums where it should average", DPO, "beta * logp / length", "beta * logp"),
    Mutant("slic averages where it should sum", DPO, "return logp\n", "return logp / length\n"),
    Mutant("both responses are divided by the chosen one's length", DPO,
           "(rejected, ref_rejected, rejected_length)", "(rejected, ref_rejected, chosen_length)"),
    Mutant("the margin is upside down", DPO,
           "margin = reward_chosen - reward_rejected", "margin = reward_rejected - reward_chosen"),
    Mutant("cdpo's label noise counts for the wrong label", DPO,
           "pair = (1 - label_noise) * bradley_terry(margin) + label_noise",
           "pair = label_noise * bradley_terry(margin) + (1 - label_noise)"),
    Mutant("ipo's target is 1 / beta", DPO, "(margin - 1 / (2 * beta)).square()", "(margin - 1 / beta).square()"),
    Mutant("slic does not stop at its margin", DPO, "pair = torch.relu(delta - margin)", "pair = delta - margin"),
    Mutant("slic's slope at its margin is 1", DPO, "torch.relu(delta - margin)", "(delta - margin).clamp(min=0.0)"),
    Mutant("simpo's target is added", DPO, "bradley_terry(margin - gamma)", "bradley_terry(margin + gamma)"),
    Mutant("the nll term pushes the chosen response down", DPO, "pair = pair - nll_coef", "pair = pair + nll_coef"),
    Mutant("the nll term is not per token", DPO, "nll_coef * chosen / chosen_length", "nll_coef * chosen"),
    Mutant("the reference may carry a gradient", DPO, "assert not (ref_chosen.requires_grad or ref_rejected.requires_grad)",
           "assert not ref_chosen.requires_grad"),
    Mutant("the worse of two answers is chosen", DPO, "best = scores[decided].argmax(-1)", "best = scores[decided].argmin(-1)"),
    Mutant("ties are pairs", DPO, "(scores[:, 0] != scores[:, 1])", "(scores[:, 0] == scores[:, 0])"),
    Mutant("rows of a pair are taken sample-major", DPO, "return 2 * decided + best, 2 * decided + 1 - best",
           "return decided + best, decided + 1 - best"),

    # ---- Groups ----
    Mutant("losers are set against winners", GROUPS,
           "pair = won[:, :, None] & ~won[:, None, :]", "pair = ~won[:, :, None] & won[:, None, :]"),
    Mutant("pairs of other kinds cost log 2", GROUPS,
           "group = bradley_terry(gap).masked_fill(~pair, 0.0)", "group = bradley_terry(gap)"),
    Mutant("the scale is squared", GROUPS, ".to(gap.dtype).rsqrt()", ".to(gap.dtype).reciprocal()"),
    Mutant("the scale multiplies the loss", GROUPS,
           "bradley_terry(scale[:, None, None] * gap)", "scale[:, None, None] * bradley_terry(gap)"),
    Mutant("the mean gap is a sum", GROUPS, "gap.sum((-1, -2)) / (winners * losers).clamp(min=1)", "gap.sum((-1, -2))"),
    Mutant("the hinge does not stop at its margin", GROUPS, "torch.relu(margin - D)", "margin - D"),
    Mutant("the hinge's slope at its margin is 1", GROUPS, "torch.relu(margin - D)", "(margin - D).clamp(min=0.0)"),
    Mutant("groups of one kind cost something", GROUPS, "group = group.masked_fill(~both, 0.0)", "group = group"),
    Mutant("groups of losers only are counted", GROUPS, "both = (winners > 0) & (losers > 0)", "both = losers > 0"),
    Mutant("groups at the margin count as active", GROUPS, "(D[both] < margin).sum()", "(D[both] <= margin).sum()"),

    # ---- PPO ----
    Mutant("whitening sees the padding", OPS, "x[mask].double()", "x.flatten().double()"),
    Mutant("whitening divides by the variance", OPS, "(a.square().mean().sqrt() + eps)", "(a.square().mean() + eps)"),
    Mutant("whitening leaves the mean", OPS, "a = values - values.mean()", "a = values - 0.9 * values.mean()"),
    Mutant("equal values are whitened to rounding", OPS, "if len(values) == 0 or values.max() == values.min():",
           "if len(values) == 0:"),
    Mutant("the value loss takes the better of two", OPS,
           "return torch.maximum((values - returns).square()", "return torch.minimum((values - returns).square()"),
    Mutant("the value band is around the return", OPS,
           "torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)",
           "torch.maximum(torch.minimum(values, returns + clip), returns - clip)"),
    Mutant("the value loss is not halved", OPS, "(clipped - returns).square()) / 2", "(clipped - returns).square())"),
    Mutant("old values may carry a gradient", OPS, "assert not (old_values.requires_grad or returns.requires_grad)",
           "assert not returns.requires_grad"),
    Mutant("the leash pays for divergence", PPO, "token_rewards = -kl_coef * kl_k1", "token_rewards = kl_coef * kl_k1"),
    Mutant("the leash is to the policy from the reference", PPO, "* kl_k1(logp, ref_logp)", "* kl_k1(ref_logp, logp)"),
    Mutant("the score lands on the first token", PPO,
           "(mask.cumsum(-1) == mask.sum(-1, keepdim=True))", "(mask.cumsum(-1) == 1)"),
    Mutant("the score lands on every token", PPO, "torch.where(last & ended[:, None]", "torch.where(mask & ended[:, None]"),
    Mutant("answers that have not ended are rewarded, too", PPO, "torch.where(last & ended[:, None]", "torch.where(last"),
    Mutant("answers that have ended are continued by the critic", PPO, "last_value.masked_fill(ended, 0.0)", "last_value"),
    Mutant("answers that have not ended end", PPO, "last_value.masked_fill(ended, 0.0)", "last_value.masked_fill(~ended, 0.0)"),
    Mutant("the critic is pushed away from the returns", PPO, "- value_coef * value_loss", "+ value_coef * value_loss"),
    Mutant("PPO's loss is maximised", PPO, "return -(weights * gain).sum()", "return (weights * gain).sum()"),
    Mutant("PPO's entropy bonus is a penalty", PPO, "gain = gain + entropy_coef", "gain = gain - entropy_coef"),
    Mutant("PPO's padding is not blanked", PPO, "x.masked_fill(~mask, 0.0) for x in (logp", "x for x in (logp"),
    Mutant("PPO forgets its weights", PPO, "-(weights * gain).sum()", "-gain.masked_fill(~mask, 0.0).mean()"),
    Mutant("PPO's band is symmetric", PPO, "adv, clip_low, clip_high) - value", "adv, clip_low, clip_low) - value"),
    Mutant("the leash loosens when the policy runs away", PPO, "kl / target - 1, -0.2), 0.2)", "1 - kl / target, -0.2), 0.2)"),
    Mutant("the leash may jump", PPO, "0.1 * min(max(kl / target - 1, -0.2), 0.2)", "0.1 * (kl / target - 1)"),

    # ---- Best of n ----
    Mutant("the worst of n is taken", SEARCH, "scores.argsort(-1)", "scores.argsort(-1, descending=True)"),
    Mutant("best-of-n draws with replacement", SEARCH, "math.comb(i, n - 1) / math.comb(N, n)", "((i + 1) ** n - i**n) / N**n"),
    Mutant("the winner of a tie is the last one", SEARCH, "((s[:, None] == s).double() for s in scores)",
           "(torch.eye(N, dtype=torch.float64) for s in scores)"),
    Mutant("the bound of best-of-n is log n", SEARCH, "return math.log(n) - (n - 1) / n", "return math.log(n)"),

    # ---- Votes and intervals ----
    Mutant("pass@k is that of independent draws of the mean", SEARCH,
           "return best_of_n(right, right, k)", "return 1 - (1 - right.double().mean(-1)) ** k"),
    Mutant("whoever has not answered votes", SEARCH, "if ballot is not None:", "if True:"),
    Mutant("votes are added in the order they come", SEARCH, "math.fsum(each)", "sum(each)"),
    Mutant("every vote weighs the same", SEARCH, ".append(weight)", ".append(1.0)"),
    Mutant("a tie is settled for the first in the alphabet", SEARCH,
           "for winner in winners) / len(winners)", "for winner in winners[:1])"),
    Mutant("a tie is not lost", SEARCH, 'ties == "lost" and len(winners) > 1', "False"),
    Mutant("weighted votes weigh log-probs", EVALUATE, "torch.softmax(logp[part], 0)", "logp[part]"),
    Mutant("a vote is weighed among the answers of all votes", EVALUATE,
           "torch.softmax(logp[part], 0)", "torch.softmax(logp.float(), 0)[part]"),
    Mutant("the last vote takes what is left", EVALUATE,
           "range(0, len(ballots) - n + 1, n)", "range(0, len(ballots), n)"),
    Mutant("the interval is the normal one", EVALUATE, "mean + z**2 / (2 * n), z *", "mean * (1 + z**2 / n), z *"),
    Mutant("means over answers count as one coin flip each", EVALUATE,
           "n *= mean * (1 - mean) / variance", "n *= 1.0"),
    Mutant("answers to a problem count as independent", EVALUATE,
           "n *= mean * (1 - mean) / variance", "n *= 16"),

    # ---- Power sampling ----
    Mutant("the chain goes to the power of alpha plus one", SEARCH,
           "(alpha * delta_p - delta_q)", "((alpha + 1) * delta_p - delta_q)"),
    Mutant("the proposal's ratio is upside down", SEARCH, "(alpha * delta_p - delta_q)", "(alpha * delta_p + delta_q)"),
    Mutant("tempered proposals are accepted as if from the model", SEARCH,
           "(alpha * delta_p - delta_q)", "((alpha - 1) * delta_p)"),
    Mutant("all positions are equally likely", SEARCH, "weights = 1 / torch.arange(1, T + 1", "weights = 1 / torch.ones(T"),
    Mutant("prompts with other means make chains remember", SEARCH,
           "x.double().mean((0, 2), keepdim=True)", "x.double().mean()"),
    Mutant("fewer pairs at a longer lag count as less memory", SEARCH,
           "(d[: S - k] * d[k:]).mean()", "(d[: S - k] * d[k:]).sum() / d.numel()"),
    Mutant("the conditional of a power does not look ahead", TABULAR,
           "alpha * log_softmax(logits[rows]) + log_S.view(-1, V)", "alpha * log_softmax(logits[rows])"),

    # ---- Distillation ----
    Mutant("forward is reverse", DISTILL, "d = kl_divergence(teacher, student)", "d = kl_divergence(student, teacher)"),
    Mutant("reverse is forward", DISTILL, "d = kl_divergence(student, teacher)", "d = kl_divergence(teacher, student)"),
    Mutant("the divergence of a high temperature is not scaled up", DISTILL,
           "loss = tau**2 * (weights", "loss = (weights"),
    Mutant("only the teacher is tempered", DISTILL,
           "/ tau for x in (student, teacher))", "/ t for x, t in ((student, 1), (teacher, tau)))"),
    Mutant("the student's top tokens are kept", DISTILL, "ids = teacher.topk(", "ids = student.topk("),
    Mutant("top-k has no tail", DISTILL, "with_tail(student, ids), with_tail(teacher, ids)",
           "with_tail(student, ids)[..., :-1], with_tail(teacher, ids)[..., :-1]"),
    Mutant("the divergence to come is that which has been", DISTILL,
           "D.detach().sum(-1, keepdim=True) - D.detach().cumsum(-1)", "D.detach().cumsum(-1) - D.detach()"),
    Mutant("the divergence to go is made small by going further", DISTILL,
           "loss = loss + (weights * advantage", "loss = loss - (weights * advantage"),
    Mutant("the divergence to go is compared with the answer itself", DISTILL,
           "advantage = leave_one_out(", "advantage = (lambda x: x - x.mean(-1, keepdim=True))("),
    Mutant("the divergence to go has a gradient of its own", DISTILL,
           "D.detach().sum(-1, keepdim=True) - D.detach().cumsum(-1)", "D.sum(-1, keepdim=True) - D.cumsum(-1)"),
    Mutant("Jensen-Shannon mixes the other way round", OPS,
           "log_p + math.log(beta), log_q + math.log1p(-beta)", "log_p + math.log1p(-beta), log_q + math.log(beta)"),
    Mutant("Jensen-Shannon weighs the other way round", OPS,
           "return beta * kl_divergence(log_p, log_m) + (1 - beta)", "return (1 - beta) * kl_divergence(log_p, log_m) + beta"),
    Mutant("the tail has all tokens", OPS, "logsumexp(others)[..., None]", "logsumexp(log_p)[..., None]"),

    # ---- Writing into an argument ----
    Mutant("masked_sum blanks its argument", OPS, "return x.masked_fill(~mask, 0.0).sum()",
           "x.detach().masked_fill_(~mask, 0.0)\n    return x.masked_fill(~mask, 0.0).sum()"),
    Mutant("advantages blank the rewards of samples without a score", OPS,
           "rewards.double().masked_fill(~valid", "rewards.double().masked_fill_(~valid"),
    Mutant("gae blanks the values of padding", OPS,
           "0.0), values.masked_fill(~mask, 0.0)", "0.0), values.masked_fill_(~mask, 0.0)"),
    Mutant("the truncated surrogate scales the advantages", OPS,
           ".clamp(max=cap) * adv *", ".clamp(max=cap) * adv.mul_(1.0) *"),
    Mutant("GRPO blanks the sampler's log-probs", GRPO,
           "0.0), old_logp.masked_fill(~mask, 0.0)", "0.0), old_logp.masked_fill_(~mask, 0.0)"),
    Mutant("GRPO blanks the reference's log-probs", GRPO,
           "ref_logp = ref_logp.masked_fill(~mask, 0.0)", "ref_logp = ref_logp.masked_fill_(~mask, 0.0)"),
    Mutant("cross-entropy scales the weights", PRETRAIN,
           "masked_sum(weights * logp, mask)", "masked_sum(weights.mul_(logp), mask)"),
]

PYTEST = [sys.executable, "-m", "pytest", "-m", "math", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "ci"}
TITLE = ["# Faults that the tests notice", "",
         "Each line is a fault that was put into the code, where it went, the first test that failed, and after how many",
         "seconds. Made by `python -m tests.mutants --table docs/mutants.md`.", ""]
# The likeliest killer of a fault runs first.
FIRST = {OPS: "test_ops.py", GRPO: "test_objectives.py", PRETRAIN: "test_objectives.py", DATA: "test_objectives.py",
         REWARD: "test_preferences.py", DPO: "test_preferences.py", GROUPS: "test_preferences.py", PPO: "test_ppo.py",
         SEARCH: "test_search.py", DISTILL: "test_distill.py", EVALUATE: "test_evaluate.py", TABULAR: "test_ops.py",
         FAMILY: "test_objectives.py", HELDOUT: "test_preferences.py", SFT: "test_objectives.py"}


def line_of(mutant: Mutant) -> int:
    """Where the fault goes; a sentence and an end if the source has moved on."""
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    if (times := source.count(mutant.old)) != 1:
        sys.exit(f"{mutant.fault!r}: {mutant.old!r} stands {times} times in {mutant.file}; expected exactly once")
    return source[: source.index(mutant.old)].count("\n") + 1


def run_tests(mutant: Mutant | None, limit: float | None = None) -> tuple[str, float]:
    """Run the math tests on a copy of the tree, with the fault: the first test that failed ("" for none) and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("nanorl", "tests", "data"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (ROOT / "pyproject.toml", *ROOT.glob("train_*.py")):
            shutil.copy(file, tree)
        if mutant:
            file = tree / mutant.file
            file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        files = [file.name for file in tree.glob("tests/test_*.py") if "mark.math" in file.read_text(encoding="utf-8")]
        files.sort(key=lambda name: (mutant is None or name != FIRST[mutant.file], name))

        start = time.perf_counter()
        try:
            result = subprocess.run([*PYTEST, *(f"tests/{name}" for name in files)], cwd=tree, env=ENVIRONMENT, timeout=limit,
                                    capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return "(time ran out)", time.perf_counter() - start
        seconds = time.perf_counter() - start
    if result.returncode == 0:
        return "", seconds
    failed = re.search(r"^FAILED \S+?::(\w+)", result.stdout, re.M)
    if not failed:
        sys.exit(f"{mutant.fault if mutant else 'Without any fault'}: the tests could not run.\n{result.stdout}{result.stderr}")
    return failed[1], seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="the faults whose name contains it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="faults at a time (default: the CPUs)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="where to write the table, too")
    args = parser.parse_args(argv)
    mutants = [mutant for mutant in MUTANTS if args.only in mutant.fault]
    if not mutants:
        parser.error(f"argument --only: no fault's name contains {args.only!r}")
    if args.jobs < 1:
        parser.error(f"argument --jobs: {args.jobs} is not a number of at least 1")
    if args.table and not args.table.parent.is_dir():
        parser.error(f"argument --table: {args.table.parent} is no directory")

    lines = [line_of(mutant) for mutant in mutants]
    failed, usual = run_tests(None)
    if failed:
        sys.exit(f"Without any fault, {failed} fails; expected tests that pass.")

    table, killed = ["| fault | where | killed by | seconds |", "|---|---|---|--:|"], 0
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(mutants), unit="fault") as bar:
        # Slow beyond measure is noticed as well.
        verdicts = pool.map(partial(run_tests, limit=60 + 10 * usual), mutants)
        for mutant, line, (killer, seconds) in zip(mutants, lines, verdicts, strict=True):
            killed += bool(killer)
            table.append(f"| {mutant.fault} | {mutant.file}:{line} | {killer or '**survived**'} | {seconds:.0f} |")
            bar.update()
            bar.set_postfix(killed=killed, survived=bar.n - killed)
    table += ["", f"{killed} of {len(mutants)} killed"]
    print(*table, sep="\n")
    if args.table:
        args.table.write_text("\n".join([*TITLE, *table]) + "\n", encoding="utf-8")
    sys.exit(killed < len(mutants))


if __name__ == "__main__":
    main()
