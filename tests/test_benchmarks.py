"""The published steps equal ours where they must, and the scripts run; nothing here is a matter of time."""

import dataclasses
import functools
import importlib
import json

import numpy as np
import pytest
import torch

from condense import networks, rng
from condense.augment import OPERATIONS, make_augmentation
from condense.engine import Run

CPU = torch.device("cpu")


def ended(main, *arguments):
    """The exit code of a script's ``main``."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture
def npz(tiny_colour, tmp_path):
    """The tiny colour task as a file."""
    path = tmp_path / "tiny.npz"
    task = tiny_colour
    np.savez(
        path,
        train_images=task.train.images,
        train_labels=task.train.labels,
        test_images=task.test.images,
        test_labels=task.test.labels,
    )
    return path


# -- the published transcriptions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_published_augmentation_equals_ours(operation):
    from condense.benchmarks.speed.published import same_view, siamese

    augment = make_augmentation(operation)
    images = torch.randn(4, 3, 32, 32, generator=rng.generator("images"))
    for i in range(8):
        views = augment.draw(rng.Draws("views", i), 2, (32, 32))
        ours = augment.apply(images, views, torch.ones(4, dtype=torch.int64))
        torch.testing.assert_close(siamese(images, same_view(views, 1)), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_published_augmentation_draws_from_the_range_of_ours(operation):
    """The smallest and largest numbers of 4,000 draws agree to a fiftieth of their spread; whole numbers exactly."""
    from condense.benchmarks.speed.published import random_view, same_view

    random, views = np.random.default_rng(0), make_augmentation(operation).draw(rng.Draws("range"), 4000, (9, 32))
    theirs = np.array([random_view(random, (operation,), (9, 32))[1] for _ in range(4000)])
    ours = np.array([same_view(views, i)[1] for i in range(4000)], dtype=float)
    for a, b in ((theirs.min(0), ours.min(0)), (theirs.max(0), ours.max(0))):
        slack = 0 if operation in ("crop", "cutout", "flip") else 0.02 * np.ptp(ours, 0)
        assert (np.abs(a - b) <= slack).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_published_augmentation_of_single_images_equals_ours(operation):
    from condense.benchmarks.speed.published import augmented, same_views

    augment = make_augmentation(operation)
    images = torch.randn(8, 3, 9, 32, generator=rng.generator("images"))
    for i in range(4):
        views = augment.draw(rng.Draws("views", i), 8, (9, 32), groups=1)
        ours = augment.apply(images, views)
        torch.testing.assert_close(augmented(images, same_views(views, CPU)), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_published_augmentation_of_single_images_draws_from_the_range_of_ours(operation):
    from condense.benchmarks.speed.published import random_views, same_views

    with rng.seeded("range"):
        theirs = random_views(np.random.default_rng(0), (operation,), 4000, (9, 32), CPU)[1].numpy()
    ours = same_views(make_augmentation(operation).draw(rng.Draws("range"), 4000, (9, 32)), CPU)[1].numpy()
    for a, b in ((theirs.min(0), ours.min(0)), (theirs.max(0), ours.max(0))):
        slack = 0 if operation in ("crop", "cutout", "flip") else 0.02 * np.ptp(ours, 0)
        assert (np.abs(a - b) <= slack).all()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_the_published_network_is_ours(shape):
    """Under one seed they even draw the same weights."""
    from condense.benchmarks.speed.published import convnet, copy_weights

    with rng.seeded("net"):
        theirs = convnet(shape, 10, depth=3, width=16)
    with rng.seeded("net"):
        ours = networks.build_network("convnet-d3-w16-in", shape, 10)
    images = torch.randn(4, *shape, generator=rng.generator("images"))
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)
    with rng.seeded("another"):
        other = networks.build_network("convnet-d3-w16-in", shape, 10)
    copy_weights(other, theirs)
    torch.testing.assert_close(theirs[:-1](images), other.embed(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 0.1)])
def test_the_published_dm_step_equals_ours(tiny_colour, precision, tolerance):
    """The pixels' update of one step with the same draws: its relative difference is that of rounding.

    The median image is held to it; a ReLU that rounding turns may move another by more. In bf16 the real features are
    rounded to 8 bits; with few images their means keep much of that.
    """
    from condense.benchmarks.speed.dm import BENCHMARK
    from condense.benchmarks.speed.measure import Case, difference

    case = Case(tiny_colour, 2, 8, CPU, depth=2, settings={"batch_real": 8}, seed=3)
    gap = difference(BENCHMARK, case, precision)
    assert 0 < gap["median_image"] < tolerance and gap["all"] < 0.1


def test_several_published_dm_steps_equal_ours(tiny_colour):
    """With momentum, given the product's draws step by step; and other draws do not agree."""
    from condense.benchmarks.speed.dm import BENCHMARK
    from condense.benchmarks.speed.measure import Case, distance, drive

    case = Case(tiny_colour, 2, 8, CPU, depth=2, settings={"batch_real": 8, "lr_img": 0.5})
    config = BENCHMARK.config(case, steps=4)
    published, other = (BENCHMARK.published(case, config) for _ in range(2))
    start = published.images.detach().clone()
    run = Run(case.task, case.ipc, case.network, seed=case.seed)
    for index in range(4):
        published.step(BENCHMARK.draws(case, config, run, index))
        other.step()
    update = drive("dm", config, case).images - start
    assert distance(published.images - start, update) < 0.02
    assert distance(other.images - start, update) > 0.1


def test_a_published_dm_step_makes_its_own_draws(tiny_colour):
    from condense.benchmarks.speed.dm import BENCHMARK
    from condense.benchmarks.speed.measure import Case

    case = Case(tiny_colour, 2, 8, CPU, depth=2, settings={"batch_real": 8})
    published = BENCHMARK.published(case, BENCHMARK.config(case))
    before = published.images.detach().clone()
    published.step()
    assert published.loss > 0
    assert torch.isfinite(published.images).all() and not torch.equal(published.images, before)


# -- measuring --------------------------------------------------------------------------------------------------------


def test_a_watched_run_makes_the_products_own_set(tiny):
    """Watching changes nothing, and every step is seen once, with one call after the last."""
    import condense
    from condense.benchmarks.speed.measure import Case, drive
    from condense.registry import METHODS

    case = Case(tiny, 2, 8, CPU, depth=2)
    settings = {"steps": 3, "batch_real": 6}
    seen = []
    config = METHODS.get("dm").config(**settings)
    watched = drive("dm", config, case, lambda run, index: seen.append((index, run.steps_done)))
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]
    made = condense.distill("dm", tiny, 2, network=case.network, precision="fp32", **settings)
    assert torch.equal(watched.images.detach(), made.stored)


def test_pairs():
    from condense.benchmarks.speed.measure import Pairs

    pairs = Pairs([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert pairs.ratios == [2.0, 3.0, 4.0] and pairs.ratio == 3.0
    assert pairs.summary("a", "b")["median_seconds"] == {"a": 4.0, "b": 1.0}


def test_a_disturbed_timing_says_so():
    from condense.benchmarks.speed.measure import Others, disturbance

    share = Others().share()
    assert share is None or share >= 0
    assert disturbance(None) == [] and "trusted" not in disturbance(0.02)[0]
    assert "50 %" in disturbance(0.5)[0] and "not to be trusted" in disturbance(0.5)[0]


# -- scripts ----------------------------------------------------------------------------------------------------------


def test_the_dm_script(npz, tmp_path, capsys):
    from condense.benchmarks.speed import dm, measure

    out = tmp_path / "dm.json"
    sizes = ("--ipc", 1, "--width", 8, "--depth", 2, "--batch-real", 6, "--steps", 2)
    main = functools.partial(measure.main, dm.BENCHMARK)
    assert ended(main, "--data", npz, *sizes, "--device", "cpu", "--json", out) == 0
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    assert "published / condense, median of 2 pairs" in shown and "tiny" in shown
    assert record["schema"] == "condense.speed/1" and len(record["ratios"]) == 2
    assert record["update_difference"]["fp32"]["median_image"] < 1e-4
    for peak in record["peak_memory"].values():
        assert 0 < peak["baseline"] <= peak["host"]


def test_equal_time_leaves_out_what_needs_experts_or_teachers():
    from condense.benchmarks.equal_time import methods

    assert {"dm", "dc", "dance"} <= set(methods())
    assert not {"random", "mtt", "tesla", "ftd", "ast", "datm", "sre2l", "cda", "infer", "rded"} & set(methods())


def test_random_images_are_called_so():
    from condense.benchmarks.speed.measure import describe_data, random_task

    assert describe_data(random_task(2, 3)) == "random uint8 images, 6 of 3x32x32 in 2 classes"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ipc", "0"], "--ipc: must be at least 1"),
        (["--steps", "many"], "--steps: invalid"),
        (["--device", "nonsense"], "--device nonsense: not available"),
        (["--depth", "5"], "too deep"),
    ],
)
def test_mistakes_are_one_line(npz, words, message, capsys):
    from condense.benchmarks.speed import dm, measure

    assert ended(functools.partial(measure.main, dm.BENCHMARK), "--data", npz, "--alone", "condense", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("condense: ") and error.count("\n") == 1


def test_the_students_script(tmp_path, capsys):
    from condense.benchmarks.speed.students import main

    out = tmp_path / "students.json"
    sizes = ("--network", "mlp", "--count", 2, "--ipc", 2, "--classes", 3, "--size", 8, "--steps", 2, "--pairs", 2)
    assert ended(main, *sizes, "--device", "cpu", "--json", out) == 0
    assert "one by one / together" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["ratios"]) == 2


# -- gpu_check --------------------------------------------------------------------------------------------------------


def test_gpu_check_on_a_cpu(tmp_path, capsys):
    from condense.benchmarks.gpu_check.__main__ import STAGES, main

    out = tmp_path / "out"
    assert ended(main, "--device", "cpu", "--tiny", "--out", out) == 0, capsys.readouterr()
    record = json.loads((out / "gpu_check.json").read_text())
    assert record["schema"] == "condense.gpu-check/1" and record["finished"] and not record["failures"]
    assert {name: entry["status"] for name, entry in record["stages"].items()} == {s.name: "passed" for s in STAGES}
    assert all(entry["why"] for entry in record["skipped"])
    table = (out / "gpu_check.txt").read_text()
    assert all(stage.name in table for stage in STAGES)
    cell = record["stages"]["published cells"]["results"]["gpu-dm-digits-ipc1-seed0"]
    assert 0 < cell["distilled"] <= 1 and (out / "cells" / "records" / cell["record"]).exists()

    record["stages"]["draws: device = CPU"]["status"] = "stopped"
    (out / "gpu_check.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert ended(main, "--device", "cpu", "--tiny", "--out", out) == 0
    again = json.loads((out / "gpu_check.json").read_text())
    lines = capsys.readouterr().out.split("\n\n")[0].strip().splitlines()
    assert len(lines) == 1 and "draws: device = CPU" in lines[0]
    assert again["finished"] and again["earlier"] == [record["began"]]
    assert all(entry["status"] == "passed" for entry in again["stages"].values())


@pytest.mark.parametrize(
    ("data", "message"),
    [("cifar10", "--data cifar10: must be NAME=PATH"), ("cifar1=.", "--data cifar1=.: no data of the suite 'gpu'")],
)
def test_gpu_check_names_data_that_it_cannot_use(data, message, tmp_path, capsys):
    from condense.benchmarks.gpu_check.__main__ import main

    assert ended(main, "--device", "cpu", "--tiny", "--out", tmp_path, "--data", data) == 2
    assert message in capsys.readouterr().err


def test_cells_of_the_gpu_check_go_on_where_they_stopped(tmp_path, monkeypatch):
    from condense.benchmarks.gpu_check import cells
    from condense.benchmarks.gpu_check.__main__ import CheckStage, run_stage

    stage = CheckStage("published cells", 1, cells.make_cells)
    check = check_on(tmp_path, minutes=0.5 / 60)
    run_stage(check, stage)
    assert saved(tmp_path)["stages"]["published cells"]["status"] == "stopped"
    check = check_on(tmp_path)
    run_stage(check, stage)
    assert saved(tmp_path)["stages"]["published cells"]["status"] == "passed"


def check_on(tmp_path, minutes=5.0):
    from condense.benchmarks.gpu_check.check import Check

    return Check(CPU, minutes, tmp_path, True)


def saved(tmp_path):
    return json.loads((tmp_path / "gpu_check.json").read_text())


def test_gpu_check_goes_on_after_failures(tmp_path):
    from condense.benchmarks.gpu_check.__main__ import CheckStage, run_stage
    from condense.benchmarks.gpu_check.check import table

    def fail():
        raise RuntimeError("a kernel is missing\nand more")

    def parts(check):
        results = check.each({"bad": fail, "off": lambda: {"error": 1.0, "passed": False}, "good": lambda: {"x": 1}})
        return "three parts", results

    check = check_on(tmp_path)
    run_stage(check, CheckStage("whole", 1, lambda check: fail()))
    assert saved(tmp_path)["stages"]["whole"]["status"] == "failed"
    run_stage(check, CheckStage("parts", 1, parts))
    record = saved(tmp_path)
    assert record["stages"]["parts"]["results"]["good"] == {"x": 1}
    assert [(fault["stage"], fault["part"]) for fault in record["failures"]] == [
        ("whole", ""),
        ("parts", "bad"),
        ("parts", "off"),
    ]
    assert record["failures"][0]["message"] == "RuntimeError: a kernel is missing"
    assert "failed: parts, off: outside its tolerance" in table(record)


def test_gpu_check_stops_in_time_and_keeps_what_is_done(tmp_path):
    import time

    from condense.benchmarks.gpu_check.__main__ import CheckStage, run_stage

    check = check_on(tmp_path, minutes=1.2 / 60)

    def slow(check):
        return "never", check.each({"done": lambda: {"x": 1}, "slow": lambda: time.sleep(60)})

    run_stage(check, CheckStage("slow", 1, slow))
    entry = saved(tmp_path)["stages"]["slow"]
    assert entry["status"] == "stopped" and entry["results"] == {"done": {"x": 1}} and entry["seconds"] < 30
    check.tiny = False
    run_stage(check, CheckStage("late", 20, slow))
    assert saved(tmp_path)["stages"]["late"]["status"] == "skipped"
    assert "needs about 20 s and 0 s are left" in saved(tmp_path)["skipped"][-1]["why"]


def test_gpu_check_records_the_running_stage_before_it_runs(tmp_path):
    from condense.benchmarks.gpu_check.__main__ import CheckStage, run_stage

    def body(check):
        return saved(tmp_path)["stages"]["now"]["status"], None

    check = check_on(tmp_path)
    run_stage(check, CheckStage("now", 1, body))
    assert check.record["stages"]["now"]["summary"] == "running"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_gpu_check_without_a_gpu_is_one_clear_line(tmp_path, capsys):
    from condense.benchmarks.gpu_check.__main__ import main

    assert ended(main, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("condense: --device cuda: there is no CUDA device here") and error.count("\n") == 1


@pytest.mark.gpu
def test_gpu_check_on_cuda(tmp_path):
    from condense.benchmarks.gpu_check.__main__ import main

    code = ended(main, "--minutes", 1, "--out", tmp_path)
    record = saved(tmp_path)
    assert code == 0, record["failures"]
    assert record["finished"] and record["stages"]["networks: device = CPU"]["status"] == "passed"


# -- gradient and attention matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dc", "dsa", "dcc", "datadam"])
def test_the_other_published_steps_equal_ours(name, tiny_colour):
    """One step of each with the same draws, in fp32; a few ReLUs may turn, as DM's test says."""
    from condense.benchmarks.speed.measure import Case, difference

    benchmark = importlib.import_module(f"condense.benchmarks.speed.{name}").BENCHMARK
    case = Case(tiny_colour, 2, 8, CPU, 2, {"batch_real": 6})
    gap = difference(benchmark, case, "fp32")
    assert gap["all"] < 2e-2 and gap["median_image"] < 2e-3


@pytest.mark.parametrize("name", ["dsa", "dcc"])
def test_the_published_network_is_trained_between_its_steps(name, tiny_colour):
    from condense.benchmarks.speed.measure import Case

    benchmark = importlib.import_module(f"condense.benchmarks.speed.{name}").BENCHMARK
    nets = {}
    for inner in (0, 3):
        case = Case(tiny_colour, 2, 8, CPU, 2, {"batch_real": 6, "outer": 2, "inner": inner})
        loop = benchmark.published(case, benchmark.config(case))
        with rng.seeded("published"):
            for number in range(4):
                loop.step()
                nets[inner, number] = loop.net, loop.net[0].weight.detach().clone()
    for inner in (0, 3):
        assert nets[inner, 0][0] is nets[inner, 1][0] is not nets[inner, 2][0] is nets[inner, 3][0]
    assert not torch.equal(nets[0, 0][1], nets[3, 0][1])  # the same random weights, then trained


def test_the_product_and_published_loops_alternate(tiny_colour):
    from condense.benchmarks.speed.dsa import BENCHMARK
    from condense.benchmarks.speed.measure import Case, time_steps

    case = Case(tiny_colour, 2, 8, CPU, 2, {"batch_real": 6, "inner": 1})
    pairs = time_steps(BENCHMARK, case, 3)
    assert len(pairs.a) == len(pairs.b) == 3


# -- trajectory matching and its experts ------------------------------------------------------------------------------


def trajectory_case(task, **settings):
    from condense.benchmarks.speed.measure import Case

    return Case(task, 2, 8, CPU, 2, {"syn_steps": 4, **settings})


def test_the_published_mtt_step_equals_ours(tiny_colour):
    """One graph of all steps against the adjoint: the same gradient but for rounding."""
    from condense.benchmarks.speed.measure import difference
    from condense.benchmarks.speed.mtt import BENCHMARK

    gap = difference(BENCHMARK, trajectory_case(tiny_colour), "fp32")
    assert 0 < gap["median_image"] < 2e-3 and gap["all"] < 2e-2


def test_several_published_mtt_steps_equal_ours(tiny_colour):
    """Pixels and the learned step size, with momentum; and other draws do not agree."""
    from condense.benchmarks.speed.measure import distance, drive
    from condense.benchmarks.speed.mtt import BENCHMARK

    case = trajectory_case(tiny_colour, lr_lr=1e-3, lr_start=0.01)
    config = BENCHMARK.config(case, steps=3)
    published, other = (BENCHMARK.published(case, config) for _ in range(2))
    start = published.images.detach().clone()
    run = Run(case.task, case.ipc, case.network, seed=case.seed)
    for index in range(3):
        published.step(BENCHMARK.draws(case, config, run, index))
        other.step()
    made = drive("mtt", config, case)
    update = made.images.detach() - start
    assert distance(published.images - start, update) < 0.02
    assert distance(other.images - start, update) > 0.1
    assert distance(published.rate - 0.01, made.step_size - 0.01) < 1e-3 and published.rate != 0.01
    assert 0 < published.loss < 2


def test_a_published_graph_that_does_not_fit_is_refused(tiny_colour, monkeypatch):
    from condense.benchmarks.speed.measure import time_steps
    from condense.benchmarks.speed.mtt import BENCHMARK
    from condense.errors import CondenseError

    case = trajectory_case(tiny_colour)
    monkeypatch.setenv("CONDENSE_HOST_MEMORY", "10000")
    with pytest.raises(CondenseError, match="published graph of 4 steps on 6 images does not fit"):
        time_steps(BENCHMARK, case, 1)


@pytest.mark.parametrize("method", ["mtt", "ftd"])
def test_a_published_expert_equals_ours(method, tiny_colour):
    """Four steps from the same weights on the same batches and views; they cross from one epoch to the next."""
    from condense.benchmarks.speed.experts import Ours, published_loop, training_of
    from condense.benchmarks.speed.measure import distance
    from condense.benchmarks.speed.published import convnet, copy_weights, same_views
    from condense.pretraining import make_student
    from condense.training import batch_ids, train

    case = trajectory_case(tiny_colour, expert_batch=16, expert_lr=0.1)
    training = training_of(method, case)
    published, run = published_loop(case, training), Ours(case, training, 1).run
    student = make_student(run, run.task, run.network, "expert", 0)
    copy_weights(student.network, published.net)
    start = torch.nn.utils.parameters_to_vector(published.net.parameters()).detach()
    for step in range(4):
        ids = batch_ids(student.seed, len(tiny_colour.train), 16, step)
        views = training.recipe.augment.draw(rng.Draws(student.seed, "augment", step), len(ids), (8, 8), groups=1)
        labels = torch.from_numpy(tiny_colour.train.labels)[ids]
        published.step(tiny_colour.batch(ids), labels, same_views(views, CPU))
    train([student], dataclasses.replace(training.recipe, steps=4), device=CPU, update=training.update)
    ours = convnet(tiny_colour.shape, tiny_colour.num_classes, depth=2, width=8)
    copy_weights(student.network, ours)
    ends = (torch.nn.utils.parameters_to_vector(net.parameters()).detach() - start for net in (published.net, ours))
    assert distance(*ends) < 1e-3
    assert 0 < published.loss < 10 and 0 <= published.right <= 1


def test_a_published_expert_trains_over_epochs(tiny_colour):
    from condense.benchmarks.speed.experts import published_loop, training_of

    case = trajectory_case(tiny_colour, expert_batch=16)
    expert = published_loop(case, training_of("mtt", case))
    sizes = []
    expert.step = lambda images, labels: sizes.append(len(images))
    expert.train(4)
    whole, rest = divmod(len(tiny_colour.train), 16)
    epoch = [16] * whole + [rest] * bool(rest)
    assert sizes == (epoch * 4)[:4]


@pytest.mark.slow
def test_the_mtt_script(tmp_path, capsys):
    from condense.benchmarks.speed.mtt import main

    out = tmp_path / "mtt.json"
    assert ended(main, "--tiny", "--device", "cpu", "--json", out) == 0
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    assert "published / condense, median of 1 pairs" in shown and "condense / published" in shown
    assert "3 steps of the student" in shown and "real images a class" not in shown
    assert record["syn_steps"] == 3 and record["update_difference"]["fp32"]["all"] < 2e-2
    assert all(0 < peak["baseline"] <= peak["host"] for peak in record["peak_memory"].values())


@pytest.mark.slow
def test_the_sre2l_script(tmp_path, capsys):
    from condense.benchmarks.speed.measure import main
    from condense.benchmarks.speed.sre2l import BENCHMARK

    out = tmp_path / "sre2l.json"
    assert ended(functools.partial(main, BENCHMARK), "--tiny", "--device", "cpu", "--json", out) == 0
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    assert "published / condense, median of 1 pairs" in shown and "real images a class" not in shown
    assert record["update_difference"]["fp32"]["all"] < 1e-3
    assert all(0 < peak["baseline"] <= peak["host"] for peak in record["peak_memory"].values())


def test_the_experts_script(npz, tmp_path, capsys):
    from condense.benchmarks.speed.experts import main

    out = tmp_path / "experts.json"
    assert ended(main, "--tiny", "--data", f"small={npz}", "--device", "cpu", "--methods", "ftd", "--out", out) == 0
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    assert "experts x epochs a minute" in shown and "ours of 2 experts at a time" in shown and "small" in shown
    found = record["methods"]["ftd"]
    assert record["schema"] == "condense.speed/1" and len(found["ratios"]) == 1
    for side, seconds in found["median_seconds"].items():
        epoch = seconds * found["steps_per_epoch"]
        assert found["experts_epochs_per_minute"][side] == pytest.approx(60 / epoch)
        assert found["seconds_for_100x50"][side] == pytest.approx(5000 * epoch)
        assert 0 < found["peak_memory"][side]["baseline"] <= found["peak_memory"][side]["host"]
    assert ended(main, "--methods", "dm", "--out", out) == 2
    assert "--methods dm: mtt or ftd" in capsys.readouterr().err
