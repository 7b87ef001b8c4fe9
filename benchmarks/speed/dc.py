"""DC: ``python -m condense.benchmarks.speed.dc`` times the published step against ours; see ``--help``.

A step includes the training of its network on the images, where one follows: at 10 images per class 9 of 10.
"""

from __future__ import annotations

from typing import Any

from condense.benchmarks.speed import published
from condense.benchmarks.speed.dm import draws, options
from condense.benchmarks.speed.measure import Case, StepBenchmark, main


def published_loop(case: Case, config: Any, loop: type[published.DC] = published.DC) -> published.DC:
    """The published loop of DC or DSA, or another with its arguments."""
    outer, inner = config.loops(case.ipc)
    return loop(case.task, case.start(config), outer=outer, inner=inner, **options(case, config))


BENCHMARK = StepBenchmark("dc", published_loop, draws)

if __name__ == "__main__":
    main(BENCHMARK)
