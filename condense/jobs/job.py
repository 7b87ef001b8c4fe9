"""The resolved configuration of a run, and the directory that it is written to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from condense import networks
from condense.config import build_config
from condense.data import Task
from condense.device import pick_device
from condense.engine import (
    BATCH_DEFAULTS,
    CHECKPOINT_FILE,
    PREVIOUS_CHECKPOINT_FILE,
    VIEW_LABELS_FILE,
    VIEW_LABELS_STATE_FILE,
)
from condense.errors import CondenseError
from condense.files import write_json
from condense.hdf5 import schema_mistake
from condense.networks import pretrained
from condense.plugins import plugin_files
from condense.pretraining import PLAN_FILE
from condense.registry import Method
from condense.sets import DistilledSet
from condense.version import __version__

CONFIG_FILE, RESULT_FILE = "config.json", "result.json"


MAX_CONFIG_BYTES = 2**20
"""Maximum size of ``config.json``."""

_TEXT = {"type": "string"}
_SWITCH = {"type": "boolean"}
_TEXT_OR_NULL = {"type": ["string", "null"], "minLength": 1}

JOB_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("method", "network", "fingerprint", "device", "precision", "protocol", "track"), _TEXT),
        **dict.fromkeys(("architecture", "version"), _TEXT),
        **dict.fromkeys(("deterministic", "force"), _SWITCH),
        "data": {
            "type": "object",
            "properties": {"source": _TEXT_OR_NULL, "name": _TEXT, "options": {"type": "object"}},
            "required": ["source", "name", "options"],
        },
        "ipc": {"type": "integer", "minimum": 1},
        "seed": {"type": "integer"},
        **{key: {"type": ["number", "null"], "exclusiveMinimum": 0} for key in ("minutes", "prepared_in")},
        "out": _TEXT_OR_NULL,
        "tag": {"type": ["string", "null"], "pattern": r"^[^/\\\x00-\x1f]+$"},
        "settings": {"type": "object"},
        "compute": {
            "type": "object",
            "properties": {
                **{key: {"enum": ["contiguous", "channels_last", None]} for key in ("inference", "training")},
                "forward_images": {"type": ["integer", "null"], "minimum": 1, "maximum": 10**6},
            },
        },
        "shorter": {"type": "array", "items": {"type": "integer"}},
        "plugins": {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[0-9a-f]{64}$"}},
    },
    "required": ["method", "data", "settings"],
}
"""JSON schema of ``config.json``."""


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
    shorter: list[int] = dataclasses.field(default_factory=list)
    """Numbers of steps with which the run was finished before it was given more."""
    architecture: str = ""
    """Digest of the layout of a network that was given in Python; empty for named networks."""
    compute: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How networks are computed, besides the precision: :meth:`condense.networks.ComputeConfig.to_dict`."""
    plugins: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 by path of the plug-ins that define the method, the data or a network."""
    prepared_in: float | None = None
    """Time limit in minutes with which a run began that has another one, or none, since it was resumed."""
    version: str = __version__

    @property
    def compute_config(self) -> networks.ComputeConfig:
        """Precision, memory formats and images per pass."""
        return networks.ComputeConfig.from_dict(self.precision, self.compute)

    def key(self) -> str:
        """Digest of everything that decides the result: not the files, the device, the time limit or the trackers."""
        return self._digest()

    def earlier_key(self) -> str:
        """The key as versions up to 0.1 made it: with the device."""
        return self._digest(device=self.device)

    def _digest(self, **more: str) -> str:
        parts = dataclasses.asdict(self)
        del parts["device"]
        parts["data"] = self.data["options"]  # the fingerprint identifies the pixels
        for name in ("out", "tag", "protocol", "track", "minutes", "prepared_in", "force", "version", "shorter"):
            del parts[name]
        del parts["compute"], parts["plugins"]
        if self.plugins:
            parts["plugins"] = sorted(set(self.plugins.values()))
        if not parts["architecture"]:
            del parts["architecture"]  # keys of earlier versions do not have it
        settings = parts["settings"]  # keys of earlier versions do not have those of real batches
        parts["settings"] = {k: v for k, v in settings.items() if k not in BATCH_DEFAULTS or v != BATCH_DEFAULTS[k]}
        parts |= more
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def shorter_keys(job: Job) -> list[str]:
    """Digests of the job with the numbers of steps that it had before."""
    jobs = (dataclasses.replace(job, settings={**job.settings, "steps": steps}) for steps in job.shorter)
    return [key for shorter in jobs for key in (shorter.key(), shorter.earlier_key())]


def default_protocol(entry: Method, config: Any) -> str:
    """Protocol of a set's evaluations unless one is given: that of the settings, which may decide the kind of labels,
    or that of the method."""
    return str(getattr(config, "default_protocol", None) or entry.protocol)


def resolve_settings(entry: Method, settings: Mapping[str, Any], ipc: int | None = None) -> Any:
    """Builds the config of a method from ``settings``, with absolute paths of its files.

    With ``ipc``, a number of steps that depends on the images per class is resolved too.

    Raises:
        CondenseError: unknown settings or invalid values.
    """
    config: Any = build_config(entry.config, settings, f"the method '{entry.name}'")
    if getattr(config, "experts", ""):  # a run may be resumed from another folder
        config = dataclasses.replace(config, experts=str(Path(config.experts).resolve()))
    if getattr(config, "init", "").endswith(".h5"):
        config = dataclasses.replace(config, init=str(Path(config.init).resolve()))
    if getattr(config, "scores", ""):
        config = dataclasses.replace(config, scores=str(Path(config.scores).resolve()))
    if getattr(config, "teachers", "") and not pretrained.is_public(config.teachers):
        config = dataclasses.replace(config, teachers=str(Path(config.teachers).resolve()))
    steps = getattr(config, "steps", 1)
    if steps is None and ipc is not None:
        config = dataclasses.replace(config, steps=config.total_steps(ipc))
    if steps is not None and steps < 1:
        raise CondenseError(f"steps={config.steps}: must be at least 1")
    return config


def resolve_job(
    entry: Method,
    config: Any,
    real: Task,
    ipc: int,
    network: str | Callable[..., nn.Module] | None,
    seed: int,
    device: str,
    precision: str,
    **fields: Any,
) -> Job:
    """Resolves the arguments of ``condense.distill`` to a :class:`Job`; ``fields`` are copied to it."""
    used = network or entry.network
    compute = networks.calibrate(precision, pick_device(device), used, real.shape, real.num_classes)
    settings = dataclasses.asdict(config)
    return Job(
        method=entry.name,
        data={"source": real.source, "name": real.name, "options": real.options.to_dict()},
        fingerprint=real.fingerprint,
        ipc=ipc,
        network=networks.network_name(used),
        seed=seed,
        device=device,
        precision=compute.precision,
        compute=compute.to_dict(),
        settings=settings,
        architecture=architecture_digest(network, real),
        plugins=plugin_files(names_used(entry.name, settings, used, real)),
        **fields,
    )


def names_used(
    method: str, settings: Mapping[str, Any], network: str | Callable[..., nn.Module], real: Task
) -> list[str]:
    """Names of the method, the data and the networks of a run, any of which a plug-in may define."""
    committee = [name for name in settings.get("committee", "").split(",") if name]
    return [method, networks.network_name(network), real.source or real.name, *committee]


def architecture_digest(network: str | Callable[..., nn.Module] | None, real: Task) -> str:
    """SHA-256 of the layout of a network that is given in Python; an empty string for a named one."""
    if network is None or isinstance(network, str):
        return ""
    text = json.dumps(networks.layout_of(network, real).describe(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def resume_call(job: Job, run_dir: Path | None) -> str:
    """The command or the call in Python that continues a run, for messages."""
    given = ["network=..."] * job.network.startswith(networks.FACTORY_PREFIX)
    given += ["task=..."] * (job.data["source"] is None)
    return f"condense.resume({str(run_dir)!r}, {', '.join(given)})" if given else f"condense resume {run_dir}"


def read_job(run_dir: str | Path) -> Job:
    """Reads the resolved configuration of a run directory.

    Raises:
        CondenseError: the folder is not a run directory, or its configuration is damaged.
    """
    path = Path(run_dir) / CONFIG_FILE
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("no file, or too large")
        content = json.loads(path.read_text())
        mistake = schema_mistake(content, JOB_SCHEMA)
        job = None if mistake else Job(**content)
    except (OSError, ValueError, TypeError, RecursionError) as fault:
        raise CondenseError(
            f"{run_dir}: not a run directory (no readable {CONFIG_FILE}); give the --run-dir of a `condense distill`"
        ) from fault
    if job is None:
        raise CondenseError(f"{path}: has no proper {mistake}; start the run again")
    return job


def write_job(run_dir: Path, job: Job) -> None:
    """Writes ``config.json``, atomically."""
    write_json(run_dir / CONFIG_FILE, dataclasses.asdict(job))


def prepare_run_dir(run_dir: Path, job: Job) -> None:
    """Creates the run directory, deletes the files of an earlier run, and writes ``config.json``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / CONFIG_FILE).exists():
        for name in (
            RESULT_FILE,
            CHECKPOINT_FILE,
            PREVIOUS_CHECKPOINT_FILE,
            PLAN_FILE,
            VIEW_LABELS_FILE,
            VIEW_LABELS_STATE_FILE,
            "log.jsonl",
        ):
            (run_dir / name).unlink(missing_ok=True)
        for name in ("previews", "tensorboard"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
    write_job(run_dir, job)


def is_finished(run_dir: str | Path) -> bool:
    """Whether the run has ended, and the file that it wrote still holds the same set."""
    try:
        result = json.loads((Path(run_dir) / RESULT_FILE).read_text())
        return result["out"] is not None and DistilledSet.load(result["out"]).sha256() == result["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, CondenseError):
        return False


def was_stopped(run_dir: str | Path) -> bool:
    """Whether the run's time limit ended it before its last step."""
    try:
        return bool(json.loads((Path(run_dir) / RESULT_FILE).read_text())["stopped_early"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def is_unfinished(run_dir: Path, job: Job) -> bool:
    """Whether ``run_dir`` holds an interrupted run with the same arguments as ``job``."""
    return not (run_dir / RESULT_FILE).exists() and is_resumable(run_dir, job)


def is_resumable(run_dir: str | Path, job: Job) -> bool:
    """Whether ``run_dir`` holds a run that gives the same set in the same file as ``job``."""
    try:
        earlier = read_job(run_dir)
    except CondenseError:
        return False
    return (earlier.key(), earlier.protocol, earlier.out) == (job.key(), job.protocol, job.out)
