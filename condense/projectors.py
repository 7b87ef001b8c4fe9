"""Image-to-label projectors (HeLlO, ICCV 2025): a public network, low-rank changes of its weights, and a head.

``logits = scale * normalised(E(x)) @ W + bias``, where E is a public encoder whose weights of convolutions and linear
layers are ``W_0 + A B``, each as a matrix with one row for each output. Only A, B and what makes the head are stored;
the encoder is found by its name and stays as it is. Products are added to the weights when a projector is loaded, so
that a student's step costs one pass through the encoder.

=========================== ==========================================================================================
backbone                    weights
=========================== ==========================================================================================
NAME                        one of :data:`SHIPPED`, which comes with this package
FILE.h5                     the first teacher of a file of ``condense teachers``
torchvision:NAME            its default public weights
timm:NAME                   its public weights
open_clip:NAME@TAG          a CLIP model with the weights that open_clip calls TAG; the text tower can make the head
LIBRARY:NAME@FILE           the same network with the weights of a file
=========================== ==========================================================================================
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import networks, rng, teachers
from condense.augment import Standardise, Transform, ViewRule, single
from condense.errors import CondenseError, did_you_mean, need
from condense.labels import (
    LOSSES,
    PROVIDERS,
    TeacherLabels,
    _array,
    _check_classes,
    _classes,
    _classes_from,
    _count,
    _nbytes,
    _rule_from,
    _squares,
    _views,
    answers,
    check_loss,
    content,
    mixed,
)

SHIPPED = ("tiny20-convnet-d3-w64-bn",)
"""Backbones that come with the package: trained on 64x64 images of 20 classes, made 32x32."""
LIBRARIES = ("open_clip", "timm", "torchvision")
HEADS = ("text", "mean")
PROMPT = "a photo of a {}."
_FOLDER = Path(__file__).parent / "backbones"
_LARGE = 1e30
"""Beyond any mean or std, and within float32."""
_HEAD = ("head", "head_a", "head_b", "bias", "scale")

# Public networks ------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A frozen network of others that takes pixels to flat features.

    Args:
        net: has ``embed``, from images normalised in its own way to features.
        shape: (C,H,W) that it takes; pixels of other sizes are resized, grey ones repeated.
        mean, std: of its normalisation, for each channel.
    """

    def __init__(self, net: nn.Module, shape: networks.Shape, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net, self.shape = net, shape
        self.own_mean: Tensor
        self.own_std: Tensor
        for name, value in (("own_mean", mean), ("own_std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode: its statistics are public too."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B,C,H,W) in [0,1] to features (B,D)."""
        if pixels.shape[2:] != self.shape[1:]:
            pixels = F.interpolate(pixels, self.shape[1:], mode="bilinear", align_corners=False, antialias=True)
        pixels = pixels.expand(-1, self.shape[0], -1, -1)
        features: Tensor = self.net.embed((pixels - self.own_mean) / self.own_std)  # type: ignore[operator]
        return features.flatten(1)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A public network as it was found."""

    encoder: Encoder
    known: dict[str, Any]
    """For a file: ``name``, ``sha256`` of its state, ``bytes`` of the encoder, and where a file of weights lies."""
    scale: float = 10.0
    """Factor of cosines where a head starts."""
    text: Callable[[Sequence[str], Sequence[str]], Tensor] | None = None
    """Class names and prompts to unit vectors (D, classes); None without a text tower."""
    text_bytes: int = 0
    """Of the text tower."""

    def external(self, head: str) -> int:
        """Bytes of the encoder, with the text tower where that makes the head."""
        return int(self.known["bytes"]) + (self.text_bytes if head == "text" else 0)


class _Clip(nn.Module):
    """The image tower of a CLIP model, behind ``embed``."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def embed(self, x: Tensor) -> Tensor:
        """(B,3,H,W) to (B,D)."""
        found = self.visual(x)
        first: Tensor = found if isinstance(found, Tensor) else found[0]  # CoCa's tower gives its tokens too
        return first


def find(word: str, shape: networks.Shape, device: torch.device, what: str = "backbone=") -> Backbone:
    """The public network of a name as in the table of this module.

    Args:
        word: its name.
        shape: (C,H,W) of the images that it will be given.
        device: where it computes.
        what: begins what messages call it.

    Raises:
        CondenseError: an unknown name, a missing package, weights that are not here, or images that it cannot take.
    """
    named, about = what + word, {"name": word}
    library, _, rest = word.partition(":")
    if library in LIBRARIES and rest:
        name, _, weights = rest.partition("@")
        made = {"open_clip": _open_clip, "timm": _timm, "torchvision": _torchvision}[library](
            name, weights, named, about
        )
        if weights and _is_file(weights):
            made.known["path"] = f"{library}:{name}@{Path(weights).absolute()}"
    elif word in SHIPPED:
        made = _teacher(_FOLDER / f"{word}.h5", named, about)
    elif word.endswith(".h5"):
        made = _teacher(Path(word), named, {**about, "path": str(Path(word).absolute())})
    else:
        hint = did_you_mean(word, SHIPPED)
        raise CondenseError(f"{named}: unknown{hint}; or write FILE.h5 of `condense teachers`, or LIBRARY:NAME with "
                            f"one of {', '.join(LIBRARIES)}")  # fmt: skip
    if shape[0] not in (1, made.encoder.shape[0]):
        raise CondenseError(f"{named}: takes images of {made.encoder.shape[0]} channels, not {shape[0]}")
    made.encoder.to(device)
    return made


def shown(word: str) -> str:
    """A backbone's name as commands in records show it: where somebody's file lies is a place to fill in."""
    if word.endswith(".h5"):
        return "PATH"
    name, at, weights = word.partition("@")
    return f"{name}@PATH" if at and _is_file(weights) else word


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # names that no file can have
        return False


def _known(net: nn.Module, about: Mapping[str, Any]) -> dict[str, Any]:
    state = net.state_dict()
    size = sum(value.numel() * value.element_size() for value in state.values())
    return {**about, "sha256": content({name: state[name] for name in sorted(state)}), "bytes": size}


def _normalisation(known: Any, channels: int) -> bool:
    """Whether a stranger's file gives a mean and a std for each channel."""
    try:
        fits = len(known["mean"]) == len(known["std"]) == channels
        values = [*known["mean"], *known["std"]]
        fits = fits and all(isinstance(x, int | float) and abs(x) < _LARGE for x in values)
        return fits and min(known["std"]) > 1 / _LARGE
    except (KeyError, TypeError):
        return False


def _teacher(path: Path, named: str, about: dict[str, Any]) -> Backbone:
    """The first network of a file of teachers."""
    if not _is_file(str(path)):
        raise CondenseError(f"{named}: no such file: {path}")
    try:
        file = teachers.read(path)
        channels, height, width = file.manifest["image_shape"]
        if not _normalisation(file.manifest.get("normalisation"), channels):
            raise CondenseError(f"{path}: does not say how its images were normalised; make it again, without zca")
        normalised = file.manifest["normalisation"]
        net = file.member(0, torch.device("cpu")).network
    except CondenseError as fault:
        raise CondenseError(f"{named}: {fault}") from fault
    encoder = Encoder(net, (channels, height, width), normalised["mean"], normalised["std"])
    return Backbone(encoder, _known(net, about))


def _fetched(load: Callable[[], nn.Module], named: str, origin: str, place: str) -> nn.Module:
    """A network with its weights, or one line that says which file is wanted where."""
    logging.disable(logging.ERROR)  # libraries log what the line will say
    try:
        with rng.seeded("layout"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except Exception as fault:  # each library fails in its own way
        reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
        raise CondenseError(f"{named}: its weights are not here and cannot be fetched ({reason}); get {origin} "
                            f"elsewhere, and put it at {place} or name the file: {named.partition('@')[0]}@FILE"
                            ) from fault  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def _of_file(net: nn.Module, path: str, named: str) -> nn.Module:
    if not _is_file(path):
        raise CondenseError(f"{named}: no such file: {path}")
    teachers.fill(net, Path(path), named)
    return net


def _library(
    weights: teachers.Weights, make: Callable[[], nn.Module], file: str, named: str, about: dict[str, Any]
) -> Backbone:
    if file:
        with rng.seeded("layout"):
            net = _of_file(make(), file, named)
    else:
        net = _fetched(weights.load, named, weights.origin, weights.place)
    shape = (3, *weights.size)
    encoder = Encoder(networks.Wrapped(net, shape, weights.classes, name=named), shape, weights.mean, weights.std)
    return Backbone(encoder, _known(encoder.net, about))


def _torchvision(name: str, file: str, named: str, about: dict[str, Any]) -> Backbone:
    from torchvision import models

    weights = teachers.torchvision_weights(name, named)
    make = functools.partial(models.get_model, name, weights=None, num_classes=weights.classes)
    return _library(weights, make, file, named, about)


def _timm(name: str, file: str, named: str, about: dict[str, Any]) -> Backbone:
    weights = teachers.timm_weights(name, named)
    import timm

    return _library(weights, functools.partial(timm.create_model, name), file, named, about)


def _open_clip(name: str, tag: str, named: str, about: dict[str, Any]) -> Backbone:
    try:
        import open_clip
    except ImportError as error:
        raise need("open_clip_torch", "clip", named) from error
    known = open_clip.list_models()
    if name not in known:
        raise CondenseError(f"{named}: open_clip has no model {name}{did_you_mean(name, known)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    local = bool(tag) and _is_file(tag)
    if not local and tag not in tags:
        raise CondenseError(f"{named}: neither a file nor weights that open_clip has for {name} "
                            f"({', '.join(tags) or 'none'}); write open_clip:{name}@TAG or @FILE")  # fmt: skip
    config = open_clip.get_pretrained_cfg(name, tag)
    hub = str(config.get("hf_hub", "")).rstrip("/")
    origin = f"https://huggingface.co/{hub}" if hub else str(config.get("url", tag))
    load = functools.partial(open_clip.create_model, name, pretrained=tag, require_pretrained=True)
    model: Any = _fetched(load, named, origin, "the Hugging Face cache (HF_HOME)")
    model.requires_grad_(False).eval()
    cfg = open_clip.get_model_preprocess_cfg(model)
    height, width = cfg["size"] if isinstance(cfg["size"], Sequence) else (cfg["size"], cfg["size"])
    encoder = Encoder(_Clip(model.visual), (3, int(height), int(width)), cfg["mean"], cfg["std"])

    def text(classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
        device = next(encoder.parameters()).device  # which the image tower may have been moved to, alone
        model.to(device)
        words = [word.replace("_", " ") for word in classes]
        templates = [functools.partial(prompt.replace, "{}") for prompt in prompts]  # class to text
        try:
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as fault:  # of other libraries, which fail in their own ways
            reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
            raise CondenseError(f"{named}: its tokenizer cannot be had ({reason}); install what it needs, or take "
                                "head=mean") from fault  # fmt: skip
        with torch.autocast(device.type, enabled=False):
            made: Tensor = open_clip.build_zero_shot_classifier(model, tokenizer, words, templates, device=device)
        return made.float()

    whole = _known(model, about)  # another text tower would make another head
    size = _known(encoder.net, {})["bytes"]
    return Backbone(encoder, {**whole, "bytes": size}, float(model.logit_scale.exp()), text, whole["bytes"] - size)


# Projectors -----------------------------------------------------------------------------------------------------------


def adapted(encoder: Encoder, pixels: Tensor) -> list[str]:
    """Names of the encoder's weights of convolutions and linear layers, attention's among them, that its features of
    ``pixels`` follow from; a classifier that is left out has none."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    found = {
        f"{path}.{name}".lstrip("."): weight
        for path, layer in encoder.named_modules() if isinstance(layer, kinds)
        for name, weight in layer.named_parameters(recurse=False) if weight.ndim > 1
    }  # fmt: skip
    copies = {name: weight.detach().clone().requires_grad_() for name, weight in found.items()}
    with torch.enable_grad():
        features = torch.func.functional_call(encoder, copies, (pixels,))
        slopes = torch.autograd.grad(features.float().square().sum(), list(copies.values()), allow_unused=True)
    return [name for name, slope in zip(copies, slopes) if slope is not None]


class Projector(networks.Network):
    """Images in a set's training space to logits (B, classes). What requires grad is what is stored.

    Args:
        encoder: frozen.
        names: of its weights that are adapted.
        rank: r of their changes A B, at most what the matrix has; A starts at 0, so that all weights are the public
            ones at first.
        start: (D, classes), the head at first: of text, or the classes' means of features.
        head_rank: r of the head's change; 0: the head itself is learned and stored, as a start from means must be.
        scale: factor of cosines at first.
        transform: from pixels to the training space of the set.
        seed: of B's first values.
    """

    def __init__(
        self,
        encoder: Encoder,
        names: Sequence[str],
        rank: int,
        start: Tensor,
        head_rank: int,
        scale: float,
        transform: Standardise,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.names, self.transform = encoder, list(names), transform
        self.low, self.high = nn.ParameterList(), nn.ParameterList()
        weights = dict(encoder.named_parameters())
        with rng.seeded(seed, "projector"):
            for name in self.names:
                rows, columns = weights[name].flatten(1).shape
                self._pair(rows, columns, rank, start.device, self.low, self.high)
            self.start: Tensor
            self.head: nn.Parameter | None = None
            self.head_pair = nn.ParameterList()
            if head_rank:
                self.register_buffer("start", start, persistent=False)
                self._pair(start.shape[0], start.shape[1], head_rank, start.device, self.head_pair, self.head_pair)
            else:
                self.head = nn.Parameter(start.clone())
        self.bias = nn.Parameter(torch.zeros(start.shape[1], device=start.device))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), device=start.device))

    @staticmethod
    def _pair(rows: int, columns: int, rank: int, device: torch.device, a: Any, b: Any) -> None:
        rank = min(rank, rows, columns)
        a.append(nn.Parameter(torch.zeros(rows, rank, device=device)))
        values = torch.empty(rank, columns).uniform_(-1, 1) * columns**-0.5
        b.append(nn.Parameter(values.to(device)))

    def weights(self) -> dict[str, Tensor]:
        """The encoder's weights with their changes."""
        own = dict(self.encoder.named_parameters())
        with torch.autocast(self.bias.device.type, enabled=False):
            return {
                name: own[name] + (a @ b).view(own[name].shape)
                for name, a, b in zip(self.names, self.low, self.high)
            }  # fmt: skip

    def columns(self) -> Tensor:
        """The head (D, classes)."""
        if self.head is not None:
            return self.head
        a, b = self.head_pair
        with torch.autocast(a.device.type, enabled=False):
            return self.start + a @ b

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(B,C,H,W) in training space to features (B, D); no maps are told."""
        if self.transform.mean.device != x.device:
            self.transform = self.transform.to(x.device)
        pixels = self.transform.inverse(x)
        found: Tensor = torch.func.functional_call(self.encoder, self.weights(), (pixels,))
        return found

    def classify(self, embedding: Tensor) -> Tensor:
        """Features to float32 logits (B, classes)."""
        return cosines(embedding, self.columns(), self.log_scale.exp(), self.bias)

    @torch.no_grad()
    def rounded(self) -> Projector:
        """Itself, with what is stored rounded to float16 (scale and bias excepted)."""
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored."""
        half = {f"a{k}": a for k, a in enumerate(self.low)} | {f"b{k}": b for k, b in enumerate(self.high)}
        half |= {"head": self.head} if self.head is not None else dict(zip(("head_a", "head_b"), self.head_pair))
        return {
            **{name: x.detach().half().cpu().numpy() for name, x in half.items()},
            "bias": self.bias.detach().cpu().numpy(), "scale": self.log_scale.detach().exp().cpu().numpy()[None],
        }  # fmt: skip

    @torch.no_grad()
    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what :meth:`arrays` gave.

        Raises:
            CondenseError: arrays of other shapes: they do not fit this encoder.
        """
        targets: dict[str, Tensor] = {f"a{k}": a for k, a in enumerate(self.low)}
        targets |= {f"b{k}": b for k, b in enumerate(self.high)}
        targets |= {"head": self.head} if self.head is not None else dict(zip(("head_a", "head_b"), self.head_pair))
        for name, target in targets.items():
            array = arrays.get(name)
            if array is None or array.dtype != np.float16 or array.shape != tuple(target.shape):
                found = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise CondenseError(f"labels/{name}: does not fit the backbone ({found}, not float16 "
                                    f"{tuple(target.shape)}); give the backbone that the labels were made with"
                                    )  # fmt: skip
            target.copy_(torch.from_numpy(array))
        self.bias.copy_(torch.from_numpy(_array(arrays, "bias", np.float32, tuple(self.bias.shape))))
        self.log_scale.fill_(math.log(_array(arrays, "scale", np.float32, (1,))[0]))


class Merged(nn.Module):
    """A projector whose changes are in its weights; see :class:`Projector`."""

    def __init__(self, projector: Projector) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(projector.encoder)
        with torch.no_grad():
            for name, weight in projector.weights().items():
                self.encoder.get_parameter(name).copy_(weight)
        self.transform = projector.transform
        self.columns: Tensor
        self.bias: Tensor
        self.scale: Tensor
        found = {"columns": projector.columns(), "bias": projector.bias, "scale": projector.log_scale.exp()}
        for name, value in found.items():
            self.register_buffer(name, value.detach().clone())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B,C,H,W) in training space to float32 logits (B, classes)."""
        if self.transform.mean.device != images.device:
            self.transform = self.transform.to(images.device)
        return cosines(self.encoder(self.transform.inverse(images)), self.columns, self.scale, self.bias)


def cosines(features: Tensor, columns: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``scale * features / |features| @ columns + bias``: float32 (B, classes) of features (B, D)."""
    with torch.autocast(features.device.type, enabled=False):
        return scale * (F.normalize(features.float(), dim=1) @ columns) + bias


def plain(transform: Transform, words: str) -> Standardise:
    """The transform, if pixels come back from it one by one.

    Raises:
        CondenseError: it whitens.
    """
    if not isinstance(transform, Standardise):
        raise CondenseError(f"{words}: needs pixels, which zca=true mixes; leave zca out")
    return transform


# Labels ---------------------------------------------------------------------------------------------------------------


class ProjectorLabels(TeacherLabels):
    """What a projector says of the very views that the student sees, asked in each step.

    The public network is looked for when labels are first asked for; until then, and for whoever wants the images
    alone, it need not be here. It counts as external bytes, with the text tower where that makes the head.

    Args:
        known: what the file states: ``backbone`` (name, sha256, bytes), ``names``, ``rank``, ``head_rank``, ``head``
            (kind), ``shape``, ``mean`` and ``std``, and for a head of text ``classes`` and ``prompts``.
        parts: arrays of :meth:`Projector.arrays`.
        images, seed, views, temperature, squared: as in ``TeacherLabels``.
        loss_kind, gamma, hard: as in ``PerViewLabels``; published is ``mse`` with some gamma.
        projector: with its changes in the weights, where it is at hand.

    Raises:
        CondenseError: a value that cannot be.
    """

    kind = "projector"
    exactness = "approximate"
    step_cost = "a forward pass of the public network"

    def __init__(
        self,
        known: Mapping[str, Any],
        parts: Mapping[str, np.ndarray],
        images: int,
        seed: int,
        views: ViewRule | None = None,
        temperature: float = 20.0,
        squared: bool = True,
        *,
        loss_kind: str = "kl",
        gamma: float = 0.0,
        hard: Tensor | None = None,
        projector: Merged | None = None,
    ) -> None:
        self.known, self.parts = dict(known), dict(parts)
        self.device, self._merged = torch.device("cpu"), projector
        self.names, self.shape = (), None  # it is not built from the name of an architecture
        self._settle(images, seed, views, temperature, squared)
        self.loss_kind, self.gamma, self.hard = loss_kind, single(gamma), hard
        check_loss(loss_kind, self.gamma, hard)
        if hard is not None:
            _check_classes(hard, images, len(self.parts["bias"]))

    @classmethod
    def of(cls, projector: Projector, known: Mapping[str, Any], *terms: Any, **more: Any) -> ProjectorLabels:
        """The labels of a projector that was just made; ``known`` without what the projector says itself."""
        arrays = projector.rounded().arrays()
        return cls(known, arrays, *terms, **more, projector=Merged(projector).cpu())

    @property
    def teacher(self) -> Merged:  # type: ignore[override]
        """The projector; finds the public network when it is first needed.

        Raises:
            CondenseError: it is not here or another one, or the stored arrays do not fit it.
        """
        if self._merged is None:
            self._merged = Merged(build(self.known, self.parts, self.device))
        return self._merged

    def shown(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        views, ids, drawn = _views(self, images, ids, epoch)
        logits = answers(self.teacher, views)
        if self.loss_kind == "kl":
            return views, (logits / self.temperature).softmax(-1)
        if self.hard is None or not self.gamma:
            return views, logits
        truth = F.one_hot(self.hard.to(ids.device), logits.shape[1]).float()
        return views, torch.stack([logits, mixed(truth, ids, drawn)], 1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().loss(logits, targets) if self.loss_kind == "kl" else _squares(logits, targets, self.gamma)

    def arrays(self) -> dict[str, np.ndarray]:
        text = json.dumps(self.known, separators=(",", ":")).encode()
        hard = {} if self.hard is None else {"hard": self.hard.cpu().numpy()}
        return {**self._settings(), "projector": np.frombuffer(text, np.uint8), **hard, **self.parts}

    def _settings(self) -> dict[str, np.ndarray]:
        return {
            **super()._settings(),
            "loss": np.array([self.temperature, self.gamma], np.float32),
            "flags": np.array([self.squared, LOSSES.index(self.loss_kind)], np.uint8),
        }

    def nbytes(self) -> int:
        """Adapters, head, and what names the backbone, the views and the loss."""
        return _nbytes(self.arrays())

    def external_nbytes(self) -> int:
        """Of the public network."""
        return int(self.known["backbone"]["bytes"])

    def to(self, device: torch.device) -> ProjectorLabels:
        device = torch.device(device)
        if self.device == device:
            return self
        moved = copy.copy(self)
        moved.device = device
        moved._merged = None if self._merged is None else copy.deepcopy(self._merged).to(device)
        return moved

    def anew(self, images: Tensor, teacher: nn.Module, seed: int, hard: Tensor | None = None) -> ProjectorLabels:
        """The same projector on other images; ``teacher`` is that projector."""
        made = copy.copy(self.to(images.device))
        made.images, made.seed = len(images), seed
        made.hard = None if self.hard is None else _classes(images, made.teacher, hard)
        return made

    def rule(self) -> str:
        return f"{super().rule()}, {self.loss_kind}, gamma={self.gamma}"

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], classes: int) -> ProjectorLabels:
        views, seed, _, _ = _rule_from(arrays)
        count = _count(arrays)
        temperature, gamma = _array(arrays, "loss", np.float32, (2,)).tolist()
        squared, loss = _array(arrays, "flags", np.uint8, (2,)).tolist()
        if squared > 1 or loss >= len(LOSSES):
            raise CondenseError(f"labels/flags must be 0 or 1, not {squared} and {loss}")
        hard = _classes_from(arrays, classes) if "hard" in arrays else None
        known = _stated(_array(arrays, "projector", np.uint8, (None,)).tobytes(), classes)
        parts = {name: np.asarray(x) for name, x in arrays.items() if name in _HEAD or name[1:].isdigit()}
        _array(parts, "bias", np.float32, (classes,))
        for name, part in parts.items():
            if part.dtype not in (np.float16, np.float32) or not np.isfinite(part).all():
                raise CondenseError(f"labels/{name} must be finite floats; copy or make the set again")
        (scale,) = _array(parts, "scale", np.float32, (1,)).tolist()
        if scale <= 0:
            raise CondenseError(f"labels/scale must be above 0, not {scale}")
        return cls(
            known, parts, count, seed, views, temperature, bool(squared),
            loss_kind=LOSSES[loss], gamma=gamma, hard=hard,
        )  # fmt: skip


def _stated(text: bytes, classes: int) -> dict[str, Any]:
    """What a stranger's file says of a projector."""
    try:
        known = json.loads(text)
        kinds = {
            "backbone": dict, "names": list, "rank": int, "head_rank": int, "head": str, "shape": list, "mean": list,
            "std": list,
        }  # fmt: skip
        backbone, shape = known["backbone"], known["shape"]
        words = [backbone["name"], backbone["sha256"], backbone.get("path", ""), *known["names"]]
        fits = all(isinstance(known[key], kind) for key, kind in kinds.items()) and known["head"] in HEADS
        fits = fits and all(isinstance(word, str) and word.isprintable() for word in words)
        fits = fits and len(set(known["names"])) == len(known["names"])  # each has its share of memory
        fits = fits and isinstance(backbone["bytes"], int) and 0 <= backbone["bytes"] < 1 << 63
        fits = fits and len(shape) == 3 and all(isinstance(size, int) and size > 0 for size in shape)
        fits = fits and known["rank"] > 0 and known["head_rank"] >= 0 and _normalisation(known, shape[0])
        if fits and known["head"] == "text":
            fits = isinstance(known["classes"], list) and len(known["classes"]) == classes
            fits = fits and all(isinstance(word, str) for word in known["classes"])
            fits = fits and bool(known["prompts"]) and all("{}" in prompt for prompt in known["prompts"])
            fits = fits and all(isinstance(prompt, str) for prompt in known["prompts"])
        if not fits:
            raise ValueError("no projector")
        return dict(known)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise CondenseError("labels/projector does not describe one; copy or make the set again") from fault


def build(known: Mapping[str, Any], parts: Mapping[str, np.ndarray], device: torch.device) -> Projector:
    """The projector that a file describes, with the public network that it names.

    Raises:
        CondenseError: the network is not here or another one, or the arrays do not fit it.
    """
    wanted, what = known["backbone"], "projector labels: backbone "
    found = None
    for word in dict.fromkeys([str(wanted["name"]), str(wanted.get("path", wanted["name"]))]):
        try:
            found = find(word, tuple(known["shape"]), device, what)
            break
        except CondenseError as fault:
            missing = fault
    if found is None:
        raise missing
    if (found.known["sha256"], found.external(known["head"])) != (wanted["sha256"], wanted["bytes"]):
        raise CondenseError(f"{what}{wanted['name']}: is another network than that of these labels (its checksum or "
                            "size differs); restore it")  # fmt: skip
    transform = Standardise(torch.tensor(known["mean"]), torch.tensor(known["std"]))
    names = [str(name) for name in known["names"]]
    matrices = {name for name, weight in found.encoder.named_parameters() if weight.ndim > 1}
    unknown = sorted(set(names) - matrices)
    if unknown:
        raise CondenseError(f"labels/projector: does not fit {wanted['name']}, which has no weights {unknown[0]}; give "
                            "the backbone that the labels were made with")  # fmt: skip
    classes = len(parts["bias"])
    if known["head"] == "text":
        if found.text is None:
            raise CondenseError(f"labels/projector: its head is made of text, and {wanted['name']} has no text tower")
        start = found.text(known["classes"], known["prompts"])
    else:
        with torch.no_grad():
            width = found.encoder(torch.zeros(1, *found.encoder.shape, device=device)).shape[1]
        start = torch.zeros(width, classes, device=device)
    made = Projector(
        found.encoder, names, int(known["rank"]), start, int(known["head_rank"]), found.scale, transform
    )  # fmt: skip
    made.load(parts)
    return made


@torch.no_grad()
def means(encoder: Encoder, batches: Sequence[Callable[[], Tensor]]) -> Tensor:
    """(D, classes): of each class the mean of its unit features, minus the mean over classes, at unit length.

    What all classes share moves all logits of an image alike, and no softmax.

    Args:
        encoder: of the features.
        batches: of each class, gives pixels (B,C,H,W).
    """
    found = torch.stack([F.normalize(answers(encoder, pixels()), dim=1).mean(0) for pixels in batches], 1)
    return F.normalize(found - found.mean(1, keepdim=True), dim=0)


PROVIDERS.add("projector", ProjectorLabels)
