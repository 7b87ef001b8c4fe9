"""Verbs that work on files of sets: `verify`, `preview`, `join`, `import` and `export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from condense.cli.parameters import (
    Data,
    Download,
    Force,
    IndexedData,
    SetFile,
    evaluate_command,
    load_set,
    number_option,
    parse_numbers,
)
from condense.errors import CondenseError
from condense.formatting import by


def verify(file: SetFile, data: IndexedData = None) -> None:
    """Checks a file: checksums, shapes and manifest. Exits with 2 if anything is wrong."""
    from condense import api
    from condense.graphs import GraphSet
    from condense.sets import checksums

    loaded = api.load(file, data=data)
    if isinstance(loaded, GraphSet):
        print(f"{file}: good; {loaded.name}, {len(loaded)} graphs")
        _print_checksums(loaded.manifest["checksums"])
        return
    distilled = loaded
    expected = distilled.manifest["ipc"] * len(distilled.classes)
    if distilled.compensated:
        expected = distilled.compensated.stored
    count = distilled.num_stored
    if count != expected and not distilled.labels.is_hard:  # hard labels state the classes themselves
        raise CondenseError(f"{file}: holds {count} images, but its manifest says {expected}")
    if distilled.indices is not None and data is None:
        dataset = distilled.manifest["dataset"]
        print(f"{file}: holds indices into '{dataset}'; --data DATA checks that they fit the data")
    elif not bool(distilled.training_images()[0].isfinite().all()):
        raise CondenseError(f"{file}: some pixels are not finite")
    print(f"{file}: good; {distilled.name}, {count} images {by(distilled.shape)}, {distilled.labels.kind} labels")
    _print_checksums(checksums(distilled.arrays()))


def _print_checksums(digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        print(f"  {name}  sha256 {digest}")


def preview(
    file: SetFile,
    out: Annotated[Path, typer.Option("--out", help="PNG to write")],
    decoded: Annotated[
        bool, typer.Option("--decoded", help="show decoded images if the set stores several in one")
    ] = False,
    data: IndexedData = None,
    force: Force = False,
) -> None:
    """Draws the images of a set as a PNG.

    One row per class, or a grid if there is one image per class.
    """
    from condense.files import check_writable
    from condense.sets import save_grid

    distilled = load_set(file, data)
    check_writable(out, force=force)
    images, per_class = distilled.pictures(decoded)
    save_grid(images, out, columns=per_class)
    is_free = distilled.manifest.get("settings", {}).get("balance") == "free"
    print(
        f"wrote {out}: {len(distilled.classes)} classes, "
        + ("one a row" if per_class > 1 and not is_free else "one after the other")
    )


def join(
    first: Annotated[str, typer.Argument(metavar="FIRST.h5", help="file of a set with hard labels")],
    second: Annotated[str, typer.Argument(metavar="SECOND.h5", help="another, with images of the same shape")],
    out: Annotated[Path, typer.Option(help="file to write")],
    data: IndexedData = None,
    force: Force = False,
) -> None:
    """Joins two sets, e.g. of the tasks of class-incremental learning. Classes with equal names become one."""
    from condense.files import check_writable
    from condense.sets import join as join_sets

    check_writable(out, force=force)
    joint = join_sets(load_set(first, data), load_set(second, data))
    joint.save(out, force=force)
    print(f"joined {len(joint)} images of {len(joint.classes)} classes\n  set:  {out}")
    print(f"  next: {evaluate_command(out, None, joint.manifest['network'])}")


CIFAR = "the scripts of DC and MTT use, for CIFAR-10 and CIFAR-100,"


def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="file, or folder for mtt and imagefolder")],
    form: Annotated[str, typer.Option("--from", help="dc, mtt, tensors or imagefolder")],
    data: Data,
    out: Annotated[Path, typer.Option(help="file to write")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings of the data, e.g. zca=true")
    ] = None,
    factor: Annotated[
        int, number_option("--factor", int, "side of the grid of training images in each stored one (IDC, IDM, DANCE)")
    ] = 1,
    label_values: Annotated[
        str, typer.Option(help="what float labels are that are no probabilities: logits or regression")
    ] = "",
    labels: Annotated[str | None, typer.Option(help="file of labels (.pt, .npy), for mtt and tensors")] = None,
    lr: Annotated[str | None, typer.Option(metavar="X", help="learned step size: a number or a .pt file")] = None,
    index: Annotated[
        int | None, number_option("--index", int, "experiment of a dc file, from 0; by default the last")
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help=f"mean that the pixels were normalised by; by default the data's; {CIFAR} 0.4914,0.4822,0.4465"
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            help=f"std that the pixels were normalised by; by default the data's; {CIFAR} 0.2023,0.1994,0.2010"
        ),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="architecture that the set was made with; by default convnet-d3-w128-in")
    ] = None,
    method: Annotated[str | None, typer.Option(help="name of the method in the name of the set")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="protocol to evaluate it under; by default dc-v1 for hard labels")
    ] = None,
    download: Download = False,
    force: Force = False,
) -> None:
    """Reads a third-party distilled set. Nothing in the file is executed."""
    from condense import config, exchange
    from condense.data import DataOptions
    from condense.files import check_writable

    check_writable(out, force=force)
    names: dict[str, Any] = {
        "method": method,
        "network": network or exchange.DEFAULT_IMPORT_NETWORK,
        "protocol": protocol,
    }
    distilled = exchange.import_set(
        source,
        form,
        data,
        options=config.build_config(DataOptions, config.parse_overrides(settings or []), "the data"),
        download=download,
        labels=labels,
        factor=factor,
        label_values=label_values,
        lr=lr,
        index=index,
        mean=parse_numbers("--mean", mean, "one per channel"),
        std=parse_numbers("--std", std, "one per channel"),
        **names,
    )
    distilled.save(out, force=force)
    origin = distilled.manifest["imported"]
    kind = f"{distilled.labels.kind} labels ({origin['labels']})"
    print(f"imported {distilled.name}: {len(distilled.stored)} images, {kind}")
    if origin.get("experiments", 1) > 1:
        print(f"  experiment {origin['experiment']} of 0 to {origin['experiments'] - 1}; --index takes another")
    print(f"  normalised by: {origin['transform']}")
    if "learned_lr" in distilled.manifest:
        print(f"  learned lr: {distilled.manifest['learned_lr']:g}")
    print(f"  set:  {out}\n  next: {evaluate_command(out, data, distilled.manifest['network'], data)}")


def export(
    file: SetFile,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="file (pt, safetensors) or folder to write")],
    form: Annotated[str, typer.Option("--to", help="imagefolder, pt, safetensors or hf")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="real data; students then measure the accuracy lost by the 8 bits of imagefolder. A set of indices "
            "needs it for its images",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help=f"normalise the images of pt by the constants of your program; {CIFAR} 0.4914,0.4822,0.4465"),
    ] = None,
    std: Annotated[str | None, typer.Option(help=f"std that goes with --mean; {CIFAR} 0.2023,0.1994,0.2010")] = None,
    force: Force = False,
) -> None:
    """Writes a set in a third-party format."""
    from condense import api, exchange
    from condense.data import DATASETS
    from condense.judge import evaluation

    distilled = load_set(file, data)
    if data is not None and distilled.indices is None and form != "imagefolder":
        raise CondenseError(f"--data {data}: only --to imagefolder rounds pixels; leave it out")
    is_measured = data is not None and distilled.indices is None
    real = api.image_task(data, **evaluation.data_options(distilled)) if is_measured else None
    constants = {
        "mean": parse_numbers("--mean", mean, "one per channel"),
        "std": parse_numbers("--std", std, "one per channel"),
    }
    rounding = exchange.export_set(distilled, destination, form, force=force, **constants)
    print(f"wrote {destination}: {len(distilled)} images, {distilled.labels.kind} labels")
    if rounding is None or distilled.indices is not None:
        return
    error = f"error {rounding.mean:.2g}/255 on average, {rounding.largest:.3g}/255 at most"
    print(f"  8 bits: {100 * rounding.clipped:.2g} % of pixel values clipped; {error}")
    if real is None:
        name = distilled.manifest["dataset"]
        words = ["condense", "export", file, str(destination), "--to", form, "--force", "--data"]
        words.append(name if name in DATASETS else f"{name}=PATH")
        print(f"  accuracy lost: not measured; students measure it with: {shlex.join(words)}")
        return
    lost = evaluation.accuracy_lost(distilled, rounding.rounded, real, quiet=False)
    bounds = "{:+.1f} to {:+.1f}".format(*(100 * bound for bound in lost["ci95"])) if lost["ci95"] else "unknown"
    difference = f"{100 * lost['difference']:+.1f}, 95 % interval {bounds} ({lost['runs']} students each)"
    print(
        f"  accuracy: {100 * lost['before']:.1f} % before, {100 * lost['after']:.1f} % after; difference {difference}"
    )
