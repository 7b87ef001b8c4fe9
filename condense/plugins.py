"""Plug-ins: Python files or installed packages that register methods, data sets or networks when they are imported.

A file is executed only after its user named it, by ``--plugin`` or in ``CONDENSE_PLUGINS``. Its SHA-256 is then kept in
the cache, so that ``condense resume`` may import the plug-ins that a run directory names. A run directory that comes
from elsewhere cannot make the toolkit execute a file.
"""

from __future__ import annotations

import hashlib
import os
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from condense.config import PLUGINS
from condense.data import DATASETS, cache_dir
from condense.errors import CondenseError
from condense.networks import registered_networks, set_code_version
from condense.registry import METHODS, METHODS_GROUP, PLUGINS_GROUP, package_modules


@dataclass
class _Plugin:
    """An imported file or module."""

    version: str
    """SHA-256 of a file, or the version of a package."""
    names: set[str] = field(default_factory=set)
    """Methods, data sets and networks that it registered."""


_files: dict[str, _Plugin] = {}
"""By absolute path."""
_packages: dict[str, _Plugin] = {}
"""By name of the distribution."""


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
        digest = _import(file, file.read_bytes())
        marker = _marker(digest)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def load_packages() -> list[str]:
    """Imports the modules that installed packages offer in the group ``condense.plugins``.

    Returns:
        A message for each module that cannot be imported; the other commands and packages work without it.
    """
    faults = []
    for point in package_modules(PLUGINS_GROUP):
        name, version = (point.dist.name, point.dist.version) if point.dist else (point.module, "unknown")
        if name in _packages:
            continue
        before = _registered()
        try:
            point.load()
        except Exception as fault:
            reason = f"{type(fault).__name__}: {fault}"
            faults.append(f"the package {name} cannot be imported: {reason}; correct or uninstall it")
            continue
        _packages[name] = _Plugin(version)
        _note(_packages[name], before)
    return faults


def load_recorded_plugins(recorded: Mapping[str, str], where: str) -> None:
    """Imports the plug-ins of a run directory ``where``: SHA-256 by path.

    Raises:
        CondenseError: a file is missing or has changed, or its user never named it.
    """
    for path, digest in recorded.items():
        if any(plugin.version == digest for plugin in _files.values()):
            continue
        file = Path(path)
        content = file.read_bytes() if file.suffix == ".py" and file.is_file() else None
        if content is None:
            raise CondenseError(f"{where}: its plug-in {path} is not there; restore it, or give --plugin FILE.py")
        if hashlib.sha256(content).hexdigest() != digest:
            raise CondenseError(
                f"{where}: its plug-in {path} has changed since the run began; restore it, or give --plugin FILE.py"
            )
        if not _marker(digest).exists():
            raise CondenseError(f"{where}: uses a plug-in that was never given here; if you trust it: --plugin {path}")
        _import(file, content)


def plugin_files(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by path of the imported files that registered any of these methods, data sets or networks."""
    return _registering(_files, names)


def plugin_packages(names: Iterable[str]) -> dict[str, str]:
    """Version by name of the installed packages that registered any of these methods, data sets or networks."""
    used = set(names)
    methods = [point for point in package_modules(METHODS_GROUP) if point.name in used]
    of_methods = {point.dist.name: point.dist.version for point in methods if point.dist}
    return of_methods | _registering(_packages, used)


def plugin_versions(names: Iterable[str]) -> dict[str, str]:
    """For manifests and records: SHA-256 by file name, and version by package, of the plug-ins of these names."""
    used = set(names)
    files = {Path(path).name: digest for path, digest in plugin_files(used).items()}
    return files | plugin_packages(used)


def _registering(plugins: Mapping[str, _Plugin], names: Iterable[str]) -> dict[str, str]:
    used = set(names)
    return {name: plugin.version for name, plugin in plugins.items() if plugin.names & used}


def _marker(digest: str) -> Path:
    return cache_dir() / "plugins" / digest


def _registered() -> set[str]:
    return {*METHODS.names(), *DATASETS.names(), *registered_networks()}


def _note(plugin: _Plugin, before: set[str]) -> None:
    """Records what a plug-in has registered. Networks get its version, which is part of the keys of caches."""
    plugin.names = _registered() - before
    for name in plugin.names.intersection(registered_networks()):
        set_code_version(name, plugin.version)


def _import(file: Path, content: bytes) -> str:
    """Executes the content of a file as a module, unless this process has done so; returns its SHA-256.

    The content is compiled here: Python's import could execute a cached ``__pycache__`` file instead.
    """
    digest = hashlib.sha256(content).hexdigest()
    known = next((plugin for plugin in _files.values() if plugin.version == digest), None)
    if known is not None:
        _files[str(file)] = known
        return digest
    module = types.ModuleType(f"condense_plugin_{file.stem}_{digest[:12]}")
    module.__file__ = str(file)
    before = _registered()
    sys.modules[module.__name__] = module  # dataclasses and pickle look up the module of a class
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)
    except BaseException as fault:
        del sys.modules[module.__name__]
        if isinstance(fault, CondenseError) or not isinstance(fault, Exception):
            raise
        raise CondenseError(f"--plugin {file}: {type(fault).__name__}: {fault}") from fault
    _files[str(file)] = _Plugin(digest)
    _note(_files[str(file)], before)
    return digest
