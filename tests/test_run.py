"""Runs that are killed, interrupted, damaged or diverge: what was computed stays, and resuming ends the same."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command_line, tiny_arrays
from PIL import Image

import condense
from condense.device import peak_memory
from condense.engine import CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE, Run, run
from condense.errors import CondenseError
from condense.jobs import execute
from condense.sets import checksums

ROOT = Path(__file__).parent.parent
NETWORK = "convnet-d2-w8-in"
SETTINGS = {"network": NETWORK, "steps": 6, "batch_real": 4, "precision": "fp32"}


# -- real processes ---------------------------------------------------------------------------------------------------


def start(words, folder, launcher=()):
    """``condense`` with ``words`` as a process in ``folder``, which checkpoints after every step."""
    environment = {
        **os.environ,
        "CONDENSE_CHECKPOINT_SECONDS": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "condense", *shlex.split(words)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def distill(steps):
    return (
        f"distill dm --data digits --ipc 2 --network {NETWORK} steps={steps} batch_real=8 --precision fp32 "
        "--track none --out a.h5 --run-dir run"
    )


def arrays_of(path):
    return checksums(condense.load(path).arrays())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The arrays' checksums of a run of so many steps that nothing stopped, and its folder."""
    known = {}

    def get(steps):
        if steps not in known:
            folder = tmp_path_factory.mktemp("uninterrupted")
            process = start(distill(steps), folder)
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0 and err == "", err
            known[steps] = SimpleNamespace(arrays=arrays_of(folder / "a.h5"), folder=folder)
        return known[steps]

    return get


def written(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def wait_for_change(path, process):
    """Waits until ``path`` is written again."""
    before, limit = written(path), time.monotonic() + 120
    while written(path) in (None, before):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.0002)


def kill_and_resume(folder, steps, kills, seed):
    """Starts a run and kills it ``kills`` times: at a random moment, every other time while a checkpoint is written."""
    random = np.random.default_rng(seed)
    words = distill(steps)
    for number in range(kills):
        process = start(words, folder)
        wait_for_change(folder / "run" / CHECKPOINT_FILE, process)
        if number % 2:
            wait_for_change(folder / "run" / f"{CHECKPOINT_FILE}.tmp", process)
        else:
            time.sleep(random.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        words = "resume run"
    process = start(words, folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "", err
    assert out.startswith(f"made digits/dm-ipc2: 20 images of 5.1 kB, {steps} of {steps} steps")


def steps_logged(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def check_same(folder, reference):
    assert arrays_of(folder / "a.h5") == reference.arrays
    steps = steps_logged(folder / "run")
    assert steps == sorted(set(steps))
    left = {path.name for path in (folder / "run").iterdir()} | {path.name for path in folder.iterdir()}
    assert not [name for name in left if name.endswith(".tmp")]


def test_killed_three_times(tmp_path, uninterrupted):
    kill_and_resume(tmp_path, steps=60, kills=3, seed=0)
    check_same(tmp_path, uninterrupted(60))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_ten_times(tmp_path, uninterrupted, seed):
    kill_and_resume(tmp_path, steps=300, kills=10, seed=seed)
    check_same(tmp_path, uninterrupted(300))


def test_ctrl_c(tmp_path, uninterrupted):
    process = start(distill(60), tmp_path)
    wait_for_change(tmp_path / "run" / CHECKPOINT_FILE, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    found = re.fullmatch(r"condense: stopped at step (\d+) of 60; continue with: condense resume run\n", err)
    assert found, err
    assert saved_step(tmp_path / "run") == int(found[1])
    assert not (tmp_path / "a.h5").exists()
    execute.resume(tmp_path / "run")
    check_same(tmp_path, uninterrupted(60))


def saved_step(folder):
    return torch.load(folder / CHECKPOINT_FILE, weights_only=True)["step"]


def test_two_ranks_make_the_set_of_one(tmp_path, uninterrupted):
    """Gradients of the classes are summed over ranks: the same draws, and pixels equal within 1e-5."""
    process = start(distill(60), tmp_path, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("made digits/dm-ipc2") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "run"]
    assert steps_logged(tmp_path / "run") == sorted(set(steps_logged(tmp_path / "run")))
    one, two = condense.load(uninterrupted(60).folder / "a.h5"), condense.load(tmp_path / "a.h5")
    torch.testing.assert_close(two.stored, one.stored, rtol=0, atol=1e-5)


OTHER_METHODS = {
    "dsa": "steps=4 batch_real=8 outer=2 inner=1",
    "dance": "steps=4 batch_real=8 networks=3 expert_epochs=1",
}


@pytest.mark.parametrize("name", ["dsa", pytest.param("dance", marks=pytest.mark.slow)])
def test_two_ranks_make_the_set_of_one_by_other_methods(tmp_path, name):
    """Between steps every rank trains the same network (DSA), or trains a share of the bank and reads the rest."""
    words = f"distill {name} --data digits --ipc 2 --network convnet-d2-w8-in --seed 3 --track none"
    words += f" --precision fp32 {OTHER_METHODS[name]}"
    made = []
    for ranks, launcher in ((1, ()), (2, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        process = start(f"{words} --out a.h5 --run-dir run", folder, launcher)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        made.append(condense.load(folder / "a.h5"))
        shutil.rmtree(os.path.join(os.environ["CONDENSE_CACHE"], "banks"), ignore_errors=True)
    torch.testing.assert_close(made[1].stored, made[0].stored, rtol=0, atol=1e-5)


ONE_RANK_ENDS = """
import os, torch
from condense.ranks import Ranks
ranks = Ranks(torch.device("cpu"), "continue with: condense resume run")
ranks.barrier()
if ranks.rank == 1:
    os.kill(os.getpid(), 9)
ranks.broadcast(1)
"""


def test_a_rank_that_ends_is_named_with_the_way_to_continue():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        variables = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        call = [sys.executable, "-c", ONE_RANK_ENDS]
        processes.append(subprocess.Popen(call, env=os.environ | variables, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[0].returncode == 1 and processes[1].returncode == -9
    assert "CondenseError: rank 0 of 2 lost the connection to another process, which has ended" in errors[0]
    assert "then continue with: condense resume run" in errors[0]


# -- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A file of tiny real data."""
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(tmp_path / "data.npz", **dict(zip(keys, tiny_arrays())))
    return tmp_path / "data.npz"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``call(words)`` runs the command line in ``tmp_path``: its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    return lambda words: command_line(words, capsys)


TINY = (
    f"distill dm --data data.npz --ipc 1 --network {NETWORK} steps=6 batch_real=4 --precision fp32 "
    "--out a.h5 --run-dir run"
)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product catches it."""


def killed_run(data, folder, at, checkpoints, monkeypatch):
    """A run of 6 steps that dies after step ``at``, with checkpoints only after the steps ``checkpoints``."""
    after_step, save = run._StepMonitor.after_step, Run.save_checkpoint

    def dying(keeper, step, stop):
        after_step(keeper, step, stop)
        if step == at:
            raise Killed

    def saving(this, step, optimizer):
        if step in checkpoints:
            save(this, step, optimizer)

    with monkeypatch.context() as patch:
        patch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
        patch.setattr(run, "LOG_SECONDS", 0.0)
        patch.setattr(run._StepMonitor, "after_step", dying)
        patch.setattr(Run, "save_checkpoint", saving)
        with pytest.raises(Killed):
            condense.distill("dm", str(data), 1, run_dir=folder, out=folder.with_suffix(".h5"), **SETTINGS)


@pytest.fixture
def whole(data):
    return checksums(condense.distill("dm", str(data), 1, **SETTINGS).arrays())


@pytest.mark.parametrize("fault", ["truncated", "flipped", "empty", "nonsense", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(fault, data, tmp_path, whole, monkeypatch, caplog):
    folder = tmp_path / "run"
    killed_run(data, folder, at=4, checkpoints={2, 3, 4}, monkeypatch=monkeypatch)
    assert saved_step(folder) == 4
    damage(folder / CHECKPOINT_FILE, fault)
    assert checksums(execute.resume(folder).arrays()) == whole
    assert (f"{folder / CHECKPOINT_FILE} is damaged" in caplog.text) == (fault != "missing")


def damage(path, fault):
    content = bytearray(path.read_bytes())
    if fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "flipped":
        content[content.find(b"momentum")] ^= 1
        path.write_bytes(content)
    elif fault == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if fault == "empty" else b"nonsense" * 100)


def test_without_any_whole_checkpoint_the_run_starts_over(data, tmp_path, whole, monkeypatch):
    folder = tmp_path / "run"
    killed_run(data, folder, at=4, checkpoints={2, 3}, monkeypatch=monkeypatch)
    for name in (CHECKPOINT_FILE, PREVIOUS_CHECKPOINT_FILE):
        damage(folder / name, "truncated")
    assert checksums(execute.resume(folder).arrays()) == whole
    killed_run(data, tmp_path / "early", at=2, checkpoints=(), monkeypatch=monkeypatch)
    assert checksums(execute.resume(tmp_path / "early").arrays()) == whole


def test_the_log_has_each_step_once(data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    killed_run(data, folder, at=5, checkpoints={3}, monkeypatch=monkeypatch)
    assert steps_logged(folder) == [1, 2, 3, 4, 5]
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "se')  # cut short by the kill
    monkeypatch.setenv("CONDENSE_LOG_SECONDS", "0")
    execute.resume(folder)
    assert steps_logged(folder) == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in folder.glob("*log*")) == ["log.jsonl"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_has_each_step_once(data, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    killed_run(data, folder, at=5, checkpoints={3}, monkeypatch=monkeypatch)
    monkeypatch.setenv("CONDENSE_LOG_SECONDS", "0")
    execute.resume(folder)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Images("preview")] == [6]


def test_no_tracker(data, call, tmp_path):
    assert call(f"{TINY} --track none").code == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        CHECKPOINT_FILE,
        "config.json",
        "log.jsonl",
        "previews",
        "result.json",
    ]


def test_previews_show_the_set(data, call, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_PREVIEW_SECONDS", "0")
    assert call(TINY).code == 0
    names = sorted(path.name for path in (tmp_path / "run" / "previews").iterdir())
    assert names == [f"step-{step:06d}.png" for step in range(1, 7)]
    assert Image.open(tmp_path / "run" / "previews" / names[-1]).size == (3 * 66 + 2, 66 + 2)


def test_divergence_keeps_the_last_good_set(data, call, tmp_path):
    result = call(f"{TINY} lr_img=1e30")
    assert result.code == 2 and result.err.count("\n") == 1
    assert re.match(r"condense: the loss .* finite at step \d+ \(lr_img=1e\+30\): lower the learning rate", result.err)
    assert str(tmp_path / "a.h5") in result.err
    assert "good" in call("verify a.h5").out
    made = condense.load(tmp_path / "a.h5")
    assert torch.isfinite(made.stored).all()
    assert f"kept step {made.manifest['steps_done']}" in result.err
    assert call("resume run").code == 2  # it diverges again, and says so again


def test_a_finished_run_is_not_computed_again(data, call, tmp_path):
    assert call(TINY).code == 0
    made = arrays_of(tmp_path / "a.h5")

    def written():
        return {path: path.stat().st_mtime_ns for path in [tmp_path / "a.h5", *(tmp_path / "run").rglob("*")]}

    before = written()
    result = call("resume run")
    assert result.code == 0 and result.err == ""
    assert result.out.startswith("run has ended; its set is:\nmade data/dm-ipc1")
    assert written() == before and tmp_path / "run" / "result.json" in before
    (tmp_path / "a.h5").unlink()
    assert "made data/dm-ipc1" in call("resume run").out  # only the set is missing: it is made from the checkpoint
    assert arrays_of(tmp_path / "a.h5") == made


def test_a_disk_that_fills_up_in_the_run(data, call, tmp_path, whole, monkeypatch):
    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        result = call(TINY)
    assert result.code == 2
    assert result.err == "condense: run: No space left on device; fix this, then run: condense resume run\n"
    assert call("resume run").code == 0
    assert arrays_of(tmp_path / "a.h5") == whole


@pytest.mark.parametrize("fault", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_names_the_knobs(fault, data, call, monkeypatch):
    def step(*arguments, **options):
        raise fault

    monkeypatch.setattr("condense.engine.optimizer.SyntheticOptimizer.step", step)
    result = call(TINY)
    assert result.code == 2
    advice = "lower --ipc or batch_real, or take a smaller --network, or set CONDENSE_CHUNK_SCALE=0.5"
    assert result.err == f"condense: out of memory on cpu: {advice}\n"


def test_sigterm_saves_too(data, call, tmp_path, whole, monkeypatch):
    after_step = run._StepMonitor.after_step

    def terminated(keeper, step, stop):
        after_step(keeper, step, stop)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run._StepMonitor, "after_step", terminated)
        result = call(TINY)
    assert result.code == 130
    assert result.err == "condense: stopped at step 4 of 6; continue with: condense resume run\n"
    assert call("resume run").code == 0
    assert arrays_of(tmp_path / "a.h5") == whole


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_ctrl_c_stops_one_process_at_once(world, tiny, tmp_path):
    """Torchrun sends every rank a second one anyway."""
    running = Run(tiny, 1, NETWORK, directory=tmp_path)
    running.ranks.world_size = world
    with running.stop_on_signal():
        signal.raise_signal(signal.SIGINT)
        assert running._stop
        if world == 1:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        else:
            signal.raise_signal(signal.SIGINT)


def test_progress_without_a_terminal_is_plain_lines(data, call, monkeypatch):
    monkeypatch.setenv("CONDENSE_PROGRESS_SECONDS", "0")
    lines = call(TINY).err.splitlines()
    assert len(lines) == 6
    assert re.fullmatch(r"dm: step 3 of 6, loss \S+, about \d:\d\d:\d\d left", lines[2]), lines[2]
    lines = call("evaluate a.h5 --data data.npz --runs 1 --controls none --protocol quick-v1").err.splitlines()
    assert re.fullmatch(
        r"distilled on convnet-d2-w8-in, run 1 of 1: step 7 of 300, about \d:\d\d:\d\d left", lines[6]
    ), lines[6]


def test_a_network_given_in_python_is_not_mistaken_for_another(data, tmp_path):
    from condense.networks import build_network

    def mine(shape, classes):
        return build_network("convnet-d1-w8-in", shape, classes)

    settings = {**SETTINGS, "network": mine}
    made = condense.distill("dm", str(data), 1, run_dir=tmp_path / "run", **settings)
    assert made.manifest["network"].startswith("python:")
    with pytest.raises(CondenseError, match="its network was given in Python"):
        execute.resume(tmp_path / "run")


def test_a_run_without_a_file_resumes_too(data, tmp_path, whole):
    condense.distill("dm", str(data), 1, run_dir=tmp_path / "run", **SETTINGS)
    assert checksums(execute.resume(tmp_path / "run").arrays()) == whole


def test_all_mistakes_are_found_before_the_data_are_read():
    with pytest.raises(CondenseError, match=r"stepz=1.*; unknown network 'lenat'.*; .*; --track x"):
        condense.distill("dm", "/nowhere", 1, network="lenat", device="warp", track="x", stepz=1)


def test_the_peak_of_memory_is_not_that_of_the_parent():
    """What getrusage tells in a child includes its parent's peak on Linux."""
    code = "import torch; from condense.device import peak_memory; print(peak_memory(torch.device('cpu'))['host'])"
    held = bytearray(peak_memory(torch.device("cpu"))["host"] + 2**28)  # more than the child will need
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(held)
