"""Theorems about the objectives at the top of train_grpo.py, train_pretrain.py and train_sft.py."""

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import poisons, policies
from torch import Tensor

import train_grpo
import train_pretrain
import train_sft
from nanorl import run
from nanorl.checks import Broken, divergence, invariants
from nanorl.checks.cases import Batch, aggregates, batches, generators, masked_prompts, masks, partition, rewards
from nanorl.data import response_mask
from nanorl.family import ADVANTAGES, KL_TERMS
from nanorl.ops import entropy_from_logits, kl_k1, leave_one_out, log_softmax, selective_log_softmax, token_weights
from nanorl.sample import Rollout
from nanorl.tabular import expectation, leaf, log_probs, randn, reward_gradient, sequence_kl, sequences

pytestmark = pytest.mark.math

GROUPWISE = ("center", "leave_one_out", "zscore", "zscore_batch")        # advantages that compare within a group
BOUNDS = [{"bound": "none"}, {"bound": "clip", "clip_low": 0.1, "clip_high": 0.28},
          {"bound": "clip", "clip_low": 0.2, "clip_high": 3.0}, {"bound": "truncate", "clip_high": 0.2},
          {"bound": "mask", "clip_low": 0.3, "clip_high": 0.5}, {"bound": "soft"}]
LEASHES = [{}, *({"kl_coef": 0.3, "kl": term.estimator, "kl_in": term.place} for term in KL_TERMS.values())]
POLICY_TERMS = [{"ratio": "none", "bound": "none"}, *({"ratio": r} | bound for r in ("token", "sequence") for bound in BOUNDS)]
policy_terms = st.sampled_from(POLICY_TERMS)
options = st.builds(lambda terms, leash, entropy: terms | leash | {"entropy_coef": entropy}, policy_terms,
                    st.sampled_from(LEASHES), st.sampled_from([0.0, 0.1]))


def assert_close(actual, expected, tol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def grpo(batch: Batch, **options):
    """Loss, metrics, and the gradients in logp and entropy."""
    logp, entropy = leaf(batch.logp), leaf(batch.entropy)
    loss, metrics = train_grpo.objective(logp, batch.old_logp, batch.adv, batch.mask, batch.weights,
                                         ref_logp=batch.ref_logp, entropy=entropy, **options)
    gradients = torch.autograd.grad(loss, (logp, entropy), materialize_grads=True)
    return loss.detach(), metrics, gradients


# ---- GRPO: what it computes ----


def by_hand(batch: Batch, o: dict) -> tuple[float, Tensor]:
    """The loss, and its gradient in logp without its other terms, one token after another."""
    loss, gradient = 0.0, torch.zeros_like(batch.logp)
    log_ratio = (batch.logp - batch.old_logp).masked_fill(~batch.mask, 0.0)
    for b, t in batch.mask.nonzero().tolist():
        logp, A, w = batch.logp[b, t].item(), batch.adv[b, 0].item(), batch.weights[b, t].item()
        rho = token_rho = math.exp(log_ratio[b, t])
        if o["ratio"] == "sequence":
            rho = math.exp(log_ratio[b].sum() / batch.mask[b].sum())
        moved = math.log(rho) if o["ratio"] == "sequence" else logp
        if o["ratio"] == "none":
            J, slope = A * logp, A
        elif o["bound"] == "clip":
            low, high = 1 - o["clip_low"], 1 + o["clip_high"]
            J = min(rho * A, min(max(rho, low), high) * A)
            slope = 0.0 if (A > 0 and rho > high) or (A < 0 and rho < low) else rho * A
        elif o["bound"] == "truncate":
            J, slope = min(rho, 1 + o["clip_high"]) * A * moved, min(rho, 1 + o["clip_high"]) * A
        elif o["bound"] == "mask":
            J = slope = rho * A if 1 - o["clip_low"] <= rho <= 1 + o["clip_high"] else 0.0
        elif o["bound"] == "soft":
            tau = 1.0 if A > 0 else 1.05
            s = 1 / (1 + math.exp(-tau * (rho - 1)))
            J, slope = 4 / tau * s * A, 4 * s * (1 - s) * rho * A
        else:
            J = slope = rho * A
        if o.get("kl_in") in ("loss", "weighted"):
            r = batch.ref_logp[b, t].item() - logp
            k = {"k1": -r, "k2": r * r / 2, "k3": math.exp(r) - 1 - r}[o["kl"]]
            J -= o["kl_coef"] * k * (token_rho if o["kl_in"] == "weighted" else 1.0)
        J += o["entropy_coef"] * batch.entropy[b, t].item()
        loss, gradient[b, t] = loss - w * J, -w * slope
    return loss, gradient


every_choice = pytest.mark.parametrize("terms", POLICY_TERMS, ids=lambda terms: "-".join(map(str, terms.values())))


@every_choice
@settings(max_examples=10)
@given(batches(moves=(0.1, 0.5, 2.0)), st.sampled_from([0.0, 0.1]))
def test_the_loss_is_its_formula(terms, batch, entropy_coef):
    """L = -sum_bt w_bt [bound(rho) A - kl_coef KL(pi || ref) + entropy_coef H], token by token, on every axis."""
    for leash in LEASHES:
        options = terms | leash | {"entropy_coef": entropy_coef}
        assert_close(grpo(batch, **options)[0].item(), by_hand(batch, options)[0], 1e-9)


@every_choice
@settings(max_examples=10)
@given(batches(moves=(0.1, 0.5, 2.0)))
def test_the_gradient_is_its_formula(terms, batch):
    """Each token gets -w A times its ratio, or what the bound makes of it; with one ratio per answer, all alike."""
    assert_close(grpo(batch, **terms)[2][0], by_hand(batch, terms | {"entropy_coef": 0.0})[1], 1e-9)


@every_choice
@settings(max_examples=10)
@given(batches(moves=(0.1, 0.5, 2.0)), st.sampled_from(LEASHES), st.sampled_from([0.0, 0.1]))
def test_metrics_are_detached_sums_over_the_tokens_that_count(terms, batch, leash, entropy_coef):
    """kl = sum k3, whatever its gradient; the bound's metrics count the tokens that it has taken hold of."""
    options = terms | leash | {"entropy_coef": entropy_coef}
    _, metrics, _ = grpo(batch, **options)
    assert not any(value.requires_grad for value in metrics.values())
    log_ratio = (batch.logp - batch.old_logp).masked_fill(~batch.mask, 0.0)
    if options["ratio"] == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / batch.mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    rho, mask, positive, negative = log_ratio.exp(), batch.mask, batch.adv > 0, batch.adv < 0
    assert_close(metrics.pop("train/ratio_max").item(), max([1.0, *rho[mask].tolist()]))
    assert_close(metrics.pop("train/ratio_min").item(), min([1.0, *rho[mask].tolist()]))
    if options.get("kl_coef"):
        r = (batch.ref_logp - batch.logp)[mask]
        assert_close(metrics.pop("train/kl"), (torch.expm1(r) - r).sum())
    below, above = rho < 1 - options.get("clip_low", 0), rho > 1 + options.get("clip_high", 0)
    held = {"none": {}, "clip": {"clipped_low": below & negative, "clipped_high": above & positive},
            "soft": {}, "truncate": {"capped": above}, "mask": {"masked": below | above}}[options["bound"]]
    assert metrics == {f"train/{name}": (held & mask).sum() for name, held in held.items()}


@given(st.floats(0.1, 2.0), st.integers(1, 4), st.sampled_from(["token", "sequence"]))
def test_a_ratio_of_one_is_always_among_the_extremes(moved, T, ratio):
    """ratio_max >= 1 >= ratio_min, padding or not: so the extremes of micro-batches are those of the step."""
    logp, mask = torch.zeros(1, T).double(), torch.ones(1, T, dtype=torch.bool)
    for sign, low, high in ((1, 1.0, math.exp(moved)), (-1, math.exp(-moved), 1.0)):
        _, metrics = train_grpo.objective(logp, logp - sign * moved, torch.ones(1, 1), mask, mask.double() / T, ratio=ratio)
        assert_close((metrics["train/ratio_min"].item(), metrics["train/ratio_max"].item()), (low, high))


@given(batches(), options, poisons)
def test_a_coefficient_of_zero_removes_its_term_bit_for_bit(batch, options, poison):
    """kl_coef = 0 never looks at ref_logp, entropy_coef = 0 never at entropy: they may be absent or full of nan."""
    for name, field in (("kl_coef", "ref_logp"), ("entropy_coef", "entropy")):
        off = options | {name: 0.0}
        loss, metrics, (g, _) = grpo(batch, **off)
        assert (name != "kl_coef") or "train/kl" not in metrics
        for missing in (None, torch.full_like(batch.logp, poison)):
            logp, others = leaf(batch.logp), {"ref_logp": batch.ref_logp, "entropy": batch.entropy} | {field: missing}
            other_loss, other_metrics = train_grpo.objective(logp, batch.old_logp, batch.adv, batch.mask, batch.weights,
                                                             **others, **off)
            assert torch.equal(other_loss, loss) and torch.equal(torch.autograd.grad(other_loss, logp)[0], g)
            assert other_metrics == metrics


# ---- GRPO: what nanorl/checks demands of any objective ----


@pytest.mark.parametrize("invariant", [invariants.contract, invariants.poison, invariants.padding, invariants.purity,
                                       invariants.micro_batches, invariants.permutation], ids=lambda f: f.__name__)
@given(batches(), options, generators)
def test_whatever_its_terms(invariant, batch, options, generator):
    """Padding, poison, micro-batches, order and memory, for every choice on every axis; Broken is raised where one fails."""
    invariant(functools.partial(train_grpo.objective, **options), batch, generator)


@pytest.mark.parametrize("invariant", [invariants.reinforce, invariants.direction, invariants.no_advantage],
                         ids=lambda f: f.__name__)
@given(batches(), policy_terms, generators)
def test_whatever_its_bound(invariant, batch, terms, generator):
    """At ratio 1 all are REINFORCE, make good answers likelier, and leave answers with A = 0 alone; or Broken is raised."""
    invariant(functools.partial(train_grpo.objective, **terms), batch, generator)


@pytest.mark.parametrize("name", [name for name, term in KL_TERMS.items() if term.place != "reward"])
def test_a_kl_term_follows_the_divergence_that_the_table_names(name):
    """By enumeration over two tokens, where a fixed prefix and a whole answer are different things."""
    term = KL_TERMS[name]
    terms = {"kl_coef": 0.3, "kl": term.estimator, "kl_in": term.place}
    assert divergence(functools.partial(train_grpo.objective, **terms)).endswith(f"0.3 times that of {term.follows}")


@st.composite
def rollouts(draw):
    """A made-up rollout of P groups of G answers, their rewards, and log-probs of the policy and the reference."""
    r, g = draw(rewards(min_group=2)), draw(generators)
    B, T = r.numel(), 7
    prompts, answers = torch.randint(1, 3, (B,), generator=g), torch.randint(1, 5, (B,), generator=g)
    logp, ref_logp = -randn(g, 2, B, T - 1).abs()
    rollout = Rollout(torch.zeros(B, T, dtype=torch.int64), prompts, prompts + answers,
                      response_mask(prompts, prompts + answers, T), logp,
                      torch.rand(B, generator=g) < 0.7, torch.arange(B) // r.shape[1])
    return rollout, r, logp, ref_logp


@given(rollouts(), st.sampled_from(["all", "drop"]), st.sampled_from(["train", "mask"]), st.sampled_from([*ADVANTAGES]),
       st.sampled_from([0.0, 0.5]), st.sampled_from([(0.0, 0.0), (0.03, 0.1), (0.2, 0.4)]))
def test_answers_are_compared_by_what_is_left_of_their_reward(case, groups, truncated, advantage, overlong, earlier):
    """A of r + overlong penalty - kl_coef sum k1; left out: groups without contrast, cut answers, rejected answers. Of the
    running mean only `running_mean` knows: it takes off that of earlier steps, and then this one enters it."""
    rollout, r, logp, ref_logp = case
    overlong = 0.0 if advantage == "positive" else overlong
    leash = {} if "zscore" in advantage or advantage == "positive" else {"kl_coef": 0.3, "kl": "k1_reward"}
    cfg = train_grpo.Config(groups=groups, truncated=truncated, advantage=advantage, overlong=overlong, max_new_tokens=4,
                            **leash)
    state = {"running_mean": earlier} if earlier[1] else {}
    baseline = earlier[0] / earlier[1] if earlier[1] else 0.0
    adv, mask = train_grpo.advantages(cfg, rollout, r, logp, ref_logp, state)
    P, G = r.shape
    R, kept = r.clone(), torch.zeros(P, G, dtype=torch.bool)
    for p in range(P):
        for i in range(G):
            b = p * G + i
            L = int(rollout.lengths[b] - rollout.prompt_lengths[b])
            R[p, i] -= max(0.0, (L - 2) / 2) if overlong else 0.0                   # limit 4, buffer 2
            if leash:
                R[p, i] -= 0.3 * (logp[b] - ref_logp[b])[rollout.mask[b]].sum()
            contrast = len(set(r[p].tolist())) > 1
            kept[p, i] = ((groups == "all" or contrast) and (truncated == "train" or bool(rollout.finished[b]))
                          and (advantage != "positive" or bool(r[p, i] > 0)))
    assert torch.equal(mask, rollout.mask & kept.view(-1, 1))
    if advantage == "running_mean":
        expected = (0.9 * earlier[0] + 0.1 * R.mean().item(), 0.9 * earlier[1] + 0.1)
        assert state == {"running_mean": pytest.approx(expected, abs=1e-6)}
    else:
        assert state == ({"running_mean": earlier} if earlier[1] else {})
    others = (R.sum(-1, keepdim=True) - R) / (G - 1)
    centred = R - R.mean(-1, keepdim=True)
    std = centred[kept].square().mean().sqrt() if kept.any() else 0.0
    expected = {"reward": R, "running_mean": R - baseline, "center": centred, "leave_one_out": R - others,
                "positive": torch.ones_like(R),
                "zscore": centred / (centred.square().mean(-1, keepdim=True).sqrt() + 1e-6),
                "zscore_batch": centred / (std + 1e-6)}[advantage]
    assert_close(adv, expected.view(-1, 1), 1e-5)


@given(policies(count=2), st.sampled_from([0.1, 1.0]), generators)
def test_a_kl_in_the_reward_follows_the_divergence_of_whole_answers(pair, beta, generator):
    """The expected gradient with rewards r - beta sum_t k1 is that of E[r] - beta KL(pi || ref), by enumeration."""
    pi, ref = leaf(pair[0]), pair[1]
    logp, r = log_probs(pi), randn(generator, len(log_probs(ref)))
    shaped = r - beta * kl_k1(logp.detach(), log_probs(ref)).sum(-1)
    ours = torch.autograd.grad(expectation(pi.detach(), shaped * logp.sum(-1)), pi)[0]
    exact = torch.autograd.grad(expectation(pi, r) - beta * sequence_kl(pi, ref), pi)[0]
    assert_close(ours, exact, 1e-9)


@pytest.mark.parametrize("name", ["k1", "k2_weighted", "k2_reward", "k3_reward"])
def test_a_kl_term_that_follows_no_divergence_is_refused(name, capsys):
    """In one sentence that names those that follow one."""
    with pytest.raises(SystemExit):
        run.parse(train_grpo.Config, ["--kl-coef", "0.1", "--kl", name])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--kl: invalid choice: {name!r}" in error and all(choice in error for choice in KL_TERMS)
    estimator, _, place = name.partition("_")
    if place != "reward":
        with pytest.raises(Broken, match="no KL divergence"):
            divergence(functools.partial(train_grpo.objective, kl_coef=0.3, kl=estimator, kl_in=place or "loss"))


def assert_pure(f, *constants, **variables):
    """f leaves its inputs bit-equal, forward and backward, and does not even write the same bits again."""
    variables = {name: leaf(x) for name, x in variables.items()}
    inputs = [*constants, *variables.values()]
    before, versions = [x.detach().clone() for x in inputs], [x._version for x in inputs]
    f(*constants, **variables)[0].backward()
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


# ---- GRPO: where it leads ----


def group_batch(r: Tensor, advantage, how: str, mask: Tensor, generator) -> Batch:
    """An on-policy step of P groups of G answers with rewards r [P, G] and a mask [P*G, T]."""
    prompt_index = torch.arange(len(r)).repeat_interleave(r.shape[1])
    logp, ref_logp = -randn(generator, 2, *mask.shape).abs()
    return Batch(logp=logp, old_logp=logp, adv=ADVANTAGES[advantage](r).view(-1, 1), mask=mask, ref_logp=ref_logp,
                 entropy=-logp, weights=token_weights(mask, prompt_index, how, mask.shape[1]).double())


@pytest.mark.parametrize("advantage", GROUPWISE)
@given(aggregates, masks(), st.sampled_from([0.1, 0.3, 1 / 3, 1.0]), st.booleans(), generators)
def test_a_group_of_equal_rewards_has_no_gradient(advantage, how, mask, value, off_policy, generator):
    """r_i = r for all i, beta = 0: the gradient is 0, exactly."""
    batch = group_batch(torch.full((1, len(mask)), value, dtype=torch.float64), advantage, how, mask, generator)
    if off_policy:
        batch.old_logp = batch.ref_logp
    loss, _, (g, _) = grpo(batch)
    assert (g == 0).all() and loss == 0


@pytest.mark.parametrize("advantage", GROUPWISE)
@given(rewards(min_group=2), st.integers(1, 5), generators)
def test_a_loss_of_zero_may_have_a_gradient(advantage, r, T, generator):
    """On policy, L = -1/R sum_b A_b = 0 when answers count alike; its gradient is 0 only without any contrast."""
    lengths = torch.randint(1, T + 1, (r.numel(),), generator=generator)
    loss, _, (g, _) = grpo(group_batch(r, advantage, "sequence_mean", torch.arange(T) < lengths[:, None], generator))
    assert abs(loss) < 1e-6             # the weights are float32
    contrast = (r != r[:, :1]).any()
    assert g.norm() > 1e-3 * r.std() / r.numel() if contrast else (g == 0).all()


def tabular_batch(logits, ids, batch):
    """The batch with logp and entropy of tokens `ids` [B, T] under `logits` [B, T, V], attached to their graph."""
    batch.logp, batch.entropy = selective_log_softmax(logits, ids), entropy_from_logits(logits)
    batch.old_logp = batch.logp.detach()
    return batch


def loss_of(batch, **options):
    return train_grpo.objective(batch.logp, batch.old_logp, batch.adv, batch.mask, batch.weights,
                                ref_logp=batch.ref_logp, entropy=batch.entropy, **options)[0]


@given(batches(), st.integers(2, 5), st.sampled_from([0.1, 1.0, 5.0]), generators)
def test_a_step_makes_good_answers_likelier(batch, V, scale, generator):
    """With F = sum w A logp and step size 1 / sum |w A|, F rises by at least half of step size times |grad F|^2.

    (log softmax has a Hessian of norm at most 1/2, so F's is at most L = sum |w A| / 2, and the step is 1 / 2L.)
    """
    z = leaf(scale * randn(generator, *batch.mask.shape, V))
    ids = torch.randint(V, batch.mask.shape, generator=generator)
    assume((batch.weights * batch.adv).any())
    step = 1 / (batch.weights * batch.adv).abs().sum()
    (g,) = torch.autograd.grad(loss_of(tabular_batch(z, ids, batch)), z)
    before, after = ((batch.weights * batch.adv * selective_log_softmax(x, ids)).sum() for x in (z, z - step * g))
    assert after >= before + step * g.square().sum() / 2 - 1e-12
    assert (g != 0).any()


@given(batches(), st.integers(2, 5), st.sampled_from([0.1, 1.0, 5.0]), generators)
def test_the_entropy_bonus_raises_entropy(batch, V, scale, generator):
    """With A = 0 the gradient is -c grad sum w H, a small step raises sum w H, and it rests where pi is uniform."""
    batch.adv = torch.zeros_like(batch.adv)
    assume(batch.mask.any())
    ids = torch.randint(V, batch.mask.shape, generator=generator)
    for z in (leaf(scale * randn(generator, *batch.mask.shape, V)), leaf(torch.zeros(*batch.mask.shape, V).double())):
        (g,) = torch.autograd.grad(loss_of(tabular_batch(z, ids, batch), entropy_coef=0.3), z)
        bonus = (batch.weights * entropy_from_logits(z)).sum()
        assert_close(g, -0.3 * torch.autograd.grad(bonus, z)[0])
        after = (batch.weights * entropy_from_logits(z.detach() - 0.1 / batch.weights.sum() * g)).sum()
        assert after > bonus if (z != 0).any() else (g.abs() < 1e-15).all()


def expected_gradient(pi: Tensor, r: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """E[grad L] over all pairs of sampled answers, and grad E[r]. Token 0 stops an answer; r [V^T] sees no further."""
    V, ids = pi.shape[1], sequences(pi.shape[1], 2)                                         # T = 2
    mask = torch.stack((torch.ones(len(ids), dtype=torch.bool), ids[:, 0] != 0), dim=1)
    r = torch.where(mask[:, 1], r, r[0])
    pi = leaf(pi)
    logp, prob = log_probs(pi), log_probs(pi.detach()).sum(-1).exp()
    total = 0.0
    for pair in sequences(V**2, 2):                     # each is a group of two answers, G = 2
        weights = token_weights(mask[pair], torch.zeros(2, dtype=torch.int64), how, max_new_tokens=2).double()
        loss, _ = train_grpo.objective(logp[pair], logp[pair].detach(), leave_one_out(r[pair][None]).view(-1, 1),
                                       mask[pair], weights)
        total = total + prob[pair].prod() * loss
    return torch.autograd.grad(total, pi)[0], reward_gradient(pi, r)


@settings(max_examples=20)
@given(policies(V=(2, 3), T=(2, 2)), generators)
def test_summed_over_tokens_the_expected_gradient_is_the_true_one(pi, generator):
    """E[grad L] = -grad E[r] with leave_one_out and sequence_sum, 1/L_max of it with constant. By enumeration."""
    r = randn(generator, pi.shape[1] ** 2)
    for how, constant in (("sequence_sum", 1.0), ("constant", 0.5)):
        ours, exact = expected_gradient(pi, r, how)
        assert_close(ours, -constant * exact)
        # ... so a small step down the loss raises the expected reward, unless it is at a maximum already.
        r_stopped = torch.where(sequences(pi.shape[1], 2)[:, 0] != 0, r, r[0])
        before, after = (expectation(table, r_stopped) for table in (pi, pi - 1e-3 * ours))
        assert after >= before - 1e-15


def test_averaged_over_an_answers_tokens_it_is_another_one():
    """sequence_mean divides by |y|: of grad E[r] it keeps 1/2 at the second token, but more at the first, 3/4 here."""
    pi, r = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    ours, exact = expected_gradient(pi, r, "sequence_mean")
    assert_close(ours, -torch.tensor([[0.75], [0.5], [0.5]]) * exact)


# ---- Pretraining and SFT ----


@st.composite
def likelihood_batches(draw):
    """logp, mask and the weights of token_mean, [B, T]."""
    (mask, prompt_index), g = draw(masked_prompts()), draw(generators)
    return -randn(g, *mask.shape).abs(), mask, token_weights(mask, prompt_index, "token_mean").double()


def cross_entropy(logp, mask, weights, objective=train_pretrain.objective):
    logp = leaf(logp)
    loss, metrics = objective(logp, mask, weights)
    return loss.detach(), metrics, torch.autograd.grad(loss, logp)[0]


@given(likelihood_batches())
def test_cross_entropy_is_the_mean_surprise_of_the_tokens_that_count(case):
    """L = -1/N sum log pi, dL/dlogp = -1/N on the N tokens that count and 0 elsewhere; the metric is L, detached."""
    logp, mask, weights = case
    loss, metrics, g = cross_entropy(logp, mask, weights)
    N = max(int(mask.sum()), 1)
    assert_close(loss, -logp[mask].sum() / N, 1e-6)
    assert_close(g, -mask.double() / N, 1e-6)
    assert torch.equal(metrics["train/loss"], loss) and not metrics["train/loss"].requires_grad


@given(likelihood_batches(), poisons)
def test_cross_entropy_does_not_see_what_is_masked(case, poison):
    """nan or inf where the mask is False: loss, metric and gradient are bit-equal and finite."""
    logp, mask, weights = case
    loss, metrics, g = cross_entropy(logp, mask, weights)
    other_loss, other_metrics, other_g = cross_entropy(logp.masked_fill(~mask, poison), mask, weights)
    assert torch.equal(other_loss, loss) and other_metrics == metrics and torch.equal(other_g, g)
    assert loss.isfinite() and g.isfinite().all()


@given(likelihood_batches(), generators)
def test_cross_entropy_adds_up_over_any_partition(case, generator):
    """The parts' losses, metrics and gradients sum to the step's."""
    loss, metrics, g = cross_entropy(*case)
    parts = partition(generator, len(case[0]))
    results = [cross_entropy(*(x[rows] for x in case)) for rows in parts]
    assert_close(sum(part[0] for part in results), loss)
    assert_close(sum(part[1]["train/loss"] for part in results), metrics["train/loss"])
    assert_close(torch.cat([part[2] for part in results]), g[torch.cat(parts)])


@given(masks(kinds=("full", "run")), st.integers(2, 5), generators)
def test_many_copies_of_a_document_are_as_one(mask, copies, generator):
    """The loss of N identical documents is that of one, and so is the gradient that reaches the shared log-probs."""
    mask, logp = mask[:1], leaf(-randn(generator, 1, mask.shape[1]).abs())
    results = []
    for n in (1, copies):
        many = mask.expand(n, -1)
        loss, _ = train_pretrain.objective(logp.expand(n, -1), many, token_weights(many, torch.arange(n), "token_mean"))
        results.append((loss.detach(), *torch.autograd.grad(loss, logp)))
    assert_close(results[0], results[1], 1e-6)


def assert_same_bits(ours, theirs):
    """Of two losses, their metrics and their gradients."""
    for x, y in zip(ours, theirs, strict=True):
        assert x == y if isinstance(x, dict) else torch.equal(x, y)


@given(likelihood_batches(), poisons)
def test_fine_tuning_has_the_objective_of_pretraining(case, poison):
    """Loss, metric and gradient are the same bits on any batch, whatever is masked: so what is said above holds for both."""
    logp, mask, weights = case
    logp = logp.masked_fill(~mask, poison)
    fine_tuned = cross_entropy(logp, mask, weights, train_sft.objective)
    assert_same_bits(fine_tuned, cross_entropy(logp, mask, weights))
    assert not fine_tuned[1]["train/loss"].requires_grad


@given(st.integers(1, 6), st.integers(2, 12), generators)
def test_fine_tuning_on_everything_is_pretraining(B, width, generator):
    """When a BOS is all of the prompt, SFT's mask is all True; weights, loss and gradient are pretraining's bits."""
    every = torch.ones(B, width - 1, dtype=torch.bool)
    mask = response_mask(torch.ones(B, dtype=torch.int64), torch.full((B,), width), width)
    weights = [token_weights(m, torch.arange(B), "token_mean") for m in (mask, every)]
    assert torch.equal(mask, every) and torch.equal(*weights)
    logp = -randn(generator, B, width - 1).abs()
    assert_same_bits(cross_entropy(logp, mask, weights[0], train_sft.objective), cross_entropy(logp, every, weights[1]))


@given(likelihood_batches(), st.integers(2, 5), generators)
def test_the_gradient_of_cross_entropy_in_the_logits(case, V, generator):
    """dL/dz = w (softmax(z) - onehot): it pulls each counted token up and, within [-w, w], all others down."""
    _, mask, weights = case
    z, ids = leaf(randn(generator, *mask.shape, V)), torch.randint(V, mask.shape, generator=generator)
    (g,) = torch.autograd.grad(train_pretrain.objective(selective_log_softmax(z, ids), mask, weights)[0], z)
    assert_close(g, weights[..., None] * (log_softmax(z.detach()).exp() - torch.nn.functional.one_hot(ids, V)))


@given(likelihood_batches())
def test_cross_entropy_writes_into_no_argument(case):
    """Every input is bit-equal before and after."""
    logp, mask, weights = case
    assert_pure(lambda mask, weights, logp: train_pretrain.objective(logp, mask, weights), mask, weights, logp=logp)
