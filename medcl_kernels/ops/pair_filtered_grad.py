"""`pair_filtered_grad`: values handed through, with the gradient of the selected pairs only."""

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


def pair_filtered_grad(
    value: Tensor,
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positives: Tensor | None = None,
    statistics: Tensor,
    threshold: Tensor | None = None,
    cut: Tensor | None = None,
    anchor: Tensor | None = None,
    candidate: Tensor | None = None,
    gradient: Tensor | None = None,
    form: str = "out",
    score: str = "pair",
    scope: str = "image",
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.pair_filtered_grad`, whose signature this is, plus `impl`."""
    backend = choose("pair_filtered_grad", impl, query)
    if backend == "reference":
        return reference.pair_filtered_grad(
            value,
            query,
            key,
            query_labels=query_labels,
            key_labels=key_labels,
            positives=positives,
            statistics=statistics,
            threshold=threshold,
            cut=cut,
            anchor=anchor,
            candidate=candidate,
            gradient=gradient,
            form=form,
            score=score,
            scope=scope,
            ignore_index=ignore_index,
            temperature=temperature,
            normalize=normalize,
            across=across,
        )
    return kernels(backend).pair_filtered_grad(
        query,
        key,
        value.detach().to(compute_dtype(query)).contiguous(),
        contiguous(query_labels),
        contiguous(key_labels),
        contiguous(positives),
        statistics.detach().contiguous(),
        contiguous(threshold),
        contiguous(cut),
        contiguous(anchor),
        contiguous(candidate),
        contiguous(gradient),
        form,
        score,
        scope,
        ignore_index,
        temperature,
        normalize,
        across,
    )


def _fake(query: Tensor, key: Any, value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value)


_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor value, Tensor? query_labels, Tensor? key_labels, "
    "Tensor? positives, Tensor statistics, Tensor? threshold, Tensor? cut, Tensor? anchor, "
    "Tensor? candidate, Tensor? gradient, str form, str score, str scope, int ignore_index, "
    "float temperature, bool normalize, bool across"
)
define(f"pair_filtered_grad({_ARGUMENTS}) -> Tensor", _fake)
define_backward("pair_filtered_grad", "Tensor d_value", _ARGUMENTS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_inputs(ctx, inputs)


def _backward(ops: Any, ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
    operation = ops.pair_filtered_grad_backward
    return row_gradients(operation, ctx, (d_value.contiguous(),), ctx.saved_tensors)


gradient("pair_filtered_grad", _backward, _setup)
