"""`medcl::info_nce_sum`: a weighted sum of InfoNCE terms, whose gradients are made in the forward
pass where the backend can (C++), so that no similarity is computed twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from .registration import compute_dtype, define, gradient, gradient_like, scaled_gradients


def info_nce_sum(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    weight: Tensor | None = None,
    *,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
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
        None if weight is None else weight.to(compute_dtype(query)).contiguous(),
        temperature,
        normalize,
        across,
        training and query.requires_grad,
        training and key.requires_grad,
    )[:2]


def _fake(query: Tensor, key: Tensor, positives: Any, weight: Any, *rest: Any) -> tuple[Any, ...]:
    need_query, need_key = rest[-2:]
    value = query.new_empty((), dtype=compute_dtype(query))
    gradients = gradient_like(query, need_query), gradient_like(key, need_key)
    return value, torch.empty_like(value), *gradients


define(
    "info_nce_sum(Tensor query, Tensor key, Tensor? positives, Tensor? weight, float temperature, "
    "bool normalize, bool across, bool need_query, bool need_key) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.need = inputs[-2:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *scaled_gradients(g, *ctx.saved_tensors, *ctx.need), *(None,) * 7


gradient("info_nce_sum", _backward, _setup)
