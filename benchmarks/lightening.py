"""Kinds of labels for one set, from bytes to accuracy: ``python -m condense.benchmarks.lightening --data NAME=PATH``.

Makes RDED's images with stored labels of views, gives them every other kind, and trains students on each, all by the
command line in processes of their own. Existing files are kept: the same command continues a stopped one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condense.benchmarks import curriculum, equal_time
from condense.benchmarks.speed.measure import Parser, guarded, positive
from condense.formatting import aligned, duration, percent, size
from condense.judge import get_protocol
from condense.lighten import LabelComparison, plot_comparison
from condense.sets import DistilledSet
from condense.training import epoch_steps

OWN = "own"
KINDS = (
    OWN,
    "lowrank:rank=4",
    "lowrank:rank=2",
    "lowrank:rank=1",
    "topk:k=2",
    "topk:k=1",
    "pool:keep=0.1",
    "pool:keep=0.045",
    "pool:keep=0.08:values=lowrank:rank=6",
    "pool:keep=0.05:values=lowrank:rank=3",
    "pool:keep=0.02:values=lowrank:rank=9",
    "pool:keep=0.007",
    "distances",
    "static",
    "soft",
    "hard",
    "teacher:weights=float32",
    "teacher",
    "projector",
    "projector:adapter_rank=2",
    "projector:loss_kind=mse:gamma=0.1",
)
"""What is compared; ``own`` is the stored labels."""


def distil_with_view_labels(data: str, out: Path, committee: Path, *, ipc: int, network: str, epochs: int) -> Path:
    """Returns the path of RDED's set with stored labels of ``epochs`` epochs of views; distils it if it is missing."""
    path = out / "sets" / f"{equal_time.data_name(data)}-rded-ipc{ipc}-{epochs}epochs-of-{committee.stem}.h5"
    settings = [f"teachers={committee}", "labels=per-view", f"label_epochs={epochs}", *curriculum.SMALL]
    equal_time.distill_if_missing(path, "rded", data, ipc, network, out / "runs" / path.stem, *settings)
    return path


def make_kind(specification: str, stored: Path, data: str, out: Path, protocol: str) -> tuple[Path, dict[str, Any]]:
    """Returns the set with labels of a kind (settings after colons) and its record; missing ones are made."""
    kind, *settings = specification.split(":")
    stem = "-".join([stored.stem, kind, *settings])
    path, record = stored.with_name(f"{stem}.h5"), out / "records" / f"{stem}-{protocol}.json"
    if specification == OWN:
        path = stored
    elif not path.exists():
        equal_time.run_condense("lighten", str(stored), "--labels", kind, "--data", data, "--out", str(path), *settings)
    controls = "random,random-hard" if specification == OWN else "none"
    equal_time.evaluate_if_missing(record, path, data, protocol, controls)
    return path, dict(json.loads(record.read_text()))


def row(specification: str, stored: int, path: Path, record: dict[str, Any]) -> list[str]:
    """Labels, their bytes with what lies outside, their share of ``stored`` bytes, and what students need and reach."""
    entry, described = record["results"][0], record["set"]
    distilled = DistilledSet.load(path)
    lightened = distilled.manifest.get("lightened", {})
    inside, outside = described["bytes"]["labels"], described["bytes"]["external"]
    batch = get_protocol(record["protocol"]["name"]).batch
    passes = entry["steps"] / epoch_steps(len(distilled), batch)
    return [
        specification,
        described["labelling"]["exactness"],
        size(inside),
        size(outside) if outside else "-",
        f"{100 * inside / stored:.3g} %",
        f"{100 * (inside + outside) / stored:.3g} %",
        duration(lightened["seconds"]) if lightened else "-",
        duration(entry["seconds"] / len(entry["accuracies"]) / passes),
        percent(entry["mean"], entry["std"]),
    ]


HEADINGS = ["labels", "exactness", "bytes", "external", "of own", "with external", "made in", "epoch", "accuracy"]


def point(specification: str, record: dict[str, Any]) -> LabelComparison:
    """What the chart draws."""
    entry, described = record["results"][0], record["set"]
    return LabelComparison(
        specification,
        described["label_kind"],
        described["bytes"]["labels"],
        described["bytes"]["external"],
        mean=entry["mean"],
        ci95=tuple(entry["ci95"]),
    )


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.lightening", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="real images, as for `condense distill`")
    parser.add_argument("--out", type=Path, required=True, help="folder for teachers, sets, records, table and picture")
    parser.add_argument("--kinds", default=",".join(KINDS), help="KIND:KEY=VALUE,...; many of all kinds by default")
    parser.add_argument("--ipc", type=positive, default=10)
    parser.add_argument("--network", default="convnet-d3-w32-bn", help="of teachers and students")
    parser.add_argument("--count", type=positive, default=3, help="trained teachers, of which the first labels")
    parser.add_argument("--epochs", type=positive, default=12, help="of a teacher's training")
    parser.add_argument("--label-epochs", type=positive, default=300, help="stored epochs of views")
    parser.add_argument("--protocol", default="quick-soft-v1")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    committee = curriculum.train_teachers(
        options.data, options.out, network=options.network, count=options.count, epochs=options.epochs
    )
    stored = distil_with_view_labels(
        options.data, options.out, committee, ipc=options.ipc, network=options.network, epochs=options.label_epochs
    )
    whole = DistilledSet.load(stored).nbytes()["labels"]
    rows, points = [HEADINGS], []
    for specification in options.kinds.split(","):
        path, record = make_kind(specification, stored, options.data, options.out, options.protocol)
        rows.append(row(specification, whole, path, record))
        points.append(point(specification, record))
        (options.out / "table.txt").write_text(aligned(rows) + "\n")
    print(aligned(rows))
    print(f"picture: {plot_comparison(points, options.out / 'labels.png', stored.stem.partition('-of-')[0])}")
    return 0


if __name__ == "__main__":
    guarded(_main, None)
