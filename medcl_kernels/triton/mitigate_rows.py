"""`mitigate_rows`: (T1) to (T4) of reference/mitigate_rows.py in Gram form.

A program owns a block of rows of one image. It reads the M gradients once for the Gram matrix of
every row, solves that M x M problem in registers, and reads them a second time, while they are in
its cache, for the weighted sum. One vector of all rows takes three launches: partial Gram matrices,
added in a fixed order; one program that solves; the weighted sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, operation
from .rows import strided

EPS = tl.constexpr(1e-12)  # of squared norms
ROUNDS = tl.constexpr(64)  # of (T4) over all pairs of coordinates
MOST = 8  # perspectives
ROWS = 32  # of a program
# perspectives up to -> channels at a time, warps: each of the M (M + 1) / 2 sums takes a register
# for every row that a thread loads
TILES = {4: (32, 4), 8: (16, 8)}
PLACES = 20  # perspectives, three bits each, in a number of 64 bits


@operation
def mitigate_rows(
    gradients: Tensor,
    order: Tensor,
    method: str,
    unit: str,
    reduction: str,
    strength: float,
    rows_first: bool,
) -> Tensor:
    """`(B, D, L)`, with `rows_first` as `(B, L, D)`; see ops/mitigate_rows.py."""
    perspectives, batch, channels, length = gradients.shape
    if not 1 <= perspectives <= MOST:
        raise ValueError(f"mitigate_rows takes 1 to {MOST} gradients, got {perspectives}")
    if order.device != gradients.device:
        order = order_on(gradients.device, order)
    shape = (batch, length, channels) if rows_first else (batch, channels, length)
    out = gradients.new_empty(shape)
    to = out.transpose(1, 2) if rows_first else out
    factor = float(perspectives) if reduction == "sum" else 1.0
    if method == "consensus":
        _launch("consensus", gradients, order, to, None, None, factor, strength, method)
    elif method in ("mean", "sum") or perspectives == 1:
        total = method == "sum" or (method != "mean" and reduction == "sum")
        share = 1.0 if total else 1.0 / perspectives
        weights = gradients.new_full((perspectives,), share, dtype=torch.float32)
        _launch("combine", gradients, order, to, None, weights, 1.0, strength, method)
    elif unit == "row":
        _launch("row", gradients, order, to, None, None, factor, strength, method)
    else:
        wide = triton.next_power_of_2(perspectives)
        parts = batch * triton.cdiv(length, ROWS)
        part = torch.empty((parts, wide, wide), dtype=torch.float32, device=out.device)
        weights = torch.empty(wide, dtype=torch.float32, device=out.device)
        _launch("gram", gradients, order, to, part, None, factor, strength, method)
        launch(
            solve_kernel,
            1,
            {
                "gram": part.double().sum(0).float(),
                "order": order,
                "weights": weights,
                "factor": factor,
                "strength": strength,
            },
            {"PCGRAD": method == "pcgrad", "M": perspectives, "WIDE": wide},
            warps=1,
        )
        _launch("combine", gradients, order, to, None, weights, factor, strength, method)
    return out


def order_on(device: torch.device, order: Tensor) -> Tensor:
    """An order drawn on the CPU, where kernels can read it. It travels as numbers in launches: a
    copy from the host would wait for the device, and a CUDA graph could not hold it."""
    listed = order.flatten().tolist()
    shift = 3 * torch.arange(PLACES, device=device)
    parts = []
    for first in range(0, len(listed), PLACES):
        number = sum(one << 3 * e for e, one in enumerate(listed[first : first + PLACES]))
        parts.append(torch.bitwise_right_shift(number, shift) & 7)
    table = torch.cat(parts) if parts else shift  # of one perspective nothing is left
    return table[: len(listed)].view(order.shape)


def _launch(
    stage: str,
    gradients: Tensor,
    order: Tensor,
    out: Tensor,
    part: Tensor | None,
    weights: Tensor | None,
    factor: float,
    strength: float,
    method: str,
) -> None:
    """One launch over blocks of rows; `out` is `(B, D, L)` of any strides."""
    perspectives, batch, channels, length = gradients.shape
    blocks = triton.cdiv(length, ROWS)
    at_a_time, warps = TILES[4 if perspectives <= 4 else 8]
    launch(
        mitigate_kernel,
        batch * blocks,
        {
            "x": gradients,
            "order": order,
            "out": out,
            "part": part,
            "weights": weights,
            "factor": factor,
            "strength": strength,
            "length": length,
            "blocks": blocks,
            "channels": channels,
            "stack": gradients.stride(0),
            "strides": gradients.stride()[1:],
            "out_strides": out.stride(),
        },
        {
            "STAGE": stage,
            "PCGRAD": method == "pcgrad",
            "M": perspectives,
            "WIDE": triton.next_power_of_2(perspectives),
            "ROWS": ROWS,
            "CHANNELS": min(at_a_time, triton.next_power_of_2(channels)),
        },
        warps,
    )


@triton.jit
def _gradients(x, stack, where, mask, M: tl.constexpr):
    """A tile of every perspective, float32."""
    result = ()
    for m in tl.static_range(M):
        tile = tl.load(x + m * tl.cast(stack, tl.int64) + where, mask=mask, other=0.0)
        result = result + (tile.to(tl.float32),)
    return result


@triton.jit
def _pick(v, index, WIDE: tl.constexpr):
    """v[:, index] of `(ROWS, WIDE)`."""
    return tl.sum(tl.where(tl.arange(0, WIDE)[None, :] == index, v, 0.0), 1)


@triton.jit
def _column(gram, index, WIDE: tl.constexpr):
    """gram[:, :, index] of `(ROWS, WIDE, WIDE)`."""
    return tl.sum(tl.where(tl.arange(0, WIDE)[None, None, :] == index, gram, 0.0), 2)


@triton.jit
def _one(index, WIDE: tl.constexpr):
    """Row `index` of the unit matrix, `(1, WIDE)`."""
    return tl.where(tl.arange(0, WIDE)[None, :] == index, 1.0, 0.0)


@triton.jit
def _project(gram, order, M: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """(T2)."""
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for a in range(0, M):
        c = tl.zeros([ROWS, WIDE], tl.float32) + _one(a, WIDE)
        for k in range(0, M - 1):
            b = tl.load(order + a * (M - 1) + k).to(tl.int32)
            column = _column(gram, b, WIDE)
            q = tl.sum(c * column, 1)
            norm = _pick(column, b, WIDE)
            share = tl.where((q < 0) & (norm > EPS), q / (norm + EPS), 0.0)
            c -= share[:, None] * _one(b, WIDE)
        total += c
    return total / M


@triton.jit
def _times(gram, v):
    """K v of every row."""
    return tl.sum(gram * v[:, None, :], 2)


@triton.jit
def _compromise(gram, strength, M: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """(T3) by rounds of (T4)."""
    there = tl.where(tl.arange(0, WIDE)[None, :] < M, 1.0 / M, 0.0)
    plain = tl.zeros([ROWS, WIDE], tl.float32) + there
    towards = _times(gram, plain)
    phi = strength * tl.sqrt(tl.maximum(tl.sum(towards * plain, 1), 0.0))
    v = plain
    rounds: tl.constexpr = 1 if M == 2 else ROUNDS
    for _round in range(0, rounds):
        for a in range(1, M):
            for b in range(0, a):
                kv = _times(gram, v)
                A = tl.sum(kv * v, 1)
                B = _pick(kv, a, WIDE) - _pick(kv, b, WIDE)
                left, right = _column(gram, a, WIDE), _column(gram, b, WIDE)
                C = _pick(left, a, WIDE) - 2 * _pick(left, b, WIDE) + _pick(right, b, WIDE)
                slope = _pick(towards, a, WIDE) - _pick(towards, b, WIDE)
                steep = phi * phi * C - slope * slope
                inside = tl.maximum(A * C - B * B, 0.0) / tl.where(steep > 0, steep, 1.0)
                flat = C <= EPS
                x = (-slope * tl.sqrt(inside) - B) / tl.where(flat, 1.0, C)
                end = tl.where(slope > 0, -1.0, tl.where(slope < 0, 1.0, 0.0))
                x = tl.where(steep > 0, x, end)
                x = tl.minimum(tl.maximum(x, -_pick(v, a, WIDE)), _pick(v, b, WIDE))
                x = tl.where(flat, 0.0, x)
                v += x[:, None] * (_one(a, WIDE) - _one(b, WIDE))
    size = tl.sum(_times(gram, v) * v, 1)
    share = tl.where(size > EPS, phi / tl.sqrt(tl.maximum(size, EPS)), 0.0)
    return plain + share[:, None] * v


@triton.jit
def _solve(
    gram,
    order,
    strength,
    PCGRAD: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weights `(ROWS, WIDE)` of the mean."""
    if PCGRAD:
        return _project(gram, order, M, WIDE, ROWS)
    else:
        return _compromise(gram, strength, M, WIDE, ROWS)


@triton.jit
def _consensus(tiles, M: tl.constexpr):
    """The mean of the M numbers, 0 where one has the opposite sign of another."""
    total = tiles[0]
    low, high = tiles[0], tiles[0]
    for m in tl.static_range(1, M):
        total += tiles[m]
        low, high = tl.minimum(low, tiles[m]), tl.maximum(high, tiles[m])
    return tl.where((low < 0) & (high > 0), 0.0, total / M)


@triton.jit(do_not_specialize=["length", "blocks", "channels"])
def mitigate_kernel(
    x,  # (M, B, D, L)
    order,  # (M, M - 1) int64
    out,  # (B, D, L)
    part,  # (programs, WIDE, WIDE) float32, for "gram"
    weights,  # (M,) float32, for "combine"
    factor,
    strength,
    length,
    blocks,
    channels,
    stack,  # stride of perspectives
    strides,
    out_strides,
    STAGE: tl.constexpr,  # "row", "gram", "combine" or "consensus"
    PCGRAD: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    x += image * strides[0]
    out += image * out_strides[0]
    if STAGE == "row" or STAGE == "gram":
        sums = ()
        for _pair in tl.static_range(M * (M + 1) // 2):
            sums = sums + (tl.zeros([ROWS], tl.float32),)
        for channel in range(0, channels, CHANNELS):
            d = channel + tl.arange(0, CHANNELS)
            mask = (r < length)[:, None] & (d < channels)[None, :]
            tiles = _gradients(x, stack, strided(strides, r, d), mask, M)
            new = ()
            for a in tl.static_range(M):
                for b in tl.static_range(a + 1):
                    new = new + (sums[a * (a + 1) // 2 + b] + tl.sum(tiles[a] * tiles[b], 1),)
            sums = new
        i, j = tl.arange(0, WIDE)[None, :, None], tl.arange(0, WIDE)[None, None, :]
        gram = tl.zeros([ROWS, WIDE, WIDE], tl.float32)
        for a in tl.static_range(M):
            for b in tl.static_range(a + 1):
                here = ((i == a) & (j == b)) | ((i == b) & (j == a))
                gram = tl.where(here, sums[a * (a + 1) // 2 + b][:, None, None], gram)
        if STAGE == "gram":
            place = tl.arange(0, WIDE)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
            tl.store(part + tl.program_id(0).to(tl.int64) * WIDE * WIDE + place, tl.sum(gram, 0))
        else:
            own = _solve(gram, order, strength, PCGRAD, M, WIDE, ROWS) * factor
    if STAGE != "gram":
        for channel in range(0, channels, CHANNELS):
            d = channel + tl.arange(0, CHANNELS)
            mask = (r < length)[:, None] & (d < channels)[None, :]
            tiles = _gradients(x, stack, strided(strides, r, d), mask, M)
            if STAGE == "consensus":
                total = _consensus(tiles, M) * factor
            else:
                total = tl.zeros([ROWS, CHANNELS], tl.float32)
                for m in tl.static_range(M):
                    if STAGE == "row":
                        total += _pick(own, m, WIDE)[:, None] * tiles[m]
                    else:
                        total += tl.load(weights + m) * tiles[m]
            where = out + strided(out_strides, r, d)
            tl.store(where, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def solve_kernel(
    gram,  # (WIDE, WIDE) float32
    order,
    weights,  # (WIDE,) float32
    factor,
    strength,
    PCGRAD: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One small problem, one program."""
    i, j = tl.arange(0, WIDE)[:, None], tl.arange(0, WIDE)[None, :]
    whole = tl.load(gram + i * WIDE + j)[None, :, :]
    own = _solve(whole, order, strength, PCGRAD, M, WIDE, 1) * factor
    tl.store(weights + tl.arange(0, WIDE), tl.sum(own, 0))
