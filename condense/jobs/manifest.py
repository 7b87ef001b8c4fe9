"""The distilled set that a run makes: its name, its command line and its manifest."""

from __future__ import annotations

import dataclasses
import math
import shlex
from typing import Any

import numpy as np

from condense import commands, rng
from condense.data import DataOptions, Task
from condense.device import peak_memory
from condense.engine import Run
from condense.jobs.given_files import fill_from_files
from condense.jobs.job import Job, default_protocol, names_used, resolve_job, resolve_settings
from condense.networks import pretrained
from condense.plugins import named_files, plugin_versions
from condense.registry import METHODS, Method
from condense.sets import DistilledSet, SyntheticSet
from condense.version import __version__


def expected_manifest(
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
) -> dict[str, Any]:
    """What the manifest of these arguments of :func:`condense.distill` says: ``command``, ``network``, ``plugins``."""
    entry = METHODS.get(method)
    settings, own_network, _ = fill_from_files(entry, settings, network)
    config = resolve_settings(entry, settings, ipc)
    chosen = protocol or default_protocol(entry, config)
    fields = {"minutes": None, "out": None, "tag": None, "protocol": chosen, "track": "none"}
    job = resolve_job(entry, config, real, ipc, own_network, seed, device, precision, **fields)
    return {"command": _command(job, entry, real, None), "network": job.network, "plugins": _plugins(job, real)}


def _plugins(job: Job, real: Task) -> dict[str, str]:
    return plugin_versions(names_used(job.method, job.settings, job.network, real))


def _command(job: Job, entry: Method, real: Task, minutes: float | None) -> str:
    """The command line that makes this set. Defaults are omitted; paths of the user's files become PATH."""
    words = ["condense", "distill", job.method, *["--plugin", "PATH"] * len(named_files(job.plugins))]
    words += ["--data", commands.data_argument(real), "--ipc", str(job.ipc)]
    words += ["--network", job.network] * (job.network != entry.network)
    words += ["--seed", str(job.seed)] * (job.seed != 0) + ["--precision", job.precision]
    words += ["--minutes", f"{minutes:g}"] if minutes is not None else []
    words += ["--tag", job.tag, "--out", f"{_set_name(job, real).replace('/', '-')}.h5"] if job.tag else []
    for values, config in ((job.settings, entry.config), (job.data["options"], DataOptions)):
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for name in ("experts", "scores", "prune"):
            values = {**values, name: "PATH"} if values.get(name) else values
        if str(values.get("init", "")).endswith(".h5"):
            values = {**values, "init": "PATH.h5"}
        if values.get("teachers") and not pretrained.is_public(values["teachers"]):
            values = {**values, "teachers": "PATH"}
        if values.get("backbone"):
            values = {**values, "backbone": commands.redact_backbone(values["backbone"])}
        words += [f"{key}={commands.format_value(value)}" for key, value in values.items() if value != defaults[key]]
    words += ["deterministic=true"] * job.deterministic
    words += [f"protocol={job.protocol}"] * (job.protocol != entry.protocol)
    return shlex.join(words)


def _set_name(job: Job, real: Task) -> str:
    return f"{real.name}/{job.method}-ipc{job.ipc}" + (f".{job.tag}" if job.tag else "")


def to_distilled(job: Job, entry: Method, real: Task, run: Run, synthetic: SyntheticSet) -> DistilledSet:
    """Converts the synthetic set of a run to a :class:`DistilledSet` with its manifest, on the CPU."""
    stored = synthetic.images.detach().cpu()
    preparation = run.notes.get("preparation", {})
    # After two time limits, the first of which shortened the training on real data, no command makes such a set again.
    is_shortened = any(preparation.get(f"{key}_wanted") != preparation.get(key) for key in ("networks", "steps_each"))
    prepared_in = job.prepared_in if is_shortened else None
    minutes = job.minutes if prepared_in is None else None
    # Experts and teachers in a file of the user do not count towards the time limit, but they are part of the cost.
    kinds = ("trajectories", "teachers", "scores", "patches")
    pretraining = {name: facts for name, facts in run.notes.items() if name in kinds and facts}
    plugins = _plugins(job, real)
    seconds = preparation.get("seconds", sum(facts.get("seconds", 0.0) for facts in pretraining.values()))
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
        "command": _command(job, entry, real, minutes),
        "settings": job.settings,
        "network": job.network,
        "seed": job.seed,
        "steps_done": run.steps_done,
        **({"steps_before": job.shorter} if job.shorter else {}),
        "stopped_early": run.stopped_early,
        "preparation": preparation,
        **({"prepared_in_minutes": prepared_in} if prepared_in is not None else {}),
        **_learned_lr(synthetic),
        **pretraining,
        **({"resampling": dataclasses.asdict(synthetic.resampling)} if synthetic.resampling else {}),
        **({"label_source": synthetic.label_source} if synthetic.label_source else {}),
        "protocol": job.protocol,
        "data": {"fingerprint": real.fingerprint, "options": job.data["options"]},
        "precision": job.precision,
        "compute": job.compute,
        **({"plugins": plugins} if plugins else {}),
        "repeatable": _repeatable(job, run),
        "random_hash_version": rng.HASH_VERSION,
        "code_version": __version__,
        "cost": {
            "seconds": round(run.elapsed - preparation.get("seconds", 0.0), 2),
            "preparation_seconds": seconds,
            "device": ", then ".join(run.devices),
            "peak_memory": peak_memory(run.device),
        },
    }
    indices = _indices(real, synthetic) if job.settings.get("store") == "indices" else None
    return DistilledSet(stored, synthetic.labels.to(stored.device), real.transform.to(stored.device), manifest, indices)


def _indices(real: Task, synthetic: SyntheticSet) -> np.ndarray:
    """Rows of a selection among the train images of ``real``, which the method may have seen only in part."""
    assert synthetic.ids is not None and not synthetic.stages
    ids, seen = synthetic.ids.numpy(), synthetic.task.train.rows
    images = ids if seen is None else seen[ids]
    if real.train.rows is not None:
        images = np.argsort(real.train.rows)[np.searchsorted(np.sort(real.train.rows), images)]
    return images.astype(np.uint32)


def _repeatable(job: Job, run: Run) -> str:
    """What was promised of a second run, and of a resumed one: the same ``bits``, or the same up to ``rounding``."""
    same_device = len(run.devices) == 1
    return "bits" if same_device and (run.device.type == "cpu" or job.deterministic) else "rounding"


def _learned_lr(synthetic: SyntheticSet) -> dict[str, float]:
    """The learned step size, if there is one that is a valid learning rate."""
    rate = 0.0 if synthetic.step_size is None else float(synthetic.step_size)
    return {"learned_lr": rate} if 0 < rate < math.inf else {}
