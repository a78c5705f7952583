"""`pair_logsumexp`: log-sum-exp over the allowed candidates of every anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from ..dispatch import choose
from .registration import (
    compute_dtype,
    define,
    define_backward,
    gradient,
    kernels,
    row_gradients,
    save_inputs,
)


def pair_logsumexp(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    kinds: Sequence[str] = ("all",),
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.pair_logsumexp`, whose signature this is, plus `impl`."""
    backend = choose("pair_logsumexp", impl, query)
    if backend == "reference":
        return reference.pair_logsumexp(
            query,
            key,
            query_labels=query_labels,
            key_labels=key_labels,
            kinds=kinds,
            ignore_index=ignore_index,
            temperature=temperature,
            normalize=normalize,
            across=across,
        )
    return kernels(backend).pair_logsumexp(
        query,
        key,
        _per_selection(query_labels, len(kinds)),
        _per_selection(key_labels, len(kinds)),
        ",".join(kinds),
        ignore_index,
        temperature,
        normalize,
        across,
    )


def _per_selection(labels: Tensor | None, selections: int) -> Tensor | None:
    """`(S, B, L)` contiguous from `(S or 1, B, L)`."""
    return None if labels is None else labels.expand(selections, -1, -1).contiguous()


def _fake(query: Tensor, key: Any, query_labels: Any, key_labels: Any, kinds: str, *_: Any) -> Any:
    shape = (kinds.count(",") + 1, query.shape[0], query.shape[2])
    return query.new_empty(shape, dtype=compute_dtype(query))


_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor? query_labels, Tensor? key_labels, str kinds, "
    "int ignore_index, float temperature, bool normalize, bool across"
)
define(f"pair_logsumexp({_ARGUMENTS}) -> Tensor", _fake)
define_backward("pair_logsumexp", "Tensor d_lse, Tensor lse", _ARGUMENTS)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_inputs(ctx, inputs, output)


def _backward(ops: Any, ctx: Any, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    lse, *inputs = ctx.saved_tensors
    return row_gradients(ops.pair_logsumexp_backward, ctx, (d_lse.contiguous(), lse), tuple(inputs))


gradient("pair_logsumexp", _backward, _setup)
