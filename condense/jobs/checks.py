"""Checks of all arguments before any work; all mistakes are reported together, in one line."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from condense import networks, rng
from condense.config import build_config, whole_number
from condense.data import DataOptions, Task
from condense.device import pick_device, pick_precision
from condense.errors import CondenseError, did_you_mean
from condense.files import check_name, check_writable
from condense.jobs.job import CONFIG_FILE, RESULT_FILE, read_job, resolve_settings, resume_call
from condense.judge import get_protocol
from condense.pretraining import OBJECTIVES, TRAJECTORY_DTYPES, ScoreOptions, TeacherOptions
from condense.registry import METHODS
from condense.tracking import check_tracker

MAX_MINUTES = 60 * 24 * 366 * 10


def run_checks(*checks: Callable[[], Any]) -> list[Any]:
    """Runs all checks and returns their results.

    Raises:
        CondenseError: the mistakes that the checks found, in one line.
    """
    results, faults = [], []
    for run_check in checks:
        try:
            results.append(run_check())
        except CondenseError as fault:
            faults.append(str(fault))
    if faults:
        raise CondenseError("; ".join(faults))
    return results


def check_request(
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
    tag: str | None = None,
) -> None:
    """Checks the arguments of :func:`condense.distill` that do not depend on the real data.

    Args:
        options: options of the data (see :class:`condense.data.DataOptions`).

    Raises:
        CondenseError: all mistakes, in one line.
    """
    entry = METHODS.get(method)
    if entry.task != "images":
        raise CondenseError(
            f"method '{method}' distils {entry.task} and makes no steps; only `condense distill` runs it"
        )
    run_checks(
        lambda: resolve_settings(entry, settings),
        lambda: build_config(DataOptions, options or {}, "the data"),
        lambda: networks.check_network(network or entry.network),
        lambda: get_protocol(protocol or entry.protocol),
        lambda: pick_precision(precision, pick_device(device)),
        lambda: _check_minutes(minutes),
        lambda: check_tracker(track),
        lambda: None if tag is None else check_name(tag, "--tag"),
    )


def check_experts(
    method: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    count: int | None = None,
    epochs: int | None = None,
    dtype: str = "float16",
    held_out: float | None = None,
    **run_options: Any,
) -> Any:
    """Checks the arguments of :func:`condense.api.experts` that do not depend on the real data.

    Returns:
        The config of the method, with ``count`` and ``epochs`` in its settings.

    Raises:
        CondenseError: all mistakes, in one line.
    """
    _check_pretrains(method, "experts")
    flags = {"count": ("num_experts", count), "epochs": ("buffer_epochs", epochs)}
    faults = _flag_faults(flags, held_out)
    if dtype not in TRAJECTORY_DTYPES:
        faults.append(f"--dtype {dtype}: unknown{did_you_mean(dtype, TRAJECTORY_DTYPES)}")
    settings = {**settings, **_positive_settings(flags)}
    run_checks(functools.partial(_raise, faults), lambda: check_request(method, settings, options, **run_options))
    return resolve_settings(METHODS.get(method), settings)


def check_teachers(
    method: str | None,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    networks: str | Sequence[str] | None = None,
    count: int | None = None,
    epochs: int | None = None,
    held_out: float | None = None,
    objective: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Any:
    """Checks the arguments of :func:`condense.api.teachers` that do not depend on the real data.

    Returns:
        The config of the method (or :class:`~condense.pretraining.TeacherOptions`) with these arguments in it.

    Raises:
        CondenseError: all mistakes, in one line.
    """
    if method:
        _check_pretrains(method, "teachers")
    flags = {"count": ("num_teachers", count), "epochs": ("teacher_epochs", epochs)}
    faults = _flag_faults(flags, held_out)
    settings = {**settings, **_positive_settings(flags)}
    if networks is not None:
        settings["committee"] = networks if isinstance(networks, str) else ",".join(networks)
    if settings.get("teachers"):
        faults.append(f"teachers={settings['teachers']}: are there already; leave it out to train others")

    def resolve_options() -> Any:
        if method:
            teacher_options(objective, method)
            return resolve_settings(METHODS.get(method), settings)
        config = build_config(teacher_options(objective, method), settings, "teachers")
        config.check_teachers()
        return config

    *_, config = run_checks(
        functools.partial(_raise, faults),
        lambda: build_config(DataOptions, options or {}, "the data"),
        lambda: pick_precision(precision, pick_device(device)),
        resolve_options,
    )
    return config


def teacher_options(objective: str | None, method: str | None) -> type[TeacherOptions]:
    """Returns the class of the settings of teachers, which for a method are part of its own.

    Raises:
        CondenseError: an unknown objective, or one beside a method.
    """
    if method:
        if objective is not None:
            raise CondenseError(f"--objective {objective}: --for {method} says what its teachers are trained for")
        config: type[TeacherOptions] = METHODS.get(method).config
        return config
    if objective not in (None, *OBJECTIVES):
        raise CondenseError(f"--objective {objective}: unknown{did_you_mean(objective, OBJECTIVES)}")
    return OBJECTIVES[objective or "classes"]


def check_scores(
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    network: str = "",
    device: str = "auto",
    precision: str = "auto",
) -> ScoreOptions:
    """Checks the arguments of :func:`condense.api.scores` that do not depend on the real data.

    Returns:
        The settings.

    Raises:
        CondenseError: all mistakes, in one line.
    """

    def resolve_options() -> ScoreOptions:
        config = build_config(ScoreOptions, settings, "scores")
        config.check_scores()
        if config.scores:
            raise CondenseError(f"scores={config.scores}: are there already; leave it out to make others")
        return config

    *_, config = run_checks(
        lambda: build_config(DataOptions, options or {}, "the data"),
        lambda: networks.check_network(network) if network else None,
        lambda: pick_precision(precision, pick_device(device)),
        resolve_options,
    )
    return config


def _check_pretrains(method: str, networks: str) -> None:
    """Checks that a method trains ``networks`` (experts or teachers) on real data."""
    if METHODS.get(method).pretrains != networks:
        names = [name for name in METHODS.names() if METHODS.get(name).pretrains == networks]
        raise CondenseError(f"--for {method}: this method has no {networks}; these have: {', '.join(names) or 'none'}")


def _flag_faults(flags: Mapping[str, tuple[str, int | None]], held_out: float | None) -> list[str]:
    """Mistakes in ``--count``, ``--epochs`` and ``--held-out``."""
    faults = [
        f"--{flag} {value}: must be at least 1"
        for flag, (_, value) in flags.items()
        if value is not None and whole_number(value, f"--{flag}") < 1
    ]
    if held_out is not None and not 0 <= held_out < 1:
        faults.append(f"--held-out {held_out:g}: must be at least 0 and less than 1")
    return faults


def _positive_settings(flags: Mapping[str, tuple[str, int | None]]) -> dict[str, int]:
    """The settings of the flags that have a valid value."""
    return {key: value for key, value in flags.values() if value is not None and value > 0}


def _raise(faults: Sequence[str]) -> None:
    if faults:
        raise CondenseError("; ".join(faults))


def _check_minutes(minutes: float | None) -> None:
    is_number = isinstance(minutes, numbers.Real)
    if minutes is not None and not (is_number and 0 < minutes <= MAX_MINUTES):
        shown = format(minutes, "g" if is_number else "")
        raise CondenseError(f"--minutes {shown}: must be more than 0 and at most {MAX_MINUTES:,}, ten years")


def check_classes(real: Task, what: str) -> None:
    """Checks that images have classes.

    Raises:
        CondenseError: they were read with ``unlabelled=true``.
    """
    if real.num_classes < 2:
        raise CondenseError(
            f"{what} needs classes, but {real.name} was read with unlabelled=true; krrst, and teachers with "
            "--objective barlow, need none"
        )


def check_fit(real: Task, ipc: int, network: str | Callable[..., nn.Module], config: Any = None) -> None:
    """Checks that the data have ``ipc`` images of every class and that the network fits the images.

    Args:
        config: of the method, if there is one. With ``balance="free"`` it is the total of ``ipc`` images for each class
            that the data must have.

    Raises:
        CondenseError: they do not have them, or it does not fit.
    """
    smallest = int(real.counts.argmin())
    if ipc < 1:
        raise CondenseError(f"--ipc {ipc}: must be at least 1")
    if getattr(config, "balance", None) == "free":
        if ipc * real.num_classes > len(real.train):
            raise CondenseError(
                f"--ipc {ipc}: with {real.num_classes} classes more than the {len(real.train)} images of {real.name}; "
                f"give at most {len(real.train) // real.num_classes}"
            )
    elif ipc > real.counts[smallest] and not real.options.repeat_small:
        raise CondenseError(
            f"--ipc {ipc}: class '{real.classes[smallest]}' of {real.name} has only {real.counts[smallest]} images; "
            f"give at most {real.counts[smallest]}, or repeat_small=true"
        )
    with rng.seeded("check"):
        networks.build_network(network, real.shape, real.num_classes)


def _resume_call(run_dir: Path) -> str:
    """The command or call that continues the run in a directory."""
    try:
        return resume_call(read_job(run_dir), run_dir)
    except CondenseError:
        return f"condense resume {run_dir}"


def check_outputs(real: Task, ipc: int, out: str | Path | None, run_dir: Path | None, *, force: bool) -> None:
    """Checks that the file of the set and the run directory can be written.

    Raises:
        CondenseError: they cannot, or one exists and not ``force``.
    """
    auxiliary = sum(array.nbytes for array in real.transform.arrays().values())
    channels, height, width = real.shape
    set_bytes = 4 * ipc * real.num_classes * channels * height * width + auxiliary
    if out is not None:
        check_writable(Path(out), force=force, size=set_bytes)
    if run_dir is None:
        return
    if (run_dir / CONFIG_FILE).exists() and not force:
        finished = (run_dir / RESULT_FILE).exists()
        advice = "take another --run-dir" if finished else f"resume with: {_resume_call(run_dir)}"
        raise CondenseError(f"{run_dir} holds a {'finished ' * finished}run; {advice}, or replace it with --force")
    check_writable(run_dir / CONFIG_FILE, force=True, size=6 * set_bytes)
