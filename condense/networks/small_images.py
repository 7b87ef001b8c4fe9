"""Networks for images of 32 or 64 pixels: stems of stride 1 before the stages of networks made for 224 pixels.

The definitions are those of the collection `kuangliu/pytorch-cifar`, from which the programs of CV-DD and INFER take
their networks. ResNet, DenseNet, ShuffleNetV2 and EfficientNet are built of torchvision's stages, whose layers are the
same; DenseNet concatenates in another order, which only permutes channels. MobileNetV2 and ShuffleNet differ from
torchvision or are not part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condense.networks.architectures import NAMED, Network, Shape, reset_parameters
from condense.networks.memory_format import arrange


@dataclass(frozen=True)
class Parts:
    """The layers of a network before its classifier."""

    stem: nn.Module
    stages: Sequence[nn.Module]
    head: nn.Module | None = None
    """Follows the last stage, before the mean over the map."""
    dropout: float = 0.0
    """Share of the inputs of the classifier that are set to 0 in training."""


class StagedNet(Network):
    """A stem, stages and a head, then the mean over the last map and one linear layer.

    ``features`` returns the outputs of the stages. A stage whose input is smaller than 4x4 keeps its size.
    """

    def __init__(self, shape: Shape, classes: int, *, make_parts: Callable[[int], Parts]) -> None:
        super().__init__()
        device = torch.get_default_device()
        with torch.device("meta"):  # sizes are inferred without memory, and no weight is drawn twice
            parts = make_parts(shape[0])
            self.stem, self.stages = parts.stem, nn.ModuleList(parts.stages)
            self.head = nn.Identity() if parts.head is None else parts.head
            x = self.stem(torch.empty(2, *shape))
            for stage in self.stages:
                if min(x.shape[2:]) < 4:
                    _keep_size(stage)
                x = stage(x)
            self.dropout = nn.Dropout(parts.dropout)
            self.classify = nn.Linear(self.head(x).shape[1], classes)
        self.to_empty(device=device)
        reset_parameters(self)

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        x = self.stem(arrange(x))
        for stage in self.stages:
            x = stage(x)
            if maps is not None:
                maps.append(x)
        return self.dropout(self.head(x).mean((2, 3)))


def _keep_size(stage: nn.Module) -> None:
    """Removes the strides of a stage; a 2x2 pool becomes the identity."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d):
            module.stride = 1
            if module.kernel_size == 2:
                module.kernel_size = 1


def _conv_norm_relu(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


# -- stages of torchvision --------------------------------------------------------------------------------------------


def _resnet(name: str, channels: int) -> Parts:
    from torchvision import models

    net = models.get_model(name, weights=None)
    return Parts(nn.Sequential(*_conv_norm_relu(channels, 64, 3)), [net.layer1, net.layer2, net.layer3, net.layer4])


def _densenet121(channels: int) -> Parts:
    from torchvision import models

    layers = models.densenet121(weights=None).features
    stages = [
        layers.denseblock1,
        nn.Sequential(layers.transition1, layers.denseblock2),
        nn.Sequential(layers.transition2, layers.denseblock3),
        nn.Sequential(layers.transition3, layers.denseblock4),
    ]
    stem = nn.Conv2d(channels, 64, 3, padding=1, bias=False)  # the first norm is that of the first dense layer
    return Parts(stem, stages, nn.Sequential(layers.norm5, nn.ReLU(inplace=True)))


def _shufflenetv2(name: str, channels: int) -> Parts:
    from torchvision import models

    net = models.get_model(name, weights=None)
    return Parts(nn.Sequential(*_conv_norm_relu(channels, 24, 3)), [net.stage2, net.stage3, net.stage4], net.conv5)


def _efficientnet_b0(channels: int) -> Parts:
    """No layer of 1,280 filters before the classifier, and no stochastic depth."""
    from torchvision import models

    _, *stages, _ = models.efficientnet_b0(weights=None, stochastic_depth_prob=0.0).features
    convolution, norm, _ = _conv_norm_relu(channels, 32, 3)
    return Parts(nn.Sequential(convolution, norm, nn.SiLU(inplace=True)), stages, dropout=0.2)


# -- stages of our own ------------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expansion, depthwise 3x3, linear 1x1.

    In contrast to torchvision's: ReLU instead of ReLU6, an expansion layer also where the factor is 1, and a 1x1
    convolution in the shortcut of blocks of stride 1 that change the number of channels.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * inputs
        self.layers = nn.Sequential(
            *_conv_norm_relu(inputs, width),
            *_conv_norm_relu(width, width, 3, stride, groups=width),
            *_conv_norm_relu(width, outputs)[:2],
        )
        self.shortcut: nn.Module | None = nn.Identity() if stride == 1 else None
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(*_conv_norm_relu(inputs, outputs)[:2])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H', W')."""
        y = self.layers(x)
        return y if self.shortcut is None else y + self.shortcut(x)


_MOBILENETV2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),  # stride 2 for 224 pixels
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, filters, number of blocks, and stride of the first block, of each stage."""


def _mobilenetv2(channels: int) -> Parts:
    stages, inputs = [], 32
    for expansion, outputs, count, stride in _MOBILENETV2:
        blocks = [InvertedResidual(inputs, outputs, expansion, stride)]
        blocks += [InvertedResidual(outputs, outputs, expansion, stride=1) for _ in range(count - 1)]
        stages.append(nn.Sequential(*blocks))
        inputs = outputs
    return Parts(nn.Sequential(*_conv_norm_relu(channels, 32, 3)), stages, nn.Sequential(*_conv_norm_relu(320, 1280)))


class ShuffleUnit(nn.Module):
    """ShuffleNet's block: grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1.

    A block of stride 2 concatenates its pooled input instead of adding its input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        added = outputs - inputs if stride == 2 else outputs
        width = added // 4
        self.groups = 1 if inputs == 24 else groups  # the stem has too few filters for groups
        self.reduce = nn.Sequential(*_conv_norm_relu(inputs, width, groups=self.groups))
        self.expand = nn.Sequential(
            *_conv_norm_relu(width, width, 3, stride, groups=width), *_conv_norm_relu(width, added, groups=groups)[:2]
        )
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H', W')."""
        y = self.reduce(x)
        y = self.expand(y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2))
        return torch.relu(y + x if self.pool is None else torch.cat([y, self.pool(x)], 1))


def _shufflenet(channels: int) -> Parts:
    """ShuffleNet with 2 groups. The stem is a 1x1 convolution, as in INFER's program."""
    stages, inputs = [], 24
    for outputs, count in ((200, 4), (400, 8), (800, 4)):
        units = [ShuffleUnit(inputs, outputs, stride=2, groups=2)]
        units += [ShuffleUnit(outputs, outputs, stride=1, groups=2) for _ in range(count - 1)]
        stages.append(nn.Sequential(*units))
        inputs = outputs
    return Parts(nn.Sequential(*_conv_norm_relu(channels, 24)), stages)


_PARTS: dict[str, Callable[[int], Parts]] = {
    "resnet50-bn": functools.partial(_resnet, "resnet50"),
    "resnet101-bn": functools.partial(_resnet, "resnet101"),
    "densenet121-bn": _densenet121,
    "efficientnet-b0-bn": _efficientnet_b0,
    "mobilenetv2-bn": _mobilenetv2,
    "shufflenet-bn": _shufflenet,
    "shufflenetv2-bn": functools.partial(_shufflenetv2, "shufflenet_v2_x1_0"),
    "shufflenetv2-x0.5-bn": functools.partial(_shufflenetv2, "shufflenet_v2_x0_5"),
}

NAMED.update({name: functools.partial(StagedNet, make_parts=make_parts) for name, make_parts in _PARTS.items()})
