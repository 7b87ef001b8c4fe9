"""Verbs that list and show what exists: `ls` and `show`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense.cli.parameters import AsJson
from condense.cli.request import parse_request
from condense.errors import CondenseError, did_you_mean
from condense.formatting import size

if TYPE_CHECKING:
    from condense.graphs import GraphSet
    from condense.sets import DistilledSet

LISTINGS = ("methods", "datasets", "networks", "recipes", "protocols", "suites", "sets")


def ls(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=", ".join(LISTINGS))] = None,
    as_json: AsJson = False,
) -> None:
    """Lists everything that has a name."""
    if kind is not None and kind not in LISTINGS:
        raise CondenseError(f"'{kind}' cannot be listed{did_you_mean(kind, LISTINGS)}")
    listings = {name: _list(name) for name in ([kind] if kind else LISTINGS)}
    if as_json:
        print(json.dumps(listings, indent=1))
        return
    for name, rows in listings.items():
        if kind is None:
            print(f"{name}:" if rows else f"{name}: none")
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            print(("  " if kind is None else "") + f"{row['name']:<{width}}  {row['about']}".rstrip())


def _list(kind: str) -> list[dict[str, Any]]:
    """Rows of a listing. Each kind imports only what it needs: recipes need no torch."""
    if kind == "methods":
        from condense.registry import METHODS

        return [
            {
                "name": entry.name,
                "about": f"{entry.summary} ({entry.year})",
                "paper": entry.paper,
                "labels": entry.labels,
                "order": entry.order,
            }
            for entry in map(METHODS.get, METHODS.names())
        ]
    if kind == "datasets":
        from condense.data import datasets

        return [{"name": name, "about": about} for name, about in datasets().items()]
    if kind == "networks":
        from condense.networks import CONVNET_GRAMMAR, network_names

        return [{"name": name, "about": ""} for name in (CONVNET_GRAMMAR, *network_names())]
    if kind == "protocols":
        from condense.graphs import GRAPH_PROTOCOLS
        from condense.judge import protocols

        rows: list[tuple[str, Any]] = [*protocols().items(), *GRAPH_PROTOCOLS.items()]
        return [{"name": name, "about": rules.summary, "version": rules.version} for name, rules in rows]
    if kind == "suites":
        from condense.benchmarks import suite

        return [{"name": entry.name, "about": entry.summary} for entry in suite.suites().values()]
    if kind == "sets":
        from condense import api
        from condense.sets import packaged_sets

        return [
            {"name": name, "about": _format_claim(api.load(name)), "path": str(path)}
            for name, path in packaged_sets().items()
        ]
    from condense import config

    return [{"name": name, "about": _format_recipe(config.load_recipe(name))} for name in config.recipe_names()]


def _format_claim(distilled: DistilledSet | GraphSet) -> str:
    """The size of a ready-made set and its measured accuracy."""
    if not hasattr(distilled, "stored"):
        return f"{len(distilled)} graphs, {size(distilled.nbytes()['total'])}"
    claim = distilled.manifest.get("claim")
    accuracy = f", {100 * claim['mean']:.1f} % on {claim['network']} under {claim['protocol']}" if claim else ""
    return f"{len(distilled.stored)} images, {size(distilled.nbytes()['total'])}{accuracy}"


def _format_recipe(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in recipe.items() if key != "method")


def show(
    name: Annotated[str, typer.Argument(metavar="METHOD|RECIPE|SET.h5", help="a method, a recipe or a set")],
    as_json: AsJson = False,
) -> None:
    """Shows a method, a recipe, or a set's manifest."""
    from condense import config
    from condense.registry import METHODS
    from condense.sets import packaged_sets

    if name in METHODS:
        _show_method(name, as_json)
    elif name in config.recipe_names() or name.endswith((".yaml", ".yml")):
        _show_recipe(name, as_json)
    elif name in packaged_sets() or name.endswith(".h5") or Path(name).exists():
        from condense import api

        manifest = api.load(name).manifest
        if as_json:
            print(json.dumps(manifest, indent=1))
        else:
            _print_keys({key: value for key, value in manifest.items() if key != "checksums"})
    else:
        known = [*METHODS.names(), *config.recipe_names(), *packaged_sets()]
        raise CondenseError(f"'{name}' is no method, recipe or .h5 file{did_you_mean(name, known)}")


def _show_recipe(name: str, as_json: bool) -> None:
    from condense import config
    from condense.benchmarks import facts

    recipe = config.load_recipe(name)
    parse_request(None, None, None, None, None, name)  # reports the same mistakes as `distill`
    cell = recipe["method"], recipe["data"], int(recipe["ipc"])
    published, measured = facts.published(*cell), facts.measured(*cell)
    if as_json:
        print(json.dumps({"recipe": recipe, "published": published, "measured": measured}, indent=1))
        return
    _print_keys(recipe)
    for title, lines in (
        ("published", [facts.published_line(row) for row in published]),
        ("measured here", [facts.measured_line(entry) for entry in measured]),
    ):
        print(f"{title}:" + ("" if lines else " none"))
        for line in lines:
            print(f"  {line}")
    print(f"run it: condense distill --recipe {shlex.quote(name)}")


def _print_keys(content: dict[str, Any]) -> None:
    for key, value in content.items():
        print(f"{key}: {_plain(value)}")


def _plain(value: Any) -> str:
    """JSON-like content in one readable line: ``key=value`` pairs and lists without quotes and braces."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key}=({_plain(v)})" if isinstance(v, dict) else f"{key}={_plain(v)}" for key, v in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _show_method(name: str, as_json: bool) -> None:
    import inspect

    from condense import config
    from condense.data import DataOptions
    from condense.graphs import GraphOptions
    from condense.registry import METHODS

    entry = METHODS.get(name)
    of_data = GraphOptions if entry.task == "graphs" else DataOptions
    settings = config.describe(entry.config)
    if as_json:
        facts = {key: value for key, value in vars(entry).items() if key not in ("function", "config")}
        keys = ("name", "type", "default", "meaning")
        print(json.dumps({**facts, "settings": [dict(zip(keys, row)) for row in settings]}, indent=1))
        return
    network = f"; network: {entry.network}" if entry.network else ""
    defaults = f"labels: {entry.labels}{network}; protocol: {entry.protocol}"
    print(f"{entry.name}: {entry.paper} ({entry.year}); {defaults}\n")
    print(inspect.cleandoc(entry.function.__doc__ or ""))
    for title, rows in (("settings", settings), ("settings of the data", config.describe(of_data))):
        if rows:
            print(f"\n{title}:")
        for key, _, default, meaning in rows:
            print(f"  {key}={default}\n      {meaning}")
