"""Real images of a step: at random, or representatives of clusters."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_arrays
from test_methods import SETTINGS, Killed, killed_after

import condense
from condense import rng
from condense.data import Task
from condense.engine import BATCH_DEFAULTS, BATCHES, RealBatches, RealBatchOptions, Run
from condense.errors import CondenseError
from condense.jobs import resolve_job, resolve_settings, resume
from condense.networks import evaluating
from condense.registry import METHODS
from condense.selection import nearest_to_centroids

NETWORK = "convnet-d2-w8-in"
CLASSES = [0, 1, 2]


class Embedding(torch.nn.Module):
    """Features are the pixels, and counts what it is asked to embed."""

    def __init__(self):
        super().__init__()
        self.norm, self.images, self.scale = torch.nn.BatchNorm2d(1), 0, 1.0

    def embed(self, images):
        self.images += len(images)
        return self.norm(images).flatten(1) * self.scale


def batches_of(task, count=4, **options):
    run = Run(task, 1, NETWORK, quiet=True)
    run.task = task
    return RealBatches(run, run.random_network(0), RealBatchOptions(**options), count)


def step(index, seed=0):
    return SimpleNamespace(index=index, key=lambda purpose: (seed, purpose, index))


def ids_of(images, task):
    known = {image.numpy().tobytes(): i for i, image in enumerate(task.batch(torch.arange(len(task.train))))}
    return [known[image.numpy().tobytes()] for image in images]


def test_random_batches_are_those_of_the_task(tiny):
    images, labels = batches_of(tiny).draw(step(3), None, [2, 0])
    expected = tiny.per_class(4, (0, "real", 3), [2, 0])
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])


def test_a_batch_is_the_image_nearest_to_each_centroid_of_its_class(tiny):
    net = Embedding().eval()
    images, labels = batches_of(tiny, batch="cluster").draw(step(0), net, CLASSES)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    found = ids_of(images, tiny)
    for c in CLASSES:
        ids = torch.from_numpy(tiny.class_ids(c))
        order = tiny.sample_ids(12, (0, "clustered", 0), [c])
        assert sorted(order.tolist()) == ids.tolist()
        features = net.embed(tiny.batch(order)).detach()
        chosen = order[nearest_to_centroids(features, 4, rng.key(0, "clusters", 0, c))]
        assert found[4 * c : 4 * c + 4] == chosen.tolist()


def test_two_groups_of_equal_images_give_one_image_each():
    """Eleven equal images and one other: at random the other is missed mostly, of two clusters it is always one."""
    images = torch.zeros(24, 1, 8, 8, dtype=torch.uint8)
    images[12:] = 100
    images[[5, 17]] = 255
    labels = torch.arange(2).repeat_interleave(12)
    task = condense.task((images.numpy(), labels.numpy(), images.numpy(), labels.numpy()), name="groups")
    for seed in range(5):
        drawn, _ = batches_of(task, 2, batch="cluster").draw(step(0, seed), Embedding().eval(), [0, 1])
        top = drawn.flatten(1).max(1).values
        assert (top == top.max()).tolist().count(True) == 2 and (top[:2] == top.max()).sum() == 1


def test_classes_are_clustered_every_so_many_steps_and_only_then(tiny):
    net, batches = Embedding().eval(), batches_of(tiny, batch="cluster", cluster_steps=3)
    asked, drawn = [], []
    for index in range(7):
        for classes in ([0, 1], [2]):  # two groups of a step are one clustering
            drawn.append(ids_of(batches.draw(step(index), net, classes)[0], tiny))
        asked.append(net.images)
    assert asked == [36, 36, 36, 72, 72, 72, 108]
    assert drawn[0] == drawn[2] == drawn[4] and len(drawn[0]) == 8


def test_a_pool_bounds_what_is_clustered(tiny):
    net = Embedding().eval()
    batches_of(tiny, batch="cluster", cluster_pool=6).draw(step(0), net, CLASSES)
    assert net.images == 18
    images, _ = batches_of(tiny, 100, batch="cluster").draw(step(0), net, CLASSES)
    assert sorted(ids_of(images, tiny)) == list(range(36))  # all of a class that is smaller than the batch


def test_clustering_leaves_no_trace_in_the_network(tiny):
    net = Embedding().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches_of(tiny, batch="cluster").draw(step(0), net, CLASSES)
    assert net.training and net.norm.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.norm.eval()
    with evaluating(net):
        assert not net.training
    assert net.training and not net.norm.training  # as update_statistics leaves it


def test_invalid_settings_are_named():
    for wrong in ({"batch": "kmeans"}, {"cluster_steps": 0}, {"cluster_pool": 0}):
        with pytest.raises(CondenseError, match=next(iter(wrong))):
            RealBatchOptions(**wrong)


def test_the_defaults_that_keys_leave_out_are_the_defaults():
    options = RealBatchOptions()
    assert {name: getattr(options, name) for name in BATCH_DEFAULTS} == BATCH_DEFAULTS


HOSTS = [name for name in METHODS.names() if issubclass(METHODS.get(name).config, RealBatchOptions)]


def test_methods_that_draw_real_batches_are_hosts():
    assert set(HOSTS) >= {"dc", "dsa", "dcc", "dsac", "idc", "dm", "idm", "dance", "datadam"}


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_takes_its_images_from_the_clusters(name, tiny, monkeypatch):
    """A run with clusters asks for no random batch of real images, and ends with other images."""
    drawn, per_class = [], Task.per_class

    def noted(self, n, parts, *rest):
        drawn.append(parts[1])
        return per_class(self, n, parts, *rest)

    monkeypatch.setattr(Task, "per_class", noted)
    made = {}
    for batch in BATCHES:
        drawn.clear()
        settings = {**SETTINGS[name], "batch_real": 4, "batch": batch, "cluster_steps": 2}
        made[batch] = condense.distill(name, tiny, 2, precision="fp32", **settings).stored
        assert ("real" in drawn) == (batch == "random")
    assert not torch.equal(made["random"], made["cluster"])


def test_a_run_killed_between_two_clusterings_resumes_with_the_same_bits(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    settings = {"steps": 4, "outer": 4, "inner": 1, "batch_real": 4, "batch": "cluster", "cluster_steps": 3}
    settings |= {"ipc": 2, "network": NETWORK, "precision": "fp32", "track": "none"}
    data = tmp_path / "data.npz"
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(data, **dict(zip(keys, tiny_arrays())))
    whole = condense.distill("dsa", condense.task(str(data)), **settings)
    for stop in (2, 3):
        directory = tmp_path / f"run{stop}"
        with pytest.raises(Killed), killed_after(stop):
            out = tmp_path / f"{stop}.h5"
            condense.distill("dsa", condense.task(str(data)), run_dir=directory, out=out, **settings)
        assert resume(directory).sha256() == whole.sha256()


def test_the_key_of_a_run_changes_with_the_batch_and_not_with_its_default(tiny):
    def key(**settings):
        entry = METHODS.get("dsa")
        config = resolve_settings(entry, settings, 1)
        fields = {"minutes": None, "tag": None, "track": "none", "protocol": entry.protocol}
        return resolve_job(entry, config, tiny, 1, NETWORK, 0, "cpu", "fp32", out="a.h5", **fields)

    job = key()
    earlier = {name: value for name, value in job.settings.items() if name not in BATCH_DEFAULTS}
    assert dataclasses.replace(job, settings=earlier).key() == job.key() != key(batch="cluster").key()
