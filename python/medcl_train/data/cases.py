"""Cases: what one image (with or without its label) on disk is, and how to find them.

A case is one 3-D image. A subject is one person: the unit of every split. Loaders only look at
names, lists and small text files; the contents are checked when a case is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import DataError

DATASETS = ("acdc", "mmwhs", "msd", "ssl4mis", "phantom")


@dataclass(frozen=True)
class Case:
    """One 3-D image.

    Attributes:
        case_id: unique in its dataset, usable as a file name (`patient001_frame01`).
        subject: the person (`patient001`); splits never separate the cases of one subject.
        image: image file. For SSL4MIS slices: the first slice, the others are in `meta["slices"]`.
        label: label file, or None for an image without annotation.
        frame: 1-based cardiac phase where the dataset has phases.
        meta: dataset facts. Always `dataset`; `missing_classes` (tuple of class ids nobody
            annotated in this case: never trained on, never scored) where there are any.
    """

    case_id: str
    subject: str
    image: Path
    label: Path | None = None
    frame: int | None = None
    meta: dict = field(default_factory=dict, compare=False)

    @property
    def missing_classes(self) -> tuple[int, ...]:
        return tuple(self.meta.get("missing_classes", ()))

    def files(self) -> tuple[Path, ...]:
        """All files of the case, image first; their bytes decide the cache entry."""
        if "slices" in self.meta:
            return tuple(self.meta["slices"])
        if self.label is None or self.label == self.image:
            return (self.image,)
        return (self.image, self.label)


@dataclass(frozen=True)
class Source:
    """A case as read from disk, on its native grid (nibabel axis order X, Y, Z)."""

    image: np.ndarray  # (X, Y, Z) float32
    label: np.ndarray | None  # (X, Y, Z) int64, raw values of the file
    affine: np.ndarray  # (4, 4) voxel to mm
    spacing: tuple[float, float, float]  # mm along X, Y, Z


def find_cases(dataset: str, root: Path | str, **options) -> list[Case]:
    """All cases of a dataset in its own layout on disk, sorted.

    Args:
        dataset: "acdc" | "mmwhs" | "msd" | "ssl4mis" | "phantom" (= ACDC layout).
        root: folder of the dataset.
        options: of the loader: `acdc.find`, `mmwhs.find`, `msd.find`, `ssl4mis.find`.
    Raises:
        DataError: names every broken case of the folder; nothing is left out silently.
    """
    from . import acdc, mmwhs, msd, phantom, ssl4mis

    finders = {
        "acdc": acdc.find,
        "phantom": acdc.find,
        "mmwhs": mmwhs.find,
        "msd": msd.find,
        "ssl4mis": ssl4mis.find,
    }
    if dataset not in finders:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {dataset!r}")
    if dataset == "phantom":
        options.setdefault("dataset", "phantom")
        if (part := Path(root) / phantom.UNFINISHED).exists():
            raise DataError.at(
                part,
                expected="a complete phantom",
                found="one whose writing was interrupted",
                fix="write it again with medcl_train.data.phantom (--overwrite)",
            )
    return finders[dataset](root, **options)


def read_source(case: Case) -> Source:
    """Read a case with all checks on its contents; raises DataError naming the file."""
    from . import nifti, ssl4mis

    if case.meta.get("dataset") == "ssl4mis":
        return ssl4mis.read(case)
    return nifti.read_pair(case.image, case.label)


def load_native(case: Case, recipe=None):
    """The case on its source grid, for evaluation.

    Args:
        recipe: whose `label_map` turns raw label values into class ids; by default that of the
            case's dataset.
    Returns:
        image (X, Y, Z) float32, label (X, Y, Z) uint8 class ids or None, affine (4, 4),
        spacing in mm along X, Y, Z. For SSL4MIS the spacing is unknown and given as 1.
    """
    from .recipe import apply_label_map, label_map_for

    source = read_source(case)
    label = source.label
    if label is not None:
        label_map = recipe.label_map if recipe is not None else label_map_for(case)
        label = apply_label_map(label, label_map, case.label)
    return source.image, label, source.affine, source.spacing


def subjects_of(cases: Iterable[Case]) -> list[str]:
    """Sorted subjects of the cases."""
    return sorted({case.subject for case in cases})
