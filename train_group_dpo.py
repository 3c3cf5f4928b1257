"""Preference losses over groups: sample answers to a prompt, and set the right ones (winners) against the wrong ones (losers).

    r(x, y) = beta log( pi(y|x) / ref(y|x) )            the implicit reward of DPO, of each of G sampled answers
    D       = mean_W r - mean_L r                       over N_w winners and N_l losers

    --loss    what is minimised, per group
    pairs     sum_{i in W} sum_{j in L} -log sigma(r_i - r_j)                   every pair, as in DPO
    scaled    sum_{i in W} sum_{j in L} -log sigma((r_i - r_j) / sqrt(N_w N_l))
    mean      -log sigma(D)
    hinge     max(0, m - D)                                                     m: --margin

    python train_group_dpo.py
    python train_group_dpo.py --loss hinge --margin 0.5 --out runs/hinge

With one winner and one loser, `pairs`, `scaled` and `mean` are all DPO. In every one of the four, winners are raised by as
much in all as losers are lowered, and so one winner among ten losers is raised ten times as much as each of them is lowered,
on average: neither scaling nor means change that ratio. What they do change is how much a group counts in all: up to N_w N_l
in `pairs`, at most sqrt(N_w N_l) in `scaled`, at most 1 in `mean` and `hinge`. A group of winners only, or of losers only, has
nothing to compare; its loss is zero. The hinge also leaves out the groups that have reached their margin: train/active is
the share of those with both kinds that have not.
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal

import torch

from nanorl import run
from nanorl.batches import add_metrics, sum_over_ranks
from nanorl.heldout import before_and_after, evaluate_and_show
from nanorl.ops import bradley_terry, kl_k3, masked_sum
from nanorl.rollout import collect, describe, right_or_reward, score_rollout
from nanorl.sample import Sampling, token_log_probs
from nanorl.view_data import watch_groups


def objective(rewards, won, weights, *, loss="mean", margin=1.0):
    """The loss of some groups, and metrics as sums over them.       L = sum_p w_p loss(group p)

    rewards: implicit rewards [P, G]; won [P, G] bool; weights [P]. A group without winners or without losers costs nothing.
    """
    winners, losers = won.sum(-1), (~won).sum(-1)                                           # [P]
    both = (winners > 0) & (losers > 0)
    pair = won[:, :, None] & ~won[:, None, :]                                               # [P, G, G]
    gap = (rewards[:, :, None] - rewards[:, None, :]).masked_fill(~pair, 0.0)
    D = gap.sum((-1, -2)) / (winners * losers).clamp(min=1)                                 # [P] mean_W r - mean_L r
    if loss == "pairs":
        group = bradley_terry(gap).masked_fill(~pair, 0.0).sum((-1, -2))
    elif loss == "scaled":
        scale = (winners * losers).clamp(min=1).to(gap.dtype).rsqrt()
        group = bradley_terry(scale[:, None, None] * gap).masked_fill(~pair, 0.0).sum((-1, -2))
    elif loss == "mean":
        group = bradley_terry(D)
    else:
        group = torch.relu(margin - D)
    group = group.masked_fill(~both, 0.0)
    metrics = {"loss": (weights * group).sum(), "groups": both.sum(), "margin": D[both].sum()}
    if loss == "hinge":
        metrics["active"] = (D[both] < margin).sum()
    return (weights * group).sum(), {f"train/{name}": x.detach() for name, x in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class Config(run.RolloutConfig):
    out: str = ""               # directory of this run (default: runs/group_dpo, or runs/group_dpo-TASK)
    steps: run.Count = 40
    lr: run.Positive = 1e-4
    eval_every: run.Count = 10

    micro_batch: run.Count = 64  # rows in memory at a time, but at least one whole group; 16 times as many to sample

    # the algorithm
    loss: Literal["pairs", "scaled", "mean", "hinge"] = "mean"    # see the table above
    beta: run.Positive = 0.1    # implicit reward per nat of log(pi/ref)
    margin: run.Positive | None = None    # hinge: the D that is enough (default: 1)
    best_of: run.Natural = 16   # answers per problem for best-of-n before training, to compare with; 0 is off

    def __post_init__(self):
        super().__post_init__()
        self.default("out", run.stage_dir("group_dpo", self.task))
        self.require(self.loss == "hinge" or self.margin is None, "loss margin", "only --loss hinge uses --margin")
        if self.loss == "hinge":
            self.default("margin", 1.0)
        self.require(self.group > 1, "group", "winners are compared with losers of their group; expected at least 2")


@run.script
def main(cfg: Config) -> None:
    # 1. Start: check flags and files, then load the models.
    task = run.choose_task(cfg.task, cfg.data, seed=cfg.seed, verifier=cfg.verifier, reward=cfg.reward)
    task.require_right("right answers are set against wrong ones, but")
    device, checkpoint, tokenizer, policy, reference, _ = run.begin(cfg, "sft", task=task, reference=True)

    optimizer = run.Optimizers(policy, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer, data=task.examples(), initial_policy=reference)
    del checkpoint
    compiled = run.compile_models(cfg, device, policy, reference)
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, slots=16 * cfg.micro_batch, compile=compiled)
    loss = functools.partial(objective, loss=cfg.loss, margin=cfg.margin)
    print(f"{cfg.loss} over groups on {task}: {cfg.prompts} prompts x {cfg.group} answers a step, on {device.type}.")

    def score(tokens, mask):
        with run.autocast(device, cfg.dtype):
            return token_log_probs(policy, tokens, mask, temperature=cfg.temperature)

    def evaluate_now():
        return evaluate_and_show(out, task, sampling, reference=reference)

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

        # 4. Compare: a right answer wins, a wrong one loses.
        started = time.perf_counter()
        rollout, rewards, parts = fresh.rollout, fresh.rewards, fresh.parts
        with run.autocast(device, cfg.dtype):
            ref_logp = score_rollout(reference, rollout, cfg.temperature, cfg.micro_batch)  # [B, T-1]
        scored = ~rewards.isnan().any(-1, keepdim=True)                 # a group is scored whole, or left out
        won = ((right_or_reward(task, rewards) == 1) & scored).to(device)                   # [P, G]
        watched = watch_groups(out, task, rollout, rewards, parts)      # for nanorl.view: a few, in a few steps

        # 5. Update. A group stays together; the weights are the whole step's, so micro-batches add up.
        totals = {}
        for groups in run.ranks.parts(torch.arange(cfg.prompts, device=device), max(1, cfg.micro_batch // cfg.group)):
            rows = (groups[:, None] * cfg.group + torch.arange(cfg.group, device=device)).flatten()
            T = int(rollout.lengths[rows].max())
            m, ref = rollout.mask[rows, : T - 1], ref_logp[rows, : T - 1]
            logp, entropy = score(rollout.tokens[rows, :T], m)
            log_ratio = logp - ref                                                          # [R, T-1]
            r, w = cfg.beta * log_ratio.sum(-1).view(-1, cfg.group), won[groups]            # [groups, G]
            micro_loss, metrics = loss(r, w, torch.full((len(groups),), 1 / cfg.prompts, device=device))
            watched.add(0, rows, logp, entropy, mask=m, implicit_reward=cfg.beta * log_ratio,
                        alone=lambda k, r=r, w=w: loss(r[k : k + 1], w[k : k + 1], r.new_ones(1))[1])
            micro_loss.backward()
            metrics |= {"train/entropy": masked_sum(entropy.detach(), m), "train/kl": masked_sum(kl_k3(logp.detach(), ref), m)}
            add_metrics(totals, metrics)
        totals = sum_over_ranks(totals)
        lr = cfg.lr * out.schedule(warmup=0.05)
        grad_norm = optimizer.step(lr, grad_clip=1.0)
        watched.write()

        # 6. Log: sums over tokens become means over tokens, sums over groups means over the groups that have both kinds.
        compared = max(int(totals.pop("train/groups")), 1)
        for name in ("train/entropy", "train/kl"):
            totals[name] = totals[name] / rollout.mask.sum()
        for name in {"train/margin", "train/active"} & totals.keys():
            totals[name] = totals[name] / compared
        out.log(totals | {"train/grad_norm": grad_norm, "train/lr": lr, "time/update_s": time.perf_counter() - started},
                show=("rollout/reward", "rollout/worked", "train/margin"))

    # 7. Held-out problems, before and after.
    out.finish(evaluate_now())
    print(before_and_after(out, task))


if __name__ == "__main__":
    main(run.parse(Config))
