"""Every script, run in-process from one tiny chain: it runs, learns what it should, and resumes bit for bit."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from world import (
    DISTILL,
    DPO,
    GROUP,
    GRPO,
    ONE_OF_EACH,
    ONLINE,
    PPO,
    PRETRAIN,
    ROOT,
    SCRIPTS,
    SELDOM,
    SFT,
    STATES,
    cut_final_line,
    exit_code,
    files_of,
    metrics,
    same_parameters,
    seal_rewards,
    start,
    write_records,
)

import train_distill
import train_dpo
import train_group_dpo
import train_grpo
import train_ppo
import train_pretrain
import train_reward
import train_sft
from nanorl import run
from nanorl.data import render_records, response_batch, shuffled_batch, training_records
from nanorl.family import ALGORITHMS, AXES
from nanorl.heldout import answer_kl, evaluate_policy, heldout_problems
from nanorl.ops import kl_divergence
from nanorl.rollout import collect, sample_and_grade
from nanorl.sample import Sampling
from nanorl.tasks import TASKS, Problem, Stories, Task, final_answer, is_heldout, make_task

pytestmark = pytest.mark.usefixtures("inside")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_its_files_and_one_line_a_step(name):
    assert {p.name for p in Path(name).iterdir()} == files_of(name)
    checkpoint = run.load_checkpoint(name)
    assert [line["step"] for line in metrics(name)] == list(range(checkpoint["config"]["steps"] + 1))
    assert checkpoint["step"] == checkpoint["config"]["steps"]


def test_the_rewards_of_the_tiny_world_differ_within_groups():
    """Or else nothing in this file would train anything."""
    assert any(line["rollout/no_contrast"] < 1 for line in metrics("grpo")[:-1])
    assert max(line["train/grad_norm_max"] for line in metrics("grpo")[:-1]) > 0


def killed_in_the_third_step(name, out):
    def write_line(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self)

    real, run.Run._write_line = run.Run._write_line, write_line
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    start(*SCRIPTS[name], out)


@pytest.mark.parametrize("name", STATES)
def test_kill_9_and_resume_is_the_uninterrupted_run_bit_for_bit(name, tmp_path):
    """SIGKILL in the third step, after its update: resumed, parameters and metrics are those of a run left alone, whatever the
    global random generators were seeded with."""
    assert exit_code(killed_in_the_third_step, name, tmp_path / "run") == -signal.SIGKILL
    assert len(metrics(tmp_path / "run")) == 2
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    start(SCRIPTS[name][0], "--resume", tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(name)
    assert same_parameters(tmp_path / "run", name)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_another_seed_gives_another_run_and_seeds_no_global_generator(name, tmp_path):
    script, flags = SCRIPTS[name]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.initial_seed()
    start(script, flags, tmp_path / "other", "--seed", "1")
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.initial_seed())
    assert not same_parameters(tmp_path / "other", name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_resuming_a_finished_run_changes_nothing(name, capsys):
    script, _ = SCRIPTS[name]
    files = {p: p.read_bytes() for p in Path(name).iterdir()}
    with pytest.raises(SystemExit) as exit:
        script.main(run.parse(script.Config, ["--out", name, "--resume"]))
    assert exit.value.code == 0 and "finished" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in Path(name).iterdir()} == files


def test_every_metric_has_its_line_in_the_glossary():
    glossary = set(re.findall(r"^\| `([a-z]+/\w+)`", (ROOT / "docs/metrics.md").read_text(), re.M))
    logged = {key for name in SCRIPTS for line in (Path(name) / "metrics.jsonl").read_text().splitlines()
              for key in json.loads(line)} - {"step"}
    assert logged <= glossary, f"not in docs/metrics.md: {sorted(logged - glossary)}"


def test_pretraining_goes_on_from_another_checkpoint(tmp_path):
    start(train_pretrain, PRETRAIN.replace("--preset pico --vocab-size 300", "--init pretrain"), tmp_path / "more")
    assert metrics(tmp_path / "more")[0]["eval/text_loss"] == metrics("pretrain")[-1]["eval/text_loss"]


def test_without_kl_no_reference_model_is_built(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr("nanorl.run.start.model_from", lambda *args, make=run.model_from: built.append(1) or make(*args))
    start(train_grpo, GRPO + " --steps 1", tmp_path / "plain")
    assert len(built) == 1
    start(train_grpo, GRPO + " --steps 1 --kl-coef 0.1", tmp_path / "leashed")
    assert len(built) == 3


def test_resume_finds_a_default_directory_that_depends_on_other_flags(tmp_path, monkeypatch):
    for name in ("wanted.jsonl", "sft"):
        (tmp_path / name).symlink_to(Path(name).resolve())
    monkeypatch.chdir(tmp_path)
    train_grpo.main(run.parse(train_grpo.Config, [*GRPO.split(), "--task", "sorting"]))
    assert run.parse(train_grpo.Config, ["--task", "sorting", "--resume"]).out == "runs/grpo-sorting"


def test_a_run_resumes_without_the_stages_before_it(world, tmp_path, monkeypatch):
    """A checkpoint is enough: nothing is made anew and no path of the first day is needed."""
    shutil.copytree("grpo", tmp_path / "moved")
    shutil.copy("wanted.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    cut_final_line("moved")
    start(train_grpo, "--resume --quiet", "moved")
    assert metrics("moved") == metrics(world / "grpo")


def test_one_update_per_rollout_means_ratio_one_and_an_inert_clip():
    for line in metrics("grpo")[:-1]:
        assert line["train/ratio_max"] == 1 and line["train/clipped_low"] == line["train/clipped_high"] == 0
        assert abs(line["train/mismatch_kl"]) < 1e-6


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_row_of_the_table_trains(algo, tmp_path):
    """Two steps of two updates each: the weights move, and what the row's bound counts is logged."""
    start(train_grpo, GRPO + SELDOM + f" --selfcheck --algo {algo} --minibatches 2 --steps 2", tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert max(line.get("train/grad_norm_max", 0) for line in lines) > 0
    row = ALGORITHMS[algo]
    held = {"clip": {"clipped_low", "clipped_high"}, "truncate": {"capped"}, "mask": {"masked"}}.get(row.bound, set())
    assert {name[6:] for name in lines[0] if name[6:] in {"clipped_low", "clipped_high", "capped", "masked"}} == held


def test_help_prints_the_table_with_its_sources(capsys):
    with pytest.raises(SystemExit) as exit:
        run.parse(train_grpo.Config, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert exit.value.code == 0
    for name, row in ALGORITHMS.items():
        at = next(i for i, line in enumerate(lines) if line.split()[:6] == [name, *row[:5]])
        assert lines[at + 1].strip() == row.note


GROUPS = {train_pretrain: "text and model", train_sft: "adapters, demonstrations", train_reward: "pairs",
          train_dpo: "adapters, pairs, the algorithm", train_group_dpo: "adapters, rollouts, the algorithm",
          train_grpo: "adapters, rollouts, the algorithm, regularisation, updates",
          train_ppo: "adapters, rollouts, the reward, the algorithm, updates", train_distill: "adapters, teacher and answers"}


@pytest.mark.parametrize("script", GROUPS, ids=lambda script: script.__name__)
def test_help_shows_the_flags_in_groups(script, capsys):
    """What all runs share comes first; no flag but --help is in argparse's own group."""
    with pytest.raises(SystemExit):
        run.parse(script.Config, ["--help"])
    text = capsys.readouterr().out
    titles = ["options", "device and seed", "the run", *GROUPS[script].split(", ")]
    assert re.findall(r"^(\w.*):$", text[text.index("\noptions:\n") :], re.M) == titles
    assert re.findall(r"^  -\S+", text[text.index("\noptions:\n") : text.index("\ndevice and seed:\n")], re.M) == ["  -h,"]
    flags = re.findall(r"^  (--[a-z-]+)", text, re.M)
    assert len(flags) == len(set(flags)) == len(dataclasses.fields(script.Config)) <= 48


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_row_is_the_flags_it_stands_for(algo):
    """--algo NAME is --algo grpo with the axes and further flags of its row typed out, and nothing else."""
    row = ALGORITHMS[algo]
    flags = dict(zip(AXES, row, strict=False)) | {"overlong": 0.0} | row.also
    leash = ["--kl-coef", "0.1"] if "kl" in row.also else []
    typed = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    short, spelt = (run.parse(train_grpo.Config, [*argv, *leash]) for argv in (["--algo", algo], ["--algo", "grpo", *typed]))
    assert dataclasses.replace(short, algo="grpo") == spelt


def test_a_typed_flag_overrides_its_row_and_takes_what_belongs_to_it_along():
    def parse(line):
        return run.parse(train_grpo.Config, line.split())

    assert parse("--algo dapo --groups all").groups == "all"
    masked = parse("--algo dapo --bound mask")
    assert (1 - masked.clip_low, 1 + masked.clip_high) == (1 / 8, 8.0)
    truncated = parse("--algo dapo --bound truncate")
    assert truncated.clip_low is None and 1 + truncated.clip_high == 5.0
    assert parse("--algo rloo --kl-coef 0.1").kl == "k1_reward" and parse("--algo rloo --kl-coef 0.1 --kl k3").kl == "k3"
    assert parse("--kl-coef 0.1").kl == "k3" and parse("").kl is None


def test_weights_that_do_not_move_have_ratio_one_in_every_minibatch(tmp_path, monkeypatch):
    """Whatever the shuffle and the micro-batches: a ratio other than 1 is a policy that moved, never a rounding or a pad."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    start(train_grpo, GRPO + " --minibatches 3 --epochs 2 --micro-batch 1 --steps 2 --kl-coef 0.1", tmp_path / "still")
    for line in metrics(tmp_path / "still")[:-1]:
        assert 1 - 1e-5 < line["train/ratio_min"] <= line["train/ratio_max"] < 1 + 1e-5
        assert abs(line["train/kl"]) < 1e-9 and line["train/clipped_low"] == line["train/clipped_high"] == 0


def test_stale_rollouts_are_trained_on_that_many_steps_later(tmp_path):
    """The first steps only collect; then ratios leave 1 although there is one update per rollout."""
    start(train_grpo, GRPO + " --stale 2 --steps 4" + SELDOM, tmp_path / "stale")
    lines = metrics(tmp_path / "stale")
    assert ["train/lr" in line for line in lines] == [False, False, True, True, False]
    assert lines[2]["train/ratio_max"] < 1 + 1e-4 < lines[3]["train/ratio_max"]


def test_a_refreshed_reference_is_the_policy_of_that_step(tmp_path):
    start(train_grpo, GRPO + " --kl-coef 0.1 --refresh-reference 2 --steps 4" + SELDOM, tmp_path / "refreshed")
    kl = [line["train/kl"] for line in metrics(tmp_path / "refreshed")[:-1]]
    assert max(abs(kl[0]), abs(kl[2])) < 1e-6 < min(kl[1], kl[3])


def test_the_likelihood_term_learns_its_demonstrations(tmp_path):
    """With a coefficient that drowns the reward, the loss on new ones falls, whatever the micro-batches."""
    write_records(tmp_path / "new.jsonl", ({"prompt": f"Say {i}.", "answer": "x", "response": "So it is."} for i in range(20)))
    flags = GRPO.replace("wanted.jsonl", str(tmp_path / "new.jsonl")) + SELDOM + " --steps 6 --lr 1e-3 --likelihood-coef 100"
    losses = {}
    for size in (64, 1):
        start(train_grpo, flags, tmp_path / f"held{size}", "--micro-batch", str(size))
        losses[size] = [line["train/demonstration_loss"] for line in metrics(tmp_path / f"held{size}")[:-1]]
    assert losses[64][-1] < 0.8 * losses[64][0]
    assert losses[1] == pytest.approx(losses[64], rel=1e-3)
    assert "train/demonstration_loss" not in metrics("grpo")[0]


def test_a_self_check_that_fails_ends_the_run_with_one_sentence(tmp_path, monkeypatch, capsys):
    """... before anything is trained; --no-selfcheck goes on."""
    monkeypatch.setattr(train_grpo, "tolerance", lambda *_: 0.0)
    with pytest.raises(SystemExit) as exit:
        start(train_grpo, GRPO + " --selfcheck", tmp_path / "checked")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "first-step check: " in error and "--no-selfcheck" in error
    start(train_grpo, GRPO + " --steps 1", tmp_path / "unchecked")


def test_a_run_that_finds_no_contrast_is_saved_before_it_gives_up(tmp_path, monkeypatch, capsys):
    """Its checkpoint holds the steps that were done, and it goes on where contrast is found again."""
    def collect(*args, **kwargs):
        if kwargs["seed"] == run.derive(0, "rollout", 2):
            raise train_grpo.NoContrast("only 0 of 60 groups had contrast")
        return real(*args, **kwargs)

    real = train_grpo.collect
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(train_grpo, "collect", collect)
        start(train_grpo, GRPO + " --save-every 100", tmp_path / "run")
    assert exit.value.code == 2 and "had contrast" in capsys.readouterr().err
    assert run.load_checkpoint(tmp_path / "run")["step"] == 2
    start(train_grpo, "--resume", tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics("grpo")


@pytest.mark.parametrize("name", ["grpo-full", "group", "ppo", "rlhf", "online", "distill"])
def test_every_script_reads_rewards_through_the_gate(name, tmp_path, monkeypatch):
    """Where a task's rewards can be made floats and nothing else, the run is the same."""
    seal_rewards(monkeypatch)
    start(*SCRIPTS[name], tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(name)


class Letter(Task):
    """Say the letter x."""

    name, right, wrong = "letter", 1, 0

    def draw(self, rng):
        return Problem(f"Say {rng.randrange(99)}.", "x")

    def work(self, problem, rng):
        return "That is it. Answer: x"

    def verify(self, problem, response):
        return self.right if final_answer(response) == problem.answer else self.wrong


REWARDS = [(torch.tensor(0.7), np.float16(0.2)), (2, 1)]


@pytest.mark.parametrize(("script", "rewards"), [
    (train_grpo, [(True, False), (1, -1), (100, 0), *REWARDS]), (train_ppo, REWARDS), (train_group_dpo, REWARDS)],
    ids=["grpo", "ppo", "group"])
def test_a_task_of_ones_own_may_reward_as_it_likes(script, rewards, tmp_path, monkeypatch, capsys):
    """What is right, and how often, does not depend on what a right answer gets."""
    flags, lines = " --init sft --task letter --steps 1 --max-new-tokens 9 --eval-problems 12 --quiet --device cpu", []
    flags = f"--prompts 4 --group 4 {flags}" + " --best-of 4" * (script is not train_grpo)
    for n, values in enumerate([(1, 0), *rewards]):
        monkeypatch.setitem(TASKS, "letter", type("Own", (Letter,), dict(zip(("right", "wrong"), values, strict=True))))
        start(script, flags, tmp_path / str(n))
        lines.append(metrics(tmp_path / str(n))[0])
    plain, *own = lines
    judged = [name for name in plain if re.search("accuracy|correct|wrong|worked|direct|best_of_n", name)]
    assert 0 < plain["eval/accuracy_sampled"] < 1 and len(judged) > 5
    for n, (line, (right, wrong)) in enumerate(zip(own, rewards, strict=True), 1):
        assert {name: line[name] for name in judged} == {name: plain[name] for name in judged}
        assert line["rollout/reward"] == pytest.approx(
            float(wrong) + plain["rollout/reward"] * (float(right) - float(wrong)), rel=1e-3)
        if script is train_group_dpo:           # which reads nothing of a reward but whether it is right
            assert {name for name in plain if plain[name] != line[name]} <= {"rollout/reward"}
            assert same_parameters(tmp_path / "0", tmp_path / str(n))
    tables = re.findall(r"12 held-out problems.*?accuracy, greedy +(\S+)", capsys.readouterr().out, re.S)
    assert len(tables) == len(lines) and len(set(tables)) == 1


class Long(Letter):
    """The longer the better."""

    def verify(self, problem, response):
        return len(response)


def test_a_task_without_right_answers_is_practised_on_and_measured_by_its_reward(tmp_path, monkeypatch, capsys):
    """With a word about why there is no accuracy. What needs right answers refuses it; the first-step check wants the task's
    own word for it."""
    monkeypatch.setitem(TASKS, "letter", Long)
    flags = "--init sft --task letter --steps 1 --max-new-tokens 9 --eval-problems 6 --quiet --device cpu --prompts 4 --group 4"
    start(train_ppo, flags + " --best-of 2", tmp_path / "ppo")
    said = capsys.readouterr()
    assert "warning: the mean reward is measured, no accuracy: no answer to letter is right or wrong" in said.err
    assert "\n  reward  " in said.out and "accuracy" not in said.out
    assert {"eval/reward", "eval/best_of_n"} <= metrics(tmp_path / "ppo")[0].keys()
    start(train_sft, SFT.replace("--data letters.jsonl", "--task letter") + " --steps 1", tmp_path / "sft")
    assert "Held-out letter: a reward of " in capsys.readouterr().out
    for script, sentence in ((train_group_dpo, "right answers are set against wrong ones, but no answer to letter is right"),
                             (train_grpo, "first-step check: the verifier gives")):
        with pytest.raises(SystemExit):
            start(script, flags, tmp_path / script.__name__)
        assert sentence in capsys.readouterr().err
    monkeypatch.setattr(Long, "right_reward", None, raising=False)
    start(train_grpo, flags, tmp_path / "grpo")
    assert "eval/reward" in metrics(tmp_path / "grpo")[-1]


@pytest.mark.parametrize("flags", ["", " --algo dapo --group 8"])
def test_a_file_is_trained_on_row_by_row_also_by_a_run_that_was_stopped(flags, tmp_path, monkeypatch):
    """Every row once an epoch, in the order of the seed; resumed, it goes on with the row that was next."""
    write_records(tmp_path / "few.jsonl", ({"prompt": f"Say {n}.", "answer": "x"} for n in range(12)))
    flags = GRPO + f" --eval-every 99 --data {tmp_path / 'few.jsonl'}" + flags
    real, save, asked = train_grpo.collect, run.Run.save, []

    def collect(*args, **kwargs):
        monkeypatch.setattr("nanorl.rollout.sample_and_grade",
                            lambda *args, **kwargs: asked.extend(args[3]) or sample_and_grade(*args, **kwargs))
        return real(*args, **kwargs)

    def stop(self):
        save(self)
        if self.step == 2:
            raise SystemExit(0)

    monkeypatch.setattr(train_grpo, "collect", collect)
    start(train_grpo, flags + " --steps 5", tmp_path / "whole")
    rows = [f"Say {n}." for n in range(12) if not is_heldout(f"Say {n}.")]
    whole = [problem.prompt for problem in asked]
    epochs = [whole[i : i + len(rows)] for i in range(0, len(whole) - len(rows) + 1, len(rows))]
    assert epochs and all(sorted(epoch) == sorted(rows) for epoch in epochs)
    asked.clear()
    start(train_grpo, flags + " --steps 2 --seed 1", tmp_path / "other")
    assert [problem.prompt for problem in asked] != whole[: len(asked)]
    asked.clear()
    monkeypatch.setattr(run.Run, "save", stop)
    with pytest.raises(SystemExit):
        start(train_grpo, flags + " --steps 5", tmp_path / "stopped")
    monkeypatch.setattr(run.Run, "save", save)
    start(train_grpo, "--resume", tmp_path / "stopped")
    assert [problem.prompt for problem in asked] == whole
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("script", [train_grpo, train_ppo, train_group_dpo], ids=lambda script: script.__name__)
def test_tables_count_the_problems_that_were_asked(script, tmp_path, capsys):
    """And the start says which rows are held out. Of two, one is answered right greedily, so the accuracy is 0.5."""
    checkpoint = run.load_checkpoint("sft")
    model, tokenizer = run.model_from(checkpoint, torch.device("cpu")), run.tokenizer_from(checkpoint)
    held = [Problem(f"Say {n}.", "") for n in range(99) if is_heldout(f"Say {n}.")][:2]
    said = sample_and_grade(model, tokenizer, Letter(), held, Sampling(16, temperature=0.0)).texts
    answers = [final_answer(said[0]), "not this"]
    write_records(tmp_path / "q.jsonl", [{"prompt": p.prompt, "answer": a} for p, a in zip(held, answers, strict=True)]
                  + [{"prompt": f"Say {n}.", "answer": "x"} for n in (0, 1, 3)])
    flags = "--init sft --steps 1 --prompts 4 --group 4 --lr 1e-9 --max-new-tokens 16 --device cpu --quiet"
    flags += f" --data {tmp_path / 'q.jsonl'}" + " --best-of 0" * (script is not train_grpo)
    start(script, flags, tmp_path / "run")
    out = capsys.readouterr().out
    assert f"{tmp_path / 'q.jsonl'}: 3 rows to train on; 2 are held out, by the hash of their prompt" in out
    assert re.search(r"\n2 held-out problems .*accuracy, greedy +0.500 +0.500", out, re.S) and "500 held-out" not in out


def test_a_refreshed_reference_needs_no_file_to_resume(tmp_path):
    """The checkpoint has it: the run goes on without the model it started from."""
    shutil.copytree("sft", tmp_path / "sft")
    flags = GRPO.replace("--init sft", f"--init {tmp_path / 'sft'}") + " --kl-coef 0.1 --refresh-reference 1"
    start(train_grpo, flags, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_final_line(tmp_path / "cut")
    shutil.rmtree(tmp_path / "sft")
    start(train_grpo, "--resume --quiet", tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(("script", "flags"), [(train_grpo, GRPO + " --kl-coef 0.1"), (train_dpo, DPO)], ids=["grpo", "dpo"])
def test_a_run_resumed_between_two_refreshes_has_the_reference_of_the_first(script, flags, tmp_path, monkeypatch):
    """Stopped in the fourth step, after the refresh at the third: the rest is that of the uninterrupted run."""
    flags += " --steps 4 --refresh-reference 2"
    start(script, flags, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Run, "_write_line", lambda out, write=run.Run._write_line: exit() if out.step == 3 else write(out))
        start(script, flags, tmp_path / "stopped")
    start(script, "--resume", tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_the_running_mean_is_of_earlier_rewards(tmp_path):
    """The first step subtracts nothing; the second subtracts the first step's mean, and its own mean joins with weight 0.1."""
    start(train_grpo, GRPO + " --algo reinforce --advantage running_mean --steps 2", tmp_path / "run")
    first, second, _ = (line.get("rollout/reward", 0) for line in metrics(tmp_path / "run"))
    total, weight = run.load_checkpoint(tmp_path / "run")["state"]["running_mean"]
    assert weight == pytest.approx(0.19) and total == pytest.approx(0.09 * first + 0.1 * second, abs=1e-6)


def test_the_kl_to_the_reference_starts_at_zero_and_leaves_it(tmp_path):
    start(train_grpo, GRPO + " --kl-coef 0.1", tmp_path / "leash")
    first, second, third, _ = metrics(tmp_path / "leash")
    assert abs(first["train/kl"]) < 1e-6 < min(second["train/kl"], third["train/kl"])


def test_micro_batches_change_nothing_but_memory(tmp_path, monkeypatch):
    """Gradients of micro-batches add up to the step's: their norm before clipping agrees to rounding."""
    flags = GRPO + " --steps 1 --aggregate token_mean"
    start(train_grpo, flags, tmp_path / "whole")
    start(train_grpo, flags, tmp_path / "rows", "--micro-batch", "1")
    monkeypatch.setattr("nanorl.batches.LONG", 10)              # 4 rows at a time, but only 40 tokens
    start(train_grpo, flags, tmp_path / "tokens", "--micro-batch", "4")
    whole, *micro = (metrics(tmp_path / name)[0]["train/grad_norm_max"] for name in ("whole", "rows", "tokens"))
    assert micro == [pytest.approx(whole, rel=1e-4)] * 2 and whole > 0


@pytest.mark.parametrize("name", ["pretrain", "grpo"])
def test_recomputing_changes_nothing_but_memory(name, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    script, flags = SCRIPTS[name]
    start(script, flags, tmp_path / "again", "--recompute")
    assert metrics(tmp_path / "again") == metrics(name) and same_parameters(tmp_path / "again", name)


def test_the_stages_before_are_made_when_only_the_default_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script in (train_pretrain, train_sft):
        monkeypatch.setattr(script, "main", lambda cfg, script=script: made.append((script.__name__, cfg)))
    made = []
    with pytest.raises(SystemExit):              # our stand-in leaves no checkpoint behind
        start(train_grpo, "--task sorting --seed 5 --quiet --device cpu", "grpo")
    [(name, cfg)] = made
    assert (name, cfg.out, cfg.task, cfg.seed, cfg.device) == ("train_sft", "runs/sft-sorting", "sorting", 5, "cpu")
    assert "runs/sft-sorting is not there yet" in capsys.readouterr().out


def test_a_stage_that_was_cut_short_is_continued_first(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "letters.jsonl"):
        Path(name).write_bytes((world / name).read_bytes())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        save = run.Run.save

        def save_and_fall(self):
            save(self)
            raise KeyboardInterrupt

        patch.setattr(run.Run, "save", save_and_fall)
        start(train_pretrain, PRETRAIN, "runs/pretrain")
    assert run.load_checkpoint("runs/pretrain")["step"] == 1
    start(train_sft, SFT.replace("--init pretrain", ""), "sft")
    assert run.load_checkpoint("runs/pretrain")["step"] == 3
    assert metrics("runs/pretrain") == metrics(world / "pretrain")


@pytest.mark.parametrize(("name", "model"), [("dpo", "sft"), ("online", "reward"), ("group", "sft"), ("rlhf", "reward"),
                                             ("grpo-full", "sft"), ("distill", "grpo")])
def test_a_run_does_not_resume_with_another_model_than_it_began_with(name, model, world, tmp_path, monkeypatch, capsys):
    """The reference and the reward model are read again: one that was made anew in between would change everything."""
    monkeypatch.chdir(tmp_path)
    for path in world.iterdir():
        shutil.copytree(path, path.name) if path.name in (name, model) else Path(path.name).symlink_to(path)
    cut_final_line(name)
    checkpoint = run.load_checkpoint(model)
    next(iter(checkpoint["model"].values()))[0] += 1.0
    torch.save(checkpoint, Path(model, "ckpt.pt"))
    with pytest.raises(SystemExit) as exit:
        start(SCRIPTS[name][0], "--resume --quiet", name)
    assert exit.value.code == 2 and "has changed since this run began" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["", " --minibatches 2 --epochs 2 --advantage center --aggregate token_mean", " --algo raft"])
def test_skipping_rows_without_an_advantage_is_exact(flags, tmp_path, monkeypatch):
    """Some groups have no contrast: fewer tokens go through the model, and gradients and parameters are the same."""
    seen = {}
    for how in ("skip", "no-skip"):
        real, count = train_grpo.token_log_probs, []
        monkeypatch.setattr(train_grpo, "token_log_probs", lambda *args, real=real, count=count, **kw:
                            count.append(len(args[1])) or real(*args, **kw))
        start(train_grpo, GRPO + flags + f" --prompts 6 --{how}" + SELDOM, tmp_path / how)
        monkeypatch.setattr(train_grpo, "token_log_probs", real)
        seen[how] = sum(count)
    a, b = (metrics(tmp_path / how) for how in ("skip", "no-skip"))
    assert any(0 < line["rollout/no_contrast"] < 1 for line in a[:-1])
    assert seen["skip"] < seen["no-skip"] or flags == " --algo raft"        # which leaves them out anyway
    for x, y in zip(a[:-1], b[:-1], strict=True):
        assert x["train/grad_norm_max"] == pytest.approx(y["train/grad_norm_max"], rel=1e-4, abs=1e-9)
    x, y = (run.load_checkpoint(tmp_path / how)["model"] for how in ("skip", "no-skip"))
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=1e-4)


def test_a_step_whose_rows_are_all_skipped_changes_nothing(tmp_path):
    """Every answer to these questions is wrong: no gradient, no step, and the run goes on."""
    write_records(tmp_path / "wrong.jsonl", ({"prompt": f"Say {i}.", "answer": "no such answer"} for i in range(99)))
    start(train_grpo, GRPO.replace("wanted.jsonl", str(tmp_path / "wrong.jsonl")) + " --skip", tmp_path / "run")
    assert same_parameters(tmp_path / "run", "sft")
    assert all(line["train/grad_norm_max"] == 0 for line in metrics(tmp_path / "run")[:-1])


# ---- preferences ----


@pytest.mark.parametrize("name", ["reward", "dpo", "online", "group", "ppo", "distill", "taught"])
def test_micro_batches_of_pairs_groups_and_critics_add_up(name, tmp_path):
    (script, flags), norm = SCRIPTS[name], "train/grad_norm_max" if name == "ppo" else "train/grad_norm"
    for size in (1, 64):
        start(script, flags + f" --steps 1 --micro-batch {size}", tmp_path / str(size))
    small, large = (metrics(tmp_path / str(size))[0][norm] for size in (1, 64))
    assert small == pytest.approx(large, rel=1e-3) and large > 0


def test_identical_pairs_are_left_out_and_counted(tmp_path, capsys):
    """One of the 99 pairs prefers x to x."""
    start(train_reward, SCRIPTS["reward"][1] + " --steps 1", tmp_path / "run")
    assert "1 more have equal responses and are left out" in capsys.readouterr().out


def test_a_reward_model_learns_its_pairs_and_reports_what_it_is_worth(tmp_path, capsys):
    """x is always chosen over y: after a few steps it ranks held-out pairs, and so do word counts; length cannot."""
    start(train_reward, SCRIPTS["reward"][1] + SELDOM + " --steps 20", tmp_path / "run")
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    assert first["eval/pair_loss"] == pytest.approx(math.log(2)) and first["eval/agreement_model_labels"] == 0.5
    found = {name: last[f"eval/agreement_{name}_labels"] for name in ("model", "words", "length")}
    assert found == {"model": 1.0, "words": 1.0, "length": 0.5}
    assert "the reward model" in capsys.readouterr().out
    samples = run.read_lines(tmp_path / "run/samples.jsonl")
    assert all(is_heldout(record["prompt"]) and record["margin"] > 0 for record in samples) and samples


def test_log_probs_of_a_fixed_reference_are_the_same_scored_once_or_at_every_step(tmp_path):
    """A reference that would be refreshed after 100 steps is asked anew each time; the losses agree."""
    start(train_dpo, DPO + " --refresh-reference 100", tmp_path / "anew")
    once, anew = (metrics(name)[:-1] for name in ("dpo", tmp_path / "anew"))
    for a, b in zip(once, anew, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
        assert a["train/margin"] == pytest.approx(b["train/margin"], abs=1e-4)


def test_dpo_starts_at_log_2_moves_the_margin_and_starts_anew_when_its_reference_is_refreshed(tmp_path):
    start(train_dpo, DPO + SELDOM + " --steps 4 --refresh-reference 2 --lr 1e-3", tmp_path / "run")
    margins = [line["train/margin"] for line in metrics(tmp_path / "run")[:-1]]
    assert max(abs(margins[0]), abs(margins[2])) < 1e-5 < 1e-3 < min(margins[1], margins[3])
    assert metrics(tmp_path / "run")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("loss", train_dpo.LOSSES)
def test_every_loss_of_dpo_widens_the_margin(loss, tmp_path):
    start(train_dpo, DPO + SELDOM + f" --loss {loss} --steps 12 --micro-batch 8 --lr 1e-3 --nll-coef 0", tmp_path / "run")
    lines = metrics(tmp_path / "run")[:-1]
    assert lines[-1]["train/margin"] > lines[0]["train/margin"] and lines[-1]["train/loss"] < lines[0]["train/loss"]


@pytest.mark.parametrize("flags", ["--judge hidden", "--judge model --reward-model reward"])
def test_online_pairs_are_the_policys_own_and_ties_are_counted(flags, tmp_path, monkeypatch):
    """The judge's better answer is the chosen one; a share of pairs that it does not tell apart is left out."""
    seen = []
    real = train_dpo.judged_pairs
    monkeypatch.setattr(train_dpo, "judged_pairs", lambda scores: seen.append(scores) or real(scores))
    start(train_dpo, ONLINE + f" --steps 2 {flags}", tmp_path / "run")
    for line, scores in zip(metrics(tmp_path / "run")[:-1], seen, strict=True):
        assert line["rollout/ties"] == float((scores[:, 0] == scores[:, 1]).float().mean())
        assert ("train/loss" in line) == (line["rollout/ties"] < 1)


def test_a_judge_that_never_decides_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Stories, "verify", lambda *_: 0.0)
    start(train_dpo, ONLINE + " --steps 2 --judge hidden", tmp_path / "run")
    assert [line["rollout/ties"] for line in metrics(tmp_path / "run")[:-1]] == [1.0, 1.0]
    assert same_parameters(tmp_path / "run", "sft")


def test_a_judge_that_gives_no_number_ends_the_run(tmp_path, monkeypatch, capsys):
    """Neither a tie nor a preference: nan is not a reward."""
    monkeypatch.setattr(train_dpo, "learned_rewards", lambda model, rollout, _: torch.full((len(rollout.lengths),), torch.nan))
    with pytest.raises(SystemExit):
        start(train_dpo, SCRIPTS["online"][1], tmp_path / "run")
    assert "a reward of the model holds nan" in capsys.readouterr().err


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_critic_learns_what_answers_are_worth_with_or_without_a_trunk_of_its_own(critic, tmp_path):
    """All answers paid alike: the value loss falls towards zero; a shared trunk is the policy's in the checkpoint, too."""
    flags = PPO + SELDOM + f" --data wanted.jsonl --critic {critic} --steps 12 --lr 1e-3 --epochs 4 --value-clip 10"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanorl.tasks.FileTask.rewards", lambda _, problems, *__: [1.0] * len(problems))
        patch.setattr("nanorl.tasks.FileTask.scores_truncated", True)
        start(train_ppo, flags, tmp_path / "run")
    lines = metrics(tmp_path / "run")[:-1]
    assert lines[-1]["train/value_loss"] < 0.2 * lines[0]["train/value_loss"]
    checkpoint = run.load_checkpoint(tmp_path / "run")
    trunk = {name.removeprefix("trunk."): x for name, x in checkpoint["state"]["critic"].items() if name.startswith("trunk.")}
    assert all(torch.equal(trunk[name], x) for name, x in checkpoint["model"].items()) == (critic == "shared")


def test_ppo_with_weights_that_do_not_move_has_ratio_one_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    flags = " --steps 2 --data wanted.jsonl --minibatches 3 --epochs 2 --micro-batch 1 --kl-coef 0.1"
    start(train_ppo, PPO + flags, tmp_path / "still")
    for line in metrics(tmp_path / "still")[:-1]:
        assert 1 - 1e-5 < line["train/ratio_min"] <= line["train/ratio_max"] < 1 + 1e-5
        assert abs(line["train/answer_kl"]) < 1e-6 and line["train/clipped_low"] == line["train/clipped_high"] == 0


def test_only_unscored_answers_are_continued_by_the_critic(tmp_path, monkeypatch):
    """--truncated score: every answer has ended. --truncated bootstrap: those that were cut have not."""
    real, calls = train_ppo.credit, []
    monkeypatch.setattr(train_ppo, "credit", lambda rewards, ended, *args, **kwargs:
                        calls.append(ended) or real(rewards, ended, *args, **kwargs))
    for how in ("score", "bootstrap"):
        start(train_ppo, PPO + f" --data wanted.jsonl --steps 1 --max-new-tokens 2 --truncated {how}", tmp_path / how)
    assert calls[0].all() and not calls[1].all()
    assert metrics(tmp_path / "bootstrap")[0]["rollout/truncated"] == 1 - calls[1].float().mean()


def test_the_leash_of_ppo_steers_towards_its_target(tmp_path):
    """Far below the target, the coefficient falls by 2 % a step; a resumed run goes on from where it was."""
    start(train_ppo, PPO + SELDOM + " --data wanted.jsonl --kl-coef 0.1 --kl-target 1000", tmp_path / "run")
    assert [line["train/kl_coef"] for line in metrics(tmp_path / "run")[:-1]] == pytest.approx([0.1, 0.098, 0.09604])
    assert run.load_checkpoint(tmp_path / "run")["state"]["kl_coef"] == pytest.approx(0.0941192)


def test_groups_of_one_kind_train_nothing_and_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("nanorl.tasks.FileTask.rewards", lambda _, problems, *__: [1.0] * len(problems))
    monkeypatch.setattr("nanorl.tasks.FileTask.scores_truncated", True)
    start(train_group_dpo, GROUP + " --steps 2", tmp_path / "run")
    assert [line["rollout/no_contrast"] for line in metrics(tmp_path / "run")[:-1]] == [1.0, 1.0]
    assert same_parameters(tmp_path / "run", "sft")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_autocast_trains_on_a_cpu_with_weights_in_float32(name, tmp_path):
    """The norm of its first gradient is near that of float32, and not the same."""
    script, flags = SCRIPTS[name]
    start(script, flags + " --dtype bfloat16 --steps 1", tmp_path / "run")
    key = next(key for key in ("train/grad_norm", "train/grad_norm_max") if key in metrics(name)[0])
    half, whole = metrics(tmp_path / "run")[0][key], metrics(name)[0][key]
    assert half != whole and half == pytest.approx(whole, rel=0.5)
    assert all(x.dtype == torch.float32 for x in run.load_checkpoint(tmp_path / "run")["model"].values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize("name", ["pretrain", "tuned", "grpo-full", "reward", "dpo", "rlhf"])
def test_a_compiled_run_is_the_eager_run_but_for_rounding(name, tmp_path):
    """Its kept groups, too; except for which pairs the first policy ranks right: it is the reference still, and all its margins
    are rounding."""
    script, flags = SCRIPTS[name]
    start(script, flags, tmp_path / "compiled", "--compile", "--steps", "2")
    start(script, flags, tmp_path / "eager", "--no-compile", "--steps", "2")
    for compiled, eager in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), strict=True):
        assert compiled.keys() == eager.keys()
        for key in eager.keys() - ({"train/accuracy"} if eager["step"] == 0 else set()):
            assert compiled[key] == pytest.approx(eager[key], rel=1e-2, abs=1e-3), key

    def kept(kind, name):
        groups = run.read_lines(tmp_path / kind / "rollouts.jsonl")
        return [x for group in groups for answer in group["answers"] for one in answer["passes"] for x in one[name]]

    for column, near in (("logp", 1e-3), ("gradient", 1e-6)):
        assert kept("compiled", column) == pytest.approx(kept("eager", column), rel=1e-2, abs=near), column
    assert any(kept("compiled", "gradient")) == hasattr(script.Config, "keep_groups")


# ---- distillation ----


def test_a_student_learns_what_its_teacher_says(tmp_path, capsys):
    """The teacher has learned only text, its student says x or y: a few steps later, both divergences are smaller."""
    flags = DISTILL.replace("--steps 3", "--steps 12 --lr 2e-3").replace("--teacher grpo", "--teacher pretrain") + SELDOM
    start(train_distill, flags, tmp_path / "run")
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    for name in ("eval/forward_kl", "eval/reverse_kl"):
        assert 0 <= last[name] < first[name]
    assert "the teacher, sampled" in capsys.readouterr().out


def test_a_teachers_answers_that_cannot_be_scored_enter_no_mean(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "letter", type("Half", (Letter,), {"right": 1.0, "wrong": None, "right_reward": 1.0}))
    start(train_distill, DISTILL + SELDOM + " --task letter --steps 1 --eval-problems 12", tmp_path / "run")
    assert re.search(r"the teacher, sampled +1\.000", capsys.readouterr().out)


@pytest.mark.parametrize("on", ["data", "teacher", "student"])
def test_a_step_of_distillation_is_what_it_says(on, tmp_path):
    """From the two checkpoints alone: whose answers they are, the sum of KL(teacher || student) over an answer's tokens and its
    gradient, and both divergences of the evaluation, each in its direction and on its side's answers."""
    data = " --data letters.jsonl" if on == "data" else ""
    flags = DISTILL.replace("--steps 3", "--steps 1").replace("--teacher grpo", "--teacher pretrain")
    start(train_distill, flags + f" --on {on}{data}", tmp_path / "run")
    first, sampling = metrics(tmp_path / "run")[0], Sampling(16)
    tokenizer = run.tokenizer_from(run.load_checkpoint("sft"))
    models = student, teacher = [run.model_from(run.load_checkpoint(name), torch.device("cpu")) for name in ("sft", "pretrain")]
    task = make_task("addition")
    if on == "data":
        records = training_records("letters.jsonl", task)
        _, *rendered = render_records(records, tokenizer, 256, "letters.jsonl", "response")
        tokens, mask = response_batch(*rendered, shuffled_batch(len(records), 6, 0, 0), tokenizer.pad)
    else:
        rollout = collect(models[on == "teacher"], tokenizer, task, sampling, prompts=3, samples=2,
                          seed=run.derive(0, "rollout", 0)).rollout
        tokens, mask = rollout.tokens, rollout.mask
    total = (kl_divergence(teacher(tokens)[:, :-1].detach(), student(tokens)[:, :-1]) * mask).sum()
    (total / len(tokens)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    assert first["train/divergence"] == pytest.approx(total.item() / int(mask.sum()), rel=1e-4)
    assert first["train/grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    said = sample_and_grade(teacher, tokenizer, task, heldout_problems(task, 3, 0), sampling, seed=run.derive(0, "teacher"))
    _, own = evaluate_policy(student, tokenizer, task, sampling, problems=3, seed=0)
    forward = answer_kl(teacher, student, said.rollout, 1.0, 64)
    reverse = answer_kl(student, teacher, own.rollout, 1.0, 64)
    assert first["eval/forward_kl"] == pytest.approx(forward, rel=1e-4)
    assert first["eval/reverse_kl"] == pytest.approx(reverse, rel=1e-4) and abs(forward - reverse) > 1


def test_distillation_begins_at_zero_where_student_and_teacher_are_one(tmp_path):
    start(train_distill, DISTILL.replace("--teacher grpo", "--teacher sft --on student --divergence reverse"), tmp_path / "run")
    first = metrics(tmp_path / "run")[0]
    assert first["eval/forward_kl"] == first["eval/reverse_kl"] == 0 and first["train/divergence"] == pytest.approx(0, abs=1e-9)


def test_the_default_student_and_teacher_are_made_first(tmp_path, monkeypatch):
    """Each with the flags of this run; the paths that were typed are read before anything is made."""
    monkeypatch.chdir(tmp_path)
    made = []

    for script in (train_pretrain, train_sft, train_grpo):
        monkeypatch.setattr(script, "main", lambda cfg, script=script: made.append((script.__name__, cfg)))
    with pytest.raises(SystemExit):              # our stand-ins leave no checkpoint behind
        start(train_distill, "--task sums --seed 3 --quiet --device cpu", "new")
    names, configs = zip(*made, strict=True)
    assert names == ("train_grpo", "train_pretrain", "train_sft")
    assert [cfg.out for cfg in configs] == ["runs/grpo-sums", "runs/pretrain-pico", "runs/sft-pico-sums"]
    assert configs[1].preset == "pico" and configs[2].init == "runs/pretrain-pico"
    assert all((cfg.seed, cfg.quiet, cfg.device) == (3, True, "cpu") for cfg in configs)
    assert configs[0].task == configs[2].task == "sums"
