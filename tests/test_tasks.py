"""condense.data: reading DATA and serving batches of it, on tiny generated images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from condense.data import DataOptions, Split, Task, datasets, load_task
from condense.data import arrays as arrays_module
from condense.data.decoding import decode_images
from condense.data.task import Rows
from condense.errors import CondenseError
from condense.rng import Draws

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONDENSE_DATA", str(tmp_path / "data"))


def picture(*key: int | str, size: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    """Random uint8 pixels (H,W) or (H,W,C)."""
    return Draws(*key).integers(256, size).numpy().astype(np.uint8)


def folder(root: Path, per_class: int = 5, parts: tuple[str, ...] = ("train", "test"), suffix: str = "png") -> Path:
    """Writes an image folder with ``per_class`` images of each class in each part ("" for no part)."""
    for part in parts:
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for index in range(per_class):
                Image.fromarray(picture(part, name, index)).save(root / part / name / f"{index:03}.{suffix}")
    return root


def arrays(
    train: int = 12, test: int = 6, classes: int = 3, shape: tuple[int, ...] = (3, 4, 4)
) -> dict[str, np.ndarray]:
    made = {}
    for part, count in (("train", train), ("test", test)):
        made[f"{part}_images"] = picture("arrays", part, size=(count, *shape))
        made[f"{part}_labels"] = np.arange(count) % classes
    return made


# Loading -------------------------------------------------------------------------------------------------------------


def test_import_is_light_and_names_are_listed():
    heavy = "('torchvision', 'kornia', 'sklearn', 'PIL', 'h5py')"
    code = (
        "import sys, condense.data; assert len(condense.data.datasets()) == 7;"
        f"assert not [m for m in {heavy} if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert list(datasets()) == ["digits", "mnist", "fashion-mnist", "svhn", "cifar10", "cifar100", "tiny-imagenet"]
    assert all(datasets().values())


def test_digits():
    task = load_task("digits")
    assert (task.name, task.source, task.shape, task.num_classes) == ("digits", "digits", (1, 8, 8), 10)
    assert not task.mirror
    assert len(task.train) + len(task.test) == 1797
    totals = np.bincount(np.concatenate([task.train.labels, task.test.labels]))
    assert np.array_equal(totals - task.counts, (0.2 * totals + 0.5).astype(int))
    assert task.train.images.dtype == np.uint8 and task.train.images.max() == 255
    assert set(np.unique(task.train.images)) <= {round(v * 255 / 16) for v in range(17)}
    # the split and its order are part of every record: a change of either changes this
    assert task.fingerprint.startswith("40915144fe8b10f2")
    assert load_task("digits").fingerprint == task.fingerprint


def test_folder_pixels_labels_names(tmp_path):
    task = load_task(str(folder(tmp_path / "pets")))
    assert (task.name, task.classes, task.shape) == ("pets", CLASSES, (3, 6, 5))
    assert task.source == str(tmp_path / "pets") and task.mirror
    assert np.array_equal(task.train.labels, np.repeat([0, 1, 2], 5)) and task.train.labels.dtype == np.int64
    for part, split in (("train", task.train), ("test", task.test)):
        expected = [picture(part, name, index) for name in CLASSES for index in range(5)]
        assert np.array_equal(split.images, np.stack(expected).transpose(0, 3, 1, 2))
    pixels = task.train.images / 255
    mean, std = pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3))
    np.testing.assert_allclose(task.transform.arrays()["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(task.transform.arrays()["std"], std, rtol=1e-6)


def test_folder_is_decoded_once(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    first = load_task(root)
    assert isinstance(first.train.images, np.memmap) and not first.train.images.flags.writeable

    def fail(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        again = load_task(root)
        moved = load_task(root.rename(tmp_path / "animals"))
    for task in (again, moved):
        assert task.fingerprint == first.fingerprint
        assert np.array_equal(task.test.images, first.test.images)
        for key, array in first.transform.arrays().items():
            assert np.array_equal(task.transform.arrays()[key], array)
    assert moved.name == "animals"


def test_cache_notices_changes(tmp_path):
    root = folder(tmp_path / "pets")
    first = load_task(root)
    # other names in the same order, other times: decoded again to the same content
    for file in sorted(root.rglob("*.png")):
        file.rename(file.with_name(f"x{file.name}"))
    assert load_task(root).fingerprint == first.fingerprint
    Image.fromarray(picture("other")).save(root / "train" / "ant" / "x000.png")
    changed = load_task(root)
    assert changed.fingerprint != first.fingerprint
    assert np.array_equal(changed.train.images[0], picture("other").transpose(2, 0, 1))
    assert load_task(root, DataOptions(grey=True)).shape == (1, 6, 5)
    assert load_task(root, DataOptions(resize=4)).shape == (3, 4, 4)
    assert load_task(root).shape == (3, 6, 5)


def test_broken_cache_is_rebuilt_and_a_cut_off_one_leaves_nothing(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    first = load_task(root)
    (place,) = (tmp_path / "cache" / "images").iterdir()
    (place / "train.npy").write_bytes((place / "train.npy").read_bytes()[:-7])
    rebuilt = load_task(root)
    assert isinstance(rebuilt.train.images, np.memmap) and rebuilt.fingerprint == first.fingerprint
    (place / "meta.json").write_text("{")
    assert load_task(root).fingerprint == first.fingerprint

    opened = Image.open

    def interrupted(path, **options):
        if "/test/cat/" in str(path):
            raise KeyboardInterrupt
        return opened(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_task(root, DataOptions(grey=True))
    assert list(place.parent.iterdir()) == [place]

    killed = place.parent / ".tmp-of-a-killed-process"
    killed.mkdir()
    os.utime(killed, (time.time() - 2 * 86400,) * 2)
    load_task(root, DataOptions(grey=True))
    assert not killed.exists()


def test_second_process_that_fills_the_same_cache(tmp_path, monkeypatch):
    root = folder(tmp_path / "pets")
    rename = os.rename

    def late(source, target):
        """The other process finishes just before our rename."""
        monkeypatch.setattr(os, "rename", rename)
        load_task(root)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    task = load_task(root)
    assert isinstance(task.train.images, np.memmap)
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 1


@pytest.mark.parametrize("fault", ["unwritable", "full", "full while writing"])
def test_without_a_cache_images_stay_in_memory(tmp_path, monkeypatch, caplog, fault):
    root = folder(tmp_path / "pets")
    expected = load_task(root)
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "other"))
    if fault == "unwritable":
        (tmp_path / "other").write_text("a file, where a folder should be")
    elif fault == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    else:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    task = load_task(root)
    assert not isinstance(task.train.images, np.memmap)
    assert task.fingerprint == expected.fingerprint and np.array_equal(task.test.images, expected.test.images)
    (warning,) = caplog.messages
    assert "stay in memory" in warning and str(tmp_path / "other") in warning and "\n" not in warning
    assert fault == "unwritable" or not any((tmp_path / "other").rglob("*.npy"))


@pytest.mark.parametrize("parts", [("train",), ("",)])
def test_folder_without_test_part_is_split(tmp_path, parts):
    root = folder(tmp_path / "pets", per_class=7, parts=parts)
    task = load_task(root)
    assert task.classes == CLASSES and task.counts.tolist() == [6, 6, 6]
    assert np.bincount(task.test.labels).tolist() == [1, 1, 1]
    assert task.fingerprint == load_task(root, name="same").fingerprint
    every = {picture(parts[0], name, index).tobytes() for name in CLASSES for index in range(7)}
    found = [image.transpose(1, 2, 0).tobytes() for split in (task.train, task.test) for image in split.images]
    assert set(found) == every and len(found) == len(every)


def test_folder_ignores_what_is_no_image_and_looks_into_subfolders(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("x")
    (root / "train" / "ant" / "._000.png").write_text("macOS")
    (root / "train" / "bee" / "more").mkdir()
    Image.fromarray(picture("more")).save(root / "train" / "bee" / "more" / "A.JPEG")
    (root / "test").rename(root / "val")
    task = load_task(root)
    assert task.counts.tolist() == [5, 6, 5] and len(task.test) == 15


@pytest.mark.parametrize("fork", [True, False], ids=["processes", "threads"])
def test_parallel_decoding_equals_serial(tmp_path, fork):
    if fork and sys.platform == "win32":
        pytest.skip("needs os.fork")
    root = folder(tmp_path / "pets", per_class=300, parts=("train",))
    paths = [str(path) for path in sorted(root.rglob("*.png"))]
    expected = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])
    serial = list(decode_images(paths, (3, 6, 5), "RGB", None, workers=1))
    parallel = list(decode_images(paths, (3, 6, 5), "RGB", None, workers=3, fork=fork))
    assert [len(chunk) for chunk in parallel] == [len(chunk) for chunk in serial] == [256, 256, 256, 132]
    assert np.array_equal(np.concatenate(serial), expected) and np.array_equal(np.concatenate(parallel), expected)
    task = load_task(root)
    stored = np.concatenate([task.train.images, task.test.images])
    assert sorted(image.tobytes() for image in stored) == sorted(image.tobytes() for image in expected)
    broken = sorted((root / "train" / "cat").iterdir())[250]
    broken.write_bytes(b"not an image")
    message = f"{broken.name}' cannot be read as an image: unknown format"
    with pytest.raises(CondenseError, match=message):
        list(decode_images(paths, (3, 6, 5), "RGB", None, workers=3, fork=fork))
    with pytest.raises(CondenseError, match=message):
        load_task(root)


def test_pixel_modes(tmp_path):
    grey = picture("grey", size=(6, 5))
    files = {
        "0.png": (Image.fromarray(grey), grey),
        "1.png": (Image.fromarray(grey.astype(np.uint16) * 257), grey),  # 16 bits
        "2.png": (Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey)]), grey),
        "3.gif": (Image.fromarray(grey), grey),
        "4.tif": (Image.fromarray(grey), grey),
        "5.bmp": (Image.fromarray(grey), grey),
    }
    for name in ("ant", "bee"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for file, (image, _) in files.items():
            image.save(tmp_path / "grey" / name / file)
    task = load_task(tmp_path / "grey")
    assert task.shape == (1, 6, 5)  # the majority is grey
    loaded = {image.tobytes() for split in (task.train, task.test) for image in split.images}
    assert loaded == {grey.tobytes()}
    assert load_task(tmp_path / "grey", DataOptions(grey=False)).shape == (3, 6, 5)

    root = folder(tmp_path / "rgb")
    rgba = np.concatenate([picture("rgba"), picture("alpha", size=(6, 5, 1))], axis=2)
    Image.fromarray(rgba).save(root / "train" / "ant" / "000.png")
    Image.fromarray(grey).save(root / "train" / "ant" / "001.png")
    palette = Image.fromarray(picture("palette")).quantize(30)
    palette.save(root / "train" / "ant" / "002.png", transparency=0)
    turned = Image.fromarray(picture("turned", size=(5, 6, 3)))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    turned.save(root / "train" / "ant" / "003.png", exif=exif)
    Image.fromarray(picture("cmyk")).convert("CMYK").save(root / "train" / "ant" / "004.tif")
    images = load_task(root).train.images
    assert np.array_equal(images[0], rgba[:, :, :3].transpose(2, 0, 1))
    assert np.array_equal(images[1], np.stack([grey] * 3))
    assert np.array_equal(images[2], np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    assert np.array_equal(images[3], np.rot90(np.asarray(turned), -1).transpose(2, 0, 1))


def test_resize_is_that_of_torchvision(tmp_path):
    from torchvision.transforms import CenterCrop, Compose, Resize

    root = folder(tmp_path / "pets")
    with pytest.raises(CondenseError) as error:
        Image.fromarray(picture("large", size=(17, 31, 3))).save(root / "train" / "ant" / "002.png")
        load_task(root)
    message = str(error.value)
    assert "5x6" in message and "31x17" in message and "ant/000.png" in message and "ant/002.png" in message
    assert "give resize=N" in message
    for side in (4, 9, 24):
        task = load_task(root, DataOptions(resize=side))
        assert task.shape == (3, side, side)
        image = Image.open(root / "train" / "ant" / "002.png")
        expected = np.asarray(Compose([Resize(side), CenterCrop(side)])(image)).transpose(2, 0, 1)
        assert np.array_equal(task.train.images[2], expected)
    # arrays go through torch's antialiased bilinear kernel instead of PIL's: at most a rounding apart
    made = arrays(shape=(3, 17, 31))
    resized = load_task(made, DataOptions(resize=8)).train.images.astype(int)
    for image, result in zip(made["train_images"], resized):
        by_pil = np.asarray(Compose([Resize(8), CenterCrop(8)])(Image.fromarray(image.transpose(1, 2, 0))))
        assert np.abs(by_pil.transpose(2, 0, 1).astype(int) - result).max() <= 1


def _one_class(root: Path) -> None:
    folder(root)
    for name in ("bee", "cat"):
        (root / "train" / name).rename(root / f"{name}-away")


FOLDER_FAULTS = {
    "empty": (lambda root: root.mkdir(), r"is empty; expected train/<class>"),
    "no class folders": (lambda root: (root.mkdir(), (root / "a.png").touch()), "holds no class folders"),
    "single class": (_one_class, "only one class, 'ant'"),
    "class without images": (
        lambda root: (folder(root), (root / "train" / "dog").mkdir()),
        "train.*'dog' has no images",
    ),
    "test class without images": (
        lambda root: (folder(root) / "test" / "bee").rename(root / "gone") and (root / "test" / "bee").mkdir(),
        "test'?: class 'bee' has no images",
    ),
    "other classes": (
        lambda root: (folder(root) / "test" / "bee").rename(root / "test" / "wasp"),
        r"differ in their classes: train/ alone has bee; test/ alone has wasp",
    ),
    "only a test part": (lambda root: folder(root, parts=("test",)), "has test/ but no train/"),
    "too few to split": (lambda root: folder(root, per_class=1, parts=("",)), "class 'ant' has 1 image"),
    "cut-off file": (
        lambda root: (folder(root, suffix="jpg") / "test" / "cat" / "003.jpg").write_bytes(b"\xff\xd8\xff\xe0"),
        "cat/003.jpg' cannot be read as an image",
    ),
    "empty file": (
        lambda root: (folder(root) / "train" / "ant" / "000.png").write_bytes(b""),
        "ant/000.png' cannot be read as an image: unknown format",
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_folder_faults_are_one_line(tmp_path, fault):
    make, expected = FOLDER_FAULTS[fault]
    make(tmp_path / "set")
    with pytest.raises(CondenseError, match=expected) as error:
        load_task(tmp_path / "set")
    assert "\n" not in str(error.value) and str(tmp_path / "set") in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_names_and_paths(tmp_path, monkeypatch):
    root = folder(tmp_path / "my pets")
    assert load_task(root).name == "my-pets"
    named = load_task(f"pets={root}")
    assert (named.name, named.source) == ("pets", f"pets={root}")
    assert load_task(named.source).name == "pets"
    assert load_task(root, name="other").name == "other"
    assert load_task("mine=digits").source == "mine=digits" and load_task("mine=digits").name == "mine"
    monkeypatch.chdir(root)
    assert load_task(".").source == str(root) and load_task("./train", name="x").classes == CLASSES
    for name in ("a/b", "", ".x"):
        with pytest.raises(CondenseError, match="use up to 100 letters"):
            load_task(root, name=name)
    for given, expected in {
        "cifar01": "did you mean 'cifar10'",
        "nothing/like/this": "no such file or folder$",
        "pets=nothing/like/this": "'nothing/like/this': no such file or folder$",
        str(root / "train" / "ant" / "000.png"): "give a folder of images",
    }.items():
        with pytest.raises(CondenseError, match=expected):
            load_task(given)


# Arrays and datasets -------------------------------------------------------------------------------------------------


def test_array_layouts_are_one_data_set():
    base = arrays(shape=(3, 4, 5))
    expected = load_task(base)
    assert (expected.name, expected.source, expected.classes) == ("data", None, ("0", "1", "2"))
    assert np.array_equal(expected.train.images, base["train_images"])
    last = {key: value.transpose(0, 2, 3, 1) if "images" in key else value for key, value in base.items()}
    tensors = tuple(torch.from_numpy(value) for value in base.values())
    floats = {key: torch.from_numpy(value).float() / 255 if "images" in key else value for key, value in base.items()}
    keras = {other: base[key] for key, other in arrays_module.ALIASES.items()} | {
        "y_train": base["train_labels"][:, None]
    }
    for same in (last, tensors, floats, keras):
        task = load_task(same)
        assert task.train.images.dtype == np.uint8 and task.train.images.flags.c_contiguous
        assert task.fingerprint == expected.fingerprint
    grey = arrays(shape=(4, 5))
    assert load_task(grey).shape == (1, 4, 5)
    assert load_task(arrays(shape=(3, 4, 3))).shape == (3, 4, 3)  # both axes could be channels: the second one is
    assert load_task(grey, DataOptions(grey=False)).shape == (3, 4, 5)
    assert load_task(base, DataOptions(grey=True)).shape == (1, 4, 5)


def test_float_pixels_are_kept():
    made = arrays()
    made["train_images"] = made["train_images"] / 300
    task = load_task(made)
    assert task.train.images.dtype == task.test.images.dtype == np.float32
    assert np.array_equal(task.pixels(torch.arange(12)).numpy(), made["train_images"].astype(np.float32))
    pixels = made["train_images"]
    np.testing.assert_allclose(task.transform.arrays()["mean"], pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(task.transform.arrays()["std"], pixels.std(axis=(0, 2, 3)), rtol=1e-5)
    constant = arrays()
    constant["train_images"][:, 1] = 7
    assert load_task(constant).transform.arrays()["std"][1] == np.float32(1e-3)


def _with(**changes):
    return lambda made: made | {key: change(made[key]) for key, change in changes.items()}


ARRAY_FAULTS = {
    "normalised": (_with(test_images=lambda x: x / 128 - 1.0), "drop Normalize .* normalises itself"),
    "0..255 floats": (_with(train_images=lambda x: x.astype(float)), "uint8 or floats in"),
    "NaN": (_with(train_images=lambda x: x * np.nan), "hold NaN"),
    "int64 pixels": (_with(train_images=lambda x: x.astype(int)), "not int64"),
    "channels": (_with(train_images=lambda x: np.repeat(x, 2, 1)), "train images are 6x4x4 but test images 3x4x4"),
    "five axes": (_with(train_images=lambda x: x[None]), r"shape \(1, 12, 3, 4, 4\)"),
    "multi-label": (_with(train_labels=lambda y: np.ones((12, 3), int)), "multi-label data are not supported"),
    "flat": (_with(train_images=lambda x: x.reshape(12, -1)), r"shape \(12, 48\)"),
    "other size": (_with(test_images=lambda x: x[:, :, :3]), "3x4x4 but test images 3x3x4"),
    "hole": (_with(train_labels=lambda y: y * 2), "no train images of class 1, 3"),
    "negative": (_with(train_labels=lambda y: y - 1), "run from -1"),
    "huge label": (_with(train_labels=lambda y: y * 10**12), "must be 0..C-1, but one is 2000000000000"),
    "one-hot": (_with(train_labels=lambda y: np.eye(3)[y]), "whole numbers of shape"),
    "fractions": (_with(train_labels=lambda y: y + 0.5), "whole numbers"),
    "count": (_with(test_labels=lambda y: y[:-1]), "6 test images but 5 labels"),
    "one class": (_with(train_labels=lambda y: y * 0, test_labels=lambda y: y * 0), "only one class"),
    "unseen test class": (_with(test_labels=lambda y: y + 1), "no train images of class 3"),
    "few names": (lambda made: made | {"classes": ["a", "b"]}, r"labels must be 0\.\.1"),
    "many names": (lambda made: made | {"classes": list("abcd")}, r"class 3 \('d'\)"),
    "missing": (lambda made: {"train_images": made["train_images"], "extra": 1}, "no train_labels .*y_train.* extra"),
    "half a test part": (
        lambda made: {key: value for key, value in made.items() if key != "test_labels"},
        "no test_labels",
    ),
    "a number": (lambda made: 3, "type int cannot be used"),
    "three parts": (lambda made: (1, 2, 3), "type tuple cannot be used"),
}


@pytest.mark.parametrize("fault", ARRAY_FAULTS)
def test_array_faults_are_one_line(fault):
    change, expected = ARRAY_FAULTS[fault]
    with pytest.raises(CondenseError, match=expected) as error:
        load_task(change(arrays()))
    assert "\n" not in str(error.value)


def test_arrays_without_test_part_are_split():
    made = arrays(train=30)
    task = load_task((made["train_images"], made["train_labels"]))
    assert task.counts.tolist() == [8, 8, 8] and np.bincount(task.test.labels).tolist() == [2, 2, 2]


def test_array_files(tmp_path):
    made = arrays()
    expected = load_task(made | {"classes": CLASSES}).fingerprint
    np.savez(tmp_path / "mine.npz", classes=np.array(CLASSES), **made)  # type: ignore[arg-type]
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        for key, value in made.items():
            file[key] = value
        file["classes"] = list(CLASSES)
    for path in (tmp_path / "mine.npz", tmp_path / "mine.h5"):
        task = load_task(path)
        assert (task.name, task.classes, task.fingerprint) == ("mine", CLASSES, expected)
        assert task.source == str(path)
    keras = {other: made[key] for key, other in arrays_module.ALIASES.items()}
    np.savez(tmp_path / "keras.npz", **keras)  # type: ignore[arg-type]
    assert load_task(tmp_path / "keras.npz").fingerprint == load_task(made).fingerprint

    np.savez(tmp_path / "pickled.npz", train_images=np.array([{}]), train_labels=np.array([0]))
    (tmp_path / "broken.npz").write_bytes((tmp_path / "mine.npz").read_bytes()[:300])
    (tmp_path / "broken.h5").write_bytes(b"nothing")
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file.attrs["format"] = "condense.distilled"
    np.savez(tmp_path / "empty.npz", images=made["train_images"])
    for name, expected in {
        "pickled.npz": "cannot be read as arrays: Object arrays",
        "broken.npz": "cannot be read as arrays",
        "broken.h5": "cannot be read as arrays",
        "set.h5": "is a distilled set",
        "empty.npz": "no train_images, train_labels",
    }.items():
        with pytest.raises(CondenseError, match=expected) as error:
            load_task(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


class Pictures(torch.utils.data.Dataset):
    """PIL images, as a torchvision dataset without transform gives them."""

    classes = CLASSES

    def __init__(self, part: str, count: int = 9, transform=None):
        self.part, self.count, self.transform = part, count, transform

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = Image.fromarray(picture(self.part, index))
        return image if self.transform is None else self.transform(image), index % 3


def test_torch_datasets():
    from torchvision.transforms import Compose, Normalize, ToTensor

    pair = (Pictures("train"), Pictures("test"))
    task = load_task(pair, name="mine")
    assert (task.name, task.classes, task.source) == ("mine", CLASSES, None)
    assert np.array_equal(task.train.images[4], picture("train", 4).transpose(2, 0, 1))
    as_tensors = (Pictures("train", transform=ToTensor()), Pictures("test", transform=ToTensor()))
    assert load_task(as_tensors).fingerprint == task.fingerprint
    assert load_task(pair, DataOptions(resize=4, grey=True)).shape == (1, 4, 4)
    assert load_task(Pictures("train", count=15)).counts.tolist() == [4, 4, 4]
    made = arrays()
    tensor_set = torch.utils.data.TensorDataset(
        torch.from_numpy(made["train_images"]), torch.from_numpy(made["train_labels"])
    )
    assert np.array_equal(load_task((tensor_set, tensor_set)).train.images, made["train_images"])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    broken = Compose([ToTensor(), Normalize(0.5, 0.5)])
    for data, expected in (
        (Pictures("train", transform=broken), "drop Normalize"),
        (Stream(), "type Stream cannot be used"),
        (Pictures("train", count=0), "train dataset is empty"),
        (([(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 4), 1)],), "item 1 of the train dataset is float32 1x5x4"),
        (([torch.zeros(1, 4, 4)] * 3,), r"not \(image, label\)"),
        (([(torch.zeros(1, 4, 4), "cat")],), "label 'cat'"),
    ):
        with pytest.raises(CondenseError, match=expected):
            load_task(data)


# Registered sets -----------------------------------------------------------------------------------------------------


def test_absent_sets_say_where_and_how(tmp_path, monkeypatch):
    for name in ("mnist", "fashion-mnist", "svhn", "cifar10", "cifar100"):
        with pytest.raises(CondenseError, match=rf"'{name}' is not.*--download fetches it") as error:
            load_task(name)
        assert str(tmp_path / "data") in str(error.value)
    with pytest.raises(CondenseError, match=r"tiny-imagenet-200\.zip and unzip it into"):
        load_task("tiny-imagenet", download=True)

    import torchvision.datasets

    def offline(root, train, download):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(CondenseError, match=r"'cifar10' could not be downloaded to .*: no route to host$"):
        load_task("cifar10", download=True)


def test_mnist_from_its_own_files(tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = picture("mnist", size=(20, 28, 28)), (np.arange(20) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        header = np.array([0x803, 20, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, 20], ">i4").tobytes() + labels.tobytes())
    task = load_task("mnist")
    assert (task.name, task.shape, task.mirror, task.num_classes) == ("mnist", (1, 28, 28), False, 10)
    assert np.array_equal(task.train.images[:, 0], images)
    assert task.transform.arrays()["mean"] == np.float32(0.1307) and task.transform.arrays()["std"] == np.float32(
        0.3081
    )
    assert load_task("mnist", DataOptions(grey=False)).transform.arrays()["mean"].shape == (3,)


def test_colour_sets_through_torchvision(monkeypatch):
    import torchvision.datasets

    made = arrays(classes=10, train=20, test=20, shape=(3, 32, 32))

    class Cifar:
        classes = tuple("abcdefghij")

        def __init__(self, root, train, download):
            self.data = made["train_images" if train else "test_images"].transpose(0, 2, 3, 1)
            self.targets = made["train_labels"].tolist()

    class Svhn:
        def __init__(self, root, split, download):
            self.data, self.labels = made[f"{split}_images"], made[f"{split}_labels"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    monkeypatch.setattr(torchvision.datasets, "SVHN", Svhn)
    cifar, svhn = load_task("cifar10"), load_task("svhn")
    assert cifar.mirror and not svhn.mirror
    assert cifar.classes == tuple("abcdefghij") and svhn.classes == tuple("0123456789")
    for task, mean in ((cifar, 0.4914), (svhn, 0.4377)):
        assert np.array_equal(task.test.images, made["test_images"])
        assert task.transform.arrays()["mean"][0] == np.float32(mean)


def test_tiny_imagenet_layout(tmp_path):
    root = tmp_path / "data" / "tiny-imagenet-200"
    lines = []
    for number, wnid in enumerate(("n02", "n01", "n03")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for index in range(4):
            image = Image.fromarray(picture(wnid, index, size=(8, 8, 3)))
            image.save(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG")
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t7\t7")
    (root / "val" / "images").mkdir(parents=True)
    for number, wnid in enumerate(("n02", "n01", "n03")):
        image = Image.fromarray(picture("val", wnid, size=(8, 8)))  # grey files are made RGB
        image.save(root / "val" / "images" / f"val_{number}.JPEG", quality=100)
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("n02\nn01\nn03\n")
    task = load_task("tiny-imagenet")
    assert (task.name, task.classes, task.shape) == ("tiny-imagenet", ("n01", "n02", "n03"), (3, 8, 8))
    assert task.test.labels.tolist() == [0, 1, 2] and task.counts.tolist() == [4, 4, 4]
    assert task.transform.arrays()["mean"].tolist() == np.array([0.485, 0.456, 0.406], np.float32).tolist()
    for label, wnid in enumerate(task.classes):
        expected = picture("val", wnid, size=(8, 8)).astype(int)
        assert np.abs(task.test.images[label].astype(int) - expected).max() < 8  # JPEG
    (root / "wnids.txt").write_text("n02\nn01\n")
    with pytest.raises(CondenseError, match=r"not those of wnids\.txt"):
        load_task("tiny-imagenet")


# Options -------------------------------------------------------------------------------------------------------------


def test_options():
    assert load_task("digits", DataOptions(resize=16)).shape == (1, 16, 16)
    assert load_task("digits", DataOptions(mirror=True)).mirror
    task = load_task(arrays(), DataOptions(mirror=False))
    assert not task.mirror and task.options == DataOptions(mirror=False)
    assert load_task(task) is task and load_task(task, task.options, name="data") is task
    for change in ({"options": DataOptions()}, {"name": "x"}):
        with pytest.raises(CondenseError, match="loaded already"):
            load_task(task, **change)
    with pytest.raises(CondenseError, match="resize=0"):
        DataOptions(resize=0)


def test_zca_whitens_the_train_images():
    task = load_task("digits", DataOptions(zca=True))
    assert task.transform.kind == "zca"
    ids = torch.arange(len(task.train))
    whitened = task.batch(ids)
    assert whitened.shape == (len(ids), 1, 8, 8)
    covariance = torch.cov(whitened.flatten(1).double().T)
    variances = torch.linalg.eigvalsh(torch.cov(task.pixels(ids).flatten(1).double().T)).clamp_min(0)
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance), variances / (variances + 0.1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(task.transform.inverse(whitened), task.pixels(ids), rtol=1e-3, atol=1e-3)


# Serving -------------------------------------------------------------------------------------------------------------


def test_batches():
    made = arrays()
    task = load_task(made)
    ids = torch.tensor([7, 0, 7])
    assert torch.equal(task.raw(ids), torch.from_numpy(made["train_images"][[7, 0, 7]]))
    assert torch.equal(task.pixels(ids), torch.from_numpy(made["train_images"][[7, 0, 7]]).float() / 255)
    assert torch.equal(task.batch(ids), task.transform(task.pixels(ids)))
    some = torch.tensor([5, 5, 1])
    assert torch.equal(task.test_pixels(some), torch.from_numpy(made["test_images"]).float()[some] / 255)
    assert torch.equal(task.test_batch(some), task.transform(task.test_pixels(some)))
    every = task.batch(torch.arange(12))
    torch.testing.assert_close(every.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(every.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert task.batch(ids[:0]).shape == (0, 3, 4, 4)
    assert "12 train" in repr(task) and [task.class_ids(c).tolist() for c in range(3)] == [
        list(range(c, 12, 3)) for c in range(3)
    ]


def uneven() -> Task:
    labels = np.repeat([0, 1, 2, 3], [40, 2, 17, 300])[Draws("order").permutation(359).numpy()]
    return load_task((picture("uneven", size=(359, 2, 2)), labels, picture("test", size=(4, 2, 2)), np.arange(4)))


def test_per_class_draws_without_replacement():
    task = uneven()
    images, labels = task.per_class(16, (0, "real", 3))
    assert labels.tolist() == [0] * 16 + [1] * 2 + [2] * 16 + [3] * 16 and labels.dtype == torch.int64
    ids = task.sample_ids(16, (0, "real", 3))
    assert len(set(ids.tolist())) == len(ids)
    assert torch.equal(images, task.batch(ids)) and np.array_equal(task.train.labels[ids.numpy()], labels.numpy())
    assert not torch.equal(ids, task.sample_ids(16, (0, "real", 4)))
    assert torch.equal(ids, task.sample_ids(16, (0, "real", 3)))
    every = torch.arange(359)
    assert torch.equal(task.batch(every), task.transform(task.pixels(every)))  # in pieces or at once
    for c in range(4):  # one class alone, and the documented draw
        alone, of_class = task.per_class(16, (0, "real", 3), [c])
        assert torch.equal(alone, images[labels == c]) and set(of_class.tolist()) == {c}
        rows = torch.from_numpy(task.class_ids(c))
        assert torch.equal(ids[labels == c], rows[Draws(0, "real", 3, c).sample(len(rows), 16)])
    swapped = task.per_class(16, (0, "real", 3), [3, 1])
    assert torch.equal(swapped[0], torch.cat([images[labels == 3], images[labels == 1]]))
    assert swapped[1].tolist() == [3] * 16 + [1] * 2
    assert sorted(task.sample_ids(1000, (1,)).tolist()) == list(range(359))
    assert task.per_class(4, (0,), [])[0].shape == (0, 1, 2, 2)


def test_per_class_of_a_huge_class_needs_no_huge_table():
    task = uneven()
    expected = task.sample_ids(16, (0, "real", 3))
    task.MAX_HASHES = 600
    assert torch.equal(task.sample_ids(16, (0, "real", 3)), expected)


def test_sampling_is_uniform():
    """Every image of a class is equally likely: a chi-square statistic far below its 1e-6 quantile."""
    task = uneven()
    drawn = torch.cat([task.sample_ids(8, (step, "uniform"), [0]) for step in range(1000)])
    counts = torch.bincount(drawn, minlength=359)[task.class_ids(0)].double()
    assert float(((counts - 200) ** 2 / 200).sum()) < 95  # 39 degrees of freedom; 8 of 40 without replacement has less


def test_rows_are_streamed_where_they_do_not_fit():
    """The meta device stands in for an accelerator: placement and shapes without memory."""
    images = picture("rows", size=(10, 1, 2, 2))
    for max_bytes, kept in ((images.nbytes, "meta"), (images.nbytes - 1, "cpu")):
        rows = Rows(Split(images, np.zeros(10, np.int64)), torch.device("meta"), max_bytes)
        taken = rows.take(torch.tensor([3, 3, 9]))
        assert taken.device.type == "meta" and taken.shape == (3, 1, 2, 2) and taken.dtype == torch.uint8
        assert rows.placed is not None and rows.placed.device.type == kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_serves_what_the_cpu_serves(monkeypatch):
    task = uneven()
    expected = task.per_class(16, (0, "real", 1))
    for free in (2**40, 0):
        monkeypatch.setattr("condense.data.task.free_memory", lambda device, free=free: free)
        images, labels = task.to("cuda").per_class(16, (0, "real", 1))
        assert images.is_cuda and labels.is_cuda
        torch.testing.assert_close(images.cpu(), expected[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(labels.cpu(), expected[1])


def test_to_shares_the_arrays():
    task = load_task(arrays(), DataOptions(mirror=False), name="mine")
    moved = task.to("cpu")
    assert moved is not task and moved.train is task.train and moved.options == task.options
    assert (moved.name, moved.mirror, moved.fingerprint) == ("mine", False, task.fingerprint)
    assert torch.equal(moved.batch(torch.arange(5)), task.batch(torch.arange(5)))
    other = task.to("cpu", load_task("digits").transform)  # another training space
    assert torch.equal(other.batch(torch.arange(5)), other.transform(task.pixels(torch.arange(5))))


# Real images ---------------------------------------------------------------------------------------------------------

_REAL = Path(os.environ.get("CONDENSE_DATA", ""), "cifar10")


@pytest.mark.slow
@pytest.mark.skipif(
    not ("CONDENSE_DATA" in os.environ and (_REAL / "train").is_dir()),
    reason="needs the image folder cifar10/ (60,000 files) in CONDENSE_DATA",
)
def test_second_start_on_60000_files_is_quick(tmp_path):
    code = (
        "import json, sys, time, condense.data as t, condense.augment; start = time.perf_counter();"
        "task = t.load('cifar10-jpeg=' + sys.argv[1]);"
        "print(json.dumps([time.perf_counter() - start, task.fingerprint]))"
    )
    results = []
    for _ in range(2):
        command = [sys.executable, "-c", code, str(_REAL)]
        done = subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        results.append(json.loads(done.stdout))
    assert results[0][1] == results[1][1]
    assert results[1][0] < 2.0, f"the second start took {results[1][0]:.2f} s (the first: {results[0][0]:.1f} s)"


def test_data_with_a_registered_name_take_its_normalisation(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, **arrays(20, 10, classes=10, shape=(1, 28, 28)))
    own, registered = load_task(str(path)), load_task(f"mnist={path}")
    assert registered.fingerprint == own.fingerprint and registered.name == "mnist"
    assert registered.transform.mean.tolist() == pytest.approx([0.1307]) and not registered.mirror
    assert registered.transform.std.tolist() == pytest.approx([0.3081]) and own.mirror
    shutil.copy(path, tmp_path / "mnist.npz")
    assert torch.equal(load_task(tmp_path / "mnist.npz").transform.std, registered.transform.std)
    resized = load_task(f"mnist={path}", DataOptions(resize=14))
    assert torch.equal(resized.transform.std, registered.transform.std)
    for other in (f"cifar10={path}", f"digits={path}"):  # another shape
        assert torch.equal(load_task(other).transform.std, own.transform.std) and load_task(other).mirror
    np.savez(path, **arrays(20, 10, classes=5, shape=(1, 28, 28)))
    assert load_task(f"mnist={path}").mirror  # another number of classes
