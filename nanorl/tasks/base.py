"""What all tasks share: problems and their two splits, demonstrations, and the reward of a response."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

MARKER = "Answer: "  # a response's final answer follows it
MAX_ANSWER_CHARACTERS = 256  # anything longer is not an answer


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str  # the gold answer; one of them where several are right (countdown)


def final_answer(response: str) -> str | None:
    """The text after the marker, without surrounding spaces; None unless there is exactly one marker.

    Listing several answers must not pay, so a second marker forfeits the first. What is returned is still model output.
    """
    if response.count(MARKER) != 1:
        return None
    answer = response.partition(MARKER)[2].strip()
    return answer if len(answer) <= MAX_ANSWER_CHARACTERS else None


def is_heldout(prompt: str) -> bool:
    """One prompt in ten is never trained on, decided by the prompt's text alone."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10 == 0


def worked_response(steps: Iterable[str], answer: str) -> str:
    return f"{', '.join(steps)}. {MARKER}{answer}"


def integers(text: str) -> list[int]:
    """The numbers in a prompt of ours, in order. Never for model output."""
    return [int(digits) for digits in re.findall(r"[0-9]+", text)]


class Task:
    """A family of problems. A subclass says how to `draw` one and how to `work` it out; the rest is shared.

    `verify` must take any string and give 0.0 or 1.0 in bounded time, without raising: 1.0 for `direct`, 0.0 for `adversarial`
    ones. nanorl/first_step.py checks what it gives for a few `examples` before a run, tests/test_tasks.py tries every task in
    TASKS on attacks and on arbitrary text.
    """

    name: str
    verifiable = True
    max_answer_tokens = 80  # the default of --max-new-tokens
    difficulties = range(0)  # that can be chosen: none
    default_difficulty: int | None = None
    difficulty_unit = ""  # what the difficulty counts
    worked_share = 0.3  # of the demonstrations: most are direct

    def __init__(self, difficulty: int | None = None):
        self.difficulty = self.default_difficulty if difficulty is None else difficulty

    def __str__(self) -> str:
        return self.name if self.difficulty == self.default_difficulty else f"{self.name}-{self.difficulty}"

    def start_verifier(self) -> None:
        """Start what the verifier needs, so that a ValueError says early if this machine cannot run it."""

    def draw(self, rng: Random) -> Problem:
        """A problem of either split."""
        raise NotImplementedError

    def work(self, problem: Problem, rng: Random) -> str:
        """A right response that gets to the answer in easy steps."""
        raise NotImplementedError

    def direct(self, problem: Problem, rng: Random) -> str:
        """A right response without any steps."""
        return MARKER + problem.answer

    def examples(self) -> list[Problem]:
        """Enough problems of either split to see how long a prompt can be, and to check the verifier."""
        return [self.draw(Random(i)) for i in range(1000)]

    def problem(self, rng: Random, split: str) -> Problem:
        """A problem of this split: draw until a prompt's hash falls into it."""
        while is_heldout((problem := self.draw(rng)).prompt) != (split == "heldout"):
            pass
        return problem

    def demonstration(self, rng: Random) -> tuple[Problem, str]:
        """A training problem and a right response, worked out with probability `worked_share`."""
        problem = self.problem(rng, "train")
        respond = self.work if rng.random() < self.worked_share else self.direct
        return problem, respond(problem, rng)

    def demonstrations(self, count: int) -> list[dict[str, str]]:
        """Records to fine-tune on: the first `count` of a stream that name and difficulty determine."""
        rng = Random(f"{self.name} {self.difficulty}")
        drawn = (self.demonstration(rng) for _ in range(count))
        return [{"prompt": problem.prompt, "response": response} for problem, response in drawn]

    def verify(self, problem: Problem, response: str) -> float:
        """1.0 for a right answer, else 0.0. Answers are compared as texts: '0932' and '932.' are not '932'."""
        return float(final_answer(response) == problem.answer)

    def rewards(self, problems: list[Problem], responses: list[str], finished: list[bool]) -> list[float]:
        """The rewards of sampled responses. An unfinished one, cut off by the token limit, scores 0."""
        return [self.verify(problem, response) if done else 0.0
                for problem, response, done in zip(problems, responses, finished, strict=True)]

    def adversarial(self, problem: Problem) -> list[str]:
        """Responses that must not pay: echoes, several answers, additions to the right one, code."""
        gold = MARKER + problem.answer
        texts = ["", MARKER, problem.prompt, problem.answer, MARKER + problem.prompt, MARKER + "1 " + gold, gold + " " + gold,
                 gold + "\n" + MARKER, gold + "\0", gold + " or so", f"{gold}={problem.answer}", gold + " " * 300 + "x",
                 MARKER + "9**9**9", MARKER + "__import__('os').abort()", MARKER + "(" * 5000, MARKER + "9" * 100_000]
        return [text for text in texts if (final_answer(text) or "").split() != problem.answer.split()]

    def style(self, response: str) -> str:
        """How a response answers: "worked" with text before the marker, "direct" with none, "" if it has no marker."""
        steps, marker, _ = response.partition(MARKER)
        return "" if not marker else "worked" if steps.strip() else "direct"

    def ballot(self, response: str) -> str | None:
        """What a finished response votes for; None if it has no answer. Equal ballots get equal rewards."""
        return final_answer(response)
