"""Patch-dragsaw contrast (PDCR): every pair of cells pulled together by the affinity of its patches
and pushed apart by their divergence.

Notation and gradients: reference/pair_affinity.py (D1)-(D5). The loss of pair (i, j) and patch size
p is

    l_ij = logsumexp_k(Q_ik t_ik) - P_ij t_ij

and the mean over j and p is the loss of anchor i: log_z_i - linear_i / N2. Identical features give
log N2 for every pair, which is an offset worth subtracting from plots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..distributed import Gather, taking_part, with_ranks
from ..layout import num_rows, row_shape, rows
from ..ops.pair_affinity import pair_affinity
from ..ops.pair_argmax import pair_argmax
from ..ops.positive_at import positive_at
from ..reference.pair_affinity import FORMS
from .scaling import fixed, scale_rows

SHIFTS = ("constant", "max", "max_attached")


@with_ranks
@checks.explains_memory
def patch_affinity_contrast(
    features: Tensor,
    ratios: Tensor,
    *,
    key: Tensor | None = None,
    key_ratios: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    form: str = "affinity",
    shift: str = "constant",
    normalize: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
    gather_distributed: Gather = False,
) -> Tensor:
    """Contrast all pairs of cells of an image, weighted by the class shares of their patches.

    Equals, for one image and one patch size:
        f = F.normalize(features[0], dim=0)
        t = (f.t() @ f - 1) / temperature
        D = (ratios[0, 0, :, :, None] - ratios[0, 0, :, None, :]).abs().sum(0)
        loss = ((D * t).logsumexp(1, keepdim=True) - (1 - D) * t).mean()

    Args:
        features: `(B, C, N)` sampled cells, `(B, C, *spatial)` all cells, or `(N, C)`; float64
            (CPU), float32, bfloat16 or float16; any strides.
        ratios: `(P, B, K, N)` class shares of the patches of these cells, from
            `patch_class_ratio`; no gradient. Half of them halve D, which reaches 2 where K > 1.
        key: candidates from another layer, `(B, C, N2)`; N2 may differ. None: the features
            themselves, each cell with itself included.
        key_ratios: `(P, B, K, N2)`, the shares that belong to `key`.
        temperature: positive number (1.0 in 2-D, 0.5 in 3-D), or a 0-d tensor that learns.
        form: "affinity" puts the affinity 1 - D into the numerator and the divergence D into the
            denominator; "release2d" swaps them, as the published 2-D code does (that form does not
            separate classes).
        shift: t = similarity - shift. "constant": 1/temperature. "max": the largest similarity of
            the whole batch; "max_attached": the same, with its gradient. For a layer against itself
            all three are equal.
        normalize: scale cells to unit length; zero vectors have similarity 0 and gradient 0.
        reduction: "mean" over images, pairs and patch sizes; "sum" over images and pairs, mean over
            patch sizes; "none": one value per anchor, the mean over its candidates and sizes.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.
        gather_distributed: True, or a ProcessGroup: the candidates come from all ranks, see
            `medcl_kernels.distributed`. For flat `(N, C)` cells with shift="constant" only: cells
            of other ranks are never in the same image.

    Returns:
        0-d tensor, or `(B, N)` (shaped like the cells) for "none". float64 for float64 input, else
        float32.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> labels = torch.randint(0, 2, (2, 64, 64))
        >>> cells = torch.cartesian_prod(torch.arange(16), torch.arange(16))
        >>> ratios = medcl.patch_class_ratio(labels, 4 * cells, (5, 7, 9), num_classes=2)
        >>> loss = medcl.patch_affinity_contrast(torch.randn(2, 32, 16, 16), ratios)
    """
    checks.features(features, "features")
    checks.temperature(temperature)
    checks.choice("form", form, FORMS)
    checks.choice("shift", shift, SHIFTS)
    checks.options(reduction, impl)
    _check_ratios(ratios, features, "ratios", "features")
    if key is None:
        if key_ratios is not None:
            raise ValueError("key_ratios without key: pass key=, the cells that they describe")
    else:
        checks.key_features(features, key, names=("features", "key"))
        if key_ratios is None:
            raise ValueError("key needs key_ratios, the class shares of the patches of its cells")
        _check_ratios(key_ratios, key, "key_ratios", "key")
        if (key_ratios.shape[0], key_ratios.shape[2]) != (ratios.shape[0], ratios.shape[2]):
            raise ValueError(
                "key_ratios must have the P and K of ratios, "
                f"{(ratios.shape[0], ratios.shape[2])}; got "
                f"{(key_ratios.shape[0], key_ratios.shape[2])}"
            )
    _check_gather(gather_distributed, features, shift)
    q, k = rows(features), None if key is None else rows(key)
    checks.finite(q, "features")
    q = scale_rows(q, temperature, normalize, None)
    if k is not None:
        checks.finite(k, "key")
    ranks = taking_part(gather_distributed)
    if ranks is not None:  # a cell is a candidate of its own, so its own set is nothing special
        found = ranks.gather(
            features=features if key is None else key,
            ratios=(ratios if key_ratios is None else key_ratios).movedim(3, 0),
        )
        k, key_ratios = rows(found[0].everyone()), found[1].everyone().movedim(0, 3)
    if k is not None:
        k = scale_rows(k, temperature, normalize, None)
    options: dict[str, Any] = {**fixed(temperature, normalize), "impl": impl}
    log_z, linear = pair_affinity(
        q,
        k,
        query_ratios=ratios,
        key_ratios=key_ratios,
        shift=_shift(q, k, shift, temperature, options),
        form=form,
        **options,
    )
    candidates = (q if k is None else k).shape[2]
    values = (log_z - linear / candidates).mean(0)  # (B, N)
    if reduction == "none":
        return values.reshape(row_shape(features))
    return values.mean() if reduction == "mean" else values.sum() * candidates


def _check_gather(gather_distributed: Gather, features: Tensor, shift: str) -> None:
    if gather_distributed is False:
        return
    if features.dim() != 2:
        raise ValueError(
            "gather_distributed needs flat (N, C) cells, which are one set: the candidates of "
            f"{checks.shape_of(features)} are the cells of the anchor's own image, so there is "
            "nothing to gather"
        )
    if shift != "constant":
        raise ValueError(
            f"gather_distributed needs shift='constant': shift={shift!r} is the largest similarity "
            "of all anchors, and each rank knows its own only"
        )


def _check_ratios(ratios: Tensor, features: Tensor, name: str, other: str) -> None:
    if not isinstance(ratios, Tensor) or not ratios.is_floating_point():
        what = ratios.dtype if isinstance(ratios, Tensor) else type(ratios).__name__
        raise TypeError(
            f"{name} must be a floating-point tensor of class shares, from patch_class_ratio; got "
            f"{what}"
        )
    batch, length = num_rows(features)
    shape = checks.shape_of(ratios)
    if ratios.dim() != 4 or (shape[1], shape[3]) != (batch, length) or 0 in shape:
        raise ValueError(
            f"{name} must be {('P', batch, 'K', length)}, patch sizes and classes of every cell of "
            f"{other}, {checks.shape_of(features)}; got {shape}"
        )
    checks.same_kind(features, other, ratios, name, dtype=False)


def _shift(
    q: Tensor, k: Tensor | None, shift: str, temperature: float | Tensor, options: dict[str, Any]
) -> Tensor | None:
    """m of (D1), None where the operation's own 1/temperature is meant."""
    if shift == "constant":
        return temperature.reshape(()).reciprocal() if isinstance(temperature, Tensor) else None
    other = q if k is None else k
    plain = {"normalize": options["normalize"], "impl": options["impl"]}
    index, value = pair_argmax(q, other, **plain)  # (B, N)
    if shift == "max":
        return value.amax() / options["temperature"]
    best = torch.arange(value.numel(), device=value.device) == value.argmax()
    return positive_at(q, other, torch.where(best.view_as(index), index, -1), **options).sum()
