"""How images are scaled, cropped and standardised: the options resize, crop, test_resize, normalise, mean and std."""

import numpy as np
import pytest
import torch
from conftest import command_line, tiny_arrays
from PIL import Image

import condense
from condense.data import DataOptions, load_task
from condense.errors import CondenseError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with train and test images of 12x10 pixels in two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.random.default_rng([label, number]).integers(0, 256, (10, 12, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def expected(path, shorter, side):
    """The image scaled by Pillow, then its centre square, (3, side, side)."""
    image = Image.open(path)
    width, height = int(shorter * image.width / 10), int(shorter * image.height / 10)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "options, train, test",
    [
        ({"resize": 8}, (8, 8), (8, 8)),
        ({"resize": 9, "crop": 6}, (9, 6), (9, 6)),
        ({"crop": 8, "test_resize": 9}, (8, 8), (9, 8)),
        ({"resize": 8, "test_resize": 10}, (8, 8), (10, 8)),
    ],
)
def test_scaling_and_cropping_of_train_and_test(options, train, test, pictures):
    task = load_task(pictures, DataOptions(**options))
    for split, part, sizes in ((task.train, "train", train), (task.test, "test", test)):
        assert np.array_equal(split.images[4], expected(pictures / part / "dog" / "1.png", *sizes))
    rows = [
        [
            (Image.open(pictures / part / name / f"{k}.png"), c)
            for c, name in enumerate(("cat", "dog"))
            for k in range(3)
        ]
        for part in ("train", "test")
    ]
    again = load_task(tuple(rows), DataOptions(**options))  # the same images as a dataset of PIL images
    assert np.array_equal(again.test.images, task.test.images) and np.array_equal(again.train.images, task.train.images)
    files = [np.stack([np.asarray(image).transpose(2, 0, 1) for image, _ in part]) for part in rows]
    labels = np.array([0, 0, 0, 1, 1, 1])
    arrays = load_task((files[0], labels, files[1], labels), DataOptions(**options))
    for ours, theirs in ((arrays.train, task.train), (arrays.test, task.test)):  # another implementation rounds by one
        assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1


def test_an_option_less_cache_is_not_taken_for_another(pictures):
    plain = load_task(pictures, DataOptions(resize=8))
    cropped = load_task(pictures, DataOptions(resize=8, test_resize=10))
    assert not np.array_equal(plain.test.images, cropped.test.images)
    assert np.array_equal(plain.train.images, cropped.train.images)
    assert plain.fingerprint != cropped.fingerprint


def test_mean_and_std_of_a_name_or_as_numbers():
    arrays = tiny_arrays(channels=3)
    named = load_task(arrays, DataOptions(normalise="cifar10"))
    numbers = load_task(arrays, DataOptions(mean="0.4914,0.4822,0.4465", std="0.2023,0.1994,0.2010"))
    for task in (named, numbers):
        torch.testing.assert_close(task.transform.mean, torch.tensor([0.4914, 0.4822, 0.4465]))
        torch.testing.assert_close(task.transform.std, torch.tensor([0.2023, 0.1994, 0.2010]))
        assert task.fingerprint == load_task(arrays).fingerprint  # of pixels in [0,1]
    torch.testing.assert_close(
        load_task(arrays, DataOptions(normalise="imagenet")).transform.std, torch.tensor([0.229, 0.224, 0.225])
    )


def test_sets_keep_the_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez("data.npz", **dict(zip(keys, tiny_arrays(channels=3))))
    words = "distill dm --data data.npz --ipc 1 --network mlp steps=1 normalise=imagenet crop=8 test_resize=10"
    assert command_line(f"{words} --out s.h5 --run-dir r", capsys).code == 0
    made = condense.load("s.h5")
    assert made.manifest["data"]["options"]["crop"] == 8
    assert "normalise=imagenet" in made.manifest["command"] and "test_resize=10" in made.manifest["command"]
    torch.testing.assert_close(made.transform.std, torch.tensor([0.229, 0.224, 0.225]))
    assert (
        command_line("evaluate s.h5 --data data.npz --runs 1 --controls random --protocol quick-v1", capsys).code == 0
    )
    assert "crop" not in condense.task("data.npz").options.to_dict()  # files of earlier versions do not have it


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resize": 4, "crop": 6}, "crop=6: must be at most the 4 pixels"),
        ({"test_resize": 9}, "test_resize=9: give crop=N too"),
        ({"crop": 8, "test_resize": 7}, "crop=8: must be at most the 7 pixels"),
        ({"crop": 0}, "crop=0: must be at least 1 pixel"),
        ({"mean": "0.5"}, "mean= and std= go together"),
        ({"mean": "0.5", "std": "0"}, "std=0: give one number above 0"),
        ({"mean": "0.5,0.5", "std": "1"}, "for each of the 2 of mean="),
        ({"mean": "0.5,nan,1", "std": "1,1,1"}, "mean=0.5,nan,1: write numbers"),
        ({"normalise": "cifar10", "zca": True}, "zca=true: replaces mean and std"),
        ({"normalise": "cifar10", "mean": "1", "std": "1"}, "normalise=cifar10: goes without mean= and std="),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(CondenseError, match=message):
        DataOptions(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"normalise": "cifar11"}, "normalise=cifar11: unknown; did you mean 'cifar10'"),
        ({"normalise": "mnist"}, r"normalise=mnist: has 1 channel\(s\), the images have 3"),
        ({"mean": "0.5", "std": "1"}, r"mean=0.5: has 1 channel\(s\)"),
    ],
)
def test_normalisation_that_does_not_fit(options, message):
    with pytest.raises(CondenseError, match=message):
        load_task(tiny_arrays(channels=3), DataOptions(**options))
