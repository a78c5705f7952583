"""Environment variables and the compiled library: the only module that reads `os.environ`.

Variables are read when they are asked for, not at import, so `os.environ[...] = ...` in a notebook
works (inside a function that `torch.compile` has traced, the value at trace time stays). The
library is the exception: `load_library` opens it once per process, with the settings of that
moment.

Importing this module imports neither torch nor anything else that is not in the standard library.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

LIBRARY_NAME = "libmedcl_kernels.so"
OLDEST_TORCH = (2, 10)  # the stable-ABI version that the library is compiled for
HOW_TO_BUILD = (
    "build it with `make build`, or `pip install -e . --no-build-isolation`, in a checkout; "
    'impl="reference" works without it'
)


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: the variable, `MEDCL_...`.
        default: what an unset or empty variable means; "" stands for "automatic".
        choices: the accepted values besides ""; an empty tuple accepts any text.
        meaning: one sentence for the table of `python -m medcl_kernels env` and of the README.
    """

    name: str
    default: str
    choices: tuple[str, ...]
    meaning: str

    def get(self) -> str:
        """The value now, lower-case where there are choices.

        Raises:
            ValueError: the value is none of `choices`.
        """
        value = os.environ.get(self.name, "") or self.default
        if not self.choices or value == "":
            return value
        if value.lower() not in self.choices:
            expected = ", ".join(self.choices)
            raise ValueError(f"{self.name}={value!r}: expected one of {expected}, or unset")
        return value.lower()


IMPL = Variable(
    "MEDCL_IMPL",
    "auto",
    ("auto", "reference", "cpu", "triton", "cuda"),
    'what impl="auto" means; any other impl given in a call wins',
)
CHECK_FINITE = Variable(
    "MEDCL_CHECK_FINITE",
    "0",
    ("0", "1"),
    "1: inputs with NaN or Inf in rows that count raise ValueError (reads every input once)",
)
CPU_CAPABILITY = Variable(
    "MEDCL_CPU_CAPABILITY",
    "",
    ("base", "avx2", "avx512"),
    "instruction set of the CPU kernels; unset: the best that the processor has",
)
GEMM = Variable(
    "MEDCL_GEMM",
    "",
    ("blas", "portable"),
    "matrix product of the CPU kernels; unset: torch's BLAS where it exports one",
)
LIBRARY = Variable(
    "MEDCL_LIBRARY",
    "",
    (),
    f"path of another {LIBRARY_NAME}; unset: the one beside the package",
)
DATA = Variable(
    "MEDCL_DATA",
    "",
    (),
    "root of the data sets of the training scripts and of the tests; unset: ../shared/data",
)
TRITON_AUTOTUNE = Variable(
    "MEDCL_TRITON_AUTOTUNE",
    "0",
    ("0", "1"),
    "1: tile sizes of Triton kernels are timed at the first call of a size, not read from a table",
)
CUDA_WGMMA = Variable(
    "MEDCL_CUDA_WGMMA",
    "0",
    ("0", "1"),
    "1: CUDA C++ row statistics of 16-bit features up to 128 channels wide take the wgmma kernels "
    "(compute capability 9.0, not yet run on a GPU); read when the library is loaded",
)
VARIABLES = (
    IMPL,
    CHECK_FINITE,
    CPU_CAPABILITY,
    GEMM,
    LIBRARY,
    DATA,
    TRITON_AUTOTUNE,
    CUDA_WGMMA,
)


def default_impl() -> str:
    """What `impl="auto"` stands for: "auto" or the name of one backend."""
    return IMPL.get()


def check_finite() -> bool:
    """Whether inputs are to be checked for NaN and Inf."""
    return CHECK_FINITE.get() == "1"


def triton_autotune() -> bool:
    """Whether tile sizes of Triton kernels are to be timed."""
    return TRITON_AUTOTUNE.get() == "1"


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES as set, for messages about devices that are not there."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def triton_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors; decided when the process
    starts."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y", "t")


def data_root() -> Path | None:
    """The data folder that the user named, or None."""
    value = DATA.get()
    return Path(value).expanduser() if value else None


def library_path() -> Path:
    """Where the compiled library is, or would be."""
    value = LIBRARY.get()
    return Path(value).expanduser() if value else Path(__file__).with_name(LIBRARY_NAME)


_lock = threading.Lock()
_attempted = False
_reason: str | None = None


def load_library() -> str | None:
    """Opens the compiled library, once per process.

    Returns:
        None when the ops `torch.ops.medcl.*` are there, else the reason why not and the way out.
        The answer is kept: a library that is built later is seen by the next process.
    """
    global _attempted, _reason
    with _lock:
        if not _attempted:
            _reason = _load()
            _attempted = True
        return _reason


def _load() -> str | None:
    """One attempt; the reason for its failure, or None."""
    try:
        path, capability, gemm = library_path(), CPU_CAPABILITY.get(), GEMM.get()
        wgmma = CUDA_WGMMA.get() == "1"
    except ValueError as error:
        return str(error)
    if not path.is_file():
        return f"the compiled library is missing ({path}): {HOW_TO_BUILD}"
    import torch

    oldest = ".".join(map(str, OLDEST_TORCH))
    if _version_pair(torch.__version__) < OLDEST_TORCH:
        return (
            f"torch {torch.__version__} is too old for the compiled library, which needs "
            f"torch >= {oldest}: install a newer torch"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load into torch {torch.__version__} ({error}): {HOW_TO_BUILD}"
    try:
        torch.ops.medcl.configure(capability, gemm)
        if wgmma:
            torch.ops.medcl.use_wgmma(True)
    except AttributeError:
        return f"{path} is not a library of this version of medcl_kernels: {HOW_TO_BUILD}"
    except RuntimeError as error:  # asked for what this machine does not have; never fall back
        asked = " ".join(
            f"{v.name}={v.get()}" for v in (CPU_CAPABILITY, GEMM) if v.get() != v.default
        )
        return f"{asked or path}: {str(error).splitlines()[0]}"
    return None


def _version_pair(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"; pre-releases such as "2.13.0a0+git" count as their release."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def use_wgmma(use: bool) -> bool:
    """Whether row statistics take the wgmma kernels from now on, in all threads.

    Returns:
        What was in force before; always False where the library has no CUDA kernels.

    Raises:
        RuntimeError: the library is not loaded; the message says why.
    """
    reason = load_library()
    if reason is not None:
        raise RuntimeError(reason)
    import torch

    return torch.ops.medcl.use_wgmma(use)


def build_info() -> dict[str, str]:
    """What the loaded library says about itself and about the configuration in force.

    Returns:
        The fields of the op `medcl::build_info`, in the library's order.

    Raises:
        RuntimeError: the library is not loaded; the message says why.
    """
    reason = load_library()
    if reason is not None:
        raise RuntimeError(reason)
    import torch

    return dict(part.split("=", 1) for part in torch.ops.medcl.build_info().split(";") if part)
