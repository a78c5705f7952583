"""What every list of selected pairs must be, whichever rule chose them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_largest(
    ranked: Tensor, unit: Tensor, positive: Tensor, k: Tensor, anchor: Tensor, candidate: Tensor
) -> list[tuple[int, int, Tensor, Tensor]]:
    """The list is in order, no pair stands in it twice, and it holds the k largest of every cell.

    Args:
        ranked, unit, positive: `(G, N, Nk)`, score, unit and class of every pair.
        k: `(classes, units)`.
        anchor, candidate: flat rows of the listed pairs.

    Returns: per cell class, unit, and the scores of its pairs inside and outside the list.
    """
    groups, n, width = ranked.shape
    cells = []
    place = anchor * groups * width + candidate
    assert (place[1:] > place[:-1]).all()
    chosen = torch.zeros(groups * n, width, dtype=torch.bool)
    chosen[anchor, candidate % width] = True
    chosen = chosen.reshape(ranked.shape)
    for c in range(k.shape[0]):
        kind = torch.ones_like(chosen) if k.shape[0] == 1 else positive == (c == 0)
        for u in range(k.shape[1]):
            mine = kind & (unit == u) & (ranked > 0)
            inside, outside = ranked[mine & chosen], ranked[mine & ~chosen]
            assert len(inside) == min(int(k[c, u]), int(mine.sum()))
            if len(inside) and len(outside):
                assert outside.max() <= inside.min() * (1 + 1e-5)
            cells.append((c, u, inside, outside))
    return cells
