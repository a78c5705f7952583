"""The worked example of the GCL specification: to six digits on the backends that have float64, and
in float32, with the same numbers, wherever another module defines the fixture `impl` anew
(test_emulator_examples.py, interpreted/test_filter_examples.py).
"""

from __future__ import annotations

import pytest
import torch

import medcl_kernels as medcl
from medcl_kernels.ops.pair_at import pair_at
from medcl_kernels.ops.pair_logsumexp import pair_logsumexp

ROUNDING = 0.0  # what may be off besides, where a backend has float32 only
PIXELS = torch.tensor(
    [
        [1.0, 0.5, 0.0, 0.2],
        [0.8, 0.9, 0.1, 0.0],
        [0.3, 0.4, 1.0, 0.1],
        [0.0, 0.2, 0.9, 0.7],
        [0.5, 0.1, 0.3, 1.0],
        [1.0, 0.0, 0.6, 0.4],
    ],
    dtype=torch.float64,
)
Y_A, Y_B = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 1])
G_A = torch.tensor(
    [
        [0.000000, 0.461209, -0.824865, 0.000890, 0.042135, 0.320632],
        [0.738743, 0.000000, -0.802982, 0.001200, 0.007069, 0.055969],
        [-0.811201, -0.768011, 0.000000, 1.210830, 0.034539, 0.333844],
        [0.002016, 0.002239, 1.049832, 0.000000, -0.322378, -0.731708],
        [0.126245, 0.017441, 0.039595, -0.157744, 0.000000, -0.025537],
        [0.660631, 0.094961, 0.263182, -0.740932, -0.277842, 0.000000],
    ],
    dtype=torch.float64,
)

D_A, D_B = (  # dL/dZ of the whole losses
    torch.tensor(rows, dtype=torch.float64)
    for rows in (
        [
            [1.225581, 0.325763, -0.834935, 0.319287],
            [0.769602, -0.028867, -1.317097, 0.143488],
            [-1.964453, -1.493421, 1.937298, 1.336449],
            [-0.792059, 0.768101, 1.173593, -0.689104],
            [-0.061782, 0.035846, -0.452858, -0.352509],
            [0.992891, 0.476602, -0.678919, -0.925646],
        ],
        [
            [1.611837, 1.423728, -1.127332, -1.115152],
            [1.330610, 1.010800, -1.939222, -0.963135],
            [-1.578197, -0.395456, 1.644901, -0.097989],
            [-1.178314, -0.329864, 1.465990, 0.745334],
            [-0.622790, -1.003820, 0.169267, 0.754114],
            [0.606636, -0.621363, -0.386522, 0.508792],
        ],
    )
)


@pytest.fixture(params=["reference", "cpu"])
def impl(request):
    """The backend that all examples here run on."""
    return request.param


def in_float32(monkeypatch):
    """Until the end of a test: data in float32, and as many digits as that has."""
    monkeypatch.setitem(globals(), "PIXELS", PIXELS.float())
    monkeypatch.setitem(globals(), "ROUNDING", 1e-5)


def close(actual, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=max(atol, ROUNDING))


def unit_rows():
    return torch.nn.functional.normalize(PIXELS, dim=1)


def gradients_by_pair(labels, impl, **options):
    """G as a matrix, from a selection of everything."""
    chosen = medcl.select_pairs(PIXELS, labels=labels, keep=1.0, impl=impl, **options)
    matrix = torch.zeros(6, 6, dtype=PIXELS.dtype)
    matrix[chosen.anchor, chosen.candidate] = chosen.gradient
    return matrix


def pairs_of(selection, order=slice(None)):
    """As a list of tuples."""
    both = torch.stack([selection.anchor, selection.candidate], 1)
    return [tuple(one) for one in both[order].tolist()]


def ranked(selection):
    """Pairs by falling magnitude."""
    order = selection.gradient.abs().argsort(descending=True)
    return pairs_of(selection, order)


@pytest.mark.parametrize(("form", "a"), [("out", 2.229827), ("in", 1.575675), ("pixel", 1.686542)])
def test_losses(impl, form, a):
    losses = medcl.filtered_contrastive(PIXELS, labels=[Y_A, Y_B], keep=5, form=form, impl=impl)
    close(losses[0], a)
    if form == "out":
        close(losses[1], 4.106327)
        rows = medcl.filtered_contrastive(PIXELS, labels=Y_A, keep=5, reduction="none", impl=impl)
        close(rows, [2.767476, 2.032078, 3.780398, 1.989794, 0.813634, 1.995584])
        scaled = medcl.supervised_contrastive(PIXELS, Y_A, base_temperature=0.07, impl=impl)
        close(scaled, 3.185468)


def test_gradient_of_every_pair(impl):
    close(PIXELS.norm(dim=1), [1.135782, 1.208305, 1.122497, 1.157584, 1.161895, 1.232883])
    i, j = torch.triu_indices(6, 6, 1)
    rows = PIXELS.T.unsqueeze(0)
    options = {"normalize": True, "temperature": 1.0, "impl": impl}
    close(
        pair_at(rows, None, i, j, **options),
        [0.910833, 0.407871, 0.182542, 0.568329, 0.771271, 0.516103, 0.193035, 0.370391]
        + [0.577298, 0.808075, 0.452376, 0.679236, 0.736065, 0.574566, 0.753937],
    )
    close(gradients_by_pair(Y_A, impl), G_A)
    z = unit_rows().T.unsqueeze(0)
    labels = Y_A.reshape(1, 1, 6)
    lse = pair_logsumexp(z, query_labels=labels, temperature=0.1, impl=impl)
    close(lse.flatten(), [9.360998, 9.166758, 8.400269, 8.542945, 8.263642, 8.638097])


def test_in_float32_to_five_digits(impl):
    x = PIXELS.float().requires_grad_()
    loss = medcl.filtered_contrastive(x, labels=Y_A, keep=5, impl=impl)
    close(loss.detach(), 2.229827, atol=1e-5)
    loss.backward()
    close(x.grad[0], [0.132307, -0.254666, -1.283278, -0.024870], atol=1e-5)
    chosen = medcl.select_pairs(x, labels=Y_A, keep=5, impl=impl)
    assert ranked(chosen) == [(2, 3), (3, 2), (0, 2), (2, 0), (1, 2)]
    close(chosen.gradient, [-0.824865, -0.802982, -0.811201, 1.210830, 1.049832], atol=1e-5)


@pytest.mark.parametrize("form", ["out", "in", "pixel"])
def test_rows_of_the_gradient_sum_to_zero_and_agree_with_finite_differences(impl, form):
    matrix = gradients_by_pair(Y_A, impl, form=form)
    close(matrix.sum(1), torch.zeros(6), atol=1e-12)
    z = unit_rows().double()

    def loss(cosines):
        same = (Y_A[:, None] == Y_A) & ~torch.eye(6, dtype=torch.bool)
        other = Y_A[:, None] != Y_A
        s = cosines / 0.1
        everything = s.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).logsumexp(1)
        if form == "out":
            value = everything - (s * same).sum(1) / 2
        elif form == "in":
            positive = s.masked_fill(~same, -torch.inf).logsumexp(1)
            value = everything - positive + torch.tensor(2.0).double().log()
        else:
            rest = s.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
            value = ((torch.logaddexp(s, rest) - s) * same).sum(1) / 2
        return value.mean()

    cosines, step = z @ z.T, 1e-6
    for i in range(6):
        for j in range(6):
            if i != j:
                up, down = cosines.clone(), cosines.clone()
                up[i, j] += step
                down[i, j] -= step
                slope = (loss(up) - loss(down)) / (2 * step)
                close(matrix[i, j], slope, atol=1e-8)


@pytest.mark.parametrize("scope", ["global", "image"])
def test_five_largest_pairs(impl, scope):
    chosen = medcl.select_pairs(PIXELS, labels=Y_A, keep=5, scope=scope, impl=impl)
    assert ranked(chosen) == [(2, 3), (3, 2), (0, 2), (2, 0), (1, 2)]
    close(chosen.gradient, [-0.824865, -0.802982, -0.811201, 1.210830, 1.049832])
    close(chosen.threshold.squeeze(), 0.802982)
    seven = medcl.select_pairs(PIXELS, labels=Y_A, keep=7, scope=scope, impl=impl)
    assert ranked(seven)[5:] == [(2, 1), (5, 3)]


def test_five_largest_by_representation(impl):
    options = {"labels": Y_A, "score": "representation", "impl": impl}
    expected = [
        (0.663098, (0, 2)),
        (0.659831, (2, 0)),
        (0.635436, (2, 3)),
        (0.586034, (2, 1)),
        (0.569207, (1, 2)),
    ]
    for k, (score, _) in enumerate(expected, 1):
        chosen = medcl.select_pairs(PIXELS, keep=k, **options)
        assert sorted(pairs_of(chosen)) == sorted(pair for _, pair in expected[:k])
        close(chosen.threshold[0], score)


@pytest.mark.parametrize("scope", ["global", "image"])
def test_five_largest_undirected(impl, scope):
    options = {"labels": Y_A, "scope": scope, "direction": "undirected", "impl": impl}
    expected = {
        (2, 3): 2.260661,
        (0, 2): -1.636067,
        (1, 2): -1.570992,
        (3, 5): -1.472640,
        (0, 1): 1.199952,  # a positive that is pushed away
    }
    chosen = medcl.select_pairs(PIXELS, keep=5, **options)
    assert ranked(chosen) == list(expected)
    close(chosen.gradient, [expected[pair] for pair in pairs_of(chosen)])
    close(chosen.threshold.squeeze(), 1.199952)
    sums = (G_A + G_A.T).triu(1)
    for k in (1, 6, 15, 99):
        chosen = medcl.select_pairs(PIXELS, keep=k, **options)
        table = torch.zeros(6, 6, dtype=PIXELS.dtype)
        table[chosen.anchor, chosen.candidate] = chosen.gradient
        limit = sums.abs().flatten().sort(descending=True).values[min(k, 15) - 1]
        close(table, torch.where(sums.abs() >= limit, sums, 0.0), atol=2e-6)
        close(chosen.threshold.squeeze(), limit if k < 15 else 0.0, atol=2e-6)


def test_positives_that_would_be_pushed_away_can_be_left_out(impl):
    """Of the positives (1, 0), G = 0.738743, and (0, 1), 0.461209, are too similar already."""
    options = {"labels": Y_A, "keep": 30, "pos_sign": "attract_only", "impl": impl}
    chosen = medcl.select_pairs(PIXELS, **options)
    positive = (Y_A[:, None] == Y_A) & ~torch.eye(6, dtype=torch.bool)
    left_out = {(i, j) for i, j in (positive & (G_A > 0)).nonzero().tolist()}
    assert left_out == {(0, 1), (1, 0)}
    everything = {(i, j) for i in range(6) for j in range(6) if i != j}
    assert set(pairs_of(chosen)) == everything - left_out
    nine = medcl.select_pairs(PIXELS, **{**options, "keep": 9})
    order = sorted(everything - left_out, key=lambda pair: -G_A[pair].abs().item())
    assert ranked(nine) == order[:9] and (1, 0) not in order
    both = medcl.select_pairs(PIXELS, direction="undirected", **{**options, "keep": 5})
    assert ranked(both)[:4] == [(2, 3), (0, 2), (1, 2), (3, 5)] and (0, 1) not in ranked(both)


def test_the_largest_pair_of_every_anchor(impl):
    chosen = medcl.select_pairs(PIXELS, labels=Y_A, keep=1, scope="anchor", impl=impl)
    assert chosen.anchor.tolist() == [0, 1, 2, 3, 4, 5]
    assert chosen.candidate.tolist() == [2, 2, 3, 2, 3, 3]
    close(chosen.threshold, chosen.gradient.abs())


def test_quotas_take_the_largest_of_each_kind(impl):
    chosen = medcl.select_pairs(PIXELS, labels=Y_A, keep=(3, 2), impl=impl)
    assert ranked(chosen) == [(2, 3), (3, 2), (0, 2), (2, 0), (1, 2)]
    chosen = medcl.select_pairs(PIXELS, labels=Y_A, keep=(1, 3), impl=impl)
    assert ranked(chosen) == [(2, 3), (3, 2), (0, 2), (5, 0)]
    none = medcl.select_pairs(PIXELS, labels=Y_A, keep=(0, 3), impl=impl)
    assert ranked(none) == [(2, 3), (3, 2), (5, 0)]


def test_gradient_through_the_five_pairs(impl):
    x = PIXELS.clone().requires_grad_()
    loss = medcl.filtered_contrastive(x, labels=Y_A, keep=5, impl=impl)
    close(loss.detach(), 2.229827)
    loss.backward()
    close(
        x.grad,
        [
            [0.132307, -0.254666, -1.283278, -0.024870],
            [0.049471, 0.018653, -0.563645, -0.059203],
            [-1.934297, -1.063034, 0.915296, 0.902068],
            [0.521938, 0.423263, 0.512850, -0.780311],
            [0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0],
        ],
    )
    z = unit_rows().requires_grad_()
    medcl.filtered_contrastive(z, labels=Y_A, keep=5, normalize=False, impl=impl).backward()
    close(
        z.grad,
        [
            [-0.437257, -0.583010, -1.457524, -0.145752],
            [-0.214606, -0.286141, -0.715353, -0.071535],
            [-1.972118, -0.927753, 1.691167, 1.078944],
            [0.604187, 0.805583, 2.013957, 0.201396],
            [0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0],
        ],
    )
    close((z.grad * z.detach()).sum() / 2, 0.745058)  # the sum of G s over the pairs, both roles


@pytest.mark.parametrize(
    ("use", "rows", "mean"),
    [
        ("recompute", [0.0, 0.0, 4.020149, 0.0, 0.0, 0.0], 1.340050),
        ("pos_full_den", [5.282284, 4.005728, 4.321555, 0.0, 0.0, 0.0], 4.536522),
    ],
)
def test_other_uses_of_the_five_pairs(impl, use, rows, mean):
    options = {"labels": Y_A, "keep": 5, "use": use, "impl": impl}
    close(medcl.filtered_contrastive(PIXELS, reduction="none", **options), rows)
    close(medcl.filtered_contrastive(PIXELS, **options), mean)
    x = PIXELS.clone().requires_grad_()
    medcl.filtered_contrastive(x, **options).backward()
    if use == "recompute":  # two anchors lost: only 0, 2 and 3 move
        assert x.grad.abs().sum(1).gt(0).tolist() == [True, False, True, True, False, False]


@pytest.mark.parametrize("sign", ["any", "attract_only"])
@pytest.mark.parametrize("direction", ["directed", "undirected"])
def test_renorm_scales_the_masked_gradient_to_the_magnitude_of_all_pairs(impl, sign, direction):
    options = {"labels": Y_A, "keep": 5, "pos_sign": sign, "direction": direction, "impl": impl}
    found = []
    for use in ("mask_grad", "renorm"):
        x = PIXELS.clone().requires_grad_()
        loss = medcl.filtered_contrastive(x, use=use, **options)
        close(loss.detach(), 2.229827)
        found.append(torch.autograd.grad(loss, x)[0])
    everything = G_A if direction == "directed" else (G_A + G_A.T).triu(1)
    if sign == "attract_only":
        everything = torch.where((Y_A[:, None] == Y_A) & (everything > 0), 0.0, everything)
    chosen = medcl.select_pairs(PIXELS, **options)
    factor = everything.abs().sum() / chosen.gradient.abs().sum()
    assert factor > 1.2
    close(found[1], factor * found[0], atol=1e-5)  # G_A has six digits


def perspectives():
    """dL/dZ of both labels, through the full loss."""
    z = unit_rows().requires_grad_()
    losses = medcl.supervised_contrastive(z, [Y_A, Y_B], normalize=False, impl="reference")
    return torch.stack([torch.autograd.grad(one, z, retain_graph=True)[0] for one in losses])


def test_one_row_of_six_conflicts(impl):
    g = perspectives()
    close(g[0], D_A)
    close(g[1], D_B)
    close((g[0] * g[1]).sum(1), [3.024431, 3.410805, 6.746583, 1.886789, -0.339992, 0.097636])
    close(torch.cosine_similarity(g[0, 4], g[1, 4], dim=0), -0.416455)
    close(torch.cosine_similarity(g[0].flatten(), g[1].flatten(), dim=0), 0.600205)
    options = {"order": "fixed", "impl": impl}
    total = medcl.mitigate_gradients(g, reduction="sum", **options)
    close(total[4], [-0.853629, -1.102790, -0.715083, 0.171905])
    close(g.sum(0)[4], [-0.684572, -0.967974, -0.283591, 0.401605])
    others = [0, 1, 2, 3, 5]
    close(total[others], g.sum(0)[others], atol=1e-12)
    close(medcl.mitigate_gradients(g, **options), total / 2, atol=1e-12)
    flat = medcl.mitigate_gradients(g, unit="flat", reduction="sum", **options)
    close(flat, g.sum(0), atol=1e-12)  # as one vector they do not conflict
    close((g[0] * g[1]).sum(), 14.826252)


def test_the_shared_softmax_gives_the_same_rows(impl):
    g = perspectives()
    z = unit_rows().requires_grad_()
    loss = medcl.mitigated_contrastive(z, [Y_A, Y_B], normalize=False, impl=impl)
    close(loss.detach(), (2.229827 + 4.106327) / 2)
    loss.backward()
    expected = medcl.mitigate_gradients(g, impl="reference")
    close(z.grad, expected, atol=1e-12)


def test_consensus_over_pairs(impl):
    matrices = torch.stack([gradients_by_pair(one, "reference") for one in (Y_A, Y_B)])
    agreed = medcl.mitigate_gradients(matrices, method="consensus", impl=impl)
    opposite = {(i, j) for i, j in ((matrices[0] * matrices[1]) < 0).nonzero().tolist()}
    listed = "04 12 13 15 21 24 31 34 40 42 43 45 51 54"
    assert opposite == {(int(pair[0]), int(pair[1])) for pair in listed.split()}
    zero = {(i, j) for i, j in (agreed == 0).nonzero().tolist() if i != j}
    assert zero == opposite
    kept = agreed != 0
    close(agreed[kept], matrices.mean(0)[kept], atol=1e-15)


def vectors(*rows):
    return torch.tensor(rows, dtype=PIXELS.dtype).unsqueeze(1)


A, B, C = (1.0, 2.0, -1.0), (-2.0, 0.5, 1.0), (0.5, -1.0, 2.0)


@pytest.mark.parametrize("unit", ["row", "flat"])
def test_plain_vectors(impl, unit):
    g = vectors(A, B)
    options = {"unit": unit, "impl": impl}
    total = medcl.mitigate_gradients(g, reduction="sum", **options)[0]
    close(total, [-1.428571, 3.357143, 0.047619])
    close(medcl.mitigate_gradients(g, **options)[0], [-0.714286, 1.678571, 0.023810])
    close(g[:, 0] @ total, [5.238095, 4.583333])
    close(g[:, 0] @ g[:, 0].sum(0), [4.0, 3.25])  # what the plain sum gains for each
    # a gradient twice as long adds its own projection once more: u_a and u_b apart
    doubled = [g * torch.tensor(by).to(g).reshape(2, 1, 1) for by in ([2, 1], [1, 2])]
    u_a, u_b = (
        medcl.mitigate_gradients(one, reduction="sum", **options)[0] - total for one in doubled
    )
    close(u_a, [0.238095, 2.190476, -0.619048])
    close(u_b, [-1.666667, 1.166667, 0.666667])
    close(torch.stack([u_a @ g[1, 0], u_b @ g[0, 0]]), [0.0, 0.0])
    close(medcl.mitigate_gradients(g, method="sum", **options)[0], [-1.0, 2.5, 0.0])
    close(medcl.mitigate_gradients(g, method="mean", **options)[0], [-0.5, 1.25, 0.0])
    compromise = medcl.mitigate_gradients(g, method="cagrad", **options)[0]
    close(compromise, [-0.858447, 1.815002, 0.073581])
    close(torch.cosine_similarity(g[0, 0], g[1, 0], dim=0), -0.356348)
    close(g[:, 0] @ compromise, [2.697975, 2.697975])
    away = compromise - g[:, 0].mean(0)  # along w a + (1 - w) b
    shares = torch.linalg.lstsq(g[:, 0].t(), away.unsqueeze(1)).solution.flatten()
    close(shares[0] / shares.sum(), 0.425848)


def test_with_three_labels_the_order_matters(impl):
    options = {"order": "fixed", "reduction": "sum", "impl": impl}
    ascending = medcl.mitigate_gradients(vectors(A, B, C), **options)[0]
    close(ascending, [-0.220522, 2.829932, 3.106009])
    descending = medcl.mitigate_gradients(vectors(C, B, A), **options)[0]
    close(descending, [0.115079, 2.825397, 2.734127])
