"""Calls of the CUDA kernels of the Gradient Filter and the Gradient Mitigator on the emulator: the
registry's own cases, one arithmetic each, as `op_checks.check_op` would judge them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from emulator_cases import DTYPES, Call
from op_checks import MANTISSA, OUTPUTS, natural_scale, rounded_products, run, upstream
from torch import Tensor

from medcl_kernels import reference
from medcl_kernels.cases import Sample
from medcl_kernels.layout import rows
from medcl_kernels.registry import Case, OpSpec, spec

PRODUCTS = {"bf16": "bfloat16", "tf32": "tf32", "fp16": "float16", "ieee": ""}
NAMES: dict[str, tuple[str, ...]] = {  # positional arguments of the operation
    "pair_topk": ("query", "key"),
    "pair_filtered_grad": ("value", "query", "key"),
    "pair_at": ("query", "key", "anchor", "candidate"),
    "mitigate_rows": ("gradients", "order"),
}
DEFAULTS = {
    "mitigate_rows": {"method": "pcgrad", "unit": "row", "reduction": "mean", "strength": 0.5}
}
UPSTREAM = {"pair_at": "d_at", "pair_filtered_grad": "d_value"}


def selected() -> Iterator[tuple[str, Case, str]]:
    """Every case of every operation, the arithmetics in turn."""
    for name in NAMES:
        for turn, case in enumerate(spec(name).cases):
            half = [product for product, dtype in DTYPES.items() if dtype in case.dtypes]
            products = half if len(case.dtypes) < 4 else list(PRODUCTS)
            yield name, case, products[turn % len(products)]


def calls(name: str, case: Case, product: str) -> list[Call]:
    """The forward call, and the backward call where there is one."""
    one, dtype = spec(name), DTYPES[product]
    sample = one.sample(case, dtype)
    names = OUTPUTS.get(name, ("value",))
    truth = run(one.resolve_reference(), sample.double(), names)
    with rounded_products(PRODUCTS[product]):
        near = run(one.resolve_reference(), sample.copy(), names)
    given = {**DEFAULTS.get(name, {}), **dict(zip(NAMES[name], sample.args, strict=True))}
    given |= sample.kwargs
    inputs = {key: x.detach() for key, x in given.items() if isinstance(x, Tensor)}
    options = {key: _text(x) for key, x in given.items() if not isinstance(x, Tensor | None)}
    options["product"] = product
    base = f"{name}-{product}-{case.name}"
    slack = one.tolerance * torch.finfo(torch.float32).eps
    if name == "pair_topk":  # which pairs are the best follows from the rounded rows
        truth = near
        if PRODUCTS[product]:
            slack = 2.0 ** -MANTISSA[PRODUCTS[product]]
    allowed = partial(_allowed, slack, one, case, sample.double(), truth, near)
    expected = {key: truth[key] for key in names}
    forward = Call(base, name, inputs, options, expected, {key: allowed(key) for key in names})
    if name not in UPSTREAM:
        return [forward]
    inputs = {**inputs, UPSTREAM[name]: upstream(truth["value"].float())}
    expected = {
        f"d_{key}": rows(truth[f"d_{key}"]) for key in ("query", "key") if f"d_{key}" in truth
    }
    tolerance = {key: allowed(key) for key in expected}
    backward = Call(f"{base}-backward", f"{name}_backward", inputs, options, expected, tolerance)
    return [backward] if name == "pair_filtered_grad" else [forward, backward]  # it hands on


def _text(x: Any) -> str:
    return str(int(x)) if isinstance(x, bool) else str(x)


def _allowed(
    slack: float,
    one: OpSpec,
    case: Case,
    exact: Sample,
    truth: dict[str, Tensor],
    near: dict[str, Tensor],
    name: str,
) -> float:
    """The tolerance of `op_checks.compare`."""
    want = truth[name]
    if not want.is_floating_point():
        return 0.0
    finite = want.isfinite()
    if not finite.any():
        return 0.0
    error = (near[name][finite].double() - want[finite]).abs().max().item()
    size = max(want[finite].abs().max().item(), natural_scale(name, one, case, exact))
    rounding = one.tolerance * torch.finfo(near[name].dtype).eps
    return 2 * error + max(slack, rounding) * size


def tie_calls(
    scope: str, classes: int, across: bool, with_key: bool, product: str, score: str = "pair"
) -> tuple[Call, Call]:
    """`pair_topk`, and the gradient by the rule that it gives (to be put in), for rows along a few
    axes: similarities are 0 or 1 in any arithmetic, so that most pairs have one of few scores and k
    cuts through equal ones.
    """
    torch.manual_seed(3)
    length, dtype = 83, DTYPES[product]
    axes = torch.randint(0, 7, (2, 2, length))
    rows_of = torch.eye(16)[axes].transpose(2, 3) * 2.0 ** torch.randint(-1, 2, (2, 2, 1, length))
    labels = torch.randint(-1, 3, (2, 1, 2, length))
    constants = torch.tensor([3.5, 0.01, 2.0]).reshape(3, 1, 1)
    given: dict[str, Any] = {
        "query": rows_of[0].to(dtype),
        "key": rows_of[1].to(dtype) if with_key else None,
        "query_labels": labels[0],
        "key_labels": labels[1] if with_key else None,
        "statistics": constants.expand(3, 2, length).contiguous(),
        "form": "out",
        "score": score,
        "scope": scope,
        "temperature": 0.5,
        "ignore_index": -1,
        "across": across,
    }
    units = {"global": 1, "image": 2, "anchor": 2 * length}[scope]
    k = torch.randint(1, 2 * length * 2 * length // units // 3, (classes, units))
    if units > 1:
        k[0, units // 2], k[-1, 0] = 10**6, 0  # more than there are, and none
    capacity = int(k.clamp_max(4 * length * length).sum())
    names = OUTPUTS["pair_topk"]
    truth = dict(zip(names, reference.pair_topk(**given, k=k, capacity=capacity), strict=True))
    options = {name: _text(x) for name, x in given.items() if not isinstance(x, Tensor | None)}
    options |= {"product": product, "normalize": "1"}
    inputs = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    tolerance = {name: 1e-5 if x.is_floating_point() else 0.0 for name, x in truth.items()}
    topk = {**options, "capacity": str(capacity)}
    base = f"ties-{scope}-{classes}-{product}-{score}"
    first = Call(base, "pair_topk", {**inputs, "k": k}, topk, truth, tolerance)

    leaves = {
        name: inputs[name].double().requires_grad_() for name in ("query", "key") if name in inputs
    }
    listed = {name: truth[name] for name in ("anchor", "candidate")}
    listed["gradient"] = truth["gradient"].double()
    exact = {**given, **listed, **leaves, "statistics": inputs["statistics"].double()}
    value = reference.pair_filtered_grad(torch.zeros(2, length), **exact)
    g = torch.rand(2, length)
    gradients = torch.autograd.grad(value, list(leaves.values()), g.double())
    expected = {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}
    size = max(d.abs().max().item() for d in gradients)
    rounding = 1e-5 if product == "ieee" else 2.0 ** -MANTISSA[PRODUCTS[product]]
    inputs |= {"d_value": g}
    name = "pair_filtered_grad_backward"
    return first, Call(
        f"{base}-backward",
        name,
        inputs,
        options,
        expected,
        dict.fromkeys(expected, rounding * size),
    )


def few_calls() -> list[Call]:
    """One of each kernel and kind, for what is repeated."""
    found: list[Call] = []
    for scope, classes, across, with_key in (
        ("global", 1, False, True),
        ("image", 2, True, False),
        ("anchor", 1, False, False),
    ):
        found.append(tie_calls(scope, classes, across, with_key, "bf16")[0])
    found.append(tie_calls("global", 1, False, True, "tf32", "representation")[0])
    for name, case, product in selected():
        small = name in ("pair_at", "mitigate_rows") or case.name in ("indexed_batch", "quotas")
        if small and name != "pair_topk" and case.channels <= 64:
            found += calls(name, case, product if product in ("bf16", "tf32") else "tf32")
    return found
