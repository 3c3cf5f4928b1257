"""A resumed run is the run that began: contents are compared, places are not; less memory changes nothing but rounding."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from world import ONE_OF_EACH, SCRIPTS, metrics, same_parameters, start

import train_dpo
from nanorl import run
from nanorl.run.flags import TO_ROUNDING

pytestmark = pytest.mark.usefixtures("inside")


def begin_and_stop(name, out, after, flags=None):
    """A run like that of the world, or with these flags, interrupted after so many steps."""
    script, own = SCRIPTS[name]
    real = run.Run.save

    def save(self):
        real(self)
        if self.step == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Run, "save", save)
        start(script, flags or own, out)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A function that puts a run of the world, interrupted after its first step, into a directory. Each is made once."""
    made = tmp_path_factory.mktemp("stopped")

    def stopped(name, out):
        if not (made / name).exists():
            begin_and_stop(name, made / name, 1)
        shutil.copytree(made / name, out)

    return stopped


def resume(name, out, flags=""):
    start(SCRIPTS[name][0], f"--resume {flags}", out)


def refused(name, out, flags, capsys):
    files = {path: path.read_bytes() for path in Path(out).iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        resume(name, out, flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in Path(out).iterdir()} == files
    return error


def close(a, b):
    """The same metrics, to rounding."""
    assert [line.keys() for line in a] == [line.keys() for line in b]
    return all(line == pytest.approx(other, rel=0.1, abs=0.1) for line, other in zip(a, b, strict=True))


@pytest.mark.parametrize("flags", ["--micro-batch 3", "--recompute", "--device auto", "--save-every 50", "--dtype bfloat16",
                                   "--data ./letters.jsonl", "--deterministic", "--micro-batch 1 --no-compile --save-every 7"])
def test_what_is_only_place_memory_rhythm_or_rounding_may_differ(flags, stopped, tmp_path, capsys):
    """And is kept: the next --resume goes on with it. What holds only to rounding is said."""
    stopped("tuned", tmp_path / "run")
    capsys.readouterr()
    resume("tuned", tmp_path / "run", flags)
    said = capsys.readouterr().out
    assert close(metrics(tmp_path / "run"), metrics("tuned"))
    rounded = [flag for flag in flags.split() if flag.removeprefix("--no-").strip("-").replace("-", "_") in TO_ROUNDING]
    assert ("to rounding" in said) == bool(rounded) and all(flag.replace("--no-", "--") in said for flag in rounded)
    config = json.loads((tmp_path / "run/config.json").read_text())
    flag, value = [*flags.split(), "True"][:2]
    assert str(config[flag.strip("-").replace("-", "_")]) == value
    assert config["resume"] is False and config["out"] == str(tmp_path / "run")


@pytest.mark.parametrize("name", ["grpo-full", "ppo", "dpo", "reward", "distill", "group"])
def test_a_run_that_was_out_of_memory_goes_on_with_smaller_micro_batches(name, stopped, tmp_path, capsys):
    stopped(name, tmp_path / "run")
    resume(name, tmp_path / "run", "--micro-batch 1 --recompute")
    assert close(metrics(tmp_path / "run"), metrics(name)) and "--micro-batch 1 --recompute True" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--lr 1", "--seed 3", "--batch 3", "--eval-every 7", "--task sorting", "--max-new-tokens 3",
                                   "--steps 2", "--eval-problems 4", "--tokenizer x"])
def test_what_changes_results_may_not_differ(flags, stopped, tmp_path, capsys):
    stopped("tuned", tmp_path / "run")
    if "tokenizer" in flags:
        assert "--tokenizer" in refused("tuned", tmp_path / "run", flags, capsys)
    else:
        assert f"{flags.split()[0]} " in refused("tuned", tmp_path / "run", flags, capsys)


def test_a_run_that_was_killed_before_its_first_checkpoint_may_save_more_often(tmp_path):
    """As many lines as there are say nothing about another rhythm: they are begun again."""
    script, flags = SCRIPTS["reward"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Run, "save", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        start(script, flags + " --save-every 2", tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2 and not (tmp_path / "run/ckpt.pt").exists()
    resume("reward", tmp_path / "run", "--save-every 1")
    assert metrics(tmp_path / "run") == metrics("reward") and same_parameters(tmp_path / "run", "reward")


# ---- contents and places ----


def rewritten(name, change, folder):
    """A file with the records of another, changed; returns its path."""
    records = [json.loads(line) for line in Path(name).read_text().splitlines()]
    (folder / name).write_text(change(records), newline="")
    return folder / name


def lines(records, end="\n"):
    return "".join(json.dumps(record) + end for record in records)


SAME = {"moved": lines, "blank lines": lambda records: lines(records, "\n\n"),
        "Windows": lambda records: lines(records, "\r\n"),
        "a byte order mark": lambda records: "\ufeff" + lines(records),
        "one array": lambda records: json.dumps(records, indent=1),
        "keys the other way round": lambda records: lines(dict(reversed(record.items())) for record in records)}
OTHER = {"lost rows": lambda records: lines(records[:-1]), "another order": lambda records: lines(records[::-1]),
         "a row twice": lambda records: lines([*records, records[0]]),
         "another word": lambda records: lines([records[0] | {"prompt": "Say 99."}, *records[1:]])}


@pytest.mark.parametrize(("change", "name", "data"), [
    ("moved", "tuned", "letters.jsonl"), ("moved", "grpo", "wanted.jsonl"), ("one array", "grpo", "wanted.jsonl"),
    ("keys the other way round", "taught", "letters.jsonl"), *((change, "reward", "pairs.jsonl") for change in SAME)])
def test_a_data_file_is_its_records_wherever_and_however_they_are_written(name, data, change, stopped, tmp_path):
    stopped(name, tmp_path / "run")
    resume(name, tmp_path / "run", f"--data {rewritten(data, SAME[change], tmp_path)}")
    assert metrics(tmp_path / "run") == metrics(name) and same_parameters(tmp_path / "run", name)


@pytest.mark.parametrize(("change", "name", "data"), [
    ("lost rows", "tuned", "letters.jsonl"), ("lost rows", "ppo", "wanted.jsonl"), ("another order", "taught", "letters.jsonl"),
    *((change, "reward", "pairs.jsonl") for change in OTHER)])
def test_a_data_file_of_other_contents_is_another_run(name, data, change, stopped, tmp_path, capsys):
    """In its old place, too, where no flag tells."""
    stopped(name, tmp_path / "run")
    other = rewritten(data, OTHER[change], tmp_path)
    assert f"--data {other}: has changed" in refused(name, tmp_path / "run", f"--data {other}", capsys)
    shutil.copy(data, tmp_path / "original")
    shutil.copy(other, data)
    try:
        assert f"--data {data}: has changed" in refused(name, tmp_path / "run", "", capsys)
    finally:
        shutil.copy(tmp_path / "original", data)


def test_a_text_is_its_contents(stopped, tmp_path, capsys):
    stopped("pretrain", tmp_path / "run")
    text = Path("text.txt").read_text()
    (tmp_path / "other.txt").write_text(text + "x")
    other = f"--text {tmp_path / 'other.txt'}"
    assert f"{other}: has changed since" in refused("pretrain", tmp_path / "run", other, capsys)
    (tmp_path / "same.txt").write_text("\ufeff" + text)
    resume("pretrain", tmp_path / "run", f"--text {tmp_path / 'same.txt'}")
    assert metrics(tmp_path / "run") == metrics("pretrain") and same_parameters(tmp_path / "run", "pretrain")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_no_default_is_a_place_on_this_machine(name):
    """A project folder that was moved holds runs that go on."""
    script = SCRIPTS[name][0]
    assert [value for value in vars(script.Config()).values() if isinstance(value, str) and Path(value).is_absolute()] == []


def test_the_models_of_a_run_may_move_but_not_change(stopped, tmp_path, capsys):
    """A teacher, and the reference that --init becomes; an --init that is not read again is no flag of a resumed run."""
    for name, flag, model, other in (("distill", "teacher", "grpo", "sft"), ("grpo-full", "init", "sft", "grpo")):
        stopped(name, tmp_path / name)
        assert f"--{flag} {other}: has changed since" in refused(name, tmp_path / name, f"--{flag} {other}", capsys)
        shutil.copytree(model, tmp_path / "moved", dirs_exist_ok=True)
        resume(name, tmp_path / name, f"--{flag} {tmp_path / 'moved'}")
        assert metrics(tmp_path / name) == metrics(name) and same_parameters(tmp_path / name, name)
    stopped("tuned", tmp_path / "tuned")
    assert "--init grpo: " in refused("tuned", tmp_path / "tuned", "--init grpo", capsys)


def test_a_resumed_run_stays_locked(stopped, tmp_path):
    """Although its config.json has been written again."""
    stopped("pretrain", tmp_path / "run")
    code = f"import fcntl; fcntl.lockf(open({str(tmp_path / 'run/config.json')!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    real, codes = run.Run.save, []

    def save(self):
        real(self)
        codes.append(subprocess.run([sys.executable, "-c", code], capture_output=True).returncode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "save", save)
        resume("pretrain", tmp_path / "run", "--save-every 2")
    assert codes == [1, 1]


# ---- more steps ----


@pytest.mark.parametrize("name", ["stale", "dpo", "rlhf", "reinforce"])
def test_a_finished_run_with_more_steps_is_the_longer_run(name, tmp_path):
    """Where the rate is constant: bit for bit, with the reference, the critic and the queue that it had."""
    script, flags = SCRIPTS[name]
    start(script, f"{flags} --steps 5", tmp_path / "whole")
    shutil.copytree(name, tmp_path / "run")
    resume(name, tmp_path / "run", "--steps 5")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole") and same_parameters(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 5


def rates(out):
    return [line["train/lr"] for line in metrics(out) if "train/lr" in line]


def test_a_warmup_stays_as_long_as_it_was(tmp_path):
    """Two of the first twenty steps. Of four hundred it would be forty: no rate falls back to what it was in the past."""
    start(train_dpo, SCRIPTS["dpo"][1] + " --steps 20 --eval-every 99 --batch 2", tmp_path / "run")
    before = rates(tmp_path / "run")
    begin_and_stop("dpo", tmp_path / "run", 23, "--resume --steps 400")
    begin_and_stop("dpo", tmp_path / "run", 25, "--resume --steps 500")
    assert rates(tmp_path / "run") == before + [max(before)] * 5 and before[0] < before[1] == max(before)


@pytest.mark.parametrize("after", [3, 19])
def test_a_run_that_was_stopped_before_its_rate_falls_may_get_more_steps(after, tmp_path):
    begin_and_stop("sft", tmp_path / "run", after, f"{SCRIPTS['sft'][1]} --save-every {after}")
    past = rates(tmp_path / "run")
    resume("sft", tmp_path / "run", "--steps 60 --save-every 60")
    after_all = rates(tmp_path / "run")
    assert after_all[: len(past)] == past == rates("sft")[: len(past)]
    assert after_all[4:31] == [max(past + after_all)] * 27 and after_all[31] < max(after_all) and len(after_all) == 60


@pytest.mark.parametrize("name", ["sft", "pretrain", "reward", "distill"])
def test_a_rate_that_has_begun_to_fall_cannot_be_what_it_was_in_a_longer_run(name, tmp_path, capsys):
    shutil.copytree(name, tmp_path / "run")
    error = refused(name, tmp_path / "run", "--steps 99", capsys)
    assert "--steps 99" in error and "begun to fall" in error and f"--init {tmp_path / 'run'}" in error
    assert "--steps 2" in refused(name, tmp_path / "run", "--steps 2", capsys)
