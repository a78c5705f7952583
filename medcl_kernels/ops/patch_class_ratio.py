"""`patch_class_ratio`: class shares of windows of a label map, P windows at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..dispatch import choose
from ..reference.patch_class_ratio import Window
from .registration import define, kernels


def patch_class_ratio(
    labels: Tensor,
    centers: Tensor,
    windows: Sequence[Window],
    *,
    num_classes: int,
    normalizer: str = "clipped",
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """See `medcl_kernels.reference.patch_class_ratio`, whose signature this is, plus `impl`."""
    backend = choose("patch_class_ratio", impl, labels, dtype)
    if backend == "reference":
        return reference.patch_class_ratio(
            labels, centers, windows, num_classes=num_classes, normalizer=normalizer, dtype=dtype
        )
    bounds = [bound for window in windows for axis in window for bound in axis]
    return kernels(backend).patch_class_ratio(
        labels,
        centers.contiguous(),
        bounds,
        num_classes,
        normalizer == "full",
        dtype == torch.float64,
    )


def _fake(
    labels: Tensor, centers: Tensor, windows: list[int], num_classes: int, full: bool, double: bool
) -> Tensor:
    patches = len(windows) // (2 * centers.shape[1])
    shape = (patches, labels.shape[0], num_classes - 1, centers.shape[0])
    return labels.new_empty(shape, dtype=torch.float64 if double else torch.float32)


define(
    "patch_class_ratio(Tensor labels, Tensor centers, int[] windows, int num_classes, bool full, "
    "bool double) -> Tensor",
    _fake,
)
