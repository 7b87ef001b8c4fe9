"""The request of `distill`, `plan` and `show RECIPE`: a recipe, overridden by flags and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from condense.cli.parameters import sort_settings
from condense.errors import CondenseError

if TYPE_CHECKING:
    from condense.data import Task


@dataclass(frozen=True)
class RunRequest:
    """The arguments of a run except the settings of the data and of the method."""

    method: str
    data: str
    ipc: int | None = None
    network: str | None = None
    protocol: str | None = None
    deterministic: bool = False
    images: int | None = None
    """Stored images of all classes together, instead of ``ipc``."""

    def images_per_class(self, real: Task) -> int:
        """``ipc``, or what follows from ``images``.

        Raises:
            CondenseError: ``images`` is no multiple of the number of classes.
        """
        if self.images is None:
            assert self.ipc is not None
            return self.ipc
        count, rest = divmod(self.images, real.num_classes)
        if count < 1 or rest:
            lower, upper = (k * real.num_classes for k in (max(count, 1), max(count, 0) + 1))
            fix = f"{lower:,}" if lower == upper else f"{lower:,} or {upper:,}"
            raise CondenseError(
                f"--images {self.images}: must be a multiple of the {real.num_classes:,} classes of {real.name}: {fix}"
            )
        return count


def parse_request(
    method: str | None,
    settings: list[str] | None,
    data: str | None,
    ipc: int | None,
    network: str | None,
    recipe: str | None,
    *,
    images: int | None = None,
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
    flags = {"method": method, "data": data, "ipc": ipc, "images": images, "network": network}
    if images is not None:
        if ipc is not None:
            raise CondenseError(f"--images {images} and --ipc {ipc}: give one of them")
        keys.pop("ipc", None)
    if ipc is not None:
        keys.pop("images", None)
    keys |= {key: value for key, value in flags.items() if value is not None} | config.parse_overrides(overrides)
    entry = METHODS.get(str(keys["method"])) if "method" in keys else None
    if entry is not None and entry.ipc is not None:
        keys.setdefault("ipc", entry.ipc)
    missing = [flag for key, flag in (("method", "METHOD"), ("data", "--data"), ("ipc", "--ipc")) if key not in keys]
    if "images" in keys:
        missing = [flag for flag in missing if flag != "--ipc"]
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
