"""Networks and optimisers of IDEAL from its settings."""

import torch

import medcl_kernels as mk

from ..engine.checkpoint import CheckpointError, load_checkpoint
from ..engine.config import ConfigError, config_from_dict
from ..engine.optim import build_optimizer, build_schedule
from ..models import (
    Projector,
    QueryKeyPair,
    TwinSegmenter,
    UNetEncoder,
    build_segmenter,
    pooled_head,
)
from .config import IdealConfig
from .contrast import ViewContrast


def build_network(config: IdealConfig, num_classes: int, device: torch.device) -> TwinSegmenter:
    """Shared encoder E with decoder D1, and D2 unless training is supervised."""
    network = build_segmenter(
        num_classes,
        widths=config.widths,
        dropout=config.dropout,
        decoders=config.decoders,
        seed=config.seed,
    )
    return _place(network, config, device)


def build_pair(config: IdealConfig, device: torch.device) -> QueryKeyPair:
    """E_Q, G_Q and E_K, G_K. E_Q starts as the encoder of `build_network` of the same seed does."""
    parts = iter(range(4))

    def seeded(make):
        # encoder q, head q (, encoder k, head k): each from its own seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 100 * next(parts))
            return make()

    strides = [2**level for level in range(len(config.widths))]
    if not set(config.strides) <= set(strides):
        raise ConfigError(
            f"feat_stride={config.feat_stride} is no level of this encoder; its strides are "
            f"{strides}"
        )
    channels = [config.widths[strides.index(stride)] for stride in config.strides]

    def projector():
        dense = [
            mk.DenseProjectionHead(
                width,
                config.projection_dim,
                hidden_channels=config.projection_hidden,
                batch_norm=config.projection_norm,
            )
            for width in channels
        ]
        whole = pooled_head(channels[-1], config.projection_dim) if config.uses_global else None
        return Projector(dense, whole)

    pair = QueryKeyPair(
        lambda: seeded(lambda: UNetEncoder(1, config.widths, config.dropout)),
        lambda: seeded(projector),
        strides=config.strides,
        key=config.key,
    )
    return _place(pair, config, device)


def pretraining_optimizer(config: IdealConfig, pair: QueryKeyPair, contrast: ViewContrast):
    """(optimiser, schedule) of stage 1; a learnt temperature is not decayed."""
    groups = [
        {"params": pair.trained_parameters()},
        {"params": list(contrast.parameters()), "weight_decay": 0.0},
    ]
    optimizer = build_optimizer(
        [group for group in groups if group["params"]],
        config.pretrain_optimizer,
        lr=config.pretrain_lr,
        weight_decay=config.pretrain_weight_decay,
    )
    return optimizer, build_schedule(
        optimizer, config.pretrain_schedule, config.pretrain_iterations
    )


def finetuning_optimizer(config: IdealConfig, network: TwinSegmenter):
    """(optimiser, schedule) of stage 2; the encoder may learn at another rate than the decoders."""
    groups = [
        {"params": network.encoder.parameters(), "lr": config.base_lr * config.encoder_lr_scale},
        {"params": network.decoders.parameters()},
    ]
    optimizer = build_optimizer(
        groups, config.optimizer, lr=config.base_lr, weight_decay=config.weight_decay
    )
    return optimizer, build_schedule(optimizer, config.schedule, config.max_iterations)


def load_pretrained(config: IdealConfig, network: TwinSegmenter) -> None:
    """Load the encoder of another run's checkpoints/pretrain.pt (`--pretrained`).

    Raises: CheckpointError when the file is damaged, holds no pre-training, or another
        architecture.
    """
    state = load_checkpoint(config.pretrained)
    if "pair" not in state["modules"]:
        raise CheckpointError(
            f"{config.pretrained} holds no pre-training; give checkpoints/pretrain.pt of a run"
        )
    saved = config_from_dict(IdealConfig, state["config"], source=str(config.pretrained))
    if saved.widths != config.widths:
        raise CheckpointError(
            f"{config.pretrained} has widths {saved.widths}, this run {config.widths}"
        )
    prefix = f"encoder_{config.init_from}."
    weights = {
        k.removeprefix(prefix): v
        for k, v in state["modules"]["pair"].items()
        if k.startswith(prefix)
    }
    network.encoder.load_state_dict(weights)


def _place(module, config: IdealConfig, device):
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return module.to(device=device, memory_format=memory_format)
