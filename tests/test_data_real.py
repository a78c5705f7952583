"""The shared real data: hippocampus (MSD) and five cardiac patients (Sunnybrook, ACDC layout)."""

import csv

import nibabel as nib
import numpy as np
import pytest

from medcl_train.data import (
    IGNORE_INDEX,
    SliceDataset,
    find_cases,
    load_native,
    make_split,
    prepare,
    recipe_for,
    save_prediction,
    shared_data_root,
)


def folder(name):
    root = shared_data_root()
    if root is None or not (root / name).is_dir():
        pytest.skip(f"real data {name} is not on this machine; MEDCL_DATA can name its folder")
    return root / name


@pytest.fixture(scope="module")
def hippocampus():
    return find_cases("msd", folder("msd_hippocampus"))


@pytest.fixture(scope="module")
def cardiac():
    return find_cases("acdc", folder("sunnybrook_acdc"))


def test_hippocampus_subjects_and_shapes_match_the_table(hippocampus):
    with open(folder("msd_hippocampus") / "subjects.csv") as file:
        rows = {row["volume"]: row for row in csv.DictReader(file)}
    assert len(hippocampus) == len(rows) == 182
    assert len({case.subject for case in hippocampus}) == 120
    for case in hippocampus:
        row = rows[case.image.name]
        assert case.subject == f"subject{int(row['subject_key']):03d}"
        assert "x".join(map(str, nib.load(case.image).shape)) == row["shape"]


def test_hippocampus_split_is_that_of_the_recorded_experiments(hippocampus):
    """20 test subjects (31 volumes, 1554 coronal slices), 5 (8), pool 95 (143, 7110 slices)."""
    splits = [make_split(hippocampus, 1, seed) for seed in range(8)]
    split = splits[0]
    for part, subjects, volumes, slices in (
        ("test", 20, 31, 1554), ("val", 5, 8, None), ("unlabeled", 95, 143, 7110),
    ):  # fmt: skip
        chosen = split.select(hippocampus, part)
        assert (len(getattr(split, part)), len(chosen)) == (subjects, volumes)
        if slices:
            assert sum(nib.load(case.image).shape[1] for case in chosen) == slices
    drawn = [len(s.select(hippocampus, "labeled")) for s in splits]
    assert drawn == [2, 1, 2, 1, 2, 2, 2, 1]


def test_hippocampus_labels_return_exactly(hippocampus, tmp_path):
    chosen = hippocampus[::6]
    volumes = prepare(chosen, recipe_for("msd"), tmp_path)
    for volume in volumes:
        _, label, _, _ = load_native(volume.case)
        assert volume.image.shape[1:] == (48, 48) and volume.present == {1, 2}
        assert np.array_equal(volume.restore(volume.label), label)  # 48 x 48 holds every volume
        assert abs(volume.image).max() < 8 and volume.image.std() > 0.5
        # Anterior (1) lies in front of posterior (2): larger y, later coronal slices.
        anterior, posterior = (np.nonzero(volume.label == v)[0].mean() for v in (1, 2))
        assert anterior > posterior
    again = prepare(chosen, recipe_for("msd"), tmp_path)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(volumes, again, strict=True))


def test_cardiac_cases_and_missing_classes_follow_the_readme(cardiac):
    assert len(cardiac) == 10
    missing = {case.case_id: case.missing_classes for case in cardiac}
    with_muscle = {f"patient00{n}_frame{f}" for n, f in ((1, 19), (2, 20), (3, 20), (4, 20))}
    for case_id, classes in missing.items():
        assert classes == ((1,) if case_id in with_muscle else (1, 2)), case_id
    frames = {c.subject: c.frame for c in cardiac if c.meta["phase"] == "ED"}
    assert frames == {"patient001": 19, "patient002": 20, "patient003": 20, "patient004": 20,
                      "patient005": 19}  # fmt: skip
    assert cardiac[0].meta["info"]["Height"] == "nan"


def test_cardiac_volumes_in_ml_match_the_readme(cardiac):
    expected = {
        "patient001_frame19": 193.4,
        "patient003_frame07": 181.4,
        "patient005_frame09": 162.7,
    }
    for case in cardiac:
        if case.case_id in expected:
            _, label, _, spacing = load_native(case)
            ml = (label == 3).sum() * np.prod(spacing) / 1000
            assert ml == pytest.approx(expected[case.case_id], abs=0.1)


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_cardiac_labels_survive_resampling(cardiac, variant, tmp_path):
    for volume in prepare(cardiac[::3], recipe_for("acdc", variant)):
        _, label, affine, _ = load_native(volume.case)
        path = save_prediction(volume, volume.label, tmp_path / "prediction.nii.gz")
        written = nib.load(path)
        restored = np.asarray(written.dataobj)
        for value in volume.present:
            both = ((restored == value) & (label == value)).sum()
            assert 2 * both / ((restored == value).sum() + (label == value).sum()) >= 0.97
        assert np.allclose(written.affine, affine, atol=1e-5)
        assert restored.shape == label.shape


def test_cardiac_unannotated_pixels_are_never_trained_on(cardiac):
    data = SliceDataset(prepare(cardiac[:2], recipe_for("acdc")))
    for item in data:
        allowed = {IGNORE_INDEX, *data.volumes[item["volume"]].present}
        assert set(item["label"].unique().tolist()) <= allowed


def test_cardiac_muscle_encloses_the_cavity(cardiac):
    """The README: label 2 encloses label 3 in 35 of the 37 slices that have both."""
    from scipy import ndimage

    closed = total = 0
    for case in cardiac:
        _, label, _, _ = load_native(case)
        for plane in np.moveaxis(label, 2, 0):
            if (plane == 2).any():
                total += 1
                around = ndimage.binary_dilation(plane == 3) & (plane != 3)
                closed += bool((plane[around] == 2).all())
    assert total == 37 and closed >= 35
