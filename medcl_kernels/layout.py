"""The canonical row form: what every operation sees, whatever the user passed.

Features `(B, C, *spatial)` or flat `(N, C)` become a strided VIEW `(B, D, L)`: B images, D
channels, L pixels. Nothing is copied as long as the spatial strides merge (NCHW, NCDHW,
channels_last, slices of a channel axis, flat rows of any stride); kernels read the strides and pack
tile by tile. Row `(b, l)` has the index `b * L + l` wherever all images are contrasted with each
other.
"""

from __future__ import annotations

from torch import Tensor


def rows(features: Tensor) -> Tensor:
    """View features as rows.

    Args:
        features: `(B, C, *spatial)` with at least one spatial axis, or flat `(N, C)`.

    Returns:
        `(B, C, L)`, L the product of the spatial sizes; flat input gives `(1, C, N)`. A view,
        except where the spatial strides do not merge into one (for example H and W swapped and the
        tensor not contiguous).
    """
    if features.dim() == 2:
        return features.t().unsqueeze(0)
    return features if features.dim() == 3 else features.flatten(2)


def label_rows(labels: Tensor, features: Tensor) -> Tensor:
    """View a map of integers as rows that match `rows(features)`.

    Args:
        labels: `(B, *spatial)` or `(B, 1, *spatial)` integers; `(N,)` or `(N, 1)` for flat
            features.
        features: the features that the labels describe.

    Returns:
        `(B, L)` int64; flat input gives `(1, N)`.
    """
    if features.dim() == 2:
        return labels.reshape(1, -1).long()
    return labels.reshape(features.shape[0], -1).long()


def row_shape(features: Tensor) -> tuple[int, ...]:
    """Shape of one value per pixel: `(B, *spatial)`, or `(N,)` for flat features."""
    if features.dim() == 2:
        return (features.shape[0],)
    return (features.shape[0], *features.shape[2:])


def num_rows(features: Tensor) -> tuple[int, int]:
    """`(B, L)` of `rows(features)` without making the view."""
    shape = row_shape(features)
    if len(shape) == 1:
        return 1, shape[0]
    length = 1
    for size in shape[1:]:
        length *= size
    return shape[0], length
