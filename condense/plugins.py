"""Plug-ins: Python files that register methods, data sets or networks when they are imported.

A file is executed only after its user named it, by ``--plugin`` or in ``CONDENSE_PLUGINS``. Its SHA-256 is then kept in
the cache, so that ``condense resume`` may import the plug-ins that a run directory names. A run directory that comes
from elsewhere cannot make the toolkit execute a file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from condense.config import PLUGINS
from condense.data import cache_dir
from condense.errors import CondenseError

_loaded: dict[str, str] = {}
"""Absolute path of each imported plug-in, with its SHA-256."""


def load_plugins(paths: Sequence[str | Path]) -> None:
    """Imports the files, and those of ``CONDENSE_PLUGINS``.

    Raises:
        CondenseError: no such file, or it cannot be imported.
    """
    named = [path for path in os.environ.get(PLUGINS, "").split(os.pathsep) if path]
    for path in [*named, *paths]:
        file = Path(path).absolute()
        if file.suffix != ".py" or not file.is_file():
            raise CondenseError(f"--plugin {path}: must be an existing .py file")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        _import(file, digest)
        marker = _marker(digest)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def load_recorded_plugins(recorded: Mapping[str, str], where: str) -> None:
    """Imports the plug-ins of a run directory ``where``: SHA-256 by path.

    Raises:
        CondenseError: a file is missing or has changed, or its user never named it.
    """
    for path, digest in recorded.items():
        file = Path(path)
        if _loaded.get(path) == digest:
            continue
        content = file.read_bytes() if file.suffix == ".py" and file.is_file() else None
        if content is None:
            raise CondenseError(f"{where}: its plug-in {path} is not there; restore it")
        if hashlib.sha256(content).hexdigest() != digest:
            raise CondenseError(f"{where}: its plug-in {path} has changed since the run began; restore it")
        if not _marker(digest).exists():
            raise CondenseError(f"{where}: uses a plug-in that was never given here; if you trust it: --plugin {path}")
        _import(file, digest)


def loaded_plugins() -> dict[str, str]:
    """SHA-256 by absolute path of the plug-ins that this process has imported."""
    return dict(_loaded)


def _marker(digest: str) -> Path:
    return cache_dir() / "plugins" / digest


def _import(file: Path, digest: str) -> None:
    if _loaded.get(str(file)) == digest:
        return
    name = f"condense_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module of a class
    try:
        spec.loader.exec_module(module)
    except CondenseError:
        raise
    except Exception as fault:
        raise CondenseError(f"--plugin {file}: {type(fault).__name__}: {fault}") from fault
    _loaded[str(file)] = digest
