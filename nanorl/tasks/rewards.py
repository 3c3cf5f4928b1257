"""A reward function of one's own, in place of a verifier: `--reward FILE.py:NAME`."""

import sys
import traceback
from collections.abc import Callable
from typing import Any

from nanorl.errors import UserError, printable
from nanorl.load import load_function
from nanorl.tasks.base import Problem, Task

ENOUGH = 32     # responses, of several prompts
SIGNATURE = 'a function (prompt, response, record) -> a number, {"part": number}, or None where the response cannot be scored'


class RewardFunction:
    """(prompt, response, record) -> a number, {"part": number, ...}, or None, as the `reward` of a task.

    record is the object of the file, or of a task that has none {"prompt", "answer"}. Where the function raises, the response
    cannot be scored, which is never a reward of 0: the first such record is shown, and all are counted. A function that has
    done nothing else on ENOUGH responses ends the run.
    """

    def __init__(self, function: Callable[[str, str, dict], Any], name: str):
        self.function, self.name, self.asked, self.raised, self.scored = function, name, 0, 0, False

    def __call__(self, problems: list[Problem], responses: list[str], finished: list[bool]) -> list[Any]:
        rewards = list(map(self.score, problems, responses))
        self.asked += len(responses)
        if self.raised == self.asked >= ENOUGH:
            raise UserError(f"--reward {self.name}: raised an exception on all {self.asked} responses, first the one above")
        if responses and not self.scored and all(reward is None for reward in rewards):
            print(f"warning: --reward {self.name}: None for all of {len(responses)} responses: nothing to learn from them",
                  file=sys.stderr)
        self.scored = self.scored or any(reward is not None for reward in rewards)
        return rewards

    def score(self, problem: Problem, response: str) -> Any:
        record = problem.record or {"prompt": problem.question or problem.prompt, "answer": problem.answer}
        try:
            return self.function(problem.prompt, response, dict(record))
        except (Exception, SystemExit) as e:
            self.raised += 1
            if self.raised == 1:
                line = traceback.extract_tb(e.__traceback__)[-1].lineno
                print(printable(f"warning: --reward {self.name}: {type(e).__name__}: {e} (line {line}), for the record "
                                f"{record!r:.200} and the response {response!r:.200}. Such responses enter no mean and teach "
                                "nothing; their share is logged as rollout/unscored."), file=sys.stderr)
            return None


def use_reward(task: Task, name: str) -> None:
    """From now on, a function of the user's says what responses to this task are worth. None of them is right or wrong."""
    task.reward, task.right_reward = RewardFunction(load_function(name, SIGNATURE, "--reward"), name), None
