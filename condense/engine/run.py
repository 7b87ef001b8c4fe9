"""Run: everything a method needs besides its maths – device, precision, seeds, checkpoints, progress, time limit,
ranks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condense import networks, rng
from condense.data import Task
from condense.device import autocast, device_name, total_memory, upload
from condense.engine.checkpoint import (
    CHECKPOINT_FILE,
    PREVIOUS_CHECKPOINT_FILE,
    RUN_CHECKPOINT_SECONDS,
    Diverged,
    Interrupted,
    Stateful,
    load_checkpoint,
)
from condense.engine.optimizer import ParamGroup, SyntheticOptimizer
from condense.environment import read_seconds, scale_chunk
from condense.errors import CondenseError
from condense.ranks import Ranks
from condense.sets import SyntheticSet, save_grid
from condense.tracking import Log, Progress, open_tracker

_log = logging.getLogger(__name__)

LR_SETTINGS = {"images": "lr_img", "step_size": "lr_lr", "labels": "lr_label"}
"""What methods call the learning rate of a tensor."""

PREVIEW_SECONDS = 60.0

LOG_SECONDS = 2.0

MAX_SATURATED = 0.999
"""Fraction of values at the ends of their range above which a run counts as diverged."""

CLASS_CHUNK_PIXELS = 1024 * 1024
"""Real pixels (height x width x images) that a class-separable method handles at once: 1,024 images of 32x32."""

GROUP_MEMORY = 2**34
"""Bytes of device memory for which a group of classes has ``CLASS_CHUNK_PIXELS`` real pixels; more with more."""

FORWARD_PIXELS = 32 * 1024
"""Pixels in one forward pass without gradients on a CPU: 32 images of 32x32, whose maps stay in its cache."""

GRADIENT_PIXELS = 128 * 1024
"""The same with gradients of the weights: 128 images of 32x32."""

ACCELERATOR_CHUNK = 1024
"""Train images in one forward pass without gradients where the device is no CPU."""


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Copies the weights and buffers of a network on the CPU to one on a device: one upload for each dtype."""
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for here, there in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        by_dtype.setdefault(here.dtype, []).append((here, there))
    for pairs in by_dtype.values():
        sent = upload(torch.cat([here.flatten() for here, _ in pairs]), pairs[0][1].device)
        for part, (here, there) in zip(sent.split([here.numel() for here, _ in pairs]), pairs):
            there.copy_(part.view(here.shape))


class Stage:
    """Work of a method outside its outer loop, in equal parts.

    Attributes:
        units: number of parts to do.
    """

    def __init__(self, units: int) -> None:
        self.units = units
        self._began = time.monotonic()
        self._ends: list[float] = []

    def report(self, done: int) -> None:
        """Notes that ``done`` parts are finished. Without reports, the time before the first part counts as its own."""
        self._ends.append(time.monotonic())

    def predict_seconds(self, units: int) -> float:
        """Seconds of the whole stage with ``units`` parts."""
        if len(self._ends) < 2:
            return (time.monotonic() - self._began) * units / max(1, self.units)
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return self._ends[0] - self._began + each * (units - 1)


class Step:
    """One outer step: its index, its keyed draws, its network, and the update of the synthetic set."""

    def __init__(self, run: Run, index: int, optimizer: SyntheticOptimizer) -> None:
        self.run, self.index, self.optimizer = run, index, optimizer
        self.accumulate = optimizer.accumulate
        self.minimise = optimizer.minimise
        self.update = optimizer.step
        self.apply = optimizer.apply

    def key(self, purpose: str) -> tuple[int | str, ...]:
        """Key parts of this step's draws for ``purpose``."""
        return (self.run.seed, purpose, self.index)

    def draws(self, purpose: str) -> rng.Draws:
        """This step's stream of draws for ``purpose``."""
        return rng.Draws(*self.key(purpose))

    def network(self) -> networks.Network:
        """A new random, frozen network of the run's architecture, in train mode, on the device."""
        return self.run.random_network(self.index)


class Run:
    """The one service object of a method.

    Args:
        task: the real data.
        ipc: stored images per class.
        network: architecture that the method matches with; a name or an ``nn.Module`` factory.
        seed: every draw of the run derives from it.
        device: where to compute.
        compute: precision of matrix work without second derivatives, memory format, images per pass.
        directory: where checkpoints, log and previews go; None keeps nothing on disk.
        minutes: time limit; the run stops cleanly. The time of resumed runs adds up.
        resume: continue from the checkpoint of the directory, if there is one.
        config_key: digest of the resolved configuration; a checkpoint of another one is refused.
        earlier_key: digest of the same configuration by earlier versions, whose checkpoints are continued too.
        shorter_keys: digests of the same configuration with fewer steps, whose checkpoints are continued.
        name: what progress lines call the run.
        quiet: no progress.
        track: auto, tensorboard, trackio or none.
        begin: called before the first step, when the method has accepted its settings; makes the directory.
        resume_call: the command or call that continues the run, for messages; `condense resume` by default.

    Attributes:
        devices: names of the devices that it has run on, in order; several if it was resumed on another one.
        resumes: whether it continues an earlier run.
        notes: what :meth:`note` recorded for the manifest, by name.
        estimates: seconds that :meth:`estimate` predicted, by stage; only a dry run fills it.
    """

    dry_run = False
    """Whether only a few steps are made, to measure what a run would cost (``condense plan``)."""

    def __init__(
        self,
        task: Task,
        ipc: int,
        network: str | Callable[..., nn.Module],
        *,
        seed: int = 0,
        device: torch.device | None = None,
        compute: networks.ComputeConfig | None = None,
        directory: Path | None = None,
        minutes: float | None = None,
        resume: bool = False,
        config_key: str = "",
        earlier_key: str = "",
        shorter_keys: Sequence[str] = (),
        name: str = "distill",
        quiet: bool = False,
        track: str = "auto",
        begin: Callable[[], None] = lambda: None,
        resume_call: str = "",
    ) -> None:
        self.resume_call = resume_call or f"condense resume {directory}"
        self.device = device or torch.device("cpu")
        self.ranks = Ranks(self.device, f"continue with: {self.resume_call}, started by torchrun as before")
        self.task, self.ipc, self.network, self.seed = task.to(self.device), ipc, network, seed
        self.compute = compute or networks.ComputeConfig()
        self.directory, self.minutes = directory, minutes
        self.name, self.quiet, self.track, self.config_key = name, quiet, track, config_key
        self.begin = begin
        self.steps_done = 0
        self.stopped_early = False
        self.synthetic: SyntheticSet | None = None
        self._kept: dict[str, Stateful] = {}
        self._stop = False
        self._net: networks.Network | None = None
        self._device_net: networks.Network | None = None
        self._saved = (
            load_checkpoint(directory, (config_key, earlier_key, *shorter_keys)) if resume and directory else None
        )
        self.is_extended = bool(shorter_keys)
        self.resumed = self._saved is not None
        used = self._saved.get("devices", []) if self._saved else []
        self.devices: list[str] = list(dict.fromkeys([*used, device_name(self.device)]))
        self.resumes = resume
        self.notes: dict[str, dict[str, Any]] = {}
        self.estimates: dict[str, float] = {}
        self._partial: Callable[[], SyntheticSet] | None = None
        self._kept_before: dict[str, Any] = self._saved["kept"] if self._saved else {}
        self.loop_index = 0
        self._finished: list[dict[str, Tensor]] = self._saved["finished"] if self._saved else []
        self._elapsed_before = float(self._saved["elapsed"]) if self._saved else 0.0
        self._began = time.monotonic()

    @property
    def precision(self) -> str:
        """``fp32`` or ``bf16``, for matrix work without second derivatives."""
        return self.compute.precision

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, including the runs that this one resumes."""
        return self._elapsed_before + time.monotonic() - self._began

    def add_elapsed(self, seconds: float) -> None:
        """Adds the time of work that this run uses but another process did. A resumed run has added it before."""
        if not self.resumed:
            self._elapsed_before += seconds

    def add_minutes(self, minutes: float) -> float:
        """Sets the time limit to ``minutes`` from now on; returns it counted from the beginning of the run."""
        self.minutes = round(minutes + self.elapsed / 60, 4)
        return self.minutes

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        """Records ``facts`` for the manifest: ``preparation``, ``trajectories``, ``teachers``,
        ``scores`` or ``patches``."""
        self.notes[name] = dict(facts)

    def estimate(self, stage: str, seconds: float) -> None:
        """Adds to the predicted seconds of a stage that a dry run shortens: ``preparation`` or ``labelling``."""
        self.estimates[stage] = self.estimates.get(stage, 0.0) + seconds

    @contextlib.contextmanager
    def stage(self, name: str, units: int, trial: int = 1) -> Iterator[Stage]:
        """Work in equal parts, of which a dry run does only the first ones and predicts the time of all.

        Args:
            name: ``preparation`` or ``labelling``.
            units: number of parts.
            trial: number of parts in a dry run.
        """
        stage = Stage(min(trial, units) if self.dry_run else units)
        yield stage
        if self.dry_run:
            self.estimate(name, stage.predict_seconds(units))

    def require_converged(self, condition: bool, message: str) -> None:
        """Checks what a method has learned. A dry run, whose few steps only measure time, checks nothing.

        Raises:
            Diverged: the condition does not hold.
        """
        if not condition and not self.dry_run:
            raise Diverged(message)

    def partial_result(self, make: Callable[[], SyntheticSet]) -> None:
        """Registers how the learned tensors become a set, for a run that diverges; else ``synthetic`` is that set."""
        self._partial = make

    @property
    def partial_set(self) -> SyntheticSet | None:
        """What a diverged run has learned so far; None before the first step."""
        return self._partial() if self._partial is not None and self.synthetic is not None else self.synthetic

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked to save and stop."""
        return self._stop

    @property
    def classes(self) -> list[int]:
        """The classes of this rank."""
        return list(range(self.task.num_classes))[self.ranks.rank :: self.ranks.world_size]

    def class_chunks(self, images_per_class: int) -> Iterator[list[int]]:
        """This rank's classes in groups of at most ``CLASS_CHUNK_PIXELS`` real pixels, so that memory does not grow
        with their number.

        Only for methods whose classes do not couple; the sum over chunks equals one pass to rounding.
        """
        return self._split_classes(self._classes_within(CLASS_CHUNK_PIXELS, images_per_class))

    def stacked_classes(self, images_per_class: int) -> Iterator[list[int]]:
        """This rank's classes in groups whose gradients are computed in one pass: one class on a CPU; elsewhere, where
        launches take longer than arithmetic, as many equal classes as fit into memory.

        ``images_per_class`` are the real images of a step; where a class has fewer, each class is a group.
        """
        if self.device.type == "cpu" or int(self.task.counts.min()) < images_per_class:
            return self._split_classes(1)
        # The whole memory of the device decides, not what is free: the size of a group changes the rounding.
        pixels = CLASS_CHUNK_PIXELS * max(1, total_memory(self.device) // GROUP_MEMORY)
        return self._split_classes(self._classes_within(pixels, images_per_class))

    def _classes_within(self, pixels: int, images_per_class: int) -> int:
        """Number of classes, at least one, whose images have at most ``pixels`` pixels."""
        height, width = self.task.shape[1:]
        # The images of the set count five times: their maps are kept for the backward pass.
        images_per_class = max(images_per_class, 5 * self.ipc)
        return max(1, scale_chunk(pixels) // (images_per_class * height * width))

    def _split_classes(self, size: int) -> Iterator[list[int]]:
        for start in range(0, len(self.classes), size):
            yield self.classes[start : start + size]

    def forward_chunk_size(self, gradients: bool = False) -> int | None:
        """Images in one forward pass: few on a CPU, so that feature maps stay in its cache; else all.

        With ``gradients`` (of the weights, on real images) more, as the maps must be kept anyway: the bound is memory.
        """
        if self.device.type != "cpu":
            return None
        height, width = self.task.shape[1:]
        if self.compute.forward_images is not None and not gradients:
            return scale_chunk(self.compute.forward_images)
        return max(1, scale_chunk(GRADIENT_PIXELS if gradients else FORWARD_PIXELS) // (height * width))

    def train_id_chunks(self) -> Sequence[Tensor]:
        """Ids of all train images, int64 on the CPU, in chunks for forward passes without gradients."""
        return torch.arange(len(self.task.train)).split(self.forward_chunk_size() or ACCELERATOR_CHUNK)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to the run's precision, for work that needs no second derivative."""
        return autocast(self.device, self.precision)

    def seeded_forward(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Forks and seeds the global generators of the CPU and the device for a step, so that the random numbers that a
        network draws itself (dropout, stochastic depth) follow from the seed and the step."""
        return rng.seeded(self.seed, "forward", self.loop_index, index, device=self.device)

    def seeded(self, purpose: str, step: int = 0) -> contextlib.AbstractContextManager[None]:
        """Forks and seeds the global generator, for constructors and dropout."""
        return rng.seeded(self.seed, purpose, step)

    def random_network(self, index: int) -> networks.Network:
        """Random weights number ``index`` of the run's network, frozen; the same module object every time."""
        with self.seeded("network", index):
            if self._net is None:
                self._net = networks.build_network(self.network, self.task.shape, self.task.num_classes)
                self._net.requires_grad_(False)
            else:
                networks.reset_parameters(self._net)
        if self.device.type == "cpu":
            return self._net
        # Weights are drawn on the CPU, so that every device sees the same network.
        if self._device_net is None:
            with self.seeded("scratch"):
                self._device_net = networks.build_network(self.network, self.task.shape, self.task.num_classes)
            self._device_net.to(self.device).requires_grad_(False)
        copy_state(self._net, self._device_net)
        return self._device_net

    def register_state(self, name: str, state: Stateful) -> None:
        """Adds ``state`` (a live network, a queue) to the checkpoint; a resumed run restores it here."""
        self._kept[name] = state
        if name in self._kept_before:
            state.load_state_dict(self._kept_before[name])

    def optimise(
        self, synthetic: SyntheticSet, steps: int, *, sharded: bool = False, **groups: ParamGroup
    ) -> Iterator[Step]:
        """The outer loop: yields each step; between steps it logs, checkpoints, previews, and stops when time is up.

        A method may have several loops; a resumed run skips those that are finished. At the end of a loop a tensor
        whose group has an ``ema`` is replaced by its average.

        Args:
            synthetic: the set whose ``tensors`` named by ``groups`` are learned.
            steps: number of outer steps of the whole run; schedules follow it.
            sharded: the method works on ``run.classes`` only, so gradients are summed over ranks.
            groups: one :class:`Group` per learned tensor.

        Raises:
            Diverged: a loss was NaN or infinite; ``synthetic`` is put back to the last good state.
            Interrupted: SIGINT or SIGTERM; the state is saved first.
        """
        reduce = self.ranks.all_reduce_sum if sharded else None
        if self.is_extended and any(group.schedule for group in groups.values()):
            raise CondenseError(f"steps={steps}: the learning rate of {self.name} depends on the number of steps")
        optimizer = SyntheticOptimizer(synthetic.tensors, groups, synthetic.classes, reduce)
        self.synthetic = synthetic
        if self.loop_index < len(self._finished):
            with torch.no_grad():
                for name, tensor in optimizer.tensors.items():
                    tensor.copy_(self._finished[self.loop_index][name])
            self.loop_index += 1
            return
        start = 0
        if self._saved is not None:
            optimizer.load_state_dict(self._saved["optimizer"])
            start = int(self._saved["step"])
            self._saved = None
        if self.ranks.is_main_process:
            self.begin()
        monitor = _StepMonitor(self, synthetic, optimizer, start, steps)
        self.steps_done = start
        try:
            time_is_up = start < steps and bool(self.ranks.broadcast(self.time_is_up()))
            for index in range(start, steps):
                if time_is_up:
                    self.stopped_early = True
                    break
                optimizer.progress = index / steps
                with self.seeded_forward(index):
                    yield Step(self, index, optimizer)
                self.steps_done = index + 1
                time_is_up = monitor.after_step(index + 1, stop=self._stop)
            monitor.finish()
            optimizer.load_averages()
            self._finished.append({name: tensor.detach().clone() for name, tensor in optimizer.tensors.items()})
            self.loop_index += 1
        finally:
            monitor.close()

    def time_is_up(self) -> bool:
        """Whether the time limit is reached."""
        return self.minutes is not None and self.elapsed >= self.minutes * 60

    @contextlib.contextmanager
    def stop_on_signal(self, is_resumable: bool | None = None) -> Iterator[None]:
        """In this block, the first SIGINT, SIGTERM or SIGHUP makes the loop save and stop; a second one stops at once.

        Under torchrun every rank gets Ctrl-C twice, from the terminal and from torchrun.

        Args:
            is_resumable: whether unfinished work is stored; if not, signals act as usual. By default, whether the run
                has a directory.
        """
        handled = []

        def ask(number: int, frame: Any) -> None:
            if self._stop and self.ranks.world_size == 1:
                raise KeyboardInterrupt
            self._stop = True

        if self.directory is not None if is_resumable is None else is_resumable:
            with contextlib.suppress(ValueError):  # not in the main thread: signals are handled by the caller
                for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                    if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                        handled.append((number, signal.signal(number, ask)))
        try:
            yield
        finally:
            for number, handler in handled:
                signal.signal(number, handler)

    def save_checkpoint(self, step: int, optimizer: SyntheticOptimizer) -> None:
        """Writes the state after ``step`` steps; the previous checkpoint stays until the new one is whole."""
        if self.directory is None or not self.ranks.is_main_process:
            return
        state = {
            "config_key": self.config_key,
            "step": step,
            "elapsed": self.elapsed,
            "devices": self.devices,
            "optimizer": optimizer.state_dict(),
            "finished": self._finished,
            "kept": {name: dict(kept.state_dict()) for name, kept in self._kept.items()},
        }
        path, temporary = self.directory / CHECKPOINT_FILE, self.directory / (CHECKPOINT_FILE + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, self.directory / PREVIOUS_CHECKPOINT_FILE)
        os.replace(temporary, path)


class _StepMonitor:
    """Work between steps: log lines, checkpoints, previews, the check for NaN, and stopping."""

    def __init__(
        self, run: Run, synthetic: SyntheticSet, optimizer: SyntheticOptimizer, start: int, steps: int
    ) -> None:
        self.run, self.synthetic, self.optimizer, self.steps = run, synthetic, optimizer, steps
        self.last_finite = (start, optimizer.state_dict())
        self.can_saturate = {name: not self._is_saturated(name) for name in optimizer.groups}
        self.checked = self.step = start
        self.check_every = 1 if run.device.type == "cpu" else 20  # reading the flag waits for the GPU
        is_main = run.ranks.is_main_process
        self.progress = Progress(run.name, steps, start, run.quiet or not is_main)
        continued = (run.loop_index, start) if run.resumed or run.loop_index else None  # the log continues
        self.log = Log(run.directory / "log.jsonl", continued) if run.directory and is_main else None
        self.tracker = open_tracker(run.track, run.directory if is_main else None, start)
        self.logged = self.saved = self.previewed = time.monotonic()
        self.save_seconds = 0.0
        self.text = ""

    def after_step(self, step: int, stop: bool) -> bool:
        """Returns whether the time is up. All ranks agree by one broadcast."""
        self.step = step
        now = time.monotonic()
        last = step == self.steps
        # Checkpoints that take more than a second to write take at most a twentieth of the time.
        min_interval = 20 * self.save_seconds if self.save_seconds > 1 else 0.0
        saving = now - self.saved >= max(read_seconds("CHECKPOINT", RUN_CHECKPOINT_SECONDS), min_interval)
        due = (
            now - self.logged >= read_seconds("LOG", LOG_SECONDS),
            saving,
            now - self.previewed >= read_seconds("PREVIEW", PREVIEW_SECONDS),
            stop,
            self.run.time_is_up(),
        )
        bits = self.run.ranks.broadcast(sum(bit << i for i, bit in enumerate(due)))
        logging, saving, previewing, stop, time_is_up = (bool(bits >> i & 1) for i in range(5))
        if step - self.checked >= self.check_every or logging or saving or last or stop:
            self.checked = step
            self._check(step)
        loss = self.optimizer.pop_loss()
        if logging or last or step == 1:
            self.logged = now
            if self.optimizer.reduce is not None:
                self.optimizer.reduce(loss)
            self._write(step, float(loss))
        if saving or stop:
            self._save(step)
        if previewing:
            self.previewed = now
            self._preview(step)
        self.progress.update(step, self.text)
        if stop:
            raise Interrupted(f"stopped at step {step} of {self.steps}; continue with: {self.run.resume_call}")
        return time_is_up

    def finish(self) -> None:
        """Writes the last checkpoint and preview, so that a kill while the set is written loses nothing."""
        self._check(self.step)
        self._check_saturation(self.step)
        self._save(self.step)
        self._preview(self.step)

    def close(self) -> None:
        self.progress.close()
        if self.log is not None:
            self.log.close()
        if self.tracker is not None:
            self.tracker.close()

    def _check(self, step: int) -> None:
        if self.run.dry_run or self.run.ranks.all_true(self.optimizer.finite):
            return
        finite_step, state = self.last_finite
        self.optimizer.load_state_dict(state)
        self.optimizer.load_averages()
        self.run.steps_done = finite_step
        rates = ", ".join(
            f"{LR_SETTINGS.get(name, 'lr of ' + name)}={group.lr:g}" for name, group in self.optimizer.groups.items()
        )
        fault = f"the loss or a step is not finite at step {step} ({rates})"
        raise Diverged(f"{fault}: lower the learning rate; kept step {finite_step}")

    def _is_saturated(self, name: str) -> bool:
        """Whether almost all values of a clamped tensor are at the ends of their range."""
        tensor = self.optimizer.tensors[name].detach()
        if name not in self.optimizer.bounds:
            return False
        low, high = self.optimizer.bounds[name]
        return float(((tensor <= low) | (tensor >= high)).float().mean()) >= MAX_SATURATED

    def _check_saturation(self, step: int) -> None:
        """A step that is much too long ends in black and white pixels, whose loss stays finite.

        Raises:
            Diverged: almost all values of a tensor reached the ends of their range.
        """
        for name, can_saturate in self.can_saturate.items():
            if can_saturate and not self.run.dry_run and self._is_saturated(name):
                rate = f"{LR_SETTINGS.get(name, 'lr of ' + name)}={self.optimizer.groups[name].lr:g}"
                raise Diverged(f"the {name} are all at the ends of their range at step {step} ({rate}): lower the rate")

    def _write(self, step: int, loss: float) -> None:
        self.text = f"loss {loss:.4g}"
        values = {"loss": loss}
        if self.log is not None:
            self.log.write(loop=self.run.loop_index, step=step, seconds=round(self.run.elapsed, 2), **values)
        if self.tracker is not None:
            self.tracker.log(step, values)

    def _save(self, step: int) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.optimizer.tensors.values()):
            self.optimizer.finite.fill_(False)
            self._check(step)
        began = time.monotonic()
        self.last_finite = (step, self.optimizer.state_dict())
        self.run.save_checkpoint(step, self.optimizer)
        self.saved = time.monotonic()
        self.save_seconds = self.saved - began

    def _preview(self, step: int) -> None:
        if self.run.directory is None or not self.run.ranks.is_main_process:
            return
        folder = self.run.directory / "previews"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.png"
        images = self.synthetic.images.detach()
        if self.synthetic.space == "training":
            images = self.run.task.transform.to(images.device).inverse(images)
        save_grid(images, path, columns=self.run.ipc)
        if self.tracker is not None:
            self.tracker.image(step, path)
