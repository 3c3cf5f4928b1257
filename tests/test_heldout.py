"""Evaluations ask held-out problems, which depend on the seed alone, and report the means of what was answered."""

import math
import json
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from test_rollout import (GREEDY, MODEL, SAMPLING, TOKENIZER, Parity, assert_belongs_together, experience_of, make_model,
                          scorer)

from nanorl.heldout import answer_kl, before_and_after, evaluate_policy, heldout_problems, show_answers, total_loss
from nanorl.rollout import collect, describe, learned_rewards, sample_and_grade
from nanorl.sample import Sampling, token_log_probs
from nanorl.tasks import FileTask, is_heldout, make_task


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


SCALES = {"bool": bool, "-1 and 1": lambda x: 2 * int(x) - 1, "0 and 100": lambda x: 100 * x,
          "thirds": lambda x: Fraction(int(x), 3), "tensors": torch.tensor}


class Scaled(Parity):
    """Parity, its rewards on another scale."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.right_reward = scale, float(scale(1.0))

    def verify(self, problem, response):
        return self.scale(super().verify(problem, response))


def test_an_evaluation_in_which_nothing_could_be_scored_has_no_accuracy(monkeypatch):
    monkeypatch.setattr(Parity, "rewards", lambda self, problems, responses, finished: [None] * len(responses))
    metrics, _ = evaluate_policy(MODEL, TOKENIZER, Parity(), SAMPLING, problems=5, seed=5)
    assert math.isnan(metrics["eval/accuracy_sampled"]) and metrics["eval/unscored"] == 1 and "eval/reward" not in metrics


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_right_means_the_same_on_every_scale_of_rewards(scale):
    """Accuracies, lengths of right and wrong answers, the best of n, the printed marks: all as with 0 and 1."""
    said, found = [], []
    for task in (Parity(), Scaled(scale)):
        lines, records = [], []
        metrics, answers = evaluate_policy(MODEL, TOKENIZER, task, SAMPLING, problems=20, seed=5, best_of=4)
        show_answers(SimpleNamespace(samples=records.extend, say=lines.append, step=7), answers, 20)
        found.append(metrics)
        said.append([line[:3] for line in lines[0].splitlines()])
    assert {r["reward"] for r in records} <= {float(torch.tensor(float(scale(x)))) for x in (0.0, 1.0)} | {0.0}
    assert found[0] == found[1] and said[0] == said[1] and {"  +", "  -"} <= set(said[0])
    assert 0 < found[0]["eval/accuracy_sampled"] < found[0]["eval/best_of_n"] <= 1


class Length(Parity):
    """Points for length: no answer is right or wrong."""

    right_reward = None

    def verify(self, problem, response):
        return len(response) / 2


def test_where_no_answer_is_right_an_evaluation_is_of_rewards():
    """No accuracy, no lengths of right answers, no marks: mean rewards, called so in metrics, table and shown answers."""
    lines, records = [], []
    metrics, answers = evaluate_policy(MODEL, TOKENIZER, Length(), SAMPLING, problems=20, seed=5, best_of=4)
    assert metrics["eval/reward"] == pytest.approx(float(answers.rewards.mean()))
    assert metrics["eval/best_of_n"] > metrics["eval/reward"]
    assert not {"eval/accuracy_sampled", "eval/accuracy_greedy", "eval/length_correct", "eval/length_wrong"} & metrics.keys()
    table = before_and_after(SimpleNamespace(metrics=lambda: [metrics | {"eval/reward_direct": 2.5}, metrics]))
    assert "  reward  " in table and "reward when direct" in table and "accuracy" not in table
    show_answers(SimpleNamespace(samples=records.extend, say=lines.append, step=7), answers, 20)
    assert "(with their rewards)" in lines[0]
    assert all(f"  {r['reward']:+.3g} {r['prompt']}" in lines[0] for r in records) and len({r["reward"] for r in records}) > 2


@pytest.mark.parametrize("count, asked", [(1, 1), (5, 5), (12, 12), (500, 12)])
def test_an_evaluation_of_a_file_asks_each_held_out_row_once(count, asked):
    """Or some of them, the same in every evaluation of a seed; and its means are over so many."""
    task = FileTask([(f"Say {n}.", f"{n}") for n in range(99)])
    metrics, answers = evaluate_policy(MODEL, TOKENIZER, task, SAMPLING, problems=count, seed=5)
    assert len(answers.problems) == len(set(answers.problems)) == asked == len(answers.rewards)
    assert all(is_heldout(problem.prompt) for problem in answers.problems)
    assert answers.problems == heldout_problems(task, count, 5)
    assert metrics["eval/truncated"] == pytest.approx(1 - float(answers.rollout.finished.double().mean()))


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
