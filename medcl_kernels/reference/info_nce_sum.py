"""Weighted sum of InfoNCE over the anchors: the scalar case, for which a kernel can make gradients
while it computes.

With lse_i of pair_logsumexp.py (L1) over all candidates of anchor i, and s_{i,c(i)} of
positive_at.py (A1):

    L = sum_{i: c(i) >= 0} w_i (lse_i - s_{i,c(i)})                        (I1)

The positive is one of the candidates, so every summand is >= 0. With upstream gradient g (a scalar)

    dL/ds_ij = g w_i (p_ij - [j = c(i)]),   p_ij = exp(s_ij - lse_i)       (I2)

depends on g only by a factor: a kernel computes (I2) and (P4), (P5) for g = 1 in its forward pass,
strip by strip while the scores of a strip are in cache, and scales by g on the way back. w has no
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_logsumexp import pair_logsumexp
from .positive_at import positive_at


def info_nce_sum(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    weight: Tensor | None = None,
    *,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """(I1) and the number of its anchors.

    Args:
        query: `(B, D, L)`.
        key: `(B, D, Lk)`.
        positives: `(B, L)` int64 flat index into the Lk key pixels of the same image, negative =
            not an anchor. None: the same position for every anchor.
        weight: `(B, L)` weight of every anchor, no gradient; None: 1.
        temperature: positive number.
        normalize: scale rows to unit length first.
        across: candidates are the key pixels of all images, else of the anchor's image only.

    Returns:
        Two 0-d tensors in the compute dtype: the sum, and how many anchors it has, at least 1. The
        second has no gradient.
    """
    if positives is None:
        positives = torch.arange(query.shape[2], device=query.device).repeat(query.shape[0], 1)
    options = dict(temperature=temperature, normalize=normalize, across=across)
    anchor = torch.where(positives < 0, -1, positives).unsqueeze(0)
    lse = pair_logsumexp(query, key, query_labels=anchor, ignore_index=-1, **options)[0]
    value = torch.where(positives < 0, 0.0, lse - positive_at(query, key, positives, **options))
    anchors = (positives >= 0).sum().clamp_min(1).to(value.dtype)
    if weight is not None:
        value = weight.detach().to(value.dtype) * value
    return value.sum(), anchors
