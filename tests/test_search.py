"""Best-of-n: its estimate is an average over all subsets, and obeys the laws of the largest of n draws."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rollout import HOW, MODEL, TOKENIZER, Parity, scorer

from nanorl.checks import generators, randn
from nanorl.search import best_of_n, best_of_n_curve, best_of_n_kl


@st.composite
def scored_answers(draw, ties=True):
    """scores and values [P, N], with ties among the scores or without."""
    P, N, g = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(generators)
    scores = torch.randint(3, (P, N), generator=g).double() if ties else torch.argsort(randn(g, P, N), -1).double()
    return scores, randn(g, P, N)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.math
@given(scored_answers() | scored_answers(ties=False), st.data())
def test_best_of_n_is_the_mean_over_all_choices_of_n_answers(case, data):
    """Each choice counts its best-scored answer, or, where several are best, their mean."""
    scores, values = case
    n = data.draw(st.integers(1, scores.shape[1]))
    for s, v, found in zip(scores.tolist(), values.tolist(), best_of_n(scores, values, n), strict=True):
        winners = [[v[i] for i in subset if s[i] == max(s[j] for j in subset)] for subset in combinations(range(len(s)), n)]
        assert_close(found, sum(sum(best) / len(best) for best in winners) / len(winners))


@pytest.mark.math
@given(scored_answers())
def test_one_answer_is_a_mean_and_all_answers_are_their_best(case):
    scores, values = case
    assert_close(best_of_n(scores, values, 1), values.mean(-1))
    assert_close(best_of_n(scores, scores, scores.shape[1]), scores.amax(-1))


@pytest.mark.math
@given(scored_answers())
def test_by_its_own_score_the_best_of_more_is_never_worse(case):
    values = case[1]
    curve = torch.stack([best_of_n(values, values, n) for n in range(1, values.shape[1] + 1)])
    assert (curve.diff(dim=0) >= -1e-12).all()


@pytest.mark.math
@given(scored_answers(), st.integers(1, 7))
def test_only_the_order_of_the_scores_matters(case, n):
    scores, values = case
    n = min(n, scores.shape[1])
    assert torch.equal(best_of_n(scores, values, n), best_of_n((3 * scores - 1).exp(), values, n))


@pytest.mark.math
@pytest.mark.parametrize(("right", "total"), [(0, 5), (1, 5), (3, 8), (8, 8)])
def test_with_a_verifier_it_is_pass_at_n(right, total):
    """1 - C(N-c, n) / C(N, n) of c right answers among N."""
    verdicts = (torch.arange(total)[None] < right).double()
    for n in range(1, total + 1):
        expected = 1 - math.comb(total - right, n) / math.comb(total, n)
        assert_close(best_of_n(verdicts, verdicts, n), [expected])


@pytest.mark.math
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_divergence_of_best_of_n_stays_below_its_bound(n):
    """The best of n by any order of V answers: p_i = F_i^n - F_{i-1}^n; reached as V grows, 0 for n = 1."""
    for V, tolerance in ((3, math.inf), (20_000, 0.02)):
        F = torch.arange(V + 1, dtype=torch.float64) / V
        p = (F**n).diff()
        kl = float((p * (p * V).log()).sum())
        assert -1e-9 <= kl <= best_of_n_kl(n) + 1e-9 and best_of_n_kl(n) - kl < tolerance


def test_an_impossible_n_is_one_sentence():
    scores = torch.zeros(2, 3)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n={n}; expected 1 to 3"):
            best_of_n(scores, scores, n)


@pytest.mark.parametrize("reward_model", [None, scorer()], ids=["task", "model"])
def test_the_best_of_samples_on_heldout_problems(reward_model):
    """1 is the mean, doubling up to the number of samples; chosen by the task itself it never falls."""
    found = best_of_n_curve(MODEL, TOKENIZER, Parity(), samples=6, problems=10, seed=3, reward_model=reward_model, **HOW)
    assert list(found) == [1, 2, 4, 6] and all(0 <= value <= 1 for value in found.values())
    if reward_model is None:
        assert list(found.values()) == sorted(found.values()) and found[6] > found[1]
