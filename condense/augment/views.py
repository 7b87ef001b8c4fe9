"""replayable crops, flips and mixing that labels belong to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from condense.augment.resample import neighbours, shift_images, stretch_axis
from condense.data import working_dtype
from condense.errors import CondenseError, did_you_mean
from condense.rng import Draws

# Views of stored labels -----------------------------------------------------------------------------------------------

ASPECT = (3 / 4, 4 / 3)

TRIES = 10


@dataclass(frozen=True, eq=False)
class Views:
    """R drawn views, one per row: a crop box and a mirror. ``views[rows]`` picks rows."""

    image_size: tuple[int, int]
    """(H, W) that the boxes were drawn for."""
    box: Tensor
    """(R, 4) int64 (top, left, height, width) in pixels, inside the image; a shifted one is as large as the image."""
    mirrored: Tensor
    """(R,) bool."""

    def __len__(self) -> int:
        return len(self.box)

    def __getitem__(self, rows: Tensor | slice) -> Views:
        return Views(self.image_size, self.box[rows], self.mirrored[rows])

    def to(self, device: torch.device) -> Views:
        """The same views on ``device``."""
        return Views(self.image_size, self.box.to(device), self.mirrored.to(device))


@dataclass(frozen=True)
class CropViews:
    """A random crop at full size and a mirror flip: torchvision's RandomResizedCrop with draws that can be replayed.

    The scales are kept as their float32 neighbours print, so that a file gives back exactly what was drawn with.

    Raises:
        CondenseError: the scales are not 0 < min_scale <= max_scale <= 1.
    """

    min_scale: float = 0.08
    """Least share of the image's area."""
    max_scale: float = 1.0
    """Largest share of the image's area."""
    flip: bool = True
    """Mirror half of the views."""

    def __post_init__(self) -> None:
        for name in ("min_scale", "max_scale"):
            object.__setattr__(self, name, single(getattr(self, name)))
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise CondenseError(f"views of scale {self.min_scale} to {self.max_scale}: must be 0 < min <= max <= 1")

    def draw(self, draws: Draws, rows: int, image_size: tuple[int, int]) -> Views:
        """Views for ``rows`` images of ``image_size`` (H, W), on the CPU; row i of a fresh stream depends on i alone.

        The area is uniform, the aspect ratio log-uniform in 3/4..4/3. As in torchvision, the first of ten tries that
        lies inside the image counts, else the largest centred crop of a permitted ratio. A least scale of 1 is the
        whole image, whatever its ratio.
        """
        h, w = image_size
        integers = draws.integers(1 << 24, (rows, 2 * TRIES + 3)).cpu()
        # float64: a last bit that differs between versions of exp cannot show in whole pixels.
        unit = integers[:, : 2 * TRIES].double() * 2.0**-24
        area = h * w * (self.min_scale + unit[:, :TRIES] * (self.max_scale - self.min_scale))
        low, high = (math.log(ratio) for ratio in ASPECT)
        ratio = (low + unit[:, TRIES:] * (high - low)).exp()
        heights, widths = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
        inside = (heights > 0) & (heights <= h) & (widths > 0) & (widths <= w)
        first, found = inside.byte().argmax(1, keepdim=True), inside.any(1)
        centred = min(h, round(w / ASPECT[0])), min(w, round(h * ASPECT[1]))
        height, width = (
            torch.where(found, sizes.gather(1, first)[:, 0], fallback)
            for sizes, fallback in zip((heights, widths), centred)
        )

        def place(column: int, free: Tensor) -> Tensor:
            return torch.where(found, (integers[:, column] * (free + 1)) >> 24, free // 2)

        box = torch.stack([place(-3, h - height), place(-2, w - width), height, width], 1)
        if self.min_scale == 1:
            box = torch.tensor([0, 0, h, w]).repeat(rows, 1)
        return Views((h, w), box, (integers[:, -1] < 1 << 23) & self.flip)

    def apply(self, images: Tensor, views: Views) -> Tensor:
        """``images`` (N,C,H,W), each changed by its row of ``views`` on the same device; same shape and dtype.

        Bilinear without antialiasing, as ``resized_crop(..., antialias=False)`` followed by ``hflip``. Positions are
        exact fractions, so that a box of the whole image changes no bit.

        Raises:
            ValueError: the views do not match the images, or were drawn for another image size.
        """
        size = (images.shape[2], images.shape[3])
        if len(views) != len(images) or size != views.image_size:
            raise ValueError(f"{len(views)} views of {views.image_size} cannot serve {len(images)} images of {size}")
        columns = torch.arange(size[1], device=images.device).expand(len(images), -1)
        columns = torch.where(views.mirrored[:, None], columns.flip(1), columns)
        rows = torch.arange(size[0], device=images.device).expand(len(images), -1)
        top, left, height, width = views.box[:, :, None].unbind(1)
        return stretch_axis(stretch_axis(images, 2, rows, top, height), 3, columns, left, width)


MIXES = ("none", "cutmix", "mixup")

SHARES = 1 << 16
"""Drawn shares are whole multiples of 1 / SHARES, so that a last bit that differs between machines cannot show."""


@dataclass(frozen=True, eq=False)
class MixedViews:
    """An epoch's views of all R images of a set. Without mixing ``partner``, ``share`` and ``patch`` are None."""

    views: Views
    """Crop and mirror of each image, the one that it also enters other images' views with."""
    partner: Tensor | None = None
    """(R,) int64: the image that is mixed in, of the whole set and now and then the image itself."""
    share: Tensor | None = None
    """(R,) float32 in [0, 1]: what an image keeps of itself, for CutMix the exact kept area."""
    patch: Tensor | None = None
    """(R, 4) int64 (top, left, bottom, right): CutMix's box, clipped at the border; None for MixUp."""
    partner_views: Views | None = None
    """Crop and mirror that each image's partner enters with, where it is not the partner's own of ``views``: where rows
    are of different epochs."""

    def to(self, device: torch.device) -> MixedViews:
        """The same views on ``device``."""
        parts = (self.partner, self.share, self.patch, self.partner_views)
        return MixedViews(self.views.to(device), *(x if x is None else x.to(device) for x in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ViewRule:
    """How the views of a relabelled set are drawn: a crop or a shift, a mirror flip, and CutMix or MixUp on top.

    A view of image i in epoch e follows from (seed, e, i), the number of images and their size alone: partners are
    drawn from the whole set, never from a loader's batch, and a partner enters by its own view of that epoch. So labels
    can be stored without their views, and batches may be of any size and order. Scales and ``alpha`` are kept as their
    float32 neighbours print, so that a file gives back exactly what was drawn with.

    Raises:
        CondenseError: a value that cannot be.
    """

    min_scale: float = 0.08
    """Least share of the image's area in a random resized crop."""
    max_scale: float = 1.0
    """Largest share of the image's area."""
    flip: bool = True
    """Mirror half of the views."""
    pad: int = 0
    """Above 0: in place of the crop, a shift by up to ``pad`` pixels each way, zeros moving in (pad-and-crop)."""
    mix: str = "none"
    """``none``, ``cutmix`` (a box of the partner, of 1 - lambda of the area before clipping) or ``mixup`` (lambda of
    the image plus 1 - lambda of the partner)."""
    alpha: float = 1.0
    """lambda ~ Beta(alpha, alpha), for each image; 1 is uniform."""

    def __post_init__(self) -> None:
        crop = CropViews(self.min_scale, self.max_scale, self.flip)
        object.__setattr__(self, "min_scale", crop.min_scale)
        object.__setattr__(self, "max_scale", crop.max_scale)
        object.__setattr__(self, "alpha", single(self.alpha))
        if not 0 <= self.pad <= 255:
            raise CondenseError(f"pad={self.pad}: must be 0 (crops) to 255 pixels")
        if self.mix not in MIXES:
            raise CondenseError(f"mix={self.mix}: unknown{did_you_mean(self.mix, MIXES)}")
        if not 0 < self.alpha < math.inf:
            raise CondenseError(f"alpha={self.alpha:g}: must be above 0 and finite")

    @classmethod
    def of(cls, views: CropViews | ViewRule | None) -> ViewRule:
        """Plain crops as a rule, a rule as it is; None is the default one."""
        if isinstance(views, CropViews):
            return cls(views.min_scale, views.max_scale, views.flip)
        return cls() if views is None else views

    def draw(self, seed: int, epoch: int, rows: int, image_size: tuple[int, int]) -> MixedViews:
        """Views of ``epoch`` for a set of ``rows`` images of ``image_size`` (H, W), on the CPU.

        Crops and mirrors are those that :class:`CropViews` draws from ``Draws(seed, "view", epoch)``, whatever the mix.
        lambda comes from Devroye's formula for symmetric beta variates, exact for every alpha ("Random variate
        generation in one line of code", 1996): 1/2 (1 + s / sqrt(1 + 1 / ((u^(-1/alpha) - 1) cos^2(2 pi v)))) with
        uniform u and v and a random sign s, in float64, rounded to a multiple of 1 / SHARES. CutMix's box has
        floor(sqrt(1 - lambda) size) pixels a side, cut down to an even number, and a centre drawn from all pixels
        (Yun et al., ICCV 2019).
        """
        views = self._placed(Draws(seed, "view", epoch), rows, image_size)
        if self.mix == "none":
            return MixedViews(views)
        bits = Draws(seed, "view-mix", epoch).bits((rows, 6)).cpu()
        partner = ((bits[:, 0] >> 31) * rows) >> 32
        share = _symmetric_beta(self.alpha, *bits[:, 1:4].unbind(1))
        if self.mix == "mixup":
            return MixedViews(views, partner, share.float())
        size = torch.tensor(image_size)
        half = ((1 - share).sqrt()[:, None] * size).long() // 2
        centre = ((bits[:, 4:] >> 31) * size) >> 32
        low, high = (centre - half).clamp(min=0), (centre + half).minimum(size)
        kept = 1 - (high - low).prod(1).double() / (image_size[0] * image_size[1])
        return MixedViews(views, partner, kept.float(), torch.cat([low, high], 1))

    def _placed(self, draws: Draws, rows: int, image_size: tuple[int, int]) -> Views:
        """Crops or shifts, and mirrors."""
        if not self.pad:
            return CropViews(self.min_scale, self.max_scale, self.flip).draw(draws, rows, image_size)
        integers = draws.integers(1 << 24, (rows, 3)).cpu()
        shift = ((integers[:, :2] * (2 * self.pad + 1)) >> 24) - self.pad
        box = torch.cat([shift, torch.tensor(image_size).expand(rows, 2)], 1)
        return Views(image_size, box, (integers[:, 2] < 1 << 23) & self.flip)

    def apply(self, images: Tensor, ids: Tensor, drawn: MixedViews) -> Tensor:
        """The views (B,C,H,W) of images ``ids`` (B,), in their dtype.

        Args:
            images: (N,C,H,W), those of the whole set: partners are among them.
            ids: int64, on the device of the images.
            drawn: of :meth:`draw` for these N images, on the same device.

        Raises:
            ValueError: the views were drawn for another number or size of images.
        """
        size = (images.shape[2], images.shape[3])
        if len(drawn.views) != len(images) or size != drawn.views.image_size:
            raise ValueError(
                f"{len(drawn.views)} views of {drawn.views.image_size} cannot serve {len(images)} images of {size}"
            )
        own = self._shown(images[ids], drawn.views[ids])
        if drawn.partner is None or drawn.share is None:
            return own
        partner = drawn.partner[ids]
        entering = drawn.views[partner] if drawn.partner_views is None else drawn.partner_views[ids]
        partners = self._shown(images[partner], entering)
        if drawn.patch is None:
            share = drawn.share[ids, None, None, None].to(working_dtype(own))
            return (own * share + partners * (1 - share)).to(own.dtype)
        top, left, bottom, right = drawn.patch[ids, :, None].unbind(1)
        rows, columns = (torch.arange(length, device=images.device) for length in size)
        down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        return torch.where(down[:, None, :, None] & across[:, None, None, :], partners, own)

    def _shown(self, images: Tensor, views: Views) -> Tensor:
        """The crops or shifts of images, before mixing."""
        if not self.pad:
            return CropViews(self.min_scale, self.max_scale, self.flip).apply(images, views)
        moved = shift_images(images, views.box[:, :2])
        return torch.where(views.mirrored[:, None, None, None], moved.flip(3), moved)


def _symmetric_beta(alpha: float, *bits: Tensor) -> Tensor:
    """Beta(alpha, alpha) of three tensors of 63 random bits, float64, in multiples of 1 / SHARES."""
    u, v = (((x >> 10) + 1).double() * 2.0**-53 for x in bits[:2])
    sign = (bits[2] & 1) * 2 - 1
    odds = (u ** (-1 / alpha) - 1) * (2 * math.pi * v).cos() ** 2
    return ((1 + sign / (1 + 1 / odds).sqrt()) / 2 * SHARES).round() / SHARES


def single(x: float) -> float:
    """The shortest decimal with the float32 value of ``x``: what can be stored as float32 and read back exactly."""
    return float(str(np.float32(x)))


def resampling(views: Views, shift: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Matrices that crop, enlarge, mirror and roll: a view of x (..., H, W) is ``rows @ x @ columns.mT``.

    Bilinear, like ``CropViews.apply``, then a cyclic roll. Products with small matrices have cheap, deterministic
    transposes, where indexing would add atomically.

    Args:
        views: R of them.
        shift: int64 (R, 2), by how many pixels down and to the right the view is rolled.
        size: of the view; the image's by default.

    Returns:
        rows (R, H', H) and columns (R, W', W), float32.
    """
    top, left, height, width = views.box.unbind(1)
    out = size or views.image_size
    rows = _stretching(views.image_size[0], out[0], top, height, torch.zeros_like(views.mirrored), shift[:, 0])
    return rows, _stretching(views.image_size[1], out[1], left, width, views.mirrored, shift[:, 1])


def _stretching(size: int, out: int, start: Tensor, length: Tensor, mirrored: Tensor, shift: Tensor) -> Tensor:
    """(R, out, size): ``length`` (R,) pixels from ``start`` drawn out to ``out``, mirrored, rolled by ``shift``."""
    places = (torch.arange(out)[None] - shift[:, None]) % out
    places = torch.where(mirrored[:, None], out - 1 - places, places)
    below, above, part = neighbours(places, out, length[:, None])
    share = part.float() / (2 * out)
    matrix = torch.zeros(len(start), out, size)
    matrix.scatter_add_(2, (start[:, None] + below)[..., None], (1 - share)[..., None])
    return matrix.scatter_add_(2, (start[:, None] + above)[..., None], share[..., None])


def seen(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Views (G, B, C, H', W') of images (G, B, C, H, W) by matrices (G, H', H) and (G, W', W), one pair a group."""
    groups, count, channels, height, width = images.shape
    tall = images.reshape(groups, count * channels * height, width) @ columns.mT
    tall = tall.view(groups, count * channels, height, -1)
    return (rows[:, None] @ tall).view(groups, count, channels, rows.shape[1], columns.shape[1])
