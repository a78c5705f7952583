"""Which key pixel matches which query pixel: reference/pair_argmax.py (X1), one way or mutual."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..layout import row_shape, rows
from ..ops.pair_argmax import pair_argmax


@torch.no_grad()
@checks.explains_memory
def dense_correspondence(
    query: Tensor,
    key: Tensor,
    *,
    mutual: bool = False,
    normalize: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Index of the most similar key pixel of the same image, for every query pixel.

    Equals, for flat `(N, C)` input:
        (F.normalize(query) @ F.normalize(key).T).argmax(1)

    Args:
        query: `(B, C, *spatial)` or `(N, C)`. DenseCL and IDEAL match on the encoder's maps, not on
            the projections.
        key: same B and C; its spatial shape may differ.
        mutual: keep a match only if the key pixel's own best query pixel is this one, else -1.
        normalize: compare directions only (cosine).
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        `(B, *spatial)` int64, flat index into the key pixels; ties go to the smallest index; -1
        where not mutual. No gradient. With bfloat16 or float16 input near-ties may fall either way.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> index = medcl.dense_correspondence(torch.randn(2, 64, 7, 7), torch.randn(2, 64, 7, 7),
        mutual=True)
    """
    checks.features(query, "query")
    checks.key_features(query, key)
    checks.choice("impl", impl, checks.IMPLS)
    q, k = rows(query), rows(key)
    checks.finite(q, "query")
    checks.finite(k, "key")
    index = pair_argmax(q, k, normalize=normalize, impl=impl)[0]
    if mutual:
        back = pair_argmax(k, q, normalize=normalize, impl=impl)[0]
        itself = torch.arange(q.shape[2], device=q.device)
        index = torch.where(back.gather(1, index) == itself, index, -1)
    return index.reshape(row_shape(query))
