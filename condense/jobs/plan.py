"""condense plan: time, memory, bytes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense.data import Task
from condense.device import device_name, differentiable_attention, peak_memory, pick_device, pick_precision
from condense.engine import Run, Step
from condense.environment import read_seconds
from condense.jobs.checks import check_fit, check_request
from condense.jobs.job import resolve_settings
from condense.jobs.pruning import prune_task
from condense.networks import flat
from condense.pretraining import choose_placement, read_trajectory_file, trajectory_nbytes
from condense.registry import METHODS
from condense.sets import DistilledSet, SyntheticSet

PLAN_SECONDS = 3.0
"""Seconds of the steps whose pace predicts the rest, unless ``CONDENSE_PLAN_SECONDS`` is set."""


class DryRun(Run):
    """Makes at least three steps of a run, for about ``PLAN_SECONDS``, and notes when each ended."""

    dry_run = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ends: list[float] = []
        self.loops = self.state_bytes = 0

    def optimise(self, synthetic: SyntheticSet, steps: int, **options: Any) -> Iterator[Step]:
        """Of several loops, which cost the same per step, only the first one is measured."""
        self.loops += 1
        for step in super().optimise(synthetic, steps, **options):
            self.state_bytes = max(self.state_bytes, _nbytes(step.optimizer.state_dict()))
            yield step
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if self.loops > 1:
                return
            self.ends.append(time.monotonic())
            if len(self.ends) > 2 and self.ends[-1] - self.ends[0] > read_seconds("PLAN", PLAN_SECONDS):
                return


def _nbytes(state: Any) -> int:
    """Of all tensors in nested dictionaries."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(_nbytes, state.values())) if isinstance(state, dict) else 0


def estimate_cost(
    method: str,
    real: Task,
    ipc: int,
    *,
    network: str | Callable[..., nn.Module] | None = None,
    device: str = "auto",
    precision: str = "auto",
    **settings: Any,
) -> dict[str, Any]:
    """What a run would cost, from a few of its own steps: seconds a step, all steps, peak memory, bytes of the set."""
    check_request(method, settings, network=network, device=device, precision=precision)
    entry = METHODS.get(method)
    config = resolve_settings(entry, settings, ipc)
    config = dataclasses.replace(config, **getattr(config, "dry_run_settings", {}))
    pruned = prune_task(real)
    check_fit(pruned, ipc, network or entry.network)
    where = pick_device(device)
    began = time.monotonic()
    precision = pick_precision(precision, where)
    task = pruned.repeat_small(ipc)
    trial = DryRun(task, ipc, network or entry.network, device=where, precision=precision, quiet=True)
    with differentiable_attention(entry.order == 2):
        synthetic = entry.function(task, config, trial)
    seconds, per_step, steps = time.monotonic() - began, None, getattr(config, "steps", None)
    if steps is not None and trial.ends:
        warm = len(trial.ends) - 1  # the first step warms up
        per_step = (trial.ends[-1] - trial.ends[0]) / warm if warm else seconds
        steps *= trial.loops
        seconds = trial.ends[0] - began + per_step * (steps - 1)
    seconds += sum(trial.estimates.values())
    made = DistilledSet(synthetic.images.detach(), synthetic.labels, real.transform.to(synthetic.images.device), {})
    return {
        "seconds_per_step": per_step,
        "steps": steps,
        "steps_per_network": config.steps_per_network(ipc) if hasattr(config, "steps_per_network") else 1,
        "seconds": seconds,
        "preparation_seconds": trial.estimates.get("preparation", 0.0),
        "labelling_seconds": trial.estimates.get("labelling", 0.0),
        "peak_memory": peak_memory(where),
        "set_bytes": made.nbytes(),
        "views": _labelled(made, config, trial),
        "checkpoint_bytes": 2 * trial.state_bytes,  # the last one and the one before it
        "trajectories": _trajectories(config, real, network or entry.network, where)
        if entry.pretrains == "experts"
        else None,
        "real_bytes": int(real.train.images.nbytes + real.test.images.nbytes),
        "device": device_name(where),
    }


def _labelled(made: DistilledSet, config: Any, trial: Run) -> dict[str, Any] | None:
    """What labels of views the set would bring, and whose; None where it would bring others."""
    if not made.labels.per_view:
        return None
    epochs, teachers = getattr(config, "label_epochs", None), trial.notes.get("teachers", {}).get("networks", [])
    return {"kind": made.labels.kind, "images": len(made.labels), "epochs": epochs, "teachers": teachers}


def _trajectories(
    config: Any, real: Task, network: str | Callable[..., nn.Module], device: torch.device
) -> dict[str, Any]:
    """Size and placement of the experts of a method, and the bytes of their file."""
    count, epochs, layout = config.num_experts, config.epochs_needed(), flat.layout_of(network, real)
    first, last = config.epochs_read()
    nbytes, needed = (trajectory_nbytes(count, span, layout) for span in (epochs, last - first))
    if config.experts:
        file = read_trajectory_file(Path(config.experts))
        count, nbytes = min(count, file.count), file.path.stat().st_size
        needed = trajectory_nbytes(count, last - first, layout, file.manifest["dtype"])
    place = choose_placement(needed, device)
    return {"experts": count, "epochs": epochs, "bytes": nbytes, "resident_bytes": needed, "place": place}
