"""The command line as a user meets it: every mistake is one line that helps, and costs nothing."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import typer
from conftest import command_line, tiny_arrays
from PIL import Image

import condense
from condense import cli
from condense.cli import EXIT_CODES
from condense.engine import CHECKPOINT_FILE

NETWORK = "convnet-d2-w8-in"
EXPERTS = f"experts --data digits --network {NETWORK} --count 1 --epochs 2 expert_batch=256"
MTT = f"distill mtt --data digits --ipc 1 --network {NETWORK} steps=2"
DM = f"distill dm --data digits --ipc 1 --network {NETWORK} steps=2 batch_real=8"
VERBS = (
    "ls",
    "show",
    "advise",
    "distill",
    "resume",
    "evaluate",
    "downstream",
    "suite",
    "verify",
    "preview",
    "leaderboard",
    "import",
    "export",
    "join",
    "plan",
    "experts",
    "teachers",
    "scores",
    "lighten",
    "labels",
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``call(words)`` runs the command line in an empty folder: its exit code and what it printed."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    return lambda words: command_line(words, capsys)


@pytest.fixture
def done(call):
    """``done(words)`` is what a command prints that must succeed."""

    def run(words):
        result = call(words)
        assert result.code == 0, result.err
        return result.out

    return run


def content(folder):
    """Every file and folder below ``folder``, with the bytes of the files."""
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(call, material, tmp_path):
    """``refused(words, *expected)``: code 2, one line with all of ``expected``, nothing written and nothing lost."""

    def check(words, *expected):
        before = content(material), content(tmp_path / "here")
        result = call(words.format(m=material))
        assert result.code == 2, result.err
        assert result.out == ""
        assert result.err.startswith("condense: ") and result.err.count("\n") == 1, result.err
        for part in expected:
            assert part.format(m=material) in result.err
        assert (content(material), content(tmp_path / "here")) == before

    return check


def write_images(folder, sizes):
    """A folder of images: class name to the sizes of its images."""
    random = np.random.default_rng(0)
    for name, sides in sizes.items():
        (folder / name).mkdir(parents=True)
        for number, side in enumerate(sides):
            pixels = random.integers(0, 256, (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def write_arrays(path, arrays):
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(path, **dict(zip(keys, arrays)))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Sets, data and runs, good and bad, that the commands below are given."""
    m = tmp_path_factory.mktemp("material")
    cache = pytest.MonkeyPatch()
    cache.setenv("CONDENSE_CACHE", str(tmp_path_factory.mktemp("cache")))
    condense.distill("random", "digits", 2, network=NETWORK, protocol="quick-v1", out=m / "set.h5")
    whole = (m / "set.h5").read_bytes()
    (m / "truncated.h5").write_bytes(whole[: len(whole) // 2])
    (m / "flipped.h5").write_bytes(whole)
    with h5py.File(m / "flipped.h5", "r+") as file:
        file["images"][3, 0, 2, 2] ^= 1
    with h5py.File(m / "foreign.h5", "w") as file:
        file["images"] = np.zeros((2, 1, 8, 8))
    (m / "text.h5").write_text("hello")
    (m / "notes.txt").write_text("hello")
    (m / "folder.h5").mkdir()

    (m / "empty").mkdir()
    write_images(m / "single" / "train", {"cat": [8, 8]})
    write_images(m / "corrupt" / "train", {"cat": [8] * 4, "dog": [8] * 4})
    (m / "corrupt" / "train" / "dog" / "2.png").write_bytes(b"no image")
    write_images(m / "mixed" / "train", {"cat": [8, 9, 8, 9], "dog": [8, 8, 8, 8]})
    write_arrays(m / "three.npz", tiny_arrays(classes=3))
    write_arrays(
        m / "large.npz",
        [
            np.kron(part, np.ones((2, 2), np.uint8)) if part.ndim == 4 else part
            for part in tiny_arrays(classes=2, size=8)
        ],
    )
    images, labels = np.zeros((20, 1, 16, 16), np.uint8), np.arange(20) % 10
    write_arrays(m / "sixteen.npz", (images, labels, images, labels))

    (m / "lacks.yaml").write_text("method: dm\nsteps: 3\n")
    (m / "broken.yaml").write_text("method: [dm\n")
    (m / "words.yaml").write_text("method: dm\ndata: digits\nipc: ten\n")

    (m / "data.npz").write_bytes((m / "three.npz").read_bytes())
    settings = {"network": NETWORK, "steps": 2, "batch_real": 4, "track": "none"}
    condense.distill("dm", str(m / "data.npz"), 1, run_dir=m / "changed", **settings)
    (m / "changed" / "result.json").unlink()
    write_arrays(m / "data.npz", tiny_arrays(classes=3, seed=1))
    condense.distill("dm", str(m / "three.npz"), 1, run_dir=m / "edited", **settings)
    (m / "edited" / "result.json").unlink()
    shutil.copytree(m / "edited", m / "run")
    edit_config(m / "edited", seed=7)
    shutil.copytree(m / "run", m / "unknown")
    edit_config(m / "unknown", settings={"stepz": 3})
    condense.distill("dm", condense.task(tiny_arrays()), 1, run_dir=m / "python", **settings)
    yield m
    cache.undo()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- mistakes ---------------------------------------------------------------------------------------------------------

EVALUATE = "evaluate {m}/set.h5 --data digits --runs 1"

MISTAKES = {
    "unknown method": ("distill dmm --data digits --ipc 1", "'dmm'", "did you mean 'dm'?"),
    "unlike any method": ("distill qqqqq --data digits --ipc 1", "'qqqqq'", "--plugin FILE.py adds your own"),
    "unknown method to plan": ("plan dmm --data digits --ipc 1", "'dmm'", "did you mean 'dm'?"),
    "unknown dataset": ("distill dm --data digit --ipc 1", "'digit'", "did you mean 'digits'?"),
    "unknown dataset to evaluate": ("evaluate {m}/set.h5 --data digit", "'digit'", "did you mean 'digits'?"),
    "unknown network": (f"{DM} --network lenat", "'lenat'", "did you mean 'lenet'?"),
    "unknown networks": (f"{EVALUATE} --networks lenet,lenat", "'lenat'", "did you mean 'lenet'?"),
    "unknown setting": (f"{DM} stepz=1", "stepz=1", "did you mean 'steps'?"),
    "unknown setting of the data": (f"{DM} reszie=8", "reszie=8", "did you mean 'resize'?"),
    "unknown setting of the run": (f"{DM} netwerk=lenet", "netwerk=lenet", "did you mean 'network'?"),
    "unknown setting like nothing": (f"{DM} xyzzy=8", "xyzzy=8", "known:", "lr_img"),
    "unknown recipe": ("distill --recipe dm/digits-ip1", "'dm/digits-ip1'", "did you mean 'dm/digits-ipc1'?"),
    "unknown protocol": (f"{EVALUATE} --protocol quick-v2", "'quick-v2'", "did you mean 'quick-v1'?"),
    "unknown protocol to distill": (f"{DM} protocol=quick-v2", "'quick-v2'", "did you mean 'quick-v1'?"),
    "unknown control": (f"{EVALUATE} --controls rendom", "--controls rendom", "did you mean 'random'?"),
    "unknown kind": ("ls method", "'method'", "did you mean 'methods'?"),
    "unknown thing to show": ("show dmm", "'dmm'", "the nearest are dm (method)"),
    "unknown set": ("verify {m}/sett.h5", "{m}/sett.h5: no such file", "did you mean 'set.h5'?"),
    "unknown ready-made set": ("verify zzz/none", "'zzz/none'", "digits/dm-ipc10"),
    "misspelt ready-made set": ("verify digits/md-ipc10", "'digits/md-ipc10'", "did you mean 'digits/dm-ipc10'"),
    "unknown tracker": (f"{DM} --track tensorbord", "--track tensorbord", "did you mean 'tensorboard'?"),
    "unknown initialisation": (f"{DM} init=rael", "init=rael", "did you mean 'real'"),
    "unknown augmentation": (f"{DM} augment=blur", "blur"),
    "unknown verb": ("distil dm", "'distil'", "'distill'", "condense --help"),
    "unknown option": ("distill dm --dat digits", "--dat", "--data", "condense distill --help"),
    "unknown option before the verb": ("--nope ls", "--nope", "condense --help"),
    "several faults": (
        "distill dm --data digits ipc=ten stepz=1 lr_img=fast reszie=8 --network lenat",
        "ipc=ten",
        "stepz=1",
        "lr_img=fast",
        "reszie=8",
        "'lenat'",
    ),
    "several faulty options": (f"{DM} fyi=maybe --device warp --minutes -1 --track x", "fyi=maybe", "warp", "-1", "x"),
    "mirror images that are other classes": (f"{DM} fyi=true", "fyi=true", "digits", "leave fyi off"),
    "ipc zero": (f"{DM} --ipc 0", "--ipc 0", "at least 1"),
    "ipc negative": (f"{DM} --ipc -3", "--ipc -3", "at least 1"),
    "ipc no number": (f"{DM} --ipc x", "--ipc x", "whole number"),
    "ipc more than a class has": (f"{DM} --ipc 1000", "--ipc 1000", "class '8'", "at most 139"),
    "ipc as a word": (f"{DM} ipc=0", "--ipc 0", "at least 1"),
    "steps zero": (f"{DM} steps=0", "steps=0", "at least 1"),
    "no data": ("distill dm --ipc 1", "--data", "--data DATA"),
    "no ipc": ("distill dm --data digits", "--ipc", "--ipc N"),
    "no method": ("distill --data digits --ipc 1", "METHOD", "--recipe"),
    "nothing": ("distill", "METHOD, --data, --ipc", "--recipe"),
    "no set": ("verify", "SET.h5", "condense verify --help"),
    "no data to evaluate": ("evaluate {m}/set.h5", "--data", "condense evaluate --help"),
    "no picture": ("preview {m}/set.h5", "--out", "condense preview --help"),
    "an option without its value": ("distill dm --ipc", "--ipc", "--help"),
    "a word that is no setting": (f"{DM} fast", "'fast'", "key=value"),
    "a recipe of another method": ("distill random --recipe dm/digits-ipc1", "'dm'", "'random'", "leave one"),
    "a recipe that is missing": ("distill --recipe {m}/none.yaml", "{m}/none.yaml", "no such file"),
    "a recipe that lacks keys": ("distill --recipe {m}/lacks.yaml", "{m}/lacks.yaml", "data, ipc"),
    "a recipe that is no YAML": ("distill --recipe {m}/broken.yaml", "{m}/broken.yaml", "YAML"),
    "a recipe with words for numbers": ("distill --recipe {m}/words.yaml", "ipc=ten", "must be a whole number"),
    "an empty folder": ("distill dm --data {m}/empty --ipc 1", "{m}/empty", "is empty", "train/<class>"),
    "a folder with one class": ("distill dm --data {m}/single --ipc 1", "{m}/single", "'cat'", "at least two"),
    "a corrupt image": ("distill dm --data {m}/corrupt --ipc 1", "{m}/corrupt/train/dog/2.png"),
    "images of mixed sizes": ("distill dm --data {m}/mixed --ipc 1", "8x8", "9x9", "resize="),
    "data of another kind": ("distill dm --data {m}/notes.txt --ipc 1", "{m}/notes.txt", "folder of images"),
    "a set as data": ("distill dm --data {m}/set.h5 --ipc 1", "{m}/set.h5", "is a distilled set"),
    "an output that exists": (f"{DM} --out {{m}}/set.h5", "{m}/set.h5 exists", "--force"),
    "an output below a file": (f"{DM} --out {{m}}/notes.txt/a.h5", "notes.txt/a.h5", "Not a directory"),
    "an output that is a folder": (f"{DM} --out {{m}}/folder.h5", "{m}/folder.h5 is a folder", "name a file"),
    "a folder even with force": (f"{DM} --out {{m}}/folder.h5 --force", "{m}/folder.h5 is a folder", "name a file"),
    "an output with too long a name": (f"{DM} --out {'x' * 300}.h5", "File name too long"),
    "a run directory with a run": (f"{DM} --run-dir {{m}}/run", "{m}/run holds a run", "condense resume", "--force"),
    "a run directory with a finished run": (f"{DM} --run-dir {{m}}/python", "a finished run", "another --run-dir"),
    "a run directory below a file": (f"{DM} --run-dir {{m}}/notes.txt/run", "notes.txt/run", "Not a directory"),
    "a record that exists": (f"{EVALUATE} --json {{m}}/notes.txt", "{m}/notes.txt exists", "--force"),
    "a record below a file": (f"{EVALUATE} --json {{m}}/notes.txt/a.json", "notes.txt/a.json", "Not a directory"),
    "a picture that exists": ("preview {m}/set.h5 --out {m}/notes.txt", "{m}/notes.txt exists", "--force"),
    "data of other classes": ("evaluate {m}/set.h5 --data {m}/three.npz", "three", "3 (0, 1, 2)", "10 (0, 1, 2, ...)"),
    "data of another size": ("evaluate {m}/set.h5 --data {m}/sixteen.npz", "16", "8", "resize="),
    "an unknown setting of data to evaluate": (f"{EVALUATE} reszie=8", "reszie=8", "did you mean 'resize'?"),
    "no runs": (f"{EVALUATE} --runs 0", "--runs 0", "at least 1"),
    "runs in words": (f"{EVALUATE} --runs two", "--runs two", "whole number"),
    "no such device": (f"{DM} --device nonsense", "--device nonsense", "--device cpu"),
    "a device without values": (f"{DM} --device meta", "--device meta", "--device cpu"),
    "no such device to evaluate": (f"{EVALUATE} --device nonsense", "--device nonsense", "--device cpu"),
    "minutes negative": (f"{DM} --minutes -1", "--minutes -1", "more than 0"),
    "minutes that are no number": (f"{DM} --minutes nan", "--minutes nan", "must be a number of at most"),
    "minutes in words": (f"{DM} --minutes ten", "--minutes ten", "a number"),
    "precision": (f"{DM} --precision fp8", "--precision fp8", "auto, fp32 or bf16"),
    "precision to evaluate": (f"{EVALUATE} --precision fp8", "--precision fp8", "auto, fp32 or bf16"),
    "a network too deep": (f"{DM} --network convnet-d6-w8-in", "convnet-d6", "8x8", "the largest depth that fits is 3"),
    "a network too deep to plan": (f"plan{DM[7:]} --network convnet-d6-w8-in", "convnet-d6", "fits is 3"),
    "labels of no classes": ("plan --classes 1 --ipc 1", "--classes 1", "at least 2"),
    "labels of no epochs": ("plan --classes 9 --ipc 1 --label-epochs 0", "--label-epochs 0", "at least 1"),
    "labels of how many images": ("plan --classes 9", "--ipc missing", "--classes 9 --ipc N"),
    "labels with and without data": ("plan dm --classes 9 --ipc 1", "--classes 9", "leave out"),
    "epochs of what": (f"plan{DM[7:]} --label-epochs 5", "--label-epochs 5", "label_epochs=5"),
    "experts of a method without any": ("experts --data digits --for dm", "--for dm", "has no experts", "mtt"),
    "experts of an unknown method": ("experts --data digits --for zzz", "'zzz'", "the nearest are"),
    "no experts": (f"{EXPERTS} --count 0", "--count 0", "at least 1"),
    "experts of no epochs": (f"{EXPERTS} --epochs 0", "--epochs 0", "at least 1"),
    "experts in words": (f"{EXPERTS} --count ten", "--count ten", "whole number"),
    "experts without data": ("experts --count 1", "--data", "condense experts --help"),
    "several faults of experts": (
        f"{EXPERTS} --epochs -1 --dtype half --held-out 1 stepz=4 reszie=8 --device warp",
        "--epochs -1",
        "--dtype half",
        "--held-out 1",
        "stepz=4",
        "did you mean 'steps'",
        "reszie=8",
        "warp",
    ),
    "experts over a set": (f"{EXPERTS} --out {{m}}/set.h5", "{m}/set.h5", "another format", "--force"),
    "experts in a folder": (f"{EXPERTS} --out {{m}}/folder.h5", "{m}/folder.h5 is a folder", "name a file"),
    "experts below a file": (f"{EXPERTS} --out {{m}}/notes.txt/a.h5", "notes.txt/a.h5", "Not a directory"),
    "experts too deep": (f"{EXPERTS} --network convnet-d6-w8-in", "convnet-d6", "the largest depth that fits is 3"),
    "experts that are missing": (f"{MTT} experts=no.h5", "no.h5: no such file", "condense experts"),
    "experts that are a set": (f"{MTT} experts={{m}}/set.h5", "{m}/set.h5", "condense experts"),
    "a folder that is no run": ("resume {m}/empty", "{m}/empty: not a run directory", "--run-dir"),
    "a run that is missing": ("resume {m}/nowhere", "{m}/nowhere: not a run directory", "--run-dir"),
    "a run whose config was edited": ("resume {m}/edited", "{m}/edited: config.json", "--force"),
    "a run with an unknown setting": ("resume {m}/unknown", "{m}/unknown: stepz=3", "did you mean 'steps'?"),
    "a run whose data changed": ("resume {m}/changed", "{m}/changed", "{m}/data.npz changed", "start over"),
    "a run on data from Python": ("resume {m}/python", "{m}/python", "data were given in Python"),
    "a run resumed for no time": ("resume {m}/run --minutes 0", "{m}/run: --minutes 0", "more than 0"),
}
READERS = ("verify {set}", "evaluate {set} --data digits", "preview {set} --out a.png", "show {set}")
SETS = {
    "truncated": ("{m}/truncated.h5: truncated or damaged", "make it again"),
    "flipped": ("{m}/flipped.h5: truncated or damaged", "make it again"),
    "foreign": ("{m}/foreign.h5: an HDF5 file of another format", "condense distill"),
    "text": ("{m}/text.h5: not an HDF5 file", "condense distill"),
    "missing": ("{m}/missing.h5: no such file", "condense distill"),
}
MISTAKES |= {
    f"{reader.split()[0]} a set that is {kind}": (reader.format(set=f"{{m}}/{kind}.h5"), *expected)
    for reader in READERS
    for kind, expected in SETS.items()
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_helps(name, refused):
    refused(*MISTAKES[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_where_there_is_none(refused):
    refused(f"{DM} --device cuda", "--device cuda", "--device cpu")


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="has trackio")
def test_a_tracker_that_is_not_installed(refused):
    refused(f"{DM} --track trackio", "--track trackio", "pip install 'condense-toolkit[track]'")


@pytest.mark.parametrize("words", [DM, f"{DM} --out elsewhere/a.h5 --run-dir b"])
def test_a_full_disk_is_found_before_the_work(words, refused, monkeypatch):
    full = SimpleNamespace(f_bavail=3, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    refused(words, "the disk has 12288 bytes left", "free some")


def test_a_refused_method_keeps_the_run_that_force_would_replace(refused, material):
    refused(f"{DM} init=rael --force --run-dir {{m}}/run", "init=rael")
    assert (material / "run" / CHECKPOINT_FILE).exists()


# -- faults and interruptions -----------------------------------------------------------------------------------------


def test_debug_shows_the_traceback(call):
    result = call("--debug show dmm")
    assert result.code == 2
    assert "Traceback" in result.err and result.err.splitlines()[-1].startswith("condense: 'dmm'")
    assert call("show dmm --debug").err.startswith("Traceback")


def run_broken_method(folder, statement, *options):
    """Distils, in a process of its own, with a method outside the package that only executes ``statement``."""
    (folder / "broken.py").write_text(
        "from condense.registry import method\n"
        "from condense.sets import SyntheticOptions\n\n\n"
        "@method('broken', config=SyntheticOptions, paper='A paper', year=2026)\n"
        "def broken(task, config, run):\n"
        f'    """Breaks."""\n    {statement}\n'
    )
    (folder / "broken.yaml").write_text("module: broken\n")
    line = ["distill", "broken", "--data", "digits", "--ipc", "1", "--network", "mlp", *options]
    environment = {**os.environ, "CONDENSE_METHODS": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "condense", *line], cwd=folder, capture_output=True, text=True, env=environment
    )


def test_an_internal_error_is_one_line_too(tmp_path):
    statement = "raise RuntimeError('two\\nlines')"
    result = run_broken_method(tmp_path, statement)
    assert result.returncode == 1
    assert result.stderr == "condense: internal error: RuntimeError: two lines; --debug shows where\n"
    assert "in broken" in run_broken_method(tmp_path, statement, "--debug").stderr


def test_ctrl_c_outside_a_loop(tmp_path):
    result = run_broken_method(tmp_path, "raise KeyboardInterrupt")
    assert (result.returncode, result.stderr) == (130, "condense: interrupted\n")


def test_a_reader_that_has_seen_enough_is_no_fault():
    program = f"{shlex.quote(sys.executable)} -m condense ls datasets; echo $? >&2"
    result = subprocess.run(["bash", "-c", f"({program}) | true"], capture_output=True, text=True)
    assert result.stderr == "0\n"


# -- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cli.LISTINGS)
def test_ls(kind, done):
    rows = json.loads(done(f"ls {kind} --json"))[kind]
    listed = done(f"ls {kind}").partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == [row["name"] for row in rows]
    assert rows or kind == "sets"


def test_ls_everything(done):
    assert list(json.loads(done("ls --json"))) == list(cli.LISTINGS)
    lines = done("ls").splitlines()
    assert [line.split()[1:] for line in lines[: len(cli.LISTINGS)]] == [[k, "condense", "ls", k] for k in cli.LISTINGS]


def test_ls_of_names_with_words(done):
    lines = done("ls recipes dm digits").splitlines()
    assert lines[-2:] == ["", "time and memory on this machine: condense plan --recipe NAME"]
    assert all(line.startswith("dm/digits-ipc") and "digits, " in line for line in lines[:-2]) and len(lines) > 3
    assert "published 48.9 ± 0.6 %" in done("ls recipes dm cifar10-ipc10")
    assert "lr_img=" in done("ls recipes dm digits -v") and "lr_img=" not in done("ls recipes dm digits")


def test_show_of_every_kind(done, call):
    assert "summary: " in done("show dc-v1") and "runs: " in done("show small")
    assert "classes: 10" in done("show digits")
    assert "320,010 parameters" in done("show convnet-d3-w128-in")
    wrong = call("show convnet-d3-w128-xx").err
    assert "the nearest are" in wrong and wrong.count("(network)") >= 1 and wrong.count(",") == 3
    os.mkdir("dc-v1")
    assert "summary: " in done("show dc-v1")
    assert "too deep for 32x32 images" in call("show convnet-d6-w8-in").err


def test_advise_plans_candidates_and_names_a_command(done, call, monkeypatch):
    monkeypatch.setenv("CONDENSE_PLAN_SECONDS", "0.1")
    words = f"advise --data digits --images 10 --network {NETWORK} --labels hard"
    text = done(f"{words} --minutes 600")
    assert [line.split()[0] for line in text.splitlines()[4:7]] == ["idm", "dm", "kmeans"]
    command = text.splitlines()[-1]
    assert command.startswith(f"run: condense distill idm --data digits --images 10 --network {NETWORK}")
    short = json.loads(done(f"{words} --minutes 0.0001 --json"))
    assert short["command"] is None and not any(plan["fits"] for plan in short["candidates"])
    assert "--labels soft: must be any or hard" in call("advise --data digits --ipc 1 --labels soft").err
    wrong = call("advise --data digits --ipc 1 --network convnet-d9 --precision fp23")
    assert wrong.code == 2 and "convnet-d9" in wrong.err and "fp23" in wrong.err
    assert "--ipc 9999: class" in call("advise --data digits --ipc 9999").err
    assert (
        "--images -5: must be a multiple of the 10 classes of digits: 10"
        in call("advise --data digits --images -5").err
    )


def test_images_in_total_instead_of_images_per_class(done, call):
    done(f"{DM.replace('--ipc 1', '--images 20')} steps=1 --out a.h5")
    assert condense.load("a.h5").manifest["ipc"] == 2
    wrong = call(f"{DM.replace('--ipc 1', '--images 25')} steps=1 --out b.h5").err
    assert "--images 25: must be a multiple of the 10 classes of digits: 20 or 30" in wrong
    assert "give one of them" in call(f"{DM} --images 20").err


def test_show_a_method(done):
    text = done("show dm")
    assert "lr_img=1.0\n      Learning rate" in text and "resize=None" in text
    shown = json.loads(done("show dm --json"))
    (steps,) = (entry for entry in shown["settings"] if entry["name"] == "steps")
    assert {"type": "int", "default": "20000"}.items() <= steps.items()


def test_show_a_recipe(done, tmp_path):
    assert "condense distill --recipe dm/digits-ipc1" in done("show dm/digits-ipc1")
    assert json.loads(done("show dm/digits-ipc1 --json"))["recipe"]["data"] == "digits"
    (tmp_path / "mine.yaml").write_text("method: dm\ndata: digits\nipc: 2\nfyi: false\n")
    assert "fyi: false" in done(f"show {tmp_path}/mine.yaml")


def test_a_recipe_is_joined_with_published_and_measured_numbers(done):
    text = done("show dm/cifar10-ipc10")
    assert "published:\n  48.9 ± 0.6 % on convnet-d3-w128-in (1,000 epochs, DSA" in text
    assert "quick-v1, cifar10-jpeg, random images" in text  # a folder of the same images, by its own name
    facts = json.loads(done("show dm/cifar10-ipc10 --json"))
    assert facts["published"][0]["mean"] == 48.9
    assert {entry["dataset"] for entry in facts["measured"]} == {"cifar10", "cifar10-jpeg"}
    assert "published: none\nmeasured here: none" in done("show dm/cifar100-ipc100")


def test_show_a_set(done, material):
    text = done(f"show {material}/set.h5")
    assert text.startswith("digits/random-ipc2: 20 images of 1x8x8, 2 for each of 10 classes, hard labels\n")
    assert "classes: 0, 1, 2, 3" in text and "images 1.3 kB" in text and "next: condense evaluate" in text
    assert json.loads(done(f"show {material}/set.h5 --json"))["name"] == "digits/random-ipc2"


def test_verify(done, material):
    assert "good; digits/random-ipc2, 20 images 1x8x8, hard labels" in done(f"verify {material}/set.h5")


def test_preview(done, material):
    assert "wrote new/a.png: 10 classes" in done(f"preview {material}/set.h5 --out new/a.png")
    assert Image.open("new/a.png").size == (2 * 66 + 2, 10 * 66 + 2)
    done(f"preview {material}/set.h5 --out new/a.png --force")


def test_a_ready_made_set_goes_by_its_name(done):
    assert "good" in done("verify digits/dm-ipc10")
    assert "digits/dm-ipc10" in done("show digits/dm-ipc10")


def test_distill_says_what_it_made_and_what_to_do_next(done):
    text = done(f"{DM} --out 'new place/a.h5'")
    assert text.startswith("made digits/dm-ipc1: 10 images of 2.6 kB, 2 of 2 steps in ")
    assert "set:  new place/a.h5" in text and "run:  runs/digits-dm-ipc1-seed0" in text
    assert "wrote new place/a.png" in done(text.split("condense ")[-1])


def test_distill_by_a_recipe_with_words_of_ones_own(done):
    network = f"network={NETWORK}"
    done(f"distill --recipe dm/digits-ipc1 steps=3 batch_real=8 {network} --out a.h5")
    made = condense.load("a.h5").manifest
    assert (made["steps_done"], made["settings"]["batch_real"], made["protocol"]) == (3, 8, "quick-v1")
    done(f"distill dm --recipe dm/digits-ipc1 steps=2 ipc=2 {network} --seed 1 --out b.h5 --tag mine")
    assert condense.load("b.h5").name == "digits/dm-ipc2.mine"


def test_force_replaces_a_run_and_all_that_it_left(done):
    done(f"{DM} steps=3 --out a.h5 --run-dir run")
    done(f"{DM} --out a.h5 --run-dir run --force")
    assert condense.load("a.h5").manifest["steps_done"] == 2
    assert os.listdir("run/previews") == ["step-000002.png"]


def test_minutes_stop_cleanly_and_resume_goes_on(done):
    text = done(f"{DM} steps=100000 --minutes 0.01 --out a.h5 --run-dir run")
    assert "of 100000 steps" in text and "stopped by --minutes; go on to the end: condense resume run, for" in text
    first = condense.load("a.h5").manifest
    assert first["stopped_early"] and first["steps_done"] < 100000
    assert "stopped by --minutes" in done("resume run --minutes 0.01")
    second = condense.load("a.h5").manifest
    assert second["stopped_early"] and first["steps_done"] <= second["steps_done"] < 100000
    assert second["cost"]["seconds"] >= first["cost"]["seconds"] + 0.5  # the new limit counts from now on


def test_a_run_that_its_limit_stopped_goes_on_to_its_end(done):
    done(f"{DM} steps=30 --minutes 0.00001 --out a.h5 --run-dir run")
    assert condense.load("a.h5").manifest["steps_done"] < 30
    done("resume run")
    ended = condense.load("a.h5").manifest
    assert ended["steps_done"] == 30 and not ended["stopped_early"] and "--minutes" not in ended["command"]
    assert "run has ended" in done("resume run")


def test_training_that_a_limit_shortened_stays_short(done):
    """No command makes such a set again: a run without a limit would train longer, one with it would stop early."""
    words = "distill mtt --data digits --ipc 1 --network convnet-d2-w8-in steps=2 syn_steps=1 num_experts=2"
    text = done(f"{words} buffer_epochs=6 max_start_epoch=2 expert_epochs=1 --minutes 0.0005 --out a.h5 --run-dir run")
    assert "because of the time limit" in text
    text = done("resume run")
    ended = condense.load("a.h5").manifest
    assert ended["steps_done"] == 2 and not ended["stopped_early"]
    assert "because of the time limit" in text
    assert "--minutes" not in ended["command"] and ended["prepared_in_minutes"] == 0.0005


def test_evaluate_writes_a_record(done, material):
    text = done(f"evaluate {material}/set.h5 --data digits --runs 1 --controls none --json new/record.json")
    record = json.loads(Path("new/record.json").read_text())
    assert record["schema"] == "condense.record/1" and record["results"][0]["arm"] == "distilled"
    assert text.startswith("digits/random-ipc2 on digits, quick-v1") and "record: new/record.json" in text


def test_evaluate_on_data_of_another_size(done, material):
    assert "on sixteen" in done(
        f"evaluate {material}/set.h5 --data {material}/sixteen.npz resize=8 --runs 1 --controls none"
    )


def test_plan(done, monkeypatch):
    monkeypatch.setenv("CONDENSE_PLAN_SECONDS", "0.2")
    text = done(f"plan{DM[7:]} steps=5000")
    assert "5000 steps of" in text and "B host at peak" in text and "2.6 kB set" in text
    needs = json.loads(done(f"plan{DM[7:]} steps=5000 --json"))
    assert needs["steps"] == 5000 and needs["seconds"] > 4999 * 1e-4
    assert needs["set_bytes"]["images"] == 10 * 64 * 4
    assert "time:" in done("plan random --data digits --ipc 1")
    assert os.listdir() == []


def test_plan_tells_what_labels_need(done):
    words = "plan rded --data digits --ipc 1 --network convnet-d2-w4-bn teacher_epochs=1 labels=per-view"
    words += " label_epochs=40"
    text = done(words)
    assert "  labels of 10 images, 40 epochs of views, by kind:\n" in text and "    teacher:weights=int8  " in text
    needs = json.loads(done(f"{words} --json"))
    kinds = {row["kind"]: row for row in needs["labels"]}
    assert kinds["per-view"]["bytes"] == needs["set_bytes"]["labels"] and kinds["per-view"]["exactness"] == "exact"
    assert needs["views"] == {"kind": "per-view", "images": 10, "epochs": 40, "teachers": ["convnet-d2-w4-bn"]}
    assert "labels of" not in done("plan random --data digits --ipc 1")


def test_plan_of_labels_without_data(done):
    text = done("plan --classes 1000 --ipc 10")
    assert text.startswith("1000 classes, ipc 10; teacher: torchvision:resnet18 on images 3x224x224\n")
    assert "labels of 10000 images, 300 epochs" in text and "6.0 GB (5.6 GiB)" in text
    rows = json.loads(done("plan --classes 1000 --ipc 10 --json"))["labels"]
    kinds = {row["kind"]: row["bytes"] for row in rows}
    named = len(json.dumps({"names": ["torchvision:resnet18"], "shape": [3, 224, 224]})) + 4 + 8 + 4 + 1 + 39
    # Its weights, a scale for each of 5,800 channels, biases of 1,000 classes, and 20 norms of 4,800 channels.
    assert kinds["teacher"] == 11_678_912 + 4 * 5800 + 4 * 1000 + 16 * 4800 + 8 * 20 + named
    fewer = json.loads(done("plan --classes 10 --ipc 2 --label-epochs 3 --network convnet-d3-w8-bn --json"))
    assert {row["kind"]: row["bytes"] for row in fewer["labels"]}["per-view"] == 2 * 3 * 20 * 10 + 49


def test_plan_tells_the_time_of_the_run(monkeypatch, done):
    """Each step is made to last 10 ms: 1,000 of them last 10 s and a little more."""
    from condense.engine import SyntheticOptimizer

    original = SyntheticOptimizer.step
    monkeypatch.setattr(SyntheticOptimizer, "step", lambda *a, **k: (time.sleep(0.01), original(*a, **k))[1])
    monkeypatch.setenv("CONDENSE_PLAN_SECONDS", "0.3")
    needs = json.loads(done(f"plan{DM[7:]} steps=1000 --json"))
    assert needs["seconds_per_step"] > 0.01
    assert needs["seconds"] == pytest.approx(1000 * needs["seconds_per_step"], rel=0.3)


def test_experts_say_what_was_made_and_what_to_do_next(done):
    text = done(f"{EXPERTS} --out 'new place/a.h5'")
    assert text.startswith(f"1 experts of digits, {NETWORK}, 2 epochs: 1 trained now, 0 were there\n")
    assert "file: new place/a.h5 (" in text and "an expert; " in text and "experts x epochs a minute" in text
    assert text.endswith(
        "next: condense distill mtt --data digits --ipc 10 expert_batch=256 'experts=new place/a.h5'\n"
    )
    assert "0 trained now, 1 were there" in done(f"{EXPERTS} --out 'new place/a.h5'")


def test_version(done):
    assert done("--version") == f"condense {condense.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_tells_the_exit_codes(verb, done):
    text = " ".join(done(f"{verb} --help").split())
    assert text.endswith(EXIT_CODES)


@pytest.mark.parametrize("verb", VERBS)
def test_every_parameter_of_a_verb_is_explained_where_it_stands(verb):
    for parameter in typer.main.get_command(cli.app).commands[verb].params:
        text = getattr(parameter, "help", None)
        assert text or parameter.name == "help", f"{verb}: {parameter.name} has no help"
        assert not re.search(r"\bsee\b", text or "", re.IGNORECASE), f"{verb}: {parameter.name}: {text}"


def test_show_explains_inherited_settings(done):
    """CDA sets another default of a setting of SRe2L's and has no docstring of its own for it."""
    meanings = {
        name: {row["name"]: row["meaning"] for row in json.loads(done(f"show {name} --json"))["settings"]}
        for name in ("sre2l", "cda")
    }
    assert meanings["cda"]["bn_weight"] == meanings["sre2l"]["bn_weight"] != ""
    assert f"      {meanings['cda']['bn_weight']}\n" in done("show cda")


def test_help(done):
    text = done("--help")
    assert all(f"\n  {verb} " in text for verb in VERBS) and "..." not in text.split("Commands:")[1]
    assert done("") == text


def test_help_is_fast():
    """Below 1.5 s; the best of three, because other programs may use the cores."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        result = subprocess.run([sys.executable, "-m", "condense", "--help"], capture_output=True, text=True)
        times.append(time.monotonic() - began)
        assert result.returncode == 0 and "distill" in result.stdout and result.stderr == ""
    assert min(times) < 1.5
