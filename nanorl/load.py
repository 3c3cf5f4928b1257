"""The user's own Python: the object NAME in FILE.py."""

import importlib
import inspect
import sys
import traceback
from pathlib import Path
from typing import Any

from nanorl.errors import UserError


def load_named(where: str, expected: str, flag: str = "") -> Any:
    """The NAME of "FILE.py:NAME", imported. UserError says what is wrong with this flag, and what was `expected` of it."""
    file, _, name = where.rpartition(":")
    where = f"{flag} {where}".strip()
    path = Path(file).resolve()
    if not (path.suffix == ".py" and path.is_file() and name):
        why = f"{file} does not exist" if name and path.suffix == ".py" else "as in mine.py:objective"
        raise UserError(f"{where}: expected FILE.py:NAME, a file of Python code and what it defines; {why}")
    if "." in path.stem:
        raise UserError(f"{where}: Python cannot import a file with two dots in its name; rename it")
    sys.path.insert(0, str(path.parent))        # as for a script: the file can import its neighbours
    try:
        module = importlib.import_module(path.stem)
    except UserError:
        raise
    except SystemExit:
        raise UserError(f"{where}: {file} exits when imported; put what it runs under if __name__ == '__main__'") from None
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        raise UserError(f"{where}: {file} cannot be imported{f', line {lines[-1]}' if lines else ''}: "
                        f"{type(e).__name__}: {e}") from None
    if getattr(module, "__file__", None) != str(path):
        raise UserError(f"{where}: Python has another module called {path.stem}; rename the file")
    if not hasattr(module, name):
        others = ", ".join(other for other, value in vars(module).items()
                           if not other.startswith("_") and not inspect.ismodule(value)) or "none"
        raise UserError(f"{where}: {file} has no {name} (it has {others:.200}); expected {expected}")
    return getattr(module, name)


def load_function(where: str, signature: str, flag: str = "") -> Any:
    """`load_named` of something that can be called."""
    function = load_named(where, signature, flag)
    if not callable(function):
        raise UserError(f"{flag} {where}: is {function!r:.60}; expected {signature}".strip())
    return function
