"""Teachers: networks trained on the real data of which all weights and buffers are stored. Methods use their logits and
the statistics of their BatchNorm layers.

The file is HDF5: every entry of a member's state, under its own name, is an array ``/members/K/NAME``. The manifest
gives the network, number, accuracy, seconds and SHA-256 of each member, and describes the data and the training of all.
A member is identified by its network and number: members that are added later equal those of a single call (on a CPU
bit for bit; a GPU trains groups together, whose sizes change the rounding).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from condense import networks, rng
from condense.augment import Augmentation, CropViews, make_augmentation
from condense.config import require_range
from condense.data import Task, cache_dir
from condense.engine import Run
from condense.errors import CondenseError
from condense.files import tensors_sha256
from condense.networks import (
    MemberKey,
    State,
    TeacherFile,
    is_public,
    read_teacher_file,
    state_nbytes,
    write_teacher_file,
)
from condense.pretraining.budget import TrainingPlan
from condense.pretraining.pipeline import (
    Architecture,
    RecordedTraining,
    make_student,
    split_training_data,
    train_missing,
)
from condense.pretraining.self_supervised import BarlowTwins
from condense.pretraining.store import FileKind, FileStore, TrainedFile, data_fields, training_key_fields
from condense.training import Student, TrainConfig, accuracy, check_optimizer

DEFAULT_TEACHER_NETWORK = "convnet-d3-w128-bn"
"""Architecture of teachers where neither a network nor a method is named."""

MAX_TEACHER_GROUP = 10
"""Maximum number of teachers that a GPU trains together."""

TeacherRecord = tuple[dict[str, Any], State]
"""Entry of the manifest, and state on the CPU."""


@dataclass(frozen=True)
class TeacherTraining:
    """How a method trains its teachers."""

    recipe: TrainConfig
    """Its number of steps is replaced."""
    epochs: int
    """Passes over the training images."""
    precision: str | None = None
    """fp32 or bf16; None: the run's."""
    held_out: float = 0.0
    """Share of each class's training images that measures the accuracy instead; 0: the real test images measure it."""
    objective: BarlowTwins | None = None
    """Training without classes; None: the cross-entropy of the classes."""


@dataclass(frozen=True)
class TeacherOptions:
    """Settings of teachers; mixed into the settings of methods that use them."""

    teachers: str = ""
    """A file of `condense teachers`, a torch checkpoint (.pt, .pth) of the run's network, or torchvision:NAME,
    torchvision:NAME@WEIGHTS (e.g. @IMAGENET1K_V1) or timm:NAME for public weights, of several joined by commas; by
    default the cache is searched, and what it lacks is trained. A checkpoint takes images in training space: mean= and
    std= of the data are those of its training."""
    committee: str = ""
    """Architectures of the teachers, joined by commas; the run's network by default."""
    num_teachers: int = 1
    """Teachers of each architecture."""
    teacher_epochs: int = 50
    """Passes over the real training images; longer-trained teachers are better ones but harder to recover images
    from."""
    teacher_lr: float = 0.1
    """Learning rate at the start of a teacher's training; it falls to 0 along a cosine."""
    teacher_optimizer: str = "sgd"
    """sgd (momentum 0.9) or adamw."""
    teacher_decay: float = 5e-4
    """Weight decay of a teacher's training; adamw spares biases and norms."""
    teacher_batch: int = 128
    """Real images per step of a teacher's training."""
    teacher_augment: str = "crop_flip"
    """rrc or rrc_flip (crops of 8 to 100 % of the area, resized, as torchvision's RandomResizedCrop), or operations
    joined by _, drawn per image: flip acts in every step, and one of the others."""
    teacher_cutmix: float = 0.0
    """Probability of CutMix in a step of a teacher's training."""

    def check_teachers(self) -> None:
        """For ``__post_init__``: checks ranges and choices of the settings."""
        largest = sys.float_info.max
        require_range(
            self,
            num_teachers=(1, math.inf),
            teacher_epochs=(1, math.inf),
            teacher_lr=(0, largest),
            teacher_decay=(0, largest),
            teacher_batch=(1, math.inf),
            teacher_cutmix=(0, 1),
        )
        check_optimizer(self.teacher_optimizer, "cosine", prefix="teacher_")
        try:
            self.augmentation(mirror=True)
        except CondenseError as fault:
            raise CondenseError(f"teacher_augment={self.teacher_augment}: {fault}") from fault
        for name in self._committee_names():
            try:
                networks.check_network(name)
            except CondenseError as fault:
                raise CondenseError(f"committee={self.committee}: {fault}") from fault
        if is_public(self.teachers):
            for name in self.teachers.split(","):
                networks.check_network(networks.architecture_of(name))
                networks.check_public_weights(name)
            if self.committee:
                raise CondenseError(f"teachers={self.teachers}: says what the committee is; leave out committee")

    def augmentation(self, mirror: bool) -> Augmentation | CropViews:
        """The augmentation of the teachers' training; without flips unless ``mirror``."""
        if self.teacher_augment in ("rrc", "rrc_flip"):
            return CropViews(flip=mirror and self.teacher_augment == "rrc_flip")
        return make_augmentation(self.teacher_augment, variant="flip-always", mirror=mirror)

    def _committee_names(self) -> list[str]:
        return [name.strip() for name in self.committee.split(",")] if self.committee else []

    def teacher_training(self, task: Task) -> TeacherTraining:
        """Returns their training: SGD with momentum 0.9 or AdamW along a cosine, with augmentation and CutMix."""
        recipe = TrainConfig(
            steps=0,
            batch=self.teacher_batch,
            lr=self.teacher_lr,
            momentum=0.9,
            weight_decay=self.teacher_decay,
            lr_milestones=(),
            augment=self.augmentation(task.mirror),
            cutmix=self.teacher_cutmix,
            optimizer=self.teacher_optimizer,
            schedule="cosine",
        )
        return TeacherTraining(recipe, self.teacher_epochs)

    def count_teachers(self, own: Architecture) -> int:
        """Requested number of teachers."""
        public = is_public(self.teachers)
        return len(self.teachers.split(",")) if public else len(self.architectures(own)) * self.num_teachers

    def architectures(self, own: Architecture) -> list[Architecture]:
        """Architectures of the teachers: the committee's, or ``own``, the run's network."""
        return list(dict.fromkeys(self._committee_names())) or [own]


@dataclass(frozen=True)
class BarlowOptions(TeacherOptions):
    """Settings of teachers that are trained without classes, by Barlow Twins."""

    teacher_epochs: int = 200
    """Passes over the real training images, whose classes are not used."""
    teacher_lr: float = 1e-3
    """{inherited}"""
    teacher_optimizer: str = "adamw"
    """{inherited}"""
    teacher_decay: float = 1e-4
    """{inherited}"""
    teacher_batch: int = 256
    """{inherited} Each has two views."""
    teacher_augment: str = "rrc_flip"
    """{inherited} The views of an image also differ in brightness, saturation and contrast."""
    barlow_weight: float = 5e-3
    """Weight of the redundancy of Barlow Twins (lambda)."""
    projector: int = 1024
    """Width of the three layers between features and outputs, which are dropped after the training."""

    def check_teachers(self) -> None:
        super().check_teachers()
        require_range(self, barlow_weight=(0, sys.float_info.max), projector=(1, 65536))
        if self.teacher_cutmix:
            raise CondenseError(
                f"teacher_cutmix={self.teacher_cutmix:g}: Barlow Twins compares views of one image; leave it 0"
            )

    def teacher_training(self, task: Task) -> TeacherTraining:
        """Returns their training; see :class:`BarlowTwins`."""
        training = super().teacher_training(task)
        objective = BarlowTwins(self.augmentation(task.mirror), self.barlow_weight, self.projector)
        recipe = dataclasses.replace(training.recipe, augment=None)
        return dataclasses.replace(training, recipe=recipe, objective=objective)


OBJECTIVES: dict[str, type[TeacherOptions]] = {"classes": TeacherOptions, "barlow": BarlowOptions}
"""Settings of teachers by what they are trained for."""


# -- the training -----------------------------------------------------------------------------------------------------


def teacher_cache_key_fields(run: Run, training: TeacherTraining) -> dict[str, Any]:
    """Returns all that decides a teacher besides its network and number, as entries of the manifest."""
    fields = training_key_fields(run, training.recipe, training.precision, training.held_out)
    if training.objective is not None:
        fields["recipe"] += f" {training.objective}"
    return {**fields, "epochs": training.epochs}


def teacher_cache_file(run: Run, training: TeacherTraining) -> Path:
    """Returns the path of teachers of this training in the cache; it is the same for all networks and methods."""
    text = json.dumps(teacher_cache_key_fields(run, training), sort_keys=True)
    return cache_dir() / "teachers" / f"{hashlib.sha256(text.encode()).hexdigest()}.h5"


def train_teacher_file(
    run: Run,
    training: TeacherTraining,
    path: Path,
    *,
    architectures: Sequence[Architecture],
    count: int = 1,
    force: bool = False,
) -> TrainedFile[TeacherFile, MemberKey]:
    """Trains teachers on the run's real data and writes them to ``path``.

    Members of the file stay, whatever their network, and so do finished ones of an interrupted call (in ``path`` +
    ``.parts``): the same call trains what is missing, and resumes a training whose state was written. A larger
    ``count`` or another architecture adds to the file. Ranks share the training.

    Args:
        run: device, seed, data; stops the training on a signal.
        training: of the teachers.
        path: file to write.
        architectures: names of the networks.
        count: minimum number of teachers of each in the file.
        force: replace teachers of other data or trainings, and damaged ones.

    Raises:
        Interrupted: SIGINT or SIGTERM.
        CondenseError: ``path`` holds something else or cannot be written, or a teacher diverged.
    """
    for architecture in architectures:
        if not isinstance(architecture, str):
            name = networks.network_name(architecture)
            raise CondenseError(f"network {name}: teachers in files are of networks that have a name")
    began = time.monotonic()
    keys = [(str(name), number) for number in range(count) for name in dict.fromkeys(architectures)]
    source, steps_per_epoch = split_training_data(run, training.recipe.batch, training.held_out)
    for name in dict.fromkeys(map(str, architectures)):
        net = build_untrained(name, source)
        check_last_batch(net, name, len(source.train), training.recipe.batch)
    store = teacher_store(run, training, path, keys, steps_per_epoch, force)
    plan = TrainingPlan(len(keys), training.epochs, steps_per_epoch)
    message = "stopped while training teachers; what is done is kept: the same command continues with the rest"
    _, trained = train_missing(run, recorded_teacher_training(run, training, source), store, plan, message)
    return TrainedFile(
        read_teacher_file(path), [(str(name), number) for name, number in trained], time.monotonic() - began
    )


def recorded_teacher_training(
    run: Run, training: TeacherTraining, source: Task
) -> RecordedTraining[bool, TeacherRecord]:
    """Returns the training whose snapshots say only whether the weights are finite; the last state is recorded."""
    precision, objective = training.precision or run.precision, training.objective

    def student(architecture: Architecture, number: int) -> Student:
        purpose = ("teacher", networks.network_name(architecture), number)
        if objective is not None:
            return objective.student(run, source, architecture, *purpose)
        return make_student(run, source, architecture, *purpose)

    def record(
        architecture: Architecture, number: int, net: networks.Network, snapshots: list[bool], seconds: float
    ) -> TeacherRecord:
        net = net if objective is None else objective.finish(net, source, run.device, precision)
        measured = accuracy(net, source, device=run.device, precision=precision)
        state = {name: value.detach().to("cpu", copy=True) for name, value in net.state_dict().items()}
        entry = {
            "network": networks.network_name(architecture),
            "number": number,
            "accuracy": measured,
            "seconds": round(seconds, 3),
            "sha256": state_sha256(state),
            "library_version": networks.library_version(architecture),
        }
        return entry, state

    return RecordedTraining(
        "teacher",
        training.recipe,
        precision,
        student=student,
        snapshot=_is_finite,
        record=record,
        is_finite=bool,
        remedy=f"(its weights are not finite); lower teacher_lr, now {training.recipe.lr:g}",
        max_group=MAX_TEACHER_GROUP,
    )


def _write_teachers(
    path: Path, manifest: dict[str, Any], teachers: Sequence[tuple[dict[str, Any], Callable[[], State]]]
) -> None:
    write_teacher_file(path, manifest, ((entry, load()) for entry, load in teachers))


def _part_name(member: MemberKey) -> str:
    """Names of networks may have characters that names of files may not have."""
    return f"{hashlib.sha256(member[0].encode()).hexdigest()[:16]}-{member[1]:04d}.h5"


TEACHER_KIND = FileKind(
    "teacher",
    read_teacher_file,
    load=TeacherFile.load_state,
    is_intact=TeacherFile.is_intact,
    write=_write_teachers,
    part_name=_part_name,
    is_resumable=True,
    is_numbered=False,
)


def teacher_store(
    run: Run,
    training: TeacherTraining,
    path: Path,
    keys: Sequence[tuple[Architecture, int]],
    steps_per_epoch: int,
    force: bool,
) -> FileStore[TeacherFile, State]:
    """Returns the store of a file of teachers."""
    transform = run.task.transform
    is_standardised = transform.kind == "standardise"
    manifest = {
        **teacher_cache_key_fields(run, training),
        **data_fields(run.task, steps_per_epoch),
        "judged_on": accuracy_source(training),
        "normalisation": {name: array.tolist() for name, array in transform.arrays().items()}
        if is_standardised
        else None,
    }
    nbytes = lambda architecture: state_nbytes(build_untrained(architecture, run.task))  # noqa: E731
    return FileStore(run, TEACHER_KIND, path, manifest, keys, nbytes, force)


def accuracy_source(training: TeacherTraining) -> str:
    """Returns the images that measure the teachers' accuracy, as the manifest states them."""
    images = "held-out images" if training.held_out else "test images"
    return images if training.objective is None else f"{images} (linear probe)"


def build_untrained(architecture: Architecture, source: Task) -> networks.Network:
    """Builds a network for the data, for its layout and size."""
    with rng.seeded("layout"):
        return networks.build_network(architecture, source.shape, source.num_classes)


def check_last_batch(net: nn.Module, name: str, size: int, batch: int) -> None:
    """Refuses a last batch of a single image: its maps of one pixel have no variance, and it would spoil the running
    statistics of others."""
    if networks.uses_batch_statistics(net) and size % batch == 1:
        raise CondenseError(
            f"teacher_batch={batch}: the last batch of {size} images would hold one alone, which the BatchNorm of "
            f"{name} cannot take; give teacher_batch={batch + 1}"
        )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state, whatever the order of its entries."""
    return tensors_sha256({name: state[name] for name in sorted(state)})


def _is_finite(state: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())
