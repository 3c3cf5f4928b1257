"""The relatives of GRPO: each is a row of a table, a choice on five axes. Any flag on the command line overrides its axis.

    advantage   how an answer is compared with others
    ratio       how far the policy has moved since it sampled: of each token, or of the answer (its geometric mean)
    bound       what is done about a ratio outside the band 1 - clip_low .. 1 + clip_high
    aggregate   the weight of a token in the loss: tokens, answers or prompts count alike, see token_weights in nanorl/ops.py
    groups      what is done with groups without contrast, whose rewards are all equal: keep, leave out, or draw others
"""

from __future__ import annotations      # so that a script may add to BANDS and ADVANTAGES what its flags then accept

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nanorl.data import response_batch, shuffled_batch
from nanorl.ops import AGGREGATES, center, leave_one_out, masked_sum, token_weights, zscore, zscore_batch
from nanorl.run import Count, Natural, NonNegative, Positive, RolloutConfig, Share, flag_of, ranks
from nanorl.tasks import make_task


class Row(NamedTuple):
    advantage: str
    ratio: str
    bound: str
    aggregate: str
    groups: str
    note: str       # the source, and where this row deviates from it
    also: dict      # further flags that belong to the algorithm


AXES = Row._fields[:5]
ALGORITHMS = {
    #                advantage        ratio       bound       aggregate        groups
    "reinforce": Row("reward",        "none",     "none",     "sequence_sum",  "all",
                     "Williams 1992; --advantage running_mean subtracts a running mean of the reward", {}),
    "rloo":      Row("leave_one_out", "none",     "none",     "sequence_sum",  "all",
                     "Ahmadian et al. 2024; their KL in the reward: --kl-coef 0.03", {"kl": "k1_reward"}),
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
    "sapo":      Row("zscore",        "token",    "soft",     "sequence_mean", "all",
                     "Gao et al. 2025, at their temperatures, 1 for A > 0 and 1.05 for A < 0", {}),
    "masked_is": Row("center",        "token",    "mask",     "token_mean",    "all",
                     "verifiers-rl (Prime Intellect), whose ratio is to the sampler's log-probs; masked tokens count in N", {}),
    "scale_rl":  Row("zscore_batch",  "token",    "truncate", "prompt_mean",   "drop",
                     "Khatri et al. 2025, section 4; absent: asynchrony, interruptions, no-positive-resampling, float32 logits",
                     {}),
    "raft":      Row("positive",      "none",     "none",     "token_mean",    "all",
                     "all accepted answers, as Xiong et al. 2025 read it; Dong et al. 2023 keep the best of each group", {}),
}

# The band of each bound, (clip_low, clip_high), where neither the row nor a flag says otherwise. None: not used.
BANDS = {"none": (None, None), "clip": (0.2, 0.2), "truncate": (None, 4.0), "mask": (7 / 8, 7.0),
         "soft": (None, None)}

# How an answer is compared, rewards [P, G] -> [P, G], `valid` as in ops. Three do not compare it with its group: reward;
# running_mean, whose mean `less_running_mean` has already subtracted; positive, which trains on answers of positive reward.
ADVANTAGES = {"reward": lambda rewards, valid=None: rewards, "running_mean": lambda rewards, valid=None: rewards,
              "center": center, "leave_one_out": leave_one_out, "zscore": zscore, "zscore_batch": zscore_batch,
              "positive": lambda rewards, valid=None: torch.ones_like(rewards)}


class KLTerm(NamedTuple):
    estimator: Literal["k1", "k2", "k3"]
    place: Literal["loss", "weighted", "reward"]    # a term of the loss, such a term times the ratio, or part of the reward
    follows: str    # the divergence whose gradient the term's expected gradient is


# The pairs of an estimator and a place whose expected gradient is that of a divergence; no other pair's is. It is exact on
# samples of pi itself (weighted by the ratio: also on older ones), with weights that do not depend on an answer's length
# (sequence_sum, constant), and, in the reward, without a z-score.
KL_TERMS = {"k2": KLTerm("k2", "loss", "KL(pi || ref), each prefix held fixed"),
            "k3": KLTerm("k3", "loss", "KL(ref || pi), each prefix held fixed"),
            "k1_weighted": KLTerm("k1", "weighted", "KL(pi || ref), each prefix held fixed"),
            "k3_weighted": KLTerm("k3", "weighted", "KL(pi || ref), each prefix held fixed"),
            "k1_reward": KLTerm("k1", "reward", "KL(pi || ref) of whole answers")}


def _table() -> str:
    """The algorithms, for --help."""
    lines = ["{:<11}{:<15}{:<10}{:<10}{:<15}{:<10}{}".format("--algo", *AXES, "and")]
    for name, row in ALGORITHMS.items():
        also = " ".join(f"{flag_of(flag)} {value}" for flag, value in row.also.items())
        lines.append("{:<11}{:<15}{:<10}{:<10}{:<15}{:<10}".format(name, *row[:5]) + f"{also}\n{'':11}{row.note}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(RolloutConfig):
    """The flags of the family."""

    # the algorithm
    table: ClassVar[str] = _table()
    algo: Literal[*ALGORITHMS] = "grpo"    # a row of the table above; the flags that follow override it
    advantage: Literal[*ADVANTAGES] | None = None    # how an answer is compared with others
    ratio: Literal["none", "token", "sequence"] | None = None    # of each token, or of the answer (its geometric mean)
    bound: Literal[*BANDS] | None = None    # what is done about a ratio outside the band
    aggregate: Literal[*AGGREGATES] | None = None    # weight of a token in the loss: tokens, answers or prompts count alike
    groups: Literal["all", "drop", "resample"] | None = None    # groups of equal rewards: keep, leave out, or draw others
    clip_low: Share | None = None    # the band is 1 - clip_low ...
    clip_high: Positive | None = None    # ... to 1 + clip_high
    overlong: Share | None = None    # the last share of max_new_tokens, in which length costs up to 1 of reward
    truncated: Literal["train", "mask"] = "train"    # answers cut at the limit: train on them, or only count them in the mean

    # regularisation
    kl_coef: NonNegative = 0.0    # weight of the KL divergence from the initial policy, the reference
    kl: Literal[*KL_TERMS] | None = None    # its estimator and where it acts (default: k3 in the loss)
    refresh_reference: Count | None = None    # every so many steps the policy becomes the reference (default: never)
    entropy_coef: NonNegative = 0.0    # weight of the entropy bonus
    likelihood_coef: NonNegative = 0.0    # of demonstrations, against forgetting: the task's, or the "response"s of --data

    # updates
    epochs: Count = 1           # passes over a rollout
    minibatches: Count = 1      # optimizer steps per pass
    stale: Natural = 0          # train on rollouts that are this many steps old, so that ratios leave 1 on purpose
    skip: bool = False          # leave out rows whose advantage, hence gradient, is 0; train/ metrics then cover the rest
    selfcheck: bool = True      # check the first rollout, and the gradient of its loss, before training on it

    def __post_init__(self) -> None:
        """Fill the flags that were not given from the algorithm's row, and refuse those that contradict each other."""
        super().__post_init__()
        row = ALGORITHMS[self.algo]
        for axis in AXES:
            self.default(axis, getattr(row, axis))
        for flag, value in zip(("clip_low", "clip_high"), BANDS[self.bound], strict=True):
            self.require(value is not None or getattr(self, flag) is None, f"bound {flag}", "that bound does not use it")
            if value is not None:
                self.default(flag, row.also.get(flag, value) if self.bound == row.bound else value)
        penalty = row.also.get("overlong", 0.0)
        turns = (self.overlong or penalty) and not self.data and make_task(self.task).max_actions > 1
        self.default("overlong", 0.0 if turns else penalty)
        self.require(not (turns and self.overlong), "task overlong",
                     "--max-new-tokens limits one action, not the episode; expected --overlong 0")
        if self.kl_coef:
            self.default("kl", row.also.get("kl", "k3"))
        for flag in ("kl", "refresh_reference"):
            self.require(self.kl_coef or getattr(self, flag) is None, flag, "requires --kl-coef")

        place = KL_TERMS[self.kl].place if self.kl else None
        self.require(self.ratio != "none" or self.bound == "none", "ratio bound",
                     "there is no ratio to bound; expected --bound none")
        self.require(self.ratio != "sequence" or self.aggregate == "sequence_mean", "ratio aggregate",
                     "answers have one ratio each and count alike; expected --aggregate sequence_mean")
        self.require(self.advantage != "positive" or (place != "reward" and not self.overlong), "advantage kl overlong",
                     "accepted answers count alike, whatever their reward; expected a --kl in the loss, --overlong 0")
        self.require(place != "reward" or "zscore" not in self.advantage, "kl advantage",
                     "a z-score would undo --kl-coef; expected --advantage reward, running_mean, center or leave_one_out")
        self.require(self.group > 1 or (self.advantage in ("reward", "running_mean", "positive") and self.groups == "all"),
                     "group advantage groups", "answers are compared within a group; expected a --group of at least 2")
        self.require(not self.skip or not (self.entropy_coef or place in ("loss", "weighted")), "skip kl_coef entropy_coef",
                     "a row without an advantage has the gradient of its KL and its entropy; leave --skip out")
        self.require(self.minibatches <= self.prompts * self.group, "minibatches",
                     f"a rollout has only {self.prompts * self.group} answers")
        self.require(self.stale < self.steps, "stale",
                     f"with --steps {self.steps}, no rollout would ever be old enough to train on")

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.epochs * self.minibatches

    @property
    def on_policy(self) -> bool:
        """One update on each rollout, by the policy that sampled it: every ratio is 1."""
        return self.updates == 1 and not self.stale


def announce(cfg: FamilyConfig, task: str, device: torch.device) -> None:
    """Print which algorithm this is, with its numbers, and what that means for ratios and bounds."""
    print(f"{cfg.algo} on {task}: {cfg.prompts} prompts x {cfg.group} answers a step, on {device.type}.")
    shown = (*AXES, "clip_low", "clip_high", "overlong", "lr", "updates", "stale")
    print(", ".join(f"{flag} {getattr(cfg, flag)}" for flag in shown if getattr(cfg, flag)) + ".")
    if cfg.on_policy:
        print("One update per rollout: all ratios are 1" + (", and the bound is inert." if cfg.bound != "none" else "."))
    elif cfg.ratio == "none":
        print("Without a ratio, samples of an older policy count as the policy's own.")
    if cfg.kl_coef:
        print(f"The KL term {cfg.kl} (weight {cfg.kl_coef}) follows {KL_TERMS[cfg.kl].follows}.")


def less_running_mean(rewards: Tensor, valid: Tensor, state: dict[str, Any], decay: float = 0.9) -> Tensor:
    """Rewards minus a running mean of the valid ones of earlier steps, kept in `state`: no answer is part of its own
    baseline.       [P, G] -> [P, G]"""
    total, weight = state.get("running_mean", (0.0, 0.0))
    if valid.any():
        state["running_mean"] = (decay * total + (1 - decay) * float(rewards[valid].mean()), decay * weight + (1 - decay))
    return rewards - (total / weight if weight else 0.0)


def delayed(state: dict[str, Any], steps: int, entry: Any) -> Any:
    """The entry of so many steps ago, None in the first steps. What waits is in `state`, and so in checkpoints."""
    queue = state.setdefault("queue", [])
    queue.append(entry)
    return queue.pop(0) if len(queue) > steps else None


def demonstrate(cfg: FamilyConfig, score: Callable, demonstrations: tuple[list, list], pad_id: int, update: int,
                device: torch.device) -> float:
    """Add the gradient of the demonstrations' likelihood, P of them per update. Returns their loss, nats per token.

    demonstrations: token ids of prompts and responses; score(tokens, mask) -> (logp, entropy).
    """
    picks, total = shuffled_batch(len(demonstrations[0]), cfg.prompts, update, cfg.seed), 0.0
    tokens, mask = (x.to(device) for x in response_batch(*demonstrations, picks, pad_id))
    weights = token_weights(mask, torch.arange(len(picks), device=device), "token_mean")
    for t, m, w in zip(*(ranks.parts(x, cfg.micro_batch) for x in (tokens, mask, weights)), strict=True):
        nll = -masked_sum(w * score(t, m)[0], m)
        (cfg.likelihood_coef * nll).backward()
        total += nll.detach()
    return sum(ranks.gathered(float(total)))
