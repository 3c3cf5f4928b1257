"""The toy world: problems that a program can check, and short stories. Text only, no models and no tensors.

    base.py         what all tasks share: problems, splits, demonstrations, rewards
    arithmetic.py   addition, sums, countdown, and a parser of expressions
    strings.py      sorting, reversal
    environments.py a calculator and a guessing game, which answer and go on
    code.py         programs for lists of numbers
    sandbox.py      runs such programs in processes that can do nothing else
    stories.py      stories to continue, with a hidden reward in place of a verifier
    records.py      your own questions, from a file
    verifiers.py    how a response is compared with the answer of a file: a text, a number, a choice
    rewards.py      a reward function of your own

A *problem* is a prompt and its gold answer. A *response* follows the prompt and one space, in one of two styles (a program
has its own):

    direct    Answer: 932
    worked    7+5=12, 4+8+1=13, 3+5+1=09. Answer: 932

A tiny model cannot add three digits in one go but can add digit by digit, so a verifier's reward alone can teach it to
work. Two rules keep that reward honest:

1. A response is untrusted text. It is compared, or read by a small parser; only a program is run, and only in the sandbox.
   A verifier gives any string a number, ours 0.0 or 1.0, in bounded time.
2. A prompt belongs to "train" or "heldout" by its own hash: no seed, process or script can move it to the other side.

Randomness is always a `random.Random` that the caller made.
"""

import inspect

from nanorl.errors import UserError
from nanorl.load import load_named
from nanorl.tasks.arithmetic import Addition, Countdown, Sums
from nanorl.tasks.base import Problem, Task, final_answer, grade, is_heldout
from nanorl.tasks.code import Code
from nanorl.tasks.environments import Calculator, Guess
from nanorl.tasks.records import FileTask, Records
from nanorl.tasks.rewards import use_reward
from nanorl.tasks.stories import Stories, story
from nanorl.tasks.strings import Reversal, Sorting

TASKS: dict[str, type[Task]] = {task.name: task for task in (Addition, Sums, Sorting, Reversal, Countdown, Calculator, Guess,
                                                              Code, Stories)}


def own_task(name: str) -> Task:
    """What FILE.py:NAME names: a Task of the user's, or a class or function that makes one."""
    expected = "a Task, as nanorl.tasks has them, or Records(...)"
    found = load_named(name, expected, "--task")
    if callable(found):
        try:
            inspect.signature(found).bind()
        except TypeError as e:
            raise UserError(f"--task {name}: {e}; expected {expected}, or what makes one without arguments; a function that "
                            "rewards is --reward") from None
    task = found() if callable(found) else found
    if not isinstance(task, Task) or not isinstance(getattr(task, "name", None), str):
        raise UserError(f"--task {name}: is {task!r:.60}; expected {expected}, with a `name`")
    for limit in ("max_answer_tokens", "max_actions", "max_episode_tokens"):
        value = getattr(task, limit)
        if not ((type(value) is int and value >= 1) or (limit == "max_episode_tokens" and value is None)):
            raise UserError(f"--task {name}: {limit} is {value!r:.40}; expected a whole number of at least 1")
    if task.max_actions == 1 and type(task).observe is not Task.observe:
        raise UserError(f"--task {name}: it has `observe`, but max_actions is 1, so nothing is observed; expected more")
    if task.max_actions > 1 and task.max_episode_tokens is None:
        raise UserError(f"--task {name}: max_actions is {task.max_actions}, but the tokens of an episode have no limit; "
                        "expected max_episode_tokens, of all actions and observations")
    return task


def make_task(name: str, needs_verifier: bool = True) -> Task:
    """The task "addition", or "addition-4" at difficulty 4, or what FILE.py:NAME names. By default it must be one
    that a program can check."""
    if ".py:" in name:
        return own_task(name)
    family, dash, difficulty = name.partition("-")
    choices = {each: task for each, task in TASKS.items() if task.verifiable or not needs_verifier}
    if family not in choices:
        wrong = "there is no verifier for it, only readers' preferences" if family in TASKS else "there is no such task"
        raise UserError(f"--task {name}: {wrong}; expected {', '.join(choices)}, or FILE.py:NAME")
    task = choices[family]
    if dash and difficulty not in map(str, task.difficulties):
        raise UserError(f"--task {name}: there is no such difficulty; expected {family}"
                        + (f" or {family}-N, where N, the number of {task.difficulty_unit}, is "
                           f"{task.difficulties[0]} to {task.difficulties[-1]}" if task.difficulties else ""))
    return task(int(difficulty) if dash else None)


def is_ours(name: str) -> bool:
    """Whether this is a task of nanorl's. What FILE.py:NAME names is a program, which a checkpoint must not start."""
    return ".py:" not in name and name.partition("-")[0] in TASKS


def default_max_new_tokens(task_name: str) -> int:
    """The token limit of a response to this task, unless a flag sets another. `make_task` refuses unknown names."""
    if ".py:" in task_name:
        return make_task(task_name).max_answer_tokens
    return TASKS.get(task_name.partition("-")[0], Task).max_answer_tokens
