"""`medcl::pair_hinge`: how far similarities exceed a margin, summed over the negatives.

Its tiles are plain torch, the same on every device and for every backend but the reference. One
tile of similarities exists at a time and is made again on the way back, so memory is O(N D); tiles
follow one another in a fixed order, so that runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose
from ..reference.pair_hinge import candidate_columns
from ..reference.pairs import group
from .registration import (
    COMPILED,
    compute_dtype,
    contiguous,
    define,
    define_backward,
    empty,
    gradient,
    row_gradients,
    save_inputs,
    torch_kernel,
)

ROWS, COLUMNS = 512, 2048  # of a tile: 4 MB of float32


def pair_hinge(
    query: Tensor,
    key: Tensor,
    excluded: Tensor | None = None,
    *,
    margin: float,
    across: bool = False,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.pair_hinge`, whose signature this is, plus `impl`."""
    if choose("pair_hinge", impl, query) == "reference":
        return reference.pair_hinge(query, key, excluded, margin=margin, across=across)
    return torch.ops.medcl.pair_hinge(query, key, contiguous(excluded), margin, across)


def _fake(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2]), dtype=compute_dtype(query))


_ARGUMENTS = "Tensor query, Tensor key, Tensor? excluded, float margin, bool across"
define(f"pair_hinge({_ARGUMENTS}) -> Tensor", _fake, (COMPILED,))
define_backward("pair_hinge", "Tensor d_out", _ARGUMENTS, (COMPILED,))


class _Tiles:
    """The pairs of a call in tiles: groups x strips of anchors x strips of candidates."""

    def __init__(
        self, query: Tensor, key: Tensor, excluded: Tensor | None, margin: float, across: bool
    ) -> None:
        self.anchors, self.candidates = (
            group(x.to(compute_dtype(x)), across).transpose(1, 2).contiguous() for x in (query, key)
        )  # (G, N, D), (G, Nk, D)
        self.excluded = (
            None if excluded is None else candidate_columns(excluded, key.shape[2], across)
        )
        self.margin = margin

    def __iter__(self) -> Iterator[tuple[int, slice, slice]]:
        groups, anchors, _ = self.anchors.shape
        for g in range(groups):
            for i in range(0, anchors, ROWS):
                for j in range(0, self.candidates.shape[1], COLUMNS):
                    yield g, slice(i, i + ROWS), slice(j, j + COLUMNS)

    def excess(self, g: int, rows: slice, columns: slice) -> Tensor:
        """max(0, s - margin) of one tile, 0 where a candidate is excluded."""
        tile = self.anchors[g, rows] @ self.candidates[g, columns].t()
        tile.sub_(self.margin).clamp_min_(0)
        if self.excluded is None:
            return tile
        for named in (self.excluded[g, rows] - columns.start).unbind(1):
            here = (named >= 0) & (named < tile.shape[1])
            place = named.clamp(0, tile.shape[1] - 1).unsqueeze(1)
            kept = tile.gather(1, place).masked_fill_(here.unsqueeze(1), 0)
            tile.scatter_(1, place, kept)
        return tile


def _forward(
    query: Tensor, key: Tensor, excluded: Tensor | None, margin: float, across: bool
) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        tiles = _Tiles(query, key, excluded, margin, across)
        total = tiles.anchors.new_zeros(tiles.anchors.shape[:2])
        for g, rows, columns in tiles:
            total[g, rows] += tiles.excess(g, rows, columns).sum(1)
    return total.reshape(query.shape[0], query.shape[2])


def _backward_kernel(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    excluded: Tensor | None,
    margin: float,
    across: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        tiles = _Tiles(query, key, excluded, margin, across)
        weight = d_out.reshape(tiles.anchors.shape[:2])
        d_anchors, d_candidates = (
            torch.zeros_like(tiles.anchors),
            torch.zeros_like(tiles.candidates),
        )
        for g, rows, columns in tiles:
            active = tiles.excess(g, rows, columns) > 0
            pull = active * weight[g, rows].unsqueeze(1)  # (H2)
            # not addmm_: its sums would start at what earlier tiles gave, and round to its size
            if need_query:
                d_anchors[g, rows] += pull @ tiles.candidates[g, columns]
            if need_key:
                d_candidates[g, columns] += pull.t() @ tiles.anchors[g, rows]
    d_query = _ungroup(d_anchors, query) if need_query else empty(query)
    return d_query, _ungroup(d_candidates, key) if need_key else empty(key)


def _ungroup(rows: Tensor, like: Tensor) -> Tensor:
    """`(G, N, D)` -> `(B, D, L)` in the layout and dtype of `like`."""
    batch, _, length = like.shape
    return torch.empty_like(like).copy_(rows.reshape(batch, length, -1).transpose(1, 2))


torch_kernel("pair_hinge", _forward)
torch_kernel("pair_hinge_backward", _backward_kernel)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_inputs(ctx, inputs)


def _backward(ops: Any, ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return row_gradients(ops.pair_hinge_backward, ctx, (d_out,), ctx.saved_tensors)


gradient("pair_hinge", _backward, _setup, (COMPILED,))
