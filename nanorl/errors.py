"""Users' errors as one sentence, without a traceback, and printing that cannot fail. Imports nothing of ours."""

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """A flag, file or record is wrong. The message names it with its value, and says what was expected or what to do."""


def refuse(source: str, faults: list[str], expected: str) -> NoReturn:
    """UserError with the first three things that are wrong in this file, and how many more there are."""
    more = f"; and {len(faults) - 3:,} more" if len(faults) > 3 else ""
    raise UserError(f"{source}, {'; '.join(faults[:3])}{more}; expected {expected}")


def print_anything() -> None:
    """From now on, what the console's encoding lacks is printed as an escape (\\u0416) and does not end the program: names of
    files and texts are the user's. Every command calls it first. Of stderr, Python does so by itself."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """`text` without control characters (but tab and newline): a model may say anything, even commands to the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def exit_with(error: Exception | str, code: int = 2) -> NoReturn:
    """Print one sentence on stderr and end the program."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    print(f"{name}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    raise SystemExit(code) from None


def user_errors_as_sentences(main: Callable[..., Any]) -> Callable[..., Any]:
    """For the main function of a command: a UserError, and only that, ends it with a sentence."""
    @functools.wraps(main)
    def wrapper(*args: Any) -> Any:
        print_anything()
        try:
            return main(*args)
        except UserError as e:
            exit_with(e)
    return wrapper
