"""`pair_positive_log`: (Q1) to (Q4) of reference/pair_positive_log.py.

In base 2, with s' = s log2 e and n' = n log2 e, one positive adds

    log2(2^s' + 2^n') = max(s', n') + log2(1 + u),   u = 2^-|s' - n'| <= 1

(the sum of several such logarithms is taken as that of the product) and to the derivative by n the
share 1 - r of the negatives, u / (1 + u) or 1 / (1 + u). Nothing overflows, and n = -inf (no
negatives) gives u = 0.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import LN2, gradient_of_selections, of_share, shares, statistics, store, vector
from .launch import operation
from .pair_logsumexp import LOG2_E, amplify, scale
from .rows import pack_pair, unpack


@operation
def pair_positive_log(
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor,
    key_labels: Tensor | None,
    lse_negative: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
) -> tuple[Tensor, Tensor]:
    """(Q1) and its derivative by `lse_negative`, both `(S, B, L)`; see ops/pair_positive_log.py."""
    x, y, valid, key_valid = pack_pair(
        query, key, query_labels, key_labels, ignore_index, normalize, across
    )
    anchor = query_labels != ignore_index
    total = torch.empty(query_labels.shape, dtype=torch.float32, device=query.device)
    tail = torch.empty_like(total)
    own = (query_labels, _exponent(lse_negative, anchor), anchor)
    other = (query_labels if key is None else key_labels,)
    for share in shares(query_labels.shape[0]):
        statistics(
            "heavy",
            x,
            y,
            (_start, _step, _finish),
            own=of_share(own, share),
            other=of_share(other, share),
            out=(total[share], tail[share]),
            numbers=(scale(temperature),),
            options=(share.stop - share.start,),
        )
    return total, tail


@operation
def pair_positive_log_backward(
    d_sum: Tensor,
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor,
    key_labels: Tensor | None,
    lse_negative: Tensor,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """(Q3), (P4), (P5): gradients in the layouts of query and key."""
    x, y, valid, key_valid = pack_pair(
        query, key, query_labels, key_labels, ignore_index, normalize, across
    )
    anchor = query_labels != ignore_index
    d_sum, unscale = amplify(torch.where(anchor, d_sum, 0.0), x)
    own = (query_labels, _exponent(lse_negative, anchor), d_sum)
    other = own if key is None else (key_labels,)
    product = partial(
        gradient_of_selections,
        load=_load,
        weight=_weight,
        selections=query_labels.shape[0],
        each=lambda share: (share.stop - share.start,),
        numbers=(scale(temperature),),
        name="heavy_gradient",
    )
    d_query = d_key = query.new_empty(0)
    if need_query:
        d = product(x, y, own=own, other=other, options=(True, key is None))
        d_query = unpack(d, query, valid, normalize, 1 / temperature, unscale)
    if key is not None and y is not None and need_key:
        d = product(y, x, own=other, other=own, options=(False, True))
        d_key = unpack(d, key, key_valid, normalize, 1 / temperature, unscale)
    return d_query, d_key


def _exponent(lse_negative: Tensor, anchor: Tensor) -> Tensor:
    """n' of the anchors; what excluded rows hold must not matter."""
    return torch.where(anchor, lse_negative.float() * LOG2_E, 0.0)


@triton.jit
def folded(x):
    """[BM, BN] to [BM, 8]: products of every eighth column, which one thread holds in the layouts
    of tensor cores. A logarithm then serves BN / 8 pairs."""
    BM: tl.constexpr = x.shape[0]
    BN: tl.constexpr = x.shape[1]
    if BN > 8:
        left, right = tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))
        x = folded(left * right)
    return x


@triton.jit
def _start(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    SELECTIONS: tl.constexpr = OPTIONS[0]
    values = ()
    state = ()
    for k in tl.static_range(SELECTIONS):
        values = values + (vector(own[0], k, at, BM, True), vector(own[1], k, at, BM, True))
        zero = tl.zeros([BM], tl.float32)
        state = state + (zero, zero, zero)
    return values, state


@triton.jit
def _step(state, values, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    SELECTIONS: tl.constexpr = OPTIONS[0]
    BN: tl.constexpr = s.shape[1]
    s = s * numbers[0]
    new = ()
    for k in tl.static_range(SELECTIONS):
        labels, negative = values[2 * k], values[2 * k + 1]
        positive = labels[:, None] == vector(other[0], k, to, BN, EDGE)[None, :]
        if EDGE:
            positive = positive & inside
        u = tl.exp2(-tl.abs(s - negative[:, None]))
        share = tl.where(s > negative[:, None], u, 1.0) / (1.0 + u)
        largest = tl.where(positive, tl.maximum(s, negative[:, None]), 0.0)
        factors = folded(tl.where(positive, 1.0 + u, 1.0))
        # Thousands of tiles add up: the sum carries its rounding error along (Neumaier would need
        # a comparison; logs of one row have one size).
        total, carry = state[3 * k], state[3 * k + 1]
        term = tl.sum(largest, 1) + tl.sum(tl.log2(factors), 1) - carry
        raised = total + term
        tail = state[3 * k + 2] + tl.sum(tl.where(positive, share, 0.0), 1)
        new = new + (raised, (raised - total) - term, tail)
    return new


@triton.jit
def _finish(state, values, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    SELECTIONS: tl.constexpr = OPTIONS[0]
    for k in tl.static_range(SELECTIONS):
        anchor = vector(own[2], k, at, BM, True) != 0
        store(out[0], k, at, tl.where(anchor, state[3 * k] * LN2, 0.0), BM)
        store(out[1], k, at, tl.where(anchor, state[3 * k + 2], 0.0), BM)


# Gradient. OPTIONS = (selections, own part, streamed part)


@triton.jit
def _load(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    SELECTIONS: tl.constexpr = OPTIONS[0]
    values = ()
    for k in tl.static_range(SELECTIONS):
        values = values + (vector(own[0], k, at, BM, True),)
        if OPTIONS[1]:
            values = values + (vector(own[1], k, at, BM, True), vector(own[2], k, at, BM, True))
    return values


@triton.jit
def _weight(values, s, other, to, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    SELECTIONS: tl.constexpr = OPTIONS[0]
    EACH: tl.constexpr = 3 if OPTIONS[1] else 1
    BN: tl.constexpr = s.shape[1]
    s = s * numbers[0]
    weight = tl.zeros_like(s)
    for k in tl.static_range(SELECTIONS):
        w = tl.zeros_like(s)
        if OPTIONS[1]:
            w += values[EACH * k + 2][:, None] / (1.0 + tl.exp2(values[EACH * k + 1][:, None] - s))
        if OPTIONS[2]:
            negative = vector(other[1], k, to, BN, EDGE)[None, :]
            w += vector(other[2], k, to, BN, EDGE)[None, :] / (1.0 + tl.exp2(negative - s))
        positive = values[EACH * k][:, None] == vector(other[0], k, to, BN, EDGE)[None, :]
        weight += tl.where(positive, w, 0.0)
    return weight
