"""The synthetic-set optimizer against torch's optimisers, and its options one by one."""

import pytest
import torch

from condense.engine import ParamGroup, SyntheticOptimizer

CLASSES = torch.tensor([0, 0, 1, 1])


def make(group, rows=4, dtype=torch.float64):
    images = torch.randn(rows, 2, 3, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return images, SyntheticOptimizer({"images": images}, {"images": group}, CLASSES[:rows])


def targets():
    return torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "group, reference",
    [
        (ParamGroup(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (ParamGroup(lr=0.1, momentum=0.5), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)),
        (
            ParamGroup(lr=0.1, momentum=0.9, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        ),
        (ParamGroup(lr=0.1, optimizer="adam"), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.9))),
    ],
)
def test_equals_torch(group, reference):
    images, optimizer = make(group)
    other = images.detach().clone().requires_grad_()
    torch_optimizer = reference([other])
    goal = targets()
    for _ in range(7):
        optimizer.minimise((images - goal).pow(4).sum())
        torch_optimizer.zero_grad()
        (other - goal).pow(4).sum().backward()
        torch_optimizer.step()
    torch.testing.assert_close(images, other, rtol=1e-12, atol=1e-12)


def test_chunks_add_up_to_one_loss():
    whole, one = make(ParamGroup(lr=0.1, momentum=0.5))
    parts, two = make(ParamGroup(lr=0.1, momentum=0.5))
    goal = targets()
    for _ in range(3):
        one.minimise((whole - goal).square().sum())
        for rows in (slice(0, 2), slice(2, 4)):
            two.accumulate((parts[rows] - goal[rows]).square().sum())
        two.step()
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_step_on_one_class_has_its_own_momentum(kind):
    images, optimizer = make(ParamGroup(lr=0.1, momentum=0.9, optimizer=kind))
    alone = images.detach()[2:].clone().requires_grad_()
    single = SyntheticOptimizer(
        {"images": alone}, {"images": ParamGroup(lr=0.1, momentum=0.9, optimizer=kind)}, CLASSES[2:]
    )
    start, goal = images.detach().clone(), targets()
    for c in (0, 1, 0, 1, 1):
        optimizer.minimise((images - goal).square().sum(), classes=[c])
        if c == 0:
            assert not torch.equal(images[:2], start[:2])
        else:
            single.minimise((alone - goal[2:]).square().sum())
        torch.testing.assert_close(images[2:], alone, rtol=1e-12, atol=1e-12)


def test_mask_gate_clamp_schedule_and_average():
    images, optimizer = make(ParamGroup(lr=0.1))
    start = images.detach().clone()
    mask = torch.zeros_like(start)
    mask[0] = 1
    optimizer.minimise(images.sum(), mask=mask)
    torch.testing.assert_close(images[0], start[0] - 0.1)
    assert torch.equal(images[1:], start[1:])
    optimizer.minimise(images.sum(), gate=False)
    torch.testing.assert_close(images[0], start[0] - 0.1)

    images, optimizer = make(ParamGroup(lr=100.0, clamp=(-0.5, 0.25)))
    optimizer.minimise(images.sum())
    assert images.min() >= -0.5 and images.max() <= 0.25

    images, optimizer = make(ParamGroup(lr=1.0, schedule=lambda fraction: 1 - fraction, ema=0.75))
    start = images.detach().clone()
    optimizer.progress = 0.5
    optimizer.minimise(images.sum())
    torch.testing.assert_close(images, start - 0.5)
    torch.testing.assert_close(optimizer.averages["images"], 0.75 * start + 0.25 * (start - 0.5))


def test_gradients_by_hand():
    images, optimizer = make(ParamGroup(lr=0.5))
    start = images.detach().clone()
    optimizer.apply({"images": torch.ones_like(start)}, loss=torch.tensor(3.0))
    torch.testing.assert_close(images, start - 0.5)
    assert float(optimizer.pop_loss()) == 3.0


def test_notices_what_is_not_finite():
    images, optimizer = make(ParamGroup(lr=0.5))
    optimizer.minimise(images.sum())
    assert bool(optimizer.finite)
    optimizer.minimise(images.sum() * float("nan"))
    assert not bool(optimizer.finite)


def test_state_goes_on_bit_for_bit():
    group = ParamGroup(lr=0.1, optimizer="adam", ema=0.9)
    goal = targets()
    images, optimizer = make(group)
    for _ in range(2):
        optimizer.minimise((images - goal).square().sum())
    saved = optimizer.state_dict()
    for _ in range(3):
        optimizer.minimise((images - goal).square().sum())
    other, resumed = make(group)
    resumed.load_state_dict(saved)
    for _ in range(3):
        resumed.minimise((other - goal).square().sum())
    assert torch.equal(images, other)
    assert torch.equal(optimizer.averages["images"], resumed.averages["images"])


def test_a_positive_group_steps_up_freely_and_never_reaches_zero():
    rates = torch.tensor([1.0, 1.0, 1.0, 1e-3]).requires_grad_()
    optimizer = SyntheticOptimizer({"rates": rates}, {"rates": ParamGroup(lr=1.0, positive=True)}, CLASSES)
    optimizer.apply({"rates": torch.tensor([-2.0, 1e-3, 100.0, 5.0])})
    torch.testing.assert_close(rates.detach(), torch.tensor([3.0, 1 / 1.001, 1 / 101, 1e-6 / 5.001]))
