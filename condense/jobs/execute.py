"""Runs a method and writes its set; resumes runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from condense import networks
from condense.data import DataOptions, Task, load_task
from condense.device import (
    deterministic_kernels,
    out_of_memory_advice,
    pick_device,
    reset_peak_memory,
    second_derivatives,
)
from condense.engine import VIEW_LABELS_FILE, VIEW_LABELS_STATE_FILE, Diverged, Run
from condense.errors import CondenseError
from condense.files import as_path, write_json
from condense.jobs.checks import check_fit, check_request
from condense.jobs.job import (
    RESULT_FILE,
    Job,
    architecture_digest,
    is_finished,
    prepare_run_dir,
    read_job,
    resolve_settings,
    resume_call,
    shorter_keys,
    was_stopped,
    write_job,
)
from condense.jobs.manifest import to_distilled
from condense.jobs.pruning import prune_task
from condense.plugins import load_recorded_plugins
from condense.pretraining import ContentGuard
from condense.registry import METHODS, Method
from condense.sets import DistilledSet


def resume(
    run_dir: str | Path,
    *,
    network: Callable[..., nn.Module] | None = None,
    task: Task | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    device: str | None = None,
    quiet: bool = True,
) -> DistilledSet:
    """Resumes a run that was killed, interrupted or stopped. The set is the same as without the stop, bit for bit.

    The set of a finished run is only loaded.

    Args:
        run_dir: directory of the run.
        network: the function that makes the network, if the run began with one.
        task: the real data, if the run began with data that were given in Python.
        minutes: time limit from now on. Without it, a run that its limit stopped goes on to its end, and one that was
            killed keeps its limit. Training on real data that the first limit shortened stays as it is.
        steps: new number of steps, more than before; the set is that of one run with so many steps.
        device: auto, cpu, cuda, ..., if not the one that the run began with. The steps before and after the change
            round differently, so the set is no longer that of one device bit for bit.
        quiet: no progress on stderr.

    Raises:
        CondenseError: the folder is not a run directory, its network or data differ from those that the run began with,
            or its config differs from that of the checkpoint.
    """
    directory = as_path(run_dir, "--run-dir")
    job = read_job(directory)
    load_recorded_plugins(job.plugins, str(directory))
    if device is not None:
        job = dataclasses.replace(job, device=device)
    if steps is not None:
        job = _with_steps(job, METHODS.get(job.method), steps, directory)
    stopped = was_stopped(directory)
    if steps is None and minutes is None and not stopped and job.out is not None and is_finished(directory):
        return DistilledSet.load(job.out)
    is_own_network = job.network.startswith(networks.FACTORY_PREFIX)
    if (is_own_network and network is None) or (job.data["source"] is None and task is None):
        what = "network was" if is_own_network and network is None else "data were"
        raise CondenseError(f"{directory}: its {what} given in Python; call {resume_call(job, directory)}")
    if network is not None and (isinstance(network, str) or networks.network_name(network) != job.network):
        raise CondenseError(f"{directory}: network={networks.network_name(network)}: the run began with {job.network}")
    limit = minutes if minutes is not None or stopped else job.minutes
    names: dict[str, Any] = {
        "network": network or job.network,
        "protocol": job.protocol,
        "precision": job.precision,
        "track": job.track,
    }
    try:
        check_request(job.method, job.settings, job.data["options"], minutes=limit, **names)
        pick_device(job.device)
    except CondenseError as fault:
        raise CondenseError(f"{directory}: {fault}") from fault
    entry = METHODS.get(job.method)
    config = resolve_settings(entry, job.settings, job.ipc)
    options = DataOptions(**job.data["options"])
    real = load_task(job.data["source"], options, name=job.data["name"]) if task is None else task
    if real.fingerprint != job.fingerprint or real.options != options:
        where = f"the data at {job.data['source']}" if task is None else "the data"
        raise CondenseError(f"{directory}: {where} changed since the run began; restore them or start over")
    if job.architecture and architecture_digest(network, real) != job.architecture:
        raise CondenseError(f"{directory}: network={job.network}: has other layers than when the run began")
    check_fit(prune_task(real), job.ipc, network or job.network, config)
    if minutes is not None or stopped or steps is not None:
        began_with = job.prepared_in if job.prepared_in is not None else job.minutes
        job = dataclasses.replace(job, minutes=limit, prepared_in=began_with, force=job.force or is_finished(directory))
    return run_job(
        job,
        entry,
        config,
        real,
        network or job.network,
        directory,
        quiet=quiet,
        resume=True,
        is_new_limit=minutes is not None,
    )


def _with_steps(job: Job, entry: Method, steps: int, directory: Path) -> Job:
    """The job with more steps.

    Raises:
        CondenseError: the method has no steps, as many already, or schedules that depend on their number.
    """
    if getattr(entry.config, "steps_change_schedule", False):
        raise CondenseError(
            f"steps={steps}: a schedule of {job.method} depends on the number of steps; start a new run"
        )
    before = job.settings.get("steps")
    if not isinstance(before, int) or steps <= before:
        has = f"has {before} steps" if isinstance(before, int) else "has no steps"
        raise CondenseError(f"{directory}: steps={steps}: the run {has}; give more")
    return dataclasses.replace(job, settings={**job.settings, "steps": steps}, shorter=[*job.shorter, before])


def run_job(
    job: Job,
    entry: Method,
    config: Any,
    real: Task,
    network: str | Callable[..., nn.Module],
    directory: Path | None,
    *,
    quiet: bool,
    resume: bool,
    is_new_limit: bool = False,
) -> DistilledSet:
    """Runs the method, then writes the set and the result of the run.

    Args:
        job: the resolved configuration.
        entry: the method.
        config: its config.
        real: the real data.
        network: architecture, or a factory that ``job.network`` only names.
        directory: run directory; None keeps no checkpoint.
        quiet: no progress on stderr.
        resume: continue from the checkpoint in ``directory``.
        is_new_limit: ``job.minutes`` are minutes from now on.

    Raises:
        CondenseError: the run diverged (the last finite set is written to ``job.out`` first), a file cannot be written,
            or out of memory.
    """

    @functools.cache
    def begin() -> None:
        if directory is not None and not resume:
            prepare_run_dir(directory, job)
        elif directory is not None and read_job(directory) != job:  # a new time limit, or more steps
            write_job(directory, job)
            (directory / RESULT_FILE).unlink(missing_ok=True)

    pruned = prune_task(real)
    task = pruned.repeat_small(job.ipc)
    device = pick_device(job.device)
    reset_peak_memory(device)
    run = Run(
        task,
        job.ipc,
        network,
        seed=job.seed,
        device=device,
        compute=job.compute_config,
        directory=directory,
        minutes=job.minutes,
        resume=resume,
        config_key=job.key(),
        earlier_key=job.earlier_key(),
        shorter_keys=shorter_keys(job),
        name=job.method,
        quiet=quiet,
        track=job.track,
        begin=begin,
        resume_call=resume_call(job, directory),
    )
    if is_new_limit and job.minutes is not None:  # that of a run counts from its beginning
        job = dataclasses.replace(job, minutes=run.add_minutes(job.minutes))
    # Ranks decide by the files of the run whether to begin, continue or load it: none may write before all have.
    run.ranks.barrier()
    if pruned is not real:
        run.register_state("pruned", ContentGuard(pruned.fingerprint, real.options.prune or "", "scores"))
    try:
        advice = "lower --ipc or batch_real, or take a smaller --network"
        with (
            out_of_memory_advice(run.device, advice),
            deterministic_kernels(job.deterministic),
            second_derivatives(entry.order == 2),
            networks.memory_format(run.compute.format),
            run.stop_on_signal(),
        ):
            synthetic = entry.function(task, config, run)
        distilled = to_distilled(job, entry, real, run, synthetic)
        if run.ranks.is_main_process:
            begin()  # methods without steps have not called it
            _write_outputs(job, directory, run, distilled, resume)
    except Diverged as fault:
        if run.synthetic is None or job.out is None or not run.ranks.is_main_process:
            raise
        partial_set = run.partial_set
        assert partial_set is not None
        to_distilled(job, entry, real, run, partial_set).save(job.out, force=True)
        raise CondenseError(f"{fault}, written to {job.out}") from fault
    except OSError as fault:
        if directory is None:
            raise
        where = fault.filename or directory
        raise CondenseError(f"{where}: {fault.strerror or fault}; fix this, then run: {run.resume_call}") from fault
    run.ranks.barrier()
    return distilled


def _write_outputs(job: Job, directory: Path | None, run: Run, distilled: DistilledSet, resume: bool) -> None:
    """Writes the file of the set, and ``result.json`` in the run directory."""
    if job.out is not None:
        if resume and not job.force:
            _check_out_unchanged(job, directory, distilled)
        distilled.save(job.out, force=True)
    if directory is None:
        return
    result = {
        "out": job.out,
        "steps": run.steps_done,
        "seconds": round(run.elapsed, 2),
        "sha256": distilled.sha256(),
        "stopped_early": distilled.manifest["stopped_early"],
    }
    write_json(directory / RESULT_FILE, result)
    if job.out is not None:  # the file of the set holds the labels
        for name in (VIEW_LABELS_FILE, VIEW_LABELS_STATE_FILE):
            (directory / name).unlink(missing_ok=True)


def _check_out_unchanged(job: Job, directory: Path | None, distilled: DistilledSet) -> None:
    """Checks that a resumed run does not replace a set that another run has written in the meantime."""
    if job.out is None or not Path(job.out).exists():
        return
    with contextlib.suppress(CondenseError):
        if DistilledSet.load(job.out).sha256() == distilled.sha256():
            return
    raise CondenseError(f"{job.out}: another set lies there now; move it away, then run: {resume_call(job, directory)}")
