"""One helper that judges any operation or loss on any backend: `check_op`.

Truth is the reference in float64 on exactly the values that were tested. A tensor may be off by
twice the error that the reference itself makes in the tested dtype, plus eps times the natural
scale of that tensor, so that an error is measured against what plain torch would have done, not
against a hand-picked number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medcl_kernels import dispatch
from medcl_kernels.registry import Case, OpSpec, Sample

OUTPUTS = {
    "info_nce_sum": ("value", "anchors"),
    "supervised_sum": ("value", "anchors"),
    "positive_mean": ("mean", "count"),
    "pair_argmax": ("index", "value"),
    "pair_affinity": ("log_z", "linear"),
    "dense_correspondence": ("index",),
}


def backends() -> list[Any]:
    """`(impl, device)` parameters: every backend of the package, those for a GPU marked so."""
    result = []
    for impl in dispatch.available():
        if impl in ("reference", "cpu"):
            result.append(pytest.param(impl, "cpu", id=impl))
        else:
            result.append(pytest.param(impl, "cuda", id=impl, marks=pytest.mark.gpu))
    return result


def need(op: str, impl: str, device: str, dtype: torch.dtype) -> None:
    """Skip, with the reason, where a backend cannot run here."""
    reason = dispatch.available()[impl]
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")
    if device != "cpu":
        try:
            dispatch.select(op, impl, device, dtype)
        except (RuntimeError, ValueError) as error:
            pytest.skip(f"{impl}: {error}")


def run(function: Callable[..., Any], sample: Sample, names: tuple[str, ...], **extra: Any) -> dict:
    """Outputs by name, and `d_<leaf>` for the upstream gradient of `upstream`."""
    outputs = function(*sample.args, **sample.kwargs, **extra)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if len(names) != len(outputs):
        names = tuple(f"{names[0]}[{position}]" for position in range(len(outputs)))
    named = dict(zip(names, outputs, strict=True))
    with_gradient = [value for value in outputs if value.requires_grad]
    if with_gradient:
        leaves = sample.differentiable
        gradients = torch.autograd.grad(
            with_gradient,
            list(leaves.values()),
            [upstream(value) for value in with_gradient],
            allow_unused=True,
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            named[f"d_{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return {name: value.detach() for name, value in named.items()}


def upstream(value: Tensor) -> Tensor:
    """A fixed gradient of the loss with respect to an output, never all ones, exact in float32."""
    ramp = torch.arange(value.numel(), device=value.device, dtype=torch.float64)
    waves = 0.75 + 0.5 * torch.cos(ramp * 1.7) + 0.25 * torch.sin(ramp * 0.3)
    return waves.float().to(value.dtype).reshape(value.shape)


def check_op(
    spec: OpSpec, case: Case, dtype: torch.dtype, impl: str, device: str = "cpu", seed: int = 0
) -> None:
    """Fails, naming the tensor, unless outputs and gradients are within the tolerance."""
    sample = spec.sample(case, dtype, device, seed)
    names = OUTPUTS.get(spec.name, ("value",))
    ours = run(spec.resolve(), sample, names, impl=impl)
    plain = run(spec.resolve_reference(), sample.copy(), names)
    exact = sample.double()
    truth = run(spec.resolve_reference(), exact, names)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert value.shape == truth[name].shape, f"{name}: {value.shape} != {truth[name].shape}"
        assert value.dtype == plain[name].dtype, f"{name}: {value.dtype} != {plain[name].dtype}"
        if name == "index":
            check_index(value, truth[name], exact, case, dtype)
        elif not value.is_floating_point():
            assert torch.equal(value, truth[name]), f"{name} differs"
        else:
            scale = natural_scale(name, spec, case, exact)
            compare(name, value, plain[name], truth[name], scale, spec.tolerance, case)


def compare(
    name: str, ours: Tensor, plain: Tensor, truth: Tensor, scale: float, slack: float, case: Case
) -> None:
    """The tolerance rule for one tensor."""
    assert not truth.isnan().any(), f"{name}: NaN in the truth, a fault of the test"
    finite = truth.isfinite()
    assert torch.equal(ours[~finite].double(), truth[~finite]), f"{name}: infinities differ"
    assert ours[finite].isfinite().all(), f"{name}: {(~ours[finite].isfinite()).sum()} not finite"
    if not finite.any():
        return
    error = (ours[finite].double() - truth[finite]).abs().max().item()
    allowed = 2 * (plain[finite].double() - truth[finite]).abs().max().item()
    size = max(truth[finite].abs().max().item(), scale)
    if ours.dtype == torch.float64:
        # The truth rounds here too: exp(s) is off by eps * |s|, and |s| goes up to 1/temperature.
        slack *= max(4.0, 1.0 / case.temperature)
    allowed += slack * torch.finfo(ours.dtype).eps * size
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g} (size {size:.3g})"


def natural_scale(name: str, spec: OpSpec, case: Case, exact: Sample) -> float:
    """The size of the numbers that a tensor is made of, where these cancel.

    1/temperature for similarities, and what (P4) and (P5) of reference/pairs.py make of it for
    gradients of rows, once for every softmax or mean whose gradients meet in one row.
    """
    scale = 1.0 / case.temperature
    if name in ("d_lse_negative", "d_shift"):
        return 1.0
    if not name.startswith("d_"):
        return scale
    if case.normalize:
        leaf = exact.differentiable[name[2:]]
        flat = leaf.t() if leaf.dim() == 2 else leaf.flatten(2).movedim(1, 0).flatten(1)
        norms = flat.detach().norm(dim=0)
        norms = norms[norms.isfinite() & (norms > 0)]
        if norms.numel():
            scale /= norms.min().item()
    options = dict(case.options)
    scale *= 2 if spec.kind == "loss" else len(options.get("kinds", ("all",)))
    averaged = spec.kind == "loss" and options.get("reduction", "mean") == "mean"
    batch, length = case.rows()
    return scale / (batch * length) if averaged else scale


def check_index(ours: Tensor, truth: Tensor, exact: Sample, case: Case, dtype: torch.dtype) -> None:
    """Indices agree, but for candidates whose true similarities are equal to rounding."""
    differ = ours != truth
    if not differ.any():
        return
    from medcl_kernels.layout import rows
    from medcl_kernels.reference.pairs import similarities

    query, key = rows(exact.args[0]), rows(exact.args[1])
    scores = similarities(query, key, None, None, 1.0, case.normalize, False).detach()
    ours, truth = ours.reshape(scores.shape[:2]), truth.reshape(scores.shape[:2])
    assert (ours >= 0).eq(truth >= 0).all(), "index: matched and unmatched pixels differ"
    reached = scores.gather(2, ours.clamp_min(0).unsqueeze(2))
    best = scores.gather(2, truth.clamp_min(0).unsqueeze(2))
    size = scores.abs().max().item()
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    worst = (best - reached).max().item()
    assert worst <= 8 * eps * size, f"index: a candidate {worst:.3g} below the best was chosen"
