"""Finds the teachers that gave the labels of a set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import hdf5
from condense.errors import CondenseError
from condense.pretraining import (
    TRAJECTORY_FORMAT,
    find_experts,
    find_teachers,
    load_expert_ensemble,
    load_teacher_ensemble,
    read_trajectory_file,
)
from condense.sets import DistilledSet


def find_label_teacher(
    distilled: DistilledSet, teachers: str | Path | None, device: torch.device
) -> tuple[nn.Module | None, str]:
    """Finds the ensemble of experts or teachers that gave the soft labels of a set.

    Args:
        distilled: the set.
        teachers: file of the experts or teachers; by default the one in the manifest, in the cache or where it was.
        device: device of the ensemble.

    Returns:
        The ensemble, or None and the reason.

    Raises:
        CondenseError: ``teachers`` is not the file that gave the labels.
    """
    source = distilled.manifest.get("label_source", {})
    recorded = source.get("experts", {})
    is_teacher_file = teachers is not None and hdf5.read_format(Path(teachers)) != TRAJECTORY_FORMAT.name
    if "teachers" in source or (is_teacher_file and not recorded):
        return _find_saved_teacher(distilled, source, teachers, device)
    members = {"count": recorded.get("count"), "epoch": source.get("epoch", -1)}
    if teachers is not None:
        file = read_trajectory_file(Path(teachers))
        if recorded and file.content_key(recorded["count"], recorded["epochs"]) != recorded["content"]:
            raise CondenseError(f"--teachers {teachers}: not the experts that the set's labels came from")
        return load_expert_ensemble(file.path, device, distilled.shape, len(distilled.classes), **members), ""
    path = find_experts(recorded)
    if path is None:
        return None, "the experts that its labels came from are not found; give --teachers FILE" if recorded else ""
    try:
        return load_expert_ensemble(path, device, distilled.shape, len(distilled.classes), **members), ""
    except CondenseError as fault:
        return None, str(fault)


def _find_saved_teacher(
    distilled: DistilledSet, source: dict[str, Any], teachers: str | Path | None, device: torch.device
) -> tuple[nn.Module | None, str]:
    """Finds the weighted ensemble of saved teachers; see :func:`find_label_teacher`."""
    recorded = source.get("teachers") or {}
    path = find_teachers(recorded) if teachers is None else Path(teachers)
    if path is None:
        return None, "the teachers that its labels came from are not found; give --teachers FILE"
    try:
        ensemble = load_teacher_ensemble(
            path,
            device,
            distilled.shape,
            len(distilled.classes),
            described=recorded,
            weights=source.get("weights"),
            transform=distilled.transform,
        )
        return ensemble, ""
    except CondenseError as fault:
        if teachers is not None:
            raise CondenseError(f"--teachers {fault}") from fault
        return None, str(fault)
