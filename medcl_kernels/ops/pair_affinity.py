"""`pair_affinity`: affinity-weighted log-sum-exp and sum over all pairs, P patch sizes at
once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose
from .registration import (
    compute_dtype,
    define,
    gradient,
    gradient_like,
    kernels,
    once_differentiable,
    save_inputs,
)


def pair_affinity(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_ratios: Tensor,
    key_ratios: Tensor | None = None,
    shift: Tensor | None = None,
    form: str = "affinity",
    temperature: float,
    normalize: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See `medcl_kernels.reference.pair_affinity`, whose signature this is, plus `impl`."""
    options: dict[str, Any] = {"form": form, "temperature": temperature, "normalize": normalize}
    backend = choose("pair_affinity", impl, query)
    if backend == "reference":
        return reference.pair_affinity(
            query,
            key,
            query_ratios=query_ratios,
            key_ratios=key_ratios,
            shift=shift,
            **options,
        )
    dtype = compute_dtype(query)
    return kernels(backend).pair_affinity(
        query,
        key,
        query_ratios.detach().to(dtype).contiguous(),
        None if key_ratios is None else key_ratios.detach().to(dtype).contiguous(),
        None if shift is None else shift.to(dtype),
        *options.values(),
    )


def _fake(query: Tensor, key: Any, query_ratios: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (query_ratios.shape[0], query.shape[0], query.shape[2])
    log_z = query.new_empty(shape, dtype=compute_dtype(query))
    return log_z, torch.empty_like(log_z)


def _fake_backward(
    d_log_z: Tensor,
    d_linear: Tensor,
    log_z: Tensor,
    query: Tensor,
    key: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_query, need_key = rest[-3:-1]
    other = query if key is None else key
    return (
        gradient_like(query, need_query),
        gradient_like(other, need_key and key is not None),
        log_z.new_empty(()),
    )


_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor query_ratios, Tensor? key_ratios, Tensor? shift, str form, "
    "float temperature, bool normalize"
)
define(f"pair_affinity({_ARGUMENTS}) -> (Tensor, Tensor)", _fake)
define(
    f"pair_affinity_backward(Tensor d_log_z, Tensor d_linear, Tensor log_z, {_ARGUMENTS}, "
    "bool need_query, bool need_key, bool need_shift) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
once_differentiable("pair_affinity_backward")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, inputs, output[0])


def _backward(ops: Any, ctx: Any, d_log_z: Tensor, d_linear: Tensor) -> tuple[Any, ...]:
    need_query, need_key, _, _, need_shift = ctx.needs_input_grad[:5]
    d_query, d_key, d_shift = ops.pair_affinity_backward(
        d_log_z.contiguous(),
        d_linear.contiguous(),
        *ctx.saved_tensors,
        *ctx.options,
        need_query,
        need_key,
        need_shift,
    )
    return (
        d_query if need_query else None,
        d_key if need_key else None,
        None,
        None,
        d_shift if need_shift else None,
        *(None,) * len(ctx.options),
    )


gradient("pair_affinity", _backward, _setup)
