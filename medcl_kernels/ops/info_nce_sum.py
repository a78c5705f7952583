"""`medcl::info_nce_sum`: a weighted sum of InfoNCE terms, whose gradients are made in the forward
pass where the backend can (C++), so that no similarity is computed twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from .registration import (
    compute_dtype,
    define,
    gradient,
    gradient_like,
    implement,
    once_differentiable,
)


def info_nce_sum(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    weight: Tensor,
    *,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.info_nce_sum`, whose signature this is, plus `impl`."""
    if select("info_nce_sum", impl, query.device.type, query.dtype) == "reference":
        return reference.info_nce_sum(
            query,
            key,
            positives,
            weight,
            temperature=temperature,
            normalize=normalize,
            across=across,
        )
    training = torch.is_grad_enabled()
    return torch.ops.medcl.info_nce_sum(
        query,
        key,
        None if positives is None else positives.contiguous(),
        weight.to(compute_dtype(query)).contiguous(),
        temperature,
        normalize,
        across,
        training and query.requires_grad,
        training and key.requires_grad,
    )[0]


def _fake(query: Tensor, key: Tensor, positives: Any, weight: Any, *rest: Any) -> tuple[Any, ...]:
    need_query, need_key = rest[-2:]
    value = query.new_empty((), dtype=compute_dtype(query))
    return value, gradient_like(query, need_query), gradient_like(key, need_key)


def _scale(g: Tensor, d_query: Tensor, d_key: Tensor) -> tuple[Tensor, Tensor]:
    return d_query * g.to(d_query.dtype), d_key * g.to(d_key.dtype)


define(
    "info_nce_sum(Tensor query, Tensor key, Tensor? positives, Tensor weight, float temperature, "
    "bool normalize, bool across, bool need_query, bool need_key) -> (Tensor, Tensor, Tensor)",
    _fake,
)
define(
    "info_nce_sum_backward(Tensor g, Tensor d_query, Tensor d_key) -> (Tensor, Tensor)",
    lambda g, d_query, d_key: (torch.empty_like(d_query), torch.empty_like(d_key)),
)
implement("info_nce_sum_backward", _scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.need = inputs[-2:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 9
    if g is None:
        return nothing
    need_query, need_key = ctx.need
    d_query, d_key = torch.ops.medcl.info_nce_sum_backward(g, *ctx.saved_tensors)
    return d_query if need_query else None, d_key if need_key else None, *nothing[2:]


gradient("info_nce_sum", _backward, _setup)
once_differentiable("info_nce_sum_backward")
