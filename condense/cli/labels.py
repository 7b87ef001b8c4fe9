"""Verbs for labels of other kinds: `lighten` and `labels`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense.cli.parameters import (
    DATA_HELP,
    Device,
    Download,
    Force,
    Precision,
    Seed,
    SetFile,
    evaluate_command,
    load_set,
    number_option,
)
from condense.errors import CondenseError
from condense.formatting import size
from condense.tracking import is_main_process

if TYPE_CHECKING:
    from condense.data import Task
    from condense.sets import DistilledSet


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
        str | None,
        typer.Option("--data", help=f"{DATA_HELP}; checked against the set's data; a projector is trained on it"),
    ] = None,
    teachers: Annotated[
        Path | None,
        typer.Option(help="file of teachers that label views; by default stored labels, or the teachers of the set"),
    ] = None,
    device: Device = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Gives a set labels of another, mostly lighter kind. Run it again to resume after a stop."""
    from condense import config
    from condense.files import check_writable
    from condense.lighten import kinds, lightening

    check_writable(out, force=force)
    keys: dict[str, Any] = config.parse_overrides(settings or [])
    distilled, real = _load(file, data, download)
    light = lightening.lighten(
        distilled, labels, real, teachers=teachers, device=device, quiet=False, beside=out, **keys
    )
    light.save(out, force=force)
    for path in kinds.partial_files(out):
        path.unlink(missing_ok=True)
    _report(distilled.name, light)
    print(f"  set:  {out}\n  next: {evaluate_command(out, data, light.manifest['network'], real and real.source)}")


def _load(file: str, data: str | None, download: bool) -> tuple[DistilledSet, Task | None]:
    """A set and, where ``data`` are given, its real data, which bring the images of a set of indices."""
    from condense import api
    from condense.judge import evaluation

    distilled = load_set(file)
    if data is None:
        return distilled, None
    real = api.image_task(data, download=download, **evaluation.data_options(distilled))
    return distilled.with_data(real), real


def _report(name: str, light: DistilledSet) -> None:
    """Prints the bytes, the kind and the error of the new labels."""
    facts = light.manifest["lightened"]
    before, external = facts["bytes"]["before"], facts["bytes"]["external"]
    after = facts["bytes"]["after"] + external
    share = f"{size(after)} of labels, {100 * after / before:.3g} % of {size(before)}"
    print(f"lightened {name}: {share}" + f" ({size(external)} of it external)" * bool(external))
    print(f"  {light.labels.kind} labels, {facts['exactness']}; a step costs: {facts['step_cost']}")
    error = facts["error"]
    if error is not None:
        logits = f"centred logits off by {error['largest']:.3g} at most, {100 * error['relative']:.3g} % in squares"
        print(f"  error: {logits}; {100 * error['moved']:.3g} % of the targets' probability lies elsewhere")


def labels_(
    file: SetFile,
    data: Annotated[
        str | None, typer.Option("--data", help="real data to evaluate students on; without it only bytes are compared")
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(help="KIND[:KEY=VALUE...],...; own is the kind of the set; by default own and every kind"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="picture of accuracy against bytes to draw")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="protocol of the soft track; by default that of the set, or dc-soft-v1")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="architecture of the students; by default the first of the protocol")
    ] = None,
    runs: Annotated[
        int | None,
        number_option("--runs", int, "students per kind; by default the number of the protocol", maximum=10_000),
    ] = None,
    teachers: Annotated[
        Path | None,
        typer.Option(help="file of teachers that label views; by default stored labels, or the teachers of the set"),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    download: Download = False,
    force: Force = False,
) -> None:
    """Compares kinds of labels of a set by bytes and accuracy."""
    from condense.files import check_writable
    from condense.lighten import comparison

    if plot is not None:
        if data is None:
            raise CondenseError(f"--plot {plot}: draws accuracies; give --data")
        comparison.check_plot(plot)
        check_writable(plot, force=force)
    chosen = comparison.parse_kinds(kinds or "")
    distilled, real = _load(file, data, download)
    points = comparison.compare_label_kinds(
        distilled,
        chosen,
        real,
        protocol=protocol,
        network=network,
        runs=runs,
        teachers=teachers,
        seed=seed,
        device=device,
        precision=precision,
        quiet=False,
    )
    if not is_main_process():
        return
    print(f"{distilled.name}: {len(distilled)} images, {size(distilled.nbytes()['images'])}")
    print(comparison.format_comparison(points))
    if plot is not None:
        print(f"picture: {comparison.plot_comparison(points, plot, distilled.name)}")
