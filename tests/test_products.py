"""Sizes around the blocks of the C++ products: registers, panels, tiles, columns too few for them.

test_ops.py judges exactness at a few such sizes; here all edges are met, in the two losses whose
passes make exponentials and products together.
"""

from __future__ import annotations

import pytest
import torch

import medcl_kernels as medcl

# one block of rows is 6, a vector 2 to 16 values, a panel 4 vectors, a tile at most 288 x 384
ROWS = (1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 191, 193, 289, 401)
CHANNELS = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 65, 129)


def value_and_gradients(function, *leaves, **options):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = function(*leaves, **options)
    return value.detach(), *torch.autograd.grad(value, leaves)


def supervised(features, **options):
    labels = torch.arange(features.shape[0]) % 3
    return medcl.supervised_contrastive(features, labels, **options)


def check(function, *leaves, dtype):
    truth = value_and_gradients(
        function, *(x.double() for x in leaves), reduction="sum", impl="reference"
    )
    ours = value_and_gradients(
        function, *(x.to(dtype) for x in leaves), reduction="sum", impl="cpu"
    )
    for mine, exact in zip(ours, truth, strict=True):
        scale = exact.abs().max() + 1  # of sums whose terms may cancel
        error = (mine.double() - exact).abs().max() / scale
        assert error < 100 * torch.finfo(dtype).eps, (leaves[0].shape, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_edge_of_a_block_gives_the_reference_values(channels, dtype):
    for rows in ROWS:
        query, key = torch.randn(2, rows, channels, dtype=torch.float64).unbind(0)
        check(medcl.info_nce, query, key, dtype=dtype)
        if rows > 3:  # below, no anchor has a positive
            check(supervised, query, dtype=dtype)


@pytest.mark.parametrize("layout", ["rows", "channels"])
@pytest.mark.parametrize("channels", [3, 20])
def test_both_layouts_and_thread_counts_give_one_result(layout, channels):
    """Tiles are kept in the layout that the source has not; who packs them must not show."""
    shape = (1, channels, 25, 40)
    query, key = torch.randn(2, *shape).unbind(0)
    if layout == "rows":
        query, key = (x.to(memory_format=torch.channels_last) for x in (query, key))
    labels = torch.randint(0, 3, (1, 25, 40))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                value_and_gradients(medcl.info_nce, query, key)
                + value_and_gradients(medcl.supervised_contrastive, query, labels=labels)
            )
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(1, 5), (7, 5), (2, 6, 3, 4), (1, 4, 9)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
def test_nt_xent_is_the_two_directions_with_intra_view_negatives(shape, reduction, normalize):
    """All impl but the reference take one triangle over both views."""
    leaves = (*torch.randn(2, *shape, dtype=torch.float64).unbind(0), torch.tensor(0.2).double())

    def loss(query, key, temperature, impl):
        return medcl.info_nce(
            query,
            key,
            temperature=temperature,
            symmetric=True,
            intra_view=True,
            reduction=reduction,
            normalize=normalize,
            impl=impl,
        )

    ours = value_and_gradients(loss, *leaves, impl="auto")
    truth = value_and_gradients(loss, *leaves, impl="reference")
    for mine, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-10)
