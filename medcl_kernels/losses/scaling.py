"""Temperature and the mean over anchors, as all losses treat them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.pairs import clean_rows


def scale_rows(
    x: Tensor, temperature: float | Tensor, normalize: bool, valid: Tensor | None
) -> Tensor:
    """Rows as the operations get them.

    A fixed temperature is left to the kernels, which normalise and scale while packing. A learnable
    one (a tensor) needs its own gradient: rows are cleaned, normalised and divided by its square
    root here, so that every product of two rows, be it query with key or query with query, carries
    one over the temperature; the operation is then called with `fixed(...)`.

    Args:
        x: `(B, D, L)`.
        temperature: as the user gave it.
        normalize: as the user gave it.
        valid: `(B, L)` rows that count, or None.

    Returns:
        `(B, D, L)`.
    """
    if not isinstance(temperature, Tensor):
        return x
    unit = clean_rows(x, valid, normalize)
    return unit * temperature.reshape(()).to(unit.dtype).rsqrt()


def fixed(temperature: float | Tensor, normalize: bool) -> dict[str, float | bool]:
    """The options of an operation whose rows came from `scale_rows`."""
    if isinstance(temperature, Tensor):
        return {"temperature": 1.0, "normalize": False}
    return {"temperature": float(temperature), "normalize": normalize}


def reduce_rows(values: Tensor, valid: Tensor, reduction: str, dims: tuple[int, ...]) -> Tensor:
    """Sum or mean over `dims` of values that are 0 outside `valid`; the mean counts valid anchors
    only.

    No valid anchor gives a zero that is connected to the graph.
    """
    total = values.sum(dims)
    return total if reduction == "sum" else total / valid.sum(dims).clamp_min(1)


def log_add(terms: list[Tensor]) -> Tensor:
    """Elementwise log of a sum of exponentials; -inf (an empty candidate set) is neutral, also on
    the way back, and -inf with gradient 0 where all are."""
    if len(terms) == 1:
        return terms[0]
    stacked = torch.stack(terms)
    some = (stacked > -torch.inf).any(0)
    return torch.where(some, torch.where(some, stacked, 0.0).logsumexp(0), -torch.inf)
