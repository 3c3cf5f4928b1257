"""The self-check passes on what is sound and names, in one sentence, what is not."""

import functools
from random import Random

import pytest
import torch
from test_rollout import HOW, MODEL, TOKENIZER, Parity

import train_grpo
from nanorl.rollout import answer
from nanorl.sample import token_log_probs
from nanorl.selfcheck import SelfCheckFailed, check_verifier, selfcheck, tolerance
from nanorl.tasks import TASKS, FileTask, Task, make_task


class Quiet(Parity):
    """Its own answers pay and nothing else does."""

    def verify(self, problem, response):
        return float(response == self.direct(problem, None) + "right")

    def direct(self, problem, rng):
        return "right" if rng else ""

    def examples(self):
        return []


def check(rollout=lambda r: r, score=token_log_probs, objective=train_grpo.objective, task=None):
    task, problems = task or Quiet(), [Parity().draw(Random(seed)) for seed in range(4)]
    experience = answer(MODEL, TOKENIZER, Parity(), problems, samples=4, seed=3, **HOW)
    experience.rollout = rollout(experience.rollout)
    return selfcheck(experience, task, TOKENIZER.end, functools.partial(score, MODEL), objective, list(MODEL.parameters()),
                     "sequence_mean", 4, 1e-4)


def test_a_sound_setup_is_told_how_sound_it_is():
    assert check().startswith("Self-check: sampler and scorer agree to ")


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


def unstopped(rollout):
    rollout.tokens[rollout.finished, rollout.lengths[rollout.finished] - 1] = 0
    return rollout


def short(rollout):
    """The stop token is outside the mask."""
    rollout.lengths = rollout.lengths - rollout.finished.long()
    return rollout


@pytest.mark.parametrize("fault, says", [
    (dict(score=colder), "sampler and scorer differ"), (dict(score=padded), "the same weights give ratios"),
    (dict(objective=averaged), "the sum of its parts'"), (dict(rollout=unstopped), "without a stop token"),
    (dict(rollout=short), "without a stop token")])
def test_what_is_broken_is_named_in_one_sentence(fault, says):
    with pytest.raises(SelfCheckFailed, match=says) as error:
        check(**fault)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", [*map(make_task, TASKS), FileTask([(f"Say {n}.", f"{n}") for n in range(50)])],
                         ids=lambda task: task.name)
def test_our_verifiers_pass(task):
    check_verifier(task)


class Generous(Task):
    """Pays whoever says the answer anywhere."""

    name, lowest, default, highest = "generous", 1, 1, 1
    draw = TASKS["addition"]().draw

    def verify(self, problem, response):
        return float(problem.answer in response)


class Stingy(Generous):
    def verify(self, problem, response):
        return 0.0


@pytest.mark.parametrize("task, says", [(Generous(), "pays for"), (Stingy(), "refuses its own")])
def test_a_verifier_that_can_be_gamed_is_named(task, says):
    with pytest.raises(SelfCheckFailed, match=says):
        check_verifier(task)


def test_the_bound_is_stated_for_each_precision():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tolerance(cpu, "auto") == tolerance(cpu, "float32") == 1e-4
    assert tolerance(cpu, "bfloat16") == tolerance(cuda, "auto") > tolerance(cuda, "float32") > 1e-4
