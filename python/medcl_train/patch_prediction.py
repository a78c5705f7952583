"""Prediction of whole volumes by a network that was trained on patches."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Volume


@torch.inference_mode()
def predict_patches(
    network: nn.Module,
    volume: Volume,
    *,
    patch: Sequence[int] | None = None,
    overlap: float = 0.5,
    head: str = "d1",
    device: torch.device | str = "cpu",
    batch_size: int = 4,
) -> np.ndarray:
    """Class ids (Z, H, W) uint8 on the prepared grid, 0 in its padding. The network is put into
    eval mode and back.

    Args:
        network: with `probabilities` and, without `patch`, `stride`: as UNet3d.
        patch: (z, y, x) of the window, as in training. None: the whole volume at once, padded with
            zeros to multiples of the network's stride; faster, but instance normalisation then sees
            another part of the image than in training.
        overlap: share of a window, per axis, that its neighbour covers too, at least. Softmax maps
            are averaged with Gaussian weights, sd an eighth of the window (as nnU-Net).
        batch_size: windows per pass.
    """
    training = network.training
    network.eval()
    image = torch.from_numpy(np.ascontiguousarray(volume.image[volume.content]))
    if patch is None:
        size = next_multiples(image.shape, network.stride)
        batch_size = 1
    else:
        size = list(patch)
    padded, shown = centred_in_zeros(
        image, [max(a, b) for a, b in zip(image.shape, size, strict=True)]
    )
    starts = [_starts(n, want, overlap) for n, want in zip(padded.shape, size, strict=True)]
    windows = [
        tuple(slice(a, a + n) for a, n in zip(corner, size, strict=True))
        for corner in product(*starts)
    ]
    weight = _gaussian(size)
    total: Tensor | None = None
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        batch = torch.stack([padded[w] for w in part])[:, None].to(device)
        maps = network.probabilities(batch, head).cpu()
        if total is None:
            total = torch.zeros(maps.shape[1], *padded.shape)
        for window, found in zip(part, maps, strict=True):
            total[(slice(None), *window)] += found * weight
    network.train(training)
    prediction = np.zeros(volume.image.shape, dtype=np.uint8)
    prediction[volume.content] = total[(slice(None), *shown)].argmax(0).numpy()
    return prediction


def next_multiples(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The smallest multiples of the stride that hold the size, per axis."""
    return [-(-length // step) * step for length, step in zip(size, stride, strict=True)]


def centred_in_zeros(image: Tensor, size: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """The image padded to a size, and where it is in there."""
    before = [(want - have) // 2 for have, want in zip(image.shape, size, strict=True)]
    widths: list[int] = []
    for low, have, want in zip(before, image.shape, size, strict=True):
        widths = [low, want - have - low, *widths]  # F.pad counts axes from the last
    shown = tuple(slice(a, a + n) for a, n in zip(before, image.shape, strict=True))
    return F.pad(image, widths), shown


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """Evenly spread first voxels of windows that cover an axis."""
    step = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // step) + 1
    if count == 1:
        return [0]
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def _gaussian(size: Sequence[int]) -> Tensor:
    """Weights of a window; e^-24 at its corners."""
    weight = torch.ones(())
    for length in size:
        place = torch.arange(length) - (length - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (place / (length / 8)) ** 2)
    return weight
