"""Losses of the selected pairs: "recompute" and "pos_full_den" of the Gradient Filter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.pair_at import pair_at
from ..ops.pair_logsumexp import pair_logsumexp
from .filter_statistics import Perspective, Problem


def recomputed(
    problem: Problem, one: Perspective, anchor: Tensor, candidate: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss as if only the listed pairs existed.

    Returns:
        values `(B, L)` and which of them have a selected positive.
    """
    s, positive = listed_similarities(problem, one, anchor, candidate)
    runs = _runs(anchor, one.value.numel())
    count = _sums(positive.to(s.dtype), runs)
    valid = count > 0
    share = 1 / count.clamp_min(1)
    if problem.form == "pixel":
        negative = _Spread.apply(_logsumexp(s, (anchor >= 0) & ~positive, runs), *runs)
        some = negative > -torch.inf
        log = torch.where(some, torch.logaddexp(s, torch.where(some, negative, 0.0)), s)
        value = _sums(torch.where(positive, log - s, 0.0), runs) * share
    else:
        value = _logsumexp(s, anchor >= 0, runs) - _target(problem, s, positive, runs, share)
    shape = one.value.shape
    return torch.where(valid, value, 0.0).reshape(shape), valid.reshape(shape)


def full_denominator(
    problem: Problem, one: Perspective, anchor: Tensor, candidate: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all candidates against the selected positives.

    Returns:
        values `(B, L)` and which of them have a selected positive.
    """
    s, positive = listed_similarities(problem, one, anchor, candidate)
    runs = _runs(anchor, one.value.numel())
    count = _sums(positive.to(s.dtype), runs)
    valid = (count > 0).reshape(one.value.shape)
    share = 1 / count.clamp_min(1)
    target = _target(problem, s, positive, runs, share).reshape(one.value.shape)
    lse = pair_logsumexp(
        problem.query,
        problem.key,
        query_labels=one.labels,
        key_labels=one.key_labels,
        **problem.options,
    )[0]
    # anchors without a selected positive must not send -inf back
    lse = torch.where(valid, lse, 0.0)
    return torch.where(valid, lse - target, 0.0), valid


def listed_similarities(
    problem: Problem, one: Perspective, anchor: Tensor, candidate: Tensor
) -> tuple[Tensor, Tensor]:
    """s of the listed pairs, `(K,)` with gradient, and which are positive."""
    options = {name: problem.options[name] for name in ("temperature", "normalize", "impl")}
    s = pair_at(problem.query, problem.key, anchor, candidate, **options)
    i, j = anchor.clamp_min(0), candidate.clamp_min(0)
    if problem.index is not None:
        assert problem.key is not None
        pixels = problem.key.shape[2]
        index = (
            problem.index
            + torch.arange(len(problem.index), device=s.device).reshape(-1, 1, 1) * pixels
        )
        index = torch.where(problem.index < 0, -1, index).flatten(0, 1)
        positive = (index[i] == j.unsqueeze(1)).any(1)
    else:
        assert one.labels is not None
        other = one.labels if one.key_labels is None else one.key_labels
        positive = one.labels.flatten()[i] == other.flatten()[j]
    return s, positive & (anchor >= 0)


class _Runs(NamedTuple):
    """Which entries of a list belong to which anchor.

    Attributes:
        at: `(K,)`, the anchor of every entry, any for unused ones.
        starts: `(rows + 1,)`, entries starts[i] to starts[i + 1] belong to anchor i.
    """

    at: Tensor
    starts: Tensor


def _runs(anchor: Tensor, rows: int) -> _Runs:
    """Of a list in the order of its anchors, unused entries (anchor < 0) at the end."""
    bounds = torch.arange(rows + 1, device=anchor.device)
    return _Runs(
        anchor.clamp_min(0),
        torch.searchsorted(torch.where(anchor < 0, rows, anchor), bounds),
    )


class _Listed(torch.autograd.Function):
    """Between a list and its anchors, along the `_Runs` that follow the values."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])


class _Sums(_Listed):
    """`(K,)` -> `(rows,)`: sums by anchor in the order of the list. On a GPU `index_add` would add
    floats in any order."""

    @staticmethod
    def forward(values: Tensor, at: Tensor, starts: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=starts, unsafe=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(g, *ctx.saved_tensors), None, None


class _Spread(_Listed):
    """`(rows,)` -> `(K,)`: the value of the anchor at every entry; the transpose of `_Sums`."""

    @staticmethod
    def forward(values: Tensor, at: Tensor, starts: Tensor) -> Tensor:
        return values[at]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Sums.apply(g, *ctx.saved_tensors), None, None


def _target(problem: Problem, s: Tensor, positive: Tensor, runs: _Runs, share: Tensor) -> Tensor:
    """What the positives are worth to each anchor, `(B * L,)`; any finite value without one."""
    if problem.form == "in":
        together = _logsumexp(s, positive, runs)
        return torch.where(together > -torch.inf, together + share.log(), 0.0)
    return _sums(torch.where(positive, s, 0.0), runs) * share


def _sums(values: Tensor, runs: _Runs) -> Tensor:
    """Sums by anchor; unused entries are left out."""
    return _Sums.apply(values, *runs)


def _logsumexp(s: Tensor, counted: Tensor, runs: _Runs) -> Tensor:
    """Log-sum-exp by anchor over the counted entries; -inf with gradient 0 where there is none."""
    low = torch.where(counted, s.detach(), -torch.inf)
    top = low.new_full((len(runs.starts) - 1,), -torch.inf)
    top = top.scatter_reduce(0, runs.at, low, "amax")
    some = top > -torch.inf
    top = torch.where(some, top, 0.0)
    total = _sums(torch.where(counted, (s - top[runs.at]).exp(), 0.0), runs)
    return torch.where(some, torch.where(some, total, 1.0).log() + top, -torch.inf)
