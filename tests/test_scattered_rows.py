"""Rows that look consecutive by their first and last offset but are not."""

import pytest
import torch

import medcl_kernels as medcl


@pytest.mark.parametrize("n", range(2, 9))
def test_positives_in_any_order_give_the_reference_gradients(n):
    """Channel-major keys are read in runs; a permutation may start and end like a run."""
    query, key = torch.randn(2, 1, 5, n, dtype=torch.float64).unbind(0)
    for shift in range(n):
        index = torch.randperm(n)
        index[-1] = (index[0] + n - 1) % n
        results = []
        for impl in ("cpu", "reference"):
            q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
            value = medcl.info_nce(q, k, index.roll(shift)[None], impl=impl)
            results.append((value.detach(), *torch.autograd.grad(value, (q, k))))
        for ours, truth in zip(*results, strict=True):
            torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("images", [2, 3, 5])
@pytest.mark.parametrize("length", [3, 7, 50])
def test_images_interleaved_in_memory_give_the_reference_gradients(images, length):
    """(L, B) storage: rows of one image are B apart, and blocks run over several images."""
    stored = torch.randn(6, length, images, dtype=torch.float64)
    labels = torch.randint(0, 3, (images, length))
    results = []
    for impl in ("cpu", "reference"):
        leaf = stored.clone().requires_grad_()
        value = medcl.supervised_contrastive(leaf.permute(2, 0, 1), labels, impl=impl)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
