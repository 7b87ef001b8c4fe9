"""Damaged files of every kind: none hangs, none raises anything but one line, none is accepted with other content."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import command_line, tiny_arrays
from PIL import Image

import condense
from condense import networks
from condense.benchmarks import damage, suite
from condense.config import load_recipe
from condense.data import Standardise, cache_dir
from condense.errors import CondenseError
from condense.labels import LABEL_KINDS, PoolLabels, StaticLabels, resumable_logits
from condense.networks import build_from_state, state_nbytes

CHECKED = [kind for kind in damage.KINDS if kind != "set-earlier"]


def measured(kinds, count):
    outcomes, failures, _ = damage.measure(kinds, count, seed=1, quiet=True)
    assert not failures, "\n".join(failures)
    assert all(sum(counts.values()) == count for counts in outcomes.values())
    return outcomes


def test_damaged_files_of_some_kinds():
    outcomes = measured(["set-pool", "teachers", "checkpoint", "cached-images", "cached-facts", "view-labels"], 5)
    assert all(outcomes[kind]["refused"] == 5 for kind in ("set-pool", "teachers"))


@pytest.mark.slow
def test_damaged_files_of_all_kinds():
    outcomes = measured(CHECKED, 300)
    assert all(counts["refused"] == 300 for kind, counts in outcomes.items() if kind.startswith(("set-", "experts")))


@pytest.mark.slow
def test_damaged_sets_of_earlier_versions():
    measured(["set-earlier"], 300)


def test_the_table_names_what_failed(capsys, monkeypatch):
    careless = damage.Kind(damage.make_recipe, lambda path: path.read_bytes().hex())
    monkeypatch.setitem(damage.KINDS, "recipe", careless)
    assert damage.failing_outcomes("recipe") == ("other content", "exception", "hang or crash")
    with pytest.raises(SystemExit):
        damage.main(["--kinds", "nothing"])
    assert "--kinds nothing: unknown" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"recipe", bytes(range(40))])
def test_every_damage_changes_the_bytes(content):
    generator = np.random.default_rng(0)
    changes = [damage.damaged(content, generator) for _ in range(100)]
    assert all(changed != content for changed, _ in changes)
    assert {what.split()[0] for _, what in changes} == {"flip", "cut", "zero", "copy", "insert"}


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", damage.LABEL_KINDS)
def test_labels_that_are_not_finite_are_refused(kind):
    arrays = damage.make_labels(kind).arrays()
    read = LABEL_KINDS.get(kind).from_arrays
    assert len(read(arrays, damage.CLASSES)) == damage.IMAGES
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            for value in (np.nan, np.inf):
                spoiled = array.copy()
                spoiled.flat[-1] = value
                with pytest.raises(CondenseError):
                    read({**arrays, name: spoiled}, damage.CLASSES)


def test_values_that_overflow_when_they_are_decoded_are_refused():
    arrays = damage.make_labels("lowrank").arrays()
    with pytest.raises(CondenseError, match="labels/scale gives logits that are not finite"):
        LABEL_KINDS.get("lowrank").from_arrays({**arrays, "scale": np.full_like(arrays["scale"], 3e38)}, damage.CLASSES)
    with pytest.raises(CondenseError, match=r"temperature=0\.1: the static logits divided by it are not finite"):
        StaticLabels(torch.full((2, 3), 1e38), 0, temperature=0.1)


@pytest.mark.parametrize(("name", "value"), [("norms.0.running_var", -1.0), ("classify.weight", 3e38)])
def test_teachers_whose_logits_are_not_finite_are_refused(name, value):
    arrays = damage.make_labels("teacher").arrays()
    spoiled = {**arrays, f"member0.{name}": np.full_like(arrays[f"member0.{name}"], value)}
    with pytest.raises(CondenseError, match="the teachers' logits are not finite"):
        LABEL_KINDS.get("teacher").from_arrays(spoiled, damage.CLASSES)


def test_a_pool_claims_no_more_records_than_memory_holds():
    arrays = damage.make_labels("pool").arrays()
    with pytest.raises(CondenseError, match="out of range for 10000000 labelled epochs"):
        PoolLabels.from_arrays({**arrays, "of": np.array([10**7])}, damage.CLASSES)


@pytest.mark.parametrize("shape", [[1, 8], [1, 8, 10**9], [1, 8, 8.5], [1, 8, -8], "1x8x8"])
def test_the_image_shape_of_teachers_is_checked(shape):
    arrays = damage.make_labels("teacher").arrays()
    text = json.dumps({"names": [damage.NETWORK], "shape": shape}).encode()
    with pytest.raises(CondenseError, match="labels/networks does not name the teachers"):
        LABEL_KINDS.get("teacher").from_arrays({**arrays, "networks": np.frombuffer(text, np.uint8)}, damage.CLASSES)


def test_teachers_of_other_images_than_those_of_the_set_are_not_built(tmp_path):
    task = condense.task("digits")
    manifest = {"name": "digits/x-ipc1", "dataset": "digits", "classes": list(task.classes), "ipc": 1}
    manifest |= {"space": "training", "decode": [], "method": "x", "network": "mlp"}
    labels = damage.make_labels("teacher")
    made = condense.DistilledSet(
        torch.zeros(10, 3, 16, 16), labels, Standardise(torch.zeros(3), torch.ones(3)), manifest
    )
    with pytest.raises(CondenseError, match="its images are 3x16x16, but its labels belong to images of another shape"):
        condense.load(made.save(tmp_path / "a.h5"))


@pytest.mark.parametrize("name", ["convnet-d6-w9999-none", "torchvision:resnet18", "mlp"])
def test_a_network_is_compared_with_its_weights_before_it_takes_memory(name):
    state = networks.build_network("convnet-d1-w4-in", (1, 64, 64), 3).state_dict()
    network, misfit = build_from_state(name, (1, 64, 64), 3, state)
    assert "missing" in misfit and "unknown" in misfit
    assert name.startswith("torchvision") or all(value.is_meta for value in network.state_dict().values())


def test_a_network_must_fit_into_memory():
    with pytest.raises(CondenseError, match=r"network mlp: its weights for 1x65536x65536 images take .* of memory are"):
        networks.check_network_memory("mlp", (1, 65536, 65536), 3)
    networks.check_network_memory("mlp", (1, 8, 8), 3)
    networks.check_network_memory("torchvision:resnet18", (3, 32, 32), 3)


def test_a_network_gets_the_state_that_fits():
    state = networks.build_network("resnet18-bn", (1, 16, 16), 3).state_dict()
    network, misfit = build_from_state("resnet18-bn", (1, 16, 16), 3, state)
    assert not misfit and state_nbytes(network) > 1e7
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


# -- unfinished work and caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_order", [True, False])
def test_labelling_continues_before_the_first_damaged_record(tmp_path, in_order):
    def opened():
        return resumable_logits(tmp_path / "a.npy", tmp_path / "a.json", ["x"], (4, 5, 3), in_order=in_order)

    values = torch.randn(4, 5, 3).half().numpy()
    with opened() as where:
        for epoch in range(3):
            where["into"][epoch] = values[epoch]
            where["into"].flush()
            where["report"](epoch + 1)
    with opened() as where:
        assert where["start"] == 3
    content = bytearray((tmp_path / "a.npy").read_bytes())
    content[128 + 30 * 2 + 4] ^= 1  # in record 2 of 4, each of 30 bytes
    (tmp_path / "a.npy").write_bytes(content)
    with opened() as where:
        assert where["start"] == (2 if in_order else 0)


def test_unfinished_labels_of_earlier_versions_continue(tmp_path):
    with resumable_logits(tmp_path / "a.npy", tmp_path / "a.json", ["x"], (4, 5, 3)) as where:
        where["report"](1)
    progress = json.loads((tmp_path / "a.json").read_text())
    del progress["crc32"]
    (tmp_path / "a.json").write_text(json.dumps(progress))
    with resumable_logits(tmp_path / "a.npy", tmp_path / "a.json", ["x"], (4, 5, 3)) as where:
        assert where["start"] == 1


def test_a_damaged_score_is_measured_again(tiny):
    made = condense.distill("random", tiny, 1, network="mlp")
    options = {"networks": "mlp", "runs": 1, "protocol": "quick-v1", "controls": []}

    def accuracy():
        return condense.evaluate(made, tiny, **options)["results"][0]["accuracies"][0]

    expected = accuracy()
    (path,) = (cache_dir() / "students").rglob("*.json")
    entry = json.loads(path.read_text())
    for change in ({"accuracy": 0.123}, {"seconds": -1}, {"sha256": "0" * 64}, {"accuracy": float("nan")}):
        path.write_text(json.dumps({**entry, **change}))
        assert accuracy() == expected
        assert json.loads(path.read_text())["accuracy"] == expected
    del entry["sha256"]  # earlier versions stored none
    path.write_text(json.dumps(entry))
    assert accuracy() == expected and "sha256" not in json.loads(path.read_text())


# -- names and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["a", "b\udcff", "c"], r"the class name 'b\\udcff' is not UTF-8; rename it"),
        (["a", "", "c"], "a class has no name"),
    ],
)
def test_class_names_that_no_set_can_store_are_refused_before_the_work(classes, words):
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    with pytest.raises(CondenseError, match=words):
        condense.task({**dict(zip(keys, tiny_arrays())), "classes": classes})


def test_a_class_folder_in_another_encoding_is_refused(tmp_path, monkeypatch, capsys):
    try:
        for name in (b"\xff\xfe", b"b"):
            folder = bytes(tmp_path) + b"/d/" + name
            os.makedirs(folder)
            for number in range(4):
                with open(folder + b"/%d.png" % number, "wb") as file:
                    Image.new("L", (8, 8), number).save(file, "PNG")
    except OSError:
        pytest.skip("the file system takes only UTF-8 names")
    monkeypatch.chdir(tmp_path)
    end = command_line("distill random --data d --ipc 1 --network mlp --out n.h5", capsys)
    assert end.code == 2 and "is not UTF-8; rename it" in end.err and not (tmp_path / "n.h5").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"a: 1\n" * 300_000, "larger than"),
        (
            b"name: x\nprotocol: quick-v1\nruns: 1\nseeds: [0]\nnetworks: [own]\ntasks: digits\n",
            "tasks",
        ),
    ],
)
def test_files_of_settings_are_checked(tmp_path, content, words):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(CondenseError, match=words):
        suite.get_suite(str(tmp_path / "x.yaml"))
    if b"name" not in content:
        with pytest.raises(CondenseError, match=f"--recipe .*{words}"):
            load_recipe(str(tmp_path / "x.yaml"))
