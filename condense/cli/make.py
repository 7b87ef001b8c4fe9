"""TODO-DOC."""

from __future__ import annotations

import json
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from condense.cli.parameters import (
    AsJson,
    DataOrRecipe,
    Device,
    Download,
    Force,
    Ipc,
    Method,
    Network,
    Precision,
    Recipe,
    Seed,
    Settings,
    _number,
    _sorted,
)
from condense.errors import CondenseError
from condense.formatting import by, duration, size
from condense.tracking import leads


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
    from condense.files import check_writable

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
    from condense import config
    from condense.data import DataOptions
    from condense.jobs import checks
    from condense.registry import METHODS

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
    asked, _ = checks.all_at_once(
        lambda: config.build(_Asked, run, "the run"),
        lambda: checks.check(
            entry.name, values, options, network=run.get("network"), protocol=run.get("protocol"), **watched
        ),
    )
    return asked, options, values


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


def resume(
    run_dir: Annotated[Path, typer.Argument(help="the run's directory")],
    minutes: Annotated[
        float | None,
        _number("--minutes", float, "new limit for a run with --minutes, which counts the time already spent"),
    ] = None,
) -> None:
    """Goes on with a killed or interrupted run. The result is the same as without the stop."""
    from condense.jobs import execute
    from condense.jobs import job as job_module

    if minutes is None and job_module.is_finished(run_dir) and leads():
        print(f"{run_dir} has ended; its set is:")
    made = execute.resume(run_dir, minutes=minutes, quiet=False)
    job = job_module.read_job(run_dir)
    _report(made, Path(job.out or "-"), run_dir, job.data["source"])


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
    from condense.jobs import plan as plan_module
    from condense.lighten import EPOCHS

    if classes is not None:
        if method or settings or data or recipe:
            raise CondenseError(f"--classes {classes}: plans labels without METHOD and --data; leave out it or these")
        _plan_labels(classes, ipc, EPOCHS if label_epochs is None else label_epochs, network, as_json)
        return
    if label_epochs is not None:
        raise CondenseError(f"--label-epochs {label_epochs}: goes with --classes; write label_epochs={label_epochs}")
    asked, options, values = _request(method, settings, data, ipc, network, recipe, device=device, precision=precision)
    real = api.task(asked.data, download=download, **options)
    needs = plan_module.measure(
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
    from condense.lighten import int8_bytes, label_bytes, projector_bytes

    weights = int8_bytes(teachers, shape, classes) if teachers else None
    projector = projector_bytes(shape, range(classes)) if shape[0] in (1, 3) else None
    return label_bytes(classes, images, epochs, teacher_bytes=weights, projector_bytes=projector)


def _rows(kinds: list[Any]) -> list[dict[str, Any]]:
    keys = {"labels": "words", "kind": "kind", "bytes": "bytes", "external": "external", "exactness": "exactness"}
    return [{name: getattr(kind, key) for name, key in keys.items()} for kind in kinds]


def _print_kinds(kinds: list[Any], images: int, epochs: int) -> None:
    from condense.lighten import table

    print(f"  labels of {images} images, {epochs} epochs of views, by kind:")
    print(textwrap.indent(table(kinds, "per-view"), "    "))


_PLACES = {
    "device": "in device memory",
    "pinned": "in pinned host memory",
    "memory": "in memory",
    "mapped": "mapped from disk",
}
"""Where trajectories lie while a method runs."""
