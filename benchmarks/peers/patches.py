"""Patch-affinity contrast as the published code computes it, and as plain torch would: peers of
`patch_affinity_contrast`, `patch_class_ratio` and `uncertainty_reweight`."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def broadcast(
    features: Tensor,
    ratios: Tensor,
    *,
    key: Tensor | None = None,
    key_ratios: Tensor | None = None,
    temperature: float,
    form: str = "affinity",
    normalize: bool = True,
) -> Tensor:
    """The published way: cosine similarity by broadcasting to (B, C, N, N), once per patch size."""
    assert normalize and form == "affinity"
    features = features.flatten(2)
    other = features if key is None else key.flatten(2)
    q = ratios if key_ratios is None else key_ratios
    total = []
    for p in range(ratios.shape[0]):
        cosine = F.cosine_similarity(features.unsqueeze(3), other.unsqueeze(2), dim=1)
        similarity = cosine / temperature
        shifted = similarity - 1 / temperature
        divergence = (ratios[p].unsqueeze(3) - q[p].unsqueeze(2)).abs().sum(1)
        affinity = 1 - divergence
        positive = torch.exp(affinity * shifted)
        negative = torch.exp(divergence * shifted).sum(2, keepdim=True)
        total.append(-torch.log(positive / negative.expand_as(positive)).mean())
    return torch.stack(total).mean()


def gemm(
    features: Tensor,
    ratios: Tensor,
    *,
    key: Tensor | None = None,
    key_ratios: Tensor | None = None,
    temperature: float,
    form: str = "affinity",
    normalize: bool = True,
) -> Tensor:
    """Plain torch done well: one batched matrix product for all patch sizes, (B, N, N) matrices."""
    assert normalize and form == "affinity"
    z = F.normalize(features.flatten(2), dim=1)
    k = z if key is None else F.normalize(key.flatten(2), dim=1)
    q = ratios if key_ratios is None else key_ratios
    t = torch.baddbmm(
        z.new_full((1, 1, 1), -1 / temperature), z.transpose(1, 2), k, alpha=1 / temperature
    )
    total = []
    for p in range(ratios.shape[0]):
        divergence = (ratios[p].unsqueeze(3) - q[p].unsqueeze(2)).abs().sum(1)
        weighted = divergence * t
        # (1 - D) t = t - D t
        total.append(weighted.logsumexp(2).mean() - (t - weighted).mean())
    return torch.stack(total).mean()


def unique(
    labels: Tensor,
    centers: Tensor,
    windows: Sequence[Sequence[tuple[int, int]]],
    *,
    num_classes: int,
    normalizer: str = "clipped",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The published way: a Python loop over images, samples and sizes, torch.unique per window."""
    assert normalizer == "clipped"
    shape = (len(windows), labels.shape[0], num_classes - 1, centers.shape[0])
    result = torch.zeros(shape, dtype=dtype)
    for p, window in enumerate(windows):
        for b in range(labels.shape[0]):
            for n, center in enumerate(centers.tolist()):
                patch = labels[b][
                    tuple(
                        slice(max(c + low, 0), max(c + high, 0))
                        for c, (low, high) in zip(center, window, strict=True)
                    )
                ]
                found, counts = torch.unique(patch, return_counts=True)
                for k, count in zip(found.tolist(), counts.tolist(), strict=True):
                    if k > 0:
                        result[p, b, k - 1, n] = count / patch.numel()
    return result


def gate(features: Tensor, logits: Tensor, **_: Any) -> Tensor:
    """The published way: softmax, logarithm of it plus an epsilon, two products."""
    p = logits.softmax(1)
    uncertainty = -(p * torch.log(p + 1e-20)).sum(1, keepdim=True) / log(logits.shape[1])
    return features + features * (1 - uncertainty)
