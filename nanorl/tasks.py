"""The toy world: problems that a program can check, and short stories. Text only, no model and no tensor.

A *problem* is a prompt and its gold answer. A *response* follows the prompt and one space, in one of two ways (a program
has ways of its own):

    direct    Answer: 932
    worked    7+5=12, 4+8+1=13, 3+5+1=09. Answer: 932

A tiny model is wrong when it blurts and right when it works, so a verifier's reward alone can teach it to work. Two
rules keep that reward honest:

1. A response is untrusted text. It is compared, or read by the small parser below; only a program is run, and that in
   nanorl/sandbox.py. Any string whatsoever gets 0.0 or 1.0, in bounded time.
2. A prompt belongs to "train" or "heldout" by its own hash: no seed, process or script can move it to the other side.

Randomness is always a `random.Random` that the caller made.
"""
# ruff: noqa: SIM905      (a line of words reads better than a list of quoted ones)

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random

from nanorl.sandbox import shared_sandbox

MARKER = "Answer: "
MAX_ANSWER = 256  # characters; whatever is longer is not an answer


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str  # the gold answer; where many are right (countdown), one of them


def final_answer(response: str) -> str | None:
    """The text after the marker, without the spaces around it; None when there is not exactly one marker.

    Listing several answers must not pay, so a second marker forfeits the first. What comes back is still model output.
    """
    if response.count(MARKER) != 1:
        return None
    answer = response.partition(MARKER)[2].strip()
    return answer if len(answer) <= MAX_ANSWER else None


def is_worked(response: str) -> bool:
    """Does anything but blank space stand before the marker?"""
    before, marker, _ = response.partition(MARKER)
    return bool(marker and before.strip())


def is_heldout(prompt: str) -> bool:
    """One prompt in ten is never trained on, decided by the prompt's text alone."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10 == 0


def worked(steps: Iterable[str], answer: str) -> str:
    return f"{', '.join(steps)}. {MARKER}{answer}"


def integers(text: str) -> list[int]:
    """The numbers in a prompt of ours, in order. Never for model output."""
    return [int(digits) for digits in re.findall(r"[0-9]+", text)]


class Task:
    """A family of problems. A subclass says how to `draw` one and how to `work` it out; the rest is shared."""

    name: str
    verifiable = True
    room = 80  # tokens, at most, that a response needs
    knob: str  # what `difficulty` counts
    lowest: int
    default: int
    highest: int
    worked_share = 0.3  # of the demonstrations: most of them blurt

    def __init__(self, difficulty: int | None = None):
        self.difficulty = self.default if difficulty is None else difficulty
        if type(self.difficulty) is not int or not self.lowest <= self.difficulty <= self.highest:
            raise ValueError(f"the difficulty of {self.name} is the number of {self.knob}, an integer from "
                             f"{self.lowest} to {self.highest}, not {difficulty!r}")

    def prepare(self) -> None:
        """Whatever the verifier needs, before any work; ValueError where it cannot be had."""

    def draw(self, rng: Random) -> Problem:
        """A problem of either split."""
        raise NotImplementedError

    def work(self, problem: Problem, rng: Random) -> str:
        """A right response that gets to the answer in steps, each of them easy."""
        raise NotImplementedError

    def direct(self, problem: Problem, rng: Random) -> str:
        """A right response that blurts."""
        return MARKER + problem.answer

    def examples(self) -> list[Problem]:
        """Enough problems of either split to see how long a prompt can be."""
        return [self.draw(Random(i)) for i in range(1000)]

    def problem(self, rng: Random, split: str) -> Problem:
        """Draw until the prompt's hash falls into the split."""
        if split not in ("train", "heldout"):
            raise ValueError(f"a split is 'train' or 'heldout', not {split!r}")
        while is_heldout((problem := self.draw(rng)).prompt) != (split == "heldout"):
            pass
        return problem

    def demonstration(self, rng: Random) -> tuple[Problem, str]:
        """A training problem and a response, worked with probability `worked_share`: right, but for careless programs."""
        problem = self.problem(rng, "train")
        respond = self.work if rng.random() < self.worked_share else self.direct
        return problem, respond(problem, rng)

    def demonstrations(self, count: int) -> list[dict[str, str]]:
        """Records to fine-tune on: the same stream for a task and its difficulty, and its first `count`."""
        rng = Random(f"{self.name} {self.difficulty}")
        drawn = (self.demonstration(rng) for _ in range(count))
        return [{"prompt": problem.prompt, "response": response} for problem, response in drawn]

    def verify(self, problem: Problem, response: str) -> float:
        """1.0 for a right answer, else 0.0. The answer is a text: '0932' and '932.' are not '932'."""
        return float(final_answer(response) == problem.answer)

    def grade(self, problem: Problem, response: str, finished: bool) -> float:
        """The reward of a sampled response. One that was cut off gets 0: whoever has not stopped has not answered."""
        return self.verify(problem, response) if finished else 0.0

    def grades(self, problems: list[Problem], responses: list[str], finished: list[bool]) -> list[float]:
        """The rewards of many responses."""
        return [self.grade(*each) for each in zip(problems, responses, finished, strict=True)]

    def adversarial(self, problem: Problem) -> list[str]:
        """Responses that must not pay: echoes, several answers, additions to the right one, code."""
        gold = MARKER + problem.answer
        texts = ["", MARKER, problem.prompt, problem.answer, MARKER + problem.prompt, MARKER + "1 " + gold, gold + " " + gold,
                 gold + "\n" + MARKER, gold + "\0", gold + " or so", f"{gold}={problem.answer}", gold + " " * 300 + "x",
                 MARKER + "9**9**9", MARKER + "__import__('os').abort()", MARKER + "(" * 5000, MARKER + "9" * 100_000]
        return [text for text in texts if (final_answer(text) or "").split() != problem.answer.split()]

    def way(self, response: str) -> str:
        """How a response answers: "direct", "worked", or "" if it does not."""
        return "" if MARKER not in response else "worked" if is_worked(response) else "direct"

    def ballot(self, response: str) -> str | None:
        """What a finished response votes for; None if it has not answered. Equal ballots get equal rewards."""
        return final_answer(response)


class Addition(Task):
    """What is 347+585?    7+5=12, 4+8+1=13, 3+5+1=09. Answer: 932"""

    name, knob = "addition", "digits per operand"
    lowest, default, highest = 1, 3, 9

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
        return worked(steps, problem.answer)


class Sums(Task):
    """What is 4+9+7+2+8?    4+9=13, 13+7=20, 20+2=22, 22+8=30. Answer: 30"""

    name, knob = "sums", "terms"
    lowest, default, highest = 3, 7, 12

    def draw(self, rng):
        terms = [rng.randint(1, 9) for _ in range(self.difficulty)]
        return Problem(f"What is {'+'.join(map(str, terms))}?", str(sum(terms)))

    def work(self, problem, rng):
        """A running total, so that each step adds one digit to a number of at most two or three."""
        total, *terms = integers(problem.prompt)
        steps = []
        for term in terms:
            steps.append(f"{total}+{term}={total + term}")
            total += term
        return worked(steps, problem.answer)


class Sorting(Task):
    """Sort 73913.    7, 37, 379, 1379, 13379. Answer: 13379

    A control: attention sorts at a glance, so that working need not pay here.
    """

    name, knob = "sorting", "digits to sort"
    lowest, default, highest = 2, 8, 16

    def draw(self, rng):
        digits = "".join(rng.choice("0123456789") for _ in range(self.difficulty))
        return Problem(f"Sort {digits}.", "".join(sorted(digits)))

    def work(self, problem, rng):
        """Insertion sort: step n is the first n digits in order, the step before with one digit let in."""
        digits = problem.prompt.removeprefix("Sort ").removesuffix(".")
        return worked(("".join(sorted(digits[:n])) for n in range(1, len(digits) + 1)), problem.answer)


class Reversal(Task):
    """Reverse plonta.    p l o n t a, a t n o l p. Answer: atnolp"""

    name, knob = "reversal", "letters"
    lowest, default, highest = 3, 6, 12
    onsets = "b d f g k l m n p r s t v bl br dr fl gr kl pl pr sk sl sn sp st tr".split()
    codas = "l m n r s".split()

    def draw(self, rng):
        """A made-up word, syllable by syllable; one that grows past its length is begun anew."""
        word = ""
        while len(word) != self.difficulty:
            syllable = rng.choice(self.onsets) + rng.choice("aeiou") + rng.choice(["", rng.choice(self.codas)])
            word = word + syllable if len(word) < self.difficulty else ""
        return Problem(f"Reverse {word}.", word[::-1])

    def work(self, problem, rng):
        """Tokens hide their letters: spell the word, and only then turn it around."""
        return worked((" ".join(problem.answer[::-1]), " ".join(problem.answer)), problem.answer)


class Countdown(Task):
    """Make 23 from 3 4 5.    3*4+5=12+5=17 no, 4*5+3=20+3=23 yes. Answer: 4*5+3

    Our own expressions multiply first, so that reading from left to right and the usual precedence agree, and never
    pass below 0. The verifier is more generous: any expression with + - * and parentheses that uses the given numbers,
    each exactly once, and has the target's value.
    """

    name, knob = "countdown", "numbers"
    lowest, default, highest = 2, 3, 6
    highest_target = 99

    def draw(self, rng):
        numbers = sorted(rng.randint(1, 9) for _ in range(self.difficulty))
        planted = self.expression(numbers, rng)
        target, _ = arithmetic(planted)
        return Problem(f"Make {target} from {' '.join(map(str, numbers))}.", planted)

    def expression(self, numbers: list[int], rng: Random) -> str:
        """All the numbers in a random order, first some to multiply, then some to add or subtract: worth 1 to 99."""
        while True:
            first, *rest = rng.sample(numbers, len(numbers))
            text, total, factors = str(first), first, rng.randrange(len(numbers))
            for i, number in enumerate(rest):
                sign = "*" if i < factors else "-" if number <= total and rng.random() < 0.5 else "+"
                text += f"{sign}{number}"
                total, _ = arithmetic(text)
            if 1 <= total <= self.highest_target:
                return text

    def work(self, problem, rng):
        """Search out loud: up to three tries that miss, then the one that hits."""
        target, *numbers = integers(problem.prompt)
        tries = dict.fromkeys(self.expression(numbers, rng) for _ in range(rng.randrange(4)))  # none of them twice
        misses = [f"{reduce(text)} no" for text in tries if arithmetic(text)[0] != target]
        return worked([*misses, f"{reduce(problem.answer)} yes"], problem.answer)

    def verify(self, problem, response):
        """The same value from the same numbers as the planted solution."""
        found = arithmetic(final_answer(response) or "")
        return float(found is not None and found == arithmetic(problem.answer))


def reduce(text: str) -> str:
    """From left to right, one operation at a time: '3*4+5-2' becomes '3*4+5-2=12+5-2=17-2=15'. For our own texts."""
    lines = [text]
    while step := re.match(r"([0-9]+[-+*][0-9]+)(.*)", lines[-1]):
        lines.append(f"{arithmetic(step[1])[0]}{step[2]}")
    return "=".join(lines)


def arithmetic(text: str, max_depth: int = 8, max_digits: int = 6) -> tuple[int, list[int]] | None:
    """The value of an integer expression and the numbers in it, sorted; None when it is anything else.

        sum     = product { ("+" | "-") product }        product = atom { "*" atom }        atom = digits | "(" sum ")"

    Safe on any string: no eval, no powers, no signs, ASCII digits only, bounded length, depth and integers.
    """
    if len(text) > MAX_ANSWER:
        return None
    # a stack, its top is the next token; any stray character is a token too, one that no rule accepts
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

    A blurt is one expression, the first operation innermost: [v for v in [v+3 for v in x] if v%2]. The demonstrations are
    careless: one blurt in two nests them in reverse. The verifier runs the program on lists that nobody has seen, in the
    sandbox, and compares what comes out.
    """

    name, knob, room = "code", "operations", 120
    lowest, default, highest = 2, 2, 5
    longest = 2_000  # characters: whatever is longer is not run
    careless = 0.5  # share of the blurts that nest in reverse

    def prepare(self):
        shared_sandbox()

    def draw(self, rng):
        """Operations that leave something over: a function that is always [] could be had for nothing."""
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
        if response == problem.answer and rng.random() < self.careless:
            response = self.nested(reversed([*self.operations(problem.prompt)]))
        return problem, response

    def work(self, problem, rng):
        """One operation after the other, in the order of the prompt."""
        *first, last = (expression.format(x="x", n=n) for expression, _, n in self.operations(problem.prompt))
        return "def f(x): " + "".join(f"x={step}; " for step in first) + f"return {last}"

    def adversarial(self, problem):
        """Programs that must not pay: no function, half of one, one that raises, prints, exits or returns nothing."""
        gold = problem.answer
        return ["", problem.prompt, gold[:-1], gold + "\0", gold.replace("def f", "def g"), gold.replace("return", "print"),
                gold + "\nraise SystemExit(0)", gold + "\nf = None", f"print({gold!r})", "import os; os._exit(0)",
                *(f"def f(x): return {y}" for y in ("[]", "None", "x.clear()", "print(x)", "1/0", "f(x)", "open('tests')"))]

    def way(self, response):
        return "" if "return" not in response else "worked" if ";" in response else "direct"

    def ballot(self, response):
        """A program votes for itself, to the letter."""
        return response

    @staticmethod
    def meaning(operations: Iterable[tuple[str, Callable, int | None]], x: list[int]) -> list[int]:
        """What these operations make of a list."""
        for _, apply, n in operations:
            x = apply(x, n)
        return x

    def tests(self, problem: Problem) -> tuple[list[list[int]], list[list[int]]]:
        """Lists to try a program on, and what must come out: hidden in that no prompt and no program gets to see them."""
        rng, operations = Random(problem.prompt), [*self.operations(problem.prompt)]
        inputs = [rng.sample(range(-20, 21), length) for length in (0, 1, 4, 10, 41)]
        return inputs, [self.meaning(operations, x) for x in inputs]

    def verify(self, problem, response):
        return self.grades([problem], [response], [True])[0]

    def grades(self, problems, responses, finished):
        """1.0 for each program that finished, runs, and is right on every test."""
        grades = [0.0] * len(problems)
        tried = [i for i, text in enumerate(responses) if finished[i] and len(text) <= self.longest]
        tests = [self.tests(problems[i]) for i in tried]
        said = shared_sandbox().run([(responses[i], inputs) for i, (inputs, _) in zip(tried, tests, strict=True)])
        for i, (_, expected), outputs in zip(tried, tests, said, strict=True):
            grades[i] = float(outputs == expected and repr(outputs) == repr(expected))  # 1.0 and True are not 1
        return grades


class FileTask(Task):
    """Somebody's own questions, as (prompt, answer) pairs. An answer must match, but for the width of white space."""

    difficulty = None

    def __init__(self, pairs: Iterable[tuple[str, str]], name: str = "file"):
        self.name = name
        self.problems = [Problem(prompt, answer) for prompt, answer in pairs]
        for number, problem in enumerate(self.problems, 1):
            if not problem.answer.strip() or not self.verify(problem, self.direct(problem, None)):
                raise ValueError(f"{name}, record {number}: no response can have {problem.answer[:40]!r} as its answer, "
                                 f"which must be 1 to {MAX_ANSWER} characters without {MARKER!r}")
        total, heldout = len(self.problems), sum(is_heldout(problem.prompt) for problem in self.problems)
        if heldout in (0, total):
            raise ValueError(f"{name}: the {'heldout' if heldout == 0 else 'train'} split is empty: one prompt in ten is held "
                             f"out by its hash, here {heldout} of {total}")

    def draw(self, rng):
        return rng.choice(self.problems)

    def examples(self):
        return self.problems

    def demonstration(self, rng):
        raise ValueError(f"{self.name}: has prompts and answers, but no demonstrations")

    def work(self, problem, rng):
        return self.demonstration(rng)

    def verify(self, problem, response):
        answer = final_answer(response)
        return float(answer is not None and answer.split() == problem.answer.split())

    def ballot(self, response):
        answer = final_answer(response)
        return None if answer is None else " ".join(answer.split())


# ---- Stories: a named hero, a thing, a place, a small trouble, a friend who helps, a feeling ----
#
# One template per sentence. {she} {her} {him} always mean the hero; the friend goes by name, and the first mention says
# who that is. A plot knows which things it can happen to: the wind takes a kite, not a wagon.

NAMES = {"she": "Mia Anna Lily Rosa Nora Ella Zoe Ida Greta Ruby".split(),
         "he": "Tom Ben Max Leo Finn Otto Noah Hugo Karl Jack".split()}
ANIMALS = "fox rabbit bear mouse duck goat hedgehog kitten puppy frog pony squirrel badger turtle owl".split()
HELPERS = [*ANIMALS, *"baker farmer sailor teacher gardener painter miller".split()]
PRAISE = "brave clever good great kind lovely wonderful".split()
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen").split()
WORDS = {  # slot: what may fill it
    "size": "little small tiny young shy busy cheerful quiet".split(),
    "colour": "red blue green yellow white black silver golden purple brown".split(),
    "weather": "sunny windy warm cold bright quiet misty".split(),
    "time": ["day", "morning", "afternoon"],
    "place": ["in the garden", "by the river", "at the market", "behind the old barn", "on the hill", "at the beach",
              "in the forest", "near the mill", "in the meadow", "next to the bridge"],
    "spot": ["under a bench", "behind the door", "in the tall grass", "under a bush", "next to the gate",
             "between two stones", "under a heap of leaves", "behind a barrel"],
    "hobby": ["sing", "dance", "draw", "run", "sit and dream", "look at the clouds"],
    "giver": ["grandmother", "uncle", "aunt", "big sister", "father"],
    "food": ["big pie", "warm loaf of bread", "sweet melon", "round cheese", "honey cake", "pot of soup"],
    "fruit": ["apples", "pears", "plums", "nuts", "cherries", "berries"],
    "noise": ["a cat in a bucket", "an old gate in the wind", "a frog with a cold", "a cow that wanted her supper"],
    "sad": ["sad", "tired", "worried", "upset", "scared"],
    "fine": "good great lovely wonderful".split(),
    "glad": ["happy", "glad", "proud", "calm", "warm inside", "very lucky"],
}
LIGHT = "kite hat scarf balloon ribbon".split()
ROUND = "ball coin marble button ring".split()
MADE = "boat drum wagon lantern basket flute".split()
ANY = LIGHT + ROUND + MADE

OPENINGS = [
    ["On a {weather} {time}, a {size} {kind} named {hero} went to play {place} with {her} {colour} {thing}."],
    ["Once there was a {size} {kind} named {hero} who had a {colour} {thing}.",
     "One {weather} {time} {she} took it along and went to play {place}."],
    ["{hero} was a {size} {kind} who liked to {hobby} {place}.",
     "One {weather} {time} {she} came with a new {thing}, and it was {colour}."],
    ["A {size} {kind} named {hero} got a {colour} {thing} from {her} {giver}.",
     "{She} was so happy that {she} went out to show it to everyone {place}."],
    ["There lived a {kind} {place}, a {size} one, and {her} name was {hero}.",
     "One {weather} {time} {she} took {her} {colour} {thing} and went for a walk."],
]
TALKS = [
    '"Oh no, what shall I do?" cried {hero}.', '"Please help me," {she} said to {friend}.',
    '"Do not worry, I will help you," said {friend}.', '"I have an idea," said {friend}.',
    '"Why are you so {sad}?" asked {friend}.', "{hero} sat down and began to cry.",
    "{She} felt {sad}, but {she} did not give up.",
]
PLOTS = [  # things it can happen to, the trouble, what is said, the help
    (ANY, ["When it was time to go home, the {thing} was not there any more.",
           "{She} put the {thing} down to follow a butterfly, and then {she} could not find it.",
           "But the {thing} was suddenly gone, and {she} did not know where to look."], TALKS,
     ["{friend} looked {spot} and saw something {colour}, and it was the {thing}.",
      "{hero} and {friend} searched for an hour, and there it was {spot}.",
      "{friend} had seen the {thing} {spot} and ran to get it."]),
    (LIGHT, ["A strong wind took the {thing} and blew it up into a tall tree.",
             "The wind pulled the {thing} out of {her} hands and carried it to the top of a roof.",
             "The {thing} flew away and stopped on a branch, too high for {him} to reach."], TALKS,
     ["{friend} brought a long ladder, climbed up and got it down.",
      "{friend} threw a rope around the {thing} and pulled until it came down.",
      "{hero} stood on the back of {friend} and could just reach it."]),
    (ROUND, ["The {thing} rolled down the path and fell into a pond with a splash.",
             "{She} let go of the {thing} for a moment, and it fell into a deep well.",
             "The {thing} slipped out of {her} hands and rolled into a dark hole."], TALKS,
     ["{friend} tied a net to a long rope and pulled the {thing} out.",
      "{friend} reached down with a stick and slowly brought it back.",
      "{friend} held {him} by the feet, and so {she} got it out."]),
    (MADE, ["But {she} tripped over a stone, and the {thing} broke.",
            "The {thing} fell on the hard ground, and a piece of it came off.",
            "A cow stepped on the {thing} by mistake and broke it in two."], TALKS,
     ["{friend} had some glue and put the pieces together again.",
      "{friend} mended it with string and a bit of wood.",
      "{hero} and {friend} worked for an hour, and then the {thing} was like new."]),
    (ANY, ["Then dark clouds came, and soon {she} was wet and cold.",
           "All at once it began to rain, and there was no roof to hide under.",
           "Suddenly there was a storm, and {she} was afraid of the thunder."], TALKS,
     ["{friend} opened the door of a warm house and made some tea.",
      "{friend} came with a big umbrella and walked home with {him}.",
      "{hero} and {friend} found a dry cave and told stories until the rain stopped."]),
    (ANY, ["Soon it was dark, and {she} could not find the way home.",
           "{She} walked too far and came to a road that {she} did not know.",
           "A thick fog came down and hid the path."], TALKS,
     ["{friend} knew the way and brought {him} home.",
      "{friend} lit a lamp and showed {him} the path.",
      "{friend} rang a bell, and {hero} followed the sound until {she} was home."]),
    (ANY, ["But {she} had forgotten to eat, and {her} stomach was empty.",
           "After a while {she} was very hungry, but {her} lunch was at home.",
           "A crow stole {her} bread, and then {she} was hungry."], TALKS,
     ["{friend} had a {food} and shared it with {him}.",
      "{friend} asked {him} in and gave {him} half of a {food}.",
      "{hero} and {friend} made a {food}, and there was enough for two."]),
    (ANY, ["There {she} found a bird that had hurt its wing.",
           "In the grass lay a young bird that could not fly.",
           "{She} heard a soft cry and saw a bird that was caught in a net."], TALKS,
     ["{friend} knew what to do, and soon the bird could fly again.",
      "{hero} and {friend} took care of the bird until it flew away.",
      "{hero} and {friend} made a soft nest for it, and the next day the bird sang."]),
    (ANY, ["In a field {she} found a huge pumpkin, but it was too heavy for {him}.",
           "A big stone lay on the path, and {she} could not move it at all.",
           "Somebody had left a heavy box on the road, and {she} could not get past it."], TALKS,
     ["{friend} pushed, {hero} pulled, and at last it moved.",
      "{friend} came with a cart, and then it was easy.",
      "{hero} and {friend} counted to three and rolled it to the side."]),
    (ANY, ["Then {she} heard a strange noise and was too scared to move.",
           "Something went bump and squeak, and {she} hid behind a tree."], TALKS,
     ["{friend} went to look, and it was only {noise}.",
      "{hero} and {friend} looked together, hand in hand, and found {noise}."]),
    (ANY, ["{friend} wanted the {thing} too, and they both pulled at it.",
           "{friend} took the {thing} without asking, and {hero} was angry.",
           "{friend} and {hero} could not agree who should have the {thing} first."],
     ['"That is not fair!" cried {hero}.', '"I had it first," said {hero}.', "{hero} did not say a word for an hour."],
     ["Then {friend} said sorry, and they took turns.",
      "{hero} thought about it and lent the {thing} to {friend}.",
      "At last they made up a new game with the {thing}, a game for two."]),
]
SUMS = [
    "They picked {a} {fruit} and found {b} more, and that makes {c} {fruit}.",
    "{A} {fruit} and {b} {fruit} make {c} {fruit}, and they ate them all.",
    "{hero} had {a} {fruit}, {friend} had {b}, and together they had {c}.",
]
ENDINGS = [
    "{hero} felt {glad} and went home with a smile.",
    '"Thank you, {friend}, you are a {praise} friend," said {hero}.',
    "It had been a {fine} {time}, and {hero} felt {glad}.",
    "{hero} gave {friend} a hug, and both of them felt {glad}.",
    "From that day on they met {place} every {time}.",
    "That night {hero} slept well and dreamed of a {colour} {thing}.",
    '"Come and play with me again tomorrow," said {hero}, and both felt {glad}.',
    "They laughed and sang all the way home, and {hero} felt {glad}.",
]


def story(rng: Random) -> str:
    """A story of 4 to 6 sentences about somebody small."""
    return " ".join(tell(rng))


def tell(rng: Random, **given: str) -> tuple[str, str]:
    """The opening of a story, and its rest. Slots in `given` keep their value; a given hero needs a given {she}."""
    plots = [plot for plot in PLOTS if "thing" not in given or given["thing"] in plot[0]]
    things, troubles, talks, helps = rng.choice(plots)
    she = given.get("she") or rng.choice(["she", "he"])
    her, him, child = {"she": ("her", "her", "girl"), "he": ("his", "him", "boy")}[she]
    hero = given.get("hero") or rng.choice(NAMES[she])
    friend = rng.choice(NAMES["she"] + NAMES["he"])
    while friend == hero:
        friend = rng.choice(NAMES["she"] + NAMES["he"])
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    slots = {slot: rng.choice(words) for slot, words in WORDS.items()} | {
        "hero": hero, "friend": friend, "she": she, "She": she.capitalize(), "her": her, "him": him,
        "kind": rng.choice([child, child, *ANIMALS]), "thing": rng.choice(things), "praise": rng.choice(PRAISE),
        "a": NUMBERS[a], "A": NUMBERS[a].capitalize(), "b": NUMBERS[b], "c": NUMBERS[a + b]} | given

    extra = rng.choice(["talk", "talk", "sum", "none"])
    opening, rest = rng.choice(OPENINGS), [rng.choice(troubles)]
    if extra == "talk":
        rest.append(rng.choice(talks))
    rest.append(rng.choice(helps))
    if extra == "sum":
        rest.append(rng.choice(SUMS))
    rest.append(rng.choice(ENDINGS))
    opening, rest = (" ".join(sentences).format(**slots) for sentences in (opening, rest))

    praise = f"{rng.choice(PRAISE)} " if rng.random() < 0.25 else ""
    return opening, re.sub(rf"\b{friend}\b", f"{friend} the {praise}{rng.choice(HELPERS)}", rest, count=1)


# ---- Stories as a task: a matter of taste, with no right answer and no verifier ----


class Stories(Task):
    """The opening of a story, to be continued:

        There lived a goat in the forest, a tiny one, and her name was Mia. One sunny morning she took her yellow basket and
        went for a walk.    Noah the gardener took the basket without asking, and Mia was angry. ...

    Its demonstrations are careless: in one story of two the sentences have lost their order. Readers have a taste, the
    *hidden reward*: it labels pairs of stories and is measured, but no gradient follows it unless --judge hidden says so. A
    script that learns from pairs sees only the choices.
    """

    name, difficulty, verifiable, room = "stories", None, False, 140
    careless = 0.5  # share of continuations whose sentences are shuffled
    label_temperature = 1.0  # points of hidden reward per nat of a reader's log-odds

    def __init__(self, difficulty: int | None = None):
        if difficulty is not None:
            raise ValueError(f"--difficulty {difficulty}: stories have none; leave it out")

    def draw(self, rng):
        return Problem(*tell(rng))

    def continuation(self, prompt: str, rng: Random) -> str:
        """Another way for the story to go on."""
        words = re.findall(r"\w+", prompt)
        hero, thing = (next(word for word in words if word in known) for known in (NAMES["she"] + NAMES["he"], ANY))
        given = {slot: next((phrase for phrase in WORDS[slot] if phrase in prompt), rng.choice(WORDS[slot]))
                 for slot in ("colour", "place", "time")}
        _, rest = tell(rng, she="she" if hero in NAMES["she"] else "he", hero=hero, thing=thing, **given)
        sentences = self.sentences(rest)
        if rng.random() < self.careless:
            rng.shuffle(sentences)
        return " ".join(sentences)

    @staticmethod
    def sentences(text: str) -> list[str]:
        return re.split(r"(?<=[.!?])\s+", text.strip())

    def demonstration(self, rng):
        problem = self.problem(rng, "train")
        return problem, self.continuation(problem.prompt, rng)

    def features(self, prompt: str, response: str) -> dict[str, float]:
        """What the hidden reward is made of, in points.

            feeling   2 if the last sentence says what somebody felt
            thing     1 if the thing of the opening comes up again
            speech    1 if somebody says something, in quotation marks
            praise    1 for each of the first two words of praise (brave, kind, ...), -1 for each further one
            short     -2 for each sentence short of three

        No pair shows that praise can be too much, or a story too short: whoever learns from pairs has to guess.
        """
        things = set(ANY).intersection(re.findall(r"\w+", prompt))
        words, sentences = re.findall(r"\w+", response.lower()), self.sentences(response)
        praise = sum(word in PRAISE for word in words)
        return {"feeling": 2.0 * (" felt " in sentences[-1]),
                "thing": 1.0 * any(word in things for word in words),
                "speech": 1.0 * bool(re.search(r'"[^"]+"', response)),
                "praise": 1.0 * (min(praise, 2) - max(praise - 2, 0)),
                "short": 2.0 * min(len(sentences) - 3, 0)}

    def hidden_reward(self, prompt: str, response: str) -> float:
        return sum(self.features(prompt, response).values())

    def verify(self, problem, response):
        return self.hidden_reward(problem.prompt, response)

    def grade(self, problem, response, finished):
        """A story that was cut off is read as far as it goes."""
        return self.verify(problem, response)

    def preferences(self, count: int) -> tuple[list[dict[str, str]], int]:
        """Pairs of continuations with the one that a reader chose: a with probability sigma((r_a - r_b) / label_temperature),
        r the hidden reward (Bradley-Terry). Also how many pairs were left out because both were the same."""
        rng, records, identical = Random("preferences"), [], 0
        while len(records) < count:
            problem = self.draw(rng)
            a, b = (self.continuation(problem.prompt, rng) for _ in "ab")
            margin = (self.hidden_reward(problem.prompt, a) - self.hidden_reward(problem.prompt, b)) / self.label_temperature
            if rng.random() >= 1 / (1 + math.exp(-margin)):
                a, b = b, a
            if a == b:
                identical += 1
            else:
                records.append({"prompt": problem.prompt, "chosen": a, "rejected": b})
        return records, identical


TASKS: dict[str, type[Task]] = {task.name: task for task in (Addition, Sums, Sorting, Reversal, Countdown, Code, Stories)}


def make_task(name: str, difficulty: int | None = None, needs_verifier: bool = True) -> Task:
    """The task of this name; by default it must be one that a program can check."""
    names = [name for name, task in TASKS.items() if task.verifiable or not needs_verifier]
    if name in TASKS and name not in names:
        raise ValueError(f"--task {name}: there is no verifier for it, only readers' preferences; expected {', '.join(names)}")
    if name not in names:
        raise ValueError(f"--task {name}: there is no such task; expected {', '.join(names)}")
    return TASKS[name](difficulty)


def answer_room(name: str) -> int:
    """How many tokens a response to this task may have, unless a flag says otherwise."""
    return TASKS.get(name, Task).room
