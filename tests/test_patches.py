"""Patches of volumes for 3-D training, their augmentation, and prediction of whole volumes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcl_train.data import Case, DataError, Geometry, PatchDataset, Volume, recipe_for
from medcl_train.data.augment import LIGHT, NONE, STRONG, Augmentation, blur
from medcl_train.data.patches import augment3d
from medcl_train.models import build_unet3d
from medcl_train.patch_prediction import predict_patches

RECIPE = recipe_for("msd", size=(24, 20))


def volume(number, inner, *, label=True, missing=()):
    """Voxel value = its place in the file, from 1; class 1 a rod, class 2 one voxel."""
    depth, height, width = inner
    image = np.arange(1, np.prod(inner) + 1, dtype=np.float32).reshape(inner)
    ids = np.zeros(inner, np.uint8)
    ids[1:-1, 2, 3], ids[depth - 1, height - 1, width - 1] = 1, 2
    grid = np.zeros((2, depth, 24, 20))
    rows = slice((24 - height) // 2, (24 - height) // 2 + height)
    columns = slice((20 - width) // 2, (20 - width) // 2 + width)
    grid[0, :, rows, columns], grid[1, :, rows, columns] = image, ids
    meta = {"missing_classes": missing} if missing else {}
    case = Case(f"case{number}", f"subject{number // 2}", Path("none"), meta=meta)
    geometry = Geometry(
        (width, depth, height), tuple(map(tuple, np.eye(4))), (1, 1, 1), None, (1, 2, 0),
        (height, width), (1, 1, 1),
    )  # fmt: skip
    return Volume(
        case, grid[0].astype(np.float32), grid[1].astype(np.uint8) if label else None, geometry,
        RECIPE,
    )  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_content_is_the_part_that_is_no_padding():
    one = volume(0, (9, 16, 12))
    assert one.image[one.content].min() == 1 and one.image[one.content].size == 9 * 16 * 12
    restored = one.restore(one.label)
    assert np.array_equal(one.geometry.to_slices(restored), one.label[one.content])


def test_patches_are_cut_from_image_and_label_alike():
    volumes = [volume(0, (9, 16, 12)), volume(1, (14, 18, 20))]
    data = PatchDataset(volumes, (6, 8, 4))
    images, labels, missing = data.batch([0, 1, 1, 0], generator())
    assert images.shape == (4, 1, 6, 8, 4) and images.dtype == torch.float32
    assert labels.shape == (4, 6, 8, 4) and labels.dtype == torch.int64 and missing is None
    for number, image, label in zip([0, 1, 1, 0], images[:, 0], labels, strict=True):
        whole = volumes[number].image[volumes[number].content]
        place = np.unravel_index(int(image[0, 0, 0]) - 1, whole.shape)
        part = tuple(slice(a, a + n) for a, n in zip(place, (6, 8, 4), strict=True))
        assert np.array_equal(image, whole[part])  # no padding in it
        assert np.array_equal(label, volumes[number].label[volumes[number].content][part])


def test_a_third_of_the_patches_is_around_foreground_of_every_class():
    data = PatchDataset([volume(0, (12, 20, 16))], (4, 4, 4))
    rng, seen = generator(), {1: 0, 2: 0}
    free = 0
    for _ in range(40):
        _, labels, _ = data.batch([0, 0, 0], rng)
        classes = set(labels[2].unique().tolist()) - {0}
        assert classes, "the last patch of a batch is around foreground"
        for value in classes:
            seen[value] += 1
        free += int((labels[:2] > 0).any(-1).any(-1).any(-1).sum())
    assert min(seen.values()) > 10  # the one voxel of class 2 as often as the rod
    assert free < 40  # the others lie anywhere
    _, labels, _ = PatchDataset([volume(0, (12, 20, 16))], (4, 4, 4), foreground=1).batch(
        [0] * 5, rng
    )
    assert (labels > 0).flatten(1).any(1).all()


def test_batches_depend_on_the_generator_alone_and_reach_every_place():
    data = PatchDataset([volume(0, (6, 7, 5))], (4, 4, 4), foreground=0)
    first, again = (data.batch([0, 0, 0], generator(5))[0] for _ in range(2))
    assert torch.equal(first, again)
    rng = generator()
    starts = {float(data.batch([0], rng)[0][0, 0, 0, 0, 0]) for _ in range(400)}
    assert len(starts) == 3 * 4 * 2


def test_small_volumes_are_centred_in_zeros():
    one = volume(0, (5, 16, 12))
    images, labels, _ = PatchDataset([one], (8, 24, 12), foreground=1).batch([0], generator())
    assert np.array_equal(images[0, 0, 1:6, 4:20], one.image[one.content])
    assert np.array_equal(labels[0, 1:6, 4:20], one.label[one.content])
    assert images[0, 0].count_nonzero() == 5 * 16 * 12


def test_subjects_missing_classes_and_errors():
    volumes = [volume(0, (6, 8, 8)), volume(1, (6, 8, 8), missing=(2,)), volume(2, (6, 8, 8))]
    data = PatchDataset(volumes, (4, 4, 4))
    assert len(data) == 3 and data.indices(["subject0"]) == [0, 1]
    with pytest.raises(DataError, match="no volume of subject9"):
        data.indices(["subject1", "subject9"])
    _, _, missing = data.batch([1, 2], generator())
    assert missing.tolist() == [[False, False, True], [False, False, False]]
    with pytest.raises(DataError, match="no label for case1"):
        PatchDataset([volumes[0], volume(1, (6, 8, 8), label=False)], (4, 4, 4))
    with pytest.raises(DataError, match="no volume"):
        PatchDataset([], (4, 4, 4))
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        PatchDataset(volumes, (4, 4))


def test_augmentation_moves_all_slices_and_the_label_alike():
    images = torch.randn(3, 1, 4, 10, 10)
    labels = (images[:, 0] > 0).long()
    same, own = augment3d(images, labels, NONE, generator())
    torch.testing.assert_close(same, images, atol=1e-5, rtol=1e-5)
    assert torch.equal(own, labels)
    flips = Augmentation(1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    moved, own = augment3d(images, labels, flips, generator())
    torch.testing.assert_close(moved, images.flip(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(own, labels.flip(-1))
    turned = torch.randn(1, 1, 1, 12, 12).expand(2, 1, 5, 12, 12)
    moved, own = augment3d(turned, (turned[:, 0] > 0).long(), LIGHT, generator())
    assert torch.equal(moved[:, :, :1].expand_as(moved), moved)
    assert not torch.allclose(moved[0], moved[1], atol=0.1)
    assert torch.isfinite(augment3d(images, labels, STRONG, generator())[0]).all()


def test_blur_is_gaussian_in_3d():
    image = torch.randn(2, 1, 9, 12, 11, dtype=torch.float64)
    found = blur(image, torch.tensor([0.0, 0.9], dtype=torch.float64))
    torch.testing.assert_close(found[0], image[0])
    wanted = ndimage.gaussian_filter(image[1, 0].numpy(), 0.9, mode="nearest", radius=3)
    torch.testing.assert_close(found[1, 0], torch.from_numpy(wanted))


class Pointwise(torch.nn.Module):
    """Says class 1 where a voxel is above a threshold, whatever surrounds it."""

    stride = (4, 4, 4)

    def probabilities(self, image, head):
        assert head == "d1" and not self.training
        self.shape = tuple(image.shape)
        above = (image > 500).float()
        return torch.cat([1 - above, above], 1)


@pytest.mark.parametrize("patch", [None, (4, 8, 8), (16, 24, 24), (5, 6, 7)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_every_voxel_is_predicted_once_whatever_the_windows(patch, overlap):
    one, net = volume(0, (9, 16, 11)), Pointwise()
    found = predict_patches(net, one, patch=patch, overlap=overlap)
    assert found.dtype == np.uint8 and net.training
    assert np.array_equal(found, one.image > 500)
    sizes = {None: (12, 16, 12)}.get(patch, patch)
    assert net.shape[2:] == sizes


def test_windows_are_averaged_with_the_middle_ahead():
    """Two windows disagree about the voxels that they share: each is right about its own half."""

    class Halves(Pointwise):
        def probabilities(self, image, head):
            first = (image[:, :, :1, :1, :1] == 1).float().expand_as(image)
            return torch.cat([first, 1 - first], 1)

    one = volume(0, (12, 8, 8))
    found = predict_patches(Halves(), one, patch=(8, 8, 8))[one.content]
    assert (found[:6] == 0).all() and (found[6:] == 1).all()


def test_real_volumes_train_and_return_to_their_grid(shared_data, tmp_path):
    """Ten steps on two hippocampi lower the loss; the prediction fits the file's grid."""
    from medcl_train.data import find_cases, load_native, prepare
    from medcl_train.ideal.consistency import supervised_loss
    from medcl_train.metrics import score_case
    from medcl_train.models import deep_supervision_loss

    cases = find_cases("msd", shared_data / "msd_hippocampus")[:2]
    volumes = prepare(cases, recipe_for("msd"))
    data = PatchDataset(volumes, (24, 24, 24))
    net = build_unet3d(3, widths=(4, 8, 16)).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    losses = []
    for step in range(10):
        x, y, missing = data.batch([0, 1], generator(step))
        assert missing is None and set(y.unique().tolist()) == {0, 1, 2}
        x, y = augment3d(x, y, LIGHT, generator(step))
        loss = deep_supervision_loss(net(x), y, supervised_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    prediction = predict_patches(net, volumes[0], patch=(24, 24, 24))
    _, truth, _, spacing = load_native(cases[0])
    rows = score_case(volumes[0].restore(prediction), truth, spacing, num_classes=3, case="one")
    assert [r["class"] for r in rows] == [1, 2] and all(0 <= r["dice"] <= 1 for r in rows)
