"""Scores of images: each from values that can be computed by hand, the table of a training, and its file."""

import dataclasses
import math

import h5py
import numpy as np
import pytest
import torch
from conftest import command_line, tiny_archive, tiny_arrays
from pretraining_seams import forbid_training

import condense
from condense import api, hdf5
from condense.data import cache_dir
from condense.engine import Run
from condense.errors import CondenseError
from condense.pretraining import ScoreOptions, load_or_train_scores, make_student
from condense.selection import (
    COLUMNS,
    SCORES_FORMAT,
    dual_scores,
    forgetting_counts,
    graph_of_neighbours,
    image_scores,
    read_score_table,
    summarise,
    write_score_table,
)
from condense.training import train

NETWORK = "convnet-d2-w8-in"
SMALL = {"score_epochs": 3, "score_batch": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table of the tiny data, and its file."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CONDENSE_CACHE", str(tmp_path_factory.mktemp("cache")))
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("table") / "scores.h5"
    table = api.scores(condense.task(tiny_arrays(), name="tiny"), network=NETWORK, out=path, precision="fp32", **SMALL)
    patch.undo()
    return table, path


# -- the equations ----------------------------------------------------------------------------------------------------


def test_scores_of_one_pass():
    """Probabilities 1/2, 1/4, 1/4 of an image of class 1, and certainty of one of class 0."""
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0], [60.0, 0.0, 0.0]])
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    scores = image_scores(logits, features, torch.tensor([1, 0]))
    expected = {
        "target": [1 / 4, 1],
        "correct": [0, 1],
        "el2n": [math.sqrt(1 / 4 + 9 / 16 + 1 / 16), 0],
        "grand": [math.sqrt(7 / 8 * 26), 0],
        "aum": [-math.log(2), 60],
        "loss": [math.log(4), 0],
        "entropy": [1.5 * math.log(2), 0],
        "margin": [1 / 4, 1],
        "leastconf": [1 / 2, 1],
    }
    assert set(scores) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], torch.tensor(values, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_grand_is_the_norm_of_the_gradient_of_the_last_layer():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(5, 4, generator=generator), torch.tensor([0, 2, 1, 1, 0])
    layer = torch.nn.Linear(4, 3)
    scores = image_scores(layer(features).detach(), features, labels)
    for i in range(5):
        loss = torch.nn.functional.cross_entropy(layer(features[i : i + 1]), labels[i : i + 1])
        gradients = torch.autograd.grad(loss, layer.parameters())
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(scores["grand"][i], norm, rtol=1e-5, atol=1e-6)


def test_forgetting_of_a_scripted_history():
    history = torch.tensor(
        [  # always right, never right, learned late, forgotten once, forgotten twice
            [1, 0, 0, 1, 1],
            [1, 0, 0, 0, 0],
            [1, 0, 1, 0, 1],
            [1, 0, 1, 1, 0],
        ]
    )
    assert forgetting_counts(history).tolist() == [0, 4, 0, 1, 2]


def test_dual_is_difficulty_times_deviation_in_each_window():
    target = torch.tensor([[0.0, 0.5], [1.0, 0.5], [1.0, 0.5]])
    # windows (0, 1) and (1, 1): (1 - 1/2) * sqrt(1/2) and 0
    torch.testing.assert_close(dual_scores(target, 2), torch.tensor([math.sqrt(0.5) / 4, 0.0]))
    whole = (1 - 2 / 3) * math.sqrt(1 / 3)
    torch.testing.assert_close(dual_scores(target, 10), torch.tensor([whole, 0.0]))


def test_columns_take_their_epochs():
    names = ("target", "correct", "el2n", "grand", "aum", "loss", "entropy", "margin", "leastconf")
    history = {name: torch.tensor([[1.0], [2.0], [4.0], [8.0]]) for name in names}
    columns = summarise(history, early=2, window=2, dual_epochs=3)
    assert set(columns) == set(COLUMNS)
    assert [float(columns[name]) for name in ("el2n", "grand", "loss", "entropy", "aum")] == [2, 2, 8, 8, 3.75]
    assert float(columns["target"]) == pytest.approx(7 / 3)
    assert float(summarise(history, early=9, window=2, dual_epochs=4)["el2n"]) == 8  # no such epoch: the last one


def test_neighbours_are_those_of_all_distances():
    features = torch.randn(37, 6, generator=torch.Generator().manual_seed(1))
    nearest, distances = graph_of_neighbours(features, 4, chunk=10)
    table = torch.cdist(features, features).fill_diagonal_(torch.inf)
    expected = table.sort(1)
    assert torch.equal(nearest, expected.indices[:, :4])
    torch.testing.assert_close(distances, expected.values[:, :4], rtol=1e-4, atol=1e-4)


# -- the training -----------------------------------------------------------------------------------------------------


def a_run(task, **options):
    return Run(task, 1, NETWORK, quiet=True, track="none", **options)


def test_the_table_is_that_of_a_plain_training(tiny, made):
    """The same network, trained by hand and asked after each epoch."""
    table, _ = made
    run, options = a_run(tiny), ScoreOptions(**SMALL)
    student, labels = make_student(run, tiny, NETWORK, "scores", 0), torch.as_tensor(tiny.train.labels)
    history = []

    def watch(_, step, state):
        was_training = student.network.training
        student.network.eval()
        with torch.no_grad():
            features = student.network.embed(tiny.batch(torch.arange(36)))
            history.append(image_scores(student.network.classify(features), features, labels))
        student.network.train(was_training)

    recipe = dataclasses.replace(options.score_recipe(tiny), steps=3 * 5)
    train([student], recipe, device=torch.device("cpu"), watch=watch, watch_every=5)
    expected = summarise({name: torch.stack([h[name] for h in history]) for name in history[0]}, 10, 10, 3)
    for name, values in expected.items():
        torch.testing.assert_close(table.columns[name], values, rtol=1e-4, atol=1e-5, msg=name)
    assert len(table) == 36 and table.manifest["accuracies"] == [float(history[-1]["correct"].mean().round(decimals=6))]
    assert table.neighbours.shape == (36, 10) and not (table.neighbours == torch.arange(36)[:, None]).any()


def test_networks_are_cached_and_averaged(tiny, monkeypatch):
    one = load_or_train_scores(a_run(tiny), ScoreOptions(**SMALL))
    two = load_or_train_scores(run := a_run(tiny), ScoreOptions(**SMALL, score_networks=2))
    assert run.notes["preparation"]["from_cache"] == 1 and run.notes["scores"]["networks"] == 2
    assert not torch.equal(one.columns["loss"], two.columns["loss"])
    forbid_training(monkeypatch)
    again = load_or_train_scores(a_run(tiny), ScoreOptions(**SMALL, score_networks=2, score_window=2))
    assert torch.equal(again.columns["loss"], two.columns["loss"])  # other windows need no other networks
    assert not torch.equal(again.columns["dual"], two.columns["dual"])


def test_a_history_of_other_data_in_the_cache_is_refused(tiny):
    load_or_train_scores(a_run(tiny), ScoreOptions(**SMALL))
    (path,) = (cache_dir() / "histories").glob("*/0.pt")
    record = torch.load(path)
    record["history"]["loss"] = record["history"]["loss"][:, :5].clone()
    torch.save(record, path)
    with pytest.raises(CondenseError, match="histories: a history is not of this data"):
        load_or_train_scores(a_run(tiny), ScoreOptions(**SMALL))


def test_a_network_that_diverges_is_reported(tiny):
    with pytest.raises(CondenseError, match="lower score_lr, now 1e"):
        load_or_train_scores(a_run(tiny), ScoreOptions(**SMALL, score_lr=1e30, score_augment="none"))


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_read_back(made, tiny):
    table, path = made
    read = read_score_table(path)
    assert read.manifest == table.manifest
    assert all(torch.equal(read.columns[name], values) for name, values in table.columns.items())
    assert torch.equal(read.neighbours, table.neighbours) and torch.equal(read.distances, table.distances)
    read.check_fits(tiny, "scores.h5")
    assert torch.equal(read.difficulty("aum"), -table.columns["aum"])
    assert torch.equal(read.difficulty("el2n"), table.columns["el2n"])


def test_a_table_of_other_data_is_refused(made):
    other = condense.task(tiny_arrays(seed=1), name="other")
    run, options = a_run(other), ScoreOptions(scores=str(made[1]))
    with pytest.raises(CondenseError, match=r"scores of other data \(tiny, 36 images\), not of other with 36"):
        load_or_train_scores(run, options)


def rewritten(path, target, change):
    """A copy of a table with another manifest and whole digests."""
    with hdf5.open_hdf5(path, SCORES_FORMAT) as (file, manifest):
        arrays = {name: file[name][()] for name in (*(f"scores/{n}" for n in manifest["columns"]), "graph/neighbours")}
        arrays["graph/distances"] = file["graph/distances"][()]
    change(arrays, manifest)
    with hdf5.create_hdf5(target, SCORES_FORMAT) as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values)
        hdf5.write_manifest(file, SCORES_FORMAT, manifest)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: m.update(images=10**9), "'scores/el2n' is not what the manifest says"),
        (lambda a, m: a.update({"scores/loss": a["scores/loss"][:5]}), "'scores/loss' is not what the manifest says"),
        (lambda a, m: a.update({"scores/loss": a["scores/loss"].astype(float)}), "'scores/loss' is not what"),
        (lambda a, m: a["scores/dual"].__setitem__(3, np.nan), "a score is not finite"),
        (lambda a, m: a["graph/neighbours"].__setitem__((0, 0), 36), "a neighbour is no image of the table"),
        (lambda a, m: a["scores/dual"].__setitem__(3, 7.0), "its arrays do not match the manifest"),
        (lambda a, m: a.pop("scores/dual"), "the array 'scores/dual' is missing"),
        (lambda a, m: m["columns"].append("fame"), "the manifest"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(made, tmp_path, change, message):
    try:
        path = rewritten(made[1], tmp_path / "other.h5", change)
    except CondenseError as fault:  # the manifest cannot even be written
        assert message in str(fault)
        return
    with pytest.raises(CondenseError, match=message):
        read_score_table(path)


def test_a_damaged_file_is_refused(made, tmp_path):
    content = bytearray(made[1].read_bytes())
    content[-9] ^= 1
    (tmp_path / "damaged.h5").write_bytes(content)
    with pytest.raises(CondenseError, match=r"damaged\.h5: truncated or damaged"):
        read_score_table(tmp_path / "damaged.h5")
    write_score_table(tmp_path / "whole.h5", made[0])
    with h5py.File(tmp_path / "whole.h5") as file:
        assert set(file["scores"]) == set(COLUMNS)


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path, monkeypatch, capsys):
    tiny_archive(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = f"scores --data tiny.npz --network {NETWORK} score_epochs=2 score_batch=8"
    done = command_line(words, capsys)
    assert done.code == 0, done.err
    assert "scores of the 36 train images of tiny: 1 " + NETWORK in done.out and "forgetting" in done.out
    assert len(read_score_table(tmp_path / "tiny-scores.h5")) == 36
    again = command_line(words, capsys)
    assert again.code == 2 and "tiny-scores.h5 exists; choose another name or give --force" in again.err
    wrong = command_line("scores --data tiny.npz score_epoch=2 --network mpl", capsys)
    assert wrong.code == 2 and "score_epoch=2: no such setting of scores; did you mean 'score_epochs'" in wrong.err
    assert "mpl" in wrong.err
