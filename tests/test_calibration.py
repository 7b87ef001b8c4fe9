"""Precision, memory format and images per pass, chosen by timing the network."""

import dataclasses
import json

import pytest
import torch

import condense
from condense.environment import keep_freed_memory
from condense.jobs import estimate_cost
from condense.jobs.job import read_job
from condense.networks import ComputeConfig, MemoryFormat, build_network, calibrate, calibration, memory_format
from condense.networks.calibration import Timing, choose, count_flops

CPU = torch.device("cpu")
TIMED = "convnet-d3-w24-in"
"""Above the limit of operations on images of 32x32, but quick."""


def timings(precision, forward, training):
    """``forward``: milliseconds by (format, images); ``training``: by format."""
    for (format, images), milliseconds in forward.items():
        yield Timing(precision, format, False, images, milliseconds / 1e3)
    for format, milliseconds in training.items():
        yield Timing(precision, format, True, 32, milliseconds / 1e3)


BF16_SLOW = [  # milliseconds an image on a Xeon with AVX512-BF16 and without AMX
    *timings(
        "fp32",
        {("contiguous", 8): 1.1, ("contiguous", 32): 0.91, ("channels_last", 8): 0.54, ("channels_last", 32): 0.66},
        {"contiguous": 2.24, "channels_last": 1.89},
    ),
    *timings(
        "bf16",
        {("contiguous", 8): 1.0, ("contiguous", 32): 0.82, ("channels_last", 8): 1.4, ("channels_last", 32): 1.4},
        {"contiguous": 2.43, "channels_last": 5.3},
    ),
]


def test_the_fastest_way_is_chosen():
    assert choose(BF16_SLOW) == ComputeConfig("fp32", MemoryFormat("channels_last", "channels_last"), 8)


def test_a_given_precision_is_kept():
    assert choose(BF16_SLOW, "bf16") == ComputeConfig("bf16", MemoryFormat("contiguous", "contiguous"), 32)


def test_bf16_must_be_clearly_faster():
    def twice_as_fast(share):
        return [
            timing if timing.precision == "fp32" else dataclasses.replace(timing, seconds=timing.seconds * share)
            for timing in BF16_SLOW
        ]

    assert choose(twice_as_fast(0.5)).precision == "bf16"
    assert choose(twice_as_fast(0.72)).precision == "fp32"  # (0.82 + 2.43) * 0.72 = 2.34 of 2.43 ms


def test_a_format_that_a_busy_machine_timed_at_fewer_sizes():
    slow = {("contiguous", 8): 1.0, ("contiguous", 32): 0.99, ("channels_last", 8): 1.0}
    busy = list(timings("fp32", slow, {"contiguous": 2.0, "channels_last": 2.0}))
    assert choose(busy) == ComputeConfig("fp32", MemoryFormat("channels_last", "contiguous"), 8)


def test_a_small_gain_does_not_replace_the_default():
    near = list(
        timings(
            "fp32",
            {("channels_last", 8): 0.95, ("channels_last", 32): 1.0, ("contiguous", 32): 0.93},
            {"contiguous": 2.0, "channels_last": 1.9},
        )
    )
    assert choose(near) == ComputeConfig("fp32", MemoryFormat("channels_last", "contiguous"), 32)


@pytest.mark.parametrize(("precision", "expected"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_a_small_network_is_not_timed(precision, expected):
    assert calibrate(precision, CPU, "convnet-d2-w8-in", (1, 8, 8), 10) == ComputeConfig(expected)


def test_operations_are_counted():
    net = build_network("convnet-d1-w4-in", (3, 8, 8), 10)
    assert count_flops(net, (3, 8, 8)) == 2 * (8 * 8 * 4 * 3 * 9 + 4 * 4 * 4 * 10)
    assert net.training


def stored_times():
    (path,) = (condense.data.cache_dir() / "calibration").iterdir()
    return path


def test_times_are_stored_and_damaged_ones_measured_again():
    chosen = calibrate("auto", CPU, TIMED, (3, 32, 32), 10)
    path = stored_times()
    rows = json.loads(path.read_text())
    assert {row["format"] for row in rows} == {"contiguous", "channels_last"}
    assert {row["images"] for row in rows} >= {8, 32} and {row["gradients"] for row in rows} == {False, True}
    for row in rows:
        if row["format"] == "channels_last" and row["gradients"]:
            row["seconds"] = 1e-9
    path.write_text(json.dumps(rows))
    calibration.measure.cache_clear()
    assert calibrate("auto", CPU, TIMED, (3, 32, 32), 10).format.training == "channels_last"
    for damage in ("[]", "{", '[{"precision": "fp32"}]', json.dumps([{**rows[0], "seconds": -1}])):
        path.write_text(damage)
        calibration.measure.cache_clear()
        assert calibrate("fp32", CPU, TIMED, (3, 32, 32), 10).precision == "fp32"
        assert len(json.loads(path.read_text())) >= 4
    assert chosen.precision in ("fp32", "bf16")


def test_processes_of_torchrun_do_not_time(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    calibration.measure.cache_clear()
    assert calibrate("auto", CPU, TIMED, (3, 32, 32), 10) == ComputeConfig()
    calibration.measure.cache_clear()


@pytest.mark.parametrize("network", ["convnet-d3-w8-in", "convnet-d3-w8-bn", "resnet18-in", "shufflenetv2-x0.5-bn"])
def test_formats_give_the_same_results(network):
    torch.manual_seed(0)
    net = build_network(network, (3, 16, 16), 3).eval().double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for name in ("contiguous", "channels_last"):
        with memory_format(MemoryFormat(name, name)):
            x = images.clone().requires_grad_()
            loss = net(x).square().sum()
            gradients = torch.autograd.grad(loss, [x, *net.parameters()])
            with torch.no_grad():
                results.append([loss.detach(), net(images), *gradients])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_formats_reach_the_convolutions():
    net = build_network("convnet-d2-w8-in", (3, 16, 16), 3)
    seen = []
    net.convs[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    for chosen in (MemoryFormat("contiguous", "channels_last"), MemoryFormat("channels_last", "contiguous")):
        with memory_format(chosen):
            net(torch.zeros(2, 3, 16, 16))
            with torch.no_grad():
                net(torch.zeros(2, 3, 16, 16))
    assert seen == [False, True, True, False]


def test_a_run_keeps_its_choice(tiny, tmp_path):
    made = condense.distill("dm", tiny, 1, network="convnet-d2-w8-in", steps=2, run_dir=tmp_path / "run", quiet=True)
    job = read_job(tmp_path / "run")
    assert made.manifest["compute"] == job.compute == {"inference": None, "training": None, "forward_images": None}
    other = dataclasses.replace(job, compute={"inference": "contiguous", "training": None, "forward_images": 8})
    assert other.key() == job.key()
    assert other.compute_config == ComputeConfig(job.precision, MemoryFormat("contiguous", None), 8)


def test_a_changed_configuration_is_refused(tiny, tmp_path):
    condense.distill("dm", tiny, 1, network="convnet-d2-w8-in", steps=2, run_dir=tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "config.json"
    fields = json.loads(path.read_text())
    fields["compute"]["training"] = "blocked"
    path.write_text(json.dumps(fields))
    with pytest.raises(condense.CondenseError, match="compute"):
        read_job(tmp_path / "run")


def test_the_allocator_can_be_set_from_python():
    assert condense.keep_freed_memory is keep_freed_memory
    assert keep_freed_memory() in (True, False)


def test_a_plan_gives_a_range_from_counted_operations(tiny, monkeypatch):
    monkeypatch.setenv("CONDENSE_PLAN_SECONDS", "0")  # the first step is the only one
    needs = estimate_cost("dm", tiny, 1, network="convnet-d1-w4-none", steps=100, batch_real=4, augment="none")
    forward = count_flops(build_network("convnet-d1-w4-none", tiny.shape, tiny.num_classes), tiny.shape)
    images = tiny.num_classes * (4 + 1)
    assert images * forward * 0.9 < needs["step_flops"] < 3 * images * forward
    assert 0 < needs["least_seconds"] <= needs["seconds"]
    assert needs["seconds"] > 99 * needs["seconds_per_step"]
