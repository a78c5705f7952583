"""Every operation and case of the registry on the CPU backends against the reference in float64.

Backends of a GPU round the operands of their products: test_gpu_ops.py judges those.
"""

from __future__ import annotations

import pytest
import torch
from op_checks import OUTPUTS, backends, check_op, need, run, upstream

from medcl_kernels import dispatch
from medcl_kernels.layout import label_rows, num_rows, row_shape, rows
from medcl_kernels.registry import SPECS, spec

OPS = tuple(one for one in SPECS if one.kind == "op")
WITHOUT_GRADIENT = ("pair_argmax", "pair_topk", "mitigate_rows", "patch_class_ratio")
DIFFERENTIABLE = tuple(one for one in OPS if one.name not in WITHOUT_GRADIENT)
# The reference judges itself, so one case per operation shows that impl="reference" reaches it.
CASES = [
    pytest.param(
        one, case, dtype, impl, device, id=f"{one.name}-{case.name}-{str(dtype)[6:]}-{impl}"
    )
    for one in OPS
    for case in one.cases
    for dtype in case.dtypes
    for impl, device in (parameter.values for parameter in backends() if not parameter.marks)
    if impl != "reference" or case is one.cases[0]
]
FUSED = [parameter for parameter in backends() if parameter.id != "reference"]


def small(name):
    """A ragged float32 case of every operation with several tiles of rows."""
    one = spec(name)
    return one, next(case for case in one.cases if case.name.removeprefix("key_") == "ragged")


def test_the_compiled_library_is_there():
    """Without it every C++ test below would be skipped: that must not look like success."""
    assert dispatch.available()["cpu"] is None


@pytest.mark.parametrize(("one", "case", "dtype", "impl", "device"), CASES)
def test_op_is_as_exact_as_plain_torch(one, case, dtype, impl, device):
    need(one.name, impl, device, dtype)
    check_op(one, case, dtype, impl, device)


@pytest.mark.parametrize("one", DIFFERENTIABLE, ids=lambda one: one.name)
@pytest.mark.parametrize(("impl", "device"), FUSED)
def test_gradients_that_are_not_asked_for_change_nothing(one, impl, device):
    """Each leaf alone gets the bits that it gets together with the others."""
    need(one.name, impl, device, torch.float32)
    names = OUTPUTS.get(one.name, ("value",))
    for case in one.cases:
        if case.name not in ("ragged", "key_ragged", "key_batch", "key_two_maps"):
            continue
        sample = one.sample(case, torch.float32, device)
        together = run(one.resolve(), sample, names, impl=impl)
        for alone in sample.differentiable:
            again = sample.copy()
            for name, leaf in again.differentiable.items():
                leaf.requires_grad_(name == alone)
            outputs = one.resolve()(*again.args, **again.kwargs, impl=impl)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            values = [value for value in outputs if value.requires_grad]
            leaf = again.differentiable[alone]
            (gradient,) = torch.autograd.grad(values, leaf, [upstream(value) for value in values])
            assert torch.equal(gradient, together[f"d_{alone}"]), f"d_{alone} of {case.name}"


@pytest.mark.parametrize("one", DIFFERENTIABLE, ids=lambda one: one.name)
@pytest.mark.parametrize(("impl", "device"), FUSED)
def test_without_gradients_the_values_are_the_same(one, impl, device):
    need(one.name, impl, device, torch.float32)
    _, case = small(one.name)
    sample = one.sample(case, torch.float32, device)

    def values():
        outputs = one.resolve()(*sample.args, **sample.kwargs, impl=impl)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    with_grad = values()
    assert with_grad[0].requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for left, right in zip(values(), with_grad, strict=True):
                assert not left.requires_grad
                torch.testing.assert_close(left, right.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("one", DIFFERENTIABLE, ids=lambda one: one.name)
def test_float64_gradients_agree_with_finite_differences(one):
    for case in one.cases:
        if case.name.removeprefix("key_") not in ("two_rows", "two_maps", "several"):
            continue
        sample = one.sample(case, torch.float64)
        names = list(sample.differentiable)

        def function(*leaves, names=names, sample=sample):
            args, kwargs = sample.build(dict(zip(names, leaves, strict=True)))
            outputs = one.resolve()(*args, **kwargs, impl="cpu")
            value = outputs[0] if isinstance(outputs, tuple) else outputs
            return torch.where(value.isinf(), 0.0, value)

        leaves = tuple(sample.differentiable.values())
        many = sum(leaf.numel() for leaf in leaves) > 100
        assert torch.autograd.gradcheck(function, leaves, fast_mode=many), case.name


@pytest.mark.parametrize("one", DIFFERENTIABLE, ids=lambda one: one.name)
def test_a_second_derivative_is_right_in_the_reference_and_refused_by_kernels(one):
    _, case = small(one.name)
    sample = one.sample(case, torch.float32)

    def penalty(impl):
        outputs = one.resolve()(*sample.args, **sample.kwargs, impl=impl)
        value = outputs[0] if isinstance(outputs, tuple) else outputs
        leaf = sample.differentiable.get("query", sample.differentiable.get("logits"))
        finite = torch.where(value.isinf(), 0.0, value)
        (gradient,) = torch.autograd.grad(finite.sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    assert penalty("reference").isfinite().all()
    with pytest.raises(RuntimeError, match='impl="reference"'):
        penalty("cpu")


@pytest.mark.parametrize("one", OPS, ids=lambda one: one.name)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(one, threads):
    names = OUTPUTS.get(one.name, ("value",))
    cases = ("ragged", "key_ragged", "batch", "key_batch", "ragged_same", "key_several")
    before = torch.get_num_threads()
    try:
        for case in one.cases:
            if case.name not in cases:
                continue
            sample = one.sample(case, torch.float32)
            torch.set_num_threads(1)
            first = run(one.resolve(), sample, names, impl="cpu")
            torch.set_num_threads(threads)
            for _ in range(3):
                again = run(one.resolve(), sample.copy(), names, impl="cpu")
                for name, value in first.items():
                    assert torch.equal(value, again[name]), f"{name} of {case.name}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_ties_go_to_the_smallest_index(impl):
    """Integers make the similarities exact, so equal ones are equal in every arithmetic."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (3, 4, 211), generator=generator).float()
    key = torch.randint(-2, 3, (3, 4, 503), generator=generator).float()
    index, value = spec("pair_argmax").resolve()(query, key, normalize=False, impl=impl)
    scores = query.transpose(1, 2) @ key
    best = scores.amax(2)
    assert torch.equal(value, best)
    first = (scores == best.unsqueeze(2)).int().argmax(2)
    assert (scores == best.unsqueeze(2)).sum(2).max() > 1
    assert torch.equal(index, first)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_vmap_equals_a_loop(impl):
    query, key = torch.randn(4, 2, 8, 30), torch.randn(4, 2, 8, 20)
    labels = torch.randint(0, 3, (4, 1, 2, 30))
    lse = spec("pair_logsumexp").resolve()
    mean = spec("positive_mean").resolve()

    def function(q, k, y):
        options = {"temperature": 0.2, "impl": impl}
        same = mean(q, query_labels=y, **options)[0]
        return lse(q, k, **options) + same

    expected = torch.stack([function(*slices) for slices in zip(query, key, labels, strict=True)])
    actual = torch.vmap(function)(query, key, labels)
    torch.testing.assert_close(actual, expected)
    shared = torch.vmap(function, in_dims=(0, None, None))(query, key[0], labels[0])
    torch.testing.assert_close(shared[0], expected[0])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_leaves_an_operation_in_the_dtype_of_its_input(low):
    query = torch.randn(1, 8, 40, requires_grad=True)
    lse = spec("pair_logsumexp").resolve()
    outside = lse(query, temperature=0.1, impl="cpu")
    with torch.autocast("cpu", low):
        inside = lse(query, temperature=0.1, impl="cpu")
        narrow = lse(query.to(low), temperature=0.1, impl="cpu")
    assert torch.equal(inside, outside)
    assert narrow.dtype == torch.float32
    (gradient,) = torch.autograd.grad(inside.sum(), query)
    assert gradient.dtype == torch.float32


def test_half_precision_gradients_survive_a_large_loss_scale():
    """A GradScaler multiplies the loss by 65536: gradients grow by that, finite."""
    index = torch.randint(0, 300, (1, 300))
    weight = torch.full((1, 300), 1 / 300)
    function = spec("info_nce_sum").resolve()
    gradients = []
    for factor in (1.0, 65536.0):
        torch.manual_seed(1)
        query = torch.randn(1, 16, 300).half().requires_grad_()
        key = torch.randn(1, 16, 300).half()
        value = function(query, key, index, weight, temperature=0.1, impl="cpu")[0] * factor
        (gradient,) = torch.autograd.grad(value, query)
        assert gradient.isfinite().all()
        gradients.append(gradient.double() / factor)
    exact = query.detach().double().requires_grad_()
    value, _ = function(
        exact, key.double(), index, weight.double(), temperature=0.1, impl="reference"
    )
    (truth,) = torch.autograd.grad(value, exact)
    # Scaled, so that nothing underflows: one rounding to float16 (eps = 2**-10).
    torch.testing.assert_close(gradients[1], truth, rtol=2**-10, atol=2**-11 * truth.abs().max())


def overflow_rows():
    """46,500**2 exceeds 2**31: a 32-bit pair index would wrap."""
    n = 46_500
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 3, n, generator=generator)
    key = torch.randn(1, 3, n, generator=generator)
    chosen = torch.tensor([0, 1, 23_249, 46_340, 46_341, 46_499])
    return n, query, key, chosen


def unit(x):
    return torch.nn.functional.normalize(x.double(), dim=1)[0].t()


@pytest.mark.slow
@pytest.mark.parametrize("against_key", [False, True], ids=["self", "key"])
def test_more_pairs_than_a_32_bit_index_holds(against_key):
    import resource

    n, query, key, chosen = overflow_rows()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    query.requires_grad_()
    lse = spec("pair_logsumexp").resolve()(
        query, key if against_key else None, temperature=0.5, impl="cpu"
    )
    picked = torch.zeros(n)
    picked[chosen] = 1.0
    (gradient,) = torch.autograd.grad(lse[0, 0], query, picked)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024, f"{grown / 1024:.0f} MiB for N * D = 0.5 MiB: is N * N stored?"

    z = unit(query.detach())
    k = unit(key) if against_key else z
    scores = z[chosen] @ k.t() / 0.5
    if not against_key:
        scores[torch.arange(len(chosen)), chosen] = -torch.inf
    torch.testing.assert_close(lse[0, 0, chosen].double(), scores.logsumexp(1), rtol=1e-6, atol=0)
    # (P4) and (P5) of reference/pairs.py; in self mode every row is also a candidate of the chosen.
    p = scores.softmax(1)
    d_z = torch.zeros_like(z)
    d_z[chosen] = p @ k / 0.5
    if not against_key:
        d_z += p.t() @ z[chosen] / 0.5
    norm = query.detach().double().norm(dim=1)[0].unsqueeze(1)
    expected = (d_z - z * (z * d_z).sum(1, keepdim=True)) / norm
    # The mean of so many directions is almost parallel to z, and (P5) removes that part: the error
    # is measured against what was there before.
    error = (gradient[0].t().double() - expected) * norm
    assert error.abs().max() < 2e-6 * d_z.abs().max()


@pytest.mark.slow
def test_argmax_and_info_nce_beyond_a_32_bit_pair_index():
    n, query, key, chosen = overflow_rows()
    index, value = spec("pair_argmax").resolve()(query, key, impl="cpu")
    z, k = unit(query), unit(key)
    best, where = (z[chosen] @ k.t()).max(1)
    torch.testing.assert_close(value[0, chosen].double(), best, rtol=1e-6, atol=0)
    reached = (z[chosen] * k[index[0, chosen]]).sum(1)
    torch.testing.assert_close(reached, best, rtol=1e-6, atol=0)
    weight = torch.zeros(1, n)
    weight[0, chosen] = 1.0
    total, _ = spec("info_nce_sum").resolve()(
        query, key, index, weight, temperature=0.5, impl="cpu"
    )
    expected = ((z[chosen] @ k.t() / 0.5).logsumexp(1) - reached / 0.5).sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("shape", "change", "view"),
    [
        ((2, 5, 3, 4), lambda x: x, True),
        ((2, 5, 3, 4), lambda x: x.to(memory_format=torch.channels_last), True),
        ((2, 5, 2, 3, 4), lambda x: x, True),
        ((2, 9, 3, 4), lambda x: x[:, ::2], True),
        ((2, 5, 12), lambda x: x, True),
        ((7, 5), lambda x: x, True),
        ((2, 5, 3, 4), lambda x: x.transpose(2, 3), False),
    ],
    ids=["nchw", "channels_last", "ncdhw", "channel_slice", "ncl", "flat", "transposed"],
)
def test_rows_are_a_view_wherever_spatial_strides_merge(shape, change, view):
    x = change(torch.randn(shape))
    r = rows(x)
    assert r.dim() == 3 and r.shape[1] == x.shape[1]
    assert (r.data_ptr() == x.data_ptr()) == view
    assert num_rows(x) == (r.shape[0], r.shape[2])
    flat = x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])
    assert torch.equal(r.transpose(1, 2).reshape(-1, x.shape[1]), flat)
    labels = torch.arange(flat.shape[0]).reshape(row_shape(x))
    assert label_rows(labels, x).flatten().tolist() == list(range(flat.shape[0]))


def test_records_of_the_registry_are_complete():
    """Needed FLOPs by the definition of one pass u = N * N * D: 6u for one tensor, 8u for two."""
    assert {one.name for one in OPS} == set(dispatch.OPERATIONS)
    for one in SPECS:
        assert callable(one.resolve()) and callable(one.resolve_reference()) and one.summary
        names = [case.name for case in one.cases]
        assert len(names) == len(set(names)), f"{one.name}: a case name is used twice"
        assert all(case.reason for case in one.cases), one.name
    unit = 8192 * 8192 * 64
    for name, self_mode in (("supervised_contrastive", True), ("info_nce", False)):
        one = spec(name)
        for case in one.benchmarks:
            if case.name.startswith("8192x64"):
                assert one.flops(case) == (6 if self_mode else 8) * unit, case.name
                tensors = 2 if self_mode else 4  # inputs and gradients
                assert one.bytes(case) >= tensors * 8192 * 64 * 4
    with pytest.raises(KeyError, match="pair_logsumexp"):
        spec("nothing")
