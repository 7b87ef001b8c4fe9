"""Processes started by ``torchrun``: rank, sum, broadcast and barrier."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from condense.errors import CondenseError


class Ranks:
    """Collective operations between the processes that ``torchrun`` started. A single process is rank 0 of 1.

    Each raises :class:`CondenseError` if another process has ended, with ``advice`` on how the work is continued.
    """

    def __init__(self, device: torch.device, advice: str = "run the same command again") -> None:
        self.device, self.advice = device, advice
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world_size > 1 and not torch.distributed.is_initialized():
            # One rank may train a network for hours while the others wait for its result.
            timeout = datetime.timedelta(days=7)
            # Numbers of the host go through gloo also where tensors go through nccl: no step waits for the device.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=timeout)
            atexit.register(_destroy_process_group)  # a process group of the caller is not destroyed

    @property
    def is_main_process(self) -> bool:
        """Whether this is the main process, which writes files and prints."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sums ``tensor`` over all ranks, in place."""
        if self.world_size > 1:
            with self._collective():
                torch.distributed.all_reduce(tensor)

    def broadcast(self, value: int) -> int:
        """Broadcasts the value of rank 0, so that all ranks stop, save and log at the same step."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value])
        with self._collective():
            torch.distributed.broadcast(tensor, 0)
        return int(tensor.item())

    def all_true(self, condition: Tensor) -> bool:
        """Whether the device scalar ``condition`` is true on all ranks."""
        minimum = condition.float().reshape(1).clone()
        if self.world_size > 1:
            with self._collective():
                torch.distributed.all_reduce(minimum, torch.distributed.ReduceOp.MIN)
        return bool(minimum.item())

    def barrier(self) -> None:
        """Blocks until all ranks reach this call."""
        if self.world_size > 1:
            with self._collective():
                torch.distributed.barrier()

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the backends raise no class of their own
            raise CondenseError(
                f"rank {self.rank} of {self.world_size} lost the connection to another process, which has ended; "
                f"see its message, then {self.advice}"
            ) from error


def _destroy_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
