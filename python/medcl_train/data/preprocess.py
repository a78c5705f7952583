"""From files to prepared volumes, following a Recipe; cached on disk."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from nibabel import orientations

from . import cache
from .cases import Case, Source, read_source
from .errors import DataError
from .recipe import Recipe, apply_label_map
from .resample import crop_or_pad, resize_image, resize_label
from .volume import Geometry, Volume


def geometry_of(source: Source, recipe: Recipe) -> Geometry:
    """The chain of grid changes that `recipe` asks for on this source."""
    orientation = None
    if recipe.canonical:
        found = orientations.io_orientation(source.affine).astype(int)
        orientation = tuple((int(axis), int(flip)) for axis, flip in found)
    in_plane = sorted(set(range(3)) - {recipe.slice_axis}, reverse=True)
    native = Geometry(
        native_shape=tuple(int(n) for n in source.image.shape),
        affine=tuple(tuple(float(v) for v in row) for row in source.affine),
        native_spacing=tuple(float(s) for s in source.spacing),
        orientation=orientation,
        order=(recipe.slice_axis, *in_plane),
        resampled=(0, 0),
        spacing=(0.0, 0.0, 0.0),
    )
    shape, spacing = native.sliced_shape[1:], native.sliced_spacing
    if recipe.fit == "zoom":
        resampled = recipe.size
    elif recipe.spacing is None:
        resampled = shape
    else:
        resampled = tuple(
            max(1, round(n * step / recipe.spacing))
            for n, step in zip(shape, spacing[1:], strict=True)
        )
    # The true step differs a little from recipe.spacing: sizes are whole numbers.
    steps = (step * n / m for step, n, m in zip(spacing[1:], shape, resampled, strict=True))
    return replace(native, resampled=resampled, spacing=(spacing[0], *steps))


def normalize(image: np.ndarray, recipe: Recipe, path) -> np.ndarray:
    """Per-volume intensity normalisation in float64 arithmetic, float32 out."""
    values = image.astype(np.float64)
    low, high = np.percentile(values, (1, 99))
    if recipe.normalize == "minmax":
        low, high = values.min(), values.max()
    if recipe.normalize == "zscore":
        if recipe.clip:
            values = values.clip(low, high)
        offset, scale = values.mean(), values.std()
    else:
        offset, scale = low, high - low
    if not scale > 0:
        raise DataError.at(
            path,
            expected=f"contrast to normalise ({recipe.normalize})",
            found=f"(almost) one single intensity, 1st and 99th percentile {low:g} and {high:g}",
            fix="look at the file; a different `normalize` in the recipe may fit sparse images",
        )
    values = (values - offset) / scale
    if recipe.clip and recipe.normalize != "zscore":
        values = values.clip(0, 1)
    return values.astype(np.float32)


def correct_bias(image: np.ndarray, spacing) -> np.ndarray:
    """N4 (4 levels of 50 iterations, convergence 1e-3) on (Z, H, W), inside an Otsu mask."""
    import SimpleITK

    data = SimpleITK.GetImageFromArray(image.astype(np.float32))
    data.SetSpacing(tuple(float(step) for step in reversed(spacing)))
    mask = SimpleITK.OtsuThreshold(data, 0, 1, 200)
    n4 = SimpleITK.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([50] * 4)
    n4.SetConvergenceThreshold(1e-3)
    return SimpleITK.GetArrayFromImage(n4.Execute(data, mask)).astype(np.float32)


def prepare_arrays(case: Case, recipe: Recipe):
    """(image (Z, H, W) float32, label (Z, H, W) uint8 or None, Geometry) of one case, uncached."""
    source = read_source(case)
    label = source.label
    if label is not None:
        label = apply_label_map(label, recipe.label_map, case.label)
    geometry = geometry_of(source, recipe)
    image = geometry.to_slices(source.image)
    if recipe.n4:
        image = correct_bias(image, geometry.sliced_spacing)
    image = normalize(image, recipe, case.image)
    image = resize_image(image, geometry.resampled, recipe.image_order, recipe.align_corners)
    image = crop_or_pad(image, recipe.size)
    if label is not None:
        label = resize_label(
            geometry.to_slices(label), geometry.resampled, recipe.label_order, recipe.align_corners
        )
        label = crop_or_pad(label, recipe.size)
    return image, label, geometry


def prepare(
    cases: Iterable[Case],
    recipe: Recipe,
    cache_dir: Path | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Volume]:
    """Prepared volumes of the cases, in their order.

    Args:
        cache_dir: folder of prepared arrays (`cache`), or None for no cache.
        progress: called as progress(done, total, case_id) after every case.
    Raises:
        DataError: one for all broken cases together; a folder that cannot be written at once.
    """
    cases = list(cases)
    if not cases:
        raise DataError("no case to prepare. Fix: check the folder, the list and the split")
    if recipe.n4 and importlib.util.find_spec("SimpleITK") is None:
        raise DataError(
            f"Recipe {recipe.name!r} with n4=True: N4 bias-field correction needs SimpleITK, which "
            "is not installed. Fix: pip install SimpleITK, or use n4=False"
        )
    volumes, problems = [], []
    for done, case in enumerate(cases, 1):
        try:
            key = cache.entry_key(case, recipe) if cache_dir is not None else None
            entry = cache.load(cache_dir, key) if key else None
            arrays = entry or prepare_arrays(case, recipe)
        except DataError as error:
            problems += error.problems
        else:
            if key and entry is None:
                cache.store(cache_dir, key, *arrays)
            volumes.append(Volume(case, *arrays, recipe))
        if progress is not None:
            progress(done, len(cases), case.case_id)
    if problems:
        raise DataError.collected(f"{len(cases)} cases ({recipe.name})", problems)
    return volumes
