"""`info_nce_sum`: a weighted sum of InfoNCE terms. Where a backend has it (C++ on the CPU), its
gradients are made in the forward pass, so that no similarity is computed twice; elsewhere it is put
together from `pair_logsumexp` and `positive_at`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose, has_kernel
from .pair_logsumexp import pair_logsumexp
from .positive_at import positive_at
from .registration import (
    COMPILED,
    compute_dtype,
    contiguous,
    define,
    gradient,
    gradient_like,
    kernels,
    scaled_gradients,
)


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
    backend = choose("info_nce_sum", impl, query)
    options = {"temperature": temperature, "normalize": normalize, "across": across}
    if backend == "reference":
        return reference.info_nce_sum(query, key, positives, weight, **options)
    if not has_kernel(backend, "info_nce_sum"):
        return _composed(query, key, positives, weight, {**options, "impl": backend})
    training = torch.is_grad_enabled()
    return kernels(backend).info_nce_sum(
        query,
        key,
        contiguous(positives),
        None if weight is None else weight.to(compute_dtype(query)).contiguous(),
        temperature,
        normalize,
        across,
        training and query.requires_grad,
        training and key.requires_grad,
    )[:2]


def _composed(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    weight: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(I1) of reference/info_nce_sum.py from two operations."""
    batch, _, length = query.shape
    anchors = valid = None
    if positives is None:
        positives = torch.arange(length, device=query.device).expand(batch, -1)
    else:
        valid = positives >= 0
        anchors = torch.where(valid, positives, -1).unsqueeze(0)
    lse = pair_logsumexp(query, key, query_labels=anchors, ignore_index=-1, **options)[0]
    value = lse - positive_at(query, key, positives, **options)
    if valid is None:
        count = torch.full_like(value[0, 0], batch * length)
    else:
        value = torch.where(valid, value, 0.0)
        count = valid.sum().clamp_min(1).to(value.dtype)
    if weight is not None:
        value = weight.detach().to(value.dtype) * value
    return value.sum(), count


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
    (COMPILED,),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.need = inputs[-2:]
    ctx.set_materialize_grads(False)


def _backward(ops: Any, ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *scaled_gradients(g, *ctx.saved_tensors, *ctx.need), *(None,) * 7


gradient("info_nce_sum", _backward, _setup, (COMPILED,))
