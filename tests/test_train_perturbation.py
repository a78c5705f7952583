"""What the second branch of fine-tuning sees: CCT's perturbations, noise on the input, dropout."""

import dataclasses

import pytest
import torch

from medcl_train.ideal import IdealConfig, feature_drop, feature_noise, second_branch

CONFIG = IdealConfig(dropout=(0.0,) * 5)
IMAGES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_without_perturbation_or_dropout_one_pass_serves_both_branches():
    assert second_branch(CONFIG, IMAGES) == (None, None)


def test_dropout_gives_the_second_branch_a_pass_of_its_own_over_the_same_images():
    config = IdealConfig(dropout=(0.0, 0.0, 0.0, 0.0, 0.5))
    image, perturb = second_branch(config, IMAGES)
    assert image is IMAGES and perturb is None
    assert second_branch(dataclasses.replace(config, independent_dropout=False), IMAGES)[0] is None


def test_input_noise_has_its_sd_and_is_cut_at_two_sd():
    images = torch.zeros(8, 1, 64, 64)
    noise, perturb = second_branch(dataclasses.replace(CONFIG, input_noise=0.1), images)
    assert perturb is None and images.abs().max() == 0
    assert noise.abs().max() == pytest.approx(0.2)
    # a normal cut (not redrawn) at 2 sd has the sd 0.959
    assert float(noise.std()) == pytest.approx(0.0959, abs=0.001)
    assert abs(float(noise.mean())) < 0.002


def test_feature_noise_multiplies_by_a_factor_shared_by_the_batch():
    features = torch.rand(4, 3, 8, 8) + 0.5
    factor = feature_noise(features, 0.3) / features
    torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    assert 0.7 <= factor.min() < 0.75 and 1.25 < factor.max() <= 1.3


def test_feature_drop_zeroes_the_most_active_places_only():
    features = torch.rand(5, 3, 6, 7)
    dropped = feature_drop(features)
    activation = features.mean(1)
    relative = activation / activation.amax((1, 2), keepdim=True)
    kept = (dropped == features).all(1)
    assert (kept | (dropped == 0).all(1)).all()
    assert kept[relative < 0.7].all() and not kept[relative >= 0.9].any()
    # one gamma for all images separates them
    assert relative[kept].max() < relative[~kept].min()


def test_feature_dropout_drops_whole_channels():
    config = dataclasses.replace(CONFIG, feature_dropout=0.5)
    perturb = second_branch(config, IMAGES)[1]
    (out,) = perturb([torch.ones(8, 32, 4, 4)])
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out == out[..., :1, :1]).all()
    assert 0.35 < float((out == 0).float().mean()) < 0.65


def test_perturbations_compose_over_every_map():
    config = dataclasses.replace(CONFIG, feature_noise=0.3, feature_drop=True, input_noise=0.1)
    image, perturb = second_branch(config, IMAGES)
    assert image.shape == IMAGES.shape
    maps = [torch.rand(4, 3, size, size) + 0.1 for size in (8, 4)]
    for before, after in zip(maps, perturb(maps), strict=True):
        zero = (after == 0).all(1, keepdim=True).expand_as(after)
        assert zero.any() and not zero.all()
        factor = (after / before)[~zero]
        assert 0.7 <= factor.min() and factor.max() <= 1.3 and factor.std() > 0.1
