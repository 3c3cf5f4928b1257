"""Theorems about nanorl/ops.py. Expectations are exact sums over an enumerated policy, so nothing here is sampled."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import linear_problems, logit_pairs, logits, poisons, policies, scales, scored_logits, scored_rewards
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.power import power_conditional, power_distribution
from nanorl.checks.cases import generators, masked_prompts, masks, rewards
from nanorl.ops import (
    AGGREGATES,
    bradley_terry,
    center,
    clipped_away,
    clipped_surrogate,
    clipped_value_loss,
    entropy_from_logits,
    gae,
    importance_ratio,
    kl_divergence,
    kl_k1,
    kl_k2,
    kl_k3,
    leave_one_out,
    linear_log_probs,
    log_sigmoid,
    log_softmax,
    logsumexp,
    masked_mean,
    masked_sum,
    masked_surrogate,
    overlong_penalty,
    selective_log_softmax,
    sequence_ratio,
    soft_surrogate,
    token_weights,
    truncated_surrogate,
    whiten,
    zscore,
    zscore_batch,
)
from nanorl.tabular import (
    expectation,
    fixed_prefix_kl,
    horizon,
    leaf,
    log_probs,
    num_prefixes,
    prefix_rows,
    randn,
    regularised_optimum,
    reward_gradient,
    sequence_kl,
    sequence_probs,
    sequences,
)

pytestmark = pytest.mark.math

ADVANTAGES = (center, zscore, leave_one_out)
SURROGATES = {clipped_surrogate: (0.2, 0.2), truncated_surrogate: (2.0,), masked_surrogate: (0.5, 2.0),
              soft_surrogate: (1.0, 1.05)}                          # and their knobs
shifts = st.integers(-1000, 1000).map(float)
chunks = st.integers(1, 12)


def assert_close(actual, expected, tol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def grad(y: Tensor, *xs: Tensor) -> Tensor | tuple[Tensor, ...]:
    gradients = torch.autograd.grad(y.sum(), xs)
    return gradients[0] if len(xs) == 1 else gradients


# ---- The enumerable policies themselves ----


@given(policies(T=(1, 4)))
def test_an_enumerated_policy_is_a_distribution_with_consistent_prefixes(pi):
    """sum_y pi(y) = 1, and summing out the last token leaves the policy over the prefixes."""
    V, T = pi.shape[1], log_probs(pi).shape[1]
    probs = sequence_probs(pi)
    assert_close(probs.sum().item(), 1.0)
    if T > 1:
        assert_close(probs.view(-1, V).sum(-1), sequence_probs(pi[: num_prefixes(V, T - 1)]))


@given(st.integers(1, 4), st.integers(1, 4))
def test_every_prefix_has_a_row_of_its_own(V, T):
    """y_<t -> row is one to one onto 0 .. N-1, and there are V^T distinct sequences."""
    tokens = sequences(V, T)
    assert len(tokens.unique(dim=0)) == V**T
    prefix_of = {}
    for y, rows in zip(tokens.tolist(), prefix_rows(tokens, V).tolist(), strict=True):
        for t, row in enumerate(rows):
            assert prefix_of.setdefault(row, y[:t]) == y[:t]
    assert sorted(prefix_of) == list(range(num_prefixes(V, T)))


@given(policies(count=2))
def test_the_chain_rule_of_the_divergence(pair):
    """KL(p || q) of sequences = E_{prefix ~ p}[sum_t KL(p_t || q_t)]."""
    p, q = pair
    assert_close(sequence_kl(p, q), fixed_prefix_kl(p, p, q))


betas = st.sampled_from([0.1, 1.0, 10.0])


@given(policies(), generators)
def test_the_gradient_of_expected_reward_is_reinforces(pi, generator):
    """grad E_pi[r] = E_pi[r grad log pi], and a reward that is the same for all answers has none."""
    r = randn(generator, len(log_probs(pi)))
    table = leaf(pi)
    assert_close(grad(expectation(pi, r * log_probs(table).sum(-1)), table), reward_gradient(pi, r))
    assert_close(reward_gradient(pi, torch.ones_like(r)), torch.zeros_like(pi))


@given(policies(count=2), betas, generators)
def test_the_leashed_objective_is_a_divergence_from_its_optimum(pair, beta, generator):
    """E_pi[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*), so pi* is its maximum."""
    pi, ref = pair
    r = randn(generator, len(log_probs(pi)))
    p, q = sequence_probs(pi), sequence_probs(ref)
    best = regularised_optimum(ref, r, beta)
    log_Z = (q.log() + r / beta).logsumexp(0)
    assert_close(expectation(pi, r) - beta * sequence_kl(pi, ref), beta * log_Z - beta * (p * (p / best).log()).sum(), 1e-9)
    assert_close(regularised_optimum(ref, r + 3.0, beta), best, 1e-9)
    assert_close(best.sum(), torch.tensor(1.0, dtype=torch.float64))


@given(policies(), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_a_power_keeps_the_order_and_sharpens_the_odds(pi, alpha):
    """(p^alpha / Z)(y) / (p^alpha / Z)(y') = (p(y) / p(y'))^alpha; alpha = 1 is p itself."""
    p, sharp = sequence_probs(pi), power_distribution(pi, alpha)
    assert_close(sharp / sharp[0], (p / p[0]) ** alpha, 1e-9)
    assert_close(sharp.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_power_of_answers_is_not_a_temperature_of_tokens():
    """Token by token, p(y_t)^alpha / Z_t does not see that one first token continues more surely: 1/2 against 0.62."""
    pi = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log()
    assert sequence_probs(2.0 * pi)[:2].sum().item() == pytest.approx(0.5)
    assert power_distribution(pi, 2.0)[:2].sum().item() == pytest.approx(0.82 / 1.32)


@given(policies(), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_the_conditionals_of_a_power_multiply_to_it(pi, alpha):
    """Each token p^alpha times what can follow it to the power: their product over an answer is p^alpha / Z."""
    conditional = power_conditional(pi, alpha)
    assert_close(sequence_probs(conditional), power_distribution(pi, alpha), 1e-9)
    assert_close(conditional, log_softmax(conditional), 1e-12)


@given(policies(), st.sampled_from([0.5, 2.0, 4.0]))
def test_temperature_misses_exactly_the_normalisers_of_its_prefixes(pi, alpha):
    """prod_t p^alpha / Z_t against p^alpha / Z: the ratio is Z / prod_t Z_t, log Z_t = (1 - alpha) times a Renyi entropy."""
    V, T = pi.shape[1], horizon(pi)
    rows = prefix_rows(sequences(V, T), V)
    log_Zt = (alpha * log_softmax(pi)).logsumexp(-1)
    ratio = sequence_probs(alpha * pi).log() - power_distribution(pi, alpha).log()
    assert_close(ratio + log_Zt[rows].sum(-1), (alpha * log_probs(pi).sum(-1)).logsumexp(0).expand(len(rows)), 1e-8)
    if T == 1:
        assert_close(sequence_probs(alpha * pi), power_distribution(pi, alpha))


@given(policies())
def test_a_higher_power_expects_a_higher_log_probability(pi):
    """d/dalpha E[log p] = Var(log p), the variance under the power."""
    logp, alpha = log_probs(pi).sum(-1), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    mean = (power_distribution(pi, alpha) * logp).sum()
    sharp = power_distribution(pi, alpha).detach()
    variance = (sharp * (logp - (sharp * logp).sum()).square()).sum()
    assert_close(torch.autograd.grad(mean, alpha)[0], variance, 1e-8)


# ---- Log-probabilities ----


@given(logits(holes=True))
def test_logsumexp_and_log_softmax_are_torchs(z):
    """Values and gradients equal those of torch.logsumexp and torch.log_softmax, -inf entries included."""
    for ours, theirs in ((logsumexp, torch.logsumexp), (log_softmax, torch.log_softmax)):
        a, b = leaf(z), leaf(z)
        y, reference = ours(a), theirs(b, -1)
        assert_close(y, reference)
        kept = reference > -torch.inf
        assert_close(grad(y[kept].sin(), a), grad(reference[kept].sin(), b))


@given(logits(), st.sampled_from([0, 1, -1, -2]))
def test_logsumexp_and_log_softmax_take_any_dimension(z, dim):
    """The sum runs over `dim`, counted from either end."""
    assert_close(logsumexp(z, dim), torch.logsumexp(z, dim))
    assert_close(log_softmax(z, dim), torch.log_softmax(z, dim))


@given(scored_logits(), shifts)
def test_shifting_all_logits_shifts_logsumexp_and_no_probability(case, c):
    """LSE(z + c) = LSE(z) + c, so log p, H and KL do not change."""
    z, ids = case
    assert_close(logsumexp(z + c), logsumexp(z) + c)
    assert_close(log_softmax(z + c), log_softmax(z), 1e-10)
    assert_close(selective_log_softmax(z + c, ids), selective_log_softmax(z, ids), 1e-10)
    assert_close(entropy_from_logits(z + c), entropy_from_logits(z), 1e-10)
    assert_close(kl_divergence(z + c, z), torch.zeros(len(z), dtype=z.dtype), 1e-10)


@given(logits(holes=True))
def test_probabilities_are_within_bounds_and_sum_to_one(z):
    """log p <= 0, sum_i p_i = 1, and a logit of -inf has probability exactly 0."""
    p = log_softmax(z).exp()
    assert (log_softmax(z) <= 1e-15).all()
    assert_close(p.sum(-1), torch.ones(len(z), dtype=p.dtype))
    assert (p[z == -torch.inf] == 0).all()


def test_the_logsumexp_of_nothing_is_minus_infinity():
    """log sum over no probability at all = log 0."""
    assert (logsumexp(torch.full((2, 3), -torch.inf)) == -torch.inf).all()


@given(scored_logits(holes=True))
def test_selective_log_softmax_is_a_gathered_log_softmax(case):
    """log p(ids) = log_softmax(z)[ids], for any number of leading dimensions."""
    z, ids = case
    expected = log_softmax(z).gather(-1, ids[:, None]).squeeze(-1)
    assert_close(selective_log_softmax(z, ids), expected)
    assert_close(selective_log_softmax(torch.stack((z, z))[None], torch.stack((ids, ids))[None]),
                 torch.stack((expected, expected))[None])


@given(scored_logits(holes=True))
def test_the_gradient_of_a_log_prob_is_the_score(case):
    """d log p_a / d z_i = 1[i = a] - p_i, and it sums to zero over i."""
    z, ids = leaf(case[0]), case[1]
    score = torch.nn.functional.one_hot(ids, z.shape[1]) - log_softmax(z.detach()).exp()
    assert_close(grad(selective_log_softmax(z, ids), z), score)
    assert_close(grad(log_softmax(z).gather(-1, ids[:, None]), z), score)
    assert_close(score.sum(-1), torch.zeros(len(z), dtype=z.dtype))


@given(logit_pairs(), generators)
def test_renaming_the_tokens_renames_the_probabilities(pair, generator):
    """log_softmax(z)[perm] = log_softmax(z[perm]); LSE, H and KL do not care."""
    z, other = pair
    perm = torch.randperm(z.shape[1], generator=generator)
    assert_close(log_softmax(z[:, perm]), log_softmax(z)[:, perm])
    for f in (logsumexp, entropy_from_logits):
        assert_close(f(z[:, perm]), f(z))
    assert_close(kl_divergence(z[:, perm], other[:, perm]), kl_divergence(z, other), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_and_infinite_logits_keep_values_and_gradients_finite(dtype):
    """At |z| = 1e4 and z = -inf nothing overflows: e^z alone would."""
    inf = torch.inf
    z = torch.tensor([[1e4, -1e4, 0, 1e4], [-1e4, -1e4, -1e4 + 1, -inf], [1e4, -inf, -inf, -inf], [0, -inf, 1, -1e4]],
                     dtype=dtype)
    ids = torch.tensor([1, 2, 0, 3])
    for f in (logsumexp, entropy_from_logits, lambda z: entropy_from_logits(z, chunk_size=3),
              lambda z: selective_log_softmax(z, ids), lambda z: log_softmax(z)[z > -inf],
              lambda z: kl_divergence(z, torch.zeros_like(z)), lambda z: kl_divergence(z, z.detach())):
        x = leaf(z)
        y = f(x)
        assert y.isfinite().all() and grad(y, x).isfinite().all()
    assert log_softmax(z)[0, 1].item() == pytest.approx(-2e4 - math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(case=scored_logits(holes=True))
def test_half_precision_is_computed_in_float32_and_float64_stays(dtype, case):
    """f(z) = f(z.float()) bit for bit when z is half precision; no float64 is ever rounded."""
    z, ids = case[0].to(dtype), case[1]
    wide = z if dtype == torch.float64 else z.float()
    for f in (logsumexp, log_softmax, entropy_from_logits, lambda z: selective_log_softmax(z, ids),
              lambda z: kl_divergence(z, z.flip(0)), lambda z: entropy_from_logits(z, chunk_size=2),
              *(lambda z, f=f: f(z[:, 0].clamp(-5, 5), z[:, 1].clamp(-5, 5)) for f in (kl_k1, kl_k2, kl_k3, importance_ratio)),
              *(lambda z, f=f: f(z.clamp(-5, 5), z.flip(0).clamp(-5, 5), z.clamp(-5, 5), *SURROGATES[f]) for f in SURROGATES),
              lambda z: sequence_ratio(z.clamp(-5, 5), z.flip(0).clamp(-5, 5), z > 0), log_sigmoid, bradley_terry):
        y = f(z)
        assert y.dtype == wide.dtype
        assert torch.equal(y, f(wide))


# ---- Entropy ----


@given(logits(holes=True))
def test_entropy_lies_between_zero_and_log_V(z):
    """0 <= H <= log of the number of possible tokens."""
    possible = (z > -torch.inf).sum(-1)
    h = entropy_from_logits(z)
    assert (h >= -1e-15).all() and (h <= possible.double().log() + 1e-14).all()


@given(st.integers(1, 50))
def test_entropy_is_log_V_when_uniform_and_zero_when_certain(V):
    """H = log V at p = 1/V; H = 0, exactly, for a point mass."""
    certain = torch.full((V,), -torch.inf)
    certain[V // 2] = 3.0
    nearly = torch.full((V,), -1e4)
    nearly[V // 2] = 1e4
    assert_close(entropy_from_logits(torch.zeros(V, dtype=torch.float64)).item(), math.log(V), 1e-14)
    assert entropy_from_logits(certain) == 0 and entropy_from_logits(nearly) == 0


@given(logits())
def test_the_gradient_of_entropy(z):
    """dH/dz_i = -p_i (log p_i + H)."""
    z = leaf(z)
    log_p = log_softmax(z.detach())
    h = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    assert_close(entropy_from_logits(z), h.squeeze(-1))
    assert_close(grad(entropy_from_logits(z), z), -log_p.exp() * (log_p + h))


@given(logits(holes=True))
def test_impossible_tokens_add_nothing_to_entropy(z):
    """0 log 0 = 0: H and dH/dz are those of the possible tokens alone, and dH/dz = 0 at a logit of -inf."""
    for row in z:
        possible = row > -torch.inf
        full, rest = leaf(row), leaf(row[possible])
        h, expected = entropy_from_logits(full), entropy_from_logits(rest)
        assert_close(h, expected)
        g = grad(h, full)
        assert_close(g[possible], grad(expected, rest))
        assert (g[~possible] == 0).all()


@given(logits(holes=True), chunks, st.booleans())
def test_entropy_is_the_same_in_any_chunks(z, chunk_size, stacked):
    """H(z; chunk_size) = H(z) in value and gradient, chunks larger than the rows and no rows at all included."""
    a, b = (leaf(torch.stack((z, z.flip(0))) if stacked else z) for _ in range(2))
    whole, chunked = entropy_from_logits(a), entropy_from_logits(b, chunk_size)
    assert_close(chunked, whole)
    assert_close(grad(chunked.sin(), b), grad(whole.sin(), a))
    assert entropy_from_logits(z[:0], chunk_size).shape == (0,)


# ---- Log-probs straight from hidden states ----


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates; views create none."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        memory = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in memory:
                self.numel = max(self.numel, x.numel())
        return out


def dense_log_probs(hidden, weight, ids, temperature):
    z = hidden @ weight.T / temperature
    return selective_log_softmax(z, ids), entropy_from_logits(z)


@given(linear_problems(), chunks, generators)
def test_linear_log_probs_are_the_dense_ones_in_any_chunks(problem, chunk_size, generator):
    """logp, H and their gradients in hidden and weight equal those of z = hidden weight^T / T, N = 0 included."""
    hidden, weight, ids, temperature = problem
    upstream = randn(generator, 2, len(ids))
    results = []
    for f in (lambda *args: linear_log_probs(*args, chunk_size=chunk_size), dense_log_probs):
        h, w = leaf(hidden), leaf(weight)
        logp, entropy = f(h, w, ids, temperature)
        results.append((logp, entropy, *grad(upstream[0] * logp + upstream[1] * entropy, h, w),
                        *grad(f(h, w, ids, temperature)[0], h, w), *grad(f(h, w, ids, temperature)[1], h, w)))
    for ours, dense in zip(*results, strict=True):
        assert_close(ours, dense, 1e-10)


@settings(max_examples=10)
@given(linear_problems(rows=(1, 4)), chunks)
def test_the_gradient_of_linear_log_probs_is_its_slope(problem, chunk_size):
    """torch.autograd.gradcheck: the hand-written backward agrees with finite differences."""
    hidden, weight, ids, temperature = problem
    assert torch.autograd.gradcheck(lambda h, w: linear_log_probs(h, w, ids, temperature, chunk_size),
                                    (leaf(hidden), leaf(weight)))


@given(linear_problems())
def test_temperature_divides_the_logits(problem):
    """linear_log_probs(h, W, T) = linear_log_probs(h, W / T, 1) = linear_log_probs(h / T, W, 1)."""
    hidden, weight, ids, temperature = problem
    for h, w in ((hidden / temperature, weight), (hidden, weight / temperature)):
        for ours, expected in zip(linear_log_probs(hidden, weight, ids, temperature), linear_log_probs(h, w, ids),
                                  strict=True):
            assert_close(ours, expected)


@pytest.mark.parametrize("chunk_size", [8, 13, 100])
def test_linear_log_probs_never_hold_more_logits_than_a_chunk(chunk_size):
    """The largest tensor that forward or backward creates is [chunk, V] or a gradient; the dense way it is [N, V]."""
    N, V, d, g = 100, 40, 3, torch.Generator().manual_seed(0)
    hidden, weight, ids = leaf(randn(g, N, d)), leaf(randn(g, V, d)), torch.randint(V, (N,), generator=g)
    for f, largest in ((lambda *args: linear_log_probs(*args, chunk_size), chunk_size * V), (dense_log_probs, N * V)):
        with LargestTensor() as forward:
            logp, entropy = f(hidden, weight, ids, 0.7)
        with LargestTensor() as backward:
            grad(logp + entropy, hidden, weight)
        assert (forward.numel, backward.numel) == (largest, largest)


def test_a_head_that_is_a_constant_costs_no_gradient():
    """That of the hidden states is the same; nothing of the weight's size is made."""
    N, V, d, g = 10, 40, 3, torch.Generator().manual_seed(0)
    hidden, weight, ids = leaf(randn(g, N, d)), leaf(randn(g, V, d)), torch.randint(V, (N,), generator=g)
    found = []
    for constant in (False, True):
        logp, entropy = linear_log_probs(hidden, weight.detach() if constant else weight, ids, 0.7, 2)
        with LargestTensor() as backward:
            found.append(torch.autograd.grad((logp + entropy).sum(), hidden)[0])
        assert (backward.numel >= weight.numel()) != constant
    assert torch.equal(*found)


@pytest.mark.parametrize("f", [center, zscore, leave_one_out, zscore_batch, lambda r: whiten(r, r > 0.2)])
def test_no_float64_on_a_device_that_has_none(f, monkeypatch):
    """Nothing in it is made there, and the result is the same to float32's rounding."""
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert getattr(made, "dtype", None) != torch.float64, func
            return made

    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    expected = f(rewards)
    monkeypatch.setattr("nanorl.ops.NO_FLOAT64", {"cpu"})
    with Refuse():
        found = f(rewards)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_chunks_keep_the_temporaries_of_entropy_small():
    """Without a graph, the largest tensor that entropy_from_logits makes of [N, V] in chunks of n is [n, V]."""
    z = randn(torch.Generator().manual_seed(0), 100, 40)
    for chunk_size, numel in ((8, 8 * 40), (13, 13 * 40), (1000, 100 * 40)):
        with LargestTensor() as recorded:
            entropy_from_logits(z, chunk_size)
        assert recorded.numel == numel


@given(linear_problems(rows=(1, 9)), chunks)
def test_bfloat16_costs_linear_log_probs_one_rounding_of_the_logits(problem, chunk_size):
    """With u = 2^-8, bfloat16's unit roundoff, and delta = u max|z|, against float64 of the same inputs at T = 1:

        |logp - exact| <= 2 delta       |H - exact| <= 2 delta log V
        |d logp / d hidden - exact| <= max|weight| (e^{2 delta} - 1 + 4u)
        |d logp / d weight - exact| <= N max|hidden| (e^{2 delta} - 1 + 6u)

    since the score's 1-norm is at most 2 and softmax at z + delta is within a factor e^{2 delta} of that at z.
    """
    hidden, weight, ids = (x.bfloat16() if x.is_floating_point() else x for x in problem[:3])
    h16, w16, h64, w64 = leaf(hidden), leaf(weight), leaf(hidden.double()), leaf(weight.double())
    logp, entropy = linear_log_probs(h16, w16, ids, 1.0, chunk_size)
    exact_logp, exact_entropy = dense_log_probs(h64, w64, ids, 1.0)
    assert logp.dtype == entropy.dtype == torch.float32

    u, slack = 2.0**-8, 1e-5                                    # slack: float32's own rounding
    delta = u * (h64 @ w64.T).abs().max().item()
    assert (logp - exact_logp).abs().max() <= 2 * delta + slack
    assert (entropy - exact_entropy).abs().max() <= 2 * delta * math.log(len(weight)) + slack
    (dh, dw), (exact_dh, exact_dw) = grad(logp, h16, w16), grad(exact_logp, h64, w64)
    assert (dh - exact_dh).abs().max() <= weight.abs().max() * (math.expm1(2 * delta) + 4 * u) + slack
    assert (dw - exact_dw).abs().max() <= len(ids) * hidden.abs().max() * (math.expm1(2 * delta) + 6 * u) + slack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(logits(), st.floats(0.3, 3.0), generators)
def test_half_precision_logits_are_widened_before_they_are_divided(dtype, z, temperature, generator):
    """weight = I, so that hidden = z: logp and H are those of z.float() / T bit for bit, and the gradient is rounded once."""
    z, ids = leaf(z.to(dtype)), torch.randint(z.shape[1], (len(z),), generator=generator)
    wide = leaf(z.float())
    log_p = log_softmax(wide / temperature)
    logp, entropy = linear_log_probs(z, torch.eye(z.shape[1], dtype=dtype), ids, temperature)
    assert torch.equal(logp, log_p.gather(-1, ids[:, None]).squeeze(-1))
    assert torch.equal(entropy, -(log_p.exp() * log_p).sum(-1))
    for ours, exact in ((logp, log_p.gather(-1, ids[:, None])), (entropy, -(log_p.exp() * log_p).sum(-1))):
        (g,), (wide_g,) = (torch.autograd.grad(y.sum(), x, retain_graph=True) for y, x in ((ours, z), (exact, wide)))
        torch.testing.assert_close(g.float(), wide_g, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_small_gradients_of_the_head_add_up(dtype):
    """N equal rows have N times the gradient of one, to one rounding, though 2048 + 1 is 2048 in float16."""
    hidden, weight, N = torch.ones(1, 1, dtype=dtype), leaf(torch.zeros(2, 1, dtype=dtype)), 3000
    (once,) = torch.autograd.grad(linear_log_probs(hidden, weight, torch.tensor([0]))[0].sum(), weight)
    rows = linear_log_probs(hidden.expand(N, 1), weight, torch.zeros(N, dtype=torch.int64), chunk_size=1)[0]
    (many,) = torch.autograd.grad(rows.sum(), weight)
    torch.testing.assert_close(many, N * once, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_under_autocast_the_gradient_of_a_float32_head_is_not_rounded():
    """That of 3000 equal rows is 1500, which bfloat16 cannot hold."""
    hidden, weight, ids = torch.ones(3000, 1), leaf(torch.zeros(2, 1)), torch.zeros(3000, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = linear_log_probs(hidden, weight, ids, chunk_size=1)
    assert torch.autograd.grad(logp.sum(), weight)[0].tolist() == [[1500.0], [-1500.0]]


def test_autocast_rounds_the_head_and_nothing_after_it():
    """Under autocast, float32 hidden and weight are treated as if given in bfloat16; gradients are float32 again."""
    hidden, weight = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).split((9, 7))
    wide, half = (leaf(hidden), leaf(weight)), (leaf(hidden.bfloat16()), leaf(weight.bfloat16()))
    ids = torch.arange(9) % 7
    with torch.autocast("cpu", torch.bfloat16):
        outputs = linear_log_probs(*wide, ids)
    expected = linear_log_probs(*half, ids)
    for ours, theirs in zip(outputs + grad(sum(outputs), *wide), expected + grad(sum(expected), *half), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


# ---- Kullback-Leibler divergence ----


@given(logit_pairs())
def test_kl_divergence_is_at_least_twice_the_squared_total_variation(pair):
    """KL(p || q) >= 2 TV(p, q)^2 >= 0 (Pinsker): zero only where p = q."""
    p, q = (log_softmax(z).exp() for z in pair)
    tv = (p - q).abs().sum(-1) / 2
    assert (kl_divergence(*pair) >= 2 * tv**2 - 1e-12).all()


@given(logit_pairs(), shifts)
def test_kl_divergence_is_its_sum_and_zero_between_equals(pair, c):
    """KL(p || q) = sum_i p_i log(p_i / q_i); KL(p || p) = 0, whatever constant the logits are shifted by."""
    p, q = (log_softmax(z) for z in pair)
    assert_close(kl_divergence(*pair), (p.exp() * (p - q)).sum(-1))
    assert (kl_divergence(pair[0], pair[0]) == 0).all()
    assert_close(kl_divergence(pair[0], pair[0] + c), torch.zeros(len(p), dtype=p.dtype), 1e-10)


@given(logit_pairs())
def test_the_gradients_of_kl_divergence(pair):
    """dKL/dz^p_i = p_i (log(p_i / q_i) - KL),   dKL/dz^q = q - p."""
    zp, zq = map(leaf, pair)
    p, q = log_softmax(zp.detach()), log_softmax(zq.detach())
    kl = kl_divergence(zp, zq)
    dp, dq = grad(kl, zp, zq)
    assert_close(dp, p.exp() * (p - q - kl.detach()[:, None]))
    assert_close(dq, q.exp() - p.exp())


def test_kl_divergence_is_infinite_only_where_the_second_lacks_what_the_first_has():
    """KL(p || q) = inf if q_i = 0 < p_i; with p_i = 0 (q_i = 0 or not) the term is 0, in value and gradient."""
    inf = torch.inf
    p = torch.tensor([0.0, 0.0, -inf])
    assert kl_divergence(p, torch.tensor([0.0, -inf, 0.0])) == inf
    for z, expected in ((p, 0.0), (torch.zeros(3), math.log(1.5))):
        p, q = leaf(p), leaf(z)
        kl = kl_divergence(p, q)
        assert kl.item() == pytest.approx(expected) and all(g.isfinite().all() for g in grad(kl, p, q))


@given(policies(count=2))
def test_k1_and_k3_have_the_mean_of_the_divergence(pair):
    """E_{y ~ first}[sum_t k(log first, log second)] = KL(first || second), for k1 and k3."""
    first, second = pair
    exact = sequence_kl(first, second)
    assert_close(expectation(first, kl_k1(log_probs(first), log_probs(second)).sum(-1)), exact, 1e-10)
    assert_close(expectation(first, kl_k3(log_probs(first), log_probs(second)).sum(-1)), exact, 1e-9)


@given(policies(count=2, T=(1, 1)))
def test_the_mean_of_k2_is_the_divergence_up_to_third_order(pair):
    """|E[k2] - KL| <= E[|r|^3 e^|r|] / 6: it is what k3 = r^2/2 + r^3/6 + ... has beyond k2."""
    logp, other = map(log_probs, pair)
    r = (other - logp).abs()
    error = expectation(pair[0], kl_k2(logp, other)) - sequence_kl(*pair)
    assert error.abs() <= expectation(pair[0], r**3 * r.exp()) / 6 + 1e-14


@given(policies(count=2))
def test_k2_and_k3_are_never_negative_and_all_are_zero_between_equals(pair):
    """k2, k3 >= 0 token by token, in float32 too; k1, k2, k3 = 0 where the log-probs are equal."""
    for dtype in (torch.float32, torch.float64):
        logp, other = (log_probs(z).to(dtype) for z in pair)
        assert (kl_k2(logp, other) >= 0).all() and (kl_k3(logp, other) >= 0).all()
        assert all((k(logp, logp) == 0).all() for k in (kl_k1, kl_k2, kl_k3))


@pytest.mark.parametrize("r", [1e-6, -1e-6, 1e-4, -1e-4, 1e-9])
def test_k3_is_accurate_near_zero(r):
    """k3(r) = r^2/2 + r^3/6 + ... to within the rounding of r itself; e^r - 1 - r would lose all digits."""
    exact = r**2 / 2 + r**3 / 6 + r**4 / 24
    for dtype in (torch.float64, torch.float32):
        other = torch.tensor(r, dtype=dtype)
        rounding = torch.finfo(dtype).eps * abs(r)
        assert abs(kl_k3(torch.zeros((), dtype=dtype), other).item() - exact) <= rounding


def test_the_first_argument_is_the_policy_that_was_sampled():
    """first = (.9, .1), second = (.5, .5): KL(first || second) = .368 by samples of first, .511 the other way round."""
    first, second = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log().split(1)
    forward, backward = 0.9 * math.log(1.8) + 0.1 * math.log(0.2), 0.5 * math.log(5 / 9) + 0.5 * math.log(5)
    assert (round(forward, 3), round(backward, 3)) == (0.368, 0.511)
    assert_close(kl_divergence(first, second).item(), forward)
    assert_close(kl_divergence(second, first).item(), backward)
    for k in (kl_k1, kl_k3):
        assert_close(expectation(first, k(log_probs(first), log_probs(second))).item(), forward)
        assert_close(expectation(second, k(log_probs(second), log_probs(first))).item(), backward)
        assert abs(expectation(second, k(log_probs(first), log_probs(second))).item() - forward) > 0.1


def followed(loss, pi, ref):
    """The expected gradient of a loss of (logp, ref_logp) on samples of pi, nothing flowing through the sampling."""
    pi = leaf(pi)
    return grad(expectation(pi.detach(), loss(log_probs(pi), log_probs(ref)).sum(-1)), pi)


def reverse_and_forward(pi, ref):
    """Gradients in pi of E_{prefix ~ pi}[sum_t KL(pi_t || ref_t)] and of [sum_t KL(ref_t || pi_t)], prefixes fixed."""
    x = leaf(pi)
    return grad(fixed_prefix_kl(x, x, ref), x), grad(fixed_prefix_kl(x, ref, x), x)


@given(policies(count=2))
def test_the_gradient_of_k1_as_a_loss_has_mean_zero(pair):
    """E_pi[grad k1] = E_pi[grad log pi] = 0: no divergence is followed."""
    assert_close(followed(kl_k1, *pair), torch.zeros_like(pair[0]))


@given(policies(count=2))
def test_k2_as_a_loss_follows_the_reverse_divergence(pair):
    """E_pi[grad k2] = E_{prefix ~ pi}[sum_t grad KL(pi || ref)], the prefix held fixed."""
    assert_close(followed(kl_k2, *pair), reverse_and_forward(*pair)[0], 1e-10)


@given(policies(count=2))
def test_k3_as_a_loss_follows_the_forward_divergence(pair):
    """E_pi[grad k3] = E_{prefix ~ pi}[sum_t grad KL(ref || pi)], the prefix held fixed."""
    assert_close(followed(kl_k3, *pair), reverse_and_forward(*pair)[1], 1e-9)


@pytest.mark.parametrize("k", [kl_k1, kl_k3])
@given(policies(count=2))
def test_weighted_by_the_ratio_k1_and_k3_follow_the_reverse_divergence(k, pair):
    """E_pi[grad rho k] = E_{prefix ~ pi}[sum_t grad KL(pi || ref)],   rho = pi / sg(pi)."""
    weighted = followed(lambda logp, ref: importance_ratio(logp, logp.detach()) * k(logp, ref), *pair)
    assert_close(weighted, reverse_and_forward(*pair)[0], 1e-9)


@given(policies(count=2))
def test_the_divergence_of_sequences_is_followed_by_k1_in_the_reward_and_k2_of_the_sum(pair):
    """grad KL(pi || ref) of sequences = E_pi[sum_t grad logp_t sum_{s >= t} k1_s] = E_pi[grad (sum_t r_t)^2 / 2]."""
    pi = leaf(pair[0])
    sequence = grad(sequence_kl(pi, pair[1]), pi)
    to_go = followed(lambda logp, ref: logp * kl_k1(logp, ref).detach().flip(-1).cumsum(-1).flip(-1), *pair)
    summed = followed(lambda logp, ref: kl_k2(logp.sum(-1, keepdim=True), ref.sum(-1, keepdim=True)), *pair)
    assert_close(to_go, sequence, 1e-10)
    assert_close(summed, sequence, 1e-10)


def test_with_one_token_the_prefix_is_fixed_anyway_and_with_three_it_is_not():
    """k2 and k3 follow the divergences of whole sequences at T = 1 only."""
    for T in (1, 3):
        g = torch.Generator().manual_seed(0)
        pi, ref = leaf(randn(g, num_prefixes(3, T), 3)), randn(g, num_prefixes(3, T), 3)
        reverse, forward = grad(sequence_kl(pi, ref), pi), grad(sequence_kl(ref, pi), pi)
        for k, divergence in ((kl_k2, reverse), (kl_k3, forward)):
            gap = (followed(k, pi, ref) - divergence).abs().max()
            assert gap < 1e-12 if T == 1 else gap > 0.1


# ---- Advantages ----


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(scored_rewards())
def test_advantages_of_a_group_sum_to_zero(advantage, case):
    """sum_i A_i = 0 in every row, whatever samples could not be scored."""
    r, valid = case
    zero = torch.zeros(len(r), dtype=torch.float64)
    assert_close(advantage(r).sum(-1), zero)
    assert_close(advantage(r, valid=valid).sum(-1), zero)


@given(rewards())
def test_center_and_zscore_are_their_formulas(r):
    """A_i = r_i - mean(r), and that divided by (population std + eps)."""
    centred = r - r.mean(-1, keepdim=True)
    assert_close(center(r), centred)
    assert_close(zscore(r), centred / (r.std(-1, correction=0, keepdim=True) + 1e-6), 1e-9)
    assert_close(zscore(r, eps=0.5), centred / (r.std(-1, correction=0, keepdim=True) + 0.5))


@given(rewards(min_group=2))
def test_leave_one_out_compares_with_the_others(r):
    """A_i = r_i - mean_{j != i} r_j = G/(G-1) (r_i - mean(r))."""
    G = r.shape[1]
    others = torch.stack([r[:, [j for j in range(G) if j != i]].mean(-1) for i in range(G)], dim=1)
    assert_close(leave_one_out(r), r - others)
    assert_close(leave_one_out(r), G / (G - 1) * center(r))


@given(rewards(min_group=2), shifts)
def test_the_leave_one_out_baseline_does_not_contain_its_own_reward(r, change):
    """d(r_i - A_i) / d r_i = 0; the group mean moves by 1/G of the change."""
    i = r.shape[1] // 2
    other = r.clone()
    other[:, i] += change
    assert_close((other - leave_one_out(other))[:, i], (r - leave_one_out(r))[:, i], 1e-9)
    assert_close((other - center(other))[:, i], (r - center(r))[:, i] + change / r.shape[1], 1e-9)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(rewards(), generators)
def test_reordering_a_group_reorders_its_advantages(advantage, r, generator):
    """A(r[perm]) = A(r)[perm]."""
    perm = torch.randperm(r.shape[1], generator=generator)
    assert_close(advantage(r[:, perm]), advantage(r)[:, perm])


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(rewards(), shifts)
def test_shifting_a_groups_rewards_shifts_no_advantage(advantage, r, c):
    """A(r + c) = A(r)."""
    assert_close(advantage(r + c), advantage(r), 1e-6 if advantage is zscore else 1e-10)


@given(rewards(), st.sampled_from([1e-3, 0.5, 3.0, 1e3]))
def test_scaling_rewards_scales_differences_and_leaves_z_scores(r, c):
    """center and leave_one_out are linear; zscore(c r, c eps) = zscore(r, eps), so its scale goes with eps -> 0."""
    assert_close(center(c * r), c * center(r), 1e-10)
    assert_close(leave_one_out(c * r), c * leave_one_out(r), 1e-10)
    assert_close(zscore(c * r, eps=c * 1e-6), zscore(r, eps=1e-6), 1e-9)
    assert_close(zscore(-r), -zscore(r), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(value=st.sampled_from([0.1, 0.3, 0.7, 1 / 3, 1e-3, -0.1, 1234.567]) | st.floats(-1e4, 1e4), G=st.integers(1, 16),
       seed=generators)
def test_equal_rewards_give_exactly_zero(dtype, value, G, seed):
    """r_i = r for all i: A_i = 0 bit for bit, though the mean of three 0.1 is not 0.1. float64 stays, else float32."""
    r, valid = torch.full((3, G), value, dtype=dtype), torch.rand(3, G, generator=seed) < 0.7
    for advantage in ADVANTAGES:
        for a in (advantage(r), advantage(r, valid=valid)):
            assert (a == 0).all() and a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@given(rewards(), generators, st.floats(-10, 10), st.sampled_from([0.5, 2.0]))
def test_z_scores_of_a_batch_are_centred_per_group_and_scaled_as_one(r, generator, c, factor):
    """A = (r - mean of the group) / std of all kept answers; shifts of a group and one factor for all change nothing."""
    kept = torch.rand(r.shape, generator=generator) < 0.7
    a = zscore_batch(r, kept=kept)
    std = center(r)[kept].square().mean().sqrt() if kept.any() else torch.tensor(0.0)
    assert_close(a, center(r) / (std + 1e-6))
    assert_close(zscore_batch(r), zscore_batch(r, kept=torch.ones_like(kept)))
    assert_close(zscore_batch(r + torch.arange(len(r))[:, None] * c, kept=kept), a, 1e-6)
    if std > 0.01:
        assert_close(zscore_batch(r * factor, kept=kept), a, 1e-3)


def test_one_group_has_the_z_scores_of_a_batch_and_several_keep_their_weights():
    """With one group both are the same. With several, the batch's keep the groups' proportions, the group's make them alike."""
    one, two = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[4.0, 0.0], [1.0, 0.0]])
    assert_close(zscore_batch(one), zscore(one))
    assert_close(zscore_batch(two)[0] / zscore_batch(two)[1], torch.tensor([4.0, 4.0]), 1e-5)
    assert_close(zscore(two)[0] / zscore(two)[1], torch.tensor([1.0, 1.0]), 1e-5)


@given(st.integers(1, 200), st.sampled_from([0.1, 0.2, 1.0]), st.integers(0, 300))
def test_length_costs_nothing_then_linearly_then_one(limit, share, length):
    """0 up to limit - buffer, then falling along a line to -1 at the limit, and no further."""
    buffer = share * limit
    found = overlong_penalty(torch.tensor([length]), limit, buffer).item()
    expected = 0.0 if length <= limit - buffer else -1.0 if length >= limit else -(length - (limit - buffer)) / buffer
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("advantage", [*ADVANTAGES, zscore_batch])
@given(rewards(), st.sampled_from([0.0, 1e3, 1e6]))
def test_advantages_of_float32_are_float64s_rounded_once(advantage, r, offset):
    """A(r) = A(r.double()).float(), bit for bit: 10^6 + 0.1 has few digits to lose, and means and stds lose none."""
    r = (r + offset).float()
    assert torch.equal(advantage(r), advantage(r.double()).float())


@given(rewards())
def test_z_scores_are_bounded_by_the_size_of_the_group(r):
    """|A_i| <= sqrt(G - 1), reached by one answer against all others."""
    G = r.shape[1]
    assert (zscore(r).abs() <= math.sqrt(G - 1) + 1e-12).all()
    assert_close(zscore(torch.eye(G, dtype=torch.float64)[:1])[0, 0].item(), math.sqrt(G - 1), 1e-5)


@given(st.integers(2, 16), st.data())
def test_z_scores_of_verdicts_follow_from_the_pass_rate(G, data):
    """0/1 rewards with pass rate p: +sqrt((1-p)/p) and -sqrt(p/(1-p)), as eps -> 0."""
    passed = data.draw(st.integers(1, G - 1))
    p = passed / G
    a = zscore((torch.arange(G) < passed).double()[None], eps=0.0)[0]
    assert_close(a[:passed], torch.full((passed,), math.sqrt((1 - p) / p), dtype=torch.float64))
    assert_close(a[passed:], torch.full((G - passed,), -math.sqrt(p / (1 - p)), dtype=torch.float64))


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(scored_rewards())
def test_other_groups_do_not_matter(advantage, case):
    """A(r)[p] = A(r[p])."""
    r, valid = case
    assert_close(advantage(r), torch.cat([advantage(row[None]) for row in r]))
    assert_close(advantage(r, valid=valid),
                 torch.cat([advantage(row[None], valid=v[None]) for row, v in zip(r, valid, strict=True)]))


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(scored_rewards(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
def test_a_sample_that_could_not_be_scored_is_as_if_absent(advantage, case, poison):
    """A(r, valid)[valid] = A(r[valid]) row by row, of any size down to none, and A = 0 elsewhere, whatever r holds."""
    r, valid = case
    a = advantage(r.masked_fill(~valid, poison), valid=valid)
    assert (a[~valid] == 0).all()
    for row, v, result in zip(r, valid, a, strict=True):
        if v.any():
            assert_close(result[v], advantage(row[v][None])[0])
    assert torch.equal(advantage(r, valid=torch.ones_like(valid)), advantage(r))


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_lone_sample_has_nothing_to_be_compared_with(advantage):
    """G = 1: A = 0, as it is for the only valid one of a group."""
    r = torch.tensor([[0.3], [7.0]])
    assert (advantage(r) == 0).all()
    assert (advantage(torch.tensor([[0.3, 7.0, 1.0]]), valid=torch.tensor([[False, True, False]])) == 0).all()


def expected_gradient(pi, r, G, advantage):
    """E[1/G sum_i A_i grad log pi(y_i)] over all V^G groups of G samples.       pi [1, V], r [V] -> [1, V]"""
    pi, groups = leaf(pi), sequences(len(r), G)                                             # [V^G, G]
    logp = log_probs(pi).squeeze(-1)[groups]
    return grad(logp.sum(-1).exp().detach() * (advantage(r[groups]) * logp).mean(-1), pi)


@given(policies(V=(3, 3), T=(1, 1)), generators, st.sampled_from([2, 3]))
def test_leave_one_out_is_unbiased_and_center_shrinks_the_gradient(pi, generator, G):
    """E[1/G sum_i A_i grad log pi(y_i)] = grad E[r] with leave_one_out, and (G-1)/G of it with center."""
    pi, r = leaf(pi), randn(generator, 3)
    exact = grad(expectation(pi, r), pi)
    assert_close(expected_gradient(pi, r, G, leave_one_out), exact)
    assert_close(expected_gradient(pi, r, G, center), (G - 1) / G * exact)


def test_the_z_score_follows_another_direction():
    """On a three-armed bandit E[A grad log pi] is no multiple of grad E[r]: its components' ratios differ."""
    pi, r = leaf(torch.tensor([[0.0, 0.5, 1.0]]).double()), torch.tensor([0.0, 0.1, 1.0]).double()
    ratios = (expected_gradient(pi, r, 2, zscore) / grad(expectation(pi, r), pi)).squeeze()
    assert ratios.max() > 2 * ratios.min() > 0


def discounted_sums(x: Tensor, mask: Tensor, c: float) -> Tensor:
    """sum_k c^k x_{t+k} over the rest of the run, term by term; 0 outside it.       [B, T] -> [B, T]"""
    x = x.masked_fill(~mask, 0.0)
    return sum(c**k * pad(x[:, k:], (0, k)) for k in range(x.shape[1])).masked_fill(~mask, 0.0)


def td_errors(rewards, values, mask, gamma, bootstrap):
    """r_t + gamma V_{t+1} - V_t, where V_{t+1} of a run's last token is bootstrap; 0 outside the run."""
    following = torch.where(pad(mask[:, 1:], (0, 1)), pad(values[:, 1:], (0, 1)), bootstrap[:, None])
    return (rewards + gamma * following - values).masked_fill(~mask, 0.0)


discounts = st.floats(0.0, 1.0) | st.sampled_from([0.0, 1.0])


@st.composite
def trajectories(draw):
    """rewards, values, mask [B, T], each row one run or none, anywhere; bootstrap [B]."""
    mask, g = draw(masks(kinds=("empty", "full", "run"))), draw(generators)
    return randn(g, *mask.shape), randn(g, *mask.shape), mask, randn(g, len(mask))


@given(trajectories(), discounts, discounts)
def test_gae_is_the_discounted_sum_of_td_errors(case, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k} over the rest of the run and return_t = A_t + V_t; both are 0 outside it."""
    r, V, mask, bootstrap = case
    for after in (bootstrap, None):
        delta = td_errors(r, V, mask, gamma, torch.zeros_like(bootstrap) if after is None else after)
        A, returns = gae(r, V, mask, gamma, lam, after)
        assert_close(A, discounted_sums(delta, mask, gamma * lam))
        assert_close(returns, (A + V).masked_fill(~mask, 0.0))
        assert (A[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_by_hand():
    """gamma = 1, lam = 1/2, V = (1/2, 1/4, 3/4) and a final reward of 1: delta = (-1/4, 1/2, 1/4), A = (1/16, 5/8, 1/4)."""
    mask = torch.tensor([[False, True, True, True, False]])
    r, V = torch.tensor([[9.0, 0.0, 0.0, 1.0, 9.0]]), torch.tensor([[9.0, 0.5, 0.25, 0.75, 9.0]])
    A, returns = gae(r, V, mask, 1.0, 0.5)
    assert A.tolist() == [[0.0, 0.0625, 0.625, 0.25, 0.0]]
    assert returns.tolist() == [[0.0, 0.5625, 0.875, 1.0, 0.0]]


@given(trajectories(), discounts)
def test_with_lambda_one_returns_are_those_of_the_rewards_alone(case, gamma):
    """lam = 1: return_t = sum_k gamma^k r_{t+k} and A_t = return_t - V_t: the values inside the sum telescope."""
    r, V, mask, _ = case
    A, returns = gae(r, V, mask, gamma, 1.0)
    assert_close(returns, discounted_sums(r, mask, gamma))
    assert_close(A, (returns - V).masked_fill(~mask, 0.0))


@given(trajectories())
def test_undiscounted_every_token_is_given_what_is_still_to_come_less_what_was_expected(case):
    """gamma = lam = 1: A_t = sum_{s >= t} r_s - V_t; for one verdict R on the last token it is R - V_t everywhere."""
    r, V, mask, _ = case
    to_go = r.masked_fill(~mask, 0.0).flip(-1).cumsum(-1).flip(-1)
    assert_close(gae(r, V, mask, 1.0, 1.0)[0], (to_go - V).masked_fill(~mask, 0.0))
    last = mask & ~pad(mask[:, 1:], (0, 1))
    verdict = torch.where(last, r, 0.0)
    assert_close(gae(verdict, V, mask, 1.0, 1.0)[0], (verdict.sum(-1, keepdim=True) - V).masked_fill(~mask, 0.0))


@given(trajectories(), discounts)
def test_with_lambda_zero_advantages_are_td_errors(case, gamma):
    """lam = 0: A_t = r_t + gamma V_{t+1} - V_t."""
    r, V, mask, bootstrap = case
    assert_close(gae(r, V, mask, gamma, 0.0, bootstrap)[0], td_errors(r, V, mask, gamma, bootstrap))


@given(trajectories(), discounts, discounts)
def test_without_a_critic_advantages_are_rewards_to_go(case, gamma, lam):
    """V = 0: A_t = return_t = sum_k (gamma lam)^k r_{t+k}."""
    r, V, mask, _ = case
    A, returns = gae(r, torch.zeros_like(V), mask, gamma, lam)
    assert_close(A, discounted_sums(r, mask, gamma * lam))
    assert torch.equal(returns, A)


@given(trajectories(), discounts, discounts, st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
def test_what_lies_outside_the_run_has_no_influence(case, gamma, lam, poison):
    """Rewards and values before and after the run, and the bootstrap of an empty row, change no bit of A and returns."""
    r, V, mask, bootstrap = case
    poisoned = (r.masked_fill(~mask, poison), V.masked_fill(~mask, poison), mask)
    for ours, expected in zip(gae(*poisoned, gamma, lam, bootstrap.masked_fill(~mask.any(-1), poison)),
                              gae(r, V, mask, gamma, lam, bootstrap), strict=True):
        assert torch.equal(ours, expected)


@given(trajectories(), discounts, discounts, st.integers(0, 3), st.integers(0, 3))
def test_a_run_may_start_and_end_at_any_column(case, gamma, lam, before, after):
    """Columns added on either side shift A and returns along and change no bit of them."""
    r, V, mask, bootstrap = case
    wider = [pad(x, (before, after), value=value) for x, value in ((r, 1.0), (V, 2.0), (mask, False))]
    for wide, narrow in zip(gae(*wider, gamma, lam, bootstrap), gae(r, V, mask, gamma, lam, bootstrap), strict=True):
        assert torch.equal(wide, pad(narrow, (before, after)))


@given(trajectories(), discounts, discounts)
def test_the_bootstrap_is_the_value_after_the_last_token_and_only_that(case, gamma, lam):
    """It adds gamma (gamma lam)^{n-1-k} b to A and to the return of token k of n. None is 0: the answer has ended."""
    r, V, mask, bootstrap = case
    last = mask & ~pad(mask[:, 1:], (0, 1))
    added = discounted_sums(torch.where(last, gamma * bootstrap[:, None], 0.0), mask, gamma * lam)
    zero = torch.zeros_like(bootstrap)
    for ours, ended, none in zip(*(gae(r, V, mask, gamma, lam, b) for b in (bootstrap, zero, None)), strict=True):
        assert torch.equal(ended, none)
        assert_close(ours - ended, added)


@given(trajectories(), discounts, discounts)
def test_a_run_cut_short_and_bootstrapped_with_its_next_value_keeps_its_td_errors(case, gamma, lam):
    """Cut before token n: A_t of the whole = A_t of the cut + (gamma lam)^{n-t} A_n, where V_n is the cut's bootstrap."""
    r, V, _, bootstrap = case
    full, T = torch.ones(r.shape, dtype=torch.bool), r.shape[1]
    whole, _ = gae(r, V, full, gamma, lam, bootstrap)
    for n in range(1, T):
        cut, _ = gae(r[:, :n], V[:, :n], full[:, :n], gamma, lam, V[:, n])
        rest = torch.tensor([(gamma * lam) ** (n - t) for t in range(n)], dtype=r.dtype) * whole[:, n:n + 1]
        assert_close(whole[:, :n], cut + rest)


@given(trajectories(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_gae_of_half_precision_is_computed_in_float32(case, dtype):
    """A(r, V) = A(r.float(), V.float()) bit for bit when they are half precision; float64 stays."""
    r, V, bootstrap = (case[i].to(dtype) for i in (0, 1, 3))
    wide = [x if dtype == torch.float64 else x.float() for x in (r, V, bootstrap)]
    for ours, expected in zip(gae(r, V, case[2], 0.9, 0.8, bootstrap), gae(*wide[:2], case[2], 0.9, 0.8, wide[2]),
                              strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("constant", ["rewards", "values", "bootstrap"])
def test_inputs_of_gae_must_arrive_detached(constant):
    """A gradient through an advantage would train the critic by the policy's objective: refused."""
    inputs = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "bootstrap": torch.zeros(2)}
    inputs[constant].requires_grad_()
    with pytest.raises(AssertionError, match="detach"):
        gae(mask=torch.ones(2, 3, dtype=torch.bool), gamma=1.0, lam=1.0, **inputs)


@given(masks(), generators, poisons, st.floats(0.1, 10.0), st.floats(-10.0, 10.0))
def test_whitened_values_have_mean_zero_and_variance_one_over_the_mask(mask, generator, poison, scale, shift):
    """Padding stays 0 whatever it holds; a shift and a positive factor change nothing; one value, or none, gives 0."""
    x = randn(generator, *mask.shape)
    white = whiten(x.masked_fill(~mask, poison), mask)
    assert (white[~mask] == 0).all()
    if mask.sum() > 1:
        assert_close(white[mask].mean(), torch.zeros_like(white[0, 0]), 1e-6)
        assert_close(white[mask].var(correction=0), torch.ones_like(white[0, 0]), 1e-6)
        assert_close(whiten(scale * x + shift, mask), white, 1e-5)
    else:
        assert (white == 0).all()


@given(masks(), st.floats(-1e3, 1e3))
def test_equal_values_are_whitened_to_exactly_zero(mask, value):
    assert (whiten(torch.full(mask.shape, value, dtype=torch.float64), mask) == 0).all()


value_cases = st.builds(lambda g, scale: scale * randn(g, 3, 3, 5), generators, st.sampled_from([0.3, 1.0, 3.0]))


@given(value_cases, st.floats(0.05, 2.0))
def test_the_value_loss_is_pessimistic_and_flat_exactly_where_V_left_towards_R(case, clip):
    """It is never below the squared error, and that inside the band. Outside, the gradient is 0 if R lies on V's side of the
    old value and the clipped value is further from R than V is; else it is V - R."""
    V, (old, R) = leaf(case[0]), case[1:]
    loss = clipped_value_loss(V, old, R, clip)
    clipped = old + (case[0] - old).clamp(-clip, clip)
    moved = (case[0] - old).abs() > clip
    flat = moved & ((clipped - R).abs() > (case[0] - R).abs())
    assert (loss >= (case[0] - R).square() / 2 - 1e-12).all()
    assert_close(loss[~moved], ((case[0] - R).square() / 2)[~moved])
    assert_close(grad(loss, V), (case[0] - R).masked_fill(flat, 0.0))


@given(value_cases)
def test_without_a_band_the_value_loss_is_the_squared_error(case):
    V, old, R = case
    assert_close(clipped_value_loss(V, old, R, math.inf), (V - R).square() / 2)


def test_constants_of_the_value_loss_must_arrive_detached():
    x = torch.zeros(2)
    for constants in ((leaf(x), x), (x, leaf(x))):
        with pytest.raises(AssertionError, match="detach"):
            clipped_value_loss(x, *constants, 0.2)



# ---- Policy-gradient surrogates ----


@given(policies(count=2))
def test_the_mean_ratio_is_one(pair):
    """E_{y ~ old}[rho_t] = 1 for every token, and E_{y ~ old}[prod_t rho_t] = 1."""
    new, old = pair
    ratio = importance_ratio(log_probs(new), log_probs(old))
    assert_close(expectation(old, ratio), torch.ones(ratio.shape[1], dtype=ratio.dtype))
    assert_close(expectation(old, ratio.prod(-1)).item(), 1.0)


@given(scored_logits())
def test_where_policies_agree_the_ratio_is_one_and_its_gradient_the_score(case):
    """rho = 1 and d rho / d z = onehot - p; in general d rho / d logp = rho."""
    z, ids = leaf(case[0]), case[1]
    logp = selective_log_softmax(z, ids)
    ratio = importance_ratio(logp, logp.detach())
    assert (ratio == 1).all()
    assert_close(grad(ratio, z), grad(selective_log_softmax(z, ids), z))
    old = logp.detach() + case[0][:, 0].clamp(-3, 3)
    new = leaf(logp)
    assert_close(grad(importance_ratio(new, old), new), (new.detach() - old).exp())


# d/dlogp of the surrogate: A, rho, then with clip .2/.2, with clip .2/.28 and with a mask [1/8, 8] (equations.md E16)
TRUTH_TABLE = [(+1, 0.1, 0.1, 0.1, 0), (+1, 0.5, 0.5, 0.5, 0.5), (+1, 1.25, 0, 1.25, 1.25), (+1, 1.5, 0, 0, 1.5),
               (+1, 10.0, 0, 0, 0), (-1, 0.1, 0, 0, 0), (-1, 0.5, 0, 0, -0.5), (-1, 1.25, -1.25, -1.25, -1.25),
               (-1, 1.5, -1.5, -1.5, -1.5), (-1, 10.0, -10, -10, 0)]


@pytest.mark.parametrize(("adv", "ratio", "symmetric", "higher", "masked"), TRUTH_TABLE)
def test_the_truth_table_of_clipping_and_masking(adv, ratio, symmetric, higher, masked):
    """A clip zeroes the gradient on one side only, where rho has already moved in A's favour; a mask on both."""
    adv = torch.tensor([[float(adv)]], dtype=torch.float64)
    for f, knobs, expected in ((clipped_surrogate, (0.2, 0.2), symmetric), (clipped_surrogate, (0.2, 0.28), higher),
                               (masked_surrogate, (1 / 8, 8.0), masked)):
        logp = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
        assert_close(grad(f(logp, torch.full_like(adv, -1.0), adv, *knobs), logp).item(), float(expected))


@st.composite
def surrogate_arguments(draw):
    """logp, old_logp [B, T], adv [B, 1] or [B, T], clip_low, clip_high."""
    B, T, g = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(generators)
    logp = -randn(g, B, T).abs()
    adv = randn(g, B, draw(st.sampled_from([1, T])))
    adv[torch.rand(adv.shape, generator=g) < 0.2] = 0.0
    return (logp, logp + draw(st.sampled_from([0.0, 0.2, 1.0])) * randn(g, B, T), adv,
            draw(st.floats(0.0, 0.9)), draw(st.floats(0.0, 3.0)))


@given(surrogate_arguments())
def test_at_ratio_one_the_gradient_is_that_of_reinforce(case):
    """rho = 1: J = A and dJ/dlogp = A, for every band that has an inside."""
    logp, _, adv, low, high = case
    x = leaf(logp)
    J = clipped_surrogate(x, logp, adv, low + 1e-6, high + 1e-6)
    assert torch.equal(J, adv.expand_as(J)) and torch.equal(grad(J, x), adv.expand_as(J))


@given(surrogate_arguments())
def test_the_surrogate_is_pessimistic_and_flat_exactly_where_rho_left_in_As_favour(case):
    """J <= rho A, equal within the band. dJ/dlogp = 0 if A > 0, rho > 1 + high or A < 0, rho < 1 - low; else rho A."""
    logp, old_logp, adv, low, high = case
    x = leaf(logp)
    J, ratio = clipped_surrogate(x, old_logp, adv, low, high), (logp - old_logp).exp()
    assert (ratio * adv >= J).all()
    inside = (ratio > 1 - low) & (ratio < 1 + high)
    assert torch.equal(J[inside], (ratio * adv)[inside])
    left = ((adv > 0) & (ratio > 1 + high)) | ((adv < 0) & (ratio < 1 - low))
    g = grad(J, x)
    edge = (ratio == 1 - low) | (ratio == 1 + high)             # a kink has no gradient to speak of
    assert (g[left] == 0).all()
    assert_close(g[~left & ~edge], (ratio * adv)[~left & ~edge])


@given(surrogate_arguments())
def test_what_is_counted_as_clipped_away_is_what_has_no_gradient(case):
    """Below the band only where A < 0, above it only where A > 0. A = 0 has no gradient either, and is not counted."""
    logp, old_logp, adv, low, high = case
    x, ratio = leaf(logp), (logp - old_logp).exp()
    below, above = clipped_away(ratio, adv, low, high)
    flat = (grad(clipped_surrogate(x, old_logp, adv, low, high), x) == 0) & (adv != 0)
    edge = (ratio == 1 - low) | (ratio == 1 + high)
    assert torch.equal((below | above)[~edge], flat[~edge]) and not (below & above).any()
    assert (ratio[below] < 1).all() and (ratio[above] > 1).all()


@given(surrogate_arguments(), st.floats(0.01, 2.0))
def test_a_higher_ceiling_only_frees_tokens_of_positive_advantage(case, more):
    """Raising clip_high changes J and its gradient only where A > 0 and rho > 1 + clip_high."""
    logp, old_logp, adv, low, high = case
    x = leaf(logp)
    (J, g), (higher_J, higher_g) = ((J, grad(J, x)) for J in (clipped_surrogate(x, old_logp, adv, low, top)
                                                              for top in (high, high + more)))
    freed = (adv > 0) & ((logp - old_logp).exp() >= 1 + high)
    assert torch.equal(J[~freed], higher_J[~freed]) and torch.equal(g[~freed], higher_g[~freed])
    assert (higher_J >= J).all()


def test_constants_of_a_surrogate_must_arrive_detached():
    """A gradient through old_logp or A would be another objective: refused."""
    logp, adv = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 1)
    with pytest.raises(AssertionError, match="old log-probs"):
        importance_ratio(logp, logp)
    with pytest.raises(AssertionError, match="old log-probs"):
        sequence_ratio(logp, logp, logp == 0)
    for f, knobs in SURROGATES.items():
        with pytest.raises(AssertionError, match="old log-probs"):
            f(logp, logp, adv, *knobs)
        with pytest.raises(AssertionError, match="advantages"):
            f(logp, logp.detach(), leaf(adv), *knobs)


# Truncation and masking


caps = st.floats(0.01, 5.0) | st.just(torch.inf)
bands = st.tuples(st.floats(0.0, 1.0), st.floats(1.0, 4.0) | st.just(torch.inf))


@given(surrogate_arguments(), caps)
def test_a_truncated_weight_leaves_every_token_a_gradient(case, cap):
    """dJ/dlogp = min(rho, cap) A, and nothing flows through the weight; J = min(rho, cap) A logp."""
    logp, old_logp, adv, _, _ = case
    x, weight = leaf(logp), (logp - old_logp).exp().clamp(max=cap) * adv
    J = truncated_surrogate(x, old_logp, adv, cap)
    assert_close(J, weight * logp)
    assert_close(grad(J, x), weight)
    assert ((grad(truncated_surrogate(x, old_logp, adv, cap), x) != 0) == (adv != 0)).all()


@given(surrogate_arguments())
def test_a_soft_gate_keeps_every_gradient_and_shrinks_it_away_from_ratio_one(case):
    """dJ/dlogp = 4 s (1 - s) rho A, s = sigma(tau (rho - 1)): never more than that of rho A, equal at rho = 1, smooth."""
    logp, old_logp, adv, _, _ = case
    x, ratio = leaf(logp), (logp - old_logp).exp()
    s = torch.sigmoid((1.05 - 0.05 * (adv > 0).double()) * (ratio - 1))
    g = grad(soft_surrogate(x, old_logp, adv), x)
    assert_close(g, 4 * s * (1 - s) * ratio * adv)
    assert (g.abs() <= (ratio * adv).abs() * (1 + 1e-12)).all() and ((g != 0) == (adv != 0)).all()


def test_a_soft_gate_has_no_gradient_left_at_a_huge_ratio():
    """And not 0 * inf: a token may have become e^200 times as likely."""
    x, A = leaf(torch.tensor([[0.0]])), torch.ones(1, 1)
    assert torch.equal(grad(soft_surrogate(x, x.detach() - 200, A), x), torch.zeros(1, 1))


@given(scored_logits(), generators, caps)
def test_the_gradient_of_a_truncated_token_is_its_weighted_score(case, generator, cap):
    """dJ/dz = min(rho, cap) A (onehot - p): the score, longer or shorter, never turned."""
    z, ids = leaf(case[0]), case[1]
    logp = selective_log_softmax(z, ids)
    old_logp, adv = logp.detach() + randn(generator, len(ids)), randn(generator, len(ids))
    weight = (logp.detach() - old_logp).exp().clamp(max=cap) * adv
    score = torch.nn.functional.one_hot(ids, z.shape[1]) - log_softmax(z.detach()).exp()
    assert_close(grad(truncated_surrogate(logp, old_logp, adv, cap), z), weight[:, None] * score)


@given(surrogate_arguments(), st.floats(1.0, 5.0), bands)
def test_at_ratio_one_truncation_masks_and_gates_are_inert(case, cap, band):
    """rho = 1: dJ/dlogp = A as for REINFORCE, for any cap >= 1, any band with 1 in it or at its edge and any temperature."""
    logp, _, adv, _, _ = case
    for f, knobs in ((truncated_surrogate, (cap,)), (masked_surrogate, band), (soft_surrogate, (cap, 1 / cap))):
        x = leaf(logp)
        assert_close(grad(f(x, logp, adv, *knobs), x), adv.expand_as(x))


@given(policies(count=2, T=(1, 1)), generators)
def test_with_nothing_cut_off_old_samples_give_the_gradient_of_new_ones(pair, generator):
    """One token, cap = inf or band [0, inf]: E_{y ~ old}[grad J] = grad E_{y ~ new}[A]."""
    new, old = leaf(pair[0]), pair[1]
    A = randn(generator, new.shape[1], 1)
    exact = grad(expectation(new, A.squeeze(-1)), new)
    for f, knobs in ((truncated_surrogate, (torch.inf,)), (masked_surrogate, (0.0, torch.inf))):
        J = f(log_probs(new), log_probs(old), A, *knobs)
        assert_close(grad(expectation(old, J.squeeze(-1)), new), exact, 1e-10)


@given(surrogate_arguments(), bands)
def test_a_mask_keeps_the_band_whole_and_nothing_else(case, band):
    """J = rho A and dJ/dlogp = rho A where low <= rho <= high; both are exactly 0 elsewhere."""
    logp, old_logp, adv, _, _ = case
    x, ratio = leaf(logp), (logp - old_logp).exp()
    kept = (band[0] <= ratio) & (ratio <= band[1])
    J = masked_surrogate(x, old_logp, adv, *band)
    for actual in (J, grad(J, x)):
        assert_close(actual[kept], (ratio * adv)[kept])
        assert (actual[~kept] == 0).all()


@given(surrogate_arguments(), bands)
def test_a_mask_does_not_look_at_the_sign_of_the_advantage(case, band):
    """J(-A) = -J(A) with its gradient; and J(cA) = c J(A): who is masked follows from rho alone. Not so for a clip."""
    logp, old_logp, adv, _, _ = case
    results = []
    for c in (1.0, -1.0, 0.5):
        x = leaf(logp)
        J = masked_surrogate(x, old_logp, c * adv, *band)
        results.append((J / c, grad(J, x) / c))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@given(surrogate_arguments())
def test_both_ends_of_a_band_belong_to_it(case):
    """[min rho, max rho] keeps all tokens, bit for bit; an end moved inwards by one float loses those that lie on it."""
    logp, old_logp, _, _, _ = case
    ratio, one = importance_ratio(logp, old_logp), torch.ones_like(logp)
    low, high = ratio.min().item(), ratio.max().item()
    assert torch.equal(masked_surrogate(logp, old_logp, one, low, high), ratio)
    assert torch.equal(masked_surrogate(logp, old_logp, one, math.nextafter(low, torch.inf), high) == 0, ratio == low)
    assert torch.equal(masked_surrogate(logp, old_logp, one, low, math.nextafter(high, 0.0)) == 0, ratio == high)


@given(surrogate_arguments())
def test_a_mask_from_zero_to_infinity_is_plain_importance_sampling(case):
    """low = 0, high = inf: J and its gradient are rho A, bit for bit."""
    logp, old_logp, adv, _, _ = case
    x, y = leaf(logp), leaf(logp)
    J, plain = masked_surrogate(x, old_logp, adv, 0.0, torch.inf), importance_ratio(y, old_logp) * adv
    assert torch.equal(J, plain) and torch.equal(grad(J, x), grad(plain, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_a_huge_ratio_is_cut_off_without_a_trace(dtype, adv):
    """log rho = 200 and 1000, where rho may be inf: masked, J and gradient are 0; truncated, the gradient is cap A."""
    log_ratio, A = torch.tensor([[-1000, -200, 0, 200, 1000]], dtype=dtype), torch.tensor([[adv]], dtype=dtype)
    zero, x = torch.zeros_like(log_ratio), leaf(log_ratio)
    J = masked_surrogate(x, zero, A, 1 / 8, 8.0)
    for actual in (J, grad(J, x)):
        assert torch.equal(actual, torch.tensor([[0, 0, 1, 0, 0]], dtype=dtype) * A)
    x = leaf(zero)                                              # a log-ratio is large because the old policy's is small
    g = grad(truncated_surrogate(x, zero - log_ratio, A, 8.0), x)
    assert_close(g, torch.tensor([[0, math.exp(-200), 1, 8, 8]], dtype=dtype) * A)
    assert torch.equal(grad(masked_surrogate(x, zero - log_ratio, A, 1 / 8, 8.0), x), (log_ratio == 0) * A)


# The ratio of whole answers


@st.composite
def masked_answers(draw):
    """logp, old_logp, mask [B, T]."""
    mask, g = draw(masks()), draw(generators)
    logp = -randn(g, *mask.shape).abs()
    return logp, logp + draw(st.sampled_from([0.0, 0.2, 1.0])) * randn(g, *mask.shape), mask


@given(masked_answers())
def test_the_sequence_ratio_is_a_geometric_mean_of_token_ratios(case):
    """s^{|y|} = prod_t rho_t over the mask; [B, 1]. An empty row has s = 1, exactly."""
    logp, old_logp, mask = case
    s, ratio = sequence_ratio(*case), importance_ratio(logp, old_logp)
    assert s.shape == (len(mask), 1)
    assert_close(s.squeeze(-1) ** mask.sum(-1), torch.where(mask, ratio, 1.0).prod(-1))
    assert (s[~mask.any(-1)] == 1).all()
    lowest, highest = torch.where(mask, ratio, torch.inf).amin(-1), torch.where(mask, ratio, 0.0).amax(-1)
    counted = mask.any(-1)
    assert ((lowest <= s[:, 0] * (1 + 1e-12)) & (s[:, 0] <= highest * (1 + 1e-12)))[counted].all()


@given(masked_answers())
def test_the_gradient_of_the_sequence_ratio_is_shared_evenly(case):
    """ds/dlogp_t = s / |y| on the mask, 0 elsewhere; where the policies agree, s = 1 and it is 1/|y|: REINFORCE's mean."""
    logp, old_logp, mask = case
    even = mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)
    x = leaf(logp)
    s = sequence_ratio(x, old_logp, mask)
    assert_close(grad(s, x), s.detach() * even)
    s = sequence_ratio(x, logp, mask)
    assert (s == 1).all()
    assert torch.equal(grad(s, x), even)


@given(surrogate_arguments(), generators)
def test_an_answer_of_one_token_has_the_ratio_of_its_token(case, generator):
    """|y| = 1: s = rho, wherever in the row the token is."""
    logp, old_logp, _, _, _ = case
    column = torch.randint(logp.shape[1], (len(logp), 1), generator=generator)
    mask = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, column, True)
    assert_close(sequence_ratio(logp, old_logp, mask), importance_ratio(logp, old_logp).gather(-1, column))


@given(masked_answers(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30]))
def test_padding_has_no_part_in_the_sequence_ratio(case, poison):
    """Whatever logp and old_logp hold outside the mask, s is the same bit for bit and the gradient there is 0."""
    logp, old_logp, mask = case
    s = sequence_ratio(*case)
    for new, old in ((poison, 0.0), (0.0, poison), (poison, poison)):
        x = leaf(logp.masked_fill(~mask, new))
        poisoned = sequence_ratio(x, old_logp.masked_fill(~mask, old), mask)
        assert torch.equal(poisoned, s)
        g = grad(poisoned, x)
        assert g.isfinite().all() and (g[~mask] == 0).all()


@given(masked_answers())
def test_an_answer_said_twice_has_the_same_sequence_ratio(case):
    """s does not grow with length: all tokens twice, or once more as padding, leave it."""
    logp, old_logp, mask = case
    two = [torch.cat((x, x), dim=-1) for x in (logp, old_logp)]
    for more in (mask, torch.zeros_like(mask)):
        assert_close(sequence_ratio(*two, torch.cat((mask, more), dim=-1)), sequence_ratio(*case))


def test_the_sequence_ratio_of_a_long_answer_does_not_overflow():
    """log rho = 1 at each of 5000 tokens: s = e, though the product of the ratios is e^5000."""
    zero = torch.zeros(1, 5000)
    assert sequence_ratio(zero + 1, zero, zero == 0).item() == pytest.approx(math.e)


@settings(max_examples=10)
@given(masked_answers(), bands)
def test_the_gradients_of_ratios_and_masked_surrogates_are_their_slopes(case, band):
    """torch.autograd.gradcheck, wherever rho is off the band's ends by more than a finite difference."""
    logp, old_logp, mask = case
    ratio = (logp - old_logp).exp()
    old_logp = torch.where(torch.minimum((ratio - band[0]).abs(), (ratio - band[1]).abs()) < 1e-3, logp - 10.0, old_logp)
    assert torch.autograd.gradcheck(lambda x: sequence_ratio(x, old_logp, mask), leaf(logp))
    assert torch.autograd.gradcheck(lambda x: masked_surrogate(x, old_logp, torch.ones_like(x), *band), leaf(logp))


# ---- Preferences ----


margins = st.builds(lambda scale, generator: scale * randn(generator, 3, 4), scales, generators)


@given(margins)
def test_log_sigmoid_is_torchs(x):
    """Values and gradients equal those of torch.nn.functional.logsigmoid; the gradient is sigma(-x)."""
    a, b = leaf(x), leaf(x)
    ours, theirs = log_sigmoid(a), logsigmoid(b)
    assert_close(ours, theirs)
    assert_close(grad(ours, a), grad(theirs, b))
    assert_close(grad(log_sigmoid(a), a), torch.sigmoid(-x))
    assert_close(grad(bradley_terry(a), a), -torch.sigmoid(-x))


@settings(max_examples=10)
@given(margins)
def test_the_gradients_of_log_sigmoid_and_the_loss_of_a_preference_are_their_slopes(x):
    """torch.autograd.gradcheck, x = 0 included, where min(x, 0) and |x| alone have none."""
    x = x.flatten().clamp(-10, 10)
    x[0] = 0.0
    assert torch.autograd.gradcheck(log_sigmoid, leaf(x)) and torch.autograd.gradcheck(bradley_terry, leaf(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_log_sigmoid_is_finite_and_its_gradient_right_at_both_ends_and_at_zero(dtype):
    """x = -1e4, -0, 0, 1e4: log sigma(x) = x, -log 2, -log 2, 0 and its gradient is 1, 1/2, 1/2, 0, exactly."""
    x = torch.tensor([-1e4, -0.0, 0.0, 1e4], dtype=dtype, requires_grad=True)
    y = log_sigmoid(x)
    assert torch.equal(y, torch.tensor([-1e4, -math.log(2), -math.log(2), 0.0], dtype=y.dtype))
    assert grad(y, x).tolist() == [1.0, 0.5, 0.5, 0.0]
    assert grad(bradley_terry(x), x).tolist() == [-1.0, -0.5, -0.5, 0.0]


@given(margins)
def test_one_of_two_answers_is_preferred(r):
    """P(a > b) + P(b > a) = 1, P(a > a) = 1/2 and P(a > b) is the softmax over (r_a, r_b)."""
    a, b = r[0], r[1]
    assert_close((-bradley_terry(a - b)).exp() + (-bradley_terry(b - a)).exp(), torch.ones_like(a))
    assert_close(bradley_terry(a - b), -log_softmax(torch.stack((a, b)), 0)[0])
    assert_close(bradley_terry(a - a), torch.full_like(a, math.log(2)))


@given(margins)
def test_swapping_the_answers_of_a_preference_adds_the_margin_to_its_loss(x):
    """l(x) - l(-x) = -x: the log-odds of a preference are the margin, and so odds multiply along a chain."""
    assert_close(bradley_terry(x) - bradley_terry(-x), -x)


@given(margins, shifts)
def test_only_differences_of_rewards_matter(r, c):
    """r + c has the loss and the gradient of r, and the gradients in r_w and r_l are opposite."""
    results = []
    for shift in (0.0, c):
        w, l = leaf(r[0] + shift), leaf(r[1] + shift)
        loss = bradley_terry(w - l)
        dw, dl = grad(loss, w, l)
        assert torch.equal(dw, -dl) and (dw <= 0).all()
        results.append((loss, dw))
    for shifted, plain in zip(*results, strict=True):
        assert_close(shifted, plain, 1e-10)


@given(st.floats(-5.0, 5.0), margins)
def test_the_expected_loss_is_least_at_the_true_margin(true, x):
    """Labels with P(w > l) = sigma(d): E[l] is convex in the margin, flat at d, and nowhere lower than there."""
    p, d = 1 / (1 + math.exp(-true)), leaf(torch.tensor(true, dtype=torch.float64))

    def expected(margin):
        return p * bradley_terry(margin) + (1 - p) * bradley_terry(-margin)

    assert_close(grad(expected(d), d).item(), 0.0)
    assert (expected(x) >= expected(d.detach()) - 1e-12).all()
    assert (expected((x + x.flip(0)) / 2) <= (expected(x) + expected(x.flip(0))) / 2 + 1e-12).all()


# ---- Masks and weights ----


@given(masks(), generators, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_masked_sums_and_means_do_not_see_what_is_masked(mask, generator, poison):
    """sum_{mask} x and its mean, with gradients m and m / sum m: finite even if x is nan or inf elsewhere."""
    x = leaf(randn(generator, *mask.shape).masked_fill(~mask, poison))
    count = int(mask.sum())
    assert_close(masked_sum(x, mask), x.detach()[mask].sum())
    assert torch.equal(grad(masked_sum(x, mask), x), mask.double())
    assert_close(masked_mean(x, mask).item(), x.detach()[mask].mean().item() if count else 0.0)
    assert_close(grad(masked_mean(x, mask), x), mask.double() / max(count, 1))
    # One step before: a value that came from an infinite one must not poison it on the way back either.
    y = leaf(randn(generator, *mask.shape).masked_fill(~mask, poison))
    assert grad(masked_sum(2 * y, mask), y).isfinite().all()


def weights_of(mask, prompt_index, how):
    return token_weights(mask, prompt_index, how, max_new_tokens=20).double()


@given(masked_prompts())
def test_token_mean_weighs_every_token_alike(case):
    """w = 1/N: sum w = 1."""
    mask, _ = case
    w = weights_of(*case, "token_mean")
    assert_close(w, mask.double() / max(int(mask.sum()), 1), 1e-7)


@given(masked_prompts())
def test_sequence_mean_weighs_every_answer_alike(case):
    """Each row with a token has sum_t w_bt = 1/R, its tokens alike."""
    mask, _ = case
    w, counted = weights_of(*case, "sequence_mean"), mask.any(-1)
    for row, m in zip(w[counted], mask[counted], strict=True):
        assert_close(row[m], torch.full((int(m.sum()),), 1 / int(counted.sum()) / int(m.sum()), dtype=w.dtype), 1e-7)


@given(masked_prompts())
def test_prompt_mean_weighs_every_prompt_alike(case):
    """Each prompt with a token has a total weight of 1/P, its tokens alike over all its rows."""
    mask, prompt_index = case
    w, prompts = weights_of(*case, "prompt_mean"), prompt_index[mask.any(-1)].unique()
    for p in prompts:
        tokens = w[prompt_index == p][mask[prompt_index == p]]
        assert_close(tokens, torch.full((len(tokens),), 1 / len(prompts) / len(tokens), dtype=w.dtype), 1e-7)


@given(masked_prompts())
def test_sequence_sum_and_constant_add_up_an_answers_tokens(case):
    """sequence_sum: w = 1/R. constant: w = 1/(R L_max), so that a row weighs its length over the longest allowed."""
    mask, _ = case
    R = max(int(mask.any(-1).sum()), 1)
    assert_close(weights_of(*case, "sequence_sum"), mask.double() / R, 1e-7)
    assert_close(weights_of(*case, "constant").sum(-1), mask.sum(-1).double() / (R * 20), 1e-6)
    assert_close(weights_of(*case, "constant") * 20, weights_of(*case, "sequence_sum"), 1e-7)


@pytest.mark.parametrize("how", AGGREGATES)
@given(masked_prompts())
def test_masked_tokens_weigh_nothing_and_an_empty_step_is_no_error(how, case):
    """w = 0 where the mask is False, finite even where nothing counts; the result is float32."""
    mask, prompt_index = case
    for m in (mask, torch.zeros_like(mask)):
        w = token_weights(m, prompt_index, how, 20)
        assert w.dtype == torch.float32 and w.isfinite().all() and (w[~m] == 0).all() and (w[m] > 0).all()


@pytest.mark.parametrize("how", AGGREGATES)
@given(masked_prompts(), st.booleans(), st.integers(1, 3))
def test_a_fully_masked_row_counts_nowhere(how, case, known_prompt, count):
    """Adding rows without a True, of a known prompt or a new one, changes no weight in any mode."""
    mask, prompt_index = case
    label = prompt_index[:1] if known_prompt else torch.tensor([1000])
    longer = torch.cat((mask.new_zeros(count, mask.shape[1]), mask))
    w = token_weights(longer, torch.cat((label.expand(count), prompt_index)), how, 20)
    assert torch.equal(w, torch.cat((torch.zeros(count, mask.shape[1]), token_weights(mask, prompt_index, how, 20))))


@pytest.mark.parametrize("how", AGGREGATES)
@given(masked_prompts(), st.booleans())
def test_a_batch_given_twice_weighs_half_each(how, case, same_prompts):
    """So the loss of a duplicated batch is that of the batch, whether its prompts count as the same ones or not."""
    mask, prompt_index = case
    labels = torch.cat((prompt_index, prompt_index if same_prompts else prompt_index + 1000))
    w = weights_of(mask, prompt_index, how)
    assert_close(weights_of(torch.cat((mask, mask)), labels, how), torch.cat((w, w)) / 2, 1e-7)


@pytest.mark.parametrize("how", AGGREGATES)
@given(masked_prompts(), generators)
def test_prompt_labels_are_only_names_and_rows_have_no_order(how, case, generator):
    """Any one-to-one renaming of the prompts leaves the weights; reordering the rows reorders them. Bit for bit."""
    mask, prompt_index = case
    w, order = token_weights(mask, prompt_index, how, 20), torch.randperm(len(mask), generator=generator)
    assert torch.equal(token_weights(mask, 7 - 3 * prompt_index, how, 20), w)
    assert torch.equal(token_weights(mask[order], prompt_index[order], how, 20), w[order])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 3))
def test_with_equal_lengths_all_modes_agree_up_to_a_constant(P, G, L, padding):
    """|y| = L, G answers a prompt: the three means are 1/(RL), sequence_sum is L and constant L/L_max times that."""
    mask = torch.cat((torch.ones(P * G, L, dtype=torch.bool), torch.zeros(P * G, padding, dtype=torch.bool)), dim=1)
    expected = mask.double() / (P * G * L)
    for how, constant in zip(AGGREGATES, (1, 1, 1, L, L / 20), strict=True):
        assert_close(weights_of(mask, torch.arange(P).repeat_interleave(G), how), constant * expected, 1e-6)


def test_token_weights_refuse_what_they_do_not_know():
    """One sentence that names the value and what was expected."""
    mask, prompt_index = torch.ones(2, 3, dtype=torch.bool), torch.arange(2)
    with pytest.raises(ValueError, match="'mean' is none of token_mean, "):
        token_weights(mask, prompt_index, "mean")
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        token_weights(mask, prompt_index, "constant")


# ---- All of them ----

X = torch.tensor([[0.5, -1.0, 2.0, -torch.inf], [0.0, 0.0, 1e4, 3.0]])
CONSTANTS = {"ids": torch.tensor([2, 0]), "old_logp": -X.clamp(0, 1), "adv": torch.tensor([[1.0], [-0.5]]),
             "mask": X > 0, "run": X.abs() < 2.5, "verdicts": X.clamp(0, 1), "prompt_index": torch.tensor([5, -1])}
INPUTS = CONSTANTS | {"logits": X, "others": X.flip(0).clamp(min=-5), "hidden": X.clamp(-3, 3)[:, :3],
                      "weight": X.clamp(-2, 2).T[:, [0, 1, 0]], "logp": -X.clamp(0, 2), "rewards": X.clamp(0, 1)}
CALLS = [(logsumexp, "logits"), (log_softmax, "logits"), (selective_log_softmax, "logits ids"),
         (entropy_from_logits, "logits"), (lambda z: entropy_from_logits(z, 1), "logits"),
         (linear_log_probs, "hidden weight ids"), (kl_divergence, "others logits"),
         *((k, "logp old_logp") for k in (kl_k1, kl_k2, kl_k3)), *((f, "rewards") for f in ADVANTAGES),
         *((lambda r, valid, f=f: f(r, valid=valid), "rewards mask") for f in ADVANTAGES),
         (lambda r, V, mask, b: gae(r, V, mask, 0.9, 0.8, b[:, 0]), "verdicts old_logp run adv"),
         (importance_ratio, "logp old_logp"), (sequence_ratio, "logp old_logp mask"),
         *((lambda *x, f=f: f(*x, *SURROGATES[f]), "logp old_logp adv") for f in SURROGATES),
         (log_sigmoid, "logits"), (bradley_terry, "logits"), (whiten, "rewards mask"),
         (lambda v, old, R: clipped_value_loss(v, old, R, 0.2), "rewards verdicts old_logp"),
         (masked_sum, "logits mask"), (masked_mean, "logits mask"),
         *((lambda *x, how=how: token_weights(*x, how, 20), "mask prompt_index") for how in AGGREGATES)]


@pytest.mark.parametrize(("f", "names"), CALLS)
def test_nothing_is_written_into_an_argument(f, names):
    """Forward and backward leave every input bit-equal, and not even write the same bits again."""
    inputs = {name: INPUTS[name].clone().requires_grad_(name not in CONSTANTS) for name in names.split()}
    versions = [x._version for x in inputs.values()]
    out = f(*inputs.values())
    total = sum(y.sum() for y in out) if isinstance(out, tuple) else out.sum()
    if total.requires_grad:
        total.backward()
    assert [x._version for x in inputs.values()] == versions
    assert all(torch.equal(x, INPUTS[name]) for name, x in inputs.items())


@pytest.mark.parametrize("f", ADVANTAGES)
def test_whole_number_rewards_are_numbers_like_others(f):
    """Rewards counted as integers give the advantages of the same floats, not truncated ones."""
    r = torch.tensor([[1, 0, 0], [2, 2, 5]])
    assert_close(f(r), f(r.float()))
    assert f(r).dtype == torch.float32


@given(scored_logits(), st.integers(-10_000, 10_000))
def test_large_logits_lose_no_digits(case, shift):
    """log softmax(z + c) = log softmax(z) in float32 as well as z + c itself can be written down; that of one token, too."""
    z, ids = case[0].float() + shift, case[1]
    exact = torch.log_softmax(z.double(), -1)
    tol = 2e-6 * (1 + float(exact.abs().max()))
    assert_close(log_softmax(z).double(), exact, tol)
    assert_close(selective_log_softmax(z, ids).double(), exact.gather(-1, ids[:, None]).squeeze(-1), tol)
