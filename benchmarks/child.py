"""A child process that answers requests within a time limit, for code that may hang or crash."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from typing import Any

HANG_OR_CRASH = "hang or crash"
"""Outcome of a request that is not answered within the time limit, or whose process ends."""


class ChildProcess:
    """A child process that answers requests one by one; it is replaced after a hang or a crash.

    Args:
        serve: function of a module, called as ``serve(connection, *arguments)`` in the child process. It receives
            requests from the connection until one is None, and sends an (outcome, text) for each.
        arguments: further arguments of ``serve``, which can be pickled.
        seconds: time limit for one request. The first one after a start has ten times as much, because it includes the
            imports.
        daemon: whether the process ends with its parent. A daemonic process cannot have child processes of its own.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any, seconds: float, daemon: bool) -> None:
        self._serve, self._arguments, self._seconds, self._daemon = serve, arguments, seconds, daemon
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=self._serve, args=(other, *self._arguments), daemon=self._daemon)
        self._process.start()
        other.close()
        self._limit = 10 * self._seconds

    def ask(self, request: Any) -> tuple[str, str]:
        """Outcome and text of a request: what ``serve`` sends, or ``HANG_OR_CRASH`` and which of the two it was."""
        try:
            self._connection.send(request)
            if self._connection.poll(self._limit):
                self._limit = self._seconds
                answer: tuple[str, str] = self._connection.recv()
                return answer
            reason = f"no answer within {self._limit:g} s"
        except (EOFError, OSError):
            reason = "the process crashed"
        self.close()
        self._start()
        return HANG_OR_CRASH, reason

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(1)
        self._process.kill()
        self._process.join()
        self._connection.close()
