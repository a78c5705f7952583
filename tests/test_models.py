"""U-Net parts, the twin segmenter, and the query and key branches of pre-training."""

import pytest
import torch

import medcl_kernels as mk
from medcl_train.models import (
    DECODERS,
    Projector,
    QueryKeyPair,
    UNetEncoder,
    build_segmenter,
    pooled_head,
)

WIDTHS, DROPOUT = (4, 8, 12), (0.0, 0.0, 0.0)


@pytest.mark.parametrize("dims", [2, 3])
def test_encoder_gives_one_map_per_level_with_its_stride(dims):
    encoder = UNetEncoder(1, WIDTHS, DROPOUT, spatial_dims=dims)
    maps = encoder(torch.randn(2, 1, *(16,) * dims))
    assert encoder.strides == (1, 2, 4)
    for features, width, stride in zip(maps, WIDTHS, encoder.strides, strict=True):
        assert features.shape == (2, width, *(16 // stride,) * dims)


def test_taps_stop_at_the_asked_level():
    encoder = UNetEncoder(1, WIDTHS, DROPOUT).eval()
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(encoder(image, 1)[-1], encoder(image)[1])
    assert len(encoder(image, 1)) == 2


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("widths", [(4, 8, 12), (4, 6, 8, 12), (4, 8)], ids=len)
def test_decoders_return_logits_of_the_image_size_and_use_every_parameter(name, widths, dims):
    encoder = UNetEncoder(1, widths, (0.0,) * len(widths), spatial_dims=dims)
    image = torch.randn(1, 1, *(8, 16, 8)[:dims])  # one image: the smallest batch
    decoder = DECODERS[name](widths, 3, spatial_dims=dims)
    logits = decoder(encoder(image))
    assert logits.shape == (1, 3, *image.shape[2:])
    logits.square().sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_learns_the_place_of_a_square(name):
    torch.manual_seed(1)
    net = build_segmenter(2, widths=(6, 8, 12), dropout=(0.0,) * 3, decoders=(name,))
    image = 0.3 * torch.randn(4, 1, 16, 16)
    labels = torch.zeros(4, 16, 16, dtype=torch.int64)
    for i in range(4):
        labels[i, 2 * i : 2 * i + 8, 4:12] = 1
    image[:, 0] += labels
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(net(image)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (net(image)[0].argmax(1) == labels).float().mean()
    assert right > 0.97, f"{name}: {right:.3f}"


def test_deeplab_sees_the_whole_image_and_the_pyramid_every_level():
    """A change in one corner of the deepest map reaches the opposite corner only through
    DeepLab's image mean; zeroing any level's map changes the pyramid's logits."""
    widths = (4, 6, 8)
    deeplab = DECODERS["deeplab"](widths, 2).eval()
    maps = [torch.randn(1, w, 32 // 2**i, 32 // 2**i) for i, w in enumerate(widths)]
    far = [*maps[:2], maps[2].clone()]
    far[2][:, :, 0, 0] += 1
    assert not torch.equal(deeplab(maps)[..., -1, -1], deeplab(far)[..., -1, -1])
    fpn = DECODERS["fpn"](widths, 2).eval()
    for level in range(3):
        without = [m if i != level else torch.zeros_like(m) for i, m in enumerate(maps)]
        assert not torch.equal(fpn(maps), fpn(without))


def test_the_two_decoders_differ_in_architecture():
    first, second = (
        {name for name, _ in build_segmenter(3, widths=WIDTHS, dropout=DROPOUT).decoders[i]
         .named_parameters()} for i in (0, 1)
    )  # fmt: skip
    assert any("up" in name for name in first - second)
    assert any("project" in name for name in second - first)


def test_initial_weights_of_encoder_and_d1_do_not_depend_on_d2():
    options = {"widths": WIDTHS, "dropout": DROPOUT, "seed": 7}
    twin = build_segmenter(3, **options).state_dict()
    single = build_segmenter(3, decoders=("transposed",), **options).state_dict()
    assert set(single) < set(twin)
    for name, tensor in single.items():
        assert torch.equal(tensor, twin[name]), name
    other = build_segmenter(3, widths=WIDTHS, dropout=DROPOUT, seed=8).state_dict()
    assert not torch.equal(other["encoder.blocks.0.0.weight"], twin["encoder.blocks.0.0.weight"])


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    build_segmenter(3, widths=WIDTHS, dropout=DROPOUT, seed=7)
    assert torch.equal(before, torch.get_rng_state())


def test_one_heads_loss_gives_no_gradient_to_the_other_decoder():
    net = build_segmenter(3, widths=WIDTHS, dropout=DROPOUT)
    net(torch.randn(2, 1, 8, 8))[0].square().sum().backward()
    assert all(p.grad is None for p in net.decoders[1].parameters())
    assert all(p.grad is not None for p in net.decoders[0].parameters())
    assert net.encoder.blocks[0][0].weight.grad.abs().sum() > 0


def test_a_branch_of_its_own_has_its_own_dropout_and_image():
    net = build_segmenter(3, widths=WIDTHS, dropout=(0.5, 0.5, 0.5), decoders=("bilinear",) * 2)
    net.decoders[1].load_state_dict(net.decoders[0].state_dict())
    image = torch.randn(2, 1, 8, 8)
    shared, own = net(image), net(image, image)
    assert torch.equal(*shared)  # one pass, equal decoders
    assert not torch.equal(*own)
    net.decoders[1].load_state_dict(net.decoders[0].state_dict())  # BatchNorm's averages too
    net.eval()
    assert torch.equal(*net(image, image))
    first, second = net(image, image + 1)
    assert torch.equal(first, net(image)[0]) and not torch.equal(first, second)
    changed = net(image, None, lambda maps: [torch.zeros_like(m) for m in maps])
    assert torch.equal(changed[0], first) and not torch.equal(changed[1], first)


def test_heads_of_probabilities():
    net = build_segmenter(3, widths=WIDTHS, dropout=DROPOUT).eval()
    image = torch.randn(2, 1, 8, 8)
    d1, d2 = (torch.softmax(z, 1) for z in net(image))
    assert torch.equal(net.probabilities(image, "d1"), d1)
    assert torch.equal(net.probabilities(image, "d2"), d2)
    torch.testing.assert_close(net.probabilities(image, "mean"), (d1 + d2) / 2)
    with pytest.raises(ValueError, match="d1, d2|'d1', 'd2'"):
        net.probabilities(image, "d3")
    single = build_segmenter(3, widths=WIDTHS, dropout=DROPOUT, decoders=("transposed",))
    with pytest.raises(ValueError, match="'d2'"):
        single.probabilities(image, "d2")


def test_channels_last_gives_the_same_numbers():
    net = build_segmenter(3, widths=WIDTHS, dropout=DROPOUT).eval()
    image = torch.randn(2, 1, 16, 16)
    expected = net(image)
    net.to(memory_format=torch.channels_last)
    for got, want in zip(net(image), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_wrong_sizes_and_names_are_refused():
    with pytest.raises(ValueError, match="stride 16.*1, 2, 4"):
        UNetEncoder(1, WIDTHS, DROPOUT).level_of(16)
    with pytest.raises(ValueError, match="one dropout per level"):
        UNetEncoder(1, WIDTHS, (0.1,))
    with pytest.raises(ValueError, match="spatial_dims"):
        UNetEncoder(1, WIDTHS, DROPOUT, spatial_dims=1)
    with pytest.raises(ValueError, match="bilinear"):
        build_segmenter(3, widths=WIDTHS, dropout=DROPOUT, decoders=("nearest",))


def _pair(key):
    def encoder():
        return UNetEncoder(1, WIDTHS, DROPOUT)

    def head():
        return Projector([mk.DenseProjectionHead(8, 6), mk.DenseProjectionHead(12, 6)])

    return QueryKeyPair(encoder, head, strides=(2, 4), key=key)


def test_the_image_level_head_pools_before_its_layers():
    head = pooled_head(12, 6)
    maps = torch.randn(2, 12, 4, 4)
    assert [type(layer).__name__ for layer in head[2:]] == ["Linear", "ReLU", "Linear"]
    torch.testing.assert_close(head(maps), head(maps.mean((2, 3), keepdim=True)))
    projector = Projector([mk.DenseProjectionHead(12, 6)], head)
    assert torch.equal(projector([maps]).whole, head(maps))


def test_ema_key_follows_the_query_and_has_no_gradient():
    pair = _pair("ema")
    view = torch.randn(2, 1, 16, 16)
    start = pair.encoder_k.blocks[0][0].weight.clone()
    with torch.no_grad():
        pair.encoder_q.blocks[0][0].weight.add_(1.0)
    pair.update_key(0.75)
    torch.testing.assert_close(pair.encoder_k.blocks[0][0].weight, start + 0.25)
    (_, finer), (features, projection) = pair.key(view).levels
    assert features.shape == (2, 12, 4, 4) and projection.shape == (2, 6, 4, 4)
    assert finer.shape == (2, 6, 8, 8) and pair.key(view).whole is None
    assert not projection.requires_grad
    assert pair.query(view).levels[1][1].requires_grad
    trained = {id(p) for p in pair.trained_parameters()}
    assert trained.isdisjoint(id(p) for p in pair.encoder_k.parameters())


def test_batchnorm_statistics_of_the_ema_key_are_its_own():
    pair = _pair("ema")
    pair.query(torch.randn(4, 1, 16, 16) + 5)
    pair.update_key(0.0)
    mean_q, mean_k = (e.blocks[0][1].running_mean for e in (pair.encoder_q, pair.encoder_k))
    assert mean_q.abs().sum() > 0 and mean_k.abs().sum() == 0


def test_siamese_and_two_branches_train_both_views():
    view = torch.randn(2, 1, 16, 16)
    siamese = _pair("siamese")
    assert siamese.encoder_k is siamese.encoder_q
    assert siamese.key(view).levels[0][1].requires_grad
    assert len(siamese.trained_parameters()) == len({id(p) for p in siamese.trained_parameters()})
    two = _pair("two")
    assert two.encoder_k is not two.encoder_q
    two.key(view).levels[1][1].sum().backward()
    assert two.encoder_k.blocks[0][0].weight.grad is not None
    assert two.encoder_q.blocks[0][0].weight.grad is None
    with pytest.raises(ValueError, match="ema"):
        _pair("momentum")
