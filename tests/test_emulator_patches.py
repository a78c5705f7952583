"""The CUDA kernels of patch-affinity contrast and the uncertainty gate on the host emulator, as
test_emulator.py runs the others.
"""

from __future__ import annotations

import math

import emulator_cases as cases
import emulator_patch_cases as patches
import host_build
import pytest
import test_pdcr_examples as examples
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


def contrast(inputs, **options):
    """Loss and gradients of the mean over pairs, as patch_affinity_contrast puts them together."""
    options = {"form": "affinity", "temperature": "1.0", "normalize": "1", **options}
    options["product"] = "ieee"
    values = run(cases.Call("", "pair_affinity", inputs, options, {}, {}), SCHEDULES[0])
    log_z, linear = values["log_z"], values["linear"]
    candidates = inputs.get("key", inputs["query"]).shape[2]
    upstream = {
        "d_log_z": torch.full_like(log_z, 1 / log_z.numel()),
        "d_linear": torch.full_like(linear, -1 / (linear.numel() * candidates)),
        "log_z": log_z,
    }
    back = cases.Call("", "pair_affinity_backward", inputs | upstream, options, {}, {})
    return (log_z - linear / candidates).mean(), run(back, SCHEDULES[2])


F32 = torch.float32
SIDES = {
    "query": examples.tensor(examples.F, F32)[None],
    "query_ratios": examples.shares([[examples.R]], F32),
    "key": examples.tensor(examples.G, F32)[None],
    "key_ratios": examples.shares([[examples.Q]], F32),
}
ITSELF = {name: x for name, x in SIDES.items() if name.startswith("query")}


@pytest.mark.parametrize("name", examples.SELF)
def test_worked_examples_of_one_layer(name):
    ratios, options, value, gradient = examples.SELF[name]
    options = {k: str(v) for k, v in options.items()}
    pairs = 16 if options.pop("reduction", "mean") == "sum" else 1
    loss, found = contrast(ITSELF | {"query_ratios": examples.shares(ratios, F32)}, **options)
    examples.close(loss, value / pairs, F32, 10)
    if gradient is not None:
        examples.close(pairs * found["d_query"][0], gradient, F32)


def test_worked_example_1_pair_by_pair():
    unit = torch.nn.functional.normalize(examples.tensor(examples.F), dim=0)
    inputs = {
        "query": (unit.t() @ unit).t().contiguous().float()[None],
        "query_ratios": ITSELF["query_ratios"],
        "key": torch.eye(4)[None],
        "key_ratios": ITSELF["query_ratios"],
    }
    loss, found = contrast(inputs, normalize="0")
    examples.close(loss, examples.SELF["E1"][2], F32, 10)
    examples.close(found["d_query"][0].t(), examples.GAMMA, F32)


@pytest.mark.parametrize(("temperature", "value"), examples.NO_SHIFT)
def test_worked_example_4(temperature, value):
    loss, _ = contrast(ITSELF | {"shift": torch.zeros(())}, temperature=str(temperature))
    examples.close(loss, value, F32, 10)


def test_worked_examples_7_and_8_across_layers():
    loss, found = contrast(SIDES)
    examples.close(loss, 1.4227769876, F32, 10)
    examples.close(found["d_query"][0], examples.DF, F32)
    examples.close(found["d_key"][0], examples.DG, F32)
    loss, found = contrast(SIDES | {"shift": torch.tensor(0.9899494937)})
    examples.close(loss, 1.4206363734, F32, 10)
    examples.close(found["d_shift"], 0.2126092218, F32, 10)
    fewer = {name: SIDES[name][..., :3].contiguous() for name in ("key", "key_ratios")}
    examples.close(contrast(SIDES | fewer)[0], 1.1266648525, F32, 10)


def test_worked_example_9():
    inputs = {"features": torch.tensor([[[1.0, -2, 3]]])}
    inputs["logits"] = torch.tensor([[[2, 0, 0.3], [-1, 0, 0.9]]])
    found = run(cases.Call("", "uncertainty_reweight", inputs, {}, {}, {}), SCHEDULES[0])
    examples.close(found["value"][0, 0], [1.72464005, -2, 3.18633711], F32)
    inputs["d_out"] = torch.ones(1, 1, 3)
    back = cases.Call("", "uncertainty_reweight_backward", inputs, {}, {}, {})
    found = run(back, SCHEDULES[1])
    examples.close(found["d_features"][0, 0], [1.72464005, 1, 1.06211237], F32)
    slopes = examples.tensor([[-0.19552843, 0, 0.19803953], [0.19552843, 0, -0.19803953]])
    wanted = (-slopes * examples.tensor([1, -2, 3])).tolist()
    examples.close(found["d_logits"][0], wanted, F32, 7)


@pytest.mark.parametrize("product", patches.PRODUCTS)
@pytest.mark.parametrize("form", ["affinity", "release2d"])
def test_identical_features_give_log_n_and_no_gradient(form, product):
    """Whatever the ratios: t = 0 for every pair. The sums are N; their logarithm is rounded."""
    row = torch.zeros(1, 16, 1)
    row[0, 3] = 2.0
    ratios = torch.rand(3, 1, 2, 70) / 2
    query = row.expand(1, 16, 70).contiguous().to(cases.DTYPES[product])
    inputs = {"query": query, "query_ratios": ratios}
    options = {"form": form, "temperature": "0.5", "normalize": "1", "product": product}
    forward = cases.Call("same", "pair_affinity", inputs, options, {}, {})
    values = run(forward, SCHEDULES[0])
    wanted = torch.full((3, 1, 70), math.log(70))
    torch.testing.assert_close(values["log_z"], wanted, rtol=2**-23, atol=0)
    assert not values["linear"].any()
    upstream = {"d_log_z": torch.rand(3, 1, 70), "d_linear": torch.rand(3, 1, 70)}
    inputs |= {**upstream, "log_z": values["log_z"]}
    backward = cases.Call("same", "pair_affinity_backward", inputs, options, {}, {})
    d_query = run(backward, SCHEDULES[2])["d_query"]
    assert not d_query.any()
