"""Exports distilled sets to third-party formats. The decoded images are written, atomically."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense.data import Standardise, to_unit_range
from condense.errors import CondenseError, did_you_mean
from condense.exchange.shared import folder_name, given_standardise, library
from condense.files import atomic_folder, atomic_write, check_writable
from condense.formatting import by
from condense.labels import HardLabels
from condense.sets import DistilledSet, decode

FORMS = ("imagefolder", "pt", "safetensors", "hf")
"""Formats of ``condense export --to``."""

SET_FILE = "set.h5"
"""Name of the set in a folder of ``hf``."""

MARKER = ".condense-export"
"""Empty file in every exported folder; folders without it are never replaced."""


@dataclass(frozen=True)
class Rounding:
    """Rounding of the images to 8 bits. Errors include clipping and are in units of 1/255."""

    rounded: DistilledSet
    """The set with the pixels that were written."""
    clipped: float
    """Share of pixel values outside [0,1]."""
    mean: float
    """Mean error of a pixel value."""
    largest: float
    """Largest error of a pixel value."""


def export_set(
    distilled: DistilledSet,
    destination: str | Path,
    form: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    force: bool = False,
) -> Rounding | None:
    """Writes the decoded images and their labels in a third-party format, atomically.

    * ``pt``: a dict for ``torch.load(..., weights_only=True)``: ``data`` ([[images, labels]], which the DC scripts
      load), ``images`` float32 (M,C,H,W) in training space, class-sorted, ``labels`` int64 (M,) or probabilities
      (M, classes) with their ``logits``, the transform (``mean`` and ``std``; ZCA: ``mean``, ``matrix``, ``inverse``),
      ``lr`` if one was learned, ``classes``, ``manifest`` (JSON).
    * ``safetensors``: the same tensors; classes and manifest as metadata.
    * ``imagefolder``: ``<class>/NNN.png``, 8 bits of pixel space. Hard labels only.
    * ``hf``: a folder for ``datasets.load_dataset``: ``data/*.parquet`` with ``image`` (PNG), ``label`` and, unless the
      set stores uint8 images, ``array`` (float32, training space), a dataset card, and the set itself as ``set.h5``.

    Args:
        mean: per channel; with ``std``, images of ``pt`` and ``safetensors`` are normalised by these constants of the
            program that will read them, instead of those of the set.
        std: see ``mean``.

    Returns:
        The rounding to 8 bits for ``imagefolder``, otherwise None.

    Raises:
        CondenseError: the format cannot store the labels or channels, a library is missing, or the destination cannot
            be written.
    """
    path = Path(destination)
    if form not in FORMS:
        raise CondenseError(f"--to {form}: unknown{did_you_mean(form, FORMS)}")
    transform = given_standardise(mean, std)
    if transform is not None and form not in ("pt", "safetensors"):
        raise CondenseError(f"--mean and --std go with --to pt and safetensors; --to {form} holds pixels")
    if transform is not None and len(transform.mean) != distilled.shape[0]:
        raise CondenseError(f"--mean, --std: {len(transform.mean)} numbers for images of {distilled.shape[0]} channels")
    if distilled.labels.per_view:
        raise CondenseError(
            f"{distilled.name} has {distilled.labels.kind} labels, which belong to augmented views, not to images; "
            "no other format holds them: share the .h5 file"
        )
    size = 4 * len(distilled) * math.prod(distilled.shape) + distilled.nbytes()["total"]
    if form in ("pt", "safetensors"):
        check_writable(path, force=force, size=size)
        safetensors = library("safetensors.torch", "--to safetensors") if form == "safetensors" else None
        tensors, classes = _tensors(distilled, transform), list(distilled.classes)
        manifest = json.dumps(distilled.manifest, sort_keys=True)
        with atomic_write(path) as temporary:
            if safetensors is not None:
                metadata = {"format": "pt", "classes": json.dumps(classes), "manifest": manifest}
                temporary.write_bytes(safetensors.save(tensors, metadata))
                written = safetensors.load_file(temporary)
            else:
                data = [[tensors["images"], tensors["labels"]]]
                torch.save({"data": data, **tensors, "classes": classes, "manifest": manifest}, temporary)
                written = torch.load(temporary, weights_only=True)
            _check_written(path, {name: torch.equal(written[name], tensor) for name, tensor in tensors.items()})
        return None
    if distilled.shape[0] not in (1, 3):
        raise CondenseError(f"--to {form}: a PNG has 1 or 3 channels, not {distilled.shape[0]}; take --to pt")
    if form == "imagefolder" and not distilled.labels.is_hard:
        raise CondenseError(f"--to imagefolder: folders cannot hold {distilled.labels.kind} labels; take --to pt")
    _check_folder(path, force=force, size=size)
    if form == "hf":
        datasets = library("datasets", "--to hf")
        with _exporting(path) as temporary:
            _check_written(path, _write_hf(distilled, temporary, datasets))
        return None
    rounding = eight_bits(distilled)
    with _exporting(path) as temporary:
        _check_written(path, _write_folder(rounding.rounded, temporary))
    return rounding


def _check_written(destination: Path, same: Mapping[str, bool]) -> None:
    """Checks what was read back from an export: for each part, whether it is what was to be written.

    Raises:
        CondenseError: a part differs.
    """
    for part, is_same in same.items():
        if not is_same:
            raise CondenseError(f"{destination}: not written, because its {part} could not be read back")


def eight_bits(distilled: DistilledSet) -> Rounding:
    """Rounds the decoded images to 8 bits, in their order, and measures the error of rounding and clipping."""
    pixels = _pixels(distilled)
    stored = (pixels.clamp(0, 1) * 255).round()
    error = (stored - pixels * 255).abs()
    classes = distilled.labels.targets(distilled.training_images()[1])
    entries = {
        key: value for key, value in distilled.manifest.items() if key not in ("bytes", "checksums", "resampling")
    }
    manifest = {**entries, "space": "pixel", "decode": [], "ipc": len(pixels) // len(distilled.classes)}
    labels = HardLabels(classes, len(distilled.classes))
    rounded = DistilledSet(stored.byte(), labels, distilled.transform, manifest)
    outside = ((pixels < 0) | (pixels > 1)).float().mean()
    return Rounding(rounded, float(outside), float(error.mean()), float(error.max()))


def _sort_by_class(distilled: DistilledSet) -> tuple[Tensor, Tensor, Tensor]:
    """Training images (M,C,H,W), their stored indices (M,), and the order (M,) that sorts them by class."""
    images, ids = distilled.training_images()
    order = ids.argsort(stable=True)  # images decoded from the same stored image stay together
    if distilled.labels.is_hard:
        order = order[distilled.labels.targets(ids[order]).argsort(stable=True)]
    return images, ids, order


def _tensors(distilled: DistilledSet, transform: Standardise | None) -> dict[str, Tensor]:
    """Images, labels, learned rate and transform, by name; ``transform`` replaces that of the set."""
    images, ids, order = _sort_by_class(distilled)
    if transform is not None:
        images = transform(_pixels(distilled))
    tensors = {"images": images[order].detach().float().cpu(), "labels": distilled.labels.targets(ids[order]).cpu()}
    tensors |= distilled.labels.export_tensors(ids[order])
    if distilled.manifest.get("learned_lr") is not None:
        tensors["lr"] = torch.tensor(distilled.manifest["learned_lr"], dtype=torch.float64)
    arrays = {name: torch.from_numpy(array) for name, array in (transform or distilled.transform).arrays().items()}
    return {name: tensor.contiguous() for name, tensor in {**tensors, **arrays}.items()}


def _pixels(distilled: DistilledSet) -> Tensor:
    """Decoded images (M,C,H,W) in pixel space, float32. Pixels stored there are not transformed, which is exact."""
    if distilled.manifest["space"] != "pixel":
        return distilled.transform.inverse(distilled.training_images()[0])
    return decode(to_unit_range(distilled.stored), distilled.stages)[0]


def _write_folder(rounded: DistilledSet, folder: Path) -> dict[str, bool]:
    """Writes ``<class>/NNN.png``; for each file, whether its pixels were read back."""
    same: dict[str, bool] = {}
    _, ids, order = _sort_by_class(rounded)
    classes = rounded.labels.targets(ids[order])
    width = max(3, len(str(len(order))))
    for number, name in enumerate(rounded.classes):
        class_folder = folder / folder_name(name)
        class_folder.mkdir()
        for position, row in enumerate(order[classes == number].tolist()):
            file = class_folder / f"{position:0{width}}.png"
            file.write_bytes(_png(rounded.stored[row]))
            same[f"{class_folder.name}/{file.name}"] = _is_png_of(file.read_bytes(), rounded.stored[row])
    return same


def _png(image: Tensor) -> bytes:
    """Encodes uint8 (1,H,W) or (3,H,W) as PNG."""
    from PIL import Image

    array = image.cpu().numpy()
    picture = array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _is_png_of(content: bytes, image: Tensor) -> bool:
    """Whether a PNG decodes to uint8 (1,H,W) or (3,H,W)."""
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(content)))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.array_equal(pixels, image.cpu().numpy())


def _write_hf(distilled: DistilledSet, folder: Path, datasets: Any) -> dict[str, bool]:
    """Writes parquet, dataset card and set; for the images and labels of the table, whether they were read back."""
    from pyarrow import parquet  # a dependency of datasets

    images, ids, order = _sort_by_class(distilled)
    stored = (_pixels(distilled)[order].clamp(0, 1) * 255).round().byte()
    targets = distilled.labels.targets(ids[order]).cpu()
    hard = not targets.is_floating_point()
    exact = distilled.stored.dtype == torch.uint8 and not distilled.stages
    columns: dict[str, Any] = {
        "image": [{"bytes": _png(image), "path": None} for image in stored],
        "label": targets.numpy() if hard else list(targets.numpy()),
    }
    features: dict[str, Any] = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(distilled.classes))
        if hard
        else datasets.Sequence(datasets.Value("float32"), length=targets.shape[1]),
    }
    if not exact:
        columns["array"] = list(images[order].float().cpu().numpy())
        features["array"] = datasets.Array3D(distilled.shape, "float32")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    file = folder / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    with open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):  # hides a progress bar
        table.to_parquet(str(file))
    distilled.save(folder / SET_FILE)
    (folder / "README.md").write_text(_card(distilled, exact, hard), encoding="utf-8")
    written = parquet.read_table(file, columns=["image", "label"])
    pictures = written["image"].to_pylist()
    return {
        "images": len(pictures) == len(stored)
        and all(_is_png_of(picture["bytes"], image) for picture, image in zip(pictures, stored)),
        "labels": torch.equal(torch.tensor(written["label"].to_pylist(), dtype=targets.dtype), targets),
    }


def _card(distilled: DistilledSet, exact: bool, hard: bool) -> str:
    """The dataset card: YAML for the hub, then the columns of the data, their use and their origin."""
    import yaml

    manifest, count = distilled.manifest, len(distilled)
    sizes = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (math.inf, "100K<n<1M"))
    front = {
        "pretty_name": distilled.name,
        "task_categories": ["image-classification"],
        "size_categories": [next(name for limit, name in sizes if count < limit)],
        "tags": ["dataset-distillation", "condense"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    rows = [
        "| `image` | PNG of the pixels, " + ("exact |" if exact else "clipped to [0,1] and rounded to 8 bits |"),
        f"| `label` | {'class' if hard else 'features' if distilled.labels.outputs else 'probability of each class'} |",
    ]
    if not exact:
        shape = ", ".join(map(str, distilled.shape))
        rows.append(f"| `array` | float32 ({shape}) in training space: what networks are trained on, exact |")
    rows.append("| (not a column) | the map from pixels to training space, which real test images need: in `set.h5` |")
    origin = {
        key: manifest.get(key) for key in ("method", "paper", "network", "seed", "protocol", "imported", "command")
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in origin.items()}
    origin_lines = [f"- {key}: {text}" for key, text in texts.items() if origin[key] is not None]
    printed = json.dumps(
        {key: value for key, value in manifest.items() if key != "checksums"}, indent=1, sort_keys=True
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {distilled.name}",
            "",
            f"{count} distilled training images ({by(distilled.shape)}, {len(distilled.classes)} classes) that "
            f"stand for the data set `{manifest['dataset']}`.",
            "",
            "| column | content |",
            "|---|---|",
            *rows,
            "",
            "## Use",
            "",
            "```python",
            "import condense",
            "",
            f'distilled = condense.load("{SET_FILE}")  # the file in this folder: checked, nothing lost',
            f'network = condense.fit(distilled, "{manifest["network"]}")',
            "scores = network(distilled.transform(images))  # real images in [0,1]",
            "```",
            "",
            f"To judge it: `condense evaluate {SET_FILE} --data {manifest['dataset']}`. Without condense: "
            '`datasets.load_dataset("this folder")`.',
            "",
            "## How it was made",
            "",
            *origin_lines,
            "",
            "<details><summary>Manifest</summary>",
            "",
            "```json",
            printed,
            "```",
            "",
            "</details>",
            "",
        ]
    )


def _check_folder(folder: Path, *, force: bool, size: int) -> None:
    """Checks that a folder can be written.

    Raises:
        CondenseError: it cannot, it is not empty (without ``force``), or no export wrote it.
    """
    if folder.exists() and not folder.is_dir():
        raise CondenseError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not force:
            raise CondenseError(f"{folder} exists; choose another name or give --force")
        if not (folder / MARKER).is_file():
            raise CondenseError(f"{folder} is not empty and no export wrote it; choose another folder")
    check_writable(folder.absolute() / MARKER, force=True, size=size)


@contextlib.contextmanager
def _exporting(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder with our marker that replaces ``folder`` when the block succeeds."""
    with atomic_folder(folder) as temporary:
        (temporary / MARKER).touch()
        yield temporary
