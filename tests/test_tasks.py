"""The toy world: a verifier pays what is right and only that, splits never mix, data/ is what data/make.py makes."""

import importlib.util
import json
import math
import re
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorl.tasks import (
    TASKS,
    FileTask,
    Problem,
    Stories,
    Task,
    default_max_new_tokens,
    final_answer,
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
VERIFIABLE = {name: task for name, task in TASKS.items() if task.verifiable}
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


@quick
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
        seconds = []
        for _ in range(3):              # the best of three: a pause of the machine is not the verifier's
            start = time.process_time()         # of this process: a program has limits of its own
            assert task.verify(problem, text) == 0.0, text[:80]
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.05, text[:80]


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
    for body, grade in (("sorted([v for v in x if v%2])", 1.0), ("tuple(sorted([v for v in x if v%2]))", 1.0),
                        ("sorted([float(v) for v in x if v%2])", 0.0), ("[v == 1 or v for v in sorted(x) if v%2]", 0.0),
                        ("[sorted([v for v in x if v%2])]", 0.0), ("str(sorted([v for v in x if v%2]))", 0.0)):
        assert task.verify(problem, f"def f(x): return {body}") == grade, body
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
    train, heldout = ({task.problem(Random(seed), split).prompt for seed in range(1000)}
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
        with pytest.raises(ValueError, match=f"^--task {name}: there is no such task; expected {', '.join(VERIFIABLE)}$"):
            make_task(name)


def test_a_file_task_compares_texts_and_refuses_what_it_cannot_verify():
    """White space may vary and nothing else; an answer that can never pay, or an empty split, is said at once."""
    problem = Problem("Who?", "Ada  Lovelace")
    assert files.verify(problem, "She wrote it. Answer:  Ada\n Lovelace ") == 1.0
    assert files.verify(problem, "Answer: ada lovelace") == files.verify(problem, "Ada Lovelace") == 0.0
    assert {is_heldout(files.problem(Random(seed), "heldout").prompt) for seed in range(20)} == {True}
    for bad in ("", " ", "Answer: 3", "x" * (MAX_ANSWER_CHARACTERS + 1)):
        with pytest.raises(ValueError, match=r"file, record 2: .*; expected an answer that can be given"):
            FileTask([("a", "b"), ("c", bad)])
    for held, empty in ((True, "train"), (False, "heldout")):
        pairs = [(problem.prompt, problem.answer) for problem in files.problems if is_heldout(problem.prompt) is held]
        with pytest.raises(ValueError, match=f"the {empty} split is empty"):
            FileTask(pairs)
    with pytest.raises(ValueError, match="split is empty"):
        FileTask([])
    for attempt in (lambda: files.demonstrations(3), lambda: files.work(problem, Random(0))):
        with pytest.raises(ValueError, match="no demonstrations"):
            attempt()


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
