"""`pair_argmax`: (X1) of reference/pair_argmax.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import statistics, store
from .launch import operation
from .rows import pack_pair


@operation
def pair_argmax(query: Tensor, key: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Index `(B, L)` int64 and value `(B, L)` float32; see ops/pair_argmax.py."""
    shape = (query.shape[0], query.shape[2])
    index = torch.empty(shape, dtype=torch.int64, device=query.device)
    value = torch.empty(shape, dtype=torch.float32, device=query.device)
    x, y, _, _ = pack_pair(query, key, None, None, 0, normalize, False)
    statistics("argmax", x, y, (_start, _step, _finish), out=(index, value))
    return index, value


@triton.jit
def _start(own, at, OPTIONS: tl.constexpr, BM: tl.constexpr):
    best = tl.full([BM], float("-inf"), tl.float32)
    return (), (best, tl.zeros([BM], tl.int32))


@triton.jit
def _step(state, values, s, other, to, inside, numbers, OPTIONS: tl.constexpr, EDGE: tl.constexpr):
    if EDGE:
        s = tl.where(inside, s, float("-inf"))
    best, index = state
    columns: tl.constexpr = s.shape[1]
    column = tl.arange(0, columns)
    top = tl.max(s, 1)
    first = tl.min(tl.where(s == top[:, None], column[None, :], columns), 1)
    better = top > best  # strictly: an earlier tile keeps a tie
    return tl.where(better, top, best), tl.where(better, to[2] + first, index)


@triton.jit
def _finish(state, values, out, at, own, numbers, OPTIONS: tl.constexpr, BM: tl.constexpr):
    store(out[0], 0, at, state[1].to(tl.int64), BM)
    store(out[1], 0, at, state[0], BM)
