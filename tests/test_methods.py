"""What every registered method must do, whatever it is; and the maths of each."""

import dataclasses
import json

import pytest
import torch
from conftest import Killed, killed_after, tiny_arrays

import condense
from condense import config
from condense.engine import Run
from condense.engine.run import CLASS_CHUNK_PIXELS
from condense.errors import CondenseError
from condense.jobs import resume
from condense.registry import METHODS

METHOD_NAMES = [name for name in METHODS.names() if METHODS.get(name).task == "images"]
SETTINGS = {
    name: {"network": config.load_recipe(f"{name}/tiny")["network"], **config.tiny_settings(name)}
    for name in METHOD_NAMES
}
FROZEN = ("lr_lr", "lr_label")
"""Learning rates of what is learned besides the pixels."""
# Pixels are moved as far as the size of a method's gradients needs.
SMALL_STEP = {name: {"lr_img": 1.0} for name in ("mtt", "tesla", "ftd", "ast", "datm")}
# Noise would be clamped to the range of pixels in the first step.
SMALL_STEP |= {name: {"lr_img": 1e-3, "init": "real"} for name in ("sre2l", "cda", "lpld", "lpqld")}
# The networks of the pool change in each step, unless their rate is 0 and they keep no running statistics.
SMALL_STEP |= {"krrst": {"lr_img": 1e-3, "pool_lr": 0.0, "pool_steps": 50, "network": "convnet-d2-w8-in"}}
STORED = {"infer": 4}
"""Images that a set of 2 images for each of 3 classes holds, where not 6."""
NETWORK = "convnet-d2-w8-in"


def run(name, task, **changes):
    return condense.distill(name, task, 2, **{**SETTINGS[name], **changes})


def has_setting(name, setting):
    return any(field.name == setting for field in dataclasses.fields(METHODS.get(name).config))


def still(name):
    """Settings for a small step of the pixels in which nothing else moves."""
    return {"lr_img": 1e-3, **SMALL_STEP.get(name, {}), **{key: 0.0 for key in FROZEN if has_setting(name, key)}}


@pytest.fixture(params=METHOD_NAMES)
def name(request):
    return request.param


def test_it_makes_a_set_that_survives_its_file(name, tiny, tmp_path):
    made = run(name, tiny, out=tmp_path / "a.h5")
    loaded = condense.load(tmp_path / "a.h5")
    assert loaded.sha256() == made.sha256()
    assert len(loaded.stored) == STORED.get(name, 6) and loaded.manifest["ipc"] == 2
    assert loaded.manifest["method"] == name
    assert loaded.manifest["cost"]["seconds"] >= 0
    assert torch.isfinite(loaded.images).all()
    assert loaded.hard_labels().tolist() == [0, 0, 1, 1, 2, 2]
    assert loaded.labels.kind == METHODS.get(name).labels


def test_the_seed_decides(name, tiny):
    first, again, other = run(name, tiny, seed=1), run(name, tiny, seed=1), run(name, tiny, seed=2)
    assert torch.equal(first.stored, again.stored)
    assert not torch.equal(first.stored, other.stored)


def test_colour_images(name, tiny_colour):
    assert run(name, tiny_colour).stored.shape == (STORED.get(name, 6), 3, 8, 8)


def test_resumed_equals_uninterrupted(name, tiny, tmp_path, monkeypatch):
    """Killed at every step in turn: what a checkpoint holds is enough to end with the same bits."""
    if not has_setting(name, "steps"):
        pytest.skip("makes no steps")
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    steps = SETTINGS[name]["steps"]
    data = tmp_path / "data.npz"
    save_npz(tiny, data)
    task = condense.task(str(data))
    whole = run(name, task)
    for stop in range(1, steps):
        directory = tmp_path / f"run{stop}"
        with pytest.raises(Killed), killed_after(stop):
            run(name, task, run_dir=directory, out=tmp_path / f"{stop}.h5")
        assert not (tmp_path / f"{stop}.h5").exists()
        assert resume(directory).sha256() == whole.sha256()
        again = condense.load(tmp_path / f"{stop}.h5")
        assert again.sha256() == whole.sha256()  # of pixels and labels
        assert again.manifest.get("learned_lr") == whole.manifest.get("learned_lr")


def test_one_small_step_lowers_the_loss(name, tiny):
    """With network, batch and augmentation of the first step held fixed."""
    if not has_setting(name, "steps"):
        pytest.skip("makes no steps")
    losses = []
    entry = METHODS.get(name)
    for lr_img in (0.0, still(name)["lr_img"]):
        settings = {**SETTINGS[name], **still(name), "steps": 2, "lr_img": lr_img}
        network = settings.pop("network")
        config = entry.config(**settings)
        watched = _Frozen(tiny, 2, network)
        entry.function(tiny, config, watched)
        losses.append(watched.losses)
    assert losses[0][1] == losses[0][0]  # nothing moved, so nothing changed: the step really is held fixed
    assert losses[1][1] < losses[1][0]


def test_fyi_on_mirror_symmetric_images_leaves_the_loss(name):
    """They are their own mirror images: a union with these has the same means and mean gradients."""
    if not has_setting(name, "fyi"):
        pytest.skip("takes no decode stages")
    train, labels, test, test_labels = tiny_arrays()
    task = condense.task((symmetric(train), labels, test, test_labels), name="tiny")
    entry, losses = METHODS.get(name), []
    for fyi in (False, True):
        settings = {**SETTINGS[name], **still(name), "steps": 1, "augment": "none"}
        settings |= {"init": "real", "factor": 1, "fyi": fyi}
        watched = _Frozen(task, 2, settings.pop("network"))
        entry.function(task, entry.config(**settings), watched)
        losses += watched.losses
    assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def symmetric(images):
    import numpy as np

    return np.maximum(images, images[..., ::-1])


def test_fyi_with_the_methods_own_decode_stages(name, tiny):
    if not has_setting(name, "fyi"):
        pytest.skip("takes no decode stages")
    with_flips, without = run(name, tiny, fyi=True), run(name, tiny)
    assert with_flips.manifest["distill_decode"] == [{"stage": "flip-union"}]
    assert len(with_flips) == len(without) and not torch.equal(with_flips.stored, without.stored)


class _Frozen(Run):
    """Repeats the draws of step 0 in every step and records each step's loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []

    def optimise(self, synthetic, steps, **options):
        for step in super().optimise(synthetic, steps, **options):
            step.index = 0
            yield step
            self.losses.append(float(step.optimizer.loss))


def save_npz(task, path):
    import numpy as np

    np.savez(
        path,
        train_images=np.asarray(task.train.images),
        train_labels=task.train.labels,
        test_images=np.asarray(task.test.images),
        test_labels=task.test.labels,
    )


# -- random -----------------------------------------------------------------------------------------------------------


def test_random_keeps_real_images_exactly(tiny):
    made = run("random", tiny)
    assert made.stored.dtype == torch.uint8
    pool = {image.tobytes() for image in tiny.train.images}
    assert all(image.numpy().tobytes() in pool for image in made.stored)
    torch.testing.assert_close(made.training_images()[0], made.transform(made.stored / 255))


# -- distribution matching --------------------------------------------------------------------------------------------


def test_class_means_equal_a_loop():
    from condense.methods.distribution_matching import class_means

    features = torch.randn(7, 5)
    labels = torch.tensor([2, 0, 2, 2, 1, 0, 1])
    got = class_means(features, labels, [2, 0])
    for row, c in zip(got, (2, 0)):
        torch.testing.assert_close(row, torch.stack([f for f, label in zip(features, labels) if label == c]).mean(0))


def test_dm_loss_is_the_squared_mean_distance_and_its_pixel_gradient_the_closed_form():
    """With a linear embedding f(x) = W x, L = sum_c |W (mu_c - m_c)|^2 and dL/dx = -2/n W^T W (mu_c - m_c)."""
    from condense.methods.distribution_matching import class_means, distribution_loss

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator)
    real, fake = torch.randn(9, 6, generator=generator), torch.randn(6, 6, generator=generator).requires_grad_()
    real_labels, fake_labels = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat_interleave(2)
    means = class_means(real @ weight.T, real_labels, [0, 1, 2])
    loss = distribution_loss(means, class_means(fake @ weight.T, fake_labels, [0, 1, 2]))
    (gradient,) = torch.autograd.grad(loss, fake)
    expected_loss = 0.0
    for c in range(3):
        gap = real[real_labels == c].mean(0) - fake.detach()[fake_labels == c].mean(0)
        expected_loss += (weight @ gap).square().sum()
        for i in (fake_labels == c).nonzero():
            torch.testing.assert_close(gradient[i[0]], -2 / 2 * (weight.T @ (weight @ gap)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss)


def plain_dm(task, ipc, settings, seed):
    """The published loop written plainly: per class, one network pass for real and one for synthetic images."""
    from condense import networks, rng
    from condense.augment import make_augmentation
    from condense.sets import SyntheticOptions, SyntheticSet

    synthetic = SyntheticSet.create(task, ipc, SyntheticOptions(), seed=seed, device=torch.device("cpu"))
    pixels = synthetic.images.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([pixels], lr=settings["lr_img"], momentum=0.5)
    augment = make_augmentation("color_crop_cutout_flip_scale_rotate")
    for step in range(settings["steps"]):
        with rng.seeded(seed, "network", step):
            net = networks.build_network(NETWORK, task.shape, task.num_classes)
        views = augment.draw(rng.Draws(seed, "augment", step), task.num_classes, task.shape[1:])
        loss = 0.0
        for c in range(task.num_classes):
            real, _ = task.per_class(settings["batch_real"], (seed, "real", step), [c])
            fake = pixels[c * ipc : (c + 1) * ipc]
            real = augment.apply(real, views, torch.full((len(real),), c))
            fake = augment.apply(fake, views, torch.full((len(fake),), c))
            loss = loss + (net.embed(real).detach().mean(0) - net.embed(fake).mean(0)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return pixels.detach()


def test_dm_equals_the_plain_published_loop(tiny):
    made = run("dm", tiny, precision="fp32")
    torch.testing.assert_close(made.stored, plain_dm(tiny, 2, SETTINGS["dm"], 0), rtol=1e-4, atol=1e-4)


def test_dm_does_not_depend_on_class_chunks(tiny, monkeypatch):
    whole = run("dm", tiny, precision="fp32")
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", str(64 * 6 / CLASS_CHUNK_PIXELS))  # one class at a time
    torch.testing.assert_close(run("dm", tiny, precision="fp32").stored, whole.stored, rtol=1e-4, atol=1e-4)


def test_dm_through_batch_norm(tiny):
    made = run("dm", tiny, network="convnet-d2-w8-bn")
    assert torch.isfinite(made.stored).all()


def test_dm_fyi_on_mirror_symmetric_images_changes_nothing(tiny):
    """Their union with the mirror images has the same class means, so loss and gradient agree without augmentation."""
    from condense.methods.distribution_matching import class_means, distribution_loss
    from condense.sets import FlipUnion, SyntheticSet

    half = torch.randn(6, 1, 8, 4)
    symmetric = torch.cat([half, half.flip(-1)], -1)
    classes = torch.arange(3).repeat_interleave(2)
    losses = []
    for stages in ([], [FlipUnion()]):
        synthetic = SyntheticSet(tiny, symmetric.clone(), classes, stages=stages)
        images, labels = synthetic.decode()
        means = class_means(images.flatten(1), labels, [0, 1, 2])
        losses.append(distribution_loss(torch.zeros_like(means), means))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize(
    "changes", [{"factor": 2, "init": "collage"}, {"fyi": True}, {"init": "kmeans"}, {"init": "noise"}]
)
def test_dm_with_decode_stages_and_initialisers(tiny, tmp_path, changes):
    made = run("dm", tiny, out=tmp_path / "a.h5", **changes)
    loaded = condense.load(tmp_path / "a.h5")
    assert len(loaded) == 6 * changes.get("factor", 1) ** 2
    assert bool(loaded.manifest["distill_decode"]) == changes.get("fyi", False)
    assert torch.equal(loaded.training_images()[0], made.training_images()[0])


def test_fyi_is_refused_where_mirroring_changes_the_class():
    with pytest.raises(CondenseError, match="fyi=true: a mirror image of 'digits'"):
        condense.distill("dm", "digits", 1, network=NETWORK, steps=1, fyi=True)


# -- methods that loop more than once ---------------------------------------------------------------------------------


def two_loops(task, config, run):
    """Learns a first set, then a second one that starts from it: what squeeze-and-recover methods do."""
    from condense.engine import ParamGroup
    from condense.sets import SyntheticOptions, SyntheticSet

    start = 0.0
    for part in range(2):
        made = SyntheticSet.create(task, run.ipc, SyntheticOptions(), seed=part, device=run.device)
        with torch.no_grad():
            made.images.add_(start)
        for step in run.optimise(made, 3, images=ParamGroup(lr=0.1, momentum=0.5)):
            step.minimise((made.images * step.draws("weight").uniform(1)).square().sum())
        start = made.images.detach().clone()
    return made


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_method_with_two_loops_resumes(tiny, tmp_path, monkeypatch, stop):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    whole = two_loops(tiny, None, Run(tiny, 2, NETWORK, quiet=True))
    saves = []

    class DyingRun(Run):
        def save_checkpoint(self, step, optimizer):
            super().save_checkpoint(step, optimizer)
            saves.append(step)
            if len(saves) == stop:
                raise Killed

    with pytest.raises(Killed):
        two_loops(tiny, None, DyingRun(tiny, 2, NETWORK, quiet=True, directory=tmp_path, track="none"))
    resumed = Run(tiny, 2, NETWORK, quiet=True, directory=tmp_path, track="none", resume=True)
    assert torch.equal(two_loops(tiny, None, resumed).images, whole.images)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    places = [(entry["loop"], entry["step"]) for entry in logged]
    assert places == sorted(set(places)) and {(0, 3), (1, 3)} <= set(places)
