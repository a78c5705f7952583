"""`medcl::supervised_sum`: the sum of SupCon "out" over the anchors, with its gradient made in the
forward pass where the backend can (C++): one call instead of four."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from .registration import compute_dtype, define, gradient, gradient_like, scaled_gradients


def supervised_sum(
    query: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See `medcl_kernels.reference.supervised_sum`, whose signature this is, plus `impl`."""
    if select("supervised_sum", impl, query.device.type, query.dtype) == "reference":
        return reference.supervised_sum(
            query,
            labels,
            ignore_index=ignore_index,
            temperature=temperature,
            normalize=normalize,
            across=across,
        )
    need_query = torch.is_grad_enabled() and query.requires_grad
    return torch.ops.medcl.supervised_sum(
        query, labels.contiguous(), ignore_index, temperature, normalize, across, need_query
    )[:2]


def _fake(query: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    value = query.new_empty((), dtype=compute_dtype(query))
    return value, torch.empty_like(value), gradient_like(query, rest[-1])


define(
    "supervised_sum(Tensor query, Tensor labels, int ignore_index, float temperature, "
    "bool normalize, bool across, bool need_query) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.need = inputs[-1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    (d_query,) = ctx.saved_tensors
    return scaled_gradients(g, d_query, None, ctx.need, False)[0], *(None,) * 6


gradient("supervised_sum", _backward, _setup)
