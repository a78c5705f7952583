"""`mitigate_rows`: one gradient out of M, each row by its Gram matrix or all rows by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..dispatch import choose
from .registration import define, kernels


def mitigate_rows(
    gradients: Tensor,
    order: Tensor,
    *,
    method: str = "pcgrad",
    unit: str = "row",
    reduction: str = "mean",
    strength: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.mitigate_rows`, whose signature this is, plus `impl`."""
    gradients = gradients.detach()
    backend = choose("mitigate_rows", impl, gradients)
    if backend == "reference":
        return reference.mitigate_rows(
            gradients, order, method=method, unit=unit, reduction=reduction, strength=strength
        )
    rows_first = gradients.stride(2) == 1  # the result lies as the gradients do
    combined = kernels(backend).mitigate_rows(
        gradients, order.contiguous(), method, unit, reduction, strength, rows_first
    )
    return combined.transpose(1, 2) if rows_first else combined


def _fake(gradients: Tensor, *rest: Any) -> Tensor:
    _, batch, channels, length = gradients.shape
    shape = (batch, length, channels) if rest[-1] else (batch, channels, length)
    return gradients.new_empty(shape)


define(
    "mitigate_rows(Tensor gradients, Tensor order, str method, str unit, str reduction, "
    "float strength, bool rows_first) -> Tensor",
    _fake,
)
