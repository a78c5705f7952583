"""What a run ran on: versions, machine, git state. Saved beside every run."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from .config import ConfigError

_PACKAGES = ("torch", "numpy", "scipy", "nibabel", "medcl-kernels", "triton", "monai")


def describe_environment() -> dict:
    """Versions, device names, thread counts, command line and git commit (None outside a
    checkout)."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "git": _git_state(Path(__file__).resolve().parent),
    }


def choose_device(name: str) -> torch.device:
    """ "auto" = CUDA when present, else the CPU. ConfigError when the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: this torch ({torch.__version__}) sees no CUDA device; use "
            "--device cpu"
        )
    return device


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict | None:
    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
