"""condense.data: channels, classes and sizes of arrays, and what files of arrays may refer to and unpack to."""

from __future__ import annotations

import io
import json
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch
from conftest import change_protocols, tiny_arrays
from PIL import Image

import condense
from condense.data import DataOptions, load_task
from condense.errors import CondenseError
from condense.judge import records
from condense.sets import save_grid

KEYS = ("train_images", "train_labels", "test_images", "test_labels")


# Channels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("last", [False, True])
def test_any_number_of_channels(tmp_path, channels, last):
    made = dict(zip(KEYS, tiny_arrays(channels=channels, size=16)))
    expected = made["train_images"]
    if last:
        made |= {key: value.transpose(0, 2, 3, 1) for key, value in made.items() if value.ndim == 4}
    np.savez(tmp_path / "x.npz", **made)
    for data in (made, tmp_path / "x.npz"):
        task = load_task(data)
        assert task.shape == (channels, 16, 16) and np.array_equal(task.train.images, expected)
    assert load_task(made, DataOptions(resize=8)).shape == (channels, 8, 8)
    if channels > 1:
        with pytest.raises(CondenseError, match=f"grey=true: needs 1 or 3 channels, not {channels}"):
            load_task(made, DataOptions(grey=True))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((13, 8, 8), (13, 8, 8)), ((8, 8, 13), (13, 8, 8)), ((4, 10, 12), (4, 10, 12)), ((10, 12, 4), (4, 10, 12))],
)
def test_the_axis_of_the_channels(shape, expected):
    images = np.zeros((6, *shape), np.uint8)
    assert load_task((images, np.arange(6) % 2)).shape == expected


@pytest.mark.parametrize("channels", [2, 4])
def test_sets_of_other_channels_are_distilled_drawn_and_evaluated(tmp_path, channels):
    task = load_task(dict(zip(KEYS, tiny_arrays(channels=channels))))
    made = condense.distill("dsa", task, 1, network="convnet-d2-w8-in", steps=1, quiet=True, out=tmp_path / "s.h5")
    assert tuple(made.images.shape) == (3, channels, 8, 8)
    assert Image.open(save_grid(made.pictures()[0], tmp_path / "x.png", columns=1)).size == (3 * 66 + 2, 68)


def test_a_grid_of_many_classes_is_not_cut(tmp_path):
    """One image for each of 1,300 classes; the last one is the brightest and must be drawn."""
    images = torch.zeros(1300, 1, 64, 64)
    images[-1] = 1
    drawn = Image.open(save_grid(images, tmp_path / "x.png", columns=1, limit=50))
    assert drawn.size == (50 * 66 + 2, 26 * 66 + 2)
    assert drawn.getpixel((drawn.width - 34, drawn.height - 34)) == (255, 255, 255)
    assert drawn.getpixel((34, 34)) == (0, 0, 0)


# Classes -------------------------------------------------------------------------------------------------------------


def test_classes_of_a_global_list_that_a_task_lacks(caplog):
    images, labels = np.zeros((12, 1, 4, 4), np.uint8), np.array([1, 4] * 6)
    test_images, test_labels = np.zeros((4, 1, 4, 4), np.uint8), np.array([1, 4, 3, 4])
    data = dict(zip(KEYS, (images, labels, test_images, test_labels)))
    names = list("abcdef")
    with pytest.raises(CondenseError, match=r"no train images of class 0 \('a'\).*drop_empty=true"):
        load_task(data | {"classes": names})
    task = load_task(data | {"classes": names}, DataOptions(drop_empty=True))
    assert task.classes == ("b", "e") and task.train.labels.tolist() == [0, 1] * 6
    assert task.test.labels.tolist() == [0, 1, 1] and len(task.test.images) == 3
    assert "left out: a, c, d, f " in caplog.text and "(1 test images)" in caplog.text
    assert load_task(data, DataOptions(drop_empty=True)).classes == ("1", "4")
    with pytest.raises(CondenseError, match="only one class"):
        load_task((images, labels * 0 + 7), DataOptions(drop_empty=True))


def test_small_classes_are_repeated_on_request(tmp_path, call):
    images = np.random.default_rng(0).integers(0, 255, (22, 1, 8, 8), dtype=np.uint8)
    labels = np.array([0] * 10 + [1] * 10 + [2] * 2)
    np.savez(tmp_path / "small.npz", **dict(zip(KEYS, (images, labels, images, labels))))
    words = "distill {} --data small.npz --ipc 5 --network mlp --run-dir r --out s.h5 --force"
    refused = call(words.format("random"))
    assert refused.code == 2 and "give at most 2, or repeat_small=true" in refused.err
    for method in ("random", "dm steps=1", "dm steps=1 init=kmeans"):
        finished = call(words.format(f"{method} repeat_small=true"))
        assert finished.code == 0 and "Warning" not in finished.err
        made = condense.load(tmp_path / "s.h5")
        assert made.hard_labels().tolist() == [0] * 5 + [1] * 5 + [2] * 5
    call(words.format("random repeat_small=true"))
    stored = condense.load(tmp_path / "s.h5").stored.numpy()
    counts = [int((stored[10:] == image).all((1, 2, 3)).sum()) for image in images[20:]]
    assert sorted(counts) == [2, 3]
    assert "repeat_small=true" in condense.load(tmp_path / "s.h5").manifest["command"]
    task = load_task(tmp_path / "small.npz")
    assert task.repeat_small(5) is task
    task = load_task(tmp_path / "small.npz", DataOptions(repeat_small=True))
    assert task.repeat_small(2) is task and task.repeat_small(5).counts.tolist() == [10, 10, 5]
    assert task.repeat_small(5).fingerprint != task.fingerprint


def test_balanced_accuracy_of_imbalanced_test_splits(tmp_path, monkeypatch):
    change_protocols(monkeypatch, tmp_path / "protocols", steps=20)
    train_images, train_labels, test_images, test_labels = tiny_arrays()
    made = condense.distill("random", load_task((train_images, train_labels, test_images, test_labels)), 1, quiet=True)
    options = {"networks": "mlp", "runs": 2, "protocol": "quick-v1", "controls": [], "quiet": True}
    balanced = condense.evaluate(made, load_task((train_images, train_labels, test_images, test_labels)), **options)
    assert "balanced_accuracies" not in balanced["results"][0]
    rows = np.concatenate([np.flatnonzero(test_labels == 0), np.flatnonzero(test_labels > 0)[::3]])
    test_labels = np.where(np.arange(18) % 2 == 0, test_labels, (test_labels + 1) % 3)  # a student cannot be perfect
    task = load_task((train_images, train_labels, test_images[rows], test_labels[rows]))
    assert len(set(np.bincount(task.test.labels).tolist())) > 1
    record = condense.evaluate(made, task, **options)
    assert condense.evaluate(made, task, **options)["results"] == record["results"]  # from the cache
    network = condense.fit(made, "mlp", protocol="quick-v1")
    predictions = network(task.test_batch(torch.arange(len(rows)))).argmax(1).numpy()
    recalls = [(predictions[task.test.labels == c] == c).mean() for c in range(3)]
    entry = record["results"][0]
    assert entry["balanced_accuracies"][0] == pytest.approx(np.mean(recalls))
    assert entry["accuracies"][0] == pytest.approx((predictions == task.test.labels).mean())
    assert records.check_record(json.loads(json.dumps(record))) == []
    expected = f"balanced accuracy {100 * np.mean(entry['balanced_accuracies']):.1f} %"
    assert expected in records.format_record(record)
    entry["balanced_accuracies"].append(0.5)
    assert "3 balanced accuracies for 2 runs" in records.check_record(record)[0]


def test_an_exception_in_a_dataset_is_one_line():
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise KeyError(index)

    with pytest.raises(CondenseError, match="item 0 of the train dataset cannot be read from the Broken: KeyError: 0"):
        load_task(Broken())


# Files ---------------------------------------------------------------------------------------------------------------


def h5_data(path, images):
    with h5py.File(path, "w") as file:
        file["y_train"] = np.arange(100) % 2
        images(file)
    return path


def test_h5_data_read_no_other_file(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.zeros((100, 4, 4), np.uint8)
    (tmp_path / "raw").write_bytes(bytes(1600))
    layout = h5py.VirtualLayout((100, 4, 4), "u1")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", (100, 4, 4))
    shape = (100, 4, 4)
    for number, (fault, images) in enumerate(
        {
            "another file": lambda f: f.create_dataset("x_train", shape, "u1", external=[(tmp_path / "raw", 0, 1600)]),
            "link": lambda f: f.__setitem__("x_train", h5py.ExternalLink("other.h5", "/secret")),
            "virtual": lambda f: f.create_virtual_dataset("x_train", layout),
            "references": lambda f: f.create_dataset("x_train", shape, h5py.ref_dtype),
            "soft": lambda f: f.__setitem__("x_train", h5py.SoftLink("/y_train")),
        }.items()
    ):
        with pytest.raises(CondenseError, match=f"x_train' .*{fault}"):
            load_task(h5_data(tmp_path / f"{number}.h5", images))


def test_files_that_unpack_to_more_than_the_memory_are_refused(tmp_path):
    huge = (10**7, 3, 1000, 1000)
    sparse = h5_data(
        tmp_path / "sparse.h5", lambda f: f.create_dataset("x_train", huge, "u1", chunks=(1, 3, 1000, 1000))
    )
    with pytest.raises(CondenseError, match=r"sparse\.h5': the arrays need about 60\.0 TB of memory"):
        load_task(sparse)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": huge})
    with zipfile.ZipFile(tmp_path / "false.npz", "w") as archive:
        archive.writestr("x_train.npy", header.getvalue())
    with pytest.raises(CondenseError, match=r"false\.npz' cannot be read as arrays: Unable to allocate"):
        load_task(tmp_path / "false.npz")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("x_train.npy", header.getvalue())
        archive.filelist[0].file_size = 10**14  # what the directory of the archive states
    with pytest.raises(CondenseError, match=r"bomb\.npz': the arrays need about 200\.0 TB of memory"):
        load_task(tmp_path / "bomb.npz")


@pytest.mark.skipif(sys.platform == "win32", reason="without a limit of processor time the test takes a minute")
def test_damaged_h5_data_end(tmp_path):
    """A zeroed global heap, which holds texts of variable length, makes the HDF5 library loop for ever."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x_train"], file["y_train"] = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 4
        file["classes"] = ["ant", "bee", "cat", "dog"]
    content = bytearray((tmp_path / "x.h5").read_bytes())
    start = content.index(b"GCOL")
    content[start + 16 : start + 80] = bytes(64)
    (tmp_path / "x.h5").write_bytes(content)
    with pytest.raises(CondenseError, match=r"x\.h5' cannot be read as arrays"):
        load_task(tmp_path / "x.h5")


# Objects that are no images or labels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(4, 1, 8, 8).to_sparse(),
        torch.rand(4, 1, 8, 8, device="meta"),
        [np.zeros((1, 8, 8 + number), np.uint8) for number in range(4)],
    ],
)
def test_what_is_no_array_is_refused(images):
    with pytest.raises(CondenseError, match=r"data: a .* cannot be used as an array") as error:
        condense.task((images, [0, 1, 0, 1], images, [0, 1, 0, 1]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [np.inf, 1e30, 2.0**63])
def test_labels_beyond_whole_numbers_are_named(label):
    images = np.zeros((4, 1, 8, 8), np.uint8)
    with pytest.raises(CondenseError, match=r"train labels must be 0\.\.C-1, but one is"):
        condense.task((images, np.array([0, 1, 0, label])))


def test_names_as_labels_are_refused_with_the_fix():
    with pytest.raises(CondenseError, match=r"number the names, e.g. by np.unique\(labels, return_inverse=True\)"):
        condense.task((np.zeros((4, 1, 8, 8), np.uint8), np.array(["a", "b", "a", "b"])))


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (0.5, "has the label 0.5, not a whole number"),
        (10**30, f"has the label {10**30}, not a whole number"),
        (None, "has the label None, not a whole number"),
        (torch.eye(2)[0], "has 2 labels; multi-label data are not supported"),
    ],
)
def test_labels_of_a_dataset_are_whole_numbers(label, words):
    with pytest.raises(CondenseError, match=f"item 1 of the train dataset {words}"):
        condense.task(([(torch.zeros(1, 8, 8), 0), (torch.zeros(1, 8, 8), label)],))


def test_an_empty_tuple_and_two_names_are_no_data():
    with pytest.raises(CondenseError, match="data of type tuple cannot be used"):
        condense.task(())
    with pytest.raises(CondenseError, match=r"write NAME=PATH with one name"):
        condense.task("a=" * 3000 + "digits")


def test_class_names_of_an_hdf5_file_may_be_numbers(tmp_path):
    arrays = dict(zip(KEYS, tiny_arrays()))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for key, value in arrays.items():
            file[key] = value
        file["classes"] = np.array([7, 8, 9])
    assert load_task(tmp_path / "x.h5").classes == ("7", "8", "9")
