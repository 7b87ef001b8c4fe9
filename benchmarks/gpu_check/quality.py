"""A set distilled from real data on the device, and the accuracy of students on it."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from typing import Any

from condense import networks, rng
from condense.benchmarks.gpu_check.check import Check
from condense.benchmarks.speed import dm, students
from condense.benchmarks.speed.measure import drive, synchronise
from condense.config import tiny_settings
from condense.data import task as task_module
from condense.device import peak_memory, pick_precision
from condense.engine import Run
from condense.errors import CondenseError
from condense.labels import HardLabels
from condense.sets import SyntheticSet
from condense.training import FixedSource, Student, accuracy, train

# -- (e) real data ----------------------------------------------------------------------------------------------------


def distil_data(check: Check) -> tuple[str, Any]:
    """DM on the data given, for about half of the time left, then five students on the set and five on random images.

    Steps of both are cut to the time; the record says how many there were. The students' recipe is otherwise dc-v1's.
    """
    if check.data is None:
        raise CondenseError("no --data given")
    task = task_module.load_task(check.data)
    budget = check.left() - (0 if check.tiny else 10)
    ipc, count = (2, 2) if check.tiny else (10, 5)
    depth = 2 if check.tiny else min(6, max(3, (min(task.shape[1:]) - 1).bit_length() - 2))
    network = f"convnet-d{depth}-w{8 if check.tiny else 128}-in"
    precision = pick_precision("auto", check.device)
    case = check.case(task, ipc, precision, **(tiny_settings("dm") if check.tiny else {}))

    def distilled(steps: int) -> tuple[SyntheticSet, float]:
        """The set after ``steps`` steps, and the median of their seconds."""
        marks: list[float] = []

        def between(run: Run, index: int) -> None:
            if steps < 20:  # a long run is not held up for the sake of a clock
                synchronise(check.device)
            marks.append(time.perf_counter())

        synthetic = drive("dm", dm.BENCHMARK.config(case, steps=steps), case, between, network=network)
        return synthetic, statistics.median(after - before for before, after in itertools.pairwise(marks))

    probe = 2 if check.tiny else 10
    steps = 3 if check.tiny else max(probe, min(20000, int(0.5 * budget / distilled(probe)[1])))
    began = time.perf_counter()
    synthetic, _ = distilled(steps)
    synchronise(check.device)
    seconds = time.perf_counter() - began

    served = task.to(check.device)
    random = [served.per_class(ipc, ("gpu-check", "random", k)) for k in range(count)]
    arms = {"distilled": [(synthetic.images.detach(), synthetic.classes)] * count, "random": random}

    def trained(arm: str, steps: int) -> list[networks.Network]:
        pupils = []
        for k, (images, labels) in enumerate(arms[arm]):
            with rng.seeded("gpu-check", "student", k):
                net = networks.build_network(network, task.shape, task.num_classes)
            source = FixedSource(images, HardLabels(labels, task.num_classes))
            pupils.append(Student(net, source, rng.key("gpu-check", "run", k)))
        train(pupils, students.recipe(steps, task.mirror), device=check.device, precision=precision)
        synchronise(check.device)
        return [pupil.network for pupil in pupils]

    def accuracies(nets: list[networks.Network]) -> list[float]:
        return [accuracy(net, served, device=check.device, precision=precision) for net in nets]

    accuracies(trained("random", 2))  # what only the first call costs
    began = time.perf_counter()
    nets = trained("random", probe)
    per_step = (time.perf_counter() - began) / probe
    began = time.perf_counter()
    accuracies(nets)
    testing = time.perf_counter() - began
    steps_needed = 1000 * math.ceil(len(synthetic.images) / 256)
    fitting = int((0.4 * check.left() - testing) / per_step)
    student_steps = 2 if check.tiny else max(probe, min(steps_needed, fitting))
    results: dict[str, Any] = {arm: {"accuracies": accuracies(trained(arm, student_steps))} for arm in arms}
    for result in results.values():
        result["mean"] = statistics.fmean(result["accuracies"])
        result["std"] = statistics.stdev(result["accuracies"])
    results |= {"data": task.name, "ipc": ipc, "network": network, "precision": precision, "steps": steps}
    results |= {"distil_seconds": seconds, "student_steps": student_steps, "peak_memory": peak_memory(check.device)}
    summary = ", ".join(f"{arm} {100 * results[arm]['mean']:.1f} ± {100 * results[arm]['std']:.1f} %" for arm in arms)
    return (
        f"{task.name}, ipc {ipc}, {steps} steps in {seconds:.0f} s, {student_steps} student steps: {summary}",
        results,
    )
