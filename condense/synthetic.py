"""The learnable set: pixels behind decode stages, labels, and the ways to initialise them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import rng
from condense.config import one_of, require
from condense.errors import CondenseError
from condense.labels import HardLabels, Labels, SoftLabels
from condense.tasks import Task

INITS: tuple[str, ...] = ("real", "noise", "kmeans", "collage")
Space = Literal["training", "pixel"]


@dataclass(frozen=True)
class Formation:
    """Multi-formation (IDC): each stored image holds factor x factor tiles, each upsampled to a full image.

    The image is cut into tiles (right and bottom edges padded with ``pad`` where the size does not divide) and every
    tile is enlarged to the full size, bilinear with align_corners=False. Order: tile (0, 0) of all images,
    then (0, 1), and so on.
    """

    factor: int
    pad: float = 0.0
    at_load: bool = dataclasses.field(default=True, init=False)

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        f, (height, width) = self.factor, images.shape[-2:]
        images = F.pad(images, (0, -width % f, 0, -height % f), value=self.pad)
        h, w = images.shape[-2] // f, images.shape[-1] // f
        tiles = [images[..., r * h : (r + 1) * h, c * w : (c + 1) * w] for r in range(f) for c in range(f)]
        decoded = F.interpolate(torch.cat(tiles), size=(height, width), mode="bilinear", align_corners=False)
        return decoded, ids.repeat(f * f)

    def describe(self) -> dict[str, Any]:
        return {"stage": "formation", "factor": self.factor, "pad": self.pad}


@dataclass(frozen=True)
class FlipUnion:
    """FYI: the set and its mirror images, originals first. Acts while distilling only; flips are not stored."""

    at_load: bool = dataclasses.field(default=False, init=False)

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([images, images.flip(-1)]), ids.repeat(2)

    def describe(self) -> dict[str, Any]:
        return {"stage": "flip-union"}


@dataclass(frozen=True)
class Compensated:
    """INFER: stored are ``indices`` real images of each class, then compensators that all classes share.

    Compensator m of index k, stored after the real images as row k * ``teachers`` + m, is kept as (u + 1) / 2, so that
    8 bits hold it. In pixel space: real image k of every class, and that image plus u, clamped to [0,1], for each m.
    What comes out is sorted by class; it has labels of its own, so ids count what comes out.
    """

    classes: int
    indices: int
    teachers: int
    at_load: bool = dataclasses.field(default=True, init=False)

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        real = images[: self.classes * self.indices].unflatten(0, (self.classes, self.indices, 1))
        added = images[self.classes * self.indices :].unflatten(0, (self.indices, self.teachers)) * 2 - 1
        decoded = torch.cat([real, (real + added).clamp(0, 1)], 2).flatten(0, 2)
        return decoded, torch.arange(len(decoded), device=ids.device)

    @staticmethod
    def encode(added: Tensor) -> Tensor:
        """Compensators in pixel space, as they are stored; beyond -1 and 1 they would have no effect."""
        return (added.clamp(-1, 1) + 1) / 2

    @property
    def stored(self) -> int:
        """Stored rows."""
        return self.indices * (self.classes + self.teachers)

    @property
    def decoded(self) -> int:
        """Images that come out, of each class."""
        return self.indices * (self.teachers + 1)

    def describe(self) -> dict[str, Any]:
        return {
            "stage": "compensated", "classes": self.classes, "indices": self.indices, "teachers": self.teachers
        }  # fmt: skip


Stage = Formation | FlipUnion | Compensated


def stages_from(description: Sequence[dict[str, Any]]) -> list[Stage]:
    """The decode stages that a manifest describes.

    Raises:
        CondenseError: a stage that this version does not know.
    """
    stages: list[Stage] = []
    for entry in description:
        if entry.get("stage") == "formation":
            stages.append(Formation(int(entry["factor"]), float(entry.get("pad", 0.0))))
        elif entry.get("stage") == "flip-union":
            stages.append(FlipUnion())
        elif entry.get("stage") == "compensated":
            stages.append(Compensated(*(int(entry[key]) for key in ("classes", "indices", "teachers"))))
        else:
            raise CondenseError(
                f"the set uses the decode stage {entry.get('stage')!r}, which this version does not know"
            )
    return stages


def decode(images: Tensor, stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """Stored images (N,C,H,W) through ``stages``: decoded images (M,C,H,W) and the stored index (M,) of each."""
    ids = torch.arange(len(images), device=images.device)
    for stage in stages:
        images, ids = stage(images, ids)
    return images, ids


@dataclass(frozen=True)
class SyntheticOptions:
    """Settings of the synthetic set that every method shares."""

    init: str = "real"
    """How images start: real (random real images), noise (N(0,1); N(1/2,1/16) where pixels in [0,1] are learned),
    kmeans (the real image nearest to each of ipc centroids of its class), collage (factor x factor shrunken real images
    in each; real where factor is 1)."""
    factor: int = 1
    """Multi-formation: each stored image is decoded into factor x factor training images, also when the set is used."""
    fyi: bool = False
    """Distil the union of the set and its mirror images (FYI); needs data whose classes survive mirroring."""

    inits: ClassVar[tuple[str, ...]] = INITS
    """What ``init`` may be; a method with a start of its own adds its word and finds the images itself."""

    def __post_init__(self) -> None:
        one_of(self, init=self.inits)
        require(self, factor=(1, math.inf))


class SyntheticSet:
    """Images, labels and decode stages while they are being made.

    Attributes:
        tensors: the leaves that may be learned; ``tensors["images"]`` is (N,C,H,W), sorted by class. The methods
            below add ``labels`` and ``step_size``.
        classes: int64 (N,), the class of each stored image.
        labels: the label provider that the finished set will carry.
        space: ``training`` (pixels after the task's transform, unclamped) or ``pixel`` ([0,1], or uint8 for
            selections).
        stages: the decode stages, in order.
        label_source: what soft labels came from, for the manifest.
    """

    def __init__(
        self,
        task: Task,
        images: Tensor,
        classes: Tensor,
        *,
        space: Space = "training",
        stages: Sequence[Stage] = (),
        labels: Labels | None = None,
    ) -> None:
        device = images.device
        self.task, self.space, self.stages = task, space, list(stages)
        self.classes = classes.to(device)
        self.labels = labels or HardLabels(self.classes, task.num_classes)
        self.tensors = {"images": images.requires_grad_(images.is_floating_point())}
        self.label_source: dict[str, Any] = {}
        self._rows = [(self.classes == c).nonzero().squeeze(1) for c in range(task.num_classes)]

    @property
    def images(self) -> Tensor:
        """The stored images (N,C,H,W)."""
        return self.tensors["images"]

    def learn_step_size(self, start: float) -> None:
        """Makes the learning rate of students part of the set; it travels with it and serves its evaluation."""
        self.tensors["step_size"] = torch.tensor(start, device=self.images.device).requires_grad_()

    @property
    def step_size(self) -> Tensor | None:
        """The learned rate as it is now, without a graph; None where it is not learned."""
        leaf = self.tensors.get("step_size")
        return None if leaf is None else leaf.detach()

    def learn_labels(self, logits: Tensor) -> None:
        """Makes soft labels, logits (N, classes), part of what is learned."""
        self.tensors["labels"] = logits.detach().clone().requires_grad_()
        self.labels = SoftLabels(self.tensors["labels"])

    @classmethod
    def create(
        cls,
        task: Task,
        ipc: int,
        options: SyntheticOptions,
        *,
        seed: int,
        device: torch.device,
        space: Space = "training",
        ids: Tensor | None = None,
    ) -> SyntheticSet:
        """A set of ``ipc`` images per class, initialised and decoded as ``options`` say.

        ``ids``: the real training images (classes * ipc,) to start from instead, class by class.
        """
        stages: list[Stage] = []
        if options.factor > min(task.shape[1:]):
            raise CondenseError(
                f"factor={options.factor}: images of {task.name} have only {min(task.shape[1:])} pixels"
            )
        if options.factor > 1:
            stages.append(Formation(options.factor, 0.5 if space == "pixel" else 0.0))
        if options.fyi:
            if not task.mirror:
                raise CondenseError(
                    f"fyi=true: a mirror image of '{task.name}' may belong to another class; leave fyi off"
                )
            stages.append(FlipUnion())
        if ids is None:
            images, classes = initial_images(task, ipc, options, seed)
        else:
            images, classes = task.pixels(ids), torch.from_numpy(task.train.labels[ids.numpy()])
        if space == "pixel" and options.init == "noise":
            images = (images / 4 + 0.5).clamp(0, 1)
        images = images.to(device)
        if space == "training" and options.init != "noise":
            images = task.transform.to(device)(images)
        return cls(task, images.float().contiguous(), classes, space=space, stages=stages)

    @classmethod
    def select(cls, task: Task, ids: Tensor) -> SyntheticSet:
        """Real training images kept exactly as they are (uint8 where the data is), sorted by class."""
        classes = torch.as_tensor(task.train.labels[ids.numpy()])
        order = torch.argsort(classes, stable=True)
        return cls(task, torch.as_tensor(task.raw(ids[order])), classes[order], space="pixel")

    def decode(self, classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The training images that the set stands for while distilling, with gradients to the stored tensors.

        Args:
            classes: only these classes, in this order; all of them when None.

        Returns:
            images (M,C,H,W) in training space and their classes, int64 (M,).
        """
        rows = None if classes is None else torch.cat([self._rows[c] for c in classes])
        stored = self.images if rows is None else self.images[rows]
        images, ids = decode(stored, self.stages)
        if self.space == "pixel":
            images = self.task.transform.to(images.device)(images)
        return images, (self.classes if rows is None else self.classes[rows])[ids]

    def decode_some(self, classes: Sequence[int], most: int, parts: tuple[int | str, ...]) -> tuple[Tensor, Tensor]:
        """As :meth:`decode`, but of a class with more than ``most`` images so many, drawn by ``(*parts, class)``."""
        images, labels = self.decode(classes)
        if len(images) <= most * len(classes) and len({len(self._rows[c]) for c in classes}) == 1:
            return images, labels
        picked = []
        for c in classes:
            rows = (labels == c).nonzero().squeeze(1)
            picked.append(rows[rng.Draws(*parts, c).sample(len(rows), most).to(rows.device)])
        rows = torch.cat(picked)
        return images[rows], labels[rows]


def initial_images(task: Task, ipc: int, options: SyntheticOptions, seed: int) -> tuple[Tensor, Tensor]:
    """Starting images (classes * ipc, C,H,W) on the CPU and their classes.

    Pixel space [0,1], except ``noise``, which is N(0,1).
    """
    classes = torch.arange(task.num_classes).repeat_interleave(ipc)
    shape = (len(classes), *task.shape)
    if options.init == "noise":
        return torch.randn(shape, generator=rng.generator(seed, "init", "noise")), classes
    if options.init == "real" or (options.init == "collage" and options.factor == 1):
        return task.pixels(_sample_per_class(task, ipc, seed)), classes
    if options.init == "collage":
        return _collages(task, ipc, options.factor, seed), classes
    return task.pixels(torch.cat([_representatives(task, c, ipc, seed) for c in range(task.num_classes)])), classes


def _sample_per_class(task: Task, count: int, seed: int) -> Tensor:
    """Ids of ``count`` random training images of each class, class by class; repeats only where a class has too few."""
    ids = []
    for c in range(task.num_classes):
        members = torch.from_numpy(task.class_ids(c))
        order = rng.Draws(seed, "init", "real", c).permutation(len(members))
        ids.append(members[order[torch.arange(count) % len(members)]])
    return torch.cat(ids)


def _collages(task: Task, ipc: int, factor: int, seed: int) -> Tensor:
    """IDC's start: every image is factor x factor nearest-neighbour-shrunken real images of its class."""
    height, width = task.shape[1:]
    h, w = -(-height // factor), -(-width // factor)
    small = F.interpolate(task.pixels(_sample_per_class(task, ipc * factor * factor, seed)), size=(h, w))
    grid = small.view(-1, factor, factor, task.shape[0], h, w).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, task.shape[0], factor * h, factor * w)[..., :height, :width].contiguous()


def _representatives(task: Task, c: int, ipc: int, seed: int) -> Tensor:
    """Ids of the training images of class ``c`` nearest to its ``ipc`` k-means centroids in pixel space."""
    members = torch.from_numpy(task.class_ids(c))
    return members[central_rows(task.pixels(members).flatten(1), ipc, rng.key(seed, "init", "kmeans", c))]


def central_rows(points: Tensor, count: int, key: int) -> Tensor:
    """Rows of the float32 ``points`` (N, D) nearest to ``count`` k-means centroids, int64 (count,), without repeats."""
    from sklearn.cluster import KMeans

    points = points.cpu()
    fitted = KMeans(count, n_init=1, random_state=key % 2**31).fit(points.numpy())
    distances = torch.cdist(torch.from_numpy(fitted.cluster_centers_).float(), points)
    chosen: list[int] = []
    for row in distances:
        row[chosen] = torch.inf
        chosen.append(int(row.argmin()))
    return torch.tensor(chosen)
