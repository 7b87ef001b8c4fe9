"""Maps between pixel space and training space: Standardise and ZCA."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from condense.errors import CondenseError, did_you_mean


def working_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype for arithmetic on images: their own, at least float32.

    Raises:
        TypeError: integers, whose results would be rounded to 0 and 1.
    """
    if not x.is_floating_point():
        raise TypeError(f"images must be floating point, not {x.dtype}: divide uint8 pixels by 255 first")
    return torch.promote_types(x.dtype, torch.float32)


def _to_array(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float32).numpy()


class Standardise:
    """Pixel space [0, 1] -> training space by channel: ``(x - mean) / std``.

    Works on (..., C, H, W) of any floating dtype, keeps the dtype and is differentiable. ``mean`` and ``std`` are (C,),
    stored as float32, so that a transform read from a file is bit-identical.

    Raises:
        ValueError: mean and std are not two vectors of one length, or a std is not above 0.
    """

    kind: ClassVar[str] = "standardise"

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean = torch.as_tensor(mean).detach().float()
        self.std = torch.as_tensor(std).detach().float()
        self._elsewhere: dict[torch.device, Standardise] = {}
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape or not bool((self.std > 0).all()):
            raise ValueError("mean and std must be vectors with one entry per channel, std above 0")

    def __call__(self, x: Tensor) -> Tensor:
        """Pixel space -> training space."""
        dtype = working_dtype(x)
        mean, std = (v.to(dtype)[:, None, None] for v in (self.mean, self.std))
        return ((x - mean) / std).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Training space -> pixel space (not clamped)."""
        dtype = working_dtype(x)
        mean, std = (v.to(dtype)[:, None, None] for v in (self.mean, self.std))
        return (x * std + mean).to(x.dtype)

    def arrays(self) -> dict[str, np.ndarray]:
        """``mean`` and ``std``, float32 (C,), as stored under ``/transform`` of a set."""
        return {"mean": _to_array(self.mean), "std": _to_array(self.std)}

    def to(self, device: torch.device | str) -> Standardise:
        """The same transform on ``device``, one copy for each."""
        device = torch.device(device)
        if device == self.mean.device:
            return self
        if device not in self._elsewhere:  # its check of the values waits for the device
            self._elsewhere[device] = Standardise(self.mean.to(device), self.std.to(device))
        return self._elsewhere[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_elsewhere": {}}  # processes of a loader need no copies of other devices


def black_pixel(transform: Standardise | ZCA) -> tuple[float, ...]:
    """Returns a black pixel in training space, one value per channel.

    Raises:
        CondenseError: The transform whitens images; then the value depends on the other pixels.
    """
    if not isinstance(transform, Standardise):
        raise CondenseError("label_pad_value=black: whitened images have no value for black; leave it at mean")
    return tuple(transform(torch.zeros(len(transform.mean), 1, 1, device=transform.mean.device)).flatten().tolist())


class ZCA:
    """Pixel space [0, 1] -> ZCA-whitened training space: ``(x - mean) @ matrix`` on flattened images.

    Works on (..., C, H, W) of any floating dtype, keeps the dtype and is differentiable. With D = C*H*W, ``mean`` is
    (D,), ``matrix`` and ``inverse_matrix`` are (D, D), stored as float32: 75 MB together for 3x32x32 (D = 3072), 1.2 GB
    for 3x64x64 (D = 12288).

    Raises:
        ValueError: the arrays do not have these shapes.
    """

    kind: ClassVar[str] = "zca"

    def __init__(self, mean: Tensor, matrix: Tensor, inverse: Tensor, shape: tuple[int, int, int]) -> None:
        self.mean, self.matrix, self.inverse_matrix = (v.detach().float() for v in (mean, matrix, inverse))
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self._elsewhere: dict[torch.device, ZCA] = {}
        d = self.shape[0] * self.shape[1] * self.shape[2]
        if self.mean.shape != (d,) or self.matrix.shape != (d, d) or self.inverse_matrix.shape != (d, d):
            raise ValueError(f"images of shape {self.shape} need a mean of ({d},) and matrices of ({d}, {d})")

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> ZCA:
        """Fits to float images (N,C,H,W) in [0, 1], not standardised, on their device, as in MTT and later work.

        With the unbiased covariance U diag(S) U^T: ``matrix = U diag((S + eps)^-1/2) U^T``; ``eps`` is absolute. The
        decomposition needs about sixteen (D, D) matrices and a centred copy of the images: 0.6 GB and 15 s on one core
        for D = 3072 (measured), 10 GB and 15 minutes for D = 12288 (extrapolated).
        """
        from kornia.enhance import ZCAWhitening

        working_dtype(images)
        fitted = ZCAWhitening(eps=float(eps), compute_inv=True).fit(images.detach())
        _, c, h, w = images.shape
        return cls(fitted.mean_vector[0], fitted.transform_matrix, fitted.transform_inv, (c, h, w))

    def __call__(self, x: Tensor) -> Tensor:
        """Pixel space -> training space."""
        dtype = working_dtype(x)
        flat = (x.flatten(-3) - self.mean.to(dtype)) @ self.matrix.to(dtype)
        return flat.reshape(x.shape).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Training space -> pixel space (not clamped)."""
        dtype = working_dtype(x)
        flat = x.flatten(-3).to(dtype) @ self.inverse_matrix.to(dtype) + self.mean.to(dtype)
        return flat.reshape(x.shape).to(x.dtype)

    def arrays(self) -> dict[str, np.ndarray]:
        """``mean`` (D,), ``matrix`` and ``inverse`` (D, D), float32, as stored under ``/transform`` of a set."""
        return {
            "mean": _to_array(self.mean),
            "matrix": _to_array(self.matrix),
            "inverse": _to_array(self.inverse_matrix),
        }

    def to(self, device: torch.device | str) -> ZCA:
        """The same transform on ``device``, one copy for each."""
        device = torch.device(device)
        if device == self.mean.device:
            return self
        if device not in self._elsewhere:
            mean, matrix, inverse = (array.to(device) for array in (self.mean, self.matrix, self.inverse_matrix))
            self._elsewhere[device] = ZCA(mean, matrix, inverse, self.shape)
        return self._elsewhere[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_elsewhere": {}}


Transform: TypeAlias = Standardise | ZCA


def transform_from_arrays(kind: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int, int]) -> Transform:
    """Restores a transform of this ``kind`` from its ``arrays()``, for images of ``shape`` (C, H, W).

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
    for name, expected_shape in expected[kind].items():
        if name not in arrays:
            raise CondenseError(f"transform '{kind}' lacks its array '{name}'")
        array = arrays[name]
        if array.shape != expected_shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise CondenseError(
                f"transform '{kind}': '{name}' must be finite floats of shape {expected_shape}, "
                f"found {array.dtype} {tuple(array.shape)}"
            )
        tensors[name] = torch.from_numpy(np.array(array, dtype=np.float32))
    if kind == "zca":
        return ZCA(tensors["mean"], tensors["matrix"], tensors["inverse"], shape)
    if (tensors["std"] <= 0).any():
        raise CondenseError("transform 'standardise': 'std' must be above 0")
    return Standardise(tensors["mean"], tensors["std"])


def digests(transform: Transform) -> list[str]:
    """SHA-256 of each array of a transform, in the order of their names."""
    arrays = transform.arrays()
    return [hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in sorted(arrays)]
