"""`PatchDragsawLoss`: PDCR over the layers of a network, from feature maps and a label map.

A layer is sampled at fixed cells (losses/patch_sampling.py); the class shares of the patches around
these cells (patch_class_ratio) say how similar their features should be (patch_affinity_contrast).
Patches are P fixed sizes in input pixels (H-PDCR) or the receptive field of the layer (RF-PDCR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import floor, log
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .losses.patch_affinity_contrast import SHIFTS, patch_affinity_contrast
from .losses.patch_class_ratio import Sizes, centered, fits, label_map
from .losses.patch_sampling import SAMPLERS, ravel, sample_cells
from .ops.patch_class_ratio import patch_class_ratio
from .patch_compat import COMPAT, PatchCompat
from .receptive_field import ReceptiveField
from .reference.pair_affinity import FORMS
from .reference.patch_class_ratio import Window


@dataclass(frozen=True)
class PatchLayer:
    """A feature map that takes part, and where its cells look.

    Attributes:
        stride: input pixels from a cell to its neighbour, one number or one per axis.
        samples: how many cells are contrasted; None: all of them.
        step: every step-th cell of each axis instead of `samples`.
        weight: of this layer's term; 0 where the layer only takes part across layers.
        receptive_field: its size in input pixels, needed for `sizes="receptive_field"`.
        offset: input position of the centre of cell 0.
        border: cells left out on every side before sampling.
    """

    stride: int | tuple[int, ...]
    samples: int | None = None
    step: int | tuple[int, ...] | None = None
    weight: float = 0.01
    receptive_field: int | tuple[int, ...] | None = None
    offset: float | tuple[float, ...] = 0.0
    border: int = 0

    @classmethod
    def of(cls, field: ReceptiveField, **options: Any) -> PatchLayer:
        """From a record of `receptive_fields`, with the other attributes as keywords."""
        return cls(stride=field.stride, receptive_field=field.size, offset=field.offset, **options)


@dataclass(frozen=True)
class CrossLayer(PatchLayer):
    """A layer of the cross-layer term; its adapter is convolution, batch normalisation, ReLU.

    Attributes:
        channels: of the feature map.
        kernel: kernel size and stride of the adapter. 8 at stride 2 and 4 at stride 4 bring both
            maps to stride 16; 1 leaves the grid alone.
    """

    channels: int = 0
    kernel: int = 1


class PatchDragsawLoss(nn.Module):
    """Patch-dragsaw contrastive regularisation (PDCR): within layers and across layers.

    The total is the sum over `layers` of weight times the contrast of the layer with itself, plus
    `cross_weight` times the sum over all pairs of `cross` layers of the contrast of the pair;
    `layer_reduction="mean"` divides both sums by a number of layers.

    Args:
        layers: by name, the feature maps that are contrasted with themselves (encoder and decoder).
        num_classes: of the labels, the background counted.
        sizes: P odd patch lengths in input pixels (H-PDCR), or "receptive_field" (RF-PDCR, P = 1).
        cross: by name, two or more layers of the cross-layer term; the first of a pair holds the
            anchors. Their adapters are parameters of this module: give them to the optimiser.
        cross_channels: of the adapters' output.
        cross_weight: of the cross-layer term.
        spatial_dims: 2 or 3, of the adapters.
        temperature: positive number (the paper's code: 1.0 in 2-D, 0.5 in 3-D), or an
            `nn.Parameter`.
        sampler: "even" or "stride", how a layer's `samples` are spread.
        average: "loss" averages the losses of the P patch sizes; "ratio" averages the class shares
            first, weighted by `size_weights`.
        size_weights: P numbers for average="ratio"; None: equal.
        form, shift, reduction: see `patch_affinity_contrast`; None: "affinity", "constant", "mean",
            or what `compat` says.
        divergence: "sum" of |r_i - r_j| over the classes, so that the affinity lies in [-1, 1] with
            several foreground classes; "half" of it, so that it lies in [0, 1].
        layer_reduction: "sum" adds the terms of the layers and of the pairs (the published 2-D
            code); "mean" divides those of the layers by their number and those of the pairs by the
            number of `cross` layers (the published 3-D code). None: "sum", or what `compat` says.
        compat: None, or "release2d", "nov2021", "receptive_field2d" or "release3d" for the numbers
            of the published code, its mistakes included, or a `PatchCompat` of one's own.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.

    Shape:
        features: mapping from layer names to `(B, C, *spatial)`; labels `(B, *spatial_in)` or
        `(B, 1, *spatial_in)` integers at input resolution; result 0-d.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> layers = {"x2": medcl.PatchLayer(stride=2, samples=64)}
        >>> loss = medcl.PatchDragsawLoss(layers, num_classes=2)
        >>> labels = torch.randint(0, 2, (4, 128, 128))
        >>> value = loss({"x2": torch.randn(4, 64, 64, 64)}, labels)
    """

    def __init__(
        self,
        layers: Mapping[str, PatchLayer],
        *,
        num_classes: int,
        sizes: Sizes | str = (5, 7, 9),
        cross: Mapping[str, CrossLayer] | None = None,
        cross_channels: int = 32,
        cross_weight: float = 0.01,
        spatial_dims: int = 2,
        temperature: float | Tensor = 1.0,
        sampler: str = "even",
        average: str = "loss",
        size_weights: Sequence[float] | None = None,
        form: str | None = None,
        shift: str | None = None,
        reduction: str | None = None,
        divergence: str = "sum",
        layer_reduction: str | None = None,
        compat: str | PatchCompat | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(compat, str):
            checks.choice("compat", compat, tuple(COMPAT))
            compat = COMPAT[compat]
        self.released = PatchCompat() if compat is None else compat
        self.layers = dict(layers)
        self.cross = dict(cross or {})
        self.num_classes = num_classes
        self.sizes = sizes if isinstance(sizes, str) else tuple(sizes)
        self.cross_weight = cross_weight
        self.temperature = temperature
        self.sampler = sampler
        self.average = average
        self.size_weights = None if size_weights is None else tuple(size_weights)
        self.form = form or self.released.form
        self.shift = shift or self.released.shift
        self.reduction = reduction or self.released.reduction
        self.divergence = divergence
        self.layer_reduction = layer_reduction or self.released.layer_reduction
        self.impl = impl
        self._check_options()
        self.adapters = nn.ModuleDict()
        for name, layer in self.cross.items():
            self.adapters[_key(name)] = _adapter(layer, cross_channels, spatial_dims)

    def _check_options(self) -> None:
        if not self.layers and not self.cross:
            raise ValueError("layers and cross are both empty: there is nothing to contrast")
        if len(self.cross) == 1:
            raise ValueError(f"cross needs at least two layers; got {list(self.cross)}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {self.num_classes}")
        checks.temperature(self.temperature)
        checks.choice("sampler", self.sampler, SAMPLERS)
        checks.choice("average", self.average, ("loss", "ratio"))
        checks.choice("form", self.form, FORMS)
        checks.choice("shift", self.shift, SHIFTS)
        checks.choice("reduction", self.reduction, ("mean", "sum"))
        checks.choice("divergence", self.divergence, ("sum", "half"))
        checks.choice("layer_reduction", self.layer_reduction, ("sum", "mean"))
        checks.choice("impl", self.impl, checks.IMPLS)
        if isinstance(self.sizes, str):
            checks.choice("sizes", self.sizes, ("receptive_field",))
            for name, layer in {**self.layers, **self.cross}.items():
                if layer.receptive_field is None:
                    raise ValueError(
                        f"layer {name!r} has no receptive_field, which "
                        'sizes="receptive_field" needs: measure it with receptive_fields(...)'
                    )
        elif not self.sizes:
            raise ValueError("sizes must hold at least one patch length; got none")
        if self.size_weights is not None:
            if self.average != "ratio":
                raise ValueError('size_weights are for average="ratio": set it or leave them out')
            count = 1 if isinstance(self.sizes, str) else len(self.sizes)  # a receptive field
            if len(self.size_weights) != count:
                raise ValueError(
                    f"size_weights must be one per patch size ({count}); got "
                    f"{len(self.size_weights)}"
                )

    def forward(self, features: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """The weighted total of `terms`."""
        return self.total(self.terms(features, labels))

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted total of terms that `terms` returned: for training loops that log them too."""
        within = [terms[name] * layer.weight for name, layer in self.layers.items()]
        across = [terms[name] * self.cross_weight for name in terms if name not in self.layers]
        parts = [torch.stack(part).sum() for part in (within, across) if part]
        if self.layer_reduction == "mean":
            counts = [len(part) for part in (self.layers, self.cross) if part]
            parts = [part / count for part, count in zip(parts, counts, strict=True)]
        return torch.stack(parts).sum()

    def terms(self, features: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Every term on its own, without its weight: layers by name, pairs as "a-b"."""
        missing = [name for name in (*self.layers, *self.cross) if name not in features]
        if missing:
            raise ValueError(f"features has no layer {missing[0]!r}; it holds {list(features)}")
        labels = label_map(labels, self.num_classes)
        found = {}
        for name, layer in self.layers.items():
            rows, ratios, _ = self._sampled(name, layer, features[name], labels)
            found[name] = self._contrast(rows, ratios)
        rows_of = {}
        for name, layer in self.cross.items():
            adapted = self.adapters[_key(name)](features[name])
            rows_of[name] = self._sampled(name, layer, adapted, labels)[:2]
        for a, b in combinations(self.cross, 2):
            (rows, ratios), (other, other_ratios) = rows_of[a], rows_of[b]
            found[f"{a}-{b}"] = self._contrast(rows, ratios, other, other_ratios)
        return found

    def offsets(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Every term as it is where all features are identical, whatever the labels: the logarithm
        of the number of candidates, once per pair for reduction="sum". It has no gradient and is
        worth subtracting in plots. From the shapes of the maps alone."""
        found: dict[str, float] = {}
        counts: dict[str, int] = {}
        for name, layer in self.layers.items():
            n = len(self._cells(name, layer, tuple(features[name].shape[2:])))
            found[name] = self._offset(len(features[name]), n, n)
        for name, layer in self.cross.items():
            grid = tuple(size // layer.kernel for size in features[name].shape[2:])
            counts[name] = len(self._cells(name, layer, grid))
        for a, b in combinations(self.cross, 2):
            found[f"{a}-{b}"] = self._offset(len(features[a]), counts[a], counts[b])
        return found

    def _offset(self, batch: int, anchors: int, candidates: int) -> float:
        times = batch * anchors * candidates if self.reduction == "sum" else 1
        return times * log(candidates)

    def sampled(self, name: str, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is compared within a layer, for pictures: features `(B, C, N)`, class shares
        `(P, B, K, N)` of the patches, input positions `(N, dims)` of the cells."""
        labels = label_map(labels, self.num_classes)
        return self._sampled(name, self.layers[name], features, labels)

    def _contrast(
        self,
        rows: Tensor,
        ratios: Tensor,
        key: Tensor | None = None,
        key_ratios: Tensor | None = None,
    ) -> Tensor:
        if self.divergence == "half":  # which is linear in the shares
            ratios, key_ratios = ratios / 2, None if key_ratios is None else key_ratios / 2
        return patch_affinity_contrast(
            rows,
            ratios,
            key=key,
            key_ratios=key_ratios,
            temperature=self.temperature,
            form=self.form,
            shift=self.shift,
            reduction=self.reduction,
            impl=self.impl,
        )

    def _sampled(
        self, name: str, layer: PatchLayer, features: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled features `(B, C, N)`, the class shares `(P, B, K, N)` of their patches, and where
        these lie in the input `(N, dims)`."""
        checks.features(features, f"features[{name!r}]")
        grid = tuple(features.shape[2:])
        if len(grid) != labels.dim() - 1 or features.shape[0] != labels.shape[0]:
            raise ValueError(
                f"features[{name!r}] must be (B, C, *spatial) with the B = {labels.shape[0]} and "
                f"the {labels.dim() - 1} spatial axes of labels; got {checks.shape_of(features)}"
            )
        self._check_centers(name, layer, grid, tuple(labels.shape[1:]))
        cells = self._cells(name, layer, grid, features.device)
        everything = layer.samples is None and layer.step is None and self._border(layer) == 0
        rows = features.flatten(2)
        if not everything:
            rows = rows.index_select(2, ravel(cells, grid))
        compute = torch.float64 if features.dtype == torch.float64 else torch.float32
        if not self.released.last_plane:
            labels = labels[(slice(None), *(slice(0, -1),) * len(grid))]
        centers = self._centers(layer, cells)
        ratios = self._ratios(labels, centers, self._windows(name, layer, labels), compute)
        if self.average == "ratio":
            weights = self.size_weights or (1.0,) * len(ratios)
            mixed = [share * weight for share, weight in zip(ratios, weights, strict=True)]
            ratios = torch.stack(mixed).sum(0, keepdim=True) / sum(weights)
        return rows, ratios, centers

    def _cells(
        self,
        name: str,
        layer: PatchLayer,
        grid: tuple[int, ...],
        device: torch.device | None = None,
    ) -> Tensor:
        """Cells of a layer's grid that are contrasted `(N, dims)`."""
        return sample_cells(
            grid,
            layer.samples,
            sampler="released" if self.released.drop_last else self.sampler,
            step=layer.step,
            border=self._border(layer),
            name=f"layer {name!r}",
            device=device,
        )

    def _border(self, layer: PatchLayer) -> int:
        crossing = isinstance(layer, CrossLayer)
        return layer.border if crossing else max(layer.border, self._released_border())

    def _released_border(self) -> int:
        if self.released.border is not None:
            return self.released.border
        lengths = () if isinstance(self.sizes, str) else self.sizes
        return max((max(_per_axis(length, 1)) for length in lengths), default=0)

    def _geometry(self, layer: PatchLayer, dims: int) -> tuple[list[int], list[float]]:
        """Stride of the cells that are contrasted and position of the first one, per axis."""
        stride, offset = _per_axis(layer.stride, dims), _per_axis(layer.offset, dims)
        if not (isinstance(layer, CrossLayer) and self.released.adapter_stride):
            return stride, offset
        # the middle of the cells that the adapter joins
        offset = [o + s * (layer.kernel - 1) / 2 for o, s in zip(offset, stride, strict=True)]
        return [s * layer.kernel for s in stride], offset

    def _check_centers(
        self, name: str, layer: PatchLayer, grid: tuple[int, ...], shape: tuple[int, ...]
    ) -> None:
        """Cells whose own square, stride pixels wide, lies outside the labels: their patches would
        be empty, which looks like background. The published lookups do so on purpose."""
        if self.released.transpose_labels:
            return
        border = self._border(layer)
        stride, offset = self._geometry(layer, len(grid))
        for axis, (jump, start, count, size) in enumerate(
            zip(stride, offset, grid, shape, strict=True)
        ):
            first, last = start + border * jump, start + (count - 1 - border) * jump
            if first <= -(jump + 1) / 2 or last >= size + (jump - 1) / 2:
                raise ValueError(
                    f"layer {name!r}: with stride {jump} and offset {start:g} its {count} cells of "
                    f"axis {axis} are centred at {first:g} to {last:g}, outside labels of {size}: "
                    "measure both with receptive_fields(...)"
                )

    def _centers(self, layer: PatchLayer, cells: Tensor) -> Tensor:
        """Input positions of cells `(N, dims)`."""
        stride, offset = self._geometry(layer, cells.shape[1])
        if isinstance(layer, CrossLayer) and not self.released.adapter_stride:
            cells = cells + self._released_border()
        if self.released.transpose_labels:
            cells = cells.flip(1)
        # no tensor is made of the numbers: that would synchronise a GPU
        axes = [
            axis * jump + floor(start)
            for axis, jump, start in zip(cells.unbind(1), stride, offset, strict=True)
        ]
        return torch.stack(axes, 1)

    def _windows(self, name: str, layer: PatchLayer, labels: Tensor) -> list[Window]:
        shape = tuple(labels.shape[1:])
        if isinstance(self.sizes, str):
            lengths = [int(v) for v in _per_axis(layer.receptive_field or 1, len(shape))]
            if isinstance(layer, CrossLayer):
                jumps = _per_axis(layer.stride, len(shape))
                lengths = [
                    size + int(jump) * (layer.kernel - 1)
                    for size, jump in zip(lengths, jumps, strict=True)
                ]
            fits(lengths, shape, f"the receptive field of layer {name!r}")
            windows = [tuple((-((size - 1) // 2), size // 2 + 1) for size in lengths)]
        else:
            windows = [
                tuple(centered(size, shape, f"sizes[{place}]"))
                for place, size in enumerate(self.sizes)
            ]
        first, last = {"centered": (0, 0), "early": (-1, -1), "open": (0, -1)}[self.released.window]
        return [tuple((low + first, high + last) for low, high in window) for window in windows]

    def _ratios(
        self, labels: Tensor, centers: Tensor, windows: list[Window], dtype: torch.dtype
    ) -> Tensor:
        options: dict[str, Any] = {
            "normalizer": self.released.normalizer,
            "dtype": dtype,
            "impl": self.impl,
        }
        if not self.released.rank_classes:
            return patch_class_ratio(
                labels, centers, windows, num_classes=self.num_classes, **options
            )
        # one class up, so that the background is counted like the others
        shares = patch_class_ratio(
            labels.long() + 1, centers, windows, num_classes=self.num_classes + 1, **options
        )
        present = shares > 0
        slot = present.cumsum(2) - 1
        ranked = torch.zeros_like(shares)
        ranked.scatter_add_(2, slot.clamp_min(0), torch.where(present, shares, 0.0))
        return ranked[:, :, 1:]

    def extra_repr(self) -> str:
        return (
            f"layers={list(self.layers)}, cross={list(self.cross)}, sizes={self.sizes!r}, "
            f"form={self.form!r}, shift={self.shift!r}, reduction={self.reduction!r}"
        )


def _per_axis(value: Any, dims: int) -> list[Any]:
    return [value] * dims if isinstance(value, (int, float)) else list(value)


def _key(name: str) -> str:
    """Module names have no dots."""
    return name.replace(".", "_")


def _adapter(layer: CrossLayer, out_channels: int, dims: int) -> nn.Sequential:
    if layer.channels < 1 or layer.kernel < 1:
        raise ValueError(
            "a cross layer needs channels and kernel of at least 1; got "
            f"channels={layer.channels}, kernel={layer.kernel}"
        )
    convolution = nn.Conv2d if dims == 2 else nn.Conv3d
    normalization = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    return nn.Sequential(
        convolution(layer.channels, out_channels, layer.kernel, layer.kernel, bias=False),
        normalization(out_channels),
        nn.ReLU(inplace=True),
    )
