"""Compares kinds of labels for one set: bytes, accuracy, a table and a chart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from condense.config import build_config, parse_overrides
from condense.data import Task
from condense.errors import CondenseError, did_you_mean, missing_package
from condense.files import atomic_write
from condense.formatting import aligned, binary, interval, size
from condense.judge import evaluation, get_protocol
from condense.lighten.kinds import LIGHTEN_KINDS
from condense.lighten.lightening import check_same_data, lighten
from condense.lighten.sizes import LabelComparison
from condense.sets import DistilledSet

PICTURES = (".png", ".pdf", ".svg")

MARKERS = "osD^v<>"


def parse_kinds(text: str) -> list[str]:
    """``lowrank:rank=8,topk,pool:keep=0.1:values=int8`` as a list of checked specifications.

    Raises:
        CondenseError: an unknown kind or setting.
    """
    specifications = [specification for specification in text.split(",") if specification]
    for specification in specifications:
        if specification != "own":
            _settings(specification)
    return list(dict.fromkeys(specifications))


def _settings(specification: str) -> tuple[str, dict[str, Any]]:
    kind, *rest = specification.split(":")
    if kind not in LIGHTEN_KINDS:
        raise CondenseError(f"--kinds {kind}: unknown{did_you_mean(kind, [*LIGHTEN_KINDS, 'own'])}")
    settings = parse_overrides(rest)
    build_config(LIGHTEN_KINDS[kind][0], settings, f"labels={kind}")
    return kind, settings


def compare_label_kinds(
    distilled: DistilledSet,
    kinds: Sequence[str] = (),
    task: Task | None = None,
    *,
    protocol: str | None = None,
    network: str | None = None,
    runs: int | None = None,
    teacher: nn.Module | None = None,
    teachers: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    quiet: bool = True,
) -> list[LabelComparison]:
    """Compares bytes of the set's labels and of lighter ones and, if the real data are given, the accuracy of students.

    Args:
        distilled: the set.
        kinds: as in :func:`parse_kinds`; if empty, ``own`` and every kind with its default settings.
        task: the real data; None compares bytes only.
        protocol: that students are trained by, of the soft track; the set's own, else dc-soft-v1, when None.
        network: of the students; the protocol's first when None.
        runs: students of each kind; the protocol's number when None.
        teacher, teachers: see :func:`lighten`.
        seed, device, precision, quiet: see :func:`condense.evaluate`.

    Returns:
        One point a kind, in their order; what cannot be made says why.

    Raises:
        CondenseError: what is wrong with all of them: other data, an unknown protocol or one of the hard track.
    """
    chosen = protocol or distilled.manifest.get("protocol") or "dc-soft-v1"
    if task is not None:
        rules = get_protocol(chosen)
        if distilled.labels.outputs is not None:
            raise CondenseError(
                f"--data {task.name}: labels are compared by students of classes, but {distilled.name} has "
                f"{distilled.labels.kind} labels; leave it out to compare bytes"
            )
        if rules.is_transfer:
            raise CondenseError(
                f"--protocol {rules.name}: judges pretrained networks; take one of classes, e.g. dc-soft-v1"
            )
        if rules.labels != "soft" and protocol is not None:
            raise CondenseError(
                f"--protocol {protocol}: judges classes alone, whatever the labels; take one of the "
                "soft track, e.g. dc-soft-v1"
            )
        chosen = chosen if rules.labels == "soft" else "dc-soft-v1"
        network = network or get_protocol(chosen).networks[0]
        check_same_data(distilled, task)
    points = []
    for specification in kinds or ["own", *(kind for kind in LIGHTEN_KINDS if kind != distilled.labels.kind)]:
        try:
            compared = distilled
            if specification != "own":
                kind, settings = _settings(specification)
                compared = lighten(
                    distilled, kind, task, teacher, teachers=teachers, device=device, quiet=quiet, **settings
                )
        except CondenseError as fault:
            points.append(LabelComparison(specification, missing=str(fault)))
            continue
        labels = compared.labels
        point = LabelComparison(
            specification, labels.kind, labels.nbytes(), labels.external_nbytes(), labels.exactness, labels.step_cost
        )
        if task is not None:
            record = evaluation.evaluate(
                compared,
                task,
                networks=network,
                runs=runs,
                protocol=chosen,
                controls=(),
                seed=seed,
                device=device,
                precision=precision,
                quiet=quiet,
            )
            entry = record["results"][0]
            ci95 = (entry["ci95"][0], entry["ci95"][1]) if entry["ci95"] else None
            point = dataclasses.replace(point, mean=entry["mean"], ci95=ci95)
        points.append(point)
    return points


def format_comparison(points: Sequence[LabelComparison], whole: str = "own") -> str:
    """The points as lines for a terminal, as shares of ``whole``; what could not be made is below."""
    complete = [point for point in points if not point.missing]
    full = next((p.bytes + p.external for p in complete if p.words == whole), None)
    judged, costs = any(point.mean is not None for point in complete), any(point.step_cost for point in complete)
    rows = [
        (
            "labels",
            "bytes",
            "external",
            f"of {whole}",
            "exactness",
            *(("accuracy", "95 % interval") if judged else ()),
            *(("a step costs",) if costs else ()),
        )
    ]
    for p in complete:
        share = f"{100 * (p.bytes + p.external) / full:.3g} %" if full else ""
        reached = ("" if p.mean is None else f"{100 * p.mean:.1f} %", interval(p.ci95)) if judged else ()
        named = p.words + f" ({p.kind})" * (p.words == "own")
        needs = (_size(p.bytes), _size(p.external), share)
        rows.append((named, *needs, p.exactness, *reached, *((p.step_cost,) if costs else ())))
    return "\n".join([aligned(rows, ruled=True), *(f"{p.words} is missing: {p.missing}" for p in points if p.missing)])


def _size(count: int) -> str:
    """In both units where they are far apart."""
    return size(count) + (f" ({binary(count)})" if count >= 2**30 else "")


def check_plot(path: Path) -> None:
    """Finds before any work that a picture cannot be drawn.

    Raises:
        CondenseError: matplotlib is missing, or the file's ending is none of :data:`PICTURES`.
    """
    if path.suffix.lower() not in PICTURES:
        raise CondenseError(f"--plot {path}: must end in {', '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_package("matplotlib", "plots", f"--plot {path}") from error


def plot_comparison(points: Sequence[LabelComparison], path: Path, title: str) -> Path:
    """A picture of accuracy (bars: 95 % intervals) against the bytes of labels, external ones included; a hollow mark
    shows them without. The legend's order is that of accuracy.

    Raises:
        CondenseError: as :func:`check_plot`, or no point has an accuracy.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    shown = sorted((p for p in points if p.mean is not None), key=lambda p: -(p.mean or 0))
    if not shown:
        raise CondenseError(f"--plot {path}: draws accuracies, and there are none; give --data")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, point in enumerate(shown, 1):
        assert point.mean is not None
        low, high = (min(max(bound, 0), 1) for bound in point.ci95 or (point.mean, point.mean))
        where, mean = point.bytes + point.external, 100 * point.mean
        bars = [[mean - 100 * low], [100 * high - mean]]
        # 10 colours and 7 markers: each of 70 looks different.
        look: dict[str, Any] = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)]}
        axes.errorbar([where], [mean], yerr=bars, capsize=3, linestyle="", label=f"{number}  {point.words}", **look)
        axes.annotate(str(number), (where, mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
        if point.external:
            axes.plot([point.bytes, where], [mean, mean], linestyle=":", markerfacecolor="none", markevery=[0], **look)
    axes.set(xscale="log", xlabel="bytes of labels", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150)
    return path
