"""Selections whose file holds indices into the real data instead of images."""

import json

import numpy as np
import pytest
import torch
from conftest import change_protocols, tiny_arrays

import condense
from condense import api
from condense.errors import CondenseError
from condense.judge import records

NETWORK = "convnet-d2-w8-in"
KMEANS = {"network": NETWORK, "embedding": "pixels", "protocol": "quick-v1"}


@pytest.fixture
def both(call, tmp_path):
    """The same selection with images and with indices, from ``tiny.npz``."""
    words = f"distill kmeans --data tiny.npz --ipc 2 --network {NETWORK} embedding=pixels protocol=quick-v1"
    assert call(f"{words} --out images.h5 --run-dir runs/images").code == 0
    assert call(f"{words} --out indices.h5 --run-dir runs/indices store=indices").code == 0
    return condense.load(tmp_path / "images.h5"), tmp_path / "indices.h5"


def test_the_file_holds_indices_and_gives_the_same_images(both, tmp_path):
    images, path = both
    indexed = condense.load(path, data=str(tmp_path / "tiny.npz"))
    assert torch.equal(indexed.stored, images.stored) and torch.equal(indexed.images, images.images)
    rows = tiny_arrays()[0][indexed.indices]
    assert np.array_equal(rows, indexed.stored.numpy())
    assert set(indexed.arrays()) == set(images.arrays()) - {"images"} | {"indices"}
    # Six indices of four bytes; the six images of 64 bytes are needed besides the file.
    assert indexed.nbytes()["images"] == 24 and indexed.nbytes()["external"] == 6 * 64
    indexed.save(tmp_path / "again.h5")
    again = condense.load(tmp_path / "again.h5")
    assert again.indices.tolist() == indexed.indices.tolist() and again.sha256() == indexed.sha256() != images.sha256()


def test_without_its_data_the_images_are_refused_in_one_line_and_the_rest_works(both, call):
    _, path = both
    unbound = condense.load(path)
    assert unbound.shape == (1, 8, 8) and unbound.hard_labels().tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(CondenseError, match="holds indices into 'tiny' instead of images; give this data"):
        condense.fit(unbound, NETWORK)
    shown = call("show indices.h5")
    assert shown.code == 0 and "store=indices" in shown.out
    verified = call("verify indices.h5")
    assert verified.code == 0 and "--data DATA checks" in verified.out and "indices  sha256" in verified.out
    for words in ("preview indices.h5 --out a.png", "export indices.h5 folder --to imagefolder"):
        refused = call(words)
        assert refused.code == 2 and refused.err.count("\n") == 1 and "give this data: --data DATA" in refused.err
    assert call("lighten indices.h5 --labels hard --out light.h5").code == 2


def test_with_its_data_it_is_drawn_exported_and_judged_as_the_images(both, call, monkeypatch, tmp_path):
    change_protocols(monkeypatch, tmp_path / "protocols", {"quick-v1"}, steps=4, runs=1)
    for name in ("images", "indices"):
        data = "--data tiny.npz" if name == "indices" else ""
        for words in (
            f"verify {name}.h5 {data}",
            f"preview {name}.h5 --out {name}.png {data}",
            f"export {name}.h5 {name}-folder --to imagefolder {data}",
            f"export {name}.h5 {name}.pt --to pt {data}",
            f"evaluate {name}.h5 --data tiny.npz --controls random-bytes --json {name}.json",
        ):
            done = call(words)
            assert done.code == 0, (words, done.err)
    assert (tmp_path / "images.png").read_bytes() == (tmp_path / "indices.png").read_bytes()
    pngs = [sorted(path.read_bytes() for path in tmp_path.glob(f"{n}-folder/*/*.png")) for n in ("images", "indices")]
    assert pngs[0] == pngs[1] and len(pngs[0]) == 6
    first, second = (records.read_record(tmp_path / f"{name}.json") for name in ("images", "indices"))
    assert first["results"][0]["accuracies"] == second["results"][0]["accuracies"]
    assert second["set"]["bytes"]["stored"] == 24 + 2 + 8  # indices, labels of two bits, mean and std


def test_other_data_are_refused(both, tmp_path):
    images, labels, *rest = tiny_arrays()
    other = condense.task((255 - images, labels, *rest), name="tiny")
    with pytest.raises(CondenseError, match=r"--data tiny: has the fingerprint .* give the data that it was made from"):
        condense.load(both[1], data=other)
    with pytest.raises(CondenseError, match="--data tiny: has the fingerprint"):
        condense.evaluate(condense.load(both[1]), other)


def test_indices_beyond_the_data_and_strange_arrays_are_refused(both, tmp_path, tiny):
    made = condense.load(both[1], data=str(tmp_path / "tiny.npz"))
    made.indices = np.array([0, 1, 2, 3, 4, 36], np.uint32)
    made.save(tmp_path / "far.h5")
    with pytest.raises(CondenseError, match="index 36, but tiny has 36 training images"):
        condense.load(tmp_path / "far.h5", data=str(tmp_path / "tiny.npz"))
    made.indices = np.zeros((6, 2), np.uint32)
    with pytest.raises(CondenseError, match="not a list of numbers"):
        made.save(tmp_path / "square.h5")


def test_indices_are_those_of_the_whole_data_where_the_method_saw_a_part(tmp_path):
    task = condense.task(tiny_arrays(), name="tiny")
    api.scores(task, network=NETWORK, out=tmp_path / "scores.h5", score_epochs=3, score_batch=8)
    images, labels, *rest = tiny_arrays()
    pruned = condense.task((images, labels, *rest), name="tiny", prune=str(tmp_path / "scores.h5"), prune_keep=0.5)
    made = condense.distill("random", pruned, 2, network=NETWORK, store="indices", protocol="quick-v1")
    assert np.array_equal(images[made.indices], made.stored.numpy())
    with pytest.raises(CondenseError, match=r"scores\.h5: is of all train images, but prune= or repeat_small="):
        condense.distill("el2n", pruned, 2, network=NETWORK, scores=str(tmp_path / "scores.h5"))
    with pytest.raises(CondenseError, match=r"prune=.*scores\.h5: students of rs2 draw from all train images"):
        condense.distill("rs2", pruned, 2, network=NETWORK)
    repeated = condense.task((images, labels, *rest), name="tiny", repeat_small=True)
    made = condense.distill("random", repeated, 20, network=NETWORK, store="indices", protocol="quick-v1")
    assert np.array_equal(images[made.indices], made.stored.numpy()) and made.indices.max() < 36


def test_a_finished_run_of_indices_is_only_loaded(both, call):
    resumed = call("resume runs/indices")
    assert resumed.code == 0 and "has ended" in resumed.out
    manifest = json.loads(call("show indices.h5 --json").out)
    assert manifest["settings"]["store"] == "indices"


def test_with_its_data_it_is_joined_lightened_and_refined_as_the_images(both, call):
    for name in ("images", "indices"):
        for line in (
            f"join {name}.h5 {name}.h5 --data tiny=tiny.npz --out joint-{name}.h5",
            f"lighten {name}.h5 --labels hard --data tiny=tiny.npz --out light-{name}.h5",
            f"distill dm --data tiny=tiny.npz --ipc 2 --network {NETWORK} init={name}.h5 steps=1 batch_real=4 "
            f"--out dm-{name}.h5 --run-dir runs/dm-{name}",
        ):
            done = call(line)
            assert done.code == 0, done.err
    for stem in ("joint", "light", "dm"):
        made = [condense.load(f"{stem}-{name}.h5") for name in ("images", "indices")]
        assert torch.equal(made[0].images, made[1].images), stem


SHORT = {"teacher_epochs": 1, "teacher_batch": 8, "precision": "fp32"}


@pytest.mark.parametrize(
    "name, settings",
    [
        ("random", {"labels": "teacher", **SHORT}),
        ("herding", {"labels": "teacher", **SHORT}),
        ("kdprune", SHORT),
        ("rad", {"student_steps": 2, "rounds": 2, **SHORT}),
        ("rs2", {}),
    ],
)
def test_indices_with_labels_of_a_teacher_and_of_repeated_samples(name, settings, tiny, tmp_path, monkeypatch):
    change_protocols(monkeypatch, tmp_path / "protocols", {"quick-v1", "quick-soft-v1"}, steps=4, runs=1)
    protocol = "quick-v1" if name == "rs2" else "quick-soft-v1"
    options = {"network": NETWORK, "protocol": protocol, **settings}
    images, indices = (
        condense.distill(name, tiny, 2, store=store, out=tmp_path / f"{store}.h5", **options)
        for store in ("images", "indices")
    )
    loaded = condense.load(tmp_path / "indices.h5", data=tiny)
    assert torch.equal(loaded.images, images.images) and loaded.indices.tolist() == indices.indices.tolist()
    assert torch.equal(loaded.labels.targets(torch.arange(6)), images.labels.targets(torch.arange(6)))
    results = [condense.evaluate(made, tiny, controls=["random"])["results"] for made in (images, loaded)]
    assert [entry["accuracies"] for entry in results[0]] == [entry["accuracies"] for entry in results[1]]
