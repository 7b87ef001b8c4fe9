"""Evaluation: ``python -m condense.benchmarks.speed.students`` times K students trained together against one by one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from condense import networks, rng
from condense.augment import OPERATIONS, make_augmentation
from condense.benchmarks.speed.measure import (
    SCHEMA,
    Others,
    Parser,
    alternate,
    disturbance,
    gibibytes,
    guarded,
    positive,
    random_images,
    write,
)
from condense.device import pick_device
from condense.formatting import aligned
from condense.judge import environment
from condense.labels import HardLabels
from condense.training import FixedSource, Student, TrainConfig, prefers_stacked, train

TOGETHER, APART = "together", "one by one"


def make(
    network: str, count: int, ipc: int, shape: tuple[int, int, int], classes: int, device: torch.device
) -> list[Student]:
    """Fresh students of random images, ``ipc`` of each class; all of them learn from the same set."""
    labels = HardLabels(torch.arange(classes, device=device).repeat_interleave(ipc), classes)
    source = FixedSource(random_images(ipc * classes, shape, "images").to(device), labels)
    students = []
    for k in range(count):
        with rng.seeded("student", k):
            students.append(Student(networks.build_network(network, shape, classes), source, rng.key("run", k)))
    return students


def recipe(steps: int, mirror: bool = True) -> TrainConfig:
    """The protocol dc-v1's recipe with another number of steps."""
    augment = make_augmentation("_".join(OPERATIONS), mirror=mirror)
    return TrainConfig(steps, batch=256, lr=0.01, momentum=0.9, weight_decay=5e-4, augment=augment)


def compare(
    network: str,
    count: int,
    ipc: int,
    shape: tuple[int, int, int],
    classes: int,
    device: torch.device,
    precision: str,
    steps: int,
    pairs: int,
) -> dict[str, Any]:
    """Seconds for ``steps`` steps of ``count`` students, one by one and together in turn, and the ratio.

    A few steps of each way go first, uncounted. On CUDA also the peak of
    allocated device bytes of each way.
    """
    students = make(network, count, ipc, shape, classes, device)
    peaks: dict[str, int] = {}

    def trained(name: str, steps: int) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        train(students, recipe(steps), device=device, precision=precision, together=name == TOGETHER)
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device)

    for name in (APART, TOGETHER):
        trained(name, min(steps, 3))
    others = Others()
    timed = alternate(lambda: trained(APART, steps), lambda: trained(TOGETHER, steps), pairs, device)
    share = others.share()
    chosen = TOGETHER if prefers_stacked(device) else APART
    facts = {"device_peak_memory": peaks, "steps": steps, "product_chooses": chosen, "others_share": share}
    return {**timed.summary(APART, TOGETHER), **facts}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options, measures, prints a table and exits."""
    guarded(_compare, arguments)


def _compare(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.speed.students", description=__doc__)
    parser.add_argument("--network", default="convnet-d3-w128-in")
    parser.add_argument("--count", type=positive, default=5, help="students")
    parser.add_argument("--ipc", type=positive, default=10)
    parser.add_argument("--classes", type=positive, default=10)
    parser.add_argument("--size", type=positive, default=32, help="height and width of the images")
    parser.add_argument("--channels", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=10, help="SGD steps of each student in one measurement")
    parser.add_argument("--pairs", type=positive, default=3, help="measurements of each way")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options: argparse.Namespace = parser.parse_args(arguments)
    device = pick_device(options.device)
    shape = (options.channels, options.size, options.size)
    compute = networks.calibrate(options.precision, device, options.network, shape, options.classes)
    precision = compute.precision
    with networks.memory_format(compute.format):
        result = compare(
            options.network,
            options.count,
            options.ipc,
            shape,
            options.classes,
            device,
            precision,
            options.steps,
            options.pairs,
        )
    record = {
        "schema": SCHEMA,
        "benchmark": "students",
        "network": options.network,
        "count": options.count,
        "ipc": options.ipc,
        "classes": options.classes,
        "shape": list(shape),
        **result,
        "environment": environment(device, precision),
    }
    print(format_report(record))
    if options.json:
        write(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def format_report(record: dict[str, Any]) -> str:
    environment, size = record["environment"], "x".join(map(str, record["shape"]))
    rows = [["students", "median seconds", "peak on the device"]]
    for name, seconds in record["median_seconds"].items():
        rows.append([name, f"{seconds:.3f}", gibibytes(record["device_peak_memory"].get(name))])
    return "\n".join(
        [
            f"{record['count']} students {record['network']}, {record['steps']} steps each; random images {size}, "
            f"ipc {record['ipc']}, {record['classes']} classes; {environment['precision']} on {environment['device']}",
            aligned(rows if record["device_peak_memory"] else [row[:-1] for row in rows]),
            f"one by one / together, median of {len(record['ratios'])} pairs: {record['ratio']:.2f}; "
            f"on this device the product trains them {record['product_chooses']}",
            *disturbance(record["others_share"]),
        ]
    )


if __name__ == "__main__":
    main()
