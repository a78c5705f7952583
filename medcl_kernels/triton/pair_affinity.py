"""`pair_affinity`: (D1) to (D5) of reference/pair_affinity.py; patch sizes share a tile by threes.

In self mode with the affinity form and the constant shift, no exponent of unit rows is positive and
that of a row with itself is 0: sums neither overflow nor vanish, at any temperature. Elsewhere they
are safe while the largest exponent is within a limit; other calls (cold, raw rows, a shift that is
known on the device only) take a running maximum, and two exponentials on the way back. Ratios are
taken to be class shares: D is at most 1 for one class and 2 for more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.pair_affinity import FORMS
from .engine import LN2, gradient_of_selections, of_share, shares, statistics, store, vector
from .launch import operation
from .pair_logsumexp import GRADIENT_LIMIT, LOG2_E, SHIFT_LIMIT, amplify, scale
from .rows import Packed, pack_pair, unpack

UNROLLED = tl.constexpr(8)  # classes up to which shares of the owned rows stay in registers


@operation
def pair_affinity(
    query: Tensor,
    key: Tensor | None,
    query_ratios: Tensor,
    key_ratios: Tensor | None,
    shift: Tensor | None,
    form: str,
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """(D2) and (D3), both `(P, B, N)` float32; see ops/pair_affinity.py."""
    sides = _Sides(query, key, query_ratios, key_ratios, shift, form, temperature, normalize)
    shape = (sides.patches, query.shape[0], query.shape[2])
    log_z = torch.empty(shape, dtype=torch.float32, device=query.device)
    linear = torch.empty_like(log_z)
    for share in shares(sides.patches):
        statistics(
            sides.table(share),
            sides.x,
            sides.y,
            (_start, _step, _finish),
            own=of_share((sides.own_ratios,), share),
            other=of_share((sides.other_ratios, sides.shift), share),
            out=(log_z[share], linear[share]),
            numbers=sides.numbers,
            options=(*sides.options(share), sides.bounded(SHIFT_LIMIT)),
        )
    return log_z, linear


@operation
def pair_affinity_backward(
    d_log_z: Tensor,
    d_linear: Tensor,
    log_z: Tensor,
    query: Tensor,
    key: Tensor | None,
    query_ratios: Tensor,
    key_ratios: Tensor | None,
    shift: Tensor | None,
    form: str,
    temperature: float,
    normalize: bool,
    need_query: bool,
    need_key: bool,
    need_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(D4), (P4), (P5): gradients in the layouts of query and key; (D5)."""
    sides = _Sides(query, key, query_ratios, key_ratios, shift, form, temperature, normalize)
    terms, unscale = amplify(torch.stack((d_log_z, d_linear), 1).flatten(0, 1), sides.x)
    terms = terms.unflatten(0, (sides.patches, 2))
    one = key is None and sides.bounded(GRADIENT_LIMIT)
    if one:  # an exponential serves both directions
        terms[:, 0] *= torch.exp(-log_z)
    own = (sides.own_ratios, sides.shift, terms, None if one else log_z * LOG2_E)
    other = own if key is None else (sides.other_ratios, sides.shift)
    d_query = d_key = query.new_empty(0)
    d_shift = log_z.new_zeros(())
    x, y = sides.x, sides.y
    product = partial(
        gradient_of_selections,
        load=_load,
        weight=_weight,
        selections=sides.patches,
        each=sides.options,
        numbers=sides.numbers,
        name="heavy_gradient",
    )
    if need_query:
        d = product(x, y, own=own, other=other, options=(one, True, key is None))
        d_query = unpack(d, query, None, normalize, 1 / temperature, unscale)
    if key is not None and need_key:
        d = product(y, x, own=other, other=own, options=(one, False, True))
        d_key = unpack(d, key, None, normalize, 1 / temperature, unscale)
    if need_shift:
        several = list(shares(sides.patches))
        shape = (len(several), *log_z.shape[1:])
        sums = torch.empty(shape, dtype=torch.float32, device=query.device)
        for out, share in zip(sums, several, strict=True):
            statistics(
                sides.table(share),
                x,
                y,
                (_start_sum, _step_sum, _finish_sum),
                own=of_share(own, share),
                other=of_share(other, share),
                out=(out,),
                numbers=sides.numbers,
                options=(*sides.options(share), one, True, False),
            )
        total = -sums.sum(dtype=torch.float64).float()
        d_shift = total if unscale is None else total * unscale
    return d_query, d_key, d_shift


class _Sides:
    """Packed rows and their class shares `(P, K, B, rows)`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        query_ratios: Tensor,
        key_ratios: Tensor | None,
        shift: Tensor | None,
        form: str,
        temperature: float,
        normalize: bool,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {form!r}")
        self.patches, _, self.classes, _ = query_ratios.shape
        x, y, _, _ = pack_pair(query, key, None, None, -1, normalize, False)
        self.x: Packed = x
        self.y: Packed = x if y is None else y  # a row is a candidate of its own
        self.own_ratios = self._vectors(query_ratios, self.x)
        self.other_ratios = self.own_ratios
        if key is not None and key_ratios is not None:
            self.other_ratios = self._vectors(key_ratios, self.y)
        elif key is not None or key_ratios is not None:
            raise ValueError("a key and its ratios come together")
        self.shift = None if shift is None else shift.float() * LOG2_E
        self.numbers = (scale(temperature),)
        self.swapped = form == "release2d"
        self.one_tensor, self.normalize, self.temperature = key is None, normalize, temperature

    def table(self, share: slice) -> str:
        """One weighting of one class is no more work per pair than a log-sum-exp."""
        alone = (share.stop - share.start) * self.classes == 1
        return "statistics" if alone else "heavy"

    def options(self, share: slice) -> tuple[Any, ...]:
        """(patch sizes, classes, swapped, shifted)."""
        return share.stop - share.start, self.classes, self.swapped, self.shift is not None

    def _vectors(self, ratios: Tensor, rows: Packed) -> Tensor:
        wanted = (self.patches, rows.problems, self.classes, rows.count)
        if ratios.shape != wanted or ratios.dtype != torch.float32:
            raise ValueError(
                f"ratios must be float32 {wanted}; got {ratios.dtype} {tuple(ratios.shape)}"
            )
        return ratios.transpose(1, 2).contiguous()

    def bounded(self, limit: float) -> bool:
        """Whether plain sums of exp(Q t) neither overflow nor vanish."""
        if not self.normalize or self.shift is not None:
            return False
        if self.one_tensor and not self.swapped:
            return True
        largest = 1 if self.swapped or self.classes == 1 else 2  # |Q|
        return largest * 2 / self.temperature <= limit


@triton.jit
def class_shares(ratios, at, PATCHES: tl.constexpr, CLASSES: tl.constexpr, BM: tl.constexpr):
    """The class shares of the owned rows; nothing where there are too many to hold."""
    result = ()
    if CLASSES <= UNROLLED:
        for s in tl.static_range(PATCHES * CLASSES):
            result = result + (vector(ratios, s, at, BM, True),)
    return result, ratios, at


@triton.jit
def shift_of(shift, numbers, SHIFTED: tl.constexpr):
    """m of (D1) in base 2: 1/t, or what the device knows."""
    if SHIFTED:
        return tl.load(shift)
    else:
        return numbers[0]


@triton.jit
def divergence(s, own, ratios, p: tl.constexpr, to, CLASSES: tl.constexpr, EDGE: tl.constexpr):
    """D of (D1) for one patch size."""
    BM: tl.constexpr = s.shape[0]
    BN: tl.constexpr = s.shape[1]
    held, own_ratios, at = own
    d = tl.zeros_like(s)
    if CLASSES <= UNROLLED:
        for k in tl.static_range(CLASSES):
            q = vector(ratios, p * CLASSES + k, to, BN, EDGE)
            d += tl.abs(held[p * CLASSES + k][:, None] - q[None, :])
    else:
        for k in range(0, CLASSES):
            r = vector(own_ratios, p * CLASSES + k, at, BM, True)
            q = vector(ratios, p * CLASSES + k, to, BN, EDGE)
            d += tl.abs(r[:, None] - q[None, :])
    return d


# Statistics. OPTIONS = (patch sizes, classes, swapped, shifted, bounded)


@triton.jit
def _start(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    PATCHES: tl.constexpr = OPTIONS[0]
    zero = tl.zeros([BM], tl.float32)
    state = ()
    for _p in tl.static_range(PATCHES):
        if not OPTIONS[4]:
            state = state + (tl.full([BM], float("-inf"), tl.float32),)
        state = state + (zero, zero, zero)
    return class_shares(own[0], at, PATCHES, OPTIONS[1], BM), state


@triton.jit
def _step(state, values, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    PATCHES: tl.constexpr = OPTIONS[0]
    EACH: tl.constexpr = 3 if OPTIONS[4] else 4
    t = s * numbers[0] - shift_of(other[1], numbers, OPTIONS[3])
    new = ()
    for p in tl.static_range(PATCHES):
        weighted = divergence(s, values, other[0], p, to, OPTIONS[1], EDGE) * t
        if OPTIONS[2]:
            exponent, term = t - weighted, weighted
        else:
            exponent, term = weighted, t - weighted
        if EDGE:
            exponent = tl.where(inside, exponent, float("-inf"))
            term = tl.where(inside, term, 0.0)
        total = state[EACH * p + EACH - 3]
        if not OPTIONS[4]:
            old = state[EACH * p]
            top = tl.maximum(old, tl.max(exponent, 1))
            shift = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp2(old - shift)
            exponent = exponent - shift[:, None]
            new = new + (top,)
        # Thousands of tiles add up: the linear sum carries its rounding error along
        linear, carry = state[EACH * p + EACH - 2], state[EACH * p + EACH - 1]
        part = tl.sum(term, 1) - carry
        raised = linear + part
        new = new + (total + tl.sum(tl.exp2(exponent), 1), raised, (raised - linear) - part)
    return new


@triton.jit
def _finish(state, values, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    PATCHES: tl.constexpr = OPTIONS[0]
    EACH: tl.constexpr = 3 if OPTIONS[4] else 4
    for p in tl.static_range(PATCHES):
        log_z = tl.log2(state[EACH * p + EACH - 3])
        if not OPTIONS[4]:
            log_z += state[EACH * p]
        store(out[0], p, at, log_z * LN2, BM)
        store(out[1], p, at, state[EACH * p + EACH - 2] * LN2, BM)


# Gradient. OPTIONS = (patch sizes, classes, swapped, shifted, one exponential, own part, streamed
# part); vectors are (ratios, shift, terms, log_z in base 2), terms those of log_z and of linear.
# The shift, which may be None, is no part of the values: Triton 3.6 compiles no function that
# returns None.


@triton.jit
def _load(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    PATCHES: tl.constexpr = OPTIONS[0]
    anchors = ()
    if OPTIONS[5]:
        for p in tl.static_range(PATCHES):
            anchors = anchors + (
                vector(own[2], 2 * p, at, BM, True),
                vector(own[2], 2 * p + 1, at, BM, True),
            )
            if not OPTIONS[4]:
                anchors = anchors + (vector(own[3], p, at, BM, True),)
    return class_shares(own[0], at, PATCHES, OPTIONS[1], BM), anchors


@triton.jit
def _weight(values, s, other, to, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    PATCHES: tl.constexpr = OPTIONS[0]
    ONE: tl.constexpr = OPTIONS[4]
    OWN: tl.constexpr = OPTIONS[5]
    STREAMED: tl.constexpr = OPTIONS[6]
    EACH: tl.constexpr = 2 if ONE else 3
    BN: tl.constexpr = s.shape[1]
    own, anchors = values
    t = s * numbers[0] - shift_of(other[1], numbers, OPTIONS[3])
    weight = tl.zeros_like(s)
    for p in tl.static_range(PATCHES):
        q = divergence(s, own, other[0], p, to, OPTIONS[1], EDGE)
        r = 1.0 - q
        if OPTIONS[2]:
            q, r = r, q
        x = q * t
        g = tl.zeros_like(s)  # what multiplies Q, and with one exponential 2^x
        h = tl.zeros_like(s)
        if OWN:
            part = anchors[EACH * p][:, None]
            g += part if ONE else part * tl.exp2(x - anchors[EACH * p + 2][:, None])
            h += anchors[EACH * p + 1][:, None]
        if STREAMED:
            part = vector(other[2], 2 * p, to, BN, EDGE)[None, :]
            g += part if ONE else part * tl.exp2(x - vector(other[3], p, to, BN, EDGE)[None, :])
            h += vector(other[2], 2 * p + 1, to, BN, EDGE)[None, :]
        if ONE:
            g *= tl.exp2(x)
        weight += g * q + h * r
    return weight


@triton.jit
def _start_sum(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    return _load(own, at, OPTIONS, BM), (tl.zeros([BM], tl.float32),)


@triton.jit
def _step_sum(
    state, values, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr
):
    w = _weight(values, s, other, to, numbers, OPTIONS, EDGE)
    if EDGE:
        w = tl.where(inside, w, 0.0)
    return (state[0] + tl.sum(w, 1),)


@triton.jit
def _finish_sum(state, values, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    store(out[0], 0, at, state[0], BM)
