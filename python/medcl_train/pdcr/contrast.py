"""PDCR on a network: the loss on the maps that the settings name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import medcl_kernels as mk

from ..engine.config import ConfigError
from .config import PdcrConfig
from .networks import before_uafs, decoder_layers, encoder_layers, place
from .taps import check_names, measured_fields, probe


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
        terms = config.setting("terms")
        encoder = encoder_layers(config) if "encoder" in terms else ()
        decoder = decoder_layers(config, network) if "decoder" in terms else ()
        cross = ()
        if "cross" in terms:
            cross = config.cross_layers or encoder_layers(config)
            check_names(network, cross)
            if config.cross_before_uafs:
                cross = tuple(before_uafs(network, name) for name in cross)
        self.encoder_names, self.decoder_names, self.cross_names = encoder, decoder, cross
        self.names = (*encoder, *decoder)
        self.taps = tuple(dict.fromkeys((*self.names, *cross)))
        maps = probe(network, self.taps, config)
        fields = measured_fields(network, self.taps, maps, config)
        compat, layer_reduction = None, config.setting("layer_reduction")
        if config.compat != "none":
            compat, layer_reduction = config.compat, config.layer_reduction
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 300)
            self.loss = _named_errors(
                lambda: mk.PatchDragsawLoss(
                    _within(config, encoder, decoder, fields),
                    num_classes=num_classes,
                    sizes=config.patch_sizes if config.hierarchical else "receptive_field",
                    cross=_across(config, cross, fields, maps),
                    cross_channels=config.setting("cross_channels"),
                    cross_weight=config.setting("cross_weight"),
                    spatial_dims=config.spatial_dims,
                    temperature=config.setting("temperature"),
                    sampler="stride" if config.sampler == "stride" else "even",
                    average=config.average,
                    size_weights=config.size_weights or None,
                    form=config.form,
                    divergence=config.divergence,
                    shift=config.shift,
                    reduction=config.reduction,
                    layer_reduction=layer_reduction,
                    compat=compat,
                    impl=config.impl,
                )
            )
        device = next(network.parameters()).device
        place(self, config, device)
        labels = torch.zeros(1, *config.input_size, dtype=torch.int64, device=device)
        self.eval()  # one image has no variance for the adapters' normalisation
        with torch.no_grad():
            _named_errors(lambda: self.loss(maps, labels))
        self.offsets = self.loss.offsets(maps)  # of one image
        self.train()

    def forward(self, features: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """{"loss_pdcr": weighted total, "loss_encoder", "loss_decoder", "loss_cross": means of the
        terms, without weights and less what they are where all features are equal, log N}.

        Args:
            features: (B, C, *spatial) of `taps`. labels: (B, *spatial) at input size.
        """
        terms = self.loss.terms({name: x.float() for name, x in features.items()}, labels)
        images = len(labels) if self.loss.reduction == "sum" else 1
        groups = {
            "loss_encoder": self.encoder_names,
            "loss_decoder": self.decoder_names,
            "loss_cross": [name for name in terms if name not in self.names],
        }
        logged = {
            group: torch.stack([terms[name] - images * self.offsets[name] for name in names]).mean()
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


def _within(config, encoder, decoder, fields) -> dict[str, mk.PatchLayer]:
    """Layers that are compared with themselves."""
    layers = {}
    for part, names in (("encoder", encoder), ("decoder", decoder)):
        samples, weights = config.setting(f"{part}_samples"), config.setting(f"{part}_weights")
        for i, name in enumerate(names):
            layers[name] = mk.PatchLayer.of(
                fields[name],
                weight=_at(weights, i),
                border=config.border,
                **_cells(config, i, _at(samples, i)),
            )
    return layers


def _across(config, names, fields, maps) -> dict[str, mk.CrossLayer]:
    """Layers that are compared with each other, brought to one stride."""
    return {
        name: mk.CrossLayer.of(
            fields[name],
            channels=maps[name].shape[1],
            kernel=max(1, config.setting("cross_stride") // max(fields[name].stride)),
            **_cells(config, i, config.setting("cross_samples")),
        )
        for i, name in enumerate(names)
    }


def _at(values, place: int):
    """One value per layer; the last one for further layers."""
    return values[min(place, len(values) - 1)]


def _cells(config: PdcrConfig, place: int, samples: int) -> dict[str, int]:
    """Which cells of the layer at a place of its list are taken."""
    if config.sampler == "dense":
        return {}
    if config.sampler == "regular":
        return {"step": _at(config.encoder_steps, place)}
    return {"samples": samples}


def _named_errors(call):
    """Errors of the loss about sizes and samples as errors of the settings."""
    try:
        return call()
    except ValueError as error:
        raise ConfigError(f"PDCR: {error}") from error
