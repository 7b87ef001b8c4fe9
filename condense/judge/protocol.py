"""Protocols: the versioned rules by which students are trained and judged, one YAML file each."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from condense.augment import dsa
from condense.config import build, packaged, read_yaml
from condense.errors import CondenseError, did_you_mean
from condense.training import Recipe, check_rule

OWN = "own"
"""Among a protocol's networks: the one that the set was made with."""


@dataclass(frozen=True)
class Protocol:
    """How students are trained and judged; a versioned YAML file in ``benchmarks/protocols``."""

    name: str
    """Name with its version, e.g. dc-v1."""
    version: int
    """Raised by every change that alters scores; tables never mix versions."""
    summary: str
    """One line for people."""
    labels: str
    """Label track: hard (every arm learns from classes alone) or soft (from the labels that the set brings)."""
    networks: list[str]
    """Architectures unless others are named; "own" is the one that the set was made with."""
    steps: int
    """Optimizer steps for every started ``per_images`` training images."""
    per_images: int
    """See ``steps``."""
    batch: int
    """Images per step."""
    lr: list[float]
    """Learning rate at the start; of several, every arm takes the best one on held-out real training images."""
    held_out: float
    """Share of each class's real training images that decides between learning rates; never test images."""
    momentum: float
    """Momentum of SGD."""
    weight_decay: float
    """L2 penalty; the decay of adamw."""
    drops: list[float]
    """Fractions of the budget after which the learning rate drops."""
    drop_factor: float
    """Factor of each drop."""
    augment: str
    """DSA operations joined by _, or none."""
    full_epochs: int
    """Passes over the real data for the `full` arm, which never makes fewer steps than the distilled arm."""
    runs: int
    """Networks trained per arm unless told otherwise."""
    augment_variant: str = "dsa"
    """dsa (one operation a step), flip-always or idc (flip and colour always, one of crop, scale and rotate)."""
    cutmix: float = 0.0
    """Probability of CutMix in a step."""
    optimizer: str = "sgd"
    """sgd or adamw, which decays weights of two or more axes only."""
    schedule: str = "drops"
    """drops or cosine, from step to step."""
    stretch: float = 1.0
    """Of the cosine: so many times the length of the training."""

    def __post_init__(self) -> None:
        check_rule(self.optimizer, self.schedule, self.stretch, prefix=f"{self.name}: ")

    def budget(self, size: int) -> int:
        """Optimizer steps for a set of ``size`` images."""
        return self.steps * math.ceil(size / self.per_images)

    def recipe(self, size: int, *, mirror: bool, steps: int | None = None, lr: float | None = None) -> Recipe:
        """The student recipe for a set of ``size`` images; ``steps`` and ``lr`` replace the protocol's own."""
        return Recipe(
            steps=steps or self.budget(size),
            batch=self.batch,
            lr=self.lr[0] if lr is None else lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            drops=tuple(self.drops),
            drop_factor=self.drop_factor,
            augment=dsa(self.augment, variant=self.augment_variant, mirror=mirror),
            cutmix=self.cutmix,
            optimizer=self.optimizer,
            schedule=self.schedule,
            stretch=self.stretch,
        )


@functools.cache
def protocols() -> dict[str, Protocol]:
    """Every packaged protocol by name."""
    found = {}
    for entry in packaged("benchmarks/protocols"):
        protocol = build(Protocol, read_yaml(entry.read_text(), entry.name), entry.name)
        found[protocol.name] = protocol
    return found


def get_protocol(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        CondenseError: unknown; suggests the nearest.
    """
    if name not in protocols():
        raise CondenseError(f"unknown protocol '{name}'{did_you_mean(name, protocols())}")
    return protocols()[name]
