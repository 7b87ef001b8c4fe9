"""Curriculum synthesis: its maths against hooks, closed forms and the plainly written published loop."""

import contextlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command_line, tiny_archive, tiny_arrays
from torch import nn

import condense
from condense import networks, rng
from condense.augment import CropViews
from condense.augment import views as views_module
from condense.config import load_recipe, recipe_names
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.curriculum_synthesis import bn_matching, cvdd, dwa, infer, initial, nrr, patches, recovery
from condense.methods.curriculum_synthesis import crops as crops_module
from condense.pretraining import load_or_train_teachers
from condense.registry import METHODS
from condense.sets import Compensated

NETWORK = "convnet-d2-w8-bn"
TAUGHT = {"network": NETWORK, "teacher_epochs": 2, "teacher_batch": 8}
SMALL = {**TAUGHT, "steps": 3, "label_epochs": 2}


def warm(name, shape=(3, 16, 16), classes=4, dtype=torch.float64):
    """A teacher in eval mode whose norms have statistics and affine weights worth testing."""
    with rng.seeded("warm"):
        net = networks.build_network(name, shape, classes).to(dtype)
        for _ in range(3):
            net(torch.randn(16, *shape, dtype=dtype) * 2 + 0.3)
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
    return net.eval().requires_grad_(False)


def hooked(net, views, groups, first, shares):
    """Logits and distances by hooks, one group after the other, as the released programs have it."""
    logits, distances = [], []
    for part in views.chunk(groups):
        terms, handles = [], []
        norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
        for number, norm in enumerate(norms):

            def hook(layer, inputs, _output, weight=first if number == 0 else 1.0, terms=terms):
                x = inputs[0]
                mean = x.mean((0, 2, 3))
                variance = x.transpose(0, 1).flatten(1).var(1, correction=0)
                gap = shares[0] * (mean - layer.running_mean).norm()
                terms.append(weight * (gap + shares[1] * (variance - layer.running_var).norm()))

            handles.append(norm.register_forward_hook(hook))
        logits.append(net(part))
        distances.append(sum(terms))
        for handle in handles:
            handle.remove()
    return torch.cat(logits), torch.stack(distances)


# -- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 11.0), (0.5, 0.0)])
@pytest.mark.parametrize(
    "name", ["convnet-d2-w8-bn", "resnet18-bn", "vgg11-bn", "shufflenetv2-x0.5-bn", "mobilenetv2-bn"]
)
def test_fused_moments_equal_hooks(name, shares):
    net = warm(name)
    views = torch.randn(6, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 1, 2, 0, 3, 1])
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    found = []
    for asked in (
        lambda: bn_matching.Matcher(net, 10.0, shares)(views, 2, contextlib.nullcontext),
        lambda: hooked(net, views, 2, 10.0, shares),
    ):
        logits, distances = asked()
        loss = F.cross_entropy(logits, classes) + (weight * distances).sum()
        found.append((loss, torch.autograd.grad(loss, views)[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-10)


def test_averaged_distances_are_the_sum_over_the_weights():
    net, views = warm("resnet18-bn"), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    total, mean = (
        bn_matching.Matcher(net, 10.0, averaged=flag)(views, 2, contextlib.nullcontext)[1] for flag in (False, True)
    )
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    torch.testing.assert_close(mean, total / (10 + norms - 1))


def test_moments_that_agree_have_no_slope():
    """A length has no slope at 0: images whose moments are the running ones must not make NaN."""
    norm = nn.BatchNorm2d(2).double().eval()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    norm.running_mean.copy_(x.mean((0, 2, 3)))
    norm.running_var.copy_(x.transpose(0, 1).flatten(1).var(1, correction=0))
    one = bn_matching.MatchedNorm(norm, (1.0, 1.0))
    x.requires_grad_()
    one(x)
    (slope,) = torch.autograd.grad(one.distances.sum(), x)
    assert one.distances.item() < 1e-6 and bool(slope.isfinite().all())


def test_a_matcher_leaves_its_teacher_alone():
    net = warm(NETWORK, dtype=torch.float32)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    logits, _ = bn_matching.Matcher(net)(torch.randn(4, 3, 16, 16), 2, contextlib.nullcontext)
    assert logits.shape == (4, 4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(isinstance(layer, bn_matching.MatchedNorm) for layer in net.modules())


# -- views ------------------------------------------------------------------------------------------------------------


def test_the_crop_schedules_have_the_papers_values():
    def scale(schedule, t):
        return crops_module.crop_scale(schedule, t, 100, 0.5)

    assert scale("fixed", 0) == scale("cosine", 50) == scale("step", 99) == 0.08
    assert scale("step", 49) == scale("linear", 0) == scale("cosine", 0) == 1.0
    assert scale("linear", 25) == pytest.approx(0.08 + 0.92 / 2)
    assert scale("cosine", 25) == pytest.approx(0.08 + 0.92 * (1 + math.cos(math.pi / 2)) / 2)
    assert crops_module.crop_scale("cosine", 0, 100, 0.0) == 0.08  # the released default: no curriculum


def test_views_by_matrices_are_crops_mirrors_and_rolls():
    images = torch.randn(3, 2, 3, 9, 12)
    crops = CropViews(0.1, 1.0, flip=True)
    views = crops.draw(rng.Draws(0, "views"), 3, (9, 12))
    shift = torch.tensor([[0, 3], [2, 0], [-1, 4]])
    rows, columns = views_module.resampling_matrices(views, shift)
    got = views_module.apply_resampling(images, rows, columns)
    for g in range(3):
        one = crops.apply(images[g], views[torch.tensor([g, g])])
        torch.testing.assert_close(got[g], one.roll(tuple(shift[g].tolist()), (2, 3)), rtol=1e-5, atol=1e-5)


def test_a_view_of_the_whole_image_changes_no_bit():
    images = torch.randn(1, 2, 3, 8, 8)
    whole = CropViews(1.0, 1.0, flip=False).draw(rng.Draws(0, "x"), 1, (8, 8))
    rows, columns = views_module.resampling_matrices(whole, torch.zeros(1, 2, dtype=torch.int64))
    assert torch.equal(views_module.apply_resampling(images, rows, columns), images)


# -- recovery ---------------------------------------------------------------------------------------------------------


def made(task, name="sre2l", ipc=2, **changes):
    return condense.distill(name, task, ipc, **{**SMALL, "precision": "fp32", **changes})


def published_images(task, ipc, steps, config):
    """What the plainly written published loop makes of the same start with the same draws and the same teacher."""
    from condense.benchmarks.speed import published
    from condense.sets import SyntheticOptions, SyntheticSet

    run = Run(task, ipc, NETWORK, quiet=True, track="none")
    committee = load_or_train_teachers(run, config.teacher_training(task), architectures=[NETWORK], count=1)
    start = SyntheticSet.create(task, ipc, SyntheticOptions(init="noise"), seed=0, device=run.device).images.detach()
    ends = tuple(task.transform(torch.full((task.shape[0], 1, 1), end)).flatten() for end in (0.0, 1.0))
    loop = published.SRe2L(
        start,
        task.num_classes,
        committee.members[0].network,
        ends,
        device=run.device,
        lr_img=config.lr_img,
        bn_weight=config.bn_weight,
        jitter=config.jitter,
        steps=steps,
    )
    crops = CropViews(config.min_scale, 1.0, config.flip)
    for step in range(steps):
        views = crops.draw(rng.Draws(0, "crop", step), ipc, task.shape[1:])
        shift = rng.Draws(0, "roll", step).integers(config.jitter + 1, (ipc, 2))
        loop.step(list(zip(views.box.tolist(), views.mirrored.tolist(), shift.tolist())))
    return loop.images


def test_sre2l_equals_the_plain_published_loop(tiny):
    config = METHODS.get("sre2l").config(**{key: SMALL[key] for key in ("teacher_epochs", "teacher_batch", "steps")})
    ours = made(tiny, store="float32", labels="hard").training_images()[0]
    theirs = published_images(tiny, 2, 3, config)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sre2l", "dwa", "cvdd", "infer"])
def test_how_many_batches_pass_at_once_changes_nothing_but_rounding(tiny, monkeypatch, name):
    changes = {"num_teachers": 2} if name in ("cvdd", "infer") else {}
    changes |= {"labels": "hard", "store": "float32"}
    whole = made(tiny, name, 3, **changes)
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", "1e-9")  # one image at once
    torch.testing.assert_close(made(tiny, name, 3, **changes).stored, whole.stored, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sre2l", "dwa", "nrr"])
def test_images_that_move_in_turn_end_where_they_would_together(tiny, name):
    changes = {"labels": "hard", "store": "float32", **({"pool": 6, "crops": 2} if name == "nrr" else {})}
    together = made(tiny, name, 3, **changes)
    torch.testing.assert_close(made(tiny, name, 3, at_once=2, **changes).stored, together.stored, rtol=1e-3, atol=1e-3)


def test_classes_in_several_batches_have_moments_of_their_own(tiny):
    one = made(tiny, labels="hard", store="float32")
    two = made(tiny, labels="hard", store="float32", batch_classes=2)
    assert not torch.equal(one.stored, two.stored)


@pytest.mark.parametrize(
    "changes",
    [
        {"per_image": True},
        {"two_sided": True},
        {"schedule": "step"},
        {"init": "patches"},
        {"bn_weight": 0.0},
        {"flip": False, "min_scale": 1.0},
    ],
)
def test_every_choice_of_views_and_starts_matters(tiny, changes):
    assert not torch.equal(made(tiny, labels="hard").stored, made(tiny, labels="hard", **changes).stored)


@pytest.mark.parametrize("store", ["uint8", "float16", "float32"])
def test_pixels_are_kept_as_asked_and_labels_are_theirs(tiny, tmp_path, store):
    """What the labels are of is what a student will see: the stored images, rounded or not."""
    path = tmp_path / "a.h5"
    one = made(tiny, store=store, labels="soft", out=path)
    assert one.stored.dtype == getattr(torch, store) and condense.load(path).sha256() == one.sha256()
    assert float(one.stored.min()) >= 0 and float(one.stored.max()) <= (255 if store == "uint8" else 1)
    run = Run(tiny, 2, NETWORK, quiet=True, track="none")
    config = METHODS.get("sre2l").config(**{key: SMALL[key] for key in ("teacher_epochs", "teacher_batch")})
    teacher = load_or_train_teachers(run, config.teacher_training(tiny), architectures=[NETWORK], count=1).ensemble()
    torch.testing.assert_close(one.labels.logits, teacher(one.training_images()[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["per-view", "teacher", "static", "distances", "soft", "hard"])
def test_every_kind_of_label_is_judged_beside_random_images_with_the_same_labels(tiny, kind):
    one = made(tiny, labels=kind)
    assert one.labels.kind == kind
    protocol = "quick-v1" if kind == "hard" else "quick-soft-v1"
    record = condense.evaluate(one, tiny, runs=1, protocol=protocol, controls=("random", "noise"))
    assert not record["missing"]
    assert [entry["arm"] for entry in record["results"]] == ["distilled", "random", "noise"]
    assert record["set"]["bytes"]["labels"] == one.labels.nbytes() > 0


def test_calibrated_labels_leave_views_out(tiny):
    one = made(tiny, calibrate="0.2,0.5,0.9")
    assert one.labels.calibrate == pytest.approx((0.2, 0.5, 0.9), rel=1e-6)
    with pytest.raises(CondenseError, match=r"calibrate=0\.2,0\.5: must be LOW,MID,TOP"):
        made(tiny, calibrate="0.2,0.5")
    with pytest.raises(CondenseError, match=r"calibrate=0\.2,0\.5,0\.9: serves labels=per-view, not labels=soft"):
        made(tiny, calibrate="0.2,0.5,0.9", labels="soft")


@pytest.mark.parametrize("name", ["sre2l", "cda", "dwa", "cvdd", "infer", "nrr", "rded"])
def test_a_plan_states_what_is_made(tiny, name):
    """Bytes of images and labels are those of the set, whatever a dry run leaves out."""
    from condense.jobs import estimate_cost

    changes = {"num_teachers": 2} if name in ("cvdd", "infer") else {}
    changes |= {"pool": 6, "crops": 2} if name in ("nrr", "rded") else {}
    settings = {**SMALL, "label_epochs": 20, **changes}
    if name == "rded":
        del settings["steps"]
    needs = estimate_cost(name, tiny, 4, **settings)
    one = condense.distill(name, tiny, 4, **settings)
    for part in ("images", "labels"):
        assert needs["set_bytes"][part] == one.nbytes()[part]
    assert needs["preparation_seconds"] > 0
    assert (needs["labelling_seconds"] > 0) == (one.labels.kind == "per-view")


def test_a_plan_counts_images_that_move_in_turn(tiny):
    from condense.jobs import estimate_cost

    once, in_turn = (estimate_cost("sre2l", tiny, 4, **{**SMALL, "at_once": count}) for count in (4, 1))
    assert in_turn["steps"] == 4 * once["steps"] == 12


# -- what is kept of a run that ends early ----------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product catches it."""


@pytest.mark.parametrize("kind", ["per-view", "distances"])
def test_labelling_that_was_killed_goes_on_in_the_middle(tmp_path, monkeypatch, kind):
    task, asked = condense.task(str(tiny_archive(tmp_path))), []
    whole = made(task, labels=kind, label_epochs=6)
    original = condense.labels.compute_logits

    def counted(*arguments, **options):
        asked.append(1)
        if len(asked) == 4:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr("condense.labels.teacher_logits.compute_logits", counted)
    with pytest.raises(Killed):
        made(task, labels=kind, label_epochs=6, run_dir=tmp_path / "run", out=tmp_path / "a.h5")
    assert condense.api.resume(tmp_path / "run").sha256() == whole.sha256()
    assert len(asked) == 4 + 6 - 3  # three epochs were done
    assert not list((tmp_path / "run").glob("labels*"))  # the set has them


@pytest.mark.parametrize("name", ["sre2l", "infer"])
def test_a_run_that_diverges_keeps_a_set_that_can_be_used(tiny, tmp_path, name):
    changes = {"num_teachers": 1} if name == "infer" else {"init": "real"}
    with pytest.raises(CondenseError, match="lower the learning rate"):
        made(tiny, name, 4, lr_img=1e38, out=tmp_path / "a.h5", **changes, bn_weight=1e38)
    kept = condense.load(tmp_path / "a.h5")
    assert kept.labels.kind == METHODS.get(name).labels and bool(kept.training_images()[0].isfinite().all())
    condense.evaluate(kept, tiny, runs=1, protocol="quick-soft-v1", controls=())


# -- what papers add --------------------------------------------------------------------------------------------------


def test_a_displacement_is_a_step_up_the_loss_and_leaves_the_teacher():
    net = warm(NETWORK, dtype=torch.float32)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    own = dict(net.named_parameters())
    views, classes = torch.randn(4, 3, 16, 16), torch.arange(4)

    def loss(weights):
        return F.cross_entropy(torch.func.functional_call(net, weights, (views,)), classes)

    moved = dwa.ascend_weights(net, own, views, classes, 1, 0.1)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in own.items()}
    slopes = torch.autograd.grad(loss(leaves), list(leaves.values()))
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    for (name, value), slope in zip(moved.items(), slopes):
        torch.testing.assert_close(value, own[name] + 0.1 * slope / length)
    several = dwa.ascend_weights(net, own, views, classes, 5, 0.1)
    gone = torch.cat([(several[name] - own[name]).flatten() for name in own]).norm()
    assert 0 < float(gone) <= 0.1 * (1 + 1e-5) and float(loss(several)) > float(loss(own))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_released_drift_tells_only_where_an_image_number_has_several_batches(tiny):
    one, drift = (made(tiny, "dwa", labels="hard", accumulate=flag, rho=0.5) for flag in (False, True))
    assert torch.equal(one.stored, drift.stored)
    one, drift = (made(tiny, "dwa", labels="hard", accumulate=flag, batch_classes=1, rho=0.5) for flag in (False, True))
    assert not torch.equal(one.stored, drift.stored)
    assert torch.equal(one.stored[:2], drift.stored[:2])  # the first class begins from the teacher either way


def test_votes_are_the_softmax_of_priors():
    assert cvdd.compute_vote_weights([60.0, 60.0], 5.0) == pytest.approx([0.5, 0.5])
    assert cvdd.compute_vote_weights([64.0, 50.0], 5.0)[0] == pytest.approx(1 / (1 + math.exp(-14 / 5)))
    assert sum(cvdd.compute_vote_weights([63, 65.3, 68.5, 67.6, 67.4], 10.0)) == pytest.approx(1)


def test_committees_are_the_best_or_all_in_turn():
    priors = [63, 65.3, 68.5, 67.6, 67.4]
    assert cvdd.assign_teachers(priors, 2, 1, (0,)) == [(2, 3)]
    ten = cvdd.assign_teachers(priors, 2, 10, (0,))
    assert len(set(ten)) == 10 and ten != sorted(ten)
    many = cvdd.assign_teachers(priors, 2, 50, (0,))
    assert many[:10] == ten and len(many) == 50 and all(i < j for i, j in many)


def test_a_committee_sums_its_weighted_losses(tiny):
    """Two teachers of equal votes: the gradient is the mean of what each alone gives."""
    run = Run(tiny, 1, NETWORK, quiet=True, track="none")
    config = METHODS.get("cvdd").config(teacher_epochs=1, teacher_batch=8, steps=1, num_teachers=2, init="real")
    members = load_or_train_teachers(run, config.teacher_training(tiny), architectures=[NETWORK], count=2).members
    slopes = []
    for guides in ([(0, 0.25), (1, 0.75)], [(0, 1.0)], [(1, 1.0)]):
        taken = {}

        class Watched(Run):
            def optimise(self, synthetic, steps, *, taken=taken, **options):
                for step in super().optimise(synthetic, steps, **options):
                    step.apply = lambda gradients, loss, mask=None: taken.update(gradients)
                    yield step

        watched = Watched(tiny, 1, NETWORK, quiet=True, track="none")
        synthetic = initial.create_initial_set(config, watched, members[0].network)
        voters = [recovery.Guide(bn_matching.make_matcher(config, members[i].network), {0: w}) for i, w in guides]
        batches = recovery.make_class_batches(watched, 100)
        for batch in recovery.recovery_passes(config, watched, synthetic, voters, batches):
            logits, distances = batch.forward(batch.views(batch.pixels))
            losses = recovery.class_loss(logits, batch.classes, len(distances))
            batch.backward(losses + config.bn_weight * distances)
        slopes.append(taken["images"])
    torch.testing.assert_close(slopes[0], 0.25 * slopes[1] + 0.75 * slopes[2], rtol=1e-4, atol=1e-6)


def test_how_many_indices_fit_as_the_paper_counts():
    assert [infer.count_real_images(*case) for case in ((10, 100, 4), (10, 10, 4), (50, 10, 4), (1, 10, 1))] == [
        9,
        7,
        35,
        0,
    ]


def test_compensated_images_are_sums():
    stage = Compensated(classes=2, indices=3, teachers=2)
    real, added = torch.rand(6, 1, 4, 4), torch.rand(6, 1, 4, 4) * 2 - 1
    images, ids = stage(torch.cat([real, stage.encode(added)]), torch.arange(12))
    assert len(images) == 2 * stage.decoded == 18 and ids.tolist() == list(range(18))
    for c in range(2):
        for k in range(3):
            block = images[9 * c + 3 * k : 9 * c + 3 * k + 3]
            assert torch.equal(block[0], real[3 * c + k])
            for m in range(2):
                wanted = (real[3 * c + k] + added[2 * k + m]).clamp(0, 1)
                torch.testing.assert_close(block[m + 1], wanted, rtol=1e-6, atol=1e-6)


def test_infer_keeps_no_more_than_its_images_and_comes_back_whole(tiny, tmp_path, capsys):
    path = tmp_path / "infer.h5"
    one = made(tiny, "infer", 4, num_teachers=1, out=path)
    number = infer.count_real_images(4, 3, 1)
    assert number == 3 and len(one.stored) == number * (3 + 1) <= 4 * 3 and len(one) == 2 * number * 3
    loaded = condense.load(path)
    assert torch.equal(loaded.training_images()[0], one.training_images()[0])
    assert loaded.hard_labels().tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert command_line(f"verify {path}", capsys).code == 0
    assert command_line(f"preview {path} --out {tmp_path / 'a.png'}", capsys).code == 0
    # Labels are the teachers' mean logits of the images as they are used.
    run = Run(tiny, 4, NETWORK, quiet=True, track="none")
    config = METHODS.get("infer").config(**{key: SMALL[key] for key in ("teacher_epochs", "teacher_batch")})
    teacher = load_or_train_teachers(run, config.teacher_training(tiny), architectures=[NETWORK], count=1).ensemble()
    torch.testing.assert_close(one.labels.logits.float(), teacher(one.training_images()[0]), rtol=2e-3, atol=2e-3)


def test_infer_needs_room_for_its_compensators(tiny):
    with pytest.raises(CondenseError, match=r"--ipc 1: 1 compensators and the real images .* give at least 2"):
        made(tiny, "infer", 1, num_teachers=1)


def test_the_activation_is_the_class_activation_map_of_a_mean_pooled_net():
    net = warm("resnet18-bn", dtype=torch.float32)
    images, classes = torch.randn(3, 3, 16, 16), torch.tensor([2, 0, 3])
    got = nrr.compute_class_activation(net, images, classes)
    maps = net.features(images)[-1]
    cam = torch.einsum("nchw,nc->nhw", maps, net.classify.weight[classes]).relu()
    cam = F.interpolate(cam[:, None], size=(16, 16), mode="bilinear", align_corners=False)[:, 0]
    cam = cam / cam.flatten(1).amax(1)[:, None, None]
    torch.testing.assert_close(got, cam, rtol=1e-4, atol=1e-5)
    assert float(got.max()) == 1 and float(got.min()) >= 0


def test_nrr_moves_only_what_is_not_looked_at(tiny):
    still = made(tiny, "nrr", labels="hard", store="float32", pool=6, crops=2, threshold=0.0)
    moved = made(tiny, "nrr", labels="hard", store="float32", pool=6, crops=2, threshold=0.5)
    run = Run(tiny, 2, NETWORK, quiet=True, track="none")
    config = METHODS.get("nrr").config(
        **{key: SMALL[key] for key in ("teacher_epochs", "teacher_batch")}, pool=6, crops=2
    )
    committee = load_or_train_teachers(run, config.teacher_training(tiny), architectures=[NETWORK], count=1)
    net = committee.members[0].network
    looks = nrr.compute_class_activation(net, still.training_images()[0], torch.arange(3).repeat_interleave(2))
    critical = (looks >= 0.5)[:, None].expand_as(still.stored)
    assert bool(critical.any())
    assert torch.equal(moved.stored[critical], still.stored[critical])
    assert not torch.equal(moved.stored[~critical], still.stored[~critical])


def test_rded_takes_the_crops_that_its_teacher_is_surest_of(tiny):
    one = condense.distill("rded", tiny, 2, **TAUGHT, pool=6, crops=3, store="float32", precision="fp32")
    run = Run(tiny, 2, NETWORK, quiet=True, track="none")
    config = METHODS.get("rded").config(teacher_epochs=2, teacher_batch=8, pool=6, crops=3)
    committee = load_or_train_teachers(run, config.teacher_training(tiny), architectures=[NETWORK], count=1)
    net = committee.members[0].network
    for c in range(3):
        images = tiny.per_class(6, (0, "pool"), [c])[0]
        best = []
        for i in range(6):
            crops, views = patches.square_crops(images, rng.Draws(0, "patches", c), 3, 8)
            losses = [float(F.cross_entropy(net(crop[None]), torch.tensor([c]))) for crop in crops[3 * i : 3 * i + 3]]
            least = int(np.argmin(losses))
            best.append((losses[least], crops[3 * i + least]))
            assert all(h == w and 2 <= h <= 8 for _, _, h, w in views.box.tolist())
        wanted = [tiny.transform.inverse(crop).clamp(0, 1) for _, crop in sorted(best, key=lambda pair: pair[0])[:2]]
        torch.testing.assert_close(one.stored[2 * c : 2 * c + 2], torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_collages_hold_shrunken_crops(tiny):
    one = condense.distill("rded", tiny, 1, **TAUGHT, pool=6, crops=2, factor=2, store="float32")
    assert one.stored.shape == (3, 1, 8, 8)
    with pytest.raises(CondenseError, match="factor=3: images of tiny are 8x8"):
        condense.distill("rded", tiny, 1, **TAUGHT, pool=6, crops=2, factor=3)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_teacher_without_batch_norm_is_refused_before_any_is_trained(tiny, untaught):
    with pytest.raises(CondenseError, match="teacher convnet-d2-w8-in has no BatchNorm"):
        made(tiny, network="convnet-d2-w8-in")


def test_images_that_hold_no_squares_are_refused(untaught):
    random = np.random.default_rng(0)
    task = condense.task((random.integers(0, 255, (24, 1, 8, 16), dtype=np.uint8), np.arange(24) % 3), name="wide")
    with pytest.raises(CondenseError, match="init=patches: images of wide are 8x16; crops need squares"):
        made(task, "cvdd", num_teachers=2)
    with pytest.raises(CondenseError, match="factor=2: images of wide are 8x16; crops need squares that 2 divides"):
        condense.distill("rded", task, 1, **TAUGHT, factor=2)


def test_two_distances_need_two_images(tiny, untaught):
    with pytest.raises(CondenseError, match="mix=none: labels=distances are to the classes of two images"):
        made(tiny, labels="distances", mix="none")


def test_whitened_data_are_refused(untaught):
    train, labels, test, test_labels = tiny_arrays()
    task = condense.task((train, labels, test, test_labels), name="tiny", zca=True)
    with pytest.raises(CondenseError, match="zca=true: recovered pixels are kept in their range"):
        made(task)


@pytest.mark.parametrize(
    "words",
    [
        "labels=softer",
        "init=reals",
        "schedule=cosin",
        "store=jpeg",
        "label_micro=1",
        "mix=cutmixx",
        "milestone=2",
        "min_scale=0",
        "label_statistics=mean",
        "temperature=0",
        "at_once=0",
    ],
)
def test_a_setting_that_cannot_be_is_named(tiny, words):
    key, _, value = words.partition("=")
    with pytest.raises(CondenseError, match=f"{key}={value}"):
        made(tiny, **{key: value})


def test_votes_need_a_prior_for_each_teacher(tiny, untaught):
    with pytest.raises(CondenseError, match="priors=60,50,40, voters=2: there are 2 teachers"):
        made(tiny, "cvdd", num_teachers=2, priors="60,50,40", label_micro=3)
    with pytest.raises(CondenseError, match="priors=sixty: must be numbers"):
        made(tiny, "cvdd", priors="sixty")


# -- the command line, and ranks --------------------------------------------------------------------------------------


def test_teachers_of_a_file_serve_method_and_judge(tiny, tmp_path, capsys):
    tiny_archive(tmp_path)
    data, teachers, out = tmp_path / "tiny.npz", tmp_path / "teachers.h5", tmp_path / "rded.h5"
    words = (
        f"teachers --data {data} --networks {NETWORK} --count 1 --epochs 2 --for rded teacher_batch=8 --out {teachers}"
    )
    assert command_line(words, capsys).code == 0
    words = f"distill rded --data {data} --ipc 2 --network {NETWORK} teachers={teachers} pool=6 crops=2 --out {out} "
    asked = command_line(words + f"--run-dir {tmp_path / 'run'}", capsys)
    assert asked.code == 0, asked.err
    words = f"evaluate {out} --data {data} --runs 1 --protocol quick-soft-v1 --controls random --teachers {teachers} "
    asked = command_line(words + f"--json {tmp_path / 'r.json'}", capsys)
    assert asked.code == 0, asked.err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["missing"] == [] and record["set"]["label_kind"] == "teacher"


@pytest.mark.slow
def test_two_ranks_make_the_set_of_one(tiny, tmp_path):
    tiny_archive(tmp_path)
    sets = []
    for ranks, launcher in ((1, ()), (2, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))):
        out = tmp_path / f"{ranks}.h5"
        words = [
            "-m",
            "condense",
            "distill",
            "sre2l",
            "--data",
            str(tmp_path / "tiny.npz"),
            "--ipc",
            "2",
            "--network",
            NETWORK,
            "--out",
            str(out),
            "--run-dir",
            str(tmp_path / f"run{ranks}"),
            "--precision",
            "fp32",
            "steps=3",
            "label_epochs=2",
            "teacher_epochs=2",
            "teacher_batch=8",
            "store=float32",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *words], check=True, env=environment, capture_output=True)
        sets.append(condense.load(out))
    torch.testing.assert_close(sets[0].stored, sets[1].stored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(("cvdd/", "infer/"))])
def test_committees_of_the_recipes_take_small_images(name):
    """Networks of libraries halve 32x32 images five times."""
    committee = load_recipe(name)["committee"]
    for member in committee.split(",") if committee else []:
        networks.check_network(member)
        assert member.endswith("-bn") and ":" not in member
