"""Trajectory matching, from experts to judged sets: ``python -m condense.benchmarks.trajectories --data NAME=PATH``.

Trains each kind of experts once, then makes and judges a set by every method of the family in equal minutes, all by the
command line in processes of their own. Existing files are kept: the same command continues a stopped one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condense.benchmarks import equal_time
from condense.benchmarks.speed.measure import Parser, guarded, positive
from condense.errors import CondenseError
from condense.formatting import aligned, duration, percent, size
from condense.pretraining import read_trajectory_file
from condense.registry import METHODS
from condense.sets import DistilledSet

KINDS = {"mtt": "mtt", "tesla": "mtt", "ftd": "ftd", "datm": "ftd", "ast": "ast"}
"""Methods and the one whose experts they are given."""
SHORT = ["expert_epochs=1", "syn_steps=20", "lr_start=0.02", "lr_img=1000", "max_start_epoch=5"]
"""Settings for few short experts and some hundred steps, for every method: students of 20 steps follow one epoch."""
RATES = {1: ["lr_lr=1e-6", "lr_img=300"], 10: ["lr_lr=1e-5"]}
"""By images per class; slopes are the larger the fewer there are."""
SETTINGS: dict[str, list[str]] = {
    "mtt": SHORT,
    "tesla": SHORT,
    # An average over the few hundred steps that a CPU makes.
    "ftd": [*SHORT, "ema=0.98"],
    "ast": [*SHORT, "expert_epochs=2", "lr_start=0.002"],
    # At 1000, one bad step undid a hundred good ones.
    "datm": [*SHORT, "expand_steps=100", "gate=1.1", "lr_img=300"],
}
"""What differs from a method's defaults."""


def experts(kind: str, data: str, out: Path, *, network: str, count: int, epochs: int) -> Path:
    """Returns the path of a file of experts of a kind; trains them if it is missing."""
    path = out / "experts" / f"{equal_time.data_name(data)}-{kind}-{network}-{count}x{epochs}.h5"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        equal_time.run_condense(
            "experts",
            "--data",
            data,
            "--network",
            network,
            "--for",
            kind,
            "--count",
            str(count),
            "--epochs",
            str(epochs),
            "--out",
            str(path),
        )
    return path


def table(rows: Sequence[tuple[dict[str, Any], DistilledSet, Path]]) -> str:
    """One row for each record: what experts and set took, and accuracies ± std of students."""
    lines = [["method", "ipc", "experts", "their disk", "steps", "seconds", "peak memory", "distilled", "random"]]
    for record, distilled, path in rows:
        file, cost = read_trajectory_file(path), record["cost"]
        main = [entry for entry in record["results"] if entry["labels"] == record["results"][0]["labels"]]
        arms = {entry["arm"]: percent(entry["mean"], entry["std"]) for entry in main}
        lines.append(
            [
                record["set"]["method"],
                str(record["set"]["ipc"]),
                duration(file.seconds(range(file.count), file.epochs)),
                size(path.stat().st_size),
                str(distilled.manifest["steps_done"]),
                duration(cost["seconds"]),
                size(cost["peak_memory"]["host"]),
                arms["distilled"],
                arms.get("random", "-"),
            ]
        )
    return aligned(lines)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.trajectories", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="real images, as for `condense distill`")
    parser.add_argument("--out", type=Path, required=True, help="folder for experts, sets, records and the table")
    parser.add_argument("--methods", default=",".join(KINDS), help="A,B,...; all of the family by default")
    parser.add_argument("--ipc", type=positive, nargs="+", default=[10], help="images per class")
    parser.add_argument("--network", default="convnet-d3-w32-in")
    parser.add_argument("--count", type=positive, default=5, help="experts of each kind")
    parser.add_argument("--epochs", type=positive, default=6, help="of an expert's training")
    parser.add_argument("--minutes", type=float, default=9.0, help="of distilling, for each method and ipc")
    options = parser.parse_args(arguments)
    rows: list[tuple[dict[str, Any], DistilledSet, Path]] = []
    methods = options.methods.split(",")
    for method in methods:
        if method not in KINDS:
            raise CondenseError(f"--methods {method}: must be of {', '.join(KINDS)}")
    for ipc in options.ipc:
        for method in methods:
            path = experts(
                KINDS[method],
                options.data,
                options.out,
                network=options.network,
                count=options.count,
                epochs=options.epochs,
            )
            soft = METHODS.get(method).labels == "soft"
            settings = [f"experts={path}", *SETTINGS[method], *RATES.get(ipc, RATES[10])]
            set_path, record = equal_time.make_cell(
                method,
                options.data,
                options.out,
                ipc=ipc,
                network=options.network,
                minutes=options.minutes,
                protocol="quick-soft-v1" if soft else "quick-v1",
                settings_first=settings,
                controls="random",
                teachers=path if soft else None,
            )
            rows.append((json.loads(record.read_text()), DistilledSet.load(set_path), path))
            (options.out / "table.txt").write_text(table(rows) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    guarded(_main, None)
