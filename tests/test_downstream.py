"""Downstream checks: attacks, corruptions, membership inference, continual learning and ranking."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import change_protocols
from torch import nn

import condense
from condense import rng
from condense.errors import CondenseError
from condense.judge import downstream_checks as checks
from condense.judge import format_downstream

NETWORK = "convnet-d2-w8-in"


@pytest.fixture(scope="module")
def digits():
    return condense.task("digits")


@pytest.fixture
def distilled(tiny):
    return condense.distill("random", tiny, 4, network=NETWORK, device="cpu", protocol="quick-v1")


class Linear(nn.Module):
    """Logits of flat pixels."""

    def __init__(self, inputs=12, classes=3):
        super().__init__()
        weight = rng.Draws("linear").uniform((classes, inputs), -1.0, 1.0)
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def pixels_and_labels():
    return rng.Draws("pixels").uniform((6, 3, 2, 2), 0.2, 0.8), torch.arange(6) % 3


def test_fgsm_moves_each_pixel_along_the_sign_of_its_gradient():
    net, (pixels, labels) = Linear(), pixels_and_labels()
    attacked = checks.attack(net, pixels, labels, 0.1, 1, rng.Draws("attack"))
    logits = net(pixels).softmax(1) - F.one_hot(labels, 3)
    expected = pixels + 0.1 * (logits @ net.weight).view_as(pixels).sign()
    torch.testing.assert_close(attacked, expected)


def test_pgd_stays_within_its_radius_and_increases_the_loss():
    net, (pixels, labels) = Linear(), pixels_and_labels()
    pixels = (pixels * 2 - 0.5).clamp(0, 1)  # some are at the ends of the range
    attacked = checks.attack(net, pixels, labels, 0.1, 10, rng.Draws("attack"))
    assert float((attacked - pixels).abs().max()) <= 0.1 + 1e-6 and 0 <= attacked.min() <= attacked.max() <= 1
    once = checks.attack(net, pixels, labels, 0.1, 1, rng.Draws("attack"))
    losses = [F.cross_entropy(net(x), labels).item() for x in (pixels, once, attacked)]
    assert losses[0] < losses[1] <= losses[2] + 1e-4


@pytest.mark.parametrize("name", checks.CORRUPTIONS)
def test_corruptions_keep_shape_and_repeat(name):
    pixels = rng.Draws("pixels").uniform((2, 3, 5, 7))
    first, again = (checks.CORRUPTIONS[name](pixels, rng.generator("noise")) for _ in range(2))
    assert first.shape == pixels.shape and first.equal(again) and not first.equal(pixels)


def test_noise_has_its_standard_deviation():
    noise = checks.CORRUPTIONS["noise 0.08"](torch.zeros(20, 3, 32, 32), rng.generator("noise"))
    assert float(noise.std()) == pytest.approx(0.08, rel=0.01) and abs(float(noise.mean())) < 1e-3


class Remembering(nn.Module):
    """Confident on the images that it was given, and nowhere else."""

    def __init__(self, images, labels):
        super().__init__()
        self.images, self.labels = images, labels

    def forward(self, x):
        known = (x.flatten(1)[:, None] == self.images.flatten(1)).all(2)
        return 5.0 * known.float() @ F.one_hot(self.labels, 10).float()


def test_members_that_a_network_remembers_are_told_from_test_images(digits):
    ids = torch.arange(40)
    members = digits.batch(ids), torch.from_numpy(digits.train.labels[:40]).long()
    assert checks.privacy(Remembering(*members), digits, members)["attack AUC"] == 1.0
    others = digits.batch(ids + 40), torch.from_numpy(digits.train.labels[40:80]).long()
    found = checks.privacy(Remembering(*members), digits, others)
    assert found["attack AUC"] == pytest.approx(0.5, abs=0.01) and found["attack advantage"] < 0.05


def test_a_record_of_all_checks(distilled, tiny, tmp_path, monkeypatch):
    change_protocols(monkeypatch, tmp_path / "protocols", steps=8, full_epochs=2, lr=[0.05])
    options = {"network": NETWORK, "runs": 2, "device": "cpu", "steps": 2, "widths": [2]}
    record = condense.downstream(distilled, tiny, checks=checks.CHECKS, **options)
    assert json.loads(json.dumps(record)) == record and list(record["checks"]) == list(checks.CHECKS)
    rows = {(row["measure"], row["arm"]): row for part in record["checks"].values() for row in part}
    for arm in checks.ARMS:
        assert rows["PGD-10 8/255", arm]["mean"] <= rows["clean", arm]["mean"]
        half, all_classes = rows["accuracy on 2 classes", arm], rows["accuracy on 3 classes", arm]
        mean = [(a + b) / 2 for a, b in zip(half["values"], all_classes["values"])]
        assert rows["mean of the steps", arm]["values"] == pytest.approx(mean)
        ranking = rows["Spearman over 6 ConvNets", arm]
        assert ranking["mean"] is None or -1 <= ranking["mean"] <= 1
    table = format_downstream(record)
    assert "random, equal bytes" in table.splitlines()[0] and "attack AUC" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checks": ["robust"]}, "--checks robust: unknown; did you mean 'robustness'"),
        ({"steps": 11}, "--class-steps 11: must be 1 to 3"),
        ({"runs": 0}, "--runs 0: must be at least 1"),
        ({"network": "convnet-d9"}, "convnet-d9"),
    ],
)
def test_what_cannot_be_measured_is_one_line(options, message, distilled, tiny):
    with pytest.raises(CondenseError, match="(?s)" + message.replace("'", ".").replace("?", ".")):
        condense.downstream(distilled, tiny, device="cpu", **options)


def test_the_ranked_networks_fit_the_images(digits):
    names = checks.ranked_networks(digits, [4])
    assert names == [f"convnet-d{depth}-w4-{norm}" for depth in (1, 2, 3) for norm in ("in", "bn")]
