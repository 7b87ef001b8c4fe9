"""Makes the labels of each kind from stored labels, teachers or the real data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condense import hdf5, rng
from condense.augment import PAD_VALUES, ViewRule
from condense.config import require_one_of
from condense.data import Task, black_pixel
from condense.engine import Interrupted
from condense.errors import CondenseError
from condense.files import tensors_sha256
from condense.judge import label_source
from condense.labels import (
    DEFAULT_MAX_K,
    DEFAULT_MAX_RANK,
    DistanceLabels,
    HalfCode,
    HardLabels,
    Int8TeacherLabels,
    Labels,
    LowRankLabels,
    PerViewLabels,
    PoolLabels,
    ProjectorLabels,
    SoftLabels,
    StaticLabels,
    TeacherLabels,
    TopKLabels,
    compute_logits,
    compute_pool_logits,
    compute_view_logits,
    compute_view_nll,
    default_size,
    fidelity,
    grouping_version,
    resumable_logits,
)
from condense.lighten.projection import train_projector
from condense.lighten.settings import (
    DEFAULT_LABEL_EPOCHS,
    DistanceOptions,
    HardOptions,
    LowRankOptions,
    PerViewOptions,
    PoolOptions,
    ProjectorOptions,
    SoftOptions,
    StaticOptions,
    TargetOptions,
    TeacherLabelOptions,
    TopKOptions,
    ViewOptions,
)
from condense.networks import MeanLogits, pretrained, read_teacher_file, saved
from condense.pretraining import (
    TRAJECTORY_FORMAT,
    committee_of,
    load_expert_ensemble,
    load_teacher_ensemble,
    read_trajectory_file,
)
from condense.sets import DistilledSet
from condense.tracking import Progress


@dataclass(frozen=True, eq=False)
class TeacherInfo:
    """Teachers of a set."""

    network: nn.Module
    """Images in training space to logits; in eval mode."""
    description: dict[str, Any]
    """Their entries in the manifest."""
    names: tuple[str, ...] = ()
    """Of the members' architectures, where they can be built from these."""


@dataclass(eq=False)
class LightenJob:
    """A set that gets new labels, and the teachers that may label it."""

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
        """The set's own logits of views, if it has them and no other teachers are given."""
        labels = self.distilled.labels
        given = self.teacher is not None or self.teachers is not None
        return labels if labels.stores_all_logits and not given else None  # type: ignore[return-value]

    @functools.cached_property
    def teacher_info(self) -> TeacherInfo:
        """The given teachers, else those that made the set's labels.

        Raises:
            CondenseError: there are none.
        """
        distilled, source = self.distilled, self.distilled.manifest.get("label_source", {})
        if self.teacher is not None:
            net = self.teacher.to(self.device).eval()
            about = {"network": type(net).__name__, "sha256": tensors_sha256(net.state_dict())}
            return TeacherInfo(net, {"teacher": about})
        if self.teachers is not None and hdf5.read_format(Path(self.teachers)) == saved.TEACHER_FORMAT.name:
            return _read_teachers(Path(self.teachers), source, distilled, self.device)
        if self.teachers is None:
            own = distilled.labels.own_teacher(self.device, original=self.kind in ("teacher", "projector"))
            if own is not None:
                net, description, names = own
                return TeacherInfo(net, {"teacher": description} if description else teacher_facts(distilled), names)
        ensemble, reason = label_source.find_label_teacher(distilled, self.teachers, self.device)
        if ensemble is None:
            raise CondenseError(
                f"{distilled.name}: its {distilled.labels.kind} labels do not give these, and "
                + (reason if reason else "it does not say which teachers could; give --teachers FILE")
            )
        recorded = source.get("teachers") or {}
        can_be_built = recorded and not pretrained.is_public(str(recorded.get("path")))
        names = tuple(recorded.get("networks", ())) if can_be_built else ()
        return TeacherInfo(ensemble, teacher_facts(distilled), names)


def teacher_facts(distilled: DistilledSet) -> dict[str, Any]:
    """Returns what the manifest of a set records of the teachers of its labels."""
    return {key: distilled.manifest[key] for key in ("label_source", "teacher") if key in distilled.manifest}


def _read_teachers(path: Path, source: dict[str, Any], distilled: DistilledSet, device: torch.device) -> TeacherInfo:
    """Reads the teachers of a file: those that made the set's labels if the file has them, else all."""
    file = read_teacher_file(path)
    recorded = (source.get("teachers") or {}).get("sha256", [])
    same = bool(recorded) and set(recorded) <= {entry["sha256"] for entry in file.entries}
    if same:
        places = {entry["sha256"]: key for entry, key in zip(file.entries, file.keys)}
        keys = [places[digest] for digest in recorded]
    else:
        keys = file.keys
    about = committee_of(file, keys, device).describe()
    weights = source.get("weights") if same else None
    try:
        net = load_teacher_ensemble(
            path,
            device,
            distilled.shape,
            len(distilled.classes),
            described=about,
            weights=weights,
            transform=distilled.transform,
        )
    except CondenseError as fault:
        raise CondenseError(f"--teachers {fault}") from fault
    return TeacherInfo(net, {"label_source": {"teachers": about, "weights": weights}}, tuple(about["networks"]))


def _views(job: LightenJob, config: ViewOptions, start: ViewRule) -> ViewRule:
    """Returns ``start`` with the values that the settings give."""
    fill = None
    if config.label_pad_value is not None:
        require_one_of(config, label_pad_value=PAD_VALUES)
        fill = black_pixel(job.distilled.transform) if config.label_pad_value == "black" else ()
    given: dict[str, Any] = {
        "min_scale": config.label_scale,
        "pad": config.label_pad,
        "mix": config.mix,
        "alpha": config.mix_alpha,
        "mix_batch": config.mix_batch,
        "fill": fill,
    }
    return dataclasses.replace(start, **{key: value for key, value in given.items() if value is not None})


def _rule(job: LightenJob, config: ViewOptions) -> dict[str, Any]:
    """Returns seed, views and statistics of the new labels, as keywords of the label kinds."""
    own = job.distilled.labels if job.distilled.labels.per_view else None
    start = getattr(own, "views", None) or ViewRule(flip=job.distilled.manifest.get("mirror", True), mix="cutmix")
    seed = getattr(own, "seed", None)
    if config.label_seed is not None:
        seed = rng.key(config.label_seed, "labels")
    elif seed is None:
        recorded = job.distilled.manifest.get("seed")
        seed = rng.key(recorded if isinstance(recorded, int) else 0, "labels")
    statistics = config.label_statistics or getattr(own, "statistics", "running")
    micro = config.label_micro or getattr(own, "micro", 0) or 8
    return {"seed": seed, "views": _views(job, config, start), "statistics": statistics, "micro": micro}


def _targets(job: LightenJob, config: TargetOptions) -> dict[str, Any]:
    own = job.distilled.labels
    temperature = config.temperature or getattr(own, "temperature", None) or 20.0
    squared = getattr(own, "squared", True) if config.squared is None else config.squared
    return {"temperature": temperature, "squared": squared}


def _check_as_stored(labels: PerViewLabels, config: PerViewOptions | DistanceOptions) -> None:
    """Checks that no setting asks for other views than those of the stored labels.

    Raises:
        CondenseError: names every such setting.
    """
    views = labels.views
    has = {
        "label_scale": views.min_scale,
        "label_pad": views.pad,
        "mix": views.mix,
        "mix_alpha": views.alpha,
        "mix_batch": views.mix_batch,
        "label_pad_value": "black" if views.fill else "mean",
        "label_statistics": labels.statistics,
        "label_micro": labels.micro or None,
    }
    faults = [
        f"{key}={getattr(config, key)} (stored: {value})"
        for key, value in has.items()
        if getattr(config, key) not in (None, value)
    ]
    if config.label_seed is not None:
        faults.append(f"label_seed={config.label_seed}")
    if faults:
        raise CondenseError(
            f"{', '.join(faults)}: the stored labels are of other views; leave it out, or give "
            "--teachers FILE to label other views"
        )
    if (config.label_epochs or 0) > labels.epochs:
        raise CondenseError(
            f"label_epochs={config.label_epochs}: {labels.epochs} are stored; leave it out, or give "
            "--teachers FILE to label other views"
        )


def make_per_view_labels(job: LightenJob, config: PerViewOptions) -> PerViewLabels:
    """Makes logits of views: the stored ones with the targets of the settings, or those of the teachers."""
    stored = job.stored
    if stored is not None:
        _check_as_stored(stored, config)
        logits = stored.logits[: config.label_epochs]
        terms = {**stored.terms(), **_targets(job, config)}
    else:
        terms = _terms(job, config)
        logits = _compute_logits(job, config.label_epochs, terms)
    return PerViewLabels(logits, **terms)


def _terms(job: LightenJob, config: TargetOptions) -> dict[str, Any]:
    """Returns all arguments of ``PerViewLabels`` except the logits."""
    return {**_rule(job, config), **_targets(job, config), **job.distilled.labels.loss_settings()}


def _label_epochs(job: LightenJob, given: int | None) -> int:
    own: int = getattr(job.distilled.labels, "epochs", DEFAULT_LABEL_EPOCHS)
    return given or own


def _compute_logits(job: LightenJob, epochs: int | None, rule: dict[str, Any]) -> Tensor:
    epochs, classes = _label_epochs(job, epochs), len(job.distilled.classes)
    with _resumable(job, rule, epochs, classes) as where:
        return compute_view_logits(
            job.teacher_info.network,
            job.images,
            epochs,
            rule["views"],
            rule["seed"],
            classes=classes,
            statistics=rule["statistics"],
            micro=rule["micro"],
            quiet=job.quiet,
            **where,
        )


@contextlib.contextmanager
def _resumable(
    job: LightenJob, rule: dict[str, Any], records: int, width: int, in_order: bool = True, **inputs: Tensor
) -> Iterator[dict[str, Any]]:
    """Where ``records`` labels of views of each image are collected, as keywords of ``compute_view_logits``: in a file
    next to that of the set, if one will be written; see :func:`condense.labels.resumable_logits`. ``inputs`` are
    tensors that the labels depend on besides images, teachers and ``rule``."""
    if job.beside is None:
        yield {}
        return
    digests = [tensors_sha256({"images": job.images, **inputs}), tensors_sha256(job.teacher_info.network.state_dict())]
    key = [*digests, rule["seed"], str(rule["views"]), rule["statistics"], rule["micro"]]
    key += [version] if (version := grouping_version(rule["statistics"])) else []
    files, shape = partial_files(job.beside)[:2], (records, len(job.images), width)
    try:
        with resumable_logits(*files, key, shape, in_order=in_order) as where:
            yield where
    except KeyboardInterrupt:
        raise Interrupted("stopped while labelling views; give the same command again to continue") from None


def partial_files(file: Path) -> tuple[Path, Path, Path]:
    """Paths of unfinished work for the set ``file``: the logits of views, their progress, and the state of a projector
    in training."""
    views, done, projector = (file.with_name(f"{file.name}.{end}") for end in ("views.npy", "views.json", "projector"))
    return views, done, projector


def make_lowrank_labels(job: LightenJob, config: LowRankOptions) -> LowRankLabels:
    """Makes logits of views as coefficients on a few shared axes."""
    rank = config.rank or default_size(len(job.distilled.classes), DEFAULT_MAX_RANK)
    return LowRankLabels.of(make_per_view_labels(job, config).to(job.device), rank)


def make_topk_labels(job: LightenJob, config: TopKOptions) -> TopKLabels:
    """Makes labels of the largest logits of each view."""
    kept = config.k or default_size(len(job.distilled.classes), DEFAULT_MAX_K)
    return TopKLabels.of(make_per_view_labels(job, config).to(job.device), kept, config.fill)


def make_pool_labels(job: LightenJob, config: PoolOptions) -> PoolLabels:
    """Makes labels of a few epochs of views; teachers label only these."""
    if job.stored is not None:
        labels = make_per_view_labels(job, config)
        code = config.encode(labels.logits[:1], labels.loss_kind == "mse")
        return PoolLabels.pruned(labels, config.count(labels.epochs), code, job.classes, config.cooled())
    terms, epochs = {**_terms(job, config), "hard": job.classes}, _label_epochs(job, config.label_epochs)
    classes = len(job.distilled.classes)
    config.check_classes(classes)
    count = config.count(epochs)
    inputs = {"classes": job.classes, "epochs": torch.tensor(epochs)}
    with _resumable(job, terms, count, classes, in_order=False, **inputs) as where:
        records = compute_pool_logits(
            job.teacher_info.network,
            job.images,
            job.classes,
            epochs,
            terms["views"],
            terms["seed"],
            count,
            classes=classes,
            statistics=terms["statistics"],
            micro=terms["micro"],
            quiet=job.quiet,
            **where,
        )
    encode = functools.partial(config.encode, means=terms.get("loss_kind") == "mse")
    cooling = config.cooled() or getattr(job.distilled.labels, "cooling", None)
    return PoolLabels.recorded(records.to(job.device), epochs, encode, cooling, **terms)


def make_teacher_labels(job: LightenJob, config: TeacherLabelOptions) -> TeacherLabels:
    """Stores the teachers themselves, with 8-bit weights."""
    teachers = job.teacher_info
    if not teachers.names:
        raise CondenseError(
            "labels=teacher: the architectures of these teachers have no names that a file could keep; "
            "give --teachers FILE of `condense teachers`"
        )
    assert isinstance(teachers.network, MeanLogits)
    kind = Int8TeacherLabels if config.weights == "int8" else TeacherLabels
    labels = kind(
        list(teachers.network.members),
        images=len(job.images),
        weights=teachers.network.weights.tolist(),
        names=teachers.names,
        shape=job.distilled.shape,
        **_rule(job, config),
        **_targets(job, config),
    )
    if config.weights == "int8":  # measured on the unaugmented images
        true, decoded = (compute_logits(net, job.images) for net in (teachers.network, labels.teacher))
        labels.error = fidelity(HalfCode(decoded[None]), true[None], labels.temperature)
    return labels


def make_projector_labels(job: LightenJob, config: ProjectorOptions) -> ProjectorLabels:
    """Makes low-rank changes of a public network, trained on the real data."""
    if config.weak_epochs:
        job.teacher_info = _weak(job, config.weak_epochs)
    weak = job.teacher_info.network
    if job.task is None:
        raise CondenseError("labels=projector: is trained on the real data; give --data")
    rule, task = _rule(job, config), job.task.to(job.device, job.distilled.transform)
    progress = Progress("projector", config.projector_steps, 0, job.quiet)
    try:
        projector, description = train_projector(
            task,
            weak,
            config,
            rule["views"],
            rule["seed"],
            statistics=rule["statistics"],
            micro=rule["micro"],
            device=job.device,
            report=progress.update,
            checkpoint=job.beside and partial_files(job.beside)[2],
        )
    except KeyboardInterrupt:
        raise Interrupted("stopped while training a projector; give the same command again to continue") from None
    progress.close()
    own = _terms(job, config)
    loss_kind = config.loss_kind or own.get("loss_kind", "kl")
    gamma = (own.get("gamma", 0.0) if loss_kind == "mse" else 0.0) if config.gamma is None else config.gamma
    hard = job.distilled.hard_labels() if gamma else None
    return ProjectorLabels.of(
        projector,
        description,
        len(job.images),
        rule["seed"],
        rule["views"],
        loss_kind=loss_kind,
        gamma=gamma,
        hard=hard,
        **_targets(job, config),
    )


def _weak(job: LightenJob, epochs: str) -> TeacherInfo:
    """Loads the mean logits of some epochs of the given experts."""
    path = None if job.teachers is None else Path(job.teachers)
    if path is None or hdf5.read_format(path) != TRAJECTORY_FORMAT.name:
        raise CondenseError(f"weak_epochs={epochs}: are of experts; give --teachers FILE of `condense experts`")
    file, chosen = read_trajectory_file(path), [int(epoch) for epoch in epochs.split(",")]
    if max(chosen) > file.epochs:
        raise CondenseError(f"weak_epochs={epochs}: the experts of {path} have {file.epochs} epochs")
    shape, classes = job.distilled.shape, len(job.distilled.classes)
    members = [load_expert_ensemble(path, job.device, shape, classes, epoch=epoch) for epoch in chosen]
    about = {
        "path": str(path.absolute()),
        "count": file.count,
        "epochs": file.epochs,
        "content": file.content_key(file.count, file.epochs),
    }
    return TeacherInfo(MeanLogits(members).eval(), {"label_source": {"experts": about, "weak_epochs": chosen}})


def make_static_labels(job: LightenJob, config: StaticOptions) -> StaticLabels:
    """Makes one vector of logits per image, mixed as images are."""
    own = job.distilled.labels
    if isinstance(own, StaticLabels):
        start, temperature, squared = own.views, own.temperature, own.squared
    else:
        start = ViewRule(flip=job.distilled.manifest.get("mirror", True), pad=4, mix="mixup", alpha=0.8)
        temperature, squared = 30.0, True
    rule = _rule(job, config)
    logits = compute_logits(job.teacher_info.network, job.images, statistics=rule["statistics"], micro=rule["micro"])
    return StaticLabels(
        logits.half(),
        rule["seed"],
        _views(job, config, start),
        config.temperature or temperature,
        squared if config.squared is None else config.squared,
    )


def make_distance_labels(job: LightenJob, config: DistanceOptions) -> DistanceLabels:
    """Makes two negative log-likelihoods per view, from stored logits if there are any."""
    stored, classes = job.stored, len(job.distilled.classes)
    if stored is not None:
        _check_as_stored(stored, config)
        terms = {key: stored.terms()[key] for key in ("seed", "views", "statistics", "micro")}
        if stored.views.mix == "none":
            raise CondenseError(
                "labels=distances: needs the classes of two images, and the stored labels are of views "
                "with mix=none; give --teachers FILE and mix=cutmix"
            )
        values = torch.stack([_from_logits(stored, job, e) for e in range(_label_epochs(job, config.label_epochs))])
    else:
        terms, epochs = _rule(job, config), _label_epochs(job, config.label_epochs)
        with _resumable(job, terms, epochs, 2, classes=job.classes) as where:
            values = compute_view_nll(
                job.teacher_info.network,
                job.images,
                job.classes,
                epochs,
                terms["views"],
                terms["seed"],
                classes=classes,
                statistics=terms["statistics"],
                micro=terms["micro"],
                quiet=job.quiet,
                **where,
            )
    return DistanceLabels(values.to(job.device), job.classes, classes, weight=config.weight, **terms)


def _from_logits(labels: PerViewLabels, job: LightenJob, epoch: int) -> Tensor:
    """Returns the negative log-likelihoods (N, 2) of the classes of both images in each view."""
    drawn = labels.views.draw(labels.seed, epoch, len(labels), job.distilled.shape[1:])
    assert drawn.partner is not None
    hard = job.classes.cpu()
    two = torch.stack([hard, hard[drawn.partner]], 1)
    return -labels.logits[epoch].float().cpu().log_softmax(-1).gather(1, two)


def make_soft_labels(job: LightenJob, config: SoftOptions) -> SoftLabels:
    """Makes one distribution per image."""
    return SoftLabels(compute_logits(job.teacher_info.network, job.images))


def make_hard_labels(job: LightenJob, config: HardOptions) -> HardLabels:
    """Makes one class per image."""
    return HardLabels(job.distilled.hard_labels(), len(job.distilled.classes), config.smoothing)


LIGHTEN_KINDS: dict[str, tuple[Any, Callable[[LightenJob, Any], Labels]]] = {
    "lowrank": (LowRankOptions, make_lowrank_labels),
    "topk": (TopKOptions, make_topk_labels),
    "pool": (PoolOptions, make_pool_labels),
    "teacher": (TeacherLabelOptions, make_teacher_labels),
    "projector": (ProjectorOptions, make_projector_labels),
    "static": (StaticOptions, make_static_labels),
    "distances": (DistanceOptions, make_distance_labels),
    "soft": (SoftOptions, make_soft_labels),
    "hard": (HardOptions, make_hard_labels),
    "per-view": (PerViewOptions, make_per_view_labels),
}
"""Settings and function of each kind."""
