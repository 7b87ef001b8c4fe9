"""AutoAugment and RandAugment by torchvision, on 8-bit images: augmentations of evaluations, not differentiable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from condense.errors import CondenseError
from condense.rng import Draws

POLICIES = ("autoaugment", "randaugment")


@dataclass(frozen=True)
class ImagePolicy:
    """A random policy of torchvision for each image.

    As in DC-BENCH, images are clamped to [0, 1] and rounded to 8 bits first, and RandAugment applies one operation of
    magnitude 9; AutoAugment has its policies for CIFAR-10. DC-BENCH draws one policy for a whole batch.

    Raises:
        CondenseError: an unknown name.
    """

    name: str
    """autoaugment or randaugment."""
    transform: Any = field(default=None, repr=False, compare=False)
    """Map from pixel space [0, 1] to training space."""

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise CondenseError(f"augment={self.name}: must be {' or '.join(POLICIES)}")

    def draw(self, draws: Draws, rows: int) -> Tensor:
        """Seeds of the policies of ``rows`` images, int64 (rows,), on the CPU."""
        return draws.integers(1 << 31, (rows,)).cpu()

    def apply(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Augments images (N,C,H,W) in training space, each by its own seed; returns the same shape, dtype and device.

        Raises:
            CondenseError: images that have neither one channel nor three.
        """
        if images.shape[1] not in (1, 3):
            raise CondenseError(f"augment={self.name}: needs images of 1 or 3 channels, not {images.shape[1]}")
        transform, policy = self.transform.to(torch.device("cpu")), self._policy()
        pixels = (transform.inverse(images.detach().cpu().float()).clamp(0, 1) * 255).round().byte()
        generator = torch.random.default_generator  # the one of torchvision; torch.manual_seed would also seed CUDA's
        state = generator.get_state()
        for image, seed in zip(pixels, seeds.tolist()):
            generator.manual_seed(seed)
            image.copy_(policy(image))
        generator.set_state(state)
        return transform(pixels.float() / 255).to(images)

    def _policy(self) -> Callable[[Tensor], Tensor]:
        from torchvision import transforms

        if self.name == "autoaugment":
            return transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
        return transforms.RandAugment(num_ops=1, magnitude=9)
