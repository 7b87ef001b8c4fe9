"""TODO-DOC."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from condense.cli.parameters import _DATA, Device, Download, Force, Precision, Seed, SetFile, _number, _set
from condense.errors import CondenseError
from condense.formatting import size
from condense.tracking import leads


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
    from condense import api, config
    from condense.files import check_writable
    from condense.judge import evaluation
    from condense.lighten import kinds, lightening

    check_writable(out, force=force)
    keys: dict[str, Any] = config.parse(settings or [])
    made = _set(file)
    real = api.task(data, download=download, **evaluation.data_options(made)) if data is not None else None
    light = lightening.lighten(made, labels, real, teachers=teachers, device=device, quiet=False, beside=out, **keys)
    light.save(out, force=force)
    for path in kinds.answer_files(out):
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
    from condense import api
    from condense.files import check_writable
    from condense.judge import evaluation
    from condense.lighten import comparison

    if plot is not None:
        if data is None:
            raise CondenseError(f"--plot {plot}: draws accuracies; give --data")
        comparison.check_plot(plot)
        check_writable(plot, force=force)
    chosen, made = comparison.asked_kinds(kinds or ""), _set(file)
    real = api.task(data, download=download, **evaluation.data_options(made)) if data is not None else None
    points = comparison.compare(
        made, chosen, real, protocol=protocol, network=network, runs=runs, teachers=teachers, seed=seed, device=device,
        precision=precision, quiet=False,
    )  # fmt: skip
    if not leads():
        return
    print(f"{made.name}: {len(made)} images, {size(made.nbytes()['images'])}")
    print(comparison.table(points))
    if plot is not None:
        print(f"picture: {comparison.chart(points, plot, made.name)}")
