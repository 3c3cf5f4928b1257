"""What experiments/ makes of finished runs; the runs themselves take an hour."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train_distill
from experiments import distill, family, preferences, real_model, real_tasks, real_text
from experiments.runs import directory, train
from nanorl import run


@pytest.fixture
def runs(tmp_path):
    """Two seeds of every row: accuracy 0.5, 0.8, 0.95 before steps of 1,000 and 2,000 tokens; the second seed 0.1 lower."""
    for block in family.BLOCKS:
        for label in block:
            for seed in range(2):
                run = directory(tmp_path, label, seed)
                run.mkdir()
                lines = [{"step": 0, "eval/accuracy_sampled": 0.5, "rollout/tokens": 1000, "train/entropy": 0.2,
                          "train/clipped_low": 0.01, "train/clipped_high": 0.02},
                         {"step": 1, "eval/accuracy_sampled": 0.8, "rollout/tokens": 2000, "train/entropy": 0.1},
                         {"step": 2, "eval/accuracy_sampled": 0.95 - 0.1 * seed}]
                (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_no_experiment_needs_hypothesis():
    code = "import sys; sys.modules['hypothesis'] = None; from experiments.__main__ import modules; modules()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_a_curve_counts_the_tokens_before_each_evaluation(runs):
    curve = family.curve(directory(runs, "grpo", 0))
    assert curve == {"tokens": [0, 1, 3], "accuracy": [0.5, 0.8, 0.95], "entropy": [0.2, 0.1], "entropy_tokens": [1, 3],
                     "bounded": [0.03, 0.0]}
    assert family.tokens_to(curve, 0.5) == 0 and family.tokens_to(curve, 0.95) == 3 and family.tokens_to(curve, 1.0) > 1e9
    assert family.tokens_to(curve, 0.65) == pytest.approx(0.5)


def test_the_table_has_the_mean_and_the_range_over_seeds(runs):
    curves = {"grpo": [family.curve(directory(runs, "grpo", seed)) for seed in range(2)]}
    row = family.table(curves).splitlines()[-1]
    assert row == "| grpo | clip 0.2 0.2 | 0.900 (0.850 to 0.950) | 0 | 0.1000 | 3.0 % |"


def test_the_figure_is_drawn_from_the_runs_that_are_there(runs, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    argv = ["family", "--draw", "--seeds", "2", "--out", str(runs), "--figure", str(runs / "family.png")]
    monkeypatch.setattr("sys.argv", argv)
    family.main()
    assert (runs / "family.png").read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith("| ") for line in capsys.readouterr().out.splitlines()) == 14


# ---- Preferences ----


@pytest.fixture
def preference_runs(tmp_path):
    """Two seeds of everything: three held-out pairs, three evaluations, the second of them the highest, the second seed 0.1
    higher in the end."""
    for label in preferences.REWARD | preferences.STORIES | preferences.ADDITION:
        for seed in range(2):
            folder = directory(tmp_path, label, seed)
            folder.mkdir()
            last = {"step": 30, "eval/accuracy_sampled": 0.9, "eval/hidden_reward": 3.0 + 0.1 * seed, "eval/hidden_praise": 1.0,
                    "eval/answer_kl": 2.0, "eval/truncated": 0.0, "eval/agreement_model_labels": 0.7,
                    "eval/agreement_model_clear": 0.95 + 0.02 * seed}
            if "PPO" in label:
                last["eval/learned_reward"] = 1.5
            first = {"step": 0} | {name: 0.5 for name in last if name != "step"} | {"eval/answer_kl": 0.0}
            middle = {"step": 10, "eval/hidden_reward": 4.0, "eval/learned_reward": 1.0, "eval/answer_kl": 1.0,
                      "eval/accuracy_sampled": 0.8}
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, middle, last)))
            lines = [json.dumps({"step": 30, "margin": margin}) + "\n" for margin in (3.0, 0.5, -0.5)]
            (folder / "samples.jsonl").write_text("".join(lines))
    for seed in range(2):
        (tmp_path / f"best_of_n-{seed}.json").write_text(json.dumps({1: 2.0, 16: 3.5}))
    return tmp_path


def test_the_tables_and_the_figure_of_preferences_are_those_of_the_runs(preference_runs, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["preferences", "--draw", "--seeds", "2", "--out", str(preference_runs),
                                     "--figure", str(preference_runs / "figure.png")])
    preferences.main()
    printed = capsys.readouterr().out
    assert "| the reward model | 0.700 | – | 0.960 (0.950 to 0.970) |" in printed
    assert "| best of 16 | 3.50 | – | – | – | at most 1.84 | – |" in printed
    assert "| PPO | 3.05 (3.00 to 3.10) | 4.00 | 1.00 | 1.00 | 2.0 | 0.00 |" in printed
    assert "| DPO | 3.05 (3.00 to 3.10) | 4.00 | 1.00 | – | 2.0 | 0.00 |" in printed
    assert "| group loss: hinge | 0.500 | 0.900 | 30 | 2.0 |" in printed
    assert (preference_runs / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_calibration_sees_each_pair_from_both_sides(preference_runs):
    """Margins 3, 1/2 and -1/2 in four bins: the extremes are each other's complement, and their error is that of one seed."""
    folders = [directory(preference_runs, "reward model", seed) for seed in range(2)]
    predicted, actual, error = preferences.calibration(folders, bins=4)
    assert predicted == pytest.approx([0.0474, 0.3775, 0.6225, 0.9526], abs=1e-4) and actual == [0.0, 0.5, 0.5, 1.0]
    assert error == pytest.approx([1.0, 0.5, 0.5, 1.0])


def test_a_run_is_kept_as_long_as_its_flags_are_the_same(tmp_path, monkeypatch):
    """... and made anew with others; a failure that is no result is raised with its message."""
    calls = []

    def command(argv, **_):
        calls.append(argv)
        Path(argv[3]).mkdir()
        return SimpleNamespace(returncode=2 if "--bad" in argv else 0, stderr="no contrast")

    monkeypatch.setattr("subprocess.run", command)
    for flags, times in ((["--a"], 1), (["--a"], 1), (["--b"], 2)):
        train(tmp_path / "run", "train_grpo.py", flags, 1)
        assert len(calls) == times
    train(tmp_path / "bad", "train_grpo.py", ["--bad"], 1, may_end_with="no contrast")
    with pytest.raises(RuntimeError, match="no contrast"):
        train(tmp_path / "worse", "train_grpo.py", ["--bad"], 1)


# ---- Real text ----


@pytest.mark.parametrize("bits", [real_text.unigram_bits, real_text.bigram_bits])
@pytest.mark.parametrize("k", [1e-5, 0.3, 10.0])
def test_counting_gives_a_distribution_over_the_next_token(bits, k):
    """After every token, seen or not, the probabilities of all V next ones add up to 1."""
    train = np.array([0, 1, 0, 2, 1, 0, 1])
    for a in range(4):
        assert sum(2 ** -bits(train, np.array([a, b]), 4, k) for b in range(4)) == pytest.approx(1)


def test_counting_counts():
    """p(b) = (n(b) + k) / (N + k V) and p(b | a) = (n(a b) + k) / (n(a) + k V), the first token for nothing."""
    train, test = np.array([0, 1, 0, 2, 1, 0, 1]), np.array([2, 0, 1])
    assert 2 ** -real_text.unigram_bits(train, test, 4, 0.5) == pytest.approx((3.5 / 9) * (3.5 / 9))
    assert 2 ** -real_text.bigram_bits(train, test, 4, 0.5) == pytest.approx((0.5 / 3) * (2.5 / 5))


def test_smoothing_is_chosen_on_training_text_alone():
    """Whatever is held out: what follows is certain here, and the least smoothing is best."""
    train = np.tile(np.arange(4), 500)
    for test in (np.array([0, 1, 2, 3]), np.array([3, 3, 3])):
        k, total = real_text.tuned(real_text.bigram_bits, train, test, 4)
        assert k == min(real_text.SMOOTHING) and total == real_text.bigram_bits(train, test, 4, k)


def test_real_text_is_gathered_trained_on_and_compared(tmp_path, monkeypatch, capsys):
    """A library of three files and two steps: every file is there once, no test is, and the table has three numbers."""
    for name in ("a.py", "b/c.py", "d.py", "test/e.py"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"def {name[0]}(x):\n    return x\n" * 200)
    monkeypatch.setattr(real_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    flags = "--vocab-size 300 --length 32 --batch 2 --steps 2 --eval-every 2 --quiet --device cpu"
    monkeypatch.setattr("sys.argv", ["real_text", "--out", str(tmp_path / "out"), "--flags", flags])
    real_text.main()
    text, printed = (tmp_path / "out/stdlib.txt").read_text(), capsys.readouterr().out
    assert sorted(line for line in text.splitlines() if line.startswith("# ")) == ["# a.py", "# b/c.py", "# d.py"]
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[1].split(",")[0].strip() for row in rows] == ["held-out text", "unigram", "bigram", "this model"]
    assert all(0 < float(row[2]) < 10 for row in rows[1:])
    real_text.main()                                        # the run that is there is compared again


# ---- Distillation ----


def test_forward_covers_and_only_the_kl_of_whole_answers_seeks():
    """A teacher of two modes and a student that cannot hold both: a quarter of what a covering student says is of a mode; the
    seeking one says half of what the teacher does, and nothing else. With the prefixes held fixed, reverse covers, too."""
    table = [[float(cell) for cell in line.split("|")[2:6]] for line in distill.modes_table(1).splitlines()[2:]]
    forward, jsd, token, sequence = table
    for covering in (forward, jsd, token):
        assert covering[:2] == [1.0, 0.25] and covering[2] < covering[3]
    assert sequence[:2] == [0.5, 1.0] and sequence[2] > sequence[3]


def test_the_table_of_students_has_the_start_and_every_way(tmp_path):
    for label in distill.WAYS:
        for seed in range(2):
            run = directory(tmp_path, label, seed)
            run.mkdir()
            lines = [{"step": step, "eval/accuracy_sampled": x + seed / 10, "eval/accuracy_greedy": x, "eval/worked": x,
                      "eval/forward_kl": 1 - x, "eval/reverse_kl": 2 - x} for step, x in ((0, 0.2), (10, 0.5), (60, 0.8))]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs = {label: [distill.read_metrics(directory(tmp_path, label, seed)) for seed in range(2)] for label in distill.WAYS}
    lines = distill.students_table(logs).splitlines()
    assert len(lines) == 3 + len(distill.WAYS)
    assert lines[2] == "| the student at the start | – | 0.250 (0.200 to 0.300) | 0.200 | 0.200 | 0.800 | 1.800 |"
    assert lines[3] == ("| forward, data | 0.550 (0.500 to 0.600) | 0.850 (0.800 to 0.900) | 0.800 | 0.800 | 0.200 | 1.200 |")


@pytest.mark.parametrize("way", distill.WAYS.values())
def test_every_way_is_one_that_the_script_takes(way):
    cfg = run.parse(train_distill.Config, [part for name, value in way.items() for part in (f"--{name}", str(value))])
    assert {name: getattr(cfg, name) for name in way} == way


# ---- A real model ----


def test_sums_in_words_ask_no_example_and_hold_out_a_tenth():
    task = real_tasks.two_digit_sums()
    examples = {content for role, content in task.problems[0].before if role == "user"}
    assert len(examples) == 2 and not examples & {problem.prompt for problem in task.problems}
    assert ("What is thirty-seven plus ten?", "47") in [(problem.prompt, problem.answer) for problem in task.problems]
    assert 0.08 < len(task.rows("heldout")) / len(task.problems) < 0.12
    assert real_tasks.two_digit_sums_four_shot_told().held == task.held         # the question alone decides


def test_a_real_model_is_compared_with_the_best_prompt(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    found = {"sums-before-2-examples": 0.3, "sums-before-4-examples": 0.4, "sums-all-0": 0.5, "sums-all-1": 0.6}
    for name, lenient in found.items():
        (tmp_path / name / "run").mkdir(parents=True)
        row = {"value": lenient / 2, "lenient": lenient, "tokens": 18.0}
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"rows": [row]}))
        (tmp_path / name / "training.json").write_text('{"minutes": 9.0, "cpu_minutes": 5.0, "gigabytes": 6.0}')
        for kind, line in (("metrics", {"step": 0, "rollout/reward": 0.2, "rollout/tokens": 1000}), ("samples", {"step": 0})):
            (tmp_path / name / f"run/{kind}.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(real_model, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(real_model, "FIGURE", tmp_path / "figure.png")
    monkeypatch.setattr("sys.argv", ["real_model", "--draw", "--out", str(tmp_path)])
    real_model.main()
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "0.550 (-0.085 to 1.185) | 3.2, 6.5 | 1,000 | 5.0 (5.0 to 5.0)" in last
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
