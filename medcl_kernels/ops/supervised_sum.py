"""`supervised_sum`: the sum of SupCon "out" over the anchors. Where a backend has it (C++ on the
CPU), its gradient is made in the forward pass: one call instead of four; elsewhere it is put
together from `pair_logsumexp` and `positive_mean`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose, has_kernel
from .pair_logsumexp import pair_logsumexp
from .positive_mean import positive_mean
from .registration import (
    COMPILED,
    compute_dtype,
    define,
    gradient,
    gradient_like,
    kernels,
    scaled_gradients,
)


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
    backend = choose("supervised_sum", impl, query)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "temperature": temperature,
        "normalize": normalize,
        "across": across,
    }
    if backend == "reference":
        return reference.supervised_sum(query, labels, **options)
    if not has_kernel(backend, "supervised_sum"):
        return _composed(query, labels, {**options, "impl": backend})
    need_query = torch.is_grad_enabled() and query.requires_grad
    return kernels(backend).supervised_sum(
        query, labels.contiguous(), *options.values(), need_query
    )[:2]


def _composed(query: Tensor, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(S1) of reference/supervised_sum.py from two operations."""
    mean, count = positive_mean(query, query_labels=labels, **options)
    lse = pair_logsumexp(query, query_labels=labels, **options)
    valid = count > 0
    value = torch.where(valid, lse - mean, 0.0)
    return value.sum(), valid.sum().clamp_min(1).to(value.dtype)


def _fake(query: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    value = query.new_empty((), dtype=compute_dtype(query))
    return value, torch.empty_like(value), gradient_like(query, rest[-1])


define(
    "supervised_sum(Tensor query, Tensor labels, int ignore_index, float temperature, "
    "bool normalize, bool across, bool need_query) -> (Tensor, Tensor, Tensor)",
    _fake,
    (COMPILED,),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.need = inputs[-1]
    ctx.set_materialize_grads(False)


def _backward(ops: Any, ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    (d_query,) = ctx.saved_tensors
    return scaled_gradients(g, d_query, None, ctx.need, False)[0], *(None,) * 6


gradient("supervised_sum", _backward, _setup, (COMPILED,))
