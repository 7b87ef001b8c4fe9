"""Joins distilled sets of different or equal classes, e.g. of the tasks of class-incremental learning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from condense.data import transform_from_arrays
from condense.errors import CondenseError, did_you_mean
from condense.formatting import by
from condense.labels import HardLabels
from condense.sets.distilled import DistilledSet, check_set
from condense.version import __version__


def join(
    first: DistilledSet, second: DistilledSet, class_map: Mapping[str, str] | None = None, *, name: str = ""
) -> DistilledSet:
    """Returns one set with the images of two.

    Images are decoded and stored in pixel space: as float32, or in the type of the sets if both store decoded pixels in
    the same type. The transform to training space is that of ``first``.

    Args:
        first: a set with hard labels.
        second: a set with hard labels and images of the same shape.
        class_map: name in the joint set for names of classes of ``second``; by default they keep their names. Classes
            with equal names become one class.
        name: of the joint set; by default ``joint/METHOD-ipcN``.

    Returns:
        The set; its classes are those of ``first``, then the new ones of ``second``.

    Raises:
        CondenseError: labels are not hard, shapes differ, the sets are whitened differently, or ``class_map`` names no
            class of ``second``.
    """
    for distilled in (check_set(first), check_set(second)):
        if not distilled.labels.is_hard:
            raise CondenseError(
                f"{distilled.name}: {distilled.labels.kind} labels cannot be joined; convert them with: "
                "condense lighten SET.h5 --labels hard"
            )
    if first.shape != second.shape:
        raise CondenseError(
            f"{second.name}: its images are {by(second.shape)}, those of {first.name} {by(first.shape)}"
        )
    if "zca" in (first.transform.kind, second.transform.kind) and not _equal_transforms(first, second):
        raise CondenseError(f"{second.name}: was whitened in another way than {first.name}")
    class_map = class_map or {}
    for key in class_map:
        if key not in second.classes:
            raise CondenseError(f"class_map: '{key}' is no class of {second.name}{did_you_mean(key, second.classes)}")
    names = [class_map.get(c, c) for c in second.classes]
    classes = tuple(dict.fromkeys([*first.classes, *names]))
    renumbered = torch.tensor([classes.index(c) for c in names])
    targets = torch.cat([_targets(first), renumbered[_targets(second)]])
    stored = _pixels(first, second)
    order = targets.argsort(stable=True)
    counts = torch.bincount(targets, minlength=len(classes))
    manifest: dict[str, Any] = {
        "name": name or f"joint/{first.manifest['method']}-ipc{int(counts.max())}",
        "dataset": f"{first.manifest['dataset']}+{second.manifest['dataset']}",
        "classes": list(classes),
        "ipc": int(counts.max()),
        "space": "pixel",
        "decode": [],
        "distill_decode": [],
        "mirror": bool(first.manifest.get("mirror", True) and second.manifest.get("mirror", True)),
        "method": first.manifest["method"],
        "settings": {},
        "network": first.manifest["network"],
        "protocol": first.manifest.get("protocol", "dc-v1"),
        "data": {"fingerprint": _fingerprint(first, second), "options": _data(first).get("options", {})},
        "code_version": __version__,
        "cost": {},
        "joined": [{"name": part.name, "sha256": part.sha256()} for part in (first, second)],
    }
    transform = transform_from_arrays(first.transform.kind, first.transform.arrays(), first.shape)
    return DistilledSet(stored[order].contiguous(), HardLabels(targets[order], len(classes)), transform, manifest)


def _data(distilled: DistilledSet) -> dict[str, Any]:
    return distilled.manifest.get("data", {})


def _fingerprint(first: DistilledSet, second: DistilledSet) -> str:
    """That of the data of both sets if these are the same; else a digest of both, which no real data have."""
    prints = [str(_data(part).get("fingerprint", "")) for part in (first, second)]
    return prints[0] if prints[0] == prints[1] else hashlib.sha256(" ".join(prints).encode()).hexdigest()


def _targets(distilled: DistilledSet) -> torch.Tensor:
    """Classes (M,) of the decoded images."""
    return distilled.labels.targets(distilled.training_images()[1])


def _pixels(first: DistilledSet, second: DistilledSet) -> torch.Tensor:
    """Decoded images of both in pixel space."""
    parts = (first, second)
    is_plain = all(part.manifest["space"] == "pixel" and not part.stages for part in parts)
    if is_plain and first.stored.dtype == second.stored.dtype:
        return torch.cat([part.stored for part in parts])
    return torch.cat([part.transform.inverse(part.training_images()[0]) for part in parts])


def _equal_transforms(first: DistilledSet, second: DistilledSet) -> bool:
    own, other = first.transform.arrays(), second.transform.arrays()
    return own.keys() == other.keys() and all((own[key] == other[key]).all() for key in own)
