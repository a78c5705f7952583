"""What one writes without the package's operations: top-k over the matrix or over row blocks of it,
and gradient projections one after the other. And yardsticks of the package itself: its forward
pass, and either way of its Gradient Filter."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from medcl_kernels.losses import gradient_filter
from medcl_kernels.ops.pair_logsumexp import pair_logsumexp

from .eager import by_matrix, one_set, product

BLOCK = 256  # rows at a time


def forward_only(query: Tensor, key: Tensor | None = None, **options: Any) -> Tensor:
    """`pair_logsumexp` of the package without a gradient."""
    with torch.no_grad():
        return pair_logsumexp(query, key, impl="cpu", **options)


def _gradients(z: Tensor, rows: slice, options: dict[str, Any]) -> Tensor:
    """dl/ds of supervised contrast "out" for some rows, `(len(rows), N)`."""
    a, b = (one[0, rows].unsqueeze(1) for one in options["statistics"][:2])
    labels = options["query_labels"][0, 0]
    gradient = (z[rows] @ z.T).div_(options["temperature"]).sub_(a).exp_()
    gradient.sub_(torch.where(labels[rows].unsqueeze(1) == labels, b, 0.0))
    gradient[:, rows].fill_diagonal_(0)
    return gradient


def _result(place: Tensor, gradient: Tensor, n: int, capacity: int) -> tuple[Tensor, ...]:
    """As `pair_topk` returns it, in the order of (anchor, candidate)."""
    last = gradient.abs().argmin()
    threshold, cut = gradient[last].abs().reshape(1, 1), place[last].reshape(1, 1)
    place, order = place.sort()
    spare = capacity - len(place)
    anchor = F.pad(place // n, (0, spare), value=-1)
    candidate = F.pad(place % n, (0, spare), value=-1)
    return anchor, candidate, F.pad(gradient[order], (0, spare)), threshold, cut


def _unit_rows(query: Tensor) -> Tensor:
    return F.normalize(query[0].t(), dim=1)


@torch.no_grad()
def eager_topk(query: Tensor, key: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    """`torch.topk` of the whole matrix of gradients; one set of rows, labels, scope "global"."""
    z, k = _unit_rows(query), int(options["k"])
    n = len(z)
    gradient = _gradients(z, slice(0, n), options).flatten()
    place = gradient.abs().topk(k, sorted=False).indices
    return _result(place, gradient[place], n, options["capacity"])


@torch.no_grad()
def chunked_topk(query: Tensor, key: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    """Row blocks through `torch.mm`, a running `torch.topk` over what was kept and the block."""
    z, k = _unit_rows(query), int(options["k"])
    n = len(z)
    kept, places = z.new_empty(0), torch.empty(0, dtype=torch.int64)
    for start in range(0, n, BLOCK):
        block = _gradients(z, slice(start, min(start + BLOCK, n)), options).flatten()
        own = torch.arange(start * n, start * n + len(block))
        kept, places = torch.cat([kept, block]), torch.cat([places, own])
        if len(kept) > k:
            best = kept.abs().topk(k, sorted=False).indices
            kept, places = kept[best], places[best]
    return _result(places, kept, n, options["capacity"])


def eager_filtered(
    query: Tensor,
    key: Tensor | None = None,
    *,
    labels: Tensor,
    temperature: float,
    keep: float | int,
    pairs: str = "image",
    normalize: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Supervised contrast of one set of rows whose gradient passes the largest entries of the
    matrix of gradients only."""
    (z,) = one_set("eager", pairs, query, normalize=normalize)
    cosine, n = product(z, z), len(z)
    leaf = cosine.detach().requires_grad_()
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    with torch.enable_grad():
        value = by_matrix(leaf / temperature, itself, labels.reshape(-1), "out")
        gradient = torch.autograd.grad(value, leaf)[0].flatten()
    candidates = n * (n - 1)
    k = min(keep, candidates) if isinstance(keep, int) else math.ceil(keep * candidates)
    best = gradient.abs().topk(k, sorted=False).indices
    chosen = torch.zeros_like(gradient)
    chosen[best] = gradient[best]
    through = (chosen.view_as(cosine) * cosine).sum()
    return value.detach() + through - through.detach()


def filtered_by_list(query: Tensor, key: Tensor | None = None, **options: Any) -> Tensor:
    """`filtered_contrastive` through a list of the selected pairs, however many."""
    return _filtered(10**9, query, key, options)


def filtered_by_rule(query: Tensor, key: Tensor | None = None, **options: Any) -> Tensor:
    """`filtered_contrastive` through threshold and last place, however few pairs are selected."""
    return _filtered(0, query, key, options)


def _filtered(listed: int, query: Tensor, key: Tensor | None, options: dict[str, Any]) -> Tensor:
    # the forward pass decides; the backward pass has the list or the rule by then
    with patch.object(gradient_filter, "LISTED_PER_ANCHOR", listed):
        return gradient_filter.filtered_contrastive(query, key, impl="cpu", **options)


@torch.no_grad()
def eager_pcgrad(gradients: Tensor, order: Tensor, **options: Any) -> Tensor:
    """PCGrad of every row, projection by projection."""
    if options.get("method", "pcgrad") != "pcgrad" or options.get("unit", "row") != "row":
        raise ValueError("eager has method pcgrad, unit row")
    total = torch.zeros_like(gradients[0])
    for a, others in enumerate(order.tolist()):
        u = gradients[a].clone()
        for b in others:
            q = (u * gradients[b]).sum(1, keepdim=True).clamp_max_(0)
            u -= q / (gradients[b].square().sum(1, keepdim=True) + 1e-12) * gradients[b]
        total += u
    return total / len(gradients)
