"""The maths of trajectory matching beyond the unrolled training itself: experts' updates, windows, labels, starts."""

import math

import numpy as np
import pytest
import torch
from conftest import change_protocols, killed_after, tiny_archive

import condense
from condense import networks
from condense.engine import Run
from condense.errors import CondenseError
from condense.methods.trajectory_matching import ast, datm, expert_updates, ftd, mtt
from condense.networks import Layout
from condense.sets import SyntheticSet
from condense.training import TrainingStep

NETWORK = "convnet-d2-w8-in"


# -- updates of the experts -------------------------------------------------------------------------------------------


class Quadratic:
    """f(w) = sum of a w^4 / 4 + b w over two tensors, for one network or for K stacked ones."""

    def __init__(self, count=None):
        generator = torch.Generator().manual_seed(3)
        lead = () if count is None else (count,)
        shapes = [(*lead, 3, 2), (*lead, 4)]
        self.a, self.b, self.weights = (
            [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(3)
        )
        self.weights = [weight.requires_grad_() for weight in self.weights]
        self.work = TrainingStep(
            weights=self.weights,
            stacked=count is not None,
            step=0,
            epoch=0,
            clean=torch.zeros(1),
            loss=self.loss,
            forward=lambda images: images,
        )

    def loss(self):
        return sum((a * w**4 / 4 + b * w).sum() for a, b, w in zip(self.a, self.b, self.weights))

    def gradient(self, weights):
        """In closed form, flat."""
        return torch.cat([(a * w**3 + b).flatten() for a, b, w in zip(self.a, self.b, weights)])


@pytest.mark.parametrize("adaptive", [True, False])
def test_gsam_equals_its_formula(adaptive):
    problem, rho, coefficient = Quadratic(), 0.3, 0.7
    before = [weight.detach().clone() for weight in problem.weights]
    got = expert_updates.GSAM(rho, coefficient, adaptive)(problem.work)
    assert all(torch.equal(weight, value) for weight, value in zip(problem.weights, before))
    w = torch.cat([weight.flatten() for weight in before])
    g = problem.gradient(before)
    e = rho * w**2 * g / (w.abs() * g).norm() if adaptive else rho * g / g.norm()
    moved = [part.view_as(weight) for part, weight in zip((w + e).split([6, 4]), before)]
    s = problem.gradient(moved)
    cosine = (g @ s) / (g.norm() * s.norm())
    wanted = s - coefficient * (g - cosine * g.norm() * s / s.norm())
    torch.testing.assert_close(torch.cat([part.flatten() for part in got]), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adaptive", [True, False])
def test_gsam_of_stacked_networks_is_that_of_each(adaptive):
    stacked, update = Quadratic(3), expert_updates.GSAM(0.3, 0.7, adaptive)
    together = update(stacked.work)
    for k in range(3):
        one = Quadratic()
        one.a, one.b = [a[k] for a in stacked.a], [b[k] for b in stacked.b]
        one.weights = [weight[k].detach().requires_grad_() for weight in stacked.weights]
        one.work.weights = one.weights
        for alone, all_of_them in zip(update(one.work), together):
            torch.testing.assert_close(alone, all_of_them[k], rtol=1e-9, atol=1e-9)


def smooth_work(epoch, stacked=False):
    """A linear map of 3-colour images to two logits, whose input slope is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3 * 4, generator=generator, dtype=torch.float64)
    weight = (weight[None].repeat(2, 1, 1) if stacked else weight).requires_grad_()
    images = torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    images = images[None].repeat(2, 1, 1, 1, 1) if stacked else images

    def forward(x):
        return torch.einsum("...nd,...cd->...nc", x.flatten(-3), weight)

    def loss():
        return forward(images).square().mean((-2, -1)).sum()

    return TrainingStep([weight], stacked, 0, epoch, images, loss, forward), weight


@pytest.mark.parametrize("epoch, factor", [(0, 0.5), (3, 0.65), (10, 1.0), (40, 1.0)])
@pytest.mark.parametrize("stacked", [False, True])
def test_smooth_update_is_the_slope_of_loss_and_penalty(epoch, factor, stacked):
    work, weight = smooth_work(epoch, stacked)
    (got,) = expert_updates.Smooth(2.0, True)(work)
    copy = weight.detach().clone().requires_grad_()
    slope = copy.sum(-2).view(*copy.shape[:-2], 3, 2, 2)  # of the sum of logits, the same for every image
    penalty = (slope.norm(dim=-3) - 1).square().mean((-2, -1)).sum()
    logits = torch.einsum("...nd,...cd->...nc", work.clean.flatten(-3), copy)
    (factor * logits.square().mean((-2, -1)).sum() + 2.0 * penalty).backward()
    torch.testing.assert_close(got, copy.grad, rtol=1e-6, atol=1e-9)


def test_smooth_update_without_its_parts_is_plain():
    work, weight = smooth_work(0)
    (got,) = expert_updates.Smooth(0.0, False)(work)
    torch.testing.assert_close(got, torch.autograd.grad(work.loss(), weight)[0])


# -- AST --------------------------------------------------------------------------------------------------------------


def test_the_weight_of_a_start():
    assert ast.start_weight(10, 20) == pytest.approx(math.log(8) / math.log(5))  # the middle
    assert ast.start_weight(13, 20) == pytest.approx(math.log(11) / math.log(5))
    assert ast.start_weight(7, 20) == pytest.approx(math.log(5) / math.log(11))
    assert ast.start_weight(0, 1) == pytest.approx(math.log(8) / math.log(5))


class Known:
    """Experts whose snapshot t of expert k is filled with 10 k + t."""

    def __init__(self, net, count=3, epochs=9):
        self.layout, self.count, self.epochs = Layout.of(net), count, epochs

    def params_at(self, k, t):
        return torch.full((self.layout.size,), 10.0 * k + (t if t >= 0 else self.epochs))


@pytest.fixture
def known():
    return Known(networks.build_network(NETWORK, (1, 8, 8), 3))


@pytest.mark.parametrize("kind, weights", [("none", []), ("agg", [1.0, 1.0]), ("adaptive", [1 / 3, 2 / 3])])
def test_matches_on_the_way(known, kind, weights):
    config = ast.AST(intermediate=kind, expert_epochs=3, syn_steps=20)
    targets = ast.make_targets(config, known, expert=1, epoch=4)
    assert [target.step for target in targets] == [20, 6, 12][: 1 + len(weights)]
    assert [float(target.goal[0]) for target in targets] == [17.0, 15.0, 16.0][: 1 + len(weights)]
    assert [target.weight for target in targets] == pytest.approx([1.0, *weights])


def test_a_perturbed_start_changes_convolutions_alone_by_its_length(known):
    start = known.params_at(1, 0) + 1
    moved = ast.perturb_convolutions(start, known, 0.5, (0, "perturb", 1))
    assert torch.equal(moved, ast.perturb_convolutions(start, known, 0.5, (0, "perturb", 1)))
    assert torch.equal(ast.perturb_convolutions(start, known, 0.0, (0, "perturb", 1)), start)
    for name, weight in known.layout.unflatten(moved).items():
        share = weight / known.layout.unflatten(start)[name] - 1  # length * D / |D|
        assert float(share.norm()) == pytest.approx(0.5 if weight.dim() == 4 else 0.0, rel=1e-4)


def test_representative_images_are_of_their_class_and_different(tiny):
    run = Run(tiny, 2, NETWORK, quiet=True)
    experts = Known(run.random_network(0))
    experts.at = lambda k, t: experts.layout.flatten(run.random_network(k))
    ids = ast.select_representatives(tiny, run, experts)
    assert len(set(ids.tolist())) == 6 and tiny.train.labels[ids.numpy()].tolist() == [0, 0, 1, 1, 2, 2]


# -- DATM -------------------------------------------------------------------------------------------------------------


def test_the_window_expands_as_published():
    config = datm.DATM(max_start_epoch=20, expand_steps=1000)
    assert [config.end_of_starts(i) for i in (0, 99, 100, 550, 999, 1000, 9000)] == [10, 10, 11, 15, 19, 20, 20]
    assert datm.DATM(max_start_epoch=20, expand_steps=0).end_of_starts(0) == 20
    late = datm.DATM(min_start_epoch=10, max_start_epoch=40, first_max_start_epoch=30, expand_steps=100)
    assert [late.end_of_starts(i) for i in (0, 50, 100)] == [30, 35, 40]
    with pytest.raises(CondenseError, match="first_max_start_epoch=50: must be 1 to 40"):
        datm.DATM(max_start_epoch=40, first_max_start_epoch=50)


class Oracle(torch.nn.Module):
    """A network whose logits are given: a function of the expert's number and of the flat images (N, pixels)."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.number = logits, torch.nn.Parameter(torch.zeros(1))

    def embed(self, images):
        return images.flatten(1)

    def classify(self, features):
        return self.logits(int(self.number) // 10, features)


class OracleRun(Run):
    """A run whose networks are an oracle; its experts are ``Known``, so that the weight is 10 times their number."""

    def __init__(self, task, ipc, logits):
        super().__init__(task, ipc, NETWORK, quiet=True)
        self.oracle = Oracle(logits)

    def random_network(self, number):
        return self.oracle


def test_labels_average_the_experts_that_are_right(tiny):
    classes = torch.tensor([0, 1, 2])
    logits = torch.tensor(
        [
            [[3.0, 1, 0], [0, 2, 1], [5, 1, 0]],
            [[1.0, 2, 0], [0, 4, 0], [0, 3, 1]],
            [[5.0, 0, 1], [9, 0, 0], [4, 0, 2]],
        ]
    )
    run = OracleRun(tiny, 1, lambda number, images: logits[number][images[:, 0].long()])
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 8, 8).clone()  # each holds its number
    experts = Known(run.oracle)
    average = datm.average_correct_logits(run, experts, SyntheticSet(tiny, images, classes))
    torch.testing.assert_close(average[0], (logits[0, 0] + logits[2, 0]) / 2)
    torch.testing.assert_close(average[1], (logits[0, 1] + logits[1, 1]) / 2)
    torch.testing.assert_close(average[2], logits[:, 2].mean(0))  # no expert is right: all count


def test_starting_images_are_classified_correctly(tiny):
    """The first expert is right for images of class 0 with even ids; if it never is, the next one decides, then all."""
    labels = torch.from_numpy(tiny.train.labels)
    pixels = tiny.batch(torch.arange(len(labels))).flatten(1)

    def logits(number, images):
        ids = torch.cdist(images, pixels).argmin(1)
        truth = labels[ids]
        right = {0: (truth == 0) & (ids % 2 == 0), 1: truth == 1}.get(number, torch.zeros_like(truth, dtype=torch.bool))
        return torch.nn.functional.one_hot(torch.where(right, truth, (truth + 1) % 3), 3).float()

    run = OracleRun(tiny, 2, logits)
    ids = datm.select_correct_images(tiny, run, Known(run.oracle))
    assert len(set(ids.tolist())) == 6 and labels[ids].tolist() == [0, 0, 1, 1, 2, 2]
    assert (ids[:2] % 2 == 0).all()


# -- whole runs -------------------------------------------------------------------------------------------------------

SMALL = {
    "network": NETWORK,
    "steps": 3,
    "syn_steps": 3,
    "expert_epochs": 1,
    "max_start_epoch": 2,
    "num_experts": 2,
    "expert_batch": 8,
    "lr_start": 0.02,
}


def test_the_step_size_travels_and_is_learned(tiny, tmp_path):
    held = condense.distill("mtt", tiny, 1, **SMALL, lr_lr=0.0)
    assert held.manifest["learned_lr"] == pytest.approx(0.02)
    moved = condense.distill("mtt", tiny, 1, **SMALL, lr_lr=1e-4, out=tmp_path / "a.h5")
    assert moved.manifest["learned_lr"] != pytest.approx(0.02)
    assert condense.load(tmp_path / "a.h5").manifest["learned_lr"] == moved.manifest["learned_lr"]


def test_a_positive_step_size_moves_at_first_as_the_raw_one_and_stays_positive(tiny):
    def moved(kind, lr_lr):
        settings = {**SMALL, "steps": 1, "lr_start": 0.5, "lr_lr": lr_lr, "step_size": kind}
        return condense.distill("mtt", tiny, 1, **settings).manifest["learned_lr"] - 0.5

    slope = moved("raw", 1e-6) / -1e-6
    assert slope > 0 and moved("positive", 1e-6) == pytest.approx(moved("raw", 1e-6), rel=0.05)
    with pytest.raises(CondenseError, match=r"the learned step size is .*step_size=raw.*lower lr_lr") as error:
        moved("raw", 1.0 / slope)
    assert float(str(error.value).split()[5]) == pytest.approx(-0.5, rel=1e-4)
    assert moved("positive", 1.0 / slope) == pytest.approx(0.5**2 / 1.5 - 0.5, rel=0.01)
    assert moved("positive", 1e3 / slope) > -0.5


def test_grad_modes_agree_over_a_run(tiny):
    sets = {mode: condense.distill("mtt", tiny, 2, **SMALL, grad_mode=mode).stored for mode in ("adjoint", "graph")}
    torch.testing.assert_close(sets["adjoint"], sets["graph"], rtol=1e-3, atol=1e-4)
    approximate = condense.distill("mtt", tiny, 2, **SMALL, grad_mode="tesla").stored
    assert torch.equal(condense.distill("tesla", tiny, 2, **SMALL, lr_img=100.0, lr_lr=1e-5).stored, approximate)
    assert not torch.allclose(approximate, sets["adjoint"], rtol=1e-3, atol=1e-4)


class Recorded(Run):
    """Keeps the pixels before the first step and after each."""

    def optimise(self, synthetic, steps, **groups):
        self.pixels = [synthetic.images.detach().clone()]
        for step in super().optimise(synthetic, steps, **groups):
            yield step
            self.pixels.append(synthetic.images.detach().clone())


def test_ftd_ends_as_the_average_of_its_iterates(tiny):
    settings = {key: value for key, value in SMALL.items() if key != "network"}
    run = Recorded(tiny, 1, NETWORK, quiet=True)
    made = ftd.ftd(tiny, ftd.FTD(**settings, gsam=0.0, ema=0.9), run)
    average = run.pixels[0]
    for images in run.pixels[1:]:
        average = 0.9 * average + 0.1 * images
    assert len(run.pixels) == 4
    torch.testing.assert_close(made.images.detach(), average)
    assert not torch.allclose(made.images.detach(), run.pixels[-1])


def test_the_default_average_forgets_the_first_images_alike():
    for steps in (100, 5000):
        config = ftd.FTD(steps=steps)
        assert config.pixel_group().ema ** steps == pytest.approx(0.9995**5000)
    assert ftd.FTD(ema=0.0).pixel_group().ema is None


def test_a_closed_gate_changes_nothing(tiny):
    gated = condense.distill("datm", tiny, 1, **SMALL, gate=0.0)
    still = condense.distill("datm", tiny, 1, **SMALL, gate=0.0, lr_img=1.0, lr_label=0.5)
    assert torch.equal(gated.stored, still.stored) and torch.equal(gated.labels.logits, still.labels.logits)
    moved = condense.distill("datm", tiny, 1, **SMALL, gate=100.0)
    assert not torch.equal(gated.stored, moved.stored) and not torch.equal(gated.labels.logits, moved.labels.logits)


def test_assigned_labels_are_the_mean_softmax_of_the_experts(tiny):
    made = condense.distill("tesla", tiny, 2, **SMALL, assign_labels=True)
    assert made.labels.kind == "soft" and made.manifest["label_source"]["rule"] == "mean softmax"
    targets = made.labels.targets(torch.arange(6))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert not torch.allclose(targets, targets.round())


def test_soft_labels_are_judged_beside_random_images_with_labels_of_the_same_experts(tiny):
    made = condense.distill("datm", tiny, 1, **SMALL)
    record = condense.evaluate(made, tiny, networks=[NETWORK], runs=1, protocol="quick-soft-v1", cache=False)
    assert {(entry["arm"], entry["labels"]) for entry in record["results"]} >= {("distilled", "own"), ("random", "own")}
    made.manifest["label_source"]["experts"]["content"] = "of a file that is not there"
    record = condense.evaluate(made, tiny, networks=[NETWORK], runs=1, protocol="quick-soft-v1", cache=False)
    assert [entry["arm"] for entry in record["missing"]] == ["random"]


def test_a_diverging_run_keeps_the_last_good_set_and_names_the_knob(tiny, tmp_path):
    with pytest.raises(CondenseError, match=r"lr_img=1e\+30.*lower the learning rate.*written to"):
        condense.distill("mtt", tiny, 1, **{**SMALL, "steps": 50}, lr_img=1e30, out=tmp_path / "a.h5")
    assert condense.load(tmp_path / "a.h5").stored.isfinite().all()


def test_inner_optimisers_of_higher_need_the_graph(tiny):
    made = condense.distill(
        "mtt", tiny, 1, **{**SMALL, "lr_start": 1e-3}, lr_lr=1e-9, inner_optimizer="adam", grad_mode="graph"
    )
    assert made.stored.isfinite().all()
    with pytest.raises(CondenseError, match="inner_optimizer=adam: only grad_mode=graph"):
        condense.distill("mtt", tiny, 1, **SMALL, inner_optimizer="adam")


def test_settings_out_of_range_are_all_named():
    with pytest.raises(CondenseError, match="grad_mode=exact: unknown"):
        mtt.MTT(grad_mode="exact")
    with pytest.raises(CondenseError, match=r"syn_steps=0: must be at least 1; .*momentum=2: must be 0 to 1"):
        mtt.MTT(syn_steps=0, momentum=2)
    with pytest.raises(CondenseError, match="init=correct: unknown"):
        mtt.MTT(init="correct")


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_goes_from_experts_to_judged_sets(tiny, tmp_path, monkeypatch, capsys):
    from condense import cli
    from condense.benchmarks import equal_time, trajectories

    def condense_here(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        assert ended.value.code == 0, words

    monkeypatch.setattr(equal_time, "run_condense", condense_here)
    # How many steps fit into the time is the machine's affair; at these rates none of them can diverge.
    short_runs = [*trajectories.SHORT, "lr_img=0.001", "lr_start=0.001"]
    monkeypatch.setattr(trajectories, "RATES", {10: ["lr_lr=1e-12"]})
    monkeypatch.setattr(trajectories, "SETTINGS", {"mtt": short_runs, "datm": short_runs})
    change_protocols(monkeypatch, tmp_path / "protocols", steps=10)
    tiny_archive(tmp_path)
    words = [
        "--data",
        f"tiny={tmp_path}/tiny.npz",
        "--out",
        str(tmp_path / "out"),
        "--methods",
        "mtt,datm",
        "--ipc",
        "1",
    ]
    words += ["--network", NETWORK, "--count", "2", "--epochs", "5", "--minutes", "0.01"]
    assert trajectories._main(words) == 0
    table = (tmp_path / "out/table.txt").read_text()
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["mtt", "1"], ["datm", "1"]]
    assert all((row[-2], row[-5]) == ("±", "±") for row in rows)  # both arms, for soft labels too
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.h5")}
    assert len(kept) == 4  # two kinds of experts, two sets
    assert trajectories._main(words) == 0 and (tmp_path / "out/table.txt").read_text() == table
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.h5")} == kept


# -- what a reader of the issue would try -----------------------------------------------------------------------------


def test_dropout_is_drawn_by_the_step(tiny):
    class Dropping(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3))

    settings = {**SMALL, "network": Dropping}
    sets = [
        condense.distill("mtt", tiny, 1, **settings, grad_mode=mode).stored for mode in ("adjoint", "adjoint", "graph")
    ]
    assert torch.equal(sets[0], sets[1])
    torch.testing.assert_close(sets[0], sets[2], rtol=1e-3, atol=1e-4)


def test_experts_with_running_statistics_are_not_asked_about_images(tiny):
    settings = {**SMALL, "network": "convnet-d2-w8-bn"}
    assert condense.distill("mtt", tiny, 1, **settings).stored.isfinite().all()
    for method, word in (("datm", "method datm"), ("ast", "init=representative")):
        with pytest.raises(CondenseError, match=f"{word}: experts of convnet-d2-w8-bn cannot be asked"):
            condense.distill(method, tiny, 1, **settings, **({"buffer_epochs": 3} if method == "ast" else {}))


def test_a_gate_that_stays_shut_is_told(tiny, caplog):
    steps = datm.GATE_WARNING_STEPS
    condense.distill("datm", tiny, 1, **{**SMALL, "steps": steps + 1}, gate=0.0)
    assert [record.message for record in caplog.records if "above the gate" in record.message] == [
        f"condense: the matching loss was above the gate in each of the first {steps} steps, so nothing was "
        "learned; raise gate, or lower syn_steps or lr_start"
    ]


@pytest.mark.parametrize("method", ["mtt", "tesla", "ftd", "ast", "datm"])
def test_a_plan_does_not_stop_at_a_large_loss(tiny, method):
    """Experts of a dry run make one step per epoch, so that students miss them by far."""
    from condense.jobs import estimate_cost

    needs = estimate_cost(method, tiny, 1, network=NETWORK, num_experts=2, lr_start=1.0)
    assert needs["seconds"] > 0 and needs["trajectories"]["experts"] == 2


def test_a_loss_beyond_bounds_ends_the_run(tiny):
    with pytest.raises(CondenseError, match=r"lr_img=100, lr_lr=1e-05\): lower the learning rate"):
        condense.distill("mtt", tiny, 1, **{**SMALL, "steps": 30, "lr_start": 50.0}, lr_img=100.0)


def test_named_experts_are_in_the_manifest_and_must_stay_the_same(tiny, tmp_path, monkeypatch):
    from condense import api
    from condense.jobs import execute

    file = tmp_path / "e.h5"
    numbers = {"count": 2, "epochs": 2}
    api.experts(tiny, network=NETWORK, out=file, expert_batch=8, **numbers)
    settings = {**SMALL, "experts": str(file), "num_experts": 5}
    made = condense.distill("mtt", tiny, 1, **settings)
    known = made.manifest["trajectories"]
    assert known["count"] == 2 and known["epochs"] == 2 and made.manifest["cost"]["preparation_seconds"] > 0
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    np.savez(
        tmp_path / "tiny.npz",
        train_images=tiny.train.images,
        train_labels=tiny.train.labels,
        test_images=tiny.test.images,
        test_labels=tiny.test.labels,
    )
    task = condense.task(str(tmp_path / "tiny.npz"))
    api.experts(task, network=NETWORK, out=file, expert_batch=8, force=True, **numbers)
    with pytest.raises(KeyboardInterrupt), killed_after(1, KeyboardInterrupt):
        condense.distill("mtt", task, 1, **settings, run_dir=tmp_path / "run", out=tmp_path / "a.h5")
    api.experts(task, network=NETWORK, out=file, expert_batch=8, **{**numbers, "count": 3})
    with pytest.raises(CondenseError, match="holds other experts than when the run began"):
        execute.resume(tmp_path / "run")


def test_teachers_must_be_those_of_the_labels(tiny, tmp_path):
    from condense import api

    made = condense.distill("datm", tiny, 1, **SMALL)
    api.experts(tiny, network=NETWORK, out=tmp_path / "other.h5", count=1, epochs=2, expert_batch=8, seed=9)
    with pytest.raises(CondenseError, match="not the experts that the set's labels came from"):
        condense.evaluate(made, tiny, networks=[NETWORK], protocol="quick-soft-v1", teachers=tmp_path / "other.h5")


def test_a_short_remainder_comes_first():
    """Released programs cut a permutation into batches and take these from the end."""
    from condense.methods.trajectory_matching.matching import shuffled_rows

    parts = [shuffled_rows(7, 10, 4, step) for step in range(6)]
    assert [len(part) for part in parts] == [2, 4, 4] * 2
    for epoch in (parts[:3], parts[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    assert parts[0].tolist() != parts[3].tolist()
