"""Curriculum synthesis, from teachers to judged sets: ``python -m condense.benchmarks.curriculum --data NAME=PATH``.

Trains a committee once, then makes and judges a set by every method of the family beside three controls: random images
with the same labels, random images with their classes, and noise with the same labels. All by the command line in
processes of their own. Existing files are kept: the same command continues a stopped one.
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
from condense.networks import read_teacher_file

COMPARED_METHODS = ("sre2l", "cda", "dwa", "cvdd", "infer", "nrr", "rded")
SMALL = ["temperature=4"]
"""For every method: small teachers have small logits."""
SETTINGS: dict[str, list[str]] = {
    "sre2l": [],
    "cda": ["lr_img=0.25", "bn_weight=0.01"],
    "dwa": [],
    "cvdd": ["label_statistics=running"],
    "infer": ["bn_weight=0.01"],
    "nrr": [],
    "rded": [],
}
"""What differs from a method's defaults."""
SHARED = {"cvdd", "infer"}
"""Methods that take all teachers; the others take the first."""
CONTROL_FLAGS = "random,random-hard,noise"


def train_teachers(data: str, out: Path, *, network: str, count: int, epochs: int) -> Path:
    """Returns the path of a file of teachers; trains them if it is missing."""
    path = out / f"teachers-{equal_time.data_name(data)}-{network}-{count}x{epochs}.h5"
    if not path.exists():
        equal_time.run_condense(
            "teachers",
            "--data",
            data,
            "--networks",
            network,
            "--count",
            str(count),
            "--epochs",
            str(epochs),
            "--for",
            "sre2l",
            "--out",
            str(path),
        )
    return path


def run_cell(
    method: str, data: str, out: Path, committee: Path, *, ipc: int, network: str, steps: int, count: int, protocol: str
) -> dict[str, Any]:
    """Returns the record of a method (settings after colons); the set and the record are made if they are missing."""
    bare = method.partition(":")[0]
    settings = [f"teachers={committee}", *SMALL, *SETTINGS[bare], *([] if bare == "rded" else [f"steps={steps}"])]
    settings += [f"num_teachers={count}"] * (bare in SHARED)
    _, record = equal_time.make_cell(
        method,
        data,
        out,
        ipc=ipc,
        network=network,
        minutes=None,
        protocol=protocol,
        settings_first=settings,
        controls=CONTROL_FLAGS,
        teachers=committee,
        budget=f"{steps}steps-of-{committee.stem}",
    )
    return dict(json.loads(record.read_text()))


def table(methods: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """One row for each record: labels, bytes, seconds, and accuracies ± std of students."""
    arms = ("distilled", "random", "random-hard", "noise")
    rows = [["method", "labels", "label bytes", "image bytes", "seconds", "peak memory", *arms]]
    for method, record in zip(methods, records):
        accuracies = {entry["arm"]: percent(entry["mean"], entry["std"]) for entry in record["results"]}
        distilled, cost = record["set"], record["cost"]
        rows.append(
            [
                method,
                distilled["label_kind"],
                size(distilled["bytes"]["labels"]),
                size(distilled["bytes"]["images"]),
                duration(cost["seconds"]),
                size(cost["peak_memory"]["host"]),
                *(accuracies.get(arm, "-") for arm in arms),
            ]
        )
    return aligned(rows)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.curriculum", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="real images, as for `condense distill`")
    parser.add_argument("--out", type=Path, required=True, help="folder for teachers, sets, records and the table")
    parser.add_argument(
        "--methods", default=",".join(COMPARED_METHODS), help="A,B:KEY=VALUE,...; all of the family by default"
    )
    parser.add_argument("--ipc", type=positive, default=10)
    parser.add_argument("--network", default="convnet-d3-w32-bn", help="of teachers and students")
    parser.add_argument("--count", type=positive, default=3, help="teachers")
    parser.add_argument("--epochs", type=positive, default=12, help="of a teacher's training")
    parser.add_argument("--steps", type=positive, default=1000, help="iterations of each image")
    parser.add_argument("--protocol", default="quick-soft-v1")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    for method in methods:
        if method.partition(":")[0] not in COMPARED_METHODS:
            raise CondenseError(f"--methods {method}: must be of {', '.join(COMPARED_METHODS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    committee = train_teachers(
        options.data, options.out, network=options.network, count=options.count, epochs=options.epochs
    )
    records: list[dict[str, Any]] = []
    for method in methods:
        record = run_cell(
            method,
            options.data,
            options.out,
            committee,
            ipc=options.ipc,
            network=options.network,
            steps=options.steps,
            count=options.count,
            protocol=options.protocol,
        )
        records.append(record)
        (options.out / "table.txt").write_text(table(methods, records) + "\n")
    for entry in read_teacher_file(committee).entries:
        print(
            f"teacher {entry['network']} {entry['number']}: {100 * entry['accuracy']:.1f} %, "
            f"{duration(entry['seconds'])}"
        )
    print(table(methods, records))
    return 0


if __name__ == "__main__":
    guarded(_main, None)
