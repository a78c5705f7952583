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

import medcl_kernels.triton as kernels
from medcl_kernels.triton import configs, pair_gradients, pair_threshold
from medcl_kernels.triton.configs import Config

ARCHITECTURES = (80, 90, 100)
TABLES = (configs.TABLE, configs.OLDER, configs.FASTER)
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


def arguments_of(dtype: torch.dtype, channels: int, selections: int = 1) -> dict[str, Tensor]:
    """Small aligned tensors; only types, strides and alignment matter."""
    rows = torch.zeros(2, channels, 64, dtype=dtype)
    labels = torch.zeros(selections, 2, 64, dtype=torch.int64)
    return {"x": rows, "k": rows.clone(), "y": labels, "v": labels.float()}


def jobs() -> Iterator[Job]:
    """Every kernel in every configuration that its table offers, or times, and every kernel without
    tiles once; rows are as wide as the configuration serves, and for the kernels of CALLS narrow
    too. Packing of rows comes with `positive_at`, in every product."""
    for label, call in (CALLS | OTHER_CALLS).items():
        table = OTHER_TABLES.get(label, label if label in CALLS else "")
        selections = 3 if label == "heavy" or "three" in label else 1
        for product, (dtype, precision) in PRODUCTS.items():
            if product == "fp16" and label not in CALLS and table:
                continue  # the kernels of bf16 but for the types; one of each table shows that
            if not table and (product == "bf16" or label == "positive_at"):
                for channels in (128, 384) if label == "positive_at" else (128,):
                    arguments = arguments_of(dtype, channels)
                    yield Job(label, product, channels, call(arguments), table, None)
            offered = list(cells(table, precision)) if table else []
            if label in VARIANTS:  # rows that differ in kind, and their first cell
                few = {"half": (128, configs.WIDE), "tf32": (128,), "ieee": (configs.WIDE,)}
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
                    arguments = arguments_of(dtype, channels, selections)
                    yield Job(label, product, channels, call(arguments), table, config)


def cells(table: str, precision: str) -> Iterator[tuple[int, Config]]:
    """Widest rows and configuration of what serves a kernel of `table`, of any architecture."""
    limits = {configs.row(table, precision, width)[2] for width in (128, 256, 384)}
    for limit in sorted(limits):
        key = configs.row(table, precision, min(limit, 384))
        several = {one: None for part in TABLES for one in part.get(key, ())}  # in order
        yield from ((limit, config) for config in several)


def _logsumexp(a: dict[str, Tensor], key: bool, kinds: str, t: float) -> Callable[[], Any]:
    k, y = (a["k"], a["y"]) if key else (None, None)
    return lambda: kernels.pair_logsumexp(a["x"], k, a["y"], y, kinds, -1, t, True, False)


def _logsumexp_backward(a: dict[str, Tensor], key: bool, kinds: str, t: float) -> Any:
    k, y = (a["k"], a["y"]) if key else (None, None)
    rest = (kinds, -1, t, True, False, True, True)
    return lambda: kernels.pair_logsumexp_backward(a["v"], a["v"], a["x"], k, a["y"], y, *rest)


def _positive_log(a: dict[str, Tensor]) -> Callable[[], Any]:
    rest = (a["v"], -1, 0.1, True, False)
    return lambda: kernels.pair_positive_log(a["x"], None, a["y"], None, *rest)


def _positive_log_backward(a: dict[str, Tensor], key: bool) -> Callable[[], Any]:
    k, y = (a["k"], a["y"]) if key else (None, None)
    rest = (a["y"], y, a["v"], -1, 0.1, True, False, True, True)
    return lambda: kernels.pair_positive_log_backward(a["v"], a["x"], k, *rest)


def _mean(a: dict[str, Tensor]) -> Callable[[], Any]:
    rest = (a["y"], None, -1, 0.1, True, False)
    return lambda: (
        kernels.positive_mean(a["x"], None, *rest),
        kernels.positive_mean_backward(a["v"], a["x"], None, *rest, True, True),
    )


def _at(a: dict[str, Tensor]) -> Callable[[], Any]:
    rest = (a["y"][0], 0.1, True)
    return lambda: (
        kernels.positive_at(a["x"], a["k"], *rest),
        kernels.positive_at_backward(a["v"][0], a["x"], a["k"], *rest, True, True),
    )


def _affinity(
    a: dict[str, Tensor],
    key: bool = False,
    classes: int = 1,
    form: str = "affinity",
    t: float = 1.0,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Three patch sizes, forward and backward; between two tensors the shift is given and takes a
    gradient."""
    k = a["k"] if key else None
    ratios, terms = torch.zeros(3, 2, classes, 64), torch.zeros(3, 2, 64)
    shift = torch.zeros(()) if key else None
    given = (k, ratios, ratios if key else None, shift, form, t, True)
    need = (True, key, key)
    return (
        lambda: kernels.pair_affinity(a["x"], *given),
        lambda: kernels.pair_affinity_backward(terms, terms, terms, a["x"], *given, *need),
    )


def _class_ratio(a: dict[str, Tensor]) -> Callable[[], Any]:
    """Few windows, which are counted, and many, which are looked up."""
    maps = a["y"].reshape(2, 8, 8)
    few, many = torch.zeros(2, 2).long(), torch.zeros(4096, 2).long()
    rest = ([-2, 3, -2, 3, -4, 5, -4, 5], 3, False, False)
    return lambda: (
        kernels.patch_class_ratio(maps, few, *rest),
        kernels.patch_class_ratio(maps, many, *rest),
    )


def _gate(a: dict[str, Tensor]) -> Callable[[], Any]:
    z = a["x"][:, :16].contiguous()
    return lambda: (
        kernels.uncertainty_reweight(a["x"], z),
        kernels.uncertainty_reweight_backward(a["x"], a["x"], z, True, True),
    )


def _listed(a: dict[str, Tensor]) -> Callable[[], Any]:
    rest = (a["y"].flatten(), a["y"].flatten(), 0.1, True)
    return lambda: (
        kernels.pair_at(a["x"], None, *rest),
        kernels.pair_at_backward(a["v"].flatten(), a["x"], None, *rest, True, True),
    )


def _statistics(a: dict[str, Tensor]) -> Tensor:
    return a["v"][:1].expand(3, -1, -1).contiguous()


def _count(a: dict[str, Tensor]) -> Callable[[], Any]:
    """Quotas of positives and negatives, and the longest formulas: the sweep that counts."""
    options = ("pixel", "representation", -1, True, False)
    k = torch.ones(2, 2, dtype=torch.int64)

    def call() -> Any:
        rows = (a["x"], None, a["y"], None, None, _statistics(a))
        return pair_threshold.threshold_of(pair_gradients.pairs_of(*rows, *options), k, (1.0,))

    return call


def _topk(a: dict[str, Tensor]) -> Callable[[], Any]:
    options = (128, "out", "pair", "global", -1, 0.1, True, False)
    k = torch.ones(1, 1, dtype=torch.int64)
    return lambda: kernels.pair_topk(a["x"], None, a["y"], None, None, _statistics(a), k, *options)


def _filtered(a: dict[str, Tensor], key: bool, form: str, score: str) -> Callable[[], Any]:
    """Positives by label in both directions at once, or by index in one."""
    classes = 1 if key else 2
    rule = (torch.ones(classes, 2), torch.ones(classes, 2, dtype=torch.int64), None, None, None)
    options = (form, score, "image", -1, 0.1, True, False, True, True)
    index = a["y"][0, :, :, None].contiguous() if key else None
    k, v = a["k"] if key else None, a["v"][0]

    def call() -> Any:
        rows = (v, a["x"], k, v, a["y"][:1], None, index, _statistics(a))
        return kernels.pair_filtered_grad_backward(*rows, *rule, *options)

    return call


def _mitigate(a: dict[str, Tensor]) -> Callable[[], Any]:
    """The most perspectives, and the most rounds."""
    eight, three = (a["x"].repeat(m, 1, 1, 1) for m in (8, 3))
    order, few = (torch.zeros(m, m - 1, dtype=torch.int64) for m in (8, 3))
    rows = three.transpose(2, 3).contiguous().transpose(2, 3)
    return lambda: (
        kernels.mitigate_rows(eight, order, "pcgrad", "row", "mean", 0.5, False),
        kernels.mitigate_rows(rows, few, "cagrad", "flat", "mean", 0.5, True),
        kernels.mitigate_rows(rows, few, "consensus", "row", "mean", 0.5, True),
    )


THREE = "all,same,different"
CALLS: dict[str, Callable[[dict[str, Tensor]], Callable[[], Any]]] = {
    "statistics": lambda a: _logsumexp(a, False, "all", 0.1),
    "heavy": lambda a: _logsumexp(a, False, THREE, 0.1),
    "argmax": lambda a: lambda: kernels.pair_argmax(a["x"], a["k"], True),
    "gradient": lambda a: _logsumexp_backward(a, False, "all", 0.1),
    "heavy_gradient": lambda a: _affinity(a)[1],
    "filter": _count,
    "filtered": lambda a: _filtered(a, False, "pixel", "representation"),
}
AFFINITIES: dict[str, dict[str, Any]] = {
    "pair_affinity": {},
    "pair_affinity, key and shift": {"key": True},
    "pair_affinity, key and shift, cold": {"key": True, "t": 0.01},
    "pair_affinity, cold": {"t": 0.01},
    "pair_affinity, release2d, 3 classes": {"classes": 3, "form": "release2d"},
    "pair_affinity, 10 classes": {"classes": 10},
}
OTHER_CALLS: dict[str, Callable[[dict[str, Tensor]], Callable[[], Any]]] = {
    "pair_logsumexp, key, running maximum": lambda a: _logsumexp(a, True, "all", 0.01),
    "pair_logsumexp, three, running maxima": lambda a: _logsumexp(a, False, THREE, 0.01),
    "pair_logsumexp backward, key": lambda a: _logsumexp_backward(a, True, "all", 0.1),
    "pair_logsumexp backward, three": lambda a: _logsumexp_backward(a, False, THREE, 0.1),
    "pair_logsumexp backward, cold": lambda a: _logsumexp_backward(a, False, "all", 0.01),
    "pair_logsumexp backward, three, cold": lambda a: _logsumexp_backward(a, False, THREE, 0.01),
    "pair_positive_log": _positive_log,
    "pair_positive_log, three": _positive_log,
    "pair_positive_log backward, key": lambda a: _positive_log_backward(a, True),
    "pair_positive_log backward, three": lambda a: _positive_log_backward(a, False),
    "positive_mean": _mean,
    "positive_at": _at,
    "patch_class_ratio": _class_ratio,
    "uncertainty_reweight": _gate,
    "pair_topk": _topk,
    "pair_filtered_grad, key": lambda a: _filtered(a, True, "in", "pair"),
    "listed": _listed,
    "mitigate_rows": _mitigate,
}
OTHER_TABLES = {
    "pair_logsumexp, key, running maximum": "statistics",
    "pair_logsumexp, three, running maxima": "heavy",
    "pair_logsumexp backward, key": "gradient",
    "pair_logsumexp backward, three": "heavy_gradient",
    "pair_logsumexp backward, cold": "gradient",
    "pair_logsumexp backward, three, cold": "heavy_gradient",
    "pair_positive_log": "heavy",
    "pair_positive_log, three": "heavy",
    "pair_positive_log backward, key": "heavy_gradient",
    "pair_positive_log backward, three": "heavy_gradient",
    "pair_topk": "filter",
    "pair_filtered_grad, key": "filtered",
}
# further forms of kernels that are compiled with every cell under another label
VARIANTS = {
    "pair_logsumexp, three, running maxima",
    "pair_logsumexp backward, key",
    "pair_logsumexp backward, cold",
    "pair_logsumexp backward, three, cold",
    "pair_positive_log, three",
    "pair_positive_log backward, key",
}
for _name, _options in AFFINITIES.items():
    for _way, _table in enumerate(("heavy", "heavy_gradient")):
        _label = f"{_name}{' backward' * _way}"
        OTHER_CALLS[_label] = lambda a, way=_way, options=_options: _affinity(a, **options)[way]
        OTHER_TABLES[_label] = _table
        if _options:
            VARIANTS.add(_label)


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
        return key[0] == job.label and job.channels > 64
    return key == configs.row(job.table, "half", 128) and job.config == configs.TABLE[key][0]


def record(job: Job) -> list[Launch]:
    """What the operation launches in this configuration."""
    found: list[Launch] = []

    def recorder(
        kernel: Any, programs: int, arguments: Any, constants: Any, warps: int = 4, stages: int = 2
    ) -> None:
        assert programs > 0
        found.append(Launch(kernel, arguments, constants, warps, stages))

    def choose(*arguments: Any) -> None:
        arguments[-1](job.config)

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if job.product == "ieee" else "high")
    try:
        with mock.patch.object(sys.modules["medcl_kernels.triton.engine"], "choose", choose):
            with _patched_launch(recorder):
                job.call()
    finally:
        torch.set_float32_matmul_precision(precision)
    if job.config is not None:  # what packs rows is compiled with the jobs that have no tiles
        found = [one for one in found if "OPTIONS" in one.constants]
    return list({one.variant: one for one in found}.values())


def _patched_launch(recorder: Any) -> Any:
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
