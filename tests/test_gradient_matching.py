"""DC, DSA, DCC and DSAC: the distance and its slope against literal loops and finite differences, and the loops."""

import math

import pytest
import torch
import torch.nn.functional as F

import condense
from condense import augment, networks, rng
from condense.data import cache_dir
from condense.engine import Run
from condense.engine.run import GRADIENT_PIXELS
from condense.methods import gradient_matching as gm
from condense.pretraining import load_or_train_snapshots

NETWORK = "convnet-d2-w8-in"


def normal(*shape, key="x"):
    return torch.randn(*shape, generator=rng.generator("gm", key, *shape), dtype=torch.float64)


def net_and_weights(shape=(1, 8, 8), classes=3):
    with rng.seeded("gm", "net"):
        net = networks.build_network(NETWORK, shape, classes).double()
    return net, gm.matched_weights(net)


def literal(real, fake):
    """The released distance, row by row."""
    total = 0.0
    for a, b in zip(real, fake):
        for row in range(len(a)):
            x, y = a[row].reshape(-1), b[row].reshape(-1)
            total += 1 - float(x @ y) / (math.sqrt(float(x @ x)) * math.sqrt(float(y @ y)) + 1e-6)
    return total


def test_vectors_are_not_matched():
    net, weights = net_and_weights()
    assert [tuple(weight.shape) for weight in weights] == [(8, 1, 3, 3), (8, 8, 3, 3), (3, 32)]
    assert len(weights) < len(list(net.parameters()))


def test_the_distance_equals_a_loop_over_rows():
    shapes = [(4, 3, 3, 3), (5, 7), (2, 3, 4)]
    real, fake = ([normal(*shape, key=key) for shape in shapes] for key in ("a", "b"))
    assert float(gm.row_cosine(real, fake)) == pytest.approx(literal(real, fake), rel=1e-12)
    assert float(gm.row_cosine(real, real)) == pytest.approx(0, abs=1e-5)  # the 1e-6 in the denominator
    assert float(gm.row_cosine(real, [-a for a in real])) == pytest.approx(2 * (4 + 5 + 2), abs=1e-5)


def test_a_dead_row_counts_one_and_has_no_slope():
    real, fake = normal(3, 5, key="a"), normal(3, 5, key="b")
    fake[1] = 0
    fake.requires_grad_()
    loss = gm.row_cosine([real], [fake])
    (slope,) = torch.autograd.grad(loss, fake)
    assert float(loss.detach()) == pytest.approx(literal([real], [fake.detach()]))
    assert torch.isfinite(slope).all() and not slope[0].eq(0).all()


@pytest.mark.parametrize("operation", ["none", "color", "scale"])
def test_the_slope_in_the_pixels_equals_finite_differences(operation):
    """Central differences of the whole chain: augmentation, cross-entropy, weight gradients, distance."""
    net, weights = net_and_weights()
    images, labels = normal(2, 1, 8, 8, key="fake"), torch.tensor([1, 1])
    real = gm.synthetic_gradients(net, normal(4, 1, 8, 8, key="real"), torch.tensor([1] * 4), weights)
    real = [gradient.detach() for gradient in real]
    views = augment.make_augmentation(operation)
    drawn = views.draw(rng.Draws("gm"), 3, (8, 8))

    def loss(pixels):
        return gm.row_cosine(real, gm.synthetic_gradients(net, views.apply(pixels, drawn, labels), labels, weights))

    pixels = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(pixels), pixels)
    for place in ((0, 0, 2, 3), (1, 0, 5, 5), (1, 0, 0, 7)):
        step = torch.zeros_like(images)
        step[place] = 1e-5
        ahead, behind = (float(loss(images + sign * step).detach()) for sign in (1, -1))
        expected = (ahead - behind) / 2e-5
        assert float(slope[place]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_gradients_of_classes_in_one_pass_equal_those_one_by_one():
    net, weights = net_and_weights()
    images, labels = normal(6, 1, 8, 8, key="three").requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 2])
    target = [normal(3 * len(weight), *weight.shape[1:], key=f"target{i}") for i, weight in enumerate(weights)]
    whole = gm.synthetic_gradients(net, images, labels, weights, 3)
    single = [gm.synthetic_gradients(net, images[c : c + 2], labels[c : c + 2], weights) for c in (0, 2, 4)]
    for together, apart in zip(whole, zip(*single), strict=True):
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(gm.row_cosine(target, whole), images)
    parts = [[t.unflatten(0, (3, -1))[c] for t in target] for c in range(3)]
    loss = sum(gm.row_cosine(part, gradients) for part, gradients in zip(parts, single))
    torch.testing.assert_close(slope, torch.autograd.grad(loss, images)[0], rtol=1e-8, atol=1e-12)


def test_real_gradients_in_chunks_equal_one_pass(tiny, monkeypatch):
    run = Run(tiny, 1, NETWORK)
    net = run.random_network(0).requires_grad_(True)
    weights = gm.matched_weights(net)
    images, labels = tiny.per_class(12, (0, "real"))
    whole = torch.autograd.grad(F.cross_entropy(net(images), labels), weights)
    monkeypatch.setenv("CONDENSE_CHUNK_SCALE", str(5 * 64 / GRADIENT_PIXELS))
    parts = gm.real_gradients(net, images, labels, weights, run)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_equal_images_have_equal_gradients_under_every_view():
    """Siamese: the same operation with the same parameters on both branches, or the distance would not vanish."""
    net, weights = net_and_weights()
    images, labels = normal(6, 1, 8, 8, key="both"), torch.tensor([0, 0, 1, 1, 2, 2])
    views = augment.make_augmentation("color_crop_cutout_flip_scale_rotate")
    for number in range(10):
        drawn = views.draw(rng.Draws("views", number), 3, (8, 8))
        a, b = (gm.synthetic_gradients(net, views.apply(images, drawn, labels), labels, weights) for _ in range(2))
        assert float(gm.row_cosine([g.detach() for g in a], b).detach()) < 1e-2


def test_the_published_loop_sizes_and_the_rule_between_them():
    table = {1: (1, 50), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    for ipc, sizes in table.items():
        assert gm.loop_sizes(ipc) == sizes
    assert gm.loop_sizes(5) == (5, 50) and gm.loop_sizes(15) == (15, 38) and gm.loop_sizes(100) == (50, 10)
    assert gm.DCC().loops(1) == (10, 5) and gm.DCC().loops(10) == (10, 50)
    assert gm.DSA(outer=3, inner=0).loops(50) == (3, 0)


def first_loss(name, task, **settings):
    """The loss of the first step and the gradient that it left on the pixels."""
    from condense.registry import METHODS

    seen = []

    class Watched(Run):
        def optimise(self, synthetic, steps, **options):
            for step in super().optimise(synthetic, steps, **options):
                update = step.update

                def look(update=update, step=step):
                    seen.append((float(step.optimizer.loss), synthetic.images.grad.clone()))
                    update()

                step.update = look
                yield step

    entry = METHODS.get(name)
    entry.function(task, entry.config(steps=1, batch_real=6, **settings), Watched(task, 2, NETWORK))
    return seen[0]


def test_a_dc_step_equals_its_formula(tiny):
    """The driver's first step against the sum over classes, written out, in the driver's own draws."""
    loss, gradient = first_loss("dc", tiny, init="real")
    run = Run(tiny, 2, NETWORK)
    net = run.random_network(0).requires_grad_(True).train()
    weights = gm.matched_weights(net)
    synthetic = gm.SyntheticSet.create(tiny, 2, gm.DC(init="real"), seed=0, device=torch.device("cpu"))
    images, labels = synthetic.decode()
    total = 0
    for c in range(3):
        real, truth = tiny.per_class(6, (0, "real", 0), [c])
        target = torch.autograd.grad(F.cross_entropy(net(real), truth), weights)
        own = labels == c
        fake = torch.autograd.grad(F.cross_entropy(net(images[own]), labels[own]), weights, create_graph=True)
        total = total + gm.row_cosine(target, fake)
    (expected,) = torch.autograd.grad(total, synthetic.images)
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_a_dcc_step_equals_its_formula(tiny):
    loss, gradient = first_loss("dcc", tiny, warm_share=0.0)
    run = Run(tiny, 2, NETWORK)
    net = run.random_network(0).requires_grad_(True).train()
    weights = gm.matched_weights(net)
    synthetic = gm.SyntheticSet.create(tiny, 2, gm.DCC(), seed=0, device=torch.device("cpu"))
    images, labels = synthetic.decode()
    real, truth = tiny.per_class(6, (0, "real", 0))
    target = torch.autograd.grad(F.cross_entropy(net(real), truth), weights)  # equal classes: the mean of their means
    fake = torch.autograd.grad(F.cross_entropy(net(images), labels), weights, create_graph=True)
    total = gm.row_cosine(target, fake)
    (expected,) = torch.autograd.grad(total, synthetic.images)
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_warm_dcc_matches_class_by_class_like_dc(tiny):
    warm, slope = first_loss("dcc", tiny, warm_steps=1)  # of one network the first quarter is this network
    plain, expected = first_loss("dc", tiny, init="real")
    assert warm == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("outer, warm_steps, expected", [(1, 10, "cc......"), (2, 1, "c.......")])
def test_dcc_matches_class_by_class_in_the_first_quarter_of_any_run(tiny, monkeypatch, outer, warm_steps, expected):
    class_batches = []
    original = gm.synthetic_gradients

    def watch(net, images, labels, weights):
        class_batches.append(len(labels.unique()) == 1)
        return original(net, images, labels, weights)

    monkeypatch.setattr(gm, "synthetic_gradients", watch)
    settings = {"steps": 8, "outer": outer, "inner": 0, "warm_steps": warm_steps, "batch_real": 4}
    condense.distill("dcc", tiny, 2, network=NETWORK, **settings)
    steps = "".join("c" if by_class else "." for by_class in class_batches)
    assert steps.replace("ccc", "c") == expected  # three classes


def test_default_steps_are_1000_networks():
    assert [gm.DC().total_steps(ipc) for ipc in (1, 10, 50)] == [1000, 10_000, 50_000]
    assert [gm.DCC().total_steps(ipc) for ipc in (1, 10, 50)] == [10_000, 10_000, 50_000]
    assert gm.DSA(steps=7).total_steps(10) == 7 and gm.DSA(outer=3).total_steps(10) == 3000


def test_networks_are_trained_on_the_set_between_steps(tiny, monkeypatch):
    trained = []
    original = gm.train

    def watch(students, recipe, **options):
        trained.append((recipe.steps, recipe.lr, recipe.momentum, recipe.weight_decay, len(students[0].source.images)))
        return original(students, recipe, **options)

    monkeypatch.setattr(gm, "train", watch)
    condense.distill("dsa", tiny, 4, network=NETWORK, steps=6, batch_real=6, outer=3, inner=2, batch_train=8)
    assert trained == [(4, 0.01, 0.0, 0.0, 12)] * 4  # after steps 1, 2, 4, 5; two epochs of two batches


def test_training_a_network_leaves_no_slope_on_the_pixels(tiny):
    run = Run(tiny, 2, NETWORK)
    synthetic = gm.SyntheticSet.create(tiny, 2, gm.DSA(), seed=0, device=torch.device("cpu"))
    net = run.random_network(0).requires_grad_(True)
    before = [parameter.clone() for parameter in net.parameters()]
    for step in run.optimise(synthetic, 1, images=gm.ParamGroup(lr=0.1)):
        gm.train_on_synthetic(net, synthetic, gm.DSA(), 2, run, step)
        assert synthetic.images.grad is None
    assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_batch_norm_statistics_stay_while_matching(tiny):
    made = condense.distill("dc", tiny, 2, network="convnet-d2-w8-bn", steps=3, batch_real=6, inner=1)
    assert torch.isfinite(made.stored).all()


def test_ranges(tiny):
    with pytest.raises(condense.CondenseError, match="outer=0: must be at least 1"):
        gm.DC(outer=0)
    with pytest.raises(condense.CondenseError, match="warm_steps=-1"):
        gm.DCC(warm_steps=-1)


# -- IDC --------------------------------------------------------------------------------------------------------------


def test_idc_distances_equal_their_sums():
    real, fake = ([normal(4, 3, 3, 3, key=key), normal(5, 7, key=key)] for key in ("a", "b"))
    differences = torch.cat([(a - b).flatten() for a, b in zip(real, fake)])
    torch.testing.assert_close(gm.squared_error(real, fake), differences.square().sum())
    torch.testing.assert_close(gm.absolute_error(real, fake), differences.abs().sum())


def test_idc_learning_rates_are_the_published_ones():
    assert gm.IDC().rate(10, (3, 32, 32)) == pytest.approx(5e-3)
    assert gm.IDC().rate(1, (3, 32, 32)) == pytest.approx(5e-4)
    assert gm.IDC(metric="l1").rate(50, (1, 28, 28)) == pytest.approx(5e-4)
    assert gm.IDC(metric="l1").rate(10, (3, 224, 224)) == pytest.approx(3e-3)
    assert gm.IDC(lr_img=0.2).rate(10, (3, 32, 32)) == 0.2
    with pytest.raises(condense.CondenseError, match="metric=l2: unknown"):
        gm.IDC(metric="l2")


def test_an_idc_sweep_equals_the_published_steps_class_by_class(tiny):
    """One SGD with momentum over all classes, stepped once per class, as released; two sweeps at two snapshots."""
    settings = {"networks": 1, "snapshots": 2, "net_steps": 1, "batch_real": 6, "lr_img": 1e-3, "augment": "none"}
    made = condense.distill("idc", tiny, 2, network=NETWORK, steps=2, precision="fp32", **settings)
    config = gm.IDC(**settings)
    run = Run(tiny, 2, NETWORK, quiet=True)
    bank = load_or_train_snapshots(run, config.recipe(tiny), count=1, units=1, unit_steps=1)
    net = run.random_network(0).requires_grad_(True)
    weights = [parameter for parameter in net.parameters() if parameter.dim() == 4]
    assert len(weights) == 2
    synthetic = gm.SyntheticSet.create(tiny, 2, config, seed=0, device=torch.device("cpu"), space="pixel")
    optimizer = torch.optim.SGD([synthetic.images], lr=1e-3, momentum=0.5)
    for sweep in range(2):
        bank.load(net, 0, sweep)
        for c in range(3):
            real, truth = tiny.per_class(6, (0, "real", sweep), [c])
            target = torch.autograd.grad(F.cross_entropy(net(real), truth), weights)
            fake, labels = synthetic.decode([c])
            gradients = torch.autograd.grad(F.cross_entropy(net(fake), labels), weights, create_graph=True)
            optimizer.zero_grad()
            gm.squared_error(target, gradients).backward()
            optimizer.step()
    for _ in range(40):  # lets the momentum run out, which the product counts at once
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    start = gm.SyntheticSet.create(tiny, 2, config, seed=0, device=torch.device("cpu"), space="pixel").images.detach()
    ours, theirs = made.stored - start, synthetic.images.detach() - start
    inside = (made.stored > 0) & (made.stored < 1)
    assert float((ours - theirs)[inside].norm()) < 0.05 * float(theirs[inside].norm())  # a few residuals of momentum


def test_idc_refuses_a_network_without_convolutions(tiny):
    with pytest.raises(condense.CondenseError, match="--network mlp: idc matches convolutions"):
        condense.distill("idc", tiny, 1, network="mlp", steps=1)
    assert not (cache_dir() / "banks").exists()


def test_idc_draws_a_part_of_a_large_set(tiny):
    settings = {"network": NETWORK, "steps": 1, "networks": 1, "snapshots": 2, "net_steps": 1, "batch_real": 6}
    some, most, all_ = (condense.distill("idc", tiny, 2, batch_syn_max=most, **settings) for most in (3, 8, 1000))
    assert torch.equal(most.stored, all_.stored) and not torch.equal(some.stored, all_.stored)
