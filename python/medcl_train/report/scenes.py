"""Test cases as the pictures of PDCR need them, and the numbers behind these pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import pdcr
from ..data.patches import cut, first_voxel
from .page import picture_of

_CASES = 8


@dataclass(frozen=True)
class Scene:
    """A case as pictures need it.

    image: (1, C, *spatial), label: (1, *spatial), a photograph or a patch of a volume. drawn: what
    is shown, (H, W, 3) or (H, W); `index` takes it from the grid. aspect: height of a pixel over
    its width.
    """

    name: str
    image: Tensor
    label: Tensor
    drawn: np.ndarray
    index: Any
    aspect: float

    @property
    def truth(self) -> np.ndarray:
        """The drawn part of the label."""
        return self.label[0].numpy()[self.index]


def scenes_of(cases: Sequence, size: Sequence[int]) -> list[Scene]:
    """A few cases spread over the range of foreground sizes: the middle one first, then those at a
    quarter and at three quarters."""
    ranked = sorted(cases, key=lambda case: float((case.label > 0).mean()))
    spread = np.concatenate([(0.5, 0.25, 0.75), np.linspace(0.05, 0.95, _CASES - 3)])
    chosen = dict.fromkeys(int(share * (len(ranked) - 1) + 0.5) for share in spread)
    return [scene_of(ranked[place], size) for place in chosen]


def scene_of(case, size: Sequence[int]) -> Scene:
    """A Picture whole; of a Volume the patch of this size, as in training, around the foreground of
    the slice that has most of it."""
    drawn, index, aspect = picture_of(case)
    image, label = case.image, case.label
    if drawn.ndim == 2:
        image, label = image[case.content], label[case.content]
        z = index[0]
        middle = (z, *np.argwhere(label[z] > 0).mean(0).astype(int))
        start = first_voxel(middle, label.shape, size)
        image, label = cut(image, start, size)[None], cut(label, start, size)
        index = int((label > 0).sum((1, 2)).argmax())
        drawn = image[0, index]
    image, label = torch.from_numpy(image)[None], torch.from_numpy(label)[None].long()
    return Scene(case.case.case_id, image, label, drawn, index, aspect)


class Cells(NamedTuple):
    """What PDCR compares of a layer.

    features: (N, C). shares: (N, K) of the foreground classes in the patches, mean over their
    sizes. places: (N, dims) in the grid of the image. kind: (N,) class of the voxel there.
    """

    features: np.ndarray
    shares: np.ndarray
    places: np.ndarray
    kind: np.ndarray


@torch.no_grad()
def sampled(scene: Scene, network: nn.Module, contrast: pdcr.Contrast) -> dict[str, Cells]:
    """The cells of every contrasted layer."""
    with pdcr.Taps(network, contrast.taps) as taps:
        network(scene.image)
    found = {}
    for name in contrast.names:
        features, shares, places = contrast.sampled(name, taps.features, scene.label)
        kind = scene.label[0][places.unbind(1)].numpy()
        found[name] = Cells(
            features[0].T.numpy(), shares.mean(0)[0].T.numpy(), places.numpy(), kind
        )
    return found


def with_background(shares: np.ndarray) -> np.ndarray:
    """(N, 1 + K) shares of all classes."""
    return np.concatenate([1 - shares.sum(1, keepdims=True), shares], axis=1)


def by_class(shares: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Order of cells by their class, inside the background from pure patches to mixed ones, inside
    the others from mixed to pure."""
    share = with_background(shares)[np.arange(len(kind)), kind]
    return np.lexsort((np.where(kind == 0, -share, share), kind))


def unit_rows(features: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(length, 1e-8)


def cosine(features: np.ndarray) -> np.ndarray:
    unit = unit_rows(features)
    return unit @ unit.T


def correlation(wanted: np.ndarray, found: np.ndarray) -> float:
    """Of two symmetric matrices over the pairs of different cells; NaN where one is constant."""
    pairs = np.triu_indices(len(wanted), 1)
    a, b = wanted[pairs], found[pairs]
    if a.std() < 1e-7 or b.std() < 1e-7:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def mean_cosines(unit: np.ndarray, kind: np.ndarray) -> tuple[float, float]:
    """Mean cosine over pairs inside one class, and of different classes; NaN without pairs."""
    pairs = np.triu_indices(len(unit), 1)
    same = kind[pairs[0]] == kind[pairs[1]]
    cosine = (unit @ unit.T)[pairs]
    means = [cosine[these].mean() if these.any() else float("nan") for these in (same, ~same)]
    return float(means[0]), float(means[1])


def principal(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N, 2) on the two main axes, and their shares of the variance."""
    centred = (features - features.mean(0)).astype(np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return (u * s)[:, :2], s[:2] ** 2 / max(float((s**2).sum()), 1e-12)
