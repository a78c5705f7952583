"""Supervised contrast "out", summed over the anchors: the scalar case of a tensor against itself.

With lse_i of pair_logsumexp.py (L1) over all other rows and the mean similarity m_i to the |P(i)|
positives of positive_mean.py (M1):

    L = sum_{i: |P(i)| > 0} (lse_i - m_i)                                  (S1)

With an upstream gradient of 1 and a class c of n_c + 1 rows with sum C_c, every row of the class
has n_c positives and is a positive of n_c rows, so the positives' share of the gradient is

    dL/dz_i = -(2/t) (C_c - z_i) / n_c    (n_c > 0)                        (S2)

beside (L4) with g_i = 1 for anchors that have a positive and 0 for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_logsumexp import pair_logsumexp
from .positive_mean import positive_mean


def supervised_sum(
    query: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """(S1) and the number of its anchors.

    Args:
        query: `(B, D, L)`.
        labels: `(1, B, L)` int64, `ignore_index` = excluded row.
        ignore_index: the label of excluded rows.
        temperature: positive number.
        normalize: scale rows to unit length first.
        across: candidates are the rows of all images, else of the anchor's image only.

    Returns:
        Two 0-d tensors in the compute dtype: the sum, and how many anchors it has, at least 1. The
        second has no gradient.
    """
    options = dict(
        query_labels=labels,
        ignore_index=ignore_index,
        temperature=temperature,
        normalize=normalize,
        across=across,
    )
    mean, count = positive_mean(query, **options)
    valid = count > 0
    lse = torch.where(valid, pair_logsumexp(query, **options), 0.0)
    value = torch.where(valid, lse - mean, 0.0)
    return value.sum(), valid.sum().clamp_min(1).to(value.dtype)
