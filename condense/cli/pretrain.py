"""Verbs that train networks on real data before a method runs: `experts`, `teachers` and `scores`."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from condense.cli.parameters import (
    Data,
    Device,
    Download,
    Force,
    HeldOut,
    NetworksFile,
    Precision,
    Seed,
    number_option,
    plugin_options,
    sort_settings,
)
from condense.formatting import duration, size
from condense.tracking import is_main_process


def experts(
    data: Data,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the method and of the data")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="architecture of the experts; by default that of the method")
    ] = None,
    count: Annotated[
        int | None, number_option("--count", int, "number of experts; by default the method's num_experts")
    ] = None,
    epochs: Annotated[
        int | None, number_option("--epochs", int, "epochs of training; by default the number that the method reads")
    ] = None,
    method: Annotated[str, typer.Option("--for", metavar="METHOD", help="method that uses the experts")] = "mtt",
    out: NetworksFile = None,
    held_out: HeldOut = None,
    dtype: Annotated[str, typer.Option(help="type of the stored weights: float16 or float32")] = "float16",
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Trains experts on real data and stores their trajectories. Run it again to resume, or to add experts."""
    from condense import api, config, jobs
    from condense.data import DataOptions
    from condense.registry import METHODS

    keys: dict[str, Any] = config.parse_overrides(settings or [])
    options, values = sort_settings(keys, DataOptions, METHODS.get(method).config)
    training: dict[str, Any] = {"network": network, "count": count, "epochs": epochs, "dtype": dtype}
    training |= {"held_out": held_out, "device": device, "precision": precision}
    jobs.check_experts(method, values, options, **training)
    real = api.image_task(data, download=download, **options)
    result = api.experts(real, method=method, out=out, seed=seed, force=force, quiet=False, **training, **values)
    if not is_main_process():
        return
    file, new = result.file, len(result.trained)
    entries = file.manifest["experts"]
    kind = f"experts of {real.name}, {file.manifest['network']}, {file.epochs} epochs"
    print(f"{file.count} {kind}: {new} trained now, {file.count - new} were there")
    print(f"  file: {file.path} ({size(file.path.stat().st_size)})")
    if new:
        rate = new * file.epochs / result.seconds * 60
        seconds = sum(entries[number]["seconds"] for number in result.trained) / new
        print(f"  time: {duration(seconds)} an expert; {rate:.3g} experts x epochs a minute")
    if file.manifest["held_out"]:
        accuracies = [100 * entry["accuracy"] for entry in entries]
        mean, spread = sum(accuracies) / len(accuracies), f"{min(accuracies):.1f} to {max(accuracies):.1f}"
        print(f"  right on held-out images: {mean:.1f} % ({spread})")
    words = ["condense", "distill", method, *plugin_options(method, real.source, file.manifest["network"])]
    words += ["--data", data, "--ipc", "10"]
    words += [*(settings or []), f"experts={file.path}"]
    print(f"  next: {shlex.join(words)}")


def teachers(
    data: Data,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the teachers, the method and the data")
    ] = None,
    networks: Annotated[str | None, typer.Option(help="architectures A,B,...; by default that of the method")] = None,
    count: Annotated[
        int | None, number_option("--count", int, "teachers of each architecture; by default num_teachers")
    ] = None,
    epochs: Annotated[
        int | None, number_option("--epochs", int, "epochs of training; by default teacher_epochs")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--for", metavar="METHOD", help="method whose settings define the training; by default none"),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="what teachers are trained for: classes, or barlow (Barlow Twins, without classes)"),
    ] = None,
    out: NetworksFile = None,
    held_out: HeldOut = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Trains teachers on real data and stores them. Run it again to resume, or to add teachers."""
    from condense import api, config, jobs
    from condense.data import DataOptions
    from condense.registry import METHODS

    keys: dict[str, Any] = config.parse_overrides(settings or [])
    options, values = sort_settings(keys, DataOptions, jobs.teacher_options(objective, method))
    training: dict[str, Any] = {"networks": networks, "count": count, "epochs": epochs}
    training |= {"held_out": held_out, "objective": objective, "device": device, "precision": precision}
    jobs.check_teachers(method, values, options, **training)
    real = api.image_task(data, download=download, **options)
    result = api.teachers(real, method=method, out=out, seed=seed, force=force, quiet=False, **training, **values)
    if not is_main_process():
        return
    file, new = result.file, len(result.trained)
    kind = f"teachers of {real.name}, {file.manifest['epochs']} epochs"
    print(f"{len(file.entries)} {kind}: {new} trained now, {len(file.entries) - new} were there")
    print(f"  file: {file.path} ({size(file.path.stat().st_size)})")
    members = {name: [entry for entry in file.entries if entry["network"] == name] for name in dict(file.keys)}
    for name, entries in members.items():
        accuracies = [100 * entry["accuracy"] for entry in entries]
        spread = f" ({min(accuracies):.1f} to {max(accuracies):.1f})" if len(accuracies) > 1 else ""
        mean, judged_on = sum(accuracies) / len(accuracies), file.manifest["judged_on"]
        seconds = sum(entry["seconds"] for entry in entries) / len(entries)
        right = f"{mean:.1f} %{spread} of the {judged_on} right, " if real.num_classes > 1 else ""
        print(f"  {len(entries)} {name}: {right}{duration(seconds)} each")
    used_by = method or ("krrst" if objective == "barlow" else "rded")
    # The file decides the networks, so the settings that choose them are left out.
    known = {field.name for kind in (METHODS.get(used_by).config, DataOptions) for field in dataclasses.fields(kind)}
    known -= {"committee", "num_teachers"}
    words = ["condense", "distill", used_by, *plugin_options(used_by, real.source, *members)]
    words += ["--data", data, "--ipc", "10"]
    words += [word for word in settings or [] if word.partition("=")[0] in known]
    words += [f"teachers={file.path}"]
    smallest = min(map(len, members.values()))
    words += [f"num_teachers={smallest}"] if smallest > 1 and used_by != "krrst" else []
    print(f"  next: {shlex.join(words)}")


def scores(
    data: Data,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the scores and of the data")
    ] = None,
    network: Annotated[str | None, typer.Option(help="architecture of the networks that score the images")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; by default DATASET-scores.h5 here")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Scores the train images of real data. Run it again: networks are kept."""
    from condense import api, config, jobs
    from condense.data import DataOptions
    from condense.files import check_writable
    from condense.pretraining import ScoreOptions
    from condense.selection import COLUMNS

    keys: dict[str, Any] = config.parse_overrides(settings or [])
    options, values = sort_settings(keys, DataOptions, ScoreOptions)
    where: dict[str, Any] = {"device": device, "precision": precision}
    jobs.check_scores(values, options, network=network or "", **where)
    if out is not None:
        check_writable(out, force=force)
    real = api.image_task(data, download=download, **options)
    out = out or Path(f"{real.name}-scores.h5")
    table = api.scores(real, network=network, out=out, seed=seed, force=force, quiet=False, **where, **values)
    if not is_main_process():
        return
    about = table.manifest
    trained = f"{about['networks']} {about['network']}, {about['epochs']} epochs, {duration(about['seconds'])}"
    print(f"scores of the {len(table)} train images of {real.name}: {trained}")
    print(f"  file: {out} ({size(out.stat().st_size)})")
    for name, values_of in table.columns.items():
        low, middle, high = (float(values_of.quantile(share)) for share in (0.0, 0.5, 1.0))
        print(f"  {name:<10} {low:9.4g} {middle:9.4g} {high:9.4g}  {COLUMNS[name].meaning}")
    print("  (least, median and largest value)")
    words = ["condense", "distill", "forgetting", *plugin_options(real.source), "--data", data, "--ipc", "10"]
    words += [f"scores={out}"]
    print(f"  next: {shlex.join(words)}")
