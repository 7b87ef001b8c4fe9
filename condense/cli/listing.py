"""Verbs that list and show what exists: `ls` and `show`."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense.cli.parameters import AsJson, evaluate_command
from condense.cli.request import parse_request
from condense.errors import CondenseError, did_you_mean
from condense.formatting import aligned, by, duration, machine, percent, shorten, size

if TYPE_CHECKING:
    from condense.graphs import GraphSet
    from condense.sets import DistilledSet

HASH = re.compile(r"\b[0-9a-f]{64}\b")
NETWORK_SHAPE, NETWORK_CLASSES = (3, 32, 32), 10
"""Images and classes for which `show NETWORK` counts parameters."""

LISTINGS = ("methods", "datasets", "networks", "recipes", "protocols", "suites", "sets")


def ls(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=", ".join(LISTINGS))] = None,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]", help="only names with these parts, e.g. dm cifar10")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="the settings of recipes")] = False,
    as_json: AsJson = False,
) -> None:
    """Lists what has a name. Without KIND, it counts what there is of each kind."""
    if kind is not None and kind not in LISTINGS:
        raise CondenseError(f"'{kind}' cannot be listed{did_you_mean(kind, LISTINGS)}")
    listings = {name: _matching(_list(name), words or ()) for name in ([kind] if kind else LISTINGS)}
    if as_json:
        print(json.dumps(listings, indent=1))
    elif kind is None:
        print(aligned([(str(len(rows)), name, f"condense ls {name}") for name, rows in listings.items()]))
        print("\nexplain one: condense show NAME")
    elif words and not listings[kind]:
        raise CondenseError(f"{' '.join(words)}: no {kind} with this in the name; `condense ls {kind}` lists all")
    else:
        rows = [(row["name"], row["about"]) for row in listings[kind]]
        print(aligned(rows) if rows else f"no {kind}")
        if verbose and kind == "recipes":
            print()
            for name, _ in rows:
                print(f"{name}: {_format_recipe(name)}")
        if kind == "recipes":
            print("\ntime and memory on this machine: condense plan --recipe NAME")


def _matching(rows: list[dict[str, Any]], words: Sequence[str]) -> list[dict[str, Any]]:
    """The rows whose name has all words; a word that is one of its parts between slashes must be that part."""
    parts = {part for row in rows for part in row["name"].split("/")}

    def has(name: str, word: str) -> bool:
        return word in name.split("/") if word in parts else word in name

    return [row for row in rows if all(has(row["name"], word) for word in words)]


def _list(kind: str) -> list[dict[str, Any]]:
    """Rows of a listing. Each kind imports only what it needs: recipes need no torch."""
    if kind == "methods":
        from condense.registry import METHODS

        return [_list_method(name) for name in METHODS.names()]
    if kind == "datasets":
        from condense.data import datasets

        return [{"name": name, "about": about} for name, about in datasets().items()]
    if kind == "networks":
        from condense.networks import CONVNET_GRAMMAR, network_names

        return [{"name": name, "about": ""} for name in (CONVNET_GRAMMAR, *network_names())]
    if kind == "protocols":
        from condense.graphs import GRAPH_PROTOCOLS
        from condense.judge import protocols

        known: dict[str, Any] = {**protocols(), **GRAPH_PROTOCOLS}
        return [{"name": name, "about": rules.summary, "version": rules.version} for name, rules in known.items()]
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

    return [{"name": name, "about": _describe_recipe(config.load_recipe(name))} for name in config.recipe_names()]


def _list_method(name: str) -> dict[str, Any]:
    """The row of a method; a package whose module cannot be imported does not hide the others."""
    from condense.registry import METHODS

    try:
        entry = METHODS.get(name)
    except CondenseError as fault:
        return {"name": name, "about": str(fault), "paper": "", "labels": "", "order": 0}
    about = {"name": name, "about": f"{entry.summary} ({entry.year})", "paper": entry.paper}
    return {**about, "labels": entry.labels, "order": entry.order}


def _describe_recipe(recipe: dict[str, Any]) -> str:
    """The cell of a recipe, its steps, and the published accuracy of the cell."""
    from condense.benchmarks import facts

    has_ipc = "ipc" in recipe
    count = f"{recipe['ipc']} per class" if has_ipc else f"{recipe['images']} images"
    published = facts.published(recipe["method"], recipe["data"], int(recipe["ipc"])) if has_ipc else []
    steps = f", {recipe['steps']:,} steps" if isinstance(recipe.get("steps"), int) else ""
    accuracy = f", published {facts.accuracy(published[0]['mean'], published[0]['std'])} %" if published else ""
    return f"{recipe['data']}, {count}{steps}{accuracy}"


def _format_claim(distilled: DistilledSet | GraphSet) -> str:
    """The size of a ready-made set and its measured accuracy."""
    if not hasattr(distilled, "stored"):
        return f"{len(distilled)} graphs, {size(distilled.nbytes()['total'])}"
    claim = distilled.manifest.get("claim")
    accuracy = f", {100 * claim['mean']:.1f} % on {claim['network']} under {claim['protocol']}" if claim else ""
    return f"{len(distilled.stored)} images, {size(distilled.nbytes()['total'])}{accuracy}"


def _format_recipe(name: str) -> str:
    from condense import config

    return ", ".join(f"{key}={value}" for key, value in config.load_recipe(name).items() if key != "method")


def show(
    name: Annotated[str, typer.Argument(metavar="NAME|SET.h5", help="whatever `condense ls KIND` lists, or a file")],
    as_json: AsJson = False,
) -> None:
    """Explains whatever has a name, or a file of a set."""
    from condense import config
    from condense.data import datasets
    from condense.registry import METHODS
    from condense.sets import packaged_sets

    if name in METHODS:
        _show_method(name, as_json)
    elif name.endswith((".yaml", ".yml")) and not {"method", "recipe"} & set(config.read_yaml_file(Path(name), name)):
        _show_other(name, as_json)
    elif name in config.recipe_names() or name.endswith((".yaml", ".yml")):
        _show_recipe(name, as_json)
    elif name in packaged_sets() or name.endswith(".h5"):
        _show_set(name, as_json)
    elif name in datasets():
        _show_dataset(name, as_json)
    else:
        _show_other(name, as_json)


def _show_set(name: str, as_json: bool) -> None:
    from condense import api
    from condense.sets import DistilledSet

    distilled: Any = api.load(name)
    if as_json:
        print(json.dumps(distilled.manifest, indent=1))
    elif isinstance(distilled, DistilledSet):
        _print_set(distilled, name)
    else:
        _print_keys({key: value for key, value in distilled.manifest.items() if key != "checksums"})


def _show_other(name: str, as_json: bool) -> None:
    """Shows a protocol, a suite, a network, or a file without the suffix .h5.

    Raises:
        CondenseError: nothing has this name.
    """
    from condense import networks
    from condense.benchmarks import suite
    from condense.graphs import GRAPH_PROTOCOLS
    from condense.judge import protocols

    found: Any = protocols().get(name) or GRAPH_PROTOCOLS.get(name) or suite.suites().get(name)
    if name.endswith((".yaml", ".yml")):
        found = suite.get_suite(name)
    if found is not None:
        content = asdict(found)
        print(json.dumps(content, indent=1, default=str)) if as_json else _print_keys(content)
        return
    try:
        networks.check_network(name)
    except CondenseError as fault:
        if Path(name).is_file():
            _show_set(name, as_json)
            return
        names = {row["name"]: kind for kind in LISTINGS for row in _list(kind)}
        nearest = difflib.get_close_matches(name[:100], names, n=3, cutoff=0.0)
        hint = ", ".join(f"{near} ({names[near].removesuffix('s')})" for near in nearest)
        raise CondenseError(f"'{shorten(name, 100)}' is no file, and no name; the nearest are {hint}") from fault
    net = networks.build_network(name, NETWORK_SHAPE, NETWORK_CLASSES)
    parameters = sum(p.numel() for p in net.parameters())
    flops = networks.count_flops(net, NETWORK_SHAPE)
    facts = {"network": name, "parameters": parameters, "operations": flops}
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{name}, for {by(NETWORK_SHAPE)} images and {NETWORK_CLASSES} classes:")
    print(f"  {parameters:,} parameters, {size(4 * parameters)} in float32")
    print(f"  {flops / 1e6:,.1f} million floating-point operations in a forward pass of one image")


def _show_dataset(name: str, as_json: bool) -> None:
    from condense.data import DATASETS

    entry = DATASETS.get(name)
    facts = {
        "dataset": name,
        "about": entry.description,
        "images": by(entry.shape),
        "classes": entry.num_classes,
        "mean": list(entry.mean or ()),
        "std": list(entry.std or ()),
        "mirror": entry.mirror,
    }
    print(json.dumps(facts, indent=1)) if as_json else _print_keys(facts)


def _print_set(distilled: DistilledSet, name: str) -> None:
    """The card of a set: its content, bytes and origin, then the rest of its manifest with short hashes."""
    rest = {key: value for key, value in distilled.manifest.items() if key not in ("checksums", "name", "image_shape")}
    parts = {part: count for part, count in rest.pop("bytes").items() if part != "total" and count}
    kind, classes = distilled.labels.kind, rest.pop("classes")
    print(
        f"{distilled.name}: {distilled.num_stored:,} images of {by(distilled.shape)}, {rest.pop('ipc')} for each of "
        f"{len(classes)} classes, {kind} labels"
    )
    print(
        f"  bytes: {size(distilled.nbytes()['total'])} ("
        + ", ".join(f"{part} {size(count)}" for part, count in parts.items())
        + ")"
    )
    cost = rest.pop("cost", {})
    if cost:
        peaks = ", ".join(f"{size(count)} of {where} memory" for where, count in cost.get("peak_memory", {}).items())
        where = machine(cost.get("device", "an unknown machine"), rest.get("precision"))
        print(f"  cost: {duration(cost.get('seconds', 0))} on {where}" + (f", {peaks}" if peaks else ""))
        if cost.get("preparation_seconds"):
            print(f"  before it: {duration(cost['preparation_seconds'])} of training on real data")
    claim = rest.pop("claim", None)
    if claim:
        students = f"{claim.get('runs', '?')} students"
        accuracy = percent(claim["mean"], claim.get("std"))
        print(f"  accuracy: {accuracy} % on {claim['network']} under {claim['protocol']} (± std of {students})")
    shown = ", ".join(map(str, classes[:20])) + (f", and {len(classes) - 20} more" if len(classes) > 20 else "")
    print(f"  classes: {shown}")
    for key in ("label_kind", "code_version", "random_hash_version"):
        rest.pop(key, None)
    for key, value in rest.items():
        if value not in (None, "", [], {}):
            print(f"  {key}: {HASH.sub(lambda found: found[0][:12], _plain(value))}")
    print(f"next: {_evaluate_command(distilled, name)}")


def _evaluate_command(distilled: DistilledSet, name: str) -> str:
    """The command that evaluates a set that may come from elsewhere."""
    from condense import networks
    from condense.data import DATASETS

    data, network = distilled.manifest["dataset"], distilled.manifest["network"]
    is_registered = f" --data {data} " in str(distilled.manifest.get("command"))
    made_with: list[str] = []
    try:
        networks.check_network(network)
        is_known = data in DATASETS or not is_registered
    except CondenseError:
        is_known = False
    if not is_known:  # the data or the network are those of a plug-in, which the manifest names
        made_with = [file for file in map(str, distilled.manifest.get("plugins") or ()) if file.endswith(".py")]
    more = [word for file in made_with for word in ("--plugin", file)]
    return evaluate_command(name, data if is_registered else f"{data}=PATH", network, data, more=more)


def _show_recipe(name: str, as_json: bool) -> None:
    from condense import config
    from condense.benchmarks import facts
    from condense.data import DATASETS

    recipe = config.load_recipe(name)
    parse_request(None, None, None, None, None, name)  # reports the same mistakes as `distill`
    published, measured = [], []
    if "ipc" in recipe:  # images in total instead are no published cell
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
    where = "" if recipe["data"] in DATASETS else f" --data {recipe['data']}=PATH"
    print(f"run it: condense distill --recipe {shlex.quote(name)}{where}")


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
