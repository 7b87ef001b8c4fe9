"""The command line: one function per verb. Torch is imported inside the verbs, so that help stays fast.

A mistake ends in one line on stderr that begins with ``condense:``. The exit codes are in :data:`EXIT_CODES`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import traceback
from typing import Annotated

import typer

from condense.cli import files, judge, labels, listing, make, pretrain
from condense.cli.parameters import EXIT_CODES, app
from condense.errors import CondenseError
from condense.version import __version__

COMMANDS = {
    "ls": listing.ls,
    "show": listing.show,
    "distill": make.distill,
    "resume": make.resume,
    "plan": make.plan,
    "experts": pretrain.experts,
    "teachers": pretrain.teachers,
    "evaluate": judge.evaluate,
    "suite": judge.suite,
    "leaderboard": judge.leaderboard,
    "lighten": labels.lighten,
    "labels": labels.labels_,
    "verify": files.verify,
    "preview": files.preview,
    "import": files.import_,
    "export": files.export,
}
"""Every verb, in the order of the help."""

for _name, _function in COMMANDS.items():
    app.command(_name, epilog=EXIT_CODES)(_function)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"condense {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of a mistake too")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options before the verb."""


def _keep_freed_memory() -> None:
    """Lets glibc keep large freed blocks for the next step instead of giving them back and getting them zeroed anew.

    On a 2-core CPU steps on 256 images of a width-32 ConvNet took 7-33 % less time, with a fifth of the page faults and
    the same peak memory.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the end of the heap stays


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with the documented code."""
    _keep_freed_memory()
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # accepted anywhere
    code = 0
    try:
        command = typer.main.get_command(app)
        with command.make_context("condense", words) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        code = done.exit_code
    except BrokenPipeError:  # `condense ls | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as fault:
        if debug:
            traceback.print_exc()
        code, line = _verdict(fault)
        print(f"condense: {' '.join(line.splitlines())}", file=sys.stderr)
    sys.exit(code)


def _verdict(fault: BaseException) -> tuple[int, str]:
    """The exit code of what ended the program, and what to say of it."""
    if isinstance(fault, CondenseError):
        return 2, str(fault)
    if isinstance(fault, (KeyboardInterrupt, typer.Abort)):
        return 130, str(fault) or "interrupted"
    if hasattr(
        fault, "format_message"
    ):  # words that typer cannot parse; the class of these errors moves between versions
        context = getattr(fault, "ctx", None)
        return 2, f"{fault.format_message().rstrip('.')} (see {context.command_path if context else 'condense'} --help)"
    return 1, f"a fault of ours: {type(fault).__name__}: {fault}; --debug shows where"
