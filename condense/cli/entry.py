"""The entry point: registers the verbs, runs one, and turns errors into one line and an exit code.

An error is one line on stderr that begins with ``condense:``. The exit codes are in :data:`EXIT_CODES`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from condense.cli import advise, downstream, files, judge, labels, listing, make, plan, pretrain
from condense.cli.parameters import EXIT_CODES, app
from condense.cli.streams import printable_streams
from condense.config import PLUGINS
from condense.environment import foreign_distribution, keep_freed_memory
from condense.errors import CondenseError, is_out_of_memory
from condense.formatting import shorten, size
from condense.registry import PLUGINS_GROUP, package_modules
from condense.version import __version__

COMMANDS: dict[str, Callable[..., Any]] = {
    "ls": listing.ls,
    "show": listing.show,
    "advise": advise.advise,
    "distill": make.distill,
    "resume": make.resume,
    "plan": plan.plan,
    "experts": pretrain.experts,
    "teachers": pretrain.teachers,
    "scores": pretrain.scores,
    "evaluate": judge.evaluate,
    "downstream": downstream.downstream,
    "suite": judge.suite,
    "leaderboard": judge.leaderboard,
    "lighten": labels.lighten,
    "labels": labels.labels_,
    "verify": files.verify,
    "preview": files.preview,
    "join": files.join,
    "import": files.import_,
    "export": files.export,
}
"""Every verb, in the order of the help."""

for _name, _function in COMMANDS.items():
    app.command(_name, epilog=EXIT_CODES)(_function)


def _version(requested: bool) -> None:
    if requested:
        print(f"condense {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="also show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE.py", help="import a file with your own methods, data or networks"),
    ] = None,
) -> None:
    """Options before the verb."""
    if package_modules(PLUGINS_GROUP):
        from condense.plugins import load_packages

        for fault in load_packages():
            print(f"condense: {fault}", file=sys.stderr)
    if plugin or os.environ.get(PLUGINS):
        from condense.plugins import load_plugins

        load_plugins(plugin or ())


ADDRESS_SPACE = 3900 * 10**6
"""Bytes of address space for PyTorch's libraries and a small run (measured: 3.3 GB after the import)."""


def _check_address_space() -> None:
    """Checks the limit of ``ulimit -v``; below it, PyTorch's libraries abort the process while they are loaded.

    Raises:
        CondenseError: the limit is too low.
    """
    with contextlib.suppress(ImportError):  # no `resource` on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE:
            raise CondenseError(
                f"not enough memory: ulimit -v allows {size(limit)} of address space, PyTorch needs about "
                f"{size(ADDRESS_SPACE)}; raise the limit (ulimit -v {ADDRESS_SPACE // 1024})"
            )


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with the documented code."""
    keep_freed_memory()
    if warning := foreign_distribution():
        print(warning, file=sys.stderr)
    with printable_streams():
        code = _run(arguments)
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments
    arguments = _plugins_first([argument for argument in arguments if argument != "--debug"])  # accepted anywhere
    code = 0
    try:
        command = typer.main.get_command(app)
        with command.make_context("condense", arguments) as context:
            _check_address_space()
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        code = end.exit_code
    except BrokenPipeError:  # the reader has closed the pipe, as in `condense ls | head`
        pass
    except (Exception, KeyboardInterrupt) as fault:
        if debug:
            traceback.print_exc()
        code, line = _exit_code_and_message(fault)
        with contextlib.suppress(OSError):  # stderr may be closed or full too
            print(f"condense: {shorten(' '.join(line.split()))}", file=sys.stderr)
    return code


def _plugins_first(arguments: list[str]) -> list[str]:
    """``--plugin FILE.py`` is accepted after the verb too."""
    plugins: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--plugin":
            plugins += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            (plugins if word.startswith("--plugin=") else rest).append(word)
    return plugins + rest


def _exit_code_and_message(fault: BaseException) -> tuple[int, str]:
    if isinstance(fault, CondenseError):
        return 2, str(fault)
    if is_out_of_memory(fault):
        line = next(iter(str(fault).splitlines()), "") or type(fault).__name__
        return 2, (
            f"not enough memory ({line[:200]}): give fewer or smaller images (resize=), a lower --ipc, a smaller batch "
            "(batch_real=) or a smaller network, or free memory"
        )
    if isinstance(fault, OSError):  # a path that is too long, a disk that is full, ...
        return 2, f"{fault.filename or 'input or output'}: {fault.strerror or fault}"
    if isinstance(fault, (KeyboardInterrupt, typer.Abort)):
        return 130, str(fault) or "interrupted"
    if hasattr(fault, "format_message"):  # a usage error of typer, whose class differs between its versions
        context = getattr(fault, "ctx", None)
        return 2, f"{fault.format_message().rstrip('.')} (see {context.command_path if context else 'condense'} --help)"
    return 1, f"internal error: {type(fault).__name__}: {fault}; --debug shows where"
