"""DataDAM: its loss and slope against literal loops and finite differences, its step against the formula."""

import pytest
import torch

import condense
from condense import augment, networks, rng
from condense.engine import Run
from condense.engine.run import CLASS_CHUNK_PIXELS
from condense.methods import attention_matching as am
from condense.registry import METHODS

NETWORK = "convnet-d2-w8-in"


def normal(*shape, key="x"):
    return torch.randn(*shape, generator=rng.generator("am", key, *shape), dtype=torch.float64)


def literal_attention(maps, power):
    """The paper's formula, image by image."""
    rows = []
    for image in maps:
        flat = sum(channel.abs() ** power for channel in image).reshape(-1)
        rows.append(flat / (flat @ flat).sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0, 3.5])
def test_attention_equals_its_formula(power):
    maps = normal(3, 5, 4, 4)
    torch.testing.assert_close(am.attention(maps, power), literal_attention(maps, power), rtol=1e-10, atol=0)


def test_a_map_of_one_pixel_has_attention_one_and_no_slope():
    maps = normal(4, 5, 1, 1).requires_grad_()
    seen = am.attention(maps, 1.0)
    torch.testing.assert_close(seen, torch.ones(4, 1, dtype=torch.float64))
    (slope,) = torch.autograd.grad(seen.sum(), maps)
    assert float(slope.abs().max()) < 1e-12


def test_two_pixels_have_their_closed_form():
    maps = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64)  # |F| summed over channels: (3, 4)
    torch.testing.assert_close(am.attention(maps, 1.0), torch.tensor([[0.6, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_a_dead_map_has_zeros_and_a_finite_slope(power):
    maps = torch.zeros(2, 3, 4, 4, requires_grad=True)
    seen = am.attention(maps, power)
    (slope,) = torch.autograd.grad(seen.sum(), maps)
    assert not seen.any() and torch.isfinite(slope).all()


def literal_loss(net, real, fake, labels_real, labels_fake, power, weight):
    total = 0
    for c in labels_fake.unique():
        a, b = (net.features(x[labels == c]) for x, labels in ((real, labels_real), (fake, labels_fake)))
        for one, other in zip(a[:-1], b[:-1]):
            gap = literal_attention(one, power).mean(0) - literal_attention(other, power).mean(0)
            total = total + gap.square().sum()
        gap = net.embed(real[labels_real == c]).mean(0) - net.embed(fake[labels_fake == c]).mean(0)
        total = total + weight * gap.square().sum()
    return total


def test_the_loss_equals_a_loop_and_its_slope_finite_differences():
    with rng.seeded("am", "net"):
        net = networks.build_network("convnet-d3-w8-in", (1, 8, 8), 3).double()
    real, fake = normal(9, 1, 8, 8, key="real"), normal(4, 1, 8, 8, key="fake")
    labels_real, labels_fake = torch.tensor([0, 2, 2] * 3), torch.tensor([2, 0, 0, 2])
    target = [mean.detach() for mean in am.layer_means(net, real, labels_real, [0, 2], 4.0, chunk=2)]
    ours = am.layer_means(net, fake, labels_fake, [0, 2], 4.0)
    expected = literal_loss(net, real, fake, labels_real, labels_fake, 4.0, 0.01)
    assert len(target) == 3
    assert float(am.attention_loss(target, ours, 0.01).detach()) == pytest.approx(float(expected.detach()), rel=1e-10)

    def loss(pixels):
        return literal_loss(net, real, pixels, labels_real, labels_fake, 4.0, 0.01)

    pixels = fake.clone().requires_grad_()
    means = am.layer_means(net, pixels, labels_fake, [0, 2], 4.0)
    (slope,) = torch.autograd.grad(am.attention_loss(target, means, 0.01), pixels)
    for place in ((0, 0, 2, 3), (2, 0, 5, 5), (3, 0, 7, 0)):
        step = torch.zeros_like(fake)
        step[place] = 1e-5
        ahead, behind = (float(loss(fake + sign * step).detach()) for sign in (1, -1))
        assert float(slope[place]) == pytest.approx((ahead - behind) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_a_step_equals_its_formula(tiny, preset):
    made = condense.distill("datadam", tiny, 2, network=NETWORK, steps=1, batch_real=6, preset=preset, precision="fp32")
    config = am.DataDAM(preset=preset)
    power, scale = {"paper": (4.0, 1.0), "code": (1.0, 100.0)}[preset]
    assert config.resolved()[:2] == (power, scale)
    run = Run(tiny, 2, NETWORK, quiet=True)
    net = run.random_network(0)
    start = am.SyntheticSet.create(tiny, 2, config, seed=0, device=torch.device("cpu"))
    views = augment.make_augmentation(config.augment, mirror=tiny.mirror)
    drawn = views.draw(rng.Draws(0, "augment", 0), 3, tiny.shape[1:])
    real, truth = tiny.per_class(6, (0, "real", 0))
    fake, labels = start.decode()
    real, fake = views.apply(real, drawn, truth), views.apply(fake, drawn, labels)
    total = scale * literal_loss(net, real, fake, truth, labels, power, 0.01)
    (slope,) = torch.autograd.grad(total, start.images)
    torch.testing.assert_close(made.stored, start.images.detach() - slope, rtol=1e-3, atol=1e-4)


def test_it_does_not_depend_on_class_chunks(tiny, monkeypatch):
    settings = {"network": NETWORK, "steps": 3, "batch_real": 6, "precision": "fp32"}
    whole = condense.distill("datadam", tiny, 2, **settings)
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", str(64 * 6 / CLASS_CHUNK_PIXELS))  # one class at a time
    made = condense.distill("datadam", tiny, 2, **settings)
    torch.testing.assert_close(made.stored, whole.stored, rtol=1e-4, atol=1e-4)


def test_batch_norm_takes_all_classes_at_once(tiny, monkeypatch):
    settings = {"network": "convnet-d2-w8-bn", "steps": 2, "batch_real": 6, "preset": "code", "precision": "fp32"}
    whole = condense.distill("datadam", tiny, 2, **settings)
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", "1e-9")
    assert torch.equal(condense.distill("datadam", tiny, 2, **settings).stored, whole.stored)


def test_what_it_refuses(tiny):
    with pytest.raises(condense.CondenseError, match="preset=papr: unknown; did you mean 'paper'"):
        am.DataDAM(preset="papr")
    with pytest.raises(condense.CondenseError, match="--network mlp: datadam needs two stages"):
        condense.distill("datadam", tiny, 1, network="mlp", steps=1)


def test_the_released_program_is_the_default():
    entry = METHODS.get("datadam")
    assert entry.network == "convnet-d3-w128-bn" and entry.protocol == "datadam-v1"
    assert entry.config().resolved() == (1.0, 100.0, 20_000) and entry.config().total_steps(10) == 20_000
    assert am.DataDAM(preset="paper", power=2.0).resolved() == (2.0, 1.0, 8000)
