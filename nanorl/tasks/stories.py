"""Stories: a named hero, a thing, a place, a small trouble, a friend who helps, a feeling. Their task has no verifier.

There is one template per sentence. {she} {her} {him} always mean the hero; the friend goes by name, and the first mention
says who that is. A plot knows which things it can happen to: the wind takes a kite, not a wagon.
"""
# ruff: noqa: SIM905      (a line of words reads better than a list of quoted ones)

import math
import re
from random import Random

from nanorl.tasks.base import Problem, Task

NAMES = {"she": "Mia Anna Lily Rosa Nora Ella Zoe Ida Greta Ruby".split(),
         "he": "Tom Ben Max Leo Finn Otto Noah Hugo Karl Jack".split()}
ANIMALS = "fox rabbit bear mouse duck goat hedgehog kitten puppy frog pony squirrel badger turtle owl".split()
HELPERS = [*ANIMALS, *"baker farmer sailor teacher gardener painter miller".split()]
PRAISE = "brave clever good great kind lovely wonderful".split()
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen").split()
WORDS = {  # slot: what may fill it
    "size": "little small tiny young shy busy cheerful quiet".split(),
    "colour": "red blue green yellow white black silver golden purple brown".split(),
    "weather": "sunny windy warm cold bright quiet misty".split(),
    "time": ["day", "morning", "afternoon"],
    "place": ["in the garden", "by the river", "at the market", "behind the old barn", "on the hill", "at the beach",
              "in the forest", "near the mill", "in the meadow", "next to the bridge"],
    "spot": ["under a bench", "behind the door", "in the tall grass", "under a bush", "next to the gate",
             "between two stones", "under a heap of leaves", "behind a barrel"],
    "hobby": ["sing", "dance", "draw", "run", "sit and dream", "look at the clouds"],
    "giver": ["grandmother", "uncle", "aunt", "big sister", "father"],
    "food": ["big pie", "warm loaf of bread", "sweet melon", "round cheese", "honey cake", "pot of soup"],
    "fruit": ["apples", "pears", "plums", "nuts", "cherries", "berries"],
    "noise": ["a cat in a bucket", "an old gate in the wind", "a frog with a cold", "a cow that wanted her supper"],
    "sad": ["sad", "tired", "worried", "upset", "scared"],
    "fine": "good great lovely wonderful".split(),
    "glad": ["happy", "glad", "proud", "calm", "warm inside", "very lucky"],
}
LIGHT = "kite hat scarf balloon ribbon".split()
ROUND = "ball coin marble button ring".split()
MADE = "boat drum wagon lantern basket flute".split()
ANY = LIGHT + ROUND + MADE

OPENINGS = [
    ["On a {weather} {time}, a {size} {kind} named {hero} went to play {place} with {her} {colour} {thing}."],
    ["Once there was a {size} {kind} named {hero} who had a {colour} {thing}.",
     "One {weather} {time} {she} took it along and went to play {place}."],
    ["{hero} was a {size} {kind} who liked to {hobby} {place}.",
     "One {weather} {time} {she} came with a new {thing}, and it was {colour}."],
    ["A {size} {kind} named {hero} got a {colour} {thing} from {her} {giver}.",
     "{She} was so happy that {she} went out to show it to everyone {place}."],
    ["There lived a {kind} {place}, a {size} one, and {her} name was {hero}.",
     "One {weather} {time} {she} took {her} {colour} {thing} and went for a walk."],
]
TALKS = [
    '"Oh no, what shall I do?" cried {hero}.', '"Please help me," {she} said to {friend}.',
    '"Do not worry, I will help you," said {friend}.', '"I have an idea," said {friend}.',
    '"Why are you so {sad}?" asked {friend}.', "{hero} sat down and began to cry.",
    "{She} felt {sad}, but {she} did not give up.",
]
PLOTS = [  # things it can happen to, the trouble, what is said, the help
    (ANY, ["When it was time to go home, the {thing} was not there any more.",
           "{She} put the {thing} down to follow a butterfly, and then {she} could not find it.",
           "But the {thing} was suddenly gone, and {she} did not know where to look."], TALKS,
     ["{friend} looked {spot} and saw something {colour}, and it was the {thing}.",
      "{hero} and {friend} searched for an hour, and there it was {spot}.",
      "{friend} had seen the {thing} {spot} and ran to get it."]),
    (LIGHT, ["A strong wind took the {thing} and blew it up into a tall tree.",
             "The wind pulled the {thing} out of {her} hands and carried it to the top of a roof.",
             "The {thing} flew away and stopped on a branch, too high for {him} to reach."], TALKS,
     ["{friend} brought a long ladder, climbed up and got it down.",
      "{friend} threw a rope around the {thing} and pulled until it came down.",
      "{hero} stood on the back of {friend} and could just reach it."]),
    (ROUND, ["The {thing} rolled down the path and fell into a pond with a splash.",
             "{She} let go of the {thing} for a moment, and it fell into a deep well.",
             "The {thing} slipped out of {her} hands and rolled into a dark hole."], TALKS,
     ["{friend} tied a net to a long rope and pulled the {thing} out.",
      "{friend} reached down with a stick and slowly brought it back.",
      "{friend} held {him} by the feet, and so {she} got it out."]),
    (MADE, ["But {she} tripped over a stone, and the {thing} broke.",
            "The {thing} fell on the hard ground, and a piece of it came off.",
            "A cow stepped on the {thing} by mistake and broke it in two."], TALKS,
     ["{friend} had some glue and put the pieces together again.",
      "{friend} mended it with string and a bit of wood.",
      "{hero} and {friend} worked for an hour, and then the {thing} was like new."]),
    (ANY, ["Then dark clouds came, and soon {she} was wet and cold.",
           "All at once it began to rain, and there was no roof to hide under.",
           "Suddenly there was a storm, and {she} was afraid of the thunder."], TALKS,
     ["{friend} opened the door of a warm house and made some tea.",
      "{friend} came with a big umbrella and walked home with {him}.",
      "{hero} and {friend} found a dry cave and told stories until the rain stopped."]),
    (ANY, ["Soon it was dark, and {she} could not find the way home.",
           "{She} walked too far and came to a road that {she} did not know.",
           "A thick fog came down and hid the path."], TALKS,
     ["{friend} knew the way and brought {him} home.",
      "{friend} lit a lamp and showed {him} the path.",
      "{friend} rang a bell, and {hero} followed the sound until {she} was home."]),
    (ANY, ["But {she} had forgotten to eat, and {her} stomach was empty.",
           "After a while {she} was very hungry, but {her} lunch was at home.",
           "A crow stole {her} bread, and then {she} was hungry."], TALKS,
     ["{friend} had a {food} and shared it with {him}.",
      "{friend} asked {him} in and gave {him} half of a {food}.",
      "{hero} and {friend} made a {food}, and there was enough for two."]),
    (ANY, ["There {she} found a bird that had hurt its wing.",
           "In the grass lay a young bird that could not fly.",
           "{She} heard a soft cry and saw a bird that was caught in a net."], TALKS,
     ["{friend} knew what to do, and soon the bird could fly again.",
      "{hero} and {friend} took care of the bird until it flew away.",
      "{hero} and {friend} made a soft nest for it, and the next day the bird sang."]),
    (ANY, ["In a field {she} found a huge pumpkin, but it was too heavy for {him}.",
           "A big stone lay on the path, and {she} could not move it at all.",
           "Somebody had left a heavy box on the road, and {she} could not get past it."], TALKS,
     ["{friend} pushed, {hero} pulled, and at last it moved.",
      "{friend} came with a cart, and then it was easy.",
      "{hero} and {friend} counted to three and rolled it to the side."]),
    (ANY, ["Then {she} heard a strange noise and was too scared to move.",
           "Something went bump and squeak, and {she} hid behind a tree."], TALKS,
     ["{friend} went to look, and it was only {noise}.",
      "{hero} and {friend} looked together, hand in hand, and found {noise}."]),
    (ANY, ["{friend} wanted the {thing} too, and they both pulled at it.",
           "{friend} took the {thing} without asking, and {hero} was angry.",
           "{friend} and {hero} could not agree who should have the {thing} first."],
     ['"That is not fair!" cried {hero}.', '"I had it first," said {hero}.', "{hero} did not say a word for an hour."],
     ["Then {friend} said sorry, and they took turns.",
      "{hero} thought about it and lent the {thing} to {friend}.",
      "At last they made up a new game with the {thing}, a game for two."]),
]
SUMS = [
    "They picked {a} {fruit} and found {b} more, and that makes {c} {fruit}.",
    "{A} {fruit} and {b} {fruit} make {c} {fruit}, and they ate them all.",
    "{hero} had {a} {fruit}, {friend} had {b}, and together they had {c}.",
]
ENDINGS = [
    "{hero} felt {glad} and went home with a smile.",
    '"Thank you, {friend}, you are a {praise} friend," said {hero}.',
    "It had been a {fine} {time}, and {hero} felt {glad}.",
    "{hero} gave {friend} a hug, and both of them felt {glad}.",
    "From that day on they met {place} every {time}.",
    "That night {hero} slept well and dreamed of a {colour} {thing}.",
    '"Come and play with me again tomorrow," said {hero}, and both felt {glad}.',
    "They laughed and sang all the way home, and {hero} felt {glad}.",
]


def story(rng: Random) -> str:
    """A story of 4 to 6 sentences."""
    return " ".join(opening_and_rest(rng))


def opening_and_rest(rng: Random, **given: str) -> tuple[str, str]:
    """The opening of a story, and its rest. Slots in `given` keep their value; a given hero requires a given {she}."""
    plots = [plot for plot in PLOTS if "thing" not in given or given["thing"] in plot[0]]
    things, troubles, talks, helps = rng.choice(plots)
    she = given.get("she") or rng.choice(["she", "he"])
    her, him, child = {"she": ("her", "her", "girl"), "he": ("his", "him", "boy")}[she]
    hero = given.get("hero") or rng.choice(NAMES[she])
    while (friend := rng.choice(NAMES["she"] + NAMES["he"])) == hero:
        pass
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    slots = {slot: rng.choice(words) for slot, words in WORDS.items()} | {
        "hero": hero, "friend": friend, "she": she, "She": she.capitalize(), "her": her, "him": him,
        "kind": rng.choice([child, child, *ANIMALS]), "thing": rng.choice(things), "praise": rng.choice(PRAISE),
        "a": NUMBERS[a], "A": NUMBERS[a].capitalize(), "b": NUMBERS[b], "c": NUMBERS[a + b]} | given

    middle = rng.choice([[talks, helps], [talks, helps], [helps, SUMS], [helps]])
    opening, rest = rng.choice(OPENINGS), [rng.choice(sentences) for sentences in (troubles, *middle, ENDINGS)]
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
    shuffled_share = 0.5  # of the continuations: their sentences are out of order
    label_temperature = 1.0  # points of hidden reward per nat of a reader's log-odds

    def draw(self, rng):
        return Problem(*opening_and_rest(rng))

    def continuation(self, prompt: str, rng: Random) -> str:
        """Another rest for this opening."""
        words = re.findall(r"\w+", prompt)
        hero, thing = (next(word for word in words if word in known) for known in (NAMES["she"] + NAMES["he"], ANY))
        given = {slot: next((phrase for phrase in WORDS[slot] if phrase in prompt), rng.choice(WORDS[slot]))
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

    def rewards(self, problems, responses, finished):
        """A story that was cut off is judged by what there is of it."""
        return list(map(self.verify, problems, responses))

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
