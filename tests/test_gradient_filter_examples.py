"""The worked example of the GCL specification, to six digits, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch

import medcl_kernels as medcl
from medcl_kernels import dispatch

IMPLS = [impl for impl in ("reference", "cpu") if dispatch.has_kernel(impl, "pair_topk")]
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


def close(actual, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def unit_rows():
    return torch.nn.functional.normalize(PIXELS, dim=1)


def gradients_by_pair(labels, impl, **options):
    """G as a matrix, from a selection of everything."""
    chosen = medcl.select_pairs(PIXELS, labels=labels, keep=1.0, impl=impl, **options)
    matrix = torch.zeros(6, 6, dtype=torch.float64)
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


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_every_pair(impl):
    close(gradients_by_pair(Y_A, impl), G_A)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
def test_rows_of_the_gradient_sum_to_zero_and_agree_with_finite_differences(impl, form):
    matrix = gradients_by_pair(Y_A, impl, form=form)
    close(matrix.sum(1), torch.zeros(6), atol=1e-12)
    z = unit_rows()

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
                assert abs(slope - matrix[i, j]) < 1e-8, (form, i, j)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scope", ["global", "image"])
def test_five_largest_pairs(impl, scope):
    chosen = medcl.select_pairs(PIXELS, labels=Y_A, keep=5, scope=scope, impl=impl)
    assert ranked(chosen) == [(2, 3), (3, 2), (0, 2), (2, 0), (1, 2)]
    close(chosen.gradient, [-0.824865, -0.802982, -0.811201, 1.210830, 1.049832])
    close(chosen.threshold.squeeze(), 0.802982)
    seven = medcl.select_pairs(PIXELS, labels=Y_A, keep=7, scope=scope, impl=impl)
    assert ranked(seven)[5:] == [(2, 1), (5, 3)]


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_the_largest_pair_of_every_anchor(impl):
    chosen = medcl.select_pairs(PIXELS, labels=Y_A, keep=1, scope="anchor", impl=impl)
    assert chosen.anchor.tolist() == [0, 1, 2, 3, 4, 5]
    assert chosen.candidate.tolist() == [2, 2, 3, 2, 3, 3]
    close(chosen.threshold, chosen.gradient.abs())


@pytest.mark.parametrize("impl", IMPLS)
def test_quotas_take_the_largest_of_each_kind(impl):
    chosen = medcl.select_pairs(PIXELS, labels=Y_A, keep=(3, 2), impl=impl)
    assert ranked(chosen) == [(2, 3), (3, 2), (0, 2), (2, 0), (1, 2)]
    chosen = medcl.select_pairs(PIXELS, labels=Y_A, keep=(1, 3), impl=impl)
    assert ranked(chosen) == [(2, 3), (3, 2), (0, 2), (5, 0)]
    none = medcl.select_pairs(PIXELS, labels=Y_A, keep=(0, 3), impl=impl)
    assert ranked(none) == [(2, 3), (3, 2), (5, 0)]


@pytest.mark.parametrize("impl", IMPLS)
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("use", "rows", "mean"),
    [
        ("renorm", [0.0, 0.0, 4.020149, 0.0, 0.0, 0.0], 1.340050),
        ("pos_full_den", [5.282284, 4.005728, 4.321555, 0.0, 0.0, 0.0], 4.536522),
    ],
)
def test_other_uses_of_the_five_pairs(impl, use, rows, mean):
    options = {"labels": Y_A, "keep": 5, "use": use, "impl": impl}
    close(medcl.filtered_contrastive(PIXELS, reduction="none", **options), rows)
    close(medcl.filtered_contrastive(PIXELS, **options), mean)
    x = PIXELS.clone().requires_grad_()
    medcl.filtered_contrastive(x, **options).backward()
    if use == "renorm":  # two anchors lost: only 0, 2 and 3 move
        assert x.grad.abs().sum(1).gt(0).tolist() == [True, False, True, True, False, False]


def perspectives():
    """dL/dZ of both labels, through the full loss."""
    z = unit_rows().requires_grad_()
    losses = medcl.supervised_contrastive(z, [Y_A, Y_B], normalize=False, impl="reference")
    return torch.stack([torch.autograd.grad(one, z, retain_graph=True)[0] for one in losses])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_row_of_six_conflicts(impl):
    g = perspectives()
    close(
        g[:, 4],
        [
            [-0.061782, 0.035846, -0.452858, -0.352509],
            [-0.622790, -1.003820, 0.169267, 0.754114],
        ],
    )
    close((g[0] * g[1]).sum(1), [3.024431, 3.410805, 6.746583, 1.886789, -0.339992, 0.097636])
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


@pytest.mark.parametrize("impl", IMPLS)
def test_the_shared_softmax_gives_the_same_rows(impl):
    g = perspectives()
    z = unit_rows().requires_grad_()
    loss = medcl.mitigated_contrastive(z, [Y_A, Y_B], normalize=False, impl=impl)
    close(loss.detach(), (2.229827 + 4.106327) / 2)
    loss.backward()
    expected = medcl.mitigate_gradients(g, impl="reference")
    close(z.grad, expected, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
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
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1)


A, B, C = (1.0, 2.0, -1.0), (-2.0, 0.5, 1.0), (0.5, -1.0, 2.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unit", ["row", "flat"])
def test_plain_vectors(impl, unit):
    g = vectors(A, B)
    options = {"unit": unit, "impl": impl}
    total = medcl.mitigate_gradients(g, reduction="sum", **options)[0]
    close(total, [-1.428571, 3.357143, 0.047619])
    close(medcl.mitigate_gradients(g, **options)[0], [-0.714286, 1.678571, 0.023810])
    close(g[:, 0] @ total, [5.238095, 4.583333])
    close(medcl.mitigate_gradients(g, method="sum", **options)[0], [-1.0, 2.5, 0.0])
    close(medcl.mitigate_gradients(g, method="mean", **options)[0], [-0.5, 1.25, 0.0])
    compromise = medcl.mitigate_gradients(g, method="cagrad", **options)[0]
    close(compromise, [-0.858447, 1.815002, 0.073581])
    close(g[:, 0] @ compromise, [2.697975, 2.697975])


@pytest.mark.parametrize("impl", IMPLS)
def test_with_three_labels_the_order_matters(impl):
    options = {"order": "fixed", "reduction": "sum", "impl": impl}
    ascending = medcl.mitigate_gradients(vectors(A, B, C), **options)[0]
    close(ascending, [-0.220522, 2.829932, 3.106009])
    descending = medcl.mitigate_gradients(vectors(C, B, A), **options)[0]
    close(descending, [0.115079, 2.825397, 2.734127])
