"""Tasks with turns: an action is answered, until the environment has nothing more to say."""

import re

from nanorl.tasks.arithmetic import parse_expression
from nanorl.tasks.base import MARKER, Problem, Task, integers


class Calculator(Task):
    """What is 347+585?    calc(347+585) -> 932    Answer: 932

    Half of the demonstrations use the calculator, and one in three of those types - for +.
    """

    name, difficulty_unit = "calculator", "digits per operand"
    difficulties, default_difficulty = range(1, 7), 3
    max_actions, max_answer_tokens, max_episode_tokens = 3, 24, 80
    worked_share = 0.5

    def draw(self, rng):
        a, b = (rng.randrange(10 ** (self.difficulty - 1), 10**self.difficulty) for _ in "ab")
        return Problem(f"What is {a}+{b}?", str(a + b))

    def work(self, state, rng):
        """Ask the calculator, then repeat what it said."""
        if state.before:
            return MARKER + state.prompt
        return "calc({}{}{})".format(integers(state.prompt)[0], "-" if rng.random() < 1 / 3 else "+", integers(state.prompt)[1])

    def observe(self, state, action):
        """The value of `calc(expression)`, or "error"; None after anything else, which is an answer."""
        call = re.fullmatch(r"calc\((.*)\)", action)
        if not call:
            return None
        found = parse_expression(call[1])
        return str(found[0]) if found and abs(found[0]) < 10**12 else "error"


class Guess(Task):
    """Guess from 1 to 32, game 4711.    16 -> higher, 17 to 32    24 -> lower, 17 to 23    20

    The reward of the right number is 1 at the first guess, and 0.1 less at each later one. Bisection is best: of 32 numbers it
    finds 1 at once, 2 at the second guess, 4, 8 and 16 at the third to fifth, and the last at the sixth, 4.22 in the mean. What
    is demonstrated is a random number, nine times in ten one that can still be right; always such a one would take 5.37.
    """

    name, highest = "guess", 32
    max_actions, max_answer_tokens, max_episode_tokens = 10, 6, 192
    worked_share = 1.0
    right_reward = None         # a guess is not right or wrong, but early or late

    def draw(self, rng):
        game = rng.randrange(10_000)        # held out are games: every number is to be guessed in both splits
        return Problem(f"Guess from 1 to {self.highest}, game {game}.", str(rng.randint(1, self.highest)))

    def read(self, action: str) -> int | None:
        """The number that was guessed, or None."""
        number = int(action) if re.fullmatch("[1-9][0-9]?", action) else 0
        return number if 1 <= number <= self.highest else None

    def bounds(self, state: Problem, action: str = "") -> tuple[int, int]:
        """The lowest and the highest number that can still be right after the guesses so far and this one."""
        number, said = int(state.answer), [*(text for role, text in state.before if role == "assistant"), action]
        guesses = [0, *(guess for text in said if (guess := self.read(text))), self.highest + 1]
        return max(g for g in guesses if g < number) + 1, min(g for g in guesses if g > number) - 1

    def work(self, state, rng):
        return str(rng.randint(*self.bounds(state)) if rng.random() < 0.9 else rng.randint(1, self.highest))

    def direct(self, state, rng):
        return state.answer

    def observe(self, state, action):
        """Which way the number is, and what it can still be; None if it was guessed."""
        guess, number = self.read(action), int(state.answer)
        way = "no number" if guess is None else "higher" if guess < number else "lower"
        return None if guess == number else "{}, {} to {}".format(way, *self.bounds(state, action))

    def verify(self, state, action):
        """0.1 for each guess that was left, this one included, if the number is right, else 0."""
        return (self.max_actions - len(state.before) // 2) / self.max_actions * float(self.read(action) == int(state.answer))

    def adversarial(self, problem):
        gold = problem.answer
        return ["", "0", "right", problem.prompt, f"0{gold}", f" {gold}", f"{gold}\n", f"{gold}.0", f"{gold} or so", "9" * 9999,
                " ".join(map(str, range(1, self.highest + 1)))]

    def ballot(self, response):
        numbers = re.findall("[0-9]+", response)
        return numbers[-1] if numbers else None
