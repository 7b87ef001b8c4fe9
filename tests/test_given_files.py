"""Files of experts and teachers decide what the user leaves open."""

import pytest
from conftest import tiny_arrays

import condense
from condense import api
from condense.errors import CondenseError
from condense.jobs import estimate_cost

NETWORK = "convnet-d2-w8-in"
STEPS = {"steps": 1, "syn_steps": 1}


@pytest.fixture(scope="module")
def task():
    return condense.task(tiny_arrays(), name="tiny")


@pytest.fixture(scope="module")
def experts(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "experts.h5"
    api.experts(task, network=NETWORK, count=1, epochs=4, out=path)
    return str(path)


@pytest.fixture(scope="module")
def teachers(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "teachers.h5"
    for name in ("convnet-d2-w8-bn", "convnet-d1-w8-bn"):
        api.teachers(task, networks=name, count=1, epochs=1, out=path)
    return str(path)


def test_experts_decide_the_network_and_their_epochs(task, experts, capsys):
    made = condense.distill("mtt", task, 1, experts=experts, quiet=False, **STEPS)
    assert made.manifest["network"] == NETWORK and made.manifest["settings"]["buffer_epochs"] == 4
    expected = f"experts={experts} decides --network {NETWORK} buffer_epochs=4\n"
    assert expected in capsys.readouterr().err
    assert estimate_cost("mtt", task, 1, experts=experts, **STEPS)["steps"] == 1


def test_epochs_that_suffice_are_left_alone(task, experts, capsys):
    """These settings read the epochs up to the third."""
    settings = {**STEPS, "max_start_epoch": 2, "expert_epochs": 2}
    made = condense.distill("mtt", task, 1, network=NETWORK, experts=experts, quiet=False, **settings)
    assert made.manifest["settings"]["buffer_epochs"] is None and "decides" not in capsys.readouterr().err


def test_what_the_user_says_is_not_replaced(task, experts):
    with pytest.raises(CondenseError, match="another network"):
        condense.distill("mtt", task, 1, network="convnet-d1-w8-in", experts=experts, **STEPS)
    with pytest.raises(CondenseError, match="have 4 epochs, but 21 are asked for"):
        condense.distill("mtt", task, 1, experts=experts, buffer_epochs=21, **STEPS)


def test_teachers_decide_network_and_committee(task, teachers):
    made = condense.distill("sre2l", task, 1, teachers=teachers, steps=1, label_epochs=1)
    assert made.manifest["network"] == "convnet-d2-w8-bn"
    assert made.manifest["teachers"]["networks"] == ["convnet-d2-w8-bn", "convnet-d1-w8-bn"]
    one = condense.distill("sre2l", task, 1, teachers=teachers, committee="convnet-d1-w8-bn", steps=1, label_epochs=1)
    assert one.manifest["teachers"]["networks"] == ["convnet-d1-w8-bn"]
