"""`pair_topk`: (K1) and (K2) of reference/pair_topk.py; scores are never stored.

pair_threshold.py finds the k-th score. A sweep counts, for every anchor, what lies above
its threshold and on it. What the unit still needs is taken from the pairs on it in their order, so
one row has the cut; a row that has more ties than are wanted is looked through once more. A list is
written in a last sweep: every anchor knows where its pairs begin. Nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import store, vector
from .launch import operation
from .pair_gradients import (
    Pairs,
    anchors_of,
    by_row,
    filled,
    of_class,
    of_kind,
    pairs_of,
    place_of_rows,
    row_rule,
    scores,
    selected,
    sweep,
    vectors_of,
)
from .pair_logsumexp import scale
from .pair_threshold import threshold_of


@operation
def pair_topk(
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positives: Tensor | None,
    statistics: Tensor,
    k: Tensor,
    capacity: int,
    form: str,
    score: str,
    scope: str,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ops/pair_topk.py. Pairs that the list has no room for are left out."""
    pairs = pairs_of(
        query, key, query_labels, key_labels, positives, statistics, form, score, ignore_index,
        normalize, across,
    )  # fmt: skip
    numbers = (scale(temperature),)
    threshold, exact = threshold_of(pairs, k, numbers)
    above, ties, last = _on_threshold(pairs, threshold, numbers)
    taken, cut = _cut(pairs, k, threshold, exact, above, ties, last, numbers)
    anchor = torch.full((capacity,), -1, dtype=torch.int64, device=query.device)
    candidate = torch.full_like(anchor, -1)
    gradient = torch.zeros(capacity, dtype=torch.float32, device=query.device)
    if capacity:
        chosen = (above + taken).sum(0, keepdim=True)
        _write(pairs, threshold, cut, chosen, (anchor, candidate, gradient), numbers)
    return anchor, candidate, gradient, threshold, cut


def _on_threshold(
    pairs: Pairs, threshold: Tensor, numbers: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """How many pairs of every anchor are above the threshold and on it, and the last on it."""
    limit = by_row(threshold, pairs)
    out = tuple(torch.empty(limit.shape, dtype=torch.int32, device=limit.device) for _ in range(3))
    sweep(pairs, (_rank_start, _rank_step, _rank_finish), (limit,), out, numbers)
    above, ties, last = out
    return above, ties, last


def _cut(
    pairs: Pairs,
    k: Tensor,
    threshold: Tensor,
    exact: Tensor,
    above: Tensor,
    ties: Tensor,
    last: Tensor,
    numbers: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """How many pairs on the threshold every anchor keeps `(C, G, n)`, and the cut `(C, U)`."""
    by_unit = (*k.shape, -1)
    rest = torch.where(exact, k - above.view(by_unit).sum(2), 0).unsqueeze(2)
    on = ties.view(by_unit).long()
    before = on.cumsum(2) - on
    taken = torch.minimum((rest - before).clamp_min(0), on)
    ends = (taken > 0) & (before + on >= rest)
    more = (ends & (taken < on)).view(ties.shape)
    column = torch.empty_like(last)
    sweep(
        pairs,
        (_tie_start, _tie_step, _tie_finish),
        (by_row(threshold, pairs), taken.to(torch.int32).view(ties.shape)),
        (column,),
        numbers,
        active=more.any(0, keepdim=True).to(torch.int32),
        ordered=True,
    )
    place = torch.where(more, column, last) + place_of_rows(pairs)
    cut = torch.where(ends, place.view(by_unit), -1).amax(2)
    return taken.view(ties.shape), cut


def _write(
    pairs: Pairs,
    threshold: Tensor,
    cut: Tensor,
    chosen: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    numbers: tuple[float, ...],
) -> None:
    """Fills the list; chosen: `(1, G, n)`, how many pairs every anchor has in it."""
    end = chosen.flatten().cumsum(0).view(chosen.shape)
    span = torch.cat([end - chosen, end.clamp_max(out[0].numel())])
    sweep(
        pairs,
        (_write_start, _write_step, _write_finish),
        (*row_rule(pairs, threshold, cut), span, *out),
        (),
        numbers,
        active=(chosen > 0).to(torch.int32),
        ordered=True,
    )


# own: see pair_gradients.py; the vectors are named at each epilogue


@triton.jit
def _rank_start(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    """limit."""
    CLASSES: tl.constexpr = OPTIONS[3]
    values = (anchors_of(own, at, OPTIONS, BM), vectors_of(own[5], at, OPTIONS, BM))
    return values, filled(2 * CLASSES, BM, 0) + filled(CLASSES, BM, -1)


@triton.jit
def _rank_step(
    state, values, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr
):
    CLASSES: tl.constexpr = OPTIONS[3]
    positive, g, r, column = scores(values[0], s, other, to, inside, numbers, OPTIONS, EDGE)
    limit = of_kind(values[1], positive, CLASSES)
    above, ties, last = (), (), ()
    for k in tl.static_range(CLASSES):
        on = of_class(r == limit, positive, k, CLASSES)
        above = above + (state[k] + tl.sum(of_class(r > limit, positive, k, CLASSES), 1),)
        ties = ties + (state[CLASSES + k] + tl.sum(on, 1),)
        furthest = tl.max(tl.where(on > 0, column, -1), 1)
        last = last + (tl.maximum(state[2 * CLASSES + k], furthest),)
    return above + ties + last


@triton.jit
def _rank_finish(state, values, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    CLASSES: tl.constexpr = OPTIONS[3]
    for k in tl.static_range(CLASSES):
        store(out[0], k, at, state[k], BM)
        store(out[1], k, at, state[CLASSES + k], BM)
        store(out[2], k, at, state[2 * CLASSES + k], BM)


@triton.jit
def _tie_start(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    """limit, how many pairs on it are kept."""
    CLASSES: tl.constexpr = OPTIONS[3]
    limit = vectors_of(own[5], at, OPTIONS, BM)
    values = (anchors_of(own, at, OPTIONS, BM), limit, vectors_of(own[6], at, OPTIONS, BM))
    return values, filled(CLASSES, BM, 0) + filled(CLASSES, BM, -1)


@triton.jit
def _tie_step(
    state, values, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr
):
    """Looks for the last tie that is kept."""
    CLASSES: tl.constexpr = OPTIONS[3]
    positive, g, r, column = scores(values[0], s, other, to, inside, numbers, OPTIONS, EDGE)
    limit = of_kind(values[1], positive, CLASSES)
    count, found = (), ()
    for k in tl.static_range(CLASSES):
        on = of_class(r == limit, positive, k, CLASSES)
        number = state[k][:, None] + tl.cumsum(on, 1)
        here = (on > 0) & (number == values[2][k])
        count = count + (state[k] + tl.sum(on, 1),)
        at_last = tl.max(tl.where(here, column, -1), 1)
        found = found + (tl.maximum(state[CLASSES + k], at_last),)
    return count + found


@triton.jit
def _tie_finish(state, values, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    CLASSES: tl.constexpr = OPTIONS[3]
    for k in tl.static_range(CLASSES):
        store(out[0], k, at, state[CLASSES + k], BM)


@triton.jit
def _write_start(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    """limit, last; begin and end in the list; the list."""
    rule = (vectors_of(own[5], at, OPTIONS, BM), vectors_of(own[6], at, OPTIONS, BM))
    begin = vector(own[7], 0, at, BM, True)
    end = vector(own[7], 1, at, BM, True)
    lists = (own[8], own[9], own[10])
    return (anchors_of(own, at, OPTIONS, BM), rule, end, lists), (begin,)


@triton.jit
def _write_step(
    state, values, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr
):
    CLASSES: tl.constexpr = OPTIONS[3]
    BM: tl.constexpr = s.shape[0]
    anchors, rule, end, lists = values
    positive, g, r, column = scores(anchors, s, other, to, inside, numbers, OPTIONS, EDGE)
    limit = of_kind(rule[0], positive, CLASSES)
    last = of_kind(rule[1], positive, CLASSES)
    chosen = selected(r, limit, last, column)
    if EDGE:
        chosen = chosen & inside
    number = chosen.to(tl.int32)
    place = state[0][:, None] + (tl.cumsum(number, 1) - number)
    chosen = chosen & (place < end[:, None])
    at = anchors[2]
    row = (at[0] + at[2]) + tl.arange(0, BM)
    tl.store(lists[0] + place, row.to(tl.int64)[:, None] + tl.zeros_like(place), mask=chosen)
    tl.store(lists[1] + place, to[0] + column + tl.zeros_like(place), mask=chosen)
    tl.store(lists[2] + place, g, mask=chosen)
    return (state[0] + tl.sum(number, 1),)


@triton.jit
def _write_finish(state, values, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    pass
