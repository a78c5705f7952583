"""The uncertainty gate, the block around it, and how it gets into a network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import medcl_kernels as medcl

IMPLS = ["reference", "cpu"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 6, 3, 4, 5), (11, 6)])
def test_the_gate_equals_softmax_entropy_and_product(impl, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    z = torch.randn(shape[0], 3, *shape[2:], dtype=torch.float64, requires_grad=True)
    y = medcl.uncertainty_reweight(x, z, impl=impl)
    p = z.softmax(1)
    expected = x * (2 + (p * p.log()).sum(1, keepdim=True) / math.log(3))
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, z), g), torch.autograd.grad(expected, (x, z), g)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_the_ends_of_the_scale(impl):
    x = torch.ones(1, 1, 3)
    z = torch.tensor([[[0.0, 100.0, 3e38], [0.0, 0.0, 0.0]]])
    y = medcl.uncertainty_reweight(x, z, impl=impl)
    assert y.flatten().tolist() == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_pixel(impl):
    x, z = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    clean = medcl.uncertainty_reweight(x, z, impl=impl)
    z[0, 1, 2] = x[0, 0, 1] = torch.nan
    y = medcl.uncertainty_reweight(x, z, impl=impl)
    assert y[0, :, 2].isnan().all() and y[0, 0, 1].isnan()
    y[0, :, 2], y[0, 0, 1] = clean[0, :, 2], clean[0, 0, 1]
    assert torch.equal(y, clean)


def parameters(block):
    return sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(32, 4674), (64, 9282), (1536, 221250), (2048, 294978), (48, 6978), (304, 43842)],
)
def test_blocks_have_the_published_number_of_parameters_in_2d(channels, expected):
    assert parameters(medcl.UncertaintyFeatureSelection(channels)) == expected


@pytest.mark.parametrize("channels", [32, 320])
def test_blocks_have_the_published_number_of_parameters_in_3d(channels):
    c, hidden = channels, channels // 4
    expected = 27 * c * hidden + hidden + 2 * hidden + 2 * hidden + 2
    assert parameters(medcl.UncertaintyFeatureSelection(c, spatial_dims=3)) == expected


@pytest.mark.parametrize("dims", [2, 3])
def test_the_block_is_convolutions_and_the_gate(dims):
    block = medcl.UncertaintyFeatureSelection(8, spatial_dims=dims, num_logits=3, dropout=0.1)
    x = torch.randn(2, 8, *(6, 5, 4)[:dims], requires_grad=True)
    y = block.eval()(x)
    torch.testing.assert_close(y, medcl.uncertainty_reweight(x, block.logits(x)))
    u = block.uncertainty(x)
    assert u.shape == (2, *x.shape[2:]) and 0 <= u.min() <= u.max() <= 1
    torch.testing.assert_close(y, x * (2 - u.unsqueeze(1)))
    y.sum().backward()
    for parameter in block.parameters():
        assert parameter.grad.isfinite().all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Conv2d(6, 9, 3, padding=1)
        self.custom = Doubled()
        self.stages = nn.ModuleList([nn.Conv2d(9, 2, 1)])

    def forward(self, x):
        return self.stages[0](self.custom(self.body(self.stem(x))))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_insert_keeps_names_and_weights_and_adds_blocks():
    torch.manual_seed(0)
    plain = Net()
    before = plain.state_dict()
    model = medcl.insert_uafs(copy.deepcopy(plain), {"stem": 6, "body": 9, "custom": 9})
    after = model.state_dict()
    assert before.keys() <= after.keys()
    assert all(".uafs." in name for name in after.keys() - before.keys())
    assert not model.load_state_dict(before, strict=False).unexpected_keys
    blocks = [model.stem.uafs, model.body.uafs, model.custom.uafs]
    assert [block.logits[0].in_channels for block in blocks] == [6, 9, 9]
    x = torch.randn(2, 1, 8, 8)
    plain.eval(), model.eval()
    h = blocks[0](plain.stem(x))
    h = blocks[1](plain.body(h))
    h = blocks[2](plain.custom(h))
    torch.testing.assert_close(model(x), plain.stages[0](h))
    # a copy, such as a teacher, has and uses its own blocks
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert not torch.equal(twin(x), model(x))
    torch.testing.assert_close(twin(x), plain.stages[0](h))
    assert all(p.requires_grad for p in model.body.uafs.parameters())


def test_insert_finds_channels_and_axes_by_itself():
    model = medcl.insert_uafs(Net(), ["stem", "body", "stages.0"], num_logits=4)
    assert model.stem.uafs.logits[0].in_channels == 6
    assert model.body.uafs.logits[-1].out_channels == 4
    volume = medcl.insert_uafs(nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU()), ["0"])
    assert isinstance(volume[0].uafs.logits[0], nn.Conv3d)
    assert volume(torch.randn(1, 1, 5, 5, 5)).shape == (1, 8, 3, 3, 3)
    model.eval()
    assert not medcl.insert_uafs(nn.Sequential(nn.Conv2d(1, 4, 1)).eval(), ["0"])[0].uafs.training


REFUSED = [
    (lambda: medcl.insert_uafs(Net(), ["head"]), ["'head'", "stem"]),
    (lambda: medcl.insert_uafs(Net(), ["custom"]), ["'custom'", "channels"]),
    (lambda: medcl.insert_uafs(Net(), ["stages"]), ["'stages'", "ModuleList"]),
    (lambda: medcl.insert_uafs(medcl.insert_uafs(Net(), ["body"]), ["body"]), ["already"]),
    (lambda: medcl.UncertaintyFeatureSelection(8, num_logits=1), ["num_logits", "at least 2"]),
    (lambda: medcl.UncertaintyFeatureSelection(8, kernel_size=2), ["kernel_size", "odd"]),
    (lambda: medcl.UncertaintyFeatureSelection(8, spatial_dims=1), ["spatial_dims"]),
    (lambda: medcl.UncertaintyFeatureSelection(0), ["channels", "at least 1"]),
    (
        lambda: medcl.uncertainty_reweight(torch.randn(2, 3, 4), torch.randn(2, 1, 4)),
        ["two channels", "got 1"],
    ),
    (
        lambda: medcl.uncertainty_reweight(torch.randn(2, 3, 4), torch.randn(2, 2, 5)),
        ["(2, 'M', 4)", "(2, 2, 5)"],
    ),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_logits_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"logits\.to\(features\.dtype\)"):
        medcl.uncertainty_reweight(torch.randn(2, 3, 4), torch.randn(2, 2, 4).double())


def test_the_block_runs_under_autocast():
    block = medcl.UncertaintyFeatureSelection(8)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    y.float().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
