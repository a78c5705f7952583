"""Dense metric learning with a hinge: matched pixels at cosine 1, others below a margin.

Per anchor i with positives P(i) and negatives N(i), all other candidates (reference/pair_hinge.py
(H1), (H2), reference/positive_at.py (A1)), at temperature 1:

    mean_{p in P(i)} (1 - s_ip) + mean_{n in N(i)} max(0, s_in - margin)

It is `torch.nn.CosineEmbeddingLoss` on the pairs of a dense map, its two targets averaged apart, so
that the many negatives do not drown the one positive. An anchor without negatives has the first
term only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layout import row_shape, rows
from ..ops.pair_hinge import pair_hinge
from ..ops.positive_at import positive_at
from ..reference.pairs import clean_rows
from .info_nce import Pairs, check_candidates, directions
from .scaling import reduce_rows


@checks.explains_memory
def dense_hinge(
    query: Tensor,
    key: Tensor,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    margin: float = 0.5,
    pairs: Pairs = "image",
    queue: Tensor | None = None,
    intra_view: bool = False,
    symmetric: bool = False,
    normalize: bool = True,
    ignore_index: int = -1,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Pull every query pixel to its positive and push it below a margin from the rest, in O(N D)
    memory.

    Equals, for flat `(N, C)` input and the default options:
        s = F.normalize(query) @ F.normalize(key).T
        own = torch.eye(len(s), dtype=torch.bool)
        loss = (1 - s[own]).mean() + (s[~own] - margin).clamp(min=0).mean()

    Args:
        query, key, positives, pairs, queue, intra_view, symmetric, ignore_index: as in `info_nce`;
            "queue" as `pairs` leaves the queue as the only negatives. Of several positives the mean
            counts.
        margin: similarity up to which a negative costs nothing; not negative.
        normalize: scale rows to unit length (cosines). Zero vectors have similarity 0 and gradient
            0.
        reduction: "mean" over anchors, "sum", or "none".
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.

    Returns:
        0-d tensor, or for "none" `(B, *spatial)` with 0 for pixels that are not anchors (with
        `symmetric`: one such map for the query and one for the key). float64 for float64 input,
        else float32. Without any anchor: a zero connected to the graph.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> q, k = torch.randn(2, 2, 64, 14, 14).unbind(0)
        >>> loss = medcl.dense_hinge(q, k, medcl.dense_correspondence(q, k), margin=0.5)
    """
    checks.margin(margin)
    check_candidates(query, key, pairs, queue, intra_view)
    checks.options(reduction, impl)
    forth, back = directions(query, key, positives, symmetric, ignore_index)
    negatives = None
    if queue is not None and queue.shape[0] > 0:
        negatives = rows(queue.to(query.dtype))
        checks.finite(negatives, "queue")
        negatives = clean_rows(negatives, None, normalize)

    def one_direction(a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
        values, valid = _values(
            rows(a), rows(b), index, negatives, pairs, intra_view, normalize, margin, impl
        )
        if reduction == "none":
            return values.reshape(row_shape(a))
        return reduce_rows(values, valid, reduction, (0, 1))

    loss = one_direction(query, key, forth)
    if not symmetric:
        return loss
    other = one_direction(key, query, back)
    return (loss, other) if reduction == "none" else 0.5 * (loss + other)


def _values(
    q: Tensor,
    k: Tensor,
    index: Tensor | None,
    queue: Tensor | None,
    pairs: Pairs,
    intra_view: bool,
    normalize: bool,
    margin: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """One value per anchor, 0 elsewhere, and which pixels are anchors, both `(B, L)`."""
    own = torch.arange(q.shape[2], device=q.device).repeat(q.shape[0], 1)
    index = own if index is None else index
    index = index if index.dim() == 3 else index.unsqueeze(2)  # (B, L, R)
    named = index >= 0
    valid = named.any(2)
    checks.finite(q, "query", None if intra_view else valid)
    checks.finite(k, "key")

    at_positives = positive_at(q, k, index, temperature=1.0, normalize=normalize, impl=impl)
    apart = torch.where(named, 1.0 - at_positives, 0.0).sum(2) / named.sum(2).clamp_min(1)

    # pixels that are not anchors become zero rows, which reach no margin
    z, y = clean_rows(q, valid, normalize), clean_rows(k, None, normalize)
    options: dict[str, Any] = {"margin": float(margin), "impl": impl}
    excess, count = torch.zeros_like(apart), torch.zeros_like(valid, dtype=torch.int64)
    if pairs != "queue":
        across = pairs == "batch" and q.shape[0] > 1
        excess = excess + pair_hinge(z, y, index, across=across, **options)
        count = count + k.shape[2] * (k.shape[0] if across else 1) - _distinct(index)
    if intra_view:
        others = clean_rows(q, None, normalize)
        excess = excess + pair_hinge(z, others, own, **options)
        count = count + q.shape[2] - 1
    if queue is not None:
        excess = excess + pair_hinge(z, queue, across=True, **options)
        count = count + queue.shape[2]
    return torch.where(valid, apart + excess / count.clamp_min(1), 0.0), valid


def _distinct(index: Tensor) -> Tensor:
    """How many different pixels `(B, L, R)` names per anchor, `(B, L)`."""
    ordered = index.sort(2).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return (new & (ordered >= 0)).sum(2)
