"""Light labels: what comes back, within which error, of which views, in how many bytes."""

import copy

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import condense
from condense import networks, rng
from condense.augment import ViewRule
from condense.data import Standardise
from condense.errors import CondenseError
from condense.labels import (
    LABEL_KINDS,
    HalfCode,
    Int8Code,
    Int8TeacherLabels,
    LowRankCode,
    LowRankLabels,
    PerViewLabels,
    PoolLabels,
    TeacherLabels,
    TopKCode,
    TopKLabels,
    compute_view_logits,
    dequantise,
    fidelity,
    kept_pool_epochs,
    quantise,
)
from condense.labels import codes as codes_module
from condense.sets import DistilledSet

NETWORK, IMAGES, CLASSES = "convnet-d2-w8-bn", 6, 3
HARD = torch.tensor([0, 0, 1, 1, 2, 2])
RULE = ViewRule(0.3, 0.9, mix="cutmix")


def drawn(*shape, scale=4.0):
    return scale * torch.randn(*shape, generator=rng.generator("light", *shape))


def pictures(count=IMAGES):
    return torch.randn(count, 1, 8, 8, generator=rng.generator("pictures", count))


def stored(epochs=5, images=IMAGES, classes=CLASSES, views=RULE, **terms):
    return PerViewLabels(drawn(epochs, images, classes), 3, views, **{"temperature": 4.0, **terms})


def a_net(seed=0, name=NETWORK):
    with rng.seeded("net", seed):
        net = networks.build_network(name, (1, 8, 8), CLASSES)
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return net.eval()


def everything(code):
    """All logits (E, N, C) of a code."""
    epochs, images, classes = code.shape
    grid = torch.cartesian_prod(torch.arange(epochs), torch.arange(images))
    return code.read(grid[:, 0], grid[:, 1]).view(epochs, images, classes)


def centred(logits):
    return logits - logits.mean(-1, keepdim=True)


MADE = {
    "lowrank": lambda: LowRankLabels.of(stored(), 2),
    "lowrank, mse": lambda: LowRankLabels.of(stored(loss_kind="mse"), 2),
    "topk": lambda: TopKLabels.of(stored(), 2),
    "topk, mr": lambda: TopKLabels.of(stored(), 2, "mr"),
    "topk, calibrated": lambda: TopKLabels.of(stored(calibrate=(0.1, 0.5, 0.95), hard=HARD), 2),
    "pool": lambda: PoolLabels.pruned(stored(), 2, hard=HARD),
    "pool, int8": lambda: PoolLabels.pruned(stored(), 2, Int8Code.encode(stored().logits), HARD),
    "pool, topk": lambda: PoolLabels.pruned(stored(), 3, TopKCode.encode(stored().logits, 1), HARD),
    "pool, mse and classes": lambda: PoolLabels.pruned(stored(loss_kind="mse", gamma=0.5, hard=HARD), 2),
    "teacher-int8": lambda: Int8TeacherLabels(
        [a_net(), a_net(1)], IMAGES, 3, RULE, 4.0, weights=(1, 3), names=(NETWORK, NETWORK), shape=(1, 8, 8)
    ),
}


def saved(tmp_path, labels):
    manifest = {
        "name": "tiny/set-ipc2",
        "dataset": "tiny",
        "method": "random",
        "network": NETWORK,
        "classes": list("abc"),
        "ipc": 2,
        "space": "pixel",
        "decode": [],
    }
    transform = Standardise(torch.zeros(1), torch.ones(1))
    made = DistilledSet(pictures(), labels, transform, manifest)
    return made, made.save(tmp_path / "set.h5")


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [7, 300])
def test_codes_decode_within_the_stated_error(classes):
    logits = drawn(3, 5, classes).half()
    for code in (
        HalfCode.encode(logits),
        Int8Code.encode(logits),
        LowRankCode.encode(logits, 5),
        LowRankCode.encode(logits, 5, True),
        TopKCode.encode(logits, 4),
    ):
        error, true, read = fidelity(code, logits, 4.0), centred(logits.float()), centred(everything(code))
        assert float((true - read).abs().max()) <= error.largest
        assert float((true - read).square().sum() / true.square().sum()) <= error.relative
        assert float((true - read).abs().max()) >= 0.99 * error.largest - 1e-4  # no idle bound
        shares = ((logits.float() / 4).softmax(-1) - (read / 4).softmax(-1)).abs().sum(-1) / 2
        assert error.moved == pytest.approx(float(shares.mean()), abs=1e-6)
        again = type(code).from_arrays(code.arrays(), classes)
        assert torch.equal(everything(again), everything(code)) and str(again) == str(code)


def test_low_rank_logits_come_back_almost_whole():
    """A linear layer of d features gives logits of rank d, whatever the number of classes."""
    logits = drawn(4, 30, 6) @ drawn(6, 40, scale=1.0)
    spread = float(centred(logits).square().mean().sqrt())
    assert fidelity(LowRankCode.encode(logits, 6), logits, 1.0).largest < 0.05 * spread
    errors = [fidelity(LowRankCode.encode(logits, rank), logits, 1.0).relative for rank in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
    flat = centred(logits).flatten(0, 1)
    lost = torch.linalg.svdvals(flat - flat.mean(0))[2:].square().sum() / flat.square().sum()
    assert errors[1] == pytest.approx(float(lost), rel=0.02)  # the best that two axes can do


def test_means_of_views_are_kept_for_the_squared_error_alone():
    logits = drawn(4, 6, 5) + 30
    assert LowRankLabels.of(PerViewLabels(logits, 0), 4).code.means is None
    kept = LowRankLabels.of(PerViewLabels(logits, 0, loss_kind="mse"), 4)
    assert float((everything(kept.code) - logits).abs().max()) < 0.3
    assert kept.nbytes() - LowRankLabels.of(PerViewLabels(logits, 0), 4).nbytes() == 2 * 4 * 6


def test_low_rank_codes_decode_alike_in_any_precision():
    code = LowRankCode.encode(drawn(2, 5, 9), 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = everything(code)
    assert inside.dtype == torch.float32 and torch.equal(inside, everything(code))


@pytest.mark.parametrize("classes", [200, 40_000])
def test_top_k_fills_with_the_minimum_or_leaves_out(classes):
    logits = drawn(1, 3, classes)
    logits[0, :, -1] = 60.0  # of the highest number
    best = logits.half().topk(4).indices
    for fill in ("mrs", "mr"):
        code = TopKCode.encode(logits, 4, fill)
        read = everything(TopKCode.from_arrays(code.arrays(), classes))
        assert torch.equal(read.gather(2, best), logits.half().float().gather(2, best))
        others = torch.ones_like(read, dtype=torch.bool).scatter(2, best, False)
        if fill == "mrs":
            expected = logits.half().float().amin(-1, keepdim=True).expand_as(read)
            assert torch.equal(read[others], expected[others])
        else:
            targets = read.softmax(-1)
            assert not targets[others].any()
            torch.testing.assert_close(targets.gather(2, best), logits.half().float().gather(2, best).softmax(-1))
        width = 1 if classes <= 256 else 2
        assert sum(array.nbytes for array in code.arrays().values()) == 3 * (4 * (2 + width) + 2 * (fill == "mrs"))


def test_a_view_of_equal_logits_has_codes():
    logits = torch.full((1, 2, 4), 2.5)
    for code in (Int8Code.encode(logits), LowRankCode.encode(logits, 2, True), TopKCode.encode(logits, 1)):
        torch.testing.assert_close(everything(code), logits)
        assert fidelity(code, logits, 1.0).largest < 1e-3


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_bytes_are_those_of_the_arrays_and_of_the_file(name, tmp_path):
    labels = MADE[name]()
    assert labels.nbytes() == sum(array.nbytes for array in labels.arrays().values())
    made, path = saved(tmp_path, labels)
    with h5py.File(path) as file:
        assert made.nbytes()["labels"] == sum(one[()].nbytes for one in file["labels"].values())
    assert labels.external_nbytes() == 0


@pytest.mark.parametrize("name", MADE)
def test_labels_are_the_same_in_any_batch_and_after_save_and_load(name, tmp_path):
    labels, images, ids = MADE[name](), pictures(), torch.arange(IMAGES)
    loaded = condense.load(saved(tmp_path, labels)[1]).labels
    assert type(loaded) is type(labels) and loaded.cache_key() == labels.cache_key()
    assert loaded.nbytes() == labels.nbytes()
    for epoch in (7, 0, 6):  # also beyond the stored epochs, and back
        views, targets = labels.training_batch(images, ids, epoch)
        whole = [loaded.training_batch(images, ids, epoch)]
        parts = [loaded.training_batch(images, part, epoch) for part in torch.tensor([[4, 0, 2], [5, 3, 1]])]
        whole.append(tuple(torch.cat(both)[torch.tensor([1, 5, 2, 4, 0, 3])] for both in zip(*parts)))
        for seen, asked in whole:
            assert torch.equal(seen, views)
            torch.testing.assert_close(asked, targets, rtol=1e-6, atol=1e-6)
    loss = labels.loss(drawn(IMAGES, CLASSES), targets)
    assert bool(loss.isfinite()) and torch.equal(loss, loaded.loss(drawn(IMAGES, CLASSES), targets))
    assert again_equal(labels, loaded)


def again_equal(labels, loaded):
    """Whether both write the same arrays."""
    one, two = labels.arrays(), loaded.arrays()
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["lowrank", "topk"])
def test_targets_are_those_of_the_full_labels_within_the_error(kind):
    full, light = stored(), MADE[kind]()
    images, ids = pictures(), torch.arange(IMAGES)
    moved = []
    for epoch in range(5):
        views, targets = full.training_batch(images, ids, epoch)
        seen, asked = light.training_batch(images, ids, epoch)
        assert torch.equal(seen, views)
        moved.append((targets - asked).abs().sum(1).mean() / 2)
    assert float(torch.stack(moved).mean()) == pytest.approx(light.error.moved, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in MADE if name != "teacher-int8"])
def test_other_images_get_such_labels(name):
    labels, net, others = MADE[name](), a_net(2), pictures(4)
    again = labels.label_images(others, net, 9, torch.tensor([0, 1, 2, 0]))
    assert type(again) is type(labels) and again.cache_key() == labels.cache_key() and len(again) == 4
    assert again.hard is None or again.hard.tolist() == [0, 1, 2, 0]
    asked = compute_view_logits(net, others, 5, RULE, 9, classes=CLASSES)
    if labels.kind != "pool":
        terms = {**labels.terms(), "seed": 9, "hard": again.hard}
        assert again_equal(again, labels.like(PerViewLabels(asked, **terms)))


def test_labels_move(tmp_path):
    for name, make in MADE.items():
        labels = make()
        moved = labels.to(torch.device("cpu"))
        assert again_equal(labels, moved), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", MADE)
def test_light_labels_on_a_gpu(name):
    device = torch.device("cuda")
    labels, images, ids = MADE[name](), pictures(), torch.tensor([4, 0, 2])
    moved = labels.to(device)
    shown, targets = moved.training_batch(images.to(device), ids.to(device), 6)
    expected, wanted = labels.training_batch(images, ids, 6)
    torch.testing.assert_close(shown.cpu(), expected, atol=1e-6, rtol=0)
    near = {"atol": 5e-3, "rtol": 5e-3} if name == "teacher-int8" else {"atol": 1e-5, "rtol": 1e-5}  # TF32
    torch.testing.assert_close(targets.cpu(), wanted, **near)
    if name != "teacher-int8":
        again = moved.like(PerViewLabels(stored().logits.to(device), **{**stored().terms(), **moved.terms()}))
        assert again_equal(labels, again) or isinstance(labels, LowRankLabels)  # sums have another order there


# -- pool -------------------------------------------------------------------------------------------------------------


def test_a_pool_shows_records_of_the_full_labels():
    """Each image shows the view and the label that it had in the epoch that its class has drawn."""
    full, light = stored(epochs=9), PoolLabels.pruned(stored(epochs=9), 3, hard=HARD)
    images, ids, seen = pictures(), torch.arange(IMAGES), set()
    for epoch in range(40):
        views, targets = light.training_batch(images, ids, epoch)
        slots = light.slots(epoch)
        for image in range(IMAGES):
            source = int(light.kept[HARD[image], slots[HARD[image]]])
            seen.add((int(HARD[image]), source))
            view, target = full.training_batch(images, ids[image : image + 1], source)
            assert torch.equal(views[image], view[0]) and torch.equal(targets[image], target[0])
    assert seen == {(c, e) for c in range(CLASSES) for e in light.kept[c].tolist()}
    assert light.exactness == "exact" and light.error.largest < 1e-4


@pytest.mark.parametrize("views", [ViewRule(), ViewRule(pad=2, mix="mixup", alpha=0.8)])
def test_a_pool_without_cutmix(views):
    full, light = stored(views=views), PoolLabels.pruned(stored(views=views), 2, hard=HARD)
    source = light.kept.gather(1, light.slots(4)[:, None])[:, 0][HARD]
    shown, _ = light.training_batch(pictures(), torch.arange(IMAGES), 4)
    for image, epoch in enumerate(source.tolist()):
        assert torch.equal(shown[image], full.training_batch(pictures(), torch.tensor([image]), epoch)[0][0])


def test_what_a_pool_keeps_and_draws_follows_from_the_seed():
    kept = kept_pool_epochs(5, 400, 20, 4)
    assert torch.equal(kept, kept_pool_epochs(5, 400, 20, 4)) and not torch.equal(kept, kept_pool_epochs(6, 400, 20, 4))
    assert (kept[:, 1:] > kept[:, :-1]).all() and int(kept.min()) >= 0 and int(kept.max()) < 20
    counts = torch.bincount(kept.flatten(), minlength=20)
    assert int(counts.min()) > 40 and int(counts.max()) < 130  # 80 of each are expected
    light = PoolLabels.pruned(stored(epochs=6), 3, hard=HARD)
    slots = torch.stack([light.slots(epoch) for epoch in range(300)])
    assert torch.equal(light.slots(3), light.slots(3))
    assert all(70 < int(count) < 130 for c in range(CLASSES) for count in torch.bincount(slots[:, c], minlength=3))
    assert not torch.equal(slots[:, 0], slots[:, 1])


def test_a_pool_of_a_tenth_needs_a_tenth():
    full, light = stored(epochs=60), PoolLabels.pruned(stored(epochs=60), 6, hard=HARD)
    assert light.arrays()["values"].nbytes * 10 == full.arrays()["logits"].nbytes
    assert light.arrays()["hard"].nbytes == IMAGES


# -- teachers in 8 bits -----------------------------------------------------------------------------------------------


def test_eight_bits_are_within_half_a_step_and_come_back_as_they_are():
    weight = drawn(5, 3, 3, 3)
    weight[1] *= 1e-9
    weight[2] = 0
    codes, scale = quantise(weight)
    back = dequantise(codes, scale)
    assert codes.dtype == torch.int8 and scale.shape == (5,)
    assert ((weight - back).abs().flatten(1).amax(1) <= 0.501 * scale).all()
    for one, two in zip(quantise(back), (codes, scale)):
        assert torch.equal(one, two)


def test_a_teacher_in_eight_bits_answers_nearly_as_before(tmp_path):
    net = a_net()
    before = copy.deepcopy(net.state_dict())
    labels = Int8TeacherLabels(net, IMAGES, 3, RULE, 4.0, names=[NETWORK], shape=(1, 8, 8))
    assert all(torch.equal(one, two) for one, two in zip(net.state_dict().values(), before.values()))
    loaded = condense.load(saved(tmp_path, labels)[1]).labels
    with torch.no_grad():
        true, read = net(pictures()), labels.teacher(pictures())
        assert torch.equal(read, loaded.teacher(pictures()))
    assert 0 < float((true - read).abs().max()) < 0.05 * float(true.abs().max())
    full = TeacherLabels(net, IMAGES, 3, RULE, 4.0, names=[NETWORK], shape=(1, 8, 8))
    assert len(loaded) == IMAGES and loaded.cache_key() == full.cache_key()
    assert isinstance(loaded.label_images(pictures(4), net, 9), Int8TeacherLabels)
    saved_bytes = full.nbytes() - labels.nbytes()
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert saved_bytes == sum(3 * weight.numel() - 4 * len(weight) for weight in weights)
    arrays = labels.arrays()
    assert sum(array.dtype == np.int8 for array in arrays.values()) == len(weights)
    assert all(arrays[name].dtype == np.float32 for name in arrays if "running" in name or name.endswith("bias"))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, line",
    [
        (lambda: LowRankLabels.of(stored(), 4), "rank=4: must be 1 to 3, the number of classes"),
        (lambda: TopKLabels.of(stored(), 0), "k=0: must be 1 to 3, the number of classes"),
        (lambda: TopKLabels.of(stored(), 2, "mss"), "fill=mss: unknown; did you mean 'mrs'?"),
        (lambda: TopKLabels.of(stored(loss_kind="mse"), 2, "mr"), "fill=mr: loss_kind=mse needs the logits"),
        (lambda: PoolLabels.pruned(stored(), 6, hard=HARD), "a pool of 6 epochs: must be 1 to 5"),
        (lambda: PoolLabels.pruned(stored(), 2), "pool: needs the class of each image; give hard"),
        (lambda: MADE["pool"]().training_batch(pictures(4), torch.arange(4), 0), "4 images but 6 pool labels"),
        (lambda: MADE["lowrank"]().training_batch(pictures(4), torch.arange(4), 0), "4 images but 6 lowrank labels"),
        (lambda: MADE["topk"]().targets(torch.arange(2)), "topk labels belong to augmented views"),
    ],
)
def test_refusals(make, line):
    with pytest.raises(CondenseError) as fault:
        make()
    assert str(fault.value).startswith(line) and "\n" not in str(fault.value)


@pytest.mark.parametrize(
    "kind, name, value, line",
    [
        ("lowrank", "codes", np.zeros((5, 6, 3), np.int8), "labels/codes must be int8 (any, any, 2)"),
        ("lowrank", "codes", np.zeros((5, 6, 2), np.uint8), "labels/codes must be int8"),
        ("lowrank", "scale", np.array([1, np.inf], np.float32), "labels/scale has values that are not finite"),
        ("lowrank", "basis", np.zeros((2, 4), np.float16), "labels/basis must be float16 (any, 3)"),
        ("lowrank", "error", np.array([1, -1, 0], np.float32), "labels/error must be finite and at least 0"),
        ("lowrank", "codes", np.zeros((0, 6, 2), np.int8), "lowrank labels without epochs"),
        ("topk", "numbers", np.full((5, 6, 2), 3, np.uint8), "labels/numbers has values outside 0..2"),
        ("topk", "numbers", np.zeros((5, 6, 2), np.uint16), "labels/numbers must be uint8"),
        ("topk", "least", np.zeros((5, 5), np.float16), "labels/least must be float16 (5, 6)"),
        ("pool", "code", np.frombuffer(b"zip", np.uint8), "labels/code names 'zip', which is none of half, int8"),
        ("pool", "of", np.array([1], np.int64), "a pool of 2 epochs: out of range for 1 labelled"),
        ("pool", "hard", np.full(6, 3, np.uint8), "labels/hard has values outside 0..2"),
        ("pool", "hard", np.zeros(5, np.uint8), "hard: must be int64 (6,)"),
        ("pool", "values", np.full((2, 6, 3), np.nan, np.float16), "labels/values has values that are not finite"),
    ],
)
def test_untrusted_arrays_are_checked(kind, name, value, line):
    arrays = {**MADE[kind]().arrays(), name: value}
    with pytest.raises(CondenseError) as fault:
        LABEL_KINDS.get(kind).from_arrays(arrays, CLASSES)
    assert str(fault.value).startswith(line) and "\n" not in str(fault.value)


def test_a_strangers_teacher_without_scales():
    arrays = MADE["teacher-int8"]().arrays()
    name = next(name for name in arrays if name.startswith("scale0"))
    for broken in ({key: value for key, value in arrays.items() if key != name}, {**arrays, name: arrays[name][:1]}):
        with pytest.raises(CondenseError, match=r"8-bit weights without their scales|must be float32"):
            Int8TeacherLabels.from_arrays(broken, CLASSES)


def test_every_kind_says_what_it_is():
    for name in LABEL_KINDS.names():
        provider = LABEL_KINDS.get(name)
        assert provider.kind == name and provider.per_view in (True, False)
    for name, make in MADE.items():
        labels = make()
        assert (
            labels.exactness == ("exact" if name in ("pool", "pool, mse and classes") else "lossy") and labels.step_cost
        )
    assert set(codes_module.CODES) == {"half", "int8", "lowrank", "topk"}
