"""SRe2L and CDA: recovery from one teacher, with fixed crops or with crops that shrink."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from condense.data import Task
from condense.engine import Run
from condense.methods.curriculum_synthesis.bn_matching import make_matcher
from condense.methods.curriculum_synthesis.initial import create_initial_set
from condense.methods.curriculum_synthesis.recovery import Guide, class_loss, make_class_batches, recovery_passes
from condense.methods.curriculum_synthesis.relabelling import finish_set, get_teachers
from condense.methods.curriculum_synthesis.settings import RecoveryOptions
from condense.registry import method
from condense.sets import SyntheticSet


@dataclass(frozen=True)
class SRe2L(RecoveryOptions):
    """Hyper-parameters of SRe2L."""


@method(
    "sre2l",
    config=SRe2L,
    year=2023,
    labels="per-view",
    protocol="sre2l-v1",
    network="resnet18-bn",
    paper="Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective",
    pretrains="teachers",
)
def sre2l(task: Task, config: SRe2L, run: Run) -> SyntheticSet:
    """Optimises images so that a trained network predicts their class and its BatchNorm statistics match, then relabels
    their views.

    When to use: many classes and large images, where matching is too expensive; with soft labels. Cost: a teacher, then
    ``steps`` forward and backward passes over the set. Known failure: with hard labels such images train poorly; small
    networks with few BatchNorms constrain images too little.

    Yin, Xing & Shen, NeurIPS 2023. L = CE + bn_weight * (sum over BatchNorms, the first times 10, of |mean - running
    mean| + |variance - running variance|). The released program saves JPEG, crops nothing at 32x32 (min_scale=1
    flip=false), and labels CIFAR with batch statistics (label_statistics=batch); images here are at least 8-bit.
    """
    committee = get_teachers(config, run)
    synthetic = create_initial_set(config, run, committee.members[0].network)
    batches, count = make_class_batches(run, config.batch_classes), len(committee.members)
    # Several teachers take turns: image number k is recovered from teacher k modulo their number.
    guides = [
        Guide(
            make_matcher(config, member.network),
            {g: 1.0 for g, batch in enumerate(batches) if batch.index % count == m},
        )
        for m, member in enumerate(committee.members)
    ]
    finish = functools.partial(finish_set, config, run, synthetic.images, synthetic.classes, committee)
    run.partial_result(finish)
    for batch in recovery_passes(config, run, synthetic, guides, batches):
        logits, distances = batch.forward(batch.views(batch.pixels))
        batch.backward(class_loss(logits, batch.classes, len(distances)) + config.bn_weight * distances)
    return finish()


@dataclass(frozen=True)
class CDA(RecoveryOptions):
    """Hyper-parameters of CDA; the defaults are those of Tiny-ImageNet."""

    steps: int = 4000
    lr_img: float = 0.4
    bn_weight: float = 0.05
    schedule: str = "cosine"
    """{inherited} The released program's default milestone of 0 means none."""


@method(
    "cda",
    config=CDA,
    year=2024,
    labels="per-view",
    protocol="cda-v1",
    network="resnet18-bn",
    paper="Dataset Distillation via Curriculum Data Synthesis in Large Data Era",
    pretrains="teachers",
)
def cda(task: Task, config: CDA, run: Run) -> SyntheticSet:
    """SRe2L with a curriculum of crops: they hold the whole image at first and smaller parts later.

    When to use: in place of SRe2L, at no extra cost. Cost: as SRe2L. Known failure: as SRe2L.

    Yin & Shen, TMLR 2024. Only the lower bound of the crop's area decreases; the upper bound is 1 throughout.
    """
    return sre2l(task, config, run)
