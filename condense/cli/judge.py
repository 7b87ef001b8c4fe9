"""Verbs that evaluate sets: `evaluate`, `suite` and `leaderboard`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense.cli.parameters import (
    Data,
    DataSettings,
    Device,
    Download,
    Force,
    Precision,
    ProtocolOption,
    RecordFile,
    Runs,
    Seed,
    SetFile,
    load_set_and_data,
    parse_numbers,
    parse_seeds,
)
from condense.errors import CondenseError, did_you_mean
from condense.formatting import machine
from condense.tracking import is_main_process

if TYPE_CHECKING:
    from condense.graphs import GraphSet


def evaluate(
    file: SetFile,
    data: Data,
    settings: DataSettings = None,
    networks: Annotated[
        str | None, typer.Option(help="architectures A,B,...; own is that of the set; by default those of the protocol")
    ] = None,
    runs: Runs = None,
    protocol: ProtocolOption = None,
    controls: Annotated[
        str,
        typer.Option(
            help="control arms: random,random-hard,random-bytes,distilled-hard,noise,full,full-equal,"
            "rs2, or none; under transfer-v1 random,full and files of other sets; for graphs random,herding,full"
        ),
    ] = "random",
    transfer: Annotated[
        str | None,
        typer.Option(help="DATA,...: other real data that networks pretrained on the set are tested on (transfer-v1)"),
    ] = None,
    without_augmentation: Annotated[
        bool,
        typer.Option(
            "--without-augmentation",
            help="also train the set and random images without augmentation, for the score ARS",
        ),
    ] = False,
    teachers: Annotated[
        Path | None,
        typer.Option(
            help="file of the experts or teachers that gave the soft labels; by default found through the manifest"
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="A,B,...: train and test on these classes only; by default on all")
    ] = None,
    curve: Annotated[
        str | None,
        typer.Option(help="A,B,...: also test students after these shares of the training, e.g. 0.1,0.5,1"),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    out: RecordFile = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="train every arm again")] = False,
    download: Download = False,
    force: Force = False,
) -> None:
    """Evaluates a set against control arms under a protocol."""
    from condense import api
    from condense.data import load_task
    from condense.graphs import GraphSet
    from condense.judge import evaluation, records
    from condense.judge import transfer as transfers

    loaded = api.load(file)
    if isinstance(loaded, GraphSet):
        others: dict[str, Any] = {
            "without_augmentation": without_augmentation,
            "teachers": teachers,
            "classes": classes,
        }
        others |= {"curve": curve, "precision": precision, "no_cache": no_cache, "transfer": transfer}
        options: dict[str, Any] = {"networks": networks, "runs": runs, "protocol": protocol, "controls": controls}
        options |= {"seed": seed, "device": device, **others}
        _evaluate_graphs(loaded, data, settings, out, force, options)
        return
    distilled, real = load_set_and_data(file, data, settings, download=download, record=out, force=force)
    targets = [load_task(name, real.options, download=download) for name in (transfer.split(",") if transfer else ())]
    record = evaluation.evaluate(
        distilled,
        real,
        networks=networks.split(",") if networks else None,
        runs=runs,
        protocol=protocol,
        controls=[] if controls == "none" else controls.split(","),
        without_augmentation=without_augmentation,
        teachers=teachers,
        classes=None if classes is None else classes.split(","),
        curve=parse_numbers("--curve", curve, "shares of the training") or (),
        transfer=targets,
        seed=seed,
        device=device,
        precision=precision,
        cache=not no_cache,
        quiet=False,
    )
    if not is_main_process():
        return
    is_transfer = record["schema"] == transfers.TRANSFER_SCHEMA
    used = machine(record["environment"]["device"], record["environment"]["precision"])
    print(f"{distilled.name} on {real.name}, {record['protocol']['name']}, {used}")
    print((transfers.format_transfer if is_transfer else records.format_record)(record))
    if out is not None:
        records.write_record(record, out)
        print(f"record: {out}")


def _evaluate_graphs(
    distilled: GraphSet,
    data: str,
    settings: list[str] | None,
    out: Path | None,
    force: bool,
    options: dict[str, Any],
) -> None:
    """Evaluates a set of graphs: prints the results and writes the record."""
    from condense import config, graphs
    from condense.files import check_writable, write_json

    if out is not None:
        check_writable(out, force=force)
    for name in ("networks", "controls"):
        options[name] = options[name].split(",") if options[name] else None
    if options["controls"] == ["none"]:
        options["controls"] = []
    of_data = distilled.manifest.get("data", {}).get("options", {}) | config.parse_overrides(settings or [])
    real = graphs.load_graph_task(data, config.build_config(graphs.GraphOptions, of_data, "graphs"))
    record = graphs.evaluate_graphs(distilled, real, quiet=False, **options)
    print(f"{distilled.name} on {real.name}, {record['protocol']['name']}, {record['environment']['device']}")
    print(graphs.format_graph_record(record))
    if out is not None:
        write_json(out, record)
        print(f"record: {out}")


def suite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a name of `condense ls suites`, or a YAML file")],
    out: Annotated[
        Path | None, typer.Option(help="folder for records, sets, runs and page; by default suites/NAME")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME=PATH", help="path of a dataset of the suite; may be repeated"),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="A,B,...: only these methods of the suite")] = None,
    datasets: Annotated[str | None, typer.Option(help="A,B,...: only these data of the suite")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="A,B,...: seeds of distillation, a set for each; by default those of the suite")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
) -> None:
    """Makes and evaluates a table of sets, then builds its page. Run it again to resume after a stop."""
    from condense.benchmarks import suite as suite_module

    chosen = suite_module.get_suite(name)
    if seeds is not None:
        chosen = suite_module.with_seeds(chosen, parse_seeds("--seeds", seeds))
    known = suite_module.datasets_of(chosen)
    paths = dict(entry.partition("=")[::2] for entry in data or [])
    for dataset, path in paths.items():
        if not path:
            raise CondenseError(f"--data {dataset}: write NAME=PATH; {chosen.name} has {', '.join(known)}")
        if dataset not in known:
            hint = did_you_mean(dataset, known)
            raise CondenseError(f"--data {dataset}={path}: not one of the data of {chosen.name}{hint}")
    out = out or Path("suites") / chosen.name
    outcome = suite_module.run(
        chosen,
        out,
        data=paths,
        methods=methods.split(",") if methods else (),
        datasets=datasets.split(",") if datasets else (),
        device=device,
        precision=precision,
        download=download,
        quiet=False,
    )
    if not is_main_process():
        return
    if outcome.made or outcome.kept:
        print(suite_module.table([*outcome.kept, *outcome.made]) + "\n")
    print(f"{chosen.name}: {len(outcome.made)} records made, {len(outcome.kept)} were there")
    print(f"  records and pictures: {out / suite_module.RECORDS}\n  sets: {out / suite_module.SETS}")
    if outcome.page is not None:
        print(f"  page: {outcome.page}")
    if outcome.failed:
        reasons = "; ".join(f"{stem} ({why})" for stem, why in outcome.failed.items())
        raise CondenseError(f"{len(outcome.failed)} cells were not made: {reasons}")


def leaderboard(
    out: Annotated[Path, typer.Option("--out", help="folder of the page; an existing one is replaced")],
    results: Annotated[
        Path | None, typer.Option("--results", help="folder of records; by default those of this project")
    ] = None,
    force: Force = False,
) -> None:
    """Writes records as a static page that opens from disk. Invalid records are left out and reported."""
    from condense.benchmarks import leaderboard

    built = leaderboard.build_page(results or leaderboard.RESULTS, out, force=force)
    for fault in built.rejected:
        print(f"condense: left out {fault.file}: {fault.reason}", file=sys.stderr)
    counts = {
        "rows": built.rows,
        "records": built.records,
        "published": built.published,
        "left out": len(built.rejected),
    }
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"open {built.index}")
