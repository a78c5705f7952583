"""The 3-D U-Net of PDCR: levels, heads, receptive fields, UAFS blocks, deep supervision."""

import pytest
import torch
from torch.nn import functional as F

import medcl_kernels as mk
from medcl_train.models import UNet3d, build_unet3d, deep_supervision_loss

WIDTHS = (4, 8, 12, 16)
THICK = {"strides": ((1, 2, 2), (1, 2, 2), 2), "kernels": ((1, 3, 3), (1, 3, 3), 3, 3)}


def named(net):
    """Outputs of all named blocks in a forward pass."""
    kept = {}
    for name, module in net.named_modules():
        if "blocks." in name and name.count(".") == 2:
            module.register_forward_hook(lambda m, i, o, name=name: kept.update({name: o}))
    return kept


def test_blocks_heads_and_their_grids():
    net = build_unet3d(3, widths=WIDTHS)
    kept = named(net)
    outputs = net(torch.randn(2, 1, 16, 24, 8))
    assert [tuple(o.shape) for o in outputs] == [(2, 3, 16, 24, 8), (2, 3, 8, 12, 4)]
    for level, width in enumerate(WIDTHS):
        step = 2**level
        shape = (2, width, 16 // step, 24 // step, 8 // step)
        assert kept[f"encoder.blocks.{level}"].shape == shape
    for stage, width in enumerate(WIDTHS[-2::-1]):  # the deepest first
        step = 2 ** (2 - stage)
        assert kept[f"decoder.blocks.{stage}"].shape == (
            2,
            width,
            16 // step,
            24 // step,
            8 // step,
        )
    assert list(net.decoder.heads) == ["1", "2"] and net.stride == (8, 8, 8)
    net.eval()
    image = torch.randn(1, 1, 16, 8, 8)
    (finest,) = net(image)
    torch.testing.assert_close(net.probabilities(image), finest.softmax(1))
    with pytest.raises(ValueError, match="d2"):
        net.probabilities(image, "d2")


def test_thick_slices_are_halved_later():
    net = build_unet3d(2, widths=WIDTHS, deep_supervision=False, **THICK)
    kept = named(net)
    (logits,) = net(torch.randn(1, 1, 4, 16, 16))
    assert net.stride == (2, 8, 8) and logits.shape == (1, 2, 4, 16, 16)
    assert kept["encoder.blocks.2"].shape[2:] == (4, 4, 4)
    assert kept["encoder.blocks.3"].shape[2:] == (2, 2, 2)


def test_receptive_fields_are_those_of_the_paper():
    """specs/pdcr.md §1.4: nnU-Net's skip 2 has 23 at step 4, (5, 23, 23) where slices are thick."""
    layers = ["encoder.blocks.1", "encoder.blocks.2"]
    fields = mk.receptive_fields(build_unet3d(2, widths=WIDTHS[:3]), layers, (1, 1, 56, 56, 56))
    found = [(f.size, f.stride, f.offset) for f in fields.values()]
    assert found == [((11,) * 3, (2,) * 3, (0.0,) * 3), ((23,) * 3, (4,) * 3, (0.0,) * 3)]
    net = build_unet3d(2, widths=WIDTHS, **THICK)
    (field,) = mk.receptive_fields(net, layers[1:], (1, 1, 18, 64, 64)).values()
    assert field.size == (5, 23, 23) and field.stride == (1, 4, 4)


def test_uafs_stands_between_a_decoder_stage_and_its_head():
    """specs/pdcr.md §2: one block per decoder stage, its weights counted by the formula there."""
    plain = build_unet3d(3, widths=(8, 16, 32), seed=3)
    net = build_unet3d(3, widths=(8, 16, 32), seed=3)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name
    before = sum(p.numel() for p in net.parameters())
    mk.insert_uafs(net, ["decoder.blocks.0", "decoder.blocks.1"])
    added = sum(p.numel() for p in net.parameters()) - before
    assert added == sum(27 * c * (c // 4) + c // 4 + 2 * (c // 4) * 2 + 2 for c in (16, 8))
    kept = named(net)
    stage, inner = net.decoder.blocks[1], []
    stage[6].register_forward_hook(lambda m, i, o: inner.append(o.clone()))
    (logits,) = net.eval()(torch.randn(1, 1, 8, 8, 8))
    selected = kept["decoder.blocks.1"]
    weight = 2 - stage.uafs.uncertainty(inner[0])[:, None]
    torch.testing.assert_close(selected, inner[0] * weight)
    torch.testing.assert_close(logits, net.decoder.heads["1"](selected))


def test_every_parameter_learns():
    net = build_unet3d(3, widths=WIDTHS, dropout=(0.1,) * 4)
    mk.insert_uafs(net, [f"decoder.blocks.{i}" for i in range(3)])
    labels = torch.randint(0, 3, (2, 16, 16, 16))
    deep_supervision_loss(net(torch.randn(2, 1, 16, 16, 16)), labels, F.cross_entropy).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        # a bias before a normalisation moves nothing
        if not name.endswith(".bias"):
            assert parameter.grad.abs().sum() > 0, name


def test_a_cube_is_learnt():
    torch.manual_seed(0)
    net = build_unet3d(2, widths=(6, 10), seed=1)
    labels = torch.zeros(2, 12, 12, 12, dtype=torch.int64)
    labels[0, 2:8, 3:9, 1:7] = labels[1, 5:11, 4:10, 6:12] = 1
    image = labels[:, None] + 0.4 * torch.randn(2, 1, 12, 12, 12)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(30):
        loss = deep_supervision_loss(net(image), labels, F.cross_entropy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = net.probabilities(image).argmax(1)
    overlap = 2 * (found * labels).sum() / (found.sum() + labels.sum())
    assert overlap > 0.97, float(overlap)


def test_deep_supervision_weights_and_labels():
    """2**-s with the deepest (which has no head) left out, sum 1; a head sees every step-th
    label."""
    labels = torch.arange(2 * 8 * 8 * 8).view(2, 8, 8, 8)
    outputs = [torch.zeros(2, 3, *(8 // s,) * 3) for s in (1, 2, 4)]
    seen = []

    def loss(logits, own):
        seen.append(own)
        return torch.tensor(10.0 ** len(seen))

    value = deep_supervision_loss(outputs, labels, loss)
    assert value == pytest.approx((10 * 1 + 100 / 2 + 1000 / 4) / 1.75)
    for own, step in zip(seen, (1, 2, 4), strict=True):
        assert torch.equal(own, labels[:, ::step, ::step, ::step])
    seen.clear()
    assert deep_supervision_loss(outputs[:1], labels, loss) == 10
    seen.clear()
    thick = [outputs[0], torch.zeros(2, 3, 8, 4, 4)]
    assert deep_supervision_loss(thick, labels, loss, (0.25, 0.0)) == 2.5
    assert len(seen) == 1  # nothing is spent on a head without weight
    with pytest.raises(ValueError, match="one per head"):
        deep_supervision_loss(outputs, labels, loss, (1.0,))
    with pytest.raises(ValueError, match="multiples"):
        deep_supervision_loss([torch.zeros(2, 3, 3, 3, 3)], labels, loss)


def test_wrong_sizes_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="two levels"):
        UNet3d(1, 2, (4,))
    with pytest.raises(ValueError, match="one dropout per level"):
        UNet3d(1, 2, (4, 8), (0.1,))
    with pytest.raises(ValueError, match="strides must be one number or 1 entries"):
        UNet3d(1, 2, (4, 8), strides=(2, 2))
    with pytest.raises(ValueError, match=r"\(8, 8, 6\).*\(4, 4, 4\)"):
        UNet3d(1, 2, (4, 8, 8))(torch.randn(1, 1, 8, 8, 6))
    with pytest.raises(ValueError, match="single cell"):
        UNet3d(1, 2, (4, 8, 8))(torch.randn(1, 1, 4, 4, 4))


def test_seeds_decide_the_weights_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first, again, other = (build_unet3d(2, widths=(4, 8), seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [net.encoder.blocks[0][0].weight for net in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    deviation = float(build_unet3d(2, widths=(32, 32)).encoder.blocks[1][0].weight.detach().std())
    assert deviation == pytest.approx((2 / (1 + 0.01**2) / (32 * 27)) ** 0.5, rel=0.05)
