"""Too little memory is one line that names the setting, where possible before any work."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from condense.data import DataOptions, load_task
from condense.device import check_host_memory, free_host_memory
from condense.errors import CondenseError, is_out_of_memory


def test_errors_that_say_that_memory_ran_out():
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(10**18, np.uint8)
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(10**16, dtype=torch.uint8)
    for error in (
        numpy_error.value,
        torch_error.value,
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
    ):
        assert is_out_of_memory(error), error
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")):
        assert not is_out_of_memory(error), error


def test_memory_is_checked_before_an_allocation():
    check_host_memory(1000, "images", "give fewer")
    with pytest.raises(CondenseError, match=r"^images need about 1000\.0 TB of memory, .* are free; give fewer$"):
        check_host_memory(10**15, "images", "give fewer")


def test_zca_of_large_images_says_so_before_it_starts():
    images, labels = np.zeros((8, 3, 224, 224), np.uint8), np.arange(8) % 2
    with pytest.raises(
        CondenseError, match=r"zca=true: .* of 3x224x224 images need about 1\.5 TB of memory.*leave zca"
    ):
        load_task((images, labels), DataOptions(zca=True))
    assert load_task((images, labels)).shape == (3, 224, 224)


def limited(code: str, size: int) -> subprocess.CompletedProcess[str]:
    """Runs code in a process whose address space is limited to ``size`` bytes."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({size}, {size}))\n"
    return subprocess.run([sys.executable, "-c", limit + code], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_a_limit_of_the_address_space_is_named_before_pytorch_aborts(tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r}); from condense.cli import main; main(%r)"
    distill = ["distill", "random", "--data", "digits", "--ipc", "1", "--network", "mlp"]
    result = limited(code % distill, 2 * 10**9)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "not enough memory: ulimit -v allows 2.0 GB" in result.stderr
    assert limited(code % ["--version"], 2 * 10**9).returncode == 0  # needs no PyTorch


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_free_memory_is_within_the_limit_of_the_address_space():
    code = """
import torch
from pathlib import Path
from condense.device import free_host_memory
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
assert 0 < free_host_memory() <= 2**28, free_host_memory()
"""
    result = subprocess.run([sys.executable, "-c", "import resource" + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert free_host_memory() > 2**28


def test_running_out_of_memory_is_one_line(call, monkeypatch):
    import condense.api

    def fail(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes\n\ntrace"
        )

    monkeypatch.setattr(condense.api, "task", fail)
    result = call("distill random --data tiny.npz --ipc 1 --network mlp")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "not enough memory" in result.err and "resize=" in result.err and "--ipc" in result.err
