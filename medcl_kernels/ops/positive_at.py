"""`positive_at`: similarity to given key pixels by one gather, O(N D)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..dispatch import choose
from .registration import (
    compute_dtype,
    define,
    define_backward,
    gradient,
    kernels,
    row_gradients,
    save_inputs,
)


def positive_at(
    query: Tensor,
    key: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.positive_at`, whose signature this is, plus `impl`."""
    backend = choose("positive_at", impl, query)
    if backend == "reference":
        return reference.positive_at(
            query, key, positives, temperature=temperature, normalize=normalize, across=across
        )
    # a positive lies in the anchor's own image whatever the candidates are
    return kernels(backend).positive_at(query, key, positives.contiguous(), temperature, normalize)


def _fake(query: Tensor, key: Tensor, positives: Tensor, *_: Any) -> Tensor:
    return query.new_empty(positives.shape, dtype=compute_dtype(query))


_ARGUMENTS = "Tensor query, Tensor key, Tensor positives, float temperature, bool normalize"
define(f"positive_at({_ARGUMENTS}) -> Tensor", _fake)
define_backward("positive_at", "Tensor d_out", _ARGUMENTS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_inputs(ctx, inputs)


def _backward(ops: Any, ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    upstream = (d_out.contiguous(),)
    return row_gradients(ops.positive_at_backward, ctx, upstream, ctx.saved_tensors)


gradient("positive_at", _backward, _setup)
