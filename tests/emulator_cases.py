"""Calls of the CUDA kernels on the host emulator, with what the reference makes of them in float64.

Small ragged shapes: every width of rows that has a kernel of its own, one and two tensors, several
selections, ignored rows that hold NaN, one row, all images together, low temperature, rows as they
are. A tensor may be off by twice the error of plain torch on rows rounded as the kernel rounds
them, plus eps times its natural scale.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medcl_kernels import reference
from medcl_kernels.reference.pairs import unit

IGNORE = -100
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}
FORMATS = {  # Format of csrc/host/calls.h
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int64: 3,
    torch.float64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.int8: 7,
    torch.uint8: 8,
}


@dataclass(frozen=True)
class Shape:
    """One input: B images, D channels, L query rows and Lk key rows (0: against itself)."""

    dim: int
    length: int
    key_length: int = 0
    batch: int = 1
    kinds: tuple[str, ...] = ("all",)
    across: bool = False
    temperature: float = 0.1
    normalize: bool = True
    layout: str = (
        "rows"  # channels contiguous; "maps": pixels contiguous, as NCHW; "steps": neither
    )
    ignored: float = 0.2
    several: int = 0  # positives per anchor of positive_at
    opposed: bool = False  # every similarity is negative: below that of a row of zeros

    @property
    def name(self) -> str:
        parts = [f"D{self.dim}", f"{self.batch}x{self.length}"]
        parts += [f"key{self.key_length}"] if self.key_length else []
        parts += ["+".join(kind[0] for kind in self.kinds)]
        parts += [f"t{self.temperature}"] if self.temperature != 0.1 else []
        parts += [word for word in ("across",) if self.across]
        parts += [] if self.normalize else ["raw"]
        parts += ["opposed"] if self.opposed else []
        return "-".join([*parts, self.layout])


@dataclass
class Call:
    """One operation: what goes in, what must come out, and how far it may be off."""

    name: str
    operation: str
    inputs: dict[str, Tensor]
    options: dict[str, str]
    expected: dict[str, Tensor]
    tolerance: dict[str, float]


PAIRS = ("pair_logsumexp", "pair_positive_log")
# Widths: padded to 64, 64, 128 and (16 bits) 256 channels, and streamed in slabs; key rows fill
# more than one tile, query rows more than one warp.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "pair_logsumexp": (
        Shape(1, 5, kinds=("same",)),
        Shape(3, 70, kinds=("different",), batch=2, layout="maps"),
        Shape(16, 1),
        Shape(16, 1, 1),
        Shape(16, 150, across=False, layout="steps"),
        Shape(16, 40, 70, batch=2, kinds=("all", "same", "different"), across=True),
        Shape(16, 30, kinds=("all", "same", "different", "same", "all"), temperature=0.01),
        Shape(16, 40, kinds=("all", "different")),  # a row that one selection leaves out
        Shape(16, 20, 150, temperature=0.01),  # the maximum rises from tile to tile
        Shape(64, 70, 130, kinds=("same",), layout="maps"),
        Shape(64, 65, normalize=False, temperature=8.0),
        Shape(96, 66, batch=2, across=True, kinds=("different",)),
        Shape(128, 40, 70, temperature=0.07),
        Shape(256, 20, 70, kinds=("all", "different")),
        Shape(256, 33, temperature=0.5, layout="maps"),
        Shape(300, 20, kinds=("all", "same")),
        Shape(300, 9, 70, kinds=("different",)),
    ),
    "pair_positive_log": (
        Shape(3, 70, batch=2, kinds=("same", "same"), layout="maps"),
        Shape(16, 1, 1),
        Shape(64, 40, 70, batch=2, across=True),
        Shape(128, 70),
        Shape(256, 20, 70, temperature=0.02),
        Shape(300, 20, kinds=("same", "same"), layout="steps"),
    ),
    "pair_argmax": (
        Shape(1, 9, 70, ignored=0),
        Shape(16, 1, 1, ignored=0),
        Shape(16, 9, 65, ignored=0, opposed=True),
        Shape(64, 70, 130, batch=2, ignored=0, layout="maps"),
        Shape(96, 66, 65, ignored=0),
        Shape(256, 30, 70, ignored=0),
        Shape(300, 30, 70, ignored=0, layout="steps"),
    ),
    "positive_mean": (
        Shape(3, 70, batch=2, kinds=("same", "same"), layout="maps"),
        Shape(16, 1),
        Shape(64, 150, layout="steps"),
        Shape(128, 40, 70, batch=2, across=True, kinds=("same", "same")),
        Shape(300, 66, 65),
    ),
    "positive_at": (
        Shape(3, 70, 40, batch=2, layout="maps"),
        Shape(16, 1, 1),
        Shape(16, 400, 2),  # sums over more than two chunks
        Shape(64, 66, 150, several=3),
        Shape(300, 150, 3, layout="steps"),
    ),
}
OPERATIONS = tuple(SHAPES)


def draw_rows(shape: Shape, length: int, dtype: torch.dtype, ignored: Tensor | None) -> Tensor:
    """`(B, D, length)` in the shape's layout; ignored rows and all gaps hold NaN."""
    step = 2 if shape.layout == "steps" else 1
    size = (shape.batch, step * length, step * shape.dim)
    if shape.layout == "maps":
        size = (shape.batch, shape.dim, length)
    room = torch.full(size, torch.nan, dtype=dtype)
    x = room if shape.layout == "maps" else room[:, ::step, ::step].transpose(1, 2)
    x.copy_(torch.randn(shape.batch, shape.dim, length, dtype=torch.float64))
    if ignored is not None:
        x.transpose(1, 2)[ignored] = torch.nan
    return x


def draw_labels(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """`(S, B, length)` labels, some beyond 32 bits, and which rows all of them ignore."""
    labels = torch.randint(0, 3, (len(shape.kinds), shape.batch, length))
    labels = torch.tensor([7, -5, 2**40 + 7])[labels]
    ignored = torch.rand(shape.batch, length) < shape.ignored
    some = len(shape.kinds) > 1 and length > 3
    ignored[:, 3:4] &= not some
    labels[:, ignored] = IGNORE
    if some:
        labels[1, :, 3] = IGNORE  # out of one selection only
    return labels, ignored


def rounded(x: Tensor, product: str) -> Tensor:
    """Rows as the kernels multiply them, in float32; the rounding has derivative 1."""
    if product == "ieee":
        return x
    if product == "tf32":
        bits = x.detach().float().contiguous().view(torch.int32)
        value = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    else:
        value = x.detach().to(DTYPES[product]).float()
    return x + (value - x).detach()


def plain(function: Any, product: str, sides: dict[str, Tensor], valid: Any, options: Any) -> Any:
    """The reference in float32 on rows that were rounded first."""
    if product == "ieee":
        return function(**sides, **options)
    clean = {
        name: torch.where(valid[name].unsqueeze(1), x.float(), 0.0) for name, x in sides.items()
    }
    if options["normalize"]:
        clean = {name: unit(x, 1) for name, x in clean.items()}
    clean = {name: rounded(x, product) for name, x in clean.items()}
    return function(**clean, **{**options, "normalize": False})


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


OUTPUTS = {"positive_mean": ("mean", "count"), "pair_argmax": ("index", "value")}
UPSTREAM = {
    "pair_logsumexp": "d_lse",
    "pair_positive_log": "d_sum",
    "positive_mean": "d_mean",
    "positive_at": "d_out",
}


def calls(operation: str, shape: Shape, product: str, seed: int = 0) -> list[Call]:
    """The forward call, and the backward call where there is one."""
    torch.manual_seed(seed)
    dtype = DTYPES[product]
    labels, ignored = draw_labels(shape, shape.length)
    sides = {"query": draw_rows(shape, shape.length, dtype, ignored)}
    valid = {"query": ~ignored}
    index = None
    if operation == "positive_at":
        size = (shape.batch, shape.length, shape.several or 1)
        index = torch.randint(0, shape.key_length, size).masked_fill(ignored.unsqueeze(2), -1)
        if shape.several:
            index[:, ::2, 1] = -1
        else:
            index = index.squeeze(2)
    key_labels = None
    if shape.key_length:
        key_labels, key_ignored = draw_labels(shape, shape.key_length)
        if operation in ("pair_argmax", "positive_at"):
            key_ignored = torch.zeros_like(key_ignored)
        sides["key"] = draw_rows(shape, shape.key_length, dtype, key_ignored)
        if shape.opposed:
            sides["query"].abs_().neg_()
            sides["key"].abs_()
        valid["key"] = ~key_ignored

    options: dict[str, Any] = {"normalize": shape.normalize}
    extra: dict[str, Tensor] = {}
    if operation != "pair_argmax":
        options |= {"temperature": shape.temperature, "across": shape.across}
    if operation in (*PAIRS, "positive_mean"):
        extra["query_labels"] = labels
        if key_labels is not None:
            extra["key_labels"] = key_labels
        options["ignore_index"] = IGNORE
    if operation == "pair_logsumexp":
        options["kinds"] = shape.kinds
    if operation == "pair_positive_log":
        extra["lse_negative"] = torch.randn(labels.shape) * 2 + 0.5 / shape.temperature
        extra["lse_negative"][..., -1] = -torch.inf
    if index is not None:
        extra["positives"] = index

    function = getattr(reference, operation)

    def run(kind: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor], tuple[Tensor, ...]]:
        double = kind == "truth"
        leaves = {
            name: x.to(torch.float64 if double else torch.float32, copy=True).requires_grad_()
            for name, x in sides.items()
        }
        fixed = {
            name: x.double() if double and x.is_floating_point() else x for name, x in extra.items()
        }
        if "lse_negative" in fixed:
            fixed["lse_negative"] = fixed["lse_negative"].detach().requires_grad_()
        if double:
            outputs = as_tuple(function(**leaves, **fixed, **options))
        else:
            outputs = as_tuple(plain(function, product, leaves, valid, {**fixed, **options}))
        if operation == "pair_argmax":
            return outputs, {}, ()
        value = outputs[0]
        generator = torch.Generator().manual_seed(1)
        g = torch.rand(value.shape, generator=generator) * 1.5 - 0.5
        g[value.detach().isinf()] = torch.nan  # rows without candidates: whatever comes in is left
        loss = torch.where(value.isinf(), 0.0, value)
        weights = torch.where(value.isinf(), 0.0, g).to(value.dtype)
        gradients = torch.autograd.grad(loss, list(leaves.values()), weights, retain_graph=True)
        if "lse_negative" in fixed:
            (tail,) = torch.autograd.grad(loss.sum(), fixed["lse_negative"])
            outputs = (*outputs, tail)
        named = {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}
        return tuple(x.detach() for x in outputs), named, (g,)

    truth, true_gradients, upstream = run("truth")
    near, near_gradients, _ = run("plain")
    scale = 1.0 / shape.temperature
    text = {
        name: str(int(v)) if isinstance(v, bool) else ",".join(v) if name == "kinds" else str(v)
        for name, v in options.items()
    } | {"product": product}
    names = OUTPUTS.get(operation, ("value",))
    base = f"{operation}-{product}-{shape.name}"
    expected, tolerance = {}, {}
    if operation == "pair_positive_log":  # the second result is the derivative to lse_negative
        names = ("value", "tail")
    for name, exact, other in zip(names, truth, near, strict=True):
        expected[name] = exact.reshape(1, *exact.shape) if operation == "pair_argmax" else exact
        tolerance[name] = allowed(exact, other, scale, torch.float32)
    if operation == "pair_argmax":
        tolerance["index"] = 0.0
    forward = Call(base, operation, {**sides, **extra}, text, expected, tolerance)
    if operation == "pair_argmax":
        return [forward]

    inputs = {**sides, **extra, UPSTREAM[operation]: upstream[0]}
    if operation == "pair_logsumexp":
        inputs["lse"] = near[0].float()  # of the rounded rows, as a forward pass gives it
    norms = [unit_norm(x, valid[name]) for name, x in sides.items()] if shape.normalize else [1.0]
    size = scale * len(shape.kinds) / min(norms)
    tolerance = {
        name: allowed(exact, near_gradients[name], size, dtype)
        for name, exact in true_gradients.items()
    }
    backward = Call(
        f"{base}-backward", f"{operation}_backward", inputs, text, true_gradients, tolerance
    )
    return [forward, backward]


def unit_norm(x: Tensor, valid: Tensor) -> float:
    """The smallest norm of the rows that take part."""
    norms = x.double().transpose(1, 2)[valid].norm(dim=1)
    return norms.min().item() if norms.numel() else 1.0


def allowed(exact: Tensor, near: Tensor, scale: float, dtype: torch.dtype) -> float:
    """The tolerance rule, see the top of this file."""
    if not exact.is_floating_point():
        return 0.0
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    error = (near.double() - exact)[finite].abs().max().item()
    size = max(scale, exact[finite].abs().max().item())
    return 2 * error + 4 * torch.finfo(dtype).eps * size


def selected(product: str, operation: str) -> tuple[Shape, ...]:
    """The shapes of an operation that a product is tried on."""
    shapes = SHAPES[operation]
    if product == "ieee":  # no tensor core: every multiply-add is emulated, wide rows are slow
        shapes = tuple(
            replace(one, length=min(one.length, 20), key_length=min(one.key_length, 34))
            if one.dim > 128
            else one
            for one in shapes
        )
    return shapes


def write(path: Path, listed: list[Call]) -> None:
    """Writes calls for the stand-alone driver (csrc/host/replay.cpp)."""

    def text(value: str) -> bytes:
        return struct.pack("<q", len(value)) + value.encode()

    def sizes(values: Any) -> bytes:
        return struct.pack(f"<q{len(values)}q", len(values), *values)

    def array(name: str, x: Tensor) -> bytes:
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        flat = x.as_strided((extent,), (1,))
        flat = flat.view(torch.int16) if x.dtype == torch.bfloat16 else flat
        head = text(name) + struct.pack("<q", FORMATS[x.dtype]) + sizes(x.shape)
        return head + sizes(x.stride()) + flat.numpy().tobytes()

    with path.open("wb") as out:
        out.write(struct.pack("<q", len(listed)))
        for call in listed:
            out.write(text(call.name) + text(call.operation))
            out.write(struct.pack("<q", len(call.options)))
            for name, value in call.options.items():
                out.write(text(name) + text(value))
            out.write(struct.pack("<q", len(call.inputs)))
            for name, x in call.inputs.items():
                out.write(array(name, x))
            out.write(struct.pack("<q", len(call.expected)))
            for name, x in call.expected.items():
                out.write(array(name, x.contiguous()))
                out.write(struct.pack("<d", call.tolerance[name]))
