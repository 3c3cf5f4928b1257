"""Is my objective sound? Invariants for any policy-gradient objective, also one of your own.

    report = check_objective(my_objective, advantage=my_advantage, clip=(0.2, 0.2))       in a test
    python -m nanorl.checks my_script.py:my_objective --clip 0.2 0.2                       on a command line

An objective is a function with the arguments that train_grpo.py gives to its own,

    objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None) -> (loss, metrics)

logp, old_logp, ref_logp, entropy, mask, weights [B, T]; adv [B, 1], or [B, T] with --adv-shape BT; loss a scalar to minimise;
metrics detached scalars that add up over micro-batches, except that names ending in _max or _min take the maximum or the
minimum.

Other people's objectives make the weights of their tokens themselves, those of preferences are of pairs, and an estimator such
as GAE makes advantages; docs/checks.md has all four contracts:

    python -m nanorl.checks theirs.py:loss --aggregates own --clip 0.2 0.2                 loss(logp, old_logp, adv, mask)
    python -m nanorl.checks theirs.py:loss --kind preference --loss dpo --beta 0.1
    python -m nanorl.checks theirs.py:gae --kind gae

The command's exit code is 0 if all that applies holds, 1 if something is broken, 2 if there is nothing to check (no such file
or function, a wrong flag), and 3 if nothing is broken, but something that may apply could not be checked: the report calls it
UNCHECKED and says why. Terms such as KL and entropy are taken off where an invariant is about the rest of the loss.

    cases.py         the random batches and rewards that an objective is checked with
    invariants.py    what must hold for every objective and every advantage
    exact.py         what an algorithm is free to choose, measured by enumeration: bias, length bias, divergence
    report.py        check_objective: which invariants apply, and the smallest counterexample to each broken one
    foreign.py       objectives that make their token weights themselves: what those are, and what is asked of them
    preferences.py   check_preference_objective: losses of pairs, and what the papers say of theirs
    values.py        check_advantage: estimators of advantages from a critic's values
    __main__.py      the command
"""

from nanorl.checks.cases import Batch
from nanorl.checks.exact import advantage_bias, divergence, length_bias
from nanorl.checks.invariants import Broken
from nanorl.checks.preferences import check_preference_objective
from nanorl.checks.report import BrokenObjective, Report, check_objective
from nanorl.checks.values import check_advantage

__all__ = ["Batch", "Broken", "BrokenObjective", "Report", "advantage_bias", "check_advantage", "check_objective",
           "check_preference_objective", "divergence", "length_bias"]
