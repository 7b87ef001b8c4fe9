"""finds the teachers a set's labels came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import hdf5
from condense.errors import CondenseError
from condense.sets import DistilledSet


def recorded_teacher(
    distilled: DistilledSet, teachers: str | Path | None, device: torch.device
) -> tuple[nn.Module | None, str]:
    """The mean of the experts or teachers that soft labels came from, or None and why there is none.

    Raises:
        CondenseError: ``teachers`` cannot serve.
    """
    from condense.pretraining import experts, trajectories

    source = distilled.manifest.get("label_source", {})
    known = source.get("experts", {})
    given = teachers is not None and hdf5.format_of(Path(teachers)) != trajectories.FORMAT.name
    if "teachers" in source or (given and not known):
        return _squeezed_teacher(distilled, source, teachers, device)
    asked = {"count": known.get("count"), "epoch": source.get("epoch", -1)}
    if teachers is not None:
        file = trajectories.read(Path(teachers))
        if known and file.content(known["count"], known["epochs"]) != known["content"]:
            raise CondenseError(f"--teachers {teachers}: not the experts that the set's labels came from")
        return experts.teacher(file.path, device, distilled.shape, len(distilled.classes), **asked), ""
    path = experts.find(known)
    if path is None:
        return None, "the experts that its labels came from are not found; give --teachers FILE" if known else ""
    try:
        return experts.teacher(path, device, distilled.shape, len(distilled.classes), **asked), ""
    except CondenseError as fault:
        return None, str(fault)


def _squeezed_teacher(
    distilled: DistilledSet, source: dict[str, Any], teachers: str | Path | None, device: torch.device
) -> tuple[nn.Module | None, str]:
    """The weighted mean of teachers kept whole, or None and why there is none.

    Raises:
        CondenseError: ``teachers`` cannot serve.
    """
    from condense.pretraining import committee

    known = source.get("teachers") or {}
    path = committee.find(known) if teachers is None else Path(teachers)
    if path is None:
        return None, "the teachers that its labels came from are not found; give --teachers FILE"
    try:
        found = committee.teacher(
            path, device, distilled.shape, len(distilled.classes), described=known, weights=source.get("weights"),
            transform=distilled.transform,
        )  # fmt: skip
        return found, ""
    except CondenseError as fault:
        if teachers is not None:
            raise CondenseError(f"--teachers {fault}") from fault
        return None, str(fault)
