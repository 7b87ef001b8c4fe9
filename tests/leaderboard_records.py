"""Records as the evaluation writes them, made up: for tests of the leaderboard."""

import json
import struct
import zlib
from pathlib import Path

from condense.judge import compute_scores, cross_architecture, summary, time_to_accuracy

OWN = "convnet-d3-w128-in"


def entry(arm, accuracy, network=OWN, *, labels="own", runs=3, seconds=180.0, steps=1000):
    """One entry of a record's results; the runs spread by a point around ``accuracy``."""
    values = [round(accuracy + 0.01 * (k - (runs - 1) / 2), 4) for k in range(runs)]
    return {"arm": arm, "labels": labels, "augment": True, "network": network, "steps": steps, "lr": 0.01,
            "lr_from": "protocol", "accuracies": values, **summary(values), "seconds": seconds * runs}  # fmt: skip


def record(
    method="dm", dataset="cifar10", ipc=10, *, accuracy=0.49, random=0.26, full=None, extra=(), networks=(OWN,),
    own=OWN, protocol="dc-v1", version=1, label_kind="hard", images=None, label_bytes=0, made=480.0, seed=0,
    runs=3, train=60.0, command="condense distill ...", name=None, fingerprint="00" * 32,
):  # fmt: skip
    """A record; every unseen network loses five points.

    Args:
        random, full: accuracies of these arms, None without them.
        extra: further arms as (arm, labels, accuracy).
        made: seconds that the set cost, None where unknown.
    """
    results = []
    for network in networks:
        loss = 0.0 if network == own else 0.05
        results.append(entry("distilled", accuracy - loss, network, runs=runs, seconds=train))
        if random is not None:
            results.append(entry("random", random - loss, network, runs=runs, seconds=train))
        if full is not None:
            results.append(
                entry("full", full - loss, network, labels="hard", runs=runs, seconds=30 * train, steps=12000)
            )
        for arm, labels, value in extra:
            results.append(entry(arm, value - loss, network, labels=labels, runs=runs, seconds=train))
    images = images or 10 * ipc * 3072 * 4
    parts = {"images": images, "labels": label_bytes, "auxiliary": 24, "external": 0}
    cost = {} if made is None else {"seconds": made, "preparation_seconds": 0.0, "device": "test CPU"}
    return {
        "schema": "condense.record/1",
        "set": {
            "name": name or f"{dataset}/{method}-ipc{ipc}", "sha256": "ab" * 32, "method": method, "dataset": dataset,
            "ipc": ipc, "seed": seed, "label_kind": label_kind, "network": own,
            "bytes": {**parts, "total": sum(parts.values())}, "command": command,
        },
        "data": {"name": dataset, "fingerprint": fingerprint, "same": True},
        "protocol": {"name": protocol, "version": version, "labels": "hard" if label_kind == "hard" else "soft"},
        "runs": runs,
        "seed": 0,
        "results": results,
        "missing": [],
        "scores": compute_scores(results, label_kind),
        "cross_architecture": cross_architecture(results, own),
        "time": time_to_accuracy(results, cost),
        "cost": cost,
        "environment": {
            "condense": "0.2.0", "torch": "2.9.0", "python": "3.12.1", "platform": "Linux x86_64",
            "device": "test CPU", "threads": 2, "precision": "bf16", "tf32": False, "peak_memory": {"host": 1},
        },
        "command": f"condense evaluate {method}.h5 --data {dataset} --protocol {protocol}",
    }  # fmt: skip


def write(folder: Path, stem, content, picture=True):
    """``STEM.json`` and perhaps ``STEM.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    if picture:
        (folder / f"{stem}.png").write_bytes(png())


def png(width=72, height=72):
    """A grey picture with a pattern."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes((x * y) % 251 for x in range(width)) for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sample(folder: Path):
    """A folder of records over two datasets, as varied as they come."""
    two = (OWN, "resnet18-bn")
    random = {"cifar10": {1: 0.144, 10: 0.26, 50: 0.434}, "cifar100": {1: 0.042, 10: 0.146}}
    dm = {"cifar10": {1: 0.26, 10: 0.489, 50: 0.63}, "cifar100": {1: 0.114, 10: 0.297}}
    for dataset, cells in dm.items():
        full = {"cifar10": 0.848, "cifar100": 0.562}[dataset]
        for ipc, accuracy in cells.items():
            write(folder, f"{dataset}-dm-ipc{ipc}", record(
                "dm", dataset, ipc, accuracy=accuracy, random=random[dataset][ipc], full=full,
                networks=two if ipc == 10 else (OWN,), made=60 + 40 * ipc, runs=5,
                images=10 * ipc * 12288 * (10 if dataset == "cifar100" else 1),
                extra=[("random-bytes", "hard", random[dataset][ipc] + 0.12), ("full-equal", "hard", 0.6)],
            ))  # fmt: skip
        for ipc in cells:
            write(folder, f"{dataset}-dsa-ipc{ipc}", record(
                "dsa", dataset, ipc, accuracy=cells[ipc] + (0.03 if ipc < 50 else -0.02), made=9000.0 * ipc,
                random=random[dataset][ipc], images=10 * ipc * 12288 * (10 if dataset == "cifar100" else 1),
            ), picture=ipc > 1)  # fmt: skip
    write(folder, "cifar10-mtt-ipc10", record("mtt", ipc=10, accuracy=0.653, made=60000.0, random=0.26, seed=1))
    write(folder, "cifar10-mtt-imported", record(
        "mtt", ipc=50, accuracy=0.716, made=None, random=0.434, seed=None, command=None, runs=1, images=6144000,
    ))  # fmt: skip
    write(folder, "cifar10-sre2l-ipc10", record(
        "sre2l", ipc=10, accuracy=0.293, random=0.27, own="resnet18-bn", networks=("resnet18-bn", OWN), made=2400.0,
        label_kind="per-view", label_bytes=14_000_000, images=307200, protocol="dc-soft-v1", full=0.93,
    ))  # fmt: skip
    write(
        folder, "cifar10-random-ipc10", record("random", ipc=10, accuracy=0.262, random=None, made=0.2, images=307200)
    )
