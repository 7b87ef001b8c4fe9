"""Kernel launches of a step on a pretended CUDA device: a GPU is idle between them, so each has a budget."""

import pytest
import torch
from pretended import pretended, reason_to_skip

from condense import networks, rng
from condense.augment import make_augmentation
from condense.benchmarks.speed.measure import Case, drive, random_task
from condense.labels import HardLabels
from condense.registry import METHODS
from condense.training import FixedSource, Student, TrainConfig, train

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

SHORT = {
    "idc": {"networks": 1, "snapshots": 2, "net_steps": 1, "batch_real": 8},
    "mtt": {"num_experts": 1, "expert_epochs": 1, "max_start_epoch": 1, "buffer_epochs": 2, "syn_steps": 4},
}


@pytest.mark.parametrize(("name", "budget"), [("dm", 300), ("dc", 900), ("dsa", 900), ("idc", 900), ("mtt", 100)])
def test_a_step_on_ten_classes_stays_within_its_budget_of_launches(name, budget, monkeypatch):
    """The budget of mtt is that of one training step of the student and its way back, of which it makes four."""
    monkeypatch.setenv("CONDENSE_LOG_SECONDS", "1000")
    counts = []
    with pretended() as log:
        case = Case(random_task(10, 20, (3, 32, 32), 1), 1, 8, torch.device("cuda", 0))
        config = METHODS.get(name).config(steps=4, **SHORT.get(name, {"batch_real": 8}))
        drive(name, config, case, lambda run, index: counts.append(sum(log.launches.values())))
    launches = counts[3] - counts[2]  # earlier steps prepare and record graphs, the last one ends the run
    assert 0 < launches / SHORT.get(name, {}).get("syn_steps", 1) <= budget


def launches_of_students(count: int, has_own_images: bool) -> int:
    """Launches of the third step of ``count`` students that are trained together."""
    device, counts = torch.device("cuda", 0), []
    augment = make_augmentation("color_crop_cutout_flip_scale_rotate")
    config = TrainConfig(steps=4, batch=20, lr=0.01, momentum=0.9, weight_decay=5e-4, augment=augment)
    with pretended() as log:

        def images(seed):
            pixels = rng.Draws(seed, "images").uniform((20, 3, 32, 32)).to(device)
            return FixedSource(pixels, HardLabels((torch.arange(20) % 10).to(device), 10))

        common, students = images(0), []
        for k in range(count):
            with rng.seeded(k, "network"):
                net = networks.build_network("convnet-d3-w8-in", (3, 32, 32), 10)
            students.append(Student(net, images(k) if has_own_images else common, 1))
        train(students, config, device=device, report=lambda done: counts.append(sum(log.launches.values())))
    return counts[2] - counts[1]


@pytest.mark.parametrize("has_own_images", [False, True])
def test_a_step_of_stacked_students_has_as_many_launches_for_six_as_for_two(has_own_images):
    """Images are gathered, augmented and compared with their labels at once."""
    two, six = (launches_of_students(count, has_own_images) for count in (2, 6))
    assert six <= two <= 60
