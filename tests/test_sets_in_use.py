"""Sets in use: beside real images, joined, some of their classes, as initial images; runs with one's own network."""

import numpy as np
import pytest
import torch
from conftest import Killed, killed_after, tiny_arrays
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

import condense
from condense.errors import CondenseError
from condense.labels import HardLabels, SoftLabels
from condense.sets import DistilledSet

NETWORK = "convnet-d2-w8-in"
SETTINGS = {"network": NETWORK, "precision": "fp32", "steps": 3, "batch_real": 6}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))


class WiderNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(512, 3)

    forward = Net.forward


@pytest.fixture
def made(tiny):
    return condense.distill("dm", tiny, 2, **SETTINGS)


# -- beside real images -----------------------------------------------------------------------------------------------


def test_hard_labels_are_ints_as_in_torchvision(made, tiny):
    image, label = made[3]
    assert type(label) is int and label == 1 and torch.equal(image, made.images[3])
    real = [(torch.zeros(1, 8, 8), 2)] * 4
    batches = list(DataLoader(ConcatDataset([made, real]), batch_size=5))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    soft = DistilledSet(made.stored, SoftLabels(torch.eye(3).repeat_interleave(2, 0)), made.transform, made.manifest)
    assert soft[0][1].shape == (3,) and soft[0][1].argmax() == 0


# -- joined sets ------------------------------------------------------------------------------------------------------


def test_sets_of_different_classes_are_joined(tiny, tmp_path):
    parts = [condense.distill("dm", tiny.select_classes(names), 2, **SETTINGS) for names in (("0", "2"), ("1", "2"))]
    joint = condense.join(*parts)
    assert joint.classes == ("0", "2", "1") and len(joint) == 8 and joint.manifest["ipc"] == 4
    assert joint.hard_labels().tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    torch.testing.assert_close(joint.images[:4], parts[0].images)
    torch.testing.assert_close(joint.images[[6, 7, 4, 5]], parts[1].images)
    renamed = condense.join(*parts, class_map={"1": "0", "2": "other"})
    assert renamed.classes == ("0", "2", "other") and renamed.hard_labels().tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    joint.save(tmp_path / "joint.h5")
    loaded = condense.load(tmp_path / "joint.h5")
    assert loaded.sha256() == joint.sha256() and not condense.fit(loaded, NETWORK).training


def test_sets_are_joined_from_the_command_line(tiny, call, tmp_path):
    for number, names in enumerate((("0", "2"), ("1", "2"))):
        condense.distill("random", tiny.select_classes(names), 2, network="mlp").save(tmp_path / f"{number}.h5")
    assert "joined 8 images of 3 classes" in call("join 0.h5 1.h5 --out joint.h5").out
    assert "good" in call("verify joint.h5").out
    assert "joint.h5 exists" in call("join 0.h5 1.h5 --out joint.h5").err


def test_equal_storage_is_kept(tiny):
    parts = [condense.distill("random", tiny, ipc, network=NETWORK, seed=ipc) for ipc in (1, 2)]
    joint = condense.join(*parts)
    assert joint.stored.dtype == torch.uint8 and joint.hard_labels().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_sets_that_cannot_be_joined(made, tiny):
    soft = DistilledSet(made.stored, SoftLabels(torch.eye(3).repeat_interleave(2, 0)), made.transform, made.manifest)
    with pytest.raises(CondenseError, match="soft labels cannot be joined; convert them with: condense lighten"):
        condense.join(made, soft)
    small = condense.distill("random", condense.task(tiny_arrays(size=10), name="small"), 1, network="mlp")
    with pytest.raises(CondenseError, match="its images are 1x10x10, those of tiny/dm-ipc2 1x8x8"):
        condense.join(made, small)
    with pytest.raises(CondenseError, match="class_map: '9' is no class of"):
        condense.join(made, made, class_map={"9": "x"})
    white = condense.distill("random", condense.task(tiny_arrays(), name="white", zca=True), 1, network="mlp")
    with pytest.raises(CondenseError, match="was whitened in another way"):
        condense.join(made, white)


# -- some classes -----------------------------------------------------------------------------------------------------


def test_some_classes_of_a_task(tiny):
    some = tiny.select_classes(["2", "0"])
    assert some.classes == ("2", "0") and (len(some.train), len(some.test)) == (24, 12)
    assert some.fingerprint != tiny.fingerprint and some.fingerprint == tiny.select_classes(["2", "0"]).fingerprint
    whole = tiny.raw(torch.from_numpy(tiny.class_ids(2)))
    assert torch.equal(some.raw(torch.from_numpy(some.class_ids(0))), whole)
    for names, message in ((["2", "9"], "'9' is no class of tiny"), (["2"], "at least two"), (["2", "2"], "different")):
        with pytest.raises(CondenseError, match=message):
            tiny.select_classes(names)


def test_students_of_some_classes(made, tiny, call, tmp_path):
    options = {"networks": NETWORK, "runs": 1, "protocol": "quick-v1", "precision": "fp32"}
    record = condense.evaluate(made, tiny, classes=["2", "0"], **options)
    assert record["data"]["same"] and 0 < record["results"][0]["mean"] <= 1
    assert "--classes 2,0" in record["command"]
    reference = condense.evaluate(made.select_classes(["2", "0"]), tiny.select_classes(["2", "0"]), **options)
    assert record["results"][0]["accuracies"] == reference["results"][0]["accuracies"]
    made.save(tmp_path / "set.h5")
    line = f"evaluate set.h5 --data tiny.npz --classes 2,0 --runs 1 --protocol quick-v1 --networks {NETWORK}"
    assert call(line).code == 0
    assert "classes: '9' is no class of tiny/dm-ipc2" in call(line.replace("2,0", "2,9")).err


# -- initial images ---------------------------------------------------------------------------------------------------


def test_a_set_is_the_start_of_another(made, tiny, tmp_path):
    made.save(tmp_path / "a.h5")
    settings = {**SETTINGS, "lr_img": 0.0, "init": str(tmp_path / "a.h5")}
    again = condense.distill("dm", tiny, 2, **settings)
    torch.testing.assert_close(again.images, made.images)
    moved = condense.distill("dc", tiny, 2, **{**SETTINGS, "init": str(tmp_path / "a.h5")})
    assert not torch.equal(moved.images, made.images) and "init=PATH.h5" in moved.manifest["command"]
    torch.testing.assert_close(moved.images, made.images, atol=0.5, rtol=0)


@pytest.mark.parametrize(
    ("ipc", "settings", "message"),
    [
        (1, {}, r"has another images per class \(2, not 1\)"),
        (2, {"factor": 2}, r"has another factor \(1, not 2\)"),
        (2, {"init": "none.h5"}, "no such file"),
    ],
)
def test_a_set_that_is_no_start(made, tiny, tmp_path, ipc, settings, message):
    made.save(tmp_path / "a.h5")
    with pytest.raises(CondenseError, match=message):
        condense.distill("dm", tiny, ipc, **{**SETTINGS, "init": str(tmp_path / "a.h5"), **settings})
    other = condense.task(tiny_arrays(classes=2), name="other")
    with pytest.raises(CondenseError, match=r"has another classes|has other classes|another classes"):
        condense.distill("dm", other, 2, **{**SETTINGS, "init": str(tmp_path / "a.h5")})


# -- interrupted runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run with a network and data that were given in Python, killed after two of six steps."""
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    monkeypatch.chdir(tmp_path)
    arguments = {**SETTINGS, "network": Net, "steps": 6, "track": "none"}
    with pytest.raises(Killed), killed_after(2):
        condense.distill("dm", condense.task(tiny_arrays(), name="tiny"), 2, run_dir="run", out="a.h5", **arguments)
    return arguments


def test_the_same_call_continues(interrupted, tiny):
    whole = condense.distill("dm", tiny, 2, **interrupted)
    made = condense.distill("dm", tiny, 2, run_dir="run", out="a.h5", **interrupted)
    assert made.sha256() == whole.sha256() == condense.load("a.h5").sha256()
    with pytest.raises(CondenseError, match=r"a\.h5 exists"):  # finished
        condense.distill("dm", tiny, 2, run_dir="run", out="a.h5", **interrupted)


def test_resume_continues(interrupted, tiny):
    whole = condense.distill("dm", tiny, 2, **interrupted)
    call = r"call condense\.resume\('run', network=\.\.\., task=\.\.\.\)"
    for given in ({}, {"network": Net}, {"task": tiny}):
        with pytest.raises(CondenseError, match=call):
            condense.resume("run", **given)
    with pytest.raises(CondenseError, match="the run began with python:Net"):
        condense.resume("run", network=WiderNet, task=tiny)
    other = condense.task(tiny_arrays(seed=1), name="tiny")
    with pytest.raises(CondenseError, match="the data changed since the run began"):
        condense.resume("run", network=Net, task=other)
    assert condense.resume("run", network=Net, task=tiny).sha256() == whole.sha256()


def test_a_network_with_other_layers_is_refused(interrupted, tiny):
    changed = type("Net", (WiderNet,), {})
    changed.__qualname__ = "Net"
    with pytest.raises(CondenseError, match="network=python:Net: has other layers than when the run began"):
        condense.resume("run", network=changed, task=tiny)


def test_other_arguments_do_not_continue(interrupted, tiny):
    with pytest.raises(CondenseError, match=r"run holds a run; resume with: condense\.resume\('run', network=\.\.\., "):
        condense.distill("dm", tiny, 2, run_dir="run", out="b.h5", **{**interrupted, "steps": 7})


# -- public teachers --------------------------------------------------------------------------------------------------


def test_a_set_with_a_public_teacher_loads(tmp_path, monkeypatch):
    """The teacher in the labels includes the normalisation that its weights need."""
    torchvision = pytest.importorskip("torchvision")
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with condense.rng.seeded("weights"):
        net = torchvision.models.shufflenet_v2_x0_5()
    torch.save(net.state_dict(), folder / weights.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (1000, 1, 32, 32), dtype=np.uint8), np.arange(1000)
    task = condense.task((images, labels, images, labels), name="thousand")
    name = "torchvision:shufflenet_v2_x0_5"
    settings = {"teachers": name, "labels": "teacher", "pool": 1, "crops": 1, "precision": "fp32"}
    made = condense.distill("rded", task, 1, network=name, out=tmp_path / "a.h5", **settings)
    loaded = condense.load(tmp_path / "a.h5")
    assert loaded.sha256() == made.sha256() and loaded.labels.names == (name,)
    views, targets = loaded.labels.training_batch(loaded.training_images()[0], torch.arange(4), 0)
    own_views, own_targets = made.labels.training_batch(made.training_images()[0], torch.arange(4), 0)
    assert torch.equal(views, own_views)
    torch.testing.assert_close(targets, own_targets)


def test_a_set_that_could_not_be_loaded_is_not_written(made, tmp_path):
    made.manifest["ipc"] = 2
    made.labels = HardLabels(torch.tensor([0, 1]), 3)  # fewer than images
    with pytest.raises(CondenseError, match=r"a\.h5: not written, because it could not be read back \(6 images but 2"):
        made.save(tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


# -- more steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dm", "mtt"])
def test_a_finished_run_is_given_more_steps(tmp_path, name):
    np.savez(tmp_path / "tiny.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), tiny_arrays())))
    task = condense.task(str(tmp_path / "tiny.npz"))
    settings = {"network": NETWORK, "precision": "fp32", "track": "none"}
    settings |= {"batch_real": 6} if name == "dm" else {"num_experts": 1, "max_start_epoch": 1, "syn_steps": 2}
    whole = condense.distill(name, task, 2, steps=5, **settings)
    condense.distill(name, task, 2, steps=3, run_dir=tmp_path / "run", out=tmp_path / "a.h5", **settings)
    longer = condense.resume(tmp_path / "run", steps=5)
    assert longer.sha256() == whole.sha256() == condense.load(tmp_path / "a.h5").sha256()
    assert longer.manifest["steps_before"] == [3] and longer.manifest["settings"]["steps"] == 5
    assert condense.resume(tmp_path / "run").sha256() == whole.sha256()
    with pytest.raises(CondenseError, match="steps=5: the run has 5 steps; give more"):
        condense.resume(tmp_path / "run", steps=5)


def test_schedules_that_depend_on_the_steps_are_not_extended(tmp_path):
    np.savez(tmp_path / "tiny.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), tiny_arrays())))
    settings = {"network": "convnet-d2-w8-bn", "teacher_epochs": 1, "label_epochs": 1, "precision": "fp32"}
    condense.distill(
        "sre2l", condense.task(str(tmp_path / "tiny.npz")), 1, steps=2, run_dir=tmp_path / "run", **settings
    )
    with pytest.raises(CondenseError, match="steps=3: a schedule of sre2l depends on the number of steps"):
        condense.resume(tmp_path / "run", steps=3)
    assert condense.resume(tmp_path / "run").manifest["settings"]["steps"] == 2
