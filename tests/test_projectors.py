"""Projectors: public networks of every kind, what is adapted, what is stored, and what is refused."""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_arrays
from torch import nn

import condense
from condense import networks, rng
from condense.augment import ViewRule
from condense.data import Standardise
from condense.engine import Run
from condense.errors import CondenseError
from condense.labels import MergedProjector, Projector, ProjectorLabels, TeacherLabels, adapters, compute_logits
from condense.lighten import kinds, lighten, projection
from condense.methods.curriculum_synthesis import patches, relabelling
from condense.networks import BUNDLED_BACKBONES, Encoder, MeanLogits, pretrained
from condense.networks import saved as saved_module
from condense.pretraining import load_expert_ensemble
from condense.registry import METHODS
from condense.sets import DistilledSet

CPU = torch.device("cpu")
NETWORK = "convnet-d2-w8-bn"
TAUGHT = {"network": NETWORK, "teacher_epochs": 2, "teacher_batch": 8}
QUICK = {"projector_steps": 3, "projector_batch": 9, "adapter_rank": 2}
CLIPS = {
    "condense-rn": {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "condense-vit": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
}
PROMPTS = ["a photo of a {}.", "one {}, {}"]


def refusal(call):
    with pytest.raises(CondenseError) as fault:
        call()
    assert "\n" not in str(fault.value)
    return str(fault.value)


def stirred(net, seed=0):
    """The network with weights and statistics of which none is 0 or 1."""
    with rng.seeded("stirred", seed), torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value += 0.1 * torch.rand_like(value) if name.endswith("running_var") else 0.1 * torch.randn_like(value)
    return net.eval()


def saved(net, path):
    torch.save(net.state_dict(), path)
    return path


def size(net):
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


def middle(channels=3):
    """A training space that is not the pixels."""
    return Standardise(torch.linspace(0.4, 0.6, channels), torch.linspace(0.2, 0.3, channels))


def projector(found, head_rank=0, rank=2, seed=0, classes=3, channels=3, start=None):
    """A projector that is as its training begins, of a head of random columns."""
    names = adapters.adapted_weight_names(found.encoder, torch.rand(2, channels, 16, 16))
    with torch.no_grad():
        width = found.encoder(torch.rand(1, channels, 16, 16)).shape[1]
    start = F.normalize(torch.randn(width, classes), dim=0) if start is None else start
    return Projector(found.encoder, names, rank, start, head_rank, found.scale, middle(channels), seed)


def moved(made, by=0.1):
    """The projector after some training that never was."""
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn_like(parameter)
    return made


# -- public networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two tiny CLIP models that open_clip knows, with files of random weights."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip import factory

    folder, places = tmp_path_factory.mktemp("clip"), list(factory._MODEL_CONFIG_PATHS)
    for name, vision in CLIPS.items():
        text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    found = {}
    for name in CLIPS:
        with rng.seeded("clip"):
            model = stirred(open_clip.create_model(name, require_pretrained=False))
        found[name] = SimpleNamespace(model=model, file=saved(model, folder / f"{name}.pt"))
    yield found
    factory._MODEL_CONFIG_PATHS[:] = places
    factory._rescan_model_configs()


def clip_word(clips, name):
    return f"open_clip:{name}@{clips[name].file}"


@pytest.fixture
def small_torchvision(monkeypatch):
    """torchvision's models made for images of 32x32 and five classes."""
    known = pretrained.torchvision_weights

    def small(name, named):
        return dataclasses.replace(known(name, named), size=(32, 32), classes=5)

    monkeypatch.setattr(pretrained, "torchvision_weights", small)


def torchvision_word(name, folder, seed=0):
    from torchvision import models

    with rng.seeded("torchvision", seed):
        net = stirred(models.get_model(name, num_classes=5))
    return f"torchvision:{name}@{saved(net, folder / f'{name}.pt')}"


class Grouped(nn.Module):
    """A network of others with a grouped convolution, a linear layer that nothing follows from, and attention."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, groups=4)
        self.norm, self.aside = nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def embed(self, x):
        maps = self.norm(self.grouped(self.first(x))).relu()
        self.aside(maps.mean((2, 3)))
        tokens = maps.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)


@pytest.fixture
def grouped():
    with rng.seeded("grouped"):
        net = stirred(Grouped())
    encoder = Encoder(net, (3, 16, 16), [0.5] * 3, [0.3, 0.2, 0.1])
    return pretrained.Backbone(encoder, {"name": "grouped", "sha256": "", "bytes": size(net)})


@pytest.fixture
def own(tmp_path, tiny):
    """A file of teachers, as a backbone."""
    made = condense.api.teachers(tiny, networks=[NETWORK], epochs=1, teacher_batch=8, out=tmp_path / "own.h5")
    return made.file.path


# -- where a projector starts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_rank", [0, 2])
@pytest.mark.parametrize("word", [*BUNDLED_BACKBONES, "own"])
def test_a_projector_starts_as_the_frozen_networks_cosines(word, head_rank, own):
    found = pretrained.find_backbone(str(own) if word == "own" else word, (1, 16, 16), CPU)
    file = saved_module.read_teacher_file(own if word == "own" else pretrained._FOLDER / f"{word}.h5")
    with rng.seeded("start"):
        made = projector(found, head_rank, channels=1)
        pixels = torch.rand(4, 1, 16, 16)
    channels, height, width = file.manifest["image_shape"]
    mean, std = (torch.tensor(file.manifest["normalisation"][key])[:, None, None] for key in ("mean", "std"))
    if (height, width) != (16, 16):
        resized = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False, antialias=True)
    else:
        resized = pixels
    features = file.load_member(0, CPU).network.embed((resized.repeat(1, channels, 1, 1) - mean) / std).flatten(1)
    start = made.start if head_rank else made.head
    wanted = 10.0 * (features / features.norm(dim=1, keepdim=True)) @ start
    assert float(wanted.detach().std()) > 0.1
    torch.testing.assert_close(made(made.transform(pixels)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CLIPS)
def test_a_head_of_text_starts_as_zero_shot_clip(name, clips):
    import open_clip

    model = clips[name].model
    found = pretrained.find_backbone(clip_word(clips, name), (3, 32, 32), CPU)
    classes, pixels = ["cat", "tabby_dog", "{ur}"], torch.rand(4, 3, 32, 32)
    made = projector(found, 2, start=found.text(classes, PROMPTS))
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.visual.preprocess_cfg[key] for key in ("mean", "std")))
    tokens = open_clip.get_tokenizer(name)
    with torch.no_grad():
        seen = F.normalize(model.encode_image((pixels - mean) / std), dim=1)
        read = []
        for word in ("cat", "tabby dog", "{ur}"):
            both = F.normalize(model.encode_text(tokens([p.replace("{}", word) for p in PROMPTS])), dim=1)
            read.append(F.normalize(both.mean(0), dim=0))
        wanted = model.logit_scale.exp() * seen @ torch.stack(read, 1)
    assert float(wanted.std()) > 0.05
    torch.testing.assert_close(made(made.transform(pixels)), wanted, rtol=0, atol=1e-5)


def test_means_are_centred_and_of_unit_length(own):
    encoder = pretrained.find_backbone(str(own), (1, 8, 8), CPU).encoder
    batches = [torch.rand(5, 1, 8, 8) ** k for k in (1, 2, 3)]
    found = projection.compute_class_mean_features(encoder, [lambda pixels=pixels: pixels for pixels in batches])
    features = [encoder(pixels) for pixels in batches]
    rows = torch.stack([torch.stack([row / row.norm() for row in part]).mean(0) for part in features])
    rows = rows - rows.mean(0)
    torch.testing.assert_close(found.T, rows / rows.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


# -- what is adapted --------------------------------------------------------------------------------------------------

RN = [
    "conv1",
    "conv2",
    "conv3",
    *(f"layer{k}.0.{name}" for k in (1, 2, 3, 4) for name in ("conv1", "conv2", "conv3", "downsample.0")),
    *(f"attnpool.{x}_proj" for x in "kqvc"),
]
VIT = [f"transformer.resblocks.0.{name}" for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")]


def close(made, images):
    """Changes in the weights, beside them, and as each output's own sum of products are one projector."""
    with torch.no_grad():
        given = made(images)
        merged = MergedProjector(made)
        reach = float(given.abs().max())
        assert float((merged(images) - given).abs().max()) <= 1e-6 * reach
        plain = copy.deepcopy(made.encoder)
        for name, a, b in zip(made.names, made.low, made.high):
            weight = plain.get_parameter(name)
            for row in range(len(weight)):
                weight[row] += sum(a[row, r] * b[r].view(weight.shape[1:]) for r in range(a.shape[1]))
        features = F.normalize(plain(made.transform.inverse(images)), dim=1)
        wanted = made.log_scale.exp() * features @ made.columns() + made.bias
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * reach)
        frozen = F.normalize(made.encoder(made.transform.inverse(images)), dim=1)
        assert float((features - frozen).abs().max()) > 1e-3  # they do change it
    return merged


@pytest.mark.parametrize("head_rank", [0, 2])
def test_changes_in_the_weights_of_what_is_shipped(head_rank):
    found = pretrained.find_backbone(BUNDLED_BACKBONES[0], (3, 16, 16), CPU)
    made = moved(projector(found, head_rank))
    assert made.names == [f"net.convs.{k}.weight" for k in range(3)]
    close(made, torch.randn(3, 3, 16, 16))
    assert all(not weight.requires_grad for weight in made.encoder.parameters())


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_changes_in_the_weights_of_a_library(name, small_torchvision, tmp_path):
    """With BatchNorm, and with convolutions of a channel each."""
    found = pretrained.find_backbone(torchvision_word(name, tmp_path), (3, 16, 16), CPU)
    made = moved(projector(found), 0.03)
    layers = {path: layer for path, layer in found.encoder.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert sum(isinstance(layer, nn.Linear) for layer in layers.values()) == 1
    assert made.names == [f"{path}.weight" for path, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    assert name == "resnet18" or any(layers[path.removesuffix(".weight")].groups > 1 for path in made.names)
    close(made, torch.randn(2, 3, 16, 16))


def test_timm_names_its_networks_too(tmp_path):
    timm = pytest.importorskip("timm")
    with rng.seeded("timm"):
        net = stirred(timm.create_model("test_vit"))
    found = pretrained.find_backbone(f"timm:test_vit@{saved(net, tmp_path / 'vit.pt')}", (1, 8, 8), CPU)
    made = moved(projector(found, channels=1), 0.03)
    assert "net.model.blocks.0.attn.qkv.weight" in made.names and "net.model.patch_embed.proj.weight" in made.names
    assert not any("head" in name for name in made.names)
    close(made, torch.randn(2, 1, 8, 8))


def test_changes_in_the_weights_of_groups_and_attention(grouped):
    made = moved(projector(grouped, 2))
    layers = ("first.weight", "grouped.weight", "attention.in_proj_weight", "attention.out_proj.weight")
    assert sorted(made.names) == sorted(f"net.{name}" for name in layers)
    shapes = dict(zip(made.names, ((tuple(a.shape), tuple(b.shape)) for a, b in zip(made.low, made.high))))
    assert shapes["net.grouped.weight"] == ((8, 2), (2, 18))
    assert shapes["net.attention.in_proj_weight"] == ((24, 2), (2, 8))
    close(made, torch.randn(3, 3, 16, 16))


@pytest.mark.parametrize("name, layers", [("condense-rn", RN), ("condense-vit", ["conv1", *VIT])])
def test_changes_in_the_weights_of_clip(name, layers, clips):
    found = pretrained.find_backbone(clip_word(clips, name), (3, 16, 16), CPU)
    made = moved(projector(found, 2), 0.03)
    wanted = {f"net.visual.{layer}.weight" for layer in layers}
    if name == "condense-vit":
        wanted.add("net.visual.transformer.resblocks.0.attn.in_proj_weight")
    assert set(made.names) == wanted and len(made.names) == len(wanted)
    close(made, torch.randn(3, 3, 16, 16))


def test_a_rank_is_at_most_what_a_matrix_has(grouped):
    made = projector(grouped, 10**9, rank=10**9)
    assert [a.shape[1] for a in made.low] == [min(a.shape[0], b.shape[1]) for a, b in zip(made.low, made.high)]
    assert tuple(made.head_pair[0].shape) == (8, 3)


# -- a set with such labels -------------------------------------------------------------------------------------------


@pytest.fixture
def colour():
    """Images of 16x16 in three channels."""
    return condense.task(tiny_arrays(channels=3, size=16), name="tiny")


@pytest.fixture
def weak(colour):
    with rng.seeded("weak"):
        return stirred(networks.build_network(NETWORK, colour.shape, 3))


@pytest.fixture
def plain(colour):
    """A set with hard labels."""
    return condense.distill("random", colour, 1, network=NETWORK)


def first_batch(made):
    return next(iter(made.batches(1, 3)))


@pytest.mark.parametrize("name, head", [("condense-rn", "text"), ("condense-vit", "text"), ("condense-rn", "mean")])
def test_clip_from_end_to_end(name, head, clips, plain, colour, weak, tmp_path):
    light = lighten(
        plain, "projector", colour, teacher=weak, backbone=clip_word(clips, name), head=head, head_rank=2, **QUICK
    )
    labels, model = light.labels, clips[name].model
    assert labels.external_nbytes() == (size(model) if head == "text" else size(model.visual))
    assert light.manifest["lightened"]["bytes"]["external"] == labels.external_nbytes()
    arrays = labels.arrays()
    assert labels.nbytes() == sum(array.nbytes for array in arrays.values()) == light.nbytes()["labels"]
    parts = {key: array for key, array in arrays.items() if key[0] in "abh" and key not in ("bias", "hard")}
    assert len(parts) == 2 * len(labels.known["names"]) + (2 if head == "text" else 1)
    assert {array.dtype for array in parts.values()} == {np.dtype(np.float16)}
    assert arrays["bias"].dtype == arrays["scale"].dtype == np.float32 and any(parts["a0"].flatten())
    loaded = condense.load(light.save(tmp_path / "light.h5"))
    images, targets = first_batch(loaded)
    for mine, others in zip((images, targets), first_batch(light)):
        assert torch.equal(mine, others)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    student = networks.build_network(NETWORK, colour.shape, 3)
    loaded.loss(student(loaded.transform(images)), targets).backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in (student.convs[1].weight, student.classify.weight))


def test_training_moves_clips_weights_and_starts_from_its_text(clips, colour, weak):
    """An unadapted text head would answer with the public network's own logits."""
    config = projection.Projection(backbone=clip_word(clips, "condense-vit"), head_rank=2, **QUICK)
    made, known = projection.train_projector(colour, weak, config, ViewRule(), 0, device=CPU)
    assert known["head"] == "text" and known["classes"] == ["0", "1", "2"] and known["prompts"] == ["a photo of a {}."]
    assert all(bool(a.any()) for a in [*made.low, made.head_pair[0]])
    found = pretrained.find_backbone(config.backbone, colour.shape, CPU)
    torch.testing.assert_close(made.start, found.text(["0", "1", "2"], [pretrained.PROMPT]))


def small(made, task, weak, **settings):
    """A projector of a small own network, which is quick."""
    return lighten(made, "projector", task, teacher=weak, **{**QUICK, **settings})


@pytest.fixture
def backbone(colour, tmp_path):
    out = tmp_path / "colour.h5"
    return condense.api.teachers(colour, networks=[NETWORK], epochs=1, teacher_batch=8, out=out).file.path


@pytest.mark.parametrize("settings", [{}, {"loss_kind": "mse"}, {"loss_kind": "mse", "gamma": 0.3, "mix": "mixup"}])
def test_a_file_gives_the_same_targets_to_the_bit(settings, backbone, plain, colour, weak, tmp_path):
    light = small(plain, colour, weak, backbone=str(backbone), temperature=4.0, **settings)
    again = condense.load(light.save(tmp_path / "light.h5"))
    assert again.labels.cache_key() == light.labels.cache_key() and again.labels.nbytes() == light.labels.nbytes()
    twice = condense.load(again.save(tmp_path / "again.h5"))  # without its labels having been asked for
    for epoch in (0, 7):
        three = [next(iter(made.batches(epoch, 3))) for made in (light, again, twice)]
        for views, targets in three[1:]:
            assert torch.equal(views, three[0][0]) and torch.equal(targets, three[0][1])
    assert again.sha256() == twice.sha256() == light.sha256()


def test_what_ships_serves_without_a_path(plain, colour, weak, tmp_path):
    light = small(plain, colour, weak)
    assert (
        light.labels.known["backbone"]["name"] == BUNDLED_BACKBONES[0] and "path" not in light.labels.known["backbone"]
    )
    again = condense.load(light.save(tmp_path / "light.h5"))
    assert torch.equal(first_batch(again)[1], first_batch(light)[1])


def test_images_need_no_backbone(backbone, plain, colour, weak, tmp_path):
    light = small(plain, colour, weak, backbone=str(backbone))
    file = light.save(tmp_path / "light.h5")
    backbone.unlink()
    again = condense.load(file)
    assert torch.equal(again.images, light.images) and again.labels.nbytes() == light.labels.nbytes()
    line = refusal(lambda: first_batch(again))
    assert line.startswith(f"projector labels: backbone {backbone}: ") and "no such file" in line


def test_a_backbone_file_may_be_named_from_elsewhere(backbone, plain, colour, weak, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(clips["condense-vit"].file, "vit.pt")
    for word in (backbone.name, "open_clip:condense-vit@vit.pt"):
        light = small(plain, colour, weak, backbone=word)
        wanted = first_batch(light)[1]
        file = light.save(tmp_path / f"{word[-2:]}.h5")
        (tmp_path / "other").mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.chdir("other")
            assert torch.equal(first_batch(condense.load(file))[1], wanted)
    (tmp_path / "vit.pt").unlink()
    line = refusal(lambda: first_batch(condense.load(file)))
    assert "open_clip:condense-vit@" in line and "vit.pt" in line


def test_another_backbone_in_its_place_is_refused(backbone, plain, colour, weak, tmp_path):
    file = small(plain, colour, weak, backbone=str(backbone)).save(tmp_path / "light.h5")
    backbone.unlink()
    condense.api.teachers(colour, networks=[NETWORK], epochs=1, teacher_batch=8, seed=1, out=backbone)
    line = refusal(lambda: first_batch(condense.load(file)))
    assert line == (
        f"projector labels: backbone {backbone}: is another network than that of these labels (its "
        "checksum or size differs); restore it"
    )


@pytest.mark.parametrize("tower", ["visual.conv1.weight", "token_embedding.weight"])
def test_another_tower_is_refused(tower, clips, plain, colour, weak, tmp_path):
    """Of the text too, which the head follows from."""
    file, name = tmp_path / "clip.pt", "condense-vit"
    shutil.copy(clips[name].file, file)
    light = small(plain, colour, weak, backbone=f"open_clip:{name}@{file}", head_rank=2).save(tmp_path / "light.h5")
    first_batch(condense.load(light))
    state = clips[name].model.state_dict()
    torch.save({**state, tower: state[tower] * 1.5}, file)
    assert "its checksum or size differs" in refusal(lambda: first_batch(condense.load(light)))


# -- untrusted files --------------------------------------------------------------------------------------------------


class Written(ProjectorLabels):
    """Labels that write what an untrusted file could contain."""

    def arrays(self):
        return self.hostile


def tampering(light, file):
    """``read(change)``: the set after ``change(arrays, known)`` of its label arrays and their JSON, loaded again and
    asked for its labels."""
    own = light.labels.arrays()

    def read(change):
        arrays, known = dict(own), json.loads(own["projector"].tobytes())
        text = change(arrays, known)
        if "projector" in arrays and arrays["projector"] is own["projector"]:
            text = text if isinstance(text, bytes) else json.dumps(known).encode()
            arrays["projector"] = np.frombuffer(text, np.uint8)
        labels = copy.copy(light.labels)
        labels.__class__, labels.hostile = Written, arrays
        made = DistilledSet(light.stored, labels, light.transform, light.manifest)
        return first_batch(condense.load(made.save(file, force=True)))[1]

    assert torch.equal(read(lambda arrays, known: None), first_batch(light)[1])
    return read


@pytest.fixture
def tampered(backbone, plain, colour, weak, tmp_path):
    light = small(plain, colour, weak, backbone=str(backbone), loss_kind="mse", gamma=0.5)
    return tampering(light, tmp_path / "bad.h5")


@pytest.fixture
def little_memory():
    """An allocation of more than a gigabyte fails."""
    resource = pytest.importorskip("resource")
    with open("/proc/self/statm") if sys.platform == "linux" else contextlib.nullcontext() as file:
        if file is None:
            pytest.skip("needs /proc")
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_damaged_arrays_are_refused(tampered, little_memory):
    def put(name, array):
        return lambda arrays, known: arrays.update({name: array})

    def changed(name, change):
        return lambda arrays, known: arrays.update({name: change(arrays[name].copy())})

    def with_nan(array):
        array.flat[0] = np.nan
        return array

    def without_classes(images):
        def change(arrays, known):
            del arrays["hard"]
            arrays.update(loss=np.array([1, 0], np.float32), images=np.array([images]))

        return change

    head = "labels/projector is not a valid description"
    cases = {
        "labels/a0: does not fit the backbone (float32": changed("a0", lambda a: a.astype(np.float32)),
        "labels/a1: does not fit the backbone (float16 (": changed("a1", lambda a: a[:-1]),
        "labels/b0: does not fit the backbone (float16 (2,": changed("b0", lambda b: b.reshape(2, -1, 9)),
        "labels/b1: does not fit the backbone (missing": lambda arrays, known: arrays.pop("b1"),
        "labels/b0 must be finite floats": changed("b0", with_nan),
        "labels/head must be finite floats": changed("head", lambda h: h.astype(np.int8)),
        "labels/bias must be finite floats": changed("bias", with_nan),
        "labels/bias must be float32 (3), not float32 (4,)": put("bias", np.zeros(4, np.float32)),
        "labels/bias must be float32 (3), not float16": changed("bias", lambda b: b.astype(np.float16)),
        "lacks 'bias'": lambda arrays, known: arrays.pop("bias"),
        "lacks 'scale'": lambda arrays, known: arrays.pop("scale"),
        "lacks 'projector'": lambda arrays, known: arrays.pop("projector"),
        "labels/scale must be above 0, not -1.0": put("scale", np.full(1, -1, np.float32)),
        "labels/scale must be above 0, not 0.0": put("scale", np.zeros(1, np.float32)),
        "labels/scale must be finite": put("scale", np.full(1, np.inf, np.float32)),
        "labels/scale must be float32 (1)": put("scale", np.ones(2, np.float32)),
        "labels/hard has values outside": put("hard", np.array([0, 1, 3])),
        "labels/flags must be 0 or 1": put("flags", np.array([1, 2], np.uint8)),
        "labels/loss must be float32 (2)": put("loss", np.ones(1, np.float32)),
        "gamma: needs the class of each image": lambda arrays, known: arrays.pop("hard"),
        "gamma=-1": put("loss", np.array([1, -1], np.float32)),
        "labels/head: does not fit the backbone (missing": lambda arrays, known: arrays.pop("head"),
        "labels/head_a: does not fit the backbone (missing": lambda arrays, known: known.update(head_rank=2**62),
        "labels/a0: does not fit the backbone (float16 (8, 2)": lambda arrays, known: known.update(rank=2**62),
        "has no weights": lambda arrays, known: known["names"].append("net.convs.0.bias"),
        "has no text tower": lambda arrays, known: known.update(head="text", classes=["a", "b", "c"], prompts=["{}"]),
        f"{head}; copy": lambda arrays, known: b"{",
        f"{head}; ": lambda arrays, known: b"\xff\xfe",
        f"{head};": lambda arrays, known: b"[" * 100_000,
        head: lambda arrays, known: b"[]",
        f"{head}; copy or": lambda arrays, known: known.update(names=known["names"] * 2),
        "must be uint8": put("projector", np.zeros(4, np.int8)),
        "size differs": lambda arrays, known: known["backbone"].update(bytes=known["backbone"]["bytes"] - 1),
        "3 images but 4 labels": without_classes(4),
        "labels/images must be at least 0, not -3": without_classes(-3),
    }
    for words, change in cases.items():
        line = refusal(lambda change=change: tampered(change))
        assert words in line, (words, line)


HUGE = 10**400


def strange(read, paths):
    """Every value that is not refused, where each of the paths in the JSON has each of many: in one line, or taken."""
    taken = set()
    for *outer, last in paths:
        for value in [*WRONG, KeyError]:

            def change(arrays, known, outer=outer, last=last, value=value):
                for key in outer:
                    known = known[key]
                if value is KeyError:
                    del known[last]
                else:
                    known[last] = value

            try:
                read(change)
                taken.add((*outer, last, str(value)))
            except CondenseError as fault:
                assert "\n" not in str(fault)
    return taken


WRONG = [
    None,
    True,
    -1,
    0,
    0.5,
    math.nan,
    math.inf,
    10**400,
    2**40,
    "",
    "x",
    "\0",
    "a\nb",
    "\ud800",
    [],
    [0],
    {},
    {"a": 1},
    [[1]],
    [None] * 3,
    ["x"] * 3,
    [2**40] * 3,
    [10**400] * 3,
    [-1] * 3,
    [0] * 3,
    [math.nan] * 3,
    [1e300] * 3,
    [3, 2**20, 2**20],
    ["{:>9999999999}"],
    ["{} {x} {"],
]


def test_no_json_is_more_than_one_line(tampered, little_memory):
    paths = [(key,) for key in ("backbone", "names", "rank", "head_rank", "head", "shape", "mean", "std")]
    taken = strange(
        tampered, [*paths, *(("backbone", key) for key in ("name", "sha256", "bytes", "path")), ("names", 0)]
    )
    assert {path[:-1] for path in taken} <= {
        ("backbone", "name"),
        ("backbone", "path"),
        ("head_rank",),
        ("mean",),
        ("names",),
        ("shape",),
        ("std",),
    }
    assert {value for *path, value in taken if path == ["names"]} <= {"[]"}
    assert ("backbone", "name", "x") in taken  # its path says where it is


def test_no_json_of_a_head_of_text_is_more_than_one_line(clips, plain, colour, weak, little_memory, tmp_path):
    light = small(plain, colour, weak, backbone=clip_word(clips, "condense-vit"), head_rank=2)
    taken = strange(
        tampering(light, tmp_path / "bad.h5"), [("classes",), ("classes", 0), ("prompts",), ("prompts", 0), ("head",)]
    )
    assert {path[:-1] for path in taken} == {("classes",), ("classes", 0), ("prompts",)}
    assert {value for *path, value in taken if path == ["classes"]} == {"['x', 'x', 'x']"}
    assert {value for *path, value in taken if path == ["prompts"]} == {"['{} {x} {']"}


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, words",
    [
        ("tiny20-convnet-d3-w64", "unknown; did you mean 'tiny20-convnet-d3-w64-bn'?"),
        ("clip:RN50", "or LIBRARY:NAME with one of open_clip, timm, torchvision"),
        ("torchvision:", "unknown; known: tiny20-convnet-d3-w64-bn; or write FILE.h5"),
        ("nowhere.h5", "nowhere.h5: no such file"),
        ("torchvision:resnet81", "unknown; did you mean 'torchvision:resnet18'?"),
        ("torchvision:resnet18@nowhere.pt", "no such file: nowhere.pt"),
    ],
)
def test_unknown_backbones(word, words):
    line = refusal(lambda: pretrained.find_backbone(word, (3, 16, 16), CPU))
    assert line.startswith(f"backbone={word}: ") and words in line


@pytest.mark.parametrize(
    "word, words",
    [
        ("open_clip:RN5", "open_clip has no model RN5; did you mean 'RN50'?"),
        ("open_clip:RN50@opena", "weights that open_clip has for RN50 (openai, "),
        ("open_clip:RN50", "write open_clip:RN50@TAG or @FILE"),
        ("open_clip:condense-rn@openai", "weights that open_clip has for condense-rn (none)"),
        ("timm:test_vti", "unknown; did you mean 'timm:test_vit'?"),
    ],
)
def test_unknown_models_of_libraries(word, words, clips):
    pytest.importorskip("timm")
    line = refusal(lambda: pretrained.find_backbone(word, (3, 16, 16), CPU))
    assert line.startswith(f"backbone={word}: ") and words in line


@pytest.mark.parametrize("package, extra", [("open_clip", "clip"), ("timm", "timm")])
def test_a_missing_package(package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    line = refusal(lambda: pretrained.find_backbone(f"{package}:RN50@openai", (3, 16, 16), CPU))
    assert f"backbone={package}:RN50@openai" in line and f"pip install 'condense-toolkit[{extra}]'" in line


class Unreachable:
    def __call__(self, *arguments, **options):
        raise OSError("no route to host\nand so on")


def test_weights_that_cannot_be_fetched(monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "create_model", Unreachable())
    line = refusal(lambda: pretrained.find_backbone("open_clip:RN50@openai", (3, 16, 16), CPU))
    for words in ("cannot be fetched (no route to host); get https://", "HF_HOME", "open_clip:RN50@FILE"):
        assert words in line
    known = pretrained.torchvision_weights("resnet18", "")
    for load, reason in ((Unreachable(), "no route to host"), (lambda: 1 / 0, "division by zero")):
        weights = dataclasses.replace(known, load=load)
        monkeypatch.setattr(pretrained, "torchvision_weights", lambda name, named, weights=weights: weights)
        line = refusal(lambda: pretrained.find_backbone("torchvision:resnet18", (3, 16, 16), CPU))
        assert f"({reason}); get https://download.pytorch.org/" in line
        assert f"put it at {known.place} or name the file: backbone=torchvision:resnet18@FILE" in line


def test_files_that_are_no_such_weights(small_torchvision, clips, tmp_path):
    word = torchvision_word("shufflenet_v2_x0_5", tmp_path)
    file = word.partition("@")[2]
    assert "the file does not fit: " in refusal(
        lambda: pretrained.find_backbone(word.replace("x0_5@", "x1_0@"), (3, 8, 8), CPU)
    )
    (tmp_path / "text.pt").write_text("no weights")
    for library in ("torchvision:resnet18", "open_clip:condense-rn"):
        line = refusal(
            lambda library=library: pretrained.find_backbone(f"{library}@{tmp_path / 'text.pt'}", (3, 8, 8), CPU)
        )
        assert str(tmp_path / "text.pt") in line
    assert file in refusal(lambda: pretrained.find_backbone(f"open_clip:condense-rn@{file}", (3, 8, 8), CPU))


def test_whitened_images_and_grey_backbones(own, plain, colour, weak, tmp_path):
    white = condense.task(tiny_arrays(channels=3, size=16), name="tiny", zca=True)
    whitened = condense.distill("random", white, 2, network=NETWORK)
    line = refusal(lambda: lighten(whitened, "projector", white, teacher=weak, **QUICK))
    assert line == "labels=projector: needs pixels, which zca=true mixes; leave zca out"
    # What counts is the space of the set, however its data are given.
    given = [lighten(plain, "projector", data, teacher=weak, **QUICK).labels.arrays() for data in (white, colour)]
    assert all(given[0][name].tobytes() == array.tobytes() for name, array in given[1].items())
    line = refusal(lambda: lighten(plain, "projector", colour, teacher=weak, backbone=str(own), **QUICK))
    assert line == f"backbone={own}: takes images of 1 channels, not 3"
    out = tmp_path / "white.h5"
    condense.api.teachers(white, networks=[NETWORK], epochs=1, teacher_batch=8, out=out)
    line = refusal(lambda: pretrained.find_backbone(str(out), (3, 16, 16), CPU))
    assert line == f"backbone={out}: {out}: does not state the normalisation of its images; make it again, without zca"


@pytest.mark.parametrize(
    "normalised",
    [
        None,
        [],
        {},
        {"mean": [0.5] * 3},
        {"mean": [0.5] * 2, "std": [0.5] * 2},
        {"mean": "abc", "std": "abc"},
        {"mean": [0.5] * 3, "std": [0.5, 0.5, 0.0]},
        {"mean": [math.nan] * 3, "std": [0.5] * 3},
    ],
)
def test_a_backbone_file_of_a_stranger(normalised, backbone, monkeypatch):
    file = saved_module.read_teacher_file(backbone)
    file.manifest["normalisation"] = normalised
    monkeypatch.setattr(saved_module, "read_teacher_file", lambda path: file)
    assert "does not state the normalisation of its images" in refusal(
        lambda: pretrained.find_backbone(str(backbone), (3, 16, 16), CPU)
    )


def test_a_head_of_text_needs_a_text_tower(plain, colour, weak):
    line = refusal(lambda: small(plain, colour, weak, head="text"))
    assert line == f"head=text: backbone={BUNDLED_BACKBONES[0]} has no text tower; take head=mean"


def test_the_real_data_are_needed(plain, weak):
    assert refusal(lambda: small(plain, None, weak)) == "labels=projector: is trained on the real data; give --data"
    other = condense.task(tiny_arrays(channels=3, size=16, classes=4), name="four")
    line = refusal(lambda: small(plain, other, weak))
    assert line.startswith("--data four: has other classes (4) than the set (3)")


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"weak_epochs": "1,2"}, "weak_epochs=1,2: are of experts; give --teachers FILE of `condense experts`"),
        ({"weak_epochs": "1,x"}, "weak_epochs=1,x: must be numbers of epochs, e.g. 2,4,6"),
        ({"weak_epochs": "1,"}, "weak_epochs=1,: must be numbers"),
        ({"prompts": "a photo of a {}.|it"}, "prompts=a photo of a {}.|it: each needs {} in place of the class"),
        ({"prompts": ""}, "prompts=: each needs {} in place of the class"),
        ({"loss_kind": "mes"}, "loss_kind=mes: unknown; did you mean 'mse'?"),
        ({"gamma": 0.5}, "gamma=0.5: applies to loss_kind=mse only"),
        ({"loss_kind": "mse", "gamma": -1.0}, "gamma=-1: must be at least 0"),
        ({"head": "txt"}, "head=txt: unknown; did you mean 'text'?"),
        ({"adapter_rank": 0}, "adapter_rank=0: must be at least 1"),
        ({"head_rank": 0, "projector_steps": 0}, "head_rank=0: must be at least 1; projector_steps=0: must be at"),
        ({"projector_lr": math.nan}, "projector_lr=nan: must be a finite number"),
        ({"rank": 2}, "rank=2: no such setting of labels=projector"),
    ],
)
def test_settings_that_cannot_be(settings, line, plain, colour, weak):
    assert refusal(lambda: lighten(plain, "projector", colour, teacher=weak, **settings)).startswith(line)


def test_a_training_that_diverges_says_so(plain, colour, weak, backbone):
    line = refusal(lambda: small(plain, colour, weak, backbone=str(backbone), projector_lr=1e5))
    assert line.startswith("diverged: the projector's weights are not finite; lower projector_lr, now 100000")


# -- targets and loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["none", "cutmix", "mixup"])
def test_squares_and_classes_are_the_plain_formula(mix, backbone, colour, weak):
    plain = condense.distill("random", colour, 2, network=NETWORK)
    labels = small(plain, colour, weak, backbone=str(backbone), loss_kind="mse", gamma=0.3, mix=mix).labels
    images, ids = plain.training_images()
    views, targets = labels.training_batch(images, ids[[4, 0, 3]], 5)
    drawn = labels.views.draw(labels.seed, 5, len(images), images.shape[2:])
    assert torch.equal(views, labels.views.apply(images, torch.tensor([4, 0, 3]), drawn))
    truth = torch.zeros(3, 3, dtype=torch.float64)
    for row, i in enumerate((4, 0, 3)):
        share = 1.0 if mix == "none" else float(drawn.share[i])
        truth[row, int(plain.hard_labels()[i])] += share
        if mix != "none":
            truth[row, int(plain.hard_labels()[drawn.partner[i]])] += 1 - share
    asked = labels.teacher(views)
    assert targets.shape == (3, 2, 3)
    torch.testing.assert_close(targets[:, 0], asked, rtol=1e-6, atol=1e-6)  # another memory layout may round otherwise
    torch.testing.assert_close(targets[:, 1].double(), truth, rtol=0, atol=1e-6)
    given = torch.randn(3, 3)
    rows = given.double()
    wanted = (rows - asked.double()).square().mean() - 0.3 * (truth * rows.log_softmax(1)).sum(1).mean()
    assert math.isclose(float(labels.loss(given, targets)), float(wanted), rel_tol=1e-5)
    bare = small(plain, colour, weak, backbone=str(backbone), loss_kind="mse", mix=mix).labels
    _, alone = bare.training_batch(images, ids[[4, 0, 3]], 5)
    assert alone.shape == (3, 3) and bare.hard is None
    assert math.isclose(float(bare.loss(given, alone)), float((rows - alone.double()).square().mean()), rel_tol=1e-5)


@pytest.mark.parametrize("squared", [True, False])
def test_distributions_are_those_of_a_teacher(squared, backbone, plain, colour, weak):
    labels = small(plain, colour, weak, backbone=str(backbone), temperature=3.0, squared=squared).labels
    live = TeacherLabels(labels.teacher, len(labels), labels.seed, labels.views, 3.0, squared)
    images, ids = plain.training_images()
    given = torch.randn(3, 3)
    for epoch in (0, 4):
        mine, others = labels.training_batch(images, ids, epoch), live.training_batch(images, ids, epoch)
        assert torch.equal(mine[0], others[0]) and torch.equal(mine[1], others[1])
        assert torch.equal(labels.loss(given, mine[1]), live.loss(given, others[1]))


# -- training ---------------------------------------------------------------------------------------------------------

RULE = ViewRule(mix="cutmix", min_scale=0.5)


def trained(task, weak, backbone, steps, **options):
    config = projection.Projection(backbone=str(backbone), projector_steps=steps, projector_batch=9, projector_lr=0.02)
    return projection.train_projector(task, weak, config, RULE, 7, device=CPU, **options)[0]


def test_training_lowers_the_loss_of_other_views(colour, weak, backbone, monkeypatch):
    source = projection.ProjectorSource(colour, weak, RULE, 99, 0.1)
    seen = [source.batch(torch.arange(36), epoch) for epoch in range(4)]

    def loss(made):
        with torch.no_grad():
            return sum(float(source.loss(made(views), targets)) for views, targets in seen)

    made = trained(colour, weak, backbone, 60)
    with monkeypatch.context() as patch:
        patch.setattr(projection, "train", lambda *words, **options: 0.0)
        untouched = trained(colour, weak, backbone, 60)
    assert not any(bool(a.any()) for a in untouched.low)
    assert loss(made) < 0.5 * loss(untouched)
    for name, value in made.encoder.state_dict().items():
        assert torch.equal(value, untouched.encoder.state_dict()[name])  # public weights and statistics stay


def test_lessons_are_of_the_views_that_the_weak_teachers_saw(colour, weak):
    ids = torch.tensor([0, 30, 15])
    views, targets = projection.ProjectorSource(colour, weak, RULE, 0, 0.25).batch(ids, 3)
    drawn = RULE.draw(rng.key(0, "lesson", 3, 0), 0, 3, (16, 16))
    assert torch.equal(views, RULE.apply(colour.batch(ids), torch.arange(3), drawn))
    truth, own = torch.zeros(3, 3), [0, 2, 1]
    for row in range(3):
        truth[row, own[row]] += drawn.share[row]
        truth[row, own[int(drawn.partner[row])]] += 1 - drawn.share[row]
    assert float(truth.max(1).values.min()) < 1
    torch.testing.assert_close(targets[:, 1], truth)
    torch.testing.assert_close(targets[:, 0], weak(views), rtol=1e-5, atol=1e-5)
    assert not torch.equal(views, projection.ProjectorSource(colour, weak, RULE, 0, 0.25).batch(ids, 4)[0])
    whole = projection.ProjectorSource(colour, weak, ViewRule(mix="none"), 0, 0.25)
    assert whole.batch(ids, 3)[1][:, 1].tolist() == torch.eye(3)[[0, 2, 1]].tolist()
    given = torch.randn(3, 3)
    rows = given.double()
    wanted = (rows - targets[:, 0].double()).square().mean()
    wanted = wanted - 0.25 * (targets[:, 1].double() * rows.log_softmax(1)).sum(1).mean()
    assert math.isclose(float(whole.loss(given, targets)), float(wanted), rel_tol=1e-5)


def test_a_training_that_was_killed_ends_with_the_same_bits(colour, weak, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    whole, place, reached = trained(colour, weak, backbone, 8), tmp_path / "projector.train", []

    def report(done):
        reached.append(done)
        if reached == list(range(1, 6)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(colour, weak, backbone, 8, checkpoint=place, report=report)
    assert place.exists()
    made = trained(colour, weak, backbone, 8, checkpoint=place, report=report)
    assert 1 not in reached[5:] and reached[-1] == 8 and not place.exists()
    for name, array in whole.arrays().items():
        assert np.array_equal(array, made.arrays()[name]), name


def test_a_training_with_other_settings_begins_anew(colour, weak, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    place = tmp_path / "projector.train"

    def fit(report=None, **settings):
        words = {"projector_steps": 4, "projector_batch": 9, **settings}
        config = projection.Projection(backbone=str(backbone), **words)
        return projection.train_projector(colour, weak, config, RULE, 7, device=CPU, checkpoint=place, report=report)[
            0
        ].arrays()

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(stop, hard_weight=0.0)
    assert place.exists()
    resumed = fit(hard_weight=5.0)  # no batch of either shows the difference
    clean = fit(hard_weight=5.0)
    assert all(np.array_equal(resumed[name], array) for name, array in clean.items())


def test_statistics_of_the_batch_are_those_of_lessons(colour, weak):
    views, targets = projection.ProjectorSource(colour, weak, RULE, 7, 0.1, "batch", 5).batch(torch.arange(10), 0)
    assert torch.equal(targets[:, 0], compute_logits(weak, views, statistics="batch", micro=5))
    assert not torch.allclose(targets[:, 0], compute_logits(weak, views), atol=1e-3)


def test_loss_and_teachers_of_a_set_that_is_a_projectors(colour, backbone, plain, weak):
    settings = {**TAUGHT, **QUICK, "backbone": str(backbone), "loss_kind": "mse", "gamma": 0.5}
    made = condense.distill("hello", colour, 1, pool=6, crops=2, **settings)
    assert made.labels.loss_kind == "mse" and made.labels.gamma == 0.5
    views = lighten(made, "per-view", label_epochs=2)
    assert (views.labels.loss_kind, views.labels.gamma) == ("mse", 0.5) and "label_source" not in views.manifest
    again = lighten(made, "projector", colour, backbone=str(backbone), **QUICK)
    assert (again.labels.loss_kind, again.labels.gamma) == ("mse", 0.5)
    assert lighten(made, "teacher").labels.names == (NETWORK,)  # those that taught the projector
    assert again.manifest["label_source"] == made.manifest["label_source"]


def test_hello_finds_what_cannot_be_had_before_it_trains(colour, untaught):
    for settings in ({"backbone": "nonsense"}, {"head": "text"}):
        refusal(lambda settings=settings: condense.distill("hello", colour, 1, **TAUGHT, **settings))


def test_experts_of_some_epochs_teach_together(plain, colour, backbone, tmp_path, monkeypatch):
    file = condense.api.experts(
        colour, network="convnet-d2-w8-in", count=2, epochs=3, out=tmp_path / "experts.h5"
    ).file.path
    asked, fitted = [], projection.train_projector

    def watched(task, weak, *words, **options):
        asked.append(weak)
        return fitted(task, weak, *words, **options)

    monkeypatch.setattr(kinds, "train_projector", watched)
    light = lighten(plain, "projector", colour, teachers=file, weak_epochs="1,3", backbone=str(backbone), **QUICK)
    assert light.manifest["label_source"]["weak_epochs"] == [1, 3]
    late = {"teachers": file, "weak_epochs": "1,99", "backbone": str(backbone)}
    assert "have 3 epochs" in refusal(lambda: lighten(plain, "projector", colour, **late, **QUICK))
    images = colour.batch(torch.arange(6))
    logits = {epoch: load_expert_ensemble(file, CPU, epoch=epoch)(images) for epoch in (1, 2, 3)}
    assert isinstance(asked[0], MeanLogits)
    torch.testing.assert_close(asked[0](images), (logits[1] + logits[3]) / 2, rtol=1e-5, atol=1e-6)
    assert float((asked[0](images) - logits[2]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", [None, "condense-rn"])
def test_the_bytes_that_a_plan_states(name, plain, colour, weak, request):
    word = BUNDLED_BACKBONES[0] if name is None else clip_word(request.getfixturevalue("clips"), name)
    config = projection.Projection(backbone=word)
    planned, external = projection.projector_bytes(colour.shape, colour.classes, config)
    labels = lighten(plain, "projector", colour, teacher=weak, backbone=word, projector_steps=1).labels
    assert external == labels.external_nbytes()
    assert abs(planned - labels.nbytes()) < 150  # the digits of means and stds


# -- HeLlO ------------------------------------------------------------------------------------------------------------

PATCHES = {**TAUGHT, "pool": 6, "crops": 2}


def test_cutting_up_undoes_collages():
    tiles = torch.randn(2 * 9, 3, 4, 5)
    made = patches.make_collages(tiles, 3)
    assert made.shape == (2, 3, 12, 15) and torch.equal(patches.split_collages(made, 3), tiles)
    assert torch.equal(made[1, :, 4:8, 10:], tiles[9 + 5])  # the second row's third
    assert torch.equal(patches.split_collages(tiles, 1), tiles)


def test_refined_patches_are_nearer_to_the_large_ones(colour):
    settings = {**PATCHES, "labels": "hard", "factor": 2, "store": "float32", "precision": "fp32"}
    start, refined = (
        condense.distill("hello", colour, 2, refine_steps=steps, refine_lr=0.02, **settings) for steps in (0, 25)
    )
    run = Run(colour, 2, NETWORK, quiet=True, track="none")
    config = METHODS.get("hello").config(
        **{key: settings[key] for key in settings if key not in ("network", "precision")}
    )
    scorer = relabelling.get_teachers(config, run).members[0].network
    encoder = pretrained.find_backbone(BUNDLED_BACKBONES[0], colour.shape, CPU).encoder
    large, tiles = [], []
    for c in range(3):
        crops, whole = (
            patches.most_confident_crops(run, scorer, c, config.pool, config.crops, config.factor, side)
            for side in (None, 16)
        )
        tiles.append(crops)
        ids, draws = colour.sample_ids(config.pool, (0, "pool"), [c]), rng.Draws(0, "patches", c)
        boxes = patches.square_boxes((16, 16), draws.uniform(2 * len(ids)), draws.uniform((2 * len(ids), 2))).box
        for crop, resized in zip(crops, whole):
            found = []
            for row, (top, left, height, width) in enumerate(boxes.tolist()):
                part = colour.batch(ids[row // 2 : row // 2 + 1])[:, :, top : top + height, left : left + width]
                sizes = [
                    F.interpolate(part, (side, side), mode="bilinear", align_corners=False, antialias=True)[0]
                    for side in (8, 16)
                ]
                found.append(torch.allclose(sizes[0], crop, atol=1e-5) and torch.allclose(sizes[1], resized, atol=1e-5))
            assert any(found)
            large.append(encoder(colour.transform.inverse(resized[None])))
    wanted = torch.cat(large)
    assert len(wanted) == 3 * 2 * 4

    def gap(made):
        cut = torch.cat([made.stored[:, :, i : i + 8, j : j + 8] for i in (0, 8) for j in (0, 8)])
        cut = cut.unflatten(0, (4, 6)).transpose(0, 1).flatten(0, 1)
        seen = F.interpolate(cut, (16, 16), mode="bilinear", align_corners=False)
        return float((encoder(seen) - wanted).square().mean())

    placed = colour.transform.inverse(patches.make_collages(torch.cat(tiles), 2)).clamp(0, 1)
    torch.testing.assert_close(start.stored, placed, rtol=0, atol=1e-5)
    assert gap(refined) < 0.7 * gap(start), (gap(refined), gap(start))
    assert float(refined.stored.min()) >= 0 and float(refined.stored.max()) <= 1
    assert (refined.stored - start.stored).abs().flatten(1).amax(1).min() > 1e-3  # of every image


@pytest.mark.parametrize("factor", [1, 2])
def test_with_labels_of_teachers_it_is_rded(factor, colour):
    rded = condense.distill("rded", colour, 2, factor=factor, **PATCHES)
    hello = condense.distill("hello", colour, 2, factor=factor, labels="teacher", refine_steps=0, **PATCHES)
    assert torch.equal(hello.stored, rded.stored) and hello.labels.kind == "teacher"
    images, ids = rded.training_images()
    for mine, others in zip(hello.labels.training_batch(images, ids, 1), rded.labels.training_batch(images, ids, 1)):
        assert torch.equal(mine, others)


def test_hello_is_judged_beside_random_images_with_equal_labels(colour, backbone, tmp_path, monkeypatch, three_steps):
    file = tmp_path / "hello.h5"
    settings = {**PATCHES, **QUICK, "backbone": str(backbone), "factor": 2, "refine_steps": 2}
    condense.distill("hello", colour, 1, out=file, **settings)
    made = condense.load(file)
    assert made.labels.kind == "projector" and made.manifest["label_source"]["teachers"]["networks"] == [NETWORK]
    asked, original = [], ProjectorLabels.label_images

    def watched(self, images, teacher, seed, hard=None):
        labels = original(self, images, teacher, seed, hard)
        asked.append((images, teacher, labels))
        return labels

    monkeypatch.setattr(ProjectorLabels, "label_images", watched)
    record = condense.evaluate(made, colour, networks=NETWORK, runs=1, controls=["random"])
    assert [(entry["arm"], entry["labels"]) for entry in record["results"]] == [("distilled", "own"), ("random", "own")]
    assert not record["missing"] and record["set"]["bytes"]["external"] == made.labels.external_nbytes()
    ((images, teacher, labels),) = asked
    assert isinstance(teacher, MergedProjector) and not torch.equal(images, made.training_images()[0])
    views, targets = labels.training_batch(images, torch.arange(3), 0)
    torch.testing.assert_close(targets, (made.labels.teacher(views) / labels.temperature).softmax(1))
    backbone.unlink()
    line = refusal(lambda: condense.evaluate(condense.load(file), colour, networks=NETWORK, runs=1, controls=[]))
    assert line.startswith("projector labels: backbone ")
