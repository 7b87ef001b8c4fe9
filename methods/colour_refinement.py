"""Exact colour refinement: ids of computation trees without building the trees (Mirage, arXiv 2310.09486)."""

from __future__ import annotations

import numpy as np

MAX_CODE = 2**62
"""Limit of codes that combine two numbers in one int64."""


def row_ids(table: np.ndarray) -> np.ndarray:
    """Numbers the different rows of a table of non-negative integers, int64 (rows, columns): int64 (rows,) from 0."""
    codes, size = np.zeros(len(table), np.int64), 1
    for column in table.T:
        if size * (int(column.max(initial=0)) + 1) > MAX_CODE:
            codes, column = _dense(codes), _dense(column)
            size = int(codes.max(initial=0)) + 1
        span = int(column.max(initial=0)) + 1
        codes, size = codes * span + column, size * span
    return _dense(codes)


def refine(
    labels: np.ndarray, sources: np.ndarray, targets: np.ndarray, edge_labels: np.ndarray, depth: int
) -> list[np.ndarray]:
    """Returns the ids of the computation trees of all nodes, at every depth from 0.

    The tree of depth l has the node's label at its root and, for each incoming edge, the edge's label and the source's
    tree of depth l-1 as a child. Two nodes have equal ids at depth l exactly if these trees are isomorphic with all
    labels: ids number the different combinations of a label and sorted children, so they cannot collide as hashes may.
    The cost is that of sorting the edges, ``depth`` times. Trees grow as degree^depth.

    Args:
        labels: number of each node's label, int64 (nodes,).
        sources, targets, edge_labels: nodes and number of the label of each directed edge, int64 (edges,).
        depth: number of message-passing layers, at least 0.

    Returns:
        ``depth`` + 1 arrays int64 (nodes,), each numbered from 0 without gaps.
    """
    ids = [_dense(labels)]
    order = np.argsort(targets, kind="stable")
    degrees = np.bincount(targets, minlength=len(labels))
    first = np.cumsum(degrees) - degrees
    with_child = [np.flatnonzero(degrees > number) for number in range(int(degrees.max(initial=0)))]
    for _ in range(depth):
        children = _dense(edge_labels * (int(ids[-1].max(initial=0)) + 1) + ids[-1][sources])
        span = int(children.max(initial=0)) + 1
        children = np.sort(targets * span + children) - targets[order] * span  # those of each node ascend
        codes = ids[0].copy()
        size = int(codes.max(initial=0)) + 1
        # Adds one child at a time. New codes are larger than all before, so nodes of different degree never agree.
        for number, nodes in enumerate(with_child):
            codes[nodes] = size + _dense(codes[nodes] * span + children[first[nodes] + number])
            size = int(codes[nodes].max()) + 1
        ids.append(_dense(codes))
    return ids


def _dense(codes: np.ndarray) -> np.ndarray:
    """Numbers the different values of an array of non-negative integers from 0, in their order."""
    largest = int(codes.max(initial=0))
    if largest < 4 * len(codes):  # counting is faster than sorting
        present = np.zeros(largest + 1, bool)
        present[codes] = True
        return (np.cumsum(present) - 1)[codes]
    return np.unique(codes, return_inverse=True)[1].reshape(-1).astype(np.int64)
