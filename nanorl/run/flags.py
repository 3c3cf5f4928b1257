"""From a dataclass of flags to a command line, and back from the config.json of a run that is resumed."""

import argparse
import dataclasses
import functools
import inspect
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from nanorl.errors import UserError, exit_with, print_anything
from nanorl.files import parse_object
from nanorl.tasks import default_max_new_tokens


class Bound(NamedTuple):
    holds: Callable[[Any], bool]
    says: str


Count = Annotated[int, Bound(lambda n: n >= 1, "a whole number of at least 1")]
Natural = Annotated[int, Bound(lambda n: n >= 0, "a whole number of at least 0")]
Positive = Annotated[float, Bound(lambda x: 0 < x < math.inf, "a finite number above 0")]
NonNegative = Annotated[float, Bound(lambda x: 0 <= x < math.inf, "a finite number of at least 0")]
Share = Annotated[float, Bound(lambda x: 0 <= x <= 1, "a number from 0 to 1")]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_typed(value: Any) -> str:
    """As one types it after a flag."""
    return " ".join(map(str, value)) if type(value) is tuple else str(value)


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The flags of whatever runs a model."""

    # device and seed
    seed: Natural = 0           # of all random numbers
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"    # auto takes cuda, then mps, then cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # of matrix products; auto is bfloat16 on GPUs that have it
    compile: bool | None = None  # torch.compile; by default on cuda, where there is Triton

    def default(self, flag: str, value: Any) -> None:
        """In __post_init__: the value of a flag that was not given."""
        if getattr(self, flag) in (None, ""):
            object.__setattr__(self, flag, value)

    def require(self, holds: Any, flags: str, sentence: str) -> None:
        """In __post_init__: refuse flags that contradict each other. The message shows them with their values."""
        if not holds:
            shown = " ".join(f"{flag_of(flag)} {_as_typed(getattr(self, flag))}" for flag in flags.split())
            raise UserError(f"{shown}: {sentence}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(DeviceConfig):
    """The flags that every script has. A script's Config inherits them and sets its own defaults."""

    # the run
    out: str                    # directory of this run
    init: str = ""              # run or pretrained model to start from (default: the stage before, made first if missing)
    resume: bool = False        # continue the run in --out; flags come from its config.json
    steps: Count                # how many steps to train
    lr: Positive                # peak learning rate
    save_every: Count = 20      # steps between checkpoints
    eval_every: Count           # steps between evaluations
    recompute: bool = False     # recompute activations in the backward pass instead of keeping them: slower, less memory
    deterministic: bool = False  # on cuda: slower kernels that give the same result every time
    quiet: bool = False         # no progress bar and no samples on the screen


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(RunConfig):
    """The flags of scripts that train a policy."""

    # adapters
    lora_rank: Natural = 0      # train adapters of this rank instead of all weights (nanorl/lora.py); 0 trains all weights
    lora_alpha: Positive | None = None    # adapters are scaled by alpha / rank (default: 32)

    def __post_init__(self) -> None:
        self.require(self.lora_rank or self.lora_alpha is None, "lora_alpha", "requires --lora-rank")
        self.require(not (self.lora_rank and getattr(self, "refresh_reference", None)), "lora_rank refresh_reference",
                     "with adapters, the reference is the policy without them; leave one of the two out")
        if self.lora_rank:
            self.default("lora_alpha", 32.0)


VerifierName = Literal["exact", "number", "choice", "code"]


def check_judge(cfg: Any) -> None:
    """In __post_init__: --data, --verifier and --reward fit each other."""
    cfg.require(cfg.verifier is None or cfg.data, "verifier", "it compares answers with those of a file; requires --data")
    cfg.require(cfg.verifier is None or cfg.reward in ("", "verifier"), "verifier reward", "one of them judges; leave one out")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(PolicyConfig):
    """The flags of scripts that train on the policy's own answers."""

    # rollouts
    task: str = "addition"      # addition, sums, sorting, reversal, countdown, code, calculator, guess; or FILE.py:NAME
    data: str = ""              # JSON records to practise on instead, such as {"prompt", "answer"} or {"question", "answer"}
    verifier: VerifierName | None = None    # how a response is compared with an answer of --data (default: exact)
    reward: str = ""            # FILE.py:NAME, a function (prompt, response, record) -> number, that judges instead
    skip_long: bool = False     # leave out records that do not fit the model's context
    prompts: Count = 32         # P, prompts per step
    group: Count = 8            # G, answers sampled per prompt
    max_new_tokens: Count | None = None    # an answer longer than this is truncated (default: the task's own; addition 80)
    temperature: Positive = 1.0    # of the policy: sampled with it, scored with it
    micro_batch: Count = 64     # rows of up to 256 tokens in memory at a time, fewer of longer ones; 16 times as many to sample
    eval_problems: Count = 500  # held-out problems in an evaluation
    keep_groups: Natural = 2    # groups kept in rollouts.jsonl, in steps with an evaluation and the last; 0 is off

    def __post_init__(self) -> None:
        super().__post_init__()
        self.default("max_new_tokens", default_max_new_tokens(self.task))
        check_judge(self)


# What a resumed run may have otherwise than before. PLACES may have moved: what was read there is compared (directory.Run).
PLACES = {"out", "init", "data", "text", "teacher", "reward_model"}
TO_ROUNDING = {"micro_batch", "recompute", "device", "dtype", "compile", "deterministic"}      # the same results, to rounding
MAY_DIFFER_ON_RESUME = PLACES | TO_ROUNDING | {"resume", "steps", "save_every", "quiet", "selfcheck", "keep_groups"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def _without_none(hint: Any) -> Any:
    """X for `X | None`: None stands for a flag that was not given."""
    members = get_args(hint)
    return members[0] if members[1:] == (types.NoneType,) else hint


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


@functools.cache
def _help_and_groups(config_class: type) -> tuple[dict[str, str], dict[str, str]]:
    """The help text of each field, which is the comment after it, and its group, the last comment on a line of its own in the
    class that has the field first; "" if there is none."""
    helps, groups = {}, {}
    for cls in reversed([c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]):
        group = ""
        for line in inspect.getsource(cls).splitlines():
            if heading := re.fullmatch(r"    # (.+)", line):
                group = heading[1]
            elif field := re.fullmatch(r"    (\w+): ([^#]*#\s*(.+))?.*", line):
                groups.setdefault(field[1], group)
                if field[3]:
                    helps[field[1]] = field[3]
    return helps, groups


def _parser(config_class: type, hints: dict[str, Any]) -> argparse.ArgumentParser:
    doc, table = inspect.getmodule(config_class).__doc__.strip(), getattr(config_class, "table", "")
    parser = _Parser(description="\n\n".join(filter(None, (doc, table))), allow_abbrev=False,
                     argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps, groups = _help_and_groups(config_class)
    sections = {"": parser} | {title: parser.add_argument_group(title) for title in dict.fromkeys(groups.values()) if title}
    for field in dataclasses.fields(config_class):
        hint, options = hints[field.name], {}
        if get_origin(hint) is tuple:
            hint, options["nargs"] = get_args(hint)[0], "+"
        if get_origin(hint) is Annotated:
            options["type"] = get_args(hint)[0]
        elif get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        elif hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        name = field.name if field.default is dataclasses.MISSING else flag_of(field.name)
        shown = "" if field.default in ("", None, dataclasses.MISSING) else f" (default: {_as_typed(field.default)})"
        sections[groups[field.name]].add_argument(name, **options, help=helps[field.name].replace("%", "%%") + shown)
    return parser


def parse(config_class: type, argv: list[str] | None = None) -> Any:
    """The command line as a config. Help texts are the comments after the fields; bounds are the fields' types. A field without
    a default is a positional argument; a tuple takes one value or more. --help shows the class's `table`, if it has one, after
    the module's docstring.

    With --resume the flags come from the run's config.json, and one that was typed must agree with it, unless it
    MAY_DIFFER_ON_RESUME.
    """
    print_anything()
    hints = {name: _without_none(hint) for name, hint in get_type_hints(config_class, include_extras=True).items()}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)
                if field.default is not dataclasses.MISSING}
    try:
        given = vars(_parser(config_class, hints).parse_args(argv))
        typed = {name: tuple(x) if type(x) is list else x for name, x in given.items()}
        for name, value in typed.items():
            if expected := _misfit(value, hints[name]):
                raise UserError(f"{flag_of(name)} {_as_typed(value)}: expected {expected}")
        saved = _saved_flags(config_class, hints, defaults, typed) if typed.get("resume") else {}
        return config_class(**defaults | saved | typed)
    except (ValueError, OSError) as e:
        exit_with(e)


def _saved_flags(config_class: type, hints: dict, defaults: dict, typed: dict) -> dict[str, Any]:
    """The flags of the run to resume, checked against those that were typed."""
    out = typed.get("out") or config_class(**defaults | typed).out      # its default may depend on other flags
    saved = read_config(Path(out))
    if odd := sorted(saved.keys() ^ defaults.keys()):
        raise UserError(f"--resume: {out} was made by another script, or another version of this one: not both know "
                        f"{flag_of(odd[0])}")
    for name, value in saved.items():
        if value != defaults[name] and (expected := _misfit(value, hints[name])):
            raise UserError(f"{Path(out) / 'config.json'}: {name} is {value!r:.40}; expected {expected}")
        wanted = typed.get(name, value)
        if wanted != value and (name not in MAY_DIFFER_ON_RESUME or (name == "steps" and wanted < value)):
            raise UserError(f"{flag_of(name)} {wanted}: the run to resume has {value}; leave the flag out, or start another "
                            "run")
    return saved | {"out": out}


def read_config(out: Path) -> dict[str, Any]:
    """The flags of an earlier run in directory `out`."""
    if not (out / "config.json").exists():
        raise UserError(f"--resume: {out} holds no run to continue (no config.json)")
    return parse_object((out / "config.json").read_bytes(), f"{out / 'config.json'}", "an object with the flags of a run")
