"""`PatchDragsawLoss` against the published algorithm, written here once more with loops over
images, samples and patch sizes, its mistakes included; and everything the module adds: samplers,
geometry, receptive fields, errors."""

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


def released_2d_cells(h, w, samples, border):
    """Flat index n * step on the grid without its border; one sample fewer where step is 1."""
    h, w = h - 2 * border, w - 2 * border
    step = (h * w) // samples
    count = samples if step >= 2 else samples - 1
    return [(n * step // w + border, n * step % w + border) for n in range(count)]


def released_2d_ratios(labels, cells, stride, sizes):
    """`(P, B, 1, N)`: means of [int(c - L/2), int(c + L/2)) at the transposed position."""
    result = torch.zeros(len(sizes), labels.shape[0], 1, len(cells), dtype=torch.float64)
    for p, size in enumerate(sizes):
        for b in range(labels.shape[0]):
            for n, (row, column) in enumerate(cells):
                y, x = column * stride, row * stride
                patch = labels[
                    b,
                    0,
                    int(y - size / 2) : int(y + size / 2),
                    int(x - size / 2) : int(x + size / 2),
                ]
                assert patch.shape == (size, size)
                result[p, b, 0, n] = patch.double().mean()
    return result


def released_loss(f, g, r, q, temperature, swapped):
    """One patch size, all pairs of all images; the shift is the attached maximum of the batch."""
    s = F.normalize(f, dim=1).transpose(1, 2) @ F.normalize(g, dim=1) / temperature
    t = s - s.max()
    divergence = (r[..., :, None] - q[..., None, :]).abs().sum(1)
    affinity = 1 - divergence
    positive, negative = (divergence, affinity) if swapped else (affinity, divergence)
    z = (negative * t).exp().sum(2, keepdim=True)
    return -((positive * t).exp() / z).log()


@pytest.mark.parametrize("impl", IMPLS)
def test_release2d_gives_the_numbers_of_the_published_2d_code(impl):
    torch.manual_seed(1)
    labels = blobs(2, 96, 96)
    x2 = torch.randn(2, 6, 48, 48, dtype=torch.float64, requires_grad=True)
    x3 = torch.randn(2, 7, 24, 24, dtype=torch.float64, requires_grad=True)
    layers = {"x2": PatchLayer(2, samples=16, weight=0.1), "x3": PatchLayer(4, samples=20)}
    cross = {
        "x2": CrossLayer(2, samples=8, channels=6, kernel=8),
        "x3": CrossLayer(4, samples=8, channels=7, kernel=4),
    }
    loss = PatchDragsawLoss(
        layers, num_classes=2, cross=cross, cross_channels=5, compat="release2d", impl=impl
    ).double()
    sizes = (5, 7, 9)
    expected = {}
    for name, x, stride, samples in (("x2", x2, 2, 16), ("x3", x3, 4, 20)):
        cells = released_2d_cells(*x.shape[2:], samples, 9)
        assert len(cells) == (16 if name == "x2" else 19)  # 6 x 6 cells: step 1
        rows = torch.stack([x[:, :, row, column] for row, column in cells], 2)
        ratios = released_2d_ratios(labels, cells, stride, sizes)
        losses = [released_loss(rows, rows, r, r, 1.0, True).sum() for r in ratios]
        expected[name] = sum(losses) / 3
    # across: sampled on the stride-16 grid, looked up at the layer's own stride past the border
    cells = released_2d_cells(6, 6, 8, 0)
    adapted = [loss.adapters[name](x) for name, x in (("x2", x2), ("x3", x3))]
    rows = [torch.stack([x[:, :, r, c] for r, c in cells], 2) for x in adapted]
    moved = [(row + 9, column + 9) for row, column in cells]
    ratios = [released_2d_ratios(labels, moved, stride, sizes) for stride in (2, 4)]
    losses = [released_loss(*rows, r, q, 1.0, True).sum() for r, q in zip(*ratios, strict=True)]
    expected["x2-x3"] = sum(losses) / 3
    found = loss.terms({"x2": x2, "x3": x3}, labels)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=0, msg=name)
    total = 0.1 * expected["x2"] + 0.01 * expected["x3"] + 0.01 * expected["x2-x3"]
    value = loss({"x2": x2, "x3": x3}, labels)
    torch.testing.assert_close(value, total, rtol=1e-11, atol=0)
    leaves = (x2, x3, *loss.parameters())
    wanted = torch.autograd.grad(total, leaves, allow_unused=True)
    given = torch.autograd.grad(value, leaves, allow_unused=True)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-12)


def test_nov2021_gives_the_guarded_sums_of_that_build():
    """Sums above 100, weighted, were divided by 1000: the weights of the trainer's preset."""
    torch.manual_seed(3)
    labels = blobs(4, 112, 112)
    roles = {"x2": (2, 64, 0.1), "x3": (4, 32, 0.1), "a": (4, 32, 0.01), "b": (4, 8, 0.01)}
    weights = dict(zip(roles, (1.64, 0.41, 0.041, 2.56), strict=True))
    features, expected, layers = {}, {}, {}
    for name, (stride, samples, own) in roles.items():
        x = torch.randn(4, 24, 112 // stride, 112 // stride, dtype=torch.float64)
        cells = released_2d_cells(*x.shape[2:], samples, 9)
        rows = torch.stack([x[:, :, row, column] for row, column in cells], 2)
        total = 0.0
        for r in released_2d_ratios(labels, cells, stride, (5, 7, 9)):
            value = own * released_loss(rows, rows, r, r, 1.0, True).sum()
            total += value / (1000 if value > 100 else 1) / 3
        features[name], expected[name] = x, total
        layers[name] = PatchLayer(stride, samples=samples, weight=weights[name])
    loss = PatchDragsawLoss(layers, num_classes=2, compat="nov2021")
    for name, term in loss.terms(features, labels).items():
        # the weights have three digits
        torch.testing.assert_close(weights[name] * term, expected[name], rtol=2e-3, atol=0)


@pytest.mark.parametrize(("cell", "stride", "border", "corner"), [((11, 134), 2, 0, (267, 21))])
def test_published_lookup_is_transposed_and_one_pixel_early(cell, stride, border, corner):
    """The specification's measured example: cell (11, 134) reads the patch centred (267, 21)."""
    labels = torch.zeros(1, 1, 512, 512, dtype=torch.int64)
    labels[0, 0, corner[0], corner[1]] = 1
    loss = PatchDragsawLoss({"x": PatchLayer(stride)}, num_classes=2, compat="release2d")
    centers = loss._centers(loss.layers["x"], torch.tensor([cell]))
    windows = loss._windows("x", loss.layers["x"], labels[:, 0])
    ratios = loss._ratios(labels[:, 0], centers, windows, torch.float64)
    low = [centers[0, axis].item() + windows[0][axis][0] for axis in (0, 1)]
    assert low == [corner[0] - 2, corner[1] - 2]
    torch.testing.assert_close(
        ratios.flatten() * torch.tensor([25.0, 49.0, 81.0]).double(), torch.ones(3).double()
    )


def test_published_cross_layer_lookup():
    """Cell (2, 6) of the stride-16 grid reads (29, 21) at stride 2 and (59, 43) at stride 4."""
    cross = {"a": CrossLayer(2, channels=1, kernel=8), "b": CrossLayer(4, channels=1, kernel=4)}
    loss = PatchDragsawLoss({}, num_classes=2, cross=cross, compat="release2d")
    labels = torch.zeros(1, 512, 512)
    for name, expected in (("a", (29, 21)), ("b", (59, 43))):
        (center,) = loss._centers(cross[name], torch.tensor([[2, 6]])).tolist()
        window = loss._windows(name, cross[name], labels)[0]
        middle = tuple(
            c + (low + high - 1) // 2 for c, (low, high) in zip(center, window, strict=True)
        )
        assert middle == expected
    # the geometry itself: the middle of the cells that the adapter joins
    own = PatchDragsawLoss({}, num_classes=2, cross=cross)
    assert own._centers(cross["a"], torch.tensor([[2, 6]])).tolist() == [[39, 103]]
    assert own._centers(cross["b"], torch.tensor([[2, 6]])).tolist() == [[38, 102]]


def released_3d_ratios(labels, cells, stride, field, classes):
    """`(1, B, K, N)`: rank of the class in the window, background assumed first, all of the field
    in the denominator, last plane never read."""
    half, size = (field - 1) // 2, labels.shape[2:]
    result = torch.zeros(1, labels.shape[0], classes - 1, len(cells), dtype=torch.float64)
    for b in range(labels.shape[0]):
        for n, cell in enumerate(cells):
            window = tuple(
                slice(max(c * stride - half, 0), min(c * stride + half + 1, length - 1))
                for c, length in zip(cell, size, strict=True)
            )
            _, counts = torch.unique(labels[(b, 0, *window)], return_counts=True)
            for slot, count in enumerate(counts[1:]):
                result[0, b, slot, n] = count.double() / field**3
    return result


@pytest.mark.parametrize("impl", IMPLS)
def test_release3d_gives_the_numbers_of_the_published_3d_code(impl):
    torch.manual_seed(2)
    labels = blobs(2, 32, 32, 32, classes=4)
    a = torch.randn(2, 5, 16, 16, 16, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 6, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    layers = {
        "a": PatchLayer(2, step=4, receptive_field=7),
        "b": PatchLayer(4, step=2, receptive_field=15),
    }
    cross = {
        "a": CrossLayer(2, step=4, receptive_field=7, channels=5),
        "b": CrossLayer(4, step=2, receptive_field=15, channels=6),
    }
    loss = PatchDragsawLoss(
        layers,
        num_classes=4,
        sizes="receptive_field",
        cross=cross,
        cross_channels=3,
        spatial_dims=3,
        temperature=0.5,
        compat="release3d",
        impl=impl,
    ).double()
    expected, rows, ratios = [], [], []
    for name, x, stride, step, field in (("a", a, 2, 4, 7), ("b", b, 4, 2, 15)):
        places = range(0, x.shape[2], step)
        cells = [(i, j, k) for i in places for j in places for k in places]
        r = released_3d_ratios(labels, cells, stride, field, 4)
        picked = x[:, :, ::step, ::step, ::step].flatten(2)
        expected.append(released_loss(picked, picked, r[0], r[0], 0.5, False).mean())
        rows.append(loss.adapters[name](x)[:, :, ::step, ::step, ::step].flatten(2))
        ratios.append(r[0])
        assert (r[0, :, 2] > 0).any()
    assert (ratios[0].sum(1) == 0).any()  # a window of one class counts as background
    across = released_loss(*rows, *ratios, 0.5, False).mean() / 2
    total = 0.01 * sum(expected) / 2 + 0.01 * across
    value = loss({"a": a, "b": b}, labels)
    torch.testing.assert_close(value, total, rtol=1e-11, atol=0)
    leaves = (a, b, *loss.parameters())
    wanted = torch.autograd.grad(total, leaves, allow_unused=True)
    given = torch.autograd.grad(value, leaves, allow_unused=True)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-12)


def test_receptive_field_patches_of_the_older_2d_code():
    """[c - (RF - 1)/2, c + (RF - 1)/2), clipped, mean over what is left."""
    labels = blobs(1, 64, 64)
    layer = PatchLayer(4, samples=16, receptive_field=19)
    loss = PatchDragsawLoss(
        {"x": layer}, num_classes=2, sizes="receptive_field", compat="receptive_field2d"
    )
    cells = torch.tensor(released_2d_cells(16, 16, 16, 0))
    windows = loss._windows("x", layer, labels[:, 0])
    found = loss._ratios(labels[:, 0], loss._centers(layer, cells), windows, torch.float64)
    for n, (row, column) in enumerate(cells.tolist()):
        y, x = column * 4, row * 4
        patch = labels[0, 0, max(y - 9, 0) : y + 9, max(x - 9, 0) : x + 9].double()
        torch.testing.assert_close(found[0, 0, 0, n], patch.mean())


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


def unet_like():
    def block(c_in, c_out, stride):
        return torch.nn.Sequential(
            torch.nn.Conv3d(c_in, c_out, 3, stride, 1),
            torch.nn.InstanceNorm3d(c_out),
            torch.nn.LeakyReLU(inplace=True),
            torch.nn.Conv3d(c_out, c_out, 3, 1, 1),
            torch.nn.InstanceNorm3d(c_out),
            torch.nn.LeakyReLU(inplace=True),
        )

    return torch.nn.Sequential(block(1, 2, 1), block(2, 3, 2), block(3, 4, 2), block(4, 5, 2))


def test_receptive_fields_of_an_nnunet_encoder_are_those_of_the_specification():
    network = unet_like().train()
    found = medcl.receptive_fields(network, ["2"], (1, 1, 48, 48, 48))
    assert found["2"].size == (23, 23, 23) and found["2"].stride == (4, 4, 4)
    assert found["2"].offset == (0.0, 0.0, 0.0)
    assert network.training
    with pytest.raises(ValueError, match=r"layer '3'.*edge.*larger input_shape"):
        medcl.receptive_fields(network, ["3"], (1, 1, 32, 32, 32))
    with pytest.raises(ValueError, match="no layer 'stem'"):
        medcl.receptive_fields(network, ["stem"], (1, 1, 8, 8, 8))


class Pooled(torch.nn.Module):
    """Functional operations, dilation, pooling, a skip connection, global pooling, upsampling."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, 2, 1)
        self.wide = torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.patch = torch.nn.Conv2d(4, 4, 4, 4)
        self.up = torch.nn.Upsample(scale_factor=2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.wide(F.max_pool2d(F.relu(x), 3, 2, 1))
        y = y * torch.sigmoid(F.adaptive_avg_pool2d(y, 1)) + y
        return self.up(self.patch(y)), self.patch(x)


def test_receptive_fields_of_functional_networks():
    network = Pooled()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    # stem 3/j2; pooling 7/j4; dilated 7 + 4 * 4 = 23/j4; 4 x 4 patches 23 + 3 * 4 = 35/j16
    found = medcl.receptive_fields(network, ["stem", "wide"], (1, 3, 160, 192))
    assert found["stem"] == ((3, 3), (2, 2), (0.0, 0.0))
    assert found["wide"] == ((23, 23), (4, 4), (0.0, 0.0))
    twice = torch.nn.Sequential(network.stem, network.wide, network.patch)
    found = medcl.receptive_fields(twice, ["2"], (1, 3, 160, 192))["2"]
    assert found == ((17, 17), (8, 8), (3.0, 3.0))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    layer = PatchLayer.of(found, samples=9, weight=0.2)
    assert (layer.stride, layer.receptive_field, layer.offset) == ((8, 8), (17, 17), (3.0, 3.0))
    loss = PatchDragsawLoss({"x": layer}, num_classes=2, sizes="receptive_field")
    assert loss._centers(layer, torch.tensor([[0, 2]])).tolist() == [[3, 19]]
    assert loss({"x": torch.randn(1, 4, 20, 24)}, blobs(1, 160, 192)).isfinite()


class Decoded(torch.nn.Module):
    """Two levels in 3-D: a strided one, a transposed convolution back, the skip connection."""

    def __init__(self):
        super().__init__()
        self.fine = torch.nn.Conv3d(1, 3, 3, padding=1)
        self.coarse = torch.nn.Conv3d(3, 4, 3, 2, 1)
        self.up = torch.nn.ConvTranspose3d(4, 3, 2, 2)
        self.decoder = torch.nn.Sequential(
            torch.nn.Conv3d(6, 3, 3, padding=1), torch.nn.LeakyReLU()
        )

    def forward(self, x):
        x = F.instance_norm(self.fine(x))
        return [self.decoder(torch.cat((self.up(self.coarse(x)), x), 1))]


def test_receptive_fields_of_a_decoder_in_3d():
    # 3/j1, 5/j2; three cells of the decoder see two coarse ones, to the left or to the right
    found = medcl.receptive_fields(Decoded(), ["coarse", "decoder"], (1, 1, 24, 26, 28))
    assert found["coarse"] == ((5,) * 3, (2,) * 3, (0.0,) * 3)
    assert found["decoder"] == ((7,) * 3, (1,) * 3, (-0.5,) * 3)
    layer = PatchLayer.of(found["decoder"], step=6)
    loss = PatchDragsawLoss({"d": layer}, num_classes=3, sizes="receptive_field")
    features = {"d": torch.randn(1, 3, 24, 26, 28, requires_grad=True)}
    loss(features, blobs(1, 24, 26, 28, classes=3)).backward()
    assert features["d"].grad.isfinite().all() and features["d"].grad.abs().max() > 0


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
    assert torch.equal(fields(size_weights=(3,))({"x": X}, labels), fields()({"x": X}, labels))


def test_cells_half_a_stride_outside_are_cells_of_the_border():
    """As those of an upsampled map are, whose first cell is centred at -0.5."""
    labels = blobs(2, 24, 24)
    for offset in (-0.5, -1.0, 1.5):
        layer = PatchLayer(2, samples=4, offset=offset)
        assert PatchDragsawLoss({"x": layer}, num_classes=2)({"x": X}, labels).isfinite()


def test_the_published_border_is_the_largest_window():
    x = torch.randn(1, 4, 40, 40)
    for sizes, border in (((5, 7, 9), 9), ((3, 13), 13)):
        layers = {"x": PatchLayer(1, samples=10)}
        loss = PatchDragsawLoss(layers, num_classes=2, sizes=sizes, compat="release2d")
        _, _, centers = loss.sampled("x", x, blobs(1, 40, 40))
        cells = released_2d_cells(40, 40, 10, border)
        assert centers.tolist() == [[column, row] for row, column in cells]


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
