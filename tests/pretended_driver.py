"""Starts every Triton kernel as on a GPU, without one: Triton compiles it for an H200 when it is
called, loads it into a driver that has no device (pretended_driver.c) and starts it there. Each
launch must arrive with the grid, the warps, the shared memory, the stream and, in the order of the
compiled signature, the values that the operation gave. Prints a line per operation.

    python tests/pretended_driver.py [WORD]          operations whose name has the word
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
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
    library = FOLDER / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_suffix(".c")
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
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


def bits(kind: str, value: Any) -> int:
    """A parameter as the driver gets it."""
    if kind.startswith("*"):
        return value.data_ptr() if isinstance(value, Tensor) else 0
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value) & 0xFFFFFFFF


def pretend(driver: ctypes.CDLL) -> list[Started]:
    """Makes it Triton's driver; the list gets every launch that arrives."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    found: list[Started] = []

    class Launcher(CudaLauncher):
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.signature = tuple(source.signature.values())
            self.metadata = metadata

        def __call__(self, *arguments: Any) -> None:
            given = list(values(self.signature, arguments[-len(self.signature) :]))
            sizes = [8 if kind.startswith("*") else {"i64": 8}.get(kind, 4) for kind, _ in given]
            driver.pretended_expect(bytes(sizes), len(sizes))
            before = driver.pretended_launches()
            super().__call__(*arguments)
            assert driver.pretended_launches() == before + 1, "nothing was started"
            one = Started.from_buffer_copy(driver.pretended_last().contents)
            name = self.metadata.name
            assert one.function.decode() == name
            assert tuple(one.grid) == arguments[:3] and one.stream == STREAM
            assert one.shared == self.metadata.shared
            assert tuple(one.block) == (32 * self.metadata.num_warps, 1, 1)
            for place, (kind, value) in enumerate(given):
                arrived = one.parameters[place]
                assert arrived == bits(kind, value), f"{name}: parameter {place} is {arrived}"
            found.append(one)

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), Launcher
            self.get_device_capability = lambda device=0: CAPABILITY
            self.get_current_stream = lambda device: STREAM
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

    triton.runtime.driver.set_active(Driver())
    return found


def main(word: str = "") -> int:
    """0 if every operation started its kernels as it meant to."""
    found = pretend(build())
    from triton_calls import CALLS, OTHER_CALLS, arguments_of

    from medcl_kernels.triton import configs

    configs.multiprocessors = lambda device: PROCESSORS  # type: ignore[assignment]
    configs.capability = lambda device: CAPABILITY[0]  # type: ignore[assignment]
    total = 0
    for label, call in (CALLS | OTHER_CALLS).items():
        if word not in label:
            continue
        selections = 4 if "four" in label else 3 if label == "heavy" or "three" in label else 1
        found.clear()
        call(arguments_of(torch.bfloat16, 128, selections))()
        assert found, f"{label} started nothing"
        total += len(found)
        print(f"{label}: {len(found)} launches", flush=True)
    print(f"{total} launches with Triton {triton.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
