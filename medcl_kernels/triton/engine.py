"""The tile engine: every kernel over pairs is one of the two kernels below.

A program owns BM rows of x, streams tiles of BN rows of y and multiplies. What is then done with a
tile of similarities comes as a `@triton.jit` function in a compile-time parameter:

    start(own, at, OPTIONS)                                -> (values of the owned rows, state)
    step(state, values, s, other, to, inside, numbers, OPTIONS, EDGE)    -> state
    finish(state, values, out, at, own, numbers, OPTIONS, BM)              stores

for row statistics, and for gradients

    load(own, at, OPTIONS)                                 -> values of the owned rows
    weight(values, s, other, to, numbers, OPTIONS, EDGE)   -> dL/ds, summed as weight @ y

Tiles that the diagonal or the ragged end crosses are peeled into a second loop (EDGE), so that the
main loop has no mask. Every output is owned by one program and sums run in a fixed order: the same
input gives the same bits. Row offsets are 64 bits wide, offsets within a tile 32.

Vectors that accompany rows are `(S, G, rows)`, S selections of G problems. `at` and `to` say which
part of them a tile needs: (problem's first row, rows of all problems, tile's first row, rows of the
problem). Problems of equal size share one launch, their tiles side by side; of the selections, any
number, every launch takes a share that registers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, choose
from .launch import launch
from .rows import Packed

LN2 = tl.constexpr(0.6931471805599453)
AT_ONCE = 3  # selections (label maps, patch sizes) of one launch; CUDA C++ has the same limit


def shares(selections: int) -> Iterator[slice]:
    """Which selections each launch takes, in order."""
    for first in range(0, selections, AT_ONCE):
        yield slice(first, min(first + AT_ONCE, selections))


def of_share(vectors: tuple[Tensor | None, ...], share: slice) -> tuple[Tensor | None, ...]:
    """The vectors of one launch; scalars, which have no selections, are in all of them."""
    return tuple(one if one is None or one.dim() == 0 else one[share] for one in vectors)


@triton.jit
def tile(
    rows,
    first,
    count,
    channel,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """[ROWS, CHANNELS] of packed rows; with EDGE, rows from `count` on are zero."""
    r = tl.arange(0, ROWS)
    d = tl.arange(0, CHANNELS)
    where = rows + first * tl.cast(WIDTH, tl.int64) + channel + (r[:, None] * WIDTH + d[None, :])
    if EDGE:
        return tl.load(where, mask=(first + r < count)[:, None], other=0.0)
    else:
        return tl.load(where)


@triton.jit
def vector(pointer, selection, at, SIZE: tl.constexpr, EDGE: tl.constexpr, OTHER: tl.constexpr = 0):
    """[SIZE] values that accompany the rows of a tile; with EDGE, `OTHER` beyond the last row."""
    base, total, first, count = at
    r = tl.arange(0, SIZE)
    where = pointer + (base + selection * total + first) + r
    if EDGE:
        return tl.load(where, mask=first + r < count, other=OTHER)
    else:
        return tl.load(where)


@triton.jit
def store(pointer, selection, at, value, SIZE: tl.constexpr):
    """The reverse of `vector`."""
    base, total, first, count = at
    r = tl.arange(0, SIZE)
    tl.store(pointer + (base + selection * total + first) + r, value, mask=first + r < count)


@triton.jit
def plan(
    i0, m, BM: tl.constexpr, BN: tl.constexpr, SELF: tl.constexpr, ORDERED: tl.constexpr = False
):
    """Tiles without a mask and with one: (full, first diagonal, diagonals, main, edge). Ordered:
    none is without, so that all come in the order of their rows."""
    full = m // BN
    ragged = tl.where(m % BN != 0, 1, 0)
    if ORDERED:
        first = 0
        diagonals = full
    elif SELF:
        crossing: tl.constexpr = (BM + BN - 1) // BN
        first = i0 // BN
        diagonals = tl.minimum(tl.maximum(full - first, 0), crossing)
    else:
        first = full
        diagonals = 0
    return full, first, diagonals, full - diagonals, diagonals + ragged


@triton.jit
def product(
    own,
    x,
    y,
    i0,
    n,
    j0,
    m,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Similarities [BM, BN] of two tiles, and the streamed tile where its rows are whole."""
    if CHANNELS == WIDTH:
        other = tile(y, j0, m, 0, WIDTH, BN, WIDTH, EDGE)
        return tl.dot(own, tl.trans(other), input_precision=PRECISION), other
    else:
        s = tl.zeros([BM, BN], tl.float32)
        for channel in range(0, WIDTH, CHANNELS):
            left = tile(x, i0, n, channel, WIDTH, BM, CHANNELS, True)
            right = tile(y, j0, m, channel, WIDTH, BN, CHANNELS, EDGE)
            s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
        return s, own


@triton.jit
def pairs_inside(i0, j0, m, BM: tl.constexpr, BN: tl.constexpr, SELF: tl.constexpr):
    """Which pairs of an edge tile exist."""
    j = j0 + tl.arange(0, BN)
    inside = (j < m)[None, :]
    if SELF:
        i = i0 + tl.arange(0, BM)
        inside = inside & (i[:, None] != j[None, :])
    return inside


@triton.jit(do_not_specialize=["n", "m", "tiles"])
def statistics_kernel(
    x,  # (G, n, WIDTH)
    y,  # (G, m, WIDTH)
    own,  # vectors (S, G, n) or None
    other,  # vectors (S, G, m) or None
    out,  # vectors (S, G, n)
    numbers,  # float32
    active,  # (1, G, n) int32 or None
    n,
    m,
    tiles,  # of one problem
    START: tl.constexpr,
    STEP: tl.constexpr,
    FINISH: tl.constexpr,
    OPTIONS: tl.constexpr,
    ORDERED: tl.constexpr,
    SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Statistics of every row of x over the rows of y."""
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    problems = tl.num_programs(0) // tiles
    i0 = (tl.program_id(0) % tiles) * BM
    x += problem * n * WIDTH
    y += problem * m * WIDTH
    at = (problem * n, tl.cast(n, tl.int64) * problems, i0, n)
    base, total = problem * m, tl.cast(m, tl.int64) * problems
    rows = tile(x, i0, n, 0, WIDTH, BM, CHANNELS, True)
    values, state = START(own, at, OPTIONS, BM)
    full, first, diagonals, main, edge = plan(i0, m, BM, BN, SELF, ORDERED)
    if active is not None:
        some = tl.max(vector(active, 0, at, BM, True), 0)
        main, edge = tl.where(some > 0, main, 0), tl.where(some > 0, edge, 0)
    for t in range(0, main):
        j0 = tl.where(t >= first, t + diagonals, t) * BN
        s, _ = product(rows, x, y, i0, n, j0, m, WIDTH, CHANNELS, BM, BN, False, PRECISION)
        state = STEP(state, values, s, other, (base, total, j0, m), None, numbers, OPTIONS, False)
    for t in range(0, edge):
        j0 = tl.where(t < diagonals, first + t, full) * BN
        s, _ = product(rows, x, y, i0, n, j0, m, WIDTH, CHANNELS, BM, BN, True, PRECISION)
        inside = pairs_inside(i0, j0, m, BM, BN, SELF)
        state = STEP(state, values, s, other, (base, total, j0, m), inside, numbers, OPTIONS, True)
    FINISH(state, values, out, at, own, numbers, OPTIONS, BM)


@triton.jit
def add_weighted(
    sums,
    weights,
    streamed,
    y,
    j0,
    m,
    channel,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUT: tl.constexpr,
    BN: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums + weights @ y; the rows of y are at hand where one program owns all channels."""
    if OUTPUT == WIDTH and CHANNELS == WIDTH:
        other = streamed
    else:
        other = tile(y, j0, m, channel, WIDTH, BN, OUTPUT, EDGE)
    if PRECISION == "tf32":  # tensor cores cut what does not fit: round, for unbiased sums
        bits = weights.to(tl.int32, bitcast=True) + 0x1000
        weights = (bits & ~0x1FFF).to(tl.float32, bitcast=True)
    if other.dtype == tl.float16:  # excluded rows are zero, but inf * 0 would not be
        weights = tl.clamp(weights, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.dot(weights.to(other.dtype), other, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n", "m", "tiles"])
def gradient_kernel(
    x,  # (G, n, WIDTH)
    y,  # (G, m, WIDTH)
    own,  # vectors (S, G, n) or None
    other,  # vectors (S, G, m) or None
    out,  # (G, n, WIDTH) float32
    numbers,  # float32
    n,
    m,
    tiles,  # of one problem
    LOAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    OPTIONS: tl.constexpr,
    SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """For every row of x the sum of the rows of y, weighted by what `WEIGHT` makes of s."""
    chunks: tl.constexpr = WIDTH // OUTPUT
    channel = (tl.program_id(0) % chunks) * OUTPUT
    program = tl.program_id(0) // chunks
    problem = (program // tiles).to(tl.int64)
    problems = tl.num_programs(0) // chunks // tiles
    i0 = (program % tiles) * BM
    x += problem * n * WIDTH
    y += problem * m * WIDTH
    out += problem * n * WIDTH
    at = (problem * n, tl.cast(n, tl.int64) * problems, i0, n)
    base, total = problem * m, tl.cast(m, tl.int64) * problems
    rows = tile(x, i0, n, 0, WIDTH, BM, CHANNELS, True)
    values = LOAD(own, at, OPTIONS, BM)
    sums = tl.zeros([BM, OUTPUT], tl.float32)
    full, first, diagonals, main, edge = plan(i0, m, BM, BN, SELF)
    for t in range(0, main):
        j0 = tl.where(t >= first, t + diagonals, t) * BN
        s, streamed = product(rows, x, y, i0, n, j0, m, WIDTH, CHANNELS, BM, BN, False, PRECISION)
        w = WEIGHT(values, s, other, (base, total, j0, m), numbers, OPTIONS, False)
        sums = add_weighted(
            sums, w, streamed, y, j0, m, channel, WIDTH, CHANNELS, OUTPUT, BN, False, PRECISION
        )
    for t in range(0, edge):
        j0 = tl.where(t < diagonals, first + t, full) * BN
        s, streamed = product(rows, x, y, i0, n, j0, m, WIDTH, CHANNELS, BM, BN, True, PRECISION)
        w = WEIGHT(values, s, other, (base, total, j0, m), numbers, OPTIONS, True)
        w = tl.where(pairs_inside(i0, j0, m, BM, BN, SELF), w, 0.0)
        sums = add_weighted(
            sums, w, streamed, y, j0, m, channel, WIDTH, CHANNELS, OUTPUT, BN, True, PRECISION
        )
    r, d = tl.arange(0, BM), tl.arange(0, OUTPUT)
    where = out + i0 * tl.cast(WIDTH, tl.int64) + channel + (r[:, None] * WIDTH + d[None, :])
    tl.store(where, sums, mask=(i0 + r < n)[:, None])


def statistics(
    name: str,
    x: Packed,
    y: Packed | None,
    epilogue: tuple[Any, Any, Any],
    *,
    out: tuple[Tensor, ...],
    own: tuple[Tensor | None, ...] = (),
    other: tuple[Tensor | None, ...] = (),
    numbers: tuple[float, ...] = (),
    options: tuple[Any, ...] = (),
    active: Tensor | None = None,
    ordered: bool = False,
) -> None:
    """Runs `statistics_kernel` for all problems.

    Args:
        name: the row of the table in configs.py.
        x: the rows that get a statistic.
        y: the rows that it is over; None: x itself without the pair (i, i).
        epilogue: (start, step, finish), see above.
        out: tensors that `finish` fills.
        own, other: vectors that accompany the rows of x and of y, `(S, G, rows)` contiguous.
        numbers: run-time scalars of the epilogue.
        options: compile-time options of the epilogue.
        active: `(1, G, n)` int32; tiles of rows that are all 0 see no pairs. None: all rows do.
        ordered: pairs come in the order of the rows of y, at the price of a mask everywhere.
    """
    start, step, finish = epilogue
    arguments = {"own": own, "other": other, "out": out, "numbers": numbers, "active": active}
    constants = {"START": start, "STEP": step, "FINISH": finish, "OPTIONS": options}
    constants["ORDERED"] = ordered
    _sweep(name, statistics_kernel, x, y, arguments, constants)


def gradient(
    x: Packed,
    y: Packed | None,
    load: Any,
    weight: Any,
    *,
    own: tuple[Tensor | None, ...] = (),
    other: tuple[Tensor | None, ...] = (),
    numbers: tuple[float, ...] = (),
    options: tuple[Any, ...] = (),
    name: str = "gradient",
) -> Tensor:
    """Runs `gradient_kernel` for all problems; arguments as for `statistics`.

    Returns:
        `(G, n, width)` float32.
    """
    out = torch.empty(x.rows.shape, dtype=torch.float32, device=x.rows.device)
    arguments = {"own": own, "other": other, "out": out, "numbers": numbers}
    constants = {"LOAD": load, "WEIGHT": weight, "OPTIONS": options}
    _sweep(name, gradient_kernel, x, y, arguments, constants)
    return out


def gradient_of_selections(
    x: Packed,
    y: Packed | None,
    load: Any,
    weight: Any,
    *,
    selections: int,
    each: Callable[[slice], tuple[Any, ...]],
    own: tuple[Tensor | None, ...],
    other: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    options: tuple[Any, ...],
    name: str,
) -> Tensor:
    """The sum of `gradient` over the shares of any number of selections, in their order.

    Args:
        selections: S of `own` and `other`.
        each: the first options of a launch, by its share.
        x, y, load, weight, own, other, numbers, options, name: see `gradient`.
    """
    total: Tensor | None = None
    for share in shares(selections):
        out = gradient(
            x,
            y,
            load,
            weight,
            own=of_share(own, share),
            other=of_share(other, share),
            numbers=numbers,
            options=(*each(share), *options),
            name=name,
        )
        total = out if total is None else total.add_(out)
    assert total is not None
    return total


def _sweep(
    name: str,
    kernel: Any,
    x: Packed,
    y: Packed | None,
    arguments: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    """Chooses the tiles and launches."""
    against = x if y is None else y
    # PRECISION is of float32 rows; products of half rows are exact
    precision = "ieee" if x.precision == "half" else x.precision
    constants = {**constants, "SELF": y is None, "PRECISION": precision}

    def start(config: Config) -> None:
        tiles = triton.cdiv(x.count, config.rows)
        programs = x.problems * tiles
        shape = {"WIDTH": x.width, "CHANNELS": min(config.channels or x.width, x.width)}
        shape |= {"BM": config.rows, "BN": config.columns}
        if kernel is gradient_kernel:
            shape["OUTPUT"] = min(config.output or x.width, x.width)
            programs *= x.width // shape["OUTPUT"]
        sizes = {"n": x.count, "m": against.count, "tiles": tiles}
        launch(
            kernel,
            programs,
            {"x": x.rows, "y": against.rows, **arguments, **sizes},
            {**constants, **shape},
            config.warps,
            config.stages,
        )

    sizes = x.problems, x.count, against.count
    choose(name, x.precision, x.width, *sizes, constants, x.rows.device, start)
