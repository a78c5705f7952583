"""`medcl::pair_positive_log`: one logarithm per positive against the negatives only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from .registration import compute_dtype, define, gradient, gradient_like, once_differentiable

_ROWS = "Tensor query, Tensor? key, Tensor query_labels, Tensor? key_labels, Tensor lse_negative"
_OPTIONS = "int ignore_index, float temperature, bool normalize, bool across"


def pair_positive_log(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor,
    key_labels: Tensor | None = None,
    lse_negative: Tensor,
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.pair_positive_log`, whose signature this is, plus `impl`."""
    options = (ignore_index, temperature, normalize, across)
    if select("pair_positive_log", impl, query.device.type, query.dtype) == "reference":
        return reference.pair_positive_log(
            query,
            key,
            query_labels=query_labels,
            key_labels=key_labels,
            lse_negative=lse_negative,
            ignore_index=ignore_index,
            temperature=temperature,
            normalize=normalize,
            across=across,
        )
    return torch.ops.medcl.pair_positive_log(
        query,
        key,
        query_labels.contiguous(),
        None if key_labels is None else key_labels.contiguous(),
        lse_negative.contiguous(),
        *options,
    )[0]


def _fake(query: Tensor, key: Any, query_labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    new = query.new_empty(query_labels.shape, dtype=compute_dtype(query))
    return new, torch.empty_like(new)


def _fake_backward(d_sum: Tensor, query: Tensor, key: Tensor | None, *rest: Any) -> Any:
    need_query, need_key = rest[-2:]
    other = query if key is None else key
    return gradient_like(query, need_query), gradient_like(other, need_key and key is not None)


define(f"pair_positive_log({_ROWS}, {_OPTIONS}) -> (Tensor, Tensor)", _fake)
define(
    f"pair_positive_log_backward(Tensor d_sum, {_ROWS}, {_OPTIONS}, bool need_query, "
    "bool need_key) -> (Tensor, Tensor)",
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, d_sum: Tensor, _: Any) -> tuple[Any, ...]:
    # the second output is d(sum)/d(lse_negative), made in the same pass
    tail, query, key, query_labels, key_labels, lse_negative = ctx.saved_tensors
    need_query, need_key = ctx.needs_input_grad[:2]
    d_query, d_key = torch.ops.medcl.pair_positive_log_backward(
        d_sum.contiguous(),
        query,
        key,
        query_labels,
        key_labels,
        lse_negative,
        *ctx.options,
        need_query,
        need_key,
    )
    d_negative = d_sum * tail if ctx.needs_input_grad[4] else None
    return (
        d_query if need_query else None,
        d_key if need_key else None,
        None,
        None,
        d_negative,
        *(None,) * 4,
    )


gradient("pair_positive_log", _backward, _setup)
once_differentiable("pair_positive_log_backward")
