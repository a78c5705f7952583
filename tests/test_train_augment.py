"""Augmentation: what moves where, and that a batch depends on its generator only."""

import dataclasses
import math

import pytest
import torch

from medcl_train.data.augment import (
    NONE,
    STRENGTHS,
    STRONG,
    Augmentation,
    ViewGeometry,
    augment,
    blur,
    cell_centers,
    invert_affine,
    jitter_intensity,
    random_geometry,
    view,
    warp,
)
from medcl_train.engine.seeding import generator

GEOMETRY_ONLY = Augmentation(
    flip_x=0.5, flip_y=0.5, rotate=40, scale=0.2, shift=0.1, gamma=0, brightness=0, contrast=0,
    blur=0, noise=0, crop=(0.4, 0.9),
)  # fmt: skip


def _coordinates(batch, height, width):
    """Images whose value is the normalised x (or y) of the pixel: a warped one reads out places."""
    xy = cell_centers(height, width).view(height, width, 2)
    return xy.permute(2, 0, 1)[:, None].expand(2, batch, height, width).unsqueeze(2)


def test_without_augmentation_images_and_labels_stay_as_they_are():
    images, labels = torch.randn(3, 1, 8, 10), torch.randint(0, 3, (3, 8, 10))
    got, got_labels = augment(images, labels, NONE, generator(0, "a"))
    torch.testing.assert_close(got, images, atol=1e-5, rtol=1e-5)
    assert torch.equal(got_labels, labels)


def test_a_flip_mirrors_image_and_label_alike():
    images, labels = torch.randn(2, 1, 6, 8), torch.randint(0, 3, (2, 6, 8))
    flip = Augmentation(1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    got, got_labels = augment(images, labels, flip, generator(0, "a"))
    torch.testing.assert_close(got, images.flip(3), atol=1e-5, rtol=1e-5)
    assert torch.equal(got_labels, labels.flip(2))


def test_rotation_keeps_the_aspect_of_oblong_images():
    """A disc stays a disc (same area, same width and height in pixels) when a 24 x 48 image turns
    by 30 degrees."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(48.0), indexing="ij")
    disc = ((y - 11.5) ** 2 + (x - 23.5) ** 2 < 64).float()[None, None]
    angle = math.radians(30)
    cos, sin = math.cos(angle), math.sin(angle)
    by_hand = torch.tensor([[[cos, -sin * 24 / 48, 0], [sin * 48 / 24, cos, 0]]]).double()
    turned = warp(disc, None, ViewGeometry(by_hand))[0][0, 0] > 0.5
    assert abs(int(turned.sum()) - int(disc.sum())) <= 6
    assert abs(int(turned.any(0).sum()) - int(turned.any(1).sum())) <= 1
    drawn = random_geometry(64, (24, 48), GEOMETRY_ONLY, generator(1, "g")).matrix
    # sin(a)·zoom appears in both off-diagonal entries, scaled by the aspect ratio and its inverse
    assert torch.allclose((drawn[:, 0, 1] * 48 / 24).abs(), (drawn[:, 1, 0] * 24 / 48).abs())


def test_the_recorded_matrix_is_what_was_done_to_the_image():
    coordinates = _coordinates(5, 32, 40)
    geometry = random_geometry(5, (32, 40), GEOMETRY_ONLY, generator(3, "g"))
    warped = torch.stack([warp(c.double(), None, geometry)[0][:, 0] for c in coordinates], -1)
    expected = cell_centers(32, 40) @ geometry.matrix[:, :, :2].transpose(1, 2)
    expected = (expected + geometry.matrix[:, None, :, 2]).view(5, 32, 40, 2)
    # linear interpolation of a linear ramp is exact except next to the border
    inner = (expected.abs() < 1 - 2 / 32).all(-1)
    assert inner.float().mean() > 0.5
    torch.testing.assert_close(warped[inner], expected[inner], atol=1e-9, rtol=0)


def test_crops_stay_inside_the_slice_and_have_the_asked_area():
    crop = Augmentation(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, crop=(0.25, 0.5))
    matrix = random_geometry(200, (16, 16), crop, generator(0, "c")).matrix
    area = matrix[:, 0, 0] * matrix[:, 1, 1]
    assert area.min() >= 0.25 and area.max() <= 0.5 and area.std() > 0.03
    assert torch.allclose(matrix[:, 0, 0], matrix[:, 1, 1])
    reach = matrix[:, :, 2].abs() + matrix[:, 0, 0][:, None]
    assert reach.max() <= 1 + 1e-12


def test_places_agree_with_brute_force():
    """For every query cell: its centre in the slice, then the nearest key cell by distance."""
    geometry_q = random_geometry(6, (32, 48), GEOMETRY_ONLY, generator(0, "q"))
    geometry_k = random_geometry(6, (32, 48), GEOMETRY_ONLY, generator(0, "k"))
    places = geometry_q.places(geometry_k, (8, 12), (4, 6))
    found = 0
    for b in range(6):
        to_slice = torch.eye(3, dtype=torch.float64)
        to_slice[:2] = geometry_q.matrix[b]
        from_key = torch.eye(3, dtype=torch.float64)
        from_key[:2] = geometry_k.matrix[b]
        key_centers = [(r, c, from_key @ torch.tensor(
            [(c + 0.5) / 6 * 2 - 1, (r + 0.5) / 4 * 2 - 1, 1.0], dtype=torch.float64))
            for r in range(4) for c in range(6)]  # fmt: skip
        for row in range(8):
            for column in range(12):
                point = torch.tensor([(column + 0.5) / 12 * 2 - 1, (row + 0.5) / 8 * 2 - 1, 1.0])
                source = to_slice @ point.double()
                in_key = torch.linalg.solve(from_key, source)
                visible = bool((source[:2].abs() <= 1).all() and (in_key[:2].abs() <= 1).all())
                got = places[b, row, column]
                assert visible == (not got.isnan().any())
                if not visible:
                    continue
                found += 1
                # in the key view's own coordinates, where cells are squares of one size
                inverse = torch.linalg.inv(from_key)
                distances = [
                    (
                        float((((inverse @ c)[:2] - in_key[:2]) * torch.tensor([3.0, 2.0])).norm()),
                        r,
                        k,
                    )
                    for r, k, c in key_centers
                ]
                _, best_row, best_column = min(distances)
                assert (round(float(got[0])), round(float(got[1]))) == (best_row, best_column)
    assert found > 50


def test_inverse_of_affine_maps():
    matrix = random_geometry(8, (16, 16), GEOMETRY_ONLY, generator(0, "m")).matrix
    points = torch.rand(5, 2, dtype=torch.float64)
    there = points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]
    back = invert_affine(matrix)
    again = there @ back[:, :, :2].transpose(1, 2) + back[:, None, :, 2]
    torch.testing.assert_close(again, points.expand(8, 5, 2))


def test_a_batch_depends_on_seed_stream_and_iteration_only():
    images = torch.randn(4, 1, 16, 16)
    first = view(images, STRONG, generator(1, "view", 5))[0]
    torch.rand(100)  # other use of the global generator must not matter
    assert torch.equal(first, view(images, STRONG, generator(1, "view", 5))[0])
    for other in (generator(2, "view", 5), generator(1, "key", 5), generator(1, "view", 6)):
        assert not torch.equal(first, view(images, STRONG, other)[0])


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_intensity_changes_scale_with_the_image(offset):
    """The same draw on a slice of another unit gives the same result in that unit."""
    images = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    first = jitter_intensity(images, STRONG, generator(0, "i"))
    second = jitter_intensity(images * 50 + offset, STRONG, generator(0, "i"))
    torch.testing.assert_close(first * 50 + offset, second, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(first, images)


def test_blur_keeps_the_mean_of_a_flat_slice_and_spreads_a_point():
    images = torch.zeros(2, 1, 15, 15)
    images[:, :, 7, 7] = 1
    got = blur(images, torch.tensor([0.0, 1.0]))
    assert torch.equal(got[0], images[0])
    spread = got[1, 0]
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    row = spread.sum(0)
    variance = float((row * (torch.arange(15) - 7.0) ** 2).sum())
    assert variance == pytest.approx(1.0, abs=0.05)
    flat = torch.full((1, 1, 9, 9), 3.0)
    torch.testing.assert_close(blur(flat, torch.tensor([0.8])), flat)


def test_photographs_are_sheared_stretched_and_recoloured():
    """Grey stays grey whatever the turn of the colours; the matrices are those of the ranges."""
    photo = STRENGTHS["photo"]
    rng = torch.Generator().manual_seed(3)
    grey = torch.rand(4, 1, 8, 8).expand(-1, 3, -1, -1)
    same = jitter_intensity(grey, photo, rng)
    torch.testing.assert_close(same, grey)
    coloured = torch.rand(4, 3, 8, 8)
    changed = jitter_intensity(coloured, photo, rng)
    torch.testing.assert_close(changed.mean(1), coloured.mean(1))  # the grey part of a colour
    assert ((changed - coloured).abs().amax((1, 2, 3)) > 0.1).any()
    turned = dataclasses.replace(photo, rotate=0.0, flip_x=0.0, flip_y=0.0)
    matrix = random_geometry(200, (16, 16), turned, rng).matrix
    across, along = matrix[:, 0, 0], matrix[:, 1, 1]
    for scale in (across, along):
        assert 0.8 <= scale.min() < 0.85 and 1.15 < scale.max() <= 1.2
    assert torch.corrcoef(torch.stack([across, along]))[0, 1].abs() < 0.3
    slope = matrix[:, 0, 1] / across
    assert math.tan(math.radians(17)) < slope.abs().max() <= math.tan(math.radians(20))
    assert torch.equal(matrix[:, 1, 0].abs(), torch.zeros(200, dtype=torch.float64))
