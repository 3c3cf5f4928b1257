"""Verifiers of files: judged by hand, and total on any string."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorl.tasks.verifiers import VERIFIERS, final

NUMBER, CHOICE, EXACT = (VERIFIERS[name] for name in ("number", "choice", "exact"))

# gold answer, response, strictly right, leniently right, why
JUDGED = [
    ("18", "#### 18", True, True, "the format of GSM8K"),
    ("18", "Answer: 18", True, True, "our own format"),
    ("18", "So \\boxed{18}.", True, True, "LaTeX, and a period after it"),
    ("18", "It is $\\boxed{18}$", True, True, "within mathematics"),
    ("18", "16 - 3 - 4 = 9 eggs, 9 * 2 = $18.\n#### 18", True, True, "worked out first"),
    ("... a day.\n#### 18", "#### 18", True, True, "a gold answer with its solution"),
    ("18", "18", False, True, "no format"),
    ("18", "She makes 18 dollars a day.", False, True, "a sentence"),
    ("18", "#### 17", False, False, "wrong"),
    ("18", "#### 18\n#### 18", False, True, "two marks, of the same answer"),
    ("18", "#### 17\n#### 18", False, True, "two marks: leniently the last counts"),
    ("18", "#### 18\n#### 17", False, False, "two marks, the last is wrong"),
    ("18", "#### 18\nQuestion: what is 3+4?", False, False, "it goes on after the answer; leniently the last number is 4"),
    ("18", "#### 18 19", False, False, "two numbers after the mark"),
    ("18", "#### 18 or 19", False, False, "a choice of answers"),
    ("18", "#### 18 dollars", False, True, "a word of unit is not the number alone"),
    ("18", "#### $18", True, True, "money"),
    ("18", "#### $ 18", True, True, "money with a space"),
    ("18", "#### \\$18", True, True, "money in LaTeX"),
    ("18", "#### €18", True, True, "other money"),
    ("18", "#### 18%", True, True, "per cent: the unit is dropped"),
    ("18", "#### 18 %", True, True, "with a space"),
    ("18", "#### 18\\%", True, True, "in LaTeX"),
    ("18", "#### 18 percent", True, True, "spelled out"),
    ("18%", "#### 18", True, True, "the gold answer has the unit"),
    ("18", "#### 18.", True, True, "a period"),
    ("18", "#### 18.0", True, True, "a decimal zero"),
    ("18", "#### 18.00", True, True, "cents"),
    ("18", "#### 018", True, True, "a leading zero is the same number"),
    ("18", "#### +18", True, True, "a sign"),
    ("18", "#### -18", False, False, "the wrong sign"),
    ("-18", "#### -18", True, True, "negative"),
    ("-18", "#### \u221218", True, True, "the typographic minus"),
    ("-18", "#### -$18", True, True, "negative money"),
    ("-18", "#### $-18", True, True, "the sign after the unit"),
    ("-18", "#### --18", False, False, "two signs say nothing"),
    ("18", "####18", True, True, "no space after the mark"),
    ("18", "#### **18**", True, True, "bold"),
    ("18", "Answer: $18$", True, True, "mathematics of one number"),
    ("18", "\\boxed{\\text{18}}", True, True, "text within"),
    ("18", "\\boxed{{18}}", False, True, "braces within braces are no number"),
    ("18", "\\boxed{18", False, True, "a brace that is never closed"),
    ("18", "\\boxed 18", False, True, "no braces at all"),
    ("1234", "#### 1,234", True, True, "thousands"),
    ("1,234", "#### 1234", True, True, "thousands in the gold answer"),
    ("1234567", "#### 1,234,567", True, True, "millions"),
    ("1234", "#### 12,34", False, False, "commas in the wrong place"),
    ("1234", "#### 1 234", False, False, "two numbers"),
    ("1234", "#### 1,234.00", True, True, "thousands with decimals"),
    ("1234.5", "#### $1,234.50", True, True, "money with cents"),
    ("1.5", "#### 3/2", True, True, "a fraction"),
    ("3/2", "#### 1.5", True, True, "the other way round"),
    ("1/2", "#### 2/4", True, True, "not in lowest terms"),
    ("1/2", "#### \\frac{1}{2}", True, True, "in LaTeX"),
    ("1/2", "\\boxed{\\frac{1}{2}}", True, True, "in a box"),
    ("1/2", "\\boxed{\\dfrac{1}{2}}", True, True, "displayed"),
    ("-1/2", "#### -\\frac{1}{2}", True, True, "a negative fraction"),
    ("1/3", "#### 0.333", False, False, "rounded is not equal"),
    ("0.5", "#### .5", True, True, "no digit before the point"),
    ("0.5", "#### 50%", False, False, "per cent is a unit here, not a hundredth"),
    ("0", "#### 0", True, True, "zero"),
    ("0", "#### -0", True, True, "minus zero"),
    ("5", "#### 5/0", False, False, "no number"),
    ("5", "#### five", False, False, "a word"),
    ("5", "#### 5e0", False, False, "no exponents"),
    ("5", "#### 2+3", False, False, "nothing is computed"),
    ("5", "#### x = 5", False, True, "an equation is not the number alone"),
    ("5", "#### ", False, False, "nothing after the mark"),
    ("5", "", False, False, "nothing"),
    ("5000", "It is 5,000, I think.", False, True, "a comma after the number is none of it"),
    ("5", "5 apples, 3 left", False, False, "leniently the last number counts"),
    ("5", "She has 10 - 5", False, True, "a minus between two numbers is no sign"),
    ("-5", "It fell to -5", False, True, "a minus at the number is"),
    ("3", "It is 3.", False, True, "a period after the last number"),
    ("3", "from 1.2.3", False, False, "a version is no number"),
    ("3", "room B3", False, False, "part of a word"),
    ("12", "3/4 of 16 is 12", False, True, "a fraction on the way"),
    ("2024", "on 12/25/2024", False, False, "a date is no number"),
    ("5", "#### 5" + " " * 300, True, True, "space is nothing"),
    ("5", "#### " + "0" * 300 + "5", False, False, "too long"),
    ("5", "#### __import__('os').abort() 5", False, True, "code is text"),
    ("9", "#### 9**9**9", False, False, "code is not computed"),
    ("18", "answer: 18", False, True, "another spelling of the mark"),
    ("18", "The Answer: 18", True, True, "words before the mark"),
    ("18", "Answer:\n18", True, True, "on the next line"),
]
CHOICES = [
    ("B", "Answer: B", True, True), ("B", "Answer: (B)", True, True), ("B", "Answer: b", True, True),
    ("(B)", "#### B", True, True), ("B", "Answer: B.", True, True), ("B", "Answer: B) Paris", True, True),
    ("B", "Answer: (B) Paris", True, True),
    ("B", "\\boxed{B}", True, True), ("B", "The answer is B", False, True),
    ("B", "So (A) is wrong and (B) is right", False, True),
    ("B", "Answer: Because", False, False), ("B", "Answer: A or B", False, False), ("B", "Answer: A", False, False),
    ("B", "B", False, False), ("B", "I think the answer is (B).", False, True), ("B", "The option: B", False, True),
    ("A", "A dog", False, False), ("B", "Answer: B\nAnswer: A", False, False),
]


@pytest.mark.parametrize("gold, response, strict, lenient, why", JUDGED)
def test_numbers_are_judged_as_by_hand(gold, response, strict, lenient, why):
    right = NUMBER.gold(gold)
    assert right is not None
    assert (NUMBER.strict(response) == right, NUMBER.lenient(response) == right) == (strict, lenient), why


@pytest.mark.parametrize("gold, response, strict, lenient", CHOICES)
def test_choices_are_judged_as_by_hand(gold, response, strict, lenient):
    right = CHOICE.gold(gold)
    assert (CHOICE.strict(response) == right, CHOICE.lenient(response) == right) == (strict, lenient)


@pytest.mark.parametrize("gold, response, right", [("a b", "Answer: a  b", True), ("a b", "Answer: ab", False),
                                                   ("a b", "a b", False), ("a", "Answer: A", False)])
def test_texts_are_equal_up_to_the_amount_of_space(gold, response, right):
    assert (EXACT.strict(response) == EXACT.gold(gold)) == (EXACT.lenient(response) == EXACT.gold(gold)) == right


@pytest.mark.parametrize("verifier", VERIFIERS.values(), ids=VERIFIERS)
@given(st.text() | st.text(alphabet="#Answer: \\boxed{}()0123456789.,/-$%\n"))
def test_a_verifier_takes_any_string(verifier, text):
    """What is strictly right is leniently right, and a reading reads as itself."""
    strict, lenient = verifier.strict(text), verifier.lenient(text)
    assert strict is None or (strict == lenient and verifier.read(strict) == strict)
    assert lenient is None or verifier.read(lenient) == lenient


@given(st.integers(-10**30, 10**30), st.integers(1, 10**6))
def test_a_number_has_one_reading_in_all_its_spellings(n, d):
    spellings = [f"{n}", f"{n:,}", f"{n}.0", f"{n}/1", f"{n * d}/{d}", f"{n} %", f"{n}.", f"\\frac{{{n * d}}}{{{d}}}"]
    if n >= 0:
        spellings += [f"${n}", f"${n:,}.00", f"+{n}"]
    assert {NUMBER.read(text) for text in spellings} == {str(n)}
    assert {NUMBER.strict(f"so\n#### {text}") for text in spellings} == {str(n)}


@pytest.mark.parametrize("text", ["1" * 200_000, "1," * 100_000, "-" * 200_000, "\\boxed{" * 30_000, "#### " * 40_000,
                                  "\\frac{1}{" * 20_000, "(" * 200_000, "$ " * 100_000, "1/" * 100_000, "1 " * 100_000,
                                  " " * 200_000, "\\frac{" + " " * 200_000, "answer is " * 20_000, "0." * 100_000])
def test_a_long_response_is_read_in_linear_time(text):
    """200,000 characters of the worst kind take no second: quadratic time would take minutes."""
    started = time.process_time()
    for verifier in VERIFIERS.values():
        verifier.lenient(text)
    assert time.process_time() - started < 2


def test_every_gold_answer_in_the_format_of_gsm8k_is_read():
    answers = ["She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "...\n#### 1,234", "...\n#### -5", "...\n#### 2.50"]
    assert [NUMBER.gold(answer) for answer in answers] == ["18", "1234", "-5", "5/2"]
    assert json.dumps([final(answer) for answer in answers]) == '["18", "1,234", "-5", "2.50"]'
