"""`pair_topk`: the pairs with the largest gradient, exact and without the pair matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose
from .registration import compute_dtype, contiguous, define, kernels


def pair_topk(
    query: Tensor,
    key: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positives: Tensor | None = None,
    statistics: Tensor,
    k: Tensor,
    capacity: int = 0,
    form: str = "out",
    score: str = "pair",
    scope: str = "image",
    ignore_index: int = -100,
    temperature: float,
    normalize: bool = True,
    across: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `medcl_kernels.reference.pair_topk`, whose signature this is, plus `impl`."""
    query, key = query.detach(), None if key is None else key.detach()
    backend = choose("pair_topk", impl, query)
    if backend == "reference":
        return reference.pair_topk(
            query,
            key,
            query_labels=query_labels,
            key_labels=key_labels,
            positives=positives,
            statistics=statistics,
            k=k,
            capacity=capacity,
            form=form,
            score=score,
            scope=scope,
            ignore_index=ignore_index,
            temperature=temperature,
            normalize=normalize,
            across=across,
        )
    return kernels(backend).pair_topk(
        query,
        key,
        contiguous(query_labels),
        contiguous(key_labels),
        contiguous(positives),
        statistics.detach().contiguous(),
        k.contiguous(),
        capacity,
        form,
        score,
        scope,
        ignore_index,
        temperature,
        normalize,
        across,
    )


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    query, k, capacity = inputs[0], inputs[6], inputs[7]
    index = query.new_empty(capacity, dtype=torch.int64)
    gradient = query.new_empty(capacity, dtype=compute_dtype(query))
    threshold = query.new_empty(k.shape, dtype=compute_dtype(query))
    return index, torch.empty_like(index), gradient, threshold, torch.empty_like(k)


define(
    "pair_topk(Tensor query, Tensor? key, Tensor? query_labels, Tensor? key_labels, "
    "Tensor? positives, Tensor statistics, Tensor k, int capacity, str form, str score, str scope, "
    "int ignore_index, float temperature, bool normalize, bool across) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
