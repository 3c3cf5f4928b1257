"""What all tasks share: problems and their two splits, demonstrations, and the reward of a response."""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

from nanorl.errors import UserError

MARKER = "Answer: "  # a response's final answer follows it
MAX_ANSWER_CHARACTERS = 256  # anything longer is not an answer
MANY_DRAWS = 10_000  # of which at least one belongs to either split, if prompts vary at all


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str  # the gold answer; one of them where several are right (countdown)
    before: tuple[tuple[str, str], ...] = ()  # (role, content) of the messages before the prompt
    question: str = ""  # the question alone, where the prompt says more: its hash decides whether it is held out
    record: dict[str, Any] = field(default_factory=dict, compare=False)  # the object of a file

    @property
    def conversation(self) -> str | list[dict[str, str]]:
        """What the model reads: the prompt, or messages that end with it."""
        if not self.before:
            return self.prompt
        return [{"role": role, "content": content} for role, content in (*self.before, ("user", self.prompt))]

    def after(self, action: str, observation: str) -> "Problem":
        """The state after an action and what the environment said to it."""
        before = (*self.before, ("user", self.prompt), ("assistant", action))
        return replace(self, prompt=observation, before=before, question=self.question or self.prompt)

    @property
    def is_heldout(self) -> bool:
        return is_heldout(self.question or self.prompt)


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

    `verify` must take any string and give a reward in bounded time, without raising: the highest for `direct` ones, less for
    `adversarial` ones. nanorl/first_step.py checks what it gives for a few `examples` before a run, tests/test_tasks.py tries
    every task in TASKS on attacks and on arbitrary text. Its results enter by `grade` alone.
    """

    name: str
    verifiable = True
    max_answer_tokens = 80  # the default of --max-new-tokens
    difficulties = range(0)  # that can be chosen: none
    difficulty: int | None = None
    default_difficulty: int | None = None
    difficulty_unit = ""  # what the difficulty counts
    worked_share = 0.3  # of the demonstrations: most are direct
    scores_truncated = False  # a truncated response gets no more than 0
    max_actions = 1  # of an episode: more where the environment answers
    max_episode_tokens: int | None = None  # of all actions and observations; None: of one action, --max-new-tokens
    reward: Callable[[list[Problem], list[str], list[bool]], list[Any]] | None = None  # in place of `rewards` (rewards.py)

    def __init__(self, difficulty: int | None = None):
        self.difficulty = self.default_difficulty if difficulty is None else difficulty

    def __str__(self) -> str:
        return self.name if self.difficulty == self.default_difficulty else f"{self.name}-{self.difficulty}"

    def start_verifier(self) -> None:
        """Start what the verifier needs, so that a ValueError says early if this machine cannot run it."""

    @functools.cached_property
    def right_reward(self) -> float | None:
        """An answer that gets at least this is right, any other wrong. None: no answer is right or wrong.

        A class may say it: `right_reward = 1.0`. Else it is the highest reward, what gold answers get: all of them the same,
        and no adversarial answer as much.
        """
        graded = [rewards for _, _, rewards in self.graded_examples()] if self.verifiable else []
        golds, others = {gold for gold, *_ in graded}, [reward for _, *rest in graded for reward in rest]
        return min(golds) if len(golds) == 1 and all(reward < min(golds) for reward in others) else None

    def without_right(self) -> str:
        """Why no answer is right or wrong, as a sentence."""
        if self.reward:
            why = f"{self.reward.name} judges them"
        elif type(self).right_reward is None:
            why = "its `right_reward` is None"
        else:
            why = "its class names no `right_reward`, and its gold answers do not all get one reward that no other answer gets"
        return f"no answer to {self} is right or wrong, for {why}"

    def require_right(self, what: str) -> None:
        """UserError where no answer is right or wrong."""
        if self.right_reward is None:
            raise UserError(f"{what} {self.without_right()}")

    def warnings(self) -> list[str]:
        """What the user should know at the start."""
        meant = self.reward or type(self).right_reward is None or self.measured != "reward"
        return [] if meant else [f"the mean reward is measured, no accuracy: {self.without_right()}"]

    @property
    def measured(self) -> str:
        """What an evaluation means by the value of an answer."""
        return "accuracy" if self.right_reward is not None else "reward" if self.verifiable else "hidden reward"

    def response_limit(self, max_new_tokens: int) -> tuple[int, str]:
        """The most tokens that may follow a prompt, and what sets this limit: that of an episode, or else of one answer."""
        if self.max_episode_tokens is None:
            return max_new_tokens, "--max-new-tokens"
        return self.max_episode_tokens, f"task {self}, max_episode_tokens"

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

    def graded_examples(self) -> Iterator[tuple[Problem, list[str], list[float]]]:
        """A few problems, each with a gold response, then adversarial ones, and the rewards of all of them."""
        for problem in self.examples()[:20]:
            responses = [self.direct(problem, Random(0)), *self.adversarial(problem)]
            yield problem, responses, grade(self, [problem] * len(responses), responses, [True] * len(responses)).rewards

    def problem(self, rng: Random, split: str) -> Problem:
        """A problem of this split, "train", "heldout" or "all": draw until a prompt's hash falls into it."""
        for _ in range(MANY_DRAWS):
            problem = self.draw(rng)
            if split in ("all", "heldout" if problem.is_heldout else "train"):
                return problem
        raise UserError(f"task {self}: none of {MANY_DRAWS:,} problems is of the {split} split. One prompt in ten is held out, "
                        "by its hash; expected prompts that vary")

    def choose(self, rng: Random, split: str, count: int) -> list[Problem]:
        """The problems of an evaluation."""
        return [self.problem(rng, split) for _ in range(count)]

    def training_problems(self, rng: Random, drawn: int) -> Iterator[Problem]:
        """Problems to train on, without end. A file goes on after the `drawn` that a run has had before."""
        while True:
            yield self.problem(rng, "train")

    def demonstration(self, rng: Random) -> tuple[Problem, str]:
        """A training problem and a right response, worked out with probability `worked_share`."""
        problem = self.problem(rng, "train")
        respond = self.work if rng.random() < self.worked_share else self.direct
        return problem, respond(problem, rng)

    def demonstrations(self, count: int) -> list[dict[str, Any]]:
        """Records to fine-tune on: the first `count` of a stream that name and difficulty determine."""
        rng, records = Random(f"{self.name} {self.difficulty}"), []
        while len(records) < count:
            state, action = self.demonstration(rng)
            for _ in range(self.max_actions):
                records.append({"prompt": state.conversation, "response": action})
                if (said := self.observe(state, action)) is None:
                    break
                state = state.after(action, said)
                action = self.work(state, rng)
        return records[:count]

    def verify(self, problem: Problem, response: str) -> float:
        """1.0 for a right answer, else 0.0. Answers are compared as texts: '0932' and '932.' are not '932'."""
        return float(final_answer(response) == problem.answer)

    def observe(self, state: Problem, action: str) -> str | None:
        """What the environment says to an action, for any string, in bounded time, without raising. None ends the episode.

        `state` is the conversation so far: the problem, and after each observation `state.after(action, observation)`.
        `verify(state, action)` pays for the action; the reward of an episode is the sum over its actions.
        """
        return None

    def rewards(self, problems: list[Problem], responses: list[str], finished: list[bool]) -> list[Any]:
        """The rewards of sampled responses, of which those that are not finished were cut off by the token limit."""
        return list(map(self.verify, problems, responses))

    def lenient(self, problem: Problem, response: str) -> float | None:
        """1.0 for a response that is right but for its format, else 0.0. None: the task reads one format only."""
        return None

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


class Grades(NamedTuple):
    rewards: list[float]            # nan: the response could not be scored, and enters no mean
    parts: dict[str, list[float]]   # what the rewards are sums of, where the task names them; nan where a response has no such


def grade(task: Task, problems: list[Problem], responses: list[str], finished: list[bool]) -> Grades:
    """The rewards of responses. This is the one place where rewards enter: nothing else calls `rewards`.

    A reward is a number (True and False, whole numbers, fractions, scalars of NumPy and torch are converted), several with
    names, {"part": number}, which are added up, or None where the response cannot be scored. UserError names anything else.
    """
    asked = (problems, responses, finished)
    given = task.reward(*asked) if task.reward else task.rewards(*asked)
    try:
        each = list(given)
    except TypeError:
        each = []
    if len(each) != len(responses):
        raise UserError(f"task {task}: `rewards` gives {len(each)} rewards ({given!r:.60}) for {len(responses)} responses; "
                        "expected one for each")
    rewards, parts = [], {}
    for i, (reward, problem, response) in enumerate(zip(each, problems, responses, strict=True)):
        if isinstance(reward, dict) and reward:
            named = {str(name): _finite(part, task, problem, response) for name, part in reward.items()}
            for name, part in named.items():
                parts.setdefault(name, [math.nan] * len(responses))[i] = part
            reward = sum(named.values())
        number = math.nan if reward is None else _finite(reward, task, problem, response)
        cut = number > 0 and not (finished[i] or task.scores_truncated)
        rewards.append(0.0 if cut else number)
        for part in parts.values() if cut else ():
            part[i] *= 0.0          # so that parts add up to rewards
    return Grades(rewards, parts)


def _finite(reward: Any, task: Task, problem: Problem, response: str) -> float:
    try:
        number = math.nan if isinstance(reward, str | bytes) else float(reward)
    except OverflowError:           # a whole number, perhaps of more digits than Python shows
        number = reward = math.inf
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not abs(number) < 1e30:      # nan, inf, and what float32 cannot hold
        raise UserError(f"task {task}: the reward of {response[:40]!r} to {problem.prompt[:60]!r} is {reward!r:.60}; expected "
                        'a finite number, True or False, {"part": number}, or None where the response cannot be scored')
    return number
