"""Time, memory and growth of selectors on random features: ``python -m condense.benchmarks.selection_scale``.

Each measurement is a process of its own. Times are those of the processor, so that other processes hardly change them.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense import selection
from condense.benchmarks.speed.measure import Parser, guarded, positive, read_counts, write
from condense.errors import CondenseError
from condense.formatting import aligned
from condense.networks import processor_name
from condense.selection import CosineKernel

SELECTORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "herding": selection.herding,
    "kcenter": lambda features, count: selection.k_center(features, count, 0),
    "kmeans": lambda features, count: selection.nearest_to_centroids(features, count, 0),
    "graphcut": lambda features, count: selection.graph_cut(CosineKernel(features), count),
    "facility": lambda features, count: selection.facility_location(CosineKernel(features), count),
}

GROUPS = 200
"""Clusters of the random features of all classes together."""


def clustered_features(points: int, dimensions: int) -> Tensor:
    """Random features (n, D) >= 0 in ``GROUPS`` overlapping clusters, each as wide as the clusters are apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(GROUPS, dimensions, generator=generator)
    features = torch.randn(points, dimensions, generator=generator)
    return features.add_(centres[torch.arange(points) % GROUPS]).relu_()


def measure(name: str, points: int, count: int, dimensions: int, classes: int, answer: Any) -> None:
    """Sends what one selection took: seconds of the processor and of the clock, and peak memory in bytes."""
    import sklearn.cluster  # noqa: F401  # seconds that are no part of a selection

    torch.set_num_threads(1)
    features = clustered_features(points, dimensions)
    labels = np.arange(points) * classes // points
    began, used = time.monotonic(), time.process_time()
    chosen = selection.select_by_class(
        labels, classes, count // classes, "class", lambda ids, part, c: SELECTORS[name](features[ids], part)
    )
    seconds = time.process_time() - used, time.monotonic() - began
    assert len(chosen) == len(set(chosen.tolist())) == count // classes * classes
    answer.send((*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def measure_apart(name: str, points: int, count: int, dimensions: int, classes: int, limit: float) -> dict[str, Any]:
    """The measurement in a process of its own; without figures if it takes longer than ``limit`` seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(name, points, count, dimensions, classes, sender))
    process.start()
    row: dict[str, Any] = {"selector": name, "points": points, "count": count, "classes": classes}
    if receiver.poll(limit):
        row |= dict(zip(("cpu_seconds", "seconds", "peak_bytes"), receiver.recv()))
    else:
        process.kill()
    process.join()
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each selector and number of classes: seconds, growth with n and with k, memory."""
    known = {(row["selector"], row["classes"], row["points"], row["count"]): row.get("cpu_seconds") for row in rows}
    cells = [["selector", "classes", "n", "k", "processor", "clock", "peak memory", "n doubled", "k doubled"]]
    for row in rows:
        name, classes, points, count = row["selector"], row["classes"], row["points"], row["count"]
        seconds = row.get("cpu_seconds")
        figures = ["stopped"] * 3
        if seconds is not None:
            figures = [f"{seconds:.1f} s", f"{row['seconds']:.1f} s", f"{row['peak_bytes'] / 1e9:.2f} GB"]
        growth = []
        for half in ((name, classes, points // 2, count), (name, classes, points, count // 2)):
            before = known.get(half)
            growth.append(f"x {seconds / before:.1f}" if before and seconds else "")
        cells.append([name, str(classes), str(points), str(count), *figures, *growth])
    return aligned(cells)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.selection_scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=positive, default=50_000, help="n; half of it is measured too")
    parser.add_argument("--count", type=positive, default=500, help="k, points to choose; half of it is measured too")
    parser.add_argument("--dimensions", type=positive, default=512)
    parser.add_argument("--classes", default="10,1", help="numbers of equal classes, A,B,...; 1 is a free budget")
    parser.add_argument("--selectors", default=",".join(SELECTORS), help="A,B,...")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a measurement is stopped")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    classes = read_counts("--classes", options.classes)
    for name in options.selectors.split(","):
        if name not in SELECTORS:
            raise CondenseError(f"--selectors {name}: must be of {', '.join(SELECTORS)}")
    machine = {"processor": processor_name(), "system": platform.platform(), "torch": torch.__version__}
    shapes = (
        (options.points // 2, options.count),
        (options.points, options.count // 2),
        (options.points, options.count),
    )
    for name, number, (points, count) in itertools.product(options.selectors.split(","), classes, shapes):
        rows.append(measure_apart(name, points, count, options.dimensions, number, options.limit))
        print(rows[-1], file=sys.stderr, flush=True)
        if options.json:
            write(options.json, json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    guarded(_main, None)
