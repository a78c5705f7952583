"""Log-sum-exp of the similarities of every anchor to its allowed candidates.

With s_ij of pairs.py (P3) and A(i) the allowed candidates of anchor i:

    lse_i = log sum_{j in A(i)} exp(s_ij)                                  (L1)

and lse_i = -inf where the anchor is excluded or A(i) is empty. With upstream gradient g_i and

    p_ij  = exp(s_ij - lse_i) for j in A(i), else 0                        (L2)
    dL/ds_ij = g_i p_ij                                                    (L3)

rows follow from (P4), (P5): dL/dz_i = (1/t) sum_j g_i p_ij k_j, dL/dk_j = (1/t) sum_i g_i p_ij z_i.
In self mode, with E_ij = exp(s_ij - 1/t) and a_i = g_i exp(1/t - lse_i), both sums are one
symmetric matrix (a_i + a_j) E_ij = (a_i + a_j) E_ji:

    dL/dz_i = (1/t) sum_j (a_i + a_j) E_ij z_j                             (L4)

An anchor with lse_i = -inf has gradient 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pairs import allowed_pairs, selection, similarities, valid_rows


def pair_logsumexp(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    kinds: Sequence[str] = ("all",),
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
) -> Tensor:
    """(L1) for S selections of candidates.

    Args:
        query: `(B, D, L)`.
        key: `(Bk, D, Lk)`, or None: the query against itself, pair (i, i) excluded.
        query_labels: `(S, B, L)` int64 (or S = 1 for all selections), `ignore_index` = excluded
            row. None = all count.
        key_labels: `(S, Bk, Lk)` likewise; None in self mode.
        kinds: per selection "all", "same" or "different" (label of the candidate against the
            anchor's).
        ignore_index: the label of excluded rows.
        temperature: positive number.
        normalize: scale rows to unit length first.
        across: every query row against the key rows of all images, else of its own image only.

    Returns:
        `(S, B, L)` in the compute dtype.
    """
    results = []
    for s, kind in enumerate(kinds):
        own, other = selection(query_labels, s), selection(key_labels, s)
        if key is None:
            other = own
        valid, key_valid = valid_rows(own, ignore_index), valid_rows(other, ignore_index)
        scores = similarities(query, key, valid, key_valid, temperature, normalize, across)
        allowed = allowed_pairs(own, other, kind, ignore_index, across, key is None, scores)
        results.append(masked_logsumexp(scores, allowed).reshape(query.shape[0], query.shape[2]))
    return torch.stack(results)


def masked_logsumexp(scores: Tensor, allowed: Tensor) -> Tensor:
    """(L1) over the last axis; -inf and gradient 0 for rows without an allowed entry."""
    allowed = allowed.expand_as(scores)
    some = allowed.any(-1)
    # Rows without a candidate get zeros instead of -inf, so that no inf - inf meets them on the way
    # back.
    blank = torch.where(some, float("-inf"), 0.0).to(scores.dtype).unsqueeze(-1)
    lse = torch.where(allowed, scores, blank).logsumexp(-1)
    return torch.where(some, lse, float("-inf"))
