"""Environment variables and the allocator: what suits a machine or a user, and changes no result beyond rounding.

Variables that name folders are read where the folders are used: ``CONDENSE_CACHE``, ``CONDENSE_DATA``,
``CONDENSE_METHODS``, ``CONDENSE_PLUGINS`` and ``CONDENSE_PROTOCOLS``. ``CONDENSE_CUDA_GRAPHS=0`` turns
:mod:`condense.cuda_graphs` off.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import math
import os

from condense.errors import CondenseError


def read_number(name: str, default: float, *, minimum: float = 0.0) -> float:
    """Returns the number in an environment variable, or ``default`` if it is not set.

    Raises:
        CondenseError: it is not a number of at least ``minimum``.
    """
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= minimum:
        raise CondenseError(f"{name}={text}: must be a number of at least {minimum:g}")
    return value


def foreign_distribution() -> str:
    """A warning if the distribution ``condense`` is installed, which belongs to another project; else empty.

    It installs its modules into the folder of ours, so that either may have replaced files of the other.
    """
    try:
        other = importlib.metadata.version("condense")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return (
        f"condense: the package 'condense' {other} of another project is installed here and uses the same import name; "
        "run: pip uninstall condense condense-toolkit, then install condense-toolkit again"
    )


def read_seconds(event: str, default: float) -> float:
    """Minimum seconds between two events: ``CONDENSE_CHECKPOINT_SECONDS``, ``CONDENSE_LOG_SECONDS``,
    ``CONDENSE_PREVIEW_SECONDS`` or ``CONDENSE_PROGRESS_SECONDS``; for ``plan``, the seconds that it measures steps."""
    return read_number(f"CONDENSE_{event}_SECONDS", default)


def scale_chunk(size: int) -> int:
    """Number of images or pixels that are processed at once: ``size`` times ``CONDENSE_CHUNK_SCALE``, at least 1.

    A scale below 1 needs less memory. It changes the rounding of sums, so a run is resumed with the same scale.
    """
    return max(1, int(size * min(read_number("CONDENSE_CHUNK_SCALE", 1.0), 1e6)))


def limit_host_memory(size: int) -> int:
    """``size`` bytes, or ``CONDENSE_HOST_MEMORY`` bytes if these are fewer: the share of a machine to plan with."""
    return int(min(size, read_number("CONDENSE_HOST_MEMORY", math.inf)))


def keep_freed_memory() -> bool:
    """Makes glibc keep large freed blocks for the next step, instead of returning them and getting zeroed ones again.

    The command line calls it; scripts, notebooks and workers that train on a CPU should call it once, before they
    compute. It holds for the whole process. Steps of a width-128 ConvNet then take up to half the time, with a fifth of
    the page faults and the same peak memory.

    Returns:
        Whether the allocator was changed: False where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_MAX: no block gets its own mapping; M_TRIM_THRESHOLD: the heap is not trimmed.
        return bool(mallopt(-4, 0)) and bool(mallopt(-1, 2**31 - 1))
    return False
