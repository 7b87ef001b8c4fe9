"""a run's resolved config, its name and command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from condense import commands, networks
from condense.commands import _word, data_word
from condense.config import build
from condense.data import DataOptions, Task
from condense.device import pick_device, pick_precision
from condense.engine import CHECKPOINT, PREVIOUS, VIEW_LABELS, VIEW_LABELS_STATE
from condense.errors import CondenseError
from condense.files import replacing
from condense.networks import pretrained
from condense.pretraining import PLAN
from condense.registry import METHODS, Method
from condense.sets import DistilledSet
from condense.version import __version__

CONFIG, RESULT = "config.json", "result.json"


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


def is_finished(run_dir: str | Path) -> bool:
    """Whether the run ended and the set that it wrote is still there, and still that set."""
    try:
        result = json.loads((Path(run_dir) / RESULT).read_text())
        return result["out"] is not None and DistilledSet.load(result["out"]).sha256() == result["sha256"]
    except (OSError, ValueError, KeyError, TypeError, CondenseError):
        return False


def _config(entry: Method, settings: Mapping[str, Any]) -> Any:
    config: Any = build(entry.config, settings, f"the method '{entry.name}'")
    if getattr(config, "experts", ""):  # a run may be resumed from another folder
        config = dataclasses.replace(config, experts=str(Path(config.experts).resolve()))
    if getattr(config, "teachers", "") and not pretrained.is_public(config.teachers):
        config = dataclasses.replace(config, teachers=str(Path(config.teachers).resolve()))
    if getattr(config, "steps", 1) < 1:
        raise CondenseError(f"steps={config.steps}: must be at least 1")
    return config


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
        if given.get("teachers") and not pretrained.is_public(given["teachers"]):
            shown = {**shown, "teachers": "PATH"}
        if given.get("backbone"):
            shown = {**shown, "backbone": commands.shown(given["backbone"])}
        words += [f"{key}={_word(value)}" for key, value in shown.items() if value != defaults[key]]
    words += ["deterministic=true"] * job.deterministic
    words += [f"protocol={job.protocol}"] * (job.protocol != entry.protocol)
    return shlex.join(words)


def _set_name(job: Job, real: Task) -> str:
    return f"{real.name}/{job.method}-ipc{job.ipc}" + (f".{job.tag}" if job.tag else "")
