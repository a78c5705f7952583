"""`medcl::pair_logsumexp`: log-sum-exp over the allowed candidates of every anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from .registration import compute_dtype, define, gradient, gradient_like, once_differentiable

_ROWS = "Tensor query, Tensor? key, Tensor? query_labels, Tensor? key_labels"
_OPTIONS = "str kinds, int ignore_index, float temperature, bool normalize, bool across"


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
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "temperature": temperature,
        "normalize": normalize,
        "across": across,
    }
    if select("pair_logsumexp", impl, query.device.type, query.dtype) == "reference":
        return reference.pair_logsumexp(
            query, key, query_labels=query_labels, key_labels=key_labels, kinds=kinds, **options
        )
    selections = len(kinds)
    return torch.ops.medcl.pair_logsumexp(
        query,
        key,
        per_selection(query_labels, selections),
        per_selection(key_labels, selections),
        ",".join(kinds),
        *options.values(),
    )


def per_selection(labels: Tensor | None, selections: int) -> Tensor | None:
    """`(S, B, L)` contiguous from `(S or 1, B, L)`."""
    if labels is None:
        return None
    return labels.expand(selections, -1, -1).contiguous()


def _fake(query: Tensor, key: Tensor | None, ql: Any, kl: Any, kinds: str, *_: Any) -> Tensor:
    shape = (kinds.count(",") + 1, query.shape[0], query.shape[2])
    return query.new_empty(shape, dtype=compute_dtype(query))


def _fake_backward(
    d_lse: Tensor, lse: Tensor, query: Tensor, key: Tensor | None, *rest: Any
) -> Any:
    need_query, need_key = rest[-2:]
    other = query if key is None else key
    return gradient_like(query, need_query), gradient_like(other, need_key and key is not None)


define(f"pair_logsumexp({_ROWS}, {_OPTIONS}) -> Tensor", _fake)
define(
    f"pair_logsumexp_backward(Tensor d_lse, Tensor lse, {_ROWS}, {_OPTIONS}, bool need_query, "
    "bool need_key) -> (Tensor, Tensor)",
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx: Any, d_lse: Tensor) -> tuple[Any, ...]:
    lse, query, key, query_labels, key_labels = ctx.saved_tensors
    need_query, need_key = ctx.needs_input_grad[:2]
    d_query, d_key = torch.ops.medcl.pair_logsumexp_backward(
        d_lse.contiguous(),
        lse,
        query,
        key,
        query_labels,
        key_labels,
        *ctx.options,
        need_query,
        need_key,
    )
    return d_query if need_query else None, d_key if need_key else None, *(None,) * 7


gradient("pair_logsumexp", _backward, _setup)
once_differentiable("pair_logsumexp_backward")
