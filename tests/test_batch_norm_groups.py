"""Batch statistics of groups: labels and students see the same groups of views."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condense import networks, rng
from condense.augment import ViewRule
from condense.errors import CondenseError
from condense.judge import get_protocol
from condense.labels import (
    DistanceLabels,
    HardLabels,
    PerViewLabels,
    PoolLabels,
    TeacherLabels,
    compute_logits,
    compute_view_logits,
    compute_view_nll,
    split_evenly,
)
from condense.training import FixedSource, Student, TrainConfig, batch_ids, epoch_steps, train

CPU, NETWORK, EPOCHS = torch.device("cpu"), "convnet-d2-w8-bn", 2
RECIPE = TrainConfig(1, 16, 0.05, 0.9, 0.0, lr_milestones=(), batch_norm_group=8)


def build(seed):
    with rng.seeded("groups", seed):
        return networks.build_network(NETWORK, (1, 8, 8), 3)


def pictures(count):
    return torch.randn(count, 1, 8, 8, generator=rng.generator("pictures", count))


def recording(net):
    """Returns a list that receives the inputs of the network's first BatchNorm layer, at every forward pass."""
    seen = []
    first = next(layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d))
    first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach().clone()))
    return seen


def labelled(count, teacher, micro=8):
    logits = compute_view_logits(
        teacher, pictures(count), EPOCHS, ViewRule(mix="cutmix"), 5, classes=3, statistics="batch", micro=micro
    )
    return PerViewLabels(logits, 5, ViewRule(mix="cutmix"), 4.0, statistics="batch", micro=micro)


def student_of(labels, count, seed=0):
    return Student(build(seed), FixedSource(pictures(count), labels), rng.key("student", seed))


def equal_states(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("rows", "size", "sizes"),
    [
        (10, 8, [5, 5]),
        (16, 8, [8, 8]),
        (17, 8, [6, 6, 5]),
        (100, 8, [8] * 9 + [7] * 4),
        (3, 2, [3]),  # no row is alone
        (5, 2, [3, 2]),
        (1, 8, [1]),
    ],
)
def test_groups_have_equal_sizes(rows, size, sizes):
    parts = split_evenly(torch.arange(rows), size)
    assert [len(part) for part in parts] == sizes and torch.cat(parts).tolist() == list(range(rows))


@pytest.mark.parametrize("count", [10, 16, 21, 32])
def test_students_see_the_groups_that_were_labelled(count):
    """The same network as teacher and as student without learning: its BatchNorm sees the same maps in both."""
    teacher, student = build(1), build(1)
    answered = recording(teacher)
    labels = labelled(count, teacher)
    answered = answered[:]
    sizes = [len(maps) for maps in answered]
    assert sum(sizes) == EPOCHS * count and max(sizes) <= 8 and max(sizes) - min(sizes) <= 1
    seen = recording(student)
    steps = EPOCHS * epoch_steps(count, 16)
    recipe = dataclasses.replace(RECIPE, steps=steps, lr=0.0)
    train([Student(student, FixedSource(pictures(count), labels), 3)], recipe, device=CPU)
    assert len(seen) == len(answered)
    for maps, expected in zip(seen, answered):
        torch.testing.assert_close(maps, expected)


def test_a_third_epoch_repeats_the_first():
    labels, student = labelled(16, build(1)), student_of(labelled(16, build(1)), 16)
    seen = recording(student.network)
    train([student], dataclasses.replace(RECIPE, steps=3, lr=0.0), device=CPU)
    assert [len(maps) for maps in seen] == [8] * 6
    assert torch.equal(seen[0], seen[4]) and not torch.equal(seen[0], seen[2])
    assert labels.labelled_groups(2, 8)[0].equal(labels.labelled_groups(0, 8)[0])


def test_a_step_is_the_mean_loss_over_the_groups():
    """Against gradient accumulation written out."""
    labels = labelled(16, build(1))
    student = student_of(labels, 16)
    net = copy.deepcopy(student.network)
    for group in labels.labelled_groups(0, 8):
        views, targets = labels.training_batch(pictures(16), group, 0)
        (F.kl_div((net(views) / 4).log_softmax(1), targets, reduction="batchmean") * 16 / 2).backward()
    expected = [parameter.detach() - 0.05 * parameter.grad for parameter in net.parameters()]
    train([student], RECIPE, device=CPU)
    for parameter, value in zip(student.network.parameters(), expected):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(student.network.buffers(), net.buffers()):
        torch.testing.assert_close(mine, theirs)  # running statistics move once a group
    whole = student_of(labels, 16)
    train([whole], dataclasses.replace(RECIPE, batch_norm_group=0), device=CPU)
    assert not equal_states(whole.network, student.network)


def test_teachers_in_the_loop_label_each_group():
    teacher = build(1)
    labels = TeacherLabels(teacher, 10, 5, ViewRule(mix="cutmix"), 4.0, statistics="batch", micro=8)
    student = student_of(labels, 10)
    answered, seen = recording(teacher), recording(student.network)
    student.network.load_state_dict(teacher.state_dict())
    train([student], dataclasses.replace(RECIPE, lr=0.0), device=CPU)
    assert [len(maps) for maps in answered] == [5, 5]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen, answered, strict=True))
    answered.clear()
    compute_logits(teacher, pictures(10), statistics="batch", micro=8)
    assert [len(maps) for maps in answered] == [5, 5]


def test_other_labels_are_split_evenly():
    """Hard labels have no groups: every image occurs once in an epoch, in the student's own order."""
    student = student_of(HardLabels(torch.arange(21) % 3, 3), 21)
    seen, net = recording(student.network), copy.deepcopy(student.network)
    order = batch_ids(student.seed, 21, 21, 0)
    train([student], dataclasses.replace(RECIPE, steps=2, lr=0.0), device=CPU)
    assert [len(maps) for maps in seen] == [7, 7, 7]
    torch.testing.assert_close(torch.cat(seen), net.convs[0](pictures(21)[order]))


def test_stacked_equals_one_after_the_other():
    labels = labelled(21, build(9))
    together, apart = ([student_of(labels, 21, k) for k in range(3)] for _ in range(2))
    recipe = dataclasses.replace(RECIPE, steps=5)
    train(together, recipe, device=CPU, together=True)
    train(apart, recipe, device=CPU, together=False)
    for one, other in zip(together, apart):
        for a, b in zip(one.network.state_dict().values(), other.network.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_only_labels_of_groups_of_this_size_have_groups():
    teacher, images, views = build(1), pictures(10), ViewRule(mix="cutmix")
    labels = labelled(10, teacher)
    assert [len(group) for group in labels.labelled_groups(0, 8)] == [5, 5]
    assert labels.labelled_groups(0, 4) is None
    running = compute_view_logits(teacher, images, 1, views, 5, classes=3)
    assert PerViewLabels(running, 5, views).labelled_groups(0, 8) is None
    hard = torch.arange(10) % 3
    batch = {"statistics": "batch", "micro": 8}
    distances = compute_view_nll(teacher, images, hard, 1, views, 5, classes=3, **batch)
    groups = DistanceLabels(distances, hard, 3, 5, views, **batch).labelled_groups(0, 8)
    assert all(one.equal(other) for one, other in zip(groups, labels.labelled_groups(0, 8), strict=True))
    # In a student's epoch the images of a pool have views of several labelled epochs.
    assert PoolLabels.pruned(labels, 1, hard=hard).labelled_groups(0, 8) is None


def test_keys_of_earlier_groups_differ():
    """Labels with batch statistics were made in other groups by earlier versions."""
    labels = labelled(10, build(1))
    assert "micro=8, even groups" in labels.cache_key() and labels.target_version == ""
    views = ViewRule(mix="cutmix")
    assert TeacherLabels(build(1), 10, 5, views, statistics="batch").target_version == "even groups"
    assert TeacherLabels(build(1), 10, 5, views).target_version == ""
    assert "even groups" not in TeacherLabels(build(1), 10, 5, views).cache_key()


def test_protocols_state_the_size_of_groups():
    recipe = get_protocol("cvdd-v2").recipe(100, mirror=True)
    assert (recipe.batch, recipe.batch_norm_group, recipe.steps) == (16, 8, 300 * 7)
    assert "batch_norm_group=8" in recipe.cache_key()
    assert get_protocol("cvdd-v1").recipe(100, mirror=True) == dataclasses.replace(recipe, batch_norm_group=0)
    half = get_protocol("cvdd-half-v1").recipe(100, mirror=True)
    assert half == dataclasses.replace(recipe, stretch=2.0)
    for size in (1, 5, 32, -8):
        with pytest.raises(
            CondenseError, match=rf"^protocol cvdd-v2: batch_norm_group={size}: must be 0, or at least 2"
        ):
            dataclasses.replace(get_protocol("cvdd-v2"), batch_norm_group=size)
