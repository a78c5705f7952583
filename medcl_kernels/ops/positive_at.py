"""`medcl::positive_at`: similarity to given key pixels by one gather, O(N D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from .registration import compute_dtype, define, gradient, gradient_like, once_differentiable

_ARGS = "Tensor query, Tensor key, Tensor positives, float temperature, bool normalize"


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
    if select("positive_at", impl, query.device.type, query.dtype) == "reference":
        return reference.positive_at(
            query, key, positives, temperature=temperature, normalize=normalize, across=across
        )
    # a positive lies in the anchor's own image whatever the candidates are
    return torch.ops.medcl.positive_at(query, key, positives.contiguous(), temperature, normalize)


def _fake(query: Tensor, key: Tensor, positives: Tensor, *_: Any) -> Tensor:
    return query.new_empty(positives.shape, dtype=compute_dtype(query))


def _fake_backward(d_out: Tensor, query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return gradient_like(query, rest[-2]), gradient_like(key, rest[-1])


define(f"positive_at({_ARGS}) -> Tensor", _fake)
define(
    f"positive_at_backward(Tensor d_out, {_ARGS}, bool need_query, bool need_key)"
    " -> (Tensor, Tensor)",
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    need_query, need_key = ctx.needs_input_grad[:2]
    d_query, d_key = torch.ops.medcl.positive_at_backward(
        d_out.contiguous(), *ctx.saved_tensors, *ctx.options, need_query, need_key
    )
    return d_query if need_query else None, d_key if need_key else None, None, None, None


gradient("positive_at", _backward, _setup)
once_differentiable("positive_at_backward")
