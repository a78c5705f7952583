"""In-plane resizing, centre crop or pad, and their inverses, on (Z, H, W) arrays.

Interpolation is scipy.ndimage.zoom slice by slice; z is never touched. Equal sizes are returned
unchanged, so labels at equal spacing survive the round trip exactly.
"""

import numpy as np
from scipy import ndimage


def resize_image(volume, shape, order: int, align_corners: bool = False):
    """(Z, H, W) float32 to (Z, *shape). Edges are repeated, so borders do not darken."""
    if tuple(volume.shape[1:]) == tuple(shape):
        return volume
    factors = [new / old for new, old in zip(shape, volume.shape[1:], strict=True)]
    slices = [
        ndimage.zoom(s, factors, order=order, mode="nearest", grid_mode=not align_corners)
        for s in volume
    ]
    return np.stack(slices).astype(volume.dtype, copy=False)


def resize_label(label, shape, order: int, align_corners: bool = False):
    """(Z, H, W) uint8 to (Z, *shape). order 0: nearest pixel; 1: linear per class, then argmax
    (ties to the smaller class)."""
    if tuple(label.shape[1:]) == tuple(shape):
        return label
    if order == 0:
        return resize_image(label, shape, 0, align_corners)
    resized = np.zeros((label.shape[0], *shape), dtype=np.uint8)
    for z, plane in enumerate(label):
        classes = np.unique(plane)
        scores = [
            resize_image((plane == c).astype(np.float32)[None], shape, 1, align_corners)[0]
            for c in classes
        ]
        resized[z] = classes[np.argmax(scores, axis=0)]
    return resized


def _windows(have: int, want: int) -> tuple[slice, slice]:
    """Matching windows (source, target) of one axis: crop from (have - want) // 2, or pad with
    (want - have) // 2 in front."""
    if have >= want:
        start = (have - want) // 2
        return slice(start, start + want), slice(0, want)
    start = (want - have) // 2
    return slice(0, have), slice(start, start + have)


def shown_part(shape, size):
    """(rows, columns) of a result of `crop_or_pad` from in-plane `shape` to `size` that are not
    padding."""
    return tuple(_windows(have, want)[1] for have, want in zip(shape, size, strict=True))


def crop_or_pad(volume, size):
    """(Z, H, W) to (Z, *size), centred, zeros outside."""
    rows, out_rows = _windows(volume.shape[1], size[0])
    columns, out_columns = _windows(volume.shape[2], size[1])
    result = np.zeros((volume.shape[0], *size), dtype=volume.dtype)
    result[:, out_rows, out_columns] = volume[:, rows, columns]
    return result


def undo_crop_or_pad(volume, shape):
    """Inverse of `crop_or_pad` for an original of in-plane `shape`; what was cut off is 0."""
    rows, in_rows = _windows(shape[0], volume.shape[1])
    columns, in_columns = _windows(shape[1], volume.shape[2])
    result = np.zeros((volume.shape[0], *shape), dtype=volume.dtype)
    result[:, rows, columns] = volume[:, in_rows, in_columns]
    return result
