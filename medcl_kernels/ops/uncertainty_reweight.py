"""`uncertainty_reweight`: features times two minus the entropy of a few logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose
from .registration import define, gradient, gradient_like, kernels, once_differentiable


def uncertainty_reweight(features: Tensor, logits: Tensor, *, impl: str = "auto") -> Tensor:
    """See `medcl_kernels.reference.uncertainty_reweight`, whose signature this is, plus `impl`."""
    backend = choose("uncertainty_reweight", impl, features)
    if backend == "reference":
        return reference.uncertainty_reweight(features, logits)
    return kernels(backend).uncertainty_reweight(features, logits)


def _fake(features: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(features)


def _fake_backward(
    d_out: Tensor, features: Tensor, logits: Tensor, need_features: bool, need_logits: bool
) -> tuple[Tensor, Tensor]:
    return gradient_like(features, need_features), gradient_like(logits, need_logits)


define("uncertainty_reweight(Tensor features, Tensor logits) -> Tensor", _fake)
define(
    "uncertainty_reweight_backward(Tensor d_out, Tensor features, Tensor logits, "
    "bool need_features, bool need_logits) -> (Tensor, Tensor)",
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ops: Any, ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    need_features, need_logits = ctx.needs_input_grad[:2]
    d_features, d_logits = ops.uncertainty_reweight_backward(
        d_out, *ctx.saved_tensors, need_features, need_logits
    )
    return d_features if need_features else None, d_logits if need_logits else None


gradient("uncertainty_reweight", _backward, _setup)
once_differentiable("uncertainty_reweight_backward")
