"""Which cells of a feature map are contrasted: fixed positions, the same for all images and steps.

dense    every cell
stride   flat index n * (cells // samples), the 2-D paper's rule: where cells // samples is a
         multiple of the width, all samples lie in one column
even     a grid with equal spacing in every axis, each cell in the middle of its part
regular  every `step`-th cell of every axis from 0 on, the 3-D paper's rule
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log, prod

import torch
from torch import Tensor

SAMPLERS = ("even", "stride")


def sample_cells(
    grid: Sequence[int],
    samples: int | None = None,
    *,
    sampler: str = "even",
    step: int | Sequence[int] | None = None,
    border: int = 0,
    name: str = "the layer",
    device: torch.device | None = None,
) -> Tensor:
    """Positions `(n, dims)` int64 in array order.

    Args:
        grid: spatial shape of the feature map.
        samples: how many cells; None: all. "even" takes fewer where this number has no factors that
            spread over the grid (31 becomes 5 x 6).
        sampler: "even" or "stride", how `samples` are spread.
        step: take every step-th cell of each axis instead, one number or one per axis.
        border: cells left out on every side first.
        name: of the layer, for messages.
        device: of the result.

    Raises:
        ValueError: the border leaves nothing, or fewer cells than samples.
    """
    inner = [size - 2 * border for size in grid]
    if min(inner) < 1:
        raise ValueError(
            f"{name}: a border of {border} cells leaves nothing of a {_text(grid)} grid: lower the "
            "border or use larger inputs"
        )
    if step is not None:
        steps = (step,) * len(grid) if isinstance(step, int) else tuple(step)
        if len(steps) != len(grid) or min(steps) < 1:
            raise ValueError(
                f"{name}: step must be positive, one number or one per axis ({len(grid)}); got "
                f"{step!r}"
            )
        axes = [
            torch.arange(0, size, own, device=device)
            for size, own in zip(inner, steps, strict=True)
        ]
        return _product(axes) + border
    cells = prod(inner)
    if samples is None:
        return _product([torch.arange(size, device=device) for size in inner]) + border
    if samples < 1 or samples > cells:
        raise ValueError(
            f"{name}: cannot take {samples} samples of a {_text(inner)} grid "
            f"({_text(grid)} without a border of {border}), which has {cells} cells: take fewer, "
            "lower the border or use larger inputs"
        )
    if sampler == "even":
        # at every step anew; a compiler traces it once, and warns of the cache
        found = even_counts if torch.compiler.is_compiling() else _kept_counts
        counts = found(tuple(inner), samples)
        axes = [
            ((2 * torch.arange(count, device=device) + 1) * size) // (2 * count)
            for count, size in zip(counts, inner, strict=True)
        ]
        return _product(axes) + border
    if sampler not in ("stride", "released"):
        raise ValueError(f"sampler must be 'even' or 'stride', got {sampler!r}")
    step = cells // samples
    if sampler == "released" and step == 1 and cells > 1:
        samples -= 1
    flat = torch.arange(samples, device=device) * step
    return unravel(flat, inner) + border


def even_counts(grid: Sequence[int], samples: int) -> tuple[int, ...]:
    """Cells per axis, their product the largest number up to `samples` whose spacings differ by at
    most a factor of about two; the most equal spacing wins."""
    for total in range(samples, 0, -1):
        options = [
            counts
            for counts in _factorizations(total, len(grid))
            if all(count <= size for count, size in zip(counts, grid, strict=True))
        ]
        if not options:
            continue
        spreads = [_spread(grid, counts) for counts in options]
        least = min(spreads)
        best = options[spreads.index(least)]  # torch 2.10 traces no min(..., key=...)
        # an axis shorter than the spacing cannot hold more than one cell
        if least <= log(2.1) or total <= 2 or min(grid) * 2 < max(grid):
            return best
    return (1,) * len(grid)


_kept_counts = lru_cache(even_counts)


def _spread(grid: Sequence[int], counts: Sequence[int]) -> float:
    """Logarithm of the ratio of the largest to the smallest spacing."""
    spacings = [log(size / count) for size, count in zip(grid, counts, strict=True)]
    return max(spacings) - min(spacings)


def _factorizations(total: int, axes: int) -> list[tuple[int, ...]]:
    if axes == 1:
        return [(total,)]
    return [
        (first, *rest)
        for first in range(1, total + 1)
        if total % first == 0
        for rest in _factorizations(total // first, axes - 1)
    ]


def unravel(flat: Tensor, grid: Sequence[int]) -> Tensor:
    """Flat row-major indices `(n,)` -> positions `(n, dims)`."""
    return torch.stack(torch.unravel_index(flat, tuple(grid)), 1)


def ravel(cells: Tensor, grid: Sequence[int]) -> Tensor:
    """Positions `(n, dims)` -> flat row-major indices `(n,)`."""
    flat = cells[:, 0]
    for axis, size in enumerate(grid[1:], start=1):
        flat = flat * size + cells[:, axis]
    return flat


def _product(axes: list[Tensor]) -> Tensor:
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def _text(grid: Sequence[int]) -> str:
    return " x ".join(str(size) for size in grid)
