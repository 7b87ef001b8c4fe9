"""Mirage's time against that of building its trees: ``python -m condense.benchmarks.graph_trees --data NAME=FILE.csv``.

Both run in one process on the train graphs. Building the trees writes the tree of each node as a string, as the
published code does, and is only the first part of a distillation; Mirage finds equal trees by colour refinement. The
numbers of different trees are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from condense.benchmarks.speed.measure import Parser, aligned, guarded, positive
from condense.formatting import duration
from condense.graphs import GraphArrays, GraphOptions, GraphRun, load_graph_task
from condense.methods.colour_refinement import refine, row_ids
from condense.registry import METHODS


def count_trees_plainly(graphs: GraphArrays, depth: int) -> int:
    """Number of different computation trees, each of which is unrolled and written as a string."""
    codes: set[str] = set()
    labels = np.column_stack([graphs.nodes, graphs.degrees]).tolist()
    edge_labels = graphs.edge_features.tolist()
    incoming: list[list[tuple[str, int]]] = [[] for _ in labels]
    for (source, target), label in zip(graphs.joint_edges.T.tolist(), edge_labels):
        incoming[target].append((",".join(map(str, label)), source))
    names = [",".join(map(str, label)) for label in labels]

    def unroll(node: int, depth: int) -> str:
        if not depth:
            return names[node]
        children = sorted(f"{label}:{unroll(source, depth - 1)}" for label, source in incoming[node])
        return f"{names[node]}({';'.join(children)})"

    for node in range(len(names)):
        codes.add(unroll(node, depth))
    return len(codes)


def count_trees(graphs: GraphArrays, depth: int) -> int:
    """The same number by colour refinement."""
    labels = row_ids(np.column_stack([graphs.nodes, graphs.degrees]))
    sources, targets = graphs.joint_edges
    return 1 + int(refine(labels, sources, targets, row_ids(graphs.edge_features), depth)[-1].max())


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """The result, and the seconds of the clock and of the processor that it took."""
    began, used = time.monotonic(), time.process_time()
    result = function(*arguments)
    return result, time.monotonic() - began, time.process_time() - used


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.graph_trees", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="NAME=FILE.csv with a column smiles, or tu:NAME")
    parser.add_argument("--depth", type=positive, default=3, help="depth of the trees")
    parser.add_argument("--ipc", type=positive, default=10, help="graphs per class")
    options = parser.parse_args(arguments)
    task = load_graph_task(options.data, GraphOptions())
    entry = METHODS.get("mirage")
    made, *mirage = _timed(entry.function, task, entry.config(depth=options.depth), GraphRun(options.ipc, 0))
    refined, *refinement = _timed(count_trees, task.train, options.depth)
    unrolled, *building = _timed(count_trees_plainly, task.train, options.depth)
    if refined != unrolled:
        raise AssertionError(f"{refined} different trees by colour refinement, {unrolled} by unrolling")
    rows = [["part", "clock", "processor", "building / this"]]
    for name, (clock, used) in (
        (f"mirage, {len(made.graphs)} graphs", mirage),
        ("colour refinement alone", refinement),
        ("building all trees", building),
    ):
        rows.append([name, duration(clock), duration(used), f"{building[1] / used:.1f}"])
    print(
        f"{task.name}: {len(task.train):,} train graphs, {len(task.train.nodes):,} nodes, {refined:,} different trees"
    )
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    guarded(_main, None)
