"""The task of real_model.py: sums asked in words, with examples before them and without.

    python train_grpo.py --init smollm2 --task experiments/real_tasks.py:two_digit_sums --max-new-tokens 32
"""

from nanorl.tasks import FileTask, Problem

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
        "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SUMS = ((27, 64), (58, 31), (45, 89), (16, 72))         # the examples that come before a question; never asked themselves
TOLD = ' End with "Answer: " and the number.'


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
