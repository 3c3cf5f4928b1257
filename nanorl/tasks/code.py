"""Programs that the verifier runs in the sandbox: a task of its own, and the verifier "code" of your files."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from random import Random

from nanorl.tasks.base import Problem, Task, integers
from nanorl.tasks.sandbox import shared_sandbox

OPERATIONS = {  # phrase: the expression of a list x, and what it means; {n} is a number from 1 to 9
    "add {n}": ("[v+{n} for v in {x}]", lambda x, n: [v + n for v in x]),
    "times {n}": ("[v*{n} for v in {x}]", lambda x, n: [v * n for v in x]),
    "keep over {n}": ("[v for v in {x} if v>{n}]", lambda x, n: [v for v in x if v > n]),
    "keep odd": ("[v for v in {x} if v%2]", lambda x, n: [v for v in x if v % 2 == 1]),
    "keep even": ("[v for v in {x} if v%2==0]", lambda x, n: [v for v in x if v % 2 == 0]),
    "drop {n}": ("{x}[{n}:]", lambda x, n: x[n:]),
    "reverse": ("{x}[::-1]", lambda x, n: x[::-1]),
    "sort": ("sorted({x})", lambda x, n: sorted(x)),
}


class Code(Task):
    """Write f(x): add 3, keep odd.    def f(x): x=[v+3 for v in x]; return [v for v in x if v%2]

    A direct program is one expression, the first operation innermost: [v for v in [v+3 for v in x] if v%2]. Half of the
    direct demonstrations nest the operations in reverse, which is often wrong. The verifier runs a program in the sandbox,
    on lists that no prompt shows, and compares the outputs.
    """

    name, difficulty_unit, max_answer_tokens = "code", "operations", 120
    difficulties, default_difficulty = range(2, 6), 2
    max_characters = 2_000  # a longer program is not run
    right_reward = 1.0
    reversed_share = 0.5  # of the direct demonstrations: they nest in reverse

    def start_verifier(self):
        shared_sandbox()

    def draw(self, rng):
        """Operations with at least three different outputs on the tests, so that a constant function does not pass."""
        while True:
            phrases = (phrase.format(n=rng.randint(1, 9)) for phrase in rng.sample(sorted(OPERATIONS), self.difficulty))
            prompt = f"Write f(x): {', '.join(phrases)}."
            problem = Problem(prompt, self.nested(self.operations(prompt)))
            if len(set(map(tuple, self.tests(problem)[1]))) >= 3:
                return problem

    @staticmethod
    def operations(prompt: str) -> Iterator[tuple[str, Callable, int | None]]:
        """The expression, the meaning and the number of each phrase in a prompt of ours."""
        for phrase in prompt.removeprefix("Write f(x): ").removesuffix(".").split(", "):
            number = integers(phrase)
            yield *OPERATIONS[re.sub(r"[0-9]+", "{n}", phrase)], *(number or [None])

    @staticmethod
    def nested(operations: Iterable[tuple[str, Callable, int | None]]) -> str:
        """The program that is one expression, the first operation innermost."""
        nested = "x"
        for expression, _, n in operations:
            nested = expression.format(x=nested, n=n)
        return f"def f(x): return {nested}"

    def direct(self, problem, rng):
        return problem.answer

    def demonstration(self, rng):
        problem, response = super().demonstration(rng)
        if response == problem.answer and rng.random() < self.reversed_share:
            response = self.nested(reversed([*self.operations(problem.prompt)]))
        return problem, response

    def work(self, problem, rng):
        """One operation after another, in the order of the prompt."""
        *first, last = (expression.format(x="x", n=n) for expression, _, n in self.operations(problem.prompt))
        return "def f(x): " + "".join(f"x={step}; " for step in first) + f"return {last}"

    def adversarial(self, problem):
        """Programs that must not pay: no function, half of one, one that raises, prints, exits or returns nothing."""
        gold = problem.answer
        return ["", problem.prompt, gold[:-1], gold + "\0", gold.replace("def f", "def g"), gold.replace("return", "print"),
                gold + "\nraise SystemExit(0)", gold + "\nf = None", f"print({gold!r})", "import os; os._exit(0)",
                *(f"def f(x): return {y}" for y in ("[]", "None", "x.clear()", "print(x)", "1/0", "f(x)", "open('tests')"))]

    def style(self, response):
        """A worked program has several statements."""
        return "" if "return" not in response else "worked" if ";" in response else "direct"

    def ballot(self, response):
        """A program votes for itself, to the letter."""
        return response

    def tests(self, problem: Problem) -> tuple[list[list[int]], list[list[int]]]:
        """Lists to try a program on, and the right outputs. No prompt shows the lists; the outputs never enter the sandbox."""
        rng = Random(problem.prompt)
        inputs = outputs = [rng.sample(range(-20, 21), length) for length in (0, 1, 4, 10, 41)]
        for _, apply, n in self.operations(problem.prompt):
            outputs = [apply(x, n) for x in outputs]
        return inputs, outputs

    def verify(self, problem, response):
        return self.rewards([problem], [response], [True])[0]

    def rewards(self, problems, responses, finished):
        """1.0 for each program that finished, runs, and is right on every test."""
        rewards = [0.0] * len(problems)
        tried = [i for i, text in enumerate(responses) if finished[i] and len(text) <= self.max_characters]
        tests = [self.tests(problems[i]) for i in tried]
        returned = shared_sandbox().run([(responses[i], inputs) for i, (inputs, _) in zip(tried, tests, strict=True)])
        for i, (_, expected), outputs in zip(tried, tests, returned, strict=True):
            rewards[i] = float(outputs == expected and repr(outputs) == repr(expected))  # 1.0 and True are not 1
        return rewards


class UnitTests:
    """The verifier "code": a response is right if its program passes the tests of its record, each `assert f(3, [1]) == 4`.

    The program is the one fenced block of the response, or else all of it. The tests must be calls of one function with literal
    arguments. They are read, not run: the sandbox gets the program and the arguments, and what comes back is compared here.
    """

    kind, last, runs_programs = "lines `assert NAME(literals) == literal`, all of one function", None, True

    def strict(self, response: str) -> str:
        """The program."""
        blocks = re.findall(r"```(?:python|py)?\n(.*?)```", response, re.S)
        return blocks[0] if len(blocks) == 1 else response

    def gold(self, answer: str) -> str | None:
        """The tests, as JSON: the name of the function, the arguments of each call, the values that are right."""
        try:
            tests = [test.test for test in ast.parse(answer).body]
            [name] = {test.left.func.id for test in tests}
            calls = [[ast.literal_eval(argument) for argument in test.left.args] for test in tests]
            values = [ast.literal_eval(value) for test in tests for value in test.comparators]
            plain = len(values) == len(tests) and all(
                isinstance(test.ops[0], ast.Eq) and not test.left.keywords for test in tests)
            return json.dumps([name, calls, values], allow_nan=False) if plain else None
        except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
            return None

    def right(self, golds: list[str], responses: list[str]) -> list[bool]:
        tests = [json.loads(gold) for gold in golds]
        # The sandbox calls f with one input. What the program calls f, or what it ends with, is no matter.
        programs = [(f"{self.strict(response)}\n\nf = (lambda called: lambda arguments: called(*arguments))({name})", calls)
                    if len(response) <= Code.max_characters else ("", calls)
                    for response, (name, calls, _) in zip(responses, tests, strict=True)]
        returned = shared_sandbox().run(programs)
        return [outputs == values and repr(outputs) == repr(values)
                for outputs, (_, _, values) in zip(returned, tests, strict=True)]
