"""The loop that trains networks on a small or a large set: evaluated students, experts and teachers.

Students of one architecture are trained either together as one stacked network (``torch.func``), which uses a GPU
better, or one after the other. The result is the same up to rounding; ``prefers_stacked`` returns the faster way for a
device. All random numbers are keyed by the student's seed and the step, so they do not depend on the number of students
or on stacking.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense import rng
from condense.cuda_graphs import GraphedFunction
from condense.data import Task
from condense.device import autocast
from condense.networks import Network
from condense.training.batch import SharedSource, make_batch, mean_loss
from condense.training.checkpoint import TrainingCheckpoint, random_state, set_random_state
from condense.training.config import TrainConfig, epoch_steps, make_optimizer
from condense.training.student import GradientRule, StepCallback, Student, TrainingStep, WeightedTargets

_log = logging.getLogger(__name__)

TEST_CHUNK = 256


def train(
    students: Sequence[Student],
    recipe: TrainConfig,
    *,
    device: torch.device,
    precision: str = "fp32",
    together: bool | None = None,
    report: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
    watch: StepCallback | None = None,
    watch_every: int = 1,
    update: GradientRule | None = None,
) -> float:
    """Trains all students in place, on ``device``, and leaves them in train mode.

    Args:
        students: Networks with their data sources and seeds.
        recipe: Training configuration.
        device: Device of the training.
        precision: ``fp32`` or ``bf16``.
        together: Whether the students are stacked, which needs equal architectures and sources of equal size, and on a
            CPU fp32. Default: depends on the device.
        report: Called with the number of completed student steps, out of ``len(students) * recipe.steps``.
        checkpoint: File for the state during training, written every ``CHECKPOINT_SECONDS`` and removed at the end;
            students that are trained one by one have one numbered file each. After a kill the same call resumes from it
            and ends with the same bits. A file that is damaged or belongs to a different training is ignored.
        watch: Called as ``watch(k, step, state)`` with the current weights and buffers of student k after every
            ``watch_every`` steps, before they are in the checkpoint, so that a resumption skips no call.
        watch_every: Number of steps between two calls of ``watch``.
        update: Computes the gradients that the optimiser uses. Default: those of the mean loss.

    Returns:
        The seconds of training, including those before resumptions.
    """
    for student in students:
        student.network.to(device).train()
    if together is None:
        together = prefers_stacked(device)
    equal = len({student.source.size for student in students}) == 1
    # On a CPU, vmap leaves autocast out: bf16 would be fp32.
    keeps_precision = precision == "fp32" or device.type == "cuda"
    if together and equal and keeps_precision and len(students) > 1:
        keeper = TrainingCheckpoint(checkpoint, students, recipe, device, precision, update)
        try:
            _train_stacked(students, recipe, device, precision, report, keeper, watch, watch_every, update)
            keeper.remove()
            return keeper.seconds
        except RuntimeError as fault:  # the students do not change before the end
            # Networks that draw random numbers cannot be stacked: their draws are keyed by student.
            is_random = "randomness" in str(fault)
            if not is_random and not isinstance(fault, torch.OutOfMemoryError):
                raise
            if not is_random:
                torch.cuda.empty_cache()
            keeper.remove()
    keepers, seconds = [], 0.0
    for k, student in enumerate(students):
        path = checkpoint and (checkpoint.with_name(f"{checkpoint.name}.{k}") if len(students) > 1 else checkpoint)
        keepers.append(
            TrainingCheckpoint(path, [student], recipe, device, precision, update, keep_end=len(students) > 1)
        )
        shifted = report and functools.partial(_shift, report, k * recipe.steps)
        watched = watch and functools.partial(watch, k)
        _train_one(student, recipe, device, precision, shifted, keepers[k], watched, watch_every, update)
        seconds += keepers[k].seconds
    for keeper in keepers:  # not earlier, so that a kill during the last student loses none of the others
        keeper.remove()
    return seconds


def prefers_stacked(device: torch.device) -> bool:
    """Returns whether stacking is faster: on a GPU, where kernel launches dominate; not on a CPU, where grouped
    convolutions are slower."""
    return device.type == "cuda"


def _shift(report: Callable[[int], None], offset: int, done: int) -> None:
    report(offset + done)


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _train_one(
    student: Student,
    recipe: TrainConfig,
    device: torch.device,
    precision: str,
    report: Callable[[int], None] | None,
    keeper: TrainingCheckpoint,
    watch: Callable[[int, Mapping[str, Tensor]], None] | None,
    watch_every: int,
    update: GradientRule | None,
) -> None:
    network, start = student.network, 0
    weights: list[Tensor] = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = make_optimizer(weights, recipe)

    def forward(images: Tensor, sizes: list[int]) -> Tensor:
        with autocast(device, precision):
            logits = _by_group(network, images, sizes, 0)
        return logits.float()

    def state() -> dict[str, Any]:
        return {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state(device)}

    with rng.seeded(student.seed, "dropout", device=device):
        saved = keeper.read()
        if saved is not None:
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            set_random_state(saved["random"], device)
            start = saved["step"]
        for step in range(start, recipe.steps):
            images, targets, clean, sizes = make_batch(student, recipe, step, device, precision)
            forward_batch = functools.partial(forward, sizes=sizes)

            def loss(
                images: Tensor = images,
                targets: WeightedTargets = targets,
                forward: Callable[[Tensor], Tensor] = forward_batch,
            ) -> Tensor:
                return mean_loss(student.source, forward(images), targets)

            if update is None:
                optimizer.zero_grad()
                loss().backward()
            else:
                epoch = step // epoch_steps(student.source.size, recipe.batch)
                _set_gradients(weights, update(TrainingStep(weights, False, step, epoch, clean, loss, forward_batch)))
            _step(optimizer, recipe.lr_at(step))
            if watch is not None and (step + 1) % watch_every == 0:
                watch(step + 1, network.state_dict())
            keeper.after(step + 1, state)
            if report is not None:
                report(step + 1)


def _by_group(network: Callable[[Tensor], Tensor], images: Tensor, sizes: list[int], axis: int) -> Tensor:
    """Returns the logits of a batch whose groups along ``axis`` pass through the network one after another."""
    if len(sizes) == 1:
        return network(images)
    return torch.cat([network(part) for part in images.split(sizes, axis)], axis)


def _set_gradients(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.detach().contiguous()  # fused optimisers read gradients as if they were


def _train_stacked(
    students: Sequence[Student],
    recipe: TrainConfig,
    device: torch.device,
    precision: str,
    report: Callable[[int], None] | None,
    keeper: TrainingCheckpoint,
    watch: StepCallback | None,
    watch_every: int,
    update: GradientRule | None,
) -> None:
    """Trains K networks as one: parameters (K, ...), batches (K, B, ...); the sum of K losses has K separate
    gradients."""
    nets, start = [student.network for student in students], 0
    parameters, buffers = torch.func.stack_module_state(nets)
    shell = copy.deepcopy(nets[0])
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    weights: list[Tensor] = list(leaves.values())
    optimizer = make_optimizer(weights, recipe, stacked=True)

    def call(weights: dict[str, Tensor], state: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(shell, (weights, state), (images,))

    def state() -> dict[str, Any]:
        weights = {name: leaf.detach() for name, leaf in leaves.items()}
        return {"weights": weights, "buffers": buffers, "optimizer": optimizer.state_dict()}

    stacked = torch.func.vmap(call)
    shared = SharedSource.of(students, recipe)

    def forward(images: Tensor, sizes: list[int]) -> Tensor:
        with autocast(device, precision):
            logits = _by_group(functools.partial(stacked, leaves, buffers), images, sizes, 1)
        return logits.float()

    def sum_of_losses(logits: Tensor, targets: list[WeightedTargets] | Tensor) -> Tensor:
        """The sum of the mean losses of all students, whose targets are a list or, of a shared source, one tensor."""
        if isinstance(targets, Tensor):
            assert shared is not None
            # Batches are equally large: the sum of their means is K times the mean of all.
            return len(students) * shared.source.loss(logits.flatten(0, 1), targets)
        return torch.stack([mean_loss(s.source, logits[k], targets[k]) for k, s in enumerate(students)]).sum()

    used: list[Tensor] = []  # weights that the loss depends on

    def compute_gradients(images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        loss = sum_of_losses(forward(images, [images.shape[1]]), targets)
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        used[:] = [weight for weight, gradient in zip(weights, found) if gradient is not None]
        return tuple(gradient for gradient in found if gradient is not None)

    gradients = GraphedFunction(compute_gradients, list(buffers.values()))
    saved = keeper.read()
    if saved is not None:
        with torch.no_grad():
            for name, value in (saved["weights"] | saved["buffers"]).items():
                (leaves | buffers)[name].copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, recipe.steps):
        targets: list[WeightedTargets] | Tensor
        if shared is not None:
            images, targets, clean, sizes = shared.batch(students, recipe, step)
        else:
            batches = [make_batch(student, recipe, step, device, precision) for student in students]
            images, clean = torch.stack([b.images for b in batches]), torch.stack([b.clean for b in batches])
            targets, sizes = [batch.targets for batch in batches], batches[0].sizes
        forward_batch = functools.partial(forward, sizes=sizes)

        def loss(
            images: Tensor = images,
            targets: list[WeightedTargets] | Tensor = targets,
            forward: Callable[[Tensor], Tensor] = forward_batch,
        ) -> Tensor:
            return sum_of_losses(forward(images), targets)

        if update is None and isinstance(targets, Tensor):
            computed = gradients(images, targets)
            _set_gradients(used, computed)
        elif update is None:
            optimizer.zero_grad()
            loss().backward()
        else:
            epoch = step // epoch_steps(students[0].source.size, recipe.batch)
            _set_gradients(weights, update(TrainingStep(weights, True, step, epoch, clean, loss, forward_batch)))
        _step(optimizer, recipe.lr_at(step))
        if watch is not None and (step + 1) % watch_every == 0:
            for k in range(len(students)):
                watch(k, step + 1, {name: value[k].detach() for name, value in (leaves | buffers).items()})
        keeper.after(step + 1, state)
        if report is not None:
            report((step + 1) * len(students))
    with torch.no_grad():
        for k, net in enumerate(nets):
            for name, parameter in net.named_parameters():
                parameter.copy_(leaves[name][k])
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[name][k])


def accuracy(network: Network, task: Task, *, device: torch.device, precision: str = "fp32") -> float:
    """Returns the fraction of the task's test images that the network classifies correctly; puts it into eval mode."""
    return sum(correct_by_class(network, task, device=device, precision=precision)) / len(task.test)


@torch.no_grad()
def correct_by_class(network: Network, task: Task, *, device: torch.device, precision: str = "fp32") -> list[int]:
    """Returns the number of test images of each class that the network classifies correctly; puts it into eval mode."""
    network.to(device).eval()
    labels = torch.as_tensor(task.test.labels).to(device)
    correct = torch.zeros(task.num_classes, dtype=torch.int64, device=device)
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    for ids in torch.arange(len(labels)).split(TEST_CHUNK):
        with autocast(device, precision):
            embedding = network.embed(task.test_batch(ids))
        logits = network.classify(embedding.float())  # bf16 logits would have ties, which favour low classes
        is_finite &= logits.isfinite().all()
        predictions = logits.argmax(1)
        chunk = labels[ids.to(device)]
        correct.index_add_(0, chunk, (predictions == chunk).long())
    if not bool(is_finite):
        kind = getattr(network, "name", type(network).__name__)
        _log.warning("condense: a trained network (%s) has outputs that are not finite: its accuracy is chance", kind)
    return correct.tolist()
