"""Calls of the patch operations on the host emulator, in the registry's own terms: samples of its
cases, small ones, judged by the tolerance rule of op_checks.
"""

from __future__ import annotations

from typing import Any

import emulator_cases as cases
import torch
from op_checks import allowed, natural_scale, plain_and_truth, upstream
from torch import Tensor

from medcl_kernels import patch_cases
from medcl_kernels.layout import rows
from medcl_kernels.registry import Case, Sample, spec

PRODUCTS = {"bf16": "bfloat16", "fp16": "float16", "tf32": "tf32", "ieee": ""}


def _shape(name: str, shape: tuple[int, ...], key: tuple[int, ...] | None = None, **more: Any):
    """A case; what is no field of it is an option of the call."""
    fields = {
        k: more.pop(k) for k in ("temperature", "normalize", "layout", "zero_rows") if k in more
    }
    fields = {"temperature": 1.0, **fields}
    return Case(name, "", shape, key, options=tuple(sorted(more.items())), **fields)


# Every width that has kernels of its own (padded to 64, 128, 256, streamed in slabs), more patch
# sizes and classes than one launch and one record take, both forms, plain sums and running maxima.
AFFINITY = (
    _shape("D3", (2, 3, 70), patches=3),
    _shape("D16", (1, 16, 150), patches=4, classes=3, layout="sliced"),
    _shape("D16-key", (2, 16, 40), (2, 16, 70), form="release2d", classes=2, patches=2, shift=0.7),
    _shape("D16-cold", (1, 16, 100), temperature=0.02),
    _shape(
        "D16-cold-key", (1, 16, 20), (1, 16, 150), temperature=0.02, form="release2d", classes=6
    ),
    _shape("D16-zero", (1, 16, 6, 6), zero_rows=True),
    _shape("D16-one", (1, 16, 1), (1, 16, 1)),
    _shape("D16-raw", (1, 16, 40), normalize=False, patches=2),
    _shape("D64", (1, 64, 130), shift=0.9, layout="channels_last"),
    _shape("D96", (1, 96, 66), (1, 96, 70), temperature=0.5, patches=2),
    _shape("D256", (1, 256, 20), (1, 256, 70), classes=2),
    _shape("D300", (1, 300, 70), patches=2, shift=0.8),
)
GATE = tuple(
    case for case in patch_cases.GATE if case.name not in ("ragged", "image", "many_logits")
)
GATE += (_shape("ragged", (2, 70, 87), logits=9),)
RATIO = tuple(case for case in patch_cases.RATIO if "dense" not in case.name)
RATIO += (_shape("large", (1, 50, 47), length=41, centers=9, num_classes=7),)  # a block per window
CASES = {"pair_affinity": AFFINITY, "uncertainty_reweight": GATE, "patch_class_ratio": RATIO}


def products_of(operation: str, case: Case) -> tuple[str, ...]:
    """In which arithmetics a case is tried."""
    if operation == "pair_affinity":
        wide = case.shape[1] in (64, 96, 256)
        return tuple(PRODUCTS) if wide or case.name in ("D16", "D16-key") else ("bf16", "ieee")
    if operation == "uncertainty_reweight" and case.name in ("ragged", "channels_last"):
        return ("bf16", "fp16", "ieee")
    return ("ieee",)


ALL = tuple(
    (operation, case, product)
    for operation, listed in CASES.items()
    for case in listed
    for product in products_of(operation, case)
)

# Every kernel once or twice, for what is repeated.
REPEATED = tuple(
    one for one in ALL if one[1].name in ("D16-key", "channels_last", "volume", "large")
)


def _affinity(sample: Sample) -> tuple[dict[str, Tensor], dict[str, str]]:
    query, key = sample.args
    given = {"query": query, "key": key, **sample.kwargs}
    inputs = {name: x.detach() for name, x in given.items() if isinstance(x, Tensor)}
    options = {"form": "affinity", **sample.kwargs}
    chosen = ("form", "temperature", "normalize")
    return inputs, {name: _text(options[name]) for name in chosen}


def _gate(sample: Sample) -> tuple[dict[str, Tensor], dict[str, str]]:
    features, logits = sample.args
    return {"features": features.detach(), "logits": logits.detach()}, {}


def _ratio(sample: Sample) -> tuple[dict[str, Tensor], dict[str, str]]:
    labels, centers, windows = sample.args
    labels = labels.to(torch.uint8) if labels.dtype == torch.bool else labels
    options = {name: _text(value).removeprefix("torch.") for name, value in sample.kwargs.items()}
    return {"labels": labels, "centers": centers, "windows": torch.tensor(windows)}, options


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


INPUTS = {"pair_affinity": _affinity, "uncertainty_reweight": _gate, "patch_class_ratio": _ratio}


def calls(operation: str, case: Case, product: str) -> list[cases.Call]:
    """The forward call, and the backward call where there is one."""
    one, dtype = spec(operation), cases.DTYPES[product]
    if case.dtypes == (torch.float64,):
        dtype = torch.float64
    sample = one.sample(case, dtype)
    rounding = PRODUCTS[product] if operation == "pair_affinity" else ""
    plain, truth, exact = plain_and_truth(one, sample, rounding)
    inputs, options = INPUTS[operation](sample)
    if operation == "pair_affinity":
        options["product"] = product
    name = f"{operation}-{product}-{case.name}"
    if operation == "patch_class_ratio":  # counts are exact, the quotient is rounded once
        return [cases.Call(name, operation, inputs, options, plain, {"value": 0.0})]
    tolerance = {
        k: allowed(
            plain[k], x, plain[k].dtype, natural_scale(k, one, case, exact), one.tolerance, case
        )
        for k, x in truth.items()
    }
    values = {k: x for k, x in truth.items() if not k.startswith("d_")}
    back = {f"d_{k.replace('value', 'out')}": upstream(plain[k]) for k in values}
    if operation == "pair_affinity":
        back["log_z"] = plain["log_z"]
    gradients = {k: rows(x) if x.dim() else x for k, x in truth.items() if k.startswith("d_")}
    return [
        cases.Call(name, operation, inputs, options, values, tolerance),
        cases.Call(
            f"{name}-backward",
            f"{operation}_backward",
            {**inputs, **back},
            options,
            gradients,
            tolerance,
        ),
    ]
