"""Receptive field, stride and position of the cells of a layer, measured on the network itself.

One forward and one backward pass per probed cell on a linear twin of the network: convolutions with
equal positive weights, averages in place of maxima, and no normalisation, activation, dropout or
global pooling. Where the gradient of a cell reaches the input is then exactly its receptive field.
The twin exists only while the network runs under `_LinearTwin`; its weights are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ReceptiveField(NamedTuple):
    """Where the cells of a layer look, in input pixels, per axis in array order.

    Attributes:
        size: of the receptive field.
        stride: from a cell to its neighbour.
        offset: centre of the receptive field of cell 0; 0 for "same" padding, halves for even
            kernels.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: tuple[float, ...]


# what a global statistic or a gate adds to the reach of a cell is not its receptive field
_IDENTITIES = frozenset(
    "relu relu_ relu6 leaky_relu leaky_relu_ rrelu prelu elu elu_ celu selu gelu silu mish sigmoid "
    "tanh hardtanh hardsigmoid hardswish softplus softsign logsigmoid threshold dropout dropout_ "
    "dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout batch_norm "
    "instance_norm group_norm layer_norm rms_norm local_response_norm".split()
)
_CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
_WEIGHTS = ("input", "weight", "bias")
_NEIGHBOURS = 4


class _LinearTwin(TorchFunctionMode):
    """Runs the same code as a positive linear map."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _IDENTITIES:
            return args[0]
        if name in _CONVOLUTIONS:
            x, weight, _, *rest = (*args, *(kwargs.pop(key, None) for key in _WEIGHTS[len(args) :]))
            return _even(func, x, weight, rest, kwargs)
        if name == "linear":
            return args[0].mean(-1, keepdim=True).expand(*args[0].shape[:-1], args[1].shape[0])
        if name.startswith("adaptive_") or name.startswith("_adaptive_"):
            return func(*args, **kwargs) * 0
        if "max_pool" in name:
            pool = getattr(nn.functional, f"avg_pool{name.split('max_pool')[1][0]}d")
            names = ("input", "kernel_size", "stride", "padding")
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            return pool(
                *(call.get(key) for key in names[:3]),
                padding=call.get("padding") or 0,
                ceil_mode=bool(call.get("ceil_mode", False)),
            )
        return func(*args, **kwargs)


def _even(
    convolution: Callable[..., Any], x: Tensor, weight: Tensor, rest: list[Any], options: Any
) -> Tensor:
    """The convolution with equal weights: of the mean over channels, the same for every output."""
    shape = weight.shape[2:]
    kernel = torch.full((1, 1, *shape), 1 / shape.numel(), dtype=torch.float64, device=x.device)
    transposed = "transpose" in convolution.__name__
    if len(rest) > 3:  # stride, padding, dilation or (transposed) output_padding, groups
        groups, rest[3] = rest[3], 1
    else:
        groups = options.pop("groups", 1)
    out = convolution(x.mean(1, keepdim=True), kernel, None, *rest, **options)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return out.expand(-1, channels, *out.shape[2:])


@torch.enable_grad()
def receptive_fields(
    network: nn.Module, layers: Sequence[str], input_shape: Sequence[int]
) -> dict[str, ReceptiveField]:
    """Receptive fields of named submodules.

    Args:
        network: called with one tensor. Its mode and weights are left as they were.
        layers: names as in `network.named_modules()`, each giving `(B, C, *spatial)`.
        input_shape: `(B, C, *spatial)`, large enough that a cell at a third of the grid sees no
            edge: about three receptive fields.

    Returns:
        One record per layer. The reach of normalisation over the map and of global pooling is not
        counted.

    Raises:
        ValueError: no such layer, or the receptive field reaches the edge of the input.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2, 1), torch.nn.Conv2d(8, 8, 3))
        >>> medcl.receptive_fields(net, ["1"], (1, 1, 64, 64))["1"].size
        (7, 7)
    """
    modules = dict(network.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        known = ", ".join(list(modules)[1:21])
        raise ValueError(f"no layer {missing[0]!r} in the network, which has {known} ...")
    parameter = next(network.parameters(), torch.empty(0))
    x = torch.ones(*input_shape, dtype=torch.float64, device=parameter.device, requires_grad=True)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, (tuple, list)) else output

        return hook

    training = [module for module in network.modules() if module.training]
    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        network.eval()
        with _LinearTwin():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return {name: _measure(name, outputs[name], x) for name in layers}


def _measure(name: str, output: Tensor, x: Tensor) -> ReceptiveField:
    """From the boxes of a few neighbouring cells at one third of the grid and at two thirds: an
    upsampled map has neighbours that share a coarse cell, so one cell alone would mislead."""
    grid = output.shape[2:]
    last = _NEIGHBOURS - 1
    starts = [[g // 3 for g in grid], [max(2 * g // 3 - last, 0) for g in grid]]
    groups = [
        [
            _box(output, [min(cell + move, g - 1) for cell, g in zip(start, grid, strict=True)], x)
            for move in range(_NEIGHBOURS)
        ]
        for start in starts
    ]
    size, stride, offset = [], [], []
    for axis, length in enumerate(x.shape[2:]):
        boxes = [[(low[axis], high[axis]) for low, high in group] for group in groups]
        ends = [end for group in boxes for box in group for end in box]
        between = starts[1][axis] - starts[0][axis]
        if min(ends) == 0 or max(ends) == length - 1 or between < 1:
            raise ValueError(
                f"layer {name!r}: the receptive field reaches the edge of an input of "
                f"{tuple(x.shape[2:])} in axis {axis}: measure with a larger input_shape"
            )
        middles = [sum(low + high for low, high in group) / (2 * _NEIGHBOURS) for group in boxes]
        step = round((middles[1] - middles[0]) / between)
        cells = [start[axis] + (_NEIGHBOURS - 1) / 2 for start in starts]
        drift = sum(middle - cell * step for middle, cell in zip(middles, cells, strict=True))
        size.append(max(high - low + 1 for group in boxes for low, high in group))
        stride.append(step)
        offset.append(round(drift) / 2)
    return ReceptiveField(tuple(size), tuple(stride), tuple(offset))


def _box(output: Tensor, cell: list[int], x: Tensor) -> tuple[list[int], list[int]]:
    """First and last input pixel, per axis, that a cell depends on."""
    (reach,) = torch.autograd.grad(output[(0, slice(None), *cell)].sum(), x, retain_graph=True)
    at = reach[0].abs().sum(0).nonzero()
    return at.amin(0).tolist(), at.amax(0).tolist()
