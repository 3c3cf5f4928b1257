"""Episodes: the policy acts, the environment answers, and the policy goes on.

    prompt <|assistant|> action <|end|> <|user|> observation <|assistant|> action <|end|> ...

A state is a Problem, the conversation so far, and `Task.observe(state, action)` says what follows in it. A task with one answer
is the case where nothing ever does. The environment reads text; what is trained on stays the ids that were sampled.
"""

import math

from nanorl.errors import UserError
from nanorl.sample import Rollout
from nanorl.tasks import Problem, Task, grade
from nanorl.tokenizer import Tokenizer

# What ended an episode: the environment, or the limit of an action's tokens, of an episode's actions, or of its tokens
ENDS = ("done", "truncated", "out_of_turns", "out_of_room")


class Episodes:
    """The episodes in the rows of a rollout: `generate` asks `observe` while they are played, and `grade` pays for them."""

    def __init__(self, task: Task, tokenizer: Tokenizer, problems: list[Problem], openings: list[list[int]]):
        """The problem of each row, and the ids that its first action begins with and that are not sampled."""
        self.task, self.tokenizer, self.openings = task, tokenizer, openings
        self.states = [[problem] for problem in problems]       # of each row, the state before each of its actions
        self.ends = ["done"] * len(problems)                    # of each row, why no action follows the last complete one

    def observe(self, rows: list[int], actions: list[list[int]]) -> list[list[int] | None]:
        """What the environment says to actions, as token ids; None where the episode has ended."""
        said = []
        for row, ids in zip(rows, actions, strict=True):
            states = self.states[row]
            action = self._text(row, len(states) - 1, ids)
            text = self.task.observe(states[-1], action)
            if not (text is None or isinstance(text, str)):
                raise UserError(f"task {self.task}: the observation after {action[:40]!r} is {text!r:.60}; expected a text, or "
                                "None where the episode has ended")
            over = text is None or len(states) == self.task.max_actions
            self.ends[row] = "done" if text is None else "out_of_turns" if over else "out_of_room"      # unless it goes on
            said.append(None if over else self.tokenizer.render_observation(text))
            if not over:
                states.append(states[-1].after(action, text))
        return said

    def grade(self, rollout: Rollout) -> tuple[list[list[float]], dict[str, list[float]], list[str], list[str]]:
        """The rewards of each row's actions, nan where one could not be scored; what they are sums of, where it has names, for
        the whole row; why each row ended, one of ENDS; and the text of its last action."""
        actions, finished = rollout.actions(), rollout.finished.tolist()
        places = [(row, k) for row, said in enumerate(actions) for k in range(len(said))]
        texts = [self._text(row, k, actions[row][k]) for row, k in places]
        found, parts = grade(self.task, [self.states[row][k] for row, k in places], texts,
                             [finished[row] or k < len(actions[row]) - 1 for row, k in places])
        rewards: list[list[float]] = [[] for _ in actions]
        sums = {name: [math.nan] * len(actions) for name in parts}
        for i, (row, _) in enumerate(places):
            rewards[row].append(found[i])
            for name, part in parts.items():
                if not math.isnan(part[i]):
                    sums[name][row] = part[i] + (0.0 if math.isnan(sums[name][row]) else sums[name][row])
        for row, name in [(row, name) for row, each in enumerate(rewards) if math.isnan(sum(each)) for name in sums]:
            sums[name][row] = math.nan          # an episode that could not be scored enters no mean, of parts either
        last = {row: text for (row, _), text in zip(places, texts, strict=True)}
        ends = [end if done else "truncated" for end, done in zip(self.ends, finished, strict=True)]
        return rewards, sums, ends, list(last.values())

    def _text(self, row: int, k: int, ids: list[int]) -> str:
        """The k-th action of a row, as the environment reads it."""
        return self.tokenizer.decode(ids if k else self.openings[row] + ids)
