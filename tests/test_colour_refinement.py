"""Colour refinement against explicitly unrolled trees."""

import random

import pytest

from condense.methods.colour_refinement import TreeTable


def unroll(node, depth, labels, incoming):
    """The canonical form of a node's computation tree, built plainly."""
    children = [(edge, unroll(u, depth - 1, labels, incoming)) for edge, u in incoming[node]] if depth else []
    return labels[node], tuple(sorted(children))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_equal_ids_are_equal_trees(depth):
    draws, table, pairs = random.Random(depth), TreeTable(depth), []
    for _ in range(200):
        count = draws.randint(1, 8)
        labels = [draws.randint(0, 1) for _ in range(count)]
        edges, edge_labels, incoming = [], [], [[] for _ in range(count)]
        for a in range(count):
            for b in range(a):
                if draws.random() < 0.3:
                    label = draws.randint(0, 1)
                    edges += [(a, b), (b, a)]
                    edge_labels += [label, label]
                    incoming[b].append((label, a))
                    incoming[a].append((label, b))
        ids = table.refine(labels, edges, edge_labels)
        pairs += [(ids[node], unroll(node, depth, labels, incoming)) for node in range(count)]
    trees, ids = {tree for _, tree in pairs}, {number for number, _ in pairs}
    assert len(ids) == len(trees) == len(set(pairs)) > 1
    assert len(pairs) > len(trees)  # some trees occur twice, so both directions are tested
