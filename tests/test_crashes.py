"""Nothing is lost: a run that is killed, stopped, interrupted or out of disk space goes on as if nothing had happened."""

import errno
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from world import GRPO, ONE_OF_EACH, PRETRAIN, SCRIPTS, exit_code, files_of, metrics, rollouts, same_parameters, start

import train_grpo
import train_pretrain
from nanorl import run

pytestmark = pytest.mark.usefixtures("inside")
MOMENTS = ("write", "sync", "rename")


class Crash(BaseException):
    """An end that no `except Exception` stops."""


def crash_at(moment, patch, when=lambda path: True, crash=Crash):
    """From now on, `write_atomically` ends at this moment: with half of the bytes, before the sync, or before the rename."""
    real = run.write_atomically

    def write_atomically(path, write):
        def half(f):
            write(f)
            f.flush()
            f.truncate(f.tell() // 2)
            raise crash

        def fail(*_):
            raise crash

        if not when(path):
            return real(path, write)
        with pytest.MonkeyPatch.context() as inner:
            if moment != "write":
                inner.setattr(os, {"sync": "fsync", "rename": "replace"}[moment], fail)
            return real(path, half if moment == "write" else write)

    for module in (run, run.checkpoint, run.directory):
        patch.setattr(module, "write_atomically", write_atomically)


# ---- one file ----


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_file_is_the_old_one_or_the_new_one(moment, tmp_path, monkeypatch):
    path = tmp_path / "file"
    run.write_atomically(path, lambda f: f.write(b"old"))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(moment, patch)
        run.write_atomically(path, lambda f: f.write(b"the new content"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
    run.write_atomically(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_keeps_the_old_file_and_frees_what_it_took(tmp_path):
    """Also when torch is writing, which may say it in its own words."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for write in (lambda f: f.write(b"x" * 10**6), lambda f: torch.save({"x": torch.ones(10**6)}, f)):
        (tmp_path / "file.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as error:
            run.write_atomically(path, write)
        assert error.value.errno == errno.ENOSPC
        assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"


# ---- a run ----


def finish(script, out, flags):
    """Go on with a run, or begin it where it did not get as far as its config.json."""
    start(script, "--resume --quiet" if Path(out, "config.json").exists() else flags, out)


@pytest.mark.parametrize(("name", "moment"), [("pretrain", "write"), ("stale", "sync"), ("reward", "rename")])
def test_a_crash_inside_any_write_of_a_run_loses_nothing(name, moment, tmp_path):
    """The config and each of the three checkpoints: in the middle of every one, and again when the run is resumed."""
    script, flags = SCRIPTS[name]
    for count in range(4):
        out, writes = tmp_path / f"run{count}", iter(range(100))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            crash_at(moment, patch, lambda path, n=count, writes=writes: next(writes) == n)
            start(script, flags, out)
        steps = run.load_checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0
        assert steps == max(0, count - 1)
        if (out / "config.json").exists():
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
                crash_at(moment, patch)
                start(script, "--resume --quiet", out)
            assert (run.load_checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0) == steps
        finish(script, out, flags)
        assert metrics(out) == metrics(name) and same_parameters(out, name)


@pytest.mark.parametrize(("name", "bad", "number"), [
    *zip(ONE_OF_EACH, [torch.nan, torch.inf] * 4, [signal.SIGINT, signal.SIGTERM] * 4, strict=True)])
def test_a_run_that_is_stopped_in_its_second_step_goes_on_whatever_stopped_it(name, bad, number, tmp_path, capsys):
    """A gradient with an entry that is not finite; then, resumed, a disk without space for the checkpoint; then Ctrl-C or
    SIGTERM, which finish the step. One sentence names what was wrong and the checkpoint that is whole; in the end it is the
    run that was left alone."""
    (script, flags), out = SCRIPTS[name], tmp_path / "run"
    real_step, save, line, saved, named = run.Optimizers.step, run.Run.save, run.Run._write_line, [], []

    def step(self, lr, grad_clip):
        if saved and not named:
            key, p = next((key, p) for key, p in self.named if p.grad is not None)
            p.grad.view(-1)[0] = bad
            named.append(key)
        return real_step(self, lr, grad_clip)

    def stopped(flags):
        with pytest.raises(SystemExit) as exit:
            start(script, flags, out)
        assert not list(out.glob("*.tmp"))
        return exit.value.code, capsys.readouterr().err, run.load_checkpoint(out)["step"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Optimizers, "step", step)
        patch.setattr(run.Run, "save", lambda self: (save(self), saved.append(1)))
        code, error, done = stopped(flags)
    assert (code, error.count("\n"), done) == (2, 1, 1)
    assert f"after 1 of 3 steps: the gradient of {named[0]} holds {bad}" in error and "has the first 1" in error

    with pytest.MonkeyPatch.context() as patch:
        crash_at("write", patch, lambda path: path.name == "ckpt.pt", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        code, error, done = stopped("--resume --quiet")
    assert (code, error.count("\n"), done) == (2, 1, 1)
    assert "No space left on device" in error and "after 2 of" in error and "ckpt.pt, has the first 1" in error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "_write_line", lambda self: (self.step == 1 and os.kill(os.getpid(), number), line(self)))
        code, _, done = stopped("--resume --quiet --save-every 100")
    assert (code, done) == (128 + number, 2)

    start(script, "--resume --quiet", out)
    assert metrics(out) == metrics(name) and same_parameters(out, name)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are Unix's")
def test_a_disk_that_ends_in_the_middle_of_a_checkpoint(tmp_path, capsys):
    """A limit on the size of files, below that of the second checkpoint: torch is stopped in the middle of a tensor."""
    import resource
    script, flags = SCRIPTS["pretrain"]
    real, before = run.Run.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self):
        if self.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        real(self)

    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
            patch.setattr(run.Run, "save", save)
            start(script, flags, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "File too large" in error and "has the first 1" in error
    assert not list((tmp_path / "run").glob("*.tmp"))
    start(script, "--resume --quiet", tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics("pretrain") and same_parameters(tmp_path / "run", "pretrain")


def test_a_full_disk_in_the_middle_of_a_line_leaves_no_torn_line(tmp_path, monkeypatch, capsys):
    """Half of the third step's line is written; resumed, the file is that of a run left alone."""
    real = run.Run._append

    def append(self, name, record):
        if name == "metrics.jsonl" and record["step"] == 2:
            with open(self.out / name, "a") as f:
                f.write('{"step": 2, "tra')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, name, record)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(run.Run, "_append", append)
        start(train_pretrain, PRETRAIN, tmp_path / "run")
    assert exit.value.code == 2 and "No space left" in capsys.readouterr().err
    start(train_pretrain, "--resume --quiet", tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics("pretrain")


def test_ctrl_c_outside_of_the_steps_is_one_sentence(tmp_path, monkeypatch, capsys):
    """In the last evaluation, after the last checkpoint: nothing but that is left to do."""
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(run.Run, "finish", interrupt)
        start(train_pretrain, PRETRAIN, tmp_path / "run")
    error = capsys.readouterr().err
    assert exit.value.code == 130 and error.count("\n") == 1 and "interrupted" in error and "has the first 3" in error
    start(train_pretrain, "--resume --quiet", tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics("pretrain")


# ---- numbers gone wrong ----


@pytest.mark.parametrize("name", ["grpo", "online", "group", "ppo", "tuned", "pretrain"])
def test_a_logit_that_is_not_finite_stops_the_run(name, tmp_path, monkeypatch, capsys):
    """The head of the policy breaks after a step, before an evaluation: the next sample notices, greedy or not."""
    script, flags = SCRIPTS[name]
    real = run.Run.save

    def save(self):
        real(self)
        if self.step == 2:
            with torch.no_grad():
                self.model.head.weight[7] = torch.nan

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(run.Run, "save", save)
        start(script, flags, tmp_path / "run")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "has the first 2" in error
    assert "a logit of the policy is nan or inf" in error or "train/loss is nan" in error or "eval/text_loss is nan" in error


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    """Broken behind the optimizer's back, in the step before a checkpoint."""
    real = run.Optimizers.step

    def step(self, lr, grad_clip):
        norm = real(self, lr, grad_clip)
        with torch.no_grad():
            self.named[0][1][0] = torch.nan
        return norm

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(run.Optimizers, "step", step)
        start(train_grpo, GRPO, tmp_path / "run")
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert "model.embedding.weight holds nan" in error and "no checkpoint has been written yet" in error
    assert not (tmp_path / "run/ckpt.pt").exists()


# ---- a hundred kills ----


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(rng):
    """How this process dies: at a random moment, or in the n-th write, sync or rename."""
    how, n = rng.choice(["clock", "SIGTERM", "write", "fsync", "replace"]), rng.randrange(12)
    if how in ("clock", "SIGTERM"):
        signal.signal(signal.SIGALRM, kill if how == "clock" else lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.01, 1.0))
    elif how == "write":
        save, count = torch.save, iter(range(100))

        def half(checkpoint, f):
            save(checkpoint, f)
            if next(count) == n % 3:
                f.flush()
                f.truncate(f.tell() // 2)
                kill()

        torch.save = half
    else:
        real, count = getattr(os, how), iter(range(1000))
        setattr(os, how, lambda *args: (next(count) == n and kill(), real(*args)))


def armed(seed, name, out, flags):
    """A run, in a process of its own, that may die."""
    arm(random.Random(seed))
    start(SCRIPTS[name][0], flags, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_hundred_kills_lose_nothing(name, tmp_path):
    """Eight ends for each of the runs, by SIGKILL or SIGTERM at a random moment or by SIGKILL inside a write, sync or rename;
    then it goes on to its end, and is the run that was left alone. No kill costs a checkpoint, none leaves a torn line."""
    script, flags = SCRIPTS[name]
    out, rng, ends, kept = tmp_path / "run", random.Random(name), [], 0
    while len([code for code in ends if code]) < 8 and len(ends) < 40:
        argv = "--resume --quiet" if (out / "config.json").exists() else flags
        ends.append(exit_code(armed, str(rng.randrange(10**9)), name, out, argv))
        assert ends[-1] in (0, -9, 143, -15), (name, ends)
        before, kept = kept, run.load_checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0
        assert kept >= before
        run.read_lines(out / "metrics.jsonl")
        if ends[-1] == 0:                                   # it was faster than its end: once more
            assert metrics(out) == metrics(name) and same_parameters(out, name)
            shutil.rmtree(out)
            kept = 0
    assert len([code for code in ends if code]) == 8, ends
    if not (out / "ckpt.pt").exists() or metrics(out)[-1]["step"] < run.load_checkpoint(out)["config"]["steps"]:
        finish(script, out, flags)
    assert metrics(out) == metrics(name) and same_parameters(out, name) and rollouts(out) == rollouts(name)
    assert {p.name for p in out.iterdir()} == files_of(name)


# ---- metrics gone wrong ----


@pytest.mark.parametrize(("name", "metric", "bad"), [
    ("grpo-full", "train/kl", torch.inf), ("dpo", "train/margin", torch.nan), ("ppo", "train/answer_kl", -torch.inf),
    ("grpo", "eval/worked", torch.nan), ("reward", "eval/margin", torch.inf), ("pretrain", "eval/perplexity", torch.nan)])
def test_a_metric_that_is_not_finite_is_null_and_the_run_goes_on(name, metric, bad, tmp_path, monkeypatch, capsys):
    """Everything else of metrics.jsonl, and the weights, are what they would be; one warning, and the tables show a dash."""
    script, flags = SCRIPTS[name]
    real = run.Run.log

    def log(self, metrics, show=()):
        real(self, metrics | ({metric: bad} if metric in metrics else {}), show)

    monkeypatch.setattr(run.Run, "log", log)
    start(script, flags, tmp_path / "run", "--no-quiet")
    out, error = capsys.readouterr()
    lines, expected = metrics(tmp_path / "run"), metrics(name)
    assert error.count(f"{metric} is {bad} in step ") == 1 and "Traceback" not in error and "nan" not in out
    assert sum(metric in line for line in expected) >= 1
    assert lines == [line | ({metric: None} if metric in line else {}) for line in expected]
    assert same_parameters(tmp_path / "run", name)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_the_run(bad, tmp_path, monkeypatch, capsys):
    """A loss is what a metric's name calls so, also one of your own, and in an evaluation."""
    script, flags = SCRIPTS["dpo"]
    real = run.Run.log
    for metric in ("train/loss", "eval/pair_loss", "train/my_loss"):
        monkeypatch.setattr(run.Run, "log", lambda self, metrics, show=(), m=metric: real(self, metrics | {m: bad}, show))
        with pytest.raises(SystemExit) as exit:
            start(script, flags, tmp_path / metric)
        assert exit.value.code == 2 and f"{metric} is {bad}" in capsys.readouterr().err
