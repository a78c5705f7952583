"""The CUDA kernels of patch-affinity contrast and the uncertainty gate on the host emulator, as
test_emulator.py runs the others.
"""

from __future__ import annotations

import math

import emulator_cases as cases
import emulator_patch_cases as patches
import host_build
import pytest
import torch
from test_emulator import SCHEDULES, check, run

pytestmark = pytest.mark.skipif(
    host_build.missing_tools() is not None, reason=str(host_build.missing_tools())
)
PARAMETERS = [
    pytest.param(*one, SCHEDULES[i % 3], id=f"{one[0]}-{one[2]}-{one[1].name}")
    for i, one in enumerate(patches.ALL)
]


@pytest.mark.parametrize(("operation", "case", "product", "schedule"), PARAMETERS)
def test_kernel_agrees_with_the_reference(operation, case, product, schedule):
    results: dict[str, torch.Tensor] = {}
    for call in patches.calls(operation, case, product):
        if "log_z" in call.inputs:
            call.inputs["log_z"] = results["log_z"]  # the backward gets what the forward gave
        results = run(call, schedule)
        check(call, results)


@pytest.mark.parametrize(
    ("operation", "case", "product"),
    [pytest.param(*one, id=f"{one[0]}-{one[2]}-{one[1].name}") for one in patches.REPEATED],
)
def test_the_order_of_threads_changes_no_bit(operation, case, product):
    for call in patches.calls(operation, case, product):
        first, *others = (run(call, schedule) for schedule in SCHEDULES)
        for other in others:
            for name, x in first.items():
                assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("form", ["affinity", "release2d"])
def test_identical_features_give_log_n_and_no_gradient(form):
    """Whatever the ratios: t = 0 for every pair."""
    row = torch.zeros(1, 16, 1)
    row[0, 3] = 2.0
    ratios = torch.rand(3, 1, 2, 70) / 2
    inputs = {"query": row.expand(1, 16, 70).contiguous(), "query_ratios": ratios}
    options = {"form": form, "temperature": "0.5", "normalize": "1", "product": "bf16"}
    forward = cases.Call("same", "pair_affinity", inputs, options, {}, {})
    values = run(forward, SCHEDULES[0])
    torch.testing.assert_close(values["log_z"], torch.full((3, 1, 70), math.log(70)))
    assert not values["linear"].any()
    upstream = {"d_log_z": torch.rand(3, 1, 70), "d_linear": torch.rand(3, 1, 70)}
    inputs |= {**upstream, "log_z": values["log_z"]}
    backward = cases.Call("same", "pair_affinity_backward", inputs, options, {}, {})
    d_query = run(backward, SCHEDULES[2])["d_query"]
    assert d_query.abs().max() < 1e-4  # of weights that add up to about 100
