"""Networks of users: how they are built, networks that draw random numbers, attention, heads, unused parameters."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Killed, change_protocols, killed_after, tiny_arrays
from torch import nn

import condense
from condense import networks
from condense.errors import CondenseError
from condense.labels import HardLabels
from condense.training import FixedSource, Student, TrainConfig, train

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


class Linear(nn.Module):
    """A linear network; subclasses change one thing."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 16), nn.Linear(16, 3)

    def features(self, x):
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x):
        return self.head(self.features(x))


class FunctionalDropout(Linear):
    def forward(self, x):
        return self.head(F.dropout(self.features(x), 0.5, self.training))


class Unused(Linear):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


class LogProbabilities(Linear):
    def forward(self, x):
        return super().forward(x).log_softmax(-1)


class AllConvolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.head(F.relu(self.conv(x))).mean((2, 3))


class Attention(nn.Module):
    """A small transformer whose attention is fused where that is faster."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.embed(x[:, 0])).mean(1))


# -- how they are built -----------------------------------------------------------------------------------------------


class Channels(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(in_channels, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


class ByDefault(Channels):
    def __init__(self, num_classes=10, in_channels=3, width=4):
        super().__init__(in_channels, num_classes)


class ByShape(nn.Module):
    def __init__(self, image_shape, count):
        super().__init__()
        self.head = nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], count)

    def forward(self, x):
        return self.head(x.flatten(1))


class ImageSize(ByShape):
    def __init__(self, image_size, num_classes):
        super().__init__((1, image_size, image_size), num_classes)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.LazyConv2d(4, 3), nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


@pytest.mark.parametrize("factory", [Channels, ByDefault, ByShape, ImageSize, Lazy, Linear, lambda: Linear()])
def test_factories_are_called_by_their_signature(factory):
    with condense.rng.seeded("factory"):
        net = networks.build_network(factory, SHAPE, 3)
    assert net(torch.zeros(2, *SHAPE)).shape == (2, 3) and net.training
    before = [value.clone() for value in net.parameters()]
    with condense.rng.seeded("other"):
        networks.reset_parameters(net)
    assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    with condense.rng.seeded("factory"):
        networks.reset_parameters(net)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_factories_that_cannot_be_called(tiny):
    def needs_more(depth):
        return Linear()

    with pytest.raises(CondenseError, match=r"needs the arguments depth; a factory takes none, \(in_channels"):
        networks.build_network(needs_more, SHAPE, 3)

    def broken():
        raise RuntimeError("two\nlines")

    with pytest.raises(CondenseError, match=r"cannot be built for 1x8x8 images: two$"):
        networks.build_network(broken, SHAPE, 3)


# -- random numbers ---------------------------------------------------------------------------------------------------

RANDOM = {"dm": {}, "dc": {"outer": 2, "inner": 1}, "mtt": {"num_experts": 1, "max_start_epoch": 1, "syn_steps": 2}}


def attention_dropout():
    return Attention(dropout=0.3)


@pytest.mark.parametrize("factory", [FunctionalDropout, attention_dropout])
@pytest.mark.parametrize("name", list(RANDOM))
def test_a_seed_holds_and_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, name, factory):
    task = condense.task(tiny_arrays(), name="tiny")
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    settings = {**RANDOM[name], "network": factory, "steps": 4, "precision": "fp32", "track": "none"}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = condense.distill(name, task, 2, **settings)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is untouched
    torch.manual_seed(2)
    assert condense.distill(name, task, 2, **settings).sha256() == whole.sha256()
    assert condense.distill(name, task, 2, **settings, seed=1).sha256() != whole.sha256()
    with pytest.raises(Killed), killed_after(2):
        condense.distill(name, task, 2, **settings, run_dir=tmp_path / "run")
    assert condense.distill(name, task, 2, **settings, run_dir=tmp_path / "run").sha256() == whole.sha256()


def test_gradients_of_mtt_are_those_of_the_training_that_was_run():
    """With equal draws in both passes, going back step by step equals one graph through all steps."""
    task = condense.task(tiny_arrays(), name="tiny")
    settings = {**RANDOM["mtt"], "network": FunctionalDropout, "steps": 2, "precision": "fp32", "syn_steps": 3}
    adjoint, graph = (condense.distill("mtt", task, 1, **settings, grad_mode=mode) for mode in ("adjoint", "graph"))
    torch.testing.assert_close(adjoint.stored, graph.stored, rtol=1e-4, atol=1e-5)


def test_students_that_draw_random_numbers_are_not_stacked():
    source = FixedSource(torch.randn(6, *SHAPE), HardLabels(torch.arange(3).repeat_interleave(2), 3))
    recipe = TrainConfig(steps=3, batch=6, lr=0.1, momentum=0.9, weight_decay=0.0)

    def trained(together):
        with condense.rng.seeded("students"):
            nets = [networks.build_network(FunctionalDropout, SHAPE, 3) for _ in range(2)]
        train([Student(net, source, k) for k, net in enumerate(nets)], recipe, device=CPU, together=together)
        return [value.detach() for net in nets for value in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False)))


# -- second derivatives, unused parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dc", "dsa", "dcc", "mtt", "tesla", "ast", "datm"])
def test_attention_has_second_derivatives(tiny, name):
    settings = dict(RANDOM["dc" if name in ("dc", "dsa", "dcc") else "mtt"])
    settings |= {"lr_start": 0.01} if name not in ("dc", "dsa", "dcc") else {}
    made = condense.distill(name, tiny, 1, network=Attention, steps=2, precision="fp32", **settings)
    assert made.images.isfinite().all()
    assert torch.backends.cuda.flash_sdp_enabled()  # only while a method runs


@pytest.mark.parametrize("name", ["dm", "dc", "mtt", "ast"])
def test_parameters_may_be_unused(tiny, name):
    settings = RANDOM.get(name, RANDOM["mtt"])
    assert len(condense.distill(name, tiny, 1, network=Unused, steps=2, precision="fp32", **settings)) == 3


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [AllConvolutional, LogProbabilities])
def test_any_head_is_trained_and_evaluated(tiny, factory):
    made = condense.distill("random", tiny, 2, network=factory)
    record = condense.evaluate(made, tiny, networks=[factory], runs=1, controls=[], protocol="quick-v1")
    assert 0 < record["results"][0]["mean"] <= 1
    assert len(condense.distill("dc", tiny, 1, network=factory, steps=2, precision="fp32", **RANDOM["dc"])) == 3
    for name in ("dm", "datadam", "idm", "dance"):
        with pytest.raises(CondenseError, match=f"does not end in a linear layer .* whose inputs {name} matches"):
            condense.distill(name, tiny, 1, network=factory, steps=1)


def test_an_existing_network_continues_from_its_weights(tiny):
    made = condense.distill("random", tiny, 2, network="mlp")
    net = Linear()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert condense.fit(made, net, protocol="quick-v1") is net and not net.training
    assert not torch.equal(before["head.weight"], net.head.weight)
    started, fresh = Linear(), Linear()
    started.load_state_dict(before)
    fresh.load_state_dict(before)
    condense.fit(made, started, protocol="quick-v1")
    assert torch.equal(started.head.weight, net.head.weight) and torch.equal(fresh.head.weight, before["head.weight"])


def test_rded_needs_no_batch_norm(tiny):
    settings = {"teacher_epochs": 1, "label_epochs": 1, "pool": 6, "crops": 2, "precision": "fp32"}
    assert len(condense.distill("rded", tiny, 1, network=Linear, **settings)) == 3
    with pytest.raises(CondenseError, match="has no BatchNorm, whose statistics this method matches"):
        condense.distill("sre2l", tiny, 1, network=Linear, teacher_epochs=1, steps=1)


# -- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sre2l", "idc", "dance"])
def test_pixels_that_saturate_have_diverged(tiny, name):
    from condense.config import tiny_settings

    network = "convnet-d2-w8-bn" if name == "sre2l" else "convnet-d2-w8-in"
    with pytest.raises(CondenseError, match=r"not finite at step|at the ends of their range"):
        condense.distill(name, tiny, 2, network=network, **{**tiny_settings(name), "lr_img": 1e38})


# -- networks that cannot be used -------------------------------------------------------------------------------------


class Frozen(Linear):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class OnlyBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(64, 3))

    def forward(self, x):
        return x.flatten(1) @ self.weight


class ScalarParameter(Linear):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return super().forward(x) * self.scale


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(64, 3, dtype=torch.cfloat))

    def forward(self, x):
        return (x.flatten(1).to(torch.cfloat) @ self.weight).abs()


class DoublePrecision(Linear):
    def __init__(self):
        super().__init__()
        self.double()

    def forward(self, x):
        return super().forward(x.double()).float()


class WithoutGradient(Linear):
    def features(self, x):
        return super().features(x).detach()


EXPERTS = {"steps": 1, "num_experts": 1, "buffer_epochs": 2, "max_start_epoch": 1, "expert_epochs": 1, "syn_steps": 1}


@pytest.mark.parametrize(
    ("method", "network", "words"),
    [
        ("dm", 5, "network 5: give a name or a function that makes a module"),
        ("dc", OnlyBuffers, "network 'OnlyBuffers' has no parameters to train"),
        ("mtt", Frozen, "the network has no trainable parameters"),
        ("mtt", Complex, "the network's parameter 'model.weight' is torch.complex64; trajectories need torch.float32"),
        ("mtt", DoublePrecision, "is torch.float64; trajectories need torch.float32"),
        ("dc", Complex, "the network's output is complex"),
        ("dm", WithoutGradient, "the network's output has no gradient"),
    ],
)
def test_a_network_that_a_method_cannot_use_is_one_line(tiny, method, network, words):
    settings = EXPERTS if method == "mtt" else {"steps": 1}
    with pytest.raises(CondenseError, match=words):
        condense.distill(method, tiny, 1, network=network, **settings)


def test_networks_without_trainable_parameters_are_not_judged(tiny):
    made = condense.distill("random", tiny, 1, network="mlp")
    with pytest.raises(CondenseError, match="the network has no trainable parameters"):
        condense.fit(made, Frozen, protocol="quick-v1")
    with pytest.raises(CondenseError, match="network 5: give a name or a function"):
        condense.evaluate(made, tiny, networks=5, runs=1)


def test_a_factory_must_make_a_new_module_in_every_call(tiny):
    module = Linear()
    with pytest.raises(CondenseError, match=r"returns the same parameter 'hidden\.weight' twice; make a new module"):
        condense.distill("dm", tiny, 1, network=lambda: module, steps=1)
    backbone = nn.Linear(64, 16)
    with pytest.raises(CondenseError, match=r"returns the same parameter '1\.weight' twice"):
        condense.distill(
            "dm", tiny, 1, network=lambda: nn.Sequential(nn.Flatten(), backbone, nn.Linear(16, 3)), steps=1
        )
    frozen = nn.Linear(64, 16).requires_grad_(False)
    condense.distill("dm", tiny, 1, network=lambda: nn.Sequential(nn.Flatten(), frozen, nn.Linear(16, 3)), steps=1)


def test_a_parameter_that_is_a_single_number(tiny):
    made = condense.distill("mtt", tiny, 1, network=ScalarParameter, **EXPERTS)
    assert made.stored.isfinite().all()


def test_a_network_in_double_precision_is_judged(tiny, three_steps):
    made = condense.distill("random", tiny, 1, network="mlp")
    record = condense.evaluate(made, tiny, networks=DoublePrecision, runs=1, protocol="quick-v1", controls=[])
    assert len(record["results"][0]["accuracies"]) == 1


def test_a_network_without_finite_outputs_is_named(tiny, tmp_path, monkeypatch, caplog):
    class Undefined(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(64, 3)

        def forward(self, x):
            return self.last(x.flatten(1)) + (0.0 if self.training else float("nan"))

    change_protocols(monkeypatch, tmp_path / "protocols", steps=2)
    made = condense.distill("random", tiny, 1, quiet=True)
    condense.evaluate(made, tiny, networks=[Undefined], runs=1, controls=[], protocol="quick-v1", quiet=True)
    assert "outputs that are not finite: its accuracy is chance" in caplog.text
