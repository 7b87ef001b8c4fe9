"""Records: the JSON file of an evaluation, its schema and its checks. Records from elsewhere are untrusted."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
import math
import platform
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonschema import Draft202012Validator

from condense.device import device_name, peak_memory
from condense.errors import CondenseError
from condense.files import write_json
from condense.formatting import aligned, duration, interval, percent, size
from condense.judge.scoring import (
    compute_scores,
    cross_architecture,
    is_augmented,
    main_entries,
    summary,
    time_to_accuracy,
)
from condense.sets import DistilledSet
from condense.version import __version__

RECORD_SCHEMA = "condense.record/1"

PUBLISHED_SET = "published-set"
"""Origin of a set that was imported from files of other people, not made by this toolkit."""

MAX_RECORD_BYTES = 16 * 1024 * 1024
"""Maximum size of a record file."""

MAX_TEXT_LENGTH = 10_000
"""Maximum number of characters of a text in a record."""

MAX_NUMBER = 1e18
"""Maximum absolute value of a number in a record."""


def valid_cost(cost: Any) -> dict[str, Any]:
    """The entries of a manifest's cost that the schema of records allows; the rest is untrusted and omitted."""
    allowed = schema()["properties"]["cost"]["properties"]
    entries = cost.items() if isinstance(cost, dict) else ()
    return {
        key: value for key, value in entries if key in allowed and Draft202012Validator(allowed[key]).is_valid(value)
    }


def describe_set(distilled: DistilledSet) -> dict[str, Any]:
    """The set, for the record. Unknown parts of its manifest, which is untrusted, are omitted."""
    manifest, nbytes = distilled.manifest, distilled.nbytes()
    made = manifest.get("plugins")
    plugins = {str(key): str(value)[:100] for key, value in made.items()} if isinstance(made, dict) else {}
    command, seed = manifest.get("command"), manifest.get("seed")
    return {
        "name": distilled.name,
        "sha256": distilled.sha256(),
        "method": manifest["method"],
        "dataset": manifest["dataset"],
        "ipc": manifest["ipc"],
        "seed": seed if isinstance(seed, int) else None,
        **({"origin": PUBLISHED_SET} if "imported" in manifest else {}),
        "label_kind": distilled.labels.kind,
        "network": manifest["network"],
        "bytes": {**nbytes, "stored": nbytes["total"] - nbytes["external"]},
        "labelling": {"exactness": distilled.labels.exactness, "step_cost": distilled.labels.step_cost},
        "command": command if isinstance(command, str) and len(command) <= MAX_TEXT_LENGTH else None,
        **({"plugins": plugins} if plugins else {}),
    }


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "condense": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
        "peak_memory": peak_memory(device),
    }


def format_record(record: dict[str, Any]) -> str:
    """Formats the results of a record as lines for a terminal."""
    rows = [("network", "arm", "students", "accuracy, % (± std)", "95 % interval", "steps", "lr", "seconds")]
    for entry in record["results"]:
        rows.append(
            (
                entry["network"],
                arm_name(entry, record),
                str(len(entry["accuracies"])),
                percent(entry["mean"], entry["std"]),
                interval(entry["ci95"]),
                str(entry["steps"]),
                f"{entry['lr']:g}" + (" (chosen)" if entry["lr_from"] == "held-out" else ""),
                f"{entry['seconds']:.1f}",
            )
        )
    lines = [aligned(rows, ruled=True)]
    for entry in record["results"]:
        if "balanced_accuracies" in entry:
            balanced = statistics.fmean(entry["balanced_accuracies"])
            lines.append(f"{arm_name(entry, record)} on {entry['network']}: balanced accuracy {100 * balanced:.1f} %")
    for entry in record["results"]:
        if "curve" in entry:
            lines.append(f"{arm_name(entry, record)} on {entry['network']}: {_format_curve(entry['curve'])}")
    total, external = (record["set"]["bytes"][part] for part in ("total", "external"))
    if external:
        lines.append(f"bytes: {size(total - external)} stored, {size(external)} external, {size(total)} together")
    for network, values in record["scores"].items():
        if values:
            lines.append(f"{network}: " + ", ".join(_format_score(name, score) for name, score in values.items()))
    cross = record["cross_architecture"]
    if cross:
        lines.append(f"on networks it was not made with: {_format_score('accuracy lost', cross['drop'])}")
    for entry in record["missing"]:
        lines.append(f"arm {entry['arm']} is missing: {entry['why']}")
    return "\n".join(lines)


def labels_of(entry: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Which labels students of an entry learned from: the kind that the set brings, or hard."""
    return str(record["set"]["label_kind"]) if entry["labels"] == "own" else "hard"


def arm_name(entry: dict[str, Any], record: dict[str, Any]) -> str:
    """The name of the arm, with (hard labels) or (not augmented) if it differs in these from the others."""
    marks = []
    if entry["labels"] == "hard" and entry["arm"] == "distilled":
        marks.append("hard labels")
    if not entry["augment"] and is_augmented(record["results"]):
        marks.append("not augmented")
    return entry["arm"] + (f" ({', '.join(marks)})" if marks else "")


def _format_curve(curve: dict[str, Any]) -> str:
    """Mean accuracies with the images seen and the seconds until then."""
    means = [statistics.fmean(column) for column in zip(*curve["accuracies"])]
    return "; ".join(
        f"{100 * mean:.1f} % after {images:,} images, {duration(seconds)}"
        for mean, images, seconds in zip(means, curve["images"], curve["seconds"])
    )


def _format_score(name: str, score: dict[str, Any]) -> str:
    bounds = "" if score["ci95"] is None else " ({:+.3f} to {:+.3f})".format(*score["ci95"])
    return f"{name} {score['value']:+.3f}{bounds}"


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of records."""
    return json.loads((importlib.resources.files("condense.judge") / "record.schema.json").read_text())


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads and checks a record from an untrusted file.

    Raises:
        CondenseError: not readable JSON, a missing, unknown or wrongly typed field, or numbers that do not follow from
            the accuracies.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise CondenseError(f"{path}: larger than {MAX_RECORD_BYTES} bytes; not a record")
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_reject_constant)
    except (OSError, ValueError, RecursionError) as fault:
        raise CondenseError(f"{path}: not readable as JSON ({fault})") from fault
    faults = check_record(record)
    if faults:
        raise CondenseError(f"{path}: {'; '.join(faults)}")
    return record


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def check_record(record: Any) -> list[str]:
    """Returns the mistakes in a record as text; an empty list if it is valid."""
    if isinstance(record, dict) and record.get("schema", RECORD_SCHEMA) != RECORD_SCHEMA:
        return [f"'schema' is {record['schema']!r}; this version reads {RECORD_SCHEMA}"]
    faults = [_format_fault(error) for error in Draft202012Validator(schema()).iter_errors(record)]
    faults = faults or list(_invalid_values(record, ""))[:5]
    if faults:
        return faults
    if not main_entries(record):
        return ["no result of the distilled set in 'results'"]
    for entry in record["results"]:
        where, accuracies = f"{entry['arm']} on {entry['network']}", entry["accuracies"]
        if len(accuracies) != record["runs"]:
            faults.append(f"{where}: {len(accuracies)} accuracies for {record['runs']} runs")
        elif len(entry.get("balanced_accuracies", accuracies)) != record["runs"]:
            faults.append(f"{where}: {len(entry['balanced_accuracies'])} balanced accuracies for {record['runs']} runs")
        elif abs(statistics.fmean(accuracies) - entry["mean"]) > 1e-9:
            faults.append(f"{where}: 'mean' is not that of its accuracies")
        elif not _json_close({key: entry[key] for key in ("mean", "std", "ci95")}, summary(accuracies)):
            faults.append(f"{where}: 'ci95' is not that of its accuracies")
        faults += _curve_faults(entry, where)
    return faults or list(_inconsistent(record))


def _curve_faults(entry: dict[str, Any], where: str) -> list[str]:
    """Mistakes in the curve of an entry of ``results``, if it has one."""
    if "curve" not in entry:
        return []
    curve, accuracies = entry["curve"], entry["accuracies"]
    steps, rows = curve["steps"], curve["accuracies"]
    if len(rows) != len(accuracies) or {len(steps)} != {len(curve["images"]), len(curve["seconds"]), *map(len, rows)}:
        return [f"{where}: 'curve' has not one value for each of its steps and runs"]
    if any(later <= before for before, later in itertools.pairwise(steps)) or steps[-1] > entry["steps"]:
        return [f"{where}: the steps of 'curve' do not ascend to those of the training"]
    if steps[-1] == entry["steps"] and [row[-1] for row in rows] != accuracies:
        return [f"{where}: 'curve' does not end at the accuracies"]
    return []


def _inconsistent(record: dict[str, Any]) -> Iterator[str]:
    """Yields the derived numbers that do not follow from the accuracies, seconds and bytes of the record."""
    results, set_facts = record["results"], record["set"]
    arms = [tuple(entry[key] for key in ("arm", "labels", "augment", "network")) for entry in results]
    if len(set(arms)) < len(arms):
        yield "two entries of 'results' are of the same arm and network"
    if len({entry["steps"] for entry in results if entry["arm"] != "full"}) > 1:
        yield "'steps' differ between arms of one budget"
    parts = {part: size for part, size in set_facts["bytes"].items() if part not in ("total", "stored")}
    if set_facts["bytes"]["total"] != sum(parts.values()):
        yield "'set.bytes.total' is not the sum of its parts"
    elif set_facts["bytes"].get("stored") not in (None, set_facts["bytes"]["total"] - parts["external"]):
        yield "'set.bytes.stored' is not the total without external bytes"
    for name, expected in (
        ("scores", compute_scores(results, set_facts["label_kind"])),
        ("cross_architecture", cross_architecture(results, set_facts["network"])),
        ("time", time_to_accuracy(results, record["cost"])),
    ):
        if not _json_close(record[name], expected):
            yield f"'{name}' does not follow from the other numbers"


def _json_close(value: Any, expected: Any) -> bool:
    """Whether two JSON values are equal, floats within a tolerance of 1e-6."""
    if isinstance(expected, dict):
        same = isinstance(value, dict) and value.keys() == expected.keys()
        return same and all(_json_close(value[key], part) for key, part in expected.items())
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(_json_close, value, expected))
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
    return value == expected


def _invalid_values(value: Any, where: str) -> Iterator[str]:
    """Yields texts that are too long or not Unicode, and numbers that are too large (1e999 is infinite)."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _invalid_values(key, f"a name in {where or 'the record'}")
            yield from _invalid_values(part, f"{where}.{key[:40]}" if where else key[:40])
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _invalid_values(part, f"{where}.{index}")
    elif isinstance(value, str):
        if len(value) > MAX_TEXT_LENGTH:
            yield f"'{where}' is longer than {MAX_TEXT_LENGTH} characters"
        elif any(0xD800 <= ord(c) < 0xE000 for c in value):
            yield f"'{where}' is not valid text"
    elif isinstance(value, (int, float)) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        yield f"'{where}' is not a usable number"


def _format_fault(error: Any) -> str:
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
    write_json(path, record)
