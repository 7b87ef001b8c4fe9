"""``key=value`` settings and recipes, checked against typed dataclasses; all faults are reported at once."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import inspect
import itertools
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from condense.errors import CondenseError, did_you_mean
from condense.formatting import shorten

C = TypeVar("C")

MAX_INTEGER = 10**9
"""Maximum of a whole number in a setting."""

MAX_SEED = 2**63 - 1
"""Maximum of a seed: that of an integer in a manifest."""

MAX_FLOAT = 3.4e38
"""Maximum of a number in a setting: that of float32."""

MAX_YAML_BYTES = 1024 * 1024
"""Maximum size of a YAML file."""


def parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """``["steps=100", "init=noise"]`` as a dict of strings.

    Raises:
        CondenseError: an entry has no ``=``.
    """
    settings = {}
    for entry in overrides:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise CondenseError(f"'{entry}' is not a setting; write key=value, e.g. steps=100")
        settings[key] = value
    return settings


def build_config(config: type[C], settings: Mapping[str, Any], where: str) -> C:
    """An instance of the dataclass ``config`` with ``settings`` (strings as typed, or values) over its defaults.

    Raises:
        CondenseError: every unknown key (with the nearest known one) and every value of a wrong type, in one line.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    merged = OmegaConf.structured(config)
    OmegaConf.set_readonly(merged, False)  # as it is for a frozen dataclass
    faults, texts = [], {}
    for key, value in settings.items():
        if key not in names:
            faults.append(f"{shorten(f'{key}={value}', 200)}: no such setting of {where}{did_you_mean(key, names)}")
            continue
        try:
            if _plain_type(config, key) == "str" and isinstance(value, str):
                texts[key] = value  # as typed: OmegaConf would interpret ${...} and ???
                continue
            if _has_interpolation(value):
                raise ValueError("interpolations are not evaluated")
            # Numbers and switches are read as YAML.
            entry = OmegaConf.from_dotlist([f"{key}={value}"]) if isinstance(value, str) else {key: value}
            merged.merge_with(entry)  # in place; OmegaConf.merge copies all settings for each key
            _check_size(OmegaConf.select(merged, key))
        except (OmegaConfBaseException, TypeError, ValueError, OverflowError, RecursionError, yaml.YAMLError):
            plain_type = _plain_type(config, key)
            expected = _EXPECTED.get(plain_type, _type_name(config, key))
            faults.append(f"{shorten(f'{key}={value}', 200)}: must be {expected}")
    missing = [key for key in names if OmegaConf.is_missing(merged, key) and key not in settings]
    if missing:
        faults.append(f"{where} lacks {', '.join(missing)}")
    if faults:
        raise CondenseError("; ".join(faults))
    values = {**OmegaConf.to_container(merged), **texts}  # type: ignore[dict-item]
    return config(**values)


def _has_interpolation(value: Any) -> bool:
    """Whether OmegaConf would replace a part of the value, or take it as missing."""
    if isinstance(value, Mapping):
        return any(map(_has_interpolation, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_interpolation, value))
    return isinstance(value, str) and ("${" in value or value == "???")


def _check_size(value: Any) -> None:
    """Raises a ValueError for a number that no setting can need, and for a list in a list."""
    for element in value if isinstance(value, Sequence) and not isinstance(value, str) else ():
        if not isinstance(element, (str, int, float)):
            raise ValueError("not a list of plain values")
        _check_size(element)
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError("too large")
    if isinstance(value, float) and not abs(value) <= MAX_FLOAT:
        raise ValueError("not finite in single precision")


def require_one_of(config: Any, **choices: Iterable[str]) -> None:
    """For a config's ``__post_init__``: each named field is one of its choices.

    Raises:
        CondenseError: the first field that is not, with the nearest choice.
    """
    for key, names in choices.items():
        value = getattr(config, key)
        if value not in names:
            raise CondenseError(f"{key}={shorten(str(value), 200)}: unknown{did_you_mean(str(value), names)}")


_EXPECTED = {
    "int": f"a whole number of at most {MAX_INTEGER:,}",
    "float": "a finite number",
    "bool": "true or false",
    "str": "text",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of finite numbers",
    "list[str]": "a list of texts",
    "dict[str, Any]": "a mapping",
}


def whole_number(value: Any, what: str) -> int:
    """Returns a number that a caller gave in Python as an int.

    Args:
        value: an int, or an integer of numpy or torch.
        what: messages call it, e.g. ``--ipc``.

    Raises:
        CondenseError: it is not a whole number, or does not fit into 64 bits.
    """
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool):
        raise CondenseError(f"{what} {shorten(repr(value), 100)}: must be a whole number")
    if abs(number) > MAX_SEED:
        raise CondenseError(f"{what} {shorten(str(number), 100)}: must be at most {MAX_SEED:,}")
    return number


def require_range(config: Any, **ranges: tuple[float, float]) -> None:
    """For a config's ``__post_init__``: each named field lies in its closed range (low, high) and is a number, or None.

    Raises:
        CondenseError: every field that does not, in one line.
    """
    faults = []
    for key, (low, high) in ranges.items():
        value = getattr(config, key)
        if value is not None and not low <= value <= high:
            faults.append(f"{key}={value}: must be " + (f"at least {low}" if math.isinf(high) else f"{low} to {high}"))
    if faults:
        raise CondenseError("; ".join(faults))


def _type_name(config: type, key: str) -> str:
    kind = next(field.type for field in dataclasses.fields(config) if field.name == key)
    return kind if isinstance(kind, str) else kind.__name__


def _plain_type(config: type, key: str) -> str:
    """The field's type without ``| None``."""
    return _type_name(config, key).removesuffix(" | None")


@functools.cache
def field_docs(config: type) -> dict[str, str]:
    """The docstring of each field of a dataclass: the string literal that follows it, joined to one line.

    A field without a docstring has the one of the nearest base class that documents it. ``{inherited}`` in a docstring
    stands for that text, so that a subclass can add a sentence to it.
    """
    import ast
    import textwrap

    docs: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for statement, following in itertools.pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                name, text = statement.target.id, " ".join(str(following.value.value).split())
                docs[name] = text.replace("{inherited}", docs.get(name, "")).strip()
    return docs


def describe(config: type) -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of every field of a dataclass."""
    docs = field_docs(config)
    rows = []
    for field in dataclasses.fields(config):
        default = "required" if field.default is dataclasses.MISSING else str(field.default)
        if field.default_factory is not dataclasses.MISSING:
            default = str(field.default_factory())
        rows.append((field.name, _type_name(config, field.name), default, docs.get(field.name, "")))
    return rows


# -- recipes ----------------------------------------------------------------------------------------------------------

RUN_KEYS = ("method", "data", "ipc", "images", "network", "protocol")
"""Keys of a recipe that are not hyper-parameters of its method."""

TINY = "tiny"
"""Cell with the quickest run of a method; the generic tests and the GPU check use its settings."""

COSTS = ("low", "medium", "high")
"""Classes of ``cost``: first derivatives at most; the same after training networks on real data; second derivatives."""

METHOD_FOLDERS = "CONDENSE_METHODS"
"""Environment variable: folders of further methods, separated as in PATH. Each method is ``NAME.yaml`` and a module."""


PLUGINS = "CONDENSE_PLUGINS"
"""Environment variable: Python files that :mod:`condense.plugins` imports, separated as in PATH."""


@dataclasses.dataclass(frozen=True)
class MethodFile:
    """What ``NAME.yaml`` says of the method NAME."""

    module: str
    """Module that registers the method when it is imported; one in a folder of ``CONDENSE_METHODS`` is found there."""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys that all recipes share."""
    cells: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Recipe name to its keys; ``tiny`` is the quickest run on data that need no download."""
    suites: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Suite name to the method's settings by ``DATA-ipcN``, null where a cell is left out."""
    link: str = ""
    """URL of the paper; empty if there is none."""
    cost: str = ""
    """Cost of a run, one of ``COSTS``; empty if it is not stated."""


def packaged_yaml(folder: str) -> list[Any]:
    """The YAML files of ``condense.methods/recipes`` or ``condense.benchmarks/protocols``, sorted by name."""
    package, _, sub = folder.partition("/")
    root = importlib.resources.files(f"condense.{package}") / sub
    return sorted((entry for entry in root.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping as plain Python.

    Raises:
        CondenseError: it does not parse or is no mapping.
    """
    import yaml

    # LibYAML reads all packaged recipes in 0.04 s, the pure Python loader in 0.3 s.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise CondenseError(f"{where}: aliases (*NAME) are not supported, because a few can stand for gigabytes")
        content = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise CondenseError(f"{where}: not valid YAML ({shorten(' '.join(str(fault).split()), 300)})") from fault
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CondenseError(f"{where}: must be a mapping of names to values")
    return content


def read_yaml_file(path: Path, where: str) -> dict[str, Any]:
    """The mapping in a user's YAML file.

    Raises:
        CondenseError: no such file, not a regular file, too large, not UTF-8, or not a valid mapping.
    """
    if not path.is_file():
        raise CondenseError(f"{where}: no such file")
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise CondenseError(f"{where}: larger than {MAX_YAML_BYTES} bytes, which no such file needs")
        return read_yaml(path.read_text(encoding="utf-8"), where)
    except UnicodeDecodeError as fault:
        raise CondenseError(f"{where}: byte {fault.start} is not UTF-8; save it as UTF-8 text") from fault
    except OSError as fault:
        raise CondenseError(f"{where}: {fault.strerror or fault}") from fault


def method_paths() -> dict[str, Any]:
    """Method name to its YAML file: the packaged ones, then those in the folders of ``CONDENSE_METHODS``.

    Only lists folders, so that it costs next to nothing.

    Raises:
        CondenseError: such a folder does not exist, or two files describe methods of the same name.
    """
    paths = {entry.name.removesuffix(".yaml"): entry for entry in packaged_yaml("methods/recipes")}
    for folder in method_folders():
        if not folder.is_dir():
            raise CondenseError(f"{METHOD_FOLDERS}: {folder}: no such folder")
        for path in sorted(folder.glob("*.yaml")):
            if path.stem in paths:
                raise CondenseError(f"{path}: there is a method '{path.stem}' already, in {paths[path.stem]}")
            paths[path.stem] = path
    return paths


def method_folders() -> list[Path]:
    """The folders of ``CONDENSE_METHODS``."""
    return [Path(folder).absolute() for folder in os.environ.get(METHOD_FOLDERS, "").split(os.pathsep) if folder]


def method_file(name: str) -> MethodFile:
    """The content of ``NAME.yaml``.

    Raises:
        CondenseError: there is no such file, or its content is not that of a :class:`MethodFile`.
    """
    paths = method_paths()
    if name not in paths:
        raise CondenseError(f"unknown method '{name}'{did_you_mean(name, paths)}")
    return _read_method_file(paths[name])


@functools.cache
def _read_method_file(path: Any) -> MethodFile:
    where = path.name
    content = read_yaml_file(path, where)
    names = [field.name for field in dataclasses.fields(MethodFile)]
    for key in content:
        if key not in names:
            raise CondenseError(f"{where}: {shorten(key, 100)}: no such key{did_you_mean(key, names)}")
    module, defaults = content.get("module"), as_mapping(content.get("defaults"), f"{where}: defaults")
    if not isinstance(module, str):
        raise CondenseError(f"{where}: lacks module, the name of the Python module with the method")
    cells, suites = (
        {
            name: as_mapping(value, f"{where}: {key}: {name}")
            for name, value in as_mapping(content.get(key), f"{where}: {key}").items()
        }
        for key in ("cells", "suites")
    )
    link, cost = content.get("link", ""), content.get("cost", "")
    if link and not str(link).startswith("https://"):
        raise CondenseError(f"{where}: link={link}: must be a URL that starts with https://")
    if cost not in ("", *COSTS):
        raise CondenseError(f"{where}: cost={cost}: must be one of {', '.join(COSTS)}")
    return MethodFile(module, defaults, cells, suites, link, cost)


def as_mapping(content: Any, where: str) -> dict[str, Any]:
    """``content`` of a YAML file as a mapping; nothing at all is an empty one.

    Raises:
        CondenseError: it is something else.
    """
    if not isinstance(content or {}, dict):
        raise CondenseError(f"{where}: must be a mapping of keys to values, not {shorten(repr(content), 100)}")
    return content or {}


def recipe_names() -> list[str]:
    """``method/cell`` of every recipe."""
    return [f"{name}/{cell}" for name in method_paths() for cell in method_file(name).cells]


def load_recipe(name: str) -> dict[str, Any]:
    """A recipe's keys: ``method``, ``data``, ``ipc`` or ``images``, perhaps ``network`` and ``protocol``, and
    hyper-parameters.

    Args:
        name: ``dm/cifar10-ipc10``, or the path of a flat YAML file with the same keys.

    Raises:
        CondenseError: no such recipe or file, or it lacks a key.
    """
    method, _, cell = name.partition("/")
    if name.endswith((".yaml", ".yml")):
        keys = read_yaml_file(Path(name), f"--recipe {name}")
    elif method in method_paths() and cell in method_file(method).cells:
        file = method_file(method)
        keys = {"method": method, **file.defaults, **file.cells[cell]}
    else:
        raise CondenseError(f"unknown recipe '{name}'{did_you_mean(name, recipe_names(), 'condense ls recipes')}")
    missing = [key for key in ("method", "data", "ipc") if key not in keys and not (key == "ipc" and "images" in keys)]
    if missing:
        raise CondenseError(f"--recipe {name}: lacks {', '.join(missing)}")
    return keys


def tiny_settings(method: str) -> dict[str, Any]:
    """Hyper-parameters of the quickest run of a method, from the cell ``tiny`` of its YAML file."""
    return {key: value for key, value in load_recipe(f"{method}/{TINY}").items() if key not in RUN_KEYS}


def suite_cells(suite: str) -> dict[str, Any]:
    """Method to settings by ``DATA-ipcN``, of the methods whose YAML files have cells for a suite."""
    files = {name: method_file(name).suites for name in method_paths()}
    return {name: suites[suite] for name, suites in files.items() if suite in suites}
