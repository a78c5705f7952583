"""What the Gradient Filter promises beside its worked example: exactness whatever the data, the
rule and the list agree, full selections equal the plain loss, ignored pixels reach nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from op_checks import Calls, backends
from selection_checks import check_largest

import medcl_kernels as medcl
from medcl_kernels.losses.filter_statistics import problem_of
from medcl_kernels.ops.pair_filtered_grad import pair_filtered_grad
from medcl_kernels.ops.pair_topk import pair_topk
from medcl_kernels.reference.pair_gradients import pair_gradients, unit_of_rows

IMPLS = [one.id for one in backends() if not one.marks]


def described(
    x, labels, *, form="out", scope="global", score="pair", pairs="image", key=None, **said
):
    """The problem and what `pair_topk` takes of it."""
    problem = problem_of(
        x,
        key,
        labels,
        said.get("key_labels"),
        said.get("positives"),
        scope=scope,
        score=score,
        form=form,
        temperature=0.1,
        pairs=pairs,
        normalize=said.get("normalize", True),
        ignore_index=-100,
        impl=said.get("impl", "reference"),
    )
    one = next(problem.perspectives())
    options = problem.selection_options(one)
    options.pop("impl")
    return problem, one, options


def scores_of(problem, options):
    """R of all pairs and the number of the unit of each, `(G, N, Nk)`."""
    options = dict(options)
    scope = options.pop("scope")
    _, _, ranked, positive = pair_gradients(problem.query, problem.key, **options)
    unit = unit_of_rows(problem.query, scope, problem.across).unsqueeze(2).expand_as(ranked)
    return ranked, unit, positive


def select(problem, options, k, impl, capacity=None):
    capacity = int(k.sum()) if capacity is None else capacity
    return pair_topk(problem.query, problem.key, k=k, capacity=capacity, impl=impl, **options)


def pairs(result):
    """Selected pairs as a set."""
    used = result[0] >= 0
    return set(zip(result[0][used].tolist(), result[1][used].tolist(), strict=True))


def check_selection(problem, options, k, impl):
    """The list holds k pairs, none of which a pair left out exceeds; the rule says the same."""
    ranked, unit, positive = scores_of(problem, options)
    listed = select(problem, options, k, impl)
    rule = select(problem, options, k, impl, capacity=0)
    assert torch.equal(listed[3], rule[3]) and torch.equal(listed[4], rule[4])
    anchor, candidate = listed[0][listed[0] >= 0], listed[1][listed[0] >= 0]
    groups, n, width = ranked.shape
    assert (candidate // width == anchor // n).all() or groups == 1
    check_largest(ranked, unit, positive, k, anchor, candidate)
    return listed


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.float64), ("reference", torch.float64)],
)
@pytest.mark.parametrize("scope", ["global", "image", "anchor"])
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
def test_no_pair_left_out_exceeds_a_selected_one(impl, dtype, scope, form):
    length = 150 if scope != "anchor" else 40  # what is checked takes a loop over units
    x = torch.randn(2, 12, length, dtype=dtype)
    labels = torch.randint(0, 5, (2, length))
    labels[0, :9] = -100
    labels[1, 3] = 77  # a pixel without a positive
    for score in ("pair", "representation"):
        for across in ("image", "batch"):
            problem, one, options = described(
                x, labels, form=form, scope=scope, score=score, pairs=across
            )
            for keep in (40, 0.03, (0.1, 25)):
                k, _ = problem.quota(one, keep)
                check_selection(problem, options, k, impl)


@pytest.mark.parametrize("dim", [1, 3, 65, 256])
def test_any_number_of_channels(dim):
    x, labels = torch.randn(1, dim, 131), torch.randint(0, 4, (1, 131))
    problem, one, options = described(x, labels)
    check_selection(problem, options, problem.quota(one, 0.05)[0], "cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
@pytest.mark.parametrize("several", [1, 3])
def test_positives_by_index(impl, form, several):
    x, key = torch.randn(2, 8, 70), torch.randn(2, 8, 90)
    index = torch.stack([torch.randperm(90)[:several] for _ in range(140)]).reshape(2, 70, several)
    index[torch.rand(2, 70) < 0.2] = -1
    for across in ("image", "batch"):
        problem, one, options = described(
            x, None, key=key, positives=index, form=form, scope="image", pairs=across
        )
        for keep in (0.02, 0.3, (5, 40)):
            check_selection(problem, options, problem.quota(one, keep)[0], impl)


def outlier(row, n=500):
    """Pixels of which one is an anchor unlike all others, so that a sample may miss it."""
    x = torch.randn(n, 6)
    labels = torch.randint(0, 3, (n,))
    problem, one, options = described(x, labels)
    options["statistics"] = options["statistics"].clone()
    options["statistics"][0, 0, row] -= 9.0  # its softmax 8000 times that of the others
    return problem, options


def test_a_sample_that_misleads_changes_nothing():
    """The outlier's scores are all of the top: a sample may see none of them or too many."""
    for row in range(0, 16, 3):  # the sample takes one row of every four
        problem, options = outlier(row)
        for wanted in (3, 1500):
            k = torch.tensor([[wanted]])
            expected = select(problem, options, k, "reference")
            actual = select(problem, options, k, "cpu")
            assert len(pairs(expected) ^ pairs(actual)) <= 2  # a swap at the threshold
            rule = select(problem, options, k, "cpu", capacity=0)
            assert torch.equal(actual[3], rule[3]) and torch.equal(actual[4], rule[4])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scope", ["global", "image", "anchor"])
def test_equal_scores_go_to_the_smallest_index(impl, scope):
    """Rows that are equal or opposite: similarities are exact, and nearly all scores are tied."""
    signs = torch.where(torch.rand(2, 1, 90) < 0.5, -1.0, 1.0).double()
    x = signs.expand(2, 4, 90).contiguous()
    labels = torch.arange(90).expand(2, 90) % 5
    problem, one, options = described(x, labels, scope=scope, normalize=False)
    ranked, unit, _ = scores_of(problem, options)
    assert len(ranked.unique()) < 40
    for keep in (7, 500, 0.3):
        k, capacity = problem.quota(one, keep)
        expected = select(problem, options, k, "reference", capacity)
        actual = select(problem, options, k, impl, capacity)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        assert torch.equal(actual[4], expected[4])


def test_more_equal_scores_than_fit_in_a_list_are_counted_by_anchor():
    """2.25 million pairs of one score: the k-th is found without storing them."""
    n = 1501
    x = torch.ones(n, 2)
    labels = torch.zeros(n, dtype=torch.int64)
    labels[::2] = 1
    problem, _, options = described(x, labels)
    for wanted in (1, 1000, 1_000_003):
        k = torch.tensor([[wanted]])
        rule = select(problem, options, k, "cpu", capacity=0)
        listed = select(problem, options, k, "cpu")
        assert torch.equal(listed[4], rule[4]) and torch.equal(listed[3], rule[3])
        assert (listed[0] >= 0).sum() == wanted


@pytest.mark.parametrize("impl", IMPLS)
def test_more_than_there_are_is_all_of_them(impl):
    x, labels = torch.randn(2, 5, 20), torch.randint(0, 3, (2, 20))
    chosen = medcl.select_pairs(x, labels=labels, keep=10**9, impl=impl)
    assert len(chosen.anchor) == 2 * 20 * 19
    assert chosen.threshold.tolist() == [0, 0]
    assert torch.equal(chosen.anchor // 20, chosen.candidate // 20)
    one = medcl.select_pairs(x, labels=labels, keep=1, scope="global", impl=impl)
    assert one.anchor.shape == (1,) and one.threshold.shape == ()
    assert one.gradient.abs() == one.threshold


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("keep", [1.0, 10**9])
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
def test_keeping_everything_is_the_plain_loss(impl, keep, form):
    x = torch.randn(2, 6, 5, 6).requires_grad_()
    labels = torch.randint(0, 3, (2, 5, 6))
    options = {"form": form, "pairs": "image", "impl": impl}
    plain = medcl.supervised_contrastive(x, labels, **options)
    kept = medcl.filtered_contrastive(x, labels=labels, keep=keep, **options)
    wanted, given = (torch.autograd.grad(loss, x)[0] for loss in (plain, kept))
    if keep == 1.0:  # the plain loss itself
        assert torch.equal(kept, plain) and torch.equal(given, wanted)
    torch.testing.assert_close(kept, plain)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_keeping_everything_of_correspondences_is_info_nce(impl):
    q, k = torch.randn(2, 2, 6, 30).unbind(0)
    q.requires_grad_(), k.requires_grad_()
    index = medcl.dense_correspondence(q, k, mutual=True)
    plain = medcl.info_nce(q, k, index, impl=impl)
    for keep in (1.0, 10**9):
        kept = medcl.filtered_contrastive(q, k, positives=index, keep=keep, impl=impl)
        torch.testing.assert_close(kept, plain)
        given, wanted = (
            torch.autograd.grad(one, (q, k), retain_graph=True) for one in (kept, plain)
        )
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)
    same = medcl.filtered_contrastive(q, k, keep=5, impl=impl)  # equal positions
    torch.testing.assert_close(same, medcl.info_nce(q, k, impl=impl))


@pytest.mark.parametrize("mode", ["self", "key", "index"])
@pytest.mark.parametrize("form", ["out", "in", "pixel"])
def test_the_rule_and_the_list_give_one_gradient(mode, form):
    x, key = torch.randn(2, 9, 300), torch.randn(2, 9, 170)
    labels, key_labels = torch.randint(0, 4, (2, 300)), torch.randint(0, 4, (2, 170))
    said = {"labels": labels}
    if mode == "key":
        said |= {"key": key, "key_labels": key_labels}
    elif mode == "index":
        said |= {"labels": None, "key": key, "positives": torch.randint(-1, 170, (2, 300))}
    problem, one, options = described(x, form=form, pairs="batch", **said)
    k, capacity = problem.quota(one, 0.05)
    found = select(problem, options, k, "cpu", capacity)
    results = []
    for chosen in (
        {"threshold": found[3], "cut": found[4]},
        {"anchor": found[0], "candidate": found[1], "gradient": found[2]},
    ):
        leaves = [x.clone().requires_grad_()]
        if mode != "self":
            leaves.append(key.clone().requires_grad_())
        value = pair_filtered_grad(one.value, *leaves, **chosen, **options, impl="cpu")
        assert torch.equal(value, one.value)
        results.append(
            torch.autograd.grad(value, leaves, torch.linspace(0.2, 1.5, 600).reshape(2, 300))
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_pixels_reach_nothing(impl):
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, 1, 2] = labels[1, 0, 0] = -100
    clean = torch.randn(2, 6, 4, 5)
    results = []
    for filling in (0.0, torch.nan, 7.0):
        x = clean.masked_fill((labels == -100).unsqueeze(1), filling).requires_grad_()
        for scope in ("image", "global", "anchor"):
            chosen = medcl.select_pairs(x, labels=labels, keep=9, scope=scope, impl=impl)
            loss = medcl.filtered_contrastive(x, labels=labels, keep=9, scope=scope, impl=impl)
            results.append((*chosen, loss.detach(), *torch.autograd.grad(loss, x)))
    for filled in (results[3:6], results[6:]):
        for one, other in zip(results[:3], filled, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("use", ["mask_grad", "renorm", "recompute", "pos_full_den"])
def test_without_anchors_the_loss_is_a_connected_zero(impl, use):
    x = torch.randn(2, 6, 3, 4, requires_grad=True)
    for labels in (torch.full((2, 3, 4), -100), torch.arange(24).reshape(2, 3, 4)):
        loss = medcl.filtered_contrastive(x, labels=labels, use=use, impl=impl)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss == 0 and (gradient == 0).all()
        chosen = medcl.select_pairs(x, labels=labels, impl=impl)
        assert len(chosen.anchor) == 0 and chosen.threshold.isinf().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_pixels_in_another_order_give_the_same_pairs(impl):
    x, labels = torch.randn(60, 8).double(), torch.randint(0, 4, (60,))
    order = torch.randperm(60)
    first = medcl.select_pairs(x, labels=labels, keep=50, impl=impl)
    second = medcl.select_pairs(x[order], labels=labels[order], keep=50, impl=impl)
    moved = set(zip(order[second.anchor].tolist(), order[second.candidate].tolist(), strict=True))
    assert moved == pairs(first)


@pytest.mark.parametrize("impl", IMPLS)
def test_perspectives_select_for_themselves(impl):
    x = torch.randn(1, 6, 40, requires_grad=True)
    maps = list(torch.randint(0, 3, (3, 1, 40)))
    together = medcl.filtered_contrastive(x, labels=maps, keep=20, impl=impl)
    assert together.shape == (3,)
    alone = [medcl.filtered_contrastive(x, labels=one, keep=20, impl=impl) for one in maps]
    torch.testing.assert_close(together, torch.stack(alone))
    for m in range(3):
        a, b = (
            torch.autograd.grad(one, x, retain_graph=True)[0] for one in (together[m], alone[m])
        )
        torch.testing.assert_close(a, b)
    chosen = medcl.select_pairs(x, labels=maps, keep=20, impl=impl)
    assert len(chosen) == 3 and pairs(chosen[0]) != pairs(chosen[1])


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(threads):
    x, labels = torch.randn(900, 10), torch.randint(0, 4, (900,))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            for keep in (0.002, 0.2):
                leaf = x.clone().requires_grad_()
                loss = medcl.filtered_contrastive(leaf, labels=labels, keep=keep, impl="cpu")
                (gradient,) = torch.autograd.grad(loss, leaf)
                chosen = medcl.select_pairs(x, labels=labels, keep=keep, impl="cpu")
                results.append((loss.detach(), gradient, *chosen))
    finally:
        torch.set_num_threads(before)
    for again in (results[2:4], results[4:]):
        for one, other in zip(results[:2], again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("use", "form"),
    [
        (use, form)
        for use in ("mask_grad", "renorm", "recompute", "pos_full_den")
        for form in ("out", "in", "pixel")
        if (use, form) != ("pos_full_den", "pixel")  # there is no such loss
    ],
)
def test_no_sum_over_selected_pairs_leaves_the_order_to_the_device(use, form):
    """At repeated indices torch adds in any order on a GPU, and `index_put` on CPU threads too."""
    x, labels = torch.randn(60, 5, requires_grad=True), torch.arange(60) % 3
    for keep in (400, (30, 200)):
        with Calls() as calls:
            loss = medcl.filtered_contrastive(
                x, labels=labels, keep=keep, use=use, form=form, impl="cpu"
            )
            loss.backward()
        unordered = ("index_add", "scatter_add", "put", "embedding_dense_backward")
        assert calls.count and not [n for n in calls.count if any(one in n for one in unordered)]


@pytest.mark.parametrize("form", ["out", "pixel"])
def test_one_class_only_has_nothing_to_push_apart(form):
    """Every pair is positive: "pixel" has no negatives at all and loss 0, "out" spreads evenly."""
    x = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(40, dtype=torch.int64)
    for impl in IMPLS:
        loss = medcl.filtered_contrastive(x, labels=labels, keep=1.0, form=form, impl=impl)
        few = medcl.filtered_contrastive(x, labels=labels, keep=9, form=form, impl=impl)
        (gradient,) = torch.autograd.grad(few, x)
        torch.testing.assert_close(few, loss)
        assert gradient.isfinite().all()
        if form == "pixel":
            assert abs(loss) < 1e-9 and not gradient.any()
        else:
            plain = medcl.supervised_contrastive(x, labels, impl="reference")
            torch.testing.assert_close(few, plain)


@pytest.mark.slow
def test_row_numbers_beyond_46341_do_not_overflow():
    """N * N exceeds 31 bits: anchors at the very end are found, and their place is right."""
    n = 46_400
    x, key = torch.zeros(n, 2), torch.zeros(n, 2)
    x[:, 0] = key[:, 0] = 1.0
    index = torch.full((n,), -1)
    index[-3:] = torch.tensor([n - 1, 0, n - 2])
    key[-1] = torch.tensor([-1.0, 0.0])
    problem, one, options = described(x, None, key=key, positives=index, impl="cpu")
    k = torch.tensor([[3]])
    listed = select(problem, options, k, "cpu")
    assert listed[0].tolist() == [n - 3, n - 2, n - 1]
    assert listed[1].tolist() == [n - 1, 0, n - 2]
    rule = select(problem, options, k, "cpu", capacity=0)
    assert torch.equal(rule[4], listed[4]) and rule[4].item() > 2**31
    leaf = problem.query.clone().requires_grad_()
    value = pair_filtered_grad(
        one.value, leaf, problem.key, threshold=rule[3], cut=rule[4], impl="cpu", **options
    )
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert gradient.isfinite().all()


MEMORY = """
import resource, torch, medcl_kernels as medcl
torch.manual_seed(0)
for n in (512, 8192, 16384, 32768):
    x, labels = torch.randn(n, 8, requires_grad=True), torch.randint(0, 4, (n,))
    for keep in (0.1, 2**18):  # by the rule, by the list
        medcl.filtered_contrastive(x, labels=labels, keep=keep, impl="cpu").backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs():
    """67, 268 and 1074 million pairs, of which a tenth or 2**18 are selected; the matrices would be
    0.27, 1.07 and 4.3 GB, a tenth of the pairs as a list 0.13, 0.54 and 2.1 GB."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    few, *peaks = map(int, run.stdout.split()[1:])  # kB; the mark only rises
    by_rule, listed = peaks[::2], peaks[1::2]
    assert by_rule[0] - few < 30_000 and listed[0] - by_rule[0] < 30_000
    for before, rule, some in zip(listed, by_rule[1:], listed[1:], strict=False):
        assert rule - before < 10_000 and some - rule < 10_000


def test_second_derivatives_are_refused_by_the_kernels():
    x, labels = torch.randn(30, 4, requires_grad=True), torch.randint(0, 2, (30,))
    for keep in (5, 0.9):
        loss = medcl.filtered_contrastive(x, labels=labels, keep=keep, impl="cpu")
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match='impl="reference"'):
            torch.autograd.grad(gradient.square().sum(), x)
