"""Changed command lines of every verb: each is accepted or refused with one clear line."""

import shlex

import numpy as np
import pytest

from condense.benchmarks import fuzz_arguments
from condense.cli.entry import COMMANDS


def measured(count, seed):
    outcomes, failures, _ = fuzz_arguments.measure(count, seed, quiet=True)
    assert not failures, "\n".join(failures)
    assert sum(sum(counts.values()) for counts in outcomes.values()) == count
    return outcomes


def test_some_changed_command_lines():
    outcomes = measured(25, seed=1)
    assert sum(counts["one line"] for counts in outcomes.values()) >= 15


@pytest.mark.slow
def test_many_changed_command_lines():
    measured(500, seed=2)


def test_every_verb_has_lines():
    assert set(fuzz_arguments.LINES) == set(COMMANDS)
    assert all(line.split()[0] == verb for verb, lines in fuzz_arguments.LINES.items() for line in lines)


def test_changes_repeat_and_keep_the_limits():
    line = shlex.split(fuzz_arguments.LINES["distill"][0])
    lines = [fuzz_arguments.changed(line, np.random.default_rng(seed)) for seed in range(200)]
    assert lines == [fuzz_arguments.changed(line, np.random.default_rng(seed)) for seed in range(200)]
    assert all(changed[0] == "distill" and "--minutes" in changed for changed in lines)
    assert sum(changed[: len(line)] != line for changed in lines) > 180


@pytest.mark.parametrize(
    ("code", "errors", "fault", "outcome"),
    [
        (0, "data 'x': a note\n", "", "accepted"),
        (2, "condense: --ipc 0: must be at least 1\n", "", "one line"),
        (2, "a warning\ncondense: --ipc 0: must be at least 1\n", "", "three lines"),
        (2, "--ipc 0: must be at least 1\n", "", "more lines"),
        (2, "a\nb\nc\ncondense: d\n", "", "more lines"),
        (2, f"condense: {'x' * 2000}\n", "", "more lines"),
        (1, "condense: internal error: KeyError: 'a'\n", "", "internal error"),
        (130, "condense: interrupted\n", "", "internal error"),
        (2, "Traceback (most recent call last):\ncondense: x\n", "", "traceback"),
        (None, "", "KeyError: 'a'", "traceback"),
    ],
)
def test_outcomes(code, errors, fault, outcome):
    assert fuzz_arguments.outcome_of(code, errors, fault) == outcome
    assert outcome in fuzz_arguments.OUTCOMES
