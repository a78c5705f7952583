"""Similarities weighted by the affinity of patches: the two sums that patch-dragsaw contrast needs.

r_ik is the share of class k in the patch of row i, q_jk that of candidate j, s_ij the similarity of
pairs.py (P3), m a shift (1/temperature unless given). Per patch size p:

    D_ij = sum_k |r_ik - q_jk|,   A_ij = 1 - D_ij,   t_ij = s_ij - m       (D1)
    form "affinity":   (P, Q) = (A, D)
    form "release2d":  (P, Q) = (D, A)
    Z_i = sum_j exp(Q_ij t_ij),   log_z_i = log Z_i                        (D2)
    linear_i = sum_j P_ij t_ij                                             (D3)

Every candidate counts, the row itself too. The loss of pair (i, j) is log_z_i - P_ij t_ij, so that
of row i against its N2 candidates is N2 log_z_i - linear_i. Numerator and denominator carry
different weights: the shift is part of the definition, not a numerical trick.

With upstream gradients g_i of log_z_i and h_i of linear_i, summed over patch sizes,

    dL/dt_ij = sum_p g_i Q_ij exp(Q_ij t_ij - log_z_i) + h_i P_ij          (D4)
    dL/dm    = -sum_ij dL/dt_ij                                            (D5)

and rows follow from (P4), (P5). In self mode D, t and E_ij = exp(Q_ij t_ij) are symmetric: with
a_i = g_i exp(-log_z_i), row i collects (a_i + a_j) Q_ij E_ij + (h_i + h_j) P_ij from pair (i, j) in
both of its roles. Ratios come from labels and have no gradient.
"""

from __future__ import annotations

from torch import Tensor

from .pairs import similarities

FORMS = ("affinity", "release2d")


def pair_affinity(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_ratios: Tensor,
    key_ratios: Tensor | None = None,
    shift: Tensor | None = None,
    form: str = "affinity",
    temperature: float,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """(D2) and (D3) for P patch sizes.

    Args:
        query: `(B, D, N)`.
        key: `(B, D, N2)`, or None: the query against itself, pair (i, i) included.
        query_ratios: `(P, B, K, N)` class shares.
        key_ratios: `(P, B, K, N2)`; None in self mode.
        shift: 0-d tensor m, differentiable; None: 1 / temperature, the similarity of equal rows.
        form: "affinity" or "release2d".
        temperature: positive number.
        normalize: scale rows to unit length first.

    Returns:
        log_z and linear, both `(P, B, N)` in the compute dtype.
    """
    if form not in FORMS:
        raise ValueError(f"form must be 'affinity' or 'release2d', got {form!r}")
    scores = similarities(query, key, None, None, temperature, normalize, across=False)
    t = scores - (1.0 / temperature if shift is None else shift.to(scores.dtype))
    r = query_ratios.detach().to(scores.dtype)
    q = r if key_ratios is None else key_ratios.detach().to(scores.dtype)
    divergence = (r.unsqueeze(-1) - q.unsqueeze(-2)).abs().sum(2)  # (P, B, N, N2)
    affinity = 1 - divergence
    positive, negative = (affinity, divergence) if form == "affinity" else (divergence, affinity)
    return (negative * t).logsumexp(-1), (positive * t).sum(-1)
