"""What every list of selected pairs must be, whichever rule chose them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from medcl_kernels.reference.pair_gradients import linear_index, pair_gradients, unit_of_rows
from medcl_kernels.registry import Sample

EPSILON = torch.finfo(torch.float32).eps


def check_largest(
    ranked: Tensor,
    unit: Tensor,
    positive: Tensor,
    k: Tensor,
    anchor: Tensor,
    candidate: Tensor,
    rounding: Tensor | None = None,
) -> list[tuple[int, int, Tensor, Tensor]]:
    """The list is in order, no pair stands in it twice, and it holds the k largest of every cell.

    Args:
        ranked, unit, positive: `(G, N, Nk)`, score, unit and class of every pair.
        k: `(classes, units)`.
        anchor, candidate: flat rows of the listed pairs.
        rounding: how far each score may be off, for its neighbours too; None: 1e-5 of it.

    Returns: per cell class, unit, and the scores of its pairs inside and outside the list.
    """
    groups, n, width = ranked.shape
    cells = []
    place = anchor * groups * width + candidate
    assert (place[1:] > place[:-1]).all()
    chosen = torch.zeros(groups * n, width, dtype=torch.bool)
    chosen[anchor, candidate % width] = True
    chosen = chosen.reshape(ranked.shape)
    for c in range(k.shape[0]):
        kind = torch.ones_like(chosen) if k.shape[0] == 1 else positive == (c == 0)
        for u in range(k.shape[1]):
            mine = kind & (unit == u) & (ranked > 0)
            inside, outside = ranked[mine & chosen], ranked[mine & ~chosen]
            assert len(inside) == min(int(k[c, u]), int(mine.sum()))
            if len(inside) and len(outside):
                edge = inside.min()
                near = mine & (ranked > edge / 2) & (ranked < 2 * edge)
                slack = 1e-5 * edge if rounding is None else 4 * rounding[near].max()
                assert outside.max() <= edge + slack
            cells.append((c, u, inside, outside))
    return cells


def check_rounded(ours: dict[str, Tensor], plain: Sample, exact: Sample, rounded: Any) -> None:
    """`pair_topk` where rounded products rank the pairs: another pair than in float64 may be the
    k-th, but only one whose score is equal to rounding; and list, threshold and cut say the same.

    Args:
        ours: the results.
        plain, exact: the sample in its own dtype, and in float64.
        rounded: a context in which the reference rounds as the backend does.
    """
    with rounded:
        _, near, near_ranked, _ = _scores(plain)
    s, gradient, ranked, positive = _scores(exact)
    across, scope, k = (exact.kwargs[name] for name in ("across", "scope", "k"))
    unit = unit_of_rows(exact.args[0], scope, across).unsqueeze(2).expand_as(ranked)
    place = linear_index(exact.args[0], s, across)
    rounding = (near_ranked.double() - ranked).abs() + 4 * EPSILON * ranked

    for c, u in itertools.product(*map(range, k.shape)):
        threshold, cut, wanted = (x[c, u].item() for x in (ours["threshold"], ours["cut"], k))
        mine = (unit == u) & (ranked > 0) & (positive == (c == 0) if len(k) == 2 else True)
        scores = ranked[mine].sort(descending=True).values
        if wanted == 0 or wanted >= len(scores):
            assert cut == -1 and threshold == (torch.inf if wanted == 0 else 0.0)
            continue
        edge = scores[wanted - 1]
        off = 4 * rounding[mine & (ranked > edge / 2) & (ranked < 2 * edge)].max()
        assert (threshold - edge).abs() <= off, f"threshold {threshold}, {edge} expected"
        last = mine & (place == cut)
        assert last.sum() == 1, f"the last pair, {cut}, is none of this selection"
        assert (ranked[last] - edge).abs().item() <= off, "another pair is last"
    if exact.kwargs["capacity"] == 0:
        return

    used = ours["anchor"] >= 0
    assert torch.equal(used, used.sort(descending=True, stable=True).values), "a gap in the list"
    anchor, candidate = ours["anchor"][used], ours["candidate"][used]
    check_largest(ranked, unit, positive, k, anchor, candidate, rounding)
    listed = anchor // ranked.shape[1], anchor % ranked.shape[1], candidate % ranked.shape[2]
    most = 2 * (near.double() - gradient).abs().max() + 4 * EPSILON * gradient.abs().max()
    values = ours["gradient"][used]
    assert ((values.double() - gradient[listed]).abs() <= most).all()
    assert not ours["gradient"][~used].any()
    for c, u in itertools.product(*map(range, k.shape)):
        threshold, cut = ours["threshold"][c, u], ours["cut"][c, u]
        last = place[listed] == cut
        assert last.sum() == (cut >= 0), "the last pair of the rule is not in the list"
        if exact.kwargs["score"] == "pair" and cut >= 0:
            tied = (unit[listed] == u) & (positive[listed] == (c == 0) if len(k) == 2 else True)
            tied &= values.abs() == threshold
            assert place[listed][tied].max() == cut, "not the last of equal ones"


def _scores(sample: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Similarities, gradients, scores and positives of all pairs of a sample of `pair_topk`."""
    options = {
        name: value
        for name, value in sample.kwargs.items()
        if name not in ("k", "capacity", "scope")
    }
    with torch.no_grad():
        return pair_gradients(*sample.args, **options)
