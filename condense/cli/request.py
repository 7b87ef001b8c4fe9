"""The request of `distill`, `plan` and `show RECIPE`: a recipe, overridden by flags and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from condense.cli.parameters import sort_settings
from condense.errors import CondenseError


@dataclass(frozen=True)
class RunRequest:
    """The arguments of a run except the settings of the data and of the method."""

    method: str
    data: str
    ipc: int
    network: str | None = None
    protocol: str | None = None
    deterministic: bool = False


def parse_request(
    method: str | None,
    settings: list[str] | None,
    data: str | None,
    ipc: int | None,
    network: str | None,
    recipe: str | None,
    **run_options: Any,
) -> tuple[RunRequest, dict[str, Any], dict[str, Any]]:
    """Merges a recipe with the flags and settings of the command line, and checks the result.

    Args:
        run_options: options of the run that are only checked.

    Returns:
        The request, the options of the data, and the settings of the method.

    Raises:
        CondenseError: all mistakes, in one line.
    """
    from condense import config, graphs, jobs
    from condense.data import DataOptions
    from condense.registry import METHODS

    overrides = list(settings or [])
    if method is not None and "=" in method:  # with --recipe, the first argument may already be a setting
        overrides.insert(0, method)
        method = None
    keys = config.load_recipe(recipe) if recipe else {}
    recipe_method = keys.get("method")
    if None not in (method, recipe_method) and method != recipe_method:
        raise CondenseError(
            f"--recipe {recipe} is for the method '{recipe_method}', not '{method}'; leave one of them out"
        )
    flags = {"method": method, "data": data, "ipc": ipc, "network": network}
    keys |= {key: value for key, value in flags.items() if value is not None} | config.parse_overrides(overrides)
    entry = METHODS.get(str(keys["method"])) if "method" in keys else None
    if entry is not None and entry.ipc is not None:
        keys.setdefault("ipc", entry.ipc)
    missing = [flag for key, flag in (("method", "METHOD"), ("data", "--data"), ("ipc", "--ipc")) if key not in keys]
    if missing or entry is None:
        raise CondenseError(f"{', '.join(missing)} missing; give METHOD --data DATA --ipc N, or --recipe NAME")
    of_data = graphs.GraphOptions if entry.task == "graphs" else DataOptions
    run, options, values = sort_settings(keys, RunRequest, of_data, entry.config)
    names: dict[str, Any] = {"network": run.get("network"), "protocol": run.get("protocol")}
    request, _ = jobs.run_checks(
        lambda: config.build_config(RunRequest, run, "the run"),
        lambda: (
            graphs.check_graph_request(entry, values, options, **names, **run_options)
            if entry.task == "graphs"
            else jobs.check_request(entry.name, values, options, **names, **run_options)
        ),
    )
    return request, options, values
