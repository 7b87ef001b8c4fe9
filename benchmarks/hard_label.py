"""Table and figure of the hard-label track: ``python -m condense.benchmarks.hard_label --results DIR --out PNG``.

Reads the records ``hard-track-*.json`` of a folder, which are all of the same data, protocol and network, and whose
students learn from classes only. Sets stand beside the control arms that any of the records has.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condense.benchmarks.leaderboard import RESULTS
from condense.benchmarks.speed.measure import Parser, guarded
from condense.errors import CondenseError, missing_package
from condense.files import atomic_write
from condense.formatting import aligned, duration, size
from condense.judge import main_entries, read_record

PATTERN = "hard-track-*.json"
PICTURES = (".png", ".svg", ".pdf")
CONTROLS = {
    "random": "random images, as many as a set has",
    "random-bytes": "random images in the bytes of {set}",
    "rs2": "rs2: other real images in each epoch",
    "full-equal": "all real images, same steps",
}
"""Control arms of the figure, and what they are."""


@dataclass(frozen=True)
class Bar:
    """A set or a control arm."""

    name: str
    entry: dict[str, Any]
    """Of ``results`` of its record."""
    is_control: bool
    bytes: int | None
    """Of the set with what it needs besides its file; None for control arms."""
    seconds: float | None
    """To make the set, networks that were trained for it included; None for control arms."""


def read_bars(folder: Path) -> tuple[list[Bar], dict[str, Any]]:
    """Returns sets and controls in descending order of accuracy, and a record that tells data, protocol and network.

    Raises:
        CondenseError: no records, or they are not of the same data, protocol, network and number of runs.
    """
    records = [read_record(path) for path in sorted(folder.glob(PATTERN))]
    if not records:
        raise CondenseError(f"--results {folder}: no {PATTERN} in it")
    bars: dict[str, Bar] = {}
    judged = {
        (r["data"]["fingerprint"], r["protocol"]["name"], r["protocol"]["version"], r["runs"], main["network"])
        for r in records
        for main in main_entries(r)
    }
    if len(judged) > 1:
        raise CondenseError(f"--results {folder}: records of different data, protocols, networks or runs")
    for record in records:
        method, cost = record["set"]["method"], record["cost"]
        seconds = cost.get("seconds", 0.0) + cost.get("preparation_seconds", 0.0)
        bars[method] = Bar(method, main_entries(record)[0], False, record["set"]["bytes"]["total"], seconds)
        for entry in record["results"]:
            if entry["arm"] in CONTROLS:
                name = CONTROLS[entry["arm"]].format(set=method)
                bars[name] = Bar(name, entry, True, None, None)
    return sorted(bars.values(), key=lambda bar: -bar.entry["mean"]), records[0]


def table(bars: Sequence[Bar]) -> str:
    """The bars as lines of text."""
    rows = [["training images", "accuracy", "of each student", "steps", "bytes", "made in"]]
    for bar in bars:
        entry = bar.entry
        rows.append(
            [
                bar.name,
                f"{100 * entry['mean']:.1f}",
                " ".join(f"{100 * accuracy:.1f}" for accuracy in entry["accuracies"]),
                str(entry["steps"]),
                "-" if bar.bytes is None else size(bar.bytes),
                "-" if bar.seconds is None else duration(bar.seconds),
            ]
        )
    return aligned(rows)


def draw(bars: Sequence[Bar], record: dict[str, Any], path: Path) -> None:
    """Draws accuracies as bars, with a dot for each student; and beside it accuracy during training, where known.

    Raises:
        CondenseError: matplotlib is missing, or the file is no picture.
    """
    if path.suffix.lower() not in PICTURES:
        raise CondenseError(f"--out {path}: must end in {', '.join(PICTURES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("matplotlib", "plots", f"--out {path}") from error

    figure = Figure(figsize=(10.5, 0.36 * len(bars) + 2.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    palette = itertools.cycle(f"C{number}" for number in range(10) if number != 7)  # C7 is grey
    colours = {bar.name: "0.65" if bar.is_control else next(palette) for bar in bars}
    for place, bar in enumerate(reversed(bars)):
        accuracies = [100 * accuracy for accuracy in bar.entry["accuracies"]]
        mean = statistics.fmean(accuracies)
        left.barh(place, mean, color=colours[bar.name], height=0.7)
        left.plot(accuracies, [place] * len(accuracies), "o", color="black", markersize=3)
        left.text(max(accuracies) + 0.6, place, f"{mean:.1f}", va="center", fontsize=8)
    left.set_yticks(range(len(bars)), [bar.name for bar in reversed(bars)])
    left.set(xlabel="test accuracy, % (dots: single students)", title="After training")
    left.set_xlim(0, 1.12 * max(100 * max(bar.entry["accuracies"]) for bar in bars))
    ends = []
    for bar in bars:
        if "curve" in bar.entry:
            curve = bar.entry["curve"]
            means = [100 * statistics.fmean(column) for column in zip(*curve["accuracies"])]
            line = "--" if bar.is_control else "-"
            right.plot(curve["images"], means, line, marker=".", color=colours[bar.name])
            ends.append((means[-1], curve["images"][-1], bar))
    lowest, highest = right.get_ylim()
    height = math.inf
    for accuracy, images, bar in sorted(ends, key=lambda end: -end[0]):
        height = min(accuracy, height - 0.03 * (highest - lowest))  # below the label before, so that none overlap
        text, colour = (bar.entry["arm"], "0.35") if bar.is_control else (bar.name, colours[bar.name])
        right.annotate(text, (images, accuracy), xytext=(1.12 * images, height), color=colour, fontsize=7, va="center")
    right.set(xscale="log", xlabel="images seen in training, with repetitions", title="During training")
    right.margins(x=0.3)
    right.grid(alpha=0.3)
    data, protocol, network = record["data"]["name"], record["protocol"]["name"], bars[0].entry["network"]
    figure.suptitle(
        f"{data}, {record['set']['ipc']} images per class, learned with class labels only ({protocol}, {network}).\n"
        "Coloured: selected or distilled sets. Grey: what real images give for the same steps.",
        fontsize=10,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=130)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.hard_label", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records; by default this project's")
    parser.add_argument("--out", type=Path, help="picture to write; without it only the table is printed")
    options = parser.parse_args(arguments)
    bars, record = read_bars(options.results)
    if options.out is not None:
        draw(bars, record, options.out)
    print(table(bars))
    return 0


if __name__ == "__main__":
    guarded(_main, None)
