"""Your own questions, from a file."""

from collections.abc import Iterable

from nanorl.errors import UserError, refuse
from nanorl.tasks.base import MARKER, MAX_ANSWER_CHARACTERS, Problem, Task, final_answer, is_heldout


class FileTask(Task):
    """Your own questions, as (prompt, answer) pairs. An answer must match up to the amount of white space."""

    def __init__(self, pairs: Iterable[tuple[str, str]], name: str = "file", places: list[str] | None = None):
        """`places`: where the pairs stand in the file."""
        super().__init__()
        self.name = name
        self.problems = [Problem(prompt, answer) for prompt, answer in pairs]
        self.places = places or [f"record {number}" for number in range(1, len(self.problems) + 1)]
        faults = [f"{place}: {problem.answer[:40]!r}" for place, problem in zip(self.places, self.problems, strict=True)
                  if not problem.answer.strip() or not self.verify(problem, self.direct(problem, None))]
        if faults:
            refuse(name, faults, f"an answer that can be given: 1 to {MAX_ANSWER_CHARACTERS} characters without {MARKER!r}")
        self.keep([*range(len(self.problems))])

    def keep(self, kept: list[int]) -> None:
        """Leave out the other problems. UserError where that empties a split."""
        self.problems, self.places = ([part[i] for i in kept] for part in (self.problems, self.places))
        total, heldout = len(self.problems), sum(is_heldout(problem.prompt) for problem in self.problems)
        if heldout in (0, total):
            raise UserError(f"{self.name}: the {'heldout' if heldout == 0 else 'train'} split is empty: one prompt in ten is "
                            f"held out by its hash, here {heldout} of {total}")

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
