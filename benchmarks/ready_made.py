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
from condense.formatting import by, size
from condense.judge import records, scoring
from condense.sets import DistilledSet, save_grid

MAX_SET_BYTES = 1_000_000
"""Bytes of the largest set that is packaged."""
TOLERANCE = 0.005
"""Largest change of a mean accuracy that float16 pixels may bring."""


def best(suite: suites.Suite, out: Path) -> list[tuple[suites.Cell, dict[str, Any]]]:
    """Of every dataset and ipc the cell with the highest accuracy on the suite's own network, and its record."""
    found: dict[tuple[str, int], tuple[float, suites.Cell, dict[str, Any]]] = {}
    for cell in suites.cells(suite):
        path = out / suites.RECORDS / f"{cell.stem}.json"
        if not path.exists():
            continue
        record = records.read_record(path)
        mean = next(e["mean"] for e in scoring.main_entries(record) if e["network"] == record["set"]["network"])
        key = (cell.data, cell.ipc)
        if key not in found or mean > found[key][0]:
            found[key] = (mean, cell, record)
    return [(cell, record) for _, cell, record in found.values()]


def halved(made: DistilledSet) -> DistilledSet:
    """The set with its pixels as float16."""
    return DistilledSet(made.stored.half(), made.labels, made.transform, made.manifest)


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


def set_card(made: DistilledSet, record: dict[str, Any], suite: str) -> str:
    """The set's card, Markdown."""
    manifest, bytes_ = made.manifest, made.nbytes()
    protocol = f"{record['protocol']['name']} (version {record['protocol']['version']}, {record['runs']} runs)"
    kind = str(made.stored.dtype).removeprefix("torch.")
    lines = [
        f"# {made.name}",
        "",
        f"{len(made.stored)} images of {by(made.shape)}, {manifest['ipc']} of each of {len(made.classes)} classes, "
        f"{made.labels.kind} labels; {size(bytes_['total'])} ({kind} pixels).",
        "",
        f"![its images]({Path(manifest['name']).name}.png)",
        "",
        "```python",
        "import condense",
        "",
        f'distilled = condense.load("{made.name}")',
        f'network = condense.fit(distilled, "{manifest["network"]}")',
        "```",
        "",
        f"Made from {manifest['dataset']} by {manifest['method']} ({manifest['paper']}) in "
        f"{manifest['cost']['seconds']:.0f} s on {manifest['cost']['device']}:",
        "",
        f"    {manifest['command']}",
        "",
        f"Judged under {protocol}; chosen for its accuracy among the methods of the suite `{suite}`:",
        "",
        "```",
        records.format_record(record),
        "```",
        "",
        f"SHA-256 of its content: `{made.sha256()}`. The rights in the images of {manifest['dataset']} apply.",
    ]
    return "\n".join(lines) + "\n"


def write(suite: suites.Suite, out: Path, to: Path, data: dict[str, str]) -> list[Path]:
    """Writes the best sets with cards and pictures below ``to``; returns the files."""
    written = []
    for cell, whole in best(suite, out):
        path = out / suites.SETS / f"{cell.stem}.h5"
        made = DistilledSet.load(path)
        if made.sha256() != whole["set"]["sha256"]:
            raise CondenseError(f"{path}: its record is of another set; run `condense suite {suite.name}` again")
        real, record = api.task(data.get(cell.data, cell.data), name=cell.data), whole
        if made.stored.is_floating_point():
            half = halved(made)
            judged = suites.judge(suite, cell, half, real, quiet=False)
            if unchanged(whole, judged):
                made, record = half, judged
        if made.nbytes()["total"] > MAX_SET_BYTES:
            print(f"{made.name}: {made.nbytes()['total']} bytes, left out")
            continue
        main = next(e for e in scoring.main_entries(record) if e["network"] == record["set"]["network"])
        made.manifest["claim"] = {
            **{key: main[key] for key in ("network", "mean", "std")},
            "runs": record["runs"],
            "protocol": record["protocol"]["name"],
        }
        path = made.save(to / f"{made.name}.h5", force=True)
        images, per_class = made.pictures()
        save_grid(images, path.with_suffix(".png"), columns=per_class)
        path.with_suffix(".md").write_text(set_card(made, record, suite.name))
        print(f"{made.name}: {path}, {path.stat().st_size} bytes")
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes a suite's best sets, with cards, where they are packaged.")
    parser.add_argument("suite")
    parser.add_argument("out", type=Path, help="the suite's --out")
    parser.add_argument("--to", type=Path, default=Path("distilled_sets"))
    parser.add_argument("--data", action="append", default=[], metavar="NAME=PATH")
    given = parser.parse_args(arguments)
    write(suites.get_suite(given.suite), given.out, given.to, dict(word.partition("=")[::2] for word in given.data))


if __name__ == "__main__":
    main()
