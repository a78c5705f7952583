"""By how much the similarities of an anchor exceed a margin, summed over its negatives.

With rows as they are (normalise them before), s_ij = <x_i, y_j>, margin m >= 0 and E(i) the
excluded candidates of anchor i:

    h_i = sum_{j not in E(i)} max(0, s_ij - m)                             (H1)

With upstream gradient g_i

    dL/ds_ij = g_i [s_ij > m] for j not in E(i), else 0                    (H2)

and rows follow from pairs.py (P4). A zero row has similarity 0 <= m with every other: as an anchor
its h is 0, as a candidate it adds nothing, and its gradient is 0 either way. So rows that do not
count are zeroed, and no mask is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import similarities


def pair_hinge(
    query: Tensor,
    key: Tensor,
    excluded: Tensor | None = None,
    *,
    margin: float,
    across: bool = False,
) -> Tensor:
    """(H1).

    Args:
        query: `(B, D, L)`.
        key: `(B, D, Lk)`; any number of images if `across` and nothing is excluded.
        excluded: `(B, L)` or `(B, L, R)` int64 flat index into the Lk key pixels of the same image:
            candidates that are no negatives of this anchor; negative = none.
        margin: not negative.
        across: candidates are the key rows of all images, else of the anchor's image only.

    Returns:
        `(B, L)` in the compute dtype.
    """
    scores = similarities(query, key, None, None, 1.0, False, across)  # (G, N, Nk)
    excess = torch.relu(scores - margin)
    if excluded is not None:
        columns = candidate_columns(excluded, key.shape[2], across).unsqueeze(3)  # (G, N, R, 1)
        named = columns == torch.arange(scores.shape[2], device=scores.device)
        excess = torch.where(named.any(2), 0.0, excess)
    return excess.sum(2).reshape(query.shape[0], query.shape[2])


def candidate_columns(index: Tensor, length: int, across: bool) -> Tensor:
    """`(B, L)` or `(B, L, R)` pixels of the same image -> `(G, N, R)` columns of the similarities,
    -1 = none."""
    index = index if index.dim() == 3 else index.unsqueeze(2)
    if across:
        first = torch.arange(index.shape[0], device=index.device).view(-1, 1, 1) * length
        return torch.where(index >= 0, index + first, -1).flatten(0, 1).unsqueeze(0)
    return torch.where(index >= 0, index, -1)
