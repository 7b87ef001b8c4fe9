"""Devices: selection, precision, memory, deterministic kernels."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.environment import limit_host_memory
from condense.errors import CondenseError, is_out_of_memory
from condense.formatting import size


def pick_device(name: str) -> torch.device:
    """Returns the torch device called ``name``; ``auto`` is CUDA if available, otherwise the CPU.

    Under ``torchrun`` ``cuda`` is a GPU for each process. It becomes the current one here, before anything opens a
    context on another.

    Raises:
        CondenseError: the device is not available, or a numbered GPU is asked for under ``torchrun``.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _choose_own_gpu(device)
        torch.zeros(1, device=device).item()  # fails for `meta`, which has no values
    except (RuntimeError, AssertionError, NotImplementedError) as fault:
        raise CondenseError(f"--device {name}: not available here; use --device cpu or leave it out") from fault
    return device


def _choose_own_gpu(device: torch.device) -> None:
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index is not None:
        raise CondenseError(f"--device {device}: torchrun gives each process a GPU of its own; use --device cuda")
    if number >= count > 0:
        raise CondenseError(
            f"--device cuda: torchrun started process {number + 1} on this machine, which has {count} GPUs; "
            f"use --nproc-per-node {count}"
        )
    torch.cuda.set_device(number)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16, AMX or Arm's BF16), according to its flags."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="ignore")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def pick_precision(name: str, device: torch.device) -> str:
    """Returns ``fp32`` or ``bf16``, the precision of matrix products that need no second derivative.

    On a CPU, ``auto`` is fp32 here; :func:`condense.networks.calibrate` times the network to decide.

    Args:
        name: auto (on CUDA bf16 if the hardware supports it), fp32 or bf16.
        device: device of the products.

    Raises:
        CondenseError: unknown name.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise CondenseError(f"--precision {name}: use auto, fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Returns an autocast context for ``bf16``, or a null context for ``fp32``."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device without waiting for it."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and x.device.type == "cpu"
        else x.to(device)
    )


def upload_indices(x: Tensor, device: torch.device) -> Tensor:
    """As :func:`upload`, for indices or labels that nobody changes: :func:`on_host` returns ``x`` without waiting."""
    there = upload(x, device)
    if x.device.type == "cpu" and there is not x:
        there.host = x  # type: ignore[attr-defined]
    return there


def on_host(x: Tensor) -> Tensor:
    """Returns ``x`` on the CPU. Waits for the device unless :func:`upload_indices` made it."""
    return x.host if hasattr(x, "host") else x.cpu()


def add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds ``values`` (M, ...) to the rows (M,) of ``total``, in place and in a fixed order on every device."""
    if total.device.type == "cuda":
        total.index_put_((rows,), values, accumulate=True)  # sorts; index_add_ adds in any order
    else:
        total.index_add_(0, rows, values)


@contextlib.contextmanager
def out_of_memory_advice(device: torch.device, advice: str) -> Iterator[None]:
    """Turns a failed allocation in the block into one line.

    Args:
        device: that the work uses.
        advice: what to change.

    Raises:
        CondenseError: not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if not is_out_of_memory(fault):
            raise
        raise CondenseError(f"out of memory on {device}: {advice}, or set CONDENSE_CHUNK_SCALE=0.5") from fault


def reset_peak_memory(device: torch.device) -> None:
    """Begins a new peak of ``device``; that of the host is the process's own and stays."""
    if device.type == "cuda":
        torch.cuda.init()  # there are no statistics before
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Returns peak bytes: ``host`` (resident set of the process so far) and, on CUDA, ``device`` (since
    :func:`reset_peak_memory`)."""
    peak = {"host": _peak_resident()}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def _peak_resident() -> int:
    """Peak resident bytes of this process; 0 if unknown.

    The function prefers /proc, because getrusage includes the peak of the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):  # no `resource` on Windows
        import resource

        scale = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return 0


_second_derivatives: ContextVar[bool] = ContextVar("second_derivatives", default=False)


@contextlib.contextmanager
def second_derivatives(enabled: bool = True) -> Iterator[None]:
    """Computes networks by operations with a second derivative in the block, if ``enabled``.

    Attention is computed with matrix products, because fused kernels have none; group norm has one in closed form.
    """
    if not enabled:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    token = _second_derivatives.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _second_derivatives.reset(token)


def prefers_second_derivatives() -> bool:
    """Whether this is a block of :func:`second_derivatives`."""
    return _second_derivatives.get()


@contextlib.contextmanager
def deterministic_kernels(enabled: bool = True) -> Iterator[None]:
    """Takes convolutions that repeat bit for bit in the block; if ``enabled``, only deterministic kernels.

    An operation without such a kernel then raises an error.
    """
    cudnn, strict = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product on CUDA
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        cudnn.benchmark, cudnn.deterministic = before


def device_name(device: torch.device) -> str:
    """Human-readable device name, e.g. ``NVIDIA A100`` or ``2-thread x86_64 CPU (bf16)``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()}-thread {platform.machine()} CPU" + (" (bf16)" if cpu_has_bf16() else "")


def free_memory(device: torch.device) -> int:
    """Free bytes of an accelerator; those of the host if it shares its memory or does not report its own."""
    module: Any = getattr(torch, device.type, None)
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a CUDA device; 0 for others."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def free_host_memory() -> int:
    """Bytes available without swapping, within the limits of a container, ``ulimit -v`` and ``CONDENSE_HOST_MEMORY``.

    0 if unknown.
    """
    free = _available_memory()
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):  # no `resource` on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            free = min(free, max(0, limit - used)) if free else max(0, limit - used)
    return limit_host_memory(free)


def check_host_memory(needed: int, what: str, advice: str) -> None:
    """Checks before an allocation that memory suffices.

    Args:
        needed: bytes.
        what: that needs them, in the plural; begins the message.
        advice: how the user can need less.

    Raises:
        CondenseError: fewer bytes are free.
    """
    free = free_host_memory()
    if 0 < free < needed:
        raise CondenseError(f"{what} need about {size(needed)} of memory, {size(free)} are free; {advice}")


def _available_memory() -> int:
    """Bytes available without swapping, within the limit of a container; 0 if unknown."""
    try:
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
        with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
            limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
            free = min(free, max(0, limit - used))
        return free
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
