"""The CUDA kernels of the Gradient Filter and the Gradient Mitigator on the host emulator."""

from __future__ import annotations

from typing import Any

import emulator_cases
import emulator_filter_cases as cases
import host_build
import pytest
import torch
from test_emulator import SCHEDULES, check, run

pytestmark = pytest.mark.skipif(
    host_build.missing_tools() is not None, reason=str(host_build.missing_tools())
)
PARAMETERS = [
    pytest.param(*one, SCHEDULES[i % 3], id=f"{one[0]}-{one[2]}-{one[1].name}")
    for i, one in enumerate(cases.selected())
]


@pytest.mark.parametrize(("name", "case", "product", "schedule"), PARAMETERS)
def test_kernel_agrees_with_the_reference(name, case, product, schedule):
    for call in cases.calls(name, case, product):
        check(call, run(call, schedule))


def as_call(operation: str, given: dict[str, Any], product: str) -> emulator_cases.Call:
    inputs = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    options = {
        name: str(int(x)) if isinstance(x, bool) else str(x)
        for name, x in given.items()
        if name not in inputs and x is not None
    }
    return emulator_cases.Call("", operation, inputs, {**options, "product": product}, {}, {})


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("scope", ["global", "image", "anchor"])
@pytest.mark.parametrize(
    ("across", "with_key", "product"), [(True, False, "bf16"), (False, True, "ieee")]
)
def test_equal_scores_are_kept_in_the_order_of_the_matrix(
    scope, classes, across, with_key, product
):
    """In every order of threads; a selection without a list and its gradient say the same."""
    first, backward = cases.tie_calls(scope, classes, across, with_key, product)
    for schedule in SCHEDULES[1:]:
        found = run(first, schedule)
        check(first, found)
    backward.inputs.update({name: found[name] for name in ("threshold", "cut")})
    check(backward, run(backward, SCHEDULES[1]))
    first.options["capacity"] = "0"
    rule = run(first, SCHEDULES[0])
    assert torch.equal(rule["cut"], first.expected["cut"])
    torch.testing.assert_close(rule["threshold"], first.expected["threshold"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("product", ["bf16", "tf32", "ieee"])
def test_rule_and_list_select_the_same_pairs_where_rows_stream_in_slabs(product):
    """The blocks of a row's slabs add up its similarities in one order, that of the selection."""
    torch.manual_seed(5)
    x = torch.randn(1, 300, 70, dtype=torch.float64).to(emulator_cases.DTYPES[product])
    shared = {"temperature": 0.2, "ignore_index": -1, "across": False, "normalize": True}
    shared |= {"form": "out", "score": "pair", "scope": "anchor"}
    shared |= {"query": x, "query_labels": torch.randint(0, 3, (1, 1, 70))}
    shared |= {"statistics": torch.tensor([6.0, 0.05, 0.0]).reshape(3, 1, 1).expand(3, 1, 70)}
    shared["statistics"] = shared["statistics"].contiguous()
    k = torch.full((1, 70), 20)
    top = run(as_call("pair_topk", {**shared, "k": k, "capacity": 1400}, product), SCHEDULES[0])
    assert (top["anchor"] >= 0).all()
    upstream = {"d_value": torch.rand(1, 70)}
    gradients = []
    for names in (("threshold", "cut"), ("anchor", "candidate", "gradient")):
        chosen = {**shared, **upstream, **{name: top[name] for name in names}}
        call = as_call("pair_filtered_grad_backward", chosen, product)
        gradients.append(run(call, SCHEDULES[2])["d_query"].double())
    size = gradients[1].abs().max()
    rounding = (
        torch.finfo(x.dtype).eps if product == "bf16" else 1e-3 if product == "tf32" else 1e-6
    )
    assert (gradients[0] - gradients[1]).abs().max() <= 2 * rounding * size
