"""Image-wise and pixel-wise contrast of GCL, with the Gradient Filter."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from train_tiny_gcl import BASE, EXAMPLE, H

import medcl_kernels as mk
from medcl_train.data.augment import NONE, random_geometry
from medcl_train.engine.seeding import generator
from medcl_train.gcl import (
    BatchLabels,
    EmbeddingQueue,
    ImageContrast,
    PixelContrast,
    PixelPairs,
)
from medcl_train.gcl.pixel_contrast import similarity_shares


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (2.229827, 4.106327)),
        ({"base_temperature": 0.07}, (3.185468, 5.866181)),
        ({"image_form": "in"}, (1.575675, None)),
        ({"image_form": "pixel"}, (1.686542, None)),
    ],
)
def test_the_worked_example_by_the_library_and_by_matrices(options, expected):
    contrast = ImageContrast(dataclasses.replace(BASE, **options))
    fused = contrast.losses(H, EXAMPLE)
    by_rows = [H.clone().requires_grad_() for _ in range(2)]
    explicit = contrast.losses(by_rows[0], EXAMPLE, _empty_queue())
    for a, b, value in zip(fused, explicit, expected, strict=True):
        assert float(a) == pytest.approx(float(b.detach()), abs=1e-12)
        assert value is None or float(a) == pytest.approx(value, abs=1e-6)
    torch.autograd.backward(explicit)
    torch.autograd.backward(contrast.losses(by_rows[1], EXAMPLE))
    torch.testing.assert_close(by_rows[0].grad, by_rows[1].grad)


def _empty_queue(size=3):
    return EmbeddingQueue(torch.nn.Linear(4, 4), size, 4, 0.5, ("a", "b"))


def test_gradients_of_image_pairs_by_the_worked_example():
    gradient = ImageContrast(BASE).pair_gradients(H, EXAMPLE)["a"]
    expected = [0.0, 0.461209, -0.824865, 0.000890, 0.042135, 0.320632]
    assert gradient[0].tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6, dtype=torch.float64))


def test_the_queue_holds_earlier_slices_of_an_averaged_network():
    queue = _empty_queue().double()
    source = torch.nn.Linear(4, 4).double()
    before = queue.embed.weight.clone()
    two = BatchLabels(
        {n: c[:2] for n, c in EXAMPLE.codes.items()}, EXAMPLE.positions[:2], torch.arange(2), None
    )
    queue.update(source, H[:2], two)
    torch.testing.assert_close(queue.embed.weight, (before + source.weight.detach()) / 2)
    rows, labels = queue.entries(None)
    torch.testing.assert_close(rows, F.normalize(queue.embed(H[:2]), dim=1))
    assert labels.codes["b"].tolist() == [0, 1]
    queue.update(source, H[2:4], two)
    newest, labels = queue.entries(None)
    assert len(newest) == 3 and labels.slices.tolist() == [0, 1, 0]  # the oldest is gone
    torch.testing.assert_close(newest[:2], F.normalize(queue.embed(H[2:4]), dim=1))
    # its entries are candidates, those with the label positives
    later = dataclasses.replace(EXAMPLE, slices=torch.arange(10, 16))
    s, positive, allowed = ImageContrast(BASE)._matrices(H, later, "b", queue, True)
    assert s.shape == (6, 9) and allowed[:, 6:].all() and not allowed[0, 0]
    assert positive[:, 6:].int().tolist() == [[1, 0, 1], [0, 1, 0]] * 3
    assert not any(p.requires_grad for p in queue.parameters())
    assert {"rows", "meta", "positions", "filled"} <= set(queue.state_dict())


# --- pixel branch

SELECTED_A = [(0, 2), (1, 2), (2, 0), (2, 3), (3, 2)]


def example_pixels(**options):
    options = {"positives": "label", "pixel_scope": "batch", "filter_by": "global"} | options
    contrast = PixelContrast(dataclasses.replace(BASE, keep=5 / 30, **options))
    geometry = random_geometry(6, (2, 2), NONE, generator(0, "x"))
    return contrast, contrast.pairs(H[:, :, None, None], EXAMPLE, geometry, 0)


@pytest.mark.parametrize("fused", [True, False])
def test_the_filter_selects_the_worked_pairs_and_masks_their_gradient(fused):
    contrast, pairs = example_pixels()
    assert contrast.fused
    contrast.fused = fused
    h = H[:, :, None, None].clone().requires_grad_()
    losses = contrast.losses(h, pairs, 5 / 30)
    assert [float(x.detach()) for x in losses] == pytest.approx([2.229827, 4.106327], abs=1e-6)
    losses[0].backward()
    d_h = [0.132307, -0.254666, -1.283278, -0.024870]
    assert h.grad[0].flatten().tolist() == pytest.approx(d_h, abs=1e-6)
    assert not h.grad[4:].any()
    chosen = contrast.selected(h, pairs, 5 / 30)[0]
    places = zip(chosen.anchor.tolist(), chosen.candidate.tolist(), strict=True)
    assert sorted(places) == SELECTED_A
    gradients = dict(zip(zip(*chosen[:2], strict=True), chosen.gradient, strict=True))
    assert max(abs(float(g)) for g in gradients.values()) == pytest.approx(1.210830, abs=1e-6)
    assert chosen.pairs == 30


def test_a_threshold_and_a_quantile_of_the_score():
    """|G| of the example times t / w = 0.6 is |p - 1/|P||: of 1.21, 1.05, 0.82 two exceed 1."""
    contrast, pairs = example_pixels(filter_by="threshold", filter_threshold=0.6)
    chosen = contrast.selected(H[:, :, None, None], pairs, 0.1)[0]
    assert list(zip(chosen.anchor.tolist(), chosen.candidate.tolist(), strict=True)) == [
        (2, 3), (3, 2),
    ]  # fmt: skip
    contrast, pairs = example_pixels(filter_by="quantile")
    chosen = contrast.selected(H[:, :, None, None], pairs, 0.2)[0]  # one of five per image
    assert chosen.candidate.tolist() == [2, 2, 3, 2, 3, 3]


def pixel_problem(**options):
    """Random projections and features of 6 views of 2x2 pixels."""
    torch.manual_seed(1)
    z, maps = (torch.randn(6, 5, 2, 2, dtype=torch.float64) for _ in range(2))
    config = dataclasses.replace(BASE, keep=0.3, **options)
    contrast = PixelContrast(config)
    geometry = random_geometry(6, (8, 8), config.view_augmentation, generator(0, "x"))
    weights = {name: torch.rand(6, 6, dtype=torch.float64) for name in "ab"}
    return contrast, z, maps, contrast.pairs(maps, EXAMPLE, geometry, 0, weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"filter_by": "global", "pixel_form": "in"},
        {"filter_by": "anchor", "pixel_form": "pixel"},
        {"score": "pix_rep", "symmetric": False},
        {"quota": (0.5, 0.2), "use": "recompute"},
        {"quota": (0.5, 0.2), "use": "recompute", "pixel_form": "in"},
        {"use": "pos_full_den"},
        {"use": "pos_full_den", "pixel_form": "in", "match_top": 2},
        {"positives": "aligned", "use": "renorm", "pairs_per_image": 2},
        {"pos_sign": "attract_only", "match_top": 2, "use": "renorm"},
        {"positives": "label", "pixel_scope": "batch"},
        {
            "positives": "label",
            "pixel_scope": "batch",
            "use": "renorm",
            "direction": "undirected",
            "filter_by": "global",
            "pos_sign": "attract_only",
        },
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_matrices_and_the_library_agree(options):
    contrast, z, _, pairs = pixel_problem(**options)
    assert contrast.fused
    keep = contrast.config.keep_at(0)
    found = []
    for fused in (True, False):
        contrast.fused = fused
        leaf = z.clone().requires_grad_()
        losses = torch.stack(contrast.losses(leaf, pairs, keep))
        losses.sum().backward()
        chosen = contrast.selected(z, pairs, keep)
        found.append((losses.detach(), leaf.grad, chosen))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    for a, b in zip(found[0][2], found[1][2], strict=True):
        # one direction each of a pair of images may name the same pair of pixels twice
        places = [list(zip(*map(torch.Tensor.tolist, one[:2]), strict=True)) for one in (a, b)]
        if contrast.config.direction == "undirected":  # matrices list both directions
            places[1] = [(i, j) for i, j in places[1] if i < j]
        assert sorted(places[0]) == sorted(places[1])
        torch.testing.assert_close(a.gradient.sum(), b.gradient.sum())


def test_undirected_pairs_are_ranked_by_the_sum_of_both_directions():
    contrast, pairs = example_pixels(direction="undirected")
    h = H[:, :, None, None]
    for contrast.fused in (True, False):
        chosen = contrast.selected(h, pairs, 5 / 15)[0]
        places = set(zip(chosen.anchor.tolist(), chosen.candidate.tolist(), strict=True))
        assert {(2, 3), (0, 2), (1, 2), (3, 5), (0, 1)} <= places
        assert contrast.fused or len(places) == 10  # both directions
    # two images: pixel p of one and q of the other have a gradient from either side
    contrast, z, _, pairs = pixel_problem(direction="undirected")
    x, y, positives = (torch.stack([v[0], v[6]]) for v in (pairs[0].x, pairs[0].y,
                                                          pairs[0].positives))  # fmt: skip
    every = mk.select_pairs(z[x], z[y], positives=positives, keep=1.0)
    table = torch.zeros(2, 4, 4, dtype=torch.float64)
    table[every.anchor // 4, every.anchor % 4, every.candidate % 4] = every.gradient
    total = (table[0] + table[1].T).abs()
    alone = dataclasses.replace(pairs[0], x=x, y=y, positives=positives)
    chosen = contrast.selected(z, [alone], 0.25)[0]
    first = chosen.anchor // 4 == x[0]
    places = (chosen.anchor[first] % 4) * 4 + chosen.candidate[first] % 4
    assert set(places.tolist()) == set(total.flatten().topk(4).indices.tolist())
    assert len(chosen.anchor) == 8 and float(chosen.gradient.abs().max()) <= float(total.max())


def test_positives_follow_their_rule():
    _, _, maps, pairs = pixel_problem()
    for one in pairs:
        cosine = torch.einsum(
            "pcn,pcm->pnm",
            *(F.normalize(maps[v].flatten(2), dim=1) for v in (one.x, one.y)),
        )
        assert torch.equal(one.positives.flatten(1), cosine.argmax(2))
        assert len(one.x) == 12 and torch.equal(one.x[:6], one.y[6:])  # both directions
    _, _, _, top = pixel_problem(match_top=3)
    for one, three in zip(pairs, top, strict=True):
        assert (three.positives == one.positives).any(3).all() and three.positives.shape[3] == 3
    contrast, _, _, same = pixel_problem(positives="aligned")
    still = random_geometry(6, (8, 8), NONE, generator(0, "x"))
    where = contrast.pairs(maps, EXAMPLE, still, 0)[0].positives
    assert where.flatten(1).tolist() == [[0, 1, 2, 3]] * 12
    assert (same[0].positives == -1).any()  # cropped away in the other view
    _, _, _, cam = pixel_problem(positives="cam", match_top=2)
    assert cam[0].positives.dtype == torch.bool
    assert cam[0].positives.flatten(1).sum(1).tolist() == [8] * 12
    shares = similarity_shares(maps[cam[0].x], maps[cam[0].y]).abs()
    assert (
        shares[cam[0].positives].view(12, 8).amin(1)
        >= shares[~cam[0].positives].view(12, 8).amax(1)
    ).all()


def test_shares_add_up_to_the_similarity_of_the_pooled_maps():
    x, y = torch.randn(2, 3, 5, 2, 4, dtype=torch.float64).unbind(0)
    pooled = F.cosine_similarity(x.mean((2, 3)), y.mean((2, 3)))
    torch.testing.assert_close(similarity_shares(x, y).sum((1, 2)), pooled)


def test_scores_of_the_image_branch_rank_the_pairs():
    contrast, z, _, pairs = pixel_problem(score="img_cam", symmetric=False)
    chosen = contrast.selected(z, pairs, 0.25)[0]
    share = pairs[0].shares
    for b in range(6):
        mine = chosen.anchor // 4 == b
        places = (chosen.anchor[mine] % 4) * 4 + chosen.candidate[mine] % 4
        assert set(places.tolist()) == set(share[b].flatten().topk(4).indices.tolist())
    # product: as pix_sim within a pair of images; over all pairs the heavier images win
    plain = pixel_problem(symmetric=False)
    a = plain[0].selected(z, plain[3], 0.3)[0]
    contrast, _, _, weighted = pixel_problem(score="product", symmetric=False)
    b = contrast.selected(z, weighted, 0.3)[0]
    assert a.anchor.tolist() == b.anchor.tolist() and a.candidate.tolist() == b.candidate.tolist()
    contrast, _, _, weighted = pixel_problem(score="product", symmetric=False, filter_by="global")
    weights = torch.full((6,), 1e-6, dtype=torch.float64)
    weights[2] = 1
    heavy = [dataclasses.replace(one, image_gradient=weights) for one in weighted]
    assert (contrast.selected(z, heavy, 0.1)[0].anchor // 4 == 2).all()


def test_candidates_of_the_whole_batch_leave_out_the_pixel_itself():
    contrast, z, _, pairs = pixel_problem(pixel_scope="batch")
    (loss, _) = contrast.losses(z, pairs, 1.0)
    rows = F.normalize(z.flatten(2).transpose(1, 2).reshape(24, 5), dim=1)
    s = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    target = (pairs[0].positives.flatten(1) + pairs[0].y[:, None] * 4).flatten()
    torch.testing.assert_close(loss, F.cross_entropy(s, target))


def test_keep_moves_from_its_first_to_its_last_value():
    config = dataclasses.replace(BASE, pretrain_iterations=11, keep=0.1, keep_start=0.5)
    assert [config.keep_at(i) for i in (0, 10)] == [0.1, 0.1]
    linear = dataclasses.replace(config, keep_schedule="linear")
    assert [linear.keep_at(i) for i in (0, 5, 10)] == pytest.approx([0.5, 0.3, 0.1])
    cosine = dataclasses.replace(config, keep_schedule="cosine")
    assert [cosine.keep_at(i) for i in (0, 5, 10)] == pytest.approx([0.5, 0.3, 0.1])
    assert cosine.keep_at(2) > linear.keep_at(2)
    warm = dataclasses.replace(config, pixel_warmup=0.5)
    assert [warm.uses_pixels(i) for i in (0, 5, 6)] == [False, False, True]


@pytest.mark.parametrize("fused", [True, False])
def test_an_image_pair_without_positives_teaches_nothing(fused):
    """Aligned views that show nothing in common."""
    contrast, z, _, pairs = pixel_problem(positives="aligned")
    contrast.fused = fused
    apart = dataclasses.replace(pairs[0], positives=torch.full_like(pairs[0].positives, -1))
    leaf = z.clone().requires_grad_()
    (loss,) = contrast.losses(leaf, [apart], 0.3)
    loss.backward()
    assert float(loss.detach()) == 0 and not leaf.grad.any()
    assert len(contrast.selected(z, [apart], 0.3)[0].anchor) == 0


def test_pairs_are_described_by_numbers_of_views():
    one = pixel_problem()[3][0]
    assert isinstance(one, PixelPairs) and one.name == "a" and one.shares is None
