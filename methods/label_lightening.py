"""Label lightening: the same images with labels that need fewer bytes, and how accuracy and bytes go together.

``lighten`` gives a set labels of another kind. Kinds that code or prune labels of views start from those that are
stored; where there are none, or teachers are named, teachers are asked anew:

========= ========================================================= =======================================
kind      what is kept                                              needs
========= ========================================================= =======================================
lowrank   coefficients in 8 bits on r axes that all views share     stored labels of views, or teachers
topk      the k largest logits of each view (LPQLD)                 stored labels of views, or teachers
pool      few of the labelled epochs, drawn from (LPLD, LPQLD)      stored labels of views, or teachers
distances two numbers a view (NRR-DD)                               stored labels of mixed views, or teachers
per-view  all logits of some epochs                                 stored labels of views, or teachers
teacher   the teachers, 8 bits a weight                             teachers
projector low-rank changes of a public network (HeLlO)              teachers, real data, the network
static    one vector an image, mixed as images are (INFER)          teachers
soft      one distribution an image                                 teachers
hard      one class an image                                        nothing
========= ========================================================= =======================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condense import container, evaluation, networks, projectors, rng, trajectories
from condense import teachers as squeezed
from condense.augment import ViewRule
from condense.config import build, one_of, parse, require
from condense.distilled import DistilledSet, replacing
from condense.errors import CondenseError, did_you_mean, need
from condense.labels import (
    DistanceLabels,
    HardLabels,
    Labels,
    MeanLogits,
    PerViewLabels,
    SoftLabels,
    StaticLabels,
    TeacherLabels,
    answers,
    check_loss,
    content,
    prepared,
    stored_answers,
    tagged,
    view_answers,
    view_distances,
)
from condense.light_labels import (
    MOST_KEPT,
    MOST_RANK,
    CodedLabels,
    Half,
    Int8TeacherLabels,
    LowRank,
    LowRankLabels,
    PoolLabels,
    Pruning,
    TopK,
    TopKLabels,
    fidelity,
    pool_answers,
    usual,
)
from condense.methods.label_projection import Projection, fitted
from condense.projectors import ProjectorLabels
from condense.protocols import get_protocol
from condense.run import Interrupted, pick_device
from condense.tasks import Task
from condense.tracking import Progress
from condense.units import binary, by, size

EPOCHS = 300
"""Labelled epochs of views where neither the set nor the settings say how many."""
PICTURES = (".png", ".pdf", ".svg")
MARKERS = "osD^v<>"

# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewOptions:
    """How views are drawn and teachers asked. What is left out is as in the set's labels of views."""

    label_scale: float | None = None
    """Least share of the image in a view; otherwise 0.08."""
    label_pad: int | None = None
    """Views are shifted by up to so many pixels instead of being cropped; 0: cropped."""
    mix: str | None = None
    """How views are mixed with those of other images: none, cutmix or mixup; otherwise cutmix."""
    mix_alpha: float | None = None
    """Shares of the mixture are drawn from Beta(mix_alpha, mix_alpha)."""
    label_statistics: str | None = None
    """BatchNorm of the teachers: running, or batch (that of the labelled views themselves)."""
    label_micro: int | None = None
    """Views that share statistics where label_statistics=batch."""
    label_seed: int | None = None
    """Of the views; otherwise from the set's."""


@dataclass(frozen=True)
class TargetOptions(ViewOptions):
    """Views, and what is asked of students."""

    temperature: float | None = None
    """Temperature of targets and loss; otherwise 20."""
    squared: bool | None = None
    """Whether the loss is multiplied by the squared temperature; otherwise true."""

    def __post_init__(self) -> None:
        require(self, temperature=(1e-6, sys.float_info.max))


@dataclass(frozen=True)
class PerView(TargetOptions):
    """Settings of labels of views."""

    label_epochs: int | None = None
    """Labelled epochs of views; otherwise all that are stored, or 300."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, label_epochs=(1, math.inf))


@dataclass(frozen=True)
class LowRankOptions(PerView):
    """Settings of labels=lowrank."""

    rank: int | None = None
    """Axes (r), and bytes a view; otherwise a quarter of the classes, at most 64."""


@dataclass(frozen=True)
class TopKOptions(PerView):
    """Settings of labels=topk."""

    k: int | None = None
    """Logits that are kept; otherwise a quarter of the classes, at most 10."""
    fill: str = "mrs"
    """What stands for the others: mrs (the view's smallest logit) or mr (nothing; the k share all probability)."""


@dataclass(frozen=True)
class PoolOptions(Pruning, PerView):
    """Settings of labels=pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pruning()


@dataclass(frozen=True)
class Teacher(TargetOptions):
    """Settings of labels=teacher."""

    weights: str = "int8"
    """How the teachers' weights are kept: int8 (of convolutions and linear layers) or float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, weights=("int8", "float32"))


@dataclass(frozen=True)
class ProjectorOptions(Projection, TargetOptions):
    """Settings of labels=projector."""

    loss_kind: str = ""
    """Of students: kl (at the temperature) or mse (of logits, as published); otherwise as in the set's labels, or
    kl."""
    gamma: float | None = None
    """loss_kind=mse: weight of the cross-entropy with the images' classes (beta); otherwise as in the set's labels, or
    0."""
    weak_epochs: str = ""
    """Where --teachers are experts: their epochs whose mean logits teach, e.g. 2,4,6; the labels' epoch by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_projection()
        check_loss(self.loss_kind or "kl", self.gamma or 0.0, torch.zeros(0))
        if self.weak_epochs and not re.fullmatch(r"[0-9]+(,[0-9]+)*", self.weak_epochs):
            raise CondenseError(f"weak_epochs={self.weak_epochs}: must be numbers of epochs, e.g. 2,4,6")


@dataclass(frozen=True)
class Static(TargetOptions):
    """Settings of labels=static. What is left out is as in the set's static labels, otherwise as in sets that INFER
    makes: label_pad=4, mix=mixup, mix_alpha=0.8, temperature=30, squared=true."""


@dataclass(frozen=True)
class Distances(ViewOptions):
    """Settings of labels=distances."""

    label_epochs: int | None = None
    """Labelled epochs of views; otherwise all that are stored, or 300."""
    weight: float = 1.0
    """Of the distances in the loss."""

    def __post_init__(self) -> None:
        require(self, label_epochs=(1, math.inf), weight=(0, sys.float_info.max))


@dataclass(frozen=True)
class Soft:
    """Soft labels have nothing to set."""


@dataclass(frozen=True)
class Hard:
    """Settings of labels=hard."""

    smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""


# What labels are made from --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Taught:
    """Teachers of a set."""

    network: nn.Module
    """Images in training space to logits; in eval mode."""
    known: dict[str, Any]
    """What the manifest says of them."""
    names: tuple[str, ...] = ()
    """Of the members' architectures, where they can be built from these."""


@dataclass(eq=False)
class Job:
    """A set whose labels are to be made anew, and who may be asked."""

    distilled: DistilledSet
    teacher: nn.Module | None
    teachers: str | Path | None
    device: torch.device
    quiet: bool
    task: Task | None = None
    beside: Path | None = None
    kind: str = ""

    @functools.cached_property
    def images(self) -> Tensor:
        """(N,C,H,W) in training space."""
        return self.distilled.training_images()[0].to(self.device)

    @functools.cached_property
    def classes(self) -> Tensor:
        """int64 (N,)."""
        return self.distilled.hard_labels().to(self.device)

    @property
    def stored(self) -> PerViewLabels | None:
        """The set's own logits of views, where it has them and no other teachers are named."""
        labels = self.distilled.labels
        whole = isinstance(labels, PerViewLabels) and not isinstance(labels, CodedLabels)
        return labels if whole and self.teacher is None and self.teachers is None else None  # type: ignore[return-value]

    @functools.cached_property
    def taught(self) -> Taught:
        """The teachers that are named, else those that the set's labels came from.

        Raises:
            CondenseError: there are none.
        """
        made, source = self.distilled, self.distilled.manifest.get("label_source", {})
        if self.teacher is not None:
            net = self.teacher.to(self.device).eval()
            about = {"network": type(net).__name__, "sha256": content(net.state_dict())}
            return Taught(net, {"teacher": about})
        if self.teachers is not None and container.format_of(Path(self.teachers)) == squeezed.FORMAT.name:
            return _of_file(Path(self.teachers), source, made, self.device)
        live = self.teachers is None and self.kind not in ("teacher", "projector")  # which ask who taught the projector
        if live and isinstance(made.labels, ProjectorLabels):
            net = made.labels.to(self.device).teacher
            about = {"network": f"projector of {made.labels.known['backbone']['name']}",
                     "sha256": content(net.state_dict())}  # fmt: skip
            return Taught(net, {"teacher": about})
        if self.teachers is None and isinstance(made.labels, TeacherLabels) and made.labels.names:
            return Taught(made.labels.to(self.device).teacher, _kept(made), made.labels.names)
        found, why = evaluation.recorded_teacher(made, self.teachers, self.device)
        if found is None:
            raise CondenseError(
                f"{made.name}: its {made.labels.kind} labels do not give these, and "
                + (why if why else "it does not say which teachers could; give --teachers FILE")
            )
        known = source.get("teachers") or {}
        buildable = known and not squeezed.is_public(str(known.get("path")))
        return Taught(found, _kept(made), tuple(known.get("networks", ())) if buildable else ())


def _kept(distilled: DistilledSet) -> dict[str, Any]:
    return {key: distilled.manifest[key] for key in ("label_source", "teacher") if key in distilled.manifest}


def _of_file(path: Path, source: dict[str, Any], distilled: DistilledSet, device: torch.device) -> Taught:
    """The teachers of a file: those that the set's labels came from where it holds them, else all of them."""
    file = squeezed.read(path)
    wanted = (source.get("teachers") or {}).get("sha256", [])
    same = bool(wanted) and set(wanted) <= {entry["sha256"] for entry in file.entries}
    if same:
        places = {entry["sha256"]: key for entry, key in zip(file.entries, file.keys)}
        keys = [places[digest] for digest in wanted]
    else:
        keys = file.keys
    about = file.committee(keys, device).describe()
    weights = source.get("weights") if same else None
    try:
        net = squeezed.teacher(
            path, device, distilled.shape, len(distilled.classes), described=about, weights=weights,
            transform=distilled.transform,
        )  # fmt: skip
    except CondenseError as fault:
        raise CondenseError(f"--teachers {fault}") from fault
    return Taught(net, {"label_source": {"teachers": about, "weights": weights}}, tuple(about["networks"]))


def _views(config: ViewOptions, start: ViewRule) -> ViewRule:
    """``start`` with what the settings say."""
    given: dict[str, Any] = {
        "min_scale": config.label_scale, "pad": config.label_pad, "mix": config.mix, "alpha": config.mix_alpha,
    }  # fmt: skip
    return dataclasses.replace(start, **{key: value for key, value in given.items() if value is not None})


def _rule(job: Job, config: ViewOptions) -> dict[str, Any]:
    """Seed, views and statistics of labels that are asked for, as keywords of the providers."""
    own = job.distilled.labels if job.distilled.labels.per_view else None
    start = getattr(own, "views", None) or ViewRule(flip=job.distilled.manifest.get("mirror", True), mix="cutmix")
    seed = getattr(own, "seed", None)
    if config.label_seed is not None:
        seed = rng.key(config.label_seed, "labels")
    elif seed is None:
        known = job.distilled.manifest.get("seed")
        seed = rng.key(known if isinstance(known, int) else 0, "labels")
    statistics = config.label_statistics or getattr(own, "statistics", "running")
    micro = config.label_micro or getattr(own, "micro", 0) or 8
    return {"seed": seed, "views": _views(config, start), "statistics": statistics, "micro": micro}


def _targets(job: Job, config: TargetOptions) -> dict[str, Any]:
    own = job.distilled.labels
    temperature = config.temperature or getattr(own, "temperature", None) or 20.0
    squared = getattr(own, "squared", True) if config.squared is None else config.squared
    return {"temperature": temperature, "squared": squared}


def _check_as_stored(labels: PerViewLabels, config: PerView | Distances) -> None:
    """Stored labels are of their views and no others.

    Raises:
        CondenseError: every setting that says otherwise.
    """
    views = labels.views
    has = {
        "label_scale": views.min_scale, "label_pad": views.pad, "mix": views.mix, "mix_alpha": views.alpha,
        "label_statistics": labels.statistics, "label_micro": labels.micro or None,
    }  # fmt: skip
    faults = [f"{key}={getattr(config, key)} (stored: {value})" for key, value in has.items()
              if getattr(config, key) not in (None, value)]  # fmt: skip
    if config.label_seed is not None:
        faults.append(f"label_seed={config.label_seed}")
    if faults:
        raise CondenseError(f"{', '.join(faults)}: the stored labels are of other views; leave it out, or give "
                            "--teachers FILE to have views labelled anew")  # fmt: skip
    if (config.label_epochs or 0) > labels.epochs:
        raise CondenseError(f"label_epochs={config.label_epochs}: {labels.epochs} are stored; leave it out, or give "
                            "--teachers FILE to have views labelled anew")  # fmt: skip


# The kinds ------------------------------------------------------------------------------------------------------------


def per_view(job: Job, config: PerView) -> PerViewLabels:
    """Logits of views: those that are stored, with the targets that the settings ask for, or the teachers'."""
    stored = job.stored
    if stored is not None:
        _check_as_stored(stored, config)
        logits = stored.logits[: config.label_epochs]
        terms = {**stored.terms(), **_targets(job, config)}
    else:
        terms = _terms(job, config)
        logits = _ask(job, config.label_epochs, terms)
    return PerViewLabels(logits, **terms)


def _terms(job: Job, config: TargetOptions) -> dict[str, Any]:
    """All but the logits of labels that are asked for, as keywords of ``PerViewLabels``."""
    terms, own = {**_rule(job, config), **_targets(job, config)}, job.distilled.labels
    if isinstance(own, PerViewLabels):
        terms["calibrate"] = own.calibrate
    if isinstance(own, PerViewLabels | ProjectorLabels):
        terms |= {"loss_kind": own.loss_kind, "gamma": own.gamma, "hard": own.hard}
    return terms


def _epochs(job: Job, asked: int | None) -> int:
    known: int = getattr(job.distilled.labels, "epochs", EPOCHS)
    return asked or known


def _ask(job: Job, epochs: int | None, rule: dict[str, Any]) -> Tensor:
    epochs, classes = _epochs(job, epochs), len(job.distilled.classes)
    with _in_making(job, rule, epochs, classes) as where:
        return view_answers(
            job.taught.network, job.images, epochs, rule["views"], rule["seed"], classes=classes,
            statistics=rule["statistics"], micro=rule["micro"], quiet=job.quiet, **where,
        )  # fmt: skip


@contextlib.contextmanager
def _in_making(job: Job, rule: dict[str, Any], records: int, width: int, **of: Tensor) -> Iterator[dict[str, Any]]:
    """Where ``records`` labels of views of each image go while teachers are asked, as keywords of ``view_answers``:
    into a file beside that of the set, if there will be one; see :func:`condense.labels.stored_answers`. ``of`` is what
    they follow from besides images, teachers and ``rule``."""
    if job.beside is None:
        yield {}
        return
    asked = [content({"images": job.images, **of}), content(job.taught.network.state_dict())]
    key = [*asked, rule["seed"], str(rule["views"]), rule["statistics"], rule["micro"]]
    try:
        with stored_answers(*answer_files(job.beside)[:2], key, (records, len(job.images), width)) as where:
            yield where
    except KeyboardInterrupt:
        raise Interrupted("stopped while labelling views; give the same command again to go on") from None


def answer_files(file: Path) -> tuple[Path, Path, Path]:
    """Where the teachers' answers are kept while a set for ``file`` is in making, how far they are, and the state of a
    projector in training."""
    views, done, projector = (file.with_name(f"{file.name}.{end}") for end in ("views.npy", "views.json", "projector"))
    return views, done, projector


def lowrank(job: Job, config: LowRankOptions) -> LowRankLabels:
    """Labels of views on few axes."""
    rank = config.rank or usual(len(job.distilled.classes), MOST_RANK)
    return LowRankLabels.of(per_view(job, config).to(job.device), rank)


def topk(job: Job, config: TopKOptions) -> TopKLabels:
    """The largest logits of views."""
    kept = config.k or usual(len(job.distilled.classes), MOST_KEPT)
    return TopKLabels.of(per_view(job, config).to(job.device), kept, config.fill)


def pool(job: Job, config: PoolOptions) -> PoolLabels:
    """Few epochs of labels of views; teachers are asked about these alone."""
    if job.stored is not None:
        labels = per_view(job, config)
        code = config.encode(labels.logits[:1], labels.loss_kind == "mse")
        return PoolLabels.pruned(labels, config.count(labels.epochs), code, job.classes, config.cooled())
    terms, epochs = {**_terms(job, config), "hard": job.classes}, _epochs(job, config.label_epochs)
    classes = len(job.distilled.classes)
    config.check_classes(classes)
    count = config.count(epochs)
    with _in_making(job, terms, count, classes, classes=job.classes, epochs=torch.tensor(epochs)) as where:
        records = pool_answers(
            job.taught.network, job.images, job.classes, epochs, terms["views"], terms["seed"], count, classes=classes,
            statistics=terms["statistics"], micro=terms["micro"], quiet=job.quiet, **where,
        )  # fmt: skip
    encode = functools.partial(config.encode, means=terms.get("loss_kind") == "mse")
    cooling = config.cooled() or getattr(job.distilled.labels, "cooling", None)
    return PoolLabels.recorded(records.to(job.device), epochs, encode, cooling, **terms)


def teacher(job: Job, config: Teacher) -> TeacherLabels:
    """The teachers themselves."""
    taught = job.taught
    if not taught.names:
        raise CondenseError("labels=teacher: the architectures of these teachers have no names that a file could keep; "
                            "give --teachers FILE of `condense teachers`")  # fmt: skip
    assert isinstance(taught.network, MeanLogits)
    kind = Int8TeacherLabels if config.weights == "int8" else TeacherLabels
    return kind(
        list(taught.network.members), images=len(job.images), weights=taught.network.weights.tolist(),
        names=taught.names, shape=job.distilled.shape, **_rule(job, config), **_targets(job, config),
    )  # fmt: skip


def projector(job: Job, config: ProjectorOptions) -> ProjectorLabels:
    """Changes of a public network that were learned from the real data."""
    if config.weak_epochs:
        job.taught = _weak(job, config.weak_epochs)
    weak = job.taught.network
    if job.task is None:
        raise CondenseError("labels=projector: is trained on the real data; give --data")
    rule, task = _rule(job, config), job.task.to(job.device, job.distilled.transform)
    progress = Progress("projector", config.projector_steps, 0, job.quiet)
    try:
        made, known = fitted(
            task, weak, config, rule["views"], rule["seed"], statistics=rule["statistics"], micro=rule["micro"],
            device=job.device, report=progress.update, checkpoint=job.beside and answer_files(job.beside)[2],
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted("stopped while training a projector; give the same command again to go on") from None
    progress.close()
    own = _terms(job, config)
    loss_kind = config.loss_kind or own.get("loss_kind", "kl")
    gamma = (own.get("gamma", 0.0) if loss_kind == "mse" else 0.0) if config.gamma is None else config.gamma
    hard = job.distilled.hard_labels() if gamma else None
    return ProjectorLabels.of(
        made, known, len(job.images), rule["seed"], rule["views"], loss_kind=loss_kind, gamma=gamma, hard=hard,
        **_targets(job, config),
    )  # fmt: skip


def _weak(job: Job, epochs: str) -> Taught:
    """The mean logits of some epochs of the experts that are named."""
    path = None if job.teachers is None else Path(job.teachers)
    if path is None or container.format_of(path) != trajectories.FORMAT.name:
        raise CondenseError(f"weak_epochs={epochs}: are of experts; give --teachers FILE of `condense experts`")
    file, chosen = trajectories.read(path), [int(epoch) for epoch in epochs.split(",")]
    if max(chosen) > file.epochs:
        raise CondenseError(f"weak_epochs={epochs}: the experts of {path} have {file.epochs} epochs")
    shape, classes = job.distilled.shape, len(job.distilled.classes)
    members = [trajectories.teacher(path, job.device, shape, classes, epoch=epoch) for epoch in chosen]
    about = {
        "path": str(path.absolute()), "count": file.count, "epochs": file.epochs,
        "content": file.content(file.count, file.epochs),
    }  # fmt: skip
    return Taught(MeanLogits(members).eval(), {"label_source": {"experts": about, "weak_epochs": chosen}})


def static(job: Job, config: Static) -> StaticLabels:
    """One vector an image."""
    own = job.distilled.labels
    if isinstance(own, StaticLabels):
        start, temperature, squared = own.views, own.temperature, own.squared
    else:
        start = ViewRule(flip=job.distilled.manifest.get("mirror", True), pad=4, mix="mixup", alpha=0.8)
        temperature, squared = 30.0, True
    rule = _rule(job, config)
    logits = answers(job.taught.network, job.images, statistics=rule["statistics"], micro=rule["micro"])
    return StaticLabels(
        logits.half(), rule["seed"], _views(config, start), config.temperature or temperature,
        squared if config.squared is None else config.squared,
    )  # fmt: skip


def distances(job: Job, config: Distances) -> DistanceLabels:
    """Two numbers a view, from stored logits where there are any."""
    stored, classes = job.stored, len(job.distilled.classes)
    if stored is not None:
        _check_as_stored(stored, config)
        terms = {key: stored.terms()[key] for key in ("seed", "views", "statistics", "micro")}
        if stored.views.mix == "none":
            raise CondenseError("labels=distances: needs the classes of two images, and the stored labels are of views "
                                "with mix=none; give --teachers FILE and mix=cutmix")  # fmt: skip
        found = torch.stack([_from_logits(stored, job, e) for e in range(_epochs(job, config.label_epochs))])
    else:
        terms, epochs = _rule(job, config), _epochs(job, config.label_epochs)
        with _in_making(job, terms, epochs, 2, classes=job.classes) as where:
            found = view_distances(
                job.taught.network, job.images, job.classes, epochs, terms["views"], terms["seed"], classes=classes,
                statistics=terms["statistics"], micro=terms["micro"], quiet=job.quiet, **where,
            )  # fmt: skip
    return DistanceLabels(found.to(job.device), job.classes, classes, weight=config.weight, **terms)


def _from_logits(labels: PerViewLabels, job: Job, epoch: int) -> Tensor:
    """-log of the probabilities (N, 2) of the classes of both images in each view."""
    drawn = labels.views.draw(labels.seed, epoch, len(labels), job.distilled.shape[1:])
    assert drawn.partner is not None
    hard = job.classes.cpu()
    two = torch.stack([hard, hard[drawn.partner]], 1)
    return -labels.logits[epoch].float().cpu().log_softmax(-1).gather(1, two)


def soft(job: Job, config: Soft) -> SoftLabels:
    """One distribution an image."""
    return SoftLabels(answers(job.taught.network, job.images))


def hard(job: Job, config: Hard) -> HardLabels:
    """One class an image."""
    return HardLabels(job.distilled.hard_labels(), len(job.distilled.classes), config.smoothing)


KINDS: dict[str, tuple[Any, Callable[[Job, Any], Labels]]] = {
    "lowrank": (LowRankOptions, lowrank), "topk": (TopKOptions, topk), "pool": (PoolOptions, pool),
    "teacher": (Teacher, teacher), "projector": (ProjectorOptions, projector), "static": (Static, static),
    "distances": (Distances, distances),
    "soft": (Soft, soft), "hard": (Hard, hard), "per-view": (PerView, per_view),
}  # fmt: skip
"""The settings of each kind, and what makes it."""


# Lightening -----------------------------------------------------------------------------------------------------------


def lighten(
    distilled: DistilledSet,
    kind: str,
    task: Task | None = None,
    teacher: nn.Module | None = None,
    *,
    teachers: str | Path | None = None,
    device: str = "auto",
    quiet: bool = True,
    beside: Path | None = None,
    **settings: Any,
) -> DistilledSet:
    """The same images with labels of another kind.

    The manifest's ``lightened`` says what was done: kind, settings, exactness, cost of a step, error and bytes. It
    keeps what it says of the teachers, and its command goes on with this one; seconds count as preparation. It loses
    the old set's claim, and its protocol where one of both has hard labels.

    Args:
        distilled: any set, for labels of views without decode stages that cut stored images up.
        kind: a name of :data:`KINDS`.
        task: the real data, compared with the set's; ``projector`` learns from them.
        teacher: a network in the set's training space that is asked, in place of the set's own teachers.
        teachers: file of teachers (or experts) that are asked.
        device: where they compute.
        quiet: show no progress.
        beside: file that the set will be written to. What teachers say of views is then kept beside it, in
            :func:`answer_files`, so that memory holds one epoch while they are asked, and the same call after a kill
            goes on in the middle. The caller removes these files when the set is written.
        settings: of the kind.

    Raises:
        CondenseError: an unknown kind or setting, a value that cannot be, other data, or nothing to make labels from.
    """
    if kind not in KINDS:
        raise CondenseError(f"--labels {kind}: unknown{did_you_mean(kind, KINDS)}")
    options, make = KINDS[kind]
    config = build(options, settings, f"labels={kind}")
    if teacher is not None and teachers is not None:
        raise CondenseError(f"--teachers {teachers}: a teacher is given too; leave one of them out")
    if task is not None:
        _check_data(distilled, task)
    if kind != "hard" and distilled.stages and not distilled.compensated:
        raise CondenseError(f"{distilled.name}: its stored images are decoded into more; only labels=hard fit these")
    began = time.monotonic()
    job = Job(distilled, teacher, teachers, pick_device(device), quiet, task, beside, kind)
    labels = make(job, config).to(torch.device("cpu"))
    asked = "taught" in vars(job)
    source = {} if kind == "hard" else job.taught.known if asked else _kept(distilled)
    outdated = {"bytes", "checksums", "claim", "command", "label_source", "teacher", "lightened"}
    if "hard" in (labels.kind, distilled.labels.kind):
        outdated |= {"protocol", "learned_lr"}
    before, old = distilled.manifest.get("lightened", {}).get("bytes", {}), distilled.labels
    manifest = {key: value for key, value in distilled.manifest.items() if key not in outdated}
    known = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    manifest |= source
    seconds = time.monotonic() - began
    if "cost" in manifest:
        manifest["cost"] = prepared(manifest["cost"], seconds)
    if isinstance(made_by := distilled.manifest.get("command"), str):
        manifest["command"] = f"{made_by} && {_command(distilled, kind, config, task, teachers)}"
    manifest["lightened"] = {
        "kind": kind, "settings": known, "exactness": labels.exactness, "step_cost": labels.step_cost,
        "error": _error(job, labels),
        "bytes": {
            "before": before.get("before", old.nbytes() + old.external_nbytes()),
            "after": labels.nbytes(), "external": labels.external_nbytes(),
        },
        "seconds": round(seconds, 2),
    }  # fmt: skip
    manifest["name"] = tagged(distilled.name, kind)
    return DistilledSet(distilled.stored, labels, distilled.transform, manifest)


def _command(distilled: DistilledSet, kind: str, config: Any, task: Task | None, teachers: str | Path | None) -> str:
    """The command line that gives the set these labels; what is as by default is left out, and where files of somebody
    lie there is a place to fill in."""
    words = ["condense", "lighten", distilled.file_name, "--labels", kind]
    words += ["--data", evaluation.data_word(task)] if task is not None else []
    words += ["--teachers", "PATH"] * (teachers is not None)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            value = projectors.shown(value) if field.name == "backbone" else value
            words.append(f"{field.name}={json.dumps(value) if isinstance(value, bool) else value}")
    return shlex.join([*words, "--out", f"{distilled.file_name.removesuffix('.h5')}.{kind}.h5"])


def _error(job: Job, labels: Labels) -> dict[str, float] | None:
    """How far lossy labels are from what they stand for; of teachers in 8 bits, on the set's images as they are."""
    if isinstance(labels, CodedLabels):
        return dataclasses.asdict(labels.error)
    if isinstance(labels, Int8TeacherLabels):
        true, read = (answers(net, job.images) for net in (job.taught.network, labels.to(job.device).teacher))
        return dataclasses.asdict(fidelity(Half(read[None]), true[None], labels.temperature))
    return None


def _check_data(distilled: DistilledSet, task: Task) -> None:
    if tuple(task.classes) != distilled.classes:
        raise CondenseError(f"--data {task.name}: has other classes ({len(task.classes)}) than the set "
                            f"({len(distilled.classes)}); give the data that it was made from")  # fmt: skip
    if task.shape != distilled.shape:
        raise CondenseError(f"--data {task.name}: images are {by(task.shape)}, those of the set "
                            f"{by(distilled.shape)}; give the data that it was made from, or resize=")  # fmt: skip


# Bytes before there is a set ------------------------------------------------------------------------------------------

_RULE = 3 * 8 + 3 * 4 + 3
"""Bytes that views follow from, of whatever kind."""


def label_bytes(
    classes: int,
    images: int,
    epochs: int,
    *,
    teacher_bytes: int | None = None,
    projector_bytes: tuple[int, int] | None = None,
) -> list[Point]:
    """What labels of every kind would need at their usual settings, the heaviest first.

    Args:
        classes: C.
        images: N, of the set.
        epochs: E, labelled epochs of views.
        teacher_bytes: of labels=teacher, see :func:`int8_bytes`; None: no such row.
        projector_bytes: of labels=projector, in the file and external; None: no such row.
    """
    views, terms = epochs * images, _RULE + 2 * 4 + 2
    coded = terms + 3 * 4  # the stated error
    number = 1 if classes <= 1 << 8 else 2 if classes <= 1 << 16 else 8
    rank, k, pruning = usual(classes, MOST_RANK), usual(classes, MOST_KEPT), PoolOptions()
    pooled = 2 * pruning.count(epochs) * images * classes + number * images + 8 + len(Half.name) + coded
    rows: list[tuple[str, int, int, Any]] = [
        ("per-view", 2 * views * classes + terms, 0, PerViewLabels),
        (f"lowrank:rank={rank}", views * rank + rank * (4 + 2 * classes) + 2 * classes + coded, 0, LowRank),
        (f"pool:keep={pruning.keep:g}", pooled, 0, Half),
        ("distances", 4 * views + 8 * images + 4 + _RULE, 0, DistanceLabels),
        ("static", 2 * images * classes + 4 + 1 + _RULE, 0, StaticLabels),
        ("soft", 4 * images * classes, 0, SoftLabels),
        ("hard", math.ceil(images * math.ceil(math.log2(classes)) / 8), 0, HardLabels),
    ]
    if classes <= 1 << 16:
        rows.append((f"topk:k={k}", views * (k * (2 + number) + 2) + coded, 0, TopK))
    if teacher_bytes is not None:
        rows.append(("teacher:weights=int8", teacher_bytes, 0, Int8TeacherLabels))
    if projector_bytes is not None:
        rows.append(("projector", *projector_bytes, ProjectorLabels))
    points = [Point(words, words.partition(":")[0], own, out, made.exactness) for words, own, out, made in rows]
    return sorted(points, key=lambda point: -point.bytes - point.external)


def int8_bytes(names: Sequence[str], shape: networks.Shape, classes: int) -> int:
    """Bytes of labels=teacher of networks of these architectures, which follow from no weight."""
    with rng.seeded("layout"):
        members = [networks.build(name, shape, classes) for name in names]
    return Int8TeacherLabels(members, 0, 0, names=names, shape=shape).nbytes()


# Accuracy against bytes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One kind of labels for a set: what it needs and, where students were trained, what they reach."""

    words: str
    """The kind with its settings, as asked for; ``own`` is what the set brings."""
    kind: str = ""
    bytes: int = 0
    external: int = 0
    exactness: str = ""
    step_cost: str = ""
    mean: float | None = None
    """Accuracy, a fraction."""
    ci95: tuple[float, float] | None = None
    missing: str = ""
    """Why there is none."""


def asked_kinds(text: str) -> list[str]:
    """``lowrank:rank=8,topk,pool:keep=0.1:values=int8`` as its words, checked.

    Raises:
        CondenseError: an unknown kind or setting.
    """
    words = [word for word in text.split(",") if word]
    for word in words:
        if word != "own":
            _settings(word)
    return list(dict.fromkeys(words))


def _settings(word: str) -> tuple[str, dict[str, Any]]:
    kind, *rest = word.split(":")
    if kind not in KINDS:
        raise CondenseError(f"--kinds {kind}: unknown{did_you_mean(kind, [*KINDS, 'own'])}")
    settings = parse(rest)
    build(KINDS[kind][0], settings, f"labels={kind}")
    return kind, settings


def compare(
    distilled: DistilledSet,
    kinds: Sequence[str] = (),
    task: Task | None = None,
    *,
    protocol: str | None = None,
    network: str | None = None,
    runs: int | None = None,
    teacher: nn.Module | None = None,
    teachers: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    quiet: bool = True,
) -> list[Point]:
    """Bytes of the set's labels and of lighter ones and, where the real data are given, what students reach on them.

    Args:
        distilled: the set.
        kinds: as in :func:`asked_kinds`; ``own`` and every kind, with its usual settings, when empty.
        task: the real data; None: bytes alone.
        protocol: that students are trained by, of the soft track; the set's own, else dc-soft-v1, when None.
        network: of the students; the protocol's first when None.
        runs: students of each kind; the protocol's number when None.
        teacher, teachers: see :func:`lighten`.
        seed, device, precision, quiet: see :func:`condense.evaluate`.

    Returns:
        One point a kind, in their order; what cannot be made says why.

    Raises:
        CondenseError: what is wrong with all of them: other data, an unknown protocol or one of the hard track.
    """
    chosen = protocol or distilled.manifest.get("protocol") or "dc-soft-v1"
    if task is not None:
        rules = get_protocol(chosen)
        if rules.labels != "soft" and protocol is not None:
            raise CondenseError(f"--protocol {protocol}: judges classes alone, whatever the labels; take one of the "
                                "soft track, e.g. dc-soft-v1")  # fmt: skip
        chosen = chosen if rules.labels == "soft" else "dc-soft-v1"
        network = network or get_protocol(chosen).networks[0]
        _check_data(distilled, task)
    points = []
    for word in kinds or ["own", *(kind for kind in KINDS if kind != distilled.labels.kind)]:
        try:
            made = distilled
            if word != "own":
                kind, settings = _settings(word)
                made = lighten(
                    distilled, kind, task, teacher, teachers=teachers, device=device, quiet=quiet, **settings
                )
        except CondenseError as fault:
            points.append(Point(word, missing=str(fault)))
            continue
        labels = made.labels
        point = Point(word, labels.kind, labels.nbytes(), labels.external_nbytes(), labels.exactness, labels.step_cost)
        if task is not None:
            record = evaluation.evaluate(
                made, task, networks=network, runs=runs, protocol=chosen, controls=(), seed=seed, device=device,
                precision=precision, quiet=quiet,
            )  # fmt: skip
            entry = record["results"][0]
            ci95 = (entry["ci95"][0], entry["ci95"][1]) if entry["ci95"] else None
            point = dataclasses.replace(point, mean=entry["mean"], ci95=ci95)
        points.append(point)
    return points


def table(points: Sequence[Point], whole: str = "own") -> str:
    """The points as lines for a terminal, as shares of ``whole``; what could not be made is below."""
    made = [point for point in points if not point.missing]
    full = next((p.bytes + p.external for p in made if p.words == whole), None)
    judged, costs = any(point.mean is not None for point in made), any(point.step_cost for point in made)
    rows = [("labels", "bytes", "external", f"of {whole}", "exactness",
             *(("accuracy", "95 % interval") if judged else ()), *(("a step costs",) if costs else ()))]  # fmt: skip
    for p in made:
        share = f"{100 * (p.bytes + p.external) / full:.3g} %" if full else ""
        bounds = "" if p.ci95 is None else "{:.1f} to {:.1f}".format(*(100 * bound for bound in p.ci95))
        reached = ("" if p.mean is None else f"{100 * p.mean:.1f} %", bounds) if judged else ()
        named = p.words + f" ({p.kind})" * (p.words == "own")
        needs = (_size(p.bytes), _size(p.external), share)
        rows.append((named, *needs, p.exactness, *reached, *((p.step_cost,) if costs else ())))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *(f"{p.words} is missing: {p.missing}" for p in points if p.missing)])


def _size(count: int) -> str:
    """In both units where they are far apart."""
    return size(count) + (f" ({binary(count)})" if count >= 2**30 else "")


def check_plot(path: Path) -> None:
    """Finds before any work that a picture cannot be drawn.

    Raises:
        CondenseError: matplotlib is missing, or the file's ending is none of :data:`PICTURES`.
    """
    if path.suffix.lower() not in PICTURES:
        raise CondenseError(f"--plot {path}: must end in {', '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise need("matplotlib", "plots", f"--plot {path}") from error


def chart(points: Sequence[Point], path: Path, title: str) -> Path:
    """A picture of accuracy (bars: 95 % intervals) against the bytes of labels, external ones included; a hollow mark
    shows them without. The legend's order is that of accuracy.

    Raises:
        CondenseError: as :func:`check_plot`, or no point has an accuracy.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    shown = sorted((p for p in points if p.mean is not None), key=lambda p: -(p.mean or 0))
    if not shown:
        raise CondenseError(f"--plot {path}: draws accuracies, and there are none; give --data")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, point in enumerate(shown, 1):
        assert point.mean is not None
        low, high = point.ci95 or (point.mean, point.mean)
        where, mean = point.bytes + point.external, 100 * point.mean
        bars = [[mean - 100 * low], [100 * high - mean]]
        # 10 colours and 7 markers: each of 70 looks different.
        look: dict[str, Any] = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)]}
        axes.errorbar([where], [mean], yerr=bars, capsize=3, linestyle="", label=f"{number}  {point.words}", **look)
        axes.annotate(str(number), (where, mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
        if point.external:
            axes.plot([point.bytes, where], [mean, mean], linestyle=":", markerfacecolor="none", markevery=[0], **look)
    axes.set(xscale="log", xlabel="bytes of labels", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150)
    return path
