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

import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condense import commands
from condense.config import build_config
from condense.data import Task
from condense.device import pick_device
from condense.errors import CondenseError, did_you_mean
from condense.formatting import by
from condense.lighten.kinds import LIGHTEN_KINDS, LightenJob, teacher_facts
from condense.sets import DistilledSet, add_preparation_seconds, add_tag

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
            :func:`partial_files`, so that memory holds one epoch while they are asked, and the same call after a kill
            goes on in the middle. The caller removes these files when the set is written.
        settings: of the kind.

    Raises:
        CondenseError: an unknown kind or setting, a value that cannot be, other data, or nothing to make labels from.
    """
    if kind not in LIGHTEN_KINDS:
        raise CondenseError(f"--labels {kind}: unknown{did_you_mean(kind, LIGHTEN_KINDS)}")
    options, make = LIGHTEN_KINDS[kind]
    config = build_config(options, settings, f"labels={kind}")
    if teacher is not None and teachers is not None:
        raise CondenseError(f"--teachers {teachers}: a teacher is given too; leave one of them out")
    if task is not None:
        check_same_data(distilled, task)
    if kind != "hard" and distilled.stages and not distilled.compensated:
        raise CondenseError(f"{distilled.name}: its stored images are decoded into more; only labels=hard fit these")
    began = time.monotonic()
    job = LightenJob(distilled, teacher, teachers, pick_device(device), quiet, task, beside, kind)
    labels = make(job, config).to(torch.device("cpu"))
    asked = "taught" in vars(job)
    source = {} if kind == "hard" else job.taught.known if asked else teacher_facts(distilled)
    outdated = {"bytes", "checksums", "claim", "command", "label_source", "teacher", "lightened"}
    if labels.is_hard or distilled.labels.is_hard:
        outdated |= {"protocol", "learned_lr"}
    before, old = distilled.manifest.get("lightened", {}).get("bytes", {}), distilled.labels
    manifest = {key: value for key, value in distilled.manifest.items() if key not in outdated}
    known = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    manifest |= source
    seconds = time.monotonic() - began
    if "cost" in manifest:
        manifest["cost"] = add_preparation_seconds(manifest["cost"], seconds)
    if isinstance(made_by := distilled.manifest.get("command"), str):
        manifest["command"] = f"{made_by} && {_command(distilled, kind, config, task, teachers)}"
    manifest["lightened"] = {
        "kind": kind,
        "settings": known,
        "exactness": labels.exactness,
        "step_cost": labels.step_cost,
        "error": labels.error and dataclasses.asdict(labels.error),
        "bytes": {
            "before": before.get("before", old.nbytes() + old.external_nbytes()),
            "after": labels.nbytes(),
            "external": labels.external_nbytes(),
        },
        "seconds": round(seconds, 2),
    }
    manifest["name"] = add_tag(distilled.name, kind)
    return DistilledSet(distilled.stored, labels, distilled.transform, manifest)


def _command(distilled: DistilledSet, kind: str, config: Any, task: Task | None, teachers: str | Path | None) -> str:
    """The command line that gives the set these labels; what is as by default is left out, and where files of somebody
    lie there is a place to fill in."""
    words = ["condense", "lighten", distilled.file_name, "--labels", kind]
    words += ["--data", commands.data_argument(task)] if task is not None else []
    words += ["--teachers", "PATH"] * (teachers is not None)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            value = commands.redact_backbone(value) if field.name == "backbone" else value
            words.append(f"{field.name}={json.dumps(value) if isinstance(value, bool) else value}")
    return shlex.join([*words, "--out", f"{distilled.file_name.removesuffix('.h5')}.{kind}.h5"])


def check_same_data(distilled: DistilledSet, task: Task) -> None:
    if tuple(task.classes) != distilled.classes:
        raise CondenseError(
            f"--data {task.name}: has other classes ({len(task.classes)}) than the set "
            f"({len(distilled.classes)}); give the data that it was made from"
        )
    if task.shape != distilled.shape:
        raise CondenseError(
            f"--data {task.name}: images are {by(task.shape)}, those of the set "
            f"{by(distilled.shape)}; give the data that it was made from, or resize="
        )
