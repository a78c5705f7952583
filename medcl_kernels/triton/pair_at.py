"""Listed pairs of rows, O(K D): (B1) of reference/pair_at.py and gradients through a list.

For gradients the entries are sorted by row, on the device; a program then owns a row and adds up
its entries in their order: no atomics, nothing of size K D is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, operation
from .positives import dots
from .rows import Packed, pack, pack_pair, unpack
from .segments import sort

ENTRIES = 32  # gathered at a time


@operation
def pair_at(
    query: Tensor,
    key: Tensor | None,
    anchor: Tensor,
    candidate: Tensor,
    temperature: float,
    normalize: bool,
) -> Tensor:
    """(B1), `(K,)` float32; see ops/pair_at.py. NaN where a row is named that does not exist."""
    x = pack(query, None, normalize, across=True)  # rows that nobody names may hold anything
    y = x if key is None else pack(key, None, normalize, across=True)
    named = torch.where(candidate < 0, y.count, candidate)  # with an anchor, -1 is no row either
    to = torch.where(anchor < 0, -1, named).unsqueeze(0)
    at = dots(x, y.rows, to, None, 1 / temperature, False, own_at=anchor.unsqueeze(0))
    return at.squeeze(0)


@operation
def pair_at_backward(
    d_at: Tensor,
    query: Tensor,
    key: Tensor | None,
    anchor: Tensor,
    candidate: Tensor,
    temperature: float,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """(P4), (P5): gradients in the layouts of query and key."""
    options = (temperature, normalize, need_query, need_key)
    return listed_gradient(query, key, anchor, candidate, d_at, *options)


def listed_gradient(
    query: Tensor,
    key: Tensor | None,
    anchor: Tensor,
    candidate: Tensor,
    weight: Tensor,
    temperature: float,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_e weight_e s_e over listed pairs, entries with anchor < 0 left out.

    Args:
        query, key: `(B, D, L)`; key None: candidates are query rows.
        anchor, candidate: `(K,)` int64, rows of the whole batch.
        weight: `(K,)` float32.
        temperature, normalize, need_query, need_key: as everywhere.
    """
    x, y, _, _ = pack_pair(query, key, None, None, 0, normalize, True)
    other = x if y is None else y
    candidate = torch.where(anchor < 0, -1, candidate)
    d_query = d_key = query.new_empty(0)
    if need_query:
        d = _sums(x.count, other, anchor, candidate, weight)
        if y is None:
            d = _sums(x.count, x, candidate, anchor, weight, add_to=d)
        d_query = unpack(d, query, None, normalize, 1 / temperature)
    if key is not None and need_key:
        d = _sums(other.count, x, candidate, anchor, weight)
        d_key = unpack(d, key, None, normalize, 1 / temperature)
    return d_query, d_key


def _sums(
    count: int,
    table: Packed,
    row: Tensor,
    at: Tensor,
    weight: Tensor,
    add_to: Tensor | None = None,
) -> Tensor:
    """`(count, width)` float32: for every row the sum of weight_e table[at_e] over its entries e.

    Args:
        table: one problem.
        row, at: `(K,)` int64, negative for entries that do not count.
        add_to: what the sums are added to.
    """
    runs = sort(row.unsqueeze(0))
    rows = torch.arange(count, device=row.device).unsqueeze(0)
    first, length = runs.first(rows)
    out = add_to
    if out is None:
        out = torch.empty((count, table.width), dtype=torch.float32, device=row.device)
    launch(
        listed_kernel,
        count,
        {
            "table": table.rows,
            "order": runs.order,
            "at": at,
            "weight": weight,
            "first": first,
            "length": length,
            "out": out,
            "rows": table.count,
        },
        {
            "ADD": add_to is not None,
            "WIDTH": table.width,
            "ENTRIES": ENTRIES,
            "CHANNELS": min(table.width, 128),
        },
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def listed_kernel(
    table,  # (rows, WIDTH)
    order,  # (K,) int64, entries sorted by row
    at,  # (K,) int64
    weight,  # (K,) float32
    first,  # (n,) int64, the first sorted entry of a row
    length,  # (n,) int64
    out,  # (n, WIDTH) float32
    rows,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(first + row)
    count = tl.load(length + row).to(tl.int32)
    e = tl.arange(0, ENTRIES)
    for channel in range(0, WIDTH, CHANNELS):
        here = out + row * WIDTH + channel + tl.arange(0, CHANNELS)
        total = tl.zeros([CHANNELS], tl.float32)
        if ADD:
            total += tl.load(here)
        for start in range(0, count, ENTRIES):
            inside = start + e < count
            entry = tl.load(order + begin + start + e, mask=inside, other=0)
            to = tl.load(at + entry, mask=inside, other=-1)
            there = (to >= 0) & (to < rows)
            share = tl.load(weight + entry, mask=there, other=0.0)
            d = channel + tl.arange(0, CHANNELS)
            where = table + to[:, None] * WIDTH + d[None, :]
            part = tl.load(where, mask=there[:, None], other=0.0).to(tl.float32)
            total += tl.sum(part * share[:, None], 0)
        tl.store(here, total)
