"""InfoNCE as torch's chunked linear layer with cross entropy: keys are the weights of the classes.

torch makes the gradients in the forward pass, as the package does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import narrow, one_set, target_rows


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
    q, k = one_set("lce", pairs, query, key, normalize=normalize)
    target = target_rows(positives, query, pairs)
    options = torch.nn.LinearCrossEntropyOptions()
    logits, keys = narrow(q / temperature), narrow(k)
    with torch.autocast(q.device.type, enabled=False):
        return F.linear_cross_entropy(logits, keys, target, options=options).to(q.dtype)
