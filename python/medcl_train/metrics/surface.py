"""Overlap and surface metrics of one pair of binary masks (any number of axes).

Surface of a mask = mask minus its erosion by the 6-neighbourhood (4 in 2-D); voxels at the border
of the image count as surface. d(a, B) = distance in mm from surface voxel a to the nearest surface
voxel of B.

HD and HD95 exist in two definitions that differ, so it is an argument:
    "pooled"    percentile of the union of both directed distance sets (medpy)
    "directed"  maximum of the two directed percentiles (MONAI)
ASD is directed, prediction to truth (medpy `asd`); ASSD is the mean over both sets (medpy and MONAI
agree).

Empty masks. Both empty: Dice 1, distances 0. One empty: Dice 0 and, by rule,
    "nan"      distances NaN; the caller counts them as missed (default)
    "worst"    distances = diagonal of the image in mm
    "ssl4mis"  an empty prediction scores Dice 0 and distance 0, also against an empty truth, as
    SSL4MIS reports it;
               an empty truth alone stays NaN (medpy, which SSL4MIS calls, raises there)
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

EMPTY_RULES = ("nan", "worst", "ssl4mis")
DEFINITIONS = ("pooled", "directed")


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2|P and G| / (|P| + |G|) of two masks of one shape; 1 when both are empty."""
    prediction, truth = _as_masks(prediction, truth)
    total = int(prediction.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2.0 * int((prediction & truth).sum()) / total


def surface_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in the unit of `spacing` (default: voxels): (prediction's surface to truth's,
    truth's to prediction's).

    Raises: ValueError when a mask is empty (there is no distance) or shapes or spacing do not fit.
    """
    prediction, truth = _as_masks(prediction, truth)
    spacing = _check_spacing(spacing, prediction.ndim)
    if not prediction.any() or not truth.any():
        raise ValueError(
            "surface_distances needs two masks that are not empty; score_masks has a rule for "
            "empty ones"
        )
    # Outside the bounding box of both masks there is no surface: the crop changes no distance, only
    # the time.
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    surfaces = [_surface(mask[box]) for mask in (prediction, truth)]
    to_truth, to_prediction = (
        ndimage.distance_transform_edt(~s, sampling=spacing) for s in surfaces[::-1]
    )
    return to_truth[surfaces[0]], to_prediction[surfaces[1]]


def score_masks(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float] | None = None,
    *,
    definition: str = "pooled",
    empty: str = "nan",
) -> dict[str, float]:
    """Dice, HD, HD95, ASD, ASSD of two binary masks, and `missed` (1 when exactly one mask is
    empty).

    Args:
        prediction, truth: boolean or 0/1 arrays of one shape.
        spacing: voxel size per axis (mm); None = voxels.
        definition: "pooled" or "directed" (see the module's text); concerns HD95 only, HD is the
            same in both.
        empty: rule for empty masks, see the module's text.

    Raises: ValueError for unknown options, shapes that differ, values other than 0 and 1.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {DEFINITIONS}, got {definition!r}")
    if empty not in EMPTY_RULES:
        raise ValueError(f"empty must be one of {EMPTY_RULES}, got {empty!r}")
    prediction, truth = _as_masks(prediction, truth)
    spacing = _check_spacing(spacing, prediction.ndim)
    has_prediction, has_truth = bool(prediction.any()), bool(truth.any())
    if has_prediction and has_truth:
        to_truth, to_prediction = surface_distances(prediction, truth, spacing)
        pooled = np.concatenate([to_truth, to_prediction])
        hd95 = (
            np.percentile(pooled, 95)
            if definition == "pooled"
            else max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))
        )
        scores = {"hd": pooled.max(), "hd95": hd95, "asd": to_truth.mean(), "assd": pooled.mean()}
        return {
            "dice": dice(prediction, truth),
            **{k: float(v) for k, v in scores.items()},
            "missed": 0.0,
        }
    if empty == "ssl4mis" and not has_prediction:
        overlap, distance = 0.0, 0.0
    elif not has_prediction and not has_truth:
        overlap, distance = 1.0, 0.0
    elif empty == "worst":
        overlap, distance = 0.0, float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
    else:
        overlap, distance = 0.0, float("nan")
    distances = dict.fromkeys(("hd", "hd95", "asd", "assd"), distance)
    return {"dice": overlap, **distances, "missed": float(has_prediction != has_truth)}


def _surface(mask: np.ndarray) -> np.ndarray:
    cross = ndimage.generate_binary_structure(mask.ndim, 1)
    return mask & ~ndimage.binary_erosion(mask, cross)


def _as_masks(prediction, truth) -> tuple[np.ndarray, np.ndarray]:
    masks = []
    for name, mask in (("prediction", prediction), ("truth", truth)):
        mask = np.asarray(mask)
        if mask.dtype != bool:
            if mask.size and not np.isin(np.unique(mask), (0, 1)).all():
                raise ValueError(
                    f"{name} must be a binary mask, got values {np.unique(mask)[:6].tolist()}"
                )
            mask = mask.astype(bool)
        masks.append(mask)
    if masks[0].shape != masks[1].shape:
        raise ValueError(f"prediction has shape {masks[0].shape}, truth has {masks[1].shape}")
    return masks[0], masks[1]


def _check_spacing(spacing, ndim: int) -> tuple[float, ...]:
    spacing = (1.0,) * ndim if spacing is None else tuple(float(s) for s in spacing)
    if len(spacing) != ndim or min(spacing) <= 0:
        raise ValueError(f"spacing needs {ndim} positive numbers, got {spacing}")
    return spacing
