"""``condense suite NAME``: a whole table, method x dataset x ipc x seed, made, judged and put on a page; resumable."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from condense import api, networks
from condense.benchmarks import leaderboard
from condense.config import (
    MAX_INTEGER,
    RUN_KEYS,
    as_mapping,
    build_config,
    load_recipe,
    packaged_yaml,
    read_yaml_file,
    suite_cells,
)
from condense.data import DATASETS, DataOptions, Task
from condense.device import pick_device
from condense.errors import CondenseError, did_you_mean
from condense.files import check_name
from condense.formatting import aligned, percent, shorten
from condense.jobs import checks as checks_module
from condense.jobs import expected_manifest
from condense.judge import (
    MAX_RUNS,
    OWN,
    evaluation,
    get_protocol,
    is_augmented,
    labels_of,
    means_by_arm,
    records,
    summary,
)
from condense.judge import arms as arms_module
from condense.plugins import plugin_versions
from condense.ranks import Ranks
from condense.registry import METHODS
from condense.sets import DistilledSet, save_grid
from condense.tracking import is_main_process

RECORDS, SETS, RUNS, PAGE = "records", "sets", "runs", "page"

ALL = "all"
"""Among the cells of a method: settings of every cell."""


@dataclass(frozen=True)
class Suite:
    """A table to fill; a YAML file in ``benchmarks/suites``, or the user's own."""

    name: str
    """Begins the names of its records."""
    summary: str
    """One line for people."""
    runs: int
    """Students per arm."""
    seeds: list[int]
    """Seeds of the distilling, each a row of its own."""
    networks: list[str]
    """Architectures judged on; "own" is that of the task or recipe."""
    protocol: str = ""
    """What every set is judged under; sets of ``cells`` under the protocol of their recipe."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """Data by name: ``ipc``, a list of images per class, ``network`` that methods match with, ``controls`` (arms), and
    ``options`` of the data, e.g. resize."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of each method of ``methods`` that has them."""
    methods: dict[str, Any] = field(default_factory=dict)
    """Method, with settings by ``DATA-ipcN``, null where a cell is left out, and ``all`` for those of every cell; by
    default those in the methods' own YAML files."""
    cells: dict[str, Any] = field(default_factory=dict)
    """Instead of tasks and methods: cells by name, each a ``recipe`` with settings that differ from it, and with
    ``controls`` where they differ from the suite's. Once read, each is a :class:`Cell` with seed 0."""
    controls: list[str] = field(default_factory=list)
    """Control arms of ``cells``."""


@dataclass(frozen=True)
class Cell:
    """One row to be: a method on some data with some images per class and a seed."""

    suite: str
    method: str
    data: str
    ipc: int
    network: str | None
    """None: the default of the method."""
    seed: int
    protocol: str
    controls: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the data."""
    name: str = ""
    """Of a cell that is a recipe."""

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"{self.suite}-{self.name or f'{self.data}-{self.method}-ipc{self.ipc}'}-seed{self.seed}"


@dataclass
class SuiteResult:
    """What came of a suite: records that are there, cells that are not and why, and the page."""

    made: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    page: Path | None = None


@functools.cache
def suites() -> dict[str, Suite]:
    """Every packaged suite by name."""
    packaged = [_read_suite(entry, entry.name) for entry in packaged_yaml("benchmarks/suites")]
    return {suite.name: suite for suite in packaged}


def get_suite(name: str) -> Suite:
    """A packaged suite, or the one in a YAML file.

    Raises:
        CondenseError: no such name or file, or its content is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        return _read_suite(Path(name), name)
    if name not in suites():
        raise CondenseError(f"unknown suite '{name}'{did_you_mean(name, suites()) or '; or give a .yaml file'}")
    return suites()[name]


@dataclass(frozen=True)
class _Data:
    """One of a suite's ``tasks``."""

    network: str
    ipc: list[int]
    controls: list[str]
    options: dict[str, Any] = field(default_factory=dict)


def _read_suite(path: Path, where: str) -> Suite:
    suite = build_config(Suite, read_yaml_file(path, where), where)
    checks: list[Callable[[], Any]] = [
        lambda: check_name(suite.name, f"{where}: name"),
        functools.partial(_check_numbers, f"{where}: runs", [suite.runs], MAX_RUNS),
        functools.partial(_check_numbers, f"{where}: seeds", suite.seeds, 2**63 - 1, minimum=0),
    ]
    checks += [functools.partial(networks.check_network, name) for name in suite.networks if name != OWN]
    checks += [functools.partial(arms_module.check_control, name) for name in suite.controls]
    if suite.cells:
        if suite.tasks or suite.methods or suite.protocol or suite.settings:
            raise CondenseError(f"{where}: cells go without tasks, methods, settings and protocol")
        recipes = [functools.partial(_recipe_cell, suite, name, where) for name in suite.cells]
        found = checks_module.run_checks(*checks, *recipes)
        suite.cells.update(zip(suite.cells, found[len(checks) :]))
        return suite
    checks.append(functools.partial(_check_protocol, suite.protocol, where))
    cell_networks: dict[str, str] = {}
    for data, content in as_mapping(suite.tasks, f"{where}: tasks").items():
        task = build_config(_Data, as_mapping(content, f"{where}: {data}"), f"{where}: {data}")
        checks.append(functools.partial(check_name, data, f"{where}: tasks"))
        checks.append(functools.partial(networks.check_network, task.network))
        checks.append(functools.partial(_check_numbers, f"{where}: {data}: ipc", task.ipc, MAX_INTEGER))
        checks += [functools.partial(arms_module.check_control, name) for name in task.controls]
        suite.tasks[data] = task
        checks.append(functools.partial(build_config, DataOptions, task.options, f"{where}: {data}: options"))
        cell_networks |= {f"{data}-ipc{ipc}": task.network for ipc in task.ipc} | {ALL: task.network}
    if not as_mapping(suite.methods, f"{where}: methods"):
        suite.methods.update(suite_cells(suite.name))
    if not suite.methods:
        raise CondenseError(f"{where}: lacks methods, and no method's own file has cells for a suite '{suite.name}'")
    for method, cells in suite.methods.items():
        checks.append(functools.partial(checks_module.check_request, method, {}))
        suite.methods[method] = _with_settings(suite, method, as_mapping(cells, f"{where}: {method}"), where)
        for name, values in suite.methods[method].items():
            checks.append(
                functools.partial(_check_cell, method, name, values or {}, cell_networks, f"{where}: {method}, {name}")
            )
    checks_module.run_checks(*checks)
    unused = set(suite.settings) - {name for cells in suite.methods.values() for name in cells[ALL]}
    if unused:
        raise CondenseError(f"{where}: settings: {min(unused)}: no method of the suite has it")
    return suite


def _with_settings(suite: Suite, method: str, method_cells: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The cells of a method with the suite's settings that the method has and those of ``all``; null stays null."""
    known = [each.name for each in fields(METHODS.get(method).config)] if method in METHODS.names() else []
    shared = {name: value for name, value in suite.settings.items() if name in known}
    shared |= as_mapping(method_cells.get(ALL, {}), f"{where}: {method}, {ALL}")
    own = {
        name: None if values is None else shared | as_mapping(values, f"{where}: {method}, {name}")
        for name, values in method_cells.items()
    }
    return own | {ALL: shared}


def _recipe_cell(suite: Suite, name: str, where: str) -> Cell:
    """The cell of a recipe, with seed 0.

    Raises:
        CondenseError: the recipe is unknown, or its settings are invalid.
    """
    check_name(name, f"{where}: cells")
    keys = dict(as_mapping(suite.cells[name], f"{where}: {name}"))
    try:
        recipe, controls = str(keys.pop("recipe", "")), keys.pop("controls", suite.controls)
        for control in controls:
            arms_module.check_control(control)
        keys = load_recipe(recipe) | keys
        entry = METHODS.get(str(keys["method"]))
        settings = {key: value for key, value in keys.items() if key not in RUN_KEYS}
        options = {key: settings.pop(key) for key in list(settings) if key in DataOptions.__dataclass_fields__}
        if "ipc" not in keys:
            raise CondenseError("lacks ipc")
        network, protocol = keys.get("network"), str(keys.get("protocol", entry.protocol))
        checks_module.check_request(entry.name, settings, options, network=network, protocol=protocol)
        _check_protocol(protocol, entry.name)
    except CondenseError as fault:
        raise CondenseError(f"{where}: {name}: {fault}") from fault
    return Cell(
        suite.name,
        entry.name,
        str(keys["data"]),
        int(keys["ipc"]),
        network,
        0,
        protocol,
        tuple(controls),
        settings,
        options,
        name,
    )


def _check_protocol(name: str, where: str) -> None:
    if get_protocol(name).is_transfer:
        raise CondenseError(
            f"{where}: protocol={name}: a suite compares accuracies on the data of the sets; use `evaluate`"
        )


def _check_numbers(where: str, values: Sequence[int], maximum: int, *, minimum: int = 1) -> None:
    if not values or not all(minimum <= value <= maximum for value in values):
        numbers = ", ".join(map(str, values[:5])) or "nothing"
        raise CondenseError(
            f"{where}: must be whole numbers from {minimum} to {maximum:,}, not {shorten(numbers, 100)}"
        )


def _check_cell(
    method: str, name: str, values: Mapping[str, Any], cell_networks: Mapping[str, str], where: str
) -> None:
    if name not in cell_networks:
        raise CondenseError(f"{where}: none of the suite's cells{did_you_mean(name, cell_networks)}")
    try:
        checks_module.check_request(method, values, network=cell_networks[name])
    except CondenseError as fault:
        raise CondenseError(f"{where}: {fault}") from fault


def cells(suite: Suite, methods: Sequence[str] = (), datasets: Sequence[str] = ()) -> list[Cell]:
    """The suite's cells, data by data, so that control arms are trained once and found in the cache by the rest.

    Args:
        suite: the table.
        methods: only these, where given.
        datasets: only these, where given.

    Raises:
        CondenseError: a method or dataset that the suite does not have.
    """
    recipes = [replace(cell, seed=seed) for cell in suite.cells.values() for seed in suite.seeds]
    known_methods = dict.fromkeys([*suite.methods, *(cell.method for cell in recipes)])
    for flag, asked, known in (("--methods", methods, known_methods), ("--datasets", datasets, datasets_of(suite))):
        for name in asked:
            if name not in known:
                raise CondenseError(f"{flag} {name}: not in the suite '{suite.name}'{did_you_mean(name, known)}")
    if recipes:
        return [
            cell
            for cell in recipes
            if (not methods or cell.method in methods) and (not datasets or cell.data in datasets)
        ]
    return [
        Cell(
            suite.name,
            method,
            data,
            ipc,
            task.network,
            seed,
            suite.protocol,
            tuple(task.controls),
            suite.methods[method].get(f"{data}-ipc{ipc}", suite.methods[method][ALL]),
            task.options,
        )
        for data, task in suite.tasks.items()
        if not datasets or data in datasets
        for ipc in task.ipc
        for method in suite.methods
        if not methods or method in methods
        if suite.methods[method].get(f"{data}-ipc{ipc}", {}) is not None
        for seed in suite.seeds
    ]


def with_seeds(suite: Suite, seeds: Sequence[int]) -> Suite:
    """The suite with other seeds of distillation, a set for each.

    Raises:
        CondenseError: no seed, or one out of range.
    """
    _check_numbers("--seeds", seeds, 2**63 - 1, minimum=0)
    return replace(suite, seeds=list(seeds))


def table(paths: Sequence[Path]) -> str:
    """Accuracies of records, those of sets that differ only in their seed as one row; the best rows of some data first.

    ± is the standard deviation over all students of a row, and ``std of sets`` that of the means of its sets.
    """
    groups: dict[tuple[Any, ...], list[list[float]]] = {}
    for path in paths:
        record = records.read_record(path)
        described, cell = record["set"], re.sub(r"-seed\d+$", "", path.stem)
        augments = is_augmented(record["results"])
        for entry in record["results"]:
            if entry["arm"] == "distilled" and entry["augment"] == augments:
                of_set = described["dataset"], described["ipc"], cell, labels_of(entry, record)
                key = *of_set, entry["network"], record["protocol"]["name"]
                groups.setdefault(key, []).append(entry["accuracies"])
    rows = []
    for (data, ipc, cell, labels, network, protocol), sets in groups.items():
        students, of_sets = summary(list(itertools.chain(*sets))), summary([statistics.fmean(one) for one in sets])
        std = "" if of_sets["std"] is None else f"{100 * of_sets['std']:.1f}"
        counts = str(len(sets)), str(sum(map(len, sets)))
        accuracy = percent(students["mean"], students["std"])
        rows.append((data, ipc, -students["mean"], [cell, labels, network, protocol, *counts, accuracy, std]))
    head = ["cell", "labels", "network", "protocol", "sets", "students", "accuracy, % (± std)", "std of sets"]
    return aligned([head, *(cells for *_, cells in sorted(rows))], ruled=True)


def datasets_of(suite: Suite) -> list[str]:
    """Names of the data of a suite."""
    return list(dict.fromkeys([*suite.tasks, *(cell.data for cell in suite.cells.values())]))


def run(
    suite: Suite,
    out: Path,
    *,
    data: Mapping[str, str] | None = None,
    methods: Sequence[str] = (),
    datasets: Sequence[str] = (),
    device: str = "auto",
    precision: str = "auto",
    download: bool = False,
    quiet: bool = True,
) -> SuiteResult:
    """Distils and evaluates every cell, writes records and pictures, and builds the page.

    A cell whose record has the same settings, protocol and networks is kept; a stopped one is resumed. A cell that
    fails is reported and the others are made. With several ranks, which share ``out``, the first error ends the suite,
    because the ranks would no longer do the same work.

    Args:
        suite: the table.
        out: folder for ``records`` (JSON and PNG), ``sets``, ``runs`` and ``page``.
        data: where named data are that are not registered, e.g. ``{"cifar10-jpeg": "./cifar10"}``.
        methods: only these.
        datasets: only these.
        download: fetch registered data that are not on disk.
    """
    selected = cells(suite, methods, datasets)
    outcome = SuiteResult()
    tasks: dict[tuple[str, str], Task | str] = {}
    ranks = Ranks(pick_device(device))
    began, spent = time.monotonic(), 0
    for number, cell in enumerate(selected, 1):
        key = cell.data, repr(cell.options)
        if key not in tasks:
            tasks[key] = _task(cell, data or {}, download)
        real, path = tasks[key], out / RECORDS / f"{cell.stem}.json"
        try:
            if isinstance(real, str):
                raise CondenseError(real)
            if ranks.broadcast(_is_current(path, suite, cell, real, device, precision)):
                outcome.kept.append(path)
                line = "is there"
            else:
                spent += 1
                line = _fill(suite, cell, real, out, device, precision, quiet or not is_main_process())
                outcome.made.append(path)
        except CondenseError as fault:
            if ranks.world_size > 1:
                raise
            outcome.failed[cell.stem] = str(fault)
            line = f"not made: {fault}"
        if is_main_process() and not quiet:
            left = (time.monotonic() - began) / max(spent, 1) * (len(selected) - number) / 60
            rest = f"; about {left:.0f} min left" if spent and number < len(selected) else ""
            print(f"[{number}/{len(selected)}] {cell.stem}: {line}{rest}", file=sys.stderr, flush=True)
    if is_main_process() and any((out / RECORDS).glob("*.json")):
        outcome.page = leaderboard.build_page(out / RECORDS, out / PAGE).index
    return outcome


def _task(cell: Cell, data: Mapping[str, str], download: bool) -> Task | str:
    """The data, or why they cannot be had."""
    name = cell.data
    if name not in data and name not in DATASETS:
        return f"no data called {name}; give --data {name}=PATH"
    try:
        return api.image_task(f"{name}={data[name]}" if name in data else name, download=download, **cell.options)
    except CondenseError as fault:
        return str(fault)


def _is_current(path: Path, suite: Suite, cell: Cell, real: Task, device: str, precision: str) -> bool:
    """Whether the cell's record is there and is of these settings."""
    try:
        record = records.read_record(path)
    except CondenseError:
        return False
    protocol = get_protocol(cell.protocol)
    judged = {entry["network"] for entry in record["results"]}
    expected = expected_manifest(**_cell_arguments(cell, real), device=device, precision=precision)
    networks_wanted = {expected["network"] if name == OWN else name for name in suite.networks}
    arms = {entry["arm"] for entry in [*record["results"], *record["missing"]]}
    if any(entry["arm"] == "distilled" and entry["labels"] == "hard" for entry in record["results"]):
        arms.add("distilled-hard")
    return (
        # The order of key=value settings in a command follows the fields of the config, which may be reordered.
        sorted(shlex.split(str(record["set"]["command"]))) == sorted(shlex.split(expected["command"]))
        and record["data"]["fingerprint"] == real.fingerprint
        and (record["protocol"]["name"], record["protocol"]["version"]) == (protocol.name, protocol.version)
        and record["runs"] == suite.runs
        and record["set"].get("plugins", {}) == expected["plugins"]
        and record.get("plugins", {}) == plugin_versions(judged)
        and networks_wanted <= judged
        and set(cell.controls) <= arms
    )


def _cell_arguments(cell: Cell, real: Task) -> dict[str, Any]:
    """The cell as arguments of ``api``."""
    return {
        "method": cell.method,
        "real": real,
        "ipc": cell.ipc,
        "network": cell.network,
        "seed": cell.seed,
        "protocol": cell.protocol,
        **cell.settings,
    }


def _fill(suite: Suite, cell: Cell, real: Task, out: Path, device: str, precision: str, quiet: bool) -> str:
    """Makes, judges and draws one cell; a line on what came out."""
    began = time.monotonic()
    distilled = api.distill_or_resume(
        **_cell_arguments(cell, real),
        out=out / SETS / f"{cell.stem}.h5",
        run_dir=out / RUNS / cell.stem,
        device=device,
        precision=precision,
        quiet=quiet,
    ).with_data(real)
    record = judge(suite, cell, distilled, real, device=device, precision=precision, quiet=quiet)
    path = out / RECORDS / f"{cell.stem}.json"
    if is_main_process():
        images, per_class = distilled.pictures()
        save_grid(images, path.with_suffix(".png"), columns=per_class)
        records.write_record(record, path)
    means = means_by_arm(record)
    compared = f" (random {100 * means['random']:.1f} %)" if "random" in means else ""
    return f"{100 * means['distilled']:.1f} %{compared} in {(time.monotonic() - began) / 60:.1f} min"


def judge(suite: Suite, cell: Cell, distilled: DistilledSet, real: Task, **options: Any) -> dict[str, Any]:
    """The record of a set under the suite's rules."""
    return evaluation.evaluate(
        distilled,
        real,
        networks=suite.networks,
        runs=suite.runs,
        protocol=cell.protocol,
        controls=cell.controls,
        **options,
    )
