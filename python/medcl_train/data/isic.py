"""Photographs with a mask each, as the ISIC challenges lay them out: a folder of images, a folder
of masks with the same names (`<id>_segmentation.png` or `<id>.png`).

Masks of two classes hold 0 and 255 (or are 1-bit). JPEG masks are blurred by their compression:
values above 127 count as foreground. With more classes a mask holds class ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .cases import Case
from .errors import DataError, report_unused, require_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
JPEG = (".jpg", ".jpeg")
THRESHOLD = 127  # above it a grey value counts as foreground
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB
_MASK_ENDINGS = ("_segmentation", "_mask")
_NO_IMAGES = ("_superpixels",)  # beside the images of ISIC 2017
MASK_RESIZE = ("nearest", "lanczos")


@dataclass(frozen=True)
class PictureRecipe:
    """How a photograph and its mask become what the network sees.

    Attributes:
        size: (H, W).
        num_classes: with background. Two: masks of 0 and 255; more: masks of class ids.
        mask_values: "binary" or "ids"; None: by the number of classes.
        mask_resize: "nearest" on the thresholded mask, or "lanczos" on its grey values with
            everything above 0 as foreground, which lets the foreground grow (the released code).
        unit_range: divide by 255 before the ImageNet mean and standard deviation are applied; the
            released code applies them to 0..255.
    """

    size: tuple[int, int] = (256, 256)
    num_classes: int = 2
    mask_values: str | None = None
    mask_resize: str = "nearest"
    unit_range: bool = True

    @property
    def name(self) -> str:
        return "pictures"

    @property
    def binary(self) -> bool:
        return self.mask_values == "binary" or (self.mask_values is None and self.num_classes == 2)


@dataclass(frozen=True, eq=False)
class Picture:
    """A case at the size that the network sees.

    Attributes:
        image: (3, H, W) float32, normalised.
        label: (H, W) uint8 class ids, or None.
        native_size: (H, W) of the file.
    """

    case: Case
    image: np.ndarray
    label: np.ndarray | None
    native_size: tuple[int, int]
    recipe: PictureRecipe

    @property
    def present(self) -> frozenset[int]:
        """Foreground class ids that are scored; empty without a mask."""
        if self.label is None:
            return frozenset()
        return frozenset(range(1, self.recipe.num_classes))

    def rgb(self) -> np.ndarray:
        """The image as (H, W, 3) in 0..1."""
        scale = 1.0 if self.recipe.unit_range else 255.0
        image = self.image.transpose(1, 2, 0) * np.array(STD, np.float32)
        return ((image + np.array(MEAN, np.float32)) / scale).clip(0, 1)

    def native_label(self) -> np.ndarray:
        """The mask as it lies on disk: (H, W) uint8 class ids."""
        return read_mask(self.case.label, self.recipe)


def find(
    root: Path | str, *, images: str | None = None, masks: str | None = None, dataset: str = "isic"
) -> list[Case]:
    """Every image of a folder with its mask, sorted by name. Every case is its own subject: the
    challenges do not say which images show the same person.

    Args:
        images, masks: names of the two folders inside `root`. None: "images" and "masks", or the
            names of the challenges (*_Data or *_Input, *_GroundTruth). Without a folder of masks
            all cases are unlabelled.
    Raises:
        DataError: no such folder, an image without mask, a mask without image.
    """
    root = require_folder(root, "images and masks")
    image_folder = _folder(root, images, ("images", "*_Data", "*_Input"), "images", required=True)
    mask_folder = _folder(root, masks, ("masks", "*GroundTruth"), "masks", required=False)
    found = _files(image_folder, ())
    labels = {} if mask_folder is None else _files(mask_folder, _MASK_ENDINGS)
    if not found:
        raise DataError.at(
            image_folder,
            expected=f"images ({', '.join(SUFFIXES)})",
            found="none",
            fix="give the folder that holds both, or name the folders",
        )
    problems = []
    if mask_folder is not None:
        problems += [
            f"{path}: expected its mask in {mask_folder}, found none. Fix: add it or remove the "
            "image"
            for name, path in sorted(found.items())
            if name not in labels
        ]
        problems += [
            f"{path}: expected its image in {image_folder}, found none. Fix: add it or remove the "
            "mask"
            for name, path in sorted(labels.items())
            if name not in found
        ]
    if problems:
        raise DataError.collected(root, problems)
    return [
        Case(name, name, path, labels.get(name), meta={"dataset": dataset})
        for name, path in sorted(found.items())
    ]


def _folder(
    root: Path, name: str | None, patterns: Sequence[str], what: str, *, required: bool
) -> Path | None:
    """The one folder of `root` that a name or the first fitting pattern gives."""
    for pattern in patterns if name is None else (name,):
        matches = sorted(path for path in root.glob(pattern) if path.is_dir())
        if len(matches) > 1:
            raise DataError.at(
                root,
                expected=f"one folder of {what}",
                found=", ".join(path.name for path in matches),
                fix="name the one to use",
            )
        if matches:
            return matches[0]
    if not required and name is None:
        return None
    raise DataError.at(
        root,
        expected=f"a folder of {what} ({' or '.join(patterns if name is None else (name,))})",
        found="none",
        fix="check the path given as --data-root, or name the folder",
    )


def _files(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """{name without suffix and ending: path}. Raises DataError when two files have one name."""
    found: dict[str, Path] = {}
    unused = []
    for path in sorted(folder.iterdir()):
        name = path.stem
        if path.suffix.lower() not in SUFFIXES or name.lower().endswith(_NO_IMAGES):
            if not path.name.startswith("."):
                unused.append(path)
            continue
        for ending in endings:
            if name.lower().endswith(ending):
                name = name[: -len(ending)]
        if name in found:
            raise DataError.at(
                path,
                expected="one file per name",
                found=f"{found[name].name} beside it",
                fix="remove one of the two",
            )
        found[name] = path
    report_unused(folder, unused, "images")
    return found


def load(cases: Iterable[Case], recipe: PictureRecipe, *, labels: bool = True) -> list[Picture]:
    """Pictures of the cases, in their order.

    Args:
        labels: False: masks are not read.
    Raises:
        DataError: one for all broken cases together.
    """
    pictures, problems = [], []
    for case in cases:
        try:
            pictures.append(_load(case, recipe, labels))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError.collected(f"{len(problems)} of the images", problems)
    return pictures


def _load(case: Case, recipe: PictureRecipe, labels: bool) -> Picture:
    image = read_image(case.image)
    native = (image.height, image.width)
    label = None
    if labels and case.label is not None:
        label = _resized_mask(case.label, recipe, native)
    small = image.resize(recipe.size[::-1], Image.Resampling.BILINEAR)
    values = np.asarray(small, dtype=np.float32)
    if recipe.unit_range:
        values = values / 255
    values = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return Picture(case, np.ascontiguousarray(values.transpose(2, 0, 1)), label, native, recipe)


def _resized_mask(path: Path, recipe: PictureRecipe, native: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 at the recipe's size; the file must have the image's size."""
    if recipe.mask_resize == "lanczos" and recipe.binary:
        grey = _grey(path)
        _same_size(path, grey.shape, native)
        resized = Image.fromarray(grey).resize(recipe.size[::-1], Image.Resampling.LANCZOS)
        return (np.asarray(resized) > 0).astype(np.uint8)
    mask = read_mask(path, recipe)
    _same_size(path, mask.shape, native)
    resized = Image.fromarray(mask).resize(recipe.size[::-1], Image.Resampling.NEAREST)
    return np.array(resized)


def _same_size(path: Path, size: tuple[int, ...], native: tuple[int, int]) -> None:
    if tuple(size) != native:
        raise DataError.at(
            path,
            expected=f"the size of its image, {native[0]} x {native[1]} (height x width)",
            found=f"{size[0]} x {size[1]}",
            fix="restore the mask that belongs to this image, or resize both alike",
        )


def read_image(path: Path) -> Image.Image:
    """An RGB image. Raises DataError when the file cannot be read."""
    with _opened(path) as image:
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise DataError.at(
                path,
                expected="8 bits per channel",
                found=f"an image of mode {image.mode}",
                fix="convert it to 8 bits, scaled as the study needs it",
            )
        return _decoded(path, image).convert("RGB")


def read_mask(path: Path, recipe: PictureRecipe) -> np.ndarray:
    """Class ids (H, W) uint8 of a mask file.

    Raises: DataError for grey values that are neither 0 nor 255 (but JPEG: threshold 127), for ids
        that the recipe has no class for, for a file that cannot be read.
    """
    grey = _grey(path)
    if recipe.binary and path.suffix.lower() in JPEG:
        return (grey > THRESHOLD).astype(np.uint8)
    values = np.flatnonzero(np.bincount(grey.ravel(), minlength=256)).tolist()
    if recipe.binary:
        if not set(values) <= {0, 255}:
            raise DataError.at(
                path,
                expected="a mask of 0 and 255",
                found=_listed(values),
                fix="threshold it and save it again, or, if these are class ids, set "
                "--mask-values ids",
            )
        return (grey > THRESHOLD).astype(np.uint8)
    if values[-1] >= recipe.num_classes:
        raise DataError.at(
            path,
            expected=f"class ids 0..{recipe.num_classes - 1} (num_classes {recipe.num_classes})",
            found=_listed(values),
            fix="correct the mask, or raise --num-classes",
        )
    if path.suffix.lower() in JPEG:
        raise DataError.at(
            path,
            expected="a lossless file, as class ids need it",
            found="a JPEG",
            fix="save it again as PNG from the original annotation",
        )
    return grey


def _grey(path: Path) -> np.ndarray:
    """(H, W) uint8: palette indices, grey values, or 0 and 255 of a 1-bit mask."""
    with _opened(path) as mask:
        mask = _decoded(path, mask)
        if mask.mode == "1":
            return np.asarray(mask, dtype=np.uint8) * 255
        if mask.mode in ("L", "P"):
            return np.array(mask)
        if mask.mode in ("LA", "RGB", "RGBA"):
            channels = np.asarray(mask.convert("RGB"))
            if (channels == channels[..., :1]).all():
                return np.ascontiguousarray(channels[..., 0])
        raise DataError.at(
            path,
            expected="a mask with one value per pixel",
            found=f"mode {mask.mode}" + (" with colours" if mask.mode.startswith("RGB") else ""),
            fix="save it as an 8-bit grey image",
        )


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _decoded(path: Path, image: Image.Image) -> Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from error
    return image


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError.at(
        path,
        expected="an image file",
        found=f"{type(error).__name__}: {error}",
        fix="restore the file",
    )


def _listed(values: Sequence[int], limit: int = 8) -> str:
    shown = ", ".join(map(str, values[:limit]))
    return f"the values {shown}" + (
        f" and {len(values) - limit} more" if len(values) > limit else ""
    )
