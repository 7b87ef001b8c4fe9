"""DCC: ``python -m condense.benchmarks.speed.dcc`` times the published step, after its warm-up, against ours.

See ``--help``, and ``dc.py`` for what a step includes.
"""

from __future__ import annotations

import functools

from condense.benchmarks.speed import published
from condense.benchmarks.speed.dc import published_loop
from condense.benchmarks.speed.dm import draws
from condense.benchmarks.speed.measure import StepBenchmark, main

BENCHMARK = StepBenchmark(
    "dcc", functools.partial(published_loop, loop=published.DCC), draws, settings={"warm_share": 0.0}
)

if __name__ == "__main__":
    main(BENCHMARK)
