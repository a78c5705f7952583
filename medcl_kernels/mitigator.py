"""`GradientMitigator`: the module that `medcl_kernels.nn` shows, beside the functions it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .functional import mitigate_parameters
from .losses.gradient_mitigator import (
    attach,
    check_mitigation,
    gradients_of,
    mitigated,
    stacked_rows,
)


class GradientMitigator(nn.Module):
    """One gradient from several losses that may contradict each other: `mitigate_gradients` where
    a training step needs it.

    At a representation: call the module, then `backward()` as usual; the encoder sees one backward
    pass. At the parameters: `mitigator.backward(losses, parameters)` instead of `loss.backward()`.

    Args:
        method, unit, order, reduction, strength, impl: see `mitigate_gradients`; `unit` is about
            representations, parameters are one flat vector.
        seed: of the random order, which depends on (seed, number of the step) only, so that it is
            the same on every rank and after a restart (the step is in the state dict).

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> mitigator = medcl.GradientMitigator()
        >>> x = torch.randn(1, 16, 8, 8, requires_grad=True)
        >>> maps = list(torch.randint(0, 2, (3, 1, 8, 8)))
        >>> loss = mitigator(x, lambda z: medcl.supervised_contrastive(z, maps))
        >>> loss.backward()
    """

    step: Tensor

    def __init__(
        self,
        *,
        method: str = "pcgrad",
        unit: str = "row",
        order: str = "random",
        reduction: str = "mean",
        strength: float = 0.5,
        seed: int = 0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_mitigation(method, unit, order, reduction, strength)
        checks.choice("impl", impl, checks.IMPLS)
        self.method, self.unit, self.order, self.reduction = method, unit, order, reduction
        self.strength, self.seed, self.impl = strength, seed, impl
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._step = 0  # host copy: reading the buffer would synchronise a GPU at every step

    def extra_repr(self) -> str:
        names = ("method", "unit", "order", "reduction", "strength", "seed", "impl")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self,
        features: Tensor,
        losses: Callable[[Tensor], Tensor | Sequence[Tensor]]
        | Sequence[Callable[[Tensor], Tensor]],
    ) -> Tensor:
        """Mean (or sum) of the losses, whose gradient at `features` is the mitigated one.

        Losses of perspectives that differ in their labels only: `mitigated_contrastive` needs one
        pass for all. bfloat16 and float16 features are handed to the losses as float32, so that
        their gradients are compared, and later multiplied by a loss scale, in float32.

        Args:
            features: `(B, C, *spatial)` or `(N, C)`; with unit "row" a row is a pixel. Each rank
                compares its own rows.
            losses: a function of `features` that returns M losses, or M functions that return one.

        Returns:
            0-d tensor; it can be differentiated once.
        """
        checks.features(features, "features")
        half = features.dtype in (torch.bfloat16, torch.float16)
        leaf = features.detach().float() if half else features.detach()
        needed = torch.is_grad_enabled() and features.requires_grad
        leaf.requires_grad_(needed)
        values = losses(leaf) if callable(losses) else [one(leaf) for one in losses]
        listed = list(values)
        total = torch.stack([value.detach() for value in listed])
        summed = self.reduction == "sum" or self.method == "sum"
        value = total.sum() if summed else total.mean()
        if not needed:
            return value
        combined = mitigated(
            stacked_rows(gradients_of(listed, leaf)),
            self.method,
            self.unit,
            self.order,
            self._generator(),
            self.reduction,
            self.strength,
            self.impl,
        )
        return attach(features, value, combined)

    def backward(
        self,
        losses: Sequence[Tensor] | Tensor,
        shared: Iterable[Tensor],
        heads: Iterable[Tensor] = (),
        *,
        scaler: Any = None,
        group: Any = None,
    ) -> Tensor:
        """`mitigate_parameters(losses, shared, heads, ...)` with this module's options."""
        return mitigate_parameters(
            losses,
            shared,
            heads,
            method=self.method,
            order=self.order,
            generator=self._generator(),
            reduction=self.reduction,
            strength=self.strength,
            scaler=scaler,
            group=group,
            impl=self.impl,
        )

    def _generator(self) -> torch.Generator:
        """Of this step's order."""
        generator = torch.Generator().manual_seed((self.seed << 32) + self._step)
        self._step += 1
        self.step.fill_(self._step)
        return generator

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """torch's hook for loading: refresh the host copy."""
        super()._load_from_state_dict(*args, **kwargs)
        self._step = int(self.step)
