"""`pair_positive_log`: one logarithm per positive against the negatives only."""

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
    backend = choose("pair_positive_log", impl, query)
    if backend == "reference":
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
    return kernels(backend).pair_positive_log(
        query,
        key,
        query_labels.contiguous(),
        contiguous(key_labels),
        lse_negative.contiguous(),
        ignore_index,
        temperature,
        normalize,
        across,
    )[0]


def _fake(query: Tensor, key: Any, query_labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    total = query.new_empty(query_labels.shape, dtype=compute_dtype(query))
    return total, torch.empty_like(total)


_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor query_labels, Tensor? key_labels, Tensor lse_negative, "
    "int ignore_index, float temperature, bool normalize, bool across"
)
define(f"pair_positive_log({_ARGUMENTS}) -> (Tensor, Tensor)", _fake)
define_backward("pair_positive_log", "Tensor d_sum", _ARGUMENTS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, inputs, output[1])


def _backward(ops: Any, ctx: Any, d_sum: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    # the second output is d(sum)/d(lse_negative), made in the same pass
    tail, *inputs = ctx.saved_tensors
    upstream = (d_sum.contiguous(),)
    gradients = row_gradients(ops.pair_positive_log_backward, ctx, upstream, tuple(inputs))
    d_negative = d_sum * tail if ctx.needs_input_grad[4] else None
    return *gradients[:4], d_negative, *gradients[5:]


gradient("pair_positive_log", _backward, _setup)
