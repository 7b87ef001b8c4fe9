"""Group norm's second derivative in closed form."""

import pytest
import torch
import torch.nn.functional as F

from condense import networks, rng
from condense.device import second_derivatives

EPS = 1e-5


def maps(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return rng.Draws(seed, "maps", *shape).uniform(shape, -1.5, 1.5).to(dtype)


def gradients_of_gradients(net, images, probes):
    """Gradients for images and weights of a weighted sum of the gradients for images and weights."""
    inputs = [images, *net.parameters()]
    loss = net(images).exp().sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return torch.autograd.grad(sum((probe * g).sum() for probe, g in zip(probes, first)), inputs)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("size", [(4, 5), (7,)])
def test_first_and_second_derivatives_agree_with_finite_differences(groups, size):
    norm = networks.GroupNorm(groups, 6, EPS).double()
    x, weight, bias = maps(3, 6, *size), maps(6, seed=1), maps(6, seed=2)

    def call(x, weight, bias):
        with second_derivatives():
            return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    inputs = [value.requires_grad_() for value in (3 + x, weight, bias)]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("norm", ["in", "gn"])
def test_a_network_has_torchs_derivatives(norm):
    with rng.seeded(0, "network"):
        net = networks.build_network(f"convnet-d2-w8-{norm}", (3, 8, 8), 4).double()
    images = maps(5, 3, 8, 8).requires_grad_()
    probes = [maps(*value.shape, seed=3) for value in (images, *net.parameters())]
    expected = gradients_of_gradients(net, images, probes)
    with second_derivatives():
        found = gradients_of_gradients(net, images, probes)
    for left, right in zip(found, expected):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_values_and_gradients_are_torchs_to_the_bit():
    norm = networks.GroupNorm(8, 8, EPS)
    x = maps(5, 8, 6, 6, dtype=torch.float32).requires_grad_()
    expected = norm(x)
    with second_derivatives():
        found = norm(x)
    assert found.equal(expected)
    probe, inputs = maps(5, 8, 6, 6, seed=1, dtype=torch.float32), [x, *norm.parameters()]
    pairs = zip(torch.autograd.grad(found, inputs, probe), torch.autograd.grad(expected, inputs, probe))
    assert all(left.equal(right) for left, right in pairs)


def test_networks_batched_by_vmap_have_the_same_gradients():
    norm = networks.GroupNorm(2, 6, EPS).double()
    x, probe = maps(4, 3, 6, 5, 5), maps(3, 6, 5, 5, seed=1)
    weights = {name: value.detach() for name, value in norm.named_parameters()}

    def loss(weights, x):
        return (torch.func.functional_call(norm, weights, (x,)) * probe).sum()

    expected = [torch.func.grad(loss)(weights, part) for part in x]
    with second_derivatives():
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for name in weights:
        torch.testing.assert_close(found[name], torch.stack([each[name] for each in expected]))


def test_a_shifted_map_keeps_its_accuracy_in_float32():
    x = (50 + maps(2, 4, 16, 16)).requires_grad_()
    norm = networks.GroupNorm(4, 4, EPS)
    results = []
    for kind, closed in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        norm.to(kind)
        images = x.detach().to(kind).requires_grad_()
        probes = [maps(*value.shape, seed=3, dtype=kind) for value in (images, *norm.parameters())]
        with second_derivatives(closed):
            results.append([value.double() for value in gradients_of_gradients(norm, images, probes)])
    exact, torchs, ours = results
    for left, right, other in zip(exact, ours, torchs):
        error, usual = ((value - left).abs().max() / left.abs().max() for value in (right, other))
        assert error < 10 * usual + 1e-5


def test_the_closed_form_is_used():
    norm = networks.GroupNorm(2, 4)
    x = maps(1, 4, 3, 3, dtype=torch.float32).requires_grad_()
    with second_derivatives():
        name = type(norm(x).grad_fn).__name__
    assert name != type(F.group_norm(x, 2).grad_fn).__name__
