"""prune=SCORES.h5: methods distil from a share of the train images, and everything else has all of them."""

import numpy as np
import pytest
import torch
from conftest import Killed, command_line, killed_after, tiny_archive

import condense
from condense import api, commands, jobs
from condense.errors import CondenseError
from condense.judge import evaluation
from condense.selection import read_score_table

NETWORK = "convnet-d2-w8-in"
SETTINGS = {"steps": 3, "batch_real": 4}


@pytest.fixture
def archive(tmp_path):
    """The path of the tiny data, whose scores are beside it."""
    path = tiny_archive(tmp_path)
    scores = tmp_path / "scores.h5"
    api.scores(condense.task(str(path)), network=NETWORK, out=scores, score_epochs=2, score_batch=8)
    return path


def pruned(archive, **changes):
    options = {"prune": str(archive.parent / "scores.h5"), "prune_keep": 0.25, **changes}
    return condense.task(str(archive), **options)


@pytest.mark.parametrize(("order", "sign"), [("easiest", 1), ("hardest", -1)])
def test_each_class_keeps_its_share(archive, order, sign):
    real = pruned(archive, prune_order=order, prune_score="loss")
    table, kept = read_score_table(archive.parent / "scores.h5"), jobs.prune_task(real)
    assert kept.counts.tolist() == [3, 3, 3] and len(kept.test) == len(real.test)
    assert kept.fingerprint != real.fingerprint == condense.task(str(archive)).fingerprint
    for c in range(3):
        best = (sign * table.columns["loss"][12 * c : 12 * c + 12]).argsort()[:3]
        expected = {real.train.images[12 * c + int(i)].tobytes() for i in best}
        assert {kept.raw(torch.tensor([i]))[0].numpy().tobytes() for i in kept.class_ids(c)} == expected
    assert jobs.prune_task(pruned(archive, prune_keep=0.001)).counts.tolist() == [1, 1, 1]
    everything = condense.task(str(archive))
    assert jobs.prune_task(everything) is everything


def test_a_method_sees_the_share_only(archive):
    made = condense.distill("random", pruned(archive), 3, network=NETWORK, protocol="quick-v1")
    kept = jobs.prune_task(pruned(archive))
    pool = {image.numpy().tobytes() for image in kept.raw(torch.arange(9))}
    assert {image.numpy().tobytes() for image in made.stored} == pool
    assert made.manifest["data"]["fingerprint"] == condense.task(str(archive)).fingerprint
    assert "prune=PATH prune_keep=0.25" in made.manifest["command"]
    with pytest.raises(CondenseError, match="--ipc 4: class '0' of tiny has only 3 images"):
        condense.distill("random", pruned(archive), 4, network=NETWORK)


def test_students_and_controls_have_all_images(archive, three_steps):
    made = condense.distill("dm", pruned(archive), 1, network=NETWORK, protocol="quick-v1", **SETTINGS)
    assert "prune" not in evaluation.data_options(made)
    record = condense.evaluate(made, pruned(archive), runs=1, controls=["full"])
    plain = condense.evaluate(made, condense.task(str(archive)), runs=1, controls=["full"])
    assert [e["accuracies"] for e in record["results"]] == [e["accuracies"] for e in plain["results"]]
    assert "prune" not in record["command"] and commands.data_argument(pruned(archive)) == "tiny=PATH"


def test_a_resumed_run_needs_the_same_share(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    whole = condense.distill("dm", pruned(archive), 1, network=NETWORK, **SETTINGS)
    files = {"run_dir": tmp_path / "run", "out": tmp_path / "a.h5"}
    with pytest.raises(Killed), killed_after(1):
        condense.distill("dm", pruned(archive), 1, network=NETWORK, **files, **SETTINGS)
    scores = (tmp_path / "scores.h5").read_bytes()
    task = condense.task(str(archive))
    api.scores(task, network=NETWORK, out=tmp_path / "scores.h5", seed=3, force=True, score_epochs=2, score_batch=8)
    with pytest.raises(CondenseError, match=r"scores\.h5: holds other scores than when the run began"):
        jobs.resume(tmp_path / "run")
    (tmp_path / "scores.h5").write_bytes(scores)
    assert jobs.resume(tmp_path / "run").sha256() == whole.sha256()


def test_networks_of_a_method_train_on_the_share(archive):
    settings = {"teacher_epochs": 1, "teacher_batch": 4}
    shared = api.teachers(pruned(archive), networks="convnet-d1-w4-in", out=archive.parent / "a.h5", **settings)
    assert shared.file.manifest["fingerprint"] == jobs.prune_task(pruned(archive)).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_keep": 0.5}, "prune= and prune_keep= go together"),
        ({"prune": "x.h5"}, "prune= and prune_keep= go together"),
        ({"prune": "x.h5", "prune_keep": 0.0}, "prune_keep=0: must be more than 0"),
        ({"prune": "x.h5", "prune_keep": 0.5, "prune_order": "easy"}, "prune_order=easy: unknown; did you mean"),
    ],
)
def test_wrong_options(archive, options, message):
    with pytest.raises(CondenseError, match=message):
        condense.task(str(archive), **options)


def test_wrong_tables(archive, tmp_path):
    with pytest.raises(CondenseError, match=r"missing\.h5: no such file"):
        condense.distill("random", pruned(archive, prune=str(tmp_path / "missing.h5")), 1, network=NETWORK)
    with pytest.raises(CondenseError, match="score fame: the table has none"):
        condense.distill("random", pruned(archive, prune_score="fame"), 1, network=NETWORK)
    with np.load(archive) as file:
        arrays = dict(file)
    arrays["train_images"] = arrays["train_images"][:, :, ::-1]
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(CondenseError, match=r"prune=.*scores\.h5: scores of other data \(tiny, 36 images\)"):
        condense.distill("random", pruned(tmp_path / "other.npz"), 1, network=NETWORK)


def test_the_command_line(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = f"distill rded --data tiny.npz --ipc 1 --network {NETWORK} prune=scores.h5 prune_keep=0.5 pool=5 crops=1 "
    done = command_line(words + "teacher_epochs=1 teacher_batch=8 protocol=quick-soft-v1", capsys)
    assert done.code == 0, done.err
    assert condense.load(tmp_path / "tiny-rded-ipc1.h5").manifest["data"]["options"]["prune_keep"] == 0.5
