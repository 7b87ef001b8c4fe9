"""One generic registry. Names are strings until first use, so that listing and help never import torch or a method."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from condense.errors import CondenseError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to entries of one kind. ``lazy`` maps a name to the module that registers it when imported."""

    def __init__(self, kind: str, lazy: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._lazy = dict(lazy or {})
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Registers ``entry``. A second one under its name is an error, unless it is the same code run again."""
        known = self._entries.get(name)
        if known is not None and _origin(known) != _origin(entry):
            raise ValueError(f"{self.kind} '{name}' is registered twice")
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
            CondenseError: the name is unknown; the message suggests the nearest one.
        """
        if name not in self._entries and name in self._lazy:
            importlib.import_module(self._lazy[name])
        if name not in self._entries:
            raise CondenseError(f"unknown {self.kind} '{name}'{did_you_mean(name, self.names())}")
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

    @property
    def summary(self) -> str:
        """First line of the driver's docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


METHODS: Registry[Method] = Registry(
    "method",
    {
        "random": "condense.methods.selection",
        "dm": "condense.methods.distribution_matching",
        "dc": "condense.methods.gradient_matching",
        "dsa": "condense.methods.gradient_matching",
        "dcc": "condense.methods.gradient_matching",
        "dsac": "condense.methods.gradient_matching",
        "idc": "condense.methods.gradient_matching",
        "datadam": "condense.methods.attention_matching",
        "idm": "condense.methods.distribution_matching",
        "dance": "condense.methods.distribution_matching",
        "mtt": "condense.methods.trajectory_matching.mtt",
        "tesla": "condense.methods.trajectory_matching.tesla",
        "ftd": "condense.methods.trajectory_matching.ftd",
        "ast": "condense.methods.trajectory_matching.ast",
        "datm": "condense.methods.trajectory_matching.datm",
        "sre2l": "condense.methods.curriculum_synthesis.sre2l",
        "cda": "condense.methods.curriculum_synthesis.sre2l",
        "dwa": "condense.methods.curriculum_synthesis.dwa",
        "cvdd": "condense.methods.curriculum_synthesis.cvdd",
        "infer": "condense.methods.curriculum_synthesis.infer",
        "nrr": "condense.methods.curriculum_synthesis.nrr",
        "rded": "condense.methods.curriculum_synthesis.rded",
        "lpld": "condense.methods.label_lightening.lpld",
        "lpqld": "condense.methods.label_lightening.lpld",
        "hello": "condense.methods.label_lightening.hello",
    },
)


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
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers ``function(task, config, run) -> SyntheticSet`` as a method; see :class:`Method` for the fields."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        METHODS.add(name, Method(name, function, config, paper, year, labels, order, protocol, network))
        return function

    return register
