"""Reading and writing the arrays of labels. Files are untrusted: the type and shape of each array are checked before
use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense import networks, rng
from condense.augment import MIXES, ViewRule
from condense.errors import CondenseError
from condense.labels.base import LOSSES
from condense.labels.teacher_logits import STATISTICS

MAX_SIDE = 65536
"""Maximum of the channels, height and width of images in an untrusted file."""


def checked_array(arrays: Mapping[str, np.ndarray], name: str, kind: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Returns the array ``name`` after checking its type and shape (None: any size)."""
    array = arrays[name]
    fits = array.ndim == len(shape) and all(expected in (None, size) for expected, size in zip(shape, array.shape))
    if array.dtype != kind or not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise CondenseError(f"labels/{name} must be {np.dtype(kind)} ({sizes}), not {array.dtype} {array.shape}")
    return array


def read_image_count(arrays: Mapping[str, np.ndarray]) -> int:
    """Returns the number of images that the labels are for."""
    (count,) = checked_array(arrays, "images", np.int64, (1,)).tolist()
    if count < 0:
        raise CondenseError(f"labels/images must be at least 0, not {count}")
    return int(count)


def read_hard_labels(arrays: Mapping[str, np.ndarray], classes: int) -> Tensor:
    """Returns the class of each image, int64 (N,)."""
    labels = checked_array(arrays, "hard", np.int64, (None,))
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise CondenseError(f"labels/hard has values outside 0..{classes - 1}")
    return torch.from_numpy(labels)


def view_arrays(views: ViewRule, seed: int, statistics: str = "running", micro: int = 0) -> dict[str, np.ndarray]:
    """Returns the arrays that define the views, and the teacher's micro-batch size, 0 with running statistics.

    Settings that were added later (``mix_batch``, ``tiles``, ``fill``) are appended only if they are used. Earlier
    versions, which do not know them, then refuse the file instead of drawing other views.
    """
    later = [views.mix_batch, views.tiles]
    return {
        "draws": np.array(
            [seed, rng.HASH_VERSION, micro if statistics == "batch" else 0, *(later if any(later) else [])], np.int64
        ),
        "views": np.array([views.min_scale, views.max_scale, views.alpha, *views.fill], np.float32),
        "choices": np.array([views.flip, views.pad, MIXES.index(views.mix)], np.uint8),
    }


def read_views(arrays: Mapping[str, np.ndarray]) -> tuple[ViewRule, int, str, int]:
    """Returns the views, seed, statistics and micro-batch size that :func:`view_arrays` stored."""
    draws = checked_array(arrays, "draws", np.int64, (5,) if arrays["draws"].shape == (5,) else (3,)).tolist()
    seed, version, micro, mix_batch, tiles = draws if len(draws) == 5 else [*draws, 0, 0]
    if version != rng.HASH_VERSION:
        raise CondenseError(
            f"labels/draws: views of version {version} of the draws, this is {rng.HASH_VERSION}; "
            "use the condense-toolkit that the set was made with"
        )
    has_fill = arrays["views"].ndim == 1 and len(arrays["views"]) > 3
    low, high, alpha, *fill = checked_array(arrays, "views", np.float32, (None,) if has_fill else (3,)).tolist()
    flip, pad, mix = checked_array(arrays, "choices", np.uint8, (3,)).tolist()
    if flip > 1 or mix >= len(MIXES):
        raise CondenseError(f"labels/choices has invalid values ({flip}, {pad}, {mix})")
    rule = ViewRule(low, high, bool(flip), pad, MIXES[mix], alpha, mix_batch, tuple(fill), tiles)
    return rule, seed, STATISTICS[micro != 0], micro


def read_init_kwargs(arrays: Mapping[str, np.ndarray], classes: int) -> dict[str, Any]:
    """Returns the arguments that :meth:`PerViewLabels.terms` returned."""
    views, seed, statistics, micro = read_views(arrays)
    temperature, gamma = checked_array(arrays, "loss", np.float32, (2,)).tolist()
    squared, loss = checked_array(arrays, "flags", np.uint8, (2,)).tolist()
    if squared > 1 or loss >= len(LOSSES):
        raise CondenseError(f"labels/flags must be 0 or 1, not {squared} and {loss}")
    return {
        "seed": seed,
        "views": views,
        "temperature": temperature,
        "squared": bool(squared),
        "loss_kind": LOSSES[loss],
        "gamma": gamma,
        "statistics": statistics,
        "micro": micro,
        "calibrate": checked_array(arrays, "calibrate", np.float32, (3,)).tolist() if "calibrate" in arrays else None,
        "hard": read_hard_labels(arrays, classes) if "hard" in arrays else None,
    }


def read_teacher_networks(text: bytes) -> tuple[list[str], networks.Shape]:
    """Returns the names and the image shape of the teachers in a file."""
    try:
        description = json.loads(text)
        names, shape = description["names"], description["shape"]
        channels, height, width = shape
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("no names")
        if not all(type(size) is int and 0 < size <= MAX_SIDE for size in shape):
            raise ValueError("no image shape")
        return names, (channels, height, width)
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise CondenseError("labels/networks does not name the teachers; copy or make the set again") from fault


def stated_image_shape(arrays: Mapping[str, np.ndarray]) -> networks.Shape | None:
    """Returns the image shape of the teachers in a file; None if the labels have none."""
    if "networks" not in arrays:
        return None
    return read_teacher_networks(checked_array(arrays, "networks", np.uint8, (None,)).tobytes())[1]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Copies a tensor to a NumPy array on the CPU."""
    return tensor.detach().cpu().numpy()


def read_finite(arrays: Mapping[str, np.ndarray], name: str, kind: Any, shape: tuple[int | None, ...]) -> Tensor:
    """Returns the array ``name`` of an untrusted file after checking its type, shape and that all values are finite."""
    values = torch.from_numpy(checked_array(arrays, name, kind, shape))
    if not bool(values.isfinite().all()):
        raise CondenseError(f"labels/{name} has values that are not finite; copy or make the set again")
    return values


def class_dtype(classes: int) -> Any:
    """Returns the smallest dtype that holds the indices of ``classes`` classes."""
    return np.uint8 if classes <= 1 << 8 else np.uint16 if classes <= 1 << 16 else np.int64
