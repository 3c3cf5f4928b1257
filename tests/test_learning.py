"""Slow: the whole chain, from nothing, must learn what the README says it learns."""

import json
from pathlib import Path

import pytest

import train_dpo
import train_group_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_reward
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
                                                    ("countdown", 300, 40), ("code", 300, 40)])
def test_grpo_lifts_every_task(task, sft_steps, steps, base, monkeypatch):
    """From fine-tuning that leaves something to learn; what pays, working or blurting, differs from task to task."""
    monkeypatch.chdir(base)
    train_sft.main(run.parse(train_sft.Config, ["--task", task, "--steps", str(sft_steps), "--lr", "2e-3", "--quiet"]))
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


def test_readers_preferences_are_learned_by_a_reward_model_by_dpo_and_by_ppo(base, monkeypatch):
    """The reward model knows more than words and lengths; stories that follow it, or the pairs, please the readers more."""
    monkeypatch.chdir(base)
    short = ["--best-of", "0", "--quiet"]
    train_sft.main(run.parse(train_sft.Config, ["--task", "stories", "--quiet"]))
    train_reward.main(run.parse(train_reward.Config, ["--quiet"]))
    found = lines("runs/reward")[-1]
    assert found["eval/agreement_model_clear"] >= 0.85
    assert found["eval/agreement_model_clear"] > max(found["eval/agreement_words_clear"], found["eval/agreement_length_clear"])
    train_dpo.main(run.parse(train_dpo.Config, ["--steps", "60", "--eval-every", "60", *short]))
    train_ppo.main(run.parse(train_ppo.Config, ["--reward", "model", "--steps", "10", "--eval-every", "10", *short]))
    for out in ("runs/dpo", "runs/ppo-stories"):
        first, last = lines(out)[0], lines(out)[-1]
        assert last["eval/hidden_reward"] > first["eval/hidden_reward"] + 0.7
        assert 0 == first["eval/answer_kl"] < last["eval/answer_kl"] < 8


def test_right_and_wrong_answers_are_learned_from_by_ppo_and_by_every_group_loss(base, monkeypatch):
    monkeypatch.chdir(base)
    train_sft.main(run.parse(train_sft.Config, ["--out", "runs/sft-again", "--init", "runs/pretrain", "--quiet"]))
    short = ["--init", "runs/sft-again", "--best-of", "0", "--quiet"]
    train_ppo.main(run.parse(train_ppo.Config, ["--steps", "10", *short]))
    assert lines("runs/ppo")[-1]["eval/accuracy_sampled"] >= 0.9
    for loss in ("pairs", "scaled", "mean", "hinge"):
        flags = ["--steps", "12", "--loss", loss, "--out", f"runs/{loss}", *short]
        train_group_dpo.main(run.parse(train_group_dpo.Config, flags))
        first, last = lines(f"runs/{loss}")[0], lines(f"runs/{loss}")[-1]
        assert last["eval/accuracy_sampled"] > first["eval/accuracy_sampled"] + 0.2
