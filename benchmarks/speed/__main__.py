"""All speed comparisons in one table: ``python -m condense.benchmarks.speed --out FOLDER``.

Each published step is timed against the product's, in turn, in a process of its own; twice, with and without the
allocator setting that the command line makes. "as shipped" compares the published step under the plain allocator with
the product's under the tuned one, "same allocator" both under the tuned one: the second ratio is what the toolkit's
mathematics and code earn. A pair whose JSON file exists is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from condense.benchmarks.speed.measure import PLAIN, QUIET, TUNED, Parser, guarded, positive
from condense.errors import CondenseError
from condense.formatting import aligned

STEPS = ("dm", "dc", "dsa", "dcc", "datadam", "mtt", "sre2l")
"""Pairs of outer steps."""
EXPERTS = "experts"
"""The pair of steps of the training of a network on the real data: MTT's experts, and by the same loop students."""


def _measure(method: str, allocator: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of one pair, from its file or measured now."""
    path = options.out / f"{method}-ipc{options.ipc}-w{options.width}-{allocator}.json"
    if not path.exists():
        words = ["--width", str(options.width), "--precision", options.precision, "--device", options.device]
        words += ["--allocator", allocator, *(["--data", options.data] if options.data else [])]
        if method == EXPERTS:
            words += ["--methods", "mtt", "--pairs", str(options.steps), "--out", str(path)]
        else:
            words += ["--ipc", str(options.ipc), "--steps", str(options.steps), "--json", str(path)]
        command = [sys.executable, "-m", f"condense.benchmarks.speed.{method}", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("condense: ")
            raise CondenseError(f"{method}: {last}")
        print(done.stdout, flush=True)
    record = json.loads(path.read_text())
    return {**record, **record["methods"]["mtt"]} if method == EXPERTS else record


def row(method: str, tuned: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    """One line of the table.

    Args:
        method: name of the method.
        tuned: record with the allocator of the command line.
        plain: record with the allocator as it is.
    """
    published, ours = (tuned["median_seconds"][side] for side in ("published", "condense"))
    shipped = plain["median_seconds"]["published"] / ours
    reached = tuned.get("share_of_convolution_limit")
    memory = [tuned["peak_memory"][side]["host"] / 2**30 for side in ("published", "condense")]
    shares = [record["others_share"] for record in (tuned, plain) if record["others_share"] is not None]
    return [
        method,
        f"{published:.3f}",
        f"{ours:.3f}",
        f"{shipped:.2f}",
        f"{tuned['ratio']:.2f}",
        "" if reached is None else f"{100 * reached:.0f} %",
        f"{memory[0]:.2f} / {memory[1]:.2f}",
        tuned["environment"]["precision"] + " " + (tuned["compute"].get("training") or "default formats"),
        "yes" if shares and max(shares) <= QUIET else "no",
    ]


HEAD = [
    "step",
    "published s",
    "condense s",
    "as shipped",
    "same allocator",
    "of convolution limit",
    "peak GiB",
    "condense computes in",
    "quiet machine",
]


def _compare(arguments: Sequence[str]) -> int:
    pairs = (*STEPS, EXPERTS)
    parser = Parser(prog="python -m condense.benchmarks.speed", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--methods", default=",".join(pairs), help=f"some of {','.join(pairs)}")
    parser.add_argument("--data", help="a name, folder, .npz or .h5; random images shaped like CIFAR-10 when left out")
    parser.add_argument("--ipc", type=positive, default=10)
    parser.add_argument("--width", type=positive, default=128, help="channels of the ConvNet")
    parser.add_argument("--steps", type=positive, default=3, help="pairs of steps that count")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of the product: auto, fp32 or bf16")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    for method in methods:
        if method not in pairs:
            raise CondenseError(f"--methods {method}: unknown; some of {','.join(pairs)}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [HEAD]
    for method in methods:
        records = {allocator: _measure(method, allocator, options) for allocator in (PLAIN, TUNED)}
        rows.append(row(method, records[TUNED], records[PLAIN]))
    print(f"{records[TUNED]['processor']}, {records[TUNED]['environment']['device']}; ipc {options.ipc}")
    print(aligned(rows))
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options, measures all pairs, prints a table and exits."""
    guarded(_compare, arguments)


if __name__ == "__main__":
    main()
