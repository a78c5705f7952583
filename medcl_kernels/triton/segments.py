"""Sums over rows that share a label or an index, in a fixed order: the ground of
`positive_mean` and `positive_at`.

Labels are sorted (stably, on the device, without a synchronisation), so that equal ones are a run.
A program adds up the runs within `RUN` sorted rows as one small product with the matrix of equal
labels; a second kernel adds the pieces of runs that are longer. The sum of a run stands at the
position of its first row. Any number of labels, no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rows import Packed

RUN = 32  # sorted rows per program


class Runs(NamedTuple):
    """Entries of P problems, sorted by label.

    Attributes:
        labels: `(P, E)` int64, sorted.
        order: `(P, E)` int64, which entry is at a sorted position.
    """

    labels: Tensor
    order: Tensor

    def first(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Position of the first entry of a label and how many there are, for `(P, Q)` labels."""
        first = torch.searchsorted(self.labels, labels)
        return first, torch.searchsorted(self.labels, labels, right=True) - first


def sort(labels: Tensor) -> Runs:
    """Runs of `(P, E)` int64 labels."""
    return Runs(*labels.sort(dim=-1, stable=True))


def run_sums(x: Packed, runs: Runs, weight: Tensor | None = None, entries: int = 1) -> Tensor:
    """Sum of the (weighted) rows of every run.

    Args:
        x: `(G, n, width)`.
        runs: of P = S G problems with E = n * entries entries each; entry e is row e // entries of
            problem p % G.
        weight: `(P, E)` float32, or None: 1.
        entries: labels per row.

    Returns:
        `(P, E, width)` float32, valid at the first position of a run only.
    """
    problems, count = runs.labels.shape
    out = torch.empty((problems, count, x.width), dtype=torch.float32, device=x.rows.device)
    blocks = triton.cdiv(count, RUN)
    first, length = runs.first(runs.labels)
    shared = {"out": out, "labels": runs.labels, "count": count, "blocks": blocks}
    shape = {"WIDTH": x.width, "ROWS": RUN, "CHANNELS": min(x.width, 128)}
    launch(
        piece_kernel,
        problems * blocks,
        {
            "x": x.rows,
            "weight": weight,
            "order": runs.order,
            **shared,
            "problems": x.problems,
            "n": x.count,
            "entries": entries,
        },
        shape,
    )
    if blocks > 1:
        launch(join_kernel, problems * blocks, {"first": first, "length": length, **shared}, shape)
    return out


@triton.jit(do_not_specialize=["count", "blocks", "problems", "n", "entries"])
def piece_kernel(
    x,  # (G, n, WIDTH)
    weight,  # (P, count) float32 or None
    order,  # (P, count) int64
    out,  # (P, count, WIDTH) float32
    labels,  # (P, count) int64, sorted
    count,
    blocks,
    problems,
    n,
    entries,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = at < count
    base = problem * count
    label = tl.load(labels + base + at, mask=inside, other=0)
    before = tl.load(labels + base + at - 1, mask=inside & (at % ROWS > 0), other=0)
    entry = tl.load(order + base + at, mask=inside, other=0)
    starts = (label != before) | (at % ROWS == 0)
    share = tl.full([ROWS], 1.0, tl.float32)
    if weight is not None:
        share = tl.load(weight + base + entry, mask=inside, other=0.0)
    row = (problem % problems) * n + entry // entries
    equal = tl.where(label[:, None] == label[None, :], 1.0, 0.0)
    for channel in range(0, WIDTH, CHANNELS):
        d = channel + tl.arange(0, CHANNELS)
        where = row[:, None] * WIDTH + d[None, :]
        z = tl.load(x + where, mask=inside[:, None], other=0.0).to(tl.float32) * share[:, None]
        sums = tl.dot(equal, z, input_precision="ieee")
        to = out + (base + at)[:, None] * WIDTH + d[None, :]
        tl.store(to, sums, mask=(inside & starts)[:, None])


@triton.jit(do_not_specialize=["count", "blocks"])
def join_kernel(
    first,  # (P, count) int64, first position of the run that a sorted entry is in
    length,  # (P, count) int64, of that run
    out,  # (P, count, WIDTH) float32, changed in place
    labels,
    count,
    blocks,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Completes the run that begins in a block of ROWS entries and ends in a later one."""
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    base = problem * count
    last = tl.minimum((block + 1) * ROWS, count) - 1
    start = tl.load(first + base + last)
    end = start + tl.load(length + base + last)
    if start >= block * ROWS and end > last + 1:
        pieces = ((end - last - 2) // ROWS + 1).to(tl.int32)  # one at the start of every block
        for channel in range(0, WIDTH, CHANNELS):
            d = channel + tl.arange(0, CHANNELS)
            total = tl.load(out + (base + start) * WIDTH + d)
            for piece in range(0, pieces, ROWS):
                p = piece + tl.arange(0, ROWS)
                where = base + (block + 1 + p.to(tl.int64)) * ROWS
                part = tl.load(
                    out + where[:, None] * WIDTH + d[None, :], mask=(p < pieces)[:, None], other=0.0
                )
                total += tl.sum(part, 0)
            tl.store(out + (base + start) * WIDTH + d, total)
