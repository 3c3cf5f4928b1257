"""The check of the first rollout passes on what is sound and names, in one sentence, what is not."""

import functools
from dataclasses import replace
from random import Random

import pytest
import torch
from test_rollout import MODEL, SAMPLING, TOKENIZER, Parity
from world import start

import train_grpo
from nanorl.data import response_mask
from nanorl.first_step import FirstStepCheckFailed, check_verifier, difference, first_step_check, tolerance
from nanorl.rollout import sample_and_grade
from nanorl.sample import token_log_probs
from nanorl.tasks import TASKS, FileTask, Task, final_answer, make_task


def check(rollout=lambda r: r, score=token_log_probs, objective=train_grpo.objective, samples=4):
    problems = [Parity().draw(Random(seed)) for seed in range(16 // samples)]
    experience = sample_and_grade(MODEL, TOKENIZER, Parity(), problems, SAMPLING, samples=samples, seed=3)
    experience.rollout = rollout(experience.rollout)
    return first_step_check(experience, make_task("addition"), TOKENIZER.stop_ids, functools.partial(score, MODEL), objective,
                            list(MODEL.parameters()), "sequence_mean", 4, 1e-4)


def test_a_sound_setup_is_told_how_sound_it_is():
    assert check().startswith("First-step check: sampler and scorer agree to ")


@pytest.mark.parametrize("samples", [1, 2, 16])
def test_groups_of_any_size_pass(samples):
    check(samples=samples)


def test_answers_that_are_all_alike_pass():
    """A policy that is sure of itself gives every answer twice and has hardly a gradient: nothing is wrong with it."""
    def alike(rollout):
        for name in ("tokens", "prompt_lengths", "lengths", "mask", "logp", "finished", "prompt_index"):
            x = getattr(rollout, name)
            x[:] = x[:1].clone()
        return rollout

    check(rollout=alike)


def test_it_leaves_no_gradient_behind():
    check()
    assert all(p.grad is None for p in MODEL.parameters())


def colder(model, tokens, mask):
    return token_log_probs(model, tokens, mask, temperature=0.7)


def padded(model, tokens, mask):
    """A log-prob that depends on how many rows share the batch."""
    logp, entropy = token_log_probs(model, tokens, mask)
    return logp + 1e-3 * (16 - len(logp)), entropy


def averaged(logp, old_logp, adv, mask, weights, **_):
    return -(adv * logp.masked_fill(~mask, 0.0)).mean(), {}


def upside_down(logp, old_logp, adv, mask, weights, **_):
    return (weights * adv * logp.masked_fill(~mask, 0.0)).sum(), {}


def unsigned(logp, old_logp, adv, mask, weights, **_):
    return -(weights * adv.abs() * logp.masked_fill(~mask, 0.0)).sum(), {}


def unstopped(rollout):
    rollout.tokens[rollout.finished, rollout.lengths[rollout.finished] - 1] = 0
    return rollout


def short(rollout):
    """The last token of each answer, its stop token, is outside the mask."""
    return replace(rollout, mask=response_mask(rollout.prompt_lengths, rollout.lengths - 1, rollout.tokens.shape[1]))


def long(rollout):
    """One token more than was sampled is inside the mask."""
    return replace(rollout, mask=response_mask(rollout.prompt_lengths - 1, rollout.lengths, rollout.tokens.shape[1]))


@pytest.mark.parametrize("fault, says", [
    (dict(score=colder), "sampler and scorer differ"), (dict(score=padded), "the same weights give ratios"),
    (dict(objective=averaged), "the sum of its parts'"), (dict(objective=upside_down), "keep the sign of A"),
    (dict(objective=unsigned), "keep the sign of A"), (dict(rollout=unstopped), "without a stop token"),
    (dict(rollout=short), "its stop token if it has one, is outside the mask"),
    (dict(rollout=long), "more or fewer tokens than were sampled")])
def test_what_is_broken_is_named_in_one_sentence(fault, says):
    with pytest.raises(FirstStepCheckFailed, match=says) as error:
        check(**fault)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", [*(task() for task in TASKS.values() if task.verifiable),
                                  FileTask([(f"Say {n}.", f"{n}") for n in range(50)])], ids=str)
def test_our_verifiers_pass(task):
    check_verifier(task)


class Generous(Task):
    """Pays whoever says the answer anywhere."""

    name = "generous"
    draw = TASKS["addition"]().draw

    def verify(self, problem, response):
        return float(problem.answer in response)


class Stingy(Generous):
    def verify(self, problem, response):
        return 0.0


class Moody(Generous):
    """Does not pay the same for all of its gold answers."""

    def verify(self, problem, response):
        return final_answer(response) == problem.answer and 1 + len(problem.answer)


class Signed(Moody):
    def verify(self, problem, response):
        return 1 if final_answer(response) == problem.answer else -1


class Points(Generous):
    right_reward = None


class Walk(Generous):
    """Two actions, of which none is right: an episode pays for its end."""

    max_actions, max_episode_tokens = 2, 40

    def verify(self, problem, response):
        return 0.0


class Lenient(Moody):
    right_reward = 2


@pytest.mark.parametrize("task, says", [(Signed(), "the verifier pays for gold answers only"), (Lenient(), "pays for gold"),
                                        (Points(), "no answer to generous is right or wrong by itself"),
                                        (Walk(), "no answer to generous is right or wrong by itself")])
def test_right_is_what_the_task_calls_so(task, says):
    assert says in check_verifier(task)


@pytest.mark.parametrize("task, says", [(Moody(), "gives 4 to its own"), (Generous(), "gives 1 to an adversarial"),
                                        (Stingy(), "gives 0 to an adversarial")])
def test_a_verifier_that_can_be_gamed_is_named(task, says):
    with pytest.raises(FirstStepCheckFailed, match=says):
        check_verifier(task)


@pytest.mark.parametrize("native", [False, True])
def test_the_bound_is_stated_for_each_precision(native, monkeypatch):
    """Also for that of "auto", which is bfloat16 only on GPUs that compute in it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tolerance(cpu, "auto") == tolerance(cpu, "float32") == 1e-4
    assert tolerance(cpu, "bfloat16") > tolerance(cuda, "float32") > 1e-4
    assert tolerance(cuda, "auto") == tolerance(cuda, "bfloat16" if native else "float32")


def test_a_rollout_without_an_answer_that_can_be_read_says_what_to_do(inside, tmp_path, capsys):
    """The sentence is there where no response has `Answer: `, and only there."""
    for init, unread in (("pretrain", True), ("sft", False)):
        flags = "--steps 1 --prompts 3 --group 4 --data wanted.jsonl --eval-problems 3 --max-new-tokens 16 --device cpu"
        start(train_grpo, flags, tmp_path / init, "--init", init)
        said = capsys.readouterr().out
        assert ("fine-tune on responses like 'Answer: x' first" in said) == unread and "First-step check" in said


def test_rounding_hits_few_tokens_hard_and_a_wrong_temperature_all_of_them():
    """One token of a hundred may be far off, or all a little; more is no rounding. Padding, even nan, is not compared."""
    logp, mask = -torch.rand(10, 20), torch.ones(10, 20, dtype=torch.bool)
    mask[:, 10:] = False
    for token, others, holds in ((0.9, 0.0, True), (1.1, 0.0, False), (0.0, 0.06, True), (0.0, 0.07, False)):
        other = logp + others
        other[0, 0] += token
        other[:, 10:] = float("nan")
        off, rounding = difference(other, logp, mask, 0.25)
        assert off == pytest.approx(token + others, abs=1e-6) and rounding is holds
    assert difference(logp, logp, mask & False, 0.25) == (0.0, True)
