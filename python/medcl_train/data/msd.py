"""Medical Segmentation Decathlon layout: `imagesTr/`, `labelsTr/`, `imagesTs/`, `dataset.json`.

dataset.json is optional; when present, every training pair it lists must be there. Hippocampus
volumes are not people: left and right of one person are numbered (n, n + 1) with n odd, so the
subject is (n + 1) // 2. In the other tasks a volume is a subject.
"""

import json
import re
from pathlib import Path

from .cases import Case
from .errors import DataError, report_unused, require_folder
from .nifti import is_nifti, stem

_HIPPOCAMPUS = re.compile(r"hippocampus_0*(\d+)")


def subject_of(case_id: str) -> str:
    """Subject key of a volume name."""
    match = _HIPPOCAMPUS.fullmatch(case_id)
    return f"subject{(int(match[1]) + 1) // 2:03d}" if match else case_id


def find(root, *, part: str = "train") -> list[Case]:
    """Cases of one MSD task folder, sorted by name.

    Args:
        part: "train" (imagesTr with labelsTr), "test" (imagesTs, no labels) or "all". A folder
            without labelsTr gives unlabelled training images.
    Raises:
        DataError: missing folder or pair, a dataset.json that cannot be read or lists absent files.
    """
    if part not in ("train", "test", "all"):
        raise ValueError(f"part must be 'train', 'test' or 'all'; got {part!r}")
    root = require_folder(root, "an MSD task (imagesTr, labelsTr)")
    listing = _listing(root / "dataset.json")
    meta = {"dataset": "msd"}
    if names := _class_names(listing, root / "dataset.json"):
        meta["num_classes"] = len(names)
    pairs, problems = {}, []
    if part in ("train", "all"):
        images, labels = _files(root / "imagesTr", required=True), _files(root / "labelsTr")
        for name in sorted(set(images) | set(labels)):
            if name not in images:
                problems.append(f"{labels[name]}: expected its image in imagesTr, found none. "
                                "Fix: restore the image or remove the label")  # fmt: skip
            elif labels and name not in labels:
                problems.append(f"{images[name]}: expected its label in labelsTr, found none. "
                                "Fix: restore the label or remove the image")  # fmt: skip
            else:
                pairs[name] = images[name], labels.get(name)
        for entry in (listing or {}).get("training", []):
            for kind in ("image", "label") if isinstance(entry, dict) else ():
                if kind in entry and not (root / entry[kind]).is_file():
                    problems.append(f"{root / entry[kind]}: listed in dataset.json, not there. "
                                    "Fix: restore it or correct dataset.json")  # fmt: skip
    if part in ("test", "all"):
        for name, image in _files(root / "imagesTs", required=part == "test").items():
            if name in pairs:
                problems.append(f"{image}: the same name also in imagesTr. Fix: rename one")
            pairs[name] = image, None
    if problems:
        raise DataError.collected(root, problems)
    return [
        Case(name, subject_of(name), image, label, meta=dict(meta))
        for name, (image, label) in sorted(pairs.items())
    ]


def describe(root) -> tuple[bool, tuple[str, ...]]:
    """Whether a task folder is the hippocampus task, by its file names, and the names of its
    classes, background first: those of dataset.json, else none."""
    root = require_folder(root, "an MSD task (imagesTr, labelsTr)")
    path = root / "dataset.json"
    images = [
        p for part in ("imagesTr", "imagesTs") for p in (root / part).glob("*") if is_nifti(p)
    ]
    hippocampus = bool(images) and all(_HIPPOCAMPUS.fullmatch(stem(p)) for p in images)
    return hippocampus, _class_names(_listing(path), path)


def _class_names(listing: dict | None, path: Path) -> tuple[str, ...]:
    """Names by label value, of {"0": "background", "1": ...} in dataset.json; empty without."""
    labels = (listing or {}).get("labels")
    if not labels:
        return ()
    try:
        names = {int(value): str(name) for value, name in labels.items()}
    except (AttributeError, ValueError):
        names = {}
    if sorted(names) != list(range(len(labels))) or len(names) < 2:
        raise DataError.at(
            path,
            expected="labels from 0 upwards with their names",
            found=f"labels {labels!r}",
            fix='write {"0": "background", "1": ...} without gaps, or remove dataset.json',
        )
    return tuple(names[value] for value in range(len(names)))


def _files(folder: Path, required: bool = False) -> dict[str, Path]:
    found = {}
    if folder.is_dir():
        found = {stem(path): path for path in sorted(folder.iterdir()) if is_nifti(path)}
        odd = (p for p in folder.iterdir() if not is_nifti(p) and not p.name.startswith("."))
        report_unused(folder, odd, "NIfTI files")
    if required and not found:
        raise DataError.at(
            folder,
            expected="NIfTI files (.nii.gz)",
            found="an empty folder" if folder.is_dir() else "no such folder",
            fix="give the folder of one MSD task, the one that holds imagesTr",
        )
    return found


def _listing(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        listing = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(listing, dict):
            raise ValueError(f"a JSON {type(listing).__name__}")
    except (OSError, ValueError) as error:
        raise DataError.at(
            path,
            expected="a JSON object",
            found=f"{type(error).__name__}: {error}",
            fix="restore dataset.json or remove it (it is optional)",
        ) from error
    return listing
