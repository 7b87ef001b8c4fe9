"""Robust active distillation: which images a teacher labels, although it may be wrong."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from condense import rng, selection
from condense.augment import make_augmentation
from condense.config import require_one_of, require_range
from condense.data import Task
from condense.engine import Run
from condense.labels import SoftLabels, compute_logits
from condense.methods.selection.settings import STORES, Storage, teacher_logits
from condense.pretraining import TeacherOptions, get_committee, make_student
from condense.registry import method
from condense.sets import SyntheticSet
from condense.training import FixedSource, Student, TrainConfig, train

CERTAIN = 1e9
"""Factor of a difference of scores that decides which image is drawn first."""

QUERIES = ("rad", "margin", "entropy", "random")


@dataclass(frozen=True)
class RAD(TeacherOptions, Storage):
    """Hyper-parameters of robust active distillation."""

    query: str = "rad"
    """How images are chosen after the first round, which is random: rad, or margin, entropy (the least certain) or
    random, to compare."""
    rounds: int = 5
    """Rounds, each of an equal share of the images; a new student is trained before each but the first."""
    student_steps: int = 500
    """Training steps of the student in each round."""
    student_lr: float = 0.01
    """Learning rate of the student at the start; it falls to 0 along a cosine."""
    student_batch: int = 128
    """Images per step of the student."""

    def __post_init__(self) -> None:
        self.check_teachers()
        require_one_of(self, store=STORES, query=QUERIES)
        counts = dict.fromkeys(("rounds", "student_steps", "student_batch"), (1, math.inf))
        require_range(self, **counts, student_lr=(0, sys.float_info.max))

    def student_recipe(self, task: Task) -> TrainConfig:
        """Returns the training of the student: SGD with momentum 0.9 along a cosine, with crops and flips."""
        return TrainConfig(
            steps=self.student_steps,
            batch=self.student_batch,
            lr=self.student_lr,
            momentum=0.9,
            weight_decay=5e-4,
            lr_milestones=(),
            augment=make_augmentation("crop_flip", variant="flip-always", mirror=task.mirror),
            schedule="cosine",
        )


def query_log_weights(probabilities: Tensor, query: str) -> Tensor:
    """Logarithms of the weights, float64 (n,), with which images are drawn, from a student's output (n, C).

    For margin and entropy, and for the images that rad gives no weight, they differ by factors that no draw overcomes:
    the least certain ones come first.
    """
    probabilities = probabilities.double()
    largest = probabilities.topk(2, dim=1).values
    margin = largest[:, 0] - largest[:, 1]
    if query == "random":
        return torch.zeros(len(margin), dtype=torch.float64)
    if query == "entropy":
        return -CERTAIN * (probabilities * probabilities.clamp(min=1e-300).log()).sum(1)
    if query == "margin":
        return -CERTAIN * margin
    share, _ = selection.robust_distribution(1 - margin)
    return torch.where(share > 0, share.log(), -CERTAIN * (1 + margin))


def _query(
    config: RAD, run: Run, number: int, chosen: Tensor, probabilities: Tensor, ids: Tensor, count: int, c: int
) -> Tensor:
    """Rows of ``ids`` to have labelled in round ``number``, none of which was chosen before."""
    free = (~torch.isin(ids, chosen)).nonzero().squeeze(1)
    weights = query_log_weights(probabilities[ids[free]], config.query if number else "random")
    return free[selection.sample_weighted(weights, count, rng.Draws(run.seed, "query", number, c))]


@method(
    "rad",
    config=RAD,
    paper="Robust Active Distillation",
    year=2023,
    order=0,
    labels="soft",
    protocol="dc-soft-v1",
    pretrains="teachers",
)
def rad(task: Task, config: RAD, run: Run) -> SyntheticSet:
    """Selects real images that inform a student and whose labels a teacher hardly gets wrong, with these labels.

    When to use: where a teacher's labels are the cost, and the teacher errs. Cost: the training of a teacher, and of a
    student in each round. Known failure: with a teacher that is nearly always right, random images are as good.

    Baykal, Trinh, Iliopoulos, Menghani and Vee, ICLR 2023. No program is published; the weights are the solution of the
    game of a learner and an adversary who makes one label wrong (tests compare it with a linear program), and the
    rounds and the training of the student are ours. The gain of an image is 1 less the margin of the student. The
    method does not know classes before it asks; here each class has its own game, because a set with soft labels has
    equally many images of each class. A control arm random is labelled by the same teacher.
    """
    committee = get_committee(config, run)
    teacher, recipe = committee.ensemble(), config.student_recipe(task)
    chosen = torch.zeros(0, dtype=torch.int64)
    for number, share in enumerate(selection.even_shares(run.ipc, [run.ipc] * min(config.rounds, run.ipc))):
        probabilities = torch.ones(len(task.train), task.num_classes)  # before the first training, all images are alike
        if len(chosen):
            with run.autocast():
                labels = SoftLabels(compute_logits(teacher, run.task.batch(chosen)))
            student = make_student(run, task, run.network, "student", number)
            source = FixedSource(run.task.batch(chosen), labels)
            train([Student(student.network, source, student.seed)], recipe, device=run.device, precision=run.precision)
            with run.autocast():
                parts = [compute_logits(student.network, run.task.batch(ids)).cpu() for ids in run.train_id_chunks()]
            probabilities = torch.cat(parts).softmax(1)

        query = functools.partial(_query, config, run, number, chosen, probabilities)

        new = selection.select_by_class(task.train.labels, task.num_classes, share, "class", query)
        chosen = torch.cat([chosen, new])
    chosen = chosen[torch.from_numpy(task.train.labels)[chosen].argsort(stable=True)]
    synthetic = SyntheticSet.select(task, chosen)
    synthetic.labels = SoftLabels(teacher_logits(synthetic, committee, run))
    return synthetic
