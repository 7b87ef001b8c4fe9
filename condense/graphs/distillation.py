"""One run of a method that distils graphs: checks of the arguments, the run and the manifest of its set."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from condense.commands import format_value
from condense.config import build_config, whole_number
from condense.device import device_name
from condense.errors import CondenseError
from condense.files import as_path, check_name, check_writable
from condense.formatting import shorten
from condense.graphs.graph_set import GraphSet, SyntheticGraphs
from condense.graphs.protocol import get_graph_protocol
from condense.graphs.task import TU_PREFIX, GraphOptions, GraphTask
from condense.jobs import run_checks
from condense.registry import Method
from condense.version import __version__


@dataclass(frozen=True)
class GraphRun:
    """What a method needs besides the data and its settings."""

    ipc: int
    """Largest number of stored graphs of each class."""
    seed: int


def check_graph_request(
    entry: Method,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    protocol: str | None = None,
    tag: str | None = None,
    **others: Any,
) -> None:
    """Checks the arguments of a run that do not depend on the real data.

    Args:
        others: arguments of methods that distil images, which are refused unless they have their defaults.

    Raises:
        CondenseError: all mistakes, in one line.
    """
    run_checks(
        lambda: build_config(entry.config, settings, f"the method '{entry.name}'"),
        lambda: build_config(GraphOptions, options or {}, "graphs"),
        lambda: get_graph_protocol(protocol or entry.protocol),
        lambda: None if tag is None else check_name(tag, "--tag"),
        lambda: refuse_others(others, f"the method '{entry.name}' takes seconds and trains no network"),
    )


def refuse_others(others: Mapping[str, Any], why: str) -> None:
    """Refuses arguments that have no meaning for graphs.

    Raises:
        CondenseError: one of them is not the default.
    """
    given = {name: value for name, value in others.items() if value not in (None, False, "auto", "none", (), [])}
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')} {shorten(str(value), 100)}" for name, value in given.items())
        raise CondenseError(f"{shown}: {why}; leave it out")


def distill_graphs(
    entry: Method,
    task: GraphTask,
    ipc: int,
    *,
    seed: int = 0,
    out: str | Path | None = None,
    tag: str | None = None,
    protocol: str | None = None,
    force: bool = False,
    settings: Mapping[str, Any],
) -> GraphSet:
    """Distils real graphs. There is no run directory: a run that is killed leaves nothing and is started again.

    Args:
        entry: the method.
        task: the real graphs.
        ipc: largest number of stored graphs of each class.
        seed: random seed.
        out: file to write; None writes no file.
        tag: suffix of the set's name.
        protocol: evaluation protocol named in the manifest.
        force: overwrite ``out``.
        settings: hyper-parameters of the method.

    Raises:
        CondenseError: invalid arguments, or the file cannot be written.
    """
    config: Any = build_config(entry.config, settings, f"the method '{entry.name}'")
    ipc, seed = whole_number(ipc, "--ipc"), whole_number(seed, "--seed")
    if ipc < 1:
        raise CondenseError(f"--ipc {ipc}: must be at least 1")
    if out is not None:
        check_writable(as_path(out, "--out"), force=force)
    began = time.monotonic()
    synthetic = entry.function(task, config, GraphRun(ipc, seed))
    seconds = round(time.monotonic() - began, 2)
    rules = get_graph_protocol(protocol or entry.protocol)
    made = _to_graph_set(entry, task, ipc, seed, tag, rules.name, config, synthetic, seconds)
    if out is not None:
        made.save(out, force=force)
    return made


def data_argument(task: GraphTask) -> str:
    """The value of ``--data`` for a task, with PATH instead of a file of the user."""
    return task.source if task.source and TU_PREFIX in task.source else f"{task.name}=PATH"


def _to_graph_set(
    entry: Method,
    task: GraphTask,
    ipc: int,
    seed: int,
    tag: str | None,
    protocol: str,
    config: Any,
    synthetic: SyntheticGraphs,
    seconds: float,
) -> GraphSet:
    values, options = dataclasses.asdict(config), dataclasses.asdict(task.options)
    words = ["condense", "distill", entry.name, "--data", data_argument(task), "--ipc", str(ipc)]
    words += ["--seed", str(seed)] * (seed != 0) + ["--tag", str(tag)] * (tag is not None)
    for given, default in ((values, entry.config()), (options, GraphOptions())):
        words += [f"{key}={format_value(value)}" for key, value in given.items() if value != getattr(default, key)]
    nodes, edges = task.feature_sizes()
    manifest = {
        "name": f"{task.name}/{entry.name}-ipc{ipc}" + (f".{tag}" if tag else ""),
        "dataset": task.name,
        "classes": list(task.classes),
        "ipc": ipc,
        "feature_sizes": {"nodes": nodes, "edges": edges},
        "method": entry.name,
        "paper": entry.paper,
        "command": shlex.join(words),
        "settings": values,
        "seed": seed,
        "protocol": protocol,
        "data": {"fingerprint": task.fingerprint, "options": options, "split": task.split},
        "code_version": __version__,
        "cost": {"seconds": seconds, "device": device_name(torch.device("cpu"))},
    }
    return GraphSet(synthetic, manifest)
