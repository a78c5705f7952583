"""Class shares of patches of a label map.

A window is a box of cells around a centre c: per axis the offsets [low, high) from it. A window of
odd length L that is centred has low = -(L-1)/2, high = (L+1)/2. V is the part inside the map:

    r_k = #{v in V : y_v = k} / n,   k = 1 .. K                            (W1)

with n = #V ("clipped") or the size of the whole window ("full"). An empty V gives 0. Class 0 is
the background: it is counted in n and not returned. Labels have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Window = Sequence[tuple[int, int]]  # [low, high) per axis
NORMALIZERS = ("clipped", "full")


def patch_class_ratio(
    labels: Tensor,
    centers: Tensor,
    windows: Sequence[Window],
    *,
    num_classes: int,
    normalizer: str = "clipped",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(W1) for P windows around N centres of every image.

    Args:
        labels: `(B, *spatial)` integers in [0, num_classes), 2-D or 3-D.
        centers: `(N, dims)` int64 positions in array order, the same for all images.
        windows: P windows, each with `(low, high)` per axis.
        num_classes: counts the background: K = num_classes - 1.
        normalizer: "clipped" or "full".
        dtype: of the result; counts are exact, the quotient is rounded once.

    Returns:
        `(P, B, K, N)`.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be 'clipped' or 'full', got {normalizer!r}")
    result = []
    for window in windows:
        offsets = [torch.arange(low, high, device=labels.device) for low, high in window]
        box = torch.cartesian_prod(*offsets).reshape(-1, len(window))  # (V, dims)
        cells = centers.unsqueeze(1) + box  # (N, V, dims)
        axes = list(zip(cells.unbind(2), labels.shape[1:], strict=True))
        inside = torch.stack([(axis >= 0) & (axis < size) for axis, size in axes]).all(0)  # (N, V)
        at = [axis.clamp(0, size - 1) for axis, size in axes]
        found = labels[(slice(None), *at)]  # (B, N, V)
        number = inside.sum(1).clamp_min(1) if normalizer == "clipped" else len(box)  # (N,)
        counts = [((found == k) & inside).sum(2) for k in range(1, num_classes)]
        ratios = torch.stack(counts, 1).double() / number  # (B, K, N)
        result.append(ratios.to(dtype))
    return torch.stack(result)
