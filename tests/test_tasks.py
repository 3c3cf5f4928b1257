"""The toy world: a verifier pays what is right and only that, splits never mix, data/ is what data/make.py makes."""

import ast
import importlib.util
import json
import math
import re
import time
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorl.errors import UserError
from nanorl.tasks import (
    TASKS,
    FileTask,
    Problem,
    Stories,
    Task,
    default_max_new_tokens,
    final_answer,
    grade,
    is_heldout,
    make_task,
    story,
)
from nanorl.tasks.arithmetic import parse_expression
from nanorl.tasks.base import MARKER, MAX_ANSWER_CHARACTERS, integers
from nanorl.tasks.sandbox import Sandbox
from nanorl.tasks.stories import ANY, NAMES, NUMBERS, PRAISE, opening_and_rest

DATA = Path(__file__).parent.parent / "data"
spec = importlib.util.spec_from_file_location("make", DATA / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

seeds = st.integers(0, 2**32)
VERIFIABLE = {name: task for name, task in TASKS.items() if task.verifiable and task.max_actions == 1}
names = st.sampled_from(sorted(VERIFIABLE))
levels = [f"{name}-{difficulty}" for name, task in VERIFIABLE.items() for difficulty in task.difficulties]
tasks = st.sampled_from(levels).map(make_task)
quick = settings(max_examples=100, deadline=None)
STORIES = Stories()
files = FileTask([(f"Capital of country {n}?", f"City {n}") for n in range(100)])


# ---- Verifiers ----

@pytest.mark.parametrize("level", levels)
def test_both_styles_of_answering_are_right(level):
    """At every difficulty the gold answer verifies, in both styles, and `style` tells them apart."""
    task, rng = make_task(level), Random(level.replace("-", " "))
    for _ in range(30):
        problem = task.draw(rng)
        direct, work = task.direct(problem, rng), task.work(problem, rng)
        assert task.verify(problem, direct) == task.verify(problem, work) == 1.0, (problem, work)
        assert task.style(work) == "worked" and task.style(direct) == "direct" and task.style("no answer") == ""
        assert task.name == "code" or final_answer(work) == final_answer(direct) == problem.answer


@settings(max_examples=25, deadline=None)
@given(names, seeds)
def test_demonstrations_are_right_train_problems_of_either_style(name, seed):
    """Never a held-out prompt, and three in ten are worked: of 200, within six standard deviations of 60. Only a direct
    program may be wrong."""
    task, rng = make_task(name), Random(seed)
    problems, responses = zip(*(task.demonstration(rng) for _ in range(200)), strict=True)
    assert not any(is_heldout(problem.prompt) for problem in problems)
    worked = [task.style(response) == "worked" for response in responses]
    assert 21 <= sum(worked) <= 99
    checked = slice(20) if name == "code" else slice(None)         # a program takes milliseconds
    right = task.rewards(problems[checked], responses[checked], [True] * len(problems[checked]))
    assert all(r == 1.0 or (name == "code" and not w) for r, w in zip(right, worked[checked], strict=True))


def test_only_a_single_marker_makes_an_answer_and_only_text_before_it_makes_it_worked():
    assert final_answer("7+5=12. Answer:  12 \n") == "12" and final_answer("Answer: ") == ""
    assert final_answer("12") is final_answer("Answer: 1 Answer: 2") is final_answer(MARKER + "x" * 257) is None
    style = make_task("addition").style
    assert style("so. Answer: 12") == style("so. Answer: 1 Answer: 2") == "worked"
    assert style(" \n Answer: 12") == "direct" and style("7+5=12, and that is all") == ""


MARKED = [  # each is tried after a marker
    "", " ", "\0", "٣", "９３２", "²", "-", "-1", "+1", "1 2", "1+", "*1", "()", ")(", "0x10", "1_0", "1e9", "NaN",
    "9**9**9", "99**98**97", "9**-1", "1/0", "10//3", "{answer}", "%s", "lambda: 1", "__import__('os').system('exit')",
    "().__class__.__bases__", "(" * 5_000, "(" * 100 + "1" + ")" * 100, "+" * 200, "1+" * 120 + "1", "Answer:",
    "\udfff", "9" * 1_000_000, "9*" * 500_000, "[" * 1_000_000, " " * 1_000_000,
]
BARE = [
    "", " ", "\n", "\0", "\ud800", "Answer:", "Answer:\u00a0932", "answer: 932", "9" * 1_000_000, "Answer" * 200_000,
    MARKER * 100_000, " " * 1_000_000 + MARKER, "<think>" + MARKER,
]


@pytest.mark.parametrize("name", [*VERIFIABLE, "file"])
def test_attacks_score_zero_in_bounded_time(name):
    """No trick pays, none raises, and a megabyte costs less than 50 ms."""
    task = files if name == "file" else make_task(name)
    problem = task.draw(Random(0))
    assert task.verify(problem, task.direct(problem, None)) == 1.0
    for text in [MARKER + attack for attack in MARKED] + BARE + task.adversarial(problem):
        for _ in range(3):              # the best of three: a pause of the machine is not the verifier's
            start = time.process_time()         # of this process: a program has limits of its own
            assert task.verify(problem, text) == 0.0, text[:80]
            if (seconds := time.process_time() - start) < 0.05:
                break
        assert seconds < 0.05, text[:80]


@settings(max_examples=400, deadline=None)
@given(tasks, seeds, st.lists(st.sampled_from([*"0123456789+-*() .,=٣９\0", MARKER, "yes"])).map("".join) | st.text())
def test_any_text_scores_0_or_1_and_always_the_same(task, seed, text):
    problem = task.draw(Random(seed))
    for response in (text, MARKER + text, problem.answer + text, MARKER + problem.answer + text):
        assert task.verify(problem, response) in (0.0, 1.0)
        assert task.verify(problem, response) == task.verify(problem, response)


@quick
@given(tasks.filter(lambda task: task.name not in ("countdown", "code")), seeds, st.data())
def test_any_other_answer_is_wrong(task, seed, data):
    """Replace, insert or delete a character anywhere, and it pays no more; nor do 0932 and 932 with a full stop."""
    problem = task.draw(Random(seed))
    gold = problem.answer
    i, c = data.draw(st.integers(0, len(gold) - 1)), data.draw(st.sampled_from("0123456789abc.+-,"))
    replaced, inserted, deleted = gold[:i] + c + gold[i + 1:], gold[:i] + c + gold[i:], gold[:i] + gold[i + 1:]
    for other in (replaced, inserted, deleted, "0" + gold, gold + "."):
        assert task.verify(problem, MARKER + other) == float(other == gold), (gold, other)


@quick
@given(seeds, st.integers(2, 6))
def test_countdown_wants_the_target_from_exactly_these_numbers(seed, difficulty):
    """Another value, a number too many, too few or changed: 0. The same sum in other words: 1."""
    task = make_task(f"countdown-{difficulty}")
    problem = task.draw(Random(seed))
    target, *given_numbers = integers(problem.prompt)
    assert parse_expression(problem.answer) == (target, sorted(given_numbers)) and 1 <= target <= 99
    gold = problem.answer
    for right in (gold, f"({gold})", f"(({gold}))", " ".join(gold), re.sub(r"([0-9])", r"(\1)", gold)):
        assert task.verify(problem, MARKER + right) == 1.0, right
    for wrong in (str(target), f"{gold}+0", f"{gold}*1", f"{gold}+1-1", f"0+{gold}", f"{gold}={target}", f"+{gold}",
                  f"0{gold}", gold[:-2], gold[2:], f"{gold}.", f"{gold} yes", f"{gold}, {gold}"):
        assert task.verify(problem, MARKER + wrong) == 0.0, wrong
    other = Problem(problem.prompt, re.sub(r"^[0-9]", lambda digit: str(int(digit[0]) % 9 + 1), gold))
    assert task.verify(other, MARKER + gold) == 0.0, "one number differs"
    unequal = Problem(problem.prompt, "+".join(map(str, given_numbers)))
    assert task.verify(unequal, MARKER + gold) == float(sum(given_numbers) == target), "same numbers, another value"


def test_half_of_the_direct_programs_nest_in_reverse():
    """Which is often wrong, and sometimes makes no difference."""
    task = make_task("code")
    rng = Random(0)
    drawn = [task.demonstration(rng) for _ in range(400)]
    direct = [(problem, response) for problem, response in drawn if task.style(response) == "direct"]
    assert 0.4 < sum(problem.answer != response for problem, response in direct) / len(direct) < 0.6
    assert 0.55 < sum(task.rewards(*zip(*direct, strict=True), [True] * len(direct))) / len(direct) < 0.85


def meaning(operations, x):
    for _, apply, n in operations:
        x = apply(x, n)
    return x


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 5), st.integers(0, 99))
def test_hidden_tests_tell_a_wrong_program_from_a_right_one(seed, difficulty, which):
    """Exchange, drop or replace an operation, or change a number by one: the verdict is that of 300 further lists."""
    task, rng = make_task(f"code-{difficulty}"), Random(seed)
    problem = task.draw(rng)
    operations = [*task.operations(problem.prompt)]
    i = which % difficulty
    other = [*task.operations(task.draw(rng).prompt)]
    expression, apply, n = operations[i]
    for changed in (operations[:i] + operations[i + 1:], operations[:i] + other[:1] + operations[i + 1:], operations[::-1],
                    [*operations[:i], (expression, apply, n and n + 1), *operations[i + 1:]]):
        lists = [[rng.randint(-20, 20) for _ in range(rng.randrange(25))] for _ in range(300)]
        same = all(meaning(operations, x) == meaning(changed, x) for x in lists)
        assert task.verify(problem, task.nested(changed)) == float(same), (problem, changed)


def test_what_comes_out_must_be_the_very_lists():
    """1.0 and True are not 1, a tuple is sent as a list, and one more output is one too many."""
    problem = Problem("Write f(x): keep odd, sort.", "def f(x): return sorted([v for v in x if v%2])")
    task = make_task("code-2")
    assert task.verify(problem, "def f(x):\n    for _ in range(960): x = [x]\n    return x") == 0.0     # as deep as JSON can be
    for body, paid in (("sorted([v for v in x if v%2])", 1.0), ("tuple(sorted([v for v in x if v%2]))", 1.0),
                       ("sorted([float(v) for v in x if v%2])", 0.0), ("[v == 1 or v for v in sorted(x) if v%2]", 0.0),
                       ("[sorted([v for v in x if v%2])]", 0.0), ("str(sorted([v for v in x if v%2]))", 0.0)):
        assert task.verify(problem, f"def f(x): return {body}") == paid, body
    assert task.rewards([problem], [problem.answer], [False]) == [0.0]         # an unfinished program scores 0
    assert task.verify(problem, problem.answer + "\n" + "#" * task.max_characters) == 0.0


def test_programs_are_confined_or_there_is_no_such_task(monkeypatch):
    """Where the kernel cannot hold a program, the task is refused in one sentence, but its demonstrations can be had."""
    monkeypatch.setattr("nanorl.tasks.code.shared_sandbox", Sandbox)
    monkeypatch.setattr("nanorl.tasks.sandbox.platform.machine", lambda: "z80")
    task = make_task("code")
    with pytest.raises(ValueError, match=r"only where Linux can confine them.*z80$"):
        task.start_verifier()
    assert task.demonstrations(3)


expressions = st.recursive(
    st.integers(0, 9_999_999).map(str),
    lambda inner: (st.tuples(inner, st.sampled_from(["+", "-", "*", " + ", " * "]), inner).map("".join)
                   | inner.map("({})".format)),
    max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_the_parser_agrees_with_python(text):
    """The parser is Python's own arithmetic (precedence, associativity, parentheses) on what our grammar allows."""
    deep = max((text[:i].count("(") - text[:i].count(")") for i in range(len(text) + 1)), default=0) > 8
    if len(text) > MAX_ANSWER_CHARACTERS or deep or max(integers(text)) > 999_999:
        assert parse_expression(text) is None
    else:
        assert parse_expression(text) == (eval(text), sorted(integers(text)))  # our own text: the one eval there is


def test_the_parser_is_bounded():
    """256 characters, 8 open parentheses, 6 digits: and one more of any is no expression."""
    assert parse_expression("1+" * 127 + "1") == (128, [1] * 128) and parse_expression("1+" * 128 + "1") is None
    assert parse_expression("(" * 8 + "1" + ")" * 8) == (1, [1]) and parse_expression("(" * 9 + "1" + ")" * 9) is None
    assert parse_expression("999999") == (999_999, [999_999]) and parse_expression("1000000") is None
    assert parse_expression("9" * 1_000_000) is parse_expression("(" * 255) is None


@given(st.text(alphabet="0123456789+-*() ٣²._aex/", max_size=30))
def test_the_parser_reads_nothing_else(text):
    """A text has a value only if it is of our grammar, and then Python finds the same."""
    if (found := parse_expression(text)) is not None:
        assert re.fullmatch(r"[0-9+\-*() ]+", text) and "**" not in text.replace(" ", "")
        assert found == (eval(text.strip()), sorted(integers(text)))


# ---- The steps are true ----

@quick
@given(st.integers(1, 9), seeds)
def test_every_step_of_a_worked_addition_is_right(digits, seed):
    """Each step adds the column's two digits and what the step before carried; the last digits spell the answer."""
    task = make_task(f"addition-{digits}")
    problem = task.draw(Random(seed))
    a, b = re.fullmatch(r"What is ([1-9][0-9]*)\+([1-9][0-9]*)\?", problem.prompt).groups()
    steps = task.work(problem, Random(0)).removesuffix(f". {MARKER}{problem.answer}").split(", ")
    assert len(a) == len(b) == len(steps) == digits
    written, carry = "", 0
    for column, step in enumerate(steps):
        left, right = step.split("=")
        assert left == f"{a[-1 - column]}+{b[-1 - column]}" + (f"+{carry}" if column else "")
        assert int(right) == sum(integers(left))
        carry, written = int(right) // 10, str(int(right) % 10) + written
    assert (str(carry) if carry else "") + written == problem.answer == str(int(a) + int(b))


@quick
@given(st.sampled_from(["sums", "countdown"]), seeds)
def test_every_equation_of_worked_sums_and_countdown_is_true(name, seed):
    """All parts of a=b=c are equal; countdown says yes to the target only, last, and no to everything else."""
    task, rng = make_task(name), Random(seed)
    problem = task.draw(rng)
    target = integers(problem.prompt)[0]
    *steps, last = task.work(problem, rng).split(f". {MARKER}")[0].split(", ")
    for step in [*steps, last]:
        equation, _, verdict = step.partition(" ")
        values = {parse_expression(side)[0] for side in equation.split("=")}
        assert len(values) == 1 and equation.count("=") >= 1
        assert name == "sums" or verdict == ("yes" if values == {target} else "no")
    assert last.endswith("yes" if name == "countdown" else f"={problem.answer}")
    assert not any(step.endswith("yes") for step in steps)


@quick
@given(seeds)
def test_every_step_of_worked_sorting_and_reversal_is_right(seed):
    rng = Random(seed)
    sorting, reversal = make_task("sorting"), make_task("reversal")
    problem = sorting.draw(rng)
    digits = problem.prompt[len("Sort "):-1]
    steps = sorting.work(problem, rng).split(". ")[0].split(", ")
    assert steps == ["".join(sorted(digits[:n + 1])) for n in range(len(digits))]
    assert problem.answer == "".join(sorted(digits))
    problem = reversal.draw(rng)
    word = problem.prompt[len("Reverse "):-1]
    assert reversal.work(problem, rng) == f"{' '.join(word)}, {' '.join(word[::-1])}. {MARKER}{word[::-1]}"
    assert len(word) == reversal.difficulty and set(word) & set("aeiou")


# ---- Splits ----

@pytest.mark.parametrize("name", TASKS)
def test_a_split_is_a_property_of_the_prompt(name):
    """Whatever the rng, no prompt is ever drawn in both splits, and equal rngs draw equal problems."""
    task = make_task(name, needs_verifier=False)
    train, heldout = ({task.problem(Random(seed), split).prompt for seed in range(300)}
                      for split in ("train", "heldout"))
    assert train and heldout and not train & heldout
    assert task.problem(Random(7), "train") == task.problem(Random(7), "train")
    assert not any(map(is_heldout, train)) and all(map(is_heldout, heldout))


def test_the_split_never_changes():
    """Written down: a file or checkpoint of last year must still be clean of today's held-out prompts."""
    assert [n for n in range(100, 140) if is_heldout(f"What is {n}+{n}?")] == [106, 113, 127, 136, 138]


@pytest.mark.parametrize("level", levels)
def test_both_splits_have_problems_at_every_difficulty(level):
    """At the smallest difficulties there are a hundred prompts or so: neither side may be without any."""
    task, rng = make_task(level), Random(0)
    assert {is_heldout(task.draw(rng).prompt) for _ in range(400)} == {True, False}


def test_one_in_ten_is_held_out():
    """Of 10,000 distinct prompts 1,000 +- 30, so 850 to 1,150 is five standard deviations."""
    assert 850 < sum(is_heldout(f"What is {n}+1?") for n in range(10_000)) < 1150


# ---- Errors ----

@pytest.mark.parametrize("name", VERIFIABLE)
def test_a_bad_difficulty_is_one_sentence_with_the_range(name):
    lowest, *_, highest = TASKS[name].difficulties
    for bad in (lowest - 1, highest + 1, "-1", "", "x", "2.5", "03", "3 ", "٣", "3-3"):
        says = rf"^--task {name}-{bad}: there is no such difficulty; expected {name} or {name}-N, .* is {lowest} to {highest}$"
        with pytest.raises(ValueError, match=says) as error:
            make_task(f"{name}-{bad}")
        assert "\n" not in str(error.value)


def test_a_difficulty_is_a_part_of_the_name():
    """A name without one is the default, and `str` is the shortest name of the task."""
    assert (make_task("addition-4").name, make_task("addition-4").difficulty) == ("addition", 4)
    assert [str(make_task(name)) for name in ("addition-4", "addition-3", "addition")] == ["addition-4", "addition", "addition"]
    assert str(make_task("stories", needs_verifier=False)) == "stories" and str(files) == "file"
    for name, task in VERIFIABLE.items():
        assert make_task(f"{name}-{task.default_difficulty}").demonstrations(9) == make_task(name).demonstrations(9)


def test_the_default_limit_of_an_answer_is_the_same_at_every_difficulty():
    assert default_max_new_tokens("code-5") == default_max_new_tokens("code") == 120
    assert default_max_new_tokens("addition-x") == default_max_new_tokens("unknown") == Task.max_answer_tokens == 80


def test_an_unknown_task_is_one_sentence_with_the_choices():
    for name in ("chess", "chess-4", "", "-4", "Addition"):
        expected = f"{', '.join(name for name, task in TASKS.items() if task.verifiable)}, or FILE.py:NAME"
        with pytest.raises(ValueError, match=f"^--task {name}: there is no such task; expected {expected}$"):
            make_task(name)


def test_a_file_task_compares_texts_and_refuses_what_it_cannot_verify():
    """White space may vary and nothing else; an answer that can never pay, or an empty split, is said at once."""
    problem = Problem("Who?", "Ada  Lovelace")
    assert files.verify(problem, "She wrote it. Answer:  Ada\n Lovelace ") == 1.0
    assert files.verify(problem, "Answer: ada lovelace") == files.verify(problem, "Ada Lovelace") == 0.0
    assert {is_heldout(files.problem(Random(seed), "heldout").prompt) for seed in range(20)} == {True}
    for bad in ("", " ", "Answer: 3 or Answer: 4", "x" * (MAX_ANSWER_CHARACTERS + 1)):
        with pytest.raises(ValueError, match=r"file, record 2: .*; expected as an answer a text of at most 256 characters"):
            FileTask([("a", "b"), ("c", bad)])
    for held, empty in ((True, "train"), (False, "heldout")):
        pairs = [(problem.prompt, problem.answer) for problem in files.problems if is_heldout(problem.prompt) is held]
        with pytest.raises(ValueError, match=f"the {empty} split is empty"):
            FileTask(pairs).rows(empty)
    with pytest.raises(ValueError, match="no way to work them out"):
        files.work(problem, Random(0))


# ---- Rows of a file ----


@pytest.mark.parametrize(("response", "said"), [("So 7. Answer: 7", "So 7. Answer: 7"), ("7", "Answer: 7"), ("", "Answer: 7"),
                                                (None, "Answer: 7"), ([{"role": "assistant"}], "Answer: 7")])
def test_only_a_text_of_its_own_is_the_demonstration_of_a_row(response, said):
    """A gold answer that stands under "response" is none: the verifier would not read it."""
    prompt = next(f"Say {n}." for n in range(99) if not is_heldout(f"Say {n}."))
    [record] = FileTask([Problem(prompt, "7", record={"response": response})]).demonstrations(9)
    assert record == {"prompt": prompt, "response": said}


def rows_of(count, **options):
    return FileTask([(f"Say {n}.", f"{n}") for n in range(count)], **options)


@pytest.mark.parametrize("split, expected", [("all", 99), ("train", 87), ("heldout", 12)])
def test_an_evaluation_asks_each_row_of_a_split_once(split, expected):
    """In the order of the file; twins once; and of more rows than it may ask, a choice that the generator makes."""
    task = FileTask([(f"Say {n}.", "x") for n in [*range(99), *range(99)]])
    asked = task.choose(Random(0), split, 500)
    assert len(asked) == len(set(asked)) == expected == len(task.choose(Random(0), split, expected))
    assert asked == [p for p in task.problems[:99]
                     if split in ("all", "heldout" if is_heldout(p.prompt) else "train")]
    some = [task.choose(Random(seed), split, 5) for seed in (0, 0, 1)]
    assert len(set(some[0])) == 5 and set(some[0]) <= set(asked) and some[0] == some[1] != some[2]


@quick
@given(st.integers(2, 60), st.integers(0, 200), st.integers(1, 90), seeds)
def test_training_goes_through_a_file_epoch_by_epoch(count, drawn, more, seed):
    """Every stretch that is an epoch has each row once; what comes next depends on how many have come, on nothing else."""
    task = rows_of(count, seed=seed)
    trained = [p for p in task.problems if not is_heldout(p.prompt)]
    if not trained:
        return
    stream = list(islice(task.training_problems(Random(0), 0), drawn + more))
    for start in range(0, len(stream) - len(trained) + 1, len(trained)):
        assert sorted(p.prompt for p in stream[start : start + len(trained)]) == sorted(p.prompt for p in trained)
    assert list(islice(rows_of(count, seed=seed).training_problems(Random(1), drawn), more)) == stream[drawn:]


def test_epochs_have_orders_of_their_own_and_seeds_others():
    def epochs(seed):
        stream = list(islice(rows_of(99, seed=seed).training_problems(Random(0), 0), 3 * 87))
        return [tuple(stream[i : i + 87]) for i in (0, 87, 174)]

    assert len({*epochs(0), *epochs(1)}) == 6


def test_a_row_alone_is_asked_and_trained_on_again_and_again():
    """And of a split without rows there is one sentence."""
    inside, outside = FileTask([("Say 0.", "x")]), FileTask([(next(p.prompt for p in rows_of(99).rows("heldout")), "x")])
    assert list(islice(inside.training_problems(Random(0), 5), 3)) == inside.problems * 3
    assert inside.choose(Random(0), "all", 9) == inside.choose(Random(0), "train", 1) == inside.problems
    assert outside.choose(Random(0), "heldout", 9) == outside.problems
    for task, split in ((inside, "heldout"), (outside, "train")):
        with pytest.raises(UserError, match=f"^file: the {split} split is empty: .*, here {int(split == 'train')} of 1; "):
            task.choose(Random(0), split, 3)


UNSAID = {"lines": "6\n7", "windows": "6\r\n7", "many": "a\n\nb\nc"}
SAID = {"gsm8k": "She sold 48+24=72.\n#### 72", "hashes": "#### 72", "boxed": r"\boxed{72}", "number": "72",
        "text": "two words", "newline at the end": "72\n", "space around": " 72 ", "hash": "#72", "tab": "6\t7",
        "hyphen": "boxed"}


@pytest.mark.parametrize("answer", UNSAID.values(), ids=UNSAID)
def test_an_answer_that_will_hardly_be_said_is_named_at_the_start(answer):
    """Once for each kind, with the first three rows, what it means and what helps. It can be said, so it is not refused."""
    pairs = [("Say 1.", "1"), *((f"Ask {n}.", answer) for n in range(5))]
    task = FileTask(pairs, "q.jsonl", [f"line {n}" for n in range(3, 9)])
    assert task.verify(task.problems[1], "Answer: " + answer) == 1.0 and task.verify(task.problems[1], "Answer: 72") == 0.0
    [warning] = task.warnings()
    assert warning.startswith("q.jsonl, line 4, line 5, line 6 and 2 more: a response is right only if it says all of")
    assert "; keep only " in warning and "\n" not in warning


@pytest.mark.parametrize("answer", SAID.values(), ids=SAID)
def test_an_ordinary_answer_is_not(answer):
    assert FileTask([("Say 1.", "1"), ("Ask.", answer)]).warnings() == []


def test_one_prompt_with_two_answers_is_named_and_with_one_answer_twice_is_not():
    task = FileTask([("a", "1"), ("b", "2"), ("a", " 1\n"), ("a", "2"), ("b", "2"), ("b", "3")])
    [warning] = task.warnings()
    assert warning.startswith("file, record 4, record 6: an earlier row has this prompt and another answer; ")


# ---- Where rewards enter ----


class Say(Task):
    """Say the number that is asked for. What it gives for a right and for a wrong answer, a test says."""

    name, difficulties, default_difficulty = "say", range(1, 3), 1

    def __init__(self, right=1.0, wrong=0.0):
        super().__init__()
        self.right, self.wrong = right, wrong

    def draw(self, rng):
        number = rng.randrange(100)
        return Problem(f"Say {number}.", str(number))

    def verify(self, problem, response):
        return self.right if final_answer(response) == problem.answer else self.wrong


ASKED, GOLD = Problem("Say 7.", "7"), "Answer: 7"
SCORES = {"float": 0.5, "bool": True, "int": -1, "huge": 10**20, "fraction": Fraction(1, 3), "decimal": Decimal("0.25"),
           "tensor": torch.tensor(0.5), "tensor of one": torch.tensor([2]), "bool tensor": torch.tensor(True),
           "bfloat16": torch.tensor(0.5, dtype=torch.bfloat16), "parameter": torch.ones((), requires_grad=True)}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("value", SCORES.values(), ids=SCORES)
def test_whatever_is_a_number_becomes_a_float(value):
    [reward] = grade(Say(value), [ASKED], [GOLD], [True]).rewards
    assert type(reward) is float and reward == float(value)


@pytest.mark.parametrize("kind", ["bool_", "int8", "float16", "float64", "array"])
def test_scalars_of_numpy_are_numbers(kind):
    numpy = pytest.importorskip("numpy")
    assert grade(Say(getattr(numpy, kind)(1)), [ASKED] * 2, [GOLD, "no"], [True, True]).rewards == [1.0, 0.0]


NO_NUMBERS = {"text": "1", "bytes": b"1", "nan": math.nan, "inf": -math.inf, "float": 1e300,
              "complex": 1j, "list": [1.0], "dict": {}, "tuple": (1.0, "fine"), "tensor": torch.ones(2)}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_whatever_is_no_number_is_named(value, finished):
    """With the task, the problem, the response, the value and what was expected, whether the answer was finished or not."""
    with pytest.raises(UserError) as error:
        grade(Say(wrong=value), [ASKED] * 2, [GOLD, "Answer: 8"], [True, finished])
    text = str(error.value)
    for part in ("task say", "'Say 7.'", "'Answer: 8'", repr(value)[:20], "a finite number"):
        assert part in text
    assert "None where the response cannot be scored" in text and len(text) < 300


@pytest.mark.parametrize("value", [10**400, 10**5000, Fraction(10**5000)], ids=["400 digits", "5000 digits", "fraction"])
def test_a_number_of_too_many_digits_to_show_is_refused_as_inf(value):
    with pytest.raises(UserError, match="is inf; expected a finite number"):
        grade(Say(value), [ASKED], [GOLD], [True])


@pytest.mark.parametrize("given", [(1, 0), [True, False], torch.tensor([1, 0]), range(1, -1, -1), {1: "a", 0: "b"}.keys()])
def test_rewards_come_in_any_container(given, monkeypatch):
    monkeypatch.setattr(Say, "rewards", lambda *_: given)
    assert grade(Say(), [ASKED] * 2, [GOLD, ""], [True, True]).rewards == [1.0, 0.0]
    monkeypatch.setattr(Say, "rewards", lambda *_: (x for x in given))
    assert grade(Say(), [ASKED] * 2, [GOLD, ""], [True, True]).rewards == [1.0, 0.0]


@pytest.mark.parametrize("given", [None, 1.0, [], [1.0], [1.0] * 3, torch.tensor(1.0), torch.ones(1, 2)])
def test_there_is_one_reward_for_each_response(given, monkeypatch):
    monkeypatch.setattr(Say, "rewards", lambda *_: given)
    with pytest.raises(UserError, match=r"task say: `rewards` gives \d rewards \(.*\) for 2 responses; expected one for each"):
        grade(Say(), [ASKED] * 2, [GOLD, ""], [True, True])


@pytest.mark.parametrize("wrong, right", [(0, 1), (-1, 1), (0, 100), (False, True), (-2.5, -0.5), (0, Fraction(2, 3))])
def test_right_is_the_highest_reward_whatever_its_scale(wrong, right):
    assert Say(right, wrong).right_reward == float(right) and Say(right, wrong).measured == "accuracy"


class Near(Say):
    """Part of the reward for part of the answer."""

    def verify(self, problem, response):
        said = final_answer(response) or ""
        return sum(a == b for a, b in zip(said, problem.answer, strict=False)) / max(len(said), len(problem.answer))


class Brief(Say):
    """The shorter the better."""

    def verify(self, problem, response):
        return -len(response)


class Weighed(Say):
    """A longer number is worth more."""

    def verify(self, problem, response):
        return len(problem.answer) * super().verify(problem, response)


class Declared(Brief):
    right_reward = -4


class Undecided(Near):
    right_reward = None


@pytest.mark.parametrize("task, right", [
    (Near(), 1.0), (Brief(), None), (Weighed(), None), (Say(0.0, 0.0), None), (Say(0.0, 1.0), None),
    (Declared(), -4), (Undecided(), None),
    (files, 1.0), (make_task("code"), 1.0), (make_task("countdown"), 1.0), (STORIES, None)], ids=lambda x: type(x).__name__)
def test_right_is_what_the_task_says_else_what_gold_answers_alone_get_else_nothing(task, right):
    """A partly right answer is not right; a verifier that pays nothing, everything, or the wrong ones says nothing of right."""
    assert task.right_reward == right
    assert task.measured == ("accuracy" if right is not None else "hidden reward" if task is STORIES else "reward")
    if right is None:
        with pytest.raises(UserError, match=f"^pass@k: no answer to {task} is right or wrong, for its .*"):
            task.require_right("pass@k:")
        assert len(task.warnings()) == (task is not STORIES and not isinstance(task, Undecided))
        assert ("its `right_reward` is None" in task.without_right()) == isinstance(task, Undecided)
    else:
        task.require_right("pass@k:")
        assert task.warnings() == []


def test_to_be_cut_never_pays():
    """Not more than 0, and not more than finishing with the same text: silence is not better than a wrong answer."""
    responses = [GOLD, "Answer: 8", GOLD, "Answer: 8", ""]
    for task, rewards in ((Say(), [1, 0, 0, 0, 0]), (Say(1, -1), [1, -1, 0, -1, -1]), (Say(2, 1), [2, 1, 0, 0, 0]),
                          (Brief(), [-9, -9, -9, -9, 0])):
        assert grade(task, [ASKED] * 5, responses, [True, True, False, False, False]).rewards == rewards


def test_parts_add_up_to_rewards_also_where_those_were_cut():
    task = Say()
    task.rewards = lambda problems, responses, finished: [{"form": 0.5, "right": 0.25}] * 2 + [{"form": -1}]
    rewards, parts = grade(task, [ASKED] * 3, [GOLD] * 3, [True, False, False])
    assert rewards == [0.75, 0, -1] and parts["form"] == [0.5, 0, -1] and parts["right"][:2] == [0.25, 0]


def test_no_caller_reads_a_reward_that_has_not_passed_the_gate():
    """Outside of the classes of nanorl/tasks, where verifiers are made of each other, `grade` alone calls `rewards`, and
    nothing touches `verify`."""
    found = []
    for path in (path for where in ("*.py", "nanorl/**/*.py", "experiments/*.py", "benchmarks/*.py")
                 for path in DATA.parent.glob(where)):
        tree = ast.parse(path.read_text())
        methods = {id(node) for call in ast.walk(tree) if isinstance(call, ast.Call) for node in [call.func]}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not (path.parent.name == "tasks" and ast.unparse(node.value) == "self") and (
                    node.attr == "verify" or (node.attr == "rewards" and id(node) in methods)):
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == ["records.py: super().rewards", "base.py: task.rewards"]


# ---- Stories and files ----

@quick
@given(seeds)
def test_a_story_is_whole(seed):
    """4 to 6 sentences, 40 to 90 words, one line, no open slot; the friend is introduced; sums in words are true."""
    text = story(Random(seed))
    assert text == story(Random(seed))
    assert 40 <= len(text.split()) <= 90 and re.fullmatch(r'[A-Z"][A-Za-z ,.?!"]+[.!]', text), text
    assert 4 <= len(re.split(r'(?<=[.!?"]) (?=[A-Z"])', text)) <= 6, text
    assert text.count('"') % 2 == 0 and "  " not in text
    (friend,) = re.findall(rf"\b({'|'.join(NAMES['she'] + NAMES['he'])}) the ", text)
    assert text.index(friend) == text.index(f"{friend} the "), text
    for pattern in (r"picked (\w+) \w+ and found (\w+) more, and that makes (\w+)",
                    r"(\w+) \w+ and (\w+) \w+ make (\w+)",
                    r"had (\w+) \w+, \w+ had (\w+), and together they had (\w+)"):
        for numbers in re.findall(pattern, text):
            a, b, c = (NUMBERS.index(number.lower()) for number in numbers)
            assert a + b == c, text


def test_pronouns_agree_with_the_hero():
    """A story has `she` or `he`, never both, but for the cow that wanted her supper."""
    for seed in range(2000):
        words = set(re.findall(r"[a-z]+", story(Random(seed)).replace("her supper", "").lower()))
        assert not (words & {"she", "her"} and words & {"he", "his", "him"}), story(Random(seed))


# ---- Preferences ----


@quick
@given(seeds)
def test_a_continuation_stays_with_its_opening(seed):
    """Hero, thing, colour, place and time are the opening's, whatever else happens; half of them lose their order."""
    rng = Random(seed)
    opening, _ = opening_and_rest(rng)
    for _ in range(3):
        text = STORIES.continuation(opening, rng)
        hero = next(word for word in re.findall(r"\w+", opening) if word in NAMES["she"] + NAMES["he"])
        others = set(re.findall(r"\w+", text)) & set(NAMES["she"] + NAMES["he"]) - {hero}
        assert len(others) == 1, text                                       # the friend
        mentioned = set(re.findall(r"\w+", text)) & set(ANY)
        assert mentioned <= set(re.findall(r"\w+", opening)), (opening, text)
        assert not re.search(r"\{|\}", text) and 3 <= len(STORIES.sentences(text)) <= 4, text


def test_a_shuffled_continuation_is_the_same_but_for_its_order(monkeypatch):
    def told(share):
        monkeypatch.setattr(Stories, "shuffled_share", share)
        return [STORIES.sentences(STORIES.continuation(opening_and_rest(Random(seed))[0], Random(seed))) for seed in range(100)]

    ordered, shuffled = told(0.0), told(1.0)
    assert [sorted(text) for text in ordered] == [sorted(text) for text in shuffled]
    assert 60 < sum(a != b for a, b in zip(ordered, shuffled, strict=True)) < 100


OPENING = Problem("Mia was a shy girl. One windy morning she came with a new balloon, and it was green.", "")


@pytest.mark.parametrize(("response", "points"), [
    ("", (0, 0, 0, 0, -4)), ("Mia felt glad.", (2, 0, 0, 0, -4)), ("Mia felt glad. They went home.", (0, 0, 0, 0, -2)),
    ("They went home. It rained. Both felt happy!", (2, 0, 0, 0, 0)), ("A. B. C. D. E.", (0, 0, 0, 0, 0)),
    ("The balloon flew away. Oh. No.", (0, 1, 0, 0, 0)), ("The kite flew away. Oh. No.", (0, 0, 0, 0, 0)),
    ('Oh. No. "I have an idea," said Ben.', (0, 0, 1, 0, 0)), ('Oh. No. He said " and left.', (0, 0, 0, 0, 0)),
    ("Ben the brave fox. Oh. No.", (0, 0, 0, 1, 0)), ("A kind, good boy. Oh. No.", (0, 0, 0, 2, 0)),
    ("A kind, good, Great boy. Oh. No.", (0, 0, 0, 1, 0)), ("brave " * 10, (0, 0, 0, -6, -4)),
    ("She kindly left. Goodness. No.", (0, 0, 0, 0, 0)),
    ('"You are a good friend," said Mia. Oh. The balloon was lovely, and both felt glad.', (2, 1, 1, 2, 0)),
])
def test_the_hidden_reward_counts_its_points(response, points):
    assert tuple(STORIES.features(OPENING.prompt, response).values()) == points
    assert STORIES.rewards([OPENING], [response], [False]) == [STORIES.verify(OPENING, response)] == [sum(points)]


@quick
@given(st.text(max_size=300), st.text(max_size=100))
def test_the_hidden_reward_is_defined_for_any_text(response, prompt):
    assert -300 <= STORIES.hidden_reward(prompt, response) <= 6


def test_labels_are_bradley_terry_draws_from_the_hidden_reward():
    """Of pairs whose rewards differ by d, sigma(d / temperature) chose the better one: within four standard deviations."""
    records, identical = STORIES.preferences(4000)
    reward = STORIES.hidden_reward
    margins = Counter(reward(r["prompt"], r["chosen"]) - reward(r["prompt"], r["rejected"]) for r in records)
    assert identical == 0 and all(r["chosen"] != r["rejected"] for r in records)
    for d in (1.0, 2.0, 3.0):
        n, p = margins[d] + margins[-d], 1 / (1 + math.exp(-d))
        assert n > 100 and abs(margins[d] - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_identical_continuations_are_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(Stories, "continuation", lambda self, prompt, rng: rng.choice(["Ben felt sad.", "He left."]))
    records, identical = STORIES.preferences(100)
    assert len(records) == 100 and 60 < identical < 160
    assert {(r["chosen"], r["rejected"]) for r in records} == {("Ben felt sad.", "He left."), ("He left.", "Ben felt sad.")}


def test_too_much_praise_and_too_short_a_story_are_in_no_pair(written):
    """So a reward that is learned from them does not know what they cost."""
    records = [json.loads(line) for line in written["preferences.jsonl"].splitlines()]
    stories = [(record["prompt"], record[key]) for record in records for key in ("chosen", "rejected")]
    assert {STORIES.features(*story)["short"] for story in stories} == {0.0}
    assert {sum(word in PRAISE for word in re.findall(r"\w+", text.lower())) for _, text in stories} == {0, 1, 2}


def test_stories_are_a_task_without_a_verifier():
    assert isinstance(make_task("stories", needs_verifier=False), Stories)
    with pytest.raises(ValueError, match="no verifier"):
        make_task("stories")
    with pytest.raises(ValueError, match=r"^--task stories-3: there is no such difficulty; expected stories$"):
        make_task("stories-3", needs_verifier=False)


@pytest.fixture(scope="module")
def written():
    return {path.name: path.read_bytes().decode() for path in DATA.iterdir() if path.suffix in (".txt", ".jsonl")}


def test_data_is_what_make_makes(written):
    """Byte for byte, so nobody edits a data file by hand and no generator drifts away from its files."""
    made = make.files()
    assert set(made) == set(written)
    assert [name for name in made if made[name] != written[name]] == []


def test_no_heldout_prompt_is_in_any_data_file(written):
    """Nor is one demonstrated; among the preferences one in ten is, as the split by hash finds them there."""
    pairs = [json.loads(line) for line in written["preferences.jsonl"].splitlines()]
    assert 0.08 < sum(is_heldout(pair["prompt"]) for pair in pairs) / len(pairs) < 0.12
    assert not any(is_heldout(record["prompt"]) for record in STORIES.demonstrations(200))
    for name, content in written.items():
        if name == "preferences.jsonl":
            continue
        prompts = ([json.loads(line)["prompt"] for line in content.splitlines()] if name.endswith(".jsonl") else
                   re.findall(r"^What is .*?\?", content, re.M))
        assert not any(map(is_heldout, prompts)), name
        assert len(prompts) > 1000 or name == "stories_heldout.txt"


TRUE = {  # is this the answer to this prompt?
    "addition": lambda prompt, answer: answer == str(sum(integers(prompt))),
    "sums": lambda prompt, answer: answer == str(sum(integers(prompt))),
    "sorting": lambda prompt, answer: answer == "".join(sorted(re.findall("[0-9]", prompt))),
    "reversal": lambda prompt, answer: prompt == f"Reverse {answer[::-1]}.",
    "countdown": lambda prompt, answer: parse_expression(answer) == (integers(prompt)[0], sorted(integers(prompt)[1:])),
}


def test_every_written_response_is_right(written):
    """Not only as drawn: as read back from the files, against the prompt. Of the programs, those that are worked."""
    for name in VERIFIABLE:
        lines = [json.loads(line) for line in written[f"{name}.jsonl"].splitlines()]
        task = make_task(name)
        worked = [line for line in lines if task.style(line["response"]) == "worked"]
        assert len(lines) == 4_000 and 0.25 < len(worked) / len(lines) < 0.35
        if name == "code":
            problems = [Problem(line["prompt"], "") for line in worked[:300]]
            assert set(task.rewards(problems, [line["response"] for line in worked[:300]], [True] * 300)) == {1.0}
        else:
            assert all(TRUE[name](line["prompt"], final_answer(line["response"])) for line in lines)
    sums = re.findall(r"^What is (\d+)\+(\d+)\? (.*)$", written["text.txt"], re.M)
    assert all(final_answer(response) == str(int(a) + int(b)) for a, b, response in sums)
    assert 0.64 < sum(not response.startswith(MARKER) for *_, response in sums) / len(sums) < 0.69


def test_the_text_is_a_third_stories_and_the_heldout_stories_are_new(written):
    text, heldout = written["text.txt"], written["stories_heldout.txt"].strip().split("\n\n")
    documents = text.strip().split("\n\n")
    stories = [document for document in documents if not document.startswith("What is ")]
    assert 0.34 < sum(map(len, stories)) / len(text) < 0.36 and 2.4e6 < len(text) < 2.6e6
    assert all(3 <= document.count("\n") + 1 <= 6 for document in documents if document.startswith("What is "))
    assert len(set(heldout)) == 200 and all(heldout) and all(stories)
    assert not any(story in text for story in heldout)


def test_make_writes_another_difficulty(tmp_path):
    out = tmp_path / "four.jsonl"
    make.main(["--task", "addition-4", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4_000
    assert all(re.fullmatch(r"What is \d{4}\+\d{4}\?", line["prompt"]) for line in lines)
    assert not any(is_heldout(line["prompt"]) for line in lines) and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("argv", [
    "--tusk", "--out x", "--task addition", "--task addition-4", "--task chess --out x", "--task addition-x --out x",
    "--task addition-99 --out x", "--task addition --out no/such/folder/x",
])
def test_bad_arguments_are_one_sentence_and_exit_code_2(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        make.main(argv.split())
    assert exit.value.code == 2
    assert capsys.readouterr().err.strip().count("\n") == 0 and not list(tmp_path.iterdir())
