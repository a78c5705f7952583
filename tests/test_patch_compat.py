"""Presets of `PatchDragsawLoss` against the published algorithms, written here once more with loops
over images, samples and patch sizes, their mistakes included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_patch_dragsaw import IMPLS, blobs

from medcl_kernels.patch_dragsaw import CrossLayer, PatchDragsawLoss, PatchLayer


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


def test_the_published_border_is_the_largest_window():
    x = torch.randn(1, 4, 40, 40)
    for sizes, border in (((5, 7, 9), 9), ((3, 13), 13)):
        layers = {"x": PatchLayer(1, samples=10)}
        loss = PatchDragsawLoss(layers, num_classes=2, sizes=sizes, compat="release2d")
        _, _, centers = loss.sampled("x", x, blobs(1, 40, 40))
        cells = released_2d_cells(40, 40, 10, border)
        assert centers.tolist() == [[column, row] for row, column in cells]
