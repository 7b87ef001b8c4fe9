"""TODO-DOC."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from condense.cli.parameters import Data, Download, Force, SetFile, _number, _set
from condense.errors import CondenseError
from condense.formatting import by


def verify(file: SetFile) -> None:
    """Checks a file: checksums, shapes and manifest. Exits with 2 where anything is off."""
    from condense.sets import checksums

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


def preview(
    file: SetFile,
    out: Annotated[Path, typer.Option("--out", help="PNG to write")],
    decoded: Annotated[
        bool, typer.Option("--decoded", help="show decoded images where the set stores several in one")
    ] = False,
    force: Force = False,
) -> None:
    """Draws the images of a set as a PNG: one class a row."""
    from condense.files import check_writable
    from condense.sets import save_grid

    loaded = _set(file)
    check_writable(out, force=force)
    images, per_class = loaded.pictures(decoded)
    save_grid(images, out, columns=per_class)
    print(f"wrote {out}: {len(loaded.classes)} classes, one a row")


_CIFAR = "DC's and MTT's scripts take, for CIFAR-10 and CIFAR-100 alike,"


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
    from condense.data import DataOptions
    from condense.files import check_writable

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
    from condense import api
    from condense.data import DATASETS
    from condense.exchange import exporting
    from condense.judge import evaluation

    made = _set(file)
    if data is not None and form != "imagefolder":
        raise CondenseError(f"--data {data}: only --to imagefolder rounds pixels; leave it out")
    real = api.task(data, **evaluation.data_options(made)) if data is not None else None
    rounding = exporting.export_set(made, destination, form, force=force)
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
    lost = evaluation.accuracy_lost(made, rounding.rounded, real, quiet=False)
    bounds = "{:+.1f} to {:+.1f}".format(*(100 * bound for bound in lost["ci95"])) if lost["ci95"] else "unknown"
    print(f"  accuracy: {100 * lost['before']:.1f} % before, {100 * lost['after']:.1f} % after; difference "
          f"{100 * lost['difference']:+.1f}, 95 % interval {bounds} ({lost['runs']} students each)")  # fmt: skip
