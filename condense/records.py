"""Records: the numbers that follow from accuracies, and the typed JSON file that keeps them all."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import condense
from condense import rng
from condense.distilled import replacing
from condense.errors import CondenseError
from condense.run import device_name, peak_memory
from condense.units import size

SCHEMA = "condense.record/1"
RESAMPLES = 10000
"""Bootstrap samples of the runs behind the intervals of LRS and ARS."""
USES = (1, 10, 100)
"""Numbers of networks trained on one set, over which the time to make it is shared out."""
LIMIT = 16 * 1024 * 1024
"""Bytes of the largest record that is read."""
TEXT_LIMIT = 10_000
"""Characters of the longest text in a record."""
NUMBER_LIMIT = 1e18

# -- numbers ----------------------------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and 95 % t-interval of the mean (None for both with a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "std": None, "ci95": None}
    from scipy.stats import t

    std = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def _interval(values: Sequence[float]) -> dict[str, Any]:
    """A score that is a mean of paired differences, with its t-interval."""
    found = summary(values)
    return {"value": found["mean"], "ci95": found["ci95"]}


def normalised(alpha: float) -> float:
    """DD-Ranking's map of a difference of accuracies in [-1,1] to [0,1]: (e^a - e^-1) / (e - e^-1); 0.2689 at 0."""
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def resampled(score: Callable[..., float], *arms: Sequence[float]) -> dict[str, Any]:
    """``score`` of the arms' mean accuracies, with a 95 % interval from resampling runs, the same ones in every arm.

    With few runs the interval is too narrow: three runs have only ten different resamples.
    """
    value = score(*(statistics.fmean(arm) for arm in arms))
    runs = len(arms[0])
    if runs < 2:
        return {"value": value, "ci95": None}
    picks = rng.Draws("bootstrap", runs).integers(runs, (RESAMPLES, runs))
    means = [torch.tensor(arm, dtype=torch.float64)[picks].mean(1).tolist() for arm in arms]
    samples = torch.tensor([score(*row) for row in zip(*means)], dtype=torch.float64)
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "ci95": [low, high]}


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def scores(results: Sequence[dict[str, Any]], label_kind: str = "hard") -> dict[str, Any]:
    """DD-Ranking's scores per network, on fractions, as far as the arms that were run allow.

    IOR = distilled - random, both with the labels of the track. HLR = full - distilled, both with hard labels.
    LRS = n((IOR - HLR) / 2) and ARS = n((IOR with augmentation + IOR without) / 2), n as in :func:`normalised`.
    Run k of every arm starts from the same weights, so IOR and HLR carry the t-interval of paired differences; LRS and
    ARS that of resampled runs.

    Args:
        results: the record's entries.
        label_kind: of the set; a set with hard labels has no other arm with them.
    """
    found: dict[str, Any] = {}
    for network in dict.fromkeys(entry["network"] for entry in results):
        arms = {
            (entry["arm"], entry["labels"], entry["augment"]): entry["accuracies"]
            for entry in results
            if entry["network"] == network
        }
        augmented = _augmented(results)
        track = "own" if ("distilled", "own", augmented) in arms else "hard"
        made, control = (arms.get((arm, track, augmented)) for arm in ("distilled", "random"))
        hard = arms.get(("distilled", "own" if label_kind == "hard" else "hard", augmented))
        full = arms.get(("full", "hard", augmented))
        plain = [arms.get((arm, track, False)) for arm in ("distilled", "random")] if augmented else [None, None]
        values: dict[str, Any] = {}
        if made and control:
            values["IOR"] = _interval(_minus(made, control))
        if full and hard:
            values["HLR"] = _interval(_minus(full, hard))
        if made and control and full and hard:
            values["LRS"] = resampled(_lrs, made, control, full, hard)
        if made and control and plain[0] and plain[1]:
            values["ARS"] = resampled(_ars, made, control, plain[0], plain[1])
        found[network] = values
    return found


def _augmented(results: Sequence[dict[str, Any]]) -> bool:
    """Whether the protocol augments: False only where no arm does."""
    return any(entry["augment"] for entry in results)


def _lrs(made: float, control: float, full: float, hard: float) -> float:
    return normalised(0.5 * (made - control) - 0.5 * (full - hard))


def _ars(made: float, control: float, plain_made: float, plain_control: float) -> float:
    return normalised(0.5 * (made - control) + 0.5 * (plain_made - plain_control))


def cross_architecture(results: Sequence[dict[str, Any]], own: str) -> dict[str, Any] | None:
    """How much accuracy the set loses on networks that it was not made with: own minus the mean of the others.

    Paired by run. None where the set's own network or any other was not judged.
    """
    by_network = {entry["network"]: entry["accuracies"] for entry in results if _is_main(entry, results)}
    others = [network for network in by_network if network != own]
    if own not in by_network or not others:
        return None
    means = [statistics.fmean(run) for run in zip(*(by_network[network] for network in others))]
    return {"network": own, "others": others, "drop": _interval(_minus(by_network[own], means))}


def _is_main(entry: dict[str, Any], results: Sequence[dict[str, Any]]) -> bool:
    """Whether the entry is the distilled arm as its track judges it: own labels where there are such, augmented."""
    own = any(e["arm"] == "distilled" and e["labels"] == "own" for e in results)
    return (
        entry["arm"] == "distilled"
        and entry["labels"] == ("own" if own else "hard")
        and entry["augment"] == _augmented(results)
    )


def main_entries(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record's entries of the distilled set itself, one per network."""
    return [entry for entry in record["results"] if _is_main(entry, record["results"])]


def time_to_accuracy(results: Sequence[dict[str, Any]], cost: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds from nothing to a trained network, per arm and network, and the accuracy that they buy.

    Args:
        results: the record's entries.
        cost: the set's; ``seconds`` and ``preparation_seconds`` (experts, teachers, labels made elsewhere).

    Returns:
        One entry for each: ``train_seconds`` of one student, ``made_seconds`` of what it learns from (None where
        unknown, 0 for real data), and ``total_seconds`` by number of uses: made / uses + train.
    """
    made = float(cost["seconds"] + cost.get("preparation_seconds", 0.0)) if "seconds" in cost else None
    found = []
    for entry in results:
        train = entry["seconds"] / len(entry["accuracies"])
        before = made if entry["arm"] == "distilled" else 0.0
        found.append(
            {
                **{key: entry[key] for key in ("arm", "labels", "augment", "network")},
                "accuracy": entry["mean"],
                "train_seconds": round(train, 3),
                "made_seconds": before,
                "total_seconds": {
                    str(uses): None if before is None else round(before / uses + train, 3) for uses in USES
                },
            }
        )
    return found


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
    return json.loads((importlib.resources.files("condense") / "record.schema.json").read_text())


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
