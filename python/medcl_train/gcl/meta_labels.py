"""Meta labels of slices from the data itself, batches in which every one of them has positives, and
partners that share one.

A perspective is a meta label with its notion of "positive": slices with the same code, or, for
slice positions with a threshold, with |t_i - t_j| < threshold (strict; not transitive). Both views
of one slice are positive under every perspective. A slice whose meta label is missing has no other
positive.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import SliceDataset, Volume
from ..engine.config import ConfigError
from ..engine.seeding import IndexStream, derive, generator

MISSING = -1


@dataclass(frozen=True)
class MetaLabels:
    """Of every slice of a data set.

    Attributes:
        codes: per perspective (S,) int64, MISSING where the meta label is unknown.
        positions: (S,) (i + 1) / number of slices, in (0, 1].
        threshold: of perspective "slice"; None: its codes decide.
    """

    codes: dict[str, np.ndarray]
    positions: np.ndarray
    threshold: float | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.codes)

    def by_threshold(self, name: str) -> bool:
        return name == "slice" and self.threshold is not None

    def positives(self, name: str, index: int) -> np.ndarray:
        """Other slices that are positive for slice `index`."""
        if self.by_threshold(name):
            same = np.abs(self.positions - self.positions[index]) < self.threshold
        else:
            code = self.codes[name][index]
            same = (self.codes[name] == code) & (code != MISSING)
        same[index] = False
        return np.flatnonzero(same)

    def batch(self, indices: Sequence[int], device: torch.device) -> "BatchLabels":
        """Of both views of these slices, first views first."""
        views = np.tile(np.asarray(indices), 2)
        codes = {}
        for name, values in self.codes.items():
            code = values[views].copy()
            # a code of its own for a slice whose meta label is missing
            code[code == MISSING] = values.max() + 1 + views[code == MISSING]
            codes[name] = torch.from_numpy(code).to(device)
        return BatchLabels(
            codes=codes,
            positions=torch.from_numpy(self.positions[views]).to(device),
            slices=torch.from_numpy(views).to(device),
            threshold=self.threshold,
        )


@dataclass(frozen=True)
class BatchLabels:
    """Meta labels of V views: per perspective `codes` (V,), and `positions`, `slices` (V,)."""

    codes: dict[str, Tensor]
    positions: Tensor
    slices: Tensor
    threshold: float | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.codes)

    def by_threshold(self, name: str) -> bool:
        return name == "slice" and self.threshold is not None

    def same(self, name: str, other: "BatchLabels | None" = None) -> Tensor:
        """(V, W) bool: which views of `other` (default: of this batch, itself included) are
        positive under a perspective."""
        other = self if other is None else other
        if self.by_threshold(name):
            same = (self.positions[:, None] - other.positions).abs() < self.threshold
        else:
            same = self.codes[name][:, None] == other.codes[name]
        return same | (self.slices[:, None] == other.slices)

    def partners(self, name: str, seed: int, iteration: int, draw: int = 0) -> Tensor:
        """(V,): for each view another one with the same meta label, of another slice if there is
        any, else the other view of its own; each draw by itself."""
        own = self.slices[:, None] == self.slices
        candidates = self.same(name) & ~own
        alone = ~candidates.any(1, keepdim=True)
        itself = torch.eye(len(own), dtype=torch.bool, device=own.device)
        candidates = torch.where(alone, own & ~itself, candidates)
        stream = f"partners-{name}-{draw}" if draw else f"partners-{name}"
        chance = torch.rand(own.shape, generator=generator(seed, stream, iteration))
        return chance.to(own.device).masked_fill(~candidates, -1.0).argmax(1)


def meta_labels(
    pool: SliceDataset,
    names: Sequence[str],
    *,
    threshold: float | None,
    parts: int = 4,
) -> MetaLabels:
    """Read the perspectives from the volumes of a data set.

    Args:
        names: "slice", "patient", "phase", "side", or a key of the cases' meta data.
        threshold: of slice positions; None: `parts` equal parts of a volume.

    Raises: ConfigError for a perspective that the data does not have, or under which all slices are
        the same: it could not tell any two apart.
    """
    positions = np.concatenate(
        [np.arange(1, len(v.image) + 1) / len(v.image) for v in pool.volumes]
    )
    codes = {}
    for name in names:
        if name == "slice":
            if threshold is not None and np.ptp(positions) < threshold:
                raise ConfigError(
                    f"perspective slice: no two training slices are {threshold} of a volume apart; "
                    "lower --slice-threshold"
                )
            codes[name] = np.concatenate([_parts(len(v.image), parts) for v in pool.volumes])
            continue
        values = [_value(volume, name) for volume in pool.volumes]
        known = sorted({value for value in values if value})
        if not known:
            keys = sorted({key for v in pool.volumes for key in v.case.meta})
            raise ConfigError(
                f"perspective {name}: no case has this meta label; there are "
                f"{', '.join(['slice', 'patient', *keys])}"
            )
        if len(known) == 1:
            raise ConfigError(
                f"perspective {name}: all training slices have the one label {known[0]!r}, so no "
                "two of them could be told apart; leave it out of --perspectives"
            )
        number = {value: code for code, value in enumerate(known)}
        codes[name] = np.concatenate(
            [
                np.full(len(volume.image), number.get(value, MISSING))
                for volume, value in zip(pool.volumes, values, strict=True)
            ]
        )
    return MetaLabels(codes, positions, threshold if "slice" in names else None)


def _parts(depth: int, parts: int) -> np.ndarray:
    """Part of every slice: of round(depth / parts) slices each, the last takes the rest (GLCL)."""
    return np.minimum(np.arange(depth) // max(1, round(depth / parts)), parts - 1)


def _value(volume: Volume, name: str) -> str:
    """The meta label of a volume as text, "" where it is missing."""
    case = volume.case
    if name == "patient":
        return case.subject
    if name == "side":  # MSD: odd and even volume of one person (data/msd.py)
        match = re.fullmatch(r"hippocampus_0*(\d+)", case.case_id)
        return ("even", "odd")[int(match[1]) % 2] if match else ""
    value = case.meta.get(name, "")
    return str(value) if isinstance(value, str | int) else ""


class GroupedBatches:
    """Batches of groups: an anchor and, for every perspective, another slice that is positive for
    it, so that every perspective has positives in every batch. Batch i depends on (seed, i) only.

    An anchor that has no positive under a perspective gets a random slice there. Anchors run
    through the data in shuffled epochs. The last group of a batch may be cut short.
    """

    def __init__(self, labels: MetaLabels, batch_size: int, seed: int):
        self.labels, self.batch_size, self.seed = labels, batch_size, seed
        self.group = 1 + len(labels.names)
        self.size = len(labels.positions)
        anchors = -(-batch_size // self.group)
        self.anchors = IndexStream(self.size, anchors, seed, "anchors")

    def at(self, iteration: int) -> np.ndarray:
        """Indices (batch_size,) int64; positions 0, 1 + M, ... are the anchors."""
        random = np.random.default_rng(derive(self.seed, "positives", iteration))
        batch: list[int] = []
        for anchor in self.anchors.at(iteration):
            batch.append(int(anchor))
            for name in self.labels.names:
                found = np.setdiff1d(self.labels.positives(name, anchor), batch)
                free = found if len(found) else np.setdiff1d(np.arange(self.size), batch)
                batch.append(int(random.choice(free if len(free) else [anchor])))
        return np.array(batch[: self.batch_size])
