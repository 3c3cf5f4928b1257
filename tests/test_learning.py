"""Slow: the whole chain, from nothing, must learn what the README says it learns."""

import json
from pathlib import Path

import pytest

import train_grpo
import train_pretrain
import train_sft
from nanorl import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with the default pretraining run."""
    folder = tmp_path_factory.mktemp("learning")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_pretrain.main(run.parse(train_pretrain.Config, ["--quiet"]))
    return folder


def lines(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_grpo_learns_to_work_before_it_answers(base, monkeypatch):
    """`python train_grpo.py`: blurting dies out, answers grow longer, accuracy goes from below 0.6 to above 0.92."""
    monkeypatch.chdir(base)
    train_grpo.main(run.parse(train_grpo.Config, ["--quiet"]))
    before, after = lines("runs/sft")[-1], lines("runs/grpo")[-1]
    assert before["eval/accuracy_sampled"] < 0.60 and before["eval/reward_worked"] >= 0.90
    assert after["eval/accuracy_sampled"] >= 0.92 and after["eval/accuracy_greedy"] >= 0.97
    assert after["eval/worked"] > 0.95 > 0.5 > before["eval/worked"]
    assert after["eval/length"] > 1.5 * before["eval/length"]
    assert after["eval/story_loss"] < lines("runs/grpo")[0]["eval/story_loss"] + 0.1


@pytest.mark.parametrize("task, sft_steps, steps", [("sums", 300, 40), ("sorting", 100, 40), ("reversal", 400, 120),
                                                    ("countdown", 300, 40)])
def test_grpo_lifts_every_task(task, sft_steps, steps, base, monkeypatch):
    """From fine-tuning that leaves something to learn; what pays, working or blurting, differs from task to task."""
    monkeypatch.chdir(base)
    train_sft.main(run.parse(train_sft.Config, ["--task", task, "--steps", str(sft_steps), "--quiet"]))
    train_grpo.main(run.parse(train_grpo.Config, ["--task", task, "--steps", str(steps), "--lr", "3e-4", "--quiet"]))
    first, last = lines(f"runs/grpo-{task}")[0], lines(f"runs/grpo-{task}")[-1]
    assert last["eval/accuracy_sampled"] > first["eval/accuracy_sampled"] + 0.05


def test_twice_the_fine_tuning_changes_little(base, monkeypatch):
    """The gap to RL comes from the two modes of answering, not from training too little."""
    monkeypatch.chdir(base)
    accuracy = {}
    for steps in (300, 600):
        out = f"runs/sft-{steps}-steps"
        train_sft.main(run.parse(train_sft.Config, ["--steps", str(steps), "--eval-every", "600", "--out", out, "--quiet"]))
        accuracy[steps] = lines(out)[-1]["eval/accuracy_sampled"]
    assert accuracy[600] < 0.60 and abs(accuracy[600] - accuracy[300]) < 0.10
