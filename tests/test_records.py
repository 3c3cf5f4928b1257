"""Tasks from files of one's own: prompts, messages before them, splits, verifiers, reward functions."""

import json
import math
import sys
from pathlib import Path
from random import Random

import pytest
import torch

import train_grpo
from nanorl import run
from nanorl.data import render_records
from nanorl.errors import UserError
from nanorl.family import ADVANTAGES
from nanorl.interop.templates import Template
from nanorl.rollout import describe, has_contrast, sample_and_grade
from nanorl.sample import Rollout
from nanorl.tasks import Addition, FileTask, Problem, Records, grade, is_heldout, make_task, use_reward
from test_rollout import MODEL, SAMPLING, TOKENIZER
from world import metrics, start, write_records

ROWS = [{"question": f"What is {n}+{n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(40)]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(Path("rows.jsonl"), ROWS)
    return "rows.jsonl"


# ---- Records ----


def test_a_task_of_a_file_asks_with_its_prompt_system_message_and_examples(rows):
    """The question alone decides on the split: stages with other prompts hold out the same records."""
    plain = Records(rows, verifier="number")
    dressed = Records(rows, prompt="{question} Think first.", system="Be brief.", shots=[("1+1?", "#### 2")], verifier="number")
    assert Records(rows, prompt="{prompt} Think first.", verifier="number").problems[3].prompt == dressed.problems[3].prompt
    computed = Records(rows, prompt=lambda record: record["question"].upper(), verifier="number")
    assert [p.prompt for p in plain.problems] == [row["question"] for row in ROWS]
    assert [p.prompt for p in computed.problems] == [row["question"].upper() for row in ROWS]
    assert dressed.problems[3].conversation == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "#### 2"}, {"role": "user", "content": "What is 3+3? Think first."}]
    assert plain.problems[3].conversation == "What is 3+3?" and plain.problems[3].record == ROWS[3]
    assert plain.held == dressed.held == computed.held == [is_heldout(row["question"]) for row in ROWS]
    assert 0 < sum(plain.held) < 40


def test_a_conversation_in_a_record_keeps_its_own_messages(tmp_path):
    talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3?"}]
    system = {"role": "system", "content": "own"}
    write_records(tmp_path / "talks.jsonl", [{"prompt": talk, "answer": 6}, {"prompt": [system, *talk], "answer": 6}])
    first, second = Records(str(tmp_path / "talks.jsonl"), system="given", verifier="number").problems
    assert first.before == (("system", "given"), ("user", "2+2?"), ("assistant", "4")) and first.question == "2+2?"
    assert second.before == (("system", "own"), ("user", "2+2?"), ("assistant", "4")) and second.prompt == "3+3?"


def test_another_file_may_be_held_out_and_what_it_asks_is_not_trained_on(rows, tmp_path):
    write_records(tmp_path / "others.jsonl", [*ROWS[:3], {"question": "Other?", "answer": "#### 7"}])
    task = Records(rows, verifier="number", heldout=str(tmp_path / "others.jsonl"))
    assert [p.prompt for p in task.rows("heldout")] == [*(row["question"] for row in ROWS[:3]), "Other?"]
    assert [p.prompt for p in task.rows("train")] == [row["question"] for row in ROWS[3:]]
    task.keep([0, 1, 37, 39])
    assert (len(task.rows("train")), len(task.rows("heldout"))) == (2, 2)


@pytest.mark.parametrize("prompt, says", [("{answers} !", "KeyError"), ("{question.nothing}", "AttributeError"),
                                          ("{", "ValueError"), (lambda record: None, "the prompt is None"),
                                          (lambda record: "", "the prompt is ''")])
def test_a_prompt_that_does_not_fit_is_named(prompt, says, rows):
    with pytest.raises(UserError, match=f"line 1: .*{says}"):
        Records(rows, prompt=prompt, verifier="number")


def test_demonstrations_of_a_file_are_its_responses_or_answers_in_the_form_that_is_read(rows, tmp_path):
    task = Records(rows, verifier="number", system="Be brief.")
    found = task.demonstrations(5)
    trained = [row for row, held in zip(ROWS, task.held, strict=True) if not held][:5]
    assert [record["response"] for record in found] == [row["answer"] for row in trained]
    assert found[0]["prompt"][0]["role"] == "system"
    assert all(task.verify(Problem("", said["response"]), said["response"]) for said in found)
    bare = [{"prompt": f"Say {n}.", "answer": n} for n in range(30)]
    write_records(tmp_path / "bare.jsonl", bare)
    assert Records(str(tmp_path / "bare.jsonl")).demonstrations(1)[0]["response"] == "Answer: 0"
    write_records(tmp_path / "said.jsonl", [row | {"response": f"so {row['answer']}"} for row in bare])
    assert Records(str(tmp_path / "said.jsonl")).demonstrations(1)[0]["response"] == "so 0"


def test_our_own_template_has_turns_and_no_system_message():
    """As the template that exported models get writes them."""
    talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3?"}]
    expected = [i for token, text in Template("nanorl").render(talk)
                for i in ([TOKENIZER.special[token]] if token else []) + TOKENIZER.encode(text)]
    assert TOKENIZER.render(talk) == expected and TOKENIZER.render(talk[-1:]) == TOKENIZER.render("3+3?")
    with pytest.raises(UserError, match="a system message; expected none"):
        TOKENIZER.render([{"role": "system", "content": "x"}, *talk])
    _, prompts, responses = render_records([{"prompt": talk, "response": "6"}], TOKENIZER, 128, "x", "response")
    assert prompts == [expected] and responses == [TOKENIZER.render_response("6")]


# ---- Programs ----

DOUBLE = "assert double(2) == 4\nassert double(x := 3) == 6"


@pytest.mark.parametrize("tests, readable", [
    ("assert f(2) == 4", True), ("assert f([1, 'a'], {'k': None}) == (1, 2)", True),
    (["assert f(1) == 1", "assert f(2) == 2"], True),
    ("assert f(2) == g(2)", False), ("assert f(2) != 4", False), ("assert f(1) == 1\nassert g(1) == 1", False),
    ("f(2) == 4", False),
    ("assert f(2) == 4 == 5", False), ("assert f(x=2) == 4", False), ("assert f(open('x')) == 4", False), ("", False),
    ("assert f(2) == 1e999", False), ("assert f(", False), (DOUBLE, False)])
def test_tests_are_read_and_never_run(tests, readable, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Write f.", "tests": tests}))
    try:
        assert Records(str(tmp_path / "p.jsonl"), verifier="code").problems and readable
    except UserError as e:
        assert not readable and "p.jsonl, " in str(e)


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_programs_are_judged_by_what_they_return():
    task = FileTask([("Write a function.", "assert twice(2) == 4\nassert twice('ab') == 'abab'")], verifier="code")
    good, f = "def twice(x):\n    return x * 2", "def f(x):\n    return x + x\ntwice = f"
    responses = [good, f, f"Here it is:\n```python\n{good}\n```\nDone.", "def twice(x): return 4", "def f(x): return x * 2", "",
                 good + "\nprint('", "twice = 3", "open('x')\n" + good, f"```\n{good}\n```\n" * 2, good + "\n" * 3000]
    assert grade(task, task.problems * 11, responses, [True] * 11).rewards == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert list(task.graded_examples()) == [] and task.lenient(task.problems[0], good) is None


# ---- Reward functions ----

FUNCTION = '''
def parts(prompt, response, record):
    assert record["question"] == prompt
    return {"short": -len(response) / 100, "digit": any(c.isdigit() for c in response)}

def none(prompt, response, record):
    return None if "5" in prompt else 1.0

def raises(prompt, response, record):
    record.clear()
    return 1 / ("5" not in prompt)

def always(prompt, response, record):
    return 1 / 0

def late(prompt, response, record):
    return float(len(response))
'''


@pytest.fixture
def mine(rows, tmp_path):
    (tmp_path / "my_rewards.py").write_text(FUNCTION)
    yield "my_rewards.py"


def rewarded(rows, function):
    task = Records(rows, verifier="none")
    use_reward(task, function)
    return task


def test_parts_are_added_up_and_logged_one_by_one(mine, rows):
    task = rewarded(rows, f"{mine}:parts")
    rewards, parts = grade(task, task.problems[:2], ["no", "12"], [True, True])
    assert rewards == pytest.approx([-0.02, 0.98]) and parts == {"short": [-0.02, -0.02], "digit": [0.0, 1.0]}
    assert grade(task, task.problems[:1], ["12"], [False]).rewards == [0.0]            # cut off: it does not pay
    experience = sample_and_grade(MODEL, TOKENIZER, task, task.problems[:3], SAMPLING, samples=2)
    facts = describe(experience, "rollout")
    assert facts["rollout/part_short"] + facts["rollout/part_digit"] == pytest.approx(float(
        sum(p.mean() for p in experience.parts.values())))
    assert facts["rollout/unscored"] == 0 and set(experience.parts) == {"short", "digit"}
    assert task.right_reward is None and task.measured == "reward"


def test_what_could_not_be_scored_enters_no_mean(mine, rows):
    task = rewarded(rows, f"{mine}:none")
    experience = sample_and_grade(MODEL, TOKENIZER, task, task.problems[4:7], SAMPLING, samples=2)
    assert experience.rewards[1].isnan().all() and not experience.rewards[[0, 2]].isnan().any()
    experience.rollout.finished[:] = True
    experience.rewards[[0, 2]] = 1.0
    facts = describe(experience, "rollout")
    assert facts["rollout/reward"] == 1.0 and facts["rollout/unscored"] == pytest.approx(1 / 3)
    assert "rollout/reward" not in describe(sample_and_grade(MODEL, TOKENIZER, task, task.problems[5:6], SAMPLING), "rollout")


def test_an_exception_is_shown_once_with_its_record_and_is_no_reward(mine, rows, capsys):
    task = rewarded(rows, f"{mine}:raises")
    rewards = grade(task, task.problems[4:7] * 2, ["x"] * 6, [True] * 6).rewards
    assert [math.isnan(reward) for reward in rewards] == [False, True, False] * 2 and task.reward.raised == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ZeroDivisionError" in error and "(line 11)" in error and "'What is 5+5?'" in error
    assert task.problems[5].record == ROWS[5]
    always = rewarded(rows, f"{mine}:always")
    assert all(map(math.isnan, grade(always, task.problems[:9], ["x"] * 9, [True] * 9).rewards))
    with pytest.raises(UserError, match=r"--reward my_rewards\.py:always: raised an exception on all 36 responses"):
        grade(always, task.problems[:9] * 3, ["x"] * 27, [True] * 27)
    assert all(map(math.isnan, grade(task, [task.problems[5]] * 40, ["x"] * 40, [True] * 40).rewards))     # others were scored


@pytest.mark.parametrize("name, says", [("my_rewards.py:nothing", "has no nothing"), ("no.py:f", "no.py does not exist"),
                                        ("my_rewards", "expected FILE.py:NAME")])
def test_a_reward_function_that_is_not_there_is_named(name, says, mine, rows):
    with pytest.raises(UserError, match=says):
        rewarded(rows, name)


def test_contrast_is_between_answers_that_were_scored():
    nan = math.nan
    assert has_contrast(torch.tensor([[1, nan], [1, 0], [nan, nan], [0, 0], [nan, 1], [nan, -1]])).tolist() == [
        False, True, False, False, False, False]
    assert has_contrast(torch.tensor([[1, nan, 0], [nan, 1, 1]])).tolist() == [True, False]


@pytest.mark.parametrize("advantage", [*ADVANTAGES])
@pytest.mark.parametrize("groups", ["all", "drop"])
def test_an_answer_that_could_not_be_scored_is_as_if_it_had_not_been_sampled(advantage, groups):
    """The advantages of the others are those of a smaller group, and none of its tokens is trained on."""
    algo = {"reward": "reinforce", "running_mean": "reinforce", "positive": "raft"}.get(advantage, "grpo")
    cfg = train_grpo.Config(init="x", algo=algo, advantage=advantage, groups=groups, group=4)

    def of(rewards):
        P, G = rewards.shape
        rollout = Rollout(torch.zeros(P * G, 5, dtype=torch.long), torch.full((P * G,), 2), torch.full((P * G,), 5),
                          torch.tensor([False, True, True, True]).repeat(P * G, 1), torch.zeros(P * G, 4),
                          torch.ones(P * G, dtype=torch.bool), torch.arange(P).repeat_interleave(G))
        adv, mask = train_grpo.advantages(cfg, rollout, rewards, rollout.logp, None, {"running_mean": (0.3, 1.0)})
        return adv.view(P, G), mask.any(-1).view(P, G)

    whole = torch.tensor([[1.0, 0, 0.5], [0, 0, 1]])
    with_nan = torch.cat((whole, torch.full((2, 1), math.nan)), dim=1)
    (adv, kept), (other, other_kept) = of(whole), of(with_nan)
    torch.testing.assert_close(other[:, :3], adv)
    assert torch.equal(other_kept[:, :3], kept) and not other_kept[:, 3].any() and other.isfinite().all()


@pytest.mark.parametrize("script", ["train_grpo", "train_ppo"])
def test_a_run_with_a_reward_function_of_ones_own(script, mine, tmp_path, inside):
    """Where some answers cannot be scored, everything that is logged is finite, and what it says is of the others."""
    (tmp_path / "my_rewards.py").write_text(FUNCTION.replace("float(len(response))",
                                                             "None if len(response) % 2 == 0 else len(response) / 9"))
    flags = f"--data {tmp_path / 'rows.jsonl'} --reward {tmp_path / mine}:late --steps 2 --prompts 4 --group 4 --device cpu "
    script = __import__(script)
    start(script, flags + "--init sft --max-new-tokens 8 --eval-problems 4 --quiet", tmp_path / "run")
    for line in metrics(tmp_path / "run"):
        assert None not in line.values()
    assert {"rollout/reward", "rollout/unscored"} <= metrics(tmp_path / "run")[0].keys()
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert all((sample["reward"] is None) == (len(sample["response"]) % 2 == 0) for sample in samples)


# ---- FILE.py:NAME as a task ----

TASKS_OF_MINE = '''
from nanorl.tasks import Addition, Problem, Records, Task

class Mine(Addition):
    max_answer_tokens = 33

made = Mine(2)
rows = Records("rows.jsonl", verifier="number")
number = 3

def late():
    return Mine(4)

def wrong():
    return 4

def judge(prompt, response, record):
    return 1.0

class Nameless(Addition):
    name = None

class Unlimited(Addition):
    max_answer_tokens = "80"

class Started(Addition):
    max_actions = None

class Roomless(Addition):
    max_actions, max_episode_tokens = 2, 0

def unread():
    return Records("rows.jsonl", verifier="regex")

def unfit():
    return Records("rows.jsonl", prompt="{prompt[x]}")

class Two(Task):
    name = "two"

    def __init__(self):
        self.drawn = 0          # without super().__init__()

    def draw(self, rng):
        self.drawn += 1
        return Problem(f"Say {self.drawn % 2}.", "x")
'''


def test_a_task_of_ones_own_is_named_by_its_file(rows, tmp_path):
    (tmp_path / "my_tasks.py").write_text(TASKS_OF_MINE)
    found = {name: make_task(f"my_tasks.py:{name}") for name in ("Mine", "made", "rows", "late")}
    assert [found[name].difficulty for name in ("Mine", "made", "late")] == [Addition.default_difficulty, 2, 4]
    assert isinstance(found["rows"], FileTask)
    for name, says in (("number", "is 3; expected a Task"), ("wrong", "is 4; expected a Task"), ("no", "has no no"),
                       ("judge", r"missing a required argument: 'prompt'; expected .* is --reward"),
                       ("Nameless", "with a `name`"),
                       ("Unlimited", "max_answer_tokens is '80'; expected"), ("Started", "max_actions is None"),
                       ("Roomless", "max_episode_tokens is 0"), ("unread", "verifier 'regex'; expected one of exact, "),
                       ("unfit", "does not fit the record")):
        with pytest.raises(UserError, match=says):
            make_task(f"my_tasks.py:{name}")
    cfg = train_grpo.Config(init="x", task="my_tasks.py:Mine")
    assert cfg.max_new_tokens == 33 and cfg.out == "runs/grpo-Mine"
    assert run.choose_task("my_tasks.py:rows", seed=7).seed == 7
    (tmp_path / "my_tasks.py").write_text("from nanorl.tasks import Records\nrows = Records('gone.jsonl')")
    sys.modules.pop("my_tasks")
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        make_task("my_tasks.py:rows")
    sys.modules.pop("my_tasks", None)


def test_prompts_that_all_fall_into_one_split_are_refused_not_drawn_for_ever(rows, tmp_path):
    (tmp_path / "my_tasks.py").write_text(TASKS_OF_MINE)
    task = make_task("my_tasks.py:Two")
    assert str(task) == "two" and not task.problem(Random(0), "all").is_heldout
    with pytest.raises(UserError, match=r"none of 10,000 problems is of the heldout split.*prompts that vary"):
        task.problem(Random(0), "heldout")
    sys.modules.pop("my_tasks", None)


@pytest.mark.parametrize("flags, says", [("--verifier number", "requires --data"),
                                         ("--data rows.jsonl --verifier number --reward m.py:f", "one of them judges")])
def test_flags_that_judge_twice_are_refused(flags, says, capsys):
    with pytest.raises(SystemExit):
        run.parse(train_grpo.Config, flags.split())
    assert says in capsys.readouterr().err


def test_lenient_accuracy_is_that_of_the_last_number(rows):
    task = Records(rows, verifier="number")
    problem = task.problems[7]
    for response, strict, lenient in (("#### 14", 1, 1), ("It is 14.", 0, 1), ("14, or 15", 0, 0), ("", 0, 0)):
        assert (task.verify(problem, response), task.lenient(problem, response)) == (strict, lenient)
    assert Records(rows).lenient(problem, "#### 14") is None
    assert task.draw(Random(0)) in task.problems
