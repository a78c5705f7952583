"""Starts every Triton kernel as on a GPU, without one: Triton compiles it for an H200 when it is
called, loads it into a driver that has no device (pretended_driver.c) and starts it there. What
arrives must be what `launch` was given: programs, warps, stream, and the values of all parameters
in the order of the compiled signature. Prints a line per operation.

    python tests/pretended_driver.py [WORD]          operations whose name has the word
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "pretended-driver"
STREAM = 0x5EED
CAPABILITY, PROCESSORS = (9, 0), 132


class Started(ctypes.Structure):
    """`struct Launch` of pretended_driver.c."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_ulonglong),
        ("function", ctypes.c_char * 256),
        ("parameters", ctypes.c_ulonglong * 512),
    ]


def build() -> ctypes.CDLL:
    """The driver, loaded before Triton asks for the library of that name."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    library, fresh = FOLDER / "libcuda.so.1", FOLDER / f"libcuda.{os.getpid()}"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_suffix(".c")
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", f"-I{headers}"]
    command += ["-Wl,-soname,libcuda.so.1", "-o", str(fresh), str(source)]
    subprocess.run(command, check=True)
    fresh.replace(library)  # another process may have the old one open
    os.environ["TRITON_LIBCUDA_PATH"] = str(FOLDER)
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver.pretended_last.restype = ctypes.POINTER(Started)
    return driver


def values(signature: Any, arguments: Any) -> Iterator[tuple[str, Any]]:
    """Types and values of what a kernel takes at run time, in order."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from values(kind, value)
        elif kind != "constexpr":
            yield kind, value


def size(kind: str) -> int:
    """Bytes of a parameter."""
    return 8 if kind.startswith("*") or kind == "i64" else 4


def bits(kind: str, value: Any) -> int:
    """A parameter as the driver gets it."""
    if kind.startswith("*"):
        return value.data_ptr() if isinstance(value, Tensor) else 0
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value) & (2 ** (8 * size(kind)) - 1)


def pretend(driver: ctypes.CDLL) -> list[tuple[Started, tuple[Any, ...]]]:
    """Makes it Triton's driver; the list gets every launch that arrives, with the signature of its
    kernel."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    found: list[tuple[Started, tuple[Any, ...]]] = []

    class Launcher(CudaLauncher):
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.signature = source.signature

        def __call__(self, *arguments: Any) -> None:
            given = arguments[-len(self.signature) :]
            sizes = bytes(size(kind) for kind, _ in values(self.signature.values(), given))
            driver.pretended_expect(sizes, len(sizes))
            before = driver.pretended_launches()
            super().__call__(*arguments)
            if driver.pretended_launches() > before:  # Triton starts nothing for an empty grid
                one = Started.from_buffer_copy(driver.pretended_last().contents)
                found.append((one, self.signature))

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), Launcher
            self.get_device_capability = lambda device=0: CAPABILITY
            self.get_current_stream = lambda device: STREAM
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

    triton.runtime.driver.set_active(Driver())
    return found


def checked(launch: Callable[..., None], found: list[Any], names: set[str]) -> Callable[..., None]:
    """`launch` of medcl_kernels.triton, followed by a look at what arrived."""

    def launched(
        kernel: Any, programs: int, arguments: Any, constants: Any, warps: int = 4, stages: int = 2
    ) -> None:
        before = len(found)
        launch(kernel, programs, arguments, constants, warps, stages)
        assert len(found) == before + 1, f"{kernel.__name__} was not started"
        one, signature = found[-1]
        name = one.function.decode()
        assert name == kernel.__name__
        assert (*one.grid, *one.block) == (programs, 1, 1, 32 * warps, 1, 1), name
        assert one.stream == STREAM
        given = [{**arguments, **constants}[parameter] for parameter in signature]
        for place, (kind, value) in enumerate(values(signature.values(), given)):
            assert one.parameters[place] == bits(kind, value), f"{name}: parameter {place}"
        names.add(name)

    return launched


def main(word: str = "") -> int:
    """0 if every kernel of the package was started, as it was meant to be."""
    found = pretend(build())
    from triton_calls import CALLS, OTHER_CALLS, arguments_of, selections_of
    from triton_compile import patched_launch

    from medcl_kernels.triton import configs
    from medcl_kernels.triton.launch import launch

    configs.multiprocessors = lambda device: PROCESSORS  # type: ignore[assignment]
    configs.capability = lambda device: CAPABILITY[0]  # type: ignore[assignment]
    kernels: set[str] = set()
    names: set[str] = set()
    for module in [one for name, one in sys.modules.items() if name.startswith("medcl_kernels")]:
        jitted = {name for name, one in vars(module).items() if isinstance(one, triton.JITFunction)}
        kernels |= {name for name in jitted if name.endswith("_kernel")}
    for label, call in (CALLS | OTHER_CALLS).items():
        if word not in label:
            continue
        before = len(found)
        with patched_launch(checked(launch, found, names)):
            call(arguments_of(torch.bfloat16, 128, selections_of(label)))()
        print(f"{label}: {len(found) - before} launches", flush=True)
        assert len(found) > before, f"{label} started nothing"
    print(f"{len(names)} kernels, {len(found)} launches with Triton {triton.__version__}")
    missing = kernels - names
    assert word or not missing, f"not started: {', '.join(sorted(missing))}"
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
