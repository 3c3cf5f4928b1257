"""Theorems about the objectives at the top of train_grpo.py and train_pretrain.py (which train_sft.py shares)."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    Batch,
    aggregates,
    batches,
    generators,
    masked_prompts,
    masks,
    partition,
    policies,
    randn,
    rewards,
)
from torch import Tensor

import train_grpo
import train_pretrain
import train_sft
from nanorl.data import response_mask
from nanorl.ops import entropy_from_logits, leave_one_out, log_softmax, selective_log_softmax, token_weights
from nanorl.tabular import expectation, log_probs, sequences
from train_grpo import ADVANTAGES

pytestmark = pytest.mark.math

poisons = st.sampled_from([torch.nan, torch.inf, -torch.inf])
options = st.fixed_dictionaries({"kl_coef": st.sampled_from([0.0, 0.04, 1.0]),
                                 "entropy_coef": st.sampled_from([0.0, 0.1]),
                                 "clip_low": st.sampled_from([0.1, 0.2]),
                                 "clip_high": st.sampled_from([0.2, 0.28, 3.0])})


def assert_close(actual, expected, tol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def grpo(batch: Batch, **options):
    """Loss, metrics, and the gradients in logp and entropy."""
    logp, entropy = leaf(batch.logp), leaf(batch.entropy)
    loss, metrics = train_grpo.objective(logp, batch.old_logp, batch.adv, batch.mask, batch.weights,
                                         ref_logp=batch.ref_logp, entropy=entropy, **options)
    gradients = torch.autograd.grad(loss, (logp, entropy), materialize_grads=True)
    return loss.detach(), metrics, gradients


def poisoned(batch: Batch, poison: float) -> Batch:
    """The same batch with `poison` in every field where the mask is False."""
    blank = {name: getattr(batch, name).masked_fill(~batch.mask, poison)
             for name in ("logp", "old_logp", "ref_logp", "entropy")}
    return replace(batch, **blank)


# ---- GRPO: what it computes ----


@given(batches(), options)
def test_the_loss_is_its_formula(batch, options):
    """L = -sum_bt w_bt [min(rho A, clip(rho) A) - kl_coef k3(pi || ref) + entropy_coef H], token by token."""
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    expected = 0.0
    for b, t in batch.mask.nonzero().tolist():
        ratio, A = math.exp(batch.logp[b, t] - batch.old_logp[b, t]), batch.adv[b, 0].item()
        r = (batch.ref_logp[b, t] - batch.logp[b, t]).item()
        J = min(ratio * A, min(max(ratio, low), high) * A)
        J -= options["kl_coef"] * (math.exp(r) - 1 - r)
        J += options["entropy_coef"] * batch.entropy[b, t].item()
        expected -= batch.weights[b, t].item() * J
    assert_close(grpo(batch, **options)[0].item(), expected)


@given(batches(), options)
def test_metrics_are_detached_sums_over_the_tokens_that_count(batch, options):
    """kl = sum k3, clipped = tokens whose surrogate has no gradient although A is not 0, ratio_max = max rho."""
    _, metrics, _ = grpo(batch, **options)
    assert not any(value.requires_grad for value in metrics.values())
    ratio = (batch.logp - batch.old_logp).exp()[batch.mask]
    assert_close(metrics["train/ratio_max"].item(), max([0.0, *ratio.tolist()]))
    if options["kl_coef"]:
        r = (batch.ref_logp - batch.logp)[batch.mask]
        assert_close(metrics["train/kl"], (torch.expm1(r) - r).sum())
    _, _, (g, _) = grpo(batch, **options | {"kl_coef": 0.0})
    flat = (g == 0) & batch.mask & (batch.adv != 0)
    assert metrics["train/clipped_high"] == (flat & (batch.adv > 0)).sum()
    assert metrics["train/clipped_low"] == (flat & (batch.adv < 0)).sum()


@given(batches(moves=(0.0,)), st.floats(0.01, 0.9), st.floats(0.01, 3.0))
def test_on_policy_the_gradient_is_that_of_reinforce(batch, clip_low, clip_high):
    """Where pi = pi_old, dL/dlogp_bt = -w_bt A_b: the gradient of -sum w A logp, for every clip range."""
    loss, metrics, (g, _) = grpo(batch, clip_low=clip_low, clip_high=clip_high)
    assert torch.equal(g, -batch.weights * batch.adv)
    assert_close(loss, -(batch.weights * batch.adv).sum())
    assert metrics["train/clipped_low"] == metrics["train/clipped_high"] == 0 and metrics["train/ratio_max"] <= 1


@settings(max_examples=10)
@given(batches(moves=(0.0,)), st.sampled_from([0.04, 1.0]), st.sampled_from([0.0, 0.1]))
def test_the_gradients_of_its_terms_are_their_slopes(batch, kl_coef, entropy_coef):
    """torch.autograd.gradcheck of all three terms in logp and entropy, at rho = 1, where the surrogate has no kink."""
    def loss(logp, entropy):
        return train_grpo.objective(logp, batch.old_logp, batch.adv, batch.mask, batch.weights, ref_logp=batch.ref_logp,
                                    entropy=entropy, kl_coef=kl_coef, entropy_coef=entropy_coef)[0]

    assert torch.autograd.gradcheck(loss, (leaf(batch.logp), leaf(batch.entropy)))


@given(batches(), options, poisons)
def test_a_coefficient_of_zero_removes_its_term_bit_for_bit(batch, options, poison):
    """kl_coef = 0 never looks at ref_logp, entropy_coef = 0 never at entropy: they may be absent or full of nan."""
    for name, field in (("kl_coef", "ref_logp"), ("entropy_coef", "entropy")):
        off = options | {name: 0.0}
        loss, metrics, (g, _) = grpo(batch, **off)
        for missing in (None, torch.full_like(batch.logp, poison)):
            logp, others = leaf(batch.logp), {"ref_logp": batch.ref_logp, "entropy": batch.entropy} | {field: missing}
            other_loss, other_metrics = train_grpo.objective(logp, batch.old_logp, batch.adv, batch.mask, batch.weights,
                                                             **others, **off)
            assert torch.equal(other_loss, loss) and torch.equal(torch.autograd.grad(other_loss, logp)[0], g)
            assert other_metrics == metrics
    assert "train/kl" not in grpo(batch, **options | {"kl_coef": 0.0})[1]


# ---- GRPO: what it must not notice ----


@given(batches(), options, poisons)
def test_what_is_masked_never_reaches_loss_metrics_or_gradients(batch, options, poison):
    """nan or inf where the mask is False: everything stays bit-equal and finite, with gradient 0 there."""
    loss, metrics, gradients = grpo(batch, **options)
    other_loss, other_metrics, other_gradients = grpo(poisoned(batch, poison), **options)
    assert torch.equal(other_loss, loss) and loss.isfinite()
    assert other_metrics == metrics and all(value.isfinite() for value in metrics.values())
    for g, other in zip(gradients, other_gradients, strict=True):
        assert torch.equal(other, g) and g.isfinite().all() and (g[~batch.mask] == 0).all()


@given(batches(), options, st.integers(1, 3), poisons)
def test_right_padding_changes_nothing(batch, options, columns, poison):
    """Columns without a True, whatever they hold, leave loss, sums, maxima of at least 1, and gradients."""
    def widen(x, fill):
        return torch.cat((x, x.new_full((len(x), columns), fill)), dim=1)

    noise = {name: widen(getattr(batch, name), poison) for name in ("logp", "old_logp", "ref_logp", "entropy")}
    wider = replace(batch, **noise, mask=widen(batch.mask, False), weights=widen(batch.weights, 0.0))
    loss, metrics, gradients = grpo(batch, **options)
    wider_loss, wider_metrics, wider_gradients = grpo(wider, **options)
    assert_close(wider_loss, loss)
    for name in metrics:            # a masked token counts as ratio 1
        assert_close(*(m[name].clamp(min=1) if name.endswith("_max") else m[name] for m in (wider_metrics, metrics)))
    for g, wider_g in zip(gradients, wider_gradients, strict=True):
        assert_close(wider_g, widen(g, 0.0))


@given(batches(), options, generators)
def test_micro_batches_add_up_in_any_partition(batch, options, generator):
    """Losses, gradients and metrics of the parts of any partition of the rows sum to the step's; _max: the maximum."""
    loss, metrics, gradients = grpo(batch, **options)
    parts = partition(generator, len(batch.mask))
    results = [grpo(batch.rows(rows), **options) for rows in parts]
    assert_close(sum(part[0] for part in results), loss)
    for name, value in metrics.items():
        values = torch.stack([part[1][name] for part in results])
        assert_close(values.max() if name.endswith("_max") else values.sum(), value)
    for i, g in enumerate(gradients):
        for rows, part in zip(parts, results, strict=True):
            assert_close(part[2][i], g[rows])


def assert_pure(f, *constants, **variables):
    """f leaves its inputs bit-equal, forward and backward, and does not even write the same bits again."""
    variables = {name: leaf(x) for name, x in variables.items()}
    inputs = [*constants, *variables.values()]
    before, versions = [x.detach().clone() for x in inputs], [x._version for x in inputs]
    f(*constants, **variables)[0].backward()
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@given(batches(), options)
def test_grpo_writes_into_no_argument(batch, options):
    """Every input is bit-equal before and after, whichever terms are on."""
    def f(old_logp, adv, mask, weights, ref_logp, logp, entropy):
        return train_grpo.objective(logp, old_logp, adv, mask, weights, ref_logp=ref_logp, entropy=entropy, **options)

    assert_pure(f, batch.old_logp, batch.adv, batch.mask, batch.weights, batch.ref_logp, logp=batch.logp,
                entropy=batch.entropy)


# ---- GRPO: where it leads ----


def group_batch(r: Tensor, advantage, how: str, mask: Tensor, generator) -> Batch:
    """An on-policy step of P groups of G answers with rewards r [P, G] and a mask [P*G, T]."""
    prompt_index = torch.arange(len(r)).repeat_interleave(r.shape[1])
    logp, ref_logp = -randn(generator, 2, *mask.shape).abs()
    return Batch(logp, logp, ref_logp, -logp, ADVANTAGES[advantage](r).view(-1, 1), mask,
                 token_weights(mask, prompt_index, how, mask.shape[1]).double(), prompt_index)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(aggregates, masks(), st.sampled_from([0.1, 0.3, 1 / 3, 1.0]), st.booleans(), generators)
def test_a_group_of_equal_rewards_has_no_gradient(advantage, how, mask, value, off_policy, generator):
    """r_i = r for all i, beta = 0: the gradient is 0, exactly."""
    batch = group_batch(torch.full((1, len(mask)), value, dtype=torch.float64), advantage, how, mask, generator)
    if off_policy:
        batch.old_logp = batch.ref_logp
    loss, _, (g, _) = grpo(batch)
    assert (g == 0).all() and loss == 0


@pytest.mark.parametrize("advantage", ADVANTAGES)
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
    return torch.autograd.grad(total, pi)[0], torch.autograd.grad(expectation(pi, r), pi)[0]


@settings(max_examples=20)
@given(policies(V=(2, 3), T=(2, 2)), generators)
def test_summed_over_tokens_the_expected_gradient_is_the_true_one(pi, generator):
    """E[grad L] = -grad E[r] with leave_one_out and sequence_sum, 1/L_max of it with constant. By enumeration."""
    r = randn(generator, pi.shape[1] ** 2)
    for how, constant in (("sequence_sum", 1.0), ("constant", 0.5)):
        ours, exact = expected_gradient(pi, r, how)
        assert_close(ours, -constant * exact)


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


def cross_entropy(logp, mask, weights):
    logp = leaf(logp)
    loss, metrics = train_pretrain.objective(logp, mask, weights)
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


@given(st.integers(1, 6), st.integers(2, 12), generators)
def test_fine_tuning_on_everything_is_pretraining(B, width, generator):
    """When a BOS is all of the prompt, SFT's mask is all True; weights, loss and gradient are pretraining's bits."""
    assert train_sft.objective is train_pretrain.objective
    every = torch.ones(B, width - 1, dtype=torch.bool)
    mask = response_mask(torch.ones(B, dtype=torch.int64), torch.full((B,), width), width)
    weights = [token_weights(m, torch.arange(B), "token_mean") for m in (mask, every)]
    assert torch.equal(mask, every) and torch.equal(*weights)
    logp = -randn(generator, B, width - 1).abs()
    for ours, theirs in zip(cross_entropy(logp, mask, weights[0]), cross_entropy(logp, every, weights[1]), strict=True):
        assert ours == theirs if isinstance(ours, dict) else torch.equal(ours, theirs)


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
