"""runs a method and writes its set."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import networks, rng
from condense.data import DataOptions, Task, task
from condense.device import deterministic_kernels, device_name, peak_memory, pick_device
from condense.engine import VIEW_LABELS, VIEW_LABELS_STATE, Diverged, Run
from condense.errors import CondenseError
from condense.jobs.checks import _check_fit, check
from condense.jobs.job import (
    RESULT,
    Job,
    _command,
    _config,
    _prepare,
    _set_name,
    _write_config,
    _write_json,
    is_finished,
    read_job,
)
from condense.registry import METHODS, Method
from condense.sets import DistilledSet, SyntheticSet
from condense.version import __version__


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
    real = task.load(job.data["source"], DataOptions(**job.data["options"]), name=job.data["name"])
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
        kept = run.partial_set
        assert kept is not None
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
    preparation = run.notes.get("preparation", {})
    # Experts and teachers of a named file are free of the time limit, but not of what the set took.
    pretrained = {name: facts for name, facts in run.notes.items() if name in ("trajectories", "teachers") and facts}
    seconds = preparation.get("seconds", sum(facts.get("seconds", 0.0) for facts in pretrained.values()))
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
        "preparation": preparation,
        **_learned(synthetic),
        **pretrained,
        **({"label_source": synthetic.label_source} if synthetic.label_source else {}),
        "protocol": job.protocol,
        "data": {"fingerprint": real.fingerprint, "options": job.data["options"]},
        "precision": job.precision,
        "random_hash_version": rng.HASH_VERSION,
        "code_version": __version__,
        "cost": {
            "seconds": round(run.elapsed - preparation.get("seconds", 0.0), 2),
            "preparation_seconds": seconds,
            "device": device_name(run.device),
            "peak_memory": peak_memory(run.device),
        },
    }
    return DistilledSet(stored, synthetic.labels.to(stored.device), real.transform.to(stored.device), manifest)


def _learned(synthetic: SyntheticSet) -> dict[str, float]:
    """The learned step size, where there is one that can serve as a learning rate."""
    rate = 0.0 if synthetic.step_size is None else float(synthetic.step_size)
    return {"learned_lr": rate} if 0 < rate < math.inf else {}
