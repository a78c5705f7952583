"""`pair_argmax`: the most similar key row of the same image, ties to the smallest index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose
from .registration import compute_dtype, define, kernels


def pair_argmax(
    query: Tensor, key: Tensor, *, normalize: bool = True, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """See `medcl_kernels.reference.pair_argmax`, whose signature this is, plus `impl`."""
    query, key = query.detach(), key.detach()
    backend = choose("pair_argmax", impl, query)
    if backend == "reference":
        return reference.pair_argmax(query, key, normalize=normalize)
    return kernels(backend).pair_argmax(query, key, normalize)


def _fake(query: Tensor, key: Tensor, normalize: bool) -> tuple[Any, Any]:
    shape = (query.shape[0], query.shape[2])
    index = query.new_empty(shape, dtype=torch.int64)
    return index, query.new_empty(shape, dtype=compute_dtype(query))


define("pair_argmax(Tensor query, Tensor key, bool normalize) -> (Tensor, Tensor)", _fake)
