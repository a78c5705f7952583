"""What every operation needs from torch.library besides its own schema.

An operation is declared twice with one schema, one fake kernel, one gradient and one vmap rule: as
`medcl::<name>`, whose kernels the compiled library brings (CPU and CUDA), and as
`medcl_triton::<name>`, whose kernels `medcl_kernels.triton` brings. Schemas live here in Python, so
that fake kernels, torch.compile and messages work without either. A gradient stays in the namespace
of its forward pass. Autocast leaves operations alone: each tensor is taken in the dtype it has,
accumulated in float32 (float64 for float64) and answered in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks, env

COMPILED, TRITON = "medcl", "medcl_triton"
BOTH = (COMPILED, TRITON)
LIBRARIES = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in BOTH}
NAMES: list[str] = []  # every operation that was defined, as "namespace::name", for opcheck
env.load_library()


def kernels(backend: str) -> Any:
    """The namespace of `torch.ops` that holds the operations of a backend other than reference."""
    if backend != "triton":
        return torch.ops.medcl
    _load_triton()
    return torch.ops.medcl_triton


@torch.compiler.assume_constant_result
def _load_triton() -> None:
    """Registers the Triton kernels; the first call imports Triton."""
    from .. import triton  # noqa: F401


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor, if there is one, as the kernels read labels, indices and weights."""
    return None if x is None else x.contiguous()


def define(schema: str, fake: Callable[..., Any], namespaces: tuple[str, ...] = BOTH) -> None:
    """Declares an operation with its fake kernel and its vmap rule."""
    name = schema.split("(")[0]
    for namespace in namespaces:
        library, full_name = LIBRARIES[namespace], f"{namespace}::{name}"
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(full_name, fake, lib=library)
        torch.library.register_vmap(full_name, partial(_one_by_one, namespace, name), lib=library)
        NAMES.append(full_name)


def torch_kernel(name: str, function: Callable[..., Any]) -> None:
    """Registers `function`, written in torch operations, as the kernel of `medcl::<name>` on every
    device."""
    LIBRARIES[COMPILED].impl(name, function, "CompositeExplicitAutograd")


def gradient(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    namespaces: tuple[str, ...] = BOTH,
) -> None:
    """Registers `backward(ops, ctx, *gradients)`, `ops` being the operation's own namespace."""
    for namespace in namespaces:
        ops = getattr(torch.ops, namespace)
        kernel = _autograd_kernel(getattr(ops, name).default, partial(backward, ops), setup_context)
        LIBRARIES[namespace].impl(name, kernel, "Autograd", with_keyset=True)


def _autograd_kernel(
    operation: Any, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> Callable[..., Any]:
    """What `torch.library.register_autograd` registers, for operations that take all arguments by
    position and without defaults: looking for defaults in the schema costs torch's own as much time
    at every call as the kernels of a small loss (docs/performance.md).
    """

    def below(keyset: Any, *inputs: Any) -> Any:
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return operation.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
        except (RuntimeError, MemoryError) as error:
            tensors = [one for one in inputs if isinstance(one, Tensor)]
            if not checks.memory_ran_out(error, tensors[0]):
                raise
            shapes = ", ".join(str(tuple(one.shape)) for one in tensors)
            message = (
                f"{str(error).rstrip()}\n{operation.name()} on {shapes}: out of memory; free other "
                "tensors, or make these smaller"
            )
        raise checks.memory_error(message, tensors[0])  # here: the handler's frames hold tensors

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            inputs, keyset = arguments[:-1], arguments[-1]
            output = below(keyset, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *backward(ctx, *gradients), None  # the key set has none

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Gradient.apply(*inputs, keyset)
        return below(keyset, *inputs)

    return kernel


def once_differentiable(name: str, namespaces: tuple[str, ...] = BOTH) -> None:
    """Makes a derivative of a backward operation an error that names the way out."""

    def refuse(ops: Any, ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{ops.name}::{name} has no derivative of its own, so this loss can be differentiated "
            'only once; for second derivatives call it with impl="reference"'
        )

    gradient(name, refuse, lambda ctx, inputs, output: None, namespaces)


def define_backward(
    name: str, gradient_and_saved: str, arguments: str, namespaces: tuple[str, ...] = BOTH
) -> None:
    """Declares `<name>_backward`, the gradients of the query and the key.

    Args:
        name: of the forward operation, whose first two arguments are the query and the key.
        gradient_and_saved: what it takes before the forward operation's own arguments: the upstream
            gradient and, if it needs it, the forward operation's output.
        arguments: of the forward operation.
    """

    def fake(*inputs: Any) -> tuple[Tensor, Tensor]:
        query, key, need_query, need_key = *inputs[before : before + 2], *inputs[-2:]
        other = query if key is None else key
        return gradient_like(query, need_query), gradient_like(other, need_key and key is not None)

    before = gradient_and_saved.count(",") + 1
    define(
        f"{name}_backward({gradient_and_saved}, {arguments}, bool need_query, bool need_key)"
        " -> (Tensor, Tensor)",
        fake,
        namespaces,
    )
    once_differentiable(f"{name}_backward", namespaces)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], *outputs: Tensor) -> None:
    """Keeps what a backward operation made by `define_backward` takes, and outputs of use to it."""
    options = 0  # where they begin: behind the tensors
    while inputs[options] is None or isinstance(inputs[options], Tensor):
        options += 1
    ctx.save_for_backward(*outputs, *inputs[:options])
    ctx.options = inputs[options:]


def row_gradients(
    operation: Any, ctx: Any, upstream: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """One gradient per argument of the forward operation; only the query and the key have any."""
    need_query, need_key = ctx.needs_input_grad[:2]
    d_query, d_key = operation(*upstream, *inputs, *ctx.options, need_query, need_key)
    none = (None,) * (len(inputs) + len(ctx.options) - 2)
    return d_query if need_query else None, d_key if need_key else None, *none


def gradient_like(x: Tensor, needed: bool) -> Tensor:
    """Room for a gradient: in the layout of its input, or empty where it is not needed."""
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
    # Products are quicker than an operation whose derivative is an error. Not for 16-bit rows: a
    # loss scale may be beyond the largest float16.
    if not torch.is_grad_enabled() and g.dtype == d_query.dtype:
        return g * d_query if need_query else None, g * d_key if need_key else None
    other = empty(d_query) if d_key is None else d_key
    by_query, by_key = torch.ops.medcl.scale_gradients(g, d_query, other)
    return by_query if need_query else None, by_key if need_key else None


def _one_by_one(namespace: str, name: str, info: Any, in_dims: Any, *args: Any) -> Any:
    """vmap runs the operation once per slice: right for every option; users batch with B."""
    operation = getattr(getattr(torch.ops, namespace), name)
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
    return tuple(torch.stack(part) for part in zip(*results, strict=True)), (0,) * len(results[0])


define(
    "scale_gradients(Tensor g, Tensor d_query, Tensor d_key) -> (Tensor, Tensor)",
    lambda g, d_query, d_key: (torch.empty_like(d_query), torch.empty_like(d_key)),
    (COMPILED,),
)
once_differentiable("scale_gradients", (COMPILED,))

# The CUDA kernels ask for it at run time: the C++ interface to torch has no such question.
LIBRARIES[COMPILED].define("float32_matmul_precision() -> str")
torch_kernel("float32_matmul_precision", torch.get_float32_matmul_precision)
