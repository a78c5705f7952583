"""What a GPU adds to being right: streams, graphs, autocast, compilation, the same bits every time,
sizes past 32 bits, devices. Each test runs on the CPU too where it can (gpu_targets.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from gpu_targets import TARGETS, Captured, keep_busy, peak_memory, side_stream
from op_checks import OUTPUTS, need, run

import medcl_kernels as medcl
from medcl_kernels.registry import spec

OPS = (
    "pair_logsumexp",
    "pair_positive_log",
    "positive_mean",
    "positive_at",
    "pair_argmax",
    "pair_affinity",
    "uncertainty_reweight",
    "pair_topk",
    "pair_filtered_grad",
    "pair_at",
    "mitigate_rows",
    "patch_class_ratio",
)
# losses that add up by themselves what an operation gives them, in their cases besides "ragged"
SUMMED = {
    "filtered_contrastive": (
        "ragged", "renorm", "recompute", "full_denominator", "undirected", "attract_only"
    ),
    "mitigated_contrastive": ("ragged", "cagrad"),
}  # fmt: skip
F32, BF16 = torch.float32, torch.bfloat16
targets = pytest.mark.parametrize(("impl", "device"), TARGETS)


def named(name: str, *words: str):
    """The first case of one of these names, with or without a key."""
    one = spec(name)
    return one, next(case for case in one.cases if case.name.removeprefix("key_") in words)


def ragged(name: str):
    """A case with several tiles of rows, the last one incomplete."""
    return named(name, "ragged", "two_flat")


def numbers(sample) -> dict[str, torch.Tensor]:
    """What a sample's results are made of: its features, or the label map that comes alone."""
    return sample.differentiable or {"labels": sample.args[0]}


def pixels(device: str, dtype: torch.dtype = F32, seed: int = 0):
    """Two views `(2, 32, 12, 13)` and labels with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 32, 12, 13, generator=generator).to(device, dtype).unbind(0)
    labels = torch.randint(-1, 3, (2, 12, 13), generator=generator).to(device)
    return query.clone().requires_grad_(), key.clone().requires_grad_(), labels


def both_losses(query, key, labels, impl):
    """A supervised and an InfoNCE loss, as one number."""
    options = {"impl": impl, "temperature": 0.2}
    supervised = medcl.supervised_contrastive(query, labels, ignore_index=-1, **options)
    return supervised + medcl.info_nce(query, key, **options)


def need_losses(impl: str, device: str, dtype: torch.dtype = F32) -> None:
    for name in ("info_nce", "supervised_contrastive"):
        need(name, impl, device, dtype)


def step(query, key, labels, impl):
    """Value and gradients."""
    loss = both_losses(query, key, labels, impl)
    return loss.detach(), *torch.autograd.grad(loss, (query, key))


@pytest.mark.parametrize("name", OPS)
@targets
def test_work_on_another_stream_waits_for_what_came_before(name, impl, device):
    """The input arrives late on the current stream: a kernel on any other would read NaN, or
    labels that are all 0."""
    one, case = ragged(name)
    need(name, impl, device, F32)
    names = OUTPUTS.get(name, ("value",))
    expected = run(one.resolve(), one.sample(case, F32, device), names, impl=impl)
    late = one.sample(case, F32, device)
    arrives = {leaf: tensor.detach().clone() for leaf, tensor in numbers(late).items()}
    with torch.no_grad():
        for tensor in numbers(late).values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    if device == "cuda":
        torch.cuda.synchronize()
    with side_stream(device):
        keep_busy(device)
        with torch.no_grad():
            for leaf, tensor in numbers(late).items():
                tensor.copy_(arrives[leaf])
        found = run(one.resolve(), late, names, impl=impl)
        if device == "cuda":
            done = torch.cuda.Event()
            done.record()
    if device == "cuda":
        torch.cuda.current_stream().wait_event(done)
    for what, value in expected.items():
        assert torch.equal(found[what], value), what


@targets
def test_a_step_can_be_captured_and_replayed(impl, device):
    need_losses(impl, device)
    query, key, labels = pixels(device)
    captured = Captured(lambda: step(query, key, labels, impl), device)
    for seed in (1, 2):
        fresh = pixels(device, seed=seed)
        with torch.no_grad():
            for tensor, new in zip((query, key, labels), fresh, strict=True):
                tensor.copy_(new)
        replayed = captured.replay()
        for found, expected in zip(replayed, step(*fresh, impl), strict=True):
            assert torch.equal(found, expected)


@targets
def test_a_step_of_patches_can_be_captured_and_replayed(impl, device):
    """Shares of windows, gate and contrast: nothing asks the host what labels hold."""
    for name in ("patch_class_ratio", "uncertainty_reweight", "patch_affinity_contrast"):
        need(name, impl, device, F32)
    cells = torch.cartesian_prod(torch.arange(12), torch.arange(13)).to(device)
    query, key, labels = pixels(device)

    def patch_step(query, key, labels):
        ratios = medcl.patch_class_ratio(labels + 1, cells, (3, 5), num_classes=4, impl=impl)
        gated = medcl.uncertainty_reweight(query, key, impl=impl)
        loss = medcl.patch_affinity_contrast(gated, ratios, impl=impl)
        return loss.detach(), *torch.autograd.grad(loss, (query, key))

    captured = Captured(lambda: patch_step(query, key, labels), device)
    fresh = pixels(device, seed=1)
    with torch.no_grad():
        for tensor, new in zip((query, key, labels), fresh, strict=True):
            tensor.copy_(new)
    for found, expected in zip(captured.replay(), patch_step(*fresh), strict=True):
        assert torch.equal(found, expected)


@targets
def test_filter_and_mitigator_can_be_captured_and_replayed(impl, device):
    """Selections of directed pairs by a rule, and gradients that are combined in a fixed order."""
    for name in ("filtered_contrastive", "mitigate_rows"):
        need(name, impl, device, F32)
    query, _, labels = pixels(device)
    options = {"ignore_index": -1, "temperature": 0.2, "impl": impl}

    def filter_step(query, labels):
        gradients, losses = [], []
        for scope in ("image", "global", "anchor"):
            loss = medcl.filtered_contrastive(query, labels=labels, scope=scope, **options)
            losses.append(loss.detach())
            gradients += torch.autograd.grad(loss, query)
        stack = torch.stack(gradients).flatten(3).movedim(2, 3).flatten(1, 2)  # (3, N, D)
        return *losses, *(
            medcl.mitigate_gradients(stack, unit=unit, order="fixed", impl=impl)
            for unit in ("row", "flat")
        )

    captured = Captured(lambda: filter_step(query, labels), device)
    fresh, _, fresh_labels = pixels(device, seed=1)
    with torch.no_grad():
        query.copy_(fresh), labels.copy_(fresh_labels)
    for found, expected in zip(captured.replay(), filter_step(fresh, fresh_labels), strict=True):
        assert torch.equal(found, expected)


@targets
def test_a_step_of_the_patch_module_can_be_captured_and_replayed(impl, device):
    """Which samples, looks up shares and joins layers."""
    need("patch_affinity_contrast", impl, device, F32)
    layers = {"wide": medcl.PatchLayer(stride=2, samples=25), "narrow": medcl.PatchLayer(stride=4)}
    module = medcl.PatchDragsawLoss(layers, num_classes=3, sizes=(3, 5), impl=impl)
    generator = torch.Generator().manual_seed(0)
    wide, other = torch.randn(2, 2, 32, 16, 18, generator=generator).to(device).unbind(0)
    labels, others = torch.randint(0, 3, (2, 2, 32, 36), generator=generator).to(device).unbind(0)
    wide = wide.clone().requires_grad_()
    labels = labels.clone()

    def patch_step(wide, labels):
        narrow = torch.nn.functional.avg_pool2d(wide, 2)
        loss = module({"wide": wide, "narrow": narrow}, labels)
        return loss.detach(), *torch.autograd.grad(loss, wide)

    captured = Captured(lambda: patch_step(wide, labels), device)
    with torch.no_grad():
        wide.copy_(other), labels.copy_(others)
    fresh = other.clone().requires_grad_()
    for found, expected in zip(captured.replay(), patch_step(fresh, others), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@targets
def test_autocast_changes_nothing_but_what_comes_out_of_the_network(impl, device, low):
    need_losses(impl, device, low)
    query, key, labels = pixels(device)
    outside = step(query, key, labels, impl)
    with torch.autocast(device, low):
        inside = step(query, key, labels, impl)
        narrow = step(*pixels(device, low), impl)
        head = torch.nn.Conv2d(32, 16, 1, device=device)
        projected = head(query)
        assert projected.dtype == low
        loss = both_losses(projected, head(key), labels, impl)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert narrow[0].dtype == loss.dtype == F32 and narrow[1].dtype == low
    (gradient,) = torch.autograd.grad(loss, head.weight)
    assert gradient.dtype == F32 and gradient.isfinite().all()
    assert narrow[0].item() == pytest.approx(outside[0].item(), rel=2e-2)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@targets
def test_fullgraph_compilation_changes_nothing(impl, device, backend):
    need_losses(impl, device)
    torch._dynamo.reset()
    query, key, labels = pixels(device)

    def total(q, k, y):
        return both_losses(q, k, y, impl)

    loss = torch.compile(total, fullgraph=True, backend=backend)(query, key, labels)
    found = loss.detach(), *torch.autograd.grad(loss, (query, key))
    for actual, expected in zip(found, step(query, key, labels, impl), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param(name, words, id="-".join((name, *words[:1])))
        for name, words in (
            *((name, ()) for name in (*OPS, "info_nce", "supervised_contrastive")),
            *((name, (word,)) for name, several in SUMMED.items() for word in several),
        )
    ],
)
@targets
def test_the_bits_are_the_same_every_time(name, words, impl, device, dtype):
    one, case = named(name, *(words or ("ragged", "ragged_out", "batch", "two_flat")))
    need(name, impl, device, dtype)
    names = OUTPUTS.get(name, ("value",))
    sample = one.sample(case, dtype, device)
    first = run(one.resolve(), sample, names, impl=impl)
    held = []  # shifts what the allocator hands out, so that stale memory is not always the same
    for repeat in range(100 if device == "cuda" else 3):
        held = [*held[-3:], torch.full((997 * (repeat % 7 + 1),), float("nan"), device=device)]
        again = run(one.resolve(), sample, names, impl=impl)
        for what, value in first.items():
            assert torch.equal(again[what], value), f"{what} in repeat {repeat}"


@pytest.mark.parametrize("against_key", [False, True], ids=["self", "key"])
@pytest.mark.parametrize(
    "n",
    [
        pytest.param(1_500),
        pytest.param(46_500, marks=pytest.mark.gpu),  # its square exceeds 2**31
        pytest.param(131_072, marks=pytest.mark.gpu),  # and this one's exceeds 2**34
    ],
)
@targets
def test_many_rows_are_right_where_looked_at_and_take_linear_memory(impl, device, n, against_key):
    if device == "cuda" and n == 1_500:
        pytest.skip("the large sizes are for the device, this one for the CPU")
    if device == "cpu" and n > 1_500:
        pytest.skip("for a device; tests/test_ops.py has 46,500 rows on the CPU")
    need("pair_logsumexp", impl, device, F32)
    channels, temperature = 16, 0.5
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, channels, n, generator=generator).to(device) for _ in range(2))
    query.requires_grad_()
    chosen = torch.tensor([0, 1, n // 2, n - 150, n - 1], device=device)
    picked = torch.zeros(n, device=device)
    picked[chosen] = 1.0
    function = spec("pair_logsumexp").resolve()
    with peak_memory(device) as grown:
        lse = function(query, key if against_key else None, temperature=temperature, impl=impl)
        (gradient,) = torch.autograd.grad(lse[0, 0], query, picked)
    one_matrix, one_input = 4 * n * n, 4 * n * channels
    assert grown[0] <= min(one_matrix / 16, 24 * one_input + 2**24), f"{grown[0] / 2**20:.0f} MB"

    z, k = (torch.nn.functional.normalize(x.detach().double(), dim=1)[0].t() for x in (query, key))
    k = k if against_key else z
    scores = z[chosen] @ k.t() / temperature
    if not against_key:
        scores[torch.arange(len(chosen)), chosen] = -torch.inf
    torch.testing.assert_close(lse[0, 0, chosen].double(), scores.logsumexp(1), rtol=2e-6, atol=0)
    # (P4) and (P5) of reference/pairs.py, as in tests/test_ops.py
    p = scores.softmax(1)
    d_z = torch.zeros_like(z)
    d_z[chosen] = p @ k / temperature
    if not against_key:
        d_z += p.t() @ z[chosen] / temperature
    norm = query.detach().double().norm(dim=1)[0].unsqueeze(1)
    expected = (d_z - z * (z * d_z).sum(1, keepdim=True)) / norm
    error = (gradient[0].t().double() - expected) * norm
    assert error.abs().max() < 4e-6 * d_z.abs().max()


@targets
def test_a_selection_of_more_pairs_than_32_bits_count_is_exact(impl, device):
    """The two best pairs stand at the end of the matrix; only a GPU is given so many. The gradient
    by the rule is that of these two pairs alone."""
    n = 70_000 if device == "cuda" else 1_500
    for name in ("pair_topk", "pair_filtered_grad"):
        need(name, impl, device, F32)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 16, n, generator=generator)
    query[..., n - 1] = query[..., n - 2] + 0.01 * torch.randn(1, 16, generator=generator)
    constants = torch.tensor([2.0, 0.0, 0.0]).reshape(3, 1, 1)
    options = {"scope": "global", "temperature": 0.5}
    given = query.to(device).requires_grad_()
    described = {
        "query_labels": torch.zeros((1, 1, n), dtype=torch.int64, device=device),
        "statistics": constants.expand(3, 1, n).contiguous().to(device),
        "impl": impl,
        **options,
    }
    with peak_memory(device) as grown:
        anchor, candidate, gradient, threshold, cut = spec("pair_topk").resolve()(
            given.detach(), k=torch.tensor([[2]], device=device), capacity=3, **described
        )
        value = spec("pair_filtered_grad").resolve()(
            torch.zeros(1, n, device=device), given, threshold=threshold, cut=cut, **described
        )
        (d_query,) = torch.autograd.grad(value.sum(), given)
    assert anchor.tolist() == [n - 2, n - 1, -1] and candidate.tolist() == [n - 1, n - 2, -1]
    assert cut.item() == (n - 1) * n + n - 2
    assert gradient.tolist() == [threshold.item(), threshold.item(), 0.0]
    assert grown[0] <= 24 * 4 * n * 16 + 2**24, f"{grown[0] / 2**20:.0f} MB"

    pair = query[..., n - 2 :].double().requires_grad_()
    listed = {"anchor": torch.tensor([0, 1]), "candidate": torch.tensor([1, 0])}
    listed["gradient"] = gradient[:2].cpu().double()
    value = spec("pair_filtered_grad").resolve_reference()(
        torch.zeros(1, 2).double(),
        pair,
        query_labels=torch.zeros((1, 1, 2), dtype=torch.int64),
        statistics=constants.expand(3, 1, 2).double(),
        **listed,
        **options,
    )
    (expected,) = torch.autograd.grad(value.sum(), pair)
    cosine = torch.nn.functional.cosine_similarity(*pair.detach().unbind(2)).item()
    assert threshold.item() == pytest.approx(math.exp(cosine / 0.5 - 2.0), rel=1e-5)
    assert not d_query[..., : n - 2].any() and expected.abs().max() > 1e-3
    torch.testing.assert_close(d_query[..., n - 2 :].cpu().double(), expected, rtol=1e-4, atol=1e-6)


@targets
def test_dense_features_train_at_full_resolution(impl, device):
    """One 3-D map of many pixels through both losses: finite, and far from N x N memory."""
    need_losses(impl, device, BF16)
    side = 48 if device == "cuda" else 10
    generator = torch.Generator().manual_seed(0)
    shape = (1, 32, side, side, side)
    query, key = (torch.randn(shape, generator=generator).to(device, BF16) for _ in range(2))
    labels = torch.randint(0, 4, (1, *shape[2:]), generator=generator).to(device)
    query.requires_grad_(), key.requires_grad_()
    with peak_memory(device) as grown:
        found = step(query, key, labels, impl)
    assert all(value.isfinite().all() for value in found)
    assert grown[0] <= 4 * side**6 / 32


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_tensors_of_another_device_than_the_current_one_are_served(impl):
    """On the device of the tensors and on its stream; the current device stays what it was."""
    need_losses(impl, "cuda")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    expected = step(*pixels("cuda:0"), impl)
    found = step(*pixels("cuda:1"), impl)
    assert torch.cuda.current_device() == 0
    for value, there in zip(expected, found, strict=True):
        assert there.device.index == 1
        torch.testing.assert_close(there.cpu(), value.cpu(), rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton", "cuda"])
def test_mixed_devices_are_refused_before_any_kernel(impl):
    query, key, labels = pixels("cuda")
    with pytest.raises(ValueError, match=r"key is on cpu but query is on cuda:0.*key\.to\("):
        medcl.info_nce(query, key.cpu(), impl=impl)
    with pytest.raises(ValueError, match="labels is on cpu"):
        medcl.supervised_contrastive(query, labels.cpu(), impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_float64_on_a_gpu_is_for_the_reference(impl):
    query, key, _ = pixels("cuda", torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        medcl.info_nce(query, key, impl=impl)
    assert medcl.info_nce(query, key).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "triton", "cuda"])
def test_running_out_of_memory_names_what_to_do_and_leaves_the_device_usable(impl):
    need_losses(impl, "cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    features = torch.randn(1, 64, 256, 256, device="cuda")
    labels = torch.zeros(1, 256, 256, dtype=torch.int64, device="cuda")
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**22) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="65536 rows"):
            medcl.supervised_contrastive(features, labels, impl=impl)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    query, key, labels = pixels("cuda")
    assert all(value.isfinite().all() for value in step(query, key, labels, "auto"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_running_out_of_memory_in_the_backward_names_operation_and_shapes(impl):
    need_losses(impl, "cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    features = torch.randn(1, 64, 256, 256, device="cuda", requires_grad=True)
    loss = medcl.info_nce(features, features.detach(), impl=impl)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**22) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"_backward on .*65536"):
            loss.backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_upstream_gradients_need_not_be_contiguous(impl):
    """An expanded gradient of a mean, as autograd makes it."""
    one, case = ragged("pair_logsumexp")
    need(one.name, impl, "cuda", F32)
    sample = one.sample(case, F32, "cuda")
    lse = one.resolve()(*sample.args, **sample.kwargs, impl=impl)
    lse = torch.where(lse.isinf(), 0.0, lse)
    leaves = list(sample.differentiable.values())
    expanded = torch.autograd.grad(lse.mean(), leaves, retain_graph=True)
    dense = torch.autograd.grad(lse, leaves, torch.full_like(lse, 1 / lse.numel()))
    for left, right in zip(expanded, dense, strict=True):
        assert torch.equal(left, right)
