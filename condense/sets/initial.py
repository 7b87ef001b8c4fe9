"""Initial images of a synthetic set: random real images, noise, selected real images or collages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import rng
from condense.config import require_one_of, require_range
from condense.data import Task
from condense.errors import CondenseError
from condense.formatting import by
from condense.selection import (
    CosineKernel,
    facility_location,
    graph_cut,
    herding,
    k_center,
    moderate,
    nearest_to_centroids,
)
from condense.sets.distilled import DistilledSet
from condense.sets.stages import Formation

SELECTORS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "kmeans": nearest_to_centroids,
    "herding": lambda points, count, key: herding(points, count),
    "kcenter": lambda points, count, key: k_center(points, count, key % len(points)),
    "graphcut": lambda points, count, key: graph_cut(CosineKernel(points), count),
    "facility": lambda points, count, key: facility_location(CosineKernel(points), count),
    "moderate": lambda points, count, key: moderate(points, count),
}
"""Values of ``init`` that select real images of a class: rows of its pixels (N, D), from a number of rows and a key."""

INITS: tuple[str, ...] = ("real", "noise", *SELECTORS, "collage")


@dataclass(frozen=True)
class SyntheticOptions:
    """Settings of the synthetic set that every method shares."""

    init: str = "real"
    """Initial images: real (random real images), noise (N(0,1); N(1/2,1/16) for methods that learn pixels in [0,1]),
    kmeans (the real image nearest to each of ipc centroids of its class), herding, kcenter, graphcut, facility or
    moderate (selected among the pixels of each class, as the methods of these names select among features), collage
    (factor x factor shrunken real images per image; like real if factor is 1), or the file of a distilled set with as
    many images of the same classes, e.g. a selection by features."""
    factor: int = 1
    """Multi-formation: each stored image is decoded into factor x factor training images, also when the set is used."""
    fyi: bool = False
    """Distil the union of the set and its mirror images (FYI); needs data whose classes survive mirroring."""

    inits: ClassVar[tuple[str, ...]] = INITS
    """Values of ``init``; a method with its own initial images adds a value and makes the images itself."""
    dry_run_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings that ``condense plan`` replaces, so that its few steps cost as much as those of a whole run."""

    def __post_init__(self) -> None:
        if not self.starts_from_file():
            require_one_of(self, init=self.inits)
        require_range(self, factor=(1, math.inf))

    def starts_from_file(self) -> bool:
        """Whether ``init`` is the file of a distilled set."""
        return self.init.endswith(".h5")


def initial_images(task: Task, ipc: int, options: SyntheticOptions, seed: int) -> tuple[Tensor, Tensor]:
    """Returns initial images (classes * ipc, C,H,W) on the CPU and their classes.

    The images are in pixel space [0,1], except ``noise``, which is N(0,1).
    """
    classes = torch.arange(task.num_classes).repeat_interleave(ipc)
    if options.starts_from_file():
        return _images_of_file(task, ipc, options), classes
    shape = (len(classes), *task.shape)
    if options.init == "noise":
        return torch.randn(shape, generator=rng.generator(seed, "init", "noise")), classes
    if options.init == "real" or (options.init == "collage" and options.factor == 1):
        return task.pixels(_sample_per_class(task, ipc, seed)), classes
    if options.init == "collage":
        return _collages(task, ipc, options.factor, seed), classes
    ids = torch.cat([_selected(task, c, ipc, options.init, seed) for c in range(task.num_classes)])
    return task.pixels(ids), classes


def _images_of_file(task: Task, ipc: int, options: SyntheticOptions) -> Tensor:
    """Returns the stored images of a distilled set in pixel space, class by class.

    Raises:
        CondenseError: no such file, or a set of other classes, image shape, number of images or ``factor``.
    """
    distilled = DistilledSet.load(options.init).with_data(task)
    factor = next((stage.factor for stage in distilled.stages if isinstance(stage, Formation)), 1)
    for what, stored, expected in (
        ("classes", len(distilled.classes), task.num_classes),
        ("image shape", by(distilled.shape), by(task.shape)),
        ("images per class", distilled.manifest["ipc"], ipc),
        ("factor", factor, options.factor),
    ):
        if stored != expected:
            raise CondenseError(f"init={options.init}: the set has another {what} ({stored}, not {expected})")
    if distilled.classes != task.classes:
        raise CondenseError(f"init={options.init}: the set has other classes than {task.name}, or in another order")
    counts = torch.bincount(distilled.hard_labels(), minlength=task.num_classes)
    if distilled.compensated or counts.tolist() != [ipc] * task.num_classes:
        raise CondenseError(f"init={options.init}: the set has not {ipc} stored images of every class")
    return distilled.pictures()[0][distilled.hard_labels().argsort(stable=True)]


def _sample_per_class(task: Task, count: int, seed: int) -> Tensor:
    """Draws ``count`` training images of each class, class by class; repeats images only if a class has too few."""
    ids = []
    for c in range(task.num_classes):
        members = torch.from_numpy(task.class_ids(c))
        order = rng.Draws(seed, "init", "real", c).permutation(len(members))
        ids.append(members[order[torch.arange(count) % len(members)]])
    return torch.cat(ids)


def _collages(task: Task, ipc: int, factor: int, seed: int) -> Tensor:
    """Initial images of IDC: factor x factor real images of the class, shrunk by nearest neighbour, in each image."""
    height, width = task.shape[1:]
    h, w = -(-height // factor), -(-width // factor)
    small = F.interpolate(task.pixels(_sample_per_class(task, ipc * factor * factor, seed)), size=(h, w))
    grid = small.view(-1, factor, factor, task.shape[0], h, w).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, task.shape[0], factor * h, factor * w)[..., :height, :width].contiguous()


def _selected(task: Task, c: int, ipc: int, init: str, seed: int) -> Tensor:
    """Returns the ids of the ``ipc`` training images of class ``c`` that a selector chooses in pixel space."""
    members = torch.from_numpy(task.class_ids(c))
    points = task.pixels(members).flatten(1)
    return members[SELECTORS[init](points, ipc, rng.key(seed, "init", init, c))]
