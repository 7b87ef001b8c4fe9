"""Networks: exact layers of the field, shapes at every size, reset, names and refusals."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from condense import networks, rng
from condense.errors import CondenseError

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)]


def build(name, shape=(3, 32, 32), classes=10, seed=0):
    if isinstance(name, str) and name.startswith("timm:"):
        pytest.importorskip("timm")
    with rng.seeded(seed, "network"):
        return networks.build_network(name, shape, classes)


def images(shape, count=2) -> Tensor:
    return rng.Draws("images", *shape).uniform((count, *shape), -1.0, 1.0)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    return outputs * (inputs * kernel * kernel + bias)


def linear(*widths: int) -> int:
    return sum(outputs * (inputs + 1) for inputs, outputs in itertools.pairwise(widths))


def chain_of_convs(channels: int, widths: list[int], kernels: list[int], norm: int) -> int:
    """Convolutions in a row; ``norm`` is the number of values per channel of the norm behind each (2 or 0)."""
    return sum(conv(i, o, k) + norm * o for i, o, k in zip([channels, *widths], widths, kernels))


# -- definitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        ("convnet-d3-w128-in", (3, 32, 32), 10, 320_010),
        ("convnet-d3-w128-in", (3, 32, 32), 100, 504_420),
        ("convnet-d4-w128-in", (3, 64, 64), 200, 857_160),
        ("convnet-d5-w128-in", (3, 128, 128), 10, 615_690),
        ("convnet-d4-w128-in", (3, 64, 64), 1000, 2_496_360),
    ],
)
def test_published_parameter_counts(name, shape, classes, count):
    assert parameters(build(name, shape, classes)) == count


VGG11 = [64, 128, 256, 256, 512, 512, 512, 512]


def resnet18(channels: int, head: int) -> int:
    total = conv(channels, 64, 3, bias=False) + 2 * 64
    for inputs, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += conv(inputs, width, 3, bias=False) + 3 * conv(width, width, 3, bias=False) + 4 * 2 * width
        if inputs != width:
            total += conv(inputs, width, 1, bias=False) + 2 * width
    return total + linear(head, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_counts_from_the_layer_definitions(channels):
    side = 28 if channels == 1 else 32
    shape = (channels, side, side)
    alexnet, kernels = [128, 192, 256, 192, 192], [5, 5, 3, 3, 3]
    lenet = chain_of_convs(channels, [6, 16], [5, 5], 0) + linear(400, 120, 84, 10)
    expected = {
        "mlp": linear(channels * side * side, 128, 128, 10),
        "lenet": lenet,
        "alexnet": chain_of_convs(channels, alexnet, kernels, 0) + linear(192 * 4 * 4, 10),
        "alexnet-bn": chain_of_convs(channels, alexnet, kernels, 2) + linear(192 * 4 * 4, 10),
        "vgg11-in": chain_of_convs(channels, VGG11, [3] * 8, 2) + linear(512, 10),
        "vgg11-bn": chain_of_convs(channels, VGG11, [3] * 8, 2) + linear(512, 10),
        "resnet18-in": resnet18(channels, 512),
        "resnet18-bn": resnet18(channels, 512),
        "resnet18-bn-ap": resnet18(channels, 512 * 4 * 4 if channels == 3 else 512 * 3 * 3),
    }
    for width in (32, 256):
        for norm in ("in", "bn", "gn"):
            convs = chain_of_convs(channels, [width] * 3, [3] * 3, 2)
            expected[f"convnet-d3-w{width}-{norm}"] = convs + linear(width * 16, 10)
    convs = chain_of_convs(channels, [128] * 2, [3] * 2, 0)
    expected["convnet-d2-w128-none"] = convs + linear(128 * 8 * 8, 10)
    expected["convnet-d2-w128-none-relu-none"] = convs + linear(128 * 32 * 32, 10)
    expected["convnet-d2-w128-ln"] = convs + 2 * 128 * (32 * 32 + 16 * 16) + linear(128 * 8 * 8, 10)
    assert {name: parameters(build(name, shape)) for name in expected} == expected


def conv_norm(inputs: int, outputs: int, kernel: int = 1) -> int:
    """Convolution without bias, BatchNorm."""
    return conv(inputs, outputs, kernel, bias=False) + 2 * outputs


def mobilenetv2(channels: int, classes: int) -> int:
    total, inputs = conv_norm(channels, 32, 3), 32
    rows = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, outputs, blocks, stride in rows:
        for i in range(blocks):
            width = expansion * inputs
            total += conv_norm(inputs, width) + conv_norm(1, width, 3) + conv_norm(width, outputs)
            if (i or stride == 1) and inputs != outputs:
                total += conv_norm(inputs, outputs)
            inputs = outputs
    return total + conv_norm(320, 1280) + linear(1280, classes)


def shufflenet(channels: int, classes: int) -> int:
    total, inputs = conv_norm(channels, 24), 24
    for outputs, blocks in ((200, 4), (400, 8), (800, 4)):
        for i in range(blocks):
            added = outputs if i else outputs - inputs  # the pooled input is concatenated
            width = added // 4
            total += conv_norm(inputs // (1 if inputs == 24 else 2), width) + conv_norm(1, width, 3)
            total += conv_norm(width // 2, added)
            inputs = outputs
    return total + linear(800, classes)


# Parameters that torchvision states for 1,000 classes; the replaced layers before the first stage, without the inputs
# of the new ones; inputs of the classifier.
ADAPTED = {
    "resnet50-bn": (25_557_032, conv(3, 64, 7, bias=False), 64 * 9, 2048),
    "resnet101-bn": (44_549_160, conv(3, 64, 7, bias=False), 64 * 9, 2048),
    "densenet121-bn": (7_978_856, conv(3, 64, 7, bias=False) + 2 * 64, 64 * 9, 1024),
    "shufflenetv2-bn": (2_278_604, conv(3, 24, 3, bias=False), 24 * 9, 1024),
    "shufflenetv2-x0.5-bn": (1_366_792, conv(3, 24, 3, bias=False), 24 * 9, 1024),
}


@pytest.mark.parametrize(("channels", "side", "classes"), [(3, 64, 200), (1, 32, 10)])
def test_counts_of_the_networks_for_small_images(channels, side, classes):
    shape = (channels, side, side)
    expected = {
        name: total - replaced + channels * stem + linear(inputs, classes) - linear(inputs, 1000)
        for name, (total, replaced, stem, inputs) in ADAPTED.items()
    }
    # The layer of 1,280 filters after the last stage is left out too.
    efficientnet = 5_288_548 - conv(3, 32, 3, bias=False) + channels * 32 * 9 - conv_norm(320, 1280)
    expected["efficientnet-b0-bn"] = efficientnet + linear(320, classes) - linear(1280, 1000)
    expected["mobilenetv2-bn"] = mobilenetv2(channels, classes)
    expected["shufflenet-bn"] = shufflenet(channels, classes)
    assert {name: parameters(networks.build_outline(name, shape, classes)) for name in expected} == expected


@pytest.mark.parametrize(
    "name",
    ["resnet50-bn", "densenet121-bn", "efficientnet-b0-bn", "mobilenetv2-bn", "shufflenet-bn", "shufflenetv2-bn"],
)
def test_networks_for_small_images_keep_their_maps_large(name):
    """At 32 pixels the maps of the last stage are 4x4 (EfficientNet: 2x2), at 64 twice as large."""
    last = 2 if name == "efficientnet-b0-bn" else 4
    for side in (32, 64):
        net, sizes = build(name, (3, side, side)), []
        with torch.no_grad(), contextlib.ExitStack() as hooks:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    hook = module.register_forward_hook(
                        lambda _, inputs, output, sizes=sizes: sizes.append(output.shape[2])
                    )
                    hooks.callback(hook.remove)
            maps = net.features(images((3, side, side)))
        assert min(sizes) == maps[-1].shape[2] == last * side // 32
        assert max(sizes) == side  # the stem has stride 1


@pytest.mark.parametrize("name", ["resnet50", "shufflenet_v2_x1_0"])
def test_networks_for_small_images_equal_torchvision_with_the_small_stem(name):
    from torchvision import models

    expected = models.get_model(name, num_classes=10)
    expected.maxpool = nn.Identity()
    if name == "resnet50":
        expected.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    else:
        expected.conv1[0].stride = (1, 1)
    net = build({"resnet50": "resnet50-bn", "shufflenet_v2_x1_0": "shufflenetv2-bn"}[name])
    for mine, theirs in zip(net.state_dict().values(), expected.state_dict().values(), strict=True):
        theirs.copy_(mine)
    x = images((3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected(x))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_convnet_is_the_sequence_of_published_layers(shape):
    with rng.seeded(0, "network"):
        layers: list[nn.Module] = []
        for i in range(3):
            padding = 3 if shape[0] == 1 and i == 0 else 1
            layers.append(nn.Conv2d(128 if i else shape[0], 128, 3, stride=1, padding=padding))
            layers += [nn.GroupNorm(128, 128, eps=1e-5), nn.ReLU(), nn.AvgPool2d(2, 2)]
        expected = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))
    x = images(shape)
    net = build("convnet-d3-w128-in", shape)
    assert torch.equal(net(x), expected(x))
    assert torch.equal(net.embed(x), expected[:-1](x))
    # features: after the activation, before the pooling
    for i, found in enumerate(net.features(x)):
        assert torch.equal(found, expected[: 4 * i + 3](x))


def test_grey_28_maps_become_32():
    x = images((1, 28, 28))
    for name in ("convnet-d3-w128-in", "alexnet", "vgg11-in"):
        assert build(name, (1, 28, 28)).features(x)[0].shape[2:] == (32, 32)
    # the rule is for MNIST-sized grey images alone
    assert build("convnet-d1-w8-in", (3, 28, 28)).features(images((3, 28, 28)))[0].shape[2:] == (28, 28)
    assert build("convnet-d1-w8-in", (1, 32, 32)).features(images((1, 32, 32)))[0].shape[2:] == (32, 32)


def test_resnet18_equals_torchvision_with_the_small_stem():
    from torchvision.models import resnet18 as reference

    expected = reference(num_classes=10)
    expected.conv1, expected.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    net = build("resnet18-bn")
    for mine, theirs in zip(net.state_dict().values(), expected.state_dict().values(), strict=True):
        theirs.copy_(mine)
    x = images((3, 32, 32))
    torch.testing.assert_close(net(x), expected(x))
    torch.testing.assert_close(net.features(x)[1], expected.layer2(net.features(x)[0]))


def test_resnet18_ap_halves_by_average_pooling_and_keeps_its_map():
    net, x = build("resnet18-bn-ap"), images((3, 32, 32))
    assert net.classify.in_features == 512 * 4 * 4
    assert all(m.stride == (1, 1) for m in net.modules() if isinstance(m, nn.Conv2d))
    maps = net.features(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert torch.equal(net.embed(x), maps[-1].flatten(1))
    block = net.stages[1][0]
    first = nn.functional.avg_pool2d(block.norm1(block.conv1(maps[0])).relu(), 2)
    narrow, _, norm = block.shortcut
    short = norm(nn.functional.avg_pool2d(narrow(maps[0]), 2))
    torch.testing.assert_close(block(maps[0]), (block.norm2(block.conv2(first)) + short).relu())


def test_norms_and_options():
    def only(name, kind):
        return [m for m in build(name).modules() if isinstance(m, kind)]

    assert [m.num_groups for m in only("convnet-d2-w32-gn", nn.GroupNorm)] == [4, 4]
    assert [m.num_groups for m in only("vgg11-in", nn.GroupNorm)] == VGG11
    assert [m.normalized_shape for m in only("convnet-d2-w32-ln", nn.LayerNorm)] == [(32, 32, 32), (32, 16, 16)]
    x = images((3, 32, 32))
    swish = build("convnet-d1-w8-bn-swish-max")
    before = swish.norms[0](swish.convs[0](x))
    torch.testing.assert_close(swish.features(x)[0], before * before.sigmoid())
    torch.testing.assert_close(swish.embed(x), nn.functional.max_pool2d(swish.features(x)[0], 2).flatten(1))
    leaky = build("convnet-d1-w8-none-leakyrelu-none")
    before = leaky.convs[0](x)
    torch.testing.assert_close(leaky.embed(x), torch.where(before > 0, before, 0.01 * before).flatten(1))
    assert torch.equal(build("convnet-d3-w128-in-relu-avg")(x), build("convnet-d3-w128-in")(x))


def test_batch_statistics():
    found = {
        name
        for name in networks.network_names()
        if ":" not in name and networks.uses_batch_statistics(networks.build_outline(name, (3, 32, 32), 10))
    }
    assert found == {name for name in networks.network_names() if "-bn" in name}


# -- every network at every size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*networks.network_names()} - {"resnet101-bn"}))  # its blocks: resnet50-bn's
def test_every_network_at_every_size(name):
    networks.check_network(name)
    for shape in SHAPES:
        net, x = build(name, shape, 7), images(shape, 3)
        assert net.training and isinstance(net, networks.Network)
        maps: list[Tensor] = []
        with rng.seeded("dropout"):
            embedding = net.embed(x, maps)
        with rng.seeded("dropout"):
            logits = net(x)
        assert logits.shape == (3, 7) and logits.isfinite().all()
        assert embedding.dim() == 2 and len(embedding) == 3
        assert torch.equal(net.classify(embedding), logits)
        assert all(m.dim() == 4 and len(m) == 3 for m in maps) and (maps or name == "mlp")
        # no layer may die of a 1x1 map: different images give different logits
        assert logits.std(0).max() > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "convnet-d2-w16-in",
        "lenet",
        "alexnet",
        "vgg11-in",
        "resnet18-in",
        "resnet18-bn-ap",
        "densenet121-bn",
        "efficientnet-b0-bn",
        "mobilenetv2-bn",
        "shufflenet-bn",
        "shufflenetv2-bn",
    ],
)
def test_odd_and_non_square_sizes(name):
    for shape in ((2, 9, 21), (3, 31, 16), (1, 13, 13), (3, 27, 28)):
        net, x = build(name, shape), images(shape)
        assert net(x).shape == (2, 10)
        assert min(min(m.shape[2:]) for m in net.features(x)) >= 2


def test_stage_maps():
    x = images((3, 32, 32))

    def sizes(name):
        return [tuple(m.shape[1:]) for m in build(name).features(x)]

    assert sizes("mlp") == []
    assert sizes("lenet") == [(6, 28, 28), (16, 10, 10)]
    assert sizes("alexnet") == [(128, 32, 32), (192, 16, 16), (192, 8, 8)]
    assert sizes("vgg11-bn") == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert sizes("resnet18-bn") == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


@pytest.mark.parametrize("name", ["convnet-d3-w16-in", "mlp", "lenet", "resnet18-bn-ap", "torchvision:resnet18"])
def test_gradient_of_the_embedding_reaches_the_pixels(name):
    x = images((3, 32, 32)).requires_grad_()
    net = build(name)
    maps: list[Tensor] = []
    (gradient,) = torch.autograd.grad(net.embed(x, maps).square().sum() + sum(m.sum() for m in maps), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("options", ["in", "none", "bn-sigmoid", "ln-leakyrelu-max", "gn-swish", "in-relu-none"])
def test_double_backward(options):
    """The gradient with respect to the pixels of a gradient with respect to the weights, against finite differences."""
    net = build(f"convnet-d2-w4-{options}", (1, 8, 8), 3).double()
    x = images((1, 8, 8)).double().requires_grad_()
    weights = list(net.parameters())

    def gradient_norm(x: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(net(x), torch.tensor([0, 1]))
        return sum((g.square().sum() for g in torch.autograd.grad(loss, weights, create_graph=True)), torch.tensor(0.0))

    (exact,) = torch.autograd.grad(gradient_norm(x), x)
    direction = images((1, 8, 8)).double().flip(0)
    step = 1e-6 * direction
    difference = (gradient_norm(x + step) - gradient_norm(x - step)) / 2e-6
    torch.testing.assert_close((exact * direction).sum(), difference.detach(), rtol=1e-4, atol=1e-8)


# -- reset ------------------------------------------------------------------------------------------------------------


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", networks.network_names())
def test_reset_equals_a_new_network(name):
    shape = (1, 8, 8)
    net, other = build(name, shape, seed=1), build(name, shape, seed=2)
    assert not same(net, other)
    net(images(shape)).sum().backward()  # moves running statistics, leaves gradients
    with rng.seeded(2, "network"):
        networks.reset_parameters(net)
    assert same(net, other)
    assert all(p.grad is None for p in net.parameters())


def test_reset_draws_the_same_in_any_memory_format_and_dtype_and_keeps_the_mode():
    net = build("convnet-d3-w16-bn", seed=1).to(memory_format=torch.channels_last).eval()
    with rng.seeded(2, "network"):
        networks.reset_parameters(net)
    assert same(net, build("convnet-d3-w16-bn", seed=2)) and not net.training
    assert net.convs[1].weight.is_contiguous(memory_format=torch.channels_last)
    net = build("lenet", seed=1).bfloat16()
    with rng.seeded(2, "network"):
        networks.reset_parameters(net)
    assert same(net, build("lenet", seed=2).bfloat16())


def test_building_draws_weights_and_nothing_else():
    from torchvision.models import resnet18 as reference

    with rng.seeded(3):
        wrapped = networks.build_network("torchvision:resnet18", (3, 32, 32), 10)
        after = torch.get_rng_state()
    with rng.seeded(3):
        plain = reference(num_classes=10)
        assert torch.equal(after, torch.get_rng_state())
    assert same(wrapped.model, plain)


# -- Python factories and foreign models ------------------------------------------------------------------------------


class Dropped(nn.Module):
    """A user's network with random numbers, running statistics and a frozen part."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.frozen = nn.Dropout().eval()
        self.last = nn.Linear(4, classes)
        nn.init.normal_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.body(x).mean((2, 3))))


def test_factories_with_two_arguments_or_none():
    seen = []

    def two(shape, classes, width=3):
        seen.append((shape, classes))
        return Dropped(classes)

    for factory in (two, lambda: Dropped(10)):
        networks.check_network(factory)
        net, x = build(factory), images((3, 32, 32))
        assert isinstance(net, networks.Wrapped) and net(x).shape == (2, 10) and net.embed(x).shape == (2, 4)
        assert [tuple(m.shape) for m in net.features(x)] == [(2, 4, 30, 30)]
        assert net.model.body.training and not net.model.frozen.training
        with rng.seeded(5, "network"):
            networks.reset_parameters(net)
        assert same(net, build(factory, seed=5))
    assert seen[0] == ((3, 32, 32), 10)
    fresh = build(two)
    assert fresh.model.body[1].num_batches_tracked == 0 and (fresh.model.body[1].running_mean == 0).all()


def test_a_factory_may_give_a_network_of_ours():
    def deep(shape, classes):
        return networks.ConvNet(shape, classes, depth=2, width=7, norm="none")

    net = build(deep)
    assert isinstance(net, networks.ConvNet)
    with rng.seeded(1, "network"):
        networks.reset_parameters(net)
    assert same(net, build(deep, seed=1))


@pytest.mark.parametrize(
    "factory",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.ReLU()),
    ],
)
def test_networks_without_a_last_linear_layer_have_no_embedding(factory):
    net = networks.build_network(factory, (3, 32, 32), 10)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.classify(net.embed(x)), net(x)) and net(x).shape == (2, 10)
    with pytest.raises(
        CondenseError, match="does not end in a linear layer over flat features, whose inputs dm matches"
    ):
        networks.require_embedding(net, factory, "dm")


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (lambda one: nn.Linear(1, 1), "needs the arguments one"),
        (nn.ReLU(), "is a module"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 10)), "3x32x32: "),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 9)), r"\(2, 9\).*not \(2, 10\)"),
    ],
)
def test_unfit_factories_are_refused(factory, says):
    with pytest.raises(CondenseError, match=says):
        build(factory)


def test_grey_images_are_repeated_for_library_models():
    net, x = build("torchvision:resnet18", (1, 32, 32)).eval(), images((1, 32, 32))
    assert torch.equal(net(x), net.model(x.expand(-1, 3, -1, -1)))
    with pytest.raises(CondenseError, match="1 or 3 channels, not 2"):
        build("torchvision:resnet18", (2, 32, 32))


def test_library_models_that_do_not_fit_give_one_line():
    with pytest.raises(CondenseError, match=r"'torchvision:alexnet'.*3x32x32") as caught:
        build("torchvision:alexnet")
    assert "\n" not in str(caught.value)
    with pytest.raises(CondenseError, match="did you mean 'torchvision:resnet18'"):
        build("torchvision:resnet81x")
    with pytest.raises(CondenseError, match="did you mean 'timm:resnet18'"):
        build("timm:resnt18")


def test_missing_timm_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CondenseError, match=r"pip install 'condense-toolkit\[timm\]'"):
        networks.build_network("timm:resnet18", (3, 32, 32), 10)


# -- names and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("convnet-d7-w128-in", "convnet-d3-w128-in"),
        ("convnet-d3-w64-batch", "convnet-d3-w64-in"),
        ("convnet-d3-w064-in", "convnet-d3-w128-in"),
        ("convnet-d3-w128-in-avg-swish", "convnet-d3-w128-in-swish-avg"),
        ("convnet-d3-w128-in-", "convnet-d3-w128-in"),
        ("convnet-d3-w128-in\n", "convnet-d3-w128-in"),
        ("Convnet-d3-w128-in", "convnet-d3-w128-in"),
        ("ConvNet", "convnet-d3-w128-in"),
        ("ConvNetD4", "convnet-d4-w128-in"),
        ("ConvNetASwishBN", "convnet-d3-w128-bn-swish"),
        ("ResNet18", "resnet18-in"),
        ("resnet18_bn", "resnet18-bn"),
        ("vgg11", "vgg11-in"),
        ("torchvison:resnet18", "torchvision:resnet18"),
        ("timm:", "timm:resnet18"),
    ],
)
def test_misspelt_names_say_what_was_meant(word, meant):
    for refuse in (networks.check_network, build):
        with pytest.raises(CondenseError) as caught:
            refuse(word)
        assert f"'{word}'; did you mean '{meant}'?" in str(caught.value)
    networks.check_network(meant)


def test_group_norm_needs_a_width_of_four_groups():
    with pytest.raises(CondenseError, match="multiple of 4"):
        networks.check_network("convnet-d3-w30-gn")


@pytest.mark.parametrize(("shape", "fits"), [((1, 8, 8), 3), ((3, 8, 40), 3), ((3, 31, 31), 4), ((1, 28, 28), 5)])
def test_a_convnet_too_deep_names_the_depth_that_fits(shape, fits):
    with pytest.raises(CondenseError, match=f"convnet-d{fits + 1} .*largest depth that fits is {fits}$"):
        build(f"convnet-d{fits + 1}-w8-in", shape)
    assert build(f"convnet-d{fits}-w8-in", shape)(images(shape)).shape == (2, 10)
    assert build(f"convnet-d{fits + 1}-w8-in-relu-none", shape)(images(shape)).shape == (2, 10)


def test_images_below_eight_pixels_are_refused():
    for name in ("mlp", "convnet-d1-w8-in", "torchvision:resnet18"):
        with pytest.raises(CondenseError, match="at least 8x8 pixels, not 7x9"):
            build(name, (3, 7, 9))


def test_import_and_check_load_neither_torchvision_nor_timm():
    code = (
        "import sys; from condense import networks\n"
        "[networks.check_network(name) for name in networks.network_names()]\n"
        "assert not {'torchvision', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
