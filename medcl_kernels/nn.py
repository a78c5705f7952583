"""Modules: losses that hold hyper-parameters and call `medcl_kernels.functional`, a projection
head, a queue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .distributed import Gather
from .functional import dense_hinge, filtered_contrastive, info_nce, supervised_contrastive
from .losses.filter_statistics import (
    DIRECTIONS,
    FORMS,
    SCOPES,
    SCORES,
    SIGNS,
    Keep,
    Labels,
    check_keep,
)
from .losses.gradient_filter import USES
from .mitigator import GradientMitigator
from .patch_compat import PatchCompat
from .patch_dragsaw import CrossLayer, PatchDragsawLoss, PatchLayer
from .receptive_field import receptive_fields
from .uncertainty_selection import UncertaintyFeatureSelection, insert_uafs

__all__ = [
    "CrossLayer",
    "DenseHingeLoss",
    "DenseProjectionHead",
    "FilteredContrastiveLoss",
    "GradientMitigator",
    "InfoNCELoss",
    "MemoryQueue",
    "PatchCompat",
    "PatchDragsawLoss",
    "PatchLayer",
    "SupervisedContrastiveLoss",
    "UncertaintyFeatureSelection",
    "insert_uafs",
    "receptive_fields",
]


class _Loss(nn.Module):
    """Keeps keyword options and shows them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)  # an nn.Parameter registers itself: a learnable temperature
        if "temperature" in options:
            checks.temperature(options["temperature"])
        checks.options(options["reduction"], options["impl"])

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the function that this module calls."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {
            name: "learnable" if isinstance(value, Tensor) else repr(value)
            for name, value in self.options().items()
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class InfoNCELoss(_Loss):
    """Module form of `medcl_kernels.info_nce`; the options mean the same.

    Args:
        temperature: positive number, or an `nn.Parameter` that then belongs to this module.
        pairs, intra_view, symmetric, normalize, ignore_index, reduction, impl, multi_positive,
        gather_distributed: see `info_nce`.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> loss = medcl.InfoNCELoss(temperature=0.2)
        >>> value = loss(torch.randn(2, 64, 14, 14), torch.randn(2, 64, 14, 14))
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        pairs: str = "image",
        intra_view: bool = False,
        symmetric: bool = False,
        normalize: bool = True,
        ignore_index: int = -1,
        reduction: str = "mean",
        impl: str = "auto",
        multi_positive: str = "out",
        gather_distributed: Gather = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            pairs=pairs,
            intra_view=intra_view,
            symmetric=symmetric,
            normalize=normalize,
            ignore_index=ignore_index,
            reduction=reduction,
            impl=impl,
            multi_positive=multi_positive,
            gather_distributed=gather_distributed,
        )
        checks.choice("pairs", pairs, ("image", "batch", "queue"))
        checks.choice("multi_positive", multi_positive, ("out", "in"))
        checks.gathered_pairs(gather_distributed, pairs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        positives: Tensor | tuple[Tensor, Tensor] | None = None,
        queue: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`info_nce(query, key, positives, queue=queue, ...)`."""
        return info_nce(query, key, positives, queue=queue, **self.options())


class DenseHingeLoss(_Loss):
    """Module form of `medcl_kernels.dense_hinge`; the options mean the same.

    Args:
        margin, pairs, intra_view, symmetric, normalize, ignore_index, reduction, impl: see
        `dense_hinge`.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> loss = medcl.DenseHingeLoss(margin=0.5)
        >>> value = loss(torch.randn(2, 64, 14, 14), torch.randn(2, 64, 14, 14))
    """

    def __init__(
        self,
        *,
        margin: float = 0.5,
        pairs: str = "image",
        intra_view: bool = False,
        symmetric: bool = False,
        normalize: bool = True,
        ignore_index: int = -1,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(
            margin=margin,
            pairs=pairs,
            intra_view=intra_view,
            symmetric=symmetric,
            normalize=normalize,
            ignore_index=ignore_index,
            reduction=reduction,
            impl=impl,
        )
        checks.margin(margin)
        checks.choice("pairs", pairs, ("image", "batch", "queue"))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        positives: Tensor | tuple[Tensor, Tensor] | None = None,
        queue: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`dense_hinge(query, key, positives, queue=queue, ...)`."""
        return dense_hinge(query, key, positives, queue=queue, **self.options())


class SupervisedContrastiveLoss(_Loss):
    """Module form of `medcl_kernels.supervised_contrastive`; the options mean the same.

    Args:
        temperature: positive number, or an `nn.Parameter` that then belongs to this module.
        base_temperature, pairs, form, normalize, ignore_index, reduction, impl, gather_distributed:
        see `supervised_contrastive`.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> loss = medcl.SupervisedContrastiveLoss(temperature=0.1, form="pixel")
        >>> value = loss(torch.randn(2, 64, 14, 14), torch.randint(0, 4, (2, 14, 14)))
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        base_temperature: float | None = None,
        pairs: str = "batch",
        form: str = "out",
        normalize: bool = True,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
        gather_distributed: Gather = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            base_temperature=base_temperature,
            pairs=pairs,
            form=form,
            normalize=normalize,
            ignore_index=ignore_index,
            reduction=reduction,
            impl=impl,
            gather_distributed=gather_distributed,
        )
        checks.choice("pairs", pairs, ("batch", "image"))
        checks.choice("form", form, ("out", "in", "pixel"))
        checks.gathered_pairs(gather_distributed, pairs)

    def forward(
        self,
        features: Tensor,
        labels: Tensor | list[Tensor] | tuple[Tensor, ...],
        key: Tensor | None = None,
        key_labels: Tensor | list[Tensor] | tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """`supervised_contrastive(features, labels, key=key, key_labels=key_labels, ...)`."""
        return supervised_contrastive(
            features, labels, key=key, key_labels=key_labels, **self.options()
        )


class FilteredContrastiveLoss(_Loss):
    """Module form of `medcl_kernels.filtered_contrastive`; the options mean the same.

    Args:
        keep, scope, score, direction, pos_sign, use, form, temperature, pairs, normalize,
        ignore_index, reduction, impl, gather_distributed: see `filtered_contrastive`.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> loss = medcl.FilteredContrastiveLoss(keep=0.1, scope="image")
        >>> value = loss(torch.randn(2, 64, 14, 14), torch.randn(2, 64, 14, 14))
    """

    def __init__(
        self,
        *,
        keep: Keep = 0.1,
        scope: str = "image",
        score: str = "pair",
        direction: str = "directed",
        pos_sign: str = "any",
        use: str = "mask_grad",
        form: str = "out",
        temperature: float | Tensor = 0.1,
        pairs: str = "image",
        normalize: bool = True,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
        gather_distributed: Gather = False,
    ) -> None:
        super().__init__(
            keep=keep,
            scope=scope,
            score=score,
            direction=direction,
            pos_sign=pos_sign,
            use=use,
            form=form,
            temperature=temperature,
            pairs=pairs,
            normalize=normalize,
            ignore_index=ignore_index,
            reduction=reduction,
            impl=impl,
            gather_distributed=gather_distributed,
        )
        check_keep(keep)
        checks.choice("scope", scope, SCOPES)
        checks.choice("score", score, SCORES)
        checks.choice("direction", direction, DIRECTIONS)
        checks.choice("pos_sign", pos_sign, SIGNS)
        checks.choice("use", use, USES)
        checks.choice("form", form, FORMS)
        checks.choice("pairs", pairs, ("image", "batch"))
        checks.gathered_pairs(gather_distributed, pairs)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        labels: Labels | None = None,
        key_labels: Labels | None = None,
        positives: Tensor | None = None,
    ) -> Tensor:
        """`filtered_contrastive(query, key, labels=..., ...)`."""
        return filtered_contrastive(
            query,
            key,
            labels=labels,
            key_labels=key_labels,
            positives=positives,
            **self.options(),
        )


class DenseProjectionHead(nn.Sequential):
    """Projects every pixel of an encoder map: 1x1 convolutions in place of pooling and an MLP.

    Args:
        in_channels: channels of the encoder map.
        out_channels: channels D of the projection.
        hidden_channels: None for one 1x1 convolution (IDEAL's figure 1); a number for convolution,
            ReLU, convolution (DenseCL's neck has `in_channels`).
        batch_norm: batch normalisation before the ReLU, and convolutions without bias; needs
            `hidden_channels`.
        spatial_dims: 2 or 3.

    Shape:
        `(B, in_channels, *spatial)` -> `(B, out_channels, *spatial)`.

    Raises:
        ValueError: a size is not positive, `spatial_dims` is not 2 or 3, or `batch_norm` without
        `hidden_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 128,
        *,
        hidden_channels: int | None = None,
        batch_norm: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "hidden_channels": hidden_channels,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3; got {spatial_dims}")
        if batch_norm and hidden_channels is None:
            raise ValueError(
                "batch_norm=True sits between two convolutions: give hidden_channels, for example "
                "in_channels"
            )
        convolution = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        if hidden_channels is None:
            super().__init__(convolution(in_channels, out_channels, 1))
            return
        layers: list[nn.Module] = [
            convolution(in_channels, hidden_channels, 1, bias=not batch_norm)
        ]
        if batch_norm:
            normalization = nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d
            layers.append(normalization(hidden_channels))
        layers.append(nn.ReLU(inplace=True))
        layers.append(convolution(hidden_channels, out_channels, 1, bias=not batch_norm))
        super().__init__(*layers)


class MemoryQueue(nn.Module):
    """First-in, first-out store of unit rows: negatives of earlier steps.

    A ring buffer whose state (rows, pointer, number of valid rows) lives in buffers, so that it
    moves with the module and survives `state_dict`. Nothing of it has a gradient.

    Args:
        size: K, how many rows it holds.
        channels: C of a row.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> queue = medcl.MemoryQueue(4096, 64)
        >>> q, k = torch.randn(2, 2, 64, 14, 14).unbind(0)
        >>> loss = medcl.info_nce(q, k, queue=queue.negatives())
        >>> queue.enqueue(k)
    """

    rows: Tensor
    pointer: Tensor
    count: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.register_buffer("rows", torch.zeros(size, channels))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        # Host copies of the two numbers: reading the buffers would synchronise a GPU at every step.
        self._pointer = 0
        self._count = 0

    def __len__(self) -> int:
        """How many rows are valid: at most `size`."""
        return self._count

    def extra_repr(self) -> str:
        return f"size={self.rows.shape[0]}, channels={self.rows.shape[1]}"

    def negatives(self) -> Tensor:
        """A copy of the valid rows, `(len(self), C)`; a later `enqueue` does not change it."""
        return self.rows[: self._count].clone()

    forward = negatives

    @torch.no_grad()
    def enqueue(self, features: Tensor) -> None:
        """Store new rows in place of the oldest.

        Args:
            features: `(M, C)` rows, or a dense map `(B, C, *spatial)`, which is averaged over its
                pixels to one row per image (DenseCL's dense queue). Rows are scaled to unit length.
                Of more rows than the queue holds the last ones stay.

        Raises:
            TypeError, ValueError: not floating point, empty, or another number of channels.
        """
        checks.features(features, "features")
        size, channels = self.rows.shape
        if features.shape[1] != channels:
            raise ValueError(
                f"features must have the queue's {channels} channels in axis 1; got shape "
                f"{checks.shape_of(features)}"
            )
        fresh = features.detach().to(self.rows)
        if fresh.dim() > 2:
            fresh = fresh.flatten(2).mean(2)
        fresh = nn.functional.normalize(fresh, dim=1, eps=1e-12)
        total = fresh.shape[0]
        start = (self._pointer + max(total - size, 0)) % size
        fresh = fresh[-size:]
        head = min(fresh.shape[0], size - start)
        self.rows[start : start + head] = fresh[:head]
        self.rows[: fresh.shape[0] - head] = fresh[head:]
        self._pointer = (self._pointer + total) % size
        self._count = min(self._count + total, size)
        self.pointer.fill_(self._pointer)
        self.count.fill_(self._count)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """torch's hook for loading: refresh the host copies."""
        super()._load_from_state_dict(*args, **kwargs)
        self._pointer = int(self.pointer)
        self._count = int(self.count)
