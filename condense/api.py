"""The functions behind the public names: ``condense.task``, ``distill``, ``evaluate``, ``load`` and ``fit``; and
``experts`` and ``teachers``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import networks, projectors, rng, tasks, trajectories
from condense import teachers as squeezed
from condense.banks import PLAN, parts_of
from condense.config import build
from condense.distilled import DistilledSet, check_writable, packaged_sets, replacing
from condense.errors import CondenseError, did_you_mean
from condense.evaluation import data_word, evaluate, fit
from condense.protocols import get_protocol
from condense.registry import METHODS, Method
from condense.run import (
    CHECKPOINT,
    PREVIOUS,
    VIEW_LABELS,
    VIEW_LABELS_STATE,
    Diverged,
    Run,
    Step,
    deterministic_kernels,
    device_name,
    peak_memory,
    pick_device,
    pick_precision,
)
from condense.synthetic import SyntheticSet
from condense.tasks import DataOptions, Task
from condense.tracking import check_tracker
from condense.version import __version__

__all__ = ["distill", "evaluate", "experts", "fit", "load", "resume", "task", "teachers"]

CONFIG, RESULT = "config.json", "result.json"


def task(data: Any, *, name: str | None = None, download: bool = False, **options: Any) -> Task:
    """The real data: a registered name, a folder, an ``.npz`` or ``.h5``, tensors, or a map-style Dataset.

    Args:
        data: see ``condense.tasks.load``.
        name: what records call it.
        download: fetch a registered dataset that is not on disk.
        options: resize, grey, mirror, zca (see :class:`condense.tasks.DataOptions`).
    """
    return tasks.load(data, build(DataOptions, options, "the data"), download=download, name=name)


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


def check_experts(
    method: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    count: int | None = None,
    epochs: int | None = None,
    dtype: str = "float16",
    held_out: float | None = None,
    **watched: Any,
) -> Any:
    """Finds all mistakes that can be found without the real data; arguments as in :func:`experts`.

    Returns:
        The method's settings, with those two numbers in them.

    Raises:
        CondenseError: every mistake, in one line.
    """
    entry = METHODS.get(method)
    if not hasattr(entry.config, "training"):
        able = [name for name in METHODS.names() if hasattr(METHODS.get(name).config, "training")]
        raise CondenseError(f"--for {method}: this method has no experts; these have: {', '.join(able) or 'none'}")
    flags = {"count": ("num_experts", count), "epochs": ("buffer_epochs", epochs)}
    faults = [
        f"--{flag} {value}: must be at least 1" for flag, (_, value) in flags.items() if value is not None and value < 1
    ]
    settings = {**settings, **{key: value for key, value in flags.values() if value is not None and value > 0}}
    if held_out is not None and not 0 <= held_out < 1:
        faults.append(f"--held-out {held_out:g}: must be at least 0 and less than 1")
    if dtype not in trajectories.DTYPES:
        faults.append(f"--dtype {dtype}: unknown{did_you_mean(dtype, trajectories.DTYPES)}")

    def flags_are_right() -> None:
        if faults:
            raise CondenseError("; ".join(faults))

    all_at_once(flags_are_right, lambda: check(method, settings, options, **watched))
    return _config(entry, settings)


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
) -> squeezed.Made:
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
    architectures = config.architectures(METHODS.get(method).network if method else squeezed.NETWORK)
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
    path = Path(out) if out else squeezed.cache_file(run, squeezing)
    with _training(run, path, "smaller --networks or teacher_batch"):
        return squeezed.record(
            run, squeezing, path, architectures=architectures, count=config.num_teachers, force=force
        )


def check_teachers(
    method: str | None,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    networks: str | Sequence[str] | None = None,
    count: int | None = None,
    epochs: int | None = None,
    held_out: float | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Any:
    """Finds all mistakes that can be found without the real data; arguments as in :func:`teachers`.

    Returns:
        The settings of the method, or :class:`~condense.teachers.TeacherOptions`, with what was given in them.

    Raises:
        CondenseError: every mistake, in one line.
    """
    config = METHODS.get(method).config if method else squeezed.TeacherOptions
    if not hasattr(config, "squeezing"):
        able = [name for name in METHODS.names() if hasattr(METHODS.get(name).config, "squeezing")]
        raise CondenseError(f"--for {method}: this method has no teachers; these have: {', '.join(able) or 'none'}")
    flags = {"count": ("num_teachers", count), "epochs": ("teacher_epochs", epochs)}
    faults = [
        f"--{flag} {value}: must be at least 1" for flag, (_, value) in flags.items() if value is not None and value < 1
    ]
    settings = {**settings, **{key: value for key, value in flags.values() if value is not None and value > 0}}
    if networks is not None:
        settings["committee"] = networks if isinstance(networks, str) else ",".join(networks)
    if held_out is not None and not 0 <= held_out < 1:
        faults.append(f"--held-out {held_out:g}: must be at least 0 and less than 1")
    if settings.get("teachers"):
        faults.append(f"teachers={settings['teachers']}: are there already; leave it out to train others")

    def flags_are_right() -> None:
        if faults:
            raise CondenseError("; ".join(faults))

    def settled() -> Any:
        if method:
            return _config(METHODS.get(method), settings)
        built = build(squeezed.TeacherOptions, settings, "teachers")
        built.check_teachers()
        return built

    *_, built = all_at_once(
        flags_are_right,
        lambda: build(DataOptions, options or {}, "the data"),
        lambda: pick_precision(precision, pick_device(device)),
        settled,
    )
    return built


def _job(
    entry: Method,
    config: Any,
    real: Task,
    ipc: int,
    network: str | Callable[..., nn.Module] | None,
    seed: int,
    device: str,
    precision: str,
    **rest: Any,
) -> Job:
    """The resolved configuration of what was asked for."""
    return Job(
        method=entry.name,
        data={"source": real.source, "name": real.name, "options": dataclasses.asdict(real.options)},
        fingerprint=real.fingerprint,
        ipc=ipc,
        network=networks.name_of(network or entry.network),
        seed=seed,
        device=str(pick_device(device)),
        precision=pick_precision(precision, pick_device(device)),
        settings=dataclasses.asdict(config),
        **rest,
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


def command(
    method: str,
    real: Task,
    ipc: int,
    *,
    network: str | None = None,
    seed: int = 0,
    protocol: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    **settings: Any,
) -> str:
    """The command line of ``condense distill`` that these arguments stand for, as the manifest states it."""
    entry = METHODS.get(method)
    rest = {"minutes": None, "out": None, "tag": None, "protocol": protocol or entry.protocol, "track": "none"}
    job = _job(entry, _config(entry, settings), real, ipc, network, seed, device, precision, **rest)
    return _command(job, entry, real)


def resume(run_dir: str | Path, *, minutes: float | None = None, quiet: bool = True) -> DistilledSet:
    """Goes on with a run that was killed, interrupted or stopped, and ends with the same set, bit for bit.

    The set of a finished run is only loaded.

    Args:
        run_dir: the run's folder.
        minutes: new limit for a run with a limit; it counts the time already spent.
        quiet: no progress on stderr.

    Raises:
        CondenseError: the folder is no run, its data have changed, or its config differs from the checkpoint's.
    """
    directory, job = Path(run_dir), read_job(run_dir)
    if minutes is None and job.out is not None and is_finished(directory):
        return DistilledSet.load(job.out)
    if job.data["source"] is None or job.network.startswith(networks.FACTORY):
        what = "data were" if job.data["source"] is None else "network was"
        raise CondenseError(f"{directory}: its {what} given in Python; such a run cannot be resumed from its folder")
    try:
        check(
            job.method, job.settings, job.data["options"], network=job.network, protocol=job.protocol,
            precision=job.precision, minutes=job.minutes if minutes is None else minutes, track=job.track,
        )  # fmt: skip
        pick_device(job.device)
    except CondenseError as fault:
        raise CondenseError(f"{directory}: {fault}") from fault
    entry = METHODS.get(job.method)
    config = _config(entry, job.settings)
    real = tasks.load(job.data["source"], DataOptions(**job.data["options"]), name=job.data["name"])
    if real.fingerprint != job.fingerprint:
        raise CondenseError(
            f"{directory}: the data at {job.data['source']} changed since the run began; restore them or start anew"
        )
    _check_fit(real, job.ipc, job.network)
    if minutes is not None:
        job = dataclasses.replace(job, minutes=minutes, force=job.force or is_finished(directory))
        _write_config(directory, job)
        (directory / RESULT).unlink(missing_ok=True)
    return _execute(job, entry, config, real, job.network, directory, quiet=quiet, resume=True)


def is_finished(run_dir: str | Path) -> bool:
    """Whether the run ended and the set that it wrote is still there, and still that set."""
    try:
        result = json.loads((Path(run_dir) / RESULT).read_text())
        return result["out"] is not None and DistilledSet.load(result["out"]).sha256() == result["sha256"]
    except (OSError, ValueError, KeyError, TypeError, CondenseError):
        return False


def check(
    method: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    network: str | Callable[..., nn.Module] | None = None,
    protocol: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    minutes: float | None = None,
    track: str = "none",
) -> None:
    """Finds all mistakes that can be found without the real data; arguments as in :func:`distill`.

    Args:
        options: of the data (see :class:`condense.tasks.DataOptions`).

    Raises:
        CondenseError: every mistake, in one line.
    """
    entry = METHODS.get(method)
    all_at_once(
        lambda: _config(entry, settings),
        lambda: build(DataOptions, options or {}, "the data"),
        lambda: networks.check(network or entry.network),
        lambda: get_protocol(protocol or entry.protocol),
        lambda: pick_precision(precision, pick_device(device)),
        lambda: _check_minutes(minutes),
        lambda: check_tracker(track),
    )


def all_at_once(*checks: Callable[[], Any]) -> list[Any]:
    """What the functions return; the mistakes that they find are raised together, in one line."""
    results, faults = [], []
    for run_check in checks:
        try:
            results.append(run_check())
        except CondenseError as fault:
            faults.append(str(fault))
    if faults:
        raise CondenseError("; ".join(faults))
    return results


def _config(entry: Method, settings: Mapping[str, Any]) -> Any:
    config: Any = build(entry.config, settings, f"the method '{entry.name}'")
    if getattr(config, "experts", ""):  # a run may be resumed from another folder
        config = dataclasses.replace(config, experts=str(Path(config.experts).resolve()))
    if getattr(config, "teachers", "") and not squeezed.is_public(config.teachers):
        config = dataclasses.replace(config, teachers=str(Path(config.teachers).resolve()))
    if getattr(config, "steps", 1) < 1:
        raise CondenseError(f"steps={config.steps}: must be at least 1")
    return config


def _check_minutes(minutes: float | None) -> None:
    if minutes is not None and not minutes > 0:
        raise CondenseError(f"--minutes {minutes:g}: must be more than 0")


def _check_fit(real: Task, ipc: int, network: str | Callable[..., nn.Module]) -> None:
    """Refuses what the real data cannot give, before any work: more images than a class has, a network too deep."""
    smallest = int(real.counts.argmin())
    if ipc < 1:
        raise CondenseError(f"--ipc {ipc}: must be at least 1")
    if ipc > real.counts[smallest]:
        raise CondenseError(
            f"--ipc {ipc}: class '{real.classes[smallest]}' of {real.name} has only {real.counts[smallest]} images; "
            f"give at most {real.counts[smallest]}"
        )
    with rng.seeded("check"):
        networks.build(network, real.shape, real.num_classes)


@dataclasses.dataclass(frozen=True)
class Job:
    """The resolved configuration of a run, as written to ``config.json``."""

    method: str
    data: dict[str, Any]
    fingerprint: str
    ipc: int
    network: str
    seed: int
    device: str
    precision: str
    minutes: float | None
    out: str | None
    tag: str | None
    protocol: str
    track: str
    settings: dict[str, Any]
    deterministic: bool = False
    force: bool = False
    version: str = __version__

    def key(self) -> str:
        """Digest of all that decides the result; where it is written, how long it may take and who watches do not."""
        parts = dataclasses.asdict(self)
        parts["data"] = self.data["options"]  # the pixels are known by their fingerprint
        for free in ("out", "tag", "protocol", "track", "minutes", "force", "version"):
            del parts[free]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_job(run_dir: str | Path) -> Job:
    """The resolved configuration of a run directory.

    Raises:
        CondenseError: the folder is no run.
    """
    try:
        return Job(**json.loads((Path(run_dir) / CONFIG).read_text()))
    except (OSError, ValueError, TypeError) as fault:
        raise CondenseError(
            f"{run_dir}: not a run directory (no readable {CONFIG}); give the --run-dir of a `condense distill`"
        ) from fault


def _estimated_bytes(real: Task, ipc: int) -> int:
    channels, height, width = real.shape
    auxiliary = sum(array.nbytes for array in real.transform.arrays().values())
    return 4 * ipc * real.num_classes * channels * height * width + auxiliary


def _prepare(directory: Path, job: Job) -> None:
    """Makes the run directory and writes the resolved config; what an earlier run left there goes."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / CONFIG).exists():
        for name in (RESULT, CHECKPOINT, PREVIOUS, PLAN, VIEW_LABELS, VIEW_LABELS_STATE, "log.jsonl"):
            (directory / name).unlink(missing_ok=True)
        for name in ("previews", "tensorboard"):
            shutil.rmtree(directory / name, ignore_errors=True)
    _write_config(directory, job)


def _write_config(directory: Path, job: Job) -> None:
    _write_json(directory / CONFIG, dataclasses.asdict(job))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _execute(
    job: Job,
    entry: Method,
    config: Any,
    real: Task,
    network: str | Callable[..., nn.Module],
    directory: Path | None,
    *,
    quiet: bool,
    resume: bool,
) -> DistilledSet:
    """Runs the method, then writes the set and the run's result."""

    @functools.cache
    def begin() -> None:
        if directory is not None and not resume:
            _prepare(directory, job)

    run = Run(
        real,
        job.ipc,
        network,
        seed=job.seed,
        device=pick_device(job.device),
        precision=job.precision,
        directory=directory,
        minutes=job.minutes,
        resume=resume,
        config_key=job.key(),
        name=job.method,
        quiet=quiet,
        track=job.track,
        begin=begin,
    )
    try:
        with deterministic_kernels(job.deterministic), run.stop_on_signal():
            synthetic = entry.function(real, config, run)
        distilled = _finished(job, entry, real, run, synthetic)
        if run.ranks.leads:
            begin()  # a method without steps has not
            if job.out is not None:
                _refuse_foreign(job, directory, distilled, resume)
                distilled.save(job.out, force=True)
            if directory is not None:
                result = {
                    "out": job.out,
                    "steps": run.steps_done,
                    "seconds": round(run.elapsed, 2),
                    "sha256": distilled.sha256(),
                }
                _write_json(directory / RESULT, result)
                if job.out is not None:  # the set has them
                    for name in (VIEW_LABELS, VIEW_LABELS_STATE):
                        (directory / name).unlink(missing_ok=True)
    except Diverged as fault:
        if run.synthetic is None or job.out is None or not run.ranks.leads:
            raise
        kept = run.salvage() if run.salvage else run.synthetic
        _finished(job, entry, real, run, kept).save(job.out, force=True)
        raise CondenseError(f"{fault}, written to {job.out}") from fault
    except OSError as fault:
        if directory is None:
            raise
        raise CondenseError(
            f"{fault.filename or directory}: {fault.strerror or fault}; mend that, then: condense resume {directory}"
        ) from fault
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise CondenseError(
            f"out of memory on {run.device}: lower --ipc or batch_real, or take a smaller --network"
        ) from fault
    run.ranks.close()
    return distilled


def _refuse_foreign(job: Job, directory: Path | None, distilled: DistilledSet, resume: bool) -> None:
    """A resumed run does not replace a set that another run wrote to its file in the meantime."""
    if not resume or job.force or job.out is None or not Path(job.out).exists():
        return
    with contextlib.suppress(CondenseError):
        if DistilledSet.load(job.out).sha256() == distilled.sha256():
            return
    raise CondenseError(f"{job.out}: another set lies there now; move it away, then: condense resume {directory}")


def _finished(job: Job, entry: Method, real: Task, run: Run, synthetic: SyntheticSet) -> DistilledSet:
    """The synthetic set as a DistilledSet with its manifest."""
    stored = synthetic.images.detach().cpu()
    named = run.trajectories or run.teachers
    manifest = {
        "name": _set_name(job, real),
        "dataset": real.name,
        "classes": list(real.classes),
        "ipc": job.ipc,
        "space": synthetic.space,
        "decode": [stage.describe() for stage in synthetic.stages if stage.at_load],
        "distill_decode": [stage.describe() for stage in synthetic.stages if not stage.at_load],
        "mirror": real.mirror,
        "method": job.method,
        "paper": entry.paper,
        "command": _command(job, entry, real),
        "settings": job.settings,
        "network": job.network,
        "seed": job.seed,
        "steps_done": run.steps_done,
        "stopped_early": run.stopped_early,
        "preparation": run.preparation,
        **_learned(synthetic),
        **({"trajectories": run.trajectories} if run.trajectories else {}),
        **({"teachers": run.teachers} if run.teachers else {}),
        **({"label_source": synthetic.label_source} if synthetic.label_source else {}),
        "protocol": job.protocol,
        "data": {"fingerprint": real.fingerprint, "options": job.data["options"]},
        "precision": job.precision,
        "random_hash_version": rng.HASH_VERSION,
        "code_version": __version__,
        "cost": {
            "seconds": round(run.elapsed - run.preparation.get("seconds", 0.0), 2),
            # Experts and teachers of a named file are free of the time limit, but not of what the set took.
            "preparation_seconds": run.preparation.get("seconds", named.get("seconds", 0.0)),
            "device": device_name(run.device),
            "peak_memory": peak_memory(run.device),
        },
    }
    return DistilledSet(stored, synthetic.labels.to(stored.device), real.transform.to(stored.device), manifest)


def _learned(synthetic: SyntheticSet) -> dict[str, float]:
    """The learned step size, where there is one that can serve as a learning rate."""
    rate = 0.0 if synthetic.step_size is None else float(synthetic.step_size)
    return {"learned_lr": rate} if 0 < rate < math.inf else {}


def _command(job: Job, entry: Method, real: Task) -> str:
    """The command line that makes this set again; what is as by default is left out."""
    words = ["condense", "distill", job.method, "--data", data_word(real), "--ipc", str(job.ipc)]
    words += ["--network", job.network] * (job.network != entry.network)
    words += ["--seed", str(job.seed)] * (job.seed != 0) + ["--precision", job.precision]
    words += ["--minutes", f"{job.minutes:g}"] if job.minutes is not None else []
    words += ["--tag", job.tag, "--out", f"{_set_name(job, real).replace('/', '-')}.h5"] if job.tag else []
    for given, config in ((job.settings, entry.config), (job.data["options"], DataOptions)):
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        # Where somebody's experts or teachers lie is in the settings; in a command it is a place to fill in.
        shown = {**given, "experts": "PATH"} if given.get("experts") else given
        if given.get("teachers") and not squeezed.is_public(given["teachers"]):
            shown = {**shown, "teachers": "PATH"}
        if given.get("backbone"):
            shown = {**shown, "backbone": projectors.shown(given["backbone"])}
        words += [f"{key}={_word(value)}" for key, value in shown.items() if value != defaults[key]]
    words += ["deterministic=true"] * job.deterministic
    words += [f"protocol={job.protocol}"] * (job.protocol != entry.protocol)
    return shlex.join(words)


def _set_name(job: Job, real: Task) -> str:
    return f"{real.name}/{job.method}-ipc{job.ipc}" + (f".{job.tag}" if job.tag else "")


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (bool, list)) else str(value)


class _Trial(Run):
    """Makes the first steps of a run and notes when each ended; stops after ``SECONDS``, but not before the third."""

    SECONDS = 3.0
    rehearses = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ends: list[float] = []
        self.loops = self.state_bytes = 0

    def optimise(self, synthetic: SyntheticSet, steps: int, **options: Any) -> Iterator[Step]:
        """Of several loops, which are alike, the first tells the pace."""
        self.loops += 1
        for step in super().optimise(synthetic, steps, **options):
            self.state_bytes = max(self.state_bytes, _nbytes(step.optimizer.state_dict()))
            yield step
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if self.loops > 1:
                return
            self.ends.append(time.monotonic())
            if len(self.ends) > 2 and self.ends[-1] - self.ends[0] > self.SECONDS:
                return


def _nbytes(state: Any) -> int:
    """Of all tensors in nested dictionaries."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(_nbytes, state.values())) if isinstance(state, dict) else 0


def measure(
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
    check(method, settings, network=network, device=device, precision=precision)
    entry = METHODS.get(method)
    config = _config(entry, settings)
    _check_fit(real, ipc, network or entry.network)
    where = pick_device(device)
    began = time.monotonic()
    precision = pick_precision(precision, where)
    trial = _Trial(real, ipc, network or entry.network, device=where, precision=precision, quiet=True)
    synthetic = entry.function(real, config, trial)
    seconds, per_step, steps = time.monotonic() - began, None, getattr(config, "steps", None)
    if steps is not None and trial.ends:
        warm = len(trial.ends) - 1  # the first step warms up
        per_step = (trial.ends[-1] - trial.ends[0]) / warm if warm else seconds
        steps *= trial.loops
        seconds = trial.ends[0] - began + per_step * (steps - 1)
    seconds += trial.expected_preparation + trial.expected_labelling
    made = DistilledSet(synthetic.images.detach(), synthetic.labels, real.transform.to(synthetic.images.device), {})
    return {
        "seconds_per_step": per_step,
        "steps": steps,
        "seconds": seconds,
        "preparation_seconds": trial.expected_preparation,
        "labelling_seconds": trial.expected_labelling,
        "peak_memory": peak_memory(where),
        "set_bytes": made.nbytes(),
        "views": _labelled(made, config, trial),
        "checkpoint_bytes": 2 * trial.state_bytes,  # the last one and the one before it
        "trajectories": _trajectories(config, real, network or entry.network, where),
        "real_bytes": int(real.train.images.nbytes + real.test.images.nbytes),
        "device": device_name(where),
    }


def _labelled(made: DistilledSet, config: Any, trial: Run) -> dict[str, Any] | None:
    """What labels of views the set would bring, and whose; None where it would bring others."""
    if not made.labels.per_view:
        return None
    epochs, teachers = getattr(config, "label_epochs", None), trial.teachers.get("networks", [])
    return {"kind": made.labels.kind, "images": len(made.labels), "epochs": epochs, "teachers": teachers}


def _trajectories(
    config: Any, real: Task, network: str | Callable[..., nn.Module], device: torch.device
) -> dict[str, Any] | None:
    """What the experts of a method need: bytes of their file, and where which of them lie; None where it has none."""
    if not hasattr(config, "training"):
        return None
    count, epochs, layout = config.num_experts, config.epochs_needed(), trajectories.layout_of(network, real)
    first, last = config.epochs_read()
    nbytes, needed = (trajectories.nbytes(count, span, layout) for span in (epochs, last - first))
    if config.experts:
        file = trajectories.read(Path(config.experts))
        count, nbytes = min(count, file.count), file.path.stat().st_size
        needed = trajectories.nbytes(count, last - first, layout, file.manifest["dtype"])
    place = trajectories.residency(needed, device)
    return {"experts": count, "epochs": epochs, "bytes": nbytes, "resident_bytes": needed, "place": place}
