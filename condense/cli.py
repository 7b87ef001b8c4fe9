"""The command line: one function per verb. Torch is imported inside the verbs, so that help stays fast.

A mistake ends in one line on stderr that begins with ``condense:``. The exit codes are in :data:`EXIT_CODES`.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import json
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from condense.errors import CondenseError, did_you_mean
from condense.tracking import leads
from condense.units import by, duration, size
from condense.version import __version__

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

KINDS = ("methods", "datasets", "networks", "recipes", "protocols", "suites", "sets")


@app.command("ls")
def ls(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=", ".join(KINDS))] = None,
    as_json: AsJson = False,
) -> None:
    """Lists what exists."""
    if kind is not None and kind not in KINDS:
        raise CondenseError(f"'{kind}' cannot be listed{did_you_mean(kind, KINDS)}")
    listing = {name: _listing(name) for name in ([kind] if kind else KINDS)}
    if as_json:
        print(json.dumps(listing, indent=1))
        return
    for name, rows in listing.items():
        if kind is None:
            print(f"{name}:" if rows else f"{name}: none")
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            print(("  " if kind is None else "") + f"{row['name']:<{width}}  {row['about']}".rstrip())


def _listing(kind: str) -> list[dict[str, Any]]:
    from condense import config

    if kind == "methods":
        from condense.registry import METHODS

        entries = [METHODS.get(name) for name in METHODS.names()]
        return [
            {"name": e.name, "about": f"{e.summary} ({e.year})", "paper": e.paper, "labels": e.labels, "order": e.order}
            for e in entries
        ]
    if kind == "datasets":
        from condense.sources import datasets

        return [{"name": name, "about": about} for name, about in datasets().items()]
    if kind == "networks":
        from condense.networks import CONVNET_GRAMMAR, names

        return [{"name": CONVNET_GRAMMAR, "about": ""}, *({"name": name, "about": ""} for name in names())]
    if kind == "protocols":
        from condense.protocols import protocols

        return [{"name": p.name, "about": p.summary, "version": p.version} for p in protocols().values()]
    if kind == "suites":
        from condense.benchmarks.suite import suites

        return [{"name": suite.name, "about": suite.summary} for suite in suites().values()]
    if kind == "sets":
        from condense.distilled import packaged_sets

        sets = packaged_sets().items()
        return [{"name": name, "about": _claim(_set(name)), "path": str(path)} for name, path in sets]
    return [{"name": name, "about": _recipe_line(config.recipe(name))} for name in config.recipe_names()]


def _claim(made: Any) -> str:
    """What a ready-made set holds, and what it was measured to reach."""
    claim = made.manifest.get("claim")
    reached = f", {100 * claim['mean']:.1f} % on {claim['network']} under {claim['protocol']}" if claim else ""
    return f"{len(made.stored)} images, {size(made.nbytes()['total'])}{reached}"


def _recipe_line(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in recipe.items() if key != "method")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="METHOD|RECIPE|SET.h5", help="what to show")],
    as_json: AsJson = False,
) -> None:
    """Shows a method, a recipe, or a set's manifest."""
    from condense import config
    from condense.distilled import packaged_sets
    from condense.registry import METHODS

    if name in METHODS:
        _show_method(name, as_json)
    elif name in config.recipe_names() or name.endswith((".yaml", ".yml")):
        _show_recipe(name, as_json)
    elif name in packaged_sets() or name.endswith(".h5") or Path(name).exists():
        manifest = _set(name).manifest
        if as_json:
            print(json.dumps(manifest, indent=1))
        else:
            _print_keys({key: value for key, value in manifest.items() if key != "checksums"})
    else:
        known = [*METHODS.names(), *config.recipe_names(), *packaged_sets()]
        raise CondenseError(f"'{name}' is no method, recipe or .h5 file{did_you_mean(name, known)}")


def _show_recipe(name: str, as_json: bool) -> None:
    from condense import config
    from condense.benchmarks import facts

    recipe = config.recipe(name)
    _request(None, None, None, None, None, name)  # as `distill` would refuse it
    wanted = recipe["method"], recipe["data"], int(recipe["ipc"])
    published, measured = facts.published(*wanted), facts.measured(*wanted)
    if as_json:
        print(json.dumps({"recipe": recipe, "published": published, "measured": measured}, indent=1))
        return
    _print_keys(recipe)
    for title, lines in (
        ("published", [facts.published_line(row) for row in published]),
        ("measured here", [facts.measured_line(entry) for entry in measured]),
    ):
        print(f"{title}:" + ("" if lines else " none"))
        for line in lines:
            print(f"  {line}")
    print(f"run it: condense distill --recipe {shlex.quote(name)}")


def _print_keys(content: dict[str, Any]) -> None:
    for key, value in content.items():
        print(f"{key}: {_plain(value)}")


def _plain(value: Any) -> str:
    """JSON-like content in one readable line: ``key=value`` pairs and lists without quotes and braces."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key}=({_plain(v)})" if isinstance(v, dict) else f"{key}={_plain(v)}" for key, v in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _show_method(name: str, as_json: bool) -> None:
    import inspect

    from condense import config
    from condense.registry import METHODS
    from condense.tasks import DataOptions

    entry = METHODS.get(name)
    settings = config.describe(entry.config)
    if as_json:
        facts = {key: value for key, value in vars(entry).items() if key not in ("function", "config")}
        keys = ("name", "type", "default", "meaning")
        print(json.dumps({**facts, "settings": [dict(zip(keys, row)) for row in settings]}, indent=1))
        return
    print(f"{entry.name}: {entry.paper} ({entry.year}); labels: {entry.labels}; network: {entry.network}; "
          f"protocol: {entry.protocol}\n")  # fmt: skip
    print(inspect.cleandoc(entry.function.__doc__ or ""))
    for title, rows in (("settings", settings), ("settings of the data", config.describe(DataOptions))):
        if rows:
            print(f"\n{title}:")
        for key, _, default, meaning in rows:
            print(f"  {key}={default}\n      {meaning}")


@app.command()
def distill(
    method: Method = None,
    settings: Settings = None,
    data: DataOrRecipe = None,
    ipc: Ipc = None,
    network: Network = None,
    recipe: Recipe = None,
    out: Annotated[Path | None, typer.Option(help="file to write; DATASET-METHOD-ipcN.h5 here by default")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="checkpoints, log, previews; below runs/ by default")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    minutes: Annotated[
        float | None, _number("--minutes", float, "stop cleanly after so long and keep what there is")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="ends the set's name: dataset/method-ipcN.TAG")] = None,
    track: Annotated[
        str, typer.Option(help="auto (TensorBoard where installed), tensorboard, trackio or none")
    ] = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Makes a distilled set from real data."""
    from condense import api
    from condense.distilled import check_writable

    watched: dict[str, Any] = {"device": device, "precision": precision, "minutes": minutes, "track": track}
    asked, options, values = _request(method, settings, data, ipc, network, recipe, **watched)
    if out is not None:
        check_writable(out, force=force)
    real = api.task(asked.data, download=download, **options)
    name = f"{real.name}-{asked.method}-ipc{asked.ipc}" + (f"-{tag}" if tag else "")
    out = out or Path(name + (f"-seed{seed}" if seed else "") + ".h5")
    run_dir = run_dir or Path("runs") / f"{name}-seed{seed}"
    made = api.distill(
        asked.method, real, asked.ipc, network=asked.network, protocol=asked.protocol, seed=seed, out=out,
        deterministic=asked.deterministic, run_dir=run_dir, tag=tag, force=force, quiet=False, **watched, **values,
    )  # fmt: skip
    _report(made, out, run_dir, asked.data)


@dataclass(frozen=True)
class _Asked:
    """What `distill` and `plan` were asked for besides settings of the data and of the method."""

    method: str
    data: str
    ipc: int
    network: str | None = None
    protocol: str | None = None
    deterministic: bool = False


def _request(
    method: str | None,
    settings: list[str] | None,
    data: str | None,
    ipc: int | None,
    network: str | None,
    recipe: str | None,
    **watched: Any,
) -> tuple[_Asked, dict[str, Any], dict[str, Any]]:
    """The recipe's keys with the command line's own words over them, checked: the run's, the data's, the method's."""
    from condense import api, config
    from condense.registry import METHODS
    from condense.tasks import DataOptions

    words = list(settings or [])
    if method is not None and "=" in method:  # with --recipe the first word may already be a setting
        words.insert(0, method)
        method = None
    keys = config.recipe(recipe) if recipe else {}
    named = keys.get("method")
    if None not in (method, named) and method != named:
        raise CondenseError(f"--recipe {recipe} is for the method '{named}', not '{method}'; leave one of them out")
    flags = {"method": method, "data": data, "ipc": ipc, "network": network}
    keys |= {key: value for key, value in flags.items() if value is not None} | config.parse(words)
    missing = [word for key, word in (("method", "METHOD"), ("data", "--data"), ("ipc", "--ipc")) if key not in keys]
    if missing:
        raise CondenseError(f"{', '.join(missing)} missing; give METHOD --data DATA --ipc N, or --recipe NAME")
    entry = METHODS.get(str(keys["method"]))
    run, options, values = _sorted(keys, _Asked, DataOptions, entry.config)
    asked, _ = api.all_at_once(
        lambda: config.build(_Asked, run, "the run"),
        lambda: api.check(
            entry.name, values, options, network=run.get("network"), protocol=run.get("protocol"), **watched
        ),
    )
    return asked, options, values


def _sorted(keys: dict[str, Any], *groups: type) -> list[dict[str, Any]]:
    """``keys`` by the dataclass that has the key, or the one most like it (the last where none is)."""
    owners = {field.name: number for number, group in enumerate(groups) for field in fields(group)}
    found: list[dict[str, Any]] = [{} for _ in groups]
    for key, value in keys.items():
        like = difflib.get_close_matches(key, owners, n=1, cutoff=0.5)
        found[owners[like[0]] if like else -1][key] = value
    return found


def _report(made: Any, out: Path, run_dir: Path, data: str) -> None:
    """What was made, where, and what to do next."""
    if not leads():
        return
    manifest = made.manifest
    bytes_ = made.nbytes()
    images = f"{len(made.stored)} images of {size(bytes_['images'])}"
    images += f" with {made.labels.kind} labels of {size(bytes_['labels'])}" * (made.labels.kind != "hard")
    total = manifest["settings"].get("steps")
    steps = f", {manifest['steps_done']} of {total} steps" if total else ""
    cost, first = manifest["cost"], manifest.get("preparation")
    print(f"made {made.name}: {images}{steps} in {duration(cost['seconds'])}")
    if first:
        done, asked = (f"{first['networks' + end]} networks of {first['steps_each' + end]} training steps"
                       for end in ("", "_wanted"))  # fmt: skip
        print(f"  before it: {done} on real data" + f" (for lack of time; asked for {asked})" * (done != asked)
              + f", {duration(first['seconds'])}; {first['from_cache']} of them were in the cache")  # fmt: skip
    if manifest["stopped_early"]:
        print(f"  stopped by --minutes; go on with: condense resume {shlex.quote(str(run_dir))} --minutes M")
    file = shlex.quote(str(out))
    print(f"  set:  {out}\n  run:  {run_dir} (config, log, previews)")
    print(f"  next: condense evaluate {file} --data {shlex.quote(data)}")
    print(f"        condense preview {file} --out {shlex.quote(str(out.with_suffix('.png')))}")


@app.command()
def experts(
    data: Data,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the method and of the data")
    ] = None,
    network: Annotated[str | None, typer.Option(help="their architecture; the method's own by default")] = None,
    count: Annotated[int | None, _number("--count", int, "experts; the method's num_experts by default")] = None,
    epochs: Annotated[
        int | None, _number("--epochs", int, "of their training; as many as the method reads by default")
    ] = None,
    method: Annotated[str, typer.Option("--for", metavar="METHOD", help="method whose experts they are")] = "mtt",
    out: AddTo = None,
    held_out: HeldOut = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32, of the stored weights")] = "float16",
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Trains experts on real data and keeps their trajectories. Call it again to go on after a stop, or to add some."""
    from condense import api, config
    from condense.registry import METHODS
    from condense.tasks import DataOptions

    keys: dict[str, Any] = config.parse(settings or [])
    options, values = _sorted(keys, DataOptions, METHODS.get(method).config)
    watched: dict[str, Any] = {
        "network": network, "count": count, "epochs": epochs, "dtype": dtype, "held_out": held_out, "device": device,
        "precision": precision,
    }  # fmt: skip
    api.check_experts(method, values, options, **watched)
    real = api.task(data, download=download, **options)
    made = api.experts(real, method=method, out=out, seed=seed, force=force, quiet=False, **watched, **values)
    if not leads():
        return
    file, new = made.file, len(made.trained)
    entries = file.manifest["experts"]
    print(f"{file.count} experts of {real.name}, {file.manifest['network']}, {file.epochs} epochs: "
          f"{new} trained now, {file.count - new} were there")  # fmt: skip
    print(f"  file: {file.path} ({size(file.path.stat().st_size)})")
    if new:
        pace = new * file.epochs / made.seconds * 60
        seconds = sum(entries[k]["seconds"] for k in made.trained) / new
        print(f"  time: {duration(seconds)} an expert; {pace:.3g} experts x epochs a minute")
    if file.manifest["held_out"]:
        scores = [100 * entry["accuracy"] for entry in entries]
        print(f"  right on held-out images: {sum(scores) / len(scores):.1f} % ({min(scores):.1f} to {max(scores):.1f})")
    words = ["condense", "distill", method, "--data", data, "--ipc", "10"] + ["--network", network] * bool(network)
    words += [*(settings or []), f"experts={file.path}"] + [f"buffer_epochs={epochs}"] * (epochs is not None)
    print(f"  next: {shlex.join(word for word in words if word is not None)}")


@app.command()
def teachers(
    data: Data,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the teachers, the method and the data")
    ] = None,
    networks: Annotated[
        str | None, typer.Option(help="A,B,...: their architectures; the method's network by default")
    ] = None,
    count: Annotated[
        int | None, _number("--count", int, "teachers of each architecture; num_teachers by default")
    ] = None,
    epochs: Annotated[int | None, _number("--epochs", int, "of their training; teacher_epochs by default")] = None,
    method: Annotated[
        str | None, typer.Option("--for", metavar="METHOD", help="method whose settings train them; none by default")
    ] = None,
    out: AddTo = None,
    held_out: HeldOut = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Trains teachers on real data and keeps them. Call it again to go on after a stop, or to add some."""
    from condense import api, config
    from condense.registry import METHODS
    from condense.tasks import DataOptions
    from condense.teachers import TeacherOptions

    keys: dict[str, Any] = config.parse(settings or [])
    options, values = _sorted(keys, DataOptions, METHODS.get(method).config if method else TeacherOptions)
    watched: dict[str, Any] = {
        "networks": networks, "count": count, "epochs": epochs, "held_out": held_out, "device": device,
        "precision": precision,
    }  # fmt: skip
    api.check_teachers(method, values, options, **watched)
    real = api.task(data, download=download, **options)
    made = api.teachers(real, method=method, out=out, seed=seed, force=force, quiet=False, **watched, **values)
    if not leads():
        return
    file, new = made.file, len(made.trained)
    print(f"{len(file.entries)} teachers of {real.name}, {file.manifest['epochs']} epochs: "
          f"{new} trained now, {len(file.entries) - new} were there")  # fmt: skip
    print(f"  file: {file.path} ({size(file.path.stat().st_size)})")
    members = {name: [e for e in file.entries if e["network"] == name] for name in dict(file.keys)}
    for name, entries in members.items():
        scores, seconds = [100 * e["accuracy"] for e in entries], [e["seconds"] for e in entries]
        spread = f" ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else ""
        print(f"  {len(entries)} {name}: {sum(scores) / len(scores):.1f} %{spread} of the {file.manifest['judged_on']} "
              f"right, {duration(sum(seconds) / len(seconds))} each")  # fmt: skip
    # What trained them is in the file; how it is called in the settings of the method is left out.
    words = ["condense", "distill", method or "METHOD", "--data", data, "--ipc", "10"]
    words += [word for word in settings or [] if word.partition("=")[0] not in ("committee", "num_teachers")]
    words += [f"teachers={file.path}", f"committee={','.join(members)}"]
    words += [f"num_teachers={min(map(len, members.values()))}"] * (min(map(len, members.values())) > 1)
    print(f"  next: {shlex.join(words)}")


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="the run's directory")],
    minutes: Annotated[
        float | None,
        _number("--minutes", float, "new limit for a run with --minutes, which counts the time already spent"),
    ] = None,
) -> None:
    """Goes on with a killed or interrupted run. The result is the same as without the stop."""
    from condense import api

    if minutes is None and api.is_finished(run_dir) and leads():
        print(f"{run_dir} has ended; its set is:")
    made = api.resume(run_dir, minutes=minutes, quiet=False)
    job = api.read_job(run_dir)
    _report(made, Path(job.out or "-"), run_dir, job.data["source"])


@app.command()
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
    from condense import api, config, evaluation, records
    from condense.distilled import check_writable

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


@app.command()
def lighten(
    file: SetFile,
    labels: Annotated[
        str,
        typer.Option(help="KIND: lowrank, topk, pool, teacher, projector, static, distances, soft, hard or per-view"),
    ],
    out: Annotated[Path, typer.Option(help="file to write")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="rank (lowrank), k and fill (topk), keep and values (pool), weights (teacher), backbone, "
            "adapter_rank, projector_steps, ... (projector), weight (distances), smoothing (hard); of labels of views "
            "label_epochs, temperature, squared, label_scale, label_pad, mix, ...",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help=f"{_DATA}; compared with the set's, and what a projector learns from")
    ] = None,
    teachers: Annotated[
        Path | None, typer.Option(help="file of teachers to ask; stored labels, or the set's own, by default")
    ] = None,
    device: Device = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Gives a set lighter labels. Call it again to go on after a stop."""
    from condense import api, config, evaluation
    from condense.distilled import check_writable
    from condense.methods import label_lightening as room

    check_writable(out, force=force)
    keys: dict[str, Any] = config.parse(settings or [])
    made = _set(file)
    real = api.task(data, download=download, **evaluation.data_options(made)) if data is not None else None
    light = room.lighten(made, labels, real, teachers=teachers, device=device, quiet=False, beside=out, **keys)
    light.save(out, force=force)
    for path in room.answer_files(out):
        path.unlink(missing_ok=True)
    known = light.manifest["lightened"]
    before, after = known["bytes"]["before"], known["bytes"]["after"] + known["bytes"]["external"]
    print(f"lightened {made.name}: {size(after)} of labels, {100 * after / before:.3g} % of {size(before)}"
          + f" ({size(known['bytes']['external'])} of it external)" * bool(known["bytes"]["external"]))  # fmt: skip
    print(f"  {light.labels.kind} labels, {known['exactness']}; a step costs: {known['step_cost']}")
    if known["error"] is not None:
        error = known["error"]
        print(f"  error: centred logits off by {error['largest']:.3g} at most, {100 * error['relative']:.3g} % in "
              f"squares; {100 * error['moved']:.3g} % of the targets' probability lies elsewhere")  # fmt: skip
    word = shlex.quote(data) if data is not None else "DATA"
    print(f"  set:  {out}\n  next: condense evaluate {shlex.quote(str(out))} --data {word}")


@app.command("labels")
def labels_(
    file: SetFile,
    data: Annotated[
        str | None, typer.Option("--data", help="real data, on which students are judged; without, bytes alone")
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(help="KIND[:KEY=VALUE...],...; own is what the set brings; own and every kind by default"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="picture to draw, of accuracy against bytes")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="of the soft track; the set's own by default, else dc-soft-v1")
    ] = None,
    network: Annotated[str | None, typer.Option(help="of the students; the protocol's first by default")] = None,
    runs: Annotated[int | None, _number("--runs", int, "students a kind; the protocol's number by default")] = None,
    teachers: Annotated[Path | None, typer.Option(help="file of teachers to ask; see condense lighten")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Compares kinds of labels for a set: bytes and accuracy."""
    from condense import api, evaluation
    from condense.distilled import check_writable
    from condense.methods import label_lightening as room

    if plot is not None:
        if data is None:
            raise CondenseError(f"--plot {plot}: draws accuracies; give --data")
        room.check_plot(plot)
        check_writable(plot, force=force)
    chosen, made = room.asked_kinds(kinds or ""), _set(file)
    real = api.task(data, download=download, **evaluation.data_options(made)) if data is not None else None
    points = room.compare(
        made, chosen, real, protocol=protocol, network=network, runs=runs, teachers=teachers, seed=seed, device=device,
        precision=precision, quiet=False,
    )  # fmt: skip
    if not leads():
        return
    print(f"{made.name}: {len(made)} images, {size(made.nbytes()['images'])}")
    print(room.table(points))
    if plot is not None:
        print(f"picture: {room.chart(points, plot, made.name)}")


@app.command()
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


@app.command()
def verify(file: SetFile) -> None:
    """Checks a file: checksums, shapes and manifest. Exits with 2 where anything is off."""
    from condense.distilled import checksums

    loaded = _set(file)
    expected = loaded.compensated.stored if loaded.compensated else loaded.manifest["ipc"] * len(loaded.classes)
    count = len(loaded.stored)
    if count != expected:
        raise CondenseError(f"{file}: holds {count} images, but its manifest says {expected}")
    if not bool(loaded.training_images()[0].isfinite().all()):
        raise CondenseError(f"{file}: some pixels are not finite")
    print(f"{file}: good; {loaded.name}, {count} images {by(loaded.shape)}, {loaded.labels.kind} labels")
    for name, digest in checksums(loaded.arrays()).items():
        print(f"  {name}  sha256 {digest}")


@app.command()
def preview(
    file: SetFile,
    out: Annotated[Path, typer.Option("--out", help="PNG to write")],
    decoded: Annotated[
        bool, typer.Option("--decoded", help="show decoded images where the set stores several in one")
    ] = False,
    force: Force = False,
) -> None:
    """Draws the images of a set as a PNG: one class a row."""
    from condense.distilled import check_writable, save_grid

    loaded = _set(file)
    check_writable(out, force=force)
    images, per_class = loaded.pictures(decoded)
    save_grid(images, out, columns=per_class)
    print(f"wrote {out}: {len(loaded.classes)} classes, one a row")


@app.command()
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


_CIFAR = "DC's and MTT's scripts take, for CIFAR-10 and CIFAR-100 alike,"


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="file, or folder for mtt and imagefolder")],
    form: Annotated[str, typer.Option("--from", help="dc, mtt, tensors or imagefolder")],
    data: Data,
    out: Annotated[Path, typer.Option(help="file to write")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the data, e.g. zca=true")
    ] = None,
    labels: Annotated[str | None, typer.Option(help=".pt file of labels, for mtt and tensors")] = None,
    lr: Annotated[str | None, typer.Option(metavar="X", help="learned step size: a number or a .pt file")] = None,
    index: Annotated[
        int | None, _number("--index", int, "experiment of a dc file, from 0; the last by default")
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help=f"what the maker normalised by, else the data's; {_CIFAR} 0.4914,0.4822,0.4465"),
    ] = None,
    std: Annotated[str | None, typer.Option(help=f"see --mean; {_CIFAR} 0.2023,0.1994,0.2010")] = None,
    network: Annotated[str | None, typer.Option(help="that it was made with; convnet-d3-w128-in by default")] = None,
    method: Annotated[str | None, typer.Option(help="name of the method in that of the set")] = None,
    protocol: Annotated[str | None, typer.Option(help="for judging it; dc-v1 for hard labels by default")] = None,
    download: Download = False,
    force: Force = False,
) -> None:
    """Reads a set that others made. Nothing in the file is executed."""
    from condense import config, exchange
    from condense.distilled import check_writable
    from condense.tasks import DataOptions

    check_writable(out, force=force)
    options = config.build(DataOptions, config.parse(settings or []), "the data")
    made = exchange.import_set(
        source, form, data, options=options, download=download, labels=labels, lr=lr, index=index,
        mean=_numbers("--mean", mean), std=_numbers("--std", std), method=method, network=network or exchange.NETWORK,
        protocol=protocol,
    )  # fmt: skip
    made.save(out, force=force)
    known = made.manifest["imported"]
    print(f"imported {made.name}: {len(made.stored)} images, {made.labels.kind} labels ({known['labels']})")
    if known.get("experiments", 1) > 1:
        print(f"  experiment {known['experiment']} of 0 to {known['experiments'] - 1}; --index takes another")
    print(f"  normalised by: {known['transform']}")
    if "learned_lr" in made.manifest:
        print(f"  learned lr: {made.manifest['learned_lr']:g}")
    print(f"  set:  {out}\n  next: condense evaluate {shlex.quote(str(out))} --data {shlex.quote(data)}")


def _numbers(flag: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise CondenseError(f"{flag} {text}: must be numbers joined by commas, one per channel") from None


@app.command()
def export(
    file: SetFile,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="file (pt, safetensors) or folder to write")],
    form: Annotated[str, typer.Option("--to", help="imagefolder, pt, safetensors or hf")],
    data: Annotated[
        str | None, typer.Option("--data", help="real data: students measure what the 8 bits of imagefolder cost")
    ] = None,
    force: Force = False,
) -> None:
    """Writes a set in a format of others."""
    from condense import api, evaluation, exports
    from condense.sources import DATASETS

    made = _set(file)
    if data is not None and form != "imagefolder":
        raise CondenseError(f"--data {data}: only --to imagefolder rounds pixels; leave it out")
    real = api.task(data, **evaluation.data_options(made)) if data is not None else None
    rounding = exports.export_set(made, destination, form, force=force)
    print(f"wrote {destination}: {len(made)} images, {made.labels.kind} labels")
    if rounding is None:
        return
    print(f"  8 bits: {100 * rounding.clipped:.2g} % of pixel values clipped; "
          f"error {rounding.mean:.2g}/255 on average, {rounding.largest:.3g}/255 at most")  # fmt: skip
    if real is None:
        name = made.manifest["dataset"]
        words = ["condense", "export", file, str(destination), "--to", form, "--force", "--data"]
        words.append(name if name in DATASETS else f"{name}=PATH")
        print(f"  accuracy lost: not measured; students measure it with: {shlex.join(words)}")
        return
    lost = exports.accuracy_lost(made, rounding.rounded, real, quiet=False)
    bounds = "{:+.1f} to {:+.1f}".format(*(100 * bound for bound in lost["ci95"])) if lost["ci95"] else "unknown"
    print(f"  accuracy: {100 * lost['before']:.1f} % before, {100 * lost['after']:.1f} % after; difference "
          f"{100 * lost['difference']:+.1f}, 95 % interval {bounds} ({lost['runs']} students each)")  # fmt: skip


def _set(name: str) -> Any:
    from condense import api

    return api.load(name)


@app.command()
def plan(
    method: Method = None,
    settings: Settings = None,
    data: DataOrRecipe = None,
    ipc: Ipc = None,
    network: Network = None,
    recipe: Recipe = None,
    device: Device = "auto",
    classes: Annotated[
        int | None, _number("--classes", int, "without METHOD and --data: bytes of labels for so many classes alone")
    ] = None,
    label_epochs: Annotated[
        int | None, _number("--label-epochs", int, "for --classes: labelled epochs of views; 300 by default")
    ] = None,
    precision: Precision = "auto",
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Says what time, memory and disk a run would need. It makes a few of the run's steps.

    Where the set's labels are of views, bytes of every kind of labels too; with --classes these alone.
    """
    from condense import api
    from condense.methods.label_lightening import EPOCHS

    if classes is not None:
        if method or settings or data or recipe:
            raise CondenseError(f"--classes {classes}: plans labels without METHOD and --data; leave out it or these")
        _plan_labels(classes, ipc, EPOCHS if label_epochs is None else label_epochs, network, as_json)
        return
    if label_epochs is not None:
        raise CondenseError(f"--label-epochs {label_epochs}: goes with --classes; write label_epochs={label_epochs}")
    asked, options, values = _request(method, settings, data, ipc, network, recipe, device=device, precision=precision)
    real = api.task(asked.data, download=download, **options)
    needs = api.measure(
        asked.method, real, asked.ipc, network=asked.network, device=device, precision=precision, **values
    )
    views, kinds = needs["views"], []
    if views:
        views["epochs"] = views["epochs"] or EPOCHS
        kinds = _kinds(real.num_classes, views["images"], views["epochs"], views["teachers"], real.shape)
    if as_json:
        print(json.dumps({**needs, "labels": _rows(kinds)}, indent=1))
        return
    per_step = f" ({needs['steps']} steps of {duration(needs['seconds_per_step'])})" if needs["steps"] else ""
    memory = ", ".join(f"{size(count)} {where}" for where, count in needs["peak_memory"].items())
    print(f"{asked.method} on {real.name}, ipc {asked.ipc}, {needs['device']}")
    before = needs["preparation_seconds"]
    per_step += f", {duration(before)} of it training networks on real data" if before else ""
    labelling = needs["labelling_seconds"]
    per_step += f", {duration(labelling)} of it labelling" if labelling else ""
    print(f"  time:   {duration(needs['seconds'])}{per_step}")
    print(f"  memory: {memory} at peak")
    parts = ", ".join(f"{size(needs['set_bytes'][part])} {part}" for part in ("images", "labels"))
    outside = needs["set_bytes"]["external"]  # of a public network, which no set holds
    print(f"  disk:   {size(needs['set_bytes']['total'] - outside)} set ({parts}), {size(needs['checkpoint_bytes'])} "
          "checkpoints" + f"; {size(outside)} external" * bool(outside))  # fmt: skip
    if needs["trajectories"]:
        found = needs["trajectories"]
        print(f"  experts: {found['experts']} of {found['epochs']} epochs, {size(found['bytes'])} on disk; "
              f"{size(found['resident_bytes'])} of them {_PLACES[found['place']]}")  # fmt: skip

    if kinds:
        _print_kinds(kinds, views["images"], views["epochs"])


def _plan_labels(classes: int, ipc: int | None, epochs: int, network: str | None, as_json: bool) -> None:
    """The part of `plan` that needs no data."""
    if ipc is None:
        raise CondenseError(f"--ipc missing; give --classes {classes} --ipc N")
    network, images = network or "torchvision:resnet18", classes * ipc
    for flag, value, least in (("--classes", classes, 2), ("--ipc", ipc, 1), ("--label-epochs", epochs, 1)):
        if value < least:
            raise CondenseError(f"{flag} {value}: must be at least {least}")
    kinds = _kinds(classes, images, epochs, [network], _PICTURE)
    if as_json:
        about = {"classes": classes, "images": images, "epochs": epochs, "teachers": [network]}
        print(json.dumps({"views": about, "labels": _rows(kinds)}, indent=1))
        return
    print(f"{classes} classes, ipc {ipc}; teacher: {network} on images {by(_PICTURE)}")
    _print_kinds(kinds, images, epochs)


_PICTURE = (3, 224, 224)
"""Images that a teacher sees where there are no data."""


def _kinds(classes: int, images: int, epochs: int, teachers: list[str], shape: tuple[int, int, int]) -> list[Any]:
    """Bytes of every kind of labels."""
    from condense.methods.label_lightening import int8_bytes, label_bytes
    from condense.methods.label_projection import projector_bytes

    weights = int8_bytes(teachers, shape, classes) if teachers else None
    projector = projector_bytes(shape, range(classes)) if shape[0] in (1, 3) else None
    return label_bytes(classes, images, epochs, teacher_bytes=weights, projector_bytes=projector)


def _rows(kinds: list[Any]) -> list[dict[str, Any]]:
    keys = {"labels": "words", "kind": "kind", "bytes": "bytes", "external": "external", "exactness": "exactness"}
    return [{name: getattr(kind, key) for name, key in keys.items()} for kind in kinds]


def _print_kinds(kinds: list[Any], images: int, epochs: int) -> None:
    from condense.methods.label_lightening import table

    print(f"  labels of {images} images, {epochs} epochs of views, by kind:")
    print(textwrap.indent(table(kinds, "per-view"), "    "))


_PLACES = {
    "device": "in device memory",
    "pinned": "in pinned host memory",
    "memory": "in memory",
    "mapped": "mapped from disk",
}
"""Where trajectories lie while a method runs."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"condense {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of a mistake too")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options before the verb."""


for _command in app.registered_commands:
    _command.epilog = EXIT_CODES


def _keep_freed_memory() -> None:
    """Lets glibc keep large freed blocks for the next step instead of giving them back and getting them zeroed anew.

    On a 2-core CPU steps on 256 images of a width-32 ConvNet took 7-33 % less time, with a fifth of the page faults and
    the same peak memory.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the end of the heap stays


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with the documented code."""
    _keep_freed_memory()
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # accepted anywhere
    code = 0
    try:
        command = typer.main.get_command(app)
        with command.make_context("condense", words) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        code = done.exit_code
    except BrokenPipeError:  # `condense ls | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as fault:
        if debug:
            traceback.print_exc()
        code, line = _verdict(fault)
        print(f"condense: {' '.join(line.splitlines())}", file=sys.stderr)
    sys.exit(code)


def _verdict(fault: BaseException) -> tuple[int, str]:
    """The exit code of what ended the program, and what to say of it."""
    if isinstance(fault, CondenseError):
        return 2, str(fault)
    if isinstance(fault, (KeyboardInterrupt, typer.Abort)):
        return 130, str(fault) or "interrupted"
    if hasattr(
        fault, "format_message"
    ):  # words that typer cannot parse; the class of these errors moves between versions
        context = getattr(fault, "ctx", None)
        return 2, f"{fault.format_message().rstrip('.')} (see {context.command_path if context else 'condense'} --help)"
    return 1, f"a fault of ours: {type(fault).__name__}: {fault}; --debug shows where"
