"""The relatives of GRPO: each is a row of a table, a choice on five axes. Any flag on the command line overrides its axis.

    advantage   how an answer is compared with others
    ratio       how far the policy has moved since it sampled: of each token, or of the answer (its geometric mean)
    bound       what is done about a ratio outside the band 1 - clip_low .. 1 + clip_high
    aggregate   how much each token counts, see nanorl/ops.py
    groups      what becomes of groups without contrast: keep them, leave them out, or draw others instead
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nanorl.ops import center, leave_one_out, zscore, zscore_batch
from nanorl.run import flag_of


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
                     "Williams 1992; --advantage running_mean takes a running mean of the reward off", {}),
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
    "masked_is": Row("center",        "token",    "mask",     "token_mean",    "all",
                     "verifiers-rl (Prime Intellect), whose ratio is to the sampler's log-probs; masked tokens count in N", {}),
    "scale_rl":  Row("zscore_batch",  "token",    "truncate", "prompt_mean",   "drop",
                     "Khatri et al. 2025, section 4; absent: asynchrony, interruptions, no-positive-resampling, float32 logits",
                     {}),
    "raft":      Row("positive",      "none",     "none",     "token_mean",    "all",
                     "all accepted answers, as Xiong et al. 2025 read it; Dong et al. 2023 keep the best of each group", {}),
}

# The band of each bound, (clip_low, clip_high), where neither the row nor a flag says otherwise. None: not used.
BANDS = {"none": (None, None), "clip": (0.2, 0.2), "truncate": (None, 4.0), "mask": (7 / 8, 7.0)}

# How an answer is compared, rewards [P, G] -> [P, G]. `reward`, `running_mean` and `positive` do not compare it with its group:
# the second takes off a running mean of earlier rewards, the third trains on answers of positive reward alone.
ADVANTAGES = {"reward": lambda rewards: rewards, "running_mean": lambda rewards: rewards, "center": center,
              "leave_one_out": leave_one_out, "zscore": zscore, "zscore_batch": zscore_batch, "positive": torch.ones_like}


class KLTerm(NamedTuple):
    estimator: Literal["k1", "k2", "k3"]
    place: Literal["loss", "weighted", "reward"]    # in the loss, there weighted by the ratio, or in the reward
    follows: str    # the divergence whose gradient the term's expected gradient is


# Every pair of an estimator and a place whose gradient follows a divergence; the other pairs follow none. It does so exactly on
# samples of pi itself (weighted by the ratio: also on older ones), where a token's weight does not depend on its answer's
# length (sequence_sum, constant), and, in the reward, where no z-score divides it.
KL_TERMS = {"k2": KLTerm("k2", "loss", "KL(pi || ref), each prefix held fixed"),
            "k3": KLTerm("k3", "loss", "KL(ref || pi), each prefix held fixed"),
            "k1_weighted": KLTerm("k1", "weighted", "KL(pi || ref), each prefix held fixed"),
            "k3_weighted": KLTerm("k3", "weighted", "KL(pi || ref), each prefix held fixed"),
            "k1_reward": KLTerm("k1", "reward", "KL(pi || ref) of whole answers")}


def table() -> str:
    """The algorithms, for --help."""
    lines = ["{:<11}{:<15}{:<10}{:<10}{:<15}{:<10}{}".format("--algo", *AXES, "and")]
    for name, row in ALGORITHMS.items():
        also = " ".join(f"{flag_of(flag)} {value}" for flag, value in row.also.items())
        lines.append("{:<11}{:<15}{:<10}{:<10}{:<15}{:<10}".format(name, *row[:5]) + f"{also}\n{'':11}{row.note}")
    return "\n".join(lines)


def fill_and_check(cfg: Any) -> None:
    """In a Config's __post_init__: fill the flags that were not given from the algorithm's row, refuse those that contradict
    each other."""
    row = ALGORITHMS[cfg.algo]
    for axis in AXES:
        cfg.default(axis, getattr(row, axis))
    for flag, value in zip(("clip_low", "clip_high"), BANDS[cfg.bound], strict=True):
        cfg.require(value is not None or getattr(cfg, flag) is None, f"bound {flag}", "that bound does not use it")
        if value is not None:
            cfg.default(flag, row.also.get(flag, value) if cfg.bound == row.bound else value)
    cfg.default("overlong", row.also.get("overlong", 0.0))
    if cfg.kl_coef:
        cfg.default("kl", row.also.get("kl", "k3"))
    for flag in ("kl", "refresh_reference"):
        cfg.require(cfg.kl_coef or getattr(cfg, flag) is None, flag, "requires --kl-coef")

    place = KL_TERMS[cfg.kl].place if cfg.kl else None
    cfg.require(cfg.ratio != "none" or cfg.bound == "none", "ratio bound", "there is no ratio to bound; expected --bound none")
    cfg.require(cfg.ratio != "sequence" or cfg.aggregate == "sequence_mean", "ratio aggregate",
                "answers have one ratio each and count alike; expected --aggregate sequence_mean")
    cfg.require(cfg.advantage != "positive" or (place != "reward" and not cfg.overlong), "advantage kl overlong",
                "accepted answers count alike, whatever their reward; expected a --kl in the loss, --overlong 0")
    cfg.require(place != "reward" or "zscore" not in cfg.advantage, "kl advantage",
                "a z-score would undo --kl-coef; expected --advantage reward, running_mean, center or leave_one_out")
    cfg.require(cfg.group > 1 or (cfg.advantage in ("reward", "running_mean", "positive") and cfg.groups == "all"),
                "group advantage groups", "answers are compared within a group; expected a --group of at least 2")
    cfg.require(not cfg.skip or not (cfg.entropy_coef or place in ("loss", "weighted")), "skip kl_coef entropy_coef",
                "a row without an advantage has the gradient of its KL and its entropy; leave --skip out")
    cfg.require(cfg.minibatches <= cfg.prompts * cfg.group, "minibatches",
                f"a rollout has only {cfg.prompts * cfg.group} answers")
    cfg.require(cfg.stale < cfg.steps, "stale", f"with --steps {cfg.steps}, no rollout would ever be old enough to train on")


def announce(cfg: Any, task: str, device: torch.device) -> None:
    """Print which algorithm this is, with its numbers, and what that means for ratios and bounds."""
    print(f"{cfg.algo} on {task}: {cfg.prompts} prompts x {cfg.group} answers a step, on {device.type}.")
    shown = (*AXES, "clip_low", "clip_high", "overlong", "lr")
    print(", ".join(f"{flag} {getattr(cfg, flag)}" for flag in shown if getattr(cfg, flag)) + ".")
    if cfg.on_policy:
        print("One update per rollout: all ratios are 1" + (", and the bound is inert." if cfg.bound != "none" else "."))
    else:
        print(f"{cfg.updates} updates per rollout" + (f", {cfg.stale} steps late" if cfg.stale else "")
              + (". Without a ratio, all but the first treat old samples as their own." if cfg.ratio == "none" else "."))
    if cfg.kl_coef:
        print(f"The KL term {cfg.kl} (weight {cfg.kl_coef}) follows {KL_TERMS[cfg.kl].follows}.")


def less_running_mean(rewards: Tensor, state: dict[str, Any], decay: float = 0.9) -> Tensor:
    """Rewards minus a running mean of those of earlier steps, kept in `state`: no answer has a part in what it is compared
    with.       [P, G] -> [P, G]"""
    total, weight = state.get("running_mean", (0.0, 0.0))
    state["running_mean"] = (decay * total + (1 - decay) * float(rewards.mean()), decay * weight + (1 - decay))
    return rewards - (total / weight if weight else 0.0)


def delayed(queue: list[dict[str, Any]], steps: int, entry: dict[str, Any]) -> dict[str, Any] | None:
    """Put an entry into the queue and take out the one that was put in `steps` steps ago; None where there is none yet."""
    queue.append(entry)
    return queue.pop(0) if len(queue) > steps else None
