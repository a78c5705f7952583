"""O(N) memory by hand: blocks of rows through torch.mm, similarities recomputed in the backward.

The strongest thing that one writes in an afternoon: 2u FLOP forward and 6u backward (u = N * N * D
multiply-adds), everything elementwise in place. Positives go through class sums or a gather. In
float64 it is also the truth for sizes at which the reference would need gigabytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .eager import positive_mean, target_rows, unit_rows

BLOCK = 256  # rows at a time; the fastest of 128, 256, 512 and 1024 where this was tuned


class _LogSumExp(torch.autograd.Function):
    """Log-sum-exp of `q @ k.T / temperature` over each row, `(N,)`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, temperature: float, exclude_self: bool) -> Tensor:
        lse = q.new_empty(q.shape[0])
        for start in range(0, q.shape[0], BLOCK):
            s = _block(q, k, start, temperature, exclude_self)
            top = s.amax(1, keepdim=True)
            torch.add(top[:, 0], s.sub_(top).exp_().sum(1).log_(), out=lse[start : start + BLOCK])
        ctx.save_for_backward(q, k, lse)
        ctx.options = temperature, exclude_self
        return lse

    @staticmethod
    def backward(ctx: Any, d_lse: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, lse = ctx.saved_tensors
        temperature, exclude_self = ctx.options
        d_q, d_k = torch.empty_like(q), torch.zeros_like(k)
        for start in range(0, q.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            weight = _block(q, k, start, temperature, exclude_self)
            weight.sub_(lse[rows, None]).exp_().mul_(d_lse[rows, None] / temperature)
            torch.mm(weight, k, out=d_q[rows])
            d_k.addmm_(weight.T, q[rows])
        return d_q, d_k, None, None


def _block(q: Tensor, k: Tensor, start: int, temperature: float, exclude_self: bool) -> Tensor:
    """Similarities of the rows from `start` on, `(BLOCK, N)`."""
    s = torch.mm(q[start : start + BLOCK], k.T).div_(temperature)
    if exclude_self:
        s[:, start : start + BLOCK].fill_diagonal_(float("-inf"))
    return s


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
    z = unit_rows(features, pairs)
    if z.dim() != 2 or form != "out" or not normalize:
        raise ValueError(f'chunk has form "out" of one set of unit rows; got {form}, {z.dim()}-d')
    lse = _LogSumExp.apply(z, z, temperature, True)
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
    q, k = unit_rows(query, pairs), unit_rows(key, pairs)
    if q.dim() != 2 or not normalize:
        raise ValueError(f"chunk has one set of unit rows; got {q.dim()}-d")
    lse = _LogSumExp.apply(q, k, temperature, False)
    positive = (q * k[target_rows(positives, query, pairs)]).sum(1) / temperature
    return (lse - positive).mean()
