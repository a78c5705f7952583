"""The specification itself: against plain Python loops over pairs, against finite differences, and
against the equations in its own docstrings. Everything else is judged by these functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from medcl_kernels import reference

IGNORE = -100
B, D, L, LK = 2, 3, 5, 4
SETTINGS = [(key, across) for key in (False, True) for across in (False, True)]
NAMES = [f"{'key' if key else 'self'}-{'batch' if across else 'image'}" for key, across in SETTINGS]


def draw(key: bool, seed: int = 0):
    """Small float64 rows with a zero vector, labels with ignored ones."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, D, L, generator=generator, dtype=torch.float64)
    other = torch.randn(B, D, LK, generator=generator, dtype=torch.float64) if key else None
    labels = torch.randint(0, 3, (2, B, L), generator=generator)
    labels[0, 0, 2] = labels[1, 1, 3] = IGNORE
    other_labels = torch.randint(0, 3, (2, B, LK), generator=generator) if key else None
    if other_labels is not None:
        other_labels[0, 1, 0] = IGNORE
    return query, other, labels, other_labels


def loops(query, key, labels, key_labels, kind, s, temperature, across):
    """For every anchor of label map `s`: the similarities of its allowed candidates, None if
    excluded.
    """

    def cosine(u, v):
        norm = math.sqrt(sum(a * a for a in u)) * math.sqrt(sum(a * a for a in v))
        return sum(a * b for a, b in zip(u, v, strict=True)) / norm if norm > 0 else 0.0

    keys = query if key is None else key
    own_labels = labels[s].tolist()
    candidate_labels = own_labels if key is None else key_labels[s].tolist()
    result = {}
    for b in range(query.shape[0]):
        for i in range(query.shape[2]):
            label = own_labels[b][i]
            if label == IGNORE:
                result[b, i] = None
                continue
            allowed = []
            for kb in range(keys.shape[0]) if across else [b]:
                for j in range(keys.shape[2]):
                    other = candidate_labels[kb][j]
                    if other == IGNORE or (key is None and (kb, j) == (b, i)):
                        continue
                    if (kind == "same" and other != label) or (
                        kind == "different" and other == label
                    ):
                        continue
                    u, v = query[b, :, i].tolist(), keys[kb, :, j].tolist()
                    allowed.append(cosine(u, v) / temperature)
            result[b, i] = allowed
    return result


def assert_rows(actual, expected):
    """A `(B, L)` tensor against a dict."""
    for (b, i), value in expected.items():
        assert actual[b, i].item() == pytest.approx(value, rel=1e-12, abs=1e-12), (b, i)


@pytest.mark.parametrize(("with_key", "across"), SETTINGS, ids=NAMES)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_pair_logsumexp_equals_loops(with_key, across, temperature):
    query, key, labels, key_labels = draw(with_key)
    labels, key_labels = (None if t is None else t[[0, 1, 0]] for t in (labels, key_labels))
    kinds = ("all", "same", "different")
    lse = reference.pair_logsumexp(
        query,
        key,
        query_labels=labels,
        key_labels=key_labels,
        kinds=kinds,
        temperature=temperature,
        across=across,
    )
    assert lse.shape == (3, B, L)
    for s, kind in enumerate(kinds):
        pairs = loops(query, key, labels, key_labels, kind, s, temperature, across)
        assert_rows(
            lse[s],
            {
                row: math.log(sum(math.exp(x) for x in values)) if values else -math.inf
                for row, values in pairs.items()
            },
        )


@pytest.mark.parametrize(("with_key", "across"), SETTINGS, ids=NAMES)
def test_positive_mean_equals_loops_and_class_sums(with_key, across):
    query, key, labels, key_labels = draw(with_key)
    mean, count = reference.positive_mean(
        query, key, query_labels=labels, key_labels=key_labels, temperature=0.2, across=across
    )
    for s in range(2):
        pairs = loops(query, key, labels, key_labels, "same", s, 0.2, across)
        assert_rows(mean[s], {r: sum(v) / len(v) if v else 0.0 for r, v in pairs.items()})
        assert_rows(count[s], {row: len(values or ()) for row, values in pairs.items()})


@pytest.mark.parametrize(("with_key", "across"), SETTINGS, ids=NAMES)
def test_pair_positive_log_equals_loops(with_key, across):
    query, key, labels, key_labels = draw(with_key)
    negative = torch.randn(2, B, L, dtype=torch.float64)
    negative[0, 0, 0] = -math.inf
    value = reference.pair_positive_log(
        query,
        key,
        query_labels=labels,
        key_labels=key_labels,
        lse_negative=negative,
        temperature=0.2,
        across=across,
    )
    for s in range(2):
        pairs = loops(query, key, labels, key_labels, "same", s, 0.2, across)
        expected = {}
        for (b, i), values in pairs.items():
            rest = math.exp(negative[s, b, i])
            expected[b, i] = sum(math.log(math.exp(x) + rest) for x in values or ())
        assert_rows(value[s], expected)


@pytest.mark.parametrize("across", [False, True], ids=["image", "batch"])
def test_positive_at_and_info_nce_sum_equal_loops(across):
    query, key, _, _ = draw(True)
    everything = torch.zeros(1, B, L, dtype=torch.int64), torch.zeros(1, B, LK, dtype=torch.int64)
    pairs = loops(query, key, *everything, "all", 0, 0.2, across)
    positives = torch.tensor([[0, 1, -1, 3, 3], [2, 2, 2, -1, 0]])
    weight = torch.rand(B, L, dtype=torch.float64)
    at = reference.positive_at(query, key, positives, temperature=0.2, across=across)
    total, expected = 0.0, {}
    for (b, i), values in pairs.items():
        index = positives[b, i].item()
        expected[b, i] = 0.0
        if index >= 0:
            expected[b, i] = values[index + (b * LK if across else 0)]
            lse = math.log(sum(math.exp(x) for x in values))
            total += weight[b, i].item() * (lse - expected[b, i])
    assert_rows(at, expected)
    value, anchors = reference.info_nce_sum(
        query, key, positives, weight, temperature=0.2, across=across
    )
    assert value.item() == pytest.approx(total, rel=1e-12)
    assert anchors.item() == (positives >= 0).sum()
    several = torch.stack([positives, positives.flip(1)], -1)
    at = reference.positive_at(query, key, several, temperature=0.2)
    for r in range(2):
        alone = reference.positive_at(query, key, several[..., r].contiguous(), temperature=0.2)
        assert torch.equal(at[..., r], alone)


@pytest.mark.parametrize("across", [False, True], ids=["image", "batch"])
def test_supervised_sum_equals_loops(across):
    query, _, labels, _ = draw(False)
    candidates = loops(query, None, labels, None, "all", 0, 0.2, across)
    positives = loops(query, None, labels, None, "same", 0, 0.2, across)
    expected, anchors = 0.0, 0
    for row, similar in positives.items():
        if similar:
            lse = math.log(sum(math.exp(x) for x in candidates[row]))
            expected += lse - sum(similar) / len(similar)
            anchors += 1
    value, count = reference.supervised_sum(query, labels[:1], temperature=0.2, across=across)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert count.item() == anchors
    nothing = torch.full_like(labels[:1], IGNORE)
    value, count = reference.supervised_sum(query, nothing, temperature=0.2, across=across)
    assert (value.item(), count.item()) == (0, 1)


def test_pair_argmax_equals_loops_with_ties_to_the_smallest_index():
    query = torch.tensor([[[1.0, 0, -1], [0, 2, 0]]])
    key = torch.tensor([[[0.0, 3, 3, 0, -1], [1, 0, 0, 5, 0]]])
    index, value = reference.pair_argmax(query, key)
    assert index.tolist() == [[1, 0, 4]]
    assert value.tolist() == [[1, 1, 1]]
    index, value = reference.pair_argmax(query, key, normalize=False)
    assert index.tolist() == [[1, 3, 4]]
    assert value.tolist() == [[3, 10, 1]]


def finite(lse):
    """-inf rows as constants, for finite differences."""
    return torch.where(torch.isinf(lse), 0.0, lse)


def functions(with_key: bool, across: bool):
    """Each differentiable operation as a function of its differentiable tensors, with those
    tensors.
    """
    query, key, labels, key_labels = draw(with_key, seed=1)
    leaves = [query] if key is None else [query, key]
    options = {"query_labels": labels, "key_labels": key_labels, "temperature": 0.3}
    options["across"] = across

    def pick(tensors):
        return tensors if with_key else (tensors[0], None)

    for kinds in (("all", "same"), ("different", "all")):
        yield (
            f"pair_logsumexp {kinds}",
            lambda *t, kinds=kinds: finite(
                reference.pair_logsumexp(*pick(t), kinds=kinds, **options)
            ),
            leaves,
        )
    yield (
        "positive_mean",
        lambda *t: reference.positive_mean(*pick(t), **options)[0],
        leaves,
    )
    negative = torch.randn(2, B, L, dtype=torch.float64)
    yield (
        "pair_positive_log",
        lambda *t: reference.pair_positive_log(*pick(t[:-1]), lse_negative=t[-1], **options),
        [*leaves, negative],
    )
    yield (
        "pair_positive_log without negatives",
        lambda *t: reference.pair_positive_log(
            *pick(t), lse_negative=torch.full_like(negative, -math.inf), **options
        ),
        leaves,
    )
    if not with_key:
        yield (
            "supervised_sum",
            lambda t: reference.supervised_sum(t, labels[:1], temperature=0.3, across=across)[0],
            leaves,
        )
    if with_key:
        positives = torch.tensor([[0, 1, -1, 3, 3], [2, 2, 2, -1, 0]])
        several = torch.stack([positives, positives.flip(1)], -1)
        weight = torch.rand(B, L, dtype=torch.float64)
        same = {"temperature": 0.3, "across": across}
        yield "positive_at", lambda *t: reference.positive_at(*t, positives, **same), leaves
        yield "positive_at (R)", lambda *t: reference.positive_at(*t, several, **same), leaves
        yield (
            "info_nce_sum",
            lambda *t: reference.info_nce_sum(*t, positives, weight, **same)[0],
            leaves,
        )


@pytest.mark.parametrize(("with_key", "across"), SETTINGS, ids=NAMES)
def test_first_and_second_derivatives_agree_with_finite_differences(with_key, across):
    for name, function, tensors in functions(with_key, across):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        assert gradcheck(function, leaves), name
        assert gradgradcheck(function, leaves), name


def everything(query, labels, positives):
    """The sum of all differentiable operations, so that one gradient shows a leak of any."""
    key = torch.randn(B, D, LK, dtype=torch.float64)
    lse = finite(reference.pair_logsumexp(query, query_labels=labels, temperature=0.2))
    mean, _ = reference.positive_mean(query, query_labels=labels, temperature=0.2)
    logs = reference.pair_positive_log(
        query, query_labels=labels, lse_negative=lse, temperature=0.2, across=True
    )
    at = reference.positive_at(query, key, positives, temperature=0.2)
    weight = torch.ones(B, L)
    nce, _ = reference.info_nce_sum(query, key, positives, weight, temperature=0.2)
    total, _ = reference.supervised_sum(query, labels, temperature=0.2)
    return lse.sum() + mean.sum() + logs.sum() + at.sum() + nce + total


def test_nan_in_excluded_rows_reaches_neither_value_nor_gradient():
    query, _, labels, _ = draw(False)
    labels = labels[:1]
    excluded = labels[0] == IGNORE
    positives = torch.where(excluded, -1, 0)
    results = []
    for filling in (0.0, math.nan, math.inf):
        torch.manual_seed(0)
        leaf = query.masked_fill(excluded.unsqueeze(1), filling).requires_grad_()
        value = everything(leaf, labels, positives)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        assert (gradient.movedim(1, 2)[excluded] == 0).all()
        results.append((value, gradient, second))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert torch.equal(left, right)


def test_zero_rows_have_similarity_and_gradient_zero():
    query, key, _, _ = draw(True)
    query[:, :, 0] = 0
    query.requires_grad_()
    positives = torch.zeros(B, L, dtype=torch.int64)
    at = reference.positive_at(query, key, positives, temperature=0.1)
    assert (at[:, 0] == 0).all()
    lse = reference.pair_logsumexp(query, key, temperature=0.1)[0]
    torch.testing.assert_close(lse[:, 0], torch.full((B,), math.log(LK), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(at.sum() + lse.sum(), query)
    assert (gradient[:, :, 0] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_come_in_the_compute_dtype_and_gradients_in_the_dtype_of_the_input(dtype):
    query = torch.randn(1, 4, 6, dtype=torch.float64).to(dtype).requires_grad_()
    lse = reference.pair_logsumexp(query, temperature=0.1)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(lse.sum(), query)
    assert gradient.dtype == dtype
    exact = reference.pair_logsumexp(query.detach().double(), temperature=0.1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_symmetric_form_of_the_self_gradient_holds():
    """(L4) of reference/pair_logsumexp.py: one symmetric matrix for both roles of a row."""
    t = 0.2
    query = torch.randn(1, D, L, dtype=torch.float64)
    z = torch.nn.functional.normalize(query, dim=1).requires_grad_()
    lse = reference.pair_logsumexp(z, temperature=t, normalize=False)[0, 0]
    upstream = torch.rand(L, dtype=torch.float64)
    (actual,) = torch.autograd.grad(lse, z, upstream)
    rows = z.detach()[0].t()
    e = torch.exp(rows @ rows.t() / t - 1 / t).fill_diagonal_(0)
    a = upstream * torch.exp(1 / t - lse.detach())
    expected = (e * (a[:, None] + a[None, :])) @ rows / t
    torch.testing.assert_close(actual[0].t(), expected)


def test_the_class_sum_form_of_the_positive_mean_holds():
    """(M2) of reference/positive_mean.py."""
    query, _, labels, _ = draw(False)
    mean, count = reference.positive_mean(
        query, query_labels=labels[:1], temperature=0.2, across=True
    )
    z = torch.nn.functional.normalize(query, dim=1).movedim(1, 2).flatten(0, 1)
    flat = labels[0].flatten()
    sums = torch.stack([z[flat == label].sum(0) for label in flat])
    expected = ((z * (sums - z)).sum(1) / 0.2 / count.flatten().clamp_min(1)).where(
        (flat != IGNORE) & (count.flatten() > 0), 0
    )
    torch.testing.assert_close(mean.flatten(), expected)
