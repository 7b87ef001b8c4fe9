"""Training many students: the same maths whether stacked or one after the other, and exactly the stated recipe."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from condense import networks, rng
from condense.augment import make_augmentation
from condense.labels import HardLabels, SoftLabels
from condense.training import (
    FixedSource,
    Student,
    TaskSource,
    TrainConfig,
    accuracy,
    batch_ids,
    checkpoint,
    config,
    train,
)

CPU = torch.device("cpu")
NET = "convnet-d2-w8-in"


def students(network, count, shape=(1, 8, 8), size=10, labels=None):
    made = []
    for k in range(count):
        with rng.seeded("student", k):
            net = networks.build_network(network, shape, 3)
        images = torch.randn(size, *shape, generator=rng.generator("images", k))
        source = FixedSource(images, labels or HardLabels(torch.arange(size) % 3, 3))
        made.append(Student(net, source, rng.key("seed", k)))
    return made


def recipe(**changes):
    base = {
        "steps": 6,
        "batch": 4,
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "augment": make_augmentation("color_crop_cutout"),
    }
    return TrainConfig(**{**base, **changes})


@pytest.mark.parametrize("network", ["convnet-d2-w8-in", "convnet-d2-w8-bn", "mlp"])
def test_stacked_equals_one_after_the_other(network):
    together, apart = students(network, 3), students(network, 3)
    train(together, recipe(), device=CPU, together=True)
    train(apart, recipe(), device=CPU, together=False)
    for one, other in zip(together, apart):
        for (name, a), b in zip(one.network.state_dict().items(), other.network.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_a_student_does_not_depend_on_its_neighbours():
    alone, among = students("convnet-d2-w8-in", 1), students("convnet-d2-w8-in", 3)
    train(alone, recipe(), device=CPU)
    train(among, recipe(), device=CPU)
    for a, b in zip(alone[0].network.parameters(), among[0].network.parameters()):
        assert torch.equal(a, b)


def test_equals_plain_sgd_with_the_drop():
    """Against torch written out: full batches, no augmentation, lr / 10 from the middle step on, momentum kept."""
    (student,) = students("mlp", 1)
    (other,) = students("mlp", 1)
    train([student], recipe(batch=10, augment=None), device=CPU)
    optimizer = torch.optim.SGD(other.network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(6):
        if step == 3:
            optimizer.param_groups[0]["lr"] = 0.005
        optimizer.zero_grad()
        logits = other.network(other.source.images)
        torch.nn.functional.cross_entropy(logits, torch.arange(10) % 3).backward()
        optimizer.step()
    for a, b in zip(student.network.parameters(), other.network.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_batches_cover_each_pass_once():
    seen = torch.cat([batch_ids(7, 10, 4, step) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(10))
    assert [len(batch_ids(7, 10, 4, step)) for step in range(3)] == [4, 4, 2]
    following = torch.cat([batch_ids(7, 10, 4, step) for step in range(3, 6)])
    assert sorted(following.tolist()) == list(range(10)) and following.tolist() != seen.tolist()
    assert sorted(batch_ids(7, 3, 256, 5).tolist()) == [0, 1, 2]


def test_soft_labels_are_learned():
    logits = torch.randn(10, 3, generator=rng.generator("soft"))
    (student,) = students("mlp", 1, labels=SoftLabels(logits))
    train([student], recipe(steps=300, batch=10, augment=None, weight_decay=0.0), device=CPU)
    got = student.network(student.source.images).softmax(1)
    assert (got - logits.softmax(1)).abs().max() < 0.05


def test_progress_counts_every_student():
    reports = []
    train(students("mlp", 2), recipe(), device=CPU, together=False, report=reports.append)
    assert reports == list(range(1, 13))


def test_learns_the_real_task(tiny):
    with rng.seeded("net"):
        net = networks.build_network("convnet-d2-w8-in", tiny.shape, tiny.num_classes)
    student = Student(net, TaskSource(tiny, CPU), 0)
    train([student], recipe(steps=60, batch=12, augment=None), device=CPU)
    assert accuracy(net, tiny, device=CPU) > 0.9


# -- checkpoints ------------------------------------------------------------------------------------------------------


def dropping(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, classes))


class Kill(Exception):
    pass


def killing(at):
    def report(done):
        if done == at:
            raise Kill

    return report


def weights(trained):
    return [{name: value.clone() for name, value in s.network.state_dict().items()} for s in trained]


def equal(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other) for name in a)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")


@pytest.mark.parametrize(
    "network, count, together, kills",
    [
        ("convnet-d2-w8-bn", 1, False, (1, 4)),
        (dropping, 1, False, (3,)),
        ("convnet-d2-w8-bn", 3, False, (2, 6, 9, 18)),
        (dropping, 2, True, (8, 11)),
        ("convnet-d2-w8-bn", 3, True, (3, 12)),
    ],
)
def test_a_killed_training_goes_on_bit_for_bit(network, count, together, kills, tmp_path, always):
    whole = students(network, count)
    train(whole, recipe(), device=CPU, together=together)
    file = tmp_path / "training.pt"
    seen = [0]
    for at in kills:
        reports = []

        def report(done, at=at, reports=reports):
            reports.append(done)
            killing(at)(done)

        with pytest.raises(Kill):
            train(students(network, count), recipe(), device=CPU, together=together, report=report, checkpoint=file)
        assert reports[0] > seen[-1]  # nothing was done twice
        seen = reports
        assert list(tmp_path.iterdir())
    after = students(network, count)
    train(after, recipe(), device=CPU, together=together, checkpoint=file)
    assert equal(weights(after), weights(whole))
    assert not list(tmp_path.iterdir())


def stopped(file, **changes):
    """What a training killed after two of six steps leaves."""
    with pytest.raises(Kill):
        train(students("mlp", 1), recipe(**changes), device=CPU, report=killing(2), checkpoint=file)
    assert file.exists()
    return file


def first_step(file, made=None, **changes):
    reports = []
    made = made or students("mlp", 1)
    train(made, recipe(**changes), device=CPU, report=reports.append, checkpoint=file)
    assert not file.exists()
    return reports[0], weights(made)


def test_files_of_other_trainings_are_ignored(tmp_path, always):
    file = tmp_path / "training.pt"
    assert first_step(stopped(file))[0] == 3
    assert first_step(stopped(file), lr=0.1)[0] == 1
    others = students("mlp", 1)
    others[0].source.images[:] += 1  # other data
    assert first_step(stopped(file), others)[0] == 1
    others = students("mlp", 1)
    others[0].seed += 1
    assert first_step(stopped(file), others)[0] == 1
    others = students("mlp", 2)[1:]  # other initial weights
    assert first_step(stopped(file), others)[0] == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "pickle", "foreign"])
def test_damaged_and_foreign_files_are_ignored(damage, tmp_path, always):
    whole = students("mlp", 1)
    train(whole, recipe(), device=CPU)
    file = stopped(tmp_path / "training.pt")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "text":
        file.write_text("hello")
    elif damage == "pickle":
        torch.save(config.TrainConfig, file)
    else:
        torch.save({"weights": torch.zeros(3)}, file)
    done, after = first_step(file)
    assert done == 1 and equal(after, weights(whole))


def test_checkpoints_keep_their_distance(tmp_path):
    file = tmp_path / "training.pt"
    with pytest.raises(Kill):
        train(students("mlp", 1), recipe(), device=CPU, report=killing(5), checkpoint=file)
    assert not file.exists()


def test_a_place_that_cannot_be_written_costs_no_training(tmp_path, always, caplog):
    (tmp_path / "file").write_text("")
    train(students("mlp", 1), recipe(), device=CPU, checkpoint=tmp_path / "file" / "training.pt")
    assert "without a checkpoint" in caplog.text


# -- CutMix and looking on --------------------------------------------------------------------------------------------


def test_cutmix_replaces_one_box_and_weighs_by_its_area():
    from condense.augment import cutmix

    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 10, 8).contiguous()
    seen = set()
    for number in range(40):
        mixed, partners, share = cutmix(images, rng.Draws("cutmix", number))
        assert sorted(partners.tolist()) == list(range(6))
        foreign = mixed[:, 0] == partners.view(6, 1, 1)
        moved = partners != torch.arange(6)
        assert torch.equal(mixed[~moved], images[~moved])
        assert bool((foreign | (mixed[:, 0] == images[:, 0])).all())
        for box in foreign[moved]:
            assert float(box.float().mean()) == pytest.approx(1 - share)
            rows, columns = box.any(1).sum(), box.any(0).sum()
            assert int(box.sum()) == int(rows * columns)  # one rectangle, the same in every image
            assert torch.equal(box, foreign[moved][0])
        seen.add(round(share, 1))
    assert len(seen) > 5


@pytest.mark.parametrize("together", [False, True])
def test_mixed_targets_are_weighed(together):
    """A step with CutMix against its loss written out."""
    from condense.augment import cutmix

    pupils = students(NET, 1 + together)
    plan = TrainConfig(steps=1, batch=64, lr=0.1, momentum=0.0, weight_decay=0.0, lr_milestones=(), cutmix=1.0)
    expected = []
    for student in pupils:
        net, source = copy.deepcopy(student.network), student.source
        ids = batch_ids(student.seed, source.size, 64, 0)
        images, targets = source.batch(ids, 0)
        draws = rng.Draws(student.seed, "cutmix", 0)
        draws.uniform(1)  # the coin
        mixed, partners, share = cutmix(images, draws)
        logits = net(mixed)
        loss = share * F.cross_entropy(logits, targets) + (1 - share) * F.cross_entropy(logits, targets[partners])
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        expected.append([p.detach() - 0.1 * g for p, g in zip(net.parameters(), gradients)])
    train(pupils, plan, device=torch.device("cpu"), together=together)
    for student, wanted in zip(pupils, expected):
        for parameter, value in zip(student.network.parameters(), wanted):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_a_watcher_sees_the_weights_on_the_way(together):
    plan = TrainConfig(steps=5, batch=8, lr=0.1, momentum=0.9, weight_decay=0.0, lr_milestones=())
    seen = {}

    def watch(k, step, state):
        seen[k, step] = {name: value.clone() for name, value in state.items()}

    train(students(NET, 2), plan, device=torch.device("cpu"), together=together, watch=watch, watch_every=2)
    assert sorted(seen) == [(0, 2), (0, 4), (1, 2), (1, 4)]
    shorter = students(NET, 2)
    train(shorter, dataclasses.replace(plan, steps=4), device=torch.device("cpu"), together=together)
    for k, student in enumerate(shorter):
        for name, value in student.network.state_dict().items():
            torch.testing.assert_close(seen[k, 4][name], value)


@pytest.mark.parametrize("together", [False, True])
def test_a_watcher_sees_a_step_before_its_checkpoint(together, tmp_path, always, monkeypatch):
    """So that what a resumption passes over was seen by the training that was killed."""
    events = []
    original = checkpoint.TrainingCheckpoint.after

    def after(keeper, step, state):
        events.append(("kept", step))
        original(keeper, step, state)

    monkeypatch.setattr(checkpoint.TrainingCheckpoint, "after", after)
    watch = lambda k, step, state: events.append(("seen", step))  # noqa: E731
    options = {"device": CPU, "together": together, "checkpoint": tmp_path / "t.pt", "watch": watch}
    train(students("mlp", 2)[: 1 + together], recipe(steps=3), **options)
    seen = [("seen", step) for step in (1, 2, 3)]
    assert [event for event in dict.fromkeys(events) if event[0] == "seen"] == seen
    for step in (1, 2, 3):
        assert events.index(("seen", step)) < events.index(("kept", step))


# -- updates ----------------------------------------------------------------------------------------------------------


def plain(work):
    return torch.autograd.grad(work.loss(), work.weights)


def doubled(work):
    return [2 * gradient for gradient in plain(work)]


def sharpness_aware(work):
    """The gradient a tenth of its own length further on: weights move, and come back."""
    first, before = plain(work), [weight.detach().clone() for weight in work.weights]
    squares = [g.square().flatten(1 if work.stacked else 0).sum(-1) for g in first]
    length = torch.stack(squares).sum(0).sqrt()
    with torch.no_grad():
        for weight, gradient in zip(work.weights, first):
            scale = length.view(-1, *[1] * (weight.dim() - 1)) if work.stacked else length
            weight.add_(0.1 * gradient / scale)
    second = plain(work)
    with torch.no_grad():
        for weight, value in zip(work.weights, before):
            weight.copy_(value)
    return second


def trained(update, together, network=NET, precision="fp32", count=2, **changes):
    pupils = students(network, count)
    train(pupils, recipe(**changes), device=CPU, together=together, update=update, precision=precision)
    return weights(pupils)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_of_plain_gradients_changes_no_bit(together, precision):
    for changes in ({}, {"cutmix": 0.5}):
        assert equal(
            trained(plain, together, precision=precision, **changes),
            trained(None, together, precision=precision, **changes),
        )


@pytest.mark.parametrize("together", [False, True])
def test_the_optimiser_steps_along_what_an_update_gives(together):
    """Twice the gradients are twice the learning rate, bit for bit."""
    twice = trained(doubled, together, weight_decay=0.0)
    assert not equal(twice, trained(None, together, weight_decay=0.0))
    assert equal(twice, trained(None, together, weight_decay=0.0, lr=0.1))


@pytest.mark.parametrize("network", [NET, "convnet-d2-w8-bn"])
def test_an_update_may_move_the_weights_and_is_the_same_stacked(network):
    together, apart = (trained(sharpness_aware, together, network, count=3) for together in (True, False))
    for one, other in zip(together, apart):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4, msg=name)
    assert not equal(apart, trained(None, False, network, count=3))


@pytest.mark.parametrize("together", [False, True])
def test_what_an_update_sees(together):
    seen = []

    def look(work):
        logits = work.forward(work.clean)
        assert logits.dtype == torch.float32 and logits.shape == (*work.clean.shape[:-3], 3)
        seen.append((work.step, work.epoch, tuple(work.clean.shape), work.stacked, float(work.loss().detach())))
        return plain(work)

    pupils = students(NET, 1 + together)
    clean = torch.stack([p.source.images[batch_ids(p.seed, 10, 4, 0)] for p in pupils])
    losses = [
        F.cross_entropy(p.network(images), p.source.labels.targets(batch_ids(p.seed, 10, 4, 0)))
        for p, images in zip(pupils, clean)
    ]
    train(pupils, recipe(augment=None, steps=4), device=CPU, together=together, update=look)
    head = (2,) if together else ()
    assert [entry[:4] for entry in seen] == [
        (step, step // 3, (*head, size, 1, 8, 8), together) for step, size in enumerate((4, 4, 2, 4))
    ]
    assert seen[0][4] == pytest.approx(float(sum(losses).detach()), rel=1e-5)

    def shown(work):
        originals = torch.cat([p.source.images for p in pupils])
        for image in work.clean.flatten(0, -4):
            assert bool((image == originals).flatten(1).all(1).any())
        return plain(work)

    train(pupils, recipe(steps=2, cutmix=1.0), device=CPU, together=together, update=shown)


def test_a_slope_in_the_pixels_may_join_the_loss():
    """What AST's penalty needs: a double backward through ``forward``, the same stacked."""

    def penalised(work):
        clean = work.clean.clone().requires_grad_()
        (slope,) = torch.autograd.grad(work.forward(clean).sum(), clean, create_graph=True)
        mean = slope.square().flatten(1).mean(1).sum() if work.stacked else slope.square().mean()
        return torch.autograd.grad(work.loss() + mean, work.weights)

    together, apart = trained(penalised, True), trained(penalised, False)
    for one, other in zip(together, apart):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_checkpoint_of_another_update_is_ignored(tmp_path, always):
    file = tmp_path / "training.pt"
    for update, first in ((plain, 3), (doubled, 1)):
        with pytest.raises(Kill):
            train(students("mlp", 1), recipe(), device=CPU, report=killing(2), checkpoint=file, update=plain)
        reports = []
        train(students("mlp", 1), recipe(), device=CPU, report=reports.append, checkpoint=file, update=update)
        assert reports[0] == first
