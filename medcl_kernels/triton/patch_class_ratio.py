"""`patch_class_ratio`: (W1) of reference/patch_class_ratio.py; counts are integers, hence exact.

Windows are counted cell by cell, or looked up in a summed-area table per class: whichever reads
less. A plane is a volume of one slice.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, operation

TILE = 1024  # cells that a program looks at in one step, of several windows where these are small
CLASSES = 8  # at most, counted at a time
CORNERS = 128  # windows per program that looks them up


@operation
def patch_class_ratio(
    labels: Tensor,
    centers: Tensor,
    windows: list[int],
    num_classes: int,
    full: bool,
    double: bool,
) -> Tensor:
    """(W1), `(P, B, K, N)`; see ops/patch_class_ratio.py."""
    dims, classes, count = labels.dim() - 1, num_classes - 1, centers.shape[0]
    if dims not in (2, 3) or centers.shape[1] != dims or len(windows) % (2 * dims):
        raise ValueError(
            "labels must be (B, H, W) or (B, D, H, W), with centers (N, dims) and windows "
            f"(P, dims, 2); got {tuple(labels.shape)}, {tuple(centers.shape)}, {len(windows)}"
        )
    if any(low >= high for low, high in zip(windows[::2], windows[1::2], strict=True)):
        raise ValueError(f"a window is empty: {windows}")
    if labels[0].numel() >= 2**31:
        raise ValueError("an image of labels must have fewer than 2^31 cells")
    y = labels.view(torch.uint8) if labels.dtype == torch.bool else labels
    y = y.unsqueeze(1) if dims == 2 else y  # (B, X, Y, Z)
    boxes = boxes_of(windows, dims)
    out = torch.empty(
        (len(boxes), y.shape[0], classes, count),
        dtype=torch.float64 if double else torch.float32,
        device=y.device,
    )
    shared = {
        "centers": centers,
        "out": out,
        "windows": tuple(bound for box in boxes for bound in box),
        "count": count,
        "sizes": y.shape[1:],
        "classes": classes,
    }
    sparse = {"DIMS": dims, "FULL": full}
    if reads_of_cells(boxes, y.shape[1:], count) <= reads_of_tables(boxes, y, count, classes):
        _count(y, boxes, shared, sparse)
    else:
        for k in range(classes):
            _look_up(area_table(y, k + 1), k, shared, sparse)
    return out


def boxes_of(windows: list[int], dims: int) -> list[tuple[int, ...]]:
    """(low, high) of three axes per window; the missing first axis of a plane has one cell."""
    per = 2 * dims
    return [(0, 1) * (3 - dims) + tuple(windows[p : p + per]) for p in range(0, len(windows), per)]


def reads_of_cells(boxes: list[tuple[int, ...]], sizes: Any, count: int) -> int:
    """Labels of one image that are read when windows are counted cell by cell."""
    return count * sum(prod(_extents(box, sizes)) for box in boxes)


def reads_of_tables(boxes: list[tuple[int, ...]], y: Tensor, count: int, classes: int) -> int:
    """Numbers of one image that are read and written when tables are made and looked up."""
    sizes = y.shape[1:]
    axes = sum(size > 1 for size in sizes)
    return classes * (prod(sizes) * 2 * (1 + axes) + count * len(boxes) * 2**axes)


def _extents(box: tuple[int, ...], sizes: Any) -> list[int]:
    """Cells per axis that a window has inside the map at most."""
    return [min(box[2 * axis + 1] - box[2 * axis], size) for axis, size in enumerate(sizes)]


def area_table(y: Tensor, label: int) -> Tensor:
    """How many cells of a class have no larger position in any axis, `(B, X, Y, Z)` int32."""
    table = (y == label).to(torch.int32)
    for axis in (3, 2, 1):
        if y.shape[axis] > 1:
            table = table.cumsum(axis, dtype=torch.int32)
    return table.contiguous()


def _count(
    y: Tensor, boxes: list[tuple[int, ...]], shared: dict[str, Any], options: dict[str, Any]
) -> None:
    largest = max(prod(_extents(box, y.shape[1:])) for box in boxes)
    cells = min(max(triton.next_power_of_2(largest), 32), TILE)
    blocks = triton.cdiv(shared["count"], TILE // cells)
    launch(
        count_kernel,
        y.shape[0] * blocks,
        {"labels": y, **shared, "blocks": blocks, "strides": y.stride()},
        {
            **options,
            "CENTERS": TILE // cells,
            "CELLS": cells,
            "CLASSES": min(triton.next_power_of_2(shared["classes"]), CLASSES),
        },
    )


def _look_up(table: Tensor, k: int, shared: dict[str, Any], options: dict[str, Any]) -> None:
    blocks = triton.cdiv(shared["count"], CORNERS)
    launch(
        look_up_kernel,
        table.shape[0] * blocks,
        {"table": table, **shared, "k": k, "blocks": blocks},
        {**options, "CENTERS": CORNERS},
    )


@triton.jit
def ends(centers, windows, sizes, i, count, p, axis, DIMS: tl.constexpr):
    """[CENTERS] first and past-the-last position of window p in an axis, inside the map."""
    own: tl.constexpr = axis - (3 - DIMS)
    center = tl.zeros_like(i).to(tl.int64)
    if own >= 0:
        center = tl.load(centers + i.to(tl.int64) * DIMS + own, mask=i < count, other=0)
    size = tl.zeros_like(center) + sizes[axis]
    low = tl.minimum(tl.maximum(center + windows[6 * p + 2 * axis], 0), size)
    high = tl.maximum(tl.minimum(center + windows[6 * p + 2 * axis + 1], size), low)
    return low, high


@triton.jit
def cells_of(low, high, windows, p, FULL: tl.constexpr):
    """[CENTERS] float64: what counts are divided by."""
    cells = tl.full(low[0].shape, 1.0, tl.float64)
    for axis in tl.static_range(3):
        if FULL:
            length = windows[6 * p + 2 * axis + 1] - windows[6 * p + 2 * axis]
        else:
            length = (high[axis] - low[axis]).to(tl.float64)
        cells *= length
    return tl.maximum(cells, 1.0)


@triton.jit
def box_of(centers, windows, sizes, i, count, p, DIMS: tl.constexpr):
    """The clipped windows p of some centres: lower and upper ends, per axis."""
    low = ()
    high = ()
    for axis in tl.static_range(3):
        first, last = ends(centers, windows, sizes, i, count, p, axis, DIMS)
        low = low + (first,)
        high = high + (last,)
    return low, high


@triton.jit(do_not_specialize=["count", "blocks", "classes"])
def count_kernel(
    labels,  # (B, X, Y, Z) integers
    centers,  # (N, DIMS) int64
    out,  # (P, B, K, N)
    windows,  # P times (low, high) of three axes
    count,
    blocks,
    classes,
    sizes,
    strides,
    DIMS: tl.constexpr,
    FULL: tl.constexpr,
    CENTERS: tl.constexpr,
    CELLS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    images = tl.num_programs(0) // blocks
    i = (tl.program_id(0) % blocks) * CENTERS + tl.arange(0, CENTERS)
    labels += image * strides[0]
    for p in tl.static_range(len(windows) // 6):
        low, high = box_of(centers, windows, sizes, i, count, p, DIMS)
        cells = cells_of(low, high, windows, p, FULL)
        # what a window has at most of every axis, inside the map
        depth = tl.minimum(windows[6 * p + 1] - windows[6 * p], sizes[0])
        height = tl.minimum(windows[6 * p + 3] - windows[6 * p + 2], sizes[1])
        width = tl.minimum(windows[6 * p + 5] - windows[6 * p + 4], sizes[2])
        for first in range(0, classes, CLASSES):
            k = first + tl.arange(0, CLASSES)
            counts = tl.zeros([CENTERS, CLASSES], tl.int32)
            for start in range(0, depth * height * width, CELLS):
                v = start + tl.arange(0, CELLS)
                inside = (i < count)[:, None]
                where = tl.zeros([CENTERS, CELLS], tl.int64)
                for axis in tl.static_range(3):
                    if axis == 0:
                        step = v // (height * width)
                    elif axis == 1:
                        step = v // width % height
                    else:
                        step = v % width
                    at = low[axis][:, None] + step[None, :]
                    inside = inside & (at < high[axis][:, None])
                    where += at * strides[axis + 1]
                # the background is not counted, so it can stand for what is not there
                found = tl.load(labels + where, mask=inside, other=0)
                same = found[:, :, None] == (k + 1)[None, None, :]
                counts += tl.sum(same.to(tl.int32), 1)
            ratio = counts.to(tl.float64) / cells[:, None]
            to = ((p * images + image) * classes + k[None, :]) * count + i[:, None]
            inside = (i < count)[:, None] & (k < classes)[None, :]
            tl.store(out + to, ratio.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "blocks", "classes", "k"])
def look_up_kernel(
    table,  # (B, X, Y, Z) int32
    centers,  # (N, DIMS) int64
    out,  # (P, B, K, N)
    windows,  # P times (low, high) of three axes
    count,
    blocks,
    classes,
    k,
    sizes,
    DIMS: tl.constexpr,
    FULL: tl.constexpr,
    CENTERS: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    images = tl.num_programs(0) // blocks
    i = (tl.program_id(0) % blocks) * CENTERS + tl.arange(0, CENTERS)
    for p in tl.static_range(len(windows) // 6):
        low, high = box_of(centers, windows, sizes, i, count, p, DIMS)
        total = tl.zeros([CENTERS], tl.int32)
        for corner in tl.static_range(8):
            inside = i < count
            where = tl.zeros([CENTERS], tl.int64) + image
            for axis in tl.static_range(3):
                if (corner >> axis) & 1:
                    at = low[axis]
                else:
                    at = high[axis]
                inside = inside & (at > 0)
                where = where * sizes[axis] + at - 1
            found = tl.load(table + where, mask=inside, other=0)
            if (corner ^ (corner >> 1) ^ (corner >> 2)) & 1:
                total -= found
            else:
                total += found
        ratio = total.to(tl.float64) / cells_of(low, high, windows, p, FULL)
        to = ((p * images + image) * classes + k) * count + i
        tl.store(out + to, ratio.to(out.dtype.element_ty), mask=i < count)
