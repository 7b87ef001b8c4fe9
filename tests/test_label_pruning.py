"""Label pruning: moments of classes, the loop written plainly, and pools that ask about nothing else."""

import contextlib
import hashlib
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_archive
from torch import nn

import condense
from condense import networks, rng
from condense.augment import CropViews, ViewRule
from condense.engine import Run
from condense.engine.run import FORWARD_PIXELS, GRADIENT_PIXELS
from condense.errors import CondenseError
from condense.jobs import estimate_cost
from condense.labels import (
    PerViewLabels,
    PoolLabels,
    TopKCode,
    codes,
    compute_pool_logits,
    compute_view_logits,
    teacher_logits,
)
from condense.lighten import lighten
from condense.methods.curriculum_synthesis import bn_matching, recovery
from condense.methods.label_lightening import lpld
from condense.pretraining import load_or_train_teachers
from condense.sets import SyntheticOptions, SyntheticSet

NETWORK, CLASSES = "convnet-d2-w8-bn", 3
SMALL = {"network": NETWORK, "teacher_epochs": 2, "teacher_batch": 8, "steps": 3, "label_epochs": 20}
RULE = ViewRule(0.3, 0.9, mix="cutmix")


def made(task, name="lpld", ipc=2, **changes):
    return condense.distill(name, task, ipc, **{**SMALL, "precision": "fp32", **changes})


def warm(name, shape, classes=CLASSES, dtype=torch.float64):
    """A teacher in eval mode whose norms have statistics and affine weights worth testing."""
    with rng.seeded("warm", name):
        net = networks.build_network(name, shape, classes).to(dtype)
        for _ in range(3):
            net(torch.randn(16, *shape, dtype=dtype) * 2 + 0.3)
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
    return net.eval().requires_grad_(False)


def inputs_of_norms(net, images):
    """What each BatchNorm is given."""
    found, handles = [], []
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        handles.append(norm.register_forward_hook(lambda layer, given, out: found.append(given[0])))
    logits = net(images)
    for handle in handles:
        handle.remove()
    return logits, found


def moments(x):
    """Mean and biased variance over images and pixels."""
    return x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1, correction=0)


def plain_moments(net, task):
    """Of each class, norm by norm: all its images at once, through hooks."""
    each = [inputs_of_norms(net, task.batch(torch.from_numpy(task.class_ids(c))))[1] for c in range(task.num_classes)]
    return [[moments(x) for x in norm] for norm in zip(*each)]


def a_run(task, ipc=2, **options):
    return Run(task, ipc, NETWORK, quiet=True, track="none", **options)


def double(run):
    """The run with images of float64."""
    original = run.task.batch
    run.task.batch = lambda ids: original(ids).double()
    return run


# -- moments of classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("name", [NETWORK, "resnet18-bn"])
def test_the_moments_of_classes_are_those_of_their_real_images(tiny_colour, name, chunk, monkeypatch):
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", str(chunk * 64 / FORWARD_PIXELS))
    run, net = double(a_run(tiny_colour)), warm(name, (3, 8, 8))
    found, expected = lpld.class_moments(run, net), plain_moments(net, run.task)
    assert len(found) == len(expected) == sum(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    for (means, variances), classes in zip(found, expected):
        torch.testing.assert_close(means, torch.stack([mean for mean, _ in classes]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(variances, torch.stack([one for _, one in classes]), rtol=1e-10, atol=1e-10)
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def test_single_precision_is_near(tiny_colour):
    net = warm(NETWORK, (3, 8, 8))
    found = lpld.class_moments(a_run(tiny_colour), warm(NETWORK, (3, 8, 8)).float())
    exact = lpld.class_moments(double(a_run(tiny_colour)), net)
    for one, other in zip(found, exact):
        torch.testing.assert_close(one[0].double(), other[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[1].double(), other[1], rtol=1e-4, atol=1e-5)


def test_ranks_share_the_classes_out(tiny):
    """Rank 1 hands its sums over, rank 0 adds them to its own."""
    net, given, found = warm(NETWORK, (1, 8, 8)), [], []
    whole = lpld.class_moments(double(a_run(tiny)), net)
    for rank, add in ((1, lambda one: given.append(one.clone())), (0, lambda one: one.add_(given.pop(0)))):
        run = double(a_run(tiny))
        run.ranks = types.SimpleNamespace(rank=rank, world_size=2, is_main_process=rank == 0, all_reduce_sum=add)
        found = lpld.class_moments(run, net)
    assert not given
    for one, other in zip(found, whole):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_the_released_moments_of_classes_are_moving_averages(tiny_colour):
    """The last images count; variances within an image are smaller than those of a class."""
    run, net = a_run(tiny_colour), warm(NETWORK, (3, 8, 8)).float()
    found = lpld.moving_class_moments(run, net)
    task, views = run.task, CropViews(flip=tiny_colour.mirror)
    for c in range(task.num_classes):
        draws, ids = rng.Draws(run.seed, "class moments", c), torch.from_numpy(task.class_ids(c))
        images = task.batch(ids[draws.sample(len(ids), lpld.MOVING_IMAGES)])
        images = views.apply(images, views.draw(draws, len(images), (8, 8)))
        norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
        averages = [(torch.zeros(norm.num_features), torch.ones(norm.num_features)) for norm in norms]
        for image in images:
            for k, x in enumerate(inputs_of_norms(net, image[None])[1]):
                now = x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1)
                averages[k] = tuple(0.9 * old + 0.1 * new for old, new in zip(averages[k], now))
        for (means, variances), (mean, variance) in zip(found, averages):
            torch.testing.assert_close(means[c], mean.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(variances[c], variance.detach(), rtol=1e-4, atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in net.modules())


@pytest.mark.parametrize("name", [NETWORK, "resnet18-bn", "vgg11-bn"])
def test_loss_and_slope_with_moments_of_classes_equal_the_formula(name):
    net, classes = warm(name, (3, 16, 16)), torch.tensor([2, 2, 2, 0, 0, 0])
    views = torch.randn(6, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    matcher, first, lam = bn_matching.Matcher(net, 10.0), 10.0, 0.3
    widths = [len(norm.running_mean) for norm in matcher.norms]
    targets = [tuple(torch.rand(2, CLASSES, width, dtype=torch.float64)) for width in widths]
    groups = [(mean[[2, 0]], variance[[2, 0]]) for mean, variance in targets]
    logits, distances = matcher(views, 2, contextlib.nullcontext, groups)
    losses = recovery.class_loss(logits, classes, len(distances)) + lam * distances
    found = losses, torch.autograd.grad(losses.sum(), views)[0]

    plain = []
    for c, part in ((2, views[:3]), (0, views[3:])):
        answer, given = inputs_of_norms(net, part)
        distance = 0.0
        for number, x in enumerate(given):
            mean, variance = moments(x)
            gap = (mean - targets[number][0][c]).norm() + (variance - targets[number][1][c]).norm()
            distance = distance + (first if number == 0 else 1.0) * gap
        plain.append(F.cross_entropy(answer, torch.full((3,), c)) + lam * distance)
    expected = torch.stack(plain), torch.autograd.grad(sum(plain), views)[0]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    again = matcher(views, 2, contextlib.nullcontext)[1]  # targets do not stay
    assert torch.equal(again, bn_matching.Matcher(net, 10.0)(views, 2, contextlib.nullcontext)[1])


# -- recovery ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_all_images_of_one_class(tiny):
    batches = lpld.make_single_class_batches(a_run(tiny, 4))
    rows = torch.arange(CLASSES).repeat_interleave(4)
    assert len(batches) == CLASSES
    for c, one in enumerate(batches):
        assert one.index == c and one.classes.tolist() == [c] * 4 and rows[one.rows].tolist() == [c] * 4
    assert sorted(torch.cat([one.rows for one in batches]).tolist()) == list(range(12))


@pytest.mark.parametrize("pixels", [1, 3 * 64 * 2, 1 << 20])
@pytest.mark.parametrize("at_once", [None, 2])
def test_targets_follow_the_batches_that_pass(tiny, monkeypatch, pixels, at_once):
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", str(pixels / GRADIENT_PIXELS))
    run = a_run(tiny, 2)
    config = lpld.LPLD(teacher_epochs=1, teacher_batch=8, steps=3, at_once=at_once)
    committee = load_or_train_teachers(run, config.teacher_training(tiny), architectures=[NETWORK], count=1)
    net = committee.members[0].network
    targets, batches = lpld.class_moments(run, net), lpld.make_single_class_batches(run)
    synthetic = SyntheticSet.create(tiny, 2, SyntheticOptions(init="noise"), seed=0, device=run.device)
    guides, classes = [recovery.guide_all(bn_matching.make_matcher(config, net), batches, targets)], []
    for batch in recovery.recovery_passes(config, run, synthetic, guides, batches):
        groups = batch.classes.view(len(batch.pixels), -1)
        for (mean, variance), (means, variances) in zip(batch.targets, targets):
            assert torch.equal(mean, means[groups[:, 0]]) and torch.equal(variance, variances[groups[:, 0]])
        assert (groups == groups[:, :1]).all() and groups.shape[1] == 2
        classes.append(groups[:, 0].tolist())
        logits, distances = batch.forward(batch.views(batch.pixels))
        batch.backward(recovery.class_loss(logits, batch.classes, len(distances)) + config.bn_weight * distances)
    assert sorted(c for part in classes for c in part) == sorted(list(range(CLASSES)) * 3)


def plain_loop(task, ipc, steps, config):
    """LPLD written plainly: class after class, with torch's Adam and views by indexing."""
    run = a_run(task, ipc)
    net = (
        load_or_train_teachers(run, config.teacher_training(task), architectures=[NETWORK], count=1).members[0].network
    )
    targets = plain_moments(net, run.task)
    start = SyntheticSet.create(task, ipc, SyntheticOptions(init="noise"), seed=0, device=run.device).images.detach()
    low, high = (task.transform(torch.full((task.shape[0], 1, 1), end)) for end in (0.0, 1.0))
    crops, classes, images = CropViews(config.min_scale, 1.0, config.flip), task.num_classes, []
    for c in range(classes):
        pixels = start[c * ipc : (c + 1) * ipc].clone().requires_grad_()
        adam = torch.optim.Adam([pixels], lr=config.lr_img, betas=(0.5, 0.9))
        for step in range(steps):
            adam.param_groups[0]["lr"] = config.lr_img * (1 + math.cos(math.pi * step / steps)) / 2
            views = crops.draw(rng.Draws(0, "crop", step), classes, task.shape[1:])
            down, right = rng.Draws(0, "roll", step).integers(config.jitter + 1, (classes, 2))[c].tolist()
            shown = crops.apply(pixels, views[torch.tensor([c] * ipc)]).roll((down, right), (2, 3))
            logits, given = inputs_of_norms(net, shown)
            loss = F.cross_entropy(logits, torch.full((ipc,), c))
            for number, x in enumerate(given):
                mean, variance = moments(x)
                gap = (mean - targets[number][c][0]).norm() + (variance - targets[number][c][1]).norm()
                loss = loss + config.bn_weight * (config.bn_first if number == 0 else 1.0) * gap
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                pixels.copy_(torch.minimum(torch.maximum(pixels, low), high))
        images.append(pixels.detach())
    return torch.cat(images)


@pytest.mark.parametrize("at_once", [None, 1])
def test_lpld_equals_the_plain_loop(tiny, at_once):
    config = lpld.LPLD(teacher_epochs=2, teacher_batch=8, steps=3)
    ours = made(tiny, store="float32", labels="hard", ipc=4, at_once=at_once).training_images()[0]
    torch.testing.assert_close(ours, plain_loop(tiny, 4, 3, config), rtol=1e-3, atol=1e-3)


def test_the_classes_moments_matter(tiny, monkeypatch):
    one = made(tiny, labels="hard", store="float32")

    def shuffled(run, net, original=lpld.class_moments):
        return [(mean.roll(1, 0), variance.roll(1, 0)) for mean, variance in original(run, net)]

    monkeypatch.setattr(lpld, "class_moments", shuffled)
    assert not torch.equal(one.stored, made(tiny, labels="hard", store="float32").stored)


def test_both_make_the_same_images(tiny):
    assert torch.equal(made(tiny).stored, made(tiny, "lpqld").stored)


# -- pools ------------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A network that counts what it is asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, 0

    def forward(self, images):
        self.asked += len(images)
        return self.net(images)


def pictures(count=9):
    return torch.randn(count, 1, 8, 8, generator=rng.generator("pictures", count))


HARD = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0])


@pytest.mark.parametrize("statistics, views", [("running", RULE), ("running", ViewRule()), ("batch", RULE)])
def test_kept_epochs_have_the_labels_of_all_epochs(statistics, views):
    """Teachers are asked about what is kept alone; with statistics of the batch about its micro-batches."""
    how = {"classes": CLASSES, "statistics": statistics, "micro": 3}
    net, images, of, count = Counted(warm(NETWORK, (1, 8, 8), dtype=torch.float32)), pictures(), 12, 2
    whole = compute_view_logits(net, images, of, views, 5, **how)
    everything, net.asked = net.asked, 0
    found = compute_pool_logits(net, images, HARD, of, views, 5, count, **how)
    pruned = PoolLabels.pruned(PerViewLabels(whole, 5, views, statistics=statistics, micro=3), count, hard=HARD)
    assert everything == of * len(images) and found.dtype == torch.float16
    if statistics == "batch":
        assert torch.equal(found, pruned.code.values) and net.asked < everything
    else:
        torch.testing.assert_close(found, pruned.code.values, rtol=2e-3, atol=2e-3)
        assert net.asked == count * len(images)


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_a_pool_of_all_epochs_is_all_labels(statistics):
    how = {"classes": CLASSES, "statistics": statistics, "micro": 4}
    net, images = warm(NETWORK, (1, 8, 8), dtype=torch.float32), pictures()
    found = compute_pool_logits(net, images, HARD, 4, RULE, 5, 4, **how)
    assert torch.equal(found, compute_view_logits(net, images, 4, RULE, 5, **how))


def test_labelling_goes_on_where_it_was(tmp_path):
    net, images, done = warm(NETWORK, (1, 8, 8), dtype=torch.float32), pictures(), []
    asked = (images, HARD, 8, RULE, 5, 2)
    whole = compute_pool_logits(net, *asked, classes=CLASSES)
    into = np.lib.format.open_memmap(tmp_path / "labels.npy", "w+", np.float16, whole.shape)

    class Stop(Exception):
        pass

    def report(epoch):
        done.append(epoch)
        if len(done) == 3:
            raise Stop

    with pytest.raises(Stop):
        compute_pool_logits(net, *asked, classes=CLASSES, into=into, report=report)
    counted = Counted(net)
    assert torch.equal(compute_pool_logits(counted, *asked, classes=CLASSES, into=into, start=done[-1]), whole)
    assert 0 < counted.asked < whole.shape[0] * whole.shape[1]


def plain_bits(counter, *parts):
    """63 bits of draw ``counter`` of a stream, in Python's own integers: splitmix64's finaliser."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    stream = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    x = (counter * 0x9E3779B97F4A7C15 + stream) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x ^ x >> 31) >> 1


def test_kept_epochs_and_slots_by_a_plain_computation():
    seed, of, count = 11, 17, 5
    labels = PerViewLabels(torch.randn(of, len(HARD), CLASSES), seed, RULE)
    pool = PoolLabels.pruned(labels, count, hard=HARD)
    for c in range(CLASSES):
        bits = [plain_bits(c * of + epoch, seed, "pool-kept") for epoch in range(of)]
        kept = sorted(sorted(range(of), key=bits.__getitem__)[:count])
        assert pool.kept[c].tolist() == kept
        for image in (c == HARD).nonzero()[:, 0].tolist():
            for slot, epoch in enumerate(kept):
                assert torch.equal(pool.code.values[slot, image], labels.logits[epoch, image])
        for epoch in range(40):
            assert int(pool.slots(epoch)[c]) == (plain_bits(c, seed, "pool", epoch) >> 31) * count >> 32


@pytest.mark.parametrize("name", ["lpld", "lpqld"])
def test_a_method_keeps_what_all_labels_pruned_would_be(tiny, name, monkeypatch):
    """The whole way: labels of every view by the same teacher, pruned and coded afterwards."""
    changes = {"keep": 0.2, "label_epochs": 15, **({"k": 2} if name == "lpqld" else {})}
    light, full = made(tiny, name, **changes), made(tiny, "lpld", labels="per-view", label_epochs=15)
    assert torch.equal(light.stored, full.stored) and light.labels.shape == (3, 6, CLASSES)
    code = TopKCode.encode(full.labels.logits[:1], 2) if name == "lpqld" else None
    pruned = PoolLabels.pruned(full.labels, 3, code, full.hard_labels(), light.labels.cooling)
    images, ids = light.training_images()
    for epoch in (0, 1, 64):
        views, targets = light.labels.training_batch(images, ids, epoch)
        seen, asked = pruned.training_batch(images, ids, epoch)
        assert torch.equal(views, seen)
        torch.testing.assert_close(targets, asked, rtol=1e-3, atol=1e-3)
    assert light.labels.cache_key() == pruned.cache_key() and light.labels.nbytes() == pruned.nbytes()


def test_labelling_that_was_killed_goes_on_in_the_middle(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for SIGKILL."""

    task, asked = condense.task(str(tiny_archive(tmp_path))), []
    whole, original = made(task, keep=0.2), teacher_logits.compute_logits

    def counted(*arguments, **options):
        asked.append(1)
        if len(asked) == 4:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(teacher_logits, "compute_logits", counted)
    with pytest.raises(Killed):
        made(task, keep=0.2, run_dir=tmp_path / "run", out=tmp_path / "a.h5")
    assert condense.api.resume(tmp_path / "run").sha256() == whole.sha256()
    needed = len(whole.labels.kept.unique())
    assert len(asked) == 4 + needed - 3 and not list((tmp_path / "run").glob("labels*"))


def test_others_get_a_pool_at_no_more_than_its_cost(tiny):
    labels = made(tiny, "lpqld", keep=0.2).labels
    net = Counted(warm(NETWORK, (1, 8, 8), dtype=torch.float32))
    again = labels.label_images(pictures(), net, 9, HARD)
    assert net.asked == 4 * 9 and again.cache_key() == labels.cache_key() and again.cooling == labels.cooling


def test_lightening_asks_teachers_about_what_is_kept(tiny):
    taught = {key: SMALL[key] for key in ("network", "teacher_epochs", "teacher_batch")}
    live = condense.distill("rded", tiny, 2, **taught)
    net = Counted(warm(NETWORK, (1, 8, 8), dtype=torch.float32))
    light = lighten(live, "pool", teacher=net, label_epochs=20, keep=0.1, values="topk", k=1, cooling=0.5)
    assert net.asked == 2 * 6 and light.labels.cooling == (0.5, 30.0, 2.0)
    whole = lighten(live, "per-view", teacher=net, label_epochs=20)
    pruned = lighten(whole, "pool", keep=0.1, values="topk", k=1, cooling=0.5)
    torch.testing.assert_close(light.labels.code.values, pruned.labels.code.values, rtol=2e-3, atol=2e-3)
    assert light.labels.cache_key() == pruned.labels.cache_key()


# -- a temperature that falls -----------------------------------------------------------------------------------------


def a_pool(cooling=(0.7, 30, 2.0), **terms):
    logits = 4 * torch.randn(6, len(HARD), CLASSES, generator=rng.generator("logits"))
    return PoolLabels.pruned(PerViewLabels(logits, 3, RULE, **terms), 3, hard=HARD, cooling=cooling)


def test_the_temperature_falls_in_steps():
    pool = a_pool()
    for epoch, expected in ((0, 20.0), (29, 20.0), (30, 14.0), (60, 9.8), (180, 20 * 0.7**6), (210, 2.0), (900, 2.0)):
        assert pool.temperature_at(epoch) == pytest.approx(expected, rel=1e-6)
    assert pool.temperature == 20.0 and a_pool(temperature=1.0).temperature_at(500) == 1.0
    assert a_pool(cooling=None).temperature_at(500) == 20.0


@pytest.mark.parametrize("squared", [True, False])
def test_targets_and_loss_are_at_the_temperature_of_the_epoch(squared):
    cool, warm_one = a_pool(squared=squared), a_pool(None, squared=squared)
    images, ids, logits = pictures(), torch.tensor([4, 0, 8]), torch.randn(3, CLASSES)
    for epoch, t in ((0, 20.0), (35, 14.0), (400, 2.0)):
        views, targets = cool.training_batch(images, ids, epoch)
        seen, _ = warm_one.training_batch(images, ids, epoch)
        slots = cool.slots(epoch)[HARD[ids]]
        expected = (cool.code.values[slots, ids].float() / t).softmax(-1)
        assert torch.equal(views, seen) and targets.shape == (3, CLASSES + 1)
        torch.testing.assert_close(targets[:, :-1], expected)
        plain = F.kl_div(F.log_softmax(logits / t, -1), expected, reduction="batchmean") * (t**2 if squared else 1)
        torch.testing.assert_close(cool.loss(logits, targets), plain)


def test_a_cooling_pool_survives_its_file(tiny, tmp_path):
    one = made(tiny, "lpqld", out=tmp_path / "a.h5")
    loaded = condense.load(tmp_path / "a.h5")
    assert loaded.labels.cooling == (0.7, 30.0, 2.0) and loaded.labels.cache_key() == one.labels.cache_key()
    for images, targets in loaded.batches(40, 4):
        assert images.shape[1:] == (1, 8, 8) and targets.shape[1] == CLASSES + 1
        assert bool(loaded.loss(torch.randn(len(images), CLASSES), targets).isfinite())
    assert made(tiny).labels.cooling is None
    arrays = {**one.labels.arrays(), "cooling": np.array([2, 30, 2], np.float32)}
    with pytest.raises(CondenseError, match=r"cooling=\(2\.0, 30\.0, 2\.0\): must be a factor up to 1"):
        PoolLabels.from_arrays(arrays, CLASSES)
    with pytest.raises(CondenseError, match="cooling: changes the temperature of distributions; set loss_kind=kl"):
        a_pool(loss_kind="mse")


@pytest.mark.parametrize("name", ["lpld", "lpqld"])
def test_such_sets_are_judged_beside_random_images_with_such_labels(tiny, name):
    one = made(tiny, name)
    record = condense.evaluate(one, tiny, runs=1, protocol="quick-soft-v1", controls=("random", "noise"))
    assert not record["missing"] and [entry["arm"] for entry in record["results"]] == ["distilled", "random", "noise"]


# -- plans, and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"values": "topk"}, {"values": "int8", "label_statistics": "batch"}, {"labels": "per-view"}]
)
def test_a_plan_states_what_is_made(tiny, changes):
    needs, one = estimate_cost("lpld", tiny, 4, **SMALL, **changes), made(tiny, ipc=4, **changes)
    for part in ("images", "labels"):
        assert needs["set_bytes"][part] == one.nbytes()[part]
    assert needs["preparation_seconds"] > 0 and needs["labelling_seconds"] > 0


@pytest.mark.parametrize(
    "name, words, line",
    [
        (
            "lpld",
            "batch_classes=2",
            "batch_classes=2: batches have the images of one class; leave it at 1, or use sre2l",
        ),
        ("lpld", "keep=0", "keep=0: must be above 0 and at most 1"),
        ("lpld", "values=zip", "values=zip: unknown"),
        ("lpld", "fill=mss", "fill=mss: unknown; did you mean 'mrs'?"),
        ("lpqld", "k=4", "k=4: must be 1 to 3, the number of classes"),
        ("lpqld", "cooling=0", "cooling=0"),
        ("lpqld", "cool_epochs=0", "cool_epochs=0: must be at least 1"),
        ("sre2l", "labels=pool", "labels=pool: unknown"),
        ("lpld", "calibrate=0.1,0.2,0.9", "calibrate=0.1,0.2,0.9: serves labels=per-view, not labels=pool"),
    ],
)
def test_what_cannot_be_is_found_before_the_work(tiny, name, words, line, untaught):
    key, _, value = words.partition("=")
    with pytest.raises(CondenseError) as fault:
        made(tiny, name, **{key: value})
    assert str(fault.value).startswith(line) and "\n" not in str(fault.value)


def test_a_pool_of_more_than_all_is_refused():
    net = warm(NETWORK, (1, 8, 8), dtype=torch.float32)
    with pytest.raises(CondenseError, match="a pool of 5 epochs: must be 1 to 4, the number of labelled epochs"):
        compute_pool_logits(net, pictures(), HARD, 4, RULE, 5, 5, classes=CLASSES)
    assert codes.default_size(1000, 10) == 10 and codes.default_size(2, 10) == 1
