"""Slices of prepared volumes as a torch dataset, held in memory."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from .errors import DataError
from .volume import Volume

IGNORE_INDEX = -100


class SliceDataset(Dataset):
    """One item per slice.

    Item: dict with
        image     (1, H, W) float32, a copy that may be changed in place
        label     (H, W) int64 class ids, IGNORE_INDEX = not to be trained on (unless labels=False)
        volume    int, index into `volumes`
        slice     int, index of the slice in its volume
        position  float in [0, 1] from the first to the last slice (0.5 for a single slice)

    Args:
        volumes: prepared volumes of one common (H, W).
        labels: True: every volume must have one; False: no `label` key; "optional": volumes
            without label get IGNORE_INDEX everywhere.
        ambiguous: what to do with pixels of value 0 in volumes where some class was not annotated
            (they may be background or that class): "ignore" gives IGNORE_INDEX, "background"
            trains them as background all the same.
    """

    def __init__(
        self, volumes: Sequence[Volume], labels: bool | str = True, ambiguous: str = "ignore"
    ):
        if labels not in (True, False, "optional"):
            raise ValueError(f"labels must be True, False or 'optional'; got {labels!r}")
        if ambiguous not in ("ignore", "background"):
            raise ValueError(f"ambiguous must be 'ignore' or 'background'; got {ambiguous!r}")
        self.volumes = list(volumes)
        self.labels = labels
        self.ambiguous = ambiguous
        if not self.volumes:
            raise DataError("SliceDataset: no volume. Fix: check the split and the folder")
        sizes = sorted({volume.image.shape[1:] for volume in self.volumes})
        if len(sizes) > 1:
            raise DataError(f"SliceDataset: slices of several sizes {sizes}. Fix: use one recipe")
        bare = [volume.case.case_id for volume in self.volumes if volume.label is None]
        if labels is True and bare:
            raise DataError(
                f"SliceDataset: no label for {', '.join(bare)}. Fix: add the label files, or use "
                "labels=False (or 'optional') for unlabelled data"
            )
        depths = [len(volume.image) for volume in self.volumes]
        self._starts = np.concatenate([[0], np.cumsum(depths)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        z = int(index - self._starts[number])
        volume = self.volumes[number]
        depth = len(volume.image)
        item = {
            "image": torch.from_numpy(volume.image[z][None].copy()),
            "volume": number,
            "slice": z,
            "position": z / (depth - 1) if depth > 1 else 0.5,
        }
        if self.labels is not False:
            item["label"] = self._label(volume, z)
        return item

    def _label(self, volume: Volume, z: int) -> torch.Tensor:
        if volume.label is None:
            return torch.full(volume.image.shape[1:], IGNORE_INDEX, dtype=torch.int64)
        label = torch.from_numpy(volume.label[z].astype(np.int64))
        missing = volume.case.missing_classes
        if missing:
            for value in missing:
                label[label == value] = IGNORE_INDEX
            if self.ambiguous == "ignore":
                label[label == 0] = IGNORE_INDEX
        return label

    def indices(self, subjects: Iterable[str]) -> list[int]:
        """Slice indices of these subjects, for the streams of TwoStreamBatchSampler."""
        wanted = known_subjects(subjects, self.volumes)
        spans = zip(self.volumes, self._starts[:-1], self._starts[1:], strict=True)
        return [
            int(i)
            for volume, first, last in spans
            if volume.case.subject in wanted
            for i in range(first, last)
        ]


def known_subjects(subjects: Iterable[str], volumes: Sequence[Volume]) -> set[str]:
    """The subjects as a set; DataError when one has no volume."""
    wanted = set(subjects)
    lost = wanted - {volume.case.subject for volume in volumes}
    if lost:
        raise DataError(
            f"no volume of {', '.join(sorted(lost))} in the data set. Fix: prepare their cases too"
        )
    return wanted


def missing_classes(volumes: Sequence[Volume]) -> torch.Tensor | None:
    """(B, K) bool: classes that nobody annotated in these volumes, where the label 0 may hide them;
    None when there are none."""
    if not any(volume.case.missing_classes for volume in volumes):
        return None
    missing = torch.zeros(len(volumes), volumes[0].recipe.num_classes, dtype=torch.bool)
    for row, volume in zip(missing, volumes, strict=True):
        row[list(volume.case.missing_classes)] = True
    return missing
