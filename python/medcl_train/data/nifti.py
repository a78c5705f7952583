"""NIfTI files in and out: whole-file reads with every check, atomic writes.

A file is read into memory once, decompressed whole (so that the gzip checksum is verified: a file
cut in its last bytes would otherwise pass) and parsed from these bytes: no memory maps.
Arrays keep nibabel's axis order (X, Y, Z).
"""

import gzip
import itertools
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError

from .atomic import write_atomic
from .cases import Source
from .errors import DataError

SUFFIXES = (".nii.gz", ".nii")
AFFINE_TOLERANCE_MM = 1e-2
_BROKEN = (
    OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, MemoryError, OverflowError,
    HeaderDataError, HeaderTypeError, ImageFileError, WrapStructError,
)  # fmt: skip


def stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def is_nifti(path: Path) -> bool:
    """A NIfTI name; `._x.nii.gz` are the resource forks macOS puts into archives, not images."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def read_bytes(path: Path, what: str = "image") -> bytes:
    """The file's bytes, or DataError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError.at(
            path,
            expected=f"a readable {what} file",
            found=f"{type(error).__name__}: {error}",
            fix="restore the file or its read permission",
        ) from error


def load_image(path: Path, what: str = "image") -> nib.Nifti1Image:
    """Parse a .nii or .nii.gz file in memory; the gzip checksum and the length are verified."""
    raw = read_bytes(path, what)
    try:
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        header_size = {int.from_bytes(data[:4], order) for order in ("little", "big")}
        reader = nib.Nifti2Image if 540 in header_size else nib.Nifti1Image
        header = reader.header_class
        steps = header(data[: header.sizeof_hdr], check=False)["pixdim"][1:4]
        if not (np.isfinite(steps).all() and steps.all()):
            # nibabel would go on with 1 mm, and every distance and volume would be wrong.
            raise HeaderDataError(f"pixdim {[float(step) for step in steps]}")
        image = reader.from_bytes(data)
        offset, dtype = image.dataobj.offset, image.get_data_dtype()
        needed = offset + int(np.prod(image.shape, dtype=object)) * dtype.itemsize
        if needed > len(data):
            raise EOFError(f"{len(data)} bytes where the header announces {needed}")
        return image
    except _BROKEN as error:
        raise DataError.at(
            path,
            expected="a complete NIfTI file",
            found=f"a truncated or corrupt one ({type(error).__name__}: {error})",
            fix="download or copy the file again",
        ) from error


def _grid(path: Path, image: nib.Nifti1Image, what: str):
    shape = image.shape
    if len(shape) != 3:
        fix = (
            "give one time point or channel per file (for ACDC the _frameNN files, not _4d)"
            if len(shape) > 3
            else "stack the slices into one 3-D volume"
        )
        raise DataError.at(
            path, expected=f"a 3-D {what}", found=f"{len(shape)}-D, shape {tuple(shape)}", fix=fix
        )
    if min(shape) < 1:
        raise DataError.at(
            path,
            expected=f"a 3-D {what} with voxels",
            found=f"shape {tuple(shape)}",
            fix="export the volume again",
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    spacing = tuple(float(step) for step in image.header.get_zooms()[:3])
    usable = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12
    if not usable or not all(np.isfinite(step) and step > 0 for step in spacing):
        raise DataError.at(
            path,
            expected="a finite, invertible affine and positive spacing",
            found=f"spacing {spacing}, affine {affine.tolist()}",
            fix="repair the header (pixdim, sform, qform) from the original export",
        )
    return affine, spacing


def read_image(path: Path):
    """Image as float32 (X, Y, Z), affine (4, 4), spacing (3) in mm. Raises DataError."""
    image = load_image(path)
    affine, spacing = _grid(path, image, "image")
    array = _values(path, image).astype(np.float32, copy=False)
    finite = np.isfinite(array)
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataError.at(
            path,
            expected="finite intensities",
            found=f"{int((~finite).sum())} NaN or infinite voxels, the first at {first}",
            fix="export the image again or fill these voxels",
        )
    return array, affine, spacing


def read_label(path: Path):
    """Label as int64 raw values (X, Y, Z), affine, spacing. Raises DataError."""
    image = load_image(path, "label")
    affine, spacing = _grid(path, image, "label")
    return integer_label(path, _values(path, image)), affine, spacing


def integer_label(path: Path, values: np.ndarray) -> np.ndarray:
    """Label values as int64; a float file is accepted when all its values are whole numbers."""
    if values.dtype.kind not in "iub":
        if not np.isfinite(values).all() or np.abs(values - np.rint(values)).max() > 1e-3:
            raise DataError.at(
                path,
                expected="whole-number label values",
                found=f"fractions, NaN or infinities in a {values.dtype} file",
                fix="resample labels with nearest neighbour and save them as integers",
            )
        values = np.rint(values)
    return values.astype(np.int64)


def _values(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    try:
        values = np.asarray(image.dataobj)
    except _BROKEN as error:
        raise DataError.at(
            path,
            expected="readable voxel data",
            found=f"{type(error).__name__}: {error}",
            fix="download or copy the file again",
        ) from error
    if values.dtype.kind not in "iubf":
        raise DataError.at(
            path,
            expected="real-valued voxels",
            found=f"data type {values.dtype}",
            fix="convert the volume to one real channel",
        )
    return values


def read_pair(image_path: Path, label_path: Path | None) -> Source:
    """An image and its label on the same grid (shape and affine are compared)."""
    image, affine, spacing = read_image(image_path)
    label = None
    if label_path is not None:
        label, label_affine, _ = read_label(label_path)
        if label.shape != image.shape:
            raise DataError.at(
                label_path,
                expected=f"the grid of {image_path.name}, shape {image.shape}",
                found=f"shape {label.shape}",
                fix="resample the label to the image's grid (nearest neighbour)",
            )
        corners = np.array(list(itertools.product(*((0, n - 1) for n in image.shape))))
        gap = nib.affines.apply_affine(affine, corners)
        gap = np.abs(gap - nib.affines.apply_affine(label_affine, corners)).max()
        if gap > AFFINE_TOLERANCE_MM:
            raise DataError.at(
                label_path,
                expected=f"the affine of {image_path.name}",
                found=f"a grid that lies up to {gap:.3g} mm away",
                fix="resample the label to the image's grid, or copy the image's affine if only "
                "the header is wrong",
            )
    return Source(image, label, affine, spacing)


def write_nifti(path: Path | str, image: nib.Nifti1Image) -> Path:
    """Write atomically as .nii.gz or .nii; equal images give equal bytes (no time stamp)."""
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise DataError.at(
            path,
            expected="a name that ends in .nii.gz or .nii",
            found=path.name,
            fix="give the file one of these endings",
        )
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    return write_atomic(path, lambda stream: stream.write(data), what="NIfTI file")
