"""condense: make, evaluate and use distilled datasets.

Public names are loaded on first use, so ``import condense`` imports neither torch nor any method.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from condense.errors import CondenseError
from condense.version import __version__

# In a checkout, `methods/` and `benchmarks/` are next to this folder; in an installation, inside it. These lines make
# `condense.methods` importable if nothing is installed, and if a checkout shadows the installation.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "methods")) and os.path.isfile(
    os.path.join(_checkout, "methods", "__init__.py")
):
    __path__.append(_checkout)

if TYPE_CHECKING:
    from condense.api import distill, evaluate, load, resume, task
    from condense.environment import keep_freed_memory
    from condense.judge import downstream, fit
    from condense.sets import DistilledSet, join, relabel

_PUBLIC = {
    "task": "condense.api",
    "distill": "condense.api",
    "downstream": "condense.judge",
    "evaluate": "condense.api",
    "load": "condense.api",
    "fit": "condense.judge",
    "relabel": "condense.sets",
    "resume": "condense.api",
    "join": "condense.sets",
    "keep_freed_memory": "condense.environment",
    "DistilledSet": "condense.sets",
}

__all__ = [
    "CondenseError",
    "DistilledSet",
    "__version__",
    "distill",
    "downstream",
    "evaluate",
    "fit",
    "join",
    "keep_freed_memory",
    "load",
    "relabel",
    "resume",
    "task",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'condense' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
