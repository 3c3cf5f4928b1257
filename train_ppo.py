"""PPO: policy gradients with a critic, against a verifier (RLVR) or a reward model (RLHF).

    J = sum_bt w_bt [ min(rho A, clip(rho) A) - value_coef VL(V, R) + entropy_coef H ]      loss = -J

VL is the clipped value loss. The critic V says what a state is worth, and A_t, by generalised advantage estimation, how much
better a token did than that.
Reward arrives per token: r_t = -kl_coef k1(pi || ref), and at the last token the score of the whole answer. So the leash to
the reference is part of what is maximised, E[score] - kl_coef KL(pi || ref), and not a term of the loss.

    python train_ppo.py                                     the verifier's reward on sums, from nothing
    python train_ppo.py --reward model                      stories, by the taste that runs/reward has learned
    python train_ppo.py --reward model --kl-coef 0 --out runs/hacked        ... without a KL penalty: over-optimised

Answers are rewarded only at their end, so lam is 1: below 1, what early tokens learn fades with the distance to the end until
the critic is good, and then a reward without a natural zero, as a learned one, makes answers longer or shorter.

A learned reward is trusted only near what it was learned from. Watch eval/learned_reward beside eval/hidden_reward: where
one rises and the other falls, the policy has found a gap between the two.
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import train_reward
import train_sft
from nanorl import ranks, run
from nanorl.gpt import ScalarGPT
from nanorl.ops import (
    clipped_away,
    clipped_surrogate,
    clipped_value_loss,
    gae,
    importance_ratio,
    kl_k1,
    masked_sum,
    token_weights,
    whiten,
)
from nanorl.rollout import (
    Room,
    add_up,
    before_and_after,
    check_room,
    choose_task,
    collect,
    describe,
    evaluate,
    learned_rewards,
    load_reward_model,
    means,
    micro_batches,
    minibatches,
    of_all_ranks,
    score_rollout,
    show_answers,
)
from nanorl.sample import token_log_probs
from nanorl.search import best_of_n_curve
from nanorl.tasks import default_max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = ""               # directory of this run (default: runs/ppo, or runs/ppo-TASK)
    steps: run.Count = 40
    lr: run.Positive = 2e-4
    eval_every: run.Count = 10

    reward: Literal["verifier", "model"] = "verifier"    # what scores an answer
    reward_model: str = ""      # --reward model: a run of train_reward.py (default: runs/reward)
    task: str = ""              # whose prompts are answered (default: addition; with --reward model stories)
    data: str = ""              # JSONL records {"prompt", "answer"} to practise on instead of the task's problems
    prompts: run.Count = 128    # P, prompts per step
    group: run.Count = 1        # G, answers sampled per prompt
    max_new_tokens: run.Count | None = None    # an answer longer than this is cut (default: 80; code 120; stories 140)
    temperature: run.Positive = 1.0    # of the policy: sampled with it, scored with it
    truncated: Literal["score", "bootstrap"] = "score"    # a cut answer: reward it as it is, or take the critic's value instead

    critic: Literal["separate", "shared"] = "separate"    # a trunk of its own, or a head on the policy's
    gamma: run.Share = 1.0      # discount per token
    lam: run.Share = 1.0        # of GAE: 1 trusts the rewards to go, 0 the critic
    clip_low: run.Share = 0.2   # the band of the ratio is 1 - clip_low ...
    clip_high: run.Positive = 0.2    # ... to 1 + clip_high
    value_clip: run.Positive = 0.5    # a value this far from where it was is not pushed further towards its return
    value_coef: run.NonNegative = 0.5    # weight of the value loss
    entropy_coef: run.NonNegative = 0.0    # weight of the entropy bonus
    kl_coef: run.NonNegative | None = None    # reward that a nat of KL to the initial policy costs (default: 0; stories 0.1)
    kl_target: run.Positive | None = None    # nats of KL per answer: from its first value, --kl-coef is steered towards them
    epochs: run.Count = 2       # passes over a rollout
    minibatches: run.Count = 2  # optimizer steps per pass
    micro_batch: run.Count = 64  # rows in memory at a time ...
    micro_tokens: run.Count = 2**14  # ... and tokens, padding included: fewer rows where answers are long, but at least one
    sample_rows: run.Count = 1024    # answers sampled at a time, but at least all of one prompt; the others wait
    warmup: run.Share = 0.05    # of the steps: the learning rate rises
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm, of policy and critic together
    eval_problems: run.Count | None = None    # held-out problems (default: 500; stories 200)
    best_of: run.Natural = 16   # answers per problem for best-of-n before training, to compare with; 0 is off

    def __post_init__(self):
        self.default("task", "stories" if self.reward == "model" else "addition")
        self.default("out", run.stage_dir("ppo", self.task))
        self.default("max_new_tokens", default_max_new_tokens(self.task))
        self.default("eval_problems", 200 if self.task == "stories" else 500)
        self.default("kl_coef", 0.1 if self.reward == "model" else 0.0)
        self.expect(self.reward == "model" or not self.reward_model, "reward_model", "expected --reward model beside it")
        self.expect(self.kl_target is None or self.kl_coef, "kl_target kl_coef",
                    "a coefficient of 0 stays 0; expected a --kl-coef above 0")
        self.expect(self.minibatches <= self.prompts * self.group, "minibatches",
                    f"a rollout has {self.prompts * self.group} answers; expected at most as many")

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.epochs * self.minibatches


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


def credit(rewards, ended, logp, ref_logp, values, last_value, mask, *, kl_coef, gamma, lam):
    """What each token did better than the critic expected, and what the critic should have expected.

        r_t = -kl_coef log(pi / ref)(y_t) + [t is the last token of an answer that has ended] R

    rewards R and last_value [B]; ended [B] bool; logp, ref_logp, values, mask [B, T] -> (advantages, returns), [B, T] each. An
    answer that was rewarded has ended, even at the length limit: nothing comes after it. The critic's last value stands for
    what comes after an answer that has not ended, and that gets no reward. Never both.
    """
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    token_rewards = -kl_coef * kl_k1(logp, ref_logp) + torch.where(last & ended[:, None], rewards[:, None], 0.0)
    return gae(token_rewards, values, mask, gamma, lam, last_value.masked_fill(ended, 0.0))


def objective(logp, old_logp, adv, mask, weights, *, values, old_values, returns, entropy=None, clip_low=0.2, clip_high=0.2,
              value_clip=0.5, value_coef=0.5, entropy_coef=0.0):
    """The loss of one micro-batch, and its metrics as sums over the tokens that count.

        L = -sum_bt w_bt [ min(rho A, clip(rho) A) - value_coef VL(V, R) + entropy_coef H ]

    All [B, T]; the weights are made once for the whole optimizer step. Metrics named _max and _min are extremes.
    """
    # Padding may hold anything, even inf. Blank it before exp(): afterwards its gradient would be 0 * inf = nan.
    logp, old_logp, adv, values, old_values, returns = (
        x.masked_fill(~mask, 0.0) for x in (logp, old_logp, adv, values, old_values, returns))
    value_loss = clipped_value_loss(values, old_values, returns, value_clip)                # [B, T]
    gain = clipped_surrogate(logp, old_logp, adv, clip_low, clip_high) - value_coef * value_loss
    if entropy_coef:
        gain = gain + entropy_coef * entropy.masked_fill(~mask, 0.0)
    rho = importance_ratio(logp.detach(), old_logp)
    low, high = clipped_away(rho, adv, clip_low, clip_high)
    metrics = {"ratio_max": rho.max().clamp(min=1), "ratio_min": rho.min().clamp(max=1),
               "clipped_low": masked_sum(low.float(), mask), "clipped_high": masked_sum(high.float(), mask),
               "value_loss": value_loss.detach().sum(),
               "value_clipped": masked_sum(((values - old_values).detach().abs() > value_clip).float(), mask)}
    return -(weights * gain).sum(), {f"train/{name}": x for name, x in metrics.items()}


def steer(kl_coef, kl, target):
    """A coefficient that keeps the KL near a target.       c <- c (1 + 0.1 clip(kl / target - 1, -0.2, 0.2))

    (Ziegler et al. 2019, section 2.2)
    """
    return kl_coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def state_values(critic, rollout, room):
    """The critic's value of the state that each token was chosen in, and of the one behind the last token.

    -> values [B, T-1], of which [:, t] belongs to tokens[:, t+1], 0 where nothing was sampled; last_value [B]
    """
    values, last_value = torch.zeros_like(rollout.logp), torch.zeros_like(rollout.logp[:, 0])
    for rows, T in micro_batches(ranks.share(torch.arange(len(values), device=values.device)), rollout.lengths, room):
        v = critic(rollout.tokens[rows, :T]).float()                                        # [rows, T]
        values[rows, : T - 1] = v[:, :-1]
        last_value[rows] = v.gather(-1, rollout.lengths[rows, None] - 1).squeeze(-1)
    return ranks.summed(values.masked_fill(~rollout.mask, 0.0)), ranks.summed(last_value)


@run.says_why_it_stopped
def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work; then what depends on the model.
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        task = choose_task(cfg.task, cfg.data, needs_verifier=cfg.reward == "verifier")
        if cfg.init:
            run.load_checkpoint(cfg.init, "policy")
        if cfg.reward_model:
            run.load_checkpoint(cfg.reward_model, "reward model")
    init = cfg.init or run.ensure_stage(train_sft, out=run.stage_dir("sft", cfg.task),
                                        **run.same(cfg, "task"))
    reward_path = cfg.reward_model
    if cfg.reward == "model" and not reward_path:
        reward_path = run.ensure_stage(train_reward, out="runs/reward", **run.same(cfg))
    with run.user_errors():
        initial = run.load_checkpoint(init, "policy")
        tokenizer = run.tokenizer_from(initial)
        policy = run.model_from(checkpoint or initial, device)
        reference = run.model_from(initial, device).requires_grad_(False)
        critic = ScalarGPT(policy if cfg.critic == "shared" else run.model_from(initial, device)).to(device)
        reward_model = load_reward_model(reward_path, tokenizer, device) if reward_path else None
        for model in filter(None, (policy, reward_model)):
            check_room(model, [tokenizer.render(problem.prompt) for problem in task.examples()], cfg.max_new_tokens)

    optimizer = run.Optimizers(nn.ModuleDict({"policy": policy, "critic": critic}), "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer)
    with run.user_errors():
        out.started_from(initial_policy=reference, reward_model=reward_model)
    if "critic" in out.state:
        critic.load_state_dict(out.state["critic"])
    out.state |= {"critic": critic.state_dict(), "kl_coef": out.state.get("kl_coef", cfg.kl_coef)}
    del initial, checkpoint
    compiled = run.prepare(cfg, device, policy, reference, *([critic.trunk] if cfg.critic == "separate" else []))
    room = Room(cfg.micro_batch, cfg.micro_tokens)
    sampling = dict(slots=cfg.sample_rows, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, compile=compiled)
    loss = functools.partial(objective, **{flag: getattr(cfg, flag) for flag in ("clip_low", "clip_high", "value_clip",
                                                                                 "value_coef", "entropy_coef")})
    print(f"PPO on {task.name}, {f'the reward model of {reward_path}' if reward_model else 'the verifier'} scores: "
          f"{cfg.prompts} prompts x {cfg.group} answers a step, {cfg.updates} updates each, on {device.type}.")

    def look() -> dict[str, float]:
        with run.autocast(device, cfg.dtype):
            metrics, experience = evaluate(policy, tokenizer, task, problems=cfg.eval_problems, seed=cfg.seed,
                                           reference=reference, reward_model=reward_model, room=room, **sampling)
            if cfg.best_of and out.step == 0:
                curve = best_of_n_curve(policy, tokenizer, task, samples=cfg.best_of, problems=cfg.eval_problems, seed=cfg.seed,
                                        reward_model=reward_model, **sampling)
                metrics["eval/best_of_n"] = curve[cfg.best_of]
        show_answers(out, experience)
        return metrics

    for step in out.steps():
        # 2. Look: held-out prompts.
        if step % cfg.eval_every == 0:
            out.log(look())

        # 3. Collect: answers by the policy as it is now, and their rewards. One that was cut may not count as ended.
        started = time.perf_counter()
        with run.autocast(device, cfg.dtype):
            fresh = collect(policy, tokenizer, task, prompts=cfg.prompts, samples=cfg.group,
                            seed=run.derive(cfg.seed, "rollout", step), **sampling)
            rollout, mask = fresh.rollout, fresh.rollout.mask
            rewards = fresh.rewards.flatten().to(device)
            if reward_model:
                rewards = learned_rewards(reward_model, rollout, room)
            old_logp = score_rollout(policy, rollout, cfg.temperature, room)     # [B, T-1]
            ref_logp = score_rollout(reference, rollout, cfg.temperature, room)
            old_values, last_value = state_values(critic, rollout, room)
        ended = rollout.finished | (cfg.truncated == "score")
        facts = describe(fresh)
        if reward_model:
            facts["learned_reward"] = float(rewards.mean())
        out.log({f"rollout/{name}": value for name, value in facts.items()} | {"rollout/tokens": int(mask.sum())})
        out.log({"time/rollout_s": time.perf_counter() - started})

        # 4. Credit: what did each token do better than the critic thought?
        started = time.perf_counter()
        kl_coef = out.state["kl_coef"]
        adv, returns = credit(rewards, ended, old_logp, ref_logp, old_values, last_value, mask,
                              kl_coef=kl_coef, gamma=cfg.gamma, lam=cfg.lam)
        if spread := float(returns[mask].var(correction=0)):
            error = float((returns - old_values)[mask].var(correction=0))
            out.log({"train/explained_variance": 1 - error / spread})
        adv = whiten(adv, mask)

        # 5. Update: a few passes over the rollout. The weights are the whole optimizer step's.
        totals = {}
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup)
        for minibatch in minibatches(cfg.seed, step, len(mask), cfg.epochs, cfg.minibatches):
            minibatch = minibatch.to(device)
            weights = torch.zeros(mask.shape, device=device)
            weights[minibatch] = token_weights(mask[minibatch], rollout.prompt_index[minibatch], "token_mean")
            for rows, T in micro_batches(ranks.share(minibatch), rollout.lengths, room):
                m = mask[rows, : T - 1]
                with run.autocast(device, cfg.dtype):
                    logp, entropy = token_log_probs(policy, rollout.tokens[rows, :T], m, temperature=cfg.temperature)
                    values = critic(rollout.tokens[rows, : T - 1]).float()
                old, a, w, v, R = (x[rows, : T - 1] for x in (old_logp, adv, weights, old_values, returns))
                micro_loss, metrics = loss(logp, old, a, m, w, values=values, old_values=v, returns=R, entropy=entropy)
                micro_loss.backward()
                metrics |= {"train/entropy": masked_sum(entropy.detach(), m), "tokens": m.sum()}
                add_up(totals, metrics)
            add_up(totals, {"train/grad_norm_max": optimizer.step(lr, cfg.grad_clip)})

        # 6. Log, and steer the leash.
        kl = float(masked_sum(kl_k1(old_logp, ref_logp), mask)) / len(mask)
        if cfg.kl_target:
            out.state["kl_coef"] = steer(kl_coef, kl, cfg.kl_target)
        totals = of_all_ranks(totals)
        out.log(means(totals, int(totals.pop("tokens"))))
        out.log({"train/answer_kl": kl, "train/kl_coef": kl_coef, "train/lr": lr,
                 "time/update_s": time.perf_counter() - started},
                show={name: f"{facts[name]:.2f}" for name in ("reward", "learned_reward", "hidden_reward") if name in facts}
                | {"length": f"{facts['length']:.1f}", "kl": f"{kl:.1f}"})

    # 7. What it was good for: held-out prompts before and after.
    final = look()
    out.finish(final)
    print(before_and_after(f"{cfg.eval_problems} held-out problems", out.metrics()[0], final))


if __name__ == "__main__":
    main(run.parse(Config))
