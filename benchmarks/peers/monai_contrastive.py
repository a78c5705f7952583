"""MONAI's ContrastiveLoss: both directions, intra-view negatives, positives at the same index."""

from __future__ import annotations

from monai.losses import ContrastiveLoss
from torch import Tensor


def info_nce(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    *,
    temperature: float,
    pairs: str = "image",
    normalize: bool = True,
    symmetric: bool = False,
    intra_view: bool = False,
) -> Tensor:
    """ContrastiveLoss on rows `(N, C)`; it compares by cosine, so it normalises itself."""
    if query.dim() != 2 or positives is not None or not (symmetric and intra_view):
        raise ValueError("monai takes rows, symmetric and intra_view, positives at equal index")
    return ContrastiveLoss(temperature=temperature)(query, key)
