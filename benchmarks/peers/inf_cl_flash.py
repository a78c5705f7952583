"""Inf-CL's InfoNCE on one device (`inf_cl.cal_flash_loss`, Triton, tf32)."""

from __future__ import annotations

from inf_cl import cal_flash_loss
from torch import Tensor

from .eager import one_set, target_rows

LARGEST_HEAD = 256  # channels that it loads at once


def info_nce(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    *,
    temperature: float,
    pairs: str = "image",
    normalize: bool = True,
) -> Tensor:
    """InfoNCE of one set of pairs; it widens to float32 by itself."""
    q, k = one_set("inf-cl", pairs, query, key, normalize=normalize)
    target = target_rows(positives, query, pairs)
    head = min(q.shape[1], LARGEST_HEAD)
    return cal_flash_loss(q, k, labels=target, scale=1.0 / temperature, head_dim=head).mean()
