"""weights of others: checkpoints, torchvision, timm, open_clip."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense import rng
from condense.data import Transform
from condense.errors import CondenseError, did_you_mean, need
from condense.files import content, is_existing_file
from condense.formatting import by
from condense.networks import architectures, saved
from condense.networks.saved import State, apply_state

SHIPPED = ("tiny20-convnet-d3-w64-bn",)
"""Backbones that come with the package: trained on 64x64 images of 20 classes, made 32x32."""

PROMPT = "a photo of a {}."

_FOLDER = Path(__file__).parent / "backbones"

_LARGE = 1e30
"""Beyond any mean or std, and within float32."""

# Public networks ------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A frozen network of others that takes pixels to flat features.

    Args:
        net: has ``embed``, from images normalised in its own way to features.
        shape: (C,H,W) that it takes; pixels of other sizes are resized, grey ones repeated.
        mean, std: of its normalisation, for each channel.
    """

    def __init__(self, net: nn.Module, shape: architectures.Shape, mean: Sequence[float], std: Sequence[float]) -> None:
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


def find(word: str, shape: architectures.Shape, device: torch.device, what: str = "backbone=") -> Backbone:
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
    if library in BACKBONE_LIBRARIES and rest:
        name, _, weights = rest.partition("@")
        made = {"open_clip": _open_clip, "timm": _timm, "torchvision": _torchvision}[library](
            name, weights, named, about
        )
        if weights and is_existing_file(weights):
            made.known["path"] = f"{library}:{name}@{Path(weights).absolute()}"
    elif word in SHIPPED:
        made = _teacher(_FOLDER / f"{word}.h5", named, about)
    elif word.endswith(".h5"):
        made = _teacher(Path(word), named, {**about, "path": str(Path(word).absolute())})
    else:
        hint = did_you_mean(word, SHIPPED)
        raise CondenseError(
            f"{named}: unknown{hint}; or write FILE.h5 of `condense teachers`, or LIBRARY:NAME with "
            f"one of {', '.join(BACKBONE_LIBRARIES)}"
        )
    if shape[0] not in (1, made.encoder.shape[0]):
        raise CondenseError(f"{named}: takes images of {made.encoder.shape[0]} channels, not {shape[0]}")
    made.encoder.to(device)
    return made


def _known(net: nn.Module, about: Mapping[str, Any]) -> dict[str, Any]:
    state = net.state_dict()
    size = sum(value.numel() * value.element_size() for value in state.values())
    return {**about, "sha256": content({name: state[name] for name in sorted(state)}), "bytes": size}


def is_normalisation(known: Any, channels: int) -> bool:
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
    if not is_existing_file(str(path)):
        raise CondenseError(f"{named}: no such file: {path}")
    try:
        file = saved.read_teacher_file(path)
        channels, height, width = file.manifest["image_shape"]
        if not is_normalisation(file.manifest.get("normalisation"), channels):
            raise CondenseError(f"{path}: does not say how its images were normalised; make it again, without zca")
        normalised = file.manifest["normalisation"]
        net = file.load_member(0, torch.device("cpu")).network
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
        raise CondenseError(
            f"{named}: its weights are not here and cannot be fetched ({reason}); get {origin} "
            f"elsewhere, and put it at {place} or name the file: {named.partition('@')[0]}@FILE"
        ) from fault
    finally:
        logging.disable(logging.NOTSET)


def _of_file(net: nn.Module, path: str, named: str) -> nn.Module:
    if not is_existing_file(path):
        raise CondenseError(f"{named}: no such file: {path}")
    fill(net, Path(path), named)
    return net


def _library(weights: Weights, make: Callable[[], nn.Module], file: str, named: str, about: dict[str, Any]) -> Backbone:
    if file:
        with rng.seeded("layout"):
            net = _of_file(make(), file, named)
    else:
        net = _fetched(weights.load, named, weights.origin, weights.place)
    shape = (3, *weights.size)
    encoder = Encoder(architectures.Wrapped(net, shape, weights.classes, name=named), shape, weights.mean, weights.std)
    return Backbone(encoder, _known(encoder.net, about))


def _torchvision(name: str, file: str, named: str, about: dict[str, Any]) -> Backbone:
    from torchvision import models

    weights = torchvision_weights(name, named)
    make = functools.partial(models.get_model, name, weights=None, num_classes=weights.classes)
    return _library(weights, make, file, named, about)


def _timm(name: str, file: str, named: str, about: dict[str, Any]) -> Backbone:
    weights = timm_weights(name, named)
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
    local = bool(tag) and is_existing_file(tag)
    if not local and tag not in tags:
        raise CondenseError(
            f"{named}: neither a file nor weights that open_clip has for {name} "
            f"({', '.join(tags) or 'none'}); write open_clip:{name}@TAG or @FILE"
        )
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
            raise CondenseError(
                f"{named}: its tokenizer cannot be had ({reason}); install what it needs, or take head=mean"
            ) from fault
        with torch.autocast(device.type, enabled=False):
            made: Tensor = open_clip.build_zero_shot_classifier(model, tokenizer, words, templates, device=device)
        return made.float()

    whole = _known(model, about)  # another text tower would make another head
    size = _known(encoder.net, {})["bytes"]
    return Backbone(encoder, {**whole, "bytes": size}, float(model.logit_scale.exp()), text, whole["bytes"] - size)


BACKBONE_LIBRARIES = ("open_clip", "timm", "torchvision")
LIBRARIES = ("torchvision", "timm")

CHECKPOINTS = (".pt", ".pth")

# -- named teachers ---------------------------------------------------------------------------------------------------


def is_public(file: str) -> bool:
    """Whether ``file`` names public weights, ``torchvision:NAME`` or ``timm:NAME``, or several joined by commas."""
    return all(word.partition(":")[0] in LIBRARIES and ":" in word for word in file.split(","))


def load_torch_checkpoint(
    path: Path, network: str | Callable[..., nn.Module], shape: tuple[int, int, int], classes: int
) -> architectures.Network:
    """The network with the weights of a file of ``torch.save``.

    Raises:
        CondenseError: no such file, it holds more than tensors, or they do not fit.
    """
    state = _saved(path)
    with rng.seeded("layout"):
        net = architectures.build(network, shape, classes)
    if isinstance(net, architectures.Wrapped) and not any(name.startswith("model.") for name in state):
        state = {f"model.{name}": value for name, value in state.items()}  # by its library's own names
    if misfit := apply_state(net, state):
        wanted = f"{architectures.name_of(network)} for {by(shape)} images of {classes} classes"
        raise CondenseError(f"{path}: does not fit {wanted}: {misfit}")
    return net


def fill(net: nn.Module, path: Path, named: str) -> None:
    """Gives ``net`` the weights of a file of ``torch.save``; ``named`` is what messages call both.

    Raises:
        CondenseError: no such file, it holds more than tensors, or they do not fit.
    """
    if misfit := apply_state(net, _saved(path)):
        raise CondenseError(f"{named}: the file does not fit: {misfit}")


def _saved(path: Path) -> State:
    """What a file of ``torch.save`` holds of a network, without what other tools put around it."""
    if not path.is_file():
        raise CondenseError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles, which are read all the same or refused
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # a damaged file raises anything
        reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
        raise CondenseError(
            f"{path}: cannot be read as tensors alone ({reason}); give what torch.save wrote of a "
            "network's state_dict()"
        ) from fault
    for key in ("state_dict", "model", "net", "weights"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise CondenseError(f"{path}: holds no state of a network; give what torch.save wrote of its state_dict()")
    for prefix in ("_orig_mod.", "module."):  # what torch.compile and DataParallel put before names
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


class _Public(architectures.Network):
    """A network with public weights that takes images in a task's training space: they go back to pixels and from there
    to what the weights were trained on."""

    def __init__(
        self, net: architectures.Network, transform: Transform, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.net, self.transform = net, transform
        self.own_mean: Tensor
        self.own_std: Tensor
        for name, value in (("own_mean", mean), ("own_std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32)[:, None, None])

    def embed(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        if self.transform.mean.device != x.device:
            self.transform = self.transform.to(x.device)
        pixels = self.transform.inverse(x).expand(-1, 3, -1, -1)  # grey ones three times
        return self.net.embed((pixels - self.own_mean) / self.own_std, maps)

    def classify(self, embedding: Tensor) -> Tensor:
        """(N, D) to (N, classes)."""
        return self.net.classify(embedding)


@dataclass(frozen=True)
class Weights:
    """Public weights, not loaded yet."""

    classes: int
    mean: Sequence[float]
    std: Sequence[float]
    size: tuple[int, int]
    """Height and width of the images that they were made for."""
    load: Callable[[], nn.Module]
    """Gives the network with its weights; fetches them where they are not here."""
    place: str
    """The file that holds them once they are here."""
    origin: str
    """Where they are fetched from."""


def torchvision_weights(name: str, named: str) -> Weights:
    """The default weights of a torchvision model; ``named`` is what messages call it."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        hint = did_you_mean(f"torchvision:{name}", [f"torchvision:{other}" for other in known])
        raise CondenseError(f"{named}: unknown{hint}")
    weights: Any = models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    return Weights(
        len(weights.meta["categories"]),
        preset.mean,
        preset.std,
        (preset.crop_size[0], preset.crop_size[0]),
        lambda: models.get_model(name, weights=weights, progress=False),
        str(place),
        weights.url,
    )


def timm_weights(name: str, named: str) -> Weights:
    """The weights that timm has for a model; ``named`` is what messages call it."""
    try:
        import timm
    except ImportError as error:
        raise need("timm", "timm", named) from error
    if not timm.is_model(name):
        hint = did_you_mean(f"timm:{name}", [f"timm:{other}" for other in timm.list_models()])
        raise CondenseError(f"{named}: unknown{hint}")
    found = timm.models.get_pretrained_cfg(name)
    if found is None or not (found.hf_hub_id or found.url):
        raise CondenseError(f"{named}: timm has no weights for it")
    repository = found.hf_hub_id or ""
    origin = f"https://huggingface.co/{repository}" if repository else str(found.url)
    cache = "the Hugging Face cache (HF_HOME), below hub/models--" + repository.replace("/", "--")
    place = cache if repository else str(Path(torch.hub.get_dir()) / "checkpoints" / origin.rpartition("/")[2])
    return Weights(
        found.num_classes,
        found.mean,
        found.std,
        (found.input_size[1], found.input_size[2]),
        lambda: timm.create_model(name, pretrained=True),
        place,
        origin,
    )


def load_public_weights(file: str, shape: tuple[int, int, int], classes: int, transform: Transform) -> _Public:
    """Public weights behind the space that ``transform`` leads to.

    Raises:
        CondenseError: unknown, of another number of classes, or they are neither here nor can be fetched.
    """
    library, _, name = file.partition(":")
    weights = {"torchvision": torchvision_weights, "timm": timm_weights}[library](name, f"teachers={file}")
    if weights.classes != classes:
        raise CondenseError(
            f"teachers={file}: its weights tell {weights.classes} classes apart, the data have "
            f"{classes}; give a checkpoint of these, or leave it out to train teachers"
        )
    if shape[0] not in (1, 3):
        raise CondenseError(f"teachers={file}: takes images of 1 or 3 channels, not {shape[0]}")
    try:
        with rng.seeded("layout"):
            model = weights.load()
    except Exception as fault:  # each library fails in its own way
        reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
        raise CondenseError(
            f"teachers={file}: its weights are not here and cannot be fetched ({reason}); get "
            f"{weights.origin} elsewhere and put it at {weights.place}"
        ) from fault
    net = architectures.Wrapped(model, (3, *shape[1:]), classes, name=file)
    return _Public(net, transform, weights.mean, weights.std)
