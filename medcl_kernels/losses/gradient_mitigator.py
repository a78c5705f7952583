"""Gradient Mitigator: one update from the gradients of several perspectives that may conflict.

reference/mitigate_rows.py (T1) to (T4) defines the methods. After Wu et al., "Gradient-Guided
Contrastive Learning for Medical Image Segmentation with Multi-Perspective Meta Labels", ACM MM 2023
(arXiv:2309.08888), which alleviates contradictions between labels in optimisation; that this is
PCGrad is this project's reading.

Perspectives that differ in their labels only share a softmax. With p of (L2), w the weight of every
anchor, and mean_i^m the mean over the anchor's positives under perspective m,

    dL^m/dz_i = d(w sum_i lse_i)/dz_i - d(w sum_i mean_i^m)/dz_i           (M1)

so one dense pass serves all M gradients, and each adds a sum over classes, O(N D). That holds where
all perspectives have the same anchors, which takes a look at the labels: on a GPU each call waits
for it once. While a CUDA graph is captured and under torch.compile nobody may look, and every
perspective has its own pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layout import rows
from ..ops.mitigate_rows import mitigate_rows
from ..ops.pair_logsumexp import pair_logsumexp
from ..ops.positive_mean import positive_mean
from ..reference.mitigate_rows import METHODS
from .scaling import fixed
from .supervised_contrastive import label_maps, supervised_contrastive

ORDERS = ("random", "fixed")
MOST = 8  # perspectives


def mitigate_gradients(
    gradients: Tensor,
    *,
    method: str = "pcgrad",
    unit: str = "row",
    order: str = "random",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    strength: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """Combine the gradients of M perspectives so that they do not undo each other.

    Equals, for two perspectives, method "pcgrad", unit "row" and reduction "sum":
        a, b = gradients
        q = (a * b).sum(1, keepdim=True).clamp_max(0)
        a - q / b.square().sum(1, keepdim=True) * b + b - q / a.square().sum(1, keepdim=True) * a

    Args:
        gradients: `(M, N, D)`, M from 1 to 8; any strides. Gradients of parameters: `(M, 1, D)`.
        method: "pcgrad" projects each gradient off those that it conflicts with (negative inner
            product); "consensus" keeps entries on whose sign all agree; "cagrad" stays near the
            mean and improves the worst; "mean" and "sum" do nothing about conflicts.
        unit: what is compared, each "row" by itself or all rows as one "flat" vector. "consensus"
            compares single entries either way.
        order: in which a gradient meets the others with "pcgrad" (of consequence for M >= 3):
            "random", or "fixed" (ascending).
        generator: CPU generator of the random order; the same on every rank of a group.
        reduction: "mean" (equal to the plain mean where nothing conflicts) or "sum".
        strength: c of "cagrad", 0 or more.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        `(N, D)` in the dtype of `gradients`. No gradient.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> combined = medcl.mitigate_gradients(torch.randn(3, 100, 16), order="fixed")
    """
    check_mitigation(method, unit, order, reduction, strength)
    checks.choice("impl", impl, checks.IMPLS)
    if not isinstance(gradients, Tensor):
        raise TypeError(
            f"gradients must be one tensor (M, N, D); got {type(gradients).__name__}: "
            "torch.stack them"
        )
    if gradients.dim() != 3 or gradients.numel() == 0:
        raise ValueError(
            "gradients must be (M, N, D) and not empty: one gradient per perspective, row and "
            f"channel; got {checks.shape_of(gradients)}"
        )
    if gradients.dtype not in checks.FEATURE_DTYPES:
        raise TypeError(f"gradients must be floating point; got {gradients.dtype}")
    in_rows = gradients.movedim(2, 1).unsqueeze(1)  # (M, 1, D, N)
    combined = mitigated(in_rows, method, unit, order, generator, reduction, strength, impl)
    return combined[0].t()


def mitigated(
    gradients: Tensor,
    method: str,
    unit: str,
    order: str,
    generator: torch.Generator | None,
    reduction: str,
    strength: float,
    impl: str,
) -> Tensor:
    """`mitigate_rows` of checked arguments: `(M, B, D, L)` -> `(B, D, L)`."""
    check_perspectives(gradients.shape[0])
    meeting = meeting_order(gradients.shape[0], order, generator)
    return mitigate_rows(
        gradients.detach(),
        meeting,
        method=method,
        unit=unit,
        reduction=reduction,
        strength=strength,
        impl=impl,
    )


def check_perspectives(number: int) -> None:
    """1 to 8."""
    if not 1 <= number <= MOST:
        raise ValueError(
            f"gradients of 1 to {MOST} perspectives can be combined; got {number}: average some of "
            "them first"
        )


def check_mitigation(method: str, unit: str, order: str, reduction: str, strength: float) -> None:
    """The options of a mitigation."""
    checks.choice("method", method, METHODS)
    checks.choice("unit", unit, ("row", "flat"))
    checks.choice("order", order, ORDERS)
    checks.choice("reduction", reduction, ("mean", "sum"))
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength must be 0 or more and finite; got {strength}")


def meeting_order(number: int, order: str, generator: torch.Generator | None = None) -> Tensor:
    """For each of M perspectives the others in the order it meets them: `(M, M - 1)` int64."""
    others = [[b for b in range(number) if b != a] for a in range(number)]
    table = torch.tensor(others, dtype=torch.int64).reshape(number, number - 1)
    if order == "random" and number > 2:
        place = torch.rand(table.shape, generator=generator).argsort(1)
        table = table.gather(1, place)
    return table


def mitigated_contrastive(
    features: Tensor,
    labels: Sequence[Tensor],
    *,
    method: str = "pcgrad",
    unit: str = "row",
    order: str = "random",
    generator: torch.Generator | None = None,
    strength: float = 0.5,
    temperature: float = 0.1,
    pairs: str = "batch",
    normalize: bool = True,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Tensor:
    """Supervised contrast "out" of several perspectives, their gradients mitigated per pixel.

    The value is the mean of the perspectives' losses. The gradient of `features` is what
    `mitigate_gradients` makes of theirs. Where all perspectives have the same anchors, one dense
    pass serves all of them (M1); whether they do is looked up once per call, which waits for a GPU.
    Under torch.compile and while a CUDA graph is captured each has a pass of its own.

    Args:
        features: `(B, C, *spatial)` or `(N, C)`; the gradient is mitigated at this tensor. To
            mitigate at unit rows, scale them first and pass normalize=False.
        labels: M label maps, 1 to 8.
        method, unit, order, generator, strength: see `mitigate_gradients`.
        temperature: positive number.
        pairs, normalize, ignore_index, impl: see `supervised_contrastive`.

    Returns:
        0-d tensor: the mean loss. It can be differentiated once.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> x = torch.randn(2, 16, 8, 8, requires_grad=True)
        >>> patient, phase = torch.randint(0, 2, (2, 2, 8, 8)).unbind(0)
        >>> medcl.mitigated_contrastive(x, [patient, phase]).backward()
    """
    check_mitigation(method, unit, order, "mean", strength)
    checks.features(features, "features")
    if isinstance(temperature, Tensor):
        raise TypeError("temperature must be a number here: a gradient of its own is not mitigated")
    checks.temperature(temperature)
    checks.choice("pairs", pairs, ("batch", "image"))
    checks.choice("impl", impl, checks.IMPLS)
    if isinstance(labels, Tensor):
        raise TypeError("labels must be a sequence of label maps, one per perspective; got Tensor")
    maps = label_maps(labels, features, "labels", "features")
    check_perspectives(maps.shape[0])
    leaf = features.detach()
    if leaf.dtype in (torch.bfloat16, torch.float16):
        leaf = leaf.float()  # gradients are compared, and scaled by the loss scale, in float32
    leaf.requires_grad_(features.requires_grad)
    x = rows(leaf)
    checks.finite(x, "features", (maps != ignore_index).any(0))
    options: dict[str, Any] = {
        **fixed(temperature, normalize),
        "ignore_index": ignore_index,
        "across": pairs == "batch" and x.shape[0] > 1,
        "impl": impl,
    }
    needed = torch.is_grad_enabled() and features.requires_grad
    with torch.enable_grad():
        losses, found = _shared_softmax(leaf, x, maps, options, needed)
        if losses is None:
            losses = supervised_contrastive(
                leaf,
                labels,
                temperature=temperature,
                pairs=pairs,
                normalize=normalize,
                ignore_index=ignore_index,
                impl=impl,
            )
            found = gradients_of(losses, leaf) if needed else None
    value = losses.detach().mean()
    if found is None:
        return value
    in_rows = stacked_rows(found)
    combined = mitigated(in_rows, method, unit, order, generator, "mean", strength, impl)
    return attach(features, value, combined)


def _shared_softmax(
    leaf: Tensor, x: Tensor, maps: Tensor, options: dict[str, Any], needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(M1): losses `(M,)` and stacked gradients; (None, None) where anchors differ or that cannot
    be looked up."""
    if checks.traced(maps) or checks.capturing(maps):
        return None, None
    means, counts = [], []
    for m in range(maps.shape[0]):  # apart, so that each has a gradient of its own
        mean, count = positive_mean(x, query_labels=maps[m : m + 1], **options)
        means.append(mean[0])
        counts.append(count[0] > 0)
    valid, ignored = counts[0], maps == options["ignore_index"]
    alike = (torch.stack(counts) == valid) & (ignored == ignored[0])
    if not alike.all():
        return None, None
    weight = valid.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    weight = weight / weight.sum().clamp_min(1)
    lse = pair_logsumexp(x, query_labels=maps[:1], **options)[0]
    lse = torch.where(valid, lse, 0.0)
    losses = [((lse - mean).detach() * weight).sum() for mean in means]
    if not needed:
        return torch.stack(losses), None
    dense = torch.autograd.grad(lse, leaf, weight)[0]
    gradients = dense.new_empty((len(means), *dense.shape))
    for mean, to in zip(means, gradients, strict=True):
        torch.sub(dense, torch.autograd.grad(mean, leaf, weight)[0], out=to)
    return torch.stack(losses), gradients


def stacked_rows(stack: Tensor) -> Tensor:
    """View gradients of features, stacked, as `(M, B, D, L)`."""
    if stack.dim() == 3:
        return stack.transpose(1, 2).unsqueeze(1)
    return stack if stack.dim() == 4 else stack.flatten(3)


def gradients_of(losses: Tensor | Sequence[Tensor], leaf: Tensor) -> Tensor:
    """d losses[m] / d leaf for every m, stacked; zeros where a loss does not depend on it."""
    stack = leaf.new_zeros((len(losses), *leaf.shape))
    for m, loss in enumerate(losses):  # moved as they come: never 2 M gradients at a time
        if not loss.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(
            loss, leaf, retain_graph=m + 1 < len(losses), allow_unused=True
        )
        if gradient is not None:
            stack[m].copy_(gradient)
    return stack


class _Attached(torch.autograd.Function):
    """A number whose gradient by `features` is given."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = features.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * g).to(ctx.dtype), None, None


def attach(features: Tensor, value: Tensor, combined: Tensor) -> Tensor:
    """`value` with the gradient `combined` `(B, D, L)` at `features`."""
    gradient = combined[0].t() if features.dim() == 2 else combined.reshape(features.shape)
    return _Attached.apply(features, value, gradient)
