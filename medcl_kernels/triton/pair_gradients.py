"""Gradient and score of every pair of a tile, (G1) to (G4) of reference/pair_gradients.py: the
ground of pair_topk.py and pair_filtered_grad.py.

The exponents of a tile are fused multiply-adds that are written as such, and a product adds up its
channels in one order in every kernel, so a pair has the same bits in every sweep, whichever row of
it is the owned one. Scores below the smallest normal number count as 0.

What accompanies a set of rows is one tuple (see `Side`), the same for anchors and candidates, so
that a tensor against itself needs no second one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import statistics as statistics_sweep
from .engine import vector
from .pair_logsumexp import LOG2_E
from .rows import Packed, pack_pair

FORMS = {"out": 0, "in": 1, "pixel": 2}
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal float32
INF = tl.constexpr(float("inf"))


class Side(NamedTuple):
    """Vectors that accompany rows, `(S, G, rows)`.

    Attributes:
        labels: int64, where positives go by label.
        index: `(R, G, rows)` int32, the positives of an anchor by number of the key row within the
            problem, -1 = none; where they are given so.
        addend: of candidates: 0, or -inf for excluded ones; None: all count.
        constants: of anchors: (a, b, c), those that are exponents times log2 e.
        scale: of anchors: 1 / norm, for the score of representations.
    """

    labels: Tensor | None
    index: Tensor | None
    addend: Tensor | None
    constants: Tensor | None
    scale: Tensor | None


class Pairs(NamedTuple):
    """The rows of a problem, what accompanies them, and compile-time options.

    Attributes:
        x, y: anchors and candidates; y None: x against itself.
        valid, key_valid: as `pack_pair` gives them.
        anchors, candidates: see `Side`; one and the same without y.
        options: (form, R or 0 where positives go by label, score of representations).
    """

    x: Packed
    y: Packed | None
    valid: Tensor | None
    key_valid: Tensor | None
    anchors: Side
    candidates: Side
    options: tuple[int, int, bool]

    @property
    def keys(self) -> int:
        """Candidates of one problem."""
        return self.x.count if self.y is None else self.y.count


def pairs_of(
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positives: Tensor | None,
    statistics: Tensor,
    form: str,
    score: str,
    ignore_index: int,
    normalize: bool,
    across: bool,
) -> Pairs:
    """Packed rows and their vectors; arguments as everywhere."""
    x, y, valid, key_valid = pack_pair(
        query, key, query_labels, key_labels, ignore_index, normalize, across
    )
    representation = score == "representation"
    scale = _inverse_norms(query, valid) if representation else None
    labels = query_labels if positives is None else None
    index = None if positives is None else _columns(positives, key, across)
    own = Side(labels, index, None, _constants(statistics, form), scale)
    if key is None:
        own = own._replace(addend=_addend(valid))
        other = own
    else:
        other = Side(key_labels if index is None else None, None, _addend(key_valid), None, None)
    options = (FORMS[form], 0 if index is None else index.shape[0], representation)
    return Pairs(x, y, valid, key_valid, own, other, options)


def _constants(statistics: Tensor, form: str) -> Tensor:
    """Row constants for exponents of 2; b is one for "in" only."""
    a, b, c = statistics.float().unbind(0)
    return torch.stack([a * LOG2_E, b * LOG2_E if form == "in" else b, c * LOG2_E])


def _addend(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else torch.where(valid, 0.0, float("-inf")).unsqueeze(0)


def _inverse_norms(query: Tensor, valid: Tensor | None) -> Tensor:
    """1 / norm `(1, B, L)`, 0 for zero rows and excluded ones, whatever these hold."""
    norm = torch.linalg.vector_norm(query, dim=1, dtype=torch.float32)
    some = norm > 0 if valid is None else (norm > 0) & valid
    return torch.where(some, 1 / norm.clamp_min(1e-12), 0.0).unsqueeze(0)


def _columns(positives: Tensor, key: Tensor | None, across: bool) -> Tensor:
    """Positives `(B, L, R)` of an image as `(R, B, L)` numbers of rows of the problem."""
    if key is None:
        raise ValueError("positives by index need a key")
    batch, length = key.shape[0], key.shape[2]
    first = torch.zeros(batch, dtype=torch.int64, device=key.device)
    if across:
        first = torch.arange(0, batch * length, length, device=key.device)
    column = torch.where(positives < 0, -1, positives + first[:, None, None])
    return column.to(torch.int32).movedim(2, 0).contiguous()


def by_row(values: Tensor, pairs: Pairs) -> Tensor:
    """`(C, U)` values of units as `(C, G, n)` of their anchors: a unit is a block of rows."""
    classes, units = values.shape
    rows = pairs.x.problems * pairs.x.count
    if rows % units:
        raise ValueError(f"{units} units do not share {rows} anchors: is scope as for k?")
    every = values.unsqueeze(2).expand(classes, units, rows // units)
    return every.reshape(classes, pairs.x.problems, pairs.x.count).contiguous()


def place_of_rows(pairs: Pairs) -> Tensor:
    """`(G, n)` int64, the place i * N + j of an anchor's pair with candidate 0 of its problem."""
    x, device = pairs.x, pairs.x.rows.device
    anchor = torch.arange(x.problems * x.count, device=device).reshape(x.problems, x.count)
    first = torch.arange(x.problems, device=device).unsqueeze(1) * pairs.keys
    return anchor * (x.problems * pairs.keys) + first


def row_rule(pairs: Pairs, threshold: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """The rule for every anchor: a threshold, and the last candidate of its problem that is taken
    on it. Both `(C, G, n)`, float32 and int32."""
    last = by_row(cut, pairs) - place_of_rows(pairs)
    return by_row(threshold.float(), pairs), last.clamp(-1, pairs.keys).to(torch.int32)


def sweep(
    pairs: Pairs,
    epilogue: tuple[object, object, object],
    vectors: tuple[Tensor, ...],
    out: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    active: Tensor | None = None,
    ordered: bool = False,
) -> None:
    """One pass over all pairs; vectors: what the epilogue reads besides the anchors' side."""
    statistics_sweep(
        "filter",
        pairs.x,
        pairs.y,
        epilogue,
        own=(*pairs.anchors, *vectors),
        other=tuple(pairs.candidates),
        out=out,
        numbers=numbers,
        options=(*pairs.options, vectors[0].shape[0]),
        active=active,
        ordered=ordered,
    )


@triton.jit
def along(v, AXIS: tl.constexpr):
    """A vector of a tile's owned rows (1) or of its streamed ones (0), to be combined with it."""
    return tl.expand_dims(v, AXIS)


@triton.jit
def anchor_constants(
    side, at, OPTIONS: tl.constexpr, SIZE: tl.constexpr, EDGE: tl.constexpr, AXIS: tl.constexpr
):
    """(a, b, c, scale) of a tile's anchors; rows beyond the last are no anchors."""
    REST: tl.constexpr = float("inf") if OPTIONS[0] == 1 else 0.0
    a = along(vector(side[3], 0, at, SIZE, EDGE, INF), AXIS)
    b = along(vector(side[3], 1, at, SIZE, EDGE, REST), AXIS)
    c, scale = a, a
    if OPTIONS[0] == 2:
        c = along(vector(side[3], 2, at, SIZE, EDGE, INF), AXIS)
    if OPTIONS[2]:
        scale = along(vector(side[4], 0, at, SIZE, EDGE), AXIS)
    return a, b, c, scale


@triton.jit
def own_labels(side, at, OPTIONS: tl.constexpr, SIZE: tl.constexpr):
    """Labels of the owned rows; where positives go by index, nothing."""
    if OPTIONS[1] == 0:
        return vector(side[0], 0, at, SIZE, True)[:, None]
    else:
        return tl.zeros([1, 1], tl.int64)


@triton.jit
def indexed(side, OPTIONS: tl.constexpr):
    """(the positives by index,) of anchors, where they are given so; of others nothing."""
    if OPTIONS[1] == 0 or side[1] is None:  # None that is returned fails in Triton 3.6
        return ()
    else:
        return (side[1],)


@triton.jit
def positive_pairs(
    labels,  # of the owned rows
    index,  # of the anchors, see above
    other,  # of the streamed rows
    at,
    to,
    OPTIONS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EDGE: tl.constexpr,
    MIRRORED: tl.constexpr,
):
    """Which pairs of a tile are positive; mirrored: the streamed rows are the anchors."""
    SEVERAL: tl.constexpr = OPTIONS[1]
    if SEVERAL == 0:
        return labels == vector(other[0], 0, to, BN, EDGE)[None, :]
    else:
        positive = tl.zeros([BM, BN], tl.int1)
        for k in range(0, SEVERAL):
            if MIRRORED:
                column = vector(index[0], k, to, BN, EDGE, -1)[None, :]
                positive = positive | (column == (at[2] + tl.arange(0, BM))[:, None])
            else:
                column = vector(index[0], k, at, BM, True, -1)[:, None]
                positive = positive | (column == (to[2] + tl.arange(0, BN))[None, :])
        return positive


@triton.jit
def gradient_and_score(s, constants, positive, addend, base, OPTIONS: tl.constexpr):
    """(G1) to (G3) and the score.

    s: cosines; constants: of the anchors; addend: of the candidates, or None; base: log2 e / t.
    """
    a, b, c, scale = constants
    x = tl.fma(s, base, -a)
    if addend is not None:
        x = x + addend
    gradient = tl.exp2(x)
    if OPTIONS[0] == 0:
        gradient = tl.where(positive, gradient - b, gradient)
    elif OPTIONS[0] == 1:
        gradient = tl.where(positive, gradient - tl.exp2(tl.fma(s, base, -b)), gradient)
    else:
        gradient = tl.where(positive, -b / (1.0 + tl.exp2(tl.fma(s, base, -c))), gradient)
    score = tl.abs(gradient)
    if OPTIONS[2]:
        score = score * tl.sqrt(tl.maximum(tl.fma(-s, s, 1.0), 0.0)) * scale
    return gradient, tl.where(score >= SMALLEST, score, 0.0)


@triton.jit
def of_kind(values, positive, CLASSES: tl.constexpr):
    """What holds for a pair: one value for all, or those of positives and of negatives."""
    if CLASSES == 1:
        return values[0]
    else:
        return tl.where(positive, values[0], values[1])


@triton.jit
def selected(score, limit, last, column):
    """(K2): column is the candidate's number within the problem, last the cut's in that row."""
    return (score > limit) | ((score == limit) & (column <= last))


# Epilogues of sweeps over scores. own: Side, then the vectors of the sweep; other: Side.
# OPTIONS = (form, indexed, representation, classes)


@triton.jit
def anchors_of(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    """What `scores` needs of the owned rows."""
    labels = own_labels(own, at, OPTIONS, BM)
    constants = anchor_constants(own, at, OPTIONS, BM, True, 1)
    return labels, constants, at, indexed(own, OPTIONS)


@triton.jit
def vectors_of(pointer, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    """[BM, 1] of each class."""
    CLASSES: tl.constexpr = OPTIONS[3]
    result = ()
    for k in tl.static_range(CLASSES):
        result = result + (vector(pointer, k, at, BM, True)[:, None],)
    return result


@triton.jit
def scores(anchors, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    """Which pairs of a tile are positive, their gradients and scores, and the candidates."""
    BM: tl.constexpr = s.shape[0]
    BN: tl.constexpr = s.shape[1]
    labels, constants, at, index = anchors
    positive = positive_pairs(labels, index, other, at, to, OPTIONS, BM, BN, EDGE, False)
    addend = None
    if other[2] is not None:
        addend = vector(other[2], 0, to, BN, EDGE)[None, :]
    g, r = gradient_and_score(s, constants, positive, addend, numbers[0], OPTIONS)
    if EDGE:
        r = tl.where(inside, r, 0.0)
    return positive, g, r, (to[2] + tl.arange(0, BN))[None, :]


@triton.jit
def of_class(mask, positive, k: tl.constexpr, CLASSES: tl.constexpr):
    """[BM, BN] 1 for the pairs of a class that the mask has, else 0."""
    if CLASSES == 2:
        if k == 0:
            mask = mask & positive
        else:
            mask = mask & (positive == 0)
    return mask.to(tl.int32)


@triton.jit
def filled(COUNT: tl.constexpr, BM: tl.constexpr, VALUE: tl.constexpr):
    """COUNT vectors of the owned rows, int32."""
    result = ()
    for _k in tl.static_range(COUNT):
        result = result + (tl.full([BM], VALUE, tl.int32),)
    return result
