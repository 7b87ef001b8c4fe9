"""Everything on a pretended CUDA device against the CPU: values, waits of the host, and what a file keeps."""

import pytest
import torch
from pretended import DeviceError, pretended, reason_to_skip
from test_methods import METHOD_NAMES, SETTINGS

import condense

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


def distil(name, task, device, **changes):
    return condense.distill(name, task, 2, device=device, **{"precision": "fp32", **SETTINGS[name], **changes})


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


@pytest.fixture(params=METHOD_NAMES)
def name(request):
    return request.param


def test_a_method_gives_the_set_of_the_cpu(name, tiny, tmp_path, monkeypatch):
    """Pretraining included: each device has a cache of its own."""
    reference = distil(name, tiny, "cpu")
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path))
    with pretended() as log:
        made = distil(name, tiny, "cuda")
    assert log.launches
    torch.testing.assert_close(made.stored, reference.stored, rtol=1e-4, atol=1e-4)
