"""The leaderboard: records and published numbers as one static page that opens from disk, without a server or network.

``condense leaderboard --out DIR`` writes ``DIR/index.html``, a card of each method in ``DIR/cards/``, and in
``DIR/records/`` every accepted record, with the picture of its images where a ``STEM.png`` lies next to the
``STEM.json``, and with the set itself where a ``STEM.h5`` does or the toolkit comes with it. Records come from
anywhere: their text is escaped, files get names chosen here, and one that is not as it should be is listed by name and
left out. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import inspect
import io
import json
import re
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from condense import config
from condense.benchmarks import charts
from condense.benchmarks.charts import Chart, ChartPoint, Line
from condense.benchmarks.command_settings import differing_settings
from condense.benchmarks.families import Facts, method_facts
from condense.errors import CondenseError
from condense.files import atomic_folder
from condense.formatting import duration, percent, size
from condense.judge import REUSE_COUNTS, arm_name, labels_of, main_entries, protocols, read_record
from condense.registry import METHODS
from condense.sets import DistilledSet, packaged_sets
from condense.version import __version__

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PUBLISHED_CSV = HERE / "published.csv"
MARKER = '<meta name="generator" content="condense leaderboard">'
"""In every page of ours; a folder without it is not replaced."""
REAL_ARMS = ("random", "random-bytes", "full", "full-equal", "rs2")
"""Control arms of real images, which charts of time and of training show beside the sets."""
RECORDS = "records"
"""Folder of the site with copies of records and pictures."""
CARDS = "cards"
"""Folder of the site with a page about each method."""
SET_LIMIT = 64 * 1024 * 1024
"""Bytes of the largest set that is copied."""
PICTURE_LIMIT = 32 * 1024 * 1024
"""Bytes of the largest picture that is copied."""
SIDE_LIMIT = 16_384
"""Pixels of its longest side."""
PNG = b"\x89PNG\r\n\x1a\n"
COLUMNS = ("method", "dataset", "ipc", "network", "mean", "std", "protocol", "source", "evidence")
"""Of published.csv; accuracies are per cent."""


@dataclass(frozen=True)
class Rejected:
    """Something that was left out."""

    file: str
    reason: str


@dataclass(frozen=True)
class Built:
    """What a build made."""

    index: Path
    records: int
    rows: int
    """One for each network that a record judged its set on."""
    published: int
    rejected: list[Rejected]


@dataclass(frozen=True)
class Picture:
    """The picture of a set's images."""

    href: str
    width: int
    height: int


@dataclass(frozen=True)
class SetFile:
    """The file of a set."""

    href: str
    bytes: int


@dataclass(frozen=True)
class PublishedResult:
    """A number from a paper, in per cent, as it was reported."""

    method: str
    dataset: str
    ipc: int
    network: str
    mean: float
    std: float | None
    protocol: str
    """How it was judged, in a few words."""
    source: str
    evidence: str


@dataclass
class Entry:
    """An accepted record and its files on the site."""

    record: dict[str, Any]
    name: str
    """Of the file it came from."""
    slug: str
    picture: Picture | None = None
    set_file: SetFile | None = None

    @property
    def href(self) -> str:
        return f"{RECORDS}/{self.slug}.json"


@dataclass(frozen=True)
class Row:
    """One set judged on one network."""

    id: str
    entry: Entry
    main: dict[str, Any]
    """The record's entry of the distilled arm."""
    time: dict[str, Any]
    """Its times: ``train``, ``made`` and, by number of uses, ``total``; seconds, None where unknown."""
    settings: str = ""
    """Settings that tell it from the other rows of its method in the same cell."""

    @property
    def record(self) -> dict[str, Any]:
        return self.entry.record

    @property
    def set(self) -> dict[str, Any]:
        return self.record["set"]

    @property
    def network(self) -> str:
        return self.main["network"]

    @property
    def own(self) -> bool | None:
        """Whether the set was made with this network; None where it is not known what it was made with."""
        return None if self.set["network"] in ("", "none", "unknown") else self.network == self.set["network"]

    @property
    def track(self) -> str:
        """Which labels students learn from: the kind that the set brings, or classes alone."""
        return labels_of(self.main, self.record)

    @property
    def scores(self) -> dict[str, Any]:
        return self.record["scores"].get(self.network, {})

    def score(self, name: str) -> float | None:
        """The value of one of the scores, None where the arms it needs were not run."""
        return self.scores[name]["value"] if name in self.scores else None

    @property
    def arms(self) -> list[tuple[str, dict[str, Any]]]:
        """Everything judged on this network, with its name."""
        return [(arm_name(e, self.record), e) for e in self.record["results"] if e["network"] == self.network]

    def control(self, arm: str) -> dict[str, Any] | None:
        """The control's entry that is fair to compare with: same network and augmentation; random with same labels."""
        entries = [e for _, e in self.arms if e["arm"] == arm and e["augment"] == self.main["augment"]]
        same = [e for e in entries if e["labels"] == self.main["labels"]]
        return next(iter(same or ([] if arm == "random" else entries)), None)

    @property
    def method(self) -> Facts:
        """What the toolkit knows of the method."""
        return method_facts(self.set["method"])

    @property
    def accuracy_text(self) -> str:
        """In per cent, e.g. ``48.9 ± 2.5``."""
        return percent(self.main["mean"], self.main["std"])

    def control_text(self, arm: str) -> str:
        """The accuracy of a control arm in per cent, or that it was not run."""
        control = self.control(arm)
        return percent(control["mean"]) if control else "not run"

    @property
    def title(self) -> str:
        """The set in a line of a list."""
        made = self.set
        own = "its authors' set" if "origin" in made else ""
        parts = [made["method"], f"IPC {made['ipc']}", f"{self.track} labels", own, self.settings]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Cell:
    """Rows that one network was trained on under the same conditions and with as many images per class."""

    id: str
    ipc: int
    network: str
    rows: list[Row]
    """From the highest accuracy."""

    @property
    def near(self) -> set[str]:
        """Rows whose 95 % interval overlaps with that of the first row, without it."""
        first, *others = ((row.id, row.main["ci95"]) for row in self.rows)
        return {id for id, ci95 in others if ci95 and first[1] and ci95[1] >= first[1][0]}

    @property
    def reference(self) -> list[tuple[str, str]]:
        """Control arms beside the first row that has them, with their accuracies in per cent."""
        found = []
        for arm in ("random", "full"):
            row = next((row for row in self.rows if row.control(arm)), None)
            found += [(arm, row.control_text(arm))] if row else []
        return found


@dataclass
class Section:
    """Rows that may be compared: judged on the same real data under the same version of a protocol."""

    id: str
    dataset: str
    fingerprint: str | None
    """Of the data, where several go by this name."""
    protocol: str
    version: int
    about: str
    """The protocol in a line, where the toolkit knows it."""
    rows: list[Row]
    charts: list[Chart]
    shapes: set[str]
    """Control arms in the charts."""
    cells: list[Cell] = field(default_factory=list)

    @property
    def machines(self) -> int:
        """Number of devices that times were taken on."""
        return len({row.record["environment"]["device"] for row in self.rows})

    @property
    def families(self) -> list[tuple[str, list[str]]]:
        """The methods of each family."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            found.setdefault(row.method.family, set()).add(row.set["method"])
        return [(family, sorted(methods)) for family, methods in sorted(found.items())]

    @property
    def hollow(self) -> bool:
        """Whether some rows have other labels than classes."""
        return any(row.track != "hard" for row in self.rows)

    @property
    def small(self) -> bool:
        """Whether some networks are others than that of the set."""
        return any(row.own is False for row in self.rows)

    @property
    def title(self) -> str:
        """The protocol with its version, once."""
        return self.protocol if self.protocol.endswith(f"-v{self.version}") else f"{self.protocol} v{self.version}"


# -- the site ---------------------------------------------------------------------------------------------------------


def build_page(results: Path, out: Path, published: Path | None = PUBLISHED_CSV, *, force: bool = False) -> Built:
    """Writes the site. It takes the place of ``out`` as a whole, when it is complete.

    Args:
        results: folder of records (``*.json``) and pictures.
        published: CSV of published numbers, None for a page without them.
        force: replace a folder that holds other things.

    Raises:
        CondenseError: no record file at all, or ``out`` cannot be replaced.
    """
    results, out = Path(results), Path(out).resolve()
    if not results.is_dir():
        raise CondenseError(f"{results}: no such folder; give one with records that `condense evaluate --json` writes")
    files = sorted(results.glob("*.json"))
    if not files:
        raise CondenseError(f"{results}: no record (*.json) in it; `condense evaluate SET.h5 --json FILE` writes one")
    _check_place(out, results.resolve(), force)
    with atomic_folder(out) as temporary:
        (temporary / RECORDS).mkdir()
        entries, rejected = _entries(files, temporary / RECORDS)
        quoted, faults = read_published(published) if published else ([], [])
        rejected += faults
        sections = _sections(entries)
        _write_cards({entry.record["set"]["method"] for entry in entries}, temporary / CARDS)
        page = _page(sections, quoted, rejected, records=len(entries))
        (temporary / "index.html").write_text(page, encoding="utf-8", newline="\n")
    rows = sum(len(section.rows) for section in sections)
    return Built(out / "index.html", len(entries), rows, len(quoted), rejected)


def _check_place(out: Path, results: Path, force: bool) -> None:
    """Refuses a place whose replacement would lose something."""
    if out.exists() and not out.is_dir():
        raise CondenseError(f"--out {out} is a file; name a folder")
    if out == results or out in results.parents or out == Path.cwd() or out in Path.cwd().parents:
        raise CondenseError(f"--out {out} is replaced as a whole; name a folder of its own")
    if force or not out.is_dir() or not any(out.iterdir()):
        return
    index = out / "index.html"
    if not index.is_file() or MARKER not in index.read_text(encoding="utf-8", errors="replace"):
        raise CondenseError(f"--out {out} is not empty and not a leaderboard; name another folder or give --force")
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in ("index.html", RECORDS, CARDS))
    if foreign:
        raise CondenseError(
            f"--out {out} is replaced as a whole, but also holds {', '.join(foreign[:5])}; "
            "name another folder or give --force"
        )


def _entries(files: list[Path], folder: Path) -> tuple[list[Entry], list[Rejected]]:
    """Accepted records, copied to ``folder`` with their pictures, and what was rejected."""
    entries: list[Entry] = []
    rejected = []
    taken: set[str] = set()
    for path in files:
        try:
            record = _read(path)
        except CondenseError as fault:
            rejected.append(_rejected(path, fault))
            continue
        entry = Entry(record, _printable(path.name), _slug(path.stem, taken))
        text = json.dumps(record, indent=1) + "\n"  # what was checked, whatever became of the file since
        (folder / f"{entry.slug}.json").write_text(text, encoding="utf-8", newline="\n")
        source = path.with_suffix(".png")
        if source.exists():
            try:
                data, width, height = _png(source)
                (folder / f"{entry.slug}.png").write_bytes(data)
                entry.picture = Picture(f"{RECORDS}/{entry.slug}.png", width, height)
            except CondenseError as fault:
                rejected.append(_rejected(source, fault))
        try:
            entry.set_file = _set_file(path, entry, folder)
        except CondenseError as fault:
            rejected.append(_rejected(path.with_suffix(".h5"), fault))
        entries.append(entry)
    return entries, rejected


def _rejected(path: Path, fault: CondenseError) -> Rejected:
    reason = str(fault).removeprefix(f"{path}: ").replace(str(path), path.name)  # the page names no folders
    return Rejected(_printable(path.name), _printable(reason))


def _set_file(record: Path, entry: Entry, folder: Path) -> SetFile | None:
    """A copy of the record's set: the file beside it, or the one that comes with the toolkit; None where there is none.

    Raises:
        CondenseError: the file beside the record is not its set.
    """
    described, beside = entry.record["set"], record.with_suffix(".h5")
    name = f"{described['dataset']}/{described['method']}-ipc{described['ipc']}"
    source = beside if beside.is_file() else packaged_sets().get(name)
    if source is None:
        return None
    count = source.stat().st_size
    if count > SET_LIMIT:
        raise CondenseError(f"larger than {size(SET_LIMIT)}; left out")
    if DistilledSet.load(source).sha256() != described["sha256"]:
        if source == beside:
            raise CondenseError("not the set of the record beside it (its SHA-256 differs); left out")
        return None  # another version of it, e.g. with float16 pixels
    shutil.copyfile(source, folder / f"{entry.slug}.h5")
    return SetFile(f"{RECORDS}/{entry.slug}.h5", count)


def _write_cards(methods: set[str], folder: Path) -> None:
    """A page about each of the methods that the toolkit knows."""
    template, style = _templates().get_template("card.html"), _asset("page.css")
    folder.mkdir()
    for name in sorted(methods):
        if name not in METHODS:
            continue
        entry = METHODS.get(name)
        summary, *notes = inspect.cleandoc(entry.function.__doc__ or "").split("\n\n")
        recipes = [recipe for recipe in config.recipe_names() if recipe.startswith(f"{name}/")]
        page = template.render(
            entry=entry,
            facts=method_facts(name),
            summary=summary,
            notes=notes,
            settings=config.describe(entry.config),
            recipes=recipes,
            style=Markup(style),
            style_hash=_csp_hash(style),
        )
        (folder / f"{name}.html").write_text(page, encoding="utf-8", newline="\n")


def _read(path: Path) -> dict[str, Any]:
    """A checked record whose texts and numbers can be shown."""
    if not path.is_file():
        raise CondenseError(f"{path}: not a file")
    return read_record(path)


def _printable(text: str, limit: int = 500) -> str:
    """Text for the page and the terminal: no control characters, no half surrogates, not endless."""
    clean = "".join(c if c.isprintable() else "�" for c in text)
    return clean if len(clean) <= limit else clean[:limit] + " …"


def _slug(text: str, taken: set[str]) -> str:
    """A file name or anchor of plain letters, digits and hyphens that is not among ``taken``; joins them."""
    base = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "record"
    slug = next(s for s in (base, *(f"{base}-{n}" for n in range(2, len(taken) + 3))) if s not in taken)
    taken.add(slug)
    return slug


def _png(path: Path) -> tuple[bytes, int, int]:
    """The bytes, width and height of a picture.

    Raises:
        CondenseError: not a PNG, or too large.
    """
    if not path.is_file() or path.stat().st_size > PICTURE_LIMIT:
        raise CondenseError(f"not a file of at most {PICTURE_LIMIT} bytes; left out")
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise CondenseError(f"not readable ({fault.strerror}); left out") from fault
    if data[:8] != PNG or data[12:16] != b"IHDR" or len(data) < 33:
        raise CondenseError("not a PNG; left out")
    width, height = struct.unpack(">II", data[16:24])
    if not (0 < width <= SIDE_LIMIT and 0 < height <= SIDE_LIMIT):
        raise CondenseError(f"{width}x{height} pixels, at most {SIDE_LIMIT} a side are shown; left out")
    return data, width, height


def read_published(path: Path) -> tuple[list[PublishedResult], list[Rejected]]:
    """The good rows of a published.csv, and the bad ones by line."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = tuple(lines.fieldnames or ())
    except (OSError, ValueError, csv.Error) as fault:
        why = getattr(fault, "strerror", None) or fault
        return [], [Rejected(_printable(path.name), _printable(f"not readable ({why})"))]
    if header != COLUMNS:
        return [], [Rejected(_printable(path.name), _printable(f"its columns are not {','.join(COLUMNS)}"))]
    rows, rejected = [], []
    try:
        for line in lines:
            try:
                rows.append(_published(line))
            except CondenseError as fault:
                rejected.append(Rejected(_printable(f"{path.name}, line {lines.line_num}"), _printable(str(fault))))
    except csv.Error as fault:
        rejected.append(Rejected(_printable(f"{path.name}, line {lines.line_num}"), _printable(str(fault))))
    rows.sort(key=lambda row: (row.dataset, row.ipc, -row.mean, row.method, row.source))
    return rows, rejected


def _published(line: dict[str | None, Any]) -> PublishedResult:
    if None in line or None in line.values():
        raise CondenseError(f"has not {len(COLUMNS)} fields")
    try:
        ipc, mean, std = int(line["ipc"]), float(line["mean"]), float(line["std"]) if line["std"].strip() else None
    except ValueError as fault:
        raise CondenseError(f"ipc, mean and std must be numbers ({fault})") from None
    if not (0 < ipc <= 10**9 and 0 <= mean <= 100 and (std is None or 0 <= std <= 100)):
        raise CondenseError("ipc must be positive, mean and std per cent")
    missing = [key for key in ("method", "dataset", "source", "evidence") if not line[key].strip()]
    if missing:
        raise CondenseError(f"lacks {', '.join(missing)}")
    texts = {key: _printable(line[key]) for key in ("method", "dataset", "network", "protocol", "source", "evidence")}
    return PublishedResult(ipc=ipc, mean=mean, std=std, **texts)


# -- rows and charts --------------------------------------------------------------------------------------------------


def _sections(entries: list[Entry]) -> list[Section]:
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    ids: set[str] = set()
    for entry in entries:
        record = entry.record
        data, protocol = record["data"], record["protocol"]
        key = (data["name"], protocol["name"], protocol["version"], data["fingerprint"])
        for main in main_entries(record):
            row = Row(_slug(f"{entry.slug}-on-{main['network']}", ids), entry, main, _time(record, main))
            groups.setdefault(key, []).append(row)
    looks = _looks(entry.record["set"]["method"] for entry in entries)
    fingerprints: dict[str, set[str]] = {}
    for dataset, _, _, fingerprint in groups:
        fingerprints.setdefault(dataset, set()).add(fingerprint)
    sections = []
    for (dataset, name, version, fingerprint), rows in sorted(groups.items()):
        rows = sorted(_told_apart(rows), key=lambda row: (row.set["ipc"], -row.main["mean"], row.id))
        protocol = protocols().get(name)
        id = _slug(f"on {dataset} {name} {version}", ids)
        drawings = (_bytes_chart(id, rows, looks), _time_chart(id, rows, looks), _curve_chart(id, rows, looks))
        drawn = [drawing for drawing in drawings if drawing]
        sections.append(
            Section(
                id=id,
                dataset=dataset,
                fingerprint=fingerprint if len(fingerprints[dataset]) > 1 else None,
                protocol=name,
                version=version,
                about=protocol.summary if protocol and protocol.version == version else "",
                rows=rows,
                charts=drawn,
                shapes=set().union(*(drawing.shapes for drawing in drawn)),
                cells=_cells(rows, ids),
            )
        )
    return sections


def _looks(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    return charts.looks({method: method_facts(method).family for method in methods})


def _told_apart(rows: list[Row]) -> list[Row]:
    """The rows with the settings in which sets of one method differ in the same cell."""
    groups: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.set["method"], row.set["ipc"], row.network, row.track), []).append(row)
    told = []
    for group in groups.values():
        texts = differing_settings([row.set["command"] for row in group])
        told += [replace(row, settings=_printable(text)) for row, text in zip(group, texts)]
    return told


def _cells(rows: list[Row], ids: set[str]) -> list[Cell]:
    """The rows by images per class and network, the largest groups first."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.set["ipc"], row.network), []).append(row)
    cells = []
    for (ipc, network), group in groups.items():
        group.sort(key=lambda row: (-row.main["mean"], row.id))
        cells.append(Cell(_slug(f"cell {ipc} {network}", ids), ipc, network, group))
    return cells


def _time(record: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Seconds to train once, to make the set, and of both by number of uses; None where unknown."""
    keys = ("arm", "labels", "augment", "network")
    entry_time = next((t for t in record["time"] if all(t[key] == entry[key] for key in keys)), None)
    totals = entry_time["total_seconds"] if entry_time else {}
    return {
        "train": entry_time["train_seconds"] if entry_time else entry["seconds"] / len(entry["accuracies"]),
        "made": entry_time["made_seconds"] if entry_time else None,
        "total": {str(uses): totals.get(str(uses)) for uses in REUSE_COUNTS},
    }


Looks = dict[str, tuple[str, str]]


def _bytes_chart(id: str, rows: list[Row], looks: Looks) -> Chart | None:
    points, lines = [], _full_lines(rows)
    for row in rows:
        at = {"1": row.set["bytes"]["total"]}
        points.append(_point(row, at, looks, size(row.set["bytes"]["total"])))
        for arm in ("random", "random-bytes", "full-equal", "rs2"):
            control = row.control(arm)
            if control:
                points.append(_control_point(row, control, at, "beside a set of " + size(at["1"])))
    about = f"{len(rows)} rows of the table below; each mark is a row, its bar the 95 % interval."
    title = "Accuracy against stored bytes"
    return charts.layout_chart(f"{id}-bytes", title, about, "bytes of the set", points, lines, charts.byte_ticks)


def _time_chart(id: str, rows: list[Row], looks: Looks) -> Chart | None:
    points, lines = [], _full_lines(rows)
    timed = [row for row in rows if all(row.time["total"].values())]
    for row in timed:
        points.append(_point(row, row.time["total"], looks, f"{duration(row.time['total']['1'])} for one network"))
    for row in rows:
        for arm in REAL_ARMS:
            control = row.control(arm)
            times = _time(row.record, control) if control else {}
            if control and all(times["total"].values()):
                points.append(_control_point(row, control, times["total"], f"trained in {duration(times['train'])}"))
    unknown = len(rows) - len(timed)
    about = f"{len(timed)} rows of the table below; each mark is a row, its bar the 95 % interval." + (
        f" {unknown} not drawn: what the set cost to make is unknown." if unknown else ""
    )
    title = "Accuracy against time to reach it"
    return charts.layout_chart(f"{id}-time", title, about, "time to make and train", points, lines, charts.second_ticks)


def _curve_chart(id: str, rows: list[Row], looks: Looks) -> Chart | None:
    """Accuracy during training, of the sets and control arms whose records have curves."""
    points = []
    for row in rows:
        controls = [row.control(arm) for arm in REAL_ARMS]
        for entry in [row.main, *(control for control in controls if control)]:
            points += _curve_points(row, entry, looks)
    count = sum("curve" in row.main for row in rows)
    about = f"{count} rows of the table below; marks joined by a line are one training, tested at several times."
    title = "Accuracy during training"
    return charts.layout_chart(f"{id}-curve", title, about, "images seen", points, [], charts.count_ticks)


def _curve_points(row: Row, entry: dict[str, Any], looks: Looks) -> list[ChartPoint]:
    """The points of one arm's curve."""
    if "curve" not in entry:
        return []
    is_set = entry is row.main
    colour, shape = looks[row.set["method"]] if is_set else ("control", entry["arm"])
    curve, points = entry["curve"], []
    for images, seconds, *accuracies in zip(curve["images"], curve["seconds"], *curve["accuracies"]):
        mean = sum(accuracies) / len(accuracies)
        name = f"{row.set['method']}, IPC {row.set['ipc']}" if is_set else entry["arm"]
        tip = f"{name}, {row.network}: {100 * mean:.1f} % after {images:,} images, {duration(seconds)}"
        trace = f"{row.id} {entry['arm']}"
        points.append(ChartPoint({"1": images}, mean, [row.id], tip, shape, colour, trace=trace))
    return points


def _point(row: Row, at: dict[str, float], looks: Looks, where: str) -> ChartPoint:
    colour, shape = looks[row.set["method"]]
    return ChartPoint(
        at=at,
        accuracy=row.main["mean"],
        rows=[row.id],
        tip=f"{row.set['method']}, IPC {row.set['ipc']}, {row.network}, {row.track} labels: "
        f"{percent(row.main['mean'], row.main['std'])} %, {where}",
        shape=shape,
        colour=colour,
        interval=None if row.main["ci95"] is None else tuple(min(max(bound, 0), 1) for bound in row.main["ci95"]),
        hollow=row.track != "hard",
        small=row.own is False,
        label=f"IPC {row.set['ipc']}",
    )


def _control_point(row: Row, control: dict[str, Any], at: dict[str, float], where: str) -> ChartPoint:
    tip = f"{control['arm']}, {row.network}: {100 * control['mean']:.1f} %, {where}"
    return ChartPoint(at=at, accuracy=control["mean"], rows=[row.id], tip=tip, shape=control["arm"])


def _full_lines(rows: list[Row]) -> list[Line]:
    """Full data as one line per network and budget: the mean of what the records say."""
    groups: dict[tuple[str, int], tuple[list[float], list[str]]] = {}
    for row in rows:
        control = row.control("full")
        if control:
            means, ids = groups.setdefault((row.network, control["steps"]), ([], []))
            ids.append(row.id)
            if control["mean"] not in means:
                means.append(control["mean"])
    lines = []
    for (network, steps), (means, ids) in sorted(groups.items()):
        mean = sum(means) / len(means)
        name = network if len(network) <= 28 else network[:27] + "…"
        tip = f"full data, {network}, {steps} steps: {100 * mean:.1f} %"
        lines.append(Line(mean, ids, f"{100 * mean:.1f} full data, {name}", tip))
    return lines


# -- the page ---------------------------------------------------------------------------------------------------------


def _page(sections: list[Section], published: list[PublishedResult], rejected: list[Rejected], records: int) -> str:
    rows = [row for section in sections for row in section.rows]
    choices = {
        "dataset": sorted({s.dataset for s in sections} | {p.dataset for p in published}),
        "ipc": sorted({row.set["ipc"] for row in rows} | {p.ipc for p in published}),
        "method": sorted({row.set["method"] for row in rows} | {p.method for p in published}),
        "network": sorted({row.network for row in rows} | {p.network for p in published if p.network}),
        "track": sorted({row.track for row in rows}),
        "family": sorted({row.method.family for row in rows} | {method_facts(p.method).family for p in published}),
        "protocol": sorted({s.title for s in sections}),
    }
    style, script = _asset("page.css"), _asset("page.js")
    ranked = [(section, cell) for section in sections for cell in section.cells if len(cell.rows) > 1]
    return (
        _templates()
        .get_template("index.html")
        .render(
            marker=Markup(MARKER),
            version=__version__,
            style=Markup(style),
            script=Markup(script),
            style_hash=_csp_hash(style),
            script_hash=_csp_hash(script),
            sections=sections,
            published=published,
            rejected=rejected,
            records=records,
            choices=choices,
            looks=_looks(row.set["method"] for row in rows),
            ranked=sorted(ranked, key=lambda pair: -len(pair[1].rows)),
            facts={row.id: json.dumps(_facts(section, row)) for section in sections for row in section.rows},
            cell_of={row.id: cell.id for section in sections for cell in section.cells for row in cell.rows},
            families={p.method: method_facts(p.method).family for p in published},
            cards=f"{CARDS}/",
            known=METHODS,
            uses=[str(uses) for uses in REUSE_COUNTS],
            rows=len(rows),
        )
    )


def _facts(section: Section, row: Row) -> dict[str, Any]:
    """A row's part of the compared sets (``set``, ``row``: lines of name and text) and of the CSV file (``csv``)."""
    made, main, times, entry = row.set, row.main, row.time, row.entry
    cost = row.record["cost"]
    unknown = "unknown"
    of_set = {
        "method": f"{made['method']}, {row.method.family}",
        "images per class": str(made["ipc"]),
        "labels": made["label_kind"],
        "made with": made["network"],
        "seed": unknown if made["seed"] is None else str(made["seed"]),
        "judged on": section.dataset + (f", data {section.fingerprint[:8]}" if section.fingerprint else ""),
        "protocol": section.title,
        "bytes": size(made["bytes"]["total"]),
        **{f"bytes of {part}": size(made["bytes"][part]) for part in ("images", "labels", "auxiliary", "external")},
        "time to make": unknown if times["made"] is None else duration(times["made"]),
        "made on": cost.get("device", unknown),
        "made by": made["command"] or "not recorded",
    }
    ior = row.score("IOR")
    of_row = {
        "accuracy, %": row.accuracy_text,
        "random, %": row.control_text("random"),
        "full data, %": row.control_text("full"),
        "gain over random, points": "–" if ior is None else points(ior),
        "time to train": duration(times["train"]),
        **{
            f"time to make and train, shared by {uses}": unknown if seconds is None else duration(seconds)
            for uses, seconds in times["total"].items()
        },
    }
    ci95 = main["ci95"] or (None, None)
    controls = {arm: row.control(arm) for arm in ("random", "full")}
    table = {
        "dataset": section.dataset,
        "data_fingerprint": row.record["data"]["fingerprint"],
        "protocol": section.protocol,
        "protocol_version": section.version,
        "ipc": made["ipc"],
        "method": made["method"],
        "family": row.method.family,
        "settings": row.settings,
        "seed": made["seed"],
        "labels": row.track,
        "network": row.network,
        "own_network": row.own,
        "accuracy": main["mean"],
        "ci95_low": ci95[0],
        "ci95_high": ci95[1],
        "runs": row.record["runs"],
        **{arm: control and control["mean"] for arm, control in controls.items()},
        **{name: row.score(name) for name in ("IOR", "HLR", "LRS")},
        **{f"bytes_{part}": made["bytes"][part] for part in ("total", "images", "labels")},
        "seconds_made": times["made"],
        "seconds_train": times["train"],
        **{f"seconds_total_{uses}": seconds for uses, seconds in times["total"].items()},
        "set": made["name"],
        "sha256": made["sha256"],
        "record": entry.href,
    }
    picture = entry.picture and [entry.picture.href, entry.picture.width, entry.picture.height]
    name = row.title
    return {"name": name, "picture": picture, "set": of_set, "row": of_row, "csv": table, "href": entry.href}


def _templates() -> Environment:
    page = Environment(
        loader=FileSystemLoader(HERE / "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {
        "size": size,
        "duration": duration,
        "percent": percent,
        "points": points,
        "signed": signed,
        "coded": coded,
    }
    page.globals |= {
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "left": charts.LEFT,
        "right": charts.RIGHT,
        "bottom": charts.BOTTOM,
    }
    return page


def _asset(name: str) -> str:
    return (HERE / "page" / name).read_text(encoding="utf-8")


def coded(text: str) -> Markup:
    """Plain text as HTML with what stands in backticks as code."""
    return Markup(re.sub(r"`+([^`]+)`+", r"<code>\1</code>", str(escape(text))))


def _csp_hash(text: str) -> str:
    """Names the one inline text that the page's security policy lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def points(difference: float) -> str:
    """A difference of accuracies in percentage points with its sign: ``+16.5``."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def signed(value: float) -> str:
    """A score with three decimals, ``0.302``, with a true minus."""
    return f"{value:.3f}".replace("-", "−")
