"""What is known of a recipe's accuracy: published numbers, and the records that this project measured."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from condense.benchmarks.leaderboard import PUBLISHED_CSV, RESULTS, PublishedResult, read_published
from condense.formatting import duration
from condense.judge import main_entries, read_record


@functools.cache
def _published() -> list[PublishedResult]:
    return read_published(PUBLISHED_CSV)[0]


@functools.cache
def _records(folder: Path) -> list[dict[str, Any]]:
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def published(method: str, dataset: str | None = None, ipc: int | None = None) -> list[dict[str, Any]]:
    """Published numbers of a method, of one dataset and number of images per class where given."""
    return [
        asdict(row)
        for row in _published()
        if row.method == method and dataset in (None, row.dataset) and ipc in (None, row.ipc)
    ]


def measured(
    method: str, dataset: str | None = None, ipc: int | None = None, folder: Path = RESULTS
) -> list[dict[str, Any]]:
    """This project's own records of a method, one entry for each network that a set was judged on.

    A record is of ``dataset`` where its data are called so, or so with an ending after a hyphen (``cifar10-jpeg``).
    """
    entries = []
    for record in _records(folder):
        described = record["set"]
        same = dataset is None or described["dataset"] == dataset or described["dataset"].startswith(f"{dataset}-")
        if described["method"] != method or not same or ipc not in (None, described["ipc"]):
            continue
        for main in main_entries(record):
            random = [e for e in record["results"] if e["arm"] == "random" and e["network"] == main["network"]]
            entries.append(
                {
                    "dataset": described["dataset"],
                    "ipc": described["ipc"],
                    "network": main["network"],
                    "protocol": record["protocol"]["name"],
                    "mean": 100 * main["mean"],
                    "std": None if main["std"] is None else 100 * main["std"],
                    "runs": record["runs"],
                    "random": 100 * random[0]["mean"] if random else None,
                    "cost": record["cost"],
                    "command": described["command"],
                }
            )
    return sorted(entries, key=lambda entry: (entry["dataset"], entry["ipc"], -entry["mean"]))


def accuracy(mean: float, std: float | None) -> str:
    """Per cent ± standard deviation, where there is one."""
    return f"{mean:g}" + (f" ± {std:g}" if std is not None else "")


def published_line(row: dict[str, Any]) -> str:
    """A published number as one line of text, without its method, data and size."""
    return f"{accuracy(row['mean'], row['std'])} % on {row['network']} ({row['protocol']}; {row['source']})"


def measured_line(entry: dict[str, Any]) -> str:
    """A measured accuracy as one line of text, with the name of its data."""
    std = "" if entry["std"] is None else f" ± {entry['std']:.1f}"
    random = f", random images {entry['random']:.1f} %" if entry["random"] is not None else ""
    seconds = entry["cost"].get("seconds", 0) + entry["cost"].get("preparation_seconds", 0)
    cost = f"made in {duration(seconds)}" if seconds else "time unknown"
    return f"{entry['mean']:.1f}{std} % on {entry['network']}, {entry['protocol']}, {entry['dataset']}{random}; {cost}"
