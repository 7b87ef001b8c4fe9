"""Public and third-party weights: checkpoints, torchvision, timm and open_clip, as encoders or as teachers."""

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
from condense.errors import CondenseError, did_you_mean, missing_package
from condense.files import check_data_file, is_existing_file, tensors_sha256
from condense.formatting import by
from condense.networks import architectures, saved
from condense.networks.public import PublicNetwork
from condense.networks.saved import State, apply_state

BUNDLED_BACKBONES = ("tiny20-convnet-d3-w64-bn",)
"""Backbones that are included in the package: trained on images of 20 classes, resized from 64x64 to 32x32."""

PROMPT = "a photo of a {}."

_FOLDER = Path(__file__).parent / "backbones"

_LARGE = 1e30
"""Limit for mean, std and 1 / std of an untrusted file; within the range of float32."""


class Encoder(nn.Module):
    """A frozen third-party network that maps pixels to flat features.

    Args:
        net: Network with ``embed``, which maps normalised images to features.
        shape: (C,H,W) of its input; images of other sizes are resized, grey images are repeated.
        mean, std: Normalisation of each channel.
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
        """Stays in eval mode, because the BatchNorm statistics belong to the public weights."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Maps pixels (B,C,H,W) in [0,1] to features (B,D)."""
        if pixels.shape[2:] != self.shape[1:]:
            pixels = F.interpolate(pixels, self.shape[1:], mode="bilinear", align_corners=False, antialias=True)
        pixels = pixels.expand(-1, self.shape[0], -1, -1)
        features: Tensor = self.net.embed((pixels - self.own_mean) / self.own_std)  # type: ignore[operator]
        return features.flatten(1)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded public network."""

    encoder: Encoder
    known: dict[str, Any]
    """Description for manifests: ``name``, ``sha256`` of its state, ``bytes`` of the encoder, ``path`` of a local
    file."""
    scale: float = 10.0
    """Initial factor of the cosines of a head."""
    text: Callable[[Sequence[str], Sequence[str]], Tensor] | None = None
    """Maps class names and prompts to unit vectors (D, classes); None without a text tower."""
    text_bytes: int = 0
    """Bytes of the text tower."""

    def external(self, head: str) -> int:
        """Returns the bytes of the encoder, plus those of the text tower for ``head="text"``."""
        return int(self.known["bytes"]) + (self.text_bytes if head == "text" else 0)


class _Clip(nn.Module):
    """The image tower of a CLIP model with the method ``embed``."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def embed(self, x: Tensor) -> Tensor:
        """Maps (B,3,H,W) to (B,D)."""
        output = self.visual(x)
        embedding: Tensor = output if isinstance(output, Tensor) else output[0]  # CoCa's tower also returns tokens
        return embedding


def find_backbone(name: str, shape: architectures.Shape, device: torch.device, prefix: str = "backbone=") -> Backbone:
    """Loads a public network.

    Args:
        name: Name as in the table of :mod:`condense.labels.adapters`.
        shape: (C,H,W) of the images that it will be applied to.
        device: Device of the encoder.
        prefix: Text before the name in messages.

    Raises:
        CondenseError: An unknown name, a missing package, unavailable weights, or an unsuitable number of channels.
    """
    named, about = prefix + name, {"name": name}
    library, _, rest = name.partition(":")
    if library in BACKBONE_LIBRARIES and rest:
        model, _, weights = rest.partition("@")
        load = {"open_clip": _open_clip, "timm": _timm, "torchvision": _torchvision}[library]
        backbone = load(model, weights, named, about)
        if weights and is_existing_file(weights):
            backbone.known["path"] = f"{library}:{model}@{Path(weights).absolute()}"
    elif name in BUNDLED_BACKBONES:
        backbone = _teacher(_FOLDER / f"{name}.h5", named, about)
    elif name.endswith(".h5"):
        backbone = _teacher(Path(name), named, {**about, "path": str(Path(name).absolute())})
    else:
        hint = did_you_mean(name, BUNDLED_BACKBONES)
        raise CondenseError(
            f"{named}: unknown{hint}; or write FILE.h5 of `condense teachers`, or LIBRARY:NAME with "
            f"one of {', '.join(BACKBONE_LIBRARIES)}"
        )
    if shape[0] not in (1, backbone.encoder.shape[0]):
        raise CondenseError(f"{named}: takes images of {backbone.encoder.shape[0]} channels, not {shape[0]}")
    backbone.encoder.to(device)
    return backbone


def _describe(net: nn.Module, about: Mapping[str, Any]) -> dict[str, Any]:
    """Adds digest and bytes of a network to its description."""
    state = net.state_dict()
    size = sum(value.numel() * value.element_size() for value in state.values())
    return {**about, "sha256": tensors_sha256({name: state[name] for name in sorted(state)}), "bytes": size}


def is_normalisation(known: Any, channels: int) -> bool:
    """Returns whether an untrusted file states a valid mean and std for each channel."""
    try:
        fits = len(known["mean"]) == len(known["std"]) == channels
        values = [*known["mean"], *known["std"]]
        fits = fits and all(isinstance(x, int | float) and abs(x) < _LARGE for x in values)
        return fits and min(known["std"]) > 1 / _LARGE
    except (KeyError, TypeError):
        return False


def _teacher(path: Path, named: str, about: dict[str, Any]) -> Backbone:
    """Loads the first network of a file of teachers."""
    if not is_existing_file(str(path)):
        raise CondenseError(f"{named}: no such file: {path}")
    try:
        file = saved.read_teacher_file(path)
        channels, height, width = file.manifest["image_shape"]
        if not is_normalisation(file.manifest.get("normalisation"), channels):
            raise CondenseError(f"{path}: does not state the normalisation of its images; make it again, without zca")
        normalised = file.manifest["normalisation"]
        net = file.load_member(0, torch.device("cpu")).network
    except CondenseError as fault:
        raise CondenseError(f"{named}: {fault}") from fault
    encoder = Encoder(net, (channels, height, width), normalised["mean"], normalised["std"])
    return Backbone(encoder, _describe(net, about))


def _fetched(load: Callable[[], nn.Module], named: str, origin: str, place: str) -> nn.Module:
    """Calls ``load``; if the weights are unavailable, the error states which file is needed and where."""
    logging.disable(logging.ERROR)  # libraries log the same reason
    try:
        with rng.seeded("layout"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except Exception as fault:  # the libraries raise different types
        reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
        raise CondenseError(
            f"{named}: its weights are not here and cannot be fetched ({reason}); get {origin} "
            f"elsewhere, and put it at {place} or name the file: {named.partition('@')[0]}@FILE"
        ) from fault
    finally:
        logging.disable(logging.NOTSET)


def _with_weights(net: nn.Module, path: str, named: str) -> nn.Module:
    if not is_existing_file(path):
        raise CondenseError(f"{named}: no such file: {path}")
    load_weights_file(net, Path(path), named)
    return net


def _library(
    weights: PublicWeights, make: Callable[[], nn.Module], file: str, named: str, about: dict[str, Any]
) -> Backbone:
    if file:
        with rng.seeded("layout"):
            net = _with_weights(make(), file, named)
    else:
        net = _fetched(weights.load, named, weights.origin, weights.place)
    shape = (3, *weights.size)
    encoder = Encoder(architectures.Wrapped(net, shape, weights.classes, name=named), shape, weights.mean, weights.std)
    return Backbone(encoder, _describe(encoder.net, about))


def _torchvision(name: str, file: str, named: str, about: dict[str, Any]) -> Backbone:
    from torchvision import models

    if file and name in models.list_models(module=models) and file in models.get_model_weights(name).__members__:
        return _torchvision(f"{name}@{file}", "", named, about)
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
        raise missing_package("open_clip_torch", "clip", named) from error
    models = open_clip.list_models()
    if name not in models:
        raise CondenseError(f"{named}: open_clip has no model {name}{did_you_mean(name, models)}")
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
        device = next(encoder.parameters()).device  # the image tower may have been moved to it separately
        model.to(device)
        names = [class_name.replace("_", " ") for class_name in classes]
        templates = [functools.partial(prompt.replace, "{}") for prompt in prompts]  # each maps a class to text
        try:
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as fault:  # the tokenizer libraries raise different types
            reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
            raise CondenseError(
                f"{named}: its tokenizer is unavailable ({reason}); install the missing package, or set head=mean"
            ) from fault
        with torch.autocast(device.type, enabled=False):
            head: Tensor = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates, device=device)
        return head.float()

    description = _describe(model, about)  # of the whole model, since the head depends on the text tower
    size, scale = _describe(encoder.net, {})["bytes"], float(model.logit_scale.exp())
    return Backbone(encoder, {**description, "bytes": size}, scale, text, description["bytes"] - size)


BACKBONE_LIBRARIES = ("open_clip", "timm", "torchvision")
TEACHER_LIBRARIES = ("torchvision", "timm")

CHECKPOINT_SUFFIXES = (".pt", ".pth")


def is_public(file: str) -> bool:
    """Returns whether ``file`` names public weights, ``torchvision:NAME`` or ``timm:NAME``, or several with commas."""
    return all(name.partition(":")[0] in TEACHER_LIBRARIES and ":" in name for name in file.split(","))


def load_torch_checkpoint(
    path: Path, network: str | Callable[..., nn.Module], shape: tuple[int, int, int], classes: int
) -> architectures.Network:
    """Builds a network with the weights of a file written by ``torch.save``.

    Args:
        path: The file.
        network: Name or factory of the architecture.
        shape: (C,H,W) of the images.
        classes: Number of classes.

    Raises:
        CondenseError: The file does not exist, contains more than tensors, or does not fit.
    """
    state = _read_checkpoint(path)
    with rng.seeded("layout"):
        net = architectures.build_network(network, shape, classes)
    if isinstance(net, architectures.Wrapped) and not any(name.startswith("model.") for name in state):
        state = {f"model.{name}": value for name, value in state.items()}  # the file has the names of the library
    if misfit := apply_state(net, state):
        expected = f"{architectures.network_name(network)} for {by(shape)} images of {classes} classes"
        raise CondenseError(f"{path}: does not fit {expected}: {misfit}")
    return net


def load_weights_file(net: nn.Module, path: Path, named: str) -> None:
    """Loads the weights of a file written by ``torch.save`` into ``net``; messages begin with ``named``.

    Raises:
        CondenseError: The file does not exist, contains more than tensors, or does not fit.
    """
    if misfit := apply_state(net, _read_checkpoint(path)):
        raise CondenseError(f"{named}: the file does not fit: {misfit}")


def _read_checkpoint(path: Path) -> State:
    """Reads the state of a network from a file of ``torch.save``, without the wrappers that other tools add."""
    if not path.is_file():
        raise CondenseError(f"{path}: no such file")
    check_data_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # a damaged file may raise any type
        reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
        raise CondenseError(
            f"{path}: contains more than tensors, or is damaged ({reason}); give a file of torch.save with a "
            "network's state_dict()"
        ) from fault
    for key in ("state_dict", "model", "net", "weights"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise CondenseError(f"{path}: contains no state of a network; give a file of torch.save with its state_dict()")
    for prefix in ("_orig_mod.", "module."):  # prefixes of torch.compile and DataParallel
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


@dataclass(frozen=True)
class PublicWeights:
    """Public weights that are not loaded yet."""

    classes: int
    mean: Sequence[float]
    std: Sequence[float]
    size: tuple[int, int]
    """Height and width of the images that they were trained on."""
    load: Callable[[], nn.Module]
    """Returns the network with its weights; downloads them if necessary."""
    place: str
    """File of the weights after the download."""
    origin: str
    """Address of the download."""


def architecture_of(name: str) -> str:
    """Name of the architecture of public weights, e.g. ``torchvision:resnet50`` of ``torchvision:resnet50@WEIGHTS``."""
    return name.partition("@")[0]


def torchvision_weights(name: str, named: str) -> PublicWeights:
    """Returns weights of a torchvision model: ``NAME@WEIGHTS``, or the default ones of ``NAME``.

    Messages begin with ``named``.
    """
    from torchvision import models

    name, _, tag = name.partition("@")
    available = models.list_models(module=models)
    if name not in available:
        hint = did_you_mean(f"torchvision:{name}", [f"torchvision:{other}" for other in available])
        raise CondenseError(f"{named}: unknown{hint}")
    choices = models.get_model_weights(name).__members__
    if tag and tag not in choices:
        raise CondenseError(f"{named}: no weights {tag} of {name}{did_you_mean(tag, choices)}")
    weights: Any = choices[tag or "DEFAULT"]
    preset = weights.transforms()
    place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    return PublicWeights(
        len(weights.meta["categories"]),
        preset.mean,
        preset.std,
        (preset.crop_size[0], preset.crop_size[0]),
        lambda: models.get_model(name, weights=weights, progress=False),
        str(place),
        weights.url,
    )


def timm_weights(name: str, named: str) -> PublicWeights:
    """Returns the default weights of a timm model; messages begin with ``named``."""
    try:
        import timm
    except ImportError as error:
        raise missing_package("timm", "timm", named) from error
    if not timm.is_model(name):
        hint = did_you_mean(f"timm:{name}", [f"timm:{other}" for other in timm.list_models()])
        raise CondenseError(f"{named}: unknown{hint}")
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise CondenseError(f"{named}: timm has no weights for it")
    repository = config.hf_hub_id or ""
    origin = f"https://huggingface.co/{repository}" if repository else str(config.url)
    cache = "the Hugging Face cache (HF_HOME), below hub/models--" + repository.replace("/", "--")
    place = cache if repository else str(Path(torch.hub.get_dir()) / "checkpoints" / origin.rpartition("/")[2])
    return PublicWeights(
        config.num_classes,
        config.mean,
        config.std,
        (config.input_size[1], config.input_size[2]),
        lambda: timm.create_model(name, pretrained=True),
        place,
        origin,
    )


def check_public_weights(file: str) -> None:
    """Checks the name of public weights without loading them.

    Raises:
        CondenseError: there are no such weights.
    """
    if file.startswith("torchvision:") and "@" in file:
        torchvision_weights(file.partition(":")[2], f"teachers={file}")


def load_public_weights(
    file: str, shape: tuple[int, int, int], classes: int | None, transform: Transform
) -> PublicNetwork:
    """Loads a network with public weights for images in the training space of ``transform``.

    Args:
        file: ``torchvision:NAME``, ``torchvision:NAME@WEIGHTS`` or ``timm:NAME``.
        shape: (C,H,W) of the images.
        classes: Number of classes; None: any, of a network whose features are used.
        transform: Map from pixels to training space.

    Raises:
        CondenseError: An unknown name, another number of classes, or the weights cannot be downloaded.
    """
    library, _, name = file.partition(":")
    weights = {"torchvision": torchvision_weights, "timm": timm_weights}[library](name, f"teachers={file}")
    if classes not in (None, weights.classes):
        raise CondenseError(
            f"teachers={file}: its weights distinguish {weights.classes} classes, the data have "
            f"{classes}; give a checkpoint for these classes, or remove teachers= to train teachers"
        )
    if shape[0] not in (1, 3):
        raise CondenseError(f"teachers={file}: takes images of 1 or 3 channels, not {shape[0]}")
    try:
        with rng.seeded("layout"):
            model = weights.load()
    except Exception as fault:  # the libraries raise different types
        reason = (str(fault) or type(fault).__name__).strip().splitlines()[0]
        raise CondenseError(
            f"teachers={file}: its weights are not here and cannot be fetched ({reason}); get "
            f"{weights.origin} elsewhere and put it at {weights.place}"
        ) from fault
    net = architectures.Wrapped(model, (3, *shape[1:]), weights.classes, name=architecture_of(file))
    return PublicNetwork(net, transform, weights.mean, weights.std)
