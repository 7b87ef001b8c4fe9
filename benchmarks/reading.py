"""Lines that a reader of a method reads: ``python -m condense.benchmarks.reading``.

They are the method's driver, the classes of its settings and the helpers in ``condense.methods`` that only methods of
its paper use. Helpers that methods of several papers use are shared steps, which a reader looks up once; they are
counted apart. If a driver calls the driver of another method, both are counted.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from condense.benchmarks.speed.measure import Parser, guarded
from condense.formatting import aligned
from condense.registry import METHODS

PACKAGE = "condense.methods"
LIMIT = 200
"""Maximum number of lines of a method."""


class Name(NamedTuple):
    """A definition at the top level of a module."""

    module: str
    name: str


@dataclass(frozen=True)
class Module:
    """What the source of a module defines and imports."""

    lines: dict[str, int]
    """Number of lines, without blank ones, of each definition with its decorators; constants with their docstring."""
    uses: dict[str, set[str]]
    """Names that each definition uses; ``alias.name`` for an attribute of an imported module."""
    imports: dict[str, tuple[str, str]]
    """Local name to (module, name) of what is imported from a module."""


@dataclass(frozen=True)
class Reading:
    """Numbers of lines of one method."""

    method: str
    driver: int
    settings: int
    helpers: int
    """Helpers that only methods of the same paper use."""
    shared: int
    """Helpers that methods of other papers use too."""

    @property
    def total(self) -> int:
        """Lines of the method without the shared steps."""
        return self.driver + self.settings + self.helpers


@functools.cache
def parse_module(name: str) -> Module:
    """Reads a module's source."""
    source = inspect.getsource(importlib.import_module(name))
    body, text = ast.parse(source).body, source.splitlines()
    lines: dict[str, int] = {}
    uses: dict[str, set[str]] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node, following in zip(body, [*body[1:], None]):
        if isinstance(node, ast.ImportFrom) and node.module:
            imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        for target in _defined_names(node):
            has_docstring = not isinstance(node, ast.FunctionDef | ast.ClassDef) and _is_text(following)
            end = following.end_lineno if has_docstring and following is not None else node.end_lineno
            start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            lines[target] = sum(bool(line.strip()) for line in text[start - 1 : end])
            uses[target] = set(_used_names(node))
    return Module(lines, uses, imports)


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _used_names(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name):
            yield f"{child.value.id}.{child.attr}"


def resolve(module: str, name: str) -> Name | None:
    """The definition in ``condense.methods`` that a name in a module stands for; None if it is defined elsewhere."""
    source = parse_module(module)
    first, _, attribute = name.partition(".")
    if not attribute and name in source.lines:
        return Name(module, name)
    if first not in source.imports:
        return None
    origin, original = source.imports[first]
    if attribute:
        origin, original = f"{origin}.{original}", attribute
        if not origin.startswith(PACKAGE) or original not in _lines_of(origin):
            return None
    return resolve(origin, original) if origin.startswith(PACKAGE) else None


def _lines_of(module: str) -> dict[str, int]:
    try:
        return parse_module(module).lines
    except (ImportError, TypeError):  # an attribute of a function or class, not of a module
        return {}


def reachable(start: Sequence[Name]) -> set[Name]:
    """Definitions that others use, directly or through others; those too."""
    reached: set[Name] = set()
    pending = list(start)
    while pending:
        definition = pending.pop()
        if definition not in reached:
            reached.add(definition)
            names = parse_module(definition.module).uses[definition.name]
            pending += [found for name in names if (found := resolve(definition.module, name))]
    return reached


def readings() -> list[Reading]:
    """One for each registered method whose source is in ``condense.methods``."""
    entries = [entry for entry in map(METHODS.get, METHODS.names()) if entry.function.__module__.startswith(PACKAGE)]
    drivers = {entry.name: _definition(entry.function) for entry in entries}
    settings = {
        entry.name: [_definition(c) for c in entry.config.__mro__ if c.__module__.startswith(PACKAGE)]
        for entry in entries
    }
    reached = {entry.name: reachable([drivers[entry.name], *settings[entry.name]]) for entry in entries}
    all_settings = {definition for classes in settings.values() for definition in classes}
    papers: dict[Name, set[str]] = {}
    for entry in entries:
        for definition in reached[entry.name]:
            papers.setdefault(definition, set()).add(entry.paper)
    rows = []
    for entry in entries:
        called = reached[entry.name] & set(drivers.values())
        helpers = reached[entry.name] - called - all_settings
        own = {definition for definition in helpers if len(papers[definition]) == 1}
        rows.append(
            Reading(
                entry.name, *(sum(map(_count, part)) for part in (called, settings[entry.name], own, helpers - own))
            )
        )
    return rows


def _definition(entry: Any) -> Name:
    return Name(entry.__module__, entry.__qualname__)


def _count(definition: Name) -> int:
    return parse_module(definition.module).lines[definition.name]


def table(rows: Sequence[Reading]) -> str:
    """The readings as a table, longest first."""
    head = ["method", "driver", "settings", "helpers", "total", "shared steps"]
    lines = [
        [row.method, *map(str, (row.driver, row.settings, row.helpers, row.total, row.shared))]
        for row in sorted(rows, key=lambda row: -row.total)
    ]
    return aligned([head, *lines])


def _main(arguments: Sequence[str]) -> int:
    Parser(prog="python -m condense.benchmarks.reading", description=(__doc__ or "").split("\n")[0]).parse_args(
        arguments
    )
    print(table(readings()))
    return 0


if __name__ == "__main__":
    guarded(_main, None)
