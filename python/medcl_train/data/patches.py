"""Random patches of prepared volumes, for training in 3-D, and their augmentation."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from .augment import Augmentation, jitter_intensity, random_geometry, warp
from .datasets import known_subjects, missing_classes
from .errors import DataError
from .volume import Volume


class PatchDataset:
    """Volumes in memory; a batch has one patch per index.

    Only the part of a volume that shows the file is used (`Volume.content`); where it is smaller
    than a patch it is centred in zeros.

    Args:
        volumes: prepared, with labels.
        patch: (z, y, x) voxels.
        foreground: share of the patches of a batch, rounded, that have a random voxel of a random
            foreground class in their middle, or nearer to the edge where the volume ends; the
            others lie anywhere. nnU-Net: 1/3.

    Raises: DataError without a volume or where a label is missing.
    """

    def __init__(
        self, volumes: Sequence[Volume], patch: Sequence[int], *, foreground: float = 1 / 3
    ):
        self.volumes, self.patch = list(volumes), tuple(patch)
        self.foreground = foreground
        bare = [volume.case.case_id for volume in self.volumes if volume.label is None]
        if not self.volumes or bare:
            found = f"no label for {', '.join(bare)}" if bare else "no volume"
            raise DataError(f"PatchDataset: {found}. Fix: check the split and the label files")
        if len(self.patch) != 3 or min(self.patch) < 1 or not 0 <= foreground <= 1:
            raise ValueError(
                "patch must be three positive numbers and foreground a share from 0 to 1; got "
                f"{self.patch} and {foreground}"
            )
        self._images = [v.image[v.content] for v in self.volumes]
        self._labels = [v.label[v.content] for v in self.volumes]
        self._voxels = [
            [np.argwhere(label == value) for value in np.unique(label) if value]
            for label in self._labels
        ]

    def __len__(self) -> int:
        return len(self.volumes)

    def indices(self, subjects: Iterable[str]) -> list[int]:
        """Indices of the volumes of these subjects."""
        wanted = known_subjects(subjects, self.volumes)
        return [i for i, volume in enumerate(self.volumes) if volume.case.subject in wanted]

    def batch(
        self, indices: Sequence[int], generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Patches of these volumes at places drawn from the generator.

        Returns: images (B, 1, *patch) float32; labels (B, *patch) int64; (B, K) bool, classes that
            nobody annotated in a volume, where the label 0 may hide them, or None without any.
        """
        anywhere = len(indices) - round(self.foreground * len(indices))
        images, labels = [], []
        for place, number in enumerate(indices):
            start = self._start(number, place >= anywhere, generator)
            images.append(torch.from_numpy(cut(self._images[number], start, self.patch)))
            labels.append(torch.from_numpy(cut(self._labels[number], start, self.patch)))
        missing = missing_classes([self.volumes[number] for number in indices])
        return torch.stack(images)[:, None], torch.stack(labels).long(), missing

    def _start(self, number: int, around: bool, generator: Generator) -> list[int]:
        """First voxel of a patch per axis."""
        shape = self._images[number].shape
        room = [max(0, have - want) for have, want in zip(shape, self.patch, strict=True)]
        # as many draws for either kind, so that the next patch does not depend on it
        a, b, c = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        classes = self._voxels[number]
        if not around or not classes:
            return [int(draw * (free + 1)) for draw, free in zip((a, b, c), room, strict=True)]
        voxels = classes[int(a * len(classes))]
        middle = voxels[int(b * len(voxels))]
        return first_voxel(middle, shape, self.patch)


def first_voxel(middle: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> list[int]:
    """Where a patch begins that has `middle` in its middle, or nearer to the edge where the array
    of this shape ends."""
    return [
        min(max(int(at) - want // 2, 0), max(0, have - want))
        for at, have, want in zip(middle, shape, size, strict=True)
    ]


def cut(array: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """A patch, with zeros around an array that is smaller."""
    part = array[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
    lacking = [n - have for n, have in zip(size, part.shape, strict=True)]
    return np.pad(part, [(n // 2, n - n // 2) for n in lacking])


def augment3d(
    images: Tensor, labels: Tensor, settings: Augmentation, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Randomly augmented copies of patches (B, 1, Z, H, W) and labels (B, Z, H, W): one flip,
    rotation, scale and shift in the plane for all slices of a patch, then intensity."""
    geometry = random_geometry(
        images.shape[0], images.shape[3:], settings, generator, device=images.device
    )
    flat, labels = warp(images[:, 0], labels, geometry)  # slices as channels
    return jitter_intensity(flat[:, None], settings, generator), labels
