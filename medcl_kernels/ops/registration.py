"""What every `medcl::` operation needs from torch.library besides its own schema and gradient.

Schemas live here in Python, so that fake kernels, torch.compile and messages work without the
compiled library, which only adds kernels. Autocast leaves operations alone: each tensor is taken in
the dtype it has, accumulated in float32 (float64 for float64) and answered in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import env

_LIBRARY = torch.library.Library("medcl", "FRAGMENT")
NAMES: list[str] = []  # every operation that was defined, for opcheck
env.load_library()


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Declares `medcl::<schema>` with its fake kernel and its vmap rule."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"medcl::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"medcl::{name}", _vmap_rule(name), lib=_LIBRARY)
    NAMES.append(name)


def gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Registers the gradient of `medcl::<name>`."""
    torch.library.register_autograd(
        f"medcl::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def once_differentiable(name: str) -> None:
    """Makes a derivative of a backward operation an error that names the way out."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"medcl::{name} has no derivative of its own, so this loss can be differentiated only "
            'once; for second derivatives call it with impl="reference"'
        )

    gradient(name, refuse, lambda ctx, inputs, output: None)


def gradient_like(x: Tensor, needed: bool) -> Tensor:
    """Fake of a gradient: in the layout of its input, or empty where it is not needed."""
    return torch.empty_like(x) if needed else empty(x)


def empty(x: Tensor) -> Tensor:
    """The placeholder for a gradient that is not needed."""
    return x.new_empty(0)


def scaled_gradients(
    g: Tensor | None, d_query: Tensor, d_key: Tensor | None, need_query: bool, need_key: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The way back of an operation that made its gradients for g = 1 in the forward pass."""
    if g is None:
        return None, None
    other = empty(d_query) if d_key is None else d_key
    by_query, by_key = torch.ops.medcl.scale_gradients(g, d_query, other)
    return by_query if need_query else None, by_key if need_key else None


def _vmap_rule(name: str) -> Callable[..., Any]:
    """Runs the operation once per slice: right for every option; users batch with B."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        operation = getattr(torch.ops.medcl, name)
        results = [
            operation(
                *(
                    arg if dim is None else arg.select(dim, i)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(part) for part in zip(*results, strict=True)), (0,) * len(
            results[0]
        )

    return rule


define(
    "scale_gradients(Tensor g, Tensor d_query, Tensor d_key) -> (Tensor, Tensor)",
    lambda g, d_query, d_key: (torch.empty_like(d_query), torch.empty_like(d_key)),
)
once_differentiable("scale_gradients")
