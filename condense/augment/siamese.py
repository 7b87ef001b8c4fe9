"""Differentiable Siamese augmentation (DSA) with its variants, and CutMix."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment.resample import send_like, shift_images
from condense.device import on_host, upload
from condense.errors import CondenseError, did_you_mean
from condense.rng import Draws

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")

# For each variant, the operations that are always applied before and after the sampled one.
_ALWAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dsa": ((), ()),
    "flip-always": (("flip",), ()),
    "idc": (("flip", "color"), ("cutout",)),
    "dc": ((), ()),
}

VARIANTS = tuple(_ALWAYS)

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5

CROP, CUTOUT, SCALE, DEGREES = 0.125, 0.5, 1.2, 15.0

DC_SCALE, DC_DEGREES = 0.2, 45.0
"""Ranges of the variant dc: sizes from 0.8 to 1.2, angles up to 45 degrees."""


def _share(size: int, ratio: float) -> int:
    """Returns ``ratio`` of ``size`` pixels, rounded half up."""
    return int(size * ratio + 0.5)


@dataclass(frozen=True, eq=False)
class AugmentationParameters:
    """R independent samples of every operation's parameters, one per row, on the CPU; ``parameters[rows]`` selects
    rows."""

    image_size: tuple[int, int]
    """(H, W) of the images."""
    operation: Tensor
    """Sampled operation as an index of ``OPERATIONS``, (R,) int64; -1 if none is sampled."""
    brightness: Tensor
    """Offset of the pixels, (R,) float32 in [-0.5, 0.5)."""
    saturation: Tensor
    """Factor on the difference to the channel mean of each pixel, (R,) float32 in [0, 2)."""
    contrast: Tensor
    """Factor on the difference to the mean of each image, (R,) float32 in [0.5, 1.5)."""
    shift: Tensor
    """Shift (dy, dx) of crop, (R, 2) int64: pixel (y, x) gets the value at (y + dy, x + dx)."""
    centre: Tensor
    """Centre (y, x) of the square of cutout, (R, 2) int64."""
    mirrored: Tensor
    """Whether flip mirrors the image, (R,) bool."""
    zoom: Tensor
    """Scales (sx, sy), (R, 2) float32 in [1/1.2, 1.2), of dc in (1/1.2, 1/0.8]; values below 1 enlarge."""
    angle: Tensor
    """Angle of rotate in degrees, (R,) float32 in [-15, 15), of dc in [-45, 45)."""

    def __len__(self) -> int:
        return len(self.operation)

    def __getitem__(self, rows: Tensor | slice) -> AugmentationParameters:
        selected = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "image_size"}
        return AugmentationParameters(self.image_size, **selected)

    @staticmethod
    def concatenate(parts: Sequence[AugmentationParameters]) -> AugmentationParameters:
        """Returns the rows of all parts, which are for images of one size."""
        names = [f.name for f in fields(AugmentationParameters) if f.name != "image_size"]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return AugmentationParameters(parts[0].image_size, **joined)


@dataclass(frozen=True)
class Augmentation:
    """DSA: operations that are differentiable in the pixels, with parameters that are sampled once and can be reused.

    Created by :func:`dsa`. Images are in training space, so that the zeros with which crop, cutout, scale and rotate
    pad are the mean of the data.

    ``variant`` determines what one row of :meth:`draw` does to an image:

    * ``dsa``: one of ``ops``, sampled uniformly.
    * ``flip-always`` (forks of FYI): flip (with probability 1/2), then one of the others.
    * ``idc`` (IDC, DANCE): flip (with probability 1/2), color, one of crop, scale and rotate, then cutout; each if
      listed.
    * ``dc`` (the evaluation of DC on MNIST): one of ``ops``, sampled for each image also in a training batch, with
      wider ranges of scale and rotate.

    Raises:
        CondenseError: An operation or the variant is unknown, or an operation is listed twice.
    """

    ops: tuple[str, ...]
    variant: str = "dsa"
    align_corners: bool = True
    """Corner convention of torch. It affects only rotate on images that are not square: otherwise both conventions give
    the same map in pixels about the centre, so results on square images do not depend on it."""

    def __post_init__(self) -> None:
        for op in self.ops:
            if op not in OPERATIONS:
                raise CondenseError(f"augment={'_'.join(self.ops)}: unknown '{op}'{did_you_mean(op, OPERATIONS)}")
            if self.ops.count(op) > 1:
                raise CondenseError(f"augmentation '{op}' is listed twice; list it once")
        if self.variant not in VARIANTS:
            raise CondenseError(f"augment_variant={self.variant}: unknown{did_you_mean(self.variant, VARIANTS)}")

    @property
    def stages(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Operations that are applied first, those of which one is sampled, and those that are applied last."""
        first, last = _ALWAYS[self.variant]
        sampled = tuple(op for op in self.ops if op not in first + last)
        return tuple(op for op in first if op in self.ops), sampled, tuple(op for op in last if op in self.ops)

    def draw(
        self, draws: Draws, rows: int, image_size: tuple[int, int], groups: int | None = None
    ) -> AugmentationParameters:
        """Samples parameters for ``rows`` images.

        With one call per new stream, row i depends only on the stream and i (with ``groups``, its operation depends on
        the first row of its block): ranks and chunks sample the rows of all classes and select by label in
        :meth:`apply`.

        Args:
            draws: Random stream.
            rows: Number of rows R.
            image_size: (H, W) of the images.
            groups: Number of equal blocks of rows that share the sampled operation, though not its parameters. None:
                each row has its own (a row per class, for siamese matching); 1: all rows share it (a row per image of a
                training batch, as published); K: one per network of K networks that are trained together.

        Raises:
            ValueError: ``rows`` is not a multiple of ``groups``.
        """
        h, w = image_size
        # One call samples the parameters of all operations row by row, so that a row does not depend on `ops` or
        # `rows`.
        integers = draws.integers(1 << 24, (rows, 12)).cpu()
        unit = integers.to(torch.float32) * 2.0**-24

        def below(column: int, high: int) -> Tensor:
            return (integers[:, column] * high) >> 24

        sampled = self.stages[1]
        if sampled:
            operation = torch.tensor([OPERATIONS.index(op) for op in sampled])[below(0, len(sampled))]
        else:
            operation = torch.full((rows,), -1)
        is_dc = self.variant == "dc"
        if groups is not None and not is_dc:
            if groups < 1 or rows % groups:
                raise ValueError(f"{rows} rows cannot be split into {groups} equal groups")
            operation = operation.reshape(groups, -1)[:, :1].expand(groups, rows // groups).flatten()

        reach = (_share(h, CROP), _share(w, CROP))
        # The centre of an even square is between pixels, so it has one more position.
        positions = [size + 1 - _share(size, CUTOUT) % 2 for size in (h, w)]
        return AugmentationParameters(
            image_size=(h, w),
            operation=operation,
            brightness=(unit[:, 1] - 0.5) * BRIGHTNESS,
            saturation=unit[:, 2] * SATURATION,
            contrast=unit[:, 3] + CONTRAST,
            shift=torch.stack([below(4 + i, 2 * reach[i] + 1) - reach[i] for i in (0, 1)], 1),
            centre=torch.stack([below(6 + i, positions[i]) for i in (0, 1)], 1),
            mirrored=unit[:, 8] < 0.5,
            zoom=1 / (1 + DC_SCALE * (2 * unit[:, 9:11] - 1))
            if is_dc
            else unit[:, 9:11] * (SCALE - 1 / SCALE) + 1 / SCALE,
            angle=(unit[:, 11] - 0.5) * (2 * (DC_DEGREES if is_dc else DEGREES)),
        )

    def apply(self, images: Tensor, parameters: AugmentationParameters, rows: Tensor | None = None) -> Tensor:
        """Augments each image with its row of the parameters; returns the same shape and dtype.

        The result of an image does not depend on the others in the batch. Forward and backward are deterministic on
        every device.

        Args:
            images: (N,C,H,W) of any floating dtype, on any device.
            parameters: Result of :meth:`draw`. Siamese matching applies the same parameters to the real and to the
                synthetic batch, with the labels as rows.
            rows: Row of each image, int64 (N,), on the CPU or made by ``upload_indices``; otherwise the call waits for
                the device. Default: row i for image i.

        Raises:
            ValueError: The rows do not match the images, or the parameters were sampled for another image size.
        """
        if not self.ops or not len(images):
            return images
        selected = parameters if rows is None else parameters[on_host(rows)]
        if len(selected) != len(images):
            raise ValueError(f"{len(images)} images need as many rows, not {len(selected)}")
        size = tuple(images.shape[2:])
        if size != parameters.image_size:
            raise ValueError(f"parameters for images of {parameters.image_size} cannot be applied to images of {size}")
        first, _, last = self.stages
        for op in first:
            images = self._apply_one(op, images, selected)
        images = self._apply_sampled(images, selected)
        for op in last:
            images = self._apply_one(op, images, selected)
        return images

    def _apply_sampled(self, images: Tensor, p: AugmentationParameters) -> Tensor:
        """Applies the sampled operation of each image: images are sorted by operation and each group is augmented at
        once."""
        numbers, counts = torch.unique(p.operation, return_counts=True)
        if len(numbers) == 1:
            return self._apply_one(OPERATIONS[numbers[0]], images, p) if numbers[0] >= 0 else images
        order = torch.argsort(p.operation, stable=True)
        sort, unsort = send_like(order, images), send_like(torch.argsort(order), images)
        groups = _linear(images, lambda x: x[sort], lambda g: g[unsort]).split(counts.tolist())
        pieces = [
            self._apply_one(OPERATIONS[number], group, p[rows])
            for number, group, rows in zip(numbers.tolist(), groups, order.split(counts.tolist()))
        ]
        return _linear(torch.cat(pieces), lambda x: x[unsort], lambda g: g[sort])

    def _apply_one(self, op: str, images: Tensor, p: AugmentationParameters) -> Tensor:
        if op == "color":
            return _color(images, p)
        if op == "crop":
            return _crop(images, p)
        if op == "cutout":
            return _cutout(images, p)
        if op == "flip":
            return _flip(images, p)
        if op == "scale":
            return _zoom(images, p.zoom)
        return _rotate(images, torch.deg2rad(p.angle.double()), self.align_corners)


def make_augmentation(
    strategy: str, variant: str = "dsa", mirror: bool = True, align_corners: bool = True
) -> Augmentation:
    """Creates an augmentation.

    Args:
        strategy: Operations joined by ``_``, e.g. ``color_crop_cutout_flip_scale_rotate``; empty or ``none`` for none.
        variant, align_corners: See :class:`Augmentation`.
        mirror: Whether flip is allowed; False for data whose mirror images belong to another class (digits).
    """
    names = () if strategy.lower() in ("", "none") else tuple(strategy.lower().split("_"))
    return Augmentation(tuple(name for name in names if mirror or name != "flip"), variant, align_corners)


_Map: TypeAlias = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear map with a given adjoint: exact derivatives of every order, without atomic additions in backward."""

    @staticmethod
    def forward(x: Tensor, apply: _Map, adjoint: _Map) -> Tensor:
        return apply(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Map, _Map], output: Tensor) -> None:
        _, *ctx.maps = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        apply, adjoint = ctx.maps
        return _linear(gradient, adjoint, apply), None, None


def _linear(x: Tensor, apply: _Map, adjoint: _Map) -> Tensor:
    return _Linear.apply(x, apply, adjoint)


def _color(images: Tensor, p: AugmentationParameters) -> Tensor:
    """Applies brightness, saturation and contrast in one expression.

    Saturation keeps the channel mean m of each pixel and so the mean M of the image; b, s and c in this order therefore
    map x -> c*s*x + c*(1 - s)*m + (1 - c)*M + b.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    b, s, c = p.brightness.double(), p.saturation.double(), p.contrast.double()
    factors = send_like(torch.stack([c * s, c * (1 - s), 1 - c, b]), images, dtype)
    on_image, on_pixel_mean, on_image_mean, offset = factors[..., None, None, None].unbind()
    pixel_mean = images.mean(1, keepdim=True, dtype=dtype)
    image_mean = pixel_mean.mean((2, 3), keepdim=True)
    rest = pixel_mean * on_pixel_mean + (image_mean * on_image_mean + offset)
    return (images * on_image + rest).to(images.dtype)


def _crop(images: Tensor, p: AugmentationParameters) -> Tensor:
    if bool((p.shift == p.shift[:1]).all()):
        dy, dx = p.shift[0].tolist()
        return F.pad(images, (-dx, dx, -dy, dy))
    shift = send_like(p.shift, images)
    return _linear(images, lambda x: shift_images(x, shift), lambda g: shift_images(g, -shift))


def _cutout(images: Tensor, p: AugmentationParameters) -> Tensor:
    keep = []
    for axis, size in enumerate(p.image_size):
        side = _share(size, CUTOUT)
        distance = torch.arange(size) - (p.centre[:, axis : axis + 1] - side // 2)
        keep.append((distance >= 0) & (distance < side))
    rows, columns = (send_like(k, images) for k in keep)
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _flip(images: Tensor, p: AugmentationParameters) -> Tensor:
    mirrored = int(p.mirrored.sum())
    if mirrored in (0, len(p)):
        return images.flip(3) if mirrored else images
    return torch.where(send_like(p.mirrored, images)[:, None, None, None], images.flip(3), images)


def _zoom(images: Tensor, factors: Tensor) -> Tensor:
    """Resamples bilinearly with zeros outside: output position p, in pixels from the middle, takes input ``factors`` p.

    The map is separable: one matrix (width, width) and one (height, height) for each image.

    Args:
        images: (N,C,H,W).
        factors: (N,2), of x and y.
    """
    n, c, h, w = images.shape
    # Weights in bfloat16 would move positions by part of a pixel.
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    scale = send_like(factors, x, x.dtype)[:, :, None, None]
    with torch.autocast(x.device.type, enabled=False):
        for axis, size in ((0, w), (1, h)):
            positions = _positions(size, x.device, x.dtype)
            weights = (1 - (scale[:, axis] * positions - positions[:, None]).abs()).clamp(min=0)  # (N, input, output)
            x = (x.reshape(n, -1, size) @ weights).reshape(n, c, -1, size).transpose(2, 3)
    return x.to(images.dtype)


def _rotate(images: Tensor, angle: Tensor, align_corners: bool) -> Tensor:
    """Resamples bilinearly with zeros outside, rotated by ``angle`` (N,) in radians, in the coordinates of torch."""
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, -sin, sin, cos], 1).reshape(-1, 2, 2)
    # Rounding to bfloat16, and a matrix product with TF32 or autocast, would move positions by part of a pixel.
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    h, w = x.shape[2:]
    forward = send_like(matrix, x, x.dtype)[:, :, :, None, None]

    def resample(x: Tensor) -> Tensor:
        ys, xs = (_positions(size, x.device, x.dtype) * (2 / _span(size, align_corners)) for size in (h, w))
        grid = forward[:, :, 0] * xs + forward[:, :, 1] * ys[:, None]
        return F.grid_sample(x, grid.movedim(1, 3), align_corners=align_corners)

    # On the CPU torch's own adjoint is deterministic and faster.
    if not x.is_cuda:
        return resample(x).to(images.dtype)
    return _linear(x, resample, lambda g: _resample_adjoint(g, matrix, align_corners)).to(images.dtype)


@functools.lru_cache(maxsize=64)
def _positions(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions along an axis, in pixels from its middle."""
    return (torch.arange(size, dtype=torch.float64) - (size - 1) / 2).to(device, dtype)


def _span(size: int, align_corners: bool) -> int:
    """Returns the number of pixels from -1 to 1."""
    return max(size - 1, 1) if align_corners else size


def _resample_adjoint(gradient: Tensor, matrix: Tensor, align_corners: bool) -> Tensor:
    """Computes the adjoint of bilinear resampling by gathering, because that of torch adds atomically on a GPU, in a
    varying order.

    In pixels from the middle, output p uses input q with weight hat(Ap - q) in x times the same in y, which is 0 unless
    p is in A^-1 q + A^-1 (-1, 1)^2: a window of few pixels, whose size is known on the CPU. All its K pixels are
    gathered at once.
    """
    n, c, h, w = gradient.shape
    aspect = _span(w, align_corners) / _span(h, align_corners)
    forward = matrix * matrix.new_tensor([[1, aspect], [1 / aspect, 1]])
    inverse = torch.linalg.inv(forward)
    reach = inverse.abs().sum(2)
    wide, high = (2 * reach.amax(0)).ceil().int().tolist()

    numbers = torch.cat([forward, inverse, reach[:, :, None]], 2)  # one upload
    a, b, near = send_like(numbers, gradient, gradient.dtype)[..., None, None, None].split([2, 2, 1], 2)
    qy, qx = (_positions(size, gradient.device, gradient.dtype) for size in (h, w))
    qy, top, left = qy[:, None], (h - 1) / 2, (w - 1) / 2
    window = torch.cartesian_prod(torch.arange(high), torch.arange(wide))
    down, right = send_like(window.T[:, :, None, None], gradient, gradient.dtype)  # (K, 1, 1) each
    x = (b[:, 0, 0] * qx + b[:, 0, 1] * qy + left - near[:, 0, 0]).floor() + 1 + right  # (N, K, H, W)
    y = (b[:, 1, 0] * qx + b[:, 1, 1] * qy + top - near[:, 1, 0]).floor() + 1 + down
    px, py = x - left, y - top
    weight = (1 - (a[:, 0, 0] * px + a[:, 0, 1] * py - qx).abs()).clamp(min=0)
    weight = weight * (1 - (a[:, 1, 0] * px + a[:, 1, 1] * py - qy).abs()).clamp(min=0)
    weight = weight * ((x >= 0) & (x < w) & (y >= 0) & (y < h))
    source = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).long().reshape(n, 1, -1).expand(n, c, -1)
    values = gradient.flatten(2).gather(2, source).reshape(n, c, len(window), h, w)
    return (weight[:, None] * values).sum(2)


def cutmix(images: Tensor, draws: Draws) -> tuple[Tensor, Tensor, float]:
    """CutMix (Yun et al., ICCV 2019): replaces the same box of every image by that of its partner.

    The box's share of the area and its centre are uniform; the box is clipped at the border.

    Args:
        images: (N,C,H,W).
        draws: Random stream of box and partners.

    Returns:
        The mixed images; each image's partner, int64 (N,) on the CPU; and the exact share of the area that images keep,
        which is the weight of their own targets.
    """
    height, width = images.shape[-2:]
    area, y, x = draws.uniform(3).double().tolist()
    half = [int(size * math.sqrt(area)) / 2 for size in (height, width)]
    top, bottom = (min(max(int(y * height + sign * half[0]), 0), height) for sign in (-1, 1))
    left, right = (min(max(int(x * width + sign * half[1]), 0), width) for sign in (-1, 1))
    partners = draws.permutation(len(images))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[upload(partners, images.device)][..., top:bottom, left:right]
    return mixed, partners, 1 - (bottom - top) * (right - left) / (height * width)
