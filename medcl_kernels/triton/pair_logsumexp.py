"""`pair_logsumexp`: (L1) to (L4) of reference/pair_logsumexp.py.

Rows of unit length have |s| <= 1/t. While 2/t is at most a limit, exp(s - 1/t) neither
overflows nor loses the smallest terms, so no running maximum is needed, and one exponential per
pair serves all selections and, in self mode, both directions of the gradient. Colder or
unnormalised rows take a running maximum, and their gradient has the row's own lse in the exponent,
which is right for any size.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import LN2, gradient_of_selections, of_share, shares, statistics, store, vector
from .launch import operation
from .rows import Packed, pack_pair, unpack

LOG2_E = 1.4426950408889634
SHIFT_LIMIT = 80.0  # exp(-80) = 2e-35 is a normal float32
GRADIENT_LIMIT = 60.0  # g exp(1/t - lse) <= g exp(60) = 1e26 g leaves room for a loss scale in g
KINDS = {"all": 0, "same": 1, "different": 2}


@operation
def pair_logsumexp(
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    kinds: str,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
) -> Tensor:
    """(L1), `(S, B, L)` float32; see ops/pair_logsumexp.py."""
    x, y, valid, key_valid = pack_pair(
        query, key, query_labels, key_labels, ignore_index, normalize, across
    )
    codes = tuple(KINDS[kind] for kind in kinds.split(","))
    fixed = fixed_shift(temperature, normalize)
    lse = torch.empty(
        (len(codes), query.shape[0], query.shape[2]), dtype=torch.float32, device=query.device
    )
    own = (query_labels, weights(query_labels, ignore_index, fixed))
    other = own if key is None else (key_labels, weights(key_labels, ignore_index, fixed))
    for share in shares(len(codes)):
        asked = codes[share]
        statistics(
            "statistics" if len(asked) == 1 else "heavy",
            x,
            y,
            (_start, _step, _finish),
            own=of_share(own, share),
            other=of_share(other, share),
            out=(lse[share],),
            numbers=(scale(temperature),),
            options=(asked, fixed),
        )
    return lse


@operation
def pair_logsumexp_backward(
    d_lse: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    kinds: str,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """(L3), (L4), (P4), (P5): gradients in the layouts of query and key."""
    x, y, valid, key_valid = pack_pair(
        query, key, query_labels, key_labels, ignore_index, normalize, across
    )
    codes = tuple(KINDS[kind] for kind in kinds.split(","))
    # an excluded row that no selection has is zero and adds nothing: only where selections differ
    # in it must it be left out pair by pair
    differ = len(codes) > 1
    d_lse, unscale = amplify(d_lse, x)
    # in self mode, or for several selections, one exponential serves them all
    fixed = fixed_shift(temperature, normalize, GRADIENT_LIMIT) and (key is None or differ)
    anchors = _anchors(d_lse, lse, temperature, fixed)
    own = (query_labels, weights(query_labels, ignore_index, True) if differ else None, *anchors)
    other = own
    if key is not None:
        other = (key_labels, weights(key_labels, ignore_index, True) if differ else None)
    cold = not fixed_shift(temperature, normalize)
    product = partial(
        gradient_of_selections,
        load=_load,
        weight=_weight,
        selections=len(codes),
        each=lambda share: (codes[share],),
        numbers=(scale(temperature),),
        name="heavy_gradient" if differ else "gradient",
    )
    empty = query.new_empty(0)
    if key is None:
        d = product(x, None, own=own, other=own, options=(fixed, True, True, cold))
        return unpack(d, query, valid, normalize, 1 / temperature, unscale), empty
    d_query = d_key = empty
    if need_query:
        d = product(x, y, own=own, other=other, options=(fixed, True, False, cold))
        d_query = unpack(d, query, valid, normalize, 1 / temperature, unscale)
    if need_key:
        d = product(y, x, own=other, other=own, options=(fixed, False, True, cold))
        d_key = unpack(d, key, key_valid, normalize, 1 / temperature, unscale)
    return d_query, d_key


def scale(temperature: float) -> float:
    """Turns a product of rows into the exponent of 2."""
    return LOG2_E / temperature


def fixed_shift(temperature: float, normalize: bool, limit: float = SHIFT_LIMIT) -> bool:
    """Whether exp(s - 1/t) is safe for every pair of rows."""
    return normalize and 2 / temperature <= limit


def weights(labels: Tensor | None, ignore_index: int, fixed: bool) -> Tensor | None:
    """What a row multiplies an exponential with (1, or 0 if excluded), or adds to an exponent (0 or
    -inf) where a running maximum must not see the excluded; `(S, B, L)`."""
    if labels is None:
        return None
    valid = labels != ignore_index
    return valid.float() if fixed else torch.where(valid, 0.0, float("-inf"))


def amplify(d_out: Tensor, x: Packed) -> tuple[Tensor, Tensor | None]:
    """Upstream gradients that float16 weights can hold, and what undoes it.

    Weights of pairs are rounded to the rows' dtype before they are summed; with a mean over 10^5
    anchors they would vanish in float16. A power of two lifts the largest to 2^11 / S, so that
    2 S of them stay below 65504; it never leaves the device.
    """
    if x.rows.dtype != torch.float16:
        return d_out, None
    exponent = torch.frexp(d_out.abs().amax()).exponent - 11 + (d_out.shape[0] - 1).bit_length()
    return torch.ldexp(d_out, -exponent), torch.ldexp(torch.ones_like(d_out[0, 0, 0]), exponent)


def _anchors(d_lse: Tensor, lse: Tensor, temperature: float, fixed: bool) -> tuple[Tensor, ...]:
    """What gives an anchor's share of dL/ds: (g exp(1/t - lse),), or (lse log2 e, g)."""
    empty = lse == float("-inf")
    if fixed:
        return (torch.where(empty, 0.0, d_lse * torch.exp(1 / temperature - lse)),)
    log2 = torch.where(empty, float("inf"), lse * LOG2_E)
    return log2, torch.where(empty, 0.0, d_lse)


@triton.jit
def chosen(kind: tl.constexpr, e, y_own, y_other, REST: tl.constexpr):
    """e where the labels of row and column are what the selection asks for, else REST."""
    if kind == 1:
        return tl.where(y_own[:, None] == y_other[None, :], e, REST)
    else:
        return tl.where(y_own[:, None] != y_other[None, :], e, REST)


@triton.jit
def own_labels(labels, at, KINDS: tl.constexpr, BM: tl.constexpr):
    """The labels of the owned rows, one entry per selection, nothing where it does not ask."""
    result = ()
    for s in tl.static_range(len(KINDS)):
        if KINDS[s] == 0:
            result = result + (tl.zeros([1], tl.int32),)
        else:
            result = result + (vector(labels, s, at, BM, True),)
    return result


@triton.jit
def _start(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    KINDS: tl.constexpr = OPTIONS[0]
    state = ()
    for _k in tl.static_range(len(KINDS)):
        if not OPTIONS[1]:
            state = state + (tl.full([BM], float("-inf"), tl.float32),)
        state = state + (tl.zeros([BM], tl.float32),)
    return own_labels(own[0], at, KINDS, BM), state


@triton.jit
def _step(state, labels, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    KINDS: tl.constexpr = OPTIONS[0]
    BN: tl.constexpr = s.shape[1]
    c = numbers[0]
    new = ()
    if OPTIONS[1]:  # sums of exp(s - 1/t)
        e = tl.exp2(s * c - c)
        if EDGE:
            e = tl.where(inside, e, 0.0)
        for k in tl.static_range(len(KINDS)):
            p = e
            if KINDS[k] != 0:
                p = chosen(KINDS[k], e, labels[k], vector(other[0], k, to, BN, EDGE), 0.0)
            if other[1] is not None and KINDS[k] != 1:  # a label of its own is counted anyway
                p = p * vector(other[1], k, to, BN, EDGE)[None, :]
            new = new + (state[k] + tl.sum(p, 1),)
    else:  # running maxima and sums
        for k in tl.static_range(len(KINDS)):
            v = s * c
            if KINDS[k] != 0:
                v = chosen(KINDS[k], v, labels[k], vector(other[0], k, to, BN, EDGE), float("-inf"))
            if other[1] is not None and KINDS[k] != 1:
                v = v + vector(other[1], k, to, BN, EDGE)[None, :]
            if EDGE:
                v = tl.where(inside, v, float("-inf"))
            old, total = state[2 * k], state[2 * k + 1]
            top = tl.maximum(old, tl.max(v, 1))
            shift = tl.where(top == float("-inf"), 0.0, top)  # no candidate yet: no inf - inf
            total = total * tl.exp2(old - shift) + tl.sum(tl.exp2(v - shift[:, None]), 1)
            new = new + (top, total)
    return new


@triton.jit
def _finish(state, labels, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    for k in tl.static_range(len(OPTIONS[0])):
        if OPTIONS[1]:
            total = state[k]
            lse = tl.log2(total) + numbers[0]
        else:
            total = state[2 * k + 1]
            lse = tl.log2(total) + state[2 * k]
        lse = tl.where(total > 0, lse * LN2, float("-inf"))
        if own[1] is not None:
            counted = vector(own[1], k, at, BM, True)
            if OPTIONS[1]:
                lse = tl.where(counted > 0, lse, float("-inf"))
            else:
                lse = lse + counted
        store(out[0], k, at, lse, BM)


# Gradient. OPTIONS = (kinds, one exponential, own part, streamed part, clamp)


@triton.jit
def _load(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    KINDS: tl.constexpr = OPTIONS[0]
    anchors = ()
    counted = ()
    for k in tl.static_range(len(KINDS)):
        if OPTIONS[2]:
            anchors = anchors + (vector(own[2], k, at, BM, True),)
            if not OPTIONS[1]:
                anchors = anchors + (vector(own[3], k, at, BM, True),)
        if own[1] is not None:
            counted = counted + (vector(own[1], k, at, BM, True),)
    return own_labels(own[0], at, KINDS, BM), anchors, counted


@triton.jit
def _weight(values, s, other, to, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    KINDS: tl.constexpr = OPTIONS[0]
    ONE: tl.constexpr = OPTIONS[1]
    OWN: tl.constexpr = OPTIONS[2]
    STREAMED: tl.constexpr = OPTIONS[3]
    BN: tl.constexpr = s.shape[1]
    labels, anchors, counted = values
    c = numbers[0]
    weight = tl.zeros_like(s)
    for k in tl.static_range(len(KINDS)):
        w = tl.zeros_like(s)
        if ONE:
            if OWN:
                w += anchors[k][:, None]
            if STREAMED:
                w += vector(other[2], k, to, BN, EDGE)[None, :]
        else:
            if OWN:
                x = s * c - anchors[2 * k][:, None]
                if OPTIONS[4]:
                    x = tl.minimum(x, 0.0)
                w += tl.exp2(x) * anchors[2 * k + 1][:, None]
            if STREAMED:
                x = s * c - vector(other[2], k, to, BN, EDGE)[None, :]
                if OPTIONS[4]:
                    x = tl.minimum(x, 0.0)
                w += tl.exp2(x) * vector(other[3], k, to, BN, EDGE)[None, :]
        if len(counted) > 0 and KINDS[k] != 1:
            w = w * counted[k][:, None] * vector(other[1], k, to, BN, EDGE)[None, :]
        if KINDS[k] != 0:
            w = chosen(KINDS[k], w, labels[k], vector(other[0], k, to, BN, EDGE), 0.0)
        weight += w
    if ONE:
        weight = weight * tl.exp2(s * c - c)
    return weight
