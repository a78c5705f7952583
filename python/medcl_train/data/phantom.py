"""A cardiac cine phantom as real NIfTI files in the ACDC layout.

Patients of ACDC's five groups, each with an end-diastolic (ED) and an end-systolic (ES) frame,
int16 or float32, of varying size and spacing, on axis-aligned (both signs) and oblique affines.
The files depend on the arguments only. Slice 0 is the base. One patient has ED 4; every fourth
patient has a last slice below the apex, without any label.

    python -m medcl_train.data.phantom OUT --patients 10
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from .anatomy import GROUPS, Heart, Scene
from .atomic import write_atomic
from .errors import DataError, require_manifest
from .nifti import write_nifti

SPACINGS = (1.25, 1.367188, 1.5625, 1.785714)
MANIFEST = "phantom.json"
UNFINISHED = "phantom.part"
_MIN_FIELD_MM = 124.0


def write(
    root: Path | str,
    patients: int = 10,
    phases: int = 2,
    seed: int = 0,
    *,
    size: tuple[int, int] = (154, 256),
    slices: tuple[int, int] = (6, 10),
    spacings: tuple[float, ...] = SPACINGS,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Path]:
    """Write the phantom; returns the patient folders.

    Args:
        patients: how many; patient n is the same whatever the number (from 4 on).
        phases: frames per patient from ED to ES, 2..8, all with label.
        size: smallest and largest number of pixels along X and Y.
        slices: smallest and largest number of slices.
        spacings: in-plane mm to choose from.
        overwrite: write into a folder that already holds patients.
    Raises:
        ValueError: an argument out of range, or a field of view too small for a heart.
        DataError: the folder cannot be written, or holds patients already.
    """
    (low, high), (few, many) = size, slices
    if patients < 1 or not 2 <= phases <= 8:
        raise ValueError(f"expected patients >= 1 and phases in 2..8; got {patients} and {phases}")
    if not (0 < low <= high and 1 < few <= many and spacings and min(spacings) > 0):
        raise ValueError(
            f"expected rising size and slices (>= 2); got {size}, {slices}, {spacings}"
        )
    if high * max(spacings) < _MIN_FIELD_MM:
        raise ValueError(
            f"size {size} at spacings {spacings} mm shows {high * max(spacings):.0f} mm; a heart "
            f"needs {_MIN_FIELD_MM:.0f} mm: use a larger size or spacing"
        )
    root = Path(root)
    if not overwrite and root.is_dir() and any(root.glob("patient*")):
        raise DataError.at(
            root,
            expected="a folder without patients",
            found="patient folders",
            fix="choose another folder, or overwrite=True (--overwrite)",
        )
    settings = _manifest(patients, phases, seed, size, slices, spacings)
    manifest = json.dumps(settings, indent=1, sort_keys=True).encode()
    write_atomic(root / UNFINISHED, lambda stream: stream.write(manifest), what="marker")
    folders = []
    for number in range(1, patients + 1):
        early = number == min(4, patients)  # the patient with ED 4
        folders.append(_write_patient(root, number, early, phases, seed, size, slices, spacings))
        if progress is not None:
            progress(number, patients, folders[-1].name)
    (root / UNFINISHED).replace(root / MANIFEST)
    return folders


def ensure(root: Path | str, patients: int = 10, phases: int = 2, seed: int = 0, **options) -> bool:
    """Write the phantom unless exactly this one is there; returns True when it was written.

    An interrupted writing (its marker is still there) is done again by the next call.
    Raises DataError when the folder holds another phantom or other patients.
    """
    root = Path(root)
    settings = {"size": (154, 256), "slices": (6, 10), "spacings": SPACINGS}
    settings |= {key: options[key] for key in settings if key in options}
    wanted = _manifest(patients, phases, seed, **settings)
    for path in (root / UNFINISHED, root / MANIFEST):
        if not path.is_file():
            continue
        require_manifest(path, wanted)
        if path.name == MANIFEST:
            return False
    write(root, patients, phases, seed, overwrite=(root / UNFINISHED).is_file(), **options)
    return True


def _manifest(patients, phases, seed, size, slices, spacings) -> dict:
    return {
        "generator": "medcl_train.data.phantom", "format": 1, "patients": patients,
        "phases": phases, "seed": seed, "size": list(size), "slices": list(slices),
        "spacings": list(spacings),
    }  # fmt: skip


def _affine(kind: int, shape, spacing, random) -> np.ndarray:
    """0: negative x and y diagonal; 1: oblique (short-axis plane); 2: positive diagonal."""
    if kind == 1:
        cosine, sine = [], []
        for angle in np.radians([50, -35, 20] + random.uniform(-15, 15, 3)):
            cosine.append(np.cos(angle))
            sine.append(np.sin(angle))
        x = np.array([[1, 0, 0], [0, cosine[0], -sine[0]], [0, sine[0], cosine[0]]])
        y = np.array([[cosine[1], 0, sine[1]], [0, 1, 0], [-sine[1], 0, cosine[1]]])
        z = np.array([[cosine[2], -sine[2], 0], [sine[2], cosine[2], 0], [0, 0, 1]])
        turn = x @ y @ z @ np.diag([-1.0, -1.0, 1.0])
    else:
        turn = np.diag([-1.0, -1.0, 1.0] if kind == 0 else [1.0, 1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = turn * np.asarray(spacing)
    middle = (np.asarray(shape) - 1) / 2
    affine[:3, 3] = random.uniform(-20, 20, 3) - affine[:3, :3] @ middle
    return affine


def _write_patient(root, number, late_ed, phases, seed, size, slices, spacings) -> Path:
    random = np.random.RandomState([seed % 2**32, number])
    group = tuple(GROUPS)[(number - 1) % len(GROUPS)]
    scene = Scene.draw(Heart.draw(group, random), random)
    pixel = spacings[random.randint(len(spacings))]
    shape = [random.randint(size[0], size[1] + 1) for _ in range(2)]
    shape = [max(n, min(size[1], int(np.ceil(_MIN_FIELD_MM / pixel)))) for n in shape]
    while min(shape) * pixel < _MIN_FIELD_MM:  # too fine for so few pixels: the next coarser one
        pixel = min(s for s in spacings if s > pixel)
    shape.append(random.randint(slices[0], slices[1] + 1))
    length = random.uniform(78, 98)  # mm from base to apex
    thickness = min((5.0, 8.0, 10.0), key=lambda step: abs(step * shape[2] - length))
    spacing = (pixel, pixel, thickness)
    affine = _affine((number - 1) % 3, shape, spacing, random)
    below_apex = number % 4 == 3 and shape[2] > 3
    heart_slices = shape[2] - 1 if below_apex else shape[2]
    depths = (np.arange(shape[2]) + 0.35) / heart_slices
    depths[heart_slices:] = 1.1
    shifts = random.uniform(-1.2, 1.2, (shape[2], 2))  # one breath hold per slice
    ed = 4 if late_ed else 1
    es = int(random.randint(max(8, ed + 7), 15))
    frames_total = int(random.randint(16, 31))
    weight, height = random.uniform(50, 105), random.uniform(152, 192)

    folder = root / f"patient{number:03d}"
    frames = np.rint(np.linspace(ed, es, phases)).astype(int)
    for frame, progress in zip(frames, np.linspace(0, 1, phases), strict=True):
        contraction = float(np.sin(np.pi / 2 * progress) ** 2)
        pairs = [
            scene.slice(shape[:2], spacing[:2], float(depth), contraction, shift, random)
            for depth, shift in zip(depths, shifts, strict=True)
        ]
        image, label = (np.stack(parts, axis=-1) for parts in zip(*pairs, strict=True))
        integer = number % 2 == 1
        image = np.rint(image).astype(np.int16) if integer else image.astype(np.float32)
        stem = folder / f"{folder.name}_frame{frame:02d}"
        write_nifti(f"{stem}.nii.gz", _nifti(image, affine))
        write_nifti(f"{stem}_gt.nii.gz", _nifti(label, affine))
    info = (
        f"ED: {ed}\nES: {es}\nGroup: {group}\nHeight: {height:.1f}\n"
        f"NbFrame: {frames_total}\nWeight: {weight:.1f}\n"
    )
    write_atomic(folder / "Info.cfg", lambda stream: stream.write(info.encode()), what="Info.cfg")
    return folder


def _nifti(array, affine) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    return image


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medcl_train.data.phantom",
        description="Write a cardiac cine phantom as NIfTI files in the ACDC layout.",
    )
    parser.add_argument("out", type=Path, help="folder to write patient001, patient002, ... into")
    parser.add_argument("--patients", type=int, default=10)
    parser.add_argument("--phases", type=int, default=2, help="frames from ED to ES, 2 to 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(154, 256), metavar=("MIN", "MAX"),
                        help="pixels along x and y")  # fmt: skip
    parser.add_argument("--slices", type=int, nargs=2, default=(6, 10), metavar=("MIN", "MAX"))
    parser.add_argument("--overwrite", action="store_true")
    chosen = parser.parse_args(arguments)
    try:
        folders = write(
            chosen.out, chosen.patients, chosen.phases, chosen.seed, size=tuple(chosen.size),
            slices=tuple(chosen.slices), overwrite=chosen.overwrite,
        )  # fmt: skip
    except ValueError as error:  # DataError is one
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"wrote {len(folders)} patients to {chosen.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
