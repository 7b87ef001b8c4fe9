"""Decode stages: maps from the stored images of a set to the images that students train on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.device import free_host_memory, upload
from condense.errors import CondenseError
from condense.formatting import by, size


@dataclass(frozen=True)
class Formation:
    """Multi-formation (IDC): each stored image consists of factor x factor tiles, each upsampled to a full image.

    The image is cut into tiles (right and bottom edges are padded with ``pad`` if the size is not divisible) and every
    tile is upsampled to the full size, bilinear with align_corners=False. Order: tile (0, 0) of all images, then
    (0, 1), and so on.
    """

    factor: int
    pad: float = 0.0
    at_load: bool = dataclasses.field(default=True, init=False)

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        f, (height, width) = self.factor, images.shape[-2:]
        images = F.pad(images, (0, -width % f, 0, -height % f), value=self.pad)
        h, w = images.shape[-2] // f, images.shape[-1] // f
        tiles = [images[..., r * h : (r + 1) * h, c * w : (c + 1) * w] for r in range(f) for c in range(f)]
        return _enlarge(torch.cat(tiles), height, width), ids.repeat(f * f)

    def describe(self) -> dict[str, Any]:
        return {"stage": "formation", "factor": self.factor, "pad": self.pad}


def _enlarge(images: Tensor, height: int, width: int) -> Tensor:
    """Resizes images (N,C,h,w) bilinearly to (N,C,height,width).

    On CUDA by matrix products, whose adjoint adds in a fixed order; that of torch adds atomically.
    """
    if not images.is_cuda:
        return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
    rows, columns = (
        _enlarging_matrix(size, into, images.device).to(images.dtype)
        for size, into in zip(images.shape[2:], (height, width))
    )
    with torch.autocast("cuda", enabled=False):
        return rows @ (images @ columns.T)


@functools.lru_cache(maxsize=16)
def _enlarging_matrix(size: int, into: int, device: torch.device) -> Tensor:
    """The matrix (into, size) that resizes ``size`` pixels to ``into``: torch's own results for unit vectors."""
    units = torch.eye(size)[:, None]
    return upload(F.interpolate(units, size=into, mode="linear", align_corners=False)[:, 0].T.contiguous(), device)


@dataclass(frozen=True)
class FlipUnion:
    """FYI: the set and its mirror images, originals first. Applied only while distilling; flips are not stored."""

    at_load: bool = dataclasses.field(default=False, init=False)

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([images, images.flip(-1)]), ids.repeat(2)

    def describe(self) -> dict[str, Any]:
        return {"stage": "flip-union"}


@dataclass(frozen=True)
class Compensated:
    """INFER: the set stores ``indices`` real images of each class, then compensators that all classes share.

    Compensator m of index k, stored after the real images as row k * ``teachers`` + m, is encoded as (u + 1) / 2, so
    that 8 bits suffice. Decoded images, in pixel space and sorted by class: real image k of every class, and that image
    plus u, clamped to [0,1], for each m. They have their own labels, so ids are indices of decoded images.
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
        """Encodes compensators in pixel space for storage; values beyond -1 and 1 would have no effect."""
        return (added.clamp(-1, 1) + 1) / 2

    @property
    def stored(self) -> int:
        """Number of stored rows."""
        return self.indices * (self.classes + self.teachers)

    @property
    def decoded(self) -> int:
        """Number of decoded images per class."""
        return self.indices * (self.teachers + 1)

    def describe(self) -> dict[str, Any]:
        return {"stage": "compensated", "classes": self.classes, "indices": self.indices, "teachers": self.teachers}


Stage = Formation | FlipUnion | Compensated


def stages_from(description: Sequence[dict[str, Any]]) -> list[Stage]:
    """Returns the decode stages that a manifest describes.

    Raises:
        CondenseError: An unknown stage.
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


def check_stages(stages: Sequence[Stage], shape: Sequence[int]) -> None:
    """Checks what the decode stages of an untrusted file ask for.

    Args:
        stages: The stages.
        shape: (N,C,H,W) of the stored images.

    Raises:
        CondenseError: Stages that no set has, or decoded images that exceed a quarter of the free memory.
    """
    count, channels, height, width = shape
    if len({type(stage) for stage in stages}) < len(stages):
        raise CondenseError(f"its {len(stages)} decode stages repeat a stage; no set has these")
    for stage in stages:
        if isinstance(stage, Formation):
            if stage.factor > min(height, width):
                raise CondenseError(f"its decode stage has the factor {stage.factor}, but images {by(shape[1:])}")
            count *= stage.factor**2
        elif isinstance(stage, FlipUnion):
            count *= 2
        else:
            count = stage.decoded * stage.classes
    nbytes, free = 4 * count * channels * height * width, free_host_memory()
    if free and nbytes > free // 4:
        raise CondenseError(f"decodes into {count} images of {size(nbytes)}; {size(free)} of memory are free")


def decode(images: Tensor, stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """Applies ``stages`` to stored images (N,C,H,W); returns decoded images (M,C,H,W) and their stored indices (M,)."""
    ids = torch.arange(len(images), device=images.device)
    for stage in stages:
        images, ids = stage(images, ids)
    return images, ids
