"""``lighten``: replaces the labels of a set by labels of another kind.

Kinds that encode or prune labels of views start from the stored ones. Without stored labels, or if teachers are given,
the teachers compute new ones:

========= ========================================================= =======================================
kind      stored                                                    needs
========= ========================================================= =======================================
lowrank   8-bit coefficients on r axes shared by all views            stored labels of views, or teachers
topk      the k largest logits of each view (LPQLD)                 stored labels of views, or teachers
pool      a few labelled epochs to draw from (LPLD, LPQLD)            stored labels of views, or teachers
distances two numbers per view (NRR-DD)                             stored labels of mixed views, or teachers
per-view  all logits of some epochs                                 stored labels of views, or teachers
teacher   the teachers, 8 bits per weight                           teachers
projector low-rank changes of a public network (HeLlO)              teachers, real data, the network
static    one vector per image, mixed as images are (INFER)         teachers
soft      one distribution per image                                teachers
hard      one class per image                                       nothing
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
    """Returns the same images with labels of another kind.

    The entry ``lightened`` of the manifest records kind, settings, exactness, cost of a step, error and bytes. The
    manifest keeps the description of the teachers; this command is appended to its command, and the seconds count as
    preparation. It loses the claim of the old set, and its protocol if either set has hard labels.

    Args:
        distilled: any set; for labels of views, one without decode stages that divide stored images.
        kind: a name of :data:`KINDS`.
        task: the real data, compared with those of the set; ``projector`` is trained on them.
        teacher: a network in the training space of the set, used in place of the set's own teachers.
        teachers: file of teachers (or experts) to use.
        device: their device.
        quiet: show no progress.
        beside: file that the set will be written to. Logits of views are then collected next to it, in
            :func:`partial_files`, so that memory holds one epoch, and the same call continues there after a kill. The
            caller removes these files once the set is written.
        settings: of the kind.

    Raises:
        CondenseError: an unknown kind or setting, an invalid value, other data, or nothing to make labels from.
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
    used_teachers = "teacher_info" in vars(job)
    source = {} if kind == "hard" else job.teacher_info.description if used_teachers else teacher_facts(distilled)
    outdated = {"bytes", "checksums", "claim", "command", "label_source", "teacher", "lightened"}
    if labels.is_hard or distilled.labels.is_hard:
        outdated |= {"protocol", "learned_lr"}
    before, old = distilled.manifest.get("lightened", {}).get("bytes", {}), distilled.labels
    manifest = {key: value for key, value in distilled.manifest.items() if key not in outdated}
    given = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    manifest |= source
    seconds = time.monotonic() - began
    if "cost" in manifest:
        manifest["cost"] = add_preparation_seconds(manifest["cost"], seconds)
    if isinstance(made_by := distilled.manifest.get("command"), str):
        manifest["command"] = f"{made_by} && {_command(distilled, kind, config, task, teachers)}"
    manifest["lightened"] = {
        "kind": kind,
        "settings": given,
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
    """Returns the command line that makes these labels, without settings at their default; paths are placeholders."""
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
    """Raises a CondenseError if the real data have other classes or another image shape than the set."""
    if tuple(task.classes) != distilled.classes:
        raise CondenseError(
            f"--data {task.name}: has other classes ({len(task.classes)}) than the set "
            f"({len(distilled.classes)}); give the data from which it was made"
        )
    if task.shape != distilled.shape:
        raise CondenseError(
            f"--data {task.name}: images are {by(task.shape)}, those of the set "
            f"{by(distilled.shape)}; give the data from which it was made, or resize="
        )
