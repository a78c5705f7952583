"""Gradient Mitigator at the parameters: one backward pass per loss, one update.

The flat gradients g_a of M losses by the shared parameters are combined as in
reference/mitigate_rows.py (unit "flat"); parameters that belong to one branch only, such as
projection heads, take the plain combination.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .gradient_mitigator import check_mitigation, check_perspectives, mitigated

ROW = 256  # a flat gradient is handed to the kernel in rows of this many numbers


def mitigate_parameters(
    losses: Sequence[Tensor] | Tensor,
    shared: Iterable[Tensor],
    heads: Iterable[Tensor] = (),
    *,
    method: str = "pcgrad",
    order: str = "random",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    strength: float = 0.5,
    scaler: Any = None,
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """`backward` for several losses: adds their combined gradient to `.grad` of the parameters.

    In a process group every loss's gradient is averaged over the ranks, in float32, before any two
    are compared, so that all ranks take the same step; do not let DistributedDataParallel reduce
    them again (use its `no_sync()` around the forward pass, or the bare module).

    Args:
        losses: M 0-d tensors of one forward pass, or `(M,)`.
        shared: parameters whose gradients are compared and combined.
        heads: parameters that get the plain mean (or sum) of their gradients.
        method, order, generator, reduction, strength: see `mitigate_gradients`. Ranks of a group
            must draw the same order: give them generators of one seed.
        scaler: the `torch.amp.GradScaler` of the step, if there is one: losses are scaled before,
            gradients compared unscaled and left scaled in `.grad`, as `scaler.step` and
            `scaler.unscale_` expect them.
        group: the process group; None: the default group where `torch.distributed` is initialised.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d tensor, the mean (or sum) of the losses, detached.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.
    """
    check_mitigation(method, "flat", order, reduction, strength)
    checks.choice("impl", impl, checks.IMPLS)
    listed = list(losses)
    check_perspectives(len(listed))
    for position, loss in enumerate(listed):
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            shape = checks.shape_of(loss) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"losses[{position}] must be a 0-d tensor; got {shape}")
    compared, plain = list(shared), list(heads)
    if not compared:
        raise ValueError("shared is empty: pass the parameters whose gradients may conflict")
    one = torch.ones((), device=compared[0].device)
    scale = 1.0 if scaler is None else float(scaler.scale(one))
    used = [False] * (len(compared) + len(plain))
    flat = _flat_gradients(listed, compared, plain, scale, used)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
        used = [True] * len(used)
    size = _padded(sum(one.numel() for one in compared))
    head = flat[:, size:].sum(0)
    in_rows = flat[:, :size].unflatten(1, (-1, ROW)).unsqueeze(1).transpose(2, 3)
    combined = mitigated(in_rows, method, "flat", order, generator, reduction, strength, impl)
    if reduction == "mean" and method != "sum":
        head = head / len(listed)
    combined = combined.transpose(1, 2).flatten()
    for part, members in ((combined, compared), (head, plain)):
        _accumulate(members, part * scale, used[: len(members)])
        used = used[len(members) :]
    total = torch.stack([loss.detach() for loss in listed])
    return total.sum() if reduction == "sum" or method == "sum" else total.mean()


def _padded(size: int) -> int:
    """Zeros at the end make whole rows, which the kernel shares out among threads."""
    return (size + ROW - 1) // ROW * ROW


def _flat_gradients(
    losses: list[Tensor],
    compared: list[Tensor],
    plain: list[Tensor],
    scale: float,
    used: list[bool],
) -> Tensor:
    """`(M, P)` float32 (float64 for float64 parameters), unscaled: the compared ones, zeros up to a
    whole row, the others. Marks who has a gradient."""
    parameters = compared + plain
    dtype = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    start = _padded(sum(one.numel() for one in compared))
    shape = (len(losses), start + sum(one.numel() for one in plain))
    flat = torch.zeros(shape, dtype=dtype, device=parameters[0].device)
    sizes = [one.numel() for one in compared], [one.numel() for one in plain]
    for m, loss in enumerate(losses):
        if not loss.requires_grad:
            continue
        found = torch.autograd.grad(
            loss * scale, parameters, retain_graph=m + 1 < len(losses), allow_unused=True
        )
        first = flat[m, : sum(sizes[0])].split(sizes[0])
        places = [*first, *(flat[m, start:].split(sizes[1]) if plain else ())]
        for i, (place, gradient) in enumerate(zip(places, found, strict=True)):
            if gradient is not None:
                used[i] = True
                place.copy_(gradient.flatten())
    return flat if scale == 1.0 else flat.div_(scale)


def _accumulate(parameters: list[Tensor], combined: Tensor, used: list[bool]) -> None:
    """Adds to `.grad`, as a backward pass does."""
    sizes = [one.numel() for one in parameters]
    parts = combined[: sum(sizes)].split(sizes) if sizes else ()
    for parameter, part, has_gradient in zip(parameters, parts, used, strict=True):
        if not has_gradient:
            continue
        gradient = part.reshape(parameter.shape).to(parameter.dtype)
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
