"""Builds `csrc/host`: the CUDA kernels on the host emulator, plain and under sanitizers."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "host"


def build(
    targets: tuple[str, ...] = (),
    sanitizer: str = "",
    source: Path = ROOT / "csrc",
    folder: Path | None = None,
) -> Path:
    """Builds what changed and returns the build folder.

    Args:
        targets: of csrc/host/CMakeLists.txt; empty for all.
        sanitizer: "", "address" (with undefined behaviour) or "thread".
        source: the csrc folder, or a copy of it with a bug in it.
        folder: where to build; by default one folder per sanitizer that is kept.

    Raises:
        RuntimeError: it does not build; the message is the compiler's.
    """
    folder = folder or BUILD / (sanitizer or "plain")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    configure = ["cmake", "-S", str(source / "host"), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DMEDCL_HOST_SANITIZER={sanitizer}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DMEDCL_TORCH_DIR={Path(torch.__file__).parent}"]
    make = ["cmake", "--build", str(folder), "-j", jobs]
    make += ["--target", *targets] if targets else []
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        for command in (configure, make):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    return folder


def missing_tools() -> str | None:
    """What keeps this machine from building it, or None."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    absent = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found" if absent else None


@cache
def host_module() -> ModuleType:
    """The module `_host`, built if it is out of date."""
    path = build(("_host",)) / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_host", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
