"""Learning curves: every metric of a panel that was logged is drawn, and nothing else."""

import itertools
import json
import re
from pathlib import Path

import pytest

from nanorl import plot

matplotlib = pytest.importorskip("matplotlib")


def write_run(folder, lines, torn=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return folder


def drawn(monkeypatch, runs, out):
    """{panel: {label: points}} of the figure."""
    import matplotlib.pyplot as plt
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plot.main([*map(str, runs), "--out", str(out)])
    return {axis.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
            for axis in figures[0].axes if axis.get_visible()}


def test_the_curves_are_the_logged_points_and_a_torn_line_is_not_one(tmp_path, monkeypatch):
    lines = [{"step": 0, "rollout/reward": 0.25, "eval/accuracy_greedy": 0.5}, {"step": 1, "rollout/reward": 0.75}]
    run = write_run(tmp_path / "grpo", lines, torn='{"step": 2, "rollout/rew')
    panels = drawn(monkeypatch, [run], tmp_path / "curves.png")
    assert panels == {"accuracy": {"training, sampled": [[0, 0.25], [1, 0.75]], "held out, greedy": [[0, 0.5]]}}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_was_not_finite_has_no_point(tmp_path, monkeypatch):
    """It is null in the log. A panel of nothing else is left out, and a fit does without the step but counts its tokens. Nor
    has what is no number at all."""
    lines = [{"step": 0, "rollout/reward": 0.25, "train/entropy": None}, {"step": 1, "rollout/reward": None},
             {"step": 2, "rollout/reward": 0.75, "train/entropy": [1], "eval/accuracy_greedy": "1"},
             {"step": 3, "train/kl": 10**400}]
    panels = drawn(monkeypatch, [write_run(tmp_path / "grpo", lines)], tmp_path / "curves.png")
    assert panels == {"accuracy": {"training, sampled": [[0, 0.25], [2, 0.75]]}}
    tokens, reward = plot.reward_by_tokens([line | {"rollout/tokens": 10} for line in lines])
    assert tokens.tolist() == [0, 20] and reward.tolist() == [0.25, 0.75]


def test_a_panel_of_nothing_but_zeros_is_left_out(tmp_path, monkeypatch):
    """An inert clip draws nothing; one that holds a single token is drawn, its other side too."""
    for high, titles in ((0.0, {"accuracy"}), (0.1, {"accuracy", "share of tokens that the bound holds"})):
        lines = [{"step": 0, "rollout/reward": 0.5, "train/clipped_low": 0.0, "train/clipped_high": high}]
        assert drawn(monkeypatch, [write_run(tmp_path / f"{high}", lines)], tmp_path / "curves.png").keys() == titles


@pytest.mark.parametrize("values", [(-3.0, -1.0), (-1.0, 2.0), (0.5, 2.0)])
def test_zero_and_every_point_are_in_sight(values, tmp_path, monkeypatch):
    """Log-probs and margins may be negative: no curve leaves its panel, and none pretends that it starts at zero."""
    import matplotlib.pyplot as plt
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    run = write_run(tmp_path / "run", [{"step": k, "train/margin": value} for k, value in enumerate(values)])
    plot.main([str(run), "--out", str(tmp_path / "curves.png")])
    low, high = figures[0].axes[0].get_ylim()
    assert low <= min(*values, 0) and max(*values, 0) <= high


def test_runs_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(Path(folder, "grpo"), [{"step": 0, "train/entropy": x}]) for folder, x in (("a", 1.0), ("b", 2.0))]
    [curves] = drawn(monkeypatch, runs, "curves.png").values()
    assert sorted(curves.values()) == [[[0, 1.0]], [[0, 2.0]]] and len(curves) == 2


@pytest.mark.parametrize("lines", [None, []])
def test_a_run_without_metrics_is_one_sentence(tmp_path, capsys, lines):
    run = tmp_path / "nothing" if lines is None else write_run(tmp_path / "empty", lines)
    with pytest.raises(SystemExit) as exit:
        plot.main([str(run)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and run.name in error


def learning_run(folder, midpoint):
    """Forty steps of 1,000 tokens each, whose reward follows a sigmoid from .2 to .9 with its middle at `midpoint` thousand."""
    rewards = [0.2 + 0.7 / (1 + (midpoint / k)**2) if k else 0.2 for k in range(40)]
    return write_run(folder, [{"step": k, "rollout/reward": r + 0.005 * (-1)**k, "rollout/tokens": 1000}
                              for k, r in enumerate(rewards)] + [{"step": 40, "eval/accuracy_sampled": 0.9}])


def test_the_fit_is_drawn_and_said_in_words(tmp_path, capsys):
    run = learning_run(tmp_path / "late", 10)
    plot.main(["--fit", str(run)])
    assert (run / "fit.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    numbers = [float(re.search(rf"{words} ([\d.]+)", said)[1]) for words in ("starts at", "midpoint is at", "ceiling is")]
    assert numbers == pytest.approx((0.2, 10, 0.9), rel=0.03)


def test_a_run_before_its_bend_is_told_so(tmp_path, capsys):
    plot.main(["--fit", str(learning_run(tmp_path / "early", 300)), "--out", str(tmp_path / "fit.png")])
    assert "The data do not reach the bend" in capsys.readouterr().out


def test_a_run_without_rewards_cannot_be_fitted(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        plot.main(["--fit", str(write_run(tmp_path / "sft", [{"step": 0, "train/loss": 1.0}]))])
    assert exit.value.code == 2 and "sft: 0 points are too few" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x", "x.", ".png", "a.b/x", "x.txt", "x.pngx"])
def test_a_file_without_the_ending_of_a_picture_is_refused_by_its_true_name(name, tmp_path, monkeypatch, capsys):
    """matplotlib would write x.png and leave x to the message."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", [{"step": 0, "train/entropy": 1.0}])
    with pytest.raises(SystemExit) as exit:
        plot.main(["run", "--out", name])
    assert exit.value.code == 2 and f"{name}: cannot draw such a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.svg", "x.y.pdf"])
def test_what_is_said_to_be_drawn_is_there(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", [{"step": 0, "train/entropy": 1.0}])
    plot.main(["run", "--out", name])
    assert capsys.readouterr().out == f"Drew {name}.\n" and Path(name).stat().st_size > 1000


def test_a_kind_of_picture_that_cannot_be_drawn_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        plot.main(["nowhere", "--out", str(tmp_path / "curves.foo")])
    assert exit.value.code == 2 and "curves.foo: cannot draw such a file (Format 'foo'" in capsys.readouterr().err


def test_seeds_share_the_colour_and_the_label_of_a_curve(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    runs = [write_run(tmp_path / str(seed), [{"step": 0, "rollout/reward": seed / 4, "eval/accuracy_greedy": 1 - seed / 4}])
            for seed in (1, 2, 3)]
    plot.main(["--seeds", *map(str, runs), "--out", str(tmp_path / "curves.png")])
    [axis] = figures[0].axes
    curves = {}
    for line in axis.lines:
        curves.setdefault(line.get_color(), []).append(line.get_ydata()[0])
    assert sorted(curves.values()) == [[0.25, 0.5, 0.75], [0.75, 0.5, 0.25]]
    assert [text.get_text() for text in axis.get_legend().texts] == ["training, sampled", "held out, greedy"]


@pytest.mark.parametrize("count", range(1, 10))
def test_every_row_of_panels_is_full(count, tmp_path, monkeypatch):
    """Rows of up to four; each reaches from edge to edge, and their sizes differ by at most one."""
    import matplotlib.pyplot as plt
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)         # the places are known before
    names = [next(iter(metrics)) for metrics in plot.PANELS.values()][:count]
    plot.main([str(write_run(tmp_path / "run", [dict.fromkeys(names, 0.5) | {"step": 0}])), "--out", str(tmp_path / "c.png")])
    rows = {}
    for axis in figures[0].axes:
        place = axis.get_subplotspec()
        rows.setdefault(place.rowspan.start, []).append((place.colspan.start, place.colspan.stop))
    columns = figures[0].axes[0].get_subplotspec().get_gridspec().ncols
    assert sum(map(len, rows.values())) == count and max(map(len, rows.values())) <= 4
    assert max(map(len, rows.values())) - min(map(len, rows.values())) <= 1
    for spans in rows.values():
        assert spans[0][0] == 0 and spans[-1][1] == columns
        assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
