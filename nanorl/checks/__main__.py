"""python -m nanorl.checks FILE.py:NAME: check an objective, and say by the exit code what came of it."""

import argparse
import contextlib
import inspect
import os
from collections.abc import Callable

from nanorl import checks
from nanorl.checks.foreign import ADV_SHAPES, with_accepted
from nanorl.checks.preferences import NUMBERS, check_preference_objective
from nanorl.checks.report import BrokenObjective, check_objective
from nanorl.checks.values import check_advantage
from nanorl.errors import UserError, user_errors_as_sentences
from nanorl.load import load_function
from nanorl.ops import AGGREGATES


# What each kind of function is checked with, and the flags that belong to it.
KINDS = {"objective": (check_objective, ("advantage", "clip", "ratio", "detached_weight", "aggregate", "aggregates",
                                         "adv_shape", "maximise")),
         "preference": (check_preference_objective, ("loss", "beta", "label_noise", "delta", "gamma", "nll_coef", "absolute")),
         "gae": (check_advantage, ())}


def load_objective(where: str, signature: str, *names: str, optional: tuple[str, ...] = (), **by_name: None) -> Callable:
    """The function NAME of FILE.py, from "FILE.py:NAME", which must accept arguments of these names, the first by position."""
    function = load_function(where, signature)
    by_name |= with_accepted(function, **dict.fromkeys(optional))
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
                                     argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", help="FILE.py:NAME of an objective, or what --kind says")
    parser.add_argument("--kind", choices=KINDS, default="objective", help="preference: a loss of pairs; gae: its estimator")
    parser.add_argument("--examples", type=int, default=50, help="random cases for each invariant (default: 50)")
    parser.add_argument("--advantage", help="FILE.py:NAME of an advantage, rewards [P, G] -> [P, G]")
    parser.add_argument("--clip", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the ratio is clipped to 1-LOW .. 1+HIGH")
    parser.add_argument("--ratio", choices=("token", "sequence"), help="of a token (default), or of an answer")
    parser.add_argument("--detached-weight", action="store_true", help="the ratio is a weight without a gradient of its own")
    parser.add_argument("--aggregate", choices=AGGREGATES, help="how its weights are made: notes their bias; own: checks it")
    parser.add_argument("--aggregates", choices=("given", "own"), help="own: the loss makes its token weights itself")
    parser.add_argument("--adv-shape", choices=ADV_SHAPES, help="adv is [B, 1] (default) or [B, T]; own: also [B]")
    parser.add_argument("--maximise", action="store_true", help="own: it returns what is to be maximised")
    parser.add_argument("--absolute", action="store_true", help="preference: it judges each response by itself: no margin")
    parser.add_argument("--loss", choices=NUMBERS, help="preference: it is meant to be that of the paper, with ...")
    for number in ("beta", "label-noise", "delta", "gamma", "nll-coef"):
        parser.add_argument(f"--{number}", type=float, help="... a number in it")
    options = vars(parser.parse_args(argv))
    where, kind = options.pop("objective"), options.pop("kind")
    if options["examples"] < 1:
        raise UserError(f"--examples {options['examples']}: must be at least 1; 50 is the default")
    check, flags = KINDS[kind]
    if others := [name for name in options if name not in ("examples", *flags)]:
        raise UserError(f"--{others[0].replace('_', '-')}: not for --kind {kind}; leave it out")
    if kind == "preference":
        f = load_objective(where, "loss(chosen, rejected, ref_chosen, ref_rejected)", "chosen", "rejected", "ref_chosen",
                           "ref_rejected", optional=("chosen_length", "rejected_length", "weights"))
    elif kind == "gae":
        f = load_objective(where, "advantages(rewards, values, mask, gamma, lam)", "rewards", "values", "mask", "gamma", "lam")
    elif options.get("aggregates") == "own":
        f = load_objective(where, "loss(logp, old_logp, adv, mask)", "logp", "old_logp", "adv", "mask",
                           optional=("weights", "ref_logp", "entropy", "prompt_index"))
    else:
        f = load_objective(where, "objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None)",
                           "logp", "old_logp", "adv", "mask", "weights", ref_logp=None, entropy=None)
    if "advantage" in options:
        options["advantage"] = load_objective(options["advantage"], "advantage(rewards)", "rewards")
    if "clip" in options:
        options["clip"] = tuple(options["clip"])
    try:
        report = check(f, **options)
    except BrokenObjective as e:
        report = e.report
    print(report)
    if report.broken or report.unchecked:
        raise SystemExit(1 if report.broken else 3)


if __name__ == "__main__":
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.devnull)           # leave no .hypothesis in the user's folder
    main()
