"""Your own questions, from a file."""

from collections import defaultdict
from collections.abc import Iterable
from random import Random

from nanorl.errors import UserError, refuse
from nanorl.tasks.base import MARKER, MAX_ANSWER_CHARACTERS, Problem, Task, final_answer, is_heldout

# What a right response would have to say, and what the answer had better be.
UNLIKELY = {"####": "'####'; keep only what follows it", r"\boxed": r"'\boxed'; keep only what its braces hold",
            "\n": "several lines; keep only the final answer"}


def _unlikely(problem: Problem) -> list[str]:
    return [sign for sign in UNLIKELY if sign in problem.answer.strip()][:1]


class FileTask(Task):
    """Your own questions, as (prompt, answer) pairs. An answer must match up to the amount of white space.

    The rows are finite. An evaluation asks each once; training takes each once an epoch, in an order that `seed` decides.
    """

    right_reward = 1.0

    def __init__(self, pairs: Iterable[tuple[str, str]], name: str = "file", places: list[str] | None = None, seed: int = 0):
        """`places`: where the pairs stand in the file."""
        super().__init__()
        self.name, self.seed = name, seed
        self.problems = [Problem(prompt, answer) for prompt, answer in pairs]
        self.places = places or [f"record {number}" for number in range(1, len(self.problems) + 1)]
        faults = [f"{place}: {problem.answer[:40]!r}" + "".join(f", which holds {UNLIKELY[s]}" for s in _unlikely(problem))
                  for place, problem in zip(self.places, self.problems, strict=True)
                  if not self.ballot(self.direct(problem, None))]
        if faults:
            refuse(name, faults, f"an answer that can be given: 1 to {MAX_ANSWER_CHARACTERS} characters without {MARKER!r}")
        self.keep([*range(len(self.problems))])

    def keep(self, kept: list[int]) -> None:
        """Leave out the other rows."""
        self.problems, self.places = ([part[i] for i in kept] for part in (self.problems, self.places))
        self.splits = {"all": self.problems, "train": [], "heldout": []}
        for problem in self.problems:
            self.splits["heldout" if is_heldout(problem.prompt) else "train"].append(problem)

    def rows(self, split: str) -> list[Problem]:
        """The problems of a split, at least one, in the order of the file."""
        if not self.splits[split]:
            raise UserError(f"{self.name}: the {split} split is empty: one prompt in ten is held out by its hash, here "
                            f"{len(self.splits['heldout'])} of {len(self.problems)}; expected more rows, or an evaluation with "
                            "--split all")
        return self.splits[split]

    def warnings(self):
        """Rows whose answers will hardly be given, or contradict each other."""
        found, answers = defaultdict(list), {}
        for place, problem in zip(self.places, self.problems, strict=True):
            if answers.setdefault(problem.prompt, problem.answer.split()) != problem.answer.split():
                found["an earlier row has this prompt and another answer; no response is right by both, so keep one"] += [place]
            for sign in _unlikely(problem):
                found[f"a response is right only if it says all of the answer, with {UNLIKELY[sign]}"] += [place]
        return [f"{self.where(places)}: {what}" for what, places in found.items()]

    def where(self, places: list[str]) -> str:
        return f"{self.name}, {', '.join(places[:3])}" + (f" and {len(places) - 3} more" if places[3:] else "")

    def draw(self, rng):
        return rng.choice(self.problems)

    def choose(self, rng, split, count):
        """All rows of the split, or `count` of them where it has more. One that repeats another is asked once."""
        rows = list(dict.fromkeys(self.rows(split)))
        return rows if len(rows) <= count else rng.sample(rows, count)

    def training_problems(self, rng, drawn):
        """Each row once an epoch, in an order of that epoch."""
        rows = self.rows("train")
        epoch, done = divmod(drawn, len(rows))
        while True:
            yield from Random(f"{self.seed}/prompts/{epoch}").sample(rows, len(rows))[done:]
            epoch, done = epoch + 1, 0

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
