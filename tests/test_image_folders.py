"""condense.data: layouts of image folders, types of files, 16-bit images, and what hostile folders may cost."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from condense.data import DataOptions, load_task
from condense.errors import CondenseError

CLASSES = ("ant", "bee", "cat")


def picture(path: Path, **options) -> None:
    """Writes an image whose pixels follow from its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(zlib.crc32(str(path).encode()))
    Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(path, **options)


def tree(root: Path, *folders: str, count: int = 5) -> Path:
    """Writes ``count`` images into each folder."""
    for folder in folders:
        for index in range(count):
            picture(root / folder / f"{index}.png")
    return root


def parts(*names: str) -> list[str]:
    """The class folders of each part."""
    return [f"{name}/{label}" for name in names for label in CLASSES]


def load(root: Path, **options):
    return load_task(root, DataOptions(**options))


# Names of parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "VAL"),
        ("train", "Test"),
        ("train", "dev"),
        ("train", "eval"),
        ("Train", "Validation"),
        ("seg_train", "seg_test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train2017", "val2017"),
        ("traindata", "testdata"),
        ("trainsplit", "evalsplit"),
        ("TrainImages", "TestImages"),
        ("training_set", "test_set"),
    ],
)
def test_usual_names_of_parts(tmp_path, train, test):
    task = load(tree(tmp_path / "d", *parts(train, test)))
    assert task.classes == CLASSES and (len(task.train), len(task.test)) == (15, 15)


def test_test_part_is_taken_before_validation_and_the_other_is_named(tmp_path, caplog):
    task = load(tree(tree(tmp_path / "d", *parts("train", "Test")), *parts("val"), count=2))
    assert len(task.test) == 15
    (message,) = caplog.messages
    assert "not used: the folders val/" in message
    # a test part without class folders has no labels
    assert len(load(tree(tmp_path / "e", *parts("train", "valid"), "test")).test) == 15


AMBIGUOUS = {
    "unknown test part": (parts("train", "holdout"), ["split=train,holdout", "split=train "]),
    "two train parts": (parts("train", "Training"), ["Training and train", "split=TRAIN,TEST"]),
    "two test parts": (parts("train", "test", "testing"), ["test and testing", "split=TRAIN,TEST"]),
    "two pairs": (parts("a_train", "a_test", "b_train", "b_test"), ["a_train and b_train", "split=TRAIN,TEST"]),
    "unknown parts": (parts("learn", "check"), ["equal sub-folders", "split=CLASS ", "split=check,learn"]),
    "only a prefixed train part": (parts("my_train"), ["split=my_train", "split=CLASS"]),
    "masks": (["a/images", "a/masks", "b/images", "b/masks"], ["split=CLASS/images", "split=CLASS "]),
    "masks beside images": (["a", "a/masks", "b", "b/masks"], ["masks", "split=CLASS "]),
    "masks in parts": (
        [f"{part}/{name}/{kind}" for part in ("train", "test") for name in "ab" for kind in ("images", "masks")],
        ["split=train/CLASS/images,test/CLASS/images", "split=train/CLASS,test/CLASS "],
    ),
    "masks in sub-classes": (["a/x/images", "a/x/masks", "b/y/images", "b/y/masks"], ["images", "split=CLASS "]),
    "parts in classes": (["a/Train", "a/Test", "b/Train", "b/Test"], ["split=CLASS/train,CLASS/test"]),
    "parts in one class": (["a/train", "a/test", "b"], ["split=CLASS/train,CLASS/test"]),
    "images without classes": (["train", "test"], ["holds no class folders", "split=CLASS"]),
    "a class called train": (["train", "car", "plane"], ["holds no class folders", "split=CLASS"]),
}


@pytest.mark.parametrize("layout", AMBIGUOUS)
def test_ambiguous_layouts_are_refused_with_the_readings(tmp_path, layout):
    folders, expected = AMBIGUOUS[layout]
    with pytest.raises(CondenseError) as error:
        load(tree(tmp_path / "d", *folders))
    message = f"{error.value} "
    assert all(text in message for text in expected) and "\n" not in message, message


@pytest.mark.parametrize(
    ("folders", "split", "classes", "sizes"),
    [
        (parts("train", "holdout"), "train,holdout", CLASSES, (15, 15)),
        (parts("train", "holdout"), "train", CLASSES, (12, 3)),
        (parts("learn", "check"), "learn,check", CLASSES, (15, 15)),
        (["train", "car", "plane"], "CLASS", ("car", "plane", "train"), (12, 3)),
        (["a/images", "a/masks", "b/images", "b/masks"], "CLASS/images", ("a", "b"), (8, 2)),
        (["a/images", "a/masks", "b/images", "b/masks"], "CLASS", ("a", "b"), (16, 4)),
        (["a/train", "a/test", "b/train", "b/test"], "CLASS/train,CLASS/test", ("a", "b"), (10, 10)),
        (["t/a/x", "t/b/x", "v/a/x", "v/b/x", "v/b/y"], "t/CLASS/x,v/CLASS/x", ("a", "b"), (10, 10)),
    ],
)
def test_the_option_split_decides(tmp_path, folders, split, classes, sizes):
    task = load(tree(tmp_path / "d", *folders), split=split)
    assert task.classes == classes and (len(task.train), len(task.test)) == sizes
    assert task.options.to_dict()["split"] == split and "split" not in DataOptions().to_dict()


@pytest.mark.parametrize("split", ["../other", "/etc,train", "a,b,c", "", "train/../../x", "tran", "CLASS/nothing"])
def test_faults_of_the_option_split(tmp_path, split):
    tree(tmp_path / "other", *parts("train"))
    with pytest.raises(CondenseError, match=r"split=|no such folder; did you mean 'train'|no images in nothing/"):
        load(tree(tmp_path / "d", *parts("train", "test")), split=split)


def test_layouts_that_were_read_before_still_are(tmp_path):
    assert load(tree(tmp_path / "a", "train/train", "train/car", "test/train", "test/car")).classes == ("car", "train")
    assert load(tree(tmp_path / "b", "steam_train", "test_tube")).classes == ("steam_train", "test_tube")
    assert len(load(tree(tmp_path / "c", "a/images", "b/images")).train) == 8
    assert len(load(tree(tmp_path / "d", "a/x/images", "b/x/images")).train) == 8
    assert len(load(tree(tmp_path / "e", "a", "b", "b/more")).train) == 12


def test_classes_without_images(tmp_path):
    root = tree(tmp_path / "d", *parts("train"), "test/ant", "test/bee", "test/wasp")
    (root / "train" / "dog").mkdir()
    with pytest.raises(CondenseError, match=r"'dog' has no images.*drop_empty=true"):
        load(root)
    (root / "train" / "dog").rmdir()
    with pytest.raises(CondenseError, match=r"train/ alone has cat; test/ alone has wasp.*drop_empty=true"):
        load(root)
    task = load(root, drop_empty=True)
    assert task.classes == CLASSES and np.bincount(task.test.labels, minlength=3).tolist() == [5, 5, 0]


# Files -------------------------------------------------------------------------------------------------------------


def test_all_types_of_pillow_are_read_and_the_rest_is_counted(tmp_path, caplog):
    root = tree(tmp_path / "d", "a", "b")
    for index, suffix in enumerate(("jfif", "JPE", "pgm", "tga", "pcx", "sgi", "jp2", "webp", "qoi", "im")):
        options = {"format": "JPEG"} if suffix == "jfif" else {}
        picture(root / "a" / f"more{index}.{suffix}", **options)
    for name in ("x.txt", "y.txt", "z.eps", "none", "Thumbs.db", ".hidden.txt"):
        (root / "b" / name).write_text("%!PS")
    task = load(root)
    assert len(task.train) + len(task.test) == 20
    (message,) = caplog.messages
    assert "2 .txt" in message and "1 .eps" in message and "1 without a suffix" in message and "db" not in message


def test_postscript_is_not_run_under_another_name(tmp_path):
    root = tree(tmp_path / "d", "a", "b")
    (root / "a" / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\nshowpage\n")
    with pytest.raises(CondenseError, match=r"a/0\.png' cannot be read as an image: unknown format"):
        load(root)


def grey_16(root: Path, bits: int, low: int = 0) -> list[np.ndarray]:
    arrays = []
    for name in "ab":
        (root / name).mkdir(parents=True)
        for index in range(5):
            values = np.random.default_rng([index, ord(name)]).integers(low, 2**bits, (8, 8)).astype(np.uint16)
            values[0, 0] = 2**bits - 1
            Image.fromarray(values).save(root / name / f"{index}.png")
            arrays.append(values)
    return arrays


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_images_are_scaled_by_the_bits_that_they_use(tmp_path, caplog, bits):
    originals = grey_16(tmp_path / "d", bits)
    task = load(tmp_path / "d")
    expected = {np.rint(values / (2**bits - 1) * 255).astype(np.uint8).tobytes() for values in originals}
    assert {image.tobytes() for split in (task.train, task.test) for image in split.images} == expected
    assert [f"0..{2**bits - 1} becomes 0..255" in message for message in caplog.messages] == [True] * (bits < 16)
    load(tmp_path / "d")  # from the cache
    assert len(caplog.messages) == 2 * (bits < 16)
    full = load(tmp_path / "d", bits=16)
    assert full.train.images.max() == (2**bits - 1 + 128) // 257


def test_16_bit_values_outside_the_range_are_refused(tmp_path):
    grey_16(tmp_path / "d", 12)
    Image.fromarray(np.full((8, 8), 5000, np.uint16)).save(tmp_path / "d" / "a" / "3.png")
    assert load(tmp_path / "d").train.images.max() <= 255  # the range covers all train images: 14 bits
    with pytest.raises(CondenseError, match=r"values run from 5000 to 5000, not within 0\.\.4095; give bits=16"):
        load(tmp_path / "d", bits=12)
    with pytest.raises(CondenseError, match="bits=17"):
        DataOptions(bits=17)
    Image.fromarray(np.full((8, 8), -1000, np.int32)).save(tmp_path / "d" / "a" / "3.tif")
    with pytest.raises(CondenseError, match=r"from -1000 to -1000.*from 0"):
        load(tmp_path / "d")


def write_png(path: Path, rows: np.ndarray, bits: int, colour: int, size: tuple[int, int] | None = None) -> None:
    """Writes an RGB (``colour`` 2) or grey (0) PNG with 8 or 16 bits, which Pillow cannot do for colour.

    ``size`` (width, height) is stated in the header instead of that of the rows.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    width, height = size or (rows.shape[1], rows.shape[0])
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_16_bit_colour_that_pillow_would_make_black_is_refused(tmp_path, bits):
    for name in "ab":
        for index in range(5):
            values = np.random.default_rng(index).integers(0, 2**bits, (8, 8, 3))
            write_png(tmp_path / "d" / name / f"{index}.png", values, 16, 2)
    if bits < 16:
        with pytest.raises(CondenseError, match=f"at most {bits} bits, of which Pillow keeps {bits - 8}.*bits=16"):
            load(tmp_path / "d")
    assert load(tmp_path / "d", bits=16).shape == (3, 8, 8)


# Hostile folders ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_without_reading_them(tmp_path):
    root = tree(tmp_path / "d", "a", "b")
    os.mkfifo(root / "a" / "notes.txt")  # no image: only counted
    assert len(load(root).train) == 8
    os.mkfifo(root / "a" / "z.png")
    with pytest.raises(CondenseError, match=r"a/z\.png' is a pipe, socket or device"):
        load(root)
    (root / "a" / "z.png").unlink()
    (root / "a" / "z.png").symlink_to("/dev/zero")
    with pytest.raises(CondenseError, match=r"a/z\.png' is a pipe, socket or device"):
        load(root)


@pytest.mark.skipif(sys.platform == "win32", reason="paths are limited to 260 characters")
def test_deep_and_circular_folders_end(tmp_path, monkeypatch):
    root = tree(tmp_path / "d", "a", "b")
    monkeypatch.chdir(root / "a")
    for _ in range(1200):
        os.mkdir("x")
        os.chdir("x")
    Image.new("RGB", (6, 6)).save("deep.png")
    try:
        task = load(root)
    finally:
        os.remove("deep.png")
        for _ in range(1200):  # pytest's own clean-up is recursive
            os.chdir("..")
            os.rmdir("x")
    assert len(task.train) + len(task.test) == 11
    for name in ("l", "m"):
        (root / "b" / name).symlink_to(root)
    with pytest.raises(CondenseError, match="already listed under another name"):
        load(root)


def test_images_that_unpack_to_gigabytes_are_refused(tmp_path):
    root = tree(tmp_path / "d", "a", "b")
    write_png(root / "a" / "5.png", np.zeros((1, 1), np.uint8), 8, 0, (20000, 10000))
    with pytest.raises(CondenseError, match=r"5\.png' cannot be read as an image: .*exceeds limit"):
        load(root, resize=8)
    write_png(root / "a" / "5.png", np.zeros((1, 60000), np.uint8), 8, 0)
    with pytest.raises(CondenseError, match="60000x1 pixels become 13440000x224 by resize=224"):
        load(root, resize=224)
    large = tmp_path / "e"
    for name in "ab":
        for index in range(2):
            write_png(large / name / f"{index}.png", np.zeros((1, 1), np.uint8), 8, 0, (6000, 6000))
    with pytest.raises(CondenseError, match="6000x6000 pixels; give resize=N"):
        load(large)


@pytest.mark.parametrize("side", [100000, 10**15])
def test_resize_is_bounded_by_the_data(tmp_path, side):
    for data in (str(tree(tmp_path / "d", "a", "b")), "digits"):
        with pytest.raises(CondenseError, match=f"resize={side}: .*give at most 1024|need about"):
            load_task(data, DataOptions(resize=side))


@pytest.mark.parametrize(
    ("train", "test", "fix"),
    [
        ("train_set", "test", "split=train_set,test names the folders of the parts"),
        ("learning", "validation", "split=TRAIN,validation names the folders of the parts"),
        ("1_train", "2_test", "give split=1_train,TEST with the folder of the test images"),
        ("trn", "holdout", "split=trn,holdout takes them as train and test images"),
    ],
)
def test_the_message_names_the_parts_in_their_order(tmp_path, train, test, fix):
    root = tree(tmp_path / "d", *parts(train, test))
    with pytest.raises(CondenseError, match=fix):
        load(root)
    assert len(load(root, split=f"{train},{test}").test) == 15
