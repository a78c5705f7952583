"""What surrounds the Triton kernels: tile shapes, torch.compile, vmap, refusals, losses."""

from __future__ import annotations

import re

import pytest
import torch
import triton
from op_checks import check_op

import medcl_kernels as medcl
from medcl_kernels import dispatch
from medcl_kernels.cases import Case
from medcl_kernels.ops.pair_logsumexp import pair_logsumexp
from medcl_kernels.ops.positive_at import positive_at
from medcl_kernels.registry import spec
from medcl_kernels.triton import configs, launch
from medcl_kernels.triton.configs import Config

LOSSES = {
    "info_nce": "key_batch key_poisoned none queue_only everything symmetric several_in",
    "supervised_contrastive": "batch_out image_in single_class_pixel poisoned_out three_maps_in "
    "key_batch_pixel poisoned_pixel",
    "dense_correspondence": "key_sliced mutual",
    "filtered_contrastive": "indexed",
    "mitigated_contrastive": "batch",
}
CPU = torch.device("cpu")
LABELS = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for name, wanted in LOSSES.items()
        for case in spec(name).cases
        if case.name in wanted.split()
    ],
)
def test_losses_are_as_exact_as_plain_torch(name, case):
    check_op(spec(name), case, torch.float32, "triton")


@pytest.mark.parametrize(
    "config",
    [
        Config(128, 32, 4, 1),  # a row tile crosses several column tiles at the diagonal
        Config(16, 64, 4, 1),  # the reverse
        Config(64, 32, 4, 1, channels=64, output=256),  # split contraction and split gradient
        Config(64, 32, 4, 1, output=128),
        Config(64, 64, 4, 1),
    ],
    ids=str,
)
def test_any_tile_shape_gives_the_same_result(config, monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED", config)
    case = Case("tiles", "", (1, 130, 147), ignored=0.2)
    check_op(spec("pair_logsumexp"), case, torch.float32, "triton")


def test_the_backend_says_that_it_is_there():
    assert dispatch.available()["triton"] is None
    assert dispatch.select("info_nce_sum", "triton", "cpu", torch.float32) == "triton"
    with pytest.raises(RuntimeError, match="float64"):
        pair_logsumexp(torch.zeros(1, 4, 5).double(), temperature=0.1, impl="triton")


def test_query_and_key_of_two_dtypes_are_refused():
    query, key = torch.randn(1, 4, 5), torch.randn(1, 4, 5).half()
    with pytest.raises(ValueError, match="one dtype"):
        pair_logsumexp(query, key, temperature=0.1, impl="triton")


def test_an_index_beyond_the_key_is_not_silently_wrong():
    """On a GPU nobody has looked at the values before the kernel does."""
    index = torch.tensor([[0, 7, 5]])
    value = positive_at(
        torch.randn(1, 4, 3), torch.randn(1, 4, 7), index, temperature=0.1, impl="triton"
    )
    assert value.isnan().tolist() == [[False, True, False]]


def test_losses_are_not_negative():
    """Log-sum-exp and positives see rows rounded alike: equal rows give log(number of rows)."""
    x = torch.randn(1, 19, 1).half().expand(1, 19, 33).contiguous()
    lse = medcl.info_nce(x, x, temperature=0.1, impl="triton")
    torch.testing.assert_close(lse, torch.tensor(33.0).log(), rtol=0, atol=1e-5)
    one = medcl.info_nce(x[..., :1], x[..., :1], temperature=0.1, impl="triton")
    assert abs(one.item()) <= 1e-5


def test_small_upstream_gradients_survive_float16():
    """1e-5 for every anchor, as a mean gives it, would leave the weights of the pairs without
    digits in float16; they are lifted by a power of two, which changes no digit."""
    x = torch.randn(1, 16, 70).half()
    lse = pair_logsumexp(x, temperature=0.1, impl="triton")
    gradients = [
        torch.ops.medcl_triton.pair_logsumexp_backward(
            torch.full_like(lse, size), lse, x, None, None, None, "all", -1, 0.1, True, False,
            True, False,
        )[0]
        for size in (1.0, 2.0**-10)
    ]  # fmt: skip
    normal = gradients[1].abs() > 2.0**-14
    assert normal.any()
    assert torch.equal(gradients[1][normal] * 2.0**10, gradients[0][normal])


@pytest.mark.parametrize("temperature", [0.01, 0.05])
def test_an_excluded_row_cannot_overflow_a_weight(temperature):
    """Against candidates that are all opposite, exp(0 - lse) of an excluded (zero) row is huge."""
    query = torch.ones(1, 16, 3).half().requires_grad_()
    key = -torch.ones(1, 16, 5).half()
    labels = torch.tensor([[[0, 0, -1, 0, 0]]])
    lse = pair_logsumexp(
        query, key, key_labels=labels, ignore_index=-1, temperature=temperature, impl="triton"
    )
    (gradient,) = torch.autograd.grad(lse.sum(), query)
    assert gradient.isfinite().all()


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 4, 6, requires_grad=True)
    lse = pair_logsumexp(x, temperature=0.1, impl="triton")
    (gradient,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='impl="reference"'):
        gradient.square().sum().backward()


def test_autocast_changes_nothing():
    x = torch.randn(1, 8, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = pair_logsumexp(x, temperature=0.1, impl="triton")
    assert torch.equal(inside, pair_logsumexp(x, temperature=0.1, impl="triton"))
    (gradient,) = torch.autograd.grad(inside.sum(), x)
    assert gradient.dtype == torch.float32


def test_vmap_runs_every_slice():
    x = torch.randn(3, 1, 4, 9)
    run = lambda one: pair_logsumexp(one, temperature=0.1, impl="triton")  # noqa: E731
    assert torch.equal(torch.func.vmap(run)(x), torch.stack([run(one) for one in x]))


CALLS = {
    "info_nce": lambda q, k: medcl.info_nce(
        q, k, medcl.dense_correspondence(q, k, impl="triton"), pairs="batch", impl="triton"
    ),
    "supervised": lambda q, k: medcl.supervised_contrastive(q, LABELS, impl="triton"),
    "pixel": lambda q, k: medcl.supervised_contrastive(
        q, LABELS, key=k, key_labels=LABELS, form="pixel", impl="triton"
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_equals_eager(name):
    torch._dynamo.reset()
    q, k = (x.clone().requires_grad_() for x in torch.randn(2, 2, 6, 4, 5))
    expected = CALLS[name](q, k)
    actual = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")(q, k)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, (q, k), allow_unused=True)
    given = torch.autograd.grad(actual, (q, k), allow_unused=True)
    torch.testing.assert_close(given, wanted)


def test_fake_kernels_tell_the_truth():
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last).flatten(2).requires_grad_()
    labels = LABELS.reshape(1, 2, 20)
    ops = torch.ops.medcl_triton
    options = (-1, 0.1, True, False)
    calls = {
        ops.pair_logsumexp: (x, None, labels, None, "all", *options),
        ops.positive_mean: (x, None, labels, None, *options),
        ops.positive_at: (x, x.detach(), labels[0], 0.1, True),
    }
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operation, arguments in calls.items():
        result = torch.library.opcheck(operation, arguments, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}


def test_the_smallest_tiles_serve_small_problems_and_the_largest_the_rest():
    several = (Config(256, 64, 8, 3), Config(64, 64, 4, 3))
    assert configs.pick(several, problems=1, rows=131072, processors=132) == 0
    assert configs.pick(several, problems=1, rows=4096, processors=132) == 1
    assert configs.pick(several, problems=16, rows=4096, processors=132) == 0
    assert configs.row("statistics", "half", 16) == ("statistics", "half", 128)
    assert configs.row("statistics", "half", 384)[2] == configs.WIDE
    assert configs.candidates("gradient", "tf32", 128, 8) != configs.candidates(
        "gradient", "tf32", 128, 9
    )


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What `choose` asks of one, without one."""
    monkeypatch.setattr(configs.env, "triton_interpreted", lambda: False)
    monkeypatch.setattr(configs, "capability", lambda device: 9)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(configs, "_too_large", set())
    monkeypatch.setattr(configs, "_timed", {})
    return lambda start, streamed=1000, **constants: configs.choose(
        "statistics", "half", 64, 1, 1000, streamed, constants, CPU, start
    )


def test_tiles_that_do_not_fit_give_way_to_smaller_ones(on_a_gpu):
    large, small = configs.TABLE["statistics", "half", 128]
    tried = []

    def start(config):
        tried.append(config)
        if config == large:
            raise triton.OutOfResources(300_000, 101_376, "shared memory")

    on_a_gpu(start)
    on_a_gpu(start)
    assert tried == [large, small, small]  # what does not fit is not tried again
    with pytest.raises(triton.OutOfResources):
        configs.choose("statistics", "ieee", 64, 1, 9, 9, {}, CPU, lambda config: start(large))


@pytest.mark.parametrize(
    "error",
    [
        triton.OutOfResources(300_000, 101_376, "shared memory"),
        triton.TritonError("`ptxas` failed"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
    ],
    ids=["resources", "assembler", "driver"],
)
def test_a_failed_launch_names_the_operation_and_the_shapes(error):
    @launch.operation
    def pair_sum(query, labels):
        raise error

    message = rf"medcl_triton::pair_sum on \(1, 4, 9\), \(3, 1, 9\): .*{re.escape(str(error))}"
    with pytest.raises(RuntimeError, match=message):
        pair_sum(torch.zeros(1, 4, 9), torch.zeros(3, 1, 9))


def test_running_out_of_memory_is_no_failed_launch():
    @launch.operation
    def pair_sum(query):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        pair_sum(torch.zeros(1, 4, 9))


def test_autotuning_keeps_the_fastest_tiles(on_a_gpu, monkeypatch):
    """With a clock that a run advances by the number of its columns."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("MEDCL_TRITON_AUTOTUNE", "1")
    started = []

    def start(config):
        started.append(config)
        clock[0] += 1000 / config.columns + config.rows

    on_a_gpu(start)
    offered = configs.TABLE["statistics", "half", 128] + configs.FASTER["statistics", "half", 128]
    assert set(started) == set(offered)
    assert started[-1] == min(offered, key=lambda one: 1000 / one.columns + one.rows)
    started.clear()
    on_a_gpu(start)
    on_a_gpu(start, streamed=1020)
    assert len(started) == 2
    for other in ({"streamed": 100_000}, {"SELF": True}):  # another length, another kernel
        started.clear()
        on_a_gpu(start, **other)
        assert set(started) == set(offered)
    started.clear()
    configs.choose("filter", "half", 64, 1, 9, 9, {}, CPU, start)  # a second run would count twice
    assert started == [*configs.TABLE["filter", "half", 128]]
