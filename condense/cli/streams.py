"""Standard output and standard error: safe text on any terminal, and errors of writing as one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from condense.errors import CondenseError
from condense.formatting import printable


class PrintableStream:
    """Escapes the control characters of everything that is written to a stream.

    Names of sets, classes, networks and files come from untrusted files, and all of them may be printed.

    Attributes:
        unescaped: the stream.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.unescaped, self._name = stream, name

    def write(self, text: str) -> int:
        try:
            # A stream that cannot encode a character gets its escape.
            encoding = self.unescaped.encoding or "utf-8"
            safe = printable(text).encode(encoding, "backslashreplace").decode(encoding)
            self.unescaped.write(safe)
        except BrokenPipeError:
            raise
        except OSError as fault:
            raise CondenseError(f"{self._name} cannot be written: {fault.strerror or fault}") from fault
        return len(text)

    def flush(self) -> None:
        try:
            self.unescaped.flush()
        except BrokenPipeError:
            raise
        except OSError as fault:
            raise CondenseError(f"{self._name} cannot be written: {fault.strerror or fault}") from fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Replaces standard output and standard error in the block; closed ones discard what is written."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        PrintableStream(open(os.devnull, "w") if stream is None else stream, name)  # noqa: SIM115
        for stream, name in zip(before, ("standard output", "standard error"))
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        _discard_unwritable(sys.stdout)


def _discard_unwritable(stream: TextIO | None) -> None:
    """Sends the rest of a stream that cannot be written to the null device, so that the interpreter ends quietly."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
