"""RS2: other real images in each epoch, as a control arm and as a method."""

import numpy as np
import pytest
import torch
from conftest import change_protocols, tiny_arrays

import condense
from condense import networks, rng
from condense.errors import CondenseError
from condense.judge import records
from condense.selection import alternating_permutation
from condense.training import ResampledSource, Student, TrainConfig, train

NETWORK = "convnet-d2-w8-in"


@pytest.fixture(autouse=True)
def short_protocols(monkeypatch, tmp_path_factory):
    """quick-v1 with 6 steps and two runs."""
    folder = tmp_path_factory.mktemp("short") / "protocols"
    change_protocols(monkeypatch, folder, {"quick-v1"}, steps=6, full_epochs=2, runs=2)


def epoch_rows(source, epoch):
    """The training images of an epoch, found again among all by their pixels."""
    images = source.batch(torch.arange(source.size), epoch)[0].flatten(1)
    everything = source.task.batch(torch.arange(len(source.task.train))).flatten(1)
    return torch.cdist(images.double(), everything.double()).argmin(1)


def test_classes_alternate_in_the_permutation():
    labels = np.array([0] * 8 + [1] * 8 + [2] * 4)
    order = alternating_permutation(labels, rng.Draws("alternating", 0))
    assert sorted(order.tolist()) == list(range(20))
    for part in order.split(5):  # a quarter of the data
        assert np.bincount(labels[part.numpy()], minlength=3).tolist() == [2, 2, 1]
    other = alternating_permutation(labels, rng.Draws("alternating", 1))
    assert not torch.equal(order, other)


def test_epochs_are_disjoint_until_the_data_are_used_up(tiny):
    source = ResampledSource(tiny, 9, ("rounds",), torch.device("cpu"))
    rounds = [epoch_rows(source, epoch) for epoch in range(8)]
    for passed in (rounds[:4], rounds[4:]):  # 36 images are four rounds
        assert sorted(torch.cat(passed).tolist()) == list(range(36))
    assert sorted(rounds[0].tolist()) != sorted(rounds[4].tolist())
    assert torch.equal(epoch_rows(source, 0), rounds[0])  # also after later ones
    labels = source.batch(torch.arange(9), 2)[1]
    assert torch.equal(labels, torch.from_numpy(tiny.train.labels)[rounds[2]]) and labels.bincount().tolist() == [3] * 3
    assert ResampledSource(tiny, 100, ("rounds",), torch.device("cpu")).size == 36


def test_a_size_that_does_not_divide_the_data_repeats_nothing_within_an_epoch(tiny):
    source = ResampledSource(tiny, 25, ("rounds",), torch.device("cpu"))
    for epoch in range(4):
        assert len(set(epoch_rows(source, epoch).tolist())) == 25


@pytest.mark.parametrize("together", [True, False])
def test_students_that_are_trained_together_have_their_own_subsets(tiny, together):
    def students():
        made = []
        for k in range(2):
            with rng.seeded(k, "network"):
                net = networks.build_network(NETWORK, tiny.shape, 3)
            made.append(Student(net, ResampledSource(tiny, 9, ("rounds", k), torch.device("cpu")), k))
        return made

    config = TrainConfig(steps=4, batch=9, lr=0.01, momentum=0.9, weight_decay=0.0)
    group, alone = students(), students()
    train(group, config, device=torch.device("cpu"), together=together)
    for student, other in zip(group, alone):
        train([other], config, device=torch.device("cpu"))
        for ours, theirs in zip(student.network.parameters(), other.network.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_arm_has_the_images_and_steps_of_the_set(tiny):
    made = condense.distill("dm", tiny, 2, network=NETWORK, steps=1, batch_real=6, factor=2)
    record = condense.evaluate(made, tiny, protocol="quick-v1", controls=["rs2", "full-equal"], cache=False)
    assert records.check_record(record) == []
    distilled, resampled, _ = record["results"]
    assert (resampled["arm"], resampled["labels"], resampled["steps"]) == ("rs2", "hard", distilled["steps"])
    assert "rs2" in records.format_record(record)


def test_a_set_of_rs2_is_judged_by_new_images_in_each_epoch_and_used_alone_is_a_selection(tiny, tmp_path):
    made = condense.distill("rs2", tiny, 2, network=NETWORK, protocol="quick-v1", out=tmp_path / "rs2.h5")
    loaded = condense.load(tmp_path / "rs2.h5")
    real = {image.tobytes() for image in tiny.train.images}
    assert len(loaded.stored) == 6 and all(image.numpy().tobytes() in real for image in loaded.stored)
    assert loaded.resampling == made.resampling and loaded.resampling.size(36) == 6
    # All real images, of 64 bytes and labels of two bits, are needed by whoever trains as the evaluation does.
    assert loaded.nbytes()["external"] == 36 * 64 + 9
    record = condense.evaluate(loaded, tiny, controls=["rs2", "random"])
    distilled, control, _ = (entry["accuracies"] for entry in record["results"])
    assert distilled == control  # the set has as many images as the control, which are drawn in the same way
    stored = condense.DistilledSet(
        loaded.stored, loaded.labels, loaded.transform, {**loaded.manifest, "resampling": None}
    )
    assert stored.sha256() != loaded.sha256() and stored.nbytes()["external"] == 0
    first, second = (condense.fit(chosen, NETWORK) for chosen in (loaded, stored))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert records.check_record(record) == []


def test_a_fraction_draws_more_images_than_the_file_holds(tiny):
    made = condense.distill("rs2", tiny, 2, network=NETWORK, protocol="quick-v1", fraction=0.5)
    assert len(made.stored) == 6 and made.resampling.size(len(tiny.train)) == 18
    half = made.select_classes(["0", "2"])
    assert half.resampling.counts == [12, 12] and half.nbytes()["external"] == 24 * 64 + 3
    with pytest.raises(CondenseError, match="would draw 4 images, fewer than the 6 of --ipc 2; give"):
        condense.distill("rs2", tiny, 2, network=NETWORK, fraction=0.1)


def test_the_file_begins_with_an_epoch_of_the_permutation():
    images, labels, *rest = tiny_arrays()
    task = condense.task((images, labels, *rest), name="tiny")
    made = condense.distill("rs2", task, 3, network=NETWORK, seed=4)
    order = alternating_permutation(task.train.labels, rng.Draws(4, "rs2", 0))
    expected = {images[row].tobytes() for row in order[:9].tolist()}
    assert {image.numpy().tobytes() for image in made.stored} == expected
