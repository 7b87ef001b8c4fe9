"""Command lines and YAML files that are wrong or hostile: one line, exit code 2, nothing written."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import change_protocols

import condense
from condense import config, files, formatting
from condense.engine import Run
from condense.errors import CondenseError, did_you_mean, is_out_of_memory
from condense.judge import protocols

DM = "distill dm --data digits --ipc 1 --network convnet-d2-w8-in"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{DM} steps=99999999999999999999", "steps=99999999999999999999: must be a whole number of at most 1,000"),
        (f"{DM} lr_img=inf", "lr_img=inf: must be a finite number"),
        (f"{DM} lr_img=nan", "lr_img=nan: must be a finite number"),
        (f"{DM} lr_img=1e39", "lr_img=1e39: must be a finite number"),
        (f"{DM} 'steps=${{oc.env:HOME}}'", "steps=${oc.env:HOME}: must be a whole number"),
        (f"{DM} 'steps=${{lr_img}}'", "steps=${lr_img}: must be a whole number"),
        (f"{DM} steps=???", "steps=???: must be a whole number"),
        (f"{DM} init=???", "init=???: unknown"),
        (f"{DM} 'init=${{augment}}'", "init=${augment}: unknown"),
        (f"{DM} --network ???", "unknown network '???'"),
        (f"{DM} --minutes inf", "--minutes inf: must be a number of at most"),
        (f"{DM} --minutes 1e400", "--minutes 1e400: must be a number of at most"),
        (f"{DM} --minutes 1e8", "--minutes 1e+08: must be more than 0 and at most 5,270,400"),
        (f"{DM} --seed 99999999999999999999", "--seed 99999999999999999999: must be a whole number of at most 9,22"),
        (f"{DM} --tag ../x", "--tag '../x': use up to 100 letters"),
        (f"{DM} --tag ''", "--tag '': use up to 100 letters"),
        (f"{DM} --tag {'x' * 101}", "--tag 'xxx"),
        ("distill dm --data ../x=digits --ipc 1", "name '../x': use up to 100 letters"),
        ("distill --recipe nosuchrecipe/nosuchcell", "unknown recipe 'nosuchrecipe/nosuchcell'; the nearest are "),
        ("plan --classes 1000000000 --ipc 10", "--classes 1000000000: must be a whole number of at most 100,000"),
        ("evaluate x.h5 --data digits --runs 1e20", "--runs 1e20: must be a whole number of at most 10,000"),
        ("evaluate x.h5 --data digits --runs 99999", "--runs 99999: must be a whole number of at most 10,000"),
        ("suite small --data cifar10-jpg=x", "--data cifar10-jpg=x: not one of the data of small; did you mean"),
    ],
)
def test_wrong_values_are_one_line(call, tmp_path, line, message):
    result = call(line)
    assert result.code == 2 and result.err.startswith(f"condense: {message}"), result.err
    assert result.err.count("\n") == 1 and len(result.err) < 600 and result.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.npz"]


def test_long_messages_are_shortened(call):
    result = call(f"show {'x' * 5000}")
    assert result.code == 2 and len(result.err) < 1100 and "[...]" in result.err
    many = did_you_mean("q", [f"recipe{number}" for number in range(1000)], "condense ls recipes")
    assert many.count("recipe") == 4 and many.endswith("`condense ls recipes` lists all 1000")


# -- YAML -------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), r"aliases \(\*NAME\) are not supported"),
        (b"method: dm\ndata: [" + b"[" * 3000, "not valid YAML"),
        (b"method: \xff\xfe", "byte 8 is not UTF-8"),
        (b"x" * (config.MAX_YAML_BYTES + 1), "larger than 1048576 bytes"),
        (b"1: 2", "must be a mapping of names to values"),
        (b"- a", "must be a mapping of names to values"),
        (b"method: [", "not valid YAML"),
    ],
)
def test_hostile_yaml(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(CondenseError, match=message):
        config.load_recipe(str(tmp_path / "r.yaml"))


def test_a_pipe_is_not_read_as_yaml(tmp_path):
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(CondenseError, match=r"r\.yaml: no such file"):
        config.load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": 0}, "runs=0: must be 1 to 10000"),
        ({"steps": 0}, "steps=0: must be 1 to"),
        ({"batch": -3}, "batch=-3: must be 1 to"),
        ({"lr": []}, r"lr=\[\]: must be a list of at least one"),
        ({"lr": [-0.1]}, r"lr=\[-0.1\]: must be a list"),
        ({"drops": [2.0]}, r"drops=\[2.0\]: must be fractions"),
        ({"momentum": float("nan")}, "momentum=nan: must be a finite number"),
        ({"labels": "none"}, "labels=none: unknown"),
        ({"augment": "rotates"}, "rotates"),
        ({"networks": ["${steps}"]}, r"networks=\['\$\{steps\}'\]: must be"),
        ({"name": "../x"}, r"name '\.\./x': use up to 100 letters"),
        ({"summary": [1]}, r"summary=\[1\]: must be text"),
        ({"step": 1}, "step=1: no such setting"),
    ],
)
def test_protocols_of_users_are_checked(tmp_path, monkeypatch, changes, message):
    change_protocols(monkeypatch, tmp_path / "protocols", ["quick-v1"], **changes)
    with pytest.raises(CondenseError, match=message):
        protocols()


SUITE = """
name: mine
summary: a suite
protocol: quick-v1
runs: 1
seeds: [0]
networks: [own]
tasks:
  digits: {ipc: [1], network: mlp, controls: [random]}
methods:
  random: {digits-ipc1: {}}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("runs: 1", "runs: 0", "runs: must be whole numbers from 1 to 10,000, not 0"),
        ("seeds: [0]", "seeds: []", "seeds: must be whole numbers from 0 to .*, not nothing"),
        ("seeds: [0]", "seeds: [-1]", "seeds: must be whole numbers from 0 to .*, not -1"),
        ("ipc: [1]", "ipc: [-3]", "digits: ipc: must be whole numbers from 1 to"),
        ("name: mine", "name: ../mine", r"name '\.\./mine': use up to 100 letters"),
        ("  digits: {", "  ../digits: {", r"tasks '\.\./digits': use up to 100 letters"),
        ("summary: a suite", "summary: ${name}", None),
        ("protocol: quick-v1", "protocol: quik-v1", "unknown protocol 'quik-v1'"),
    ],
)
def test_suites_of_users_are_checked(tmp_path, old, new, message):
    from condense.benchmarks import suite

    (tmp_path / "mine.yaml").write_text(SUITE.replace(old, new))
    if message is None:  # plain text
        assert suite.get_suite(str(tmp_path / "mine.yaml")).summary == "${name}"
        return
    with pytest.raises(CondenseError, match=message) as fault:
        suite.get_suite(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(fault.value)


# -- output -----------------------------------------------------------------------------------------------------------


def test_printable():
    assert formatting.printable("plain\ntext\t") == "plain\ntext\t"
    assert formatting.printable("ä €") == "ä €"
    assert formatting.printable("\x1b[2J\x07\x9b\r") == r"\x1b[2J\x07\x9b\r"
    assert formatting.printable("a\u202eb\udcff") == r"a\u202eb\udcff"


def test_control_characters_do_not_reach_the_terminal(call, tmp_path):
    name = "\x1b]0;title\x07"
    (tmp_path / f"{name}.h5").write_text("no set")
    result = call(f"verify '{name}.h5'")
    assert result.code == 2 and "\x1b" not in result.err and r"\x1b]0;title\x07.h5" in result.err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("> /dev/full", 2, "condense: standard output cannot be written: No space left on device\n"),
        (">&-", 0, ""),
        ("<&-", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_closed_and_full_streams(redirection, code, message):
    command = f"{sys.executable} -m condense ls recipes {redirection}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, message)


# -- signals, locks, memory -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_closed_terminal_stops_as_sigterm_does(tiny, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        run = Run(tiny, 1, "mlp", directory=tmp_path)
        with run.stop_on_signal():
            signal.raise_signal(signal.SIGHUP)
            assert run.stop_requested
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        run = Run(tiny, 1, "mlp", directory=tmp_path)
        with run.stop_on_signal():
            signal.raise_signal(signal.SIGHUP)
            assert not run.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path):
    waits = []

    def give_up():
        waits.append(1)
        if len(waits) == 2:
            raise KeyboardInterrupt

    path = tmp_path / "experts.h5"
    with files.exclusive_lock(path, tmp_path / "locks", give_up):
        with files.exclusive_lock(tmp_path / "other.h5", tmp_path / "locks", give_up):
            assert not waits
        with pytest.raises(KeyboardInterrupt), files.exclusive_lock(path, tmp_path / "locks", give_up):
            pass
        assert len(waits) == 2
    with files.exclusive_lock(path, tmp_path / "locks", give_up):
        assert len(waits) == 2


def test_two_processes_train_experts_for_one_file(tmp_path):
    line = ["experts", "--data", "digits", "--count", "2", "--epochs", "2", "--network", "convnet-d1-w8-in"]
    command = [sys.executable, "-m", "condense", *line, "--out", "e.h5", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    trained = sorted(text.partition(" trained now")[0][-1] for text, _ in outputs)
    assert trained == ["0", "2"] and not (tmp_path / "e.h5.parts").exists()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
        (ValueError("cannot allocate memory"), False),
    ],
)
def test_failed_allocations_are_recognised(fault, expected):
    assert is_out_of_memory(fault) == expected


# -- arguments of Python calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ipc": 1.5}, "--ipc 1.5: must be a whole number"),
        ({"ipc": "2"}, "--ipc '2': must be a whole number"),
        ({"ipc": True}, "--ipc True: must be a whole number"),
        ({"ipc": None}, "--ipc None: must be a whole number"),
        ({"seed": None}, "--seed None: must be a whole number"),
        ({"seed": 0.5}, "--seed 0.5: must be a whole number"),
        ({"seed": 2**70}, "--seed 1180591620717411303424: must be at most 9,22"),
        ({"minutes": "5"}, "--minutes 5: must be more than 0"),
        ({"tag": 5}, "--tag '5'|--tag 5: use up to"),
        ({"tag": "a\n"}, r"--tag 'a\\n': use up to 100 letters"),
        ({"method": None}, "unknown method 'None'"),
        ({"method": 5}, "unknown method '5'"),
        ({"out": "a\0b.h5"}, "is no path of a file or folder"),
        ({"out": 5}, "--out 5: is no path"),
        ({"run_dir": "a\0b"}, "--run-dir .* is no path"),
        ({"network": 5}, "network 5: give a name"),
    ],
)
def test_arguments_of_distill(tiny, change, message):
    arguments = {"method": "random", "data": tiny, "ipc": 1, "network": "mlp", **change}
    with pytest.raises(CondenseError, match=message) as error:
        condense.distill(**arguments)
    assert "\n" not in str(error.value)


def test_integers_of_numpy_are_whole_numbers(tiny, tmp_path):
    made = condense.distill("random", tiny, np.int64(2), network="mlp", seed=np.int64(3), out=tmp_path / "a.h5")
    assert made.manifest["ipc"] == 2 and condense.load(tmp_path / "a.h5").manifest["seed"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 1.5}, "--runs 1.5: must be a whole number"),
        ({"runs": "2"}, "--runs '2': must be a whole number"),
        ({"seed": 1.5}, "--seed 1.5: must be a whole number"),
        ({"protocol": 5}, "unknown protocol '5'"),
        ({"classes": "0,1"}, "classes: give a list of names of .*, not the text '0,1'"),
        ({"classes": [0, 1]}, "classes: '0' is no class"),
        ({"controls": "nois"}, "--controls nois: unknown"),
        ({"distilled": 5}, "5 is not a distilled set"),
    ],
)
def test_arguments_of_evaluate(tiny, change, message):
    made = condense.distill("random", tiny, 1, network="mlp")
    arguments = {"distilled": made, "task": tiny, "networks": "mlp", "runs": 1, "protocol": "quick-v1", **change}
    with pytest.raises(CondenseError, match=message):
        condense.evaluate(**arguments)


@pytest.mark.parametrize("source", [None, 5, "a\0b", "x" * 5000])
def test_what_is_no_set_is_not_loaded(source):
    with pytest.raises(CondenseError, match="is no file and no ready-made set"):
        condense.load(source)


def test_only_sets_are_joined_and_only_paths_resumed(tiny):
    made = condense.distill("random", tiny, 1, network="mlp")
    with pytest.raises(CondenseError, match="'digits/dm-ipc1' is not a distilled set"):
        condense.join(made, "digits/dm-ipc1")
    with pytest.raises(CondenseError, match="is no path of a file or folder"):
        condense.resume(5)


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CondenseError, match="is a device, pipe or socket; name a file"):
        files.check_writable(tmp_path / "pipe", force=True)


# -- run directories --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ({"method": []}, "'method'"),
        ({"data": None}, "'data'"),
        ({"data": {}}, "'data.source'"),
        ({"ipc": "1"}, "'ipc'"),
        ({"ipc": 0}, "'ipc'"),
        ({"network": None}, "'network'"),
        ({"seed": 10**30}, "'seed'"),
        ({"device": 1.5}, "'device'"),
        ({"minutes": -1}, "'minutes'"),
        ({"minutes": True}, "'minutes'"),
        ({"out": 7}, "'out'"),
        ({"tag": "../x"}, "'tag'"),
        ({"tag": 3}, "'tag'"),
        ({"settings": [1]}, "'settings'"),
        ({"force": "yes"}, "'force'"),
        ({"shorter": [None]}, "'shorter.0'"),
    ],
)
def test_the_configuration_of_a_run_is_checked(call, tmp_path, change, mistake):
    path = tmp_path / "run" / "config.json"
    call("distill random --data tiny.npz --ipc 1 --network mlp --out a.h5 --run-dir run")
    content = json.loads(path.read_text())
    (tmp_path / "run" / "result.json").unlink()
    path.write_text(json.dumps({**content, **change}))
    end = call("resume run")
    assert end.code == 2 and f"config.json: has no proper {mistake}" in end.err and end.err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\0", "x" * 2**21])
def test_what_is_no_configuration_is_refused(call, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    end = call("resume run")
    assert end.code == 2 and end.err.count("\n") == 1
    assert "not a run directory" in end.err or "config.json: has no proper" in end.err
