"""Colour refinement against explicitly unrolled trees."""

import random

import numpy as np
import pytest

from condense.methods.colour_refinement import refine, row_ids


def unroll(node, depth, labels, incoming):
    """The canonical form of a node's computation tree, built plainly."""
    children = [(edge, unroll(u, depth - 1, labels, incoming)) for edge, u in incoming[node]] if depth else []
    return labels[node], tuple(sorted(children))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_equal_ids_are_equal_trees(depth):
    draws = random.Random(depth)
    labels, edges, edge_labels, incoming = [], [], [], []
    for _ in range(200):  # graphs, in one array
        first, count = len(labels), draws.randint(1, 8)
        labels += [draws.randint(0, 1) for _ in range(count)]
        incoming += [[] for _ in range(count)]
        for a in range(first, first + count):
            for b in range(first, a):
                for _ in range(draws.choice([0, 0, 0, 1, 1, 2])):  # two edges between the same nodes are possible
                    label = draws.randint(0, 1)
                    edges += [(a, b), (b, a)]
                    edge_labels += [label, label]
                    incoming[b].append((label, a))
                    incoming[a].append((label, b))
    sources, targets = np.array(edges).T
    levels = refine(np.array(labels), sources, targets, np.array(edge_labels), depth)
    assert len(levels) == depth + 1
    for level, ids in enumerate(levels):
        pairs = [(number, unroll(node, level, labels, incoming)) for node, number in enumerate(ids.tolist())]
        trees = {tree for _, tree in pairs}
        assert set(ids.tolist()) == set(range(len(trees))) and len(set(pairs)) == len(trees) > 1
        assert len(pairs) > len(trees)  # some trees occur twice, so both directions are tested


def test_graphs_without_edges():
    none = np.zeros(0, np.int64)
    assert [ids.tolist() for ids in refine(np.array([5, 3, 5]), none, none, none, 2)] == [[1, 0, 1]] * 3
    assert [len(ids) for ids in refine(none, none, none, none, 1)] == [0, 0]


def test_row_ids_of_wide_tables():
    """More combinations than an int64 holds."""
    table = np.random.default_rng(0).integers(0, 2**20, (50, 6))
    table = np.concatenate([table, table[::-1]])
    ids = row_ids(table)
    assert len(set(ids.tolist())) == 50 and (ids[:50] == ids[:49:-1]).all()
    assert row_ids(np.zeros((3, 0), np.int64)).tolist() == [0, 0, 0]
