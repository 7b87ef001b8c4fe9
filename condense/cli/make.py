"""Verbs that make a set: `distill` and `resume`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense.cli.parameters import (
    DataOrRecipe,
    Device,
    Download,
    Force,
    Images,
    Ipc,
    MethodArgument,
    NetworkOption,
    Precision,
    RecipeOption,
    Seed,
    SettingsArgument,
    evaluate_command,
    number_option,
)
from condense.cli.request import parse_request
from condense.formatting import duration, machine, size
from condense.tracking import is_main_process

if TYPE_CHECKING:
    from condense.graphs import GraphSet
    from condense.sets import DistilledSet


def distill(
    method: MethodArgument = None,
    settings: SettingsArgument = None,
    data: DataOrRecipe = None,
    ipc: Ipc = None,
    images: Images = None,
    network: NetworkOption = None,
    recipe: RecipeOption = None,
    out: Annotated[Path | None, typer.Option(help="file to write; by default DATASET-METHOD-ipcN.h5 here")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="folder for checkpoints, log and previews; by default in runs/")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    minutes: Annotated[
        float | None, number_option("--minutes", float, "time limit; the run stops cleanly and keeps its current set")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="suffix of the set's name: dataset/method-ipcN.TAG")] = None,
    track: Annotated[str, typer.Option(help="auto (TensorBoard if installed), tensorboard, trackio or none")] = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Makes a distilled set from real data."""
    from condense import api
    from condense.files import check_writable
    from condense.registry import METHODS

    run_options: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "minutes": minutes,
        "track": track,
        "tag": tag,
    }
    request, options, values = parse_request(method, settings, data, ipc, network, recipe, images=images, **run_options)
    if out is not None:
        check_writable(out, force=force)
    is_graphs = METHODS.get(request.method).task == "graphs"
    real: Any = api.task(request.data, download=download, **options)
    ipc = request.images_per_class(real)
    name = f"{real.name}-{request.method}-ipc{ipc}" + (f"-{tag}" if tag else "")
    out = out or Path(name + (f"-seed{seed}" if seed else "") + ".h5")
    if run_dir is None and not is_graphs:
        run_dir = Path("runs") / f"{name}-seed{seed}"
    distilled: Any = api.distill(
        request.method,
        real,
        ipc,
        network=request.network,
        protocol=request.protocol,
        deterministic=request.deterministic,
        seed=seed,
        out=out,
        run_dir=run_dir,
        force=force,
        quiet=False,
        **run_options,
        **values,
    )
    if run_dir is None:
        _report_graphs(distilled, out, request.data)
    else:
        _report(distilled, out, run_dir, request.data, real.source)


def resume(
    run_dir: Annotated[Path, typer.Argument(help="the run's directory")],
    minutes: Annotated[
        float | None,
        number_option(
            "--minutes",
            float,
            "time limit from now on; a run that --minutes stopped has none by default, but keeps its shortened "
            "training on real data",
        ),
    ] = None,
    steps: Annotated[int | None, number_option("--steps", int, "new number of steps, more than before")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu, cuda, ..., if not the one that the run began with")
    ] = None,
) -> None:
    """Resumes a killed or interrupted run. The result is the same as without the stop. --steps adds steps to a run."""
    from condense import jobs

    goes_on = minutes is not None or steps is not None or jobs.was_stopped(run_dir)
    has_ended = not goes_on and jobs.is_finished(run_dir)
    distilled = jobs.resume(run_dir, minutes=minutes, steps=steps, device=device, quiet=False)
    if has_ended and is_main_process():
        print(f"{run_dir} has ended; its set is:")
    job = jobs.read_job(run_dir)
    source = job.data["source"]
    _report(distilled, Path(job.out or "-"), run_dir, source or job.data["name"], source)


def _report(distilled: DistilledSet, out: Path, run_dir: Path, data: str, source: str | None) -> None:
    """Prints the set, its cost, its files and the commands to run next. ``source`` may be a registered name."""
    if not is_main_process():
        return
    manifest, bytes_, kind = distilled.manifest, distilled.nbytes(), distilled.labels.kind
    images = f"{distilled.num_stored} images of {size(bytes_['images'])}"
    images += f" with {kind} labels of {size(bytes_['labels'])}" * (kind != "hard")
    total = manifest["settings"].get("steps")
    steps = f", {manifest['steps_done']} of {total} steps" if total else ""
    cost = manifest["cost"]
    used = machine(cost["device"], manifest["precision"])
    print(f"made {distilled.name}: {images}{steps} in {duration(cost['seconds'])} on {used}")
    if manifest.get("preparation"):
        print(f"  before it: {_format_preparation(manifest['preparation'])}")
    if manifest["stopped_early"]:
        command = f"condense resume {shlex.quote(str(run_dir))}"
        print(f"  stopped by --minutes; go on to the end: {command}, for M minutes: {command} --minutes M")
    print(f"  set:  {out}\n  run:  {run_dir} (config, log, previews)")
    transfer = ["--transfer", "DATA"] * (len(distilled.classes) < 2)
    print(f"  next: {evaluate_command(out, data, manifest['network'], source, more=transfer)}")
    words = ["condense", "preview", str(out), "--out", str(out.with_suffix(".png"))]
    words += ["--data", data] if distilled.indices is not None else []
    print(f"        {shlex.join(words)}")


def _report_graphs(distilled: GraphSet, out: Path, data: str) -> None:
    """Prints the set, its cost, its file and the command to run next."""
    manifest, bytes_ = distilled.manifest, distilled.nbytes()
    cost = f"{duration(manifest['cost']['seconds'])} on {manifest['cost']['device']}"
    print(f"made {distilled.name}: {len(distilled)} graphs of {size(bytes_['total'])} in {cost}")
    print(f"  set:  {out}\n  next: {evaluate_command(out, data)}")


def _format_preparation(facts: dict[str, Any]) -> str:
    """The networks trained on real data before the first step."""
    trained, requested = (
        f"{facts['networks' + suffix]} networks of {facts['steps_each' + suffix]} training steps"
        for suffix in ("", "_wanted")
    )
    shortened = f" (because of the time limit; requested: {requested})" * (trained != requested)
    return (
        f"{trained} on real data{shortened}, {duration(facts['seconds'])}; "
        f"{facts['from_cache']} of them were in the cache"
    )
