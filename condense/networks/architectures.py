"""Network architectures by name: those of dataset distillation, and any torchvision, timm or user-defined network.

Every network provides ``net(x)`` (logits), ``net.embed(x)`` (the flat input of its last linear layer) and
``net.features(x)`` (the maps of its stages). Names: ``convnet-d{1..6}-w{width}-{norm}[-{activation}][-{pool}]`` (see
``CONVNET_GRAMMAR``), ``mlp``, ``lenet``, ``alexnet``, ``alexnet-bn``, ``vgg11-in``, ``vgg11-bn``, ``resnet18-in``,
``resnet18-bn``, ``resnet18-bn-ap``, those of :mod:`condense.networks.small_images` (``resnet50-bn``, ``resnet101-bn``,
``densenet121-bn``, ``efficientnet-b0-bn``, ``mobilenetv2-bn``, ``shufflenet-bn``, ``shufflenetv2-bn``,
``shufflenetv2-x0.5-bn``), ``torchvision:NAME`` and ``timm:NAME``.

At 1x28x28 and 3x32x32 the layers are those of the code base that DC, DSA, DM and their forks share ("in" is GroupNorm
with one channel per group). Three rules extend them to other sizes, from 8x8 up and square or not:

* the first convolution pads 28x28 grey images by 2 more pixels, as if they were 32x32 (not in the ResNets and the
  networks of `small_images`);
* pooling or a stride that would leave less than 2x2 before a further stage is omitted, because a norm over one pixel
  gives a constant map; only the last pool may reach 1x1. A ConvNet raises an error instead, because its name states
  its depth;
* the number of inputs of the last linear layer follows from the maps.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from condense.errors import CondenseError, did_you_mean, missing_package
from condense.files import check_name
from condense.formatting import by, shorten
from condense.networks.group_norm import GroupNorm
from condense.networks.memory_format import CHANNELS_LAST, arrange, is_channels_last

Shape = tuple[int, int, int]

SMALLEST = 8

# The first of the optional choices is the default.
CONVNET_GRAMMAR = "convnet-d{1..6}-w{width}-{in|bn|ln|gn|none}[-{relu|sigmoid|leakyrelu|swish}][-{avg|max|none}]"

_CONVNET = re.compile(
    r"convnet-d(?P<depth>[1-6])-w(?P<width>[1-9][0-9]{0,3})-(?P<norm>in|bn|ln|gn|none)"
    r"(?:-(?P<activation>relu|sigmoid|leakyrelu|swish))?(?:-(?P<pool>avg|max|none))?"
)

# ReLU may overwrite its input, since convolutions and norms do not need their own output in the backward pass.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": functools.partial(nn.ReLU, inplace=True),
    "sigmoid": nn.Sigmoid,
    "leakyrelu": nn.LeakyReLU,
    "swish": nn.SiLU,
}


class AveragePool(nn.Module):
    """2x2 average pooling. With gradients on a CPU it is a matrix product over pairs of rows.

    Forward and backward of 64 maps of 128x32x32 then take 2.6 ms in bf16 and 6.3 ms in fp32, while ``avg_pool2d`` takes
    21 and 16 ms (two cores). The results are equal except for the order of sums.
    """

    def forward(self, x: Tensor) -> Tensor:
        *outer, height, width = x.shape
        if x.device.type != "cpu" or not torch.is_grad_enabled() or height % 2 or width % 2:
            return F.avg_pool2d(x, 2)
        with torch.autocast("cpu", enabled=False):  # the result has the dtype of the input
            means = x.reshape(-1, 2 * width) @ _pair_of_rows(width, x.dtype)
        return means.view(*outer, height // 2, width // 2)


def _pair_of_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Returns a matrix (2 * width, width / 2) that maps two concatenated rows of a map to one row of means."""
    columns = torch.arange(2 * width, device="cpu") % width // 2
    return F.one_hot(columns, width // 2).to(dtype) / 4


_POOLS: dict[str, Callable[[], nn.Module]] = {
    "avg": AveragePool,
    "max": functools.partial(nn.MaxPool2d, 2),
    "none": nn.Identity,
}

FACTORY_PREFIX = "python:"
"""Prefix of the recorded name of a network that was given as a function and cannot be built from its name."""


def network_name(network: str | Callable[..., nn.Module]) -> str:
    """Returns the name of an architecture in records: its name, or ``python:`` and the name of its factory."""
    if isinstance(network, str):
        return network
    return f"{FACTORY_PREFIX}{_factory_name(network)}"


def library_version(network: str | Callable[..., nn.Module]) -> str | None:
    """Returns the version of the library of ``timm:NAME`` or ``torchvision:NAME``, or that of the plug-in of a network.

    None for other networks.
    """
    if network in _CODE_VERSIONS:
        return _CODE_VERSIONS[str(network)]
    library = network.partition(":")[0] if isinstance(network, str) else ""
    return importlib.metadata.version(library) if library in ("timm", "torchvision") else None


class Network(nn.Module):
    """Interface of every network: ``classify(embed(x)) == net(x)``, and the maps of its stages."""

    classify: Callable[[Tensor], Tensor]
    """The last linear layer: (N, D) to (N, classes)."""

    rebuild: Callable[[], nn.Module] | None = None
    """Builds the network again, for third-party code; None: every layer has PyTorch's default initialisation."""

    draws_nothing = False
    """Whether a pass in train mode certainly draws no random numbers."""

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Maps (N, C, H, W) to (N, D), the flat input of ``classify``; appends the maps of :meth:`features` to
        ``maps``."""
        raise NotImplementedError

    def features(self, x: Tensor) -> list[Tensor]:
        """Returns the map (N, C, H, W) of each stage; :meth:`embed` computes them and the embedding in one pass."""
        maps: list[Tensor] = []
        self.embed(x, maps)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to logits (N, classes)."""
        return self.classify(self.embed(x))


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Puts a network into eval mode in the block, and afterwards each of its modules back into its own mode."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class LayerNorm(nn.LayerNorm):
    """Layer norm that keeps bf16 under autocast on CUDA; see :class:`GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or not torch.is_autocast_enabled("cuda"):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _norm(kind: str, channels: int, size: Sequence[int] = ()) -> nn.Module:
    """Creates the norm layer after a convolution; only LayerNorm uses ``size``, the height and width of its map."""
    if kind == "in":
        return GroupNorm(channels, channels)
    if kind == "gn":
        return GroupNorm(4, channels)
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    if kind == "ln":
        return LayerNorm([channels, *size])
    return nn.Identity()


def _extra_padding(shape: Shape) -> int:
    """Returns the additional padding with which the first convolution treats MNIST-sized grey images as 32x32."""
    return 2 if tuple(shape) == (1, 28, 28) else 0


class ConvNet(Network):
    """``depth`` blocks of 3x3 convolution (with bias), norm, activation and 2x2 pooling, then one linear layer.

    ``features`` returns each block's output after its activation and before its pooling, as attention matching needs;
    ``embed`` returns the output of the last block after its pooling.

    Raises:
        CondenseError: The image is too small for the blocks; the message states the largest depth that fits.
    """

    draws_nothing = True

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
        """Applies block ``i`` up to its activation."""
        x = self.convs[i](x)
        if torch.is_grad_enabled() or x.shape[2] * x.shape[3] < 1024:
            x = x.contiguous()  # torch's group norm is slow on small channels-last maps, its backward on all of them
        return self.activation(self.norms[i](x))

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        for i in range(len(self.convs)):
            # Without gradients on a CPU, channels-last is usually faster.
            channels_last = is_channels_last(x, inference=CHANNELS_LAST)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            x = self.stage(i, x)
            if maps is not None:
                maps.append(x)
            if channels_last and not torch.is_grad_enabled():
                x = x.contiguous(memory_format=torch.channels_last)
            x = self.pool(x)
        return x.flatten(1)


class PlainNet(Network):
    """MLP, LeNet, AlexNet and VGG11: stages of convolutions with ReLU, 2x2 max pooling after each, then linear layers.

    ``features`` returns each stage's output after its last activation and before its pooling; the MLP has no stages.

    Args:
        stages: Convolutions of each stage as (filters, kernel, padding).
        hidden: Widths of the linear layers, each with ReLU, between the flattened maps and ``classify``.
    """

    draws_nothing = True

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
    # Unpadded 5x5 convolutions need 28 pixels to give the maps of LeNet; for smaller images they keep the size.
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
        """Maps (N, channels, H, W) to (N, filters, H', W')."""
        y = self.pool(F.relu(self.norm1(self.conv1(x)), inplace=True))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet18(Network):
    """ResNet18 with a 3x3 stem and no first pooling; ``features`` returns the outputs of its four stages.

    ``embed`` is the mean over the last map. With ``average`` (the "AP" variant) average pooling does the halving and
    ``embed`` is the whole last map, flattened.
    """

    draws_nothing = True

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
        x = F.relu(self.norm1(self.conv1(arrange(x))), inplace=True)
        for stage in self.stages:
            x = stage(x)
            if maps is not None:
                maps.append(x)
        return x.flatten(1) if self.average else x.mean((2, 3))


class Wrapped(Network):
    """Makes any module that computes logits a :class:`Network`.

    If the module ends in a linear layer over flat features, ``embed`` returns the input of that layer, which a forward
    pass of two blank images finds (in eval mode and without random numbers). Otherwise ``embed`` returns the logits and
    ``classify`` is the identity: enough to train and to evaluate, but not for methods that match embeddings
    (:func:`require_embedding`). ``features`` returns every 4-D output of the module's direct children, in the order in
    which they run.

    Args:
        model: The module; it is not copied.
        shape: (C, H, W) of the images.
        classes: Number of logits that it must return.
        name: Name in messages.
        repeat_grey: Whether to repeat a single channel to the three that the module needs.

    Raises:
        CondenseError: The module fails on images of this size, or does not return (N, classes) logits.
    """

    def __init__(self, model: nn.Module, shape: Shape, classes: int, *, name: str, repeat_grey: bool = False) -> None:
        super().__init__()
        self.model = model
        self.repeat_grey = repeat_grey
        size = by(shape)
        calls: list[tuple[str, Tensor, Tensor]] = []
        try:
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(torch.no_grad())
                hooks.enter_context(evaluating(model))
                hooks.enter_context(torch.random.fork_rng(devices=[]))
                for path, module in model.named_modules():
                    if isinstance(module, nn.Linear):
                        hooks.enter_context(
                            module.register_forward_hook(
                                lambda _, inputs, output, path=path: calls.append((path, inputs[0], output))
                            )
                        )
                logits = model(self._channels(torch.zeros(2, *shape)))
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().split("\n")[0]
            raise CondenseError(f"network '{name}' does not take images of size {size}: {reason}") from error
        if not isinstance(logits, Tensor) or logits.shape != (2, classes):
            returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CondenseError(
                f"network '{name}' returns {returned} for 2 images of size {size}, not (2, {classes}) logits"
            )
        path, inputs, outputs = calls[-1] if calls else ("", logits, logits)
        self.last = path if calls and inputs.dim() == 2 and torch.equal(outputs, logits) else None

    def _channels(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1) if self.repeat_grey else x

    def classify(self, embedding: Tensor) -> Tensor:
        """Applies the module's last linear layer: maps (N, D) to (N, classes)."""
        if self.last is None:
            return embedding
        last = self.model.get_submodule(self.last)
        return last(embedding.to(next(last.parameters()).dtype))  # of a module in double precision

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        embeddings: list[Tensor] = []

        def append_map(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # An in-place activation returns its input: one map, not two.
            if (
                isinstance(output, Tensor)
                and output.dim() == 4
                and not any(output is previous for previous in maps or ())
            ):
                assert maps is not None
                maps.append(output)

        with contextlib.ExitStack() as hooks:
            if self.last is not None:
                last = self.model.get_submodule(self.last)
                hooks.enter_context(last.register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0])))
            for child in self.model.children() if maps is not None else ():
                hooks.enter_context(child.register_forward_hook(append_map))
            logits: Tensor = self.model(arrange(self._channels(x)))
        return embeddings[-1] if self.last is not None else logits


def as_network(model: nn.Module, shape: Shape, classes: int) -> Network:
    """Returns a module as a :class:`Network` that shares its weights.

    Raises:
        CondenseError: The module fails on images of this size, or does not return (N, classes) logits.
    """
    if isinstance(model, Network):
        return model
    return Wrapped(model, shape, classes, name=type(model).__name__)


def require_embedding(net: nn.Module, network: str | Callable[..., nn.Module], method: str) -> None:
    """Checks that a network ends in a linear layer, whose input a method matches.

    Raises:
        CondenseError: it does not.
    """
    if isinstance(net, Wrapped) and net.last is None:
        raise CondenseError(
            f"network '{network_name(network)}' does not end in a linear layer over flat features, whose inputs "
            f"{method} matches; add one, or take a method that matches gradients"
        )


def _torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    available = models.list_models(module=models)
    if name not in available:
        hint = did_you_mean(f"torchvision:{name}", [f"torchvision:{other}" for other in available])
        raise CondenseError(f"unknown network 'torchvision:{name}'{hint}")
    return models.get_model(name, weights=None, num_classes=classes)


def _timm(name: str, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise missing_package("timm", "timm", f"network 'timm:{name}'") from error
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
    name = _factory_name(factory)
    if isinstance(factory, nn.Module):
        raise CondenseError(
            f"network '{name}' is a module; give a function that makes a new one, e.g. lambda: {name}()"
        )
    if not callable(factory):
        raise CondenseError(f"network {shorten(repr(factory), 100)}: give a name or a function that makes a module")
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:
        raise CondenseError(f"the arguments of network '{name}' cannot be read; wrap it in a function") from error
    make = functools.partial(_call_factory, factory, _factory_arguments(name, parameters, shape, classes), shape)
    try:
        model = make()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise CondenseError(f"network '{name}' cannot be built for {by(shape)} images: {reason}") from error
    if next(model.parameters(), None) is None:
        raise CondenseError(f"network '{name}' has no parameters to train")
    net = model if isinstance(model, Network) else Wrapped(model, shape, classes, name=name)
    net.rebuild = make
    return net


def _factory_name(factory: Callable[..., nn.Module]) -> str:
    return getattr(factory, "__qualname__", type(factory).__name__)


_ARGUMENT_NAMES = {
    "channels": ("in_channels", "channels", "channel", "in_chans", "input_channels", "num_channels", "in_ch", "nc"),
    "classes": ("num_classes", "classes", "n_classes", "nclasses", "out_features", "num_outputs", "output_dim"),
    "shape": ("shape", "image_shape", "input_shape", "in_shape"),
    "size": ("image_size", "img_size", "input_size", "im_size"),
}
"""Names of the parameters of a factory that are recognised."""


def _factory_arguments(
    name: str, parameters: Iterable[inspect.Parameter], shape: Shape, classes: int
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a factory: those whose parameters have a known name, whether or not they have
    a default; two required parameters with other names are (shape, classes).

    Raises:
        CondenseError: other parameters are required.
    """
    values: dict[str, Any] = {"channels": shape[0], "classes": classes, "shape": shape, "size": shape[1:]}
    if shape[1] == shape[2]:
        values["size"] = shape[1]
    keywords, unknown = {}, []
    for parameter in parameters:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        meaning = next((key for key, names in _ARGUMENT_NAMES.items() if parameter.name.lower() in names), None)
        if meaning is not None and parameter.kind != inspect.Parameter.POSITIONAL_ONLY:
            keywords[parameter.name] = values[meaning]
        elif parameter.default is inspect.Parameter.empty:
            unknown.append(parameter.name)
    if not unknown:
        return [], keywords
    if len(unknown) == 2 and not keywords:
        return [shape, classes], {}
    if unknown and len(unknown) + len(keywords) == 2:  # e.g. (shape_of_images, num_classes)
        return [shape, classes], {}
    raise CondenseError(
        f"network '{name}' needs the arguments {', '.join(unknown)}; a factory takes none, (in_channels, num_classes) "
        "or (shape, classes)"
    )


_MADE: Any = WeakIdKeyDictionary()
"""Trainable parameters of the modules that factories have made."""


def _call_factory(
    factory: Callable[..., nn.Module], arguments: tuple[list[Any], dict[str, Any]], shape: Shape
) -> nn.Module:
    """Builds a module; the first forward pass of lazy layers sets their sizes and weights.

    Raises:
        CondenseError: a parameter belongs to an earlier module, whose training would go on in this one.
    """
    positional, keywords = arguments
    model = factory(*positional, **keywords)
    for path, parameter in model.named_parameters():
        if parameter in _MADE:
            raise CondenseError(
                f"network '{_factory_name(factory)}' returns the same parameter '{path}' twice; make a new module in "
                "every call, e.g. with copy.deepcopy"
            )
    _MADE.update({parameter: None for parameter in model.parameters() if parameter.requires_grad})
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        with torch.no_grad():
            model.eval()(torch.zeros(2, *shape))
        model.train()
    return model


NAMED: dict[str, Callable[[Shape, int], Network]] = {
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
"""Constructors of the networks that are not ConvNets by name; `small_images` adds its own."""


def register_network(name: str, factory: Callable[..., nn.Module]) -> None:
    """Gives the network of a factory a name, which all commands then understand.

    Args:
        name: of letters, digits, hyphens and dots.
        factory: a function as for ``network=`` of :func:`condense.distill`.

    Raises:
        CondenseError: the name is not of this form or means another network.
    """
    check_name(name, "network")
    known = NAMED.get(name)
    if name.startswith("conv") or (known is not None and getattr(known, "args", None) != (factory,)):
        raise CondenseError(f"network '{name}': this name means another network; choose another one")
    NAMED[name] = functools.partial(_from_factory, factory)
    _REGISTERED.add(name)


_REGISTERED: set[str] = set()
_CODE_VERSIONS: dict[Any, str] = {}


def registered_networks() -> set[str]:
    """Returns the names that :func:`register_network` has given."""
    return set(_REGISTERED)


def set_code_version(name: str, version: str) -> None:
    """Says which version of a plug-in's code a registered network has: part of the keys of caches."""
    _CODE_VERSIONS[name] = version


def network_names() -> list[str]:
    """Returns example names, all for images from 8x8 up; other ConvNets follow ``CONVNET_GRAMMAR``."""
    convnets = [f"convnet-d3-w128-{norm}" for norm in ("in", "bn", "ln", "gn", "none")]
    convnets += ["convnet-d1-w128-in", "convnet-d2-w128-in"]
    convnets += [f"convnet-d3-w{width}-in" for width in (32, 64, 256)]
    convnets += [f"convnet-d3-w128-in-{option}" for option in ("sigmoid", "leakyrelu", "swish", "max", "none")]
    convnets += ["convnet-d3-w128-bn-swish", "convnet-d3-w128-bn-swish-max"]
    return [*convnets, *NAMED, "torchvision:resnet18", "timm:resnet18"]


def _nearest_convnet(text: str) -> str:
    """Returns the ConvNet whose parts occur in ``text``, also in the common spelling (convnetd4, convnetaswishbn)."""

    def part(pattern: str, default: str) -> str:
        match = re.search(pattern, text)
        return match[1] if match else default

    depth, width = part("d([1-6])(?![0-9])", "3"), part("w([1-9][0-9]{0,3})", "128")
    parts = [part("(in|bn|ln|gn|none)", "in"), part("(leakyrelu|relu|sigmoid|swish)", ""), part("(avg|max)", "")]
    return "-".join(["convnet", f"d{depth}", f"w{width}", *filter(None, parts)])


def _constructor(network: str) -> Callable[[Shape, int], Network]:
    """Returns the function that builds the network of this name; builds and imports nothing."""
    if network in NAMED:
        return NAMED[network]
    library, _, name = network.partition(":")
    if library in _LIBRARIES and name:
        return functools.partial(_from_library, network)
    match = _CONVNET.fullmatch(network)
    if match is None and network.lower().startswith("conv"):
        suggestion = _nearest_convnet(network.lower())
        raise CondenseError(
            f"unknown network '{network}'; did you mean '{suggestion}'? ConvNets are named {CONVNET_GRAMMAR}"
        )
    if match is None:
        hint = did_you_mean(network.lower(), network_names(), "condense ls networks")
        raise CondenseError(f"unknown network '{network}'{hint}")
    depth, width, norm = int(match["depth"]), int(match["width"]), match["norm"]
    if norm == "gn" and width % 4:
        raise CondenseError(f"network '{network}' splits its channels into 4 groups; its width must be a multiple of 4")
    activation, pool = match["activation"] or "relu", match["pool"] or "avg"
    return functools.partial(ConvNet, depth=depth, width=width, norm=norm, activation=activation, pool=pool)


def check_network(network: str | Callable[..., nn.Module]) -> None:
    """Checks the name of a network without building it or importing torchvision or timm.

    Names of torchvision and timm models are checked only by :func:`build`.

    Raises:
        CondenseError: The name is unknown; the message suggests the nearest one.
    """
    if isinstance(network, str):
        _constructor(network)


def build_network(network: str | Callable[..., nn.Module], shape: Shape, classes: int) -> Network:
    """Builds a newly initialised network on the CPU, in train mode.

    Initial weights are PyTorch's defaults (for torchvision and timm those of the model), drawn from torch's global CPU
    generator; callers use :func:`condense.rng.seeded`.

    Args:
        network: A name, or a factory of a new module. Parameters of the factory that are called ``in_channels``,
            ``num_classes``, ``shape``, ``image_size`` or alike get these values; two required ones with other names get
            ``(shape, classes)``. A module that is not a :class:`Network` becomes :class:`Wrapped`. Grey images are
            repeated for models of torchvision and timm.
        shape: (C, H, W) of the images.
        classes: Number of logits.

    Raises:
        CondenseError: An unknown name, images under 8x8, a ConvNet that is too deep for them, a missing package, or a
            third-party network that fails on such images.
    """
    if not isinstance(network, str):
        return _from_factory(network, shape, classes)
    construct = _constructor(network)
    if min(shape[1:]) < SMALLEST:
        raise CondenseError(f"network '{network}' needs images of at least 8x8 pixels, not {shape[1]}x{shape[2]}")
    return construct(shape, classes)


@torch.no_grad()
def reset_parameters(net: nn.Module) -> None:
    """Initialises a network of :func:`build` again: bit for bit like a new one that is built with the same seed.

    Running statistics are reset and gradients removed; device, dtype, memory format and train mode stay. Only
    third-party networks are built again.
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
    """Applies PyTorch's default initialisation like a constructor: on the CPU in contiguous memory order.

    ``reset_parameters`` would fill channels-last weights in another order, and weights on a GPU from another generator.
    """
    weight = torch.empty(module.weight.shape)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    module.weight.copy_(weight)
    if module.bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        module.bias.copy_(torch.empty(module.bias.shape).uniform_(-bound, bound))


def uses_batch_statistics(net: nn.Module) -> bool:
    """Returns whether any layer is a BatchNorm, so that outputs in train mode depend on the whole batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
