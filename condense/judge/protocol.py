"""Protocols: versioned rules for training and evaluating students, one YAML file each.

``CONDENSE_PROTOCOLS`` may name a folder of further protocols; they replace packaged ones with the same name.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condense.augment import POLICIES, Augmentation, CropViews, ImagePolicy, make_augmentation
from condense.config import (
    MAX_FLOAT,
    MAX_INTEGER,
    build_config,
    packaged_yaml,
    read_yaml_file,
    require_one_of,
    require_range,
)
from condense.data import Transform
from condense.errors import CondenseError, did_you_mean
from condense.files import check_name
from condense.formatting import shorten
from condense.training import TrainConfig, check_batch_norm_group, check_optimizer

MAX_RUNS = 10_000
"""Maximum number of students per arm."""

OWN = "own"
"""Name in a protocol's networks for the network that the set was made with."""


@dataclass(frozen=True)
class Protocol:
    """Training and evaluation of students; a versioned YAML file in ``benchmarks/protocols``."""

    name: str
    """Name with its version, e.g. dc-v1."""
    version: int
    """Raised by every change that alters scores; tables do not mix versions."""
    summary: str
    """One-line description."""
    labels: str
    """Label track: hard (every arm is trained on classes only) or soft (on the labels of the set)."""
    networks: list[str]
    """Default architectures; "own" is the one that the set was made with."""
    steps: int
    """Optimizer steps for every started ``per_images`` training images."""
    per_images: int
    """Training images per ``steps`` optimizer steps."""
    batch: int
    """Images per step."""
    lr: list[float]
    """Initial learning rates; if several, every arm uses the best one on held-out real training images."""
    held_out: float
    """Share of each class's real training images that is held out to choose the learning rate."""
    momentum: float
    """Momentum of SGD."""
    weight_decay: float
    """L2 penalty of SGD; weight decay of AdamW."""
    drops: list[float]
    """Learning-rate milestones as fractions of the steps."""
    drop_factor: float
    """Factor of the learning rate at each milestone."""
    augment: str
    """DSA operations joined by _, or none; or rrc or rrc_flip: a crop of 8 to 100 % of the area of each image, resized,
    as torchvision's RandomResizedCrop, and a flip; or autoaugment or randaugment, a policy for each 8-bit image."""
    full_epochs: int
    """Epochs of the `full` arm, which makes at least the steps of the distilled arm."""
    runs: int
    """Default number of networks trained per arm."""
    augment_variant: str = "dsa"
    """dsa (one operation per step), flip-always, or idc (flip, colour, and one of crop, scale and rotate)."""
    cutmix: float = 0.0
    """Probability of CutMix in a step."""
    optimizer: str = "sgd"
    """sgd or adamw."""
    schedule: str = "drops"
    """drops (milestones) or cosine, updated every step."""
    stretch: float = 1.0
    """Length of the cosine as a multiple of the length of the training."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate also rises linearly from 0."""
    batch_norm_group: int = 0
    """Maximum number of images that share batch statistics: batches are split into equal groups of at most this size,
    those in which labels with batch statistics were made. 0: the whole batch."""
    decay_all: bool = False
    """Whether adamw decays biases and the scales of norms too, and not only weights with two or more axes."""
    finetuning: str = ""
    """Name of the protocol by which all weights are trained on real data after the training on the set, of protocols
    that judge a set by what networks that are pretrained on it are good for; empty: students are tested as they are."""
    supervised: str = ""
    """With ``finetuning``, name of the protocol of the training on sets whose labels are of classes; the rest of this
    protocol is for labels that are features."""

    def __post_init__(self) -> None:
        try:
            self._check()
        except CondenseError as fault:
            raise CondenseError(f"protocol {shorten(self.name, 100)}: {fault}") from fault

    def _check(self) -> None:
        check_name(self.name, "name")
        check_optimizer(self.optimizer, self.schedule, self.stretch)
        check_batch_norm_group(self.batch_norm_group, self.batch)
        require_one_of(self, labels=("hard", "soft"))
        counts = dict.fromkeys(("version", "steps", "per_images", "batch", "full_epochs"), (1, MAX_INTEGER))
        shares = dict.fromkeys(("momentum", "cutmix", "warmup"), (0, 1))
        factors = dict.fromkeys(("weight_decay", "drop_factor"), (0, MAX_FLOAT))
        require_range(self, **counts, **shares, **factors, runs=(1, MAX_RUNS), held_out=(0, 0.9), stretch=(1e-3, 1e3))
        for key, values, is_valid in (
            ("networks", self.networks, lambda value: isinstance(value, str) and value),
            ("lr", self.lr, lambda value: 0 < value <= MAX_FLOAT),
        ):
            if not values or not all(map(is_valid, values)):
                raise CondenseError(f"{key}={values}: must be a list of at least one, each valid")
        if not all(0 < share < 1 for share in self.drops):
            raise CondenseError(f"drops={self.drops}: must be fractions of the steps, between 0 and 1")
        self.augmentation(mirror=True)
        if bool(self.finetuning) != bool(self.supervised):
            raise CondenseError("finetuning and supervised: give both or neither")

    @property
    def is_transfer(self) -> bool:
        """Whether networks that are pretrained on the set are judged, by a linear probe and by fine-tuning."""
        return bool(self.finetuning)

    def budget(self, size: int) -> int:
        """Number of optimizer steps for a set of ``size`` images."""
        return self.steps * math.ceil(size / self.per_images)

    def augmentation(self, mirror: bool, transform: Transform | None = None) -> Augmentation | CropViews | ImagePolicy:
        """The augmentation of students; without flips unless ``mirror``. Policies need the map to training space."""
        if self.augment in POLICIES:
            return ImagePolicy(self.augment, transform)
        if self.augment in ("rrc", "rrc_flip"):
            return CropViews(flip=mirror and self.augment == "rrc_flip")
        return make_augmentation(self.augment, variant=self.augment_variant, mirror=mirror)

    def recipe(
        self,
        size: int,
        *,
        mirror: bool,
        transform: Transform | None = None,
        steps: int | None = None,
        lr: float | None = None,
    ) -> TrainConfig:
        """Training of students on a set of ``size`` images; ``steps`` and ``lr`` replace those of the protocol."""
        return TrainConfig(
            steps=steps or self.budget(size),
            batch=self.batch,
            lr=self.lr[0] if lr is None else lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            lr_milestones=tuple(self.drops),
            lr_gamma=self.drop_factor,
            augment=self.augmentation(mirror, transform),
            cutmix=self.cutmix,
            optimizer=self.optimizer,
            schedule=self.schedule,
            stretch=self.stretch,
            warmup=self.warmup,
            decay_all=self.decay_all,
            batch_norm_group=self.batch_norm_group,
        )


def protocols() -> dict[str, Protocol]:
    """Protocols by name: the packaged ones, and those in the folder ``CONDENSE_PROTOCOLS``.

    Raises:
        CondenseError: a file is invalid.
    """
    return {name: _read_protocol(file) for name, file in _protocol_files().items()}


def _protocol_files() -> dict[str, Any]:
    """The file of each protocol by the protocol's name, which is that of the file, so that nobody reads all of them to
    find one."""
    folder = os.environ.get("CONDENSE_PROTOCOLS")
    files = [*packaged_yaml("benchmarks/protocols"), *(sorted(Path(folder).glob("*.yaml")) if folder else [])]
    return {file.name.removesuffix(".yaml"): file for file in files}


@functools.cache
def _read_protocol(file: Any) -> Protocol:
    protocol = build_config(Protocol, read_yaml_file(file, file.name), file.name)
    if file.name != f"{protocol.name}.yaml":
        raise CondenseError(f"{file}: name={protocol.name}: must be that of the file")
    return protocol


def get_protocol(name: str) -> Protocol:
    """Returns the protocol called ``name``, or that of the file ``name.yaml``.

    Raises:
        CondenseError: unknown; the message suggests the nearest name. Or the file is invalid, or has the name of a
            packaged protocol with other settings, so that tables would mix both.
    """
    files = _protocol_files()
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise CondenseError(f"--protocol {name}: no such file; `condense ls protocols` lists the packaged ones")
        own = build_config(Protocol, read_yaml_file(path, name), name)
        if own.name in files and own != _read_protocol(files[own.name]):
            raise CondenseError(
                f"--protocol {name}: '{own.name}' is another protocol's name; give it a name of its own"
            )
        return own
    if name not in files:
        raise CondenseError(f"unknown protocol '{name}'{did_you_mean(name, files)}")
    return _read_protocol(files[name])
