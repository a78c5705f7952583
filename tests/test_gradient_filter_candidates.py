"""Candidates of the Gradient Filter, undirected pairs and attracted ones only, and the magnitude
that "renorm" restores: each against the whole matrix of gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from op_checks import backends
from selection_checks import check_largest

import medcl_kernels as medcl
from medcl_kernels.losses import filter_magnitude, filter_refinement
from medcl_kernels.losses.filter_magnitude import total_magnitude
from medcl_kernels.losses.filter_refinement import listing
from medcl_kernels.losses.filter_statistics import problem_of
from medcl_kernels.reference.pair_gradients import pair_gradients, unit_of_rows

IMPLS = [one.id for one in backends() if not one.marks]


def problem_with(x, labels, impl, *, direction="directed", pos_sign="any", **said):
    """A problem, its perspective, and of all pairs scores, gradients, positives and units."""
    options = {"scope": "image", "score": "pair", "form": "out", "pairs": "image"} | said
    key, positives = options.pop("key", None), options.pop("positives", None)
    problem = problem_of(
        x,
        key,
        labels,
        options.pop("key_labels", None),
        positives,
        **options,
        temperature=0.1,
        normalize=True,
        ignore_index=-100,
        impl=impl,
        direction=direction,
        pos_sign=pos_sign,
    )
    one = next(problem.perspectives())
    plain = {k: v for k, v in problem.selection_options(one).items() if k not in ("impl", "scope")}
    _, gradient, ranked, positive = pair_gradients(problem.query, problem.key, **plain)
    if direction == "undirected":
        gradient = (gradient + gradient.transpose(1, 2)).triu(1)
        ranked = gradient.abs()
    if pos_sign == "attract_only":
        ranked = torch.where(positive & (gradient > 0), 0.0, ranked)
    unit = unit_of_rows(problem.query, problem.scope, problem.across).unsqueeze(2)
    return problem, one, ranked, gradient, positive, unit.expand_as(ranked)


def check(problem, one, keep, ranked, positive, unit):
    """The list holds the k largest of every cell."""
    k, _ = problem.quota(one, keep)
    found = listing(problem, one, keep)
    cells = check_largest(ranked, unit, positive, k, found.anchor, found.candidate)
    for c, u, inside, outside in cells:
        limit = found.threshold[c, u]
        if len(inside) and len(outside):
            torch.testing.assert_close(inside.min(), limit.to(inside.dtype), rtol=1e-4, atol=0)
        elif len(inside):
            assert limit <= inside.min() * (1 + 1e-5)
    return found


def drawn(dtype=torch.float64, length=60):
    """Features in clusters, so that many positives are more similar than their share."""
    labels = torch.randint(0, 4, (2, length))
    x = torch.randn(2, 8, length, dtype=dtype)
    x += 2 * torch.randn(8, 4, dtype=dtype)[:, labels].movedim(0, 1)
    labels[0, :5] = -100
    labels[1, 3] = 77  # no positive: a candidate that is no anchor
    return x, labels


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
@pytest.mark.parametrize(
    ("scope", "pairs"), [("image", "image"), ("global", "image"), ("global", "batch")]
)
def test_undirected_pairs_with_the_largest_sum(impl, form, scope, pairs):
    x, labels = drawn()
    for sign in ("any", "attract_only"):
        options = {"form": form, "scope": scope, "pairs": pairs, "pos_sign": sign}
        problem, one, ranked, gradient, positive, unit = problem_with(
            x, labels, impl, direction="undirected", **options
        )
        for keep in (1, 70, 0.1, (9, 30), (0, 0.2), 10**6):
            found = check(problem, one, keep, ranked, positive, unit)
            wanted = gradient[found.anchor // 60 if pairs == "image" else 0,
                              found.anchor % 60 if pairs == "image" else found.anchor,
                              found.candidate % ranked.shape[2]]  # fmt: skip
            torch.testing.assert_close(found.gradient, wanted)
            torch.testing.assert_close(found.parts.sum(0), wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scope", ["image", "global", "anchor"])
@pytest.mark.parametrize("mode", ["self", "sine", "key", "index"])
def test_attracted_pairs_only(impl, scope, mode):
    x, labels = drawn()
    said = {"scope": scope, "pos_sign": "attract_only"}
    if mode == "sine":
        said |= {"score": "representation"}
    elif mode == "key":
        key, key_labels = drawn()
        said |= {"key": key, "key_labels": key_labels, "pairs": "batch"}
    elif mode == "index":
        index = torch.arange(60).reshape(1, 60, 1) + torch.tensor([0, 7, 9])  # itself and others
        index = torch.where(index > 59, -1, index).repeat(2, 1, 1)
        said |= {"key": x + 0.1 * torch.randn_like(x), "positives": index}
        labels = None
    problem, one, ranked, gradient, positive, unit = problem_with(x, labels, impl, **said)
    assert (positive & (gradient > 0)).sum() > 10
    for keep in (3, 0.1, (4, 9), 10**6):
        check(problem, one, keep, ranked, positive, unit)


def test_a_list_that_is_too_short_at_first_grows_until_it_is_exact(monkeypatch):
    """One pixel's row is so sharp that its directed scores fill every first list, while the largest
    undirected pairs, sums of two middling ones, lie elsewhere."""
    x, labels = drawn(length=80)
    problem, one, *_ = problem_with(x[:1], labels[:1], "cpu", direction="undirected")
    one.statistics[0, 0, 40] -= 4.0  # its softmax 55 times that of the others
    plain = {k: v for k, v in problem.selection_options(one).items() if k not in ("impl", "scope")}
    _, gradient, _, positive = pair_gradients(problem.query, problem.key, **plain)
    sums = (gradient + gradient.transpose(1, 2)).triu(1).abs()
    lists, made = [], filter_refinement.pair_topk
    monkeypatch.setattr(
        filter_refinement, "pair_topk", lambda *a, **o: lists.append(o["capacity"]) or made(*a, **o)
    )
    for keep in (5, 100, 400):
        check(problem, one, keep, sums, positive, torch.zeros_like(sums, dtype=torch.int64))
    assert len(lists) > 3 and max(lists) < 80 * 79


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_sums_go_to_the_smallest_index(impl):
    labels = torch.arange(40) % 4
    x = torch.ones(40, 3, dtype=torch.float64)
    chosen = medcl.select_pairs(x, labels=labels, keep=17, direction="undirected", impl=impl)
    # every positive has the gradient 1/39 - 1/9, every negative 1/39
    same = (labels[:, None] == labels).triu(1).nonzero()[:17]
    assert torch.equal(torch.stack([chosen.anchor, chosen.candidate], 1), same)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
@pytest.mark.parametrize("mode", ["self", "batch", "key", "index"])
def test_the_magnitude_of_all_pairs(impl, form, mode, monkeypatch):
    monkeypatch.setattr(filter_magnitude, "SLICE", 300)  # several slices
    x, labels = drawn()
    said = {"form": form, "pairs": "batch" if mode == "batch" else "image"}
    if mode == "key":
        key, key_labels = drawn()
        said |= {"key": key, "key_labels": key_labels}
    elif mode == "index":
        said |= {"key": x + torch.randn_like(x), "positives": torch.randint(-1, 60, (2, 60))}
        labels = None
    directions = ["directed"] if mode in ("key", "index") else ["directed", "undirected"]
    for direction in directions:
        for sign in ("any", "attract_only"):
            options = said | {"pos_sign": sign, "direction": direction, "scope": "global"}
            problem, one, ranked, *_ = problem_with(x, labels, impl, **options)
            torch.testing.assert_close(total_magnitude(problem, one), ranked.sum())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("use", ["mask_grad", "renorm", "recompute", "pos_full_den"])
def test_keeping_all_undirected_pairs_is_keeping_all_pairs(impl, use):
    x, labels = drawn()
    found = []
    for direction in ("directed", "undirected"):
        leaf = x.clone().requires_grad_()
        options = {"labels": labels, "keep": 10**9, "use": use, "reduction": "none", "impl": impl}
        values = medcl.filtered_contrastive(leaf, direction=direction, **options)
        values.backward(torch.linspace(0.5, 2, 120).reshape(2, 60).double())  # anchors differ
        found.append((values.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1])


def test_renorm_by_rule_and_by_list_is_one_gradient(monkeypatch):
    x, labels = drawn(torch.float32)
    found = []
    for most in (0, 10**9):
        monkeypatch.setattr("medcl_kernels.losses.gradient_filter.LISTED_PER_ANCHOR", most)
        leaf = x.clone().requires_grad_()
        medcl.filtered_contrastive(leaf, labels=labels, use="renorm").backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "both"}, "'directed', 'undirected'"),
        ({"pos_sign": "attract"}, "'any', 'attract_only'"),
        ({"direction": "undirected", "key": True}, "give labels= and no key="),
        ({"direction": "undirected", "score": "representation"}, "score='pair'"),
        ({"direction": "undirected", "scope": "anchor"}, "scope='global'"),
        ({"direction": "undirected", "pairs": "batch"}, "would belong to both"),
    ],
    ids=lambda one: "-".join(map(str, one.values())) if isinstance(one, dict) else "",
)
def test_candidates_that_have_no_meaning_are_refused(change, message):
    x, labels = drawn()
    if change.pop("key", None):
        change = change | {"key": x, "key_labels": labels}
    with pytest.raises(ValueError, match=message):
        medcl.select_pairs(x, labels=labels, **change)


def test_a_traced_selection_of_data_dependent_length_is_refused():
    x, labels = drawn(torch.float32)
    for change in ({"direction": "undirected"}, {"pos_sign": "attract_only"}, {"use": "renorm"}):
        loss = partial(medcl.filtered_contrastive, labels=labels, **change)
        with pytest.raises(ValueError, match="call the loss outside of them"):
            torch.func.vmap(loss)(x.unsqueeze(0))
