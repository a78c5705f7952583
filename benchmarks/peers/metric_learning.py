"""pytorch-metric-learning's losses, which normalise their embeddings themselves."""

from __future__ import annotations

import torch
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch import Tensor

from .eager import target_rows


def supervised_contrastive(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    pairs: str = "batch",
    form: str = "out",
    normalize: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """SupConLoss on rows `(N, C)`."""
    if features.dim() != 2 or form != "out":
        raise ValueError(f'pml takes rows and form "out"; got {features.dim()}-d and {form}')
    return SupConLoss(temperature=temperature)(features, labels)


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
    """NTXentLoss on rows `(N, C)`: labels make each query's key its only positive."""
    if query.dim() != 2:
        raise ValueError(f"pml takes rows; got {query.dim()}-d")
    loss = NTXentLoss(temperature=temperature)
    names = torch.arange(key.shape[0], device=key.device)
    if symmetric and intra_view and positives is None:
        return loss(torch.cat((query, key)), torch.cat((names, names)))
    target = target_rows(positives, query, pairs)
    return loss(query, target, ref_emb=key, ref_labels=names)
