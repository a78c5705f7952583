"""SSL4MIS layout: `train_slices.list`, `train.list`, `val.list`, `test.list`, `data/<case>.h5`,
`data/slices/<case>_slice_<i>.h5`, each h5 with `image` and `label`.

Volumes are (Z, H, W), slices (H, W), images already scaled per volume; the files hold no spacing
and no affine, so both are given as 1 mm here and distances are in voxels.
"""

import io
import re
from pathlib import Path

import numpy as np

from .cases import Case, Source
from .errors import DataError, require_folder
from .nifti import integer_label, read_bytes

LISTS = ("train_slices", "train", "val", "test")
_SLICE = re.compile(r"(.+)_slice_(\d+)")
_FRAME = re.compile(r"(.+)_frame(\d+)")


def find(root, *, train_from: str = "auto") -> list[Case]:
    """Cases of all lists, in list order; `meta["split"]` is "train", "val" or "test".

    Args:
        train_from: "slices" (train_slices.list; the slices of a volume are one case, as SSL4MIS
            trains on them), "volumes" (train.list), or "auto": slices when that list is there.
    Raises:
        DataError: no list, an empty list, a listed file that is not there, a case or subject in
            two lists, slice files missing inside a volume.
    """
    if train_from not in ("auto", "slices", "volumes"):
        raise ValueError(f"train_from must be 'auto', 'slices' or 'volumes'; got {train_from!r}")
    root = require_folder(root, "SSL4MIS lists and h5 files")
    present = [name for name in LISTS if (root / f"{name}.list").is_file()]
    by_slices = train_from == "slices" or (train_from == "auto" and "train_slices" in present)
    train = "train_slices" if by_slices else "train"
    if not present or (train_from != "auto" and train not in present):
        raise DataError.at(
            root / f"{train if present else 'train_slices'}.list",
            expected="this list file",
            found="none",
            fix="give the folder that holds the .list files (data/ACDC of SSL4MIS)",
        )
    cases, problems, owner = [], [], {}
    for name in (train, "val", "test"):
        if name not in present:
            continue
        listed = root / f"{name}.list"
        try:
            found = _slices(root, listed) if name == "train_slices" else _volumes(root, listed)
        except DataError as error:
            problems += error.problems
            continue
        for case in found:
            other = owner.setdefault(case.subject, listed)
            if other != listed:
                problems.append(f"{listed}: {case.case_id} of {case.subject}, who is in "
                                f"{other.name} too. Fix: keep each in one list")  # fmt: skip
        cases += found
    if problems:
        raise DataError.collected(root, dict.fromkeys(problems))
    return cases


def _names(listed: Path) -> list[str]:
    text = read_bytes(listed, "list").decode("utf-8", errors="replace")
    names = [line.strip().removesuffix(".h5") for line in text.splitlines() if line.strip()]
    if not names:
        raise DataError.at(
            listed,
            expected="one case name per line",
            found="an empty list",
            fix="restore the list or remove the file",
        )
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise DataError.at(
            listed,
            expected="each name once",
            found=f"{', '.join(double[:5])} repeated",
            fix="remove the repetition",
        )
    return names


def _case(name: str, image: Path, split: str, **meta) -> Case:
    match = _FRAME.fullmatch(name)
    return Case(
        case_id=name,
        subject=match[1] if match else name,
        image=image,
        label=image,
        frame=int(match[2]) if match else None,
        meta={"dataset": "ssl4mis", "split": split, **meta},
    )


def _volumes(root: Path, listed: Path) -> list[Case]:
    cases, problems = [], []
    for name in _names(listed):
        path = root / "data" / f"{name}.h5"
        if not path.is_file():
            problems.append(f"{path}: expected because {listed.name} names it, found none. "
                            "Fix: restore the file or take the name off the list")  # fmt: skip
        cases.append(_case(name, path, listed.stem))
    if problems:
        raise DataError.collected(listed, problems)
    return cases


def _slices(root: Path, listed: Path) -> list[Case]:
    groups, problems = {}, []
    for name in _names(listed):
        match = _SLICE.fullmatch(name)
        path = root / "data" / "slices" / f"{name}.h5"
        if match is None:
            problems.append(f"{listed}: expected names <case>_slice_<i>, found {name!r}. "
                            "Fix: list slices here and volumes in train.list")  # fmt: skip
        elif not path.is_file():
            problems.append(f"{path}: expected because {listed.name} names it, found none. "
                            "Fix: restore the file or take the name off the list")  # fmt: skip
        else:
            groups.setdefault(match[1], {})[int(match[2])] = path
    cases = []
    for name, slices in groups.items():
        numbers = sorted(slices)
        gaps = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
        if gaps and not problems:
            problems.append(f"{listed}: slices {gaps} of {name} are not listed between "
                            f"{numbers[0]} and {numbers[-1]}. Fix: complete the list")  # fmt: skip
        paths = tuple(slices[i] for i in numbers)
        cases.append(_case(name, paths[0], "train", slices=paths))
    if problems:
        raise DataError.collected(listed, problems)
    return cases


def _read_h5(path: Path, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path}: reading h5 files needs h5py. Fix: pip install h5py") from error
    raw = read_bytes(path, "h5")
    try:
        with h5py.File(io.BytesIO(raw), "r") as file:
            lost = {"image", "label"} - set(file)
            if lost:
                raise KeyError(f"no {' and no '.join(sorted(lost))}, only {sorted(file)}")
            image, label = file["image"][()], file["label"][()]
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise DataError.at(
            path,
            expected="an h5 file with `image` and `label`",
            found=f"{type(error).__name__}: {error}",
            fix="copy or convert the file again",
        ) from error
    image, label = np.asarray(image), np.asarray(label)
    if image.ndim != ndim or label.shape != image.shape:
        raise DataError.at(
            path,
            expected=f"a {ndim}-D image and a label of its shape",
            found=f"image {image.shape}, label {label.shape}",
            fix="convert the case again",
        )
    image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise DataError.at(
            path,
            expected="finite intensities",
            found=f"{int((~np.isfinite(image)).sum())} NaN or infinite voxels",
            fix="convert the case again",
        )
    return image, integer_label(path, label)


def read(case: Case) -> Source:
    """A case of one volume file or of its slice files, axes (X, Y, Z) as everywhere else."""
    if "slices" in case.meta:
        parts = [_read_h5(path, 2) for path in case.meta["slices"]]
        for path, (image, _) in zip(case.meta["slices"], parts, strict=True):
            if image.shape != parts[0][0].shape:
                raise DataError.at(
                    path,
                    expected=f"the size of the other slices, {parts[0][0].shape}",
                    found=f"{image.shape}",
                    fix="convert the volume again",
                )
        image, label = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    else:
        image, label = _read_h5(case.image, 3)
    return Source(image.transpose(2, 1, 0), label.transpose(2, 1, 0), np.eye(4), (1.0, 1.0, 1.0))
