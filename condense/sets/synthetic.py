"""SyntheticSet: images, labels and decode stages while a method optimises them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from condense import rng
from condense.data import Task
from condense.device import on_host, upload, upload_indices
from condense.errors import CondenseError
from condense.labels import HardLabels, Labels, SoftLabels
from condense.sets.distilled import Resampling
from condense.sets.initial import SyntheticOptions, initial_images
from condense.sets.stages import FlipUnion, Formation, Stage, decode

Space = Literal["training", "pixel"]


class SyntheticSet:
    """Images, labels and decode stages of a set that is being optimised.

    Attributes:
        tensors: Leaf tensors that may be optimised; ``tensors["images"]`` is (N,C,H,W), sorted by class. The methods
            below add ``labels`` and ``step_size``.
        classes: Class of each stored image, int64 (N,).
        labels: Label provider of the finished set.
        space: ``training`` (pixels after the task's transform, unclamped) or ``pixel`` ([0,1], or uint8 for selected
            real images).
        stages: Decode stages, in order.
        label_source: Origin of soft labels, for the manifest.
        ids: Real training images that the set consists of, int64 (N,); None unless it is a selection.
        resampling: How an evaluation draws real images again in each epoch; None for a fixed set.
    """

    def __init__(
        self,
        task: Task,
        images: Tensor,
        classes: Tensor,
        *,
        space: Space = "training",
        stages: Sequence[Stage] = (),
        labels: Labels | None = None,
    ) -> None:
        device = images.device
        self.task, self.space, self.stages = task, space, list(stages)
        self.classes = classes.to(device)
        self.labels = labels or HardLabels(self.classes, task.num_classes)
        self.tensors = {"images": images.requires_grad_(images.is_floating_point())}
        self.label_source: dict[str, Any] = {}
        self.ids: Tensor | None = None
        self.resampling: Resampling | None = None
        self._rows = [(self.classes == c).nonzero().squeeze(1) for c in range(task.num_classes)]
        self._decoded: dict[tuple[int, ...] | None, tuple[Tensor | None, Tensor]] = {}  # rows and labels of classes

    @property
    def images(self) -> Tensor:
        """Stored images (N,C,H,W)."""
        return self.tensors["images"]

    def learn_step_size(self, start: float) -> None:
        """Makes the students' learning rate a learned part of the set, used in its evaluation; ``start`` is its initial
        value."""
        self.tensors["step_size"] = torch.tensor(start, device=self.images.device).requires_grad_()

    @property
    def step_size(self) -> Tensor | None:
        """Current learned learning rate, without a graph; None if it is not learned."""
        leaf = self.tensors.get("step_size")
        return None if leaf is None else leaf.detach()

    def learn_labels(self, values: Tensor, make: Callable[[Tensor], Labels] = SoftLabels) -> None:
        """Makes labels a learned part of the set: ``make`` of a copy of ``values``, by default logits (N, classes)."""
        self.tensors["labels"] = values.detach().clone().requires_grad_()
        self.labels = make(self.tensors["labels"])

    @classmethod
    def create(
        cls,
        task: Task,
        ipc: int,
        options: SyntheticOptions,
        *,
        seed: int,
        device: torch.device,
        space: Space = "training",
        ids: Tensor | None = None,
    ) -> SyntheticSet:
        """Creates a set of ``ipc`` images per class.

        Args:
            task: The real data.
            ipc: Images per class.
            options: Initial images and decode stages.
            seed: Seed of the initial images.
            device: Device of the tensors.
            space: See the class.
            ids: Real training images (classes * ipc,) to use as initial images instead, class by class.

        Raises:
            CondenseError: ``factor`` exceeds the image size, or ``fyi`` does not suit the classes.
        """
        stages: list[Stage] = []
        if options.factor > min(task.shape[1:]):
            raise CondenseError(
                f"factor={options.factor}: images of {task.name} have only {min(task.shape[1:])} pixels"
            )
        if options.factor > 1:
            stages.append(Formation(options.factor, 0.5 if space == "pixel" else 0.0))
        if options.fyi:
            if not task.mirror:
                raise CondenseError(
                    f"fyi=true: a mirror image of '{task.name}' may belong to another class; leave fyi off"
                )
            stages.append(FlipUnion())
        if ids is None:
            images, classes = initial_images(task, ipc, options, seed)
        else:
            images, classes = task.pixels(ids), torch.from_numpy(task.train.labels[ids.numpy()])
        if space == "pixel" and options.init == "noise":
            images = (images / 4 + 0.5).clamp(0, 1)
        images = images.to(device)
        if space == "training" and options.init != "noise":
            images = task.transform.to(device)(images)
        return cls(task, images.float().contiguous(), classes, space=space, stages=stages)

    @classmethod
    def select(cls, task: Task, ids: Tensor) -> SyntheticSet:
        """Creates a set of unchanged real training images (uint8 if the data is), sorted by class."""
        classes = torch.as_tensor(task.train.labels[ids.numpy()])
        order = torch.argsort(classes, stable=True)
        selected = cls(task, torch.as_tensor(task.raw(ids[order])), classes[order], space="pixel")
        selected.ids = ids[order]
        return selected

    def decode(self, classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Decodes the stored images, with gradients to the stored tensors.

        Args:
            classes: Classes to decode, in this order. Default: all.

        Returns:
            Images (M,C,H,W) in training space and their classes, int64 (M,).
        """
        key = None if classes is None else tuple(classes)
        rows, labels = self._decoded.get(key, (None, None))
        if rows is None and classes is not None:
            rows = torch.cat([self._rows[c] for c in classes])
        images, ids = decode(self.images if rows is None else self.images[rows], self.stages)
        if labels is None:
            labels = (self.classes if rows is None else self.classes[rows])[ids]
            labels = upload_indices(labels.cpu(), labels.device)  # the only wait for the device
            self._decoded[key] = rows, labels
        if self.space == "pixel":
            images = self.task.transform.to(images.device)(images)
        return images, labels

    def decode_sample(self, classes: Sequence[int], most: int, parts: tuple[int | str, ...]) -> tuple[Tensor, Tensor]:
        """Decodes at most ``most`` images per class, sampled with the random key ``(*parts, class)``."""
        images, labels = self.decode(classes)
        if len(images) <= most * len(classes) and len({len(self._rows[c]) for c in classes}) == 1:
            return images, labels
        selected, labels = [], on_host(labels)
        for c in classes:
            rows = (labels == c).nonzero().squeeze(1)
            selected.append(rows[rng.Draws(*parts, c).sample(len(rows), most)])
        rows = torch.cat(selected)
        return images[upload(rows, images.device)], upload_indices(labels[rows], images.device)
