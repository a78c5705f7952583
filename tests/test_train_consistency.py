"""Cross pseudo labels against the worked numbers of the specification, and the supervised loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from medcl_train.ideal import cross_pseudo_loss, ramp_up, supervised_loss

# 4 pixels, 3 classes; the worked example "Cross-consistency" of the IDEAL specification
Z1 = [[2, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 0]]
Z2 = [[1, 0, 0], [0, 0, 2], [0, 0, 2], [0, 2, 1]]
TABLE = [
    # threshold, mean over kept pixels, mean over all pixels, pixels kept by head 2 and by head 1
    (0.0, 2.046512, 2.046512, [1, 1, 1, 1], [1, 1, 1, 1]),
    (0.5, 1.697155, 1.444610, [1, 1, 1, 1], [1, 1, 1, 0]),
    (0.6, 1.231616, 0.824838, [0, 1, 1, 1], [1, 0, 1, 0]),
    (0.7, 1.218679, 0.609339, [0, 1, 1, 0], [1, 0, 1, 0]),
    (0.8, 0.239545, 0.059886, [0, 0, 0, 0], [0, 0, 1, 0]),
]
Y1, CONF1 = [0, 1, 2, 0], [0.786986, 0.576117, 0.909443, 0.422319]  # pixel 3 is a tie
Y2, CONF2 = [0, 2, 2, 1], [0.576117, 0.786986, 0.786986, 0.665241]
CE_P1_Y2 = [0.239545, 1.551445, 0.094923, 0.861995]
CE_P2_Y1 = [0.551445, 2.239545, 0.239545, 2.407606]


def _logits(rows):
    """(4, 3) numbers as a batch of one image with 2x2 pixels, (1, 3, 2, 2)."""
    pixels = torch.tensor(rows, dtype=torch.float64)
    return pixels.t().reshape(1, 3, 2, 2).clone().requires_grad_()


def _rows(gradient):
    return gradient.reshape(3, 4).t()


@pytest.mark.parametrize(("threshold", "kept_mean", "all_mean", "keep2", "keep1"), TABLE)
def test_cross_loss_of_the_worked_example(threshold, kept_mean, all_mean, keep2, keep1):
    z1, z2 = _logits(Z1), _logits(Z2)
    loss, kept = cross_pseudo_loss(z1, z2, threshold=threshold)
    assert float(loss.detach()) == pytest.approx(kept_mean, abs=1e-6)
    assert float(kept) == pytest.approx(sum(keep1 + keep2) / 8)
    loss.backward()  # a pixel teaches the other head exactly where it is kept
    for z, keep in ((z1, keep2), (z2, keep1)):
        assert _rows(z.grad).any(1).int().tolist() == keep
    loss, _ = cross_pseudo_loss(z1, z2, threshold=threshold, norm="all")
    assert float(loss.detach()) == pytest.approx(all_mean, abs=1e-6)


@pytest.mark.parametrize("pixel", range(4))
def test_every_pixel_of_the_worked_example(pixel):
    """Its cross-entropies alone and together, its confidences as the thresholds that drop it."""
    z1, z2 = (torch.tensor(z[pixel], dtype=torch.float64).view(1, 3, 1, 1) for z in (Z1, Z2))
    low, high = sorted((CONF1[pixel], CONF2[pixel]))
    alone = (CE_P1_Y2 if CONF2[pixel] == high else CE_P2_Y1)[pixel]
    both = CE_P1_Y2[pixel] + CE_P2_Y1[pixel]
    step = 1e-6
    for threshold, expected, kept in (
        (low - step, both, 1.0),
        (low + step, alone, 0.5),
        (high - step, alone, 0.5),
        (high + step, 0.0, 0.0),
    ):
        loss, share = cross_pseudo_loss(z1, z2, threshold=threshold)
        # both: two numbers rounded to six digits
        assert float(loss) == pytest.approx(expected, abs=2e-6 if expected == both else 1e-6)
        assert float(share) == kept
    assert z1.argmax() == Y1[pixel] and z2.argmax() == Y2[pixel]


@pytest.mark.parametrize(("norm", "factor"), [("all", 1.0), ("kept", 4 / 2)])
def test_gradients_of_the_worked_example(norm, factor):
    z1, z2 = _logits(Z1), _logits(Z2)
    cross_pseudo_loss(z1, z2, threshold=0.7, norm=norm)[0].backward()
    d_z1 = [[0, 0, 0], [0.052985, 0.144029, -0.197015], [0.011320, 0.011320, -0.022639], [0, 0, 0]]
    d_z2 = [
        [-0.105971, 0.052985, 0.052985],
        [0, 0, 0],
        [0.026627, 0.026627, -0.053253],
        [0, 0, 0],
    ]
    for name, z, expected in (("d_z1", z1, d_z1), ("d_z2", z2, d_z2)):
        expected = factor * torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(
            _rows(z.grad),
            expected,
            atol=factor * 1e-6,  # of numbers with six digits
            rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_head_gets_no_gradient_through_its_own_pseudo_labels():
    """Only CE(p1, y2) reaches z1: with head 2's confidence below the threshold z1 gets nothing."""
    z1, z2 = _logits(Z1), _logits(Z2)
    cross_pseudo_loss(z1, z2, threshold=0.8)[0].backward()
    assert z1.grad.abs().max() == 0
    assert z2.grad.abs().max() > 0


def test_nothing_kept_gives_a_connected_zero():
    z1, z2 = _logits(Z1), _logits(Z2)
    loss, kept = cross_pseudo_loss(z1, z2, threshold=1.0)
    loss.backward()
    assert float(loss.detach()) == 0 and float(kept) == 0
    assert z1.grad.abs().max() == 0 and z2.grad.abs().max() == 0


def test_mse_and_dice_variants_by_formula():
    z1, z2 = _logits(Z1), _logits(Z2)
    p1, p2 = torch.softmax(z1, 1), torch.softmax(z2, 1)
    mse, _ = cross_pseudo_loss(z1, z2, threshold=0.0, kind="mse")
    expected = 2 * (p1 - p2).square().sum(1).mean()
    assert float(mse.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    soft, _ = cross_pseudo_loss(z1, z2, threshold=0.0, kind="dice")
    expected = 0.0
    for p, target in ((p1, p2), (p2, p1)):
        g = F.one_hot(target.argmax(1), 3).movedim(-1, 1)
        per_class = (2 * (p * g).sum((0, 2, 3)) + 1e-5) / ((p**2 + g).sum((0, 2, 3)) + 1e-5)
        expected += float((1 - per_class.mean()).detach())
    assert float(soft.detach()) == pytest.approx(expected, rel=1e-5)
    for options in ({"kind": "kl"}, {"norm": "batch"}):
        with pytest.raises(ValueError, match="must be"):
            cross_pseudo_loss(z1, z2, **options)


def test_ramp_up_is_a_sigmoid_shape_from_exp_minus_5_to_1():
    assert ramp_up(0, 200) == pytest.approx(math.exp(-5))
    assert ramp_up(100, 200) == pytest.approx(math.exp(-5 * 0.25))
    assert ramp_up(200, 200) == ramp_up(900, 200) == 1.0
    assert ramp_up(0, 0) == 1.0


def test_supervised_loss_by_formula():
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    p = torch.softmax(logits, 1)
    g = F.one_hot(labels, 3).movedim(-1, 1)
    dims = (0, 2, 3)
    per_class = 1 - (2 * (p * g).sum(dims) + 1e-5) / ((p**2).sum(dims) + g.sum(dims) + 1e-5)
    expected = 0.5 * (F.cross_entropy(logits, labels) + per_class.mean())
    torch.testing.assert_close(supervised_loss(logits, labels), expected)
    weighted = F.cross_entropy(logits, labels, weight=torch.tensor([0.2, 1.0, 1.0]))
    expected = 0.5 * (weighted + per_class[1:].mean())
    got = supervised_loss(logits, labels, background_weight=0.2, dice_background=False)
    torch.testing.assert_close(got, expected)


def test_dice_per_image_is_the_mean_over_images():
    logits, labels = torch.randn(3, 3, 4, 5), torch.randint(0, 3, (3, 4, 5))
    whole = F.cross_entropy(logits, labels)
    dice = [
        2 * float(supervised_loss(z[None], y[None], dice_background=False))
        - float(F.cross_entropy(z[None], y[None]))
        for z, y in zip(logits, labels, strict=True)
    ]
    got = supervised_loss(logits, labels, dice_background=False, dice_over="image")
    assert float(got) == pytest.approx(0.5 * (float(whole) + sum(dice) / 3), rel=1e-5)
    with pytest.raises(ValueError, match="'batch' or 'image'"):
        supervised_loss(logits, labels, dice_over="volume")


def test_a_class_nobody_drew_counts_as_possible_background():
    """With class 1 not annotated, label 0 means 'background or class 1': moving probability between
    these two must not change the loss, and class 1 gets no other signal."""
    labels = torch.tensor([[[0, 0], [2, 0]]])
    missing = torch.tensor([[False, True, False]])
    logits = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    swapped = logits[:, [1, 0, 2]]
    kept = supervised_loss(logits, labels, missing=missing)
    torch.testing.assert_close(kept, supervised_loss(swapped, labels, missing=missing))
    p = torch.softmax(logits, 1)
    picked = torch.where(labels == 0, p[:, 0] + p[:, 1], p[:, 2])
    g2 = (labels == 2).double()
    dice = 1 - (2 * (p[:, 2] * g2).sum() + 1e-5) / ((p[:, 2] ** 2).sum() + g2.sum() + 1e-5)
    expected = 0.5 * (-picked.log().mean() + dice)
    torch.testing.assert_close(kept.double(), expected, atol=1e-6, rtol=1e-6)


def test_nothing_missing_is_the_plain_loss():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    torch.testing.assert_close(
        supervised_loss(logits, labels, missing=nothing), supervised_loss(logits, labels)
    )
