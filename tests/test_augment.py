"""Transforms against closed forms, and every augmentation against loops written from the published table."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condense import augment
from condense.augment import (
    OPERATIONS,
    Augmentation,
    AugmentationParameters,
    CropViews,
    ImagePolicy,
    ViewRule,
    make_augmentation,
    siamese,
)
from condense.augment import views as views_module
from condense.data import ZCA, Standardise, transform_from_arrays
from condense.errors import CondenseError
from condense.rng import Draws, generator, seeded

ALL = "color_crop_cutout_flip_scale_rotate"


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator("test", *shape), dtype=torch.float64).to(dtype)


def only(op: str, p: AugmentationParameters) -> AugmentationParameters:
    """The same parameters with ``op`` as the drawn operation of every row."""
    return dataclasses.replace(p, operation=torch.full((len(p),), OPERATIONS.index(op)))


def same(a: AugmentationParameters, b: AugmentationParameters) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)[1:])


# Transforms -----------------------------------------------------------------------------------------------------------


def test_standardise() -> None:
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    transform = Standardise(mean, std)
    x = torch.rand(2, 4, 3, 5, 6, generator=generator("pixels"))
    z = transform(x)
    for c in range(3):
        torch.testing.assert_close(z[:, :, c], (x[:, :, c] - mean[c]) / std[c])
    torch.testing.assert_close(transform.inverse(z), x)
    assert transform(x.bfloat16()).dtype == torch.bfloat16 and transform(x.double()).dtype == torch.float64
    loaded = transform_from_arrays("standardise", transform.arrays(), (3, 5, 6))
    assert torch.equal(loaded(x), z) and torch.equal(transform.to("cpu")(x), z)


def test_zca_is_the_closed_form() -> None:
    # Correlated pixels, so that whitening has something to do.
    x = (noise(60, 18) @ noise(18, 18) / 12 + 0.5).reshape(60, 2, 3, 3)
    transform = ZCA.fit(x)
    flat = x.reshape(60, 18).numpy()
    mean = flat.mean(0)
    s, u = np.linalg.eigh(np.cov(flat, rowvar=False))  # np.cov is the unbiased one
    whitening = u @ np.diag((s + 0.1) ** -0.5) @ u.T
    expected = ((flat - mean) @ whitening).reshape(60, 2, 3, 3)
    np.testing.assert_allclose(transform(x).numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(transform.inverse_matrix.numpy(), u @ np.diag((s + 0.1) ** 0.5) @ u.T, atol=2e-6)
    torch.testing.assert_close(transform.inverse(transform(x)), x, atol=2e-6, rtol=0)
    assert np.cov(transform(x).reshape(60, 18).numpy(), rowvar=False).max() < 1


def test_zca_round_trip_shapes_and_file() -> None:
    x = torch.rand(40, 3, 4, 4, generator=generator("pixels"))
    transform = ZCA.fit(x)
    z = transform(x)
    torch.testing.assert_close(transform.inverse(z), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(transform(x.reshape(2, 20, 3, 4, 4)), z.reshape(2, 20, 3, 4, 4))
    torch.testing.assert_close(transform(x[0]), z[0])
    assert transform(x.bfloat16()).dtype == torch.bfloat16
    arrays = transform.arrays()
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        "mean": ((48,), np.float32),
        "matrix": ((48, 48), np.float32),
        "inverse": ((48, 48), np.float32),
    }
    loaded = transform_from_arrays("zca", arrays, (3, 4, 4))
    assert isinstance(loaded, ZCA) and loaded.shape == (3, 4, 4)
    assert torch.equal(loaded(x), z) and torch.equal(transform.to("cpu").inverse(z), transform.inverse(z))


def test_transform_errors() -> None:
    good = {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)}
    with pytest.raises(CondenseError, match="did you mean 'zca'"):
        transform_from_arrays("zcaa", good, (3, 4, 4))
    with pytest.raises(CondenseError, match="lacks its array 'std'"):
        transform_from_arrays("standardise", {"mean": good["mean"]}, (3, 4, 4))
    for bad in (np.ones(2, np.float32), np.ones(3, np.int64), np.full(3, np.nan, np.float32), np.zeros(3, np.float32)):
        with pytest.raises(CondenseError, match="'std' must be"):
            transform_from_arrays("standardise", {**good, "std": bad}, (3, 4, 4))
    with pytest.raises(ValueError, match="std above 0"):
        Standardise(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="matrices"):
        ZCA(torch.zeros(12), torch.eye(12), torch.eye(11), (3, 2, 2))
    with pytest.raises(TypeError, match="divide uint8 pixels by 255"):
        Standardise(torch.zeros(3), torch.ones(3))(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_import_does_not_pull_in_kornia() -> None:
    code = "import sys, condense.augment; assert 'kornia' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# One operation at a time, against loops -------------------------------------------------------------------------------


def bilinear(image: Tensor, matrix: list[list[float]], align_corners: bool) -> Tensor:
    """Output pixel -> [-1, 1]^2 -> matrix -> input pixel -> its four neighbours, zeros outside."""
    h, w = image.shape[1:]
    out = torch.zeros_like(image)
    for y in range(h):
        for x in range(w):
            if align_corners:
                nx, ny = 2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1
            else:
                nx, ny = (2 * x + 1) / w - 1, (2 * y + 1) / h - 1
            sx = matrix[0][0] * nx + matrix[0][1] * ny
            sy = matrix[1][0] * nx + matrix[1][1] * ny
            if align_corners:
                px, py = (sx + 1) / 2 * (w - 1), (sy + 1) / 2 * (h - 1)
            else:
                px, py = ((sx + 1) * w - 1) / 2, ((sy + 1) * h - 1) / 2
            for i in (math.floor(py), math.floor(py) + 1):
                for j in (math.floor(px), math.floor(px) + 1):
                    if 0 <= i < h and 0 <= j < w:
                        out[:, y, x] += (1 - abs(py - i)) * (1 - abs(px - j)) * image[:, i, j]
    return out


def literal(op: str, image: Tensor, p: AugmentationParameters, row: int, align_corners: bool = True) -> Tensor:
    """The published table for one image (C,H,W)."""
    h, w = image.shape[1:]
    out = torch.zeros_like(image)
    if op == "color":
        x = image + p.brightness[row].double()
        m = x.mean(0, keepdim=True)
        x = (x - m) * p.saturation[row].double() + m
        m = x.mean()
        return (x - m) * p.contrast[row].double() + m
    if op == "crop":
        dy, dx = p.shift[row].tolist()
        for i in range(h):
            for j in range(w):
                if 0 <= i + dy < h and 0 <= j + dx < w:
                    out[:, i, j] = image[:, i + dy, j + dx]
        return out
    if op == "cutout":
        out = image.clone()
        tall, wide = int(0.5 * h + 0.5), int(0.5 * w + 0.5)
        cy, cx = p.centre[row].tolist()
        for i in range(tall):
            for j in range(wide):
                out[:, min(max(i + cy - tall // 2, 0), h - 1), min(max(j + cx - wide // 2, 0), w - 1)] = 0
        return out
    if op == "flip":
        return image[:, :, list(range(w - 1, -1, -1))] if p.mirrored[row] else image
    if op == "scale":
        sx, sy = p.zoom[row].tolist()
        return bilinear(image, [[sx, 0], [0, sy]], align_corners)
    theta = float(p.angle[row]) * math.pi / 180
    return bilinear(image, [[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]], align_corners)


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (14, 10)])
@pytest.mark.parametrize("op", OPERATIONS)
def test_operation_is_the_published_one(op: str, size: tuple[int, int]) -> None:
    x = noise(5, 3, *size)
    for align_corners in (True, False) if op in ("scale", "rotate") else (True,):
        augmentation = make_augmentation(op, align_corners=align_corners)
        p = augmentation.draw(Draws("table", op), 5, size)
        expected = torch.stack([literal(op, x[i], p, i, align_corners) for i in range(5)])
        torch.testing.assert_close(augmentation.apply(x, p), expected, atol=1e-12, rtol=0)
        # All images on one row take the short cuts.
        rows = torch.full((5,), 3)
        expected = torch.stack([literal(op, x[i], p, 3, align_corners) for i in range(5)])
        torch.testing.assert_close(augmentation.apply(x, p, rows), expected, atol=1e-12, rtol=0)


def test_color_of_grey_images() -> None:
    x = noise(2, 1, 6, 6)
    p = make_augmentation("color").draw(Draws("grey"), 2, (6, 6))
    expected = torch.stack([literal("color", x[i], p, i) for i in range(2)])
    torch.testing.assert_close(make_augmentation("color").apply(x, p), expected)


def test_cutout_at_the_borders() -> None:
    x, augmentation = torch.ones(3, 1, 8, 8), make_augmentation("cutout")
    p = augmentation.draw(Draws("border"), 3, (8, 8))
    p = dataclasses.replace(p, centre=torch.tensor([[0, 0], [8, 8], [4, 4]]))
    assert (augmentation.apply(x, p) == 0).sum((1, 2, 3)).tolist() == [4, 4, 16]


def test_align_corners_matters_only_to_rotate_where_not_square() -> None:
    for op, size, equal in (("scale", (8, 16), True), ("rotate", (8, 8), True), ("rotate", (8, 16), False)):
        x = noise(2, 3, *size)
        p = make_augmentation(op).draw(Draws("corners"), 2, size)
        one, other = (make_augmentation(op, align_corners=choice).apply(x, p) for choice in (True, False))
        assert torch.allclose(one, other, atol=1e-12) == equal


# Draws ----------------------------------------------------------------------------------------------------------------


def test_ranges() -> None:
    p = make_augmentation(ALL).draw(Draws("ranges"), 20_000, (32, 28))
    for values, low, high in (
        (p.brightness, -0.5, 0.5),
        (p.saturation, 0, 2),
        (p.contrast, 0.5, 1.5),
        (p.zoom[:, 0], 1 / 1.2, 1.2),
        (p.zoom[:, 1], 1 / 1.2, 1.2),
        (p.angle, -15, 15),
    ):
        width = high - low
        assert low <= values.min() < low + 0.01 * width and high - 0.01 * width < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * width
    for axis, size in enumerate((32, 28)):
        assert p.shift[:, axis].unique().tolist() == list(range(-4, 5))
        assert p.centre[:, axis].unique().tolist() == list(range(size + 1))
    assert abs(p.mirrored.double().mean() - 0.5) < 0.02
    # 18 pixels: a square of odd side 9 has its centre on a pixel.
    odd = make_augmentation("cutout").draw(Draws("odd"), 2000, (18, 64))
    assert odd.centre[:, 0].unique().tolist() == list(range(18))
    assert odd.shift[:, 1].unique().tolist() == list(range(-8, 9))
    columns = torch.stack([p.brightness, p.saturation, p.contrast, *p.zoom.T, p.angle, *p.shift.T, *p.centre.T])
    assert (torch.corrcoef(columns) - torch.eye(len(columns))).abs().max() < 0.04


@pytest.mark.parametrize("ops", [ALL, "crop_cutout_rotate"])
def test_lottery_is_uniform(ops: str) -> None:
    augmentation = make_augmentation(ops)
    drawn = augmentation.draw(Draws("lottery"), 6000, (8, 8)).operation
    counts = [(drawn == OPERATIONS.index(op)).sum().item() for op in augmentation.ops]
    share = 1 / len(counts)
    assert sum(counts) == 6000
    assert all(abs(count - 6000 * share) < 5 * math.sqrt(6000 * share * (1 - share)) for count in counts)


def test_draws_replay_and_do_not_depend_on_the_number_of_rows() -> None:
    augmentation, before = make_augmentation(ALL), torch.random.get_rng_state()
    p = augmentation.draw(Draws(0, "augment", 7), 10, (32, 32))
    assert same(p, augmentation.draw(Draws(0, "augment", 7), 10, (32, 32)))
    assert same(p[:4], augmentation.draw(Draws(0, "augment", 7), 4, (32, 32)))
    assert not same(p, augmentation.draw(Draws(0, "augment", 8), 10, (32, 32)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_golden_draws() -> None:
    """Runs are only resumed to the bit while these stay."""
    p = make_augmentation(ALL).draw(Draws(0, "golden"), 3, (32, 32))
    assert p.operation.tolist() == [4, 3, 4]
    assert p.shift.tolist() == [[4, -4], [-1, -4], [-4, 4]]
    assert p.centre.tolist() == [[25, 3], [31, 13], [30, 8]]
    assert p.mirrored.tolist() == [True, False, True]
    for name, expected in (
        ("brightness", [-0.0064, 0.4631, -0.3626]),
        ("saturation", [0.0737, 1.0213, 1.7703]),
        ("contrast", [0.6843, 0.7182, 0.9900]),
        ("zoom", [[0.9341, 1.1570], [0.9819, 1.0789], [0.9189, 0.9648]]),
        ("angle", [4.7555, -8.2965, -6.7322]),
    ):
        np.testing.assert_allclose(getattr(p, name).numpy(), expected, atol=6e-5)


def test_groups_share_the_operation_and_nothing_else() -> None:
    augmentation = make_augmentation(ALL)
    one = augmentation.draw(Draws("groups"), 24, (8, 8), groups=1)
    assert len(one.operation.unique()) == 1 and len(one.angle.unique()) == 24
    blocks = augmentation.draw(Draws("groups"), 24, (8, 8), groups=6).operation.reshape(6, 4)
    assert (blocks == blocks[:, :1]).all() and len(blocks.unique()) > 1
    each = augmentation.draw(Draws("groups"), 24, (8, 8))
    assert torch.equal(each.operation[::4], blocks[:, 0]) and torch.equal(each.angle, one.angle)
    firsts = [augmentation.draw(Draws(step), 8, (8, 8), groups=1).operation[0].item() for step in range(60)]
    assert set(firsts) == set(range(6))
    for groups in (0, 5):
        with pytest.raises(ValueError, match="24 rows"):
            augmentation.draw(Draws("groups"), 24, (8, 8), groups=groups)


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dsa", "flip-always", "idc", "dc"])
def test_siamese_branches_get_the_same(variant: str) -> None:
    augmentation = make_augmentation(ALL, variant)
    x = noise(12, 3, 8, 8)
    real_labels, labels = torch.arange(12) // 2, torch.tensor([5, 0, 3])
    p = augmentation.draw(Draws("siamese", variant), 6, (8, 8))
    real = augmentation.apply(x, p, real_labels)
    synthetic = augmentation.apply(x[[11, 0, 6]], p, labels)
    torch.testing.assert_close(synthetic, real[[11, 0, 6]], atol=1e-12, rtol=0)
    # Every image of a class gets what any other would: two equal images stay equal.
    twins = x[::2].repeat_interleave(2, 0)
    changed = augmentation.apply(twins, p, real_labels)
    torch.testing.assert_close(changed[::2], changed[1::2], atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", ["dsa", "flip-always", "idc", "dc"])
def test_chunks_and_order_do_not_matter(variant: str) -> None:
    augmentation = make_augmentation(ALL, variant)
    x = noise(40, 3, 8, 8, dtype=torch.float32)
    labels = Draws("labels").integers(10, 40)
    p = augmentation.draw(Draws("chunks"), 10, (8, 8))
    whole = augmentation.apply(x, p, labels)
    for chunk in (slice(0, 7), slice(7, 40), slice(3, 4), torch.tensor([30, 2, 17])):
        torch.testing.assert_close(augmentation.apply(x[chunk], p, labels[chunk]), whole[chunk], atol=1e-6, rtol=0)
    for i in range(10):
        mine = labels == i
        torch.testing.assert_close(augmentation.apply(x[mine], p, labels[mine]), whole[mine], atol=1e-6, rtol=0)
    assert torch.equal(augmentation.apply(x, p, labels), whole)
    assert torch.equal(augmentation.apply(x[:10], p, torch.arange(10)), augmentation.apply(x[:10], p))


def test_mixed_batch_is_each_images_own_operation() -> None:
    augmentation = make_augmentation(ALL)
    x = noise(24, 3, 8, 8)
    p = augmentation.draw(Draws("mixed"), 24, (8, 8))
    assert len(p.operation.unique()) == 6
    expected = torch.stack([literal(OPERATIONS[p.operation[i]], x[i], p, i) for i in range(24)])
    torch.testing.assert_close(augmentation.apply(x, p), expected, atol=1e-12, rtol=0)


def test_flip_always_flips_first() -> None:
    augmentation = make_augmentation(ALL, "flip-always")
    x = noise(64, 3, 8, 8)
    p = augmentation.draw(Draws("flip-always"), 64, (8, 8))
    assert set(p.operation.tolist()) == {0, 1, 2, 4, 5}
    expected = make_augmentation(ALL).apply(make_augmentation("flip").apply(x, only("flip", p)), p)
    torch.testing.assert_close(augmentation.apply(x, p), expected)
    flips = make_augmentation("flip", "flip-always")
    p = flips.draw(Draws("flip-always"), 64, (8, 8))
    assert torch.equal(flips.apply(x, p)[p.mirrored], x[p.mirrored].flip(3))
    assert torch.equal(flips.apply(x, p)[~p.mirrored], x[~p.mirrored])


def test_idc_order() -> None:
    augmentation = make_augmentation(ALL, "idc")
    x = noise(32, 3, 8, 8)
    p = augmentation.draw(Draws("idc"), 32, (8, 8))
    assert set(p.operation.tolist()) == {OPERATIONS.index(op) for op in ("crop", "scale", "rotate")}
    expected = make_augmentation("color").apply(make_augmentation("flip").apply(x, only("flip", p)), only("color", p))
    expected = make_augmentation("cutout").apply(make_augmentation(ALL).apply(expected, p), only("cutout", p))
    torch.testing.assert_close(augmentation.apply(x, p), expected)

    matching = make_augmentation("color_crop_cutout", "idc")  # IDC's own string
    p = matching.draw(Draws("idc"), 32, (8, 8))
    expected = make_augmentation("crop").apply(make_augmentation("color").apply(x, only("color", p)), only("crop", p))
    torch.testing.assert_close(matching.apply(x, p), make_augmentation("cutout").apply(expected, only("cutout", p)))

    always = make_augmentation("color_cutout", "idc")
    p = always.draw(Draws("idc"), 32, (8, 8))
    expected = make_augmentation("cutout").apply(
        make_augmentation("color").apply(x, only("color", p)), only("cutout", p)
    )
    assert torch.equal(always.apply(x, p), expected)


def test_the_evaluation_of_dc_draws_wider_ranges_for_each_image() -> None:
    augmentation = make_augmentation("crop_scale_rotate", "dc")
    p = augmentation.draw(Draws("dc"), 3000, (28, 28), groups=1)
    counts = torch.bincount(p.operation, minlength=6)
    assert counts[[1, 4, 5]].min() > 900 and int(counts.sum()) == 3000  # also within a training batch
    sizes = 1 / p.zoom
    assert 0.8 <= float(sizes.min()) < 0.81 and 1.19 < float(sizes.max()) <= 1.2
    assert float(sizes.mean()) == pytest.approx(1.0, abs=0.01)
    assert 44 < float(p.angle.max()) < 45 and -45 <= float(p.angle.min()) < -44


@pytest.mark.parametrize("variant", ["dsa", "flip-always", "idc", "dc"])
def test_mirror_false_never_flips(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    augmentation = make_augmentation(ALL, variant, mirror=False)
    assert "flip" not in augmentation.ops
    p = augmentation.draw(Draws("mirror"), 500, (8, 8))
    assert OPERATIONS.index("flip") not in p.operation
    monkeypatch.setattr(siamese, "_flip", None)
    augmentation.apply(noise(500, 1, 8, 8), p)


def test_no_augmentation_is_the_identity() -> None:
    x = noise(2, 3, 8, 8)
    for augmentation in (
        make_augmentation(""),
        make_augmentation("none"),
        make_augmentation("None", "idc"),
        make_augmentation("flip", mirror=False),
    ):
        assert augmentation.ops == ()
        assert augmentation.apply(x, augmentation.draw(Draws("identity"), 2, (8, 8))) is x
    assert make_augmentation(ALL).apply(x[:0], make_augmentation(ALL).draw(Draws("empty"), 0, (8, 8))).shape == (
        0,
        3,
        8,
        8,
    )


def test_mistakes_are_named() -> None:
    with pytest.raises(CondenseError, match=r"augment=.*: unknown 'colour'; did you mean 'color'"):
        make_augmentation("colour_crop")
    with pytest.raises(CondenseError, match="augment_variant=flip_always: unknown; did you mean 'flip-always'"):
        make_augmentation(ALL, "flip_always")
    with pytest.raises(CondenseError, match="'crop' is listed twice"):
        Augmentation(("crop", "crop"))
    p = make_augmentation(ALL).draw(Draws("mistakes"), 4, (8, 8))
    with pytest.raises(ValueError, match="5 images need as many rows, not 4"):
        make_augmentation(ALL).apply(noise(5, 3, 8, 8), p)
    with pytest.raises(ValueError, match="parameters for images of"):
        make_augmentation(ALL).apply(noise(4, 3, 8, 9), p)


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", [*OPERATIONS, ALL])
def test_gradient(ops: str) -> None:
    augmentation = make_augmentation(ops)
    p = augmentation.draw(Draws("gradient", 2), 2, (8, 8))
    x = noise(2, 3, 8, 8).requires_grad_()
    for rows in (None, torch.tensor([1, 1])):
        assert torch.autograd.gradcheck(lambda x, rows=rows: augmentation.apply(x, p, rows), (x,), fast_mode=True)


@pytest.mark.parametrize("variant", ["flip-always", "idc"])
def test_gradient_of_variants(variant: str) -> None:
    augmentation = make_augmentation(ALL, variant)
    p = augmentation.draw(Draws("gradient"), 6, (8, 8))
    x = noise(6, 3, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augmentation.apply(x, p), (x,), fast_mode=True)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
def test_gathered_adjoint_of_resampling(size: tuple[int, int], align_corners: bool) -> None:
    """What runs on a GPU, against torch's own derivative of grid_sample."""
    p = make_augmentation("scale_rotate").draw(Draws("adjoint"), 6, size)
    theta = torch.deg2rad(p.angle.double())
    turn = torch.stack([theta.cos(), -theta.sin(), theta.sin(), theta.cos()], 1).reshape(6, 2, 2)
    for matrix in (turn, torch.diag_embed(p.zoom.double()), turn @ torch.diag_embed(p.zoom.double())):
        x = noise(6, 3, *size).requires_grad_()
        grid = F.affine_grid(F.pad(matrix, (0, 1)), list(x.shape), align_corners=align_corners)
        y = F.grid_sample(x, grid, align_corners=align_corners)
        g = noise(6, 3, *size).flip(0)
        (expected,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(siamese._resample_adjoint(g, matrix, align_corners), expected, atol=1e-11, rtol=0)


def test_gpu_route_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    augmentation = make_augmentation("crop_scale_rotate")
    p = augmentation.draw(Draws("route"), 8, (8, 8))
    x = noise(8, 3, 8, 8).requires_grad_()
    y = augmentation.apply(x, p)
    (expected,) = torch.autograd.grad(y, x, y.detach())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(siamese, "send_like", lambda x, images, dtype=None: x if dtype is None else x.to(dtype))
    z = augmentation.apply(x, p)
    assert torch.equal(z, y)
    torch.testing.assert_close(torch.autograd.grad(z, x, y.detach())[0], expected, atol=1e-11, rtol=0)
    assert torch.autograd.gradgradcheck(lambda x: augmentation.apply(x, p) ** 2, (x,), fast_mode=True)


def test_second_derivatives_where_torch_has_them() -> None:
    augmentation = make_augmentation("color_crop_cutout_flip")
    p = augmentation.draw(Draws("second"), 8, (6, 6))
    x = noise(8, 3, 6, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: augmentation.apply(x, p) ** 2, (x,), fast_mode=True)


@pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="torch 2.7: torch.func fails inside such a Function")
def test_functional_gradient_agrees() -> None:
    augmentation = make_augmentation(ALL)
    p = augmentation.draw(Draws("functional"), 12, (8, 8))
    x = noise(12, 3, 8, 8)

    def loss(x: Tensor) -> Tensor:
        return augmentation.apply(x, p).square().sum()

    (expected,) = torch.autograd.grad(loss(y := x.clone().requires_grad_()), y)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)


def test_forward_and_backward_repeat_to_the_bit() -> None:
    augmentation = make_augmentation(ALL)
    p = augmentation.draw(Draws("repeat"), 64, (16, 16))
    x = noise(64, 3, 16, 16, dtype=torch.float32).requires_grad_()
    g = noise(64, 3, 16, 16, dtype=torch.float32).flip(0)
    results = []
    for _ in range(3):
        y = augmentation.apply(x, p)
        results.append((y, torch.autograd.grad(y, x, g)[0]))
    assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later))


@pytest.mark.parametrize("dtype,atol", [(torch.float32, 2e-5), (torch.bfloat16, 0.04), (torch.float16, 5e-3)])
def test_dtypes(dtype: torch.dtype, atol: float) -> None:
    x = noise(24, 3, 16, 16).to(dtype)
    for variant in ("dsa", "idc"):
        augmentation = make_augmentation(ALL, variant)
        p = augmentation.draw(Draws("dtype"), 24, (16, 16))
        y = augmentation.apply(x, p)
        assert y.dtype == dtype and y.shape == x.shape
        torch.testing.assert_close(y.double(), augmentation.apply(x.double(), p), atol=atol, rtol=0)


@pytest.mark.gpu
def test_gpu_agrees_and_repeats() -> None:
    augmentation = make_augmentation(ALL)
    p = augmentation.draw(Draws("gpu"), 96, (32, 32))
    x = noise(96, 3, 32, 32, dtype=torch.float32)
    g = x.flip(0)
    expected = torch.autograd.grad(augmentation.apply(y := x.clone().requires_grad_(), p), y, g)[0]
    torch.use_deterministic_algorithms(True)
    try:
        there = x.cuda().requires_grad_()
        results = [torch.autograd.grad(augmentation.apply(there, p), there, g.cuda())[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(results[0].cpu(), expected, atol=1e-4, rtol=0)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# Views of stored labels -----------------------------------------------------------------------------------------------


def drawn(rows: int, size: tuple[int, int], **settings: float) -> augment.ViewBoxes:
    return CropViews(**settings).draw(Draws(7, "view", 3), rows, size)


def test_golden_views() -> None:
    # Stored labels depend on these: they may never change.
    views = drawn(9, (32, 32))
    assert views.box[:3].tolist() == [[2, 2, 29, 30], [11, 16, 9, 11], [3, 0, 27, 21]]
    assert views.mirrored.tolist() == [True] * 7 + [False, True]
    assert drawn(3, (24, 60), min_scale=0.5, max_scale=0.9).box.tolist() == [[0, 14, 24, 32]] * 3


def test_a_view_does_not_depend_on_the_number_of_rows() -> None:
    few, many = drawn(5, (20, 24)), drawn(50, (20, 24))
    assert torch.equal(few.box, many.box[:5]) and torch.equal(few.mirrored, many.mirrored[:5])
    assert not drawn(50, (20, 24), flip=False).mirrored.any()
    assert torch.equal(drawn(50, (20, 24), flip=False).box, many.box)


def test_views_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    boxes = drawn(8000, (32, 40)).box.double()
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 32).all() and (boxes[:, 1] + boxes[:, 3] <= 40).all()
    with seeded("torchvision"):
        image = torch.zeros(1, 32, 40)
        theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(8000)]
    expected = torch.tensor(theirs, dtype=torch.float64)
    error = (boxes.var(0) + expected.var(0)).div(8000).sqrt()
    assert ((boxes.mean(0) - expected.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(boxes.std(0), expected.std(0), rtol=0.05, atol=0)


@pytest.mark.parametrize("size", [(30, 9), (9, 30), (12, 14)])
def test_a_crop_that_never_fits_is_torchvisions_centred_one(size: tuple[int, int]) -> None:
    from torchvision.transforms import RandomResizedCrop

    # Shares of up to 1e-6 of the image are no pixel at all, so that every try fails.
    expected = RandomResizedCrop.get_params(torch.zeros(1, *size), [1e-6, 1e-6], [3 / 4, 4 / 3])
    assert drawn(2, size, min_scale=1e-6, max_scale=1e-6).box.tolist() == [list(expected)] * 2


@pytest.mark.parametrize("size", [(8, 8), (17, 12), (32, 32)])
def test_views_are_torchvisions_resized_crops(size: tuple[int, int]) -> None:
    from torchvision.transforms.functional import hflip, resized_crop

    images, views = noise(20, 3, *size), drawn(20, size)
    shown = CropViews().apply(images, views)
    for image, got, box, mirrored in zip(images, shown, views.box.tolist(), views.mirrored):
        expected = resized_crop(image, *box, list(size), antialias=False)
        torch.testing.assert_close(got, hflip(expected) if mirrored else expected)
    torch.testing.assert_close(CropViews().apply(images.float(), views), shown.float(), atol=1e-6, rtol=0)
    alone = CropViews().apply(images[4:5], views[4:5])
    assert torch.equal(alone, shown[4:5]) and alone.dtype == images.dtype


def test_a_view_of_the_whole_image_changes_no_bit() -> None:
    images = noise(2, 3, 9, 7, dtype=torch.float32)
    whole = augment.ViewBoxes((9, 7), torch.tensor([[0, 0, 9, 7]] * 2), torch.tensor([False, True]))
    shown = CropViews().apply(images, whole)
    assert torch.equal(shown[0], images[0]) and torch.equal(shown[1], images[1].flip(-1))


def test_views_that_cannot_be() -> None:
    for low, high in ((0.0, 1.0), (0.5, 0.4), (0.5, 1.1), (math.nan, 1.0)):
        with pytest.raises(CondenseError, match="views of scale"):
            CropViews(low, high)
    with pytest.raises(ValueError, match="2 views of"):
        CropViews().apply(torch.zeros(3, 1, 8, 8), drawn(2, (8, 8)))
    with pytest.raises(ValueError, match="cannot be applied to"):
        CropViews().apply(torch.zeros(2, 1, 8, 9), drawn(2, (8, 8)))


# Mixed views ----------------------------------------------------------------------------------------------------------

RULES = [ViewRule(mix="cutmix"), ViewRule(mix="mixup", alpha=0.8), ViewRule(pad=4, mix="cutmix", alpha=0.3)]


def test_golden_mixed_views() -> None:
    # Stored labels depend on these: they may never change. Worked out from the hash in plain integers and floats.
    mixed = ViewRule(mix="cutmix").draw(7, 3, 9, (32, 32))
    assert mixed.partner.tolist() == [1, 7, 2, 5, 6, 4, 8, 5, 8]
    assert mixed.patch[:3].tolist() == [[16, 2, 32, 22], [8, 0, 32, 26], [12, 16, 32, 32]]
    assert mixed.share[:3].tolist() == [1 - 320 / 1024, 1 - 624 / 1024, 1 - 320 / 1024]
    soft = ViewRule(mix="mixup", alpha=0.8, pad=4).draw(7, 3, 3, (32, 32))
    assert (soft.share.double() * augment.SHARE_STEPS).tolist() == [39356, 1423, 16278]
    assert soft.views.box[:, :2].tolist() == [[3, 3], [0, 1], [3, 3]] and soft.patch is None
    assert soft.partner.tolist() == [0, 2, 0]


@pytest.mark.parametrize("rule", [ViewRule(), *RULES[:2]])
def test_crops_are_those_of_plain_views(rule: ViewRule) -> None:
    views = rule.draw(7, 3, 9, (32, 32)).views
    assert torch.equal(views.box, drawn(9, (32, 32)).box) and torch.equal(views.mirrored, drawn(9, (32, 32)).mirrored)
    assert ViewRule.of(CropViews(0.3, 0.9, False)) == ViewRule(0.3, 0.9, False) and ViewRule.of(rule) is rule


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    count = 40000
    share = ViewRule(mix="mixup", alpha=alpha).draw(0, 0, count, (8, 8)).share.double()
    variance = 1 / (4 * (2 * alpha + 1))
    kurtosis = 3 - 6 / (2 * alpha + 3)
    assert abs(float(share.mean()) - 0.5) < 4 * math.sqrt(variance / count)
    assert abs(float(share.var()) - variance) < 4 * variance * math.sqrt((kurtosis - 1) / count)
    fourth = float(((share - 0.5) ** 4).mean())
    assert fourth == pytest.approx(kurtosis * variance**2, rel=0.05)
    if alpha == 1:
        assert torch.allclose(torch.histc(share, 10, 0, 1) / count, torch.tensor(0.1).double(), atol=0.01)


def test_extreme_draws_are_no_accident() -> None:
    ends = torch.tensor([0, 2**62, 2**63 - 1])
    for alpha in (1e-3, 1.0, 1e3):
        for a in ends:
            for b in ends:
                share = views_module._symmetric_beta(alpha, a[None], b[None], ends[:1])
                assert 0 <= float(share) <= 1


def test_partners_come_from_the_whole_set() -> None:
    partner = ViewRule(mix="cutmix").draw(0, 0, 5000, (8, 8)).partner
    assert partner.min() < 10 and partner.max() > 4990 and len(partner.unique()) > 3000
    assert abs(float(partner.double().mean()) - 2499.5) < 4 * 5000 / math.sqrt(12 * 5000)
    mixed = ViewRule(mix="cutmix").draw(0, 0, 5000, (9, 24))
    kept = 1 - (mixed.patch[:, 2:] - mixed.patch[:, :2]).prod(1) / (9 * 24)
    torch.testing.assert_close(mixed.share, kept.float())
    assert (mixed.patch[:, :2] >= 0).all() and (mixed.patch[:, 2:] <= torch.tensor([9, 24])).all()


@pytest.mark.parametrize("rule", RULES)
def test_mixed_views_by_hand(rule: ViewRule) -> None:
    images = noise(7, 3, 9, 12, dtype=torch.float32)
    mixed = rule.draw(7, 3, 7, (9, 12))
    ids = torch.tensor([5, 0, 3, 3])
    shown = rule.apply(images, ids, mixed)
    plain = ViewRule(rule.min_scale, rule.max_scale, rule.flip, rule.pad)
    views = plain.apply(images, torch.arange(7), plain.draw(7, 3, 7, (9, 12)))
    for got, i in zip(shown, ids.tolist()):
        own, other, share = views[i].clone(), views[mixed.partner[i]], mixed.share[i]
        if rule.mix == "mixup":
            own = share * own + (1 - share) * other
        else:
            top, left, bottom, right = mixed.patch[i].tolist()
            own[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        assert torch.equal(got, own)
    half = rule.apply(images.half(), ids, mixed)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), shown, atol=2e-2, rtol=0)


def test_padded_views_are_torchvisions_crops_of_padded_images() -> None:
    from torchvision.transforms.functional import crop, hflip, pad

    images, rule = noise(40, 3, 9, 12), ViewRule(pad=2)
    mixed = rule.draw(7, 3, 40, (9, 12))
    shown = rule.apply(images, torch.arange(40), mixed)
    for image, got, box, mirrored in zip(images, shown, mixed.views.box.tolist(), mixed.views.mirrored):
        expected = crop(pad(image, [2, 2, 2, 2]), box[0] + 2, box[1] + 2, 9, 12)
        assert torch.equal(got, hflip(expected) if mirrored else expected)
    shifts = ViewRule(pad=2, flip=False).draw(0, 0, 5000, (9, 12)).views
    assert not shifts.mirrored.any()
    for axis in (0, 1):
        counts = torch.bincount(shifts.box[:, axis] + 2, minlength=5)
        assert len(counts) == 5 and (counts - 1000).abs().max() < 4 * math.sqrt(800)


def test_rules_that_cannot_be() -> None:
    for words, options in {
        "views of scale": {"min_scale": 0.0},
        "pad=-1": {"pad": -1},
        "pad=256": {"pad": 256},
        "mix=cutmixx.*did you mean 'cutmix'": {"mix": "cutmixx"},
        "alpha=0": {"alpha": 0.0},
        "alpha=inf": {"alpha": math.inf},
        "alpha=nan": {"alpha": math.nan},
    }.items():
        with pytest.raises(CondenseError, match=words):
            ViewRule(**options)
    rule = ViewRule(mix="cutmix")
    with pytest.raises(ValueError, match="3 views of"):
        rule.apply(torch.zeros(2, 1, 8, 8), torch.arange(2), rule.draw(0, 0, 3, (8, 8)))
    with pytest.raises(ValueError, match="cannot be applied to"):
        rule.apply(torch.zeros(3, 1, 8, 9), torch.arange(3), rule.draw(0, 0, 3, (8, 8)))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_mixed_views_on_a_gpu(rule: ViewRule) -> None:
    images, device, mixed = (
        noise(20, 3, 16, 16, dtype=torch.float32),
        torch.device("cuda"),
        rule.draw(0, 1, 20, (16, 16)),
    )
    ids = torch.tensor([3, 19, 0])
    shown = rule.apply(images.to(device), ids.to(device), mixed.to(device)).cpu()
    torch.testing.assert_close(shown, rule.apply(images, ids, mixed), atol=1e-6, rtol=0)


@pytest.mark.gpu
def test_views_on_a_gpu() -> None:
    images, views = noise(20, 3, 16, 16, dtype=torch.float32), drawn(20, (16, 16))
    device = torch.device("cuda")
    shown = CropViews().apply(images.to(device), views.to(device)).cpu()
    torch.testing.assert_close(shown, CropViews().apply(images, views), atol=1e-6, rtol=0)


def test_a_scale_of_one_is_the_whole_image_whatever_its_ratio():
    from condense.augment import CropViews
    from condense.rng import Draws

    views = CropViews(1.0, 1.0, flip=False).draw(Draws(0, "whole"), 4, (9, 20))
    assert views.box.tolist() == [[0, 0, 9, 20]] * 4


# -- policies of torchvision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["autoaugment", "randaugment"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_are_those_of_torchvision_on_8_bit_images(name, channels):
    from torchvision import transforms

    transform = Standardise(torch.full((channels,), 0.4), torch.full((channels,), 0.2))
    pixels = torch.randint(256, (12, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    policy = ImagePolicy(name, transform)
    seeds = policy.draw(Draws(5, "augment", 0), 12)
    before = torch.get_rng_state()
    made = policy.apply(transform(pixels.float() / 255), seeds)
    assert torch.equal(torch.get_rng_state(), before)
    published = (
        transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
        if name == "autoaugment"
        else transforms.RandAugment(num_ops=1, magnitude=9)
    )
    with torch.random.fork_rng(devices=[]):
        for image, seed, expected in zip(made, seeds.tolist(), pixels):
            torch.manual_seed(seed)
            assert torch.equal((transform.inverse(image) * 255).round().byte(), published(expected))
    assert not torch.equal(made, transform(pixels.float() / 255))
    # An image does not depend on the others of its batch.
    assert torch.equal(policy.apply(transform(pixels[3:4].float() / 255), seeds[3:4]), made[3:4])


def test_policies_clamp_and_round_what_lies_outside():
    transform = Standardise(torch.zeros(3), torch.ones(3))
    images = torch.tensor([-0.5, 0.5011, 1.5]).repeat_interleave(64).view(1, 3, 8, 8)
    made = ImagePolicy("randaugment", transform).apply(images, torch.tensor([1]))
    assert made.min() >= 0 and made.max() <= 1
    assert torch.allclose(made * 255, (made * 255).round(), atol=1e-4)
    with pytest.raises(CondenseError, match="needs images of 1 or 3 channels, not 4"):
        ImagePolicy("randaugment", transform).apply(torch.zeros(1, 4, 8, 8), torch.tensor([1]))
