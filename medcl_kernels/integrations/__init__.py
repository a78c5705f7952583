"""Adapters for other frameworks, one module each: `monai`, `nnunet`, `lightning`,
`metric_learning`.

Nothing of the package imports them, and each imports its framework; where that is missing, the
error says what to install.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def host(package: str, *modules: str) -> Any:
    """The first of `modules` that can be imported.

    Raises:
        ImportError: none can; the message says how to install `package`.
    """
    reasons = []
    for module in modules:
        try:
            return import_module(module)
        except ImportError as error:
            reasons.append(f"{module}: {error}")
    raise ImportError(
        f"this integration needs {' or '.join(modules)}, which cannot be imported "
        f"({'; '.join(reasons)}): install it with `pip install {package}`"
    )


def labels_at(features: Tensor, labels: Tensor) -> Tensor:
    """Labels as frameworks hand them over, as the losses take them.

    Args:
        features: `(B, C, *spatial)`, or `(N, C)`.
        labels: `(B, 1, *spatial')` or `(B, *spatial')` of any resolution, or `(N,)`; integers, or
            floats with whole values.

    Returns:
        `(B, *spatial)` int64 at the features' resolution, by nearest neighbours; or `(N,)`.
    """
    labels = labels.as_subclass(Tensor)
    if features.dim() > 2 and labels.dim() == features.dim() and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if features.dim() > 2 and labels.dim() == features.dim() - 1:
        size = tuple(features.shape[2:])
        if tuple(labels.shape[1:]) != size:
            # float64 holds every class number that anyone has
            labels = F.interpolate(labels.unsqueeze(1).double(), size, mode="nearest-exact")
            labels = labels.squeeze(1)
    return labels.long()  # what is left to complain about, the loss does
