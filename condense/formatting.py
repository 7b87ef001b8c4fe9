"""Formats durations, sizes, shapes and accuracies."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """``12.5 min``, ``3 s``, ``40 ms``: three digits in a suitable unit."""
    for unit, scale, minimum in (("days", 86400, 172800), ("h", 3600, 7200), ("min", 60, 120), ("s", 1, 1)):
        if seconds >= minimum:
            return f"{seconds / scale:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"


def size(count: int) -> str:
    """``1.2 MB``, ``24 bytes``: decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def binary(count: int) -> str:
    """``5.6 GiB``, ``28 GiB``: the unit that many papers call GB."""
    return f"{count / 2**30:.{1 if count < 10 * 2**30 else 0}f} GiB"


def by(shape: Iterable[int]) -> str:
    """``3x32x32``."""
    return "x".join(map(str, shape)) or "a single number"


def printable(text: str) -> str:
    """``text`` with control characters escaped, so that names from untrusted files cannot control a terminal.

    Newlines and tabs stay. Escaped are the other control characters, marks that change the direction of the text, and
    the bytes of file names that are not UTF-8.
    """
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def machine(device: str, precision: str | None) -> str:
    """A recorded device with the precision that was used: ``2-thread x86_64 CPU, fp32``.

    ``(bf16)`` in the record of a CPU says what the processor could do.
    """
    return device.removesuffix(" (bf16)") + (f", {precision}" if precision else "")


def percent(mean: float, std: float | None = None) -> str:
    """``53.2 ± 0.4``: an accuracy in [0, 1] and the standard deviation over students, in per cent."""
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def interval(bounds: Sequence[float] | None) -> str:
    """``52.8 to 53.6``: an interval of accuracies in [0, 1], in per cent; what lies beyond 0 and 100 is cut off."""
    return "" if bounds is None else "{:.1f} to {:.1f}".format(*(100 * min(max(bound, 0), 1) for bound in bounds))


def aligned(rows: Sequence[Sequence[str]], *, ruled: bool = False) -> str:
    """Rows of cells as lines with columns as wide as their widest cell; ``ruled`` draws a line below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    if ruled:
        rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def shorten(text: str, length: int = 1000) -> str:
    """``text`` with its middle left out if it is longer than ``length`` characters."""
    return text if len(text) <= length else f"{text[: length * 2 // 3]} [...] {text[-length // 4 :]}"
