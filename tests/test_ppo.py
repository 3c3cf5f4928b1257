"""Theorems about train_ppo.py: its credit assignment, its objective, and the coefficient that steers itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import poisons, policies
from test_rollout import MODEL, SAMPLING, TOKENIZER, Parity, scorer

import train_grpo
import train_ppo
from nanorl.checks.cases import Batch, batches, generators, masks, partition
from nanorl.ops import adapt_kl_coef, clipped_value_loss, gae
from nanorl.rollout import collect
from nanorl.tabular import expectation, leaf, log_probs, randn, sequence_kl

pytestmark = pytest.mark.math


def assert_close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# ---- Credit ----


@st.composite
def answers(draw):
    """What `credit` takes, each row of the mask one run or none: rewards, ended, logp, ref_logp, values, last_value, mask."""
    mask, g = draw(masks(kinds=("empty", "full", "run"))), draw(generators)
    B = len(mask)
    return (randn(g, B), torch.rand(B, generator=g) < 0.5, -randn(g, *mask.shape).abs(), -randn(g, *mask.shape).abs(),
            randn(g, *mask.shape), randn(g, B), mask)


def at_end(rewards, mask):
    """The reward of each row at its last token.       [B], [B, T] -> [B, T]"""
    return torch.where(mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True)), rewards[:, None], 0.0)


coefficients = st.sampled_from([0.0, 0.1, 2.0])


@given(answers(), coefficients)
def test_an_answers_return_is_its_score_less_the_price_of_its_divergence(case, kl_coef):
    """gamma = lam = 1, all scored: the return at the first token is score - kl_coef sum_t log(pi / ref), whatever the critic's
    last value says."""
    rewards, _, logp, ref_logp, values, last_value, mask = case
    _, returns = train_ppo.credit(at_end(rewards, mask), torch.ones_like(mask[:, 0]), logp, ref_logp, values, last_value, mask,
                                  kl_coef=kl_coef, gamma=1.0, lam=1.0)
    first = mask & (mask.cumsum(-1) == 1)
    total = rewards - kl_coef * (logp - ref_logp).masked_fill(~mask, 0.0).sum(-1)
    assert_close(returns[first], total[mask.any(-1)])


@given(answers())
def test_the_score_lands_on_the_last_token_alone(case):
    """With a critic of 0 and lam = 0, an advantage is the reward of its own token."""
    rewards, _, logp, ref_logp, values, last_value, mask = case
    adv, _ = train_ppo.credit(at_end(rewards, mask), torch.ones_like(mask[:, 0]), logp, ref_logp, torch.zeros_like(values),
                              last_value, mask, kl_coef=0.0, gamma=1.0, lam=0.0)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    assert_close(adv, torch.where(last, rewards[:, None], 0.0))


@given(answers(), coefficients, st.floats(0, 1), st.floats(0, 1))
def test_an_answer_that_has_ended_gets_its_reward_and_another_the_critics_last_value(case, kl_coef, gamma, lam):
    """Never both: the reward of the one and the last value of the other change no bit."""
    rewards, ended, logp, ref_logp, values, last_value, mask = case
    kwargs = dict(kl_coef=kl_coef, gamma=gamma, lam=lam)
    found = train_ppo.credit(at_end(rewards, mask), ended, logp, ref_logp, values, last_value, mask, **kwargs)
    other = train_ppo.credit(at_end(torch.where(ended, rewards, 99.0), mask), ended, logp, ref_logp, values,
                             torch.where(ended, 99.0, last_value), mask, **kwargs)
    for a, b in zip(found, other, strict=True):
        assert torch.equal(a, b)
    token_rewards = -kl_coef * (logp - ref_logp).masked_fill(~mask, 0.0)
    for row in (~ended).nonzero().flatten().tolist():
        alone = gae(token_rewards[row, None], values[row, None], mask[row, None], gamma, lam, last_value[row, None])
        for a, b in zip(found, alone, strict=True):
            assert_close(a[row], b[0])


@given(answers(), poisons)
def test_padding_has_no_part_in_credit(case, poison):
    rewards, ended, logp, ref_logp, values, last_value, mask = case
    kwargs = dict(kl_coef=0.1, gamma=0.9, lam=0.8)
    found = train_ppo.credit(at_end(rewards, mask), ended, logp, ref_logp, values, last_value, mask, **kwargs)
    poisoned = [x.masked_fill(~mask, poison) for x in (logp, ref_logp, values)]
    for a, b in zip(found, train_ppo.credit(at_end(rewards, mask), ended, *poisoned, last_value, mask, **kwargs), strict=True):
        assert torch.equal(a, b)


@given(policies(count=2, T=(1, 3)), generators, st.sampled_from([0.1, 1.0]))
def test_rewards_to_go_with_their_divergence_follow_the_leashed_objective(pair, g, kl_coef):
    """By enumeration, on-policy and without a critic: E[sum_t A_t grad log pi_t] = grad (E[r] - kl_coef KL(pi || ref)), the KL
    that of whole answers."""
    pi, ref = pair
    table, logp = leaf(pi), log_probs(pi)
    r, mask = randn(g, len(logp)), torch.ones(logp.shape, dtype=torch.bool)
    adv, _ = train_ppo.credit(at_end(r, mask), mask[:, 0], logp, log_probs(ref), torch.zeros_like(logp), r, mask,
                              kl_coef=kl_coef, gamma=1.0, lam=1.0)
    estimate = torch.autograd.grad(expectation(pi, (adv * log_probs(table)).sum(-1)), table)[0]
    exact = torch.autograd.grad(expectation(table, r) - kl_coef * sequence_kl(table, ref), table)[0]
    assert_close(estimate, exact, 1e-9)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_value_is_the_critics_at_the_state_that_the_token_was_chosen_in(size):
    """values[b, t] of each row alone, read at position t, before tokens[:, t+1]; the last value behind the last token."""
    critic = scorer()
    rollout = collect(MODEL, TOKENIZER, Parity(), SAMPLING, prompts=5, samples=2, seed=1).rollout
    values, last_value = train_ppo.state_values(critic, rollout, size)
    assert not values.requires_grad and len(values[rollout.mask].unique()) > 5 and (values[~rollout.mask] == 0).all()
    for row, (start, end) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)):
        alone = critic(rollout.tokens[row : row + 1, :end])[0].float()                      # [end]
        assert_close(values[row, start - 1 : end - 1], alone[start - 1 : end - 1], 1e-5)
        assert_close(last_value[row], alone[end - 1], 1e-5)


# ---- The objective ----


def ppo(batch: Batch, g, **options):
    """Loss, metrics and gradients in logp, values and entropy; the critic's side is drawn from g."""
    shape = batch.logp.shape
    values, old_values, returns = randn(g, 3, *shape)
    logp, values, entropy = leaf(batch.logp), leaf(values), leaf(batch.entropy)
    adv = batch.adv.expand(shape)
    loss, metrics = train_ppo.objective(logp, batch.old_logp, adv, batch.mask, batch.weights, values=values,
                                        old_values=old_values, returns=returns, entropy=entropy, **options)
    gradients = torch.autograd.grad(loss, (logp, values, entropy), materialize_grads=True)
    return loss, metrics, gradients, (values, old_values, returns)


seeded = st.integers(0, 2**32 - 1)


def generator(seed):        # drawn from twice, for the same tensors
    return torch.Generator().manual_seed(seed)


@given(batches(), seeded, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.1]))
def test_policy_and_critic_are_trained_by_one_sum(batch, seed, value_coef, entropy_coef):
    """L = GRPO's clipped loss with these advantages + value_coef sum w VL: the same policy gradient, and the critic's own."""
    clip = {"clip_low": 0.1, "clip_high": 0.3}
    loss, metrics, (in_logp, in_values, in_entropy), critic = ppo(batch, generator(seed), value_coef=value_coef, value_clip=0.4,
                                                                  entropy_coef=entropy_coef, **clip)
    logp, entropy, v = leaf(batch.logp), leaf(batch.entropy), leaf(critic[0])
    policy, theirs = train_grpo.objective(logp, batch.old_logp, batch.adv, batch.mask, batch.weights, entropy=entropy,
                                          entropy_coef=entropy_coef, **clip)
    value = (batch.weights * clipped_value_loss(v, *critic[1:], 0.4)).masked_fill(~batch.mask, 0.0).sum()
    assert_close(loss.detach(), (policy + value_coef * value).detach())
    assert_close(in_logp, torch.autograd.grad(policy, logp, retain_graph=True)[0])
    assert_close(in_entropy, torch.autograd.grad(policy, entropy, materialize_grads=True)[0])
    assert_close(in_values, value_coef * torch.autograd.grad(value, v)[0])
    assert {name: float(x) for name, x in theirs.items()} == {name: float(metrics[name]) for name in theirs}


@given(batches(), seeded, poisons)
def test_what_is_masked_reaches_nothing(batch, seed, poison):
    """Padding may hold nan and inf in every input; loss, metrics and gradients are the same bits."""
    def run(fill):
        g = generator(seed)
        names = ("logp", "old_logp", "entropy")
        noisy = {name: leaf(getattr(batch, name).masked_fill(~batch.mask, fill)) for name in names}
        values, old_values, returns, adv = (leaf(x.masked_fill(~batch.mask, fill)) for x in randn(g, 4, *batch.logp.shape))
        loss, metrics = train_ppo.objective(noisy["logp"], noisy["old_logp"].detach(), adv.detach(), batch.mask, batch.weights,
                                            values=values, old_values=old_values.detach(), returns=returns.detach(),
                                            entropy=noisy["entropy"], entropy_coef=0.1)
        gradients = torch.autograd.grad(loss, (noisy["logp"], values, noisy["entropy"]), materialize_grads=True)
        return [loss, *metrics.values(), *gradients]

    for clean, poisoned in zip(run(0.0), run(poison), strict=True):
        assert torch.equal(clean, poisoned)


@given(batches(), seeded, generators)
def test_micro_batches_add_up(batch, seed, parts):
    """Loss and metrics over any split of the rows: sums, and extremes of those named _max and _min."""
    g = generator(seed)
    critic = dict(zip(("values", "old_values", "returns"), randn(g, 3, *batch.logp.shape), strict=True))

    def run(rows):
        b = batch.rows(rows)
        return train_ppo.objective(b.logp, b.old_logp, b.adv.expand(b.logp.shape), b.mask, b.weights,
                                   **{name: x[rows] for name, x in critic.items()})

    whole, metrics = run(torch.arange(len(batch.logp)))
    split = [run(rows) for rows in partition(parts, len(batch.logp))]
    assert_close(sum(loss for loss, _ in split), whole)
    for name, value in metrics.items():
        join = max if name.endswith("_max") else min if name.endswith("_min") else sum
        assert float(join(m[name] for _, m in split)) == pytest.approx(float(value), abs=1e-6)


@given(batches(moves=(0.0,)), seeded)
def test_where_the_policy_has_not_moved_the_gradient_is_reinforces(batch, seed):
    """rho = 1: -w A at each token, for any clip."""
    on_policy = batch.on_policy()
    for clip in (0.01, 0.2, 1.0):
        _, metrics, (in_logp, _, _), _ = ppo(on_policy, generator(seed), clip_low=clip, clip_high=clip)
        assert_close(in_logp, (-batch.weights * batch.adv).masked_fill(~batch.mask, 0.0))
        assert metrics["train/ratio_max"] == metrics["train/ratio_min"] == 1


# ---- The leash that steers itself ----


@given(st.floats(1e-3, 1e3), st.floats(0, 1e3), st.floats(0.1, 100))
def test_the_coefficient_rises_above_the_target_and_falls_below_it_by_at_most_two_percent(c, kl, target):
    after = adapt_kl_coef(c, kl, target)
    assert 0.98 * c - 1e-12 <= after <= 1.02 * c + 1e-12
    assert math.copysign(1, after - c) == math.copysign(1, kl - target) or math.isclose(after, c)
    assert math.isclose(adapt_kl_coef(c, target, target), c)
