"""One gradient out of M that may contradict each other.

g_a is the gradient of perspective a, one vector per row (unit "row") or one over all rows ("flat").
Everything but "consensus" needs the vectors' Gram matrix K_ab = <g_a, g_b> only, and returns
sum_b w_b g_b (mean) or M times that (sum):

pcgrad (Yu et al. 2020, arXiv:2001.06782): u_a starts as g_a and meets the others b in an order,

    q = <u_a, g_b>;   if q < 0 and |g_b|^2 > eps:  u_a -= q / (|g_b|^2 + eps) g_b     (T1)

with g_b as it was, so with u_a = sum_b c_ab g_b, starting from the unit matrix,

    q = sum_e c_ae K_eb;   c_ab -= q / (K_bb + eps);   w_b = (1/M) sum_a c_ab         (T2)

cagrad (Liu et al. 2021, arXiv:2110.14048), without its rescaling by 1/(1 + c^2): with g_0 the mean,
u = (1/M, ..., 1/M), phi = c sqrt(u K u) and v the point of the simplex that minimises

    f(v) = v K u + phi sqrt(v K v),   w = u + phi / sqrt(v K v) v                     (T3)

f is minimised two coordinates at a time, each time exactly: along v + x (e_a - e_b), with
B = (K v)_a - (K v)_b, C = K_aa - 2 K_ab + K_bb, A = v K v and slope = (K u)_a - (K u)_b,

    B + C x = -slope sqrt((A C - B^2) / (phi^2 C - slope^2))                          (T4)

if phi^2 C > slope^2, else x goes as far as the simplex lets it, against the slope.

consensus, entry by entry: the mean of the M numbers if none has the opposite sign of another, else
0. For one number per pair that is pcgrad at M = 2, and a stronger rule above.

mean and sum are the plain combinations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import compute_dtype

METHODS = ("pcgrad", "consensus", "cagrad", "mean", "sum")
EPS = 1e-12  # of squared norms
ROUNDS = 64  # of (T4) over all pairs of coordinates; converges geometrically


@torch.no_grad()
def mitigate_rows(
    gradients: Tensor,
    order: Tensor,
    *,
    method: str = "pcgrad",
    unit: str = "row",
    reduction: str = "mean",
    strength: float = 0.5,
) -> Tensor:
    """The combination of M gradients.

    Args:
        gradients: `(M, B, D, L)`, gradients of rows; a row's vector lies along D.
        order: `(M, M - 1)` int64, for each perspective the others in the order it meets them.
        method: "pcgrad", "consensus", "cagrad", "mean" or "sum".
        unit: "row" or "flat", what counts as one vector.
        reduction: "mean" or "sum" over perspectives (for the methods that are not named so).
        strength: c of "cagrad".

    Returns:
        `(B, D, L)` in the dtype of the input. No gradient.
    """
    g = gradients.to(compute_dtype(gradients.dtype))
    perspectives = g.shape[0]
    if method == "sum" or method == "mean":
        total = g.sum(0)
        return (total if method == "sum" else total / perspectives).to(gradients.dtype)
    factor = perspectives if reduction == "sum" else 1
    if method == "consensus":
        agree = ~((g > 0).any(0) & (g < 0).any(0))
        return (torch.where(agree, g.mean(0), 0.0) * factor).to(gradients.dtype)
    if unit == "row":
        gram = torch.einsum("mbdl,nbdl->blmn", g, g)
    else:
        flat = g.flatten(1)
        gram = (flat @ flat.T).reshape(1, 1, perspectives, perspectives)
    weights = combination_weights(gram, order, method, strength) * factor  # (B, L, M) or (1, 1, M)
    return (weights.movedim(2, 0).unsqueeze(2) * g).sum(0).to(gradients.dtype)


def combination_weights(
    gram: Tensor, order: Tensor, method: str, strength: float = 0.5, eps: float = EPS
) -> Tensor:
    """w of (T2) or (T3) for the mean.

    Args:
        gram: `(..., M, M)`.
        order: `(M, M - 1)` int64.
        method: "pcgrad", "cagrad", "mean" or "sum".
        strength: c of "cagrad".
        eps: of squared norms; multiply it by the square of a common scale of the gradients.

    Returns:
        `(..., M)`.
    """
    m = gram.shape[-1]
    plain = torch.full(gram.shape[:-1], 1.0 / m, dtype=gram.dtype, device=gram.device)
    if method == "mean" or method == "sum":
        return plain if method == "mean" else plain * m
    return _pcgrad(gram, order, eps) if method == "pcgrad" else _cagrad(gram, plain, strength, eps)


def _pcgrad(gram: Tensor, order: Tensor, eps: float) -> Tensor:
    """(T2)."""
    m = gram.shape[-1]
    total = torch.zeros_like(gram[..., 0])
    for a in range(m):
        c = torch.zeros_like(gram[..., 0])
        c[..., a] = 1
        for b in order[a].tolist():
            q = (c * gram[..., b]).sum(-1)
            norm = gram[..., b, b]
            conflict = (q < 0) & (norm > eps)
            c[..., b] -= torch.where(conflict, q / (norm + eps), 0.0)
        total = total + c
    return total / m


def _cagrad(gram: Tensor, plain: Tensor, strength: float, eps: float) -> Tensor:
    """(T3) by rounds of (T4)."""
    m = gram.shape[-1]
    towards = (gram * plain.unsqueeze(-2)).sum(-1)  # K u
    norm = (towards * plain).sum(-1).clamp_min(0)
    phi = strength * norm.sqrt()
    v = plain.clone()
    pairs = [(a, b) for a in range(m) for b in range(a)]
    for _ in range(1 if m == 2 else ROUNDS):
        for a, b in pairs:
            kv = (gram * v.unsqueeze(-2)).sum(-1)
            A, B = (kv * v).sum(-1), kv[..., a] - kv[..., b]
            C = gram[..., a, a] - 2 * gram[..., a, b] + gram[..., b, b]
            slope = towards[..., a] - towards[..., b]
            low, high = -v[..., a], v[..., b]
            steep = phi.square() * C - slope.square()
            flat = C <= eps
            safe = torch.where(flat, torch.ones_like(C), C)
            inside = (A * C - B.square()).clamp_min(0) / torch.where(steep > 0, steep, 1.0)
            x = torch.where(
                steep > 0, (-slope * inside.sqrt() - B) / safe, -slope.sign() * torch.inf
            )
            x = torch.where(flat, torch.zeros_like(x), x)
            x = torch.minimum(torch.maximum(x, low), high)
            v[..., a] += x
            v[..., b] -= x
    size = ((gram * v.unsqueeze(-2)).sum(-1) * v).sum(-1)
    scale = torch.where(size > eps, phi / size.clamp_min(eps).sqrt(), 0.0)
    return plain + scale.unsqueeze(-1) * v
