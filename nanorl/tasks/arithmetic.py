"""Tasks with numbers, addition, sums and countdown, and a parser that is safe on any string."""

import re
from itertools import accumulate
from random import Random

from nanorl.tasks.base import MAX_ANSWER_CHARACTERS, Problem, Task, final_answer, integers, worked_response


class Addition(Task):
    """What is 347+585?    7+5=12, 4+8+1=13, 3+5+1=09. Answer: 932"""

    name, difficulty_unit = "addition", "digits per operand"
    difficulties, default_difficulty = range(1, 10), 3

    def draw(self, rng):
        a, b = (rng.randrange(10 ** (self.difficulty - 1), 10**self.difficulty) for _ in "ab")
        return Problem(f"What is {a}+{b}?", str(a + b))

    def work(self, problem, rng):
        """From the last digits to the first. Every step looks alike: its sum is the next carry and the next digit."""
        a, b = (str(n)[::-1] for n in integers(problem.prompt))
        steps, carry = [], []  # nothing is carried into the first step
        for x, y in zip(a, b, strict=True):
            terms = [int(x), int(y), *carry]
            steps.append(f"{'+'.join(map(str, terms))}={sum(terms):02d}")
            carry = [sum(terms) // 10]
        return worked_response(steps, problem.answer)


class Sums(Task):
    """What is 4+9+7+2+8?    4+9=13, 13+7=20, 20+2=22, 22+8=30. Answer: 30"""

    name, difficulty_unit = "sums", "terms"
    difficulties, default_difficulty = range(3, 13), 7

    def draw(self, rng):
        terms = [rng.randint(1, 9) for _ in range(self.difficulty)]
        return Problem(f"What is {'+'.join(map(str, terms))}?", str(sum(terms)))

    def work(self, problem, rng):
        """A running total, so that each step only adds one digit to it."""
        terms = integers(problem.prompt)
        totals = zip(accumulate(terms), terms[1:], strict=False)
        return worked_response((f"{total}+{term}={total + term}" for total, term in totals), problem.answer)


class Countdown(Task):
    """Make 23 from 3 4 5.    3*4+5=12+5=17 no, 4*5+3=20+3=23 yes. Answer: 4*5+3

    Our own expressions multiply first, so that reading from left to right and the usual precedence agree, and never go
    below 0. The verifier is more generous: any expression with + - * and parentheses that uses the given numbers, each
    exactly once, and has the target's value.
    """

    name, difficulty_unit = "countdown", "numbers"
    difficulties, default_difficulty = range(2, 7), 3

    def draw(self, rng):
        numbers = sorted(rng.randint(1, 9) for _ in range(self.difficulty))
        planted = self.expression(numbers, rng)
        target, _ = parse_expression(planted)
        return Problem(f"Make {target} from {' '.join(map(str, numbers))}.", planted)

    def expression(self, numbers: list[int], rng: Random) -> str:
        """All the numbers in random order, some to multiply first, then some to add or subtract: its value is 1 to 99."""
        while True:
            first, *rest = rng.sample(numbers, len(numbers))
            text, total, factors = str(first), first, rng.randrange(len(numbers))
            for i, number in enumerate(rest):
                sign = "*" if i < factors else "-" if number <= total and rng.random() < 0.5 else "+"
                text += f"{sign}{number}"
                total, _ = parse_expression(text)
            if 1 <= total <= 99:
                return text

    def work(self, problem, rng):
        """Search out loud: up to three tries that miss, then the one that hits."""
        target, *numbers = integers(problem.prompt)
        tries = dict.fromkeys(self.expression(numbers, rng) for _ in range(rng.randrange(4)))  # none of them twice
        misses = [f"{step_by_step(text)} no" for text in tries if parse_expression(text)[0] != target]
        return worked_response([*misses, f"{step_by_step(problem.answer)} yes"], problem.answer)

    def verify(self, problem, response):
        """1.0 for an expression with the value and the numbers of the planted solution."""
        found = parse_expression(final_answer(response) or "")
        return float(found is not None and found == parse_expression(problem.answer))


def step_by_step(text: str) -> str:
    """From left to right, one operation at a time: '3*4+5-2' becomes '3*4+5-2=12+5-2=17-2=15'. For our own texts."""
    lines = [text]
    while step := re.match(r"([0-9]+[-+*][0-9]+)(.*)", lines[-1]):
        lines.append(f"{parse_expression(step[1])[0]}{step[2]}")
    return "=".join(lines)


def parse_expression(text: str, max_depth: int = 8, max_digits: int = 6) -> tuple[int, list[int]] | None:
    """The value of an integer expression and the numbers in it, sorted; None for any other text.

        sum     = product { ("+" | "-") product }        product = atom { "*" atom }        atom = digits | "(" sum ")"

    Safe on any string: no eval, no powers, no signs, ASCII digits only, bounded length, depth and integers.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return None
    # a stack whose top is the next token; a stray character becomes a token that no rule accepts
    tokens = re.findall(r"[0-9]+|[^ ]", text)[::-1]
    numbers = []

    def accept(signs: str) -> str:
        return tokens.pop() if tokens and tokens[-1] in signs else ""

    def sum_(depth: int) -> int:
        value = product(depth)
        while sign := accept("+-"):
            value += product(depth) if sign == "+" else -product(depth)
        return value

    def product(depth: int) -> int:
        value = atom(depth)
        while accept("*"):
            value *= atom(depth)
        return value

    def atom(depth: int) -> int:
        if depth < max_depth and accept("("):
            value = sum_(depth + 1)
            if not accept(")"):
                raise ValueError("a parenthesis is not closed")
            return value
        token = tokens.pop() if tokens else ""
        if not re.fullmatch(r"0|[1-9][0-9]*", token) or len(token) > max_digits:
            raise ValueError("not a number")
        numbers.append(int(token))
        return numbers[-1]

    try:
        value = sum_(0)
    except ValueError:
        return None
    return None if tokens else (value, sorted(numbers))
