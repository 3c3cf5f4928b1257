"""The tasks of real_model.py: sums asked in words, and the easier problems of GSM8K.

    python train_grpo.py --init smollm2 --task experiments/real_tasks.py:two_digit_sums ...

GSM8K (Cobbe et al. 2021) is not part of this repository: the environment variable GSM8K names a folder with its train.jsonl
and test.jsonl.
"""

import os

from nanorl.errors import UserError
from nanorl.tasks import FileTask, Problem, Records

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
        "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SUMS = ((27, 64), (58, 31), (45, 89), (16, 72))         # the examples that come before a question; never asked themselves
TOLD = ' End with "Answer: " and the number.'
WORKED = (("Tom has 5 boxes with 6 pens each. He gives away 8 pens. How many pens does he have left?",
           "Tom has 5 * 6 = 30 pens.\nHe has 30 - 8 = 22 pens left.\n#### 22"),
          ("A shirt costs $15 and a hat costs twice as much. What do both cost together?",
           "The hat costs 15 * 2 = $30.\nTogether they cost 15 + 30 = $45.\n#### 45"))


def spelled(n: int) -> str:
    """A number below 100 in words."""
    return ONES[n] if n < 20 else TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def sums(shots: int, instruction: str = "") -> FileTask:
    """What is thirty-seven plus forty-five? All sums of two numbers of two digits; one in ten is held out by its hash."""
    def ask(a: int, b: int) -> str:
        return f"What is {spelled(a)} plus {spelled(b)}?"

    turns = [(("user", ask(a, b) + instruction), ("assistant", f"{a} + {b} = {a + b}\nAnswer: {a + b}"))
             for a, b in SUMS[:shots]]
    before = tuple(turn for pair in turns for turn in pair)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if (a, b) not in SUMS]
    return FileTask([Problem(ask(a, b) + instruction, str(a + b), before, ask(a, b)) for a, b in pairs], "two-digit sums",
                    verifier="number")


def two_digit_sums() -> FileTask:
    return sums(shots=2)


def two_digit_sums_four_shot() -> FileTask:
    return sums(shots=4)


def two_digit_sums_zero_shot() -> FileTask:
    return sums(shots=0)


def two_digit_sums_four_shot_told() -> FileTask:
    return sums(4, TOLD)


def two_digit_sums_zero_shot_told() -> FileTask:
    return sums(0, TOLD)


def gsm8k(shots: int, steps: int = 2) -> Records:
    """The problems that GSM8K's own solutions answer in at most two steps, which they mark with <<. Held out are those of its
    test file, and one in ten of its training file, by its hash."""
    if not (folder := os.environ.get("GSM8K")):
        raise UserError("GSM8K: expected this environment variable to name a folder with GSM8K's train.jsonl and test.jsonl")
    task = Records(f"{folder}/train.jsonl", shots=WORKED[:shots], verifier="number", heldout=f"{folder}/test.jsonl")
    task.held = [held or problem.is_heldout for held, problem in zip(task.held, task.problems, strict=True)]
    task.keep([i for i, problem in enumerate(task.problems) if problem.record["answer"].count("<<") <= steps])
    return task


def gsm8k_easy() -> Records:
    return gsm8k(shots=2)


def gsm8k_easy_zero_shot() -> Records:
    return gsm8k(shots=0)
