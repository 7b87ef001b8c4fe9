"""Import and export: round trips, other people's files as they are, and files that are wrong or mean harm."""

import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line, tiny_arrays
from PIL import Image
from test_distilled import make

import condense
from condense.cli import EXIT_CODES
from condense.data import ZCA, DataOptions, Standardise
from condense.errors import CondenseError
from condense.exchange import eight_bits, export_set, folder_name, import_set
from condense.judge import evaluation
from condense.labels import SoftLabels
from condense.sets import DistilledSet

LABELS = torch.arange(3).repeat_interleave(2)


def pixels(seed=0, count=6):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def bring(source, form, data, **how):
    return import_set(source, form, data, network="mlp", **how)


@pytest.fixture
def task():
    """The tiny data with the class names of ``make``."""
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    return condense.task({**dict(zip(keys, tiny_arrays())), "classes": ["a", "b", "c"]}, name="tiny")


def whitening():
    return ZCA.fit(torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(1)))


KINDS = {
    "hard": lambda: make(),
    "soft": lambda: make(labels=SoftLabels(torch.eye(3)[LABELS] * 4)),
    "zca": lambda: make(transform=whitening()),
    "learned lr": lambda: make(learned_lr=0.0123),
    "uint8": lambda: make(torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8), space="pixel"),
    "float16": lambda: make(pixels().half()),
    "decoded": lambda: make(decode=[{"stage": "formation", "factor": 2, "pad": 0.0}]),
}


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("to", "form"), [("pt", "dc"), ("pt", "tensors"), ("safetensors", "tensors")])
def test_what_is_exported_comes_back_the_same(kind, to, form, task, tmp_path):
    original = KINDS[kind]()
    export_set(original, tmp_path / f"a.{to}", to)
    back = bring(tmp_path / f"a.{to}", form, task)
    images, ids = original.training_images()
    order = torch.argsort(ids, stable=True)
    assert torch.equal(back.training_images()[0], images[order])
    assert torch.equal(back.labels.targets(torch.arange(len(back))), original.labels.targets(ids[order]))
    assert back.transform.arrays().keys() == original.transform.arrays().keys()
    for name, array in back.transform.arrays().items():
        np.testing.assert_array_equal(array, original.transform.arrays()[name])
    assert back.manifest.get("learned_lr") == original.manifest.get("learned_lr")
    assert back.manifest["ipc"] == (8 if kind == "decoded" else 2)


def test_a_pt_export_is_what_other_loaders_take(tmp_path):
    export_set(make(), tmp_path / "a.pt", "pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    [[images, labels]] = content["data"]
    assert images.dtype == torch.float32 and torch.equal(labels, LABELS) and labels.dtype == torch.int64
    assert torch.equal(images, content["images"]) and content["classes"] == ["a", "b", "c"]
    assert json.loads(content["manifest"])["name"] == "tiny/dm-ipc2"


@pytest.mark.parametrize("kind", ["hard", "zca", "uint8", "decoded"])
def test_constants_of_the_program_that_reads_an_export(kind, tmp_path):
    original = KINDS[kind]()
    export_set(original, tmp_path / "a.pt", "pt", mean=[0.25], std=[0.5])
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    order = torch.argsort(original.training_images()[1], stable=True)
    torch.testing.assert_close(content["images"] * 0.5 + 0.25, original.images[order])
    assert content["mean"].tolist() == [0.25] and content["std"].tolist() == [0.5] and "matrix" not in content
    for wrong, words in ((([0.1, 0.2], [1, 1]), "2 numbers for images of 1 channels"), (([0.1], None), "give both")):
        with pytest.raises(CondenseError, match=words):
            export_set(original, tmp_path / "b.pt", "pt", mean=wrong[0], std=wrong[1])
    with pytest.raises(CondenseError, match="--to imagefolder holds pixels"):
        export_set(original, tmp_path / "folder", "imagefolder", mean=[0.25], std=[0.5])


def plain_evaluation(path, seed, test_images, test_labels):
    """Accuracy of a student as the released programs of DC and its followers train it, on an exported file."""
    [[images, labels]] = torch.load(path, weights_only=True)["data"]
    torch.manual_seed(seed)
    layers, channels = [], 1
    for _ in range(2):
        norm = torch.nn.GroupNorm(32, 32, affine=True)
        layers += [torch.nn.Conv2d(channels, 32, 3, padding=1), norm, torch.nn.ReLU(), torch.nn.AvgPool2d(2)]
        channels = 32
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(32 * 2 * 2, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
    for epoch in range(300):
        if epoch == 150:
            optimizer.param_groups[0]["lr"] = 0.001
        order = torch.randperm(len(images))
        for part in order.split(256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images[part]), labels[part]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((net(test_images).argmax(1) == test_labels).float().mean())


def test_an_export_gives_the_accuracy_of_the_judge_in_a_plain_program(tmp_path):
    """With the constants of that program: the means of five students differ by less than their 95 % interval."""
    from scipy.stats import ttest_ind

    distilled, digits = condense.load("digits/dm-ipc10"), condense.task("digits")
    network = "convnet-d2-w32-in"
    judged = condense.evaluate(
        distilled, digits, networks=[network], runs=5, protocol="dc-plain-v1", controls=[], precision="fp32"
    )
    export_set(distilled, tmp_path / "a.pt", "pt", mean=[0.5], std=[0.25])
    images = (torch.from_numpy(digits.test.images).float() / 255 - 0.5) / 0.25
    labels = torch.from_numpy(digits.test.labels)
    plain = [plain_evaluation(tmp_path / "a.pt", seed, images, labels) for seed in range(5)]
    difference = ttest_ind(judged["results"][0]["accuracies"], plain, equal_var=False).confidence_interval(0.95)
    assert difference.low <= 0 <= difference.high and min(plain) > 0.9


def test_a_manifest_of_an_imported_set(task, tmp_path):
    torch.save(pixels(), tmp_path / "a.pt")
    made = bring(tmp_path / "a.pt", "tensors", task, method="them", protocol="quick-v1")
    made.save(tmp_path / "a.h5")
    manifest = condense.load(tmp_path / "a.h5").manifest
    assert manifest["name"] == "tiny/them-ipc2" and manifest["cost"] == {} and manifest["protocol"] == "quick-v1"
    assert manifest["data"]["fingerprint"] == task.fingerprint and manifest["network"] == "mlp"
    assert set(manifest["imported"]["sha256"]) == {"a.pt"} and manifest["imported"]["from"] == "tensors"


def test_an_imported_set_can_be_judged(task, tmp_path):
    torch.save(task.batch(torch.arange(0, 36, 6)), tmp_path / "a.pt")
    made = bring(tmp_path / "a.pt", "tensors", task, protocol="quick-v1", lr=0.02)
    record = condense.evaluate(made, task, networks="mlp", runs=1, controls=[])
    assert record["results"][0]["arm"] == "distilled" and record["cost"] == {}


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_folder_of_8_bit_images_loses_nothing(channels, tmp_path):
    images = tiny_arrays(channels=channels)[0][[0, 1, 12, 13, 24, 25]]
    names = ["train", "this/that: 50 %", ".hidden"]
    task = condense.task(
        {"train_images": tiny_arrays(channels=channels)[0], "train_labels": tiny_arrays()[1], "classes": names},
        name="tiny",
    )
    original = make(torch.from_numpy(images), transform=task.transform, space="pixel", classes=names)
    rounding = export_set(original, tmp_path / "pictures", "imagefolder")
    assert (rounding.clipped, rounding.largest) == (0.0, pytest.approx(0, abs=1e-4))
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 6
    assert Image.open(tmp_path / "pictures" / "train" / "000.png").mode == ("L" if channels == 1 else "RGB")
    back = bring(tmp_path / "pictures", "imagefolder", task)
    assert torch.equal(back.stored, original.stored) and torch.equal(back.labels.labels, LABELS)
    assert back.manifest["space"] == "pixel"


@pytest.mark.parametrize("folders", [["00", "01", "02"], ["new000", "new001", "new002"]])
def test_class_folders_may_be_numbered(folders, task, tmp_path):
    for value, name in enumerate(folders):
        (tmp_path / "a" / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / "a" / "train" / name / "x.png")
    assert bring(tmp_path / "a", "imagefolder", task).stored[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_folder_names_are_safe():
    assert folder_name("a/b\\c") == "a%2Fb%5Cc" and folder_name("..") == "%2E%2E" and folder_name("") == "%"
    assert folder_name("sweet pepper, red") == "sweet pepper, red"


def test_the_cost_of_8_bits_is_what_it_is():
    stored = torch.tensor([-1.0, 0.5 / 255, 0.25, 2.0]).reshape(1, 1, 2, 2).repeat(6, 1, 1, 1)
    unit = Standardise(torch.zeros(1), torch.ones(1))
    rounding = eight_bits(make(stored, transform=unit))
    assert rounding.clipped == 0.5 and rounding.largest == 255
    assert rounding.mean == pytest.approx((255 + 0.5 + 0.25 + 255) / 4)
    assert rounding.rounded.stored[0].flatten().tolist() == [0, 0, 64, 255]


def test_accuracy_lost_is_a_paired_difference(task):
    made = make(task.batch(torch.arange(0, 36, 6)), transform=task.transform, network="mlp", protocol="quick-v1")
    same = evaluation.accuracy_lost(made, made, task, runs=2)
    assert same["before"] == same["after"] and same["difference"] == 0 and same["ci95"] == [0, 0]
    other = make(pixels(), transform=task.transform, network="mlp", protocol="quick-v1")
    lost = evaluation.accuracy_lost(made, other, task, runs=2)
    assert lost["difference"] == pytest.approx(lost["after"] - lost["before"]) and lost["difference"] < 0


# -- other people's files ---------------------------------------------------------------------------------------------


def dc_file(path, numpy_module="numpy._core.multiarray", legacy=False):
    """What the DC, DSA and DM scripts save; numpy 1 calls its module ``numpy.core.multiarray``."""
    data = [[pixels(seed), LABELS.clone()] for seed in (0, 1)]
    accuracies = {"ConvNet": [np.float64(0.25), np.float32(0.5)]}
    written = io.BytesIO()
    torch.save({"data": data, "accs_all_exps": accuracies}, written, _use_new_zipfile_serialization=not legacy)
    content = written.getvalue()
    if legacy:
        path.write_bytes(content.replace(b"numpy._core.multiarray", numpy_module.encode()))
        return path
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, old.read(entry).replace(b"numpy._core.multiarray", numpy_module.encode()))
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_dc_files_with_numpy_accuracies(module, legacy, task, tmp_path):
    path = dc_file(tmp_path / "res_DM.pt", module, legacy)
    assert module.encode() in path.read_bytes()
    last = bring(path, "dc", task)
    assert torch.equal(last.stored, pixels(1)) and last.name == "tiny/dc-ipc2"
    assert torch.equal(bring(path, "dc", task, index=0).stored, pixels(0))
    assert last.manifest["imported"]["experiment"] == 1
    np.testing.assert_array_equal(last.transform.arrays()["mean"], task.transform.arrays()["mean"])


def test_images_that_were_not_normalised(task, tmp_path):
    torch.save(torch.rand(6, 1, 8, 8), tmp_path / "a.pt")
    made = bring(tmp_path / "a.pt", "tensors", task, mean=[0], std=[1])
    assert torch.equal(made.images, made.stored)


def test_the_makers_own_constants(task, tmp_path):
    made = bring(dc_file(tmp_path / "a.pt"), "dc", task, mean=[0.5], std=[0.25])
    torch.testing.assert_close(made.images, pixels(1) * 0.25 + 0.5)


@pytest.fixture
def mtt(tmp_path):
    for name, seed in (("20", 1), ("100", 2), ("zca_100", 3)):
        torch.save(pixels(seed), tmp_path / f"images_{name}.pt")
        torch.save(LABELS, tmp_path / f"labels_{name}.pt")
    return tmp_path


def test_mtt_takes_the_best_else_the_last(mtt, task):
    assert torch.equal(bring(mtt, "mtt", task).stored, pixels(2))
    torch.save(pixels(4), mtt / "images_best.pt")
    torch.save(torch.tensor([0, 1, 2, 0, 1, 2]), mtt / "labels_best.pt")
    torch.save(torch.tensor(0.02), mtt / "lr_best.pt")
    made = bring(mtt, "mtt", task)
    assert torch.equal(made.stored, pixels(4)[[0, 3, 1, 4, 2, 5]]) and torch.equal(made.labels.labels, LABELS)
    assert made.manifest["learned_lr"] == pytest.approx(0.02)
    assert set(made.manifest["imported"]["sha256"]) == {"images_best.pt", "labels_best.pt", "lr_best.pt"}
    assert torch.equal(bring(mtt / "images_20.pt", "mtt", task).stored, pixels(1))


def test_whitened_images_get_the_whitening_of_the_data(mtt):
    made = bring(mtt, "mtt", tiny_arrays(), options=DataOptions(zca=True))
    fitted = condense.task(tiny_arrays(), zca=True).transform
    assert made.transform.kind == "zca" and made.manifest["imported"]["transform"] == "ZCA fitted on data"
    np.testing.assert_array_equal(made.transform.arrays()["matrix"], fitted.arrays()["matrix"])


@pytest.mark.parametrize("given", ["0.03", "lr.pt", "number.pt"])
def test_a_learned_step_size(given, mtt, task):
    torch.save(torch.tensor([0.03]), mtt / "lr.pt")
    torch.save(0.03, mtt / "number.pt")
    lr = given if given == "0.03" else str(mtt / given)
    assert bring(mtt, "mtt", task, lr=lr).manifest["learned_lr"] == pytest.approx(0.03)


def test_soft_labels_are_probabilities_or_logits(mtt, task):
    """Rows 1 and 4 have the same likeliest class as 0, so these labels do not say how to sort."""
    logits = torch.tensor([[3.0, 1, 0], [2, 0, 1], [0, 4, 1], [0, 2, 1], [5, 0, -1], [0, 1, 2]])
    probabilities = logits.softmax(1)
    probabilities[0] = torch.tensor([1.0, 0.0, 0.0])
    for labels, expected in ((probabilities, probabilities), (logits, logits.softmax(1))):
        torch.save(labels, mtt / "soft.pt")
        made = bring(mtt / "images_20.pt", "mtt", task, labels=mtt / "soft.pt")
        assert made.labels.kind == "soft" and "protocol" not in made.manifest
        torch.testing.assert_close(made.labels.targets(torch.arange(6)), expected)


def test_soft_labels_sort_by_the_likeliest_class_where_it_comes_out_even(task, tmp_path):
    logits = 4 * torch.eye(3)[torch.tensor([2, 0, 1, 1, 0, 2])]
    torch.save(pixels(), tmp_path / "images.pt")
    torch.save(logits, tmp_path / "labels.pt")
    made = bring(tmp_path / "images.pt", "tensors", task, labels=tmp_path / "labels.pt", label_values="logits")
    assert torch.equal(made.stored, pixels()[[1, 4, 2, 3, 0, 5]])
    assert made.hard_labels().tolist() == made.labels.logits.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]


def test_tensors_alone_are_sorted_by_class(task, tmp_path):
    from safetensors.torch import save_file

    torch.save(pixels().double(), tmp_path / "a.pt")
    save_file({"whatever": pixels()}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        made = bring(tmp_path / name, "tensors", task)
        assert torch.equal(made.stored, pixels()) and torch.equal(made.labels.labels, LABELS)
        assert made.manifest["imported"]["labels"] == "by class order"


# -- files that mean harm ---------------------------------------------------------------------------------------------


class Harm:
    """Unpickled carelessly, it creates the file ``marker``."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_harm(path, how, marker):
    if how == "pickle":
        path.write_bytes(pickle.dumps({"data": Harm(marker)}, protocol=2))
    elif how == "newer pickle":
        path.write_bytes(pickle.dumps(Harm(marker)))
    else:
        torch.save([pixels(), Harm(marker)], path, _use_new_zipfile_serialization=how == "torch")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``call(words)`` runs the command line in a folder with tiny data (data.npz) and a set (set.h5)."""
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(tmp_path / "data.npz", **dict(zip(keys, tiny_arrays())), classes=np.array(["a", "b", "c"]))
    make(network="mlp", protocol="quick-v1").save(tmp_path / "set.h5")
    torch.save(pixels(), tmp_path / "images.pt")
    monkeypatch.chdir(tmp_path)
    return lambda words: command_line(words, capsys)


@pytest.fixture
def refused(call):
    """``refused(words, *expected)``: code 2, one line with all of ``expected``, nothing written."""

    def check(words, *expected):
        before = sorted(Path().rglob("*"))
        result = call(words)
        assert result.code == 2, result.err
        assert result.out == "" and result.err.startswith("condense: ") and result.err.count("\n") == 1, result.err
        for part in expected:
            assert part in result.err
        assert sorted(Path().rglob("*")) == before

    return check


IMPORT = "--data data.npz --out new.h5 --network mlp"


@pytest.mark.filterwarnings("error")  # a warning would be a second line
@pytest.mark.parametrize("how", ["pickle", "newer pickle", "torch", "old torch"])
@pytest.mark.parametrize(
    "words",
    [
        "import harm.pt --from dc",
        "import harm.pt --from mtt",
        "import run --from mtt",
        "import harm.pt --from tensors",
        "import images.pt --from tensors --labels harm.pt",
        "import images.pt --from mtt --labels harm.pt",
        "import images.pt --from mtt --lr harm.pt",
    ],
)
def test_code_in_a_file_is_not_executed(words, how, call, refused, tmp_path):
    write_harm(tmp_path / "harm.pt", how, tmp_path / "marker")
    (tmp_path / "run").mkdir()
    torch.save(pixels(), tmp_path / "run" / "images_best.pt")
    write_harm(tmp_path / "run" / "labels_best.pt", how, tmp_path / "marker")
    refused(f"{words} {IMPORT}", ".pt: not read, because it", "tensors alone")
    assert not (tmp_path / "marker").exists()


def rewritten(path, change, method=zipfile.ZIP_STORED):
    """A torch archive whose members went through ``change``."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, change(content))


def test_claims_larger_than_the_file(call, refused):
    torch.save(torch.zeros(1).expand(600_000, 1, 8, 8), "expanded.pt")
    refused(f"import expanded.pt --from tensors {IMPORT}", "claim 153600000 bytes, more than the file holds")
    torch.save(torch.zeros(6, 1, 8, 8), "deflated.pt")
    rewritten("deflated.pt", lambda content: content, zipfile.ZIP_DEFLATED)
    refused(f"import deflated.pt --from tensors {IMPORT}", "deflated.pt: a compressed archive")
    torch.save(torch.zeros(6, 1, 8, 8), "short.pt")
    rewritten("short.pt", lambda content: content[:64] if len(content) == 6 * 64 * 4 else content)
    refused(f"import short.pt --from tensors {IMPORT}", "short.pt: cannot be read")
    Path("cut.pt").write_bytes(Path("images.pt").read_bytes()[:900])
    refused(f"import cut.pt --from tensors {IMPORT}", "cut.pt: ")
    Path("cut.safetensors").write_bytes(b"\xff\xff\xff\xff\0\0\0\0{}")
    refused(f"import cut.safetensors --from tensors {IMPORT}", "cut.safetensors: cannot be read")


# -- mistakes ---------------------------------------------------------------------------------------------------------

WRONG = {
    "shape": (torch.zeros(6, 3, 8, 8), None, ("6x3x8x8", "data Nx1x8x8", "resize=")),
    "one image": (torch.zeros(1, 8, 8), None, ("1x8x8", "data Nx1x8x8")),
    "no image": (torch.zeros(0, 1, 8, 8), None, ("0x1x8x8",)),
    "not finite": (torch.full((6, 1, 8, 8), torch.nan), None, ("some pixels are not finite",)),
    "whole numbers": (torch.zeros(6, 1, 8, 8, dtype=torch.int64), None, ("torch.int64", "training space")),
    "sparse": (pixels().to_sparse(), None, ("expected a tensor of images",)),
    "a list": ([1, 2], None, ("expected a tensor of images, found int",)),
    "a dict": ({"pictures": pixels()}, None, ("holds pictures, but no 'images'",)),
    "plain pixels": (torch.rand(6, 1, 8, 8), None, ("lie in [0,1]", "uint8", "--mean 0 --std 1")),
    "uneven count": (pixels(count=7), None, ("7 images", "3 classes", "--labels FILE")),
    "a class without images": (pixels(), torch.tensor([0, 0, 0, 1, 1, 1]), ("class 'c' has 0 images",)),
    "few labels": (pixels(), torch.tensor([0, 1, 2]), ("6 images but labels torch.int64 3",)),
    "labels too high": (pixels(), torch.tensor([0, 0, 1, 1, 3, 3]), ("from 0 to 3", "classes 0 to 2")),
    "labels below": (pixels(), torch.tensor([-1, 0, 1, 1, 2, 2]), ("from -1 to 2",)),
    "boolean labels": (pixels(), torch.ones(6, dtype=torch.bool), ("torch.bool",)),
    "float labels": (pixels(), torch.full((6,), 0.5), ("torch.float32 6", "floats (6, 3)")),
    "soft labels of other classes": (pixels(), torch.zeros(6, 4), ("6x4", "floats (6, 3)")),
    "soft labels not finite": (pixels(), torch.full((6, 3), torch.inf), ("some labels are not finite",)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line(name, call, refused):
    images, labels, expected = WRONG[name]
    torch.save(images, "a.pt")
    torch.save(labels, "labels.pt")
    words = "" if labels is None else "--labels labels.pt"
    refused(f"import a.pt --from tensors {words} {IMPORT}", "a.pt" if labels is None else "labels.pt", *expected)


MISTAKES = {
    "unknown form": (f"import images.pt --from mttt {IMPORT}", "--from mttt", "did you mean 'mtt'?"),
    "unknown target": ("export set.h5 o --to ptt", "--to ptt", "did you mean 'pt'?"),
    "no such file": (f"import none.pt --from dc {IMPORT}", "none.pt: no such file"),
    "a folder for a file": (f"import folder --from dc {IMPORT}", "folder: is a folder"),
    "a folder without images": (f"import folder --from mtt {IMPORT}", "no images_best.pt"),
    "a folder without classes": (f"import empty --from imagefolder {IMPORT}", "'empty' holds no class folders"),
    "folders of other classes": (f"import folder --from imagefolder {IMPORT}", "folder alone has 'x'", "--data"),
    "a missing class folder": (f"import some --from imagefolder {IMPORT}", "data alone has 'c'"),
    "no dc file": (f"import images.pt --from dc {IMPORT}", "no list 'data'", "--from tensors"),
    "no experiment": (f"import nothing.pt --from dc {IMPORT}", "no list 'data'"),
    "no such experiment": (f"import dc.pt --from dc --index 2 {IMPORT}", "--index 2", "2 experiments", "0 to 1"),
    "an index elsewhere": (f"import images.pt --from mtt --index 0 {IMPORT}", "--index 0", "leave it out"),
    "labels elsewhere": (f"import dc.pt --from dc --labels images.pt {IMPORT}", "--labels images.pt", "leave it out"),
    "pictures for viewing": (f"import images_zca_5.pt --from mtt {IMPORT}", "for viewing", "give images_5.pt"),
    "lr zero": (f"import images.pt --from mtt --lr 0 {IMPORT}", "--lr 0", "above 0"),
    "lr in words": (f"import images.pt --from mtt --lr fast {IMPORT}", "fast: no such file"),
    "lr of images": (f"import images.pt --from mtt --lr images.pt {IMPORT}", "--lr images.pt", "one number"),
    "mean alone": (f"import images.pt --from mtt --mean 0.5 {IMPORT}", "--mean and --std go together"),
    "mean in words": (f"import images.pt --from mtt --mean a,b --std 1 {IMPORT}", "--mean a,b", "numbers"),
    "mean and zca": (f"import images.pt --from mtt --mean 0 --std 1 {IMPORT} zca=true", "zca=true", "--mean"),
    "std zero": (f"import images.pt --from mtt --mean 0 --std 0 {IMPORT}", "--std 0", "above 0"),
    "mean not finite": (f"import images.pt --from mtt --mean nan --std 1 {IMPORT}", "--mean nan"),
    "mean of three channels": (f"import images.pt --from mtt --mean 0,0,0 --std 1,1,1 {IMPORT}", "1 channels"),
    "unknown network": (f"import images.pt --from mtt {IMPORT} --network lenat", "did you mean 'lenet'?"),
    "unknown protocol": (f"import images.pt --from mtt {IMPORT} --protocol quick-v2", "'quick-v2'"),
    "a bad method": (f"import images.pt --from mtt {IMPORT} --method a/b", "'a/b'"),
    "unknown setting": (f"import images.pt --from mtt {IMPORT} zcaa=true", "zcaa=true", "did you mean 'zca'"),
    "other data": ("import own.pt --from tensors --data digits --network mlp --out new.h5", "a, b, c", "--data"),
    "an output that exists": ("import images.pt --from mtt --data data.npz --out set.h5", "set.h5 exists", "--force"),
    "an export that exists": ("export set.h5 images.pt --to pt", "images.pt exists", "--force"),
    "a folder that exists": ("export set.h5 folder --to imagefolder", "folder exists", "--force"),
    "a folder of others": ("export set.h5 folder --to imagefolder --force", "no export wrote it", "another"),
    "a file for a folder": ("export set.h5 images.pt --to hf --force", "images.pt is a file"),
    "soft labels as folders": ("export soft.h5 new --to imagefolder", "soft labels", "--to pt"),
    "two channels": ("export two.h5 new --to imagefolder", "1 or 3 channels, not 2"),
    "data where nothing is rounded": ("export set.h5 a.pt2 --to pt --data digits", "--data digits", "imagefolder"),
    "no set": ("export none.h5 a.pt2 --to pt", "none.h5: no such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, call, refused):
    for folder in ("folder/x", "folder/b", "folder/c", "some/a", "some/b", "empty"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        if folder != "empty":
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(f"{folder}/000.png")
    dc_file(Path("dc.pt"))
    torch.save({"data": []}, "nothing.pt")
    torch.save(pixels(), "images_zca_5.pt")
    export_set(make(), "own.pt", "pt")
    make(labels=SoftLabels(torch.zeros(6, 3))).save("soft.h5")
    make(torch.zeros(6, 2, 8, 8), transform=Standardise(torch.zeros(2), torch.ones(2))).save("two.h5")
    if name == "other data":  # of the same shape and number of classes, under other names
        words, *expected = MISTAKES[name]
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        np.savez("others.npz", **dict(zip(keys, tiny_arrays())))
        refused(words.replace("digits", "others.npz"), *expected)
    else:
        refused(*MISTAKES[name])


def test_per_view_labels_stay_in_the_file(tmp_path):
    made = make()
    made.labels.per_view = True
    with pytest.raises(CondenseError, match=r"augmented views.*\.h5") as fault:
        export_set(made, tmp_path / "a.pt", "pt")
    assert "\n" not in str(fault.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("form", "package"), [("hf", "datasets"), ("safetensors", "safetensors")])
def test_a_missing_library(form, package, call, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    refused(f"export set.h5 new --to {form}", f"'{package}'", "pip install 'condense-toolkit[hub]'")


# -- the command line -------------------------------------------------------------------------------------------------


def test_import_and_export_by_hand(call):
    torch.save(torch.arange(3).repeat_interleave(2), "labels.pt")
    result = call(f"import images.pt --from mtt --lr 0.01 --method theirs {IMPORT} zca=true")
    assert result.code == 0, result.err
    assert result.out.startswith("imported data/theirs-ipc2: 6 images, hard labels")
    assert "normalised by: ZCA fitted on data" in result.out and "learned lr: 0.01" in result.out
    assert "next: condense evaluate new.h5 --data data.npz" in result.out
    assert "good; data/theirs-ipc2" in call("verify new.h5").out
    assert "wrote new.pt: 6 images" in call("export new.h5 new.pt --to pt").out
    assert "experiment 1 of 0 to 1" in call(f"import {dc_file(Path('dc.pt'))} --from dc {IMPORT} --force").out


def test_export_of_pictures_tells_what_8_bits_cost(call):
    text = call("export set.h5 'a folder' --to imagefolder").out
    assert "% of pixel values clipped; error" in text and "not measured" in text
    words = "condense export set.h5 'a folder' --to imagefolder --force --data tiny=PATH"
    assert text.rstrip().endswith(words)
    result = call(words[9:].replace("PATH", "data.npz"))
    assert result.code == 0, result.err
    assert "% before" in result.out and "95 % interval" in result.out


@pytest.mark.parametrize("verb", ["import", "export"])
def test_help(verb, call):
    assert " ".join(call(f"{verb} --help").out.split()).endswith(EXIT_CODES)
    [line] = [line for line in call("--help").out.splitlines() if line.startswith(f"  {verb} ")]
    assert line.endswith(".") and not line.endswith("...")


# -- folders are written whole or not at all --------------------------------------------------------------------------


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    export_set(make(), tmp_path / "a", "imagefolder")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.png")}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CondenseError, match="No space left"):
        export_set(make(), tmp_path / "a", "imagefolder", force=True)
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.png")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("form", ["pt", "imagefolder"])
def test_an_export_that_reads_back_differently_is_not_kept(form, tmp_path, monkeypatch):
    save_tensors, save_picture = torch.save, Image.Image.save

    def other_tensors(content, path):
        save_tensors({**content, "images": content["images"] + 1}, path)

    def other_picture(self, *arguments):
        save_picture(self.point(lambda value: 255 - value), *arguments)

    monkeypatch.setattr(torch, "save", other_tensors)
    monkeypatch.setattr(Image.Image, "save", other_picture)
    with pytest.raises(CondenseError, match=r"out: not written, because its (images|a/000\.png) could not be"):
        export_set(make(), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_force_replaces_an_export(tmp_path):
    export_set(make(), tmp_path / "a", "imagefolder")
    first = (tmp_path / "a" / "a" / "000.png").read_bytes()
    export_set(make(pixels(9)), tmp_path / "a", "imagefolder", force=True)
    assert (tmp_path / "a" / "a" / "000.png").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# -- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "soft", "uint8", "decoded"])
def test_hugging_face_opens_the_folder(kind, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    datasets = pytest.importorskip("datasets")
    made = KINDS[kind]()
    export_set(made, tmp_path / "out", "hf")
    table = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    images, ids = made.training_images()
    order = torch.argsort(ids, stable=True)
    targets = made.labels.targets(ids[order])
    if kind == "soft":
        np.testing.assert_array_equal(np.array(table["label"][:], np.float32), targets.numpy())
    else:
        assert table.features["label"].names == ["a", "b", "c"] and list(table["label"]) == targets.tolist()
    if kind == "uint8":
        assert set(table.column_names) == {"image", "label"}
        found = np.stack([np.asarray(image) for image in table["image"]])
        np.testing.assert_array_equal(found, made.stored[:, 0].numpy())
    else:
        np.testing.assert_array_equal(np.array(table["array"][:], np.float32), images[order].numpy())
    assert condense.load(tmp_path / "out" / "set.h5").sha256() == made.sha256()


def test_the_dataset_card(tmp_path):
    import yaml

    export_set(make(paper="A paper"), tmp_path / "out", "hf")
    _, front, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["task_categories"] == ["image-classification"] and card["size_categories"] == ["n<1K"]
    assert card["pretty_name"] == "tiny/dm-ipc2" and card["configs"][0]["data_files"][0]["path"].startswith("data/")
    assert "A paper" in text and 'condense.load("set.h5")' in text and '"dataset": "tiny"' in text
    assert isinstance(condense.load(tmp_path / "out" / "set.h5"), DistilledSet)
