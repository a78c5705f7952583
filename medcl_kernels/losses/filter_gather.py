"""Gradient Filter, candidates of all ranks: what can be asked for, and positives by index."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import Ranks
from ..layout import rows


def check_gather(query: Tensor, key: Tensor | None, index: Tensor | None, scope: str) -> None:
    """What of a selection is known where each rank has its own anchors only."""
    if key is None:
        raise ValueError(
            "gather_distributed needs key=: the pair of a pixel with itself is left out of a "
            "selection only where query and candidates are one tensor. Pass a second view, or use "
            "supervised_contrastive"
        )
    if scope == "global" or (scope == "image" and query.dim() == 2):
        raise ValueError(
            f"gather_distributed with scope={scope!r} would let the pairs of all ranks compete, "
            "and each rank knows its own anchors only"
            + (" (flat rows are one image)" if scope == "image" else "")
            + ": use scope='anchor'"
            + (" or 'image'" if query.dim() > 2 else "")
        )
    if index is not None and index.shape[2] > 1:
        raise ValueError(
            f"gather_distributed takes one positive per anchor; got positives with "
            f"{index.shape[2]} each: pass labels"
        )


def indexed_by_label(
    ranks: Ranks, key: Tensor, index: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Key rows of all ranks and one positive per anchor, said by label: every key pixel has a
    number of its own, `(1, Bk, Lk)`, and an anchor that of its positive, `(1, B, L)`."""
    assert index is not None
    (found,) = ranks.gather(key=key)
    k, own = rows(found.everyone()), rows(key)
    start = max(ignore_index + 1, 0)
    number = torch.arange(start, start + k.shape[0] * k.shape[2], device=key.device)
    first = found.offset * (1 if key.dim() == 2 else own.shape[2])
    mine = number[first : first + own.shape[0] * own.shape[2]].reshape(own.shape[0], -1)
    place = index.squeeze(2)
    anchors = torch.where(place >= 0, mine.gather(1, place.clamp_min(0)), ignore_index)
    return k, number.reshape(1, k.shape[0], -1), anchors.unsqueeze(0)
