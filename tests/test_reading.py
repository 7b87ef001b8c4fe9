"""Every method can be read in at most 200 lines besides the steps that papers share."""

import pytest

from condense.benchmarks.reading import LIMIT, Name, parse_module, reachable, readings, resolve, table
from condense.registry import METHODS

ROWS = {row.method: row for row in readings()}


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_is_read_in_few_lines(name):
    assert 0 < ROWS[name].total <= LIMIT, ROWS[name]


def test_what_is_counted():
    module = "condense.methods.distribution_matching"
    source = parse_module(module)
    assert resolve(module, "class_means") == Name(module, "class_means") and resolve(module, "torch") is None
    assert resolve("condense.methods.attention_matching", "class_means") == Name(module, "class_means")
    helpers = {definition.name for definition in reachable([Name(module, "idm")])}
    assert {"idm", "IDM", "training_accuracy", "ACCURACY_IMAGES", "class_means"} <= helpers and "DANCE" not in helpers
    idm = ROWS["idm"]
    assert (idm.driver, idm.settings) == (source.lines["idm"], source.lines["IDM"])
    own = ("training_accuracy", "ACCURACY_IMAGES", "simulate_queue")
    assert idm.helpers == sum(source.lines[name] for name in own)
    assert idm.shared >= source.lines["class_means"]  # DM, DANCE and DataDAM use it too


def test_a_driver_that_is_called_counts_too():
    source = parse_module("condense.methods.gradient_matching")
    assert ROWS["dsa"].driver == source.lines["dsa"] + source.lines["dc"]
    assert ROWS["dsa"].settings == source.lines["DSA"] + source.lines["DC"]


def test_the_table():
    lines = table(list(ROWS.values())).splitlines()
    assert lines[0].split()[:5] == ["method", "driver", "settings", "helpers", "total"]
    assert len(lines) == len(ROWS) + 1
