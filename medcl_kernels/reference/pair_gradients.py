"""The gradient of a contrastive loss with respect to every similarity, and the score of a pair.

With s_ij of pairs.py (P3), A(i) the allowed candidates of anchor i, P(i) the positives among them
and N(i) the others, three row constants (a, b, c)_i turn a similarity into its gradient
G_ij = dl_i/ds_ij of the row's loss l_i:

    out:    G_ij = exp(s_ij - a_i) - [j in P(i)] b_i                       (G1)
            a_i = lse_{A(i)} s,  b_i = 1/|P(i)|
    in:     G_ij = exp(s_ij - a_i) - [j in P(i)] exp(s_ij - b_i)           (G2)
            a_i = lse_{A(i)} s,  b_i = lse_{P(i)} s
    pixel:  G_ij = exp(s_ij - a_i)                    for j in N(i)        (G3)
            G_ij = -b_i / (1 + exp(s_ij - c_i))       for j in P(i)
            b_i = 1/|P(i)|,  c_i = lse_{N(i)} s,
            a_i = -log( b_i sum_{p in P(i)} 1/(exp(s_ip) + exp(c_i)) )

In all of them sum_j G_ij = 0. A row that is no anchor has (a, b, c) = (inf, 0, inf), for "in"
(inf, inf, inf): its gradients are 0. The score that ranks pairs is

    pair:            R_ij = |G_ij|
    representation:  R_ij = |G_ij| sqrt(1 - (t s_ij)^2) / ||x_i||          (G4)

(G4) is the size of the pair's share in dl_i/dx_i, x_i the row before (P1): dz_i/dx_i removes what
is parallel to z_i. A zero row has no gradient (P5), so its pairs have the score 0 there. Wu et al.,
"Gradient-Guided Contrastive Learning", ACM MM 2023, name the magnitude of gradients as the score;
these two formulas are derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import EPSILON, allowed_pairs, clean_rows, group, similarities, valid_rows


def pair_gradients(
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positives: Tensor | None,
    statistics: Tensor,
    form: str,
    score: str,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Similarities, (G1) to (G3) and the score of every pair.

    Args:
        query: `(B, D, L)`.
        key: `(Bk, D, Lk)`, or None: the query against itself, pair (i, i) excluded.
        query_labels: `(1, B, L)` int64, `ignore_index` = excluded row; None = all rows count.
        key_labels: `(1, Bk, Lk)` likewise; None in self mode or where all count.
        positives: `(B, L, R)` int64 index into the key pixels of the same image, negative = none;
            None: the positives are the candidates of the anchor's label.
        statistics: `(3, B, L)`, the row constants (a, b, c).
        form: "out", "in" or "pixel".
        score: "pair" or "representation".
        ignore_index, temperature, normalize, across: as everywhere.

    Returns:
        s, G, R `(G, N, Nk)`, G and R 0 for pairs that are not allowed, and the positives, bool of
        that shape. G and R have no gradient.
    """
    own = None if query_labels is None else query_labels[0]
    other = own if key is None else (None if key_labels is None else key_labels[0])
    valid, key_valid = valid_rows(own, ignore_index), valid_rows(other, ignore_index)
    s = similarities(query, key, valid, key_valid, temperature, normalize, across)
    allowed = allowed_pairs(own, other, "all", ignore_index, across, key is None, s).expand_as(s)
    if positives is None:
        positive = allowed_pairs(own, other, "same", ignore_index, across, key is None, s)
        positive = positive.expand_as(s)
    else:
        positive = marked(positives, s, across) & allowed

    with torch.no_grad():
        a, b, c = (group(one.to(s.dtype), across).unsqueeze(2) for one in statistics)
        gradient = torch.where(allowed, gradient_at(s, positive, a, b, c, form), 0.0)
        ranked = gradient.abs()
        if score == "representation":
            norm = clean_rows(query, valid, False).norm(dim=1)
            scale = torch.where(norm > 0, 1 / norm.clamp_min(EPSILON), 0.0)
            tangent = (1 - (s * temperature).square()).clamp_min(0).sqrt()
            ranked = ranked * tangent * group(scale, across).unsqueeze(2)
        elif score != "pair":
            raise ValueError(f"score must be 'pair' or 'representation', got {score!r}")
    return s, gradient, ranked, positive


def gradient_at(s: Tensor, positive: Tensor, a: Tensor, b: Tensor, c: Tensor, form: str) -> Tensor:
    """(G1) to (G3) of allowed pairs, all arguments of one shape or broadcast to it."""
    gradient = (s - a).exp()
    if form == "out":
        return torch.where(positive, gradient - b, gradient)
    if form == "in":
        return torch.where(positive, gradient - (s - b).exp(), gradient)
    if form == "pixel":
        return torch.where(positive, -b / (1 + (s - c).exp()), gradient)
    raise ValueError(f"form must be 'out', 'in' or 'pixel', got {form!r}")


def marked(positives: Tensor, like: Tensor, across: bool) -> Tensor:
    """Positives by index as a bool `(G, N, Nk)`."""
    batch, length, several = positives.shape
    candidates = like.shape[2] // batch if across else like.shape[2]
    column = positives.clamp_min(0)
    if across:
        column = column + candidates * torch.arange(batch, device=like.device).reshape(-1, 1, 1)
    named = group((positives >= 0).movedim(2, 1), across).movedim(1, 2)  # (G, N, R)
    column = group(column.movedim(2, 1), across).movedim(1, 2)
    mask = torch.zeros(like.shape, dtype=torch.int32, device=like.device)
    return mask.scatter_add(2, column, named.to(torch.int32)) > 0


def linear_index(query: Tensor, like: Tensor, across: bool) -> Tensor:
    """The place i * N + j of every pair in the matrix of all rows, int64 `(G, N, Nk)`."""
    groups, n, candidates = like.shape
    rows = torch.arange(groups * n, device=query.device).reshape(groups, n, 1)
    columns = torch.arange(groups * candidates, device=query.device).reshape(groups, 1, candidates)
    return rows * (groups * candidates) + columns


def unit_of_rows(query: Tensor, scope: str, across: bool) -> Tensor:
    """Which selection an anchor belongs to: `(G, N)` numbers of units."""
    batch, _, length = query.shape
    if scope == "global":
        unit = torch.zeros(batch, length, dtype=torch.int64)
    elif scope == "image":
        unit = torch.arange(batch).unsqueeze(1).expand(batch, length)
    elif scope == "anchor":
        unit = torch.arange(batch * length).reshape(batch, length)
    else:
        raise ValueError(f"scope must be 'image', 'global' or 'anchor', got {scope!r}")
    return group(unit.to(query.device), across)


def num_units(query: Tensor, scope: str) -> int:
    """1 for "global", B for "image", B * L for "anchor"."""
    return {"global": 1, "image": query.shape[0], "anchor": query.shape[0] * query.shape[2]}[scope]


def is_selected(
    ranked: Tensor, index: Tensor, unit: Tensor, kind: Tensor, threshold: Tensor, cut: Tensor
) -> Tensor:
    """Pairs above their threshold, or on it and not behind the cut.

    Args:
        ranked: R `(G, N, Nk)`.
        index: place of the pair, same shape.
        unit: `(G, N)`.
        kind: 0 or 1 per pair, which of the C classes of `threshold` it belongs to.
        threshold, cut: `(C, U)`.
    """
    cell = kind * threshold.shape[1] + unit.unsqueeze(2)
    limit, last = threshold.flatten()[cell].to(ranked.dtype), cut.flatten()[cell]
    return (ranked > 0) & ((ranked > limit) | ((ranked == limit) & (index <= last)))
