"""One generic registry. Names are strings until first use, so that listing and help never import torch or a method."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from condense import config
from condense.errors import CondenseError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to entries of one kind.

    ``lazy`` maps a name to the module that registers it when imported; ``listing`` is the command that lists the names,
    of a kind that plug-ins can add to.
    """

    def __init__(self, kind: str, lazy: Mapping[str, str] | None = None, listing: str = "") -> None:
        self.kind, self.listing = kind, listing
        self._lazy: Mapping[str, str] = lazy or {}
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Registers ``entry``.

        Raises:
            CondenseError: another one has its name, unless it is the same code run again.
        """
        known = self._entries.get(name)
        is_other = known is not None and _origin(known) != _origin(entry)
        # A lazy name belongs to its module, which is being imported when it registers the name.
        if is_other or (known is None and name in self._lazy and self._lazy[name] not in sys.modules):
            raise CondenseError(f"{self.kind} '{name}': there is one with this name already; choose another name")
        self._entries[name] = entry
        return entry

    def names(self) -> list[str]:
        """Every known name, in the order in which they were listed."""
        return list(dict.fromkeys([*self._lazy, *self._entries]))

    def __contains__(self, name: str) -> bool:
        return name in self._lazy or name in self._entries

    def get(self, name: str) -> T:
        """The entry, importing its module on first use.

        Raises:
            CondenseError: the name is unknown, with the nearest one, or its module does not register it.
        """
        if name not in self._entries and name in self._lazy:
            module = self._lazy[name]
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as fault:
                what = f"there is no module {module}" if fault.name == module else f"{module} needs {fault.name}"
                raise CondenseError(f"{self.kind} '{name}': {what}") from fault
            except CondenseError:
                raise
            except Exception as fault:
                reason = f"{type(fault).__name__}: {fault}"
                raise CondenseError(f"{self.kind} '{name}': {module} cannot be imported: {reason}") from fault
            if name not in self._entries:
                raise CondenseError(f"{self.kind} '{name}': the module {module} does not register it")
        if name not in self._entries:
            meant = did_you_mean(name, self.names(), self.listing)
            own = "; --plugin FILE.py adds your own" if self.listing and not meant.endswith("?") else ""
            raise CondenseError(f"unknown {self.kind} '{name}'{meant}{own}")
        return self._entries[name]


def _origin(entry: Any) -> tuple[str, str] | int:
    """Where an entry's code lives, so that a notebook cell may be run twice."""
    code = getattr(entry, "function", entry)
    return (code.__module__, code.__qualname__) if hasattr(code, "__qualname__") else id(entry)


@dataclass(frozen=True)
class Method:
    """What the toolkit knows of a method besides its code; tables, help and generic tests are made from this."""

    name: str
    function: Callable[..., Any]
    """``function(task, config, run) -> SyntheticSet``: the visible outer loop."""
    config: type
    """Frozen dataclass of hyper-parameters with the paper's defaults."""
    paper: str
    year: int
    labels: str
    """Label kind of the sets it makes: hard, soft, per-view, ..."""
    order: int
    """Highest derivative taken through the network: 0 selection, 1 first order, 2 double backward."""
    protocol: str
    """Evaluation protocol that the method's published numbers use."""
    network: str
    """Default network, e.g. ``convnet-d3-w128-in``."""
    pretrains: str | None = None
    """Networks that it trains on the real data first: experts, teachers, snapshots or scores; None: none."""
    task: str = "images"
    """Kind of the data that it distils: images or graphs."""
    ipc: int | None = None
    """Stored examples per class if none are asked for; None: they must be."""

    @property
    def summary(self) -> str:
        """The first paragraph of the driver's docstring, on one line."""
        return " ".join((self.function.__doc__ or "").strip().split("\n\n")[0].split())


METHODS_GROUP = "condense.methods"
"""Entry points of installed packages: the name of a method, and the module that registers it."""
PLUGINS_GROUP = "condense.plugins"
"""Entry points of installed packages: modules that every command imports, because they register networks or data."""


@functools.cache
def package_modules(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    """What installed packages offer in a group of entry points. Nothing is imported."""
    return tuple(importlib.metadata.entry_points(group=group))


def _entry_points() -> dict[str, str]:
    return {point.name: point.module for point in package_modules(METHODS_GROUP)}


class _MethodModules(Mapping[str, str]):
    """The module of each method that has a YAML file or an entry point. Listing the names reads no file."""

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*config.method_paths(), *_entry_points()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in config.method_paths() or name in _entry_points()

    def __getitem__(self, name: str) -> str:
        if name not in config.method_paths():
            return _entry_points()[name]
        for folder in map(str, config.method_folders()):
            if folder not in sys.path:
                sys.path.append(folder)  # last, so that a file there cannot shadow another module
        return config.method_file(name).module


METHODS: Registry[Method] = Registry("method", _MethodModules(), listing="condense ls methods")


def method(
    name: str,
    *,
    config: type,
    paper: str,
    year: int,
    labels: str = "hard",
    order: int = 1,
    protocol: str = "dc-v1",
    network: str = "convnet-d3-w128-in",
    pretrains: str | None = None,
    task: str = "images",
    ipc: int | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers ``function(task, config, run) -> SyntheticSet`` as a method; see :class:`Method` for the fields."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        facts = (paper, year, labels, order, protocol, network, pretrains, task, ipc)
        METHODS.add(name, Method(name, function, config, *facts))
        return function

    return register
