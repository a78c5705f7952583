"""The magnitude of a loss's whole gradient, sum |G| over all candidate pairs, for the use "renorm".

Rows of G sum to 0, and only negatives and, in the form "out", positives with p_ij > 1/|P| are above
0. So the sums over negatives are known from the row constants (G1) to (G3) in O(N), and

    in, pixel:  sum_j |G_ij| = 2 sum_{j in N(i)} G_ij
    out:        sum_j |G_ij| = 1 - sum_{j in P(i)} p_ij + sum_{j in P(i)} |p_ij - 1/|P(i)||

Positives by index are one gather; positives by label are listed in slices of `SLICE` pairs, in the
time of the positive pairs and O(N D) memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..ops.pair_at import pair_at
from ..ops.positive_at import positive_at
from .filter_statistics import Perspective, Problem

SLICE = 2**20


@torch.no_grad()
def total_magnitude(problem: Problem, one: Perspective) -> Tensor:
    """sum |G_ij| over the candidates of a problem, undirected sum |G_ij + G_ji|; 0-d."""
    a, b, c = one.statistics
    if problem.form == "in":
        return _sum_where(one.valid, -2 * torch.expm1(b - a))
    if problem.form == "pixel":
        return _sum_where(one.valid, 2 * (c - a).exp())
    attract_only = problem.sign == "attract_only"
    if problem.index is not None:
        assert problem.key is not None
        options = {name: value for name, value in problem.options.items() if name != "ignore_index"}
        at = positive_at(problem.query.detach(), problem.key.detach(), problem.index, **options)
        named = problem.index >= 0
        p = torch.where(named, (at - a.unsqueeze(2)).exp(), 0.0)
        g = torch.where(named, p - b.unsqueeze(2), 0.0)
        return _sum_where(one.valid, 1 - p.sum(2)) + _magnitude(g, attract_only)
    if checks.traced(problem.query):
        raise ValueError(
            "use='renorm' with labels and form='out' lists the positives, which torch.compile and "
            "vmap cannot trace: call the loss outside of them, or use form='in' or 'pixel'"
        )
    total = one.valid.sum().to(a.dtype)
    a, b = a.flatten(), b.flatten()
    other = None if problem.key is None else problem.key.detach()
    options = {name: problem.options[name] for name in ("temperature", "normalize", "impl")}
    for anchor, candidate in _positives(problem, one):
        s = pair_at(problem.query.detach(), other, anchor, candidate, **options)
        p = (s - a[anchor]).exp()
        g, share = p - b[anchor], 1.0
        if problem.direction == "undirected":  # every pair comes twice, once from either side
            g, share = g + (s - a[candidate]).exp() - b[candidate], 0.5
        total = total - p.sum() + share * _magnitude(g, attract_only)
    return total


def _positives(problem: Problem, one: Perspective) -> Iterator[tuple[Tensor, Tensor]]:
    """All positive pairs by label, anchor and candidate `(K,)`, in slices."""
    assert one.labels is not None
    own = one.labels[0]
    other = own if one.key_labels is None else one.key_labels[0]
    # numbers from 0 on; without `across` labels of other images are other labels
    both = torch.cat([own.flatten(), other.flatten()]).unique(return_inverse=True)[1]
    own, other = both[: own.numel()].view_as(own), both[own.numel() :].view_as(other)
    if not problem.across:
        image = torch.arange(len(own), device=own.device).unsqueeze(1) * (both.max() + 1)
        own, other = own + image, other + image
    order = other.flatten().argsort(stable=True)  # columns of one label stand together
    size = other.flatten().bincount(minlength=int(own.max()) + 1)
    start = size.cumsum(0) - size
    row = one.valid.flatten().nonzero().squeeze(1)
    code = own.flatten()[row]
    part = size[code].cumsum(0).div(SLICE, rounding_mode="floor")
    for piece in part.unique_consecutive():
        mine = part == piece
        length, begin = size[code[mine]], start[code[mine]]
        anchor = row[mine].repeat_interleave(length)
        step = torch.arange(len(anchor), device=row.device)
        step = step - (length.cumsum(0) - length).repeat_interleave(length)
        candidate = order[begin.repeat_interleave(length) + step]
        if problem.key is None:
            different = anchor != candidate
            anchor, candidate = anchor[different], candidate[different]
        yield anchor, candidate


def _magnitude(g: Tensor, attract_only: bool) -> Tensor:
    return (-g).clamp_min(0).sum() if attract_only else g.abs().sum()


def _sum_where(valid: Tensor, value: Tensor) -> Tensor:
    return torch.where(valid, value, 0.0).sum()
