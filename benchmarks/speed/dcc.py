"""DCC: ``python -m condense.benchmarks.speed.dcc`` times the published step, after its warm-up, against ours.

See ``--help``, and ``dc.py`` for what a step includes.
"""

from __future__ import annotations

from typing import Any

from condense.benchmarks.speed import published
from condense.benchmarks.speed.dm import draws, options
from condense.benchmarks.speed.measure import Case, StepBenchmark, main


def _published(case: Case, config: Any) -> published.DCC:
    outer, inner = config.loops(case.ipc)
    return published.DCC(case.task, case.start(config), outer=outer, inner=inner, **options(case, config))


BENCHMARK = StepBenchmark("dcc", _published, draws, settings={"warm_networks": 0})

if __name__ == "__main__":
    main(BENCHMARK)
