"""Evaluation of sets of graphs: students trained on a set and on control arms, and the record of the results."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condense import rng
from condense.config import whole_number
from condense.device import pick_device
from condense.errors import CondenseError, did_you_mean
from condense.formatting import size
from condense.graphs.arrays import GraphArrays, import_pyg, smallest
from condense.graphs.distillation import data_argument, refuse_others
from condense.graphs.graph_set import GraphSet, SyntheticGraphs
from condense.graphs.networks import NETWORKS, GraphNetwork
from condense.graphs.protocol import GraphProtocol, get_graph_protocol
from condense.graphs.task import GraphTask
from condense.judge import environment, summary
from condense.selection import herding

CONTROLS = ("random", "herding", "full")

GRAPH_RECORD_SCHEMA = "condense.graph-record/1"

METRIC = "roc_auc"

TEST_BATCH = 512
"""Real graphs in a pass without gradients."""

EMBEDDING_NETWORK = "gin"
"""Network, trained on all real graphs, in whose embeddings herding selects."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """Areas under the ROC curve of a student."""

    test: float
    valid: float
    step: int
    """Step at which the validation area was largest; the student is tested with the weights of this step."""


class GraphJudge:
    """Trains students on graphs and tests them on the real graphs of a task, under one protocol.

    Args:
        distilled: the set whose depth, pool and features the students have.
        task: the real graphs.
        protocol: the rules.
        seed: seed of weights, batches, dropout and random graphs.
        device: where students are trained.
    """

    def __init__(
        self, distilled: GraphSet, task: GraphTask, protocol: GraphProtocol, seed: int, device: torch.device
    ) -> None:
        self.distilled, self.task, self.protocol, self.seed, self.device = distilled, task, protocol, seed, device
        self._valid, self._test = self._batches(task.valid), self._batches(task.test)

    def build(self, name: str, run: int) -> GraphNetwork:
        """Returns the student of a run with its initial weights, which are the same in all arms."""
        manifest = self.distilled.manifest
        sizes, rules = manifest["feature_sizes"], self.protocol
        structure = {"depth": manifest["depth"], "pool": manifest["pool"]}
        with rng.seeded(self.seed, "graph-student", run):
            network = GraphNetwork(
                name,
                sizes["nodes"],
                sizes["edges"],
                self.task.num_classes,
                width=rules.width,
                dropout=rules.dropout,
                **structure,
            )
        return network.to(self.device)

    def train(self, name: str, examples: SyntheticGraphs, run: int, steps: int) -> tuple[GraphNetwork, Score]:
        """Trains a student and returns it with the weights that are best on the validation graphs, and its scores."""
        rules, best = self.protocol, Score(0.0, -1.0, 0)
        network, state = self.build(name, run), {}
        optimizer = torch.optim.Adam(network.parameters(), rules.lr, weight_decay=rules.weight_decay)
        draws, labels = rng.Draws(self.seed, "graph-batches", run), examples.graphs.labels
        checks = {round(steps * (number + 1) / rules.checks) for number in range(rules.checks)} - {0}
        with rng.seeded(self.seed, "graph-dropout", run, device=self.device):
            for step in range(1, steps + 1):
                batch = make_batch(examples, sample_balanced(labels, examples.weights, rules.batch, draws), self.device)
                loss = nn.functional.cross_entropy(network(batch), batch.y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step in checks:
                    valid = self._area(network, self._valid, self.task.valid.labels)
                    if valid > best.valid:
                        best, state = Score(0.0, valid, step), copy.deepcopy(network.state_dict())
        network.load_state_dict(state)
        return network, dataclasses.replace(best, test=self._area(network, self._test, self.task.test.labels))

    def embed(self, network: GraphNetwork, graphs: GraphArrays) -> Tensor:
        """Returns the embeddings of real graphs, (graphs, width) on the CPU."""
        return _in_eval(network, network.embed, self._batches(graphs))

    def _area(self, network: GraphNetwork, batches: Sequence[Any], labels: np.ndarray) -> float:
        from sklearn.metrics import roc_auc_score

        scores = _in_eval(network, network, batches).double().softmax(1).numpy()
        if not np.isfinite(scores).all():
            raise CondenseError(f"{network.name}: its outputs are not finite; give a lower depth, or pool=mean")
        if scores.shape[1] == 2:
            return float(roc_auc_score(labels, scores[:, 1]))
        return float(roc_auc_score(labels, scores, multi_class="ovr"))

    def _batches(self, graphs: GraphArrays) -> list[Any]:
        examples, rows = real_examples(graphs), np.arange(len(graphs))
        starts = range(0, len(graphs), TEST_BATCH)
        return [make_batch(examples, rows[start : start + TEST_BATCH], self.device) for start in starts]


def real_examples(graphs: GraphArrays) -> SyntheticGraphs:
    """Returns real graphs, all nodes and graphs of which count alike, in the form of distilled ones."""
    ones = np.ones(len(graphs.nodes), np.float32)
    return SyntheticGraphs(graphs, ones, graphs.degrees, np.ones(len(graphs), np.int64), "mean", 0)


def make_batch(examples: SyntheticGraphs, rows: np.ndarray, device: torch.device) -> Any:
    """Returns the graphs at ``rows``, which may repeat, as one ``Data`` with ``batch``, ``num_graphs``,
    ``multiplicity`` and ``degree``; PyTorch Geometric's ``Batch`` takes several times as long to make it."""
    chosen, nodes = examples.graphs.select(rows), examples.graphs.node_rows(rows)
    arrays = {
        "x": chosen.nodes,
        "edge_index": chosen.joint_edges,
        "edge_attr": chosen.edge_features,
        "y": chosen.labels,
        "batch": np.repeat(np.arange(len(rows)), chosen.node_counts),
        "multiplicity": examples.multiplicities[nodes].astype(np.float32),
        "degree": examples.degrees[nodes].astype(np.int64),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    data_class = import_pyg("students of graphs").data.Data
    return data_class(**tensors, num_graphs=len(rows)).to(device)


def sample_balanced(labels: np.ndarray, weights: np.ndarray, count: int, draws: rng.Draws) -> np.ndarray:
    """Samples graphs with replacement: a class, all being equally likely, then one of its graphs by its weight.

    Args:
        labels: class of each graph, each from 0 to the largest at least once.
        weights: relative frequency of each graph.
        count: number of graphs.
        draws: random numbers.
    """
    chosen = draws.integers(int(labels.max()) + 1, count).numpy()
    shares = draws.uniform(count).double().numpy()
    rows = np.zeros(count, np.int64)
    for label in np.unique(chosen):
        members, places = np.flatnonzero(labels == label), np.flatnonzero(chosen == label)
        bounds = np.cumsum(weights[members], dtype=np.float64)
        rows[places] = members[np.searchsorted(bounds, shares[places] * bounds[-1], side="right")]
    return rows


def evaluate_graphs(
    distilled: GraphSet,
    task: GraphTask,
    *,
    networks: str | Sequence[str] | None = None,
    runs: int | None = None,
    protocol: str | None = None,
    controls: str | Sequence[str] = ("random",),
    seed: int = 0,
    device: str = "auto",
    quiet: bool = True,
    **others: Any,
) -> dict[str, Any]:
    """Trains students on a set of graphs and on control arms under one protocol and returns the record.

    All arms have the same training rules and, for each run, the same initial weights. The weights of a student are
    those with the largest area under the ROC curve on the real validation graphs; the area on the test graphs is then
    measured once. With more than two classes it is the mean of those of each class against the others.

    Args:
        distilled: the set to evaluate.
        task: the real graphs, with the classes and features of the set.
        networks: some of gcn, gat and gin; by default those of the protocol.
        runs: students per arm; by default the number of the protocol.
        protocol: name; by default that of the manifest.
        controls: any of random (as many random real graphs of each class as the set has), herding (as many that are
            selected by their embeddings in a GIN trained on all) and full (all real graphs, for the protocol's epochs).
        seed: seed of the students' weights, batches and dropout, and of the random graphs.
        device: auto, cpu, cuda, ...
        quiet: no progress on stderr.
        others: arguments of the evaluation of images, which are refused unless they have their defaults.

    Returns:
        The record, JSON-ready.

    Raises:
        CondenseError: the data do not fit the set, or an unknown network, protocol or control.
    """
    refuse_others(others, f"the set '{distilled.name}' holds graphs")
    rules = get_graph_protocol(protocol or distilled.manifest.get("protocol", "graphs-v1"))
    names = list(dict.fromkeys([networks] if isinstance(networks, str) else networks or rules.networks))
    arms = list(dict.fromkeys([controls] if isinstance(controls, str) else controls or []))
    for what, given, known in (("network", names, NETWORKS), ("control", arms, CONTROLS)):
        for name in given:
            if name not in known:
                raise CondenseError(f"{what} '{name}': not for graphs{did_you_mean(name, known)}")
    runs = rules.runs if runs is None else whole_number(runs, "--runs")
    if not 1 <= runs <= 1000:
        raise CondenseError(f"--runs {runs}: must be 1 to 1,000")
    seed = whole_number(seed, "--seed")
    check_task(distilled, task)
    judge = GraphJudge(distilled, task, rules, seed, pick_device(device))
    sources = _sources(judge, arms)
    results = []
    for name in names:
        for arm, (steps, source) in sources.items():
            began, scores, made = time.monotonic(), [], []
            for run in range(runs):
                made.append(source(run))
                scores.append(judge.train(name, made[-1], run, steps)[1])
            results.append(_entry(distilled, arm, name, steps, scores, made, time.monotonic() - began))
            if not quiet:
                _log.warning("%s, %s: %s", name, arm, _format_entry(results[-1])[2])
    return _record(judge, results, runs, names, arms)


def check_task(distilled: GraphSet, task: GraphTask) -> None:
    """Checks that real graphs have the classes and features of a set.

    Raises:
        CondenseError: they do not.
    """
    if task.classes != distilled.classes:
        raise CondenseError(
            f"--data {task.name}: has the classes {', '.join(task.classes)}, but {distilled.name} has "
            f"{', '.join(distilled.classes)}"
        )
    for what, real in zip(("nodes", "edges"), task.feature_sizes()):
        own = distilled.manifest["feature_sizes"][what]
        if len(own) != len(real) or any(value > limit for value, limit in zip(real, own)):
            raise CondenseError(
                f"--data {task.name}: the features of its {what} have {real} values, those of {distilled.name} "
                f"{own}; give the data that the set was made from"
            )


def _sources(judge: GraphJudge, controls: Sequence[str]) -> dict[str, tuple[int, Callable[[int], SyntheticGraphs]]]:
    """Arm to its number of steps and the graphs of a run."""
    made, task, rules = judge.distilled.synthetic, judge.task, judge.protocol
    counts = np.bincount(made.graphs.labels, minlength=task.num_classes).tolist()
    full, full_steps = real_examples(task.train), max(rules.steps, rules.full_epochs * len(task.train) // rules.batch)
    sources: dict[str, tuple[int, Callable[[int], SyntheticGraphs]]] = {"distilled": (rules.steps, lambda run: made)}
    for control in controls:
        if control == "random":
            sources[control] = rules.steps, lambda run: real_examples(_random(task, counts, judge.seed, run))
        elif control == "herding":
            network = judge.train(EMBEDDING_NETWORK, full, 0, full_steps)[0]
            selected = real_examples(_herded(task, judge.embed(network, task.train), counts))
            sources[control] = rules.steps, functools.partial(_same, selected)
        else:
            sources[control] = full_steps, functools.partial(_same, full)
    return sources


def _same(examples: SyntheticGraphs, run: int) -> SyntheticGraphs:
    return examples


def _random(task: GraphTask, counts: Sequence[int], seed: int, run: int) -> GraphArrays:
    """Random train graphs, ``counts`` of each class, or all if there are fewer."""
    rows = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(task.train.labels == label)
        rows.append(members[rng.Draws(seed, "random-graphs", run, label).sample(len(members), count).numpy()])
    return task.train.select(np.concatenate(rows))


def _herded(task: GraphTask, embeddings: Tensor, counts: Sequence[int]) -> GraphArrays:
    """Train graphs selected by herding, ``counts`` of each class, or all if there are fewer."""
    rows = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(task.train.labels == label)
        rows.append(members[herding(embeddings[members], min(count, len(members))).numpy()])
    return task.train.select(np.concatenate(rows))


def _in_eval(network: GraphNetwork, function: Callable[[Any], Tensor], batches: Sequence[Any]) -> Tensor:
    """The outputs of ``function`` for all batches, on the CPU, with ``network`` in eval mode."""
    network.eval()
    with torch.no_grad():
        outputs = torch.cat([function(batch).cpu() for batch in batches])
    network.train()
    return outputs


def _entry(
    distilled: GraphSet,
    arm: str,
    network: str,
    steps: int,
    scores: Sequence[Score],
    examples: Sequence[SyntheticGraphs],
    seconds: float,
) -> dict[str, Any]:
    real = [sum(array.nbytes for array in smallest(part.graphs.to_dict()).values()) for part in examples]
    nbytes = distilled.nbytes()["total"] if arm == "distilled" else round(float(np.mean(real)))
    values = [score.test for score in scores]
    return {
        "arm": arm,
        "network": network,
        "steps": steps,
        "graphs": len(examples[0].graphs),
        "bytes": nbytes,
        METRIC: values,
        f"validation_{METRIC}": [score.valid for score in scores],
        "best_steps": [score.step for score in scores],
        **summary(values),
        "seconds": round(seconds, 2),
    }


def _record(
    judge: GraphJudge, results: list[dict[str, Any]], runs: int, names: Sequence[str], controls: Sequence[str]
) -> dict[str, Any]:
    distilled, task, manifest = judge.distilled, judge.task, judge.distilled.manifest
    words = ["condense", "evaluate", f"{distilled.name.replace('/', '-')}.h5", "--data", data_argument(task)]
    words += ["--networks", ",".join(names), "--runs", str(runs), "--protocol", judge.protocol.name]
    words += ["--controls", ",".join(controls) or "none"] + ["--seed", str(judge.seed)] * (judge.seed != 0)
    return {
        "schema": GRAPH_RECORD_SCHEMA,
        "metric": METRIC,
        "set": {
            **{key: manifest[key] for key in ("name", "kind", "method", "dataset", "ipc", "pool", "depth")},
            "sha256": distilled.sha256(),
            "graphs": len(distilled),
            "bytes": distilled.nbytes(),
            "seed": manifest.get("seed"),
            "command": manifest.get("command"),
        },
        "data": {
            "name": task.name,
            "fingerprint": task.fingerprint,
            "same": task.fingerprint == manifest.get("data", {}).get("fingerprint"),
            "split": task.split,
            "graphs": {name: len(getattr(task, name)) for name in ("train", "valid", "test")},
        },
        "protocol": {**dataclasses.asdict(judge.protocol), "networks": list(judge.protocol.networks)},
        "runs": runs,
        "seed": judge.seed,
        "results": results,
        "differences": _differences(results),
        "cost": manifest.get("cost", {}),
        "environment": environment(judge.device, "fp32"),
        "command": shlex.join(words),
    }


def _differences(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By network and control: area of the set minus that of the control, paired by run, with its interval."""
    values = {(entry["network"], entry["arm"]): entry[METRIC] for entry in results}
    differences: dict[str, dict[str, Any]] = {}
    for (network, arm), areas in values.items():
        if arm != "distilled":
            pairs = zip(values[network, "distilled"], areas)
            facts = summary([own - other for own, other in pairs])
            differences.setdefault(network, {})[arm] = {"value": facts["mean"], "ci95": facts["ci95"]}
    return differences


def format_graph_record(record: dict[str, Any]) -> str:
    """Formats the results of a record as lines for a terminal."""
    head = ("network", "arm", "ROC-AUC (± std)", "95 % interval", "graphs", "bytes", "steps", "seconds")
    rows = [head, *map(_format_entry, record["results"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for network, arms in record["differences"].items():
        for arm, score in arms.items():
            interval = "" if score["ci95"] is None else " ({:+.3f} to {:+.3f})".format(*score["ci95"])
            lines.append(f"{network}: distilled minus {arm} {score['value']:+.3f}{interval}")
    return "\n".join(lines)


def _format_entry(entry: dict[str, Any]) -> tuple[str, ...]:
    std = "" if entry["std"] is None else f" ± {entry['std']:.3f}"
    bounds = entry["ci95"] and [min(max(bound, 0), 1) for bound in entry["ci95"]]
    interval = "" if bounds is None else "{:.3f} to {:.3f}".format(*bounds)
    return (
        entry["network"],
        entry["arm"],
        f"{entry['mean']:.3f}{std}",
        interval,
        f"{entry['graphs']:,}",
        size(entry["bytes"]),
        f"{entry['steps']:,}",
        f"{entry['seconds']:.1f}",
    )
