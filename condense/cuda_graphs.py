"""CUDA graphs: the kernels of a function of tensors, recorded once and launched together.

A step on small images is hundreds of short kernels, and a GPU waits for the host between them. A replay launches all of
them at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

MAX_SHAPES = 4
"""Different inputs for which kernels are recorded; further ones are computed as usual."""

TOLERANCE = 1e-3
"""Largest relative difference of a replay from a usual call."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class GraphedFunction:
    """Calls ``function(*inputs)``, which returns a tuple of tensors; on CUDA by a graph from the second call on.

    The function may read tensors besides its inputs, as long as they stay where they are, and change those in
    ``state``. It must not wait for the device, draw random numbers, or depend on anything else that changes.

    A recorded function is called three times and replayed once, and ``state`` is restored. If that fails, or the replay
    differs from a call, the function is called as usual from then on, and one line of the log says why. On other
    devices, with ``deterministic=true`` and with ``CONDENSE_CUDA_GRAPHS=0``, it is always called.

    Args:
        function: positional tensors to a tuple of tensors without a graph.
        state: tensors that the function changes in place.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], state: Sequence[Tensor] = ()) -> None:
        self.function, self.state = function, list(state)
        self.graphs: dict[object, _Graph | None] = {}
        self.is_enabled = os.environ.get("CONDENSE_CUDA_GRAPHS", "1") != "0"

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns the results. Those of a replay are overwritten by the next call with inputs of these shapes."""
        is_strict = torch.are_deterministic_algorithms_enabled()  # a resumed run calls what this one replays
        if is_strict or not self.is_enabled or not all(x.device.type == "cuda" for x in inputs):
            return self.function(*inputs)
        key = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        if key not in self.graphs:
            if len(self.graphs) < MAX_SHAPES:
                self.graphs[key] = None  # the first call also prepares what must not be recorded
            return self.function(*inputs)
        recorded = self.graphs[key] or self._record(inputs)
        if recorded is None:
            return self.function(*inputs)
        self.graphs[key] = recorded
        with torch.no_grad():
            for static, x in zip(recorded.inputs, inputs):
                static.copy_(x)
        recorded.graph.replay()
        return recorded.outputs

    def _record(self, inputs: Sequence[Tensor]) -> _Graph | None:
        """Records the function for inputs like these; None, and no further attempt, if that fails."""
        before = [x.clone() for x in self.state]
        static = [
            x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad) for x in inputs
        ]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries choose kernels and allocate work space before the recording
                for _ in range(2):
                    expected = [x.clone() for x in self.function(*static)]
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self.function(*static)
            self._restore(before)
            graph.replay()
            # The state of the warm-up was changed twice, which no output of a function in train mode shows.
            close = [_is_close(x, y) for x, y in zip(outputs, expected, strict=True)]
            if all(close):
                return _Graph(graph, static, outputs)
            reason = "a replay differs from a call"
        except RuntimeError as fault:
            reason = str(fault).strip().splitlines()[0]
        finally:
            self._restore(before)
        self.is_enabled = False
        _log.warning("condense: continuing without CUDA graphs (%s)", reason)
        return None

    def _restore(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for x, value in zip(self.state, values):
                x.copy_(value)


def _is_close(value: Tensor, expected: Tensor) -> bool:
    error = (value.double() - expected.double()).norm()
    return bool(error <= TOLERANCE * expected.double().norm())
