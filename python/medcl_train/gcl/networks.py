"""Networks and optimisers of GCL from its settings."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

import medcl_kernels as mk

from ..engine.checkpoint import CheckpointError, load_checkpoint
from ..engine.config import config_from_dict
from ..engine.optim import build_optimizer, build_schedule
from ..models import (
    TransposedDecoder,
    TwinSegmenter,
    UNetEncoder,
    build_segmenter,
    pooled_head,
)
from .config import GclConfig


class Projections(NamedTuple):
    """Of V images: the map whose pixels are contrasted (V, C, h, w), their projections
    (V, D, h, w), projections of the images (V, D); projections are float32 and not normalised."""

    maps: Tensor
    pixels: Tensor
    images: Tensor


class ContrastNetwork(nn.Module):
    """Shared encoder, image head and pixel head (specs/gcl.md, V2), and a decoder if the pixel
    head reads one of its maps.

    Args:
        decoder_level: level of the decoder's map; None: the deepest map of the encoder.
        grid: side of the grid to which that map is averaged; None: as it is.
    """

    def __init__(
        self,
        encoder: UNetEncoder,
        image_head: nn.Module,
        pixel_head: nn.Module,
        decoder: TransposedDecoder | None = None,
        decoder_level: int | None = None,
        grid: int | None = None,
    ):
        super().__init__()
        self.encoder, self.image_head, self.pixel_head = encoder, image_head, pixel_head
        self.decoder, self.decoder_level, self.grid = decoder, decoder_level, grid

    def forward(self, images: Tensor) -> Projections:
        maps = self.encoder(images)
        x = deepest = maps[-1]
        if self.decoder is not None:
            steps = len(maps) - 1 - self.decoder_level
            for up, block, skip in zip(
                self.decoder.up[:steps], self.decoder.blocks[:steps], maps[-2::-1], strict=False
            ):
                x = block(torch.cat([skip, up(x)], dim=1))
        if self.grid is not None:
            x = adaptive_avg_pool2d(x, self.grid)
        return Projections(x, self.pixel_head(x).float(), self.image_head(deepest).float())

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """What both branches, or all perspectives of one, have in common: the encoder's, and the
        decoder's."""
        decoder = [] if self.decoder is None else self._used_decoder()
        return [*self.encoder.parameters(), *decoder]

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.image_head.parameters(), *self.pixel_head.parameters()]

    def _used_decoder(self) -> list[nn.Parameter]:
        steps = len(self.encoder.blocks) - 1 - self.decoder_level
        parts = [*self.decoder.up[:steps], *self.decoder.blocks[:steps]]
        return [p for part in parts for p in part.parameters()]


class ImageEmbedding(nn.Module):
    """Encoder and image head alone: images (V, 1, H, W) to (V, D)."""

    def __init__(self, network: ContrastNetwork):
        super().__init__()
        self.encoder, self.image_head = network.encoder, network.image_head

    def forward(self, images: Tensor) -> Tensor:
        return self.image_head(self.encoder(images)[-1])


def build_network(config: GclConfig, num_classes: int, device: torch.device) -> TwinSegmenter:
    """The U-Net of fine-tuning: encoder and one decoder."""
    network = build_segmenter(
        num_classes,
        widths=config.widths,
        dropout=config.dropout,
        decoders=config.decoders,
        seed=config.seed,
    )
    return _place(network, config, device)


def build_contrast(config: GclConfig, num_classes: int, device: torch.device) -> ContrastNetwork:
    """The network of pre-training. Encoder and decoder start as those of `build_network` of the
    same seed do."""
    start = build_network(config, num_classes, torch.device("cpu"))
    decoder, level, channels = None, None, config.widths[-1]
    if config.pixel_level == "decoder":
        decoder, level = start.decoders[0], config.strides.index(config.decoder_stride)
        channels = config.widths[level]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 100)
        image_head = pooled_head(config.widths[-1], config.image_dim)
        pixel_head = mk.DenseProjectionHead(channels, config.pixel_dim, hidden_channels=channels)
    grid = config.pixel_grid
    network = ContrastNetwork(start.encoder, image_head, pixel_head, decoder, level, grid)
    return _place(network, config, device)


def pretraining_optimizer(config: GclConfig, network: ContrastNetwork):
    """(optimiser, schedule) of stage 1."""
    optimizer = build_optimizer(
        [*network.shared_parameters, *network.head_parameters],
        config.pretrain_optimizer,
        lr=config.pretrain_lr,
        weight_decay=config.pretrain_weight_decay,
    )
    return optimizer, build_schedule(
        optimizer, config.pretrain_schedule, config.pretrain_iterations
    )


def finetuning_optimizer(config: GclConfig, network: TwinSegmenter):
    """(optimiser, schedule) of stage 2; the encoder may learn at another rate than the decoder."""
    groups = [
        {"params": network.encoder.parameters(), "lr": config.base_lr * config.encoder_lr_scale},
        {"params": network.decoders.parameters()},
    ]
    optimizer = build_optimizer(
        groups, config.optimizer, lr=config.base_lr, weight_decay=config.weight_decay
    )
    return optimizer, build_schedule(optimizer, config.schedule, config.max_iterations)


def take_weights(network: TwinSegmenter, pretrained: dict[str, Tensor]) -> None:
    """Encoder (and decoder, where it was pre-trained) from the state of a ContrastNetwork."""
    parts = {"encoder.": network.encoder, "decoder.": network.decoders[0]}
    for prefix, module in parts.items():
        state = {k.removeprefix(prefix): v for k, v in pretrained.items() if k.startswith(prefix)}
        if state:
            module.load_state_dict(state)


def load_pretrained(config: GclConfig, network: TwinSegmenter) -> None:
    """Weights of another run's checkpoints/pretrain.pt (`--pretrained`).

    Raises: CheckpointError when the file is damaged, holds no pre-training of GCL, or another
        architecture.
    """
    state = load_checkpoint(config.pretrained)
    if "network" not in state["modules"]:
        raise CheckpointError(
            f"{config.pretrained} holds no pre-training of GCL; give checkpoints/pretrain.pt of a "
            "run of train_gcl.py"
        )
    saved = config_from_dict(GclConfig, state["config"], source=str(config.pretrained))
    if saved.widths != config.widths:
        raise CheckpointError(
            f"{config.pretrained} has widths {saved.widths}, this run {config.widths}"
        )
    take_weights(network, state["modules"]["network"])


def _place(module, config: GclConfig, device):
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return module.to(device=device, memory_format=memory_format)
