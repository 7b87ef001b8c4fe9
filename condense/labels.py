"""Label providers: what a student is asked to predict for each distilled image, and what storing that costs.

A provider answers ``targets(ids)`` for stored images, knows the loss that goes with its targets, writes itself as plain
arrays and counts its bytes. Providers whose targets depend on the augmented view (stored per-view logits; later live
teachers and projectors) set ``per_view = True``: their ``view`` makes the images of an epoch, and their ``targets``
take the epoch as ``view``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import rng
from condense.augment import CropViews, Views, single
from condense.errors import CondenseError
from condense.registry import Registry

if TYPE_CHECKING:
    from condense.distilled import DistilledSet


class Labels(Protocol):
    """What every provider offers."""

    kind: str
    per_view: bool
    """True where the target depends on the augmented view, so that no target exists for an image by itself."""

    def __len__(self) -> int:
        """Number of stored images that have labels."""

    def targets(self, ids: Tensor, view: Any = None, mix: Any = None) -> Tensor:
        """Targets of the stored images ``ids`` (any shape), on their device; ``view`` is the epoch (per view only)."""

    def view(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Images (B,C,H,W) in training space of the stored ``ids`` (B,) as ``epoch`` shows them; only per-view labels
        change them."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch for logits (B, C)."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written below ``/labels`` in the file."""

    def nbytes(self) -> int:
        """Bytes that the labels need, as the benchmark counts them."""

    def external_nbytes(self) -> int:
        """Bytes that training on the labels needs from outside the file, such as a live teacher's weights."""

    def to(self, device: torch.device) -> Labels:
        """The same labels on ``device``."""

    def anew(self, images: Tensor, teacher: nn.Module, seed: int) -> Labels:
        """Labels of this kind and rule that ``teacher`` gives other images (N,C,H,W), in training space, on its
        device."""

    def rule(self) -> str:
        """What decides such labels besides the teacher."""


class HardLabels:
    """One class per image. ``classes`` is the number of classes C, ``labels`` int64 (N,) in 0..C-1."""

    kind = "hard"
    per_view = False

    def __init__(self, labels: Tensor, classes: int) -> None:
        self.labels, self.classes = labels.long(), classes

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self, ids: Tensor, view: Any = None, mix: Any = None) -> Tensor:
        return self.labels[ids]

    def view(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        return images

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"hard": self.labels.cpu().numpy()}

    def nbytes(self) -> int:
        """ceil(log2 C) bits per image: what a packed store needs, however wide the array in the file is."""
        return math.ceil(len(self.labels) * math.ceil(math.log2(self.classes)) / 8)

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> HardLabels:
        return HardLabels(self.labels.to(device), self.classes)

    def anew(self, images: Tensor, teacher: nn.Module, seed: int) -> HardLabels:
        return HardLabels(_answers(teacher, images).argmax(1), self.classes)

    def rule(self) -> str:
        return "likeliest class"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> HardLabels:
        labels = arrays["hard"]
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise CondenseError(f"labels/hard must be int64 of one dimension, not {labels.dtype} {labels.shape}")
        if len(labels) and (labels.min() < 0 or labels.max() >= classes):
            raise CondenseError(f"labels/hard has values outside 0..{classes - 1}")
        return cls(torch.from_numpy(labels), classes)


class SoftLabels:
    """One distribution per image, stored as logits float32 (N, C); the target is their softmax, the loss
    cross-entropy."""

    kind = "soft"
    per_view = False

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __len__(self) -> int:
        return len(self.logits)

    def targets(self, ids: Tensor, view: Any = None, mix: Any = None) -> Tensor:
        return self.logits[ids].softmax(-1)

    def view(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        return images

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"logits": self.logits.detach().float().cpu().numpy()}

    def nbytes(self) -> int:
        return self.logits.numel() * 4

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> SoftLabels:
        return SoftLabels(self.logits.to(device))

    def anew(self, images: Tensor, teacher: nn.Module, seed: int) -> SoftLabels:
        return SoftLabels(_answers(teacher, images))

    def rule(self) -> str:
        return "logits of the image"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> SoftLabels:
        logits = arrays["logits"]
        if logits.dtype != np.float32 or logits.ndim != 2 or logits.shape[1] != classes:
            raise CondenseError(f"labels/logits must be float32 (N, {classes}), not {logits.dtype} {logits.shape}")
        return cls(torch.from_numpy(logits))


class PerViewLabels:
    """A teacher's logits on E stored epochs of views, float16 (E, N, C); epoch e shows the views of epoch e modulo E.

    The view of image i in epoch e follows from (``seed``, e, i) alone, whatever the batches. It is made in training
    space, where the teacher saw it. The target is softmax(logits / T), the loss its KL divergence to the student's
    softmax at T.

    Args:
        logits: (E, N, C) of any floating dtype, stored as float16.
        seed: of the views.
        views: how they are drawn.
        temperature: T of the targets and the loss, kept as its float32 neighbour prints.
        squared: multiply the loss by T^2, so that the size of gradients hardly depends on T.

    Raises:
        CondenseError: the logits are of another shape or not finite as float16, or T is not above 0.
    """

    kind = "per-view"
    per_view = True

    def __init__(
        self,
        logits: Tensor,
        seed: int,
        views: CropViews | None = None,
        temperature: float = 20.0,
        squared: bool = True,
    ) -> None:
        self.logits, self.seed, self.views = logits.half(), seed, views or CropViews()
        self.temperature, self.squared = single(temperature), squared
        if logits.ndim != 3 or not len(logits):
            raise CondenseError(f"per-view logits must be (epochs, images, classes), not {tuple(logits.shape)}")
        if not bool(self.logits.isfinite().all()):
            raise CondenseError("per-view logits are not finite as float16; was the teacher trained?")
        if not 0 < self.temperature < math.inf:
            raise CondenseError(f"temperature={temperature:g}: must be above 0 and finite")

    def __len__(self) -> int:
        return self.logits.shape[1]

    @property
    def epochs(self) -> int:
        """Stored epochs E, after which views and targets repeat."""
        return len(self.logits)

    def targets(self, ids: Tensor, view: Any = None, mix: Any = None) -> Tensor:
        """Distributions at T, float32 (..., C), of the images ``ids`` in epoch ``view``.

        Raises:
            ValueError: no epoch was given.
        """
        if view is None:
            raise ValueError("per-view targets belong to an epoch: give its number as view")
        return (self.logits[view % self.epochs][ids].float() / self.temperature).softmax(-1)

    def view(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        return _shown(images, ids, self.views, self.seed, epoch % self.epochs, len(self))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.kl_div(F.log_softmax(logits / self.temperature, -1), targets, reduction="batchmean")
        return loss * self.temperature**2 if self.squared else loss

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "logits": self.logits.detach().cpu().numpy(),
            "draws": np.array([self.seed, rng.HASH_VERSION], np.int64),
            "scale": np.array([self.views.min_scale, self.views.max_scale], np.float32),
            "temperature": np.array([self.temperature], np.float32),
            "flags": np.array([self.views.flip, self.squared], np.uint8),
        }

    def anew(self, images: Tensor, teacher: nn.Module, seed: int) -> PerViewLabels:
        logits = _view_answers(teacher, images, self.epochs, self.views, seed, self.logits.shape[2])
        return PerViewLabels(logits.to(images.device), seed, self.views, self.temperature, self.squared)

    def rule(self) -> str:
        return f"{self.epochs} epochs of {self.views}, T={self.temperature}, squared={self.squared}"

    def nbytes(self) -> int:
        """2 E N C, and the 30 bytes that the views and the loss follow from."""
        return sum(array.nbytes for array in self.arrays().values())

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> PerViewLabels:
        moved = copy.copy(self)
        moved.logits = self.logits.to(device)
        return moved

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> PerViewLabels:
        for name, kind, shape in (
            ("logits", np.float16, (*arrays["logits"].shape[:2], classes)),
            ("draws", np.int64, (2,)),
            ("scale", np.float32, (2,)),
            ("temperature", np.float32, (1,)),
            ("flags", np.uint8, (2,)),
        ):
            array = arrays[name]
            if array.dtype != kind or array.shape != shape:
                wanted = f"{np.dtype(kind)} {shape if name != 'logits' else f'(epochs, images, {classes})'}"
                raise CondenseError(f"labels/{name} must be {wanted}, not {array.dtype} {array.shape}")
        seed, version = arrays["draws"].tolist()
        if version != rng.HASH_VERSION:
            raise CondenseError(
                f"labels/draws: views of version {version} of the draws, this is {rng.HASH_VERSION}; "
                "use the condense-toolkit that the set was made with"
            )
        low, high = (single(scale) for scale in arrays["scale"])
        if arrays["flags"].max() > 1:
            raise CondenseError("labels/flags must be 0 or 1")
        flip, squared = (bool(flag) for flag in arrays["flags"])
        logits = torch.from_numpy(arrays["logits"])
        return cls(logits, seed, CropViews(low, high, flip), float(arrays["temperature"][0]), squared)


def _shown(images: Tensor, ids: Tensor, views: CropViews, seed: int, epoch: int, rows: int) -> Tensor:
    """The views of stored epoch ``epoch`` of the images ``ids``, of ``rows`` in the set."""
    size = (images.shape[2], images.shape[3])
    return views.apply(images, _drawn(views, seed, epoch, rows, size, images.device)[ids.to(images.device)])


@functools.lru_cache(maxsize=4)
def _drawn(views: CropViews, seed: int, epoch: int, rows: int, size: tuple[int, int], device: torch.device) -> Views:
    """The views of a whole epoch, kept from batch to batch."""
    return views.draw(rng.Draws(seed, "view", epoch), rows, size).to(device)


def content(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def relabel(
    distilled: DistilledSet,
    teacher: nn.Module,
    epochs: int,
    seed: int = 0,
    *,
    views: CropViews | None = None,
    temperature: float = 20.0,
    squared: bool = True,
    batch_size: int = 256,
    description: str | None = None,
    teacher_seconds: float | None = None,
) -> DistilledSet:
    """The same images with a teacher's logits on ``epochs`` stored epochs of augmented views (FKD, SRe2L's relabel).

    Needs 2 * epochs * images * classes bytes. The teacher works in the set's training space, on its own device, and is
    left in eval mode; inside ``torch.autocast`` it works in that precision. The manifest loses the protocol and the
    learned rate of the old labels, and the name ends in ``.relabelled``.

    Args:
        distilled: a set without decode stages.
        teacher: images (B,C,H,W) in training space to logits (B, classes).
        epochs: passes over the set with views of their own; students start again after them.
        seed: of the views.
        views: how they are drawn; when None crops of 8 % to 100 %, mirrored only where the set's classes allow it.
        temperature: T of targets and loss.
        squared: see :class:`PerViewLabels`.
        batch_size: views that the teacher sees at once.
        description: what the manifest calls the teacher; its class when None. A digest of its weights is added.
        teacher_seconds: what training it took; joins the set's cost with the time of labelling. None: the cost of the
            new set is unknown.

    Raises:
        CondenseError: the set has decode stages, epochs are below 1, or the logits do not fit the classes or are not
            finite.
    """
    from condense.distilled import DistilledSet

    if distilled.stages:
        raise CondenseError(f"{distilled.name}: views are labelled by stored image, and this set decodes into more")
    if epochs < 1:
        raise CondenseError(f"epochs={epochs}: must be at least 1")
    began = time.monotonic()
    device = next((parameter.device for parameter in teacher.parameters()), torch.device("cpu"))
    images, classes = distilled.training_images()[0].to(device), len(distilled.classes)
    views = views or CropViews(flip=distilled.manifest.get("mirror", True))
    logits = _view_answers(teacher, images, epochs, views, seed, classes, batch_size)
    labels = PerViewLabels(logits, seed, views, temperature, squared)
    teachers = {"network": description or type(teacher).__name__, "sha256": content(teacher.state_dict())}
    outdated = ("bytes", "checksums", "protocol", "learned_lr", "label_source", "claim", "command")
    kept = {key: value for key, value in distilled.manifest.items() if key not in outdated}
    cost = dict(kept.get("cost", {}))
    if teacher_seconds is None:
        cost.pop("seconds", None)
    elif "seconds" in cost:  # an unknown cost stays unknown
        seconds = teacher_seconds + time.monotonic() - began
        cost["preparation_seconds"] = round(cost.get("preparation_seconds", 0.0) + seconds, 2)
    name = distilled.name + ("-" if "." in distilled.name.rpartition("/")[2] else ".") + "relabelled"
    manifest = {**kept, "name": name, "cost": cost, "teacher": teachers}
    return DistilledSet(distilled.stored, labels, distilled.transform, manifest)


@torch.no_grad()
def _answers(teacher: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Logits float32 (N, classes) of the teacher, put into eval mode."""
    teacher.eval()
    return torch.cat([teacher(part).float() for part in images.split(batch_size)])


def _view_answers(
    teacher: nn.Module, images: Tensor, epochs: int, views: CropViews, seed: int, classes: int, batch_size: int = 256
) -> Tensor:
    """The teacher's logits on all views, float16 (epochs, N, classes) on the CPU."""
    logits = torch.empty(epochs, len(images), classes, dtype=torch.float16)
    for epoch in range(epochs):
        for ids in torch.arange(len(images)).split(batch_size):
            answer = _answers(teacher, _shown(images[ids.to(images.device)], ids, views, seed, epoch, len(images)))
            if answer.shape != (len(ids), classes):
                raise CondenseError(f"the teacher answers {tuple(answer.shape)}, not ({len(ids)}, {classes}) logits")
            logits[epoch, ids] = answer.to("cpu", torch.float16)
    return logits


PROVIDERS: Registry[Any] = Registry("label kind")
PROVIDERS.add("hard", HardLabels)
PROVIDERS.add("soft", SoftLabels)
PROVIDERS.add("per-view", PerViewLabels)
