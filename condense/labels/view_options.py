"""Settings of labelled views; a mixin for the settings of everything that labels views."""

from __future__ import annotations

from dataclasses import dataclass

from condense.augment import PAD_VALUES, ViewRule
from condense.config import require_one_of
from condense.data import Transform, black_pixel


@dataclass(frozen=True)
class LabelViewOptions:
    """How labelled views are drawn."""

    label_scale: float = 0.08
    """Least share of the image in a labelled view."""
    label_pad: int = 0
    """Labelled views are shifted by up to this many pixels instead of being cropped; 0: cropped."""
    label_pad_value: str = "mean"
    """Padding of shifted views: mean (zeros in training space) or black (as in released programs)."""
    mix: str = "cutmix"
    """How labelled views are mixed with those of other images: none, cutmix or mixup."""
    mix_alpha: float = 1.0
    """Mixing ratios are drawn from Beta(mix_alpha, mix_alpha)."""
    mix_batch: int = 0
    """Images that share a mixing ratio and a box, and are mixed among themselves; students whose batches have this size
    learn on these (as in released programs). 0: each image has its own, and any partner of the set."""

    def check_views(self) -> None:
        """Checks ranges and choices of the settings; called by ``__post_init__`` of a subclass."""
        require_one_of(self, label_pad_value=PAD_VALUES)
        self.view_rule(mirror=True)

    def view_rule(self, mirror: bool, transform: Transform | None = None) -> ViewRule:
        """Returns the rule by which labelled views are drawn.

        Args:
            mirror: Whether half of the views are flipped.
            transform: Map of the images from pixels to training space; needed for label_pad_value=black.

        Raises:
            CondenseError: An invalid value, or black padding of whitened images.
        """
        fill = black_pixel(transform) if transform is not None and self.label_pad_value == "black" else ()
        return ViewRule(self.label_scale, 1.0, mirror, self.label_pad, self.mix, self.mix_alpha, self.mix_batch, fill)
