"""CUDA graphs on a pretended device, where a replay makes the recorded operations again on the same memory."""

import logging

import pytest
import torch
from pretended import CUDA, pretended, reason_to_skip
from torch import Tensor

from condense import networks, rng
from condense.cuda_graphs import MAX_SHAPES, GraphedFunction
from condense.engine import BatchLoss, NetworkLoss, Target, unroll
from condense.labels import HardLabels
from condense.training import FixedSource, Student, TrainConfig, train

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


def images(seed: int, *shape: int) -> Tensor:
    return rng.Draws(seed, "images").uniform(shape or (4, 3, 8, 8), -1.0, 1.0)


def replays(log) -> int:
    return log.launches["replay"]


def test_a_replay_computes_with_new_inputs_and_new_weights():
    with pretended() as log:
        weight = images(0, 5, 5).to(CUDA)
        product = GraphedFunction(lambda x: (x @ weight, x.sum(1)))
        for seed in range(4):
            x = images(seed, 3, 5).to(CUDA)
            with torch.no_grad():
                weight.add_(1)
            left, right = product(x)
            torch.testing.assert_close(left.cpu(), x.cpu() @ weight.cpu())
            torch.testing.assert_close(right.cpu(), x.cpu().sum(1))
        assert replays(log) == 4  # one to compare, and from the second call on


def test_state_is_changed_once_for_each_call():
    with pretended():
        total = torch.zeros(3, device=CUDA)

        def add(x):
            total.add_(x)
            return (x * 2,)

        call = GraphedFunction(add, [total])
        for _ in range(5):
            call(torch.ones(3, device=CUDA))
        assert total.cpu().tolist() == [5.0] * 3


@pytest.mark.parametrize("fault", ["waits", "draws", "differs"])
def test_what_cannot_be_recorded_is_called_and_said_once(fault, caplog):
    calls = []

    def function(x):
        calls.append(1)
        if fault == "waits":
            return (x * float(x.sum()),)
        if fault == "draws":
            return (x + 0 * torch.rand(3, device=CUDA),)
        return (x * len(calls),)  # depends on the host

    with pretended() as log, caplog.at_level(logging.WARNING):
        call = GraphedFunction(function)
        for _ in range(4):
            call(torch.ones(3, device=CUDA))
        values = call(2 * torch.ones(3, device=CUDA))[0].cpu().tolist()
    expected = {"waits": [12.0] * 3, "draws": [2.0] * 3, "differs": [2.0 * len(calls)] * 3}[fault]
    assert values == expected and replays(log) <= 1
    assert len(caplog.records) == 1 and "continuing without CUDA graphs" in caplog.text


def test_kernels_of_few_shapes_are_recorded_and_none_on_request(monkeypatch):
    with pretended() as log:
        double = GraphedFunction(lambda x: (2 * x,))
        for size in range(1, MAX_SHAPES + 3):
            for _ in range(2):
                assert double(torch.ones(size, device=CUDA))[0].cpu().tolist() == [2.0] * size
        assert replays(log) == 2 * MAX_SHAPES
        monkeypatch.setenv("CONDENSE_CUDA_GRAPHS", "0")
        double = GraphedFunction(lambda x: (2 * x,))
        for _ in range(3):
            double(torch.ones(1, device=CUDA))
        assert replays(log) == 2 * MAX_SHAPES


@pytest.mark.parametrize("name", ["convnet-d2-w4-in", "convnet-d2-w4-bn"])
@pytest.mark.parametrize("grad_mode", ["adjoint", "tesla"])
def test_an_unrolled_training_is_replayed(name, grad_mode):
    """Equal to the derivatives of the CPU, in several outer steps, each of which has other images."""
    with rng.seeded(0, "network"):
        net = networks.build_network(name, (3, 8, 8), 4)
    layout = networks.Layout.of(net)
    start = layout.flatten(net)
    goal = start + 0.05 * images(9, len(start))

    def outcomes(device):
        twin = net if device.type == "cpu" else networks.build_network(name, (3, 8, 8), 4).to(device)
        twin.train()
        labels = torch.arange(4).to(device)

        def loss(theta, x, targets):
            logits = torch.func.functional_call(twin, layout.unflatten(theta), (x,))
            return torch.nn.functional.cross_entropy(logits, targets)

        shared, found = NetworkLoss(loss, list(twin.buffers())), []
        for outer in range(3):
            leaf = images(outer).to(device).requires_grad_()
            step_loss = BatchLoss(lambda i, leaf=leaf: (leaf * (1 + 0.1 * i), labels), shared)
            rate, ends = torch.tensor(0.1).to(device), [Target(3, goal.to(device))]
            options = {"grad_mode": grad_mode}
            result = unroll(step_loss, start.to(device), {"images": leaf}, rate, 3, ends, **options)
            found += [result.loss.cpu(), result.end.cpu(), *(value.cpu() for value in result.gradients.values())]
        return found

    expected = outcomes(torch.device("cpu"))
    with pretended() as log:
        there = outcomes(CUDA)
        assert replays(log) >= 12
    for value, reference in zip(there, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


class WithSpare(networks.Network):
    """A network with a weight that no output depends on."""

    def __init__(self):
        super().__init__()
        self.spare, self.classify = torch.nn.Parameter(torch.ones(3)), torch.nn.Linear(3 * 8 * 8, 4)

    def embed(self, x, maps=None):
        return x.flatten(1)


def test_stacked_students_leave_unused_weights_alone():
    config = TrainConfig(steps=4, batch=4, lr=0.1, momentum=0.9, weight_decay=0.1)

    def trained(device):
        labels, students = HardLabels(torch.arange(4).to(device), 4), []
        for k in range(2):
            with rng.seeded(k, "network"):
                students.append(Student(WithSpare(), FixedSource(images(0).to(device), labels), k))
        train(students, config, device=device)
        return [{name: value.cpu() for name, value in each.network.state_dict().items()} for each in students]

    expected = trained(torch.device("cpu"))
    with pretended() as log:
        there = trained(CUDA)
        assert replays(log)
    for ours, reference in zip(there, expected):
        assert ours["spare"].tolist() == [1.0] * 3
        torch.testing.assert_close(ours, reference)
