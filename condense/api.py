"""The functions behind the public names: ``condense.task``, ``distill``, ``evaluate``, ``load`` and ``fit``; and
``experts`` and ``teachers``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense.config import build
from condense.data import DataOptions, Task
from condense.data import task as task_module
from condense.device import pick_device, pick_precision
from condense.engine import Run
from condense.errors import CondenseError, did_you_mean
from condense.files import check_writable
from condense.jobs import CONFIG, RESULT, check, check_experts, check_teachers, read_job, resume
from condense.jobs.checks import _check_fit
from condense.jobs.execute import _execute
from condense.jobs.job import _config, _estimated_bytes, _job
from condense.pretraining import parts_of, trajectories
from condense.pretraining import teachers as teachers_module
from condense.registry import METHODS
from condense.sets import DistilledSet, packaged_sets

__all__ = ["distill", "experts", "load", "task", "teachers"]


def task(data: Any, *, name: str | None = None, download: bool = False, **options: Any) -> Task:
    """The real data: a registered name, a folder, an ``.npz`` or ``.h5``, tensors, or a map-style Dataset.

    Args:
        data: see ``condense.tasks.load``.
        name: what records call it.
        download: fetch a registered dataset that is not on disk.
        options: resize, grey, mirror, zca (see :class:`condense.tasks.DataOptions`).
    """
    return task_module.load(data, build(DataOptions, options, "the data"), download=download, name=name)


def load(source: str | Path) -> DistilledSet:
    """A distilled set, verified: from a file, or a ready-made one by name (``condense ls sets``).

    Raises:
        CondenseError: no such file or name, or the file is damaged or of another kind.
    """
    if str(source) in packaged_sets():
        source = packaged_sets()[str(source)]
    elif not Path(source).exists() and not str(source).endswith(".h5"):
        hint = did_you_mean(str(source), packaged_sets()) or "; give the .h5 that `condense distill` writes"
        raise CondenseError(f"'{source}' is no file and no ready-made set{hint}")
    return DistilledSet.load(source)


def distill(
    method: str,
    data: Task | Any,
    ipc: int,
    *,
    network: str | Callable[..., nn.Module] | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    minutes: float | None = None,
    out: str | Path | None = None,
    run_dir: str | Path | None = None,
    tag: str | None = None,
    protocol: str | None = None,
    force: bool = False,
    quiet: bool = True,
    track: str = "auto",
    deterministic: bool = False,
    **settings: Any,
) -> DistilledSet:
    """Makes a distilled set.

    Args:
        method: a name of ``condense ls methods``.
        data: a :class:`Task`, or what ``condense.task`` takes.
        ipc: stored images per class.
        network: architecture to match with; the method's default when None.
        seed: the same seed gives the same set.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16, for matrix work that needs no second derivative.
        minutes: stop cleanly after so long and keep what there is; schedules still follow ``steps``.
        out: file to write; None writes none.
        run_dir: folder for checkpoints, log and previews; None keeps none (a killed run is then lost).
        tag: ends the set's name, as in ``cifar10/dm-ipc10.paper``.
        protocol: evaluation protocol named in the manifest; the method's own when None.
        force: overwrite ``out`` and an earlier run in ``run_dir``.
        quiet: no progress on stderr.
        track: auto (TensorBoard where installed), tensorboard, trackio or none.
        deterministic: only deterministic kernels; on CUDA, equal seeds then give equal bits. CPUs always do.
        settings: hyper-parameters, checked against the method's config.

    Raises:
        CondenseError: anything wrong with what was given, found before work starts; or the run diverged, in which case
            the last good set is written to ``out`` first.
    """
    check(
        method, settings, network=network, protocol=protocol, device=device, precision=precision, minutes=minutes,
        track=track,
    )  # fmt: skip
    entry = METHODS.get(method)
    config = _config(entry, settings)
    real = data if isinstance(data, Task) else task(data)
    job = _job(
        entry, config, real, ipc, network, seed, device, precision, minutes=minutes, tag=tag, track=track, force=force,
        out=str(Path(out).resolve()) if out else None, protocol=protocol or entry.protocol, deterministic=deterministic,
    )  # fmt: skip
    _check_fit(real, ipc, network or entry.network)
    if out is not None:
        check_writable(Path(out), force=force, size=_estimated_bytes(real, ipc))
    directory = Path(run_dir) if run_dir is not None else None
    if directory is not None:
        if (directory / CONFIG).exists() and not force:
            finished = (directory / RESULT).exists()
            other = "take another --run-dir" if finished else f"go on with `condense resume {directory}`"
            raise CondenseError(f"{directory} holds a {'finished ' * finished}run; {other}, or replace it with --force")
        check_writable(directory / CONFIG, force=True, size=6 * _estimated_bytes(real, ipc))
    return _execute(job, entry, config, real, network or entry.network, directory, quiet=quiet, resume=False)


def experts(
    data: Task | Any,
    *,
    network: str | None = None,
    method: str = "mtt",
    count: int | None = None,
    epochs: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    dtype: str = "float16",
    held_out: float | None = None,
    force: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> trajectories.Made:
    """Trains the experts that a method wants, and writes their trajectories to one file.

    The same call goes on where an earlier one was stopped, and a larger ``count`` adds to the file.

    Args:
        data: a :class:`Task`, or what ``condense.task`` takes.
        network: their architecture; the method's default when None.
        method: whose experts they are; its settings say how they are trained.
        count: experts; the method's ``num_experts`` when None.
        epochs: of their training; as many as the method reads when None (its ``buffer_epochs``).
        out: file to write; None is the file of the cache where methods look for such experts.
        seed: the same seed gives the same experts.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16, where the method does not need one of them.
        dtype: float16 or float32, of the stored weights.
        held_out: share of each class that experts do not see and are judged on; the method's when None (mostly 0).
        force: replace what other data, networks or trainings left in ``out``, and what is damaged.
        quiet: no progress on stderr.
        settings: hyper-parameters of the method.

    Raises:
        CondenseError: anything wrong with what was given, found before work starts; or an expert diverged.
    """
    config = check_experts(
        method, settings, network=network, count=count, epochs=epochs, dtype=dtype, held_out=held_out, device=device,
        precision=precision,
    )  # fmt: skip
    real = data if isinstance(data, Task) else task(data)
    network = network or METHODS.get(method).network
    _check_fit(real, 1, network)
    training, epochs = config.training(real), config.epochs_needed()
    if held_out is not None:
        training = dataclasses.replace(training, held_out=held_out)
    where = pick_device(device)
    run = Run(
        real, 1, network, seed=seed, device=where, precision=pick_precision(precision, where), name="experts",
        quiet=quiet, track="none",
    )  # fmt: skip
    path = Path(out) if out else trajectories.cache_file(run, training, epochs, dtype)
    with _training(run, path, "a smaller --network or batch"):
        return trajectories.record(
            run, training, path, count=config.num_experts, epochs=epochs, dtype=dtype, force=force
        )


@contextlib.contextmanager
def _training(run: Run, path: Path, smaller: str) -> Iterator[None]:
    """While networks are trained for the file ``path``: what is done is kept beside it, so a signal may stop it."""
    run.directory = parts_of(path)
    try:
        with run.stop_on_signal():
            yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise CondenseError(f"out of memory on {run.device}: take {smaller}") from fault
    run.ranks.close()


def teachers(
    data: Task | Any,
    *,
    networks: str | Sequence[str] | None = None,
    method: str | None = None,
    count: int | None = None,
    epochs: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    held_out: float | None = None,
    force: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> teachers_module.Made:
    """Trains the teachers that a method wants, and writes them to one file.

    The same call goes on where an earlier one was stopped, and a larger ``count`` or other networks add to the file.

    Args:
        data: a :class:`Task`, or what ``condense.task`` takes.
        networks: their architectures, joined by commas or as a list; the method's when None.
        method: whose teachers they are; its settings say how they are trained. None: those of ``TeacherOptions``.
        count: teachers of each architecture; the ``num_teachers`` of the settings when None.
        epochs: of their training; the ``teacher_epochs`` of the settings when None.
        out: file to write; None is the file of the cache where methods look for such teachers.
        seed: the same seed gives the same teachers.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16, where the method does not need one of them.
        held_out: share of each class that teachers do not see and are judged on; the method's when None (mostly 0,
            where the real test images judge them).
        force: replace what other data or trainings left in ``out``, and what is damaged.
        quiet: no progress on stderr.
        settings: hyper-parameters of the method.

    Raises:
        CondenseError: anything wrong with what was given, found before work starts; or a teacher diverged.
    """
    config = check_teachers(
        method, settings, networks=networks, count=count, epochs=epochs, held_out=held_out, device=device,
        precision=precision,
    )  # fmt: skip
    real = data if isinstance(data, Task) else task(data)
    architectures = config.architectures(METHODS.get(method).network if method else teachers_module.NETWORK)
    for one in architectures:
        _check_fit(real, 1, one)
    squeezing = config.squeezing(real)
    if held_out is not None:
        squeezing = dataclasses.replace(squeezing, held_out=held_out)
    where = pick_device(device)
    run = Run(
        real, 1, architectures[0], seed=seed, device=where, precision=pick_precision(precision, where),
        name="teachers", quiet=quiet, track="none",
    )  # fmt: skip
    path = Path(out) if out else teachers_module.cache_file(run, squeezing)
    with _training(run, path, "smaller --networks or teacher_batch"):
        return teachers_module.record(
            run, squeezing, path, architectures=architectures, count=config.num_teachers, force=force
        )


def distill_or_resume(
    method: str,
    real: Task,
    ipc: int,
    *,
    out: Path,
    run_dir: Path,
    network: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    protocol: str | None = None,
    quiet: bool = True,
    **settings: Any,
) -> DistilledSet:
    """What :func:`distill` makes, from wherever an earlier call with the same arguments was stopped.

    A run of other settings in ``run_dir``, or on other data, is replaced.
    """
    watched: dict[str, Any] = {"device": device, "precision": precision, "track": "none"}
    check(method, settings, network=network, protocol=protocol, **watched)
    entry = METHODS.get(method)
    job = _job(
        entry, _config(entry, settings), real, ipc, network, seed, device, precision, minutes=None, out=None, tag=None,
        protocol=protocol or entry.protocol, track="none",
    )  # fmt: skip
    earlier = None
    with contextlib.suppress(CondenseError):
        earlier = read_job(run_dir)
    if earlier and (earlier.key(), earlier.protocol, earlier.out) == (job.key(), job.protocol, str(out.resolve())):
        return resume(run_dir, quiet=quiet)
    return distill(
        method, real, ipc, network=network, seed=seed, protocol=protocol, out=out, run_dir=run_dir, force=True,
        quiet=quiet, **watched, **settings,
    )  # fmt: skip
