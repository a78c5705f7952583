"""Mean similarity of every anchor to the candidates that share its label.

With s_ij of pairs.py (P3) and P(i) the same-label candidates (never i itself in self mode):

    m_i = (1/|P(i)|) sum_{p in P(i)} s_ip,   count_i = |P(i)|              (M1)

and m_i = 0 where P(i) is empty or the anchor is excluded. It is linear in s, so that class sums
C_c = sum_{j: label j = c} k_j give it without a pass over pairs:

    m_i = <z_i, C_{y_i} - [self mode] z_i> / (t |P(i)|)                    (M2)

This file states (M1); the kernels compute (M2). With upstream gradient g_i (0 where P(i) is empty):

    dL/ds_ip = g_i / |P(i)|                                                (M3)
    dL/dz_i  = (1/t) (g_i/|P(i)|) (C_{y_i} - [self] z_i)
             + [self] (1/t) (sum_{j: y_j = y_i} (g_j/|P(j)|) z_j - (g_i/|P(i)|) z_i)
    dL/dk_j  = (1/t) sum_{i: y_i = y_j} (g_i/|P(i)|) z_i                   (M4)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import allowed_pairs, selection, similarities, valid_rows


def positive_mean(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor,
    key_labels: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """(M1) for S label maps.

    Args:
        query: `(B, D, L)`.
        key: `(Bk, D, Lk)`, or None: the query against itself, pair (i, i) excluded.
        query_labels: `(S, B, L)` int64, `ignore_index` = excluded row.
        key_labels: `(S, Bk, Lk)`; None in self mode.
        ignore_index: the label of excluded rows.
        temperature: positive number.
        normalize: scale rows to unit length first.
        across: every query row against the key rows of all images, else of its own image only.

    Returns:
        mean `(S, B, L)` in the compute dtype and count `(S, B, L)` int64, without gradient.
    """
    means, counts = [], []
    for s in range(query_labels.shape[0]):
        own = query_labels[s]
        other = own if key is None else selection(key_labels, s)
        valid, key_valid = valid_rows(own, ignore_index), valid_rows(other, ignore_index)
        scores = similarities(query, key, valid, key_valid, temperature, normalize, across)
        positive = allowed_pairs(own, other, "same", ignore_index, across, key is None, scores)
        count = positive.expand_as(scores).sum(-1)
        total = torch.where(positive, scores, 0.0).sum(-1)
        shape = (query.shape[0], query.shape[2])
        means.append((total / count.clamp_min(1)).reshape(shape))
        counts.append(count.reshape(shape))
    return torch.stack(means), torch.stack(counts)
