"""`pair_filtered_grad`: (F1) and (F2) of reference/pair_filtered_grad.py.

The rule masks pair gradients tile by tile within the gradient engine; a list goes through
pair_at.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import gradient as gradient_sweep
from .engine import vector
from .launch import operation
from .pair_at import listed_gradient
from .pair_gradients import (
    along,
    anchor_constants,
    gradient_and_score,
    indexed,
    of_kind,
    own_labels,
    pairs_of,
    positive_pairs,
    row_rule,
    selected,
)
from .pair_logsumexp import amplify, scale
from .rows import unpack


@operation
def pair_filtered_grad(query: Tensor, key: Tensor | None, value: Tensor, *_: object) -> Tensor:
    """(F1), the value itself; see ops/pair_filtered_grad.py."""
    return value.clone()


@operation
def pair_filtered_grad_backward(
    d_value: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positives: Tensor | None,
    statistics: Tensor,
    threshold: Tensor | None,
    cut: Tensor | None,
    anchor: Tensor | None,
    candidate: Tensor | None,
    gradient: Tensor | None,
    form: str,
    score: str,
    scope: str,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """(F2): gradients in the layouts of query and key."""
    if anchor is not None and candidate is not None and gradient is not None:
        used = anchor >= 0
        at = anchor.clamp(0, max(0, value.numel() - 1))
        weight = torch.where(used, d_value.flatten()[at] * gradient, 0.0).float()
        options = (temperature, normalize, need_query, need_key)
        return listed_gradient(query, key, anchor, candidate, weight, *options)
    if threshold is None or cut is None:
        raise ValueError("a selection is threshold and cut, or anchor, candidate and gradient")
    pairs = pairs_of(
        query, key, query_labels, key_labels, positives, statistics, form, score, ignore_index,
        normalize, across,
    )  # fmt: skip
    up = torch.where(statistics[0].isinf(), 0.0, d_value.float())
    up, unscale = amplify(up.unsqueeze(0), pairs.x)
    limit, last = row_rule(pairs, threshold, cut)
    own = (*pairs.anchors, limit, last, up)
    other = own if key is None else (*pairs.candidates, None, None, None)
    shared: dict[str, Any] = {"numbers": (scale(temperature),), "name": "filtered"}
    options = (*pairs.options, threshold.shape[0])
    d_query = d_key = query.new_empty(0)
    if need_query:
        roles = (*options, True, key is None)
        d = gradient_sweep(
            pairs.x, pairs.y, _load, _weight, own=own, other=other, options=roles, **shared
        )
        d_query = unpack(d, query, pairs.valid, normalize, 1 / temperature, unscale)
    if key is not None and pairs.y is not None and need_key:
        roles = (*options, False, True)
        d = gradient_sweep(
            pairs.y, pairs.x, _load, _weight, own=other, other=own, options=roles, **shared
        )
        d_key = unpack(d, key, pairs.key_valid, normalize, 1 / temperature, unscale)
    return d_query, d_key


# own and other: Side, then limit, last, up of the anchors. OPTIONS = (form, indexed,
# representation, classes, owned rows are anchors, streamed rows are)


@triton.jit
def _rule(
    side, at, OPTIONS: tl.constexpr, SIZE: tl.constexpr, EDGE: tl.constexpr, AXIS: tl.constexpr
):
    """Thresholds, last candidates and upstream gradients of a tile's anchors."""
    CLASSES: tl.constexpr = OPTIONS[3]
    limits, lasts = (), ()
    for k in tl.static_range(CLASSES):
        limits = limits + (along(vector(side[5], k, at, SIZE, EDGE), AXIS),)
        lasts = lasts + (along(vector(side[6], k, at, SIZE, EDGE), AXIS),)
    return limits, lasts, along(vector(side[7], 0, at, SIZE, EDGE), AXIS)


@triton.jit
def _load(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    labels = own_labels(own, at, OPTIONS, BM)
    constants, rule, addend = (), (), ()
    if OPTIONS[4]:
        constants = anchor_constants(own, at, OPTIONS, BM, True, 1)
        rule = _rule(own, at, OPTIONS, BM, True, 1)
    if OPTIONS[5] and own[2] is not None:
        addend = (vector(own[2], 0, at, BM, True)[:, None],)
    return labels, constants, rule, addend, at, indexed(own, OPTIONS)


@triton.jit
def _weight(values, s, other, to, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    CLASSES: tl.constexpr = OPTIONS[3]
    BM: tl.constexpr = s.shape[0]
    BN: tl.constexpr = s.shape[1]
    labels, constants, rule, addends, at, index = values
    weight = tl.zeros_like(s)
    if OPTIONS[4]:
        positive = positive_pairs(labels, index, other, at, to, OPTIONS, BM, BN, EDGE, False)
        addend = None
        if other[2] is not None:
            addend = vector(other[2], 0, to, BN, EDGE)[None, :]
        g, r = gradient_and_score(s, constants, positive, addend, numbers[0], OPTIONS)
        column = (to[2] + tl.arange(0, BN))[None, :]
        limit = of_kind(rule[0], positive, CLASSES)
        last = of_kind(rule[1], positive, CLASSES)
        weight += tl.where(selected(r, limit, last, column), g * rule[2], 0.0)
    if OPTIONS[5]:
        index = indexed(other, OPTIONS)
        positive = positive_pairs(labels, index, other, at, to, OPTIONS, BM, BN, EDGE, True)
        addend = None
        if len(addends) > 0:
            addend = addends[0]
        theirs = anchor_constants(other, to, OPTIONS, BN, EDGE, 0)
        limits, lasts, up = _rule(other, to, OPTIONS, BN, EDGE, 0)
        g, r = gradient_and_score(s, theirs, positive, addend, numbers[0], OPTIONS)
        column = (at[2] + tl.arange(0, BM))[:, None]
        limit = of_kind(limits, positive, CLASSES)
        last = of_kind(lasts, positive, CLASSES)
        weight += tl.where(selected(r, limit, last, column), g * up, 0.0)
    return weight
