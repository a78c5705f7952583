"""O(N) memory by hand: blocks of rows through torch.mm, similarities recomputed in the backward.

The strongest thing that one writes in an afternoon: 2u FLOP forward and 6u backward (u = N * N * D
multiply-adds), everything elementwise in place. Positives go through class sums or a gather. Under
autocast rows and weights are rounded for the products, which answer in float32. In float64 it is
also the truth for sizes at which the reference would need gigabytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .eager import narrow, one_set, positive_mean, target_rows

# rows at a time; on the CPU the fastest of 128, 256, 512 and 1024 where this was tuned, on a GPU
# enough to fill it
BLOCK = {"cpu": 256, "cuda": 4096}


class _LogSumExp(torch.autograd.Function):
    """Log-sum-exp of `q @ k.T / temperature` over each row, `(N,)`; rows are rounded to `products`
    for the products, and their gradients are not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        temperature: float,
        exclude_self: bool,
        products: torch.dtype,
    ) -> Tensor:
        left, right = q.to(products), k.to(products)
        lse = q.new_empty(q.shape[0])
        block = BLOCK[q.device.type]
        for start in range(0, q.shape[0], block):
            s = _scores(left, right, start, block, q.dtype, temperature, exclude_self)
            top = s.amax(1, keepdim=True)
            torch.add(top[:, 0], s.sub_(top).exp_().sum(1).log_(), out=lse[start : start + block])
        ctx.save_for_backward(left, right, lse)
        ctx.options = temperature, exclude_self
        return lse

    @staticmethod
    def backward(ctx: Any, d_lse: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q, k, lse = ctx.saved_tensors
        temperature, exclude_self = ctx.options
        d_q, d_k = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k))
        block = BLOCK[q.device.type]
        for start in range(0, q.shape[0], block):
            rows = slice(start, start + block)
            weight = _scores(q, k, start, block, lse.dtype, temperature, exclude_self)
            weight.sub_(lse[rows, None]).exp_().mul_(d_lse[rows, None] / temperature)
            if q.dtype == lse.dtype:
                torch.mm(weight, k, out=d_q[rows])
                d_k.addmm_(weight.T, q[rows])
            else:
                weight = weight.to(q.dtype)
                d_q[rows] = _product(weight, k, lse.dtype)
                d_k += _product(weight.T, q[rows], lse.dtype)
        return d_q, d_k, None, None, None


def _scores(
    q: Tensor,
    k: Tensor,
    start: int,
    block: int,
    dtype: torch.dtype,
    temperature: float,
    exclude_self: bool,
) -> Tensor:
    """Similarities of the rows from `start` on, `(block, N)`."""
    s = _product(q[start : start + block], k.T, dtype).div_(temperature)
    if exclude_self:
        s[:, start : start + block].fill_diagonal_(float("-inf"))
    return s


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b`, accumulated in float32 and answered in `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda:  # a CPU has no product with another output dtype
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def log_sum_exp(q: Tensor, k: Tensor, temperature: float, exclude_self: bool) -> Tensor:
    """`_LogSumExp` with the products that autocast asks for."""
    products = narrow(q).dtype
    with torch.autocast(q.device.type, enabled=False):
        return _LogSumExp.apply(q, k, temperature, exclude_self, products)


def supervised_contrastive(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    pairs: str = "batch",
    form: str = "out",
    normalize: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Supervised contrast "out" of one set of pairs."""
    (z,) = one_set("chunk", pairs, features, form=form, normalize=normalize)
    lse = log_sum_exp(z, z, temperature, True)
    mean, count = positive_mean(z, labels.reshape(-1), temperature)
    return (lse - mean)[count > 0].mean()


def info_nce(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    *,
    temperature: float,
    pairs: str = "image",
    normalize: bool = True,
) -> Tensor:
    """InfoNCE of one set of pairs."""
    q, k = one_set("chunk", pairs, query, key, normalize=normalize)
    lse = log_sum_exp(q, k, temperature, False)
    positive = (q * k[target_rows(positives, query, pairs)]).sum(1) / temperature
    return (lse - positive).mean()
