"""What is installed, what runs where: the text of `python -m medcl_kernels env` and `list`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import medcl_kernels

from . import dispatch, env
from .registry import SPECS, OpSpec

OPTIONAL = (
    "triton",
    "monai",
    "nibabel",
    "scipy",
    "h5py",
    "PyYAML",
    "rich",
    "tyro",
    "matplotlib",
    "tensorboard",
    "pytorch-metric-learning",
)
Rows = list[tuple[str, str]]


def environment() -> dict[str, Rows]:
    """Sections of `(name, text)` lines, in the order in which they are shown."""
    return {
        "versions": _versions(),
        "library": _library(),
        "backends": [
            (name, "available" if reason is None else f"unavailable: {reason}")
            for name, reason in dispatch.available().items()
        ],
        "variables": [(one.name, _value(one)) for one in env.VARIABLES],
        "optional packages": [(name, _installed(name)) for name in OPTIONAL],
    }


def _versions() -> Rows:
    """Interpreter, packages, compiler, processor."""
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", built without CUDA"
    lines = [
        ("medcl_kernels", f"{medcl_kernels.__version__} in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}{cuda}"),
        ("numpy", _installed("numpy")),
        ("nvcc", _nvcc()),
        ("processor", _processor()),
        ("threads", f"{torch.get_num_threads()} of {len(os.sched_getaffinity(0))} usable cores"),
    ]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        lines.append((f"cuda:{index}", f"{found.name}, sm_{found.major}{found.minor}, {memory}"))
    return lines


def _library() -> Rows:
    """Where the compiled library is and what it says about itself, or why it is not loaded."""
    path = [("path", str(env.library_path()))]
    reason = env.load_library()
    if reason is not None:
        return [*path, ("state", f"not loaded: {reason}")]
    return [*path, ("state", "loaded"), *env.build_info().items()]


def _value(variable: env.Variable) -> str:
    """The value in force; a wrong one is shown with the complaint, not raised."""
    try:
        return variable.get() or "automatic"
    except ValueError as error:
        return str(error)


def _installed(distribution: str) -> str:
    """Its version, found without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _nvcc() -> str:
    """Version and path of the CUDA compiler on PATH or in its usual place."""
    path = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        return "not found"
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    release = [line for line in done.stdout.splitlines() if "release" in line]
    number = release[0].split("release ")[1].split(",")[0] if release else "unknown version"
    return f"{number} ({path})"


def _processor() -> str:
    """The model name that Linux gives, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def operations_of(spec: OpSpec) -> tuple[str, ...]:
    """The operations that an operation (itself) or a loss (what its module imports) runs on."""
    if spec.kind == "op":
        return (spec.name,)
    names = vars(import_module(spec.function.split(":")[0]))
    return tuple(name for name in dispatch.OPERATIONS if name in names)


def serves(backend: dispatch.Backend, spec: OpSpec) -> bool:
    """Whether a backend has every operation that an operation or loss may need."""
    return set(operations_of(spec)) <= set(backend.operations)


def backend_table() -> list[tuple[str, str, str, str]]:
    """`(kind, name, backends, summary)`; a backend that cannot run here stands in parentheses."""
    reasons = dispatch.available()
    table = []
    for spec in SPECS:
        served = [backend.name for backend in dispatch.BACKENDS if serves(backend, spec)]
        shown = ", ".join(name if reasons[name] is None else f"({name})" for name in served)
        table.append((spec.kind, spec.name, shown, spec.summary))
    return table


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the last one runs free."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
