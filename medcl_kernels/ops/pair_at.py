"""`pair_at`: similarities of listed pairs of rows, O(K D)."""

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


def pair_at(
    query: Tensor,
    key: Tensor | None,
    anchor: Tensor,
    candidate: Tensor,
    *,
    temperature: float,
    normalize: bool = True,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.pair_at`, whose signature this is, plus `impl`."""
    options = (temperature, normalize)
    backend = choose("pair_at", impl, query)
    if backend == "reference":
        return reference.pair_at(
            query, key, anchor, candidate, temperature=temperature, normalize=normalize
        )
    return kernels(backend).pair_at(
        query, key, anchor.contiguous(), candidate.contiguous(), *options
    )


def _fake(query: Tensor, key: Any, anchor: Tensor, *_: Any) -> Tensor:
    return query.new_empty(anchor.shape, dtype=compute_dtype(query))


_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor anchor, Tensor candidate, float temperature, bool normalize"
)
define(f"pair_at({_ARGUMENTS}) -> Tensor", _fake)
define_backward("pair_at", "Tensor d_at", _ARGUMENTS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_inputs(ctx, inputs)


def _backward(ops: Any, ctx: Any, d_at: Tensor) -> tuple[Tensor | None, ...]:
    upstream = (d_at.contiguous(),)
    return row_gradients(ops.pair_at_backward, ctx, upstream, ctx.saved_tensors)


gradient("pair_at", _backward, _setup)
