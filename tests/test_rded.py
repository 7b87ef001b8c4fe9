"""RDED's collages: crops of images at their own size, antialiased, grouped and shuffled as in the released program."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_arrays
from PIL import Image

import condense
from condense import rng
from condense.augment import ViewBoxes, apply_resampling, resampling_matrices
from condense.config import load_recipe, recipe_names
from condense.engine import Run
from condense.errors import CondenseError
from condense.labels import PerViewLabels, TeacherLabels
from condense.lighten import lighten
from condense.methods.curriculum_synthesis import patches
from condense.pretraining import load_or_train_teachers
from condense.registry import METHODS

NETWORK = "convnet-d2-w8-bn"
TAUGHT = {"network": NETWORK, "teacher_epochs": 2, "teacher_batch": 8}


def noise(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=rng.generator("noise", *shape), dtype=dtype)


# -- resampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (5, 7)])
def test_shrinking_is_torchvisions_antialiased_crop(size):
    from torchvision.transforms.functional import hflip, resized_crop

    images = noise(60, 3, 40, 33)
    draws = rng.Draws("boxes")
    height, width = draws.integers(40, 60) + 1, draws.integers(33, 60) + 1
    top, left = ((draws.uniform(60) * (free + 1)).long() for free in (40 - height, 33 - width))
    views = ViewBoxes((40, 33), torch.stack([top, left, height, width], 1), draws.integers(2, 60) == 1)
    rows, columns = resampling_matrices(views, torch.zeros(60, 2, dtype=torch.int64), size, antialias=True)
    shown = apply_resampling(images[:, None], rows, columns)[:, 0]
    for image, got, box, mirrored in zip(images, shown, views.box.tolist(), views.mirrored):
        expected = resized_crop(image, *box, list(size), antialias=True)
        torch.testing.assert_close(got, hflip(expected) if mirrored else expected, atol=1e-5, rtol=0)
    plain, _ = resampling_matrices(views, torch.zeros(60, 2, dtype=torch.int64), size)
    enlarged = height <= size[0]
    assert enlarged.any() and torch.equal(rows[enlarged], plain[enlarged])
    assert not torch.equal(rows[~enlarged], plain[~enlarged])


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (32, 32)])
def test_boxes_are_distributed_as_torchvisions(size):
    from torchvision.transforms import RandomResizedCrop

    draws = rng.Draws("square")
    boxes = patches.square_boxes(size, draws.uniform(6000), draws.uniform((6000, 2))).box.double()
    with rng.seeded("torchvision"):
        image = torch.zeros(1, *size)
        theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [1.0, 1.0]) for _ in range(6000)]
    expected = torch.tensor(theirs, dtype=torch.float64)
    assert torch.equal(boxes[:, 2], boxes[:, 3]) and int(boxes[:, 2].max()) == min(size)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(size)).all()
    error = (boxes.var(0) + expected.var(0)).div(6000).sqrt()
    assert ((boxes.mean(0) - expected.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(boxes.std(0), expected.std(0), rtol=0.05, atol=0)


def test_boxes_of_a_very_long_image_are_its_largest_squares():
    boxes = patches.square_boxes((4, 400), torch.tensor([0.0, 0.9]), torch.tensor([[0.5, 0.0], [0.5, 0.999]])).box
    assert boxes.tolist() == [[0, 0, 4, 4], [0, 396, 4, 4]]


# -- images at their own size -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """An image folder of 2 classes of 6 train and 2 test images; heights and widths differ."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            place = tmp_path / "pets" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 100, (40 + 4 * i, 56 - 3 * i, 3), dtype=np.uint8)
                pixels[10:30, 10 + 15 * c : 25 + 15 * c] += 120
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "pets"


def images_of(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("train/*/*.png"))]


def in_training_space(task, pixels):
    return task.transform(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)


def test_images_of_a_folder_keep_their_own_size(folder):
    for _ in range(2):  # decoded, and from the cache
        task = condense.task(str(folder), resize=20, crop=16)
        assert task.has_originals and task.shape == (3, 16, 16)
        ids = torch.tensor([7, 0, 11])
        for got, row in zip(task.originals(ids), ids.tolist(), strict=True):
            assert torch.equal(got, in_training_space(task, images_of(folder)[row]))
    held = task.hold_out(0.5, ("held",))
    for got, row in zip(held.originals(torch.arange(len(held.train))), held.train.rows.tolist(), strict=True):
        assert torch.equal(got, in_training_space(task, images_of(folder)[row]))
    swapped = task.select_classes(["dog", "cat"])
    for got, row in zip(swapped.originals(torch.tensor([0, 6])), swapped.train.rows[[0, 6]].tolist(), strict=True):
        assert torch.equal(got, in_training_space(task, images_of(folder)[row]))
    grey = condense.task(str(folder), resize=16, grey=True)
    (image,) = grey.originals(torch.tensor([3]))
    assert image.shape == (1, *images_of(folder)[3].shape[:2])


def test_images_in_memory_keep_their_own_size():
    arrays = tiny_arrays(size=12)
    task = condense.task(arrays, name="tiny", resize=8)
    assert task.has_originals
    (image,) = task.originals(torch.tensor([5]))
    assert torch.equal(image, task.transform(torch.from_numpy(arrays[0][5]).float() / 255))
    assert not condense.task(tiny_arrays(size=8), name="tiny", resize=8).has_originals
    assert not condense.task(tiny_arrays(), name="tiny").has_originals
    assert not condense.task(arrays, name="tiny", resize=8, zca=True).has_originals


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", ["neighbours", "strided"])
def test_collages_are_those_of_the_released_program(folder, grouping):
    """Its selection and its grouping written out, on boxes drawn by the toolkit."""
    from torchvision.transforms.functional import resized_crop

    task = condense.task(str(folder), resize=20, crop=16)
    settings = {"pool": 6, "crops": 3, "factor": 2, "labels": "hard"}
    one = condense.distill("rded", task, 2, **TAUGHT, **settings, grouping=grouping, store="float32", precision="fp32")
    run = Run(task, 2, NETWORK, quiet=True, track="none")
    config = METHODS.get("rded").config(teacher_epochs=2, teacher_batch=8, **settings)
    committee = load_or_train_teachers(run, config.teacher_training(task), architectures=[NETWORK], count=1)
    net = committee.members[0].network
    for c in range(2):
        ids, draws = task.sample_ids(6, (0, "pool"), [c]), rng.Draws(0, "patches", c)
        areas, positions = draws.uniform(18), draws.uniform((18, 2))
        best = []
        for i, row in enumerate(ids.tolist()):
            image, part = in_training_space(task, images_of(folder)[row]), slice(3 * i, 3 * i + 3)
            boxes = patches.square_boxes(image.shape[1:], areas[part], positions[part]).box.tolist()
            crops = torch.stack([resized_crop(image, *box, [8, 8], antialias=True) for box in boxes])
            losses = F.cross_entropy(net(F.pad(crops, (4, 4, 4, 4))), torch.full((3,), c), reduction="none")
            best.append((float(losses.min()), crops[int(losses.argmin())]))
        tiles = [crop for _, crop in sorted(best, key=lambda pair: pair[0])]
        tiles += tiles[:2]  # six images give eight crops
        for n in range(2):
            four = [tiles[4 * n + k] if grouping == "neighbours" else tiles[2 * k + n] for k in range(4)]
            collage = torch.cat([torch.cat(four[:2], 2), torch.cat(four[2:], 2)], 1)
            wanted = task.transform.inverse(collage).clamp(0, 1)
            torch.testing.assert_close(one.stored[2 * c + n], wanted, rtol=0, atol=1e-4)


def test_students_see_tiles_in_a_random_order_but_random_images_whole(tiny, monkeypatch):
    settings = {**TAUGHT, "pool": 6, "crops": 2, "factor": 2, "label_scale": 0.5}
    made = condense.distill("rded", tiny, 2, **settings, shuffle_tiles=True)
    plain = condense.distill("rded", tiny, 2, **settings)
    assert made.labels.views.tiles == 2 and plain.labels.views.tiles == 0
    assert torch.equal(made.stored, plain.stored)
    whole = condense.distill("rded", tiny, 2, **{**settings, "factor": 1}, shuffle_tiles=True)
    assert whole.labels.views.tiles == 0
    stored = condense.distill("rded", tiny, 2, **settings, shuffle_tiles=True, labels="per-view", label_epochs=2)
    assert isinstance(stored.labels, PerViewLabels) and stored.labels.views.tiles == 2
    assert lighten(made, "per-view", label_epochs=1).labels.views.tiles == 2
    seen, original = [], TeacherLabels.label_images

    def label_images(labels, *arguments):
        seen.append(labels.views.tiles)
        return original(labels, *arguments)

    monkeypatch.setattr(TeacherLabels, "label_images", label_images)
    condense.evaluate(made, tiny, runs=1, protocol="quick-soft-v1", controls=("random",), cache=False)
    assert seen == [0] and made.labels.views.tiles == 2


def test_settings_that_cannot_be(tiny):
    with pytest.raises(CondenseError, match=r"grouping=stride: .*did you mean 'strided'"):
        condense.distill("rded", tiny, 2, **TAUGHT, grouping="stride")


def test_recipes_of_small_images_have_no_collages():
    for name in recipe_names():
        if name.startswith("rded/") and "imagenet-1k" not in name:
            recipe = load_recipe(name)
            assert recipe.get("factor", 1) == 1 and not recipe.get("shuffle_tiles", False)
