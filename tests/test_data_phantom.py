"""The phantom: real files, repeatable, varied, and anatomically in order."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medcl_train.data import DataError, find_cases, load_native, phantom
from medcl_train.data.anatomy import GROUPS, Heart, Scene

SMALL = {"size": (72, 90), "slices": (4, 5)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    phantom.write(root, 6, seed=0, size=(100, 140), slices=(6, 12))
    return root


@pytest.fixture(scope="module")
def volumes(root):
    return [(case, *load_native(case)) for case in find_cases("phantom", root)]


def test_files_are_acdc_like(root):
    patient = root / "patient001"
    image = nib.load(patient / "patient001_frame01.nii.gz")
    label = nib.load(patient / "patient001_frame01_gt.nii.gz")
    assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
    second = nib.load(root / "patient002/patient002_frame01.nii.gz")
    assert second.get_data_dtype() == np.float32
    assert image.shape == label.shape and np.array_equal(image.affine, label.affine)
    lines = (patient / "Info.cfg").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "ED", "ES", "Group", "Height", "NbFrame", "Weight",
    ]  # fmt: skip
    infos = [(root / f"patient{n:03d}/Info.cfg").read_text().splitlines() for n in range(1, 7)]
    assert [info[0] for info in infos] == ["ED: 1"] * 3 + ["ED: 4"] + ["ED: 1"] * 2
    assert all(8 <= int(info[1].split()[1]) <= 14 for info in infos)
    assert [info[2] for info in infos] == [f"Group: {g}" for g in (*GROUPS, "NOR")]


def test_grids_vary_in_size_spacing_and_orientation(volumes):
    grids = {case.subject: (image.shape, spacing) for case, image, _, _, spacing in volumes}
    assert len({shape for shape, _ in grids.values()}) >= 5
    assert len({spacing[0] for _, spacing in grids.values()}) >= 2
    assert len({spacing[2] for _, spacing in grids.values()}) >= 2
    affines = {case.subject: affine[:3, :3] for case, _, _, affine, _ in volumes}
    diagonal = [a for a in affines.values() if np.allclose(a, np.diag(np.diag(a)))]
    signs = {tuple(np.sign(np.diag(a))) for a in diagonal}
    assert signs == {(-1, -1, 1), (1, 1, 1)} and len(diagonal) == 4
    for case, _, _, affine, spacing in volumes:
        assert np.allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing, rtol=1e-5)
        assert np.linalg.det(affine[:3, :3]) > 0, case.case_id
        header = nib.load(case.image).header
        assert (header["sform_code"], header["qform_code"]) == (1, 1)
        assert np.allclose(header.get_sform(), header.get_qform(), atol=1e-3)


def test_myocardium_encloses_the_left_ventricle(volumes):
    for case, _, label, _, _ in volumes:
        for z in range(label.shape[2]):
            plane = label[..., z]
            if not plane.any():
                continue
            around = ndimage.binary_dilation(plane == 3, np.ones((3, 3))) & (plane != 3)
            assert (plane[around] == 2).all(), (case.case_id, z)
            for value in (1, 2, 3):
                _, parts = ndimage.label(plane == value, np.ones((3, 3)))
                assert parts <= 1, (case.case_id, z, value)
            filled = ndimage.binary_fill_holes(plane == 2)
            assert np.array_equal(filled, (plane == 2) | (plane == 3))


def test_right_ventricle_lies_beside_the_ring(volumes):
    for case, _, label, _, _ in volumes:
        centres = {v: np.array(ndimage.center_of_mass(label == v))[:2] for v in (1, 2, 3)}
        near = np.linalg.norm(centres[2] - centres[3])
        assert near < 3 < 10 < np.linalg.norm(centres[1] - centres[3]), case.case_id
        touching = ndimage.binary_dilation(label == 1, np.ones((3, 3, 1))) & (label == 2)
        assert touching.sum() > 50
        crescent = ndimage.binary_fill_holes(label[..., 0] == 1)
        hull_centre = np.rint(ndimage.center_of_mass(label[..., 0] > 0)).astype(int)
        assert not crescent[tuple(hull_centre)]  # the heart's centre is not in the RV


def volume_ml(label, value, spacing):
    return float((label == value).sum() * np.prod(spacing) / 1000)


def test_systole_is_smaller_and_keeps_the_muscle(volumes):
    fractions = {}
    for ed, es in zip(volumes[::2], volumes[1::2], strict=True):
        assert (ed[0].meta["phase"], es[0].meta["phase"]) == ("ED", "ES")
        assert ed[0].subject == es[0].subject
        ml = {(phase, v): volume_ml(row[2], v, row[4])
              for phase, row in (("ED", ed), ("ES", es)) for v in (1, 2, 3)}  # fmt: skip
        assert ml["ES", 3] < 0.9 * ml["ED", 3] and ml["ES", 1] < 0.9 * ml["ED", 1]
        assert 0.7 < ml["ES", 2] / ml["ED", 2] < 1.3
        fractions[ed[0].meta["group"]] = 1 - ml["ES", 3] / ml["ED", 3]
    assert fractions["DCM"] < 0.35 < 0.42 < fractions["NOR"] < fractions["HCM"]
    assert fractions["MINF"] < fractions["NOR"]


def test_the_heart_tapers_from_base_to_apex(volumes):
    for case, _, label, _, _ in volumes:
        areas = [(label[..., z] == 3).sum() for z in range(label.shape[2])]
        heart = [a for a in areas if a]
        assert heart[0] > 1.4 * heart[-1], case.case_id
        assert all(b <= a * 1.05 for a, b in zip(heart, heart[1:], strict=False))
        assert (label[..., 0] == 1).any() and not (label[..., -1] == 1).any()
        beyond = int(case.subject[-3:]) % 4 == 3
        assert (areas[-1] == 0) == beyond  # these patients have a slice below the apex


def test_contrast_bias_and_noise_are_those_of_a_cine(volumes):
    for case, image, label, _, _ in volumes:
        blood, muscle, right = (np.median(image[label == v]) for v in (3, 2, 1))
        assert blood > 1.8 * muscle and right > 1.6 * muscle, case.case_id
        assert image.min() >= 0
        dark = np.percentile(image, 20)
        assert 0 < dark < 0.25 * blood
        noise = np.std(np.diff(image[label == 3]))
        assert 0.01 * blood < noise < 0.4 * blood


def test_the_bias_field_is_smooth_and_strong():
    random = np.random.RandomState(4)
    scene = replace(Scene.draw(Heart.draw("NOR", random), random), noise=0.0)
    flat = replace(scene, bias=(0, 0, 0, 0, 0))
    images = [
        s.slice((128, 128), (2.0, 2.0), 0.4, 0.0, (0, 0), np.random.RandomState(1))[0]
        for s in (scene, flat)
    ]
    log_field = np.log(images[0] / images[1])
    assert np.ptp(log_field) > 0.3
    smooth = ndimage.gaussian_filter(log_field, 3)[12:-12, 12:-12]
    assert np.abs(smooth - log_field[12:-12, 12:-12]).max() < 0.02


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, patients, seed in (("a", 5, 0), ("b", 4, 0), ("c", 4, 1)):
        phantom.write(tmp_path / name, patients, seed=seed, **SMALL)

    def contents(name):
        base = tmp_path / name
        return {
            str(p.relative_to(base)): p.read_bytes()
            for p in sorted(base.rglob("patient00[1-4]*"))
            if p.is_file()
        }

    a, b, c = contents("a"), contents("b"), contents("c")
    assert a == b and len(a) == 16
    shared = [name for name in a if name in c and name.endswith("frame01.nii.gz")]
    assert shared and all(a[name] != c[name] for name in shared)


def test_ensure_writes_once_and_resumes(tmp_path):
    root = tmp_path / "p"
    assert phantom.ensure(root, 2, **SMALL) is True
    stamp = (root / "patient001/Info.cfg").stat().st_mtime_ns
    assert phantom.ensure(root, 2, **SMALL) is False
    assert (root / "patient001/Info.cfg").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="phantom.json.*another folder"):
        phantom.ensure(root, 3, **SMALL)
    (root / phantom.MANIFEST).rename(root / phantom.UNFINISHED)  # as after a kill
    (root / "patient002/patient002_frame04.nii.gz").unlink()
    assert phantom.ensure(root, 2, **SMALL) is True
    assert len(find_cases("phantom", root)) == 4
    other = tmp_path / "real"
    (other / "patient001").mkdir(parents=True)
    with pytest.raises(DataError, match="real: expected a folder without patients"):
        phantom.ensure(other, 2, **SMALL)


def test_more_phases_fill_the_way_to_systole(tmp_path):
    phantom.write(tmp_path, 1, phases=4, **SMALL)
    cases = find_cases("phantom", tmp_path, phases="all")
    sizes = [(load_native(case)[1] == 3).sum() for case in cases]
    assert len(sizes) == 4 and sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_arguments_are_checked(tmp_path):
    for arguments in ({"patients": 0}, {"phases": 1}, {"phases": 9}, {"size": (90, 72)},
                      {"slices": (1, 1)}, {"size": (40, 50)}):  # fmt: skip
        with pytest.raises(ValueError, match="expected|needs"):
            phantom.write(tmp_path / "x", **{"patients": 1, **arguments})
    assert not (tmp_path / "x").exists()


def test_default_size_matches_acdc(tmp_path):
    phantom.write(tmp_path, 1)
    image, label, _, spacing = load_native(find_cases("phantom", tmp_path)[0])
    assert all(154 <= n <= 256 for n in image.shape[:2]) and 6 <= image.shape[2] <= 10
    assert spacing[2] in (5.0, 8.0, 10.0)
    assert 60 < volume_ml(label, 3, spacing) < 320


def test_command_line(tmp_path, repo, capsys):
    command = [sys.executable, "-m", "medcl_train.data.phantom", str(tmp_path / "out"),
               "--patients", "1", "--size", "72", "80", "--slices", "2", "3"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(repo / "python")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "wrote 1 patients" in done.stdout and done.stderr == ""
    assert len(find_cases("phantom", tmp_path / "out")) == 2
    assert json.loads((tmp_path / "out/phantom.json").read_text())["patients"] == 1
    with pytest.raises(SystemExit) as stop:
        phantom.main([str(tmp_path / "out")])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
