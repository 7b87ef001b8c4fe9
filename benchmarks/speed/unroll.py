"""Inner loops: ``python -m condense.benchmarks.speed.unroll`` measures the ways to the gradient through N steps.

For each N the peak memory and the seconds of one call, exact by the adjoint and by one graph of all steps, each in a
process of its own; and how far TESLA's gradient is from the exact one, from a network after a short training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import networks, rng
from condense.augment import OPERATIONS, make_augmentation
from condense.benchmarks.speed.measure import (
    SCHEMA,
    Case,
    Others,
    Parser,
    StepBenchmark,
    describe_data,
    disturbance,
    guarded,
    positive,
    random_images,
    random_task,
    run_alone,
    run_in_child,
    synchronise,
    write,
)
from condense.data import task as task_module
from condense.device import pick_device
from condense.engine import StepLoss, Target, unroll
from condense.formatting import aligned
from condense.judge import environment
from condense.networks import Network
from condense.training import Student, TaskSource, TrainConfig, train

ADJOINT, GRAPH, TESLA = "adjoint", "graph", "tesla"
EPOCHS_AHEAD = 2
"""Epochs of training from the start to the goal, as MTT's."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shape: tuple[int, int, int] = (3, 32, 32)
    classes: int = 10
    per_class: int = 5000
    """Random images of a class, where no data are given."""
    ipc: int = 10
    """All synthetic images are one batch, as published for CIFAR-10 at 10 images per class."""
    depth: int = 3
    width: int = 32
    batch: int = 256
    """Images in a step of the short training."""
    adjoint: tuple[int, ...] = (10, 20, 30, 50, 80)
    """Numbers of steps whose memory and time are measured."""
    graph: tuple[int, ...] = (10, 20, 30)
    gradients: tuple[int, ...] = (10, 20, 30, 50)
    """Numbers of steps for which TESLA is compared with the exact gradient."""


TINY = Sizes((1, 8, 8), 3, 12, 2, 2, 4, 16, (2, 3), (2,), (2, 3))


# -- a problem --------------------------------------------------------------------------------------------------------


def flat(weights: Mapping[str, Tensor], net: Network) -> Tensor:
    """(P,), the named weights in the order of the network's parameters."""
    return torch.cat([weights[name].detach().reshape(-1) for name, _ in net.named_parameters()])


def step_losses(net: Network, images: Tensor, labels: Tensor, steps: int, mirror: bool = True) -> StepLoss:
    """The mean cross-entropy of all images, under DSA drawn once for each of ``steps`` steps."""
    names, shapes = zip(*((name, parameter.shape) for name, parameter in net.named_parameters()))
    augmentation = make_augmentation("_".join(OPERATIONS), mirror=mirror)
    size = (images.shape[2], images.shape[3])
    drawn = [augmentation.draw(rng.Draws("unroll", "augment", i), len(images), size, groups=1) for i in range(steps)]

    def loss(theta: Tensor, i: int) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        views = augmentation.apply(images, drawn[i])
        return F.cross_entropy(torch.func.functional_call(net, weights, (views,)), labels)

    return loss


def fresh(case: Case) -> Network:
    """The case's network with random weights, on its device."""
    with rng.seeded("unroll", "network"):
        return networks.build_network(case.network, case.task.shape, case.task.num_classes).to(case.device)


def targets_of(task: task_module.Task, ipc: int, device: torch.device) -> Tensor:
    return torch.arange(task.num_classes, device=device).repeat_interleave(ipc)


# -- memory and time --------------------------------------------------------------------------------------------------


class Calls:
    """A loop whose step is one call of :func:`unroll` on random images, timed."""

    def __init__(self, case: Case, mode: str, steps: int, rate: float) -> None:
        self.case, self.mode, self.steps, self.rate = case, mode, steps, rate
        self.net, self.seconds = fresh(case), list[float]()
        size = case.ipc * case.task.num_classes
        self.images = random_images(size, case.task.shape, "unroll", "images").to(case.device).requires_grad_()
        self.loss = step_losses(self.net, self.images, targets_of(case.task, case.ipc, case.device), steps)
        self.start = flat(dict(self.net.named_parameters()), self.net)
        noise = torch.randn(self.start.shape, generator=rng.generator("unroll", "goal"))
        self.goal = self.start + 0.01 * noise.to(case.device)

    def step(self, draws: Any = None) -> None:
        synchronise(self.case.device)
        began = time.perf_counter()
        unroll(
            self.loss,
            self.start,
            {"images": self.images},
            self.rate,
            self.steps,
            [Target(self.steps, self.goal)],
            grad_mode=self.mode,
        )
        synchronise(self.case.device)
        self.seconds.append(time.perf_counter() - began)


class Alone(StepBenchmark):
    """Has :func:`run_alone` measure calls; there is no method whose configuration it would need."""

    def config(self, case: Case, **changes: Any) -> None:
        return None


def measure_alone(case: Case, mode: str, steps: int, calls: int, rate: float) -> dict[str, Any]:
    """Peak bytes of this process, and seconds of each call but the first; to be called in a process of its own.

    A tiny call goes first, or the peak would count what torch loads when it is first used.
    """
    small = random_task(TINY.classes, 1, TINY.shape, 1)
    Calls(_case(small.to(case.device), TINY, case.device), mode, 2, rate).step()
    loops: list[Calls] = []

    def made(case: Case, config: None) -> Calls:
        loops.append(Calls(case, mode, steps, rate))
        return loops[0]

    others = Others()
    peaks = run_alone(Alone("unroll", made, lambda *_: None), case, mode, calls + 1)
    floats = steps * loops[0].start.numel() * loops[0].start.element_size()
    return {**peaks, "weights": floats, "seconds": loops[0].seconds[1:], "others_share": others.share()}


def used(results: Mapping[str, Any]) -> int:
    """Bytes that the calls took: on the device where there is one, else beyond what the process held before."""
    return results.get("device", results["host"] - results["baseline"])


# -- TESLA against the exact gradient ---------------------------------------------------------------------------------


def snapshots(case: Case, batch: int) -> tuple[Network, Tensor, Tensor]:
    """The case's network, and its weights after one epoch of training on the task and after three, flat."""
    net, epoch = fresh(case), -(-len(case.task.train) // batch)
    recipe = TrainConfig(
        (1 + EPOCHS_AHEAD) * epoch,
        batch,
        lr=0.01,
        momentum=0.0,
        weight_decay=0.0,
        lr_milestones=(),
        augment=make_augmentation("_".join(OPERATIONS), mirror=case.task.mirror),
    )
    kept: list[Tensor] = []
    train(
        [Student(net, TaskSource(case.task, case.device), rng.key("unroll", "expert"))],
        recipe,
        device=case.device,
        watch=lambda k, step, state: kept.append(flat(state, net)),
        watch_every=epoch,
    )
    return net, kept[0], kept[-1]


def compare(case: Case, numbers: Sequence[int], batch: int, rate: float) -> dict[int, dict[str, float]]:
    """For each number of steps on real images: the loss, and how TESLA's gradients compare with the exact ones."""
    net, start, goal = snapshots(case, batch)
    images, labels = case.task.per_class(case.ipc, ("unroll", "real"))
    images.requires_grad_()
    results = {}
    for steps in numbers:
        loss = step_losses(net, images, labels, steps, case.task.mirror)
        exact, tesla = (
            unroll(loss, start, {"images": images}, rate, steps, [Target(steps, goal)], grad_mode=mode)
            for mode in (ADJOINT, TESLA)
        )
        assert exact.gradients and tesla.gradients  # no gate
        a, b = (gradients["images"].double().flatten() for gradients in (tesla.gradients, exact.gradients))
        results[steps] = {
            "loss": float(exact.loss),
            "cosine": float(F.cosine_similarity(a, b, dim=0)),
            "length_ratio": float(a.norm() / b.norm()),
            "rate_exact": float(exact.gradients["step_size"]),
            "rate_tesla": float(tesla.gradients["step_size"]),
        }
    return results


# -- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options, measures, prints a table and exits."""
    guarded(_measure, arguments)


def _measure(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.speed.unroll", description=__doc__)
    parser.add_argument(
        "--data", help="what TESLA is compared on: a name, folder, .npz or .h5; random images when left out"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write the numbers to")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of the inner steps")
    parser.add_argument("--calls", type=positive, default=3, help="calls that are timed, after one that is not")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a few steps on a few small images, to try the script")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device, sizes = pick_device(options.device), TINY if options.tiny else Sizes()
    if options.alone:  # memory does not depend on what is in the images, so the data stay out of it
        mode, steps = options.alone.split()
        case = _case(random_task(sizes.classes, 1, sizes.shape, 1), sizes, device)
        print(json.dumps(measure_alone(case, mode, int(steps), options.calls, options.rate)))
        return 0
    task = (
        task_module.load_task(options.data)
        if options.data
        else random_task(sizes.classes, sizes.per_class, sizes.shape)
    )
    case = _case(task.to(device), sizes, device)
    fresh(case)  # refuses a network that does not fit the images, before anything is measured
    plan = {ADJOINT: sizes.adjoint, GRAPH: sizes.graph}
    alone = Alone("unroll", lambda case, config: NotImplemented, lambda *_: None)
    memory = {
        mode: {n: run_in_child(alone, arguments, f"{mode} {n}") for n in numbers} for mode, numbers in plan.items()
    }
    record = {
        "schema": SCHEMA,
        "benchmark": "unroll",
        "network": case.network,
        "ipc": case.ipc,
        "rate": options.rate,
        "memory": {"data": f"random images {'x'.join(map(str, sizes.shape))} in {sizes.classes} classes", **memory},
        "tesla": {"data": describe_data(task), "steps": compare(case, sizes.gradients, sizes.batch, options.rate)},
        "environment": environment(device, "fp32"),
    }
    write(options.out, json.dumps(record, indent=1) + "\n")
    print(format_report(record))
    return 0


def _case(task: task_module.Task, sizes: Sizes, device: torch.device) -> Case:
    return Case(task, sizes.ipc, sizes.width, device, sizes.depth)


def format_report(record: Mapping[str, Any]) -> str:
    memory, tesla = record["memory"], record["tesla"]
    adjoint, graph, compared = memory[ADJOINT], memory[GRAPH], tesla["steps"]
    rows = [
        [
            "steps",
            "adjoint MiB",
            "of it weights",
            "graph MiB",
            "adjoint/graph",
            "adjoint s",
            "graph s",
            "time ratio",
            "cosine",
            "length ratio",
            "rate exact",
            "rate TESLA",
        ]
    ]
    for n in sorted({*adjoint, *graph, *compared}):
        sides = [result.get(n) for result in (adjoint, graph)]
        mebibytes = [used(side) / 2**20 if side else None for side in sides]
        seconds = [statistics.median(side["seconds"]) if side else None for side in sides]
        weights = sides[0]["weights"] / 2**20 if sides[0] else None
        row = [_cell(mebibytes[0], ".0f"), _cell(weights, ".1f"), _cell(mebibytes[1], ".0f"), _ratio(*mebibytes)]
        row += [_cell(seconds[0], ".3f"), _cell(seconds[1], ".3f"), _ratio(*seconds)]
        gaps = compared.get(n, {})
        row += [_cell(gaps.get(name), ".3f") for name in ("cosine", "length_ratio")]
        rows.append([str(n), *row, *(_cell(gaps.get(name), ".4g") for name in ("rate_exact", "rate_tesla"))])
    shares = [result["others_share"] for side in (adjoint, graph) for result in side.values()]
    measured = [share for share in shares if share is not None]
    return "\n".join(
        [
            f"{record['network']}, ipc {record['ipc']}, all images in each step, DSA, rate {record['rate']}; "
            f"{record['environment']['device']}",
            f"memory and time: {memory['data']}; peak of a process beyond what it held before (on CUDA: allocated)",
            f"TESLA against the exact gradient: {tesla['data']}; start after one epoch, goal {EPOCHS_AHEAD} later, "
            "set of real images",
            aligned(rows),
            *disturbance(max(measured) if measured else None),
        ]
    )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(a: float | None, b: float | None) -> str:
    return _cell(a / b, ".2f") if a is not None and b else ""


if __name__ == "__main__":
    main()
