"""Files of other projects: their formats, labels, normalisation, and damage; leftovers of killed processes."""

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import change_protocols, tiny_arrays

import condense
from condense import files
from condense.data import DataOptions
from condense.errors import CondenseError
from condense.exchange import import_set
from condense.judge.records import check_record
from condense.labels import RegressionLabels

LABELS = torch.arange(3).repeat_interleave(2)


def smooth(count=6, channels=1, size=8, seed=0):
    """Images whose neighbouring pixels are alike, (N,C,H,W)."""
    random = torch.Generator().manual_seed(seed)
    small = torch.randn(count, channels, 2, 2, generator=random)
    return F.interpolate(small, (size, size), mode="bilinear", align_corners=True)


@pytest.fixture
def imported(tiny, tmp_path):
    def call(content, name="x.pt", data=tiny, **options):
        path = tmp_path / name
        if name.endswith(".npz"):
            np.savez(path, **content)
        elif name.endswith(".npy"):
            np.save(path, content)
        else:
            torch.save(content, path)
        return import_set(path, "tensors", data, **options)

    return call


def test_containers(imported, tmp_path):
    images = smooth()
    reference = imported(images)
    for content, name in (
        ([images, LABELS], "list.pt"),
        ({"x": images, "y": LABELS}, "names.pt"),
        ({"images": images.numpy(), "labels": LABELS.numpy()}, "a.npz"),
        ({"data": images.numpy(), "targets": LABELS.numpy(), "note": np.array("text")}, "b.npz"),
        (images.permute(0, 2, 3, 1).numpy(), "last.npy"),
    ):
        made = imported(content, name)
        assert torch.equal(made.stored, reference.stored) and torch.equal(made.hard_labels(), LABELS), name
    np.save(tmp_path / "labels.npy", LABELS.flip(0).numpy())
    beside = imported(images.numpy(), "images.npy")
    assert torch.equal(beside.stored, reference.stored[[4, 5, 2, 3, 0, 1]])


def test_pickled_arrays_are_not_loaded(imported):
    with pytest.raises(CondenseError, match=r"cannot be read as a \.npz file"):
        imported({"images": np.array([object()], dtype=object)}, "x.npz")


def test_class_numbers_may_be_floats_or_a_column(imported):
    for labels in (LABELS.float(), LABELS[:, None], LABELS[:, None].double()):
        assert torch.equal(imported([smooth(), labels]).hard_labels(), LABELS)
    with pytest.raises(CondenseError, match="6 images but labels"):
        imported([smooth(), LABELS + 0.5])


def test_classes_may_have_different_numbers(imported, tmp_path):
    made = imported([smooth(4), torch.tensor([2, 0, 1, 1])])
    assert made.hard_labels().tolist() == [0, 1, 1, 2] and made.manifest["ipc"] == 2
    made.save(tmp_path / "s.h5")
    assert len(condense.load(tmp_path / "s.h5")) == 4


def test_packed_sets(imported):
    made = imported(smooth(), factor=2)
    assert (len(made.stored), len(made)) == (6, 24)
    with pytest.raises(CondenseError, match="--factor 0: must be 1 to 16"):
        imported(smooth(), factor=0)


# -- labels of kernel methods -----------------------------------------------------------------------------------------


def test_regression_targets_are_asked_for_and_kept(imported, tiny, tmp_path):
    targets = torch.eye(3)[LABELS] - 1 / 3
    with pytest.raises(CondenseError, match=r"every row of its labels sums to 0.*--label-values regression"):
        imported([smooth(), targets])
    assert imported([smooth(), targets], label_values="logits").labels.kind == "soft"
    with pytest.raises(CondenseError, match="neither class numbers nor probabilities; give --label-values"):
        imported([smooth(), 2 * targets + 0.1])  # also targets that were learned
    made = imported([smooth(), targets], label_values="regression")
    made.save(tmp_path / "r.h5")
    loaded = condense.load(tmp_path / "r.h5")
    assert isinstance(loaded.labels, RegressionLabels) and torch.equal(loaded[0][1], targets[0])
    outputs = torch.randn(6, 3)
    expected = ((outputs - targets) ** 2).sum() / 6 / 2
    torch.testing.assert_close(loaded.loss(outputs, loaded.labels.targets(torch.arange(6))), expected)
    record = condense.evaluate(loaded, tiny, networks="mlp", runs=1, controls=[], protocol="quick-soft-v1")
    assert record["set"]["label_kind"] == "regression"
    assert imported([smooth(), torch.randn(6, 3)], label_values="logits").labels.kind == "soft"


# -- normalisation ----------------------------------------------------------------------------------------------------


def colour(name="cifar10", **options):
    arrays = tiny_arrays(classes=10, channels=3, size=32, train=4, test=2)
    smoothed = [
        torch.nn.functional.avg_pool2d(torch.from_numpy(x).float(), 5, 1, 2).byte().numpy() for x in arrays[::2]
    ]
    return condense.task((smoothed[0], arrays[1], smoothed[1], arrays[3]), name=name, **options)


def test_whitened_images_are_recognised(tmp_path):
    data, white = colour(), colour(zca=True)
    noise = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.save(smooth(10, 3, 32) + 0.6 * noise, tmp_path / "x.pt")  # correlated as whitened published sets are
    with pytest.raises(CondenseError, match=r"its images look whitened .*give zca=true, or state --mean and --std"):
        import_set(tmp_path / "x.pt", "tensors", data)
    assert import_set(tmp_path / "x.pt", "tensors", white).transform.kind == "zca"
    stated = {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert import_set(tmp_path / "x.pt", "tensors", data, **stated).transform.kind == "standardise"


def test_the_normalisation_is_found(tmp_path):
    data = colour(name="own")
    pixels = (smooth(10, 3, 32) / 2 + 0.5).clamp(0, 1)
    pixels[:, :, 0, 0], pixels[:, :, 0, 1] = 0.0, 1.0
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    torch.save((pixels - mean) / std, tmp_path / "x.pt")
    made = import_set(tmp_path / "x.pt", "tensors", data)
    assert "scripts of DC and MTT, at whose ends" in made.manifest["imported"]["transform"]
    torch.testing.assert_close(made.images, pixels, atol=1e-5, rtol=0)
    torch.save(2 * (pixels - mean) / std, tmp_path / "x.pt")  # nothing is clamped at known ends
    assert import_set(tmp_path / "x.pt", "tensors", data).manifest["imported"]["transform"] == "mean and std of own"


def test_pixels_far_outside_their_range_are_named(tmp_path, caplog):
    torch.save(20 * smooth(10, 3, 32), tmp_path / "x.pt")
    import_set(tmp_path / "x.pt", "tensors", colour(name="own"))
    assert "of its pixels lie far outside [0, 1] after mean and std of own" in caplog.text


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.pt", "x.npz"])
def test_flipped_bits_are_found(imported, tmp_path, name):
    content = {"images": smooth()}
    imported({"images": content["images"].numpy()} if name.endswith("npz") else content, name)
    data = bytearray((tmp_path / name).read_bytes())
    with zipfile.ZipFile(tmp_path / name) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[entry.header_offset + 700] ^= 64
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CondenseError, match="damaged"):
        import_set(tmp_path / name, "tensors", condense.task(tiny_arrays(), name="tiny"))
    with pytest.raises(CondenseError, match="damaged"):
        files.check_data_file(tmp_path / name)


def test_git_lfs_pointers_are_named(tmp_path, tiny):
    (tmp_path / "x.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CondenseError, match="a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"):
        import_set(tmp_path / "x.pt", "dc", tiny)


def test_archives_that_unpack_to_gigabytes(tmp_path, tiny):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(30_000_000))
    with pytest.raises(CondenseError, match="more than a thousand times the file"):
        import_set(tmp_path / "x.npz", "tensors", tiny, options=DataOptions())


# -- leftovers --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes")
def test_leftovers_of_killed_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (tmp_path / f".set.h5.{process}.tmp").write_text("partial")
        (tmp_path / f".folder.{process}.tmp").mkdir()
    (tmp_path / f".other.h5.{dead.pid}.tmp").write_text("of another file")
    (tmp_path / f".folder.{dead.pid}.old").mkdir()
    with files.atomic_write(tmp_path / "set.h5") as temporary:
        temporary.write_text("whole")
    with files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("whole")
    left = sorted(path.name for path in tmp_path.iterdir())
    running = os.getppid()
    expected = ["folder", "set.h5", f".set.h5.{running}.tmp", f".folder.{running}.tmp", f".other.h5.{dead.pid}.tmp"]
    assert left == sorted(expected)


def test_records_of_imported_sets_say_so(imported, tiny, tmp_path, monkeypatch):
    change_protocols(monkeypatch, tmp_path / "protocols", steps=2)
    options = {"networks": "mlp", "runs": 1, "protocol": "quick-v1", "controls": [], "quiet": True}
    record = condense.evaluate(imported([smooth(), LABELS]), tiny, **options)
    assert record["set"]["origin"] == "published-set" and check_record(record) == []
    made = condense.distill("random", tiny, 1, network="mlp", quiet=True)
    assert "origin" not in condense.evaluate(made, tiny, **options)["set"]


@pytest.mark.parametrize(
    ("name", "labels", "found"),
    [
        ("x.npz", np.array(["b", "a", "c"] * 2), "an array of <U1"),
        ("x.npz", np.zeros(6, complex), "an array of complex128"),
        ("x.pt", [2, 1, 0, 2, 1, 0], "list"),
    ],
)
@pytest.mark.parametrize("key", ["labels", "targets", "y"])
def test_labels_of_another_type_are_refused_not_left_out(imported, name, labels, found, key):
    images = smooth() if name == "x.pt" else smooth().numpy()
    with pytest.raises(CondenseError, match=f"expected a tensor of labels, found {found}"):
        imported({"images": images, key: labels}, name=name)


def test_a_compressed_archive_may_be_smaller_than_its_arrays(tiny, tmp_path):
    images = np.zeros((6, 1, 8, 8), np.float32) + LABELS.numpy()[:, None, None, None]
    np.savez_compressed(
        tmp_path / "x.npz", images=np.repeat(images, 50, 0), labels=LABELS.repeat_interleave(50).numpy()
    )
    made = import_set(tmp_path / "x.npz", "tensors", tiny)
    assert len(made.stored) == 300 and (tmp_path / "x.npz").stat().st_size < made.stored.numel()


@pytest.mark.parametrize(("mean", "std"), [("0.5", "0.5"), ([0.5], [-1]), ([None], [0.5])])
def test_mean_and_std_are_numbers(imported, mean, std):
    with pytest.raises(CondenseError, match="give one number per channel each"):
        imported([smooth(), LABELS], mean=mean, std=std)


def test_the_number_of_an_experiment_is_whole(tiny, tmp_path):
    torch.save({"data": [[smooth(), LABELS]]}, tmp_path / "x.pt")
    with pytest.raises(CondenseError, match="--index 'a': must be a whole number"):
        import_set(tmp_path / "x.pt", "dc", tiny, index="a")
