"""The sigmoid of reward against compute: it finds planted curves, and its intervals know what the data cannot say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorl.run import generator
from nanorl.scaling import fit, line, quantile_of_t, saturation
from nanorl.tabular import randn

pytestmark = pytest.mark.math


def planted(compute, floor, ceiling, midpoint, steepness):
    """R0 + (A - R0) / (1 + (C_mid / C)^B), written out."""
    return floor + (ceiling - floor) / (1 + (midpoint / compute)**steepness)


def test_saturation_is_a_logistic_curve_in_log_compute():
    """0 without compute, 1/2 at C_mid, 1 in the limit; and C -> kC, C_mid -> kC_mid changes nothing."""
    compute, midpoint, steepness = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 3.0, 7.0, torch.inf], [7.0], [2.0]))
    s = saturation(compute, midpoint, steepness)[0]
    assert s[0] == 0 and s[3] == 1
    torch.testing.assert_close(s[1:3], torch.tensor([1 / (1 + (7 / 3)**2), 0.5]).double())
    torch.testing.assert_close(saturation(5 * compute, 5 * midpoint, steepness)[0], s)


@given(st.floats(0.0, 0.4), st.floats(0.5, 2.0), st.floats(0.1, 0.9), st.floats(0.7, 5.0))
def test_a_curve_without_noise_is_recovered(floor, rise, where, steepness):
    compute = torch.linspace(0, 1e5, 30, dtype=torch.float64)
    fitted = fit(compute, planted(compute, floor, floor + rise, where * 1e5, steepness))
    found = (fitted.predict(0.0)[0], fitted.predict(torch.inf)[0], fitted.interval(fitted.midpoint)[0] / 1e5,
             fitted.interval(fitted.steepness)[0])
    assert found == pytest.approx((floor, floor + rise, where, steepness), rel=1e-4, abs=1e-4)
    assert fitted.reaches_the_bend


def test_the_intervals_cover_the_truth_as_often_as_they_say():
    """100 noisy curves: each 95 % interval holds its parameter in 90 to 100 % of them, and they are not wide for nothing."""
    truth, g, hits, widths = (0.2, 0.9, 300.0, 2.0), generator(0, "coverage"), torch.zeros(4), []
    compute = torch.linspace(0, 1000, 40, dtype=torch.float64)
    for _ in range(100):
        fitted = fit(compute, planted(compute, *truth) + 0.03 * randn(g, 40))
        intervals = (fitted.predict(0.0), fitted.predict(torch.inf), fitted.interval(fitted.midpoint),
                     fitted.interval(fitted.steepness))
        hits += torch.tensor([low <= value <= high for value, (_, low, high) in zip(truth, intervals, strict=True)])
        widths.append(intervals[1][2] - intervals[1][1])
    assert (hits >= 90).all(), hits
    assert sorted(widths)[50] < 0.2


def test_an_end_of_the_ceiling_s_interval_is_where_the_best_fit_has_become_too_bad():
    """With A held there, the smallest sum of squares over R0, C_mid and B is what an interval allows."""
    compute, g = torch.linspace(0, 1000, 40, dtype=torch.float64), generator(0, "profile")
    reward = planted(compute, 0.2, 0.9, 300.0, 2.0) + 0.03 * randn(g, 40)
    fitted = fit(compute, reward)
    for A in fitted.predict(torch.inf)[1:]:
        midpoint, steepness = torch.cartesian_prod(torch.linspace(200, 500, 300), torch.linspace(1, 4, 300)).double().T
        rest = 1 - saturation(compute, midpoint, steepness)                                 # R - A = (R0 - A) rest
        start = ((reward - A) * rest).sum(-1) / rest.square().sum(-1)
        squares = (reward - A - start[:, None] * rest).square().sum(-1)
        assert float(squares.min()) == pytest.approx(fitted.most, rel=1e-2)


def test_before_the_bend_the_ceiling_is_open():
    """A quarter of the way to C_mid nobody knows the ceiling; that it is above what was seen is all there is to say."""
    compute, g = torch.linspace(0, 75, 20, dtype=torch.float64), generator(0, "early")
    fitted = fit(compute, planted(compute, 0.2, 0.9, 300.0, 2.0) + 0.01 * randn(g, 20))
    assert not fitted.reaches_the_bend and fitted.open_above
    _, low, high = fitted.predict(torch.inf)
    assert low < 0.9 and high == torch.inf


@given(st.floats(0.02, 30.0), st.floats(0.7, 3.7), st.sampled_from([1e-4, 1e-3, 1e-2]), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_no_planted_curve_fits_better_than_the_one_that_is_found(midpoint, steepness, noise, seed):
    """Also where the data end long before the bend, and sigmoids of all kinds are nearly the same there."""
    compute = torch.linspace(0, 1000, 40, dtype=torch.float64)
    reward = planted(compute, 0.2, 0.9, 1000 * midpoint, steepness)
    reward = reward + noise * (reward[-1] - reward[0]) * randn(generator(seed, "best"), 40)
    fitted = fit(compute, reward)
    s = saturation(compute, torch.tensor([1000 * midpoint]).double(), torch.tensor([steepness]).double())
    middle, slope, _ = line(s, reward)
    truth = float((reward - reward.mean() - slope * (s - middle)).square().sum())
    assert float(fitted.squares.min()) <= truth * (1 + 1e-6) and bool((fitted.squares <= fitted.most * (1 + 1e-6)).all())


def test_before_the_bend_the_intervals_cover_the_truth_too():
    """C_mid at ten times the last point; an interval is open, or as honest as it says."""
    g, hits, compute = generator(0, "before"), 0, torch.linspace(0, 1000, 60, dtype=torch.float64)
    clean = planted(compute, 0.2, 0.9, 1e4, 2.4)
    for _ in range(40):
        _, low, high = fit(compute, clean + 1e-3 * (clean[-1] - clean[0]) * randn(g, 60)).predict(torch.inf)
        hits += low <= 0.9 <= high
    assert hits >= 36


def test_falling_rewards_have_an_open_floor_instead():
    """Where the curve falls, what is not known is how far down it goes."""
    compute = torch.linspace(0, 1000, 40, dtype=torch.float64)
    fitted = fit(compute, 1 - compute / 4000 + 0.01 * randn(generator(0, "falling"), 40))
    _, low, high = fitted.predict(torch.inf)
    assert low == -torch.inf and high < 1


def test_student_s_quantiles():
    """Against the tables."""
    for freedom, value in ((1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)):
        assert quantile_of_t(freedom) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(("compute", "reward", "words"), [
    (range(5), range(5), "5 points are too few"),
    ([0] * 9, range(9), "nothing to fit"),
    (range(9), [0.5] * 9, "nothing to fit"),
])
def test_what_cannot_be_fitted_is_one_sentence(compute, reward, words):
    with pytest.raises(ValueError, match=words):
        fit(torch.tensor([*compute]), torch.tensor([*reward]))
