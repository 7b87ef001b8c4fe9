"""Names and libraries that import and export share."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from condense.data import Standardise
from condense.errors import CondenseError, missing_package


def folder_name(name: str) -> str:
    """Converts a class name to a folder name: characters that some file system forbids become %XX."""
    return re.sub(r'[/\\:*?"<>|%\x00-\x1f]|^\.|[. ]$', lambda match: f"%{ord(match[0]):02X}", name) or "%"


def given_standardise(mean: Sequence[float] | None, std: Sequence[float] | None) -> Standardise | None:
    """The transform of ``--mean`` and ``--std``; None where neither is given.

    Raises:
        CondenseError: only one is given, or they are not finite, of different lengths, or not positive.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise CondenseError(f"--{'std' if mean is None else 'mean'}: --mean and --std go together; give both")
    try:
        if not all(math.isfinite(value) for value in (*mean, *std)):
            raise ValueError("not finite")
        return Standardise(torch.tensor(mean), torch.tensor(std))
    except (TypeError, ValueError) as fault:
        words = f"--mean {','.join(map(str, mean))} --std {','.join(map(str, std))}"
        raise CondenseError(f"{words}: give one number per channel each, joined by commas, std above 0") from fault


def library(name: str, purpose: str) -> Any:
    """Imports an optional library.

    Raises:
        CondenseError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as fault:
        raise missing_package(name.partition(".")[0], "hub", purpose) from fault
