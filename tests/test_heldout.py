"""Evaluations ask held-out problems, which depend on the seed alone, and report the means of what was answered."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_rollout import (GREEDY, MODEL, SAMPLING, TOKENIZER, Parity, assert_belongs_together, experience_of, make_model,
                          scorer)

from nanorl.heldout import answer_kl, evaluate_policy, show_answers, total_loss
from nanorl.rollout import collect, describe, learned_rewards, sample_and_grade
from nanorl.sample import Sampling, token_log_probs
from nanorl.tasks import is_heldout, make_task


@pytest.mark.parametrize("size", [3, 100])
def test_the_divergence_of_answers_adds_up_the_exact_divergences_of_their_tokens(size):
    """sum_t KL(model(.|y_<t) || other(.|y_<t)) over the sampled positions alone, mean over answers; 0 to itself."""
    other = make_model(1)
    rollout = collect(MODEL, TOKENIZER, Parity(), Sampling(4, temperature=0.7), prompts=10, samples=2, seed=1).rollout
    expected = 0.0
    for row, (start, end) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)):
        tokens = rollout.tokens[row : row + 1, :end]
        p, q = ((net(tokens).detach() / 0.7).log_softmax(-1)[0, start - 1 : end - 1] for net in (MODEL, other))
        expected += float((p.exp() * (p - q)).sum()) / len(rollout.tokens)
    assert answer_kl(MODEL, other, rollout, 0.7, size) == pytest.approx(expected, rel=1e-5) and expected > 0.1
    assert abs(answer_kl(MODEL, MODEL, rollout, 0.7, size)) < 1e-9


def test_an_evaluation_may_compare_with_a_reference_and_ask_a_reward_model():
    plain, sampled = evaluate_policy(MODEL, TOKENIZER, Parity(), SAMPLING, problems=20, seed=5)
    full, _ = evaluate_policy(MODEL, TOKENIZER, Parity(), SAMPLING, problems=20, seed=5, reference=make_model(1),
                              reward_model=scorer())
    assert full == plain | {"eval/answer_kl": answer_kl(MODEL, make_model(1), sampled.rollout, 1.0, 64),
                            "eval/learned_reward": float(learned_rewards(scorer(), sampled.rollout, 64).mean())}


@pytest.mark.parametrize("task", [Parity(), make_task("addition-2")], ids=str)
def test_evaluation_problems_are_held_out_and_depend_on_the_seed_alone(task):
    """Not on the model, the temperature or the length of answers; another seed asks others."""
    def problems(model, seed, sampling=SAMPLING):
        return evaluate_policy(model, TOKENIZER, task, sampling, problems=8, seed=seed)[1].problems

    asked = problems(MODEL, 5)
    assert len(asked) == 8 and all(is_heldout(problem.prompt) for problem in asked)
    assert problems(make_model(1), 5, Sampling(2, temperature=0.5)) == asked != problems(MODEL, 6)


def test_evaluation_reports_the_means_of_what_it_saw():
    """Both accuracies: of the answers it returns, and of greedy ones; evaluating again gives the same numbers."""
    metrics, sampled = evaluate_policy(MODEL, TOKENIZER, Parity(), SAMPLING, problems=20, seed=5)
    greedy = sample_and_grade(MODEL, TOKENIZER, Parity(), sampled.problems, GREEDY)
    assert_belongs_together(sampled, Parity(), 1)
    assert metrics["eval/accuracy_sampled"] == float(sampled.rewards.mean())
    assert metrics["eval/accuracy_greedy"] == float(greedy.rewards.mean())
    assert metrics["eval/length"] == describe(sampled, "eval")["eval/length"] and "eval/reward" not in metrics
    assert evaluate_policy(MODEL, TOKENIZER, Parity(), SAMPLING, problems=20, seed=5)[0] == metrics


@pytest.mark.parametrize("count", [3, 9])
def test_shown_answers_keep_prompt_response_and_reward_together(count):
    """The first sample of each of the first `count` problems, or of all of them, as lines and as records."""
    texts = [f"text {n}" for n in range(8)]
    experience = experience_of([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [1] * 8, [True] * 7 + [False], texts)
    records, lines = [], []
    show_answers(SimpleNamespace(samples=records.extend, say=lines.append, step=7), experience, count)
    expected = [{"prompt": f"p{n}", "response": f"text {2 * n}", "reward": reward, "finished": True}
                for n, reward in enumerate([1.0, 0.0, 1.0, 0.0])][:count]
    assert records == expected and json.loads(json.dumps(records)) == records
    assert all(f"{'+' if r['reward'] else '-'} {r['prompt']} {r['response']}" in lines[0] for r in expected)


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_the_loss_of_a_text_is_a_sum_whatever_the_batch(batch):
    """Batches only limit memory: the last one, which may be smaller, counts by its tokens."""
    tokens = torch.arange(35).view(7, 5) % TOKENIZER.vocab_size
    mask = torch.ones(7, 4, dtype=torch.bool)
    rows = zip(tokens, mask, strict=True)
    expected = -sum(token_log_probs(MODEL, row[None], m[None])[0].sum().item() for row, m in rows)
    assert total_loss(MODEL, tokens, mask, batch) == pytest.approx(expected, rel=1e-5)
