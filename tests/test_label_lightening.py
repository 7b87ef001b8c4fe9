"""Lightening: every kind from every set that can give it, what the file says of it, and both verbs."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import command_line, tiny_arrays

import condense
from condense import config
from condense.errors import CondenseError
from condense.judge import label_source
from condense.labels import (
    DEFAULT_MAX_K,
    DEFAULT_MAX_RANK,
    CodedLabels,
    DistanceLabels,
    HardLabels,
    Int8TeacherLabels,
    LowRankLabels,
    PerViewLabels,
    PoolLabels,
    SoftLabels,
    StaticLabels,
    TeacherLabels,
    TopKLabels,
    compute_view_nll,
    default_size,
)
from condense.lighten import (
    LIGHTEN_KINDS,
    LabelComparison,
    compare_label_kinds,
    comparison,
    format_comparison,
    int8_bytes,
    label_bytes,
    lighten,
    parse_kinds,
)
from condense.lighten import settings as settings_module

NETWORK = "convnet-d2-w8-bn"
TAUGHT = {"network": NETWORK, "teacher_epochs": 2, "teacher_batch": 8}
STORED = ("lowrank", "topk", "pool", "distances", "per-view", "hard")
"""What stored logits of mixed views give without a teacher."""


@pytest.fixture
def real():
    return condense.task(tiny_arrays(), name="tiny")


@pytest.fixture
def per_view(real):
    """RDED's images with six epochs of labels, and teachers in the cache."""
    return condense.distill("rded", real, 2, labels="per-view", label_epochs=6, temperature=4.0, **TAUGHT)


@pytest.fixture
def live(real):
    """The same with the teacher itself."""
    return condense.distill("rded", real, 2, temperature=4.0, **TAUGHT)


def forgotten(made):
    """A set that does not say who made its labels."""
    made.manifest.pop("label_source")
    return made


def refusal(call):
    with pytest.raises(CondenseError) as fault:
        call()
    assert "\n" not in str(fault.value)
    return str(fault.value)


@pytest.mark.parametrize("kind", LIGHTEN_KINDS)
def test_every_kind_of_either_set(kind, per_view, live, real, tmp_path):
    for made in (per_view, live):
        settings = {} if kind in STORED[-1:] or kind in ("soft", "static", "teacher") else {"label_epochs": 4}
        if kind == "projector":
            settings = {"projector_steps": 2, "projector_batch": 4}
        light = lighten(made, kind, real, **settings)
        assert light.labels.kind == {"teacher": "teacher-int8"}.get(kind, kind) and len(light.labels) == 6
        assert torch.equal(light.stored, made.stored) and light.name == f"{made.name}.{kind}"
        known = light.manifest["lightened"]
        assert known["kind"] == kind and known["exactness"] in ("exact", "lossy", "approximate") and known["step_cost"]
        assert known["bytes"]["before"] == made.labels.nbytes() and known["bytes"]["after"] == light.labels.nbytes()
        assert known["settings"].items() >= settings.items()
        lossy = isinstance(light.labels, CodedLabels | Int8TeacherLabels)
        assert (known["error"] is not None) == lossy
        assert ("protocol" in light.manifest) == (kind != "hard")
        before, after = (one.manifest["cost"].get("preparation_seconds", 0.0) for one in (made, light))
        assert after == pytest.approx(before + known["seconds"], abs=0.011)
        asked = [f"{key}={value}" for key, value in settings.items()]
        words = ["condense lighten tiny-rded-ipc2.h5 --labels", kind, "--data tiny=PATH", *asked]
        assert light.manifest["command"].startswith(f"{made.manifest['command']} && {' '.join(words)}")
        again = condense.load(light.save(tmp_path / f"{made.labels.kind}.h5"))
        assert again.manifest["lightened"] == json.loads(json.dumps(known))
        assert again.labels.cache_key() == light.labels.cache_key()
        images, ids = again.training_images()
        if light.labels.per_view:
            views, targets = again.labels.training_batch(images, ids, 5)
            assert bool(views.isfinite().all()) and bool(targets.isfinite().all())


@pytest.mark.parametrize("kind", LIGHTEN_KINDS)
def test_stored_labels_need_no_teacher(kind, per_view):
    made = forgotten(per_view)
    if kind in STORED:
        assert lighten(made, kind).manifest["lightened"]["kind"] == kind
        return
    line = refusal(lambda: lighten(made, kind))
    assert "its per-view labels do not give these" in line and "give --teachers FILE" in line


def test_codes_of_stored_labels_are_of_the_same_views(per_view):
    light = lighten(per_view, "lowrank", rank=3)
    images, ids = per_view.training_images()
    for epoch in (0, 5, 8):
        views, targets = per_view.labels.training_batch(images, ids, epoch)
        seen, asked = light.labels.training_batch(images, ids, epoch)
        assert torch.equal(seen, views)
        torch.testing.assert_close(asked, targets, atol=0.01, rtol=0)
    assert light.manifest["label_source"] == per_view.manifest["label_source"]
    assert light.manifest["protocol"] == per_view.manifest["protocol"]
    assert light.labels.temperature == 4.0 and lighten(per_view, "lowrank", temperature=2).labels.temperature == 2.0


def test_live_teachers_are_asked_about_their_own_views(live):
    """What they are asked for is what they would have answered."""
    light, labels = lighten(live, "per-view", label_epochs=3), live.labels
    assert isinstance(labels, TeacherLabels) and light.labels.views == labels.views
    images, ids = live.training_images()
    for epoch in range(3):
        views, targets = labels.training_batch(images, ids, epoch)
        seen, asked = light.labels.training_batch(images, ids, epoch)
        assert torch.equal(seen, views)
        torch.testing.assert_close(asked, targets, atol=2e-3, rtol=0)


def test_distances_from_stored_logits_are_the_teachers(per_view, real):
    light = lighten(per_view, "distances")
    teacher, _ = label_source.find_label_teacher(per_view, None, torch.device("cpu"))
    terms, images = per_view.labels.terms(), per_view.training_images()[0]
    asked = compute_view_nll(
        teacher,
        images,
        per_view.hard_labels(),
        6,
        terms["views"],
        terms["seed"],
        classes=3,
        statistics=terms["statistics"],
        micro=terms["micro"],
    )
    assert isinstance(light.labels, DistanceLabels)
    torch.testing.assert_close(light.labels.distances, asked, atol=0.01, rtol=0.01)


def test_a_pool_keeps_a_share_in_any_code(per_view):
    for values, more in (("half", {}), ("int8", {}), ("lowrank", {"rank": 2}), ("topk", {"k": 1, "fill": "mr"})):
        light = lighten(per_view, "pool", keep=0.34, values=values, **more)
        assert light.labels.shape == (2, 6, 3) and light.labels.epochs == 6 and light.labels.code.name == values
        assert light.manifest["lightened"]["exactness"] == ("exact" if values == "half" else "lossy")
    assert lighten(per_view, "pool", keep=0.01).labels.shape[0] == 1


def test_teachers_of_a_file(live, per_view, real, tmp_path):
    file = condense.api.teachers(
        real, networks=[NETWORK, "convnet-d1-w4-bn"], epochs=1, teacher_batch=8, out=tmp_path / "teachers.h5"
    ).file.path
    made = forgotten(per_view)
    for kind in ("teacher", "static", "lowrank"):
        light = lighten(made, kind, teachers=file)
        assert light.manifest["label_source"]["teachers"]["networks"] == [NETWORK, "convnet-d1-w4-bn"]
    light = lighten(made, "teacher", teachers=file, weights="float32")
    assert light.labels.names == (NETWORK, "convnet-d1-w4-bn") and type(light.labels) is TeacherLabels
    assert light.manifest["lightened"]["error"] is None
    hard = condense.distill("random", real, 2, network=NETWORK)
    light = lighten(hard, "topk", teachers=file, label_epochs=2, k=2)
    assert light.labels.views.mix == "cutmix" and light.labels.temperature == 20.0
    assert "give --teachers FILE" in refusal(lambda: lighten(hard, "soft"))


def test_a_teacher_that_is_handed_over(per_view):
    net, _ = label_source.find_label_teacher(per_view, None, torch.device("cpu"))
    light = lighten(per_view, "lowrank", teacher=net.members[0], label_epochs=2, rank=2)
    assert light.manifest["teacher"]["sha256"] and "label_source" not in light.manifest
    line = refusal(lambda: lighten(per_view, "teacher", teacher=net.members[0]))
    assert "have no names that a file could keep" in line


def test_random_images_get_such_labels_when_judged(per_view, real, three_steps):
    for kind, settings in (("pool", {"keep": 0.5, "values": "topk"}), ("teacher", {})):
        light = lighten(per_view, kind, **settings)
        record = condense.evaluate(light, real, networks=NETWORK, runs=1, controls=["random"])
        assert [entry["arm"] for entry in record["results"]] == ["distilled", "random"] and not record["missing"]
        assert record["set"]["bytes"]["labels"] == light.labels.nbytes()


@pytest.mark.parametrize(
    "kind, settings, line",
    [
        ("lowrang", {}, "--labels lowrang: unknown; did you mean 'lowrank'?"),
        ("lowrank", {"rang": 3}, "rang=3: no such setting of labels=lowrank; did you mean 'rank'?"),
        ("lowrank", {"rank": 4}, "rank=4: must be 1 to 3, the number of classes"),
        ("topk", {"label_epochs": 7}, "label_epochs=7: 6 are stored; leave it out, or give --teachers FILE"),
        ("pool", {"mix": "mixup"}, "mix=mixup (stored: cutmix): the stored labels are of other views"),
        ("pool", {"keep": 0}, "keep=0: must be above 0 and at most 1"),
        ("pool", {"values": "zip"}, "values=zip: unknown"),
        ("teacher", {"weights": "int4"}, "weights=int4: unknown; did you mean 'int8'?"),
        ("per-view", {"label_epochs": 0}, "label_epochs=0: must be at least 1"),
    ],
)
def test_refusals(kind, settings, line, per_view):
    assert refusal(lambda: lighten(per_view, kind, **settings)).startswith(line)


def test_other_data_and_sets_that_cannot(per_view, real):
    other = condense.task(tiny_arrays(classes=2), name="two")
    line = refusal(lambda: lighten(per_view, "lowrank", other))
    assert line.startswith("--data two: has other classes (2) than the set (3)")
    larger = condense.task(tiny_arrays(size=12), name="large")
    assert "images are 1x12x12" in refusal(lambda: lighten(per_view, "lowrank", larger))
    cut = condense.distill("dm", real, 1, network="convnet-d2-w8-in", steps=1, batch_real=6, factor=2, init="collage")
    assert "only labels=hard fit these" in refusal(lambda: lighten(cut, "soft"))
    assert len(lighten(cut, "hard").labels) == 3
    twice = lighten(lighten(per_view, "lowrank", rank=3), "topk", k=1)  # the teachers are asked again
    assert twice.manifest["lightened"]["bytes"]["before"] == per_view.labels.nbytes()
    assert "do not give these" in refusal(lambda: lighten(forgotten(lighten(per_view, "lowrank")), "topk"))


def test_every_setting_says_what_it_means():
    for options, make in LIGHTEN_KINDS.values():
        assert all(meaning for _, _, _, meaning in config.describe(options)) and make.__doc__


# -- bytes before there is a set --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, images, epochs", [(2, 4, 1), (5, 7, 12), (257, 3, 5), (300, 2, 20)])
def test_the_bytes_of_a_plan_are_those_of_the_labels(classes, images, epochs):
    logits, hard = torch.randn(epochs, images, classes), torch.arange(images) % classes
    views = PerViewLabels(logits, 0)
    made = [
        views,
        LowRankLabels.of(views, default_size(classes, DEFAULT_MAX_RANK)),
        TopKLabels.of(views, default_size(classes, DEFAULT_MAX_K)),
        PoolLabels.pruned(views, settings_module.PoolOptions().count(epochs), hard=hard),
        DistanceLabels(logits[:, :, :2], hard, classes, 0),
        StaticLabels(logits[0].half(), 0),
        SoftLabels(logits[0]),
        HardLabels(hard, classes),
    ]
    points = label_bytes(classes, images, epochs)
    assert {p.kind: (p.bytes, p.external, p.exactness) for p in points} == {
        one.kind: (one.nbytes(), one.external_nbytes(), one.exactness) for one in made
    }
    assert parse_kinds(",".join(p.words for p in points))  # as `condense labels` understands them
    assert [p.bytes for p in points] == sorted((p.bytes for p in points), reverse=True)


def test_teachers_and_projectors_in_a_plan(live):
    weights = int8_bytes([NETWORK], (1, 8, 8), 3)
    assert weights == lighten(live, "teacher").labels.nbytes()
    points = {p.kind: p for p in label_bytes(3, 6, 4, teacher_bytes=weights, projector_bytes=(10, 2000))}
    assert points["teacher"].bytes == weights and points["teacher"].exactness == "lossy"
    assert (points["projector"].bytes, points["projector"].external) == (10, 2000) and set(points) == set(LIGHTEN_KINDS)


def test_more_classes_than_topk_can_number():
    points = {p.kind: p for p in label_bytes(70_000, 2, 10)}
    views = PerViewLabels(torch.zeros(10, 2, 70_000), 0)
    assert points["pool"].bytes == PoolLabels.pruned(views, 1, hard=torch.arange(2)).nbytes() and "topk" not in points


@pytest.mark.parametrize("ipc, told", [(10, "6.0 GB (5.6 GiB)"), (50, "30.0 GB (28 GiB)"), (200, "120.0 GB (112 GiB)")])
def test_the_figures_of_the_field(ipc, told):
    """ImageNet-1K's labels of 300 epochs: 5.6 GB, 28 GB and 112 GB are binary units."""
    points = label_bytes(1000, 1000 * ipc, 300)
    assert points[0].bytes - 49 == 2 * 300 * 1000 * ipc * 1000  # 2 E N C
    assert f"per-view         {told}  0 bytes" in format_comparison(points, "per-view")


# -- labelling that is cut short --------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What was asked of teachers, an epoch a time; the epoch ``stop`` is not answered."""
    seen, original = SimpleNamespace(epochs=0, stop=None), condense.labels.compute_logits

    def counted(*arguments, **options):
        if seen.epochs == seen.stop:
            raise KeyboardInterrupt
        seen.epochs += 1
        return original(*arguments, **options)

    monkeypatch.setattr("condense.labels.teacher_logits.compute_logits", counted)

    def during(call, stop=None):
        seen.epochs, seen.stop = 0, stop
        return call(), seen.epochs

    return during


@pytest.mark.parametrize("kind", ["per-view", "lowrank", "topk", "distances"])
def test_labelling_that_was_killed_goes_on_in_the_middle(kind, live, call, asked, tmp_path):
    live.save("set.h5")
    words = f"lighten set.h5 --labels {kind} label_epochs=6 --out"
    assert call(f"{words} whole.h5").code == 0
    result, epochs = asked(lambda: call(f"{words} new/light.h5"), stop=4)
    assert result.code == 130 and epochs == 4
    assert result.err.splitlines()[-1].endswith(
        "stopped while labelling views; give the same command again to continue"
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["light.h5.views.json", "light.h5.views.npy"]
    result, epochs = asked(lambda: call(f"{words} new/light.h5"))
    assert result.code == 0 and epochs == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["light.h5"]
    whole, light = condense.load("whole.h5"), condense.load("new/light.h5")
    for made in (whole, light):
        made.manifest["lightened"].pop("seconds")
        made.manifest["cost"].pop("preparation_seconds")  # which they are part of
    assert light.manifest == whole.manifest and light.sha256() == whole.sha256()


@pytest.mark.parametrize("state", ["{", "[]", '{"key": 1}'])
def test_a_damaged_state_of_labelling_begins_anew(state, live, call, asked, tmp_path):
    live.save("set.h5")
    words = "lighten set.h5 --labels per-view label_epochs=6 --out new/light.h5"
    assert asked(lambda: call(words), stop=4)[0].code == 130
    (tmp_path / "new/light.h5.views.json").write_text(state)
    result, epochs = asked(lambda: call(words))
    assert result.code == 0 and epochs == 6


def test_answers_of_others_are_not_taken(live, per_view, real, asked, tmp_path):
    """Partial results of another set, teacher or rule are discarded; those of another code of the same logits are
    used."""
    out = tmp_path / "light.h5"
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    another = condense.distill("random", real, 2, network=NETWORK)

    def epochs(made, kind, stop=None, **settings):
        def call():
            with contextlib.suppress(KeyboardInterrupt):
                lighten(made, kind, beside=out, label_epochs=4, **settings)

        return asked(call, stop)[1]

    assert epochs(live, "topk", 3) == 3 and epochs(live, "lowrank", 0) == 0 and epochs(live, "per-view") == 1
    assert epochs(live, "per-view") == 0  # all are there until the set is written
    assert epochs(live, "per-view", label_scale=0.5) == epochs(live, "per-view", teacher=other) == 4
    assert epochs(another, "per-view", teacher=other) == epochs(live, "distances") == 4
    assert epochs(live, "per-view", 2) == 2 and epochs(live, "per-view", 0, mix="mixup") == 0
    assert epochs(live, "per-view") == 4  # the last one took the place of what was there
    assert epochs(per_view, "lowrank") == 0  # from stored labels


# -- accuracy against bytes -------------------------------------------------------------------------------------------


def test_kinds_are_named_with_their_settings():
    assert parse_kinds("own,lowrank:rank=2,topk,topk") == ["own", "lowrank:rank=2", "topk"] and parse_kinds("") == []
    assert "--kinds tokp: unknown; did you mean 'topk'?" in refusal(lambda: parse_kinds("tokp"))
    assert "rang=2: no such setting of labels=lowrank" in refusal(lambda: parse_kinds("lowrank:rang=2"))


def test_bytes_alone_and_what_is_missing(per_view):
    points = compare_label_kinds(forgotten(per_view))
    assert [point.words for point in points] == ["own", *(kind for kind in LIGHTEN_KINDS if kind != "per-view")]
    assert {point.words for point in points if point.missing} == {"teacher", "projector", "static", "soft"}
    assert isinstance(per_view.labels, PerViewLabels) and points[0].bytes == per_view.labels.nbytes()
    assert all(point.mean is None for point in points)
    text = format_comparison(points)
    assert "own (per-view)" in text and "static is missing: " in text and "accuracy" not in text


def test_students_are_trained_on_each(per_view, real, three_steps):
    points = compare_label_kinds(per_view, ["own", "pool:keep=0.5", "hard"], real, network=NETWORK, runs=2)
    assert all(point.mean is not None and point.ci95 is not None for point in points)
    assert points[1].bytes < points[0].bytes and "95 % interval" in format_comparison(points)


def test_the_protocol_must_hear_the_labels(per_view, real):
    line = refusal(lambda: compare_label_kinds(per_view, ["own"], real, protocol="quick-v1"))
    assert line.startswith("--protocol quick-v1: judges classes alone")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        LabelComparison("own", "per-view", 1000, 0, mean=0.5, ci95=(0.4, 0.6)),
        LabelComparison("topk", "topk", 100, 50, mean=0.45),
        LabelComparison("soft", missing="no teacher"),
    ]
    for name in ("a.png", "a.svg"):
        assert comparison.plot_comparison(points, tmp_path / name, "set").stat().st_size > 1000
    assert "there are none; give --data" in refusal(
        lambda: comparison.plot_comparison(points[2:], tmp_path / "b.png", "set")
    )
    assert "must end in .png" in refusal(lambda: comparison.plot_comparison(points, tmp_path / "b.doc", "set"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


# -- the verbs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return lambda words: command_line(words, capsys)


def test_the_verbs(per_view, call, tmp_path, three_steps):
    import numpy as np

    per_view.save("set.h5")
    np.savez("tiny.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), tiny_arrays())))
    result = call("lighten set.h5 --labels lowrank rank=2 --out light.h5")
    assert result.code == 0, result.err
    light = condense.load("light.h5")
    assert f"lightened {per_view.name}: {light.labels.nbytes()} bytes of labels" in result.out
    assert "lowrank labels, lossy; a step costs: " in result.out and "  error: centred logits off by " in result.out
    assert "exists; choose another name or give --force" in call("lighten set.h5 --labels hard --out light.h5").err
    assert call("lighten set.h5 --labels hard --out light.h5 --force").code == 0
    assert condense.load("light.h5").labels.kind == "hard"
    result = call("lighten set.h5 --labels topk k=9 --out other.h5")
    assert result.code == 2 and result.err == "condense: k=9: must be 1 to 3, the number of classes\n"
    result = call("labels set.h5 --kinds own,lowrank:rank=2,topk:k=1,hard")
    assert result.code == 0 and "own (per-view)" in result.out and "lowrank:rank=2" in result.out, result.err
    result = call("labels set.h5 --plot a.png")
    assert result.code == 2 and result.err == "condense: --plot a.png: draws accuracies; give --data\n"
    assert not (tmp_path / "other.h5").exists() and not (tmp_path / "a.png").exists()


def test_the_verb_labels_trains_and_draws(per_view, call, real, tmp_path, monkeypatch, three_steps):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(condense.api, "image_task", lambda *words, **options: real)
    per_view.save("set.h5")
    result = call(f"labels set.h5 --data tiny --kinds own,topk:k=1 --network {NETWORK} --runs 2 --plot a.png")
    assert result.code == 0, result.err
    assert "95 % interval" in result.out and "picture: a.png" in result.out and (tmp_path / "a.png").exists()
    result = call("lighten set.h5 --data tiny --labels pool keep=0.5 --out light.h5")
    assert result.code == 0 and "condense evaluate light.h5 --data tiny" in result.out


def test_a_missing_matplotlib_is_found_before_any_work(per_view, call, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    per_view.save("set.h5")
    result = call("labels set.h5 --data nowhere --plot a.png")
    assert result.code == 2 and "pip install 'condense-toolkit[plots]'" in result.err and result.out == ""
