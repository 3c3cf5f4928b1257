"""What is said when something that the user gave is wrong: one sentence, no traceback. Imports nothing of ours."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """A flag, file or record is wrong. The message names it with its value, and says what was expected or what to do."""


def exit_with(error: Exception | str, code: int = 2) -> NoReturn:
    """Print one sentence on stderr and end the program."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(code) from None


def user_errors_as_sentences(main: Callable[..., Any]) -> Callable[..., Any]:
    """For the main function of a command: a UserError, and only that, ends it with a sentence."""
    @functools.wraps(main)
    def wrapper(*args: Any) -> Any:
        try:
            return main(*args)
        except UserError as e:
            exit_with(e)
    return wrapper
