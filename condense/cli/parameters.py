"""TODO-DOC."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from condense.errors import CondenseError

EXIT_CODES = (
    "Exit codes: 0 done, 1 a fault of ours, 2 a mistake in what was given, 130 interrupted (a run saves its state)."
)
"""Ends the help of every verb."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make, judge and use distilled datasets.",
    epilog=EXIT_CODES,
)


def _number(flag: str, kind: Callable[[str], Any], meaning: str) -> Any:
    """A numeric option; what is no number is refused by a line that names flag and value."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise CondenseError(f"{flag} {text}: must be a {'whole ' if kind is int else ''}number") from None

    return typer.Option(flag, parser=parse, metavar="N" if kind is int else "X", help=meaning)


_DATA = "real data: a name of `condense ls datasets`, a folder, .npz or .h5; NAME=PATH names a folder in the records"

Method = Annotated[str | None, typer.Argument(metavar="METHOD", help="a name of `condense ls methods`")]

Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings; see condense show")]

Data = Annotated[str, typer.Option("--data", help=_DATA)]

DataOrRecipe = Annotated[str | None, typer.Option("--data", help=_DATA)]

Ipc = Annotated[int | None, _number("--ipc", int, "stored images per class")]

Network = Annotated[str | None, typer.Option(help="network to match with; the method's own by default")]

Recipe = Annotated[str | None, typer.Option(help="a name of `condense ls recipes`, or a YAML file")]

SetFile = Annotated[str, typer.Argument(metavar="SET.h5", help="file of a set, or a name of `condense ls sets`")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]

Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16, for work without second derivatives")]

Seed = Annotated[int, _number("--seed", int, "the same seed gives the same result")]

Force = Annotated[bool, typer.Option("--force", help="overwrite what exists")]

Download = Annotated[bool, typer.Option("--download", help="fetch a registered dataset that is not on disk")]

AddTo = Annotated[
    Path | None,
    typer.Option("--out", help="file to write or to add to; one of the cache, where methods look, by default"),
]

HeldOut = Annotated[
    float | None, _number("--held-out", float, "share of each class that they do not see and are judged on")
]

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def _sorted(keys: dict[str, Any], *groups: type) -> list[dict[str, Any]]:
    """``keys`` by the dataclass that has the key, or the one most like it (the last where none is)."""
    owners = {field.name: number for number, group in enumerate(groups) for field in fields(group)}
    found: list[dict[str, Any]] = [{} for _ in groups]
    for key, value in keys.items():
        like = difflib.get_close_matches(key, owners, n=1, cutoff=0.5)
        found[owners[like[0]] if like else -1][key] = value
    return found


def _set(name: str) -> Any:
    from condense import api

    return api.load(name)
