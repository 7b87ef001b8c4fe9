"""Teachers: how they are trained, kept, verified, named and asked, and the training rules that came with them."""

import copy
import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_arrays
from pretraining_seams import StoppedRun, forbid_training, train_in_groups
from torch import nn

import condense
from condense import hdf5, networks, registry, rng
from condense.augment import CropViews, make_augmentation
from condense.config import load_recipe, recipe_names
from condense.data import cache_dir
from condense.engine import Interrupted, Run
from condense.errors import CondenseError
from condense.judge import label_source, protocol
from condense.labels import HardLabels, SoftLabels
from condense.networks import ComputeConfig, read_teacher_file, saved
from condense.networks import pretrained as pretrained_module
from condense.pretraining import (
    ExpertTraining,
    TeacherOptions,
    find_teachers,
    load_expert_ensemble,
    load_or_train_teachers,
    load_teacher_ensemble,
    make_student,
    pipeline,
    plan_training,
    require_batch_norm,
    store,
    teacher_cache_file,
    teachers,
    train_teacher_file,
    train_trajectory_file,
)
from condense.sets import DistilledSet
from condense.training import FixedSource, Student, TrainConfig, batch_ids, loop, train
from condense.training import config as config_module

NETWORK, PLAIN = "convnet-d2-w8-bn", "convnet-d1-w8-in"
CPU = torch.device("cpu")
OPTIONS = TeacherOptions(teacher_epochs=2, teacher_batch=8, teacher_lr=0.05)
SMALL = "teacher_epochs=2 teacher_batch=8 teacher_lr=0.05"


def a_run(task, network=NETWORK, **options):
    return Run(task, 1, network, quiet=True, track="none", **options)


def made(task, path, *, architectures=(NETWORK,), count=1, options=OPTIONS, run=None, **rest):
    return train_teacher_file(
        run or a_run(task), options.teacher_training(task), path, architectures=architectures, count=count, **rest
    )


def provided(task, run=None, *, options=OPTIONS, architectures=(NETWORK,), **rest):
    return load_or_train_teachers(
        run or a_run(task), options.teacher_training(task), architectures=architectures, **rest
    )


def refusal(action):
    with pytest.raises(CondenseError) as fault:
        action()
    assert "\n" not in str(fault.value)
    return str(fault.value)


def equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def trained(task, network=NETWORK, number=0, options=OPTIONS):
    """What a teacher must be, trained by the plain loop."""
    run, training = a_run(task), options.teacher_training(task)
    student = make_student(run, task, network, "teacher", network, number)
    steps = training.epochs * -(-len(task.train) // training.recipe.batch)
    train([student], dataclasses.replace(training.recipe, steps=steps), device=CPU)
    return student.network


# -- the rules of training that came with teachers --------------------------------------------------------------------


def test_the_cosine_is_the_closed_form():
    for stretch in (1.0, 2.0):
        recipe = TrainConfig(40, 8, 0.3, 0.9, 0.0, schedule="cosine", stretch=stretch)
        for step in range(40):
            expected = 0.3 * math.cos(math.pi * step / (80 * stretch)) ** 2  # half the angle, squared
            assert recipe.lr_at(step) == pytest.approx(expected, rel=1e-12)
    assert TrainConfig(40, 8, 0.3, 0.9, 0.0, schedule="cosine", stretch=2.0).lr_at(40) == pytest.approx(0.15)


@pytest.mark.parametrize("schedule", ["drops", "cosine"])
def test_the_warmup_grows_linearly_to_the_schedule(schedule):
    plain, warm = (TrainConfig(40, 8, 0.3, 0.9, 0.0, schedule=schedule, warmup=share) for share in (0.0, 0.25))
    for step in range(10):
        assert warm.lr_at(step) == pytest.approx(plain.lr_at(step) * (step + 1) / 10)
    assert [warm.lr_at(step) for step in range(10, 40)] == [plain.lr_at(step) for step in range(10, 40)]


def a_student(network, k=0, size=10):
    with rng.seeded("teacher test", k):
        net = networks.build_network(network, (1, 8, 8), 3)
    images = torch.randn(size, 1, 8, 8, generator=rng.generator("images", k))
    return Student(net, FixedSource(images, HardLabels(torch.arange(size) % 3, 3)), rng.key("seed", k))


ADAMW = TrainConfig(9, 4, 0.02, 0.9, 0.3, optimizer="adamw", schedule="cosine", warmup=0.3)


def test_adamw_is_that_of_torch_and_decays_matrices_only():
    student = a_student(NETWORK)
    net, before = copy.deepcopy(student.network), copy.deepcopy(student.network.state_dict())
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    assert len(matrices) == 3 and len(vectors) == 7  # two convolutions and the classifier; biases and norms
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.999)
    )
    for step in range(9):
        ids = batch_ids(student.seed, 10, 4, step)
        optimizer.zero_grad()
        F.cross_entropy(net(student.source.images[ids]), ids % 3).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + math.cos(math.pi * step / 9)) * min(1, (step + 1) / 2.7)
        optimizer.step()
    train([student], ADAMW, device=CPU)
    for (name, a), b in zip(student.network.state_dict().items(), net.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)
    assert not equal(before, student.network.state_dict())


@pytest.mark.parametrize("decay_all", [False, True])
def test_without_gradients_only_matrices_shrink_unless_all_decay(decay_all):
    """The decay alone: the loss does not reach the weights."""
    student = a_student(NETWORK)
    before = copy.deepcopy(dict(student.network.named_parameters()))
    update = lambda work: [torch.zeros_like(weight) for weight in work.weights]  # noqa: E731
    train([student], dataclasses.replace(ADAMW, steps=1, warmup=0.0, decay_all=decay_all), device=CPU, update=update)
    for name, after in student.network.named_parameters():
        factor = 1 - 0.02 * 0.3 if decay_all or after.ndim >= 2 else 1.0
        torch.testing.assert_close(after.detach(), before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("network", ["convnet-d2-w8-none", "convnet-d2-w8-ln", "mlp"])
def test_adamw_stacked_equals_one_after_the_other(network):
    together, apart = ([a_student(network, k) for k in range(3)] for _ in range(2))
    train(together, ADAMW, device=CPU, together=True)
    train(apart, ADAMW, device=CPU, together=False)
    for one, other in zip(together, apart):
        for (name, a), b in zip(one.network.state_dict().items(), other.network.state_dict().values()):
            # No BatchNorm: Adam would blow up the rounding that is all of the gradient of a bias before one.
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    stacked = [torch.zeros(3, 5, 5), torch.zeros(3, 5)]  # of three networks: a matrix each, and a bias
    decays = [
        group["weight_decay"] for group in config_module.make_optimizer(stacked, ADAMW, stacked=True).param_groups
    ]
    shapes = [
        group["params"][0].ndim for group in config_module.make_optimizer(stacked, ADAMW, stacked=True).param_groups
    ]
    assert (decays, shapes) == ([0.3, 0.0], [3, 2])


@pytest.mark.parametrize("together", [True, False])
def test_a_killed_training_by_adamw_goes_on_bit_for_bit(together, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    whole, again = ([a_student(NETWORK, k) for k in range(2)] for _ in range(2))
    train(whole, ADAMW, device=CPU, together=together)

    def killing(done):
        if done >= 8:
            raise KeyboardInterrupt

    options = {"device": CPU, "together": together, "checkpoint": tmp_path / "training.pt"}
    with pytest.raises(KeyboardInterrupt):
        train([a_student(NETWORK, k) for k in range(2)], ADAMW, report=killing, **options)
    seen = []
    train(again, ADAMW, report=seen.append, **options)
    assert seen[0] > 8
    for one, other in zip(whole, again):
        assert equal(one.network.state_dict(), other.network.state_dict())


def test_recipes_of_before_are_known_as_before():
    """Cache keys of files and scores contain this text; a setting that was added later appears only if it differs."""
    old = TrainConfig(5, 4, 0.1, 0.9, 5e-4, lr_milestones=(0.5,), augment=make_augmentation("crop"))
    assert old.cache_key() == (
        "Recipe(steps=5, batch=4, lr=0.1, momentum=0.9, weight_decay=0.0005, drops=(0.5,), drop_factor=0.1, "
        f"augment={make_augmentation('crop')!r}, cutmix=0.0)"
    )
    assert list(old.cache_key_fields()) == [
        "steps",
        "batch",
        "lr",
        "momentum",
        "weight_decay",
        "drops",
        "drop_factor",
        "augment",
        "cutmix",
    ]
    later = {"optimizer": "adamw", "schedule": "cosine", "stretch": 2.0, "warmup": 0.1, "decay_all": True}
    for change in ({name: value} for name, value in later.items()):
        ((name, value),) = change.items()
        assert f"{name}={value!r}" in dataclasses.replace(old, **change).cache_key()


def test_words_that_are_none_are_refused():
    known = protocol.get_protocol("dc-v1")
    for change, line in (
        ({"optimizer": "adam"}, "optimizer=adam: unknown; did you mean 'adamw'?"),
        ({"schedule": "cosin"}, "schedule=cosin: unknown; did you mean 'cosine'?"),
        ({"stretch": 0.5}, "stretch=0.5: must be at least 1"),
    ):
        assert refusal(lambda change=change: TrainConfig(5, 4, 0.1, 0.9, 0.0, **change)) == line
        assert refusal(lambda change=change: dataclasses.replace(known, **change)) == f"protocol dc-v1: {line}"


def test_a_warmup_out_of_range_is_refused():
    assert refusal(lambda: TrainConfig(5, 4, 0.1, 0.9, 0.0, warmup=-0.1)) == "warmup=-0.1: must be 0 to 1"


def test_a_protocol_hands_its_rule_on():
    known = dataclasses.replace(protocol.get_protocol("dc-v1"), optimizer="adamw", schedule="cosine", stretch=2.0)
    recipe = known.recipe(10, mirror=True)
    assert (recipe.optimizer, recipe.schedule, recipe.stretch) == ("adamw", "cosine", 2.0)
    for name in ("dwa", "infer"):  # whose programs give AdamW all parameters
        versions = [protocol.get_protocol(f"{name}-v{version}").recipe(10, mirror=True) for version in (1, 2)]
        assert [recipe.decay_all for recipe in versions] == [False, True]
        assert versions[0] == dataclasses.replace(versions[1], decay_all=False)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_trained(tiny, tmp_path):
    done = made(tiny, tmp_path / "a.h5", architectures=[NETWORK, PLAIN], count=2)
    file = read_teacher_file(done.file.path)
    assert done.trained == file.keys == [(NETWORK, 0), (PLAIN, 0), (NETWORK, 1), (PLAIN, 1)]
    for k, (name, number) in enumerate(file.keys):
        net = trained(tiny, name, number)
        member = file.load_member(k, CPU)
        assert equal(net.state_dict(), member.network.state_dict())
        assert file.entries[k]["accuracy"] == member.accuracy == loop.accuracy(net, tiny, device=CPU)
        assert not member.network.training and not any(p.requires_grad for p in member.network.parameters())
    with h5py.File(file.path) as stored:
        types = {name: array.dtype for name, array in stored["members/0"].items()}
    assert types["norms.0.running_mean"] == np.float32 and types["norms.0.num_batches_tracked"] == np.int64
    known = file.manifest
    assert (known["classes"], known["image_shape"]) == (["0", "1", "2"], [1, 8, 8])
    assert known["fingerprint"] == tiny.fingerprint and known["transform"] == store.transform_digests(tiny)
    assert known["judged_on"] == "test images" and "schedule='cosine'" in known["recipe"]
    assert os.listdir(tmp_path) == ["a.h5"]


def test_held_out_images_judge_and_are_not_seen(tiny, tmp_path):
    training = dataclasses.replace(OPTIONS.teacher_training(tiny), held_out=0.25)
    file = train_teacher_file(a_run(tiny), training, tmp_path / "a.h5", architectures=[NETWORK]).file
    inner = tiny.hold_out(0.25, (0, "held-out"))
    assert file.manifest["judged_on"] == "held-out images" and file.manifest["steps_per_epoch"] == 4  # 27 images
    net = trained(inner)
    assert equal(net.state_dict(), file.load_member(0, CPU).network.state_dict())
    assert file.entries[0]["accuracy"] == loop.accuracy(net, inner, device=CPU)


def test_members_are_added_and_stay(tiny, tmp_path, monkeypatch):
    whole = made(tiny, tmp_path / "whole.h5", architectures=[NETWORK, PLAIN], count=2).file
    path = tmp_path / "a.h5"
    made(tiny, path)
    assert made(tiny, path, count=2).trained == [(NETWORK, 1)]
    again = made(tiny, path, architectures=[PLAIN], count=2)
    assert again.trained == [(PLAIN, 0), (PLAIN, 1)]
    assert {e["network"] + str(e["number"]): e["sha256"] for e in again.file.entries} == {
        e["network"] + str(e["number"]): e["sha256"] for e in whole.entries
    }
    forbid_training(monkeypatch)
    before = path.read_bytes()
    assert made(tiny, path, count=1).trained == [] and path.read_bytes() == before


def test_a_killed_training_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    whole = made(tiny, tmp_path / "whole.h5", count=2).file
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    original, steps = loop.train, []

    class Killed(BaseException):
        pass

    def dying(group, *words, report=None, **options):
        def reported(done):
            steps.append(done)
            if len(steps) == 16:  # ten steps of the first, six of the second
                raise Killed

        return original(group, *words, report=reported, **options)

    monkeypatch.setattr(pipeline, "train", dying)
    with pytest.raises(Killed):
        made(tiny, tmp_path / "a.h5", count=2)
    assert not (tmp_path / "a.h5").exists() and len(os.listdir(tmp_path / "a.h5.parts")) == 2
    steps.clear()
    again = made(tiny, tmp_path / "a.h5", count=2)
    assert steps == [7, 8, 9, 10]  # nothing was done twice
    assert again.trained == [(NETWORK, 1)]
    assert [entry["sha256"] for entry in again.file.entries] == [entry["sha256"] for entry in whole.entries]
    assert equal(again.file.load_state(1), whole.load_state(1))
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "whole.h5"]


def test_teachers_that_are_trained_together_are_those_trained_alone(tiny, tmp_path, monkeypatch):
    alone = made(tiny, tmp_path / "alone.h5", count=3).file
    sizes = train_in_groups(monkeypatch)
    monkeypatch.setattr(teachers, "MAX_TEACHER_GROUP", 2)
    together = made(tiny, tmp_path / "together.h5", count=3).file
    assert sizes == [2, 1]
    for k in range(3):
        for (name, a), b in zip(together.load_state(k).items(), alone.load_state(k).values()):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)


def test_a_diverging_teacher_is_refused_and_finished_ones_stay(tiny, tmp_path, monkeypatch):
    wild = dataclasses.replace(OPTIONS, teacher_lr=1e30)
    line = refusal(lambda: made(tiny, tmp_path / "a.h5", options=wild))
    assert f"diverged: teacher 0 of {NETWORK} in epoch 1 " in line and "lower teacher_lr, now 1e+30" in line
    assert not (tmp_path / "a.h5").exists()

    def exploding_student(run, source, architecture, *purpose):
        student = make_student(run, source, architecture, *purpose)
        if purpose[-1] == 1:
            with torch.no_grad():
                student.network.classify.bias.fill_(math.inf)
        return student

    with monkeypatch.context() as patch:
        patch.setattr(teachers, "make_student", exploding_student)
        assert "diverged: teacher 1" in refusal(lambda: made(tiny, tmp_path / "a.h5", count=2))
    assert made(tiny, tmp_path / "a.h5", count=2).trained == [(NETWORK, 1)]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tiny, tmp_path):
    """A sound file, in a folder of its own."""
    folder = tmp_path / "good"
    folder.mkdir()
    return made(tiny, folder / "a.h5", count=2).file.path


FAULTS = {
    "cut": "truncated or damaged; copy or make it again",
    "bit": f"teacher 1 of {NETWORK} is damaged",
    "manifest": "the manifest is damaged",
    "text": "not an HDF5 file",
    "missing": "no such file; did you mean 'b.h5'",
    "foreign": "an HDF5 file of another format",
    "newer": "written by a newer version",
    "chunked": "not an array stored in one piece",
    "link": "is a soft or external link",
    "member": "the array 'members/1' is missing",
    "type": "has the type |S5, which no teacher uses",
    "shape": "1 of another shape: classify.bias (4, not 3)",
    "name": "1 missing: classify.bias, 1 unknown: extra",
    "network": "unknown network 'convnet-d9-w8-bn'",
    "entry": "the manifest has no proper 'members.1.number'",
    "key": "its members do not match its digest",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(fault, tiny, good, monkeypatch):
    if fault == "cut":
        good.write_bytes(good.read_bytes()[:-100])
    elif fault == "text":
        good.write_text("hello")
    elif fault == "missing":
        good.rename(good.with_name("b.h5"))
    elif fault == "foreign":
        condense.distill("random", tiny, 1, network=NETWORK).save(good, force=True)
    else:
        with h5py.File(good, "r+") as file:
            spoil(file, fault)
        hdf5.write_user_block(good, saved.TEACHER_FORMAT)
    forbid_training(monkeypatch)
    for action in (lambda: provided(tiny, file=str(good), count=2), lambda: load_teacher_ensemble(good, CPU)):
        line = refusal(action)
        assert line.startswith(f"{good}: ") and (FAULTS[fault] in line or fault == "network"), line
    assert FAULTS[fault] in line
    if fault not in ("missing", "shape", "name", "network"):
        assert "--force" in refusal(lambda: made(tiny, good, count=3))


def spoil(file, fault):
    group, name = file["members/1"], "classify.bias"
    if fault == "bit":
        group[name][1] = group[name][1] + 1
    elif fault == "manifest":
        file.attrs["manifest"] = np.bytes_(bytes(file.attrs["manifest"]).replace(b"tiny", b"tinY"))
    elif fault == "newer":
        file.attrs["version"] = 99
    elif fault == "member":
        del file["members/1"]
    elif fault in ("chunked", "type", "link"):
        values = group[name][()]
        del group[name]
        if fault == "link":
            group[name] = h5py.ExternalLink("/etc/hostname", "/x")
        elif fault == "chunked":
            group.create_dataset(name, data=values, chunks=True)
        else:
            group.create_dataset(name, data=np.bytes_("hello"))
    else:
        resign(file, fault, name)


def resign(file, fault, name):
    """Faults of a file that is consistent in itself."""
    manifest = json.loads(bytes(file.attrs["manifest"]))
    group, entry = file["members/1"], manifest["members"][1]
    if fault in ("shape", "name"):
        values = group[name][()]
        del group[name]
        longer, other = fault == "shape", "extra"
        group.create_dataset(name if longer else other, data=np.append(values, 0) if longer else values)
        state = {key: torch.from_numpy(np.asarray(array[()])) for key, array in group.items()}
        entry["sha256"] = teachers.state_sha256(state)
        manifest["content"] = saved.combined_sha256(one["sha256"] for one in manifest["members"])
    elif fault == "network":
        entry["network"] = "convnet-d9-w8-bn"
    elif fault == "key":
        entry["sha256"] = "0" * 64
    else:
        entry["number"] = "one"
    hdf5.write_manifest(file, dataclasses.replace(saved.TEACHER_FORMAT, schema={}), manifest)


def test_claims_beyond_the_file_are_not_allocated(good, monkeypatch):
    with h5py.File(good, "r+") as file:
        space, kind = h5py.h5s.create_simple((10**12,)), h5py.h5t.IEEE_F32LE
        options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        options.set_layout(h5py.h5d.CONTIGUOUS)
        options.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)  # nothing lies there
        h5py.h5d.create(file["members/0"].id, b"huge", kind, space, options)
    hdf5.write_user_block(good, saved.TEACHER_FORMAT)
    assert "teacher 0 claims 4000000" in refusal(lambda: read_teacher_file(good))


def test_a_place_with_other_teachers_is_refused_before_any_work(tiny, good, monkeypatch):
    other, zca = condense.task(tiny_arrays(seed=1), name="tiny"), condense.task(tiny_arrays(), zca=True)
    faster, longer = (dataclasses.replace(OPTIONS, **change) for change in ({"teacher_lr": 0.1}, {"teacher_epochs": 3}))
    before = good.read_bytes()
    with monkeypatch.context() as patch:
        forbid_training(patch)
        for expected, action in {
            "another data, normalisation;": lambda: made(other, good),
            "another normalisation;": lambda: made(zca, good),
            "another recipe;": lambda: made(tiny, good, options=faster),
            "number of epochs (2, not 3)": lambda: made(tiny, good, options=longer),
            "seed (0, not 1)": lambda: made(tiny, good, run=a_run(tiny, seed=1)),
            "precision (fp32, not bf16)": lambda: made(tiny, good, run=a_run(tiny, compute=ComputeConfig("bf16"))),
        }.items():
            assert f"{good}: holds teachers of another" in (line := refusal(action)) and expected in line
            assert good.read_bytes() == before and os.listdir(good.parent) == ["a.h5"]
    assert made(other, good, force=True).trained == [(NETWORK, 0)]
    assert read_teacher_file(good).manifest["fingerprint"] == other.fingerprint


def test_sound_teachers_of_a_damaged_file_are_kept_where_it_is_replaced(tiny, good):
    digests = [entry["sha256"] for entry in read_teacher_file(good).entries]
    with h5py.File(good, "r+") as file:
        spoil(file, "bit")
    again = made(tiny, good, count=2, force=True)
    assert again.trained == [(NETWORK, 1)] and [entry["sha256"] for entry in again.file.entries] == digests


def test_a_file_that_is_damaged_where_no_teacher_lies_is_written_again(tiny, good):
    file = read_teacher_file(good)
    digests = [entry["sha256"] for entry in file.entries]
    content = bytearray(good.read_bytes())
    content[70] ^= 1  # of the digest
    good.write_bytes(content)
    assert "truncated or damaged" in refusal(lambda: read_teacher_file(good))
    again = made(tiny, good, count=2, force=True)
    assert again.trained == [] and [entry["sha256"] for entry in again.file.entries] == digests


def test_a_file_that_does_not_suit_a_run_is_refused_before_any_work(tiny, tiny_colour, good, monkeypatch):
    forbid_training(monkeypatch)
    arrays, begun = tiny_arrays(), []
    fewer = condense.task((arrays[0][:24], arrays[1][:24], arrays[2][:12], arrays[3][:12]), name="tiny")
    brighter = condense.task(((arrays[0] // 2).astype(np.uint8), *arrays[1:]), name="tiny")
    for expected, task, rest in (
        ("another image size (1x8x8, not 3x8x8)", tiny_colour, {}),
        ("another classes (3 of 0, 1, 2, not 2 of 0, 1)", fewer, {}),
        ("another normalisation", condense.task(tiny_arrays(), name="tiny", zca=True), {}),
        ("another normalisation", brighter, {}),
        (f"no teacher of mlp, only of {NETWORK}; give committee={NETWORK}", tiny, {"architectures": ["mlp"]}),
        (f"holds 2 of the 3 teachers of {NETWORK}; add some", tiny, {"count": 3}),
    ):
        run = a_run(task, begin=lambda: begun.append(1))
        line = refusal(lambda task=task, run=run, rest=rest: provided(task, run, file=str(good), **rest))
        assert line.startswith(f"{good}: ") and expected in line, line
    assert not begun


def test_teachers_without_batch_norm_are_refused_before_any_is_trained(tiny, good, monkeypatch):
    require_batch_norm(provided(tiny, file=str(good), batch_norm=True))
    plain = provided(tiny, architectures=[PLAIN])
    expected = (
        f"teacher {PLAIN} has no BatchNorm, whose statistics this method matches; take a network such as "
        "convnet-d3-w128-bn"
    )
    assert refusal(lambda: require_batch_norm(plain)) == expected
    forbid_training(monkeypatch)
    begun = []
    run = a_run(tiny, begin=lambda: begun.append(1))
    line = refusal(lambda: provided(tiny, run, architectures=[NETWORK, "mlp"], batch_norm=True))
    assert line.startswith("teacher mlp has no BatchNorm")
    assert not begun


def test_a_last_batch_of_one_is_refused_where_it_has_no_variance(tiny, tmp_path, monkeypatch):
    lonely = dataclasses.replace(OPTIONS, teacher_batch=7)  # 36 images
    forbid_training(monkeypatch)
    for action in (lambda: made(tiny, tmp_path / "a.h5", options=lonely), lambda: provided(tiny, options=lonely)):
        assert "give teacher_batch=8" in refusal(action)
    monkeypatch.undo()
    assert provided(tiny, options=lonely, architectures=[PLAIN]).members[0].accuracy > 0


# -- what a method sees -----------------------------------------------------------------------------------------------


def test_the_committee_gives_the_weighted_mean_of_its_members(tiny, good):
    committee, images = provided(tiny, file=str(good), count=2), tiny.batch(torch.arange(5))
    logits = torch.stack([trained(tiny, number=k).eval()(images) for k in range(2)]).detach()
    mean = committee.ensemble()
    torch.testing.assert_close(mean(images), logits.mean(0))
    torch.testing.assert_close(committee.ensemble([3, 1])(images), 0.75 * logits[0] + 0.25 * logits[1])
    assert not mean.training and mean(images).dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in mean.parameters())
    state = mean.state_dict()
    for k, member in enumerate(committee.members):
        for name, value in member.network.state_dict().items():
            assert torch.equal(state[f"members.{k}.{name}"], value)
    wanted = images.clone().requires_grad_()
    mean(wanted).sum().backward()
    assert wanted.grad.abs().sum() > 0
    assert committee.nbytes() == 2 * sum(v.nbytes for v in trained(tiny).state_dict().values())
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]):
        assert "give one of at least 0 for each" in refusal(lambda weights=weights: committee.ensemble(weights))


def test_what_is_described_is_found_and_served_again(tiny, good):
    committee, images = provided(tiny, file=str(good), count=1), tiny.batch(torch.arange(5))
    told = json.loads(json.dumps(committee.describe()))
    assert told["path"] == str(good) and told["networks"] == [NETWORK] and told["bytes"] == committee.nbytes()
    assert told["accuracies"] == [pytest.approx(committee.members[0].accuracy)] and told["seconds"] > 0
    assert find_teachers(told) == good
    one, all_of_it = load_teacher_ensemble(good, CPU, tiny.shape, 3, described=told), load_teacher_ensemble(good, CPU)
    torch.testing.assert_close(one(images), committee.ensemble()(images))
    assert not torch.allclose(one(images), all_of_it(images)) and not one.training
    assert "another image size (1x8x8, not 3x8x8)" in refusal(lambda: load_teacher_ensemble(good, CPU, (3, 8, 8), 3))
    assert "another number of classes (3, not 10)" in refusal(lambda: load_teacher_ensemble(good, CPU, (1, 8, 8), 10))
    zca = condense.task(tiny_arrays(), zca=True)
    assert "another normalisation" in refusal(lambda: load_teacher_ensemble(good, CPU, transform=zca.transform))
    place = cache_dir() / "teachers" / "somewhere.h5"
    place.parent.mkdir(parents=True)
    good.rename(place)
    assert find_teachers(told) == place
    made(tiny, place, options=dataclasses.replace(OPTIONS, teacher_lr=0.1), force=True)
    assert find_teachers(told) is None and find_teachers({"content": None, "path": None}) is None
    assert "holds other teachers" in refusal(lambda: load_teacher_ensemble(place, CPU, described=told))


def test_teachers_are_kept_and_shared(tiny, monkeypatch):
    run = a_run(tiny)
    first = provided(tiny, run, architectures=[NETWORK, PLAIN])
    preparation, described = run.notes["preparation"], run.notes["teachers"]
    assert (preparation["networks"], preparation["from_cache"], preparation["epochs"]) == (2, 0, 2)
    assert preparation["seconds"] > 0 and described == first.describe() and described["path"] is None
    (path,) = (cache_dir() / "teachers").glob("*.h5")
    assert path == teacher_cache_file(run, OPTIONS.teacher_training(tiny)) and find_teachers(first.describe()) == path
    with monkeypatch.context() as patch:
        forbid_training(patch)
        other = Run(tiny, 5, "mlp", quiet=True, track="none", name="another method")
        again = provided(tiny, other, architectures=[PLAIN])
        assert other.notes["preparation"]["from_cache"] == 1 and other.notes["preparation"]["seconds"] > 0
        assert other.elapsed >= other.notes["preparation"]["seconds"] - 0.01  # what the cache saved is still counted
        assert again.members[0].sha256 == first.members[1].sha256
    more = a_run(tiny)
    assert provided(tiny, more, count=2).members[0].sha256 == first.members[0].sha256
    assert more.notes["preparation"]["from_cache"] == 1
    assert len(read_teacher_file(path).entries) == 3  # the one of the other architecture stayed


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_lr": 0.1},
        {"teacher_epochs": 1},
        {"teacher_augment": "none"},
        {"teacher_augment": "rrc_flip"},
        {"teacher_optimizer": "adamw"},
        {"teacher_cutmix": 1.0},
    ],
)
def test_other_trainings_have_other_files_and_weights(change, tiny):
    first = provided(tiny)
    run = a_run(tiny)
    second = provided(tiny, run, options=dataclasses.replace(OPTIONS, **change))
    assert run.notes["preparation"]["from_cache"] == 0 and len(os.listdir(cache_dir() / "teachers")) == 2
    assert second.content_key != first.content_key


def test_a_damaged_file_of_the_cache_is_mended(tiny):
    first = provided(tiny, count=2)
    with h5py.File(next((cache_dir() / "teachers").glob("*.h5")), "r+") as file:
        spoil(file, "bit")
    run = a_run(tiny)
    assert provided(tiny, run, count=2).content_key == first.content_key and run.notes["preparation"]["from_cache"] == 1


def test_a_network_from_python_is_not_kept(tiny):
    def mine(shape, classes):
        return networks.build_network(NETWORK, shape, classes)

    committee = provided(tiny, a_run(tiny, mine), architectures=[mine], count=2)
    assert [member.number for member in committee.members] == [0, 1]
    assert committee.members[0].name.startswith("python:") and not (cache_dir() / "teachers").exists()
    assert find_teachers(committee.describe()) is None
    assert "have a name" in refusal(lambda: made(tiny, cache_dir() / "a.h5", architectures=[mine]))


@pytest.mark.parametrize(("minutes", "count", "epochs"), [(0.3, 4, 3), (0.2, 4, 2), (0.08, 3, 1), (0.001, 1, 1)])
def test_a_time_limit_takes_whole_epochs_or_fewer_teachers(minutes, count, epochs, tiny, tmp_path):
    """Of 60 s a third is 20: 200 steps, 40 epochs of 5 steps."""
    plan_training(
        a_run(tiny, directory=tmp_path, minutes=minutes), lambda: 0.1, kind="teacher", networks=4, units=3, unit_steps=5
    )
    options = dataclasses.replace(OPTIONS, teacher_epochs=3)
    run = a_run(tiny, directory=tmp_path, minutes=1e-9, resume=True)  # keeps the plan that it began with
    committee = provided(tiny, run, options=options, architectures=[NETWORK, PLAIN], count=2)
    assert (run.notes["preparation"]["networks"], run.notes["preparation"]["epochs"]) == (count, epochs)
    assert len(committee.members) == count and run.notes["preparation"]["steps_each_wanted"] == 15


def test_a_short_time_limit_trains_one_teacher_for_an_epoch(tiny):
    run = a_run(tiny, minutes=1e-9)
    committee = provided(tiny, run, architectures=[NETWORK, PLAIN], count=2)
    assert (run.notes["preparation"]["networks"], run.notes["preparation"]["epochs"]) == (1, 1)
    assert committee.members[0].sha256 != provided(tiny).members[0].sha256  # a cosine of one epoch


class DryRun(Run):
    dry_run = True


def test_a_dry_run_trains_one_short_network_and_estimates_all(tiny, monkeypatch):
    monkeypatch.setattr(pipeline, "measure_step_seconds", lambda *arguments: 0.1)
    run = DryRun(tiny, 1, NETWORK, quiet=True, track="none")
    committee = provided(tiny, run, architectures=[NETWORK, PLAIN], count=2)
    assert not (cache_dir() / "teachers").exists()
    # The others are there untrained, so that sizes are those of the whole committee.
    assert [member.name for member in committee.members] == [NETWORK, PLAIN] * 2
    assert [member.seconds > 0 for member in committee.members] == [True, False, False, False]
    assert run.notes["preparation"]["networks"] == 1 and run.notes["preparation"]["steps_each"] == 2
    assert run.estimates["preparation"] == pytest.approx(0.1 * 4 * 10)


def test_a_stop_says_how_to_go_on_and_keeps_finished_teachers(tiny, tmp_path):
    def finished_parts():
        return list((cache_dir() / "teachers").glob("*.parts/*-0000.h5"))

    run = StoppedRun(tiny, 1, NETWORK, quiet=True, track="none", directory=tmp_path, condition=finished_parts)
    with pytest.raises(Interrupted, match=f"continue with: condense resume {tmp_path}"):
        provided(tiny, run, count=2)
    assert len(finished_parts()) == 1
    fresh = a_run(tiny)
    provided(tiny, fresh, count=2)
    assert fresh.notes["preparation"]["from_cache"] == 1


# -- named teachers ---------------------------------------------------------------------------------------------------


def save(tmp_path, state, name="mine.pt"):
    torch.save(state, tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("form", ["plain", "nested", "parallel", "compiled", "old"])
def test_a_checkpoint_is_a_teacher(form, tiny, tmp_path, caplog):
    net = trained(tiny)
    state = net.state_dict()
    state = {
        "plain": state,
        "nested": {"epoch": 3, "state_dict": state},
        "parallel": {"model": {f"module.{name}": value for name, value in state.items()}},
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
        "old": {name: value for name, value in state.items() if "tracked" not in name},
    }[form]
    run = a_run(tiny)
    committee = provided(tiny, run, file=save(tmp_path, state))
    images = tiny.batch(torch.arange(5))
    assert torch.equal(committee.ensemble()(images), net.eval()(images))
    assert committee.members[0].accuracy == loop.accuracy(net, tiny, device=CPU)
    assert (
        "preparation" not in run.notes
        and run.notes["teachers"]["path"] == str(tmp_path / "mine.pt")
        and "order" not in caplog.text
    )
    told = json.loads(json.dumps(run.notes["teachers"]))
    again = load_teacher_ensemble(find_teachers(told), CPU, tiny.shape, 3, described=told)
    assert torch.equal(again(images), net(images))
    save(tmp_path, trained(tiny, number=1).state_dict())
    assert "holds other teachers" in refusal(
        lambda: load_teacher_ensemble(find_teachers(told), CPU, tiny.shape, 3, described=told)
    )


def test_a_checkpoint_in_the_names_of_its_library(tmp_path):
    task = condense.task(tiny_arrays(channels=3, size=32), name="tiny")
    with rng.seeded("library"):
        net = networks.build_network("torchvision:shufflenet_v2_x0_5", task.shape, 3)
    file = save(tmp_path, net.model.state_dict())
    committee = provided(task, file=file, architectures=["torchvision:shufflenet_v2_x0_5"])
    images = task.batch(torch.arange(2))
    assert torch.equal(committee.ensemble()(images), net.eval()(images))


class Trap:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_what_is_no_fitting_checkpoint_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = trained(tiny)
    good = net.state_dict()
    wider = networks.build_network(NETWORK, tiny.shape, 10).state_dict()
    lacking = {name: value for name, value in good.items() if name != "classify.bias"}
    for state, expected in (
        (wider, f"does not fit {NETWORK} for 1x8x8 images of 3 classes: 2 of another shape: classify.weight (10x"),
        (lacking, "1 missing: classify.bias"),
        ({**good, "head": torch.ones(1)}, "1 unknown: head"),
        ({**good, "classify.bias": torch.full((3,), math.nan)}, "1 not finite: classify.bias"),
        ({"epoch": 3}, "contains no state of a network"),
        ([torch.ones(1)], "contains no state of a network"),
        ({"state_dict": Trap()}, "contains more than tensors, or is damaged"),
    ):
        line = refusal(lambda state=state: provided(tiny, file=save(tmp_path, state)))
        assert line.startswith(f"{tmp_path / 'mine.pt'}: ") and expected in line, line
    (tmp_path / "mine.pt").write_bytes(pickle.dumps(Trap()))
    assert "contains more than tensors, or is damaged" in refusal(
        lambda: provided(tiny, file=str(tmp_path / "mine.pt"))
    )
    assert not (tmp_path / "trapped").exists()
    assert "no such file" in refusal(lambda: provided(tiny, file=str(tmp_path / "none.pt")))
    file = save(tmp_path, good)
    assert "a checkpoint is one network" in refusal(lambda: provided(tiny, file=file, count=2))


def test_a_teacher_that_knows_nothing_is_told(tiny, tmp_path, caplog):
    net = networks.build_network(NETWORK, tiny.shape, 3)
    with torch.no_grad():
        net.classify.weight.zero_()
        net.classify.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    committee = provided(tiny, file=save(tmp_path, net.state_dict()))
    assert committee.members[0].accuracy == pytest.approx(1 / 3) and "33.3 %" in caplog.text


class Head(nn.Module):
    """Logits are linear in what it is given, which must have three channels."""

    def __init__(self, classes):
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(3), nn.Linear(3 * 64, classes)

    def forward(self, x):
        return self.last(self.norm(x).flatten(1))


@pytest.mark.parametrize("zca", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_public_weights_take_images_of_the_training_space(zca, channels, tmp_path, monkeypatch):
    task = condense.task(tiny_arrays(channels=channels), name="tiny", zca=zca)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    head = Head(3)
    weights = pretrained_module.PublicWeights(3, mean, std, (8, 8), lambda: copy.deepcopy(head), "place", "origin")
    monkeypatch.setattr(pretrained_module, "torchvision_weights", lambda name, named: weights)
    run, ids = a_run(task), torch.arange(5)
    committee = provided(task, run, file="torchvision:head")
    require_batch_norm(committee)
    shape = (3, 1, 1)
    pixels = (task.pixels(ids).expand(-1, 3, -1, -1) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(committee.ensemble()(task.batch(ids)), head.eval()(pixels), rtol=1e-3, atol=1e-3)
    told = json.loads(json.dumps(run.notes["teachers"]))
    assert find_teachers(told) == Path("torchvision:head") and "preparation" not in run.notes
    again = load_teacher_ensemble(find_teachers(told), CPU, task.shape, 3, described=told, transform=task.transform)
    torch.testing.assert_close(again(task.batch(ids)), committee.ensemble()(task.batch(ids)))


def test_several_public_weights_are_a_committee(tiny, monkeypatch):
    heads = {name: Head(3) for name in ("one", "two")}
    known = {
        name: pretrained_module.PublicWeights(
            3, [0.5] * 3, [0.2] * 3, (8, 8), lambda head=head: copy.deepcopy(head), "place", "origin"
        )
        for name, head in heads.items()
    }
    monkeypatch.setattr(pretrained_module, "torchvision_weights", lambda name, named: known[name])
    run, file = a_run(tiny), "torchvision:one,torchvision:two"
    committee = provided(tiny, run, file=file)
    assert [member.name for member in committee.members] == file.split(",")
    told, images = json.loads(json.dumps(run.notes["teachers"])), tiny.batch(torch.arange(5))
    again = load_teacher_ensemble(find_teachers(told), CPU, tiny.shape, 3, described=told, transform=tiny.transform)
    torch.testing.assert_close(again(images), committee.ensemble()(images))
    assert dataclasses.replace(OPTIONS, teachers=file).count_teachers("mlp") == 2
    assert dataclasses.replace(OPTIONS, num_teachers=3).count_teachers("mlp") == 3


def test_public_weights_by_their_name(tiny, monkeypatch):
    """torchvision's second weights replaced those that papers used; the record says which were used."""
    first = pretrained_module.torchvision_weights("resnet50@IMAGENET1K_V1", "")
    assert first.origin.endswith("resnet50-0676ba61.pth")
    assert pretrained_module.torchvision_weights("resnet50", "").origin != first.origin
    with pytest.raises(CondenseError, match="resnet50@IMAGENET1K_V9: no weights IMAGENET1K_V9 of resnet50"):
        dataclasses.replace(OPTIONS, teachers="torchvision:resnet50@IMAGENET1K_V9").check_teachers()
    dataclasses.replace(OPTIONS, teachers="torchvision:resnet50@IMAGENET1K_V1").check_teachers()
    head = Head(3)
    weights = pretrained_module.PublicWeights(
        3, [0.5] * 3, [0.2] * 3, (8, 8), lambda: copy.deepcopy(head), "place", "origin"
    )
    monkeypatch.setattr(pretrained_module, "torchvision_weights", lambda name, named: weights)
    run = a_run(tiny)
    committee = provided(tiny, run, file="torchvision:head@FIRST")
    assert [member.name for member in committee.members] == ["torchvision:head"]  # the architecture
    assert find_teachers(json.loads(json.dumps(run.notes["teachers"]))) == Path("torchvision:head@FIRST")


def test_public_weights_that_cannot_be_had_are_told_in_one_line(tiny, tmp_path, monkeypatch):
    import torchvision.models._api as loader

    task = SimpleNamespace(shape=(3, 32, 32), num_classes=1000, transform=tiny.transform)

    def offline(*words, **options):
        raise URLError("no network here")

    monkeypatch.setattr(loader, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    line = refusal(
        lambda: pretrained_module.load_public_weights("torchvision:resnet18", task.shape, 1000, task.transform)
    )
    assert line.startswith("teachers=torchvision:resnet18: its weights are not here and cannot be fetched (<urlopen ")
    assert "put it at " + str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in line
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in line
    line = refusal(lambda: provided(tiny, file="torchvision:resnet18"))
    assert "its weights distinguish 1000 classes, the data have 3" in line
    line = refusal(lambda: provided(tiny, file="torchvision:resnet81"))
    assert "teachers=torchvision:resnet81: unknown; did you mean 'torchvision:resnet18'" in line


def test_public_weights_of_timm_that_cannot_be_had(tiny, monkeypatch):
    timm = pytest.importorskip("timm")

    def offline(name, pretrained=False, **options):
        assert pretrained
        raise URLError("no network here")

    monkeypatch.setattr(timm, "create_model", offline)
    line = refusal(lambda: pretrained_module.load_public_weights("timm:resnet18", (3, 32, 32), 1000, tiny.transform))
    assert "models--timm--resnet18" in line and "no network here" in line
    assert "have 3" in refusal(lambda: provided(tiny, file="timm:resnet18"))


def test_a_resumption_with_other_teachers_is_refused(tiny, good, tmp_path):
    run = a_run(tiny)
    provided(tiny, run, file=str(good))
    kept = json.loads(json.dumps(dict(run._kept["teachers"].state_dict())))
    resumed = a_run(tiny)
    resumed._kept_before = {"teachers": kept}
    provided(tiny, resumed, file=str(good))
    made(tiny, good, options=dataclasses.replace(OPTIONS, teacher_lr=0.1), force=True)
    assert "holds other teachers than when the run began" in refusal(lambda: provided(tiny, resumed, file=str(good)))


# -- settings, evaluation and the command line ------------------------------------------------------------------------


def test_settings_are_checked_and_used(tiny):
    for change, expected in (
        ({"num_teachers": 0, "teacher_lr": -1.0}, "num_teachers=0: must be at least 1; teacher_lr=-1.0: must be 0 to"),
        ({"teacher_epochs": 0}, "teacher_epochs=0"),
        ({"teacher_batch": 0}, "teacher_batch=0"),
        ({"teacher_decay": -1.0}, "teacher_decay=-1.0"),
        ({"teacher_cutmix": 1.5}, "teacher_cutmix=1.5"),
        ({"teacher_optimizer": "adam"}, "teacher_optimizer=adam: unknown; did you mean 'adamw'?"),
        ({"teacher_augment": "crop_flop"}, "teacher_augment=crop_flop: "),
        ({"committee": "mlp,resnet19-bn"}, "committee=mlp,resnet19-bn: unknown network 'resnet19-bn'"),
        ({"teachers": "torchvision:resnet18", "committee": "mlp"}, "says what the committee is; leave out committee"),
    ):
        assert expected in refusal(lambda change=change: TeacherOptions(**change).check_teachers()), expected
    TeacherOptions(committee="mlp, resnet18-bn", teachers="x.h5").check_teachers()
    assert TeacherOptions(committee="mlp, resnet18-bn").architectures("lenet") == ["mlp", "resnet18-bn"]
    assert TeacherOptions().architectures("lenet") == ["lenet"]
    options = TeacherOptions(
        teacher_lr=0.3,
        teacher_decay=0.1,
        teacher_batch=9,
        teacher_optimizer="adamw",
        teacher_cutmix=0.4,
        teacher_epochs=7,
    )
    training = options.teacher_training(tiny)
    recipe = training.recipe
    assert (recipe.lr, recipe.weight_decay, recipe.batch, recipe.optimizer) == (0.3, 0.1, 9, "adamw")
    assert (recipe.schedule, recipe.momentum, recipe.cutmix, training.epochs) == ("cosine", 0.9, 0.4, 7)
    assert recipe.augment == make_augmentation("crop_flip", variant="flip-always", mirror=tiny.mirror)


@pytest.mark.parametrize(
    ("text", "mirror", "flips"), [("rrc_flip", True, True), ("rrc_flip", False, False), ("rrc", True, False)]
)
def test_teachers_train_on_resized_crops(text, mirror, flips):
    """RandomResizedCrop of 8 to 100 % of the area: a step of SGD against its loss written out."""
    task = condense.task(tiny_arrays(), name="tiny", mirror=mirror)
    recipe = dataclasses.replace(
        TeacherOptions(teacher_augment=text).teacher_training(task).recipe, steps=1, momentum=0.0
    )
    crops, student = CropViews(0.08, 1.0, flip=flips), a_student(NETWORK)
    assert recipe.augment == crops
    net, ids = copy.deepcopy(student.network), batch_ids(student.seed, 10, recipe.batch, 0)
    boxes = crops.draw(rng.Draws(student.seed, "augment", 0), 10, (8, 8))
    views = crops.apply(student.source.images[ids], boxes)
    assert len(boxes.box.unique(dim=0)) > 5  # each image has its own crop
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    F.cross_entropy(net(views), ids % 3).backward()
    optimizer.step()
    train([student], recipe, device=CPU)
    for a, b in zip(student.network.parameters(), net.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["sre2l", "cda", "lpld"])
def test_recipes_on_tiny_imagenet_train_teachers_on_resized_crops(method):
    cells = [load_recipe(name) for name in recipe_names() if name.startswith(f"{method}/tiny-imagenet")]
    assert cells and all(cell["teacher_augment"] == "rrc_flip" for cell in cells)


def soft_set(task, committee, weights=None):
    """Real images with labels of a committee, as a method would store them."""
    images, _ = task.per_class(1, (0, "soft set"))
    labels = SoftLabels(committee.ensemble(weights)(images))
    source = {"teachers": committee.describe(), "weights": weights}
    manifest = {
        **condense.distill("random", task, 1, network=NETWORK).manifest,
        "space": "training",
        "label_source": source,
    }
    return DistilledSet(images, labels, task.transform, json.loads(json.dumps(manifest)))


def test_the_source_of_labels_is_found_or_named(tiny, good, tmp_path):
    committee, images = provided(tiny, count=2), tiny.batch(torch.arange(5))
    made_set = soft_set(tiny, committee, [3.0, 1.0])
    found, why = label_source.find_label_teacher(made_set, None, CPU)
    assert why == "" and torch.equal(found(images), committee.ensemble([3.0, 1.0])(images))
    record = condense.evaluate(made_set, tiny, networks=[NETWORK], runs=1, protocol="quick-soft-v1", cache=False)
    assert ("random", "own") in {(entry["arm"], entry["labels"]) for entry in record["results"]}
    for path in (cache_dir() / "teachers").glob("*.h5"):
        path.rename(tmp_path / "moved.h5")
    assert label_source.find_label_teacher(made_set, None, CPU) == (
        None,
        "the teachers that its labels came from are not found; give --teachers FILE",
    )
    found, _ = label_source.find_label_teacher(made_set, tmp_path / "moved.h5", CPU)
    assert torch.equal(found(images), committee.ensemble([3.0, 1.0])(images))
    others = made(tiny, tmp_path / "others.h5", options=dataclasses.replace(OPTIONS, teacher_lr=0.1)).file.path
    line = refusal(lambda: label_source.find_label_teacher(made_set, others, CPU))
    assert line.startswith(f"--teachers {others}: holds other teachers")


def test_either_kind_of_file_serves_where_the_manifest_names_none(tiny, good, tmp_path):
    made_set, images = soft_set(tiny, provided(tiny)), tiny.batch(torch.arange(5))
    recipe = TrainConfig(steps=0, batch=8, lr=0.05, momentum=0.0, weight_decay=0.0, lr_milestones=())
    run = Run(tiny, 1, PLAIN, quiet=True, track="none")
    experts = train_trajectory_file(run, ExpertTraining(recipe), tmp_path / "e.h5", count=1, epochs=1).file.path
    assert "another format (condense.trajectories)" in refusal(
        lambda: label_source.find_label_teacher(made_set, experts, CPU)
    )
    del made_set.manifest["label_source"]
    found, _ = label_source.find_label_teacher(made_set, experts, CPU)
    assert torch.equal(found(images), load_expert_ensemble(experts, CPU)(images))
    found, _ = label_source.find_label_teacher(made_set, good, CPU)
    assert torch.equal(found(images), load_teacher_ensemble(good, CPU)(images))
    assert label_source.find_label_teacher(made_set, None, CPU) == (None, "")


TEACHERS = f"teachers --data tiny.npz --networks {NETWORK},{PLAIN} {SMALL} --precision fp32"


def test_the_command_line_makes_adds_and_keeps(call, tiny, tmp_path):
    result = call(f"{TEACHERS} --count 1 --out a.h5")
    assert result.code == 0, result.err
    assert "2 teachers of tiny, 2 epochs: 2 trained now, 0 were there" in result.out
    assert f"1 {NETWORK}: " in result.out and f"1 {PLAIN}: " in result.out
    assert result.out.count("% of the test images right") == 2
    command = result.out.split("next: condense ")[1].strip()
    assert command.startswith("distill rded --data tiny.npz --ipc 10") and command.endswith("teachers=a.h5")
    result = call(f"{TEACHERS} --count 2 --out a.h5")
    assert "4 teachers of tiny, 2 epochs: 2 trained now, 2 were there" in result.out
    assert result.out.strip().endswith("num_teachers=2")
    assert equal(read_teacher_file(tmp_path / "a.h5").load_state(0), dict(sorted(trained(tiny).state_dict().items())))
    text = call(f"{TEACHERS} --epochs 1 --held-out 0.25").out
    assert str(cache_dir() / "teachers") in text and "1 epochs" in text and "% of the held-out images right" in text


def test_mistakes_on_the_command_line_are_told_together(call, tmp_path):
    result = call("teachers --data none.npz --networks mlp,resnet19-bn --count 0 --held-out 1 teacher_lrs=1")
    assert result.code == 2 and result.err.count("\n") == 1
    for part in ("--count 0: must be at least 1", "--held-out 1: must be", "teacher_lrs=1: no such setting"):
        assert part in result.err
    assert "unknown network 'resnet19-bn'" in call("teachers --data tiny.npz --networks mlp,resnet19-bn").err
    assert "are there already" in call("teachers --data tiny.npz teachers=a.h5").err
    assert "--for dm: this method has no teachers" in call("teachers --data tiny.npz --for dm").err
    assert not list(tmp_path.glob("*.h5*"))


@dataclasses.dataclass(frozen=True)
class Mine(TeacherOptions):
    """Settings of a method of one's own."""

    teacher_epochs: int = 1
    teacher_batch: int = 8
    teacher_lr: float = 0.05
    steps: int = 2

    def __post_init__(self):
        self.check_teachers()


def a_method(task, config, run):
    """Real images, labelled by teachers."""
    from condense.engine import ParamGroup
    from condense.sets import SyntheticOptions, SyntheticSet

    committee = load_or_train_teachers(
        run,
        config.teacher_training(task),
        file=config.teachers,
        count=config.num_teachers,
        architectures=config.architectures(run.network),
        batch_norm=True,
    )
    synthetic = SyntheticSet.create(task, run.ipc, SyntheticOptions(), seed=run.seed, device=run.device)
    for step in run.optimise(synthetic, config.steps, images=ParamGroup(0.1)):
        step.minimise(F.cross_entropy(committee.ensemble()(synthetic.images), synthetic.classes))
    synthetic.label_source = {"teachers": committee.describe(), "weights": None}
    return synthetic


@pytest.fixture
def mine(monkeypatch):
    entry = registry.Method("mine", a_method, Mine, "-", 2024, "hard", 1, "quick-v1", NETWORK, "teachers")
    monkeypatch.setitem(registry.METHODS._entries, "mine", entry)


def test_a_method_of_ones_own_has_teachers(mine, call, tmp_path):
    result = call("teachers --data tiny.npz --for mine --count 2 --out a.h5 --precision fp32")
    assert result.code == 0 and f"2 {NETWORK}: " in result.out, result.err
    command = result.out.split("next: condense ")[1].replace("--ipc 10", "--ipc 1")
    result = call(f"{command} --precision fp32")
    assert result.code == 0 and "before it" not in result.out, result.err
    manifest = condense.load("tiny-mine-ipc1.h5").manifest
    assert manifest["teachers"] == manifest["label_source"]["teachers"]
    assert manifest["teachers"]["path"] == str(tmp_path / "a.h5") == manifest["settings"]["teachers"]
    assert manifest["preparation"] == {}
    assert manifest["cost"]["preparation_seconds"] == manifest["teachers"]["seconds"] > 0
    assert "teachers=PATH" in manifest["command"] and str(tmp_path) not in manifest["command"]


def test_teachers_of_the_cache_serve_the_method(mine, call):
    assert call("teachers --data tiny.npz --for mine --precision fp32").code == 0
    result = call("distill mine --data tiny.npz --ipc 1 --precision fp32")
    assert result.code == 0 and "1 of them were in the cache" in result.out, result.err
    manifest = condense.load("tiny-mine-ipc1.h5").manifest
    assert manifest["teachers"]["path"] is None and manifest["preparation"]["from_cache"] == 1
    needs = json.loads(call("plan mine --data tiny.npz --ipc 1 --json").out)
    assert needs["preparation_seconds"] > 0


def test_a_signal_stops_and_the_same_command_goes_on(call, tmp_path, monkeypatch):
    assert call(f"{TEACHERS} --out whole.h5").code == 0
    write = store.FileStore.write

    def write_and_terminate(store, key, record):
        write(store, key, record)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(store.FileStore, "write", write_and_terminate)
        result = call(f"{TEACHERS} --out a.h5")
    assert result.code == 130 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("condense: stopped while training teachers") and "the same command" in result.err
    assert "1 trained now, 1 were there" in call(f"{TEACHERS} --out a.h5").out
    assert (
        read_teacher_file(tmp_path / "a.h5").manifest["content"]
        == read_teacher_file(tmp_path / "whole.h5").manifest["content"]
    )


def test_two_ranks_make_the_teachers_of_one(call, tmp_path):
    assert call(f"{TEACHERS} --out one.h5").code == 0
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "condense")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *f"{TEACHERS} --out two.h5".split()], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 trained now") == 1
    one, two = (
        {key: entry["sha256"] for key, entry in zip(file.keys, file.entries)}
        for file in (read_teacher_file(tmp_path / name) for name in ("one.h5", "two.h5"))
    )
    assert one == two and not (tmp_path / "two.h5.parts").exists()
