"""`UncertaintyFeatureSelection` (UAFS, also called UAFR): a block that turns features up where its
own small classifier is certain, and `insert_uafs`, which puts such blocks into a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .losses.uncertainty_reweight import uncertainty_reweight
from .reference.uncertainty_reweight import uncertainty

BLOCK = "uafs"  # name of the block inside the module that it follows


class UncertaintyFeatureSelection(nn.Module):
    """z = conv1(relu(norm(conv3(x)))), y = x (2 - U(z)); U is the normalised entropy of M logits.

    No supervision of its own: the block learns through the task loss, and the gradient reaches x
    both ways.

    Args:
        channels: C of the features.
        hidden: channels between the convolutions; None: 16 in 2-D, C // 4 in 3-D, as published.
        num_logits: M, at least 2, whatever the number of classes.
        kernel_size: odd, of the first convolution.
        dropout: rate after the ReLU (the paper's code: 0.1 in ASPP and decoder, 0 in the backbone).
        spatial_dims: 2 or 3. In 2-D the first convolution has no bias.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.

    Shape:
        `(B, C, *spatial)` -> the same.

    Raises:
        ValueError: a size is out of range; the message names it.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> block = medcl.UncertaintyFeatureSelection(64)
        >>> y = block(torch.randn(2, 64, 32, 32))
    """

    def __init__(
        self,
        channels: int,
        *,
        hidden: int | None = None,
        num_logits: int = 2,
        kernel_size: int = 3,
        dropout: float = 0.0,
        spatial_dims: int = 2,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3; got {spatial_dims}")
        if hidden is None:
            hidden = 16 if spatial_dims == 2 else max(channels // 4, 1)
        for name, value, least in (
            ("channels", channels, 1),
            ("hidden", hidden, 1),
            ("num_logits", num_logits, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, to keep the grid; got {kernel_size}")
        checks.choice("impl", impl, checks.IMPLS)
        flat = spatial_dims == 2
        convolution = nn.Conv2d if flat else nn.Conv3d
        layers: list[nn.Module] = [
            convolution(channels, hidden, kernel_size, padding=kernel_size // 2, bias=not flat),
            nn.BatchNorm2d(hidden) if flat else nn.BatchNorm3d(hidden),
            nn.ReLU(inplace=True),
        ]
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(convolution(hidden, num_logits, 1))
        self.logits = nn.Sequential(*layers)
        self.impl = impl

    def forward(self, features: Tensor) -> Tensor:
        """Features times two minus their uncertainty."""
        return uncertainty_reweight(
            features, self.logits(features).to(features.dtype), impl=self.impl
        )

    @torch.no_grad()
    def uncertainty(self, features: Tensor) -> Tensor:
        """U in [0, 1], `(B, *spatial)`, for pictures."""
        return uncertainty(self.logits(features))

    def extra_repr(self) -> str:
        return f"impl={self.impl!r}"


def insert_uafs(
    model: nn.Module,
    layers: Sequence[str] | Mapping[str, int],
    **options: Any,
) -> nn.Module:
    """Put an `UncertaintyFeatureSelection` behind named submodules of a network, in place.

    The block becomes the submodule `uafs` of the layer that it follows: names, and with them
    checkpoints, of everything else stay as they are, and copies of the model keep working.

    Args:
        model: any network.
        layers: names as in `model.named_modules()`, each giving one tensor `(B, C, *spatial)`. With
            a mapping, C is the value; else the channels of the last convolution or normalisation
            inside the layer.
        options: of `UncertaintyFeatureSelection`; `spatial_dims` is taken from the layer's
            convolutions unless given.

    Returns:
        The model itself.

    Raises:
        ValueError: no such layer, it has a block already, or its channels cannot be told.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 2, 1))
        >>> net = medcl.insert_uafs(net, ["0"])
    """
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules or not name:
            known = ", ".join(list(modules)[1:21])
            raise ValueError(f"no layer {name!r} in the model, which has {known} ...")
        layer = modules[name]
        if hasattr(layer, BLOCK):
            raise ValueError(f"layer {name!r} has an uncertainty block already")
        if isinstance(layer, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, which is never called: name its "
                "members"
            )
        found, dims = _output(layer)
        channels = layers[name] if isinstance(layers, Mapping) else found
        if channels is None:
            raise ValueError(
                f"layer {name!r} has no convolution or normalisation to tell its channels: pass "
                f"layers={{{name!r}: channels}}"
            )
        settings = {**({} if dims is None else {"spatial_dims": dims}), **options}
        block = UncertaintyFeatureSelection(channels, **settings)
        block.train(layer.training)
        like = next(layer.parameters(), None)
        layer.add_module(BLOCK, block if like is None else block.to(like.device))
        if type(layer).forward is not nn.Sequential.forward:  # a Sequential calls it by itself
            layer.register_forward_hook(_select)
    return model


def _select(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Finds the block through the module, so that a deep copy uses its own."""
    return module.get_submodule(BLOCK)(output)


def _output(layer: nn.Module) -> tuple[int | None, int | None]:
    """Channels and spatial axes of what comes out of a layer, where its parts tell."""
    channels = dims = None
    for part in layer.modules():
        kind = type(part).__name__
        for attribute in ("out_channels", "num_features"):
            if isinstance(getattr(part, attribute, None), int):
                channels = getattr(part, attribute)
        for axes in (2, 3):
            if kind.endswith(f"{axes}d"):
                dims = axes
    return channels, dims
