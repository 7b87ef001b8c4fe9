"""Every method for the same minutes on the same images: ``python -m condense.benchmarks.equal_time --data NAME=PATH``.

Each set is made and judged by the command line in processes of their own, so seconds and peak memory are those that a
user would see. A set or record that is there is kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condense.benchmarks.speed.measure import Parser, aligned, guarded, positive
from condense.errors import CondenseError
from condense.registry import METHODS
from condense.units import duration, size

SETTINGS: dict[str, list[str]] = {
    # At 1 image per class the published warm-up of 250 networks would fill some ten CPU minutes; this is a third.
    "dcc": ["warm_networks=35"],
    "dsac": ["warm_networks=35"],
}
"""What differs from a method's defaults."""


def _condense(*words: str) -> None:
    """One command of the command line, its progress on this terminal."""
    code = subprocess.run([sys.executable, "-m", "condense", *words]).returncode
    if code:
        raise CondenseError(f"`condense {' '.join(words)}` ended with code {code}")


def fill(method: str, data: str, out: Path, *, ipc: int, network: str, minutes: float, protocol: str) -> dict[str, Any]:
    """The record of ``method`` (settings after colons) on this budget, made and judged where it is not there yet."""
    method, *settings = method.split(":")
    name = data.partition("=")[0].split("/")[-1]
    stem = "-".join([name, method, f"ipc{ipc}", network, f"{minutes:g}min", protocol, *settings])
    made, record = out / "sets" / f"{stem}.h5", out / "records" / f"{stem}.json"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        _condense(
            "distill", method, "--data", data, "--ipc", str(ipc), "--network", network, "--minutes", f"{minutes:g}",
            "--out", str(made), "--run-dir", str(out / "runs" / stem), "--force", "--track", "none",
            *SETTINGS.get(method, []), *settings,
        )  # fmt: skip
    if not record.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        _condense(
            "evaluate", str(made), "--data", data, "--protocol", protocol, "--controls", "random,noise", "--json",
            str(record),
        )  # fmt: skip
        _condense("preview", str(made), "--out", str(record.with_suffix(".png")), "--force")
    return json.loads(record.read_text())


def table(names: Sequence[str], records: Sequence[dict[str, Any]], steps: Sequence[int]) -> str:
    """One row for each record: accuracies ± half the 95 % interval, seconds, peak memory."""
    rows = [["method", "steps", "seconds", "of it preparing", "peak memory", "distilled", "random", "noise"]]
    for name, record, made in zip(names, records, steps):
        cost = record["cost"]
        arms = {entry["arm"]: entry for entry in record["results"]}
        cells = [
            f"{100 * arm['mean']:.1f} ± {50 * (arm['ci95'][1] - arm['ci95'][0]):.1f}" if arm else "-"
            for arm in map(arms.get, ("distilled", "random", "noise"))
        ]
        prepared = duration(cost["preparation_seconds"]) if cost.get("preparation_seconds") else "-"
        rows.append(
            [name, str(made), duration(cost["seconds"] + cost.get("preparation_seconds", 0)), prepared,
             size(cost["peak_memory"]["host"]), *cells]
        )  # fmt: skip
    return aligned(rows)


def _main(words: Sequence[str]) -> int:
    known = [name for name in METHODS.names() if METHODS.get(name).order]
    parser = Parser(prog="python -m condense.benchmarks.equal_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="real images, as for `condense distill`")
    parser.add_argument("--out", type=Path, required=True, help="folder for sets, records and the table")
    parser.add_argument("--methods", default=",".join(known), help="A,B:KEY=VALUE,...; all that learn by default")
    parser.add_argument("--ipc", type=positive, default=1)
    parser.add_argument("--network", default="convnet-d3-w32-in")
    parser.add_argument("--minutes", type=float, default=10.0, help="of distilling, for each method")
    parser.add_argument("--protocol", default="quick-v1")
    options = parser.parse_args(words)
    names, records, steps = options.methods.split(","), [], []
    for method in names:
        METHODS.get(method.partition(":")[0])
        records.append(
            fill(
                method, options.data, options.out, ipc=options.ipc, network=options.network, minutes=options.minutes,
                protocol=options.protocol,
            )
        )  # fmt: skip
        steps.append(_steps(records[-1], options.out))
        shown = table(names[: len(records)], records, steps)
        (options.out / "table.txt").write_text(shown + "\n")
    print(shown)
    return 0


def _steps(record: dict[str, Any], out: Path) -> int:
    """Outer steps that the record's set was given."""
    from condense.distilled import DistilledSet

    for path in (out / "sets").glob("*.h5"):
        made = DistilledSet.load(path)
        if made.sha256() == record["set"]["sha256"]:
            return int(made.manifest["steps_done"])
    raise CondenseError(f"{out}: no set belongs to the record of {record['set']['name']}; make it again")


if __name__ == "__main__":
    guarded(_main, None)
