"""Compiles the Triton kernels ahead of time, exactly as the operations would launch them.

The host code of an operation runs on CPU tensors with `launch` replaced by a recorder, so that
argument types, alignment and options are the real ones; what it recorded is then compiled for
architectures that this machine need not have. `python tests/triton_compile.py` prints the table of
docs/gpu-notes.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_calls import (
    CALLS,
    OTHER_CALLS,
    OTHER_TABLES,
    VARIANTS,
    arguments_of,
    selections_of,
)

from medcl_kernels.triton import configs
from medcl_kernels.triton.configs import Config

ARCHITECTURES = (80, 90, 100)
TABLES = (configs.TABLE, configs.OLDER, *configs.EARLIER.values(), configs.FASTER)
PRODUCTS = {  # as tests and tables name them -> rows, and what configs.TABLE calls them
    "bf16": (torch.bfloat16, "half"),
    "fp16": (torch.float16, "half"),
    "tf32": (torch.float32, "tf32"),
    "ieee": (torch.float32, "ieee"),
}
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.kernel.fn.__name__

    @property
    def variant(self) -> str:
        """The same for launches that compile to the same code."""
        compiled = source(self)
        return f"{self.name} {compiled.signature} {compiled.constants} {compiled.attrs}"


@dataclass(frozen=True)
class Job:
    """An operation to compile in one configuration; None: it has no tiles over pairs."""

    label: str
    product: str
    channels: int
    call: Callable[[], Any]
    table: str
    config: Config | None

    @property
    def precision(self) -> str:
        """As configs.TABLE has it."""
        return PRODUCTS[self.product][1]


@dataclass(frozen=True)
class Resources:
    """What the assembler says."""

    registers: int
    spills: int
    shared: int


def jobs() -> Iterator[Job]:
    """Every kernel in every configuration that its table offers, or times, and every kernel without
    tiles once; rows are as wide as the configuration serves, and for the kernels of CALLS narrow
    too. Packing of rows comes with `positive_at`, in every product."""
    for label, call in (CALLS | OTHER_CALLS).items():
        table = OTHER_TABLES.get(label, label if label in CALLS else "")
        selections = selections_of(label)
        for product, (dtype, precision) in PRODUCTS.items():
            if product == "fp16" and label not in CALLS and table:
                continue  # the kernels of bf16 but for the types; one of each table shows that
            if not table and (product == "bf16" or label == "positive_at"):
                for channels in (128, 384) if label == "positive_at" else (128,):
                    arguments = arguments_of(dtype, channels)
                    yield Job(label, product, channels, call(arguments), table, None)
            offered = list(cells(table, precision)) if table else []
            if label in VARIANTS:  # rows that differ in kind, and their first cell
                few = {"half": (128, configs.WIDE), "tf32": (64, 128, 256)}
                few["ieee"] = (configs.WIDE,)
                first = {limit: (limit, one) for limit, one in reversed(offered)}
                offered = [first[limit] for limit in few[precision] if limit in first]
            for limit, config in offered:
                key = configs.row(table, precision, min(limit, 384))
                if config in configs.FASTER.get(key, ()) and (label, product) != (key[0], "bf16"):
                    continue  # what only the autotuner tries, once
                widest = limit
                if limit == configs.WIDE:  # ieee is one row; its widest programs come at D = 128
                    widest = 128 if precision == "ieee" else 384
                narrow = label in CALLS and widest == 128 and product != "fp16"
                widths = (64, widest) if narrow else (widest,)
                for channels in widths:
                    if configs.row(table, precision, channels)[2] != limit:
                        continue  # narrow rows have a row of the table of their own
                    arguments = arguments_of(dtype, channels, selections)
                    yield Job(label, product, channels, call(arguments), table, config)


def cells(table: str, precision: str) -> Iterator[tuple[int, Config]]:
    """Widest rows and configuration of what serves a kernel of `table`, of any architecture."""
    limits = {configs.row(table, precision, width)[2] for width in (64, 128, 256, 384)}
    for limit in sorted(limits):
        key = configs.row(table, precision, min(limit, 384))
        several = {one: None for part in TABLES for one in part.get(key, ())}  # in order
        yield from ((limit, config) for config in several)


def serves(job: Job, architecture: int) -> bool:
    """Whether the tables offer the configuration on an architecture, or the autotuner tries it."""
    if job.config is None:
        return True
    offered = configs.candidates(job.table, job.precision, job.channels, architecture // 10)
    return job.config in offered or timed_only(job)


def timed_only(job: Job) -> bool:
    """Whether no table offers the configuration, only the autotuner tries it."""
    if job.config is None:
        return False
    key = configs.row(job.table, job.precision, job.channels)
    return job.config in configs.FASTER.get(key, ())


def in_every_run(job: Job) -> bool:
    """What `make test` compiles: tables with the heaviest epilogue, others in one configuration.
    `make aot` compiles the rest."""
    if job.product == "fp16" or job.label in VARIANTS or timed_only(job):
        return False
    if job.config is None:
        return job.product == "bf16" and job.channels == 128
    key = configs.row(job.table, job.precision, job.channels)
    if job.label in CALLS:
        return key[0] == job.label and (job.channels > 64 or key[2] == 64)
    return key == configs.row(job.table, "half", 128) and job.config == configs.TABLE[key][0]


def record(job: Job) -> list[Launch]:
    """What the operation launches in this configuration."""
    found: list[Launch] = []

    def recorder(
        kernel: Any, programs: int, arguments: Any, constants: Any, warps: int = 4, stages: int = 2
    ) -> None:
        assert programs > 0
        found.append(Launch(kernel, arguments, constants, warps, stages))

    def choose(table: str, *arguments: Any) -> None:
        if table == job.table:  # a rest of one selection may be of a lighter one
            arguments[-1](job.config)

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if job.product == "ieee" else "high")
    try:
        with mock.patch.object(sys.modules["medcl_kernels.triton.engine"], "choose", choose):
            with patched_launch(recorder):
                job.call()
    finally:
        torch.set_float32_matmul_precision(precision)
    if job.config is not None:  # what packs rows is compiled with the jobs that have no tiles
        found = [one for one in found if "OPTIONS" in one.constants]
    assert found, f"{job.label} launches nothing that is in the table {job.table}"
    return list({one.variant: one for one in found}.values())


def patched_launch(recorder: Any) -> Any:
    """`launch` as every module of the package imported it."""
    from contextlib import ExitStack

    stack = ExitStack()
    for name, module in list(sys.modules.items()):
        if name.startswith("medcl_kernels.triton.") and hasattr(module, "launch"):
            stack.enter_context(mock.patch.object(module, "launch", recorder))
    return stack


def source(launch: Launch) -> ASTSource:
    """As Triton's just-in-time compiler would specialise it."""
    signature, constants, attributes = {}, {}, {}

    def describe(value: Any, path: tuple[int, ...], specialise: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(
                describe(part, (*path, place), specialise) for place, part in enumerate(value)
            )
        if isinstance(value, Tensor):
            assert value.is_contiguous() or value.dim() >= 3
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or (specialise and value == 1):
            constants[path] = value
            return "constexpr"
        if specialise and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    for place, parameter in enumerate(launch.kernel.params):
        if parameter.name in launch.constants:
            constants[(place,)] = launch.constants[parameter.name]
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = describe(
                launch.arguments[parameter.name], (place,), not parameter.do_not_specialize
            )
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(launch: Launch, architecture: int) -> Resources:
    """Compiles and asks the assembler for registers and spill stores."""
    compiled = triton.compile(
        source(launch),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name)
    registers, stack = (int(re.search(rf"{one}:(\d+)", usage)[1]) for one in ("REG", "STACK"))
    spills = _spill_stores(compiled.asm["ptx"], architecture) if stack else 0
    return Resources(registers, spills, compiled.metadata.shared)


def _spill_stores(ptx: str, architecture: int) -> int:
    """Bytes; asked only where the kernel has a stack at all."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx.encode())
        file.flush()
        target = re.search(r"\.target (\w+)", ptx)[1]
        assembler = TOOLS / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
        said = _run(assembler, "-v", "--gpu-name", target, file.name, "-o", os.devnull)
    return int(re.search(r"(\d+) bytes spill stores", said)[1])


def _run(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def main() -> None:
    """Prints one Markdown row per configuration, `registers / shared KB` per architecture."""
    heads = " | ".join(f"sm_{one}" for one in ARCHITECTURES)
    print(f"| kernel | rows | D | tile, warps, stages | {heads} |")
    print("|---|---|---|---|" + "---|" * len(ARCHITECTURES))
    for job in jobs():
        if job.config is None or job.label not in CALLS or not in_every_run(job):
            continue
        (launch,) = record(job)
        cells = []
        for architecture in ARCHITECTURES:
            if not serves(job, architecture):
                cells.append("–")
                continue
            one = resources(launch, architecture)
            spilt = f", spills {one.spills} B" if one.spills else ""
            cells.append(f"{one.registers} / {one.shared / 1024:.0f}{spilt}")
        c = job.config
        split = f", K {c.channels}" if c.channels else ""
        split += f", out {c.output}" if c.output else ""
        tile = f"{c.rows}×{c.columns}, {c.warps}, {c.stages}{split}"
        row = (job.label, job.product, str(job.channels), tile, *cells)
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
