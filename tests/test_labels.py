"""Labels of views: the targets belong to the images that are served, by whichever way, and read back as stored."""

import math

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import condense
from condense import networks, rng
from condense.augment import ZCA, CropViews
from condense.distilled import DistilledSet
from condense.errors import CondenseError
from condense.labels import HardLabels, PerViewLabels, SoftLabels, relabel
from condense.students import FixedSource, Recipe, Student, TaskSource, accuracy, train

CPU = torch.device("cpu")
NETWORK = "convnet-d2-w8-in"


def logits(epochs=2, images=5, classes=3, scale=4.0):
    return scale * torch.randn(epochs, images, classes, generator=rng.generator("logits", epochs, images, classes))


def pictures(count=5, channels=1, size=8):
    return torch.randn(count, channels, size, size, generator=rng.generator("pictures", count, channels, size))


def recipe(steps, batch=64, lr=0.05, augment=None):
    return Recipe(steps=steps, batch=batch, lr=lr, momentum=0.9, weight_decay=5e-4, augment=augment)


def fresh(task, seed):
    with rng.seeded("labels", seed):
        return networks.build(NETWORK, task.shape, task.num_classes)


@pytest.fixture(scope="module")
def teachers():
    """A network trained on the tiny task, made once."""
    return {}


@pytest.fixture
def teacher(tiny, teachers):
    if not teachers:
        teachers["one"] = fresh(tiny, "teacher")
        train([Student(teachers["one"], TaskSource(tiny, CPU), 0)], recipe(60, batch=12), device=CPU)
    return teachers["one"]


@pytest.fixture
def chosen(tiny):
    return condense.distill("random", tiny, 2, network=NETWORK)


# -- views and targets ------------------------------------------------------------------------------------------------


def test_a_view_depends_on_seed_epoch_and_image_alone():
    labels, images, ids = PerViewLabels(logits(), 11), pictures(), torch.arange(5)
    whole = labels.view(images, ids, 1)
    for order in (torch.tensor([3, 0, 4]), torch.tensor([2]), torch.tensor([1, 1, 3])):
        assert torch.equal(labels.view(images[order], order, 1), whole[order])
    assert not torch.equal(labels.view(images, ids, 0), whole)
    assert not torch.equal(PerViewLabels(logits(), 12).view(images, ids, 1), whole)
    drawn = CropViews().draw(rng.Draws(11, "view", 1), 5, (8, 8))
    assert torch.equal(CropViews().apply(images, drawn), whole)


def test_epochs_repeat_after_the_last_stored_one():
    labels, images, ids = PerViewLabels(logits(epochs=2), 0), pictures(), torch.tensor([4, 1])
    assert torch.equal(labels.view(images[ids], ids, 5), labels.view(images[ids], ids, 1))
    assert torch.equal(labels.targets(ids, 5), labels.targets(ids, 1))
    assert not torch.equal(labels.targets(ids, 0), labels.targets(ids, 1))


def test_targets_are_softened():
    stored = logits()
    labels = PerViewLabels(stored, 0, temperature=4.0)
    expected = (stored[1].half().float() / 4).softmax(1)
    assert torch.equal(labels.targets(torch.tensor([2, 0]), 1), expected[[2, 0]])
    with pytest.raises(ValueError, match="epoch"):
        labels.targets(torch.tensor([0]))


def test_the_loss_is_kl_at_the_temperature():
    teacher, student, t = logits()[0].half().double(), logits(images=5, epochs=1)[0].double(), 3.0
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    by_hand = (p * (p.log() - q.log())).sum() / 5
    for squared, factor in ((False, 1.0), (True, t * t)):
        labels = PerViewLabels(logits(), 0, temperature=t, squared=squared)
        got = labels.loss(student.float(), labels.targets(torch.arange(5), 0))
        assert float(got) == pytest.approx(float(by_hand) * factor, rel=1e-4)


def test_gradients_hardly_depend_on_a_high_temperature():
    sizes = []
    for temperature in (20.0, 200.0):
        labels = PerViewLabels(logits(scale=1.0), 0, temperature=temperature)
        student = torch.zeros(5, 3, requires_grad=True)
        labels.loss(student, labels.targets(torch.arange(5), 0)).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_other_labels_leave_images_alone_and_need_nothing_else():
    images, ids = pictures(), torch.arange(5)
    for labels in (HardLabels(torch.zeros(5), 3), SoftLabels(logits()[0])):
        assert labels.view(images, ids, 3) is images
        assert labels.external_nbytes() == 0
    assert PerViewLabels(logits(), 0).external_nbytes() == 0


def test_bytes():
    assert PerViewLabels(logits(2, 5, 3), 0).nbytes() == 2 * 2 * 5 * 3 + 30


def test_impossible_labels():
    with pytest.raises(CondenseError, match="epochs, images, classes"):
        PerViewLabels(logits()[0], 0)
    with pytest.raises(CondenseError, match="not finite as float16"):
        PerViewLabels(logits(scale=1e6), 0)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(CondenseError, match="temperature="):
            PerViewLabels(logits(), 0, temperature=temperature)


# -- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, temperature", [(0.08, 20.0), (1 / 3, 0.1)])
def test_arrays_read_back_exactly(low, temperature):
    labels = PerViewLabels(logits(), 2**62, CropViews(low, 0.9, flip=False), temperature, squared=False)
    again = PerViewLabels.from_arrays(labels.arrays(), 3)
    assert (again.seed, again.views, again.temperature, again.squared) == (
        labels.seed, labels.views, labels.temperature, False,
    )  # fmt: skip
    images, ids = pictures(), torch.arange(5)
    assert torch.equal(again.view(images, ids, 1), labels.view(images, ids, 1))
    assert torch.equal(again.targets(ids, 1), labels.targets(ids, 1))


@pytest.mark.parametrize(
    "name, wrong, words",
    [
        ("logits", np.zeros((2, 5, 3), np.float32), "labels/logits must be float16 .epochs, images, 3., not float32"),
        ("logits", np.zeros((2, 5, 4), np.float16), r"not float16 \(2, 5, 4\)"),
        ("logits", np.zeros((5, 3), np.float16), r"not float16 \(5, 3\)"),
        ("logits", np.float16(1), r"not float16 \(\)"),
        ("logits", np.zeros((0, 5, 3), np.float16), "per-view logits must be"),
        ("logits", np.full((2, 5, 3), np.nan, np.float16), "not finite"),
        ("draws", np.zeros(2, np.float32), "labels/draws must be int64"),
        ("draws", np.zeros(3, np.int64), "labels/draws must be int64"),
        ("draws", np.array([0, 99]), "version 99 of the draws"),
        ("scale", np.array([0.5, 2.0], np.float32), "views of scale"),
        ("scale", np.array([np.nan, 1.0], np.float32), "views of scale"),
        ("temperature", np.array([0.0], np.float32), "temperature="),
        ("temperature", np.array([np.nan], np.float32), "temperature="),
        ("flags", np.array([1, 2], np.uint8), "0 or 1"),
    ],
)
def test_wrong_arrays_are_refused_in_one_line(name, wrong, words):
    arrays = {**PerViewLabels(logits(), 0).arrays(), name: wrong}
    with pytest.raises(CondenseError, match=words) as fault:
        PerViewLabels.from_arrays(arrays, 3)
    assert "\n" not in str(fault.value)


def test_the_file(tmp_path, chosen, teacher):
    made = relabel(chosen, teacher, 3, seed=4)
    path = made.save(tmp_path / "a.h5")
    loaded = condense.load(path)
    assert loaded.sha256() == made.sha256() != chosen.sha256()
    assert loaded.manifest["label_kind"] == "per-view" and loaded.manifest["teacher"]["network"] == "ConvNet"
    assert "protocol" not in loaded.manifest and "protocol" in chosen.manifest
    assert loaded.nbytes()["labels"] == 2 * 3 * 6 * 3 + 30 and loaded.nbytes()["external"] == 0
    for (images, targets), (others, expected) in zip(loaded.batches(1, 4), made.batches(1, 4)):
        assert torch.equal(images, others) and torch.equal(targets, expected)
    with pytest.raises(CondenseError, match="belong to augmented views"):
        _ = loaded[0]
    with h5py.File(path, "r+") as opened:
        opened["labels/draws"][0] = 5
    with pytest.raises(CondenseError, match="'labels/draws' is damaged"):
        condense.load(path)


# -- relabelling ------------------------------------------------------------------------------------------------------


def test_relabelling_counts_its_time_and_drops_claims(chosen, teacher):
    claimed = DistilledSet(chosen.stored, chosen.labels, chosen.transform, {**chosen.manifest, "claim": {"mean": 1.0}})
    made = relabel(claimed, teacher, 1, teacher_seconds=7.0)
    assert made.manifest["cost"]["preparation_seconds"] >= 7 and "claim" not in made.manifest
    assert made.name == "tiny/random-ipc2.relabelled" and "command" not in made.manifest
    assert "seconds" not in relabel(claimed, teacher, 1).manifest["cost"]
    unknown = DistilledSet(chosen.stored, chosen.labels, chosen.transform, {**chosen.manifest, "cost": {}})
    assert relabel(unknown, teacher, 1).manifest["cost"] == {}


def test_relabelling_stores_what_the_teacher_says_of_each_view(chosen, teacher):
    teacher.train()
    made = relabel(chosen, teacher, 2, seed=4, batch_size=4, views=CropViews(0.3), description="a small one")
    assert not teacher.training and made.manifest["teacher"]["network"] == "a small one"
    images = chosen.training_images()[0]
    for epoch in range(2):
        views = CropViews(0.3).apply(images, CropViews(0.3).draw(rng.Draws(4, "view", epoch), 6, (8, 8)))
        with torch.no_grad():
            torch.testing.assert_close(made.labels.logits[epoch].float(), teacher(views), atol=2e-2, rtol=2e-3)
    again = relabel(chosen, teacher, 2, seed=4, batch_size=4, views=CropViews(0.3))
    assert again.sha256() == made.sha256()
    assert relabel(chosen, teacher, 2, seed=5, views=CropViews(0.3)).sha256() != made.sha256()


def test_data_that_do_not_survive_mirroring_are_not_mirrored(chosen, teacher):
    assert relabel(chosen, teacher, 1).labels.views.flip
    chosen.manifest["mirror"] = False
    assert not relabel(chosen, teacher, 1).labels.views.flip


def test_sets_and_teachers_that_cannot_be(tiny, chosen, teacher):
    with pytest.raises(CondenseError, match="epochs=0"):
        relabel(chosen, teacher, 0)
    with pytest.raises(CondenseError, match=r"the teacher answers \(6, 2\)"):
        relabel(chosen, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)), 1)
    packed = condense.distill("dm", tiny, 1, network=NETWORK, steps=1, batch_real=6, factor=2, init="collage")
    with pytest.raises(CondenseError, match="decodes into more"):
        relabel(packed, teacher, 1)


# -- students ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitened", [False, pytest.param(True, marks=pytest.mark.filterwarnings("ignore:.*ZCA"))])
def test_a_student_is_served_what_batches_yields(chosen, teacher, whitened):
    if whitened:
        zca = ZCA.fit(chosen.images)
        manifest = {**chosen.manifest, "space": "pixel"}
        chosen = DistilledSet(chosen.images, chosen.labels, zca, manifest)
    made = relabel(chosen, teacher, 2)
    images, ids = made.training_images()
    source = FixedSource(images, made.labels, ids)
    assert source.per_view
    for epoch in (0, 1, 2):
        order = rng.Draws(0, "batches", epoch).permutation(6)
        for chunk, (pixels, targets) in zip(order.split(4), made.batches(epoch, 4)):
            shown, expected = source.batch(chunk, epoch)
            assert torch.equal(targets, expected)
            torch.testing.assert_close(made.transform(pixels), shown, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                made.labels.targets(ids[chunk], epoch), softened(teacher, shown), atol=1e-3, rtol=0
            )


def softened(teacher, images):
    with torch.no_grad():
        return (teacher.eval()(images) / 20).softmax(1)


@pytest.mark.parametrize("together", [False, True])
def test_students_see_the_views_of_their_pass_and_no_other_augmentation(tiny, chosen, teacher, together):
    """Two passes of two batches, against the update written out."""
    from condense.augment import dsa
    from condense.students import batch_ids

    made = relabel(chosen, teacher, 2)
    images, ids = made.training_images()
    source = FixedSource(images, made.labels, ids)
    students = [Student(fresh(tiny, k), source, k) for k in range(2)]
    train(students, recipe(4, batch=4, augment=dsa("color_crop")), device=CPU, together=together)
    other = fresh(tiny, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 2 else 0.005
        rows = batch_ids(1, 6, 4, step)
        epoch = step // 2
        answer = other(made.labels.view(images[rows], rows, epoch))
        optimizer.zero_grad()
        target = (made.labels.logits[epoch, rows].float() / 20).softmax(1)
        (F.kl_div((answer / 20).log_softmax(1), target, reduction="batchmean") * 400).backward()
        optimizer.step()
    for a, b in zip(students[1].network.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_relabelled_set_teaches(tiny, chosen, teacher):
    made = relabel(chosen, teacher, 20, views=CropViews(0.5))
    images, ids = made.training_images()
    nets = []
    for _ in range(2):
        net = fresh(tiny, "student")
        train([Student(net, FixedSource(images, made.labels, ids), 3)], recipe(150), device=CPU)
        nets.append(net)
    assert accuracy(nets[0], tiny, device=CPU) > 0.6  # chance is a third
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_the_judge_and_fit_take_such_sets(tiny, chosen, teacher, monkeypatch):
    import dataclasses

    from condense import evaluation

    made = relabel(chosen, teacher, 2)
    quick = dataclasses.replace(evaluation.get_protocol("quick-v1"), steps=3, labels="soft")
    monkeypatch.setattr(evaluation, "get_protocol", lambda name: quick)
    record = condense.evaluate(made, tiny, networks=NETWORK, runs=1, controls=["random"])
    assert record["set"]["label_kind"] == "per-view"
    assert [entry["arm"] for entry in record["missing"]] == ["random"]
    assert not condense.fit(made, NETWORK).training
