"""Similarities to positives in O(N D): rows multiplied with, or summed over, rows of a table.

`positive_mean` reads class sums, (M2) and (M4) of reference/positive_mean.py; `positive_at` reads
key rows, (A1) and (A2) of reference/positive_at.py. Positions in a table are int64, negative for
none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, operation
from .rows import Packed, pack, pack_pair, unpack
from .segments import Runs, run_sums, sort

ROWS = 32


@operation
def positive_mean(
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor,
    key_labels: Tensor | None,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
) -> tuple[Tensor, Tensor]:
    """(M2): mean `(S, B, L)` float32 and count `(S, B, L)` int64; see ops/positive_mean.py."""
    sets = _Labelled(query, key, query_labels, key_labels, ignore_index, normalize, across)
    runs = sort(sets.other_labels)
    at, count = sets.lookup(runs)
    mean = dots(sets.x, run_sums(sets.y, runs), at, count, 1 / temperature, key is None)
    return mean.view(query_labels.shape), count.view(query_labels.shape)


@operation
def positive_mean_backward(
    d_mean: Tensor,
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor,
    key_labels: Tensor | None,
    ignore_index: int,
    temperature: float,
    normalize: bool,
    across: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """(M4), (P5): gradients in the layouts of query and key."""
    sets = _Labelled(query, key, query_labels, key_labels, ignore_index, normalize, across)
    runs = sort(sets.other_labels)
    at, count = sets.lookup(runs)
    share = torch.where(count > 0, d_mean.view(count.shape) / count, 0.0)
    empty = query.new_empty(0)
    d_query = d_key = empty
    selections = query_labels.shape[0]
    if need_query:
        sums = run_sums(sets.y, runs)
        d = _sums(sets.x, sums, at, share, selections, subtract_self=key is None)
        if key is None:  # what the row is to the other anchors of its class
            sums = run_sums(sets.x, runs, share)
            d = _sums(sets.x, sums, at, None, selections, add_to=d)
        d_query = unpack(d, query, sets.valid, normalize, 1 / temperature)
    if key is not None and need_key:
        runs = sort(sets.own_labels)
        at, count = runs.first(sets.other_labels)
        sums = run_sums(sets.x, runs, share)
        d = _sums(sets.y, sums, torch.where(count > 0, at, -1), None, selections)
        d_key = unpack(d, key, sets.key_valid, normalize, 1 / temperature)
    return d_query, d_key


@operation
def positive_at(
    query: Tensor, key: Tensor, positives: Tensor, temperature: float, normalize: bool
) -> Tensor:
    """(A1), shaped like `positives`; see ops/positive_at.py."""
    named = positives >= 0
    x = pack(query, named if named.dim() == 2 else named.any(2), normalize)
    y = pack(key, None, normalize)  # rows that nobody names may hold anything
    values = dots(x, y.rows, positives.flatten(1), None, 1 / temperature, False)
    return values.view(positives.shape)


@operation
def positive_at_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    positives: Tensor,
    temperature: float,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """(A2), (P5): gradients in the layouts of query and key."""
    named = positives >= 0
    valid = named if named.dim() == 2 else named.any(2)
    entries = 1 if positives.dim() == 2 else positives.shape[2]
    share = torch.where(named, d_out, 0.0).flatten(1)
    index = positives.flatten(1)
    d_query = d_key = query.new_empty(0)
    x = pack(query, valid, normalize)
    if need_query:
        y = pack(key, None, normalize)
        d = _sums(x, y.rows, index, share, entries, by_row=True)
        d_query = unpack(d, query, valid, normalize, 1 / temperature)
    if need_key:
        y = pack(key, None, normalize)
        runs = sort(index)
        keys = torch.arange(y.count, device=key.device).expand(y.problems, -1).contiguous()
        at, count = runs.first(keys)
        sums = run_sums(x, runs, share, entries)
        d = _sums(y, sums, torch.where(count > 0, at, -1), None, 1)
        d_key = unpack(d, key, count > 0, normalize, 1 / temperature)
    return d_query, d_key


class _Labelled:
    """Packed rows and their labels `(S * G, rows)`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        query_labels: Tensor,
        key_labels: Tensor | None,
        ignore_index: int,
        normalize: bool,
        across: bool,
    ) -> None:
        self.x, y, self.valid, self.key_valid = pack_pair(
            query, key, query_labels, key_labels, ignore_index, normalize, across
        )
        self.self_mode = y is None
        self.y = self.x if y is None else y
        self.ignore_index = ignore_index
        self.own_labels = query_labels.reshape(-1, self.x.count)
        other = query_labels if key_labels is None else key_labels
        self.other_labels = other.reshape(-1, self.y.count)

    def lookup(self, runs: Runs) -> tuple[Tensor, Tensor]:
        """Where the run of every anchor's positives is, -1 for none, and how many they are."""
        at, count = runs.first(self.own_labels)
        count = torch.where(self.own_labels == self.ignore_index, 0, count - int(self.self_mode))
        count = count.clamp_min(0)
        return torch.where(count > 0, at, -1), count


def dots(
    x: Packed,
    table: Tensor,
    at: Tensor,
    count: Tensor | None,
    factor: float,
    without_self: bool,
    own_at: Tensor | None = None,
) -> Tensor:
    """factor <x_i, table_at(i) [- x_i]> [/ count_i].

    Args:
        x: `(G, n, width)`.
        table: `(P, rows, width)`, P a multiple of G.
        at: `(P, n * entries)`, rows of the table; an entry belongs to row entry // entries of x.
        count: `(P, n * entries)` int64, or None: 1.
        factor: multiplies.
        without_self: the row itself is in the sum that the table holds.
        own_at: `(1, K)`, with `at` of that shape: which row of x an entry belongs to.

    Returns:
        `(P, n * entries)` float32, 0 where there is no row, NaN where there is no such row.
    """
    problems, total = at.shape
    out = torch.empty((problems, total), dtype=torch.float32, device=at.device)
    blocks = triton.cdiv(total, ROWS)
    launch(
        dot_kernel,
        problems * blocks,
        {
            "x": x.rows,
            "table": table,
            "at": at,
            "own_at": own_at,
            "count": count,
            "out": out,
            "factor": factor,
            "total": total,
            "blocks": blocks,
            "problems": x.problems,
            "n": x.count,
            "rows": table.shape[1],
        },
        {
            "WITHOUT_SELF": without_self,
            "WIDTH": x.width,
            "ROWS": ROWS,
            "CHANNELS": min(x.width, 128),
        },
    )
    return out


def _sums(
    x: Packed,
    table: Tensor,
    at: Tensor,
    share: Tensor | None,
    terms: int,
    *,
    by_row: bool = False,
    subtract_self: bool = False,
    add_to: Tensor | None = None,
) -> Tensor:
    """Rows sum_t share_ti (table_at(t, i) [- 2 x_i]), added to `add_to` where that is given.

    Args:
        x: `(G, n, width)`.
        table: `(terms * G, rows, width)`, or `(G, rows, width)` with `by_row`.
        at, share: `(terms * G, n)`, or `(G, n * terms)` with `by_row`; share None: 1.
        terms: how many rows of a table every row adds up.
    """
    shape = x.rows.shape
    out = torch.empty(shape, dtype=torch.float32, device=at.device) if add_to is None else add_to
    blocks = triton.cdiv(x.count, ROWS)
    rows = table.shape[1]
    launch(
        sum_kernel,
        x.problems * blocks,
        {
            "x": x.rows,
            "table": table,
            "at": at,
            "share": share,
            "out": out,
            "n": x.count,
            "blocks": blocks,
            "rows": rows,
            "terms": terms,
            "term_stride": 1 if by_row else x.problems * x.count,
            "row_stride": terms if by_row else 1,
            "table_stride": 0 if by_row else x.problems * rows,
        },
        {
            "SUBTRACT": subtract_self,
            "ADD": add_to is not None,
            "WIDTH": x.width,
            "ROWS": ROWS,
            "CHANNELS": min(x.width, 128),
        },
    )
    return out


@triton.jit(do_not_specialize=["total", "blocks", "problems", "n", "rows"])
def dot_kernel(
    x,  # (G, n, WIDTH)
    table,  # (P, rows, WIDTH)
    at,  # (P, total) int64
    own_at,  # (1, total) int64 or None
    count,  # (P, total) int64 or None
    out,  # (P, total) float32
    factor,
    total,
    blocks,
    problems,
    n,
    rows,
    WITHOUT_SELF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    entry = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = entry < total
    where = tl.load(at + problem * total + entry, mask=inside, other=-1)
    there = (where >= 0) & (where < rows)
    missing = where >= rows
    if own_at is None:
        row = (problem % problems) * n + (entry // (total // n)).to(tl.int64)
    else:
        row = tl.load(own_at + entry, mask=inside, other=0)
        missing = missing | (there & (row >= n))
        there = there & (row < n)
    dot = tl.zeros([ROWS], tl.float32)
    for channel in range(0, WIDTH, CHANNELS):
        d = channel + tl.arange(0, CHANNELS)
        own = tl.load(x + row[:, None] * WIDTH + d[None, :], mask=there[:, None], other=0.0)
        own = own.to(tl.float32)
        to = table + (problem * rows + where)[:, None] * WIDTH + d[None, :]
        other = tl.load(to, mask=there[:, None], other=0.0).to(tl.float32)
        if WITHOUT_SELF:
            other -= own
        dot += tl.sum(own * other, 1)
    value = dot * factor
    if count is not None:
        some = tl.load(count + problem * total + entry, mask=inside, other=1)
        value = value / tl.maximum(some, 1).to(tl.float32)
    value = tl.where(missing, float("nan"), value)  # no such row: not silently wrong
    tl.store(out + problem * total + entry, value, mask=inside)


@triton.jit(
    do_not_specialize=["n", "blocks", "rows", "terms", "term_stride", "row_stride", "table_stride"]
)
def sum_kernel(
    x,  # (G, n, WIDTH)
    table,
    at,  # int64
    share,  # float32 or None
    out,  # (G, n, WIDTH) float32
    n,
    blocks,
    rows,
    terms,
    term_stride,
    row_stride,
    table_stride,
    SUBTRACT: tl.constexpr,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    i = problem * n + row
    for channel in range(0, WIDTH, CHANNELS):
        d = channel + tl.arange(0, CHANNELS)
        here = i[:, None] * WIDTH + d[None, :]
        total = tl.zeros([ROWS, CHANNELS], tl.float32)
        shares = tl.zeros([ROWS], tl.float32)
        if ADD:
            total += tl.load(out + here, mask=inside[:, None], other=0.0)
        for term in range(0, terms):
            entry = i * row_stride + term * tl.cast(term_stride, tl.int64)
            where = tl.load(at + entry, mask=inside, other=-1)
            there = (where >= 0) & (where < rows)
            to = problem * rows + term * tl.cast(table_stride, tl.int64) + where
            part = tl.load(
                table + to[:, None] * WIDTH + d[None, :], mask=there[:, None], other=0.0
            ).to(tl.float32)
            if share is not None:
                factor = tl.load(share + entry, mask=inside, other=0.0)
                part *= factor[:, None]
                shares += factor
            total += part
        if SUBTRACT:
            own = tl.load(x + here, mask=inside[:, None], other=0.0).to(tl.float32)
            total -= 2.0 * shares[:, None] * own
        tl.store(out + here, total, mask=inside[:, None])
