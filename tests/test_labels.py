"""Labels of views: the targets belong to the images that are served, by whichever way, and read back as stored."""

import math

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import condense
from condense import hdf5, networks, rng
from condense.augment import CropViews, ViewRule
from condense.data import ZCA, Standardise
from condense.errors import CondenseError
from condense.labels import (
    DistanceLabels,
    HardLabels,
    PerViewLabels,
    SoftLabels,
    StaticLabels,
    TeacherLabels,
    compute_view_logits,
    compute_view_nll,
)
from condense.sets import DISTILLED_FORMAT, DistilledSet, relabel, replace_labels
from condense.training import FixedSource, Student, TaskSource, TrainConfig, accuracy, train

CPU = torch.device("cpu")
NETWORK = "convnet-d2-w8-in"


def logits(epochs=2, images=5, classes=3, scale=4.0):
    return scale * torch.randn(epochs, images, classes, generator=rng.generator("logits", epochs, images, classes))


def pictures(count=5, channels=1, size=8):
    return torch.randn(count, channels, size, size, generator=rng.generator("pictures", count, channels, size))


def recipe(steps, batch=64, lr=0.05, augment=None):
    return TrainConfig(steps=steps, batch=batch, lr=lr, momentum=0.9, weight_decay=5e-4, augment=augment)


def fresh(task, seed):
    with rng.seeded("labels", seed):
        return networks.build_network(NETWORK, task.shape, task.num_classes)


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

RULES = [
    CropViews(),
    ViewRule(0.3, 0.9, flip=False, mix="cutmix"),
    ViewRule(pad=2, mix="mixup", alpha=0.8),
    ViewRule(pad=3, mix="cutmix", alpha=0.5),
]
HARD = torch.tensor([0, 1, 2, 1, 0])


def made_of(kind, teacher=None, views=None):
    """Five labels of each kind, of three classes, for grey images of 8x8."""
    if kind == "teacher":
        teacher = teacher or networks_of(1)
        shape = (1, 8, 8)
        return TeacherLabels(
            teacher, 5, 3, views, 4.0, weights=(1, 3)[: len(teacher)], names=NAMES[: len(teacher)], shape=shape
        )
    return {
        "hard": lambda: HardLabels(HARD, 3),
        "soft": lambda: SoftLabels(logits()[0]),
        "smoothed": lambda: HardLabels(HARD, 3, 0.2),
        "per-view": lambda: PerViewLabels(logits(), 3, views, 4.0),
        "mse": lambda: PerViewLabels(logits(), 3, views, loss_kind="mse"),
        "mse and classes": lambda: PerViewLabels(logits(), 3, views, loss_kind="mse", gamma=0.5, hard=HARD),
        "calibrated": lambda: PerViewLabels(logits(), 3, views, 4.0, calibrate=(0.4, 0.7, 0.95), hard=HARD),
        "static": lambda: StaticLabels(logits()[0], 3, views, 4.0),
        "static, half": lambda: StaticLabels(logits()[0].half(), 3, views, 4.0),
        "distances": lambda: DistanceLabels(logits(classes=2).abs(), HARD, 3, 3, views, 0.5),
    }[kind]()


KINDS = ("per-view", "mse", "mse and classes", "calibrated", "static", "static, half", "distances")
NAMES = ("convnet-d2-w8-bn", "convnet-d1-w4-in")


def networks_of(count):
    with rng.seeded("networks", count):
        nets = [networks.build_network(name, (1, 8, 8), 3) for name in NAMES[:count]]
        for net in nets:
            for norm in net.modules():  # running statistics that matter
                if isinstance(norm, torch.nn.BatchNorm2d):
                    norm.running_mean.normal_()
                    norm.running_var.uniform_(0.5, 2)
    return nets


@pytest.mark.parametrize("views", RULES)
def test_a_view_depends_on_seed_epoch_and_image_alone(views):
    labels, images, ids = PerViewLabels(logits(), 11, views), pictures(), torch.arange(5)
    whole, targets = labels.training_batch(images, ids, 1)
    for order in (torch.tensor([3, 0, 4]), torch.tensor([2]), torch.tensor([1, 1, 3])):
        shown, asked = labels.training_batch(images, order, 1)
        assert torch.equal(shown, whole[order]) and torch.equal(asked, targets[order])
    assert not torch.equal(labels.training_batch(images, ids, 0)[0], whole)
    assert not torch.equal(PerViewLabels(logits(), 12, views).training_batch(images, ids, 1)[0], whole)


def test_plain_views_are_those_of_their_stream():
    drawn = CropViews().draw(rng.Draws(11, "view", 1), 5, (8, 8))
    shown, _ = PerViewLabels(logits(), 11).training_batch(pictures(), torch.arange(5), 1)
    assert torch.equal(CropViews().apply(pictures(), drawn), shown)


@pytest.mark.parametrize("views", RULES)
def test_a_view_that_is_replayed_is_the_one_that_was_labelled(tmp_path, views):
    """After save and load, in other batches, another order, and from the middle of an epoch: to the bit."""
    seen = {}

    class Recorder(torch.nn.Module):
        def forward(self, x):
            for view in x:
                seen.setdefault(len(seen), view.clone())
            return x.flatten(1)[:, :3]

    stored = relabel(chosen_set(), Recorder(), 3, seed=5, views=views, batch_size=4)
    loaded = condense.load(stored.save(tmp_path / "a.h5"))
    images, order = loaded.training_images()[0], torch.tensor([5, 0, 2, 4, 1, 3])
    for epoch in (2, 0, 1, 5):
        for part in (*order[3:].split(2), order[:3]):
            shown, targets = loaded.labels.training_batch(images, part, epoch)
            for row, place in enumerate(part.tolist()):
                assert torch.equal(shown[row], seen[epoch % 3 * 6 + place])
                answer = seen[epoch % 3 * 6 + place].flatten()[:3].half().float()
                assert torch.equal(targets[row], (answer / 20).softmax(0))


def chosen_set():
    stored = (pictures(6).sigmoid() * 255).byte()
    manifest = {
        "name": "a/b-ipc2",
        "dataset": "a",
        "method": "b",
        "network": NETWORK,
        "classes": ["x", "y", "z"],
        "ipc": 2,
        "space": "pixel",
        "decode": [],
    }
    return DistilledSet(
        stored, HardLabels(torch.tensor([0, 0, 1, 1, 2, 2]), 3), Standardise(torch.zeros(1), torch.ones(1)), manifest
    )


def test_epochs_repeat_after_the_last_stored_one():
    labels, images, ids = PerViewLabels(logits(epochs=2), 0), pictures(), torch.tensor([4, 1])
    for a, b in zip(labels.training_batch(images, ids, 5), labels.training_batch(images, ids, 1)):
        assert torch.equal(a, b)
    assert not torch.equal(labels.training_batch(images, ids, 0)[1], labels.training_batch(images, ids, 1)[1])


@pytest.mark.parametrize("kind", ["teacher", "static"])
def test_what_stores_no_epochs_never_repeats(kind):
    labels, images, ids = made_of(kind), pictures(), torch.arange(5)
    views = [labels.training_batch(images, ids, epoch)[0] for epoch in range(4)]
    assert all(not torch.equal(a, b) for k, a in enumerate(views) for b in views[:k])


def test_targets_are_softened():
    stored = logits()
    labels = PerViewLabels(stored, 0, temperature=4.0)
    expected = (stored[1].half().float() / 4).softmax(1)
    assert torch.equal(labels.training_batch(pictures(), torch.tensor([2, 0]), 1)[1], expected[[2, 0]])


@pytest.mark.parametrize("kind", ["per-view", "distances", "teacher"])
def test_labels_of_views_have_no_targets_of_images(kind):
    with pytest.raises(CondenseError, match=rf"{kind} labels belong to augmented views.*set\.batches"):
        made_of(kind).targets(torch.tensor([0]))


@pytest.mark.parametrize("kind", ["hard", "soft", "teacher", *KINDS])
def test_other_images_than_those_of_the_set_are_refused(kind):
    with pytest.raises(CondenseError, match=r"4 images but 5 .* labels") as fault:
        made_of(kind).training_batch(pictures(4), torch.tensor([0]), 0)
    assert "\n" not in str(fault.value)


def test_the_loss_is_kl_at_the_temperature():
    teacher, student, t = logits()[0].half().double(), logits(images=5, epochs=1)[0].double(), 3.0
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    by_hand = (p * (p.log() - q.log())).sum() / 5
    for squared, factor in ((False, 1.0), (True, t * t)):
        labels = PerViewLabels(logits(), 0, temperature=t, squared=squared)
        got = labels.loss(student.float(), labels.training_batch(pictures(), torch.arange(5), 0)[1])
        assert float(got) == pytest.approx(float(by_hand) * factor, rel=1e-4)


def test_gradients_hardly_depend_on_a_high_temperature():
    sizes = []
    for temperature in (20.0, 200.0):
        labels = PerViewLabels(logits(scale=1.0), 0, temperature=temperature)
        student = torch.zeros(5, 3, requires_grad=True)
        labels.loss(student, labels.training_batch(pictures(), torch.arange(5), 0)[1]).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_other_labels_leave_images_alone_and_need_nothing_else():
    images, ids = pictures(), torch.tensor([3, 1])
    for labels in (HardLabels(torch.zeros(5), 3), SoftLabels(logits()[0])):
        shown, targets = labels.training_batch(images, ids, 3)
        assert torch.equal(shown, images[ids]) and torch.equal(targets, labels.targets(ids))
        assert labels.external_nbytes() == 0
    assert PerViewLabels(logits(), 0).external_nbytes() == 0


def test_smoothed_classes():
    labels, student = HardLabels(HARD, 3, smoothing=0.3), logits()[0]
    target = 0.7 * F.one_hot(HARD, 3) + 0.3 / 3
    by_hand = -(target * student.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(labels.loss(student, labels.targets(torch.arange(5))), by_hand)
    assert labels.nbytes() == 2 + 4 and HardLabels(HARD, 3).nbytes() == 2
    assert set(HardLabels(HARD, 3).arrays()) == {"hard"}
    assert HardLabels.from_arrays(labels.arrays(), 3).smoothing == 0.3
    with pytest.raises(CondenseError, match="smoothing=1"):
        HardLabels(HARD, 3, 1.0)


def mixture(labels, epoch=0):
    """Partner and share of each of the five images."""
    drawn = labels.views.draw(labels.seed, epoch, 5, (8, 8))
    return drawn.partner, drawn.share[:, None]


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_mean_squared_differences_of_logits(gamma):
    hard = HARD if gamma else None
    labels = PerViewLabels(logits(), 3, ViewRule(mix="mixup"), loss_kind="mse", gamma=gamma, hard=hard)
    student, ids = logits(epochs=1)[0], torch.tensor([4, 0, 3])
    targets = labels.training_batch(pictures(), ids, 1)[1]
    assert len(targets) == 3
    partner, share = mixture(labels, 1)
    truth = share * F.one_hot(HARD, 3) + (1 - share) * F.one_hot(HARD[partner], 3)
    by_hand = ((student - labels.logits[1].float())[ids] ** 2).mean()
    entropy = -(truth[ids] * student[ids].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(labels.loss(student[ids], targets), by_hand + gamma * entropy)


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_calibrated_labels(mix):
    """Sure of .39, .5, .7, .9 and .97: left out, the classes, the label twice, left out."""
    sure = torch.tensor([0.39, 0.5, 0.7, 0.9, 0.97])
    stored = torch.stack([sure, (1 - sure) * 0.6, (1 - sure) * 0.4], 1).log()[None]
    labels = PerViewLabels(stored, 3, ViewRule(mix=mix), 2.0, calibrate=(0.4, 0.6, 0.95), hard=HARD)
    targets = labels.training_batch(pictures(), torch.arange(5), 0)[1]
    assert not targets[[0, 4]].any()
    torch.testing.assert_close(targets[2:4], (labels.logits[0, 2:4].float() / 2).softmax(1))
    truth = F.one_hot(HARD, 3).float()
    if mix != "none":
        partner, share = mixture(labels)
        truth = share * truth + (1 - share) * truth[partner]
    torch.testing.assert_close(targets[1], 0.9 * truth[1] + 0.05 * (1 - truth[1]))
    student = logits(epochs=1)[0]
    kept = targets[1:4]
    by_hand = (kept * (kept.log() - (student[1:4] / 2).log_softmax(1))).sum() / 3 * 4
    torch.testing.assert_close(labels.loss(student, targets), by_hand)
    assert float(labels.loss(student[[0, 4]], targets[[0, 4]])) == 0  # a batch without any label


@pytest.mark.parametrize("views", [ViewRule(mix="mixup", alpha=0.8, pad=2), ViewRule(mix="cutmix"), ViewRule()])
def test_static_labels_mix_logits_before_softening(views):
    labels = StaticLabels(logits()[0], 3, views, 4.0)
    shown, targets = labels.training_batch(pictures(), torch.tensor([2, 4]), 7)
    drawn = views.draw(3, 7, 5, (8, 8))
    z = labels.logits
    if views.mix != "none":
        z = drawn.share[:, None] * z + (1 - drawn.share[:, None]) * z[drawn.partner]
    torch.testing.assert_close(targets, (z / 4).softmax(1)[[2, 4]])
    assert torch.equal(shown, views.apply(pictures(), torch.tensor([2, 4]), drawn))
    assert torch.equal(labels.targets(torch.tensor([1])), (labels.logits[1:2] / 4).softmax(1))
    student = logits(epochs=1)[0][:2]
    kl = F.kl_div((student / 4).log_softmax(1), targets, reduction="batchmean")
    torch.testing.assert_close(labels.loss(student, targets), kl)
    torch.testing.assert_close(StaticLabels(z, 3, views, 4.0, squared=True).loss(student, targets), 16 * kl)


def test_distances_by_hand():
    views = ViewRule(mix="cutmix")
    stored = compute_view_nll(networks_of(1)[0], pictures(), HARD, 2, views, 3, classes=3)
    labels = DistanceLabels(stored, HARD, 3, 3, views, weight=0.7)
    shown, targets = labels.training_batch(pictures(), torch.arange(5), 1)
    partner, share = mixture(labels, 1)
    with torch.no_grad():
        surprise = -networks_of(1)[0].eval()(shown).log_softmax(1)
    two = torch.stack([surprise[range(5), HARD], surprise[range(5), HARD[partner]]], 1)
    torch.testing.assert_close(stored[1].float(), two, atol=1e-2, rtol=2e-3)
    assert torch.equal(targets[:, :3], torch.cat([HARD[:, None], HARD[partner][:, None], share], 1))
    student = logits(epochs=1)[0]
    own = -student.log_softmax(1)
    expected = 0.0
    for k in range(5):
        i, j, part = HARD[k], HARD[partner[k]], share[k, 0]
        expected += part * own[k, i] + (1 - part) * own[k, j]
        expected += 0.7 * ((own[k, i] - stored[1, k, 0]).abs() + (own[k, j] - stored[1, k, 1]).abs())
    torch.testing.assert_close(labels.loss(student, targets), expected / 5)


@pytest.mark.parametrize("count", [1, 2])
def test_teachers_are_asked_about_what_the_student_sees(count):
    nets, images = networks_of(count), pictures()
    labels = made_of("teacher", nets)
    shown, targets = labels.training_batch(images, torch.tensor([3, 1, 2]), 4)
    with torch.no_grad():
        answers = [net.eval()(shown) for net in networks_of(count)]
    mean = answers[0] if count == 1 else 0.25 * answers[0] + 0.75 * answers[1]
    torch.testing.assert_close(targets, (mean / 4).softmax(1))
    assert not targets.requires_grad and not labels.teacher.training
    assert labels.external_nbytes() == 0
    student = logits()[0, :3]
    kl = F.kl_div((student / 4).log_softmax(1), targets, reduction="batchmean") * 16
    torch.testing.assert_close(labels.loss(student, targets), kl)


class Dropping(torch.nn.Module):
    """A network with BatchNorm and with dropout behind it."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = networks_of(1)[0], torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.net(x))


def test_answers_by_the_statistics_of_the_batch():
    """Those of a train-mode forward of each micro-batch; running statistics stay, and nothing drops out."""
    images, views, teacher, plain = pictures(7), ViewRule(mix="cutmix"), Dropping(), networks_of(1)[0]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    stored = compute_view_logits(teacher, images, 2, views, 3, classes=3, statistics="batch", micro=3)
    for epoch in range(2):
        order = rng.Draws(3, "label-batch", epoch).permutation(7)
        drawn = views.draw(3, epoch, 7, (8, 8))
        for part in (order[:3], order[3:5], order[5:]):
            with torch.no_grad():
                expected = plain.train()(views.apply(images, part, drawn))
            torch.testing.assert_close(stored[epoch, part].float(), expected, atol=2e-3, rtol=2e-3)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    norms = [m for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.track_running_stats and not m.training for m in norms)
    assert not torch.equal(stored, compute_view_logits(teacher, images, 2, views, 3, classes=3))
    labels = TeacherLabels(teacher, 7, 3, views, 1.0, statistics="batch", micro=2)
    shown, targets = labels.training_batch(images, torch.tensor([5, 2, 0, 1]), 0)
    with torch.no_grad():
        expected = torch.cat([plain(part) for part in shown.split(2)]).softmax(1)
    torch.testing.assert_close(targets, expected)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_labelling_goes_on_where_it_stopped(tmp_path):
    teacher, images, views = networks_of(1)[0], pictures(), ViewRule(mix="mixup")
    for how in ({}, {"statistics": "batch", "micro": 2}):
        whole = compute_view_logits(teacher, images, 4, views, 3, classes=3, **how)
        mapped = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float16, (4, 5, 3))
        compute_view_logits(teacher, images, 4, views, 3, classes=3, into=mapped, **how)
        mapped[2:] = 0
        again = compute_view_logits(teacher, images, 4, views, 3, classes=3, into=mapped, start=2, **how)
        assert torch.equal(again, whole) and np.array_equal(np.load(tmp_path / "a.npy"), whole.numpy())
        with h5py.File(tmp_path / "a.h5", "w") as file:
            array = file.create_dataset("logits", (4, 5, 3), np.float16)
            assert torch.equal(compute_view_logits(teacher, images, 4, views, 3, classes=3, into=array, **how), whole)
    for into, start, words in (
        (np.zeros((4, 5, 2), np.float16), 0, r"into: must be float16 \(4, 5, 3\)"),
        (np.zeros((4, 5, 3), np.float32), 0, "not float32"),
        (None, 1, "start=1"),
        (mapped, 5, "start=5"),
    ):
        with pytest.raises(CondenseError, match=words):
            compute_view_logits(teacher, images, 4, views, 3, classes=3, into=into, start=start)


@pytest.mark.parametrize("kind", ["teacher", *KINDS])
def test_bytes_are_those_of_the_arrays(kind):
    labels = made_of(kind)
    assert labels.nbytes() == sum(array.nbytes for array in labels.arrays().values())


def test_bytes():
    assert PerViewLabels(logits(2, 5, 3), 0).nbytes() == 2 * 2 * 5 * 3 + 49
    assert made_of("static, half").nbytes() == 2 * 5 * 3 + 44 and made_of("static").nbytes() == 4 * 5 * 3 + 44
    assert made_of("distances").nbytes() == 4 * 2 * 5 + 8 * 5 + 43
    weights = sum(x.numel() * x.element_size() for x in networks_of(1)[0].state_dict().values())
    text = len('{"names": ["convnet-d2-w8-bn"], "shape": [1, 8, 8]}')
    assert made_of("teacher").nbytes() == weights + text + 4 + 8 + 4 + 1 + 39


def test_teachers_without_a_name_are_outside_of_the_file():
    labels = TeacherLabels(networks_of(2), 5, 0)
    weights = sum(x.numel() * x.element_size() for net in networks_of(2) for x in net.state_dict().values())
    assert labels.external_nbytes() == weights + 8 and labels.nbytes() == 8 + 4 + 1 + 39
    with pytest.raises(CondenseError, match="cannot be stored: give the names"):
        labels.arrays()


def test_impossible_labels():
    with pytest.raises(CondenseError, match="epochs, images, classes"):
        PerViewLabels(logits()[0], 0)
    with pytest.raises(CondenseError, match="not finite as float16"):
        PerViewLabels(logits(scale=1e6), 0)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(CondenseError, match="temperature="):
            PerViewLabels(logits(), 0, temperature=temperature)
        with pytest.raises(CondenseError, match="temperature="):
            StaticLabels(logits()[0], 0, temperature=temperature)
    for words, options in {
        "loss_kind=ms": {"loss_kind": "ms"},
        "gamma=-1": {"gamma": -1.0},
        "gamma=1: applies to": {"gamma": 1.0},
        "gamma: needs the class": {"gamma": 1.0, "loss_kind": "mse"},
        "calibrate: needs the class": {"calibrate": (0, 0.5, 1)},
        "calibrate: replaces distributions": {"calibrate": (0, 0.5, 1), "loss_kind": "mse"},
        "calibrate=.*low <= mid": {"calibrate": (0.5, 0.2, 1), "hard": HARD},
        "statistics=bach": {"statistics": "bach"},
        "micro=1": {"statistics": "batch", "micro": 1},
        "hard: must be int64": {"hard": HARD[:4]},
        "hard: classes 1 to 5": {"hard": HARD + torch.tensor([1, 1, 1, 1, 5])},
    }.items():
        with pytest.raises(CondenseError, match=words) as fault:
            PerViewLabels(logits(), 0, **options)
        assert "\n" not in str(fault.value)
    with pytest.raises(CondenseError, match=r"\(images, classes\)"):
        StaticLabels(logits(), 0)
    with pytest.raises(CondenseError, match=r"not finite as torch\.float16"):
        StaticLabels(logits(scale=1e6)[0].half(), 0)
    with pytest.raises(CondenseError, match=r"\(epochs, images, 2\)"):
        DistanceLabels(logits(), HARD, 3, 0)
    with pytest.raises(CondenseError, match="mix=none"):
        DistanceLabels(logits(classes=2), HARD, 3, 0, ViewRule())
    with pytest.raises(CondenseError, match="weight=-1"):
        DistanceLabels(logits(classes=2), HARD, 3, 0, weight=-1.0)
    for weights in ((1.0,), (-1.0, 2.0), (0.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(CondenseError, match=r"weights .* of 2 teachers"):
            TeacherLabels(networks_of(2), 5, 0, weights=weights)
    with pytest.raises(CondenseError, match="2 teachers but 1 names"):
        TeacherLabels(networks_of(2), 5, 0, names=NAMES[:1], shape=(1, 8, 8))
    with pytest.raises(CondenseError, match=r"the teacher returns \(5, 3\)"):
        compute_view_logits(networks_of(1)[0], pictures(), 1, ViewRule(), 0, classes=2)


# -- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, temperature", [(0.08, 20.0), (1 / 3, 0.1)])
def test_arrays_read_back_exactly(low, temperature):
    labels = PerViewLabels(logits(), 2**62, CropViews(low, 0.9, flip=False), temperature, squared=False)
    again = PerViewLabels.from_arrays(labels.arrays(), 3)
    assert (again.seed, again.views, again.temperature, again.squared) == (
        labels.seed,
        labels.views,
        labels.temperature,
        False,
    )
    images, ids = pictures(), torch.arange(5)
    for a, b in zip(again.training_batch(images, ids, 1), labels.training_batch(images, ids, 1)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["hard", "smoothed", "soft", "teacher", *KINDS])
def test_every_kind_comes_back_from_a_file(tmp_path, kind):
    teacher = networks_of(2) if kind == "teacher" else None
    views = None if kind in ("hard", "soft", "smoothed") else ViewRule(0.25, 0.7, False, 0, "cutmix", 0.6)
    labels, images = made_of(kind, teacher, views), pictures()
    manifest = {**chosen_set().manifest, "ipc": 1, "space": "training", "classes": ["a", "b", "c"]}
    made = DistilledSet(images, labels, chosen_set().transform, manifest)
    path = made.save(tmp_path / "a.h5")
    loaded = condense.load(path)
    assert type(loaded.labels) is type(labels) and loaded.labels.cache_key() == labels.cache_key()
    assert loaded.sha256() == made.sha256() and loaded.nbytes() == made.nbytes()
    assert loaded.manifest["bytes"]["labels"] == labels.nbytes() and len(loaded.labels) == 5
    for epoch in (1, 0, 5):
        for ids in (torch.tensor([4, 0, 2]), torch.tensor([1])):
            for a, b in zip(
                loaded.labels.training_batch(images, ids, epoch), labels.training_batch(images, ids, epoch)
            ):
                assert torch.equal(a, b)
        for (shown, targets), (others, expected) in zip(loaded.batches(epoch, 2), made.batches(epoch, 2)):
            assert torch.equal(shown, others) and torch.equal(targets, expected)
    student = torch.randn(2, 3)
    shown, targets = next(loaded.batches(0, 2))
    assert torch.equal(loaded.loss(student, targets), made.loss(student, targets)) and shown.shape == (2, 1, 8, 8)
    few = DistilledSet(images[:4], labels, made.transform, manifest)
    with pytest.raises(CondenseError, match="4 images but 5 labels") as fault:
        condense.load(few.save(tmp_path / "b.h5"))
    assert "\n" not in str(fault.value)


WRONG = [
    ("per-view", "logits", np.zeros((2, 5, 3), np.float32), "labels/logits must be float16 .any, any, 3., not float32"),
    ("per-view", "logits", np.zeros((2, 5, 4), np.float16), r"not float16 \(2, 5, 4\)"),
    ("per-view", "logits", np.zeros((5, 3), np.float16), r"not float16 \(5, 3\)"),
    ("per-view", "logits", np.float16(1), r"not float16 \(\)"),
    ("per-view", "logits", np.zeros((0, 5, 3), np.float16), "per-view logits must be"),
    ("per-view", "logits", np.full((2, 5, 3), np.nan, np.float16), "not finite"),
    ("per-view", "draws", np.zeros(3, np.float32), "labels/draws must be int64"),
    ("per-view", "draws", np.zeros(2, np.int64), "labels/draws must be int64"),
    ("per-view", "draws", np.array([0, 99, 0]), "version 99 of the draws"),
    ("per-view", "draws", np.array([0, 1, -4]), "micro=-4"),
    ("per-view", "views", np.array([0.5, 2.0, 1.0], np.float32), "views of scale"),
    ("per-view", "views", np.array([np.nan, 1.0, 1.0], np.float32), "views of scale"),
    ("per-view", "views", np.array([0.5, 1.0, 0.0], np.float32), "alpha=0"),
    ("per-view", "choices", np.array([2, 0, 0], np.uint8), "labels/choices"),
    ("per-view", "choices", np.array([1, 0, 3], np.uint8), "labels/choices"),
    ("per-view", "loss", np.array([0.0, 0.0], np.float32), "temperature="),
    ("per-view", "loss", np.array([np.nan, 0.0], np.float32), "temperature="),
    ("per-view", "flags", np.array([1, 2], np.uint8), "0 or 1"),
    ("calibrated", "calibrate", np.array([0.9, 0.2, 1.0], np.float32), "low <= mid"),
    ("calibrated", "hard", np.array([0, 1, 2, 3, 0]), "outside 0..2"),
    ("calibrated", "hard", np.array([0, 1]), "hard: must be int64"),
    ("hard", "hard", np.zeros(5, np.float32), "labels/hard must be int64"),
    ("hard", "smoothing", np.array([2.0], np.float32), "smoothing=2"),
    ("soft", "logits", np.zeros((5, 2), np.float32), "labels/logits must be float32 .any, 3."),
    ("static", "logits", np.zeros((5, 3)), "labels/logits must be float32"),
    ("static", "logits", np.full((5, 3), np.inf, np.float32), "not finite"),
    ("static", "loss", np.zeros(2, np.float32), "labels/loss must be float32"),
    ("distances", "distances", np.zeros((2, 5, 3), np.float16), "labels/distances must be float16 .any, any, 2."),
    ("distances", "hard", np.array([0, 1, 2, 1, 7]), "outside 0..2"),
    ("distances", "loss", np.array([-1.0], np.float32), "weight=-1"),
    ("distances", "choices", np.array([1, 0, 0], np.uint8), "mix=none"),
    ("teacher", "networks", np.frombuffer(b"{}", np.uint8), "labels/networks does not name"),
    ("teacher", "networks", np.frombuffer(b'{"names": [], "shape": [1, 8, 8]}', np.uint8), "does not name"),
    (
        "teacher",
        "networks",
        np.frombuffer(b'{"names": ["convnet-d2-w4-bn"], "shape": [1, 8, 8]}', np.uint8),
        "not the weights of convnet-d2-w4-bn",
    ),
    ("teacher", "networks", np.frombuffer(b'{"names": ["no-net"], "shape": [1, 8, 8]}', np.uint8), "no-net"),
    ("teacher", "weights", np.array([0.5, 0.5], np.float32), "labels/weights must be float32"),
    ("teacher", "weights", np.array([2.0], np.float32), "shares of 1"),
    ("teacher", "member0.classifier.weight", np.zeros(2, np.float32), "not the weights of"),
    ("teacher", "member0.foreign", np.zeros(2, np.float32), "not the weights of"),
]


@pytest.mark.parametrize(("kind", "name", "wrong", "words"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_arrays_are_refused_in_one_line(kind, name, wrong, words):
    labels = made_of(kind)
    with pytest.raises(CondenseError, match=words) as fault:
        type(labels).from_arrays({**labels.arrays(), name: wrong}, 3)
    assert "\n" not in str(fault.value)


def test_the_file(tmp_path, chosen, teacher):
    made = relabel(chosen, teacher, 3, seed=4)
    path = made.save(tmp_path / "a.h5")
    loaded = condense.load(path)
    assert loaded.sha256() == made.sha256() != chosen.sha256()
    assert loaded.manifest["label_kind"] == "per-view" and loaded.manifest["teacher"]["network"] == "ConvNet"
    assert "protocol" not in loaded.manifest and "protocol" in chosen.manifest
    assert loaded.nbytes()["labels"] == 2 * 3 * 6 * 3 + 49 and loaded.nbytes()["external"] == 0
    for (images, targets), (others, expected) in zip(loaded.batches(1, 4), made.batches(1, 4)):
        assert torch.equal(images, others) and torch.equal(targets, expected)
    with pytest.raises(CondenseError, match="belong to augmented views"):
        _ = loaded[0]
    with h5py.File(path, "r+") as opened:
        opened["labels/draws"][0] = 5
    hdf5.write_user_block(path, DISTILLED_FORMAT)
    with pytest.raises(CondenseError, match="'labels/draws' is damaged"):
        condense.load(path)


def test_static_labels_serve_single_images():
    manifest = {**chosen_set().manifest, "space": "training"}
    made = DistilledSet(pictures(), made_of("static"), chosen_set().transform, manifest)
    image, target = made[2]
    assert torch.equal(image, made.images[2]) and torch.equal(target, (logits()[0, 2] / 4).softmax(0))


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


def test_relabelling_hands_its_options_on(chosen, teacher):
    rule, how = ViewRule(0.4, mix="cutmix"), {"statistics": "batch", "micro": 3}
    made = relabel(
        chosen, teacher, 2, seed=4, views=rule, temperature=2.0, squared=False, calibrate=(0.1, 0.5, 0.9), **how
    )
    assert made.labels.views == rule and made.labels.calibrate == (0.1, 0.5, 0.9) and made.labels.micro == 3
    assert torch.equal(made.labels.hard, chosen.hard_labels())
    images = chosen.training_images()[0]
    assert torch.equal(made.labels.logits, compute_view_logits(teacher, images, 2, rule, 4, classes=3, **how))
    packed = relabel(chosen, teacher, 2, seed=4, views=rule, loss_kind="mse", gamma=0.2)
    assert packed.labels.gamma == 0.2 and packed.labels.loss_kind == "mse"
    assert "micro=0" in packed.labels.cache_key() and "micro=3" in made.labels.cache_key()
    with pytest.raises(CondenseError, match="loss_kind=ms"):  # before the work
        relabel(chosen, teacher, 10**9, loss_kind="ms")


def test_a_set_with_other_labels_claims_nothing_of_the_old_ones(chosen, teacher):
    labels = StaticLabels(compute_view_logits(teacher, chosen.training_images()[0], 1, ViewRule(), 0, classes=3)[0], 0)
    made = replace_labels(chosen, labels, teacher, description="some", seconds=3.0)
    assert made.labels is labels and made.manifest["label_kind"] == "static" and "protocol" not in made.manifest
    assert made.manifest["teacher"]["network"] == "some" and made.manifest["cost"]["preparation_seconds"] >= 3
    with pytest.raises(CondenseError, match="6 images but 5 static labels"):
        replace_labels(chosen, made_of("static"), teacher)


def test_progress_is_shown_unless_quiet(chosen, teacher, capsys, monkeypatch):
    monkeypatch.setenv("CONDENSE_PROGRESS_SECONDS", "0")
    relabel(chosen, teacher, 2)
    assert not capsys.readouterr().err
    relabel(chosen, teacher, 2, quiet=False)
    assert "relabel: step 1 of 2" in capsys.readouterr().err


def test_data_that_do_not_survive_mirroring_are_not_mirrored(chosen, teacher):
    assert relabel(chosen, teacher, 1).labels.views.flip
    chosen.manifest["mirror"] = False
    assert not relabel(chosen, teacher, 1).labels.views.flip


def test_sets_and_teachers_that_cannot_be(tiny, chosen, teacher):
    with pytest.raises(CondenseError, match="epochs=0"):
        relabel(chosen, teacher, 0)
    with pytest.raises(CondenseError, match=r"the teacher returns \(6, 2\)"):
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
            torch.testing.assert_close(targets, softened(teacher, shown), atol=1e-3, rtol=0)


def softened(teacher, images):
    with torch.no_grad():
        return (teacher.eval()(images) / 20).softmax(1)


@pytest.mark.parametrize("together", [False, True])
def test_students_see_the_views_of_their_pass_and_no_other_augmentation(tiny, chosen, teacher, together):
    """Two passes of two batches, against the update written out."""
    from condense.augment import make_augmentation
    from condense.training import batch_ids

    made = relabel(chosen, teacher, 2)
    images, ids = made.training_images()
    source = FixedSource(images, made.labels, ids)
    students = [Student(fresh(tiny, k), source, k) for k in range(2)]
    train(students, recipe(4, batch=4, augment=make_augmentation("color_crop")), device=CPU, together=together)
    other = fresh(tiny, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 2 else 0.005
        rows = batch_ids(1, 6, 4, step)
        epoch = step // 2
        answer = other(made.labels.training_batch(images, rows, epoch)[0])
        optimizer.zero_grad()
        target = (made.labels.logits[epoch, rows].float() / 20).softmax(1)
        (F.kl_div((answer / 20).log_softmax(1), target, reduction="batchmean") * 400).backward()
        optimizer.step()
    for a, b in zip(students[1].network.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", ["smoothed", "teacher", *KINDS])
def test_students_learn_from_every_kind(kind, together, tmp_path, monkeypatch):
    """As by hand: the views and the loss of the labels, and from a checkpoint too."""
    from condense.training import batch_ids

    labels, images = made_of(kind), pictures()

    def fresh_ones():
        with rng.seeded("student"):
            nets = [networks.build_network("convnet-d1-w4-in", (1, 8, 8), 3) for _ in range(2)]
        return [Student(net, FixedSource(images, labels), k) for k, net in enumerate(nets)]

    def weights(students):
        return [parameter.detach().clone() for student in students for parameter in student.network.parameters()]

    trained = fresh_ones()
    train(trained, recipe(5, batch=3), device=CPU, together=together)
    by_hand = fresh_ones()
    for student in by_hand:
        net = student.network
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 0.05 if step < 2.5 else 0.005
            views, targets = labels.training_batch(images, batch_ids(student.seed, 5, 3, step), step // 2)
            optimizer.zero_grad()
            labels.loss(net(views), targets).backward()
            optimizer.step()
    for a, b in zip(weights(trained), weights(by_hand)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    killed = fresh_ones()

    def kill(done):
        if done == 4:
            raise KeyboardInterrupt

    where = tmp_path / "training"
    with pytest.raises(KeyboardInterrupt):
        train(killed, recipe(5, batch=3), device=CPU, together=together, checkpoint=where, report=kill)
    again = fresh_ones()
    train(again, recipe(5, batch=3), device=CPU, together=together, checkpoint=where)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(trained)))


def test_live_teachers_answer_in_the_precision_of_the_student():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return x.flatten(1)[:, :3]

    for precision in ("fp32", "bf16"):
        source = FixedSource(pictures(), TeacherLabels(Spy(), 5, 0))
        with rng.seeded("student"):
            net = networks.build_network("convnet-d1-w4-in", (1, 8, 8), 3)
        train([Student(net, source, 0)], recipe(1), device=CPU, precision=precision)
    assert seen == [False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["hard", "soft", "smoothed", "teacher", *KINDS])
def test_labels_on_a_gpu(kind):
    device = torch.device("cuda")
    labels, images = made_of(kind, views=None if kind in ("hard", "soft", "smoothed") else RULES[1]), pictures()
    moved, ids = labels.to(device), torch.tensor([4, 0, 2])
    shown, targets = moved.training_batch(images.to(device), ids.to(device), 1)
    expected, wanted = labels.training_batch(images, ids, 1)
    torch.testing.assert_close(shown.cpu(), expected, atol=1e-6, rtol=0)
    near = {"atol": 5e-3, "rtol": 5e-3} if kind == "teacher" else {"atol": 1e-5, "rtol": 1e-5}  # TF32
    torch.testing.assert_close(targets.cpu(), wanted, **near)
    student = torch.randn(3, 3)
    torch.testing.assert_close(moved.loss(student.to(device), targets).cpu(), labels.loss(student, wanted), **near)
    assert {name: a.nbytes for name, a in moved.arrays().items()} == {n: a.nbytes for n, a in labels.arrays().items()}


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


@pytest.mark.parametrize("kind", ["static", "distances", "teacher", "calibrated", "mse and classes", "batch"])
def test_the_judge_has_every_arm_for_every_kind(tiny, chosen, three_steps, kind):

    with rng.seeded("judged"):
        net = networks.build_network(NAMES[0], (1, 8, 8), 3)
    images, rule, hard = chosen.training_images()[0], ViewRule(mix="cutmix"), chosen.hard_labels()

    def asked(**how):
        return compute_view_logits(net, images, 2, rule, 0, classes=3, **how)

    labels = {
        "static": lambda: StaticLabels(asked()[0], 0),
        "distances": lambda: DistanceLabels(
            compute_view_nll(net, images, hard, 2, rule, 0, classes=3), hard, 3, 0, rule
        ),
        "teacher": lambda: TeacherLabels(net, 6, 0, names=NAMES[:1], shape=(1, 8, 8)),
        "calibrated": lambda: PerViewLabels(asked(), 0, rule, calibrate=(0.3, 0.5, 0.9), hard=hard),
        "mse and classes": lambda: PerViewLabels(asked(), 0, rule, loss_kind="mse", gamma=0.1, hard=hard),
        "batch": lambda: PerViewLabels(asked(statistics="batch", micro=2), 0, rule, statistics="batch", micro=2),
    }[kind]()
    made = replace_labels(chosen, labels, net)
    record = condense.evaluate(
        made,
        tiny,
        networks=NETWORK,
        runs=2,
        controls=["random", "noise"],
        without_augmentation=True,
        teacher=None if kind == "teacher" else net,
    )
    assert [(e["arm"], e["labels"]) for e in record["results"]] == [
        ("distilled", "own"),
        ("random", "own"),
        ("noise", "own"),
    ]
    assert [entry["arm"] for entry in record["missing"]] == ["distilled without augmentation"]
    assert record["set"]["bytes"]["labels"] == labels.nbytes()
    others = torch.randn(4, 1, 8, 8)
    again = labels.label_images(others, net, 9, torch.tensor([0, 1, 2, 0]))
    assert again.cache_key() == labels.cache_key() and type(again) is type(labels) and len(again) == 4
    assert getattr(again, "hard", None) is None or again.hard.tolist() == [0, 1, 2, 0]
    if kind == "batch":
        expected = compute_view_logits(net, others, 2, rule, 9, classes=3, statistics="batch", micro=2)
        assert torch.equal(again.logits, expected)


def test_random_images_are_smoothed_as_those_of_the_set(chosen, tiny):
    from condense.judge import arms

    made = DistilledSet(chosen.stored, HardLabels(chosen.hard_labels(), 3, 0.1), chosen.transform, chosen.manifest)
    for make in (arms.random_source, arms.noise_source):
        assert make(0, 2, 0.1, tiny, 0).labels.smoothing == made.labels.smoothing
    assert made.sha256() != chosen.sha256()


def test_the_judge_and_fit_take_such_sets(tiny, chosen, teacher, three_steps):

    made = relabel(chosen, teacher, 2)
    record = condense.evaluate(made, tiny, networks=NETWORK, runs=1, controls=["random"])
    assert record["set"]["label_kind"] == "per-view"
    assert [entry["arm"] for entry in record["missing"]] == ["random"]
    assert not condense.fit(made, NETWORK).training
