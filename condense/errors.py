"""The one error that users see as a single line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CondenseError(Exception):
    """A mistake in what was given: one line that names the user's own word, the fault and the mend. Exit code 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest of ``known``, else the list of what exists (empty for nothing)."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def need(package: str, extra: str, purpose: str) -> CondenseError:
    """The error for a missing optional package, with the exact line that installs it."""
    return CondenseError(
        f"{purpose} needs the package '{package}'; install it with: pip install 'condense-toolkit[{extra}]'"
    )
