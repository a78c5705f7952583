"""3-D U-Net in the manner of nnU-Net: instance normalisation, strided convolutions, and a
segmentation head behind each decoder stage for deep supervision (specs/pdcr.md §2, §3)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Step = int | Sequence[int]
_SLOPE = 0.01  # of nnU-Net's LeakyReLU


class UNet3d(nn.Module):
    """Two (convolution - InstanceNorm - LeakyReLU) per level, the first of them strided, and
    transposed convolutions upwards.

    Named modules: `encoder.blocks.L` gives the map of level L; `decoder.blocks.I` is decoder stage
    I, the deepest first, and `decoder.heads.I` its head. The deepest stage has no head (unless it
    is the only one): nnU-Net's loss gives it weight 0.

    Args:
        in_channels: of the image. num_classes: K, background counted.
        widths: channels per level, finest first.
        dropout: probability per level, between the two convolutions; None: nowhere.
        deep_supervision: heads behind all these stages instead of the finest only.
        strides: step from each level to the next, one number or one per axis; 1 leaves an axis
            alone. A single number stands for all levels.
        kernels: kernel size per level, likewise; (1, 3, 3) suits levels of thick slices.

    Raises: ValueError when the numbers of levels differ.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        dropout: Sequence[float] | None = None,
        *,
        deep_supervision: bool = True,
        strides: Sequence[Step] | int = 2,
        kernels: Sequence[Step] | int = 3,
    ):
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"a U-Net needs at least two levels, got widths={tuple(widths)}")
        dropout = (0.0,) * len(widths) if dropout is None else tuple(dropout)
        if len(dropout) != len(widths):
            raise ValueError(
                f"one dropout per level: {len(widths)} widths but {len(dropout)} dropouts"
            )
        steps = _per_level("strides", strides, len(widths) - 1)
        sizes = _per_level("kernels", kernels, len(widths))
        self.num_classes = num_classes
        self.stride = tuple(int(n) for n in torch.tensor(steps).prod(0))
        self.encoder = _Encoder(in_channels, widths, dropout, sizes, steps)
        self.decoder = _Decoder(widths, num_classes, sizes, steps, deep_supervision)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Logits (B, K, *spatial) per head, the finest, of the image's size, first; without deep
        supervision, and always in eval mode, that one alone. image: (B, in_channels, *spatial).

        Raises: ValueError when a size is no multiple of `stride`, the stride of the deepest level,
            or this level has one cell only, which cannot be normalised.
        """
        size = tuple(image.shape[2:])
        if any(length % step for length, step in zip(size, self.stride, strict=True)):
            raise ValueError(
                f"an image of {size} voxels does not divide by {self.stride}, the stride of the "
                "deepest level: pad it, or choose another patch size"
            )
        if size == self.stride:
            raise ValueError(
                f"an image of {size} voxels leaves a single cell to the deepest level, which "
                "cannot be normalised: use a larger patch or fewer levels"
            )
        return self.decoder(self.encoder(image))

    def probabilities(self, image: Tensor, head: str = "d1") -> Tensor:
        """Softmax map (B, K, *spatial) of the finest head; "d1" is the only decoder."""
        if head != "d1":
            raise ValueError(f"head {head!r} is not there: a UNet3d has one decoder, 'd1'")
        return torch.softmax(self(image)[0].float(), dim=1)


class _Encoder(nn.Module):
    def __init__(self, in_channels, widths, dropout, sizes, steps):
        super().__init__()
        channels = (in_channels, *widths)
        self.blocks = nn.ModuleList(
            _block(*settings)
            for settings in zip(channels, widths, sizes, [(1, 1, 1), *steps], dropout, strict=False)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps of all levels, finest first."""
        maps = [image]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]


class _Decoder(nn.Module):
    def __init__(self, widths, num_classes, sizes, steps, deep_supervision):
        super().__init__()
        stages = len(steps)
        levels = range(stages - 1, -1, -1)  # stage i gives the map of levels[i]
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(widths[n + 1], widths[n], steps[n], stride=steps[n], bias=False)
            for n in levels
        )
        self.blocks = nn.ModuleList(
            _block(2 * widths[n], widths[n], sizes[n], (1, 1, 1), 0.0) for n in levels
        )
        first = min(1, stages - 1) if deep_supervision else stages - 1
        self.heads = nn.ModuleDict(
            {str(i): nn.Conv3d(widths[levels[i]], num_classes, 1) for i in range(first, stages)}
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits of the heads, finest first."""
        x, logits = maps[-1], []
        last = len(self.blocks) - 1
        for i, (up, block, skip) in enumerate(zip(self.up, self.blocks, maps[-2::-1], strict=True)):
            x = block(torch.cat([skip, up(x)], dim=1))
            if i == last or (self.training and str(i) in self.heads):
                logits.append(self.heads[str(i)](x))
        return logits[::-1]


def _block(in_channels, out_channels, size, step, dropout) -> nn.Sequential:
    padding = tuple(length // 2 for length in size)
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, size, stride=step, padding=padding),
        nn.InstanceNorm3d(out_channels, affine=True),
        nn.LeakyReLU(_SLOPE, inplace=True),
        nn.Dropout(dropout) if dropout > 0 else nn.Identity(),
        nn.Conv3d(out_channels, out_channels, size, padding=padding),
        nn.InstanceNorm3d(out_channels, affine=True),
        nn.LeakyReLU(_SLOPE, inplace=True),
    )


def _per_level(name: str, values: Sequence[Step] | int, levels: int) -> list[tuple[int, ...]]:
    entries = [values] * levels if isinstance(values, int) else list(values)
    if len(entries) != levels:
        raise ValueError(f"{name} must be one number or {levels} entries, got {values!r}")
    return [(n, n, n) if isinstance(n, int) else tuple(n) for n in entries]


def build_unet3d(num_classes: int, *, seed: int = 0, in_channels: int = 1, **options) -> UNet3d:
    """A UNet3d (`options` as there) with He-normal convolutions and zero biases as in nnU-Net,
    drawn from the seed; the global random state is left untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet3d(in_channels, num_classes, **options)
        for module in network.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return network


def deep_supervision_loss(
    outputs: Sequence[Tensor],
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Weighted sum of a loss over heads of several resolutions.

    Args:
        outputs: logits (B, K, *spatial / step) per head, finest first; steps are whole numbers.
        labels: (B, *spatial) integers. A head sees every step-th of them, the voxels on which the
            cells of a strided convolution are centred.
        loss: of (logits, labels).
        weights: one per head; None: 1, 1/2, 1/4, ..., divided by their sum.

    Raises: ValueError when a head's grid does not divide the labels, or the weights are not one per
        head.
    """
    if weights is None:
        total = 2 - 2.0 ** (1 - len(outputs))
        weights = [2.0**-s / total for s in range(len(outputs))]
    if len(weights) != len(outputs):
        raise ValueError(f"weights must be one per head ({len(outputs)}), got {len(weights)}")
    terms = []
    for logits, weight in zip(outputs, weights, strict=True):
        grid = zip(labels.shape[1:], logits.shape[2:], strict=True)
        steps = [max(1, full // own) for full, own in grid]
        seen = labels[(slice(None), *(slice(None, None, step) for step in steps))]
        if seen.shape[1:] != logits.shape[2:]:
            raise ValueError(
                f"logits of {tuple(logits.shape[2:])} do not fit labels of "
                f"{tuple(labels.shape[1:])}: sizes must be multiples of the strides"
            )
        if weight:
            terms.append(weight * loss(logits, seen))
    return torch.stack(terms).sum()
