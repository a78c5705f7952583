"""Recipes: how a native volume becomes the array a network sees. Source: specs of the papers' code.

Variant A  (default): percentile (1, 99) min-max without clipping, in-plane rescaling by spacing,
           centre crop or zero pad. MSD hippocampus: coronal slices, 1-99 % clip, z-score, 48 x 48.
           Other MSD tasks: the whole axial slice, zoomed to 224 x 224, so that no organ is cut.
Variant B  SSL4MIS: min-max per volume, slices zoomed to 256 x 256, order 0 for both.
Variant C  PCL: finer spacing with cubic interpolation, z-score, labels per class with order 1.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass

import numpy as np

from .errors import DataError

log = logging.getLogger(__name__)
NORMALIZE = ("minmax_1_99", "minmax", "zscore")
MMWHS_VALUES = (205, 420, 500, 550, 600, 820, 850)  # Myo, LA, LV, RA, RV, aorta, pulmonary artery
CLASS_NAMES = {
    "acdc": ("background", "RV", "myocardium", "LV"),
    "phantom": ("background", "RV", "myocardium", "LV"),
    "ssl4mis": ("background", "RV", "myocardium", "LV"),
    "mmwhs": ("background", "Myo", "LA", "LV", "RA", "RV", "AA", "PA"),
    "msd": ("background", "anterior", "posterior"),  # hippocampus; other tasks: dataset.json
    "isic": ("background", "lesion"),
    "lesions": ("background", "lesion"),
}


@dataclass(frozen=True)
class Recipe:
    """Every setting of the pre-processing; its digest is part of the cache key.

    Attributes:
        normalize: "minmax_1_99" ((x - p1) / (p99 - p1)), "minmax", or "zscore", per volume.
        clip: clip to the 1st..99th percentile before the z-score, or the min-max result to [0, 1].
        spacing: target in-plane mm; None keeps the native pixels.
        size: (H, W) of the prepared slices.
        fit: "crop" (centre crop or zero pad) or "zoom" (stretch the whole slice to `size`).
        image_order, label_order: spline order; label order 1 = per class linear, then argmax.
        restore_order: how predictions return to native pixels, as `label_order`.
        align_corners: zoom between pixel centres of the corners (as SSL4MIS) instead of edges.
        slice_axis: native axis that is cut into slices; the others become (H, W), the higher axis
            first, so that axis 2 gives the usual (Z, Y, X).
        canonical: reorient to RAS before slicing.
        label_map: pairs (raw value in the file, class id); any other raw value is an error.
        n4: N4 bias-field correction first (4 levels of 50 iterations; needs SimpleITK).
    """

    name: str
    normalize: str = "minmax_1_99"
    clip: bool = False
    spacing: float | None = None
    size: tuple[int, int] = (224, 224)
    image_order: int = 1
    label_order: int = 0
    slice_axis: int = 2
    num_classes: int = 4
    label_map: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 2), (3, 3))
    n4: bool = False
    fit: str = "crop"
    restore_order: int = 1
    align_corners: bool = False
    canonical: bool = False

    def __post_init__(self):
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        pairs = self.label_map.items() if isinstance(self.label_map, dict) else self.label_map
        object.__setattr__(self, "label_map", tuple((int(a), int(b)) for a, b in pairs))
        rules = (
            (self.normalize in NORMALIZE, f"normalize must be one of {NORMALIZE}"),
            (self.fit in ("crop", "zoom"), "fit must be 'crop' or 'zoom'"),
            (len(self.size) == 2 and min(self.size) > 0, "size must be two positive numbers"),
            (self.spacing is None or self.spacing > 0, "spacing must be positive mm or None"),
            (self.image_order in range(6), "image_order must be 0..5"),
            (self.label_order in (0, 1), "label_order must be 0 or 1"),
            (self.restore_order in (0, 1), "restore_order must be 0 or 1"),
            (self.slice_axis in (0, 1, 2), "slice_axis must be 0, 1 or 2"),
            (2 <= self.num_classes <= 255, "num_classes must be 2..255"),
            (len({raw for raw, _ in self.label_map}) == len(self.label_map),
             "label_map names a raw value twice"),
            (all(0 <= new < self.num_classes for _, new in self.label_map),
             "label_map leads to a class outside num_classes"),
        )  # fmt: skip
        for holds, text in rules:
            if not holds:
                raise ValueError(f"Recipe {self.name!r}: {text}; got {self}")

    def digest(self) -> str:
        """sha256 of all settings but the name."""
        settings = {key: value for key, value in asdict(self).items() if key != "name"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def identity_map(num_classes: int) -> tuple[tuple[int, int], ...]:
    return tuple((value, value) for value in range(num_classes))


def mmwhs_map(stray_421: str = "background") -> tuple[tuple[int, int], ...]:
    """MM-WHS raw values to ids 1..7. One public file holds a stray 421 (next to LA = 420):
    "background" and "atrium" map it, "error" reports the file."""
    stray = {"background": ((421, 0),), "atrium": ((421, 2),), "error": ()}
    if stray_421 not in stray:
        raise ValueError(f"stray_421 must be one of {tuple(stray)}; got {stray_421!r}")
    return ((0, 0), *((raw, i + 1) for i, raw in enumerate(MMWHS_VALUES)), *stray[stray_421])


def label_map_for(case) -> tuple[tuple[int, int], ...]:
    """Default label map of a case's dataset."""
    dataset = case.meta.get("dataset", "acdc")
    if dataset == "mmwhs":
        return mmwhs_map()
    return identity_map(case.meta.get("num_classes") or len(CLASS_NAMES[dataset]))


def recipe_for(
    dataset: str,
    variant: str | None = None,
    size: int | tuple[int, int] | None = None,
    *,
    modality: str = "mr",
    stray_421: str = "background",
    task: str = "hippocampus",
    **changes,
) -> Recipe:
    """The recipe of a dataset.

    Args:
        dataset: "acdc" | "phantom" | "mmwhs" | "msd" | "ssl4mis".
        variant: "A", "B" or "C" (module docstring); None: "B" for ssl4mis, else "A".
            ssl4mis files are already normalised and hold no spacing: A and C do not rescale there.
        size: int or (H, W) instead of the variant's.
        modality: "mr" | "ct" for MM-WHS (variant C clips CT only).
        stray_421: see `mmwhs_map`.
        task: "hippocampus" | "other" for MSD; another task needs `num_classes`.
        changes: any other field of Recipe (`num_classes=2` also sets the label map).
    """
    if dataset not in CLASS_NAMES:
        raise ValueError(f"dataset must be one of {', '.join(CLASS_NAMES)}; got {dataset!r}")
    if task not in ("hippocampus", "other"):
        raise ValueError(f"task must be 'hippocampus' or 'other'; got {task!r}")
    if task == "other" and "num_classes" not in changes:
        raise ValueError("an MSD task other than hippocampus needs num_classes")
    hippocampus = dataset == "msd" and task == "hippocampus"
    variant = variant or ("B" if dataset == "ssl4mis" else "A")
    classes = len(CLASS_NAMES[dataset])
    base = {
        "name": f"{dataset}-{variant}",
        "num_classes": classes,
        "label_map": mmwhs_map(stray_421) if dataset == "mmwhs" else identity_map(classes),
        "canonical": dataset in ("mmwhs", "msd"),
        "slice_axis": 1 if hippocampus else 2,
    }
    cardiac = dataset in ("acdc", "phantom")
    if variant == "A":
        base |= {"normalize": "minmax_1_99"}
        if hippocampus:
            base |= {"normalize": "zscore", "clip": True, "size": (48, 48)}
        elif dataset == "msd":
            base |= {"size": (224, 224), "fit": "zoom"}
        elif dataset == "mmwhs":
            base |= {"spacing": 1.5, "size": (160, 160)}
        else:
            base |= {"spacing": 1.36719 if cardiac else None, "size": (224, 224)}
    elif variant == "B":
        base |= {
            "normalize": "minmax", "size": (256, 256), "fit": "zoom", "image_order": 0,
            "label_order": 0, "restore_order": 0, "align_corners": True,
        }  # fmt: skip
    elif variant == "C":
        sizes = {"mmwhs": (256, 256)} | ({"msd": (48, 48)} if hippocampus else {})
        spacings = {"mmwhs": 1.0, "acdc": 1.25, "phantom": 1.25}
        base |= {
            "normalize": "zscore", "clip": dataset == "mmwhs" and modality == "ct",
            "spacing": spacings.get(dataset), "size": sizes.get(dataset, (352, 352)),
            "image_order": 3, "label_order": 1,
        }  # fmt: skip
    else:
        raise ValueError(f"variant must be 'A', 'B' or 'C'; got {variant!r}")
    if size is not None:
        base["size"] = (size, size) if isinstance(size, int) else tuple(size)
    if "num_classes" in changes and "label_map" not in changes:
        base["label_map"] = identity_map(changes["num_classes"])
    return Recipe(**base | changes)


def apply_label_map(label: np.ndarray, label_map, path) -> np.ndarray:
    """Raw label values to class ids (uint8). Raises DataError on a value that the map lacks.

    A foreground value that the map turns into background is reported in the log.
    """
    values, counts = np.unique(label, return_counts=True)
    table = dict(label_map)
    unknown = [(int(v), int(n)) for v, n in zip(values, counts, strict=True) if int(v) not in table]
    if unknown:
        found = ", ".join(f"{value} ({count} voxels)" for value, count in unknown)
        raise DataError.at(
            path,
            expected=f"label values {sorted(table)}",
            found=f"the unknown value(s) {found}",
            fix="correct the file, or name the value in the recipe's label_map (MSD: in "
            "dataset.json, or by --num-classes)",
        )
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value != 0 and table[value] == 0:
            log.warning("%s: %d voxels of value %d are read as background", path, count, value)
    ids = np.array([table[int(v)] for v in values], dtype=np.uint8)
    return ids[np.searchsorted(values, label)]
