"""The field's networks under strict names, and any torchvision, timm or user-made network behind the same calls.

Every network gives ``net(x)`` (logits), ``net.embed(x)`` (the flat input of its last linear layer) and
``net.features(x)`` (the maps of its stages). Names: ``convnet-d{1..6}-w{width}-{norm}[-{activation}][-{pool}]`` (see
``CONVNET_GRAMMAR``), ``mlp``, ``lenet``, ``alexnet``, ``alexnet-bn``, ``vgg11-in``, ``vgg11-bn``, ``resnet18-in``,
``resnet18-bn``, ``resnet18-bn-ap``, ``torchvision:NAME`` and ``timm:NAME``.

At 1x28x28 and 3x32x32 the layers are those of the code base that DC, DSA, DM and their forks share ("in" is GroupNorm
with one channel per group). Three rules carry them to other sizes, from 8x8 up and square or not:

* a 28x28 grey image grows to 32x32 by 2 more pixels of padding in the first convolution (not in the ResNets);
* pooling or a stride that would leave less than 2x2 before a further stage is dropped, because a norm over one pixel
  turns the map into a constant; only the last pool may reach 1x1. A ConvNet is refused instead: its name states its
  depth;
* the last linear layer has as many inputs as the maps then give.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import math
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.errors import CondenseError, did_you_mean, need
from condense.formatting import by

Shape = tuple[int, int, int]

SMALLEST = 8

# The first of the optional choices is the default.
CONVNET_GRAMMAR = "convnet-d{1..6}-w{width}-{in|bn|ln|gn|none}[-{relu|sigmoid|leakyrelu|swish}][-{avg|max|none}]"

_CONVNET = re.compile(
    r"convnet-d(?P<depth>[1-6])-w(?P<width>[1-9][0-9]{0,3})-(?P<norm>in|bn|ln|gn|none)"
    r"(?:-(?P<activation>relu|sigmoid|leakyrelu|swish))?(?:-(?P<pool>avg|max|none))?"
)

# ReLU may overwrite its input: neither a convolution nor a norm needs its own output for the backward pass.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": functools.partial(nn.ReLU, inplace=True),
    "sigmoid": nn.Sigmoid,
    "leakyrelu": nn.LeakyReLU,
    "swish": nn.SiLU,
}


class AveragePool(nn.Module):
    """The mean of each 2x2 square. With gradients on a CPU it is a matrix product over pairs of rows.

    Forward and backward of 64 maps of 128x32x32 then take 2.6 ms in bf16 and 6.3 ms in fp32, where ``avg_pool2d`` takes
    21 and 16 ms (two cores). Sums in another order aside, the results are equal.
    """

    def forward(self, x: Tensor) -> Tensor:
        *outer, height, width = x.shape
        if x.device.type != "cpu" or not torch.is_grad_enabled() or height % 2 or width % 2:
            return F.avg_pool2d(x, 2)
        with torch.autocast("cpu", enabled=False):  # means have the dtype of what they are means of
            means = x.reshape(-1, 2 * width) @ _pair_of_rows(width, x.dtype)
        return means.view(*outer, height // 2, width // 2)


def _pair_of_rows(width: int, dtype: torch.dtype) -> Tensor:
    """(2 * width, width / 2): takes two rows of a map, one after the other, to one row of means."""
    columns = torch.arange(2 * width, device="cpu") % width // 2
    return F.one_hot(columns, width // 2).to(dtype) / 4


_POOLS: dict[str, Callable[[], nn.Module]] = {
    "avg": AveragePool,
    "max": functools.partial(nn.MaxPool2d, 2),
    "none": nn.Identity,
}

FACTORY = "python:"
"""Begins the recorded name of a network that was given as a function, and cannot be built from its name."""


def name_of(network: str | Callable[..., nn.Module]) -> str:
    """What records call an architecture: its name, or ``python:`` and the name of the function that makes it."""
    if isinstance(network, str):
        return network
    return f"{FACTORY}{getattr(network, '__qualname__', type(network).__name__)}"


def library_version(network: str | Callable[..., nn.Module]) -> str | None:
    """Version of the library that defines ``timm:NAME`` or ``torchvision:NAME``; None for our own and for functions."""
    library = network.partition(":")[0] if isinstance(network, str) else ""
    return importlib.metadata.version(library) if library in ("timm", "torchvision") else None


class Network(nn.Module):
    """What every network offers: ``classify(embed(x)) == net(x)``, and the maps on the way."""

    classify: Callable[[Tensor], Tensor]
    """The last linear layer: (N, D) to (N, classes)."""

    rebuild: Callable[[], nn.Module] | None = None
    """Makes the weights anew where they come from code of others; None: every layer starts as PyTorch starts it."""

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(N, C, H, W) to (N, D), the flat input of ``classify``; appends the maps of :meth:`features` to ``maps``."""
        raise NotImplementedError

    def features(self, x: Tensor) -> list[Tensor]:
        """The (N, C, H, W) map of each stage, first to last; :meth:`embed` gives them and the embedding in one pass."""
        maps: list[Tensor] = []
        self.embed(x, maps)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, classes)."""
        return self.classify(self.embed(x))


def _norm(kind: str, channels: int, size: Sequence[int] = ()) -> nn.Module:
    """The norm layer after a convolution; ``size`` (height, width of its map) is read for LayerNorm alone."""
    if kind == "in":
        return nn.GroupNorm(channels, channels)
    if kind == "gn":
        return nn.GroupNorm(4, channels)
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    if kind == "ln":
        return nn.LayerNorm([channels, *size])
    return nn.Identity()


def _extra_padding(shape: Shape) -> int:
    """Padding that the first convolution adds so that MNIST-sized grey images are treated as 32x32."""
    return 2 if tuple(shape) == (1, 28, 28) else 0


class ConvNet(Network):
    """``depth`` blocks of 3x3 convolution (with bias), norm, activation and 2x2 pooling, then one linear layer.

    ``features`` gives each block's output after its activation and before its pooling, as attention matching needs;
    ``embed`` is the last block after its pooling.

    Raises:
        CondenseError: the blocks would pool the image to nothing; the message names the largest depth that fits.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        depth: int = 3,
        width: int = 128,
        norm: str = "in",
        activation: str = "relu",
        pool: str = "avg",
    ) -> None:
        super().__init__()
        channels, height, columns = shape
        padding = 1 + _extra_padding(shape)
        height, columns = height + 2 * padding - 2, columns + 2 * padding - 2
        fits = min(height, columns).bit_length() - 1
        if pool != "none" and depth > fits:
            raise CondenseError(
                f"convnet-d{depth} is too deep for {shape[1]}x{shape[2]} images, as each block halves them; "
                f"the largest depth that fits is {fits}"
            )
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.activation, self.pool = _ACTIVATIONS[activation](), _POOLS[pool]()
        for _ in range(depth):
            self.convs.append(nn.Conv2d(channels, width, 3, padding=padding))
            self.norms.append(_norm(norm, width, (height, columns)))
            channels, padding = width, 1
            if pool != "none":
                height, columns = height // 2, columns // 2
        self.classify = nn.Linear(width * height * columns, classes)

    def stage(self, i: int, x: Tensor) -> Tensor:
        """Block ``i`` up to its activation."""
        x = self.convs[i](x)
        if _channels_last_pays(x) and x.shape[2] * x.shape[3] < 1024:
            x = x.contiguous()  # torch's group norm crawls over small channels-last maps
        return self.activation(self.norms[i](x))

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        for i in range(len(self.convs)):
            if _channels_last_pays(x):
                x = x.contiguous(memory_format=torch.channels_last)
            x = self.stage(i, x)
            if maps is not None:
                maps.append(x)
            if _channels_last_pays(x):
                x = x.contiguous(memory_format=torch.channels_last)
            x = self.pool(x)
        return x.flatten(1)


def _channels_last_pays(x: Tensor) -> bool:
    """Without gradients on a CPU: convolution and pooling are several times faster there, their backward is not."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


class PlainNet(Network):
    """MLP, LeNet, AlexNet and VGG11: stages of convolutions with ReLU, 2x2 max pooling after each, then linear layers.

    ``features`` gives each stage's output after its last activation and before its pooling; the MLP has no stages.

    Args:
        stages: per stage its convolutions, as (filters, kernel, padding).
        hidden: widths of the linear layers, each with ReLU, between the flattened maps and ``classify``.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        stages: Sequence[Sequence[tuple[int, int, int]]] = (),
        norm: str = "none",
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        channels, height, columns = shape
        extra = _extra_padding(shape)
        self.stages, self.pools = nn.ModuleList(), nn.ModuleList()
        for i, convolutions in enumerate(stages):
            layers: list[nn.Module] = []
            for filters, kernel, padding in convolutions:
                padding, extra = padding + extra, 0
                height, columns = height + 2 * padding - kernel + 1, columns + 2 * padding - kernel + 1
                layers.append(nn.Conv2d(channels, filters, kernel, padding=padding))
                layers.append(_norm(norm, filters, (height, columns)))
                layers.append(nn.ReLU(inplace=True))
                channels = filters
            self.stages.append(nn.Sequential(*layers))
            last = i == len(stages) - 1
            if min(height, columns) >= (2 if last else 4):
                self.pools.append(nn.MaxPool2d(2))
                height, columns = height // 2, columns // 2
            else:
                self.pools.append(nn.Identity())
        widths = [channels * height * columns, *hidden]
        self.hidden = nn.Sequential()
        for inputs, outputs in zip(widths, hidden):
            self.hidden.append(nn.Linear(inputs, outputs)).append(nn.ReLU(inplace=True))
        self.classify = nn.Linear(widths[-1], classes)

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        for stage, pool in zip(self.stages, self.pools):
            x = stage(x)
            if maps is not None:
                maps.append(x)
            x = pool(x)
        return self.hidden(x.flatten(1))


def _lenet(shape: Shape, classes: int) -> PlainNet:
    # Two unpadded 5x5 convolutions need 28 pixels to leave what LeNet was made for; below that they keep the size.
    padding = 0 if min(shape[1:]) >= 28 else 2
    return PlainNet(shape, classes, stages=[[(6, 5, padding)], [(16, 5, padding)]], hidden=(120, 84))


_ALEXNET = [[(128, 5, 2)], [(192, 5, 2)], [(256, 3, 1), (192, 3, 1), (192, 3, 1)]]

_VGG11 = [[(width, 3, 1)] * count for width, count in ((64, 1), (128, 1), (256, 2), (512, 2), (512, 2))]


class BasicBlock(nn.Module):
    """The two-convolution residual block of ResNet18; ``average`` halves by 2x2 average pooling instead of a stride."""

    def __init__(self, channels: int, filters: int, norm: str, halve: bool, average: bool) -> None:
        super().__init__()
        stride = 2 if halve and not average else 1
        self.pool = AveragePool() if halve and average else nn.Identity()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, filters)
        self.shortcut: nn.Module = nn.Identity()
        if channels != filters:
            narrow = nn.Conv2d(channels, filters, 1, stride, bias=False)
            self.shortcut = nn.Sequential(narrow, self.pool, _norm(norm, filters))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, filters, H', W')."""
        y = self.pool(F.relu(self.norm1(self.conv1(x)), inplace=True))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet18(Network):
    """ResNet18 with a 3x3 stem and no first pooling; ``features`` gives the outputs of its four stages.

    ``embed`` is the mean over the last map. With ``average`` (the "AP" variant) average pooling does the halving and
    ``embed`` is the whole last map, flattened.
    """

    def __init__(self, shape: Shape, classes: int, *, norm: str = "in", average: bool = False) -> None:
        super().__init__()
        channels, height, columns = shape
        self.average = average
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.norm1 = _norm(norm, 64)
        self.stages = nn.ModuleList()
        channels = 64
        for filters in (64, 128, 256, 512):
            halve = filters > 64 and min(height, columns) >= 4
            if halve:
                height, columns = (size // 2 if average else (size + 1) // 2 for size in (height, columns))
            self.stages.append(
                nn.Sequential(
                    BasicBlock(channels, filters, norm, halve, average),
                    BasicBlock(filters, filters, norm, False, average),
                )
            )
            channels = filters
        self.classify = nn.Linear(512 * (height * columns if average else 1), classes)

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        for stage in self.stages:
            x = stage(x)
            if maps is not None:
                maps.append(x)
        return x.flatten(1) if self.average else x.mean((2, 3))


class Wrapped(Network):
    """Any module that ends in a linear layer over flat features, as a :class:`Network`.

    Two blank images (in eval mode, so that no statistics move; no random numbers are consumed) find that layer.
    ``embed`` reads its input while the whole module runs. ``features`` gives every 4-D output of the module's direct
    children, in the order in which they run: for a torchvision ResNet also the stem and the pools, for a model whose
    maps are channels-last (Swin) those.

    Args:
        model: the module; it is kept, not copied.
        shape: of the images that it will be given, (C, H, W).
        classes: the number of logits that it must give.
        name: what messages call it.
        repeat_grey: a single channel is repeated to the three that the module was made for.

    Raises:
        CondenseError: the module fails on images of this size, gives other logits, or does not end in a linear layer.
    """

    def __init__(self, model: nn.Module, shape: Shape, classes: int, *, name: str, repeat_grey: bool = False) -> None:
        super().__init__()
        self.model = model
        self.repeat_grey = repeat_grey
        size = by(shape)
        calls: list[tuple[str, Tensor, Tensor]] = []
        modes = {module: module.training for module in model.modules()}
        try:
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(torch.no_grad())
                hooks.enter_context(torch.random.fork_rng(devices=[]))
                for path, module in model.named_modules():
                    if isinstance(module, nn.Linear):
                        hooks.enter_context(
                            module.register_forward_hook(
                                lambda _, inputs, output, path=path: calls.append((path, inputs[0], output))
                            )
                        )
                logits = model.eval()(self._channels(torch.zeros(2, *shape)))
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().split("\n")[0]
            raise CondenseError(f"network '{name}' does not take images of size {size}: {reason}") from error
        finally:
            for module, training in modes.items():
                module.training = training
        if not isinstance(logits, Tensor) or logits.shape != (2, classes):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CondenseError(
                f"network '{name}' gives {given} for 2 images of size {size}, not (2, {classes}) logits"
            )
        self.last, inputs, outputs = calls[-1] if calls else ("", logits, logits)
        if not calls or inputs.dim() != 2 or not torch.equal(outputs, logits):
            raise CondenseError(f"network '{name}' does not end in a linear layer over flat features, as embed() needs")

    def _channels(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1) if self.repeat_grey else x

    def classify(self, embedding: Tensor) -> Tensor:
        """The module's own last linear layer: (N, D) to (N, classes)."""
        return self.model.get_submodule(self.last)(embedding)

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # An activation in place hands back the tensor that it was given: one map, not two.
            if isinstance(output, Tensor) and output.dim() == 4 and not any(output is known for known in maps or ()):
                assert maps is not None
                maps.append(output)

        with contextlib.ExitStack() as hooks:
            last = self.model.get_submodule(self.last)
            hooks.enter_context(last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
            for child in self.model.children() if maps is not None else ():
                hooks.enter_context(child.register_forward_hook(keep))
            self.model(self._channels(x))
        return seen[-1]


def _torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        hint = did_you_mean(f"torchvision:{name}", [f"torchvision:{other}" for other in known])
        raise CondenseError(f"unknown network 'torchvision:{name}'{hint}")
    return models.get_model(name, weights=None, num_classes=classes)


def _timm(name: str, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise need("timm", "timm", f"network 'timm:{name}'") from error
    if not timm.is_model(name):
        hint = did_you_mean(f"timm:{name}", [f"timm:{other}" for other in timm.list_models()])
        raise CondenseError(f"unknown network 'timm:{name}'{hint}")
    return timm.create_model(name, pretrained=False, num_classes=classes)


_LIBRARIES: dict[str, Callable[[str, int], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}


def _from_library(network: str, shape: Shape, classes: int) -> Wrapped:
    library, _, name = network.partition(":")
    if shape[0] not in (1, 3):
        raise CondenseError(f"network '{network}' takes images of 1 or 3 channels, not {shape[0]}")
    make = functools.partial(_LIBRARIES[library], name, classes)
    net = Wrapped(make(), shape, classes, name=network, repeat_grey=shape[0] == 1)
    net.rebuild = make
    return net


def _from_factory(factory: Callable[..., nn.Module], shape: Shape, classes: int) -> Network:
    name = getattr(factory, "__qualname__", type(factory).__name__)
    if isinstance(factory, nn.Module):
        raise CondenseError(
            f"network '{name}' is a module; give a function that makes a new one, e.g. lambda: {name}()"
        )
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:
        raise CondenseError(f"the arguments of network '{name}' cannot be read; wrap it in a function") from error
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = sum(p.default is inspect.Parameter.empty and p.kind not in unnamed for p in parameters)
    if required not in (0, 2):
        raise CondenseError(f"network '{name}' needs {required} arguments; a factory takes (shape, classes) or none")
    make = functools.partial(factory, shape, classes) if required else factory
    model = make()
    net = model if isinstance(model, Network) else Wrapped(model, shape, classes, name=name)
    net.rebuild = make
    return net


_NAMED: dict[str, Callable[[Shape, int], Network]] = {
    "mlp": functools.partial(PlainNet, hidden=(128, 128)),
    "lenet": _lenet,
    "alexnet": functools.partial(PlainNet, stages=_ALEXNET),
    "alexnet-bn": functools.partial(PlainNet, stages=_ALEXNET, norm="bn"),
    "vgg11-in": functools.partial(PlainNet, stages=_VGG11, norm="in"),
    "vgg11-bn": functools.partial(PlainNet, stages=_VGG11, norm="bn"),
    "resnet18-in": functools.partial(ResNet18, norm="in"),
    "resnet18-bn": functools.partial(ResNet18, norm="bn"),
    "resnet18-bn-ap": functools.partial(ResNet18, norm="bn", average=True),
}


def names() -> list[str]:
    """Example names, all of which fit images from 8x8 up; other ConvNets follow ``CONVNET_GRAMMAR``."""
    convnets = [f"convnet-d3-w128-{norm}" for norm in ("in", "bn", "ln", "gn", "none")]
    convnets += ["convnet-d1-w128-in", "convnet-d2-w128-in"]
    convnets += [f"convnet-d3-w{width}-in" for width in (32, 64, 256)]
    convnets += [f"convnet-d3-w128-in-{option}" for option in ("sigmoid", "leakyrelu", "swish", "max", "none")]
    convnets += ["convnet-d3-w128-bn-swish", "convnet-d3-w128-bn-swish-max"]
    return [*convnets, *_NAMED, "torchvision:resnet18", "timm:resnet18"]


def _nearest_convnet(word: str) -> str:
    """The ConvNet whose parts occur in ``word``, also in the field's spelling (convnetd4, convnetaswishbn)."""

    def find(pattern: str, default: str) -> str:
        match = re.search(pattern, word)
        return match[1] if match else default

    depth, width = find("d([1-6])(?![0-9])", "3"), find("w([1-9][0-9]{0,3})", "128")
    parts = [find("(in|bn|ln|gn|none)", "in"), find("(leakyrelu|relu|sigmoid|swish)", ""), find("(avg|max)", "")]
    return "-".join(["convnet", f"d{depth}", f"w{width}", *filter(None, parts)])


def _constructor(network: str) -> Callable[[Shape, int], Network]:
    """What makes the network of this name; nothing is built or imported."""
    if network in _NAMED:
        return _NAMED[network]
    library, _, name = network.partition(":")
    if library in _LIBRARIES and name:
        return functools.partial(_from_library, network)
    match = _CONVNET.fullmatch(network)
    if match is None and network.lower().startswith("conv"):
        meant = _nearest_convnet(network.lower())
        raise CondenseError(
            f"unknown network '{network}'; did you mean '{meant}'? ConvNets are named {CONVNET_GRAMMAR}"
        )
    if match is None:
        raise CondenseError(f"unknown network '{network}'{did_you_mean(network.lower(), names())}")
    depth, width, norm = int(match["depth"]), int(match["width"]), match["norm"]
    if norm == "gn" and width % 4:
        raise CondenseError(f"network '{network}' splits its channels into 4 groups; its width must be a multiple of 4")
    activation, pool = match["activation"] or "relu", match["pool"] or "avg"
    return functools.partial(ConvNet, depth=depth, width=width, norm=norm, activation=activation, pool=pool)


def check(network: str | Callable[..., nn.Module]) -> None:
    """Does nothing for a well-formed name or a factory; builds nothing and imports neither torchvision nor timm.

    What follows ``torchvision:`` or ``timm:`` is looked up by :func:`build`.

    Raises:
        CondenseError: the name is unknown or mis-spelt; the message suggests the nearest one.
    """
    if isinstance(network, str):
        _constructor(network)


def build(network: str | Callable[..., nn.Module], shape: Shape, classes: int) -> Network:
    """A freshly initialised network on the CPU, in train mode.

    Initial weights are PyTorch's defaults (for torchvision and timm: that model's own) drawn from torch's global CPU
    generator, so callers wrap this in :func:`condense.rng.seeded`.

    Args:
        network: a name, or a function that makes a new module: called as ``factory(shape, classes)`` where two of its
            arguments have no default, as ``factory()`` where none has. A module that is no :class:`Network` becomes
            :class:`Wrapped`. Models of torchvision and timm see a grey channel three times.
        shape: of the images, (C, H, W).
        classes: number of logits.

    Raises:
        CondenseError: unknown name, images under 8x8, a ConvNet too deep for them, a missing package, or a foreign
            network that fails on such images.
    """
    if not isinstance(network, str):
        return _from_factory(network, shape, classes)
    construct = _constructor(network)
    if min(shape[1:]) < SMALLEST:
        raise CondenseError(f"network '{network}' needs images of at least 8x8 pixels, not {shape[1]}x{shape[2]}")
    return construct(shape, classes)


@torch.no_grad()
def reset(net: nn.Module) -> None:
    """Draws new weights for a network of :func:`build`: bit for bit those of a new one built under the same seed.

    Running statistics restart too and gradients are dropped; device, dtype, memory format and train mode stay. Only
    foreign networks are built again to copy from.
    """
    rebuild = getattr(net, "rebuild", None)
    if rebuild is not None:
        fresh = rebuild()
        for old, new in zip(chain(net.parameters(), net.buffers()), chain(fresh.parameters(), fresh.buffers())):
            old.copy_(new)
    else:
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _redraw(module)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
                module.reset_parameters()
    for parameter in net.parameters():
        parameter.grad = None


def _redraw(module: nn.Conv2d | nn.Linear) -> None:
    """PyTorch's default initialisation, drawn as a constructor draws it: on the CPU in plain memory order.

    ``reset_parameters`` would fill channels-last weights in another order and those on a GPU from another generator.
    """
    weight = torch.empty(module.weight.shape)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    module.weight.copy_(weight)
    if module.bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        module.bias.copy_(torch.empty(module.bias.shape).uniform_(-bound, bound))


def uses_dropout(net: nn.Module) -> bool:
    """Whether the network draws at random in train mode, so that its draws must be keyed."""
    return any("drop" in type(module).__name__.lower() for module in net.modules())


def uses_batch_statistics(net: nn.Module) -> bool:
    """Whether any layer is a BatchNorm, so that outputs in train mode depend on the other images of the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
