"""TODO-DOC."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from condense import networks, rng
from condense.config import build
from condense.data import DataOptions, Task
from condense.device import pick_device, pick_precision
from condense.errors import CondenseError, did_you_mean
from condense.jobs.job import _config
from condense.judge import get_protocol
from condense.pretraining import teachers, trajectories
from condense.registry import METHODS
from condense.tracking import check_tracker


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
    config = METHODS.get(method).config if method else teachers.TeacherOptions
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
        built = build(teachers.TeacherOptions, settings, "teachers")
        built.check_teachers()
        return built

    *_, built = all_at_once(
        flags_are_right,
        lambda: build(DataOptions, options or {}, "the data"),
        lambda: pick_precision(precision, pick_device(device)),
        settled,
    )
    return built


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
