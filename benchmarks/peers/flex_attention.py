"""torch's FlexAttention for its differentiable log-sum-exp: queries and keys are the rows, values
are as narrow as it takes them, and their average is thrown away.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import narrow, one_set, positive_mean, target_rows

VALUE_CHANNELS = 16  # the fewest that its kernels take


def _without_self(score: Tensor, batch: Any, head: Any, row: Tensor, column: Tensor) -> Tensor:
    return torch.where(row == column, -float("inf"), score)


@lru_cache
def _flex() -> Any:
    """Compiled, for without that it stores the matrix of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    # one graph per size, form and arithmetic; past the limit it would store the scores
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def log_sum_exp(q: Tensor, k: Tensor, temperature: float, exclude_self: bool) -> Tensor:
    """Over each row of `q @ k.T / temperature`, `(N,)`, in the dtype of `q`."""
    left, right = narrow(q)[None, None], narrow(k)[None, None]
    with torch.autocast(q.device.type, enabled=False):
        _, lse = _flex()(
            left,
            right,
            right[..., :VALUE_CHANNELS],
            score_mod=_without_self if exclude_self else None,
            scale=1.0 / temperature,
            return_lse=True,
        )
    return lse[0, 0].to(q.dtype)


def supervised_contrastive(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    pairs: str = "batch",
    form: str = "out",
    normalize: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Supervised contrast "out" of one set of pairs, positives by class sums."""
    (z,) = one_set("flex", pairs, features, form=form, normalize=normalize)
    lse = log_sum_exp(z, z, temperature, True)
    mean, count = positive_mean(z, labels.reshape(-1), temperature)
    return (lse - mean)[count > 0].mean()


def info_nce(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    *,
    temperature: float,
    pairs: str = "image",
    normalize: bool = True,
) -> Tensor:
    """InfoNCE of one set of pairs."""
    q, k = one_set("flex", pairs, query, key, normalize=normalize)
    # not k[index], whose gradient is a slow accumulation
    positive = (q * F.embedding(target_rows(positives, query, pairs), k)).sum(1) / temperature
    return (log_sum_exp(q, k, temperature, False) - positive).mean()
