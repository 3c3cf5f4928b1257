"""Objectives that make their token weights themselves: the weights are found, and every fault of our table is still named."""

import re
import types
from pathlib import Path

import pytest
import torch
from faults import GRPO, MATH, OPS

import train_grpo
from nanorl import ops
from nanorl.checks import BrokenObjective, check_objective
from nanorl.checks.__main__ import main
from nanorl.ops import AGGREGATES, kl_k3

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without two things that take long and are tested in tests/test_checks.py: small counterexamples, and `slope`."""
    monkeypatch.setattr("nanorl.checks.report.smaller_cases", lambda case: ())
    monkeypatch.setattr("torch.autograd.gradcheck", lambda *args, **options: True)


def broken(f, examples=8, **options):
    """The names of what is broken, and the report."""
    try:
        return set(), check_objective(f, aggregates="own", examples=examples, **options)
    except BrokenObjective as e:
        return e.report.broken.keys(), e.report


# ---- Sound losses, as people write them ----


def clipped(aggregate, kl_coef=0.0, bonus=None):
    """The loss of GRPO, its padding multiplied by 0."""
    def loss(logp, old_logp, adv, mask, *, ref_logp=None, entropy=None):
        ratio = (logp - old_logp).exp()
        token = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
        if kl_coef:
            token = token + kl_coef * kl_k3(logp, ref_logp)
        return aggregate(token, mask) - (0.0 if bonus is None else 0.01 * bonus(entropy, mask))
    return loss


def token_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def row_mean(x, mask):
    return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


@pytest.mark.parametrize("aggregate, weights, micro_batches", [
    (token_mean, "token_mean, 1 / N", "scale the loss of each by its share of all tokens that count"),
    (row_mean, "sequence_mean, 1 / (R |y|), where R counts answers without a token, too", "share of all answers"),
    (lambda x, m: (x * m).sum() / (40 * len(x)),
     "constant, 1 / (R L_max), where R counts answers without a token, too, L_max = 40", "share of all answers"),
    (lambda x, m: (x * m).sum(), "1, a sum over tokens", "their losses add up"),
    (lambda x, m: (x * m).sum() / 100, "0.01 times 1, a sum over tokens", "their losses add up"),
    (lambda x, m: (x * m).sum(-1).mean(), "sequence_sum, 1 / R, where R counts", "share of all answers"),
    (lambda x, m: (x * m * (0.5 + torch.arange(x.shape[1]))).sum(), "those of no aggregate", "their losses add up")],
    ids=["bnpo", "grpo", "dr_grpo", "sum", "a count from outside", "luspo", "later tokens more"])
def test_the_weights_are_found_and_held_to_account(aggregate, weights, micro_batches):
    """The names are TRL's. Padding that is multiplied by 0 is no fault."""
    report = check_objective(clipped(aggregate), clip=(0.2, 0.2), aggregates="own", examples=12)
    assert f"weights: {weights}" in str(report) and micro_batches in str(report) and not report.unchecked
    assert "note     poison: padding is multiplied by 0" in str(report) and "poison" in report.held
    assert {"empty_answers", "micro_batches", "padding", "flat_region", "pessimism", "reinforce"} <= report.held.keys()


@pytest.mark.parametrize("how", AGGREGATES)
def test_every_aggregate_is_recognised_when_it_is_named_or_not(how):
    report = check_objective(with_fault(None, how), clip=(0.2, 0.2), aggregates="own", aggregate=how, examples=10)
    assert f"weights: {how}, 1 / " in str(report) and "aggregation" in report.held
    others = {"sequence_mean": "the answer's length", "prompt_mean": "other prompts' answers"}
    assert others.get(how, "weights depend on") in str(report)
    assert ("lengths of answers change its direction" in str(report)) == how.endswith("_mean")


@pytest.mark.parametrize("f, options", [
    (lambda logp, old, adv, mask: clipped(row_mean)(logp, old, adv[:, None], mask), {"adv_shape": "B"}),
    (lambda logp, old, adv, mask: clipped(row_mean)(logp, old, adv + torch.zeros_like(logp), mask), {"adv_shape": "BT"}),
    (lambda logp, old, adv, mask: -clipped(row_mean)(logp, old, adv, mask), {"maximise": True}),
    (lambda logp, old, adv, mask: (clipped(row_mean)(logp, old, adv, mask), torch.zeros(()), mask.sum().float(), "more"), {}),
    (lambda logp, old, adv, mask, weights, **more: (clipped(row_mean)(logp, old, adv, mask), {"share": 0.5}), {})],
    ids=["adv [B]", "adv [B, T]", "maximised", "a tuple", "weights that it ignores"])
def test_contracts_that_people_have_are_accepted(f, options):
    assert not broken(f, clip=(0.2, 0.2), **options)[0]


@pytest.mark.parametrize("f, options, named", [
    (lambda logp, old, adv, mask: -clipped(row_mean)(logp, old, adv, mask), {}, {"reinforce", "direction"}),
    (lambda logp, old, adv, mask: clipped(row_mean)(logp, old, adv[:, :1], mask), {"adv_shape": "BT"}, {"reinforce"}),
    (lambda logp, old, adv, mask: clipped(row_mean)(logp, old, adv - adv.mean(), mask), {}, {"reinforce"}),
    (clipped(lambda x, m: ((x * m).sum(-1) / m.sum(-1)).mean()), {}, {"empty_answers"}),
    (clipped(lambda x, m: (x * m).mean()), {}, {"padding"}),
    (clipped(token_mean, bonus=lambda h, m: h.mean()), {}, {"entropy_term", "padding"}),
    (clipped(row_mean, bonus=token_mean), {}, {"micro_batches"}),
    (clipped(row_mean), {"aggregate": "token_mean"}, {"aggregation"})],
    ids=["maximised", "the first token's advantage", "whitened", "no clamp", "a mean over padding", "entropy of padding",
         "two ways in one loss", "another aggregate"])
def test_what_a_loss_of_its_own_weights_can_break(f, options, named):
    found, report = broken(f, clip=(0.2, 0.2), **options)
    assert named <= found and len(found) <= 4, report


def test_a_gate_that_is_soft_is_no_clip():
    """SAPO's: every token keeps a gradient, so that there is no edge to be told of."""
    def loss(logp, old_logp, adv, mask):
        return -row_mean(4 * torch.sigmoid((logp - old_logp).exp() - 1) * adv, mask)

    report = check_objective(loss, aggregates="own", examples=8)
    assert not report.unchecked and report.skipped["flat_region"] == "no clip range was given"


def test_an_entropy_bonus_may_weigh_tokens_in_its_own_way():
    report = broken(clipped(row_mean, kl_coef=0.04, bonus=token_mean), clip=(0.2, 0.2))[1]
    assert "KL term: its expected gradient is 0.02 times that of KL(ref || pi)" in str(report)
    assert "entropy_term" in report.held and "note     entropy_term: the entropy bonus weighs tokens otherwise" in str(report)
    assert "share of all answers, apart from terms such as KL and entropy" in str(report)


# ---- The faults of tests/faults.py ----


OBJECTIVE = "KL = {" + (ROOT / GRPO).read_text(encoding="utf-8").split("KL = {", 1)[1].split("def advantages", 1)[0]
FAULTS = {mutant.fault: mutant for mutant in MATH if mutant.file in (GRPO, OPS)}


def with_fault(mutant, how, **options):
    """The objective of train_grpo.py with a fault, in it or in what it is made of, that makes the weights of `how` itself."""
    sheet, objective, formulas = ops, OBJECTIVE, (ROOT / OPS).read_text(encoding="utf-8")
    if mutant is not None:
        assert (formulas if mutant.file == OPS else objective).count(mutant.old) == 1
        objective = objective.replace(mutant.old, mutant.new) if mutant.file == GRPO else objective
        if mutant.file == OPS:
            sheet = types.ModuleType("ops")
            exec(formulas.replace(mutant.old, mutant.new), vars(sheet))
    names = vars(train_grpo) | {name: x for name, x in vars(sheet).items() if not name.startswith("__")}
    exec(objective, names)

    def loss(logp, old_logp, adv, mask, *, prompt_index, ref_logp=None, entropy=None):
        weights = sheet.token_weights(mask, prompt_index, how, 20)
        return names["objective"](logp, old_logp, adv, mask, weights, ref_logp=ref_logp, entropy=entropy, **options)
    return loss


CLIP = {"clip": (0.1, 0.28)}, {"clip_low": 0.1, "clip_high": 0.28}
KL = CLIP[0], CLIP[1] | {"kl_coef": 0.3}
WEIGHTED = {"clip": (0.2, 0.2)}, {"kl_coef": 0.3, "kl": "k1", "kl_in": "weighted"}
SEQUENCE = {"clip": (0.2, 0.2), "ratio": "sequence"}, {"ratio": "sequence"}
TRUNCATED = {"detached_weight": True}, {"bound": "truncate", "clip_high": 0.5}
# aggregate, what the check is told and the loss is made with, and which invariant names which fault: the first of them always
# runs, the others with -m slow.
TABLE = [
    ("sequence_mean", CLIP, {
        "reinforce": ["GRPO's loss is maximised", "the importance ratio is upside down",
                      "advantage's sign flipped in the clipped surrogate"],
        "pessimism": ["the clipped surrogate is optimistic", "GRPO's ratio is always 1"],
        "flat_region": ["clip inverted for A < 0", "the clip has no minimum around it", "the ends of the clip are exchanged",
                        "the clip has no lower end", "the clip's lower end is that of the log-ratio",
                        "GRPO exchanges the ends of the clip"],
        "poison": ["log-probs of padding reach GRPO's ratio", "old log-probs of padding reach GRPO's ratio"],
        "padding": ["GRPO's loss is a mean over its micro-batch", "the count of clipped tokens is a share"],
        "aggregation": ["GRPO forgets the weights", "a row of one token counts as empty", "an empty row counts as a row",
                        "sequence_mean counts empty rows", "sequence_mean forgets the length"],
        "contract": ["GRPO's ratio metrics carry a graph"], "empty_answers": ["weights of an empty step are nan"],
        "purity": ["GRPO blanks the sampler's log-probs"]}),
    ("sequence_mean", KL, {
        "divergence": ["the KL divergence is a bonus", "k3 measures the wrong direction",
                       "GRPO's penalty measures the wrong direction"],
        "poison": ["reference log-probs of padding reach GRPO's loss"], "contract": ["GRPO's KL metric carries a graph"],
        "no_advantage": ["GRPO's KL is measured from the sampling policy"]}),
    ("sequence_mean", WEIGHTED, {
        "divergence": ["the ratio that weighs a KL is a constant", "k1 measures the wrong direction",
                       "a weighted KL forgets the ratio"]}),
    ("sequence_mean", (CLIP[0], KL[1] | {"kl": "k2"}), {"divergence": ["k2 takes the size of r for its square"]}),
    ("sequence_mean", (CLIP[0], CLIP[1] | {"entropy_coef": 0.1}), {
        "entropy_term": ["entropy is punished"], "poison": ["entropies of padding reach GRPO's loss"]}),
    ("sequence_mean", SEQUENCE, {
        "flat_region": ["the sequence ratio is a product", "the sequence ratio is an arithmetic mean",
                        "--ratio sequence is --ratio token", "--ratio sequence forgets the log"],
        "padding": ["the sequence ratio counts padding", "--ratio sequence counts padding"],
        "contract": ["--ratio sequence has no gradient"], "empty_answers": ["the sequence ratio of an empty row is nan"]}),
    ("sequence_mean", TRUNCATED, {
        "weighted_score": ["the truncated weight is at least the cap", "a gradient flows through the truncated weight",
                           "--bound truncate clips at its cap", "--bound truncate takes --clip-high for the cap"],
        "reinforce": ["advantage's sign flipped in the truncated surrogate"],
        "contract": ["no gradient flows through a truncated token"],
        "purity": ["the truncated surrogate scales the advantages"]}),
    ("sequence_mean", ({}, {"bound": "soft"}), {
        "reinforce": ["the soft gate is scaled to its height, not its slope", "advantage's sign flipped in the soft surrogate",
                      "the soft gate is centred at 0"]}),
    ("sequence_mean", ({}, {"bound": "none"}), {"reinforce": ["advantage's sign flipped where there is no bound"]}),
    ("sequence_mean", ({}, {"bound": "mask", "clip_low": 0.3, "clip_high": 0.5}), {
        "reinforce": ["advantage's sign flipped in the masked surrogate", "the mask keeps what is outside the band"]}),
    ("token_mean", CLIP, {"padding": ["a weight for masked tokens", "token_mean counts padding"],
                          "aggregation": ["token_mean averages within a row"]}),
    ("constant", CLIP, {"aggregation": ["GRPO divides by the weights of its micro-batch"],
                        "padding": ["constant divides by the longest row at hand"]}),
    ("prompt_mean", CLIP, {"aggregation": ["prompt_mean counts prompts without a token",
                                           "prompt_mean averages answers, not tokens"]}),
    ("sequence_sum", CLIP, {"aggregation": ["sequence_sum does not divide by the rows"]}),
]


@pytest.mark.parametrize("fault, named, how, setting", [
    pytest.param(fault, named, how, setting, id=fault, marks=[pytest.mark.slow] if number else [])
    for how, setting, names in TABLE for named, faults in names.items() for number, fault in enumerate(faults)])
def test_every_fault_of_an_objective_in_our_table_is_named(fault, named, how, setting):
    """Where it makes its weights itself, too."""
    told, options = setting
    found, report = broken(with_fault(FAULTS[fault], how, **options), examples=6, aggregate=how, **told)
    assert named in found or f"note     {named}: " in str(report), report


# ---- The command ----


def test_the_page_shows_what_its_command_prints(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/checks.md").read_text(encoding="utf-8")
    (tmp_path / "theirs.py").write_text(re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1])
    monkeypatch.chdir(tmp_path)
    main(re.search(r"^python -m nanorl.checks (theirs.*)$", page, re.M)[1].split())
    shown = re.search(r"^```text\n(note .*?)^```", page, re.M | re.S)[1]
    assert capsys.readouterr().out.endswith(shown)


def test_the_command_takes_losses_of_every_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(
        "import torch\n\ndef own(logp, old, adv, mask):\n    return (logp.masked_fill(~mask, 0) * adv[:, None]).sum()\n\n"
        "def pairs(chosen, rejected, ref_chosen, ref_rejected):\n"
        "    return -torch.nn.functional.logsigmoid(chosen - ref_chosen - rejected + ref_rejected).mean()\n\n"
        "from nanorl.ops import gae\n")
    own = "my_losses.py:own --aggregates own --adv-shape B --examples 3"
    for argv, code, says in [
            (f"{own} --maximise", 0, "note     weights: 1, a sum over tokens"), (own, 1, "BROKEN   reinforce"),
            (f"{own} --kind preference", 2, "--aggregates: not for --kind preference; leave it out"),
            ("my_losses.py:own --maximise", 2, "too many positional arguments"),
            ("my_losses.py:own --kind gae", 2, "expected advantages(rewards, values, mask, gamma, lam)"),
            ("my_losses.py:pairs --kind preference --loss dpo", 2, "loss dpo with no number: expected dpo with beta;"),
            ("my_losses.py:pairs --kind preference --loss dpo --beta 1 --examples 3", 0, "holds    optimum"),
            ("my_losses.py:pairs --kind preference --loss dpo --beta 2 --examples 3", 1, "BROKEN   closed_form"),
            ("my_losses.py:gae --kind gae --examples 3", 0, "holds    unbiased")]:
        try:
            exit = main(argv.split()) or 0
        except SystemExit as e:
            exit = e.code
        printed = capsys.readouterr()
        assert exit == code and says in printed.out + printed.err, argv


@pytest.mark.parametrize("options, says", [
    ({"adv_shape": "B"}, "adv_shape B: requires aggregates='own'"), ({"maximise": True}, "maximise: requires aggregates='own'"),
    ({"aggregates": "its own"}, "expected 'given' or 'own'"), ({"aggregates": "own", "adv_shape": "[B]"}, "'B1', 'B' or 'BT'")])
def test_options_of_own_weights_are_not_ignored(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        check_objective(train_grpo.objective, **options)
