"""Values that are handed through, with the gradient of the selected pairs only.

With G_ij of pair_gradients.py as numbers, T the selected pairs and v_i the row's loss,

    y_i = v_i,   dy_i/ds_ij = G_ij for (i, j) in T, else 0                 (F1)

so with upstream gradient g_i and (P4), (P5)

    dL/dz_i = (1/t) sum_{j: (i, j) in T} g_i G_ij k_j
    dL/dk_j = (1/t) sum_{i: (i, j) in T} g_i G_ij z_i                      (F2)

and their sum in self mode. T comes as the rule (K2) of pair_topk.py or as a list of pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_at import pair_at
from .pair_gradients import is_selected, linear_index, pair_gradients, unit_of_rows


def pair_filtered_grad(
    value: Tensor,
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positives: Tensor | None = None,
    statistics: Tensor,
    threshold: Tensor | None = None,
    cut: Tensor | None = None,
    anchor: Tensor | None = None,
    candidate: Tensor | None = None,
    gradient: Tensor | None = None,
    form: str = "out",
    score: str = "pair",
    scope: str = "image",
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
) -> Tensor:
    """(F1).

    Args:
        value: `(B, L)`, v_i; its own gradient stops here.
        query, key, query_labels, key_labels, positives, statistics, form, score, scope: see
            `pair_topk`.
        threshold, cut: `(C, U)`, the rule; or
        anchor, candidate, gradient: `(K,)`, the list, entries with anchor < 0 unused.
        ignore_index, temperature, normalize, across: as everywhere.

    Returns:
        `(B, L)` in the compute dtype.
    """
    if anchor is not None and candidate is not None and gradient is not None:
        s_at = pair_at(query, key, anchor, candidate, temperature=temperature, normalize=normalize)
        surrogate = torch.zeros(value.numel(), dtype=s_at.dtype, device=s_at.device)
        weighted = torch.where(anchor < 0, 0.0, gradient.to(s_at.dtype)) * s_at
        surrogate = surrogate.index_add(0, anchor.clamp_min(0), weighted)
    elif threshold is not None and cut is not None:
        s, at, ranked, positive = pair_gradients(
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
        with torch.no_grad():
            kind = torch.where(positive, 0, threshold.shape[0] - 1)
            unit = unit_of_rows(query, scope, across)
            index = linear_index(query, s, across)
            chosen = is_selected(ranked, index, unit, kind, threshold, cut)
            at = torch.where(chosen, at, 0.0)
        surrogate = (at * s).sum(2)
    else:
        raise ValueError("a selection is threshold and cut, or anchor, candidate and gradient")
    surrogate = surrogate.reshape(value.shape)
    return value.detach().to(surrogate.dtype) + (surrogate - surrogate.detach())
