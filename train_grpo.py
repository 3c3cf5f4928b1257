"""Policy gradients without a critic: sample a group of answers to each prompt, and make the better ones more likely.

    J = sum_bt w_bt [ S(rho, A) - kl_coef KL(pi || ref) + entropy_coef H ] + likelihood_coef E_demo[log pi]         loss = -J

    --bound     S, the surrogate; the band of the ratio is low = 1 - clip_low to high = 1 + clip_high
    none        rho A                   (with --ratio none: A log pi)
    clip        min( rho A, clip(rho, low, high) A )
    truncate    sg( min(rho, high) ) A log pi                               sg: a constant, no gradient
    mask        rho A where low <= rho <= high, else 0
    soft        4/tau sigma(tau (rho - 1)) A            tau = 1 where A > 0, else 1.05

GRPO and its relatives differ in five choices: how an answer is compared (the advantage A), how far the policy has moved
since it sampled (the ratio rho), what is done about it (the bound), how much a token weighs in the loss (w) and which
groups are trained on. A named algorithm is a row of a table (nanorl/family.py, shown by --help); any flag overrides its choice.

    python train_grpo.py                    from nothing: pretrains and fine-tunes first where those runs are missing
    python train_grpo.py --algo dapo --minibatches 4 --out runs/dapo
    python train_grpo.py --algo rloo --kl-coef 0.03 --out runs/rloo
    python train_grpo.py --task sorting

With one update per rollout, the default, every ratio is 1 and a bound has nothing to do: algorithms that differ only in ratio
or bound are then the same. The value of GRPO's loss is then 0, because the advantages of a group sum to 0 and all its answers
weigh the same. A loss says nothing about progress here and is not logged. Watch the reward.

To change the loss: a branch in `objective`, its keyword where main makes `loss`, a flag in Config; a further --bound or
--advantage is an entry, `family.BANDS["tanh"] = (None, 0.2)` or `family.ADVANTAGES["mine"] = f`. The surrogates and the token
weights are in nanorl/ops.py, the advantages in `advantages` below, the named algorithms and bands in nanorl/family.py. Then
check that it is sound, with your choice as the default of its keyword:

    python -m nanorl.checks train_grpo.py:objective --clip 0.2 0.2
"""

import functools
import time
from dataclasses import dataclass

import torch

from nanorl import family, run
from nanorl.batches import add_metrics, micro_batches, minibatches, per_token
from nanorl.data import render_records
from nanorl.first_step import first_step_check, tolerance
from nanorl.heldout import before_and_after, evaluate_and_show
from nanorl.ops import (clipped_away, clipped_surrogate, importance_ratio, kl_k1, kl_k2, kl_k3, masked_sum, masked_surrogate,
                        overlong_penalty, sequence_ratio, soft_surrogate, token_weights, truncated_surrogate, zscore_batch)
from nanorl.rollout import NoContrast, collect, describe, has_contrast, score_rollout
from nanorl.sample import Rollout, Sampling, token_log_probs
from nanorl.view_data import watch_groups

KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None, ratio="token", bound="clip", clip_low=0.2,
              clip_high=0.2, kl_coef=0.0, kl="k3", kl_in="loss", entropy_coef=0.0):
    """The loss -J of one micro-batch, and its metrics as sums over the tokens that count.

        L = -sum_bt w_bt [ S(rho, A) - kl_coef KL(pi || ref) + entropy_coef H ]

    logp, old_logp, ref_logp, entropy, mask [B, T]; adv [B, 1], or [B, T] and finite (main must then cut it, as it does `old`);
    weights [B, T] of the tokens, made once for the whole optimizer step. Losses and metrics of micro-batches add up to the
    step's; those named _max and _min are extremes.
    """
    # Padding may hold anything, even inf. Blank it before exp(): blanking the result leaves a gradient of 0 * inf = nan.
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    new, old = logp, old_logp
    if ratio == "sequence":         # one ratio per answer, shared by its tokens: new - old is its logarithm
        new, old = sequence_ratio(logp, old_logp, mask).log().expand_as(logp), torch.zeros_like(logp)
    rho = importance_ratio(new.detach(), old).masked_fill(~mask, 1.0)                       # [B, T]
    metrics = {"train/ratio_max": rho.max().clamp(min=1), "train/ratio_min": rho.min().clamp(max=1)}
    if bound == "clip":
        surrogate = clipped_surrogate(new, old, adv, clip_low, clip_high)                   # [B, T]
        low, high = clipped_away(rho, adv, clip_low, clip_high)
        metrics |= {"train/clipped_low": masked_sum(low, mask), "train/clipped_high": masked_sum(high, mask)}
    elif bound == "truncate":
        surrogate = truncated_surrogate(new, old, adv, cap=1 + clip_high)
        metrics["train/capped"] = masked_sum(rho > 1 + clip_high, mask)
    elif bound == "mask":
        surrogate = masked_surrogate(new, old, adv, 1 - clip_low, 1 + clip_high)
        metrics["train/masked"] = masked_sum((rho < 1 - clip_low) | (rho > 1 + clip_high), mask)
    elif bound == "soft":
        surrogate = soft_surrogate(new, old, adv)
    else:
        surrogate = adv * (logp if ratio == "none" else importance_ratio(new, old))
    if kl_coef:
        ref_logp = ref_logp.masked_fill(~mask, 0.0)
        metrics["train/kl"] = masked_sum(kl_k3(logp.detach(), ref_logp), mask)      # always logged as k3
        if kl_in != "reward":
            weight = importance_ratio(logp, old_logp) if kl_in == "weighted" else 1.0
            surrogate = surrogate - kl_coef * weight * KL[kl](logp, ref_logp)
    if entropy_coef:
        surrogate = surrogate + entropy_coef * entropy.masked_fill(~mask, 0.0)
    return -(weights * surrogate).sum(), metrics


def advantages(cfg, rollout, rewards, old_logp, ref_logp, state):
    """The advantage of each answer, and the mask of the tokens that are trained on.       -> adv [B, 1], mask [B, T-1]

    rewards [P, G] are the task's, on the CPU: they decide which groups and answers are kept. The advantage is that of the net
    reward, R = r + overlong penalty - kl_coef sum_t k1. An answer whose tokens are left out still counts in its group's mean,
    unless it could not be scored (nan). `state` holds the running mean.

    Where all answers of a group have the same R, what compares within it (center, leave_one_out, both z-scores) is exactly 0.
    --groups all still counts their tokens in the weights; drop masks groups of equal `rewards` here, `collect` resamples.
    """
    mask, valid = rollout.mask, ~rewards.isnan()
    kept = valid
    if cfg.groups == "drop":
        kept = kept & has_contrast(rewards)[:, None]
    if cfg.truncated == "mask":
        kept = kept & rollout.finished.cpu().view_as(rewards)
    if cfg.advantage == "positive":
        kept = kept & (rewards > 0)
    R = rewards.nan_to_num(nan=0.0)
    if cfg.overlong:
        lengths = rollout.mask.sum(-1).cpu().view_as(R)
        R = R + overlong_penalty(lengths, cfg.max_new_tokens, cfg.overlong * cfg.max_new_tokens)
    if cfg.kl == "k1_reward":
        R = R - cfg.kl_coef * kl_k1(old_logp, ref_logp).masked_fill(~mask, 0.0).sum(-1).cpu().view_as(R)
    if cfg.advantage == "running_mean":
        R = family.less_running_mean(R, valid, state)
    adv = (zscore_batch(R, valid=valid, kept=kept) if cfg.advantage == "zscore_batch"
           else family.ADVANTAGES[cfg.advantage](R, valid=valid))
    return adv.view(-1, 1).to(mask.device), mask & kept.view(-1, 1).to(mask.device)


@dataclass(frozen=True, kw_only=True)
class Config(family.FamilyConfig):
    out: str = ""               # directory of this run (default: runs/grpo, or runs/grpo-TASK)
    steps: run.Count = 40
    lr: run.Positive = 1e-4
    eval_every: run.Count = 10

    def __post_init__(self):
        super().__post_init__()
        self.default("out", run.stage_dir("grpo", self.task))


@run.script
def main(cfg: Config) -> None:
    # 1. Start: check flags and files, then load the models.
    task = run.choose_task(cfg.task, cfg.data, seed=cfg.seed, verifier=cfg.verifier, reward=cfg.reward)
    records = task.demonstrations(20_000) if cfg.likelihood_coef else []
    device, checkpoint, tokenizer, policy, reference, _ = run.begin(cfg, "sft", task=task, reference=cfg.kl_coef > 0)
    records, *demonstrations = render_records(records, tokenizer, policy.config.context, cfg.data or str(task), "response",
                                              skip_long=cfg.skip_long)

    optimizer = run.Optimizers(policy, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer, data=[task.examples(), records], reference=reference)
    del checkpoint
    compiled = run.compile_models(cfg, device, policy, reference)
    # One temperature for the whole run: sampling, evaluations, `score`, `score_rollout` and the watched groups use it.
    # So does the tolerance of the first-step check; and if it changed, entries of --stale's queue would have to keep theirs.
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, slots=16 * cfg.micro_batch, compile=compiled)
    kl = family.KL_TERMS[cfg.kl or "k3"]
    loss = functools.partial(objective, ratio=cfg.ratio, bound=cfg.bound, clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                             kl_coef=cfg.kl_coef, kl=kl.estimator, kl_in=kl.place, entropy_coef=cfg.entropy_coef)
    first_step = out.step
    family.announce(cfg, str(task), device)

    def score(tokens, mask):
        with run.autocast(device, cfg.dtype):
            return token_log_probs(policy, tokens, mask, temperature=cfg.temperature)

    def evaluate_now():
        return evaluate_and_show(out, task, sampling, stories=not cfg.data and ".py:" not in cfg.task)

    for step in out.steps():
        # 2. Evaluate: held-out problems, answered once by sampling and once greedily.
        if step % cfg.eval_every == 0:
            out.log(evaluate_now())
        out.refresh("reference", cfg.refresh_reference)

        # 3. Collect: G answers to each of P prompts, by the policy as it is now.
        started = time.perf_counter()
        with out.saved_on(NoContrast), run.autocast(device, cfg.dtype):
            fresh = collect(policy, tokenizer, task, sampling, prompts=cfg.prompts, samples=cfg.group,
                            seed=run.derive(cfg.seed, "rollout", step), resample=cfg.groups == "resample", state=out.state)
        out.log(describe(fresh, "rollout") | {"rollout/resampled": fresh.resampled})
        out.log({"time/rollout_s": time.perf_counter() - started})
        if cfg.selfcheck and step == first_step:
            out.say(first_step_check(fresh, task, tokenizer.stop_ids, score, loss, list(policy.parameters()), cfg.aggregate,
                                     cfg.max_new_tokens, tolerance(device, cfg.dtype, cfg.temperature)))

        # 4. Compare: how much better is each answer than the rest of its group?
        started = time.perf_counter()
        rollout, rewards, parts, old_logp = fresh.rollout, fresh.rewards, fresh.parts, None
        with run.autocast(device, cfg.dtype):
            if not cfg.on_policy or cfg.kl == "k1_reward":          # else nothing needs them: every ratio is 1
                old_logp = score_rollout(policy, rollout, cfg.temperature, cfg.micro_batch)     # [B, T-1]
            if cfg.stale:       # go on with an earlier rollout, as it was then
                entry = family.delayed(out.state, cfg.stale, (vars(rollout), rewards, parts, old_logp))
                if entry is None:
                    continue
                earlier, rewards, parts, old_logp = entry
                rollout, old_logp = Rollout(**earlier).to(device), old_logp.to(device)
            ref_logp = score_rollout(reference, rollout, cfg.temperature, cfg.micro_batch) if reference else None
        adv, mask = advantages(cfg, rollout, rewards, old_logp, ref_logp, out.state)
        watched = watch_groups(out, task, rollout, rewards, parts)      # for nanorl.view: a few, in a few steps

        # 5. Update. Micro-batches only limit memory: the token weights are made once for an optimizer step, so that their
        # gradients add up to its gradient.
        totals = {}
        demonstration_loss = 0.0
        lr = cfg.lr * out.schedule(warmup=0.05)
        for update, minibatch in enumerate(minibatches(cfg.seed, step, len(mask), cfg.epochs, cfg.minibatches)):
            minibatch = minibatch.to(device)
            weights = torch.zeros(mask.shape, device=device)
            weights[minibatch] = token_weights(mask[minibatch], rollout.prompt_index[minibatch], cfg.aggregate,
                                               cfg.max_new_tokens)
            # Rows with a token to train on; with --skip, only those with an advantage: the others' gradient is 0.
            trained = mask[minibatch].any(-1) & ((adv[minibatch] != 0).any(-1) | (not cfg.skip))
            for rows, T in micro_batches(rollout, cfg.micro_batch, minibatch[trained]):
                m, w = mask[rows, : T - 1], weights[rows, : T - 1]
                logp, entropy = score(rollout.tokens[rows, :T], m)
                old = logp.detach() if cfg.on_policy else old_logp[rows, : T - 1]           # so that ratios are exactly 1
                ref = ref_logp[rows, : T - 1] if reference else None
                micro_loss, metrics = loss(logp, old, adv[rows], m, w, ref_logp=ref, entropy=entropy)
                watched.add(update, rows, logp, entropy, old=old, reference=ref, advantage=adv[rows], weight=w, mask=m)
                micro_loss.backward()
                metrics |= {"train/entropy": masked_sum(entropy.detach(), m), "tokens": m.sum()}
                metrics["train/mismatch_kl"] = masked_sum(kl_k3(rollout.logp[rows, : T - 1], old), m)
                add_metrics(totals, metrics)
            if records:
                nll = family.demonstrate(cfg, score, demonstrations, tokenizer.pad, step * cfg.updates + update, device)
                demonstration_loss += nll / cfg.updates
            grad_norm = optimizer.step(lr, grad_clip=1.0)
            add_metrics(totals, {"train/grad_norm_max": grad_norm})
        watched.write()

        # 6. Log: sums over tokens become means over tokens.
        out.log(per_token(totals))
        out.log({"train/demonstration_loss": demonstration_loss} if records else {})
        out.log({"train/lr": lr, "time/update_s": time.perf_counter() - started},
                show=("rollout/reward", "rollout/worked", "rollout/length", "train/entropy"))

    # 7. Held-out problems, before and after.
    out.finish(evaluate_now())
    print(before_and_after(out, task))


if __name__ == "__main__":
    main(run.parse(Config))
