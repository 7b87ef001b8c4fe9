"""Every method for the same minutes on the same images: ``python -m condense.benchmarks.equal_time --data NAME=PATH``.

Each set is made and judged by the command line in processes of their own, so seconds and peak memory are those that a
user would see. Existing sets and records are kept: the same command continues a stopped one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condense.benchmarks.speed.measure import Parser, guarded, positive
from condense.errors import CondenseError
from condense.formatting import aligned, duration, percent, size
from condense.registry import METHODS
from condense.sets import DistilledSet

SETTINGS: dict[str, list[str]] = {
    # The time limit ends the run long before 1,000 networks, of which a quarter would match class by class.
    "dcc": ["warm_share=0.035"],
    "dsac": ["warm_share=0.035"],
}
"""What differs from a method's defaults."""


def run_condense(*arguments: str) -> None:
    """One command of the command line, its progress on this terminal."""
    code = subprocess.run([sys.executable, "-m", "condense", *arguments]).returncode
    if code:
        raise CondenseError(f"`condense {' '.join(arguments)}` ended with code {code}")


def data_name(data: str) -> str:
    """What files call the data of ``--data``."""
    return data.partition("=")[0].split("/")[-1]


def distill_if_missing(
    path: Path, method: str, data: str, ipc: int, network: str, run_directory: Path, *options: str
) -> None:
    """Distils a set to ``path`` unless the file exists; ``options`` are flags and settings of the command."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    line = ["distill", method, "--data", data, "--ipc", str(ipc), "--network", network, "--out", str(path)]
    run_condense(*line, "--run-dir", str(run_directory), "--force", "--track", "none", *options)


def evaluate_if_missing(
    record: Path, path: Path, data: str, protocol: str, controls: str, teachers: Path | None = None
) -> None:
    """Evaluates the set at ``path`` and draws its images, unless the record exists."""
    if record.exists():
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    line = ["evaluate", str(path), "--data", data, "--protocol", protocol, "--controls", controls]
    run_condense(*line, "--json", str(record), *(("--teachers", str(teachers)) if teachers else ()))
    run_condense("preview", str(path), "--out", str(record.with_suffix(".png")), "--force")


def make_cell(
    method: str,
    data: str,
    out: Path,
    *,
    ipc: int,
    network: str,
    minutes: float | None,
    protocol: str,
    settings_first: Sequence[str] = (),
    controls: str = "random,noise",
    teachers: Path | None = None,
    budget: str = "",
) -> tuple[Path, Path]:
    """Returns the paths of the set and the record of ``method`` (settings after colons); missing ones are made.

    Args:
        settings_first: settings that are not part of the name; those of the name override them.
        budget: part of the file names, in place of the minutes.
    """
    method, *settings = method.split(":")
    limit = [] if minutes is None else ["--minutes", f"{minutes:g}"]
    stem = "-".join([data_name(data), method, f"ipc{ipc}", network, budget or f"{minutes:g}min", protocol, *settings])
    path, record = out / "sets" / f"{stem}.h5", out / "records" / f"{stem}.json"
    distill_if_missing(path, method, data, ipc, network, out / "runs" / stem, *limit, *settings_first, *settings)
    evaluate_if_missing(record, path, data, protocol, controls, teachers)
    return path, record


def table(names: Sequence[str], records: Sequence[dict[str, Any]], steps: Sequence[int]) -> str:
    """One row for each record: accuracies ± std of students, seconds, peak memory."""
    rows = [["method", "steps", "seconds", "of it preparing", "peak memory", "distilled", "random", "noise"]]
    for name, record, steps_done in zip(names, records, steps):
        cost = record["cost"]
        arms = {entry["arm"]: percent(entry["mean"], entry["std"]) for entry in record["results"]}
        cells = [arms.get(arm, "-") for arm in ("distilled", "random", "noise")]
        prepared = duration(cost["preparation_seconds"]) if cost.get("preparation_seconds") else "-"
        rows.append(
            [
                name,
                str(steps_done),
                duration(cost["seconds"] + cost.get("preparation_seconds", 0)),
                prepared,
                size(cost["peak_memory"]["host"]),
                *cells,
            ]
        )
    return aligned(rows)


def methods() -> list[str]:
    """Those that learn and spend their time on neither experts nor teachers, which have tables of their own
    (``trajectories``, ``curriculum``)."""
    entries = [METHODS.get(name) for name in METHODS.names()]
    return [e.name for e in entries if e.order and e.pretrains not in ("experts", "teachers")]


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.equal_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="real images, as for `condense distill`")
    parser.add_argument("--out", type=Path, required=True, help="folder for sets, records and the table")
    parser.add_argument("--methods", default=",".join(methods()), help="A,B:KEY=VALUE,...; all that learn by default")
    parser.add_argument("--ipc", type=positive, default=1)
    parser.add_argument("--network", default="convnet-d3-w32-in")
    parser.add_argument("--minutes", type=float, default=10.0, help="of distilling, for each method")
    parser.add_argument("--protocol", default="quick-v1")
    options = parser.parse_args(arguments)
    names, records, steps = options.methods.split(","), [], []
    for method in names:
        bare = method.partition(":")[0]
        METHODS.get(bare)
        path, record = make_cell(
            method,
            options.data,
            options.out,
            ipc=options.ipc,
            network=options.network,
            minutes=options.minutes,
            protocol=options.protocol,
            settings_first=SETTINGS.get(bare, ()),
        )
        records.append(json.loads(record.read_text()))
        steps.append(int(DistilledSet.load(path).manifest["steps_done"]))
        text = table(names[: len(records)], records, steps)
        (options.out / "table.txt").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    guarded(_main, None)
