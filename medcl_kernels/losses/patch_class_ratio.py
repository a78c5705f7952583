"""Class shares of patches around given cells: reference/patch_class_ratio.py (W1) with centred
windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..ops.patch_class_ratio import patch_class_ratio as windows_class_ratio
from ..reference.patch_class_ratio import NORMALIZERS, Window

Sizes = Sequence[int | Sequence[int]]


def patch_class_ratio(
    labels: Tensor,
    centers: Tensor,
    sizes: Sizes,
    *,
    num_classes: int,
    normalizer: str = "clipped",
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Share of every foreground class in windows of P sizes around N cells, for all images at once.

    Equals, for one 2-D map, one centre (r, c) and one size L, away from the border:
        h = (L - 1) // 2
        patch = labels[r - h : r + h + 1, c - h : c + h + 1]
        torch.stack([(patch == k).float().mean() for k in range(1, num_classes)])

    Args:
        labels: `(B, *spatial)` or `(B, 1, *spatial)` integers in [0, num_classes), 2-D or 3-D; any
            strides. On a GPU values are looked at with MEDCL_CHECK_FINITE=1 only; without it, other
            ids are cells of no class.
        centers: `(N, dims)` integers, positions in array order (row, column), inside the map; the
            same for all images.
        sizes: P odd window lengths in cells of `labels`, each one number or one per axis, none
            longer than the map. Windows are clipped to the map.
        num_classes: counts the background: K = num_classes - 1 >= 1.
        normalizer: "clipped" divides by the cells of the window inside the map, "full" by those of
            the whole window.
        dtype: of the result, float32 or float64; the counts behind it are exact.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.

    Returns:
        `(P, B, K, N)`, no gradient.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> labels = torch.randint(0, 3, (2, 64, 64))
        >>> centers = torch.tensor([[10, 12], [40, 41]])
        >>> ratios = medcl.patch_class_ratio(labels, centers, (5, 7, 9), num_classes=3)
    """
    labels = label_map(labels, num_classes)
    shape = tuple(labels.shape[1:])
    checks.choice("normalizer", normalizer, NORMALIZERS)
    checks.choice("impl", impl, checks.IMPLS)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    _check_centers(centers, labels, shape)
    windows = [centered(size, shape, f"sizes[{place}]") for place, size in enumerate(sizes)]
    if not windows:
        raise ValueError("sizes must hold at least one window length; got none")
    return windows_class_ratio(
        labels,
        centers.long(),
        windows,
        num_classes=num_classes,
        normalizer=normalizer,
        dtype=dtype,
        impl=impl,
    )


def label_map(labels: Tensor, num_classes: int) -> Tensor:
    """`(B, *spatial)` from `(B, [1,] *spatial)`, checked against `num_classes`."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor; got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"labels must hold integers; got {labels.dtype}: convert with labels.long()"
        )
    shape = checks.shape_of(labels)
    if labels.dim() > 3 and shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.dim() not in (3, 4):
        raise ValueError(
            "labels must be (B, H, W) or (B, D, H, W), with or without a channel axis of 1; got "
            f"{shape}. One-hot maps become class numbers with labels.argmax(1)"
        )
    if labels.numel() == 0:
        raise ValueError(f"labels are empty: shape {shape}")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(
            f"num_classes must be an integer of at least 2, the background counted; got "
            f"{num_classes!r}"
        )
    if labels.dtype != torch.bool and checks.readable(labels):
        smallest, largest = (int(bound) for bound in labels.aminmax())
        if smallest < 0 or largest >= num_classes:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(
                f"labels must be in [0, {num_classes}), num_classes with the background; got "
                f"{wrong} first at {_first(labels, wrong)}. Map void and ignored labels to a class "
                "first; masks of 0 and 255 become classes with labels // 255"
            )
    return labels


def _first(labels: Tensor, value: int) -> tuple[int, ...]:
    """(image, *position) of the first cell with this value."""
    return tuple(int(axis) for axis in (labels == value).nonzero()[0])


def _check_centers(centers: Tensor, labels: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(centers, Tensor):
        raise TypeError(f"centers must be a torch.Tensor; got {type(centers).__name__}")
    if centers.is_floating_point() or centers.is_complex() or centers.dtype == torch.bool:
        raise TypeError(
            f"centers must hold integer positions; got {centers.dtype}: convert with "
            "centers.round().long()"
        )
    if centers.dim() != 2 or centers.shape[1] != len(shape) or centers.shape[0] == 0:
        raise ValueError(
            f"centers must be (N, {len(shape)}), one position (in array order) per window of a map "
            f"of {shape}; got {checks.shape_of(centers)}"
        )
    checks.same_kind(labels, "labels", centers, "centers", dtype=False)
    if checks.readable(centers):
        outside = (centers < 0) | (centers >= torch.tensor(shape, device=centers.device))
        if outside.any():
            place = int(outside.any(1).nonzero()[0])
            raise ValueError(
                f"centers must lie inside the map of {shape}; centers[{place}] is "
                f"{tuple(centers[place].tolist())}. Array order is (row, column), not (x, y)"
            )


def centered(size: int | Sequence[int], shape: tuple[int, ...], name: str) -> Window:
    """The window of an odd size around a centre, checked against the map.

    Args:
        size: one length, or one per axis.
        shape: of the map.
        name: for the message.
    """
    lengths = (size,) * len(shape) if isinstance(size, int) else tuple(size)
    if len(lengths) != len(shape) or any(length < 1 or length % 2 == 0 for length in lengths):
        raise ValueError(
            f"{name} must be an odd length, or one per axis ({len(shape)}), so that the window has "
            f"a centre; got {size!r}"
        )
    fits(lengths, shape, name)
    return tuple((-(length // 2), length // 2 + 1) for length in lengths)


def fits(lengths: Sequence[int], shape: tuple[int, ...], name: str) -> None:
    """A window larger than the map would see all of it from everywhere."""
    for axis, (length, room) in enumerate(zip(lengths, shape, strict=True)):
        if length > room:
            raise ValueError(
                f"{name} is a window of {tuple(lengths)} cells, larger than the labels, {shape}, "
                f"in axis {axis}: take smaller windows or layers with a smaller receptive field"
            )
