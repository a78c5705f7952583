"""Features weighted by how certain a small classifier is about their place.

z_m are M >= 2 logits of one pixel, x_c its features:

    p_m = softmax(z)_m,   H = -sum_m p_m log p_m,   U = H / log M          (U1)
    y_c = x_c (2 - U)                                                      (U2)

U is 0 where one class is certain and 1 where all are equal. With upstream gradient g_c of y_c

    dL/dx_c = g_c (2 - U)                                                  (U3)
    dL/dz_m = (sum_c g_c x_c) p_m (log p_m + H) / log M                    (U4)

log p is taken from the logits themselves, z_m - logsumexp(z), so no epsilon is needed.
"""

from __future__ import annotations

from math import log

from torch import Tensor

from .pairs import compute_dtype


def uncertainty_reweight(features: Tensor, logits: Tensor) -> Tensor:
    """(U2).

    Args:
        features: `(B, C, L)`.
        logits: `(B, M, L)`, M >= 2.

    Returns:
        `(B, C, L)` in the dtype of `features`.
    """
    x = features.to(compute_dtype(features.dtype))
    weight = 2 - uncertainty(logits).to(x.dtype)
    return (x * weight.unsqueeze(1)).to(features.dtype)


def uncertainty(logits: Tensor) -> Tensor:
    """U of (U1): `(B, M, L)` -> `(B, L)` in the compute dtype."""
    log_p = logits.to(compute_dtype(logits.dtype)).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1) / log(logits.shape[1])
