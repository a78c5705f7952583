"""MM-WHS 2017 layout: `{mr,ct}_{train,test}_NNNN_image.nii.gz` with `..._label.nii.gz` beside it.

The archives are unpacked in different ways, so the search is recursive. Raw label values (205, 420,
500, ...) become ids in the recipe (`recipe.mmwhs_map`); files are turned to RAS there.
"""

import re

from .cases import Case
from .errors import DataError, report_unused, require_folder
from .nifti import is_nifti

_NAME = re.compile(r"((mr|ct)_(train|test)_(\d+))_(image|label)\.nii(\.gz)?")


def find(root, *, modality: str = "mr", part: str = "train") -> list[Case]:
    """Cases of one modality, sorted. The subject is the modality and number (`mr_1001`).

    Args:
        modality: "mr" | "ct".
        part: "train" (labelled), "test" (images only), or "all".
    Raises:
        DataError: no file of this modality and part, a training image without label, a label
            without image, a case that occurs twice.
    """
    if modality not in ("mr", "ct"):
        raise ValueError(f"modality must be 'mr' or 'ct'; got {modality!r}")
    if part not in ("train", "test", "all"):
        raise ValueError(f"part must be 'train', 'test' or 'all'; got {part!r}")
    root = require_folder(root, "MM-WHS volumes")
    found, problems, odd = {}, [], []
    for path in sorted(root.rglob("*.nii*")):
        match = _NAME.fullmatch(path.name)
        if match is None and is_nifti(path):
            odd.append(path)
        if match is None or match[2] != modality or part not in ("all", match[3]):
            continue
        files = found.setdefault(match[1], {"part": match[3], "number": match[4]})
        if match[5] in files:
            problems.append(f"{path}: the same file also at {files[match[5]]}. Fix: keep one")
        files[match[5]] = path
    report_unused(root, odd, "{mr,ct}_{train,test}_NNNN_{image,label}.nii.gz")
    cases = []
    for name, files in sorted(found.items()):
        if "image" not in files:
            problems.append(f"{files['label']}: expected its image {name}_image.nii.gz, found none."
                            " Fix: restore the image or remove the label")  # fmt: skip
        elif "label" not in files and files["part"] == "train":
            problems.append(f"{files['image']}: expected its label {name}_label.nii.gz, found none."
                            " Fix: restore the label or remove the image")  # fmt: skip
        else:
            cases.append(
                Case(
                    name,
                    f"{modality}_{files['number']}",
                    files["image"],
                    files.get("label"),
                    meta={"dataset": "mmwhs", "modality": modality, "part": files["part"]},
                )  # fmt: skip
            )
    if problems:
        raise DataError.collected(root, problems)
    if not cases:
        wanted = "train or test" if part == "all" else part
        raise DataError.at(
            root,
            expected=f"files {modality}_{wanted}_NNNN_image.nii.gz at any depth",
            found="none",
            fix="check the folder and the options modality and part",
        )
    return cases
