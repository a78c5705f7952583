"""The worked example of the GCL specification through the CUDA kernels on the host emulator."""

from __future__ import annotations

from typing import Any

import emulator_cases
import host_build
import pytest
import test_gradient_filter_examples as examples
from test_emulator import SCHEDULES, run
from test_gradient_filter_examples import *  # noqa: F403  its tests, with the fixture below
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medcl_kernels import dispatch

pytestmark = pytest.mark.skipif(
    host_build.missing_tools() is not None, reason=str(host_build.missing_tools())
)
# results of the emulator in the order of the operation; others have one, "value"
RESULTS = {
    "pair_topk": ("anchor", "candidate", "gradient", "threshold", "cut"),
    "pair_positive_log": ("value", "tail"),
    "positive_mean": ("mean", "count"),
}
NOT_FOR_KERNELS = ("need_query", "need_key", "rows_first")


class Emulated(TorchDispatchMode):
    """The operations of `torch.ops.medcl`, those of backward passes too, by the emulator. Each
    comes with another order of threads."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "medcl":
            return func(*args, **(kwargs or {}))
        name = func._opname
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=True))
        if name == "pair_filtered_grad":  # hands its value on; the kernel is that of the gradient
            return given["value"].clone()
        inputs = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        options = {
            key: str(int(x)) if isinstance(x, bool) else str(x)
            for key, x in given.items()
            if not isinstance(x, Tensor | None) and key not in NOT_FOR_KERNELS
        }
        if name != "mitigate_rows":
            options["product"] = "ieee"
        call = emulator_cases.Call(name, name, inputs, options, {}, {})
        found = run(call, SCHEDULES[len(self.ran) % len(SCHEDULES)])
        self.ran.append(name)
        if name.endswith("_backward"):
            needed = {side: given[f"need_{side}"] and side in inputs for side in ("query", "key")}
            nothing = inputs["query"].new_empty(0)
            return tuple(found[f"d_{side}"] if needed[side] else nothing for side in needed)
        results = tuple(found[one] for one in RESULTS.get(name, ("value",)))
        if given.get("rows_first"):
            results = (results[0].transpose(1, 2),)
        return results if len(results) > 1 else results[0]


@pytest.fixture
def impl(monkeypatch):
    """The CUDA backend as on a GPU, its kernels on the emulator."""
    examples.in_float32(monkeypatch)
    here = dispatch.Backend(
        "cuda", ("cpu",), dispatch.FLOATS[1:], dispatch.GPU_KERNELS, lambda: None
    )
    others = tuple(one for one in dispatch.BACKENDS if one.name != "cuda")
    monkeypatch.setattr(dispatch, "BACKENDS", (here, *others))
    with Emulated() as emulated:
        yield "cuda"
    assert emulated.ran
