"""Experience belongs together: each text is its row's, each reward its text's, and no step changes an answer."""

import hashlib
from itertools import groupby, pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorl import run
from nanorl.batches import micro_batches
from nanorl.data import response_mask
from nanorl.gpt import GPT, GPTConfig, ScalarGPT
from nanorl.rollout import (Experience, NoContrast, collect, describe, has_contrast, learned_rewards, sample_and_grade,
                            score_rollout)
from nanorl.run.checkpoint import FORMAT
from nanorl.sample import Rollout, Sampling, generate, token_log_probs
from nanorl.tasks import FileTask, Problem, Stories, Task, is_heldout
from nanorl.tokenizer import Tokenizer

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32)
TOKENIZER = Tokenizer.train("What is 12+34? 2+4=6, 1+3=4. Answer: 46\n" * 3, 280)
SAMPLING = Sampling(max_new_tokens=4)
GREEDY = Sampling(max_new_tokens=4, temperature=0.0)


class Parity(Task):
    """Rewards that look like chance but are a function of prompt and response: half of all answers are right."""

    name, right_reward = "parity", 1.0

    def draw(self, rng):
        return Problem(f"Say {rng.randrange(10**rng.randint(1, 5))}.", "")

    def verify(self, problem, response):
        return float(hashlib.sha256(f"{problem.prompt}/{response}".encode()).digest()[0] % 2)


class Same(Parity):
    """No two answers differ in reward."""

    def verify(self, problem, response):
        return 1.0


def make_model(seed: int = 0) -> GPT:
    """A random model. No layer writes into coordinate 0, which is large and speaks for <|end|>: of seed 0's answers,
    about half stop within four tokens and half are cut, and its groups of two differ about as often as not."""
    model = GPT(GPTConfig(TOKENIZER.vocab_size, context=64, layers=1, width=16, heads=2)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=1.0 if p.ndim == 1 else 0.5, generator=generator)
        model.blocks[0].attention.out.weight[0] = model.blocks[0].mlp.down.weight[0] = model.head.weight[:, 0] = 0.0
        model.norm.weight.fill_(1.0)
        model.embedding.weight[:, 0] = 30.0
        model.head.weight[TOKENIZER.end, 0] = 1.4
    return model


MODEL = make_model()


def assert_belongs_together(experience: Experience, task: Task, samples: int) -> None:
    """Row b answers problem b // G: its prompt ids, its text, its reward and its log-probs all say so."""
    out, problems = experience.rollout, experience.problems
    assert experience.rewards.shape == (len(problems), samples)
    assert len(out.tokens) == len(experience.texts) == len(problems) * samples
    assert out.prompt_index.tolist() == [p for p in range(len(problems)) for _ in range(samples)]
    for row, (text, reward) in enumerate(zip(experience.texts, experience.rewards.flatten().tolist(), strict=True)):
        problem = problems[row // samples]
        prompt = TOKENIZER.render(problem.prompt)
        assert out.tokens[row, : len(prompt)].tolist() == prompt and out.prompt_lengths[row] == len(prompt)
        assert text == TOKENIZER.decode(out.responses()[row])
        assert reward == (task.verify(problem, text) if out.finished[row] else 0.0)
    logp, _ = token_log_probs(MODEL, out.tokens, out.mask)
    torch.testing.assert_close(logp.float(), out.logp, rtol=0, atol=1e-5)


# ---- Answers ----


@given(seeds, st.integers(1, 5), st.integers(1, 4))
@quick
def test_every_answer_is_verified_against_its_own_problem(seed, count, samples):
    task, rng = Parity(), Random(seed)
    problems = [task.draw(rng) for _ in range(count)]
    experience = sample_and_grade(MODEL, TOKENIZER, task, problems, SAMPLING, samples=samples, seed=seed)
    assert experience.problems == problems
    assert_belongs_together(experience, task, samples)


@given(seeds, st.sampled_from([0, 2]))
@quick
def test_shuffled_problems_take_their_answers_along(seed, model_seed):
    """Greedy answers are a function of the problem: in any order, each problem keeps its text and its reward.

    Greedily, model 0 stops at once, so its rewards tell the prompts apart; model 2 talks on, so its texts do.
    """
    task, rng, model = Parity(), Random(seed), make_model(model_seed)
    problems = [task.draw(rng) for _ in range(6)]
    found = []
    for order in (problems, rng.sample(problems, 6)):
        experience = sample_and_grade(model, TOKENIZER, task, order, GREEDY)
        prompts, rewards = [problem.prompt for problem in order], experience.rewards[:, 0].tolist()
        found.append(sorted(zip(prompts, experience.texts, rewards, strict=True)))
    assert found[0] == found[1]


def test_an_answer_that_was_cut_scores_nothing():
    """Even where the verifier would pay for it. Finished answers are paid, and both kinds occur."""
    problems = [Same().draw(Random(seed)) for seed in range(8)]
    experience = sample_and_grade(MODEL, TOKENIZER, Same(), problems, SAMPLING, samples=4)
    finished = experience.rollout.finished
    assert 0 < finished.sum() < 32
    assert torch.equal(experience.rewards.flatten(), finished.float())


def test_contrast_is_a_difference_within_a_group():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.4]])
    assert has_contrast(rewards).tolist() == [False, False, True, True]


def test_whether_answers_fit_the_context_is_checked_with_the_longest_prompt():
    """A prompt and an answer may fill the context to the last token; one more is refused in one sentence."""
    task = FileTask([(f"What is {n}?" + " and so on" * (n == 50), "1") for n in range(100)])
    prompts = [TOKENIZER.render(problem.prompt) for problem in task.examples()]
    longest = max(map(len, prompts))
    run.check_fits_context(prompts, (64 - longest, "--limit"), MODEL)
    with pytest.raises(ValueError) as error:
        run.check_fits_context(prompts, (65 - longest, "--limit"), MODEL)
    text = str(error.value)
    assert "\n" not in text and len(text) < 250 and str(65 - longest) in text and "64" in text


# ---- Collecting ----


@given(seeds, st.integers(1, 4), st.integers(2, 4))
@quick
def test_collected_problems_are_training_problems_of_the_seed(seed, prompts, samples):
    """One seed, one experience; none of the problems is held out."""
    runs = [collect(MODEL, TOKENIZER, Parity(), SAMPLING, prompts=prompts, samples=samples, seed=seed) for _ in range(2)]
    assert runs[0].problems == runs[1].problems and runs[0].texts == runs[1].texts
    assert torch.equal(runs[0].rewards, runs[1].rewards) and torch.equal(runs[0].rollout.tokens, runs[1].rollout.tokens)
    assert len(runs[0].problems) == prompts and not any(is_heldout(p.prompt) for p in runs[0].problems)
    assert runs[0].resampled == 0
    assert_belongs_together(runs[0], Parity(), samples)


@given(seeds, st.integers(1, 6), st.integers(2, 3))
@quick
def test_resampling_returns_groups_with_contrast_only(seed, prompts, samples):
    """As many groups as were asked for, each with contrast, put together from several draws with no row gone astray."""
    experience = collect(MODEL, TOKENIZER, Parity(), SAMPLING, prompts=prompts, samples=samples, seed=seed, resample=True)
    assert len(experience.problems) == prompts and has_contrast(experience.rewards).all()
    assert not any(is_heldout(p.prompt) for p in experience.problems)
    assert_belongs_together(experience, Parity(), samples)


def test_resampling_keeps_what_the_first_draw_gave():
    """The groups with contrast of a plain collection come first, as they were; at least the others are counted."""
    plain = collect(MODEL, TOKENIZER, Parity(), SAMPLING, prompts=12, samples=2, seed=3)
    full = collect(MODEL, TOKENIZER, Parity(), SAMPLING, prompts=12, samples=2, seed=3, resample=True)
    index = has_contrast(plain.rewards).nonzero().squeeze(-1).tolist()
    assert 0 < len(index) < 12
    assert full.problems[: len(index)] == [plain.problems[p] for p in index]
    assert full.texts[: 2 * len(index)] == [plain.texts[2 * p + g] for p in index for g in range(2)]
    assert torch.equal(full.rewards[: len(index)], plain.rewards[index])
    assert full.resampled >= 12 - len(index)


def test_a_text_begins_with_its_opening():
    """What was forced is part of the answer that the verifier reads, and of the prompt that the mask leaves out."""
    problems, opening = [Problem("What is 1+2?", "3")] * 2, TOKENIZER.encode("Answer")
    found = sample_and_grade(MODEL, TOKENIZER, Parity(), problems, SAMPLING, openings=[opening, []])
    assert found.texts[0].startswith("Answer") and not found.texts[1].startswith("Answer")
    assert found.rollout.prompt_lengths[0] == found.rollout.prompt_lengths[1] + len(opening)


def test_every_draw_of_a_resampled_step_has_numbers_of_its_own(monkeypatch):
    """Replacements are sampled with other seeds than the groups that they replace."""
    seeds = []

    def sampled(*args, seed, **kwargs):
        seeds.append(seed)
        return generate(*args, seed=seed, **kwargs)

    monkeypatch.setattr("nanorl.rollout.generate", sampled)
    collect(MODEL, TOKENIZER, Parity(), SAMPLING, prompts=12, samples=2, seed=3, resample=True)
    assert len(seeds) == len(set(seeds)) > 1


def test_resampling_gives_up_with_a_clear_error():
    """A policy that always gets the same reward has no contrast to find: bounded, and the sentence says what to do."""
    with pytest.raises(NoContrast) as error:
        collect(MODEL, TOKENIZER, Same(), SAMPLING, prompts=2, samples=1, seed=0, resample=True)
    text = str(error.value)
    assert "\n" not in text and len(text) < 250
    assert "0 of 40" in text and "2 are wanted" in text and "--groups" in text


@pytest.mark.parametrize("resample", [False, True])
def test_a_run_goes_through_a_file_row_by_row_and_epoch_by_epoch(resample):
    """Each step goes on where the one before left off; one that resamples counts what it has thrown away. Resumed from a
    checkpoint's state, it goes on as if it had not been stopped."""
    class Half(FileTask):
        verify = Parity.verify

    task, asked, states = Half([(f"Say {n}.", "x") for n in range(30)]), [], [{}]
    rows = task.rows("train")

    def step(state, seed):
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanorl.rollout.sample_and_grade",
                          lambda *args, **kwargs: found.extend(args[3]) or sample_and_grade(*args, **kwargs))
            experience = collect(MODEL, TOKENIZER, task, SAMPLING, prompts=4, samples=2, seed=seed, resample=resample,
                                 state=state)
        assert len(found) == 4 + experience.resampled and set(experience.problems) <= set(found)
        return found

    for seed in range(12):
        states.append(dict(states[-1]))
        asked += step(states[-1], seed)
    epochs = [asked[i : i + len(rows)] for i in range(0, len(asked) - len(rows) + 1, len(rows))]
    assert len(epochs) > 1 + resample and all(sorted(map(str, epoch)) == sorted(map(str, rows)) for epoch in epochs)
    assert epochs[0] != epochs[1] and states[-1] == {"drawn": len(asked)}
    start = states[5]["drawn"]
    assert step(dict(states[5]), 5) == asked[start : states[6]["drawn"]]


def test_a_step_may_ask_for_more_prompts_than_there_are_rows():
    task = FileTask([(f"Say {n}.", "x") for n in (0, 1, 3)])
    found = collect(MODEL, TOKENIZER, task, SAMPLING, prompts=8, samples=2, seed=0)
    assert sorted(found.problems.count(problem) for problem in task.problems) == [2, 3, 3]
    assert found.rollout.prompt_index.tolist() == [p for p in range(8) for _ in range(2)]


def test_a_step_without_contrast_leaves_the_file_where_it_was():
    task, state = FileTask([(f"Say {n}.", "x") for n in range(30)]), {"drawn": 3}
    with pytest.raises(NoContrast):
        collect(MODEL, TOKENIZER, task, SAMPLING, prompts=4, samples=1, seed=0, resample=True, state=state)
    assert state == {"drawn": 3}


# ---- Describing ----


def experience_of(rewards: list[list[float]], lengths: list[int], finished: list[bool], texts: list[str],
                  task: Task | None = None) -> Experience:
    """What `describe` looks at, made up: prompts of 3 tokens and responses of these lengths."""
    B, T = len(lengths), 3 + max(lengths)
    rollout = Rollout(torch.zeros(B, T, dtype=torch.int64), torch.full((B,), 3), 3 + torch.tensor(lengths),
                      response_mask(torch.full((B,), 3), 3 + torch.tensor(lengths), T), torch.zeros(B, T - 1),
                      torch.tensor(finished), torch.arange(B) // len(rewards[0]))
    return Experience(task or Parity(), rollout, [Problem(f"p{n}", "") for n in range(len(rewards))], texts,
                      torch.tensor(rewards), [[r] for row in rewards for r in row], ["done"] * B, texts)


def described(experience):
    return {name.removeprefix("eval/"): value for name, value in describe(experience, "eval").items()}


def test_describe_is_what_one_counts_by_hand():
    texts = ["Answer: 1", "1+1=2. Answer: 2", "I think Answer: 9", "no idea"]
    experience = experience_of([[1.0, 1.0], [0.0, 0.5]], [2, 8, 5, 9], [True, True, True, False], texts)
    assert described(experience) == {
        "reward": 2.5 / 4, "length": 24 / 4, "worked": 2 / 4, "truncated": 1 / 4, "length_correct": 10 / 2,
        "length_wrong": 14 / 2, "reward_worked": 1.0 / 2, "reward_direct": 1.0 / 1, "distinct": 4 / 2, "no_contrast": 1 / 2}


def test_describe_tells_right_from_wrong_by_the_task():
    """Of rewards -1 and 1, and where the task calls no answer right: the mean reward is of rewards, accuracies are of right."""
    class Signed(Parity):
        right_reward = 1.0

    class Points(Parity):
        right_reward = None

    case = [[1.0, -1.0], [-1.0, 0.5]], [2, 8, 5, 9], [True] * 4, ["Answer: 1", "1+1=2. Answer: 2", "so Answer: 9", "no idea"]
    signed, points = (described(experience_of(*case, task())) for task in (Signed, Points))
    assert signed["reward"] == points["reward"] == -0.125
    assert signed["length_correct"] == 2 and signed["length_wrong"] == 22 / 3
    assert signed["reward_worked"] == 0 and signed["reward_direct"] == 1
    assert points["reward_worked"] == -1 and signed.keys() - points.keys() == {"length_correct", "length_wrong"}


def test_describe_leaves_out_the_mean_of_nothing():
    right = described(experience_of([[1.0, 1.0]], [2, 3], [True, True], ["Answer: 1", "Answer: 1"]))
    assert right == {"reward": 1, "length": 2.5, "worked": 0, "truncated": 0, "length_correct": 2.5, "reward_direct": 1,
                     "distinct": 1, "no_contrast": 1}
    wrong = described(experience_of([[0.0], [0.0]], [2, 3], [False, True], ["1+1=2. Answer: 3"] * 2))
    assert wrong == {"reward": 0, "length": 2.5, "worked": 1, "truncated": 0.5, "length_wrong": 2.5, "reward_worked": 0}


def test_stories_are_described_by_their_hidden_reward_and_its_points():
    """No reward, no ways of answering and no contrast: those belong to verifiers."""
    facts = described(experience_of([[2.0, 1.0]], [2, 3], [True, False], ["Ben felt sad.", "Ben is kind."], Stories()))
    assert facts == {"length": 2.5, "truncated": 0.5, "distinct": 2, "hidden_reward": 1.5,
                     "hidden_feeling": 1, "hidden_thing": 0, "hidden_speech": 0, "hidden_praise": 0.5, "hidden_short": -4}


# ---- Scoring ----


def test_a_reward_model_must_read_the_policys_tokens(tmp_path):
    """Another tokenizer, even of the same size, would make the same ids mean other text."""
    other = Tokenizer.train("Who knows what this is about? Nobody.\n" * 3, TOKENIZER.vocab_size)
    model = scorer()
    torch.save({"format": FORMAT, "step": 0, "config": {}, "gpt": vars(model.config), "tokenizer": TOKENIZER.state_dict(),
                "model": model.state_dict(), "optimizer": [], "state": {}}, tmp_path / "ckpt.pt")
    model = run.load_frozen(str(tmp_path), "reward model", TOKENIZER, torch.device("cpu"))
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="another tokenizer"):
        run.load_frozen(str(tmp_path), "reward model", other, torch.device("cpu"))


def scorer(seed: int = 0) -> ScalarGPT:
    model = ScalarGPT(make_model(seed)).double()
    torch.nn.init.normal_(model.scalar.weight, generator=torch.Generator().manual_seed(seed))
    return model


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 9), st.integers(1, 40), seeds)
@settings(max_examples=300, deadline=None)
def test_micro_batches_fit_and_hold_every_row_once(lengths, rows, long, seed):
    """No batch has more rows, or more tokens than that many rows of LONG, padding included, unless it is a single row; none
    could take the next row, too. The rows of a prompt come one after the other, and prompts in rising order of their longest
    row."""
    rng, count = Random(seed), len(lengths)
    chosen, prompts = rng.sample(range(count), rng.randint(1, count)), [rng.randrange(4) for _ in range(count)]
    lengths, index = torch.tensor(lengths), torch.tensor(prompts)
    logp = torch.zeros(count, 29)
    rollout = Rollout(torch.zeros(count, 30), lengths, lengths, logp < 0, logp, lengths > 0, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanorl.batches.LONG", long)
        batches = list(micro_batches(rollout, rows, torch.tensor(chosen)))
    tokens, order = rows * long, torch.cat([part for part, _ in batches])
    assert sorted(order.tolist()) == sorted(chosen)
    for part, longest in batches:
        assert longest == max(lengths[part]) and (len(part) == 1 or (len(part) <= rows and len(part) * longest <= tokens))
    longest_of = {p: max(int(lengths[row]) for row in chosen if prompts[row] == p) for p in index[chosen].tolist()}
    met = [p for p, _ in groupby(index[order].tolist())]
    assert len(met) == len(set(met)) and [longest_of[p] for p in met] == sorted(longest_of.values())
    for (part, _), (after, _) in pairwise(batches):
        following = longest_of[prompts[int(after[0])]]
        assert len(part) == rows or (len(part) + 1) * following > tokens


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 4), seeds)
@quick
def test_processes_share_prompts(prompts, processes, seed):
    """Every row belongs to one process, and all rows of a prompt to the same: they read it together."""
    count, index = len(prompts), torch.tensor(prompts)
    lengths, owner = torch.randint(2, 9, (count,), generator=torch.Generator().manual_seed(seed)), {}
    logp = torch.zeros(count, 8)
    rollout = Rollout(torch.zeros(count, 9), lengths, lengths, logp < 0, logp, lengths > 0, index)
    for rank in range(processes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanorl.run.ranks.rank", lambda rank=rank: rank)
            patch.setattr("nanorl.run.ranks.count", lambda: processes)
            for part, _ in micro_batches(rollout, 3):
                for row in part.tolist():
                    assert row not in owner
                    owner[row] = rank
    assert len(owner) == count and len({(prompts[row], rank) for row, rank in owner.items()}) == len(set(prompts))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_rollouts_are_scored_and_judged_alike_in_any_batches(size):
    """log-probs of the sampled tokens, and a reward at the last real token: those of each row on its own."""
    rollout = collect(MODEL, TOKENIZER, Parity(), SAMPLING, prompts=5, samples=2, seed=1).rollout
    other, model = make_model(1), scorer()
    logp, rewards = score_rollout(other, rollout, 0.7, size), learned_rewards(model, rollout, size)
    assert not logp.requires_grad and not rewards.requires_grad and len(rewards.unique()) > 5
    for row, n in enumerate(rollout.lengths.tolist()):
        tokens, mask = rollout.tokens[row : row + 1, :n], rollout.mask[row : row + 1, : n - 1]
        alone, _ = token_log_probs(other, tokens, mask, temperature=0.7)
        torch.testing.assert_close(logp[row, : n - 1], alone[0].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rewards[row], model(tokens)[0, -1].float(), rtol=1e-5, atol=1e-5)
    assert (logp[~rollout.mask] == 0).all()
