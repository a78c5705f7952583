"""Every operation and loss on the GPU backends, in every arithmetic, against float64.

A CPU run takes the CPU backend and a few cases; `make gpu-check` takes all of them on a device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_targets import ARITHMETIC, TARGETS, matmul_precision
from op_checks import check_op, need, rounded, rounded_products, run

from medcl_kernels import env
from medcl_kernels.registry import SPECS, spec

FEW = ("ragged", "poisoned", "cold", "key_ragged", "key_batch", "several", "key_two_maps")
NAMES = [one.name for one in SPECS]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_as_exact_as_plain_torch_in_the_same_arithmetic(name, impl, device, arithmetic):
    one = spec(name)
    dtype, products, precision = ARITHMETIC[arithmetic]
    need(name, impl, device, dtype)
    if name == "patch_class_ratio" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("shares of labels come as float32 or float64, there are no features to round")
    failures = []
    cases = [
        case for case in one.cases if impl != "cpu" or case.name.removesuffix("_out") in FEW
    ] or one.cases[:3]
    with matmul_precision(precision):
        for case in cases:
            try:
                # CPU kernels widen: products are not rounded, which the rule allows as well
                check_op(one, case, dtype, impl, device, products=products)
            except AssertionError as error:
                failures.append(f"{case.name}: {str(error).splitlines()[0]}")
    assert not failures, f"{len(failures)} of {len(cases)} cases: " + "; ".join(failures[:10])


@pytest.fixture
def wgmma():
    """The wgmma kernels are in use, where device and library have them."""
    need("pair_logsumexp", "cuda", "cuda", torch.bfloat16)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    if "90a" not in env.build_info()["cuda_archs"].split(","):
        pytest.skip("the library was not built for 90a")
    before = env.use_wgmma(True)
    yield
    env.use_wgmma(before)


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["pair_logsumexp", "pair_positive_log", "pair_argmax"])
def test_wgmma_kernels_agree_with_float64_and_mma_sync(name, arithmetic, wgmma):
    one = spec(name)
    dtype, products, _ = ARITHMETIC[arithmetic]
    for case in one.cases:
        check_op(one, case, dtype, "cuda", "cuda", products=products)
    for channels in (40, 128):
        case = replace(one.cases[0], name="large", shape=(1, channels, 50, 61))
        sample = one.sample(case, dtype, "cuda", 0)

        def values(sample=sample):
            with torch.no_grad():
                found = one.resolve()(*sample.args, **sample.kwargs, impl="cuda")
                return found if isinstance(found, tuple) else (found,)

        first, again = values(), values()
        env.use_wgmma(False)
        others = values()
        env.use_wgmma(True)
        for x, y, z in zip(first, again, others, strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())
            if x.is_floating_point():
                torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_rule_lets_no_error_of_one_percent_through(monkeypatch):
    """The tolerance of rounded products is that of rounding, not of another temperature."""
    one = spec("pair_logsumexp")
    (case,) = (case for case in one.cases if case.name == "ragged")

    def warmer(*args, impl, **options):
        options["temperature"] *= 1.01
        return one.resolve_reference()(*args, **options)

    monkeypatch.setattr(type(one), "resolve", lambda self: warmer)
    for dtype, products, _ in ARITHMETIC.values():
        with pytest.raises(AssertionError, match="off by"):
            check_op(one, case, dtype, "cpu", products=products)


def test_rounding_is_that_of_the_formats():
    x = torch.randn(4096) * torch.logspace(-4, 4, 4096)
    assert torch.equal(rounded(x, "bfloat16"), x.bfloat16().float())
    halves = x[(x.abs() > 1e-3) & (x.abs() < 6e4)]
    assert torch.equal(rounded(halves, "float16"), halves.half().float())
    assert (rounded(x, "tf32") - x).abs().max() <= x.abs().max() * 2**-11
    assert torch.equal(rounded(-x, "tf32"), -rounded(x, "tf32"))
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    assert torch.equal(rounded(special, "tf32"), special)


def test_rounded_products_change_the_reference_and_leave_it_as_it_was():
    one = spec("pair_logsumexp")
    sample = one.sample(one.cases[0])
    plain = run(one.resolve_reference(), sample, ("value",))
    with rounded_products("bfloat16"):
        narrow = run(one.resolve_reference(), sample.copy(), ("value",))
    again = run(one.resolve_reference(), sample.copy(), ("value",))
    for name, value in plain.items():
        finite = value.isfinite()
        difference = (narrow[name] - value)[finite].norm() / value[finite].norm()
        assert 1e-5 < difference < 2e-2, name
        assert torch.equal(again[name], value), name
