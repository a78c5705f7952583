"""Networks and optimisers of IDEAL from its settings."""

from collections.abc import Callable

import torch
from torch import Tensor

import medcl_kernels as mk

from ..engine.checkpoint import CheckpointError, load_checkpoint
from ..engine.config import ConfigError, config_from_dict
from ..engine.optim import build_optimizer, build_schedule
from ..models import QueryKeyPair, TwinSegmenter, UNetEncoder, build_segmenter
from .config import IdealConfig


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
    if config.feat_stride not in strides:
        raise ConfigError(
            f"feat_stride={config.feat_stride} is no level of this encoder; its strides are "
            f"{strides}"
        )
    channels = config.widths[strides.index(config.feat_stride)]
    pair = QueryKeyPair(
        lambda: seeded(lambda: UNetEncoder(1, config.widths, config.dropout)),
        lambda: seeded(
            lambda: mk.DenseProjectionHead(
                channels, config.projection_dim, hidden_channels=config.projection_hidden
            )
        ),
        stride=config.feat_stride,
        key=config.key,
    )
    return _place(pair, config, device)


def pretraining_optimizer(config: IdealConfig, pair: QueryKeyPair):
    """(optimiser, schedule) of stage 1."""
    optimizer = build_optimizer(
        pair.trained_parameters(),
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


def perturb_maps(strength: float) -> Callable[[list[Tensor]], list[Tensor]] | None:
    """Feature noise of CCT for D2: f * (1 + u), u ~ U(-strength, strength), one u for the batch.
    None for strength 0."""
    if strength == 0:
        return None

    def perturb(maps):
        return [f * (1 + torch.empty_like(f[:1]).uniform_(-strength, strength)) for f in maps]

    return perturb


def _place(module, config: IdealConfig, device):
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return module.to(device=device, memory_format=memory_format)
