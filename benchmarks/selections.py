"""Tables of the suite ``selection``: ``python -m condense.benchmarks.selections --results DIR``.

One table for class labels and one for a teacher's: a row for each selection, with the mean accuracy at each number of
images per class over the seeds of the selection. Control arms that need no set stand below.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from condense.benchmarks.leaderboard import RESULTS
from condense.benchmarks.speed.measure import Parser, guarded
from condense.errors import CondenseError
from condense.judge import labels_of, read_record

CONTROLS = ("rs2", "full-equal")

Cells = dict[tuple[str, tuple[str, int], str], list[float]]
"""Accuracies in % by selection or control arm, size (data and images per class), and labels (hard or soft)."""


def read_cells(folder: Path) -> Cells:
    """The accuracies of all students of the records of a folder; a control arm's once for each size.

    Raises:
        CondenseError: no records, or they are of several protocols.
    """
    records = [read_record(path) for path in sorted(folder.glob("selection-*.json"))]
    if len({record["protocol"]["name"] for record in records}) != 1:
        raise CondenseError(f"--results {folder}: no records selection-*.json of one protocol")
    cells: Cells = {}
    for record in records:
        size = record["set"]["dataset"], int(record["set"]["ipc"])
        for entry in record["results"]:
            accuracies = [100 * accuracy for accuracy in entry["accuracies"]]
            if entry["arm"] == "distilled":
                labels = "hard" if labels_of(entry, record) == "hard" else "soft"
                cells.setdefault((record["set"]["method"], size, labels), []).extend(accuracies)
            elif entry["arm"] in CONTROLS:
                cells[entry["arm"], size, "hard"] = accuracies
    return cells


def table(cells: Cells, labels: str) -> str:
    """A Markdown table of one kind of labels, best selections at the smallest size first; ± is the std over seeds."""
    found = {(name, size): values for (name, size, kind), values in cells.items() if kind == labels}
    sizes = sorted({size for _, size, _ in cells})

    def text(name: str, size: tuple[str, int]) -> str:
        values = found.get((name, size))
        if not values:
            return "-"
        std = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{std}"

    selections = {name for name, _ in found} - set(CONTROLS)
    order = sorted(selections, key=lambda name: (-statistics.fmean(found.get((name, sizes[0]), [0.0])), name))
    head = [f"{labels} labels", *(f"{data}, {ipc}" for data, ipc in sizes)]
    rows = [head, ["---"] * len(head)]
    rows += [
        [f"`{name}`", *(text(name, size) for size in sizes)]
        for name in [*order, *CONTROLS]
        if any((name, size) in found for size in sizes)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.selections", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "selection", help="folder of records")
    cells = read_cells(parser.parse_args(arguments).results)
    print(table(cells, "hard"), table(cells, "soft"), sep="\n\n")
    return 0


if __name__ == "__main__":
    guarded(_main, None)
