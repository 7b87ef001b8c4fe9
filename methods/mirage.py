"""Mirage: the computation trees that often occur together in the graphs of a class."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from condense.config import require_one_of, require_range
from condense.errors import CondenseError
from condense.graphs import MAX_DEPTH, POOLS, GraphArrays, GraphRun, GraphTask, SyntheticGraphs
from condense.methods.colour_refinement import refine, row_ids
from condense.registry import method


@dataclass(frozen=True)
class Mirage:
    """Hyper-parameters of Mirage."""

    depth: int = 3
    """Depth of the computation trees: the number of layers of the networks that will be trained."""
    itemsets: str = "closed"
    """closed (only the largest of the sets of trees that occur in the same graphs) or all (as published)."""
    support: list[int] = field(default_factory=list)
    """Least number of graphs in which a set of trees occurs, for each class; empty: 1."""
    pool: str = "sum"
    """Pool of the networks over the roots, and over all nodes of real graphs: sum or mean."""

    def __post_init__(self) -> None:
        require_range(self, depth=(1, MAX_DEPTH))
        require_one_of(self, itemsets=("closed", "all"), pool=POOLS)
        if any(least < 1 for least in self.support):
            raise CondenseError(f"support={self.support}: must be at least 1 for each class")


class Itemset(NamedTuple):
    """Trees that occur together."""

    trees: tuple[int, ...]
    support: int
    multiplicities: list[float]
    """Mean number of nodes with each tree, over the graphs that have all of the trees."""


@method(
    "mirage",
    config=Mirage,
    paper="Mirage: Model-Agnostic Graph Distillation for Graph Classification",
    year=2024,
    order=0,
    protocol="graphs-v1",
    network="",
    task="graphs",
    ipc=10,
)
def mirage(task: GraphTask, config: Mirage, run: GraphRun) -> SyntheticGraphs:
    """Stores, for each class of graphs, the sets of computation trees that most graphs of the class have.

    When to use: for graph classification with categorical features, before the network is chosen. Cost: seconds; no
    network is trained. Known failure: where frequent trees are the same in all classes, only their frequencies differ.

    A network of ``depth`` layers sees nothing of a node but its computation tree, so a graph is a multiset of trees.
    ``ipc`` is the largest number of sets of trees for each class. Each is stored as one graph, in which networks pool
    the roots only, and is sampled as often as it occurs.

    The published code builds all trees, as strings; here equal trees are found by colour refinement, which is as exact.
    It takes all frequent itemsets above a threshold (``itemsets=all``, ``support``), of which low ones give millions;
    here the ``ipc`` most frequent closed ones are enumerated in the order of their frequency. It pools each tree once;
    here by its mean number in the graphs (``multiplicities`` of the file). Nodes with equal trees but unequal numbers
    of neighbours of their leaves are distinguished, so that the normalisation of GCN is exact too.
    """
    if config.support and len(config.support) != task.num_classes:
        raise CondenseError(f"support={config.support}: must have one number for each of {task.num_classes} classes")
    graphs, least = task.train, config.support or [1] * task.num_classes
    labels = row_ids(np.column_stack([graphs.nodes, graphs.degrees]))
    levels = refine(labels, *graphs.joint_edges, row_ids(graphs.edge_features), config.depth)
    found, classes = [], []
    for label in range(task.num_classes):
        counts = tree_counts(graphs, levels[-1], label)
        itemsets = frequent_itemsets(counts, run.ipc, least[label], closed=config.itemsets == "closed")
        if not itemsets:
            raise CondenseError(f"support={least[label]}: no tree is in so many graphs of class {task.classes[label]}")
        found += itemsets
        classes += [label] * len(itemsets)
    return build_forests(graphs, levels, found, classes, config)


class TreeCounts(NamedTuple):
    """How often each tree occurs in each graph of a class: one entry for each pair that occurs."""

    graphs: np.ndarray
    trees: np.ndarray
    counts: np.ndarray


def tree_counts(graphs: GraphArrays, ids: np.ndarray, label: int) -> TreeCounts:
    """Counts the trees of the nodes of a class, without those of nodes that have no neighbours."""
    owner = np.repeat(np.where(graphs.labels == label, np.cumsum(graphs.labels == label) - 1, -1), graphs.node_counts)
    used, size = (owner >= 0) & (graphs.degrees > 0), int(ids.max(initial=0)) + 1
    pairs, counts = np.unique(owner[used] * size + ids[used], return_counts=True)
    return TreeCounts(pairs // size, pairs % size, counts)


def frequent_itemsets(table: TreeCounts, count: int, least: int, *, closed: bool) -> list[Itemset]:
    """The most frequent sets of trees, in descending order of their support; of equal ones, in the order of the trees.

    Best-first search: a set is extended by one less frequent tree at a time, which never raises its support, so the
    first ``count`` sets of the queue are the result and no others need to be enumerated. A closed set is reached from
    only one other one (the prefix-preserving extension of LCM, Uno et al., 2004).

    Args:
        table: the occurrences of trees.
        count: largest number of sets.
        least: least support.
        closed: whether to return only sets to which no tree can be added without lowering the support.
    """
    trees, rows = _bitsets(table, count, least)
    supports = [bits.bit_count() for bits in rows]

    def closure(shared: int) -> tuple[int, ...]:
        return tuple(i for i, bits in enumerate(rows) if bits & shared == shared)

    everything = (1 << (int(table.graphs.max(initial=-1)) + 1)) - 1
    start = closure(everything) if closed else ()
    queue, found = [(-everything.bit_count(), start, -1, everything)], []
    while queue and len(found) < count:
        _, members, core, shared = heapq.heappop(queue)
        if members:
            found.append(_itemset(table, trees[list(members)], shared))
        missing = count - len(found)
        limit = max(least, -heapq.nsmallest(missing, queue)[-1][0] if 0 < missing <= len(queue) else 0)
        for item in range(core + 1, len(rows)):
            if supports[item] < limit:
                break
            extended = rows[item] & shared
            if item in members or extended.bit_count() < limit:
                continue
            larger = closure(extended) if closed else (*members, item)
            if all(other in members for other in larger if other < item):
                heapq.heappush(queue, (-extended.bit_count(), larger, item, extended))
    return found


def _bitsets(table: TreeCounts, count: int, least: int) -> tuple[np.ndarray, list[int]]:
    """Trees in descending order of support, and their graphs as bits.

    As soon as ``count`` trees have different graphs, that many sets have at least their support: rarer trees are in
    none of the sets that are searched for.
    """
    order = np.argsort(table.trees, kind="stable")
    names, first, supports = np.unique(table.trees[order], return_index=True, return_counts=True)
    ranking = np.argsort(-supports, kind="stable")
    rows: list[int] = []
    different: set[int] = set()
    for tree in ranking.tolist():
        last = int(supports[ranking[len(rows) - 1]]) if rows else 0
        if supports[tree] < least or (supports[tree] < last and len(different) >= count):
            break
        mask = np.zeros(int(table.graphs.max()) + 1, np.uint8)
        mask[table.graphs[order[first[tree] : first[tree] + supports[tree]]]] = 1
        rows.append(int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little"))
        different.add(rows[-1])
    return names[ranking[: len(rows)]], rows


def _itemset(table: TreeCounts, trees: np.ndarray, shared: int) -> Itemset:
    size = int(table.graphs.max()) + 1
    bits = np.frombuffer(shared.to_bytes((size + 7) // 8, "little"), np.uint8)
    inside = np.unpackbits(bits, bitorder="little")[:size].astype(bool)[table.graphs]
    means = [float(table.counts[inside & (table.trees == tree)].mean()) for tree in trees]
    return Itemset(tuple(trees.tolist()), shared.bit_count(), means)


def build_forests(
    graphs: GraphArrays,
    levels: Sequence[np.ndarray],
    itemsets: Sequence[Itemset],
    classes: Sequence[int],
    config: Mirage,
) -> SyntheticGraphs:
    """Builds a graph for each set of trees, in which equal subtrees of one level are one node.

    An edge leads from each child to its parent, as messages do; equal children of a node are several edges. Message
    passing gives each root what it gives the node that has this tree in a real graph.

    Args:
        graphs: the real graphs.
        levels: ids of the trees of their nodes at each depth.
        itemsets: sets of ids of the last level.
        classes: class of each set.
        config: ``pool`` and ``depth`` are copied to the result.
    """
    examples = [np.unique(ids, return_index=True)[1] for ids in levels]  # a node with each tree
    sources, targets = graphs.joint_edges
    incoming, first = np.argsort(targets, kind="stable"), np.cumsum(graphs.degrees) - graphs.degrees
    nodes, edges, used_edges, weights, sizes = [], [], [], [], []
    for itemset in itemsets:
        trees = [(len(levels) - 1, tree) for tree in itemset.trees]
        number, made = {tree: place for place, tree in enumerate(trees)}, (len(nodes), len(edges))
        for level, tree in trees:  # grows: children are added at its end
            node = int(examples[level][tree])
            nodes.append(node)
            for edge in incoming[first[node] : first[node] + graphs.degrees[node]].tolist() if level else ():
                child = (level - 1, int(levels[level - 1][sources[edge]]))
                if child not in number:
                    number[child] = len(trees)
                    trees.append(child)
                edges.append((number[child], number[level, tree]))
                used_edges.append(edge)
        weights += [*itemset.multiplicities, *[0.0] * (len(trees) - len(itemset.trees))]
        sizes.append((len(nodes) - made[0], len(edges) - made[1]))
    counts = np.array(sizes, np.int64).T
    forests = GraphArrays(
        graphs.nodes[nodes],
        np.array(edges, np.int64).reshape(-1, 2).T.copy(),
        graphs.edge_features[used_edges],
        *counts.copy(),
        np.array(classes, np.int64),
    )
    supports = np.array([itemset.support for itemset in itemsets], np.int64)
    return SyntheticGraphs(
        forests, np.array(weights, np.float32), graphs.degrees[nodes], supports, config.pool, config.depth
    )
