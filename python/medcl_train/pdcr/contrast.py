"""PDCR on a network: which maps are tapped, where their cells look, and the loss on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import medcl_kernels as mk

from ..engine.config import ConfigError
from .config import PdcrConfig
from .networks import before_uafs, decoder_layers, encoder_layers, place

_DECODER_SAMPLES = (32, 8)


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


class Contrast(nn.Module):
    """`mk.PatchDragsawLoss` on the layers that the settings name. Its adapters of the term across
    layers are trained with the network.

    Attributes:
        taps: names of the modules whose outputs `forward` needs.
        names, cross_names: layers compared with themselves, and across.

    Raises: ConfigError for an unknown layer, and where a window or a number of samples does not fit
        the size of the input.
    """

    def __init__(self, config: PdcrConfig, network: nn.Module, num_classes: int):
        super().__init__()
        terms, flat = config.contrast_terms, config.spatial_dims == 2
        encoder = encoder_layers(config) if "encoder" in terms else ()
        decoder = decoder_layers(config, network) if "decoder" in terms else ()
        cross = ()
        if "cross" in terms:
            cross = config.cross_layers or encoder_layers(config)
            _check_names(network, cross)
            if config.cross_before_uafs:
                cross = tuple(before_uafs(network, name) for name in cross)
        self.encoder_names, self.decoder_names, self.cross_names = encoder, decoder, cross
        self.names = (*encoder, *decoder)
        self.taps = tuple(dict.fromkeys((*self.names, *cross)))
        maps = probe(network, self.taps, config)
        fields = measured_fields(network, self.taps, maps, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 300)
            self.loss = _named_errors(
                lambda: mk.PatchDragsawLoss(
                    _within(config, encoder, decoder, fields),
                    num_classes=num_classes,
                    sizes=_sizes(config),
                    cross=_across(config, cross, fields, maps),
                    cross_channels=config.cross_channels or (32 if flat else 128),
                    cross_weight=config.cross_weight,
                    spatial_dims=config.spatial_dims,
                    temperature=config.temperature or (1.0 if flat else 0.5),
                    sampler="stride" if config.sampler == "stride" else "even",
                    average=config.average,
                    size_weights=config.size_weights or None,
                    form=config.form,
                    shift=config.shift,
                    reduction=config.reduction,
                    compat=None if config.compat == "none" else config.compat,
                    impl=config.impl,
                )
            )
        device = next(network.parameters()).device
        place(self, config, device)
        labels = torch.zeros(1, *config.input_size, dtype=torch.int64, device=device)
        self.eval()  # one image has no variance for the adapters' normalisation
        with torch.no_grad():
            _named_errors(lambda: self(maps, labels))
        self.train()

    def forward(self, features: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """{"loss_pdcr": weighted total, "loss_encoder", "loss_decoder", "loss_cross": means of the
        terms, without weights}.

        Args:
            features: (B, C, *spatial) of `taps`. labels: (B, *spatial) at input size.
        """
        terms = self.loss.terms({name: x.float() for name, x in features.items()}, labels)
        groups = {
            "loss_encoder": self.encoder_names,
            "loss_decoder": self.decoder_names,
            "loss_cross": [name for name in terms if name not in self.names],
        }
        logged = {
            group: torch.stack([terms[name] for name in names]).mean()
            for group, names in groups.items()
            if names
        }
        return {"loss_pdcr": self.loss.total(terms), **logged}

    def sampled(
        self, name: str, features: Mapping[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the loss compares of a layer: features (B, C, N), class shares (P, B, K, N) of the
        windows around the cells, positions of the cells in input pixels (N, dims)."""
        return self.loss.sampled(name, features[name].float(), labels)


def probe(network: nn.Module, names: Sequence[str], config: PdcrConfig) -> dict[str, Tensor]:
    """The maps of one empty image of the training size. Raises ConfigError for unknown names."""
    _check_names(network, names)
    parameter = next(network.parameters())
    image = torch.zeros(1, config.in_channels, *config.input_size, device=parameter.device)
    training = network.training
    network.eval()
    with torch.no_grad(), Taps(network, names) as taps:
        network(image)
    network.train(training)
    return taps.features


def _check_names(network: nn.Module, names: Sequence[str]) -> None:
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


def _within(config, encoder, decoder, fields) -> dict[str, mk.PatchLayer]:
    flat = config.spatial_dims == 2
    samples = config.encoder_samples or ((64, 32) if flat else (64,))
    weights = config.encoder_weights or (0.1 if flat else 0.01,)
    own = {
        "encoder": (encoder, samples, weights),
        "decoder": (
            decoder,
            config.decoder_samples or _DECODER_SAMPLES,
            config.decoder_weights or (0.01,),
        ),
    }
    layers = {}
    for names, counts, factors in own.values():
        for i, name in enumerate(names):
            layers[name] = mk.PatchLayer.of(
                fields[name],
                weight=factors[min(i, len(factors) - 1)],
                border=config.border,
                **_cells(config, i, counts[min(i, len(counts) - 1)]),
            )
    return layers


def _across(config, names, fields, maps) -> dict[str, mk.CrossLayer]:
    flat = config.spatial_dims == 2
    target = (16 if flat else 0) if config.cross_stride is None else config.cross_stride
    samples = config.cross_samples or (32 if flat else 64)
    layers = {}
    for i, name in enumerate(names):
        stride = max(fields[name].stride)
        kernel = max(1, target // stride)
        layers[name] = mk.CrossLayer.of(
            fields[name],
            channels=maps[name].shape[1],
            kernel=kernel,
            **_cells(config, i, samples),
        )
    return layers


def _cells(config: PdcrConfig, place: int, samples: int) -> dict[str, int]:
    """Which cells of the layer at a place of its list are taken."""
    if config.sampler == "dense":
        return {}
    if config.sampler == "regular":
        return {"step": config.encoder_steps[min(place, len(config.encoder_steps) - 1)]}
    return {"samples": samples}


def _sizes(config: PdcrConfig) -> tuple[int, ...] | str:
    return config.patch_sizes if config.hierarchical else "receptive_field"


def _named_errors(call):
    """Errors of the loss about sizes and samples as errors of the settings."""
    try:
        return call()
    except ValueError as error:
        raise ConfigError(f"PDCR: {error}") from error


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
