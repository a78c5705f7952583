"""A U-Net in three parts: one encoder and two decoders that differ in how they upsample.

The shape of the encoder (two conv-BN-LeakyReLU per level, dropout that grows with depth,
max-pooling between levels) is the one common in semi-supervised cardiac segmentation
(specs/ideal.md §1.2). All parts work in 2-D and 3-D.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
LINEAR_MODES = {2: "bilinear", 3: "trilinear"}


def check_dims(spatial_dims: int) -> None:
    if spatial_dims not in CONVOLUTIONS:
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")


class ConvBlock(nn.Sequential):
    """Two (conv 3 - BatchNorm - LeakyReLU), element-wise dropout between them; (B, in, *sp) -> (B,
    out, *sp)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dropout: float = 0.0, spatial_dims: int = 2
    ):
        check_dims(spatial_dims)
        conv, norm = CONVOLUTIONS[spatial_dims], NORMS[spatial_dims]
        super().__init__(
            conv(in_channels, out_channels, 3, padding=1),
            norm(out_channels),
            nn.LeakyReLU(inplace=True),
            nn.Dropout(dropout) if dropout > 0 else nn.Identity(),
            conv(out_channels, out_channels, 3, padding=1),
            norm(out_channels),
            nn.LeakyReLU(inplace=True),
        )


class UNetEncoder(nn.Module):
    """Contracting path. `forward` returns one feature map per level: level l has stride 2**l and
    widths[l] channels.

    Args:
        in_channels: channels of the image (1 for MR and CT).
        widths: channels per level, finest first. len(widths) - 1 poolings.
        dropout: probability per level; shorter or longer sequences are an error.
        spatial_dims: 2 or 3.
    """

    def __init__(
        self,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
        *,
        spatial_dims: int = 2,
    ):
        super().__init__()
        check_dims(spatial_dims)
        if len(widths) < 2:
            raise ValueError(f"a U-Net needs at least two levels, got widths={tuple(widths)}")
        if len(dropout) != len(widths):
            raise ValueError(
                f"one dropout per level: {len(widths)} widths but {len(dropout)} dropouts"
            )
        self.widths, self.spatial_dims = tuple(widths), spatial_dims
        channels = (in_channels, *widths)
        self.blocks = nn.ModuleList(
            ConvBlock(c, w, dropout=p, spatial_dims=spatial_dims)
            for c, w, p in zip(channels, widths, dropout, strict=False)
        )
        self.pool = _POOL[spatial_dims](2)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level against the image, (1, 2, 4, ...)."""
        return tuple(2**level for level in range(len(self.widths)))

    def level_of(self, stride: int) -> int:
        """Level whose map has this stride; ValueError when the encoder has none."""
        if stride not in self.strides:
            raise ValueError(
                f"no encoder level has stride {stride}; levels have strides {self.strides}"
            )
        return self.strides.index(stride)

    def forward(self, image: Tensor, last_level: int | None = None) -> list[Tensor]:
        """Feature maps of levels 0..last_level (default: all); image (B, in_channels, *spatial)."""
        last = len(self.blocks) - 1 if last_level is None else last_level
        maps = [self.blocks[0](image)]
        for block in self.blocks[1 : last + 1]:
            maps.append(block(self.pool(maps[-1])))
        return maps


class _Decoder(nn.Module):
    """Expanding path over the encoder's maps; subclasses say how a map is upsampled."""

    def __init__(self, widths: Sequence[int], num_classes: int, *, spatial_dims: int = 2):
        super().__init__()
        check_dims(spatial_dims)
        self.spatial_dims = spatial_dims
        pairs = list(
            zip(widths[:0:-1], widths[-2::-1], strict=True)
        )  # (deep, shallow), deepest first
        self.up = nn.ModuleList(self._upsampler(deep, shallow) for deep, shallow in pairs)
        self.blocks = nn.ModuleList(
            ConvBlock(2 * shallow, shallow, spatial_dims=spatial_dims) for _, shallow in pairs
        )
        self.head = CONVOLUTIONS[spatial_dims](widths[0], num_classes, 1)

    def _upsampler(self, deep: int, shallow: int) -> nn.Module:
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, *spatial) from the encoder's list of maps."""
        x = maps[-1]
        for up, block, skip in zip(self.up, self.blocks, maps[-2::-1], strict=True):
            x = block(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


class TransposedDecoder(_Decoder):
    """D1: learnt upsampling by transposed convolution (kernel 2, stride 2)."""

    def _upsampler(self, deep: int, shallow: int) -> nn.Module:
        return _TRANSPOSED[self.spatial_dims](deep, shallow, 2, stride=2)


class BilinearDecoder(_Decoder):
    """D2: 1x1 convolution, then fixed linear interpolation."""

    def _upsampler(self, deep: int, shallow: int) -> nn.Module:
        return _ProjectThenInterpolate(deep, shallow, self.spatial_dims)


class _ProjectThenInterpolate(nn.Module):
    def __init__(self, deep: int, shallow: int, spatial_dims: int):
        super().__init__()
        self.project = CONVOLUTIONS[spatial_dims](deep, shallow, 1)
        self.mode = LINEAR_MODES[spatial_dims]

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution and interpolation commute; projecting first works on 4 (2-D) or 8 (3-D)
        # times fewer pixels.
        return F.interpolate(self.project(x), scale_factor=2, mode=self.mode, align_corners=False)
