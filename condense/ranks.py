"""torchrun: rank, sum, broadcast, barrier."""

from __future__ import annotations

import atexit
import datetime
import os

import torch
from torch import Tensor


class Ranks:
    """This process among those that ``torchrun`` started; one process alone is rank 0 of 1."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world > 1 and device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # what "cuda" means on this rank
        if self.world > 1 and not torch.distributed.is_initialized():
            # One rank may train a network for hours before the others hear of it.
            wait = datetime.timedelta(days=7)
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
            atexit.register(_leave)  # once for all runs and evaluations of the process; a caller's own group stays

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Adds ``tensor`` over the ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)

    def agree(self, wish: int) -> int:
        """Rank 0's answer on every rank, so that all stop, save and log at the same step."""
        if self.world == 1:
            return wish
        answer = torch.tensor([wish], device=self.device)
        torch.distributed.broadcast(answer, 0)
        return int(answer.item())

    def all(self, fine: Tensor) -> bool:
        """Whether the device scalar ``fine`` is true on every rank."""
        answer = fine.float().reshape(1).clone()
        if self.world > 1:
            torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN)
        return bool(answer.item())

    def close(self) -> None:
        """Waits until all ranks are here, so that none ends while another still talks to it."""
        if self.world > 1:
            torch.distributed.barrier()


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
