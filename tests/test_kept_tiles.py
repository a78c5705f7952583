"""Supervised contrast on the CPU keeps some tiles of exponentials from its sums for its gradient
and makes the others again: how many depends on shapes alone, and so do the bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import medcl_kernels as medcl
from medcl_kernels.ops.pair_logsumexp import pair_logsumexp

TEMPERATURE = 0.2


def expected(x, labels):
    """The gradient of the summed loss, in float64, from the operation that keeps nothing."""
    x = x.double().requires_grad_()
    total = x.new_zeros(())
    for rows, label in zip(x, labels, strict=True):
        lse = pair_logsumexp(rows[None], temperature=TEMPERATURE, impl="cpu").flatten()
        z = F.normalize(rows.T, dim=1)
        one_hot = F.one_hot(label).double()
        sums, count = one_hot @ (one_hot.T @ z), one_hot @ one_hot.sum(0) - 1
        total = total + (lse - ((sums - z) * z).sum(1) / count / TEMPERATURE).sum()
    return torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize(
    ("dtype", "n", "tolerance"),
    [
        pytest.param(torch.float32, 1601, 1e-5, id="all_kept"),
        pytest.param(torch.float32, 3001, 1e-5, id="partly_kept"),
        pytest.param(torch.float64, 2701, 1e-12, id="partly_kept_float64"),
    ],
)
def test_the_gradient_is_the_same_from_kept_tiles_and_from_others(dtype, n, tolerance):
    x = torch.randn(2, 3, n, dtype=dtype)
    labels = torch.randint(0, 5, (2, n))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):  # the two images one after the other, and side by side
            torch.set_num_threads(threads)
            y = x.clone().requires_grad_()
            loss = medcl.supervised_contrastive(
                y,
                labels,
                pairs="image",
                temperature=TEMPERATURE,
                reduction="sum",
                impl="cpu",
            )
            found += torch.autograd.grad(loss, y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    wanted = expected(x, labels)
    assert (found[0].double() - wanted).abs().max() < tolerance * wanted.abs().max()
