"""One logarithm per positive pair, against negatives only (the pixel-contrast denominator).

With s_ij of pairs.py (P3), P(i) the candidates that share anchor i's label (never i itself in self
mode) and n_i = lse_negative_i, the log-sum-exp of s_ij over the negatives:

    v_i = sum_{p in P(i)} log(exp(s_ip) + exp(n_i))                        (Q1)

n_i = -inf means that there are no negatives: the summand is then s_ip. With upstream gradient g_i
and

    r_ip = exp(s_ip) / (exp(s_ip) + exp(n_i)) = 1 / (1 + exp(n_i - s_ip))  (Q2)
    dL/ds_ip = g_i r_ip                                                    (Q3)
    dL/dn_i  = g_i sum_{p in P(i)} (1 - r_ip)                              (Q4)

rows follow from (P4), (P5). v_i = 0 with gradient 0 for excluded anchors and for anchors without a
positive. The pixel form of supervised contrast is (1/|P(i)|) v_i - mean_{p in P(i)} s_ip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import allowed_pairs, selection, similarities, valid_rows


def pair_positive_log(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor,
    key_labels: Tensor | None = None,
    lse_negative: Tensor,
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
) -> Tensor:
    """(Q1) for S label maps.

    Args:
        query: `(B, D, L)`.
        key: `(Bk, D, Lk)`, or None: the query against itself, pair (i, i) excluded.
        query_labels: `(S, B, L)` int64, `ignore_index` = excluded row.
        key_labels: `(S, Bk, Lk)`; None in self mode.
        lse_negative: `(S, B, L)`, may be -inf; differentiable.
        ignore_index: the label of excluded rows.
        temperature: positive number.
        normalize: scale rows to unit length first.
        across: every query row against the key rows of all images, else of its own image only.

    Returns:
        `(S, B, L)` in the compute dtype.
    """
    results = []
    for s in range(query_labels.shape[0]):
        own = query_labels[s]
        other = own if key is None else selection(key_labels, s)
        valid, key_valid = valid_rows(own, ignore_index), valid_rows(other, ignore_index)
        scores = similarities(query, key, valid, key_valid, temperature, normalize, across)
        positive = allowed_pairs(own, other, "same", ignore_index, across, key is None, scores)
        negative = lse_negative[s].to(scores.dtype).reshape(scores.shape[:2]).unsqueeze(-1)
        finite = negative > float("-inf")
        log = torch.logaddexp(scores, torch.where(finite, negative, 0.0))
        log = torch.where(finite, log, scores)
        value = torch.where(positive, log, 0.0).sum(-1)
        results.append(value.reshape(query.shape[0], query.shape[2]))
    return torch.stack(results)
