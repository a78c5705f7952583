"""Sample inputs: what a case looks like and how its tensors are drawn.

Read through `medcl_kernels.registry`; nothing that a training run needs imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .layout import num_rows

IGNORE = -100
F32_F64 = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    """One input to try, and why.

    Attributes:
        name: unique within a spec.
        reason: what would go unnoticed without this case.
        shape: of the query or features, `(B, C, *spatial)` or `(N, C)`.
        key_shape: of the key; None = the query against itself (or, for operations that always have
            a key, a key of the query's shape).
        layout: how the features lie in memory: "contiguous", "channels_last", "transposed" (last
            two axes swapped: spatial strides do not merge), "sliced" (a window of a larger tensor),
            "stepped" (every second channel).
        pairs: "image" or "batch".
        temperature: of the softmax.
        normalize: whether rows are scaled to unit length.
        classes: number of labels drawn.
        labels: "random"; "single" (one class); "distinct" (no two rows share one); "ignored" (all
            of them); "no_anchors" and "no_candidates" (all of the query, all of the key);
            "none" (no labels at all, where the operation allows it).
        ignored: fraction of rows that are marked ignored.
        poison: ignored rows hold NaN.
        duplicates: the second half of the rows of an image repeats the first.
        zero_rows: the first row of every image is the zero vector.
        maps: how many label maps (perspectives).
        dtypes: the dtypes to run it in.
        options: further keyword arguments, as pairs, so that a case stays hashable.
    """

    name: str
    reason: str
    shape: tuple[int, ...]
    key_shape: tuple[int, ...] | None = None
    layout: str = "contiguous"
    pairs: str = "image"
    temperature: float = 0.1
    normalize: bool = True
    classes: int = 4
    labels: str = "random"
    ignored: float = 0.0
    poison: bool = False
    duplicates: bool = False
    zero_rows: bool = False
    maps: int = 1
    dtypes: tuple[torch.dtype, ...] = F32_F64
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def across(self) -> bool:
        """The operations' word for pairs="batch"."""
        return self.pairs == "batch"

    @property
    def channels(self) -> int:
        """D."""
        return self.shape[1]

    def rows(self, key: bool = False) -> tuple[int, int]:
        """`(B, L)` of the query or of the key."""
        shape = self.key_shape if key and self.key_shape is not None else self.shape
        return (1, shape[0]) if len(shape) == 2 else (shape[0], prod(shape[2:]))

    def num_pairs(self) -> int:
        """How many pairs the case has (the self pair, where excluded, included)."""
        batch, length = self.rows()
        key_batch, key_length = self.rows(key=True)
        if self.across:
            return batch * length * key_batch * key_length
        return batch * length * key_length


@dataclass(frozen=True)
class Sample:
    """Arguments for one call.

    Attributes:
        args, kwargs: of the function.
        differentiable: the leaves that may get a gradient, by argument name, as the user would hold
            them (an operation's row views are made from them).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    differentiable: dict[str, Tensor]
    build: Callable[[dict[str, Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]

    def copy(self) -> Sample:
        """The same values, dtypes and strides as fresh leaves."""
        return self._map(lambda leaf: leaf.dtype)

    def double(self) -> Sample:
        """The same values and strides as fresh float64 leaves."""
        return self._map(lambda leaf: torch.float64)

    def _map(self, dtype: Callable[[Tensor], torch.dtype]) -> Sample:
        leaves = {name: copy_of(leaf, dtype(leaf)) for name, leaf in self.differentiable.items()}
        return bind(self.build, leaves)


def bind(
    build: Callable[[dict[str, Tensor]], tuple[tuple[Any, ...], dict[str, Any]]],
    leaves: dict[str, Tensor],
) -> Sample:
    """A sample around leaves."""
    for leaf in leaves.values():
        leaf.requires_grad_()
    args, kwargs = build(leaves)
    return Sample(args, kwargs, leaves, build)


def copy_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A detached copy in another dtype, strides kept."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
    return copy.copy_(tensor.detach())


class Draw:
    """Draws the tensors of a case, the same values for every dtype and device.

    Args:
        case: what to draw.
        dtype: of the features.
        device: of everything.
        seed: of the CPU generator that all values come from.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str, seed: int) -> None:
        self.case = case
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def features(self, key: bool = False, blank: Tensor | None = None) -> Tensor:
        """`(B, C, *spatial)` or `(N, C)` in the case's layout.

        Args:
            key: of the key's shape.
            blank: `(B, L)` bool; these rows become NaN if the case is poisoned.
        """
        shape = self.case.key_shape if key and self.case.key_shape is not None else self.case.shape
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        flat = values.t().unsqueeze(0) if len(shape) == 2 else values.flatten(2)  # a view
        length = flat.shape[2]
        if self.case.duplicates:
            flat[:, :, length // 2 : 2 * (length // 2)] = flat[:, :, : length // 2].clone()
        if self.case.zero_rows:
            flat[:, :, 0] = 0
        if self.case.poison and blank is not None:
            flat.masked_fill_(blank.cpu().unsqueeze(1), float("nan"))
        return lay_out(values.to(self.dtype).to(self.device), self.case.layout)

    def labels(self, key: bool = False) -> Tensor:
        """`(M, B, L)` int64."""
        case = self.case
        shape = (case.maps, *case.rows(key))
        if case.labels == "distinct":
            return torch.arange(prod(shape), device=self.device).reshape(shape)
        if case.labels in ("ignored", "no_candidates" if key else "no_anchors"):
            return torch.full(shape, IGNORE, device=self.device)
        labels = torch.randint(0, case.classes, shape, generator=self.generator)
        if case.labels == "single":
            labels.zero_()
        if case.ignored:
            # One mask for all maps: a row that one map counts must not be poisoned.
            dropped = torch.rand(shape[1:], generator=self.generator) < case.ignored
            labels = labels.masked_fill(dropped, IGNORE)
        return labels.to(self.device)

    def positives(self, count: int = 0) -> Tensor:
        """`(B, L)`, or `(B, L, count)`, int64 indices into the key pixels, -1 = none."""
        case = self.case
        shape = (*case.rows(), count) if count else case.rows()
        index = torch.randint(0, case.rows(key=True)[1], shape, generator=self.generator)
        dropped = torch.rand(case.rows(), generator=self.generator) < case.ignored
        if case.labels in ("ignored", "no_anchors"):
            dropped = torch.ones_like(dropped)
        if count:
            # Ragged: every anchor keeps its first positive and loses some of the others.
            missing = torch.rand(shape, generator=self.generator) < 0.3
            missing[..., 0] = False
            index = index.masked_fill(missing | dropped.unsqueeze(2), -1)
        else:
            index = index.masked_fill(dropped, -1)
        return index.to(self.device)

    def numbers(self, shape: tuple[int, ...]) -> Tensor:
        """Positive weights and the like, in the compute dtype."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5
        return values.to(dtype).to(self.device)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same tensor with other strides."""
    if layout == "contiguous":
        return values
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        room = values.new_full([size + 2 for size in values.shape], float("nan"))
        window = room[tuple(slice(1, 1 + size) for size in values.shape)]
        return window.copy_(values)
    if layout == "stepped":
        room = values.new_full([values.shape[0], 2 * values.shape[1], *values.shape[2:]], torch.nan)
        return room[:, ::2].copy_(values)
    raise ValueError(f"unknown layout {layout!r}")


def spatial(maps: Tensor, features: Tensor) -> Tensor:
    """`(B, L, ...)` rows as the user holds them for these features."""
    batch, length = num_rows(features)
    if features.dim() == 2:
        return maps.reshape(length, *maps.shape[2:])
    return maps.reshape(batch, *features.shape[2:], *maps.shape[2:])


def named(cases: tuple[Case, ...], *names: str) -> tuple[Case, ...]:
    """Cases by name, the prefix of key cases left out."""
    return tuple(case for case in cases if case.name.removeprefix("key_") in names)


def variant(case: Case, name: str, reason: str, **options: Any) -> Case:
    """The case with further keyword arguments."""
    return replace(
        case, name=name, reason=reason, options=(*case.options, *sorted(options.items()))
    )
