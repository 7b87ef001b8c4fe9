"""Graphs: data, mirage against counts by hand, message passing on its forests, files and the command line."""

import dataclasses
import itertools
import json
import random
import re
import sys

import numpy as np
import pytest
import torch
from conftest import command_line

pytest.importorskip("torch_geometric", reason="needs the extra graph")
pytest.importorskip("rdkit", reason="needs the extra graph")

from scipy.sparse import csc_matrix, identity
from torch_geometric.data import Batch, Data

import condense
from condense import config, rng
from condense.benchmarks.graph_trees import count_trees, count_trees_plainly
from condense.cli.request import parse_request
from condense.errors import CondenseError
from condense.graphs import (
    GRAPH_PROTOCOLS,
    NETWORKS,
    GraphArrays,
    GraphNetwork,
    GraphOptions,
    GraphSet,
    is_graph_data,
    load_graph_task,
)
from condense.graphs.evaluation import make_batch, real_examples, sample_balanced
from condense.graphs.molecules import scaffold_split
from condense.methods.colour_refinement import refine, row_ids
from condense.methods.mirage import frequent_itemsets, tree_counts


def graph(labels, pairs, y, edge_labels=None):
    """A graph with undirected edges."""
    directed = [edge for a, b in pairs for edge in ((a, b), (b, a))]
    attributes = np.repeat(edge_labels if edge_labels is not None else [0] * len(pairs), 2)
    return Data(
        x=torch.tensor(labels).reshape(-1, 1),
        edge_index=torch.tensor(directed, dtype=torch.int64).reshape(-1, 2).T,
        edge_attr=torch.from_numpy(attributes.astype(np.int64)).reshape(-1, 1),
        y=torch.tensor([y]),
    )


def random_graph(draws, count, y):
    """A connected graph with node and edge labels."""
    pairs = [(draws.randrange(b), b) for b in range(1, count)]
    pairs += [(a, b) for a in range(count) for b in range(a + 1, count) if draws.random() < 0.2 and (a, b) not in pairs]
    return graph([draws.randint(0, 2) for _ in range(count)], pairs, y, [draws.randint(0, 1) for _ in pairs])


def molecules(folder, extra=""):
    """40 molecules: ten rings, each with an oxygen (class 0) and a nitrogen (class 1), two of either."""
    rows = [
        (f"C1{'C' * size}C1{chain}{atom}", int(atom == "N"))
        for size in range(1, 11)
        for chain in ("", "C")
        for atom in "ON"
    ]
    path = folder / "toy.csv"
    path.write_text("smiles,active\n" + "".join(f"{smiles},{label}\n" for smiles, label in rows) + extra)
    return path


@pytest.fixture
def few_steps(monkeypatch):
    rules = dataclasses.replace(GRAPH_PROTOCOLS["graphs-v1"], steps=4, full_epochs=1, checks=2, batch=8, width=8)
    monkeypatch.setitem(GRAPH_PROTOCOLS, "graphs-v1", rules)


# -- the method -------------------------------------------------------------------------------------------------------


def toy_task():
    """Class 0: a path of labels 0-1-0 in four graphs, in one of them beside an edge 2-2. Class 1: triangles."""
    path = ([0, 1, 0], [(0, 1), (1, 2)])
    zeros = [graph(*path, 0) for _ in range(3)] + [graph([0, 1, 0, 2, 2], [*path[1], (3, 4)], 0)]
    ones = [graph([1, 1, 1], [(0, 1), (1, 2), (2, 0)], 1) for _ in range(2)]
    return condense.task(([*zeros, *ones], [zeros[0], ones[0]], [zeros[0], ones[0]]), name="toy")


def forests(made):
    """Class, frequency, sorted multiplicities of the roots, and numbers of nodes and edges of each graph."""
    return [
        (int(g.y), int(g.weight), sorted(g.multiplicity[g.multiplicity > 0].tolist()), g.num_nodes, g.num_edges)
        for g in made.graphs
    ]


def test_closed_itemsets_by_hand():
    """The path has two trees of depth 1: its ends (twice) and its middle; the edge has one, twice."""
    made = condense.distill("mirage", toy_task(), 5, depth=1)
    ends_and_middle = (0, 4, [1.0, 2.0], 4, 3)  # two roots, and the leaves 1 (of degree 2) and 0
    # Leaves of the edge are labelled 2. The middle has two equal children: one node, two edges.
    assert forests(made) == [ends_and_middle, (0, 1, [1.0, 2.0, 2.0], 6, 4), (1, 2, [3.0], 2, 2)]
    assert forests(condense.distill("mirage", toy_task(), 5, depth=1, support=[2, 2])) == [
        ends_and_middle,
        (1, 2, [3.0], 2, 2),
    ]
    assert [f[:2] for f in forests(condense.distill("mirage", toy_task(), 1, depth=1))] == [(0, 4), (1, 2)]


def test_all_itemsets_by_hand():
    made = condense.distill("mirage", toy_task(), 9, depth=1, itemsets="all", support=[2, 2])
    assert sorted(f[:3] for f in forests(made)) == [(0, 4, [1.0]), (0, 4, [1.0, 2.0]), (0, 4, [2.0]), (1, 2, [3.0])]


def test_multiplicities_are_means_over_the_graphs_that_have_the_trees():
    star = graph([0, 1, 1, 1], [(0, 1), (0, 2), (0, 3)], 0)
    two = graph([0, 1, 1, 1] * 2, [(0, 1), (0, 2), (0, 3), (4, 5), (4, 6), (4, 7)], 0)
    other = graph([1, 1], [(0, 1)], 1)
    task = condense.task(([star, two, other, other], [star, other], [star, other]), name="stars")
    (first, _) = forests(condense.distill("mirage", task, 1, depth=1))
    assert first[:3] == (0, 2, [1.5, 4.5])


@pytest.mark.parametrize("closed", [True, False])
def test_itemsets_against_enumeration(closed):
    draws = np.random.default_rng(0)
    for count, least in itertools.product((1, 4, 1000), (1, 3)):
        present = draws.random((12, 7)) < draws.uniform(0.3, 0.9, 7)
        present[:, 6] = present[:, 2]  # two trees that are always together
        table = csc_matrix(present.astype(float))
        supports = {
            chosen: int(present[:, chosen].all(1).sum())
            for size in range(1, 8)
            for chosen in itertools.combinations(range(7), size)
        }
        wanted = {
            chosen: support
            for chosen, support in supports.items()
            if support >= least
            and not (closed and any(set(chosen) < set(other) and support == supports[other] for other in supports))
        }
        found = frequent_itemsets(table, count, least, closed=closed)
        got = {tuple(sorted(itemset.trees)): itemset.support for itemset in found}
        assert len(found) == len(got) == min(count, len(wanted)) and got.items() <= wanted.items()
        order = [itemset.support for itemset in found]
        assert order == sorted(wanted.values(), reverse=True)[: len(found)]


def test_tree_counts():
    task = toy_task()
    arrays = task.train
    ids = refine(row_ids(arrays.nodes), *arrays.joint_edges, row_ids(arrays.edge_features), 1)[-1]
    table = tree_counts(arrays, ids, 0).toarray()
    assert sorted(table[:, table.any(0)].T.tolist()) == [[0, 0, 0, 2], [1, 1, 1, 1], [2, 2, 2, 2]]
    assert sorted(tree_counts(arrays, ids, 1).toarray().ravel().tolist())[-3:] == [0, 3, 3]


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_forest_of_all_trees_has_the_output_of_its_graph(name, pool, tmp_path):
    """Root pooling on the forest, in which equal subtrees are one node, equals the pool over the nodes of the graph."""
    draws = random.Random(0)
    pair = [random_graph(draws, 9, y) for y in (0, 1)]
    task = condense.task((pair, pair, pair), name="pair")
    made = condense.distill("mirage", task, 1, pool=pool, out=tmp_path / "a.h5")
    made = condense.load(tmp_path / "a.h5")
    assert made.graphs[0].num_nodes > 9  # trees of several depths
    sizes = made.manifest["feature_sizes"]
    network = GraphNetwork(name, sizes["nodes"], sizes["edges"], 2, depth=3, width=16, pool=pool).double()
    real, forest = Batch.from_data_list(pair), Batch.from_data_list(made.graphs)
    forest.multiplicity = forest.multiplicity.double()
    torch.testing.assert_close(network(forest), network(real))
    for examples, batch in ((made.synthetic, forest), (real_examples(task.train), real)):
        ours = make_batch(examples, np.arange(2), torch.device("cpu"))
        ours.multiplicity = ours.multiplicity.double()
        torch.testing.assert_close(network(ours), network(batch))


def test_the_benchmark_counts_the_same_trees():
    draws = random.Random(4)
    arrays = GraphArrays.from_graphs([random_graph(draws, 7, 0) for _ in range(20)], "data")
    counts = [(count_trees(arrays, depth), count_trees_plainly(arrays, depth)) for depth in (1, 2, 3)]
    assert all(one == other for one, other in counts) and counts[0][0] < counts[2][0]


def test_every_root_has_the_embedding_of_its_nodes():
    draws = random.Random(1)
    graphs = [random_graph(draws, draws.randint(3, 8), y % 2) for y in range(20)]
    task = condense.task((graphs, graphs, graphs), name="many")
    made = condense.distill("mirage", task, 20, depth=2, itemsets="all")
    sizes = made.manifest["feature_sizes"]
    for name in NETWORKS:
        network = GraphNetwork(name, sizes["nodes"], sizes["edges"], 2, depth=2, width=16).double()
        nodes = network.node_features(Batch.from_data_list(graphs))
        forest = Batch.from_data_list(made.graphs)
        roots = network.node_features(forest)[forest.multiplicity > 0]
        assert float(torch.cdist(roots, nodes).min(1).values.max()) < 1e-6


def test_the_recipes_parse():
    names = [name for name in config.recipe_names() if name.startswith("mirage/")]
    assert names
    for name in names:
        request, options, values = parse_request(None, None, None, None, None, name)
        assert (request.method, request.ipc, options) == ("mirage", 10, {}) and values["depth"] in (2, 3)


def test_settings_that_cannot_be():
    for settings, message in (
        ({"depth": 0}, "depth=0: must be 1 to 100"),
        ({"pool": "max"}, "pool=max: unknown"),
        ({"support": [0, 1]}, "must be at least 1 for each class"),
        ({"support": [1]}, "must have one number for each of 2 classes"),
        ({"support": [9, 1]}, "support=9: no tree is in so many graphs of class 0"),
        ({"minutes": 3.0, "network": "mlp"}, "--minutes 3.0, --network mlp: .* leave it out|--network mlp, --minutes"),
    ):
        with pytest.raises(CondenseError, match=message):
            condense.distill("mirage", toy_task(), 2, **settings)
    with pytest.raises(CondenseError, match="--ipc 0"):
        condense.distill("mirage", toy_task(), 0)
    with pytest.raises(CondenseError, match="'dm' distils images, but toy has graphs; these distil graphs: mirage"):
        condense.distill("dm", toy_task(), 1)


# -- data -------------------------------------------------------------------------------------------------------------


def test_a_table_of_molecules(tmp_path, caplog):
    path = molecules(tmp_path, extra="notamolecule,1\nCCO,\n")
    task = condense.task(f"rings={path}")
    assert (task.name, task.split, task.classes) == ("rings", "scaffold", ("0", "1"))
    assert [len(part) for part in (task.train, task.valid, task.test)] == [32, 4, 4]
    assert task.counts.tolist() == [16, 16]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "left out 2 of 42 molecules: 1 that cannot be parsed, 1 without a label" in line
    again = condense.task(f"rings={path}")  # from the cache
    assert again.fingerprint == task.fingerprint
    from torch_geometric.utils import from_smiles

    ring = from_smiles("C1CCCCCCCCCCC1O")
    rows = [g for g in task.train.to_graphs() if torch.equal(g.x, ring.x)]
    assert any(torch.equal(g.edge_index, ring.edge_index) and torch.equal(g.edge_attr, ring.edge_attr) for g in rows)


def test_molecules_of_a_scaffold_stay_together():
    names = ["a"] * 6 + ["b"] * 2 + ["c"] + ["d"]
    assert scaffold_split(names).tolist() == [0] * 6 + [0] * 2 + [2] + [1]  # of equal scaffolds the later one first
    assert scaffold_split(["a"] * 10).tolist() == [2] * 10  # fits nowhere


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smiles,y,z\nCC,1,2\n", "name the column of the class with label=COLUMN; it has y, z"),
        ("smiles,y\nCC,2\n", "line 2: the class '2' must be 0 or 1"),
        ("smiles,y\nxx,1\n", "none of its SMILES can be parsed"),
        ("smiles,y\nCC,1\nCO,0\n", "the validation split has no graph of class 0|the train split has no graph"),
    ],
)
def test_tables_that_cannot_be(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(CondenseError, match=message):
        condense.task(str(tmp_path / "bad.csv"))


def test_missing_data(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_DATA", str(tmp_path))
    with pytest.raises(CondenseError, match="data 'tu:MUTAG' is not in"):
        condense.task("tu:MUTAG")
    for data in ("nowhere.csv", "~nobody/x.csv", "a\0b.csv", "x" * 5000 + ".csv", "n=\0"):
        with pytest.raises(CondenseError, match="no such file"):
            load_graph_task(data, GraphOptions())
        assert not is_graph_data(data)
    path = molecules(tmp_path)
    with pytest.raises(CondenseError, match="label=activ: no such column; did you mean 'active'"):
        condense.task(str(path), label="activ")
    for package in ("torch_geometric", "rdkit"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(CondenseError, match=rf"needs the package '{package}'.*condense-toolkit\[graph\]"):
                condense.task(str(path))


def test_a_tu_data_set_on_disk(tmp_path, monkeypatch):
    """Twenty paths, written in the format of the TU data sets."""
    monkeypatch.setenv("CONDENSE_DATA", str(tmp_path))
    raw = tmp_path / "tu" / "PATHS" / "raw"
    raw.mkdir(parents=True)
    edges = [pair for g in range(20) for pair in ((2 * g + 1, 2 * g + 2), (2 * g + 2, 2 * g + 1))]
    (raw / "PATHS_A.txt").write_text("".join(f"{a}, {b}\n" for a, b in edges))
    (raw / "PATHS_graph_indicator.txt").write_text("".join(f"{n // 2 + 1}\n" for n in range(40)))
    (raw / "PATHS_graph_labels.txt").write_text("1\n-1\n" * 10)
    (raw / "PATHS_node_labels.txt").write_text("".join(f"{n % 2}\n" for n in range(40)))
    task = condense.task("tu:PATHS")
    assert (task.name, task.split, len(task.train), len(task.valid), len(task.test)) == ("PATHS", "random", 16, 2, 2)
    assert task.feature_sizes() == ([2, 2], [])
    assert len(condense.distill("mirage", task, 1)) == 2


def test_lists_of_graphs():
    good = graph([0, 1], [(0, 1)], 0)
    assert len(condense.task([good, graph([1, 1], [(0, 1)], 1)] * 10).train) == 16
    for bad, message in (
        (Data(x=torch.rand(2, 3), edge_index=good.edge_index, y=good.y), "graph 0: x: must be categories"),
        (Data(x=good.x, edge_index=good.edge_index), "graph 0: must have edge_index and y"),
        (Data(x=good.x, edge_index=good.edge_index + 1, y=good.y), "must be .* of nodes below 2"),
        (Data(x=good.x, edge_index=good.edge_index, y=torch.tensor([0.5])), "y must be one class"),
    ):
        with pytest.raises(CondenseError, match=message):
            condense.task([bad])
    plain = GraphArrays.from_graphs([Data(edge_index=good.edge_index, y=good.y, num_nodes=2)], "data")
    assert plain.nodes.tolist() == [[0], [0]] and plain.edge_features.shape == (2, 0)


def test_select_keeps_graphs_whole():
    draws = random.Random(2)
    graphs = [random_graph(draws, count, 0) for count in (4, 1, 6, 3)]
    chosen = GraphArrays.from_graphs(graphs, "data").select(np.array([2, 0, 2])).to_graphs()
    for got, wanted in zip(chosen, (graphs[2], graphs[0], graphs[2])):
        for name in ("x", "edge_index", "edge_attr", "y"):
            assert torch.equal(got[name], wanted[name])


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_survives_and_is_verified(tmp_path):
    path = tmp_path / "toy.h5"
    made = condense.distill("mirage", toy_task(), 3, depth=1, out=path)
    loaded = condense.load(path)
    assert isinstance(loaded, GraphSet) and loaded.sha256() == made.sha256() and loaded.manifest["kind"] == "graphs"
    assert loaded.nbytes() == made.nbytes() == loaded.manifest["bytes"]
    assert loaded.nbytes()["total"] == sum(array.nbytes for array in made.synthetic.arrays().values())
    for got, wanted in zip(loaded.graphs, made.graphs):
        assert got.to_dict().keys() == wanted.to_dict().keys()
        assert all(torch.equal(got[name], wanted[name]) for name in got.to_dict())
    with pytest.raises(CondenseError, match="exists"):
        made.save(path)
    content = bytearray(path.read_bytes())
    for place in (600, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CondenseError, match="damaged"):
            condense.load(path)
    path.write_bytes(content[:-10])
    with pytest.raises(CondenseError, match="truncated or damaged"):
        condense.load(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("edges", lambda a: a + 100, "an edge leads to a node that its graph does not have"),
        ("nodes", lambda a: a + 100, "features beyond"),
        ("labels", lambda a: a + 1, "the labels are not the classes"),
        ("multiplicities", lambda a: 0 * a, "multiplicities of a graph"),
        ("multiplicities", lambda a: a * np.nan, "multiplicities of a graph"),
        ("weights", lambda a: 0 * a, "no weight"),
        ("node_counts", lambda a: a + 1, "'nodes' has the shape"),
        ("degrees", lambda a: a[1:], "'degrees' has the shape"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, monkeypatch, name, change, message):
    """Written as the toolkit writes it, so that only the content is wrong."""
    made = condense.distill("mirage", toy_task(), 3, depth=1)
    arrays = made.synthetic.arrays()
    arrays[name] = change(arrays[name]).astype(arrays[name].dtype)
    monkeypatch.setattr(type(made.synthetic), "arrays", lambda self: arrays)
    with pytest.raises(CondenseError, match=message):
        made.save(tmp_path / "bad.h5")
    assert not (tmp_path / "bad.h5").exists()


def test_other_functions_refuse_graphs(tmp_path):
    made = condense.distill("mirage", toy_task(), 3, depth=1)
    with pytest.raises(CondenseError, match="is not a distilled set of images"):
        condense.fit(made, "mlp")


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_batches_have_balanced_classes_and_frequent_graphs():
    labels, weights = np.array([0, 1, 1]), np.array([5, 3, 1])
    rows = sample_balanced(labels, weights, 40000, rng.Draws("test"))
    shares = np.bincount(rows, minlength=3) / 40000
    np.testing.assert_allclose(shares, [0.5, 0.375, 0.125], atol=0.01)


def test_the_record(few_steps):
    draws = random.Random(3)
    splits = [[random_graph(draws, 5, y) for y in (0, 1) for _ in range(6)] for _ in range(3)]
    task = condense.task(splits, name="random")
    made = condense.distill("mirage", task, 2)
    record = condense.evaluate(made, task, networks=["gcn", "gin"], runs=2, controls=["random", "herding", "full"])
    assert record == json.loads(json.dumps(record))
    assert record["metric"] == "roc_auc" and record["data"]["same"]
    arms = [(entry["network"], entry["arm"]) for entry in record["results"]]
    assert arms == [(n, arm) for n in ("gcn", "gin") for arm in ("distilled", "random", "herding", "full")]
    for entry in record["results"]:
        assert len(entry["roc_auc"]) == 2 and all(0 <= value <= 1 for value in entry["roc_auc"])
        assert entry["mean"] == pytest.approx(np.mean(entry["roc_auc"]))
        assert entry["graphs"] == (12 if entry["arm"] == "full" else 4)
        assert set(entry["best_steps"]) <= {2, 4}
    assert record["results"][0]["bytes"] == made.nbytes()["total"]
    gap = record["differences"]["gcn"]["random"]["value"]
    assert gap == pytest.approx(record["results"][0]["mean"] - record["results"][1]["mean"])
    again = condense.evaluate(made, task, networks="gcn", runs=2, controls="random")
    assert again["results"][0]["roc_auc"] == record["results"][0]["roc_auc"]


def test_evaluations_that_cannot_be(few_steps):
    task = toy_task()
    made = condense.distill("mirage", task, 2)
    other = condense.task([graph([9, 1], [(0, 1)], y) for y in (0, 1)] * 10, name="other")
    for data, options, message in (
        (task, {"networks": "resnet18"}, "network 'resnet18': not for graphs"),
        (task, {"controls": "noise"}, "control 'noise': not for graphs"),
        (task, {"runs": 0}, "--runs 0"),
        (task, {"protocol": "dc-v1"}, "unknown protocol 'dc-v1' of graphs"),
        (task, {"curve": [0.5]}, r"--curve \[0.5\]: .* holds graphs; leave it out"),
        (other, {}, "the features of its nodes have"),
    ):
        with pytest.raises(CondenseError, match=message):
            condense.evaluate(made, data, **options)


def test_the_command_line(tmp_path, monkeypatch, capsys, few_steps):
    """Distils, shows, verifies and evaluates 40 molecules."""
    molecules(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(words):
        return command_line(words, capsys)

    made = call("distill mirage --data rings=toy.csv --out rings.h5")
    assert made.code == 0 and "made rings/mirage-ipc10" in made.out and not (tmp_path / "runs").exists()
    assert "condense evaluate rings.h5 --data rings=toy.csv" in made.out
    assert "kind: graphs" in call("show rings.h5").out
    assert "good; rings/mirage-ipc10" in call("verify rings.h5").out
    words = (
        "evaluate rings.h5 --data rings=toy.csv --runs 2 --networks gin --controls random,herding,full --json r.json"
    )
    judged = call(words)
    assert judged.code == 0 and "gin: distilled minus random" in judged.out
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["set"]["sha256"] == condense.load("rings.h5").sha256()
    assert record["command"].startswith("condense evaluate rings-mirage-ipc10.h5 --data rings=PATH --networks gin")
    for words, message in (
        ("distill mirage --data digits --out a.h5", "distils graphs, but digits has images"),
        ("distill mirage --data rings=toy.csv --run-dir a --out a.h5", "--run-dir a: .* leave it out"),
        ("distill dm --data rings=toy.csv --ipc 1 --out a.h5", "'dm' distils images, but rings has graphs"),
        ("plan mirage --data rings=toy.csv", "makes no steps; only `condense distill` runs it"),
        ("preview rings.h5 --out a.png", "rings.h5: holds graphs, not images"),
        ("evaluate rings.h5 --data rings=toy.csv --precision bf16", "--precision bf16: .* leave it out"),
        ("distill mirage --data rings=toy.csv --out rings.h5", "exists; choose another name or give --force"),
    ):
        result = call(words)
        assert result.code == 2 and len(result.err.splitlines()) == 1
        assert re.search(message, result.err), result.err
    assert "mirage" in call("ls methods").out and "graphs-v1" in call("ls protocols").out
    assert "label=" in call("show mirage").out


def with_fields(**fields):
    """Two classes, each with two graphs of three nodes; the fields replace those of the first one."""
    graphs = [graph([0, 1, 0], [(0, 1), (1, 2)], y) for y in (0, 0, 1, 1)]
    for name, value in fields.items():
        setattr(graphs[0], name, value)
    return graphs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edge_attr": torch.zeros(2, 2)}, r"edge_attr: has the shape \(2, 2\), not a row for each of 4"),
        ({"y": torch.tensor(float("nan"))}, "y must be one class, a whole number from 0 to 9,999"),
        ({"y": torch.tensor(float("inf"))}, "y must be one class"),
        ({"y": 10**9}, "y must be one class"),
        (
            {"edge_index": torch.zeros(2, 0, dtype=torch.int64), "edge_attr": None, "x": torch.zeros(0, 1)},
            "has no nodes",
        ),
        ({"x": torch.tensor([[0], [2**20 - 1], [0]])}, "more than 1,048,576 values in total"),
    ],
)
def test_graphs_that_cannot_be(fields, message):
    with pytest.raises(CondenseError, match=message):
        condense.task([with_fields(**fields)] * 3, name="wrong")


def test_other_things_that_are_no_lists_of_graphs():
    parts = [with_fields(), with_fields(), [graph([0], [], 0), graph([0], [], 1)]]
    for part in parts[:2]:
        for one in part:
            one.x = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(CondenseError, match="the splits have different numbers of features of nodes"):
        condense.task(parts, name="wrong")
    with pytest.raises(CondenseError, match="give a list of graphs, or three lists, not"):
        load_graph_task(condense.task("digits"), GraphOptions())
    assert condense.task([with_fields(y=0)] * 3, name="number").counts.tolist() == [2, 2]


def test_a_table_of_trees_is_bounded():
    counts = identity(2**14, format="csc")  # as many trees as graphs, each in one of them
    with pytest.raises(CondenseError, match="--ipc 16384: 16,384 trees in 16,384 graphs; lower it"):
        frequent_itemsets(counts, 2**14, 1, closed=True)


def test_the_judge_learns_what_can_be_learned(monkeypatch):
    """Graphs whose class is the label of their nodes; without the best weights, the last ones would be tested."""
    rules = dataclasses.replace(GRAPH_PROTOCOLS["graphs-v1"], steps=60, checks=6, batch=8, width=8, lr=0.02)
    monkeypatch.setitem(GRAPH_PROTOCOLS, "graphs-v1", rules)
    parts = [[graph([y] * count, [(0, 1), (1, 2)], y) for y in (0, 1) for count in (3, 4, 5)] for _ in range(3)]
    task = condense.task(parts, name="easy")
    record = condense.evaluate(condense.distill("mirage", task, 1), task, networks=["gin"], runs=2, controls=[])
    assert record["results"][0]["mean"] > 0.95
