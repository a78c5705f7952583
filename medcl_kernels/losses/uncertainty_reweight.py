"""Entropy of a few logits as a gate on features: reference/uncertainty_reweight.py (U2)."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..layout import rows
from ..ops.uncertainty_reweight import uncertainty_reweight as reweight_rows


def uncertainty_reweight(features: Tensor, logits: Tensor, *, impl: str = "auto") -> Tensor:
    """Multiply features by two minus the normalised entropy of logits, in one pass.

    Equals:
        p = logits.softmax(1)
        U = -(p * p.log()).sum(1, keepdim=True) / log(logits.shape[1])
        features * (2 - U)

    Args:
        features: `(B, C, *spatial)` or `(N, C)`; float64 (CPU), float32, bfloat16 or float16; any
            strides.
        logits: `(B, M, *spatial)` or `(N, M)`, M >= 2, of the same dtype.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.

    Returns:
        Like `features`; the gradient reaches both arguments.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> x, z = torch.randn(2, 64, 32, 32), torch.randn(2, 2, 32, 32)
        >>> y = medcl.uncertainty_reweight(x, z)
    """
    checks.features(features, "features")
    checks.features(logits, "logits")
    checks.choice("impl", impl, checks.IMPLS)
    checks.same_kind(features, "features", logits, "logits")
    shape = checks.shape_of(features)
    if checks.shape_of(logits) != (shape[0], logits.shape[1], *shape[2:]):
        raise ValueError(
            f"logits must be {(shape[0], 'M', *shape[2:])} to go with features of shape {shape}; "
            f"got {checks.shape_of(logits)}"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            "logits must have at least two channels: the entropy of one class is always 0 and "
            "cannot be normalised; got 1"
        )
    x, z = rows(features), rows(logits)
    checks.finite(x, "features")
    checks.finite(z, "logits")
    y = reweight_rows(x, z, impl=impl)
    return y.squeeze(0).t() if features.dim() == 2 else y.reshape(shape)
