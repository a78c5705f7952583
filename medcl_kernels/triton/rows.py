"""Packing: the one place that meets the user's strides.

`pack` reads rows `(B, D, L)` of any strides once and writes unit rows `(B, L, width)` in the dtype
of the products, excluded rows zero; `unpack` takes the gradient with respect to these rows through
the normalisation, (P5) of reference/pairs.py, straight into the layout of the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, precision

EPSILON = tl.constexpr(1e-12)
TILE = 32  # rows of a tile


class Packed(NamedTuple):
    """Rows as the pair kernels read them.

    Attributes:
        rows: `(G, n, width)` contiguous; channels from D on are zero.
        precision: "half", "tf32" (rounded to it already) or "ieee".
    """

    rows: Tensor
    precision: str

    @property
    def problems(self) -> int:
        """G."""
        return self.rows.shape[0]

    @property
    def count(self) -> int:
        """Rows of one problem."""
        return self.rows.shape[1]

    @property
    def width(self) -> int:
        """Channels of a packed row."""
        return self.rows.shape[2]


def packed_width(channels: int) -> int:
    """16, 32, 64, 128, or a multiple of 128: 16-byte loads, and a size that tiles divide."""
    if channels > 128:
        return triton.cdiv(channels, 128) * 128
    return max(16, triton.next_power_of_2(channels))


def pack(x: Tensor, valid: Tensor | None, normalize: bool, across: bool = False) -> Packed:
    """Rows in the canonical form of the pair kernels.

    Args:
        x: `(B, D, L)`, any strides.
        valid: `(B, L)` bool, False for rows to be replaced by zeros; None: all count.
        normalize: scale rows to unit length.
        across: one problem of B * L rows instead of B problems.
    """
    batch, channels, length = x.shape
    kind, wide = precision(x.dtype), packed_width(channels)
    out = torch.empty((batch, length, wide), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(length, TILE)
    launch(
        pack_kernel,
        batch * blocks,
        {
            "x": x,
            "valid": None if valid is None else valid.contiguous(),
            "out": out,
            "length": length,
            "blocks": blocks,
            "channels": channels,
            "strides": x.stride(),
        },
        {
            "NORMALIZE": normalize,
            "TF32": kind == "tf32",
            "WIDTH": wide,
            "ROWS": TILE,
            "CHANNELS": min(wide, 128),
        },
    )
    return Packed(out.view(1, -1, wide) if across else out, kind)


def pack_pair(
    query: Tensor,
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    ignore_index: int,
    normalize: bool,
    across: bool,
) -> tuple[Packed, Packed | None, Tensor | None, Tensor | None]:
    """Both sets of rows, and which of them any of S label maps counts, `(B, L)` bool."""
    if key is not None and key.dtype != query.dtype:
        raise ValueError(
            f"query and key must have one dtype on a GPU; got {query.dtype} and {key.dtype}: "
            "convert one of them"
        )
    valid, key_valid = counted(query_labels, ignore_index), counted(key_labels, ignore_index)
    x = pack(query, valid, normalize, across)
    return x, None if key is None else pack(key, key_valid, normalize, across), valid, key_valid


def counted(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """`(B, L)` bool: the rows that any of `(S, B, L)` label maps counts; None: all."""
    if labels is None:
        return None
    valid = labels != ignore_index
    return valid[0] if valid.shape[0] == 1 else valid.any(0)


def unpack(
    d_rows: Tensor,
    x: Tensor,
    valid: Tensor | None,
    normalize: bool,
    factor: float,
    unscale: Tensor | None = None,
) -> Tensor:
    """Gradient of `x` from the gradient of its packed rows.

    Args:
        d_rows: `B * L` rows of `packed_width(D)` channels, float32.
        x: `(B, D, L)`, what `pack` got.
        valid, normalize: as for `pack`; excluded rows get 0.
        factor: multiplies the gradient.
        unscale: 0-d float32, multiplies it too; None: 1.

    Returns:
        Like `x`, in its layout where that is dense.
    """
    batch, channels, length = x.shape
    wide = packed_width(channels)
    out = torch.empty_like(x)
    blocks = triton.cdiv(length, TILE)
    launch(
        unpack_kernel,
        batch * blocks,
        {
            "d_rows": d_rows,
            "x": x,
            "valid": None if valid is None else valid.contiguous(),
            "unscale": unscale,
            "out": out,
            "factor": factor,
            "length": length,
            "blocks": blocks,
            "channels": channels,
            "strides": x.stride(),
            "out_strides": out.stride(),
        },
        {"NORMALIZE": normalize, "WIDTH": wide, "ROWS": TILE, "CHANNELS": min(wide, 128)},
    )
    return out


@triton.jit
def strided(strides, r, d):
    """Offsets [ROWS, CHANNELS] of rows r and channels d of one image, 64 bits wide."""
    return r.to(tl.int64)[:, None] * strides[2] + d.to(tl.int64)[None, :] * strides[1]


@triton.jit
def packed(image, length, r, d, WIDTH: tl.constexpr):
    """Offsets [ROWS, CHANNELS] of the packed rows r of one image."""
    return (image * length + r.to(tl.int64))[:, None] * WIDTH + d[None, :]


@triton.jit(do_not_specialize=["length", "blocks", "channels"])
def pack_kernel(
    x,  # (B, D, L)
    valid,  # (B, L) bool or None
    out,  # (B, L, WIDTH)
    length,
    blocks,
    channels,
    strides,
    NORMALIZE: tl.constexpr,
    TF32: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    x += image * strides[0]
    keep = r < length
    if valid is not None:
        keep = tl.load(valid + image * length + r, mask=keep, other=0) != 0
    scale = tl.full([ROWS], 1.0, tl.float32)
    if NORMALIZE:
        square = tl.zeros([ROWS], tl.float32)
        for channel in range(0, WIDTH, CHANNELS):
            d = channel + tl.arange(0, CHANNELS)
            mask = keep[:, None] & (d < channels)[None, :]
            part = tl.load(x + strided(strides, r, d), mask=mask, other=0.0).to(tl.float32)
            square += tl.sum(part * part, 1)
        scale = tl.div_rn(scale, tl.maximum(tl.sqrt_rn(square), EPSILON))
    for channel in range(0, WIDTH, CHANNELS):
        d = channel + tl.arange(0, CHANNELS)
        mask = keep[:, None] & (d < channels)[None, :]
        z = tl.load(x + strided(strides, r, d), mask=mask, other=0.0).to(tl.float32)
        z = z * scale[:, None]
        if TF32:  # to the nearest, so that a tensor core finds nothing to cut off
            bits = z.to(tl.int32, bitcast=True)
            bits = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
            z = tl.where(z == z, bits.to(tl.float32, bitcast=True), z)
        z = z.to(out.dtype.element_ty)
        tl.store(out + packed(image, length, r, d, WIDTH), z, mask=(r < length)[:, None])


@triton.jit(do_not_specialize=["length", "blocks", "channels"])
def unpack_kernel(
    d_rows,  # (B, L, WIDTH) float32
    x,  # (B, D, L)
    valid,  # (B, L) bool or None
    unscale,  # () float32 or None
    out,  # (B, D, L)
    factor,
    length,
    blocks,
    channels,
    strides,
    out_strides,
    NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    x += image * strides[0]
    out += image * out_strides[0]
    keep = r < length
    if valid is not None:
        keep = tl.load(valid + image * length + r, mask=keep, other=0) != 0
    if unscale is not None:
        factor *= tl.load(unscale)
    inverse = tl.full([ROWS], 1.0, tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    if NORMALIZE:
        square = tl.zeros([ROWS], tl.float32)
        moved = tl.zeros([ROWS], tl.int32)
        for channel in range(0, WIDTH, CHANNELS):
            d = channel + tl.arange(0, CHANNELS)
            mask = keep[:, None] & (d < channels)[None, :]
            part = tl.load(x + strided(strides, r, d), mask=mask, other=0.0).to(tl.float32)
            d_part = tl.load(d_rows + packed(image, length, r, d, WIDTH), mask=mask, other=0.0)
            square += tl.sum(part * part, 1)
            along += tl.sum(part * d_part, 1)
            moved += tl.sum((d_part != 0).to(tl.int32), 1)
        # a zero row has gradient 0, and one that takes part in no pair, whatever it holds
        keep = keep & (square != 0) & (moved > 0)
        norm = tl.sqrt_rn(tl.where(square > 0, square, 1.0))
        inverse = tl.div_rn(inverse, tl.maximum(norm, EPSILON))
        # below EPSILON the norm does not follow the row, so nothing is projected out
        along = tl.where(keep & (norm >= EPSILON), along * inverse * inverse, 0.0)
    for channel in range(0, WIDTH, CHANNELS):
        d = channel + tl.arange(0, CHANNELS)
        mask = keep[:, None] & (d < channels)[None, :]
        g = tl.load(d_rows + packed(image, length, r, d, WIDTH), mask=mask, other=0.0)
        if NORMALIZE:
            part = tl.load(x + strided(strides, r, d), mask=mask, other=0.0).to(tl.float32)
            g = (g - part * along[:, None]) * inverse[:, None]
        g = (g * factor).to(out.dtype.element_ty)
        inside = (r < length)[:, None] & (d < channels)[None, :]
        tl.store(out + strided(out_strides, r, d), g, mask=inside)
