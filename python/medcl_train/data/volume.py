"""Prepared volumes and the way back to the file they came from."""

from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations

from .cases import Case
from .errors import DataError
from .recipe import Recipe
from .resample import resize_label, shown_part, undo_crop_or_pad


@dataclass(frozen=True)
class Geometry:
    """What happened to the grid, so that it can be undone.

    Attributes:
        native_shape: (X, Y, Z) of the file.
        affine: (4, 4) of the file, as nested tuples.
        native_spacing: mm along X, Y, Z of the file.
        orientation: nibabel orientation of the file (3 pairs) when it was turned to RAS, or None.
        order: transposition from the (RAS) array to (slices, rows, columns).
        resampled: in-plane (rows, columns) after rescaling, before crop or pad.
        spacing: mm of the prepared grid along (z, y, x) = (slices, rows, columns).
    """

    native_shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    native_spacing: tuple[float, float, float]
    orientation: tuple[tuple[int, int], ...] | None
    order: tuple[int, int, int]
    resampled: tuple[int, int]
    spacing: tuple[float, float, float]

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Geometry":
        def frozen(value):
            return tuple(frozen(v) for v in value) if isinstance(value, list | tuple) else value

        return cls(**{key: frozen(value) for key, value in values.items()})

    def to_slices(self, array: np.ndarray) -> np.ndarray:
        """(X, Y, Z) of the file to (slices, rows, columns), before any resampling."""
        if self.orientation is not None:
            array = orientations.apply_orientation(array, np.array(self.orientation))
        return np.ascontiguousarray(array.transpose(self.order))

    def from_slices(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_slices`."""
        array = array.transpose(np.argsort(self.order))
        if self.orientation is not None:
            ras = orientations.axcodes2ornt("RAS")
            back = orientations.ornt_transform(ras, np.array(self.orientation))
            array = orientations.apply_orientation(array, back)
        return np.ascontiguousarray(array)

    def _per_slice_axis(self, per_file_axis) -> tuple:
        """Values along X, Y, Z of the file to (slices, rows, columns)."""
        values = list(per_file_axis)
        if self.orientation is not None:
            for axis, (target, _) in enumerate(self.orientation):
                values[target] = per_file_axis[axis]
        return tuple(values[axis] for axis in self.order)

    @property
    def sliced_shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns) at native resolution."""
        return self._per_slice_axis(self.native_shape)

    @property
    def sliced_spacing(self) -> tuple[float, float, float]:
        """mm along (slices, rows, columns) at native resolution."""
        return self._per_slice_axis(self.native_spacing)


@dataclass(frozen=True, eq=False)
class Volume:
    """A case on the grid the network sees.

    Attributes:
        image: (Z, H, W) float32.
        label: (Z, H, W) uint8 class ids, or None. In a case with classes that nobody annotated,
            0 means "background or one of those classes": see `present`.
    """

    case: Case
    image: np.ndarray
    label: np.ndarray | None
    geometry: Geometry
    recipe: Recipe

    @property
    def present(self) -> frozenset[int]:
        """Foreground class ids that are annotated in this case: train on and score only these.
        (Annotated, not occurring: a class may be annotated and have no voxel.) Empty without label.
        """
        if self.label is None:
            return frozenset()
        return frozenset(range(1, self.recipe.num_classes)) - set(self.case.missing_classes)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm of the prepared grid along (z, y, x)."""
        return self.geometry.spacing

    @property
    def content(self) -> tuple[slice, slice, slice]:
        """The part of `image` that shows the file; the rest is padding."""
        return (slice(None), *shown_part(self.geometry.resampled, self.image.shape[1:]))

    def restore(self, prediction: np.ndarray) -> np.ndarray:
        """A prediction (Z, H, W) of class ids back on the native grid (X, Y, Z) of the file.

        Inverse of crop or pad (outside: 0), then of the in-plane rescaling (recipe.restore_order),
        then of slicing and reorientation. Exact where nothing was rescaled. Returns uint8.
        """
        prediction = np.asarray(prediction)
        if prediction.shape != self.image.shape:
            raise ValueError(
                f"prediction of {self.case.case_id}: expected shape {self.image.shape} "
                f"(slices, rows, columns), got {prediction.shape}"
            )
        if prediction.dtype.kind not in "iub":
            raise TypeError(f"prediction: expected integer class ids, got {prediction.dtype}")
        if prediction.min() < 0 or prediction.max() >= self.recipe.num_classes:
            raise ValueError(
                f"prediction: expected ids 0..{self.recipe.num_classes - 1}, "
                f"got {prediction.min()}..{prediction.max()}"
            )
        geometry = self.geometry
        labels = undo_crop_or_pad(prediction.astype(np.uint8), geometry.resampled)
        labels = resize_label(
            labels, geometry.sliced_shape[1:], self.recipe.restore_order, self.recipe.align_corners
        )
        return geometry.from_slices(labels)


def save_prediction(volume: Volume, prediction, path: Path | str, *, raw_values=False) -> Path:
    """Write a prediction (Z, H, W) as uint8 or uint16 NIfTI on the source grid, atomically.

    The source's affine, with its sform and qform codes and units, is kept.

    Args:
        raw_values: write the dataset's own label values (MM-WHS: 205, 420, ...) instead of ids.
    Raises:
        DataError: when the folder cannot be written or the name is no NIfTI name.
    """
    from .nifti import SUFFIXES, load_image, write_nifti

    native = volume.restore(prediction)
    if raw_values:
        raw = {new: old for old, new in reversed(volume.recipe.label_map)}
        table = np.array([raw.get(i, 0) for i in range(volume.recipe.num_classes)])
        native = table[native].astype(np.uint8 if table.max() < 256 else np.uint16)
    result = nib.Nifti1Image(native, np.array(volume.geometry.affine))
    if volume.case.image.name.endswith(SUFFIXES):
        source = load_image(volume.case.image)
        if source.shape != native.shape:
            raise DataError.at(
                volume.case.image,
                expected=f"the image read before, shape {native.shape}",
                found=f"shape {source.shape}",
                fix="prepare the case again: the file was changed",
            )
        result.set_sform(source.get_sform(), int(source.header["sform_code"]))
        result.set_qform(source.get_qform(), int(source.header["qform_code"]))
        result.header.set_zooms(volume.geometry.native_spacing)
        result.header.set_xyzt_units(*source.header.get_xyzt_units())
    return write_nifti(path, result)
