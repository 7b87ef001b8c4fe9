"""Helpers of tests that train networks on real data: a run that is stopped, and a ban on training."""

from condense.engine import Run
from condense.pretraining import budget, pipeline, store
from condense.training import loop


class StoppedRun(Run):
    """A run that a signal stops as soon as ``condition()`` is true."""

    def __init__(self, *arguments, condition, **options):
        super().__init__(*arguments, **options)
        self.condition = condition

    @property
    def stop_requested(self):
        return bool(self.condition())


def forbid_training(monkeypatch):
    """Fails if anything is trained from here on."""

    def fail(*arguments, **options):
        raise AssertionError("trained")

    for module in (pipeline, budget):
        monkeypatch.setattr(module, "train", fail)


def train_in_groups(monkeypatch):
    """Networks are trained together, as on a GPU. Returns the list to which the size of each group is added."""
    sizes, train = [], loop.train
    for module in (loop, pipeline, store):
        monkeypatch.setattr(module, "prefers_stacked", lambda device: True)
    monkeypatch.setattr(
        pipeline,
        "train",
        lambda group, *arguments, **options: (sizes.append(len(group)), train(group, *arguments, **options))[1],
    )
    return sizes
