"""TODO-DOC."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from condense.cli.parameters import (
    AddTo,
    Data,
    Device,
    Download,
    Force,
    HeldOut,
    Precision,
    Seed,
    _number,
    _sorted,
)
from condense.formatting import duration, size
from condense.tracking import leads


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
    from condense.data import DataOptions
    from condense.jobs import checks
    from condense.registry import METHODS

    keys: dict[str, Any] = config.parse(settings or [])
    options, values = _sorted(keys, DataOptions, METHODS.get(method).config)
    watched: dict[str, Any] = {
        "network": network, "count": count, "epochs": epochs, "dtype": dtype, "held_out": held_out, "device": device,
        "precision": precision,
    }  # fmt: skip
    checks.check_experts(method, values, options, **watched)
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
    from condense.data import DataOptions
    from condense.jobs import checks
    from condense.pretraining import TeacherOptions
    from condense.registry import METHODS

    keys: dict[str, Any] = config.parse(settings or [])
    options, values = _sorted(keys, DataOptions, METHODS.get(method).config if method else TeacherOptions)
    watched: dict[str, Any] = {
        "networks": networks, "count": count, "epochs": epochs, "held_out": held_out, "device": device,
        "precision": precision,
    }  # fmt: skip
    checks.check_teachers(method, values, options, **watched)
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
