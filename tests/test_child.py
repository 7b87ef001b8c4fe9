"""A child process that hangs or crashes is replaced, and says which of the two it was."""

import contextlib
import os
import time

import pytest

from condense.benchmarks.child import HANG_OR_CRASH, ChildProcess


def serve(connection, greeting):
    while (request := connection.recv()) is not None:
        if request == "crash":
            os._exit(1)
        if request == "hang":
            time.sleep(600)
        connection.send((greeting, f"{request} {os.getpid()}"))


def test_a_process_is_replaced_after_a_hang_or_a_crash():
    with contextlib.closing(ChildProcess(serve, "hello", seconds=2, daemon=True)) as child:
        first = child.ask("a")
        assert first[0] == "hello" and first[1].startswith("a ")
        assert child.ask("a") == first  # by the same process
        assert child.ask("hang") == (HANG_OR_CRASH, "no answer within 2 s")
        second = child.ask("a")
        assert second[0] == "hello" and second != first
        assert child.ask("crash") == (HANG_OR_CRASH, "the process crashed")
        assert child.ask("a") not in (first, second)


def test_a_closed_process_has_ended():
    child = ChildProcess(serve, "hello", seconds=2, daemon=False)
    pid = int(child.ask("a")[1].split()[1])
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
