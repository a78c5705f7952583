"""Losses of the selected pairs: "recompute" and "pos_full_den" of the Gradient Filter."""

from __future__ import annotations

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
    rows = one.value.numel()
    at = anchor.clamp_min(0)
    count = _sums(positive.to(s.dtype), at, rows)
    valid = count > 0
    share = 1 / count.clamp_min(1)
    if problem.form == "pixel":
        negative = _logsumexp(s, (anchor >= 0) & ~positive, at, rows)[at]
        some = negative > -torch.inf
        log = torch.where(some, torch.logaddexp(s, torch.where(some, negative, 0.0)), s)
        value = _sums(torch.where(positive, log - s, 0.0), at, rows) * share
    else:
        value = _logsumexp(s, anchor >= 0, at, rows) - _target(
            problem, s, positive, at, rows, share
        )
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
    rows = one.value.numel()
    at = anchor.clamp_min(0)
    count = _sums(positive.to(s.dtype), at, rows)
    valid = (count > 0).reshape(one.value.shape)
    share = 1 / count.clamp_min(1)
    target = _target(problem, s, positive, at, rows, share).reshape(one.value.shape)
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


def _target(
    problem: Problem, s: Tensor, positive: Tensor, at: Tensor, rows: int, share: Tensor
) -> Tensor:
    """What the positives are worth to each anchor, `(B * L,)`; any finite value without one."""
    if problem.form == "in":
        together = _logsumexp(s, positive, at, rows)
        return torch.where(together > -torch.inf, together + share.log(), 0.0)
    return _sums(torch.where(positive, s, 0.0), at, rows) * share


def _sums(values: Tensor, at: Tensor, rows: int) -> Tensor:
    """Sums by anchor in the order of the list."""
    return values.new_zeros(rows).index_add(0, at, values)


def _logsumexp(s: Tensor, counted: Tensor, at: Tensor, rows: int) -> Tensor:
    """Log-sum-exp by anchor over the counted entries; -inf with gradient 0 where there is none."""
    low = torch.where(counted, s.detach(), -torch.inf)
    top = low.new_full((rows,), -torch.inf).scatter_reduce(0, at, low, "amax")
    some = top > -torch.inf
    top = torch.where(some, top, 0.0)
    total = _sums(torch.where(counted, (s - top[at]).exp(), 0.0), at, rows)
    return torch.where(some, torch.where(some, total, 1.0).log() + top, -torch.inf)
