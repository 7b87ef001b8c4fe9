"""IDM and DANCE: their steps against the formulas written out, in the drivers' own draws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import condense
from condense import augment, networks, rng
from condense.engine import Run
from condense.engine.run import CLASS_CHUNK_PIXELS
from condense.methods import distribution_matching as dm
from condense.registry import METHODS

NETWORK = "convnet-d2-w8-in"
OWN = {"networks": 2, "batch_real": 6}


def made_by(name, task, **settings):
    """The pixels after the driver's steps, its bank, its configuration and a synthetic set as it began with."""
    entry = METHODS.get(name)
    config = entry.config(**OWN, **settings)
    run = Run(task, 2, NETWORK, quiet=True)
    found = []
    original = dm.load_or_train_snapshots
    dm.load_or_train_snapshots = lambda *words, **options: (found.append(original(*words, **options)), found[-1])[1]
    try:
        pixels = entry.function(task, config, run).images.detach()
    finally:
        dm.load_or_train_snapshots = original
    space = "pixel" if name == "dance" else "training"
    start = dm.SyntheticSet.create(task, 2, config, seed=0, device=torch.device("cpu"), space=space)
    return pixels, found[0], config, start


def apart(task, synthetic, c):
    images, labels = synthetic.decode()
    return images[labels == c], labels[labels == c]


def test_class_cross_entropy_is_the_sum_of_class_means():
    logits, labels = torch.randn(12, 5), torch.tensor([3, 1]).repeat(6)
    expected = sum(F.cross_entropy(logits[labels == c], labels[labels == c]) for c in (1, 3))
    torch.testing.assert_close(dm.class_cross_entropy(logits, labels, [3, 1]), expected)


@pytest.mark.parametrize("age", [0, 1])
def test_an_idm_step_equals_its_formula(tiny, monkeypatch, age):
    monkeypatch.setattr(rng.Draws, "integers", _fixed(rng.Draws.integers, age))
    pixels, bank, _, start = made_by("idm", tiny, steps=1, snapshots=2, net_steps=30, augment="none")
    net = networks.build_network(NETWORK, tiny.shape, 3).eval()
    bank.load(net, 0, age)
    ids = rng.Draws(0, "accuracy", 0).integers(36, dm.ACCURACY_IMAGES)
    truth = torch.as_tensor(tiny.train.labels)[ids]
    share = (net(tiny.batch(ids)).argmax(1) == truth).float().mean() if age else 0.0
    total = 0
    for c in range(3):
        real, _ = tiny.per_class(6, (0, "real", 0), [c])
        fake, labels = apart(tiny, start, c)
        gap = net.embed(real).detach().mean(0) - net.embed(fake).mean(0)
        total = total + gap.square().sum() + 0.5 * 100 * share * F.cross_entropy(net(fake), labels)
    (slope,) = torch.autograd.grad(total, start.images)
    expected = start.images.detach() - 0.2 * 2 * slope  # lr / (1 - momentum)
    torch.testing.assert_close(pixels, expected, rtol=1e-3, atol=1e-4)


def _fixed(original, age):
    """Lets the draw of the snapshot be network 0 at ``age``."""
    stream = rng.Draws(0, "snapshot", 0).stream
    answers = {}

    def integers(self, high, shape):
        if self.stream != stream:
            return original(self, high, shape)
        answers[id(self)] = answers.get(id(self), -1) + 1
        return torch.tensor([[0, age][answers[id(self)]]])

    return integers


def literal_queue(steps, interval, draws):
    """The released queue: dictionaries of networks, whose accuracy meters an evaluation clears every 100 steps."""
    networks, seen = [{"number": n, "turns": 0, "meter": 0} for n in range(3)], []
    for step in range(steps):
        if step % 100 == 0:
            for network in networks:
                network["meter"] = 0
        if step > 0 and step % interval == 0:
            networks.append({"number": networks[-1]["number"] + 1, "turns": 0, "meter": 0})
            networks = networks[-100:]
        matched, one, other = draws.uniform((1, 3))[0].tolist()
        network = networks[int(matched * len(networks))]
        seen.append((network["number"], network["turns"], network["meter"] > 0))
        a = networks[int(one * len(networks))]
        b = [network for network in networks if network is not a][int(other * (len(networks) - 1))]
        for network in (a, b):
            network["turns"] += 1
            network["meter"] += 1
    return seen


@pytest.mark.parametrize("interval", [30, 5])
def test_the_queue_of_idm_is_the_released_one(interval):
    queue = dm.simulate_queue(20_000, interval, rng.Draws(0, "queue"))
    assert queue[:4000] == literal_queue(4000, interval, rng.Draws(0, "queue"))
    assert 0.53 < np.mean([has_weight for _, _, has_weight in queue]) < 0.6  # 0.55 to 0.59 as released


def test_idm_takes_networks_from_the_queue(tiny, monkeypatch):
    loaded = []
    original = dm.load_or_train_snapshots

    def watch(*arguments, **options):
        snapshots = original(*arguments, **options)
        load = snapshots.load

        def note(net, number, age):
            loaded.append((number, age))
            return load(net, number, age)

        monkeypatch.setattr(type(snapshots), "load", lambda self, *given: note(*given))
        return snapshots

    monkeypatch.setattr(dm, "load_or_train_snapshots", watch)
    settings = {"steps": 12, "batch_real": 4, "networks": 2, "snapshots": 4, "net_steps": 2, "queue_turn": 3}
    condense.distill("idm", tiny, 1, network=NETWORK, queue=True, queue_interval=4, **settings)
    queue = dm.simulate_queue(12, 4, rng.Draws(0, "queue"))
    assert loaded == [(number % 2, min(round(turns * 3 / 2), 3)) for number, turns, _ in queue]
    assert max(age for _, age in loaded) == 3


def test_a_dance_step_equals_its_formula(tiny):
    """Matching under the network in the middle, then calibration under the expert at the moved pixels."""
    lr = 0.01
    pixels, experts, config, start = made_by("dance", tiny, steps=1, expert_epochs=3, lr_img=lr)
    draws = rng.Draws(0, "expert", 0)
    k, share = int(draws.integers(2, 1)), float(draws.uniform(1))
    middle, expert = (networks.build_network(NETWORK, tiny.shape, 3) for _ in range(2))
    before, after = experts.weights(k, 0), experts.weights(k, -1)
    assert not torch.equal(before["classify.weight"], after["classify.weight"])
    middle.load_state_dict({name: share * before[name] + (1 - share) * after[name] for name in after})
    expert.load_state_dict(after)
    views = augment.make_augmentation(config.augment, variant="idc", mirror=tiny.mirror)

    def stepped(purpose, loss):
        drawn = views.draw(rng.Draws(0, purpose, 0), 3, tiny.shape[1:])
        total = 0
        for c in range(3):
            fake, labels = apart(tiny, start, c)
            total = total + loss(c, views.apply(fake, drawn, labels), labels, drawn)
        (slope,) = torch.autograd.grad(total, start.images)
        with torch.no_grad():
            start.images.sub_(2 * lr * slope).clamp_(0, 1)

    def matching(c, fake, labels, drawn):
        real, truth = tiny.per_class(6, (0, "real", 0), [c])
        features = middle.embed(views.apply(real, drawn, truth)).detach()
        return (features.mean(0) - middle.embed(fake).mean(0)).square().sum()

    stepped("augment", matching)
    stepped("calibrate", lambda c, fake, labels, drawn: F.cross_entropy(expert(fake), labels))
    torch.testing.assert_close(pixels, start.images.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["idm", "dance"])
def test_they_do_not_depend_on_class_chunks(name, tiny, monkeypatch):
    settings = {"steps": 2, **({"expert_epochs": 1} if name == "dance" else {"snapshots": 2, "net_steps": 2})}
    whole, *_ = made_by(name, tiny, **settings)
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", str(64 * 6 / CLASS_CHUNK_PIXELS))  # one class at a time
    torch.testing.assert_close(made_by(name, tiny, **settings)[0], whole, rtol=1e-4, atol=1e-4)


def test_a_large_set_is_matched_in_random_parts(tiny):
    synthetic = dm.SyntheticSet.create(tiny, 3, dm.DANCE(), seed=0, device=torch.device("cpu"), space="pixel")
    images, labels = synthetic.decode([0, 2])
    some, theirs = synthetic.decode_sample([0, 2], 5, (0, "matched", 0))
    assert theirs.tolist() == [0] * 5 + [2] * 5
    pool = {image.detach().numpy().tobytes() for image in images[labels == 2]}
    assert {image.detach().numpy().tobytes() for image in some[5:]} <= pool
    other, _ = synthetic.decode_sample([0, 2], 5, (0, "calibrated", 0))
    assert not torch.equal(some, other)
    assert torch.equal(synthetic.decode_sample([0, 2], 12, (0, "matched", 0))[0], images)


@pytest.mark.parametrize("name", ["idm", "dance", "idc"])
def test_batch_norm_networks_see_a_class_whole(name, tiny, monkeypatch):
    """Statistics of a batch are those of all its images, however small the pieces that other networks get."""
    own = {"dance": {"expert_epochs": 1}, "idm": {"snapshots": 2, "net_steps": 2}}
    settings = {"network": "convnet-d2-w8-bn", "steps": 2, "precision": "fp32", **OWN, **own.get(name, own["idm"])}
    whole = condense.distill(name, tiny, 1, **settings)
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", str(2 * 64 / CLASS_CHUNK_PIXELS))
    torch.testing.assert_close(condense.distill(name, tiny, 1, **settings).stored, whole.stored, rtol=1e-4, atol=1e-4)


def test_class_means_keep_their_precision_under_autocast():
    features, labels = torch.randn(9, 4), torch.tensor([0, 1, 1] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        means = dm.class_means(features, labels, [0, 1])
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, dm.class_means(features, labels, [0, 1]))


def test_pixels_of_dance_and_idc_stay_in_range(tiny):
    made = condense.distill("dance", tiny, 1, network=NETWORK, steps=3, expert_epochs=1, lr_img=50.0, **OWN)
    assert float(made.stored.min()) >= 0 and float(made.stored.max()) <= 1 and made.manifest["space"] == "pixel"
    assert len(made) == 3 * 4 and len(made.stored) == 3
