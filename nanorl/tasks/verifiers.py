"""What the answer to a question from a file says, in the formats that people use: a text, a number, a choice.

A reader turns a text into one spelling, so that two answers are the same when their readings are; None where the text says
nothing of its kind. It takes any string, in time linear in its length, and executes nothing.

    strict      the one final answer, in the format that was asked for: `Answer: x`, `#### x` or `\\boxed{x}`
    lenient     that, or else the last thing of its kind that the response says anywhere

Training pays for the strict reading. An evaluation reports both: what they differ by is format.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

MAX_CHARACTERS = 256        # of a final answer; anything longer is not one
MARK = re.compile(r"####|\bAnswer:|\\boxed(?=\s*\{)")
# A number is signed digits, with commas between thousands or none, and with decimals; or a fraction of two whole numbers.
DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,12}(?!,?\d)|\d{1,40}(?!\d))"
NUMBER = re.compile(rf"(?<![\w.,/])([-+\u2212]?)\s?[$€£¥]?\s?([-\u2212]?)"
                    rf"(?:({DIGITS})\s?/\s?({DIGITS})|({DIGITS}(?:\.\d{{1,40}})?|\.\d{{1,40}}))(?![\w/]|[.,]\d)")
SUBTRACTED = re.compile(r"(?<=[\d)])\s[-\u2212](?=\s)")       # a minus between two terms is no sign
LATEX = ((re.compile(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}"), r"\1/\2"), (re.compile(r"\\text\s?\{([^{}]*)\}"), r"\1"),
         (re.compile(r"\\[,;!() ]|\\(?=[$%])|\*\*"), ""))
CHOICE = re.compile(r"\(?([A-Za-z])(?:\)?[.:]?|[).:] .*)")
SAID_CHOICE = re.compile(r"\(([A-Z])\)|(?i:\b(?:answer|option|choice)(?: is)?:?)\s?\(?([A-Z])\b(?!')")


def final(text: str) -> str | None:
    """The final answer of a response: all that follows its one mark, or what the braces of \\boxed hold.

    None without a mark, with several (listing answers must not pay), and where anything but space follows the braces.
    """
    marks = [*islice(MARK.finditer(text), 2)]
    rest = text[marks[0].end():].strip() if len(marks) == 1 else ""
    if marks and marks[0][0] == "\\boxed":
        end = _closing_brace(rest)
        rest = rest[1:end].strip() if end and not rest[end + 1:].strip(" \n.$") else ""
    return rest if 0 < len(rest) <= MAX_CHARACTERS else None


def _closing_brace(text: str) -> int:
    """Where the brace that this text begins with is closed; 0 where it is not."""
    depth = 0
    for i, c in enumerate(text[: MAX_CHARACTERS + 2]):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return i
    return 0


def _value(number: re.Match) -> str | None:
    sign, late, top, bottom, decimal = number.groups()
    digits = [Fraction(part.replace(",", "")) for part in (decimal or top, bottom or "1")]
    if not digits[1] or (sign and late):
        return None
    return str(digits[0] / digits[1] * (-1 if {sign, late} & {"-", "\u2212"} else 1))


def read_text(text: str) -> str | None:
    """The text itself, up to the amount of white space."""
    words = " ".join(text.split())
    return words if 0 < len(words) <= MAX_CHARACTERS else None


def read_number(text: str) -> str | None:
    """The number that a text is: 1,234 = 1234.0 = $1,234 = 1234 % = 2468/2. Units of money and per cent are dropped."""
    if len(text) > MAX_CHARACTERS:
        return None
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    text = text.strip().removesuffix(".").strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    number = NUMBER.fullmatch(text.removesuffix("percent").removesuffix("%").strip())
    return number and _value(number)


def last_number(text: str) -> str | None:
    """The last number in a text, as `read_number` reads it."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    values = [value for number in NUMBER.finditer(SUBTRACTED.sub(" ", text)) if (value := _value(number))]
    return values[-1] if values else None


def read_choice(text: str) -> str | None:
    """The letter of a choice: B, (B), b., and `B) Paris`."""
    choice = CHOICE.fullmatch(text.strip(" *$"))
    return choice and choice[1].upper()


def last_choice(text: str) -> str | None:
    """The last choice that a text names: (B), or `answer is B`."""
    said = [*SAID_CHOICE.finditer(text)]
    return (said[-1][1] or said[-1][2]).upper() if said else None


@dataclass(frozen=True)
class Verifier:
    """How a response is compared with the answer of a record."""

    runs_programs = False                   # in the sandbox, many at a time

    kind: str                               # what it reads, for errors
    read: Callable[[str], str | None]       # a final answer
    last: Callable[[str], str | None] | None = None         # the last answer of this kind in a response, where there is a way

    def strict(self, response: str) -> str | None:
        answer = final(response)
        return None if answer is None else self.read(answer)

    def lenient(self, response: str) -> str | None:
        return self.strict(response) or (self.last(response) if self.last else None)

    def gold(self, answer: str) -> str | None:
        """What a record's answer says: all of it, or what follows its mark, as in `... #### 18`."""
        return self.strict(answer) if MARK.search(answer) else self.read(answer)

    def right(self, golds: list[str], responses: list[str]) -> list[bool]:
        """Which responses say what `gold` has read."""
        return [self.strict(response) == gold for gold, response in zip(golds, responses, strict=True)]


VERIFIERS = {"exact": Verifier(f"a text of at most {MAX_CHARACTERS} characters", read_text),
             "number": Verifier("a number", read_number, last_number), "choice": Verifier("a letter", read_choice, last_choice)}
