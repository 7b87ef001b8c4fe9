"""Expert trajectories: what is trained, kept, verified, shared and served, and where it lies."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import tiny_arrays
from pretraining_seams import StoppedRun, forbid_training, train_in_groups

import condense
from condense import api, hdf5, networks, registry, rng
from condense import device as device_module
from condense.augment import make_augmentation
from condense.data import cache_dir
from condense.engine import Interrupted, Run
from condense.errors import CondenseError
from condense.networks import ComputeConfig, Layout, layout_of
from condense.pretraining import (
    TRAJECTORY_FORMAT,
    ExpertTraining,
    choose_placement,
    expert_cache_file,
    expert_cache_key_fields,
    find_experts,
    load_expert_ensemble,
    load_or_train_experts,
    make_student,
    plan_training,
    read_trajectory_file,
    store,
    train_trajectory_file,
    trajectories,
)
from condense.training import TrainConfig, loop

NETWORK = "convnet-d2-w8-in"
CPU = torch.device("cpu")
RECIPE = TrainConfig(
    steps=0,
    batch=8,
    lr=0.05,
    momentum=0.0,
    weight_decay=0.0,
    lr_milestones=(),
    augment=make_augmentation("color_crop_cutout_scale_rotate"),
)
TRAINING = ExpertTraining(RECIPE)
MTT = "steps=2 syn_steps=2 max_start_epoch=2 expert_epochs=1 expert_batch=8"


def a_run(task, network=NETWORK, **options):
    return Run(task, 1, network, quiet=True, track="none", **options)


def stopped_run(task, **options):
    return StoppedRun(task, 1, NETWORK, quiet=True, track="none", **options)


def made(task, path, count=2, epochs=3, training=TRAINING, run=None, **options):
    return train_trajectory_file(run or a_run(task), training, path, count=count, epochs=epochs, **options)


def provided(task, run=None, training=TRAINING, count=2, epochs=3, **options):
    return load_or_train_experts(
        run or a_run(task), training, count=count, epochs=epochs, **{"last": epochs, **options}
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage(path, k, t, name="parameters"):
    with h5py.File(path, "r+") as file:
        flipped = file[name][k, t].copy()
        flipped[3] = flipped[3] + 1
        file[name][k, t] = flipped


# -- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [NETWORK, "mlp", "resnet18-bn"])
def test_a_layout_is_the_parameters_in_module_order(network):
    with rng.seeded("layout test"):
        net = networks.build_network(network, (3, 8, 8), 4)
    layout = Layout.of(net)
    flat = layout.flatten(net)
    assert flat.shape == (layout.size,) and layout.size == sum(p.numel() for p in net.parameters())
    assert torch.equal(flat, torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(layout.flatten(net.state_dict()), flat)
    for name, value in layout.unflatten(flat).items():
        assert torch.equal(value, net.get_parameter(name))
    assert Layout.read(json.loads(json.dumps(layout.describe()))) == layout
    assert layout != Layout.of(networks.build_network("lenet", (3, 8, 8), 4))


def test_flattening_copies_and_unflattening_does_not(tiny):
    net = torch.nn.Linear(3, 1, bias=False)  # a single parameter
    layout = Layout.of(net)
    flat = layout.flatten(net)
    before = flat.clone()
    with torch.no_grad():
        net.weight += 1
    assert torch.equal(flat, before)
    theta = flat.requires_grad_()
    (layout.unflatten(theta)["weight"] ** 2).sum().backward()
    torch.testing.assert_close(theta.grad, 2 * before)
    stacked = torch.stack([before, before + 1])
    assert layout.unflatten(stacked)["weight"].shape == (2, 1, 3)


# -- training and the file --------------------------------------------------------------------------------------------


def test_snapshots_are_the_start_and_each_epoch(tiny, tmp_path):
    file = made(tiny, tmp_path / "a.h5", count=2, epochs=3).file
    assert (file.count, file.epochs, file.values.dtype) == (2, 4 - 1, np.float16)
    assert file.manifest["steps_per_epoch"] == 5  # 36 images in batches of 8
    for k in range(2):
        student = make_student(a_run(tiny), tiny, NETWORK, "expert", k)
        start = file.layout.flatten(student.network)
        torch.testing.assert_close(torch.tensor(file.values[k, 0]).float(), start, rtol=2**-11, atol=1e-7)
        plan = dataclasses.replace(RECIPE, steps=10)
        loop.train([student], plan, device=CPU)
        after = file.layout.flatten(student.network).half()
        assert torch.equal(torch.tensor(file.values[k, 2]), after)
        assert len({file.values[k, t].tobytes() for t in range(4)}) == 4  # nothing is an alias of the last
    assert not np.array_equal(file.values[0, 0], file.values[1, 0])


def test_float16_rounds_little_and_float32_nothing(tiny, tmp_path):
    half, whole = (made(tiny, tmp_path / f"{dtype}.h5", dtype=dtype).file for dtype in ("float16", "float32"))
    assert whole.values.dtype == np.float32 and whole.path.stat().st_size > 1.8 * half.values.nbytes
    error = np.linalg.norm(half.values[:, 3].astype(np.float64) - whole.values[:, 3], axis=1)
    displacement = np.linalg.norm(whole.values[:, 3].astype(np.float64) - whole.values[:, 1], axis=1)
    assert (error < 0.01 * displacement).all()
    assert np.allclose(half.values, whole.values, rtol=2**-11, atol=2**-24)


def test_an_update_and_its_precision_are_used(tiny, tmp_path):
    plain = made(tiny, tmp_path / "a.h5").file
    other = made(tiny, tmp_path / "b.h5", training=ExpertTraining(RECIPE, Half(0.5), "bf16")).file
    assert np.array_equal(plain.values[:, 0], other.values[:, 0])
    assert not np.array_equal(plain.values[:, 1], other.values[:, 1])
    assert (other.manifest["update"], other.manifest["precision"]) == ("Half(factor=0.5)", "bf16")


@dataclasses.dataclass(frozen=True)
class Half:
    """An update that shortens gradients."""

    factor: float

    def __call__(self, work):
        return [self.factor * gradient for gradient in torch.autograd.grad(work.loss(), work.weights)]


def test_adding_experts_gives_what_training_all_at_once_gives(tiny, tmp_path, monkeypatch):
    whole = made(tiny, tmp_path / "whole.h5", count=3).file
    made(tiny, tmp_path / "a.h5", count=1)
    trained = made(tiny, tmp_path / "a.h5", count=3)
    assert trained.trained == [1, 2] and np.array_equal(trained.file.values, whole.values)
    assert trained.file.content_key(3, 3) == whole.content_key(3, 3) == whole.manifest["content"]
    assert [entry["number"] for entry in trained.file.manifest["experts"]] == [0, 1, 2]
    assert os.listdir(tmp_path).count("a.h5.parts") == 0
    forbid_training(monkeypatch)
    before = (tmp_path / "a.h5").read_bytes()
    assert made(tiny, tmp_path / "a.h5", count=2).trained == []  # more than enough are there
    assert (tmp_path / "a.h5").read_bytes() == before


def test_an_interrupted_training_is_continued_bit_for_bit(tiny, tmp_path):
    whole = made(tiny, tmp_path / "whole.h5", count=3).file
    parts = tmp_path / "a.h5.parts"
    with pytest.raises(Interrupted):  # in the training of the second expert
        made(tiny, tmp_path / "a.h5", count=3, run=stopped_run(tiny, condition=(parts / "0000.h5").exists))
    assert os.listdir(parts) == ["0000.h5"] and not (tmp_path / "a.h5").exists()
    cut(shutil.copy(parts / "0000.h5", parts / "0002.h5"))  # is trained again
    again = made(tiny, tmp_path / "a.h5", count=3)
    assert again.trained == [1, 2] and np.array_equal(again.file.values, whole.values)
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "whole.h5"]


def test_experts_that_are_trained_together_are_those_trained_alone(tiny, tmp_path, monkeypatch):
    alone = made(tiny, tmp_path / "alone.h5", count=3, dtype="float32").file
    groups = train_in_groups(monkeypatch)
    monkeypatch.setattr(trajectories, "MAX_EXPERT_GROUP", 2)  # two together, then one
    together = made(tiny, tmp_path / "together.h5", count=3, dtype="float32").file
    assert groups == [2, 1]
    assert np.allclose(together.values, alone.values, rtol=1e-3, atol=1e-4)
    assert len({together.values[k, 3].tobytes() for k in range(3)}) == 3


def test_held_out_images_are_not_seen_and_judge(tiny, tmp_path):
    file = made(tiny, tmp_path / "a.h5", epochs=30, training=ExpertTraining(RECIPE, held_out=0.25)).file
    assert file.manifest["held_out"] == 0.25
    assert file.manifest["steps_per_epoch"] == 4  # 27 images
    assert all(entry["accuracy"] > 0.6 for entry in file.manifest["experts"])
    assert not np.array_equal(file.values[0, 1], made(tiny, tmp_path / "b.h5", epochs=1).file.values[0, 1])


class Explosion:
    """An update that multiplies gradients by a large factor after some calls, for one of the stacked networks."""

    def __init__(self, after=0, network=None):
        self.after, self.network, self.is_active, self.calls = after, network, True, 0

    def __repr__(self):
        return "Explosion()"

    def __call__(self, work):
        gradients = torch.autograd.grad(work.loss(), work.weights)
        self.calls += 1
        if self.is_active and self.calls > self.after:
            for gradient in gradients:
                (gradient if self.network is None else gradient[self.network]).mul_(1e30)
        return gradients


def test_a_diverging_expert_is_refused_and_finished_ones_stay(tiny, tmp_path):
    fast = ExpertTraining(dataclasses.replace(RECIPE, lr=1e20))
    with pytest.raises(
        CondenseError, match=r"diverged: expert 0 in epoch 1 .*float16.*learning rate, now 1e\+20"
    ) as fault:
        made(tiny, tmp_path / "a.h5", training=fast)
    assert "\n" not in str(fault.value) and not (tmp_path / "a.h5").exists()

    parts, training = tmp_path / "b.h5.parts", ExpertTraining(RECIPE, Explosion(after=15))  # 3 epochs of 5 steps
    with pytest.raises(CondenseError, match="expert 1 in epoch 1"):
        made(tiny, tmp_path / "b.h5", training=training)
    assert os.listdir(parts) == ["0000.h5"]


def test_one_of_a_group_that_diverges_costs_the_others_nothing(tiny, tmp_path, monkeypatch):
    train_in_groups(monkeypatch)
    explosion = Explosion(network=1)
    training = ExpertTraining(RECIPE, explosion)
    with pytest.raises(CondenseError, match="diverged: expert 1 in epoch 1 "):
        made(tiny, tmp_path / "a.h5", count=3, training=training)
    assert sorted(os.listdir(tmp_path / "a.h5.parts")) == ["0000.h5", "0002.h5"]
    explosion.is_active = False
    assert made(tiny, tmp_path / "a.h5", count=3, training=training).trained == [1]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tiny, tmp_path):
    """A sound file, in a folder of its own."""
    folder = tmp_path / "good"
    folder.mkdir()
    return made(tiny, folder / "a.h5").file.path


def refusal(action):
    with pytest.raises(CondenseError) as fault:
        action()
    assert "\n" not in str(fault.value)
    return str(fault.value)


def test_a_place_with_other_experts_is_refused_before_any_work(tiny, good, monkeypatch):
    other = condense.task(tiny_arrays(seed=1), name="tiny")
    zca = condense.task(tiny_arrays(), zca=True)
    before = good.read_bytes()
    with monkeypatch.context() as patch:
        forbid_training(patch)
        for expected, action in {
            "another data": lambda: made(other, good),
            "another normalisation;": lambda: made(zca, good),
            f"another network \\({NETWORK}, not convnet-d2-w16-in\\);": lambda: made(
                tiny, good, run=a_run(tiny, "convnet-d2-w16-in")
            ),
            "another recipe;": lambda: made(tiny, good, training=ExpertTraining(dataclasses.replace(RECIPE, lr=0.1))),
            "update": lambda: made(tiny, good, training=ExpertTraining(RECIPE, Half(0.5))),
            r"number of epochs \(3, not 4\)": lambda: made(tiny, good, epochs=4),
            r"dtype \(float16, not float32\)": lambda: made(tiny, good, dtype="float32"),
            r"seed \(0, not 1\)": lambda: made(tiny, good, run=a_run(tiny, seed=1)),
            "--dtype bfloat16: unknown": lambda: made(tiny, good, dtype="bfloat16"),
        }.items():
            assert re.search(expected, refusal(action)), expected
            assert good.read_bytes() == before and os.listdir(good.parent) == ["a.h5"]
    assert made(other, good, force=True).trained == [0, 1]
    assert read_trajectory_file(good).manifest["fingerprint"] == other.fingerprint


def test_what_a_killed_training_of_others_left_is_refused_too(tiny, tmp_path):
    shutil.copytree(made(tiny, tmp_path / "x" / "0000.h5", count=1).file.path.parent, tmp_path / "a.h5.parts")
    other = ExpertTraining(dataclasses.replace(RECIPE, lr=0.1))
    assert "a.h5.parts/0000.h5: holds experts of another recipe" in refusal(
        lambda: made(tiny, tmp_path / "a.h5", training=other)
    )
    assert made(tiny, tmp_path / "a.h5").trained == [1]
    assert made(tiny, tmp_path / "b.h5", training=other, count=1, force=True).trained == [0]


@pytest.mark.parametrize(
    "fault", ["cut", "bit", "digest", "manifest", "text", "missing", "foreign", "newer", "chunked"]
)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(fault, tiny, good, monkeypatch):
    words = {
        "cut": "truncated or damaged; copy or make it again",
        "bit": "expert 1 after epoch 2 is damaged",
        "digest": "the array 'digests' is damaged",
        "manifest": "the manifest is damaged",
        "text": "not an HDF5 file",
        "missing": "no such file; did you mean 'b.h5'",
        "foreign": "an HDF5 file of another format",
        "newer": "written by a newer version",
        "chunked": "not an array stored in one piece",
    }
    if fault == "cut":
        cut(good)
    elif fault == "bit":
        damage(good, 1, 2)
    elif fault == "digest":
        damage(good, 1, 2, "digests")
    elif fault == "text":
        good.write_text("hello")
    elif fault == "missing":
        good.rename(good.with_name("b.h5"))
    elif fault == "foreign":
        made_set = condense.distill("random", tiny, 1, network=NETWORK)
        made_set.save(good, force=True)
    else:
        with h5py.File(good, "r+") as file:
            if fault == "manifest":
                file.attrs["manifest"] = np.bytes_(bytes(file.attrs["manifest"]).replace(b"tiny", b"tinY"))
            elif fault == "newer":
                file.attrs["version"] = 99
            else:
                values = file["parameters"][()]
                del file["parameters"]
                file.create_dataset("parameters", data=values, chunks=True)
    if fault in ("digest", "manifest", "newer", "chunked"):
        hdf5.write_user_block(good, TRAJECTORY_FORMAT)
    forbid_training(monkeypatch)
    line = refusal(lambda: provided(tiny, file=str(good), count=2, last=3))
    assert line.startswith(f"{good}: ") and words[fault] in line
    if fault not in ("missing",):
        assert "--force" in refusal(lambda: made(tiny, good, count=3))


def test_damage_where_nothing_is_read_does_not_matter(tiny, good):
    damage(good, 1, 0)
    assert provided(tiny, file=str(good), first=1, last=2).count == 2
    assert provided(tiny, file=str(good), count=1, first=0, last=2).count == 1
    with pytest.raises(CondenseError, match="expert 1 after epoch 0 is damaged"):
        provided(tiny, file=str(good), first=1, last=2).params_at(1, 0)


def test_a_file_that_is_damaged_where_no_expert_lies_is_written_again(tiny, good):
    whole = read_trajectory_file(good).values.copy()
    content = bytearray(good.read_bytes())
    content[70] ^= 1  # of the digest
    good.write_bytes(content)
    assert "truncated or damaged" in refusal(lambda: read_trajectory_file(good))
    again = made(tiny, good, count=2, force=True)
    assert again.trained == [] and np.array_equal(again.file.values, whole)


def test_sound_experts_of_a_damaged_file_are_kept_where_it_is_replaced(tiny, good):
    whole = read_trajectory_file(good).values.copy()
    damage(good, 1, 2)
    assert "expert 1 of convnet-d2-w8-in is damaged" in refusal(lambda: made(tiny, good, count=2))
    again = made(tiny, good, count=2, force=True)
    assert again.trained == [1] and np.array_equal(again.file.values, whole)


def test_a_file_that_does_not_suit_a_run_is_refused_before_any_work(tiny, tiny_colour, good, monkeypatch):
    forbid_training(monkeypatch)
    begun = []
    arrays = tiny_arrays()
    fewer = condense.task((arrays[0][:24], arrays[1][:24], arrays[2][:12], arrays[3][:12]), name="tiny")
    for expected, task, network, last in (
        (f"another network ({NETWORK}, not convnet-d2-w16-in); give --network {NETWORK}", tiny, "convnet-d2-w16-in", 3),
        ("another network", tiny, "mlp", 3),
        ("another image size (1x8x8, not 3x8x8)", tiny_colour, NETWORK, 3),
        ("another classes (3 of 0, 1, 2, not 2 of 0, 1)", fewer, NETWORK, 3),
        ("other data (tiny with other images", condense.task(tiny_arrays(seed=1), name="tiny"), NETWORK, 3),
        ("other data (tiny, not other)", condense.task(tiny_arrays(seed=1), name="other"), NETWORK, 3),
        ("another normalisation", condense.task(tiny_arrays(), name="tiny", zca=True), NETWORK, 3),
        ("have 3 epochs, but 5 are asked for; make longer ones with --epochs 5", tiny, NETWORK, 5),
    ):
        run = a_run(task, network, begin=lambda: begun.append(1))
        line = refusal(functools.partial(provided, task, run, file=str(good), last=last))
        assert line.startswith(f"{good}: ") and expected in line
    assert not begun


# -- what a method sees -----------------------------------------------------------------------------------------------


def test_experts_serve_new_float32_vectors(tiny, good):
    file = read_trajectory_file(good)
    experts = provided(tiny, file=str(good))
    assert (experts.count, experts.epochs, experts.layout) == (2, 3, layout_of(NETWORK, tiny))
    for k in range(2):
        for t in range(4):
            found = experts.params_at(k, t)
            assert found.dtype == torch.float32 and torch.equal(found, torch.tensor(file.values[k, t]).float())
    experts.params_at(0, 0).zero_()
    assert experts.params_at(0, 0).any()
    assert torch.equal(experts.params_at(1, -1), experts.params_at(1, 3))
    for k, t in ((2, 0), (0, 4), (0, -2), (-1, 0)):
        with pytest.raises(IndexError):
            experts.params_at(k, t)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_mapped_values_are_those_in_memory(dtype, tiny, tmp_path, monkeypatch):
    path = str(made(tiny, tmp_path / "a.h5", dtype=dtype).file.path)
    near = provided(tiny, file=path, first=1, last=2)
    monkeypatch.setenv("CONDENSE_HOST_MEMORY", "10")
    far = provided(tiny, file=path, first=1, last=2)
    assert (near.placement, far.placement) == ("memory", "mapped")
    far.prefetch([(0, 1), (1, 2)])
    for k in range(2):
        for t in (0, 1, 2, -1):
            assert torch.equal(near.params_at(k, t), far.params_at(k, t))
    far.params_at(0, 1).zero_()
    assert far.params_at(0, 1).any()


def test_only_the_epochs_that_are_needed_are_loaded(tiny, good):
    experts = provided(tiny, file=str(good), count=1, first=1, last=2)
    assert experts.values.shape == (1, 2, experts.layout.size)
    assert torch.equal(
        experts.params_at(0, 0), provided(tiny, file=str(good)).params_at(0, 0)
    )  # others are read when asked for
    assert provided(tiny, file=str(good), count=9).count == 2


def test_where_snapshots_lie(monkeypatch):
    monkeypatch.setenv("CONDENSE_HOST_MEMORY", "1000")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200, 400))
    cuda = torch.device("cuda")
    assert [choose_placement(size, cuda) for size in (100, 101, 500, 501)] == ["device", "pinned", "pinned", "mapped"]
    assert [choose_placement(size, CPU) for size in (100, 500, 501)] == ["memory", "memory", "mapped"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [choose_placement(size, CPU) for size in (125, 126)] == ["memory", "mapped"]


def test_the_free_memory_is_told():
    assert 2**20 < device_module.free_host_memory() < 2**50


def test_a_teacher_is_the_mean_of_the_experts(tiny, good):
    file, images = read_trajectory_file(good), tiny.batch(torch.arange(5))
    logits = []
    for k in range(2):
        net = networks.build_network(NETWORK, tiny.shape, 3)
        net.load_state_dict(file.layout.unflatten(torch.tensor(file.values[k, 3]).float()))
        logits.append(net(images).detach())
    mean = load_expert_ensemble(good, CPU, (1, 8, 8), 3)
    assert not mean.training
    torch.testing.assert_close(mean(images), sum(logits) / 2)
    torch.testing.assert_close(load_expert_ensemble(good, CPU, count=1)(images), logits[0])
    assert not torch.equal(load_expert_ensemble(good, CPU, count=1, epoch=1)(images), logits[0])
    assert "another image size" in refusal(lambda: load_expert_ensemble(good, CPU, (3, 8, 8), 3))
    assert "another number of classes (3, not 10)" in refusal(lambda: load_expert_ensemble(good, CPU, (1, 8, 8), 10))
    damage(good, 1, 3)
    assert "damaged" in refusal(lambda: load_expert_ensemble(good, CPU))


def test_experts_with_batch_norm_are_no_teachers(tiny, tmp_path):
    path = made(tiny, tmp_path / "a.h5", run=a_run(tiny, "convnet-d2-w8-bn"), epochs=1).file.path
    assert "batch norm" in refusal(lambda: load_expert_ensemble(path, CPU))


def test_a_described_file_is_found_again(tiny, good):
    told = json.loads(json.dumps(provided(tiny, file=str(good), count=1).describe()))
    assert told["path"] == str(good) and told["count"] == 1 and told["bytes"] == good.stat().st_size
    assert find_experts(told) == good
    made(tiny, good, count=3)
    assert find_experts(told) == good  # its first expert is still there
    place = cache_dir() / "trajectories" / "somewhere.h5"
    place.parent.mkdir(parents=True)
    good.rename(place)
    assert find_experts(told) == place
    place.unlink()
    made(condense.task(tiny_arrays(seed=1)), good)
    assert find_experts(told) is None and find_experts({"content": None, "path": None}) is None


# -- the cache --------------------------------------------------------------------------------------------------------


def test_experts_are_kept_and_shared(tiny, monkeypatch):
    run = a_run(tiny)
    first = provided(tiny, run)
    assert run.notes["preparation"]["from_cache"] == 0 and run.notes["preparation"]["seconds"] > 0
    (path,) = (cache_dir() / "trajectories").iterdir()
    assert path == expert_cache_file(run, TRAINING, 3) and path.name.endswith("-e3.h5")
    told = first.describe()  # the place of a cache says nothing to others
    assert told["path"] is None and find_experts(told) == path
    forbid_training(monkeypatch)
    other = Run(tiny, 5, NETWORK, quiet=True, track="none", name="another method")
    again = provided(tiny, other, count=1)
    assert other.notes["preparation"]["from_cache"] == 1 and other.notes["preparation"]["seconds"] > 0
    assert other.elapsed >= other.notes["preparation"]["seconds"] - 0.01  # what the cache saved is still counted
    assert torch.equal(again.params_at(0, 2), first.params_at(0, 2))


def test_longer_files_serve_shorter_needs(tiny, monkeypatch):
    longer, shorter = provided(tiny, epochs=3), None
    with monkeypatch.context() as patch:
        forbid_training(patch)
        shorter = provided(tiny, epochs=2)
    assert shorter.epochs == 2 and torch.equal(shorter.params_at(0, -1), longer.params_at(0, 2))
    assert shorter._file.path == longer._file.path
    assert shorter.seconds([0]) == pytest.approx(longer.seconds([0]) * 2 / 3)
    own = provided(tiny, epochs=2, count=3)  # two of three would be there: a file of its own
    assert own._file.path.name.endswith("-e2.h5") and torch.equal(own.params_at(1, -1), shorter.params_at(1, -1))
    told = shorter.describe()["content"]
    assert provided(tiny, epochs=2, count=2).describe()["content"] == told  # whichever file it came from


def test_a_schedule_of_the_learning_rate_ties_experts_to_their_length(tiny):
    dropping = ExpertTraining(dataclasses.replace(RECIPE, lr_milestones=(0.5,)))
    provided(tiny, training=dropping, epochs=3)
    run = a_run(tiny)
    provided(tiny, run, training=dropping, epochs=2)
    assert run.notes["preparation"]["from_cache"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"training": ExpertTraining(RECIPE, Half(0.5))},
        {"training": ExpertTraining(RECIPE, None, "bf16")},
        {"training": ExpertTraining(RECIPE, held_out=0.2)},
        {"training": ExpertTraining(dataclasses.replace(RECIPE, lr=0.1))},
        {"dtype": "float32"},
    ],
)
def test_other_trainings_have_other_files(change, tiny):
    provided(tiny, epochs=1)
    run = a_run(tiny)
    provided(tiny, run, epochs=1, **change)
    assert run.notes["preparation"]["from_cache"] == 0 and len(os.listdir(cache_dir() / "trajectories")) == 2


def test_what_decides_the_weights_is_known(tiny, monkeypatch):
    base = expert_cache_key_fields(a_run(tiny), TRAINING, 3, "float16")
    assert json.loads(json.dumps(base)) == base
    longer = dataclasses.replace(RECIPE, steps=99)
    assert expert_cache_key_fields(a_run(tiny), ExpertTraining(longer), 4, "float16") == base
    assert expert_cache_key_fields(a_run(tiny, seed=1), TRAINING, 3, "float16") != base
    assert expert_cache_key_fields(a_run(tiny, compute=ComputeConfig("bf16")), TRAINING, 3, "float16") != base
    monkeypatch.setattr(store, "STUDENT_VERSION", -1)
    assert expert_cache_key_fields(a_run(tiny), TRAINING, 3, "float16") != base


@pytest.mark.parametrize("fault", ["cut", "bit"])
def test_a_damaged_file_of_the_cache_is_mended(fault, tiny, caplog):
    whole = provided(tiny)
    path = expert_cache_file(a_run(tiny), TRAINING, 3)
    cut(path) if fault == "cut" else damage(path, 1, 3)
    run = a_run(tiny)
    again = provided(tiny, run)
    assert "damaged" in caplog.text and run.notes["preparation"]["from_cache"] == (0 if fault == "cut" else 1)
    assert torch.equal(again.values, whole.values)


def test_a_named_file_is_free(tiny, good):
    run = a_run(tiny)
    provided(tiny, run, file=str(good))
    assert "preparation" not in run.notes and run.elapsed < 60


def test_a_network_from_python_is_not_kept(tiny):
    experts = provided(tiny, a_run(tiny, lambda: networks.build_network(NETWORK, tiny.shape, 3)), count=2, epochs=2)
    assert (experts.count, experts.epochs) == (2, 2) and not torch.equal(
        experts.params_at(0, 0), experts.params_at(0, -1)
    )
    assert not (cache_dir() / "trajectories").exists()
    assert experts.describe()["path"] is None and find_experts(experts.describe()) is None


@pytest.mark.parametrize(
    ("minutes", "min_epochs", "count", "epochs"),
    [
        (1.0, 1, 4, 6),
        (0.6, 1, 4, 6),
        (0.25, 1, 4, 2),
        (0.25, 3, 3, 3),
        (0.05, 3, 1, 3),
        (0.001, 1, 1, 1),
        (0.1, 9, 1, 6),
    ],
)
def test_a_time_limit_takes_whole_epochs_or_fewer_experts(minutes, min_epochs, count, epochs, tiny, tmp_path):
    """Of 60 s a third is 20: 200 steps, 40 epochs of 5 steps."""
    options = {"directory": tmp_path, "minutes": minutes}
    plan = plan_training(
        a_run(tiny, **options), lambda: 0.1, kind="expert", networks=4, units=6, unit_steps=5, min_units=min_epochs
    )
    assert (plan.networks, plan.units) == (count, epochs)
    # A resumed run keeps the plan that it began with, also where the machine became slow.
    run = a_run(tiny, directory=tmp_path, minutes=1e-9, resume=True)
    experts = provided(tiny, run, count=4, epochs=6, min_epochs=min_epochs)
    assert (experts.count, experts.epochs) == (count, epochs)
    assert (run.notes["preparation"]["networks"], run.notes["preparation"]["epochs"]) == (count, epochs)
    assert (run.notes["preparation"]["networks_wanted"], run.notes["preparation"]["steps_each_wanted"]) == (4, 30)


def test_a_short_time_limit_trains_the_minimum(tiny):
    run = a_run(tiny, minutes=1e-9)
    experts = provided(tiny, run, count=4, epochs=6, min_epochs=2)
    assert (experts.count, experts.epochs) == (1, 2) and run.notes["preparation"]["networks_wanted"] == 4


def test_a_stop_says_how_to_go_on_and_keeps_finished_experts(tiny, tmp_path):
    run = stopped_run(
        tiny, directory=tmp_path, condition=lambda: list((cache_dir() / "trajectories").glob("*.parts/0000.h5"))
    )
    with pytest.raises(Interrupted, match=f"continue with: condense resume {tmp_path}"):
        provided(tiny, run)
    fresh = a_run(tiny)
    provided(tiny, fresh)
    assert fresh.notes["preparation"]["from_cache"] == 1


# -- from the command line --------------------------------------------------------------------------------------------


EXPERTS = f"experts --data tiny.npz --network {NETWORK} {MTT} --precision fp32"


def test_a_signal_stops_and_the_same_command_goes_on(call, tmp_path, monkeypatch):
    assert call(f"{EXPERTS} --count 3 --out whole.h5").code == 0
    write = store.FileStore.write

    def write_and_terminate(store, key, record):
        write(store, key, record)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(store.FileStore, "write", write_and_terminate)
        result = call(f"{EXPERTS} --count 3 --out a.h5")
    assert result.code == 130 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("condense: stopped while training experts") and "the same command" in result.err
    again = call(f"{EXPERTS} --count 3 --out a.h5")
    assert again.code == 0 and "2 trained now, 1 were there" in again.out
    assert np.array_equal(
        read_trajectory_file(tmp_path / "a.h5").values, read_trajectory_file(tmp_path / "whole.h5").values
    )


def test_experts_of_the_cache_serve_the_method(call):
    text = call(f"{EXPERTS} --count 2").out
    assert "2 epochs: 2 trained now, 0 were there" in text and str(cache_dir() / "trajectories") in text
    result = call(f"distill mtt --data tiny.npz --ipc 1 --network {NETWORK} {MTT} num_experts=2 --precision fp32")
    assert result.code == 0 and "2 of them were in the cache" in result.out, result.err


def test_the_next_command_works(call):
    text = call(f"{EXPERTS} --count 2 --epochs 3 --out a.h5 --held-out 0.25").out
    assert "right on held-out images: " in text and "3 epochs" in text
    command = text.split("next: condense ")[1].replace("--ipc 10", "--ipc 1")
    result = call(command)
    assert result.code == 0 and "before it" not in result.out, result.err
    manifest = condense.load("tiny-mtt-ipc1.h5").manifest
    assert manifest["preparation"] == {} and Path(manifest["settings"]["experts"]) == Path("a.h5").resolve()


def test_plan_says_where_experts_will_lie(call, monkeypatch):
    words = f"mtt --data tiny.npz --ipc 1 --network {NETWORK} {MTT}"
    needs = json.loads(call(f"plan {words} num_experts=50 --json").out)["trajectories"]
    size = 50 * 3 * layout_of(NETWORK, condense.task("tiny.npz")).size * 2
    assert needs == {"experts": 50, "epochs": 2, "bytes": size, "resident_bytes": size, "place": "memory"}
    assert not (cache_dir() / "trajectories").exists()
    monkeypatch.setenv("CONDENSE_HOST_MEMORY", "0")
    assert "of 2 epochs" in call(f"plan {words}").out and "mapped from disk" in call(f"plan {words}").out
    assert "trajectories" not in call("plan random --data tiny.npz --ipc 1").out


def test_a_method_of_ones_own_has_experts(tiny, tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Config:
        num_experts: int = 2
        buffer_epochs: "int | None" = None
        experts: str = ""

        def epochs_needed(self):
            return self.buffer_epochs or 2

        def expert_training(self, task):
            return ExpertTraining(dataclasses.replace(RECIPE, batch=task.num_classes))

    names = {"name": "mine", "network": NETWORK, "protocol": "quick-v1", "pretrains": "experts", "task": "images"}
    entry = SimpleNamespace(config=Config, **names)
    monkeypatch.setitem(registry.METHODS._entries, "mine", entry)
    found = api.experts(tiny, method="mine", epochs=1, out=tmp_path / "a.h5").file
    assert (found.count, found.epochs, found.manifest["steps_per_epoch"]) == (2, 1, 12)
    line = refusal(lambda: api.experts(tiny, method="dm"))
    assert line == "--for dm: this method has no experts; these have: ast, datm, ftd, mtt, tesla, mine"


def test_two_ranks_make_the_experts_of_one(call, tmp_path):
    assert call(f"{EXPERTS} --count 3 --out one.h5").code == 0
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "condense")
    words = f"{EXPERTS} --count 3 --out two.h5".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 trained now") == 1
    assert np.array_equal(
        read_trajectory_file(tmp_path / "one.h5").values, read_trajectory_file(tmp_path / "two.h5").values
    )
    assert not (tmp_path / "two.h5.parts").exists()
