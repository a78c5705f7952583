"""Rows, similarities and allowed pairs: the ground that every reference operation stands on.

Notation. x_i is row i of the query, y_j row j of the key, D the channels, t the temperature.

    z_i  = x_i / max(||x_i||, 1e-12)   if normalize, else x_i              (P1)
    k_j  = y_j / max(||y_j||, 1e-12)   if normalize, else y_j              (P2)
    s_ij = <z_i, k_j> / t                                                  (P3)

Given G_ij = dL/ds_ij, the gradients of the rows are

    dL/dz_i = (1/t) sum_j G_ij k_j          dL/dk_j = (1/t) sum_i G_ij z_i (P4)

and, where the key is the query itself, row i collects both: (1/t) sum_j (G_ij + G_ji) z_j. Through
(P1)

    dL/dx_i = (dL/dz_i - z_i <z_i, dL/dz_i>) / ||x_i||                     (P5)

A zero row has z = 0, similarity 0 with everything, and by definition gradient 0 (dz/1e-12 would be
a lottery). Excluded rows are replaced by zeros BEFORE the normalisation and the product: a mask
applied afterwards does not stop NaN * 0, neither in the value nor in (P4).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; float32, bfloat16 and float16 are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(x: Tensor, dim: int) -> Tensor:
    """(P1) along `dim`, with value and gradient 0 for zero vectors."""
    square = x.square().sum(dim, keepdim=True)
    zero = square == 0
    norm = torch.where(zero, torch.ones_like(square), square).sqrt().clamp_min(EPSILON)
    return torch.where(zero, torch.zeros_like(x), x / norm)


def clean_rows(x: Tensor, valid: Tensor | None, normalize: bool) -> Tensor:
    """Rows `(B, D, L)` in the compute dtype, excluded ones zero, normalised if asked.

    Args:
        x: `(B, D, L)`.
        valid: `(B, L)` bool, or None where every row counts.
        normalize: apply (P1).
    """
    x = x.to(compute_dtype(x.dtype))
    if valid is not None:
        x = torch.where(valid.unsqueeze(1), x, torch.zeros_like(x))
    return unit(x, 1) if normalize else x


def group(x: Tensor, across: bool) -> Tensor:
    """`(B, ..., L)` -> `(G, ..., N)`: one group per image, or one with row index b * L + l."""
    if not across:
        return x
    return x.movedim(0, -2).flatten(-2).unsqueeze(0)


def similarities(
    query: Tensor,
    key: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    temperature: float,
    normalize: bool,
    across: bool,
) -> Tensor:
    """(P3) for all pairs: `(G, N, Nk)`. `key=None` is the query against itself."""
    z = group(clean_rows(query, query_valid, normalize), across)  # (G, D, N)
    k = z if key is None else group(clean_rows(key, key_valid, normalize), across)  # (G, D, Nk)
    # Autocast would lower the product, and the specification with it; the operations ignore it too.
    with torch.autocast(z.device.type, enabled=False):
        scores = z.transpose(1, 2) @ k
    return scores / temperature


def allowed_pairs(
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    kind: str,
    ignore_index: int,
    across: bool,
    exclude_self: bool,
    like: Tensor,
) -> Tensor:
    """Which pairs count: bool, broadcastable to the `(G, N, Nk)` of `like`.

    Args:
        query_labels: `(B, L)` int64, or None where every row counts.
        key_labels: `(Bk, Lk)` int64 or None; the query's own labels in self mode.
        kind: "all" valid candidates, only those with the "same" label as the anchor, or only
            "different" ones.
        ignore_index: label of rows that are neither anchor nor candidate.
        across: see `group`.
        exclude_self: leave out pair (i, i).
        like: the similarities, for shape and device.
    """
    allowed = torch.ones((1, 1, 1), dtype=torch.bool, device=like.device)
    anchor = candidate = None
    if query_labels is not None:
        anchor = group(query_labels, across).unsqueeze(2)  # (G, N, 1)
        allowed = allowed & (anchor != ignore_index)
    if key_labels is not None:
        candidate = group(key_labels, across).unsqueeze(1)  # (G, 1, Nk)
        allowed = allowed & (candidate != ignore_index)
    if kind == "same":
        allowed = allowed & (anchor == candidate)
    elif kind == "different":
        allowed = allowed & (anchor != candidate)
    elif kind != "all":
        raise ValueError(f"kind must be 'all', 'same' or 'different', got {kind!r}")
    if exclude_self:
        allowed = allowed & ~torch.eye(like.shape[1], dtype=torch.bool, device=like.device)
    return allowed


def valid_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Bool mask of the rows that count, None where all do."""
    return None if labels is None else labels != ignore_index


def selection(labels: Tensor | None, s: int) -> Tensor | None:
    """Label map number `s` of stacked `(S, B, L)` labels; one map may serve every selection."""
    if labels is None:
        return None
    return labels[0] if labels.shape[0] == 1 else labels[s]
