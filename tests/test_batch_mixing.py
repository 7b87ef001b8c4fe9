"""Views as in the released label programs: mixed in batches, padded with black, tiles of collages in a random order."""

import pytest
import torch
from conftest import tiny_arrays
from torch import nn

import condense
from condense import networks, rng
from condense.augment import ViewRule
from condense.config import load_recipe, recipe_names
from condense.data import Standardise, black_pixel
from condense.errors import CondenseError
from condense.judge import get_protocol
from condense.labels import (
    DistanceLabels,
    PerViewLabels,
    PoolLabels,
    StaticLabels,
    TeacherLabels,
    compute_view_logits,
)
from condense.lighten import lighten
from condense.sets import DistilledSet
from condense.training import FixedSource, Student, TrainConfig, train

CPU, NETWORK = torch.device("cpu"), "convnet-d2-w8-bn"
TAUGHT = {"network": NETWORK, "teacher_epochs": 2, "teacher_batch": 8}
RULES = [
    ViewRule(mix="cutmix", mix_batch=4),
    ViewRule(mix="mixup", alpha=0.8, pad=2, mix_batch=4, fill=(-1.25,)),
    ViewRule(0.5, mix="cutmix", mix_batch=3, tiles=2),
]


def pictures(count, channels=1, size=8):
    return torch.randn(count, channels, size, size, generator=rng.generator("pictures", count))


def build(seed):
    with rng.seeded("mixing", seed):
        return networks.build_network(NETWORK, (1, 8, 8), 3)


# -- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "size", "sizes"), [(100, 64, [64, 36]), (12, 4, [4, 4, 4]), (3, 16, [3]), (9, 4, [4, 3, 2]), (1, 4, [1])]
)
@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_a_batch_shares_ratio_and_box_and_is_mixed_among_itself(rows, size, sizes, mix):
    rule = ViewRule(mix=mix, alpha=0.8, mix_batch=size)
    drawn, batches = rule.draw(5, 2, rows, (16, 16)), rule.batches(5, 2, rows)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(torch.cat(batches).tolist()) == list(range(rows))
    for batch in batches:
        assert sorted(drawn.partner[batch].tolist()) == sorted(batch.tolist())  # a permutation: each image occurs once
        assert len(drawn.share[batch].unique()) == 1
        assert drawn.patch is None or len(drawn.patch[batch].unique(dim=0)) == 1
    plain = ViewRule(mix=mix, alpha=0.8).draw(5, 2, rows, (16, 16))
    assert torch.equal(drawn.views.box, plain.views.box) and torch.equal(drawn.views.mirrored, plain.views.mirrored)
    again = rule.draw(5, 3, rows, (16, 16))
    assert rows == 1 or not torch.equal(again.partner, drawn.partner)


def test_golden_batches():
    # Stored labels depend on these: they may never change.
    rule = ViewRule(mix="cutmix", mix_batch=4)
    assert [batch.tolist() for batch in rule.batches(7, 3, 9)] == [[8, 0, 6, 5], [2, 1, 7], [4, 3]]
    drawn = rule.draw(7, 3, 9, (32, 32))
    assert drawn.partner.tolist() == [5, 7, 2, 4, 3, 6, 8, 1, 0]
    assert drawn.patch[[0, 1, 2]].tolist() == [[1, 13, 27, 32], [12, 16, 32, 32], [12, 16, 32, 32]]
    orders = ViewRule(tiles=3).draw(7, 3, 2, (9, 9)).views.tiles
    assert orders.tolist() == [[[2, 1, 0], [0, 2, 1]], [[0, 1, 2], [2, 0, 1]]]


def test_ratios_of_batches_are_beta_distributed():
    rule = ViewRule(mix="mixup", alpha=0.8, mix_batch=2)
    drawn = rule.draw(0, 0, 20000, (8, 8))
    share = torch.stack([drawn.share[batch[0]] for batch in rule.batches(0, 0, 20000)]).double()
    variance = 1 / (4 * 2.6)
    assert abs(float(share.mean()) - 0.5) < 4 * (variance / len(share)) ** 0.5
    assert float(share.var()) == pytest.approx(variance, rel=0.05)


def test_black_padding_is_that_of_released_programs():
    """RandomCrop(padding) and flip on pixels, then normalisation."""
    from torchvision.transforms.functional import crop, hflip, pad

    pixels = torch.rand(20, 3, 8, 8, generator=rng.generator("pixels"))
    transform = Standardise(torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3]))
    rule = ViewRule(pad=2, fill=black_pixel(transform))
    drawn = rule.draw(7, 3, 20, (8, 8))
    shown = rule.apply(transform(pixels), torch.arange(20), drawn)
    for image, got, box, mirrored in zip(pixels, shown, drawn.views.box.tolist(), drawn.views.mirrored):
        expected = crop(pad(image, [2, 2, 2, 2]), box[0] + 2, box[1] + 2, 8, 8)
        assert torch.equal(got, transform(hflip(expected) if mirrored else expected))
    zeros = ViewRule(pad=2).apply(transform(pixels), torch.arange(20), drawn)
    assert not torch.equal(zeros, shown)


def test_tiles_are_put_into_a_random_order_of_columns_and_rows():
    rule = ViewRule(1.0, flip=False, tiles=2)
    images = pictures(64)
    drawn = rule.draw(1, 0, 64, (8, 8))
    shown = rule.apply(images, torch.arange(64), drawn)
    orders = drawn.views.tiles
    for image, got, (columns, rows) in zip(images, shown, orders.tolist()):
        ordered = torch.cat([image[..., 4 * k : 4 * k + 4] for k in columns], -1)
        ordered = torch.cat([ordered[..., 4 * k : 4 * k + 4, :] for k in rows], -2)
        assert torch.equal(got, ordered)
    assert len(orders.flatten(1).unique(dim=0)) == 4  # all orders occur
    crops = ViewRule(0.3, tiles=2).draw(1, 0, 64, (8, 8)).views.box
    assert torch.equal(crops, ViewRule(0.3).draw(1, 0, 64, (8, 8)).views.box)


def test_rules_that_cannot_be():
    for words, options in {
        "mix_batch=1: must be 0": {"mix": "cutmix", "mix_batch": 1},
        "mix_batch=-4": {"mix": "cutmix", "mix_batch": -4},
        "mix_batch=99999999999999999999": {"mix": "cutmix", "mix_batch": 99999999999999999999},
        "padding of views: .nan": {"pad": 2, "fill": (float("nan"),)},
        "must be finite as float32": {"pad": 2, "fill": (1e39,)},
        "tiles=-1": {"tiles": -1},
        "tiles=256": {"tiles": 256},
    }.items():
        with pytest.raises(CondenseError, match=words):
            ViewRule(**options)
    rule = ViewRule(pad=2, fill=(0.5, 0.5, 0.5))
    with pytest.raises(CondenseError, match="padded with 3 channels do not fit images of 1"):
        rule.apply(pictures(2), torch.arange(2), rule.draw(0, 0, 2, (8, 8)))
    rule = ViewRule(tiles=3)
    with pytest.raises(CondenseError, match="3x3 tiles do not fit images of 8x8"):
        rule.apply(pictures(2), torch.arange(2), rule.draw(0, 0, 2, (8, 8)))


def test_settings_without_effect_change_nothing():
    assert ViewRule(mix_batch=16) == ViewRule() and ViewRule(fill=(1.0,)) == ViewRule() == ViewRule(tiles=1)


def test_keys_of_caches_stay_as_they_were():
    text = "ViewRule(min_scale=0.08, max_scale=1.0, flip=True, pad=0, mix='cutmix', alpha=1.0)"
    assert repr(ViewRule(mix="cutmix")) == text
    assert repr(ViewRule(mix="cutmix", mix_batch=16)) == text[:-1] + ", mix_batch=16)"


# -- files ------------------------------------------------------------------------------------------------------------


def labels_of(kind, rule):
    logits = torch.randn(2, 9, 3, generator=rng.generator("logits")).half()
    hard = torch.arange(9) % 3
    if kind == "teacher":
        return TeacherLabels(build(1), 9, 3, rule, 4.0, names=[NETWORK], shape=(1, 8, 8))
    return {
        "per-view": lambda: PerViewLabels(logits, 3, rule, 4.0),
        "static": lambda: StaticLabels(logits[0], 3, rule, 4.0),
        "distances": lambda: DistanceLabels(logits[..., :2].abs(), hard, 3, 3, rule),
        "pool": lambda: PoolLabels.pruned(PerViewLabels(logits, 3, rule, 4.0), 1, hard=hard),
    }[kind]()


def set_of(labels):
    manifest = condense.distill("random", condense.task(tiny_arrays(), name="tiny"), 3, network=NETWORK).manifest
    transform = Standardise(torch.tensor([0.5]), torch.tensor([0.4]))
    return DistilledSet(pictures(9), labels, transform, {**manifest, "space": "training"})


@pytest.mark.parametrize("kind", ["per-view", "teacher", "static", "distances", "pool"])
@pytest.mark.parametrize("rule", RULES)
def test_files_replay_the_views(tmp_path, kind, rule):
    made = set_of(labels_of(kind, rule))
    loaded = condense.load(made.save(tmp_path / "a.h5"))
    assert loaded.labels.views == rule and loaded.labels.cache_key() == made.labels.cache_key()
    for epoch in (0, 3):
        for ids in (torch.tensor([4, 0, 8]), torch.arange(9)):
            for a, b in zip(
                loaded.labels.training_batch(pictures(9), ids, epoch),
                made.labels.training_batch(pictures(9), ids, epoch),
            ):
                assert torch.equal(a, b)
    shown, _ = loaded.labels.training_batch(pictures(9), torch.tensor([4]), 1)
    whole, _ = loaded.labels.training_batch(pictures(9), torch.arange(9), 1)
    assert torch.equal(shown, whole[4:5])  # whatever the student's batch


def test_other_files_are_as_they_were():
    """What earlier versions read has not changed; what they would misread has shapes that they refuse."""
    arrays = PerViewLabels(torch.zeros(2, 9, 3), 3, ViewRule(pad=2, mix="mixup")).arrays()
    assert arrays["draws"].shape == arrays["views"].shape == (3,)
    for rule in RULES:
        arrays = PerViewLabels(torch.zeros(2, 9, 3), 3, rule).arrays()
        assert arrays["draws"].shape == (5,)
    assert PerViewLabels(torch.zeros(2, 9, 3), 3, ViewRule(pad=2, fill=(1.0,))).arrays()["views"].shape == (4,)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (ViewRule(pad=2, fill=(0.5, 0.5, 0.5)), "padded with 3 channels do not fit images of 1"),
        (ViewRule(tiles=3), "3x3 tiles do not fit images of 8x8"),
    ],
)
def test_files_whose_views_do_not_fit_their_images_are_refused(tmp_path, rule, words):
    with pytest.raises(CondenseError, match=f"could not be read back .*{words}") as fault:
        set_of(labels_of("per-view", rule)).save(tmp_path / "a.h5")
    assert "\n" not in str(fault.value)


# -- students ---------------------------------------------------------------------------------------------------------


def recorded_batches(labels, count, batch, steps, group=0):
    """Returns the maps that reach the first BatchNorm of a student in each forward pass; it does not learn."""
    net, seen = build(1), []
    first = next(layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d))
    first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach().clone()))
    recipe = TrainConfig(steps, batch, 0.0, 0.9, 0.0, lr_milestones=(), batch_norm_group=group)
    train([Student(net, FixedSource(pictures(count), labels), 3)], recipe, device=CPU)
    return seen, net


@pytest.mark.parametrize("kind", ["per-view", "teacher", "static", "distances"])
@pytest.mark.parametrize("rule", RULES)
def test_students_learn_on_the_batches_that_are_mixed(kind, rule):
    labels, steps = labels_of(kind, rule), -(-9 // rule.mix_batch)
    seen, net = recorded_batches(labels, 9, rule.mix_batch, 2 * steps)
    expected = [(epoch, batch) for epoch in (0, 1) for batch in rule.batches(3, epoch, 9)]
    assert len(seen) == len(expected)
    for maps, (epoch, batch) in zip(seen, expected):
        views, _ = labels.training_batch(pictures(9), batch, epoch)
        torch.testing.assert_close(maps, net.convs[0](views))


def test_students_with_other_batches_shuffle_as_before():
    labels = labels_of("per-view", ViewRule(mix="cutmix", mix_batch=4))
    plain = labels_of("per-view", ViewRule(mix="none"))
    sizes = [len(maps) for maps in recorded_batches(labels, 9, 5, 4)[0]]
    assert sizes == [len(maps) for maps in recorded_batches(plain, 9, 5, 4)[0]] == [5, 4, 5, 4]
    assert labels.mixed_batches(0, 5) is None and plain.mixed_batches(0, 4) is None
    assert labels_of("pool", ViewRule(mix="cutmix", mix_batch=4)).mixed_batches(0, 4) is None


def test_views_that_share_batch_statistics_are_of_one_mixed_batch():
    """CV-DD: batches of 16 are mixed, and their halves have statistics of their own in teacher and student."""
    rule, count = ViewRule(mix="cutmix", mix_batch=16), 37
    options = {"statistics": "batch", "micro": 8}
    logits = compute_view_logits(build(1), pictures(count), 2, rule, 5, classes=3, **options)
    labels = PerViewLabels(logits, 5, rule, 4.0, **options)
    groups = labels.labelled_groups(1, 8)
    assert [len(group) for group in groups] == [8, 8, 8, 8, 5]
    halves = [half for batch in rule.batches(5, 1, count) for half in batch.split([8, 8] if len(batch) > 8 else [5])]
    assert all(torch.equal(group, half) for group, half in zip(groups, halves, strict=True))
    seen, net = recorded_batches(labels, count, 16, 6, group=8)
    epochs = [(epoch, group) for epoch in (0, 1) for group in labels.labelled_groups(epoch, 8)]
    for maps, (epoch, group) in zip(seen, epochs, strict=True):
        views, _ = labels.training_batch(pictures(count), group, epoch)
        torch.testing.assert_close(maps, net.convs[0](views))


def test_batches_of_a_set_are_those_that_are_mixed():
    made = set_of(labels_of("per-view", RULES[0]))
    batches = made.labels.mixed_batches(1, 4)
    for (shown, targets), batch in zip(made.batches(1, 4), batches, strict=True):
        views, expected = made.labels.training_batch(made.training_images()[0], batch, 1)
        assert torch.equal(targets, expected)
        torch.testing.assert_close(shown, made.transform.inverse(views))
    assert [len(targets) for _, targets in made.batches(1, 5)] == [5, 4]


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["per-view", "teacher"])
def test_methods_and_lighten_take_the_settings(tiny, kind):
    settings = {"mix": "mixup", "mix_batch": 4, "label_pad": 1, "label_pad_value": "black", "label_epochs": 2}
    made = condense.distill("rded", tiny, 2, **TAUGHT, pool=4, crops=2, labels=kind, **settings)
    rule = made.labels.views
    black = tiny.transform(torch.zeros(1, 1, 1)).flatten().tolist()
    assert (rule.mix_batch, rule.pad) == (4, 1) and rule.fill == pytest.approx(black, rel=1e-6)
    record = condense.evaluate(made, tiny, runs=1, protocol="quick-soft-v1", controls=("random",))
    assert not record["missing"]
    if kind == "teacher":
        other = lighten(made, "per-view", label_epochs=1)
        assert other.labels.views == rule
        plain = lighten(made, "per-view", label_epochs=1, mix_batch=0, label_pad_value="mean")
        assert plain.labels.views == ViewRule(1.0, 1.0, rule.flip, 1, "mixup", rule.alpha)
        again = lighten(plain, "teacher", mix_batch=4, label_pad_value="black")
        assert again.labels.views == rule
        with pytest.raises(CondenseError, match="label_pad_value=blak"):
            lighten(made, "per-view", label_epochs=1, label_pad_value="blak")
    else:
        with pytest.raises(
            CondenseError, match=r"mix_batch=8 \(stored: 4\), label_pad_value=mean|label_pad_value=mean"
        ):
            lighten(made, "lowrank", mix_batch=8, label_pad_value="mean")


def test_settings_that_cannot_be(tiny):
    for key, value, words in (
        ("mix_batch", 1, "mix_batch=1: must be 0"),
        ("label_pad_value", "blak", "label_pad_value=blak: .*did you mean 'black'"),
    ):
        with pytest.raises(CondenseError, match=words):
            condense.distill("rded", tiny, 2, **TAUGHT, **{key: value})


def test_recipes_mix_in_the_batches_of_their_students():
    counts = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        if recipe.get("mix_batch"):
            assert recipe["mix_batch"] == get_protocol(recipe["protocol"]).batch, name
            assert not recipe.get("label_pad") or recipe["label_pad_value"] == "black", name
            counts[recipe["method"]] = counts.get(recipe["method"], 0) + 1
    assert set(counts) >= {"sre2l", "cda", "dwa", "cvdd", "infer", "rded"}
