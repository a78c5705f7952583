"""`medcl::positive_mean`: mean similarity to the same-label candidates by class sums, O(N D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from .registration import compute_dtype, define, gradient, gradient_like, once_differentiable

_ROWS = "Tensor query, Tensor? key, Tensor query_labels, Tensor? key_labels"
_OPTIONS = "int ignore_index, float temperature, bool normalize, bool across"


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
    if select("positive_mean", impl, query.device.type, query.dtype) == "reference":
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
    return torch.ops.medcl.positive_mean(
        query,
        key,
        query_labels.contiguous(),
        None if key_labels is None else key_labels.contiguous(),
        ignore_index,
        temperature,
        normalize,
        across,
    )


def _fake(query: Tensor, key: Any, query_labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = query_labels.shape
    mean = query.new_empty(shape, dtype=compute_dtype(query))
    return mean, query.new_empty(shape, dtype=torch.int64)


def _fake_backward(d_mean: Tensor, query: Tensor, key: Tensor | None, *rest: Any) -> Any:
    need_query, need_key = rest[-2:]
    other = query if key is None else key
    return gradient_like(query, need_query), gradient_like(other, need_key and key is not None)


define(f"positive_mean({_ROWS}, {_OPTIONS}) -> (Tensor, Tensor)", _fake)
define(
    f"positive_mean_backward(Tensor d_mean, {_ROWS}, {_OPTIONS}, bool need_query, bool need_key)"
    " -> (Tensor, Tensor)",
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx: Any, d_mean: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, query_labels, key_labels = ctx.saved_tensors
    need_query, need_key = ctx.needs_input_grad[:2]
    d_query, d_key = torch.ops.medcl.positive_mean_backward(
        d_mean.contiguous(),
        query,
        key,
        query_labels,
        key_labels,
        *ctx.options,
        need_query,
        need_key,
    )
    return d_query if need_query else None, d_key if need_key else None, *(None,) * 6


gradient("positive_mean", _backward, _setup)
once_differentiable("positive_mean_backward")
