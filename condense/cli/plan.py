"""The verb `plan`: time, memory and disk of a run, and bytes of every kind of labels."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

from condense.cli.parameters import (
    AsJson,
    DataOrRecipe,
    Device,
    Download,
    Images,
    Ipc,
    MethodArgument,
    NetworkOption,
    Precision,
    RecipeOption,
    SettingsArgument,
    number_option,
)
from condense.cli.request import parse_request
from condense.errors import CondenseError
from condense.formatting import by, duration, machine, size

if TYPE_CHECKING:
    from condense.lighten import LabelComparison

IMAGE_SHAPE = (3, 224, 224)
"""Shape of the teacher's images if there are no data."""

PLACES = {
    "device": "in device memory",
    "pinned": "in pinned host memory",
    "memory": "in memory",
    "mapped": "mapped from disk",
}
"""Placements of trajectories while a method runs."""


def plan(
    method: MethodArgument = None,
    settings: SettingsArgument = None,
    data: DataOrRecipe = None,
    ipc: Ipc = None,
    images: Images = None,
    network: NetworkOption = None,
    recipe: RecipeOption = None,
    device: Device = "auto",
    classes: Annotated[
        int | None,
        number_option(
            "--classes",
            int,
            "number of classes; without METHOD and --data: only the bytes of labels",
            maximum=100_000,
        ),
    ] = None,
    label_epochs: Annotated[
        int | None, number_option("--label-epochs", int, "for --classes: labelled epochs of views; by default 300")
    ] = None,
    minutes: Annotated[
        float | None, number_option("--minutes", float, "time at hand: prints the number of steps that fit into it")
    ] = None,
    precision: Precision = "auto",
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Estimates time, memory and disk from a few steps of a run.

    If the set has labels of views, the bytes of every kind of labels too; with --classes only these.
    """
    from condense import api, jobs
    from condense.lighten import DEFAULT_LABEL_EPOCHS

    if classes is not None:
        if method or settings or data or recipe or minutes is not None:
            words = "METHOD, --data and --minutes"
            raise CondenseError(f"--classes {classes}: plans labels without {words}; leave out it or these")
        _plan_labels(classes, ipc, DEFAULT_LABEL_EPOCHS if label_epochs is None else label_epochs, network, as_json)
        return
    if label_epochs is not None:
        raise CondenseError(f"--label-epochs {label_epochs}: goes with --classes; write label_epochs={label_epochs}")
    request, options, values = parse_request(
        method, settings, data, ipc, network, recipe, images=images, device=device, precision=precision, minutes=minutes
    )
    jobs.check_request(request.method, values)  # refuses methods that make no steps, before the data are read
    real = api.image_task(request.data, download=download, **options)
    ipc = request.images_per_class(real)
    estimate = jobs.estimate_cost(
        request.method, real, ipc, network=request.network, device=device, precision=precision, **values
    )
    views, kinds = estimate["views"], []
    if views:
        views["epochs"] = views["epochs"] or DEFAULT_LABEL_EPOCHS
        kinds = _label_kinds(real.num_classes, views["images"], views["epochs"], views["teachers"], real.shape)
    if minutes is not None:
        estimate["steps_in_minutes"] = _steps_in(minutes, estimate)
    if as_json:
        print(json.dumps({**estimate, "labels": _rows(kinds)}, indent=1))
        return
    print(f"{request.method} on {real.name}, ipc {ipc}, {machine(estimate['device'], estimate['precision'])}")
    if estimate["taken_from_files"]:
        print(f"  {estimate['taken_from_files']}")
    _print_estimate(estimate)
    if minutes is not None and estimate["steps"]:
        steps = estimate["steps_in_minutes"]
        print(f"  {minutes:g} minutes: " + (f"steps={steps}" if steps else "too short for this method"))
    if kinds:
        _print_kinds(kinds, views["images"], views["epochs"])


def _steps_in(minutes: float, estimate: dict[str, Any]) -> int | None:
    """Steps that fit into ``minutes``, in whole networks, at most those of the run; None if none do or it has none."""
    if not estimate["steps"]:
        return None
    fixed = estimate["seconds"] - estimate["steps"] * estimate["seconds_per_step"]
    fitting = int(max(0.0, 60 * minutes - fixed) / max(estimate["seconds_per_step"], 1e-9))
    return min(estimate["steps"], fitting - fitting % estimate["steps_per_network"]) or None


def _print_estimate(estimate: dict[str, Any]) -> None:
    """Prints the lines time, memory, disk and experts."""
    time, least = duration(estimate["seconds"]), duration(estimate["least_seconds"])
    if least != time:
        time = f"{least} to {time}"
    if estimate["steps"]:
        networks = estimate["steps"] // estimate["steps_per_network"]
        along = f" along {networks} networks" if estimate["steps_per_network"] > 1 else ""
        time += f" ({estimate['steps']} steps of {duration(estimate['seconds_per_step'])}{along})"
    if estimate["preparation_seconds"]:
        time += f", {duration(estimate['preparation_seconds'])} of it training networks on real data"
    if estimate["labelling_seconds"]:
        time += f", {duration(estimate['labelling_seconds'])} of it labelling"
    print(f"  time:   {time}")
    memory = ", ".join(f"{size(count)} {where}" for where, count in estimate["peak_memory"].items())
    print(f"  memory: {memory} at peak")
    set_bytes = estimate["set_bytes"]
    parts = ", ".join(f"{size(set_bytes[part])} {part}" for part in ("images", "labels"))
    external = set_bytes["external"]  # bytes of a public network, which no set stores
    disk = f"{size(set_bytes['total'] - external)} set ({parts}), {size(estimate['checkpoint_bytes'])} checkpoints"
    print(f"  disk:   {disk}" + f"; {size(external)} external" * bool(external))
    experts = estimate["trajectories"]
    if experts:
        count, place = f"{experts['experts']} of {experts['epochs']} epochs", PLACES[experts["place"]]
        print(
            f"  experts: {count}, {size(experts['bytes'])} on disk; {size(experts['resident_bytes'])} of them {place}"
        )


def _plan_labels(classes: int, ipc: int | None, epochs: int, network: str | None, as_json: bool) -> None:
    """Plans labels without data."""
    if ipc is None:
        raise CondenseError(f"--ipc missing; give --classes {classes} --ipc N")
    network, images = network or "torchvision:resnet18", classes * ipc
    for flag, value, minimum in (("--classes", classes, 2), ("--ipc", ipc, 1), ("--label-epochs", epochs, 1)):
        if value < minimum:
            raise CondenseError(f"{flag} {value}: must be at least {minimum}")
    kinds = _label_kinds(classes, images, epochs, [network], IMAGE_SHAPE)
    if as_json:
        views = {"classes": classes, "images": images, "epochs": epochs, "teachers": [network]}
        print(json.dumps({"views": views, "labels": _rows(kinds)}, indent=1))
        return
    print(f"{classes} classes, ipc {ipc}; teacher: {network} on images {by(IMAGE_SHAPE)}")
    _print_kinds(kinds, images, epochs)


def _label_kinds(
    classes: int, images: int, epochs: int, teachers: list[str], shape: tuple[int, int, int]
) -> list[LabelComparison]:
    """Bytes of every kind of labels."""
    from condense.lighten import int8_bytes, label_bytes, projector_bytes

    weights = int8_bytes(teachers, shape, classes) if teachers else None
    projector = projector_bytes(shape, range(classes)) if shape[0] in (1, 3) else None
    return label_bytes(classes, images, epochs, teacher_bytes=weights, projector_bytes=projector)


def _rows(kinds: list[LabelComparison]) -> list[dict[str, Any]]:
    keys = {"labels": "words", "kind": "kind", "bytes": "bytes", "external": "external", "exactness": "exactness"}
    return [{name: getattr(kind, key) for name, key in keys.items()} for kind in kinds]


def _print_kinds(kinds: list[LabelComparison], images: int, epochs: int) -> None:
    from condense.lighten import format_comparison

    print(f"  labels of {images} images, {epochs} epochs of views, by kind:")
    print(textwrap.indent(format_comparison(kinds, "per-view"), "    "))
