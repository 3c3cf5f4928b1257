"""The invariants themselves: sound objectives pass them, and each kind of fault is named, in words."""

import contextlib
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanorl.checks import BrokenObjective, advantage_bias, check_objective, divergence, length_bias
from nanorl.checks.__main__ import main
from nanorl.checks.invariants import ADVANTAGE_INVARIANTS, OBJECTIVE_INVARIANTS
from nanorl.family import ADVANTAGES, ALGORITHMS
from nanorl.ops import center, clipped_surrogate, kl_k1, kl_k2, kl_k3, leave_one_out, masked_sum, sequence_ratio, zscore
from train_grpo import Config, objective

pytestmark = pytest.mark.math

quick = functools.partial(check_objective, examples=10)


def sound(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None):
    """PPO's clip, as a user might write it."""
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    surrogate = clipped_surrogate(logp, old_logp, adv, 0.2, 0.2)
    return -(weights * surrogate).sum(), {"surrogate": masked_sum(surrogate.detach(), mask)}


def loss_of(cfg):
    """The objective of train_grpo.py with the choices of a row."""
    return functools.partial(objective, ratio=cfg.ratio, bound=cfg.bound, clip_low=cfg.clip_low, clip_high=cfg.clip_high)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_of_the_table_is_sound(name):
    """With its own bound, numbers, advantage and weights."""
    cfg = Config(algo=name)
    compares = cfg.advantage not in ("reward", "positive")
    report = quick(loss_of(cfg), ADVANTAGES[cfg.advantage] if compares else None, ratio=cfg.ratio, aggregate=cfg.aggregate,
                   clip=(cfg.clip_low, cfg.clip_high) if cfg.bound == "clip" else None, detached_weight=cfg.bound == "truncate")
    expected = {"contract", "poison", "padding", "purity", "micro_batches", "permutation", "reinforce", "direction",
                "no_advantage"}
    expected |= {"clip": {"slope", "flat_region", "pessimism"}, "truncate": {"weighted_score"}}.get(cfg.bound, {"slope"})
    expected |= {"same_rewards", "shifted_rewards", "scaled_rewards", "reordered_rewards"} if compares else set()
    assert report.held.keys() == expected and not report.broken
    assert report.held.keys() | report.skipped.keys() == {i.__name__ for i in OBJECTIVE_INVARIANTS + ADVANTAGE_INVARIANTS}
    assert "lengths of answers change its direction" in str(report) if cfg.aggregate == "sequence_mean" else True


def test_advantages_may_be_of_tokens():
    """One that gives all tokens of an answer the advantage of its first is then found out."""
    quick(sound, adv_shape="BT", clip=(0.2, 0.2))
    with pytest.raises(BrokenObjective) as error:
        quick(changed(adv=lambda adv: adv[:, :1]), adv_shape="BT", clip=(0.2, 0.2))
    assert "reinforce" in error.value.report.broken


# ---- Faults ----


def changed(**replace):
    """`sound` with one of its steps replaced."""
    def f(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None):
        step = {"blank": lambda x: x.masked_fill(~mask, 0.0), "adv": lambda a: a, "weights": lambda w: w,
                "surrogate": lambda l, o, a: clipped_surrogate(l, o, a, 0.2, 0.2), "sum": lambda x: x.sum(),
                "metric": lambda x: masked_sum(x, mask), "more": lambda *_: 0.0} | replace
        logp, old_logp = step["blank"](logp), step["blank"](old_logp)
        surrogate = step["surrogate"](logp, old_logp, step["adv"](adv))
        ref = None if ref_logp is None else ref_logp.masked_fill(~mask, 0.0)
        loss = -step["sum"](step["weights"](weights) * surrogate) + step["more"](logp, ref, weights)
        return loss, {"surrogate": step["metric"](surrogate.detach())}
    return f


def clipped_upside_down(logp, old_logp, adv):
    ratio = (logp - old_logp).exp()
    return torch.maximum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)


def clipped_by_advantage_sign_alone(logp, old_logp, adv):
    ratio = (logp - old_logp).exp()
    return ratio.clamp(0.8, 1.2) * adv


FAULTS = {
    "the advantage's sign is flipped": (changed(adv=lambda a: -a), {"reinforce", "direction"}),
    "max where min belongs": (changed(surrogate=clipped_upside_down), {"flat_region", "pessimism"}),
    "clipped on both sides": (changed(surrogate=clipped_by_advantage_sign_alone), {"flat_region"}),
    "log-probs multiplied by the mask, not blanked": (changed(blank=lambda x: x * 1.0), {"poison"}),
    "its own mean over the micro-batch": (changed(sum=lambda x: x.mean()), {"micro_batches", "padding"}),
    "a metric that is a mean": (changed(metric=lambda x: x.mean()), {"micro_batches"}),
    "advantages whitened within the micro-batch": (changed(adv=lambda a: a - a.mean()), {"micro_batches", "reinforce"}),
    "weights forgotten": (changed(weights=torch.ones_like), {"reinforce"}),
    "written into the advantage": (changed(adv=lambda a: a.mul_(2.0)), {"purity"}),
    "no gradient through the policy": (changed(surrogate=lambda l, o, a: 0.0 * l + (l.detach() - o).exp() * a), {"direction"}),
    "shifted by one token": (changed(surrogate=lambda l, o, a: clipped_surrogate(l, o, a, 0.2, 0.2).roll(1, -1)),
                             {"reinforce"}),
    "only the first answer's advantage": (changed(adv=lambda a: a[:1].expand_as(a)), {"permutation", "micro_batches"}),
    "a metric with a graph": (changed(metric=lambda x: x.sum().requires_grad_()), {"contract"}),
    "a ratio without its gradient": (changed(surrogate=lambda l, o, a: (l - o).exp().detach() * a * l), {"slope"}),
    "a pull on every token": (changed(more=lambda l, r, w: 0.01 * (w * l).sum()), {"no_advantage", "reinforce"}),
    "k1 in the loss": (changed(more=lambda l, r, w: (w * kl_k1(l, r)).sum() if r is not None else 0.0), {"divergence"}),
    "KL to the reference with its sign flipped": (
        changed(more=lambda l, r, w: -(w * kl_k2(l, r)).sum() if r is not None else 0.0), {"divergence"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_objective_is_told_what_is_broken(fault):
    f, named = FAULTS[fault]
    with pytest.raises(BrokenObjective) as error:
        check_objective(f, clip=(0.2, 0.2), examples=15)
    broken = error.value.report.broken
    assert named <= broken.keys(), error.value
    assert all(f"BROKEN   {name}: " in str(error.value) and len(broken[name]) > 10 for name in named)


# ---- Faults of a loss with further terms ----


def with_kl(surrogate, kl, weighted=False, detach=False, entropy_coef=0.0, pull=0.0):
    """L = -sum w [S(rho, A) - 0.04 KL + entropy_coef H - pull logp], the usual loss of GRPO."""
    def f(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None):
        logp, old_logp, ref_logp, entropy = (x.masked_fill(~mask, 0.0) for x in (logp, old_logp, ref_logp, entropy))
        term = kl(logp, ref_logp.detach() if detach else ref_logp)
        term = term * (logp - old_logp).exp() if weighted else term
        inside = surrogate(logp, old_logp, adv) - 0.04 * term + entropy_coef * entropy - pull * logp
        return -(weights * inside).sum(), {}
    return f


def right_clip(logp, old_logp, adv):
    return clipped_surrogate(logp, old_logp, adv, 0.2, 0.2)


def clipped_above_only(logp, old_logp, adv):
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * adv, ratio.clamp(max=1.2) * adv)


def clipped_below_only(logp, old_logp, adv):
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * adv, ratio.clamp(min=0.8) * adv)


def unclipped(logp, old_logp, adv):
    return (logp - old_logp).exp() * adv


def k1_with_the_gradient_of_k2(logp, ref_logp):
    return kl_k2(logp, ref_logp) - kl_k2(logp, ref_logp).detach() + kl_k1(logp, ref_logp).detach()


TERMS = [(kl_k2, False), (kl_k3, False), (kl_k1, True), (kl_k3, True), (k1_with_the_gradient_of_k2, False)]
every_term = pytest.mark.parametrize("kl, weighted", TERMS, ids=["k2", "k3", "k1 weighted", "k3 weighted", "k1 by k2"])


CLIPS = [
    (clipped_upside_down, {"flat_region", "pessimism"}), (clipped_above_only, {"flat_region"}),
    (clipped_below_only, {"flat_region"}), (unclipped, {"flat_region"}),
    (lambda l, o, a: clipped_surrogate(l, o, a, 0.2, 0.21), {"flat_region"}),
    (lambda l, o, a: right_clip(l, o, -a), {"reinforce", "direction", "flat_region"})]


@pytest.mark.parametrize("kl, weighted, clip, named", [
    pytest.param(*term, *clip, marks=[pytest.mark.slow] if n % 2 else [])           # by default, every clip meets some terms
    for n, (clip, term) in enumerate(itertools.product(CLIPS, TERMS))])
def test_a_kl_term_hides_no_wrong_clip(kl, weighted, clip, named):
    """And is not called broken itself."""
    with pytest.raises(BrokenObjective) as error:
        quick(with_kl(clip, kl, weighted), clip=(0.2, 0.2))
    assert named <= error.value.report.broken.keys() <= named | {"pessimism"} and not error.value.report.unchecked


@every_term
def test_a_pull_on_every_token_is_not_taken_for_a_kl_term(kl, weighted):
    with pytest.raises(BrokenObjective) as error:
        quick(with_kl(right_clip, kl, weighted, pull=0.001), clip=(0.2, 0.2))
    assert error.value.report.broken.keys() == {"no_advantage", "reinforce"}


@every_term
@pytest.mark.parametrize("detach, entropy_coef", [(False, 0.0), (True, 0.1)])
def test_a_sound_loss_with_a_kl_term_is_checked_in_full(kl, weighted, detach, entropy_coef):
    """Also with an entropy bonus, and where the loss detaches ref_logp."""
    report = check_objective(with_kl(right_clip, kl, weighted, detach, entropy_coef), clip=(0.2, 0.2), examples=15)
    applies = {i.__name__ for i in OBJECTIVE_INVARIANTS} - {"weighted_score", *(["entropy_term"] if not entropy_coef else [])}
    assert report.held.keys() == applies and not report.unchecked and any("KL term: " in note for note in report.notes)
    assert str(report).endswith(f"\n{len(applies)} hold, {18 - len(applies)} do not apply")


def test_a_detached_weight_is_checked_beside_other_terms():
    """CISPO with KL and entropy; and that its weight is live is named in spite of them."""
    cispo = functools.partial(loss_of(Config(algo="cispo")), kl_coef=0.04, entropy_coef=0.1)
    assert {"weighted_score", "entropy_term", "reinforce"} <= quick(cispo, detached_weight=True).held.keys()

    def live(logp, *others, ref_logp=None, entropy=None):
        kl = (others[3] * kl_k3(logp, ref_logp).masked_fill(~others[2], 0.0)).sum()
        return live_weight(logp, *others)[0] + kl, {}
    with pytest.raises(BrokenObjective) as error:
        quick(live, detached_weight=True)
    assert "weighted_score" in error.value.report.broken


def test_the_bias_of_an_aggregation_is_noted_beside_a_kl_term():
    report = quick(with_kl(right_clip, kl_k1, weighted=True), clip=(0.2, 0.2), aggregate="sequence_mean")
    assert any("lengths of answers change its direction" in note for note in report.notes)


@pytest.mark.parametrize("f, options", [
    (sound, {}), (loss_of(Config(algo="masked_is")), {}), (with_kl(right_clip, kl_k3), {}),
    (changed(surrogate=clipped_above_only), {}), (changed(surrogate=clipped_below_only), {}),
    (loss_of(Config(algo="cispo")), {"detached_weight": True, "clip": (0.2, 4.0)})])
def test_what_may_apply_and_could_not_be_checked_is_said(f, options):
    """A ratio that is bounded without a clip range, and a range that no invariant of a detached weight uses."""
    report = quick(f, **options)
    assert report.unchecked == {"flat_region", "pessimism"} and str(report).count("UNCHECKED ") == 2
    assert "2 could not be checked" in str(report).splitlines()[-1]


@pytest.mark.parametrize("f, options", [(changed(surrogate=unclipped), {}), (loss_of(Config(algo="reinforce")), {}),
                                        (loss_of(Config(algo="cispo")), {"detached_weight": True})])
def test_a_loss_without_a_clip_needs_no_clip_range(f, options):
    assert not quick(f, **options).unchecked


def with_entropy(term):
    """`sound` with an entropy term."""
    def f(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None):
        loss, metrics = sound(logp, old_logp, adv, mask, weights)
        return loss + term(entropy.masked_fill(~mask, 0.0), weights), metrics
    return f


def live_weight(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None):
    """Truncated importance sampling that forgot to stop the gradient of its weight."""
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    return -(weights * (logp - old_logp).exp().clamp(max=5.0) * adv * logp).sum(), {}


@pytest.mark.parametrize("f, options, named", [
    (with_entropy(lambda h, w: 0.1 * (w * h).sum()), {}, "entropy_term"),
    (with_entropy(lambda h, w: -h.sum()), {}, "entropy_term"),
    (live_weight, {"detached_weight": True}, "weighted_score"),
    (lambda *args, **kwargs: (sound(*args, **kwargs)[0].float(), {}), {}, "contract"),
    (lambda *args, **kwargs: (sound(*args, **kwargs)[0].detach(), {}), {}, "contract"),
    (lambda *args, **kwargs: sound(*args, **kwargs)[0], {}, "contract")])
def test_faults_of_an_option_are_named(f, options, named):
    with pytest.raises(BrokenObjective) as error:
        quick(f, **options)
    assert named in error.value.report.broken


def test_a_sound_objective_with_every_option_passes():
    """Entropy bonus, float32 advantage with a large eps, KL: nothing sound is called broken."""
    quick(with_entropy(lambda h, w: -0.1 * (w * h).sum()))
    for advantage in (lambda r: zscore(r.float(), eps=1e-4), lambda r: r - r.mean(-1, keepdim=True)):
        check_objective(sound, advantage, examples=50)


def test_a_detached_weight_is_not_checked_with_a_clip():
    """CISPO's cap is not a clip: given both, the report says what was skipped and why."""
    report = quick(loss_of(Config(algo="cispo")), clip=(0.2, 4.0), detached_weight=True)
    assert "every token its gradient" in report.skipped["flat_region"] and "weighted_score" in report.held


def weight_of_answers(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None):
    """VESPO's: w^2 e^(3 - 3 w), of the product w of an answer's ratios; it may be larger than the ratio."""
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    w = (logp - old_logp).sum(-1, keepdim=True).exp().detach()
    return -(weights * w.square() * (3 - 3 * w).exp() * adv * logp).sum(), {}


def test_a_detached_weight_of_answers_is_one_number_for_each():
    assert "weighted_score" in quick(weight_of_answers, detached_weight=True, ratio="sequence").held
    for f, ratio in ((weight_of_answers, "token"), (loss_of(Config(algo="cispo")), "sequence")):
        with pytest.raises(BrokenObjective) as error:
            quick(f, detached_weight=True, ratio=ratio)
        assert error.value.report.broken.keys() == {"weighted_score"}


def test_a_kl_term_may_follow_a_sum_of_divergences():
    """k3 weighted by the ratio of the whole answer, its mean over tokens: half of each where answers have two tokens."""
    def f(logp, old_logp, adv, mask, weights, *, ref_logp, entropy=None):
        return (weights * sequence_ratio(logp, old_logp, mask) * kl_k3(logp, ref_logp)).sum(), {}

    assert divergence(f) == ("KL term: its expected gradient is 0.5 times that of KL(ref || pi), each prefix held fixed plus "
                             "0.5 times that of KL(pi || ref) of whole answers")


def test_the_counterexample_is_small_and_in_words():
    """A flipped sign shows in a single token."""
    with pytest.raises(BrokenObjective) as error:
        check_objective(FAULTS["the advantage's sign is flipped"][0])
    assert "a token with A = " in error.value.report.broken["reinforce"]
    assert "1 answer with 1 position" in error.value.report.broken["direction"]


def without_contrast_in_float32(r):
    """E[r^2] - E[r]^2, whose rounding is divided by its own root."""
    mean, square = r.float().mean(-1, keepdim=True), (r.float() ** 2).mean(-1, keepdim=True)
    return (r.float() - mean) / (square - mean**2 + 1e-12).abs().sqrt()


@pytest.mark.parametrize("advantage, named", [
    (without_contrast_in_float32, "same_rewards"), (lambda r: r, "shifted_rewards"),
    (lambda r: center(r) / (center(r).abs().mean() + 1.0), "scaled_rewards"),
    (lambda r: center(r) * torch.arange(r.shape[1]), "reordered_rewards")])
def test_a_broken_advantage_is_told_what_is_broken(advantage, named):
    with pytest.raises(BrokenObjective) as error:
        quick(sound, advantage)
    assert named in error.value.report.broken


# ---- What is no fault is measured ----


@pytest.mark.parametrize("advantage, says", [
    (lambda r: r, "1.0000 of the true one, unbiased"), (leave_one_out, "1.0000 of the true one, unbiased"),
    (center, "0.6667 of the true one = (G-1)/G at G = 3"),
    (zscore, "not proportional to the true one; on a bandit with three arms its components are 1.8, 1.29, 1.51 of it")])
def test_the_bias_of_an_advantage_is_named_with_its_factor(advantage, says):
    """REINFORCE and leave-one-out are unbiased, the group mean shrinks by (G-1)/G, z-scores change the direction."""
    assert says in advantage_bias(advantage)


@pytest.mark.parametrize("how, says", [("sequence_sum", "1.000 of the true one at the first token and 1.000"),
                                       ("constant", "0.500 of the true one at the first token and 0.500"),
                                       ("sequence_mean", "0.750 of the true one at the first token and 0.500")])
def test_the_bias_of_an_aggregation_is_named_with_its_factors(how, says):
    assert says in length_bias(sound, how)


# ---- The command ----


OBJECTIVE = '''
def objective(logp, old_logp, adv, mask, weights, *, ref_logp=None, entropy=None):
    logp = logp.masked_fill(~mask, 0.0)
    return {sign}(weights * adv * logp).sum(), {{}}

def short(logp, adv):
    return 0

number = 3
'''


def command(*argv, cwd):
    """The command as users run it in a folder of their own."""
    return subprocess.run([sys.executable, "-m", "nanorl.checks", *argv], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize("sign, code, says", [("-", 0, "holds    reinforce"), ("", 1, "BROKEN   reinforce")])
def test_the_command_reports_and_exits_with_1_when_something_is_broken(sign, code, says, folder, capsys):
    Path("mine.py").write_text(OBJECTIVE.format(sign=sign))
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as exit:
        main(["mine.py:objective", "--examples", "5"])
    assert says in capsys.readouterr().out
    assert not code or exit.value.code == code


@pytest.mark.parametrize("argv, says", [
    ("nowhere.py:f", "nowhere.py:f: expected FILE.py:NAME, a file of Python code and what it defines; nowhere.py does not"),
    ("mine.py", "expected FILE.py:NAME"),
    ("mine.py:", "expected FILE.py:NAME"), (".:f", "expected FILE.py:NAME"), ("mine.txt:objective", "expected FILE.py:NAME"),
    ("mine.py:other", "has no other (it has objective, short, number); expected objective("),
    ("mine.py:number", "mine.py:number: is 3; expected objective("),
    ("mine.py:short", "too many positional arguments; expected objective(logp, old_logp, adv, mask, weights, *"),
    ("mine.py:objective --advantage mine.py:objective", "missing a required argument: 'old_logp'; expected advantage(rewards)"),
    ("mine.v2.py:objective", "two dots"), ("random.py:objective", "another module called random; rename the file"),
    ("exits.py:objective", "exits.py exits when imported"),
    ("mine.py:objective --examples 0", "--examples 0: must be at least 1")])
def test_the_command_says_in_a_sentence_what_it_cannot_check(argv, says, folder, capsys):
    for name in ("mine.py", "mine.txt", "mine.v2.py", "random.py"):
        Path(name).write_text(OBJECTIVE.format(sign="-"))
    Path("exits.py").write_text("raise SystemExit(0)")
    with pytest.raises(SystemExit) as exit:
        main(argv.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error and error.count("\n") == 1


def test_a_file_may_have_neighbours_and_be_called_like_a_module_of_nanorl(tmp_path):
    """It is run once, also where it holds the objective and the advantage; and nothing is left in its folder."""
    (tmp_path / "run.py").write_text(OBJECTIVE.format(sign="-") + "from ops import center as advantage")
    (tmp_path / "ops.py").write_text("def center(r):\n    return r - r.mean(-1, keepdim=True)")
    (tmp_path / "checks.py").write_text("from run import objective, advantage\nprint('once')")
    result = command("checks.py:objective", "--advantage", "checks.py:advantage", "--examples", "2", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.count("once") == 1 and "holds    shifted_rewards" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"run.py", "ops.py", "checks.py", "__pycache__"}


@pytest.mark.parametrize("text, says", [
    (b"\nraise ValueError('a mistake')", "cannot be imported, line 2: ValueError: a mistake"),
    (b"open('nowhere.txt')", "line 1: FileNotFoundError: "),
    (b"import nowhere", "line 1: ModuleNotFoundError: No module named"),
    (b"def f(:", "cannot be imported: SyntaxError: invalid syntax (mine.py, line 1)"), (b"\xff\xd8\x00\x01", "Error: "),
    (b"A loss that clips.", "SyntaxError: invalid syntax"), (b"{\"loss\": null}", "line 1: NameError: name 'null'"),
    (b"", "has no objective (it has none)")])
def test_a_file_that_cannot_be_imported_is_refused_with_the_reason(text, says, folder, capsys):
    Path("mine.py").write_bytes(text)
    with pytest.raises(SystemExit) as exit:
        main(["mine.py:objective"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error and "mine.py:objective: mine.py " in error and error.count("\n") == 1


def test_an_objective_that_takes_its_arguments_by_name_is_told_so(folder, capsys):
    Path("mine.py").write_text("def one(**batch): pass\ndef two(logp, *, old_logp, adv, **more): pass\n"
                               "def three(logp, old_logp, adv, mask, weights, clip, **more): pass")
    for name, says in (("one", "one takes by name alone what is given by position"), ("two", "two takes by name alone"),
                       ("three", "missing a required argument: 'clip'")):
        with pytest.raises(SystemExit):
            main([f"mine.py:{name}"])
        assert says in capsys.readouterr().err


def test_an_objective_with_further_keywords_is_checked(folder, capsys):
    Path("mine.py").write_text("from torch import exp\nfrom train_grpo import objective as its\n"
                               "def objective(logp, old_logp, adv, mask, weights, **more):\n"
                               "    return its(logp, old_logp, adv, mask, weights, kl_coef=0.04, **more)")
    main(["mine.py:objective", "--clip", "0.2", "0.2", "--examples", "5"])
    assert capsys.readouterr().out.endswith("\n12 hold, 6 do not apply\n")
    for function, code, says in (("objective", 3, "\n10 hold, 2 could not be checked, 6 do not apply\n"),
                                 ("exp", 1, "note     nothing else can be checked\nBROKEN   contract")):
        with pytest.raises(SystemExit) as exit:
            main([f"mine.py:{function}", "--examples", "5"])
        assert exit.value.code == code and says in capsys.readouterr().out


def test_the_exit_codes_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert all(f" {code} if " in words for code in (0, 1, 2, 3))


def test_an_error_inside_the_objective_is_reported(folder, capsys):
    Path("mine.py").write_text("def objective(*args, ref_logp=None, entropy=None):\n    raise ValueError('a mistake')")
    with pytest.raises(SystemExit) as exit:
        main(["mine.py:objective"])
    assert exit.value.code == 1 and "ValueError: a mistake" in capsys.readouterr().out


def test_without_hypothesis_there_is_one_sentence(tmp_path):
    (tmp_path / "hypothesis.py").write_text("raise ImportError")
    result = command("mine.py:objective", cwd=tmp_path)
    sentence = "nanorl.checks needs hypothesis; install it with: pip install hypothesis\n"
    assert result.returncode == 1 and result.stderr == sentence
