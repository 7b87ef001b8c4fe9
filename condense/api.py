"""The public functions behind ``condense.task``, ``condense.distill``, ``condense.evaluate``, ``condense.load``, ``condense.fit``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from condense import networks, rng, tasks
from condense.config import build
from condense.distilled import DistilledSet, check_writable, packaged_sets
from condense.errors import CondenseError, did_you_mean
from condense.evaluation import evaluate, fit
from condense.registry import METHODS, Method
from condense.run import CHECKPOINT, PREVIOUS, Diverged, Run, device_name, peak_memory, pick_device, pick_precision
from condense.synthetic import SyntheticSet
from condense.tasks import DataOptions, Task
from condense.version import __version__

__all__ = ["distill", "evaluate", "fit", "load", "resume", "task"]

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
        raise CondenseError(f"'{source}' is no file and no ready-made set{did_you_mean(str(source), packaged_sets())}")
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
        settings: hyper-parameters, checked against the method's config.

    Raises:
        CondenseError: anything wrong with what was given, found before work starts; or the run diverged, in which case
            the last good set is written to ``out`` first.
    """
    entry = METHODS.get(method)
    config = build(entry.config, settings, f"the method '{method}'")
    real = data if isinstance(data, Task) else task(data)
    job = Job(
        method=method,
        data={"source": real.source, "name": real.name, "options": dataclasses.asdict(real.options)},
        fingerprint=real.fingerprint,
        ipc=ipc,
        network=network if isinstance(network, str) else entry.network,
        seed=seed,
        device=str(pick_device(device)),
        precision=pick_precision(precision, pick_device(device)),
        minutes=minutes,
        out=str(Path(out).resolve()) if out else None,
        tag=tag,
        protocol=protocol or entry.protocol,
        track=track,
        settings=dataclasses.asdict(config),
    )
    job.check(real, network or job.network)
    if out is not None:
        check_writable(Path(out), force=force, size=_estimated_bytes(real, ipc))
    directory = _prepare(Path(run_dir), job, force) if run_dir is not None else None
    return _execute(job, entry, config, real, network or job.network, directory, quiet=quiet, resume=False)


def resume(run_dir: str | Path, *, quiet: bool = True) -> DistilledSet:
    """Goes on with a run that was killed, interrupted or stopped, and ends with the same set, bit for bit.

    Raises:
        CondenseError: the folder is no run, its data have changed, or its config differs from the checkpoint's.
    """
    directory, job = Path(run_dir), read_job(run_dir)
    entry = METHODS.get(job.method)
    config = build(entry.config, job.settings, f"the method '{job.method}'")
    if job.data["source"] is None:
        raise CondenseError(f"{directory}: its data were given in Python; a run on them cannot be resumed from its folder")
    real = tasks.load(job.data["source"], DataOptions(**job.data["options"]), name=job.data["name"])
    if real.fingerprint != job.fingerprint:
        raise CondenseError(f"{directory}: the data at {job.data['source']} have changed since the run began")
    pick_device(job.device)
    return _execute(job, entry, config, real, job.network, directory, quiet=quiet, resume=True)


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
    version: str = __version__

    def key(self) -> str:
        """Digest of all that decides the result; where it is written, how long it may take and who watches do not."""
        parts = dataclasses.asdict(self)
        for free in ("out", "tag", "protocol", "track", "minutes", "version", "data"):
            del parts[free]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def check(self, real: Task, network: str | Callable[..., nn.Module]) -> None:
        smallest = int(real.counts.argmin())
        if self.ipc < 1:
            raise CondenseError(f"--ipc {self.ipc}: must be at least 1")
        if self.ipc > real.counts[smallest]:
            raise CondenseError(
                f"--ipc {self.ipc}: class '{real.classes[smallest]}' of {real.name} has only {real.counts[smallest]} images"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise CondenseError(f"--minutes {self.minutes}: must be positive")
        if self.settings.get("steps", 1) < 1:
            raise CondenseError(f"steps={self.settings['steps']}: must be at least 1")
        with rng.seeded("check"):  # a network too deep for the images is refused here, before any work
            networks.build(network, real.shape, real.num_classes)


def read_job(run_dir: str | Path) -> Job:
    """The resolved configuration of a run directory.

    Raises:
        CondenseError: the folder is no run.
    """
    try:
        return Job(**json.loads((Path(run_dir) / CONFIG).read_text()))
    except (OSError, ValueError, TypeError) as fault:
        raise CondenseError(f"{run_dir}: not a run directory (no readable {CONFIG}); start one with condense distill") from fault


def _estimated_bytes(real: Task, ipc: int) -> int:
    channels, height, width = real.shape
    return 4 * ipc * real.num_classes * channels * height * width


def _prepare(directory: Path, job: Job, force: bool) -> Path:
    """The run directory with the resolved config in it; an earlier run there is refused, or cleared with ``force``."""
    if (directory / CONFIG).exists():
        if not force:
            raise CondenseError(f"{directory} holds a run; go on with `condense resume {directory}` or give --force")
        for name in (CONFIG, RESULT, CHECKPOINT, PREVIOUS, "log.jsonl"):
            (directory / name).unlink(missing_ok=True)
    check_writable(directory / CONFIG, force=True, size=3 * 4096)
    (directory / CONFIG).write_text(json.dumps(dataclasses.asdict(job), indent=1) + "\n")
    return directory


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
    )
    try:
        synthetic = entry.function(real, config, run)
    except Diverged as fault:
        if run.synthetic is None or job.out is None or not run.ranks.leads:
            raise
        _finished(job, entry, real, run, run.synthetic).save(job.out, force=True)
        raise CondenseError(f"{fault}, written to {job.out}") from fault
    distilled = _finished(job, entry, real, run, synthetic)
    if job.out is not None and run.ranks.leads:
        distilled.save(job.out, force=True)
    if directory is not None and run.ranks.leads:
        result = {"out": job.out, "steps": run.steps_done, "seconds": round(run.elapsed, 2), "sha256": distilled.sha256()}
        (directory / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    return distilled


def _finished(job: Job, entry: Method, real: Task, run: Run, synthetic: SyntheticSet) -> DistilledSet:
    """The synthetic set as a DistilledSet with its manifest."""
    stored = synthetic.images.detach().cpu()
    manifest = {
        "name": f"{real.name}/{job.method}-ipc{job.ipc}" + (f".{job.tag}" if job.tag else ""),
        "dataset": real.name,
        "classes": list(real.classes),
        "ipc": job.ipc,
        "space": synthetic.space,
        "decode": [stage.describe() for stage in synthetic.stages if stage.at_load],
        "distill_decode": [stage.describe() for stage in synthetic.stages if not stage.at_load],
        "mirror": real.mirror,
        "method": job.method,
        "paper": entry.paper,
        "settings": job.settings,
        "network": job.network,
        "seed": job.seed,
        "steps_done": run.steps_done,
        "stopped_early": run.stopped_early,
        "protocol": job.protocol,
        "data": {"fingerprint": real.fingerprint, "options": job.data["options"]},
        "precision": job.precision,
        "random_hash_version": rng.HASH_VERSION,
        "code_version": __version__,
        "cost": {
            "seconds": round(run.elapsed, 2),
            "preparation_seconds": 0.0,
            "device": device_name(run.device),
            "peak_memory": peak_memory(run.device),
        },
    }
    return DistilledSet(stored, synthetic.labels.to(stored.device), real.transform.to(stored.device), manifest)


def measure(method: str, real: Task, ipc: int, network: str | None, device: str, **settings: Any) -> dict[str, Any]:
    """What a run would cost, from a few of its own steps: seconds a step, all steps, peak memory, bytes of the set."""
    entry = METHODS.get(method)
    config = build(entry.config, settings, f"the method '{method}'")
    steps = getattr(config, "steps", None)
    options = {"network": network, "device": device, **settings}
    if steps is None:
        seconds, made = _timed(method, real, ipc, options)
        per_step = None
    else:
        short, _ = _timed(method, real, ipc, {**options, "steps": 2})  # the first step warms up; it is in both
        long, made = _timed(method, real, ipc, {**options, "steps": 5})
        per_step = max(long - short, 1e-6) / 3
        seconds = per_step * steps
    where = pick_device(device)
    return {
        "seconds_per_step": per_step,
        "steps": steps,
        "seconds": seconds,
        "peak_memory": peak_memory(where),
        "set_bytes": made.nbytes(),
        "checkpoint_bytes": 4 * made.nbytes()["images"],  # pixels and momentum, in two checkpoints
        "real_bytes": int(real.train.images.nbytes + real.test.images.nbytes),
        "device": device_name(where),
    }


def _timed(method: str, real: Task, ipc: int, options: dict[str, Any]) -> tuple[float, DistilledSet]:
    began = time.monotonic()
    made = distill(method, real, ipc, **options)
    return time.monotonic() - began, made
