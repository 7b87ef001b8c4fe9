"""DATM: difficulty-aligned trajectory matching."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from condense import rng
from condense.config import require_range
from condense.data import Task
from condense.engine import ParamGroup, Run, Target
from condense.methods.trajectory_matching.ftd import FTD
from condense.methods.trajectory_matching.matching import (
    LOGIT_CHUNK,
    UnrolledStudent,
    apply_update,
    check_step_size,
    compute_expert_logits,
    compute_set_logits,
    draw_segment,
    get_experts,
    step_size_group,
)
from condense.pretraining import Experts
from condense.registry import method
from condense.sets import INITS, SyntheticSet

_log = logging.getLogger(__name__)

GATE_WARNING_STEPS = 20
"""A warning is logged if the gate rejects this many steps from the first one on."""


@dataclass(frozen=True)
class DATM(FTD):
    """Hyper-parameters of DATM; those of CIFAR-10 at 10 images per class."""

    init: str = "correct"
    """{inherited} correct: real images that an expert classifies correctly."""
    steps: int = 10_000
    syn_steps: int = 80
    lr_start: float = 0.01
    lr_label: float = 2.0
    """Learning rate of the label logits; 0 keeps them."""
    label_momentum: float = 0.9
    """Momentum of the label logits."""
    first_max_start_epoch: int | None = None
    """Students start below this epoch at first; by default half of ``max_start_epoch``."""
    expand_steps: int = 1000
    """Outer steps over which the range of starts grows linearly up to ``max_start_epoch``; 0: the whole range at
    once."""
    gate: float = 1.0
    """Outer steps with a matching loss above this change nothing; 1.1 for CIFAR-10 at 1 image per class."""
    ema: float | None = 0.0
    """{inherited} The released program has the setting but no average."""

    inits: ClassVar[tuple[str, ...]] = (*INITS, "correct")
    dry_run_settings: ClassVar[Mapping[str, Any]] = {"gate": sys.float_info.max}  # skipped steps cost less

    def __post_init__(self) -> None:
        super().__post_init__()
        starts = {
            "first_max_start_epoch": (self.min_start_epoch + 1, self.max_start_epoch),
            "expand_steps": (0, math.inf),
        }
        factors = dict.fromkeys(("lr_label", "gate"), (0, sys.float_info.max))
        require_range(self, **factors, label_momentum=(0, 1), **starts)

    def end_of_starts(self, index: int) -> int:
        """One more than the latest epoch at which the student of outer step ``index`` may start."""
        if not self.expand_steps:
            return self.max_start_epoch
        first = self.first_max_start_epoch or max(self.min_start_epoch + 1, self.max_start_epoch // 2)
        return min(self.max_start_epoch, first + (self.max_start_epoch - first) * index // self.expand_steps)


def select_correct_images(task: Task, run: Run, experts: Experts) -> Tensor:
    """Ids of ``ipc`` random real images of each class that the first expert classifies correctly; if these are too few,
    also images that the next experts classify correctly, and finally any."""
    chosen = []
    for c in range(task.num_classes):
        members = torch.from_numpy(task.class_ids(c))
        rest = members[rng.Draws(run.seed, "init", "correct", c).permutation(len(members))]
        selected: list[Tensor] = []
        for k in range(experts.count):
            wrong: list[Tensor] = []
            for ids in rest.split(LOGIT_CHUNK):
                missing = run.ipc - sum(map(len, selected))
                if not missing:
                    break
                logits = compute_expert_logits(run, experts, experts.params_at(k, -1), run.task.batch(ids))
                correct = (logits.argmax(1) == c).cpu()
                selected.append(ids[correct][:missing])
                wrong.append(ids[~correct])
            rest = torch.cat(wrong) if wrong else rest[:0]
        chosen.append(torch.cat([*selected, rest])[: run.ipc])
    return torch.cat(chosen)


def average_correct_logits(run: Run, experts: Experts, synthetic: SyntheticSet) -> Tensor:
    """Mean logits (N, classes) over the experts that classify an image correctly; over all experts if none does."""
    classes = synthetic.classes
    total = torch.zeros(len(classes), run.task.num_classes, device=classes.device)
    total_of_all, votes = torch.zeros_like(total), torch.zeros(len(classes), 1, device=classes.device)
    for k in range(experts.count):
        logits = compute_set_logits(run, experts, experts.params_at(k, -1), synthetic)
        correct = (logits.argmax(1) == classes).float()[:, None]
        total, total_of_all, votes = total + correct * logits, total_of_all + logits, votes + correct
    return torch.where(votes > 0, total / votes.clamp(min=1), total_of_all / experts.count)


@method(
    "datm",
    config=DATM,
    paper="Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching",
    year=2024,
    labels="soft",
    order=2,
    protocol="mtt-soft-v1",
    pretrains="experts",
)
def datm(task: Task, config: DATM, run: Run) -> SyntheticSet:
    """MTT on FTD's experts with a curriculum from early to late epochs, and learned soft labels.

    When to use: for 10 images per class and more, if soft labels are allowed; late epochs suit large sets. Cost: FTD's
    experts, then steps of 80 training steps each. Known failure: labels of few experts carry little information; a
    comparison with hard labels is unfair, so compare with random images labelled by the same experts (``--teachers``).

    Guo, Wang, Cazenavette, Li, Zhang & You, ICLR 2024. Labels are initialised with the mean logits of the experts that
    classify an image correctly, and learned together with pixels and step size. A step with a matching loss above
    ``gate`` changes nothing; a CPU leaves out its gradients. The published experts have 100 epochs, the last of which
    selects images and labels (buffer_epochs=100; by default experts end with the last epoch that is matched). If no
    expert classifies an image correctly, the released program divides by 0; here all are averaged.
    """
    experts = get_experts(config, run, "method datm")
    ids = select_correct_images(task, run, experts) if config.init == "correct" else None
    synthetic = SyntheticSet.create(task, run.ipc, config, seed=run.seed, device=run.device, ids=ids)
    synthetic.learn_step_size(config.lr_start)
    synthetic.learn_labels(average_correct_logits(run, experts, synthetic))
    rule = {"epoch": experts.epochs, "rule": "learned from mean logits"}
    synthetic.label_source = {"experts": experts.describe(), **rule}
    student = UnrolledStudent(config, run, synthetic, experts)
    groups: dict[str, Any] = {"images": config.pixel_group(), "step_size": step_size_group(config)}
    groups["labels"] = ParamGroup(lr=config.lr_label, momentum=config.label_momentum)
    skipped = torch.zeros((), dtype=torch.int64, device=run.device)
    for step in run.optimise(synthetic, config.steps, **groups):
        expert, epoch = draw_segment(config, run, experts, step.index, config.end_of_starts)
        start, goal = experts.params_at(expert, epoch), experts.params_at(expert, epoch + config.expert_epochs)
        outcome = student.unroll(student.loss(step), start, [Target(config.syn_steps, goal)], config.gate)
        apply_update(step, outcome)
        if isinstance(outcome.is_open, Tensor):
            skipped += ~outcome.is_open
        if step.index + 1 == GATE_WARNING_STEPS == int(skipped):
            _log.warning(
                "condense: the matching loss was above the gate in each of the first %d steps, so nothing was "
                "learned; raise gate, or lower syn_steps or lr_start",
                GATE_WARNING_STEPS,
            )
    check_step_size(config, run, synthetic)
    return synthetic
