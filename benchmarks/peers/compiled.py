"""torch.compile of the plain-torch losses, for fixed shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import one_set, product, target_rows


@torch.compile(dynamic=False)
def _supervised(z: Tensor, member: Tensor, classes: int, temperature: float) -> Tensor:
    s = product(z, z) / temperature
    itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    lse = s.masked_fill(itself, float("-inf")).logsumexp(1)
    sums = z.new_zeros(classes, z.shape[1]).index_add(0, member, z)
    sizes = member.new_zeros(classes).index_add(0, member, torch.ones_like(member))
    count = sizes[member] - 1
    mean = (z * (sums[member] - z)).sum(1) / temperature / count.clamp_min(1)
    valid = count > 0
    return torch.where(valid, lse - mean, 0.0).sum() / valid.sum().clamp_min(1)


@torch.compile(dynamic=False)
def _info_nce(q: Tensor, k: Tensor, target: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(product(q, k) / temperature, target)


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
    """Supervised contrast "out" of one set of pairs, positives by class sums."""
    (z,) = one_set("compile", pairs, features, form=form, normalize=normalize)
    classes, member = labels.reshape(-1).unique(return_inverse=True)
    return _supervised(z, member, len(classes), temperature)


def info_nce(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    *,
    temperature: float,
    pairs: str = "image",
    normalize: bool = True,
) -> Tensor:
    """InfoNCE of one set of pairs."""
    q, k = one_set("compile", pairs, query, key, normalize=normalize)
    return _info_nce(q, k, target_rows(positives, query, pairs), temperature)
