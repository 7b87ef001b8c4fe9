"""pixel space <-> training space: Standardise, ZCA."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from condense.errors import CondenseError, did_you_mean


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


def digests(transform: Transform) -> list[str]:
    """SHA-256 of each array of a map to training space, by name."""
    arrays = transform.arrays()
    return [hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in sorted(arrays)]
