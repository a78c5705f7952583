"""`receptive_fields` against networks whose geometry is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_patch_dragsaw import blobs

import medcl_kernels as medcl
from medcl_kernels.patch_dragsaw import PatchDragsawLoss, PatchLayer


def unet_like():
    def block(c_in, c_out, stride):
        return torch.nn.Sequential(
            torch.nn.Conv3d(c_in, c_out, 3, stride, 1),
            torch.nn.InstanceNorm3d(c_out),
            torch.nn.LeakyReLU(inplace=True),
            torch.nn.Conv3d(c_out, c_out, 3, 1, 1),
            torch.nn.InstanceNorm3d(c_out),
            torch.nn.LeakyReLU(inplace=True),
        )

    return torch.nn.Sequential(block(1, 2, 1), block(2, 3, 2), block(3, 4, 2), block(4, 5, 2))


def test_receptive_fields_of_an_nnunet_encoder_are_those_of_the_specification():
    network = unet_like().train()
    found = medcl.receptive_fields(network, ["2"], (1, 1, 48, 48, 48))
    assert found["2"].size == (23, 23, 23) and found["2"].stride == (4, 4, 4)
    assert found["2"].offset == (0.0, 0.0, 0.0)
    assert network.training
    with pytest.raises(ValueError, match=r"layer '3'.*edge.*larger input_shape"):
        medcl.receptive_fields(network, ["3"], (1, 1, 32, 32, 32))
    with pytest.raises(ValueError, match="no layer 'stem'"):
        medcl.receptive_fields(network, ["stem"], (1, 1, 8, 8, 8))


class Pooled(torch.nn.Module):
    """Functional operations, dilation, pooling, a skip connection, global pooling, upsampling."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, 2, 1)
        self.wide = torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.patch = torch.nn.Conv2d(4, 4, 4, 4)
        self.up = torch.nn.Upsample(scale_factor=2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.wide(F.max_pool2d(F.relu(x), 3, 2, 1))
        y = y * torch.sigmoid(F.adaptive_avg_pool2d(y, 1)) + y
        return self.up(self.patch(y)), self.patch(x)


def test_receptive_fields_of_functional_networks():
    network = Pooled()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    # stem 3/j2; pooling 7/j4; dilated 7 + 4 * 4 = 23/j4; 4 x 4 patches 23 + 3 * 4 = 35/j16
    found = medcl.receptive_fields(network, ["stem", "wide"], (1, 3, 160, 192))
    assert found["stem"] == ((3, 3), (2, 2), (0.0, 0.0))
    assert found["wide"] == ((23, 23), (4, 4), (0.0, 0.0))
    twice = torch.nn.Sequential(network.stem, network.wide, network.patch)
    found = medcl.receptive_fields(twice, ["2"], (1, 3, 160, 192))["2"]
    assert found == ((17, 17), (8, 8), (3.0, 3.0))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    layer = PatchLayer.of(found, samples=9, weight=0.2)
    assert (layer.stride, layer.receptive_field, layer.offset) == ((8, 8), (17, 17), (3.0, 3.0))
    loss = PatchDragsawLoss({"x": layer}, num_classes=2, sizes="receptive_field")
    assert loss._centers(layer, torch.tensor([[0, 2]])).tolist() == [[3, 19]]
    assert loss({"x": torch.randn(1, 4, 20, 24)}, blobs(1, 160, 192)).isfinite()


class Decoded(torch.nn.Module):
    """Two levels in 3-D: a strided one, a transposed convolution back, the skip connection."""

    def __init__(self):
        super().__init__()
        self.fine = torch.nn.Conv3d(1, 3, 3, padding=1)
        self.coarse = torch.nn.Conv3d(3, 4, 3, 2, 1)
        self.up = torch.nn.ConvTranspose3d(4, 3, 2, 2)
        self.decoder = torch.nn.Sequential(
            torch.nn.Conv3d(6, 3, 3, padding=1), torch.nn.LeakyReLU()
        )

    def forward(self, x):
        x = F.instance_norm(self.fine(x))
        return [self.decoder(torch.cat((self.up(self.coarse(x)), x), 1))]


def test_receptive_fields_of_a_decoder_in_3d():
    # 3/j1, 5/j2; three cells of the decoder see two coarse ones, to the left or to the right
    found = medcl.receptive_fields(Decoded(), ["coarse", "decoder"], (1, 1, 24, 26, 28))
    assert found["coarse"] == ((5,) * 3, (2,) * 3, (0.0,) * 3)
    assert found["decoder"] == ((7,) * 3, (1,) * 3, (-0.5,) * 3)
    layer = PatchLayer.of(found["decoder"], step=6)
    loss = PatchDragsawLoss({"d": layer}, num_classes=3, sizes="receptive_field")
    features = {"d": torch.randn(1, 3, 24, 26, 28, requires_grad=True)}
    loss(features, blobs(1, 24, 26, 28, classes=3)).backward()
    assert features["d"].grad.isfinite().all() and features["d"].grad.abs().max() > 0
