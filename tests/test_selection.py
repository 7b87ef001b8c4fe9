"""Selectors: each on data where the answer is known, or against a search over all possibilities."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import change_protocols, command_line, tiny_archive, tiny_arrays
from scipy.optimize import linprog
from scipy.stats import beta as beta_distribution
from torch.utils._python_dispatch import TorchDispatchMode

import condense
from condense import api, networks, rng, selection
from condense.augment import CropViews
from condense.engine import Run
from condense.errors import CondenseError
from condense.judge import get_protocol
from condense.labels import SoftLabels
from condense.methods.selection import dq as dq_module
from condense.methods.selection import kdprune as kdprune_module
from condense.methods.selection import patches, settings
from condense.methods.selection import pca as pca_module
from condense.methods.selection import rad as rad_module
from condense.pretraining import load_teacher_ensemble
from condense.registry import METHODS
from condense.selection import (
    CosineKernel,
    GradientCosineKernel,
    GradientDistanceKernel,
    LastLayerGradients,
    beta_parameters,
    facility_location,
    gradient_match,
    graph_cut,
    greedy,
    herding,
    k_center,
    moderate,
    nearest_to_centroids,
    pass_messages,
    robust_distribution,
    sample_beta,
    sample_strata,
    sample_weighted,
    select_by_class,
    select_by_messages,
    take_in_order,
)

NETWORK = "convnet-d2-w8-in"
DRAWS = ("selection test",)


def points(count, dimensions=3, seed=0):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def gradients(count=12, classes=3, dimensions=4, seed=0):
    """Errors and features, and the gradients themselves as rows."""
    errors, features = points(count, classes, seed), points(count, dimensions, seed + 1)
    extended = torch.cat([torch.ones(count, 1, dtype=torch.float64), features], 1)
    return LastLayerGradients(errors, features), (errors[:, :, None] * extended[:, None]).flatten(1)


# -- similarities -----------------------------------------------------------------------------------------------------


def check_kernel(kernel, table):
    rows = torch.stack([kernel.row(i) for i in range(kernel.size)])
    torch.testing.assert_close(rows, table, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kernel.sums(), table.sum(0), rtol=1e-9, atol=1e-9)


def test_kernels_are_those_of_the_whole_vectors():
    features, (proxy, explicit) = points(11), gradients(11)
    cosine = torch.nn.functional.cosine_similarity
    check_kernel(CosineKernel(features), (1 + cosine(features[:, None], features[None], dim=2)) / 2)
    check_kernel(GradientCosineKernel(proxy), (1 + cosine(explicit[:, None], explicit[None], dim=2)) / 2)
    distances = (explicit[:, None] - explicit[None]).norm(dim=2)
    kernel = GradientDistanceKernel(proxy)
    near = {"rtol": 1e-6, "atol": 1e-6}  # a square root near 0
    table = kernel.constant - distances
    torch.testing.assert_close(torch.stack([kernel.row(i) for i in range(11)]), table, **near)
    torch.testing.assert_close(kernel.sums(), table.sum(0), **near)
    assert float(table.min()) >= 0
    torch.testing.assert_close(proxy.norms(), explicit.norm(dim=1))
    torch.testing.assert_close(proxy.products_with_mean(), explicit @ explicit.mean(0))


# -- herding ----------------------------------------------------------------------------------------------------------


def test_herding_by_hand():
    """The mean of 0, 1, 2, 9 is 3: 2 is nearest; then 2 + x should be 6, so 1 (3) and 9 (11) differ by 3 and 5."""
    assert herding(line(0, 1, 2, 9), 4).tolist() == [2, 1, 3, 0]


def test_herding_is_the_greedy_search_for_the_nearest_mean():
    features = points(15)
    mean, chosen = features.mean(0), []
    for size in range(1, 9):
        free = [i for i in range(15) if i not in chosen]
        gap = [(features[[*chosen, i]].sum(0) - size * mean).norm() for i in free]
        chosen.append(free[int(torch.stack(gap).argmin())])
    assert herding(features, 8).tolist() == chosen
    assert (features[herding(features, 8)].mean(0) - mean).norm() < (features[:8].mean(0) - mean).norm()


# -- k-center ---------------------------------------------------------------------------------------------------------


def radius(features, chosen):
    return float(torch.cdist(features, features[torch.as_tensor(chosen)]).min(1).values.max())


def test_k_center_by_hand():
    assert k_center(line(0, 1, 5, 10), 3, first=0).tolist() == [0, 3, 2]
    assert k_center(line(4, 4, 4), 3, first=1).tolist() == [1, 0, 2]  # equal points are not taken twice


@pytest.mark.parametrize("first", range(6))
def test_k_center_is_within_twice_the_optimum(first):
    features = points(12, 2)
    best = min(radius(features, subset) for subset in itertools.combinations(range(12), 3))
    chosen = k_center(features, 3, first)
    assert radius(features, chosen) <= 2 * best + 1e-12
    farthest = torch.cdist(features, features[chosen[:2]]).min(1).values.argmax()
    assert chosen[2] == farthest


# -- k-means ----------------------------------------------------------------------------------------------------------


def test_k_means_finds_the_middle_of_each_cluster():
    centre = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    offsets = torch.tensor([[0.1, 0.0], [3.0, 0.0], [-3.0, 0.0], [0.0, 4.0], [0.0, -4.0]])
    features = (centre[:, None] + offsets).reshape(-1, 2)
    assert sorted(nearest_to_centroids(features, 3, key=1).tolist()) == [0, 5, 10]


def test_k_means_of_many_points_finds_the_clusters_too(monkeypatch):
    monkeypatch.setattr(greedy, "LLOYD_POINTS", 100)
    centre = 100 * torch.eye(4)
    features = (centre[:, None] + torch.randn(4, 60, 4, generator=torch.Generator().manual_seed(0))).reshape(-1, 4)
    chosen = nearest_to_centroids(features, 4, key=1)
    assert sorted((chosen // 60).tolist()) == [0, 1, 2, 3]
    assert torch.equal(chosen, nearest_to_centroids(features, 4, key=1))
    assert float((features[chosen] - centre[chosen // 60]).norm(dim=1).max()) < 2


# -- submodular functions ---------------------------------------------------------------------------------------------


def table_of(kernel):
    return torch.stack([kernel.row(i) for i in range(kernel.size)])


@pytest.mark.parametrize("kind", ["features", "gradients"])
def test_graph_cut_gains_are_those_of_the_set_function(kind):
    """f(S) = sum over all i, j in S of s(i, j) - sum over i, j in S of s(i, j): its gain, and the greedy order."""
    kernel = CosineKernel(points(12)) if kind == "features" else GradientCosineKernel(gradients()[0])
    table, chosen = table_of(kernel), []

    def value(subset):
        return float(table[:, subset].sum() - table[subset][:, subset].sum())

    for _ in range(6):
        free = [i for i in range(12) if i not in chosen]
        chosen.append(max(free, key=lambda i: value([*chosen, i])))
    assert graph_cut(kernel, 6).tolist() == chosen


@pytest.mark.parametrize("make", [lambda: CosineKernel(points(14)), lambda: GradientDistanceKernel(gradients(14)[0])])
def test_lazy_facility_location_is_the_plain_greedy_one(make):
    kernel = make()
    table, chosen = table_of(kernel), []

    def value(subset):
        return float(table[:, subset].max(1).values.sum())

    for _ in range(7):
        free = [i for i in range(14) if i not in chosen]
        chosen.append(max(free, key=lambda i: value([*chosen, i])))
    assert facility_location(kernel, 7).tolist() == chosen
    best = max(value(list(subset)) for subset in itertools.combinations(range(14), 3))
    assert value(chosen[:3]) >= (1 - 1 / math.e) * best


def test_lazy_facility_location_computes_few_rows():
    class Counting(CosineKernel):
        rows = 0

        def row(self, i):
            Counting.rows += 1
            return super().row(i)

    facility_location(Counting(points(300, 8)), 20)
    assert 20 <= Counting.rows < 20 * 300 / 2


def test_equal_points_are_chosen_once_each():
    kernel = CosineKernel(torch.ones(4, 2))
    assert facility_location(kernel, 4).tolist() == [0, 1, 2, 3] and graph_cut(kernel, 4).tolist() == [0, 1, 2, 3]


# -- moderate ---------------------------------------------------------------------------------------------------------


def test_moderate_takes_the_median_distance():
    """Around the mean 0, distances 1, 1, 2, 2, 5, 5 have the median 2."""
    assert sorted(moderate(line(1, -1, 2, -2, 5, -5), 2).tolist()) == [2, 3]
    assert sorted(moderate(line(1, -1, 2, -2, 5, -5), 4).tolist()) == [0, 1, 2, 3]


# -- gradients --------------------------------------------------------------------------------------------------------


def test_craig_chooses_one_image_of_each_group():
    """Two groups of equal gradients: the larger one comes first."""
    errors = torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]])
    kernel = GradientDistanceKernel(LastLayerGradients(errors, torch.zeros(4, 2)))
    chosen = facility_location(kernel, 2)
    assert chosen.tolist() == [0, 2]


def test_gradient_matching_solves_its_ridge_problem():
    """With three images the weights are the best of all non-negative ones; the residual falls with each image."""
    proxy, explicit = gradients(10, seed=3)
    mean, errors = explicit.mean(0), []
    for count in range(1, 7):
        chosen, weights = gradient_match(proxy, count, ridge=0.1)
        assert len(set(chosen.tolist())) == count and (weights >= 0).all()

        def cost(w, chosen=chosen):
            return float((explicit[chosen].T @ w - mean).square().sum() + 0.1 * w.square().sum())

        best = torch.from_numpy(weights)
        errors.append(cost(best))
        for i in range(count):  # no weight can be changed for the better
            for change in (1e-4, -1e-4):
                other = best.clone()
                other[i] = max(0.0, float(other[i]) + change)
                assert cost(other) >= errors[-1] - 1e-12
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
    first = gradient_match(proxy, 1, ridge=0.1)[0]
    assert first.tolist() == [int((explicit @ mean).argmax())]


# -- orders and samples -----------------------------------------------------------------------------------------------


def test_orders():
    difficulty = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    take = lambda order, count: take_in_order(difficulty, count, order, rng.Draws(*DRAWS)).tolist()  # noqa: E731
    assert take("hardest", 2) == [2, 4] and take("easiest", 2) == [1, 3] and take("middle", 3) == [3, 0, 4]
    equal = {tuple(take_in_order(torch.zeros(6), 2, "hardest", rng.Draws("tie", k)).tolist()) for k in range(20)}
    assert len(equal) > 5  # ties are broken by the draws


def test_strata_are_sampled_evenly_after_the_cutoff():
    """Of 0..99 without the hardest tenth, 9 intervals of 10 images give 2 each; a crowded one does not give more."""
    chosen = sample_strata(torch.arange(100.0), 18, 9, 0.1, rng.Draws(*DRAWS))
    assert torch.bincount(chosen // 10, minlength=10).tolist() == [2] * 9 + [0]
    crowded = torch.cat([torch.zeros(90), torch.tensor([1.0, 2.0, 3.0, 3.0])])
    chosen = sample_strata(crowded, 8, 4, 0.0, rng.Draws(*DRAWS))
    assert torch.bincount(crowded[chosen].long(), minlength=4).tolist() == [4, 1, 1, 2]
    assert sorted(sample_strata(torch.arange(5.0), 5, 3, 0.9, rng.Draws(*DRAWS)).tolist()) == [0, 1, 2, 3, 4]


def test_beta_parameters_follow_the_share():
    alpha, beta = beta_parameters(pruned=0.5, anchor=0.2, exponent=2)
    assert beta == pytest.approx(15 * 0.8 * 0.75) and alpha == pytest.approx(16 - beta)
    means = [a / (a + b) for a, b in (beta_parameters(pruned, 0.3, 4) for pruned in (0.1, 0.5, 0.9))]
    assert means == sorted(means)  # the more is pruned, the easier


def test_weighted_samples_have_their_probabilities():
    weights = torch.tensor([1.0, 2.0, 5.0, 0.0], dtype=torch.float64)
    firsts = [int(sample_weighted(weights.log(), 1, rng.Draws("w", k))) for k in range(4000)]
    shares = np.bincount(firsts, minlength=4) / 4000
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8, 0], abs=0.03)
    assert sample_weighted(weights.log(), 4, rng.Draws("w", 0)).tolist()[-1] == 3


def test_dual_sampling_weighs_by_score_and_density():
    scores, target = torch.tensor([0.2, 0.1, 0.4, 0.3]), torch.tensor([0.9, 0.5, 0.3, 0.7])
    anchor = float(target[[2, 3]].mean())
    alpha, beta = beta_parameters(0.75, anchor, 2.0)
    expected = scores.numpy() * beta_distribution.pdf(target.numpy(), alpha, beta)
    firsts = [int(sample_beta(scores, target, 1, 4, 2.0, rng.Draws("d", k), anchors=2)) for k in range(4000)]
    assert np.bincount(firsts, minlength=4) / 4000 == pytest.approx(expected / expected.sum(), abs=0.03)


def test_messages_by_hand():
    """Image 1 is nearest to 0 and 2 at distance ln 2, so it gets half of each and they get half of its own."""
    difficulty = torch.tensor([1.0, 4.0, 2.0, 3.5], dtype=torch.float64)
    neighbours = torch.tensor([[1], [0], [1], [3]])
    distances = torch.tensor([[math.log(2)], [math.log(2)], [math.log(2)], [1e9]], dtype=torch.float64)
    assert pass_messages(difficulty, neighbours, distances).tolist() == [3.0, 4.5, 4.0, 3.5]
    everyone = torch.arange(4)
    # 1 lowers 0 by half of 4.5 to 0.75; gamma = 0 lowers it by all of it, to -1.5
    assert select_by_messages(difficulty, neighbours, distances, 4, 1.0, everyone).tolist() == [1, 2, 3, 0]
    assert select_by_messages(difficulty, neighbours, distances, 2, 1.0, torch.tensor([0, 3])).tolist() == [3, 0]


# -- robust active distillation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("errors", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_robust_weights_solve_the_game(errors, seed):
    """max over p of min over sets M of m images of sum p g - 2 sum over M of p g, as a linear program."""
    n = 7
    gains = np.random.default_rng(seed).uniform(0.05, 1.0, n)
    rows = []
    for wrong in itertools.combinations(range(n), errors):
        worth = gains.copy()
        worth[list(wrong)] *= -1
        rows.append([*-worth, 1.0])
    solved = linprog(
        [*np.zeros(n), -1.0],
        A_ub=rows,
        b_ub=np.zeros(len(rows)),
        A_eq=[[*np.ones(n), 0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
    )
    share, value = robust_distribution(torch.from_numpy(gains), errors)
    assert float(share.sum()) == pytest.approx(1) and value == pytest.approx(-solved.fun, abs=1e-9)
    earned = (share.numpy() * gains).sum() - 2 * np.sort(share.numpy() * gains)[-errors:].sum()
    assert earned == pytest.approx(value, abs=1e-12)


def test_robust_weights_by_hand():
    share, value = robust_distribution(torch.full((5,), 0.4))
    assert share.tolist() == pytest.approx([0.2] * 5) and value == pytest.approx(3 / 12.5)
    # H = 1, 2, 3, 13: (k - 2) / H = -1, 0, 1/3, 2/13, so the fourth is left out
    assert robust_distribution(torch.tensor([1.0, 1.0, 1.0, 0.1]))[0].tolist() == pytest.approx([1 / 3] * 3 + [0])


# -- budgets and methods ----------------------------------------------------------------------------------------------


def test_budgets():
    labels = np.array([0, 1, 1, 0, 1, 1])
    last = lambda ids, count, c: torch.arange(len(ids)).flip(0)[:count]  # noqa: E731
    assert select_by_class(labels, 2, 2, "class", last).tolist() == [3, 0, 5, 4]
    assert select_by_class(labels, 2, 2, "free", last).tolist() == [5, 4, 3, 2]


def run_of(task, **options):
    return Run(task, 2, NETWORK, quiet=True, track="none", **options)


def ids_of(made, task):
    """Ids of the images of a set, class by class."""
    known = {image.tobytes(): i for i, image in enumerate(task.train.images)}
    return [known[image.numpy().tobytes()] for image in made.stored]


SELECTIONS = [
    name
    for name in METHODS.names()
    if METHODS.get(name).function.__module__.startswith(settings.__package__) and name != "pca"
]
"""Selections that store unchanged images."""


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_stores_different_real_images(name, tiny):
    made = condense.distill(name, tiny, 3, network=NETWORK, **short(name))
    ids = ids_of(made, tiny)
    assert made.stored.dtype == torch.uint8 and len(set(ids)) == 9
    assert [int(tiny.train.labels[i]) for i in ids] == [0] * 3 + [1] * 3 + [2] * 3


def short(name):
    config = METHODS.get(name).config
    if issubclass(config, settings.ScoredOptions):
        return {"score_epochs": 3, "score_batch": 8}
    return {"teacher_epochs": 1, "teacher_batch": 8} if name not in ("random", "rs2") else {}


@pytest.mark.parametrize("name", ["random", "kmeans", "craig", "dq", "el2n"])
def test_labels_of_a_teacher(name, tiny, tmp_path):
    """The same images as with class labels, and the logits of the named teacher for what is stored."""
    teachers = tmp_path / "teachers.h5"
    api.teachers(tiny, networks=[NETWORK], epochs=2, out=teachers, teacher_batch=8)
    settings = {"network": NETWORK, "precision": "fp32", "teachers": str(teachers)}
    settings |= {"score_epochs": 3, "score_batch": 8} if name == "el2n" else {}
    settings |= {"drop": 0.5, "rebuild": "mean"} if name == "dq" else {}
    made = condense.distill(name, tiny, 3, labels="teacher", protocol="quick-soft-v1", **settings)
    plain = condense.distill(name, tiny, 3, **settings)
    assert torch.equal(made.stored, plain.stored) and plain.labels.is_hard
    network = load_teacher_ensemble(teachers, torch.device("cpu"))
    with torch.no_grad():
        expected = network(made.training_images()[0]).softmax(1)
    torch.testing.assert_close(made.labels.targets(torch.arange(9)), expected)
    assert made.manifest["label_source"]["teachers"]["networks"] == [NETWORK]
    assert made.manifest["protocol"] == "quick-soft-v1" and plain.manifest["protocol"] == METHODS.get(name).protocol
    arms = condense.evaluate(made, tiny, runs=1, controls=["random", "distilled-hard"])["results"]
    assert [(entry["arm"], entry["labels"]) for entry in arms] == [
        ("distilled", "own"),
        ("distilled", "hard"),
        ("random", "own"),
    ]


def test_a_set_with_labels_of_a_teacher_is_judged_by_them(tiny, monkeypatch, tmp_path):
    change_protocols(monkeypatch, tmp_path / "protocols", {"dc-soft-v1", "dc-v1"}, steps=3, runs=1)
    soft, hard = (
        condense.distill("random", tiny, 1, network=NETWORK, labels=labels, teacher_epochs=1, teacher_batch=8)
        for labels in ("teacher", "class")
    )
    assert soft.manifest["protocol"] == "dc-soft-v1" and hard.manifest["protocol"] == "dc-v1"
    record = condense.evaluate(hard, tiny, controls=["distilled-hard"])
    assert [entry["arm"] for entry in record["results"]] == ["distilled"]
    assert record["missing"] == [{"arm": "distilled-hard", "why": "the labels of the set are its classes"}]


def test_a_teacher_gives_features_and_labels_but_is_trained_once(tiny):
    made = condense.distill("herding", tiny, 1, network=NETWORK, labels="teacher", teacher_epochs=1, teacher_batch=8)
    again = condense.distill("herding", tiny, 1, network=NETWORK, teacher_epochs=1, teacher_batch=8)
    taught, cached = made.manifest["preparation"], again.manifest["preparation"]
    assert taught["from_cache"] == 0 and cached["from_cache"] == 1

    def networks_built(**settings):
        built = []

        def counted(shape, classes):
            built.append(1)
            return networks.build_network(NETWORK, shape, classes)

        condense.distill("herding", tiny, 1, network=counted, teacher_epochs=1, teacher_batch=8, **settings)
        return len(built)

    assert networks_built(labels="teacher") == networks_built()


def test_selections_by_pixels_are_those_of_the_functions(tiny):
    pixels = tiny.pixels(torch.arange(36)).flatten(1)
    for name, choose in (("herding", herding), ("moderate", moderate)):
        made = condense.distill(name, tiny, 3, network=NETWORK, embedding="pixels")
        assert ids_of(made, tiny) == [
            12 * c + int(i) for c in range(3) for i in choose(pixels[12 * c : 12 * c + 12], 3)
        ]
    cut = condense.distill("graphcut", tiny, 3, network=NETWORK, embedding="pixels", kernel="features")
    expected = [12 * c + int(i) for c in range(3) for i in graph_cut(CosineKernel(pixels[12 * c : 12 * c + 12]), 3)]
    assert ids_of(cut, tiny) == expected
    free = condense.distill("herding", tiny, 3, network=NETWORK, embedding="pixels", balance="free")
    assert ids_of(free, tiny) == sorted(herding(pixels, 9).tolist(), key=lambda i: tiny.train.labels[i])


def test_a_free_budget_may_exceed_the_smallest_class(tmp_path):
    x, y, x_test, y_test = tiny_arrays()
    keep = np.concatenate([np.flatnonzero(y == 0)[:2], np.flatnonzero(y > 0)])
    unequal = condense.task((x[keep], y[keep], x_test, y_test), name="unequal")
    options = {"network": NETWORK, "embedding": "pixels", "balance": "free"}
    made = condense.distill("kmeans", unequal, 8, **options)
    assert len(made) == 24 and int((made.hard_labels() == 0).sum()) <= 2
    with pytest.raises(CondenseError, match=r"--ipc 9: with 3 classes more than the 26 images .*; give at most 8"):
        condense.distill("kmeans", unequal, 9, **options)
    with pytest.raises(CondenseError, match="has only 2 images; give at most 2"):
        condense.distill("kmeans", unequal, 3, network=NETWORK, embedding="pixels")


def test_features_are_those_of_the_teacher(tiny):
    config, run = settings.SelectionOptions(teacher_epochs=1, teacher_batch=8), run_of(tiny)
    found = settings.last_layer_gradients(config, run)
    assert run.notes["teachers"]["networks"] == [NETWORK]
    embedding = settings.EmbeddingOptions(teacher_epochs=1, teacher_batch=8)
    torch.testing.assert_close(settings.embed_images(embedding, run_of(tiny)), found.features)
    assert found.errors.shape == (36, 3) and float(found.errors.sum(1).abs().max()) < 1e-5
    own = found.errors[torch.arange(36), torch.as_tensor(tiny.train.labels)]
    assert bool((own < 0).all())  # p - 1 of the true class


def test_selections_by_a_named_table(tiny, tmp_path):
    path = tmp_path / "scores.h5"
    table = api.scores(tiny, network=NETWORK, out=path, score_epochs=3, score_batch=8, seed=5)
    for take, sign in (("hardest", -1), ("easiest", 1)):
        made = condense.distill("grand", tiny, 2, network=NETWORK, scores=str(path), take=take)
        ids = ids_of(made, tiny)
        for c in range(3):
            order = (sign * table.columns["grand"][12 * c : 12 * c + 12]).argsort()
            assert ids[2 * c : 2 * c + 2] == [12 * c + int(i) for i in order[:2]]
        assert made.manifest["scores"]["content"] == table.manifest["content"]
        assert "scores=PATH" in made.manifest["command"] and str(tmp_path) not in made.manifest["command"]
    assert made.manifest["cost"]["preparation_seconds"] == table.manifest["seconds"]


def test_a_free_selection_is_no_start_and_has_no_classes_by_position(tiny, tmp_path):
    """Its classes are those of its labels; where these are gone, nothing guesses them."""
    made = condense.distill("aum", tiny, 3, network=NETWORK, balance="free", out=tmp_path / "a.h5", **short("aum"))
    counts = torch.bincount(made.hard_labels(), minlength=3)
    assert int(counts.sum()) == 9 and counts.tolist() != [3, 3, 3]
    with pytest.raises(CondenseError, match="the set has not 3 stored images of every class"):
        condense.distill("dm", tiny, 3, network=NETWORK, init=str(tmp_path / "a.h5"), steps=1)
    made.labels = SoftLabels(torch.zeros(9, 3))
    with pytest.raises(CondenseError, match="9 images are not 3 of each of 3 classes"):
        made.hard_labels()


def test_d2_with_a_small_budget_takes_its_own_class(tiny):
    made = condense.distill("d2", tiny, 2, network=NETWORK, score="el2n", **short("d2"))
    assert [int(tiny.train.labels[i]) for i in ids_of(made, tiny)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("herding", {"embedding": "pixel"}, "embedding=pixel: unknown; did you mean 'pixels'"),
        ("graphcut", {"embedding": "random"}, "gradients are those of a trained network; give kernel=features too"),
        ("kmeans", {"balance": "fre"}, "balance=fre: unknown; did you mean 'free'"),
        ("el2n", {"take": "hard"}, "take=hard: unknown; did you mean 'hardest'"),
        ("forgetting", {"score_epochs": 1}, "score_epochs=1: must be at least 2"),
        ("ccs", {"score": "fame"}, "score=fame: unknown"),
        ("ccs", {"cutoff": 1.0}, "cutoff=1.0: must be 0 to 0.999"),
        ("dual", {"sampling": "best"}, "sampling=best: unknown"),
        ("uncertainty", {"score": "el2n"}, "score=el2n: unknown"),
        ("el2n", {"scores": "missing.h5"}, "missing.h5: no such file"),
        ("random", {"labels": "techer"}, "labels=techer: unknown; did you mean 'teacher'"),
        ("kmeans", {"labels": "teacher", "balance": "free"}, "labels=teacher: needs equally many images"),
        ("dq", {"store": "indices", "drop": 0.2}, "store=indices: the real data lack the patches that drop rebuilds"),
        ("moderate", {"balance": "free"}, "balance=free: moderate ranks images within their class"),
        ("rad", {"store": "index"}, "store=index: unknown; did you mean 'indices'"),
        ("aum", {"labels": "teacher", "teachers": "missing.h5"}, "missing.h5: no such file"),
    ],
)
def test_wrong_settings(name, wrong, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CondenseError, match=message):
        condense.distill(name, tiny, 1, network=NETWORK, **wrong)


def test_bins_are_graph_cuts_of_what_is_left():
    features = points(13)
    kernel = lambda ids: CosineKernel(features[ids])  # noqa: E731
    bins = dq_module.split_into_bins(kernel, torch.arange(13), 3)
    assert [len(rows) for rows in bins] == [4, 4, 5]
    assert sorted(torch.cat(bins).tolist()) == list(range(13))
    assert bins[0].tolist() == graph_cut(CosineKernel(features), 4).tolist()
    left = torch.tensor([i for i in range(13) if i not in bins[0].tolist()])
    assert bins[1].tolist() == left[graph_cut(CosineKernel(features[left]), 4)].tolist()
    assert len(dq_module.split_into_bins(kernel, torch.arange(2), 5)) == 2


def test_dq_samples_every_bin_evenly(tiny):
    made = condense.distill("dq", tiny, 6, network=NETWORK, embedding="pixels", bins=3)
    pixels = tiny.pixels(torch.arange(36)).flatten(1)
    for c in range(3):
        members = torch.arange(12 * c, 12 * c + 12)
        bins = dq_module.split_into_bins(lambda ids: CosineKernel(pixels[ids]), members, 3)
        chosen = set(ids_of(made, tiny)[6 * c : 6 * c + 6])
        assert [len(chosen & set(members[rows].tolist())) for rows in bins] == [2, 2, 2]


class ChannelMeans(torch.nn.Module):
    """Logit k is the mean of channel k, whose map is the image itself: Grad-CAM of class k is channel k / (H W)."""

    def embed(self, images, maps=None):
        maps.append(images * 1.0)
        return maps[-1].flatten(2).mean(2)

    def classify(self, embedding):
        return embedding


def test_grad_cam_of_a_network_that_averages_channels_is_the_mean_of_the_channel_in_each_patch():
    images = torch.zeros(2, 3, 4, 4)
    images[0, 1, :2, :2], images[0, 1, 2:, 2:], images[0, 2] = 1.0, -5.0, 9.0
    images[1, 0, :2, 2:] = 2.0
    found = patches.grad_cam(ChannelMeans(), images, torch.tensor([1, 0]), 2)
    assert (16 * found).tolist() == [[[1, 0], [0, 0]], [[0, 2], [0, 0]]]


def test_the_least_important_patches_are_dropped_pixel_by_pixel():
    importance = torch.tensor([[[0.3, 0.1], [0.2, 0.9]], [[0.0, 0.0], [0.0, 0.0]]])
    assert patches.least_important(importance, 2, 1)[:, 0].tolist() == [
        [[False, True], [True, False]],
        [[True, True], [False, False]],
    ]
    whole = patches.least_important(importance, 2, 2)
    assert whole.shape == (2, 1, 4, 4) and whole[0, 0, :2, 2:].all() and whole[0, 0, 2:, :2].all()
    assert int(whole[0].sum()) == 8
    filled = patches.fill_with_mean(torch.arange(16.0).view(1, 1, 4, 4), whole[:1])
    assert filled[0, 0, 0].tolist() == [0.0, 1.0, 7.5, 7.5]


def test_the_patch_decoder_keeps_visible_pixels_and_learns_to_rebuild_the_others():
    """Images are slopes, which neighbours tell and the mean does not."""
    ramp = torch.linspace(0, 255, 8)
    shifts = torch.arange(40)[:, None, None]
    images = (0.5 * (ramp[:, None] * (shifts % 2) + ramp[None] * (1 - shifts % 2)) + 3 * shifts).clamp(0, 255)
    images = images.round().to(torch.uint8)[:, None].numpy()
    labels = np.arange(40) % 2
    task = condense.task((images, labels, images, labels), name="slopes")
    decoder = patches.train_decoder(run_of(task), 2, 4, 60)
    pixels = task.pixels(torch.arange(40))
    missing = patches.least_important(rng.Draws(*DRAWS).uniform(40 * 16).view(40, 4, 4), 4, 2)
    rebuilt = decoder(pixels, missing)
    assert torch.equal(rebuilt[~missing], pixels[~missing])
    assert torch.equal(rebuilt, decoder(torch.where(missing, 7.0, pixels), missing))  # dropped pixels are not read
    plain = patches.fill_with_mean(pixels, missing)
    assert (rebuilt - pixels)[missing].square().mean() < 0.5 * (plain - pixels)[missing].square().mean()


@pytest.mark.parametrize("rebuild", ["mean", "decoder"])
def test_dq_changes_the_dropped_patches_only_and_states_the_bytes(rebuild, tiny):
    options = {"network": NETWORK, "teacher_epochs": 1, "teacher_batch": 12, "bins": 2}
    whole = condense.distill("dq", tiny, 4, **options)
    made = condense.distill("dq", tiny, 4, **options, drop=0.25, patch=2, rebuild=rebuild, decoder_steps=3)
    changed = (made.stored != whole.stored).view(12, 4, 2, 4, 2).any(4).any(2).flatten(1)
    assert made.stored.dtype == torch.uint8 and int(changed.sum()) > 0 and int(changed.sum(1).max()) <= 4
    facts = made.manifest["patches"]
    assert (facts["dropped"], facts["of"], facts["visible_bytes"], facts["mark_bytes"]) == (4, 16, 12 * 48, 24)
    weights = 9 * (2 * 32 + 2 * 32 * 32 + 32) + 3 * 32 + 1
    assert facts["decoder_bytes"] == (4 * weights if rebuild == "decoder" else 0)


def test_patches_that_do_not_cover_the_image_are_refused(tiny):
    with pytest.raises(CondenseError, match="patch=3: does not divide the 8x8 pixels"):
        condense.distill("dq", tiny, 2, network=NETWORK, teacher_epochs=1, teacher_batch=12, drop=0.2, patch=3)


# -- combined and labelled images -------------------------------------------------------------------------------------


def test_pca_combines_whole_images():
    """Images of one grey value become the tiles of one image, row by row; a uniform area keeps its value."""
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 4, 6)
    combined = pca_module.combine_images(images, 2)
    assert combined.shape == (2, 1, 4, 6)
    assert combined[1, 0, ::2, ::3].tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_pca_stores_the_easiest_images_of_each_class(tiny, tmp_path):
    table = api.scores(tiny, network=NETWORK, out=tmp_path / "s.h5", score_epochs=2, score_batch=8)
    made = condense.distill("pca", tiny, 2, network=NETWORK, scores=str(tmp_path / "s.h5"), protocol="quick-v1")
    assert made.manifest["decode"] == [{"stage": "formation", "factor": 2, "pad": 0.5}] and len(made) == 24
    for c in range(3):
        easiest = 12 * c + table.columns["el2n"][12 * c : 12 * c + 12].argsort()[:8]
        expected = pca_module.combine_images(tiny.pixels(easiest), 2)
        torch.testing.assert_close(made.stored[2 * c : 2 * c + 2] / 255, expected, rtol=0, atol=0.51 / 255)
    plain = condense.distill("pca", tiny, 2, network=NETWORK, scores=str(tmp_path / "s.h5"), factor=1)
    assert set(ids_of(plain, tiny)) == {int(12 * c + i) for c in range(3) for i in easiest_two(table, c)}
    for settings_, message in (
        ({"factor": 3}, "factor=3: does not divide the 8x8 pixels"),
        ({"factor": 4}, "factor=4: 32 images of each class are needed"),
    ):
        with pytest.raises(CondenseError, match=message):
            condense.distill("pca", tiny, 2, network=NETWORK, **settings_)


def easiest_two(table, c):
    return table.columns["el2n"][12 * c : 12 * c + 12].argsort()[:2]


def test_the_hard_label_protocol_crops_each_tile():
    augmentation = get_protocol("rethink-hard-v1").augmentation(mirror=True)
    assert isinstance(augmentation, CropViews) and augmentation.flip and augmentation.min_scale == pytest.approx(0.08)
    assert not get_protocol("rethink-hard-v1").augmentation(mirror=False).flip
    recipe = get_protocol("rethink-hard-v1").recipe(1000, mirror=False)
    assert recipe.steps == 300 * 8 and recipe.optimizer == "adamw" and recipe.cutmix == 0


def test_the_weight_of_the_teacher_falls_with_the_share():
    weights = [kdprune_module.weight_of_teacher(share) for share in (0.01, 0.05, 0.05**0.5, 1.0)]
    assert weights == pytest.approx([1, 1, 0.75, 0.5])


def test_mixed_labels_give_the_mixed_loss():
    """(1 - alpha) CE(class) + alpha CE(teacher), for any student."""
    teacher, student = torch.randn(6, 4), torch.randn(6, 4)
    classes = torch.tensor([0, 1, 2, 3, 0, 1])
    cross_entropy = torch.nn.functional.cross_entropy
    for alpha in (0.0, 0.3, 1.0):
        labels = SoftLabels(kdprune_module.mixed_logits(teacher, classes, alpha))
        expected = (1 - alpha) * cross_entropy(student, classes) + alpha * cross_entropy(student, teacher.softmax(1))
        torch.testing.assert_close(labels.loss(student, labels.targets(torch.arange(6))), expected)


def test_kdprune_labels_what_it_selects(tiny, tmp_path, three_steps):
    options = {"teacher_epochs": 2, "teacher_batch": 8, "alpha": 0.5, "protocol": "quick-soft-v1"}
    made = condense.distill("kdprune", tiny, 2, network=NETWORK, precision="fp32", **options)
    run = run_of(tiny)
    config = settings.SelectionOptions(teacher_epochs=2, teacher_batch=8, teacher_lr=0.1)
    found = settings.last_layer_gradients(config, run)
    ids = torch.tensor(ids_of(made, tiny))
    onehot = torch.nn.functional.one_hot(torch.as_tensor(tiny.train.labels), 3)
    probabilities = (found.errors + onehot)[ids]
    torch.testing.assert_close(made.labels.targets(torch.arange(6)), (probabilities + onehot[ids]) / 2)
    record = condense.evaluate(made, tiny, runs=1, controls=["random", "full"])
    assert {entry["arm"] for entry in record["results"]} == {"distilled", "random", "full"}
    scores = {"score_epochs": 2, "score_batch": 8}
    scored = condense.distill("kdprune", tiny, 2, network=NETWORK, choose="el2n", **scores, **options)
    plain = condense.distill("el2n", tiny, 2, network=NETWORK, **scores)
    assert torch.equal(scored.stored, plain.stored)


def test_rad_draws_with_the_robust_weights():
    probabilities = torch.tensor(
        [[0.5, 0.5, 0.0], [0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.95, 0.05, 0.0], [0.4, 0.4, 0.2]]
    )
    weights = rad_module.query_log_weights(probabilities, "rad")
    share, _ = robust_distribution(torch.tensor([1.0, 0.8, 0.8, 0.1, 1.0]))
    assert float(share[3]) == 0 and torch.allclose(weights.exp()[share > 0], share[share > 0], rtol=1e-5)
    firsts = [int(sample_weighted(weights, 1, rng.Draws("rad", k))) for k in range(4000)]
    assert np.bincount(firsts, minlength=5) / 4000 == pytest.approx(share.numpy(), abs=0.03)
    assert sample_weighted(weights, 5, rng.Draws("rad", 0)).tolist()[-1] == 3
    drawn = {
        query: sample_weighted(rad_module.query_log_weights(probabilities, query), 5, rng.Draws("q", 1)).tolist()
        for query in ("margin", "entropy")
    }
    assert set(drawn["margin"][:2]) == {0, 4} and drawn["margin"][-1] == 3
    entropies = [-sum(p * math.log(p) for p in row if p) for row in probabilities.tolist()]
    assert drawn["entropy"] == sorted(range(5), key=lambda i: entropies[i])[::-1]
    assert len(set(map(float, rad_module.query_log_weights(probabilities, "random")))) == 1


def test_rad_begins_at_random_and_asks_for_new_images(tiny):
    small = {"teacher_epochs": 1, "teacher_batch": 8, "student_steps": 3, "protocol": "quick-soft-v1"}
    first = condense.distill("rad", tiny, 1, network=NETWORK, rounds=1, **small)
    for query in ("rad", "margin", "entropy", "random"):
        made = condense.distill("rad", tiny, 3, network=NETWORK, rounds=3, query=query, **small)
        ids = ids_of(made, tiny)
        assert len(set(ids)) == 9 and set(ids_of(first, tiny)) <= set(ids)  # the first round is the same
        assert made.labels.kind == "soft" and made.manifest["label_source"]["teachers"]["networks"] == [NETWORK]


# -- initial images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kmeans", "herding", "kcenter", "graphcut", "facility", "moderate"])
def test_pixel_methods_start_from_selections(init, tiny):
    """DM without steps of any size is its initial images."""
    made = condense.distill("dm", tiny, 2, network=NETWORK, init=init, steps=1, lr_img=0.0, batch_real=6)
    real = tiny.batch(torch.arange(36))
    gaps = (made.stored[:, None] - real).abs().amax((2, 3, 4))
    ids = gaps.argmin(1)
    assert float(gaps.min(1).values.max()) < 1e-5 and len(set(ids.tolist())) == 6
    assert [int(tiny.train.labels[i]) for i in ids] == [0, 0, 1, 1, 2, 2]
    if init == "herding":
        pixels = tiny.pixels(torch.arange(12)).flatten(1)
        assert ids[:2].tolist() == herding(pixels, 2).tolist()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    tiny_archive(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = f"distill kmeans --data tiny.npz --ipc 2 --network {NETWORK} embedding=pixels protocol=quick-v1"
    done = command_line(words, capsys)
    assert done.code == 0, done.err
    assert condense.load(tmp_path / "tiny-kmeans-ipc2.h5").stored.dtype == torch.uint8
    assert tiny_arrays()[0].dtype == np.uint8 and selection.BALANCES == ("class", "free")


# -- memory -----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the number of values of the largest tensor that an operation returns."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return result


def errors_and_features(features):
    return LastLayerGradients(features[:, :4].softmax(1) - 0.25, features)


SELECTORS = {
    "herding": lambda features: herding(features, 8),
    "kcenter": lambda features: k_center(features, 8, 0),
    "kmeans": lambda features: nearest_to_centroids(features, 8, 0),
    "moderate": lambda features: moderate(features, 8),
    "graphcut": lambda features: graph_cut(CosineKernel(features), 8),
    "graphcut of gradients": lambda features: graph_cut(GradientCosineKernel(errors_and_features(features)), 8),
    "facility": lambda features: facility_location(CosineKernel(features), 8),
    "craig": lambda features: facility_location(GradientDistanceKernel(errors_and_features(features)), 8),
    "gradmatch": lambda features: gradient_match(errors_and_features(features), 8, 1.0)[0],
    "d2": lambda features: selection.graph_of_neighbours(features, 8)[0][:8, 0],
}


@pytest.mark.parametrize("name", SELECTORS)
def test_no_selector_holds_a_matrix_of_all_pairs(name):
    """All classes together: the largest tensor is the input or a block of rows."""
    count, dimensions = 2500, 8
    features = points(count, dimensions).float()
    with LargestTensor() as largest:
        chosen = SELECTORS[name](features)
    assert len(chosen) == 8
    assert 8 * count <= largest.values <= 1024 * count < count * count / 2
