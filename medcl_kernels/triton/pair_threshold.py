"""The threshold of `pair_topk`: the score of the k-th pair of every cell, by counting.

As integers, the bits of non-negative floats are in the order of the floats. For every cell (a unit,
one of two classes) an interval of bits holds the k-th score:

1. Where there are many pairs, a sample of rows and candidates narrows it down to a window.
2. A sweep over all pairs counts those above the interval, in registers, and those in each of its
   bins, with integer atomics; the bin that the k-th falls into is the next interval. A window that
   missed is noticed by its counts and replaced by the rest of all floats. So a fixed number of
   sweeps ends at one value; rows whose cells are there already skip a sweep.

Only torch operations on the device decide between the sweeps: nothing waits for it, and integers
add up in any order to the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import store
from .pair_gradients import (
    Pairs,
    Side,
    anchors_of,
    by_row,
    filled,
    of_class,
    of_kind,
    scores,
    sweep,
    vectors_of,
)
from .rows import Packed

SMALLEST, TOP = 0x00800000, 0x7F800001  # bits of the smallest normal float32; behind infinity
SAMPLED = 1024  # rows of a unit, and candidates, in a sample
SAMPLE_BITS = 15  # log2 of its bins: exponent and seven digits
BITS, MORE_BITS = 16, 22  # log2 of all bins of a sweep, after a sample
FEWEST_BITS = 8  # of one cell
INF = float("inf")


def threshold_of(pairs: Pairs, k: Tensor, numbers: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """`(C, U)` thresholds, 0 where every pair is kept and inf where none, and which of them are
    the score of the k-th pair."""
    unit_rows = pairs.x.problems * pairs.x.count // k.shape[1]
    step = min(unit_rows, pairs.keys) // SAMPLED
    interval = _Interval(torch.full_like(k, SMALLEST), torch.full_like(k, TOP))
    if step >= 4:
        interval = _sample(pairs, k, step, numbers)
    spare = (k.numel() - 1).bit_length()
    bits = max(FEWEST_BITS, (MORE_BITS if step >= 4 else BITS) - spare)
    done, everything = k == 0, torch.zeros_like(k, dtype=torch.bool)
    for _ in range(triton.cdiv(31, bits) + int(step >= 4)):
        shift = interval.shift(bits)
        counted = _count(pairs, _cells(pairs, k), interval, shift, bits, ~done, numbers)
        interval, all_kept = interval.narrowed(k, *counted, shift, done)
        everything = everything | all_kept
        done = done | everything | (interval.high - interval.low == 1)
    exact = ~everything & (k > 0)
    found = interval.low.to(torch.int32).view(torch.float32)
    return torch.where(exact, found, torch.where(everything, 0.0, INF)), exact


class _Interval(NamedTuple):
    """Bits low ... high - 1 of every cell, `(C, U)` int64."""

    low: Tensor
    high: Tensor

    def shift(self, bits: int) -> Tensor:
        """By how many bits a place in the interval is shifted to be one of 2^bits bins."""
        length = torch.frexp((self.high - self.low - 1).double()).exponent.long()
        return (length - bits).clamp_min(0)

    def narrowed(
        self, k: Tensor, above: Tensor, histogram: Tensor, shift: Tensor, done: Tensor
    ) -> tuple[_Interval, Tensor]:
        """The interval after a sweep, and where all pairs are wanted.

        Args:
            k: `(C, U)`.
            above: `(C, U)`, pairs above the interval.
            histogram: `(C, U, bins)`, pairs in each part of it.
            shift: `(C, U)`, see above.
            done: `(C, U)` bool: stays as it is.
        """
        low, high = self
        together = above + histogram.sum(2)
        everything = ~done & (low == SMALLEST) & (together <= k)
        missed_above = above >= k
        missed_below = together < k
        begin = low + (_bin(histogram, k - above) << shift)
        end = torch.minimum(high, begin + (torch.ones_like(shift) << shift))
        begin = torch.where(missed_above, high, torch.where(missed_below, SMALLEST, begin))
        end = torch.where(missed_above, TOP, torch.where(missed_below, low, end))
        keep = done | everything
        return _Interval(torch.where(keep, low, begin), torch.where(keep, high, end)), everything


def _bin(histogram: Tensor, rank: Tensor) -> Tensor:
    """The bin of `(C, U, bins)` in which counting from the top reaches a rank `(C, U)`."""
    bins = histogram.shape[2]
    fine = 1 << (bins.bit_length() // 2)
    parts = histogram.unflatten(2, (bins // fine, fine))
    coarse, above = _reached(parts.sum(3), rank)
    at = coarse[..., None, None].expand(*coarse.shape, 1, fine)
    return coarse * fine + _reached(parts.gather(2, at).squeeze(2), rank - above)[0]


def _reached(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Where counting `(C, U, n)` from the end reaches a rank, and what lies behind that place."""
    behind = counts.flip(2).cumsum(2)
    place = (behind < rank.unsqueeze(2)).sum(2).clamp_max(counts.shape[2] - 1)
    here = counts.shape[2] - 1 - place
    at = place.unsqueeze(2)
    return here, (behind.gather(2, at) - counts.gather(2, here.unsqueeze(2))).squeeze(2)


def _sample(pairs: Pairs, k: Tensor, step: int, numbers: tuple[float, ...]) -> _Interval:
    """A window for the k-th score from every step-th row and candidate. Rows differ, so it is
    wide; whether it holds the k-th score is found out later."""
    bits = max(FEWEST_BITS, SAMPLE_BITS - max(0, k.numel().bit_length() - 7))
    few = _every(pairs, step)
    cells = _cells(pairs, k)[..., ::step].contiguous()
    everything = _Interval(torch.full_like(k, SMALLEST), torch.full_like(k, TOP))
    shift = torch.full_like(k, 31 - bits)
    counts = _histogram(few, cells, everything, shift, bits, None, numbers)[1]
    histogram = counts.view(*k.shape, 1 << bits)
    wanted = k.double() / step**2
    slack = 8 + 4 * wanted.sqrt()
    more = (1.25 * wanted + slack).ceil().long()
    less = (0.75 * wanted - slack).floor().long()
    low = SMALLEST + (_bin(histogram, more) << shift)
    high = SMALLEST + ((_bin(histogram, less.clamp_min(1)) + 1) << shift)
    low = torch.where(more > histogram.sum(2), SMALLEST, low)
    return _Interval(low, torch.where(less < 1, TOP, high.clamp_max(TOP)))


def _every(pairs: Pairs, step: int) -> Pairs:
    """Every step-th row and candidate of every problem."""

    def rows(x: Packed) -> Packed:
        return Packed(x.rows[:, ::step].contiguous(), x.precision)

    def side(one: Side) -> Side:
        return Side(*(None if v is None else _strided(v, pairs, step) for v in one))

    x, y = rows(pairs.x), None if pairs.y is None else rows(pairs.y)
    anchors = side(pairs.anchors)
    if anchors.index is not None:
        index = anchors.index
        number = torch.div(index, step, rounding_mode="floor")
        anchors = anchors._replace(index=torch.where(index % step == 0, number, -1))
    candidates = anchors if y is None else side(pairs.candidates)
    return pairs._replace(x=x, y=y, anchors=anchors, candidates=candidates)


def _strided(v: Tensor, pairs: Pairs, step: int) -> Tensor:
    """Every step-th row of vectors `(S, G, rows)`, or `(S, B, L)`."""
    by_problem = v.reshape(v.shape[0], pairs.x.problems, -1)
    return by_problem[..., ::step].contiguous()


def _cells(pairs: Pairs, k: Tensor) -> Tensor:
    """`(C, G, n)` int64, the cell of every anchor's pairs of each class."""
    return by_row(torch.arange(k.numel(), device=k.device).view(k.shape), pairs)


def _count(
    pairs: Pairs,
    cells: Tensor,
    interval: _Interval,
    shift: Tensor,
    bits: int,
    open_cells: Tensor,
    numbers: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Pairs above the interval of each cell `(C, U)`, and in its bins `(C, U, bins)`."""
    active = by_row(open_cells.any(0, keepdim=True).to(torch.int32), pairs)
    above, histogram = _histogram(pairs, cells, interval, shift, bits, active, numbers)
    by_unit = above.view(*shift.shape, -1).sum(2)
    return by_unit, histogram.view(*shift.shape, 1 << bits)


def _histogram(
    pairs: Pairs,
    cells: Tensor,
    interval: _Interval,
    shift: Tensor,
    bits: int,
    active: Tensor | None,
    numbers: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """The sweep of `_count`: per anchor `(C, G, n)`, and the bins of all cells."""
    x = pairs.x
    every = x.problems * x.count * pairs.keys  # a bin may hold them all
    kind = torch.int64 if every >= 2**31 else torch.int32
    histogram = torch.zeros(shift.numel() << bits, dtype=kind, device=x.rows.device)
    above = torch.empty(cells.shape, dtype=torch.int32, device=x.rows.device)
    low, high, moved = (v.flatten().to(torch.int32)[cells] for v in (*interval, shift))
    sweep(
        pairs,
        (_count_start, _count_step, _count_finish),
        (low, high, moved, cells << bits, histogram),
        (above,),
        numbers,
        active=active,
    )
    return above, histogram


@triton.jit
def _count_start(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    """low, high, shift, first bin; histogram."""
    CLASSES: tl.constexpr = OPTIONS[3]
    low = vectors_of(own[5], at, OPTIONS, BM)
    high = vectors_of(own[6], at, OPTIONS, BM)
    shift = vectors_of(own[7], at, OPTIONS, BM)
    bins = vectors_of(own[8], at, OPTIONS, BM)
    values = (anchors_of(own, at, OPTIONS, BM), low, high, shift, bins, own[9])
    return values, filled(CLASSES, BM, 0)


@triton.jit
def _count_step(
    state, values, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr
):
    anchors, lows, highs, shifts, bins, histogram = values
    CLASSES: tl.constexpr = OPTIONS[3]
    positive, g, r, column = scores(anchors, s, other, to, inside, numbers, OPTIONS, EDGE)
    bits = r.to(tl.int32, bitcast=True)
    low = of_kind(lows, positive, CLASSES)
    high = of_kind(highs, positive, CLASSES)
    within = (bits >= low) & (bits < high)
    place = (bits - low) >> of_kind(shifts, positive, CLASSES)
    where = histogram + of_kind(bins, positive, CLASSES) + place
    tl.atomic_add(where, 1, mask=within, sem="relaxed")
    above = bits >= high
    new = ()
    for k in tl.static_range(CLASSES):
        new = new + (state[k] + tl.sum(of_class(above, positive, k, CLASSES), 1),)
    return new


@triton.jit
def _count_finish(state, values, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    CLASSES: tl.constexpr = OPTIONS[3]
    for k in tl.static_range(CLASSES):
        store(out[0], k, at, state[k], BM)
