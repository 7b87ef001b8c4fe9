"""``python -m condense.benchmarks.fuzz_arguments``: what the command line does with wrong arguments.

Makes a small folder with data, a set, a run and files of settings, takes valid command lines of every verb, changes
each at random places, and runs the results in a child process with a time limit, each in a fresh copy of the folder. A
change drops, repeats, swaps or misspells arguments, or replaces a value by one of another type, out of range, not
finite, empty, not ASCII, a path instead of a name, or a name instead of a path. Printed are, for each verb, the numbers
of command lines that were

* accepted,
* refused with one line and exit code 2,
* refused with up to three lines, because warnings precede the message,
* refused with more lines, or with a line of more than ``LINE_LIMIT`` characters, which must not happen,
* answered by an internal error or another exit code, which must not happen,
* answered by a traceback, which must not happen,
* not answered within the time limit, or answered by a crash, which must not happen.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import os
import runpy
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from condense.benchmarks.child import HANG_OR_CRASH, ChildProcess
from condense.errors import CondenseError
from condense.files import write_json
from condense.judge import protocols
from condense.tracking import Progress

SECONDS = 20.0
"""Time limit for one command line."""

LINE_LIMIT = 1100
"""Maximum number of characters of a message."""

OUTCOMES = ("accepted", "one line", "three lines", "more lines", "internal error", "traceback", HANG_OR_CRASH)

FAILING = OUTCOMES[3:]
"""The outcomes that must not happen."""

SUITE = """
name: mini
summary: a table for tests
protocol: quick-v1
runs: 1
seeds: [0]
networks: [own]
tasks: {tiny: {network: mlp, ipc: [1], controls: [random]}}
methods:
  random: {tiny-ipc1: {}}
"""

RECIPE = "method: dm\ndata: tiny.npz\nipc: 1\nnetwork: convnet-d1-w4-in\nsteps: 2\naugment: color\n"

SETUP = (
    "distill dm --data tiny.npz --ipc 1 --network convnet-d1-w4-in steps=2 --track none --out set.h5 --run-dir run "
    "protocol=quick-v1",
    "evaluate set.h5 --data tiny.npz --networks mlp --controls none --json records/record.json",
)
"""Command lines that make the files which the others use."""

LINES: dict[str, Sequence[str]] = {
    "ls": ("ls methods", "ls recipes --json"),
    "show": ("show dm", "show dm/tiny --json", "show set.h5"),
    "advise": ("advise --data tiny.npz --ipc 1 --minutes 0.5 --labels hard --network convnet-d1-w4-in --device cpu",),
    "distill": (
        "distill random --data tiny.npz --ipc 1 --network mlp --seed 3 --tag a --out new.h5 --run-dir new --force",
        "distill dm --data x=tiny.npz --ipc 1 --network convnet-d1-w4-in steps=2 lr_img=0.1 augment=color zca=false "
        "--minutes 0.02 --track none --precision fp32 --device cpu --out new.h5 --run-dir new",
        "distill --recipe recipe.yaml --out new.h5 batch_real=4",
    ),
    "resume": ("resume run", "resume run --steps 3"),
    "plan": (
        "plan dm --data tiny.npz --ipc 1 --network mlp steps=2 --device cpu",
        "plan --classes 10 --ipc 1 --label-epochs 10 --json",
        "plan --recipe recipe.yaml --precision fp32",
    ),
    "experts": (
        "experts --data tiny.npz --network mlp --count 1 --epochs 2 --for mtt --out experts.h5 --held-out 0.1 --seed 0 "
        "--dtype float16 expert_lr=0.01",
    ),
    "teachers": (
        "teachers --data tiny.npz --networks convnet-d1-w4-bn --count 1 --epochs 1 --for sre2l --out teachers.h5 "
        "--held-out 0.1 --seed 0",
    ),
    "scores": (
        "scores --data tiny.npz --network convnet-d1-w4-in --out scores.h5 --seed 0 score_epochs=2 score_networks=1 "
        "score_neighbours=3",
    ),
    "evaluate": (
        "evaluate set.h5 --data tiny.npz --networks mlp,own --runs 1 --protocol quick-v1 --controls random,noise "
        "--classes 0,1 --seed 1 --json new.json",
        "evaluate set.h5 --data tiny.npz --runs 1 --no-cache --without-augmentation --device cpu --precision fp32",
    ),
    "downstream": (
        "downstream set.h5 --data tiny.npz --checks privacy,continual --network mlp --runs 1 --protocol quick-v1 "
        "--class-steps 1 --widths 2 --seed 0 --json new.json --device cpu",
    ),
    "suite": ("suite mini.yaml --out new --data tiny=tiny.npz --methods random --datasets tiny --device cpu",),
    "leaderboard": ("leaderboard --out page --results records",),
    "lighten": ("lighten set.h5 --labels hard --out new.h5 smoothing=0.1 --data tiny.npz --device cpu",),
    "labels": ("labels set.h5 --kinds own --data tiny.npz --runs 1 --network mlp --protocol quick-soft-v1 --seed 0",),
    "verify": ("verify set.h5",),
    "preview": ("preview set.h5 --out new.png --decoded",),
    "join": ("join set.h5 set.h5 --out new.h5",),
    "import": (
        "import pair.npz --from tensors --data tiny.npz --out new.h5 --method x --network mlp --factor 1 --mean 0.5 "
        "--std 0.5 --lr 0.1",
    ),
    "export": ("export set.h5 new --to imagefolder", "export set.h5 new.pt --to pt"),
}
"""Valid command lines of every verb. All of them end within seconds."""

LIMITS: dict[str, Sequence[str]] = {
    "distill": ("--minutes", "0.02"),
    "experts": ("--count", "1", "--epochs", "2"),
    "teachers": ("--count", "1", "--epochs", "1"),
    "scores": ("score_epochs=2", "score_networks=1"),
    "evaluate": ("--runs", "1"),
    "downstream": ("--runs", "1", "--checks", "privacy"),
    "suite": ("--methods", "random", "--datasets", "tiny"),
    "labels": ("--runs", "1", "--kinds", "own"),
}
"""Options that bound the work. They are appended if a change has removed them."""

VALUES = (
    *("", " ", "-1", "0", "0.01", "nan", "-inf", "1e20", "99999999999999999999", "1_000", "0x10", "true", "None"),
    *(
        "x",
        "é",
        "数",
        "\u202e",
        "\x1b[31m",
        "\n",
        "\ud800",
        "x" * 3000,
        "-",
        "--",
        "-x",
        "--nothing",
        "=",
        "a=b",
        ",",
        ",,",
    ),
    *("[]", "{}", "[1, 2]", "${oc.env:HOME}", "???", "*", "%s", "$(id)", "'", '"'),
    *(
        ".",
        "..",
        "../x",
        "run",
        "tiny.npz",
        "set.h5",
        "recipe.yaml",
        "mini.yaml",
        "nothing.h5",
        "/dev/null/x",
        "./x/y/z.h5",
    ),
    *(
        "dm",
        "random",
        "mtt",
        "digits",
        "mlp",
        "convnet-d1-w4-in",
        "quick-v1",
        "dm/tiny",
        "small",
        "cpu",
        "cuda:9",
        "hard",
    ),
)
"""Values that replace others. None asks for more work, and none names a place outside of the folder."""


def make_folder(folder: Path) -> None:
    """Writes the data and the files of settings."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    images = generator.integers(0, 256, (36, 1, 8, 8), dtype=np.uint8)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = dict(zip(names, (images, labels, images, labels)))
    np.savez(folder / "tiny.npz", **arrays)
    np.savez(folder / "pair.npz", images=generator.normal(size=(3, 1, 8, 8)).astype(np.float32), labels=np.arange(3))
    (folder / "mini.yaml").write_text(SUITE)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "records").mkdir()


def make_protocols(folder: Path) -> None:
    """Writes all protocols with students of three steps."""
    folder.mkdir()
    for name, protocol in protocols().items():
        short = {**dataclasses.asdict(protocol), "steps": 3, "full_epochs": 1, "runs": 1, "lr": protocol.lr[:1]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(short))


def changed(line: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Returns a command line with one or, seldom, two changes; the verb stays."""
    verb, *arguments = line
    for _ in range(1 + int(generator.integers(4) == 0)):
        arguments = _change(arguments, generator)
    limits = LIMITS.get(verb, ())
    for option, value in zip(limits[::2], limits[1::2]):
        arguments += [] if option in arguments else [option, value]
    return [verb, *arguments]


def _change(arguments: list[str], generator: np.random.Generator) -> list[str]:
    kind = ("drop", "repeat", "swap", "misspell", "insert", "value", "value", "value")[int(generator.integers(8))]
    value = VALUES[int(generator.integers(len(VALUES)))]
    at, other = (int(number) for number in generator.integers(max(1, len(arguments)), size=2))
    result = list(arguments)
    if kind == "value":  # of an option, a setting or an argument
        places = [place for place, text in enumerate(arguments) if not text.startswith("--")]
        at = places[at % len(places)] if places else at
    if kind == "insert" or not arguments:
        result.insert(at, value)
    elif kind == "drop":
        del result[at]
    elif kind == "repeat":
        result.insert(other, result[at])
    elif kind == "swap":
        result[at], result[other] = result[other], result[at]
    elif kind == "misspell" and arguments[at]:
        text, place = result[at], int(generator.integers(len(result[at])))
        letter = "aeimnst-_.0=9,"[int(generator.integers(14))]
        result[at] = (text[:place] + text[place + 1 :], text[:place] + letter + text[place:])[
            int(generator.integers(2))
        ]
    else:
        key, equals, _ = result[at].partition("=")
        is_setting = bool(equals) and not key.startswith("-")
        result[at] = f"{key}={value}" if is_setting and generator.integers(4) else value
    return result


# -- the child process ------------------------------------------------------------------------------------------------


def _serve(connection: Any, settings: dict[str, str]) -> None:
    """Child process: runs the command lines that it gets, each in a folder, and answers with an outcome and text."""
    os.environ |= settings
    torch.set_num_threads(1)
    while (request := connection.recv()) is not None:
        folder, line = request
        os.chdir(folder)
        out, err, fault = io.StringIO(), io.StringIO(), ""
        code: Any = None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                sys.argv = ["condense", *line]
                runpy.run_module("condense", run_name="__main__")
            except SystemExit as end:
                code = end.code
            except BaseException as error:  # what this script looks for
                fault = f"{type(error).__name__}: {error}"
        os.chdir("/")
        connection.send((outcome_of(code, err.getvalue(), fault), (fault or err.getvalue())[-500:]))


def outcome_of(code: Any, errors: str, fault: str = "") -> str:
    """One of ``OUTCOMES``.

    Args:
        code: exit code.
        errors: what was printed to standard error.
        fault: an exception that the command line did not handle.
    """
    lines = [line for line in errors.splitlines() if line.strip()]
    if fault or "Traceback (most recent call last)" in errors:
        return "traceback"
    if code == 0:
        return "accepted"
    if code != 2:
        return "internal error"
    if len(lines) == 1 and lines[0].startswith("condense: ") and len(lines[0]) <= LINE_LIMIT:
        return "one line"
    return "three lines" if 1 < len(lines) <= 3 and max(map(len, lines)) <= LINE_LIMIT else "more lines"


class Runner:
    """Runs command lines in a child process, each in the same folder."""

    def __init__(self, root: Path, seconds: float) -> None:
        self.pristine, self.place = root / "pristine", root / "a" / "b" / "work"
        make_folder(self.place)
        make_protocols(root / "protocols")
        settings = {
            "CONDENSE_CACHE": str(root / "cache"),
            "CONDENSE_DATA": str(root / "data"),
            "CONDENSE_PROTOCOLS": str(root / "protocols"),
            "CONDENSE_PLAN_SECONDS": "0.2",
        }
        # A daemonic process could not start the processes that decode images.
        self._child = ChildProcess(_serve, settings, seconds=seconds, daemon=False)

    def prepare(self) -> None:
        """Runs ``SETUP``. Each later command line finds the folder as it is then.

        Raises:
            CondenseError: a command line is not accepted.
        """
        for line in SETUP:
            _check_accepted(line, *self._answer(shlex.split(line)))
        shutil.copytree(self.place, self.pristine)

    def run(self, line: Sequence[str]) -> tuple[str, str]:
        """Runs a command line.

        Returns:
            One of ``OUTCOMES``, and the end of what was printed to standard error.
        """
        shutil.rmtree(self.place)
        shutil.copytree(self.pristine, self.place)
        return self._answer(line)

    def _answer(self, line: Sequence[str]) -> tuple[str, str]:
        return self._child.ask((str(self.place), list(line)))

    def close(self) -> None:
        """Ends the process."""
        self._child.close()


# -- the measurement --------------------------------------------------------------------------------------------------


def measure(
    count: int, seed: int, verbs: Sequence[str] = tuple(LINES), seconds: float = SECONDS, quiet: bool = False
) -> tuple[dict[str, collections.Counter[str]], list[str], float]:
    """Runs ``count`` changed command lines, in turn of each verb.

    Args:
        count: number of command lines.
        seed: of the changes.
        verbs: names in :data:`LINES`.
        seconds: time limit for one command line.
        quiet: whether to hide the progress bar.

    Returns:
        The number of each outcome by verb, one line for each failure, and the longest time of a command line, in
        seconds.

    Raises:
        CondenseError: an unchanged command line is not accepted.
    """
    outcomes: dict[str, collections.Counter[str]] = {verb: collections.Counter() for verb in verbs}
    failures, longest = [], 0.0
    with tempfile.TemporaryDirectory() as root, contextlib.closing(Runner(Path(root), seconds)) as runner:
        runner.prepare()
        progress = Progress("command lines", count, quiet=quiet)
        for number in range(count):
            generator = np.random.default_rng([seed, number])
            verb = verbs[number % len(verbs)]
            base = LINES[verb][int(generator.integers(len(LINES[verb])))]
            if number < len(verbs):
                _check_accepted(base, *runner.run(shlex.split(base)))
            line = changed(shlex.split(base), generator)
            began = time.monotonic()
            outcome, text = runner.run(line)
            longest = max(longest, time.monotonic() - began)
            outcomes[verb][outcome] += 1
            if outcome in FAILING:
                failures.append(f"{outcome}: condense {shlex.join(line)!a:.300}: {text!a:.500}")
            progress.update(number + 1)
        progress.close()
    return outcomes, failures, longest


def _check_accepted(line: str, outcome: str, text: str) -> None:
    if outcome != "accepted":
        raise CondenseError(f"condense {line}: not accepted: {text}")


def table(outcomes: dict[str, collections.Counter[str]]) -> Iterator[str]:
    """Lines of a table with a row for each verb and their sum."""
    rows = {**outcomes, "all": sum(outcomes.values(), collections.Counter())}
    yield "  ".join([f"{'verb':11}", *OUTCOMES])
    for verb, counts in rows.items():
        yield "  ".join([f"{verb:11}", *(f"{counts[outcome]:{len(outcome)}}" for outcome in OUTCOMES)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement; the exit code is 1 if anything failed."""
    description = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m condense.benchmarks.fuzz_arguments", description=description)
    parser.add_argument("--count", type=int, default=500, help="command lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(LINES), help="by default all")
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    given = parser.parse_args(arguments)
    verbs = given.verbs.split(",")
    for verb in verbs:
        if verb not in LINES:
            parser.error(f"--verbs {verb}: unknown; known: {', '.join(LINES)}")
    outcomes, failures, longest = measure(given.count, given.seed, verbs)
    print("\n".join([*table(outcomes), *failures, f"longest: {longest:.2f} s; {len(failures)} failures"]))
    if given.json:
        write_json(given.json, {"count": given.count, "seed": given.seed, "outcomes": outcomes, "longest": longest})
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
