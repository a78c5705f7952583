"""The numbers of the IDEAL specification, section 6, to all of their digits: one image of 2 x 2
pixels with 3 channels, in every variant, with the reference and with the C++ kernels. (Its
cross-consistency: test_train_consistency.py.)"""

from __future__ import annotations

import pytest
import torch

import medcl_kernels as medcl

TOLERANCE = {"rtol": 0, "atol": 1e-6}
IMPLS = ["reference", "cpu"]

Q = [[1, 0, 1], [0, 2, 1], [-1, 1, 0], [2, 1, 0]]
K = [[0, 1, 1], [1, 0, 2], [2, 0, -1], [-1, 2, 0]]
FQ = [[2, 0, 1], [0, 1, 1], [1, 2, 0], [1, 0, -1]]
FK = [[1, 1, 2], [2, 0, 1], [1, 3, 1], [0, 3, -1]]
QUEUE = [[1, 1, 1], [0, -1, 1]]
C = [1, 0, 2, 1]  # key pixel of every query pixel, by the encoder's maps
C_BACK = [1, 0, 2, 2]  # and the other way round

# temperature: per pixel, L0, identity, k->q, symmetric, queue only, image+queue, +intra-view,
# positive excluded
TABLE = {
    0.1: (
        [0.012967, 0.207208, 15.822585, 4.026229],
        *(5.017247, 8.510664, 3.642163, 4.329705, 2.627292, 5.251886, 5.093406, 3.505825),
    ),
    0.2: (
        [0.139950, 0.433755, 8.008482, 2.217265],
        *(2.699863, 4.446571, 1.999980, 2.349921, 1.533542, 3.004753, 2.932590, 1.900965),
    ),
    0.5: (
        [0.570742, 0.777968, 3.587313, 1.508647],
        *(1.611167, 2.309851, 1.323874, 1.467521, 1.083223, 1.951792, 2.028770, 1.179745),
    ),
    1.0: (
        [0.896911, 1.014000, 2.335604, 1.406535],
        *(1.413262, 1.762604, 1.270923, 1.342093, 1.036597, 1.780410, 1.904065, 1.073923),
    ),
}


def image(rows):
    """Row-major pixels -> `(1, 3, 2, 2)` float64."""
    return torch.tensor(rows, dtype=torch.float64).t().reshape(1, 3, 2, 2)


def grid(indices):
    return torch.tensor(indices).reshape(1, 2, 2)


def close(actual, expected):
    torch.testing.assert_close(
        actual.detach(), torch.tensor(expected, dtype=torch.float64), **TOLERANCE
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_correspondences(impl):
    fq, fk = image(FQ), image(FK)
    assert medcl.dense_correspondence(fq, fk, impl=impl).flatten().tolist() == C
    assert medcl.dense_correspondence(fk, fq, impl=impl).flatten().tolist() == C_BACK
    mutual = medcl.dense_correspondence(fq, fk, mutual=True, impl=impl)
    assert mutual.flatten().tolist() == [1, 0, 2, -1]
    # on the projections it would be another answer, so matching on the wrong tensor shows
    projections = medcl.dense_correspondence(image(Q), image(K), impl=impl)
    assert projections.flatten().tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", TABLE)
def test_table_of_variants(impl, temperature):
    rows, l0, identity, back, symmetric, queue_only, with_queue, intra, _ = TABLE[temperature]
    q, k, c, c_back = image(Q), image(K), grid(C), grid(C_BACK)
    queue = torch.tensor(QUEUE, dtype=torch.float64)

    def loss(positives=c, **options):
        return medcl.info_nce(q, k, positives, temperature=temperature, impl=impl, **options)

    close(loss(reduction="none").flatten(), rows)
    close(loss(), l0)
    close(loss(reduction="sum"), 4 * torch.tensor(rows, dtype=torch.float64).mean().item())
    close(loss(None), identity)
    close(medcl.info_nce(k, q, c_back, temperature=temperature, impl=impl), back)
    close(loss((c, c_back), symmetric=True), symmetric)
    close(loss(queue=queue, pairs="queue"), queue_only)
    close(loss(queue=queue), with_queue)
    close(loss(intra_view=True), intra)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", TABLE)
def test_positive_left_out_of_the_denominator(impl, temperature):
    """No option of the loss; its statistics give it."""
    from medcl_kernels.layout import rows
    from medcl_kernels.ops.pair_logsumexp import pair_logsumexp
    from medcl_kernels.ops.positive_at import positive_at

    options = {"temperature": temperature, "impl": impl}
    q, k = rows(image(Q)), rows(image(K))
    at_positive = positive_at(q, k, torch.tensor([C]), **options)
    lse = pair_logsumexp(q, k, **options)[0]
    loss = (lse.exp() - at_positive.exp()).log() - at_positive
    close(loss.mean(), TABLE[temperature][-1])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_pixel_ignored(impl):
    positives = grid([1, 0, -1, 1])
    loss = medcl.info_nce(image(Q), image(K), positives, temperature=0.2, impl=impl)
    close(loss, 0.930323)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("form", "expected"), [("in", 0.019897), ("out", 2.310243)])
def test_several_positives_within_radius_1(impl, form, expected):
    # the pixel itself and its two neighbours on the 2 x 2 grid (the diagonal is sqrt(2) away)
    near = [[0, 1, 2], [1, 0, 3], [2, 3, 0], [3, 2, 1]]
    padded = torch.tensor([[*row, -1] for row in near]).reshape(1, 2, 2, 4)
    loss = medcl.info_nce(
        image(Q), image(K), padded, temperature=0.2, multi_positive=form, impl=impl
    )
    close(loss, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_hinge(impl):
    q, k = image(Q), image(K)
    close(medcl.dense_hinge(q, k, grid(C), margin=0.5, impl=impl), 0.671163)
    # pixel 1: 1 - 0.948683 and (0 + 0 + 0.3) / 3; pixel 2: 1 + 0.632456 and 0.448683 / 3
    rows = medcl.dense_hinge(q, k, grid(C), margin=0.5, reduction="none", impl=impl)
    close(rows.flatten(), [0.0513167, 0.1513167, 1.7820169, 0.7])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("pairs", "expected"), [("batch", 3.199863), ("image", 3.021853)])
def test_two_images_of_two_pixels(impl, pairs, expected):
    def halves(rows):
        return torch.tensor(rows, dtype=torch.float64).reshape(2, 2, 3).transpose(1, 2)

    index = medcl.dense_correspondence(halves(FQ), halves(FK), impl=impl)
    assert index.tolist() == [[1, 0], [0, 1]]  # global ids 1, 0, 2, 3
    loss = medcl.info_nce(halves(Q), halves(K), index, temperature=0.2, pairs=pairs, impl=impl)
    close(loss, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients(impl, reduction):
    """Through the scalar path (gradients made in forward) and through the per-pixel path."""
    q, k = image(Q).requires_grad_(), image(K).requires_grad_()
    loss = medcl.info_nce(q, k, grid(C), temperature=0.2, reduction=reduction, impl=impl)
    loss.mean().backward()
    close(
        q.grad[0].flatten(1).t(),
        [
            [0.018499, 0.058881, -0.018499],
            [-0.065573, 0.050504, -0.101009],
            [-0.186581, -0.186581, 0.456264],
            [0.020905, -0.041810, -0.618408],
        ],
    )
    close(
        k.grad[0].flatten(1).t(),
        [
            [0.054452, -0.054306, 0.054306],
            [-0.381768, -0.201283, 0.190884],
            [0.168438, -0.192936, 0.336876],
            [-0.073177, -0.036589, 0.077653],
        ],
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_the_temperature(impl):
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = medcl.info_nce(image(Q), image(K), grid(C), temperature=temperature, impl=impl)
    close(loss, 2.699863)
    loss.backward()
    close(temperature.grad, -10.674305)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_behind_the_loss(impl):
    from medcl_kernels.layout import rows
    from medcl_kernels.ops.pair_logsumexp import pair_logsumexp
    from medcl_kernels.ops.positive_at import positive_at

    q, k = rows(image(Q)), rows(image(K))
    lse = pair_logsumexp(q, k, temperature=0.2, impl=impl)
    close(lse.flatten(), [4.883367, 5.177171, 4.846204, 4.217265])
    everyone = torch.arange(4).expand(1, 4, 4).contiguous()
    cosines = positive_at(q, k, everyone, temperature=1.0, impl=impl)
    close(
        cosines[0],
        [
            [0.500000, 0.948683, 0.316228, -0.316228],
            [0.948683, 0.400000, -0.200000, 0.800000],
            [0.500000, -0.316228, -0.632456, 0.948683],
            [0.316228, 0.400000, 0.800000, 0.000000],
        ],
    )
    softmax = (cosines[0] / 0.2 - lse.reshape(4, 1)).exp()
    close(
        softmax,
        [
            [0.092240, 0.869402, 0.036801, 0.001558],
            [0.648071, 0.041703, 0.002076, 0.308149],
            [0.095732, 0.001617, 0.000333, 0.902319],
            [0.071638, 0.108907, 0.804716, 0.014739],
        ],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_integers_are_exact_in_every_dtype_so_only_the_arithmetic_differs(impl, dtype):
    loss = medcl.info_nce(
        image(Q).to(dtype), image(K).to(dtype), grid(C), temperature=0.2, impl=impl
    )
    torch.testing.assert_close(loss, torch.tensor(2.699863), rtol=1e-6, atol=0)
