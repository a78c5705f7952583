"""Contrastive losses on explicit matrices of similarities, for what has no fused form: positives
that are no classes (thresholds, queues) and scores or thresholds of the Gradient Filter that look
at more than the pair. O(N^2) memory; the fused losses are checked against these."""

import torch
from torch import Tensor

INF = float("inf")


def row_losses(
    s: Tensor, positive: Tensor, allowed: Tensor, form: str = "out"
) -> tuple[Tensor, Tensor]:
    """SupCon per anchor, as `medcl_kernels.supervised_contrastive` defines the forms.

    Args:
        s: (..., N, K) cosines over temperature. positive, allowed: bool of that shape; positives
            that are not allowed do not count.

    Returns: values (..., N), 0 where there is no positive, and which anchors have one.
    """
    positive = positive & allowed
    count = positive.sum(-1)
    valid = count > 0
    share = 1 / count.clamp_min(1).to(s.dtype)
    mean = torch.where(positive, s, 0).sum(-1) * share
    if form == "pixel":
        negative = _logsumexp(s, allowed & ~positive)
        some = negative > -INF
        log = torch.logaddexp(s, torch.where(some, negative, 0)[..., None])
        log = torch.where(some[..., None], log, s)
        value = torch.where(positive, log, 0).sum(-1) * share - mean
    elif form == "in":
        value = _logsumexp(s, allowed) - _logsumexp(s, positive) - share.log()
    elif form == "out":
        value = _logsumexp(s, allowed) - mean
    else:
        raise ValueError(f"form must be 'out', 'in' or 'pixel', got {form!r}")
    return torch.where(valid, value, 0), valid


def _logsumexp(s: Tensor, mask: Tensor) -> Tensor:
    """Over the last axis; -inf, with gradient 0, where nothing is chosen."""
    some = mask.any(-1)
    filled = torch.where(mask | ~some[..., None], s, -INF)
    return torch.where(some, filled.logsumexp(-1), -INF)


def mean_of(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over anchors; a zero connected to the graph without any."""
    return values.sum() / valid.sum().clamp_min(1)


def pair_gradients(s: Tensor, positive: Tensor, allowed: Tensor, form: str) -> tuple[Tensor, ...]:
    """Values, valid anchors and G = d(mean loss)/ds (..., N, K), all without gradient."""
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        values, valid = row_losses(leaf, positive, allowed, form)
        (gradient,) = torch.autograd.grad(mean_of(values, valid), leaf)
    return values.detach(), valid, gradient


def largest(score: Tensor, count: Tensor) -> Tensor:
    """The `count` (U,) largest positive entries per row of (U, K), bool; ties to the smallest
    index."""
    order = score.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return (place < count[:, None]) & (score > 0)
