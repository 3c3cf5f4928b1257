"""Your own questions, from a file."""

from collections.abc import Iterable

from nanorl.errors import UserError
from nanorl.tasks.base import MARKER, MAX_ANSWER_CHARACTERS, Problem, Task, final_answer, is_heldout


class FileTask(Task):
    """Your own questions, as (prompt, answer) pairs. An answer must match up to the amount of white space."""

    def __init__(self, pairs: Iterable[tuple[str, str]], name: str = "file"):
        super().__init__()
        self.name = name
        self.problems = [Problem(prompt, answer) for prompt, answer in pairs]
        for number, problem in enumerate(self.problems, 1):
            if not problem.answer.strip() or not self.verify(problem, self.direct(problem, None)):
                raise UserError(f"{name}, record {number}: no response can have {problem.answer[:40]!r} as its answer, "
                                 f"which must be 1 to {MAX_ANSWER_CHARACTERS} characters without {MARKER!r}")
        total, heldout = len(self.problems), sum(is_heldout(problem.prompt) for problem in self.problems)
        if heldout in (0, total):
            raise UserError(f"{name}: the {'heldout' if heldout == 0 else 'train'} split is empty: one prompt in ten is held "
                             f"out by its hash, here {heldout} of {total}")

    def draw(self, rng):
        return rng.choice(self.problems)

    def examples(self):
        return self.problems

    def demonstration(self, rng):
        raise UserError(f"{self.name}: has prompts and answers, but no demonstrations")

    def work(self, problem, rng):
        return self.demonstration(rng)

    def verify(self, problem, response):
        return float(self.ballot(response) == " ".join(problem.answer.split()))

    def ballot(self, response):
        answer = final_answer(response)
        return None if answer is None else " ".join(answer.split())
