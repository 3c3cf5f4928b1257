"""Runs: flags, devices, optimizers, directories, checkpoints and metrics. Nothing in here is RL.

A script is a dataclass of flags and a main(cfg). This module turns the one into a command line, and gives the other a
directory `runs/<name>/{config.json, metrics.jsonl, samples.jsonl, ckpt.pt}` in which nothing is lost: a run that was
killed at any moment continues with --resume as if nothing had happened. Every random stream is derived from (seed,
purpose, step), so the step is all the random state there is to save.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import nn
from tqdm import tqdm

from nanorl import ranks
from nanorl.gpt import GPT, GPTConfig, ScalarGPT
from nanorl.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    holds: Callable[[Any], bool]
    says: str


Count = Annotated[int, Bound(lambda n: n >= 1, "a whole number of at least 1")]
Natural = Annotated[int, Bound(lambda n: n >= 0, "a whole number of at least 0")]
Positive = Annotated[float, Bound(lambda x: 0 < x < math.inf, "a finite number above 0")]
NonNegative = Annotated[float, Bound(lambda x: 0 <= x < math.inf, "a finite number of at least 0")]
Share = Annotated[float, Bound(lambda x: 0 <= x <= 1, "a number from 0 to 1")]


def _typed(value: Any) -> str:
    """As one types it behind a flag."""
    return " ".join(map(str, value)) if type(value) is tuple else str(value)


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The flags of whatever runs a model."""

    seed: Natural = 0           # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"    # auto takes cuda, then mps, then cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # of matrix products; auto is bfloat16 on GPUs that have it
    compile: bool | None = None  # torch.compile; by default on cuda, where there is Triton

    def default(self, flag: str, value: Any) -> None:
        """In __post_init__: the value of a flag that nobody has set."""
        if getattr(self, flag) in (None, ""):
            object.__setattr__(self, flag, value)

    def expect(self, holds: Any, flags: str, sentence: str) -> None:
        """In __post_init__: refuse flags that do not go together. They are shown with their values before the sentence."""
        if not holds:
            shown = " ".join(f"--{flag.replace('_', '-')} {_typed(getattr(self, flag))}" for flag in flags.split())
            raise ValueError(f"{shown}: {sentence}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(DeviceConfig):
    """The flags that every script has. A script's Config inherits them and sets its own defaults."""

    out: str                    # directory of this run
    init: str = ""              # checkpoint of the stage before (a run's directory or a file)
    resume: bool = False        # continue the run in --out; flags come from its config.json
    steps: Count                # how many steps to train
    lr: Positive                # peak learning rate
    save_every: Count = 20      # steps between checkpoints
    eval_every: Count           # steps between evaluations
    recompute: bool = False     # compute activations again in the backward pass instead of keeping them: slower, less memory
    deterministic: bool = False  # on cuda: slower kernels that give the same result every time
    quiet: bool = False         # no progress bar and no samples on the screen


MAY_DIFFER_ON_RESUME = {"resume", "quiet", "selfcheck"}


@contextlib.contextmanager
def user_errors(kinds: type[Exception] | tuple = (ValueError, OSError)) -> Iterator[None]:
    """Inside, an exception of these kinds is the user's: a sentence on stderr, exit code 2, no traceback."""
    try:
        yield
    except kinds as e:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _not_none(hint: Any) -> Any:
    """X for `X | None`: None is what a flag has that nobody has set."""
    parts = get_args(hint)
    return parts[0] if parts[1:] == (types.NoneType,) else hint


def _misfit(value: Any, hint: Any) -> str:
    """What this flag expects, or "" if the value fits."""
    if get_origin(hint) is tuple:
        return next(filter(None, (_misfit(each, get_args(hint)[0]) for each in value)), "")
    if get_origin(hint) is Annotated:
        kind, bound = get_args(hint)
        right = type(value) is kind or (kind is float and type(value) is int)
        return "" if right and bound.holds(value) else bound.says
    if get_origin(hint) is Literal:
        return "" if value in get_args(hint) else f"one of {', '.join(get_args(hint))}"
    return "" if type(value) is hint else f"a {hint.__name__}"


def parse(config_class: type, argv: list[str] | None = None):
    """Command line -> config. Help texts are the comments behind the fields; bounds are the fields' types. A field without a
    default is a positional argument; a tuple takes one value or more.

    With --resume the flags come from the run's config.json, and one that was typed must agree with it.
    """
    hints = {name: _not_none(hint) for name, hint in get_type_hints(config_class, include_extras=True).items()}
    lines = "\n".join(inspect.getsource(c) for c in reversed(config_class.__mro__) if dataclasses.is_dataclass(c))
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", lines, re.M))
    parser = _Parser(description=inspect.getmodule(config_class).__doc__, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {}
    for field in dataclasses.fields(config_class):
        hint, how, flag = hints[field.name], {}, "--" + field.name.replace("_", "-")
        if get_origin(hint) is tuple:
            hint, how["nargs"] = get_args(hint)[0], "+"
        if get_origin(hint) is Annotated:
            how["type"] = get_args(hint)[0]
        elif get_origin(hint) is Literal:
            how["choices"] = get_args(hint)
        elif hint is bool:
            how["action"] = argparse.BooleanOptionalAction
        says = comments[field.name].replace("%", "%%")
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, **how, help=says)
            continue
        shown = "" if field.default in ("", None) else f" (default: {_typed(field.default)})"
        parser.add_argument(flag, dest=field.name, **how, help=says + shown)
        defaults[field.name] = field.default

    with user_errors():
        typed = {name: tuple(x) if type(x) is list else x for name, x in vars(parser.parse_args(argv)).items()}
        for name, value in typed.items():
            if expected := _misfit(value, hints[name]):
                raise ValueError(f"--{name.replace('_', '-')} {_typed(value)}: expected {expected}")
        saved = {}
        if typed.get("resume"):
            out = typed.get("out") or config_class(**defaults | typed).out      # its default may depend on other flags
            saved = read_config(Path(out))
            for name, value in typed.items():
                if name in saved and saved[name] != value and name not in MAY_DIFFER_ON_RESUME | {"out"}:
                    raise ValueError(f"--{name.replace('_', '-')} {value}: the run to resume has {saved[name]}; leave the "
                                     "flag out, or start another run")
            if odd := sorted(saved.keys() ^ defaults.keys()):
                raise ValueError(f"--resume: {out} was made by another script, or another version of this one: not both know "
                                 f"--{odd[0].replace('_', '-')}")
            saved["out"] = out
            for name, value in saved.items():
                if value != defaults[name] and (expected := _misfit(value, hints[name])):
                    raise ValueError(f"{Path(out) / 'config.json'}: {name} is {value!r:.40}; expected {expected}")
        return config_class(**defaults | saved | typed)


def read_config(out: Path) -> dict[str, Any]:
    """The flags of an earlier run in directory `out`."""
    if not (out / "config.json").exists():
        raise ValueError(f"--resume: {out} holds no run to continue (no config.json)")
    try:
        flags = json.loads((out / "config.json").read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{out / 'config.json'}: not JSON ({e})") from None
    if not isinstance(flags, dict):
        raise ValueError(f"{out / 'config.json'}: a {type(flags).__name__}; expected an object with the flags of a run")
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# Randomness, device, precision
# ---------------------------------------------------------------------------------------------------------------------


def derive(seed: int, *purpose: str | int) -> int:
    """A seed of its own for every purpose: the first 63 bits of sha256(seed/purpose)."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, *purpose))


def find_device(name: str) -> torch.device:
    """The device of this name, or the best there is for "auto"; ValueError where there is none.

    On CUDA, float32 products may be TF32 from now on, and attention is never cuDNN's.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"--device {name}: PyTorch finds no such device here; expected one of "
                         f"{', '.join(kind for kind, there in available.items() if there)}")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)     # it plans for every new shape, and decoding has one at every token
    return torch.device(name)


def pick_device(cfg: RunConfig) -> torch.device:
    """The device to train on, deterministic if the flags ask for it, shared with nobody under torchrun."""
    device = find_device(cfg.device)
    ranks.join(device)
    if device.type == "cuda":
        if cfg.deterministic:       # or else products of matrices are not
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg.deterministic)
        if cfg.resume and not cfg.deterministic:
            print("Resuming on CUDA without --deterministic: the run goes on, but not bit for bit.")
    return device


def uses_bfloat16(device: torch.device, dtype: str) -> bool:
    """By default on GPUs that compute in it, and do not only emulate it."""
    return dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda"
                                   and torch.cuda.is_bf16_supported(including_emulation=False))


def autocast(device: torch.device, dtype: str):
    """Matrix products in `dtype`, weights in float32: updates of 1e-6 of a weight would vanish in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, dtype))


@contextlib.contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Inside, matrix products are float32's: neither autocast to bfloat16 nor, on CUDA, rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def wants_compile(cfg: DeviceConfig, device: torch.device) -> bool:
    """By default on CUDA, where there is Triton: the compiler writes its kernels in it."""
    return device.type == "cuda" and find_spec("triton") is not None if cfg.compile is None else cfg.compile


def prepare(cfg: RunConfig, device: torch.device, *models: GPT) -> bool:
    """Compile these models for training, and have their activations computed again, where `cfg` asks for it.

    Says whether it asks for compiling: sampling compiles steps of its own.
    """
    compiled = wants_compile(cfg, device)
    for model in models:
        model.recompute = cfg.recompute
        if compiled:
            compile_for_training(model)
    return compiled


def compile_for_training(model: GPT) -> None:
    """Compile the transformer block, once for all layers and for all shapes, and the log-probs of its tokens."""
    model.compiled = True
    for block in model.blocks:
        block.compile(dynamic=True)


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}    # dense bfloat16


def peak_flops(device: torch.device) -> float | None:
    """The floating-point ceiling of a GPU that we know, for model FLOPs utilisation (MFU)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule
# ---------------------------------------------------------------------------------------------------------------------


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes, as one tensor. A process that had no rows adds zeros."""
    if ranks.count() > 1:
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        for p, grad in zip(parameters, ranks.summed(flat).split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)


class Optimizers:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest, stepped as one.

    Weight decay is decoupled and not applied to the gains of RMSNorm. Muon's orthogonal update is scaled to AdamW's
    typical size, so one learning rate serves both.
    """

    def __init__(self, model: nn.Module, kind: str, lr: float, weight_decay: float = 0.0):
        named = list(model.named_parameters())
        gains = [p for _, p in named if p.ndim < 2]
        matrices = [p for name, p in named if p.ndim == 2 and kind == "muon" and "blocks" in name]
        taken = {id(p) for p in gains + matrices}
        rest = [p for _, p in named if id(p) not in taken]
        fused = rest[0].device.type in ("cpu", "cuda")
        self.parts = [torch.optim.AdamW([{"params": rest, "weight_decay": weight_decay},
                                         {"params": gains, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95), fused=fused)]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay,
                                               adjust_lr_fn="match_rms_adamw"))
        self.named = named

    def step(self, lr: float, grad_clip: float) -> torch.Tensor:
        """Clip the gradients' total norm, take one step, clear them. Returns the norm before clipping.

        A gradient of exactly zero takes no step: there is nothing to learn, but momentum would still move the weights.
        FloatingPointError when the gradient is not finite; no weight has changed then.
        """
        parameters = [p for _, p in self.named]
        _sum_gradients(parameters)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not norm.isfinite():
            check_finite({f"the gradient of {name}": p.grad for name, p in self.named})
            raise FloatingPointError("the norm of the gradient is too large for float32")
        if norm == 0:
            return norm
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule(step: int, steps: int, warmup: float = 0.0, decay: float = 0.0) -> float:
    """A trapezoid: the learning rate rises over the first share `warmup` of the steps and falls to 0 over the last
    share `decay`. Returns the factor, in (0, 1]."""
    rise = (step + 1) / (warmup * steps) if warmup * steps >= 1 else 1.0
    fall = (steps - step) / (decay * steps) if decay * steps >= 1 else 1.0
    return min(1.0, rise, fall)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

FORMAT = 1      # raised when a checkpoint's meaning changes
PARTS = {"step": int, "config": dict, "gpt": dict, "tokenizer": dict, "model": dict, "optimizer": list, "state": dict}


def check_finite(x: Any, name: str = "") -> None:
    """FloatingPointError names the first tensor or number, in nested dicts and lists, that holds nan or inf."""
    if isinstance(x, dict | list | tuple):
        for key, part in x.items() if isinstance(x, dict) else enumerate(x):
            check_finite(part, f"{name}.{key}".lstrip("."))
    elif isinstance(x, torch.Tensor) and x.is_floating_point() and not x.isfinite().all():
        raise FloatingPointError(f"{name} holds {'nan' if x.isnan().any() else 'inf'}")
    elif isinstance(x, float) and not math.isfinite(x):
        raise FloatingPointError(f"{name} is {x}")


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """A kill at any moment leaves the old file or the new one, never a part: temporary file, sync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:               # a full disk: do not fill it with half a file
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":              # elsewhere a directory cannot be synced
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def _write_checkpoint(checkpoint: dict[str, Any], f: Any) -> None:
    try:
        torch.save(checkpoint, f)
    except RuntimeError as e:           # torch hides what the disk said behind a word of its own
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def load_checkpoint(path: str | Path, what: Literal["policy", "reward model"] | None = None) -> dict[str, Any]:
    """The checkpoint of a run's directory, or a checkpoint file. Tensors and builtins only: no code is ever run.

    ValueError when it is none, when it is not sound, or when `what` is given and it holds something else.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:              # whatever a damaged archive or a pickle that is not ours leads to
        why = (str(e) or "empty file").splitlines()[0][:100]
        raise ValueError(f"{path}: not a readable checkpoint ({why})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path}: not a nanorl checkpoint of format {FORMAT} (found {found!s:.40})")
    for name, kind in PARTS.items():
        if not isinstance(checkpoint.get(name), kind):
            raise ValueError(f"{path}: not a whole checkpoint; its {name!r} is {checkpoint.get(name)!r:.40}, expected a "
                             f"{kind.__name__}")
    holds = "reward model" if "scalar.weight" in checkpoint["model"] else "policy"
    if what not in (None, holds):
        script = {"policy": "train_sft.py", "reward model": "train_reward.py"}[what]
        raise ValueError(f"{path}: holds a {holds}; expected a {what}, as {script} makes it")
    try:
        _check_sound(checkpoint, holds)
    except Exception as e:
        why = " ".join(str(e).split())[:200]
        raise ValueError(f"{path}: not a sound checkpoint ({why})") from None
    return checkpoint


def _check_sound(checkpoint: dict[str, Any], holds: str) -> None:
    """An exception says what does not fit: weights that are not finite or not of the shapes that the configuration asks for,
    or a tokenizer of another size."""
    check_finite(checkpoint["model"])
    with torch.device("meta"):          # shapes without memory
        model = GPT(GPTConfig(**checkpoint["gpt"]))
        wanted, found = ({name: tuple(x.shape) for name, x in weights.items()} for weights in (
            (ScalarGPT(model) if holds == "reward model" else model).state_dict(), checkpoint["model"]))
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise ValueError(f"its {name} has the shape {found.get(name)}, its configuration wants {wanted.get(name)}")
    size = Tokenizer.from_state(checkpoint["tokenizer"]).vocab_size
    if size != model.config.vocab_size:
        raise ValueError(f"a tokenizer of {size} tokens beside a model of {model.config.vocab_size}")


def model_from(checkpoint: dict[str, Any], device: torch.device) -> GPT:
    """The policy of a checkpoint, with its weights."""
    model = GPT(GPTConfig(**checkpoint["gpt"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device)


def scalar_model_from(checkpoint: dict[str, Any], device: torch.device) -> ScalarGPT:
    """The reward model of a checkpoint, with its weights."""
    model = ScalarGPT(GPT(GPTConfig(**checkpoint["gpt"])))
    model.load_state_dict(checkpoint["model"])
    return model.to(device)


def tokenizer_from(checkpoint: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_state(checkpoint["tokenizer"])


def stage_dir(stage: str, task: str, difficulty: int) -> str:
    """The default directory of a stage: runs/sft, runs/sft-sorting, runs/sft-addition-4."""
    plain = task == "addition" and not difficulty
    return f"runs/{stage}" + ("" if plain else f"-{task}") + (f"-{difficulty}" if difficulty else "")


def same(cfg: RunConfig, *flags: str) -> dict[str, Any]:
    """The flags that a stage hands to the one it has to make first."""
    return {name: getattr(cfg, name) for name in ("seed", "device", "dtype", "compile", "quiet", *flags)}


def ensure_stage(script: types.ModuleType, **flags) -> str:
    """Make the stage before this one when its run is not complete: with `flags`, and everything else at its default.

    Returns the directory of the run.
    """
    cfg = script.Config(**flags)
    out, name = Path(cfg.out), f"python {script.__name__}.py --out {cfg.out}"
    with user_errors():
        made = read_config(out) if (out / "config.json").exists() else {}
        for flag in ("task", "difficulty", "data", "init"):
            wanted = getattr(cfg, flag, None)
            if made and made.get(flag) != wanted:
                raise ValueError(f"{out}: made with --{flag} {made.get(flag)!r}, not {wanted!r}; use it with --init {out}, or "
                                 "move it away")
        if (out / "ckpt.pt").exists():
            found = load_checkpoint(out)
            if found["step"] >= found["config"]["steps"]:
                print(f"Starting from {out} (seed {found['config']['seed']}, {found['step']} steps).")
                return cfg.out
        if made:
            print(f"{out} is not finished. Continuing it first: {name} --resume")
            cfg = parse(script.Config, ["--out", cfg.out, "--resume", *(["--quiet"] if cfg.quiet else [])])
        else:
            print(f"{out} is not there yet. Making it first: {name}")
    script.main(cfg)
    return cfg.out


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file of a run. A line without its end was torn by a kill: it is not there."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {number}: {line[:60]!r}; expected a JSON object with a step")
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
            raise ValueError(f"{path.parent}: another process is at work on this run") from None
        except OSError:
            pass                    # a file system without locks
    return f


def says_why_it_stopped(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """For a script's main: a run that cannot go on says in one sentence what went wrong and what is safe.

    That is when a number is nan or inf (FloatingPointError), when the disk is full (OSError), and at Ctrl-C outside of the
    steps. Nothing that is not finite is ever saved, and the last good checkpoint stays.
    """
    @functools.wraps(main)
    def wrapper(cfg: RunConfig) -> None:
        try:
            main(cfg)
        except (FloatingPointError, OSError, KeyboardInterrupt) as e:
            name, out = Path(sys.argv[0]).name, Path(cfg.out)
            what = "interrupted" if isinstance(e, KeyboardInterrupt) else " ".join(str(e).split())
            with user_errors():
                step, saved = len(read_lines(out / "metrics.jsonl")), "no checkpoint has been written yet"
                if (out / "ckpt.pt").exists():
                    saved = f"the last good checkpoint, {out / 'ckpt.pt'}, has the first {load_checkpoint(out)['step']}"
            print(f"{name}: error: {out}, after {step} of {cfg.steps} steps: {what}; {saved}", file=sys.stderr)
            raise SystemExit(130 if isinstance(e, KeyboardInterrupt) else 2) from None
    return wrapper


def printable(text: str) -> str:
    """`text` without control characters (but tab and newline) and without what the terminal's encoding lacks: a model may say
    anything, even commands to the terminal."""
    text, encoding = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text), sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


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
                 tokenizer: Tokenizer):
        self.cfg, self.model, self.optimizer, self.tokenizer = cfg, model, optimizer, tokenizer
        self.out = Path(cfg.out)
        self.step = 0
        self.state: dict[str, Any] = {}     # what else a script must know to resume: tensors and builtins
        self._line: dict[str, float] = {}
        self._signal = 0
        if checkpoint is not None:
            self.step, self.state = checkpoint["step"], checkpoint["state"]
            try:
                optimizer.load_state_dict(checkpoint["optimizer"])
            except Exception as e:
                with user_errors():
                    raise ValueError(f"{self.out / 'ckpt.pt'}: its optimizer is not that of this run ({e})") from None
        ranks.wait()                        # the others may still be looking for what stands here already
        if ranks.rank() == 0:
            self._begin()
        ranks.wait()

    def _begin(self) -> None:
        """The files of a new run, or those of an earlier one up to its checkpoint; nobody else may write here from now on."""
        cfg = self.cfg
        self.out.mkdir(parents=True, exist_ok=True)
        if not cfg.resume:
            flags = json.dumps(dataclasses.asdict(cfg), indent=2)
            write_atomically(self.out / "config.json", lambda f: f.write(flags.encode()))
        with user_errors():
            self._config = _locked(self.out / "config.json")
        if cfg.resume:
            self._cut("metrics.jsonl")
            self._cut("samples.jsonl")

    @staticmethod
    def check(cfg: RunConfig) -> dict[str, Any] | None:
        """Before any work: may this run be written to cfg.out? Returns the checkpoint to resume from, if there is one.

        A finished run has nothing to resume: that is the end of the program.
        """
        if not cfg.out:
            raise ValueError("--out '': expected a directory")
        out = Path(cfg.out)
        if cfg.resume:
            checkpoint = load_checkpoint(out) if (out / "ckpt.pt").exists() else None
            lines, _ = read_lines(out / "metrics.jsonl"), read_lines(out / "samples.jsonl")     # or refused, before any work
            if not checkpoint and len(lines) > cfg.save_every:
                raise ValueError(f"--resume: {out / 'ckpt.pt'} is gone; expected the checkpoint of {len(lines)} steps")
            if checkpoint and checkpoint["step"] >= cfg.steps and any(line["step"] == cfg.steps for line in lines):
                print(f"{out} is finished: {cfg.steps} steps.")
                raise SystemExit(0)
            return checkpoint
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: a file is in the way; expected a directory of a new run")
        if any((out / name).exists() for name in ("config.json", "ckpt.pt", "metrics.jsonl", "samples.jsonl")):
            raise ValueError(f"--out {out}: holds a run already; continue it with --resume, or choose another directory")
        nearest = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise ValueError(f"--out {out}: {nearest} is not a directory that can be written to")
        return None

    def started_from(self, **models: nn.Module | None) -> None:
        """Models that a resumed run loads again must be those that it began with; ValueError names one that is not."""
        for name, model in models.items():
            if model is None:
                continue
            digest = hashlib.sha256()
            for key, x in model.state_dict().items():
                digest.update(key.encode() + x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            if self.state.setdefault(f"sha256 of {name}", digest.hexdigest()) != digest.hexdigest():
                raise ValueError(f"--resume: the {name.replace('_', ' ')} has changed since this run began; expected the one "
                                 "that it started from")

    def _cut(self, name: str) -> None:
        """Drop what the checkpoint knows nothing of: lines of its own step and later, and a torn last one."""
        kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in read_lines(self.out / name) if r["step"] < self.step]
        write_atomically(self.out / name, lambda f: f.write("".join(kept).encode()))

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far."""
        return read_lines(self.out / "metrics.jsonl")

    def steps(self) -> Iterator[int]:
        handlers = {s: signal.signal(s, self._stop_soon) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=self.cfg.steps, initial=self.step, desc=self.out.name, dynamic_ncols=True,
                   disable=self.cfg.quiet or ranks.rank() > 0,
                   bar_format="{desc} {n_fmt}/{total_fmt} {bar:12} {elapsed}<{remaining}{postfix}")
        self._bar = bar
        try:
            while self.step < self.cfg.steps:
                started = time.perf_counter()
                yield self.step
                self._line["time/step_s"] = time.perf_counter() - started
                self._write_line()
                self.step += 1
                bar.update()
                self._signal = max(ranks.gathered(self._signal))       # who was told to stop tells the others
                if self.step % self.cfg.save_every == 0 or self.step == self.cfg.steps or self._signal:
                    self.save()
                if self._signal:
                    bar.close()
                    print(f"Stopped after step {self.step} of {self.cfg.steps}; continue with --out {self.out} --resume")
                    raise SystemExit(128 + self._signal)
        finally:
            bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

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

    def log(self, metrics: dict[str, Any], show: dict[str, str] | None = None) -> None:
        """Add to this step's line of metrics.jsonl; `show` goes to the progress bar. FloatingPointError at nan or inf."""
        line = {name: float(value) for name, value in metrics.items()}
        check_finite(line)
        self._line |= line
        if show:
            self._bar.set_postfix_str("  ".join(f"{name} {value}" for name, value in show.items()))

    def finish(self, metrics: dict[str, Any]) -> None:
        """The final line: what the trained model is worth. Its step is cfg.steps."""
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
        checkpoint = {"format": FORMAT, "step": self.step, "config": dataclasses.asdict(self.cfg),
                      "gpt": dataclasses.asdict(self.model.config), "tokenizer": self.tokenizer.state_dict(),
                      "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "state": self.state}
        check_finite({name: checkpoint[name] for name in ("model", "optimizer", "state")})
        write_atomically(self.out / "ckpt.pt", functools.partial(_write_checkpoint, checkpoint))
