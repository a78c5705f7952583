"""`uncertainty_reweight`: (U1) to (U4) of reference/uncertainty_reweight.py.

A program owns a few pixels of one image: the entropy of their logits stays in registers while their
features pass by once, on the way forth as on the way back.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, operation
from .rows import strided

ROWS = 32  # pixels per program
CHANNELS, LOGITS = 64, 64  # at most, at a time


@operation
def uncertainty_reweight(features: Tensor, logits: Tensor) -> Tensor:
    """(U2), in the layout of `features` where that is dense; see ops/uncertainty_reweight.py."""
    out = torch.empty_like(features)
    _launch(reweight_kernel, features, logits, {"out": out, "out_strides": out.stride()})
    return out


@operation
def uncertainty_reweight_backward(
    d_out: Tensor, features: Tensor, logits: Tensor, need_features: bool, need_logits: bool
) -> tuple[Tensor, Tensor]:
    """(U3) and (U4), in the layouts of features and logits."""
    d_features = torch.empty_like(features) if need_features else features.new_empty(0)
    d_logits = torch.empty_like(logits) if need_logits else logits.new_empty(0)
    arguments = {
        "d_out": d_out,
        "d_x": d_features if need_features else None,
        "d_z": d_logits if need_logits else None,
        "d_out_strides": d_out.stride(),
        "d_x_strides": d_features.stride() if need_features else None,
        "d_z_strides": d_logits.stride() if need_logits else None,
    }
    if need_features or need_logits:
        _launch(reweight_backward_kernel, features, logits, arguments)
    return d_features, d_logits


def _launch(kernel: Any, x: Tensor, z: Tensor, arguments: dict[str, Any]) -> None:
    batch, channels, length = x.shape
    count = z.shape[1]
    if z.shape != (batch, count, length) or count < 2 or z.dtype != x.dtype:
        raise ValueError(
            f"features {tuple(x.shape)} need logits {(batch, 'M', length)} of the same dtype, "
            f"M >= 2; got {tuple(z.shape)}, {x.dtype} and {z.dtype}"
        )
    blocks = triton.cdiv(length, ROWS)
    launch(
        kernel,
        batch * blocks,
        {
            "x": x,
            "z": z,
            **arguments,
            "per_log": 1 / log(count),
            "length": length,
            "blocks": blocks,
            "channels": channels,
            "logits": count,
            "x_strides": x.stride(),
            "z_strides": z.stride(),
        },
        {
            "ROWS": ROWS,
            "CHANNELS": min(triton.next_power_of_2(channels), CHANNELS),
            "LOGITS": min(triton.next_power_of_2(count), LOGITS),
        },
    )


@triton.jit
def place(length, blocks, ROWS: tl.constexpr):
    """The image of a program, and its pixels."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    return image, (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)


@triton.jit
def field(pointer, strides, image, r, d, length, channels):
    """[ROWS, CHANNELS] of one image, and which of them exist."""
    inside = (r < length)[:, None] & (d < channels)[None, :]
    where = pointer + image * strides[0] + strided(strides, r, d)
    return where, inside


@triton.jit
def entropy(z, strides, image, r, length, logits, ROWS: tl.constexpr, LOGITS: tl.constexpr):
    """Largest logit, logarithm of the sum of exponentials relative to it, and H of (U1)."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(0, logits, LOGITS):
        m = first + tl.arange(0, LOGITS)
        where, inside = field(z, strides, image, r, m, length, logits)
        part = tl.load(where, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(part, 1))
    top = tl.where(r < length, top, 0.0)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for first in range(0, logits, LOGITS):
        m = first + tl.arange(0, LOGITS)
        where, inside = field(z, strides, image, r, m, length, logits)
        below = tl.load(where, mask=inside, other=0.0).to(tl.float32) - top[:, None]
        one = (m < logits)[None, :]
        e = tl.where(one, tl.exp(below), 0.0)
        total += tl.sum(e, 1)
        weighted += tl.sum(tl.where(one, e * below, 0.0), 1)
    log_sum = tl.log(total)
    return top, log_sum, log_sum - weighted / total


@triton.jit(do_not_specialize=["length", "blocks", "channels", "logits"])
def reweight_kernel(
    x,  # (B, C, L)
    z,  # (B, M, L)
    out,  # (B, C, L)
    per_log,
    length,
    blocks,
    channels,
    logits,
    x_strides,
    z_strides,
    out_strides,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOGITS: tl.constexpr,
):
    image, r = place(length, blocks, ROWS)
    _, _, h = entropy(z, z_strides, image, r, length, logits, ROWS, LOGITS)
    weight = (2.0 - h * per_log)[:, None]
    for channel in range(0, channels, CHANNELS):
        d = channel + tl.arange(0, CHANNELS)
        where, inside = field(x, x_strides, image, r, d, length, channels)
        y = tl.load(where, mask=inside, other=0.0).to(tl.float32) * weight
        where, inside = field(out, out_strides, image, r, d, length, channels)
        tl.store(where, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "blocks", "channels", "logits"])
def reweight_backward_kernel(
    d_out,  # (B, C, L)
    x,  # (B, C, L)
    z,  # (B, M, L)
    d_x,  # (B, C, L) or None
    d_z,  # (B, M, L) or None
    per_log,
    length,
    blocks,
    channels,
    logits,
    d_out_strides,
    x_strides,
    z_strides,
    d_x_strides,
    d_z_strides,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOGITS: tl.constexpr,
):
    image, r = place(length, blocks, ROWS)
    top, log_sum, h = entropy(z, z_strides, image, r, length, logits, ROWS, LOGITS)
    weight = (2.0 - h * per_log)[:, None]
    along = tl.zeros([ROWS], tl.float32)  # sum over channels of g x
    for channel in range(0, channels, CHANNELS):
        d = channel + tl.arange(0, CHANNELS)
        where, inside = field(d_out, d_out_strides, image, r, d, length, channels)
        g = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        if d_z is not None:
            where, inside = field(x, x_strides, image, r, d, length, channels)
            along += tl.sum(g * tl.load(where, mask=inside, other=0.0).to(tl.float32), 1)
        if d_x is not None:
            where, inside = field(d_x, d_x_strides, image, r, d, length, channels)
            tl.store(where, (g * weight).to(d_x.dtype.element_ty), mask=inside)
    if d_z is not None:
        along *= per_log
        for first in range(0, logits, LOGITS):
            m = first + tl.arange(0, LOGITS)
            where, inside = field(z, z_strides, image, r, m, length, logits)
            part = tl.load(where, mask=inside, other=0.0).to(tl.float32)
            log_p = part - top[:, None] - log_sum[:, None]
            d_part = along[:, None] * tl.exp(log_p) * (log_p + h[:, None])
            where, inside = field(d_z, d_z_strides, image, r, m, length, logits)
            tl.store(where, d_part.to(d_z.dtype.element_ty), mask=inside)
