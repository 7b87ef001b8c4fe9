"""Exact colour refinement: ids of computation trees without building the trees (mirage, arXiv 2310.09486)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

Key = tuple[Hashable, tuple[tuple[Hashable, int], ...]]
"""A tree of depth l: the label of its root, and for each child, sorted, the edge's label and the child's id at l-1."""


class TreeTable:
    """Ids of computation trees, shared by all graphs that are refined with it.

    Two nodes have equal ids at depth l exactly if their unrolled trees of depth l are isomorphic with all labels: an id
    is the position of its key in a table, not a hash, so it cannot collide. The cost is O(depth * edges) apart from the
    sorting of each node's neighbours, where explicit trees grow as degree^depth.

    Args:
        depth: number of message-passing layers, at least 0.
    """

    def __init__(self, depth: int) -> None:
        if depth < 0:
            raise ValueError(f"depth={depth}: must be at least 0")
        self.levels: list[dict[Key, int]] = [{} for _ in range(depth + 1)]

    def refine(
        self, labels: Sequence[Hashable], edges: Sequence[tuple[int, int]], edge_labels: Sequence[Hashable]
    ) -> list[int]:
        """Returns the id of each node's tree of full depth.

        Args:
            labels: label of each node.
            edges: (source, target) of each directed edge; a node's children are the sources of its incoming edges.
            edge_labels: label of each edge. Labels of one kind must be sortable.
        """
        incoming: list[list[tuple[Hashable, int]]] = [[] for _ in labels]
        for (source, target), label in zip(edges, edge_labels, strict=True):
            incoming[target].append((label, source))
        ids: list[int] = []
        for depth, level in enumerate(self.levels):
            keys: list[Key] = []
            for label, neighbours in zip(labels, incoming):
                children = sorted((edge, ids[node]) for edge, node in neighbours) if depth else []
                keys.append((label, tuple(children)))
            ids = [level.setdefault(key, len(level)) for key in keys]
        return ids
