"""KRR-ST: kernel ridge regression, the pool, teachers without classes, feature labels, and transfer."""

import copy
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_arrays
from PIL import Image

import condense
from condense import networks, rng
from condense.data import cache_dir
from condense.engine import Run
from condense.errors import CondenseError
from condense.judge import get_protocol
from condense.labels import LABEL_KINDS, FeatureLabels
from condense.methods.krrst import KRRST, KernelRidge, Pool, with_bias
from condense.pretraining.self_supervised import barlow_twins_loss
from condense.sets import DistilledSet, SyntheticOptions, SyntheticSet
from condense.training import accuracy, fit_linear_probe

NETWORK = "convnet-d2-w8-bn"
QUICK = {"teacher_epochs": 2, "teacher_batch": 8, "projector": 8, "steps": 2, "batch_real": 16, "pool": 2}


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(real, fake, targets, ridge):
    """The equations of the paper, with the inverse."""
    kernel = fake @ fake.T
    inverse = torch.linalg.inv(kernel + ridge * kernel.detach().trace() * torch.eye(len(fake), dtype=fake.dtype))
    return real @ fake.T @ inverse @ targets


# -- kernel ridge regression ------------------------------------------------------------------------------------------


def test_one_image_with_one_feature_is_the_closed_form():
    real, fake, targets = (torch.tensor([[x]], dtype=torch.float64, requires_grad=True) for x in (3.0, 2.0, 5.0))
    predicted = KernelRidge.apply(real.detach(), fake, targets, 0.5)
    assert predicted.item() == pytest.approx(3 * 2 * 5 / (4 + 0.5 * 4))
    predicted.backward()
    # With lambda = 2 held constant, d/ds (r s y / (s^2 + lambda)) = r y (lambda - s^2) / (s^2 + lambda)^2.
    assert float(fake.grad) == pytest.approx(3 * 5 * (2 - 4) / (4 + 2) ** 2)
    assert float(targets.grad) == pytest.approx(3 * 2 / 6)


@pytest.mark.parametrize("images, features", [(5, 9), (9, 5)])
def test_gradients_of_images_and_targets_equal_autograd_of_the_naive_formula(images, features):
    """In float64 and through a network: more features than images, and fewer."""
    with rng.seeded("krr"):
        net = networks.build_network("convnet-d1-w4-bn", (1, 8, 8), features).double().eval().requires_grad_(False)
    outputs, grads = gaussian(7, 3, seed=2), []
    for regress in (KernelRidge.apply, naive):
        pixels = gaussian(images, 1, 8, 8).requires_grad_()
        targets = gaussian(images, 3, seed=1).requires_grad_()
        real = with_bias(net(gaussian(7, 1, 8, 8, seed=3)))
        loss = (regress(real, with_bias(net(pixels)), targets, 1e-3) - outputs).square().mean()
        grads.append(torch.autograd.grad(loss, (pixels, targets)))
    for ours, theirs in zip(*grads):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_float32_predicts_what_float64_does_with_the_published_penalty():
    real, fake, targets = (x.abs() for x in (gaussian(50, 65, seed=4), gaussian(40, 65, seed=5), gaussian(40, 8)))
    exact = KernelRidge.apply(real, fake, targets, 1e-6)
    rounded = KernelRidge.apply(real.float(), fake.float(), targets.float(), 1e-6)
    assert (rounded.double() - exact).norm() / exact.norm() < 1e-2


def test_a_singular_kernel_gives_nan():
    fake = torch.ones(3, 2)
    assert KernelRidge.apply(torch.ones(2, 2), fake, torch.ones(3, 1), 0.0).isnan().all()


# -- the pool ---------------------------------------------------------------------------------------------------------


def pool_of(task, **settings):
    config = KRRST(**{**QUICK, "pool": 1, "pool_steps": 3, **settings})
    run = Run(task, 1, NETWORK, quiet=True)
    synthetic = SyntheticSet.create(task, 1, SyntheticOptions(), seed=0, device=run.device)
    synthetic.learn_labels(gaussian(3, 5, dtype=torch.float32), FeatureLabels)
    return run, synthetic, Pool(run, config, synthetic)


@pytest.mark.parametrize("reset, trained", [(True, [0, 1, 2, 3, 0]), (False, [0, 0, 0, 0, 0])])
def test_a_network_of_full_age_is_drawn_anew(tiny, reset, trained):
    """As in the paper it is trained again; as released it is drawn anew in every update from then on."""
    run, synthetic, pool = pool_of(tiny, pool_reset=reset)
    (net,), pool.ages = pool.nets, [3]
    steps = []
    for step in run.optimise(synthetic, 5):
        pool.update(0, step, synthetic)
        steps.append(int(net.norms[0].num_batches_tracked))
        assert bool(pool.optimizers[0].state) == (steps[-1] > 0)
        step.update()
    assert steps == trained


def test_the_pool_learns_the_targets_of_the_set(tiny):
    _, synthetic, pool = pool_of(tiny, pool_steps=200)
    assert 1 <= pool.ages[0] <= 200

    def loss():
        with torch.no_grad():
            outputs = pool.nets[0].train()(synthetic.images)
            return float((outputs - synthetic.tensors["labels"]).square().mean())

    pool.train(synthetic, [100])
    assert loss() < 0.05 * float(synthetic.tensors["labels"].detach().var())


def test_learned_sets_predict_real_features_better(tiny):
    """The outer loss is below that of the initial set, under networks that the pool never had."""
    settings = {**QUICK, "pool_steps": 20, "batch_real": 36, "network": NETWORK}
    losses = []
    for steps, rate in ((1, 0.0), (120, 0.02)):
        made = condense.distill("krrst", tiny, 1, **{**settings, "steps": steps, "lr_img": rate, "lr_label": rate})
        (path,) = (cache_dir() / "features").glob("*.npy")
        features, loss = torch.from_numpy(np.load(path)).float(), 0.0
        for number in range(3):
            with rng.seeded("other networks", number), torch.no_grad():
                net = networks.build_network(NETWORK, tiny.shape, 5).eval()
                real, fake = (
                    with_bias(net.embed(tiny.batch(torch.arange(36)))),
                    with_bias(net.embed(made.training_images()[0])),
                )
                loss += float((KernelRidge.apply(real, fake, made.labels.features, 1e-3) - features).square().mean())
        losses.append(loss)
    assert losses[1] < 0.9 * losses[0]


def test_one_target_model_of_known_settings():
    for settings, message in (
        ({"num_teachers": 2}, "one target model"),
        ({"committee": "lenet,mlp"}, "one target model"),
        ({"init": "nowhere"}, "init=nowhere: unknown"),
        ({"teacher_cutmix": 0.5}, "teacher_cutmix=0.5: Barlow Twins compares"),
        ({"pool": 0}, "pool=0: must be at least 1"),
    ):
        with pytest.raises(CondenseError, match=message):
            KRRST(**settings)


# -- teachers without classes -----------------------------------------------------------------------------------------


def test_barlow_twins_by_hand():
    first = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    second = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])  # both columns are the first one
    # c = [[1, 1], [0, 0]]: (1-1)^2 + (0-1)^2 on the diagonal, 1^2 + 0^2 off it.
    assert float(barlow_twins_loss(first, second, 0.5)) == pytest.approx(1.5, abs=1e-3)
    assert float(barlow_twins_loss(first, 3 * first + 2, 0.5)) == pytest.approx(0, abs=1e-3)
    assert torch.isfinite(barlow_twins_loss(torch.ones(4, 2), first, 0.5))  # collapsed outputs


def shifted_patterns():
    """Images whose class is one of three textures, with random brightness and phase: nothing for raw pixels."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:8, :8]

    def part(count):
        labels = np.repeat(np.arange(3), count)
        phase = random.uniform(0, 6.3, (len(labels), 1, 1))
        wave = [rows + 0 * columns, columns + 0 * rows, rows + columns]
        images = np.stack([np.sin(2.1 * wave[c] + p) for c, p in zip(labels, phase)])
        images = images * random.uniform(0.3, 1, phase.shape) * 60 + random.uniform(90, 160, phase.shape)
        return (images + random.normal(0, 12, images.shape)).clip(0, 255).astype(np.uint8)[:, None], labels

    return condense.task((*part(60), *part(40)), name="textures", mirror=False)


def test_a_teacher_without_classes_beats_untrained_features_and_survives_a_kill(tmp_path, monkeypatch):
    """Its probe is fitted to its own features; and classes do not matter for these."""
    task = shifted_patterns()
    settings = {"networks": "convnet-d2-w8-bn", "teacher_batch": 30, "projector": 32, "teacher_lr": 0.01}
    settings |= {"objective": "barlow", "teacher_augment": "crop"}
    found = {}
    for epochs in (1, 15):
        changes = {"teacher_lr": 1e-12} if epochs == 1 else {}
        path = tmp_path / f"{epochs}.h5"
        found[epochs] = condense.api.teachers(task, epochs=epochs, out=path, **{**settings, **changes}).file
    accuracies = {epochs: file.entries[0]["accuracy"] for epochs, file in found.items()}
    assert accuracies[15] > accuracies[1] + 0.03, accuracies
    assert found[15].manifest["judged_on"] == "test images (linear probe)"
    net = found[15].load_member(0, torch.device("cpu")).network
    assert accuracy(net, task, device=torch.device("cpu")) == pytest.approx(accuracies[15])
    probe = fit_linear_probe(net, task, device=torch.device("cpu"))
    torch.testing.assert_close(probe.weight, net.classify.weight)

    train, labels, test, test_labels = (
        np.array(x) for x in (task.train.images, task.train.labels, task.test.images, task.test.labels)
    )
    mixed = condense.task((train, np.roll(labels, 7), test, test_labels), name="textures", mirror=False)
    again = condense.api.teachers(mixed, epochs=2, out=tmp_path / "mixed.h5", **settings).file
    same = condense.api.teachers(task, epochs=2, out=tmp_path / "same.h5", **settings).file
    states = [file.load_state(0) for file in (again, same)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if "classify" not in name)

    from condense.training.checkpoint import TrainingCheckpoint

    class Stop(BaseException):
        pass

    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        write = TrainingCheckpoint.after

        def write_and_stop(keeper, step, state):
            write(keeper, step, state)
            if step == 7:
                raise Stop

        patch.setattr(TrainingCheckpoint, "after", write_and_stop)
        condense.api.teachers(task, epochs=2, out=tmp_path / "killed.h5", **settings)
    resumed = condense.api.teachers(task, epochs=2, out=tmp_path / "killed.h5", **settings).file
    assert resumed.entries[0]["sha256"] == same.entries[0]["sha256"]


def test_objectives_are_named(tiny):
    with pytest.raises(CondenseError, match="--objective barlov: unknown; did you mean 'barlow'"):
        condense.api.teachers(tiny, objective="barlov")
    with pytest.raises(CondenseError, match="--objective barlow: --for krrst says"):
        condense.api.teachers(tiny, objective="barlow", method="krrst")
    with pytest.raises(CondenseError, match="projector"):
        condense.api.teachers(tiny, projector=8)


def test_methods_find_teachers_of_the_command_line_and_features_of_other_runs(tiny):
    own = {key: value for key, value in QUICK.items() if key not in ("steps", "batch_real", "pool")}
    trained = condense.api.teachers(tiny, method="krrst", networks=NETWORK, **own)
    made = condense.distill("krrst", tiny, 1, network=NETWORK, **{**QUICK, "committee": NETWORK, "pool_steps": 2})
    assert made.manifest["preparation"]["from_cache"] == 1
    assert made.manifest["teachers"]["content"] == trained.file.manifest["content"]
    (path,) = (cache_dir() / "features").glob("*.npy")
    stored = np.load(path)
    assert stored.dtype == np.float16 and stored.shape == (36, made.labels.outputs)
    net = trained.file.load_member(0, torch.device("cpu")).network
    with torch.no_grad():
        expected = net.embed(tiny.batch(torch.arange(36)))
    torch.testing.assert_close(torch.from_numpy(stored).float(), expected, rtol=2e-3, atol=2e-3)
    path.write_bytes(path.read_bytes()[:100])  # a damaged file is made again
    again = condense.distill("krrst", tiny, 1, network=NETWORK, **{**QUICK, "committee": NETWORK, "pool_steps": 2})
    assert again.sha256() == made.sha256() and np.array_equal(np.load(path), stored)


def test_public_weights_of_other_classes_are_a_target_model(tiny, few_steps, monkeypatch):
    """The accuracy of their classes is not measured; the evaluation finds them again."""
    from condense.networks import pretrained

    with rng.seeded("public"):
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 7)
        )
    weights = pretrained.PublicWeights(7, [0.5] * 3, [0.2] * 3, (8, 8), lambda: copy.deepcopy(net), "place", "origin")
    monkeypatch.setattr(pretrained, "torchvision_weights", lambda name, named: weights)
    made = condense.distill("krrst", tiny, 1, network=NETWORK, **{**QUICK, "teachers": "torchvision:net"})
    assert made.labels.outputs == 144 and made.manifest["teachers"]["accuracies"] == [None]
    record = condense.evaluate(made, tiny, runs=1)
    assert {entry["arm"] for entry in record["results"]} == {"distilled", "random", "scratch"}
    with pytest.raises(CondenseError, match="its weights distinguish 7 classes, the data have 3"):
        condense.distill("sre2l", tiny, 1, network=NETWORK, steps=1, teachers="torchvision:net")


# -- feature labels ---------------------------------------------------------------------------------------------------


def test_feature_labels():
    values = gaussian(5, 7, dtype=torch.float32)
    labels = FeatureLabels(values)
    assert (labels.nbytes(), labels.outputs, len(labels), labels.is_hard) == (4 * 5 * 7, 7, 5, False)
    read = LABEL_KINDS.get("features").from_arrays(labels.arrays(), 3)
    assert torch.equal(read.targets(torch.tensor([3, 0])), values[[3, 0]])
    outputs = gaussian(5, 7, seed=1, dtype=torch.float32)
    expected = float(((outputs - values) ** 2).sum() / 35)
    assert float(labels.loss(outputs, values)) == pytest.approx(expected)
    for bad in (np.zeros((5, 0), np.float32), np.full((5, 7), np.nan, np.float32), np.zeros((5, 7))):
        with pytest.raises(CondenseError, match="labels/features"):
            FeatureLabels.from_arrays({"features": bad}, 3)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """The file of a set, made with a cache of its own, and its teachers."""
    folder = tmp_path_factory.mktemp("set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDENSE_CACHE", str(folder / "cache"))
        task = condense.task(tiny_arrays(), name="tiny")
        condense.distill(
            "krrst", task, 2, network=NETWORK, out=folder / "set.h5", **{**QUICK, "pool_steps": 2, "init": "noise"}
        )
    (teachers,) = (folder / "cache" / "teachers").glob("*.h5")
    return folder / "set.h5", teachers


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory):
    """Every protocol of transfer takes three steps."""
    folder = tmp_path_factory.mktemp("protocols")
    for name in ("transfer-v1", "finetune-v1", "dc-v1"):
        content = {**dataclasses.asdict(get_protocol(name)), "steps": 3, "batch": 16, "runs": 2}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDENSE_PROTOCOLS", str(folder))
        yield


def test_images_without_classes_are_distilled_and_judged_on_data_that_have_them(few_steps, tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(40):
        place = tmp_path / "photos" / ("deep" if number % 2 else "") / f"{number}.png"
        Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(place)
    photos = condense.task(tmp_path / "photos", unlabelled=True)
    assert photos.classes == ("image",) and (len(photos.train), len(photos.test)) == (32, 8)
    made = condense.distill("krrst", photos, 4, network=NETWORK, out=tmp_path / "set.h5", **QUICK)
    assert condense.load(tmp_path / "set.h5").sha256() == made.sha256() and len(made) == 4
    other = condense.task(tiny_arrays(classes=2, train=9, seed=5), name="other")
    record = condense.evaluate(made, photos, networks=[NETWORK], transfer=[other], runs=1)
    assert {entry["data"] for entry in record["results"]} == {"other"}
    assert {entry["arm"] for entry in record["results"]} == {"distilled", "random", "scratch"}
    with pytest.raises(CondenseError, match="was read without classes; give data with classes by --transfer"):
        condense.evaluate(made, photos, networks=[NETWORK], runs=1)
    for call in (
        lambda: condense.distill("dm", photos, 1, network=NETWORK, steps=1),
        lambda: condense.api.teachers(photos, networks=NETWORK, epochs=1),
        lambda: condense.api.experts(photos, network=NETWORK, count=1),
        lambda: condense.api.scores(photos, network=NETWORK),
    ):
        with pytest.raises(CondenseError, match="needs classes, but photos was read with unlabelled=true"):
            call()


def test_a_set_counts_its_targets_and_loads_without_its_method(small_set, monkeypatch):
    monkeypatch.setitem(sys.modules, "condense.methods.krrst", None)  # an import would fail
    loaded = condense.load(small_set[0])
    assert (loaded.labels.kind, loaded.labels.outputs) == ("features", 32)
    assert loaded.nbytes()["labels"] == 4 * 6 * 32 and loaded.nbytes()["external"] == 0
    images, targets = loaded[0]
    assert images.shape == (1, 8, 8) and targets.shape == (32,)


# -- transfer ---------------------------------------------------------------------------------------------------------


def test_transfer_of_a_set(small_set, few_steps, tiny, tmp_path, monkeypatch):
    path, teachers = small_set
    distilled = DistilledSet.load(path)
    supervised = tmp_path / "dm.h5"
    condense.distill("dm", tiny, 2, network="convnet-d2-w8-in", steps=1, batch_real=6, out=supervised)
    other = condense.task(tiny_arrays(classes=2, train=9, seed=5), name="other")
    arguments = {
        "transfer": [other],
        "controls": ["random", "full", str(supervised)],
        "teachers": teachers,
        "networks": ["own", "convnet-d1-w4-in"],
    }
    record = condense.evaluate(distilled, tiny, **arguments)
    assert (record["schema"], record["protocol"]["name"]) == ("condense.transfer/1", "transfer-v1")
    arms = {(entry["arm"], entry["network"]) for entry in record["results"]}
    both = {(arm, net) for arm in ("distilled", "random", "scratch", "dm.h5") for net in (NETWORK, "convnet-d1-w4-in")}
    assert arms == both | {("full", NETWORK)}
    assert [entry["arm"] for entry in record["missing"]] == ["full"]
    places = {(entry["data"], entry["test"]) for entry in record["results"]}
    assert places == {(data, test) for data in ("tiny", "other") for test in ("linear probe", "fine-tuning")}
    cells = {(e["arm"], e["network"], e["data"], e["test"]): e for e in record["results"]}
    assert len(cells) == len(record["results"]) and all(len(e["accuracies"]) == 2 for e in record["results"])
    for gain in record["gains"]:
        key = (gain["network"], gain["data"], gain["test"])
        ours, theirs = (cells[(arm, *key)]["accuracies"] for arm in ("distilled", gain["over"]))
        assert gain["value"] == pytest.approx(sum(a - b for a, b in zip(ours, theirs)) / 2)
        assert gain["ci95"] is not None
    probes = {
        arm: cells[arm, NETWORK, "tiny", "linear probe"]["accuracies"] for arm in ("distilled", "scratch", "full")
    }
    assert probes["full"][0] == probes["full"][1] and probes["distilled"] != probes["scratch"]
    json.dumps(record, allow_nan=False)

    def refuse(*_, **__):
        raise AssertionError("all scores are in the cache")

    with monkeypatch.context() as patch:
        patch.setattr("condense.judge.transfer.train", refuse)
        patch.setattr("condense.judge.transfer.fit_linear_probe", refuse)
        again = condense.evaluate(distilled, tiny, **arguments)
    assert again["results"] == record["results"]


def test_a_network_that_is_fitted_has_an_output_for_each_feature(small_set, few_steps):
    distilled = DistilledSet.load(small_set[0])
    net = condense.fit(distilled, NETWORK)
    images, ids = distilled.training_images()
    outputs = net(images)
    assert outputs.shape == (6, distilled.labels.outputs)
    with rng.seeded(0, "student", 0):
        untrained = networks.build_network(NETWORK, distilled.shape, distilled.labels.outputs).eval()
    targets = distilled.labels.targets(ids)
    assert distilled.loss(outputs, targets) < distilled.loss(untrained(images), targets)


def test_protocols_that_do_not_fit_are_refused(small_set, few_steps, tiny):
    distilled = DistilledSet.load(small_set[0])
    for arguments, message in (
        ({"protocol": "dc-v1"}, "--protocol dc-v1: tests students on classes, but the labels .* are features; take"),
        ({"controls": ["noise"]}, "--controls noise: no arm of transfer-v1"),
        ({"curve": [0.5]}, "--curve: does not apply to transfer-v1"),
        ({"transfer": [condense.task(tiny_arrays(size=16), name="large")]}, "--transfer large: images are 1x16x16"),
        ({"transfer": [tiny]}, "--transfer tiny: is given twice"),
    ):
        with pytest.raises(CondenseError, match=message):
            condense.evaluate(distilled, tiny, **arguments)
    with pytest.raises(CondenseError, match="--protocol transfer-v1: judges pretrained networks"):
        condense.judge.downstream(distilled, tiny)
    hard = condense.distill("random", tiny, 1)
    with pytest.raises(CondenseError, match="--transfer: dc-v1 tests students on the data of the set"):
        condense.evaluate(hard, tiny, transfer=[tiny])


def test_the_command_line(small_set, few_steps, call, tmp_path):
    path, teachers = small_set
    words = f"evaluate {path} --data tiny=tiny.npz --transfer other=tiny.npz --runs 1 --teachers {teachers}"
    shown = call(f"{words} --json record.json")
    assert shown.code == 0, shown.err
    assert "linear probe  convnet-d2-w8-bn  random" in shown.out and "distilled is better by" in shown.out
    assert json.loads((tmp_path / "record.json").read_text())["command"].startswith("condense evaluate ")
    assert call(f"{words} --controls nois").code == 2
