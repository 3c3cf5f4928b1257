"""Episodes: what was sampled is what is trained on, and what the environment said is neither."""

import functools
import hashlib
import io
import json
import math
import re
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ranks import assert_same_run, on_two_processes
from test_rollout import MODEL
from test_rollout import TOKENIZER as ORDINARY
from torch.testing import assert_close
from world import ROOT, SCRIPTS, metrics, start

import train_distill
import train_dpo
import train_group_dpo
import train_grpo
import train_ppo
import train_sft
from experiments.turns import encoded_again, weights_by_whole_length, whole
from nanorl import chat, evaluate, run
from nanorl.data import response_mask
from nanorl.first_step import FirstStepCheckFailed, first_step_check
from nanorl.ops import gae, token_weights
from nanorl.rollout import describe, lenient_values, sample_and_grade, score_rollout
from nanorl.sample import Sampling, generate, token_log_probs
from nanorl.search import sample_answers
from nanorl.tasks import Guess, Problem, Task, make_task
from nanorl.tasks.rewards import RewardFunction
from nanorl.tokenizer import Tokenizer
from nanorl.turns import ENDS, Episodes

TOKENIZER = Tokenizer(ORDINARY.ranks)
TOKENIZER.stop_ids = {TOKENIZER.end, *range(0, 250, 3)}         # an untrained model says one of these soon
quick = settings(max_examples=5, deadline=None)
seeds = st.integers(0, 2**32)


class World(Task):
    """An environment that says, pays and ends as chance would, but as a function of the conversation."""

    name = "world"
    max_actions, max_answer_tokens, max_episode_tokens = 4, 5, 50
    says = ("", "0", "more or less", "so it goes on and on")
    right_reward = None
    unscored = False

    def draw(self, rng):
        return Problem(f"What is {rng.randrange(100)}?", "1")

    def chance(self, state, action):
        return Random(hashlib.sha256(f"{state.conversation} {action}".encode()).hexdigest())

    def observe(self, state, action):
        return self.chance(state, action).choice([None, *self.says])

    def verify(self, state, action):
        number = self.chance(state, action).random()
        return None if self.unscored and number < 0.2 else number

    def direct(self, problem, rng):
        return "1"


def play(task=None, prompts=4, samples=3, seed=0, slots=None, temperature=1.0, compile=False, model=MODEL):
    task = task or World()
    problems = [task.draw(Random(f"{seed} {i}")) for i in range(prompts)]
    sampling = Sampling(task.max_answer_tokens, temperature, slots, compile)
    return sample_and_grade(model, TOKENIZER, task, problems, sampling, samples=samples, seed=seed)


def replay(task, problem, ids):
    """An episode read again from its ids alone: mask, rewards of its actions and why it ended. What follows an action that
    stopped must be what the environment says to it, in the renderer's words."""
    at = len(TOKENIZER.render(problem.conversation))
    room, state, mask, rewards = at + task.max_episode_tokens, problem, [False] * at, []
    assert ids[:at] == TOKENIZER.render(problem.conversation)
    while True:
        end = at
        while end < len(ids) and end - at < task.max_answer_tokens and (end == at or ids[end - 1] not in TOKENIZER.stop_ids):
            end += 1
        stopped = ids[end - 1] in TOKENIZER.stop_ids
        mask += [True] * (end - at)
        action = TOKENIZER.decode(ids[at : end - stopped])
        rewards.append(task.verify(state, action) if stopped else 0.0)
        if not stopped:
            assert end == len(ids) and (end - at == task.max_answer_tokens or end == room)
            return mask, rewards, "truncated"
        said = task.observe(state, action)
        given = TOKENIZER.render_observation(said or "")
        why = ("done" if said is None else "out_of_turns" if len(rewards) == task.max_actions
               else "out_of_room" if end + len(given) >= room else None)
        if why:
            assert end == len(ids)
            return mask, rewards, why
        assert ids[end : end + len(given)] == given
        mask += [False] * len(given)
        at, state = end + len(given), state.after(action, said)


@given(seeds, st.integers(1, 3), st.sampled_from([None, 1, 5]), st.sampled_from([1.0, 0.7, 0.0]), st.integers(20, 50))
@settings(max_examples=20, deadline=None)
def test_an_episode_is_actions_and_what_the_environment_said_to_them(seed, samples, slots, temperature, room):
    """Every row can be told from its ids: mask, lengths, rewards, and why it ended. Any number of slots gives the same."""
    task = World()
    task.max_episode_tokens = room
    found = play(task, samples=samples, seed=seed, slots=slots, temperature=temperature)
    out = found.rollout
    for row, (ids, n) in enumerate(zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)):
        mask, rewards, why = replay(task, found.problems[row // samples], ids[:n])
        assert out.mask[row].tolist() == mask[1:] + [False] * (out.mask.shape[1] + 1 - n)
        assert found.action_rewards[row] == pytest.approx(rewards) and found.ends[row] == why
        assert found.rewards.flatten()[row].item() == pytest.approx(sum(rewards))
        assert bool(out.finished[row]) == (why != "truncated") and not any(ids[n:])
    assert (out.logp[~out.mask] == 0).all() and out.tokens.shape[1] == out.lengths.max()


def test_every_way_to_end_occurs():
    """And so do rows of one action and of the most that there may be: what these tests are about is there."""
    task = World()
    task.max_episode_tokens = 30
    found = play(task, prompts=20, samples=8, seed=3)
    assert set(found.ends) == set(ENDS)
    assert {len(rewards) for rewards in found.action_rewards} == {1, 2, 3, 4}
    facts = describe(found, "rollout")
    assert facts["rollout/turns"] == sum(map(len, found.action_rewards)) / 160
    assert facts["rollout/out_of_room"] == found.ends.count("out_of_room") / 160
    assert facts["rollout/length"] == pytest.approx(sum(len(ids) + 1 for row in found.rollout.actions() for ids in row) / 160
                                                    - found.ends.count("truncated") / 160)


@given(seeds, st.sampled_from([1.0, 0.7]))
@quick
def test_an_actions_log_probs_are_the_scorers(seed, temperature):
    """On the same ids, to 1e-5: the cache went on from turn to turn as if the row had been read at once."""
    out = play(seed=seed, slots=3, temperature=temperature).rollout
    assert out.mask.any() and len(out.actions()) == 12
    assert_close(score_rollout(MODEL, out, temperature, 5), out.logp, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_decoding_plays_the_same_episodes():
    plain, compiled = (play(compile=compile, seed=4, slots=6).rollout for compile in (False, True))
    assert torch.equal(plain.tokens, compiled.tokens) and torch.equal(plain.mask, compiled.mask)
    assert_close(plain.logp, compiled.logp, atol=1e-5, rtol=1e-5)


@given(seeds)
@quick
def test_a_row_does_not_depend_on_the_rows_beside_it(seed):
    """Nor on how long those go on: the uniform number of a place is its own."""
    whole = play(seed=seed).rollout
    alone = play(prompts=1, seed=seed).rollout
    for name in ("lengths", "prompt_lengths", "finished"):
        assert torch.equal(getattr(whole, name)[:3], getattr(alone, name))
    T = alone.tokens.shape[1]
    assert torch.equal(whole.tokens[:3, :T], alone.tokens) and torch.equal(whole.mask[:3, : T - 1], alone.mask)


class Other(World):
    """Says something else to a second action."""

    def observe(self, state, action):
        said = super().observe(state, action)
        return "quite another thing" if state.before and said is not None else said


@given(seeds)
@quick
def test_what_the_environment_says_changes_nothing_before_it(seed):
    """No token, log-prob or gradient of earlier tokens."""
    a, b = (play(task, seed=seed).rollout for task in (World(), Other()))
    second = (a.mask & (~a.mask).cumsum(-1).gt(a.prompt_lengths[:, None] - 1)).int()       # sampled after an observation
    T = min(a.tokens.shape[1], b.tokens.shape[1]) - 1
    until = torch.where(second.any(-1), second.argmax(-1), a.lengths - 1).clamp(max=T)      # where the second action begins
    early = a.mask[:, :T] & (torch.arange(T) < until[:, None])
    assert (b.mask[:, :T] >= early).all()
    assert torch.equal(a.tokens[:, 1 : T + 1][early], b.tokens[:, 1 : T + 1][early])
    assert_close(a.logp[:, :T][early], b.logp[:, :T][early], atol=1e-5, rtol=1e-5)
    gradients = []
    for out in (a, b):
        logp, _ = token_log_probs(MODEL, out.tokens[:, : T + 1], early)
        gradients.append(torch.autograd.grad(logp.sum(), MODEL.parameters()))
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y, atol=1e-5, rtol=1e-4)


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
@settings(deadline=None)
def test_demonstrations_are_read_as_episodes_are_written(prompt, action, observation):
    """The renderer's conversation after an action is the ids so far, the action, and the observation's."""
    tokenizer, state = ORDINARY, Problem(prompt, "")
    ids = tokenizer.render(state.conversation)
    for _ in range(2):
        ids = ids + tokenizer.render_response(action) + tokenizer.render_observation(observation)
        state = state.after(action, observation)
        assert tokenizer.render(state.conversation) == ids
    assert state.is_heldout == Problem(prompt, "").is_heldout


# ---- Credit ----


@given(seeds, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_advantages_skip_what_was_not_sampled(seed, gamma, lam):
    """GAE on any mask is its definition on the sampled tokens alone: sum_k (gamma lam)^k delta_{t+k}."""
    g = torch.Generator().manual_seed(seed % 2**63)
    mask = torch.rand(3, 9, generator=g) < 0.6
    rewards, values = torch.randn(2, 3, 9, generator=g, dtype=torch.float64)
    bootstrap = torch.randn(3, generator=g, dtype=torch.float64)
    adv, returns = gae(rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.inf), mask, gamma, lam, bootstrap)
    for b in range(3):
        r, v = rewards[b][mask[b]], torch.cat((values[b][mask[b]], bootstrap[b : b + 1]))
        delta = r + gamma * v[1:] - v[:-1]
        expected = torch.stack([sum(((gamma * lam) ** k * d for k, d in enumerate(delta[t:])), torch.zeros((), dtype=r.dtype))
                                for t in range(len(r))]) if len(r) else r
        assert_close(adv[b][mask[b]], expected, atol=1e-9, rtol=1e-9)
        assert_close(returns[b][mask[b]], expected + v[:-1], atol=1e-9, rtol=1e-9)
    assert not adv[~mask].any() and not returns[~mask].any()


def test_an_actions_reward_is_at_its_last_token():
    found = play(seed=1)
    out, paid = found.rollout, found.token_rewards()
    for row, runs in enumerate(found.action_rewards):
        ends = [t for t in range(out.mask.shape[1]) if out.mask[row, t] and not out.mask[row, t + 1 : t + 2].any()]
        assert paid[row].nonzero().flatten().tolist() == [t for t, r in zip(ends, runs, strict=True) if r]
        assert paid[row, ends].tolist() == pytest.approx(runs)


def test_an_episode_that_could_not_be_scored_enters_no_mean():
    task = World()
    task.unscored = True
    found = play(task, prompts=8, samples=4, seed=2)
    unscored = torch.tensor([any(math.isnan(r) for r in runs) for runs in found.action_rewards])
    assert 0 < unscored.sum() < 32 and torch.equal(found.rewards.flatten().isnan(), unscored)
    cfg = train_grpo.Config(init="x", group=4)
    adv, mask = train_grpo.advantages(cfg, found.rollout, found.rewards, found.rollout.logp, None, {})
    assert adv.isfinite().all() and not mask[unscored].any() and torch.equal(mask[~unscored], found.rollout.mask[~unscored])


class Parted(World):
    unscored = True

    def verify(self, state, action):
        number = super().verify(state, action)
        return number if number is None else {"half": number / 2, "rest": number / 2}


def test_parts_of_episodes_add_up_to_their_rewards():
    """Also where an action could not be scored: then neither the episode nor its parts enter a mean."""
    found = play(Parted(), prompts=8, samples=4, seed=2)
    assert 0 < found.rewards.isnan().sum() < 32
    torch.testing.assert_close(found.parts["half"] + found.parts["rest"], found.rewards, equal_nan=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_stands_at_observations_reaches_nothing(poison):
    """No loss, metric or gradient of GRPO's and PPO's objectives."""
    out = play(seed=5).rollout
    mask, found = out.mask, []
    weights = token_weights(mask, out.prompt_index, "token_mean")
    for fill in (0.0, poison):
        logp, values = (torch.full_like(out.logp, -1.0).masked_fill(~mask, fill).requires_grad_() for _ in range(2))
        x = out.logp.masked_fill(~mask, fill)
        losses = [train_grpo.objective(logp, x, torch.ones(len(x), 1), mask, weights, ref_logp=x, kl_coef=0.1),
                  train_ppo.objective(logp, x, x, mask, weights, values=values, old_values=x, returns=x)]
        loss = sum(loss for loss, _ in losses)
        sums = [m for _, metrics in losses for m in metrics.values()]
        found.append([loss, *sums, *torch.autograd.grad(loss, (logp, values))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


# ---- The environments ----


@pytest.mark.parametrize("name", ["calculator", "guess"])
@given(st.text(max_size=300), st.text(max_size=60))
@settings(deadline=None)
def test_environments_are_total_and_bounded_on_any_string(name, action, rest):
    task = make_task(name)
    for text in (action, f"calc({action})", f"calc({rest}*{rest})", "9" * len(action)):
        state = task.draw(Random(0))
        for _ in range(3):
            said = task.observe(state, text)
            assert said is None or len(said) <= 18
            assert 0 <= task.verify(state, text) <= 1
            state = state.after(text, said or "")


def test_the_calculator_calculates():
    task = make_task("calculator")
    state = Problem("What is 347+585?", "932")
    for call, said in {"calc(347+585)": "932", "calc(2*(3+4))": "14", "calc(3-5)": "-2", "calc()": "error",
                       "calc(9**9)": "error", "calc(999999*999999*9)": "error", "Answer: 932": None, "calc(1": None,
                       "": None}.items():
        assert task.observe(state, call) == said
    after = state.after("calc(347+585)", "932")
    assert [task.verify(after, text) for text in ("Answer: 932", "Answer: 933", "calc(932)")] == [1, 0, 0]


def test_bisection_of_32_numbers_takes_4_22_guesses():
    """Played against the environment, for every number; what it is paid is what Guess says, and no more can be had."""
    task, guesses = make_task("guess"), []
    for number in range(1, 33):
        state, low, high = Problem("", str(number)), 1, 32
        while len(state.before) < 20 and (said := task.observe(state, guess := str((low + high) // 2))):
            low, high = (int(guess) + 1, high) if "higher" in said else (low, int(guess) - 1)
            state = state.after(guess, said)
        guesses.append(1 + len(state.before) // 2)
        assert task.verify(state, guess) == pytest.approx(1 - (guesses[-1] - 1) / 10)
    assert sum(guesses) == 135
    assert sorted(guesses) == [1, *[2] * 2, *[3] * 4, *[4] * 8, *[5] * 16, 6]       # a tree of yes and no can hold no more


@given(st.integers(1, 32), st.lists(st.one_of(st.integers(0, 40).map(str), st.text(max_size=3)), min_size=1, max_size=9))
def test_what_guess_says_can_still_be_is_what_would_have_said_the_same(number, guesses):
    """Of 1 to 32, the numbers that would have had every guess so far higher or lower as it was."""
    task, state = make_task("guess"), Problem("", str(number))
    valid = [int(guess) for guess in guesses if re.fullmatch("[1-9]|[12][0-9]|3[0-2]", guess) and int(guess) != number]
    for guess in guesses:
        state = state.after(guess, task.observe(state, guess) or "")
    left = [n for n in range(1, 33) if all((guess < n) == (guess < number) and guess != n for guess in valid)]
    said = task.observe(state, "")
    assert said == f"no number, {left[0]} to {left[-1]}" and left == list(range(left[0], left[-1] + 1))


def test_demonstrations_of_an_episode_are_one_record_for_each_action():
    records = make_task("guess").demonstrations(300)
    assert records[:100] == make_task("guess").demonstrations(100)
    assert 150 < sum(not isinstance(record["prompt"], str) for record in records) < 300
    for record in records:
        prompt = record["prompt"]
        if not isinstance(prompt, str):
            assert [m["role"] for m in prompt] == ["user", *["assistant", "user"] * (len(prompt) // 2)]
            assert len(prompt) < 20
            assert all(re.fullmatch("(higher|lower), [0-9]+ to [0-9]+", m["content"]) for m in prompt[2::2])
    missed = sum(not low <= int(r["response"]) <= high for r in records if not isinstance(r["prompt"], str)
                 for low, high in [map(int, re.findall("[0-9]+", r["prompt"][-1]["content"]))])
    assert 0 < missed < 40          # most of one in ten
    calls = [r["response"] for r in make_task("calculator").demonstrations(300)]
    assert 0 < sum(c.startswith("calc") and "-" in c for c in calls) < sum(c.startswith("calc") for c in calls) < 150


@pytest.mark.parametrize("said", [7, b"higher", ["lower"]])
def test_an_observation_that_is_no_text_is_named(said):
    task = World()
    task.observe = lambda state, action: said
    with pytest.raises(run.UserError, match="task world: the observation after"):
        play(task, prompts=8)


def test_an_environment_that_says_nothing_is_a_task_with_one_answer():
    """There is no second path: a task of at most four actions whose environment always ends is the task of one."""
    class Single(World):
        max_actions, max_episode_tokens = 1, None

    class Silent(World):
        max_episode_tokens = World.max_answer_tokens

        def observe(self, state, action):
            return None

    a, b = play(Single(), seed=6), play(Silent(), seed=6)
    assert a.texts == b.texts and torch.equal(a.rewards, b.rewards) and a.ends == b.ends
    for x, y in zip(vars(a.rollout).values(), vars(b.rollout).values(), strict=True):
        assert torch.equal(x, y)


def shifted(rollout):
    """The mask with the first token of each observation."""
    return rollout.mask | (F.pad(rollout.mask[:, :-1], (1, 0)) & within(rollout))


def within(rollout):
    return response_mask(rollout.prompt_lengths, rollout.lengths, rollout.tokens.shape[1])


@pytest.mark.parametrize("mask, says", [(within, "more or fewer tokens than were sampled"), (shifted, "end with a stop token"),
                                        (lambda rollout: rollout.mask, None)])
def test_the_first_step_check_knows_turns(mask, says):
    found = play(prompts=8, samples=2, seed=1)
    found.rollout = replace(found.rollout, mask=mask(found.rollout))
    tried = (found, found.task, TOKENIZER.stop_ids, functools.partial(token_log_probs, MODEL), train_grpo.objective,
             list(MODEL.parameters()), "sequence_mean", 5, 1e-4)
    if says:
        with pytest.raises(FirstStepCheckFailed, match=says):
            first_step_check(*tried)
    else:
        assert first_step_check(*tried).startswith("First-step check: sampler and scorer agree to ")


def test_processes_share_episodes(monkeypatch):
    """Two processes play the episodes of one, masks, rewards and ends included."""
    whole, sent = play(prompts=5, seed=7), []
    monkeypatch.setattr("nanorl.run.ranks.count", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("nanorl.run.ranks.rank", lambda rank=rank: rank)
        monkeypatch.setattr("nanorl.run.ranks.gathered", lambda part: sent.append(part) or [part])
        play(prompts=5, seed=7)
    monkeypatch.setattr("nanorl.run.ranks.gathered", lambda part: sent)
    both = play(prompts=5, seed=7)
    assert (both.texts, both.ends, both.action_rewards) == (whole.texts, whole.ends, whole.action_rewards)
    for name in ("tokens", "mask", "lengths", "finished", "prompt_index"):
        assert torch.equal(getattr(both.rollout, name), getattr(whole.rollout, name))


def test_a_vote_and_a_lenient_reader_get_the_last_action():
    """Not what was said before it, nor the observations."""
    task = World()
    task.ballot, task.lenient = (lambda text: text), (lambda problem, text: len(text))
    found = play(task, prompts=8, seed=2)
    last = [TOKENIZER.decode(said[-1]) for said in found.rollout.actions()]
    assert found.answers == last != found.texts
    assert lenient_values(found).flatten().tolist() == list(map(len, last))
    problems = [task.draw(Random(f"2 {i}")) for i in range(8)]
    votes = sample_answers(MODEL, TOKENIZER, task, problems, Sampling(5), samples=3, seed=0, purpose="x").ballots
    again = sample_and_grade(MODEL, TOKENIZER, task, problems, Sampling(5), samples=3, seed=run.derive(0, "x", 0))
    assert [ballot for each in votes for ballot in each] == [
        text if done else None for text, done in zip(again.answers, again.rollout.finished, strict=True)]


def test_a_reward_function_reads_the_record_of_the_question():
    seen = []
    judge = RewardFunction(lambda *given: seen.append(given), "judge")
    for problem, record in ((Problem("2+2?", "4"), {"prompt": "2+2?", "answer": "4"}),
                            (Problem("2+2?", "4", record={"level": 1}), {"level": 1})):
        judge.score(problem, "calc(2+2)")
        judge.score(problem.after("calc(2+2)", "four"), "4")
        assert seen[-2:] == [("2+2?", "calc(2+2)", record), ("four", "4", record)]


# ---- Runs ----

OWN = '''
from nanorl.tasks import FileTask, Problem, Task


class Long(Task):
    name, max_actions, max_episode_tokens = "long", 2, 300

    def draw(self, rng):
        return Problem(f"Say {rng.randrange(99)}.", "1")

    def work(self, state, rng):
        return "Answer: 1"

    def observe(self, state, action):
        return "more"


class Short(Long):
    max_episode_tokens = 40


class Once(Long):
    max_actions = 1


class Endless(Long):
    max_episode_tokens = None


class Rows(FileTask):
    max_actions, max_episode_tokens, observe = 3, 250, Long.observe


rows = Rows([(f"Say {n}.", "1") for n in range(40)])
'''


@pytest.mark.parametrize("script, flags, name, says", [
    (train_grpo, "--init sft", "Long", "task long, max_episode_tokens 300: with prompts of up to "),
    (train_sft, "--init pretrain --demonstrations 9", "Long", "task long, max_episode_tokens 300: with prompts of up to "),
    (train_distill, "--init sft --teacher sft", "Long", "task long, max_episode_tokens 300: with prompts of up to "),
    (train_group_dpo, "--init sft", "rows", "tokens + task file, max_episode_tokens 250"),
    (evaluate, "", "Long", "task long, max_episode_tokens 300: with prompts of up to "),
    (train_grpo, "--init sft", "Once", "observe`, but max_actions is 1"),
    (evaluate, "", "Endless", "expected max_episode_tokens")])
def test_what_an_environment_says_of_its_limits_is_checked_before_it_is_played(script, flags, name, says, inside, tmp_path,
                                                                               capsys):
    (tmp_path / "own.py").write_text(OWN)
    task = f"--task {tmp_path}/own.py:{name} --device cpu --max-new-tokens 8"
    with pytest.raises(SystemExit):
        if script == evaluate:
            evaluate.main(run.parse(evaluate.Config, f"sft {task}".split()))
        else:
            start(script, f"{flags} {task}", tmp_path / "out")
    assert says in capsys.readouterr().err and not (tmp_path / "out/ckpt.pt").exists()


def test_an_episode_has_no_overlong_penalty():
    assert [train_grpo.Config(init="x", algo="dapo", task=task).overlong for task in ("calculator", "addition")] == [0, 0.2]


def test_a_chat_plays_the_environment_of_a_file_that_is_named(inside, tmp_path, monkeypatch, capsys):
    """And shows the probabilities of what was sampled. A file that only the run names is not run."""
    (tmp_path / "own.py").write_text(OWN)
    checkpoint = run.load_checkpoint("sft", "policy")
    checkpoint["config"]["task"] = f"{tmp_path}/own.py:Missing"
    monkeypatch.setattr("nanorl.run.load_checkpoint", lambda *_: checkpoint)
    tokenizer, model = run.tokenizer_from(checkpoint), run.model_from(checkpoint, torch.device("cpu"))
    shown = []
    for flags in ("", f" --task {tmp_path}/own.py:Short"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Say 1.\n"))
        chat.main(run.parse(chat.Config, f"sft --show probs --device cpu --max-new-tokens 12{flags}".split()))
        shown.append(capsys.readouterr().out.splitlines())
    task, ids = make_task(f"{tmp_path}/own.py:Short"), tokenizer.render("Say 1.")
    alone, said = (generate(model, [ids], max_new_tokens=12, stop_ids=tokenizer.stop_ids, seed=run.derive(0, 0), **turns)
                   for turns in ({}, {"observe": Episodes(task, tokenizer, [Problem("Say 1.", "")], [[]]).observe,
                                      "max_episode_tokens": 40}))
    for lines, mask, tokens in zip(shown, (alone.mask[0], said.mask[0]), (alone.tokens[0], said.tokens[0]), strict=True):
        rows = lines[1 : lines.index("", 1)] if "" in lines else lines[1:]
        assert len(rows) == int(mask.sum())
        for row, token in zip(rows, tokens[1:][mask].tolist(), strict=True):
            assert row.lstrip().startswith(chat.shown(tokenizer, token))
    assert len(said.actions()[0]) == 2 and len(alone.actions()[0]) == 1

TURNS = ("--steps 2 --prompts 3 --group 4 --init sft --eval-every 2 --eval-problems 3 --save-every 1 --quiet --device cpu "
         "--max-new-tokens 12 --entropy-coef 0.1 --task guess ")


@pytest.mark.parametrize("script, more, steps", [(train_grpo, "--minibatches 2 --micro-batch 5", 2),
                                                 (train_grpo, "--stale 1", 3), (train_ppo, "--best-of 0", 2)])
def test_a_run_with_turns_resumes_bit_for_bit_and_shows_its_episodes(inside, tmp_path, monkeypatch, script, more, steps):
    """One that stops a step early goes on with its queue. What a run keeps to look at has log-probs of actions alone."""
    monkeypatch.setattr(Guess, "max_actions", 3)
    flags = TURNS + more
    start(script, f"{flags} --steps {steps}", tmp_path / "whole")
    start(script, f"{flags} --steps {steps - 1}", tmp_path / "half")
    start(script, f"--resume --steps {steps}", tmp_path / "half")
    assert metrics(tmp_path / "whole")[-2] == metrics(tmp_path / "half")[-2]
    assert metrics(tmp_path / "whole")[-2]["train/grad_norm_max"] > 0 and metrics(tmp_path / "whole")[0]["rollout/turns"] > 1
    for line in map(json.loads, (tmp_path / "whole/rollouts.jsonl").read_text().splitlines()):
        for answer in line["answers"]:
            observed = [x is None for x in answer["before"]]
            assert observed == [x is None for x in answer["sampled"]] == [x is None for x in answer["after"]]
            assert all([not m for m in one["mask"]] == observed for one in answer["passes"])
    example = re.search(r"```\n(import json\n.*?)```", (ROOT / "docs/view.md").read_text(), re.S)[1]
    exec(example.replace("runs/grpo/rollouts.jsonl", str(tmp_path / "whole/rollouts.jsonl")), {})


@pytest.mark.slow
def test_a_run_with_turns_does_on_two_processes_what_it_does_on_one(inside, tmp_path):
    names = ("grpo", "ppo")
    on_two_processes(tmp_path, [(name, TURNS, tmp_path / f"{name}-two", None) for name in names])
    for name in names:
        start(SCRIPTS[name][0], TURNS, tmp_path / name)
        assert_same_run(tmp_path / f"{name}-two", tmp_path / name)
        first = metrics(tmp_path / name)[0]
        assert first["rollout/turns"] > 1 and first["train/grad_norm_max"] > 0


def test_the_environment_of_the_page_works():
    """The one in docs/turns.md: its demonstrations are episodes that get the full reward."""
    page, space = (ROOT / "docs/turns.md").read_text(), {"__name__": "phone"}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], space)
    task = space["Phone"]()
    records = task.demonstrations(40)
    assert task.right_reward == 1.0 and {r["response"][:5] for r in records} == {"find(", "Answe"}
    for problem in (task.draw(Random(i)) for i in range(10)):
        call = task.work(problem, Random(0))
        state = problem.after(call, task.observe(problem, call))
        assert task.verify(state, task.work(state, Random(0))) == 1.0 and task.observe(state, "Answer: 1") is None


def test_the_faults_of_the_experiment_are_those_that_it_names():
    """An action becomes what the encoder makes of it, with as many of its log-probs; all of an episode is trained on; a token
    counts 1 / (R |y|), y with the observations."""
    out = play(seed=1).rollout
    again = encoded_again(out, TOKENIZER)
    assert not torch.equal(out.tokens, again.tokens[:, : out.tokens.shape[1]])
    for a, b in zip(out.actions(), again.actions(), strict=True):
        assert [TOKENIZER.encode(TOKENIZER.decode(ids)) for ids in a] == b
    unchanged = [row for row, (a, b) in enumerate(zip(out.actions(), again.actions(), strict=True)) if a == b]
    assert unchanged
    for row in unchanged:
        assert torch.equal(out.logp[row, out.mask[row]], again.logp[row, again.mask[row]])
    assert again.logp.shape == again.mask.shape and not again.logp[~again.mask].any()
    assert torch.equal(whole(out.mask), within(out)) and (out.mask != whole(out.mask)).any()
    counted = weights_by_whole_length(out.mask, out.prompt_index, "sequence_mean")
    assert_close(counted, out.mask / (len(out.mask) * within(out).sum(-1, keepdim=True)))


def test_chat_and_evaluate_play_episodes(inside, tmp_path, monkeypatch, capsys):
    """A chat with a run on the calculator shows what it said; power sampling and pairs refuse."""
    start(train_grpo, TURNS + "--steps 1 --no-selfcheck", tmp_path / "run")
    checkpoint = run.load_checkpoint(tmp_path / "run", "policy")
    tokenizer, model = run.tokenizer_from(checkpoint), run.model_from(checkpoint, torch.device("cpu"))
    monkeypatch.setattr("sys.stdin", io.StringIO("Guess.\n"))
    chat.main(run.parse(chat.Config, [str(tmp_path / "run"), "--max-new-tokens", "12", "--device", "cpu"]))
    task = make_task("guess")
    problem = replace(task.draw(Random(run.derive(0, 0))), prompt="Guess.")
    episodes, ids = Episodes(task, tokenizer, [problem], [[]]), tokenizer.render("Guess.")
    said = generate(model, [ids], max_new_tokens=12, stop_ids=tokenizer.stop_ids, seed=run.derive(0, 0),
                    observe=episodes.observe, max_episode_tokens=task.max_episode_tokens)
    text = tokenizer.decode(said.responses()[0]) + ("" if said.finished[0] else " ...")
    assert capsys.readouterr().out.splitlines()[-1] == run.printable(text.replace("\n", r"\n"))
    flags = [str(tmp_path / "run"), "--problems", "4", "--n", "2", "--device", "cpu"]
    evaluate.main(run.parse(evaluate.Config, [*flags, "--method", "sample"]))
    assert "| sample" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main(run.parse(evaluate.Config, [*flags, "--method", "power"]))
    assert "has turns" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(train_dpo, "--online --task calculator --judge verifier --init sft --quiet --device cpu", tmp_path / "pairs")
    assert "has turns" in capsys.readouterr().err
