"""A tiny task and an isolated cache, so that default tests are offline, small and leave nothing behind."""

import contextlib
import multiprocessing
import os
import shlex
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

# A developer's own settings must not reach the tests.
for _name in ("WORLD_SIZE", "RANK"):
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path_factory.mktemp("cache")))


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product catches it."""


@contextlib.contextmanager
def killed_after(stop, fault=Killed):
    """Raises ``fault`` right after the checkpoint of step ``stop`` is on disk."""
    from condense.engine import Run

    save = Run.save_checkpoint

    def save_and_die(run, step, optimizer):
        save(run, step, optimizer)
        if step == stop:
            raise fault

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", save_and_die)
        yield


def command_line(words, capsys):
    """Runs the command line in this process: its exit code and what it printed."""
    from condense.cli import main

    with pytest.raises(SystemExit) as end:
        main(shlex.split(words))
    out, err = capsys.readouterr()
    return SimpleNamespace(code=end.value.code, out=out, err=err)


SEARCH_PATH = tuple(sys.path)  # before a test makes methods of a folder importable
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "h5py", "omegaconf", "pytest", "typer"])


def condense_command(*words, cwd):
    """Runs the command line in a process of its own: its exit code and what it printed.

    The process is forked from one that has imported libraries and nothing of condense, because these imports take most
    of the time of a short command.
    """
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder) / name for name in ("stdout", "stderr")]
        process = PROCESSES.Process(target=_run_command, args=(words, cwd, dict(os.environ), SEARCH_PATH, texts))
        process.start()
        process.join()
        out, err = (text.read_text() for text in texts)
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def _run_command(words, cwd, environment, search_path, texts):
    for number, text in enumerate(texts, 1):
        os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [*environment.get("PYTHONPATH", "").split(os.pathsep), *search_path]
    os.chdir(cwd)
    import torch

    from condense.cli import main

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main(list(words))


def tiny_arrays(classes=3, train=12, test=6, channels=1, size=8, seed=0):
    """Images whose class is told by a bright block: easy to learn, different in every image."""
    random = np.random.default_rng(seed)

    def part(count):
        labels = np.repeat(np.arange(classes), count)
        images = random.integers(0, 90, (len(labels), channels, size, size))
        for image, label in zip(images, labels):
            image[:, 2 * label : 2 * label + 3, 1:6] += 120
        return images.astype(np.uint8), labels.astype(np.int64)

    return (*part(train), *part(test))


def tiny_archive(folder):
    """``tiny_arrays`` as ``tiny.npz`` in a folder: its path."""
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(folder / "tiny.npz", **dict(zip(keys, tiny_arrays())))
    return folder / "tiny.npz"


def change_protocols(monkeypatch, folder, names=None, **changes):
    """Replaces fields of all packaged protocols (or of ``names``), here and in the processes that a test starts."""
    import dataclasses

    import yaml

    from condense.judge import protocols

    monkeypatch.delenv("CONDENSE_PROTOCOLS", raising=False)
    folder.mkdir()
    for name, protocol in protocols().items():
        if names is None or name in names:
            content = {**dataclasses.asdict(protocol), **changes}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("CONDENSE_PROTOCOLS", str(folder))


@pytest.fixture
def untaught():
    """Checks at the end that no teacher was trained: what is wrong must be found before."""
    from condense.data import cache_dir

    yield
    assert not list(cache_dir().glob("teachers/*"))


@pytest.fixture
def three_steps(tmp_path_factory, monkeypatch):
    """Every protocol trains students for three steps of SGD on the labels of the set."""
    folder = tmp_path_factory.mktemp("protocols") / "three-steps"
    changes = {"steps": 3, "labels": "soft", "batch": 256, "lr": [0.01], "optimizer": "sgd", "schedule": "drops"}
    change_protocols(monkeypatch, folder, **changes)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``call(words)`` runs the command line in ``tmp_path``, where ``tiny.npz`` lies: exit code and what it printed."""
    tiny_archive(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda words: command_line(words, capsys)


@pytest.fixture
def tiny():
    """3 classes of 12 train and 6 test grey images of 8x8."""
    import condense

    return condense.task(tiny_arrays(), name="tiny")


@pytest.fixture
def tiny_colour():
    """As ``tiny`` with three channels."""
    import condense

    return condense.task(tiny_arrays(channels=3), name="tiny")


@pytest.fixture(autouse=True)
def quiet_torch():
    """One thread: tiny tensors gain nothing from more, and lose much on a busy machine. Tests draw the same numbers."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
