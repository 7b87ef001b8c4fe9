"""The error that users see as a single line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class CondenseError(Exception):
    """Invalid input (exit code 2). The message is one line: the argument as typed, what is wrong, and the fix."""


MAX_LISTED, MAX_LISTED_LENGTH = 40, 400
"""Maximum number of names that a message lists, and of their characters."""


def did_you_mean(name: Any, names: Iterable[str], listing: str = "") -> str:
    """``; did you mean 'x'?`` with the nearest of ``names``; if none is near, all names or, of many, the nearest three.

    Args:
        name: as the user typed it; a value of another type in Python.
        names: that would be valid.
        listing: command that lists all names.
    """
    name, names = str(name)[:100], sorted(names)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean '{matches[0]}'?"
    if len(names) > MAX_LISTED or len(", ".join(names)) > MAX_LISTED_LENGTH:
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        return f"; the nearest are {', '.join(nearest)}" + (f"; `{listing}` lists all {len(names)}" if listing else "")
    return f"; known: {', '.join(names)}" if names else ""


def is_out_of_memory(fault: BaseException) -> bool:
    """Returns whether an exception says that memory ran out.

    PyTorch has a class of its own for accelerators. On the CPU it raises a RuntimeError, and while libraries are loaded
    the error is an ImportError or an OSError.
    """
    if isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError":
        return True
    texts = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "failed to map segment", "out of memory")
    return isinstance(fault, (RuntimeError, OSError, ImportError)) and any(text in str(fault).lower() for text in texts)


def missing_package(package: str, extra: str, purpose: str) -> CondenseError:
    """Returns the error for a missing optional package, with the command that installs it."""
    return CondenseError(
        f"{purpose} needs the package '{package}'; install it with: pip install 'condense-toolkit[{extra}]'"
    )
