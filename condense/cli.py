"""The command line: one function per verb. Torch is imported inside the verbs, so that help stays fast.

Exit codes of every verb: 0 done, 2 the user's mistake (one line on stderr), 1 ours, 130 interrupted with the state saved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from condense.errors import CondenseError
from condense.version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make, judge and use distilled datasets. Exit codes: 0 done, 2 a mistake in what was given, 1 a fault of ours, "
    "130 interrupted (state saved).",
)

Data = Annotated[
    str, typer.Option("--data", help="digits, cifar10, ...; a folder, .npz or .h5; NAME=PATH names a folder in the records")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="the same seed gives the same result")]
Force = Annotated[bool, typer.Option("--force", help="overwrite what exists")]
Download = Annotated[bool, typer.Option("--download", help="fetch a registered dataset that is not on disk")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Settings = Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="settings; see condense show")]  # noqa: UP045

KINDS = ("methods", "datasets", "networks", "recipes", "protocols", "sets")


@app.command("ls")
def ls(
    kind: Annotated[Optional[str], typer.Argument(help=", ".join(KINDS))] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:
    """Lists what exists."""
    if kind is not None and kind not in KINDS:
        from condense.errors import did_you_mean

        raise CondenseError(f"'{kind}' cannot be listed{did_you_mean(kind, KINDS)}")
    listing = {name: _listing(name) for name in ([kind] if kind else KINDS)}
    if as_json:
        print(json.dumps(listing, indent=1))
        return
    for name, rows in listing.items():
        if kind is None:
            print(f"{name}:")
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
        from condense.tasks import datasets

        return [{"name": name, "about": about} for name, about in datasets().items()]
    if kind == "networks":
        from condense.networks import names

        return [{"name": name, "about": ""} for name in names()]
    if kind == "protocols":
        from condense.evaluation import protocols

        return [{"name": p.name, "about": p.summary, "version": p.version} for p in protocols().values()]
    if kind == "sets":
        from condense.distilled import packaged_sets

        return [{"name": name, "about": str(path)} for name, path in packaged_sets().items()]
    return [{"name": name, "about": _recipe_line(config.recipe(name))} for name in config.recipe_names()]


def _recipe_line(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in recipe.items() if key not in ("method", "published"))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="METHOD|RECIPE|SET.h5", help="what to show")],
    as_json: AsJson = False,
) -> None:
    """Shows a method's settings with meaning and default, a recipe, or the manifest of a set."""
    from condense import config
    from condense.errors import did_you_mean
    from condense.registry import METHODS

    if name in METHODS:
        _show_method(name, as_json)
    elif name in config.recipe_names() or name.endswith((".yaml", ".yml")):
        recipe = config.recipe(name)
        print(json.dumps(recipe, indent=1) if as_json else "\n".join(f"{key}: {value}" for key, value in recipe.items()))
        if not as_json:
            print(f"run it: condense distill --recipe {name}")
    elif name.endswith(".h5"):
        from condense.distilled import DistilledSet

        manifest = DistilledSet.load(name).manifest
        shown = manifest if as_json else {key: value for key, value in manifest.items() if key != "checksums"}
        print(json.dumps(manifest, indent=1) if as_json else "\n".join(f"{key}: {value}" for key, value in shown.items()))
    else:
        known = [*METHODS.names(), *config.recipe_names()]
        raise CondenseError(f"'{name}' is no method, recipe or .h5 file{did_you_mean(name, known)}")


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
    method: Annotated[Optional[str], typer.Argument(help="a name of `condense ls methods`")] = None,  # noqa: UP045
    settings: Settings = None,
    data: Annotated[Optional[str], typer.Option("--data", help="real data: a name, folder, .npz, .h5 or NAME=PATH")] = None,  # noqa: UP045
    ipc: Annotated[Optional[int], typer.Option("--ipc", help="stored images per class")] = None,  # noqa: UP045
    network: Annotated[Optional[str], typer.Option(help="network to match with; the method's own by default")] = None,  # noqa: UP045
    recipe: Annotated[Optional[str], typer.Option(help="a name of `condense ls recipes`, or a YAML file")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="file to write; DATASET-METHOD-ipcN.h5 by default")] = None,  # noqa: UP045
    run_dir: Annotated[Optional[Path], typer.Option(help="checkpoints, log, previews; below runs/ by default")] = None,  # noqa: UP045
    seed: Seed = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16, for work without second derivatives")] = "auto",
    minutes: Annotated[Optional[float], typer.Option(help="stop cleanly after so long and keep what there is")] = None,  # noqa: UP045
    tag: Annotated[Optional[str], typer.Option(help="ends the set's name: dataset/method-ipcN.TAG")] = None,  # noqa: UP045
    track: Annotated[str, typer.Option(help="auto (TensorBoard where installed), tensorboard, trackio or none")] = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Makes a distilled set from real data."""
    request = _request(method, settings, data, ipc, network, recipe)
    from condense import api

    real = _load(request.data, request.data_options, download)
    out = out or Path(f"{real.name}-{request.method}-ipc{request.ipc}.h5")
    run_dir = run_dir or Path("runs") / f"{real.name}-{request.method}-ipc{request.ipc}-seed{seed}"
    made = api.distill(
        request.method, real, request.ipc, network=request.network, seed=seed, device=device, precision=precision,
        minutes=minutes, out=out, run_dir=run_dir, tag=tag, protocol=request.protocol, force=force, quiet=False, track=track,
        **request.settings,
    )  # fmt: skip
    _report(made, out, run_dir, request.data)


class _Request:
    """What `distill` and `plan` were asked for: a recipe's keys with the command line's own words over them."""

    def __init__(self, method: str, keys: dict[str, Any]) -> None:
        from dataclasses import fields

        from condense.tasks import DataOptions

        self.method = method
        self.data: str = keys.pop("data")
        self.ipc: int = keys.pop("ipc")
        self.network: str | None = keys.pop("network", None)
        self.protocol: str | None = keys.pop("protocol", None)
        keys.pop("published", None)
        data_keys = [field.name for field in fields(DataOptions)]
        self.data_options = {key: keys.pop(key) for key in data_keys if key in keys}
        self.settings = keys


def _request(
    method: str | None,
    settings: list[str] | None,
    data: str | None,
    ipc: int | None,
    network: str | None,
    recipe: str | None,
) -> _Request:
    from condense import config
    from condense.registry import METHODS

    words = list(settings or [])
    if method is not None and "=" in method:  # with --recipe the first word may already be a setting
        words.insert(0, method)
        method = None
    keys = config.recipe(recipe) if recipe else {}
    named = keys.pop("method", None)
    if method is not None and named is not None and method != named:
        raise CondenseError(f"--recipe {recipe} is for the method '{named}', not '{method}'")
    method = method or named
    given = {"data": data, "ipc": ipc, "network": network}
    keys |= {key: value for key, value in given.items() if value is not None}
    keys |= config.parse(words)
    if method is None:
        raise CondenseError("no method given; name one of `condense ls methods`, or give --recipe")
    METHODS.get(method)
    for key in ("data", "ipc"):
        if key not in keys:
            raise CondenseError(f"--{key} is missing; give it, or a --recipe that has it")
    return _Request(method, keys)


def _load(data: str, options: dict[str, Any], download: bool) -> Any:
    from condense import api

    return api.task(data, download=download, **options)


def _report(made: Any, out: Path, run_dir: Path, data: str) -> None:
    """What was made, where, and what to do next."""
    size, cost = made.nbytes(), made.manifest["cost"]
    early = " (stopped by --minutes)" if made.manifest["stopped_early"] else ""
    print(
        f"made {made.name}: {len(made.stored)} images, {size['images']} bytes of images, "
        f"{made.manifest['steps_done']} steps{early} in {cost['seconds']:.0f} s"
    )
    print(f"  set:  {out}\n  run:  {run_dir} (config, log, previews)")
    print(f"  next: condense evaluate {out} --data {data}\n        condense preview {out} --out {out.with_suffix('.png')}")


@app.command()
def resume(run_dir: Annotated[Path, typer.Argument(help="the run's directory")]) -> None:
    """Goes on with a run that was killed or interrupted; the result is the same as without the stop."""
    from condense import api

    job = api.read_job(run_dir)
    made = api.resume(run_dir, quiet=False)
    _report(made, Path(job.out or "-"), run_dir, job.data["source"])


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(metavar="SET.h5", help="the set to judge")],
    data: Data,
    networks: Annotated[Optional[str], typer.Option(help="A,B,...; the set's own network by default")] = None,  # noqa: UP045
    runs: Annotated[Optional[int], typer.Option(help="students per arm; the protocol's number by default")] = None,  # noqa: UP045
    protocol: Annotated[Optional[str], typer.Option(help="a name of `condense ls protocols`; the set's own by default")] = None,  # noqa: UP045
    controls: Annotated[str, typer.Option(help="random,noise,full,full-equal or none")] = "random",
    seed: Seed = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    out: Annotated[Optional[Path], typer.Option("--json", help="file to write the record to")] = None,  # noqa: UP045
    no_cache: Annotated[bool, typer.Option("--no-cache", help="train every arm anew")] = False,
    download: Download = False,
    force: Force = False,
) -> None:
    """Judges a set against control arms under one protocol, and writes the record."""
    from condense import evaluation
    from condense.distilled import DistilledSet, check_writable

    distilled = DistilledSet.load(file)
    if out is not None:
        check_writable(out, force=force)
    options = {**distilled.manifest.get("data", {}).get("options", {}), "zca": False}  # the set brings its own transform
    real = _load(data, {key: value for key, value in options.items() if value is not None}, download)
    record = evaluation.evaluate(
        distilled, real, networks=networks.split(",") if networks else None, runs=runs, protocol=protocol,
        controls=[] if controls == "none" else controls.split(","), seed=seed, device=device, precision=precision,
        cache=not no_cache, quiet=False,
    )  # fmt: skip
    print(f"{distilled.name} on {real.name}, {record['protocol']['name']}, {record['environment']['device']}")
    print(evaluation.table(record))
    if out is not None:
        evaluation.write_record(record, out)
        print(f"record: {out}")


@app.command()
def verify(file: Annotated[Path, typer.Argument(metavar="SET.h5")]) -> None:
    """Checks a file: checksums, shapes and manifest; exits with 2 where anything is off."""
    from condense.distilled import DistilledSet, checksums

    loaded = DistilledSet.load(file)
    count, expected = len(loaded.stored), loaded.manifest["ipc"] * len(loaded.classes)
    if count != expected:
        raise CondenseError(f"{file}: holds {count} images, but its manifest says {expected}")
    if not bool(loaded.training_images()[0].isfinite().all()):
        raise CondenseError(f"{file}: some pixels are not finite")
    print(f"{file}: good; {loaded.name}, {count} images {loaded.shape}, labels {loaded.labels.kind}")
    for name, digest in checksums(loaded.arrays()).items():
        print(f"  {name}  sha256 {digest}")


@app.command()
def preview(
    file: Annotated[Path, typer.Argument(metavar="SET.h5")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write")],
    decoded: Annotated[bool, typer.Option("--decoded", help="show decoded images where the set stores several in one")] = False,
    force: Force = False,
) -> None:
    """Draws the images of a set as a PNG: one class a row."""
    from condense.distilled import DistilledSet, check_writable, save_grid

    loaded = DistilledSet.load(file)
    check_writable(out, force=force)
    images, per_class = loaded.pictures(decoded)
    save_grid(images, out, columns=per_class)
    print(f"wrote {out}: {len(loaded.classes)} classes, one a row")


@app.command()
def plan(
    method: Annotated[Optional[str], typer.Argument(help="a name of `condense ls methods`")] = None,  # noqa: UP045
    settings: Settings = None,
    data: Annotated[Optional[str], typer.Option("--data", help="real data: a name, folder, .npz, .h5 or NAME=PATH")] = None,  # noqa: UP045
    ipc: Annotated[Optional[int], typer.Option("--ipc", help="stored images per class")] = None,  # noqa: UP045
    network: Annotated[Optional[str], typer.Option(help="network to match with")] = None,  # noqa: UP045
    recipe: Annotated[Optional[str], typer.Option(help="a recipe, by name or file")] = None,  # noqa: UP045
    device: Device = "auto",
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Says what a run would need – time, memory, disk – by making a few of its steps."""
    request = _request(method, settings, data, ipc, network, recipe)
    from condense import api

    real = _load(request.data, request.data_options, download)
    needs = api.measure(request.method, real, request.ipc, request.network, device, **request.settings)
    if as_json:
        print(json.dumps(needs, indent=1))
        return
    per_step = "" if needs["seconds_per_step"] is None else f" ({needs['steps']} steps of {needs['seconds_per_step']:.3f} s)"
    memory = ", ".join(f"{size / 2**30:.2f} GiB {where}" for where, size in needs["peak_memory"].items())
    print(f"{request.method} on {real.name}, ipc {request.ipc}, {needs['device']}")
    print(f"  time:   {_duration(needs['seconds'])}{per_step}")
    print(f"  memory: {memory} at peak")
    print(f"  disk:   {needs['set_bytes']['total'] / 1e6:.2f} MB set, {needs['checkpoint_bytes'] / 1e6:.2f} MB checkpoints")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"condense {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks of mistakes too")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    """Options before the verb."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with the documented code."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # accepted anywhere
    import click

    try:
        code = app(words, standalone_mode=False)
    except CondenseError as fault:
        if debug:
            raise
        print(f"condense: {fault}", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as fault:
        message = " ".join(fault.format_message().split())
        print(f"condense: {message}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as fault:
        print(f"condense: {fault}" if str(fault) else "condense: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as fault:
        if debug:
            raise
        print(f"condense: a fault of ours: {type(fault).__name__}: {fault}; --debug shows where", file=sys.stderr)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
