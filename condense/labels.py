"""Label providers: what a student is asked to predict, on which views of the images, and what storing that costs.

Hard and soft labels belong to images: ``targets(ids)``. The others belong to views (``per_view = True``): the provider
draws the views of each epoch itself and gives them together with what is to be predicted of them, ``shown(images, ids,
epoch)``; the recipe's own augmentation is left out. As a view follows from the provider's seed, the epoch and the image
alone (:class:`condense.augment.ViewRule`), labels are stored without views and students may batch as they like.

============ ======================== ============================================ =========================
kind         stored, of C classes     target                                       used by
============ ======================== ============================================ =========================
hard         a class per image        the class, smoothed or not
soft         C float32 per image      a distribution
per-view     2 C bytes per view       what a teacher said of the view              FKD, SRe2L, CV-DD, EDC, FerKD
teacher      the teachers themselves  what they say of the view, asked each time   RDED, DWA, CV-DD
static       2 C bytes per image      logits, mixed as the images are              INFER
distances    4 bytes per view         a teacher's surprise at the two classes      NRR-DD
lowrank      r bytes per view         per-view, on a basis of r vectors            see light_labels.py
topk         4 k bytes per view       per-view, the k largest logits               LPQLD
pool         per-view, of few epochs  per-view, drawn from these                   LPLD
teacher-int8 the teachers in 8 bits   what they say of the view
projector    changes of a public net  what it says of the view, asked each time    HeLlO
============ ======================== ============================================ =========================

A provider knows the loss that goes with its targets, writes itself as plain arrays and counts its bytes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import networks, rng
from condense.augment import MIXES, CropViews, MixedViews, ViewRule, single
from condense.errors import CondenseError, did_you_mean
from condense.registry import Registry
from condense.tracking import Progress

if TYPE_CHECKING:
    from condense.distilled import DistilledSet

LOSSES = ("kl", "mse")
STATISTICS = ("running", "batch")
SMOOTHING = 0.1
"""Of the ground truth that takes the place of a doubtful label, see :class:`PerViewLabels`."""


class Labels(Protocol):
    """What every provider offers."""

    kind: str
    per_view: bool
    """True where targets come with views of the provider's own making, so that no other augmentation is due."""

    @property
    def exactness(self) -> str:
        """exact: a teacher's own answers on the very views, to float16; lossy: these, coded within an error that the
        labels state; approximate: something that stands for them."""

    @property
    def step_cost(self) -> str:
        """What a student's step costs beyond drawing and making the views, in words."""

    def __len__(self) -> int:
        """Number of stored images that have labels."""

    def targets(self, ids: Tensor) -> Tensor:
        """Targets of the stored images ``ids`` (any shape) as they are, on their device.

        Raises:
            CondenseError: such labels belong to views.
        """

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Views (B,C,H,W) of the images ``ids`` (B,) in ``epoch``, and targets whose first axis is B.

        Args:
            images: (N,C,H,W), all stored images, in training space.
            ids: int64, which of them.
            epoch: pass over the set, from 0.

        Raises:
            CondenseError: there are not as many images as labels.
        """

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch for logits (B, C)."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written below ``/labels`` in the file; the class's ``from_arrays(arrays, classes)`` reads it."""

    def nbytes(self) -> int:
        """Bytes that the labels need, as the benchmark counts them."""

    def external_nbytes(self) -> int:
        """Bytes that training on the labels needs from outside the file, such as a live teacher's weights."""

    def to(self, device: torch.device) -> Labels:
        """The same labels on ``device``."""

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> Labels:
        """Labels of this kind and rule that ``teacher`` gives other images (N,C,H,W), in training space, on its
        device. ``hard`` (N,) are their classes; None: those that the teacher finds likeliest."""

    def rule(self) -> str:
        """What decides such labels besides the teacher."""


# Labels of images -----------------------------------------------------------------------------------------------------


class HardLabels:
    """One class per image.

    Args:
        labels: int64 (N,) in 0..C-1.
        classes: C.
        smoothing: share of the target that is spread evenly over all C classes.

    Raises:
        CondenseError: the smoothing is not in [0, 1).
    """

    kind = "hard"
    per_view = False
    exactness = "approximate"
    step_cost = "none"

    def __init__(self, labels: Tensor, classes: int, smoothing: float = 0.0) -> None:
        self.labels, self.classes, self.smoothing = labels.long(), classes, single(smoothing)
        if not 0 <= self.smoothing < 1:
            raise CondenseError(f"smoothing={smoothing:g}: must be at least 0 and below 1")

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self, ids: Tensor) -> Tensor:
        return self.labels[ids]

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        _check_count(images, self)
        return images[ids], self.targets(ids)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)

    def arrays(self) -> dict[str, np.ndarray]:
        smoothing = {"smoothing": np.array([self.smoothing], np.float32)} if self.smoothing else {}
        return {"hard": self.labels.cpu().numpy(), **smoothing}

    def nbytes(self) -> int:
        """ceil(log2 C) bits per image: what a packed store needs, however wide the array in the file is; and 4 bytes
        where the labels are smoothed."""
        packed = math.ceil(len(self.labels) * math.ceil(math.log2(self.classes)) / 8)
        return packed + 4 * (self.smoothing > 0)

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> HardLabels:
        return HardLabels(self.labels.to(device), self.classes, self.smoothing)

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> HardLabels:
        return HardLabels(answers(teacher, images).argmax(1), self.classes, self.smoothing)

    def rule(self) -> str:
        return f"likeliest class, smoothing={self.smoothing}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> HardLabels:
        smoothing = _array(arrays, "smoothing", np.float32, (1,)) if "smoothing" in arrays else [0.0]
        return cls(_classes_from(arrays, classes), classes, float(smoothing[0]))


class SoftLabels:
    """One distribution per image, stored as logits float32 (N, C); the target is their softmax, the loss
    cross-entropy."""

    kind = "soft"
    per_view = False
    exactness = "approximate"
    step_cost = "a softmax"

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __len__(self) -> int:
        return len(self.logits)

    def targets(self, ids: Tensor) -> Tensor:
        return self.logits[ids].softmax(-1)

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        _check_count(images, self)
        return images[ids], self.targets(ids)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"logits": self.logits.detach().float().cpu().numpy()}

    def nbytes(self) -> int:
        return self.logits.numel() * 4

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> SoftLabels:
        return SoftLabels(self.logits.to(device))

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> SoftLabels:
        return SoftLabels(answers(teacher, images))

    def rule(self) -> str:
        return "logits of the image"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> SoftLabels:
        return cls(torch.from_numpy(_array(arrays, "logits", np.float32, (None, classes))))


# Labels of views ------------------------------------------------------------------------------------------------------


class PerViewLabels:
    """A teacher's logits on E stored epochs of views, float16 (E, N, C); epoch e shows the views of epoch e modulo E
    (FKD, Shen and Xing, ECCV 2022, with mixed views as in SRe2L). The teacher saw the mixed view.

    With ``loss_kind="kl"`` the target is softmax(logits / T), float32 (B, C), and the loss its KL divergence to the
    student's softmax at T. With ``"mse"`` the target is the logits themselves and the loss the mean squared difference
    over views and classes plus ``gamma`` times the cross-entropy with the classes of the view (G-VBSM, EDC); where
    gamma is not 0 targets are (B, 2, C), logits and classes.

    ``calibrate=(low, mid, top)`` goes by the teacher's largest probability p (at T = 1) on a view, as FerKD does: a
    view with p < low (it shows nothing) or p > top (it teaches nothing) is left out of the loss, the mean being over
    the others; where low <= p < mid the classes of the view, smoothed by 0.1, take the place of the label. The row of
    the targets is then 0, or the smoothed classes. FerKD's thresholds (.15, .3, .95) are recollections that nobody has
    verified, and its release holds no code of this.

    Args:
        logits: (E, N, C) of any floating dtype, stored as float16; may lie in a memory-mapped file.
        seed: of the views.
        views: how they are drawn; plain crops when None.
        temperature: T of the targets and the loss, kept as its float32 neighbour prints. Unused by ``mse``.
        squared: multiply the KL loss by T^2, so that the size of gradients hardly depends on T.
        loss_kind: ``kl`` or ``mse``.
        gamma: weight of the classes in ``mse``.
        calibrate: None or three thresholds.
        hard: int64 (N,), class of each image; needed by gamma and calibrate.
        statistics: how the teacher's BatchNorm normalised, see :func:`view_answers`.
        micro: views that it normalised together.

    Raises:
        CondenseError: a value that cannot be, logits of another shape or not finite as float16, or no classes where
            they are needed.
    """

    kind = "per-view"
    per_view = True
    exactness = "exact"
    step_cost = "reading 2 C bytes a view"

    def __init__(
        self,
        logits: Tensor,
        seed: int,
        views: CropViews | ViewRule | None = None,
        temperature: float = 20.0,
        squared: bool = True,
        *,
        loss_kind: str = "kl",
        gamma: float = 0.0,
        calibrate: Sequence[float] | None = None,
        hard: Tensor | None = None,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        self.logits = logits.half()
        if logits.ndim != 3 or not len(logits):
            raise CondenseError(f"per-view logits must be (epochs, images, classes), not {tuple(logits.shape)}")
        if not all(bool(epoch.isfinite().all()) for epoch in self.logits):  # by epoch: the store may exceed the memory
            raise CondenseError("per-view logits are not finite as float16; was the teacher trained?")
        epochs, images, classes = logits.shape
        self._settle(
            (epochs, images, classes), seed, views, temperature, squared, loss_kind, gamma, calibrate, hard,
            statistics, micro,
        )  # fmt: skip

    def _settle(
        self,
        shape: tuple[int, int, int],
        seed: int,
        views: CropViews | ViewRule | None = None,
        temperature: float = 20.0,
        squared: bool = True,
        loss_kind: str = "kl",
        gamma: float = 0.0,
        calibrate: Sequence[float] | None = None,
        hard: Tensor | None = None,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        """All but the logits themselves, which are kept as (E, N, C) = ``shape`` in one way or another."""
        self.shape, self.seed, self.views = shape, seed, ViewRule.of(views)
        self.temperature, self.squared = _temperature(temperature), squared
        self.loss_kind, self.gamma, self.hard = loss_kind, single(gamma), hard
        self.calibrate = None if calibrate is None else tuple(single(x) for x in calibrate)
        self.statistics, self.micro = _check_statistics(statistics, micro)
        check_loss(loss_kind, self.gamma, hard)
        if self.calibrate is not None:
            if loss_kind != "kl":
                raise CondenseError("calibrate: needs distributions to replace; take loss_kind=kl")
            if len(self.calibrate) != 3 or not 0 <= self.calibrate[0] <= self.calibrate[1] <= self.calibrate[2] <= 1:
                raise CondenseError(f"calibrate={self.calibrate}: must be low <= mid <= top between 0 and 1")
        if hard is not None:
            _check_classes(hard, shape[1], shape[2])
        elif self.calibrate is not None:
            raise CondenseError("calibrate: needs the class of each image; give hard")

    def __len__(self) -> int:
        return self.shape[1]

    @property
    def epochs(self) -> int:
        """Stored epochs E, after which views and targets repeat."""
        return self.shape[0]

    def terms(self) -> dict[str, Any]:
        """Everything that the labels follow from besides the logits, as keywords of this class."""
        return {
            "seed": self.seed, "views": self.views, "temperature": self.temperature, "squared": self.squared,
            "loss_kind": self.loss_kind, "gamma": self.gamma, "calibrate": self.calibrate, "hard": self.hard,
            "statistics": self.statistics, "micro": self.micro or 8,
        }  # fmt: skip

    def targets(self, ids: Tensor) -> Tensor:
        raise _of_views(self)

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, ids, drawn, logits = self._found(images, ids, epoch)
        if self.loss_kind == "mse":
            return views, torch.stack([logits, self._truth(ids, drawn)], 1) if self.gamma else logits
        targets = (logits / self.temperature_at(epoch)).softmax(-1)
        if self.calibrate is not None:
            low, mid, top = self.calibrate
            sure = logits.softmax(-1).amax(-1, keepdim=True)
            truth = self._truth(ids, drawn)
            smoothed = (1 - SMOOTHING) * truth + SMOOTHING / (truth.shape[1] - 1) * (1 - truth)
            targets = torch.where(sure < mid, smoothed, targets).where((sure >= low) & (sure <= top), 0.0)
        return views, targets

    def temperature_at(self, epoch: int) -> float:
        """T of the targets in a student's ``epoch``."""
        return self.temperature

    def _found(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, MixedViews, Tensor]:
        """Views of the images, the ids on their device, what was drawn for the epoch, and float32 logits (B, C)."""
        epoch %= self.epochs
        views, ids, drawn = _views(self, images, ids, epoch)
        return views, ids, drawn, self._read(torch.full_like(ids, epoch), ids).to(images.device)

    def _read(self, epochs: Tensor, ids: Tensor) -> Tensor:
        """Stored logits, float32 (B, C), of images ``ids`` (B,) in stored epochs ``epochs`` (B,)."""
        where = self.logits.device
        return self.logits[epochs.to(where), ids.to(where)].float()

    def _truth(self, ids: Tensor, drawn: MixedViews) -> Tensor:
        """The classes of views, float32 (B, C): one, or two with their shares."""
        assert self.hard is not None
        own = F.one_hot(self.hard.to(ids.device), self.shape[2]).float()
        return mixed(own, ids, drawn)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss_kind == "kl":
            return _kl(logits, targets, self.temperature, self.squared)
        return _squares(logits, targets, self.gamma)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"logits": self.logits.detach().cpu().numpy(), **self._settled()}

    def _settled(self) -> dict[str, np.ndarray]:
        """The arrays of :meth:`terms`; :func:`_terms_from` reads them."""
        arrays: dict[str, np.ndarray] = {
            "loss": np.array([self.temperature, self.gamma], np.float32),
            "flags": np.array([self.squared, LOSSES.index(self.loss_kind)], np.uint8),
            **_rule_arrays(self.views, self.seed, self.statistics, self.micro),
        }
        if self.calibrate is not None:
            arrays["calibrate"] = np.array(self.calibrate, np.float32)
        if self.hard is not None:
            arrays["hard"] = self.hard.cpu().numpy()
        return arrays

    def nbytes(self) -> int:
        """2 E N C, some bytes that the views and the loss follow from, and 8 N where the classes are needed."""
        return _nbytes(self.arrays())

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> PerViewLabels:
        return _moved(self, device, "logits", "hard")

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> PerViewLabels:
        logits = view_answers(
            teacher, images, self.epochs, self.views, seed,
            classes=self.shape[2], statistics=self.statistics, micro=self.micro,
        )  # fmt: skip
        hard = None if self.hard is None else _classes(images, teacher, hard)
        return PerViewLabels(logits.to(images.device), **{**self.terms(), "seed": seed, "hard": hard})

    def rule(self) -> str:
        loss = f"{self.loss_kind}, T={self.temperature}, squared={self.squared}, gamma={self.gamma}"
        return f"{self.epochs} epochs of {self.views}, {_asked(self)}, {loss}, calibrate={self.calibrate}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> PerViewLabels:
        logits = torch.from_numpy(_array(arrays, "logits", np.float16, (None, None, classes)))
        return cls(logits, **_terms_from(arrays, classes))


class TeacherLabels:
    """Teachers that are asked in each step, on the very views that the student sees. Nothing is stored but themselves.

    The target is softmax(logits / T), float32 (B, C), of their mean logits; the loss its KL divergence to the student's
    softmax at T. The file holds the networks' weights, which count as bytes of the labels; where they cannot be built
    from a name (``names`` is empty) they count as external and the labels cannot be stored.

    Every epoch has views of its own. With ``statistics="batch"`` BatchNorm normalises by the views that are asked for
    together, ``micro`` at a time in their order (BSSL, CV-DD), so that targets depend on the student's batch.

    Args:
        members: one network or several of the same classes; put into eval mode.
        images: N, how many images the labels are for.
        seed: of the views.
        views: how they are drawn; crops with CutMix when None.
        temperature: T of the targets and the loss, kept as its float32 neighbour prints.
        squared: multiply the loss by T^2.
        weights: of the members' logits; equal when None. They are divided by their sum.
        names: of the members' architectures, as :func:`condense.networks.build` takes them.
        shape: (C,H,W) of the images that they were built for; needed with names.
        statistics: ``running`` or ``batch``.
        micro: views that BatchNorm normalises together.

    Raises:
        CondenseError: a value that cannot be, or numbers of members, weights and names that differ.
    """

    kind = "teacher"
    per_view = True
    exactness = "exact"
    step_cost = "a forward pass of the teachers"

    def __init__(
        self,
        members: nn.Module | Sequence[nn.Module],
        images: int,
        seed: int,
        views: CropViews | ViewRule | None = None,
        temperature: float = 20.0,
        squared: bool = True,
        *,
        weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
        shape: networks.Shape | None = None,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        members = [members] if isinstance(members, nn.Module) else list(members)
        self.teacher = MeanLogits(members, weights).eval()
        self._settle(images, seed, views, temperature, squared, statistics, micro)
        self.names, self.shape = tuple(names), shape
        if names and (len(names) != len(members) or shape is None):
            raise CondenseError(f"{len(members)} teachers but {len(names)} names, images of {shape}: give all of them")

    def _settle(
        self,
        images: int,
        seed: int,
        views: CropViews | ViewRule | None,
        temperature: float,
        squared: bool,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        """All but the teachers."""
        self.images, self.seed = images, seed
        self.views = ViewRule(mix="cutmix") if views is None else ViewRule.of(views)
        self.temperature, self.squared = _temperature(temperature), squared
        self.statistics, self.micro = _check_statistics(statistics, micro)

    def __len__(self) -> int:
        return self.images

    def targets(self, ids: Tensor) -> Tensor:
        raise _of_views(self)

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, _, _ = _views(self, images, ids, epoch)
        logits = answers(self.teacher, views, statistics=self.statistics, micro=self.micro)
        return views, (logits / self.temperature).softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _kl(logits, targets, self.temperature, self.squared)

    def arrays(self) -> dict[str, np.ndarray]:
        if not self.names:
            raise CondenseError("the teachers of these labels cannot be stored: give the names of their architectures")
        known = json.dumps({"names": self.names, "shape": self.shape}).encode()
        return {**self._settings(), "networks": np.frombuffer(known, np.uint8), **self._members()}

    def _settings(self) -> dict[str, np.ndarray]:
        return {
            "images": np.array([self.images], np.int64),
            "loss": np.array([self.temperature], np.float32),
            "flags": np.array([self.squared], np.uint8),
            **_rule_arrays(self.views, self.seed, self.statistics, self.micro),
        }

    def _members(self) -> dict[str, np.ndarray]:
        """Weights and buffers, ``member0.NAME`` and so on, and the weights of the members' logits."""
        arrays = {"weights": self.teacher.weights.cpu().numpy()}
        for k, member in enumerate(self.teacher.members):
            arrays |= {f"member{k}.{name}": x.detach().cpu().numpy() for name, x in member.state_dict().items()}
        return arrays

    def nbytes(self) -> int:
        """The networks' weights and buffers as they are, and some bytes that the views and the loss follow from."""
        return _nbytes(self.arrays() if self.names else self._settings())

    def external_nbytes(self) -> int:
        return 0 if self.names else _nbytes(self._members())

    def to(self, device: torch.device) -> TeacherLabels:
        if self.teacher.weights.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved.teacher = copy.deepcopy(self.teacher).to(device)
        return moved

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> TeacherLabels:
        return type(self)(
            teacher, len(images), seed, self.views, self.temperature, self.squared,
            statistics=self.statistics, micro=self.micro,
        )  # fmt: skip

    def rule(self) -> str:
        return f"{self.views}, {_asked(self)}, T={self.temperature}, squared={self.squared}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> TeacherLabels:
        views, seed, statistics, micro = _rule_from(arrays)
        count = _count(arrays)
        (temperature,) = _array(arrays, "loss", np.float32, (1,)).tolist()
        (squared,) = _array(arrays, "flags", np.uint8, (1,)).tolist()
        names, shape = _known_networks(_array(arrays, "networks", np.uint8, (None,)).tobytes())
        members = []
        for k, name in enumerate(names):
            head = f"member{k}."
            state = {key[len(head) :]: torch.from_numpy(np.asarray(x)) for key, x in arrays.items()
                     if key.startswith(head)}  # fmt: skip
            with rng.seeded("layout"):
                network = networks.build(name, shape, classes)
            try:
                network.load_state_dict(state)
            except RuntimeError as fault:
                raise CondenseError(f"labels/{head}*: not the weights of {name}; copy or make the set again") from fault
            members.append(network)
        weights = torch.from_numpy(_array(arrays, "weights", np.float32, (len(names),)))
        if not bool((weights >= 0).all()) or not math.isclose(float(weights.sum()), 1, abs_tol=1e-3):
            raise CondenseError(f"labels/weights must be shares of 1, not {weights.tolist()}")
        made = cls(
            members, count, seed, views, temperature, bool(squared),
            names=names, shape=shape, statistics=statistics, micro=micro,
        )  # fmt: skip
        made.teacher.weights.copy_(weights)  # as they are: another division would round them
        return made


class StaticLabels:
    """One vector of logits z per image; a view that is mixed of images i and j is asked for softmax((lambda z_i +
    (1 - lambda) z_j) / T), mixed before softening, whatever its crop and mirror (INFER, Zhang et al., ICLR 2025).

    The loss is the KL divergence to the student's softmax at T. Every epoch has views of its own. Published: z is the
    mean logits of several teachers in eval mode on the image itself, T = 30, MixUp Beta(.8, .8), shifts by up to 4
    pixels on small images, no T^2.

    Args:
        logits: (N, C); float16 is stored as it is, anything else as float32.
        seed: of the views.
        views: how they are drawn; those just named when None.
        temperature: T, kept as its float32 neighbour prints.
        squared: multiply the loss by T^2.

    Raises:
        CondenseError: a value that cannot be, logits of another shape or not finite.
    """

    kind = "static"
    per_view = True
    exactness = "approximate"
    step_cost = "reading one or two vectors a view"

    def __init__(
        self,
        logits: Tensor,
        seed: int,
        views: CropViews | ViewRule | None = None,
        temperature: float = 30.0,
        squared: bool = False,
    ) -> None:
        self.logits = logits if logits.dtype == torch.float16 else logits.float()
        self.seed, self.temperature, self.squared = seed, _temperature(temperature), squared
        self.views = ViewRule(pad=4, mix="mixup", alpha=0.8) if views is None else ViewRule.of(views)
        if logits.ndim != 2:
            raise CondenseError(f"static logits must be (images, classes), not {tuple(logits.shape)}")
        if not bool(self.logits.isfinite().all()):
            raise CondenseError(f"static logits are not finite as {self.logits.dtype}; was the teacher trained?")

    def __len__(self) -> int:
        return len(self.logits)

    def targets(self, ids: Tensor) -> Tensor:
        """Distributions at T of whole images without mixing, float32 (..., C)."""
        return (self.logits[ids].float() / self.temperature).softmax(-1)

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, ids, drawn = _views(self, images, ids, epoch)
        logits = mixed(self.logits.to(images.device).float(), ids, drawn)
        return views, (logits / self.temperature).softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _kl(logits, targets, self.temperature, self.squared)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "logits": self.logits.detach().cpu().numpy(),
            "loss": np.array([self.temperature], np.float32),
            "flags": np.array([self.squared], np.uint8),
            **_rule_arrays(self.views, self.seed),
        }

    def nbytes(self) -> int:
        """2 or 4 N C, and some bytes that the views and the loss follow from."""
        return _nbytes(self.arrays())

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> StaticLabels:
        return _moved(self, device, "logits")

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> StaticLabels:
        logits = answers(teacher, images).to(self.logits.dtype)
        return StaticLabels(logits, seed, self.views, self.temperature, self.squared)

    def rule(self) -> str:
        return f"{self.logits.dtype} of the image, {self.views}, T={self.temperature}, squared={self.squared}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> StaticLabels:
        views, seed, _, _ = _rule_from(arrays)
        (temperature,) = _array(arrays, "loss", np.float32, (1,)).tolist()
        (squared,) = _array(arrays, "flags", np.uint8, (1,)).tolist()
        kind = np.float16 if arrays["logits"].dtype == np.float16 else np.float32
        logits = torch.from_numpy(_array(arrays, "logits", kind, (None, classes)))
        return cls(logits, seed, views, temperature, bool(squared))


class DistanceLabels:
    """Two numbers per view: how surprised a teacher is by the class of either image in it (NRR-DD's distance-based
    representative, CVPR 2025).

    Stored is float16 (E, N, 2), (-log p_i, -log p_j) of the teacher at T = 1, where i and j are the classes of the
    image and of its partner; epoch e shows the views of epoch e modulo E. The student's loss is its cross-entropy with
    the classes, shared as the view is, plus ``weight`` times |d_i - d_i^T| + |d_j - d_j^T|. Targets are float32 (B, 5):
    class, partner's class, share, and the teacher's two distances. No code is public: the form and the weight are a
    reconstruction.

    Args:
        distances: (E, N, 2) of any floating dtype, as :func:`view_distances` gives them.
        hard: int64 (N,), class of each image.
        classes: C.
        seed: of the views.
        views: how they are drawn, with mixing; crops with CutMix when None.
        weight: of the distances in the loss.
        statistics: how the teacher's BatchNorm normalised, see :func:`view_answers`.
        micro: views that it normalised together.

    Raises:
        CondenseError: a value that cannot be, distances of another shape or not finite as float16.
    """

    kind = "distances"
    per_view = True
    exactness = "approximate"
    step_cost = "reading 4 bytes a view"

    def __init__(
        self,
        distances: Tensor,
        hard: Tensor,
        classes: int,
        seed: int,
        views: ViewRule | None = None,
        weight: float = 1.0,
        *,
        statistics: str = "running",
        micro: int = 8,
    ) -> None:
        self.distances, self.hard, self.classes = distances.half(), hard.long(), classes
        self.seed, self.weight, self.views = seed, single(weight), views or ViewRule(mix="cutmix")
        self.statistics, self.micro = _check_statistics(statistics, micro)
        if distances.ndim != 3 or not len(distances) or distances.shape[2] != 2:
            raise CondenseError(f"distances must be (epochs, images, 2), not {tuple(distances.shape)}")
        if not all(bool(epoch.isfinite().all()) for epoch in self.distances):
            raise CondenseError("distances are not finite as float16; was the teacher trained?")
        if self.views.mix == "none":
            raise CondenseError("mix=none: distances are to the classes of two images; take mix=cutmix or mixup")
        if not 0 <= self.weight < math.inf:
            raise CondenseError(f"weight={weight:g}: must be at least 0 and finite")
        _check_classes(self.hard, distances.shape[1], classes)

    def __len__(self) -> int:
        return self.distances.shape[1]

    @property
    def epochs(self) -> int:
        """Stored epochs E, after which views and targets repeat."""
        return len(self.distances)

    def targets(self, ids: Tensor) -> Tensor:
        raise _of_views(self)

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        epoch %= self.epochs
        views, ids, drawn = _views(self, images, ids, epoch)
        assert drawn.partner is not None and drawn.share is not None
        hard = self.hard.to(images.device)
        two = torch.stack([hard[ids], hard[drawn.partner[ids]]], 1).float()
        stored = self.distances[epoch][ids.to(self.distances.device)].to(images.device).float()
        return views, torch.cat([two, drawn.share[ids, None], stored], 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        distances = -F.log_softmax(logits, -1).gather(1, targets[:, :2].long())
        share = targets[:, 2]
        entropy = share * distances[:, 0] + (1 - share) * distances[:, 1]
        return (entropy + self.weight * (distances - targets[:, 3:]).abs().sum(1)).mean()

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "distances": self.distances.detach().cpu().numpy(),
            "hard": self.hard.cpu().numpy(),
            "loss": np.array([self.weight], np.float32),
            **_rule_arrays(self.views, self.seed, self.statistics, self.micro),
        }

    def nbytes(self) -> int:
        """4 E N, 8 N for the classes, and some bytes that the views and the loss follow from."""
        return _nbytes(self.arrays())

    def external_nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> DistanceLabels:
        return _moved(self, device, "distances", "hard")

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> DistanceLabels:
        hard = _classes(images, teacher, hard)
        distances = view_distances(
            teacher, images, hard, self.epochs, self.views, seed,
            classes=self.classes, statistics=self.statistics, micro=self.micro,
        )  # fmt: skip
        return DistanceLabels(
            distances.to(images.device), hard, self.classes, seed, self.views, self.weight,
            statistics=self.statistics, micro=self.micro,
        )  # fmt: skip

    def rule(self) -> str:
        return f"{self.epochs} epochs of {self.views}, {_asked(self)}, weight={self.weight}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> DistanceLabels:
        views, seed, statistics, micro = _rule_from(arrays)
        distances = torch.from_numpy(_array(arrays, "distances", np.float16, (None, None, 2)))
        (weight,) = _array(arrays, "loss", np.float32, (1,)).tolist()
        return cls(
            distances, _classes_from(arrays, classes), classes, seed, views, weight, statistics=statistics, micro=micro
        )


# What they share ------------------------------------------------------------------------------------------------------


class MeanLogits(nn.Module):
    """The weighted mean of several networks' logits, float32 (B, classes). ``weights`` are equal when None.

    Raises:
        CondenseError: there are no networks, or not as many weights of at least 0, or all are 0.
    """

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        shares = [1.0] * len(members) if weights is None else [float(weight) for weight in weights]
        if not members or len(shares) != len(members) or min(shares) < 0 or not 0 < sum(shares) < math.inf:
            raise CondenseError(f"weights {shares} of {len(members)} teachers: give one of at least 0 for each")
        self.weights: Tensor
        weighed = torch.tensor([share / sum(shares) for share in shares], device=device_of(self.members))
        self.register_buffer("weights", weighed)

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([member(images).float() for member in self.members])
        return (self.weights[:, None, None] * logits).sum(0)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are; the CPU where it has none."""
    return next((value.device for value in module.state_dict().values()), torch.device("cpu"))


def _kl(logits: Tensor, targets: Tensor, temperature: float | Tensor, squared: bool) -> Tensor:
    """KL divergence of targets (B, C) to softmax(logits / T): the mean over rows of targets that are not all 0."""
    rows = targets.flatten(1).any(1).sum().clamp(min=1)
    loss = F.kl_div(F.log_softmax(logits / temperature, -1), targets, reduction="sum") / rows
    return loss * temperature**2 if squared else loss


def check_loss(loss_kind: str, gamma: float, hard: Tensor | None) -> None:
    """Refuses a loss of views that cannot be."""
    if loss_kind not in LOSSES:
        raise CondenseError(f"loss_kind={loss_kind}: unknown{did_you_mean(loss_kind, LOSSES)}")
    if not 0 <= gamma < math.inf:
        raise CondenseError(f"gamma={gamma:g}: must be at least 0 and finite")
    if loss_kind == "kl" and gamma:
        raise CondenseError(f"gamma={gamma:g}: weighs the classes in loss_kind=mse; leave it out or take that")
    if gamma and hard is None:
        raise CondenseError("gamma: needs the class of each image; give hard")


def _squares(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Mean squared difference to logits (B, C); where gamma is not 0 targets are (B, 2, C), logits and classes, and
    gamma times the cross-entropy with these is added."""
    if not gamma:
        return F.mse_loss(logits, targets)
    return F.mse_loss(logits, targets[:, 0]) + gamma * F.cross_entropy(logits, targets[:, 1])


def _temperature(value: float) -> float:
    temperature = single(value)
    if not 0 < temperature < math.inf:
        raise CondenseError(f"temperature={value:g}: must be above 0 and finite")
    return temperature


def _check_statistics(statistics: str, micro: int) -> tuple[str, int]:
    """Both, if they can be; ``micro`` is 0 where it has no say, so that equal rules read equal."""
    if statistics not in STATISTICS:
        raise CondenseError(f"statistics={statistics}: unknown{did_you_mean(statistics, STATISTICS)}")
    if statistics == "batch" and micro < 2:
        raise CondenseError(f"micro={micro}: one view has no statistics of a batch; take at least 2")
    return statistics, micro if statistics == "batch" else 0


def _asked(labels: Any) -> str:
    return f"statistics={labels.statistics}, micro={labels.micro}"


def _of_views(labels: Labels) -> CondenseError:
    return CondenseError(
        f"{labels.kind} labels belong to augmented views, not to images: iterate "
        "`for images, targets in set.batches(epoch, batch_size)` and use `set.loss(logits, targets)`"
    )


def _check_count(images: Tensor, labels: Labels) -> None:
    if len(images) != len(labels):
        raise CondenseError(f"{len(images)} images but {len(labels)} {labels.kind} labels; give those of their set")


def _views(labels: Any, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, MixedViews]:
    """The views of images ``ids``, the ids on the device of the images, and all that was drawn for the epoch."""
    _check_count(images, labels)
    size = (images.shape[2], images.shape[3])
    drawn = _drawn(labels.views, labels.seed, epoch, len(images), size, images.device)
    ids = ids.to(images.device)
    return labels.views.apply(images, ids, drawn), ids, drawn


@functools.lru_cache(maxsize=16)
def _drawn(
    views: ViewRule, seed: int, epoch: int, rows: int, size: tuple[int, int], device: torch.device
) -> MixedViews:
    """The views of a whole epoch, kept from batch to batch."""
    return views.draw(seed, epoch, rows, size).to(device)


def mixed(values: Tensor, ids: Tensor, drawn: MixedViews) -> Tensor:
    """Rows ``ids`` of ``values`` (N, C), mixed with those of their partners as the views are."""
    if drawn.partner is None or drawn.share is None:
        return values[ids]
    share = drawn.share[ids, None]
    return share * values[ids] + (1 - share) * values[drawn.partner[ids]]


def _classes(images: Tensor, teacher: nn.Module, hard: Tensor | None) -> Tensor:
    """``hard``, or the classes that the teacher finds likeliest."""
    return answers(teacher, images).argmax(1) if hard is None else hard.to(images.device).long()


def _check_classes(hard: Tensor, count: int, classes: int) -> None:
    if hard.dtype != torch.int64 or hard.shape != (count,):
        raise CondenseError(f"hard: must be int64 ({count},), the class of each image, not {hard.dtype} "
                            f"{tuple(hard.shape)}")  # fmt: skip
    if count and not 0 <= int(hard.min()) <= int(hard.max()) < classes:
        raise CondenseError(f"hard: classes {int(hard.min())} to {int(hard.max())} are outside 0..{classes - 1}")


def _moved(labels: Any, device: torch.device, *names: str) -> Any:
    """A copy whose tensors ``names`` are on ``device``."""
    moved = copy.copy(labels)
    for name in names:
        tensor = getattr(labels, name)
        setattr(moved, name, tensor if tensor is None else tensor.to(device))
    return moved


def _nbytes(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


# Arrays from a file are data of a stranger: each is checked for type and shape before it is used.


def _array(arrays: Mapping[str, np.ndarray], name: str, kind: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """The array ``name``, which must be of this type and shape (None: any size)."""
    array = arrays[name]
    fits = array.ndim == len(shape) and all(wanted in (None, size) for wanted, size in zip(shape, array.shape))
    if array.dtype != kind or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise CondenseError(f"labels/{name} must be {np.dtype(kind)} ({wanted}), not {array.dtype} {array.shape}")
    return array


def _count(arrays: Mapping[str, np.ndarray]) -> int:
    """How many images labels say that they are for."""
    (count,) = _array(arrays, "images", np.int64, (1,)).tolist()
    if count < 0:
        raise CondenseError(f"labels/images must be at least 0, not {count}")
    return int(count)


def _classes_from(arrays: Mapping[str, np.ndarray], classes: int) -> Tensor:
    labels = _array(arrays, "hard", np.int64, (None,))
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise CondenseError(f"labels/hard has values outside 0..{classes - 1}")
    return torch.from_numpy(labels)


def _rule_arrays(views: ViewRule, seed: int, statistics: str = "running", micro: int = 0) -> dict[str, np.ndarray]:
    """What the views follow from, and how the teacher was asked: its micro-batch, 0 with running statistics."""
    return {
        "draws": np.array([seed, rng.HASH_VERSION, micro if statistics == "batch" else 0], np.int64),
        "views": np.array([views.min_scale, views.max_scale, views.alpha], np.float32),
        "choices": np.array([views.flip, views.pad, MIXES.index(views.mix)], np.uint8),
    }


def _rule_from(arrays: Mapping[str, np.ndarray]) -> tuple[ViewRule, int, str, int]:
    """Views, seed, statistics and micro-batch of :func:`_rule_arrays`."""
    seed, version, micro = _array(arrays, "draws", np.int64, (3,)).tolist()
    if version != rng.HASH_VERSION:
        raise CondenseError(
            f"labels/draws: views of version {version} of the draws, this is {rng.HASH_VERSION}; "
            "use the condense-toolkit that the set was made with"
        )
    low, high, alpha = _array(arrays, "views", np.float32, (3,)).tolist()
    flip, pad, mix = _array(arrays, "choices", np.uint8, (3,)).tolist()
    if flip > 1 or mix >= len(MIXES):
        raise CondenseError(f"labels/choices has values that no view has ({flip}, {pad}, {mix})")
    return ViewRule(low, high, bool(flip), pad, MIXES[mix], alpha), seed, STATISTICS[micro != 0], micro


def _terms_from(arrays: Mapping[str, np.ndarray], classes: int) -> dict[str, Any]:
    """What :meth:`PerViewLabels.terms` gave."""
    views, seed, statistics, micro = _rule_from(arrays)
    temperature, gamma = _array(arrays, "loss", np.float32, (2,)).tolist()
    squared, loss = _array(arrays, "flags", np.uint8, (2,)).tolist()
    if squared > 1 or loss >= len(LOSSES):
        raise CondenseError(f"labels/flags must be 0 or 1, not {squared} and {loss}")
    return {
        "seed": seed, "views": views, "temperature": temperature, "squared": bool(squared),
        "loss_kind": LOSSES[loss], "gamma": gamma, "statistics": statistics, "micro": micro,
        "calibrate": _array(arrays, "calibrate", np.float32, (3,)).tolist() if "calibrate" in arrays else None,
        "hard": _classes_from(arrays, classes) if "hard" in arrays else None,
    }  # fmt: skip


def _known_networks(text: bytes) -> tuple[list[str], networks.Shape]:
    """Names and image shape of the teachers in a file."""
    try:
        known = json.loads(text)
        names, (channels, height, width) = known["names"], known["shape"]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("no names")
        return names, (int(channels), int(height), int(width))
    except (ValueError, KeyError, TypeError) as fault:
        raise CondenseError("labels/networks does not name the teachers; copy or make the set again") from fault


# Asking a teacher -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _answering(teacher: nn.Module, statistics: str) -> Iterator[None]:
    """The teacher in eval mode, for ``statistics="batch"`` with BatchNorm by the batch, and running statistics that
    stay as they are."""
    teacher.eval()
    norms = [m for m in teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if statistics == "running" or not norms:
        yield
        return
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, before in zip(norms, tracked):
            norm.training, norm.track_running_stats = False, before


def _parts(rows: Tensor, size: int) -> list[Tensor]:
    """Consecutive parts of ``size`` rows; a last single one, which has no statistics, joins the part before it."""
    parts = list(rows.split(size))
    return [*parts[:-2], torch.cat(parts[-2:])] if len(parts) > 1 and len(parts[-1]) == 1 else parts


@torch.no_grad()
def answers(
    teacher: nn.Module, images: Tensor, *, statistics: str = "running", micro: int = 8, batch_size: int = 256
) -> Tensor:
    """The teacher's logits, float32 (N, classes), on images (N,C,H,W) as they are; it is left in eval mode.

    Args:
        teacher: images in training space, on its device, to logits.
        images: what it sees.
        statistics: ``running``, or ``batch``: BatchNorm by each micro-batch, without dropout (BSSL).
        micro: images of a micro-batch, consecutive; a last single one joins those before it.
        batch_size: images at once with running statistics.
    """
    batches = _parts(images, micro) if statistics == "batch" else images.split(batch_size)
    with _answering(teacher, statistics):
        return torch.cat([teacher(batch).float() for batch in batches])


def view_answers(
    teacher: nn.Module,
    images: Tensor,
    epochs: int,
    views: ViewRule,
    seed: int,
    *,
    classes: int,
    statistics: str = "running",
    micro: int = 8,
    batch_size: int = 256,
    start: int = 0,
    into: Any = None,
    report: Callable[[int], None] | None = None,
    quiet: bool = True,
) -> Tensor:
    """The teacher's logits on the views of a whole set, float16 (epochs, N, classes) on the CPU, epoch by epoch.

    Args:
        teacher: images in training space, on its device, to logits; left in eval mode.
        images: (N,C,H,W), the whole set.
        epochs: passes over the set, each with views of its own.
        views: how they are drawn.
        seed: of the views.
        classes: number of logits that the teacher must give.
        statistics: ``running``: the teacher as in any test. ``batch``: its BatchNorm normalises each micro-batch by its
            own statistics, running ones are left as they are, dropout is off (BSSL of CV-DD, whose release leaves
            dropout on). Micro-batches are consecutive parts of a permutation drawn for each epoch by ``seed``.
        micro: views of a micro-batch; a last single view joins the batch before it.
        batch_size: views at once with running statistics; of no consequence but for rounding.
        start: first epoch to label; those before are in ``into``.
        into: float16 (epochs, N, classes), a ``numpy.memmap`` or an HDF5 dataset open for writing, that takes each
            epoch when it is done, so that memory need hold one only and a run that was cut short goes on from
            ``start``. An HDF5 dataset is read whole at the end.
        report: called with the number of epochs that are done, after each.
        quiet: show no progress.

    Raises:
        CondenseError: answers that are no such logits or not finite as float16, or an ``into`` or ``start`` that does
            not fit.
    """
    how = _Asking(statistics, micro, batch_size, start, into, report, quiet)
    return _each_view(teacher, images, epochs, views, seed, classes, how, classes, lambda logits, ids, drawn: logits)


def view_distances(
    teacher: nn.Module,
    images: Tensor,
    hard: Tensor,
    epochs: int,
    views: ViewRule,
    seed: int,
    *,
    classes: int,
    **how: Any,
) -> Tensor:
    """-log of the teacher's probabilities of the classes of both images in each view, float16 (epochs, N, 2) on the
    CPU: what :class:`DistanceLabels` store. ``hard`` (N,) are the images' classes, ``views`` mix; the rest is as for
    :func:`view_answers`, ``into`` being (epochs, N, 2)."""

    def distances(logits: Tensor, ids: Tensor, drawn: MixedViews) -> Tensor:
        assert drawn.partner is not None
        known = hard.to(logits.device)
        two = torch.stack([known[ids], known[drawn.partner[ids]]], 1)
        return -F.log_softmax(logits, -1).gather(1, two)

    return _each_view(teacher, images, epochs, views, seed, classes, _Asking(**how), 2, distances)


@torch.no_grad()
def epoch_answers(
    teacher: nn.Module,
    images: Tensor,
    views: ViewRule,
    seed: int,
    epoch: int,
    *,
    classes: int,
    statistics: str = "running",
    micro: int = 8,
    batch_size: int = 256,
    wanted: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, MixedViews]]:
    """The teacher's logits on the views of one epoch, part by part: rows of the images, int64 (B,) on the CPU, logits
    float32 (B, classes), and all that was drawn for the epoch.

    ``wanted`` (N,) marks rows that matter, all when None. No others are asked for with running statistics; with those
    of the batch, whose others have a say, only micro-batches without any are left out. The rest is as for
    :func:`view_answers`.

    Raises:
        CondenseError: answers that are no such logits.
    """
    statistics, micro = _check_statistics(statistics, micro)
    drawn = _drawn(views, seed, epoch, len(images), (images.shape[2], images.shape[3]), images.device)
    if statistics == "batch":
        parts = _parts(rng.Draws(seed, "label-batch", epoch).permutation(len(images)), micro)
        parts = parts if wanted is None else [part for part in parts if bool(wanted[part].any())]
    else:
        rows = torch.arange(len(images)) if wanted is None else wanted.nonzero()[:, 0]
        parts = list(rows.split(batch_size))
    for part in parts:
        ids = part.to(images.device)
        logits = answers(
            teacher, views.apply(images, ids, drawn), statistics=statistics, micro=len(ids), batch_size=len(ids)
        )
        if logits.shape != (len(ids), classes):
            raise CondenseError(f"the teacher answers {tuple(logits.shape)}, not ({len(ids)}, {classes}) logits")
        yield part, logits, drawn


@dataclass(frozen=True)
class _Asking:
    """How a teacher is taken through the views; see :func:`view_answers`."""

    statistics: str = "running"
    micro: int = 8
    batch_size: int = 256
    start: int = 0
    into: Any = None
    report: Callable[[int], None] | None = None
    quiet: bool = True


@torch.no_grad()
def _each_view(
    teacher: nn.Module,
    images: Tensor,
    epochs: int,
    views: ViewRule,
    seed: int,
    classes: int,
    how: _Asking,
    width: int,
    keep: Callable[[Tensor, Tensor, MixedViews], Tensor],
) -> Tensor:
    """``keep(logits, ids, drawn)`` (B, width) of every view, float16 (epochs, N, width)."""
    shape = (epochs, len(images), width)
    into = np.empty(shape, np.float16) if how.into is None else how.into
    if tuple(into.shape) != shape or into.dtype != np.float16:
        raise CondenseError(f"into: must be float16 {shape} to take the labels, not {into.dtype} {tuple(into.shape)}")
    if not 0 <= how.start <= (epochs if how.into is not None else 0):
        raise CondenseError(f"start={how.start}: of {epochs} epochs, those before it must be in into")
    progress = Progress("relabel", epochs, how.start, how.quiet)
    asked: dict[str, Any] = {"statistics": how.statistics, "micro": how.micro, "batch_size": how.batch_size}
    for epoch in range(how.start, epochs):
        done = torch.empty(shape[1:], dtype=torch.float16)
        for part, logits, drawn in epoch_answers(teacher, images, views, seed, epoch, classes=classes, **asked):
            done[part] = keep(logits, part.to(images.device), drawn).to("cpu", torch.float16)
        if not bool(done.isfinite().all()):
            raise CondenseError("the teacher's answers are not finite as float16; was it trained?")
        into[epoch] = done.numpy()
        if hasattr(into, "flush"):
            into.flush()  # what a kill must not lose
        progress.update(epoch + 1)
        if how.report is not None:
            how.report(epoch + 1)
    progress.close()
    return torch.from_numpy(into if isinstance(into, np.ndarray) else into[()])


@contextlib.contextmanager
def stored_answers(
    path: Path, state: Path, key: Sequence[Any], shape: tuple[int, int, int], stop: Callable[[], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Where labels of views go while they are made, as keywords of :func:`view_answers`: into a file, so that memory
    holds one epoch, and who was killed goes on with the epoch that was not done. The caller removes both files.

    Args:
        path: .npy of float16 ``shape``.
        state: JSON that says how many epochs are done, and of what.
        key: strings and numbers that the labels follow from; of another key the files are begun anew.
        shape: (records, images, width).
        stop: called after each epoch, when it is on disk; may raise.

    Raises:
        CondenseError: the files cannot be written, or the disk has no room for them.
    """
    from condense.distilled import check_writable, replacing

    key = [*key, *shape, rng.HASH_VERSION]
    start, into = 0, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what cannot be read is begun anew
        known = json.loads(state.read_text())
        if known["key"] == key:
            into = np.lib.format.open_memmap(path, "r+")
            start = int(known["epochs"]) if (into.shape, into.dtype) == (shape, np.float16) else 0
    if not start:
        state.unlink(missing_ok=True)  # it must not speak of what comes now
        check_writable(path, force=True, size=2 * math.prod(shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        into = np.lib.format.open_memmap(path, "w+", np.float16, shape)

    def report(done: int) -> None:
        with replacing(state) as temporary:
            temporary.write_text(json.dumps({"key": key, "epochs": done}))
        if stop is not None:
            stop()

    yield {"into": into, "start": start, "report": report}


def content(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def relabel(
    distilled: DistilledSet,
    teacher: nn.Module,
    epochs: int,
    seed: int = 0,
    *,
    views: CropViews | ViewRule | None = None,
    temperature: float = 20.0,
    squared: bool = True,
    loss_kind: str = "kl",
    gamma: float = 0.0,
    calibrate: Sequence[float] | None = None,
    statistics: str = "running",
    micro: int = 8,
    batch_size: int = 256,
    start: int = 0,
    into: Any = None,
    quiet: bool = True,
    description: str | None = None,
    teacher_seconds: float | None = None,
) -> DistilledSet:
    """The same images with a teacher's logits on ``epochs`` stored epochs of augmented views (FKD, SRe2L's relabel).

    Needs 2 * epochs * images * classes bytes. The teacher works in the set's training space, on its own device, and is
    left in eval mode; inside ``torch.autocast`` it works in that precision. The manifest loses the protocol and the
    learned rate of the old labels, and the name ends in ``.relabelled``.

    Args:
        distilled: a set without decode stages that cut stored images up.
        teacher: images (B,C,H,W) in training space to logits (B, classes).
        epochs: passes over the set with views of their own; students start again after them.
        seed: of the views.
        views: how they are drawn; when None crops of 8 % to 100 %, mirrored only where the set's classes allow it.
        temperature: T of targets and loss.
        squared, loss_kind, gamma, calibrate: see :class:`PerViewLabels`.
        statistics, micro, batch_size, start, into, quiet: see :func:`view_answers`.
        description: what the manifest calls the teacher; its class when None. A digest of its weights is added.
        teacher_seconds: what training it took; joins the set's cost with the time of labelling. None: the cost of the
            new set is unknown.

    Raises:
        CondenseError: the set has decode stages, epochs are below 1, the logits do not fit the classes or are not
            finite, or an option that cannot be.
    """
    _check_stages(distilled)
    if epochs < 1:
        raise CondenseError(f"epochs={epochs}: must be at least 1")
    began = time.monotonic()
    device = device_of(teacher)
    images, classes = distilled.training_images()[0].to(device), len(distilled.classes)
    rule = ViewRule(flip=distilled.manifest.get("mirror", True)) if views is None else ViewRule.of(views)
    hard = distilled.hard_labels() if gamma or calibrate is not None else None
    how: dict[str, Any] = {
        "loss_kind": loss_kind, "gamma": gamma, "calibrate": calibrate, "hard": hard, "statistics": statistics,
        "micro": micro,
    }  # fmt: skip
    blank = torch.zeros(1, len(images), classes)
    PerViewLabels(blank, seed, rule, temperature, squared, **how)  # what cannot be is found before the work
    logits = view_answers(
        teacher, images, epochs, rule, seed, classes=classes, statistics=statistics, micro=micro,
        batch_size=batch_size, start=start, into=into, quiet=quiet,
    )  # fmt: skip
    labels = PerViewLabels(logits, seed, rule, temperature, squared, **how)
    seconds = None if teacher_seconds is None else teacher_seconds + time.monotonic() - began
    return relabelled(distilled, labels, teacher, description=description, seconds=seconds)


def relabelled(
    distilled: DistilledSet,
    labels: Labels,
    teacher: nn.Module,
    *,
    description: str | None = None,
    seconds: float | None = None,
) -> DistilledSet:
    """The same images with other labels, and a manifest that claims nothing of the old ones.

    Args:
        distilled: a set, for labels of views without decode stages that cut stored images up.
        labels: one for each stored image, or, where a stage makes images with labels of their own, for each of these.
        teacher: who gave them.
        description: what the manifest calls the teacher; its class when None. A digest of its weights is added.
        seconds: what training the teacher and labelling took; joins the set's cost. None: it is unknown.

    Raises:
        CondenseError: the set has decode stages, or another number of images.
    """
    from condense.distilled import DistilledSet

    if labels.per_view:
        _check_stages(distilled)
    _check_count(distilled.training_images()[0] if distilled.compensated else distilled.stored, labels)
    teachers = {"network": description or type(teacher).__name__, "sha256": content(teacher.state_dict())}
    outdated = ("bytes", "checksums", "protocol", "learned_lr", "label_source", "claim", "command")
    kept = {key: value for key, value in distilled.manifest.items() if key not in outdated}
    cost = prepared(kept.get("cost", {}), seconds)
    manifest = {**kept, "name": tagged(distilled.name, "relabelled"), "cost": cost, "teacher": teachers}
    return DistilledSet(distilled.stored, labels, distilled.transform, manifest)


def prepared(cost: Mapping[str, Any], seconds: float | None) -> dict[str, Any]:
    """A set's cost with seconds of work done for its labels elsewhere; None: it is unknown, and what is unknown stays
    so."""
    known = dict(cost)
    if seconds is None:
        known.pop("seconds", None)
    elif "seconds" in known:
        known["preparation_seconds"] = round(known.get("preparation_seconds", 0.0) + seconds, 2)
    return known


def tagged(name: str, tag: str) -> str:
    """A set's name with one more word in its tag."""
    return name + ("-" if "." in name.rpartition("/")[2] else ".") + tag


def _check_stages(distilled: DistilledSet) -> None:
    if distilled.stages and not distilled.compensated:
        raise CondenseError(f"{distilled.name}: views are labelled by stored image, and this set decodes into more")


_LIGHT = "condense.light_labels"
PROVIDERS: Registry[Any] = Registry(
    "label kind",
    {**dict.fromkeys(("lowrank", "topk", "pool", "teacher-int8"), _LIGHT), "projector": "condense.projectors"},
)
PROVIDERS.add("hard", HardLabels)
PROVIDERS.add("soft", SoftLabels)
PROVIDERS.add("per-view", PerViewLabels)
PROVIDERS.add("teacher", TeacherLabels)
PROVIDERS.add("static", StaticLabels)
PROVIDERS.add("distances", DistanceLabels)
