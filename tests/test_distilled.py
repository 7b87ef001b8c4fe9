"""The file: round trips, and every way in which a file can be wrong."""

import contextlib

import h5py
import numpy as np
import pytest
import torch

import condense
from condense import hdf5
from condense.data import ZCA, Standardise
from condense.errors import CondenseError
from condense.labels import HardLabels, SoftLabels
from condense.sets import DISTILLED_FORMAT, DistilledSet, save_grid


def make(stored=None, labels=None, transform=None, **manifest):
    stored = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) if stored is None else stored
    labels = labels or HardLabels(torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    transform = transform or Standardise(torch.tensor([0.4]), torch.tensor([0.2]))
    base = {
        "name": "tiny/dm-ipc2",
        "dataset": "tiny",
        "classes": ["a", "b", "c"],
        "ipc": 2,
        "space": "training",
        "decode": [],
        "method": "dm",
        "network": "mlp",
        "cost": {},
    }
    return DistilledSet(stored, labels, transform, {**base, **manifest})


def test_round_trip(tmp_path):
    original = make()
    original.save(tmp_path / "a.h5")
    loaded = condense.load(tmp_path / "a.h5")
    assert torch.equal(loaded.stored, original.stored)
    assert torch.equal(loaded.labels.labels, original.labels.labels)
    assert loaded.manifest == original.manifest
    assert loaded.sha256() == original.sha256()


def test_pixel_view_and_transform_invert_each_other():
    made = make()
    torch.testing.assert_close(made.images, made.stored * 0.2 + 0.4)
    torch.testing.assert_close(made.transform(made.images), made.stored)
    image, target = made[3]
    assert image.shape == (1, 8, 8) and target == 1
    assert made.images.max() > 1 or made.images.min() < 0  # neither clamped nor rounded


def test_it_is_a_torch_dataset():
    made = make()
    images, targets = next(iter(torch.utils.data.DataLoader(made, batch_size=4)))
    assert images.shape == (4, 1, 8, 8)
    assert float(made.loss(torch.zeros(4, 3), targets)) == pytest.approx(np.log(3))


def test_batches_repeat_by_epoch_and_cover_the_set():
    made = make()
    first = [images for images, _ in made.batches(0, 4)]
    again = [images for images, _ in made.batches(0, 4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert sum(len(images) for images in first) == len(made)
    assert not torch.equal(first[0], next(iter(made.batches(1, 4)))[0])


def test_uint8_in_pixel_space():
    stored = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    made = make(stored, space="pixel")
    torch.testing.assert_close(made.images, stored / 255)
    torch.testing.assert_close(made.training_images()[0], (stored / 255 - 0.4) / 0.2)


def test_decoding_happens_at_load_and_keeps_labels(tmp_path):
    made = make(decode=[{"stage": "formation", "factor": 2, "pad": 0.0}])
    made.save(tmp_path / "a.h5")
    loaded = condense.load(tmp_path / "a.h5")
    assert len(loaded) == 24 and len(loaded.stored) == 6
    images, ids = loaded.training_images()
    assert images.shape == (24, 1, 8, 8)
    # Tile (0, 0) of all images first.
    assert ids.tolist() == list(range(6)) * 4
    corner = torch.nn.functional.interpolate(made.stored[3:4, :, :4, :4], size=(8, 8), mode="bilinear")
    torch.testing.assert_close(images[3:4], corner)
    assert loaded[9][1] == loaded.labels.labels[3]


def test_soft_labels(tmp_path):
    logits = torch.randn(6, 3)
    make(labels=SoftLabels(logits)).save(tmp_path / "a.h5")
    loaded = condense.load(tmp_path / "a.h5")
    torch.testing.assert_close(loaded[2][1], logits[2].softmax(0))
    assert loaded.nbytes()["labels"] == 6 * 3 * 4


def test_zca_travels_with_the_set_and_says_so(tmp_path):
    pixels = torch.rand(40, 1, 4, 4)
    zca = ZCA.fit(pixels)
    make(zca(pixels[:6]), transform=zca).save(tmp_path / "a.h5")
    loaded = condense.load(tmp_path / "a.h5")
    with pytest.warns(UserWarning, match="ZCA"):
        images = loaded.images
    torch.testing.assert_close(images, pixels[:6], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(loaded.transform(pixels[:6]), zca(pixels[:6]))
    assert loaded.nbytes()["auxiliary"] >= 2 * 16 * 16 * 4


def test_bytes_are_counted():
    parts = {"images": 6 * 64 * 4, "labels": 2, "auxiliary": 8, "external": 0}
    assert make().nbytes() == {**parts, "total": 6 * 64 * 4 + 10}


def test_a_large_manifest_fits(tmp_path):
    make(note="x" * 300_000).save(tmp_path / "a.h5")
    assert len(condense.load(tmp_path / "a.h5").manifest["note"]) == 300_000


def test_saving_refuses_to_overwrite(tmp_path):
    make().save(tmp_path / "a.h5")
    with pytest.raises(CondenseError, match=r"exists.*--force"):
        make().save(tmp_path / "a.h5")
    make().save(tmp_path / "a.h5", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


# -- files that are wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return make().save(tmp_path / "a.h5")


def refused(path, words):
    with pytest.raises(CondenseError, match=words) as fault:
        condense.load(path)
    assert "\n" not in str(fault.value)
    assert str(path) in str(fault.value)


@contextlib.contextmanager
def edited(path):
    """The open file, whose digest is computed again when it is closed."""
    with h5py.File(path, "r+") as opened:
        yield opened
    hdf5.write_user_block(path, DISTILLED_FORMAT)


def test_a_damaged_array_is_named(file):
    with edited(file) as opened:
        opened["images"][1, 0, 2, 2] += 1
    refused(file, "'images' is damaged")


def test_damaged_labels_are_named(file):
    with edited(file) as opened:
        opened["labels/hard"][0] = 2
    refused(file, "'labels/hard' is damaged")


def test_a_damaged_manifest(file):
    with edited(file) as opened:
        opened.attrs["manifest"] = np.bytes_(bytes(opened.attrs["manifest"]).replace(b"tiny", b"tint"))
    refused(file, "manifest is damaged")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_truncated(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(file, "truncated|damaged|not an HDF5")


def test_any_flipped_bit_is_refused(file):
    content = bytearray(file.read_bytes())
    random = np.random.default_rng(0)
    for position in random.choice(len(content), 120, replace=False):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        refused(file, "truncated or damaged|not an HDF5 file")


def test_other_formats(tmp_path):
    text = tmp_path / "a.h5"
    text.write_text("hello")
    refused(text, "not an HDF5 file")
    with h5py.File(tmp_path / "b.h5", "w") as opened:
        opened["images"] = np.zeros((2, 1, 8, 8))
    refused(tmp_path / "b.h5", "another format")
    refused(tmp_path / "missing.h5", "no such file")


def test_a_newer_version(file):
    with edited(file) as opened:
        opened.attrs["version"] = 99
    refused(file, "newer version")


def hostile(file, change):
    """A file whose checksums are right but whose arrays were changed by a third party."""
    import hashlib
    import json

    with edited(file) as opened:
        manifest = json.loads(bytes(opened.attrs["manifest"]))
        change(opened, manifest)
        text = json.dumps(manifest, sort_keys=True)
        opened.attrs["manifest"] = np.bytes_(text)
        opened.attrs["manifest_sha256"] = np.bytes_(hashlib.sha256(text.encode()).hexdigest())


def test_an_array_that_claims_more_than_the_file_holds(file):
    def change(opened, manifest):
        del opened["images"]
        opened.create_dataset("images", (1_000_000, 3, 1024, 1024), dtype="f4", chunks=(1, 3, 64, 64))

    hostile(file, change)
    refused(file, "claims .* bytes, more than the file holds")


def test_an_array_in_another_file(file, tmp_path):
    def change(opened, manifest):
        del opened["images"]
        opened["images"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")

    hostile(file, change)
    refused(file, "'images' is a soft or external link")


def test_a_foreign_type(file):
    def change(opened, manifest):
        del opened["images"]
        opened["images"] = np.array([b"abc"])

    hostile(file, change)
    refused(file, "has the type")


def test_an_unknown_decode_stage(file):
    hostile(file, lambda opened, manifest: manifest.update(decode=[{"stage": "hologram"}]))
    refused(file, "hologram")


def test_labels_outside_the_classes(file):
    hostile(file, lambda opened, manifest: manifest.update(classes=["a", "b"]))
    refused(file, "outside 0..1")


@pytest.mark.parametrize("key", ["classes", "name", "space", "ipc", "network", "checksums"])
def test_a_manifest_without_a_key(file, key):
    hostile(file, lambda opened, manifest: manifest.pop(key))
    refused(file, f"no proper '{key}'")


def test_fewer_labels_than_images(file):
    from condense.sets import checksums

    def change(opened, manifest):
        del opened["labels/hard"]
        opened["labels/hard"] = np.zeros(3, dtype=np.int64)
        manifest["checksums"]["labels/hard"] = checksums({"x": np.zeros(3, dtype=np.int64)})["x"]

    hostile(file, change)
    refused(file, "6 images but 3 labels")


def test_several_names_of_one_array_count_each(file):
    def change(opened, manifest):
        del opened["images"]
        opened["images"] = np.zeros((6, 1, 40, 40), np.float32)
        for number in range(8):
            opened[f"links/{number}"] = opened["images"]
            manifest["checksums"][f"links/{number}"] = "0" * 64

    hostile(file, change)
    refused(file, "its arrays claim .* bytes, more than the file holds")


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"stage": "formation", "factor": 1000}], "factor 1000, but images 1x8x8"),
        ([{"stage": "formation", "factor": 2}] * 2, "repeat a stage"),
        ([{"stage": "flip-union"}] * 25, "repeat a stage"),
        (["formation"], "no proper 'decode.0'"),
        ([{"stage": "formation"}], "no proper 'decode.0.factor'"),
        ([{"stage": "formation", "factor": 0}], "no proper 'decode.0.factor'"),
        ([{"stage": "formation", "factor": 2, "pad": []}], "no proper 'decode.0.pad'"),
        ([{"stage": "compensated", "classes": 3, "indices": 10**20, "teachers": 1}], "no proper 'decode.0.indices'"),
        ([{"stage": "compensated", "classes": 3, "indices": 10**9, "teachers": 10**9}], "decodes into"),
    ],
)
def test_decode_stages_are_bounded(file, stages, words):
    hostile(file, lambda opened, manifest: manifest.update(decode=stages))
    refused(file, words)


def test_decoded_images_must_fit_into_memory(tmp_path):
    file = make(torch.zeros(6, 1, 900, 900, dtype=torch.uint8), space="pixel").save(tmp_path / "a.h5")
    hostile(file, lambda opened, manifest: manifest.update(decode=[{"stage": "formation", "factor": 900}]))
    refused(file, "decodes into 4860000 images of .* of memory are free")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "x"}, "no proper 'data'"),
        ({"data": {"options": {"resize": 64}}}, "option resize=64, but its images are 1x8x8"),
        ({"data": {"options": {"resize": 10**30}}}, "no proper 'data.options.resize'"),
        ({"data": {"options": {"zca": "yes"}}}, "no proper 'data.options.zca'"),
        ({"learned_lr": float("nan")}, "no proper 'learned_lr'"),
        ({"learned_lr": -1}, "no proper 'learned_lr'"),
        ({"protocol": 3}, "no proper 'protocol'"),
        ({"seed": "0"}, "no proper 'seed'"),
        ({"mirror": "no"}, "no proper 'mirror'"),
        ({"ipc": 2.5}, "no proper 'ipc'"),
        ({"space": "frequency"}, "no proper 'space'"),
        ({"classes": ["a", "a", "b"]}, "no proper 'classes'"),
        ({"classes": ["a", "\ud800", "b"]}, "no proper 'classes.1'"),
        ({"name": "\x1b[2J"}, "no proper 'name'"),
        ({"checksums": {"images": 3}}, "no proper 'checksums.images'"),
        ({"cost": {"seconds": float("inf")}}, "no proper 'cost.seconds'"),
        ({"label_source": {"experts": {"content": "x"}}}, "no proper 'label_source.experts'"),
        ({"label_source": {"teachers": {"sha256": "x"}}}, "no proper 'label_source.teachers.sha256'"),
        ({"lightened": {"bytes": {"before": "x"}}}, "no proper 'lightened.bytes.before'"),
        ({"claim": {"mean": 2}}, "no proper 'claim.mean'"),
    ],
)
def test_keys_of_the_manifest_that_commands_read_are_checked(file, change, words):
    hostile(file, lambda opened, manifest: manifest.update(change))
    refused(file, words)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite(file, value):
    from condense.sets import checksums

    def change(opened, manifest):
        opened["images"][2, 0, 3, 3] = value
        manifest["checksums"]["images"] = checksums({"x": opened["images"][()]})["x"]

    hostile(file, change)
    refused(file, "some pixels are not finite")


def test_pixels_that_are_not_finite_in_training_space(tmp_path):
    transform = Standardise(torch.tensor([0.4]), torch.tensor([1e-40]))
    made = make(torch.full((6, 1, 8, 8), 255, dtype=torch.uint8), transform=transform, space="pixel")
    loaded = condense.load(made.save(tmp_path / "a.h5"))
    with pytest.raises(CondenseError, match="not finite"):
        loaded.training_images()


def test_the_digest_does_not_change_by_saving(tmp_path):
    made = make()
    before = made.sha256()
    made.save(tmp_path / "a.h5")
    assert made.sha256() == before == condense.load(tmp_path / "a.h5").sha256()


def test_preview_is_a_picture(tmp_path):
    from PIL import Image

    path = save_grid(make().images, tmp_path / "grid.png", columns=2)
    assert Image.open(path).size == (2 * 66 + 2, 3 * 66 + 2)
