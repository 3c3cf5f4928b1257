"""python -m nanorl.checks FILE.py:NAME: check an objective, and say by the exit code what came of it."""

import argparse
import contextlib
import inspect
import os
from collections.abc import Callable

from nanorl import checks
from nanorl.checks.report import BrokenObjective, check_objective
from nanorl.errors import UserError, user_errors_as_sentences
from nanorl.load import load_function
from nanorl.ops import AGGREGATES


def load_objective(where: str, signature: str, *names: str, **by_name: None) -> Callable:
    """The function NAME of FILE.py, from "FILE.py:NAME", which must accept arguments of these names, the first by position."""
    function = load_function(where, signature)
    try:
        inspect.signature(function).bind(*names, **by_name)
    except TypeError as e:
        why = str(e)
        with contextlib.suppress(TypeError):
            inspect.signature(function).bind(**dict.fromkeys(names), **by_name)
            why = f"{where.rpartition(':')[2]} takes by name alone what is given by position"
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
    f = load_objective(args.objective, "objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None)",
                       "logp", "old_logp", "adv", "mask", "weights", ref_logp=None, entropy=None)
    advantage = args.advantage and load_objective(args.advantage, "advantage(rewards)", "rewards")
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
