"""``python -m condense.benchmarks.ready_made SUITE OUT``: a suite's best sets, small enough to come with the toolkit.

For each dataset and number of images per class, the set whose students did best on the network it was made with is
written to ``distilled_sets/DATASET/METHOD-ipcN.h5``, with its picture and a card. Pixels are stored as float16 where
that changes nothing that the suite's students can show; sets above ``LIMIT`` are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from condense import api
from condense.benchmarks import suite as suites
from condense.errors import CondenseError
from condense.formatting import by, machine, size
from condense.judge import records, scoring
from condense.sets import DistilledSet, save_grid

MAX_SET_BYTES = 1_000_000
"""Bytes of the largest set that is packaged."""
TOLERANCE = 0.005
"""Largest change of a mean accuracy that float16 pixels may bring."""


def best(suite: suites.Suite, out: Path) -> list[tuple[suites.Cell, dict[str, Any]]]:
    """Of every dataset and ipc the cell with the highest accuracy on the suite's own network, and its record."""
    best_cells: dict[tuple[str, int], tuple[float, suites.Cell, dict[str, Any]]] = {}
    for cell in suites.cells(suite):
        path = out / suites.RECORDS / f"{cell.stem}.json"
        if not path.exists():
            continue
        record = records.read_record(path)
        mean = next(e["mean"] for e in scoring.main_entries(record) if e["network"] == record["set"]["network"])
        key = (cell.data, cell.ipc)
        if key not in best_cells or mean > best_cells[key][0]:
            best_cells[key] = (mean, cell, record)
    return [(cell, record) for _, cell, record in best_cells.values()]


def halved(distilled: DistilledSet) -> DistilledSet:
    """The set with its pixels as float16."""
    return DistilledSet(distilled.stored.half(), distilled.labels, distilled.transform, distilled.manifest)


def unchanged(whole: dict[str, Any], half: dict[str, Any]) -> bool:
    """Whether on every network the accuracy moved by at most ``TOLERANCE`` in the mean, and nothing says that it fell.

    That is the paired 95 % interval, which must reach 0 unless the move is below a tenth of the tolerance.
    """
    for a, b in zip(scoring.main_entries(whole), scoring.main_entries(half)):
        gap = scoring.summary([y - x for x, y in zip(a["accuracies"], b["accuracies"])])
        surely_lower = gap["ci95"] is not None and gap["ci95"][1] < 0 and gap["mean"] < -TOLERANCE / 10
        if abs(gap["mean"]) > TOLERANCE or surely_lower:
            return False
    return True


def set_card(distilled: DistilledSet, record: dict[str, Any], suite: str) -> str:
    """The set's card, Markdown."""
    manifest, bytes_ = distilled.manifest, distilled.nbytes()
    protocol = f"{record['protocol']['name']} (version {record['protocol']['version']}, {record['runs']} runs)"
    kind = str(distilled.stored.dtype).removeprefix("torch.")
    lines = [
        f"# {distilled.name}",
        "",
        f"{len(distilled.stored)} images of {by(distilled.shape)}, {manifest['ipc']} of each of "
        f"{len(distilled.classes)} classes, {distilled.labels.kind} labels; {size(bytes_['total'])} ({kind} pixels).",
        "",
        f"![its images]({Path(manifest['name']).name}.png)",
        "",
        "```python",
        "import condense",
        "",
        f'distilled = condense.load("{distilled.name}")',
        f'network = condense.fit(distilled, "{manifest["network"]}")',
        "```",
        "",
        f"Made from {manifest['dataset']} by {manifest['method']} ({manifest['paper']}) in "
        f"{manifest['cost']['seconds']:.0f} s on {machine(manifest['cost']['device'], manifest['precision'])}:",
        "",
        f"    {manifest['command']}",
        "",
        f"Judged under {protocol}; chosen for its accuracy among the methods of the suite `{suite}`:",
        "",
        "```",
        records.format_record(record),
        "```",
        "",
        f"SHA-256 of its content: `{distilled.sha256()}`. The rights in the images of {manifest['dataset']} apply.",
    ]
    return "\n".join(lines) + "\n"


def write(suite: suites.Suite, out: Path, to: Path, data: dict[str, str]) -> list[Path]:
    """Writes the best sets with cards and pictures below ``to``; returns the files."""
    written = []
    for cell, whole in best(suite, out):
        path = out / suites.SETS / f"{cell.stem}.h5"
        distilled = DistilledSet.load(path)
        if distilled.sha256() != whole["set"]["sha256"]:
            raise CondenseError(f"{path}: its record is of another set; run `condense suite {suite.name}` again")
        real, record = api.task(data.get(cell.data, cell.data), name=cell.data), whole
        if distilled.stored.is_floating_point():
            half = halved(distilled)
            judged = suites.judge(suite, cell, half, real, quiet=False)
            if unchanged(whole, judged):
                distilled, record = half, judged
        if distilled.nbytes()["total"] > MAX_SET_BYTES:
            print(f"{distilled.name}: {distilled.nbytes()['total']} bytes, left out")
            continue
        main = next(e for e in scoring.main_entries(record) if e["network"] == record["set"]["network"])
        distilled.manifest["claim"] = {
            **{key: main[key] for key in ("network", "mean", "std")},
            "runs": record["runs"],
            "protocol": record["protocol"]["name"],
        }
        path = distilled.save(to / f"{distilled.name}.h5", force=True)
        images, per_class = distilled.pictures()
        save_grid(images, path.with_suffix(".png"), columns=per_class)
        path.with_suffix(".md").write_text(set_card(distilled, record, suite.name))
        print(f"{distilled.name}: {path}, {path.stat().st_size} bytes")
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes a suite's best sets, with cards, where they are packaged.")
    parser.add_argument("suite")
    parser.add_argument("out", type=Path, help="the suite's --out")
    parser.add_argument("--to", type=Path, default=Path("distilled_sets"))
    parser.add_argument("--data", action="append", default=[], metavar="NAME=PATH")
    options = parser.parse_args(arguments)
    write(
        suites.get_suite(options.suite),
        options.out,
        options.to,
        dict(item.partition("=")[::2] for item in options.data),
    )


if __name__ == "__main__":
    main()
