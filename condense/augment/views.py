"""Reproducible views of images: crops or shifts, flips and mixing, to which stored labels belong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from condense.augment.resample import bilinear_neighbours, shift_images, stretch_axis
from condense.data import working_dtype
from condense.device import upload
from condense.errors import CondenseError, did_you_mean
from condense.rng import Draws

ASPECT = (3 / 4, 4 / 3)

MAX_TRIES = 10


@dataclass(frozen=True, eq=False)
class ViewBoxes:
    """R sampled views, one per row: a crop box and a flip. ``views[rows]`` selects rows."""

    image_size: tuple[int, int]
    """(H, W) of the images."""
    box: Tensor
    """Box (top, left, height, width) in pixels, (R, 4) int64; inside the image for crops, as large as it for shifts."""
    mirrored: Tensor
    """Whether the view is flipped horizontally, (R,) bool."""
    tiles: Tensor | None = None
    """Order of the columns and of the rows of tiles before the box is cut out, (R, 2, tiles) int64; None if they stay
    where they are."""

    def __len__(self) -> int:
        return len(self.box)

    def __getitem__(self, rows: Tensor | slice) -> ViewBoxes:
        tiles = None if self.tiles is None else self.tiles[rows]
        return ViewBoxes(self.image_size, self.box[rows], self.mirrored[rows], tiles)

    @staticmethod
    def concatenate(parts: Sequence[ViewBoxes]) -> ViewBoxes:
        """Returns the views of all parts, which are for images of one size, without tiles."""
        box, mirrored = (torch.cat([getattr(part, name) for part in parts]) for name in ("box", "mirrored"))
        return ViewBoxes(parts[0].image_size, box, mirrored)

    def to(self, device: torch.device) -> ViewBoxes:
        """Returns the same views on ``device``."""
        tiles = None if self.tiles is None else upload(self.tiles, device)
        return ViewBoxes(self.image_size, upload(self.box, device), upload(self.mirrored, device), tiles)


@dataclass(frozen=True)
class CropViews:
    """A random crop resized to the full size and a horizontal flip: torchvision's RandomResizedCrop, reproducibly.

    The scales are rounded to float32, so that a file stores them exactly.

    Raises:
        CondenseError: The scales are not 0 < min_scale <= max_scale <= 1.
    """

    min_scale: float = 0.08
    """Minimum share of the image's area."""
    max_scale: float = 1.0
    """Maximum share of the image's area."""
    flip: bool = True
    """Whether half of the views are flipped."""

    def __post_init__(self) -> None:
        for name in ("min_scale", "max_scale"):
            object.__setattr__(self, name, float32_decimal(getattr(self, name)))
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise CondenseError(f"views of scale {self.min_scale} to {self.max_scale}: must be 0 < min <= max <= 1")

    def draw(self, draws: Draws, rows: int, image_size: tuple[int, int]) -> ViewBoxes:
        """Samples views for ``rows`` images of ``image_size`` (H, W), on the CPU; row i of a new stream depends only on
        i.

        The area is uniform, the aspect ratio log-uniform in 3/4..4/3. As in torchvision, the first of ten samples that
        fits into the image is used, else the largest centred crop with a permitted ratio. With a minimum scale of 1 the
        crop is the whole image, whatever its ratio.
        """
        h, w = image_size
        integers = draws.integers(1 << 24, (rows, 2 * MAX_TRIES + 3)).cpu()
        # float64, so that different last bits of exp do not change whole pixels.
        unit = integers[:, : 2 * MAX_TRIES].double() * 2.0**-24
        area = h * w * (self.min_scale + unit[:, :MAX_TRIES] * (self.max_scale - self.min_scale))
        low, high = (math.log(ratio) for ratio in ASPECT)
        ratio = (low + unit[:, MAX_TRIES:] * (high - low)).exp()
        heights, widths = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
        inside = (heights > 0) & (heights <= h) & (widths > 0) & (widths <= w)
        first, has_fit = inside.byte().argmax(1, keepdim=True), inside.any(1)
        centred = min(h, round(w / ASPECT[0])), min(w, round(h * ASPECT[1]))
        height, width = (
            torch.where(has_fit, sizes.gather(1, first)[:, 0], fallback)
            for sizes, fallback in zip((heights, widths), centred)
        )

        def offset(column: int, free: Tensor) -> Tensor:
            return torch.where(has_fit, (integers[:, column] * (free + 1)) >> 24, free // 2)

        box = torch.stack([offset(-3, h - height), offset(-2, w - width), height, width], 1)
        if self.min_scale == 1:
            box = torch.tensor([0, 0, h, w]).repeat(rows, 1)
        return ViewBoxes((h, w), box, (integers[:, -1] < 1 << 23) & self.flip)

    def apply(self, images: Tensor, views: ViewBoxes) -> Tensor:
        """Applies its row of ``views`` to each of ``images`` (N,C,H,W) on the same device; returns the same shape and
        dtype.

        Bilinear without antialiasing, like ``resized_crop(..., antialias=False)`` followed by ``hflip``. Positions are
        exact fractions, so that a box of the whole image changes no bit.

        Raises:
            ValueError: The views do not match the images, or were sampled for another image size.
        """
        size = (images.shape[2], images.shape[3])
        if len(views) != len(images) or size != views.image_size:
            raise ValueError(
                f"{len(views)} views of {views.image_size} cannot be applied to {len(images)} images of {size}"
            )
        columns = torch.arange(size[1], device=images.device).expand(len(images), -1)
        columns = torch.where(views.mirrored[:, None], columns.flip(1), columns)
        rows = torch.arange(size[0], device=images.device).expand(len(images), -1)
        top, left, height, width = views.box[:, :, None].unbind(1)
        return stretch_axis(stretch_axis(images, 2, rows, top, height), 3, columns, left, width)


MAX_TILES = 255

MAX_MIX_BATCH = 2**31 - 1

PAD_VALUES = ("mean", "black")
"""Names of the padding of shifts in settings: zeros in training space, or black."""

MIXES = ("none", "cutmix", "mixup")

SHARE_STEPS = 1 << 16
"""Shares are rounded to multiples of 1 / SHARE_STEPS, so that they do not depend on the machine."""


@dataclass(frozen=True, eq=False)
class MixedViews:
    """Views of all R images of a set in one epoch. Without mixing ``partner``, ``share`` and ``patch`` are None."""

    views: ViewBoxes
    """Crop and flip of each image, also used when it is mixed into other images."""
    partner: Tensor | None = None
    """Image that is mixed in, (R,) int64; any image of the set, occasionally the image itself."""
    share: Tensor | None = None
    """Share of the image itself, (R,) float32 in [0, 1]; for CutMix the exact area."""
    patch: Tensor | None = None
    """Box of CutMix (top, left, bottom, right), clipped at the border, (R, 4) int64; None for MixUp."""
    partner_views: ViewBoxes | None = None
    """Crop and flip of each image's partner, if they differ from those in ``views`` because rows belong to different
    epochs."""

    def to(self, device: torch.device) -> MixedViews:
        """Returns the same views on ``device``."""
        partner, share, patch = (x if x is None else upload(x, device) for x in (self.partner, self.share, self.patch))
        partner_views = None if self.partner_views is None else self.partner_views.to(device)
        return MixedViews(self.views.to(device), partner, share, patch, partner_views)


@dataclass(frozen=True)
class ViewRule:
    """Distribution of the views of a relabelled set: a crop or a shift, a horizontal flip, then CutMix or MixUp.

    A view of image i in epoch e depends only on (seed, e, i), the number of images and their size: partners are sampled
    from the whole set or from batches that the rule itself draws, not from a loader's batch, and a partner is mixed in
    with its own view of that epoch. Therefore labels can be stored without their views, and batches may have any size
    and order. Scales, ``alpha`` and ``fill`` are rounded to float32, so that a file stores them exactly.

    Raises:
        CondenseError: An invalid value.
    """

    min_scale: float = 0.08
    """Minimum share of the image's area in a random resized crop."""
    max_scale: float = 1.0
    """Maximum share of the image's area."""
    flip: bool = True
    """Whether half of the views are flipped."""
    pad: int = 0
    """If above 0, a shift by up to ``pad`` pixels in each direction, padded with ``fill``, replaces the crop."""
    mix: str = "none"
    """``none``, ``cutmix`` (a box of the partner with share 1 - lambda of the area before clipping) or ``mixup``
    (lambda times the image plus 1 - lambda times the partner)."""
    alpha: float = 1.0
    """lambda ~ Beta(alpha, alpha) for each image or batch; 1 is uniform."""
    mix_batch: int = 0
    """If above 0, the images of an epoch are mixed in batches of this size: the images of a batch share lambda and the
    box, and their partners are a permutation of the batch. 0: each image has its own, and any partner of the set."""
    fill: tuple[float, ...] = ()
    """Padding of shifts, one value per channel in training space; empty for zeros."""
    tiles: int = 0
    """If above 1, images are collages of tiles x tiles images: first the columns and the rows of tiles are put into a
    random order (RDED)."""

    def __post_init__(self) -> None:
        crop = CropViews(self.min_scale, self.max_scale, self.flip)
        object.__setattr__(self, "min_scale", crop.min_scale)
        object.__setattr__(self, "max_scale", crop.max_scale)
        object.__setattr__(self, "alpha", float32_decimal(self.alpha))
        if not 0 <= self.pad <= 255:
            raise CondenseError(f"pad={self.pad}: must be 0 (crops) to 255 pixels")
        if self.mix not in MIXES:
            raise CondenseError(f"mix={self.mix}: unknown{did_you_mean(self.mix, MIXES)}")
        if not 0 < self.alpha < math.inf:
            raise CondenseError(f"alpha={self.alpha:g}: must be above 0 and finite")
        if self.mix_batch != 0 and not 2 <= self.mix_batch <= MAX_MIX_BATCH:
            raise CondenseError(f"mix_batch={self.mix_batch}: must be 0 (no batches) or 2 to {MAX_MIX_BATCH} images")
        if not all(abs(value) <= torch.finfo(torch.float32).max for value in self.fill):
            raise CondenseError(f"padding of views: {self.fill} must be finite as float32")
        if not 0 <= self.tiles <= MAX_TILES:
            raise CondenseError(f"tiles={self.tiles}: must be 0 (no collages) to {MAX_TILES}")
        object.__setattr__(self, "tiles", self.tiles if self.tiles > 1 else 0)
        object.__setattr__(self, "mix_batch", 0 if self.mix == "none" else self.mix_batch)
        object.__setattr__(self, "fill", tuple(map(float32_decimal, self.fill)) if self.pad else ())

    def __repr__(self) -> str:
        """Omits settings that were added later at their default, because keys of caches contain this text."""
        later = ("mix_batch", "fill", "tiles")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = (f"{name}={value!r}" for name, value in values.items() if value or name not in later)
        return f"ViewRule({', '.join(shown)})"

    @classmethod
    def of(cls, views: CropViews | ViewRule | None) -> ViewRule:
        """Converts crops to a rule; returns a rule unchanged, and the default one for None."""
        if isinstance(views, CropViews):
            return cls(views.min_scale, views.max_scale, views.flip)
        return cls() if views is None else views

    def draw(self, seed: int, epoch: int, rows: int, image_size: tuple[int, int]) -> MixedViews:
        """Samples the views of ``epoch`` for a set of ``rows`` images of ``image_size`` (H, W), on the CPU.

        Crops and flips are those that :class:`CropViews` samples from ``Draws(seed, "view", epoch)``, whatever the mix.
        lambda is computed by Devroye's formula for symmetric beta variates, exact for every alpha ("Random variate
        generation in one line of code", 1996): 1/2 (1 + s / sqrt(1 + 1 / ((u^(-1/alpha) - 1) cos^2(2 pi v)))) with
        uniform u and v and a random sign s, in float64, rounded to a multiple of 1 / SHARE_STEPS. The box of CutMix has
        floor(sqrt(1 - lambda) size) pixels per side, rounded down to an even number, and a uniform centre (Yun et al.,
        ICCV 2019). With ``mix_batch`` all images of a batch have the draws of its first image.
        """
        views = self._draw_boxes(Draws(seed, "view", epoch), rows, image_size)
        if self.tiles:
            order = Draws(seed, "view-tiles", epoch).bits((rows, 2, self.tiles)).argsort(dim=2, stable=True)
            views = dataclasses.replace(views, tiles=order)
        if self.mix == "none":
            return MixedViews(views)
        bits = Draws(seed, "view-mix", epoch).bits((rows, 6)).cpu()
        partner = ((bits[:, 0] >> 31) * rows) >> 32
        if self.mix_batch:
            for batch in self.batches(seed, epoch, rows):
                partner[batch] = batch[bits[batch, 0].argsort(stable=True)]
                bits[batch, 1:] = bits[batch[0], 1:].clone()
        share = _symmetric_beta(self.alpha, *bits[:, 1:4].unbind(1))
        if self.mix == "mixup":
            return MixedViews(views, partner, share.float())
        size = torch.tensor(image_size)
        half = ((1 - share).sqrt()[:, None] * size).long() // 2
        centre = ((bits[:, 4:] >> 31) * size) >> 32
        low, high = (centre - half).clamp(min=0), (centre + half).minimum(size)
        area = 1 - (high - low).prod(1).double() / (image_size[0] * image_size[1])
        return MixedViews(views, partner, area.float(), torch.cat([low, high], 1))

    def check_fit(self, shape: tuple[int, int, int]) -> None:
        """Checks that the rule fits images of ``shape`` (C, H, W).

        Raises:
            CondenseError: ``fill`` has another number of channels, or H or W is no multiple of ``tiles``.
        """
        channels, height, width = shape
        if self.fill and len(self.fill) != channels:
            raise CondenseError(f"views padded with {len(self.fill)} channels do not fit images of {channels}")
        if self.tiles and (height % self.tiles or width % self.tiles):
            raise CondenseError(f"views of {self.tiles}x{self.tiles} tiles do not fit images of {height}x{width}")

    def batches(self, seed: int, epoch: int, rows: int) -> list[Tensor]:
        """Returns the batches of ``rows`` images in which ``epoch`` is mixed, int64 on the CPU: consecutive parts of a
        permutation, of ``mix_batch`` images each but the last. A last image that would have no partner gets one from
        the batch before."""
        batches = list(Draws(seed, "view-batch", epoch).permutation(rows).split(self.mix_batch))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = torch.cat(batches[-2:]).split([self.mix_batch - 1, 2])
        return batches

    def _draw_boxes(self, draws: Draws, rows: int, image_size: tuple[int, int]) -> ViewBoxes:
        """Samples crops or shifts, and flips."""
        if not self.pad:
            return CropViews(self.min_scale, self.max_scale, self.flip).draw(draws, rows, image_size)
        integers = draws.integers(1 << 24, (rows, 3)).cpu()
        shift = ((integers[:, :2] * (2 * self.pad + 1)) >> 24) - self.pad
        box = torch.cat([shift, torch.tensor(image_size).expand(rows, 2)], 1)
        return ViewBoxes(image_size, box, (integers[:, 2] < 1 << 23) & self.flip)

    def apply(self, images: Tensor, ids: Tensor, drawn: MixedViews) -> Tensor:
        """Computes the views (B,C,H,W) of the images ``ids``, in their dtype.

        Args:
            images: All images of the set (N,C,H,W), which include the partners.
            ids: int64 (B,), on the device of the images.
            drawn: Result of :meth:`draw` for these N images, on the same device.

        Raises:
            CondenseError: The rule does not fit such images.
            ValueError: The views were sampled for another number or size of images.
        """
        self.check_fit((images.shape[1], images.shape[2], images.shape[3]))
        size = (images.shape[2], images.shape[3])
        if len(drawn.views) != len(images) or size != drawn.views.image_size:
            raise ValueError(
                f"{len(drawn.views)} views of {drawn.views.image_size} images cannot be applied to "
                f"{len(images)} images of {size}"
            )
        own = self._unmixed(images[ids], drawn.views[ids])
        if drawn.partner is None or drawn.share is None:
            return own
        partner = drawn.partner[ids]
        partner_views = drawn.views[partner] if drawn.partner_views is None else drawn.partner_views[ids]
        partners = self._unmixed(images[partner], partner_views)
        if drawn.patch is None:
            share = drawn.share[ids, None, None, None].to(working_dtype(own))
            return (own * share + partners * (1 - share)).to(own.dtype)
        top, left, bottom, right = drawn.patch[ids, :, None].unbind(1)
        rows, columns = (torch.arange(length, device=images.device) for length in size)
        in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        return torch.where(in_rows[:, None, :, None] & in_columns[:, None, None, :], partners, own)

    def _unmixed(self, images: Tensor, views: ViewBoxes) -> Tensor:
        """Orders tiles, and applies crops or shifts and flips, without mixing."""
        if views.tiles is not None:
            images = _order_tiles(_order_tiles(images, 3, views.tiles[:, 0]), 2, views.tiles[:, 1])
        if not self.pad:
            return CropViews(self.min_scale, self.max_scale, self.flip).apply(images, views)
        moved = shift_images(images, views.box[:, :2], images.new_tensor(self.fill) if self.fill else None)
        return torch.where(views.mirrored[:, None, None, None], moved.flip(3), moved)


def _order_tiles(images: Tensor, axis: int, order: Tensor) -> Tensor:
    """Puts the tiles of each image (N,C,H,W) along ``axis`` into its ``order`` (N, tiles)."""
    size = images.shape[axis] // order.shape[1]
    positions = (order[:, :, None] * size + torch.arange(size, device=order.device)).flatten(1)
    shape = (len(images), 1, -1, 1) if axis == 2 else (len(images), 1, 1, -1)
    return images.gather(axis, positions.view(shape).expand_as(images))


def _symmetric_beta(alpha: float, *bits: Tensor) -> Tensor:
    """Computes Beta(alpha, alpha) from three tensors of 63 random bits, float64, in multiples of 1 / SHARE_STEPS."""
    u, v = (((x >> 10) + 1).double() * 2.0**-53 for x in bits[:2])
    sign = (bits[2] & 1) * 2 - 1
    odds = (u ** (-1 / alpha) - 1) * (2 * math.pi * v).cos() ** 2
    return ((1 + sign / (1 + 1 / odds).sqrt()) / 2 * SHARE_STEPS).round() / SHARE_STEPS


def float32_decimal(x: float) -> float:
    """Returns the shortest decimal with the float32 value of ``x``, which a float32 array stores exactly."""
    return float(str(np.float32(x)))


def resampling_matrices(
    views: ViewBoxes, shift: Tensor, size: tuple[int, int] | None = None, antialias: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns matrices that crop, resize, flip and roll: a view of x (..., H, W) is ``rows @ x @ columns.mT``.

    Bilinear, like ``CropViews.apply``, then a cyclic roll. Products with small matrices have cheap, deterministic
    gradients, while those of indexing add atomically.

    Args:
        views: R views.
        shift: Pixels by which the view is rolled down and to the right, int64 (R, 2).
        size: (H', W') of the view. Default: that of the image.
        antialias: Whether boxes that are larger than the view are averaged, as by ``resize(..., antialias=True)``.

    Returns:
        rows (R, H', H) and columns (R, W', W), float32.
    """
    top, left, height, width = views.box.unbind(1)
    out = size or views.image_size
    upright = torch.zeros_like(views.mirrored)
    rows = _stretching(views.image_size[0], out[0], top, height, upright, shift[:, 0], antialias)
    return rows, _stretching(views.image_size[1], out[1], left, width, views.mirrored, shift[:, 1], antialias)


def _stretching(
    size: int, out: int, start: Tensor, length: Tensor, mirrored: Tensor, shift: Tensor, antialias: bool
) -> Tensor:
    """Returns matrices (R, out, size) that resize ``length`` pixels from ``start`` to ``out``, flip, and roll by
    ``shift``."""
    positions = (torch.arange(out)[None] - shift[:, None]) % out
    positions = torch.where(mirrored[:, None], out - 1 - positions, positions)
    below, above, part = bilinear_neighbours(positions, out, length[:, None])
    share = part.float() / (2 * out)
    matrix = torch.zeros(len(start), out, size)
    matrix.scatter_add_(2, (start[:, None] + below)[..., None], (1 - share)[..., None])
    matrix.scatter_add_(2, (start[:, None] + above)[..., None], share[..., None])
    if antialias and bool((length > out).any()):
        # A triangle as wide as two output pixels, cut off at the edges of the box.
        scale = length.double()[:, None, None] / out
        pixels = torch.arange(size) + 0.5 - start[:, None, None]
        weights = (1 - (pixels - (positions[..., None] + 0.5) * scale).abs() / scale).clamp(min=0)
        weights = weights * ((pixels > 0) & (pixels < length[:, None, None]))
        shrinking = (weights / weights.sum(2, keepdim=True)).float()
        matrix = torch.where((length > out)[:, None, None], shrinking, matrix)
    return matrix


def apply_resampling(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Computes views (G, B, C, H', W') of images (G, B, C, H, W) with matrices (G, H', H) and (G, W', W)."""
    groups, count, channels, height, width = images.shape
    resized = images.reshape(groups, count * channels * height, width) @ columns.mT
    resized = resized.view(groups, count * channels, height, -1)
    return (rows[:, None] @ resized).view(groups, count, channels, rows.shape[1], columns.shape[1])
