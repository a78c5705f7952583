"""Broken files and folders: always a DataError that names the file and the fix, never a skip."""

import gzip
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from medcl_train.data import (
    DataError,
    Split,
    find_cases,
    load_native,
    make_split,
    phantom,
    prepare,
    recipe_for,
    save_prediction,
)
from medcl_train.data.atomic import write_atomic

RECIPE = recipe_for("acdc", size=64)
IMAGE, LABEL = "patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    phantom.write(root, 2, seed=5, size=(72, 80), slices=(3, 4))
    return root


@pytest.fixture
def root(source, tmp_path):
    shutil.copytree(source, tmp_path / "acdc")
    return tmp_path / "acdc"


def rewrite(path, change=None, affine=None):
    file = nib.load(path)
    array = np.asarray(file.dataobj)
    array = array if change is None else change(array)
    nib.save(nib.Nifti1Image(array, file.affine if affine is None else affine), path)


def with_value(value, dtype=None):
    def change(array):
        array = array.astype(dtype or array.dtype)
        array[3, 4, 1] = value
        return array

    return change


def shifted(path, millimetres):
    affine = nib.load(path).affine.copy()
    affine[0, 3] += millimetres
    return affine


def bad_dimension(path):
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[42:44] = (-5).to_bytes(2, "little", signed=True)  # dim[1]
    path.write_bytes(gzip.compress(bytes(data)))


def zero_pixdim(path):
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[80:84] = bytes(4)  # pixdim[1]
    path.write_bytes(gzip.compress(bytes(data)))


CONTENT = {  # name: (file, how it is broken, what the message must say)
    "gz cut in the middle": (IMAGE, lambda p: p.write_bytes(p.read_bytes()[:5000]), "truncated"),
    "gz without its last bytes": (IMAGE, lambda p: p.write_bytes(p.read_bytes()[:-4]), "truncated"),
    "label gz cut": (LABEL, lambda p: p.write_bytes(p.read_bytes()[:-9]), "truncated"),
    "empty file": (IMAGE, lambda p: p.write_bytes(b""), "corrupt"),
    "not a NIfTI": (IMAGE, lambda p: p.write_bytes(b"<html>not found</html>" * 50), "corrupt"),
    "flipped bits": (
        IMAGE,
        lambda p: p.write_bytes(p.read_bytes()[:3000] + b"\0\1\2" * 9 + p.read_bytes()[3027:]),
        "corrupt",
    ),
    "header with a negative size": (IMAGE, bad_dimension, "corrupt|voxels"),
    "header announces more voxels": (
        IMAGE,
        lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:-100])),
        "where the header announces",
    ),
    "spacing zero": (IMAGE, zero_pixdim, r"corrupt one.*pixdim \[0.0,"),
    "NaN in the image": (
        IMAGE, lambda p: rewrite(p, with_value(np.nan, np.float32)), r"1 NaN.*\(3, 4, 1\)",
    ),
    "infinity in the image": (
        IMAGE, lambda p: rewrite(p, with_value(np.inf, np.float32)), "NaN or infinite",
    ),
    "constant image": (IMAGE, lambda p: rewrite(p, lambda a: a * 0 + 7), "single intensity"),
    "4-D image": (IMAGE, lambda p: rewrite(p, lambda a: np.stack([a] * 3, -1)), "4-D"),
    "2-D image": (IMAGE, lambda p: rewrite(p, lambda a: a[..., 0]), "2-D"),
    "4-D label": (LABEL, lambda p: rewrite(p, lambda a: a[..., None, None][..., [0, 0], :]), "-D"),
    "complex image": (IMAGE, lambda p: rewrite(p, lambda a: a.astype(np.complex64)), "complex"),
    "label of another shape": (
        LABEL, lambda p: rewrite(p, lambda a: a[:-1]), "expected the grid of patient001_frame01",
    ),
    "label with another affine": (
        LABEL, lambda p: rewrite(p, affine=shifted(p, 1.0)), "expected the affine.*1 mm away",
    ),
    "unknown label": (LABEL, lambda p: rewrite(p, with_value(9)), r"value.* 9 \(1 voxels\)"),
    "negative label": (LABEL, lambda p: rewrite(p, with_value(-1, np.int16)), "unknown.* -1"),
    "fractional label": (LABEL, lambda p: rewrite(p, with_value(1.5, np.float32)), "whole-number"),
    "NaN label": (LABEL, lambda p: rewrite(p, with_value(np.nan, np.float32)), "whole-number"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENT)
def test_broken_contents_name_the_file_and_the_fix(root, name):
    file, damage, expected = CONTENT[name]
    damage(root / "patient001" / file)
    cases = find_cases("acdc", root)
    with pytest.raises(DataError, match=expected) as caught:
        prepare(cases, RECIPE)
    assert file in str(caught.value) and "Fix: " in str(caught.value)
    assert len(caught.value.problems) == 1  # the other three cases are fine
    with pytest.raises(DataError):  # evaluation on the source grid sees the same
        if name == "constant image":
            prepare(cases[:1], RECIPE)
        load_native(cases[0])


def test_a_small_affine_difference_of_rounding_is_accepted(root):
    label = root / "patient001" / LABEL
    rewrite(label, affine=shifted(label, 2e-3))
    assert len(prepare(find_cases("acdc", root), RECIPE)) == 4


def remove(name):
    return lambda root: (root / name).unlink()


def text(name, change):
    return lambda root: (root / name).write_text(change((root / name).read_text()))


INFO = "patient001/Info.cfg"
STRUCTURE = {  # name: (how the folder is broken, what the message must say)
    "missing label": (remove(f"patient001/{LABEL}"), rf"{LABEL}: expected the label"),
    "missing image": (remove(f"patient001/{IMAGE}"), rf"{LABEL}: expected its image"),
    "missing Info.cfg": (remove(INFO), "Info.cfg: expected an Info.cfg"),
    "Info.cfg without ES": (text(INFO, lambda t: t.replace("ES", "EX")), "no ES"),
    "Info.cfg with a word": (text(INFO, lambda t: t.replace("ED: 1", "ED: one")), "'one'"),
    "Info.cfg line without colon": (text(INFO, lambda t: t + "garbage\n"), "'garbage' in line 7"),
    "ES beyond NbFrame": (
        text(INFO, lambda t: t[: t.index("NbFrame")] + "NbFrame: 3\n"), "within the 3 frames",
    ),
    "frame that is not there": (
        text(INFO, lambda t: t.replace("ED: 1\n", "ED: 2\n")), "frame02.nii.gz: expected this",
    ),
    "file of another patient": (
        lambda root: shutil.copy(
            root / "patient002/patient002_frame04.nii.gz", root / "patient001"
        ),
        "patient002_frame04.nii.gz: expected a file of patient001",
    ),
    "a patient twice": (
        lambda root: shutil.copytree(root / "patient001", root / "training/patient001"),
        "the same patient also in",
    ),
    "interrupted phantom": (
        lambda root: (root / phantom.MANIFEST).rename(root / phantom.UNFINISHED), "interrupted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURE)
def test_broken_folders_name_the_file_and_the_fix(root, name):
    damage, expected = STRUCTURE[name]
    damage(root)
    with pytest.raises(DataError, match=expected) as caught:
        find_cases("phantom", root)
    assert "Fix: " in str(caught.value) and str(root) in str(caught.value)


def test_all_broken_cases_come_in_one_error(root):
    (root / "patient001" / LABEL).unlink()
    (root / "patient002/Info.cfg").unlink()
    with pytest.raises(DataError, match="2 problems, nothing was loaded") as caught:
        find_cases("acdc", root)
    assert len(caught.value.problems) == 2
    assert LABEL in str(caught.value) and "patient002/Info.cfg" in str(caught.value)


def test_all_broken_contents_come_in_one_error(root):
    (root / "patient001" / IMAGE).write_bytes(b"")
    rewrite(root / "patient002/patient002_frame04_gt.nii.gz", with_value(7))
    with pytest.raises(DataError, match="2 problems") as caught:
        prepare(find_cases("acdc", root), RECIPE)
    assert IMAGE in caught.value.problems[0] and "patient002_frame04_gt" in caught.value.problems[1]


@pytest.mark.parametrize("dataset", ["acdc", "mmwhs", "msd", "ssl4mis", "phantom"])
def test_empty_absent_and_wrong_roots(tmp_path, dataset):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/readme.txt").write_text("nothing here")
    with pytest.raises(DataError, match="empty folder.*Fix"):
        find_cases(dataset, tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder.*Fix"):
        find_cases(dataset, tmp_path / "absent")
    with pytest.raises(DataError, match="found a file.*Fix"):
        find_cases(dataset, tmp_path / "other/readme.txt")
    with pytest.raises(DataError, match="other.*Fix"):
        find_cases(dataset, tmp_path / "other")


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4)), path)


def test_mmwhs_missing_pairs_and_double_files(tmp_path):
    for name in ("mr_train_1001_image", "a/mr_train_1002_label", "a/mr_train_1003_image",
                 "b/mr_train_1003_image", "b/mr_train_1003_label"):  # fmt: skip
        touch(tmp_path / f"{name}.nii.gz")
    with pytest.raises(DataError, match="3 problems") as caught:
        find_cases("mmwhs", tmp_path)
    message = str(caught.value)
    assert "mr_train_1001_label.nii.gz, found none" in message
    assert "mr_train_1002_image.nii.gz, found none" in message
    assert "the same file also at" in message
    with pytest.raises(DataError, match="ct_train"):
        find_cases("mmwhs", tmp_path, modality="ct")


def test_msd_missing_pairs_and_dataset_json(tmp_path):
    for name in ("imagesTr/la_1", "labelsTr/la_1", "imagesTr/la_2", "labelsTr/la_3"):
        touch(tmp_path / f"{name}.nii.gz")
    with pytest.raises(DataError, match="2 problems") as caught:
        find_cases("msd", tmp_path)
    assert "la_2.nii.gz: expected its label" in str(caught.value)
    assert "la_3.nii.gz: expected its image" in str(caught.value)
    (tmp_path / "imagesTr/la_2.nii.gz").unlink()
    (tmp_path / "labelsTr/la_3.nii.gz").unlink()
    listing = tmp_path / "dataset.json"
    listing.write_text('{"training": [{"image": "./imagesTr/la_9.nii.gz"}]}')
    with pytest.raises(DataError, match="la_9.nii.gz: listed in dataset.json, not there"):
        find_cases("msd", tmp_path)
    listing.write_text('{"training": [')
    with pytest.raises(DataError, match="dataset.json: expected a JSON object.*optional"):
        find_cases("msd", tmp_path)


def h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value


@pytest.fixture
def ssl_root(tmp_path):
    image, label = np.random.RandomState(0).rand(2, 8, 8), np.ones((2, 8, 8), np.uint8)
    for n in (1, 2):
        h5(tmp_path / f"data/patient00{n}_frame01.h5", image=image, label=label)
    (tmp_path / "train.list").write_text("patient001_frame01\n")
    (tmp_path / "test.list").write_text("patient002_frame01\n")
    assert len(prepare(find_cases("ssl4mis", tmp_path), recipe_for("ssl4mis", size=8))) == 2
    return tmp_path


SSL4MIS_LISTS = {
    "missing file": ("test.list", "patient002_frame01\npatient003_frame02\n",
                     "patient003_frame02.h5: expected because test.list names it"),
    "empty list": ("test.list", "\n", "test.list: expected one case name per line"),
    "name twice": ("test.list", "patient002_frame01\n" * 2, "patient002_frame01 repeated"),
    "patient in two lists": ("test.list", "patient001_frame01\n", "who is in train.list too"),
    "missing slice": ("train_slices.list", "patient001_frame01_slice_1\n", "slice_1.h5: expected"),
    "volume among slices": ("train_slices.list", "patient001_frame01\n", "expected names <case>_"),
}  # fmt: skip


@pytest.mark.parametrize("name", SSL4MIS_LISTS)
def test_ssl4mis_broken_lists(ssl_root, name):
    file, content, expected = SSL4MIS_LISTS[name]
    (ssl_root / file).write_text(content)
    with pytest.raises(DataError, match=expected) as caught:
        find_cases("ssl4mis", ssl_root)
    assert "Fix: " in str(caught.value)


def test_ssl4mis_slices_must_have_no_gap(ssl_root):
    for i in (1, 3):
        name = f"patient001_frame01_slice_{i}"
        h5(ssl_root / f"data/slices/{name}.h5", image=np.eye(8), label=np.eye(8, dtype=np.uint8))
    (ssl_root / "train_slices.list").write_text(
        "patient001_frame01_slice_1\npatient001_frame01_slice_3\n"
    )
    with pytest.raises(DataError, match=r"slices \[2\] of patient001_frame01 are not listed"):
        find_cases("ssl4mis", ssl_root)


SSL4MIS_FILES = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:700]), "h5 file with `image`"),
    "no label": (lambda p: h5(p, image=np.ones((2, 8, 8))), "no label"),
    "shape mismatch": (
        lambda p: h5(p, image=np.ones((2, 8, 8)), label=np.ones((2, 8, 9))), r"label \(2, 8, 9\)",
    ),
    "2-D volume": (lambda p: h5(p, image=np.eye(8), label=np.eye(8)), "3-D image"),
    "NaN": (
        lambda p: h5(p, image=np.full((2, 8, 8), np.nan), label=np.ones((2, 8, 8))), "128 NaN",
    ),
    "unknown label": (
        lambda p: h5(p, image=np.random.rand(2, 8, 8), label=np.full((2, 8, 8), 4)), "value.* 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SSL4MIS_FILES)
def test_ssl4mis_broken_files(ssl_root, name):
    damage, expected = SSL4MIS_FILES[name]
    damage(ssl_root / "data/patient002_frame01.h5")
    with pytest.raises(DataError, match=expected) as caught:
        prepare(find_cases("ssl4mis", ssl_root), recipe_for("ssl4mis", size=8))
    assert "patient002_frame01.h5" in str(caught.value) and "Fix: " in str(caught.value)


@contextmanager
def without_privileges():
    """File permissions do not bind root, so the tests give them up for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def locked(source):
    """A copy of the data that everybody may read, and in it a folder nobody may write to."""
    top = Path(tempfile.mkdtemp())
    shutil.copytree(source, top / "acdc")
    (top / "locked").mkdir()
    for path in (top, *top.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (top / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    yield top
    (top / "locked").chmod(0o755)
    shutil.rmtree(top)


def test_no_write_permission_names_the_folder(locked):
    cases = find_cases("acdc", locked / "acdc")
    volumes = prepare(cases, RECIPE)
    split = make_split(cases, 1, val=0, test=1)
    actions = {
        "cache": lambda: prepare(cases, RECIPE, locked / "locked"),
        "new cache folder": lambda: prepare(cases, RECIPE, locked / "locked/cache"),
        "prediction": lambda: save_prediction(
            volumes[0], volumes[0].label, locked / "locked/p.nii.gz"
        ),
        "split": lambda: split.save(locked / "locked/split.json"),
        "phantom": lambda: phantom.write(locked / "locked", 1, size=(72, 80), slices=(2, 3)),
    }
    for name, action in actions.items():
        with without_privileges(), pytest.raises(DataError, match="PermissionError") as caught:
            action()
        assert "locked" in str(caught.value) and "Fix: make" in str(caught.value), name
    assert not any((locked / "locked").iterdir())


def test_no_read_permission_names_the_file(locked):
    cases = find_cases("acdc", locked / "acdc")
    prepare(cases, RECIPE)
    cases[0].image.chmod(0)
    with without_privileges(), pytest.raises(DataError, match="PermissionError") as caught:
        prepare(cases, RECIPE)
    assert IMAGE in str(caught.value) and "read permission" in str(caught.value)


def test_a_file_in_place_of_a_folder_is_reported(root, tmp_path):
    (tmp_path / "file").write_text("x")
    cases = find_cases("acdc", root)
    with pytest.raises(DataError, match="file.*Fix: make"):
        prepare(cases, RECIPE, tmp_path / "file")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "result.txt"
    write_atomic(path, lambda stream: stream.write(b"old"))

    def fail(stream):
        stream.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["result.txt"]


def test_a_prediction_needs_a_nifti_name_and_valid_ids(root, tmp_path):
    volume = prepare(find_cases("acdc", root)[:1], RECIPE)[0]
    with pytest.raises(DataError, match="ends in .nii.gz"):
        save_prediction(volume, volume.label, tmp_path / "p.png")
    with pytest.raises(ValueError, match="expected shape"):
        volume.restore(volume.label[:-1])
    with pytest.raises(TypeError, match="integer class ids"):
        volume.restore(volume.label.astype(np.float32))
    with pytest.raises(ValueError, match=r"ids 0\.\.3"):
        volume.restore(volume.label + 4)


def test_nothing_to_prepare_is_an_error():
    with pytest.raises(DataError, match="no case to prepare"):
        prepare([], RECIPE)
    with pytest.raises(DataError, match="no case"):
        make_split([], 1)


def test_a_split_file_that_is_no_split_is_named(tmp_path):
    path = tmp_path / "split.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="split.json.*Fix: make it anew"):
        Split.load(path)
