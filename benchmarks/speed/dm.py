"""DM: ``python -m condense.benchmarks.speed.dm`` times the published step against ours; see ``--help``."""

from __future__ import annotations

from typing import Any

from condense.augment import make_augmentation
from condense.benchmarks.speed import published
from condense.benchmarks.speed.measure import Case, StepBenchmark, main
from condense.engine import Run
from condense.rng import Draws


def options(case: Case, config: Any) -> dict[str, Any]:
    """What a published loop is given, for a configuration of the method."""
    return {
        "device": case.device,
        "lr_img": config.lr_img,
        "momentum": config.momentum,
        "batch_real": config.batch_real,
        "operations": make_augmentation(config.augment, mirror=case.task.mirror).ops,
        "depth": case.depth,
        "width": case.width,
        "seed": case.seed,
    }


def draws(case: Case, config: Any, run: Run, index: int) -> published.StepInputs:
    """The draws of the product's step ``index``."""
    task = case.task
    ids = [task.sample_ids(config.batch_real, (run.seed, "real", index), [c]) for c in range(task.num_classes)]
    augment = make_augmentation(config.augment, mirror=task.mirror)
    views = augment.draw(Draws(run.seed, "augment", index), task.num_classes, task.shape[1:])
    return published.StepInputs(run.random_network(index), [part.numpy() for part in ids], views)


def _published(case: Case, config: Any) -> published.PublishedDM:
    return published.PublishedDM(case.task, case.start(config), **options(case, config))


BENCHMARK = StepBenchmark("dm", _published, draws)

if __name__ == "__main__":
    main(BENCHMARK)
