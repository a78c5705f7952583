"""`PatchDragsawLoss`: its terms, samplers, layers of any geometry, errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import medcl_kernels as medcl
from medcl_kernels.losses.patch_sampling import even_counts, sample_cells
from medcl_kernels.patch_dragsaw import COMPAT, CrossLayer, PatchDragsawLoss, PatchLayer

IMPLS = ["reference", "cpu"]


def blobs(batch, *shape, classes=2):
    """Labels with connected regions, so that windows are neither empty nor full."""
    noise = torch.randn(batch, 1, *shape)
    for _ in range(3):
        pool = F.avg_pool2d if len(shape) == 2 else F.avg_pool3d
        noise = pool(noise, 5, 1, 2)
    cuts = torch.quantile(noise.flatten(), torch.linspace(0, 1, classes + 1)[1:-1])
    return torch.bucketize(noise, cuts).long()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_default_is_the_mean_over_layers_of_what_the_functions_give(impl):
    labels = blobs(2, 40, 48, classes=3)
    x = torch.randn(2, 8, 20, 24)
    loss = PatchDragsawLoss({"x": PatchLayer(2, samples=24, weight=0.5)}, num_classes=3, impl=impl)
    cells = sample_cells((20, 24), 24)
    assert len(cells) == 24
    ratios = medcl.patch_class_ratio(labels, 2 * cells, (5, 7, 9), num_classes=3)
    rows = torch.stack([x[:, :, r, c] for r, c in cells.tolist()], 2)
    expected = 0.5 * medcl.patch_affinity_contrast(rows, ratios)
    torch.testing.assert_close(loss({"x": x}, labels), expected)
    # ratios averaged first is another loss
    averaged = PatchDragsawLoss(
        {"x": PatchLayer(2, samples=24, weight=0.5)},
        num_classes=3,
        average="ratio",
        size_weights=(1, 2, 3),
        impl=impl,
    )
    mixed = (ratios * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)).sum(0, keepdim=True) / 6
    expected = 0.5 * medcl.patch_affinity_contrast(rows, mixed)
    torch.testing.assert_close(averaged({"x": x}, labels), expected)


def three_layers(**options):
    """Three layers across, two of them contrasted with themselves; their features and labels."""
    shapes = {"a": (2, 6), "b": (4, 9), "c": (4, 5)}
    features = {
        name: torch.randn(2, channels, 32 // stride, 32 // stride)
        for name, (stride, channels) in shapes.items()
    }
    loss = PatchDragsawLoss(
        {"a": PatchLayer(2, samples=20, weight=0.3), "b": PatchLayer(4, weight=0.2)},
        num_classes=4,
        sizes=(5,),
        cross={
            name: CrossLayer(stride, samples=9 + stride, channels=channels, kernel=4 // stride)
            for name, (stride, channels) in shapes.items()
        },
        cross_weight=0.7,
        **options,
    )
    return loss, features, blobs(2, 32, 32, classes=4)


def test_layers_and_pairs_are_added_up_or_averaged():
    for options, divisors in (({}, (1, 1)), ({"layer_reduction": "mean"}, (2, 3))):
        loss, features, labels = three_layers(**options)
        terms = loss.terms(features, labels)
        assert list(terms) == ["a", "b", "a-b", "a-c", "b-c"]
        within = 0.3 * terms["a"] + 0.2 * terms["b"]
        across = 0.7 * (terms["a-b"] + terms["a-c"] + terms["b-c"])
        expected = within / divisors[0] + across / divisors[1]
        torch.testing.assert_close(loss.total(terms), expected)


def test_half_the_divergence():
    """One of the readings for several classes: affinities 1 - D/2."""
    loss, features, labels = three_layers(divergence="half")
    for x in features.values():
        x.requires_grad_()
    halved, plain = loss.terms(features, labels), copy.deepcopy(loss)
    plain.divergence = "sum"
    rows, ratios, _ = loss.sampled("a", features["a"], labels)
    divergence = (ratios[0, ..., :, None] - ratios[0, ..., None, :]).abs().sum(1)
    assert divergence.max() > 1  # the affinity of the sum is negative somewhere
    t = F.normalize(rows, dim=1).transpose(1, 2) @ F.normalize(rows, dim=1) - 1
    log_z = (divergence / 2 * t).logsumexp(2, keepdim=True)
    expected = (log_z - (1 - divergence / 2) * t).mean()
    torch.testing.assert_close(halved["a"], expected)
    full = plain.terms(features, labels)
    assert all(abs(halved[name] - full[name]) > 1e-3 for name in full)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_offsets_are_the_terms_of_identical_features(reduction):
    loss, features, labels = three_layers(reduction=reduction)
    same = {name: torch.ones_like(x) for name, x in features.items()}
    for adapter in loss.adapters.values():
        torch.nn.init.zeros_(adapter[1].weight)
        torch.nn.init.ones_(adapter[1].bias)
    terms, offsets = loss.terms(same, labels), loss.offsets(features)
    assert terms.keys() == offsets.keys()
    for name, value in terms.items():
        assert value.item() == pytest.approx(offsets[name], rel=1e-5), name


def test_dense_layers_adapters_and_layers_of_different_sizes_train():
    labels = blobs(2, 32, 32)
    features = {"a": torch.randn(2, 6, 16, 16), "b": torch.randn(2, 9, 8, 8)}
    for x in features.values():
        x.requires_grad_()
    loss = PatchDragsawLoss(
        {"a": PatchLayer(2), "b": PatchLayer(4)},
        num_classes=2,
        sizes=(5,),
        cross={"a": CrossLayer(2, samples=30, channels=6), "b": CrossLayer(4, channels=9)},
        temperature=torch.nn.Parameter(torch.tensor(0.7)),
    )
    value = loss(features, labels)
    value.backward()
    assert value.isfinite() and set(loss.terms(features, labels)) == {"a", "b", "a-b"}
    for leaf in (*features.values(), *loss.parameters()):
        assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0
    twin = copy.deepcopy(loss)
    assert torch.equal(twin(features, labels), loss(features, labels))
    assert "sizes=(5,)" in repr(loss)


def test_gradient_descent_separates_classes_in_the_affinity_form_only():
    """Cells of two classes: the affinity form drives them apart, the swapped one does not."""
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    labels[:, 16:] = 1
    final = {}
    for form in ("affinity", "release2d"):
        x = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = PatchDragsawLoss(
            {"x": PatchLayer(4, weight=1.0)}, num_classes=2, sizes=(3,), form=form
        )
        step = torch.optim.SGD([x], lr=30.0)
        for _ in range(150):
            step.zero_grad()
            loss({"x": x}, labels).backward()
            step.step()
        z = F.normalize(x.detach().flatten(2)[0], dim=0)
        final[form] = (z[:, :32].t() @ z[:, 32:]).mean().item()
    assert final["affinity"] < -0.5 < 0.5 < final["release2d"]


@pytest.mark.parametrize(
    ("grid", "samples", "expected"),
    [
        ((32, 32), 64, (8, 8)),
        ((30, 60), 32, (4, 8)),
        ((32, 32), 31, (5, 6)),
        ((9, 9), 81, (9, 9)),
        ((64, 64, 64), 64, (4, 4, 4)),
        ((2, 50), 10, (1, 10)),
    ],
)
def test_even_grid(grid, samples, expected):
    assert even_counts(grid, samples) in (expected, expected[::-1])
    cells = sample_cells(grid, samples)
    assert len(cells.unique(dim=0)) == len(cells) <= samples
    # as far from the edges as from each other
    for axis, size in enumerate(grid):
        places = cells[:, axis].unique().double()
        assert places.min() >= 0 and places.max() < size
        mirrored = size - 1 - places.flip(0)
        assert (places - mirrored).abs().max() <= 1


def test_regular_and_dense_samples():
    cells = sample_cells((5, 8), step=(2, 3))
    assert cells.tolist() == [[r, c] for r in (0, 2, 4) for c in (0, 3, 6)]
    assert len(sample_cells((5, 6, 7))) == 210
    inner = sample_cells((5, 8), border=2)
    assert inner.tolist() == [[2, c] for c in (2, 3, 4, 5)]


def small(**options):
    return PatchDragsawLoss({"x": PatchLayer(2, samples=4)}, num_classes=2, **options)


def fields(**options):
    layers = {"x": PatchLayer(2, samples=4, receptive_field=7)}
    return PatchDragsawLoss(
        layers, num_classes=2, sizes="receptive_field", average="ratio", **options
    )


X, Y = torch.randn(2, 4, 12, 12), torch.zeros(2, 24, 24, dtype=torch.int64)
REFUSED = [
    ("nothing to do", lambda: PatchDragsawLoss({}, num_classes=2), ["both empty"]),
    ("one cross layer", lambda: small(cross={"a": CrossLayer(2, channels=3)}), ["two layers"]),
    (
        "no channels",
        lambda: small(cross={"a": CrossLayer(2), "b": CrossLayer(2)}),
        ["channels=0"],
    ),
    ("no field", lambda: small(sizes="receptive_field"), ["'x'", "receptive_fields("]),
    ("sizes", lambda: small(sizes="large"), ["'receptive_field'", "'large'"]),
    ("compat", lambda: small(compat="release4d"), ["'release2d'", "'release4d'"]),
    ("no sizes", lambda: small(sizes=()), ["at least one"]),
    ("weights", lambda: small(size_weights=(1, 1, 1)), ['average="ratio"']),
    ("few weights", lambda: small(average="ratio", size_weights=(1,)), ["(3)", "got 1"]),
    ("weights of one field", lambda: fields(size_weights=(1, 2)), ["patch size (1)", "got 2"]),
    ("divergence", lambda: small(divergence="third"), ["'half'", "'third'"]),
    ("layers", lambda: small(layer_reduction="max"), ["'mean'", "'max'"]),
    (
        "stride",
        lambda: PatchDragsawLoss({"x": PatchLayer(4, samples=4)}, num_classes=2)({"x": X}, Y),
        ["layer 'x'", "stride 4", "12 cells of axis 0", "0 to 44", "labels of 24"],
    ),
    (
        "offset",
        lambda: PatchDragsawLoss({"x": PatchLayer((2, 1), offset=(0, -9))}, num_classes=2)(
            {"x": X}, Y
        ),
        ["offset -9", "axis 1", "-9 to 2"],
    ),
    (
        "stride of an adapter",
        lambda: PatchDragsawLoss(
            {},
            num_classes=2,
            cross={"x": CrossLayer(8, channels=4, kernel=2), "y": CrossLayer(2, channels=4)},
        )({"x": X, "y": X}, Y),
        ["layer 'x'", "stride 16", "4 to 84"],
    ),
    ("classes", lambda: PatchDragsawLoss({"x": PatchLayer(2)}, num_classes=1), ["at least 2"]),
    ("sampler", lambda: small(sampler="random"), ["'even'", "'random'"]),
    ("no layer", lambda: small()({"y": X}, Y), ["no layer 'x'", "['y']"]),
    ("other batch", lambda: small()({"x": X[:1]}, Y), ["features['x']", "B = 2"]),
    ("2-D and 3-D", lambda: small()({"x": X[..., None]}, Y), ["spatial axes"]),
    ("label beyond", lambda: small()({"x": X}, Y + 2), ["[0, 2)", "got 2", "(0, 0, 0)"]),
    ("void label", lambda: small()({"x": X}, Y + 255), ["got 255", "// 255"]),
    ("negative label", lambda: small()({"x": X}, Y - 1), ["got -1"]),
    ("even size", lambda: small(sizes=(4,))({"x": X}, Y), ["sizes[0]", "odd", "4"]),
    ("window too large", lambda: small(sizes=(25,))({"x": X}, Y), ["(25, 25)", "(24, 24)"]),
    (
        "few cells",
        lambda: PatchDragsawLoss({"x": PatchLayer(2, samples=145)}, num_classes=2)({"x": X}, Y),
        ["layer 'x'", "145 samples", "12 x 12", "144 cells"],
    ),
    (
        "border",
        lambda: PatchDragsawLoss({"x": PatchLayer(2, border=6)}, num_classes=2)({"x": X}, Y),
        ["layer 'x'", "border of 6", "12 x 12"],
    ),
    (
        "step",
        lambda: PatchDragsawLoss({"x": PatchLayer(2, step=0)}, num_classes=2)({"x": X}, Y),
        ["step must be positive"],
    ),
]


@pytest.mark.parametrize(
    ("call", "words"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_one_weight_is_enough_for_a_receptive_field():
    labels = blobs(2, 24, 24)
    # a power of two: anything else would round twice
    assert torch.equal(fields(size_weights=(2,))({"x": X}, labels), fields()({"x": X}, labels))


def test_cells_half_a_stride_outside_are_cells_of_the_border():
    """As those of an upsampled map are, whose first cell is centred at -0.5."""
    labels = blobs(2, 24, 24)
    for offset in (-0.5, -1.0, 1.5):
        layer = PatchLayer(2, samples=4, offset=offset)
        assert PatchDragsawLoss({"x": layer}, num_classes=2)({"x": X}, labels).isfinite()


def test_presets_are_options_that_can_be_changed_one_by_one():
    released = replace(COMPAT["release2d"], transpose_labels=False, border=0)
    loss = small(compat=released)
    assert loss.form == "release2d" and loss.reduction == "sum" and loss.shift == "max_attached"
    assert small(compat=released, form="affinity").form == "affinity"
    full = medcl.PatchCompat(normalizer="full")
    dense = PatchDragsawLoss({"x": PatchLayer(2)}, num_classes=2, compat=full)
    _, ratios, _ = dense.sampled("x", X, torch.ones_like(Y))
    # of 5, 7 and 9 rows and columns around the corner 3, 4 and 5 lie inside
    assert ratios[:, 0, 0, 0].tolist() == pytest.approx([9 / 25, 16 / 49, 25 / 81])
    assert loss({"x": X}, Y + (torch.rand(2, 24, 24) > 0.5).long()).isfinite()
