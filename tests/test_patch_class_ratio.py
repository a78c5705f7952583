"""Class shares of windows: exact counts, borders, layouts, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize as unit

import medcl_kernels as medcl
from medcl_kernels.ops.patch_class_ratio import patch_class_ratio as by_windows
from medcl_kernels.registry import spec

IMPLS = ["reference", "cpu"]


def counted(labels, centers, sizes, num_classes, full):
    """The definition with loops and torch.unique."""
    out = torch.zeros(
        len(sizes), labels.shape[0], num_classes - 1, len(centers), dtype=torch.float64
    )
    for p, size in enumerate(sizes):
        half = size // 2
        for b in range(labels.shape[0]):
            for n, center in enumerate(centers.tolist()):
                window = tuple(slice(max(c - half, 0), c + half + 1) for c in center)
                patch = labels[(b, *window)]
                for k, count in zip(*torch.unique(patch, return_counts=True), strict=True):
                    if k > 0:
                        cells = size ** len(center) if full else patch.numel()
                        out[p, b, k - 1, n] = count.double() / cells
    return out


@pytest.mark.parametrize("normalizer", ["clipped", "full"])
@pytest.mark.parametrize("shape", [(2, 19, 23), (2, 11, 12, 9)])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_shares_are_counts_over_cells(impl, dense, shape, normalizer):
    labels = torch.randint(0, 4, shape)
    if dense:
        centers = torch.cartesian_prod(*(torch.arange(0, size, 2) for size in shape[1:]))
    else:
        centers = torch.stack([torch.randint(0, size, (6,)) for size in shape[1:]], 1)
    options = {"num_classes": 4, "normalizer": normalizer, "dtype": torch.float64, "impl": impl}
    found = medcl.patch_class_ratio(labels, centers, (1, 5, 9), **options)
    assert torch.equal(found, counted(labels, centers, (1, 5, 9), 4, normalizer == "full"))
    with_axis = medcl.patch_class_ratio(labels.unsqueeze(1), centers, (1, 5, 9), **options)
    assert torch.equal(found, with_axis) and not found.requires_grad


def test_compiled_counts_are_exact_for_every_case():
    one = spec("patch_class_ratio")
    for case in one.cases:
        sample = one.sample(case, case.dtypes[0])
        ours = one.resolve()(*sample.args, **sample.kwargs, impl="cpu")
        assert torch.equal(ours, one.resolve_reference()(*sample.args, **sample.kwargs)), case.name


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize("length", [3, 19], ids=["from_labels", "from_bytes"])
def test_a_label_that_is_no_class_counts_nowhere(dtype, length):
    wide = {torch.int8: [], torch.int16: [256, 259], torch.int32: [256, 2**24 + 1]}
    foreign = [-1, -128, 4, *wide.get(dtype, [255, 256, 257, 2**32 + 1, 2**60 + 1, -(2**62) + 2])]
    values = torch.tensor([0, 1, 2, 3, *foreign]).to(dtype)
    labels = values[torch.randint(0, len(values), (2, 20, 21, 70))]
    centers = torch.stack([torch.randint(0, size, (60,)) for size in labels.shape[1:]], 1)
    windows = [((-(length // 2), length // 2 + 1),) * 3]
    ours, expected = (
        by_windows(labels, centers, windows, num_classes=4, impl=impl)
        for impl in ("cpu", "reference")
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(40, 60, 70), (9, 2100)], ids=["many_rows", "long_rows"])
def test_counts_of_one_class_do_not_overflow(shape):
    """Partial sums may be kept in bytes; a window of one label fills them as fast as can be."""
    labels = torch.full((1, *shape), 3)
    center = torch.tensor([[size // 2 for size in shape]])
    windows = [tuple((-size, size) for size in shape)]
    ours = by_windows(labels, center, windows, num_classes=5, impl="cpu")
    assert ours.flatten().tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_windows_outside_the_map_are_empty(impl):
    labels = torch.ones(1, 8, 8, dtype=torch.int64)
    centers = torch.tensor([[0, 0], [7, 7]])
    windows = [((-5, -2), (0, 2)), ((2, 9), (-1, 1))]
    found = by_windows(labels, centers, windows, num_classes=2, impl=impl)
    assert found[:, 0, 0].tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_length_per_axis_and_windows_as_large_as_the_map(impl):
    labels = torch.randint(0, 3, (2, 9, 5))
    centers = torch.tensor([[4, 2]])
    found = medcl.patch_class_ratio(labels, centers, [(9, 5)], num_classes=3, impl=impl)
    for k in (1, 2):
        share = (labels == k).flatten(1).float().mean(1)
        torch.testing.assert_close(found[0, :, k - 1, 0], share)


Y = torch.zeros(2, 24, 20, dtype=torch.int64)
C = torch.tensor([[3, 4]])


def ratio(labels=Y, centers=C, sizes=(5,), num_classes=2, **options):
    return medcl.patch_class_ratio(labels, centers, sizes, num_classes=num_classes, **options)


REFUSED = [
    (lambda: ratio(labels=[1]), TypeError, ["labels", "list"]),
    (lambda: ratio(labels=Y.float()), TypeError, ["labels.long()"]),
    (lambda: ratio(labels=Y[0]), ValueError, ["(B, H, W)", "(24, 20)"]),
    (lambda: ratio(labels=Y[:0]), ValueError, ["empty"]),
    (lambda: ratio(labels=Y + 2), ValueError, ["[0, 2)", "got 2", "(0, 0, 0)"]),
    (lambda: ratio(labels=Y - 1), ValueError, ["got -1"]),
    (lambda: ratio(num_classes=1), ValueError, ["num_classes", "at least 2"]),
    (lambda: ratio(num_classes=2.0), ValueError, ["num_classes"]),
    (lambda: ratio(centers=C.float()), TypeError, ["centers.round().long()"]),
    (lambda: ratio(centers=C[0]), ValueError, ["(N, 2)", "(2,)"]),
    (lambda: ratio(centers=C[:0]), ValueError, ["(N, 2)"]),
    (lambda: ratio(centers=C * 5), ValueError, ["centers[0]", "(15, 20)", "(row, column)"]),
    (lambda: ratio(centers=-C), ValueError, ["centers[0]", "(-3, -4)"]),
    (lambda: ratio(centers=[3, 4]), TypeError, ["centers", "list"]),
    (lambda: ratio(centers=C.to("meta")), ValueError, ["meta"]),
    (lambda: ratio(sizes=(4,)), ValueError, ["sizes[0]", "odd"]),
    (lambda: ratio(sizes=(5, 0)), ValueError, ["sizes[1]", "odd"]),
    (lambda: ratio(sizes=[(5, 5, 5)]), ValueError, ["sizes[0]", "(2)"]),
    (lambda: ratio(sizes=()), ValueError, ["at least one"]),
    (lambda: ratio(sizes=(21,)), ValueError, ["(21, 21)", "(24, 20)", "axis 1"]),
    (lambda: ratio(normalizer="volume"), ValueError, ["'clipped', 'full'", "'volume'"]),
    (lambda: ratio(dtype=torch.float16), TypeError, ["torch.float32", "float16"]),
    (lambda: ratio(impl="fast"), ValueError, ["impl", "'fast'"]),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


F, R = torch.randn(2, 6, 10), torch.rand(3, 2, 1, 10)


def contrast(features=F, ratios=R, **options):
    return medcl.patch_affinity_contrast(features, ratios, **options)


CONTRAST_REFUSED = [
    (lambda: contrast(ratios=[0.5]), TypeError, ["ratios", "list"]),
    (lambda: contrast(ratios=R.long()), TypeError, ["patch_class_ratio", "int64"]),
    (lambda: contrast(ratios=R[0]), ValueError, ["('P', 2, 'K', 10)", "(2, 1, 10)"]),
    (lambda: contrast(ratios=R[..., :9]), ValueError, ["(3, 2, 1, 9)"]),
    (lambda: contrast(ratios=R[:0]), ValueError, ["(0, 2, 1, 10)"]),
    (lambda: contrast(key=F), ValueError, ["key_ratios"]),
    (lambda: contrast(key_ratios=R), ValueError, ["key="]),
    (lambda: contrast(key=F[:, :5], key_ratios=R), ValueError, ["6 channels"]),
    (lambda: contrast(key=F[:1], key_ratios=R[:, :1]), ValueError, ["as many images"]),
    (lambda: contrast(key=F, key_ratios=R[:2]), ValueError, ["P and K", "(3, 1)", "(2, 1)"]),
    (lambda: contrast(form="swap"), ValueError, ["'affinity', 'release2d'", "'swap'"]),
    (lambda: contrast(shift="min"), ValueError, ["'constant'", "'min'"]),
    (lambda: contrast(temperature=0), ValueError, ["temperature", "positive"]),
    (lambda: contrast(reduction="all"), ValueError, ["reduction"]),
]


@pytest.mark.parametrize(("call", "error", "words"), CONTRAST_REFUSED)
def test_wrong_arguments_of_the_contrast_are_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_one_image_stays_there(impl):
    x = torch.randn(3, 6, 10)
    clean = contrast(x, torch.rand(1, 3, 1, 10).fill_(0.3), reduction="none", impl=impl)
    x[1, 2, 3] = torch.nan
    x.requires_grad_()
    values = contrast(x, torch.rand(1, 3, 1, 10).fill_(0.3), reduction="none", impl=impl)
    assert values[1].isnan().all()
    assert torch.equal(values[[0, 2]].detach(), clean[[0, 2]])
    (gradient,) = torch.autograd.grad(values[[0, 2]].sum(), x)
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", ["constant", "max", "max_attached"])
def test_a_learnable_temperature_gets_its_gradient(impl, shift):
    """Against finite differences of the loss with a fixed one; where the shift is detached, against
    plain torch."""
    x, y = torch.randn(2, 1, 4, 9, dtype=torch.float64).unbind(0)
    r, q = torch.rand(2, 2, 1, 2, 9, dtype=torch.float64).unbind(0)
    options = {"key": y, "key_ratios": q / 2, "shift": shift, "impl": impl}

    def at(temperature):
        return contrast(x, r / 2, temperature=temperature, **options)

    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    loss = at(temperature)
    torch.testing.assert_close(loss, at(0.6))
    loss.backward()
    slope = (at(0.6 + 1e-6) - at(0.6 - 1e-6)) / 2e-6
    if shift == "max":  # the maximum moves with the fixed temperature all the same
        own = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
        s = unit(x, dim=1).transpose(1, 2) @ unit(y, dim=1) / own
        t = s - s.max().detach()
        divergence = (r / 2)[..., :, None].sub((q / 2)[..., None, :]).abs().sum(2)
        log_z = (divergence * t).logsumexp(-1, keepdim=True)
        plain = (log_z - (1 - divergence) * t).mean()
        torch.testing.assert_close(loss, plain)
        (slope,) = torch.autograd.grad(plain, own)
    torch.testing.assert_close(temperature.grad, slope, rtol=1e-6, atol=1e-8)
