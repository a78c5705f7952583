"""What a network computes at named modules: outputs, where their cells look in the input, and the
uncertainty of UAFS blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import medcl_kernels as mk

from ..engine.config import ConfigError
from .config import PdcrConfig


class Taps:
    """Outputs of named modules while a network runs: `with Taps(network, names) as taps: ...`,
    then `taps.features[name]`."""

    def __init__(self, network: nn.Module, names: Sequence[str]):
        self.network, self.names = network, tuple(dict.fromkeys(names))
        self.features: dict[str, Tensor] = {}
        self._handles: list = []

    def __enter__(self) -> "Taps":
        for name in self.names:

            def keep(module, inputs, output, name=name):
                self.features[name] = output

            self._handles.append(self.network.get_submodule(name).register_forward_hook(keep))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def probe(network: nn.Module, names: Sequence[str], config: PdcrConfig) -> dict[str, Tensor]:
    """The maps of one empty image of the training size. Raises ConfigError for unknown names."""
    check_names(network, names)
    parameter = next(network.parameters())
    image = torch.zeros(1, config.in_channels, *config.input_size, device=parameter.device)
    training = network.training
    network.eval()
    with torch.no_grad(), Taps(network, names) as taps:
        network(image)
    network.train(training)
    return taps.features


def check_names(network: nn.Module, names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is no module of the network."""
    known = dict(network.named_modules())
    for name in names:
        if name not in known:
            listed = ", ".join(filter(None, known))
            raise ConfigError(f"no layer {name!r} in the network, which has {listed}")


def measured_fields(
    network: nn.Module, names: Sequence[str], maps: Mapping[str, Tensor], config: PdcrConfig
) -> dict[str, Any]:
    """Receptive field, stride and offset of every layer. A decoder map sees the whole image through
    the deepest map; measured is its reach through the skip connection of its own stride."""
    groups: dict[int | None, list[str]] = {}
    for name in names:
        stride = config.input_size[-1] // maps[name].shape[-1]
        groups.setdefault(None if name.startswith("encoder.") else stride, []).append(name)
    fields = {}
    for stride, group in groups.items():
        path = _SkipPath(network, stride)
        prefixed = [f"network.{name}" for name in group]
        found = _measure(path, prefixed, config)
        fields |= {name: found[key] for name, key in zip(group, prefixed, strict=True)}
    return fields


def _measure(path: nn.Module, names: Sequence[str], config: PdcrConfig) -> dict[str, Any]:
    """On an input that is doubled until the receptive fields fit inside."""
    step, first = config.deepest_stride, 64 if config.spatial_dims == 2 else 48
    sizes = [-(-first * 2**i // step) * step for i in range(4)]
    for size in sizes:
        try:
            shape = (1, config.in_channels, *(size,) * config.spatial_dims)
            return mk.receptive_fields(path, names, shape)
        except ValueError as error:
            if size == sizes[-1]:
                raise ConfigError(str(error)) from error
    raise AssertionError


class _SkipPath(nn.Module):
    """Encoder alone, or a network in which only the map of one stride reaches the decoder."""

    def __init__(self, network: nn.Module, stride: int | None):
        super().__init__()
        self.network, self.stride = network, stride

    def forward(self, image: Tensor) -> Any:
        maps = self.network.encoder(image)
        if self.stride is None:
            return maps
        decoder = getattr(self.network, "decoder", None) or self.network.decoders[0]
        size = image.shape[-1]
        return decoder([m if size // m.shape[-1] == self.stride else m * 0 for m in maps])


def uncertainty_maps(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """U in [0, 1], (B, *spatial), of every UAFS block, by the name of the layer it follows."""
    blocks = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, mk.UncertaintyFeatureSelection)
    }
    found: dict[str, Tensor] = {}
    handles = []
    for name, block in blocks.items():

        def keep(module, inputs, name=name):
            found[name.removesuffix(".uafs")] = module.uncertainty(inputs[0])

        handles.append(block.register_forward_pre_hook(keep))
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
        network.train(training)
    return found
