"""Settings that a file of trained networks decides, where the user leaves them open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from condense import networks
from condense.config import build_config
from condense.errors import CondenseError
from condense.networks import CHECKPOINT_SUFFIXES, is_public, read_teacher_file
from condense.pretraining import read_trajectory_file
from condense.registry import Method

Network = str | Callable[..., nn.Module]


def fill_from_files(
    entry: Method, settings: Mapping[str, Any], network: Network | None
) -> tuple[dict[str, Any], Network | None, str]:
    """Completes the settings and the network of a run from the files ``experts`` and ``teachers`` among the settings.

    Experts decide the network and, where they have fewer epochs than the method reads, ``buffer_epochs``. Teachers
    decide ``committee``, the network, and, where they are fewer, ``num_teachers``; a target model only ``committee``.
    What is given is never replaced.

    Returns:
        The settings, the network, and a line that says what was taken from which file; empty if nothing was.

    Raises:
        CondenseError: a file cannot be read, or holds several architectures of which one must be named.
    """
    taken: dict[str, Any] = {}
    file = ""
    if entry.pretrains == "experts" and settings.get("experts"):
        file = f"experts={settings['experts']}"
        taken = _of_experts(entry, settings, Path(str(settings["experts"])))
    elif settings.get("teachers") and (entry.pretrains == "teachers" or settings.get("labels") == "teacher"):
        file = f"teachers={settings['teachers']}"
        taken = _of_teachers(entry, settings, network, str(settings["teachers"]))
    own = taken.pop("network") if "network" in taken else None
    used = network or (own if own != entry.network else None)
    words = [f"--network {used}"] * (used is not None and network is None)
    words += [f"{name}={value}" for name, value in taken.items()]
    return {**settings, **taken}, used, f"{file} decides {' '.join(words)}" if words else ""


def _of_experts(entry: Method, settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    file = read_trajectory_file(path)
    taken: dict[str, Any] = {"network": file.manifest["network"]}
    if settings.get("buffer_epochs") is None:
        options = {
            name: settings[name] for name in ("expert_epochs", "min_start_epoch", "max_start_epoch") if name in settings
        }
        config: Any = build_config(entry.config, options, f"the method '{entry.name}'")
        if config.min_start_epoch + config.expert_epochs <= file.epochs < config.epochs_needed():
            taken["buffer_epochs"] = file.epochs
    return taken


def _of_teachers(entry: Method, settings: Mapping[str, Any], network: Network | None, name: str) -> dict[str, Any]:
    if is_public(name) or Path(name).suffix in CHECKPOINT_SUFFIXES:
        return {}
    counts = Counter(architecture for architecture, _ in read_teacher_file(Path(name)).keys)
    default: Any = entry.config()
    taken: dict[str, Any] = {}
    committee = settings.get("committee") or default.committee
    if entry.labels == "features":  # one target model, beside networks of another architecture
        if committee or list(counts) == [networks.network_name(network or entry.network)]:
            return {}
        if len(counts) > 1:
            names = " or ".join(f"committee={architecture}" for architecture in counts)
            raise CondenseError(f"teachers={name}: holds {len(counts)} architectures; name one: {names}")
        return {"committee": next(iter(counts))}
    if not committee:
        own = networks.network_name(network or entry.network)
        if network is None and own not in counts:
            taken["network"] = own = next(iter(counts))
        if list(counts) != [own]:
            taken["committee"] = committee = ",".join(counts)
    fewest = min((counts[member] for member in (committee.split(",") if committee else counts)), default=0)
    if "num_teachers" not in settings and 0 < fewest < default.num_teachers:
        taken["num_teachers"] = fewest
    return taken
