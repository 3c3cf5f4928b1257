"""What is going on in a run? Reads its metrics, and says it in plain sentences, the worst first.

    python -m nanorl.doctor runs/grpo
    python -m nanorl.doctor runs/a-0 runs/a-1 runs/b-0 runs/b-1         also: do they differ by more than seeds do?

    broken      a number cannot be what it should be: find the fault before anything else
    warning     the run works, but learns nothing, or something else
    note        often taken for a fault, and none

A finding is a function from a run's log to a sentence with the numbers, or None. What it means and what to try stands under its
name in doctor.toml; docs/reading-a-run.md has a section on each. A metric that was not logged, or is null, finds nothing.
"""

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from nanorl.errors import printable, user_errors_as_sentences
from nanorl.read_log import SURE, TREND, Log, compare, read_log, thirds
from nanorl.run import parse

TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))      # {finding: {means, try, metrics}}

# ---------------------------------------------------------------------------------------------------------------------
# Thresholds, beside those of read_log.py: SURE, TREND, SOLVED
# ---------------------------------------------------------------------------------------------------------------------

MISMATCH = 1e-4         # k3, nats per token: float32 has 1e-13, top-p .9 4e-4, a wrong temperature 2e-3 (experiments/kl.py)
ROUGH = 1e-3            # ... in bfloat16, times the squared entropy: toy and real models have 1e-4 to 2e-4
OFF_ONE = 1.28          # e^.25: with one update per rollout ratios are exactly 1, and no rounding brings them here
NO_CONTRAST = 0.8       # share of groups: four in five are sampled for nothing
CERTAIN = math.log(2)   # nats per answer: fewer than e^.7 = 2 answers are left to a prompt
COPIED = 2.0            # nats per answer: all of 8 samples from 7 answers are the same once in 800,000 groups
DISTINCT = 1.2          # answers per group: four groups in five have one
CUT = 0.1               # share of answers: most groups of 8 have one that is cut, 1 - .9^8 = .57
DRIFT = 1.5             # ratio of lengths
MARGIN = 0.25           # implicit reward: as much between two scores of one policy is no rounding, even in bfloat16
WITH_REFERENCE = ("dpo", "cdpo", "ipo", "kto")
RISE = 0.1              # of a reward or an accuracy: less is rarely what a run is for
FAR = 25.0              # nats per answer: best-of-n gets there with e^25 answers. The runs of docs/ are mostly within 1 to 20
HELD = 0.1              # nats per answer: best-of-2 is already log 2 - 1/2 = .19 away
MOST, SOME = 0.5, 0.2   # shares of tokens
WEIGHT = 10.0           # ratio: one token then counts as much as ten fresh ones
FORGOTTEN = 0.5         # nats per token of text: default runs of GRPO stay within .05
RUINED = 0.1            # of the first step's reward: no noise takes nine tenths of it
EXPLAINED = 0.1         # share of the returns' variance
OVERFIT = 0.02          # of a held-out loss: more than one evaluation differs from the next once it is flat

# ---------------------------------------------------------------------------------------------------------------------
# Broken
# ---------------------------------------------------------------------------------------------------------------------


def sampler_and_scorer_disagree(log: Log) -> str | None:
    precision, device = map(log.flags.get, ("dtype", "device"))
    rough = precision == "bfloat16" or (precision == "auto" and device != "cpu")
    bound = max(MISMATCH, ROUGH * log.start("train/entropy") ** 2 if rough else 0.0)
    if (kl := log.start("train/mismatch_kl")) > bound:
        return (f"Early in the run, the KL between the sampler's and the scorer's log-probs is {kl:.2g} nats per token; of one "
                f"policy, it is 1e-13 in float32, and below {bound:.1g} in bfloat16.")


def ratios_are_not_one(log: Log) -> str | None:
    low, high = log.end("train/ratio_min", 1.0), log.end("train/ratio_max", 1.0)
    if log.one_update() and (high > OFF_ONE or low < 1 / OFF_ONE):
        return f"Ratios are from {low:.3g} to {high:.3g}; with one update per rollout, all of them are 1."


def no_gradient(log: Log) -> str | None:
    norms = log.values("train/grad_norm_max") or log.values("train/grad_norm")
    nothing_to_learn = log.no_contrast() == (1, 1) or not any(log.values("train/active") or [1])
    if len(norms) >= TREND and not any(norms) and not nothing_to_learn:
        return f"The gradient is exactly 0 in all of {len(norms)} steps, although there was something to learn."


def not_at_the_reference(log: Log) -> str | None:
    margins = log.values("train/margin")
    if margins and log.lines[0]["step"] == 0 and log.flags.get("loss") in WITH_REFERENCE and abs(margins[0]) > MARGIN:
        return f"In step 0 the margin is {margins[0]:.3g}; the policy is still the reference, so that it is 0."


def copied_answers(log: Log) -> str | None:
    nats = log.start("train/entropy") * log.start("rollout/length")
    if log.start("rollout/distinct") == 1 and nats > COPIED:
        return f"At first, all answers of a group are the same, in every group, at an entropy of {nats:.1f} nats per answer."


# ---------------------------------------------------------------------------------------------------------------------
# Warnings
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate_too_large(log: Log) -> str | None:
    (name, sign), trend, accuracy = log.goal(), log.progress(), log.accuracy()
    stories, entropy, rewards = map(log.values, ("eval/story_loss", "train/entropy", "rollout/reward"))
    last = log.end("rollout/reward")
    if accuracy and accuracy.before - accuracy.after > max(SURE * accuracy.error, RISE):
        found = f"Held-out accuracy fell from {accuracy.before:.3f} to {accuracy.after:.3f}"
    elif trend and trend.z <= -SURE:
        found = f"{name} went from {trend.first:.3g} to {trend.last:.3g}, which is worse by {-trend.z:.1f} standard errors"
    elif rewards and last < rewards[0] / 2:         # the first step may be enough to ruin a policy
        found = f"The reward went from {rewards[0]:.3f} in the first step to {last:.3f} at the end"
    else:
        return None
    if len(stories) > 1 and stories[-1] - stories[0] > FORGOTTEN:
        return f"{found}, and the loss on held-out stories rose from {stories[0]:.2f} to {stories[-1]:.2f} nats per token."
    if entropy and log.end("train/entropy") > 2 * entropy[0]:
        return f"{found}, and the entropy rose from {entropy[0]:.2g} to {log.end('train/entropy'):.2g} nats per token."
    return f"{found}." if sign < 0 or (rewards and rewards[0] >= RISE and last < RUINED * rewards[0]) else None


def too_hard(log: Log) -> str | None:
    (_, share), rates, reward = log.no_contrast() or (0.0, 0.0), log.pass_rates(), log.trend("rollout/reward")
    improved = not rates and reward and reward.rises()          # perhaps up to the highest reward there is
    if share < NO_CONTRAST or improved or (rates and rates[1] > 0.5) or learning_rate_too_large(log):
        return None
    found = f"In the last third of the steps, {share:.0%} of the groups had no contrast"
    if rates and 0.001 < (p := rates[1]) < 0.2:
        enough = math.ceil(math.log(0.5) / math.log(1 - p))
        return f"{found}, at a mean reward of {p:.3f}. --group {enough} would put a right answer into half of the groups."
    return f"{found}, at a mean reward of {rates[1]:.2f}." if rates else f"{found}."


def too_easy(log: Log) -> str | None:
    (rate, _), (share, _) = log.pass_rates() or (0.0, 0.0), log.no_contrast() or (0.0, 0.0)
    if share >= NO_CONTRAST and rate > 0.5:
        return f"From the start, the mean reward was {rate:.2f}, and {share:.0%} of the groups had no contrast."


def learned_reward_is_hacked(log: Log) -> str | None:
    learned, hidden = log.trend("rollout/learned_reward"), log.values("rollout/hidden_reward")
    if learned and learned.rises() and len(hidden) >= TREND:
        first, middle, last = thirds(hidden)
        fall = compare(max(first, middle, key=fmean), last)
        if fall.z <= -SURE:
            return (f"The learned reward rose from {learned.first:.2f} to {learned.last:.2f}; the hidden reward fell from "
                    f"{fall.first:.2f} to {fall.last:.2f} in the last third of the steps, by {-fall.z:.1f} standard errors.")


def only_the_format_is_learned(log: Log) -> str | None:
    accuracy, reward, worked = log.accuracy(), log.trend("rollout/reward"), log.trend("rollout/worked")
    names = {name for line in log.lines for name in line if name.startswith("rollout/part_")}
    parts = {name.removeprefix("rollout/part_"): trend for name in sorted(names) if (trend := log.trend(name))}
    risen, flat = (" and ".join(name for name, trend in parts.items() if trend.rises() == rises) for rises in (True, False))
    if risen and flat and (not accuracy or accuracy.rises_less_than(RISE)):
        return f"Of the parts of the reward, {risen} rose, and {flat} did not{f'; {accuracy}' if accuracy else ''}."
    if worked and reward and not parts and worked.rises(2 * RISE) and not reward.rises():
        return (f"The share of answers that are worked out rose from {worked.first:.2f} to {worked.last:.2f}, but the reward "
                f"went from {reward.first:.3f} to {reward.last:.3f}.")


def held_out_does_not_follow(log: Log) -> str | None:
    reward, accuracy = log.trend("rollout/reward"), log.accuracy()
    if reward and accuracy and reward.rises(RISE) and accuracy.rises_less_than(min((reward.last - reward.first) / 2, RISE)):
        return f"The reward in training rose from {reward.first:.3f} to {reward.last:.3f}; {accuracy}."


def overfitting(log: Log) -> str | None:
    train = log.trend("train/loss")
    for name in ("eval/pair_loss", "eval/response_loss", "eval/text_loss"):
        values = log.values(name)
        if train and values and train.z <= -SURE and values[-1] > (1 + OVERFIT) * min(values) > 0:
            return (f"{name} has risen again, from {min(values):.3f} to {values[-1]:.3f}, while the training loss fell from "
                    f"{train.first:.3f} to {train.last:.3f}.")


def entropy_collapse(log: Log) -> str | None:
    if len(log.answer_entropy()) < TREND or log.solved():
        return None
    first, _, last = (fmean(x for _, x in part) for part in thirds(log.answer_entropy()))
    if last < CERTAIN < first:
        fallen = next(step for step, x in log.answer_entropy() if x < CERTAIN)
        return (f"The entropy fell below {CERTAIN:.1f} nats per answer in step {fallen}; it went from {first:.2g} in the first "
                f"third of the steps to {last:.2g} in the last, so that {math.exp(last):.1f} answers are left to a prompt.")


def one_answer_per_group(log: Log) -> str | None:
    distinct, rates = log.end("rollout/distinct"), log.pass_rates()
    if log.no_contrast() and 0 < distinct <= DISTINCT and not log.solved():
        reward = f", at a mean reward of {rates[1]:.2f}" if rates else ""
        return f"In the last third of the steps, a group has {distinct:.2f} different answers{reward}."


def answers_are_cut(log: Log) -> str | None:
    share = log.end("rollout/truncated") if log.values("rollout/truncated") else (log.values("eval/truncated") or [0.0])[-1]
    if share >= CUT:
        where = " or at the limit of an episode" if log.values("rollout/turns") else ""
        return f"At the end, {share:.0%} of the answers are cut at --max-new-tokens {log.flag('max_new_tokens'):.0f}{where}."


def length_drift(log: Log) -> str | None:
    name, kind = ("length_correct", "right answers") if log.values("rollout/length_correct") else ("length", "answers")
    lengths, end = log.values(f"rollout/{name}"), log.end(f"rollout/{name}")
    start = fmean(lengths[:3]) if lengths else 0.0              # it may drift within a few steps, and is hardly noisy
    if start > 0 and end > 0 and not 1 / DRIFT < end / start < DRIFT:
        return f"On average, {kind} went from {start:.1f} tokens in the first steps to {end:.1f} at the end."


def kl_runs_away(log: Log) -> str | None:
    if (log.answer_kl() or 0.0) > FAR:
        return f"At the end, the policy is {log.answer_kl():.0f} nats per answer away from the reference."


def the_leash_holds(log: Log) -> str | None:
    kl, progress, weight = log.answer_kl(), log.progress(), log.flag("kl_coef")
    if weight > 0 and kl is not None and kl < HELD and progress and progress.z < SURE and not log.solved():
        return (f"With --kl-coef {weight:g}, the policy ends {kl:.2g} nats per answer away from the reference, and "
                f"{log.goal()[0]} goes from {progress.first:.3f} to {progress.last:.3f}.")


def the_bound_binds(log: Log) -> str | None:
    if log.bounded() >= MOST:
        return f"In the last third of the steps, the bound holds back {log.bounded():.0%} of the tokens."


def stale_data(log: Log) -> str | None:
    stale, high, uncorrected = log.flag("stale"), log.end("train/ratio_max"), log.flags.get("ratio") == "none"
    if stale and (uncorrected or log.bounded() >= SOME or high >= WEIGHT):
        return (f"A rollout is {stale:.0f} steps old when it is trained on; " + ("no ratio corrects for that." if uncorrected
                else f"ratios are up to {high:.3g}, and the bound holds back {log.bounded():.0%} of the tokens."))


def critic_explains_nothing(log: Log) -> str | None:
    share = log.end("train/explained_variance")
    if len(log.values("train/explained_variance")) >= TREND and share < EXPLAINED and not log.solved():
        return f"At the end, the critic's explained variance is {share:.2g}; 1 is perfect, and 0 is what a constant explains."


def stuck(log: Log) -> bool:
    """The goal does not improve, there are gradients, and no finding that is more to the point says why."""
    causes = (learning_rate_too_large, too_hard, too_easy, only_the_format_is_learned, the_leash_holds, copied_answers)
    progress, norms = log.progress(), log.values("train/grad_norm_max") or log.values("train/grad_norm")
    return bool(progress and progress.z < SURE and any(norms) and not log.solved() and not any(f(log) for f in causes))


def learning_rate_too_small(log: Log) -> str | None:
    entropy, length = log.trend("train/entropy"), log.trend("rollout/length")
    if entropy and length and abs(entropy.z) < SURE and abs(length.z) < SURE and stuck(log):
        return (f"At --lr {log.flag('lr'):g}, {log.goal()[0]} does not improve and the policy stays as it was: entropy "
                f"{entropy.first:.3g} and {entropy.last:.3g}, length {length.first:.1f} and {length.last:.1f}.")


def no_progress(log: Log) -> str | None:
    if stuck(log) and not learning_rate_too_small(log):
        trend = log.progress()
        error = abs((trend.last - trend.first) / trend.z) if trend.z else 0.0
        return (f"{log.goal()[0]} is {trend.first:.3f} in the first third of the steps and {trend.last:.3f} in the last; the "
                f"standard error of the difference is {error:.2g}.")


# ---------------------------------------------------------------------------------------------------------------------
# Notes
# ---------------------------------------------------------------------------------------------------------------------


def one_update(log: Log) -> str | None:
    if log.one_update() and set(log.values("train/ratio_max") + log.values("train/ratio_min")) == {1.0}:
        return "All ratios are exactly 1, and the bound holds nothing back, because there is one update per rollout."


def loss_is_zero(log: Log) -> str | None:
    losses, gradients = log.values("train/loss"), log.values("train/grad_norm") + log.values("train/grad_norm_max")
    advantage, aggregate, bound, cut = map(log.flags.get, ("advantage", "aggregate", "bound", "truncated"))
    known = (log.one_update() and (advantage, aggregate) == ("zscore", "sequence_mean") and bound in ("clip", "mask")
             and cut != "mask" and not any(map(log.flag, ("kl_coef", "entropy_coef", "likelihood_coef"))))
    zero = max(map(abs, losses)) < 1e-6 if losses else known
    if zero and any(gradients) and log.values("rollout/reward"):
        return ("The loss is 0 in every step" + ("" if losses else ", if it is still the one of train_grpo.py")
                + ", because the advantages of a group sum to 0; its gradient is not 0.")


def solved(log: Log) -> str | None:
    share = (log.no_contrast() or (0.0, 0.0))[1]
    if log.solved() and share >= 0.5 and not too_easy(log):
        return f"At the end, the mean reward is {log.pass_rates()[1]:.2f}; {share:.0%} of the groups have no contrast."


def chosen_log_prob_falls(log: Log) -> str | None:
    chosen, rejected = log.trend("train/chosen_logp"), log.trend("train/rejected_logp")
    if chosen and rejected and chosen.z <= -SURE:
        return (f"The log-prob of chosen responses fell from {chosen.first:.1f} to {chosen.last:.1f} nats; that of rejected "
                f"ones went from {rejected.first:.1f} to {rejected.last:.1f}.")


def evaluation_too_small(log: Log) -> str | None:
    accuracy, reward = log.accuracy(), log.trend("rollout/reward")
    if not accuracy or not reward or not log.pass_rates() or abs(reward.z) < SURE:
        return None
    change, noise = abs(reward.last - reward.first), 2 * accuracy.error
    if max(change, abs(accuracy.after - accuracy.before)) < noise:
        enough = math.ceil(accuracy.problems * (noise / change) ** 2)
        return f"In training, the reward changed by {change:.3f}, but {accuracy}; to see as much takes {enough:,} problems."


FINDINGS = {        # by level, the worst first
    "broken": (sampler_and_scorer_disagree, ratios_are_not_one, not_at_the_reference, no_gradient, copied_answers),
    "warning": (learning_rate_too_large, learned_reward_is_hacked, held_out_does_not_follow, only_the_format_is_learned,
                one_answer_per_group, too_hard, too_easy, entropy_collapse, kl_runs_away, the_leash_holds, the_bound_binds,
                stale_data, critic_explains_nothing, answers_are_cut, length_drift, overfitting, learning_rate_too_small,
                no_progress),
    "note": (evaluation_too_small, chosen_log_prob_falls, solved, one_update, loss_is_zero)}

# ---------------------------------------------------------------------------------------------------------------------
# Several runs
# ---------------------------------------------------------------------------------------------------------------------

ALIKE = {"seed", "out", "resume", "quiet", "device", "micro_batch", "save_every", "eval_every"}     # however they are set


def seeds_differ_more(logs: list[Log]) -> str | None:
    """Of runs that differ in a flag: is the difference between the best and the worst setting more than that of seeds?"""
    settings: dict[str, list[float]] = {}
    for log in logs:
        ends = log.values("eval/accuracy_sampled") or log.values("eval/reward") or log.values("eval/hidden_reward")
        flags = json.dumps({flag: x for flag, x in log.flags.items() if flag not in ALIKE}, sort_keys=True)
        settings.setdefault(flags, []).extend(ends[-1:])
    worst, *_, best = sorted(filter(None, settings.values()), key=fmean) * 2 or [[], []]
    if worst == best:
        return None
    found = f"The best setting ends at {fmean(best):.3f} (seeds: {len(best)}), the worst at {fmean(worst):.3f} ({len(worst)})"
    if len(best) == 1 or len(worst) == 1:
        return f"{found}. By how much seeds differ is not known."
    error = math.hypot(stdev(best) / math.sqrt(len(best)), stdev(worst) / math.sqrt(len(worst)))
    if fmean(best) - fmean(worst) < SURE * error:
        return f"{found}; the standard error of the difference, from the spread of seeds, is {error:.3f}."


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def diagnose(log: Log) -> list[tuple[str, str, str]]:
    """(level, name, sentence) of all that is found in a run, the worst first. For warnings, a few steps are too early."""
    return [(level, function.__name__.replace("_", "-"), sentence) for level, functions in FINDINGS.items()
            for function in functions if (level != "warning" or log.steps() >= TREND) and (sentence := function(log))]


def worst_sentence(run: str) -> str:
    """The worst that is found in a run; "" if that is a note, or nothing."""
    level, _, sentence = next(iter(diagnose(read_log(Path(run)))), ("note", "", ""))
    return "" if level == "note" else printable(f"{level}: {sentence} More: python -m nanorl.doctor {run}")


def describe(level: str, name: str, sentence: str) -> str:
    text = TEXTS[name]
    return printable(f"{level}: {name.replace('-', ' ')}\n  Found: {sentence}\n  It means: {text['means']}\n"
                     f"  Try: {text['try']}\n  More: docs/reading-a-run.md#{name}; metrics {', '.join(text['metrics'])}\n")


@dataclass(frozen=True, kw_only=True)
class Config:
    runs: tuple[str, ...]       # directories of runs


@user_errors_as_sentences
def main(argv: list[str] | None = None) -> None:
    logs = {run: read_log(Path(run)) for run in parse(Config, argv).runs}
    for run, log in logs.items():
        found = diagnose(log)
        print(printable(f"{run}, after {log.steps()} steps:\n"))
        for each in found:
            print(describe(*each))
        if log.steps() < TREND:
            print(f"Too early to tell{' more' if found else ''}: a trend needs {TREND} steps.\n")
        elif not found:
            print("Nothing found.\n")
    if sentence := seeds_differ_more(list(logs.values())):
        print(describe("warning", "seeds-differ-more", sentence))


if __name__ == "__main__":
    main()
