"""Differentiable inner loops against each other, `higher`, finite differences and TESLA's closed form."""

import json
import math
from types import SimpleNamespace

import higher
import pytest
import torch
import torch.nn.functional as F

from condense import augment, networks, rng
from condense.engine import GRAD_MODES, Target, unroll
from condense.errors import CondenseError

STEPS, ROWS, CLASSES = 5, 9, 3


def normal(*shape, key="x"):
    return torch.randn(*shape, generator=rng.generator("unroll", key, *shape), dtype=torch.float64)


def problem(*, soft=False, dtype=torch.float64):
    """A ConvNet on a flat vector, nine images in batches of four, DSA drawn per step and the same in every replay."""
    with rng.seeded("unroll", "net"):
        net = networks.build_network("convnet-d2-w4-in", (1, 8, 8), CLASSES).to(dtype)
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    start = torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])
    images = normal(ROWS, 1, 8, 8, key="images").to(dtype).requires_grad_()
    leaves = {"images": images}
    labels = torch.arange(ROWS) % CLASSES
    if soft:
        leaves["labels"] = normal(ROWS, CLASSES, key="labels").to(dtype).requires_grad_()
    views = augment.make_augmentation("color_crop_cutout_flip_scale_rotate")

    def step_loss(theta, i):
        ids = rng.Draws("unroll", "batch", i).sample(ROWS, 4)
        drawn = views.draw(rng.Draws("unroll", "augment", i), len(ids), (8, 8), groups=1)
        parts = theta.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
        logits = torch.func.functional_call(net, weights, (views.apply(images[ids], drawn),))
        return F.cross_entropy(logits, leaves["labels"][ids].softmax(1) if soft else labels[ids])

    goals = [start + 0.1 * normal(len(start), key=key).to(dtype) for key in ("middle", "end")]
    targets = [Target(STEPS, goals[1]), Target(2, goals[0], 0.3)]
    return SimpleNamespace(step_loss=step_loss, start=start, leaves=leaves, targets=targets, rate=0.1)


def solve(given, steps=STEPS, targets=None, rate=None, **options):
    rate = given.rate if rate is None else rate
    return unroll(given.step_loss, given.start, given.leaves, rate, steps, targets or given.targets, **options)


def agree(found, wanted, tolerance):
    """Every gradient differs by at most ``tolerance`` of its length, and none is 0."""
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].shape == wanted[name].shape and float(wanted[name].norm()) > 1e-6
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < tolerance, name


def slopes_by_differences(loss, leaf, places, step=1e-6):
    """Central differences of ``loss()`` in entries of ``leaf``."""
    found = []
    for place in places:
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf[place] += sign * step
            sides.append(float(loss()))
            with torch.no_grad():
                leaf[place] -= sign * step
        found.append((sides[0] - sides[1]) / (2 * step))
    return found


def touched(given):
    """Three pixels that take part: the largest slopes of three images."""
    slopes = solve(given, grad_mode="graph").gradients["images"]
    return [(row, 0, *divmod(int(slopes[row].abs().argmax()), 8)) for row in (0, 4, 8)]


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("middle", [False, True])
def test_adjoint_equals_graph(soft, momentum, middle):
    given = problem(soft=soft)
    targets = given.targets if middle else given.targets[:1]
    adjoint, graph = (solve(given, targets=targets, momentum=momentum, grad_mode=mode) for mode in ("adjoint", "graph"))
    assert float(adjoint.loss) == pytest.approx(float(graph.loss), rel=1e-12)
    torch.testing.assert_close(adjoint.end, graph.end, rtol=1e-12, atol=1e-12)
    agree(adjoint.gradients, graph.gradients, 1e-9)
    assert set(adjoint.gradients) == {*given.leaves, "step_size"} and adjoint.gradients["step_size"].dim() == 0
    assert not any(part.requires_grad for part in (adjoint.loss, adjoint.end, graph.loss, graph.end))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_both_equal_higher(momentum):
    """A loop written with `higher` alone; nothing of ours but the loss of a step."""
    given = problem(soft=True)
    first = given.start.clone().requires_grad_()
    rate = torch.tensor(given.rate, dtype=torch.float64, requires_grad=True)
    plain = torch.optim.SGD([first], lr=1.0, momentum=momentum)
    optimizer = higher.get_diff_optim(plain, [first], override={"lr": [rate]})
    theta, thetas = first, {}
    for i in range(STEPS):
        (theta,) = optimizer.step(given.step_loss(theta, i), params=[theta])
        thetas[i + 1] = theta
    loss = 0
    for target in given.targets:
        gap = (thetas[target.step] - target.goal).norm() / (given.start - target.goal).norm()
        loss = loss + target.weight * gap**2
    wanted = dict(zip([*given.leaves, "step_size"], torch.autograd.grad(loss, [*given.leaves.values(), rate])))
    for mode in ("adjoint", "graph"):
        found = solve(given, momentum=momentum, grad_mode=mode)
        assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-9)
        agree(found.gradients, wanted, 1e-6)


def test_graph_equals_finite_differences():
    given = problem()
    pixels, places = given.leaves["images"], touched(given)
    rate = torch.tensor(given.rate, dtype=torch.float64)
    found = solve(given, momentum=0.9, rate=rate, grad_mode="graph").gradients

    def loss():
        return solve(given, momentum=0.9, rate=rate, grad_mode="graph").loss

    wanted = slopes_by_differences(loss, pixels, places)
    assert [float(found["images"][place]) for place in places] == pytest.approx(wanted, rel=1e-5)
    assert float(found["step_size"]) == pytest.approx(*slopes_by_differences(loss, rate, [()]), rel=1e-5)


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_leaves_that_sit_steps_out(mode):
    """One leaf in even steps, one in odd steps, one in none."""
    given = problem()
    names = ("even", "odd", "never")
    leaves = {name: normal(len(given.start), key=name).requires_grad_() for name in names}

    def step_loss(theta, i):
        return given.step_loss(theta, i) + (theta * theta * leaves[names[i % 2]]).sum() / 100

    found = unroll(step_loss, given.start, leaves, 0.1, 3, [Target(3, given.targets[0].goal)], grad_mode=mode).gradients
    assert not found["never"].any()
    pair = {name: leaves[name] for name in ("even", "odd")}
    alone = unroll(step_loss, given.start, pair, 0.1, 3, [Target(3, given.targets[0].goal)], grad_mode="graph")
    agree({name: found[name] for name in alone.gradients}, alone.gradients, 1 if mode == "tesla" else 1e-9)


def test_leaves_may_be_made_from_others():
    """Pixels behind a decoder: the gradient is for the decoded ones, and the way to them stays whole."""
    given = problem()
    pixels = given.leaves["images"]
    latent = (pixels.detach() / 2).requires_grad_()
    decoded = latent * 2

    def step_loss(theta, i):
        return given.step_loss(theta, i) + decoded.square().sum() * theta.square().sum() / 1000

    leaves, goal = {"decoded": decoded}, given.targets[:1]
    for mode in GRAD_MODES:
        slope = unroll(step_loss, given.start, leaves, 0.1, STEPS, goal, grad_mode=mode).gradients["decoded"]
        (carried,) = torch.autograd.grad(decoded, latent, slope, retain_graph=True)
        torch.testing.assert_close(carried, 2 * slope)
    assert latent.grad is None and pixels.grad is None


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_single_precision(mode):
    """float32 in and out, also where rate and goal are float64 or float16, close to what float64 gives."""
    single, double = problem(soft=True, dtype=torch.float32), problem(soft=True)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    kinds = (torch.float16, torch.float64)
    targets = [target._replace(goal=target.goal.to(kind)) for target, kind in zip(single.targets, kinds)]
    same = [target._replace(goal=target.goal.double()) for target in targets]
    found, wanted = (solve(g, targets=t, rate=rate, grad_mode=mode) for g, t in ((single, targets), (double, same)))
    assert found.loss.dtype == found.end.dtype == torch.float32
    assert {name: slope.dtype for name, slope in found.gradients.items()} == {
        "images": torch.float32,
        "labels": torch.float32,
        "step_size": torch.float64,
    }
    agree({name: slope.double() for name, slope in found.gradients.items()}, wanted.gradients, 1e-3)


def test_nothing_given_is_changed_or_kept():
    given = problem(soft=True)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    tensors = [given.start, rate, *given.leaves.values(), *(target.goal for target in given.targets)]
    before = [tensor.detach().clone() for tensor in tensors]
    for mode in GRAD_MODES:
        found = solve(given, rate=rate, momentum=0.9, factor=0.5, grad_mode=mode)
        assert not any(part.requires_grad for part in (found.loss, found.end, *found.gradients.values()))
    assert all(torch.equal(tensor.detach(), copy) for tensor, copy in zip(tensors, before))
    assert all(tensor.grad is None for tensor in tensors) and not given.start.requires_grad


# -- TESLA ------------------------------------------------------------------------------------------------------------


def test_tesla_equals_its_closed_form():
    """One vector v = -2 a (theta_N - goal) / D for all steps; for the rate -2 G^T (theta_N - goal) / D."""
    given, alpha = problem(soft=True), 0.1
    goal = given.targets[0].goal
    thetas, gradients = [given.start], []
    for i in range(STEPS):
        theta = thetas[-1].detach().requires_grad_()
        gradients.append(torch.autograd.grad(given.step_loss(theta, i), theta)[0])
        thetas.append(thetas[-1] - alpha * gradients[-1])
    scale = ((given.start - goal) ** 2).sum()
    v = -2 * alpha * (thetas[-1] - goal) / scale
    wanted = {name: torch.zeros_like(leaf) for name, leaf in given.leaves.items()}
    for i in range(STEPS):
        theta = thetas[i].detach().requires_grad_()
        (g,) = torch.autograd.grad(given.step_loss(theta, i), theta, create_graph=True)
        for name, slope in zip(wanted, torch.autograd.grad(v @ g, list(given.leaves.values()))):
            wanted[name] += slope
    wanted["step_size"] = -2 * sum(gradients) @ (thetas[-1] - goal) / scale
    agree(solve(given, targets=given.targets[:1], grad_mode="tesla").gradients, wanted, 1e-9)


def test_tesla_is_exact_for_one_step_only():
    given = problem(soft=True)
    for steps, same in ((1, True), (STEPS, False)):
        targets = [Target(steps, given.targets[0].goal)]
        exact, tesla = (solve(given, steps, targets, grad_mode=mode).gradients for mode in ("graph", "tesla"))
        for name in exact:
            gap = float((tesla[name] - exact[name]).norm() / exact[name].norm())
            assert gap < 1e-12 if same else gap > 1e-3, (steps, name)


def test_factor_is_on_the_leaves_of_tesla():
    given = problem(soft=True)
    whole, half = (solve(given, grad_mode="tesla", factor=factor).gradients for factor in (1.0, 0.5))
    agree(half, {**{name: whole[name] / 2 for name in given.leaves}, "step_size": whole["step_size"]}, 1e-12)
    agree(solve(given, factor=0.5).gradients, solve(given).gradients, 1e-12)


# -- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_the_gate(mode):
    given, calls = problem(), []
    step_loss = given.step_loss
    given.step_loss = lambda theta, i: (calls.append(i), step_loss(theta, i))[1]
    free = solve(given, grad_mode=mode)
    loss, back = float(free.loss), [] if mode == "graph" else [*range(STEPS)][::-1]
    assert calls == [*range(STEPS), *back]
    calls.clear()
    shut = solve(given, grad_mode=mode, gate=loss * (1 - 1e-9))
    assert shut.gradients is None and float(shut.loss) == loss and torch.equal(shut.end, free.end)
    assert calls == [*range(STEPS)]  # no way back
    agree(solve(given, grad_mode=mode, gate=loss * (1 + 1e-9)).gradients, free.gradients, 1e-12)
    for bad in (float("nan"), float("inf")):
        broken = solve(given, grad_mode=mode, targets=[given.targets[0]._replace(weight=bad)], gate=float("inf"))
        assert broken.gradients is None and not torch.isfinite(broken.loss)


# -- other optimisers -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Differentiable RMSprop", "ignore:Converting a tensor")
@pytest.mark.parametrize(
    "name, options",
    [
        ("adam", {"eps": 1e-3, "betas": (0.5, 0.9)}),
        ("rmsprop", {"eps": 1e-3, "momentum": 0.5}),
        ("adagrad", {"eps": 1e-3}),
        ("adadelta", {"eps": 1e-3}),
        ("adamax", {"eps": 1e-3}),
        ("asgd", {}),
    ],
)
def test_other_optimizers_equal_torch_and_finite_differences(name, options):
    given = problem()
    given.rate = rate = torch.tensor(0.01, dtype=torch.float64)
    chosen = {"grad_mode": "graph", "optimizer": name, "optimizer_options": options}
    found = solve(given, **chosen)

    theta = given.start.clone().requires_grad_()
    kind = {cls.lower(): getattr(torch.optim, cls) for cls in dir(torch.optim)}[name]
    plain = kind([theta], lr=float(rate), **options)
    for i in range(STEPS):
        (theta.grad,) = torch.autograd.grad(given.step_loss(theta, i), theta)
        if name == "adam":  # that of `higher` adds eps before the bias correction, as torch once did
            plain.param_groups[0]["eps"] = 1e-3 / math.sqrt(1 - 0.9 ** (i + 1))
        plain.step()
    torch.testing.assert_close(found.end, theta.detach(), rtol=1e-6, atol=1e-7)
    assert float((found.end - given.start).norm()) > 1e-3

    places = touched(given)
    wanted = slopes_by_differences(lambda: solve(given, **chosen).loss, given.leaves["images"], places)
    assert [float(found.gradients["images"][place]) for place in places] == pytest.approx(wanted, rel=1e-4)
    assert min(map(abs, wanted)) > 1e-7
    (wanted_rate,) = slopes_by_differences(lambda: solve(given, **chosen).loss, rate, [()])
    assert float(found.gradients["step_size"]) == pytest.approx(wanted_rate, rel=1e-5)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grad_mode": "adjiont"}, "grad_mode=adjiont: unknown; did you mean 'adjoint'?"),
        ({"optimizer": "adm", "grad_mode": "graph"}, "inner_optimizer=adm: unknown; did you mean 'adam'?"),
        ({"optimizer": "adam"}, "inner_optimizer=adam: only grad_mode=graph goes through it, not grad_mode=adjoint"),
        ({"optimizer": "adam", "grad_mode": "tesla"}, "not grad_mode=tesla; use that, or inner_optimizer=sgd"),
        (
            {"optimizer": "adam", "grad_mode": "graph", "momentum": 0.9},
            "inner_optimizer=adam: inner_momentum=0.9 is of sgd",
        ),
        ({"optimizer": "adam", "grad_mode": "graph", "optimizer_options": {"lr": 1}}, "its option lr cannot be set"),
        ({"optimizer": "adam", "grad_mode": "graph", "optimizer_options": {"maximize": True}}, "option maximize"),
        ({"optimizer": "adam", "grad_mode": "graph", "optimizer_options": {"beta": 1}}, "inner_optimizer=adam: Adam"),
        ({"optimizer": "adam", "grad_mode": "graph", "optimizer_options": {"eps": -1}}, "inner_optimizer=adam: Inv"),
        ({"optimizer_options": {"nesterov": True}}, "optimizer options nesterov: inner_optimizer=sgd takes none"),
    ],
)
def test_refusals_are_one_line(options, message):
    with pytest.raises(CondenseError) as fault:
        solve(problem(), **options)
    assert message in str(fault.value) and "\n" not in str(fault.value)


def test_what_makes_no_sense():
    given = problem()
    goal = given.targets[0].goal
    for targets in ([Target(0, goal)], [Target(STEPS + 1, goal)], []):
        with pytest.raises(ValueError, match=r"targets after steps \[.*\] of 5"):
            unroll(given.step_loss, given.start, given.leaves, 0.1, STEPS, targets)
    given.leaves["step_size"] = given.leaves["images"]
    with pytest.raises(ValueError, match="step_size"):
        solve(given)


# -- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_speed_script(tmp_path, capsys):
    from condense.benchmarks.speed.unroll import main

    out = tmp_path / "unroll.json"
    with pytest.raises(SystemExit) as end:
        main(["--tiny", "--calls", "1", "--device", "cpu", "--out", str(out)])
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    assert end.value.code == 0 and record["schema"] == "condense.speed/1"
    assert "adjoint/graph" in shown and "random uint8 images, 36 of 1x8x8 in 3 classes" in shown
    assert set(record["memory"]["adjoint"]) == {"2", "3"} and set(record["memory"]["graph"]) == {"2"}
    for steps, found in record["memory"]["adjoint"].items():
        assert 0 < found["baseline"] <= found["host"] and len(found["seconds"]) == 1
        assert found["weights"] == int(steps) * 255 * 4
    for gaps in record["tesla"]["steps"].values():
        assert 0.5 < gaps["cosine"] < 1 - 1e-9 and gaps["rate_exact"] != gaps["rate_tesla"]
