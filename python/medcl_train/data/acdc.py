"""ACDC layout: `patientNNN/Info.cfg`, `patientNNN_frameAA.nii.gz`, `patientNNN_frameAA_gt.nii.gz`.

Patients lie in `training/` and `testing/` (below `database/` or not) or directly in the root.
ED is not always frame 01: the frames come from Info.cfg, by key. The 4-D file is not used.
Labels: 1 RV, 2 myocardium, 3 LV.
"""

import re
from pathlib import Path

import numpy as np

from .cases import Case
from .errors import DataError, report_unused, require_folder
from .nifti import is_nifti, read_label

GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
CLASSES = (1, 2, 3)
_SUBSETS = ("training", "testing", "database/training", "database/testing")
_PATIENT = re.compile(r"patient\d+")
_FRAME = re.compile(r"(patient\d+)_frame(\d+)(_gt)?\.nii(\.gz)?")


def read_info(path: Path) -> dict[str, str]:
    """`key: value` lines of an Info.cfg. Raises DataError (missing file, a line without a colon,
    ED or ES missing or no frame number, a key given twice)."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise DataError.at(
            path,
            expected="an Info.cfg with the ED and ES frame numbers",
            found=f"{type(error).__name__}",
            fix="restore it from the ACDC archive",
        ) from error
    info = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or not key or key in info:
            raise DataError.at(
                path,
                expected="lines `key: value`, each key once",
                found=f"{line!r} in line {number}",
                fix="restore it from the ACDC archive",
            )
        info[key] = value
    for key in ("ED", "ES"):
        if not info.get(key, "").isdigit() or int(info[key]) < 1:
            raise DataError.at(
                path,
                expected=f"a line `{key}: <frame number>`",
                found=f"{key}: {info[key]!r}" if key in info else f"no {key}",
                fix="restore it from the ACDC archive",
            )
        if info.get("NbFrame", "").isdigit() and int(info[key]) > int(info["NbFrame"]):
            raise DataError.at(
                path,
                expected=f"{key} within the {info['NbFrame']} frames of NbFrame",
                found=f"{key}: {info[key]}",
                fix="correct the frame number",
            )
    return info


def patient_folders(root: Path) -> list[tuple[str, Path]]:
    """(subset, folder) of all patients. Raises DataError when there is none or one occurs twice."""
    found, odd = [], []
    for subset in ("", *_SUBSETS):
        folder = root / subset
        if folder.is_dir():
            for entry in sorted(folder.iterdir()):
                if entry.is_dir() and _PATIENT.fullmatch(entry.name):
                    found.append((Path(subset).name, entry))
                elif entry.is_dir() and entry.name.lower().startswith("patient"):
                    odd.append(entry)
    if not found:
        raise DataError.at(
            root,
            expected="folders patientNNN (or training/patientNNN, testing/patientNNN)",
            found=f"only {', '.join(sorted(p.name for p in root.iterdir())[:5])}",
            fix="give the folder that holds the ACDC patients",
        )
    report_unused(root, odd, "named patientNNN")
    by_name = {}
    for _, entry in found:
        by_name.setdefault(entry.name, []).append(entry)
    double = [f"{paths[0]}: the same patient also in {paths[1].parent}. Fix: keep one of them"
              for paths in by_name.values() if len(paths) > 1]  # fmt: skip
    if double:
        raise DataError.collected(root, double)
    return found


def find(
    root,
    *,
    phases="ED_ES",
    subset: str | None = None,
    missing_classes="auto",
    dataset: str = "acdc",
) -> list[Case]:
    """Cases of an ACDC folder, sorted by patient, then ED before ES.

    Args:
        phases: "ED_ES", "ED" (as Chaitanya et al.), "ES", or "all" (every frame file with label).
        subset: "training" | "testing": only this folder.
        missing_classes: classes without annotation. "auto": in a case whose Info.cfg names none of
            ACDC's five groups (converted foreign data), the classes without a single voxel;
            ACDC itself annotates all three everywhere. Or one tuple of class ids for all cases.
    Raises:
        DataError: listing every patient with a missing or broken Info.cfg, frame or label. Labels
            may be absent only for a whole subset at once (a test archive without labels).
    """
    if phases not in ("ED_ES", "ED", "ES", "all"):
        raise ValueError(f"phases must be 'ED_ES', 'ED', 'ES' or 'all'; got {phases!r}")
    if missing_classes != "auto" and not set(missing_classes) <= set(CLASSES):
        raise ValueError(f"missing_classes must be 'auto' or of {CLASSES}; got {missing_classes!r}")
    root = require_folder(root, "ACDC patients")
    folders = patient_folders(root)
    if subset is not None:
        folders = [(name, folder) for name, folder in folders if name == subset]
        if not folders:
            raise DataError.at(
                root,
                expected=f"patients in {subset}/",
                found="none",
                fix="check the folder or leave `subset` away",
            )
    cases, problems = [], []
    for name in dict.fromkeys(name for name, _ in folders):
        members = [folder for part, folder in folders if part == name]
        labelled = any(_labels_in(folder) for folder in members)
        for folder in members:
            try:
                cases += _patient(folder, phases, labelled, missing_classes, name, dataset)
            except DataError as error:
                problems += error.problems
    if problems:
        raise DataError.collected(root, problems)
    return cases


def _labels_in(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if (m := _FRAME.fullmatch(p.name)) and m[3]]


def _patient(folder, phases, labelled, missing_classes, subset, dataset) -> list[Case]:
    info = read_info(folder / "Info.cfg")
    images, labels, problems, odd = {}, {}, [], []
    for path in sorted(folder.iterdir()):
        match = _FRAME.fullmatch(path.name)
        if match is None:
            if is_nifti(path) and "_4d.nii" not in path.name:
                odd.append(path)
            continue
        if match[1] != folder.name:
            problems.append(f"{path}: expected a file of {folder.name}. Fix: move it to {match[1]}")
            continue
        group = labels if match[3] else images
        frame = int(match[2])
        if frame in group:
            problems.append(f"{path}: expected one file per frame, found {group[frame].name} too. "
                            "Fix: keep one")  # fmt: skip
        group[frame] = path
    report_unused(folder, odd, "patientNNN_frameAA[_gt].nii.gz")
    for frame in sorted(set(labels) - set(images)):
        problems.append(f"{labels[frame]}: expected its image beside it, found none. "
                        "Fix: restore the image or remove the label")  # fmt: skip
    ed, es = int(info["ED"]), int(info["ES"])
    wanted = {"ED": [ed], "ES": [es], "ED_ES": [ed, es], "all": sorted({ed, es, *images})}[phases]
    cases = []
    for frame in dict.fromkeys(wanted):
        name = f"{folder.name}_frame{frame:02d}"
        if frame not in images:
            problems.append(f"{folder / name}.nii.gz: expected this frame (Info.cfg: ED {ed}, "
                            f"ES {es}), found none. Fix: restore the file")  # fmt: skip
            continue
        label = labels.get(frame)
        if label is None and labelled:
            problems.append(f"{folder / name}_gt.nii.gz: expected the label of {images[frame].name}"
                            ", found none. Fix: restore it, or remove all labels of the subset"
                            " to predict only")  # fmt: skip
            continue
        meta = {
            "dataset": dataset, "subset": subset, "group": info.get("Group", ""),
            "phase": "ED" if frame == ed else "ES" if frame == es else "", "info": info,
        }  # fmt: skip
        missing = _missing(label, info, missing_classes)
        if missing:
            meta["missing_classes"] = missing
        cases.append(Case(name, folder.name, images[frame], label, frame, meta))
    if problems:
        raise DataError.collected(folder, problems)
    return cases


def _missing(label, info, rule) -> tuple[int, ...]:
    if label is None:
        return ()
    if rule != "auto":
        return tuple(sorted(rule))
    if info.get("Group", "") in ("", *GROUPS):
        return ()
    found = np.unique(read_label(label)[0])
    return tuple(c for c in CLASSES if c not in found)
