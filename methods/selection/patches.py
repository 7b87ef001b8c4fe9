"""Patches of images: their importance, which to drop, and a small network that rebuilds the dropped ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import networks, rng
from condense.engine import Run

WIDTH = 32
"""Channels of the decoder."""


def grad_cam(net: networks.Network, images: Tensor, classes: Tensor, patch: int) -> Tensor:
    """Importance of each patch for the class of its image (Grad-CAM, Selvaraju et al., 2017).

    The channels of the last stage's map, weighted by the mean gradient of the class's logit, summed and clamped to at
    least 0, then averaged over each patch.

    Args:
        net: a trained network in eval mode.
        images: (N,C,H,W) in training space.
        classes: int64 (N,).
        patch: height and width of a patch.

    Returns:
        float32 (N, H/patch, W/patch).
    """
    maps: list[Tensor] = []
    with torch.enable_grad():
        logits = net.classify(net.embed(images.detach().requires_grad_(), maps))
        (slope,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps[-1])
    cam = (slope.mean((2, 3), keepdim=True) * maps[-1].detach()).sum(1, keepdim=True).clamp(min=0).float()
    size = images.shape[2] // patch, images.shape[3] // patch
    return F.adaptive_avg_pool2d(cam, size)[:, 0]


def least_important(importance: Tensor, count: int, patch: int) -> Tensor:
    """Marks the pixels of the ``count`` least important patches, bool (N,1,H,W); of equal ones the first.

    Args:
        importance: of each patch, (N, H/patch, W/patch).
    """
    order = importance.flatten(1).argsort(dim=1, stable=True)
    dropped = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :count], True)
    return dropped.view_as(importance)[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def fill_with_mean(images: Tensor, dropped: Tensor) -> Tensor:
    """Replaces dropped pixels, bool (N,1,H,W), of images (N,C,H,W) by the mean of each channel's visible ones."""
    visible = ~dropped
    mean = (images * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(dropped, mean, images)


class PatchDecoder(nn.Module):
    """Predicts dropped pixels from the visible ones: dilated 3x3 convolutions that add to the mean colour."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inputs = {1: channels + 1, 2: WIDTH, 4: WIDTH}
        self.hidden = nn.ModuleList(nn.Conv2d(c, WIDTH, 3, padding=d, dilation=d) for d, c in inputs.items())
        self.last = nn.Conv2d(WIDTH, channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor, dropped: Tensor) -> Tensor:
        """Rebuilds the pixels ``dropped``, bool (N,1,H,W), of images (N,C,H,W) in [0,1] without reading them."""
        filled = fill_with_mean(images, dropped)
        x = torch.cat([filled - 0.5, dropped.to(filled.dtype)], 1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return torch.where(dropped, filled + self.last(x), images)


def train_decoder(run: Run, patch: int, count: int, steps: int, batch: int = 64) -> PatchDecoder:
    """Trains a decoder on train images with ``count`` random patches missing, by the squared error of these."""
    task = run.task
    with run.seeded("patch decoder"):
        decoder = PatchDecoder(task.shape[0]).to(run.device)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    grid = task.shape[1] // patch, task.shape[2] // patch
    for step in range(steps):
        draws = rng.Draws(run.seed, "patch decoder", step)
        images = task.pixels(draws.integers(len(task.train), batch))
        order = draws.uniform(batch * math.prod(grid)).view(batch, *grid)
        missing = least_important(order, count, patch).to(run.device)
        places = missing.expand_as(images)
        optimizer.zero_grad()
        F.mse_loss(decoder(images, missing)[places], images[places]).backward()
        optimizer.step()
    return decoder.requires_grad_(False).eval()
