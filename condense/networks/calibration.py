"""Chooses precision, memory format and images per pass by timing the network at hand, for all methods.

A CPU that lists bf16 among its features is not always faster in it: without AMX, convolutions often are slower than in
float32. A few forward and backward passes of the network tell. The times are cached per machine, network and image
shape, so that equal runs make equal choices; a run keeps its choice in its configuration.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from condense import rng
from condense.data import cache_dir
from condense.device import autocast, pick_precision
from condense.files import write_json
from condense.networks.architectures import Network, Shape, build_network, evaluating, network_name
from condense.networks.flat import Layout
from condense.networks.memory_format import (
    CHANNELS_LAST,
    CONTIGUOUS,
    DEFAULT_FORMAT,
    MemoryFormat,
    memory_format,
)

VERSION = 1
"""Of the procedure; times of another one are measured again."""

MIN_FLOPS = 4e6
"""Floating-point operations of one image below which nothing is timed: convolutions then take little of a step."""

GAIN = 0.9
"""A choice replaces the default if it takes at most this share of its time."""

FORWARD_IMAGES = (8, 32, 128)
"""Images of 32x32 per forward pass that are tried; the second is the default. Larger images are fewer."""

TRAINING_IMAGES = 32

PASS_SECONDS = 0.15
"""Longest pass: larger batches are not tried."""

SLOW_PRODUCT = 2.0
"""bf16 is not tried where a matrix product in it takes this many times as long as in float32."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one image, in one way to compute the network."""

    precision: str
    format: str
    gradients: bool
    """Whether the pass includes the gradients of the weights."""
    images: int
    seconds: float


@dataclass(frozen=True)
class ComputeConfig:
    """How a network is computed on a device. The default on a CPU is that of a network too small to be timed."""

    precision: str = "fp32"
    format: MemoryFormat = DEFAULT_FORMAT
    forward_images: int | None = None
    """Images in one forward pass without gradients on a CPU; None: by their size."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the precision, which configurations and manifests name by itself."""
        return {**asdict(self.format), "forward_images": self.forward_images}

    @classmethod
    def from_dict(cls, precision: str, fields: dict[str, Any]) -> ComputeConfig:
        """The inverse of :meth:`to_dict`."""
        chosen = MemoryFormat(fields.get("inference"), fields.get("training"))
        return cls(precision, chosen, fields.get("forward_images"))


def calibrate(
    precision: str,
    device: torch.device,
    network: str | Callable[..., nn.Module],
    shape: Shape,
    classes: int,
) -> ComputeConfig:
    """Chooses how to compute a network.

    On a CPU it times the network for about a second, the first time on a machine. Processes of ``torchrun`` use stored
    times or the default, because they would disturb each other. On CUDA the precision follows from the capability.

    Args:
        precision: auto, fp32 or bf16.
        device: where the network will run.
        network: a name, or a factory.
        shape: (C, H, W) of the images.
        classes: number of logits.

    Raises:
        CondenseError: unknown precision or network, or images that do not fit it.
    """
    chosen = pick_precision(precision, device)
    if device.type != "cpu":
        return ComputeConfig(chosen)
    timings = measure(network, tuple(shape), classes, torch.get_num_threads())
    return choose(timings, precision)


def choose(timings: Sequence[Timing], precision: str = "auto") -> ComputeConfig:
    """Chooses the fastest way. Defaults are kept unless another way takes at most ``GAIN`` of their time.

    Args:
        timings: of :func:`measure`; empty for a network too small to be timed.
        precision: auto, fp32 or bf16.
    """
    fallback = "fp32" if precision == "auto" else precision
    precisions = [fallback] if precision != "auto" else list(dict.fromkeys(timing.precision for timing in timings))
    best: dict[str, tuple[ComputeConfig, float]] = {}
    for kind in precisions:
        forward = [timing for timing in timings if timing.precision == kind and not timing.gradients]
        training = [timing for timing in timings if timing.precision == kind and timing.gradients]
        if not forward or not training:
            continue
        fast, trained = _fastest(forward, CHANNELS_LAST), _fastest(training, CONTIGUOUS)
        config = ComputeConfig(kind, MemoryFormat(fast.format, trained.format), fast.images)
        best[kind] = config, fast.seconds + trained.seconds
    if not best:
        return ComputeConfig(fallback)
    chosen = precisions[0]
    for kind in precisions[1:]:
        if kind in best and best[kind][1] <= GAIN * best[chosen][1]:
            chosen = kind
    return best[chosen][0]


def _fastest(timings: Sequence[Timing], default_format: str) -> Timing:
    """The fastest, or the default: the default format and the second of the sizes that were tried with it."""
    of_default = [timing for timing in timings if timing.format == default_format] or list(timings)
    sizes = sorted({timing.images for timing in of_default})
    default = next(timing for timing in of_default if timing.images == sizes[min(1, len(sizes) - 1)])
    fastest = min(timings, key=lambda timing: timing.seconds)
    return fastest if fastest.seconds <= GAIN * default.seconds else default


@functools.lru_cache(maxsize=64)
def measure(network: str | Callable[..., nn.Module], shape: Shape, classes: int, threads: int) -> tuple[Timing, ...]:
    """Times of one network on this CPU with ``threads`` threads: cached, or measured now. Empty if it is too small."""
    with rng.seeded("calibration"):
        net = build_network(network, shape, classes)
    if count_flops(net, shape) < MIN_FLOPS:
        return ()
    path = _cache_file(net, network_name(network), shape, threads)
    timings = _read(path)
    if timings is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return ()
        timings = tuple(_measure(net, shape))
        with contextlib.suppress(OSError):  # without a cache the next process measures again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, [asdict(timing) for timing in timings])
    return timings


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products in a block, by torch's formulas.

    Torch's own counter also hooks modules, which some gradients through gradients do not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # loads Triton, which takes half a second

        self.flops, self._formulas = 0, flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def count_flops(net: Network, shape: Shape) -> int:
    """Floating-point operations of convolutions and matrix products in a forward pass of one image."""
    with torch.no_grad(), evaluating(net), FlopCounter() as counter:
        net(torch.zeros(1, *shape))
    return counter.flops


def fastest_rate(network: str | Callable[..., nn.Module], shape: Shape, classes: int) -> float | None:
    """Floating-point operations per second of the fastest timed forward pass; None for a network that is not timed."""
    timings = measure(network, tuple(shape), classes, torch.get_num_threads())
    if not timings:
        return None
    with rng.seeded("calibration"):
        flops = count_flops(build_network(network, shape, classes), shape)
    return flops / min(timing.seconds for timing in timings if not timing.gradients)


def _measure(net: Network, shape: Shape) -> Iterator[Timing]:
    """Times forward passes and passes with gradients, in each format, in each precision worth trying."""
    net.train()
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    scale = 32 * 32 / (shape[1] * shape[2])

    def forward(images: Tensor) -> None:
        with torch.no_grad():
            net(images)

    def forward_and_backward(images: Tensor) -> None:
        torch.autograd.grad(net(images).float().logsumexp(1).sum(), weights)

    precisions = ["fp32", "bf16"] if _bf16_is_worth_trying() else ["fp32"]
    for precision in precisions:
        for format in (CONTIGUOUS, CHANNELS_LAST):
            with memory_format(MemoryFormat(format, format)), autocast(torch.device("cpu"), precision):
                for call, sizes in ((forward, FORWARD_IMAGES), (forward_and_backward, (TRAINING_IMAGES,))):
                    per_image = 0.0
                    for size in (max(2, math.ceil(size * scale)) for size in sizes):
                        if per_image * size > PASS_SECONDS and call is forward:
                            break
                        images = torch.randn(size, *shape, generator=rng.generator("calibration"))
                        per_image = _seconds(functools.partial(call, images)) / size
                        yield Timing(precision, format, call is forward_and_backward, size, per_image)


def _seconds(call: Callable[[], object]) -> float:
    """Shorter of two calls after one that warms up; of one, if it is long."""
    call()
    times: list[float] = []
    while len(times) < 2 and sum(times) < PASS_SECONDS:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _bf16_is_worth_trying() -> bool:
    """Whether bf16 products are not much slower than those of float32: CPUs without bf16 emulate them."""
    left = torch.randn(256, 256, generator=rng.generator("calibration"))
    low = left.bfloat16()
    return _seconds(lambda: low @ low) < SLOW_PRODUCT * _seconds(lambda: left @ left)


def _cache_file(net: Network, name: str, shape: Shape, threads: int) -> Path:
    """The file of the times of one network on this machine."""
    layout = Layout.of(net).describe()  # two factories may have one name
    parts = [VERSION, name, layout, list(shape), threads, processor_name(), torch.__version__]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return cache_dir() / "calibration" / f"{digest}.json"


def _read(path: Path) -> tuple[Timing, ...] | None:
    """The cached times; None if there are none or they are damaged."""
    try:
        timings = tuple(Timing(**fields) for fields in json.loads(path.read_text()))
        is_valid = all(
            timing.precision in ("fp32", "bf16")
            and timing.format in (CONTIGUOUS, CHANNELS_LAST)
            and 1 <= timing.images <= 10**6
            and 0 < timing.seconds < math.inf
            for timing in timings
        )
        return timings if timings and is_valid else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


@functools.cache
def processor_name() -> str:
    """Model of the CPU, with ``AMX``, ``AVX512-BF16``, ``AVX512`` or ``AVX2`` if it has these instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="ignore").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name, flags = fields.get("model name", platform.machine()), fields.get("flags", "").split()
    features = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}
    return f"{name} ({next((title for flag, title in features.items() if flag in flags), 'no AVX2')})"
