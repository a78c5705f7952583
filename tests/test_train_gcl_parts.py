"""Meta labels, batches, both contrasts of GCL and the Mitigator in the training step."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import medcl_kernels as mk
from medcl_train.data import Case
from medcl_train.data.augment import NONE, random_geometry
from medcl_train.engine.config import ConfigError, TrainConfig
from medcl_train.engine.seeding import generator
from medcl_train.gcl import (
    BatchLabels,
    Branch,
    EmbeddingQueue,
    GclConfig,
    GroupedBatches,
    ImageContrast,
    Mitigator,
    PixelContrast,
    PixelPairs,
    Selected,
    meta_labels,
)
from medcl_train.gcl.mitigation import consensus, pcgrad_by_cosine
from medcl_train.gcl.pixel_contrast import similarity_shares

# The worked example of the GCL specification: six pixels, four channels, two perspectives.
H = [[1, 0.5, 0, 0.2], [0.8, 0.9, 0.1, 0], [0.3, 0.4, 1, 0.1], [0, 0.2, 0.9, 0.7],
     [0.5, 0.1, 0.3, 1], [1, 0, 0.6, 0.4]]  # fmt: skip
H = torch.tensor(H, dtype=torch.float64)
EXAMPLE = BatchLabels(
    codes={"a": torch.tensor([0, 0, 0, 1, 1, 1]), "b": torch.tensor([0, 1, 0, 1, 0, 1])},
    positions=torch.arange(6.0),
    slices=torch.arange(6),
    threshold=None,
)
BASE = GclConfig(perspectives=("a", "b"))


def volume(case_id, subject, depth, **meta):
    case = Case(case_id, subject, None, meta=meta)
    return SimpleNamespace(case=case, image=np.zeros((depth, 4, 4)))


def pool(*volumes):
    return SimpleNamespace(volumes=list(volumes))


CINE = pool(
    volume("p1_ed", "p1", 4, phase="ED"),
    volume("p1_es", "p1", 4, phase="ES"),
    volume("p2_ed", "p2", 5, phase="ED"),
    volume("p2_x", "p2", 5, phase=""),
)


def test_meta_labels_come_from_the_cases():
    labels = meta_labels(CINE, ("slice", "patient", "phase"), threshold=None, parts=4)
    assert labels.codes["patient"].tolist() == [0] * 8 + [1] * 10
    assert labels.codes["phase"].tolist() == [0] * 4 + [1] * 4 + [0] * 5 + [-1] * 5
    # GLCL: parts of round(S / 4) slices, the last takes the rest
    assert labels.codes["slice"].tolist() == [0, 1, 2, 3] * 2 + [0, 1, 2, 3, 3] * 2
    assert labels.positions[:4].tolist() == [0.25, 0.5, 0.75, 1.0]
    brain = pool(
        *(volume(f"hippocampus_{n:03d}", f"s{(n + 1) // 2}", 2) for n in (1, 2, 7)),
        volume("other", "s9", 1),
    )
    side = meta_labels(brain, ("side",), threshold=None).codes["side"]
    assert side.tolist() == [1, 1, 0, 0, 1, 1, -1]
    group = pool(volume("a", "a", 1, group="DCM"), volume("b", "b", 1, group="HCM"))
    assert meta_labels(group, ("group",), threshold=None).codes["group"].tolist() == [0, 1]


def test_positions_are_positive_below_the_threshold_strictly():
    labels = meta_labels(CINE, ("slice",), threshold=0.25)
    assert labels.positives("slice", 0).tolist() == [4, 8, 9, 13, 14]  # not 0.25 and 0.5
    labels = meta_labels(CINE, ("slice",), threshold=0.26)
    assert labels.positives("slice", 0).tolist() == [1, 4, 5, 8, 9, 13, 14]


def test_a_missing_meta_label_leaves_only_the_other_view():
    labels = meta_labels(CINE, ("patient", "phase"), threshold=None)
    assert len(labels.positives("phase", 13)) == 0
    batch = labels.batch([0, 13, 14], torch.device("cpu"))
    assert batch.same("phase").int().tolist() == [
        [1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1],
    ] * 2  # fmt: skip
    assert -100 not in batch.codes["phase"]
    partners = batch.partners("phase", 0, 0)
    assert partners.tolist() == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(
    ("names", "threshold", "message"),
    [
        (("vendor",), None, "perspective vendor: no case.*slice, patient, one, phase"),
        (("one",), None, "perspective one: all training slices have the one label '7'"),
        (("slice",), 0.9, "no two training slices are 0.9"),
    ],
)
def test_perspectives_that_cannot_tell_slices_apart_are_refused(names, threshold, message):
    data = pool(volume("a", "a", 4, phase="ED", one=7), volume("b", "b", 4, phase="ES", one=7))
    with pytest.raises(ConfigError, match=message):
        meta_labels(data, names, threshold=threshold)


def test_every_anchor_of_a_batch_has_a_positive_of_every_perspective():
    labels = meta_labels(CINE, ("slice", "patient", "phase"), threshold=0.3)
    batches = GroupedBatches(labels, 8, seed=3)
    seen = set()
    for iteration in range(12):
        batch = batches.at(iteration)
        assert len(batch) == 8 == len(set(batch.tolist()))
        assert batch.tolist() == GroupedBatches(labels, 8, seed=3).at(iteration).tolist()
        for anchor in batch[::4]:
            seen.add(int(anchor))
            for name in labels.names:
                if len(labels.positives(name, anchor)):
                    assert set(labels.positives(name, anchor)) & set(batch.tolist()), name
    assert seen == set(range(18))  # anchors run through all slices


def test_partners_share_the_meta_label_and_are_another_slice():
    labels = meta_labels(CINE, ("slice", "patient"), threshold=0.3).batch(
        [0, 1, 4, 9, 17], torch.device("cpu")
    )
    found = {name: set() for name in labels.names}
    for name in labels.names:
        for iteration in range(20):
            partners = labels.partners(name, 1, iteration)
            assert labels.same(name)[torch.arange(10), partners].all()
            own = labels.slices == labels.slices[partners]
            alone = labels.same(name).sum(1) == 2
            assert torch.equal(own, alone) and (partners != torch.arange(10)).all()
            found[name].add(tuple(partners.tolist()))
    assert all(len(draws) > 10 for draws in found.values())


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
        {"positives": "aligned"},
        {"positives": "label", "pixel_scope": "batch"},
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
        assert sorted(zip(*map(torch.Tensor.tolist, a[:2]), strict=True)) == sorted(
            zip(*map(torch.Tensor.tolist, b[:2]), strict=True)
        )
        torch.testing.assert_close(a.gradient.abs().sum(), b.gradient.abs().sum())


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


# --- Gradient Mitigator


class Toy:
    """Encoder 3 -> 4, one head, three losses whose gradients conflict."""

    def __init__(self):
        torch.manual_seed(5)
        self.encoder = torch.nn.Linear(3, 4, dtype=torch.float64)
        self.head = torch.nn.Linear(4, 2, dtype=torch.float64)
        self.x = torch.randn(7, 3, dtype=torch.float64)
        self.targets = torch.randn(3, 7, 2, dtype=torch.float64)

    def branch(self, weight=2.0, pairs=None):
        features = self.head(self.encoder(self.x).tanh())
        return Branch("image", weight, features, self.losses, pairs)

    def losses(self, z):
        return [(z * target).sum() for target in self.targets]

    def parameters(self):
        return [*self.encoder.parameters()], [*self.head.parameters()]

    def gradients(self, mitigator, **options):
        config = dataclasses.replace(
            BASE, perspectives=("a", "b", "c"), mitigator=mitigator, mitigate_order="fixed",
            **options,
        )  # fmt: skip
        branch = self.branch()
        loss, logged = Mitigator(config)([branch], *self.parameters(), 0)
        flat = torch.autograd.grad(loss, [p for part in self.parameters() for p in part])
        return torch.cat([g.flatten() for g in flat]), float(loss.detach()), logged


def test_mitigation_at_parameters_is_the_librarys():
    toy = Toy()
    got, value, logged = toy.gradients("pcgrad_param")
    expected = mk.mitigate_parameters(
        toy.losses(toy.branch().features), *toy.parameters(), order="fixed"
    )
    reference = torch.cat([p.grad.flatten() for part in toy.parameters() for p in part])
    torch.testing.assert_close(got, 2.0 * reference)
    assert value == pytest.approx(2.0 * float(expected))
    assert float(logged["loss_image"]) == pytest.approx(float(expected))
    plain, _, _ = toy.gradients("mean")
    assert not torch.allclose(plain[:16], got[:16])  # there were conflicts
    torch.testing.assert_close(plain[16:], got[16:])  # heads take the mean
    whole = toy.gradients("pcgrad_param", mitigate_scope="all")[0]
    assert not torch.allclose(plain[16:], whole[16:])


@pytest.mark.parametrize(
    ("mitigator", "unit"), [("pcgrad_rep_row", "row"), ("pcgrad_rep_flat", "flat")]
)
def test_mitigation_at_representations_is_the_librarys(mitigator, unit):
    toy = Toy()
    got, value, logged = toy.gradients(mitigator)
    features = toy.branch().features
    combined = mk.mitigate_gradients(toy.targets, unit=unit, order="fixed")
    parameters = [p for part in toy.parameters() for p in part]
    expected = torch.autograd.grad(features, parameters, 2.0 * combined)
    torch.testing.assert_close(got, torch.cat([g.flatten() for g in expected]))
    dots = (toy.targets[0] * toy.targets[1]).sum(1)
    assert float(logged["conflict_image_a_b"]) == pytest.approx(float((dots < 0).double().mean()))


def test_plain_combinations_are_plain():
    toy = Toy()
    parameters = [p for part in toy.parameters() for p in part]
    for kind, factor in (("mean", 2 / 3), ("sum", 2.0)):
        losses = toy.losses(toy.branch().features)
        expected = torch.autograd.grad(factor * sum(losses), parameters)
        got, value, _ = toy.gradients(kind)
        torch.testing.assert_close(got, torch.cat([g.flatten() for g in expected]))
        assert value == pytest.approx(factor * float(sum(losses).detach()))
    summed = toy.gradients("pcgrad_param", mitigate_reduction="sum")[0]
    torch.testing.assert_close(summed, 3 * toy.gradients("pcgrad_param")[0])


def test_what_counts_as_a_conflict():
    gradients = torch.randn(3, 9, 4, dtype=torch.float64)
    for unit in ("row", "flat"):
        dot = mk.mitigate_gradients(gradients, unit=unit, order="fixed")
        torch.testing.assert_close(pcgrad_by_cosine(gradients, unit, margin=0.0), dot)
        never = pcgrad_by_cosine(gradients, unit, margin=1.0, reduction="sum")
        torch.testing.assert_close(never, gradients.sum(0))
    a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-1.0, 2.0]]])  # cosine -0.447
    both = torch.cat([a, b])
    assert torch.equal(pcgrad_by_cosine(both, "row", margin=0.5), both.mean(0))
    assert not torch.equal(pcgrad_by_cosine(both, "row", margin=0.4), both.mean(0))
    toy = Toy()
    sign, _, _ = toy.gradients("pcgrad_rep_row", conflict="sign")
    agree = ~((toy.targets > 0).any(0) & (toy.targets < 0).any(0))
    features, parameters = toy.branch().features, [p for part in toy.parameters() for p in part]
    expected = torch.autograd.grad(features, parameters, 2.0 * agree * toy.targets.mean(0))
    torch.testing.assert_close(sign, torch.cat([g.flatten() for g in expected]))


def test_both_branches_together_or_apart():
    """Without conflicts both are plain means; a conflict across branches counts only jointly."""
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    config = dataclasses.replace(BASE, mitigator="pcgrad_param", mitigate_order="fixed")

    def gradient(image, pixel, branches):
        chosen = dataclasses.replace(config, branches=branches)
        both = [
            Branch(
                name, 1.0, weight[None] * 1,
                lambda z, vectors=vectors: [(z * torch.tensor(v)).sum() for v in vectors], None,
            )
            for name, vectors in (("image", image), ("pixel", pixel))
        ]  # fmt: skip
        loss, _ = Mitigator(chosen)(both, [weight], [], 0)
        return torch.autograd.grad(loss, weight)[0].tolist()

    easy = ([[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 2.0]])
    assert gradient(*easy, "separate") == gradient(*easy, "joint") == [1.0, 2.0]
    across = ([[1.0, 0.0], [1.0, 0.0]], [[-1.0, 2.0], [-1.0, 2.0]])
    assert gradient(*across, "separate") == [0.0, 2.0]
    joint = gradient(*across, "joint")
    assert joint == pytest.approx([0.8, 2.4])  # (1,0) -> (.8,.4), (-1,2) -> (0,2)


def test_consensus_drops_pairs_of_opposite_sign():
    """The 14 directed pairs that the worked example names get no gradient, the others the mean."""
    gradients = ImageContrast(BASE).pair_gradients(H, EXAMPLE)
    lists = []
    for g in gradients.values():
        i, j = g.nonzero(as_tuple=True)
        lists.append(Selected(i, j, g[i, j], 30))
    anchor, candidate, combined = consensus(lists, 6)
    dropped = {f"{i}{j}" for i, j, g in zip(anchor, candidate, combined, strict=True) if g == 0}
    assert dropped == set("04 12 13 15 21 24 31 34 40 42 43 45 51 54".split())
    mean = (gradients["a"] + gradients["b"]) / 2
    kept = combined != 0
    torch.testing.assert_close(combined[kept], mean[anchor[kept], candidate[kept]])
    # and the surrogate has this gradient
    h = H.clone().requires_grad_()
    config = dataclasses.replace(BASE, mitigator="pair_consensus")
    branch = Branch(
        "image", 1.0, F.normalize(h, dim=1),
        lambda z: ImageContrast(config).losses(z, EXAMPLE, normalize=False), lambda z: lists,
    )  # fmt: skip
    loss, _ = Mitigator(config)([branch], [], [], 0)
    loss.backward()
    table = torch.zeros(6, 6, dtype=torch.float64)
    table[anchor, candidate] = combined
    z = F.normalize(H, dim=1).requires_grad_()
    (table * (z @ z.T)).sum().backward()
    expected = (z.grad - (z.grad * z).sum(1, keepdim=True) * z) / H.norm(dim=1, keepdim=True)
    torch.testing.assert_close(h.grad, expected.detach())
    assert float(loss.detach()) == pytest.approx((2.229827 + 4.106327) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": "label"}, "pixel-scope batch"),
        ({"positives": "label", "pixel_scope": "batch", "perspectives": ()}, "slice-label part"),
        ({"positives": "cam", "pixel_scope": "batch"}, "pixel-scope pair"),
        ({"score": "img_cam", "image_weight": 0.0}, "image-weight"),
        ({"score": "product", "pixel_level": "decoder"}, "pixel-level encoder"),
        ({"use": "recompute"}, "--quota"),
        ({"use": "pos_full_den", "pixel_form": "pixel"}, "pixel_form"),
        ({"quota": (0.0, 0.0)}, "quota needs two shares"),
        ({"quota": (0.1, 0.1), "filter_by": "quantile"}, "takes no quota"),
        ({"filter_by": "threshold", "score": "pix_rep"}, "score=pix_sim"),
        ({"pixel_level": "decoder", "decoder_stride": 16}, "decoder_stride=16"),
        ({"conflict": "cosine", "mitigator": "mean"}, "is about pcgrad"),
        ({"branches": "joint", "mitigator": "pcgrad_rep_row"}, "ends in _param"),
        ({"mitigate_scope": "all", "mitigator": "mean"}, "end in _param"),
        ({"mitigate_before_norm": True}, "_rep_"),
        ({"score": "pix_rep", "mitigator": "pcgrad_rep_row"}, "mitigate-before-norm"),
        ({"mitigator": "pair_consensus", "use": "pos_full_den"}, "mask_grad"),
        ({"mitigator": "pair_consensus", "queue_size": 8}, "queue-size"),
        ({"keep": 0.0}, "nothing to learn from"),
        ({"image_weight": 0.0, "pixel_weight": 0.0}, "nothing to learn from"),
        ({"perspectives": ("patient", "patient")}, "must differ"),
        ({"slice_threshold": 0.0}, "slice_threshold"),
        ({"pixel_temperature": 0.0}, "pixel_temperature must be positive"),
        ({"base_temperature": -1.0}, "base_temperature must be positive"),
        ({"view_flip": (0.5, 2.0)}, "two probabilities"),
        ({"crop": (0.9, 0.5)}, "crop needs"),
        ({"dropout": (0.1,)}, "one value per level"),
        ({"pretrain_batch_size": 1}, "at least 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)


def test_defaults_depend_on_the_data_set():
    assert GclConfig(dataset="acdc").perspective_names == ("slice", "patient", "phase")
    assert GclConfig(dataset="mmwhs").perspective_names == ("slice", "patient")
    assert GclConfig(dataset="acdc").threshold == 0.35
    assert GclConfig(dataset="msd").threshold == 0.1
    assert GclConfig(slice_label="partition").threshold is None


def test_the_table_of_readings_names_every_setting_of_gcl(repo):
    """docs/gcl.md: each option exists, and no setting of pre-training is missing."""
    lines = (repo / "docs" / "gcl.md").read_text().splitlines()
    tables = "\n".join(line for line in lines if line.startswith("| ") and "---" not in line)
    named = {name.replace("-", "_") for name in re.findall(r"[` ]--([a-z0-9-]+)", tables)}
    settings = {field.name for field in dataclasses.fields(GclConfig)}
    own = settings - {field.name for field in dataclasses.fields(TrainConfig)}
    # not readings of the paper: which runs to make, what to log, how to evaluate
    own -= {"method", "pretrained", "log_selection", "head", "select", "definition", "empty"}
    assert named - settings == set()
    assert own - named == set()


def test_pairs_are_described_by_numbers_of_views():
    one = pixel_problem()[3][0]
    assert isinstance(one, PixelPairs) and one.name == "a" and one.shares is None


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


def test_perspectives_that_contradict_each_other_in_every_row_cancel():
    toy = Toy()
    toy.targets = torch.stack([toy.targets[0], -toy.targets[0], -2 * toy.targets[0]])
    for mitigator in ("pcgrad_rep_row", "pcgrad_rep_flat"):
        got, _, logged = toy.gradients(mitigator)
        # (1, -1, -2) along one line: every gradient is projected on the normal of an opposite one
        torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-9)
        assert float(logged["conflict_image_a_b"]) == float(logged["conflict_image_a_c"]) == 1
        assert float(logged["conflict_image_b_c"]) == 0
