"""A modified aligned Xception (arXiv 1802.02611, figure 4) of any width, and DeepLabv3+ on it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .decoders import DeepLabDecoder
from .segmenter import TwinSegmenter

# conv1, conv2, block1 to block3, exit block, conv3 to conv5, for a width of 32
_CHANNELS = (32, 64, 128, 256, 728, 1024, 1536, 1536, 2048)
OUTPUT_STRIDE = 16


def _separable(in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1):
    """3x3 per channel, 1x1 across channels, each with BatchNorm; no activation."""
    return nn.Sequential(
        nn.Conv2d(
            in_channels, in_channels, 3, stride, dilation, dilation, groups=in_channels, bias=False
        ),
        nn.BatchNorm2d(in_channels),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _dense(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    """ReLU of three separable convolutions, the last one with the stride, plus a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            _separable(in_channels, out_channels, dilation=dilation),
            nn.ReLU(inplace=True),
            _separable(out_channels, out_channels, dilation=dilation),
            nn.ReLU(inplace=True),
            _separable(out_channels, out_channels, stride=stride, dilation=dilation),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class XceptionEncoder(nn.Module):
    """Maps of stride 2 (conv2), 4 (block1), 8 (block2) and 16 (conv5).

    Submodules that other code names: conv1, conv2, block1, block2, block3, middle, exit, conv3,
    conv4, conv5. Every map is behind a ReLU, every strided convolution has kernel 3 and padding 1.

    Args:
        in_channels: of the image.
        width: channels of the first convolution; 32 is the published network.
        middle_blocks: of the middle flow; 16 is published.
    """

    def __init__(self, in_channels: int = 3, width: int = 32, middle_blocks: int = 16):
        super().__init__()
        c = [max(1, round(channels * width / 32)) for channels in _CHANNELS]
        self.conv1 = _dense(in_channels, c[0], stride=2)
        self.conv2 = _dense(c[0], c[1])
        self.block1 = _Residual(c[1], c[2], stride=2)
        self.block2 = _Residual(c[2], c[3], stride=2)
        self.block3 = _Residual(c[3], c[4], stride=2)
        self.middle = nn.Sequential(*(_Residual(c[4], c[4]) for _ in range(middle_blocks)))
        self.exit = _Residual(c[4], c[5], dilation=2)
        self.conv3, self.conv4, self.conv5 = (
            nn.Sequential(_separable(c[i], c[i + 1], dilation=2), nn.ReLU(inplace=True))
            for i in (5, 6, 7)
        )
        self.widths = (c[1], c[2], c[3], c[8])

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the maps against the image."""
        return (2, 4, 8, OUTPUT_STRIDE)

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B, in_channels, H, W), H and W divisible by 16."""
        x2 = self.conv2(self.conv1(image))
        x3 = self.block1(x2)
        x4 = self.block2(x3)
        deep = self.exit(self.middle(self.block3(x4)))
        return [x2, x3, x4, self.conv5(self.conv4(self.conv3(deep)))]


def build_deeplab(
    num_classes: int,
    *,
    width: int = 32,
    middle_blocks: int = 16,
    rates: Sequence[int] = (6, 12, 18),
    in_channels: int = 3,
    seed: int = 0,
) -> TwinSegmenter:
    """DeepLabv3+ with output stride 16; pyramid and decoder have 256 channels for a width of 32,
    the low-level projection 48. The global random state is left untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = XceptionEncoder(in_channels, width, middle_blocks)
        decoder = DeepLabDecoder(
            encoder.widths,
            num_classes,
            rates=rates,
            channels=8 * width,
            low_level=1,
            low_channels=max(1, round(1.5 * width)),
            scale=encoder.strides[0],
        )
    return TwinSegmenter(encoder, [decoder], num_classes)
