"""DataDAM: ``python -m condense.benchmarks.speed.datadam`` times the published step against ours; see ``--help``."""

from __future__ import annotations

from typing import Any

from condense.benchmarks.speed import published
from condense.benchmarks.speed.dm import draws, options
from condense.benchmarks.speed.measure import Case, StepBenchmark, main


def _published(case: Case, config: Any) -> published.DataDAM:
    return published.DataDAM(case.task, case.start(config), **options(case, config))


BENCHMARK = StepBenchmark("datadam", _published, draws, batch_real=64)

if __name__ == "__main__":
    main(BENCHMARK)
