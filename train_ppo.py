"""PPO: policy gradients with a critic, against a verifier (RLVR) or a reward model (RLHF).

    J = sum_bt w_bt [ min(rho A, clip(rho) A) - value_coef VL(V, R) + entropy_coef H ]      loss = -J

VL is the clipped value loss. The critic V estimates the return from a state; A_t, by generalised advantage estimation, is
how much better a token did than expected.
Reward arrives per token: r_t = -kl_coef k1(pi || ref), and at the last token of each action its score. So the KL
penalty is part of what is maximised, E[score] - kl_coef KL(pi || ref), and not a term of the loss.

    python train_ppo.py                                     a verifier's reward on addition, from nothing
    python train_ppo.py --reward model                      stories, rewarded by runs/reward
    python train_ppo.py --reward model --kl-coef 0 --out runs/hacked        ... without a KL penalty: over-optimised

Answers are rewarded only at their end, so the default lam is 1. With lam below 1, early tokens learn little until the critic is
good; until then, a reward whose zero is arbitrary, such as a learned one, would also push answers to be longer or shorter.

A learned reward is trusted only near what it was learned from. Watch eval/learned_reward beside eval/hidden_reward: where
one rises and the other falls, the policy has found a gap between the two.
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from nanorl import run
from nanorl.batches import add_metrics, micro_batches, minibatches, per_token
from nanorl.gpt import ScalarGPT
from nanorl.heldout import before_and_after, evaluate_and_show
from nanorl.ops import (adapt_kl_coef, clipped_away, clipped_surrogate, clipped_value_loss, gae, importance_ratio, kl_k1,
                        masked_sum, token_weights, whiten)
from nanorl.rollout import collect, describe, learned_rewards, score_rollout, state_values
from nanorl.sample import Sampling, token_log_probs
from nanorl.view_data import watch_groups


def objective(logp, old_logp, adv, mask, weights, *, values, old_values, returns, entropy=None, clip_low=0.2, clip_high=0.2,
              value_clip=0.5, value_coef=0.5, entropy_coef=0.0):
    """The loss -J of one micro-batch, and its metrics as sums over the tokens that count.

        L = -sum_bt w_bt [ min(rho A, clip(rho) A) - value_coef VL(V, R) + entropy_coef H ]

    logp, old_logp, adv, values, old_values, returns, entropy, mask [B, T];
    weights [B, T] of the tokens, made once for the whole optimizer step. Losses and metrics of micro-batches add up to the
    step's; those named _max and _min are extremes.
    """
    # Padding may hold anything, even inf. Blank it before exp(): blanking the result leaves a gradient of 0 * inf = nan.
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    adv, values, old_values, returns = (x.masked_fill(~mask, 0.0) for x in (adv, values, old_values, returns))
    rho = importance_ratio(logp.detach(), old_logp)                                         # [B, T]
    metrics = {"train/ratio_max": rho.max().clamp(min=1), "train/ratio_min": rho.min().clamp(max=1)}
    low, high = clipped_away(rho, adv, clip_low, clip_high)
    metrics |= {"train/clipped_low": masked_sum(low, mask), "train/clipped_high": masked_sum(high, mask)}
    value_loss = clipped_value_loss(values, old_values, returns, value_clip)                # [B, T]
    metrics["train/value_loss"] = value_loss.detach().sum()
    metrics["train/value_clipped"] = masked_sum((values - old_values).detach().abs() > value_clip, mask)
    surrogate = clipped_surrogate(logp, old_logp, adv, clip_low, clip_high) - value_coef * value_loss
    if entropy_coef:
        surrogate = surrogate + entropy_coef * entropy.masked_fill(~mask, 0.0)
    return -(weights * surrogate).sum(), metrics


def credit(rewards, ended, logp, ref_logp, values, last_value, mask, *, kl_coef, gamma, lam):
    """The advantage of each token, and the return that the critic should have expected, by GAE.

        r_t = -kl_coef log(pi / ref)(y_t) + R_t

    rewards R [B, T], each at the last token of its action and 0 elsewhere; ended [B] bool; last_value [B]; logp, ref_logp,
    values, mask [B, T] -> (advantages, returns), [B, T] each. Where an answer has ended, its reward is final and nothing
    follows. Where it has not, its last token gets no reward, and last_value stands for the rest.
    """
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    token_rewards = -kl_coef * kl_k1(logp, ref_logp) + rewards.masked_fill(last & ~ended[:, None], 0.0)
    return gae(token_rewards, values, mask, gamma, lam, last_value.masked_fill(ended, 0.0))


@dataclass(frozen=True, kw_only=True)
class Config(run.RolloutConfig):
    out: str = ""               # directory of this run (default: runs/ppo, or runs/ppo-TASK)
    steps: run.Count = 40
    lr: run.Positive = 2e-4
    eval_every: run.Count = 10
    task: str = ""              # whose prompts are answered (default: addition; with --reward model stories)
    prompts: run.Count = 128    # P, prompts per step
    group: run.Count = 1        # G, answers sampled per prompt
    keep_groups: run.Natural = 8    # groups kept in rollouts.jsonl, in steps with an evaluation and the last; 0 is off
    eval_problems: run.Count | None = None    # held-out problems in an evaluation (default: 500; stories 200)

    # the reward
    reward: str = "verifier"    # what scores an answer: the verifier, a reward model ("model"), or a function FILE.py:NAME
    reward_model: str = ""      # --reward model: a run of train_reward.py (default: runs/reward)
    truncated: Literal["score", "bootstrap"] = "score"    # a cut answer: reward it as it is, or take the critic's value instead
    best_of: run.Natural = 16   # answers per problem for best-of-n before training, to compare with; 0 is off

    # the algorithm
    critic: Literal["separate", "shared"] = "separate"    # a trunk of its own, or a head on the policy's
    gamma: run.Share = 1.0      # discount per token
    lam: run.Share = 1.0        # of GAE: 1 trusts the rewards to go, 0 the critic
    clip_low: run.Share = 0.2   # the band of the ratio is 1 - clip_low ...
    clip_high: run.Positive = 0.2    # ... to 1 + clip_high
    value_clip: run.Positive = 0.5    # the clip range of the value, as clip_low and clip_high are the ratio's
    value_coef: run.NonNegative = 0.5    # weight of the value loss
    entropy_coef: run.NonNegative = 0.0    # weight of the entropy bonus
    kl_coef: run.NonNegative | None = None    # reward that a nat of KL to the initial policy costs (default: 0; stories 0.1)
    kl_target: run.Positive | None = None    # adapt --kl-coef to keep the KL per answer near this, in nats

    # updates
    epochs: run.Count = 2       # passes over a rollout
    minibatches: run.Count = 2  # optimizer steps per pass

    def __post_init__(self):
        self.default("task", "stories" if self.reward == "model" else "addition")
        super().__post_init__()
        self.default("out", run.stage_dir("ppo", self.task))
        self.default("eval_problems", 200 if self.task == "stories" else 500)
        self.default("kl_coef", 0.1 if self.reward == "model" else 0.0)
        self.require(self.reward in ("verifier", "model") or ".py:" in self.reward, "reward",
                     "expected verifier, model or FILE.py:NAME")
        self.require(self.reward == "model" or not self.reward_model, "reward_model", "requires --reward model")
        self.require(self.kl_target is None or self.kl_coef, "kl_target kl_coef",
                     "a coefficient of 0 stays 0; expected a --kl-coef above 0")
        self.require(self.minibatches <= self.prompts * self.group, "minibatches",
                     f"a rollout has {self.prompts * self.group} answers; expected at most as many")


@run.script
def main(cfg: Config) -> None:
    # 1. Start: check flags and files, then load the models.
    task = run.choose_task(cfg.task, cfg.data, needs_verifier=cfg.reward != "model", seed=cfg.seed, verifier=cfg.verifier,
                           reward=cfg.reward if ".py:" in cfg.reward else "")
    device, checkpoint, tokenizer, policy, reference, reward_model = run.begin(
        cfg, "sft", task=task, reference=True, reward_model=cfg.reward_model if cfg.reward == "model" else None)
    critic = ScalarGPT(policy if cfg.critic == "shared" else run.trainable_copy(cfg, reference, "critic")).to(device)

    optimizer = run.Optimizers(nn.ModuleDict({"policy": policy, "critic": critic}), "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer, data=task.examples(), initial_policy=reference,
                  reward_model=reward_model)
    if "critic" in out.state:
        critic.load_state_dict(out.state["critic"], strict=False)
    # The state holds the critic's weights themselves, not a copy: what is saved later is the critic as it is then.
    out.state |= {"critic": run.trained_state(critic), "kl_coef": out.state.get("kl_coef", cfg.kl_coef)}
    del checkpoint
    compiled = run.compile_models(cfg, device, policy, reference, critic.trunk if cfg.critic == "separate" else None)
    # One temperature for the whole run: sampling, evaluations, `score`, `score_rollout` and the watched groups use it.
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, slots=16 * cfg.micro_batch, compile=compiled)
    loss = functools.partial(objective, clip_low=cfg.clip_low, clip_high=cfg.clip_high, value_clip=cfg.value_clip,
                             value_coef=cfg.value_coef, entropy_coef=cfg.entropy_coef)
    print(f"PPO on {task}, reward: {cfg.reward}, {cfg.prompts} prompts x {cfg.group} answers a step, "
          f"{cfg.epochs * cfg.minibatches} updates each, on {device.type}.")

    def score(tokens, mask):
        with run.autocast(device, cfg.dtype):
            # One context for both: the weights of a shared trunk are cast once.
            return *token_log_probs(policy, tokens, mask, temperature=cfg.temperature), critic(tokens[:, :-1], mask).float()

    def evaluate_now():
        return evaluate_and_show(out, task, sampling, reference=reference, reward_model=reward_model)

    for step in out.steps():
        # 2. Evaluate: held-out problems, answered once by sampling and once greedily.
        if step % cfg.eval_every == 0:
            out.log(evaluate_now())

        # 3. Collect: G answers to each of P prompts, by the policy as it is now.
        started = time.perf_counter()
        with run.autocast(device, cfg.dtype):
            fresh = collect(policy, tokenizer, task, sampling, prompts=cfg.prompts, samples=cfg.group,
                            seed=run.derive(cfg.seed, "rollout", step), state=out.state)
        out.log(describe(fresh, "rollout"))
        out.log({"time/rollout_s": time.perf_counter() - started})

        # 4. Credit: what did each token do better than the critic expected? With --truncated bootstrap, a truncated answer has
        # not ended.
        started = time.perf_counter()
        rollout, rewards, parts = fresh.rollout, fresh.rewards, fresh.parts
        token_rewards = fresh.token_rewards()                                               # [B, T-1]
        mask = rollout.mask & ~rewards.isnan().view(-1, 1).to(device)       # what could not be scored teaches nothing
        with run.autocast(device, cfg.dtype):
            if reward_model:
                learned = learned_rewards(reward_model, rollout, cfg.micro_batch)           # [B]
                token_rewards = torch.zeros_like(token_rewards).scatter(-1, rollout.lengths[:, None] - 2, learned[:, None])
                parts = parts | {"learned reward": learned}
                out.log({"rollout/learned_reward": learned.mean()})
            old_logp = score_rollout(policy, rollout, cfg.temperature, cfg.micro_batch)     # [B, T-1]
            ref_logp = score_rollout(reference, rollout, cfg.temperature, cfg.micro_batch)
            old_values, last_value = state_values(critic, rollout, cfg.micro_batch)
        ended, kl_coef = rollout.finished | (cfg.truncated == "score"), out.state["kl_coef"]
        adv, returns = credit(token_rewards, ended, old_logp, ref_logp, old_values, last_value, mask,
                              kl_coef=kl_coef, gamma=cfg.gamma, lam=cfg.lam)
        if (spread := float(returns[mask].var(correction=0))) > 0:
            error = float((returns - old_values)[mask].var(correction=0))
            out.log({"train/explained_variance": 1 - error / spread})
        adv = whiten(adv, mask)
        watched = watch_groups(out, task, rollout, rewards, parts)      # for nanorl.view: a few, in a few steps

        # 5. Update. Micro-batches only limit memory: the token weights are made once for an optimizer step, so that their
        # gradients add up to its gradient.
        totals = {}
        lr = cfg.lr * out.schedule(warmup=0.05)
        for update, minibatch in enumerate(minibatches(cfg.seed, step, len(mask), cfg.epochs, cfg.minibatches)):
            minibatch = minibatch.to(device)
            weights = torch.zeros(mask.shape, device=device)
            weights[minibatch] = token_weights(mask[minibatch], rollout.prompt_index[minibatch], "token_mean")
            for rows, T in micro_batches(rollout, cfg.micro_batch, minibatch):
                m, w = mask[rows, : T - 1], weights[rows, : T - 1]
                logp, entropy, values = score(rollout.tokens[rows, :T], m)
                old, a, v, R = (x[rows, : T - 1] for x in (old_logp, adv, old_values, returns))
                micro_loss, metrics = loss(logp, old, a, m, w, values=values, old_values=v, returns=R, entropy=entropy)
                watched.add(update, rows, logp, entropy, old=old, advantage=a, weight=w, mask=m, value=v, returns=R)
                micro_loss.backward()
                metrics |= {"train/entropy": masked_sum(entropy.detach(), m), "tokens": m.sum()}
                add_metrics(totals, metrics)
            grad_norm = optimizer.step(lr, grad_clip=1.0)
            add_metrics(totals, {"train/grad_norm_max": grad_norm})
        watched.write()
        kl = float(masked_sum(kl_k1(old_logp, ref_logp), mask)) / len(mask)
        if cfg.kl_target:
            out.state["kl_coef"] = adapt_kl_coef(kl_coef, kl, cfg.kl_target)

        # 6. Log: sums over tokens become means over tokens.
        out.log(per_token(totals) | {"train/answer_kl": kl, "train/kl_coef": kl_coef})
        out.log({"train/lr": lr, "time/update_s": time.perf_counter() - started},
                show=("rollout/reward", "rollout/learned_reward", "rollout/hidden_reward", "rollout/length", "train/answer_kl"))

    # 7. Held-out problems, before and after.
    out.finish(evaluate_now())
    print(before_and_after(out, task))


if __name__ == "__main__":
    main(run.parse(Config))
