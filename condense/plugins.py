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
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from condense.config import PLUGINS, method_folders, method_paths
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
_entry_points: set[EntryPoint] = set()
"""Those of ``condense.plugins`` that were imported."""


def load_plugins(paths: Sequence[str | Path]) -> None:
    """Imports the files, and those of ``CONDENSE_PLUGINS``.

    Raises:
        CondenseError: no such file, or it cannot be imported.
    """
    named = [path for path in os.environ.get(PLUGINS, "").split(os.pathsep) if path]
    for path in [*named, *paths]:
        file = Path(path).resolve()
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
        if point in _entry_points:
            continue
        name, version = (point.dist.name, point.dist.version) if point.dist else (point.module, "unknown")
        before = _registered()
        try:
            point.load()
        except Exception as fault:
            reason = f"{type(fault).__name__}: {fault}"
            faults.append(f"the package {name} cannot be imported: {reason}; correct or uninstall it")
            continue
        _entry_points.add(point)
        _note(_packages.setdefault(name, _Plugin(version)), before)
    return faults


def load_recorded_plugins(recorded: Mapping[str, str], where: str) -> None:
    """Imports the plug-ins of a run directory ``where``: SHA-256 by path.

    Raises:
        CondenseError: a file is missing or has changed, or its user never named it.
    """
    for path, digest in recorded.items():
        if _is_imported(digest):
            continue
        file = Path(path)
        content = file.read_bytes() if file.suffix == ".py" and file.is_file() else None
        if content is None:
            raise CondenseError(f"{where}: its plug-in {path} is not there; restore it, or give its copy by --plugin")
        if hashlib.sha256(content).hexdigest() != digest:
            raise CondenseError(
                f"{where}: its plug-in {path} has changed since the run began; give the earlier version by --plugin"
            )
        if _is_in_method_folder(path):
            continue
        if not _marker(digest).exists():
            raise CondenseError(f"{where}: uses a plug-in that was never given here; if you trust it: --plugin {path}")
        _import(file, content)


def plugin_files(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by path of the files that registered any of these methods, data sets or networks.

    They were named by the user, or lie in a folder of ``CONDENSE_METHODS``.
    """
    used = set(names)
    return _registering(_files, used) | _method_modules(used)


def named_files(paths: Iterable[str]) -> list[str]:
    """Those files that ``--plugin`` names: not those in folders of ``CONDENSE_METHODS``."""
    return [path for path in paths if not _is_in_method_folder(path)]


def _method_modules(names: Iterable[str]) -> dict[str, str]:
    own = [METHODS.get(name).function.__module__ for name in names if name in METHODS]
    files = [str(getattr(sys.modules.get(module), "__file__", None) or "") for module in own]
    inside = [file for file in files if file and _is_in_method_folder(file)]
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in inside}


def _is_in_method_folder(path: str) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in method_folders())


def _plugin_packages(used: set[str]) -> dict[str, str]:
    """Version by name of the installed packages that registered any of these methods, data sets or networks."""
    others = used - set(method_paths())
    methods = [point for point in package_modules(METHODS_GROUP) if point.name in others]
    of_methods = {point.dist.name: point.dist.version for point in methods if point.dist}
    return of_methods | _registering(_packages, used)


def plugin_versions(names: Iterable[str]) -> dict[str, str]:
    """For manifests and records: SHA-256 by file name, and version by package, of the plug-ins of these names."""
    used = set(names)
    versions = _plugin_packages(used)
    for path, digest in plugin_files(used).items():
        file = Path(path)
        versions[f"{file.parent.name}/{file.name}" if file.name in versions else file.name] = digest
    return versions


def missing_plugins(manifest: Mapping[str, Any]) -> str:
    """The end of a message about a name that may be one of the plug-ins of a set; empty if it has none."""
    made = manifest.get("plugins")
    names = sorted(map(str, made)) if isinstance(made, dict) else []
    files = [name for name in names if name.endswith(".py")]
    packages = [name for name in names if not name.endswith(".py")]
    words = [f"name it by --plugin: {', '.join(files)}"] * bool(files)
    words += [f"install {', '.join(packages)}"] * bool(packages)
    return f"; the set was made with a plug-in: {' and '.join(words)}" if words else ""


def _registering(plugins: Mapping[str, _Plugin], names: Iterable[str]) -> dict[str, str]:
    used = {name.rpartition("=")[2] for name in names if name}  # data may be NAME=REGISTERED
    return {name: plugin.version for name, plugin in plugins.items() if plugin.names & used}


def _marker(digest: str) -> Path:
    return cache_dir() / "plugins" / digest


def _registered() -> set[str]:
    return {*METHODS.names(), *DATASETS.names(), *registered_networks()}


def _note(plugin: _Plugin, before: set[str]) -> None:
    """Records what a plug-in has registered. Networks get its version, which is part of the keys of caches."""
    new = _registered() - before
    plugin.names |= new
    for name in new.intersection(registered_networks()):
        set_code_version(name, plugin.version)


def _is_imported(digest: str) -> bool:
    return any(plugin.version == digest for plugin in _files.values())


def _import(file: Path, content: bytes) -> str:
    """Executes the content of a file as a module, unless this process has done so; returns its SHA-256.

    The content is compiled here: Python's import could execute a cached ``__pycache__`` file instead.
    """
    digest = hashlib.sha256(content).hexdigest()
    if _is_imported(digest):
        return digest
    module = types.ModuleType(f"condense_plugin_{file.stem}_{digest[:12]}")
    module.__file__ = str(file)
    before = _registered()
    sys.modules[module.__name__] = module  # dataclasses and pickle look up the module of a class
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)
    except BaseException as fault:
        del sys.modules[module.__name__]
        if not isinstance(fault, Exception):
            raise
        kind = "" if isinstance(fault, CondenseError) else f"{type(fault).__name__}: "
        raise CondenseError(f"--plugin {file}: {kind}{fault}") from fault
    _files[str(file)] = _Plugin(digest)
    _note(_files[str(file)], before)
    return digest
