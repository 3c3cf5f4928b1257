"""Stories: a named hero, a thing, a place, a small trouble, a friend who helps, a feeling. Their task has no verifier.

There is one template per sentence, in stories.toml beside this file. The friend goes by name, and the first mention says who
that is.
"""

import math
import re
import tomllib
from pathlib import Path
from random import Random

from nanorl.tasks.base import Problem, Task

TEXT = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NAMES, PRAISE, NUMBERS, SLOTS = (TEXT[key] for key in ("names", "praise", "numbers", "slots"))
HELPERS = TEXT["animals"] + TEXT["occupations"]
ANY = [thing for things in TEXT["things"].values() for thing in things]
THINGS = {**TEXT["things"], "any": ANY}  # by what can happen to them


def story(rng: Random) -> str:
    """A story of 4 to 6 sentences."""
    return " ".join(opening_and_rest(rng))


def opening_and_rest(rng: Random, **given: str) -> tuple[str, str]:
    """The opening of a story, and its rest. Slots in `given` keep their value; a given hero requires a given {she}."""
    plot = rng.choice([plot for plot in TEXT["plots"] if "thing" not in given or given["thing"] in THINGS[plot["things"]]])
    she = given.get("she") or rng.choice(["she", "he"])
    her, him, child = {"she": ("her", "her", "girl"), "he": ("his", "him", "boy")}[she]
    hero = given.get("hero") or rng.choice(NAMES[she])
    while (friend := rng.choice(NAMES["she"] + NAMES["he"])) == hero:
        pass
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    slots = {slot: rng.choice(words) for slot, words in SLOTS.items()} | {
        "hero": hero, "friend": friend, "she": she, "She": she.capitalize(), "her": her, "him": him,
        "kind": rng.choice([child, child, *TEXT["animals"]]), "thing": rng.choice(THINGS[plot["things"]]),
        "praise": rng.choice(PRAISE), "a": NUMBERS[a], "A": NUMBERS[a].capitalize(), "b": NUMBERS[b],
        "c": NUMBERS[a + b]} | given

    talk, rescue, sums = plot.get("talk", TEXT["talk"]), plot["rescue"], TEXT["sums"]
    middle = rng.choice([[talk, rescue], [talk, rescue], [rescue, sums], [rescue]])
    opening = rng.choice(TEXT["openings"])
    rest = [rng.choice(sentences) for sentences in (plot["trouble"], *middle, TEXT["endings"])]
    opening, rest = (" ".join(sentences).format(**slots) for sentences in (opening, rest))

    praise = f"{rng.choice(PRAISE)} " if rng.random() < 0.25 else ""
    return opening, re.sub(rf"\b{friend}\b", f"{friend} the {praise}{rng.choice(HELPERS)}", rest, count=1)


class Stories(Task):
    """The opening of a story, to be continued:

        There lived a goat in the forest, a tiny one, and her name was Mia. One sunny morning she took her yellow basket and
        went for a walk.    Noah the gardener took the basket without asking, and Mia was angry. ...

    There is no right answer. Readers have a taste, the *hidden reward*: it labels pairs of stories and is measured, but
    nothing is trained on it unless --judge hidden says so. A script that learns from pairs sees only the choices. Half of
    the demonstrations have their sentences shuffled, so that there is something to learn.
    """

    name, verifiable, max_answer_tokens = "stories", False, 140
    scores_truncated = True  # a story that was cut off is judged by what there is of it
    shuffled_share = 0.5  # of the continuations: their sentences are out of order
    label_temperature = 1.0  # points of hidden reward per nat of a reader's log-odds

    def draw(self, rng):
        return Problem(*opening_and_rest(rng))

    def continuation(self, prompt: str, rng: Random) -> str:
        """Another rest for this opening."""
        words = re.findall(r"\w+", prompt)
        hero, thing = (next(word for word in words if word in known) for known in (NAMES["she"] + NAMES["he"], ANY))
        given = {slot: next((phrase for phrase in SLOTS[slot] if phrase in prompt), rng.choice(SLOTS[slot]))
                 for slot in ("colour", "place", "time")}
        _, rest = opening_and_rest(rng, she="she" if hero in NAMES["she"] else "he", hero=hero, thing=thing, **given)
        sentences = self.sentences(rest)
        if rng.random() < self.shuffled_share:
            rng.shuffle(sentences)
        return " ".join(sentences)

    @staticmethod
    def sentences(text: str) -> list[str]:
        return re.split(r"(?<=[.!?])\s+", text.strip())

    def demonstration(self, rng):
        problem = self.problem(rng, "train")
        return problem, self.continuation(problem.prompt, rng)

    def features(self, prompt: str, response: str) -> dict[str, float]:
        """The parts of the hidden reward, in points.

            feeling   2 if the last sentence says what somebody felt
            thing     1 if the thing of the opening comes up again
            speech    1 if somebody says something, in quotation marks
            praise    1 for each of the first two words of praise (brave, kind, ...), -1 for each further one
            short     -2 for each sentence short of three

        In no pair is there too much praise or too short a story, so a model that learns from pairs cannot know their price.
        """
        things = set(ANY).intersection(re.findall(r"\w+", prompt))
        words, sentences = re.findall(r"\w+", response.lower()), self.sentences(response)
        praise = sum(word in PRAISE for word in words)
        return {"feeling": 2.0 * (" felt " in sentences[-1]),
                "thing": 1.0 * any(word in things for word in words),
                "speech": 1.0 * bool(re.search(r'"[^"]+"', response)),
                "praise": 1.0 * (min(praise, 2) - max(praise - 2, 0)),
                "short": 2.0 * min(len(sentences) - 3, 0)}

    def hidden_reward(self, prompt: str, response: str) -> float:
        return sum(self.features(prompt, response).values())

    def verify(self, problem, response):
        """The hidden reward: points, not a verdict."""
        return self.hidden_reward(problem.prompt, response)

    def preferences(self, count: int) -> tuple[list[dict[str, str]], int]:
        """Pairs of continuations a and b with the one that a reader chose: a with probability

            sigma((r_a - r_b) / label_temperature)          r: the hidden reward          (Bradley and Terry 1952)

        Also the number of pairs that were left out because both were the same.
        """
        rng, records, identical = Random("preferences"), [], 0
        while len(records) < count:
            problem = self.draw(rng)
            a, b = (self.continuation(problem.prompt, rng) for _ in "ab")
            margin = (self.hidden_reward(problem.prompt, a) - self.hidden_reward(problem.prompt, b)) / self.label_temperature
            if rng.random() >= 1 / (1 + math.exp(-margin)):
                a, b = b, a
            if a == b:
                identical += 1
            else:
                records.append({"prompt": problem.prompt, "chosen": a, "rejected": b})
        return records, identical
