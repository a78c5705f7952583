"""Similarities of listed pairs of rows.

With s_ij of pairs.py (P3), rows counted over the whole batch:

    v_n = s_{i(n), j(n)}                                                   (B1)

0 where i(n) < 0. With upstream gradient g_n, dL/ds_{i(n), j(n)} = g_n; (P4) and (P5) give the
rows'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import compute_dtype, unit


def pair_at(
    query: Tensor,
    key: Tensor | None,
    anchor: Tensor,
    candidate: Tensor,
    *,
    temperature: float,
    normalize: bool = True,
) -> Tensor:
    """(B1).

    Args:
        query: `(B, D, L)`.
        key: `(Bk, D, Lk)`, or None: candidates are query rows.
        anchor: `(K,)` int64, b * L + l of a query row, negative = no pair.
        candidate: `(K,)` int64, b * Lk + l of a key row.
        temperature: positive number.
        normalize: scale rows to unit length first.

    Returns:
        `(K,)` in the compute dtype.
    """
    z = _picked(query, anchor, normalize)
    k = _picked(query if key is None else key, candidate, normalize)
    return torch.where(anchor < 0, 0.0, (z * k).sum(1) / temperature)


def _picked(x: Tensor, index: Tensor, normalize: bool) -> Tensor:
    """Rows `(K, D)`; rows that nobody names may hold NaN."""
    rows = x.movedim(1, 2).flatten(0, 1)[index.clamp_min(0)].to(compute_dtype(x.dtype))
    rows = torch.where((index < 0).unsqueeze(1), 0.0, rows)
    return unit(rows, 1) if normalize else rows
