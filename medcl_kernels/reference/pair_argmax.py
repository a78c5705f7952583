"""The best key pixel of the same image for every query pixel.

With s_ij = <z_i, k_j> (pairs.py (P3) at temperature 1):

    c(i) = min { j : s_ij = max_j' s_ij' },   value_i = s_{i,c(i)}         (X1)

No gradient: the index is piecewise constant, and the value is offered only to judge a match.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import similarities


@torch.no_grad()
def pair_argmax(query: Tensor, key: Tensor, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """(X1).

    Args:
        query: `(B, D, L)`.
        key: `(B, D, Lk)`.
        normalize: compare directions only.

    Returns:
        index `(B, L)` int64 into the Lk key pixels, ties to the smallest, and value `(B, L)` in the
        compute dtype.
    """
    scores = similarities(query, key, None, None, 1.0, normalize, across=False)
    index = scores.argmax(-1)  # torch documents: the first of several maxima
    return index, scores.gather(-1, index.unsqueeze(-1)).squeeze(-1)
