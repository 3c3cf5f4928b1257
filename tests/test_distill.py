"""Distillation: divergences are what they are called, and each gradient is that of the divergence it claims to follow."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import logit_pairs, policies

from experiments.distill import pairs_of_answers
from nanorl.checks.cases import generators
from nanorl.ops import entropy_from_logits, jensen_shannon, kl_divergence, with_tail
from nanorl.tabular import (
    expectation,
    fixed_prefix_kl,
    horizon,
    leaf,
    log_probs,
    prefix_rows,
    randn,
    sequence_kl,
    sequence_probs,
    sequences,
)
from train_distill import objective, token_divergence

pytestmark = pytest.mark.math
betas = st.floats(0.01, 0.99)
divergences = st.sampled_from(["forward", "reverse", "jsd"])


def assert_close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=atol)


# ---- The divergences ----


@given(logit_pairs(), betas)
def test_jensen_shannon_is_its_definition(pair, beta):
    p, q = (torch.softmax(z, -1) for z in pair)
    m = beta * p + (1 - beta) * q
    terms = beta * torch.xlogy(p, p / m) + (1 - beta) * torch.xlogy(q, q / m)
    assert_close(jensen_shannon(*pair, beta), terms.sum(-1), 1e-8)


@given(logit_pairs(), betas)
def test_jensen_shannon_is_bounded_by_the_entropy_of_its_coin(pair, beta):
    """0 <= JSD_beta <= H(beta) <= log 2, 0 between equals, and JSD_beta(p || q) = JSD_{1-beta}(q || p)."""
    value = jensen_shannon(*pair, beta)
    coin = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (value >= -1e-12).all() and (value <= coin + 1e-12).all() and coin <= math.log(2) + 1e-12
    assert_close(value, jensen_shannon(*reversed(pair), 1 - beta))
    assert_close(jensen_shannon(pair[0], pair[0] + 3.0, beta), torch.zeros(len(pair[0])))


def test_what_shares_nothing_is_a_coin_apart():
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
    assert_close(jensen_shannon(*apart, 0.5), math.log(2))
    assert_close(jensen_shannon(*apart, 0.2), -0.2 * math.log(0.2) - 0.8 * math.log(0.8))


@given(logit_pairs())
def test_jensen_shannon_goes_from_forward_to_reverse(pair):
    """JSD_beta / beta -> KL(p || q) for beta -> 0, and JSD_beta / (1 - beta) -> KL(q || p) for beta -> 1."""
    p, q = (z.clamp(-3, 3) for z in pair)
    assert_close(jensen_shannon(p, q, 1e-7) / 1e-7, kl_divergence(p, q), 1e-3)
    assert_close(jensen_shannon(p, q, 1 - 1e-7) / 1e-7, kl_divergence(q, p), 1e-3)


@st.composite
def chosen(draw):
    """A pair of logits [N, V] and different ids [N, k], 1 <= k < V."""
    p, q = draw(logit_pairs())
    order = torch.rand(p.shape, generator=draw(generators)).argsort(-1)
    return p, q, order[:, : draw(st.integers(1, p.shape[1] - 1))]


@given(chosen())
def test_with_its_tail_a_choice_of_tokens_is_a_distribution(case):
    """The chosen tokens keep their probability, and the last entry is that of all others."""
    p, _, ids = case
    coarse = with_tail(p, ids).exp()
    assert_close(coarse.sum(-1), torch.ones(len(p)))
    assert_close(coarse[:, :-1], torch.softmax(p, -1).gather(-1, ids))


@given(chosen(), divergences, betas)
def test_a_tail_hides_some_of_a_divergence_and_invents_none(case, divergence, beta):
    """0 <= D(coarse) <= D, and never less with one token more; with all but one token, nothing is hidden."""
    p, q, ids = case
    how = {"divergence": divergence, "beta": beta}
    whole = token_divergence(q, p, **how)
    coarse, finer = (token_divergence(with_tail(q, some), with_tail(p, some), **how) for some in (ids[:, :1], ids))
    slack = 1e-9 * (1 + whole)
    assert (coarse >= -1e-12).all() and (coarse <= finer + slack).all() and (finer <= whole + slack).all()
    if ids.shape[1] == p.shape[1] - 1:
        assert_close(finer, whole, 1e-8)


@given(logit_pairs(), divergences, betas, st.integers(0, 8), st.floats(0.5, 4))
def test_the_directions_are_what_they_are_called(pair, divergence, beta, k, tau):
    """Student first, teacher second: forward is KL(teacher || student). top_k are the teacher's; all of V is none."""
    student, teacher = pair
    p, q = teacher / tau, student / tau
    if 0 < k < p.shape[1]:
        ids = p.argsort(-1, descending=True)[:, :k]
        p, q = with_tail(p, ids), with_tail(q, ids)
    expected = {"forward": kl_divergence(p, q), "reverse": kl_divergence(q, p), "jsd": jensen_shannon(p, q, beta)}[divergence]
    found = token_divergence(student, teacher, divergence=divergence, beta=beta, tau=tau, top_k=k)
    assert_close(found, expected, 1e-9)


@given(logit_pairs(), st.floats(0.3, 5))
def test_the_strength_of_a_lesson_does_not_depend_on_tau(pair, tau):
    """The gradient in the student's logits is tau (q_tau - p_tau) = tau^2 times that of the cross-entropy with soft targets;
    for a high temperature it is (z - mean z) / V of the difference z of the logits, whatever tau is."""
    teacher, student = pair[0], leaf(pair[1])
    ids, mask = torch.zeros(len(teacher), dtype=torch.long), torch.ones(len(teacher), 1, dtype=torch.bool)
    loss, metrics = objective(student, teacher, ids, mask, mask.double(), tau=tau)
    assert_close(metrics["train/divergence"], token_divergence(pair[1], teacher, tau=tau).sum())
    loss.backward()
    p, q = torch.softmax(teacher / tau, -1), torch.softmax(pair[1] / tau, -1)
    assert_close(student.grad, tau * (q - p))
    student.grad = None
    objective(student, teacher, ids, mask, mask.double(), tau=1e6)[0].backward()
    z = pair[1] - teacher
    assert_close(student.grad, (z - z.mean(-1, keepdim=True)) / z.shape[-1], 1e-3)


# ---- The gradients, over all answers ----


def masked(tokens, stop):
    """[B, T] True up to the first stop token, where there is one: what comes behind it was never said."""
    if stop is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return (tokens == stop).cumsum(-1) - (tokens == stop).long() == 0


def lesson(student, teacher, tokens, mask, weights, **how):
    """The objective, of a student and a teacher that are tables."""
    rows = prefix_rows(tokens, student.shape[1])[mask]
    return objective(student[rows], teacher[rows], tokens[mask], mask, weights, **how)


stops = st.sampled_from([None, 0])


@given(policies(count=2), stops)
def test_on_the_teachers_answers_forward_is_the_divergence_of_whole_answers(pair, stop):
    """E_p[ sum_t KL(p_t || q_t) ] = KL(p || q), and so are their gradients in q: p does not depend on the student."""
    teacher, student = pair[0], leaf(pair[1])
    tokens = sequences(teacher.shape[1], horizon(teacher))
    mask = masked(tokens, stop)
    loss, metrics = lesson(student, teacher, tokens, mask, sequence_probs(teacher)[:, None].expand(mask.shape))
    whole = expectation(teacher, ((log_probs(teacher) - log_probs(student)) * mask).sum(-1))
    if stop is None:
        assert_close(whole, sequence_kl(teacher, student))
    assert_close(loss, whole)
    assert_close(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, whole)))
    assert not metrics["train/divergence"].requires_grad


@given(policies(count=2))
def test_token_by_token_the_prefixes_are_held_fixed(pair):
    """On the student's answers, the gradient is that of E_prefix[ sum_t KL(q_t || p_t) ] with the prefixes' law a constant."""
    teacher, student = pair[0], leaf(pair[1])
    tokens = sequences(teacher.shape[1], horizon(teacher))
    mask = masked(tokens, None)
    loss, _ = lesson(student, teacher, tokens, mask, sequence_probs(student).detach()[:, None].expand(mask.shape),
                     divergence="reverse")
    fixed = fixed_prefix_kl(student, student, teacher)
    assert_close(loss, fixed)
    assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, fixed)))


def over_pairs(student, teacher, stop, **how):
    """The objective in expectation over two answers of the student to a prompt, each the other's baseline."""
    tokens, chance = pairs_of_answers(student.detach())
    weights = (chance / 2)[:, None].expand(tokens.shape)
    return lesson(student, teacher, tokens, masked(tokens, stop), weights, group=2, **how)[0]


@given(policies(count=2, V=(2, 3), T=(1, 3)), stops)
def test_sequence_by_sequence_it_is_the_gradient_of_whole_answers(pair, stop):
    """E[gradient] = grad KL(q || p), exactly, also where answers end at different lengths."""
    teacher, student = pair[0], leaf(pair[1])
    answers = sequences(teacher.shape[1], horizon(teacher))
    loss = over_pairs(student, teacher, stop, divergence="reverse", gradient="sequence")
    whole = expectation(student, ((log_probs(student) - log_probs(teacher)) * masked(answers, stop)).sum(-1))
    if stop is None:
        assert_close(whole, sequence_kl(student, teacher))
    assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, whole)), 1e-8)


def test_only_the_sequence_gradient_steers_away_from_what_will_go_wrong():
    """Student and teacher agree on the first token, and behind one of the two on the second: token by token, the first token
    learns nothing; as a whole, the other one becomes less likely."""
    teacher = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    student = leaf(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    losses = (over_pairs(student, teacher, None, divergence="reverse", gradient=name) for name in ("token", "sequence"))
    token, sequence = (torch.autograd.grad(loss, student)[0] for loss in losses)
    assert_close(token[0], [0.0, 0.0])
    assert sequence[0, 1] > 0.1 and sequence[0, 0] < -0.1
    assert_close(token[1:], sequence[1:])


@given(policies(count=2, V=(2, 3), T=(2, 3)), stops, generators, st.sampled_from(["token", "sequence"]), divergences)
def test_micro_batches_of_whole_groups_add_up(pair, stop, generator, gradient, divergence):
    """Loss, gradient and metrics of 4 prompts with 3 answers are the sums of those of each prompt; and the metrics are sums
    over the tokens that count."""
    teacher, student = pair[0], leaf(pair[1])
    tokens = torch.randint(teacher.shape[1], (12, horizon(teacher)), generator=generator)
    mask, weights = masked(tokens, stop), torch.rand(12, 1, generator=generator).double().expand(tokens.shape)
    how = {"gradient": gradient, "group": 3, "divergence": "reverse" if gradient == "sequence" else divergence, "beta": 0.3}
    whole, metrics = lesson(student, teacher, tokens, mask, weights, **how)
    parts = [lesson(student, teacher, tokens[rows], mask[rows], weights[rows], **how) for rows in torch.arange(12).split(3)]
    assert_close(sum(part for part, _ in parts), whole)
    assert_close(*(torch.autograd.grad(x, student)[0] for x in (sum(part for part, _ in parts), whole)))
    rows = prefix_rows(tokens, teacher.shape[1])[mask]
    assert_close(metrics["train/entropy"], entropy_from_logits(student.detach()[rows]).sum())
    assert_close(metrics["train/divergence"], token_divergence(student.detach()[rows], teacher[rows],
                                                               **{k: how[k] for k in ("divergence", "beta")}).sum())
    for name in metrics:
        assert_close(sum(m[name] for _, m in parts), metrics[name])


def test_a_teacher_teaches_itself_nothing():
    logits = randn(torch.Generator().manual_seed(1), 7, 2)
    student, tokens = leaf(logits), sequences(2, 3)
    for how in ({}, {"divergence": "reverse", "gradient": "sequence", "group": 4},
                {"divergence": "jsd", "beta": 0.5, "top_k": 1}):
        loss, _ = lesson(student, logits, tokens, masked(tokens, 0), torch.ones(tokens.shape, dtype=torch.float64), **how)
        assert_close(torch.autograd.grad(loss, student)[0], torch.zeros_like(logits), 1e-12)
