"""Policy gradients without a critic: sample a group of answers to each prompt, and make the better ones more likely.

    J = sum_bt w_bt [ bound(rho) A - kl_coef KL(pi || ref) + entropy_coef H ] + likelihood_coef E_demo[log pi]      loss = -J

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
import inspect
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import train_pretrain
import train_sft
from nanorl import ranks, run
from nanorl.data import DATA, read_text, shuffled_batch
from nanorl.ops import (
    AGGREGATES,
    center,
    clipped_away,
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
from nanorl.rollout import (
    NoContrast,
    Room,
    add_up,
    before_and_after,
    check_room,
    choose_task,
    collect,
    contrast,
    describe,
    evaluate,
    means,
    micro_batches,
    minibatches,
    of_all_ranks,
    score_rollout,
    show_answers,
)
from nanorl.sample import Rollout, token_log_probs
from nanorl.selfcheck import SelfCheckFailed, selfcheck, tolerance
from nanorl.tasks import default_max_new_tokens

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
                     "Ahmadian et al. 2024; their KL in the reward: --kl-coef 0.03", {"kl_in": "reward"}),
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

KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
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

    task: str = "addition"      # addition, sums, sorting, reversal, countdown or code
    data: str = ""              # JSONL records {"prompt", "answer"} to practise on instead of the task's problems
    prompts: run.Count = 32     # P, prompts per step
    group: run.Count = 8        # G, answers sampled per prompt
    max_new_tokens: run.Count | None = None    # an answer longer than this is cut (default: 80; code 120), and scores 0
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
    kl_in: Literal["loss", "weighted", "reward"] | None = None    # where it acts: loss, loss times the ratio, or reward
    kl: Literal[*KL] | None = None    # its estimator (k1 in the reward, else k3)
    refresh_reference: run.Count | None = None    # every so many steps the policy becomes the reference (default: never)
    entropy_coef: run.NonNegative = 0.0    # weight of the entropy bonus
    likelihood_coef: run.NonNegative = 0.0    # weight of the log-likelihood of demonstrations, against forgetting
    demonstrations: str = ""    # JSONL records {"prompt", "response"} for it (default: the task's own)
    truncated: Literal["train", "mask"] = "train"    # answers cut at the limit: train on them, or only count them in the mean

    epochs: run.Count = 1       # passes over a rollout
    minibatches: run.Count = 1  # optimizer steps per pass
    stale: run.Natural = 0      # train on rollouts that are this many steps old, so that ratios leave 1 on purpose
    micro_batch: run.Count = 64  # rows in memory at a time ...
    micro_tokens: run.Count = 2**14  # ... and tokens, padding included: fewer rows where answers are long, but at least one
    sample_rows: run.Count = 1024    # answers sampled at a time, but at least all of one prompt; the others wait
    skip: bool = False          # leave out rows whose advantage, so gradient, is 0; train/ metrics are then of the others
    warmup: run.Share = 0.05    # of the steps: the learning rate rises
    grad_clip: run.Positive = 1.0    # bound on the gradient's norm
    eval_problems: run.Count = 500    # held-out problems
    selfcheck: bool = True      # hold the first rollout against what must be true before training on it

    def __post_init__(self):
        """Fill what was left open from the algorithm's row, and refuse what contradicts itself."""
        row = ALGORITHMS[self.algo]
        self.default("out", run.stage_dir("grpo", self.task))
        self.default("max_new_tokens", default_max_new_tokens(self.task))
        for axis in AXES:
            self.default(axis, getattr(row, axis))
        for flag, (axis, choice, value) in NUMBERS.items():
            if getattr(self, axis) == choice:
                self.default(flag, row.also.get(flag, value))
            self.expect(getattr(self, axis) == choice or getattr(self, flag) is None, f"{axis} {flag}",
                   f"only --{axis} {choice} looks at --{flag.replace('_', '-')}")
        self.default("overlong", row.also.get("overlong", 0.0))
        if self.kl_coef:
            self.default("kl_in", row.also.get("kl_in", "loss"))
            self.default("kl", "k1" if self.kl_in == "reward" else "k3")
            sound = "; ".join(f"{' in '.join(pair)} ({what})" for pair, what in KL_FOLLOWS.items())
            self.expect((self.kl, self.kl_in) in KL_FOLLOWS, "kl kl_in",
                        f"its gradient follows no divergence; expected {sound}")
        for flag in ("kl", "kl_in", "refresh_reference"):
            self.expect(self.kl_coef or getattr(self, flag) is None, flag, "expected a --kl-coef beside it")

        self.expect(self.likelihood_coef or not self.demonstrations, "demonstrations", "expected a --likelihood-coef beside it")
        self.expect(self.ratio != "none" or self.bound == "none", "ratio bound",
                    "there is no ratio to bound, expected --bound none")
        self.expect(self.ratio != "sequence" or self.aggregate == "sequence_mean", "ratio aggregate",
                    "answers have one ratio each and count alike, expected --aggregate sequence_mean")
        self.expect(self.bound != "mask" or self.mask_low <= 1 <= self.mask_high, "mask_low mask_high",
                    "a ratio of 1 would be left out, expected a band around 1")
        self.expect(self.bound != "truncate" or self.cap >= 1, "cap", "a ratio of 1 would be cut, expected at least 1")
        self.expect(self.baseline_decay != 1, "baseline_decay", "a mean that never learns is none, expected less than 1")
        self.expect(self.advantage != "positive" or (self.kl_in != "reward" and not self.overlong), "advantage kl_in overlong",
                    "accepted answers count alike, whatever their reward; expected --kl-in loss or weighted, --overlong 0")
        self.expect(self.kl_in != "reward" or "zscore" not in self.advantage, "kl_in advantage",
                    "a z-score would undo --kl-coef; expected --advantage reward, center or leave_one_out")
        self.expect(self.group > 1 or (self.advantage in ("reward", "positive") and self.groups == "all"),
                    "group advantage groups", "answers are compared within a group, expected a --group of at least 2")
        self.expect(not self.skip or not (self.entropy_coef or (self.kl_coef and self.kl_in != "reward")),
                    "skip kl_coef entropy_coef", "a row without an advantage has the gradient of its KL and its entropy")
        self.expect(self.minibatches <= self.prompts * self.group, "minibatches",
                    f"a rollout has only {self.prompts * self.group} answers")
        self.expect(self.stale < self.steps, "stale",
                    f"with --steps {self.steps}, no rollout would ever be old enough to train on")

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.epochs * self.minibatches


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
    new, old = logp, old_logp
    if ratio == "sequence":         # every token has moved as far as the answer's mean token
        new, old = sequence_ratio(logp, old_logp, mask).log().expand_as(logp), torch.zeros_like(logp)
    rho = importance_ratio(new.detach(), old).masked_fill(~mask, 1.0)                       # [B, T]
    metrics = {"train/ratio_max": rho.max().clamp(min=1), "train/ratio_min": rho.min().clamp(max=1)}
    if bound == "clip":
        surrogate = clipped_surrogate(new, old, adv, clip_low, clip_high)                   # [B, T]
        for name, held in zip(("low", "high"), clipped_away(rho, adv, clip_low, clip_high), strict=True):
            metrics[f"train/clipped_{name}"] = masked_sum(held.float(), mask)
    elif bound == "truncate":
        surrogate = truncated_surrogate(new, old, adv, cap)
        metrics["train/capped"] = masked_sum((rho > cap).float(), mask)
    elif bound == "mask":
        surrogate = masked_surrogate(new, old, adv, mask_low, mask_high)
        metrics["train/masked"] = masked_sum(((rho < mask_low) | (rho > mask_high)).float(), mask)
    else:
        surrogate = adv * (logp if ratio == "none" else importance_ratio(new, old))
    if kl_coef:
        ref_logp = ref_logp.masked_fill(~mask, 0.0)
        metrics["train/kl"] = masked_sum(kl_k3(logp.detach(), ref_logp), mask)      # its value, whatever its gradient
        if kl_in != "reward":
            weight = importance_ratio(logp, old_logp) if kl_in == "weighted" else 1.0
            surrogate = surrogate - kl_coef * weight * KL[kl](logp, ref_logp)
    if entropy_coef:
        surrogate = surrogate + entropy_coef * entropy.masked_fill(~mask, 0.0)
    return -(weights * surrogate).sum(), metrics


def loss_of(cfg):
    """`objective` with the flags of a run."""
    flags = {name: getattr(cfg, name, None) for name in inspect.signature(objective).parameters}
    return functools.partial(objective, **{name: value for name, value in flags.items() if value is not None})


def compare(cfg, rollout, rewards, old_logp=None, ref_logp=None, baseline=0.0):
    """How much better is each answer than others, and which tokens are trained on?

    rewards [P, G] are the task's, on the CPU: contrast and acceptance are judged on them. The advantage sees what is left
    when length and KL have been paid for, R = r + overlong penalty - kl_coef sum_t k1. An answer whose tokens are left out
    still counts in its group's mean. Returns adv [B, 1], mask [B, T-1] and the mean of R.
    """
    mask, kept = rollout.mask, torch.ones_like(rewards, dtype=torch.bool)
    if cfg.groups == "drop":
        kept = kept & contrast(rewards)[:, None]
    if cfg.truncated == "mask":
        kept = kept & rollout.finished.cpu().view_as(rewards)
    if cfg.advantage == "positive":
        kept = kept & (rewards > 0)
    R = rewards
    if cfg.overlong:
        lengths = (rollout.lengths - rollout.prompt_lengths).cpu().view_as(R)
        R = R + overlong_penalty(lengths, cfg.max_new_tokens, cfg.overlong * cfg.max_new_tokens)
    if cfg.kl_in == "reward":
        R = R - cfg.kl_coef * kl_k1(old_logp, ref_logp).masked_fill(~mask, 0.0).sum(-1).cpu().view_as(R)
    adv = zscore_batch(R, kept=kept) if cfg.advantage == "zscore_batch" else ADVANTAGES[cfg.advantage](R - baseline)
    return adv.view(-1, 1).to(mask.device), mask & kept.view(-1, 1).to(mask.device), float(R.mean())


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def announce(cfg, task, device):
    print(f"{cfg.algo} on {task.name}: {cfg.prompts} prompts x {cfg.group} answers a step, on {device.type}.")
    print(", ".join(f"{flag} {getattr(cfg, flag)}" for flag in (*AXES, *NUMBERS, "overlong", "lr") if getattr(cfg, flag)) + ".")
    if cfg.updates == 1 and not cfg.stale:
        print("One update per rollout: all ratios are 1" + (", and the bound is inert." if cfg.bound != "none" else "."))
    else:
        print(f"{cfg.updates} updates per rollout" + (f", {cfg.stale} steps late" if cfg.stale else "")
              + (". Without a ratio, all but the first treat old samples as their own." if cfg.ratio == "none" else "."))
    if cfg.kl_coef:
        print(f"The KL term, {cfg.kl} in the {cfg.kl_in} (weight {cfg.kl_coef}), follows {KL_FOLLOWS[cfg.kl, cfg.kl_in]}.")


@run.says_why_it_stopped
def main(cfg: Config) -> None:
    # 1. What can be wrong with flags and files comes to light here, before any work; then what depends on the model.
    with run.user_errors():
        device = run.pick_device(cfg)
        checkpoint = run.Run.check(cfg)
        task = choose_task(cfg.task, cfg.data)
        demonstrations = train_sft.training_records(cfg.demonstrations, task) if cfg.likelihood_coef else []
        stories = read_text(DATA / "stories_heldout.txt")
    refreshed = checkpoint["state"].get("reference") if checkpoint else None
    initial = checkpoint | {"model": refreshed} if refreshed else None
    needs_init = not checkpoint or (cfg.kl_coef and not refreshed)
    init = cfg.init
    if needs_init and not init:
        init = run.ensure_stage(train_sft, out=run.stage_dir("sft", cfg.task),
                                **run.same(cfg, "task"))
    with run.user_errors():
        if needs_init:
            initial = run.load_checkpoint(init, "policy")
        start = checkpoint or initial
        policy, tokenizer = run.model_from(start, device), run.tokenizer_from(start)
        reference = run.model_from(initial, device).requires_grad_(False) if cfg.kl_coef else None
        check_room(policy, [tokenizer.render(problem.prompt) for problem in task.examples()], cfg.max_new_tokens)
        demonstrated = train_sft.render(demonstrations, tokenizer, policy.config.context, cfg.demonstrations or task.name)

    optimizer = run.Optimizers(policy, "adamw", cfg.lr)
    out = run.Run(cfg, checkpoint, policy, optimizer, tokenizer)
    if not refreshed:
        with run.user_errors():
            out.started_from(initial_policy=reference)
    del start, initial, checkpoint, refreshed
    compiled = run.prepare(cfg, device, *filter(None, (policy, reference)))
    story_ids = torch.tensor(tokenizer.encode(stories))
    room = Room(cfg.micro_batch, cfg.micro_tokens)
    sampling = dict(slots=cfg.sample_rows, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, compile=compiled)
    loss = loss_of(cfg)
    on_policy = cfg.updates == 1 and not cfg.stale
    unchecked = cfg.selfcheck
    announce(cfg, task, device)

    def look() -> dict[str, float]:
        with run.autocast(device, cfg.dtype):
            metrics, experience = evaluate(policy, tokenizer, task, problems=cfg.eval_problems, seed=cfg.seed, **sampling)
            text = train_pretrain.text_loss(policy, story_ids, tokenizer.bos, len(stories.encode()), STORY_WINDOW)
        show_answers(out, experience)
        return metrics | {"eval/story_loss": text["eval/text_loss"]}

    def score(model, tokens, mask):
        with run.autocast(device, cfg.dtype):
            return token_log_probs(model, tokens, mask, temperature=cfg.temperature)

    def score_all(model, rollout):
        with run.autocast(device, cfg.dtype):
            return score_rollout(model, rollout, cfg.temperature, room)

    def demonstrate(update):
        """Add the gradient of the demonstrations' likelihood, P of them per update. Returns their loss, nats per token."""
        picks = shuffled_batch(len(demonstrations), cfg.prompts, update, cfg.seed)
        tokens, mask = (x.to(device) for x in train_sft.batch_of(*demonstrated, picks, tokenizer.pad))
        weights, total = token_weights(mask, torch.arange(len(picks), device=device), "token_mean"), 0.0
        for t, m, w in zip(*(ranks.parts(x, cfg.micro_batch) for x in (tokens, mask, weights)), strict=True):
            nll, _ = train_pretrain.objective(score(policy, t, m)[0], m, w)
            (cfg.likelihood_coef * nll).backward()
            total += nll.item()
        return sum(ranks.gathered(total))

    for step in out.steps():
        # 2. Look: held-out problems, answered by sampling and greedily.
        if step % cfg.eval_every == 0:
            out.log(look())
        if cfg.refresh_reference and step and step % cfg.refresh_reference == 0:
            reference.load_state_dict(policy.state_dict())
            out.state["reference"] = reference.state_dict()

        # 3. Collect: G answers to each of P prompts, by the policy as it is now.
        started = time.perf_counter()
        with run.user_errors(NoContrast), out.saved_on(NoContrast), run.autocast(device, cfg.dtype):
            fresh = collect(policy, tokenizer, task, prompts=cfg.prompts, samples=cfg.group,
                            seed=run.derive(cfg.seed, "rollout", step), resample=cfg.groups == "resample", **sampling)
        facts = describe(fresh)
        out.log({f"rollout/{name}": value for name, value in facts.items()})
        out.log({"rollout/tokens": int(fresh.rollout.mask.sum()) + fresh.resampled_tokens,
                 "rollout/resampled": fresh.resampled, "time/rollout_s": time.perf_counter() - started})
        if unchecked:
            with run.user_errors(SelfCheckFailed):
                out.say(selfcheck(fresh, task, tokenizer.end, functools.partial(score, policy), loss, list(policy.parameters()),
                                  cfg.aggregate, cfg.max_new_tokens, tolerance(device, cfg.dtype) / min(1.0, cfg.temperature)))
            unchecked = False

        # 4. Wait: with --stale, train on a rollout of some steps ago, with the log-probs it had then.
        started = time.perf_counter()
        old_logp = fresh.rollout.logp if on_policy and cfg.kl_in != "reward" else score_all(policy, fresh.rollout)
        queue = out.state.setdefault("queue", [])
        queue.append({"rollout": vars(fresh.rollout), "rewards": fresh.rewards, "old_logp": old_logp})
        if len(queue) <= cfg.stale:
            continue
        ripe = queue.pop(0)
        rollout = Rollout(**{name: x.to(device) for name, x in ripe["rollout"].items()})
        old_logp = ripe["old_logp"].to(device)                                              # [B, T-1]

        # 5. Compare: how much better is each answer than others?
        ref_logp = score_all(reference, rollout) if reference else None
        total, weight = out.state.get("baseline", (0.0, 0.0))
        baseline = total / weight if weight else 0.0
        adv, mask, mean = compare(cfg, rollout, ripe["rewards"], old_logp, ref_logp, baseline)
        if d := cfg.baseline_decay:     # a mean of earlier rewards: no answer has a part in what it is compared with
            out.state["baseline"] = (d * total + (1 - d) * mean, d * weight + (1 - d))

        # 6. Update. Micro-batches only bound memory: the weights are the whole optimizer step's, so they add up exactly.
        totals, demonstration_loss = {}, 0.0
        lr = cfg.lr * run.schedule(step, cfg.steps, cfg.warmup)
        parts = minibatches(cfg.seed, step, len(mask), cfg.epochs, cfg.minibatches)
        for update, minibatch in enumerate(parts, start=step * cfg.updates):
            minibatch = minibatch.to(device)
            weights = torch.zeros(mask.shape, device=device)
            weights[minibatch] = token_weights(mask[minibatch], rollout.prompt_index[minibatch], cfg.aggregate,
                                               cfg.max_new_tokens)
            trained = mask[minibatch].any(-1)
            if cfg.skip:
                trained &= adv[minibatch].squeeze(-1) != 0
            for rows, T in micro_batches(ranks.share(minibatch[trained]), rollout.lengths, room):
                m = mask[rows, : T - 1]
                logp, entropy = score(policy, rollout.tokens[rows, :T], m)
                old = logp.detach() if on_policy else old_logp[rows, : T - 1]
                micro_loss, metrics = loss(logp, old, adv[rows], m, weights[rows, : T - 1], entropy=entropy,
                                           ref_logp=ref_logp[rows, : T - 1] if reference else None)
                micro_loss.backward()
                metrics["train/entropy"] = masked_sum(entropy.detach(), m)
                metrics["train/mismatch_kl"] = masked_sum(kl_k3(rollout.logp[rows, : T - 1], old), m)
                metrics["tokens"] = m.sum()
                add_up(totals, metrics)
            if demonstrations:
                demonstration_loss += demonstrate(update) / cfg.updates
            add_up(totals, {"train/grad_norm_max": optimizer.step(lr, cfg.grad_clip)})

        # 7. Log: sums over tokens become means over tokens.
        totals = of_all_ranks(totals)
        tokens = int(totals.pop("tokens", 0))
        out.log(means(totals, tokens))
        if demonstrations:
            out.log({"train/demonstration_loss": demonstration_loss})
        out.log({"train/lr": lr, "time/update_s": time.perf_counter() - started},
                show={"reward": f"{facts['reward']:.2f}", "worked": f"{facts['worked']:.2f}",
                      "length": f"{facts['length']:.1f}",
                      "entropy": f"{totals.get('train/entropy', 0.0) / max(tokens, 1):.3f}"})

    # 8. What it was good for: held-out problems before and after.
    final = look()
    out.finish(final)
    print(before_and_after(f"{cfg.eval_problems} held-out problems", out.metrics()[0], final))


if __name__ == "__main__":
    main(run.parse(Config))
