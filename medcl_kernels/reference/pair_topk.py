"""The pairs with the largest score: which similarities deserve a gradient.

With G_ij and R_ij of pair_gradients.py, every unit u (all pairs, the pairs of an image's anchors,
or those of one anchor) keeps the k_u first of its allowed pairs with R_ij > 0 in the order

    (-R_ij, i * N + j)                                                     (K1)

i and j counting the rows of the whole batch, N all candidates. Fewer pairs than k_u: all of them.
Two classes, positives and negatives, may each have a k of their own. The result is also said
without a list: a pair is kept if and only if

    R_ij > threshold_u   or   R_ij = threshold_u and i * N + j <= cut_u    (K2)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_gradients import linear_index, num_units, pair_gradients, unit_of_rows


@torch.no_grad()
def pair_topk(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positives: Tensor | None = None,
    statistics: Tensor,
    k: Tensor,
    capacity: int = 0,
    form: str = "out",
    score: str = "pair",
    scope: str = "image",
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(K1) as a list, and (K2).

    Args:
        query, key, query_labels, key_labels, positives, statistics, form, score: see
            `pair_gradients`.
        k: `(C, U)` int64, how many pairs each unit keeps: C = 1 for all pairs alike, C = 2 for
            positives and negatives apart; U = 1, B or B * L after `scope`.
        capacity: length of the list, at least the sum of `k`; 0 for thresholds only.
        scope: "global", "image" (the anchor's) or "anchor".
        ignore_index, temperature, normalize, across: as everywhere.

    Returns:
        anchor and candidate `(capacity,)` int64, numbers of rows b * L + l, in the order of
        i * N + j, -1 behind the last pair; gradient `(capacity,)`, G_ij, 0 behind it; threshold
        `(C, U)` in the compute dtype, 0 where every pair is kept and inf where none; cut `(C, U)`
        int64. No gradient.
    """
    s, gradient, ranked, positive = pair_gradients(
        query,
        key,
        query_labels,
        key_labels,
        positives,
        statistics,
        form,
        score,
        ignore_index,
        temperature,
        normalize,
        across,
    )
    units = num_units(query, scope)
    index = linear_index(query, s, across)
    cell = unit_of_rows(query, scope, across).unsqueeze(2).expand_as(s)
    if k.shape[0] == 2:
        cell = torch.where(positive, 0, units) + cell

    some = ranked > 0
    ranked, gradient, cell, index = ranked[some], gradient[some], cell[some], index[some]
    order = ranked.sort(descending=True, stable=True).indices  # index ascends: ties keep its order
    order = order[cell[order].sort(stable=True).indices]  # by cell, then (K1)
    count = cell.bincount(minlength=k.numel())
    start = count.cumsum(0) - count
    rank = torch.arange(len(order), device=s.device) - start[cell[order]]
    wanted = k.flatten()
    kept = order[rank < wanted[cell[order]]]

    threshold = torch.zeros(k.numel(), dtype=s.dtype, device=s.device)
    cut = torch.full((k.numel(),), -1, device=s.device)
    cuts = (count > wanted) & (wanted > 0)
    last = order[(start + wanted - 1)[cuts]]
    threshold[cuts], cut[cuts] = ranked[last], index[last]
    threshold[wanted == 0] = torch.inf

    kept = kept[index[kept].sort().indices]
    rows = s.shape[0] * s.shape[2]
    none = torch.full((capacity,), -1, device=s.device)
    anchor = torch.cat((index[kept].div(rows, rounding_mode="floor"), none))[:capacity]
    candidate = torch.cat((index[kept] % rows, none))[:capacity]
    values = torch.cat((gradient[kept], gradient.new_zeros(capacity)))[:capacity]
    return anchor, candidate, values, threshold.reshape(k.shape), cut.reshape(k.shape)
