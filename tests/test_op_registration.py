"""What torch expects of an operation: `torch.library.opcheck` on calls that are really made."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medcl_kernels.ops import registration
from medcl_kernels.registry import SPECS

CASES = ("two_rows", "key_batch", "channels_last", "transposed", "image", "bfloat16", "key_several")
LEAVES = ("query", "key", "lse_negative", "shift", "features", "logits")
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every `medcl::` call, those that autograd makes included."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "medcl":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(one):
    """Distinct operations with arguments, from forward and backward of a few cases."""
    from op_checks import OUTPUTS, run

    calls = []
    for case in one.cases:
        if case.name not in CASES:
            continue
        sample = one.sample(case, case.dtypes[0])
        with Recorder() as recorder:
            run(one.resolve(), sample, OUTPUTS.get(one.name, ("value",)), impl="cpu")
        calls += recorder.calls
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "one", [one for one in SPECS if one.kind == "op"], ids=lambda one: one.name
)
def test_opcheck_passes_for_every_recorded_call(one):
    calls = recorded(one)
    assert any(func._schema.name == f"medcl::{one.name}" for func, _ in calls)
    for func, args in calls:
        # An index and a backward operation have no derivative, by design.
        without = (
            "_backward",
            "pair_argmax",
            "pair_topk",
            "mitigate_rows",
            "patch_class_ratio",
        )
        differentiable = not func._schema.name.endswith(without)
        arguments = []
        for argument, value in zip(func._schema.arguments, args, strict=True):
            if isinstance(value, torch.Tensor):
                value = value.detach().clone(memory_format=torch.preserve_format)
                wanted = argument.name in LEAVES and differentiable
                value.requires_grad_(wanted)
            arguments.append(value)
        result = torch.library.opcheck(func, tuple(arguments), test_utils=CHECKS)
        assert set(result.values()) == {"SUCCESS"}


def test_every_defined_operation_is_reached_by_the_registry():
    import medcl_kernels.ops.info_nce_sum  # noqa: F401  (each import defines its operations)
    import medcl_kernels.ops.mitigate_rows
    import medcl_kernels.ops.pair_affinity
    import medcl_kernels.ops.pair_argmax
    import medcl_kernels.ops.pair_at
    import medcl_kernels.ops.pair_filtered_grad
    import medcl_kernels.ops.pair_hinge
    import medcl_kernels.ops.pair_logsumexp
    import medcl_kernels.ops.pair_positive_log
    import medcl_kernels.ops.pair_topk
    import medcl_kernels.ops.patch_class_ratio
    import medcl_kernels.ops.positive_at
    import medcl_kernels.ops.positive_mean
    import medcl_kernels.ops.supervised_sum
    import medcl_kernels.ops.uncertainty_reweight  # noqa: F401

    reached = set()
    for one in SPECS:
        if one.kind == "op":
            reached |= {func._schema.name.removeprefix("medcl::") for func, _ in recorded(one)}
    assert {f"medcl::{name}" for name in reached} == {
        name for name in registration.NAMES if name.startswith("medcl::")
    }


def test_both_namespaces_declare_the_same_operations():
    """All but the fused sums, which other backends compose, and the tiles of plain torch, which
    serve all."""
    declared = {"medcl": {}, "medcl_triton": {}}
    for full_name in registration.NAMES:
        namespace, name = full_name.split("::")
        operation = getattr(getattr(torch.ops, namespace), name).default
        declared[namespace][name] = str(operation._schema).removeprefix(f"{namespace}::")
    once = {
        "info_nce_sum",
        "supervised_sum",
        "scale_gradients",
        "pair_hinge",
        "pair_hinge_backward",
    }
    assert declared["medcl"].keys() - declared["medcl_triton"].keys() == once
    assert declared["medcl_triton"].items() <= declared["medcl"].items()
