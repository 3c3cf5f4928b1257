"""The doctor: a planted disease is found by its name, a healthy run is called healthy, and no log makes it fail."""

import json
import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import ROOT

from nanorl import doctor
from nanorl.read_log import SURE, TREND, Log, compare, standard_error

NAMES = {function.__name__.replace("_", "-"): level for level, functions in doctor.FINDINGS.items() for function in functions}
STEPS = 30
GRPO = {"lr": 1e-4, "epochs": 1, "minibatches": 1, "stale": 0, "advantage": "zscore", "aggregate": "sequence_mean",
        "ratio": "token", "bound": "clip", "prompts": 32, "group": 8, "eval_problems": 500, "max_new_tokens": 80,
        "init": "nowhere"}


def log(flags=(), evals=(), seed=0, steps=STEPS, noise=0.02, **metrics):
    """A run whose metrics go from one value to another in a straight line, with noise relative to the larger; evals: first and
    last. A double underscore stands for the slash."""
    random, lines = Random(seed), []
    for step in range(steps):
        line = {"step": step}
        for name, (first, last) in metrics.items():
            x = first + (last - first) * step / max(steps - 1, 1)
            line[name.replace("__", "/")] = x + noise * max(abs(first), abs(last)) * random.uniform(-1, 1) * (first != last)
            if "learned" not in name and min(first, last) >= 0 and max(first, last) <= 1:       # a share
                line[name.replace("__", "/")] = min(max(line[name.replace("__", "/")], 0.0), 1.0)
        lines.append(line)
    lines.append({"step": steps})
    for name, (first, last) in dict(evals).items():
        lines[0][f"eval/{name}"], lines[-1][f"eval/{name}"] = first, last
    return Log(lines, GRPO | dict(flags))


def healthy(flags=(), evals=(), **changes):
    """GRPO that learns, as by default, with some of its metrics changed."""
    usual = dict(rollout__reward=(0.3, 0.8), rollout__no_contrast=(0.05, 0.3), rollout__distinct=(6.5, 3.0),
                 rollout__length=(20.0, 25.0), rollout__truncated=(0, 0), train__entropy=(0.25, 0.1), train__ratio_max=(1, 1),
                 train__ratio_min=(1, 1), train__mismatch_kl=(1e-13, 3e-14), train__grad_norm_max=(0.5, 0.3))
    return log(flags, {"accuracy_sampled": (0.3, 0.8), "story_loss": (0.9, 0.88)} | dict(evals), **usual | changes)


def names(log):
    return [name for _, name, _ in doctor.diagnose(log)]


FLAT, TWO = {"rollout__reward": (0.3, 0.3001)}, {"minibatches": 2}
PLANTED = {     # what a run has, if it has this: two of each, a clear one and one near the threshold's other side's
    "sampler-and-scorer-disagree": (dict(train__mismatch_kl=(4e-4, 1e-5)), dict(train__mismatch_kl=(0.04, 0.02))),
    "ratios-are-not-one": (dict(train__ratio_max=(1.4, 1.5)), dict(train__ratio_min=(0.5, 0.6))),
    "not-at-the-reference": (dict(flags={"loss": "dpo"}, train__margin=(-4.1, 1)),
                             dict(flags={"loss": "ipo"}, train__margin=(0.3, 1))),
    "no-gradient": (dict(train__grad_norm_max=(0, 0)), dict(train__grad_norm_max=(0, 0), **FLAT)),
    "copied-answers": (dict(rollout__distinct=(1, 1)), dict(rollout__distinct=(1, 1), train__entropy=(0.15, 0.15))),
    "learning-rate-too-large": (dict(evals={"accuracy_sampled": (0.3, 0.0), "story_loss": (0.9, 2.2)},
                                     rollout__reward=(0.1, 0)),
                                dict(evals={"accuracy_sampled": (0.6, 0.3)}, train__entropy=(0.2, 1.5),
                                     rollout__reward=(0.6, 0.3))),
    "too-hard": (dict(rollout__reward=(0, 0), rollout__no_contrast=(1, 1)),
                 dict(rollout__reward=(0.02, 0.021), rollout__no_contrast=(0.86, 0.85))),
    "too-easy": (dict(rollout__reward=(0.98, 0.99), rollout__no_contrast=(0.9, 0.95)),
                 dict(rollout__reward=(0.96, 0.965), rollout__no_contrast=(0.83, 0.84))),
    "learned-reward-is-hacked": (dict(rollout__learned_reward=(0, 2.2), rollout__hidden_reward=(4.5, 3.0)),
                                 dict(rollout__learned_reward=(-1, 1), rollout__hidden_reward=(4.5, 4.0))),
    "held-out-does-not-follow": (dict(evals={"accuracy_sampled": (0.3, 0.3)}), dict(evals={"accuracy_sampled": (0.3, 0.33)})),
    "only-the-format-is-learned": (dict(rollout__part_form=(0.1, 0.9), rollout__part_right=(0.1, 0.1),
                                        evals={"accuracy_sampled": (0.3, 0.3)}),
                                   dict(rollout__worked=(0.1, 0.9), **FLAT)),
    "entropy-collapse": (dict(train__entropy=(0.2, -0.05), **FLAT), dict(train__entropy=(0.1, 0.001))),
    "one-answer-per-group": (dict(rollout__distinct=(3, 0.5), train__entropy=(0.01, 0.01)),
                             dict(rollout__distinct=(1.05, 1.05), train__entropy=(0.01, 0.01))),
    "answers-are-cut": (dict(rollout__truncated=(0.0, 0.6)), dict(rollout__truncated=(0.12, 0.13))),
    "length-drift": (dict(rollout__length=(20, 60)), dict(rollout__length_correct=(40, 15))),
    "kl-runs-away": (dict(flags={"kl_coef": 0.01}, train__kl=(0.1, 3)), dict(evals={"answer_kl": (0, 30)})),
    "the-leash-holds": (dict(flags={"kl_coef": 10}, train__kl=(1e-5, 2e-5), **FLAT),
                        dict(flags={"kl_coef": 1}, evals={"answer_kl": (0, 0.05)}, **FLAT)),
    "the-bound-binds": (dict(flags=TWO, train__clipped_low=(0.3, 0.3), train__clipped_high=(0.3, 0.4)),
                        dict(flags=TWO, train__masked=(0.1, 0.7))),
    "stale-data": (dict(flags={"stale": 4, "ratio": "none"}), dict(flags={"stale": 4}, train__capped=(0.2, 0.3))),
    "critic-explains-nothing": (dict(flags={"critic": "separate"}, train__explained_variance=(0, 0.05)),
                                dict(flags={"critic": "shared"}, train__explained_variance=(-2, -0.5))),
    "overfitting": (dict(train__loss=(0.7, 0.1), evals={"pair_loss": (0.6, 0.9)}),
                    dict(train__loss=(2.0, 1.0), evals={"response_loss": (1.5, 1.56)})),
    "learning-rate-too-small": (dict(train__entropy=(0.25, 0.2501), rollout__length=(20, 20.01), **FLAT),
                                dict(train__entropy=(1.0, 1.001), rollout__length=(9, 9), rollout__reward=(0.5, 0.501))),
    "no-progress": (FLAT, dict(rollout__reward=(0.5, 0.501), rollout__no_contrast=(0.5, 0.5))),
    "evaluation-too-small": (dict(flags={"eval_problems": 10}, evals={"accuracy_sampled": (0.5, 0.6)},
                                  rollout__reward=(0.5, 0.65)),
                             dict(flags={"eval_problems": 20}, evals={"accuracy_sampled": (0.5, 0.5)},
                                  rollout__reward=(0.5, 0.75))),
    "chosen-log-prob-falls": (dict(train__chosen_logp=(-40, -60), train__rejected_logp=(-40, -90)),
                              dict(train__chosen_logp=(-40, -42), train__rejected_logp=(-40, -50))),
    "solved": (dict(rollout__reward=(0.4, 1), rollout__no_contrast=(0.1, 1)),
               dict(rollout__reward=(0.8, 1), rollout__no_contrast=(0.3, 0.8), train__entropy=(0.1, 0.001))),
    "one-update": ({}, dict(train__clipped_low=(0, 0))),
    "loss-is-zero": ({}, dict(flags={"advantage": "center"}, train__loss=(1e-9, -1e-9), train__grad_norm=(0.1, 0.2)))}


def test_every_finding_is_planted():
    assert PLANTED.keys() == NAMES.keys()


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in PLANTED.items() for case in cases])
def test_a_planted_disease_is_found_by_its_name(name, case):
    found = doctor.diagnose(healthy(**case))
    assert (NAMES[name], name) in [each[:2] for each in found]
    if NAMES[name] != "broken":         # and a fault that is not there is not reported
        assert not [each for each in found if each[0] == "broken"]


@pytest.mark.parametrize("flags, found", [({"dtype": "bfloat16"}, False), ({"dtype": "auto", "device": "cuda"}, False),
                                          ({"dtype": "float32"}, True), ({"dtype": "auto", "device": "cpu"}, True)])
def test_what_bfloat16_rounds_off_of_a_policy_that_is_not_sure_is_no_fault(flags, found):
    """SmolLM2, at 2.8 nats, has ten times what float32 is allowed; a wrong temperature has more."""
    rounded, colder = (healthy(flags, train__entropy=(2.8, 2.6), train__mismatch_kl=(kl, kl)) for kl in (1.1e-3, 0.1))
    assert ("sampler-and-scorer-disagree" in names(rounded)) == found and "sampler-and-scorer-disagree" in names(colder)


def test_a_healthy_run_has_notes_only():
    assert names(healthy()) == ["one-update", "loss-is-zero"]
    assert names(healthy({"minibatches": 4}, train__ratio_max=(1.1, 1.3), train__clipped_low=(0.01, 0.02))) == []


@pytest.mark.parametrize("name, last_kept", [(name, case) for name, case in {
    "sampler-and-scorer-disagree": dict(train__mismatch_kl=(9e-5, 9e-5)),
    "ratios-are-not-one": dict(train__ratio_max=(1.2, 1.2)),
    "not-at-the-reference": dict(flags={"loss": "dpo"}, train__margin=(0.2, 1)),
    "copied-answers": dict(rollout__distinct=(1, 1), train__entropy=(0.08, 0.07)),
    "too-hard": dict(rollout__reward=(0.1, 0.1), rollout__no_contrast=(0.79, 0.79)),
    "no-progress": dict(rollout__reward=(0.6, 0.601), rollout__no_contrast=(0.9, 0.9), train__grad_norm_max=(0, 0)),
    "too-easy": dict(rollout__reward=(0.9, 0.95), rollout__no_contrast=(0.79, 0.79)),
    "one-answer-per-group": dict(rollout__distinct=(1.21, 1.21)), "answers-are-cut": dict(rollout__truncated=(0.09, 0.09)),
    "length-drift": dict(rollout__length=(20, 29)), "kl-runs-away": dict(evals={"answer_kl": (0, 24.9)}),
    "the-leash-holds": dict(flags={"kl_coef": 1}, evals={"answer_kl": (0, 0.11)}, **FLAT),
    "the-bound-binds": dict(train__masked=(0.49, 0.49)), "stale-data": dict(flags={"stale": 2}, train__capped=(0.19, 0.19)),
    "critic-explains-nothing": dict(flags={"critic": "shared"}, train__explained_variance=(0.11, 0.11)),
    "overfitting": dict(train__loss=(0.7, 0.1), evals={"pair_loss": (1.0, 1.019)}),
    "entropy-collapse": dict(rollout__length=(10, 10), train__entropy=(0.2, 0.07), **FLAT),
    "learning-rate-too-large": dict(evals={"accuracy_sampled": (0.3, 0.21), "story_loss": (0.9, 2.2)}, **FLAT),
    "held-out-does-not-follow": dict(evals={"accuracy_sampled": (0.3, 0.35)}),
    "learning-rate-too-small": dict(train__entropy=(0.25, 0.2501), **FLAT),                     # its answers get longer
    "loss-is-zero": dict(train__grad_norm_max=(0, 0), **FLAT),
    "solved": dict(rollout__reward=(0.8, 0.9), rollout__no_contrast=(0.3, 0.7))}.items()])
def test_this_side_of_a_threshold_nothing_is_found(name, last_kept):
    assert name not in names(healthy(**last_kept))


@pytest.mark.parametrize("flag, value", [("bound", "soft"), ("bound", "truncate"), ("bound", "none"), ("truncated", "mask"),
                                         ("kl_coef", 0.1), ("entropy_coef", 0.01), ("likelihood_coef", 0.1)])
def test_where_a_loss_is_not_known_to_be_zero_nothing_is_said(flag, value):
    assert "loss-is-zero" not in names(healthy({flag: value}))


@pytest.mark.parametrize("flags", [{"critic": "separate"}, {"teacher": "runs/grpo"}, {"advantage": "reward"}])
def test_contrast_matters_only_where_the_answers_of_a_group_are_compared(flags):
    assert not {"too-hard", "one-answer-per-group"} & set(names(healthy(flags, rollout__no_contrast=(1, 1),
                                                                        rollout__distinct=(1, 1), train__entropy=(0.01, 0.01))))


def test_resampled_groups_count_as_groups_without_contrast():
    hard = dict(rollout__reward=(0.1, 0.1), rollout__no_contrast=(0, 0), rollout__resampled=(288, 288))
    [sentence] = [sentence for _, name, sentence in doctor.diagnose(healthy(**hard)) if name == "too-hard"]
    assert "90%" in sentence and "--group 7 " in sentence           # 1 - .9^7 = .52


def test_trends_are_rare_where_there_are_none():
    """Of two times five values of pure noise, one pair in fifty differs by SURE."""
    random = Random(0)
    sure = [abs(compare(*([random.gauss(0, 1) for _ in range(5)] for _ in range(2))).z) >= SURE for _ in range(2000)]
    assert 0.01 < sum(sure) / len(sure) < 0.03


def test_the_standard_error_of_an_accuracy_is_that_of_a_binomial_and_not_0_at_the_ends():
    assert standard_error(0.5, 100) == pytest.approx(0.05) and standard_error(0.2, 10_000) == pytest.approx(0.004, rel=1e-3)
    assert standard_error(0.0, 100) == pytest.approx(standard_error(1.0, 100)) and standard_error(0.0, 100) > 0


@pytest.mark.parametrize("steps", range(1, TREND))
def test_a_few_steps_are_too_early_for_a_warning(steps):
    assert not [f for f in doctor.diagnose(log(steps=steps, rollout__reward=(0, 0), rollout__no_contrast=(1, 1),
                                               train__entropy=(0, 0), rollout__truncated=(1, 1))) if f[0] != "note"]


WEIRD = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.none(), max_size=1),
                  st.floats(0, 1), st.sampled_from([0, 1, -1, 1e29, -1e29, 10**400, 1e-300]))
LOGGED = sorted({name for cases in PLANTED.values() for case in cases for name in case if "__" in name}
                | {"train__divergence", "eval__accuracy_sampled", "eval__answer_kl", "eval__pair_loss", "rollout__resampled",
                   "train__active", "eval__truncated", "eval__story_loss", "train__answer_kl"})
FLAGS = (*GRPO, "kl_coef", "critic", "teacher", "task")


@given(st.lists(st.dictionaries(st.sampled_from([name.replace("__", "/") for name in LOGGED]), WEIRD), max_size=16),
       st.dictionaries(st.sampled_from(FLAGS), WEIRD), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 20))
def test_no_log_makes_it_fail(lines, flags, value, more):
    """Whatever a script of one's own has logged."""
    usual = [{"step": i, **{name.replace("__", "/"): value for name in LOGGED}} for i in range(more)]
    log = Log(usual + [{"step": more + i, **line} for i, line in enumerate(lines)], flags)
    for each in doctor.diagnose(log):
        assert doctor.describe(*each)


def write(folder, log):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log.lines))
    (folder / "config.json").write_text(json.dumps(log.flags))
    return str(folder)


def test_a_policy_that_the_first_step_ruined_was_not_given_too_hard_a_task():
    lines = [{"step": i, "rollout/reward": 0.6 * (i == 0), "rollout/no_contrast": float(i > 0), "train/entropy": 0.2}
             for i in range(20)]
    assert names(Log(lines, {})) == ["learning-rate-too-large"]
    assert names(Log([line | {"rollout/reward": 0.0} for line in lines], {})) == ["too-hard"]


def test_the_report_has_the_worst_first_and_each_finding_with_its_advice(tmp_path, capsys):
    run = write(tmp_path / "run", healthy(train__mismatch_kl=(0.01, 0.01), rollout__truncated=(0.5, 0.5)))
    doctor.main([run])
    said = capsys.readouterr().out
    order = [said.index(f"{level}: {name}") for level, name in (("broken", "sampler and scorer disagree"),
             ("warning", "answers are cut"), ("note", "one update"))]
    assert order == sorted(order) and said.count("  Try: ") == said.count("  Found: ") == 4
    assert doctor.worst_sentence(run).startswith("broken: Early in the run")


@pytest.mark.parametrize("log, answer", [(healthy({"minibatches": 2}), "Nothing found."), (log(steps=3, train__loss=(3, 2)),
                                         "Too early to tell: a trend needs 15 steps.")])
def test_nothing_found_and_too_early_are_answers(log, answer, tmp_path, capsys):
    run = write(tmp_path / "run", log)
    doctor.main([run])
    assert answer in capsys.readouterr().out and doctor.worst_sentence(run) == ""


def test_no_run_there_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        doctor.main([str(tmp_path)])
    assert exit.value.code == 2 and "no such file; expected the directory of a run" in capsys.readouterr().err


def test_a_script_ends_with_the_worst_sentence_if_a_run_went_wrong(inside, tmp_path, capsys, monkeypatch):
    """And with nothing of the doctor's otherwise: neither early nor with notes only."""
    import train_dpo
    from world import DPO, start
    start(train_dpo, DPO, tmp_path / "fine")
    assert capsys.readouterr().out.endswith(f"Saved in {tmp_path / 'fine'}.\n")
    monkeypatch.setitem(doctor.FINDINGS, "broken", (lambda log: f"It has {log.steps()} steps.",))
    start(train_dpo, DPO, tmp_path / "ill")
    assert capsys.readouterr().out.endswith(f"\nbroken: It has 3 steps. More: python -m nanorl.doctor {tmp_path / 'ill'}\n")


def ends(value, **flags):
    return Log([{"step": 9, "eval/accuracy_sampled": value}], flags)


def test_a_difference_that_is_smaller_than_that_of_seeds_is_called_so():
    far = [ends(x, seed=i, lr=lr) for lr, xs in ((1, (0.1, 0.12, 0.11)), (2, (0.9, 0.92, 0.91))) for i, x in enumerate(xs)]
    near = [ends(x, seed=i, lr=lr) for lr, xs in ((1, (0.1, 0.5, 0.3)), (2, (0.2, 0.6, 0.4))) for i, x in enumerate(xs)]
    assert doctor.seeds_differ_more(far) is None and doctor.seeds_differ_more(far[:3]) is None
    assert "standard error of the difference" in doctor.seeds_differ_more(near)
    assert "not known" in doctor.seeds_differ_more([far[0], far[3]]) and doctor.seeds_differ_more([]) is None


def test_the_page_and_the_advice_have_every_finding_and_nothing_else():
    """And each metric named is one that docs/metrics.md explains."""
    page = (ROOT / "docs/reading-a-run.md").read_text()
    sections = {heading.lower().replace(" ", "-") for heading in re.findall(r"^### (.+)$", page, re.M)}
    linked = set(re.findall(r"\]\(#([a-z-]+)\)", page))
    assert sections == doctor.TEXTS.keys() == NAMES.keys() | {"seeds-differ-more"}
    assert sections <= linked
    explained = set(re.findall(r"^\| `([a-z]+/\w+)`", (ROOT / "docs/metrics.md").read_text(), re.M))
    assert {metric for text in doctor.TEXTS.values() for metric in text["metrics"]} <= explained
