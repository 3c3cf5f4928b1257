"""check_preference_objective and check_advantage: what is sound passes, and each kind of fault is named, in words."""

import functools
import types
from pathlib import Path

import pytest
import torch
from faults import DPO, MATH, OPS
from torch.nn.functional import logsigmoid

import train_dpo
from nanorl.checks import BrokenObjective, check_advantage, check_preference_objective
from nanorl.ops import gae

ROOT = Path(__file__).parent.parent
PAPER = {"dpo": {"beta": 0.3}, "cdpo": {"beta": 0.3, "label_noise": 0.1}, "ipo": {"beta": 0.5},
         "slic": {"delta": 1.0, "nll_coef": 0.1}, "simpo": {"beta": 2.0, "gamma": 1.0}, "kto": {"beta": 0.3}}


def broken(check, *args, examples=5, **options):
    """The names of what is broken, and the report."""
    try:
        return set(), check(*args, examples=examples, **options)
    except BrokenObjective as e:
        return e.report.broken.keys(), e.report


# ---- Sound losses ----


@pytest.mark.parametrize("loss", PAPER)
def test_every_loss_of_train_dpo_is_sound(loss):
    """As the paper has it, and as a loss that nothing is known of."""
    f = functools.partial(train_dpo.objective, loss=loss, **PAPER[loss])
    report = check_preference_objective(f, loss, examples=10, **PAPER[loss])
    margins = {"balance", "shift", "swap"}
    assert {"upwards", "lengths", "closed_form"} <= report.held.keys()
    assert margins <= (report.skipped if loss == "kto" else report.held).keys()
    assert ("optimum" in report.held) == (loss in ("dpo", "cdpo", "ipo"))
    assert ("reference" in report.skipped) == (loss in ("slic", "simpo"))
    assert f"log-probs are {'divided' if loss in ('ipo', 'simpo') else 'of whole'}" in str(report)
    assert broken(check_preference_objective, f)[0] == ({"balance", "shift"} if loss == "kto" else set())


def margin(chosen, rejected, ref_chosen, ref_rejected):
    return 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))


@pytest.mark.parametrize("f, scaled", [
    (lambda *logps: -logsigmoid(margin(*logps)).mean(), True), (lambda *logps: -logsigmoid(margin(*logps)).sum(), False),
    (lambda *logps: -logsigmoid(margin(*logps)), False),
    (lambda *logps: (-logsigmoid(margin(*logps)), logps[0].detach(), logps[1].detach()), False)],
    ids=["mean", "sum", "of each pair", "with rewards"])
def test_contracts_that_people_have_are_accepted(f, scaled):
    report = check_preference_objective(f, "dpo", beta=0.3, examples=8)
    assert ("share of all pairs" in str(report)) == scaled and "weighted" in report.skipped


def each_by_itself(sign):
    """BCO's loss without its shift, or with a sign that is wrong for the rejected response."""
    return lambda c, r, rc, rr: (-logsigmoid(0.3 * (c - rc)) - logsigmoid(-sign * 0.3 * (r - rr))).mean()


def test_a_loss_without_a_margin_is_checked_response_by_response():
    report = check_preference_objective(each_by_itself(1), absolute=True, examples=8)
    assert {"balance", "shift", "swap"} <= report.skipped.keys() and {"upwards", "reference", "lengths"} <= report.held.keys()
    assert broken(check_preference_objective, each_by_itself(-1), absolute=True)[0] == {"upwards"}
    assert {"balance", "shift"} <= broken(check_preference_objective, each_by_itself(1))[0]


@pytest.mark.parametrize("f", [lambda *logps: torch.relu(1 - margin(*logps)).mean(),
                               lambda *logps: torch.relu(0.01 - margin(*logps)).square().sum(),
                               lambda c, r, rc, rr: -logsigmoid(margin(c, r, rc, rr) - 0.5).mean() - 0.1 * c.mean()],
                         ids=["a hinge", "its square", "an offset and a likelihood term"])
def test_a_sound_loss_of_no_paper_is_not_called_broken(f):
    assert {"reference", "shift", "balance", "swap"} <= check_preference_objective(f, examples=20).held.keys()


# ---- Faults ----


def dpo(m=margin, f=lambda m: -logsigmoid(m), more=lambda c, r, lc, lr: 0.0, weights=lambda w: w, metric=lambda x: x.detach()):
    """DPO with one of its steps replaced."""
    weigh = weights

    def loss(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, weights):
        pair = f(m(chosen, rejected, ref_chosen, ref_rejected)) + more(chosen, rejected, chosen_length, rejected_length)
        return (weigh(weights) * pair).sum(), {"loss": metric(pair.sum())}
    return loss


def simpo(chosen_by, rejected_by):
    """SimPO with other lengths."""
    def loss(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length):
        return -logsigmoid(2 * (chosen / chosen_by(chosen_length, rejected_length)
                                - rejected / rejected_by(chosen_length, rejected_length)) - 1).mean()
    return loss


def writes(chosen, rejected, ref_chosen, ref_rejected):
    ref_chosen += 1
    return -logsigmoid(margin(chosen, rejected, ref_chosen, ref_rejected)).mean()


def ipo(target=1.0, power=2):
    """beta = 1/2."""
    def loss(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length):
        m = (chosen - ref_chosen) / chosen_length - (rejected - ref_rejected) / rejected_length
        return (m - target).abs().pow(power).mean()
    return loss


FAULTS = {
    "the loser is preferred": (dpo(lambda c, r, rc, rr: -margin(c, r, rc, rr)), {"upwards", "closed_form"}),
    "the likelihood of a preference is minimised": (dpo(f=logsigmoid), {"upwards"}),
    "no push where the order is badly wrong": (dpo(f=lambda m: -logsigmoid(m.clamp(min=-1))), {"upwards"}),
    "the slope of sigma": (dpo(f=lambda m: -m.sigmoid()), {"swap", "closed_form"}),
    "an exponential": (dpo(f=lambda m: (-m).exp()), {"swap", "closed_form", "optimum"}),
    "a margin that prefers the second": (dpo(f=lambda m: -logsigmoid(m + 0.5)), {"swap", "closed_form", "optimum"}),
    "references exchanged": (dpo(lambda c, r, rc, rr: margin(c, r, rr, rc)), {"reference"}),
    "references added": (dpo(lambda c, r, rc, rr: margin(c, r, -rc, -rr)), {"reference"}),
    "one reference forgotten": (dpo(lambda c, r, rc, rr: margin(c, r, rc, 0 * rr)), {"reference", "shift"}),
    "both references forgotten": (dpo(lambda c, r, rc, rr: margin(c, r, 0 * rc, 0 * rr)), {"closed_form"}),
    "half of the reference": (dpo(lambda c, r, rc, rr: margin(c, r, rc / 2, rr / 2)), {"reference", "closed_form"}),
    "beta outside": (dpo(lambda c, r, rc, rr: margin(c, r, rc, rr) / 0.3, lambda m: -0.3 * logsigmoid(m)),
                     {"closed_form", "optimum"}),
    "beta on one side": (dpo(lambda c, r, rc, rr: 0.3 * (c - rc) - (r - rr)), {"balance", "shift"}),
    "the chosen one detached": (dpo(lambda c, r, rc, rr: margin(c.detach(), r, rc, rr)), {"balance", "upwards"}),
    "the rejected one detached": (dpo(lambda c, r, rc, rr: margin(c, r.detach(), rc, rr)), {"balance", "upwards"}),
    "probabilities for log-probs": (dpo(lambda c, r, rc, rr: margin(c.exp(), r.exp(), rc.exp(), rr.exp())), {"shift"}),
    "a likelihood term pushed down": (dpo(more=lambda c, r, lc, lr: 0.1 * c / lc), {"balance"}),
    "a likelihood term of the rejected one": (dpo(more=lambda c, r, lc, lr: 0.1 * r.square()), {"balance"}),
    "a mean of the step in the margin": (dpo(lambda *x: margin(*x) - margin(*x).mean()), {"micro_batches"}),
    "pairs summed before the sigmoid": (dpo(lambda *x: margin(*x).sum()), {"micro_batches"}),
    "only the first pair": (dpo(lambda *x: margin(*x)[:1]), {"micro_batches", "permutation"}),
    "weights forgotten": (dpo(weights=torch.ones_like), {"weighted"}),
    "weights of the micro-batch": (dpo(weights=lambda w: w / w.sum()), {"micro_batches", "weighted"}),
    "float32": (dpo(f=lambda m: -logsigmoid(m.float()), weights=lambda w: w.float()), {"contract"}),
    "a metric with a graph": (dpo(metric=lambda x: x), {"contract"}),
    "no gradient": (dpo(lambda *x: margin(*x).detach()), {"contract"}),
    "writes into the reference": (writes, {"purity"}),
}
OTHER = {
    "only the chosen one is averaged": (simpo(lambda c, r: c, lambda c, r: 1), "simpo", {"lengths", "balance"}),
    "both by the chosen length": (simpo(lambda c, r: c, lambda c, r: c), "simpo", {"lengths", "closed_form"}),
    "lengths exchanged": (simpo(lambda c, r: r, lambda c, r: c), "simpo", {"lengths"}),
    "both by the sum of lengths": (simpo(lambda c, r: c + r, lambda c, r: c + r), "simpo", {"lengths"}),
    "a longer response by its root": (simpo(lambda c, r: c.sqrt(), lambda c, r: r.sqrt()), "simpo", {"lengths"}),
    "ipo's target is 1 / beta": (ipo(target=2.0), "ipo", {"closed_form", "optimum"}),
    "ipo's distance is not squared": (ipo(power=1), "ipo", {"closed_form", "optimum"}),
}


@pytest.mark.parametrize("fault", [*FAULTS, *OTHER])
def test_a_broken_preference_objective_is_told_what_is_broken(fault):
    f, loss, named = OTHER.get(fault) or (FAULTS[fault][0], "dpo", FAULTS[fault][1])
    examples = 30 if "micro_batches" in named else 5       # a random split of few pairs may leave them whole
    found, report = broken(check_preference_objective, f, loss, examples=examples, **PAPER[loss])
    assert named <= found, report
    assert all(f"BROKEN   {name}: " in str(report) and len(report.broken[name]) > 10 for name in named)


def mutated(mutant):
    """What a file defines, with a fault of tests/faults.py: its text up to the configuration of a script."""
    source = (ROOT / mutant.file).read_text(encoding="utf-8").split("@dataclass(frozen")[0]
    assert source.count(mutant.old) == 1
    module = types.ModuleType("mutated")
    exec(source.replace(mutant.old, mutant.new), vars(module))
    return module


@pytest.mark.parametrize("fault, loss, named", [
    ("dpo forgets its reference", "dpo", "closed_form"), ("dpo adds its reference", "dpo", "reference"),
    ("dpo's beta is missing", "dpo", "closed_form"), ("the margin is upside down", "dpo", "upwards"),
    ("cdpo's label noise counts for the wrong label", "cdpo", "upwards"),
    ("ipo sums where it should average", "ipo", "closed_form"), ("ipo's target is 1 / beta", "ipo", "optimum"),
    ("slic averages where it should sum", "slic", "closed_form"), ("slic does not stop at its margin", "slic", "closed_form"),
    ("the nll term pushes the chosen response down", "slic", "balance"),
    ("the nll term is not per token", "slic", "closed_form"),
    ("simpo sums where it should average", "simpo", "closed_form"), ("simpo's target is added", "simpo", "closed_form"),
    ("both responses are divided by the chosen one's length", "simpo", "lengths"),
    ("kto wants the chosen response unlikely", "kto", "upwards"), ("kto compares the responses", "kto", "closed_form")])
def test_every_fault_of_dpo_in_our_table_is_named(fault, loss, named):
    objective = mutated(next(mutant for mutant in MATH if mutant.fault == fault and mutant.file == DPO)).objective
    f = functools.partial(objective, loss=loss, **PAPER[loss])
    found, report = broken(check_preference_objective, f, loss, **PAPER[loss])
    assert named in found, report


def test_a_loss_of_a_paper_needs_its_numbers():
    for loss, paper in (("dpo", {}), ("dpo", {"beta": 0.3, "gamma": 1.0}), (None, {"beta": 0.3}), ("orpo", {"beta": 0.3})):
        with pytest.raises(ValueError, match="expected dpo with beta; cdpo with beta and label_noise"):
            check_preference_objective(train_dpo.objective, loss, **paper)


# ---- Advantages ----


def by_recursion(rewards, values, mask, gamma, lam, step=lambda r, v, after, adv, g, l: r + g * after - v + g * l * adv):
    """GAE as most people write it: backwards, and without returns."""
    advantages, adv, after = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        now = step(rewards[:, t], values[:, t], after, adv, gamma, lam)
        adv, after = (torch.where(mask[:, t], x, 0.0) for x in (now, values[:, t]))
        advantages[:, t] = adv
    return advantages.detach()


@pytest.mark.parametrize("f", [gae, by_recursion], ids=["of the formula sheet", "by recursion"])
def test_generalised_advantage_estimation_is_sound(f):
    assert len(check_advantage(f, examples=8).held) == 13


def changed(change=lambda a, t: a, **arguments):
    """`gae` with something done to its results or its arguments."""
    def f(rewards, values, mask, gamma, lam):
        given = {"rewards": rewards, "values": values, "mask": mask, "gamma": gamma, "lam": lam}
        given |= {name: x(**given) for name, x in arguments.items()}
        return change(gae(**{name: x.detach() if name == "values" else x for name, x in given.items()})[0], given)
    return f


def clobbers(rewards, values, mask, gamma, lam):
    return gae(rewards.masked_fill_(~mask, 0.0), values, mask, gamma, lam)


ESTIMATORS = {
    "whitened": (changed(lambda a, t: (a - a.mean()) / (a.square().mean().sqrt() + 1e-3)), {"rows", "definition"}),
    "the last token is bootstrapped": (changed(bootstrap=lambda values, **_: values[:, -1]), {"terminal"}),
    "the critic gets a gradient": (changed(lambda a, t: a + t["values"] - t["values"].detach()), {"constants"}),
    "the mean over positions": (changed(lambda a, t: a / a.shape[1]), {"padding"}),
    "rewards to go of the whole answer": (changed(lambda a, t: a.sum(-1, keepdim=True).expand_as(a)), {"causality"}),
    "rewards multiplied by the mask": (lambda r, v, m, g, l: by_recursion(r * m, v * m, m | True, g, l), {"poison"}),
    "writes": (clobbers, {"writes"}), "of another shape": (changed(lambda a, t: a[:, :1]), {"contract"}),
    "nan for what is never visited": (changed(lambda a, t: a / 0), {"contract"}),
    "the reward counts twice": (lambda *x: by_recursion(*x, lambda r, v, n, a, g, l: 2 * r + g * n - v + g * l * a),
                                {"terminal", "one_step"}),
    "the value is forgotten": (changed(values=lambda values, **_: 0 * values), {"one_step", "terminal"}),
    "gamma and lambda exchanged": (lambda r, v, m, g, l: gae(r, v, m, l, g), {"one_step", "definition"}),
}
OF_OUR_TABLE = {"gae runs forward in time": "causality", "gae adds the value of the state it leaves": "one_step",
                "gae takes the reward of the token before": "causality", "gae does not discount the next value": "one_step",
                "gae forgets lambda": "definition", "gae forgets gamma in the recursion": "rewards_to_go",
                "gae takes what follows the run for its next value": "one_step",
                "an answer that has ended is bootstrapped": "terminal", "gae's returns are advantages less values": "returns",
                "gae takes values with a gradient": "constants"}


@pytest.mark.parametrize("fault", ESTIMATORS)
def test_a_broken_estimator_is_told_what_is_broken(fault):
    f, named = ESTIMATORS[fault]
    found, report = broken(check_advantage, f)
    assert named <= found and f"BROKEN   {min(named)}: " in str(report), report


@pytest.mark.parametrize("fault", OF_OUR_TABLE)
def test_every_fault_of_gae_in_our_table_is_named(fault):
    estimator = mutated(next(mutant for mutant in MATH if mutant.fault == fault and mutant.file == OPS)).gae
    found, report = broken(check_advantage, estimator)
    assert OF_OUR_TABLE[fault] in found, report
