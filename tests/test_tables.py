"""condense.data: tables of file,label, and Hugging Face datasets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from condense.data import DataOptions, load_task
from condense.errors import CondenseError


@pytest.fixture
def images(tmp_path):
    """Twelve grey images i0.png to i11.png, each of one value, in tmp_path/images."""
    (tmp_path / "images").mkdir()
    for index in range(12):
        Image.new("L", (4, 4), 10 * index).save(tmp_path / "images" / f"i{index}.png")
    return tmp_path


def write(folder, lines, name="data.csv"):
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def values(split) -> list[tuple[int, int]]:
    return [(int(image[0, 0, 0]) // 10, int(label)) for image, label in zip(split.images, split.labels)]


ROWS = [f"images/i{index}.png,{('dog', 'cat')[index % 2]}" for index in range(12)]


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (ROWS, "data.csv"),
        (["file,label", *ROWS], "data.csv"),
        (["anything,else", *ROWS], "data.csv"),
        (["\ufeffFilename,Class", *ROWS], "data.csv"),
        (["id,label,path", *(f"7,{row.split(',')[1]},{row.split(',')[0]}" for row in ROWS)], "data.csv"),
        ([row.replace(",", "\t") for row in ROWS], "data.tsv"),
        ([row.replace(",", ";") for row in ROWS], "data.csv"),
        (["file,label", *(row.replace("/", "\\") for row in ROWS)], "data.csv"),
    ],
)
def test_tables_of_file_and_label(images, lines, name):
    task = load_task(write(images, lines, name))
    assert (task.name, task.classes, task.shape) == ("data", ("cat", "dog"), (1, 4, 4))
    pairs = values(task.train) + values(task.test)
    assert sorted(pairs) == [(index, 1 - index % 2) for index in range(12)] and len(task.test) == 2
    assert load_task(f"pets={images / name}").name == "pets"


def test_a_column_gives_the_parts(images, caplog):
    parts = ["Train"] * 6 + ["validation"] * 2 + ["test"] * 4
    task = load_task(write(images, ["file,label,split", *(f"{row},{part}" for row, part in zip(ROWS, parts))]))
    assert sorted(index for index, _ in values(task.train)) == list(range(6))
    assert sorted(index for index, _ in values(task.test)) == list(range(8, 12))
    assert "not used: 2 images (val)" in caplog.text
    parts = ["train"] * 8 + ["dev"] * 4
    task = load_task(write(images, ["file,label,split", *(f"{row},{part}" for row, part in zip(ROWS, parts))]))
    assert len(task.test) == 4


def test_number_labels_are_sorted_by_value_and_holes_are_allowed(images):
    task = load_task(write(images, [f"images/i{index}.png,{(10, 9, 100)[index % 3]}" for index in range(12)]))
    assert task.classes == ("9", "10", "100")


FAULTS = {
    "no such file": ([*ROWS, "images/none.png,cat"], "'images/none.png': no such file"),
    "outside": ([*ROWS, "../secret.png,cat"], "'../secret.png' is outside the folder of the table"),
    "absolute": ([*ROWS, "/etc/passwd,cat"], "'/etc/passwd' is outside the folder of the table"),
    "folder": ([*ROWS, "images,cat"], "'images' is not a regular file"),
    "no label": ([*ROWS, "images/i0.png,"], "line 13 lacks the label"),
    "twice": ([*ROWS, ROWS[0]], "'images/i0.png' is listed twice; remove one line"),
    "two labels": ([*ROWS, "images/i0.png,cat"], "listed twice; as dog and cat; multi-label data are not supported"),
    "list of labels": ([*ROWS[:-1], "images/i11.png,cat|dog"], "the label 'cat|dog' names several classes"),
    "one-hot": (["file,cat,dog", "images/i0.png,1,0"], "no column label .*one class per file; it has file, cat, dog"),
    "part": (["file,label,split", "images/i0.png,cat,other"], "line 2: unknown part 'other'"),
    "one class": ([row.replace("dog", "cat") for row in ROWS], "only one class, 'cat'"),
    "empty": ([""], "is empty"),
    "unseen": (
        ["file,label,split", *(f"{row},train" for row in ROWS), "images/../images/i0.png,wasp,test"],
        "no train images of class wasp; drop_empty=true",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_tables_are_one_line(images, fault):
    lines, expected = FAULTS[fault]
    (images / "sub").mkdir()
    with pytest.raises(CondenseError, match=expected.replace("|", r"\|")) as error:
        load_task(write(images, lines))
    assert "\n" not in str(error.value) and "data.csv" in str(error.value)


def test_tables_may_leave_out_classes_of_the_test_part(images, caplog):
    lines = ["file,label,split", *(f"{row},{'train' if index < 8 else 'test'}" for index, row in enumerate(ROWS))]
    lines.append("images/../images/i0.png,wasp,test")
    task = load_task(write(images, lines), DataOptions(drop_empty=True))
    assert task.classes == ("cat", "dog") and len(task.test) == 4
    assert "not used: 1 images (of other classes)" in caplog.text


def test_tables_that_are_no_text(images):
    (images / "x.csv").write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(CondenseError, match="cannot be read as a table in UTF-8"):
        load_task(images / "x.csv")


# Rows of datasets -----------------------------------------------------------------------------------------------------


def hugging_face(count=20, bits=8, **columns):
    datasets = pytest.importorskip("datasets")
    kind = np.uint8 if bits == 8 else np.uint16
    pictures = [Image.fromarray(np.full((4, 4), (2**bits - 1) * i // (count - 1), kind)) for i in range(count)]
    names = {"image": "image", "label": "label"} | columns
    features = {
        names["image"]: datasets.Image(),
        names["label"]: datasets.ClassLabel(names=["cat", "dog"]),
        "coarse": datasets.Value("int64"),
    }
    content = {names["image"]: pictures, names["label"]: [i % 2 for i in range(count)], "coarse": [0] * count}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


@pytest.mark.parametrize("columns", [{}, {"image": "img", "label": "fine_label"}, {"image": "x", "label": "y"}])
def test_hugging_face_datasets(columns):
    dataset = hugging_face(**columns)
    task = load_task((dataset, dataset))
    assert task.classes == ("cat", "dog") and task.train.labels.tolist() == [0, 1] * 10
    assert task.train.images[:, 0, 0, 0].tolist() == [255 * i // 19 for i in range(20)]
    import datasets

    for parts in ({"train": dataset, "test": dataset}, {"train": dataset, "validation": dataset}):
        assert load_task(datasets.DatasetDict(parts)).fingerprint == task.fingerprint
    assert len(load_task(datasets.DatasetDict(train=dataset)).test) == 4


def test_hugging_face_data_by_name(tmp_path, monkeypatch):
    dataset = hugging_face()
    import datasets

    parts = datasets.DatasetDict(train=dataset, test=dataset)
    parts.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    for name, part in parts.items():
        part.to_parquet(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet")
    for folder in ("saved", "parquet"):
        task = load_task(f"mine=hf:{tmp_path / folder}")
        assert task.name == "mine" and task.source == f"mine=hf:{tmp_path / folder}"
        assert task.fingerprint == load_task(parts).fingerprint
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    is_offline = datasets.config.HF_HUB_OFFLINE
    for data, message in (("hf:owner/nothing-here", "give --download to fetch it"), ("hf:a/b/c", "hf:OWNER/NAME")):
        with pytest.raises(CondenseError, match=message):
            load_task(data)
    assert datasets.config.HF_HUB_OFFLINE is is_offline


def test_hugging_face_datasets_with_12_bits(caplog):
    dataset = hugging_face(bits=12)
    task = load_task((dataset, dataset))
    assert task.train.images[:, 0, 0, 0].tolist() == [round(4095 * i // 19 / 4095 * 255) for i in range(20)]
    assert "0..4095 becomes 0..255" in caplog.text


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"image": np.zeros((1, 4, 4), np.uint8), "label": [0, 1]}, "has 2 labels; multi-label data are not supported"),
        ({"photo": np.zeros((1, 4, 4), np.uint8), "label": 0}, "has the columns photo, label; rename .* to 'image'"),
        ({"image": np.zeros((1, 4, 4), np.uint8), "kind": 0}, "rename .* to 'label'"),
        ((np.zeros((1, 4, 4), np.uint8), np.ones(3)), "has 3 labels"),
    ],
)
def test_faults_of_rows(item, expected):
    with pytest.raises(CondenseError, match=expected):
        load_task([[item] * 4])
