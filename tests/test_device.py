"""Everything on a pretended CUDA device against the CPU: values, waits of the host, and what a file keeps."""

import contextlib
import copy
import dataclasses
import functools
import pickle
from types import SimpleNamespace

import h5py
import pytest
import torch
from conftest import Killed, command_line, killed_after, tiny_arrays
from pretended import CUDA, DeviceError, DeviceTensor, pretended, reason_to_skip
from test_methods import METHOD_NAMES, SETTINGS, STORED, has_setting, save_npz

import condense.api
from condense import networks, rng
from condense.augment import make_augmentation
from condense.benchmarks.gpu_check.__main__ import CheckStage, run_stage
from condense.benchmarks.gpu_check.check import Check
from condense.benchmarks.gpu_check.correctness import (
    check_augmentation,
    check_determinism,
    check_draws,
    check_labels,
    check_methods,
    check_networks,
    check_resume,
)
from condense.benchmarks.gpu_check.timing import time_benchmarks
from condense.benchmarks.speed import dm, measure
from condense.device import add_rows, autocast, on_host, pick_device, upload_indices
from condense.engine import CHECKPOINT_FILE, Diverged, ParamGroup, Run
from condense.engine.run import _StepMonitor
from condense.errors import CondenseError
from condense.jobs import read_job, resume
from condense.judge.arms import own_source
from condense.lighten import LIGHTEN_KINDS, lighten
from condense.sets import Formation, SyntheticOptions, SyntheticSet
from condense.training import Student, TrainConfig, train

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


# -- the pretended device itself --------------------------------------------------------------------------------------


def test_the_pretended_device_refuses_what_cuda_refuses(tmp_path):
    with pretended():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for mistake in (
            lambda: there + here,
            lambda: here[there.long()],
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        ):
            with pytest.raises(DeviceError):
                mistake()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        torch.save(there, tmp_path / "there.pt")
        with pytest.raises(DeviceError, match="map_location"):
            torch.load(tmp_path / "there.pt")
        assert torch.equal(torch.load(tmp_path / "there.pt", map_location="cpu"), here)
        assert (there + 1).device.type == "cuda" and (there + torch.tensor(1.0)).is_cuda
    assert not torch.cuda.is_available()


def test_the_pretended_device_counts_launches_waits_and_uploads():
    with pretended() as log:
        x = torch.ones(4).pin_memory().to("cuda", non_blocking=True)
        assert sum(log.uploads.values()) == 1 and not log.waits
        log.clear()
        y = (x * 2 + 1)[1:].view(1, 3)  # views launch nothing
        assert sum(log.launches.values()) == 2 and not log.waits
        assert all(
            key.startswith(("mul @ tests/test_device.py:", "add @ tests/test_device.py:")) for key in log.launches
        )
        log.clear()
        torch.ones(4).to("cuda", non_blocking=True)  # waits, because the memory is not page-locked
        y.sum().item(), y[y > 0], x[torch.tensor([0, 1])], x.cpu(), torch.tensor(1.0, device="cuda")
        assert sum(log.waits.values()) == 6
        log.clear()
        torch.zeros(2, device="cuda").index_add(0, torch.zeros(4, dtype=torch.int64, device="cuda"), x)
        assert sum(log.unrepeatable.values()) == 1


def test_the_pretended_device_casts_as_autocast_for_cuda_does():
    with pretended(), torch.autocast("cuda", torch.bfloat16):
        x = torch.randn(2, 4, 3, device="cuda", requires_grad=True)
        product = x @ torch.randn(3, 5, device="cuda")
        assert product.dtype == torch.bfloat16
        assert torch.nn.functional.group_norm(product, 2).dtype == torch.float32
        product.sum().backward()
        assert x.grad.is_cuda and x.grad.dtype == torch.float32


# -- methods ----------------------------------------------------------------------------------------------------------

STEPS = 4
NEAR_EQUAL = ("dq", "gradmatch", "graphcut", "moderate")
"""Selections in which rounding decides between images of nearly equal gain, or equally far from a median; their images
are not compared."""
SLOW_IN_BF16 = ("dsa", "dcc", "dsac", "ftd", "ast", "tesla", "cda", "lpqld")
"""Methods that compute in bf16 what another one does."""


def settings_of(name):
    return {**SETTINGS[name], **({"steps": STEPS} if has_setting(name, "steps") else {})}


def distil(name, task, device, precision="fp32", **changes):
    return condense.distill(name, task, 2, device=device, precision=precision, **{**settings_of(name), **changes})


@pytest.fixture(scope="module", params=METHOD_NAMES)
def case(request, tmp_path_factory):
    """A method, and its set of a CPU in fp32, made with a cache of its own."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDENSE_CACHE", str(tmp_path_factory.mktemp("cache-of-the-cpu")))
        made = distil(request.param, condense.task(tiny_arrays(), name="tiny"), "cpu")
    return SimpleNamespace(name=request.param, made=made)


@contextlib.contextmanager
def counts_after_steps(log, monkeypatch):
    """Copies of the log's counters after each step, as (loop, step, waits, unrepeatable operations)."""
    after_step, counts = _StepMonitor.after_step, []

    def count(monitor, step, stop):
        ended = after_step(monitor, step, stop)
        counts.append((monitor.run.loop_index, step, log.waits.copy(), log.unrepeatable.copy()))
        return ended

    monkeypatch.setenv("CONDENSE_LOG_SECONDS", "1000000")  # a log line waits for the loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_StepMonitor, "after_step", count)
        yield counts


def test_a_method_gives_the_set_of_the_cpu_and_its_steps_do_not_wait(case, tiny, monkeypatch):
    """In fp32, pretraining included. The first step may fill caches, the second record graphs; the last one writes."""
    with pretended() as log, counts_after_steps(log, monkeypatch) as counts:
        made = distil(case.name, tiny, "cuda")
    assert log.launches
    assert made.stored.shape == case.made.stored.shape
    if case.name not in NEAR_EQUAL:
        torch.testing.assert_close(made.stored, case.made.stored, rtol=1e-4, atol=1e-4)
    assert made.manifest["repeatable"] == "rounding" and case.made.manifest["repeatable"] == "bits"
    if not has_setting(case.name, "steps"):
        return
    early, late = counts[-3], counts[-2]
    assert (early[:2], late[:2]) == ((late[0], STEPS - 2), (late[0], STEPS - 1))
    assert not late[2] - early[2]
    assert not late[3] - early[3]


def test_a_method_in_bf16(case, tiny, request):
    """The set is about as far from that in fp32 as a CPU's in bf16 is."""
    if case.name in SLOW_IN_BF16 and request.config.option.markexpr.startswith("not slow"):
        pytest.skip("slow: another method of its family computes the same in bf16")
    here = distil(case.name, tiny, "cpu", "bf16").stored.float()
    with pretended() as log:
        there = distil(case.name, tiny, "cuda", "bf16").stored.float()
    assert torch.isfinite(there).all()
    assert case.name in ("random", "rs2") or any("bfloat16" in product for product in log.products)
    exact = case.made.stored.float()
    if case.name in NEAR_EQUAL:
        return
    assert (there - exact).norm() <= 1.5 * (here - exact).norm() + 2e-3 * exact.norm()


@pytest.mark.parametrize(
    "name", ["dm", "idc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dc", "datm", "sre2l"))]
)
def test_killed_on_the_device_and_resumed(name, tiny, tmp_path, monkeypatch, capsys):
    """There with the same bits; and the rest of it on a CPU without the device."""
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    save_npz(tiny, tmp_path / "data.npz")
    task = condense.task(str(tmp_path / "data.npz"))
    with pretended():
        whole = distil(name, task, "cuda")
        for part in ("there", "here"):
            with pytest.raises(Killed), killed_after(2):
                distil(name, task, "cuda", run_dir=tmp_path / part, out=tmp_path / f"{part}.h5")
        assert resume(tmp_path / "there").sha256() == whole.sha256()
    with pytest.raises(CondenseError, match=r"here: --device cuda: not available here; use --device cpu"):
        resume(tmp_path / "here")
    shown = command_line(f"resume {tmp_path / 'here'} --device cpu", capsys)
    assert shown.code == 0 and " on pretended, then " in shown.out
    made = condense.load(tmp_path / "here.h5")
    torch.testing.assert_close(made.stored, whole.stored, rtol=1e-4, atol=1e-4)
    assert made.manifest["cost"]["device"].startswith("pretended, then ")
    assert made.manifest["repeatable"] == "rounding"


def test_a_run_on_any_device_goes_on_on_any_other(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    save_npz(tiny, tmp_path / "data.npz")
    task = condense.task(str(tmp_path / "data.npz"))
    with pretended(), pytest.raises(Killed), killed_after(2):
        distil("dm", task, "auto", run_dir=tmp_path / "run", out=tmp_path / "a.h5")
    job = read_job(tmp_path / "run")
    assert job.device == "auto" and job.key() == dataclasses.replace(job, device="cuda").key()
    assert resume(tmp_path / "run").manifest["cost"]["device"].startswith("pretended, then ")


def test_a_checkpoint_of_an_earlier_version_whose_key_has_the_device(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CONDENSE_CHECKPOINT_SECONDS", "0")
    save_npz(tiny, tmp_path / "data.npz")
    task, folder = condense.task(str(tmp_path / "data.npz")), tmp_path / "run"
    with pytest.raises(Killed), killed_after(2):
        distil("dm", task, "cpu", run_dir=folder, out=tmp_path / "a.h5")
    state = torch.load(folder / CHECKPOINT_FILE, weights_only=True)
    torch.save({**state, "config_key": read_job(folder).earlier_key()}, folder / CHECKPOINT_FILE)
    assert resume(folder).sha256() == distil("dm", task, "cpu").sha256()


# -- students, experts, teachers, labels ------------------------------------------------------------------------------

NETWORK = "convnet-d2-w8-in"
AUGMENTATION = make_augmentation("color_crop_cutout_scale_rotate")
PLAIN = TrainConfig(steps=6, batch=4, lr=0.05, momentum=0.9, weight_decay=0.0, augment=AUGMENTATION)


@pytest.fixture
def small(tiny):
    return condense.distill("random", tiny, 2, network=NETWORK, device="cpu")


def students(small, device):
    made = []
    for k in range(3):
        with rng.seeded("student", k):
            net = networks.build_network(NETWORK, small.shape, 3)
        made.append(Student(net, own_source(small, device), k))
    return made


def flat(net):
    return torch.cat([weight.detach().flatten().cpu() for weight in net.state_dict().values()])


@pytest.mark.parametrize("together", [True, False])
def test_students_equal_those_of_the_cpu_and_do_not_wait(small, together):
    reference, waits = students(small, torch.device("cpu")), []
    train(reference, PLAIN, device=torch.device("cpu"))
    with pretended() as log:
        there = students(small, CUDA)
        train(there, PLAIN, device=CUDA, together=together, report=lambda done: waits.append(sum(log.waits.values())))
        for ours, theirs in zip(there, reference):
            torch.testing.assert_close(flat(ours.network), flat(theirs.network), rtol=1e-4, atol=1e-5)
    first = 3 if together else 0  # graphs for both sizes of batches are recorded before
    assert waits[PLAIN.steps - 1] == waits[first]


@pytest.mark.parametrize("kind", ["pool", "per-view", "projector", "soft"])
def test_students_of_other_labels_do_not_wait(kind, small, tiny):
    """Over several epochs, whose views are drawn on the host."""
    few = {name: 8 if kind == "per-view" else 2 for name in ("label_epochs",) if hasattr(LIGHTEN_KINDS[kind][0], name)}
    few |= {"projector_steps": 2} if kind == "projector" else {}
    with rng.seeded("teacher"):
        teacher = networks.build_network("convnet-d2-w8-bn", small.shape, 3).eval()
    light, waits = lighten(small, kind, tiny, teacher, device="cpu", **few), []
    with pretended() as log:
        group = students(light, CUDA)
        train(group, PLAIN, device=CUDA, report=lambda done: waits.append(sum(log.waits.values())))
    assert len(waits) == PLAIN.steps and waits[-1] == waits[0]


def test_evaluate_and_fit(small, tiny, three_steps):
    """Records of the device, whose students are stacked, have the accuracies of the CPU."""
    options = {"networks": NETWORK, "runs": 3, "controls": ["random"], "precision": "fp32", "cache": False}
    record = condense.evaluate(small, tiny, device="cpu", **options)
    net = condense.fit(small, NETWORK, device="cpu")
    with pretended(capability=(7, 0)):  # no bf16
        there = condense.evaluate(small, tiny, device="cuda", **options)
        fitted = condense.fit(small, NETWORK, device="cuda")
    accuracies = [[result["accuracies"] for result in each["results"]] for each in (record, there)]
    assert accuracies[0] == accuracies[1]
    torch.testing.assert_close(flat(fitted), flat(net), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(weight, DeviceTensor) for weight in fitted.parameters())


def arrays(path):
    """All arrays of floats in an HDF5 file, by name."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return {name: torch.from_numpy(array) for name, array in found.items() if array.dtype.kind == "f"}


@pytest.mark.parametrize("train_file", ["experts", "teachers"])
def test_pretrained_networks_equal_those_of_the_cpu(train_file, tiny, tmp_path):
    few = {"count": 2, "epochs": 3, "precision": "fp32", "seed": 1}
    if train_file == "experts":
        few |= {"network": NETWORK, "method": "mtt", "dtype": "float32"}
    else:
        few |= {"networks": "convnet-d2-w8-bn"}
    make = getattr(condense.api, train_file)
    make(tiny, device="cpu", out=tmp_path / "here.h5", **few)
    with pretended():
        make(tiny, device="cuda", out=tmp_path / "there.h5", **few)
    here, there = arrays(tmp_path / "here.h5"), arrays(tmp_path / "there.h5")
    assert here and here.keys() == there.keys()
    for name, array in here.items():
        torch.testing.assert_close(there[name], array, rtol=1e-4, atol=1e-4)


# -- the check of CUDA machines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [
        check_labels,  # of every kind of lighten
        check_augmentation,
        check_draws,
        pytest.param(check_networks, marks=pytest.mark.slow),
        pytest.param(check_methods, marks=pytest.mark.slow),
        pytest.param(check_determinism, marks=pytest.mark.slow),
        pytest.param(check_resume, marks=pytest.mark.slow),
        pytest.param(functools.partial(time_benchmarks, ipc=2), marks=pytest.mark.slow),
    ],
)
def test_a_stage_of_the_gpu_check(stage, tmp_path):
    with pretended():
        check = Check(torch.device("cuda"), 10, tmp_path, True)
        run_stage(check, CheckStage("stage", 1, stage))
    assert check.record["stages"]["stage"]["status"] == "passed", check.record["failures"]
    assert all(skipped["why"] == "makes no steps" for skipped in check.record["skipped"])


# -- what has to hold on CUDA in parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3])
def test_tiles_are_enlarged_as_on_the_cpu_and_their_gradient_repeats(factor):
    stored, weights = torch.rand(4, 3, 8, 8), torch.rand(4 * factor**2, 3, 8, 8)

    def outputs(device):
        images = stored.to(device).requires_grad_()
        decoded, ids = Formation(factor)(images, torch.arange(4, device=device))
        (gradient,) = torch.autograd.grad((decoded.square() * weights.to(device)).sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), images)
        return [x.detach().cpu() for x in (decoded, gradient, second, ids)]

    here = outputs("cpu")
    with pretended() as log:
        there = outputs("cuda")
        assert not log.unrepeatable
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


def test_rows_are_added_in_a_fixed_order():
    rows, values = torch.tensor([0, 2, 0, 0]), torch.rand(4, 3)
    here = torch.ones(3, 3)
    add_rows(here, rows, values)
    with pretended() as log:
        there = torch.ones(3, 3, device="cuda")
        add_rows(there, rows.cuda(), values.cuda())
        assert not log.unrepeatable
        torch.testing.assert_close(there.cpu(), here)
    torch.testing.assert_close(here, torch.ones(3, 3).index_add(0, rows, values))


def test_uploaded_indices_remember_their_copy_on_the_host():
    numbers = torch.arange(4)
    with pretended() as log:
        there = upload_indices(numbers, CUDA)
        assert on_host(there) is numbers and not log.waits
        back = upload_indices(there, torch.device("cpu"))
        assert on_host(back).device.type == "cpu" and torch.equal(back, numbers)
        assert torch.equal(on_host(there + 1), numbers + 1) and len(log.waits) == 2


@pytest.mark.parametrize("norm", ["in", "gn", "ln", "bn"])
def test_norms_and_pools_keep_bf16(norm):
    """Their results are as near to float32 as those of a CPU under autocast."""
    images = torch.randn(16, 3, 8, 8)
    with rng.seeded("net"):
        net = networks.build_network(f"convnet-d2-w16-{norm}", (3, 8, 8), 4)
        torch.manual_seed(0)
        for module in net.norms:
            torch.nn.init.normal_(module.weight, 1, 0.2), torch.nn.init.normal_(module.bias, 0, 0.2)

    def outputs(device, precision):
        there, kinds, images_there = copy.deepcopy(net).to(device), {}, images.to(device)
        for name, module in there.named_modules():
            if not name.startswith("classify") and not list(module.children()) and name:
                module.register_forward_hook(lambda module, _, made, name=name: kinds.update({name: made.dtype}))
        with torch.no_grad(), autocast(torch.device(device), precision):
            return there.embed(images_there).float().cpu(), set(kinds.values())

    exact, _ = outputs("cpu", "fp32")
    here, _ = outputs("cpu", "bf16")
    with pretended():
        there, kinds = outputs("cuda", "bf16")
    assert kinds == {torch.bfloat16}
    assert (there - exact).norm() <= 1.5 * (here - exact).norm() <= 0.03 * exact.norm()


def test_a_transform_is_uploaded_once_and_stays_out_of_other_processes(tiny):
    with pretended() as log:
        there = tiny.transform.to("cuda")
        log.clear()
        assert tiny.transform.to("cuda") is there and not log.waits
        assert there.to("cuda:0") is there
        copied = pickle.loads(pickle.dumps(tiny.transform))
    assert not copied._elsewhere and torch.equal(copied.mean, tiny.transform.mean)


def test_peak_memory_is_that_of_the_run(tiny, monkeypatch):
    resets = []
    with pretended():
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: resets.append(device.type))
        made = distil("dm", tiny, "cuda")
        monkeypatch.undo()
    assert resets == ["cuda"] and made.manifest["cost"]["peak_memory"]["device"] == 1 << 20


def test_stacked_students_keep_the_precision_of_a_cpu(small):
    """vmap would leave autocast out there."""
    cpu, trained = torch.device("cpu"), []
    for together in (True, False):
        trained.append(students(small, cpu))
        train(trained[-1], PLAIN, device=cpu, precision="bf16", together=together)
    for stacked, alone in zip(*trained):
        assert torch.equal(flat(stacked.network), flat(alone.network))


def test_infer_keeps_what_it_has_learned_on_the_device(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(_StepMonitor, "_check_saturation", fail_with(Diverged("diverged here")))
    with pretended(), pytest.raises(CondenseError, match="diverged here, written to"):
        distil("infer", tiny, "cuda", out=tmp_path / "a.h5")
    assert len(condense.load(tmp_path / "a.h5").stored) == STORED["infer"]


def fail_with(fault):
    def fail(*_):
        raise fault

    return fail


def test_a_failed_comparison_loses_no_times(tiny, monkeypatch):
    """And images in the space of pixels are compared on their device."""
    monkeypatch.setattr(measure, "difference", fail_with(RuntimeError("no reference")))
    gaps = measure.differences(dm.BENCHMARK, None, ["fp32", "bf16"])
    assert gaps == {kind: {"failed": "RuntimeError: no reference"} for kind in ("fp32", "bf16")}
    monkeypatch.undo()
    drive = measure.drive

    def drive_in_pixels(name, config, case):
        synthetic = drive(name, config, case)
        synthetic.tensors["images"] = case.task.to(case.device).transform.inverse(synthetic.images.detach())
        synthetic.space = "pixel"
        return synthetic

    monkeypatch.setattr(measure, "drive", drive_in_pixels)
    with pretended():
        case = measure.Case(tiny, 2, 8, torch.device("cuda"), depth=2, settings={"batch_real": 6})
        assert measure.difference(dm.BENCHMARK, case, "fp32")["all"] < 1e-3


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("word", ["auto", "cuda"])
def test_a_process_of_torchrun_opens_no_context_but_on_its_own_gpu(word, second_of_two, monkeypatch):
    chosen = []
    with pretended() as log:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(
            torch.cuda, "set_device", lambda number: chosen.append((number, sum(log.launches.values())))
        )
        device = pick_device(word)
        monkeypatch.undo()
    assert device == torch.device("cuda") and chosen == [(1, 0)]  # before anything was launched


def test_torchrun_takes_no_numbered_gpu_and_no_more_processes_than_gpus(second_of_two):
    with pretended():
        with pytest.raises(CondenseError, match="--device cuda:1: torchrun gives each process a GPU of its own"):
            pick_device("cuda:1")
        with pytest.raises(CondenseError, match="process 2 on this machine, which has 1 GPUs; use --nproc-per-node 1"):
            pick_device("cuda")


def test_ranks_agree_once_in_a_step_and_wait_for_no_device(tiny, monkeypatch):
    """On when to stop, save and log; by a number of the host."""
    sent = []

    def broadcast(tensor, source):
        sent.append(tensor.device.type)

    with pretended():
        monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
        run = Run(tiny, 2, NETWORK, device=torch.device("cuda"), quiet=True, minutes=10)
        run.ranks.world_size = 2
        synthetic = SyntheticSet.create(tiny, 2, SyntheticOptions(), seed=0, device=run.device)
        for step in run.optimise(synthetic, 5, images=ParamGroup(lr=0.1)):
            step.minimise(synthetic.images.square().sum())
        monkeypatch.undo()
    assert sent == ["cpu"] * 6  # one before the first step
