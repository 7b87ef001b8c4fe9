"""DSA: ``python -m condense.benchmarks.speed.dsa`` times the published step against ours; see ``dc.py``."""

from __future__ import annotations

from condense.benchmarks.speed.dc import published_loop
from condense.benchmarks.speed.dm import draws
from condense.benchmarks.speed.measure import StepBenchmark, main

BENCHMARK = StepBenchmark("dsa", published_loop, draws)

if __name__ == "__main__":
    main(BENCHMARK)
