"""Recipes A, B, C against their definitions, the way back to the source grid, and the cache."""

import logging
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medcl_train.data import (
    Case,
    DataError,
    Recipe,
    cache,
    find_cases,
    load_native,
    phantom,
    prepare,
    preprocess,
    recipe_for,
    save_prediction,
)
from medcl_train.data.resample import crop_or_pad, undo_crop_or_pad


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    phantom.write(root, 3, seed=1, size=(80, 110), slices=(3, 4), spacings=(1.5625, 1.785714))
    return root


@pytest.fixture(scope="module")
def cases(root):
    return find_cases("phantom", root)


def write_case(folder, image, label=None, affine=None, name="x"):
    affine = np.eye(4) if affine is None else affine
    nib.save(nib.Nifti1Image(image, affine), folder / f"{name}.nii.gz")
    path = None
    if label is not None:
        path = folder / f"{name}_gt.nii.gz"
        nib.save(nib.Nifti1Image(label, affine), path)
    return Case(name, name, folder / f"{name}.nii.gz", path, meta={"dataset": "acdc"})


def dice(a, b, value):
    return 2 * np.sum((a == value) & (b == value)) / (np.sum(a == value) + np.sum(b == value))


def test_variant_a_follows_its_definition(cases):
    recipe = recipe_for("acdc")
    assert (recipe.size, recipe.spacing, recipe.clip) == ((224, 224), 1.36719, False)
    assert (recipe.image_order, recipe.label_order, recipe.n4) == (1, 0, False)
    volume = prepare(cases[:1], recipe)[0]
    image, label, _, spacing = load_native(cases[0])
    low, high = np.percentile(image, (1, 99))
    scaled = (image.astype(np.float64) - low) / (high - low)
    planes = scaled.transpose(2, 1, 0)
    shape = [round(n * s / 1.36719) for n, s in zip(planes.shape[1:], spacing[1::-1], strict=True)]
    assert volume.geometry.resampled == tuple(shape)
    factors = [m / n for m, n in zip(shape, planes.shape[1:], strict=True)]
    middle = ndimage.zoom(
        planes[1].astype(np.float32), factors, order=1, mode="nearest", grid_mode=True
    )
    top, left = (224 - shape[0]) // 2, (224 - shape[1]) // 2
    inside = volume.image[1, top : top + shape[0], left : left + shape[1]]
    assert np.allclose(inside, middle, atol=1e-6)
    assert volume.image.dtype == np.float32 and volume.image.max() > 1  # no clipping
    assert volume.image[:, :top].max() == 0 and volume.label[:, :top].max() == 0
    assert volume.spacing == pytest.approx((spacing[2], 1.36719, 1.36719), rel=0.01)
    assert volume.spacing[1] * shape[0] == pytest.approx(spacing[1] * planes.shape[1])
    clipped = prepare(cases[:1], replace(recipe, clip=True))[0]
    assert (clipped.image.min(), clipped.image.max()) == (0, 1)
    assert set(np.unique(volume.label)) == set(np.unique(label)) == {0, 1, 2, 3}


def test_variant_b_is_minmax_and_a_nearest_zoom(cases):
    recipe = recipe_for("acdc", "B")
    assert recipe.size == (256, 256) and recipe.normalize == "minmax"
    volume = prepare(cases[:1], recipe)[0]
    image, label, _, _ = load_native(cases[0])
    image = (image - image.min()) / (image.max() - image.min())
    for native, prepared in ((image, volume.image), (label, volume.label)):
        plane = native.transpose(2, 1, 0)[1]
        zoomed = ndimage.zoom(plane, [256 / n for n in plane.shape], order=0)
        assert np.allclose(prepared[1], zoomed, atol=1e-6)


def test_variant_c_is_zscore_with_fine_cubic_pixels(cases):
    recipe = recipe_for("acdc", "C")
    assert (recipe.spacing, recipe.size) == (1.25, (352, 352))
    assert (recipe.image_order, recipe.label_order) == (3, 1)
    native_size = replace(recipe, spacing=None, size=(80, 80))
    image, _, _, _ = load_native(cases[0])
    volume = prepare(cases[:1], native_size)[0]
    scaled = (image - image.mean()) / image.std()
    window = volume.geometry.resampled
    want = crop_or_pad(scaled.transpose(2, 1, 0), (80, 80))
    assert window == image.shape[1::-1] and np.allclose(volume.image, want, atol=1e-4)
    fine = prepare(cases[:1], recipe)[0]
    assert fine.spacing[1:] == pytest.approx((1.25, 1.25), rel=0.01)
    assert recipe_for("mmwhs", "C", modality="ct").clip and not recipe_for("mmwhs", "C").clip
    assert recipe_for("mmwhs").size == (160, 160) and recipe_for("mmwhs").spacing == 1.5
    assert recipe_for("mmwhs", size=192).size == (192, 192)


def test_hippocampus_recipe_clips_then_zscores_coronal_slices(tmp_path):
    image = np.random.RandomState(0).gamma(2, 100, (30, 40, 36)).astype(np.float32)
    image[0, 0, 0] = 1e6  # an outlier that must not squash the rest
    label = np.zeros(image.shape, np.uint8)
    label[10:20, 15:25, 10:20] = 2
    recipe = recipe_for("msd")
    volume = prepare([write_case(tmp_path, image, label)], recipe)[0]
    assert volume.image.shape == (40, 48, 48) and volume.spacing == (1.0, 1.0, 1.0)
    inside = volume.image[:, 6:42, 9:39]
    assert inside.mean() == pytest.approx(0, abs=1e-4) and inside.std() == pytest.approx(
        1, abs=1e-4
    )
    assert np.argmax(inside) == np.flatnonzero(inside == inside.max())[0] and inside.max() < 5
    assert np.array_equal(volume.label[:, 6:42, 9:39], label.transpose(1, 2, 0))
    assert np.array_equal(volume.restore(volume.label), label)


@pytest.mark.parametrize(
    ("have", "want", "source", "target"),
    [(10, 4, 3, 0), (11, 4, 3, 0), (4, 10, 0, 3), (4, 11, 0, 3), (5, 8, 0, 1), (7, 7, 0, 0)],
)
def test_crop_and_pad_offsets_are_half_the_difference_rounded_down(have, want, source, target):
    row = np.arange(1, have + 1)[None, None]
    result = crop_or_pad(row, (1, want))[0, 0]
    count = min(have, want)
    expected = np.zeros(want, int)
    expected[target : target + count] = row[0, 0, source : source + count]
    assert np.array_equal(result, expected)
    back = undo_crop_or_pad(result[None, None], (1, have))[0, 0]
    kept = np.zeros(have, int)
    kept[source : source + count] = row[0, 0, source : source + count]
    assert np.array_equal(back, kept)


@pytest.mark.parametrize("size", [64, 96, (70, 130)])
def test_at_native_spacing_the_way_back_is_exact_inside_the_crop(cases, size):
    recipe = recipe_for("phantom", size=size, spacing=None)
    for volume in prepare(cases, recipe):
        _, label, affine, _ = load_native(volume.case)
        restored = volume.restore(volume.label)
        seen = volume.restore(np.ones_like(volume.label))  # 1 where the crop can see
        assert np.array_equal(restored, np.where(seen == 1, label, 0))
        assert seen.sum() == volume.image.shape[0] * np.prod(
            [min(a, b) for a, b in zip(recipe.size, label.shape[1::-1], strict=True)]
        )
        assert np.allclose(volume.geometry.affine, affine)


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_through_resampling_labels_come_back_without_a_shift(cases, variant):
    for volume in prepare(cases, recipe_for("phantom", variant)):
        _, label, _, _ = load_native(volume.case)
        restored = volume.restore(volume.label)
        for value in (1, 2, 3):
            assert dice(restored, label, value) >= 0.97
            gap = np.array(ndimage.center_of_mass(restored == value))
            assert np.abs(gap - ndimage.center_of_mass(label == value)).max() < 0.1  # pixels


def test_image_and_label_stay_aligned_through_resampling(tmp_path):
    """A disc drawn in both: the threshold of the resampled image is the resampled label."""
    x, y = np.meshgrid(np.arange(61), np.arange(53), indexing="ij")
    disc = np.hypot(x - 20, y - 35) < 11.3
    image = np.repeat(disc[..., None] * 100.0, 3, -1).astype(np.float32)
    label = (image > 50).astype(np.uint8) * 3
    case = write_case(tmp_path, image, label, np.diag([-1.8, -1.8, 5, 1]))
    volume = prepare([case], recipe_for("acdc", normalize="minmax"))[0]
    assert dice(volume.image > 0.5, volume.label > 0, True) > 0.97
    rows = ndimage.center_of_mass(volume.image)[1:]
    assert np.allclose(rows, ndimage.center_of_mass(volume.label)[1:], atol=0.15)


def test_saved_predictions_carry_the_source_grid(cases, tmp_path):
    for volume in prepare(cases, recipe_for("phantom")):
        path = save_prediction(volume, volume.label, tmp_path / f"{volume.case.case_id}.nii.gz")
        written, source = nib.load(path), nib.load(volume.case.image)
        assert written.shape == source.shape and written.get_data_dtype() == np.uint8
        assert np.array_equal(written.affine, source.affine)
        assert np.allclose(written.header.get_zooms(), source.header.get_zooms())
        for code in ("sform_code", "qform_code", "xyzt_units"):
            assert written.header[code] == source.header[code]
        assert np.array_equal(np.asarray(written.dataobj), volume.restore(volume.label))
        again = save_prediction(volume, volume.label, tmp_path / "again.nii.gz")
        assert again.read_bytes() == path.read_bytes()


def test_images_without_label_are_prepared_alike(cases):
    bare = [replace(case, label=None) for case in cases[:2]]
    recipe = recipe_for("phantom", size=96)
    for a, b in zip(prepare(bare, recipe), prepare(cases[:2], recipe), strict=True):
        assert a.label is None and np.array_equal(a.image, b.image)


def test_float_and_integer_files_of_the_same_values_agree(tmp_path):
    array = np.random.RandomState(0).randint(0, 900, (20, 24, 3))
    label = np.random.RandomState(1).randint(0, 4, array.shape)
    kinds = [(np.int16, np.uint8), (np.float32, np.float32), (np.float64, np.int16)]
    volumes = [
        prepare(
            [write_case(tmp_path, array.astype(a), label.astype(b), name=f"v{i}")],
            recipe_for("acdc", size=32),
        )[0]
        for i, (a, b) in enumerate(kinds)
    ]
    for other in volumes[1:]:
        assert np.array_equal(volumes[0].image, other.image)
        assert np.array_equal(volumes[0].label, other.label)


def test_n4_flattens_a_bias_field(tmp_path):
    pytest.importorskip("SimpleITK")
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (48, 48, 6)), indexing="ij")
    body = np.hypot(x, y) < 0.8
    image = np.where(body, 400.0, 5.0) * np.exp(0.5 * x + 0.3 * y)
    image += np.random.RandomState(0).normal(0, 2, image.shape)
    case = write_case(tmp_path, image.astype(np.float32))
    spread = {}
    for n4 in (False, True):
        recipe = recipe_for("acdc", size=48, spacing=None, normalize="minmax", n4=n4)
        inside = prepare([case], recipe)[0].image[body.transpose(2, 1, 0)]
        spread[n4] = inside.std() / inside.mean()
    assert spread[True] < 0.35 * spread[False]


def test_n4_without_simpleitk_says_what_to_install(cases, monkeypatch):
    monkeypatch.setattr(preprocess.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install SimpleITK"):
        prepare(cases, recipe_for("phantom", n4=True))


def test_recipes_refuse_settings_that_make_no_sense():
    for change in (
        {"normalize": "l2"}, {"size": (0, 4)}, {"spacing": 0.0}, {"image_order": 7},
        {"label_order": 2}, {"slice_axis": 3}, {"fit": "stretch"}, {"num_classes": 1},
        {"label_map": ((0, 0), (5, 4))}, {"label_map": ((0, 0), (0, 1))},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="Recipe 'x'"):
            Recipe(name="x", **change)
    assert Recipe(name="x", label_map={0: 0, 7: 1}).label_map == ((0, 0), (7, 1))


# Cache


def count_builds(monkeypatch):
    built = []
    original = preprocess.prepare_arrays
    monkeypatch.setattr(
        preprocess,
        "prepare_arrays",
        lambda case, r: built.append(case.case_id) or original(case, r),
    )
    return built


def test_cache_returns_the_same_volumes_without_building(cases, tmp_path, monkeypatch):
    built = count_builds(monkeypatch)
    recipe = recipe_for("phantom", size=64)
    steps = []
    first = prepare(cases, recipe, tmp_path / "c", lambda *step: steps.append(step))
    assert steps == [(i + 1, len(cases), case.case_id) for i, case in enumerate(cases)]
    again = prepare(cases, recipe, tmp_path / "c")
    assert built == [case.case_id for case in cases]
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.image, b.image) and np.array_equal(a.label, b.label)
        assert a.geometry == b.geometry and a.present == b.present
        assert np.array_equal(a.restore(a.label), b.restore(b.label))
    assert len(list((tmp_path / "c").iterdir())) == len(cases)  # no temporary left


def test_cache_key_follows_bytes_recipe_and_label(cases, tmp_path):
    case, recipe = cases[0], recipe_for("phantom", size=64)
    key = cache.entry_key(case, recipe)
    copy = tmp_path / "moved.nii.gz"
    copy.write_bytes(case.image.read_bytes())
    assert cache.entry_key(replace(case, image=copy), recipe) == key  # contents, not names
    assert cache.entry_key(case, replace(recipe, name="other name")) == key
    others = [
        cache.entry_key(replace(case, label=None), recipe),
        cache.entry_key(cases[1], recipe),
        *(cache.entry_key(case, replace(recipe, **change)) for change in (
            {"size": (64, 65)}, {"clip": True}, {"spacing": 1.5}, {"n4": True},
            {"label_map": ((0, 0), (1, 1), (2, 2), (3, 0))}))
    ]  # fmt: skip
    one_file = replace(case, label=case.image)  # as in h5: image and label in one file
    others.append(cache.entry_key(one_file, recipe))
    copy.write_bytes(case.image.read_bytes() + b"\0")
    others.append(cache.entry_key(replace(case, image=copy), recipe))
    assert len({key, *others}) == len(others) + 1


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped bit in the image": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "not a zip": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_cache_entries_are_rebuilt(cases, tmp_path, monkeypatch, caplog, name):
    recipe = recipe_for("phantom", size=64)
    good = prepare(cases[:2], recipe, tmp_path)
    entry = tmp_path / f"{cache.entry_key(cases[0], recipe)}.npz"
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGE[name](whole))
    built = count_builds(monkeypatch)
    with caplog.at_level(logging.WARNING):
        volumes = prepare(cases[:2], recipe, tmp_path)
    assert built == [cases[0].case_id]
    assert entry.name in caplog.text and "rebuilding" in caplog.text
    assert np.array_equal(volumes[0].image, good[0].image)
    assert np.array_equal(volumes[0].label, good[0].label)
    prepare(cases[:2], recipe, tmp_path)
    assert built == [cases[0].case_id]  # healed


def test_an_entry_under_a_wrong_name_is_not_used(cases, tmp_path):
    recipe = recipe_for("phantom", size=64)
    prepare(cases[:2], recipe, tmp_path)
    first, second = (tmp_path / f"{cache.entry_key(c, recipe)}.npz" for c in cases[:2])
    second.write_bytes(first.read_bytes())
    fresh = prepare(cases[:2], recipe)
    assert np.array_equal(prepare(cases[:2], recipe, tmp_path)[1].image, fresh[1].image)
