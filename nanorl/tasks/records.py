"""Your own questions, from a file."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random

from nanorl.errors import UserError, refuse
from nanorl.files import Record, first_question, read_records
from nanorl.tasks.base import MARKER, Problem, Task
from nanorl.tasks.code import UnitTests
from nanorl.tasks.sandbox import shared_sandbox
from nanorl.tasks.verifiers import MARK, Verifier
from nanorl.tasks.verifiers import VERIFIERS as READERS

VERIFIERS = {**READERS, "code": UnitTests(), "none": Verifier("anything", str)}  # none: a reward function judges


class FileTask(Task):
    """Your own questions. A verifier says how a response is compared with the answer.

    The rows are finite. An evaluation asks each once; training takes each once an epoch, in an order that `seed` decides.
    """

    right_reward = 1.0

    def __init__(self, problems: Iterable[Problem | tuple[str, str]], name: str = "file", places: list[str] | None = None,
                 seed: int = 0, verifier: str = "exact", heldout: int = 0):
        """problems: a tuple is a prompt and its answer. The last `heldout` of them are held out, or else one in ten by its
        hash. places: where they stand in the file."""
        super().__init__()
        if verifier not in VERIFIERS:
            raise UserError(f"{name}: verifier {verifier!r:.40}; expected one of {', '.join(VERIFIERS)}")
        self.name, self.seed, self.verifier = name, seed, VERIFIERS[verifier]
        self.problems = [each if isinstance(each, Problem) else Problem(*each) for each in problems]
        self.places = places or [f"record {number}" for number in range(1, len(self.problems) + 1)]
        first_held = len(self.problems) - heldout
        self.held = [i >= first_held if heldout else problem.is_heldout for i, problem in enumerate(self.problems)]
        faults = [f"{place}: {problem.answer[:40]!r}" for place, problem in zip(self.places, self.problems, strict=True)
                  if self.gold(problem) is None]
        if faults:
            refuse(name, faults, f"as an answer {self.verifier.kind}; see --verifier")
        self.keep([*range(len(self.problems))])

    def keep(self, kept: list[int]) -> None:
        """Leave out the other rows."""
        self.problems, self.places, self.held = ([part[i] for i in kept] for part in (self.problems, self.places, self.held))
        self.splits = {"all": self.problems, "train": [], "heldout": []}
        for problem, held in zip(self.problems, self.held, strict=True):
            self.splits["heldout" if held else "train"].append(problem)

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
        if self.reward:
            return []
        for place, problem in zip(self.places, self.problems, strict=True):
            gold = self.gold(problem)
            if answers.setdefault((problem.before, problem.prompt), gold) != gold:
                found["an earlier row has this prompt and another answer; no response is right by both, so keep one"] += [place]
            if "\n" in problem.answer.strip() and gold == " ".join(problem.answer.split()):
                found["a response is right only if it says all of these lines; keep only the final answer"] += [place]
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

    def start_verifier(self):
        if self.verifier.runs_programs:
            shared_sandbox()

    def gold(self, problem: Problem) -> str | None:
        """What the record's answer says, as the verifier spells it."""
        return self.verifier.gold(problem.answer)

    def ballot(self, response):
        return self.verifier.strict(response)

    def verify(self, problem, response):
        return float(self.verifier.right([self.gold(problem)], [response])[0])

    def rewards(self, problems, responses, finished):
        if self.verifier.runs_programs:          # many programs at a time
            return list(map(float, self.verifier.right([self.gold(problem) for problem in problems], responses)))
        return super().rewards(problems, responses, finished)

    def lenient(self, problem, response):
        return float(self.verifier.lenient(response) == self.gold(problem)) if self.verifier.last else None

    def direct(self, problem, rng):
        return MARKER + self.gold(problem)

    def work(self, problem, rng):
        raise UserError(f"{self.name}: has answers, but no way to work them out")

    def demonstrations(self, count):
        """The training rows with their responses; where a row has none, with its answer: as it stands if that is right, as
        `... #### 18` is, or else after `Answer: `."""
        self.rows("train")      # or an error
        records = []
        for place, problem, held in zip(self.places, self.problems, self.held, strict=True):
            if not held and len(records) < count:
                said = problem.record.get("response")
                if not isinstance(said, str) or said in ("", problem.answer):
                    said = problem.answer if self.verify(problem, problem.answer) else self.direct(problem, None)
                records.append(Record(prompt=problem.conversation, response=said))
                records[-1].place = place
        return records

    def graded_examples(self):
        """None of tests: they are not the program that passes them."""
        return iter(()) if self.verifier.runs_programs else super().graded_examples()

    def adversarial(self, problem):
        gold = self.gold(problem)
        return [text for text in super().adversarial(replace(problem, answer=gold)) if self.ballot(text) != gold]

    def style(self, response):
        mark = MARK.search(response)
        return "" if not mark else "worked" if response[: mark.start()].strip() else "direct"


class Records(FileTask):
    """The questions of a file: what --data makes, and for `--task FILE.py:NAME` with all that --data leaves no room for."""

    def __init__(self, path: str, *, prompt: str | Callable[[dict], str] = "", system: str = "",
                 shots: Sequence[tuple[str, str]] = (), verifier: str = "exact", heldout: str = "", seed: int = 0):
        """prompt: what is asked, as a format with the record's keys, "{question} Think first.", or as a function of the record;
        {prompt} is the question under any of its names.
        system: a system message. shots: questions and answers that come before, as turns of the user and the assistant.
        heldout: a file to evaluate with, in place of one in ten of `path`; its questions are then left out of `path`.
        """
        before = (("system", system),) * bool(system)
        before += tuple(turn for question, answer in shots for turn in (("user", question), ("assistant", answer)))
        kind, optional = "programs" if verifier == "code" else "problems", ("answer",) if verifier == "none" else ()
        rows, others = read_records(path, kind, optional), read_records(heldout, kind, optional) if heldout else []
        asked = {first_question(record["prompt"]) for record in others}
        rows = [record for record in rows if first_question(record["prompt"]) not in asked]
        places = [record.place for record in rows] + [f"{heldout}, {record.place}" for record in others]
        problems = [problem_of(record, before, prompt, f"{path}, {place}")
                    for record, place in zip([*rows, *others], places, strict=True)]
        super().__init__(problems, path, places, seed, verifier, len(others))


def problem_of(record: Record, before: tuple[tuple[str, str], ...], prompt: str | Callable[[dict], str], place: str) -> Problem:
    """The problem of a record, with these messages before it and the prompt of this format."""
    asked = record["prompt"]
    if isinstance(asked, list):
        *earlier, asked = [(message["role"], message["content"]) for message in asked]
        asked, before = asked[1], (*(before if earlier[0][0] != "system" else ()), *earlier)
    if callable(prompt):
        asked = prompt(record.source)
    elif prompt:
        try:
            asked = prompt.format_map({"prompt": asked} | record.source)
        except (LookupError, ValueError, AttributeError, TypeError) as e:
            raise UserError(f"{place}: the prompt {prompt!r:.60} does not fit the record ({type(e).__name__}: {e}); it has "
                            f"{', '.join(map(repr, record.source)):.60}") from None
    if not isinstance(asked, str) or not asked:
        raise UserError(f"{place}: the prompt is {asked!r:.60}; expected a text")
    return Problem(asked, record["answer"], before, first_question(record["prompt"]), record.source)
