"""The losses against textbook implementations written with masks, and everything that they promise
beside their value: zeros that stay connected, ignored pixels, options, derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_checks import backends, check_op, need

import medcl_kernels as medcl
from medcl_kernels.registry import SPECS

LOSSES = tuple(one for one in SPECS if one.kind == "loss")
CASES = [
    pytest.param(
        one, case, dtype, impl, device, id=f"{one.name}-{case.name}-{str(dtype)[6:]}-{impl}"
    )
    for one in LOSSES
    for case in one.cases
    for dtype in case.dtypes
    for impl, device in (parameter.values for parameter in backends() if not parameter.marks)
    if impl != "reference"
]
IMPLS = ["reference", "cpu"]


@pytest.mark.parametrize(("one", "case", "dtype", "impl", "device"), CASES)
def test_loss_is_as_exact_as_plain_torch(one, case, dtype, impl, device):
    need(one.name, impl, device, dtype)
    check_op(one, case, dtype, impl, device)


def flat(x):
    """`(B, C, *spatial)` -> `(B * L, C)` unit rows."""
    return F.normalize(x.flatten(2).transpose(1, 2).flatten(0, 1), dim=1)


def images(batch, length):
    """Image number of every row."""
    return torch.arange(batch).repeat_interleave(length)


def textbook_info_nce(q, k, index, temperature, pairs, queue=None, intra=False, several="out"):
    """Per anchor, with an N x N matrix and boolean masks; index `(B, L, R)`, -1 = none."""
    batch, _, *spatial = q.shape
    length = index.shape[1]
    z, y = flat(q), flat(k)
    own = images(batch, length)[:, None] == images(batch, y.shape[0] // batch)[None]
    s = z @ y.t() / temperature
    positive = torch.zeros_like(own)
    for b in range(batch):
        for i in range(length):
            for j in index[b, i].tolist():
                if j >= 0:
                    positive[b * length + i, b * (y.shape[0] // batch) + j] = True
    anchor = positive.any(1)
    allowed = {"image": own, "batch": torch.ones_like(own), "queue": positive}[pairs]
    blocks, masks = [s], [allowed]
    if intra:
        blocks.append(z @ z.t() / temperature)
        same = images(batch, length)[:, None] == images(batch, length)[None]
        masks.append(same & ~torch.eye(len(z), dtype=torch.bool))
    if queue is not None:
        blocks.append(z @ F.normalize(queue, dim=1).t() / temperature)
        masks.append(torch.ones_like(blocks[-1], dtype=torch.bool))
    scores = torch.cat(blocks, 1).masked_fill(~torch.cat(masks, 1), -torch.inf)
    scores = torch.where(anchor[:, None], scores, torch.zeros_like(scores))
    if several == "in":
        target = s.masked_fill(~positive, -torch.inf)
        target = torch.where(anchor[:, None], target, torch.zeros_like(s)).logsumexp(1)
    else:
        target = (s * positive).sum(1) / positive.sum(1).clamp_min(1)
    return torch.where(anchor, scores.logsumexp(1) - target, 0.0), anchor


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pairs", ["image", "batch", "queue"])
@pytest.mark.parametrize("intra", [False, True])
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("several", ["one", "out", "in"])
def test_info_nce_equals_the_textbook(impl, pairs, intra, with_queue, several):
    if pairs == "queue" and (intra or not with_queue):
        return  # refused combinations: tests/test_errors.py
    q, k = torch.randn(2, 2, 6, 3, 4, dtype=torch.float64).unbind(0)
    q.requires_grad_(), k.requires_grad_()
    queue = torch.randn(5, 6, dtype=torch.float64) if with_queue else None
    index = torch.randint(0, 12, (2, 12, 3))
    index[torch.rand(2, 12, 3) < 0.3] = -1
    index[0, 5] = -1
    if several == "one":
        index = index[:, :, :1]
    else:  # the textbook marks pairs, so an index given twice would count once there
        index[:, :, 1] = torch.where(index[:, :, 1] == index[:, :, 0], -1, index[:, :, 1])
        twice = (index[:, :, 2] == index[:, :, 0]) | (index[:, :, 2] == index[:, :, 1])
        index[:, :, 2] = torch.where(twice, -1, index[:, :, 2])
    form = "in" if several == "in" else "out"
    values, anchor = textbook_info_nce(q, k, index, 0.2, pairs, queue, intra, form)
    positives = index.reshape(2, 3, 4, -1)
    options = {"pairs": pairs, "queue": queue, "intra_view": intra, "multi_positive": form}
    options |= {"temperature": 0.2, "impl": impl}
    if several == "one":
        positives = positives[..., 0]
    none = medcl.info_nce(q, k, positives, reduction="none", **options)
    assert none.shape == (2, 3, 4)
    torch.testing.assert_close(none.flatten(), values)
    total = medcl.info_nce(q, k, positives, reduction="sum", **options)
    torch.testing.assert_close(total, values.sum())
    mean = medcl.info_nce(q, k, positives, **options)
    torch.testing.assert_close(mean, values.sum() / anchor.sum())
    actual = torch.autograd.grad(mean, (q, k))
    expected = torch.autograd.grad(values.sum() / anchor.sum(), (q, k))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_info_nce_is_cross_entropy_over_rows(impl):
    q, k = torch.randn(2, 50, 8).unbind(0)
    positives = torch.randint(0, 50, (50,))
    positives[7] = -1
    logits = F.normalize(q) @ F.normalize(k).t() / 0.1
    expected = F.cross_entropy(logits, positives, ignore_index=-1)
    torch.testing.assert_close(medcl.info_nce(q, k, positives, impl=impl), expected)
    expected = F.cross_entropy(logits, torch.arange(50))
    torch.testing.assert_close(medcl.info_nce(q, k, impl=impl), expected)
    torch.testing.assert_close(medcl.info_nce(q, k, pairs="batch", impl=impl), expected)
    renamed = torch.where(positives == -1, 255, positives)
    a = medcl.info_nce(q, k, renamed, ignore_index=255, impl=impl)
    assert torch.equal(a, medcl.info_nce(q, k, positives, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_symmetric_info_nce_is_both_directions(impl, reduction):
    q, k = torch.randn(2, 2, 6, 3, 4).unbind(0)
    forth, back = torch.randint(-1, 12, (2, 2, 3, 4)).unbind(0)
    options = {"temperature": 0.2, "reduction": reduction, "impl": impl, "pairs": "batch"}
    both = medcl.info_nce(q, k, (forth, back), symmetric=True, **options)
    one = medcl.info_nce(q, k, forth, **options), medcl.info_nce(k, q, back, **options)
    if reduction == "none":
        assert torch.equal(both[0], one[0]) and torch.equal(both[1], one[1])
    else:
        torch.testing.assert_close(both, 0.5 * (one[0] + one[1]))


def test_query_and_key_may_differ_in_spatial_shape():
    q, k = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 5, 5)
    index = medcl.dense_correspondence(q, k)
    assert index.shape == (2, 3, 4) and index.max() < 25
    value = medcl.info_nce(q, k, index, impl="cpu")
    torch.testing.assert_close(value, medcl.info_nce(q, k, index, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_correspondence_is_argmax_of_cosines_and_mutual_keeps_agreement(impl):
    q, k = torch.randn(3, 8, 4, 5), torch.randn(3, 8, 6, 2)
    z, y = (F.normalize(x.flatten(2), dim=1) for x in (q, k))
    cosines = torch.einsum("bcl,bcm->blm", z, y)
    index = medcl.dense_correspondence(q, k, impl=impl)
    assert index.shape == (3, 4, 5) and index.dtype == torch.int64
    assert torch.equal(index.flatten(1), cosines.argmax(2))
    mutual = medcl.dense_correspondence(q, k, mutual=True, impl=impl)
    back = cosines.argmax(1)
    agree = back.gather(1, index.flatten(1)) == torch.arange(20)
    assert agree.any() and not agree.all()
    assert torch.equal(mutual.flatten(1), torch.where(agree, index.flatten(1), -1))
    assert not medcl.dense_correspondence(q.requires_grad_(), k, impl=impl).requires_grad


def textbook_supervised(x, labels, temperature, form, pairs, key=None, key_labels=None):
    """Per anchor, with an N x N matrix and boolean masks."""
    z = flat(x)
    y = labels.flatten()
    k, ky = (z, y) if key is None else (flat(key), key_labels.flatten())
    own = images(x.shape[0], len(z) // x.shape[0])[:, None]
    other = own if key is None else images(key.shape[0], len(k) // key.shape[0])[:, None]
    s = z @ k.t() / temperature
    candidate = (y != -100)[:, None] & (ky != -100)[None]
    if key is None:
        candidate &= ~torch.eye(len(z), dtype=torch.bool)
    if pairs == "image":
        candidate &= own == other.t()
    positive = candidate & (y[:, None] == ky[None])
    negative = candidate & ~positive
    count = positive.sum(1)
    anchor = count > 0

    def lse(mask):
        blank = torch.where(anchor, -torch.inf, 0.0)[:, None].to(s)
        return torch.where(mask, s, blank).logsumexp(1)

    mean = (s * positive).sum(1) / count.clamp_min(1)
    if form == "out":
        value = lse(candidate) - mean
    elif form == "in":
        value = lse(candidate) - lse(positive) + count.clamp_min(1).log()
    else:
        blank = torch.where(negative.any(1), -torch.inf, 0.0)[:, None].to(s)
        rest = torch.where(negative, s, blank).logsumexp(1)[:, None]
        logs = torch.where(negative.any(1)[:, None], torch.logaddexp(s, rest), s)
        value = (logs * positive).sum(1) / count.clamp_min(1) - mean
    return torch.where(anchor, value, 0.0), anchor


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
@pytest.mark.parametrize("pairs", ["image", "batch"])
@pytest.mark.parametrize("against_key", [False, True])
def test_supervised_contrastive_equals_the_textbook(impl, form, pairs, against_key):
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 3, 4))
    labels[0, 0, 0] = labels[1, 2, 1] = -100
    labels[0, 1, 1] = 9  # a pixel without a positive
    key = key_labels = None
    if against_key:
        batch = 2 if pairs == "image" else 3
        key = torch.randn(batch, 6, 2, 5, dtype=torch.float64)
        key_labels = torch.randint(0, 4, (batch, 2, 5))
        key_labels[0, 0, 1] = -100
    values, anchor = textbook_supervised(x, labels, 0.2, form, pairs, key, key_labels)
    options = {"key": key, "key_labels": key_labels, "temperature": 0.2, "form": form}
    options |= {"pairs": pairs, "impl": impl}
    none = medcl.supervised_contrastive(x, labels, reduction="none", **options)
    assert none.shape == labels.shape
    torch.testing.assert_close(none.flatten(), values)
    mean = medcl.supervised_contrastive(x, labels, **options)
    torch.testing.assert_close(mean, values.sum() / anchor.sum())
    total = medcl.supervised_contrastive(x, labels.unsqueeze(1), reduction="sum", **options)
    torch.testing.assert_close(total, values.sum())
    (actual,) = torch.autograd.grad(mean, x)
    (expected,) = torch.autograd.grad(values.sum() / anchor.sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
@pytest.mark.parametrize("anchors", ["same", "one_alone", "other_ignored"])
def test_several_perspectives_equal_one_call_each(impl, form, anchors):
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    maps = torch.stack([torch.randperm(24).view(2, 3, 4) % 3 for _ in range(3)])
    maps[:, 0, 1, 1] = -100
    if anchors == "one_alone":
        maps[1, 1, 0, 1] = 7
    elif anchors == "other_ignored":
        maps[1, 1, 0, 0] = -100
    options = {"form": form, "temperature": 0.2, "impl": impl}
    for reduction, shape in (("mean", (3,)), ("sum", (3,)), ("none", (3, 2, 3, 4))):
        together = medcl.supervised_contrastive(x, list(maps), reduction=reduction, **options)
        assert together.shape == shape
        alone = [
            medcl.supervised_contrastive(x, one, reduction=reduction, **options) for one in maps
        ]
        torch.testing.assert_close(together, torch.stack(alone))
        if reduction == "none":
            continue
        weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        (actual,) = torch.autograd.grad(together @ weight, x)
        (expected,) = torch.autograd.grad(torch.stack(alone) @ weight, x)
        torch.testing.assert_close(actual, expected)
    (actual,) = torch.autograd.grad(together.sum(), x)
    (expected,) = torch.autograd.grad(torch.stack(alone).sum(), x)
    torch.testing.assert_close(actual, expected)


def test_perspectives_with_the_same_ignored_pixels_share_one_log_sum_exp(monkeypatch):
    from medcl_kernels.losses import supervised_contrastive as module

    passes = []

    def spy(name):
        original = getattr(module, name)

        def called(x, *args, **options):
            labels = options["query_labels"] if name == "pair_logsumexp" else args[0]
            passes.append((name, len(options.get("kinds", labels))))
            return original(x, *args, **options)

        monkeypatch.setattr(module, name, called)

    spy("pair_logsumexp")
    spy("supervised_sum")
    x = torch.randn(1, 4, 9)
    maps = [torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1, other]]) for other in (0, 1, 1)]
    medcl.supervised_contrastive(x, maps)
    medcl.supervised_contrastive(x, maps, reduction="none")
    medcl.supervised_contrastive(x, maps, form="in")
    maps[2][0, 8] = 2  # alone in its class: no anchor
    medcl.supervised_contrastive(x, maps)
    maps[1][0, 0] = -100
    medcl.supervised_contrastive(x, maps)
    assert passes == [
        ("supervised_sum", 1),
        ("pair_logsumexp", 1),
        ("pair_logsumexp", 4),
        ("pair_logsumexp", 1),
        ("pair_logsumexp", 3),
    ]


def test_base_temperature_scales_the_loss():
    x, labels = torch.randn(30, 6), torch.randint(0, 3, (30,))
    plain = medcl.supervised_contrastive(x, labels, temperature=0.1)
    scaled = medcl.supervised_contrastive(x, labels, temperature=0.1, base_temperature=0.07)
    torch.testing.assert_close(scaled, plain * 0.1 / 0.07)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ["info_nce", "dense_hinge", "out", "in", "pixel"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_anchor_gives_a_zero_connected_to_the_graph(impl, loss, reduction):
    x = torch.randn(2, 6, 3, 4)
    x[:, :, 1, 1] = torch.nan
    x.requires_grad_()
    by_index = loss in ("info_nce", "dense_hinge")
    nothing = torch.full((2, 3, 4), -1 if by_index else -100)
    if by_index:
        key = torch.randn(2, 6, 3, 4, requires_grad=True)
        value = getattr(medcl, loss)(x, key, nothing, reduction=reduction, impl=impl)
        gradients = torch.autograd.grad(value, (x, key))
    else:
        value = medcl.supervised_contrastive(x, nothing, form=loss, reduction=reduction, impl=impl)
        gradients = torch.autograd.grad(value, (x,))
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("learnable", [False, True], ids=["number", "learnable"])
def test_nan_in_ignored_pixels_reaches_nothing(impl, learnable):
    labels = torch.randint(0, 3, (2, 3, 4))
    labels[0, 1, 2] = labels[1, 0, 0] = -100
    positives = torch.where(labels == -100, -1, labels)
    clean, key = torch.randn(2, 2, 6, 3, 4).unbind(0)
    queue = torch.randn(5, 6)
    results = []
    for filling in (0.0, torch.nan):
        x = clean.masked_fill((labels == -100).unsqueeze(1), filling).requires_grad_()
        temperature = torch.tensor(0.2, requires_grad=True) if learnable else 0.2
        options = {"temperature": temperature, "impl": impl}
        value = medcl.info_nce(x, key, positives, **options)
        value = value + medcl.info_nce(x, key, positives, pairs="batch", queue=queue, **options)
        hinge = {"margin": 0.2, "pairs": "batch", "impl": impl}
        value = value + medcl.dense_hinge(x, key, positives, **hinge)
        for form in ("out", "in", "pixel"):
            value = value + medcl.supervised_contrastive(x, labels, form=form, **options)
        leaves = (x, temperature) if learnable else (x,)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for left, right in zip(*results, strict=True):
        assert right.isfinite().all()
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_learnable_temperature_gets_its_gradient(impl):
    """Against the number, and against central differences."""
    x, key = torch.randn(2, 2, 6, 3, 4, dtype=torch.float64).unbind(0)
    labels = torch.randint(0, 3, (2, 3, 4))
    queue = torch.randn(5, 6, dtype=torch.float64)
    calls = {
        "info_nce": lambda t: medcl.info_nce(x, key, temperature=t, impl=impl),
        "all sets": lambda t: medcl.info_nce(
            x, key, temperature=t, queue=queue, intra_view=True, pairs="batch", impl=impl
        ),
        "symmetric": lambda t: medcl.info_nce(x, key, temperature=t, symmetric=True, impl=impl),
        "queue": lambda t: medcl.info_nce(
            x, key, temperature=t, queue=queue, pairs="queue", impl=impl
        ),
        **{
            form: lambda t, form=form: medcl.supervised_contrastive(
                x, labels, temperature=t, form=form, base_temperature=0.07, impl=impl
            )
            for form in ("out", "in", "pixel")
        },
        "against a key": lambda t: medcl.supervised_contrastive(
            x, labels, key=key, key_labels=labels, temperature=t, impl=impl
        ),
    }
    for name, call in calls.items():
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        value = call(temperature)
        torch.testing.assert_close(value, call(0.2), msg=name)
        (gradient,) = torch.autograd.grad(value, temperature)
        step = 1e-6
        slope = (call(0.2 + step) - call(0.2 - step)) / (2 * step)
        assert gradient.item() == pytest.approx(slope.item(), rel=1e-6), name


def test_low_precision_input_gives_a_float32_loss_and_low_precision_gradients():
    for dtype in (torch.bfloat16, torch.float16):
        q = torch.randn(2, 8, 5, 5).to(dtype).requires_grad_()
        k = torch.randn(2, 8, 5, 5).to(dtype)
        queue = torch.randn(9, 8)  # a float32 queue beside autocast features is converted
        loss = medcl.info_nce(q, k, queue=queue)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss, q)
        assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast_the_dtype_of_the_features_decides(impl):
    q, k = torch.randn(2, 2, 8, 5, 5).unbind(0)
    labels = torch.randint(0, 3, (2, 5, 5))

    def losses():
        return (
            medcl.info_nce(q, k, impl=impl),
            medcl.supervised_contrastive(q, labels, impl=impl),
            medcl.dense_hinge(q, k, margin=0.1, impl=impl),
        )

    outside = losses()
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses()
    if impl == "cpu":  # plain torch follows autocast: its products are bfloat16 there
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_right_in_the_reference_and_refused_by_kernels(impl):
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (1, 3, 3))

    def penalty(leaf):
        value = medcl.supervised_contrastive(leaf, labels, form="pixel", impl=impl)
        value = value + medcl.info_nce(leaf, leaf.flip(2), intra_view=True, impl=impl)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        return gradient.square().sum()

    if impl == "reference":
        assert torch.autograd.gradcheck(penalty, (x,))
    else:
        with pytest.raises(RuntimeError, match='impl="reference"'):
            torch.autograd.grad(penalty(x), x)


def test_vmap_over_the_losses_equals_a_loop():
    x, key = torch.randn(3, 2, 6, 4), torch.randn(3, 2, 6, 4)
    labels = torch.randint(0, 2, (3, 2, 4))
    for impl in IMPLS:

        def total(features, other, classes, impl=impl):
            nce = medcl.info_nce(features, other, reduction="sum", impl=impl)
            nce = nce + medcl.dense_hinge(features, other, margin=0.1, impl=impl)
            return nce + medcl.supervised_contrastive(features, classes, impl=impl)

        expected = torch.stack([total(*slices) for slices in zip(x, key, labels, strict=True)])
        torch.testing.assert_close(torch.vmap(total)(x, key, labels), expected)
