"""The public functions ``condense.task``, ``load``, ``distill`` and ``evaluate``, and those that train experts and
teachers. Here the kind of data, sets and methods (images or graphs) decides which room does the work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from condense import data as data_module
from condense import graphs, jobs, judge
from condense.config import build_config, whole_number
from condense.data import DataOptions, Task
from condense.device import out_of_memory_advice, pick_device, second_derivatives
from condense.engine import Run
from condense.errors import CondenseError, did_you_mean
from condense.files import as_path, check_writable
from condense.formatting import shorten
from condense.graphs import GraphOptions, GraphSet, GraphTask
from condense.hdf5 import read_block_format
from condense.jobs import resume
from condense.networks import MemberKey, TeacherFile, calibrate, memory_format
from condense.pretraining import (
    DEFAULT_TEACHER_NETWORK,
    TrainedFile,
    TrajectoryFile,
    expert_cache_file,
    load_or_train_scores,
    teacher_cache_file,
    train_teacher_file,
    train_trajectory_file,
)
from condense.registry import METHODS, Method
from condense.selection import ScoreTable, write_score_table
from condense.sets import DistilledSet, packaged_sets
from condense.tracking import is_main_process

__all__ = [
    "distill",
    "distill_or_resume",
    "evaluate",
    "experts",
    "image_task",
    "load",
    "resume",
    "scores",
    "task",
    "teachers",
]


DEFAULT_SCORE_NETWORK = "convnet-d3-w128-in"
"""Architecture of the networks that score images, where none is named."""


def task(data: Any, *, name: str | None = None, download: bool = False, **options: Any) -> Task:
    """Loads real data: a registered name, a folder, a ``.csv``, ``.npz`` or ``.h5`` file, tensors, or a Dataset; or
    graphs: a ``.csv`` of SMILES, ``tu:NAME``, or lists of PyTorch Geometric's ``Data``.

    Args:
        data: see :func:`condense.data.load_task`, and for graphs :func:`condense.graphs.load_graph_task`.
        name: name in records.
        download: fetch a registered dataset that is not on disk.
        options: resize, grey, mirror, zca, split, ... (see :class:`condense.data.DataOptions`); for graphs those of
            :class:`condense.graphs.GraphOptions`.

    Returns:
        A :class:`condense.data.Task`, or for graphs a :class:`condense.graphs.GraphTask`.

    Raises:
        CondenseError: the data do not exist or are invalid.
    """
    if graphs.is_graph_data(data):
        of_graphs: Any = graphs.load_graph_task(data, build_config(GraphOptions, options, "graphs"), name=name)
        return of_graphs
    return image_task(data, name=name, download=download, **options)


def image_task(data: Any, *, name: str | None = None, download: bool = False, **options: Any) -> Task:
    """Loads images, as :func:`task` does."""
    checked = build_config(DataOptions, options, "the data")
    if checked.prune is not None:  # a run may be resumed from another folder
        checked = dataclasses.replace(checked, prune=str(as_path(checked.prune, "prune=").resolve()))
    return data_module.load_task(data, checked, download=download, name=name)


def load(source: str | Path, *, data: Task | Any = None) -> DistilledSet:
    """Loads and verifies a distilled set: a file, or the name of a ready-made set (``condense ls sets``).

    Args:
        source: the file or the name.
        data: the real data of a selection whose file holds indices into them (``store=indices``): a :class:`Task`, or
            the ``data`` argument of ``condense.task``. Without them such a set has labels and a manifest only.

    Returns:
        A :class:`condense.DistilledSet`, or for graphs a :class:`condense.graphs.GraphSet`, which has ``graphs``
        instead of ``images``.

    Raises:
        CondenseError: no such file or name, or the file is damaged or has a different format; or its indices refer to
            other data.
    """
    if str(source) in packaged_sets():
        source = packaged_sets()[str(source)]
    try:
        exists = Path(source).exists()
    except (OSError, TypeError, ValueError):  # too long, not a path, or with a NUL character
        exists = False
    if not exists and not (isinstance(source, (str, Path)) and str(source).endswith(".h5")):
        hint = did_you_mean(source, packaged_sets()) or "; give the .h5 that `condense distill` writes"
        raise CondenseError(f"'{shorten(str(source), 200)}' is no file and no ready-made set{hint}")
    if read_block_format(Path(source)) == graphs.GRAPHS_FORMAT.name:
        of_graphs: Any = GraphSet.load(source)
        return of_graphs
    loaded = DistilledSet.load(source)
    if data is None or loaded.indices is None:
        return loaded
    options = loaded.manifest["data"].get("options", {})
    options = {name: value for name, value in options.items() if name not in data_module.PRUNING_OPTIONS}
    return loaded.with_data(data if isinstance(data, Task) else image_task(data, **options))


@functools.wraps(judge.evaluate)
def evaluate(distilled: DistilledSet | GraphSet, task: Any, **options: Any) -> dict[str, Any]:
    if isinstance(distilled, GraphSet):
        if not isinstance(task, GraphTask):
            names = distilled.manifest.get("data", {}).get("options", {})
            task = graphs.load_graph_task(task, build_config(GraphOptions, names, "graphs"))
        return graphs.evaluate_graphs(distilled, task, **options)
    return judge.evaluate(distilled, task, **options)


def distill(
    method: str,
    data: Task | GraphTask | Any,
    ipc: int | None = None,
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
    """Distils real data to a small synthetic set.

    The same call continues an unfinished run in ``run_dir``, also with a network or data that were given in Python.

    Args:
        method: a name of ``condense ls methods``.
        data: a :class:`Task`, or the ``data`` argument of ``condense.task``.
        ipc: stored images per class; methods that distil graphs have a default.
        network: architecture of the networks; by default that of the method.
        seed: random seed; the same seed gives the same set.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16, for matrix products that need no second derivative.
        minutes: time limit. The run stops cleanly and keeps its current set; schedules still follow ``steps``.
        out: file to write; None writes no file.
        run_dir: folder for checkpoints, log and previews; None writes none, so that a killed run is lost.
        tag: suffix of the set's name, as in ``cifar10/dm-ipc10.paper``.
        protocol: evaluation protocol named in the manifest; by default that of the method.
        force: overwrite ``out`` and an earlier run in ``run_dir``.
        quiet: no progress on stderr.
        track: auto (TensorBoard if installed), tensorboard, trackio or none.
        deterministic: use only deterministic kernels, so that equal seeds give equal bits on CUDA, as always on CPUs.
        settings: hyper-parameters of the method's config.

    Returns:
        The distilled set, a :class:`condense.DistilledSet` or, of graphs, a :class:`condense.graphs.GraphSet`.

    Raises:
        CondenseError: invalid arguments, found before the work; or the run diverged, in which case the last finite set
            is written to ``out`` first.
    """
    checked: dict[str, Any] = {"network": network, "protocol": protocol, "device": device, "precision": precision}
    entry = METHODS.get(method)
    if entry.task == "graphs":
        graphs.check_graph_request(
            entry,
            settings,
            tag=tag,
            minutes=minutes,
            run_dir=run_dir,
            track=track,
            deterministic=deterministic,
            **checked,
        )
        real = _of_kind(entry, data if isinstance(data, GraphTask | Task) else task(data))
        ipc = whole_number(entry.ipc if ipc is None else ipc, "--ipc")
        files: dict[str, Any] = {"out": out, "tag": tag, "protocol": protocol, "force": force}
        of_graphs: Any = graphs.distill_graphs(entry, real, ipc, seed=seed, settings=settings, **files)
        return of_graphs
    ipc, seed = whole_number(ipc, "--ipc"), whole_number(seed, "--seed")
    out = None if out is None else as_path(out, "--out")
    directory = None if run_dir is None else as_path(run_dir, "--run-dir")
    jobs.check_request(method, settings, minutes=minutes, track=track, tag=tag, **checked)
    settings, network = _fill_from_files(entry, settings, network, quiet)
    config = jobs.resolve_settings(entry, settings, ipc)
    real = _of_kind(entry, data if isinstance(data, GraphTask | Task) else task(data))
    if entry.labels != "features":
        jobs.check_classes(real, f"method '{entry.name}'")
    job = jobs.resolve_job(
        entry,
        config,
        real,
        ipc,
        network,
        seed,
        device,
        precision,
        minutes=minutes,
        tag=tag,
        track=track,
        force=force,
        out=str(out.resolve()) if out else None,
        protocol=protocol or jobs.default_protocol(entry, config),
        deterministic=deterministic,
    )
    jobs.check_fit(jobs.prune_task(real), ipc, network or entry.network, config)
    continues = directory is not None and not force and jobs.is_unfinished(directory, job)
    if not continues:
        jobs.check_outputs(real, ipc, out, directory, force=force)
    return jobs.run_job(job, entry, config, real, network or entry.network, directory, quiet=quiet, resume=continues)


def _fill_from_files(entry: Method, settings: dict[str, Any], network: Any, quiet: bool) -> tuple[dict[str, Any], Any]:
    """The settings and the network, completed from the files among the settings, with a line on what was taken."""
    settings, network, taken = jobs.fill_from_files(entry, settings, network)
    if taken and not quiet and is_main_process():
        print(f"condense: {taken}", file=sys.stderr)
    return settings, network


def _of_kind(entry: Method, real: Task | GraphTask) -> Any:
    """The real data, if they are of the kind that a method distils.

    Raises:
        CondenseError: they are not.
    """
    kind = "graphs" if isinstance(real, GraphTask) else "images"
    if kind != entry.task:
        names = [name for name in METHODS.names() if METHODS.get(name).task == kind]
        few = f"; these distil {kind}: {', '.join(names[:5])}" + ", ..." * (len(names) > 5)
        raise CondenseError(f"method '{entry.name}' distils {entry.task}, but {real.name} has {kind}{few}")
    return real


def distill_or_resume(
    method: str,
    real: Task,
    ipc: int,
    *,
    out: Path,
    run_dir: Path,
    network: str | Callable[..., nn.Module] | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    protocol: str | None = None,
    quiet: bool = True,
    **settings: Any,
) -> DistilledSet:
    """Makes the same set as :func:`distill`, resuming an earlier call with the same arguments.

    A run with other settings or data in ``run_dir`` is replaced.
    """
    checked: dict[str, Any] = {"device": device, "precision": precision, "track": "none"}
    jobs.check_request(method, settings, network=network, protocol=protocol, **checked)
    entry = METHODS.get(method)
    settings, network = _fill_from_files(entry, settings, network, quiet)
    fields: dict[str, Any] = {"minutes": None, "tag": None, "track": "none", "protocol": protocol or entry.protocol}
    config = jobs.resolve_settings(entry, settings, ipc)
    job = jobs.resolve_job(entry, config, real, ipc, network, seed, device, precision, out=str(out.resolve()), **fields)
    if jobs.is_resumable(run_dir, job):
        return resume(run_dir, quiet=quiet)
    files: dict[str, Any] = {"out": out, "run_dir": run_dir, "force": True, "quiet": quiet}
    return distill(method, real, ipc, network=network, seed=seed, protocol=protocol, **files, **checked, **settings)


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
) -> TrainedFile[TrajectoryFile, int]:
    """Trains experts on real data and writes their trajectories to one file.

    Repeat the call to resume after a stop; a larger ``count`` adds experts to the file.

    Args:
        data: a :class:`Task`, or the ``data`` argument of ``condense.task``.
        network: architecture of the experts; by default that of the method.
        method: method that uses the experts; its settings define their training.
        count: number of experts; by default the method's ``num_experts``.
        epochs: epochs of training; by default the number that the method reads (its ``buffer_epochs``).
        out: file to write; by default the file in the cache in which methods look for such experts.
        seed: random seed; the same seed gives the same experts.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16, unless the method requires one of them.
        dtype: float16 or float32, the type of the stored weights.
        held_out: share of each class that is not trained on but used to measure accuracy; by default the method's.
        force: replace ``out`` if it belongs to different data, networks or training, or is damaged.
        quiet: no progress on stderr.
        settings: hyper-parameters of the method.

    Returns:
        The file and the numbers of the experts that were trained now.

    Raises:
        CondenseError: invalid arguments, found before the work; or an expert diverged.
    """
    checked: dict[str, Any] = {"network": network, "held_out": held_out, "device": device, "precision": precision}
    seed = whole_number(seed, "--seed")
    config = jobs.check_experts(method, settings, count=count, epochs=epochs, dtype=dtype, **checked)
    real = data if isinstance(data, Task) else image_task(data)
    network = network or METHODS.get(method).network
    jobs.check_classes(real, "training experts")
    jobs.check_fit(real, 1, network)
    training, epochs = config.expert_training(real), config.epochs_needed()
    if held_out is not None:
        training = dataclasses.replace(training, held_out=held_out)
    run = _pretraining_run("experts", real, network, seed, device, precision, quiet)
    path = Path(out) if out else expert_cache_file(run, training, epochs, dtype)
    with _interruptible(run, "a smaller --network or batch"), second_derivatives():
        return train_trajectory_file(
            run, training, path, count=config.num_experts, epochs=epochs, dtype=dtype, force=force
        )


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
    objective: str | None = None,
    force: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> TrainedFile[TeacherFile, MemberKey]:
    """Trains teachers on real data and writes them to one file.

    Repeat the call to resume after a stop; a larger ``count`` or other networks add teachers to the file.

    Args:
        data: a :class:`Task`, or the ``data`` argument of ``condense.task``.
        networks: architectures, joined by commas or as a list; by default those of the method.
        method: method that uses the teachers; its settings define their training. None: those of ``objective``.
        count: teachers of each architecture; by default ``num_teachers`` of the settings.
        epochs: epochs of training; by default ``teacher_epochs`` of the settings.
        out: file to write; by default the file in the cache in which methods look for such teachers.
        seed: random seed; the same seed gives the same teachers.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16, unless the method requires one of them.
        held_out: share of each class that is not trained on but used to measure accuracy; by default the method's. If
            it is 0, accuracy is measured on the real test images.
        objective: what the teachers are trained for if no method says it: classes (the default), or barlow (Barlow
            Twins, without classes; their accuracy is that of a linear probe).
        force: replace ``out`` if it belongs to different data or training, or is damaged.
        quiet: no progress on stderr.
        settings: hyper-parameters of the method.

    Returns:
        The file and the teachers that were trained now.

    Raises:
        CondenseError: invalid arguments, found before the work; or a teacher diverged.
    """
    checked: dict[str, Any] = {"held_out": held_out, "device": device, "precision": precision}
    seed = whole_number(seed, "--seed")
    checked["objective"] = objective
    config = jobs.check_teachers(method, settings, networks=networks, count=count, epochs=epochs, **checked)
    real = data if isinstance(data, Task) else image_task(data)
    architectures = config.architectures(METHODS.get(method).network if method else DEFAULT_TEACHER_NETWORK)
    for architecture in architectures:
        jobs.check_fit(real, 1, architecture)
    training = config.teacher_training(real)
    if training.objective is None:
        jobs.check_classes(real, "training teachers on classes")
    if held_out is not None:
        training = dataclasses.replace(training, held_out=held_out)
    run = _pretraining_run("teachers", real, architectures[0], seed, device, precision, quiet)
    path = Path(out) if out else teacher_cache_file(run, training)
    with _interruptible(run, "smaller --networks or teacher_batch"):
        return train_teacher_file(
            run, training, path, architectures=architectures, count=config.num_teachers, force=force
        )


def scores(
    data: Task | Any,
    *,
    network: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    force: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> ScoreTable:
    """Scores the train images of real data: trains networks, and computes all scores from their training.

    Networks are kept in the cache; a repeated call, and methods with the same settings, train none.

    Args:
        data: a :class:`Task`, or the ``data`` argument of ``condense.task``.
        network: architecture of the networks, by default ``DEFAULT_SCORE_NETWORK``.
        out: file of the table; None writes none.
        seed: random seed; the same seed gives the same scores.
        device: auto, cpu, cuda, ...
        precision: auto, fp32 or bf16.
        force: replace ``out``.
        quiet: no progress on stderr.
        settings: see :class:`~condense.pretraining.ScoreOptions`.

    Returns:
        The table of scores.

    Raises:
        CondenseError: invalid arguments, found before the work; or a network diverged.
    """
    seed, network = whole_number(seed, "--seed"), network or DEFAULT_SCORE_NETWORK
    options = jobs.check_scores(settings, network=network, device=device, precision=precision)
    path = None if out is None else as_path(out, "--out")
    if path is not None:
        check_writable(path, force=force)
    real = data if isinstance(data, Task) else image_task(data)
    jobs.check_classes(real, "scoring")
    jobs.check_fit(real, 1, network)
    run = _pretraining_run("scores", real, network, seed, device, precision, quiet)
    with _interruptible(run, "a smaller --network or score_batch"):
        table = load_or_train_scores(run, options)
    if path is not None and run.ranks.is_main_process:
        write_score_table(path, table)
    return table


def _pretraining_run(name: str, real: Task, network: str, seed: int, device: str, precision: str, quiet: bool) -> Run:
    """The run that trains networks on real data."""
    torch_device = pick_device(device)
    compute = calibrate(precision, torch_device, network, real.shape, real.num_classes)
    options: dict[str, Any] = {"seed": seed, "device": torch_device, "compute": compute}
    return Run(jobs.prune_task(real), 1, network, name=name, quiet=quiet, track="none", **options)


@contextlib.contextmanager
def _interruptible(run: Run, advice: str) -> Iterator[None]:
    """Trains networks for a file in the block. Finished networks are stored, so a signal may stop it.

    Raises:
        CondenseError: out of memory.
    """
    advice = f"take {advice}"
    with (
        out_of_memory_advice(run.device, advice),
        memory_format(run.compute.format),
        run.stop_on_signal(is_resumable=True),
    ):
        yield
    run.ranks.barrier()
