"""python -m nanorl.checks FILE.py:NAME: check an objective, and say by the exit code what came of it."""

import argparse
import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from nanorl import checks
from nanorl.checks.report import BrokenObjective, check_objective
from nanorl.errors import UserError, user_errors_as_sentences
from nanorl.ops import AGGREGATES


def load_function(where: str, signature: str, *names: str, **by_name: None) -> Callable:
    """The function NAME of FILE.py, from "FILE.py:NAME", which must accept arguments of these names, the first by position."""
    file, _, name = where.rpartition(":")
    path = Path(file).resolve()
    if not (path.suffix == ".py" and path.is_file() and name):
        why = f"{file} does not exist" if name and path.suffix == ".py" else "as in mine.py:objective"
        raise UserError(f"{where}: expected FILE.py:NAME, a file of Python code and a function in it; {why}")
    if "." in path.stem:
        raise UserError(f"{where}: Python cannot import a file with two dots in its name; rename it")
    sys.path.insert(0, str(path.parent))        # as for a script: the file can import its neighbours
    try:
        module = importlib.import_module(path.stem)
    except SystemExit:
        raise UserError(f"{where}: {file} exits when imported; put what it runs under if __name__ == '__main__'") from None
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        raise UserError(f"{where}: {file} cannot be imported{f', line {lines[-1]}' if lines else ''}: "
                        f"{type(e).__name__}: {e}") from None
    if getattr(module, "__file__", None) != str(path):
        raise UserError(f"{where}: Python has another module called {path.stem}; rename the file")
    function = getattr(module, name, None)
    if not callable(function):
        others = ", ".join(other for other, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise UserError(f"{where}: {file} has no function {name} (it has {others}); expected {signature}")
    try:
        inspect.signature(function).bind(*names, **by_name)
    except TypeError as e:
        why = str(e)
        with contextlib.suppress(TypeError):
            inspect.signature(function).bind(**dict.fromkeys(names), **by_name)
            why = f"{name} takes by name alone what is given by position"
        raise UserError(f"{where}: {why}; expected {signature}") from None
    except ValueError:
        pass                                    # written in C, without a signature: the first call will tell
    return function


@user_errors_as_sentences
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanorl.checks", description=checks.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", help="FILE.py:NAME of an objective")
    parser.add_argument("--advantage", help="FILE.py:NAME of an advantage, rewards [P, G] -> [P, G]")
    parser.add_argument("--clip", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the ratio is clipped to 1-LOW .. 1+HIGH")
    parser.add_argument("--ratio", choices=("token", "sequence"), default="token", help="of a token (default), or of an answer")
    parser.add_argument("--detached-weight", action="store_true", help="the ratio is a weight without a gradient of its own")
    parser.add_argument("--aggregate", choices=AGGREGATES, help="how its token weights are made; notes their bias")
    parser.add_argument("--examples", type=int, default=50, help="random cases for each invariant (default: 50)")
    args = parser.parse_args(argv)
    if args.examples < 1:
        raise UserError(f"--examples {args.examples}: must be at least 1; 50 is the default")
    f = load_function(args.objective, "objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None)",
                      "logp", "old_logp", "adv", "mask", "weights", ref_logp=None, entropy=None)
    advantage = args.advantage and load_function(args.advantage, "advantage(rewards)", "rewards")
    try:
        report = check_objective(f, advantage, args.clip and tuple(args.clip), args.detached_weight, ratio=args.ratio,
                                 aggregate=args.aggregate, examples=args.examples)
    except BrokenObjective as e:
        report = e.report
    print(report)
    if report.broken or report.unchecked:
        raise SystemExit(1 if report.broken else 3)


if __name__ == "__main__":
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.devnull)           # leave no .hypothesis in the user's folder
    main()
