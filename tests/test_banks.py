"""Networks that methods train on real data: what is recorded, kept, shared and counted."""

import json

import pytest
import torch
from pretraining_seams import StoppedRun

import condense
from condense import networks
from condense.data import cache_dir
from condense.engine import Run, checkpoint
from condense.jobs import estimate_cost
from condense.networks import ComputeConfig
from condense.pretraining import PLAN_FILE, load_or_train_snapshots, make_student, pipeline, plan_training
from condense.training import TrainConfig

NETWORK = "convnet-d2-w8-in"
RECIPE = TrainConfig(steps=0, batch=8, lr=0.05, momentum=0.9, weight_decay=0.0, lr_milestones=())


def a_run(task, **options):
    return Run(task, 1, NETWORK, quiet=True, track="none", **options)


def recorded(task, run=None, count=2, units=3, unit_steps=4, endpoints_only=False):
    return load_or_train_snapshots(
        run or a_run(task), RECIPE, count=count, units=units, unit_steps=unit_steps, endpoints_only=endpoints_only
    )


def cached_files():
    return sorted((cache_dir() / "banks").glob("*/*.pt"))


def same(a, b):
    return all(
        torch.equal(x, y)
        for one, other in zip(a.states, b.states, strict=True)
        for x, y in zip(one.values(), other.values(), strict=True)
    )


def test_snapshots_are_the_start_and_each_unit(tiny):
    bank = recorded(tiny)
    assert (bank.networks, bank.snapshots) == (2, 4)
    for k in range(2):
        start = make_student(a_run(tiny), tiny, NETWORK, "bank", k).network.state_dict()
        for name, value in bank.weights(k, 0).items():
            torch.testing.assert_close(value, start[name], rtol=1e-3, atol=1e-6)
    shorter = recorded(tiny, units=1, unit_steps=4, endpoints_only=True)
    for name, value in shorter.weights(0, -1).items():
        assert torch.equal(value, bank.weights(0, 1)[name]), name


def test_the_networks_learn_the_real_data(tiny):
    bank = recorded(tiny, units=2, unit_steps=60, endpoints_only=True)
    assert bank.snapshots == 2
    images, labels = tiny.batch(torch.arange(36)), torch.as_tensor(tiny.train.labels)
    losses = []
    for t in (0, -1):
        net = networks.build_network(NETWORK, tiny.shape, 3)
        bank.load(net, 0, t)
        losses.append(float(torch.nn.functional.cross_entropy(net(images), labels).detach()))
    assert losses[1] < losses[0] / 2


def test_cached_networks_are_loaded_and_only_missing_ones_are_trained(tiny):
    first = recorded(tiny)
    written = {path: path.stat().st_mtime_ns for path in cached_files()}
    assert len(written) == 2
    run = a_run(tiny)
    assert same(recorded(tiny, run), first)
    assert {path: path.stat().st_mtime_ns for path in cached_files()} == written
    assert run.notes["preparation"]["from_cache"] == 2 and run.notes["preparation"]["seconds"] > 0
    assert run.elapsed >= run.notes["preparation"]["seconds"] - 0.01  # the training seconds of cached networks count
    larger = recorded(tiny, run := a_run(tiny), count=3)
    added = {path.name for path in cached_files() if path.stat().st_mtime_ns != written.get(path)}
    assert added == {"2.pt"} and run.notes["preparation"]["from_cache"] == 2
    assert torch.equal(larger.states[0]["classify.weight"], first.states[0]["classify.weight"])


@pytest.mark.parametrize("change", [{"seed": 1}, {"compute": ComputeConfig("bf16")}])
def test_another_seed_or_precision_is_another_bank(tiny, change):
    recorded(tiny)
    run = a_run(tiny, **change)
    recorded(tiny, run)
    assert run.notes["preparation"]["from_cache"] == 0


def test_a_damaged_file_is_trained_again(tiny):
    first = recorded(tiny)
    (path,) = (cache_dir() / "banks").glob("*/1.pt")
    path.write_bytes(path.read_bytes()[:-100])
    run = a_run(tiny)
    assert same(recorded(tiny, run), first) and run.notes["preparation"]["from_cache"] == 1


@pytest.mark.parametrize(("minutes", "networks", "units"), [(1.0, 2, 2), (0.35, 1, 1), (0.01, 1, 1), (60.0, 2, 3)])
def test_a_time_limit_takes_whole_units_or_fewer_networks(minutes, networks, units, tiny):
    """A third of a minute at a second a step: 20 steps, 5 units of 4 for 2 networks."""
    plan = plan_training(a_run(tiny, minutes=minutes), lambda: 1.0, kind="expert", networks=2, units=3, unit_steps=4)
    assert (plan.networks, plan.units) == (networks, units)


def test_a_resumed_run_has_a_plan_for_each_kind_of_network(tiny, tmp_path):
    """Scores and teachers of one run: a stop between them must not give one the epochs of the other."""
    lengths = {"unit_steps": 4, "networks": 1}
    plan_training(a_run(tiny, directory=tmp_path), lambda: 1.0, kind="score network", units=12, **lengths)
    resumed = a_run(tiny, directory=tmp_path, resume=True)
    assert plan_training(resumed, lambda: 1.0, kind="teacher", units=6, **lengths).units == 6
    for kind, units in (("teacher", 6), ("score network", 12)):
        resumed = a_run(tiny, directory=tmp_path, resume=True)
        assert plan_training(resumed, lambda: 1.0, kind=kind, units=1, **lengths).units == units


def test_a_short_time_limit_trains_one_network(tiny):
    run = a_run(tiny, minutes=1e-9)
    bank = recorded(tiny, run)
    assert (bank.networks, bank.snapshots) == (1, 2)
    assert (run.notes["preparation"]["networks"], run.notes["preparation"]["networks_wanted"]) == (1, 2)


def test_a_resumed_run_keeps_its_plan(tiny, tmp_path, monkeypatch):
    data = tmp_path / "tiny.npz"
    from test_methods import save_npz

    save_npz(tiny, data)
    task = condense.task(str(data))
    options = {"network": NETWORK, "steps": 3, "batch_real": 6, "networks": 2, "expert_epochs": 3}
    made = condense.distill("dance", task, 1, minutes=5, run_dir=tmp_path / "run", out=tmp_path / "a.h5", **options)
    (plan,) = json.loads((tmp_path / "run" / PLAN_FILE).read_text()).values()
    (tmp_path / "a.h5").unlink()
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoint.pt").unlink()
    (tmp_path / "run" / "checkpoint.previous.pt").unlink(missing_ok=True)
    monkeypatch.setattr(pipeline, "measure_step_seconds", lambda *arguments: 1e6)  # the machine became slow
    again = condense.api.resume(tmp_path / "run")
    assert again.sha256() == made.sha256()
    assert again.manifest["preparation"]["steps_each"] == plan["units"] * plan["unit_steps"]
    cost = again.manifest["cost"]
    assert cost["preparation_seconds"] == again.manifest["preparation"]["seconds"] > 0 and cost["seconds"] >= 0


def test_a_plan_counts_the_networks_without_training_them(tiny):
    few, many = (
        estimate_cost("dance", tiny, 1, network=NETWORK, steps=3, batch_real=6, networks=count) for count in (1, 1000)
    )
    assert many["preparation_seconds"] > 50 * few["preparation_seconds"] > 0
    assert many["seconds"] > many["preparation_seconds"]
    assert not (cache_dir() / "banks").exists()


def test_a_factory_is_not_kept(tiny):
    run = Run(tiny, 1, lambda: networks.build_network(NETWORK, tiny.shape, 3), quiet=True, track="none")
    recorded(tiny, run)
    assert not (cache_dir() / "banks").exists()


def test_ctrl_c_ends_in_one_line_and_finished_networks_stay(tiny, tmp_path):
    run = StoppedRun(tiny, 1, NETWORK, quiet=True, track="none", directory=tmp_path, condition=cached_files)
    with pytest.raises(checkpoint.Interrupted, match="condense resume"):
        recorded(tiny, run)
    fresh = a_run(tiny)
    recorded(tiny, fresh)
    assert fresh.notes["preparation"]["from_cache"] == 1
