"""Loaders on generated folders of every layout: what is found, its metadata, and its contents."""

import json
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest

from medcl_train.data import (
    DataError,
    find_cases,
    load_native,
    msd,
    phantom,
    prepare,
    recipe_for,
    save_prediction,
    shared_data_root,
)
from medcl_train.data.acdc import read_info
from medcl_train.data.recipe import MMWHS_VALUES


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture(scope="module")
def acdc_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("acdc")
    phantom.write(root, 4, seed=3, size=(72, 90), slices=(4, 5))
    return root


def test_acdc_takes_the_frames_that_info_cfg_names(acdc_root):
    cases = find_cases("acdc", acdc_root)
    assert [case.subject for case in cases] == [f"patient{n:03d}" for n in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert [case.meta["phase"] for case in cases] == ["ED", "ES"] * 4
    frames = {case.subject: case.frame for case in cases if case.meta["phase"] == "ED"}
    assert frames == {"patient001": 1, "patient002": 1, "patient003": 1, "patient004": 4}
    first = cases[0]
    assert first.case_id == "patient001_frame01" and first.meta["group"] == "NOR"
    assert first.label.name == "patient001_frame01_gt.nii.gz" and first.missing_classes == ()
    assert [c.meta["phase"] for c in find_cases("acdc", acdc_root, phases="ED")] == ["ED"] * 4
    assert [c.meta["phase"] for c in find_cases("acdc", acdc_root, phases="ES")] == ["ES"] * 4


def test_acdc_info_is_read_by_key_not_by_row(tmp_path):
    path = tmp_path / "Info.cfg"
    path.write_text("Weight: 80.0\r\nES:  9\r\n\r\nNbFrame: 20\r\nED: 4\r\n")
    info = read_info(path)
    assert (info["ED"], info["ES"], info.get("Group")) == ("4", "9", None)


@pytest.mark.parametrize("below", ["", "database"])
def test_acdc_archives_with_training_and_testing_folders(acdc_root, tmp_path, below):
    base = tmp_path / below
    for number, subset in ((1, "training"), (2, "training"), (3, "testing")):
        name = f"patient{number:03d}"
        shutil.copytree(acdc_root / name, base / subset / name)
    save(base / "training/patient001/patient001_4d.nii.gz", np.zeros((4, 4, 2, 3), np.int16))
    (base / "training/patient001/MANDATORY_CITATION.md").write_text("cite")
    for label in base.glob("testing/*/*_gt.nii.gz"):
        label.unlink()  # the old test archive: no label at all
    cases = find_cases("acdc", tmp_path)
    found = [(c.subject, c.meta["subset"], c.label is None) for c in cases]
    assert found == (
        [("patient001", "training", False)] * 2
        + [("patient002", "training", False)] * 2
        + [("patient003", "testing", True)] * 2
    )
    assert {c.subject for c in find_cases("acdc", tmp_path, subset="testing")} == {"patient003"}
    volume = prepare(cases[-1:], recipe_for("acdc", size=64))[0]
    assert volume.label is None and volume.present == frozenset()


def test_acdc_classes_without_voxels_are_missing_only_in_foreign_groups(acdc_root, tmp_path):
    shutil.copytree(acdc_root / "patient001", tmp_path / "patient001")
    case = find_cases("acdc", tmp_path)[0]
    label = nib.load(case.label)
    array = np.asarray(label.dataobj)
    array = np.where(array == 1, 0, array).astype(np.uint8)
    save(case.label, array, label.affine)
    assert find_cases("acdc", tmp_path)[0].missing_classes == ()  # ACDC's NOR: drawn, and absent
    info = tmp_path / "patient001/Info.cfg"
    info.write_text(info.read_text().replace("NOR", "HF-I"))
    cases = find_cases("acdc", tmp_path)
    assert [c.missing_classes for c in cases] == [(1,), ()]
    volumes = prepare(cases, recipe_for("acdc", size=64))
    assert [v.present for v in volumes] == [{2, 3}, {1, 2, 3}]
    forced = find_cases("acdc", tmp_path, missing_classes=(1, 2))
    assert [c.missing_classes for c in forced] == [(1, 2), (1, 2)]


def test_acdc_frames_all_takes_every_frame_with_its_phase(tmp_path):
    phantom.write(tmp_path, 1, phases=4, size=(72, 80), slices=(2, 3))
    cases = find_cases("phantom", tmp_path, phases="all")
    assert [case.meta["phase"] for case in cases] == ["ED", "", "", "ES"]
    assert [case.frame for case in cases] == sorted(case.frame for case in cases)
    assert {case.meta["dataset"] for case in cases} == {"phantom"}


def blobs(shape=(24, 20, 10)):
    """Seven boxes with the raw MM-WHS values, in RAS axes, without any symmetry."""
    label = np.zeros(shape, np.int16)
    for i, value in enumerate(MMWHS_VALUES):
        label[3 * i + 1 : 3 * i + 3, 2 * i + 2 : 2 * i + 6, i : i + 3] = value
    image = (label * 0.5 + np.arange(shape[0])[:, None, None] * 3).astype(np.int16)
    return image, label


def write_mmwhs(root, affine=None):
    image, label = blobs()
    affine = np.diag([1.0, 1.2, 2.0, 1.0]) if affine is None else affine
    for name, low in (("mr_train_1001", 0), ("mr_train_1002", 0), ("ct_train_1001", -3024)):
        folder = root / name.split("_")[0]
        moved = np.where(image == 0, low, image).astype(np.int16)
        save(folder / f"{name}_image.nii.gz", moved, affine)
        save(folder / f"{name}_label.nii.gz", label.astype(np.uint16), affine)
    save(root / "mr_test/mr_test_2001_image.nii.gz", image, affine)
    return image, label


def test_mmwhs_finds_one_modality_at_any_depth(tmp_path):
    write_mmwhs(tmp_path)
    mr = find_cases("mmwhs", tmp_path)
    assert [(c.case_id, c.subject) for c in mr] == [
        ("mr_train_1001", "mr_1001"),
        ("mr_train_1002", "mr_1002"),
    ]
    assert [c.case_id for c in find_cases("mmwhs", tmp_path, modality="ct")] == ["ct_train_1001"]
    tests = find_cases("mmwhs", tmp_path, part="test")
    assert [c.case_id for c in tests] == ["mr_test_2001"] and tests[0].label is None
    assert len(find_cases("mmwhs", tmp_path, part="all")) == 3


def test_mmwhs_raw_values_become_ids_and_go_back(tmp_path):
    _, raw = write_mmwhs(tmp_path / "data")
    case = find_cases("mmwhs", tmp_path / "data")[0]
    _, label, _, spacing = load_native(case)
    assert spacing == pytest.approx((1.0, 1.2, 2.0))
    for i, value in enumerate(MMWHS_VALUES):
        assert np.array_equal(label == i + 1, raw == value)
    volume = prepare([case], recipe_for("mmwhs", size=24, spacing=None))[0]
    out = save_prediction(volume, volume.label, tmp_path / "out.nii.gz", raw_values=True)
    written = nib.load(out)
    assert np.array_equal(np.asarray(written.dataobj), raw)
    assert np.allclose(written.affine, nib.load(case.image).affine)


def test_mmwhs_files_are_turned_to_ras_and_predictions_back(tmp_path):
    """The same anatomy stored in two orientations gives the same prepared array."""
    image, label = write_mmwhs(tmp_path / "ras")
    ras = np.diag([1.0, 1.2, 2.0, 1.0])
    turned = nib.orientations.axcodes2ornt("PIR")
    for name, array in (("image", image), ("label", label)):
        stored = nib.Nifti1Image(array, ras).as_reoriented(
            nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turned)
        )
        path = tmp_path / f"pir/mr_train_1001_{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(stored, path)
    recipe = recipe_for("mmwhs", size=(32, 24))
    straight = prepare(find_cases("mmwhs", tmp_path / "ras")[:1], recipe)[0]
    stored_case = find_cases("mmwhs", tmp_path / "pir")[0]
    other = prepare([stored_case], recipe)[0]
    assert nib.aff2axcodes(nib.load(stored_case.image).affine) == ("P", "I", "R")
    assert np.allclose(straight.image, other.image, atol=1e-5)
    assert np.array_equal(straight.label, other.label)
    assert straight.spacing == pytest.approx(other.spacing)
    exact = prepare([stored_case], recipe_for("mmwhs", size=(32, 24), spacing=None))[0]
    assert np.array_equal(exact.restore(exact.label), load_native(stored_case)[1])


def test_mmwhs_stray_421_follows_the_chosen_policy(tmp_path, caplog):
    write_mmwhs(tmp_path)
    case = find_cases("mmwhs", tmp_path)[0]
    file = nib.load(case.label)
    array = np.asarray(file.dataobj).copy()
    array[20, 2, 7] = 421
    save(case.label, array, file.affine)
    background = load_native(case, recipe_for("mmwhs"))[1]
    assert background[20, 2, 7] == 0
    assert "1 voxels of value 421 are read as background" in caplog.text
    assert load_native(case, recipe_for("mmwhs", stray_421="atrium"))[1][20, 2, 7] == 2
    with pytest.raises(DataError, match=r"mr_train_1001_label.*unknown value.* 421 \(1 voxels\)"):
        load_native(case, recipe_for("mmwhs", stray_421="error"))


def write_msd(root, names):
    rng = np.random.RandomState(0)
    for name in names:
        label = np.zeros((12, 14, 10), np.uint8)
        label[4:8, 3:7, 3:7], label[4:8, 7:11, 3:7] = 2, 1
        save(root / f"imagesTr/{name}.nii.gz", rng.rand(12, 14, 10).astype(np.float32))
        save(root / f"labelsTr/{name}.nii.gz", label)


def test_msd_hippocampus_subject_joins_left_and_right(tmp_path):
    write_msd(tmp_path, [f"hippocampus_{n:03d}" for n in (1, 2, 3, 6, 367)])
    save(tmp_path / "imagesTs/hippocampus_002.nii.gz", np.ones((3, 3, 3), np.float32))
    (tmp_path / "imagesTr/._hippocampus_001.nii.gz").write_bytes(b"resource fork")
    cases = find_cases("msd", tmp_path)
    assert [case.subject for case in cases] == [
        "subject001", "subject001", "subject002", "subject003", "subject184",
    ]  # fmt: skip
    (tmp_path / "imagesTs/hippocampus_002.nii.gz").rename(
        tmp_path / "imagesTs/hippocampus_4.nii.gz"
    )
    tests = find_cases("msd", tmp_path, part="test")
    assert [(c.case_id, c.subject, c.label) for c in tests] == [
        ("hippocampus_4", "subject002", None)
    ]


def write_msd_task(root, names, classes):
    """Volumes of another task, every label value in each, and its dataset.json."""
    rng = np.random.RandomState(0)
    for name in names:
        label = rng.permutation(np.arange(12 * 14 * 10) % len(classes)).reshape(12, 14, 10)
        image = label + rng.rand(12, 14, 10)
        save(root / f"imagesTr/{name}.nii.gz", image.astype(np.float32))
        save(root / f"labelsTr/{name}.nii.gz", label.astype(np.uint8))
    pairs = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    labels = {str(value): name for value, name in reversed(list(enumerate(classes)))}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": pairs}))


def test_msd_other_tasks_with_dataset_json(tmp_path):
    write_msd_task(tmp_path, ["la_003", "la_004"], ["background", "left atrium"])
    cases = find_cases("msd", tmp_path)
    assert [c.subject for c in cases] == ["la_003", "la_004"]
    assert cases[0].meta["num_classes"] == 2
    assert msd.describe(tmp_path) == (False, ("background", "left atrium"))
    volume = prepare(cases, recipe_for("msd", task="other", num_classes=2, size=(14, 12)))[0]
    assert volume.image.shape == (10, 14, 12)  # the whole axial slice
    assert np.array_equal(volume.restore(volume.label), load_native(cases[0])[1])
    with pytest.raises(ValueError, match="needs num_classes"):
        recipe_for("msd", task="other")
    (tmp_path / "dataset.json").write_text('{"labels": {"1": "a", "2": "b"}}')
    with pytest.raises(DataError, match="dataset.json: expected labels from 0 upwards"):
        find_cases("msd", tmp_path)


def write_ssl4mis(root):
    rng = np.random.RandomState(0)
    (root / "data/slices").mkdir(parents=True)
    arrays, slice_names = {}, []
    for number in range(1, 5):
        for frame in (1, 2):
            name = f"patient{number:03d}_frame{frame:02d}"
            image = rng.rand(3, 20 + number, 24).astype(np.float32)
            label = rng.randint(0, 4, image.shape).astype(np.uint8)
            arrays[name] = image, label
            with h5py.File(root / f"data/{name}.h5", "w") as file:
                file["image"], file["label"] = image, label
            if number <= 2:
                for i in range(3):
                    slice_names.append(f"{name}_slice_{i + 1}")
                    with h5py.File(root / f"data/slices/{slice_names[-1]}.h5", "w") as file:
                        file["image"], file["label"] = image[i], label[i]
    names = sorted(arrays)
    rng.shuffle(slice_names)  # list order decides the order of the cases, not of the slices
    (root / "train_slices.list").write_text("\n".join(slice_names) + "\n")
    (root / "train.list").write_text("\n".join(names[:4]) + "\n")
    (root / "val.list").write_text("\n".join(names[4:6]) + "\n")
    (root / "test.list").write_text("\n".join(f"{n}.h5" for n in names[6:]) + "\n")
    return arrays


def test_ssl4mis_lists_slices_and_volumes_give_the_same_cases(tmp_path):
    arrays = write_ssl4mis(tmp_path)
    by_slices = find_cases("ssl4mis", tmp_path)
    by_volumes = find_cases("ssl4mis", tmp_path, train_from="volumes")
    assert {c.case_id for c in by_slices} == {c.case_id for c in by_volumes} == set(arrays)
    assert [c.meta["split"] for c in by_volumes] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    assert by_volumes[0].subject == "patient001" and by_volumes[1].frame == 2
    for case in (*by_slices, *by_volumes):
        image, label, affine, spacing = load_native(case)
        assert np.array_equal(image.transpose(2, 1, 0), arrays[case.case_id][0])
        assert np.array_equal(label.transpose(2, 1, 0), arrays[case.case_id][1])
        assert spacing == (1.0, 1.0, 1.0) and np.array_equal(affine, np.eye(4))


def test_ssl4mis_predictions_return_to_the_volume_grid(tmp_path):
    arrays = write_ssl4mis(tmp_path / "data_root")
    cases = find_cases("ssl4mis", tmp_path / "data_root")
    volumes = prepare(cases, recipe_for("ssl4mis", size=64))
    for volume in volumes:
        assert volume.image.shape == (3, 64, 64)
        restored = volume.restore(volume.label)
        assert np.array_equal(restored.transpose(2, 1, 0), arrays[volume.case.case_id][1])
    out = save_prediction(volumes[0], volumes[0].label, tmp_path / "p.nii.gz")
    assert nib.load(out).shape == arrays[volumes[0].case.case_id][0].shape[::-1]


def test_unknown_dataset_and_options_are_refused(acdc_root):
    with pytest.raises(ValueError, match="dataset must be one of acdc"):
        find_cases("acdcc", acdc_root)
    with pytest.raises(ValueError, match="phases must be"):
        find_cases("acdc", acdc_root, phases="both")
    with pytest.raises(ValueError, match="modality must be"):
        find_cases("mmwhs", acdc_root, modality="pet")
    with pytest.raises(ValueError, match="variant must be"):
        recipe_for("acdc", "D")
    with pytest.raises(ValueError, match="stray_421 must be"):
        recipe_for("mmwhs", stray_421="maybe")


def test_shared_data_root_follows_medcl_data(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCL_DATA", str(tmp_path))
    assert shared_data_root() == tmp_path
    monkeypatch.setenv("MEDCL_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="absent.*MEDCL_DATA"):
        shared_data_root()


def test_files_a_loader_does_not_understand_are_logged(acdc_root, tmp_path, caplog):
    shutil.copytree(acdc_root / "patient001", tmp_path / "a/patient001")
    (tmp_path / "a/Patient_2").mkdir()
    save(tmp_path / "a/patient001/patient001_frame01_seg.nii.gz", np.zeros((2, 2, 2), np.uint8))
    assert len(find_cases("acdc", tmp_path / "a")) == 2
    write_mmwhs(tmp_path / "m")
    save(tmp_path / "m/mr_train_1001_image (1).nii.gz", np.zeros((2, 2, 2), np.int16))
    assert len(find_cases("mmwhs", tmp_path / "m")) == 2
    write_msd(tmp_path / "t", ["la_1"])
    (tmp_path / "t/imagesTr/la_2.nrrd").write_text("")
    assert len(find_cases("msd", tmp_path / "t")) == 1
    for name in ("Patient_2", "frame01_seg", "1001_image (1)", "la_2.nrrd"):
        assert name in caplog.text
    assert caplog.text.count("unused") == 4
