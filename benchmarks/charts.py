"""Geometry of the leaderboard's charts: values to places in an SVG of fixed size. ``page/chart.svg`` draws them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 42, 470, 12, 234
"""Edges of the plot; the axes' labels lie outside."""
COLOURS = 7
SHAPES = {
    "selection": "circle",
    "gradient matching": "triangle",
    "trajectory matching": "square",
    "distribution matching": "diamond",
    "attention matching": "drop",
    "decoupled (squeeze, recover, relabel)": "pentagon",
    "label compression": "hexagon",
    "kernel regression on features": "house",
    "graphs": "bowtie",
}
"""The shape tells the family, the colour the method within it."""
OTHER_SHAPE = "star"
"""Of methods of other families."""
LINE_HEIGHT = 18
LABEL = (44, 13)
"""Width and height that a point's label takes."""
ALIKE = 0.5
"""Control marks nearer than this in the drawing are one mark."""


def looks(families: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Method to its colour class and its shape.

    Args:
        families: method to family. Methods of a family have different colours as long as there are some.
    """
    found, used = {}, Counter[str]()
    for method in sorted(families):
        shape = SHAPES.get(families[method], OTHER_SHAPE)
        found[method] = (f"c{used[shape] % COLOURS}", shape)
        used[shape] += 1
    return found


@dataclass
class ChartPoint:
    """One thing to draw: an accuracy at one place per number of uses."""

    at: dict[str, float]
    """Bytes or seconds by number of uses; an unusable number leaves the point out."""
    accuracy: float
    rows: list[str]
    """Rows of the table that it belongs to; it is hidden with them."""
    tip: str
    shape: str
    colour: str = "control"
    interval: tuple[float, float] | None = None
    hollow: bool = False
    """Its students learn from other labels than classes."""
    small: bool = False
    """On a network that the set was not made with."""
    label: str = ""
    """Shown only beside the highest of the points with this label."""
    trace: str = ""
    """Points with the same text here are joined by a line."""


@dataclass
class Line:
    """An accuracy without a place on the other axis."""

    accuracy: float
    rows: list[str]
    label: str
    tip: str


@dataclass
class Mark:
    """A point in the drawing."""

    point: ChartPoint
    x: dict[str, float]
    y: float
    low: float
    high: float
    """The interval's ends, below and above ``y``."""


@dataclass
class Trace:
    """The line that joins points."""

    path: str
    """As in the attribute ``d`` of an SVG path."""
    colour: str
    rows: list[str]


@dataclass
class Chart:
    """A drawing; places in user units from the upper left."""

    id: str
    title: str
    about: str
    x_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark]
    lines: list[tuple[float, float | None, Line]]
    """Height of the line, of its label (None: there is no room for one), and the line."""
    traces: list[Trace] = field(default_factory=list)
    shapes: set[str] = field(default_factory=set)
    """Shapes that occur, for the legend."""


def layout_chart(
    id: str,
    title: str,
    about: str,
    x_title: str,
    points: Iterable[ChartPoint],
    lines: Sequence[Line],
    ticks: Callable[[float, float], list[tuple[float, str]]],
) -> Chart | None:
    """Accuracy against something with a logarithmic axis; None without the point of a set.

    Args:
        ticks: labelled values within two bounds.
    """
    points = [p for p in points if p.at and all(0 < x < math.inf for x in p.at.values())]
    if all(p.colour == "control" for p in points):
        return None
    low, high = _room([x for p in points for x in p.at.values()])
    accuracies = [p.accuracy for p in points] + [line.accuracy for line in lines]
    accuracies += [bound for p in points for bound in p.interval or ()]
    step, bottom, top = _steps(max(0.0, min(accuracies)), min(1.0, max(accuracies)))

    def across(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * math.log(value / low) / math.log(high / low), 1)

    def down(accuracy: float) -> float:
        inside = min(max(accuracy, bottom), top)
        return round(BOTTOM - (BOTTOM - TOP) * (inside - bottom) / (top - bottom), 1)

    marks = []
    for p in points:
        y = down(p.accuracy)
        ends = [round(down(bound) - y, 1) for bound in p.interval or (p.accuracy, p.accuracy)]
        marks.append(Mark(p, {uses: across(x) for uses, x in p.at.items()}, y, ends[0], ends[1]))
    count = round((top - bottom) / step)
    return Chart(
        id=id,
        title=title,
        about=about,
        x_title=x_title,
        x_ticks=[(across(value), label) for value, label in ticks(low, high)],
        y_ticks=[(down(bottom + i * step), f"{100 * (bottom + i * step):.3g}") for i in range(count + 1)],
        marks=_thin(_merged(marks)),
        lines=_placed([(down(line.accuracy), line) for line in lines]),
        traces=_joined(marks),
        shapes={mark.point.shape for mark in marks},
    )


def _merged(marks: list[Mark]) -> list[Mark]:
    """Controls that several rows share as one mark; sets stay, last, so that they lie on top."""
    controls: dict[tuple[object, ...], Mark] = {}
    for mark in marks:
        if mark.point.colour == "control":
            places = tuple(round(x / ALIKE) for x in mark.x.values())
            merged = controls.setdefault((mark.point.shape, mark.point.tip, places, round(mark.y / ALIKE)), mark)
            merged.point.rows = list(dict.fromkeys([*merged.point.rows, *mark.point.rows]))
    return [*controls.values(), *(mark for mark in marks if mark.point.colour != "control")]


def _joined(marks: list[Mark]) -> list[Trace]:
    """The lines through the points of each trace, from left to right; equal lines of several rows are one."""
    by_trace: dict[str, list[Mark]] = {}
    for mark in marks:
        if mark.point.trace:
            by_trace.setdefault(mark.point.trace, []).append(mark)
    traces: dict[tuple[str, str], Trace] = {}
    for group in by_trace.values():
        places = sorted((next(iter(mark.x.values())), mark.y) for mark in group)
        path, point = "M" + "L".join(f"{x} {y}" for x, y in places), group[0].point
        trace = traces.setdefault((path, point.colour), Trace(path, point.colour, []))
        trace.rows = list(dict.fromkeys([*trace.rows, *point.rows]))
    return list(traces.values())


def _placed(lines: list[tuple[float, Line]]) -> list[tuple[float, float | None, Line]]:
    """The lines from the top, each label above its line, or below, or left out where other lines are in the way."""
    ordered = sorted(lines, key=lambda pair: (pair[0], pair[1].label))
    placed: list[tuple[float, float | None, Line]] = []
    taken = 0.0
    for i, (y, line) in enumerate(ordered):
        below = ordered[i + 1][0] if i + 1 < len(ordered) else BOTTOM
        text = y - 4 if y - LINE_HEIGHT > taken else y + LINE_HEIGHT - 4 if y + LINE_HEIGHT < below else None
        placed.append((y, text, line))
        taken = max(y, text or y)
    return placed


def _thin(marks: list[Mark]) -> list[Mark]:
    """The marks with one label of each text, beside the highest mark, where no other label is."""
    labelled: list[Mark] = []
    texts: set[str] = set()
    for mark in sorted(marks, key=lambda mark: mark.y):
        x = next(iter(mark.x.values()))
        free = all(abs(m.y - mark.y) >= LABEL[1] or abs(next(iter(m.x.values())) - x) >= LABEL[0] for m in labelled)
        if mark.point.label and mark.point.label not in texts and free:
            texts.add(mark.point.label)
            labelled.append(mark)
        else:
            mark.point.label = ""
    return marks


def _room(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of a logarithmic axis, with room at both ends and at least a factor of 9 apart."""
    low, high = min(values), max(values)
    margin = max(1.35, math.sqrt(9 / (high / low)) if high / low < 9 else 1.35)
    return low / margin, high * margin * 1.15


def _steps(low: float, high: float) -> tuple[float, float, float]:
    """A round step of accuracy for about five ticks, and the multiples of it that enclose the values."""
    span = max(high - low, 0.02)
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if span / s <= 6 or s == 0.2)
    bottom = math.floor(low / step + 1e-9) * step
    top = math.ceil(high / step - 1e-9) * step
    return step, bottom, top if top > bottom else bottom + step


def byte_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten of bytes between two bounds; halves and fifths where these are too few."""
    units = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
    every = [
        (lead * 10.0**power, f"{lead * 10 ** (power % 3)} {units[power // 3]}")
        for power in range(19)
        for lead in (1, 2, 5)
    ]
    return _chosen([tick for tick in every if low <= tick[0] <= high], lambda tick: tick[1].startswith("1"))


def count_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between two bounds; halves and fifths where these are too few."""
    every = [(lead * 10.0**power, f"{lead * 10**power:,}") for power in range(16) for lead in (1, 2, 5)]
    return _chosen([tick for tick in every if low <= tick[0] <= high], lambda tick: tick[1].startswith("1"))


def second_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round durations between two bounds."""
    units = (
        ("ms", 0.001, (1, 10, 100), (2, 5, 20, 50, 200, 500)),
        ("s", 1, (1, 10), (2, 5, 20, 30)),
        ("min", 60, (1, 10), (2, 5, 20, 30)),
        ("h", 3600, (1, 10), (2, 5)),
        ("d", 86400, (1, 10, 100, 1000), (2, 5, 20, 50, 200, 500)),
    )
    main = {(count * size, f"{count} {unit}") for unit, size, counts, _ in units for count in counts}
    every = main | {(count * size, f"{count} {unit}") for unit, size, _, counts in units for count in counts}
    return _chosen([tick for tick in sorted(every) if low <= tick[0] <= high], lambda tick: tick in main)


def _chosen(ticks: list[tuple[float, str]], main: Callable[[tuple[float, str]], bool]) -> list[tuple[float, str]]:
    """The main ticks, every tick where there are fewer than three of them, and never more than seven."""
    few = [tick for tick in ticks if main(tick)]
    chosen = few if len(few) > 2 else ticks
    return chosen[:: math.ceil(len(chosen) / 7)] if chosen else []
