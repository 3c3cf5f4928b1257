"""Theorems about the objectives of train_reward.py, train_dpo.py and train_group_dpo.py.

Expectations are exact: a policy over V answers is one row of logits, and a loss over all pairs of answers weighs each by its
probability under Bradley-Terry.
"""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import policies
from torch import Tensor

import train_dpo
import train_group_dpo
import train_reward
from nanorl.checks.cases import generators, partition
from nanorl.ops import bradley_terry, log_softmax, ranked_right
from nanorl.pairs import agreement, calibration_error, length_margins, pair_rollout, reference_point, word_margins
from nanorl.tabular import leaf, randn

pytestmark = pytest.mark.math

LOG2 = math.log(2)
WITH_REFERENCE = ("dpo", "cdpo", "ipo")
betas = st.sampled_from([0.1, 0.5, 1.0, 3.0])
counts = st.integers(1, 6)


def assert_close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64).expand_as(actual), rtol=tol, atol=tol)


def pairs(g, N):
    """chosen, rejected, ref_chosen, ref_rejected: log-probs of whole answers [N]; their lengths [N]."""
    return (*(-3 * randn(g, N).abs() for _ in range(4)), *(torch.randint(1, 9, (N,), generator=g) for _ in "wl"))


def grad(y: Tensor, *xs: Tensor):
    gradients = torch.autograd.grad(y.sum(), xs, materialize_grads=True)
    return gradients[0] if len(xs) == 1 else gradients


# ---- The reward model ----


@given(counts, generators)
def test_the_reward_models_loss_is_the_likelihood_of_the_choices(N, g):
    """sum_n w_n -log sigma(r_w - r_l), log 2 for a model that says nothing; metrics are its weighted means."""
    w, l, weights = randn(g, N), randn(g, N), torch.full((N,), 1 / N, dtype=torch.float64)
    loss, metrics = train_reward.objective(w, l, weights)
    assert_close(loss, sum(math.log(1 + math.exp(b - a)) for a, b in zip(w.tolist(), l.tolist(), strict=True)) / N)
    assert_close(metrics["train/loss"], loss)
    assert_close(metrics["train/margin"], (w - l).mean())
    assert metrics["train/accuracy"].item() == pytest.approx(sum(a > b for a, b in zip(w, l, strict=True)) / N)
    assert_close(train_reward.objective(w, w, weights)[0], LOG2)


@given(st.integers(2, 6), generators, st.floats(-3, 3))
def test_a_reward_model_learns_rewards_up_to_a_constant(V, g, c):
    """On all pairs, labelled by Bradley-Terry: the loss is stationary at the true rewards plus any constant, and not
    elsewhere."""
    true = randn(g, V)
    i, j = torch.cartesian_prod(torch.arange(V), torch.arange(V)).T
    weights = torch.sigmoid(true[i] - true[j]) / V**2

    def slope(rewards):
        r = leaf(rewards)
        return grad(train_reward.objective(r[i], r[j], weights)[0], r)

    assert_close(slope(true + c), 0.0)
    assert slope(true * 2).abs().max() > 1e-6


@given(st.integers(2, 6), generators, generators)
def test_pairs_in_parts_add_up(N, g, parts):
    """Loss and metrics of a batch are the sums of its micro-batches', for the reward model and for every loss of DPO."""
    case, weights = pairs(g, N), torch.full((N,), 1 / N, dtype=torch.float64)
    for f in (lambda rows: train_reward.objective(case[0][rows], case[1][rows], weights[rows]),
              *(lambda rows, loss=loss: train_dpo.objective(*(x[rows] for x in case), weights[rows], loss=loss, nll_coef=0.1)
                for loss in train_dpo.LOSSES)):
        whole, metrics = f(torch.arange(N))
        split = [f(rows) for rows in partition(parts, N)]
        assert_close(sum(loss for loss, _ in split), whole)
        for name in metrics:
            assert float(sum(m[name] for _, m in split)) == pytest.approx(float(metrics[name]), abs=1e-6)


def test_ties_are_half_right():
    assert ranked_right(torch.tensor([1.0, -1.0, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_agreement_is_counted_against_labels_against_the_hidden_reward_and_against_its_clear_cases():
    """Where labels err (a negative hidden margin), agreeing with them is disagreeing with the hidden reward; its ties are left
    out, and what differs by a label temperature or less is not clear."""
    margin, hidden = torch.tensor([1.0, -1.0, -1.0, 2.0, -2.0]), torch.tensor([1.0, -1.0, 3.0, 0.0, -2.0])
    assert agreement("x", margin, hidden) == {
        "eval/agreement_x_labels": pytest.approx(2 / 5), "eval/agreement_x_hidden": 3 / 4, "eval/agreement_x_clear": 1 / 2}
    assert agreement("x", margin) == {"eval/agreement_x_labels": pytest.approx(2 / 5)}


def test_calibration_is_exact_when_confidence_is_accuracy():
    """Confidence sigma(log 3) = 3/4: right three times in four it is calibrated, always right it is off by 1/4."""
    m = math.log(3)
    assert calibration_error(torch.tensor([m, m, m, -m])) == pytest.approx(0.0, abs=1e-6)
    assert calibration_error(torch.tensor([m, m, m, m])) == pytest.approx(0.25)
    assert calibration_error(torch.tensor([100.0, 100.0, m, -m])) == pytest.approx(0.125)


def test_the_baselines_find_what_they_can_see_and_nothing_else():
    """Length and words are enough where they decide; where only the order of words does, they are at a loss."""
    words = ["red", "green", "blue", "white"]
    ordered = [{"prompt": "", "chosen": f"{a} {b}", "rejected": f"{b} {a}"} for a in words for b in words if a != b]
    assert set(word_margins(ordered * 5, ordered).tolist()) == {0.0}
    assert set(length_margins(ordered, ordered).tolist()) == {0.0}
    planted = [{"prompt": "", "chosen": f"{a} good", "rejected": f"{b} bad"} for a in words for b in words]
    assert (word_margins(planted, planted) > 0).all()
    shorter = [{"prompt": "", "chosen": a, "rejected": a + b} for a in words for b in words]
    assert (length_margins(shorter, shorter) > 0).all()


# ---- DPO ----


def dpo(case, **options):
    """The mean loss, its metrics, and its gradients in the log-probs of chosen and rejected, times N."""
    N = len(case[0])
    chosen, rejected = leaf(case[0]), leaf(case[1])
    loss, metrics = train_dpo.objective(chosen, rejected, *case[2:], torch.full((N,), 1 / N, dtype=torch.float64), **options)
    return loss.detach(), metrics, [N * d for d in grad(loss, chosen, rejected)]


@given(counts, generators, betas, st.floats(0, 0.5), st.floats(0, 3), st.sampled_from([0.0, 0.3]))
def test_each_loss_is_its_row_of_the_table(N, g, beta, noise, target, nll):
    case = pairs(g, N)
    expected = dict.fromkeys(train_dpo.LOSSES, 0.0)
    for w, l, ref_w, ref_l, n_w, n_l in zip(*(x.tolist() for x in case), strict=True):
        def log_sigma(x):
            return -math.log(1 + math.exp(-x))

        h = beta * ((w - ref_w) - (l - ref_l))
        z = beta * 0.5 * target
        alone = 2 - math.exp(log_sigma(beta * (w - ref_w) - z)) - math.exp(log_sigma(z - beta * (l - ref_l)))
        for name, f in {"dpo": -log_sigma(h), "kto": alone / 2, "cdpo": -(1 - noise) * log_sigma(h) - noise * log_sigma(-h),
                        "ipo": ((w - ref_w) / n_w - (l - ref_l) / n_l - 1 / (2 * beta)) ** 2, "slic": max(0.0, target - w + l),
                        "simpo": -log_sigma(beta * w / n_w - beta * l / n_l - target)}.items():
            expected[name] += (f - nll * w / n_w) / N
    for name, value in expected.items():
        loss, metrics, _ = dpo(case, loss=name, beta=beta, label_noise=noise, delta=target, gamma=target, nll_coef=nll,
                               reference_point=0.5 * target)
        assert_close(loss, value, 1e-9)
        assert_close(metrics["train/margin"], metrics["train/chosen_reward"] - metrics["train/rejected_reward"])
        assert metrics["train/chosen_logp"] == pytest.approx(float(case[0].mean()))


@given(counts, generators, betas)
def test_at_the_reference_the_loss_is_log_2_and_the_margin_0(N, g, beta):
    chosen, rejected, *_, n_w, n_l = pairs(g, N)
    for name, start in (("dpo", LOG2), ("cdpo", LOG2), ("ipo", 1 / (2 * beta) ** 2)):
        loss, metrics, _ = dpo((chosen, rejected, chosen, rejected, n_w, n_l), loss=name, beta=beta, label_noise=0.2)
        assert_close(loss, start)
        assert metrics["train/margin"] == 0


@given(counts, generators, betas)
def test_the_gradient_of_dpo_is_weighted_by_how_wrong_the_order_is(N, g, beta):
    """-beta sigma(-m) in the chosen log-prob and the opposite in the rejected one: half at a tie, all of it where the order is
    badly wrong. It is sigma(-m), not sigma'(m), which would vanish there."""
    case = pairs(g, N)
    margin = beta * ((case[0] - case[2]) - (case[1] - case[3]))
    _, _, (dw, dl) = dpo(case, beta=beta)
    assert_close(dw, -beta * torch.sigmoid(-margin))
    assert_close(dl, beta * torch.sigmoid(-margin))
    badly_wrong = torch.tensor([-1e3 / beta], dtype=torch.float64), *torch.zeros(3, 1).double(), *torch.ones(2, 1).long()
    assert_close(dpo(badly_wrong, beta=beta)[2][0], -beta)


@given(counts, generators, betas, generators)
def test_what_depends_on_the_prompt_alone_cancels(N, g, beta, shifts):
    """c(x) on both rewards is beta c(x) on both implicit rewards, as beta log Z(x) is: no loss with a reference sees it."""
    chosen, rejected, ref_w, ref_l, length, _ = pairs(g, N)       # ipo's means cancel it only where lengths agree
    c = randn(shifts, N)
    for name in WITH_REFERENCE:
        for a, b in zip(dpo((chosen, rejected, ref_w, ref_l, length, length), loss=name, beta=beta)[2],
                        dpo((chosen, rejected, ref_w - c, ref_l - c, length, length), loss=name, beta=beta)[2], strict=True):
            assert_close(a, b, 1e-9)


@given(counts, generators, betas)
def test_swapping_the_labels_flips_the_margin(N, g, beta):
    """l(m) - l(-m) = -m for dpo; cdpo with half its labels wrong does not care."""
    w, l, ref_w, ref_l, n_w, n_l = case = pairs(g, N)
    swapped = (l, w, ref_l, ref_w, n_l, n_w)
    margin = beta * ((w - ref_w) - (l - ref_l))
    assert_close(dpo(case, beta=beta)[0] - dpo(swapped, beta=beta)[0], -margin.mean())
    half = {"loss": "cdpo", "beta": beta, "label_noise": 0.5}
    assert_close(dpo(case, **half)[0], dpo(swapped, **half)[0])
    assert_close(dpo(case, loss="cdpo", beta=beta, label_noise=0.0)[0], dpo(case, beta=beta)[0])


@given(counts, generators, st.floats(0.05, 0.5))
def test_cdpo_is_content_with_the_odds_of_its_labels(N, g, noise):
    """Labels that are wrong with probability e: the gradient is zero at the margin log((1-e)/e), and drives towards it."""
    _, rejected, ref_w, ref_l, n_w, n_l = pairs(g, N)
    goal = math.log((1 - noise) / noise)
    at_goal = rejected + ref_w - ref_l + goal
    for offset, sign in ((0.0, 0), (1.0, 1), (-1.0, -1)):
        dw, _ = dpo((at_goal + offset, rejected, ref_w, ref_l, n_w, n_l), loss="cdpo", beta=1.0, label_noise=noise)[2]
        assert torch.equal(dw.sign().masked_fill(dw.abs() < 1e-12, 0.0), torch.full_like(dw, sign))


@given(counts, generators, betas)
def test_ipo_is_content_at_a_margin_of_one_over_two_beta_per_token_whatever_the_lengths(N, g, beta):
    _, rejected, ref_w, ref_l, n_w, n_l = pairs(g, N)
    chosen = ref_w + n_w * ((rejected - ref_l) / n_l + 1 / (2 * beta))
    loss, _, gradients = dpo((chosen, rejected, ref_w, ref_l, n_w, n_l), loss="ipo", beta=beta)
    assert_close(loss, 0.0, 1e-8)
    for d in gradients:
        assert_close(d, 0.0, 1e-8)


@given(counts, generators, betas, st.integers(2, 4))
def test_simpo_and_ipo_see_means_and_the_others_sums(N, g, beta, times):
    """An answer said `times` over, log-probs and lengths multiplied, is the same to simpo and ipo; to dpo and cdpo it is as if
    beta were `times` as large, and slic's margin grows with it."""
    case = pairs(g, N)
    longer = tuple(times * x for x in case)
    for name in ("simpo", "ipo"):
        assert_close(dpo(longer, loss=name, beta=beta)[0], dpo(case, loss=name, beta=beta)[0], 1e-9)
    for name in ("dpo", "cdpo"):
        assert_close(dpo(longer, loss=name, beta=beta)[0], dpo(case, loss=name, beta=times * beta)[0], 1e-9)
    assert_close(dpo(longer, loss="slic", delta=times * 2.0)[0], times * dpo(case, loss="slic", delta=2.0)[0], 1e-9)


@given(counts, generators)
def test_slic_and_simpo_have_no_reference(N, g):
    case = pairs(g, N)
    for name in train_dpo.REFERENCE_FREE:
        other = (*case[:2], case[2] + 5, case[3] - 7, *case[4:])
        assert torch.equal(dpo(case, loss=name)[0], dpo(other, loss=name)[0])


@given(counts, generators)
def test_slic_stops_at_its_margin(N, g):
    """Below delta the slope is 1, beyond it 0, and 0 at delta itself."""
    _, rejected, *rest = pairs(g, N)
    for margin, slope in ((0.5, -1.0), (1.5, 0.0)):
        assert_close(dpo((rejected + margin, rejected, *rest), loss="slic", delta=1.0)[2][0], slope)
    zero = torch.zeros(1, dtype=torch.float64)
    assert_close(dpo((zero + 1.0, zero, zero, zero, zero + 1, zero + 1), loss="slic", delta=1.0)[2][0], 0.0)


def test_a_single_pair_has_no_other_prompt_to_compare_with():
    """Its responses after their own prompt are no reference point: with log(pi/ref) = 5 everywhere, two pairs have 5."""
    rollout, rows = pair_rollout([[1], [2]], [[3], [4]], [[5], [6]], [0, 1], 0)
    values = [reference_point(lambda r: torch.full((len(r.lengths),), 5.0), rollout, rows[:n], 8, 4) for n in (0, 1, 2)]
    assert values == [0, 0, 5]


@given(counts, generators, betas, st.floats(0, 3))
def test_kto_judges_each_response_alone_and_pushes_most_at_its_reference_point(N, g, beta, z):
    """The rejected response does not enter the chosen one's gradient; both are beta/8 where log(pi/ref) = z, less
    elsewhere."""
    chosen, rejected, ref_w, ref_l, *lengths = pairs(g, N)
    kto = {"loss": "kto", "beta": beta, "reference_point": z}
    dw, dl = dpo((chosen, rejected, ref_w, ref_l, *lengths), **kto)[2]
    assert_close(dpo((chosen, rejected - 3, ref_w, ref_l, *lengths), **kto)[2][0], dw)
    assert_close(dpo((chosen - 3, rejected, ref_w, ref_l, *lengths), **kto)[2][1], dl)
    assert (-beta / 8 <= dw).all() and (dw < 0).all() and (dl > 0).all() and (dl <= beta / 8).all()
    top_w, top_l = dpo((ref_w + z, ref_l + z, ref_w, ref_l, *lengths), **kto)[2]
    assert_close(top_w, -beta / 8)
    assert_close(top_l, beta / 8)


@given(counts, generators)
def test_the_nll_term_holds_the_chosen_answer_up_and_touches_nothing_else(N, g):
    case = pairs(g, N)
    for name in train_dpo.LOSSES:
        (dw, dl), (nw, nl) = (dpo(case, loss=name, nll_coef=c)[2] for c in (0.0, 0.7))
        assert_close(nw - dw, -0.7 / case[4].double())
        assert torch.equal(nl, dl)


def population(V, ref, rewards, beta):
    """DPO's loss over all pairs of V answers, each labelled as Bradley-Terry does, as a function of the policy's logits."""
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))
    weights, n = torch.sigmoid(rewards[i] - rewards[j]) / V**2, torch.ones(V * V)

    def loss(logits):
        logp, ref_logp = log_softmax(logits), log_softmax(ref)
        return train_dpo.objective(logp[i], logp[j], ref_logp[i], ref_logp[j], n, n, weights, beta=beta)[0]

    return loss


@given(policies(count=2, T=(1, 1)), generators, betas)
def test_on_exact_labels_dpo_ends_where_rl_with_a_leash_does(pair, g, beta):
    """Its population loss is stationary at pi* = ref e^{r / beta} / Z and nowhere lower."""
    ref, other = (table[0] for table in pair)
    r = randn(g, len(ref))
    loss, best = population(len(ref), ref, r, beta), leaf(ref + r / beta)
    assert_close(grad(loss(best), best), 0.0)
    assert loss(other) >= loss(best).detach() - 1e-12


@given(policies(T=(1, 1)), generators, st.integers(1, 4))
def test_each_refreshed_reference_lengthens_the_leash(ref, g, K):
    """Solved K times, with the solution as the next reference: ref e^{K r / beta}, as with a leash of beta / K."""
    beta, r, reference = 1.0, randn(g, ref.shape[-1]), ref[0]
    for _ in range(K):
        solution = leaf(reference + r / beta)
        assert_close(grad(population(len(r), reference, r, beta)(solution), solution), 0.0)
        reference = solution.detach()
    assert_close(log_softmax(reference), log_softmax(ref[0] + K * r / beta))


@given(generators, betas)
def test_only_the_margin_is_driven(g, beta):
    """Both log-probs may fall together: a common shift changes neither loss nor gradient."""
    case = pairs(g, 4)
    fallen = (case[0] - 3, case[1] - 3, *case[2:])
    for a, b in zip(dpo(case, beta=beta)[2], dpo(fallen, beta=beta)[2], strict=True):
        assert_close(a, b, 1e-9)


def test_a_reference_must_arrive_detached():
    case = pairs(torch.Generator().manual_seed(0), 2)
    for k in (2, 3):
        with pytest.raises(AssertionError, match="detach"):
            train_dpo.objective(*(leaf(x) if i == k else x for i, x in enumerate(case)), torch.ones(2))


def test_of_two_answers_the_better_is_chosen_and_ties_are_left_out():
    """Answers to prompt p stand in rows 2p and 2p+1."""
    pairs = train_dpo.judged_pairs(torch.tensor([[1.0, 0.0], [2.0, 2.0], [-1.0, 3.0], [0.0, -1.0]]))
    assert pairs.tolist() == [[0, 1], [5, 4], [6, 7]]
    assert train_dpo.judged_pairs(torch.ones(3, 2)).shape == (0, 2)


# ---- Groups ----


GROUP_LOSSES = get_args(train_group_dpo.Config.__annotations__["loss"])


@st.composite
def mixed_groups(draw):
    """Implicit rewards [P, G] and who won [P, G]: in every group N_w winners and N_l losers, at least one of each."""
    P, W, L, g = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(generators)
    return randn(g, P, W + L), torch.stack([torch.randperm(W + L, generator=g) < W for _ in range(P)])


def group_loss(rewards, won, **options):
    """Loss and gradient in the implicit rewards, weighted 1 per group."""
    r = leaf(rewards)
    loss, _ = train_group_dpo.objective(r, won, torch.ones(len(r), dtype=torch.float64), **options)
    return loss.detach(), grad(loss, r)


@given(mixed_groups(), st.floats(0, 3))
def test_each_group_loss_is_its_row_of_the_table(case, m):
    r, won = case
    expected = dict.fromkeys(GROUP_LOSSES, 0.0)
    for row, wins in zip(r.tolist(), won.tolist(), strict=True):
        W, L = [x for x, w in zip(row, wins, strict=True) if w], [x for x, w in zip(row, wins, strict=True) if not w]
        scale, D = 1 / math.sqrt(len(W) * len(L)), sum(W) / len(W) - sum(L) / len(L)
        expected["pairs"] += sum(math.log1p(math.exp(b - a)) for a in W for b in L)
        expected["scaled"] += sum(math.log1p(math.exp(scale * (b - a))) for a in W for b in L)
        expected["mean"] += math.log1p(math.exp(-D))
        expected["hinge"] += max(0.0, m - D)
    for name, value in expected.items():
        assert_close(group_loss(r, won, loss=name, margin=m)[0], value, 1e-9)


@given(generators)
def test_one_winner_and_one_loser_make_dpo(g):
    r, won = randn(g, 3, 2), torch.tensor([[True, False], [False, True], [True, False]])
    margin = torch.where(won[:, 0], r[:, 0] - r[:, 1], r[:, 1] - r[:, 0])
    for name in ("pairs", "scaled", "mean"):
        assert_close(group_loss(r, won, loss=name)[0], bradley_terry(margin).sum())


@given(mixed_groups(), generators, st.floats(-5, 5))
def test_groups_know_no_order_and_no_level(case, g, c):
    """Reordering a group reorders its gradients; the same constant on all its rewards changes nothing."""
    r, won = case
    order = torch.randperm(r.shape[1], generator=g)
    for name in GROUP_LOSSES:
        loss, slope = group_loss(r, won, loss=name)
        for other, expected in ((group_loss(r[:, order], won[:, order], loss=name), slope[:, order]),
                                (group_loss(r + c, won, loss=name), slope)):
            assert_close(other[0], loss, 1e-8)
            assert_close(other[1], expected, 1e-8)


@given(mixed_groups())
def test_winners_are_raised_by_as_much_as_losers_are_lowered(case):
    """In every one of the losses the gradients of a group add up to zero, with nobody pushed the wrong way."""
    r, won = case
    for name in GROUP_LOSSES:
        slope = group_loss(r, won, loss=name)[1]
        assert_close(slope.sum(-1), 0.0)
        assert (slope[won] <= 0).all() and (slope[~won] >= 0).all()


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_one_winner_among_ten_losers_is_raised_ten_times_as_much_as_each_is_lowered(name):
    """At equal rewards, whatever the loss: neither scale nor means balance single answers. What they change is the total:
    5 for all pairs, 5/sqrt(10) for scaled ones, 1/2 for means, 1 for the hinge."""
    won = torch.arange(11)[None] == 0
    slope = group_loss(torch.zeros(1, 11, dtype=torch.float64), won, loss=name, margin=1.0)[1][0]
    assert slope[0] / slope[1] == pytest.approx(-10.0)
    assert -slope[0] == pytest.approx({"pairs": 5.0, "scaled": 5 / math.sqrt(10), "mean": 0.5, "hinge": 1.0}[name])


@given(mixed_groups())
def test_how_much_a_group_can_weigh(case):
    """The total that winners are raised by: below N_w N_l for pairs, sqrt(N_w N_l) for scaled ones, 1 for means and hinge."""
    r, won = case
    both = (won.sum(-1) * (~won).sum(-1)).double()
    for name, bound in (("pairs", both), ("scaled", both.sqrt()), ("mean", torch.ones_like(both)),
                        ("hinge", torch.ones_like(both))):
        assert (-group_loss(r, won, loss=name)[1].masked_fill(~won, 0.0).sum(-1) <= bound + 1e-12).all()


@given(mixed_groups())
def test_jensen_orders_the_losses(case):
    """pairs / (N_w N_l) >= mean, with equality iff all gaps are equal; and scaled >= mean."""
    r, won = case[0][:1], case[1][:1]
    both = float(won.sum() * (~won).sum())
    pairs_loss, scaled, mean = (group_loss(r, won, loss=name)[0] for name in ("pairs", "scaled", "mean"))
    assert pairs_loss / both >= mean - 1e-12 and scaled >= mean - 1e-12
    level = torch.where(won, 0.7, -0.4).double()
    assert_close(group_loss(level, won, loss="pairs")[0] / both, group_loss(level, won, loss="mean")[0])


def test_the_hinge_is_silent_beyond_its_margin_and_does_not_saturate_below():
    """Slope 1 in D however wrong the order, 0 at the margin and beyond; the share of active groups is counted."""
    won = torch.tensor([[True, False]] * 3)
    r = torch.tensor([[-100.0, 0.0], [1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    assert group_loss(r, won, loss="hinge", margin=1.0)[1][:, 0].tolist() == [-1.0, 0.0, 0.0]
    metrics = train_group_dpo.objective(r, won, torch.ones(3), loss="hinge", margin=1.0)[1]
    assert metrics["train/active"] == 1 and metrics["train/groups"] == 3 and metrics["train/margin"] == -96


@pytest.mark.parametrize("name", GROUP_LOSSES)
@given(generators, st.booleans())
def test_a_group_of_one_kind_costs_nothing_and_is_not_counted(name, g, wins):
    """... and neither does it disturb the group beside it."""
    r, won = randn(g, 2, 4), torch.tensor([[wins] * 4, [True, False, True, False]])
    loss, slope = group_loss(r, won, loss=name)
    alone, alone_slope = group_loss(r[1:], won[1:], loss=name)
    assert_close(loss, alone)
    assert_close(slope[1], alone_slope[0])
    assert (slope[0] == 0).all()
    metrics = train_group_dpo.objective(r, won, torch.ones(2), loss=name)[1]
    assert metrics["train/groups"] == 1
    assert float(train_group_dpo.objective(r[:1], won[:1], torch.ones(1), loss=name)[0]) == 0


@given(mixed_groups(), generators)
def test_groups_in_parts_add_up(case, g):
    r, won = case
    weights = randn(g, len(r)).abs()
    for name in GROUP_LOSSES:
        whole, metrics = train_group_dpo.objective(r, won, weights, loss=name)
        parts = [train_group_dpo.objective(r[p : p + 1], won[p : p + 1], weights[p : p + 1], loss=name) for p in range(len(r))]
        assert_close(sum(loss for loss, _ in parts), whole)
        for key in metrics:
            assert float(sum(m[key] for _, m in parts)) == pytest.approx(float(metrics[key]), abs=1e-9)
