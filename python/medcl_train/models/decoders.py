"""Segmentation heads that are no U-Net decoders, for a second branch that differs more: a feature
pyramid and DeepLab's atrous pooling. Same interface as the decoders of `unet`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unet import CONVOLUTIONS, LINEAR_MODES, NORMS, ConvBlock, check_dims


def _conv_norm(in_channels: int, out_channels: int, spatial_dims: int, *, dilation: int = 0):
    """1x1 convolution, or 3x3 with this dilation; BatchNorm; LeakyReLU."""
    kernel, padding = (3, dilation) if dilation else (1, 0)
    convolution = CONVOLUTIONS[spatial_dims](
        in_channels, out_channels, kernel, padding=padding, dilation=max(dilation, 1), bias=False
    )
    return nn.Sequential(convolution, NORMS[spatial_dims](out_channels), nn.LeakyReLU(inplace=True))


class FPNDecoder(nn.Module):
    """Feature pyramid (arXiv 1612.03144, for segmentation 1901.02446): 1x1 lateral convolutions,
    sums from the top down, a 3x3 convolution per level, all levels added at the finest one.

    Args:
        widths: channels of the encoder's maps, finest first; the pyramid has widths[1].
        num_classes: classes with background. spatial_dims: 2 or 3.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, *, spatial_dims: int = 2):
        super().__init__()
        check_dims(spatial_dims)
        channels, conv = widths[1], CONVOLUTIONS[spatial_dims]
        self.mode = LINEAR_MODES[spatial_dims]
        self.lateral = nn.ModuleList(conv(width, channels, 1) for width in widths)
        self.smooth = nn.ModuleList(
            _conv_norm(channels, channels, spatial_dims, dilation=1) for _ in widths
        )
        self.head = conv(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, *spatial) from the encoder's list of maps."""
        pyramid = [lateral(features) for lateral, features in zip(self.lateral, maps, strict=True)]
        for level in range(len(maps) - 2, -1, -1):
            pyramid[level] = pyramid[level] + _resize(pyramid[level + 1], maps[level], self.mode)
        levels = [smooth(p) for smooth, p in zip(self.smooth, pyramid, strict=True)]
        return self.head(sum(_resize(level, maps[0], self.mode) for level in levels))


class DeepLabDecoder(nn.Module):
    """DeepLabv3+ (arXiv 1802.02611): atrous convolutions and the image's mean on the deepest map,
    joined with the stride-4 map, then fixed linear interpolation.

    Submodules that other code names: branches.0-3 (the convolutions), pyramid (all five side by
    side), low (projection of the low-level map), joined (what the two last convolutions see),
    refine.

    Args:
        widths: channels of the encoder's maps, finest first.
        num_classes: classes with background. spatial_dims: 2 or 3.
        rates: dilations; DeepLab's 6, 12, 18 are wider than the 14x14 cells of a slice.
        channels: of pyramid and decoder; None: a quarter of the deepest map's, at least widths[1].
        low_level: which map is the low-level one; None: that of stride 4 of an encoder that starts
            at stride 1.
        low_channels: of its projection; None: those of the map.
        scale: image size over that of the first map.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        spatial_dims: int = 2,
        rates: Sequence[int] = (2, 4, 6),
        channels: int | None = None,
        low_level: int | None = None,
        low_channels: int | None = None,
        scale: int = 1,
    ):
        super().__init__()
        check_dims(spatial_dims)
        conv, deepest = CONVOLUTIONS[spatial_dims], widths[-1]
        channels = channels or max(widths[1], deepest // 4)
        self.mode, self.scale = LINEAR_MODES[spatial_dims], scale
        self.low_level = min(2, len(widths) - 2) if low_level is None else low_level
        low = low_channels or widths[self.low_level]
        self.branches = nn.ModuleList(
            [_conv_norm(deepest, channels, spatial_dims)]
            + [_conv_norm(deepest, channels, spatial_dims, dilation=rate) for rate in rates]
        )
        # no BatchNorm here: a batch of one image has one value per channel
        self.image = nn.Sequential(conv(deepest, channels, 1), nn.LeakyReLU())
        self.pyramid = nn.Identity()
        self.project = _conv_norm(channels * (len(rates) + 2), channels, spatial_dims)
        self.low = _conv_norm(widths[self.low_level], low, spatial_dims)
        self.joined = nn.Identity()
        self.refine = ConvBlock(channels + low, channels, spatial_dims=spatial_dims)
        self.head = conv(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, *spatial) from the encoder's list of maps."""
        deep, low = maps[-1], maps[self.low_level]
        mean = self.image(deep.mean(tuple(range(2, deep.dim())), keepdim=True))
        parts = [branch(deep) for branch in self.branches] + [mean.expand(-1, -1, *deep.shape[2:])]
        x = _resize(self.project(self.pyramid(torch.cat(parts, dim=1))), low, self.mode)
        x = self.refine(self.joined(torch.cat([x, self.low(low)], dim=1)))
        return _resize(self.head(x), maps[0], self.mode, self.scale)


def _resize(x: Tensor, like: Tensor, mode: str, scale: int = 1) -> Tensor:
    """Linear interpolation to `scale` times the spatial size of another map."""
    size = [scale * length for length in like.shape[2:]]
    if list(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode=mode, align_corners=False)
