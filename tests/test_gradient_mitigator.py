"""The Gradient Mitigator: what it promises about conflicts, at representations and at parameters,
under a gradient scaler and on two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from op_checks import Calls, backends
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import medcl_kernels as medcl

IMPLS = [one.id for one in backends() if not one.marks]


def textbook_pcgrad(vectors, order):
    """Projections of vectors, one after the other: the form without a Gram matrix."""
    total = torch.zeros_like(vectors[0])
    for a, others in enumerate(order):
        u = vectors[a].clone()
        for b in others:
            q = u @ vectors[b]
            if q < 0:
                u = u - q / (vectors[b] @ vectors[b]) * vectors[b]
        total = total + u
    return total / len(vectors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("m", [2, 3, 5, 8])
@pytest.mark.parametrize("unit", ["row", "flat"])
def test_the_gram_form_equals_projections_of_vectors(impl, m, unit):
    g = torch.randn(m, 40, 7, dtype=torch.float64)
    order = [[b for b in range(m) if b != a] for a in range(m)]
    combined = medcl.mitigate_gradients(g, unit=unit, order="fixed", impl=impl)
    if unit == "row":
        expected = torch.stack([textbook_pcgrad(g[:, i], order) for i in range(40)])
    else:
        expected = textbook_pcgrad(g.flatten(1), order).reshape(40, 7)
    torch.testing.assert_close(combined, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stepped"])
def test_any_strides(impl, layout):
    g = torch.randn(3, 70, 9)
    laid = {
        "contiguous": g,
        "transposed": g.transpose(1, 2).contiguous().transpose(1, 2),
        "stepped": torch.cat([g, g], 2)[:, :, ::2].copy_(g),
    }[layout]
    for method in ("pcgrad", "cagrad", "consensus", "mean"):
        options = {"method": method, "order": "fixed"}
        combined = medcl.mitigate_gradients(laid, impl=impl, **options)
        expected = medcl.mitigate_gradients(g, impl="reference", **options)
        torch.testing.assert_close(combined, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_conflict_it_is_the_mean_and_zero_gradients_are_harmless(impl):
    g = torch.rand(3, 20, 5, dtype=torch.float64)  # all inner products positive
    for method in ("pcgrad", "consensus"):
        combined = medcl.mitigate_gradients(g, method=method, impl=impl)
        torch.testing.assert_close(combined, g.mean(0))
    same = g[:1].expand(3, -1, -1)
    torch.testing.assert_close(medcl.mitigate_gradients(same, impl=impl), g[0])
    with_zero = torch.cat([torch.randn(1, 20, 5).double(), torch.zeros(1, 20, 5).double()])
    for method in ("pcgrad", "cagrad"):
        combined = medcl.mitigate_gradients(with_zero, method=method, impl=impl)
        assert combined.isfinite().all()
    assert (medcl.mitigate_gradients(torch.zeros(2, 3, 4), impl=impl) == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_two_conflicting_gradients_both_gain(impl):
    """Each projected part is orthogonal to the other gradient; the sum harms neither."""
    g = torch.randn(2, 200, 6, dtype=torch.float64)
    total = medcl.mitigate_gradients(g, reduction="sum", impl=impl)
    dots = (g * total).sum(2)
    assert (dots >= -1e-9).all()
    q = (g[0] * g[1]).sum(1)
    conflict = q < 0
    assert conflict.any() and not conflict.all()
    u = g[0] - (q / g[1].square().sum(1)).unsqueeze(1) * g[1]
    torch.testing.assert_close((u * g[1]).sum(1)[conflict], torch.zeros(conflict.sum()).double())
    plain = (g * g.sum(0)).sum(2)
    assert (plain[:, conflict] < 0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_all_contradict_each_other_cancel(impl):
    g = torch.randn(1, 30, 6, dtype=torch.float64)
    opposite = torch.cat([g, -g, -2 * g])
    for method in ("pcgrad", "consensus"):
        combined = medcl.mitigate_gradients(opposite, method=method, impl=impl)
        torch.testing.assert_close(combined, torch.zeros_like(g[0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("m", [2, 3, 6])
def test_cagrad_finds_the_best_worst_case(impl, m):
    """Optimality on the simplex: no single perspective could be worse off by less."""
    g = torch.randn(m, 60, 8, dtype=torch.float64)
    combined = medcl.mitigate_gradients(g, method="cagrad", impl=impl)
    mean = g.mean(0)
    radius = 0.5 * mean.norm(dim=1)
    torch.testing.assert_close((combined - mean).norm(dim=1), radius, rtol=1e-6, atol=1e-9)
    worst = (g * combined).sum(2).min(0).values
    for _ in range(50):  # any other direction of that length does no better
        other = torch.randn(60, 8, dtype=torch.float64)
        other = mean + other / other.norm(dim=1, keepdim=True) * radius.unsqueeze(1)
        assert ((g * other).sum(2).min(0).values <= worst + 1e-6).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_random_order_comes_from_the_generator(impl):
    g = torch.randn(4, 30, 5)

    def combined(seed):
        generator = torch.Generator().manual_seed(seed)
        return medcl.mitigate_gradients(g, generator=generator, impl=impl)

    assert torch.equal(combined(1), combined(1))
    assert any(not torch.equal(combined(1), combined(seed)) for seed in range(2, 6))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pairs", ["batch", "image"])
def test_shared_softmax_equals_one_loss_each(impl, pairs):
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    maps = torch.randint(0, 3, (3, 2, 4, 5))
    ragged = maps.clone()
    ragged[1, 0, 0] = -100  # other anchors in one perspective: the general path
    lonely = maps.clone()
    lonely[2, 1, 0, 0] = 50
    for labels in (maps, ragged, lonely):
        losses = medcl.supervised_contrastive(x, list(labels), pairs=pairs, impl="reference")
        found = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in losses]
        in_rows = torch.stack(found).flatten(3).movedim(2, 3).flatten(1, 2)
        expected = medcl.mitigate_gradients(in_rows, order="fixed", impl="reference")
        value = medcl.mitigated_contrastive(x, list(labels), order="fixed", pairs=pairs, impl=impl)
        torch.testing.assert_close(value, losses.mean())
        (gradient,) = torch.autograd.grad(2 * value, x)
        in_rows = gradient.flatten(2).movedim(1, 2).flatten(0, 1)
        torch.testing.assert_close(in_rows, 2 * expected)


@pytest.mark.parametrize("seen", ["cpu", "gpu", "captured"])
def test_labels_with_the_same_anchors_share_one_dense_pass(monkeypatch, seen):
    """Also where checks may not read values, as on a GPU; but not in a CUDA graph."""
    if seen != "cpu":
        monkeypatch.setattr(medcl.checks, "readable", lambda tensor: False)
    if seen == "captured":
        monkeypatch.setattr(medcl.checks, "capturing", lambda tensor: True)
    x, maps = torch.randn(30, 5, requires_grad=True), torch.arange(90).reshape(3, 30) % 4
    ragged = maps.clone()
    ragged[1, 7] = -100
    for labels, shared in ((maps, seen != "captured"), (ragged, False)):
        with Calls() as calls:
            medcl.mitigated_contrastive(x, list(labels), impl="cpu").backward()
        assert calls.count["pair_logsumexp"] == 1
        assert calls.count["pair_logsumexp_backward"] == (1 if shared else 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_is_not_that_of_the_value_by_design(impl):
    """gradcheck fails where perspectives conflict, and passes for the plain mean."""
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    maps = list(torch.randint(0, 2, (2, 12)))

    def value(leaf, method):
        return medcl.mitigated_contrastive(leaf, maps, method=method, impl=impl)

    assert torch.autograd.gradcheck(lambda leaf: value(leaf, "mean"), (x,))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda leaf: value(leaf, "pcgrad"), (x,))
    (gradient,) = torch.autograd.grad(value(x, "pcgrad"), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("unit", ["row", "flat"])
def test_the_module_at_a_representation(unit):
    encoder = nn.Conv2d(3, 8, 1)
    image, maps = torch.randn(2, 3, 5, 6), list(torch.randint(0, 2, (2, 2, 5, 6)))
    mitigator = medcl.GradientMitigator(unit=unit)

    def losses(z):
        return medcl.filtered_contrastive(z, labels=maps, keep=0.2)

    features = encoder(image)
    loss = mitigator(features, losses)
    loss.backward()
    z = features.detach().requires_grad_()
    found = [torch.autograd.grad(one, z, retain_graph=True)[0] for one in losses(z)]
    in_rows = torch.stack(found).flatten(3).movedim(2, 3).flatten(1, 2)
    combined = medcl.mitigate_gradients(in_rows, unit=unit).reshape(2, 30, 8).movedim(1, 2)
    expected = torch.autograd.grad(encoder(image), encoder.weight, combined.reshape(z.shape))[0]
    torch.testing.assert_close(encoder.weight.grad, expected)
    torch.testing.assert_close(loss, losses(z).mean())
    each = mitigator(features.detach(), [lambda z: losses(z)[0], lambda z: losses(z)[1]])
    torch.testing.assert_close(each, loss)
    assert not each.requires_grad


def test_the_order_follows_the_step_also_after_a_restart():
    g = [torch.randn(30, requires_grad=True)]
    targets = torch.randn(4, 30)

    def updates(mitigator, steps):
        found = []
        for _ in range(steps):
            g[0].grad = None
            mitigator.backward([(g[0] * target).sum() for target in targets], g)
            found.append(g[0].grad.clone())
        return found

    first = medcl.GradientMitigator(seed=3)
    whole = updates(first, 6)
    second = medcl.GradientMitigator(seed=3)
    head = updates(second, 2)
    third = medcl.GradientMitigator(seed=3)
    third.load_state_dict(second.state_dict())
    resumed = head + updates(third, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert any(not torch.equal(whole[0], one) for one in whole[1:])


class Net(nn.Module):
    """A shared encoder and one head per loss."""

    def __init__(self, losses=2):
        super().__init__()
        torch.manual_seed(5)
        self.encoder = nn.Linear(6, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 4) for _ in range(losses)])
        self.unused = nn.Linear(2, 2)

    def losses(self, x, labels):
        h = self.encoder(x).tanh()
        return [
            medcl.supervised_contrastive(head(h), y, impl="cpu")
            for head, y in zip(self.heads, labels, strict=True)
        ]


def rows_and_labels(seed, losses=2):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(24, 6, generator=generator)
    return rows, torch.randint(0, 3, (losses, 24), generator=generator)


def expected_gradients(net, x, labels):
    """Mitigated for the encoder, the plain mean for heads."""
    shared = list(net.encoder.parameters())
    losses = net.losses(x, labels)
    flat = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(one, shared, retain_graph=True)])
            for one in losses
        ]
    )
    combined = medcl.mitigate_gradients(flat.unsqueeze(1), unit="flat", impl="reference")[0]
    heads = torch.autograd.grad(sum(losses) / 2, list(net.heads.parameters()))
    return combined.split([p.numel() for p in shared]), heads


def test_the_module_at_the_parameters():
    net, mitigator = Net(), medcl.GradientMitigator()
    x, labels = rows_and_labels(0)
    shared, heads = list(net.encoder.parameters()), list(net.heads.parameters())
    encoder_expected, heads_expected = expected_gradients(net, x, labels)
    losses = net.losses(x, labels)
    value = mitigator.backward(losses, shared, [*heads, *net.unused.parameters()])
    torch.testing.assert_close(value, (losses[0] + losses[1]).detach() / 2)
    for parameter, wanted in zip(shared, encoder_expected, strict=True):
        torch.testing.assert_close(parameter.grad.flatten(), wanted, rtol=1e-4, atol=1e-6)
    for parameter, wanted in zip(heads, heads_expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    assert net.unused.weight.grad is None
    before = shared[0].grad.clone()
    mitigator.backward(net.losses(x, labels), shared, heads)  # adds up, as backward does
    torch.testing.assert_close(shared[0].grad, 2 * before)


class CpuScaler(torch.amp.GradScaler):
    """torch's scaler on the CPU."""

    def __init__(self, scale):
        super().__init__("cpu", init_scale=scale, growth_interval=1000)


def test_a_gradient_scaler_sees_scaled_gradients_that_were_compared_unscaled():
    x, labels = rows_and_labels(1)
    results = []
    for scale in (None, 2.0**16, 2.0**-20):
        net, mitigator = Net(), medcl.GradientMitigator()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = None if scale is None else CpuScaler(scale)
        shared, heads = list(net.encoder.parameters()), list(net.heads.parameters())
        mitigator.backward(net.losses(x, labels), shared, heads, scaler=scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach().clone() for p in net.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-7)


def test_an_overflow_makes_the_scaler_skip_the_step():
    net, mitigator, scaler = Net(), medcl.GradientMitigator(), CpuScaler(2.0**10)
    x, labels = rows_and_labels(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    losses = net.losses(x, labels)
    losses[1] = losses[1] * float("inf")
    shared, heads = list(net.encoder.parameters()), list(net.heads.parameters())
    mitigator.backward(losses, shared, heads, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_step_under_autocast_with_a_scaler():
    """The update is the one that bfloat16 gradients give when compared by hand."""
    net, mitigator, scaler = Net(3), medcl.GradientMitigator(order="fixed"), CpuScaler(2.0**12)
    x, labels = rows_and_labels(11, 3)
    shared, heads = list(net.encoder.parameters()), list(net.heads.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        losses = net.losses(x, labels)
        assert net.heads[0](net.encoder(x)).dtype == torch.bfloat16
    found = [
        torch.autograd.grad(one, [*shared, *heads], retain_graph=True, allow_unused=True)
        for one in losses
    ]
    flat = torch.stack([torch.cat([g.flatten() for g in one[:2]]) for one in found])
    assert (flat @ flat.T < 0).any()  # there is something to mitigate
    expected = medcl.mitigate_gradients(
        flat.unsqueeze(1), unit="flat", order="fixed", impl="reference"
    )[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    mitigator.backward(losses, shared, heads, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    moved = [a - p.detach() for a, p in zip(before, net.parameters(), strict=True)]
    given = torch.cat([one.flatten() for one in moved[:2]])
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-5)
    for m in range(3):  # a head has one loss of three
        for given, wanted in zip(moved[2 + 2 * m :], found[m][2 + 2 * m : 4 + 2 * m], strict=False):
            torch.testing.assert_close(given, wanted / 3, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_compared_in_float32(dtype):
    """A loss scale of 2**16 brings gradients over that float16 could not hold unscaled."""
    x = torch.randn(4, 8, 16, 16).to(dtype).requires_grad_()
    maps = list(torch.randint(0, 3, (2, 4, 16, 16)))
    for loss in (
        medcl.GradientMitigator()(x, lambda z: medcl.supervised_contrastive(z, maps)),
        medcl.mitigated_contrastive(x, maps),
    ):
        (scaled,) = torch.autograd.grad(loss * 2.0**12, x, retain_graph=True)
        assert scaled.dtype == dtype and loss.dtype == torch.float32
        exact = x.detach().float().requires_grad_()
        value = medcl.mitigated_contrastive(exact, maps)
        (wanted,) = torch.autograd.grad(value * 2.0**12, exact)
        torch.testing.assert_close(scaled.float(), wanted, rtol=1e-2, atol=1e-3)


def worker(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    net, mitigator = Net(3), medcl.GradientMitigator()
    torch.manual_seed(rank)  # the order of three losses must not come from here
    wrapped = nn.parallel.DistributedDataParallel(net.encoder)
    x, labels = rows_and_labels(40 + rank, 3)
    with wrapped.no_sync():
        h = wrapped(x).tanh()
        losses = [
            medcl.supervised_contrastive(head(h), y)
            for head, y in zip(net.heads, labels, strict=True)
        ]
        losses[1] = -losses[1]  # now it conflicts with both others, and their order matters
        mitigator.backward(losses, net.encoder.parameters(), net.heads.parameters())
    torch.save([p.grad for p in net.parameters() if p.grad is not None], f"{folder}/{rank}.pt")
    torch.save(
        [step_of_a_rank(rank, scale) for scale in (None, 2.0**12, "inf")],
        f"{folder}/steps{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def step_of_a_rank(rank, scale):
    """The parameters before and after a step; "inf": rank 1 overflows."""
    torch.manual_seed(7)
    net = Net(3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = None if scale is None else CpuScaler(2.0**10 if scale == "inf" else scale)
    losses = net.losses(*rows_and_labels(50 + rank, 3))
    if scale == "inf" and rank == 1:
        losses[2] = losses[2] * torch.inf
    before = [p.detach().clone() for p in net.parameters()]
    medcl.GradientMitigator(order="fixed").backward(
        losses, net.encoder.parameters(), net.heads.parameters(), scaler=scaler
    )
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return before, [p.detach() for p in net.parameters()], scaler and scaler.get_scale()


@pytest.mark.slow
def test_two_ranks_take_the_step_of_their_averaged_gradients(tmp_path):
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for a, b in zip(*ranks, strict=True):
        assert torch.equal(a, b)
    net, per_rank, heads = Net(3), [], []
    shared = list(net.encoder.parameters())
    for rank in range(2):
        losses = net.losses(*rows_and_labels(40 + rank, 3))
        losses[1] = -losses[1]
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(one, shared, retain_graph=True)])
            for one in losses
        ]
        per_rank.append(torch.stack(rows))
        heads.append(torch.autograd.grad(sum(losses) / 3, list(net.heads.parameters())))
    mean = torch.stack(per_rank).mean(0).unsqueeze(1)
    generators = [medcl.GradientMitigator()._generator()]
    generators += [torch.Generator().manual_seed(seed) for seed in range(1, 9)]
    combined, *others = (
        medcl.mitigate_gradients(mean, unit="flat", generator=one, impl="reference")[0]
        for one in generators
    )
    assert any((other - combined).abs().max() > 0.1 for other in others)
    given = torch.cat([g.flatten() for g in ranks[0][:2]])
    torch.testing.assert_close(given, combined, rtol=1e-4, atol=1e-6)
    for given, one, other in zip(ranks[0][2:], *heads, strict=True):
        torch.testing.assert_close(given, (one + other) / 2, rtol=1e-4, atol=1e-6)
    for one, other in zip(
        *(torch.load(tmp_path / f"steps{rank}.pt") for rank in range(2)), strict=True
    ):
        for a, b in zip(one[1], other[1], strict=True):  # under a scaler, too, ranks stay together
            assert torch.equal(a, b)
    plain, scaled, overflown = torch.load(tmp_path / "steps0.pt")
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(*plain[:2], strict=True))
    for a, b in zip(plain[1], scaled[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(*overflown[:2], strict=True):  # an overflow on one of them: neither moves
        assert torch.equal(a, b)
    assert overflown[2] < 2.0**10


def test_an_encoder_trained_with_it_lowers_every_loss():
    """Three contradictory labellings of one set of pixels."""
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    image = torch.randn(2, 4, 8, 8)
    maps = [(image[:, channel] > 0).long() for channel in range(3)]
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5, momentum=0.9)
    mitigator, history = medcl.GradientMitigator(), []
    for _ in range(30):
        optimizer.zero_grad()
        features = encoder(image)
        history.append(medcl.supervised_contrastive(features.detach(), maps))
        mitigator(features, lambda z: medcl.supervised_contrastive(z, maps)).backward()
        optimizer.step()
    assert (history[-1] < history[0] - 0.05).all()
