"""`positive_mean`: mean similarity to the same-label candidates by class sums, O(N D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose
from .registration import (
    compute_dtype,
    contiguous,
    define,
    define_backward,
    gradient,
    kernels,
    row_gradients,
    save_inputs,
)


def positive_mean(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor,
    key_labels: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See `medcl_kernels.reference.positive_mean`, whose signature this is, plus `impl`."""
    backend = choose("positive_mean", impl, query)
    if backend == "reference":
        return reference.positive_mean(
            query,
            key,
            query_labels=query_labels,
            key_labels=key_labels,
            ignore_index=ignore_index,
            temperature=temperature,
            normalize=normalize,
            across=across,
        )
    return kernels(backend).positive_mean(
        query,
        key,
        query_labels.contiguous(),
        contiguous(key_labels),
        ignore_index,
        temperature,
        normalize,
        across,
    )


def _fake(query: Tensor, key: Any, query_labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = query_labels.shape
    mean = query.new_empty(shape, dtype=compute_dtype(query))
    return mean, query.new_empty(shape, dtype=torch.int64)


_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor query_labels, Tensor? key_labels, int ignore_index, "
    "float temperature, bool normalize, bool across"
)
define(f"positive_mean({_ARGUMENTS}) -> (Tensor, Tensor)", _fake)
define_backward("positive_mean", "Tensor d_mean", _ARGUMENTS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, inputs)


def _backward(ops: Any, ctx: Any, d_mean: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    upstream = (d_mean.contiguous(),)
    return row_gradients(ops.positive_mean_backward, ctx, upstream, ctx.saved_tensors)


gradient("positive_mean", _backward, _setup)
