"""Records: the numbers that follow from accuracies, and the typed JSON file that keeps them all."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import condense
from condense.device import device_name, peak_memory
from condense.errors import CondenseError
from condense.files import replacing
from condense.formatting import size
from condense.judge.scoring import _augmented, cross_architecture, main_entries, scores, summary, time_to_accuracy

SCHEMA = "condense.record/1"

LIMIT = 16 * 1024 * 1024
"""Bytes of the largest record that is read."""

TEXT_LIMIT = 10_000
"""Characters of the longest text in a record."""

NUMBER_LIMIT = 1e18


def known_cost(cost: Any) -> dict[str, Any]:
    """What a record states of a manifest's cost: known entries of the right type, whoever wrote the rest."""
    from jsonschema import Draft202012Validator

    allowed = schema()["properties"]["cost"]["properties"]
    entries = cost.items() if isinstance(cost, dict) else ()
    return {
        key: value for key, value in entries if key in allowed and Draft202012Validator(allowed[key]).is_valid(value)
    }


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "condense": condense.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
        "peak_memory": peak_memory(device),
    }


# -- for people -------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """The record's results as lines for a terminal."""
    rows = [("network", "arm", "runs", "accuracy", "95 % interval", "steps", "lr", "seconds")]
    for entry in record["results"]:
        std = "" if entry["std"] is None else f" ± {100 * entry['std']:.1f}"
        interval = "" if entry["ci95"] is None else "{:.1f} to {:.1f}".format(*(100 * bound for bound in entry["ci95"]))
        rows.append(
            (
                entry["network"],
                arm_name(entry, record),
                str(len(entry["accuracies"])),
                f"{100 * entry['mean']:.1f} %{std}",
                interval,
                str(entry["steps"]),
                f"{entry['lr']:g}" + (" (chosen)" if entry["lr_from"] == "held-out" else ""),
                f"{entry['seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    total, external = (record["set"]["bytes"][part] for part in ("total", "external"))
    if external:
        lines.append(f"bytes: {size(total - external)} stored, {size(external)} external, {size(total)} together")
    for network, values in record["scores"].items():
        if values:
            lines.append(f"{network}: " + ", ".join(_score(name, score) for name, score in values.items()))
    cross = record["cross_architecture"]
    if cross:
        lines.append(f"on networks it was not made with: {_score('accuracy lost', cross['drop'])}")
    for entry in record["missing"]:
        lines.append(f"arm {entry['arm']} is missing: {entry['why']}")
    return "\n".join(lines)


def arm_name(entry: dict[str, Any], record: dict[str, Any]) -> str:
    """The arm with what sets it apart: hard labels where the set has others, and no augmentation."""
    marks = []
    if entry["labels"] == "hard" and entry["arm"] == "distilled":
        marks.append("hard labels")
    if not entry["augment"] and _augmented(record["results"]):
        marks.append("not augmented")
    return entry["arm"] + (f" ({', '.join(marks)})" if marks else "")


def _score(name: str, score: dict[str, Any]) -> str:
    interval = "" if score["ci95"] is None else " ({:+.3f} to {:+.3f})".format(*score["ci95"])
    return f"{name} {score['value']:+.3f}{interval}"


# -- the file ---------------------------------------------------------------------------------------------------------


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of records."""
    return json.loads((importlib.resources.files("condense.judge") / "record.schema.json").read_text())


def read_record(path: str | Path) -> dict[str, Any]:
    """A record from anywhere, checked.

    Raises:
        CondenseError: not readable JSON, a missing, foreign or wrongly typed field, which is named, or numbers that do
            not follow from the accuracies.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LIMIT:
            raise CondenseError(f"{path}: larger than {LIMIT} bytes; not a record")
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as fault:
        raise CondenseError(f"{path}: not readable as JSON ({fault})") from fault
    faults = check_record(record)
    if faults:
        raise CondenseError(f"{path}: {'; '.join(faults)}")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def check_record(record: Any) -> list[str]:
    """What is wrong with a record, in words; empty for a good one."""
    from jsonschema import Draft202012Validator

    if isinstance(record, dict) and record.get("schema", SCHEMA) != SCHEMA:
        return [f"'schema' is {record['schema']!r}; this version reads {SCHEMA}"]
    faults = [_fault(error) for error in Draft202012Validator(schema()).iter_errors(record)]
    faults = faults or list(_unshowable(record, ""))[:5]
    if faults:
        return faults
    if not main_entries(record):
        return ["no result of the distilled set in 'results'"]
    for entry in record["results"]:
        if len(entry["accuracies"]) != record["runs"]:
            faults.append(f"{entry['arm']} on {entry['network']}: {len(entry['accuracies'])} accuracies for "
                          f"{record['runs']} runs")  # fmt: skip
        elif abs(statistics.fmean(entry["accuracies"]) - entry["mean"]) > 1e-9:
            faults.append(f"{entry['arm']} on {entry['network']}: 'mean' is not that of its accuracies")
        elif not _agree({key: entry[key] for key in ("mean", "std", "ci95")}, summary(entry["accuracies"])):
            faults.append(f"{entry['arm']} on {entry['network']}: 'ci95' is not that of its accuracies")
    return faults or list(_inconsistent(record))


def _inconsistent(record: dict[str, Any]) -> Iterator[str]:
    """What the page would show, but does not follow from the accuracies, seconds and bytes of the record."""
    results, made = record["results"], record["set"]
    arms = [tuple(entry[key] for key in ("arm", "labels", "augment", "network")) for entry in results]
    if len(set(arms)) < len(arms):
        yield "two entries of 'results' are of the same arm and network"
    if len({entry["steps"] for entry in results if entry["arm"] != "full"}) > 1:
        yield "'steps' differ between arms of one budget"
    parts = {part: size for part, size in made["bytes"].items() if part not in ("total", "stored")}
    if made["bytes"]["total"] != sum(parts.values()):
        yield "'set.bytes.total' is not the sum of its parts"
    elif made["bytes"].get("stored") not in (None, made["bytes"]["total"] - parts["external"]):
        yield "'set.bytes.stored' is not the total without external bytes"
    for name, known in (
        ("scores", scores(results, made["label_kind"])),
        ("cross_architecture", cross_architecture(results, made["network"])),
        ("time", time_to_accuracy(results, record["cost"])),
    ):
        if not _agree(record[name], known):
            yield f"'{name}' does not follow from the other numbers"


def _agree(told: Any, known: Any) -> bool:
    """Whether two pieces of JSON say the same, numbers to rounding."""
    if isinstance(known, dict):
        same = isinstance(told, dict) and told.keys() == known.keys()
        return same and all(_agree(told[key], part) for key, part in known.items())
    if isinstance(known, list):
        return isinstance(told, list) and len(told) == len(known) and all(map(_agree, told, known))
    if isinstance(known, float) and isinstance(told, (int, float)):
        return math.isclose(told, known, rel_tol=1e-6, abs_tol=1e-6)
    return told == known


def _unshowable(value: Any, where: str) -> Iterator[str]:
    """Texts that are too long or no Unicode, and numbers beyond all measure (JSON's 1e999 is infinite)."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _unshowable(key, f"a name in {where or 'the record'}")
            yield from _unshowable(part, f"{where}.{key[:40]}" if where else key[:40])
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _unshowable(part, f"{where}.{index}")
    elif isinstance(value, str):
        if len(value) > TEXT_LIMIT:
            yield f"'{where}' is longer than {TEXT_LIMIT} characters"
        elif any(0xD800 <= ord(c) < 0xE000 for c in value):
            yield f"'{where}' is not valid text"
    elif isinstance(value, (int, float)) and not -NUMBER_LIMIT <= value <= NUMBER_LIMIT:
        yield f"'{where}' is not a usable number"


def _fault(error: Any) -> str:
    where = ".".join(map(str, error.absolute_path))
    inside = f" in '{where}'" if where else ""
    if error.validator == "required":
        return f"lacks {error.message.split(' is a required')[0]}{inside}"
    if error.validator == "additionalProperties":
        extra = sorted(set(error.instance) - set(error.schema.get("properties", ())))
        return f"foreign field {', '.join(repr(str(name)[:40]) for name in extra)}{inside}"
    return f"'{where or 'the record'}': {error.message[:120]}"


def write_record(record: dict[str, Any], path: Path) -> None:
    """Writes the record as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
