"""The application object, and the arguments and options that several verbs share."""

from __future__ import annotations

import difflib
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense.errors import CondenseError
from condense.formatting import shorten

if TYPE_CHECKING:
    from condense.data import Task
    from condense.sets import DistilledSet

EXIT_CODES = "Exit codes: 0 done, 1 internal error, 2 invalid input, 130 interrupted (a run saves its state)."
"""Last line of the help of every verb."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make, evaluate and use distilled datasets.",
    epilog=EXIT_CODES,
)


def number_option(flag: str, kind: Callable[[str], Any], meaning: str, *, maximum: int = 10**9) -> Any:
    """A numeric option. An invalid value is reported with the flag and the value."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not abs(value) <= maximum:
            expected = f"a {'whole ' if kind is int else ''}number of at most {maximum:,}"
            raise CondenseError(f"{flag} {shorten(text, 100)}: must be {expected}")
        return value

    return typer.Option(flag, parser=parse, metavar="N" if kind is int else "X", help=meaning)


DATA_HELP = (
    "real data: a name of `condense ls datasets`, a folder, .csv, .npz, .h5, or hf:OWNER/NAME of the Hugging Face Hub; "
    "for graphs a .csv with a column smiles, or tu:NAME; NAME=PATH names them in the records"
)

MethodArgument = Annotated[
    str | None, typer.Argument(metavar="METHOD", help="a name of `condense ls methods`, or of a --plugin FILE.py")
]

SettingsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="settings of the method and of the data; `condense show METHOD` explains them"
    ),
]

SetFile = Annotated[str, typer.Argument(metavar="SET.h5", help="file of a set, or a name of `condense ls sets`")]

Data = Annotated[str, typer.Option("--data", help=DATA_HELP)]

DataOrRecipe = Annotated[str | None, typer.Option("--data", help=DATA_HELP)]

Ipc = Annotated[int | None, number_option("--ipc", int, "stored images per class")]

Images = Annotated[int | None, number_option("--images", int, "stored images in total, instead of --ipc")]

NetworkOption = Annotated[str | None, typer.Option(help="architecture to distil with; by default that of the method")]

RecipeOption = Annotated[str | None, typer.Option(help="a name of `condense ls recipes`, or a YAML file")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]

Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16, for matrix products without second derivatives")]

Seed = Annotated[
    int, number_option("--seed", int, "random seed; the same seed gives the same result", maximum=2**63 - 1)
]

DataSettings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the data; by default those of the set")
]

Runs = Annotated[
    int | None, number_option("--runs", int, "students per arm; by default the number of the protocol", maximum=10_000)
]

ProtocolOption = Annotated[
    str | None, typer.Option("--protocol", help="a name of `condense ls protocols`; by default that of the set")
]

RecordFile = Annotated[Path | None, typer.Option("--json", help="file to write the record to")]

Force = Annotated[bool, typer.Option("--force", help="overwrite existing files")]

Download = Annotated[bool, typer.Option("--download", help="fetch a registered dataset that is not on disk")]

NetworksFile = Annotated[
    Path | None,
    typer.Option("--out", help="file to write or to add to; by default the file in the cache that methods read"),
]

HeldOut = Annotated[
    float | None,
    number_option("--held-out", float, "share of each class that is used to measure accuracy, not to train on"),
]

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def sort_settings(settings: dict[str, Any], *groups: type) -> list[dict[str, Any]]:
    """Splits ``settings`` by the dataclass that has the key.

    An unknown key goes to the dataclass with the most similar field (the last one if none is similar), which reports
    it.
    """
    owners = {field.name: number for number, group in enumerate(groups) for field in fields(group)}
    split: list[dict[str, Any]] = [{} for _ in groups]
    for key, value in settings.items():
        similar = difflib.get_close_matches(key, owners, n=1, cutoff=0.5)
        split[owners[similar[0]] if similar else -1][key] = value
    return split


def load_set(name: str, data: str | None = None) -> DistilledSet:
    """Loads a set of images, a file or a ready-made set by name, with the images of ``data`` if it holds indices.

    Raises:
        CondenseError: it cannot be loaded, or holds graphs.
    """
    from condense import api
    from condense.sets import DistilledSet

    loaded = api.load(name, data=data)
    if not isinstance(loaded, DistilledSet):
        raise CondenseError(f"{name}: holds graphs, not images; `show`, `verify` and `evaluate` take it")
    return loaded


def load_set_and_data(
    name: str, data: str, settings: list[str] | None, *, download: bool, record: Path | None, force: bool
) -> tuple[DistilledSet, Task]:
    """Loads a set and its real data, with the options of the set where ``settings`` do not replace them.

    Raises:
        CondenseError: one of them cannot be loaded, or the file of the ``record`` cannot be written.
    """
    from condense import api, config
    from condense.files import check_writable
    from condense.judge import evaluation
    from condense.plugins import missing_plugins

    distilled = load_set(name)
    if record is not None:
        check_writable(record, force=force)
    options = evaluation.data_options(distilled) | config.parse_overrides(settings or [])
    try:
        return distilled, api.image_task(data, download=download, **options)
    except CondenseError as fault:
        if data.rpartition("=")[2] != distilled.manifest["dataset"]:
            raise
        raise CondenseError(f"{fault}{missing_plugins(distilled.manifest)}") from fault


def plugin_options(*names: Any) -> list[str]:
    """``--plugin FILE.py`` for each plug-in that registered any of these methods, data sets or networks."""
    from condense.plugins import named_files, plugin_files

    paths = named_files(plugin_files(names))
    files = (os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path for path in paths)
    return [word for file in files for word in ("--plugin", file)]


def evaluate_command(file: str | Path, data: str | None, *names: Any, more: Sequence[str] = ()) -> str:
    """The command that evaluates a set, with the plug-ins that registered any of these names, and ``more`` words.

    Without ``data``, DATA stands for it.
    """
    return shlex.join(["condense", "evaluate", str(file), "--data", data or "DATA", *plugin_options(*names), *more])


IndexedData = Annotated[
    str | None, typer.Option("--data", help="real data of a set that holds indices into them (store=indices)")
]


def parse_numbers(flag: str, text: str | None, what: str) -> list[float] | None:
    """Parses numbers that are joined by commas.

    Raises:
        CondenseError: not numbers.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise CondenseError(f"{flag} {text}: must be numbers joined by commas, {what}") from None


def parse_seeds(flag: str, text: str) -> list[int]:
    """Parses whole numbers that are joined by commas.

    Raises:
        CondenseError: not such numbers, or one is there twice.
    """
    seeds = [int(part) for part in text.split(",") if part.isascii() and part.isdigit()]
    if len(set(seeds)) != len(text.split(",")):
        raise CondenseError(f"{flag} {text}: must be different whole numbers joined by commas, e.g. {flag} 0,1,2")
    return seeds
