"""Policy gradients without a critic: sample a group of answers to each prompt, and make the better ones more likely.

    J = sum_bt w_bt [ bound(rho) A - kl_coef KL(pi || ref) + entropy_coef H ]          loss = -J

GRPO and its relatives differ in five choices: how an answer is compared (the advantage A), how far the policy has moved
since it sampled (the ratio rho), what is done about it (the bound), how much each token counts (the weights w) and which
groups are trained on. A named algorithm is a row of the table below; any flag overrides its choice.

    python train_grpo.py                    from nothing: pretrains and fine-tunes first where those runs are missing
    python train_grpo.py --algo dapo --minibatches 4 --out runs/dapo
    python train_grpo.py --algo rloo --kl-coef 0.03 --out runs/rloo
    python train_grpo.py --task sorting

With one update per rollout, the default, every ratio is 1 and a bound has nothing to do: rows that differ only there are
then the same algorithm. GRPO's loss is then zero too, because the advantages of a group sum to zero and all its answers
weigh the same. A loss says nothing about progress here and is not logged. Watch the reward.
"""

import functools
import operator
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import train_pretrain
import train_sft
from nanorl import run
from nanorl.data import DATA, read_records, read_text, shuffled_batch
from nanorl.ops import (
    AGGREGATES,
    center,
    clipped_surrogate,
    importance_ratio,
    kl_k1,
    kl_k2,
    kl_k3,
    leave_one_out,
    masked_sum,
    masked_surrogate,
    overlong_penalty,
    sequence_ratio,
    token_weights,
    truncated_surrogate,
    zscore,
    zscore_batch,
)
from nanorl.rollout import NoContrast, check_room, collect, contrast, describe, evaluate, show_answers
from nanorl.sample import Rollout, token_log_probs
from nanorl.selfcheck import SelfCheckFailed, selfcheck, tolerance
from nanorl.tasks import FileTask, make_task

DEMONSTRATIONS = 20_000     # of the task, for --likelihood-coef: those of train_sft.py
STORY_WINDOW = 64       # tokens: no longer than what pretraining has seen, so that only forgetting is measured

# ---------------------------------------------------------------------------------------------------------------------
# The family
# ---------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    advantage: str
    ratio: str
    bound: str
    aggregate: str
    groups: str
    note: str       # the source, and where this row deviates from it
    also: dict      # further flags that belong to the algorithm


ALGORITHMS = {
    #                advantage        ratio       bound       aggregate        groups
    "reinforce": Row("reward",        "none",     "none",     "sequence_sum",  "all",
                     "Williams 1992; --baseline-decay 0.9 takes a running mean of the reward off", {}),
    "rloo":      Row("leave_one_out", "none",     "none",     "sequence_sum",  "all",
                     "Ahmadian et al. 2024; their KL in the reward: --kl-coef 0.03", {"kl": "k1", "kl_in": "reward"}),
    "grpo":      Row("zscore",        "token",    "clip",     "sequence_mean", "all",
                     "Shao et al. 2024, eq. 3, its clip not given; their KL in the loss: --kl-coef 0.04", {}),
    "dr_grpo":   Row("center",        "token",    "clip",     "constant",      "all",
                     "Liu et al. 2025", {}),
    "dapo":      Row("zscore",        "token",    "clip",     "prompt_mean",   "resample",
                     "Yu et al. 2025, eq. 8 and 13, whose rewards are -1 and 1; their code: --aggregate token_mean",
                     {"clip_high": 0.28, "overlong": 0.2}),
    "cispo":     Row("zscore",        "token",    "truncate", "prompt_mean",   "all",
                     "MiniMax 2025, eq. 4 and 5, the cap not given; they add --groups resample --overlong; libraries use "
                     "token_mean", {}),
    "gspo":      Row("zscore",        "sequence", "clip",     "sequence_mean", "all",
                     "Zheng et al. 2025, eq. 5 to 7, at their --minibatches 4", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "masked_is": Row("center",        "token",    "mask",     "token_mean",    "all",
                     "verifiers-rl (Prime Intellect), whose ratio is to the sampler's log-probs; masked tokens count in N", {}),
    "scale_rl":  Row("zscore_batch",  "token",    "truncate", "prompt_mean",   "drop",
                     "Khatri et al. 2025, section 4; absent: asynchrony, interruptions, no-positive-resampling, float32 logits",
                     {}),
    "raft":      Row("positive",      "none",     "none",     "token_mean",    "all",
                     "all accepted answers, as Xiong et al. 2025 read it; Dong et al. 2023 keep the best of each group", {}),
}
AXES = Row._fields[:5]
__doc__ += "\n".join(["\n{:<11}{:<15}{:<10}{:<10}{:<15}{:<10}{}".format("--algo", *AXES, "and"), *(
    "{:<11}{:<15}{:<10}{:<10}{:<15}{:<10}".format(name, *row[:5])
    + " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in row.also.items()) + f"\n{'':11}{row.note}"
    for name, row in ALGORITHMS.items())])

# What only one choice of an axis looks at, and its value where neither the row nor a flag says otherwise.
NUMBERS = {"clip_low": ("bound", "clip", 0.2), "clip_high": ("bound", "clip", 0.2), "cap": ("bound", "truncate", 5.0),
           "mask_low": ("bound", "mask", 1 / 8), "mask_high": ("bound", "mask", 8.0),
           "baseline_decay": ("advantage", "reward", 0.0)}

# How an answer is compared, rewards [P, G] -> [P, G]. `reward` and `positive` compare it with nothing: the one may take a
# running mean off, the other trains on answers of positive reward alone.
ADVANTAGES = {"reward": lambda rewards: rewards, "center": center, "leave_one_out": leave_one_out, "zscore": zscore,
              "zscore_batch": zscore_batch, "positive": torch.ones_like}

TERMS = ("ratio", "bound", "clip_low", "clip_high", "cap", "mask_low", "mask_high", "kl_coef", "kl", "kl_in", "entropy_coef")
KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
EXTREMES = {"_max": max, "_min": min}       # how such metrics add up; all others are sums
# Which divergence the expected gradient of a KL term follows; a pair that is not here follows none. That is exact on samples
# of pi itself (`weighted` carries the ratio of older ones), where a token's weight does not depend on its answer's length
# (sequence_sum, constant), and, in the reward, where no z-score divides it.
KL_FOLLOWS = {("k2", "loss"): "KL(pi || ref), each prefix held fixed",
              ("k3", "loss"): "KL(ref || pi), each prefix held fixed",
              ("k1", "weighted"): "KL(pi || ref), each prefix held fixed",
              ("k3", "weighted"): "KL(pi || ref), each prefix held fixed",
              ("k1", "reward"): "KL(pi || ref) of whole answers"}


@dataclass(frozen=True, kw_only=True)
class Config(run.RunConfig):
    out: str = ""               # directory of this run (default: runs/grpo, or runs/grpo-TASK)
    steps: run.Count = 40
    lr: run.Positive = 1e-4
    eval_every: run.Count = 10

    task: str = "addition"      # addition, sums, sorting, reversal or countdown
    difficulty: run.Natural = 0  # of the task, 0 is its own default
    data: str = ""              # JSONL records {"prompt", "answer"} to practise on instead of the task's problems
    prompts: run.Count = 32     # P, prompts per step
    group: run.Count = 8        # G, answers sampled per prompt
    max_new_tokens: run.Count = 80    # an answer longer than this is cut, and scores 0
    temperature: run.Positive = 1.0    # of the policy: sampled with it, scored with it

    algo: Literal[*ALGORITHMS] = "grpo"    # a row of the table above; the flags that follow override it
    advantage: Literal[*ADVANTAGES] | None = None    # how an answer is compared with others
    ratio: Literal["none", "token", "sequence"] | None = None    # of each token, or of the answer (its geometric mean)
    bound: Literal["none", "clip", "truncate", "mask"] | None = None    # what is done about a ratio far from 1
    aggregate: Literal[*AGGREGATES] | None = None    # how much each token counts, see nanorl/ops.py
    groups: Literal["all", "drop", "resample"] | None = None    # those without contrast: keep, leave out, or draw anew
    clip_low: run.Share | None = None    # --bound clip: the band is 1 - clip_low ...
    clip_high: run.Positive | None = None    # ... to 1 + clip_high
    cap: run.Positive | None = None    # --bound truncate: the largest weight
    mask_low: run.NonNegative | None = None    # --bound mask: tokens whose ratio is below this are left out ...
    mask_high: run.Positive | None = None    # ... and those above this
    baseline_decay: run.Share | None = None    # --advantage reward: of a running mean that is taken off; 0 is none
    overlong: run.Share | None = None    # the last share of max_new_tokens, in which length costs up to 1 of reward

    kl_coef: run.NonNegative = 0.0    # weight of the KL divergence from the initial policy, the reference
    kl: Literal[*KL] | None = None    # its estimator (the row's, else k3)
    kl_in: Literal["loss", "weighted", "reward"] | None = None    # the loss, the loss weighted by the ratio, or the reward
    refresh_reference: run.Count | None = None    # steps after which the policy becomes the reference
    entropy_coef: run.NonNegative = 0.0    # weight of the entropy bonus
    likelihood_coef: run.NonNegative = 0.0    # weight of the log-likelihood of demonstrations, against forgetting
    demonstrations: str = ""    # JSONL records {"prompt", "response"} for it (default: the task's own)
    truncated: Literal["train", "mask"] = "train"    # answers cut at the limit: train on them, or only count them in the mean

    epochs: run.Count = 1       # passes over a rollout
    minibatches: run.Count = 1  # optimizer steps per pass
    stale: run.Natural = 0      # train on rollouts that are this many steps old, so that ratios leave 1 on purpose
    micro_batch: run.Count = 64  # rows in memory at a time
    warmup: run.Share = 0.05    # of the steps: the learning rate rises
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm
    eval_problems: run.Count = 500    # held-out problems
    selfcheck: bool = True      # hold the first rollout against what must be true before training on it

    def __post_init__(self):
        """Fill what was left open from the algorithm's row, and refuse what contradicts itself."""
        def default(flag, value):
            if getattr(self, flag) is None:
                object.__setattr__(self, flag, value)

        row = ALGORITHMS[self.algo]
        object.__setattr__(self, "out", self.out or run.stage_dir("grpo", self.task, self.difficulty))
        for axis in AXES:
            default(axis, getattr(row, axis))
        for flag, (axis, choice, value) in NUMBERS.items():
            if getattr(self, axis) == choice:
                default(flag, row.also.get(flag, value))
            elif getattr(self, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: only --{axis} {choice} looks at it, and "
                                 f"--{axis} is {getattr(self, axis)}")
        default("overlong", row.also.get("overlong", 0.0))
        if self.kl_coef:
            default("kl", row.also.get("kl", "k3"))
            default("kl_in", row.also.get("kl_in", "loss"))
            if (self.kl, self.kl_in) not in KL_FOLLOWS:
                sound = "; ".join(f"{' in '.join(pair)} ({what})" for pair, what in KL_FOLLOWS.items())
                raise ValueError(f"--kl {self.kl} --kl-in {self.kl_in}: its gradient follows no divergence; expected {sound}")
        else:
            for flag in ("kl", "kl_in", "refresh_reference"):
                if getattr(self, flag) is not None:
                    raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: expected a --kl-coef beside it")
        if self.demonstrations and not self.likelihood_coef:
            raise ValueError(f"--demonstrations {self.demonstrations}: without --likelihood-coef nothing learns from them")
        if self.ratio == "none" and self.bound != "none":
            raise ValueError(f"--ratio none --bound {self.bound}: there is no ratio to bound, expected --bound none")
        if self.ratio == "sequence" and self.aggregate != "sequence_mean":
            raise ValueError(f"--ratio sequence --aggregate {self.aggregate}: answers have one ratio each and count alike, "
                             "expected --aggregate sequence_mean")
        if self.bound == "mask" and self.mask_low > self.mask_high:
            raise ValueError(f"--mask-low {self.mask_low} is above --mask-high {self.mask_high}: every token would be left out")
        if self.advantage == "positive" and self.kl_in == "reward":
            raise ValueError("--advantage positive --kl-in reward: accepted answers count alike, whatever their reward; "
                             "expected --kl-in loss or weighted")
        compares = self.advantage not in ("reward", "positive") or self.groups != "all"
        if self.group == 1 and compares:
            raise ValueError(f"--group 1: --advantage {self.advantage} with --groups {self.groups} compares answers within a "
                             "group, expected at least 2")


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


def objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None, ratio="token", bound="clip", clip_low=0.2,
              clip_high=0.2, cap=5.0, mask_low=1 / 8, mask_high=8.0, kl_coef=0.0, kl="k3", kl_in="loss", entropy_coef=0.0):
    """The loss of one micro-batch, and its metrics as sums over the tokens that count.

        L = -sum_bt w_bt [ bound(rho) A - kl_coef KL(pi || ref) + entropy_coef H ]

    logp, old_logp, ref_logp, entropy [B, T] nats; adv [B, 1]; mask, weights [B, T], the weights made once for the whole
    optimizer step. Losses and metrics of micro-batches add up to the step's; those named _max and _min are extremes.
    """
    # Padding may hold anything, even inf. Blank it before exp(): afterwards its gradient would be 0 * inf = nan.
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    # With one ratio per answer, every token has moved as far as the answer's mean token.
    moved = old_logp + sequence_ratio(logp, old_logp, mask).log() if ratio == "sequence" else logp
    rho = importance_ratio(moved.detach(), old_logp)                                        # [B, T]
    metrics = {"train/ratio_max": rho.masked_fill(~mask, 1.0).max().clamp(min=1),
               "train/ratio_min": rho.masked_fill(~mask, 1.0).min().clamp(max=1)}
    if bound == "clip":
        surrogate = clipped_surrogate(moved, old_logp, adv, clip_low, clip_high)            # [B, T]
        metrics["train/clipped_low"] = masked_sum(((rho < 1 - clip_low) & (adv < 0)).float(), mask)
        metrics["train/clipped_high"] = masked_sum(((rho > 1 + clip_high) & (adv > 0)).float(), mask)
    elif bound == "truncate":
        surrogate = truncated_surrogate(moved, old_logp, adv, cap)
        metrics["train/capped"] = masked_sum((rho > cap).float(), mask)
    elif bound == "mask":
        surrogate = masked_surrogate(moved, old_logp, adv, mask_low, mask_high)
        metrics["train/masked"] = masked_sum(((rho < mask_low) | (rho > mask_high)).float(), mask)
    else:
        surrogate = adv * (logp if ratio == "none" else importance_ratio(moved, old_logp))
    if kl_coef and kl_in != "reward":
        divergence = KL[kl](logp, ref_logp.masked_fill(~mask, 0.0))
        if kl_in == "weighted":
            divergence = importance_ratio(logp, old_logp) * divergence
        surrogate = surrogate - kl_coef * divergence
    if kl_coef:     # its value is always k3's, whatever its gradient
        metrics["train/kl"] = masked_sum(kl_k3(logp.detach(), ref_logp.masked_fill(~mask, 0.0)), mask)
    if entropy_coef:
        surrogate = surrogate + entropy_coef * entropy.masked_fill(~mask, 0.0)
    return -(weights * surrogate).sum(), metrics


def micro_batches(rows, lengths, size):
    """`rows` in batches of `size`, rows of similar length together. Yields (rows, length of the longest)."""
    for part in rows[lengths[rows].argsort()].split(size):
        yield part, int(lengths[part].max())


def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work; then what depends on the model.
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        if cfg.data:
            records = read_records(cfg.data, ("prompt", "answer"))
            task = FileTask([(record["prompt"], record["answer"]) for record in records], cfg.data)
        else:
            task = make_task(cfg.task, cfg.difficulty or None)
        if cfg.minibatches > cfg.prompts * cfg.group:
            raise ValueError(f"--minibatches {cfg.minibatches}: a rollout has only {cfg.prompts * cfg.group} answers")
        if cfg.stale >= cfg.steps:
            raise ValueError(f"--stale {cfg.stale}: with --steps {cfg.steps}, no rollout would ever be old enough to train on")
        demonstrations = []
        if cfg.likelihood_coef:
            demonstrations = (read_records(cfg.demonstrations, ("prompt", "response")) if cfg.demonstrations
                              else task.demonstrations(DEMONSTRATIONS))
        stories = read_text(DATA / "stories_heldout.txt")
    init = cfg.init
    if not init and (not checkpoint or cfg.kl_coef):
        init = run.ensure_stage(train_sft, out=run.stage_dir("sft", cfg.task, cfg.difficulty),
                                **run.same(cfg, "task", "difficulty"))
    with run.user_errors():
        start = checkpoint or run.load_checkpoint(init)
        policy, tokenizer = run.model_from(start, device), run.tokenizer_from(start)
        reference = run.model_from(run.load_checkpoint(init), device).requires_grad_(False) if cfg.kl_coef else None
        check_room(policy, [tokenizer.render(problem.prompt) for problem in task.examples()], cfg.max_new_tokens)
        demonstrated = train_sft.render(demonstrations, tokenizer, policy.config.context, cfg.demonstrations or task.name)

    optimizer = run.Optimizers(policy, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer)
    del start, checkpoint
    if "reference" in out.state:
        reference.load_state_dict(out.state["reference"])
    queue = out.state.setdefault("queue", [])       # rollouts that wait to be trained on
    compiled = run.wants_compile(cfg, device)
    if compiled:
        for model in filter(None, (policy, reference)):
            run.compile_blocks(model)
    story_ids = torch.tensor(tokenizer.encode(stories))
    sampling = dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, compile=compiled)
    loss_of = functools.partial(objective, **{name: getattr(cfg, name) for name in TERMS if getattr(cfg, name) is not None})
    updates = cfg.epochs * cfg.minibatches
    off_policy = updates > 1 or cfg.stale > 0
    print(f"{cfg.algo} on {task.name}: {cfg.prompts} prompts x {cfg.group} answers a step, on {device.type}.\n"
          + ", ".join(f"{name} {getattr(cfg, name)}" for name in (*AXES, *NUMBERS, "overlong", "lr") if getattr(cfg, name))
          + f". Updates per rollout: {updates}." + ("" if off_policy else " Ratios are 1: a bound is inert."))
    if cfg.kl_coef:
        print(f"Leash: {cfg.kl} in the {cfg.kl_in.replace('weighted', 'loss, weighted')}; its gradient follows "
              f"{KL_FOLLOWS[cfg.kl, cfg.kl_in]}.")

    def look() -> dict[str, float]:
        with run.autocast(device, cfg.dtype):
            metrics, experience = evaluate(policy, tokenizer, task, problems=cfg.eval_problems, seed=cfg.seed, **sampling)
            text = train_pretrain.text_loss(policy, story_ids, tokenizer.bos, len(stories.encode()), STORY_WINDOW)
        show_answers(out, experience)
        return metrics | {"eval/story_loss": text["eval/text_loss"]}

    def score(model, tokens, mask):
        with run.autocast(device, cfg.dtype):
            return token_log_probs(model, tokens, mask, temperature=cfg.temperature)

    @torch.no_grad()
    def score_all(model, rollout):
        logp = torch.zeros_like(rollout.logp)
        for rows, T in micro_batches(torch.arange(len(logp), device=device), rollout.lengths, cfg.micro_batch):
            logp[rows, : T - 1] = score(model, rollout.tokens[rows, :T], rollout.mask[rows, : T - 1])[0]
        return logp

    unchecked = cfg.selfcheck
    for step in out.steps():
        # 2. Look: held-out problems, answered by sampling and greedily.
        if step % cfg.eval_every == 0:
            out.log(look())
        if cfg.refresh_reference and step and step % cfg.refresh_reference == 0:
            reference.load_state_dict(policy.state_dict())
            out.state["reference"] = reference.state_dict()

        # 3. Collect: G answers to each of P prompts, by the policy as it is now. With --stale they wait for their turn.
        started = time.perf_counter()
        with run.user_errors(NoContrast), out.saved_on(NoContrast), run.autocast(device, cfg.dtype):
            experience = collect(policy, tokenizer, task, prompts=cfg.prompts, samples=cfg.group,
                                 seed=run.derive(cfg.seed, "rollout", step), resample=cfg.groups == "resample", **sampling)
        rollout, facts = experience.rollout, describe(experience)
        if unchecked:
            with run.user_errors(SelfCheckFailed):
                out.say(selfcheck(experience, task, tokenizer.end, functools.partial(score, policy), loss_of,
                                  list(policy.parameters()), cfg.aggregate, cfg.max_new_tokens, tolerance(device, cfg.dtype)))
            unchecked = False
        out.log({f"rollout/{name}": value for name, value in facts.items()})
        out.log({"rollout/tokens": int(rollout.mask.sum()) + experience.resampled_tokens,
                 "rollout/resampled": experience.resampled, "time/rollout_s": time.perf_counter() - started})
        # Without an update in between, the log-probs of the update itself are the old ones.
        old_logp = score_all(policy, rollout) if off_policy else rollout.logp
        queue.append(vars(rollout) | {"rewards": experience.rewards, "old_logp": old_logp})
        if len(queue) <= cfg.stale:
            continue
        started = time.perf_counter()
        waiting = {name: x.to(device) for name, x in queue.pop(0).items()}
        rewards, old_logp = waiting.pop("rewards"), waiting.pop("old_logp")                 # [P, G], [B, T-1]
        rollout = Rollout(**waiting)

        # 4. Compare: how much better is each answer than others? A mask says which tokens are trained on.
        mask = rollout.mask                                                                 # [B, T-1]
        if cfg.groups == "drop":
            mask = mask & contrast(rewards)[rollout.prompt_index, None]
        if cfg.truncated == "mask":
            mask = mask & rollout.finished[:, None]
        if cfg.advantage == "positive":
            mask = mask & (rewards > 0).view(-1, 1)
        ref_logp = score_all(reference, rollout) if reference else None
        if cfg.overlong:
            lengths = (rollout.lengths - rollout.prompt_lengths).view_as(rewards)
            rewards = rewards + overlong_penalty(lengths, cfg.max_new_tokens, cfg.overlong * cfg.max_new_tokens)
        if cfg.kl_in == "reward":
            leash = kl_k1(old_logp, ref_logp).masked_fill(~rollout.mask, 0.0).sum(-1)
            rewards = rewards - cfg.kl_coef * leash.view_as(rewards)
        if cfg.baseline_decay:          # of earlier rewards only: no answer has a part in what it is compared with
            total, weight = out.state.get("baseline", (0.0, 0.0))
            out.state["baseline"] = tuple(cfg.baseline_decay * old + (1 - cfg.baseline_decay) * new
                                          for old, new in ((total, float(rewards.mean())), (weight, 1.0)))
            rewards = rewards - total / max(weight, 1e-9)
        kept = {"kept": mask.any(-1).view_as(rewards)} if cfg.advantage == "zscore_batch" else {}
        adv = ADVANTAGES[cfg.advantage](rewards, **kept).view(-1, 1)                        # [B, 1]

        # 5. Update. Micro-batches only bound memory: the weights are the whole optimizer step's, so they add up exactly.
        totals, tokens, demonstration_loss = defaultdict(float), 0, 0.0
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup)
        for epoch in range(cfg.epochs):
            shuffle = torch.randperm(len(mask), generator=run.generator(cfg.seed, "minibatch", step, epoch)).to(device)
            for number, minibatch in enumerate(shuffle.tensor_split(cfg.minibatches), step * updates + epoch * cfg.minibatches):
                weights = torch.zeros(mask.shape, device=device)
                weights[minibatch] = token_weights(mask[minibatch], rollout.prompt_index[minibatch], cfg.aggregate,
                                                   cfg.max_new_tokens)
                for rows, T in micro_batches(minibatch, rollout.lengths, cfg.micro_batch):
                    m, w = mask[rows, : T - 1], weights[rows, : T - 1]
                    logp, entropy = score(policy, rollout.tokens[rows, :T], m)
                    old = old_logp[rows, : T - 1] if off_policy else logp.detach()
                    loss, metrics = loss_of(logp, old, adv[rows], m, w, entropy=entropy,
                                            ref_logp=ref_logp[rows, : T - 1] if reference else None)
                    loss.backward()
                    metrics["train/entropy"] = masked_sum(entropy.detach(), m)
                    metrics["train/mismatch_kl"] = masked_sum(kl_k3(rollout.logp[rows, : T - 1], old), m)
                    for name, value in metrics.items():
                        totals[name] = EXTREMES.get(name[-4:], operator.add)(totals[name], value) if name in totals else value
                    tokens += int(m.sum())
                if demonstrations:
                    picks = shuffled_batch(len(demonstrations), cfg.prompts, number, cfg.seed)
                    t, m = (x.to(device) for x in train_sft.batch_of(*demonstrated, picks, tokenizer.pad))
                    w = token_weights(m, torch.arange(len(picks), device=device), "token_mean")
                    loss, _ = train_pretrain.objective(score(policy, t, m)[0], m, w)
                    (cfg.likelihood_coef * loss).backward()
                    demonstration_loss += loss.item() / updates
                grad_norm = optimizer.step(lr, cfg.grad_clip)
                totals["train/grad_norm_max"] = max(totals["train/grad_norm_max"], grad_norm)

        # 6. Log: sums over tokens become means over tokens.
        out.log({name: value if name[-4:] in EXTREMES else value / max(tokens, 1) for name, value in totals.items()})
        out.log({"train/demonstration_loss": demonstration_loss} if demonstrations else {})
        out.log({"train/lr": lr, "time/update_s": time.perf_counter() - started},
                show={"reward": f"{facts['reward']:.2f}", "worked": f"{facts['worked']:.2f}",
                      "length": f"{facts['length']:.1f}", "entropy": f"{totals['train/entropy'] / max(tokens, 1):.3f}"})

    # 7. What it was good for: held-out problems before and after.
    final = look()
    out.finish(final)
    before = out.metrics()[0]
    print(f"\n{cfg.eval_problems} held-out problems      before    after")
    for name, label in (("accuracy_sampled", "accuracy, sampled"), ("accuracy_greedy", "accuracy, greedy"),
                        ("worked", "share worked out"), ("reward_worked", "accuracy when worked out"),
                        ("reward_direct", "accuracy when blurted"), ("length", "tokens per answer"),
                        ("story_loss", "story loss, nats per token")):
        values = (f"{line[f'eval/{name}']:8.3f}" if f"eval/{name}" in line else "       -" for line in (before, final))
        print(f"  {label:28s}", *values)


if __name__ == "__main__":
    main(run.parse(Config))
