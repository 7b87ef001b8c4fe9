"""TODO-DOC."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from condense.data import Task
from condense.engine import Run
from condense.methods.curriculum_synthesis.bn_matching import matcher
from condense.methods.curriculum_synthesis.initial import started
from condense.methods.curriculum_synthesis.recovery import Guide, by_class, recover
from condense.methods.curriculum_synthesis.relabelling import finished, squeezed
from condense.methods.curriculum_synthesis.settings import Recovery
from condense.registry import method
from condense.sets import SyntheticSet

# -- SRe2L and CDA ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SRe2L(Recovery):
    """Hyper-parameters of SRe2L."""


@method(
    "sre2l", config=SRe2L, year=2023, labels="per-view", protocol="sre2l-v1", network="resnet18-bn",
    paper="Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective",
)  # fmt: skip
def sre2l(task: Task, config: SRe2L, run: Run) -> SyntheticSet:
    """Dreams images that a teacher gives their class and finds the real data's moments in; then labels their views.

    When to use: many classes and large images, where matching costs too much; with soft labels. Cost: a teacher, then
    ``steps`` passes forward and back over the set. Known failure: with hard labels such images teach little; small
    nets with few BatchNorms say little about images.

    Yin, Xing & Shen, NeurIPS 2023. L = CE + bn_weight * (sum over BatchNorms, the first times 10, of |mean - running
    mean| + |variance - running variance|). The released program saves JPEG, crops nothing at 32x32 (min_scale=1
    flip=false), and labels CIFAR with batch statistics (label_statistics=batch); images here are 8-bit at least.
    """
    committee = squeezed(config, run)
    synthetic = started(config, run, committee.members[0].network)
    batches, count = by_class(run, config.batch_classes), len(committee.members)
    # Several teachers take turns: image number k is recovered from teacher k modulo their number.
    guides = [
        Guide(matcher(config, member.network), {g: 1.0 for g, one in enumerate(batches) if one.index % count == m})
        for m, member in enumerate(committee.members)
    ]
    result = functools.partial(finished, config, run, synthetic.images, synthetic.classes, committee)
    run.partial_result(result)
    recover(config, run, synthetic, guides, batches)
    return result()


@dataclass(frozen=True)
class CDA(Recovery):
    """Hyper-parameters of CDA; those of Tiny-ImageNet."""

    steps: int = 4000
    """See SRe2L's."""
    lr_img: float = 0.4
    """See SRe2L's."""
    bn_weight: float = 0.05
    """See SRe2L's."""
    schedule: str = "cosine"
    """See SRe2L's. The released program's default milestone of 0 means none."""


@method(
    "cda", config=CDA, year=2024, labels="per-view", protocol="cda-v1", network="resnet18-bn",
    paper="Dataset Distillation via Curriculum Data Synthesis in Large Data Era",
)  # fmt: skip
def cda(task: Task, config: CDA, run: Run) -> SyntheticSet:
    """SRe2L from easy to hard: crops hold the whole image at first, and ever smaller parts of it later.

    When to use: in place of SRe2L, at no cost. Cost: as SRe2L. Known failure: as SRe2L.

    Yin & Shen, TMLR 2024. Only the lower bound of the crop's area falls; the upper one is 1 throughout.
    """
    return sre2l(task, config, run)
