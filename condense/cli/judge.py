"""TODO-DOC."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from condense.cli.parameters import Data, Device, Download, Force, Precision, Seed, SetFile, _number, _set
from condense.errors import CondenseError
from condense.tracking import leads


def evaluate(
    file: SetFile,
    data: Data,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the data; as for the set by default")
    ] = None,
    networks: Annotated[
        str | None, typer.Option(help="A,B,...; the protocol's by default; own is the one that the set was made with")
    ] = None,
    runs: Annotated[int | None, _number("--runs", int, "students per arm; the protocol's number by default")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="a name of `condense ls protocols`; the set's own by default")
    ] = None,
    controls: Annotated[
        str, typer.Option(help="arms beside the set: random,random-hard,random-bytes,noise,full,full-equal, or none")
    ] = "random",
    without_augmentation: Annotated[
        bool, typer.Option("--without-augmentation", help="also train set and random images so, for the score ARS")
    ] = False,
    teachers: Annotated[
        Path | None,
        typer.Option(help="file of experts or teachers that soft labels came from; searched for by default"),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    out: Annotated[Path | None, typer.Option("--json", help="file to write the record to")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="train every arm anew")] = False,
    download: Download = False,
    force: Force = False,
) -> None:
    """Judges a set against control arms under a protocol."""
    from condense import api, config
    from condense.files import check_writable
    from condense.judge import evaluation, records

    distilled = _set(file)
    if out is not None:
        check_writable(out, force=force)
    options = evaluation.data_options(distilled) | config.parse(settings or [])
    real = api.task(data, download=download, **options)
    record = evaluation.evaluate(
        distilled, real, networks=networks.split(",") if networks else None, runs=runs, protocol=protocol,
        controls=[] if controls == "none" else controls.split(","), without_augmentation=without_augmentation,
        teachers=teachers, seed=seed, device=device, precision=precision, cache=not no_cache, quiet=False,
    )  # fmt: skip
    if not leads():
        return
    print(f"{distilled.name} on {real.name}, {record['protocol']['name']}, {record['environment']['device']}")
    print(records.table(record))
    if out is not None:
        records.write_record(record, out)
        print(f"record: {out}")


def suite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a name of `condense ls suites`, or a YAML file")],
    out: Annotated[
        Path | None, typer.Option(help="folder for records, sets, runs and page; suites/NAME by default")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="NAME=PATH", help="where named data are; may be repeated")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="A,B,...: only these methods of the suite")] = None,
    datasets: Annotated[str | None, typer.Option(help="A,B,...: only these data of the suite")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
) -> None:
    """Makes and judges a whole table of sets, then builds its page. Call it again to go on after a stop."""
    from condense.benchmarks import suite as room

    chosen = room.get_suite(name)
    places = dict(word.partition("=")[::2] for word in data or [])
    for place, path in places.items():
        if not path:
            raise CondenseError(f"--data {place}: write NAME=PATH; {chosen.name} has {', '.join(chosen.tasks)}")
    out = out or Path("suites") / chosen.name
    outcome = room.run(
        chosen, out, data=places, methods=methods.split(",") if methods else (),
        datasets=datasets.split(",") if datasets else (), device=device, precision=precision, download=download,
        quiet=False,
    )  # fmt: skip
    if not leads():
        return
    print(f"{chosen.name}: {len(outcome.made)} records made, {len(outcome.kept)} were there")
    print(f"  records and pictures: {out / room.RECORDS}\n  sets: {out / room.SETS}")
    if outcome.page is not None:
        print(f"  page: {outcome.page}")
    if outcome.failed:
        raise CondenseError(f"{len(outcome.failed)} cells were not made: "
                            + "; ".join(f"{stem} ({why})" for stem, why in outcome.failed.items()))  # fmt: skip


def leaderboard(
    out: Annotated[Path, typer.Option("--out", help="folder of the site; replaced as a whole")],
    results: Annotated[
        Path | None, typer.Option("--results", help="folder of records; those of this project by default")
    ] = None,
    force: Force = False,
) -> None:
    """Writes records as a static page that opens from disk. Records that are not as they should be are left out."""
    from condense.benchmarks import leaderboard

    built = leaderboard.build(results or leaderboard.RESULTS, out, force=force)
    for fault in built.rejected:
        print(f"condense: left out {fault.file}: {fault.reason}", file=sys.stderr)
    counts = {"rows": built.rows, "records": built.records, "published": built.published}
    print(", ".join(f"{name} {count}" for name, count in {**counts, "left out": len(built.rejected)}.items()))
    print(f"open {built.index}")
