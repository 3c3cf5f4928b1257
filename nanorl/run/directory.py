"""The directory of a run, and the loop over its steps. Whatever happens, nothing before the last checkpoint is lost."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from nanorl.errors import UserError, exit_with, printable, user_errors_as_sentences
from nanorl.files import parse_object
from nanorl.lora import has_adapters
from nanorl.run import ranks
from nanorl.run.checkpoint import check_finite, digest, load_checkpoint, save_checkpoint, trained_state, write_atomically
from nanorl.run.device import round_frozen
from nanorl.run.flags import TO_ROUNDING, RunConfig, flag_of, read_config
from nanorl.run.optimizer import Optimizers, schedule
from nanorl.tokenizer import Tokenizer


LOGS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")         # lines with a step


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file of a run. An unfinished last line was torn by a kill; it is ignored."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse_object(line, f"{path}, line {number}", "an object with a step")
        if type(record.get("step")) is not int:
            raise UserError(f"{path}, line {number}: its step is {record.get('step')!r}; expected a whole number")
        records.append(record)
    return records


def _locked(path: Path) -> Any:
    """The open file, which no other process gets as long as this one lives: two that write one run would ruin it."""
    f = open(path, "r+")            # noqa: SIM115      the lock lasts as long as the file is open
    if os.name == "posix":
        import fcntl
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{path.parent}: another process is at work on this run") from None
        except OSError:
            pass                    # a file system without locks
    return f


def script(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """For a script's main(cfg): turns the usual early ends of a run into one sentence that also says what was saved.

    A UserError is the user's. A number that is nan or inf (FloatingPointError), a full disk (OSError) and Ctrl-C outside of the
    steps end the run: nothing that is not finite is ever saved, and the last good checkpoint stays. Anything else, such as a
    ValueError in an objective of your own, keeps its traceback. A finished run, which has both its last checkpoint and the
    line of step cfg.steps, has nothing to resume. Where the doctor finds that a run went wrong, its last line says so.
    """
    @user_errors_as_sentences
    @functools.wraps(main)
    def wrapper(cfg: RunConfig) -> None:
        checkpoint, metrics = Path(cfg.out, "ckpt.pt"), Path(cfg.out, "metrics.jsonl")
        try:
            saved_all = cfg.resume and checkpoint.exists() and load_checkpoint(checkpoint)["step"] >= cfg.steps
            if saved_all and any(line["step"] == cfg.steps for line in read_lines(metrics)):
                if os.environ.get("RANK", "0") == "0":          # torchrun's processes have not met yet
                    print(f"{cfg.out} is finished: {cfg.steps} steps.")
                raise SystemExit(0)
            main(cfg)
        except (FloatingPointError, OSError, KeyboardInterrupt) as e:
            what, code = ("interrupted", 130) if isinstance(e, KeyboardInterrupt) else (e, 2)
            saved = "no checkpoint has been written yet"
            if checkpoint.exists():
                saved = f"the last good checkpoint, {checkpoint}, has the first {load_checkpoint(checkpoint)['step']}"
            exit_with(f"{cfg.out}, after {len(read_lines(metrics))} of {cfg.steps} steps: {what}; {saved}", code)
        from nanorl.doctor import worst_sentence            # here, because it reads runs with the help of this room
        if ranks.rank() == 0 and (sentence := worst_sentence(cfg.out)):
            print(sentence)
    return wrapper


class Run:
    """The directory of a run, and its step counter.

        for step in out.steps():        # from where the checkpoint left off to cfg.steps - 1
            ...
            out.log({"train/loss": loss})

    After the body of each step one line goes to metrics.jsonl, and every `save_every` steps (and at the last one) a
    checkpoint follows it. A checkpoint of step k says that steps 0..k-1 are done. Ctrl-C and SIGTERM finish the step,
    save and leave.
    """

    def __init__(self, cfg: RunConfig, checkpoint: dict[str, Any] | None, model: nn.Module, optimizer: Optimizers,
                 tokenizer: Tokenizer, *, data: Any = None, **constants: nn.Module | None):
        """`data`: what the run learns from, text, records or problems. `constants`: models that are not trained; None is
        skipped. A resumed run must have read the same data, and loaded the constants that it began with, wherever they are
        now; a constant that `refresh` has changed since then gets its weights back."""
        self.cfg, self.model, self.optimizer, self.tokenizer = cfg, model, optimizer, tokenizer
        self.out = Path(cfg.out)
        self.step = 0
        self.state: dict[str, Any] = {}     # what else a script needs in order to resume: tensors and builtins
        self._line: dict[str, float | None] = {}
        self._warned: set[str] = set()      # metrics that were not finite
        self._signal = 0
        if checkpoint is not None:
            self.step, self.state = checkpoint["step"], checkpoint["state"]
            try:
                optimizer.load_state_dict(checkpoint["optimizer"])
            except Exception as e:
                raise UserError(f"{self.out / 'ckpt.pt'}: its optimizer is not that of this run ({e})") from None
        self.constants = constants
        for name, constant in constants.items():
            if name in self.state:
                constant.load_state_dict(self.state[name])
            elif constant is not None:
                self._check_unchanged(name, digest(constant))
        content = json.dumps(data, sort_keys=True, default=lambda x: getattr(x, "__dict__", None))
        self._check_unchanged("data", hashlib.sha256(content.encode()).hexdigest())
        self.first_steps = self.state.setdefault("first_steps", checkpoint["config"]["steps"] if checkpoint else cfg.steps)
        for each in filter(None, (model, *constants.values())):
            round_frozen(each, cfg.dtype)
        ranks.wait()                        # the others may still be checking what is here already
        if ranks.rank() == 0:
            self._begin()
        ranks.wait()

    def _begin(self) -> None:
        """The files of a new run, or those of a resumed one up to its checkpoint. No other process may write here any more."""
        self.out.mkdir(parents=True, exist_ok=True)
        config = self.out / "config.json"
        self._locks = [_locked(config)] if self.cfg.resume else []      # before it is written again: some flags may differ
        self._write(config.name, json.dumps(dataclasses.asdict(self.cfg) | {"resume": False}, indent=2))
        self._locks.append(_locked(config))
        for name in [name for name in LOGS if self.cfg.resume and (self.out / name).exists()]:
            # Drop what came after the checkpoint: lines of its own step and later, and a torn last one.
            kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in read_lines(self.out / name) if r["step"] < self.step]
            self._write(name, "".join(kept))

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.out / name, lambda f: f.write(text.encode()))

    @staticmethod
    def check(cfg: RunConfig) -> dict[str, Any] | None:
        """Before any work: may this run be written to cfg.out? Returns the checkpoint to resume from, if there is one."""
        if not cfg.out:
            raise UserError("--out '': expected a directory")
        out = Path(cfg.out)
        try:
            there = [name for name in ("config.json", "ckpt.pt", *LOGS) if (out / name).exists()]
            nearest = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
        except OSError as e:
            raise UserError(f"--out {out}: {e.strerror}; expected a directory") from None
        if cfg.resume:
            checkpoint = load_checkpoint(out) if (out / "ckpt.pt").exists() else None
            lines, *_ = (read_lines(out / name) for name in LOGS)       # or refused, before any work
            if not checkpoint and len(lines) > read_config(out)["save_every"]:
                raise UserError(f"--resume: {out / 'ckpt.pt'} is gone; expected the checkpoint of {len(lines)} steps")
            if checkpoint:
                Run._check_flags(cfg, checkpoint, lines)
            return checkpoint
        if there:
            raise UserError(f"--out {out}: holds a run already; continue it with --resume, or choose another directory")
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise UserError(f"--out {out}: {nearest} is not a directory that can be written to")
        return None

    @staticmethod
    def _check_flags(cfg: RunConfig, checkpoint: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        """UserError where more steps would have meant other learning rates before. Says what holds only to rounding."""
        before, rates = checkpoint["config"], [line["train/lr"] for line in lines[: checkpoint["step"]] if "train/lr" in line]
        if cfg.steps > before["steps"] and rates and rates[-1] < max(rates):
            raise UserError(f"--steps {cfg.steps}: the learning rate of the run to resume has begun to fall, to end with its "
                            f"{before['steps']} steps; train on in another run, with --init {cfg.out} and another --out")
        again = {"sha256 of reference", "sha256 of initial_policy"} & checkpoint["state"].keys() or "lora" in checkpoint
        if cfg.init != before["init"] and not again:
            raise UserError(f"--init {cfg.init}: a run reads it once, when it begins; leave the flag out, or start another run")
        differ = [f"{flag_of(flag)} {getattr(cfg, flag)}" for flag in sorted(TO_ROUNDING & before.keys())
                  if getattr(cfg, flag) != before[flag]]
        if differ:
            print(f"Resuming with {' '.join(differ)}: the results are the same to rounding, not bit for bit.")

    def _check_unchanged(self, name: str, sha256: str) -> None:
        """UserError where this had another content when the run began."""
        if self.state.setdefault(f"sha256 of {name}", sha256) != sha256:
            flags = {"reference": "init", "initial_policy": "init", "data": "text" if hasattr(self.cfg, "text") else "data"}
            place = getattr(self.cfg, flag := flags.get(name, name), "")
            what = f"{flag_of(flag)} {place}:" if place else f"--resume: the {name.replace('_', ' ')}"
            raise UserError(f"{what} has changed since this run began; expected what it began with, in any place")

    def metrics(self) -> list[dict[str, float | None]]:
        """The lines of metrics.jsonl so far."""
        return read_lines(self.out / "metrics.jsonl")

    def steps(self) -> Iterator[int]:
        """The steps that are left, one at a time, with a progress bar, metrics and checkpoints around them."""
        handlers = {s: signal.signal(s, self._stop_soon) for s in (signal.SIGINT, signal.SIGTERM)}
        self._bar = tqdm(total=self.cfg.steps, initial=self.step, desc=self.out.name, dynamic_ncols=True,
                         disable=self.cfg.quiet or ranks.rank() > 0,
                         bar_format="{desc} {n_fmt}/{total_fmt} {bar:12} {elapsed}<{remaining}{postfix}")
        try:
            while self.step < self.cfg.steps:
                started = time.perf_counter()
                yield self.step
                self._line["time/step_s"] = time.perf_counter() - started
                self._write_line()
                self.step += 1
                self._bar.update()
                self._signal = max(ranks.gathered(self._signal))       # a process that was told to stop tells the others
                if self.step % self.cfg.save_every == 0 or self.step == self.cfg.steps or self._signal:
                    self.save()
                if self._signal:
                    tqdm.write(f"Stopped after step {self.step} of {self.cfg.steps}; continue with --out {self.out} --resume")
                    raise SystemExit(128 + self._signal)
        finally:
            self._bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def refresh(self, name: str, every: int | None) -> None:
        """Every so many steps the constant of this name becomes the model, and from then on is part of the checkpoint."""
        if every and self.step and self.step % every == 0:
            self.constants[name].load_state_dict(self.model.state_dict())
            self.state[name] = self.constants[name].state_dict()

    @contextlib.contextmanager
    def saved_on(self, kind: type[Exception]) -> Iterator[None]:
        """When an exception of this kind ends the run before the step has changed anything, the steps so far are not lost."""
        try:
            yield
        except kind:
            self.save()
            print(f"Saved {self.out} after {self.step} of {self.cfg.steps} steps.")
            raise

    def _stop_soon(self, signum: int, frame) -> None:
        """Finish the step first; a second signal is not waited for."""
        self._signal = signum
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        print("\nFinishing this step, then saving. Once more to stop at once.", file=sys.stderr)

    def schedule(self, warmup: float = 0.0, decay: float = 0.0) -> float:
        """The factor of the learning rate in this step, by `optimizer.schedule`. A run that is given more steps keeps its
        warmup, so that no rate in its past changes."""
        return min(schedule(self.step, self.first_steps, warmup), schedule(self.step, self.cfg.steps, decay=decay))

    def log(self, metrics: dict[str, Any], show: tuple[str, ...] = ()) -> None:
        """Add to this step's line of metrics.jsonl; those of it named in `show` go to the progress bar.

        A loss that is nan or inf is a FloatingPointError. Any other metric is then logged as null, with a warning.
        """
        for name, value in metrics.items():
            x = float(value)
            if name.endswith("loss"):
                check_finite(x, name)
            if not math.isfinite(x) and name not in self._warned and ranks.rank() == 0:
                tqdm.write(f"{name} is {x} in step {self.step}: logged as null; this is said once.", file=sys.stderr)
                self._warned.add(name)
            self._line[name] = x if math.isfinite(x) else None
        if show:
            shown = {name.split("/")[1]: self._line[name] for name in show if self._line.get(name) is not None}
            self._bar.set_postfix_str("  ".join(f"{name} {x:,.0f}" if abs(x) >= 1000 else f"{name} {x:.3g}"
                                                for name, x in shown.items()))

    def finish(self, metrics: dict[str, Any]) -> None:
        """The final line: the last evaluation. Its step is cfg.steps."""
        self.log(metrics)
        self._write_line()
        ranks.wait()                        # a stage that follows reads what rank 0 has written

    def _write_line(self) -> None:
        self._append("metrics.jsonl", {"step": self.step, **dict(sorted(self._line.items()))})
        self._line = {}

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Add to samples.jsonl what the model said."""
        for record in records:
            self._append("samples.jsonl", {"step": self.step, **record})

    def rollouts(self, records: list[dict[str, Any]]) -> None:
        """Add to rollouts.jsonl whole groups (nanorl/view_data.py)."""
        for record in records:
            self._append("rollouts.jsonl", {"step": self.step, **record})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if ranks.rank():
            return
        with open(self.out / name, "a", encoding="utf-8") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def say(self, text: str) -> None:
        """Print without tearing the progress bar."""
        if not self.cfg.quiet:
            tqdm.write(printable(text), file=sys.stdout)

    def save(self) -> None:
        if ranks.rank():
            return
        save_checkpoint(self.out / "ckpt.pt", {
            "step": self.step, "config": dataclasses.asdict(self.cfg), "gpt": dataclasses.asdict(self.model.config),
            "tokenizer": self.tokenizer.state_dict(), "model": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(), "state": self.state,
            **({"lora": self.model.lora} if has_adapters(self.model) else {})})
