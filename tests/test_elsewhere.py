"""A script is there to be copied, changed and run from any folder; and the package can be installed without this checkout."""

import importlib
import os
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from world import GRPO, ROOT, metrics, start

import train_grpo
import train_pretrain
import train_sft
from nanorl import family, run

FLAGS = "--steps 2 --prompts 2 --group 2 --eval-problems 2 --max-new-tokens 16 --quiet --device cpu"
LOSS = "return -(weights * surrogate).sum(), metrics"
DOUBLED = 'metrics["train/mine"] = 2.0 * mask.sum()\n    return -2.0 * (weights * surrogate).sum(), metrics'
NO_STORIES = ('stories=not cfg.data and ".py:" not in cfg.task', "stories=False")
TINY_STAGES = {
    "train_pretrain": [(f"steps: run.Count = {train_pretrain.Config().steps}", "steps: run.Count = 2"),
                       ('text: str = ""', 'text: str = "text.txt"'), ('= "nano"', '= "pico"'),
                       ("vocab_size: run.Count = 512", "vocab_size: run.Count = 300")],
    "train_sft": [(f"steps: run.Count = {train_sft.Config().steps}", "steps: run.Count = 3"),
                  ("run.Count = 20_000", "run.Count = 50"), ("eval_problems: run.Count = 500", "eval_problems: run.Count = 2")]}


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def copy(script, path, *changes):
    """A copy of a script in which each change, (old, new), is made once."""
    text = (ROOT / f"{script}.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


def run_there(folder, script, flags):
    return subprocess.run([sys.executable, script, *flags.split()], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_changed_copy_makes_its_stages_by_the_scripts_beside_it(elsewhere):
    """From nothing, in a folder that the checkout knows nothing of: the loss and the stages are those of the copies."""
    (elsewhere / "text.txt").write_text((ROOT / "data/text.txt").read_text()[:20_000])
    copy("train_grpo", elsewhere / "mine.py", (LOSS, DOUBLED), NO_STORIES)
    for name, changes in TINY_STAGES.items():
        copy(name, elsewhere / f"{name}.py", *changes)
    result = run_there(elsewhere, "mine.py", FLAGS)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in (elsewhere / "runs").iterdir()} == {"pretrain", "sft", "grpo"}
    assert [run.load_checkpoint(elsewhere / "runs" / name)["step"] for name in ("pretrain", "sft", "grpo")] == [2, 3, 2]
    assert [line["train/mine"] for line in metrics(elsewhere / "runs/grpo")[:-1]] == [2.0, 2.0]


def test_a_changed_copy_starts_from_a_run_that_is_named(world, elsewhere, monkeypatch):
    """No other stage is made, and its loss is the changed one: of twice the surrogate, the gradient is twice as large."""
    copy("train_grpo", elsewhere / "mine.py", (LOSS, DOUBLED), NO_STORIES)
    monkeypatch.chdir(elsewhere)
    monkeypatch.syspath_prepend(elsewhere)
    flags = GRPO.replace("wanted.jsonl", str(world / "wanted.jsonl")).replace("--init sft", f"--init {world / 'sft'}")
    start(importlib.import_module("mine"), flags, "out")
    assert {p.name for p in elsewhere.iterdir()} - {"__pycache__"} == {"mine.py", "out"}
    mine, before = (metrics(out)[0]["train/grad_norm_max"] for out in (elsewhere / "out", world / "grpo"))
    assert mine == pytest.approx(2 * before, rel=1e-4) and before > 0


def test_a_bound_and_an_advantage_of_ones_own_are_entries_that_flags_then_accept(monkeypatch, capsys):
    monkeypatch.setitem(family.BANDS, "tanh", (None, 0.3))
    monkeypatch.setitem(family.ADVANTAGES, "mine", lambda rewards, valid=None: rewards)
    cfg = run.parse(train_grpo.Config, ["--bound", "tanh", "--advantage", "mine", "--init", "x"])
    assert (cfg.bound, cfg.clip_low, cfg.clip_high, cfg.advantage) == ("tanh", None, 0.3, "mine")
    with pytest.raises(SystemExit):
        run.parse(train_grpo.Config, ["--bound", "sinh"])
    assert "tanh" in capsys.readouterr().err


def test_a_value_error_in_an_objective_is_raised_as_it_is(inside, tmp_path, monkeypatch):
    def objective(*_, **__):
        raise ValueError("my own mistake")

    monkeypatch.setattr(train_grpo, "objective", objective)
    with pytest.raises(ValueError, match="my own mistake") as error:
        start(train_grpo, GRPO, tmp_path / "run")
    assert error.traceback[-1].name == "objective"


def test_a_user_error_in_an_objective_is_a_sentence(inside, tmp_path, monkeypatch, capsys):
    def objective(*_, **__):
        raise run.UserError("--mine 3: is too many")

    monkeypatch.setattr(train_grpo, "objective", objective)
    with pytest.raises(SystemExit) as exit:
        start(train_grpo, GRPO, tmp_path / "run")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "error: --mine 3: is too many" in error


def test_a_stage_is_the_script_beside_the_running_one_then_the_checkouts_then_a_sentence(elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(elsewhere / "mine.py")])
    monkeypatch.chdir(elsewhere)
    assert run.start.find_script("train_sft").__file__ == str(ROOT / "train_sft.py")
    monkeypatch.setattr("nanorl.run.start.CHECKOUT", elsewhere.parent)
    with pytest.raises(SystemExit) as exit:
        train_grpo.main(run.parse(train_grpo.Config, FLAGS.split()))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and not list(elsewhere.iterdir())
    for named in ("train_sft.py", str(elsewhere), "--init"):
        assert named in error


@pytest.mark.skipif(not all(map(PathFinder.find_spec, ("pip", "setuptools"))), reason="installs offline, by pip and setuptools")
def test_the_installed_package_is_whole_and_imports_from_any_folder(elsewhere):
    """Not editable, from a copy without the scripts and data: every module of it, and only those, is there."""
    source, target = elsewhere.parent / "source", elsewhere.parent / "target"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nanorl", source / "nanorl", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile",
                    "--disable-pip-version-check", "--target", target, source], check=True, capture_output=True)
    modules, installed = ({p.relative_to(folder) for p in (folder / "nanorl").rglob("*.py")} for folder in (ROOT, target))
    assert installed == modules
    packages = [".".join(path.parent.parts) for path in modules if path.name == "__init__.py"]
    code = f"import {', '.join(packages)}; print(nanorl.__file__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(target)})
    assert result.stdout.strip() == str(target / "nanorl/__init__.py"), result.stderr
    assert Path(target / "nanorl/run/flags.py").read_bytes() == (ROOT / "nanorl/run/flags.py").read_bytes()
