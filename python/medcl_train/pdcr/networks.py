"""Networks of PDCR and UAFS from the settings: backbones, where blocks go and which maps are
contrasted, by the names of `named_modules()`."""

import torch
from torch import nn

import medcl_kernels as mk

from ..engine.config import ConfigError
from ..engine.optim import build_optimizer, build_schedule
from ..models import build_deeplab, build_segmenter, build_unet3d
from .config import PdcrConfig


def build_network(config: PdcrConfig, num_classes: int, device: torch.device) -> nn.Module:
    """The backbone, with UAFS blocks where the method has them. The weights of the backbone depend
    on the seed alone, so that all methods start from the same."""
    if config.spatial_dims == 3:
        network = build_unet3d(
            num_classes,
            widths=config.widths,
            dropout=config.dropout,
            deep_supervision=config.deep_supervision,
            seed=config.seed,
        )
    elif config.is_deeplab:
        network = build_deeplab(
            num_classes,
            width=config.width,
            middle_blocks=config.middle_blocks,
            rates=config.rates,
            seed=config.seed,
        )
    else:
        network = build_segmenter(
            num_classes,
            widths=config.widths,
            dropout=config.dropout,
            decoders=("transposed",),
            in_channels=3,
            seed=config.seed,
        )
    if config.uses_uafs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 200)
            _insert_uafs(config, network)
    return place(network, config, device)


def place(module: nn.Module, config: PdcrConfig, device: torch.device) -> nn.Module:
    """On the device, in the memory format of the settings."""
    if not config.channels_last:
        return module.to(device)
    flat = config.spatial_dims == 2
    layout = torch.channels_last if flat else torch.channels_last_3d
    return module.to(device).to(memory_format=layout)


def decoder_stages(network: nn.Module) -> tuple[str, ...]:
    """Names of a U-Net's decoder stages, deepest first."""
    name = "decoder" if hasattr(network, "decoder") else "decoders.0"
    return tuple(f"{name}.blocks.{i}" for i in range(len(network.get_submodule(name).blocks)))


def encoder_layers(config: PdcrConfig) -> tuple[str, ...]:
    """Names of the encoder maps that are contrasted."""
    if config.encoder_layers:
        return config.encoder_layers
    if config.is_deeplab:
        return ("encoder.conv2", "encoder.block1")
    first = 1 if config.spatial_dims == 2 else 2
    return tuple(f"encoder.blocks.{level}" for level in (first, first + 1))


def decoder_layers(config: PdcrConfig, network: nn.Module) -> tuple[str, ...]:
    """Names of the decoder maps that are contrasted."""
    if config.decoder_layers:
        return config.decoder_layers
    if config.is_deeplab:
        return ("decoders.0.low", "decoders.0.refine.2")  # behind the first of two convolutions
    return decoder_stages(network)[-3:-1]


def before_uafs(network: nn.Module, name: str) -> str:
    """Name of the module whose output enters the uncertainty block behind `name`; `name` itself
    where there is no block."""
    module = network.get_submodule(name)
    if not isinstance(module, nn.Sequential) or not hasattr(module, "uafs"):
        return name
    return f"{name}.{[child for child, _ in module.named_children()][-2]}"


def uafs_layers(config: PdcrConfig, network: nn.Module) -> dict[str, float]:
    """{name of a module that gets a block behind it: dropout of the block}."""
    if config.is_deeplab:  # the twelve documented places, with three dilations
        default = ("encoder", "decoder")
        branches = (f"decoders.0.branches.{i}" for i in range(len(config.rates) + 1))
        places = {
            "encoder": tuple(f"encoder.conv{i}" for i in range(1, 6)),
            "aspp": (*branches, "decoders.0.pyramid"),
            "decoder": ("decoders.0.low", "decoders.0.joined"),
        }
    else:
        default = ("decoder",)
        levels = tuple(f"encoder.blocks.{i}" for i in range(len(config.widths)))
        places = {"encoder": levels, "decoder": decoder_stages(network)}
    parts = config.uafs_places or default
    names = config.uafs_layers or [name for part in parts for name in places[part]]
    dropout = config.uafs_dropout if config.spatial_dims == 2 else 0.0
    return {name: 0.0 if name.startswith("encoder.") else dropout for name in names}


def _insert_uafs(config: PdcrConfig, network: nn.Module) -> None:
    for name, dropout in uafs_layers(config, network).items():
        layers = {name: _joined_channels(network, name)} if _is_identity(network, name) else [name]
        try:
            mk.insert_uafs(
                network,
                layers,
                hidden=config.uafs_hidden,
                num_logits=config.uafs_logits,
                kernel_size=config.uafs_kernel,
                dropout=dropout,
                spatial_dims=config.spatial_dims,
                impl=config.impl,
            )
        except ValueError as error:
            raise ConfigError(f"uafs_layers: {error}") from error


def _is_identity(network: nn.Module, name: str) -> bool:
    return isinstance(dict(network.named_modules()).get(name), nn.Identity)


def _joined_channels(network: nn.Module, name: str) -> int:
    """Channels of DeepLab's two concatenations: those that the next convolution expects."""
    following = {"pyramid": "project.0", "joined": "refine.0"}
    parent, _, last = name.rpartition(".")
    if last not in following:
        raise ConfigError(f"uafs_layers: {name} is no layer with channels")
    return network.get_submodule(f"{parent}.{following[last]}").in_channels


def build_training(config: PdcrConfig, modules: list[nn.Module]):
    """(optimiser, schedule) over the parameters of the modules."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = build_optimizer(
        parameters, config.optimizer, lr=config.base_lr, weight_decay=config.weight_decay
    )
    return optimizer, build_schedule(optimizer, config.schedule, config.max_iterations)
