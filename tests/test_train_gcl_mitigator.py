"""The Gradient Mitigator in the training step."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from train_tiny_gcl import BASE, EXAMPLE, H

import medcl_kernels as mk
from medcl_train.gcl import (
    Branch,
    ImageContrast,
    Mitigator,
    Selected,
)
from medcl_train.gcl.mitigation import consensus, pcgrad_by_cosine

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


def test_what_is_logged_as_a_conflict_is_what_the_mitigator_acts_on():
    gradients = torch.tensor(
        [
            [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]],
            [[-1.0, 4.0], [-1.0, -1.0], [1.0, -3.0], [1.0, 2.0]],
        ]
    )  # cosines -0.24, -1, 0.32; the last row has one perspective only
    rates = {
        (conflict, margin): Mitigator(
            dataclasses.replace(BASE, conflict=conflict, conflict_margin=margin)
        )
        .conflict_rates("rate", gradients, ("a", "b"))["rate_a_b"]
        .item()
        for conflict, margin in (("dot", 0.1), ("cosine", 0.2), ("cosine", 0.3), ("sign", 0.1))
    }
    assert list(rates.values()) == pytest.approx([2 / 3, 2 / 3, 1 / 3, 3 / 4])


def test_the_strength_of_cagrad_is_a_setting():
    toy = Toy()
    parameters = [p for part in toy.parameters() for p in part]
    for strength in (0.5, 0.2):
        options = {} if strength == 0.5 else {"cagrad_strength": strength}
        got, _, _ = toy.gradients("cagrad_rep_flat", **options)
        combined = mk.mitigate_gradients(
            toy.targets, method="cagrad", unit="flat", strength=strength
        )
        expected = torch.autograd.grad(toy.branch().features, parameters, 2.0 * combined)
        torch.testing.assert_close(got, torch.cat([g.flatten() for g in expected]))


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
    nothing = Selected(anchor[:0], candidate[:0], combined[:0], 30)
    assert all(len(one) == 0 for one in consensus([nothing, nothing], 6))
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


def test_perspectives_that_contradict_each_other_in_every_row_cancel():
    toy = Toy()
    toy.targets = torch.stack([toy.targets[0], -toy.targets[0], -2 * toy.targets[0]])
    for mitigator in ("pcgrad_rep_row", "pcgrad_rep_flat"):
        got, _, logged = toy.gradients(mitigator)
        # (1, -1, -2) along one line: every gradient is projected on the normal of an opposite one
        torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-9)
        assert float(logged["conflict_image_a_b"]) == float(logged["conflict_image_a_c"]) == 1
        assert float(logged["conflict_image_b_c"]) == 0
