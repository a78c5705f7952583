"""The wgmma kernels on the host emulator, which finds operands by their descriptors, lets products
read shared memory as late as their wait, and stops where a fence is missing."""

from __future__ import annotations

import emulator_cases as cases
import emulator_wgmma_cases as wgmma
import host_build
import pytest
import torch
from test_emulator import SCHEDULES, check, run

pytestmark = pytest.mark.skipif(
    host_build.missing_tools() is not None, reason=str(host_build.missing_tools())
)
PARAMETERS = [
    pytest.param(*one, SCHEDULES[i % 3], id=f"{one[0]}-{one[1]}-{one[2].name}")
    for i, one in enumerate(wgmma.ALL)
]


@pytest.mark.parametrize(("operation", "product", "shape", "schedule"), PARAMETERS)
def test_kernel_agrees_with_the_reference(operation, product, shape, schedule):
    call = wgmma.call(operation, product, shape)
    check(call, run(call, schedule))


@pytest.mark.parametrize(
    "case", [pytest.param(one, id=f"{one[0]}-{one[2].name}") for one in wgmma.REPEATED]
)
def test_the_order_of_threads_changes_no_bit(case):
    call = wgmma.call(*case)
    first, *others = (run(call, schedule) for schedule in SCHEDULES)
    for other in others:
        for name, x in first.items():
            assert torch.equal(x.nan_to_num(), other[name].nan_to_num()), name


def test_ties_go_to_the_smallest_index():
    """Equal keys in different tiles, warps and lanes."""
    key = torch.randn(1, 200, 24).bfloat16()
    query = key[:, torch.arange(70) % 50] + 0
    key[:, 50:100], key[:, 100:150], key[:, 150:] = key[:, :50], key[:, :50], key[:, :50]
    sides = {"query": query.transpose(1, 2), "key": key.transpose(1, 2)}
    options = {"product": "bf16", "wgmma": "1"}
    call = cases.Call("ties", "pair_argmax", sides, options, {}, {})
    index = run(call, SCHEDULES[2])["index"]
    assert index.flatten().tolist() == [i % 50 for i in range(70)]


def test_wider_rows_and_other_arithmetic_stay_with_mma_sync():
    for product, dim in (("bf16", 200), ("tf32", 16)):
        (call,) = cases.calls("pair_argmax", wgmma.Shape(dim, 9, 20, ignored=0), product)
        asked = wgmma.replace(call, options=call.options | {"wgmma": "1"})
        host = host_build.host_module()
        host.configure(*SCHEDULES[0])
        inputs = {
            name: (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
            for name, x in asked.inputs.items()
        }
        assert host.run(asked.operation, inputs, asked.options).keys() == call.expected.keys()
        assert host.statistics()["wgmma"] == 0 and host.statistics()["mma"] > 0
