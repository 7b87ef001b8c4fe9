"""Maps between pixel space and training space, differentiable augmentation, and the views that stored labels belong to.

The one room that touches kornia.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment.resample import send_like, shift_images
from condense.errors import CondenseError, did_you_mean
from condense.rng import Draws

# Differentiable Siamese augmentation ----------------------------------------------------------------------------------

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")

# Variant -> operations always applied before and after the drawn one.
_ALWAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dsa": ((), ()),
    "flip-always": (("flip",), ()),
    "idc": (("flip", "color"), ("cutout",)),
}

VARIANTS = tuple(_ALWAYS)

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5

CROP, CUTOUT, SCALE, DEGREES = 0.125, 0.5, 1.2, 15.0


def _share(size: int, ratio: float) -> int:
    """``ratio`` of ``size`` pixels, rounded half up."""
    return int(size * ratio + 0.5)


@dataclass(frozen=True, eq=False)
class Parameters:
    """R independent draws of every operation's parameters, one per row, on the CPU. ``parameters[rows]`` picks rows."""

    image_size: tuple[int, int]
    """(H, W) that the pixel offsets were drawn for."""
    operation: Tensor
    """(R,) int64, the drawn one as an index into ``OPERATIONS``; -1 where there is no lottery."""
    brightness: Tensor
    """(R,) float32 in [-0.5, 0.5), added."""
    saturation: Tensor
    """(R,) float32 in [0, 2), factor on the distance from the channel mean of each pixel."""
    contrast: Tensor
    """(R,) float32 in [0.5, 1.5), factor on the distance from the mean of each image."""
    shift: Tensor
    """(R, 2) int64 (dy, dx) of crop: pixel (y, x) becomes what was at (y + dy, x + dx)."""
    centre: Tensor
    """(R, 2) int64 (y, x) of cutout's square."""
    mirrored: Tensor
    """(R,) bool, flip's coin."""
    zoom: Tensor
    """(R, 2) float32 (sx, sy) in [1/1.2, 1.2); below 1 enlarges."""
    angle: Tensor
    """(R,) float32 in [-15, 15) degrees."""

    def __len__(self) -> int:
        return len(self.operation)

    def __getitem__(self, rows: Tensor | slice) -> Parameters:
        picked = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "image_size"}
        return Parameters(self.image_size, **picked)


@dataclass(frozen=True)
class Augmentation:
    """DSA: operations, differentiable in the pixels, whose parameters are drawn once and can be replayed.

    Made by :func:`dsa`. Images are in training space, so that the zeros which crop, cutout, scale and rotate bring in
    are the data's mean.

    ``variant`` says what one row of :meth:`draw` does to an image:

    * ``dsa``: one of ``ops``, drawn uniformly.
    * ``flip-always`` (FYI's forks): flip (its coin decides), then one of the others.
    * ``idc`` (IDC, DANCE): flip (its coin decides), color, one of crop, scale and rotate, then cutout; each if listed.

    Raises:
        CondenseError: an operation or the variant is unknown, or an operation is listed twice.
    """

    ops: tuple[str, ...]
    variant: str = "dsa"
    align_corners: bool = True
    """torch's corner convention. It only tells in rotate on images that are not square: about the centre, a linear map
    is otherwise the same in pixels under both, so numbers published on square images do not depend on it."""

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
        """Operations always applied first, those of which one is drawn, and those always applied last."""
        first, last = _ALWAYS[self.variant]
        lottery = tuple(op for op in self.ops if op not in first + last)
        return tuple(op for op in first if op in self.ops), lottery, tuple(op for op in last if op in self.ops)

    def draw(self, draws: Draws, rows: int, image_size: tuple[int, int], groups: int | None = None) -> Parameters:
        """Parameters for ``rows`` independent uses on images of ``image_size`` (H, W).

        ``groups`` says who shares the drawn operation (never its parameters): None, nobody (a row per class, for
        siamese matching); 1, all rows (a row per image of a training batch, as published); K, each of K equal blocks
        of rows (K networks trained together, a batch each). One call per fresh stream makes row i depend on the stream
        and i alone (given ``groups``, its operation on the first row of its block): ranks and chunks draw the rows of
        all classes and pick by label in :meth:`apply`.

        Raises:
            ValueError: ``rows`` is not a multiple of ``groups``.
        """
        h, w = image_size
        # Every operation's parameters in one call, row by row: a row stays the same when `ops` or `rows` change.
        integers = draws.integers(1 << 24, (rows, 12)).cpu()
        unit = integers.to(torch.float32) * 2.0**-24

        def below(column: int, high: int) -> Tensor:
            return (integers[:, column] * high) >> 24

        lottery = self.stages[1]
        if lottery:
            operation = torch.tensor([OPERATIONS.index(op) for op in lottery])[below(0, len(lottery))]
        else:
            operation = torch.full((rows,), -1)
        if groups is not None:
            if groups < 1 or rows % groups:
                raise ValueError(f"{rows} rows cannot be split into {groups} equal groups")
            operation = operation.reshape(groups, -1)[:, :1].expand(groups, rows // groups).flatten()

        reach = (_share(h, CROP), _share(w, CROP))
        # An even square's centre lies between pixels, so that it has one more place.
        places = [size + 1 - _share(size, CUTOUT) % 2 for size in (h, w)]
        return Parameters(
            image_size=(h, w),
            operation=operation,
            brightness=(unit[:, 1] - 0.5) * BRIGHTNESS,
            saturation=unit[:, 2] * SATURATION,
            contrast=unit[:, 3] + CONTRAST,
            shift=torch.stack([below(4 + i, 2 * reach[i] + 1) - reach[i] for i in (0, 1)], 1),
            centre=torch.stack([below(6 + i, places[i]) for i in (0, 1)], 1),
            mirrored=unit[:, 8] < 0.5,
            zoom=unit[:, 9:11] * (SCALE - 1 / SCALE) + 1 / SCALE,
            angle=(unit[:, 11] - 0.5) * (2 * DEGREES),
        )

    def apply(self, images: Tensor, parameters: Parameters, rows: Tensor | None = None) -> Tensor:
        """``images`` (N,C,H,W) of any floating dtype and device, each changed by its row; same shape and dtype.

        ``rows`` (N,) int64 on the CPU (elsewhere costs a wait for the device) says which row image i uses; None: row
        i. Siamese matching is one :class:`Parameters` applied to the real and to the synthetic batch, the labels being
        the rows. An image's result does not depend on the others in the batch. Forward and backward are deterministic
        on every device.

        Raises:
            ValueError: the rows do not match the images, or the parameters were drawn for another image size.
        """
        if not self.ops or not len(images):
            return images
        picked = parameters if rows is None else parameters[rows.cpu()]
        if len(picked) != len(images):
            raise ValueError(f"{len(images)} images need as many rows, not {len(picked)}")
        size = tuple(images.shape[2:])
        if size != parameters.image_size:
            raise ValueError(f"parameters drawn for {parameters.image_size} cannot serve images of {size}")
        first, _, last = self.stages
        for op in first:
            images = self._one(op, images, picked)
        images = self._drawn(images, picked)
        for op in last:
            images = self._one(op, images, picked)
        return images

    def _drawn(self, images: Tensor, p: Parameters) -> Tensor:
        """The drawn operation of each image: images are ordered by operation, each group is changed at once."""
        numbers, counts = torch.unique(p.operation, return_counts=True)
        if len(numbers) == 1:
            return self._one(OPERATIONS[numbers[0]], images, p) if numbers[0] >= 0 else images
        order = torch.argsort(p.operation, stable=True)
        back = torch.argsort(order)
        there, home = send_like(order, images), send_like(back, images)
        groups = _linear(images, lambda x: x[there], lambda g: g[home]).split(counts.tolist())
        pieces = [
            self._one(OPERATIONS[number], group, p[chosen])
            for number, group, chosen in zip(numbers.tolist(), groups, order.split(counts.tolist()))
        ]
        return _linear(torch.cat(pieces), lambda x: x[home], lambda g: g[there])

    def _one(self, op: str, images: Tensor, p: Parameters) -> Tensor:
        if op == "color":
            return _color(images, p)
        if op == "crop":
            return _crop(images, p)
        if op == "cutout":
            return _cutout(images, p)
        if op == "flip":
            return _flip(images, p)
        zero = torch.zeros(len(p), dtype=torch.float64)
        if op == "scale":
            sx, sy = p.zoom.double().unbind(1)
            matrix = torch.stack([sx, zero, zero, sy], 1)
        else:
            theta = torch.deg2rad(p.angle.double())
            matrix = torch.stack([theta.cos(), -theta.sin(), theta.sin(), theta.cos()], 1)
        return _affine(images, matrix.reshape(-1, 2, 2), self.align_corners)


def dsa(strategy: str, variant: str = "dsa", mirror: bool = True, align_corners: bool = True) -> Augmentation:
    """The augmentation named by ``strategy``, e.g. ``color_crop_cutout_flip_scale_rotate``; empty or ``none`` for none.

    ``mirror=False`` drops flip, for data whose mirror image is another class (digits). See :class:`Augmentation`.
    """
    names = () if strategy.lower() in ("", "none") else tuple(strategy.lower().split("_"))
    return Augmentation(tuple(name for name in names if mirror or name != "flip"), variant, align_corners)


_Map: TypeAlias = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear map with a known adjoint: exact derivatives of every order, without a backward that adds atomically."""

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


def _color(images: Tensor, p: Parameters) -> Tensor:
    """Brightness, saturation, contrast in one expression.

    Saturation keeps the channel mean m of each pixel and so the mean M of the image; b, s and c in turn therefore give
    x -> c*s*x + c*(1 - s)*m + (1 - c)*M + b.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    b, s, c = p.brightness.double(), p.saturation.double(), p.contrast.double()
    factors = send_like(torch.stack([c * s, c * (1 - s), 1 - c, b]), images, dtype)
    on_image, on_pixel_mean, on_image_mean, offset = factors[..., None, None, None].unbind()
    pixel_mean = images.mean(1, keepdim=True, dtype=dtype)
    image_mean = pixel_mean.mean((2, 3), keepdim=True)
    rest = pixel_mean * on_pixel_mean + (image_mean * on_image_mean + offset)
    return (images * on_image + rest).to(images.dtype)


def _crop(images: Tensor, p: Parameters) -> Tensor:
    if bool((p.shift == p.shift[:1]).all()):
        dy, dx = p.shift[0].tolist()
        return F.pad(images, (-dx, dx, -dy, dy))
    shift = send_like(p.shift, images)
    return _linear(images, lambda x: shift_images(x, shift), lambda g: shift_images(g, -shift))


def _cutout(images: Tensor, p: Parameters) -> Tensor:
    keep = []
    for axis, size in enumerate(p.image_size):
        side = _share(size, CUTOUT)
        distance = torch.arange(size) - (p.centre[:, axis : axis + 1] - side // 2)
        keep.append((distance >= 0) & (distance < side))
    rows, columns = (send_like(k, images) for k in keep)
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _flip(images: Tensor, p: Parameters) -> Tensor:
    heads = int(p.mirrored.sum())
    if heads in (0, len(p)):
        return images.flip(3) if heads else images
    return torch.where(send_like(p.mirrored, images)[:, None, None, None], images.flip(3), images)


def _affine(images: Tensor, matrix: Tensor, align_corners: bool) -> Tensor:
    """Bilinear resampling, zeros outside. ``matrix`` (N,2,2) takes output to input positions, as (x, y) in [-1, 1]."""
    # Positions rounded to bfloat16 would be off by part of a pixel; so would a matrix product be (TF32, autocast).
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    h, w = x.shape[2:]
    forth = send_like(matrix, x, x.dtype)[:, :, :, None, None]

    def resample(x: Tensor) -> Tensor:
        ys, xs = (send_like(_centred(size) * 2 / _span(size, align_corners), x, x.dtype) for size in (h, w))
        grid = forth[:, :, 0] * xs + forth[:, :, 1] * ys[:, None]
        return F.grid_sample(x, grid.movedim(1, 3), align_corners=align_corners)

    # On the CPU torch's own adjoint is deterministic and faster.
    if not x.is_cuda:
        return resample(x).to(images.dtype)
    return _linear(x, resample, lambda g: _resample_adjoint(g, matrix, align_corners)).to(images.dtype)


def _centred(size: int) -> Tensor:
    """Positions along an axis, in pixels from its middle."""
    return torch.arange(size, dtype=torch.float64) - (size - 1) / 2


def _span(size: int, align_corners: bool) -> int:
    """Pixels from -1 to 1."""
    return max(size - 1, 1) if align_corners else size


def _resample_adjoint(gradient: Tensor, matrix: Tensor, align_corners: bool) -> Tensor:
    """The adjoint of bilinear resampling, gathered: torch's own adds atomically on a GPU, in an order that varies.

    In pixels from the middle, output p reads input q with weight hat(Ap - q) in x times the same in y, which is 0
    unless p lies in A^-1 q + A^-1 (-1, 1)^2: a window of few pixels, whose size is known on the host.
    """
    n, c, h, w = gradient.shape
    aspect = _span(w, align_corners) / _span(h, align_corners)
    forth = matrix * matrix.new_tensor([[1, aspect], [1 / aspect, 1]])
    back = torch.linalg.inv(forth)
    reach = back.abs().sum(2)
    wide, high = (2 * reach.amax(0)).ceil().int().tolist()

    a, b, near = (send_like(v, gradient, gradient.dtype)[..., None, None] for v in (forth, back, reach))
    qy, qx = (send_like(_centred(size), gradient, gradient.dtype) for size in (h, w))
    qy, top, left = qy[:, None], (h - 1) / 2, (w - 1) / 2
    first_x = (b[:, 0, 0] * qx + b[:, 0, 1] * qy + left - near[:, 0]).floor() + 1
    first_y = (b[:, 1, 0] * qx + b[:, 1, 1] * qy + top - near[:, 1]).floor() + 1
    flat, total = gradient.flatten(2), torch.zeros_like(gradient)
    for down, right in itertools.product(range(high), range(wide)):
        x, y = first_x + right, first_y + down
        px, py = x - left, y - top
        weight = (1 - (a[:, 0, 0] * px + a[:, 0, 1] * py - qx).abs()).clamp(min=0)
        weight = weight * (1 - (a[:, 1, 0] * px + a[:, 1, 1] * py - qy).abs()).clamp(min=0)
        weight = weight * ((x >= 0) & (x < w) & (y >= 0) & (y < h))
        source = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).long().reshape(n, 1, h * w).expand(n, c, h * w)
        total = total + weight[:, None] * flat.gather(2, source).reshape(gradient.shape)
    return total


# CutMix ---------------------------------------------------------------------------------------------------------------


def cutmix(images: Tensor, draws: Draws) -> tuple[Tensor, Tensor, float]:
    """CutMix (Yun et al., ICCV 2019): one box of every image is replaced by that of its partner.

    The box's share of the area is uniform, its centre too; it is clipped at the border.

    Args:
        images: (N,C,H,W).
        draws: the stream that box and partners are drawn from.

    Returns:
        The mixed images, each image's partner, int64 (N,) on the CPU, and the exact share that images keep of
        themselves, the weight of their own targets.
    """
    height, width = images.shape[-2:]
    area, y, x = draws.uniform(3).double().tolist()
    half = [int(size * math.sqrt(area)) / 2 for size in (height, width)]
    top, bottom = (min(max(int(y * height + sign * half[0]), 0), height) for sign in (-1, 1))
    left, right = (min(max(int(x * width + sign * half[1]), 0), width) for sign in (-1, 1))
    partners = draws.permutation(len(images))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[partners.to(images.device)][..., top:bottom, left:right]
    return mixed, partners, 1 - (bottom - top) * (right - left) / (height * width)
