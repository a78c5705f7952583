"""Folders of photographs and masks: what is read, and what is refused with which words."""

import numpy as np
import pytest
from PIL import Image

from medcl_train.data import isic, lesions
from medcl_train.data.errors import DataError
from medcl_train.data.isic import PictureRecipe

RECIPE = PictureRecipe(size=(8, 8))


@pytest.fixture
def root(tmp_path):
    """Two photographs of 16 x 12 pixels (width x height); the left half is foreground."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    mask = np.zeros((12, 16), np.uint8)
    mask[:, :8] = 255
    for name in ("a", "b"):
        image = np.stack([mask, mask // 2, np.full_like(mask, 51)], -1)
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}_segmentation.png")
    return tmp_path


def replace_mask(root, array, name="a_segmentation.png", **options):
    for old in (root / "masks").glob("a*"):
        old.unlink()
    Image.fromarray(array).save(root / "masks" / name, **options)


def test_images_and_masks_are_read_at_the_size_of_the_network(root):
    first, _ = isic.load(isic.find(root), RECIPE)
    assert first.case.case_id == "a" and first.native_size == (12, 16)
    assert first.image.shape == (3, 8, 8) and first.image.dtype == np.float32
    left = [(1.0 - 0.485) / 0.229, (127 / 255 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(first.image[:, 4, 0], left, rtol=1e-5)
    np.testing.assert_allclose(first.rgb()[4, 0], [1, 127 / 255, 0.2], rtol=1e-5)
    assert (first.label == np.repeat([[1] * 4 + [0] * 4], 8, axis=0)).all()
    assert first.native_label().shape == (12, 16) and first.native_label().sum() == 12 * 8
    raw = isic.load(isic.find(root), PictureRecipe(size=(8, 8), unit_range=False))[0]
    assert raw.image[0, 4, 0] == pytest.approx((255 - 0.485) / 0.229)


def test_challenge_folders_and_one_bit_masks(root):
    (root / "images").rename(root / "ISIC-2017_Training_Data")
    (root / "masks").rename(root / "ISIC-2017_Training_Part1_GroundTruth")
    found = isic.find(root)
    assert [case.case_id for case in found] == ["a", "b"]
    one_bit = np.zeros((12, 16), bool)
    one_bit[3:6] = True
    Image.fromarray(one_bit).save(found[0].label)
    assert isic.load(found, RECIPE)[0].native_label().sum() == 3 * 16
    # superpixels lie beside the images of the challenge
    Image.new("RGB", (16, 12)).save(found[0].image.with_name("a_superpixels.png"))
    assert len(isic.find(root)) == 2


def test_jpeg_masks_have_a_threshold_of_127(root):
    grey = np.full((16, 16), 127, np.uint8)
    grey[:, 8:] = 128
    replace_mask(root, grey[:12], "a.jpg", quality=100)
    stored = np.array(Image.open(root / "masks" / "a.jpg"))
    found = isic.load(isic.find(root), RECIPE)[0].native_label()
    assert (found == (stored > 127)).all() and 0 < found.mean() < 1


def test_lanczos_masks_grow_as_the_released_ones(root):
    mask = np.zeros((12, 16), np.uint8)
    mask[2:5, 3:6] = 255
    replace_mask(root, mask)
    nearest, grown = (
        isic.load(isic.find(root), PictureRecipe(size=(8, 8), mask_resize=how))[0].label
        for how in ("nearest", "lanczos")
    )
    assert nearest.sum() < grown.sum() and (grown[nearest == 1] == 1).all()


@pytest.mark.parametrize(
    "change, recipe, message",
    [
        (lambda m: np.where(m > 0, 200, 3), RECIPE, r"a_segmentation.png.*0 and 255.*3, 200"),
        (lambda m: m // 255, RECIPE, r"a_segmentation.png.*the values 0, 1.*--mask-values ids"),
        (lambda m: m[:-1], RECIPE, r"a_segmentation.png.*12 x 16.*found 11 x 16"),
        (lambda m: m // 51, PictureRecipe((8, 8), num_classes=3),
         r"a_segmentation.png.*class ids 0..2 \(num_classes 3\).*0, 5"),
        (lambda m: np.stack([m, m // 2, m], -1), RECIPE, r"a_segmentation.png.*one value per pix"),
    ],
    ids=["grey", "ids", "size", "beyond", "colour"],
)  # fmt: skip
def test_masks_that_cannot_be_right_are_named(root, change, recipe, message):
    mask = np.array(Image.open(root / "masks" / "a_segmentation.png"))
    replace_mask(root, change(mask).astype(np.uint8))
    with pytest.raises(DataError, match=message):
        isic.load(isic.find(root), recipe)


def test_class_ids_are_read_where_the_recipe_has_them(root):
    mask = np.array(Image.open(root / "masks" / "a_segmentation.png")) // 255 * 2
    replace_mask(root, mask)
    recipe = PictureRecipe(size=(8, 8), num_classes=3, mask_values="ids")
    case = [case for case in isic.find(root) if case.case_id == "a"]
    assert set(np.unique(isic.load(case, recipe)[0].label)) == {0, 2}


def test_missing_and_broken_files_are_named_together(root):
    (root / "masks" / "b_segmentation.png").unlink()
    with pytest.raises(DataError, match=r"b.png: expected its mask"):
        isic.find(root)
    for name in ("a", "b"):
        (root / "images" / f"{name}.png").write_bytes(b"no image")
        Image.new("L", (16, 12)).save(root / "masks" / f"{name}_segmentation.png")
    with pytest.raises(DataError) as caught:
        isic.load(isic.find(root), RECIPE)
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match="a folder of images"):
        isic.find(root / "masks")


def test_drawn_lesions_are_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        assert lesions.ensure(tmp_path / name, 3, size=32)
    assert not lesions.ensure(tmp_path / "one", 3, size=32)
    for path in sorted((tmp_path / "one").rglob("*.*g")):
        assert (
            path.read_bytes()
            == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        )
    shares = [p.label.mean() for p in isic.load(isic.find(tmp_path / "one"), RECIPE)]
    assert all(0.02 < share < 0.6 for share in shares)
    with pytest.raises(DataError, match="another folder"):
        lesions.ensure(tmp_path / "one", 4, size=32)
