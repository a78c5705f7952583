"""One gradient from the losses of several perspectives and two branches: the Gradient Mitigator in
the training step (specs/gcl.md §2).

The combined gradient is handed to the training loop as a loss that has it: value + sum g (x - x0),
with x0 the same numbers without gradient. So mixed precision and optimiser know nothing of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import medcl_kernels as mk

from ..engine.seeding import generator
from .config import GclConfig
from .pixel_contrast import Selected

FP16_SCALE = 1024.0  # gradients by fp16 maps underflow without


@dataclass(frozen=True)
class Branch:
    """One of the two contrasts.

    Attributes:
        name: "image" or "pixel". weight: of its losses.
        features: (V, D) or (V, D, h, w), in the graph.
        losses: of such features, one per perspective.
        pairs: of such features, the pairs behind the losses, one list per perspective.
    """

    name: str
    weight: float
    features: Tensor
    losses: Callable[[Tensor], list[Tensor]]
    pairs: Callable[[Tensor], list[Selected]]


class Mitigator:
    """The settings `mitigator`, `conflict`, `branches`, ... at work."""

    def __init__(self, config: GclConfig):
        self.config = config
        self.kind, _, self.place = config.mitigator.partition("_")

    def __call__(
        self,
        branches: Sequence[Branch],
        encoder: Sequence[Tensor],
        heads: Sequence[Tensor],
        iteration: int,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """A loss whose gradient is the combined one, and what is to be logged: the loss of every
        branch, and for every two perspectives the share in conflict at the features and, where they
        are compared, of the encoder's gradients.

        Args:
            encoder, heads: parameters.
        """
        names = self.config.perspective_names
        logged: dict[str, float | Tensor] = {}
        values, found, total = [], [], torch.zeros((), device=branches[0].features.device)
        for branch in branches:
            if self.place == "param":
                losses, by_row, flat = self._by_parameters(branch, [*encoder, *heads])
                found.append(flat)
            else:
                losses, by_row = self._by_features(branch)
            logged |= self.conflict_rates(f"conflict_{branch.name}", by_row, names)
            value = losses.sum() if self._sums else losses.mean()
            logged[f"loss_{branch.name}"] = value.detach()
            if self.kind in ("mean", "sum"):
                total = total + branch.weight * value
            else:
                values.append(branch.weight * value.detach())
                if self.place != "param":
                    total = total + branch.weight * self._surrogate(branch, by_row, iteration)
        if self.place == "param":
            for branch, flat in zip(branches, found, strict=True):
                shared = flat[:, None, : sum(p.numel() for p in encoder)]
                logged |= self.conflict_rates(f"conflict_encoder_{branch.name}", shared, names)
            total = total + self._parameter_surrogate(branches, found, encoder, heads, iteration)
        return total + sum(values), logged

    @property
    def _sums(self) -> bool:
        return self.kind == "sum" or self.config.mitigate_reduction == "sum"

    def _by_features(self, branch: Branch) -> tuple[Tensor, Tensor]:
        """Losses (M,) and their gradients at the features' rows, (M, N, D)."""
        features = branch.features
        if self.kind not in ("mean", "sum"):  # nothing goes back beyond the features here
            features = features.detach().requires_grad_()
        losses = branch.losses(features)
        return torch.stack(losses), torch.stack(
            [as_rows(_gradients(loss, [features])[0]) for loss in losses]
        )

    def _by_parameters(
        self, branch: Branch, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (M,), gradients at the rows (M, N, D) and at the parameters (M, P)."""
        losses = branch.losses(branch.features)
        scale = FP16_SCALE if self.config.amp == "fp16" else 1.0
        by_row, flat = [], []
        for loss in losses:
            first, *others = _gradients(loss, [branch.features, *parameters], scale)
            by_row.append(as_rows(first))
            flat.append(torch.cat([one.flatten() for one in others]))
        return torch.stack(losses), torch.stack(by_row), torch.stack(flat)

    def _surrogate(self, branch: Branch, by_row: Tensor, iteration: int) -> Tensor:
        """0 with the mitigated gradient at the features."""
        if self.kind == "pair":
            return _through_pairs(branch)
        unit = "row" if self.place == "rep_row" else "flat"
        combined = self.combine(by_row, unit, f"mitigate-{branch.name}", iteration)
        rows = as_rows(branch.features)
        return (combined * (rows - rows.detach())).sum()

    def _parameter_surrogate(self, branches, found, encoder, heads, iteration) -> Tensor:
        """0 with the mitigated gradient at the parameters."""
        config, parameters = self.config, [*encoder, *heads]
        compared = parameters if config.mitigate_scope == "all" else list(encoder)
        size = sum(p.numel() for p in compared)
        flat = [branch.weight * one for branch, one in zip(branches, found, strict=True)]
        if config.branches == "joint":
            combined = self.combine(
                torch.cat(flat)[:, None, :size], "flat", "mitigate-joint", iteration
            )[0]
            # without conflict the same as the sum of both branches' means
            combined = combined * (1 if self._sums else len(branches))
        else:
            combined = sum(
                self.combine(one[:, None, :size], "flat", f"mitigate-{branch.name}", iteration)[0]
                for branch, one in zip(branches, flat, strict=True)
            )
        rest = sum(one[:, size:].sum(0) if self._sums else one[:, size:].mean(0) for one in flat)
        parts = torch.cat([combined, rest]).split([p.numel() for p in parameters])
        return sum(
            (part.view_as(p) * (p - p.detach())).sum()
            for part, p in zip(parts, parameters, strict=True)
        )

    def combine(self, gradients: Tensor, unit: str, stream: str, iteration: int) -> Tensor:
        """(M, N, D) -> (N, D)."""
        config = self.config
        order = generator(config.seed, stream, iteration)
        reduction = config.mitigate_reduction
        if config.conflict == "cosine":
            return pcgrad_by_cosine(
                gradients,
                unit,
                margin=config.conflict_margin,
                order=order if config.mitigate_order == "random" else None,
                reduction=reduction,
            )
        return mk.mitigate_gradients(
            gradients,
            method="consensus" if config.conflict == "sign" else self.kind,
            unit=unit,
            order=config.mitigate_order,
            generator=order,
            reduction=reduction,
            strength=config.cagrad_strength,
            impl=config.impl,
        )

    def conflict_rates(
        self, prefix: str, gradients: Tensor, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """{prefix_a_b: share in conflict, as the setting `conflict` has it}, of gradients
        (M, N, D): of the rows, or of single entries for "sign". Rows and entries that one of the
        two does not reach do not count."""
        config, found = self.config, {}
        for b in range(len(names)):
            for a in range(b):
                one, other = gradients[a], gradients[b]
                if config.conflict == "sign":
                    product = one.sign() * other.sign()
                    conflict, both = product < 0, product != 0
                else:
                    limit = torch.zeros((), dtype=one.dtype, device=one.device)
                    if config.conflict == "cosine":
                        limit = config.conflict_margin * one.norm(dim=1) * other.norm(dim=1)
                    both = (one != 0).any(1) & (other != 0).any(1)
                    conflict = ((one * other).sum(1) < -limit) & both
                share = conflict.sum() / both.sum().clamp_min(1)
                found[f"{prefix}_{names[a]}_{names[b]}"] = share
        return found


def as_rows(features: Tensor) -> Tensor:
    """(V, D, ...) -> (N, D), one row per pixel."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])


def pcgrad_by_cosine(
    gradients: Tensor,
    unit: str,
    *,
    margin: float,
    order: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """PCGrad that projects only where the cosine is below -margin; (M, N, D) -> (N, D).

    With margin 0 it is `medcl_kernels.mitigate_gradients`, whose Gram form it shares.

    Args:
        order: generator of the order in which others are met; None: ascending.
    """
    m = len(gradients)
    if unit == "row":
        gram = torch.einsum("mnd,knd->nmk", gradients, gradients)  # (N, M, M)
    else:
        flat = gradients.flatten(1)
        gram = (flat @ flat.T)[None]
    total = torch.zeros_like(gram[..., 0])
    for a in range(m):
        c = torch.zeros_like(total)
        c[:, a] = 1
        others = torch.randperm(m, generator=order).tolist() if order is not None else range(m)
        for b in others:
            if a == b:
                continue
            along = torch.einsum("nm,nmk->nk", c, gram)  # <u_a, g_k>
            size = (along * c).sum(1).clamp_min(0) * gram[:, b, b]
            conflict = (along[:, b] < -margin * size.sqrt()) & (gram[:, b, b] > 1e-12)
            c[:, b] -= torch.where(conflict, along[:, b] / (gram[:, b, b] + 1e-12), 0)
        total = total + c
    weights = total if reduction == "sum" else total / m
    return torch.einsum("nm,mnd->nd", weights.expand(gradients.shape[1], -1), gradients)


def consensus(selections: Sequence[Selected], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of any perspective with the mean of their gradients over all perspectives, 0 where two
    have opposite signs: (anchor, candidate, gradient)."""
    place = torch.cat([one.anchor * rows + one.candidate for one in selections])
    gradient = torch.cat([one.gradient for one in selections])
    place, member, count = place.unique(return_inverse=True, return_counts=True)
    order = member.argsort(stable=True)  # pair by pair: sums of floats in one order on every device
    total = torch.segment_reduce(gradient[order], "sum", lengths=count, unsafe=True)
    none = torch.zeros_like(count)
    up = none.index_add(0, member, (gradient > 0).long()) > 0
    down = none.index_add(0, member, (gradient < 0).long()) > 0
    return place // rows, place % rows, torch.where(up & down, 0, total / len(selections))


def _through_pairs(branch: Branch) -> Tensor:
    """0 with the gradient of the pairs' consensus."""
    rows = F.normalize(as_rows(branch.features), dim=1, eps=1e-12)
    anchor, candidate, gradient = consensus(branch.pairs(branch.features.detach()), len(rows))
    value = (gradient * (rows[anchor] * rows[candidate]).sum(1)).sum()
    return value - value.detach()


def _gradients(loss: Tensor, inputs: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
    """d loss / d inputs, zeros where it does not depend on one; the graph is kept."""
    if not loss.requires_grad:
        return [torch.zeros_like(one) for one in inputs]
    found = torch.autograd.grad(loss * scale, inputs, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(one) if g is None else g / scale
        for one, g in zip(inputs, found, strict=True)
    ]
