"""What experiments/ makes of finished runs; the runs themselves take an hour."""

import json

import pytest

from experiments import family


@pytest.fixture
def runs(tmp_path):
    """Two seeds of every row: accuracy 0.5, 0.8, 0.95 before steps of 1,000 and 2,000 tokens; the second seed 0.1 lower."""
    for block in family.BLOCKS:
        for label in block:
            for seed in range(2):
                run = family.directory(tmp_path, label, seed)
                run.mkdir()
                lines = [{"step": 0, "eval/accuracy_sampled": 0.5, "rollout/tokens": 1000, "train/entropy": 0.2,
                          "train/clipped_low": 0.01, "train/clipped_high": 0.02},
                         {"step": 1, "eval/accuracy_sampled": 0.8, "rollout/tokens": 2000, "train/entropy": 0.1},
                         {"step": 2, "eval/accuracy_sampled": 0.95 - 0.1 * seed}]
                (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_curve_counts_the_tokens_before_each_evaluation(runs):
    curve = family.curve(family.directory(runs, "grpo", 0))
    assert curve == {"tokens": [0, 1, 3], "accuracy": [0.5, 0.8, 0.95], "entropy": [0.2, 0.1], "entropy_tokens": [1, 3],
                     "bounded": [0.03, 0.0]}
    assert family.tokens_to(curve, 0.5) == 0 and family.tokens_to(curve, 0.9) == 3 and family.tokens_to(curve, 1.0) > 1e9


def test_the_table_has_the_mean_and_the_range_over_seeds(runs):
    curves = {"grpo": [family.curve(family.directory(runs, "grpo", seed)) for seed in range(2)]}
    row = family.table(curves).splitlines()[-1]
    assert row == "| grpo | clip 0.2 0.2 | 0.900 (0.850 to 0.950) | inf (3 to inf) | 0.1000 | 3.0 % |"


def test_the_figure_is_drawn_from_the_runs_that_are_there(runs, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    argv = ["family", "--draw", "--seeds", "2", "--out", str(runs), "--figure", str(runs / "family.png")]
    monkeypatch.setattr("sys.argv", argv)
    family.main()
    assert (runs / "family.png").read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith("| ") for line in capsys.readouterr().out.splitlines()) == 16
