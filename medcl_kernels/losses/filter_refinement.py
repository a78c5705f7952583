"""Selections that `pair_topk` has no rule for, made exactly from its lists in O(N D + m) memory.

`pair_topk` lists the m pairs of the largest directed score, and no pair that it leaves out exceeds
its threshold r. From that list:

    attract_only   positives with G_ij > 0 are struck out. What is left are the first of the rest,
                   so k of them are enough.
    undirected     R_ij = |G_ij + G_ji| of every listed {i, j}. A pair listed in neither direction
                   has R_ij <= 2 r, so k listed pairs above 2 r are the k largest.

Where that does not hold yet, m grows and the list is made again: at worst until it holds every pair
that ties with the k-th. With G_ij close to G_ji, m = 2k is enough.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.pair_at import pair_at
from ..ops.pair_topk import pair_topk
from ..reference.pair_gradients import gradient_at
from .filter_statistics import Keep, Perspective, Problem
from .filter_uses import listed_similarities

GROWTH = 4


class Listing(NamedTuple):
    """Selected pairs in the order of (anchor, candidate), entries with anchor < 0 unused.

    Attributes:
        anchor, candidate: `(K,)` int64; of an undirected pair anchor < candidate.
        gradient: `(K,)`, d(row losses) / ds of the pair: G_ij, undirected G_ij + G_ji.
        threshold: `(C, U)`, as of `pair_topk`.
        cut: `(C, U)`, as of `pair_topk`; None where the list is to be used, not the rule.
        parts: `(2, K)`, G_ij and G_ji of undirected pairs.
    """

    anchor: Tensor
    candidate: Tensor
    gradient: Tensor
    threshold: Tensor
    cut: Tensor | None = None
    parts: Tensor | None = None

    def directed(self) -> tuple[Tensor, Tensor, Tensor]:
        """anchor, candidate and G_ij of every direction that has a gradient."""
        if self.parts is None:
            return self.anchor, self.candidate, self.gradient
        anchor = torch.cat([self.anchor, self.candidate])
        candidate = torch.cat([self.candidate, self.anchor])
        gradient = self.parts.flatten()
        some = (gradient != 0).nonzero().squeeze(1)
        order = some[_place(anchor[some], candidate[some]).argsort()]
        return anchor[order], candidate[order], gradient[order]

    def at(self, chosen: Tensor) -> Listing:
        """Some of the pairs, by mask or index."""
        parts = None if self.parts is None else self.parts[:, chosen]
        pairs = self.anchor[chosen], self.candidate[chosen], self.gradient[chosen]
        return self._replace(anchor=pairs[0], candidate=pairs[1], gradient=pairs[2], parts=parts)


@torch.no_grad()
def listing(
    problem: Problem, one: Perspective, keep: Keep, most: int | None = None, whole: bool = False
) -> Listing:
    """The selection of one perspective.

    Args:
        most: pairs up to which the list is to be used; beyond it is the rule, where there is one.
        whole: make the list even where the rule is used.
    """
    k, capacity = problem.quota(one, keep)
    if problem.refined:
        return _refined(problem, one, k)
    listed = most is None or capacity <= most
    found = _topk(problem, one, k, capacity if listed or whole else 0)
    return found._replace(cut=None) if listed else found


def _topk(problem: Problem, one: Perspective, k: Tensor, capacity: int) -> Listing:
    return Listing(
        *pair_topk(
            problem.query.detach(),
            None if problem.key is None else problem.key.detach(),
            k=k,
            capacity=capacity,
            **problem.selection_options(one),
        )
    )


def _refined(problem: Problem, one: Perspective, k: Tensor) -> Listing:
    """The first k pairs of each cell in the order of (-R, place); see the module."""
    twice = problem.direction == "undirected"
    available = problem.candidates(one, len(k), "directed")
    asked = torch.minimum(2 * k if twice else k, available)
    while True:
        found = _topk(problem, one, asked, int(asked.sum()))
        pairs, score, cell = _scored(problem, one, found.at(found.anchor >= 0), k)
        order = score.sort(descending=True, stable=True).indices  # places ascend: ties keep them
        order = order[cell[order].sort(stable=True).indices]
        count = cell.bincount(minlength=k.numel()).reshape(k.shape)
        start = (count.flatten().cumsum(0) - count.flatten()).reshape(k.shape)
        last = torch.where((count >= k) & (k > 0), start + k - 1, 0)
        reached = score[order][last] if len(order) else torch.zeros_like(found.threshold)
        enough = (count >= k) & ((reached > 2 * found.threshold) if twice else True)
        enough |= (found.threshold == 0) | (k == 0)  # threshold 0: the list holds every pair
        if enough.all():
            break
        asked = torch.where(enough, asked, torch.minimum(GROWTH * asked, available))
    rank = torch.arange(len(order), device=k.device) - start.flatten()[cell[order]]
    kept = order[rank < k.flatten()[cell[order]]].sort().values
    threshold = torch.where((count > k) | (found.threshold > 0), reached, 0.0)
    threshold = torch.where(k == 0, torch.inf, threshold)
    return pairs.at(kept)._replace(threshold=threshold, cut=None)


def _scored(
    problem: Problem, one: Perspective, pairs: Listing, k: Tensor
) -> tuple[Listing, Tensor, Tensor]:
    """Candidates of a directed list in the order of their place, their scores, and the cell of `k`
    that each competes in."""
    if problem.direction == "undirected":
        first = torch.minimum(pairs.anchor, pairs.candidate)
        second = torch.maximum(pairs.anchor, pairs.candidate)
        place = _place(first, second).unique()
        first, second = place >> 32, place & 0xFFFFFFFF
        s, positive = listed_similarities(problem, one, first, second)
        parts = torch.stack([_gradient(problem, one, s, positive, row) for row in (first, second)])
        pairs = Listing(first, second, parts.sum(0), pairs.threshold, None, parts)
    else:
        _, positive = listed_similarities(problem, one, pairs.anchor, pairs.candidate)
    score = pairs.gradient.abs()
    if problem.score == "representation":
        score = score * _sine_over_norm(problem, pairs)
    allowed = score > 0
    if problem.sign == "attract_only" and problem.form == "out":
        allowed &= ~(positive & (pairs.gradient > 0))
    pairs = pairs.at(allowed)
    batch, length = one.value.shape
    row = pairs.anchor
    unit = {"global": torch.zeros_like(row), "image": row // length, "anchor": row}[problem.scope]
    if len(k) == 2:
        unit = unit + torch.where(positive[allowed], 0, k.shape[1])
    return pairs, score[allowed], unit


def _gradient(
    problem: Problem, one: Perspective, s: Tensor, positive: Tensor, row: Tensor
) -> Tensor:
    """G of listed pairs as those of the anchors `row`."""
    a, b, c = (constant.flatten()[row].to(s.dtype) for constant in one.statistics)
    return gradient_at(s, positive, a, b, c, problem.form)


def _sine_over_norm(problem: Problem, pairs: Listing) -> Tensor:
    """What (G4) multiplies |G_ij| by."""
    x = problem.query.detach()
    key = None if problem.key is None else problem.key.detach()
    cosine = pair_at(x, key, pairs.anchor, pairs.candidate, temperature=1.0, impl=problem.impl)
    norm = x.to(cosine.dtype).norm(dim=1).flatten()[pairs.anchor]
    sine = (1 - cosine.square()).clamp_min(0).sqrt()
    return torch.where(norm > 0, sine / norm.clamp_min(1e-12), 0.0)


def _place(anchor: Tensor, candidate: Tensor) -> Tensor:
    """A number that orders pairs by (anchor, candidate); rows are fewer than 2^31."""
    return (anchor << 32) + candidate
