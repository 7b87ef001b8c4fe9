"""``python -m condense.benchmarks.damage``: what the toolkit does with damaged files.

Makes one file of every kind, damages copies of it at random places, and opens each copy in a child process with a time
limit. A damage flips bits, cuts the end, zeroes a range, copies a range over another one, or inserts it there. Printed
are, for each kind, the numbers of copies that were

* refused with one line, or replaced as a damaged cache file is,
* accepted with the same content, because the damaged bytes mean nothing,
* accepted with other content, which must not happen,
* answered by an exception of another type than ``CondenseError``, which must not happen,
* not answered within the time limit, or answered by a crash, which must not happen.

Records, suites and recipes are text that people write and change. They have no checksum, so that other content is
counted for them but is no failure.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense import api, exchange, rng
from condense.augment import ViewRule
from condense.benchmarks import suite
from condense.benchmarks.child import HANG_OR_CRASH, ChildProcess
from condense.config import load_recipe
from condense.data import Task
from condense.errors import CondenseError
from condense.files import read_state, tensors_sha256, write_json
from condense.judge import records
from condense.labels import (
    DistanceLabels,
    FeatureLabels,
    HardLabels,
    Int8TeacherLabels,
    Labels,
    LowRankLabels,
    PerViewLabels,
    PoolLabels,
    SoftLabels,
    StaticLabels,
    TeacherLabels,
    TopKLabels,
    resumable_logits,
)
from condense.networks import build_network, read_teacher_file
from condense.pretraining import read_trajectory_file
from condense.selection import read_score_table
from condense.sets import DistilledSet
from condense.tracking import Progress

SECONDS = 30.0
"""Time limit for opening one file, when the machine is busy. Opening takes milliseconds."""

NETWORK = "convnet-d2-w8-bn"

CLASSES, IMAGES, EPOCHS = 10, 10, 4
"""Number of classes, of images and of labelled epochs of the sets."""

OUTCOMES = ("refused", "same content", "other content", "exception", HANG_OR_CRASH)


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    make: Callable[[Path], Path]
    """Writes the file into an empty folder and returns its path."""
    read: Callable[[Path], str]
    """Opens the file, reads all of its content and returns a digest of it."""
    is_text: bool = False
    """Whether people write such files, so that they have no checksum."""


# -- the files --------------------------------------------------------------------------------------------------------


def random_tensor(*shape: int) -> Tensor:
    """Gaussian values, the same in every call."""
    return torch.randn(*shape, generator=rng.generator("damage", *shape))


def make_labels(kind: str) -> Labels:
    """Labels of this kind for the images of :func:`make_set`."""
    hard = torch.arange(CLASSES)
    per_view = PerViewLabels(random_tensor(EPOCHS, IMAGES, CLASSES), 0, ViewRule(mix="cutmix"), hard=hard)
    if kind in ("teacher", "teacher-int8"):
        with rng.seeded("damage"):
            teacher = build_network(NETWORK, (1, 8, 8), CLASSES)
        make = TeacherLabels if kind == "teacher" else Int8TeacherLabels
        return make(teacher, IMAGES, 0, names=[NETWORK], shape=(1, 8, 8))
    made: dict[str, Callable[[], Labels]] = {
        "hard": lambda: HardLabels(hard, CLASSES),
        "soft": lambda: SoftLabels(random_tensor(IMAGES, CLASSES)),
        "features": lambda: FeatureLabels(random_tensor(IMAGES, 7)),
        "static": lambda: StaticLabels(random_tensor(IMAGES, CLASSES), 0),
        "per-view": lambda: per_view,
        "distances": lambda: DistanceLabels(random_tensor(EPOCHS, IMAGES, 2).abs(), hard, CLASSES, 0),
        "lowrank": lambda: LowRankLabels.of(per_view, 3),
        "topk": lambda: TopKLabels.of(per_view, 3),
        "pool": lambda: PoolLabels.pruned(per_view, 2),
    }
    return made[kind]()


def make_set(folder: Path, label_kind: str) -> Path:
    """A set of random images with labels of this kind."""
    task = api.task("digits")
    manifest = {
        "name": "digits/dm-ipc1",
        "dataset": "digits",
        "classes": list(task.classes),
        "ipc": 1,
        "space": "training",
        "decode": [],
        "method": "dm",
        "network": NETWORK,
        "seed": 0,
        "data": {"fingerprint": task.fingerprint, "options": dataclasses.asdict(task.options)},
        "cost": {"seconds": 1.0},
    }
    made = DistilledSet(random_tensor(IMAGES, 1, 8, 8), make_labels(label_kind), task.transform, manifest)
    return made.save(folder / "set.h5")


def make_earlier_set(folder: Path) -> Path:
    """A set as earlier versions wrote it: without a digest of the file, and with attributes of variable length."""
    import h5py

    path = make_set(folder, "soft")
    earlier = path.with_name("earlier.h5")
    with h5py.File(path) as source, h5py.File(earlier, "w", libver=("v110", "v110")) as file:
        for name, value in source.attrs.items():
            is_text = name in ("format", "manifest_sha256")
            file.attrs[name] = value.decode() if is_text else value
        for name in source:
            source.copy(name, file)
    path.unlink()
    return earlier


def read_set(path: Path) -> str:
    """Digest of a set."""
    distilled = DistilledSet.load(path)
    return digest(distilled.sha256(), distilled.manifest)


def make_experts(folder: Path) -> Path:
    """Two experts."""
    api.experts(small_task(), network="convnet-d2-w8-in", count=2, epochs=2, out=folder / "experts.h5")
    return folder / "experts.h5"


def read_experts(path: Path) -> str:
    """Digest of experts, all of which are verified."""
    file = read_trajectory_file(path)
    file.verify(range(file.count), range(file.epochs + 1))
    return digest(file.manifest, file.values.tobytes().hex())


def make_teachers(folder: Path) -> Path:
    """Two teachers."""
    options: dict[str, Any] = {"count": 2, "epochs": 1}
    api.teachers(small_task(), networks=NETWORK, out=folder / "teachers.h5", **options)
    return folder / "teachers.h5"


def read_teachers(path: Path) -> str:
    """Digest of teachers, all of which are verified."""
    file = read_teacher_file(path)
    return digest(file.manifest, *(tensors_sha256(file.load_state(k)) for k in range(len(file.entries))))


def make_scores(folder: Path) -> Path:
    """A table of scores."""
    api.scores(small_task(), network="convnet-d1-w4-in", out=folder / "scores.h5", score_epochs=2)
    return folder / "scores.h5"


def read_scores(path: Path) -> str:
    """Digest of a table of scores."""
    table = read_score_table(path)
    return digest(table.manifest, tensors_sha256({**table.columns, "neighbours": table.neighbours}))


def small_task() -> Task:
    """A few images of two classes."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(20) % 2
    return api.task((images, labels, images, labels), name="small")


def make_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run: tensors, numbers and text."""
    state = {"config_key": "x", "step": 7, "images": random_tensor(10, 1, 8, 8), "kept": {"w": random_tensor(50)}}
    torch.save(state, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def read_checkpoint(path: Path) -> str:
    """Digest of a checkpoint."""
    state = read_state(path)
    if state is None:
        raise CondenseError(f"{path}: damaged")
    tensors = {"images": state.pop("images"), **state.pop("kept")}
    return digest(tensors_sha256(tensors), state)


def make_pt(folder: Path) -> Path:
    """A ``.pt`` file of a third party."""
    images, labels = random_tensor(10, 1, 8, 8), torch.arange(10)
    torch.save({"data": [[images, labels]], "accs_all_exps": {}}, folder / "res.pt")
    return folder / "res.pt"


def read_pt(path: Path) -> str:
    """Digest of an imported set."""
    return exchange.import_set(path, "dc", "digits").sha256()


def make_image_cache(folder: Path, name: str) -> Path:
    """The cache of an image folder, of which the file ``name`` will be damaged."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (folder / "images" / part / label).mkdir(parents=True)
            for number in range(4):
                pixels = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8))
                pixels.save(folder / "images" / part / label / f"{number}.png")
    read_image_cache(folder / "cache" / "x" / "x" / "x")
    (path,) = (folder / "cache").rglob(name)
    return path


def read_image_cache(path: Path) -> str:
    """Digest of the task, which is read from the cache or decoded again."""
    cache = path.parents[2]
    before = os.environ.get("CONDENSE_CACHE")
    os.environ["CONDENSE_CACHE"] = str(cache)
    try:
        task = api.task(str(cache.parent / "images"))
    finally:
        os.environ.pop("CONDENSE_CACHE")
        os.environ |= {} if before is None else {"CONDENSE_CACHE": before}
    pixels = [np.asarray(split.images).tobytes().hex() for split in (task.train, task.test)]
    numbers = [array.tolist() for array in task.transform.arrays().values()]
    return digest(task.fingerprint, *pixels, numbers)


def make_view_labels(folder: Path) -> Path:
    """Logits of views, of which half of the epochs are labelled."""
    with view_labels(folder) as where:
        for epoch in range(EPOCHS // 2):
            where["into"][epoch] = random_tensor(IMAGES, CLASSES).numpy()
            where["into"].flush()
            where["report"](epoch + 1)
    return folder / "labels.npy"


def view_labels(folder: Path) -> contextlib.AbstractContextManager[dict[str, Any]]:
    """The files in which labelling continues."""
    return resumable_logits(folder / "labels.npy", folder / "labels.json", ["key"], (EPOCHS, IMAGES, CLASSES))


def read_view_labels(path: Path) -> str:
    """Digest of the labelled epochs; labelling continues after them."""
    with view_labels(path.parent) as where:
        if where["start"] < EPOCHS // 2:
            raise CondenseError(f"{path}: damaged; labelling starts again at epoch {where['start']}")
        return digest(where["start"], np.array(where["into"][: where["start"]]).tobytes().hex())


def make_record(folder: Path) -> Path:
    """A record of an evaluation."""
    results = importlib.resources.files("condense.benchmarks") / "results"
    texts = {entry.name: entry.read_text() for entry in results.iterdir() if entry.name.endswith(".json")}
    (folder / "record.json").write_text(texts[min(texts)])
    return folder / "record.json"


def read_text_record(path: Path) -> str:
    """Digest of a record."""
    return digest(records.read_record(path))


def make_suite(folder: Path) -> Path:
    """A suite."""
    text = (importlib.resources.files("condense.benchmarks") / "suites" / "small.yaml").read_text()
    (folder / "suite.yaml").write_text(text)
    return folder / "suite.yaml"


def read_suite(path: Path) -> str:
    """Digest of a suite."""
    return digest(str(suite.get_suite(str(path))))


def make_recipe(folder: Path) -> Path:
    """A recipe."""
    (folder / "recipe.yaml").write_text("method: dm\ndata: digits\nipc: 10\nsteps: 100\nlr_img: 0.5\naugment: color\n")
    return folder / "recipe.yaml"


def read_recipe(path: Path) -> str:
    """Digest of a recipe."""
    return digest(load_recipe(str(path)))


def digest(*values: Any) -> str:
    """SHA-256 of values that JSON can hold; others as text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _set_kind(label_kind: str) -> Kind:
    return Kind(lambda folder: make_set(folder, label_kind), read_set)


def _cache_kind(name: str) -> Kind:
    return Kind(lambda folder: make_image_cache(folder, name), read_image_cache)


LABEL_KINDS = (
    "hard",
    "soft",
    "features",
    "static",
    "per-view",
    "distances",
    "lowrank",
    "topk",
    "pool",
    "teacher",
    "teacher-int8",
)

KINDS: dict[str, Kind] = {
    **{f"set-{label_kind}": _set_kind(label_kind) for label_kind in LABEL_KINDS},
    "set-earlier": Kind(make_earlier_set, read_set),
    "experts": Kind(make_experts, read_experts),
    "teachers": Kind(make_teachers, read_teachers),
    "scores": Kind(make_scores, read_scores),
    "checkpoint": Kind(make_checkpoint, read_checkpoint),
    "imported-pt": Kind(make_pt, read_pt),
    "cached-images": _cache_kind("train.npy"),
    "cached-facts": _cache_kind("meta.json"),
    "view-labels": Kind(make_view_labels, read_view_labels),
    "record": Kind(make_record, read_text_record, is_text=True),
    "suite": Kind(make_suite, read_suite, is_text=True),
    "recipe": Kind(make_recipe, read_recipe, is_text=True),
}

# -- the damages ------------------------------------------------------------------------------------------------------


def damaged(content: bytes, generator: np.random.Generator) -> tuple[bytes, str]:
    """Returns a damaged copy and what was done to it."""
    while True:
        kind = ("flip", "cut", "zero", "copy", "insert")[int(generator.integers(5))]
        start = int(generator.integers(len(content)))
        length = int(min(2 ** generator.uniform(0, 13), len(content) - start))
        source = int(generator.integers(len(content) - length + 1))
        copied = content[source : source + length]
        if kind == "flip":
            changed = bytearray(content)
            for position in generator.integers(len(content), size=int(generator.integers(1, 5))).tolist():
                changed[position] ^= 1 << int(generator.integers(8))
            result = bytes(changed)
        elif kind == "cut":
            result = content[:start]
        elif kind == "zero":
            result = content[:start] + bytes(length) + content[start + length :]
        elif kind == "copy":
            result = content[:start] + copied + content[start + length :]
        else:
            result = content[:start] + copied + content[start:]
        if result != content:
            return result, f"{kind} at {start}, {length} bytes"


# -- the measurement --------------------------------------------------------------------------------------------------


def _serve(connection: Any) -> None:
    """Child process: opens the files that it is asked for and answers with an outcome and a digest or a message."""
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    while (request := connection.recv()) is not None:
        kind, path = request
        try:
            answer = ("accepted", KINDS[kind].read(Path(path)))
        except CondenseError as fault:
            answer = ("refused", str(fault)) if "\n" not in str(fault) else ("exception", f"several lines: {fault}")
        except Exception as fault:  # what this script looks for
            answer = ("exception", f"{type(fault).__name__}: {fault}")
        connection.send(answer)


def measure(
    kinds: Sequence[str], count: int, seed: int, seconds: float = SECONDS, quiet: bool = False
) -> tuple[dict[str, collections.Counter[str]], list[str], float]:
    """Damages ``count`` copies of a file of each kind.

    Args:
        kinds: Names in :data:`KINDS`.
        count: Number of damages of each kind.
        seed: Of the damages.
        seconds: Time limit for opening one file.
        quiet: Whether to hide the progress bar.

    Returns:
        The number of each outcome by kind, one line for each failure, and the longest time that opening took, in
        seconds.
    """
    outcomes: dict[str, collections.Counter[str]] = {}
    failures, longest = [], 0.0
    with (
        tempfile.TemporaryDirectory() as root,
        contextlib.closing(ChildProcess(_serve, seconds=seconds, daemon=True)) as child,
    ):
        for kind in kinds:
            path = make_in(Path(root) / str(len(outcomes)), kind)
            outcomes[kind] = collections.Counter()
            generator = np.random.default_rng([seed, *kind.encode()])
            siblings = {sibling: sibling.read_bytes() for sibling in path.parent.iterdir() if sibling.is_file()}
            status, expected = child.ask((kind, str(path)))
            if status != "accepted":
                raise CondenseError(f"{kind}: the undamaged file is not accepted: {expected}")
            progress = Progress(kind, count, quiet=quiet)
            for number in range(count):
                content, what = damaged(siblings[path], generator)
                for sibling, original in siblings.items():  # a reader may replace what it finds damaged
                    sibling.write_bytes(content if sibling == path else original)
                began = time.monotonic()
                status, text = child.ask((kind, str(path)))
                longest = max(longest, time.monotonic() - began)
                if status == "accepted":
                    status = "same content" if text == expected else "other content"
                outcomes[kind][status] += 1
                if status in failing_outcomes(kind):
                    failures.append(f"{kind}, damage {number} ({what}): {status}: {text[:200]}")
                progress.update(number + 1)
            progress.close()
    return outcomes, failures, longest


def failing_outcomes(kind: str) -> tuple[str, ...]:
    """The outcomes that must not happen."""
    return OUTCOMES[3:] if KINDS[kind].is_text else OUTCOMES[2:]


def make_in(folder: Path, kind: str) -> Path:
    """Makes a file of this kind in a new folder."""
    folder.mkdir(parents=True)
    return KINDS[kind].make(folder)


def table(outcomes: dict[str, collections.Counter[str]]) -> Iterator[str]:
    """Lines of a table with a row for each kind."""
    width = max(len(kind) for kind in (*outcomes, "kind"))
    yield "  ".join([f"{'kind':{width}}", *OUTCOMES])
    for kind, counts in outcomes.items():
        yield "  ".join([f"{kind:{width}}", *(f"{counts[outcome]:{len(outcome)}}" for outcome in OUTCOMES)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m condense.benchmarks.damage", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="damages of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="by default all")
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    given = parser.parse_args(arguments)
    kinds = given.kinds.split(",")
    for kind in kinds:
        if kind not in KINDS:
            parser.error(f"--kinds {kind}: unknown; known: {', '.join(KINDS)}")
    outcomes, failures, longest = measure(kinds, given.count, given.seed)
    print("\n".join([*table(outcomes), *failures, f"longest: {longest:.2f} s; {len(failures)} failures"]))
    if given.json:
        write_json(given.json, {"count": given.count, "seed": given.seed, "outcomes": outcomes, "longest": longest})
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
