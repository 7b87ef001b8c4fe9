"""condense plan: time, memory, bytes."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense.data import Task
from condense.device import device_name, peak_memory, pick_device, second_derivatives
from condense.engine import Run, Step
from condense.environment import read_seconds
from condense.jobs.checks import check_classes, check_fit, check_request
from condense.jobs.given_files import fill_from_files
from condense.jobs.job import resolve_settings
from condense.jobs.pruning import prune_task
from condense.networks import FlopCounter, calibrate, fastest_rate, flat, memory_format
from condense.pretraining import choose_placement, read_trajectory_file, trajectory_nbytes
from condense.registry import METHODS
from condense.sets import DistilledSet, SyntheticSet

PLAN_SECONDS = 3.0
"""Seconds of the steps whose pace predicts the rest, unless ``CONDENSE_PLAN_SECONDS`` is set. A step that takes longer
is the only one."""


class DryRun(Run):
    """Makes a few steps of a run, for about ``PLAN_SECONDS``: notes when each ended, counts operations of the first."""

    dry_run = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ends: list[float] = []
        self.first_began = 0.0
        self.loops = self.state_bytes = self.step_flops = 0

    def optimise(self, synthetic: SyntheticSet, steps: int, **options: Any) -> Iterator[Step]:
        """Of several loops, which cost the same per step, only the first one is measured."""
        self.loops += 1
        for step in super().optimise(synthetic, steps, **options):
            self.state_bytes = max(self.state_bytes, _nbytes(step.optimizer.state_dict()))
            if self.loops > 1:
                yield step
                return
            if not self.ends:
                self.first_began = time.monotonic()
                with FlopCounter() as counter:
                    yield step
                self.step_flops = counter.flops
            else:
                yield step
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.ends.append(time.monotonic())
            # The first step also warms up, so its time counts only if there is no other.
            began = self.ends[0] if len(self.ends) > 1 else self.first_began
            if self.ends[-1] - began > read_seconds("PLAN", PLAN_SECONDS):
                return

    def step_seconds(self) -> tuple[float, float]:
        """Seconds of the fastest measured step, and the mean; (0, 0) if the run has no steps."""
        ends = self.ends if len(self.ends) > 1 else [self.first_began, *self.ends]
        each = [end - start for start, end in itertools.pairwise(ends)]
        return (min(each), statistics.mean(each)) if each else (0.0, 0.0)


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
    """What a run would cost, from a few of its own steps: seconds a step, all steps, peak memory, bytes of the set.

    ``seconds`` follow from the measured pace. ``least_seconds`` are those of the fastest measured step or, on a CPU, of
    its floating-point operations at the fastest rate of the network's convolutions on this machine.
    """
    check_request(method, settings, network=network, device=device, precision=precision)
    entry = METHODS.get(method)
    settings, network, taken = fill_from_files(entry, settings, network)
    config = resolve_settings(entry, settings, ipc)
    config = dataclasses.replace(config, **getattr(config, "dry_run_settings", {}))
    if entry.labels != "features":
        check_classes(real, f"method '{entry.name}'")
    pruned = prune_task(real)
    check_fit(pruned, ipc, network or entry.network, config)
    where = pick_device(device)
    began = time.monotonic()
    compute = calibrate(precision, where, network or entry.network, real.shape, real.num_classes)
    task = pruned.repeat_small(ipc)
    trial = DryRun(task, ipc, network or entry.network, device=where, compute=compute, quiet=True)
    with second_derivatives(entry.order == 2), memory_format(compute.format):
        synthetic = entry.function(task, config, trial)
    seconds, per_step, steps = time.monotonic() - began, None, getattr(config, "steps", None)
    least = None
    if steps is not None and trial.ends:
        fastest, per_step = trial.step_seconds()
        steps *= trial.loops
        seconds = trial.ends[0] - began + per_step * (steps - 1)
        # Other work on the machine may have slowed the steps: they can take as little as their operations need.
        rate = fastest_rate(network or entry.network, real.shape, real.num_classes) if where.type == "cpu" else None
        possible = min(fastest, trial.step_flops / rate) if rate and trial.step_flops else fastest
        least = seconds - (per_step - possible) * (steps - 1)
    other_seconds = sum(trial.estimates.values())
    least = other_seconds + (seconds if least is None else least)
    seconds += other_seconds
    made = DistilledSet(synthetic.images.detach(), synthetic.labels, real.transform.to(synthetic.images.device), {})
    return {
        "seconds_per_step": per_step,
        "steps": steps,
        "steps_per_network": config.steps_per_network(ipc) if hasattr(config, "steps_per_network") else 1,
        "seconds": seconds,
        "least_seconds": least,
        "step_flops": trial.step_flops,
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
        "precision": compute.precision,
        "taken_from_files": taken,
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
