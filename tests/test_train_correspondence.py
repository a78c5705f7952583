"""Positives of dense contrast: every matching rule, mutual matches, subsets, several positives."""

import dataclasses

import pytest
import torch

import medcl_kernels as mk
from medcl_train.data.augment import Augmentation, ViewGeometry, random_geometry, warp
from medcl_train.engine.seeding import generator
from medcl_train.ideal import (
    IdealConfig,
    ViewContrast,
    find_positives,
    match_views,
    mutual_only,
    subset_queries,
)
from medcl_train.ideal.correspondence import cells_within, nearest_cell
from medcl_train.models import Embedding

# The worked example of the IDEAL specification: 4 pixels of a 2x2 grid, 3 channels.
Q = [[1, 0, 1], [0, 2, 1], [-1, 1, 0], [2, 1, 0]]
K = [[0, 1, 1], [1, 0, 2], [2, 0, -1], [-1, 2, 0]]
FQ = [[2, 0, 1], [0, 1, 1], [1, 2, 0], [1, 0, -1]]
FK = [[1, 1, 2], [2, 0, 1], [1, 3, 1], [0, 3, -1]]
IDENTITY = ViewGeometry(torch.eye(3, dtype=torch.float64)[:2][None])


def _map(rows):
    return torch.tensor(rows, dtype=torch.float64).t().reshape(1, -1, 2, 2)


QUERY, KEY = (_map(FQ), _map(Q)), (_map(FK), _map(K))


@pytest.mark.parametrize(
    ("match", "expected"),
    [("backbone", [1, 0, 2, 1]), ("proj", [1, 0, 3, 2]), ("identity", [0, 1, 2, 3])],
)
def test_matches_of_the_worked_example(match, expected):
    assert find_positives(match, QUERY, KEY).flatten().tolist() == expected


def test_mutual_matches_of_the_worked_example():
    forth, back = find_positives("backbone", QUERY, KEY), find_positives("backbone", KEY, QUERY)
    assert back.flatten().tolist() == [1, 0, 2, 2]
    assert mutual_only(forth, back).flatten().tolist() == [1, 0, 2, -1]
    config = IdealConfig(match="backbone", mutual=True)
    got = match_views(config, QUERY, KEY, IDENTITY, IDENTITY, generator(0, "n"))
    assert got.flatten().tolist() == [1, 0, 2, -1]


@pytest.mark.parametrize(("form", "expected"), [("in", 0.019897), ("out", 2.310243)])
def test_radius_positives_reproduce_the_worked_multi_positive_losses(form, expected):
    """Radius 1 on the 2x2 grid: the own cell and its two neighbours, not the diagonal one."""
    places = IDENTITY.places(IDENTITY, (2, 2), (2, 2))
    positives = find_positives("radius", QUERY, KEY, places, radius=1.0)
    chosen = [sorted(i for i in cell if i >= 0) for cell in positives.view(4, -1).tolist()]
    assert chosen == [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
    loss = mk.info_nce(QUERY[1], KEY[1], positives, temperature=0.2, multi_positive=form)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2.699863),
        ({"match": "identity", "crop": (1.0, 1.0)}, 4.446571),
        ({"symmetric": True}, 2.349921),
        ({"negatives": "queue"}, 1.533542),
        ({"negatives": "image+queue"}, 3.004753),
        ({"intra": True}, 2.932590),
        ({"learn_temperature": True}, 2.699863),
        ({"contrast": "hinge"}, 0.671163),
    ],
)
def test_settings_reach_the_loss_of_the_worked_example(options, expected):
    config = IdealConfig(temperature=0.2, queue_size=2, projection_dim=3, **options)
    positives = match_views(config, QUERY, KEY, IDENTITY, IDENTITY, generator(0, "n"))
    contrast = ViewContrast(config).double()
    for queue in contrast.queues:
        queue.enqueue(torch.tensor([[1, 1, 1], [0, -1, 1]], dtype=torch.float64))
    values = contrast(Embedding([QUERY], None), Embedding([KEY], None), [positives], 0)
    assert float(values["loss"].detach()) == pytest.approx(expected, abs=1e-6)


def test_several_levels_are_averaged_with_a_queue_each():
    options = {"temperature": 0.2, "projection_dim": 3, "queue_size": 8}
    config = IdealConfig(feat_stride=(16, 8), negatives="image+queue", **options)
    assert config.strides == (8, 16)
    contrast = ViewContrast(config).double()
    maps = [torch.randn(2, 2, 3, size, size, dtype=torch.float64) for size in (4, 2)]
    query, key = (Embedding([(m[i], m[i]) for m in maps], None) for i in range(2))
    for _ in range(2):  # the second time with the keys of the first
        expected = torch.stack(
            [
                mk.info_nce(q, k, temperature=0.2, queue=queue.negatives())
                for (_, q), (_, k), queue in zip(
                    query.levels, key.levels, contrast.queues, strict=True
                )
            ]
        ).mean()
        got = contrast(query, key, [None, None], 0)
        torch.testing.assert_close(got["loss"], expected)
        assert set(got) == {"loss"}
        contrast.enqueue(key)
    assert [len(queue) for queue in contrast.queues] == [4, 4]


@pytest.mark.parametrize("negatives", ["batch", "queue", "batch+queue"])
def test_the_image_level_term_and_its_schedule(negatives):
    """(1 - lambda) * InfoNCE between images + lambda * dense InfoNCE; lambda is 0 at first."""
    config = IdealConfig(
        temperature=0.2,
        projection_dim=3,
        queue_size=2,
        local_weight=0.3,
        local_warmup=5,
        global_negatives=negatives,
    )
    contrast = ViewContrast(config)
    whole = torch.randn(2, 4, 3)
    earlier = torch.randn(2, 3)
    if contrast.global_queue is not None:
        contrast.global_queue.enqueue(earlier)
    assert (contrast.global_queue is None) == (negatives == "batch")
    query, key = (
        Embedding([(z, z)], w) for z, w in zip(torch.randn(2, 4, 3, 2, 2), whole, strict=True)
    )
    local = mk.info_nce(query.levels[0][1], key.levels[0][1], temperature=0.2)
    unit = torch.nn.functional.normalize
    logits = unit(whole[0], dim=1) @ unit(torch.cat([whole[1], earlier]), dim=1).t() / 0.2
    allowed = torch.ones(4, 6, dtype=torch.bool)
    if negatives == "batch":
        allowed[:, 4:] = False
    elif negatives == "queue":
        allowed[:, :4] = torch.eye(4, dtype=torch.bool)
    logits = logits.masked_fill(~allowed, -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    for iteration, weight in ((0, 0.0), (4, 0.0), (5, 0.3), (99, 0.3)):
        got = contrast(query, key, [None], iteration)
        torch.testing.assert_close(got["loss_global"], expected)
        torch.testing.assert_close(got["loss_local"], local)
        torch.testing.assert_close(got["loss"], (1 - weight) * expected + weight * local)
        assert got["local_weight"] == weight


def test_symmetric_radius_has_several_positives_both_ways():
    config = IdealConfig(match="radius", symmetric=True, temperature=0.2, projection_dim=3)
    both = match_views(config, QUERY, KEY, IDENTITY, IDENTITY, generator(0, "n"))
    assert len(both) == 2 and all((p >= 0).sum() == 12 for p in both)
    loss = ViewContrast(config)(Embedding([QUERY], None), Embedding([KEY], None), [both], 0)
    one_way = [
        float(mk.info_nce(a[1], b[1], p, temperature=0.2))
        for a, b, p in ((QUERY, KEY, both[0]), (KEY, QUERY, both[1]))
    ]
    assert one_way[0] == pytest.approx(2.310243, abs=1e-6)
    assert float(loss["loss"]) == pytest.approx(sum(one_way) / 2)


def test_a_learnt_temperature_moves_and_stays_positive():
    config = IdealConfig(learn_temperature=True, temperature=0.2, projection_dim=3)
    contrast = ViewContrast(config).double()
    (parameter,) = contrast.parameters()
    positives = torch.tensor([[[1, 0], [2, 1]]])
    contrast(Embedding([QUERY], None), Embedding([KEY], None), [positives], 0)["loss"].backward()
    # d loss / d log(t) = t * d loss / dt
    assert float(parameter.grad) == pytest.approx(0.2 * -10.674305, abs=1e-6)


def test_geometric_matches_show_the_same_place():
    """Feature maps that hold the slice's coordinates: matched cells must agree to half a key
    cell."""
    settings = Augmentation(
        flip_x=0.5, flip_y=0.5, rotate=30, scale=0.0, shift=0.0, gamma=0, brightness=0,
        contrast=0, blur=0, noise=0, crop=(0.5, 1.0),
    )  # fmt: skip
    geometry_q = random_geometry(16, (64, 64), settings, generator(0, "q"))
    geometry_k = random_geometry(16, (64, 64), settings, generator(0, "k"))
    places = geometry_q.places(geometry_k, (16, 16), (16, 16))
    dummy = torch.zeros(16, 1, 16, 16)
    positives = find_positives("geom", (dummy, dummy), (dummy, dummy), places).flatten(1)
    ramp = torch.linspace(-1 + 1 / 64, 1 - 1 / 64, 64, dtype=torch.float64)
    x, y = ramp.expand(16, 1, 64, 64), ramp.view(64, 1).expand(16, 1, 64, 64)
    cells, whole = [], []
    for geometry in (geometry_q, geometry_k):
        # the mean of 4x4 pixels of a linear ramp is its value at the cell's centre
        maps = [warp(c, None, geometry)[0] for c in (x, y)]
        pooled = [torch.nn.functional.avg_pool2d(m, 4).flatten(1) for m in maps]
        cells.append(torch.stack(pooled, -1))
        # cells that lie partly outside the slice read zeros instead of coordinates
        cover = torch.nn.functional.avg_pool2d(warp(torch.ones_like(x), None, geometry)[0], 4)
        whole.append(cover.flatten(1) > 1 - 1e-9)
    valid = positives >= 0
    assert 0.3 < valid.float().mean() < 0.95
    target = cells[1].gather(1, positives.clamp(min=0)[..., None].expand(-1, -1, 2))
    inner = valid & whole[0] & whole[1].gather(1, positives.clamp(min=0))
    apart = (cells[0] - target).norm(dim=-1)[inner]
    assert inner.sum() > 500
    assert apart.max() <= 0.5 * 2**0.5 * 2 / 16 + 1e-6  # half the diagonal of a cell, zoom <= 1


def test_identity_views_match_themselves_and_a_flip_mirrors():
    dummy = torch.zeros(1, 1, 3, 4)
    places = IDENTITY.places(IDENTITY, (3, 4), (3, 4))
    got = find_positives("geom", (dummy, dummy), (dummy, dummy), places)
    assert got.flatten().tolist() == list(range(12))
    flip = ViewGeometry(torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]], dtype=torch.float64))
    places = IDENTITY.places(flip, (3, 4), (3, 4))
    got = find_positives("geom", (dummy, dummy), (dummy, dummy), places)
    assert got[0].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]


def test_places_outside_are_no_anchors():
    places = torch.tensor([[[[-0.6, 0.0], [0.0, 1.49], [0.0, 1.51], [float("nan"), 0.0]]]])
    assert nearest_cell(places, (2, 2)).flatten().tolist() == [-1, 1, -1, -1]
    assert (cells_within(places[..., 3:, :], (2, 2), 1.0) == -1).all()


def test_radius_finds_exactly_the_cells_within_it():
    places = torch.rand(2, 5, 6, 2, dtype=torch.float64) * torch.tensor([7.0, 8.0])
    found = cells_within(places, (7, 8), 1.7).view(2, 30, -1)
    grid = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(8), indexing="ij"), -1).view(
        -1, 2
    )
    for b in range(2):
        for place, cells in zip(places[b].view(-1, 2), found[b], strict=True):
            expected = ((grid - place).norm(dim=-1) <= 1.7).nonzero().flatten().tolist()
            assert sorted(c for c in cells.tolist() if c >= 0) == expected


def test_subset_keeps_the_asked_number_of_valid_anchors():
    positives = torch.arange(36).view(1, 6, 6).repeat(3, 1, 1)
    positives[1, :5] = -1  # only 6 valid in image 1
    chosen = subset_queries(positives, 10, generator(0, "s"))
    kept = (chosen >= 0).flatten(1)
    assert kept.sum(1).tolist() == [10, 6, 10]
    assert torch.equal(chosen[chosen >= 0], positives[chosen >= 0])
    other = subset_queries(positives, 10, generator(1, "s"))
    assert not torch.equal(chosen, other)
    several = positives[..., None].expand(-1, -1, -1, 3)
    assert (subset_queries(several, 4, generator(0, "s")) >= 0).any(-1).flatten(1).sum(
        1
    ).tolist() == [4] * 3


def test_unknown_rules_and_missing_geometry_are_refused():
    with pytest.raises(ValueError, match="backbone, proj, identity"):
        find_positives("nearest", QUERY, KEY)
    with pytest.raises(ValueError, match="geometry"):
        find_positives("geom", QUERY, KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"match": "identity"},
        {"match": "radius", "mutual": True},
        {"negatives": "queue", "intra": True},
        {"projection_norm": True},
        {"contrast": "hinge", "learn_temperature": True},
        {"feat_stride": ()},
        {"margin": 1.5},
        {"local_weight": -0.1},
        {"feature_dropout": 2.0},
        {"queue_size": 0},
        {"radius": 0.0},
        {"crop": (0.9, 0.5)},
        {"view_flip": (0.5, 2.0)},
        {"temperature": 0.0},
        {"labeled_batch_size": 24},
        {"momentum": 1.5},
        {"widths": (4, 8)},
        {"threshold": 2.0},
    ],
)
def test_contradicting_settings_are_refused(changes):
    with pytest.raises(ValueError):
        dataclasses.replace(IdealConfig(), **changes)
