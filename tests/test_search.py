"""Test-time compute: its estimates are averages over all subsets, and its chains have the distribution they promise."""

import math
from collections import Counter
from itertools import combinations, islice, product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollout import MODEL, SAMPLING, TOKENIZER, Parity, scorer

from nanorl import run, search
from nanorl.checks.cases import generators
from nanorl.gpt import GPT, GPTConfig
from nanorl.heldout import heldout_problems
from nanorl.rollout import learned_rewards, sample_and_grade
from nanorl.sample import generate, token_log_probs
from nanorl.search import (autocorrelation, best_of_n, best_of_n_curve, best_of_n_kl, doublings, majority_vote, opening,
                           pass_at_k, position_weights, power_log_accept, power_sample, sample_answers, vote_value)
from nanorl.tabular import log_probs, num_prefixes, randn, sequences
from nanorl.tasks import TASKS, make_task

# ---- Best of n ----


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
@given(st.integers(1, 6), st.floats(0, 1), st.data())
def test_pass_at_k_is_unbiased(N, p, data):
    """Over all outcomes of N answers, each right with probability p, its mean is 1 - (1 - p)^k."""
    k, mean = data.draw(st.integers(1, N)), 0.0
    for right in product((0.0, 1.0), repeat=N):
        c = sum(right)
        mean += p**c * (1 - p) ** (N - c) * float(pass_at_k(torch.tensor([right]), k))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.math
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_divergence_of_best_of_n_stays_below_its_bound(n):
    """The best of n by any order of V answers: p_i = F_i^n - F_{i-1}^n; reached as V grows, 0 for n = 1."""
    for V, tolerance in ((3, math.inf), (20_000, 0.02)):
        F = torch.arange(V + 1, dtype=torch.float64) / V
        p = (F**n).diff()
        kl = float((p * (p * V).log()).sum())
        assert -1e-9 <= kl <= best_of_n_kl(n) + 1e-9 and best_of_n_kl(n) - kl < tolerance


@pytest.mark.parametrize("rewards", [[[0.0, 100.0]], [[-1.0, 1.0]], [[0.5, 1.0]], [[math.nan, 1.0]]])
def test_pass_at_k_counts_nothing_but_right_answers(rewards):
    with pytest.raises(ValueError, match="expected 1 for a right one and 0 for a wrong one"):
        pass_at_k(torch.tensor(rewards), 1)
    assert pass_at_k(torch.tensor(rewards) == 1, 2).tolist() == [float(1.0 in rewards[0])]


@pytest.mark.parametrize("style", [None, "direct", "worked"])
def test_asked_a_few_at_a_time_every_problem_gets_its_own_answers(style, monkeypatch):
    """Seven problems, two at a time: each part is what `sample_and_grade` says of its problems, in order."""
    monkeypatch.setattr(search, "ROWS", 6)
    task = make_task("addition")
    problems = [task.draw(Random(i)) for i in range(7)]
    found = sample_answers(MODEL, TOKENIZER, task, problems, SAMPLING, samples=3, seed=4, purpose="test", style=style,
                           reward_model=scorer())
    for i in range(0, 7, 2):
        begun = [opening(task, TOKENIZER, problem, style) if style else [] for problem in problems[i : i + 2]]
        rows, seed = slice(i, i + 2), run.derive(4, "test", i)
        part = sample_and_grade(MODEL, TOKENIZER, task, problems[rows], SAMPLING, samples=3, openings=begun, seed=seed)
        said = part.rollout
        assert torch.equal(found.values[rows], part.rewards)
        assert torch.equal(found.logp[rows].flatten(), said.logp.sum(-1))
        assert torch.equal(found.learned[rows].flatten(), learned_rewards(scorer(), said, 64).float())
        sampled = said.lengths - said.prompt_lengths
        assert found.tokens[rows].flatten().tolist() == [int(n) + len(begun[k // 3]) for k, n in enumerate(sampled)]
        assert [ballot for p in found.ballots[rows] for ballot in p] == [
            task.ballot(text) if done else None for text, done in zip(part.texts, said.finished.tolist(), strict=True)]
    assert found.values.shape == (7, 3) and len(found.ballots) == 7


@pytest.mark.parametrize("reward_model", [None, scorer()], ids=["task", "model"])
def test_the_best_of_samples_on_heldout_problems(reward_model):
    """1 is the mean, doubling up to the number of samples; chosen by the task itself it never falls."""
    found = best_of_n_curve(MODEL, TOKENIZER, Parity(), heldout_problems(Parity(), 10, 3), SAMPLING, samples=6, seed=3,
                            reward_model=reward_model)
    assert list(found) == [1, 2, 4, 6] and all(0 <= value <= 1 for value in found.values())
    if reward_model is None:
        assert list(found.values()) == sorted(found.values()) and found[6] > found[1]


def test_doublings_end_with_the_most():
    assert [doublings(most) for most in (1, 2, 3, 8, 11)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 11]]


# ---- Votes ----

ballots = st.lists(st.sampled_from(["7", "8", "12", None]), min_size=1, max_size=9)


@pytest.mark.math
@given(ballots, st.randoms(use_true_random=False), generators)
def test_a_vote_does_not_depend_on_the_order_of_its_ballots(votes, rng, generator):
    """Not even to the last bit of the weights' sum: the winners are the same list."""
    weights = torch.rand(len(votes), generator=generator).tolist()
    shuffled = rng.sample(range(len(votes)), len(votes))
    assert majority_vote(votes) == majority_vote([votes[i] for i in shuffled])
    assert majority_vote(votes, weights) == majority_vote([votes[i] for i in shuffled], [weights[i] for i in shuffled])
    assert majority_vote("aaab", [0.1, 0.2, 0.3, 0.6]) == majority_vote("aaab", [0.3, 0.2, 0.1, 0.6])


@pytest.mark.math
@given(ballots, st.sampled_from([0.1, 1.0, 3.0]))
def test_the_winners_of_a_vote_are_those_with_the_most_votes(votes, weight):
    """By counting; equal weights change nothing, and who has not answered does not vote."""
    count = Counter(vote for vote in votes if vote is not None)
    assert majority_vote(votes) == sorted(vote for vote, n in count.items() if n == max(count.values()))
    assert majority_vote(votes) == majority_vote(votes, [weight] * len(votes)) == majority_vote([*votes, None])
    for only in count:
        assert majority_vote([only] * 3) == [only]


@pytest.mark.math
def test_weights_decide_a_vote():
    assert majority_vote(["7", "7", "8"], [1.0, 1.0, 2.5]) == ["8"]
    assert majority_vote(["7", "7", "8"], [1.0, 1.0, 2.0]) == ["7", "8"]
    assert majority_vote([None, "8"], [9.0, 0.0]) == ["8"] and majority_vote([None, None]) == []


@pytest.mark.math
@given(st.integers(1, 8), st.floats(0.05, 0.95))
def test_the_accuracy_of_a_vote_is_binomial(n, p):
    """n independent answers, right with probability p and otherwise all wrong in the same way, over all outcomes:
    sum_{k > n/2} C(n,k) p^k (1-p)^(n-k), and half of a tie."""
    mean = 0.0
    for right in product((True, False), repeat=n):
        k = sum(right)
        votes, values = ["good" if r else "bad" for r in right], [float(r) for r in right]
        mean += p**k * (1 - p) ** (n - k) * vote_value(votes, values)
    formula = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) * (1.0 if 2 * k > n else 0.5) for k in range(-(-n // 2), n + 1))
    assert mean == pytest.approx(formula, abs=1e-12)


@pytest.mark.math
def test_a_vote_of_ten_at_sixty_percent():
    """Strictly more than half are right in 63.3 % of cases; with ties drawn, 73.3 %."""
    found = sum(math.comb(10, k) * 0.6**k * 0.4 ** (10 - k) * vote_value(["a"] * k + ["b"] * (10 - k),
                                                                        [1.0] * k + [0.0] * (10 - k)) for k in range(11))
    assert found == pytest.approx(0.733, abs=5e-4)


def test_no_winner_is_worth_nothing():
    assert vote_value([None], [1.0]) == 0.0 and vote_value(["7", None], [0.5, 1.0]) == 0.5


def test_the_order_of_ballots_does_not_matter_where_their_values_differ():
    """Two episodes that end with the same answer, of which one asked more on its way."""
    assert {vote_value(["a", "a", "b"], values) for values in ([0.0, 1.0, 9.0], [1.0, 0.0, 9.0])} == {0.5}


# ---- Elicited styles ----


@pytest.mark.parametrize("name", [task.name for task in TASKS.values() if task.verifiable and task.max_actions == 1])
def test_an_opening_tells_the_ways_of_answering_apart(name):
    """It begins a demonstration of its style and none of the other, and its last token is the first in which they differ."""
    task, rng = make_task(name), Random(1)
    for _ in range(20):
        problem = task.problem(rng, "train")
        direct, worked = (opening(task, TOKENIZER, problem, style) for style in ("direct", "worked"))
        assert direct[:-1] == worked[:-1] and direct[-1] != worked[-1]
        assert TOKENIZER.encode(task.direct(problem, rng))[: len(direct)] == direct
        assert TOKENIZER.encode(task.work(problem, Random(problem.prompt)))[: len(worked)] == worked


def test_answers_begin_with_their_openings():
    """The text has it, the prompt of the rollout has it, and the tokens behind it are those of a longer prompt."""
    task, openings = Parity(), [TOKENIZER.encode("6"), TOKENIZER.encode("12")]
    problems = [task.draw(Random(i)) for i in range(2)]
    found = sample_and_grade(MODEL, TOKENIZER, task, problems, SAMPLING, samples=3, openings=openings, seed=5)
    prompts = [TOKENIZER.render(problem.prompt) + begun for problem, begun in zip(problems, openings, strict=True)]
    plain = generate(MODEL, prompts, max_new_tokens=4, stop_ids={TOKENIZER.end}, samples_per_prompt=3, seed=5)
    assert torch.equal(found.rollout.tokens, plain.tokens)
    for row, ids in enumerate(plain.responses()):
        text, reward = found.texts[row], found.rewards.flatten()[row]
        assert text == TOKENIZER.decode(openings[row // 3] + ids)
        assert reward == (task.verify(problems[row // 3], text) if plain.finished[row] else 0.0)


# ---- Power sampling: the exact chain ----

V, T, STOP = 3, 3, 2        # two ordinary tokens and one that may end a response; at most three tokens


class World:
    """Every response of a table of next-token probabilities, with log p and log q of each of its tokens."""

    def __init__(self, logits, temperature, stops):
        tokens, p, q = sequences(V, T), log_probs(logits), log_probs(logits / temperature)
        ends = [next((t + 1 for t in range(T) if row[t] in stops), T) for row in tokens.tolist()]
        whole = {tuple(row[:end]): (p_[:end], q_[:end])
                 for row, end, p_, q_ in zip(tokens.tolist(), ends, p, q, strict=True)}
        self.responses, self.tokens = list(whole), list(whole.values())
        self.p, self.q = (torch.stack([x[k].sum() for x in self.tokens]).exp() for k in (0, 1))

    def kernel(self, alpha):
        """[S, S]: the chance to be at y' after a step from y, and the acceptances [T, S, S] for each position, 1 where
        nothing is proposed."""
        S = len(self.responses)
        K, A = torch.zeros(S, S, dtype=torch.float64), torch.ones(T, S, S, dtype=torch.float64)
        for m, weight in enumerate(position_weights(T)):
            for i, (y, (p, q)) in enumerate(zip(self.responses, self.tokens, strict=True)):
                if m >= len(y):
                    K[i, i] += weight
                    continue
                for j, (z, (new_p, new_q)) in enumerate(zip(self.responses, self.tokens, strict=True)):
                    if z[:m] == y[:m] and len(z) > m:
                        A[m, i, j] = power_log_accept(alpha, new_p[m:].sum() - p[m:].sum(), new_q[m:].sum() - q[m:].sum()).exp()
                        K[i, j] += weight * new_q[m:].sum().exp() * A[m, i, j]
        K += torch.diag(1 - K.sum(-1))
        return K, A


@st.composite
def worlds(draw):
    """logits, alpha, the temperature of the proposals (the model's own, the matched one, another), fixed lengths or not."""
    alpha = draw(st.sampled_from([0.5, 1.0, 2.0, 4.0]))
    logits = draw(st.sampled_from([0.3, 2.0])) * randn(draw(generators), num_prefixes(V, T), V)
    temperature, stops = draw(st.sampled_from([1.0, 1 / alpha, 0.7])), draw(st.sampled_from([(), (STOP,)]))
    return World(logits, temperature, stops), alpha, temperature


@pytest.mark.math
@settings(max_examples=30)
@given(worlds())
def test_the_power_distribution_is_stationary_and_in_detailed_balance(case):
    """pi(y) K(y, y') = pi(y') K(y', y) for every pair, so pi K = pi: at fixed lengths and where responses end early."""
    world, alpha, _ = case
    pi = world.p**alpha / (world.p**alpha).sum()
    K, _ = world.kernel(alpha)
    assert (K >= -1e-15).all()
    assert_close(world.p.sum(), 1.0)
    flow = pi[:, None] * K
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(pi @ K, pi, rtol=0, atol=1e-12)


@pytest.mark.math
@settings(max_examples=30)
@given(worlds())
def test_the_chain_forgets_where_it_began(case):
    """From anywhere, the power distribution and no other is what it comes to."""
    world, alpha, _ = case
    pi = world.p**alpha / (world.p**alpha).sum()
    K, _ = world.kernel(alpha)
    torch.testing.assert_close(torch.linalg.matrix_power(K, 2**20), pi.expand_as(K), rtol=0, atol=1e-8)


@pytest.mark.math
@settings(max_examples=30)
@given(worlds())
def test_what_is_accepted_always(case):
    """alpha = 1 from the model's own proposals, and a last token from the matched tempered ones, whose prefix is the same."""
    world, alpha, temperature = case
    _, A = world.kernel(alpha)
    if alpha == temperature == 1:
        assert (A == 1).all()
    if temperature == 1 / alpha:
        torch.testing.assert_close(A[T - 1], torch.ones_like(A[T - 1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(A.diagonal(dim1=1, dim2=2), torch.ones(T, len(world.p), dtype=torch.float64))


@pytest.mark.math
def test_positions_are_chosen_by_one_over_their_number():
    assert_close(position_weights(3), [6 / 11, 3 / 11, 2 / 11])


# ---- Power sampling: the engine's chain ----

CONTEXT = 12


def tiny(seed=0):
    """A GPT of three tokens whose next-token distributions are far from uniform."""
    model, generator = GPT(GPTConfig(V, CONTEXT, layers=1, width=8, heads=2)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=1.5 if p.ndim == 1 or "embedding" in name else p.shape[1] ** -0.5, generator=generator)
    return model.double()


def world_of(model, prompt, temperature, stops):
    """The table of this model's responses to a prompt: its logits at every prefix."""
    prefixes = [list(prefix) for t in range(T) for prefix in product(range(V), repeat=t)]
    logits = torch.cat([model(torch.tensor([prompt + prefix]))[:, -1].detach() for prefix in prefixes])
    return World(logits, temperature, stops)


def last(chains):
    *_, final = chains
    return final


@pytest.mark.parametrize(("stops", "alpha", "temperature"), [((), 2.0, 0.5), ((STOP,), 2.0, 1.0), ((STOP,), 4.0, 0.7)])
def test_the_engine_walks_the_exact_chain(stops, alpha, temperature):
    """After 0, 1 and 3 steps, 1,000 chains stand where q K^steps has them, and after 24 where p^alpha / Z has them, by
    chi-square at the level of 1e-4. Beside them walk the chains of a longer prompt."""
    model, prompts, n = tiny(), [[0, 1], [1, 1, 0, 2]], 1000
    chains = power_sample(model, prompts, alpha=alpha, steps=24, temperature=temperature, chains=n, max_new_tokens=T,
                          stop_ids=set(stops), seed=1)
    walked = {step: state.rollout for step, state in enumerate(chains) if step in (0, 1, 3, 24)}
    for k, prompt in enumerate(prompts):
        world = world_of(model, prompt, temperature, stops)
        pi, (K, _) = world.p**alpha / (world.p**alpha).sum(), world.kernel(alpha)
        torch.testing.assert_close(world.q @ torch.linalg.matrix_power(K, 24), pi, rtol=0, atol=3e-3)
        for step, y in walked.items():
            expected = n * (pi if step == 24 else world.q @ torch.linalg.matrix_power(K, step))
            rows = slice(k * n, (k + 1) * n)
            found = Counter(tuple(row[len(prompt) : end]) for row, end in zip(
                y.tokens[rows].tolist(), y.lengths[rows].tolist(), strict=True))
            assert set(found) <= set(world.responses)
            counts = torch.tensor([found[response] for response in world.responses], dtype=torch.float64)
            assert_like(counts, expected)


def assert_like(counts, expected):
    """Chi-square at the level of 1e-4, responses that are expected less than five times taken together. By Wilson and
    Hilferty, the cube root of a chi-square is nearly normal; 3.72 is the normal quantile of 1 - 1e-4."""
    rare = expected < 5
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    if expected[-1] < 1:
        counts, expected = counts[:-1], expected[:-1]
    k = len(expected) - 1
    assert ((counts - expected).square() / expected).sum() < k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (3.0, 1.0), (3.0, 1 / 3)])
def test_chains_keep_their_books(alpha, temperature):
    """log p is the scorer's; what is refused changes nothing; what is kept of a response stays; lengths, ends and the
    tokens sampled add up; alpha = 1 refuses nothing."""
    model, prompts = tiny(3).float(), [[1], [0, 1, 0]]
    how = dict(alpha=alpha, temperature=temperature, chains=20, max_new_tokens=8, stop_ids={STOP}, seed=7)
    states = list(power_sample(model, prompts, steps=25, **how))
    assert len(states) == 26 and not states[0].proposed.any() and not states[0].accepted.any()
    for before, now in zip([None, *states], states, strict=False):
        y = now.rollout
        assert y.prompt_index.tolist() == [0] * 20 + [1] * 20
        for row, prompt in enumerate([prompts[0]] * 20 + [prompts[1]] * 20):
            response = y.tokens[row, len(prompt) : y.lengths[row]].tolist()
            assert y.tokens[row, : len(prompt)].tolist() == prompt and y.prompt_lengths[row] == len(prompt)
            assert STOP not in response[:-1] and 1 <= len(response) <= 8
            assert bool(y.finished[row]) == (response[-1] == STOP) and (y.finished[row] or len(response) == 8)
        p, q = (token_log_probs(model, y.tokens, y.mask, temperature=tau)[0] for tau in (1.0, temperature))
        torch.testing.assert_close(now.logp, p.sum(-1), rtol=0, atol=1e-4)
        torch.testing.assert_close(y.logp, q, rtol=0, atol=1e-4)
        if before is None:
            assert torch.equal(now.sampled, y.lengths - y.prompt_lengths)
            continue
        assert not (now.accepted & ~now.proposed).any()
        assert alpha != 1 or torch.equal(now.accepted, now.proposed)
        still = ~now.accepted
        for name in ("tokens", "lengths", "finished", "logp"):
            assert torch.equal(getattr(y, name)[still], getattr(before.rollout, name)[still])
        assert torch.equal(now.logp[still], before.logp[still])
        assert ((now.sampled > before.sampled) == now.proposed).all() and (now.sampled - before.sampled <= 8).all()
    again = list(islice(power_sample(model, prompts, steps=25, **how), 5))
    assert all(torch.equal(a.rollout.tokens, b.rollout.tokens) for a, b in zip(again, states, strict=False))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_autocast_does_not_change_a_chain(temperature):
    """Rounding in half precision would decide what is accepted."""
    how = dict(alpha=2.0, steps=5, temperature=temperature, chains=4, max_new_tokens=6, stop_ids={STOP}, seed=1)
    plain = last(power_sample(tiny(3).float(), [[1]], **how))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = last(power_sample(tiny(3).float(), [[1]], **how))
    assert torch.equal(plain.rollout.tokens, under_autocast.rollout.tokens) and torch.equal(plain.logp, under_autocast.logp)


def test_a_chain_fills_the_context_and_no_more():
    """Starts of different lengths, each with the room that is left to it."""
    model, how = tiny(), dict(alpha=2.0, steps=5, chains=4, stop_ids=set())
    for state in power_sample(model, [[0], [1] * (CONTEXT - 4)], max_new_tokens=4, **how):
        assert state.rollout.lengths.tolist() == [5] * 4 + [CONTEXT] * 4
    with pytest.raises(ValueError, match="context of 12"):
        last(power_sample(model, [[0], [1] * (CONTEXT - 4)], max_new_tokens=5, **how))


@pytest.mark.math
def test_autocorrelation_of_known_chains():
    """A chain that alternates is (-1)^k; one of period four is 0, then -1; constant ones between prompts do not count."""
    sign = torch.tensor([1.0, -1.0]).repeat(20).view(-1, 1, 1)
    slow = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(10).view(-1, 1, 1)
    assert_close(autocorrelation(sign)[:4], [1, -1, 1, -1])
    for k, rho in enumerate((1.0, 0.0, -1.0)):
        assert autocorrelation(slow)[k] == pytest.approx(rho, abs=0.06)
    offset = torch.cat((sign, sign + 100, torch.full_like(sign, 7.0)), dim=1)
    assert_close(autocorrelation(offset), autocorrelation(sign))
    stuck = torch.tensor([[[3.0, -3.0]]]).expand(9, 1, 2)
    assert_close(autocorrelation(stuck), [1.0] * 9)
