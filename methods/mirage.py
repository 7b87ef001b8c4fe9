"""Mirage: the computation trees that often occur together in the graphs of a class."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.sparse import csc_matrix

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
    sources, targets = graphs.joint_edges
    levels = refine(labels, sources, targets, row_ids(graphs.edge_features), config.depth)
    found, classes = list[Itemset](), list[int]()
    for label in range(task.num_classes):
        counts = tree_counts(graphs, levels[-1], label)
        itemsets = frequent_itemsets(counts, run.ipc, least[label], closed=config.itemsets == "closed")
        if not itemsets:
            raise CondenseError(f"support={least[label]}: no tree is in so many graphs of class {task.classes[label]}")
        found += itemsets
        classes += [label] * len(itemsets)
    return build_forests(graphs, levels, found, classes, config)


def tree_counts(graphs: GraphArrays, ids: np.ndarray, label: int) -> csc_matrix:
    """Number of nodes with each tree (columns) in each graph of a class (rows); nodes need a neighbour to count."""
    chosen = graphs.labels == label
    owner = np.repeat(np.cumsum(chosen) - 1, graphs.node_counts)
    used = np.repeat(chosen, graphs.node_counts) & (graphs.degrees > 0)
    shape = int(chosen.sum()), int(ids.max(initial=0)) + 1
    return csc_matrix((np.ones(int(used.sum())), (owner[used], ids[used])), shape)  # sums duplicates


def frequent_itemsets(counts: csc_matrix, count: int, least: int, *, closed: bool) -> list[Itemset]:
    """The most frequent sets of trees, in descending order of their support.

    Best-first search: a set is extended by one less frequent tree at a time, which never raises its support, so the
    first ``count`` sets of the queue are the result and no others need to be enumerated. A closed set, to which no tree
    can be added without lowering its support, is reached from only one other (the prefix-preserving extension of LCM,
    Uno et al., 2004).
    """
    trees = most_frequent_trees(counts, count, least)
    if counts.shape[0] * len(trees) > 2**27:  # 1 GiB
        raise CondenseError(f"--ipc {count}: {len(trees):,} trees in {counts.shape[0]:,} graphs; lower it")
    table = counts[:, trees].toarray()
    rows = (table > 0).T

    def closure(shared: np.ndarray) -> tuple[int, ...]:
        return tuple(np.flatnonzero(rows[:, shared].all(1)).tolist())

    everything, found = np.ones(len(table), bool), list[Itemset]()
    queue = [(-len(table), closure(everything) if closed else (), -1, everything)]
    while queue and len(found) < count:
        negative, members, core, shared = heapq.heappop(queue)
        if members:
            means = table[shared][:, members].mean(0).tolist()
            found.append(Itemset(tuple(trees[list(members)].tolist()), -negative, means))
        missing = count - len(found)
        limit = max(least, -heapq.nsmallest(missing, queue)[-1][0] if 0 < missing <= len(queue) else 0)
        for item in range(core + 1, len(rows)):
            extended = rows[item] & shared
            support = int(extended.sum())
            if item not in members and support >= limit:
                larger = closure(extended) if closed else (*members, item)
                if all(other in members for other in larger if other < item):
                    heapq.heappush(queue, (-support, larger, item, extended))
    return found


def most_frequent_trees(counts: csc_matrix, count: int, least: int) -> np.ndarray:
    """Columns in descending order of support, as far as sets of them may be among the ``count`` most frequent sets.

    As soon as ``count`` trees are in different graphs, so many sets have at least their support, and no rarer tree.
    """
    supports = counts.getnnz(0)
    order, different = np.argsort(-supports, kind="stable"), set[bytes]()
    for place, tree in enumerate(order):
        is_rarer = place > 0 and supports[tree] < supports[order[place - 1]]
        if supports[tree] < least or (is_rarer and len(different) >= count):
            return order[:place]
        different.add(counts.indices[counts.indptr[tree] : counts.indptr[tree + 1]].tobytes())
    return order


def build_forests(
    graphs: GraphArrays,
    levels: Sequence[np.ndarray],
    itemsets: Sequence[Itemset],
    classes: Sequence[int],
    config: Mirage,
) -> SyntheticGraphs:
    """Builds a graph for each set of trees of the last of ``levels``; equal subtrees of one level are one node.

    An edge leads from each child to its parent, as messages do; equal children of a node are several edges. Message
    passing gives each root what it gives the node that has this tree in a real graph.
    """
    examples = [np.unique(ids, return_index=True)[1] for ids in levels]  # a node with each tree
    sources, targets = graphs.joint_edges
    incoming, first = np.argsort(targets, kind="stable"), np.cumsum(graphs.degrees) - graphs.degrees
    nodes, edges, multiplicities = list[int](), list[tuple[int, int, int]](), list[float]()
    node_counts, edge_counts = [], []
    for itemset in itemsets:
        trees = [(len(levels) - 1, tree) for tree in itemset.trees]
        number, edges_before = {tree: place for place, tree in enumerate(trees)}, len(edges)
        for level, tree in trees:  # grows: children are added at its end
            node = int(examples[level][tree])
            nodes.append(node)
            for edge in incoming[first[node] : first[node] + graphs.degrees[node]].tolist() if level else ():
                child = (level - 1, int(levels[level - 1][sources[edge]]))
                if child not in number:
                    number[child] = len(trees)
                    trees.append(child)
                edges.append((number[child], number[level, tree], edge))
        multiplicities += [*itemset.multiplicities, *[0.0] * (len(trees) - len(itemset.trees))]
        node_counts.append(len(trees))
        edge_counts.append(len(edges) - edges_before)
    table = np.array(edges, np.int64).reshape(-1, 3)
    counts = (np.array(values, np.int64) for values in (node_counts, edge_counts, classes))
    forests = GraphArrays(graphs.nodes[nodes], table[:, :2].T.copy(), graphs.edge_features[table[:, 2]], *counts)
    supports, weights = np.array([itemset.support for itemset in itemsets]), np.array(multiplicities, np.float32)
    return SyntheticGraphs(forests, weights, graphs.degrees[nodes], supports, config.pool, config.depth)
