"""Numbers of the PDCR specification, worked out by independent numpy code: losses, gradients,
gates, sampled cells. float64 to 1e-8, float32 to 1e-5 of the largest entry."""

from __future__ import annotations

import math

import pytest
import torch

import medcl_kernels as medcl
from medcl_kernels.losses.patch_sampling import sample_cells
from medcl_kernels.ops.pair_affinity import pair_affinity

IMPLS = ["reference", "cpu"]
F = [[1, 0.6, 0, -1], [0, 0.8, 1, 2], [0, 0, 1, 2]]  # (C, N)
G = [[0, 1, 0, 1], [1, 1, 0.5, -1], [0, 0, 1, 3]]
R = [0, 0.25, 0.75, 1]
Q = [0.1, 0.4, 0.8, 0.9]
R3 = [R, [0.1, 0.3, 0.7, 1], [0.2, 0.2, 0.6, 0.9]]
MULTI = [[0, 0.5, 0.1, 0], [0, 0.2, 0.8, 1]]
AVERAGE = [sum(column) / 3 for column in zip(*R3, strict=True)]
WEIGHTED = [(a + 2 * b + 3 * c) / 6 for a, b, c in zip(*R3, strict=True)]

# name: features' ratios (P, K, N), options, loss, gradient (C, N) or None
SELF = {
    "E1": (
        [[R]],
        {},
        1.2225722577,
        [
            [0, -0.05778889, 0.03280773, 0.0188083],
            [0.00860555, 0.04334167, -0.00037697, 0.01041733],
            [0.05283087, 0.02763382, 0.00037697, -0.00101317],
        ],
    ),
    "E1 sum": ([[R]], {"reduction": "sum"}, 19.5611561239, None),
    "E2": (
        [[R]],
        {"temperature": 0.5},
        1.1724657445,
        [
            [0, -0.08533278, 0.02225294, 0.00956087],
            [-0.05710969, 0.06399958, -0.00308458, 0.00818159],
            [0.02522628, 0.02124542, 0.00308458, -0.00340116],
        ],
    ),
    "E3": (
        [[R]],
        {"form": "release2d", "reduction": "sum"},
        26.1518564503,
        [
            [0, 1.07578851, -1.03030587, -0.72448844],
            [-1.45273057, -0.80684138, -0.02008203, -0.31818345],
            [-2.08203645, -0.73551179, 0.02008203, -0.04406077],
        ],
    ),
    "E3 mean": ([[R]], {"form": "release2d"}, 1.6344910281, None),
    "E5": (
        [[row] for row in R3],
        {},
        1.3130462678,
        [
            [0, -0.06617018, 0.00300627, 0.01265364],
            [-0.04651972, 0.04962764, -0.00502732, 0.00787947],
            [0.0201537, 0.01101199, 0.00502732, -0.00155265],
        ],
    ),
    "E5 second": ([[R3[1]]], {}, 1.3005478213, None),
    "E5 third": ([[R3[2]]], {}, 1.4160187243, None),
    "E5 ratios first": ([[AVERAGE]], {}, 1.3118172409, None),
    "E5 weighted": ([[WEIGHTED]], {}, 1.3441441932, None),
    "E6": (
        [MULTI],
        {"temperature": 0.5},
        0.7888263913,
        [
            [0, -0.07482202, 0.12042463, 0.04747785],
            [0.15770908, 0.05611652, 0.05063011, 0.03585629],
            [0.05535732, 0.24650941, -0.05063011, -0.01211736],
        ],
    ),
}
DF = [
    [0, 0.01611738, -0.0193347, -0.00576497],
    [-0.05423402, -0.01208804, 0.02789271, 0.01892678],
    [0.05119801, 0.00553135, -0.02789271, -0.02180926],
]
DG = [
    [-0.08793037, 0.00464841, 0.02946827, 0.01881935],
    [0, -0.00464841, -0.02118816, -0.02027587],
    [0.04072051, -0.00823263, 0.01059408, -0.01303174],
]


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def features(values, dtype):
    return tensor(values, dtype).unsqueeze(0).requires_grad_()


def shares(values, dtype):
    """`(P, K, N)` lists -> `(P, 1, K, N)`."""
    return tensor(values, dtype).unsqueeze(1)


def close(actual, expected, dtype, printed=8):
    """To the tolerance of the dtype, and to what the decimals printed in the specification hold."""
    expected = tensor(expected)
    exact = 1e-8 if dtype == torch.float64 else 1e-5 * expected.abs().max().item()
    tolerance = max(exact, 0.51 * 10**-printed)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SELF)
def test_one_layer_against_itself(name, impl, dtype):
    ratios, options, value, gradient = SELF[name]
    f = features(F, dtype)
    loss = medcl.patch_affinity_contrast(f, shares(ratios, dtype), impl=impl, **options)
    # sums of 16 pairs: the tolerance is relative for them
    close(loss / max(value, 1), value / max(value, 1), dtype, 10)
    if gradient is not None:
        loss.backward()
        close(f.grad[0], gradient, dtype)


# of example 1: logarithm of the denominators, loss and gradient with respect to t of every pair
LOG_Z = [0.97108232, 1.19881094, 1.18263902, 1.04939816]
PAIRS = [
    [0.97108232, 1.27108232, 1.22108232, 0.97108232],
    [1.49881094, 1.19881094, 1.41596823, 1.36547761],
    [1.43263902, 1.39979631, 1.18263902, 1.22553224],
    [1.04939816, 1.21606483, 1.09229138, 1.04939816],
]
GAMMA = [
    [-0.0625, -0.02546016, 0.01791358, 0.02495428],
    [-0.0298215, -0.0625, -0.00091369, 0.01866891],
    [0.01151856, -0.0004191, -0.0625, -0.02799261],
    [0.02307453, 0.02419545, -0.02530139, -0.0625],
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_and_pairs_of_example_1(impl, dtype):
    f, r = features(F, dtype), shares([[R]], dtype)
    log_z, _ = pair_affinity(f, query_ratios=r, temperature=1.0, impl=impl)
    close(log_z[0, 0], LOG_Z, dtype)
    rows = medcl.patch_affinity_contrast(f, r, reduction="none", impl=impl)
    close(rows[0], [sum(row) / 4 for row in PAIRS], dtype)
    for j in range(4):  # against one cell alone the linear part is that of one pair
        one = {"key": f[..., j : j + 1], "key_ratios": r[..., j : j + 1]}
        _, linear = pair_affinity(f, query_ratios=r, temperature=1.0, impl=impl, **one)
        close((log_z - linear)[0, 0], [row[j] for row in PAIRS], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_every_pair_of_example_1(impl, dtype):
    """Candidates that are unit vectors make the similarities the features."""
    unit = torch.nn.functional.normalize(tensor(F), dim=0)
    similarity = (unit.t() @ unit).to(dtype)  # (N, N2)
    query = similarity.t().unsqueeze(0).requires_grad_()
    r = shares([[R]], dtype)
    loss = medcl.patch_affinity_contrast(
        query, r, key=torch.eye(4, dtype=dtype)[None], key_ratios=r, normalize=False, impl=impl
    )
    close(loss, SELF["E1"][2], dtype, 10)
    loss.backward()
    close(query.grad[0].t(), GAMMA, dtype)


NO_SHIFT = [(1.0, 1.0329806755), (0.5, 0.7049273133)]  # example 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("temperature", "value"), NO_SHIFT)
def test_example_4_the_shift_is_part_of_the_loss(impl, temperature, value, dtype):
    log_z, linear = pair_affinity(
        features(F, dtype),
        query_ratios=shares([[R]], dtype),
        shift=torch.zeros((), dtype=dtype),
        temperature=temperature,
        impl=impl,
    )
    close((log_z - linear / 4).mean(), value, dtype, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", ["constant", "max", "max_attached"])
def test_example_7_across_layers(impl, dtype, shift):
    f, g = features(F, dtype), features(G, dtype)
    loss = medcl.patch_affinity_contrast(
        f, shares([[R]], dtype), key=g, key_ratios=shares([[Q]], dtype), shift=shift, impl=impl
    )
    loss.backward()
    if shift == "constant":
        close(loss, 1.4227769876, dtype, 10)
        close(f.grad[0], DF, dtype)
        close(g.grad[0], DG, dtype)
        return
    close(loss, 1.4206363734, dtype, 10)
    d_f, d_g = f.grad[0].clone(), g.grad[0].clone()
    row_f, row_g = (
        [0, 0.01613818, -0.01933074, -0.00573762],
        [
            -0.0880557,
            0.0046194,
            0.02961371,
            0.01889075,
        ],
    )
    if shift == "max":
        close(d_f[0], row_f, dtype)
        close(d_g[0], row_g, dtype)
        return
    # only the pair of the largest similarity, (f2, g2), changes
    close(d_f[:, 1], [0.04019217, -0.03014412, 0.00567268], dtype)
    close(d_g[:, 1], [-0.01041434, 0.01041434, -0.00819947], dtype)
    keep = [0, 2, 3]
    close(d_f[0, keep], [row_f[i] for i in keep], dtype)
    close(d_g[0, keep], [row_g[i] for i in keep], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
def test_example_8_layers_with_different_numbers_of_samples(impl, dtype):
    key = torch.tensor(G, dtype=dtype)[:, :3].unsqueeze(0)
    loss = medcl.patch_affinity_contrast(
        features(F, dtype),
        shares([[R]], dtype),
        key=key,
        key_ratios=shares([[Q[:3]]], dtype),
        impl=impl,
    )
    close(loss, 1.1266648525, dtype, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_the_shift_is_minus_the_sum_over_pairs(impl, dtype):
    m = torch.tensor(0.9899494937, dtype=dtype, requires_grad=True)
    log_z, linear = pair_affinity(
        features(F, dtype),
        features(G, dtype),
        query_ratios=shares([[R]], dtype),
        key_ratios=shares([[Q]], dtype),
        shift=m,
        temperature=1.0,
        impl=impl,
    )
    (log_z - linear / 4).mean().backward()
    close(m.grad, 0.2126092218, dtype, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
def test_example_9_uncertainty(impl, dtype):
    z = tensor([[[2, 0, 0.3], [-1, 0, 0.9]]], dtype).requires_grad_()
    x = tensor([[[1, -2, 3]]], dtype).requires_grad_()
    y = medcl.uncertainty_reweight(x, z, impl=impl)
    close(y[0, 0], [1.72464005, -2, 3.18633711], dtype)
    y.sum().backward()
    u = [0.27535995, 1, 0.93788763]
    close(x.grad[0, 0], [2 - value for value in u], dtype)
    slopes = tensor([[-0.19552843, 0, 0.19803953], [0.19552843, 0, -0.19803953]])
    close(z.grad[0], (-slopes * tensor([1, -2, 3])).tolist(), dtype, 7)


STRIDE = [
    ((174, 174), 64, 473),
    ((238, 238), 64, 885),
    ((78, 78), 32, 190),
    ((110, 110), 32, 378),
    ((110, 110), 8, 1512),
    ((32, 32), 32, 32),
]


@pytest.mark.parametrize(("grid", "samples", "step"), STRIDE)
def test_example_10_the_sampler_of_the_paper(grid, samples, step):
    cells = sample_cells(grid, samples, sampler="stride")
    flat = torch.arange(samples) * step
    assert torch.equal(cells, torch.stack([flat // grid[1], flat % grid[1]], 1))
    if grid == (174, 174):
        assert cells[[0, 1, 2, -1]].tolist() == [[0, 0], [2, 125], [5, 76], [171, 45]]
    if grid == (32, 32):
        assert (cells[:, 1] == 0).all()  # all samples in column 0


def test_the_published_sampler_on_grids_with_few_cells():
    """One sample fewer where every cell is next to the last; where cells are fewer than samples the
    published code takes none, and this one says so."""
    flat = sample_cells((8, 8), 64, sampler="released") @ torch.tensor([8, 1])
    assert torch.equal(flat, torch.arange(63))
    with pytest.raises(ValueError, match="32 samples of a 5 x 5 grid.*25 cells"):
        sample_cells((5, 5), 32, sampler="released")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["affinity", "release2d"])
@pytest.mark.parametrize("impl", IMPLS)
def test_equal_ratios_leave_pure_attraction(impl, form, dtype):
    """D = 0: l_ij = log N - t_ij, or for the swapped form a plain softmax."""
    f = features(F, dtype)
    loss = medcl.patch_affinity_contrast(f, shares([[[0.5] * 4]], dtype), form=form, impl=impl)
    unit = torch.nn.functional.normalize(tensor(F), dim=0)
    t = unit.t() @ unit - 1
    expected = math.log(4) - t.mean() if form == "affinity" else t.logsumexp(1).mean()
    close(loss, expected.item(), dtype)


@pytest.mark.parametrize("form", ["affinity", "release2d"])
@pytest.mark.parametrize("impl", IMPLS)
def test_identical_features_give_log_n_and_no_gradient(impl, form):
    ratios = torch.rand(2, 2, 1, 50, generator=torch.Generator().manual_seed(0))
    axis = torch.zeros(2, 8, 50)
    axis[:, 3] = 2.0
    axis.requires_grad_()
    loss = medcl.patch_affinity_contrast(axis, ratios, form=form, impl=impl)
    loss.backward()
    assert loss.item() == torch.tensor(50.0).log().item()
    assert torch.equal(axis.grad, torch.zeros_like(axis))
    # unit length but for rounding
    direction = torch.randn(1, 8, 1, dtype=torch.float64).expand(2, 8, 50).clone()
    direction.requires_grad_()
    loss = medcl.patch_affinity_contrast(direction, ratios.double(), form=form, impl=impl)
    loss.backward()
    close(loss, math.log(50), torch.float64, 12)
    close(direction.grad, torch.zeros(2, 8, 50).tolist(), torch.float64, 12)
    single = direction.detach().float().requires_grad_()
    loss = medcl.patch_affinity_contrast(single, ratios, form=form, impl=impl)
    torch.testing.assert_close(loss.detach(), torch.tensor(50.0).log(), rtol=4 * 2**-23, atol=0)
    (gradient,) = torch.autograd.grad(loss, single)
    assert gradient.abs().max() < 1e-8


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_vectors_have_similarity_0_and_gradient_0(impl):
    values = torch.randn(1, 6, 20, dtype=torch.float64)
    values[:, :, [3, 7]] = 0
    values.requires_grad_()
    ratios = torch.rand(1, 1, 2, 20, dtype=torch.float64) / 2
    loss = medcl.patch_affinity_contrast(values, ratios, temperature=0.5, impl=impl)
    loss.backward()
    assert loss.isfinite() and values.grad.isfinite().all()
    assert torch.equal(values.grad[:, :, [3, 7]], torch.zeros(1, 6, 2, dtype=torch.float64))
    assert values.grad.abs().sum() > 0
