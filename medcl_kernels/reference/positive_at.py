"""Similarity of every anchor to the key pixels that an index names.

With s_ij of pairs.py (P3) and c(i) the flat index of a key pixel of the same image:

    v_i = s_{i,c(i)} = <z_i, k_{c(i)}> / t,   0 where c(i) < 0             (A1)

With upstream gradient g_i (0 where c(i) < 0):

    dL/dz_i = (1/t) g_i k_{c(i)},   dL/dk_j = (1/t) sum_{i: c(i) = j} g_i z_i  (A2)

Many anchors may name one key pixel: the second sum is over all of them, in the order of i. With R
indices per anchor every index has its own value and (A2) sums over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import compute_dtype, unit


def positive_at(
    query: Tensor,
    key: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
) -> Tensor:
    """(A1).

    Args:
        query: `(B, D, L)`.
        key: `(B, D, Lk)`.
        positives: `(B, L)` or `(B, L, R)` int64 flat index into the Lk key pixels of the same
            image, negative = none.
        temperature: positive number.
        normalize: scale rows to unit length first.
        across: accepted because its siblings have it; an index always means the same image.

    Returns:
        shaped like `positives`, in the compute dtype.
    """
    index = positives if positives.dim() == 3 else positives.unsqueeze(2)  # (B, L, R)
    named = index >= 0
    dtype = compute_dtype(query.dtype)
    z = torch.where(named.any(2).unsqueeze(1), query.to(dtype), 0.0)  # (B, D, L)
    flat = index.clamp_min(0).flatten(1).unsqueeze(1).expand(-1, key.shape[1], -1)
    k = key.to(dtype).gather(2, flat).unflatten(2, index.shape[1:])  # (B, D, L, R)
    # Gather first, blank second, normalise last: a row that nobody names never enters the
    # arithmetic.
    k = torch.where(named.unsqueeze(1), k, 0.0)
    if normalize:
        z, k = unit(z, 1), unit(k, 1)
    value = (z.unsqueeze(3) * k).sum(1) / temperature
    return value if positives.dim() == 3 else value.squeeze(2)
