"""Maps between pixel space and training space, differentiable augmentation, and the views that stored labels belong to.

The one room that touches kornia.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from condense.errors import CondenseError, did_you_mean
from condense.rng import Draws


def _working(x: Tensor) -> torch.dtype:
    """The dtype to do arithmetic in: at least float32. Integers are refused, or results would be cut to 0 and 1."""
    if not x.is_floating_point():
        raise TypeError(f"images must be floating point, not {x.dtype}: divide uint8 pixels by 255 first")
    return torch.promote_types(x.dtype, torch.float32)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float32).numpy()


class Standardise:
    """Pixel space [0, 1] -> training space by channel: ``(x - mean) / std``.

    Works on (..., C, H, W) of any floating dtype, keeps the dtype and is differentiable. ``mean`` and ``std`` are (C,),
    held as float32, so that a transform read back from a file is the same to the bit.

    Raises:
        ValueError: mean and std are not two vectors of one length, or a std is not above 0.
    """

    kind: ClassVar[str] = "standardise"

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean = torch.as_tensor(mean).detach().float()
        self.std = torch.as_tensor(std).detach().float()
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape or not bool((self.std > 0).all()):
            raise ValueError("mean and std must be vectors with one entry per channel, std above 0")

    def __call__(self, x: Tensor) -> Tensor:
        """Pixel space -> training space."""
        dtype = _working(x)
        mean, std = (v.to(dtype)[:, None, None] for v in (self.mean, self.std))
        return ((x - mean) / std).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Training space -> pixel space (not clamped)."""
        dtype = _working(x)
        mean, std = (v.to(dtype)[:, None, None] for v in (self.mean, self.std))
        return (x * std + mean).to(x.dtype)

    def arrays(self) -> dict[str, np.ndarray]:
        """``mean`` and ``std``, float32 (C,); what a set stores under ``/transform``."""
        return {"mean": _array(self.mean), "std": _array(self.std)}

    def to(self, device: torch.device | str) -> Standardise:
        """The same transform on ``device``."""
        return Standardise(self.mean.to(device), self.std.to(device))


class ZCA:
    """Pixel space [0, 1] -> ZCA-whitened training space: ``(x - mean) @ matrix`` on flattened images.

    Works on (..., C, H, W) of any floating dtype, keeps the dtype and is differentiable. With D = C*H*W, ``mean`` is
    (D,), ``matrix`` and ``inverse_matrix`` are (D, D), held as float32: 75 MB together for 3x32x32 (D = 3072), 1.2 GB
    for 3x64x64 (D = 12288).

    Raises:
        ValueError: the arrays do not have these shapes.
    """

    kind: ClassVar[str] = "zca"

    def __init__(self, mean: Tensor, matrix: Tensor, inverse: Tensor, shape: tuple[int, int, int]) -> None:
        self.mean, self.matrix, self.inverse_matrix = (v.detach().float() for v in (mean, matrix, inverse))
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        d = self.shape[0] * self.shape[1] * self.shape[2]
        if self.mean.shape != (d,) or self.matrix.shape != (d, d) or self.inverse_matrix.shape != (d, d):
            raise ValueError(f"images of shape {self.shape} need a mean of ({d},) and matrices of ({d}, {d})")

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> ZCA:
        """Fits to float images (N,C,H,W) in [0, 1], not standardised, on their device, as MTT and its successors do.

        With the unbiased covariance U diag(S) U^T: ``matrix = U diag((S + eps)^-1/2) U^T``; ``eps`` is absolute. The
        decomposition needs about sixteen (D, D) matrices beside a centred copy of the images: 0.6 GB and 15 s on one
        core for D = 3072 (measured); scaled up, 10 GB and 15 minutes for D = 12288.
        """
        from kornia.enhance import ZCAWhitening

        _working(images)
        fitted = ZCAWhitening(eps=float(eps), compute_inv=True).fit(images.detach())
        _, c, h, w = images.shape
        return cls(fitted.mean_vector[0], fitted.transform_matrix, fitted.transform_inv, (c, h, w))

    def __call__(self, x: Tensor) -> Tensor:
        """Pixel space -> training space."""
        dtype = _working(x)
        flat = (x.flatten(-3) - self.mean.to(dtype)) @ self.matrix.to(dtype)
        return flat.reshape(x.shape).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Training space -> pixel space (not clamped)."""
        dtype = _working(x)
        flat = x.flatten(-3).to(dtype) @ self.inverse_matrix.to(dtype) + self.mean.to(dtype)
        return flat.reshape(x.shape).to(x.dtype)

    def arrays(self) -> dict[str, np.ndarray]:
        """``mean`` (D,), ``matrix`` and ``inverse`` (D, D), float32; what a set stores under ``/transform``."""
        return {"mean": _array(self.mean), "matrix": _array(self.matrix), "inverse": _array(self.inverse_matrix)}

    def to(self, device: torch.device | str) -> ZCA:
        """The same transform on ``device``."""
        return ZCA(self.mean.to(device), self.matrix.to(device), self.inverse_matrix.to(device), self.shape)


Transform: TypeAlias = Standardise | ZCA


def transform_from_arrays(kind: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int, int]) -> Transform:
    """The transform that ``arrays()`` of a transform of this ``kind`` described, for images of ``shape`` (C, H, W).

    Raises:
        CondenseError: the kind is unknown, or an array is missing, of the wrong shape or type, or not finite.
    """
    d = int(np.prod(shape))
    expected: dict[str, dict[str, tuple[int, ...]]] = {
        "standardise": {"mean": (shape[0],), "std": (shape[0],)},
        "zca": {"mean": (d,), "matrix": (d, d), "inverse": (d, d)},
    }
    if kind not in expected:
        raise CondenseError(f"unknown transform '{kind}'{did_you_mean(kind, expected)}")
    tensors = {}
    for name, wanted in expected[kind].items():
        if name not in arrays:
            raise CondenseError(f"transform '{kind}' lacks its array '{name}'")
        array = arrays[name]
        if array.shape != wanted or array.dtype.kind != "f" or not np.isfinite(array).all():
            found = f"{array.dtype} {tuple(array.shape)}"
            raise CondenseError(f"transform '{kind}': '{name}' must be finite floats of shape {wanted}, found {found}")
        tensors[name] = torch.from_numpy(np.array(array, dtype=np.float32))
    if kind == "zca":
        return ZCA(tensors["mean"], tensors["matrix"], tensors["inverse"], shape)
    if (tensors["std"] <= 0).any():
        raise CondenseError("transform 'standardise': 'std' must be above 0")
    return Standardise(tensors["mean"], tensors["std"])


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
        there, home = _send(order, images), _send(back, images)
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


def send(x: Tensor, device: torch.device) -> Tensor:
    """Host numbers on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _send(x: Tensor, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Host numbers on the images' device."""
    return send(x if dtype is None else x.to(dtype), images.device)


def _color(images: Tensor, p: Parameters) -> Tensor:
    """Brightness, saturation, contrast in one expression.

    Saturation keeps the channel mean m of each pixel and so the mean M of the image; b, s and c in turn therefore give
    x -> c*s*x + c*(1 - s)*m + (1 - c)*M + b.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    b, s, c = p.brightness.double(), p.saturation.double(), p.contrast.double()
    factors = _send(torch.stack([c * s, c * (1 - s), 1 - c, b]), images, dtype)
    on_image, on_pixel_mean, on_image_mean, offset = factors[..., None, None, None].unbind()
    pixel_mean = images.mean(1, keepdim=True, dtype=dtype)
    image_mean = pixel_mean.mean((2, 3), keepdim=True)
    rest = pixel_mean * on_pixel_mean + (image_mean * on_image_mean + offset)
    return (images * on_image + rest).to(images.dtype)


def _crop(images: Tensor, p: Parameters) -> Tensor:
    if bool((p.shift == p.shift[:1]).all()):
        dy, dx = p.shift[0].tolist()
        return F.pad(images, (-dx, dx, -dy, dy))
    shift = _send(p.shift, images)
    return _linear(images, lambda x: _shifted(x, shift), lambda g: _shifted(g, -shift))


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    """Each image moved by its own (dy, dx), zeros moving in. The opposite shift is the adjoint."""
    n, c, h, w = x.shape
    ys = torch.arange(h, device=x.device) + shift[:, :1]
    xs = torch.arange(w, device=x.device) + shift[:, 1:]
    inside = ((ys >= 0) & (ys < h))[:, :, None] & ((xs >= 0) & (xs < w))[:, None, :]
    source = ys.clamp(0, h - 1)[:, :, None] * w + xs.clamp(0, w - 1)[:, None, :]
    moved = x.flatten(2).gather(2, source.reshape(n, 1, h * w).expand(n, c, h * w)).reshape(x.shape)
    return moved.masked_fill(~inside[:, None], 0)


def _cutout(images: Tensor, p: Parameters) -> Tensor:
    keep = []
    for axis, size in enumerate(p.image_size):
        side = _share(size, CUTOUT)
        distance = torch.arange(size) - (p.centre[:, axis : axis + 1] - side // 2)
        keep.append((distance >= 0) & (distance < side))
    rows, columns = (_send(k, images) for k in keep)
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _flip(images: Tensor, p: Parameters) -> Tensor:
    heads = int(p.mirrored.sum())
    if heads in (0, len(p)):
        return images.flip(3) if heads else images
    return torch.where(_send(p.mirrored, images)[:, None, None, None], images.flip(3), images)


def _affine(images: Tensor, matrix: Tensor, align_corners: bool) -> Tensor:
    """Bilinear resampling, zeros outside. ``matrix`` (N,2,2) takes output to input positions, as (x, y) in [-1, 1]."""
    # Positions rounded to bfloat16 would be off by part of a pixel; so would a matrix product be (TF32, autocast).
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    h, w = x.shape[2:]
    forth = _send(matrix, x, x.dtype)[:, :, :, None, None]

    def resample(x: Tensor) -> Tensor:
        ys, xs = (_send(_centred(size) * 2 / _span(size, align_corners), x, x.dtype) for size in (h, w))
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

    a, b, near = (_send(v, gradient, gradient.dtype)[..., None, None] for v in (forth, back, reach))
    qy, qx = (_send(_centred(size), gradient, gradient.dtype) for size in (h, w))
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
        return _stretch(_stretch(images, 2, rows, top, height), 3, columns, left, width)


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
            share = drawn.share[ids, None, None, None].to(_working(own))
            return (own * share + partners * (1 - share)).to(own.dtype)
        top, left, bottom, right = drawn.patch[ids, :, None].unbind(1)
        rows, columns = (torch.arange(length, device=images.device) for length in size)
        down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        return torch.where(down[:, None, :, None] & across[:, None, None, :], partners, own)

    def _shown(self, images: Tensor, views: Views) -> Tensor:
        """The crops or shifts of images, before mixing."""
        if not self.pad:
            return CropViews(self.min_scale, self.max_scale, self.flip).apply(images, views)
        moved = _shifted(images, views.box[:, :2])
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


def neighbours(outputs: Tensor, size: int, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Between which pixels of ``length`` (N, 1) the ``outputs`` (N, R) lie when these are drawn out to ``size`` pixels.

    Returns:
        below, above, and how far from the one to the other, in parts of 1 / (2 size); all int64 (N, R), so exact.
    """
    # Output o lies at (2o + 1) * length / 2 size - 1/2 in the stretch, kept inside; here in units of 1 / 2 size.
    position = ((2 * outputs + 1) * length - size).clamp(min=0).minimum(2 * size * (length - 1))
    below = position // (2 * size)
    return below, (below + 1).minimum(length - 1), position % (2 * size)


def _stretch(x: Tensor, axis: int, outputs: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Positions ``outputs`` (N, size) of the ``length`` (N, 1) pixels from ``start``, drawn out to the whole axis."""
    size = x.shape[axis]
    below, above, part = neighbours(outputs, size, length)
    share = part.to(_working(x)) / (2 * size)
    shape = (len(x), 1, size, 1) if axis == 2 else (len(x), 1, 1, size)
    low, high = (x.gather(axis, (start + i).reshape(shape).expand_as(x)) for i in (below, above))
    return torch.lerp(low.to(share.dtype), high.to(share.dtype), share.reshape(shape)).to(x.dtype)
